"""The one tree of errors: each message names what was got, what was expected, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "BadInputError",
    "BadSuitesError",
    "CheckpointError",
    "NumericsError",
    "ParamsError",
    "PoemergeError",
    "Problem",
    "ProjectError",
    "RegistryError",
    "ServerError",
    "SourceError",
    "StageError",
    "SuiteError",
]


class PoemergeError(Exception):
    """Base of every error that poemerge raises on purpose; the CLI prints its message without a traceback."""

    exit_status = 1


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input, in the words of the person who can mend it.

    Arguments: `where` (a params key, a file or a command-line flag), `expert` and `tensor` it concerns where there is
    one, what was `got`, what was `expected`, and the `next_step`.
    """

    where: str
    got: str
    expected: str
    next_step: str
    expert: str | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        lines = [self.where]
        if self.expert is not None:
            lines.append(f"  expert:   {self.expert}")
        if self.tensor is not None:
            lines.append(f"  tensor:   {self.tensor}")
        lines += [f"  got:      {self.got}", f"  expected: {self.expected}", f"  next:     {self.next_step}"]
        return "\n".join(lines)


class BadInputError(PoemergeError):
    """The input is wrong and no work was started: all problems found are listed at once. Exit status 2."""

    exit_status = 2

    def __init__(self, problems: Sequence[Problem] | Problem) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' * (count != 1)}:\n\n" + "\n\n".join(str(p) for p in self.problems))

    def __reduce__(self) -> tuple[type[BadInputError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class ParamsError(BadInputError):
    """params.yaml (or the command line that stands for it) does not say what it must."""


class CheckpointError(BadInputError):
    """A checkpoint file or a set of checkpoints cannot be read or does not fit together."""


class SourceError(PoemergeError):
    """An expert could not be fetched from where params.yaml says it lives."""


class NumericsError(PoemergeError):
    """The tensors given to the solver are not ones it can work with (non-finite, shapes that differ)."""


class StageError(PoemergeError):
    """A stage of the pipeline ended with an error of its own."""


class SuiteError(PoemergeError):
    """An evaluation suite cannot be loaded or scored; `problem` where it is one setting that is wrong."""

    def __init__(self, said: str | Problem) -> None:
        self.problem = said if isinstance(said, Problem) else None
        super().__init__(str(said))


class BadSuitesError(SuiteError):
    """The settings or the data of suites are wrong, and nothing was scored: all problems found are listed at once."""

    exit_status = 2


class RegistryError(PoemergeError):
    """The model registry refused, or does not hold what was asked of it."""


class ServerError(PoemergeError):
    """A Prefect or MLflow server does not start or does not answer."""


class ProjectError(PoemergeError):
    """There is no project here, or it is not in a state that the command can work with."""

    exit_status = 2
