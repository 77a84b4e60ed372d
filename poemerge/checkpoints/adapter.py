"""A PEFT LoRA adapter, kept factored: every module's delta is scaling · B A and is never formed here.

LoRA: https://arxiv.org/abs/2106.09685; rsLoRA scaling: https://arxiv.org/abs/2312.03732. File layout: PEFT's
save_pretrained (adapter_config.json, adapter_model.safetensors), checked against PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.checkpoints.checkpoint import HEAD, INDEX, PICKLES, SINGLE, Checkpoint
from poemerge.checkpoints.remote import as_path
from poemerge.checkpoints.safetensors_file import load_json
from poemerge.errors import CheckpointError, Problem

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "Adapter", "LoraModule", "is_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_CONFIG_LIMIT = 10_000_000
_NO_EFFECT = frozenset(
    {
        "auto_mapping", "eva_config", "base_model_name_or_path",
         "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
        "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save",
        "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "revision",
        "runtime_config", "target_modules", "task_type", "use_rslora", "init_lora_weights", "ensure_weight_tying",
    }
)  # fmt: skip
"""Keys of adapter_config.json that are read here or say nothing about how B and A become a delta."""

_NAMES = {
    "use_dora": "DoRA",
    "lora_bias": "a bias inside lora_B",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
}
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights alone; PiSSA, OLoRA, CorDA and others move part of them into B A."""


@dataclass(frozen=True)
class LoraModule:
    """Where one module's factors lie. `transposed`: the weight is stored [in, out] and its delta is (B A)ᵀ.

    `transposed` None means that only the base's shape can tell (fan_in_fan_out is one flag for all modules).
    """

    weight: str
    b: str
    a: str
    scaling: float
    transposed: bool | None


def is_adapter(path: Path) -> bool:
    """Whether the folder `path` holds a PEFT adapter and no full weights (a config.json may stand beside it)."""
    return (path / ADAPTER_CONFIG).is_file() and not any((path / name).is_file() for name in (SINGLE, INDEX))


