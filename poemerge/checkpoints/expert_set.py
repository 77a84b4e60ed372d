"""A base and its experts as one set: checked together, every parameter classified, deltas read one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from poemerge.checkpoints.adapter import Adapter, dense, factored, is_adapter
from poemerge.checkpoints.checkpoint import Checkpoint, model_config
from poemerge.checkpoints.compatibility import transposed_layout, unmoved
from poemerge.checkpoints.expert import Expert, open_expert
from poemerge.checkpoints.meeting import meet
from poemerge.checkpoints.names import Rule, rule_of, selected
from poemerge.checkpoints.remote import as_path
from poemerge.errors import CheckpointError, Problem

__all__ = ["ExpertSet", "Loaded"]


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
                opened[name] = open_expert(name, as_path(path))
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
                problems += meet(base_checkpoint, expert, rules)
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
