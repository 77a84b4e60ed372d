"""The methods that a product of experts is measured against: data-free merges of the deltas of one parameter.

`mean`, `task_arithmetic`, `ties` and `dare_ties` take any shape `[expert, *shape]`; the others take matrices
`[*batch, expert, out, in]`. All return theta, the merged delta, in the deltas' dtype (float32 for narrower ones).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.errors import BadInputError, NumericsError, Problem
from poemerge.numerics.one_sided import OneSided
from poemerge.numerics.precision import full_precision, working_dtype

__all__ = [
    "dare_ties",
    "iso_c",
    "karcher",
    "mean",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
    "wudi_descent",
]

# Below this cosine distance the chord and the arc are the same to float64.
_PARALLEL = 1e-12


def mean(deltas: Float[Tensor, "expert *shape"]) -> Float[Tensor, "*shape"]:
    """Θ = (1/N) Σ_i A_i. Wortsman et al., "Model soups", ICML 2022 (arXiv 2203.05482)."""
    return _checked(deltas, 1).mean(0)


def task_arithmetic(deltas: Float[Tensor, "expert *shape"], *, coefficient: float = 0.4) -> Float[Tensor, "*shape"]:
    """Θ = c Σ_i A_i. Ilharco et al., "Editing models with task arithmetic", ICLR 2023 (arXiv 2212.04089).

    The default c is the one TIES' authors use for task arithmetic without validation data.
    """
    return coefficient * _checked(deltas, 1).sum(0)


def ties(
    deltas: Float[Tensor, "expert *shape"],
    *,
    density: float = 0.2,
    coefficient: float = 1.0,
    thresholds: Float[Tensor, " expert"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Trim to the largest entries, elect a sign by mass, mean of the entries that agree with it.

    Yadav et al., "TIES-Merging", NeurIPS 2023 (arXiv 2306.01708). `density` is the fraction kept of each expert, here
    within this parameter rather than within the whole model; ties at the threshold are kept. `thresholds` are the least
    sizes kept, in place of `density`: for a block of a parameter whose thresholds are known.
    """
    _fraction("density", density)
    deltas = _checked(deltas, 1)
    sizes = deltas.abs()
    if thresholds is None:
        flat = sizes.reshape(len(deltas), -1)
        kept = max(1, math.ceil(density * flat.shape[1]))
        thresholds = flat.kthvalue(flat.shape[1] - kept + 1, dim=1).values
    trimmed = torch.where(sizes >= thresholds.view(-1, *[1] * (deltas.ndim - 1)), deltas, 0.0)
    return coefficient * _elect(trimmed)


def dare_ties(
    deltas: Float[Tensor, "expert *shape"], *, seed: int, density: float = 0.5, coefficient: float = 1.0
) -> Float[Tensor, "*shape"]:
    """Drop entries at random, rescale the rest by 1/density, then elect signs and average as TIES does.

    Yu et al., "Language models are super Mario" (DARE), ICML 2024 (arXiv 2311.03099). The masks are drawn on the CPU,
    so a seed gives the same merge on every device.
    """
    _fraction("density", density)
    deltas = _checked(deltas, 1)
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(deltas.shape, generator=generator) < density).to(deltas.device)
    return coefficient * _elect(torch.where(kept, deltas / density, 0.0))


