"""Adapters solved in their factors: within what they span, in the dual form, or whole on the output side alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from poemerge.numerics.adapters import Adapters, Combined, LowRank
from poemerge.numerics.core import solve_core
from poemerge.numerics.dual import Grams
from poemerge.numerics.posterior import Posterior, Side
from poemerge.numerics.settings import Settings, bad_setting, expert_scales, settled
from poemerge.numerics.solution import Basis, Factored, Solution, join

__all__ = ["FLOAT32_RTOL", "THIN", "in_dual_form", "solve_factored"]

# Adapters are worked on through their rank where their joint span is at least this many times as wide.
THIN = 3
# One-sided adapters are worked on in the dual form up to a stack this many times as wide as their matrix.
_DUAL = 2
# From this rtol on the small problem of float32 adapters runs in float32, else in float64.
FLOAT32_RTOL = 1e-3


def in_dual_form(side: Side, stacked: int, size: Sequence[int]) -> bool:
    """Whether adapters of `stacked` ranks in all, of a matrix of `size`, are solved from their Gram matrices alone."""
    return side != "both" and stacked <= _DUAL * max(size)


def solve_factored(adapters: Adapters, settings: Settings) -> Solution:
    """Solve within span{B_i} × span{A_iᵀ}: there Θ = Q X Vᵀ exactly, the prior included."""
    if isinstance(settings.init, Tensor):
        raise bad_setting("init", "a tensor", '"gaussian" or "mean" for factored deltas', "densify the adapters first")
    if settings.sensitivity is not None:
        return _solve_minded(adapters, settings)
    device = adapters.scaling.device
    scales = expert_scales(settings.scale, adapters.batch, adapters.count, device)
    if in_dual_form(settings.side, adapters.left.stack.shape[-1], adapters.size):
        return _solve_dual(adapters, scales, settings)
    left, cores, right = adapters.within()
    if adapters.dtype == torch.float32 and settings.rtol >= FLOAT32_RTOL:
        cores = cores.float()
    narrow = THIN * cores.left.shape[-1] <= min(cores.left.shape[-2], cores.right.shape[-2])
    given: Tensor | LowRank = cores if narrow and settings.side == "both" else cores.dense()
    shape = (*adapters.batch, adapters.count, adapters.size[0])
    members = _members(given, adapters, scales, settled(settings, cores, shape, min(adapters.size)))
    lifted = [_lift(member, left[i], right[i]) for i, member in enumerate(members)]
    return join(lifted, adapters.batch, single=not adapters.batch)


def _members(
    given: Tensor | LowRank | Grams, adapters: Adapters, scales: Tensor | None, settings: Settings
) -> list[Solution]:
    """On a CPU one at a time, elsewhere all at once."""
    stride = 1 if adapters.scaling.device.type == "cpu" else max(1, len(given))
    members: list[Solution] = []
    for first in range(0, len(given), stride):
        chunk = slice(first, first + stride)
        own_scales = None if scales is None else scales[chunk]
        members += solve_core(given[chunk], adapters.size, own_scales, None, settings.of(chunk, given.dtype))
    return members


def _solve_dual(adapters: Adapters, scales: Tensor | None, settings: Settings) -> Solution:
    """One side from the adapters' Gram matrices alone; bases are made for the posterior."""
    members = _members(adapters.grams(), adapters, scales, settings)
    lifted = []
    for index, member in enumerate(members):
        theta = Combined(adapters, index, member.dense())
        lifted.append(
            replace(member, theta=theta, make_posterior=_within_spans(adapters, index, member, theta, settings))
        )
    return join(lifted, adapters.batch, single=not adapters.batch)


def _within_spans(
    adapters: Adapters, index: int, member: Solution, theta: Factored, settings: Settings
) -> Callable[[], Posterior]:
    """The posterior within the joint subspaces."""

    def posterior() -> Posterior:
        cores = adapters.within()[1][[index]].dense()[0]
        return Posterior(theta, settings.side, cores, member.weights, member.prior_precision)

    return posterior


def _solve_minded(adapters: Adapters, settings: Settings) -> Solution:
    """With sensitivities Θ leaves the span of the B_i but not that of the A_iᵀ: solved whole on one side, Θ = X Vᵀ."""
    right, inside = adapters.right.basis
    experts, device = adapters.count, inside.device
    left = adapters.left.stack
    left = left.reshape(*left.shape[:-1], experts, -1).transpose(1, 2)
    dtype = adapters.dtype if settings.rtol >= FLOAT32_RTOL else torch.float64
    scaled = left.double() * adapters.scaling[:, None, None]
    cores = (scaled @ inside.mT).to(dtype)
    scales = expert_scales(settings.scale, adapters.batch, experts, device)
    whole = settled(settings, cores, (*adapters.batch, experts, adapters.size[0]), min(adapters.size))
    lifted = []
    for i, member in enumerate(_members(cores, adapters, scales, whole)):
        columns, core = torch.linalg.qr(member.dense())
        theta = Factored(columns.to(adapters.dtype), core.to(adapters.dtype), right[i])
        lifted.append(replace(member, theta=theta, make_posterior=_whole_rows(member, right[i])))
    return join(lifted, adapters.batch, single=not adapters.batch)


def _whole_rows(member: Solution, right: Basis) -> Callable[[], Posterior]:
    """The posterior of Θ = X Vᵀ, all rows of X free."""

    def posterior() -> Posterior:
        core = member.dense().to(right.stack.dtype)
        whole = torch.eye(len(core), dtype=core.dtype, device=core.device)
        return replace(member.posterior, mean=Factored(whole, core, right))

    return posterior


def _lift(member: Solution, left: Basis, right: Basis) -> Solution:
    theta = Factored(left, member.dense().to(left.stack.dtype), right)

    def posterior() -> Posterior:
        return replace(member.posterior, mean=theta)

    return replace(member, theta=theta, make_posterior=posterior)
