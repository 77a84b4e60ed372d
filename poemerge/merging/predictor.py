"""An expert as what it predicts: its network under its own frozen head, or the features that it moved.

A classifier that was trained with its expert is asked only where the features tell nothing: merges that keep to the
features were right more often than those that keep to what such classifiers say (docs/method.md).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from poemerge.checkpoints import Adapter, Expert, ExpertSet, model_config
from poemerge.checkpoints.names import classes_of, match_names
from poemerge.merging.features import moved_directions, why_no_features
from poemerge.merging.inputs import RandomInputs, of_images, tokens_of
from poemerge.numerics.precision import full_precision
from poemerge.quiet import quiet_loading

__all__ = ["Answer", "Predictor", "asked_by", "divergence", "features_tokens", "in_one_line", "other_task", "predicts"]

_CLASSIFIERS = ("classifier", "score")
"""What transformers calls the classifier of its own task models."""

_OTHER_TASKS = ("ForTokenClassification", "ForMultipleChoice")
"""Task models of transformers' whose classifier has the same name and reads something else."""

_LOADED: dict[str, Any] = {
    "dtype": torch.float32,
    # Written out: torch's fused attention is no faster on texts as short as these, and far slower back in bfloat16.
    "attn_implementation": "eager",
    "trust_remote_code": False,
    "use_safetensors": True,
}
"""How the network of an expert is loaded, with its own head or with a classifier of transformers'."""

_INPUTS = 256
_BATCH = 32
_TOKENS = 32
"""Texts that say which features an expert moved, how many of them at once, and their length."""

_loading = threading.Lock()
"""transformers changes settings of the whole process while it loads a model."""


def features_tokens(config: Mapping[str, Any]) -> int:
    """How many tokens go through a network to find which features an expert moved: as the base's, and as its own."""
    return 2 * _INPUTS * tokens_of(config, _TOKENS)


def predicts(private: Collection[str]) -> bool:
    """Whether private parameters of these names make a head: head.weight, or a classifier of transformers' own."""
    return "head.weight" in private or any(
        name.partition(".")[0] in _CLASSIFIERS and name.endswith(".weight") for name in private
    )


def asked_by(private: Collection[str], config: Mapping[str, Any]) -> Literal["head", "features", "classifier", None]:
    """What an expert with private parameters of these names, of a base with this config.json, is asked by; None where
    it cannot be asked."""
    if "head.weight" in private:
        return "head"
    if why_no_features(config) is None:
        return "features"
    return "classifier" if predicts(private) else None


def other_task(expert: Expert) -> str | None:
    """The task model that the expert's own files name, where its classifier is none of whole inputs."""
    if isinstance(expert.source, Adapter):
        task = expert.source.config.get("task_type")
        return f"an adapter for {task}" if task == "TOKEN_CLS" else None
    named = model_config(expert.path).get("architectures") or []
    return next((str(one) for one in named if str(one).endswith(_OTHER_TASKS)), None)


def in_one_line(error: Exception) -> str:
    """What went wrong with a network, as merge.json says it."""
    return f"{type(error).__name__}: {(str(error) or 'nothing said').splitlines()[0]}"


def divergence(expert: Tensor, other: Tensor) -> Tensor:
    """KL(p_i ‖ p) in nats of logits `[input, class]`, the expert's and another network's; the mean over the inputs."""
    said, now = torch.log_softmax(expert, -1), torch.log_softmax(other, -1)
    return torch.nn.functional.kl_div(now, said, log_target=True, reduction="batchmean")


@dataclass(frozen=True)
class Answer:
    """What a network makes of inputs: a head's `logits` `[input, class]`, the unit vector `[input, hidden]` that a head
    of our own has a `reading` of, and V h of its `features` `[input, token, direction]`; float32, and None for what the
    expert is not asked by."""

    logits: Tensor | None = None
    reading: Tensor | None = None
    features: Tensor | None = None