class Adapter:
    """LoRA factors by the name of the weight that they change, in the names of the model that was adapted.

    `modules` are the factored ones, `full` the tensors stored whole (modules_to_save, trained biases): name in the
    adapted model → name in the file; `private` the tensors of head.safetensors.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, head: Checkpoint | None, config: dict[str, Any]) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.head = head
        self.config = config
        self.modules: dict[str, LoraModule] = {}
        self.full: dict[str, str] = {}

    @staticmethod
    def open(path: Path, expert: str | None = None) -> Adapter:
        """The adapter in the folder `path`; headers and config are read and checked, no tensor is.

        Raises CheckpointError with every problem: kinds of adapter other than LoRA, options that change what B A
        means (DoRA, PiSSA …), factors without their partner or whose shapes do not fit.
        """
        path = as_path(path)
        config_path = path / ADAPTER_CONFIG
        try:
            if config_path.stat().st_size > _CONFIG_LIMIT:
                raise CheckpointError(
                    Problem(str(config_path), "more than 10 MB", "an adapter config", "fetch it again", expert)
                )
            text = config_path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                Problem(
                    str(config_path), error.strerror or str(error), "a readable file", "check path and rights", expert
                )
            ) from error
        config = load_json(config_path, text, expert)
        problems = list(_config_problems(config_path, config, expert))
        if problems:
            raise CheckpointError(problems)
        weights = path / ADAPTER_WEIGHTS
        if not weights.is_file():
            pickles = [file.name for file in path.iterdir() if file.suffix in PICKLES]
            raise CheckpointError(
                Problem(
                    str(path),
                    f"pickled weights only: {', '.join(pickles)}" if pickles else f"no {ADAPTER_WEIGHTS}",
                    ADAPTER_WEIGHTS,
                    "load the adapter with PEFT where you trust it, then save_pretrained(…, safe_serialization=True)",
                    expert,
                )
            )
        head = Checkpoint.open(path / HEAD, expert) if (path / HEAD).is_file() else None
        adapter = Adapter(path, Checkpoint.open(weights, expert), head, config)
        problems = list(adapter._find_modules(expert))
        if problems:
            raise CheckpointError(problems)
        return adapter

    def factors(self, weight: str) -> tuple[Tensor, Tensor, float]:
        """(B [out, r], A [r, in], scaling) of `weight` as nn.Linear counts them; delta = scaling · B A."""
        module = self.modules[weight]
        return self.checkpoint.read(module.b), self.checkpoint.read(module.a), module.scaling

    def rank(self, weight: str) -> int:
        """LoRA rank of `weight`."""
        return self.checkpoint.shape(self.modules[weight].a)[0]

    def private_names(self) -> list[str]:
        """Names of the tensors in head.safetensors."""
        return [] if self.head is None else self.head.names()

    def read_full(self, name: str) -> Tensor:
        """A tensor stored whole: one of `full`, or one of head.safetensors."""
        if name in self.full:
            return self.checkpoint.read(self.full[name])
        assert self.head is not None
        return self.head.read(name)

    def close(self) -> None:
        """Give the file descriptors back."""
        self.checkpoint.close()
        if self.head is not None:
            self.head.close()

    def _find_modules(self, expert: str | None) -> Iterator[Problem]:
        """Sort the file's tensors into `modules` and `full`; yields what fits neither."""
        halves: dict[str, dict[str, str]] = {}
        for stored in self.checkpoint.names():
            name = stored.removeprefix("base_model.model.")
            match = re.fullmatch(r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.(?!weight$)[^.]+)?(?:\.weight)?", name)
            if match is not None:
                halves.setdefault(match[1], {})[match[2]] = stored
            elif "lora_" in name:
                yield Problem(
                    str(self.checkpoint.path),
                    "a tensor of a kind of adapter that is not merged",
                    "plain LoRA factors lora_A and lora_B",
                    "merge this adapter into its base with PEFT and use the full model as the expert",
                    expert,
                    stored,
                )
            elif ".original_module." not in name:
                # `base_layer` is a trained bias, or an embedding saved whole beside its factors.
                self.full[re.sub(r"\.(modules_to_save\.[^.]+|base_layer)\.", ".", name)] = stored
        for path, pair in halves.items():
            embedding = "lora_embedding_A" in pair or "lora_embedding_B" in pair
            kind = "lora_embedding_" if embedding else "lora_"
            if set(pair) != {f"{kind}A", f"{kind}B"}:
                yield Problem(
                    str(self.checkpoint.path),
                    f"only {', '.join(sorted(pair))}",
                    f"both {kind}A and {kind}B",
                    "save the adapter again",
                    expert,
                    path,
                )
                continue
            a, b = pair[f"{kind}A"], pair[f"{kind}B"]
            shape_a, shape_b = self.checkpoint.shape(a), self.checkpoint.shape(b)
            if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or not shape_a[0]:
                yield Problem(
                    str(self.checkpoint.path),
                    f"A {shape_a} and B {shape_b}",
                    "A [r, in] and B [out, r] of one rank r > 0 (convolutions are not merged as LoRA)",
                    "merge this adapter into its base with PEFT and use the full model as the expert",
                    expert,
                    path,
                )
                continue
            transposed = True if embedding else None
            scaling = self._scaling(path, shape_a[0])
            self.modules[f"{path}.weight"] = LoraModule(f"{path}.weight", b, a, scaling, transposed)
        if not halves and not self.full and self.head is None:
            yield Problem(
                str(self.checkpoint.path), "no tensors", "LoRA factors", "save the adapter again; it is empty", expert
            )

    def _scaling(self, path: str, rank: int) -> float:
        """alpha / r, or alpha / √r with rslora, with alpha from alpha_pattern where the module's path ends in one."""
        alpha: float = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _config_problems(path: Path, config: dict[str, Any], expert: str | None) -> Iterator[Problem]:
    advice = "merge this adapter into its base with PEFT (merge_and_unload) and use the full model as the expert"
    kind = str(config.get("peft_type", "LORA"))
    if kind.upper() != "LORA":
        yield Problem(str(path), f"peft_type {kind}", "LORA", advice, expert)
        return
    start = config.get("init_lora_weights")
    if not isinstance(start, (bool, str, type(None))) or start not in _KEEPS_BASE:
        yield Problem(
            str(path),
            f"init_lora_weights {str(start)[:60]!r}, which moves part of the base's weights into the adapter",
            "an initialisation that leaves the base as it is",
            advice,
            expert,
        )
    for key, value in config.items():
        if value and key not in _NO_EFFECT and not key.endswith("_config"):
            yield Problem(
                str(path),
                f"{key}: {str(value)[:60]} ({_NAMES.get(key, 'an option that changes what B A means')})",
                "plain LoRA",
                advice,
                expert,
            )
        elif value and key.endswith("_config"):
            yield Problem(str(path), f"{key} is set", "plain LoRA", advice, expert)
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    numbers = [alpha, *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        yield Problem(str(path), f"lora_alpha {alpha}, alpha_pattern {patterns}", "numbers", "mend the config", expert)
        return
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield Problem(str(path), f"alpha_pattern {pattern!r}: {error}", "a pattern", "mend the config", expert)


def factored(b: Tensor, a: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """(B, A) in the layout in which the weight is stored: (Aᵀ, Bᵀ) where that is the transpose of [out, in]."""
    return (a.T, b.T) if transposed else (b, a)


def dense(b: Tensor, a: Tensor, scaling: float) -> Tensor:
    """The delta scaling · B A as a matrix in float32."""
    return (b.to(torch.float32) @ a.to(torch.float32)).mul_(scaling)
