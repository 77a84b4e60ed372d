"""Laws of the length of a merged delta."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poemerge.numerics.length import STRENGTH, length

LAW = settings(max_examples=30, deadline=None)


def orthogonal_experts(count: int, size: float) -> tuple[Tensor, Tensor]:
    """Rank-one task vectors of spectral norm `size` that share no direction, and a base of spectral norm 2."""
    deltas = torch.zeros(count, 12, 10, dtype=torch.float64)
    for i in range(count):
        deltas[i, i, i] = size
    base = torch.zeros(12, 10, dtype=torch.float64)
    base[0, 0] = 2.0
    return deltas, base


@pytest.mark.parametrize(("count", "size"), [(2, 0.1), (7, 0.1), (7, 3.0)])
def test_orthogonal_experts_follow_the_equation(count: int, size: float) -> None:
    deltas, base = orthogonal_experts(count, size)
    phi = STRENGTH * (size / 2) ** 2
    assert length(deltas, base) == pytest.approx((1 + phi) / (1 + count * phi), rel=1e-6)


@LAW
@given(st.integers(2, 8), st.floats(-3, 3), st.integers(0, 2**32))
def test_bounds_and_limits(count: int, power: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(count, 9, 7, generator=generator, dtype=torch.float64)
    base = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    found = length(deltas * 10**power, base)
    assert 1 / count - 1e-9 <= found <= 1
    assert length(deltas * 10 ** (power + 0.5), base) <= found + 1e-12  # longer task vectors, shorter merge
    assert length(deltas[:1] * 10**power, base) == pytest.approx(1)
    assert length(deltas[:1].expand(count, -1, -1), base) == pytest.approx(1)
    padded = torch.cat([deltas, torch.zeros_like(deltas)]) * 10**power
    assert length(padded, base) == pytest.approx(found)
    assert length(deltas[torch.randperm(count, generator=generator)] * 10**power, base) == pytest.approx(found)


def test_adapters_have_the_length_of_their_dense_deltas() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(40, 24, generator=generator)
    adapters = [
        (torch.randn(40, rank, generator=generator), torch.randn(rank, 24, generator=generator), 0.02 * rank)
        for rank in (2, 4, 4, 8)
    ]
    dense = torch.stack([scaling * b @ a for b, a, scaling in adapters])
    assert length(adapters, base) == pytest.approx(length(dense, base), rel=1e-3)


def test_nothing_to_add_and_nothing_to_add_it_to() -> None:
    deltas, base = orthogonal_experts(4, 1.0)
    assert length(torch.zeros_like(deltas), base) == 1.0
    assert length(deltas, torch.zeros_like(base)) == pytest.approx(1 / 4)
