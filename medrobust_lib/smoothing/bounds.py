"""What counts of noisy votes prove: confidence bounds, certified radii, and how many draws they take.

Everywhere alpha is the one-sided probability of a false statement, k of n the votes for one class, and
a radius an L2 distance in [0, 1] pixel units at the model's input size, or a shift of the parameter that is smoothed.
sigma is the standard deviation of the smoothing law.

The law is normal, or exponential on [0, inf) for a parameter theta that only grows; its mean is sigma too. Shifted by
theta >= 0 the exponential density is e^(theta / sigma) times the old one on [theta, inf) and 0 below, so that
P_theta(A) >= 1 - e^(theta / sigma) (1 - p_A) and P_theta(B) <= e^(theta / sigma) p_B for every other class B: A stays
ahead while theta < -sigma log(1 - p_A + p_B) (Li et al. 2021, TSS, arXiv:2002.12398).
"""

import math
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, ROUND_UP, Context
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom, norm

from medrobust_lib.checks import check_choice

Law = Literal["normal", "exponential"]
Bounds = Literal["one", "two"]

# The defaults of every certificate: the failure probability, the draws that choose a class, the draws that count.
ALPHA, N0, N = 0.001, 100, 10_000
FEW_N0, FEW_N = 20, 100  # where a draw is a generated answer, or a person waits for the picture
LARGEST_SIGMA = 10.0  # no image survives this; 0 to 255 units begin here


class Proof(NamedTuple):
    """What a look at the votes proves.

    Attributes
    ----------
    proved : int
        Number of radii proved by now; 0 is an abstention.
    finished : bool
        Whether drawing on is pointless.
    radius : float
        Largest proved radius.
    p_lower : float
        Probability that is proved to be exceeded; 0 where nothing is known.
    p_upper : float
        Probability that every other class is proved to stay below; 1 where nothing is known.
    """

    proved: int
    finished: bool
    radius: float = 0.0
    p_lower: float = 0.0
    p_upper: float = 1.0


@dataclass(frozen=True)
class FixedPlan:
    """One look after n draws: CERTIFY of Cohen et al. 2019, or two Clopper-Pearson bounds at alpha / 2 each.

    The second bound is the largest of all other classes' bounds: it fails only if that of the class that is truly
    second does, so alpha is not divided by the number of classes (intersection-union).

    Raises
    ------
    ValueError
        sigma, alpha or law out of range, n too small to ever certify.
    """

    sigma: float
    n: int
    alpha: float
    law: Law = "normal"
    bounds: Bounds = "one"

    def __post_init__(self) -> None:
        check_sigma(self.sigma, law=self.law)
        check_alpha(self.alpha)
        check_draws(self.n, self.alpha)

    @property
    def looks(self) -> tuple[int]:
        """Numbers of draws after which the votes are looked at."""
        return (self.n,)

    @property
    def largest_radius(self) -> float:
        """Largest radius that can come out, by either rule."""
        return maximum_radius(self.n, self.alpha, self.sigma, law=self.law)

    def step(self, look: int, k: int, proved: int = 0, rival: int = 0) -> Proof:
        """Take the only look, at k votes of n; rival is the largest count of another class."""
        n = self.looks[look]
        if self.bounds == "one":
            p_lower = lower_confidence_bound(k, n, self.alpha)
            radius = certified_radius(p_lower, self.sigma, law=self.law)
            return Proof(int(p_lower > 0.5), True, radius, p_lower, 1 - p_lower)
        p_lower = lower_confidence_bound(k, n, self.alpha / 2)
        p_upper = min(upper_confidence_bound(rival, n, self.alpha / 2), 1 - p_lower)
        radius = certified_radius(p_lower, self.sigma, p_upper=p_upper, law=self.law)
        return Proof(int(p_lower > p_upper), True, radius, p_lower, p_upper)

    def chosen(self, k: int, rival: int, draws: int) -> Self:
        """Take the rule that would prove more if all draws had the shares of the selection draws; ties: one bound.

        Parameters
        ----------
        k, rival : int
            Votes for the tested class, and for its strongest rival.
        draws : int
            Selection draws. They are independent of those that count, so the choice costs nothing.
        """
        k, rival = expected_counts(k, rival, draws, self.n)
        two = replace(self, bounds="two")
        one_proof, two_proof = self.step(0, k), two.step(0, k, 0, rival)
        # Where neither proves a radius, the wider gap is nearer to one.
        gain = two_proof.radius - one_proof.radius or (
            two_proof.p_lower - two_proof.p_upper - one_proof.p_lower + one_proof.p_upper
        )
        return two if gain > 0 else self


