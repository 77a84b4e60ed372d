"""The adapters of one matrix taken together: what a solve within their joint subspaces starts from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.errors import NumericsError
from poemerge.numerics.dual import Grams, own_blocks
from poemerge.numerics.solution import Basis, Factored

__all__ = ["Adapter", "Adapters", "Combined", "LowRank", "not_finite"]

Adapter = tuple[Tensor, Tensor, float | int]

# Directions of the adapters' joint span whose squared length is below this part of the largest are rounding.
_RANK_PRECISION = 1e-12
# A Cholesky factor of unit columns with a smaller pivot than this has lost too many digits to be a basis.
_LEAST_PIVOT = 1e-4
# From this pivot on, factors keep the digits of their dtype when they are made orthonormal in it.
_FLOAT32_PIVOT = 0.05
# Up to this many times as long as an adapter's own, the terms of a sum keep the digits of its factors' dtype.
_FLOAT32_TERMS = 16.0


def not_finite(index: int, count: int, what: str, wrong: int) -> NumericsError:
    """The error for `wrong` entries of expert `index`, of `count`, that are NaN or infinite."""
    return NumericsError(
        f"expert {index} of {count}: its {what} has {wrong} NaN or infinite entr{'y' if wrong == 1 else 'ies'}, "
        "expected finite numbers. Next: check that checkpoint, or leave the expert out."
    )


@dataclass(frozen=True)
class LowRank:
    """Task vectors A_i = a_i P_iQ_iᵀ for a batch of problems, P_i and Q_i of unit Frobenius norm (or zero)."""

    left: Float[Tensor, "batch expert k r"]
    right: Float[Tensor, "batch expert l r"]
    sizes: Float[Tensor, "batch expert"]
    """a_i ≥ 0, float64."""

    @property
    def dtype(self) -> torch.dtype:
        """What the factors are kept in."""
        return self.left.dtype

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, chunk: slice | list[int]) -> "LowRank":
        return LowRank(self.left[chunk], self.right[chunk], self.sizes[chunk])

    def over(self, unit: Float[Tensor, " batch"]) -> "LowRank":
        """Every member's task vectors divided by its unit."""
        return LowRank(self.left, self.right, self.sizes / unit.unsqueeze(-1))

    def double(self) -> "LowRank":
        """The same in float64."""
        return LowRank(self.left.double(), self.right.double(), self.sizes)

    def float(self) -> "LowRank":
        """The same in float32."""
        return LowRank(self.left.float(), self.right.float(), self.sizes)

    def dense(self) -> Float[Tensor, "batch expert k l"]:
        """The task vectors as matrices."""
        return (self.left * self.sizes.to(self.dtype)[..., None, None]) @ self.right.mT


