"""From the solved merge downhill on what it costs each expert's predictions: the energy that the solver expands.

E_i(Θ) = E_x [KL(p_i(·|x) ‖ p_Θ(·|x)) + ½‖V_i(h_i(x) − h_Θ(x))‖² + β‖r_i(x) − r_Θ(x)‖²] over random inputs x, p being
what the expert's head says, V_i h what it moved of the features (poemerge.merging.features) and r what the head reads.
Σ_i E_i is the product's energy before anything is approximated: the solver's Kronecker precisions are the divergence's
second derivatives where an expert lies, and the merge lies between them. The other terms tell more of the same, for on
random words a head tells apart few of the directions that it does on texts; of an expert that is asked by its features
alone there is nothing but the second. The divergence alone says whether the merge is too long.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from poemerge.checkpoints import ExpertSet, ShardFile
from poemerge.checkpoints.safetensors_file import FLOATS, SafetensorsFile
from poemerge.merging.inputs import of_images, tokens_of
from poemerge.merging.panel import CHECKS, INPUTS, TOKENS, Panel
from poemerge.merging.plan import Plan
from poemerge.merging.predictor import asked_by, features_tokens
from poemerge.merging.staging import Staging
from poemerge.merging.stream import processors, single_threaded

__all__ = [
    "mean_divergence",
    "refine",
    "refinement_flops",
    "refinement_memory",
    "why_not_asked",
    "why_not_refined",
]

log = logging.getLogger(__name__)

_SHORTEST = 1 / 32
"""A solved merge that is too long is halved for as long as that brings it nearer, down to this part of it."""

_RATE = 0.018
"""The first step of an entry, in parts of the root mean square of what the merge added to its tensor."""

_LAST = 0.05
"""Of the first step, the last."""

_QUIET = 1e-3
"""Gradients of less than this part of the root mean square of all are rounding: an attention's key biases have none."""

_PANELS = 2
"""The experts' gradients are added up in so many sums, whatever the number of processors: the digest is the same."""

_ROOM = 9
"""The weights as solved and refined, two panels' gradients, Adam's two averages, two models while they are asked, and
activations take at most so many times the size of a model in float32."""


def why_not_asked(experts: ExpertSet, plan: Plan, steps: int, not_measured: Mapping[str, str]) -> str | None:
    """Why no expert is asked what it makes of the merge, which stays as it is solved; None where all are."""
    if steps == 0:
        return "off"
    if not any(p.minded for p in plan.parameters):
        return "no matrix is solved with the experts' sensitivities"
    if not_measured:
        name, reason = min(not_measured.items())
        return f"{name} cannot be asked: {reason}"
    if len(experts.experts) == 1:
        return "one expert alone is its own best merge"
    if (needed := refinement_memory(experts)) > plan.max_memory:
        return f"it would take {needed:,} bytes of merge.max_memory, which is {plan.max_memory:,}"
    return None


def why_not_refined(experts: ExpertSet, plan: Plan) -> str | None:
    """Why a merge whose experts are asked takes no steps towards what they predict; None where it does."""
    trained = sorted(name for name, own in plan.private.items() if asked_by(own, experts.config) == "classifier")
    if trained:
        return (
            f"{trained[0]} has a classifier that was trained with it: nearer to such experts' predictions is no better"
        )
    if of_images(experts.config):
        return "its inputs are images: nearer to the experts' predictions on random ones is no better"
    return None


def refinement_memory(experts: ExpertSet) -> int:
    """Bytes that asking the experts, and refining, takes at most."""
    return _ROOM * sum(4 * math.prod(experts.base.shape(name)) for name in experts.base.names())


def refinement_flops(experts: ExpertSet, plan: Plan, steps: int) -> float:
    """Floating-point operations of asking the experts and of refining by `steps`: 2 a weight and token forward, 4
    backward."""
    weights = sum(p.entries for p in plan.parameters if p.minded)
    passes = 6.0 * steps + 2.0 * (steps + 4 * CHECKS)
    tokens = INPUTS * tokens_of(experts.config, TOKENS)
    features = 2.0 * features_tokens(experts.config) if steps else 0.0
    return weights * len(experts.experts) * (passes * tokens + features)