def lower_confidence_bound(k: ArrayLike, n: ArrayLike, alpha: float) -> float | NDArray[np.float64]:
    """One-sided Clopper-Pearson lower bound of a probability.

    Parameters
    ----------
    k, n : int or array of int
        Successes and trials, 0 <= k <= n, n >= 1; arrays broadcast.
    alpha : float in (0, 1)
        Largest probability with which the bound exceeds the true value.

    Returns
    -------
    float or float64 array in [0, 1)

    Raises
    ------
    ValueError
        Counts or alpha out of range.

    References
    ----------
    Clopper and Pearson 1934; ``LowerConfBound`` of Cohen et al. 2019, arXiv:1902.02918, section 3.2.2.
    """
    k, n = _checked_counts(k, n)
    check_alpha(alpha)
    # At k = 0 the beta distribution degenerates; the bound is 0 there.
    bound = np.where(k > 0, beta.ppf(alpha, np.maximum(k, 1), n - k + 1), 0.0)
    return float(bound) if bound.ndim == 0 else bound


def upper_confidence_bound(k: ArrayLike, n: ArrayLike, alpha: float) -> float | NDArray[np.float64]:
    """One-sided Clopper-Pearson upper bound of a probability.

    Parameters
    ----------
    k, n, alpha
        As in `lower_confidence_bound`.

    Returns
    -------
    float or float64 array in (0, 1]
    """
    k, n = _checked_counts(k, n)
    bound = 1.0 - np.asarray(lower_confidence_bound(n - k, n, alpha))
    return float(bound) if bound.ndim == 0 else bound


def certified_radius(
    p_lower: ArrayLike, sigma: float, *, p_upper: ArrayLike | None = None, law: Law = "normal"
) -> float | NDArray[np.float64]:
    """Radius within which the smoothed classifier cannot change its answer.

    sigma / 2 (Phi^-1(p_lower) - Phi^-1(p_upper)) for normal, -sigma log(1 - p_lower + p_upper) for exponential
    smoothing; where p_lower does not exceed p_upper nothing is proved and the radius is 0.

    Parameters
    ----------
    p_lower : float or array in [0, 1]
        Lower bound of the probability that the base classifier gives the predicted class under noise.
    sigma : float
        Standard deviation of the smoothing law, > 0.
    p_upper : float or array in [0, 1], optional
        Upper bound of the probability of every other class; None stands for 1 - p_lower.
    law : {"normal", "exponential"}
        Exponential smoothing proves shifts theta with 0 <= theta < radius only.

    Returns
    -------
    float or float64 array, >= 0
        In the units of sigma; infinite only for p_lower = 1 or, normal smoothing, p_upper = 0.

    Raises
    ------
    ValueError
        A probability outside [0, 1], sigma not positive, or an unknown law.

    References
    ----------
    Cohen et al. 2019, arXiv:1902.02918, Theorem 1; exponential smoothing: Li et al. 2021, arXiv:2002.12398.
    """
    p_lower = checked_probabilities(p_lower, "p_lower")
    check_sigma(sigma, law=law)
    rival = 1 - p_lower if p_upper is None else checked_probabilities(p_upper, "p_upper")
    with np.errstate(invalid="ignore", divide="ignore"):  # infinite quantiles, where nothing or everything is proved
        if law == "exponential":
            radius = -sigma * np.log(1 - p_lower + rival)
        elif p_upper is None:
            radius = sigma * norm.ppf(p_lower)
        else:
            radius = sigma / 2 * (norm.ppf(p_lower) - norm.ppf(rival))
    radius = np.where(p_lower > rival, radius, 0.0)
    return float(radius) if radius.ndim == 0 else radius


def needed_probability(radius: ArrayLike, sigma: float, *, law: Law = "normal") -> float | NDArray[np.float64]:
    """Probability that must be exceeded for a radius by one bound: the inverse of `certified_radius`.

    Phi(radius / sigma) for normal, 1 - exp(-radius / sigma) / 2 for exponential smoothing.
    """
    check_sigma(sigma, law=law)
    radius = np.asarray(radius, dtype=np.float64)
    if not np.all((radius >= 0) & np.isfinite(radius)):
        raise ValueError(f"radius={radius}: certified radii are finite and >= 0")
    level = radius / sigma
    probability = norm.cdf(level) if law == "normal" else 1 - np.exp(-level) / 2
    return float(probability) if probability.ndim == 0 else probability


