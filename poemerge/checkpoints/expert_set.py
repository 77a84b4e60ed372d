"""A base and its experts as one set: checked together, every parameter classified, deltas read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from poemerge.checkpoints.adapter import Adapter, dense, factored, is_adapter
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
from poemerge.checkpoints.names import Rule, match_names, rule_of, selected
from poemerge.checkpoints.remote import as_path
from poemerge.checkpoints.safetensors_file import FLOATS
from poemerge.checkpoints.vocabulary import vocabulary_problems
from poemerge.errors import CheckpointError, Problem

__all__ = ["Expert", "ExpertSet", "Loaded"]


class Expert:
    """One task model beside its base: which of its tensors stand for which of the base's, and which are its own.

    `full`: base name → its own name for a tensor stored whole; `lora`: base name → its own name for a factored delta;
    `private`: its own names of the parameters that the base lacks or has in another shape; `lacks`: base names of
    weights that a full model does not hold (they stay at the base as far as this expert is concerned).
    """

    def __init__(self, name: str, path: Path, source: Checkpoint | Adapter, head: Checkpoint | None) -> None:
        self.name = name
        self.path = path
        self.source = source
        self.full: dict[str, str] = {}
        self.lora: dict[str, str] = {}
        self.private: list[str] = []
        self.lacks: list[str] = []
        self._head = head

    @property
    def kind(self) -> str:
        """`adapter` or `full`."""
        return "adapter" if isinstance(self.source, Adapter) else "full"

    @property
    def weights(self) -> Checkpoint:
        """The checkpoint that its weights or factors lie in."""
        return self.source.checkpoint if isinstance(self.source, Adapter) else self.source

    def stored(self, own: str) -> str:
        """The name in its file of the whole tensor that it calls `own`."""
        return self.source.full[own] if isinstance(self.source, Adapter) else own

    def read_own(self, own: str, rows: slice | None = None, pin: bool = False) -> Tensor:
        """The whole tensor that it calls `own`, in its stored dtype; `own` may be private."""
        if self._head is not None and own in self._head:
            return self._head.read(own, rows, pin)
        return self.weights.read(self.stored(own), rows, pin)

    def rank(self, name: str) -> int:
        """Rank of its factors for the base's weight `name`; 0 where it has none."""
        own = self.lora.get(name)
        return self.source.rank(own) if own is not None and isinstance(self.source, Adapter) else 0

    def factor_bytes(self, name: str) -> int:
        """Stored size of its factors for the base's weight `name`, in bytes."""
        own = self.lora.get(name)
        if own is None or not isinstance(self.source, Adapter):
            return 0
        module = self.source.modules[own]
        return self.source.checkpoint.total_bytes([module.a, module.b])

    def private_names(self) -> list[str]:
        """Names of its private parameters, head.safetensors included."""
        return [*self.private, *(self._head.names() if self._head is not None else ())]

    def shadowed(self) -> list[str]:
        """Its own names of weights to be merged that head.safetensors has too."""
        own = [*self.full.values(), *self.lora.values()]
        return [name for name in own if self._head is not None and name in self._head]

    def read_private(self) -> dict[str, Tensor]:
        """Its private parameters by name, in their stored dtype."""
        return {own: self.read_own(own) for own in self.private_names()}

    def close(self) -> None:
        """Give the file descriptors back."""
        self.source.close()
        if self._head is not None:
            self._head.close()


@dataclass
class Loaded:
    """One parameter as the files have it: `base` and `whole` in their stored dtypes, `factors` (B, A, scaling).

    An expert in both has a whole tensor and factors on top of it; one in neither leaves the parameter as it is.
    """

    name: str
    experts: list[str]
    base: Tensor
    whole: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor, float]]

    def rows(self, rows: slice) -> Loaded:
        """The same of some rows, without a copy."""
        return Loaded(
            self.name,
            self.experts,
            self.base[rows],
            {expert: own[rows] for expert, own in self.whole.items()},
            {expert: (b[rows], a, scaling) for expert, (b, a, scaling) in self.factors.items()},
        )

    def delta(self, expert: str) -> Tensor:
        """One expert minus base, float32, in memory of its own."""
        return self._put(expert, self.base.to(torch.float32), torch.empty_like(self.base, dtype=torch.float32))

    def deltas(self) -> Tensor:
        """Expert minus base, float32 `[expert, *shape]`; the experts' own tensors are let go one by one."""
        base = self.base.to(torch.float32)
        out = torch.empty((len(self.experts), *base.shape), dtype=torch.float32, device=base.device)
        for i, expert in enumerate(self.experts):
            self._put(expert, base, out[i])
            self.whole.pop(expert, None)
        return out

    def _put(self, expert: str, base: Tensor, out: Tensor) -> Tensor:
        out.copy_(self.whole[expert]).sub_(base) if expert in self.whole else out.zero_()
        if expert in self.factors:
            out += dense(*self.factors[expert])
        return out


