"""How heavy the tails of the residuals are: entries of R_i at reference merges, fits of every family, the selection."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from poemerge.errors import NumericsError
from poemerge.numerics.families import FAMILIES, robust_scale

__all__ = [
    "USABLE",
    "FamilyFit",
    "Gain",
    "Selection",
    "TailFit",
    "fit_tail",
    "log_histogram",
    "residual_entries",
    "select",
    "standardised",
]

USABLE = ("gaussian", "student_t", "cauchy")
"""The families whose energy is concave in r², so the merge can use them; Laplace and Weibull are for the diagnosis."""

GAIN_LIMIT = 10.0
"""Nats that one entry may say for or against a family. A single far entry refutes a Gaussian; unbounded, it would swell
the gain's standard error past the gain, and so speak for the Gaussian."""

STANDARD_ERRORS = 1.5
"""A family with more parameters is taken when its held-out gain is more than this many standard errors."""


@dataclass(frozen=True)
class FamilyFit:
    """One family fitted to one set of entries: parameters from all entries, in units of the standardised |R|.

    `log_likelihood` is the mean over all entries and `held_out` the mean over entries that the fit had not seen, both
    in nats an entry; `bic` is k·log n − 2·n·log_likelihood; `ks` the Kolmogorov–Smirnov distance of |R|.
    """

    parameters: dict[str, float]
    log_likelihood: float
    held_out: float
    bic: float
    ks: float


