"""What each expert minds at each layer's outputs, measured without data: random inputs through its own network.

A task vector says in which directions an expert moved, not which others its predictions depend on: for an adapter
these are far more than its rank. The covariance S of the gradients at a layer's outputs says it (one factor of K-FAC's
Fisher matrix, Martens and Grosse, https://arxiv.org/abs/1503.05671), and random inputs show it well enough.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poemerge.cache import cache_root
from poemerge.checkpoints import Expert, ExpertSet, save_tensors
from poemerge.checkpoints.safetensors_file import SafetensorsFile
from poemerge.errors import PoemergeError
from poemerge.merging.features import why_no_features
from poemerge.merging.identity import identity_of
from poemerge.merging.inputs import of_images, tokens_of
from poemerge.merging.predictor import Predictor, asked_by, features_tokens, in_one_line, other_task
from poemerge.merging.stream import processors, single_threaded

if TYPE_CHECKING:
    from poemerge.merging.plan import Plan

__all__ = ["Sensitivities", "columns", "gather", "measure", "measuring_flops", "why_not"]

log = logging.getLogger(__name__)

_VERSION = 7
"""Raised when the measurement changes: what is kept of earlier ones is then measured again."""

_INPUTS = 256
_BATCH = 32
_TOKENS = 32
_WHOLE = 2048
_SKETCH = 512
"""S is kept whole for a layer of at most so many outputs, else sketched by so many columns."""

_JITTER = 1e-5
"""Part of ‖S‖_F on the diagonal: a normalisation's null directions come out a little negative in float32."""

_AT_ONCE = 2
_ROOM = 6
"""Two models in float32 with their activations, gradients and S take at most this many times the size of one."""


@dataclass(frozen=True)
class Sensitivities:
    """The measured factors of a merge: `folder`/NAME.safetensors for every expert that could be measured."""

    folder: Path

    def read(self, name: str, experts: Sequence[str], rows: int) -> Tensor | None:
        """F_i `[expert, rows, s]` of the matrix `name` with `rows` outputs, float32; zeros for an expert that was not
        measured there, None where no expert was."""
        found: dict[str, Tensor] = {}
        for expert in experts:
            path = self.folder / f"{expert}.safetensors"
            if path.is_file():
                file = SafetensorsFile.open(path)
                try:
                    if name in file.entries and file.entries[name].shape[0] == rows:
                        found[expert] = file.read(name).float()
                finally:
                    file.close()
        if not found:
            return None
        nothing = torch.zeros_like(next(iter(found.values())))
        return torch.stack([found.get(expert, nothing) for expert in experts])


def columns(rows: int) -> int:
    """How many columns F has for a layer of `rows` outputs."""
    return rows if rows <= _WHOLE else _SKETCH