class Span:
    """The joint column space of every expert's factor of one side, from the stack's Gram matrix in float64."""

    def __init__(self, stack: Float[Tensor, "flat side stacked"], experts: int) -> None:
        self.stack = stack
        wide = stack.double()
        # The factors of adapters are tall and few: half a Gram matrix costs a fifth less than a whole one.
        width, half = stack.shape[-1], stack.shape[-1] // 2
        self.gram = wide.new_empty(len(stack), width, width)
        self.gram[..., :half] = wide.mT @ wide[..., :half]
        self.gram[..., half:, half:] = wide[..., half:].mT @ wide[..., half:]
        self.gram[..., :half, half:] = self.gram[..., half:, :half].mT
        self.experts = experts

    def finite(self) -> bool:
        """Whether no factor has a NaN or infinite entry (nor one whose square is)."""
        return bool(self.gram.diagonal(dim1=-2, dim2=-1).sum().isfinite())

    def blocks(self) -> Float[Tensor, "flat expert r r"]:
        """Every expert's own Gram matrix."""
        return own_blocks(self.gram, self.experts)

    @cached_property
    def basis(self) -> tuple[Basis, Float[Tensor, "flat expert k r"]]:
        """An orthonormal basis Q, and float64 F_i for which Q·F_i are the factors."""
        tiny = torch.finfo(torch.float64).tiny
        # Columns of unit length first: factors of very different size keep their digits.
        size = self.gram.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)
        safe = size.clamp_min(tiny)
        products = self.gram / safe / safe.mT
        factor, info = torch.linalg.cholesky_ex(products)
        least_pivot = float(factor.diagonal(dim1=-2, dim2=-1).amin())
        rows, columns = self.stack.shape[-2:]
        if columns <= rows and least_pivot > _LEAST_PIVOT and not bool(info.any()):
            identity = torch.eye(columns, dtype=torch.float64, device=size.device).expand_as(factor)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False).mT / safe.mT
            inside = factor.mT * size
            well_conditioned = least_pivot >= _FLOAT32_PIVOT
        else:
            # Factors that share directions: those that are rounding are left out.
            values, vectors = torch.linalg.eigh(products)
            least = _RANK_PRECISION * values[:, -1:].clamp_min(tiny)
            kept = max(1, min(rows, int((values > least).sum(-1).max())))
            roots = values[:, None, -kept:].clamp_min(least.unsqueeze(1)).sqrt()
            vectors = vectors[..., -kept:]
            inverse, inside, well_conditioned = vectors / roots / safe.mT, (roots * vectors).mT * size, False
        basis = Basis(self.stack, inverse, well_conditioned)
        return basis, inside.reshape(*inside.shape[:-1], self.experts, -1).transpose(1, 2)


