"""What a solve returns: the merged delta, what happened on the way, and the Laplace posterior on request."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from poemerge.numerics.posterior import Posterior

__all__ = ["Basis", "Factored", "Outcome", "Solution", "join"]


@dataclass(frozen=True)
class Outcome:
    """How a solve ended: `code`, what happened and why in one sentence, and what to try (empty when all is well)."""

    code: str
    message: str
    next_step: str = ""
    ok: bool = True
    severity: int = 0

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()


CLOSED_FORM = Outcome("closed-form", "The weights are constant: one linear solve gave the mode.")
CONVERGED = Outcome("converged", "The weights stopped changing within rtol.", severity=1)
ROUNDING = Outcome(
    "rounding",
    "The energy stopped falling before the weights settled within rtol: the precision of the dtype is used up.",
    "Give float64 deltas or a larger rtol if more digits matter.",
    severity=2,
)
STEP_LIMIT = Outcome(
    "step-limit",
    "max_steps was reached before the weights settled within rtol; the energy fell at every step.",
    "Raise max_steps, or raise scale_factor: a small one makes a stiff problem.",
    severity=3,
)
EMPTY = Outcome("empty", "Every expert's delta is zero here, so the merged delta is zero.", severity=1)
FAILED = Outcome(
    "failed",
    "The linear system could not be solved, in float64 either (singular or not finite); theta is the plain mean.",
    "Raise prior_precision: the deltas leave directions that nothing determines.",
    ok=False,
    severity=4,
)


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns S·T that span a stack S of factors, multiplied out when somebody asks for them.

    `well_conditioned`: S·T keeps the digits of S's dtype when it is multiplied out in it.
    """

    stack: Float[Tensor, "*batch side stacked"]
    transform: Float[Tensor, "*batch stacked k"]
    """T, float64."""
    well_conditioned: bool

    @cached_property
    def columns(self) -> Float[Tensor, "*batch side k"]:
        """S·T, in the dtype of S."""
        columns: Tensor
        if self.well_conditioned:
            columns = self.stack @ self.transform.to(self.stack.dtype)
        else:
            columns = (self.stack.double() @ self.transform).to(self.stack.dtype)
        return columns

    def __getitem__(self, index: int) -> "Basis":
        return Basis(self.stack[index], self.transform[index], self.well_conditioned)


class Factored:
    """A low-rank matrix Θ = Q X Vᵀ, with orthonormal columns in Q `[*batch, out, k]` and V `[*batch, in, l]`."""

    def __init__(self, Q: Tensor | Basis, X: Float[Tensor, "*batch k l"], V: Tensor | Basis) -> None:
        self._left, self._middle, self._right = Q, X, V

    @property
    def Q(self) -> Float[Tensor, "*batch out k"]:  # noqa: N802
        """Orthonormal basis of the columns."""
        return self._left.columns if isinstance(self._left, Basis) else self._left

    @property
    def X(self) -> Float[Tensor, "*batch k l"]:  # noqa: N802
        """Θ between the two bases."""
        return self._middle

    @property
    def V(self) -> Float[Tensor, "*batch in l"]:  # noqa: N802
        """Orthonormal basis of the rows."""
        return self._right.columns if isinstance(self._right, Basis) else self._right

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense matrix."""
        left, right = (one.stack if isinstance(one, Basis) else one for one in (self._left, self._right))
        return torch.Size((*left.shape[:-1], right.shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the factors."""
        return self.X.dtype

    def between(self, middle: Float[Tensor, "*batch k l"]) -> "Factored":
        """`middle` between the same two bases."""
        return Factored(self._left, middle, self._right)

    def pair(self) -> tuple[Float[Tensor, "*batch out k"], Float[Tensor, "*batch in k"]]:
        """Two thin matrices L and R with Θ = L Rᵀ, by as few products as there may be."""
        one, other = self._left, self._right
        if isinstance(one, Basis) and isinstance(other, Basis) and one.well_conditioned and other.well_conditioned:
            middle = one.transform @ self.X.double() @ other.transform.mT
            return one.stack @ middle.to(self.dtype), other.stack
        return self.Q @ self.X, self.V

    def dense(self) -> Float[Tensor, "*batch out in"]:
        """Q X Vᵀ."""
        left, right = self.pair()
        return left @ right.mT

    def __getitem__(self, index: int) -> "Factored":
        return Factored(self._left[index], self.X[index], self._right[index])


