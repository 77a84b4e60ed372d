"""How names of parameters in an expert meet those of the base, and what kind of parameter a name stands for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch

from poemerge.checkpoints.safetensors_file import FLOATS

__all__ = ["Rule", "classes_of", "is_head", "layer_group", "match_names", "rule_of", "selected", "tied_layer"]

Rule = Literal["matrix", "vector", "embedding", "base"]

_EMBEDDING = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|shared|word_embeddings|cls_token|class_embedding|mask_token|pos_embed|relative_attention_bias"
    r"|lm_head)([._]|$)|embedding"
)
_PATCHES = re.compile(r"(^|[._])patch_?(embed|proj)\w*\.(?!.*pos)")
"""What projects patches of an image is called an embedding and is a linear layer: its inputs are pixels, no rows are
looked up."""
_TIED = re.compile(
    r"(^|\.)((?P<output>lm_head|decoder|proj_out|output_projection|embed_out|vocab_projector|generator_lm_head)"
    r"|shared|embed_tokens|wte|word_embeddings?|tokens_embed|tok_embeddings|embed_in)\.weight$"
)
"""What transformers' models tie to one another: the embedding of tokens, under all its names, and output layers."""
_NORM = re.compile(r"(^|[._])(\w*norm\w*|ln\d*|ln_\w+)([._]|$)", re.IGNORECASE)
_NUMBERED = re.compile(r"(^|\.)\d+\.")

_RENAMED_MODULES = tuple(
    (re.compile(rf"(^|\.){new}(?=\.)"), rf"\1{old}")
    for new, old in (
        (r"layers\.(\d+)", r"encoder.layer.\2"),
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.k_proj", "attention.attention.key"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    )
)
"""Vision transformers: an adapter has the names that modules have in transformers 5, a saved model those of before."""

_NORM_PARTS = {".gamma": ".weight", ".beta": ".bias"}
"""Layer norms of checkpoints that TensorFlow's were converted to (bert-base-uncased), and what they are called now."""


def classes_of(private: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """`num_labels` of a classifier's private parameters, for its configuration; nothing where its matrices differ."""
    rows = {tensor.shape[0] for name, tensor in private.items() if name.endswith("weight") and tensor.ndim == 2}
    return {"num_labels": rows.pop()} if len(rows) == 1 else {}


def match_names(ours: Collection[str], theirs: Sequence[str]) -> dict[str, str]:
    """Name in the base (`ours`) for each name in the expert (`theirs`) that has one.

    A task model keeps its backbone under a prefix (bert., model., vit.) that the bare base lacks, or the other way
    round: transformers' base_model_prefix. The prefix is the one that lets most names meet; none, when that is as good.
    Names of modules are tried as the files call them where transformers has renamed the modules since; `gamma` and
    `beta` of a layer norm meet `weight` and `bias` where that leaves every other pair as it is.
    """
    plain = _match_modules(ours, theirs)
    if not any(name.endswith(tuple(_NORM_PARTS)) for name in (*ours, *theirs)):
        return plain
    our_norms, their_norms = _renamed_norms(ours), _renamed_norms(theirs)
    matched = _match_modules(our_norms, list(their_norms))
    found = {their_norms[own]: our_norms[target] for own, target in matched.items()}
    return found if plain.items() <= found.items() else plain


def _renamed_norms(names: Collection[str]) -> dict[str, str]:
    """The names given, by what they are called now; one stays where another tensor is called so already."""
    known, found = set(names), {}
    for name in names:
        stem, dot, last = name.rpartition(".")
        now = stem + _NORM_PARTS.get(dot + last, dot + last)
        found[name if now in known else now] = name
    return found


def _match_modules(ours: Collection[str], theirs: Sequence[str]) -> dict[str, str]:
    best = _match(ours, theirs)
    in_files = {name: _name_in_files(name) for name in theirs}
    found = _match(ours, list(in_files.values()))
    return _better(best, {name: found[own] for name, own in in_files.items() if own in found}, ours)


def _match(ours: Collection[str], theirs: Sequence[str]) -> dict[str, str]:
    best = {name: name for name in theirs if name in ours}
    for prefix in dict.fromkeys(_prefixes(theirs)):
        found = {name: name.removeprefix(prefix) for name in theirs if name.startswith(prefix)}
        best = _better(best, found, ours)
    for prefix in dict.fromkeys(_prefixes(list(ours))):
        best = _better(best, {name: prefix + name for name in theirs}, ours)
    return best


def _name_in_files(name: str) -> str:
    for pattern, old in _RENAMED_MODULES:
        name = pattern.sub(old, name)
    return name


def _prefixes(names: Sequence[str]) -> list[str]:
    """Leading one and two components of `names`, numbered ones left out."""
    found = []
    for name in names:
        parts = name.split(".")
        for depth in (1, 2):
            head = parts[:depth]
            if len(parts) > depth and not any(part.isdigit() for part in head):
                found.append(".".join(head) + ".")
    return found


def _better(best: dict[str, str], candidate: Mapping[str, str], ours: Collection[str]) -> dict[str, str]:
    found = {name: target for name, target in candidate.items() if target in ours}
    return found if len(found) > len(best) else best


def selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether `name` matches a glob of `include` and none of `exclude`."""
    return any(fnmatchcase(name, glob) for glob in include) and not any(fnmatchcase(name, glob) for glob in exclude)


def rule_of(name: str, shape: Sequence[int], dtype: torch.dtype) -> Rule:
    """What a parameter is: a matrix (solved), a vector (norms, biases, convolutions), an embedding, or no weight."""
    if dtype not in FLOATS:
        return "base"
    if len([size for size in shape if size != 1]) < 2 or _NORM.search(name):
        return "vector"
    if _EMBEDDING.search(name) and not _PATCHES.search(name):
        return "embedding"
    return "matrix" if len(shape) == 2 or (len(shape) == 3 and "expert" in name) else "vector"


def tied_layer(name: str) -> Literal["input", "output"] | None:
    """Which of the layers that may be tied to one another a parameter belongs to; None for any other."""
    match = _TIED.search(name)
    return None if match is None else "output" if match["output"] else "input"


def is_head(name: str) -> bool:
    """Whether a parameter may be a task's own: outside every numbered block and no embedding of tokens or positions."""
    return _NUMBERED.search(name) is None and (name.startswith("lm_head") or _EMBEDDING.search(name) is None)


def layer_group(name: str) -> str:
    """The kind of layer that a parameter belongs to, its block numbers left out: encoder.layer.attention.self.query."""
    return _NUMBERED.sub(lambda match: match[1], name).removesuffix(".weight").removesuffix(".bias")