def tsv_m(deltas: Float[Tensor, "*batch expert out in"], *, coefficient: float = 1.0) -> Float[Tensor, "*batch out in"]:
    """Keep 1/N of each expert's singular triplets, orthogonalise their union (Procrustes): Θ = c U⊥ Σ V⊥ᵀ.

    Gargiulo et al., "Task singular vectors: reducing task interference in model merging", CVPR 2025 (arXiv 2412.00081).
    """
    deltas = _checked(deltas, 3)
    experts, rows, columns = deltas.shape[-3:]
    kept = max(1, min(rows, columns) // experts)
    with full_precision():
        left, values, right = torch.linalg.svd(deltas, full_matrices=False)
        left = left[..., :kept].movedim(-3, -2).flatten(-2)
        values = values[..., :kept].flatten(-2)
        right = right[..., :kept, :].flatten(-3, -2)
        theta: Tensor = (_nearest_orthogonal(left) * values.unsqueeze(-2)) @ _nearest_orthogonal(right)
    return coefficient * theta


def iso_c(deltas: Float[Tensor, "*batch expert out in"], *, coefficient: float = 1.0) -> Float[Tensor, "*batch out in"]:
    """Flatten the spectrum of the sum: Θ = c σ̄ U Vᵀ with U Σ Vᵀ = Σ_i A_i and σ̄ its mean singular value.

    Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces", ICML 2025
    (arXiv 2502.04959).
    """
    deltas = _checked(deltas, 3)
    with full_precision():
        left, values, right = torch.linalg.svd(deltas.sum(-3), full_matrices=False)
        theta: Tensor = values.mean(-1)[..., None, None] * (left @ right)
    return coefficient * theta


def wudi(deltas: Float[Tensor, "*batch expert out in"], *, ridge: float = 1e-6) -> Float[Tensor, "*batch out in"]:
    """argmin Σ_i ‖(Θ − A_i)A_iᵀ‖²_F / ‖A_i‖²_F in closed form; `ridge` times the mean diagonal keeps it determined.

    Cheng et al., "Whoever started the interference should end it" (WUDI-Merging), ICML 2025 (arXiv 2503.08099). Zero
    deltas contribute nothing. Raises NumericsError when the normal matrix is singular (raise `ridge`).
    """
    deltas = _checked(deltas, 3)
    experts, rows, columns = deltas.shape[-3:]
    flat = deltas.reshape(-1, experts, rows, columns)
    # Equal to a power of two, so scaling changes no digit; float32 never under- or overflows.
    unit = torch.exp2(flat.abs().amax((-1, -2, -3), keepdim=True).double().clamp_min(1e-300).log2().round())
    with full_precision(), torch.no_grad():
        problem = OneSided((flat.double() / unit).to(flat.dtype).mT.contiguous(), columns)
        present = problem.trace > 0
        weights = torch.where(present, 1 / torch.where(present, problem.trace, 1.0), 0.0)
        theta, ok = problem.minimise(weights, ridge * problem.mean_diagonal(weights), None, 0.0)
    if not bool((ok | ~present.any(-1)).all()):
        raise NumericsError("wudi: the normal matrix is singular; expected a positive definite one. Next: raise ridge.")
    theta = torch.where(present.any(-1)[:, None, None], theta, 0.0).mT
    return (theta.double() * unit.squeeze(1)).to(flat.dtype).reshape(*deltas.shape[:-3], rows, columns)


def wudi_descent(
    deltas: Float[Tensor, "*batch expert out in"], *, steps: int = 300, learning_rate: float = 1e-5
) -> Float[Tensor, "*batch out in"]:
    """The same objective as `wudi` as published: Adam from Σ_i A_i, which stops short of the minimum.

    Cheng et al. (arXiv 2503.08099), with the authors' steps and learning rate. The rate is absolute, so the result
    depends on the size of the deltas. Zero deltas contribute nothing.
    """
    deltas = _checked(deltas, 3)
    norm_sq = deltas.square().sum((-1, -2), keepdim=True)
    strength = torch.where(norm_sq > 0, 1 / torch.where(norm_sq > 0, norm_sq, 1.0), 0.0)
    with full_precision(), torch.no_grad():
        grams = deltas.mT @ deltas
        # The gradient of ‖(Θ − A)Aᵀ‖² is 2(Θ − A)AᵀA: both sums over the experts are taken once.
        gram = 2 * (strength * grams).sum(-3)
        target = 2 * (strength * (deltas @ grams)).sum(-3)
        theta = deltas.sum(-3).clone().requires_grad_()
        optimiser = torch.optim.Adam([theta], lr=learning_rate)
        for _ in range(steps):
            theta.grad = theta @ gram - target
            optimiser.step()
    return theta.detach()


def karcher(
    deltas: Float[Tensor, "*batch expert out in"], *, max_steps: int = 100, rtol: float = 1e-9
) -> Float[Tensor, "*batch out in"]:
    """The Riemannian mean of the directions A_i/‖A_i‖ on the sphere, at the mean length.

    Karcher, "Riemannian center of mass and mollifier smoothing", 1977. Zero deltas have no direction and are left out;
    stops when the tangent step is below `rtol` (radians).
    """
    deltas = _checked(deltas, 3)
    flat = deltas.flatten(-2).double()
    length = flat.norm(dim=-1, keepdim=True)
    present = (length > 0).double()
    count = present.sum(-2).clamp_min(1)
    units = flat / torch.where(length > 0, length, 1.0)
    centre = _normalised(units.sum(-2))
    for _ in range(max_steps):
        cosine = (units * centre.unsqueeze(-2)).sum(-1, keepdim=True)
        tangent = units - cosine * centre.unsqueeze(-2)
        sine = tangent.norm(dim=-1, keepdim=True)
        angle = torch.atan2(sine, cosine)
        step = (present * torch.where(sine > 0, angle / sine.clamp_min(1e-300), 0.0) * tangent).sum(-2) / count
        turn = step.norm(dim=-1, keepdim=True)
        along = torch.where(turn > 0, turn.sin() / turn.clamp_min(1e-300), 0.0) * step
        centre = _normalised(turn.cos() * centre + along)
        if float(turn.max()) <= rtol:
            break
    theta: Tensor = centre * (length.sum(-2) / count)
    return theta.to(deltas.dtype).reshape(*deltas.shape[:-3], *deltas.shape[-2:])


def slerp(deltas: Float[Tensor, "*batch 2 out in"], *, t: float = 0.5) -> Float[Tensor, "*batch out in"]:
    """Spherical interpolation of two deltas: sin((1−t)ω)/sin ω · A_0 + sin(tω)/sin ω · A_1, ω the angle between them.

    Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985. Straight interpolation where the two are
    parallel, opposite or zero. Raises NumericsError for other than two experts.
    """
    deltas = _checked(deltas, 3)
    if deltas.shape[-3] != 2:
        got = deltas.shape[-3]
        raise NumericsError(f"slerp: got {got} experts, expected exactly 2. Next: use karcher.")
    first, second = deltas.double().unbind(-3)
    lengths = first.norm(dim=(-1, -2)) * second.norm(dim=(-1, -2))
    cosine = ((first * second).sum((-1, -2)) / torch.where(lengths > 0, lengths, 1.0)).clamp(-1, 1)
    angle = cosine.acos()
    straight = (1 - cosine.abs() < _PARALLEL) | (lengths == 0)
    sine = torch.where(straight, 1.0, angle.sin())
    weight_first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    weight_second = torch.where(straight, t, (t * angle).sin() / sine)
    theta = weight_first[..., None, None] * first + weight_second[..., None, None] * second
    return theta.to(deltas.dtype)


def _checked(deltas: Tensor, least_dimensions: int) -> Tensor:
    """The deltas in their working precision; refuses what no method can merge, naming the expert."""
    axis = 0 if least_dimensions == 1 else -3
    if deltas.ndim < least_dimensions or not deltas.is_floating_point() or deltas.shape[axis] == 0:
        form = "[expert, *shape]" if least_dimensions == 1 else "[*batch, expert, out, in]"
        raise NumericsError(
            f"got {deltas.dtype} {list(deltas.shape)}, expected floating point {form} with at least one "
            "expert. Next: stack one parameter's deltas over the experts."
        )
    finite = deltas.isfinite().movedim(axis, 0).reshape(deltas.shape[axis], -1).all(1)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise NumericsError(
            f"expert {index} of {len(finite)}: its delta has NaN or infinite entries, expected finite numbers. "
            "Next: check that checkpoint, or leave the expert out."
        )
    return deltas.to(working_dtype(deltas.dtype))


def _fraction(where: str, value: float) -> None:
    if not 0 < value <= 1:
        raise BadInputError(Problem(where, str(value), "a fraction above 0 and up to 1", "give one, 0.2 say"))


def _elect(trimmed: Tensor) -> Tensor:
    """The mean over the experts whose entry has the sign that the sum has; 0 where none has."""
    sign = trimmed.sum(0).sign()
    agreeing = (trimmed * sign).clamp_min(0)
    return sign * agreeing.sum(0) / (agreeing > 0).sum(0, dtype=trimmed.dtype).clamp_min(1)


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _normalised(vector: Tensor) -> Tensor:
    length = vector.norm(dim=-1, keepdim=True)
    return vector / torch.where(length > 0, length, 1.0)