class Predictor:
    """The expert `name` in float32 on the CPU, with its private head; its weights need no gradients.

    Where it is asked by its features, `directions` `[direction, hidden]` stand for a head (poemerge.merging.features);
    an expert with a head of its own is asked by its features beside that where `features` says so, its inputs are texts
    and it moved any. Raises what transformers raises for a model that it cannot build, and ValueError for one whose
    weights neither the base nor the expert holds, or that is asked by features alone and moves none.
    """

    def __init__(self, experts: ExpertSet, name: str, *, features: bool = False) -> None:
        private = experts.experts[name].read_private()
        self.experts = experts
        self.head = private.get("head.weight")
        self.bias = private.get("head.bias")
        self.directions: Tensor | None = None
        self._asked = asked_by(private, experts.config)
        with _loading:
            self.model = _classifier(experts, name, private) if self._asked == "classifier" else _encoder(experts)
            self.inputs = RandomInputs(experts.base.path, self.model.config, self._tokens_moved(name))
        self.model.eval().requires_grad_(False)
        beside = features and self._asked == "head" and not of_images(experts.config)
        before = self._features() if beside or self._asked == "features" else None
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for own, theirs in self._names():
                if name in experts.touching(own):
                    parameters[theirs].add_(experts.delta(name, own))
        if before is not None:
            after = self._features()
            with suppress(ValueError) if beside else nullcontext():
                self.directions = moved_directions(before, after, self._moved(before, after) if beside else 1.0)

    @torch.no_grad()
    def _features(self) -> Tensor:
        """`[input, token, hidden]`, the last hidden states on the same texts whenever they are asked for."""
        generator = torch.Generator().manual_seed(1)
        asked = [self.inputs.draw(_BATCH, _TOKENS, generator) for _ in range(_INPUTS // _BATCH)]
        return torch.cat([self.model(**inputs).last_hidden_state.float() for inputs in asked])

    def _moved(self, before: Tensor, after: Tensor) -> float:
        """KL(p_i ‖ p_0) in nats: how far the expert moved what its own head says of the features, which says how much
        they are worth beside it."""
        was, now = (self._under_head(_mean(one)) for one in (before, after))
        return float(divergence(now, was).clamp_min(0))

    def _tokens_moved(self, name: str) -> Tensor | None:
        """‖δ‖ `[token]` of what the expert did to the embeddings of its inputs; None where it left them alone."""
        table = getattr(self.model.get_input_embeddings(), "weight", None)
        for own, theirs in self._names():
            if self.model.get_parameter(theirs) is table and name in self.experts.touching(own):
                distances: Tensor = torch.linalg.vector_norm(self.experts.delta(name, own).flatten(1), dim=1)
                return distances
        return None

    def linear_layers(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """The base's name of the weight, and the layer, for every linear layer that is merged as a matrix."""
        for name, theirs in self._names():
            owner, _, last = theirs.rpartition(".")
            module = self.model.get_submodule(owner)
            linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
            if last == "weight" and linear and self.experts.rule(name) == "matrix":
                yield name, module

    def answer(self, inputs: Mapping[str, Tensor]) -> Answer:
        """What the expert's head makes of `inputs`, and what it makes of their features."""
        out = self.model(**inputs)
        features = None if self.directions is None else out.last_hidden_state.float() @ self.directions.mT
        if self._asked == "head":
            reading = _pooled(out, "pixel_values" in inputs)
            return Answer(self._under_head(reading), reading, features)
        return Answer(out.logits.float()) if self._asked == "classifier" else Answer(features=features)

    def _under_head(self, reading: Tensor) -> Tensor:
        assert self.head is not None
        with full_precision():
            return torch.nn.functional.linear(
                reading, self.head.float(), None if self.bias is None else self.bias.float()
            )

    def adopt(self, parameters: Mapping[str, torch.nn.Parameter]) -> set[str]:
        """Take `parameters`, by the base's names, for the network's own: the same objects. The expert's head stays.

        Returns the names that the network has a place for.
        """
        taken = set()
        for name, theirs in list(self._names()):
            owner, _, last = theirs.rpartition(".")
            setattr(self.model.get_submodule(owner), last, parameters[name])
            taken.add(name)
        return taken

    def _names(self) -> Iterator[tuple[str, str]]:
        """(the base's name, the module's) of every parameter that both have."""
        matched = match_names(set(self.experts.names()), [theirs for theirs, _ in self.model.named_parameters()])
        for theirs, name in matched.items():
            yield name, theirs


def _pooled(out: Any, image: bool) -> Tensor:
    """`[input, hidden]`, pooled as the evaluation's suites do by default."""
    if hasattr(out, "image_embeds"):
        return torch.nn.functional.normalize(out.image_embeds.float(), dim=-1)
    states: Tensor = out.last_hidden_state.float()
    return states[:, 0] if image else _mean(states)


def _mean(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states.mean(1), dim=-1)


def _encoder(experts: ExpertSet) -> Any:
    """The base's architecture with the base's weights."""
    from transformers import AutoConfig, AutoModel

    folder = experts.base.path
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind: Any = AutoModel
    if config.model_type in {"clip", "clip_vision_model"}:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        # The base's architecture: a bare vision tower does not know the width of the projection.
        width = config.projection_dim
        config, kind = CLIPVisionConfig.from_pretrained(folder, projection_dim=width), CLIPVisionModelWithProjection
    with quiet_loading():
        return kind.from_pretrained(folder, config=config, **_LOADED)


def _classifier(experts: ExpertSet, name: str, private: dict[str, Tensor]) -> Any:
    """transformers' classifier of the base's architecture, the base's weights under the expert's own classifier."""
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    folder, own = experts.base.path, experts.experts[name].path
    told = own if (own / "config.json").is_file() else folder
    config = AutoConfig.from_pretrained(told, trust_remote_code=False, **classes_of(private))
    image = hasattr(config, "image_size")
    if not image and config.pad_token_id is None:
        config.pad_token_id = 0  # decoders find their last token by it
    kind: Any = AutoModelForImageClassification if image else AutoModelForSequenceClassification
    with quiet_loading():
        model, loading = kind.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **_LOADED
        )
    state = model.state_dict()
    unmade = set(loading["missing_keys"]) | {one[0] for one in loading["mismatched_keys"]}
    for each, tensor in private.items():
        if each in state and state[each].shape == tensor.shape:
            state[each].copy_(tensor)
            unmade.discard(each)
    if unmade:
        raise ValueError(f"neither the base nor the expert holds {', '.join(sorted(unmade))}")
    return model
