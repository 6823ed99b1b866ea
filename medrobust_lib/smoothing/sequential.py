r"""Exact group-sequential certificates: stop drawing as soon as the question is answered.

A table of certified accuracy asks nested questions: does the probability p of the predicted class exceed
p_1 < p_2 < ... < p_J with p_j = Phi(R_j / sigma), normal noise? After each of a few looks at the running count S_n, the
boundary c_j(n) says whether p > p_j is proved.

**Guarantee.** For every p, the probability that the procedure ever claims p > p_j for some p_j >= p is at
most alpha, over all looks and all thresholds together.

*Proof.* (1) One threshold: c_j is built by dynamic programming over the exact binomial law of the walk S_n so
that P(S_n >= c_j(n) at some look) <= alpha at p = p_j. Walks with success probabilities p <= p_j can be coupled
so that the one with p_j has at least as many successes at every n; crossing an upper boundary is therefore no
more likely for p than for p_j, and the bound holds for all p <= p_j. (2) All thresholds: boundaries are made
non-decreasing in j, c_j <- max(c_1, ..., c_j), which only lowers the crossing probabilities of (1). Let j* be
the smallest j with p_j >= p. A false claim means S_n >= c_j(n) for some look and some j >= j*, hence
S_n >= c_j*(n): a false claim implies that the single boundary j* was crossed, which has probability at most
alpha by (1). So every threshold is tested at full alpha, without a union bound. (3) Stopping: not looking
further, because a radius is reached, because the next one is hopeless or for any other reason, removes chances
of crossing and adds none. Futility stops therefore cost no alpha. QED

**Two bounds.** With more than two classes a class may win with less than one half. For a center m <= 0, fixed before
the first look, a_j = Phi(m + R_j / sigma) and b_j = Phi(m - R_j / sigma) are the shares with radius R_j (exponential
law: 1/2 + m +- (1 - exp(-R_j / sigma)) / 2); m = 0 is the one bound above. Claim j, "p_A > a_j and p_y < b_j for every
other class y", is made at a look where the count of A has reached the boundary c_j for a_j, and for every y the walk
n - S_y, the draws without y, the boundary d_j for 1 - b_j. Both are built as above, at alpha / 2.

*Proof* that a false claim has probability at most alpha, for any number of classes. (1) It is false because of A,
p_A <= a_j: by the proof above this has probability at most alpha / 2 for all radii together. (2) It is false because
of a rival. Let y* be the rival with the largest probability and j* the smallest j with p_y* >= b_j; since b_j falls
in j, every claim that is false because of any rival has j >= j*. Making it takes that y*'s own walk, too, has reached
d_j, and by d_j >= d_j* (non-decreasing boundaries) d_j*. Its success probability is 1 - p_y* <= 1 - b_j*, so that the
one event "y*'s walk ever reaches d_j*" has probability at most alpha / 2: no union over classes, nor over radii.
(3) y* and j* depend on the true probabilities alone, and m on selection draws, which are independent of the walks. QED

**What it saves** depends on what is asked: draws go on until the next radius is decided, so few radii are several times
cheaper than fixed sampling, while a fine grid always has a next one and spares little (`price_of_radii`, and the
benchmark ``certification.py draws``).

Testing a Clopper-Pearson bound again and again instead has no such guarantee: re-testing every 100 draws up to
10,000 crosses a true threshold more than ten times as often as alpha = 0.001 allows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import beta, binom, norm

from medrobust_lib.smoothing import bounds
from medrobust_lib.smoothing.bounds import Bounds, Law, Proof

LOOK_RATIO = 1.2  # each look comes after 20 % more draws
FUTILITY = 0.005  # stop when the next radius is reached with less than this predictive probability
GRID_STEP = 0.05  # of sigma: the radii asked for where none are named
CENTER_STEP = {"normal": 0.1, "exponential": 0.02}  # centers of two bounds lie on a grid, so that images share tables
_EARLY_SHARE = 0.5  # of alpha, spent before the last look
_FIRST_SHARE = 0.6  # of the early share, spent when an unbroken run of successes may first cross
_NEGLIGIBLE = 1e-22  # probability mass that is booked as crossed instead of being carried along
_ROUNDING = 1e-9  # relative safety margin for sums of floating-point numbers


@dataclass(frozen=True, eq=False)
class SequentialPlan:
    """Looks and boundaries for one noise level; made by `sequential_plan`, those of two bounds by `chosen`.

    Attributes
    ----------
    radii : tuple of float
        R_1 = 0 < ... < R_J, the radii that can be certified, in [0, 1] pixel units.
    sigma : float
    alpha : float
        Of these boundaries; `rival` has as much of its own.
    n : int
        Most draws.
    looks : int64 [L]
        Numbers of draws after which the count is looked at; the last is n.
    success : int64 [J, L]
        Smallest count at each look that proves a radius; ``looks + 1`` where none does.
    hopeless : int64 [J, L]
        Largest count at each look at which the radius is given up; -1 where none is.
    error : float64 [J]
        Exact probability of a false claim at the worst case, p = the threshold of the radius; at most alpha.
    law : {"normal", "exponential"}
        Of the noise; `bounds.certified_radius`.
    center : float
        m of two bounds; 0 for one.
    rival : SequentialPlan, optional
        Of the draws without a rival, at -m; None for one bound.
    """

    radii: tuple[float, ...]
    sigma: float
    alpha: float
    n: int
    looks: NDArray[np.int64]
    success: NDArray[np.int64] = field(repr=False)
    hopeless: NDArray[np.int64] = field(repr=False)
    error: NDArray[np.float64] = field(repr=False)
    law: Law = "normal"
    center: float = 0.0
    rival: Self | None = field(default=None, repr=False)

    @property
    def bounds(self) -> Bounds:
        """Which rule this is."""
        return "one" if self.rival is None else "two"

    @cached_property
    def thresholds(self) -> NDArray[np.float64]:
        """float64 [J]: the probability that must be exceeded for each radius."""
        return _thresholds(np.asarray(self.radii) / self.sigma, self.law, self.center)

    @property
    def largest_radius(self) -> float:
        """Largest radius that can come out."""
        return self.radii[-1]

    def step(self, look: int, k: int, proved: int, rival: int = 0) -> Proof:
        """Take one look at the counts.

        Parameters
        ----------
        look : int
            Position in ``looks``.
        k : int
            Successes among the first ``looks[look]`` draws.
        proved : int
            Number of radii proved at earlier looks.
        rival : int
            Largest count of another class; one bound has no use for it.
        """
        walks = [(self, k)] if self.rival is None else [(self, k), (self.rival, int(self.looks[look]) - rival)]
        reached = [int(np.searchsorted(plan.success[:, look], count, side="right")) for plan, count in walks]
        proved = max(proved, min(reached))
        finished = proved == len(self.radii) or look == len(self.looks) - 1
        finished = finished or any(count <= int(plan.hopeless[proved, look]) for plan, count in walks)
        if not proved:
            return Proof(0, finished)
        p_lower, *others = (float(plan.thresholds[proved - 1]) for plan, _ in walks)
        return Proof(proved, finished, self.radii[proved - 1], p_lower, 1 - (others or [p_lower])[0])

    def chosen(self, k: int, rival: int, draws: int) -> Self:
        """Take two bounds where they would prove more if all draws had the shares of the selection draws.

        Parameters
        ----------
        k, rival : int
            Votes for the tested class, and for its strongest rival.
        draws : int
            Selection draws.

        Returns
        -------
        SequentialPlan
            Itself, with one bound, or the plan of two bounds at alpha / 2 each whose center fits these shares.
        """
        two = self._centered(k, rival, draws)
        if two is None:
            return self
        k, rival = bounds.expected_counts(k, rival, draws, self.n)
        last = len(self.looks) - 1
        one_proved, two_proved = self.step(last, k, 0).proved, two.step(last, k, 0, rival).proved
        # A minority can prove nothing by one bound, but may by two.
        return two if two_proved > one_proved or (not one_proved and 2 * k < self.n) else self

    def _centered(self, k: int, rival: int, draws: int) -> Self | None:
        """The plan of two bounds that leaves both as much room; None where the center is that of one bound."""
        shares = (np.array([k, rival]) + 0.5) / (draws + 1)  # which leaves shares of 0 and 1 finite quantiles
        middle = norm.ppf(shares).mean() if self.law == "normal" else shares.mean() - 0.5
        center = CENTER_STEP[self.law] * round(float(middle) / CENTER_STEP[self.law])
        levels = np.asarray(self.radii) / self.sigma
        provable = bounds.lower_confidence_bound(self.n, self.n, self.alpha / 2)
        levels = levels[_thresholds(levels, self.law, -center) <= provable]
        if center >= 0 or not len(levels):
            return None
        key = tuple(levels.tolist()), int(self.n), self.alpha / 2, self.law
        plans = []
        for own in (-center, center):
            looks, success, hopeless, error = _tables(*key, own, tuple(self.looks.tolist()))
            made = {"looks": looks, "success": success, "hopeless": hopeless, "error": error, "center": own}
            plans.append(replace(self, radii=self.radii[: len(levels)], alpha=self.alpha / 2, **made))
        return replace(plans[1], rival=plans[0])


def sequential_plan(
    *,
    sigma: float,
    radii: Sequence[float] | None = None,
    n: int = bounds.N,
    alpha: float = bounds.ALPHA,
    law: Law = "normal",
) -> SequentialPlan:
    """Build the looks and boundaries for one noise level; equal questions are answered from a cache.

    Parameters
    ----------
    sigma : float
        Noise standard deviation, > 0, in [0, 1] pixel units.
    radii : sequence of float, optional
        Radii of interest, >= 0; 0 is always added, and those that n draws cannot certify are left out.
        None asks for a grid of 0.05 sigma, which spares few draws: name the radii that a table will show.
    n : int
        Most draws.
    alpha : float in (0, 1)
        Failure probability of a certificate.
    law : {"normal", "exponential"}
        Of the noise.

    Returns
    -------
    SequentialPlan

    Raises
    ------
    ValueError
        sigma, radii, n, alpha or law out of range, or n too small to certify anything.
    """
    bounds.check_sigma(sigma, law=law)
    bounds.check_alpha(alpha)
    bounds.check_draws(n, alpha)
    reach = bounds.maximum_radius(n, alpha, sigma, law=law)
    if radii is None:
        # Multiples are formed in units of sigma, so that every noise level shares one cached table.
        levels = tuple(step * GRID_STEP for step in range(math.floor(reach / sigma / GRID_STEP) + 1))
        kept = tuple(level * sigma for level in levels)
    else:
        bounds.needed_probability(
            np.asarray(radii, dtype=np.float64), sigma, law=law
        )  # refuses negative and infinite radii
        kept = tuple(radius for radius in sorted({0.0, *map(float, radii)}) if radius <= reach)
        levels = tuple(radius / sigma for radius in kept)
    return SequentialPlan(kept, sigma, alpha, n, *_tables(levels, int(n), float(alpha), law), law)


def plan_constants() -> dict[str, float | dict[str, float]]:
    """The choices behind every plan: rows made under other ones must not be mixed in one table."""
    return {
        "look_ratio": LOOK_RATIO, "futility": FUTILITY, "grid_step": GRID_STEP, "early_share": _EARLY_SHARE,
        "first_share": _FIRST_SHARE, "center_step": CENTER_STEP,
    }  # fmt: skip


def crossing_probability(boundary: NDArray[np.int64], looks: NDArray[np.int64], p: float) -> NDArray[np.float64]:
    """Exact probability that a binomial walk has reached a boundary by each look.

    Parameters
    ----------
    boundary : int64 [L]
        The walk crosses at look l if its count is at least ``boundary[l]``.
    looks : int64 [L]
        Increasing numbers of draws.
    p : float in [0, 1]
        Success probability of a draw.

    Returns
    -------
    float64 [L], non-decreasing
    """
    walk = _Walk(float(bounds.checked_probabilities(p)))
    crossed = np.zeros(len(looks))
    for look, (draws, count) in enumerate(zip(looks, boundary, strict=True)):
        walk.advance(int(draws))
        crossed[look] = walk.absorb_from(int(count))
    return np.cumsum(crossed) + walk.neglected


def operating_characteristics(plan: SequentialPlan, p: float) -> tuple[NDArray[np.float64], float]:
    """What a plan does at a true probability p, exactly, futility stops included.

    Parameters
    ----------
    plan : SequentialPlan
    p : float in [0, 1]

    Returns
    -------
    proved : float64 [J]
        Probability that each radius is certified.
    draws : float
        Expected number of draws.
    """
    bounds.checked_probabilities(p)
    # One sub-law of the count per number of radii proved so far.
    laws = {0: np.ones(1)}
    reached, expected, before = np.zeros(len(plan.radii) + 1), 0.0, 0
    for look, draws in enumerate(plan.looks):
        block = binom.pmf(np.arange(draws - before + 1), draws - before, p)
        expected += (draws - before) * sum(law.sum() for law in laws.values())
        before = draws
        moved = {proved: _law_of_sum(law, block) for proved, law in laws.items()}
        laws = {}
        # Counts from edges[v] up to edges[v + 1] prove v radii at this look.
        edges = [0, *plan.success[:, look], draws + 1]
        for proved, law in moved.items():
            support = np.flatnonzero(law)
            lowest, highest = (
                max(proved, int(value))
                for value in np.searchsorted(plan.success[:, look], support[[0, -1]], side="right")
            )
            for value in range(lowest, highest + 1):
                first, end = 0 if value == proved else edges[value], edges[value + 1]
                finished = look == len(plan.looks) - 1 or value == len(plan.radii)
                going = end if finished else min(max(plan.hopeless[value, look] + 1, first), end)
                reached[value] += law[first:going].sum()
                if law[going:end].max(initial=0.0) > _NEGLIGIBLE:
                    laws.setdefault(value, np.zeros(draws + 1))[going:end] += law[going:end]
    return np.cumsum(reached[::-1])[::-1][1:], float(expected)


def price_of_radii(
    radii: Sequence[float], *, sigma: float, n: int = bounds.N, alpha: float = bounds.ALPHA, p: float = 1.0
) -> pd.DataFrame:
    """What each radius costs in draws, for an image whose true probability is p.

    Parameters
    ----------
    radii : sequence of float
        Radii to price; each is priced as the largest one asked for.
    sigma : float
    n : int
    alpha : float in (0, 1)
    p : float in [0, 1]
        1 is the image that every noisy copy classifies alike.

    Returns
    -------
    DataFrame with columns radius, needed_probability, minimum_count, minimum_draws, expected_draws, certified
        ``minimum_count`` of n fixed draws and ``minimum_draws`` (an unbroken run of successes; infinite where the
        needed probability cannot be told from 1) are for fixed sampling; ``expected_draws`` and ``certified``
        (probability) for sequential sampling of the radii up to this one, selection draws left
        out. A radius that n draws cannot certify has expected_draws n and certified 0.
    """
    rows = []
    for radius in sorted(radii):
        plan = sequential_plan(sigma=sigma, radii=[r for r in radii if r <= radius], n=n, alpha=alpha)
        within = plan.radii[-1] >= radius
        proved, draws = operating_characteristics(plan, p) if within else (np.zeros(1), float(n))
        needed = bounds.needed_probability(radius, sigma)
        rows.append(
            {
                "radius": radius,
                "needed_probability": needed,
                "minimum_count": bounds.minimum_count(n, alpha, radius=radius, sigma=sigma),
                "minimum_draws": bounds.minimum_draws(alpha, radius=radius, sigma=sigma) if needed < 1 else math.inf,
                "expected_draws": draws,
                "certified": float(proved[-1]),
            }
        )
    return pd.DataFrame(rows)


class _Walk:
    """The law of a binomial count that has not been absorbed yet."""

    def __init__(self, p: float) -> None:
        self.p, self.draws, self.first, self.law, self.neglected = p, 0, 0, np.ones(1), 0.0

    def advance(self, draws: int) -> None:
        """Draw on up to a number of draws."""
        block = binom.pmf(np.arange(draws - self.draws + 1), draws - self.draws, self.p)
        kept = np.flatnonzero(block > _NEGLIGIBLE)
        law = np.convolve(self.law, block[kept[0] : kept[-1] + 1])
        first = self.first + int(kept[0])
        # What is cut off counts as crossed: the law stays exact up to a bound on the safe side.
        self.neglected += float(block[: kept[0]].sum() + block[kept[-1] + 1 :].sum())
        live = np.flatnonzero(law > _NEGLIGIBLE)
        if len(live):
            self.neglected += float(law[: live[0]].sum() + law[live[-1] + 1 :].sum())
            law, first = law[live[0] : live[-1] + 1], first + int(live[0])
        self.draws, self.first, self.law = draws, first, law

    def absorb_from(self, count: int) -> float:
        """Remove the walks that have reached a count and return their probability."""
        cut = min(max(count - self.first, 0), len(self.law))
        absorbed = float(self.law[cut:].sum())
        self.law = self.law[:cut] if cut else np.zeros(1)
        return absorbed

    def smallest_count(self, allowance: float) -> int:
        """Find the smallest count whose absorption costs at most an allowance; draws + 1 if none does."""
        tail = np.cumsum(self.law[::-1])[::-1]
        affordable = np.flatnonzero(tail <= allowance)
        # Counts above the kept support have no probability but are possible; the first of them is affordable.
        count = self.first + (int(affordable[0]) if len(affordable) else len(self.law))
        return min(count, self.draws + 1)


def _law_of_sum(law: NDArray[np.float64], block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convolve two laws on 0, 1, ..., leaving out tails that carry no probability to speak of."""
    total = np.zeros(len(law) + len(block) - 1)
    kept, added = np.flatnonzero(law > _NEGLIGIBLE), np.flatnonzero(block > _NEGLIGIBLE)
    part = np.convolve(law[kept[0] : kept[-1] + 1], block[added[0] : added[-1] + 1])
    total[kept[0] + added[0] :][: len(part)] = part
    return total