class ExpertSet:
    """The base, its experts in order of name, and what is to become of every parameter of the base.

    Deltas are expert minus base in float32, `[expert, *shape]`, in the order of `touching(name)`.
    """

    def __init__(self, base: Checkpoint, experts: dict[str, Expert], rules: dict[str, Rule]) -> None:
        self.base = base
        self.experts = experts
        self.rules = rules
        self.config = model_config(base.path if base.path.is_dir() else base.path.parent)

    @staticmethod
    def open(
        base: Path,
        experts: Mapping[str, Path],
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> ExpertSet:
        """The set of the base folder and the experts' folders by name; parameters outside `include`, or in `exclude`,
        stay at the base.

        Headers are read; of the tensors only a few rows, to see that each expert comes from this base.
        Raises CheckpointError with every problem of every checkpoint.
        """
        problems: list[Problem] = []
        base_checkpoint: Checkpoint | None = None
        try:
            base = as_path(base)
            if is_adapter(base):
                raise CheckpointError(
                    Problem(str(base), "a LoRA adapter", "a full model as the base", "name the model it was trained on")
                )
            base_checkpoint = Checkpoint.open(base)
            if not len(base_checkpoint):
                raise CheckpointError(Problem(str(base), "no tensors", "the base's weights", "fetch the base again"))
        except CheckpointError as error:
            problems += error.problems
        opened: dict[str, Expert] = {}
        for name, path in sorted(experts.items()):
            try:
                opened[name] = _open_expert(name, as_path(path))
            except CheckpointError as error:
                problems += error.problems
        if not experts:
            problems.append(Problem("experts", "none", "at least one expert", "name one with NAME=FOLDER"))
        if base_checkpoint is not None:
            rules: dict[str, Rule] = {
                name: rule_of(name, base_checkpoint.shape(name), base_checkpoint.dtype(name))
                if selected(name, include, exclude)
                else "base"
                for name in base_checkpoint.names()
            }
            for expert in opened.values():
                problems += _meet(base_checkpoint, expert, rules)
        if problems or base_checkpoint is None:
            raise CheckpointError(problems)
        return ExpertSet(base_checkpoint, opened, rules)

    def names(self) -> list[str]:
        """Names of the base's parameters, in the order in which they lie in its files."""
        return self.base.names()

    def rule(self, name: str) -> Rule:
        """What becomes of the parameter `name`: `base` when it is excluded or no expert holds it."""
        return self.rules[name] if self.touching(name) else "base"

    def touching(self, name: str) -> list[str]:
        """The experts that hold a value or a delta for `name`, in order of name."""
        if self.rules[name] == "base":
            return []
        return [expert.name for expert in self.experts.values() if name in expert.full or name in expert.lora]

    def transposed(self, name: str) -> bool:
        """Whether `name` is stored as [in, out] (GPT-2's Conv1D) and not as [out, in]."""
        return transposed_layout(name, self.config)

    def is_factored(self, name: str) -> bool:
        """Whether every expert that touches `name` has it as LoRA factors alone."""
        touching = self.touching(name)
        return bool(touching) and not any(name in self.experts[expert].full for expert in touching)

    def factors(self, name: str) -> list[tuple[Tensor, Tensor, float]]:
        """(B, A, scaling) of every expert in `touching(name)`, in the layout in which the base stores the weight.

        Raises ValueError where an expert has the weight whole (`is_factored` tells).
        """
        if not self.is_factored(name):
            raise ValueError(f"{name} is not factored in every expert")
        return [self._factors(self.experts[expert], name) for expert in self.touching(name)]

    def moved(self, name: str) -> list[bool]:
        """For every expert in `touching(name)`, whether its delta is more than the rounding to the dtype that it is
        stored in; a whole tensor is read up to its first difference from the base's."""
        found = []
        for one in (self.experts[expert] for expert in self.touching(name)):
            whole = one.full.get(name)
            differs = whole is not None and not unmoved(self.base, name, one.weights, one.stored(whole))
            found.append(differs or (name in one.lora and all(bool(f.any()) for f in self._factors(one, name)[:2])))
        return found

    def load(self, name: str, rows: slice | None = None, pin: bool = False) -> Loaded:
        """What the files hold for one parameter (or some rows of it), not yet converted or subtracted;
        `pin` reads it into page-locked memory."""
        touching = self.touching(name)
        return Loaded(
            name,
            touching,
            self.base.read(name, rows, pin),
            {
                one: self.experts[one].read_own(own, rows, pin)
                for one in touching
                if (own := self.experts[one].full.get(name))
            },
            {one: self._rows_of_factors(one, name, rows) for one in touching if name in self.experts[one].lora},
        )

    def delta(self, expert: str, name: str, rows: slice | None = None) -> Tensor:
        """Expert minus base of one parameter, float32; zero where the expert does not touch it."""
        one = self.experts[expert]
        whole = {expert: one.read_own(one.full[name], rows)} if name in one.full else {}
        factors = {expert: self._rows_of_factors(expert, name, rows)} if name in one.lora else {}
        return Loaded(name, [expert], self.base.read(name, rows), whole, factors).deltas()[0]

    def deltas(self, name: str, rows: slice | None = None) -> Tensor:
        """Deltas of every expert in `touching(name)`: float32 `[expert, *shape]`."""
        return self.load(name, rows).deltas()

    def close(self) -> None:
        """Give the file descriptors back."""
        self.base.close()
        for expert in self.experts.values():
            expert.close()

    def _rows_of_factors(self, expert: str, name: str, rows: slice | None) -> tuple[Tensor, Tensor, float]:
        b, a, scaling = self._factors(self.experts[expert], name)
        return (b if rows is None else b[rows]), a, scaling

    def _factors(self, expert: Expert, name: str) -> tuple[Tensor, Tensor, float]:
        assert isinstance(expert.source, Adapter)
        own = expert.lora[name]
        b, a, scaling = expert.source.factors(own)
        return *factored(b, a, _is_transposed(expert.source, own, self.base.shape(name), name, self.config)), scaling


def _open_expert(name: str, path: Path) -> Expert:
    if path.is_dir() and is_adapter(path):
        adapter = Adapter.open(path, name)
        return Expert(name, path, adapter, adapter.head)
    checkpoint = Checkpoint.open(path, name)
    if not len(checkpoint):
        raise CheckpointError(
            Problem(
                str(path), "no tensors", "the weights of a fine-tuned model", "fetch or save the expert again", name
            )
        )
    head = Checkpoint.open(path / HEAD, name) if path.is_dir() and (path / HEAD).is_file() else None
    return Expert(name, path, checkpoint, head)


def _is_transposed(adapter: Adapter, own: str, shape: tuple[int, ...], name: str, config: Mapping[str, object]) -> bool:
    """Whether the delta of the module `own` is (B A)ᵀ in the base's layout: embeddings and Conv1D layers."""
    module = adapter.modules[own]
    if module.transposed is not None:
        return module.transposed
    natural = (adapter.checkpoint.shape(module.b)[0], adapter.checkpoint.shape(module.a)[1])
    if natural[0] != natural[1]:
        return natural != tuple(shape)
    # A square weight does not tell, nor does fan_in_fan_out: PEFT corrects that one flag for each module in turn and
    # saves what the last one needed.
    return transposed_layout(name, config)


def _meet(base: Checkpoint, expert: Expert, rules: Mapping[str, Rule]) -> Iterator[Problem]:
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
    yield from _shadow_problems(expert)


def _shadow_problems(expert: Expert) -> Iterator[Problem]:
    """Tensors of head.safetensors with the names of weights that are merged: one of the two would be read for both."""
    shadowed = expert.shadowed()
    if shadowed:
        yield Problem(
            str(expert.path / HEAD),
            f"{len(shadowed)} of the expert's weights that are merged, a second time",
            "names that none of these has",
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
