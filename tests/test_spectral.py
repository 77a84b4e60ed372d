"""Laws of the bound on how far a merge goes in any direction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poemerge
from poemerge.merging import Selection
from poemerge.merging.matrices import merge_matrices
from poemerge.merging.settings import resolve
from poemerge.numerics.adapters import Adapters
from poemerge.numerics.spectral import farthest, within
from poemerge.params import MergeParams

LAW = settings(max_examples=30, deadline=None)


@LAW
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 2), st.floats(-12, 6), st.integers(0, 2**32))
def test_the_nearest_matrix_of_the_ball(rows: int, columns: int, part: float, power: float, seed: int) -> None:
    theta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**power
    values = torch.linalg.svdvals(theta)
    bound = part * float(values[0])
    found, held = within(theta, bound)
    left, sizes, right = torch.linalg.svd(theta, full_matrices=False)
    torch.testing.assert_close(found, left * sizes.clamp_max(bound) @ right, rtol=1e-7, atol=1e-9 * float(values[0]))
    assert held == int((values > bound).sum())
    again, none = within(found, bound * (1 + 1e-9))
    assert again is found
    assert none == 0


def test_what_overshoots_a_little_is_left_and_what_overshoots_far_is_held_to_once() -> None:
    theta = torch.diag(torch.tensor([4.0, 2.0, 0.5]))
    found, held = within(theta, 1.0, overshoot=5.0)
    assert found is theta
    assert held == 0
    found, held = within(theta, 1.0, overshoot=3.0)
    torch.testing.assert_close(found, torch.diag(torch.tensor([1.0, 1.0, 0.5])))
    assert held == 2


def test_short_merges_are_left_alone() -> None:
    theta = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    found, held = within(theta, 1.01 * float(torch.linalg.matrix_norm(theta, 2)))
    assert found is theta
    assert held == 0
    zero, none = within(torch.zeros(4, 3), 0.0)
    assert not zero.any()
    assert none == 0


def test_the_farthest_of_dense_and_factored_experts() -> None:
    generator = torch.Generator().manual_seed(1)
    adapters = [
        (torch.randn(40, rank, generator=generator), torch.randn(rank, 24, generator=generator), 0.3 / rank)
        for rank in (2, 4, 16)
    ]
    dense = torch.stack([scaling * b @ a for b, a, scaling in adapters])
    exact = float(torch.linalg.matrix_norm(dense.double(), 2).max())
    assert farthest(dense) == pytest.approx(exact, rel=1e-5)
    assert farthest(Adapters(adapters)) == pytest.approx(exact, rel=1e-5)
    assert farthest(torch.zeros(3, 5, 4)) == 0


def test_two_experts_that_nearly_contradict_each_other() -> None:
    """Output directions a little apart, demands far apart: the mode goes many times as far as either, the bound not."""
    angle = 0.05
    left = torch.tensor([[1.0, 0.0, 0.0], [torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle)), 0.0]])
    inputs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [-1.0, 0.2, 0.0, 0.0]])
    deltas = torch.stack([torch.outer(one, row) for one, row in zip(left, inputs, strict=True)]).double()
    theta = poemerge.solve(deltas, side="both", prior_precision=1e-6).dense()
    bound = farthest(deltas)
    assert float(torch.linalg.matrix_norm(theta, 2)) > 10 * bound
    held_back, held = within(theta, bound)
    assert float(torch.linalg.matrix_norm(held_back, 2)) == pytest.approx(bound)
    assert held == 1


def test_adapters_are_held_back_as_their_dense_deltas_are() -> None:
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(40, 4, generator=generator)  # outputs that all adapters move, each a little beside the others
    factors = [
        (shared + 0.1 * torch.randn(40, 4, generator=generator), torch.randn(4, 24, generator=generator), 0.02)
        for _ in range(4)
    ]
    dense = torch.stack([scaling * b @ a for b, a, scaling in factors])
    base = torch.randn(1, 40, 24, generator=generator)
    names = ["one", "two", "three", "four"]
    settings = replace(resolve(MergeParams(), Selection(), "w", "matrix"), overshoot=1.0)

    def merged(deltas: torch.Tensor | list[tuple[torch.Tensor, torch.Tensor, float]], **changes: float) -> torch.Tensor:
        (one,) = merge_matrices(
            ["w"], names, base.clone(), deltas, replace(settings, **changes), False, torch.float32, 4
        )
        assert one.weight is not None
        assert (one.entry["held"] > 0) == ("coefficient" not in changes)
        return one.weight - base[0]

    theta = merged(factors)
    torch.testing.assert_close(theta, merged(dense.unsqueeze(0)), atol=1e-5, rtol=0)
    assert float(torch.linalg.matrix_norm(theta, 2)) <= farthest(dense) * (1 + 1e-5)
    assert float(torch.linalg.matrix_norm(merged(factors, coefficient=1.0), 2)) > 1.5 * farthest(dense)