class Adapters:
    """One adapter an expert, (B `[*batch, out, r]`, A `[*batch, r, in]`, scaling) for the delta scaling·B A.

    Ranks may differ. Raises NumericsError, naming the expert, for factors that are not finite or do not fit together.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        _check_shapes(adapters)
        self.count = len(adapters)
        self.batch = tuple(adapters[0][0].shape[:-2])
        self.size = (adapters[0][0].shape[-2], adapters[0][1].shape[-1])
        float64 = any(factor.dtype == torch.float64 for b, a, _ in adapters for factor in (b, a))
        self.dtype = torch.float64 if float64 else torch.float32
        self.scaling = torch.tensor([float(one[2]) for one in adapters], dtype=torch.float64)
        self.scaling = self.scaling.to(adapters[0][0].device)
        # Both stacks lie in memory factor by factor, as products with their transposes are fastest.
        self.left = Span(self._stack([b.mT for b, _, _ in adapters]).mT, self.count)
        self.right = Span(self._stack([a for _, a, _ in adapters]).mT, self.count)
        if not (self.left.finite() and self.right.finite() and bool(self.scaling.isfinite().all())):
            _name_not_finite(adapters)

    def _stack(self, factors: Sequence[Tensor]) -> Tensor:
        """Rows of all, each expert's filled up to the largest rank."""
        largest = max(factor.shape[-2] for factor in factors)
        padded = []
        for factor in factors:
            missing = largest - factor.shape[-2]
            flat = factor.to(self.dtype).reshape(-1, *factor.shape[-2:])
            padded.append(torch.nn.functional.pad(flat, (0, 0, 0, missing)) if missing else flat)
        return torch.cat(padded, -2)

    @cached_property
    def stacked_scaling(self) -> Float[Tensor, " stacked"]:
        """Of every column of the stacks, its adapter's scaling."""
        return self.scaling.repeat_interleave(self.left.stack.shape[-1] // self.count)

    def grams(self) -> Grams:
        """The inner products of all columns of the scaled B, and of all rows of the A."""
        scaling = self.stacked_scaling
        return Grams(self.left.gram * scaling * scaling.unsqueeze(-1), self.right.gram, self.count)

    def norm_sq(self) -> Float[Tensor, "flat expert"]:
        """‖A_i‖²_F, float64."""
        overlap = (self.left.blocks() * self.right.blocks()).sum((-2, -1))
        return self.scaling.square() * overlap.clamp_min(0)

    def within(self) -> tuple[Basis, LowRank, Basis]:
        """Orthonormal bases Q and V of both sides, and the float64 task vectors X_i with A_i = Q X_i Vᵀ."""
        left, lefts = self.left.basis
        right, rights = self.right.basis
        tiny = torch.finfo(torch.float64).tiny
        own, across = (torch.linalg.vector_norm(one, dim=(-2, -1), keepdim=True) for one in (lefts, rights))
        lefts = lefts / own.clamp_min(tiny) * self.scaling.sign()[:, None, None]
        sizes = (own * across).flatten(1) * self.scaling.abs()
        return left, LowRank(lefts, rights / across.clamp_min(tiny), sizes), right


class Combined(Factored):
    """Θ = Σ_ij s_iB_i W_ij A_j of one member of a batch; orthonormal bases are made when they are asked for."""

    def __init__(self, adapters: Adapters, index: int, weights: Float[Tensor, "stacked stacked"]) -> None:
        """`weights` W, float64."""
        self._adapters, self._index = adapters, index
        self._weights = adapters.stacked_scaling.unsqueeze(-1) * weights

    @cached_property
    def _bases(self) -> tuple[Basis, Tensor, Basis]:
        left, right = self._adapters.left, self._adapters.right
        (basis, inside), (other, across) = left.basis, right.basis
        own, its = (one[self._index].transpose(0, 1).flatten(1) for one in (inside, across))
        return basis[self._index], (own @ self._weights @ its.mT).to(self.dtype), other[self._index]

    @property
    def Q(self) -> Float[Tensor, "out k"]:  # noqa: N802
        """Orthonormal basis of the columns."""
        return self._bases[0].columns

    @property
    def X(self) -> Float[Tensor, "k l"]:  # noqa: N802
        """Θ between the two bases."""
        return self._bases[1]

    @property
    def V(self) -> Float[Tensor, "in l"]:  # noqa: N802
        """Orthonormal basis of the rows."""
        return self._bases[2].columns

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense matrix."""
        return torch.Size(self._adapters.size)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the factors."""
        return self._adapters.dtype

    def pair(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "in k"]]:
        """Two thin matrices L and R with Θ = L Rᵀ."""
        left, right = self._adapters.left, self._adapters.right
        stack, other = left.stack[self._index], right.stack[self._index]
        lengths, widths = (one.gram[self._index].diagonal().sqrt() for one in (left, right))
        terms = self._weights.abs() * lengths.unsqueeze(-1) * widths
        own = (self._adapters.stacked_scaling.abs() * lengths * widths).amax()
        if bool(terms.amax() > _FLOAT32_TERMS * own):
            return self.Q @ self.X, self.V
        return stack @ self._weights.to(self.dtype), other


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise NumericsError("deltas: got no adapters, expected at least one (B, A, scaling). Next: give the experts.")
    first_b, first_a = adapters[0][0], adapters[0][1]
    for index, (b, a, _) in enumerate(adapters):
        same_rank = min(b.ndim, a.ndim) >= 2 and b.shape[-1] == a.shape[-2] and b.shape[:-2] == a.shape[:-2]
        same_size = (*b.shape[:-1], a.shape[-1]) == (*first_b.shape[:-1], first_a.shape[-1])
        if not (same_rank and same_size and b.is_floating_point() and a.is_floating_point()):
            raise NumericsError(
                f"expert {index} of {len(adapters)}: got B {list(b.shape)} and A {list(a.shape)}, expected "
                "B [*batch, out, r] and A [*batch, r, in] in floating point that fit together and give "
                f"{[*first_b.shape[:-1], first_a.shape[-1]]}, as expert 0 does. Next: pass one matrix's adapters."
            )


def _name_not_finite(adapters: Sequence[Adapter]) -> None:
    for index, (b, a, scaling) in enumerate(adapters):
        for name, factor in (("B", b), ("A", a)):
            wrong = int((~factor.isfinite()).sum())
            if wrong:
                raise not_finite(index, len(adapters), f"factor {name}", wrong)
        if not math.isfinite(scaling):
            raise not_finite(index, len(adapters), "scaling", 1)
    raise NumericsError(
        f"the factors of {len(adapters)} adapters: got entries whose squares overflow float64, expected entries below "
        "1e150. Next: scale the adapters down."
    )
