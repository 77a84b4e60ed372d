"""Families of densities for residual entries: maximum-likelihood fits, log densities and distribution functions.

Every family is a density of R that is symmetric about zero, written as a function of |R|, so likelihoods compare. The
location is fixed at zero and not fitted: the merge's energies ρ(r²) know no other centre, and a residual's sign is a
convention of the task vector's singular vectors. Weibull, a density of |R|, is halved onto both signs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special
from torch import Tensor

from poemerge.errors import NumericsError

__all__ = ["FAMILIES", "TAIL_INDEX_BOUNDS", "Family", "fit_student_t", "robust_scale"]

TAIL_INDEX_BOUNDS = (0.1, 200.0)
"""Below, moments of every useful order are gone; above, no sample that we take can tell the fit from a Gaussian."""

Parameters = Mapping[str, float]


@dataclass(frozen=True)
class Family:
    """A symmetric density of R with location zero: its parameters' names and three functions of |R|.

    `fit` takes |R| (float64, positive, standardised) and returns the maximum-likelihood parameters; `log_density` gives
    log p(R) in nats for each |R|; `distribution` gives P(|R| ≤ x).
    """

    name: str
    parameters: tuple[str, ...]
    fit: Callable[[Tensor], dict[str, float]]
    log_density: Callable[[Tensor, Parameters], Tensor]
    distribution: Callable[[np.ndarray, Parameters], np.ndarray]


def robust_scale(magnitudes: Float[Tensor, " entry"]) -> float:
    """Median of |R|, half the width of the central half of a symmetric density: defined however heavy the tails."""
    return float(magnitudes.median())


# Gaussian: log p = −log s − ½ log 2π − R²/(2s²), ML s² = mean R².
def _fit_gaussian(magnitudes: Tensor) -> dict[str, float]:
    return {"scale": math.sqrt(float(magnitudes.square().mean()))}


def _log_gaussian(magnitudes: Tensor, parameters: Parameters) -> Tensor:
    s = parameters["scale"]
    return -0.5 * (magnitudes / s).square() - (math.log(s) + 0.5 * math.log(2 * math.pi))


def _cdf_gaussian(magnitudes: np.ndarray, parameters: Parameters) -> np.ndarray:
    return np.asarray(special.erf(magnitudes / (parameters["scale"] * math.sqrt(2))))


# Laplace: log p = −log 2s − |R|/s, ML s = mean |R|.
def _fit_laplace(magnitudes: Tensor) -> dict[str, float]:
    return {"scale": float(magnitudes.mean())}


def _log_laplace(magnitudes: Tensor, parameters: Parameters) -> Tensor:
    s = parameters["scale"]
    return magnitudes / -s - math.log(2 * s)


def _cdf_laplace(magnitudes: np.ndarray, parameters: Parameters) -> np.ndarray:
    return -np.expm1(-magnitudes / parameters["scale"])


# Student-t: log p = log Γ((ν+1)/2) − log Γ(ν/2) − ½ log πν − log s − (ν+1)/2 · log(1 + R²/(νs²)).
@dataclass(frozen=True)
class _StudentPoint:
    """Mean log-likelihood at (log s, log ν), its gradient there and its Hessian, all from one pass over the entries."""

    log_likelihood: float
    gradient: tuple[float, float]
    hessian: tuple[float, float, float]


def _student_point(squares: Tensor, log_scale: float, log_tail_index: float) -> _StudentPoint:
    nu = math.exp(log_tail_index)
    ratio = squares * math.exp(-2 * log_scale - log_tail_index)  # R²/(νs²)
    log_term = float(ratio.log1p().mean())
    share = ratio / (1 + ratio)  # 1 − the weight that EM gives the entry
    u, uu = float(share.mean()), float(share.square().mean())
    gap = float(special.digamma((nu + 1) / 2) - special.digamma(nu / 2))
    gap_slope = 0.5 * float(special.polygamma(1, (nu + 1) / 2) - special.polygamma(1, nu / 2))
    spread = (nu + 1) * (u - uu)
    constant = float(special.gammaln((nu + 1) / 2) - special.gammaln(nu / 2)) - 0.5 * math.log(math.pi * nu)
    return _StudentPoint(
        log_likelihood=constant - log_scale - 0.5 * (nu + 1) * log_term,
        gradient=((nu + 1) * u - 1, 0.5 * nu * (gap - log_term) - 0.5 + 0.5 * (nu + 1) * u),
        hessian=(
            -2 * spread,
            nu * u - spread,
            0.5 * nu * (gap - log_term) + 0.5 * nu * nu * gap_slope + nu * u - 0.5 * spread,
        ),
    )


def _student_step(point: _StudentPoint, log_tail_index: float, *, fixed: bool) -> tuple[float, float]:
    """Newton's step where the likelihood is concave, else Fisher's scoring step; at most one e-fold a coordinate."""
    (g_s, g_nu), (h_ss, h_snu, h_nunu) = point.gradient, point.hessian
    nu = math.exp(log_tail_index)
    bound = math.log(TAIL_INDEX_BOUNDS[1]) if g_nu > 0 else math.log(TAIL_INDEX_BOUNDS[0])
    if fixed or log_tail_index == bound:  # ν is given, or stands at its bound and wants beyond: the scale alone moves
        curvature = -h_ss if h_ss < 0 else 2 * nu / (nu + 3)
        return max(-1.0, min(1.0, g_s / curvature)), 0.0
    a, b, c = -h_ss, -h_snu, -h_nunu
    if a <= 0 or a * c - b * b <= 1e-12 * a * abs(c):
        # Expected information of (log s, log ν): Lange, Little & Taylor, JASA 84 (1989), appendix B.
        a, b = 2 * nu / (nu + 3), -2 * nu / ((nu + 1) * (nu + 3))
        trigammas = float(special.polygamma(1, nu / 2) - special.polygamma(1, (nu + 1) / 2))
        c = nu * nu * (0.25 * trigammas - (nu + 5) / (2 * nu * (nu + 1) * (nu + 3)))
    determinant = a * c - b * b
    step_s, step_nu = (c * g_s - b * g_nu) / determinant, (a * g_nu - b * g_s) / determinant
    shrink = min(1.0, 1.0 / max(abs(step_s), abs(step_nu), 1e-300))
    return step_s * shrink, step_nu * shrink


def fit_student_t(
    magnitudes: Float[Tensor, " entry"], *, tail_index: float | None = None, max_steps: int = 200, rtol: float = 1e-7
) -> dict[str, float]:
    """Maximum-likelihood scale s and tail index ν of a Student-t with location zero.

    A safeguarded Newton iteration on (log s, log ν): the likelihood never falls, and each step is one pass over the
    entries. With `tail_index` given, the scale alone is fitted (ν = 1 is Cauchy).

    Arguments:
        magnitudes: |R| > 0, float64; best standardised, so that the start is near.
        tail_index: ν, when it is known.
        max_steps: bound on the passes over the entries.
        rtol: stops when neither parameter moves by more than this share.

    Returns:
        {"scale": s, "tail_index": ν}, ν within `TAIL_INDEX_BOUNDS`; without "tail_index" when that was given.
    """
    low, high = (math.log(bound) for bound in TAIL_INDEX_BOUNDS)
    squares = magnitudes.square()
    log_nu = math.log(4.0 if tail_index is None else tail_index)
    log_scale = math.log(robust_scale(magnitudes) / float(special.stdtrit(math.exp(log_nu), 0.75)))
    point = _student_point(squares, log_scale, log_nu)
    halvings = 0
    step = _student_step(point, log_nu, fixed=tail_index is not None)
    for _ in range(max_steps):
        if max(abs(step[0]), abs(step[1])) <= rtol:
            break
        next_nu = log_nu if tail_index is not None else max(low, min(high, log_nu + step[1]))
        following = _student_point(squares, log_scale + step[0], next_nu)
        # Rounding in the mean of the logarithms must not pass for a fall.
        if following.log_likelihood >= point.log_likelihood - 1e-14 * (1 + abs(point.log_likelihood)) or halvings > 40:
            log_scale, log_nu, point, halvings = log_scale + step[0], next_nu, following, 0
            step = _student_step(point, log_nu, fixed=tail_index is not None)
        else:
            step, halvings = (step[0] / 2, step[1] / 2), halvings + 1
    fitted = {"scale": math.exp(log_scale)}
    return fitted if tail_index is not None else fitted | {"tail_index": math.exp(log_nu)}


def _log_student_t(magnitudes: Tensor, parameters: Parameters) -> Tensor:
    s, nu = parameters["scale"], parameters.get("tail_index", 1.0)
    constant = float(special.gammaln((nu + 1) / 2) - special.gammaln(nu / 2)) - 0.5 * math.log(math.pi * nu)
    return (magnitudes / (s * math.sqrt(nu))).square().log1p() * (-0.5 * (nu + 1)) + (constant - math.log(s))


def _cdf_student_t(magnitudes: np.ndarray, parameters: Parameters) -> np.ndarray:
    return np.asarray(2 * special.stdtr(parameters["tail_index"], magnitudes / parameters["scale"]) - 1)


# Cauchy: Student-t with ν = 1.
def _fit_cauchy(magnitudes: Tensor) -> dict[str, float]:
    return fit_student_t(magnitudes, tail_index=1.0)


def _cdf_cauchy(magnitudes: np.ndarray, parameters: Parameters) -> np.ndarray:
    return np.arctan(magnitudes / parameters["scale"]) * (2 / math.pi)


# Weibull on |R|, halved: log p = log k − log 2s + (k−1) log(|R|/s) − (|R|/s)^k; k = 1 is Laplace.
def _fit_weibull(magnitudes: Tensor, max_steps: int = 100, rtol: float = 1e-8) -> dict[str, float]:
    """The shape k is the root of E[xᵏ log x]/E[xᵏ] − E[log x] − 1/k, which rises with k; then sᵏ = E[xᵏ]."""
    logs = magnitudes.log()
    centre = float(logs.mean())
    centred = logs - centre
    spread = float(centred.std())
    if not spread > 0:
        raise NumericsError(
            "Residual entries all have one magnitude.\n  got:      a point mass\n  expected: a spread of magnitudes\n"
            "  next:     check that the task vectors are not constant"
        )
    log_shape = math.log(math.pi / math.sqrt(6) / spread)  # from the variance of log x
    power_mean = 1.0
    for _ in range(max_steps):
        shape = math.exp(log_shape)
        powers = (centred * shape).exp()
        power_mean = float(powers.mean())
        tilted = float((powers * centred).mean()) / power_mean
        variance = float((powers * centred.square()).mean()) / power_mean - tilted * tilted
        value, slope = tilted - 1 / shape, variance + 1 / shape**2
        step = max(-1.0, min(1.0, -value / (slope * shape)))
        log_shape += step
        if abs(step) <= rtol:
            break
    shape = math.exp(log_shape)
    power_mean = float((centred * shape).exp().mean())
    return {"scale": math.exp(centre + math.log(power_mean) / shape), "shape": shape}


def _log_weibull(magnitudes: Tensor, parameters: Parameters) -> Tensor:
    s, k = parameters["scale"], parameters["shape"]
    logs = (magnitudes / s).log()
    return (k - 1) * logs - (k * logs).exp() + (math.log(k) - math.log(2 * s))


def _cdf_weibull(magnitudes: np.ndarray, parameters: Parameters) -> np.ndarray:
    return -np.expm1(-((magnitudes / parameters["scale"]) ** parameters["shape"]))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("gaussian", ("scale",), _fit_gaussian, _log_gaussian, _cdf_gaussian),
        Family("laplace", ("scale",), _fit_laplace, _log_laplace, _cdf_laplace),
        Family("student_t", ("scale", "tail_index"), fit_student_t, _log_student_t, _cdf_student_t),
        Family("cauchy", ("scale",), _fit_cauchy, _log_student_t, _cdf_cauchy),
        Family("weibull", ("scale", "shape"), _fit_weibull, _log_weibull, _cdf_weibull),
    )
}
"""The families that the tail fit compares, by name."""