@dataclass(frozen=True)
class Gain:
    """Held-out log-likelihood of one family over another in nats an entry (each bounded), and its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class TailFit:
    """Every family on one set of entries; `gains[a][b]` is the gain of family a over family b."""

    entries: int
    origins: int
    fits: dict[str, FamilyFit]
    gains: dict[str, dict[str, Gain]]


@dataclass(frozen=True)
class Selection:
    """The family taken, its parameters, and why, in a sentence."""

    family: str
    parameters: dict[str, float]
    reason: str


def residual_entries(
    deltas: Float[Tensor, "expert out in"],
    references: Float[Tensor, "reference out in"],
    *,
    side: str,
    count: int,
    generator: torch.Generator,
) -> Float[Tensor, "reference expert entry"]:
    """A random sample of the entries of each expert's residual R_i at each reference merge Θ.

    R_i is A_iᵀ(Θ − A_i) on the output side, (Θ − A_i)A_iᵀ on the input side, and Âᵢᵀ(Θ − A_i)Âᵢᵀ with Âᵢ = A_i/‖A_i‖ on
    both. R_i is never formed whole: a grid of random rows and columns with about four times `count` cells is computed
    and `count` of its cells drawn, the same for all experts and references.

    Arguments:
        deltas: task vectors of one matrix, float32 or better.
        references: merged deltas at which the residual is taken.
        side: "output", "input" or "both".
        count: entries to draw from each residual; all of them when it has fewer.
        generator: source of the sample (CPU).

    Raises NumericsError for an unknown side or for tensors that are not finite.
    """
    if not (bool(deltas.isfinite().all()) and bool(references.isfinite().all())):
        raise NumericsError(
            "Residuals of tensors that are not finite.\n  got:      NaN or Inf\n  expected: finite task vectors\n"
            "  next:     look at the expert's checkpoint"
        )
    _, out, width = deltas.shape
    shapes = {"output": (width, width), "input": (out, out), "both": (width, out)}
    if side not in shapes:
        raise NumericsError(
            f"Unknown side.\n  got:      {side!r}\n  expected: output, input or both\n  next:     mend it"
        )
    rows, columns = (_grid_lines(size, count, generator) for size in shapes[side])
    cells = rows.numel() * columns.numel()
    drawn = torch.randperm(cells, generator=generator)[: min(count, cells)]
    sample = deltas.new_empty(references.shape[0], deltas.shape[0], drawn.numel())
    for i, delta in enumerate(deltas):
        norm = torch.linalg.vector_norm(delta)
        for j, reference in enumerate(references):
            difference = reference - delta
            if side == "output":
                residual = delta[:, rows].T @ difference[:, columns]
            elif side == "input":
                residual = difference[rows] @ delta[columns].T
            else:
                unit = delta / norm if norm > 0 else delta
                residual = (unit[:, rows].T @ difference) @ unit[columns].T
            sample[j, i] = residual.flatten()[drawn]
    return sample


def _grid_lines(size: int, count: int, generator: torch.Generator) -> Tensor:
    wanted = 2 * math.isqrt(count) + 1
    return torch.randperm(size, generator=generator)[: min(size, wanted)].sort().values


def standardised(entries: Float[Tensor, " entry"]) -> tuple[Float[Tensor, " magnitude"], float]:
    """|R| of the entries that are not zero, over their median, and that median.

    Exact zeros come from rows or columns that a task vector never touched (tokens that a task does not have); they say
    nothing of the tail, and a density with an atom at zero has no maximum-likelihood scale. A residual of zeros alone
    gives no magnitudes and the scale 0.
    """
    magnitudes = entries.double().abs()
    magnitudes = magnitudes[magnitudes > 0]
    if magnitudes.numel() == 0:
        return magnitudes, 0.0
    scale = robust_scale(magnitudes)
    return magnitudes / scale, scale


def fit_tail(
    magnitudes: Float[Tensor, " entry"], *, origins: Int[Tensor, " entry"] | None = None, seed: int = 0
) -> TailFit:
    """Every family of `FAMILIES` fitted by maximum likelihood, with held-out likelihoods by two-fold cross-fitting.

    The entries are split at random into halves; each half is scored by the fit to the other, so every entry is held out
    once. Standard errors of gains are clustered by origin, since entries of one residual share rows, columns and scale.

    Arguments:
        magnitudes: |R| > 0, standardised per residual, float64.
        origins: which residual each entry comes from; without it, entries count as independent.
        seed: of the split.

    Raises NumericsError under 100 entries or when a magnitude is zero or not finite.
    """
    count = magnitudes.numel()
    if count < 100:
        raise NumericsError(
            f"Too few residual entries to fit a density.\n  got:      {count}\n  expected: at least 100\n"
            "  next:     raise tail.entries_per_matrix, or leave this group out"
        )
    if not bool(magnitudes.isfinite().all()) or not bool((magnitudes > 0).all()):
        raise NumericsError(
            "Residual magnitudes must be positive and finite.\n  got:      zero, NaN or Inf\n"
            "  expected: what `standardised` returns\n  next:     standardise the entries first"
        )
    magnitudes = magnitudes.double()
    scale = robust_scale(magnitudes)
    x = magnitudes / scale
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    halves = (order[: count // 2], order[count // 2 :])
    ordered = x.sort().values.numpy()
    fits: dict[str, FamilyFit] = {}
    held_out: dict[str, Tensor] = {}
    for name, family in FAMILIES.items():
        parameters = family.fit(x)
        unseen = torch.empty_like(x)
        for mine, other in (halves, halves[::-1]):
            unseen[mine] = family.log_density(x[mine], family.fit(x[other]))
        log_likelihood = float(family.log_density(x, parameters).mean()) - math.log(scale)
        fits[name] = FamilyFit(
            parameters=parameters | {"scale": parameters["scale"] * scale},
            log_likelihood=log_likelihood,
            held_out=float(unseen.mean()) - math.log(scale),
            bic=len(family.parameters) * math.log(count) - 2 * count * log_likelihood,
            ks=_kolmogorov_smirnov(family.distribution(ordered, parameters)),
        )
        held_out[name] = unseen
    gains = {a: {b: _gain(held_out[a] - held_out[b], origins) for b in FAMILIES if b != a} for a in FAMILIES}
    kinds = count if origins is None else int(torch.bincount(origins).count_nonzero())
    return TailFit(entries=count, origins=kinds, fits=fits, gains=gains)


def _kolmogorov_smirnov(fitted: np.ndarray) -> float:
    """Largest distance of the empirical distribution from the fitted one, both at the ordered entries."""
    steps = np.arange(fitted.size + 1) / fitted.size
    return float(max(np.max(steps[1:] - fitted), np.max(fitted - steps[:-1])))


def _gain(per_entry: Tensor, origins: Tensor | None) -> Gain:
    bounded = per_entry.clamp(-GAIN_LIMIT, GAIN_LIMIT)
    mean = bounded.mean()
    spread = bounded - mean
    if origins is not None:
        spread = torch.bincount(origins, weights=spread)
    return Gain(mean=float(mean), standard_error=float(spread.square().sum().sqrt()) / per_entry.numel())


def select(fit: TailFit, among: Sequence[str] = tuple(FAMILIES)) -> Selection:
    """The family of `among` with the best held-out likelihood, unless a simpler one is as good within the noise.

    As good: the best one's held-out gain over it is at most `STANDARD_ERRORS` standard errors. Of several as good, the
    one with the fewest parameters is taken, then one that the merge can use, then the highest likelihood; so samples of
    a Cauchy are called Cauchy and not Student-t with ν = 1.02, and samples of a Student-t with ν = 30 Gaussian until
    there are enough to tell.
    """
    best = max(among, key=lambda name: fit.fits[name].held_out)

    def as_good(name: str) -> bool:
        gain = fit.gains[best][name]
        return gain.mean <= STANDARD_ERRORS * gain.standard_error

    def preference(name: str) -> tuple[int, bool]:
        return len(FAMILIES[name].parameters), name not in USABLE

    simpler = [name for name in among if preference(name) < preference(best) and as_good(name)]
    taken = min(simpler, key=lambda name: (preference(name), -fit.fits[name].held_out), default=best)
    others = [name for name in among if name != taken]
    if taken != best:
        gain = fit.gains[best][taken]
        why = "has fewer parameters" if preference(taken)[0] < preference(best)[0] else "is one that the merge can use"
        reason = (
            f"{best} is ahead by {gain.mean:.2g} ± {gain.standard_error:.2g} nats an entry held out: within the noise, "
            f"and {taken} {why}"
        )
    elif others:
        second = max(others, key=lambda name: fit.fits[name].held_out)
        gain = fit.gains[best][second]
        reason = (
            f"best held-out log-likelihood of {len(among)} families on {fit.entries:,} entries; next is {second}, "
            f"{gain.mean:.2g} ± {gain.standard_error:.2g} nats an entry behind"
        )
    else:
        reason = "the only family asked for"
    return Selection(family=taken, parameters=fit.fits[taken].parameters, reason=reason)


def log_histogram(magnitudes: Float[Tensor, " entry"], bins: int = 60) -> tuple[list[float], list[float]]:
    """Density of R in bins evenly spaced in log |R|, from the 1 % quantile to the largest magnitude.

    Returns the bins' geometric centres and the densities, of R and not of |R| (halved, as the families' are); empty
    bins are left out.
    """
    values = magnitudes.double().numpy()
    low, high = float(np.quantile(values, 0.01)), float(values.max())
    edges = np.geomspace(low, high * (1 + 1e-9), bins + 1)
    counts, _ = np.histogram(values, edges)
    density = counts / (2 * values.size * np.diff(edges))
    centres = np.sqrt(edges[1:] * edges[:-1])
    filled = counts > 0
    return centres[filled].tolist(), density[filled].tolist()