@dataclass(frozen=True)
class Solution:
    """The mode of a product of experts.

    - `theta`: the merged delta, a tensor `[*batch, out, in]` for dense deltas and a `Factored` for factored ones
      (`dense()` gives the matrix of either).
    - `outcome`: how the solve ended; for a batch, the worst of its outcomes (`unbind` gives each).
    - `steps`: linear solves used; for a batch the most that any member used.
    - `energy`: E after each accepted step, from the start on, float64 `[step, *batch]` (members that ended earlier
      repeat their last value).
    - `weights`: MM weights w_i at theta in the units of the given deltas, float64 `[*batch, expert]`; 0 for an expert
      whose delta is zero.
    - `prior_precision`: the λ that was used, float64 `[*batch]`.

    With row blocks these two are per block: `[*batch, block, expert]` and `[*batch, block]`.
    """

    theta: Tensor | Factored
    outcome: Outcome
    steps: int
    energy: Float[Tensor, "step *batch"]
    weights: Float[Tensor, "*problem expert"]
    prior_precision: Float[Tensor, "*problem"]
    members: "tuple[Solution, ...]" = field(default=(), repr=False)
    make_posterior: "Callable[[], Posterior] | None" = field(default=None, repr=False, compare=False)

    def dense(self) -> Float[Tensor, "*batch out in"]:
        """theta as one matrix, whichever form the deltas came in."""
        return self.theta.dense() if isinstance(self.theta, Factored) else self.theta

    def unbind(self) -> "tuple[Solution, ...]":
        """The solutions of a batch one by one, in order; a single solution gives itself."""
        return self.members or (self,)

    @property
    def posterior(self) -> "Posterior":
        """The Laplace approximation of exp(−E) at theta, of a single solution (use `unbind` on a batch)."""
        if self.make_posterior is None:
            raise ValueError(
                "a batch, or a matrix solved in row blocks, has no posterior of its own; take a member's: "
                "solution.unbind()[i].posterior, and no row_blocks"
            )
        return self.make_posterior()


def join(solutions: "list[Solution]", batch: tuple[int, ...], *, single: bool = False) -> Solution:
    """One solution for a batch of the given shape; `single` says that the batch is no batch at all."""
    if single:
        return solutions[0]

    def unflatten(stack: Tensor) -> Tensor:
        return stack.reshape(*batch, *stack.shape[1:])

    thetas = [solution.theta for solution in solutions]
    theta: Tensor | Factored
    if isinstance(thetas[0], Factored):
        factors = [t for t in thetas if isinstance(t, Factored)]
        stacked = Factored(*(torch.stack([getattr(f, name) for f in factors]) for name in ("Q", "X", "V")))
        members = [replace(s, theta=stacked[i]) for i, s in enumerate(solutions)]
        theta = Factored(*(unflatten(f) for f in (stacked.Q, stacked.X, stacked.V)))
    else:
        dense = torch.stack([t for t in thetas if isinstance(t, Tensor)])
        members = [replace(s, theta=dense[i]) for i, s in enumerate(solutions)]
        theta = unflatten(dense)
    length = max(len(s.energy) for s in solutions)
    energy = torch.stack([torch.cat([s.energy, s.energy[-1:].expand(length - len(s.energy))]) for s in solutions], 1)
    return Solution(
        theta=theta,
        outcome=max((s.outcome for s in solutions), key=lambda outcome: outcome.severity),
        steps=max(s.steps for s in solutions),
        energy=energy.reshape(length, *batch),
        weights=unflatten(torch.stack([s.weights for s in solutions])),
        prior_precision=unflatten(torch.stack([s.prior_precision for s in solutions])),
        members=tuple(members),
    )
