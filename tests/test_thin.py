"""Adapters taken together: problems through their rank are the dense ones, and bases keep their digits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from poemerge import Factored, solve
from poemerge.numerics.adapters import Adapters, LowRank
from poemerge.numerics.dual import DualOneSided, Grams
from poemerge.numerics.one_sided import OneSided
from poemerge.numerics.thin import ThinTwoSided
from poemerge.numerics.two_sided import TwoSided


def low_rank(batch: int, experts: int, rows: int, columns: int, rank: int) -> LowRank:
    """Random task vectors of two sizes; the last expert of the last member is absent."""
    generator = torch.Generator().manual_seed(7)

    def unit(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn / torch.linalg.vector_norm(drawn, dim=(-2, -1), keepdim=True)

    sizes = torch.linspace(0.5, 2, batch * experts, dtype=torch.float64).reshape(batch, experts)
    sizes[-1, -1] = 0
    return LowRank(unit(batch, experts, rows, rank), unit(batch, experts, columns, rank), sizes)


@pytest.mark.parametrize("pooling", [0.0, 0.5])
def test_through_the_rank_is_the_dense_problem(pooling: float) -> None:
    deltas = low_rank(2, 5, 14, 11, 3)
    thin, whole = ThinTwoSided(deltas, 154, pooling), TwoSided(deltas.dense(), 154, pooling)
    close = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(thin.trace, whole.trace, **close)
    torch.testing.assert_close(thin.start_residual_sq, whole.start_residual_sq, **close)
    torch.testing.assert_close(thin.norm_sq, deltas.dense().square().sum((-2, -1)), **close)
    weights = torch.tensor([[1.0, 2.0, 0.5, 3.0, 1.0], [1.0, 1.0, 4.0, 0.1, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(thin.mean_diagonal(weights), whole.mean_diagonal(weights), **close)
    prior = 1e-2 * whole.mean_diagonal(weights)
    found = [problem.minimise(weights, prior, None, 1e-12)[0] for problem in (thin, whole)]
    torch.testing.assert_close(thin.leave(found[0]), whole.leave(found[1]), rtol=1e-6, atol=1e-9)
    generator = torch.Generator().manual_seed(8)
    places = [torch.randn(2, 14, 11, generator=generator, dtype=torch.float64) for _ in range(3)]
    for again in range(2):  # about the mean, then about another reference
        mine, theirs = ([problem.enter(place) for place in places] for problem in (thin, whole))
        torch.testing.assert_close(thin.rows(mine[0]), whole.rows(theirs[0]), **close)
        for one, other in zip(thin.expand(*mine), whole.expand(*theirs), strict=True):
            torch.testing.assert_close(one, other, **close)
        if not again:
            thin._refer(thin.enter(places[1]))
            whole._refer(whole.enter(places[1]))


@pytest.mark.parametrize("side", ["output", "input"])
def test_the_dual_form_is_the_dense_problem(side: str) -> None:
    """From the inner products alone: also with more columns in the stack than the matrix has rows, a direction that two
    experts share, an expert without its full rank and one that is absent."""
    deltas = low_rank(2, 5, 14, 11, 3)
    left = (deltas.sizes.sqrt()[..., None, None] * deltas.left).clone()
    right = (deltas.sizes.sqrt()[..., None, None] * deltas.right).clone()
    left[:, 1, :, 0] = left[:, 0, :, 0]
    right[:, 2, :, 2] = 0
    columns, others = (one.transpose(1, 2).flatten(2) for one in (left, right))
    given, dense = Grams(columns.mT @ columns, others.mT @ others, 5), left @ right.mT
    if side == "input":
        given, dense, columns, others = given.mT, dense.mT, others, columns
    unit = torch.tensor([2.0, 0.5], dtype=torch.float64)
    rows = dense.shape[-2]
    dual, whole = DualOneSided(given, unit, rows), OneSided(dense / unit[:, None, None, None], rows)
    close = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(given.norm_sq, dense.square().sum((-2, -1)), **close)
    torch.testing.assert_close(dual.trace, whole.trace, **close)
    torch.testing.assert_close(dual.start_residual_sq, whole.start_residual_sq, **close)
    weights = torch.tensor([[1.0, 2.0, 0.5, 3.0, 1.0], [1.0, 1.0, 4.0, 0.1, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(dual.mean_diagonal(weights), whole.mean_diagonal(weights), **close)
    prior = 1e-2 * whole.mean_diagonal(weights)
    (found, ok), (exact, _) = (problem.minimise(weights, prior, None, 1e-12) for problem in (dual, whole))
    assert ok.all()
    torch.testing.assert_close(columns @ dual.leave(found) @ others.mT, exact, rtol=1e-6, atol=1e-9)
    # Without a prior the normal matrix is singular here; the gradient is zero all the same.
    found, ok = dual.minimise(weights, torch.zeros(2, dtype=torch.float64), None, 1e-12)
    assert ok.all()
    products = (weights[..., None, None] * whole.grams) @ whole.deltas
    misfit = (weights[..., None, None] * whole.grams).sum(1) @ (columns @ dual.leave(found) @ others.mT) - products.sum(
        1
    )
    assert float((misfit.flatten(1).norm(dim=1) / products.sum(1).flatten(1).norm(dim=1)).amax()) < 1e-3
    generator = torch.Generator().manual_seed(8)
    places = [torch.randn(2, 15, 15, generator=generator, dtype=torch.float64) for _ in range(3)]
    theirs = [columns @ dual.leave(place) @ others.mT for place in places]
    torch.testing.assert_close(dual.rows(places[0]), whole.rows(theirs[0]), **close)
    for one, other in zip(dual.expand(*places), whole.expand(*theirs), strict=True):
        torch.testing.assert_close(one, other, **close)
    torch.testing.assert_close(columns @ dual.leave(dual.reference) @ others.mT, whole.reference, **close)


@pytest.mark.parametrize(("side", "nearly"), itertools.product(["output", "both"], [1.0, 1e-2, 1e-6]))
def test_pair_and_bases_are_theta(side: str, nearly: float) -> None:
    """Adapters that share their directions but for a part `nearly` still have orthonormal bases and the same theta."""
    generator = torch.Generator().manual_seed(9)
    common = torch.randn(40, 4, generator=generator), torch.randn(4, 30, generator=generator)
    adapters = [
        (
            common[0] + nearly * torch.randn(40, 4, generator=generator),
            common[1] + nearly * torch.randn(4, 30, generator=generator),
            0.5,
        )
        for _ in range(4)
    ]
    theta = solve(adapters, side=side, rtol=1e-4).theta
    assert isinstance(theta, Factored)
    for basis in (theta.Q, theta.V):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1]), rtol=0, atol=2e-4)
    left, right = theta.pair()
    torch.testing.assert_close(left @ right.mT, theta.Q @ theta.X @ theta.V.mT, rtol=1e-4, atol=1e-5)
    dense = torch.stack([scaling * (b.double() @ a.double()) for b, a, scaling in adapters])
    exact = solve(dense, side=side, rtol=1e-8, max_steps=500).dense()
    assert float((theta.dense() - exact).norm() / exact.norm()) < 1e-3


def test_norms_and_spans_of_a_batch() -> None:
    generator = torch.Generator().manual_seed(10)
    adapters = [
        (torch.randn(3, 12, rank, generator=generator), torch.randn(3, rank, 9, generator=generator), scaling)
        for rank, scaling in ((1, -2.0), (2, 0.5), (2, 0.0))
    ]
    dense = torch.stack([scaling * (b @ a) for b, a, scaling in adapters], 1).double()
    together = Adapters(adapters)
    torch.testing.assert_close(together.norm_sq(), dense.square().sum((-2, -1)), rtol=1e-5, atol=1e-9)
    left, inside, right = together.within()
    spanned = left.columns.double().unsqueeze(1) @ inside.dense() @ right.columns.double().mT.unsqueeze(1)
    torch.testing.assert_close(spanned, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["output", "input"])
def test_one_sided_adapters_have_the_dense_solution_and_posterior(side: str) -> None:
    """Scalings of either sign, one matrix and a batch of two."""
    generator = torch.Generator().manual_seed(11)
    adapters = [
        (
            torch.randn(30, 3, generator=generator, dtype=torch.float64),
            torch.randn(3, 20, generator=generator, dtype=torch.float64),
            scaling,
        )
        for scaling in (0.5, -1.0, 2.0)
    ]
    dense = solve(torch.stack([scaling * (b @ a) for b, a, scaling in adapters]), side=side, rtol=1e-10)
    found = solve(adapters, side=side, rtol=1e-10)
    batch = solve([(torch.stack([b, 2 * b]), torch.stack([a, a]), s) for b, a, s in adapters], side=side, rtol=1e-10)
    for each in (found, batch.unbind()[0]):
        torch.testing.assert_close(each.dense(), dense.dense(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(each.weights, dense.weights, rtol=1e-8, atol=0)
        assert isinstance(each.theta, Factored)
        basis = each.theta.Q if side == "output" else each.theta.V
        held = basis.mT @ dense.posterior.precision @ basis
        torch.testing.assert_close(each.posterior.precision, held, rtol=1e-8, atol=1e-8 * float(held.abs().max()))