def minimum_count(
    n: ArrayLike, alpha: float, *, radius: float = 0.0, sigma: float = 1.0, law: Law = "normal"
) -> int | NDArray[np.int64]:
    """Fewest votes of n that certify a radius; with radius 0 the fewest that do not abstain.

    Parameters
    ----------
    n : int or array of int
        Draws.
    alpha : float in (0, 1)
    radius, sigma : float
        Wanted radius and noise level, in the same units.
    law : {"normal", "exponential"}

    Returns
    -------
    int or int64 array
        n + 1 where not even n of n suffice.

    Raises
    ------
    ValueError
        n not an integer >= 1, or alpha, radius or sigma out of range.

    Examples
    --------
    >>> minimum_count(100, 0.001)
    66
    """
    _, n = _checked_counts(0, n)
    check_alpha(alpha)
    # The bound reaches p exactly if k or more successes have probability at most alpha at p.
    count = binom.isf(alpha, n, needed_probability(radius, sigma, law=law)).astype(np.int64) + 1
    return int(count) if count.ndim == 0 else count


def minimum_draws(alpha: float, *, radius: float = 0.0, sigma: float = 1.0, law: Law = "normal") -> int:
    """Fewest draws with which a radius can be certified at all, all of them being successes.

    Parameters
    ----------
    alpha : float in (0, 1)
    radius, sigma : float
    law : {"normal", "exponential"}

    Returns
    -------
    int
        10 for alpha = 0.001 and radius 0: nine unanimous votes still leave one half possible.

    Raises
    ------
    ValueError
        radius is so many sigma that the needed probability cannot be told from 1.
    """
    check_alpha(alpha)
    if needed_probability(radius, sigma, law=law) >= 1:
        raise ValueError(
            f"radius {radius} at sigma {sigma} needs probability 1: no number of draws proves it; "
            "take a larger sigma or a smaller radius"
        )
    # From the logarithm, which keeps its digits where the probability itself is rounded to nearly 1.
    level, allowed = radius / sigma, math.log(alpha)
    needed = float(norm.logcdf(level)) if law == "normal" else math.log1p(-math.exp(-level) / 2)
    draws = math.ceil(allowed / needed)
    return draws if draws * needed <= allowed else draws + 1


def maximum_radius(n: int, alpha: float, sigma: float, *, law: Law = "normal") -> float:
    """Largest radius n draws can certify: all of them agree. 3.1986 sigma at n = 10,000, alpha = 0.001."""
    return certified_radius(lower_confidence_bound(n, n, alpha), sigma, law=law)


def expected_radius(p: ArrayLike, n: int, alpha: float, *, sigma: float = 1.0) -> float | NDArray[np.float64]:
    """Mean certified radius of n fixed draws, exactly: abstentions count as radius 0.

    Parameters
    ----------
    p : float or array of float in [0, 1]
        True probability of the predicted class under noise.
    n : int
    alpha : float in (0, 1)
    sigma : float

    Returns
    -------
    float or float64 array, in the units of sigma
    """
    p = checked_probabilities(p)
    first = minimum_count(n, alpha)
    k = np.arange(first, n + 1)
    if not len(k):
        return 0.0 if p.ndim == 0 else np.zeros_like(p)
    radius = certified_radius(lower_confidence_bound(k, n, alpha), sigma)
    mean = np.array([binom.pmf(k, n, value) @ radius for value in p.ravel()]).reshape(p.shape)
    return float(mean) if mean.ndim == 0 else mean


def probability_of_radius(p: ArrayLike, n: ArrayLike, alpha: float, *, radius: float, sigma: float) -> ArrayLike:
    """Probability that n fixed draws certify at least a radius when the true probability is p."""
    return binom.sf(np.asarray(minimum_count(n, alpha, radius=radius, sigma=sigma)) - 1, n, checked_probabilities(p))