def _thresholds(levels: NDArray[np.float64], law: Law, center: float) -> NDArray[np.float64]:
    """Probabilities that must be exceeded for radii in units of sigma: a_j, or 1 - b_j for the center -m."""
    if law == "normal":
        return norm.cdf(levels + center)
    return np.asarray(bounds.needed_probability(levels, 1.0, law=law)) + center


@lru_cache(maxsize=256)
def _tables(
    levels: tuple[float, ...],
    n: int,
    alpha: float,
    law: Law = "normal",
    center: float = 0.0,
    looks: tuple[int, ...] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Looks, success and futility boundaries, exact errors, for the thresholds of radii in units of sigma."""
    thresholds = _thresholds(np.asarray(levels), law, center)
    first = np.array([_first_crossing(p, alpha) for p in thresholds])
    looks = _looks(first, n) if looks is None else np.array(looks, dtype=np.int64)
    raw = np.array([_boundary(p, looks, start, alpha) for p, start in zip(thresholds, first, strict=True)])
    success = np.maximum.accumulate(raw, axis=0)
    error = np.array([crossing_probability(c, looks, p)[-1] for c, p in zip(success, thresholds, strict=True)])
    hopeless = _futility(looks, success[:, -1])
    for table in (looks, success, hopeless, error):
        table.setflags(write=False)  # shared through the cache
    return looks, success, hopeless, error


def _first_crossing(p: float, alpha: float) -> int:
    """Length of the unbroken run of successes that may first prove p to be exceeded."""
    return math.ceil(math.log(alpha * _EARLY_SHARE * _FIRST_SHARE) / math.log(p))


def _looks(first: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Geometric looks from the earliest possible success to n, and one where each short list of radii first can."""
    looks = [int(min(first.min(), n))]
    while looks[-1] < n:
        looks.append(min(n, max(looks[-1] + 1, math.ceil(looks[-1] * LOOK_RATIO))))
    if len(first) <= len(looks):
        looks = sorted({*looks, *(int(draws) for draws in first if draws < n)})
    return np.array(looks, dtype=np.int64)


def _boundary(p: float, looks: NDArray[np.int64], first: int, alpha: float) -> NDArray[np.int64]:
    """Smallest counts whose exact probability of ever being reached at p stays within the spending schedule."""
    alpha = alpha * (1 - _ROUNDING)
    # The early share is spent evenly over the logarithm of the draws: no prior idea when the question settles.
    span = math.log(looks[-1] / first) if first < looks[-1] else 1.0
    time = np.clip(np.log(looks / first) / span, 0, 1)
    spend = np.where(looks >= first, alpha * _EARLY_SHARE * (_FIRST_SHARE + (1 - _FIRST_SHARE) * time), 0.0)
    spend[-1] = alpha
    walk, used = _Walk(p), 0.0
    boundary = np.empty(len(looks), dtype=np.int64)
    for look, draws in enumerate(looks):
        walk.advance(int(draws))
        boundary[look] = walk.smallest_count(spend[look] - used - walk.neglected)
        used += walk.absorb_from(int(boundary[look]))
    return boundary


def _futility(looks: NDArray[np.int64], goals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Largest counts from which the goal at the last look is nearly out of reach; -1 at the last look itself.

    Under Jeffreys' prior the successes still to come are beta-binomial; their share is approximated by the beta
    law of the same mean and variance. A wrong prior or approximation costs power, never the guarantee.
    """
    n, draws, goal = int(looks[-1]), looks[None, :-1], goals[:, None]
    low, high = np.broadcast_arrays(-1, goal, draws)[:2]  # counts up to `low` are hopeless, above `high` are not
    high = np.minimum(high, draws)
    rest = np.maximum(n - draws, 1)
    for _ in range(int(n).bit_length() + 1):
        middle = (low + high + 1) // 2
        mean, weight = (middle + 0.5) / (draws + 1), rest * (draws + 2) / (draws + 1 + rest) - 1
        share = np.clip((goal - middle - 0.5) / rest, 0, 1)
        hopeless = beta.sf(share, mean * weight, (1 - mean) * weight) < FUTILITY
        settled = low >= high
        low = np.where(hopeless & ~settled, middle, low)
        high = np.where(~hopeless & ~settled, middle - 1, high)
    return np.concatenate([low, np.full_like(goal, -1)], axis=1)
