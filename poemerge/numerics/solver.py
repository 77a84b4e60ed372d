"""`solve`: the mode of a product of experts over one weight matrix, or a batch of equal shapes."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.errors import NumericsError
from poemerge.numerics.adapters import Adapter, Adapters, not_finite
from poemerge.numerics.core import solve_core
from poemerge.numerics.experts import Family
from poemerge.numerics.factored import solve_factored
from poemerge.numerics.posterior import Side
from poemerge.numerics.precision import full_precision, working_dtype
from poemerge.numerics.settings import Prior, Scale, Settings, bad_setting, expert_scales, settled
from poemerge.numerics.solution import Solution, join

__all__ = ["Adapter", "solve"]


def solve(
    deltas: Float[Tensor, "*batch expert out in"] | Sequence[Adapter] | Adapters,
    *,
    expert: Family = "cauchy",
    tail_index: float | None = None,
    scale: Scale | Float[Tensor, "*batch expert"] = "common",
    scale_factor: float = 0.1,
    prior: Prior = "relative",
    prior_precision: float = 1e-2,
    side: Side = "both",
    pooling: float | Float[Tensor, "*batch expert"] | None = None,
    init: Literal["gaussian", "mean"] | Float[Tensor, "*batch out in"] = "gaussian",
    max_steps: int = 50,
    rtol: float = 1e-6,
    sensitivity: Float[Tensor, "*batch expert out s"] | None = None,
    row_blocks: Literal["square"] | None = None,
    accelerate: bool = True,
) -> Solution:
    """Θ = argmin Σ_i ρ_i(r_i²) + λ‖Θ‖²_F, by majorise–minimise: the merged delta of arXiv 2607.01689.

    The residual is R_i = A_iᵀ(Θ − A_i) (side "output"), (Θ − A_i)A_iᵀ ("input") or Â_iᵀ(Θ − A_i)Â_iᵀ with
    Â_i = A_i/‖A_i‖ ("both"), and r_i = ‖R_i‖_F.

    Arguments:
    - `deltas`: fine-tuned minus base, `[*batch, expert, out, in]`; or one adapter an expert, `(B [*batch, out, r],
      A [*batch, r, in], scaling)` for the delta scaling·B A, ranks free to differ: solved exactly within the adapters'
      subspaces, no dense delta is formed, and theta is `Factored`. Products run in float32 (float64 for float64
      deltas), sums and small factorisations in float64.
    - `expert`: "gaussian", "student_t" (with `tail_index` ν > 0) or "cauchy".
    - `scale`: γ_i. "task-norm": γ_i² = f‖A_i‖² (the paper's); "gram-norm": γ_i² = f‖R_i(0)‖², on one side f‖A_iA_iᵀ‖²;
      "common": γ² = f·mean_j‖R_j(0)‖², one for all experts; "fitted": γ_i² = f‖R_i(0)‖² · median_j(r_j²/‖R_j(0)‖²) at
      the start; f is `scale_factor`. A tensor `[*batch, expert]` is γ_i itself, in the units of r.
    - `prior_precision`: λ if `prior` is "absolute"; if "relative", λ is this many times the mean diagonal entry of
      Σ w_i G_i (of its Kronecker form for both sides) at the weights the start gives, fixed from there on.
    - `pooling`: y in [0, 1], one or one each, for both sides alone: the input Gram Â_iᵀÂ_i is shrunk to the mean over
      the experts, S_i² = (1 − y) Â_iᵀÂ_i + y·mean_j Â_jᵀÂ_j; 0 leaves each its own, and the residual is then
      Âᵀ_i(Θ − A_i)Âᵀ_i.
      None is max(0.1, 1 − ρ_i), ρ_i = rank(A_i)/min(out, in) being the share of all directions that the expert's task
      vector tells about.
    - `sensitivity`: F_i, for both sides alone: what else expert i minds than the directions it moved, with F_iF_iᵀ the
      covariance of its gradients at the layer's outputs. The output Gram becomes the mean of Â_iÂ_iᵀ and
      F_iF_iᵀ/‖F_i‖²; a matrix of zeros says nothing.
    - `init`: "gaussian" starts from the solution for w_i = 1, "mean" from the plain mean, a tensor from itself (dense
      deltas only). The energy is not convex, so the start matters.
    - `max_steps`: linear solves after the start, at most. `rtol`: relative precision of theta to stop at, judged by the
      weights' last change.
    - `row_blocks`: "square" solves each block of `in` rows of a taller matrix as a matrix of its own (the released
      code's setting); theta, and each row of weights, are then of the blocks.
    - `accelerate`: Anderson acceleration; False for plain majorise–minimise.

    Returns a `Solution`. Raises `NumericsError` for deltas that are not finite or do not fit together (it names the
    expert) and `BadInputError` for settings that make no sense.
    """
    settings = Settings(
        expert,
        tail_index,
        scale,
        scale_factor,
        prior,
        prior_precision,
        side,
        pooling,
        init,
        max_steps,
        rtol,
        accelerate,
        sensitivity,
    )
    settings.check()
    with torch.no_grad(), full_precision():
        if not isinstance(deltas, Tensor):
            if row_blocks is not None:
                raise bad_setting(
                    "row_blocks", repr(row_blocks), "None for factored deltas", "densify the adapters first"
                )
            return solve_factored(deltas if isinstance(deltas, Adapters) else Adapters(deltas), settings)
        _check_dense(deltas)
        if row_blocks is not None and deltas.shape[-2] > deltas.shape[-1]:
            return _solve_blocks(deltas, settings)
        return _solve_dense(deltas, settings)


def _check_dense(deltas: Tensor) -> None:
    if deltas.ndim < 3 or not deltas.is_floating_point() or 0 in deltas.shape:
        raise NumericsError(
            f"deltas: got {deltas.dtype} of shape {list(deltas.shape)}, expected floating point "
            "[*batch, expert, out, in] with no empty dimension. Next: stack one matrix's deltas over the experts."
        )
    if not all(bool(bound.isfinite()) for bound in torch.aminmax(deltas)):
        finite = deltas.isfinite()
        for index in range(deltas.shape[-3]):
            wrong = int((~finite[..., index, :, :]).sum())
            if wrong:
                raise not_finite(index, deltas.shape[-3], "delta", wrong)


def _solve_dense(deltas: Tensor, settings: Settings) -> Solution:
    batch = tuple(deltas.shape[:-3])
    experts, rows, columns = deltas.shape[-3:]
    scales = expert_scales(settings.scale, batch, experts, deltas.device)
    dtype = working_dtype(deltas.dtype)
    start = None
    if isinstance(settings.init, Tensor):
        if settings.init.shape != (*batch, rows, columns):
            got, expected = f"shape {list(settings.init.shape)}", f"{[*batch, rows, columns]}, the shape of theta"
            raise bad_setting("init", got, expected, 'give a matrix of that shape, or init="gaussian"')
        start = settings.init.to(deltas).reshape(-1, rows, columns)
    members: list[Solution] = []
    stacked = deltas.reshape(-1, experts, rows, columns)
    whole = settled(settings, stacked, (*batch, experts, rows), min(rows, columns))
    # On a CPU one at a time: a batch gains nothing there, and every member is then bit for bit what it is alone.
    stride = 1 if deltas.device.type == "cpu" else max(1, len(stacked))
    for first in range(0, len(stacked), stride):
        chunk = slice(first, first + stride)
        members += solve_core(
            stacked[chunk].to(dtype),
            (rows, columns),
            None if scales is None else scales[chunk],
            None if start is None else start[chunk].to(dtype),
            whole.of(chunk, dtype),
        )
    return join(members, batch, single=not batch)


def _solve_blocks(deltas: Tensor, settings: Settings) -> Solution:
    """Square blocks of rows, each a problem of its own; a last block of fewer rows is solved as it is."""
    columns = deltas.shape[-1]
    if any(isinstance(one, Tensor) for one in (settings.init, settings.scale, settings.sensitivity)):
        expected = "named scale and init, and no sensitivity"
        raise bad_setting("row_blocks", "'square'", expected, "pass the blocks to solve one by one")
    blocks = [_solve_dense(block.contiguous(), settings) for block in torch.split(deltas, columns, dim=-2)]
    batch = tuple(deltas.shape[:-3])
    whole = []
    for parts in zip(*(block.unbind() for block in blocks), strict=True):
        length = max(len(part.energy) for part in parts)
        energies = [torch.cat([p.energy, p.energy[-1:].expand(length - len(p.energy))]) for p in parts]
        whole.append(
            Solution(
                theta=torch.cat([part.dense() for part in parts]),
                outcome=max((part.outcome for part in parts), key=lambda outcome: outcome.severity),
                steps=max(part.steps for part in parts),
                energy=torch.stack(energies).sum(0),
                weights=torch.stack([part.weights for part in parts]),
                prior_precision=torch.stack([part.prior_precision for part in parts]),
            )
        )
    return join(whole, batch, single=not batch)
