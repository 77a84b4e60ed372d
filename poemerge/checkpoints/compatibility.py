"""Whether an expert belongs to a base: configuration, shapes, dtypes, and a look at a few rows of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from poemerge.checkpoints.checkpoint import Checkpoint
from poemerge.checkpoints.names import Rule, is_head, rule_of, tied_layer
from poemerge.checkpoints.safetensors_file import FLOATS, dtype_name
from poemerge.errors import Problem

__all__ = [
    "config_problems",
    "foreign_problems",
    "renamed_embeddings",
    "same_tensor",
    "shape_problems",
    "transposed_layout",
    "unmoved",
]

_STRUCTURE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "head_dim", "d_model", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "n_embd", "n_layer", "n_head",
    "num_experts", "num_local_experts", "patch_size", "image_size",
)  # fmt: skip
_CONV1D = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp", "clvp_decoder")
"""Model types with layers of transformers.pytorch_utils.Conv1D (all of transformers 5.23)."""
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
_SAMPLED_MATRICES, _SAMPLED_ROWS = 3, 64
_BLOCK_BYTES = 1 << 24
_LEAST_COSINE = 0.5
"""A fine-tuned weight lies within degrees of where it started; two trainings from scratch have a cosine near 0."""


def transposed_layout(name: str, config: Mapping[str, object]) -> bool:
    """Whether the architecture, or a part of it (a decoder), stores the weight `name` as [in, out]: GPT-2's Conv1D."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return any(part.get("model_type") in _CONV1D for part in parts) and bool(_TRANSPOSED.search(name))


def config_problems(
    base: Mapping[str, object], own: Mapping[str, object], path: Path, expert: str
) -> Iterator[Problem]:
    """Keys of config.json that shape the network and differ between base and expert."""
    differing = {
        key: (own[key], base[key]) for key in _STRUCTURE if key in base and key in own and own[key] != base[key]
    }
    if differing:
        yield Problem(
            str(path / "config.json"),
            ", ".join(f"{key}: {mine}" for key, (mine, _) in differing.items()),
            ", ".join(f"{key}: {theirs}" for key, (_, theirs) in differing.items()) + " as in the base",
            "this expert was fine-tuned from another model: leave it out or name its own base",
            expert,
        )


def shape_problems(
    base: Checkpoint,
    weights: Checkpoint,
    stored: Callable[[str], str],
    own_names: Sequence[str],
    matched: Mapping[str, str],
    rules: Mapping[str, Rule],
    path: Path,
    expert: str,
) -> Iterator[Problem]:
    """Parameters of another shape than the base's that are no head, and ones that cannot be subtracted."""
    for own in own_names:
        target = matched.get(own)
        if target is None or rules[target] == "base":
            continue
        ours, theirs = base.shape(target), weights.shape(stored(own))
        if ours != theirs and not is_head(target):
            embedding = rule_of(target, ours, base.dtype(target)) == "embedding"
            yield Problem(
                str(path),
                f"shape {theirs}",
                f"{ours}, the base's shape",
                "it has another vocabulary: give all models one tokenizer, or exclude this parameter"
                if embedding
                else "this expert was fine-tuned from another model: leave it out or name its own base",
                expert,
                own,
            )
        elif weights.dtype(stored(own)) not in FLOATS:
            yield Problem(
                str(path),
                f"dtype {dtype_name(weights.dtype(stored(own)))}",
                "F64, F32, F16 or BF16 (quantised weights have no task vector)",
                "use the unquantised expert",
                expert,
                own,
            )


def foreign_problems(
    base: Checkpoint, weights: Checkpoint, full: Mapping[str, str], path: Path, expert: str
) -> Iterator[Problem]:
    """A full expert must hold most of the base's parameters, with values near the base's (`full`: base name → own)."""
    wanted = [name for name in base.names() if base.dtype(name) in FLOATS]
    if 2 * base.total_bytes(full) <= base.total_bytes(wanted):
        example = next((name for name in wanted if name not in full), "")
        yield Problem(
            str(path),
            f"{len(full)} of the base's {len(wanted)} parameters (it lacks {example}, for instance)",
            "most of the base's parameters under the same names",
            "this expert was fine-tuned from another model: leave it out or name its own base",
            expert,
        )
        return
    matrices = [n for n, own in full.items() if len(base.shape(n)) == 2 and weights.shape(own) == base.shape(n)]
    step = max(1, len(matrices) // _SAMPLED_MATRICES)
    for name in matrices[::step][:_SAMPLED_MATRICES]:
        cosine = _cosine(base, name, weights, full[name])
        if cosine is not None and cosine < _LEAST_COSINE:  # false for NaN: the merge names non-finite tensors itself
            yield Problem(
                str(path),
                f"values unrelated to the base's (cosine {cosine:.2f} over its first rows)",
                f"a cosine of at least {_LEAST_COSINE}, as fine-tuning leaves it",
                "this expert was trained from another base: leave it out or name its own base",
                expert,
                full[name],
            )
            return


def renamed_embeddings(
    base: Checkpoint, weights: Checkpoint, matched: Mapping[str, str], config: Mapping[str, object]
) -> dict[str, str]:
    """Own name → base name of embeddings that the base stores under one of their tied names, the expert under another.

    One that no tensor left over from `matched`, or several that differ, may stand for is left alone.
    """
    tied = config.get("tie_word_embeddings") is not False
    found: dict[str, str] = {}
    for name in base.names():
        shape, kind = base.shape(name), tied_layer(name)
        if name in matched.values() or kind is None or rule_of(name, shape, base.dtype(name)) != "embedding":
            continue
        twins = [
            own
            for own in weights.names()
            if own not in matched and own not in found and weights.shape(own) == shape and weights.dtype(own) in FLOATS
            if tied_layer(own) == kind == "input" or (tied and tied_layer(own) is not None)
            if (_cosine(base, name, weights, own) or 0.0) >= _LEAST_COSINE
        ]
        if twins and all(same_tensor(weights, twins[0], weights, twin) for twin in twins[1:]):
            found |= dict.fromkeys(twins, name)
    return found


def _cosine(base: Checkpoint, name: str, weights: Checkpoint, own: str) -> float | None:
    """The cosine between the first rows of two matrices; None where these are zero."""
    rows = slice(0, _SAMPLED_ROWS)
    ours = base.read(name, rows).to(torch.float64).flatten()
    theirs = weights.read(own, rows).to(torch.float64).flatten()
    norms = float(ours.norm() * theirs.norm())
    return None if norms == 0 else float(ours @ theirs) / norms


def same_tensor(one: Checkpoint, name: str, other: Checkpoint, twin: str) -> bool:
    """Whether two tensors are equal bit for bit, read in blocks of rows and no further than the first difference."""
    return one.dtype(name) == other.dtype(twin) and unmoved(one, name, other, twin)


def unmoved(base: Checkpoint, name: str, weights: Checkpoint, own: str) -> bool:
    """Whether a tensor is the base's in the dtype that it is stored in, read as `same_tensor` reads."""
    shape, dtype = base.shape(name), weights.dtype(own)
    if shape != weights.shape(own):
        return False
    if not shape:
        return torch.equal(base.read(name).to(dtype), weights.read(own))
    block = max(1, _BLOCK_BYTES * shape[0] // max(base.nbytes(name), 1))
    blocks = (slice(first, first + block) for first in range(0, shape[0], block))
    return all(torch.equal(base.read(name, rows).to(dtype), weights.read(own, rows)) for rows in blocks)
