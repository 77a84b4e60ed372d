"""What storing a checkpoint in few digits adds to a task vector is not taken for what the expert learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poemerge.merging.matrices import solve_as_merged
from poemerge.merging.settings import ParameterSettings, Selection, resolve
from poemerge.numerics.breadth import breadth
from poemerge.numerics.rounding import rounding_edge
from poemerge.params import MergeParams


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _settings() -> ParameterSettings:
    return resolve(MergeParams(), Selection(), "layer.weight", "matrix")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 200), (150, 600)])
def test_the_edge_is_just_above_the_singular_values_of_the_rounding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    exact = _random(2, *shape) * torch.tensor([0.02, 3.0])[:, None, None]
    stored = exact.to(dtype).float()
    largest = torch.linalg.matrix_norm((stored - exact).double(), 2)
    edge = rounding_edge(stored)
    assert bool(((largest < edge) & (edge < 1.25 * largest)).all())
    assert rounding_edge(exact).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2e-3), (torch.float16, 2e-4)])
def test_an_adapter_that_was_merged_and_stored_tells_of_its_rank(dtype: torch.dtype, size: float) -> None:
    base = (0.05 * _random(128, 96)).to(dtype)
    products = torch.stack([size * _random(128, r, seed=r) @ _random(r, 96, seed=r + 9) for r in (2, 4)])
    stored = (base.float() + products).to(dtype).float()
    deltas = stored - base.float()
    assert bool((breadth(deltas) > 0.8).all())
    expected = torch.tensor([2, 4], dtype=torch.float64) / 96
    torch.testing.assert_close(breadth(deltas, edge=rounding_edge(stored)), expected)

    for one in (deltas, deltas.unsqueeze(0)):
        weights = base if one.ndim == 3 else base.unsqueeze(0)
        solution = solve_as_merged(one, weights, _settings())
        pooling = (solution if one.ndim == 3 else solution.unbind()[0]).posterior.pooling
        torch.testing.assert_close(pooling, 1 - expected)


def test_a_full_fine_tune_in_full_precision_is_its_own() -> None:
    deltas = 0.01 * _random(3, 40, 30)
    pooling = solve_as_merged(deltas, _random(40, 30, seed=1), _settings()).posterior.pooling
    torch.testing.assert_close(pooling, torch.full((3,), 0.1, dtype=torch.float64))
