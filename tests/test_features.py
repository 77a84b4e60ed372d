"""What stands for the head of an expert without one: the directions of the features that it moved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poemerge.merging.features import moved_directions


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_they_are_those_of_the_movement_and_its_mean_divergence_is_one() -> None:
    before, movement = _random(40, 8, 24), _random(40, 8, 24, seed=1) * torch.linspace(0.1, 3, 24)
    found = moved_directions(before, before + movement)
    rows = movement.flatten(0, 1)
    assert 0.5 * float((rows @ found.T).square().sum(-1).mean()) == pytest.approx(1, rel=1e-5)
    covariance = torch.cov(rows.T, correction=0)
    gram = found.T @ found
    torch.testing.assert_close(gram / gram.trace(), covariance / covariance.trace(), atol=1e-6, rtol=1e-4)


def test_a_step_of_training_moves_features_along_what_the_head_reads() -> None:
    """One step down the cross-entropy of a head on free features: the movement lies in the head's row space."""
    features, head = _random(200, 16).requires_grad_(), _random(4, 16, seed=1)
    labels = torch.randint(4, (200,), generator=torch.Generator().manual_seed(2))
    torch.nn.functional.cross_entropy(features @ head.T, labels).backward()
    assert features.grad is not None
    found = moved_directions(features.detach(), features.detach() - 50 * features.grad)
    basis = torch.linalg.qr(head.T)[0]
    assert float((found - found @ basis @ basis.T).norm()) < 1e-3 * float(found.norm())


def test_at_most_64_of_the_largest_are_kept() -> None:
    before, movement = _random(500, 80), _random(500, 80, seed=1) * torch.linspace(0.01, 1, 80)
    found = moved_directions(before, before + movement)
    assert found.shape == (64, 80)
    least = torch.linalg.svdvals(torch.cov(movement.T, correction=0))[63]
    kept = torch.linalg.svdvals(found.T @ found)
    assert float(kept[63] / kept[0]) == pytest.approx(
        float(least / torch.linalg.svdvals(torch.cov(movement.T))[0]), rel=0.01
    )


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_what_moves_all_inputs_alike_says_nothing(shift: float) -> None:
    before = _random(30, 12)
    with pytest.raises(ValueError, match="moves no features of the base"):
        moved_directions(before, before + shift)