def why_not(experts: ExpertSet, max_memory: int) -> dict[str, str]:
    """The reason, by expert, for each whose sensitivity cannot be measured; reads configurations and names alone."""
    if "://" in str(experts.base.path):
        return dict.fromkeys(experts.experts, "the base is not on this machine")
    size = sum(experts.base.nbytes(n) // experts.base.dtype(n).itemsize * 4 for n in experts.base.names())
    config = experts.config
    if size * _ROOM > max_memory:
        reason = f"the model would take {size * _ROOM:,} bytes of merge.max_memory, which is {max_memory:,}"
    elif not config.get("model_type"):
        reason = "the base's config.json names no model_type"
    elif "vocab_size" not in config and not of_images(config):
        reason = f"no inputs are known for a model of type {config['model_type']}"
    else:
        reasons = {name: _no_answer(one, config) for name, one in experts.experts.items()}
        return {name: reason for name, reason in reasons.items() if reason is not None}
    return dict.fromkeys(experts.experts, reason)


def _no_answer(expert: Expert, config: Mapping[str, Any]) -> str | None:
    """Why this expert, of a base with this config.json, cannot be asked; None where nothing is known against it."""
    asked = asked_by(expert.private_names(), config)
    if asked is None:
        return why_no_features(config)
    other = other_task(expert) if asked == "classifier" else None
    return None if other is None else f"{other} does not say one class for an input"


def measuring_flops(experts: ExpertSet, plan: Plan) -> float:
    """Floating-point operations of measuring the experts that no earlier merge has measured: 2 a weight and token
    forward, 2 back to the activations, the products of the gradients, and of finding the features that were moved."""
    minded = [one for one in plan.parameters if one.minded]
    if not minded:
        return 0.0
    missing = [name for name in experts.experts if name not in plan.not_measured and not _kept(experts, name).is_file()]
    by_features = sum(asked_by(plan.private[name], experts.config) == "features" for name in missing)
    entries = sum(one.entries for one in minded)
    gradients = 4.0 * entries + sum(2.0 * one.outputs * columns(one.outputs) for one in minded)
    measured = len(missing) * _INPUTS * tokens_of(experts.config, _TOKENS) * gradients
    return measured + by_features * features_tokens(experts.config) * 2.0 * entries


def gather(experts: ExpertSet, not_measured: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Put every expert's factors into `folder`, measured now or kept from an earlier merge of the same bytes.

    Returns by expert why there is none: as `not_measured` says, or for what went wrong.
    """
    reasons = dict(not_measured)
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for name in experts.experts:
        if name not in reasons and not (target := folder / f"{name}.safetensors").is_file():
            if (kept := _kept(experts, name)).is_file():
                _copy(kept, target)
            else:
                missing.append(name)
    if missing:
        with single_threaded(), ThreadPoolExecutor(min(processors(), _AT_ONCE)) as pool:
            said = pool.map(lambda name: _measured(experts, name, folder), missing)
            reasons |= {name: reason for name, reason in zip(missing, said, strict=True) if reason is not None}
    return reasons


def _measured(experts: ExpertSet, name: str, folder: Path) -> str | None:
    """Measure one expert into `folder` and keep it; why that cannot be, None when it is done."""
    try:
        found = measure(experts, name)
    except PoemergeError:
        raise
    except Exception as error:
        # Whatever transformers cannot do with a model: it is merged as it would be without.
        reason = in_one_line(error)
        log.warning("%s: sensitivity not measured: %s", name, reason)
        return reason
    if not all(bool(factor.isfinite().all()) for factor in found.values()):
        return "its gradients are not finite"
    target, kept = folder / f"{name}.safetensors", _kept(experts, name)
    # What 256 inputs say is far from exact to the three digits that are kept.
    save_tensors(target, {own: factor.to(torch.bfloat16) for own, factor in found.items()})
    with suppress(OSError):  # a home that cannot be written costs the next merge a measurement
        kept.parent.mkdir(parents=True, exist_ok=True)
        _copy(target, kept)
    return None


def _copy(source: Path, target: Path) -> None:
    """`target` with the bytes of `source`, which nobody changes: a link where the file system can."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.replace(target)


def _kept(experts: ExpertSet, name: str) -> Path:
    """Where the measurement of these bytes, and of the parameters that are selected, is kept."""
    selected = [own for own in experts.names() if experts.rule(own) != "base"]
    key = [_VERSION, identity_of(experts.base.path), identity_of(experts.experts[name].path), selected]
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()
    return cache_root() / "sensitivity" / f"{digest}.safetensors"


def measure(experts: ExpertSet, name: str) -> dict[str, Tensor]:
    """F `[out, s]` float32 of every matrix of the base that is a linear layer, by name: F Fᵀ = E[g gᵀ].

    g is the gradient at the layer's outputs of the log-likelihood of the expert `name`; above 2048 outputs F is
    a sketch of 512 columns, which has that product in expectation.

    256 inputs of 32 random tokens (heaps of leaves in place of an image) go through the expert in float32 on one
    thread of the CPU. At its logits the gradient is drawn from N(0, diag p − p pᵀ), the Fisher matrix of its prediction
    p; asked by its features it is drawn from N(0, I).
    Raises what `Predictor` raises, ValueError where no linear layer is a matrix of the base.
    """
    log.info("%s: measuring what its predictions are sensitive to", name)
    generator = torch.Generator().manual_seed(0)
    with single_threaded():
        predictor = Predictor(experts, name)
        layers = dict(predictor.linear_layers())
        if not layers:
            raise ValueError("no linear layer is a matrix of the base")
        found = {own: _Covariance(generator) for own in layers}
        hooks = [layer.register_forward_hook(found[own].hook) for own, layer in layers.items()]
        # Gradients flow back to the inputs' embeddings; the weights need none.
        embeddings = predictor.model.get_input_embeddings()
        hooks.append(embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_()))
        try:
            for _ in range(_INPUTS // _BATCH):
                said = predictor.answer(predictor.inputs.draw(_BATCH, _TOKENS, generator))
                if said.logits is not None:
                    torch.autograd.backward(said.logits, _fisher_draw(said.logits.detach(), generator))
                elif said.features is not None:
                    torch.autograd.backward(said.features, _signs(said.features.shape, generator))
        finally:
            for hook in hooks:
                hook.remove()
        # A layer that the prediction does not go through (a pooler, say) has no gradient.
        return {own: one.factor() for own, one in found.items() if one.total is not None}


def _fisher_draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """v `[input, class]` with covariance diag p − p pᵀ: (I − p1ᵀ)(√p ∘ ε) for random signs ε."""
    share = torch.softmax(logits, -1)
    draw = share.sqrt() * _signs(share.shape, generator)
    return draw - share * draw.sum(-1, keepdim=True)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator).float().mul_(2).sub_(1)


class _Covariance:
    """S of one layer's outputs, gathered from gradients: whole, or a sketch Gᵀ·signs/√512 where there are many."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self.total: Tensor | None = None

    def hook(self, _: torch.nn.Module, __: Any, output: Tensor) -> None:
        """A forward hook: the gradient at `output` is added when it is known."""
        output.register_hook(self._add)  # type: ignore[no-untyped-call]

    def _add(self, gradient: Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        whole = rows.shape[-1] <= _WHOLE
        other = rows if whole else _signs((len(rows), _SKETCH), self._generator) / _SKETCH**0.5
        self.total = rows.mT @ other if self.total is None else self.total.addmm_(rows.mT, other)

    def factor(self) -> Tensor:
        """F `[out, s]`."""
        assert self.total is not None
        if len(self.total) > _WHOLE or not bool(self.total.any()):
            sketch: Tensor = self.total / _INPUTS**0.5
            return sketch
        whole = self.total.double() / _INPUTS
        whole.diagonal().add_(_JITTER * whole.norm())
        root: Tensor = torch.linalg.cholesky(whole).float()
        return root
