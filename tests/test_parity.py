"""Agreement with the released algorithm (arXiv 2607.01689), written here from its description, step by step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from poemerge import solve
from poemerge.numerics.presets import PRESETS, solver_settings


def released(deltas: Tensor, *, eps: float, jitter: float, steps: int) -> Tensor:
    """Output side, Cauchy, every A_iᵀ(Θ − A_i) computed anew; starts from w_i = 1; stops when theta stands still."""
    identity = torch.eye(deltas.shape[1], dtype=deltas.dtype)

    def solution(weights: list[Tensor] | list[float]) -> Tensor:
        matrix, right = jitter * identity, torch.zeros_like(deltas[0])
        for weight, delta in zip(weights, deltas, strict=True):
            gram = delta @ delta.T
            matrix = matrix + weight * gram
            right = right + weight * gram @ delta
        return torch.linalg.solve(matrix, right)

    theta = solution([1.0] * len(deltas))
    for _ in range(steps):
        scales = [eps * (delta**2).sum() for delta in deltas]
        residuals = [((delta.T @ (theta - delta)) ** 2).sum() for delta in deltas]
        previous, theta = theta, solution([1 / (s + r) for s, r in zip(scales, residuals, strict=True)])
        if float((theta - previous).norm()) <= 1e-14 * float(theta.norm()):
            break
    return theta


def deltas_like(kind: str, shape: tuple[int, int, int], size: float, seed: int) -> Tensor:
    """Float64 deltas: dense noise, low rank, or a power-law spectrum with shared subspaces."""
    generator = torch.Generator().manual_seed(seed)
    experts, rows, columns = shape

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator, dtype=torch.float64)

    if kind == "noise":
        return size * normal(*shape) / rows**0.5
    if kind == "low rank":
        return size * normal(experts, rows, 3) @ normal(experts, 3, columns) / rows
    rank = min(rows, columns)
    left, right = normal(rows, rank), normal(columns, rank)
    spectrum = torch.arange(1, rank + 1, dtype=torch.float64) ** -0.7
    return torch.stack(
        [
            torch.linalg.qr(left + normal(rows, rank))[0]
            * (size * spectrum)
            @ torch.linalg.qr(right + normal(columns, rank))[0].mT
            for _ in range(experts)
        ]
    )


@pytest.mark.parametrize("kind", ["noise", "low rank", "power law"])
@pytest.mark.parametrize("shape", [(5, 24, 24), (8, 32, 12), (4, 12, 32), (2, 16, 16)])
@pytest.mark.parametrize("eps", [2.0, 0.3, 1e-2])
def test_the_fixed_point_is_the_released_algorithms(kind: str, shape: tuple[int, int, int], eps: float) -> None:
    for size in (0.02, 1.0):
        deltas = deltas_like(kind, shape, size, seed=shape[0])
        expected = released(deltas, eps=eps, jitter=1e-3, steps=4000)
        common: dict[str, Any] = {"prior": "absolute", "prior_precision": 1e-3, "scale_factor": eps}
        solution = solve(
            deltas, expert="cauchy", scale="task-norm", side="output", rtol=1e-10, max_steps=1000, **common
        )
        assert float((solution.theta - expected).norm()) <= 1e-7 * float(expected.norm())
        swapped = solve(
            deltas.mT, expert="cauchy", scale="task-norm", side="input", rtol=1e-10, max_steps=1000, **common
        )
        assert float((swapped.theta.mT - expected).norm()) <= 1e-7 * float(expected.norm())


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_plain_steps_follow_the_released_ones(size: float) -> None:
    """Not only the end: after the same number of steps theta is the same, whatever the size of the deltas."""
    deltas = deltas_like("power law", (5, 20, 20), size, seed=0)
    for steps in (1, 2, 5):
        solution = solve(
            deltas,
            side="output",
            scale="task-norm",
            scale_factor=0.3,
            prior="absolute",
            prior_precision=1e-3,
            max_steps=steps,
            accelerate=False,
            rtol=1e-14,
        )
        expected = released(deltas, eps=0.3, jitter=1e-3, steps=steps)
        assert float((solution.theta - expected).norm()) <= 1e-8 * float(expected.norm())


def test_paper_vit_solves_square_row_blocks() -> None:
    """A taller matrix is split into blocks of `in` rows, each a problem of its own; the last one may be shorter."""
    deltas = deltas_like("power law", (5, 28, 12), 1.0, seed=1)
    solution = solve(deltas, **{**solver_settings("paper-vit"), "rtol": 1e-10, "max_steps": 1000})
    expected = torch.cat(
        [released(block, eps=0.3, jitter=1e-3, steps=4000) for block in torch.split(deltas, 12, dim=1)],
    )
    assert float((solution.theta - expected).norm()) <= 1e-7 * float(expected.norm())
    assert solution.weights.shape == (3, 5)
    whole = solve(deltas, **{**solver_settings("paper-vit"), "row_blocks": None})
    assert float((whole.theta - expected).norm()) > 1e-3 * float(expected.norm())
    batch = solve(torch.stack([deltas, 2 * deltas]), **solver_settings("paper-vit"))
    assert torch.equal(batch.theta[0], solve(deltas, **solver_settings("paper-vit")).theta)
    assert batch.weights.shape == (2, 3, 5)
    wide = solve(deltas.mT, **solver_settings("paper-vit"))
    assert wide.weights.shape == (5,)


@pytest.mark.parametrize("preset", ["paper-t5", "paper-lora"])
def test_paper_adapters_are_the_released_solution_of_their_dense_form(preset: str) -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [
        (
            torch.randn(20, 2, generator=generator, dtype=torch.float64) / 4,
            torch.randn(2, 14, generator=generator, dtype=torch.float64) / 4,
            2.0,
        )
        for _ in range(4)
    ]
    dense = torch.stack([scaling * (b @ a) for b, a, scaling in adapters])
    expected = released(dense, eps=PRESETS[preset]["scale_factor"], jitter=1e-3, steps=4000)
    solution = solve(adapters, **{**solver_settings(preset), "rtol": 1e-10, "max_steps": 1000})
    assert float((solution.dense() - expected).norm()) <= 1e-7 * float(expected.norm())


def test_every_preset_is_a_set_of_settings_of_solve() -> None:
    deltas = deltas_like("noise", (3, 8, 8), 1.0, seed=0)
    for preset, settings in PRESETS.items():
        assert solve(deltas, **solver_settings(preset)).outcome.ok
        assert settings["coefficient"] > 0
    with pytest.raises(KeyError):
        solver_settings("paper")
