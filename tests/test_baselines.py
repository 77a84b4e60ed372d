"""The baselines, against their definitions on small cases and the laws each of them has."""

import math

import pytest
import torch
from torch import Tensor

from poemerge import baselines
from poemerge.errors import BadInputError, NumericsError

ELEMENTWISE = ("mean", "task_arithmetic", "ties")
MATRIX = ("tsv_m", "iso_c", "wudi", "wudi_descent", "karcher")


@pytest.fixture
def deltas() -> Tensor:
    """Four experts' deltas of one 7 × 5 matrix, float64."""
    return torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_mean_and_task_arithmetic(deltas: Tensor) -> None:
    torch.testing.assert_close(baselines.mean(deltas), deltas.sum(0) / 4)
    torch.testing.assert_close(baselines.task_arithmetic(deltas, coefficient=0.25), baselines.mean(deltas))


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 4, 5)])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_methods_take_any_shape(name: str, shape: tuple[int, ...]) -> None:
    deltas = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    assert getattr(baselines, name)(deltas).shape == shape
    assert baselines.dare_ties(deltas, seed=0).shape == shape


def test_ties_by_hand() -> None:
    """Half is kept of each; signs by mass; the mean of those that agree."""
    deltas = torch.tensor([[4.0, 1.0, -3.0, 0.5], [-1.0, 2.0, -5.0, 0.1], [3.0, -4.0, 0.2, 0.3]])
    #  trimmed:           4    0    -3   0         0   2   -5   0         3   -4    0    0
    expected = torch.tensor([3.5, -4.0, -4.0, 0.0])
    torch.testing.assert_close(baselines.ties(deltas, density=0.5), expected)
    torch.testing.assert_close(baselines.ties(deltas, density=0.5, coefficient=0.5), expected / 2)
    torch.testing.assert_close(baselines.ties(deltas[:1], density=1.0), deltas[0])


def test_dare_ties_is_seeded_and_keeps_the_expectation() -> None:
    deltas = torch.ones(1, 40_000)
    merged = baselines.dare_ties(deltas, seed=3, density=0.25)
    assert torch.equal(merged, baselines.dare_ties(deltas, seed=3, density=0.25))
    assert not torch.equal(merged, baselines.dare_ties(deltas, seed=4, density=0.25))
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert float(merged.mean()) == pytest.approx(1.0, abs=0.03)
    torch.testing.assert_close(baselines.dare_ties(deltas, seed=0, density=1.0), deltas[0])


def test_tsv_m_of_experts_that_do_not_touch_is_their_sum() -> None:
    """With orthogonal singular vectors and full rank budgets nothing has to be made orthogonal."""
    deltas = torch.zeros(2, 4, 4, dtype=torch.float64)
    deltas[0, :2, :2] = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    deltas[1, 2:, 2:] = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    torch.testing.assert_close(baselines.tsv_m(deltas), deltas.sum(0))


def test_tsv_m_against_its_definition(deltas: Tensor) -> None:
    lefts, values, rights = [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        lefts.append(u[:, :1])
        values.append(s[:1])
        rights.append(vh[:1])
    u, _, vh = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)
    p, _, qh = torch.linalg.svd(torch.cat(rights, 0), full_matrices=False)
    torch.testing.assert_close(baselines.tsv_m(deltas), (u @ vh) @ torch.diag(torch.cat(values)) @ (p @ qh))


def test_iso_c_has_one_singular_value(deltas: Tensor) -> None:
    values = torch.linalg.svdvals(baselines.iso_c(deltas))
    torch.testing.assert_close(values, torch.linalg.svdvals(deltas.sum(0)).mean().expand(5))


def test_wudi_minimises_its_objective(deltas: Tensor) -> None:
    """No gradient is left at the closed form; the descent goes the same way from the sum."""
    theta = baselines.wudi(deltas, ridge=1e-12).requires_grad_()

    def objective(theta: Tensor) -> Tensor:
        norm_sq = deltas.square().sum((1, 2))
        return (((theta - deltas) @ deltas.mT).square().sum((1, 2)) / norm_sq).sum()

    value = objective(theta)
    value.backward()
    assert float(theta.grad.norm()) < 1e-8
    start = float(objective(deltas.sum(0)))
    assert float(value) < float(objective(baselines.wudi_descent(deltas, learning_rate=1e-2))) < start
    assert float(objective(baselines.wudi_descent(deltas))) < start
    near = baselines.wudi_descent(deltas, steps=6000, learning_rate=1e-2)
    assert float(objective(near)) == pytest.approx(float(value), rel=1e-4)