def refine(
    experts: ExpertSet, plan: Plan, staging: Staging, steps: int, told: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Shorten and refine the merge whose shards all lie in `staging`, and put it into their place; returns what
    merge.json says. No step is taken where `why_not_refined` has a reason.

    Every linear layer, bias and norm that the merge changed takes `steps` steps of Adam down Σ_i KL(p_i ‖ p_Θ), in
    float32 on the CPU, on 16 new random inputs of every expert at every step. What the merge added to them is first
    halved for as long as that lowers the divergence on other inputs, unless a coefficient was given. Where those say
    in the end that nothing was won, the merge stays as it was solved. `told(step)` is called after each step. Every
    expert must have been measured. Raises NetworkError where a network fails; the merge is then as it was solved.
    """
    why = why_not_refined(experts, plan)
    steps = 0 if why else steps
    weights = _weights(plan, staging)
    movable = {p.name for p in plan.parameters if p.action != "left_at_base" and experts.rule(p.name) != "embedding"}
    reach = {
        name: float((weights[name] - experts.base.read(name).float()).square().mean().sqrt())
        for name in sorted(movable & set(weights))
    }
    names = sorted(experts.experts)
    with single_threaded(), ThreadPoolExecutor(min(processors(), _PANELS)) as pool:
        parts = [names[first::_PANELS] for first in range(min(_PANELS, len(names)))]
        panels = list(pool.map(lambda own: Panel(experts, own, weights, steps), parts))
        before = _merged(pool.map(Panel.judge, panels))
        solved = {name: weights[name].clone() for name in reach}
        multiple = 1.0
        if not any(p.settings and p.settings.coefficient is not None for p in plan.parameters if p.minded):
            multiple = _halve(pool, panels, experts, weights, solved, sum(before.values()))
        if steps:
            _descend(pool, panels, {name: multiple * size for name, size in reach.items() if size > 0}, steps, told)
        after = _merged(pool.map(Panel.judge, panels)) if steps or multiple < 1 else before
    kept = sum(after.values()) < sum(before.values())
    moved = {name: _distance(weights[name], value, reach[name]) for name, value in solved.items() if kept}
    moved = {name: distance for name, distance in moved.items() if distance > 0}
    record: dict[str, Any] = {
        "steps": steps,
        **({"why": why} if why else {}),
        "kept": kept,
        "multiple": multiple if kept else 1.0,
        "divergence": {name: [round(before[name], 6), round(after[name], 6)] for name in names},
    }
    log.info(
        "divergence from the experts' predictions: %.4f as solved, %.4f in %d steps from %g of it",
        *mean_divergence(record),
        steps,
        multiple,
    )
    staging.record_refinement(_write(plan, staging, weights, set(moved)) if kept else {}, moved, record)
    return record


def mean_divergence(note: Mapping[str, Any]) -> tuple[float, float]:
    """Over the experts, as solved and as kept; `note` is what merge.json says of a merge that they were asked about."""
    before, after = zip(*note["divergence"].values(), strict=True)
    return sum(before) / len(before), sum(after) / len(after)


def _halve(
    pool: ThreadPoolExecutor,
    panels: Sequence[Panel],
    experts: ExpertSet,
    weights: Mapping[str, Tensor],
    solved: Mapping[str, Tensor],
    divergence: float,
) -> float:
    """Leave the `solved` weights at the last of c = 1, 1/2, 1/4 … of what the merge added at which the divergence still
    fell, and return c.

    Where task vectors are long, the mode lies where none of the expansions about the experts is true any more, and can
    be farther from them all than the base is. The descent's own steps are too short to come back from there.
    """

    def shorten(multiple: float) -> None:
        for name, value in solved.items():
            weights[name].copy_(value)
            if multiple < 1:
                weights[name].lerp_(experts.base.read(name).float(), 1 - multiple)

    multiple = 1.0
    while multiple > _SHORTEST:
        shorten(multiple / 2)
        shorter = sum(_merged(pool.map(Panel.judge, panels)).values())
        if not shorter < divergence:
            shorten(multiple)
            break
        multiple, divergence = multiple / 2, shorter
    return multiple


def _descend(
    pool: ThreadPoolExecutor,
    panels: Sequence[Panel],
    reach: Mapping[str, float],
    steps: int,
    told: Callable[[int], None] | None,
) -> None:
    """Move the parameters that `reach` names, by steps in parts of it; the panels' networks all see them move."""
    for panel in panels:
        for name in reach:
            panel.parameters[name].requires_grad_()
    lead = panels[0].parameters
    groups = [{"params": [lead[name]], "lr": _RATE * size} for name, size in reach.items()]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, _LAST, steps)
    for number in range(steps):
        gradient = _summed(pool.map(Panel.gradients, panels, [number] * len(panels)))
        if number == 0:
            for group in optimizer.param_groups:
                group["eps"] = _QUIET * _root_mean_square(gradient.values())
        for name, own in gradient.items():
            lead[name].grad = own
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if told is not None:
            told(number + 1)


def _summed(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, own in part.items():
            total[name] = total[name].add_(own) if name in total else own
    return total


def _root_mean_square(tensors: Collection[Tensor]) -> float:
    return math.sqrt(sum(float(one.square().sum()) for one in tensors) / max(1, sum(one.numel() for one in tensors)))


def _weights(plan: Plan, staging: Staging) -> dict[str, Tensor]:
    """The merged weights in float32."""
    found: dict[str, Tensor] = {}
    for shard in plan.shards:
        file = SafetensorsFile.open(staging.folder / shard.file)
        try:
            found |= {name: file.read(name).float() for name, dtype, _ in shard.tensors if dtype in FLOATS}
        finally:
            file.close()
    return found


def _write(plan: Plan, staging: Staging, weights: Mapping[str, Tensor], moved: set[str]) -> dict[str, str]:
    """Write every shard anew beside the solved ones, with the weights that `moved`; their sha256 by file."""
    digests = {}
    for shard in plan.shards:
        solved = SafetensorsFile.open(staging.folder / shard.file)
        out = ShardFile(staging.refinement, shard)
        try:
            for name, dtype, _ in shard.tensors:
                out.write(name, weights[name].to(dtype) if name in moved else solved.read(name))
            digests[shard.file] = out.finish()
        finally:
            out.abandon()
            solved.close()
    return digests


def _distance(refined: Tensor, solved: Tensor, reach: float) -> float:
    """How far a parameter went, in parts of how far the solved merge had taken it."""
    if not reach:
        return 0.0
    return float((refined - solved).square().mean().sqrt()) / reach


def _merged(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    return {name: value for part in parts for name, value in part.items()}