def radius_ratio_rule(n: ArrayLike, alpha: float) -> float | NDArray[np.float64]:
    """Share of the ideal radius that n draws keep on average, by the published rule of thumb.

    The rule 1 - 1.64 z / sqrt(n), z the one-sided normal quantile of alpha, stands for one distribution of
    probabilities; its constant is 2.02 for uniform ones on [0.5, 1]. `expected_radius` is exact for any.

    References
    ----------
    Seferis et al. 2025, arXiv:2509.16088.
    """
    check_alpha(alpha)
    ratio = np.maximum(0.0, 1 - 1.64 * norm.isf(alpha) / np.sqrt(np.asarray(n, dtype=np.float64)))
    return float(ratio) if ratio.ndim == 0 else ratio


def ratio_constant(p: ArrayLike) -> float:
    """Constant C of the rule 1 - C z / sqrt(n) for given true probabilities; the published rule has 1.64.

    Parameters
    ----------
    p : array of float in (0.5, 1)
        True probabilities of the predicted class, a sample from their distribution or a grid with equal weights.

    Returns
    -------
    float
        To first order in 1 / sqrt(n), the share of the ideal radius that is lost times sqrt(n) / z.

    Raises
    ------
    ValueError
        A probability outside (0.5, 1).
    """
    p = np.atleast_1d(np.asarray(p, dtype=np.float64))
    if not np.all((p > 0.5) & (p < 1)):
        raise ValueError(f"p={p}: probabilities to plan for lie in (0.5, 1); at 0.5 there is no radius to keep")
    quantile = norm.ppf(p)
    return float(np.mean(np.sqrt(p * (1 - p)) / norm.pdf(quantile)) / np.mean(quantile))


def check_alpha(alpha: float) -> None:
    """Refuse a failure probability outside (0, 1)."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}: the failure probability of a certificate lies in (0, 1), usually {ALPHA}")


def check_sigma(sigma: float, *, law: Law = "normal") -> None:
    """Refuse a level that smooths nothing, for the normal law one in other units, and an unknown law."""
    check_choice("law", law, get_args(Law))
    if not 0 < sigma < math.inf:
        raise ValueError(
            f"sigma={sigma}: smoothing needs noise, a standard deviation > 0 in [0, 1] pixel units such as 0.25"
        )
    if sigma > LARGEST_SIGMA and law == "normal":
        raise ValueError(
            f"sigma={sigma}: noise levels are in [0, 1] pixel units; divide a level in 0 to 255 units by 255 "
            f"({sigma / 255:.4g}); a parameter of your own takes units in which sigma is at most {LARGEST_SIGMA:g}"
        )


def checked_probabilities(p: ArrayLike, name: str = "p") -> NDArray[np.float64]:
    """Bring probabilities to float64, or refuse those outside [0, 1]."""
    p = np.asarray(p, dtype=np.float64)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"{name}={p}: a probability lies in [0, 1]")
    return p


def check_draws(n: int, alpha: float) -> None:
    """Refuse a number of draws that can never certify anything.

    Raises
    ------
    ValueError
        For example n = 9 at alpha = 0.001: nine of nine give the bound 0.464.
    """
    fewest = minimum_draws(alpha)
    if n < fewest:
        best = lower_confidence_bound(n, n, alpha) if n >= 1 else 0.0
        raise ValueError(
            f"n={n} draws can never certify at alpha={alpha}: even {n} of {n} give p_lower={best:.3f} <= 0.5; "
            f"use n >= {fewest}"
        )


def rounded_down(bound: float) -> str:
    """Four digits that do not promise more than the bound: 0.99996 is not 1."""
    return str(Context(prec=4, rounding=ROUND_DOWN).create_decimal(repr(float(bound))))


def rounded_up(bound: float) -> str:
    """Four digits that are not below the bound."""
    return str(Context(prec=4, rounding=ROUND_UP).create_decimal(repr(float(bound))))


def expected_counts(k: int, rival: int, draws: int, n: int) -> tuple[int, int]:
    """Bring two counts of so many draws to n draws, rounded against the first: those of two classes still sum to n."""
    return k * n // draws, -(-rival * n // draws)


def _checked_counts(k: ArrayLike, n: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    k, n = np.asarray(k), np.asarray(n)
    for name, value in (("k", k), ("n", n)):
        if not np.issubdtype(value.dtype, np.integer):
            raise ValueError(f"{name}={value}: counts are integers, not {value.dtype}")
    if np.any(k < 0) or np.any(k > n) or np.any(n < 1):
        raise ValueError(f"k={k} of n={n}: counts need 0 <= k <= n and n >= 1")
    return k.astype(np.int64), n.astype(np.int64)