def test_wudi_descent_is_the_published_loop(deltas: Tensor) -> None:
    """Adam on the objective through autograd, as the authors have it; the gradient here is in closed form."""
    theta = torch.nn.Parameter(deltas.sum(0))
    optimiser = torch.optim.Adam([theta], lr=1e-5)
    norm_sq = deltas.flatten(1).norm(dim=1).square()
    for _ in range(50):
        loss = ((theta - deltas) @ deltas.mT).square().div(norm_sq[:, None, None]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(baselines.wudi_descent(deltas, steps=50), theta.detach())


def test_karcher_is_the_point_of_no_pull(deltas: Tensor) -> None:
    theta = baselines.karcher(deltas)
    centre = theta / theta.norm()
    units = deltas / deltas.norm(dim=(1, 2), keepdim=True)
    cosine = (units * centre).sum((1, 2), keepdim=True)
    tangent = units - cosine * centre
    pull = (tangent * (cosine.acos() / tangent.norm(dim=(1, 2), keepdim=True))).sum(0)
    assert float(pull.norm()) < 1e-7
    assert float(theta.norm()) == pytest.approx(float(deltas.norm(dim=(1, 2)).mean()))


def test_slerp_by_hand() -> None:
    deltas = torch.zeros(2, 1, 2)
    deltas[0, 0, 0], deltas[1, 0, 1] = 1.0, 1.0
    torch.testing.assert_close(baselines.slerp(deltas), torch.full((1, 2), math.sqrt(0.5)))
    torch.testing.assert_close(
        baselines.slerp(deltas, t=1 / 3), torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]])
    )
    torch.testing.assert_close(baselines.slerp(deltas, t=0.0), deltas[0])
    same = torch.stack([deltas[0], 3 * deltas[0]])
    torch.testing.assert_close(baselines.slerp(same), 2 * deltas[0])
    torch.testing.assert_close(baselines.slerp(torch.stack([deltas[0], torch.zeros(1, 2)])), deltas[0] / 2)
    with pytest.raises(NumericsError, match="exactly 2"):
        baselines.slerp(torch.ones(3, 2, 2))


@pytest.mark.parametrize("name", MATRIX)
def test_matrix_methods_take_batches(name: str, deltas: Tensor) -> None:
    method = getattr(baselines, name)
    batch = torch.stack([deltas, deltas.flip(1) * 0.5])
    together = method(batch)
    assert together.shape == (2, 7, 5)
    torch.testing.assert_close(together[1], method(batch[1]), rtol=1e-6, atol=1e-9)
    single = method(deltas.float())
    assert single.dtype == torch.float32
    assert method(deltas.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", [*MATRIX, *ELEMENTWISE])
def test_order_of_experts_does_not_matter(name: str, deltas: Tensor) -> None:
    method = getattr(baselines, name)
    torch.testing.assert_close(method(deltas[[2, 0, 3, 1]]), method(deltas))


@pytest.mark.parametrize("name", MATRIX)
def test_a_zero_delta_does_no_harm(name: str, deltas: Tensor) -> None:
    padded = torch.cat([deltas, torch.zeros(1, 7, 5, dtype=torch.float64)])
    merged = getattr(baselines, name)(padded)
    assert bool(merged.isfinite().all())
    if name not in {"tsv_m"}:  # the rank budget of TSV-M is shared by number of experts
        torch.testing.assert_close(merged, getattr(baselines, name)(deltas))
    assert bool((getattr(baselines, name)(torch.zeros(3, 4, 4)) == 0).all())


@pytest.mark.parametrize("name", [*MATRIX, *ELEMENTWISE])
def test_not_finite_is_refused_by_expert(name: str, deltas: Tensor) -> None:
    deltas[2, 0, 0] = math.nan
    with pytest.raises(NumericsError, match="expert 2 of 4"):
        getattr(baselines, name)(deltas)
    with pytest.raises(NumericsError, match="floating point"):
        getattr(baselines, name)(torch.ones(2, 3, 3, dtype=torch.int32))


def test_a_fraction_that_is_none_is_refused(deltas: Tensor) -> None:
    for density in (0.0, 1.5):
        with pytest.raises(BadInputError, match="density"):
            baselines.ties(deltas, density=density)
        with pytest.raises(BadInputError, match="density"):
            baselines.dare_ties(deltas, seed=0, density=density)
