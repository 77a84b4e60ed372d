"""What some of the experts make of a merge: their own answers, kept, beside those of the merged weights as they stand.

The energies are those of poemerge.merging.refinement.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from poemerge.checkpoints import ExpertSet
from poemerge.errors import PoemergeError
from poemerge.merging.predictor import Answer, Predictor, divergence, in_one_line
from poemerge.merging.stream import single_threaded

__all__ = ["CHECKS", "INPUTS", "TOKENS", "NetworkError", "Panel"]

INPUTS = 16
TOKENS = 16
"""Inputs of an expert in a step, and tokens of a text: so few random words do not yet add up to the same each time."""

CHECKS = 8
"""Batches of inputs that judge the outcome and are not used on the way."""

_READING = 0.1
"""β: nats that a squared distance of 1 between two readings is worth; those of our own heads are unit vectors."""


class NetworkError(Exception):
    """A network failed while it was asked: transformers or torch could not do with it what measuring did not need."""


@contextmanager
def _asking() -> Iterator[None]:
    """One torch thread, and NetworkError for whatever a network raises."""
    with single_threaded():
        try:
            yield
        except PoemergeError:
            raise
        except Exception as error:
            raise NetworkError(in_one_line(error)) from error


class Panel:
    """Some of the experts, asked: what each said as itself, and its network, which now holds the merged weights.

    `parameters` share the memory of the merged `weights` and have gradients of their own.
    """

    def __init__(self, experts: ExpertSet, names: Sequence[str], weights: Mapping[str, Tensor], steps: int) -> None:
        self.parameters = {name: torch.nn.Parameter(value, requires_grad=False) for name, value in weights.items()}
        self._predictors: dict[str, Predictor] = {}
        self._said: dict[str, list[Answer]] = {}
        with _asking(), torch.no_grad():
            for name in names:
                predictor = self._predictors[name] = Predictor(experts, name, features=steps > 0)
                asked = islice(self._inputs(name), CHECKS + steps)
                self._said[name] = [predictor.answer(inputs) for inputs in asked]
                predictor.adopt(self.parameters)
        self._asked = {name: islice(self._inputs(name), CHECKS, None) for name in names}

    def _inputs(self, name: str) -> Iterator[dict[str, Tensor]]:
        """The same for the same expert whenever they are drawn."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        while True:
            yield self._predictors[name].inputs.draw(INPUTS, TOKENS, generator)

    def judge(self) -> dict[str, float]:
        """The divergence from every expert on the inputs that are used for nothing else."""
        with _asking(), torch.no_grad():
            return {
                name: sum(
                    float(_divergence(one, self._predictors[name].answer(inputs)))
                    for inputs, one in zip(islice(self._inputs(name), CHECKS), said, strict=False)
                )
                / CHECKS
                for name, said in self._said.items()
            }

    def gradients(self, number: int) -> dict[str, Tensor]:
        """Of the sum of its experts' energies on the inputs of step `number`, by parameter."""
        with _asking():
            for name, asked in self._asked.items():
                energy = _energy(self._said[name][CHECKS + number], self._predictors[name].answer(next(asked)))
                torch.autograd.backward(energy)
        found = {name: one.grad for name, one in self.parameters.items() if one.grad is not None}
        for name in found:
            self.parameters[name].grad = None
        return found


def _divergence(expert: Answer, merged: Answer) -> Tensor:
    """KL(p_i ‖ p_Θ) of what a head says, or of the features where no head is asked; the mean over the inputs."""
    if expert.logits is None or merged.logits is None:
        return _of_features(expert, merged)
    return divergence(expert.logits, merged.logits)


def _of_features(expert: Answer, merged: Answer) -> Tensor:
    """½‖V(h_i − h_Θ)‖², the mean over inputs and tokens."""
    assert expert.features is not None
    assert merged.features is not None
    return 0.5 * (merged.features - expert.features).square().sum(-1).mean()


def _energy(expert: Answer, merged: Answer) -> Tensor:
    """E_i: the divergence of what the head says, and beside it that of the features, and β of what the head reads."""
    energy = _divergence(expert, merged)
    if expert.logits is not None and expert.features is not None:
        energy = energy + _of_features(expert, merged)
    if expert.reading is not None and merged.reading is not None:
        energy = energy + _READING * (merged.reading - expert.reading).square().sum(-1).mean()
    return energy
