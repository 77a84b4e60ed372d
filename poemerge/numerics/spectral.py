"""Spectral norms, and the bound that they put on a merge: how far an expert went in any direction."""

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.numerics.adapters import Adapters

__all__ = ["farthest", "norms_sq", "within"]

_STEPS = 24
"""Of Lanczos' method for the bound: exact for an adapter of a lower rank, and dense or factored it is the same."""


def farthest(deltas: Float[Tensor, "expert out in"] | Adapters) -> float:
    """b = max_i ‖A_i‖₂, the farthest that any expert moved the image of a unit vector."""
    return float(norms_sq(deltas, _STEPS).amax().sqrt())


def norms_sq(deltas: Float[Tensor, "expert out in"] | Adapters, steps: int) -> Float[Tensor, " expert"]:
    """‖A_i‖₂² of every expert, float64: exact for adapters, else by `steps` of Lanczos' method."""
    if isinstance(deltas, Tensor):
        return _lanczos_sq(deltas, steps)
    # The eigenvalues of (BᵀB)(AAᵀ) are the squared singular values of BA.
    products = deltas.left.blocks()[0] @ deltas.right.blocks()[0]
    squares: Tensor = deltas.scaling.square() * torch.linalg.eigvals(products).real.amax(-1)
    return squares.clamp_min(0)


def within(theta: Float[Tensor, "out in"], bound: float, overshoot: float = 1.0) -> tuple[Float[Tensor, "out in"], int]:
    """Θ, or where it goes more than `overshoot` times as far as `bound` in some direction the matrix nearest to it with
    ‖X‖₂ ≤ `bound`; and how many singular values were brought down.

    min_X ‖X − Θ‖_F over the spectral ball is U min(σ, b) Vᵀ for Θ = U σ Vᵀ (Higham, Matrix nearness problems, 1989). A
    solve says what Θ should be where experts look. Where two of them ask for much the same output to go to different
    places, the mode serves both by going many times as far as either between them, and so far from every expert the
    quadratic energies say nothing any more.

    Θ of any float dtype; float64 inside. Θ itself is returned where it goes nowhere so far, by Lanczos' method.
    """
    if float(norms_sq(theta.unsqueeze(0), _STEPS)) <= (overshoot * bound) ** 2:
        return theta, 0
    wide = theta.double()
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.mT
    squares, right = torch.linalg.eigh(tall.mT @ tall)
    beyond = squares > bound**2
    right = right[:, beyond]
    excess = (tall @ right) * (1 - bound * squares[beyond].rsqrt())
    near = tall - excess @ right.mT
    return (near if tall is wide else near.mT).to(theta.dtype).contiguous(), int(beyond.sum())


def _lanczos_sq(stack: Float[Tensor, "count out in"], steps: int) -> Float[Tensor, " count"]:
    """Squared spectral norms, float64: the largest ‖Av‖² over a Krylov space of AᵀA from a fixed start (Lanczos).

    A lower bound that is near enough here, and exact for a rank below the number of `steps`; products in the dtype of
    `stack`. Golub and Van Loan, Matrix Computations, 10.4.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(stack.shape[-1], 1, generator=generator, dtype=torch.float64).to(stack)
    vector = vector.expand(len(stack), -1, -1)
    vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    basis = vector.new_zeros(len(stack), stack.shape[-1], steps)
    images: list[Tensor] = []
    for step in range(steps):
        if step:
            vector = stack.mT @ images[-1]
            before = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
            for _ in range(2):
                vector = vector - basis @ (basis.mT @ vector)
            after = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
            # Nothing but rounding is left where the space is whole.
            vector = torch.where(after > torch.finfo(stack.dtype).eps ** 0.75 * before, vector / after, 0.0)
        basis[..., step : step + 1] = vector
        images.append(stack @ vector)
    image = torch.cat(images, -1).double()
    largest: Tensor = torch.linalg.eigvalsh(image.mT @ image)[:, -1]
    return largest.clamp_min(0)
