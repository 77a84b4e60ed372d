"""An expert matched with its base, tensor by tensor, and every reason why the two do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from poemerge.checkpoints.adapter import Adapter
from poemerge.checkpoints.checkpoint import HEAD, Checkpoint, model_config
from poemerge.checkpoints.compatibility import (
    config_problems,
    foreign_problems,
    renamed_embeddings,
    same_tensor,
    shape_problems,
    transposed_layout,
    unmoved,
)
from poemerge.checkpoints.expert import Expert
from poemerge.checkpoints.names import Rule, is_head, match_names
from poemerge.checkpoints.safetensors_file import FLOATS, dtype_name
from poemerge.checkpoints.vocabulary import vocabulary_problems
from poemerge.errors import Problem

__all__ = ["meet"]


def meet(base: Checkpoint, expert: Expert, rules: Mapping[str, Rule]) -> Iterator[Problem]:
    """Match the expert's tensors with the base's, filling its fields; yields every reason why they do not fit."""
    config = model_config(base.path if base.path.is_dir() else base.path.parent)
    if expert.kind == "full" and expert.path.is_dir():
        yield from config_problems(config, model_config(expert.path), expert.path, expert.name)
        if any(rule == "embedding" for rule in rules.values()):
            yield from vocabulary_problems(base.path, expert.path, expert.name)
    names = base.names()
    in_base = set(names)
    if isinstance(expert.source, Adapter):
        own_full, own_lora = list(expert.source.full), list(expert.source.modules)
    else:
        own_full, own_lora = expert.source.names(), []
    matched = match_names(in_base, own_full + own_lora)
    if expert.kind == "full":
        matched |= renamed_embeddings(base, expert.weights, matched, config)
    yield from _quantised_problems(base, expert, matched)
    # Buffers of integers are no weights, but an integer where the base has a weight is told below.
    own_full = [
        own
        for own in own_full
        if expert.weights.dtype(expert.stored(own)) in FLOATS or (own in matched and base.dtype(matched[own]) in FLOATS)
    ]
    for own in own_lora:
        if own not in matched:
            yield Problem(
                str(expert.path),
                "LoRA factors for a weight that the base's files lack",
                "weights that the base has",
                "it may be tied to another weight (an output layer to the embedding): merge the adapter into its base "
                "with PEFT and use the full model; or it was trained on another architecture",
                expert.name,
                own,
            )
            continue
        assert isinstance(expert.source, Adapter)
        target = matched[own]
        module = expert.source.modules[own]
        b, a = expert.source.checkpoint.shape(module.b)[0], expert.source.checkpoint.shape(module.a)[1]
        shape = base.shape(target)
        if shape not in ((b, a), (a, b)) or (
            shape != (b, a) and not (module.transposed or transposed_layout(target, config))
        ):
            yield Problem(
                str(expert.path),
                f"factors for a weight of shape {(b, a)}",
                f"{shape}, the base's shape",
                "name the base that this adapter was trained on",
                expert.name,
                own,
            )
        elif rules[target] != "base":
            expert.lora[target] = own
    yield from shape_problems(base, expert.weights, expert.stored, own_full, matched, rules, expert.path, expert.name)
    for own in own_full:
        other = matched.get(own)
        if other is None or base.shape(other) != expert.weights.shape(expert.stored(own)):
            expert.private.append(own)
        elif rules[other] != "base":
            expert.full[other] = own
    if expert.kind == "full":
        _untangle_ties(base, expert, rules, in_base - set(matched.values()))
        held = {other: own for own, other in matched.items() if base.shape(other) == expert.weights.shape(own)}
        yield from foreign_problems(base, expert.weights, held, expert.path, expert.name)
    elif isinstance(expert.source, Adapter):
        # PEFT saves an embedding whole beside its factors when the layer is adapted: an unchanged copy is no delta.
        for target in [target for target in expert.full if target in expert.lora]:
            if unmoved(base, target, expert.weights, expert.stored(expert.full[target])):
                del expert.full[target]
    if expert.head is not None:
        yield from _shadow_problems(base, expert, expert.head, rules, own_full + own_lora)


def _quantised_problems(base: Checkpoint, expert: Expert, matched: Mapping[str, str]) -> Iterator[Problem]:
    """A weight that the expert holds or adapts and the base has quantised: it would stay at the base, and nobody told.

    Buffers of integers (position_ids) are no weights.
    """
    quantised = sorted(
        target for target in matched.values() if target.endswith("weight") and base.dtype(target) not in FLOATS
    )
    if quantised:
        yield Problem(
            str(base.file(quantised[0]).path),
            f"dtype {dtype_name(base.dtype(quantised[0]))}" + (f" ({len(quantised)} such)" if quantised[1:] else ""),
            "F64, F32, F16 or BF16 (quantised weights have no task vector)",
            "use the unquantised base, and experts of it",
            expert.name,
            quantised[0],
        )


def _shadow_problems(
    base: Checkpoint, expert: Expert, head: Checkpoint, rules: Mapping[str, Rule], own: list[str]
) -> Iterator[Problem]:
    """Tensors of head.safetensors with the names of weights that are merged: one of the two would be read for both.

    `own`: the expert's own names, whose prefix the head's may have. A task's layer may have the name of the base's
    where its shape is another one, as in a full model, unless the expert holds a weight or factors of that name too.
    """
    held = {*expert.full.values(), *expert.lora.values()}
    matched = match_names(set(rules), [*own, *head.names()])

    def shadows(name: str) -> bool:
        target = matched.get(name, name)
        is_merged = rules.get(target, "base") != "base"
        return name in held or (is_merged and (head.shape(name) == base.shape(target) or not is_head(target)))

    shadowed = [name for name in head.names() if shadows(name)]
    if shadowed:
        yield Problem(
            str(expert.path / HEAD),
            "the name of a weight that is merged" + (f" ({len(shadowed)} such)" if len(shadowed) > 1 else ""),
            "names that no merged weight has",
            "keep nothing but the task's private tensors in this file, under names of their own",
            expert.name,
            shadowed[0],
        )


def _untangle_ties(base: Checkpoint, expert: Expert, rules: Mapping[str, Rule], absent: set[str]) -> None:
    """Tied weights are stored once or twice, as the saving library pleased: bring the expert to the base's habit.

    A copy that only the expert stores is dropped; a copy that only the base stores is read from its twin.
    """
    weights = expert.weights
    twins = {name: own for name, own in expert.full.items() if rules[name] == "embedding"}
    for own in list(expert.private):
        if any(same_tensor(weights, own, weights, twin) for twin in twins.values()):
            expert.private.remove(own)
    for name in sorted(absent):
        if rules[name] == "base":
            continue
        twin = next((t for t in twins if rules[name] == "embedding" and same_tensor(base, name, base, t)), None)
        if twin is not None:
            expert.full[name] = twins[twin]
        else:
            expert.lacks.append(name)
