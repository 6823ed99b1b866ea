r"""What an oracle's errors do to a certificate about the true label of a text, and how often it errs.

A certificate bounds q, the probability under noise that the *oracle's* label is y. Its guarantee is "composite" and
needs no assumption. The *true* label of a text is what an ideal reader would call the text: it is not the truth of the
image, about which nothing here is proved. Who wants the probability p that it is y must assume how the oracle errs on
the texts that this model writes for noisy copies of this very image. Three assumptions, and what follows from each:

- symmetric: labels are exchanged with one probability :math:`\epsilon`, whatever the text says. Then
  :math:`q = \epsilon + p (1 - 2 \epsilon)`, so :math:`p = (q - \epsilon) / (1 - 2 \epsilon)`, which *grows* with
  :math:`\epsilon` for q above one half: only a LOWER bound of the rate is safe. At :math:`\epsilon = 1/2` the map turns
  round, so an UPPER bound must lie below one half as well. Both ends may spend the same alpha: a rate of one half or
  more gives a false certificate only if its upper bound fails, a smaller one only if its lower bound does.
- false positives: other texts are taken for y with probability at most :math:`\epsilon`:
  :math:`p \ge (q - \epsilon) / (1 - \epsilon)`, which falls with :math:`\epsilon`: an UPPER bound is needed.
- total: anything may happen on a share of at most :math:`\epsilon` of the texts: :math:`p \ge q - \epsilon`, likewise.

Each map grows with q, so a lower bound of q becomes one of p.

References
----------
Seferis et al. 2025, arXiv:2509.16088, Theorems 4.1 and 4.2 (the symmetric case).
"""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from medrobust_lib.generative.oracles import Equivalence, Oracle, judged
from medrobust_lib.metrics import accuracy_interval
from medrobust_lib.smoothing.bounds import check_alpha, lower_confidence_bound, upper_confidence_bound

_ROUNDING = 1e-12  # 0.8 - 0.2 is above 0.6


class InconsistentErrorRateError(ValueError):
    """An error rate that cannot be true together with the observed votes."""


@dataclass(frozen=True)
class ErrorRate:
    """A rate that is known, or estimated from labelled texts.

    Attributes
    ----------
    value : float or None
        In [0, 1], if the rate is known exactly.
    errors, trials : int or None
        If it is estimated: errors among trials, independent and drawn from the texts the certificate is about.

    Raises
    ------
    ValueError
        Neither or both are given, or one is out of range.
    TypeError
        A value that is no number, or a count that is no whole one.
    """

    value: float | None = None
    errors: int | None = None
    trials: int | None = None

    def __post_init__(self) -> None:
        counted = self.errors is not None and self.trials is not None
        if (self.value is not None) == counted or (self.errors is None) != (self.trials is None):
            raise ValueError(f"{self}: give either value=RATE, or errors=COUNT and trials=COUNT")
        if not counted:
            _check_number("value", self.value, numbers.Real)
            if not 0 <= self.value <= 1:
                raise ValueError(f"error rate {self.value}: a rate lies in [0, 1]")
            return
        _check_number("errors", self.errors, numbers.Integral)
        _check_number("trials", self.trials, numbers.Integral)
        if not 0 <= self.errors <= self.trials >= 1:
            raise ValueError(f"{self.errors} errors in {self.trials} trials: counts need 0 <= errors <= trials >= 1")

    @property
    def is_estimated(self) -> bool:
        """Whether a part of alpha must be spent on the rate."""
        return self.value is None

    def lower(self, alpha: float) -> float:
        """Lower bound of the rate, exceeding it with probability at most alpha; the rate itself if it is known."""
        return lower_confidence_bound(self.errors, self.trials, alpha) if self.is_estimated else self.value

    def upper(self, alpha: float) -> float:
        """Upper bound of the rate, below it with probability at most alpha; the rate itself if it is known."""
        return upper_confidence_bound(self.errors, self.trials, alpha) if self.is_estimated else self.value

    def __str__(self) -> str:
        return f"{self.value:g}" if self.value is not None else f"{self.errors} of {self.trials} labelled texts"


@runtime_checkable
class ErrorModel(Protocol):
    """An assumption about an oracle's errors, and what a bound of q then says about p."""

    @property
    def assumption(self) -> str:
        """The assumption in words; it is printed with every certificate that rests on it."""

    @property
    def is_estimated(self) -> bool:
        """Whether a part of alpha must be spent on an error rate."""

    def corrected(self, q_lower: float, *, label: str, alpha: float) -> float:
        """Lower bound of p from one of q.

        Parameters
        ----------
        q_lower : float in [0, 1]
        label : str
            The certified label.
        alpha : float in (0, 1)
            Spent on the error rate, where it is estimated.

        Raises
        ------
        InconsistentErrorRateError
            The rate contradicts the votes: p would exceed 1.
        """


@dataclass(frozen=True)
class SymmetricErrors:
    """Labels are exchanged with one probability, whatever the text says: Theorem 4.1.

    Attributes
    ----------
    rate : ErrorRate or None
        Known, or estimated: then its LOWER bound is used, and its upper bound must lie below (K - 1) / K. None: unknown
        but below (K - 1) / K, for which q itself is a lower bound of p (Theorem 4.2).
    n_labels : int
        K. For K above 2 an error picks each of the other labels with the same probability. (K - 1) / K is one half for
        two labels.

    Raises
    ------
    TypeError
        A rate that is no `ErrorRate`, or an n_labels that is no whole number.
    ValueError
        A known rate at or above (K - 1) / K, where the oracle says nothing.
    """

    rate: ErrorRate | None = None
    n_labels: int = 2

    def __post_init__(self) -> None:
        if self.rate is not None:
            _check_rate(self.rate, "SymmetricErrors(", ")")
        _check_number("n_labels", self.n_labels, numbers.Integral)
        if self.n_labels < 2:
            raise ValueError(f"n_labels={self.n_labels}: errors exchange labels, so there are at least 2")
        if self.rate is not None and not self.rate.is_estimated:
            self._check(self.rate.value)

    @property
    def assumption(self) -> str:
        """The assumption in words."""
        below = "below one half" if self.n_labels == 2 else f"below {self.n_labels - 1}/{self.n_labels}"
        known = f"a rate {below}" if self.rate is None else f"a rate of {self.rate}"
        estimated = f", lower bound used, upper bound {below}" if self.is_estimated else ""
        return (
            f"for noisy copies of this image the oracle exchanges its {self.n_labels} labels with one probability, "
            f"whatever the text says ({known}{estimated})"
        )

    @property
    def is_estimated(self) -> bool:
        """Whether a part of alpha must be spent on the rate."""
        return self.rate is not None and self.rate.is_estimated

    def corrected(self, q_lower: float, *, label: str, alpha: float) -> float:
        """Lower bound of p; see `ErrorModel`."""
        # Below 1 / K errors raise the label's share, so a rate that is too small would flatter it.
        if (self.rate is None or self.is_estimated) and q_lower <= 1 / self.n_labels:
            return 0.0
        if self.rate is None:
            return q_lower
        self._check(self.rate.upper(alpha))
        rate = self.rate.lower(alpha)
        others = self.n_labels - 1
        p_lower = (q_lower - rate / others) / (1 - rate * self.n_labels / others)
        if p_lower > 1 + _ROUNDING:
            raise InconsistentErrorRateError(
                f"an oracle that errs symmetrically at the rate {rate:g} gives no label with probability above "
                f"{1 - rate:g}, but the votes prove {q_lower:.4g}: the rate is too high or the errors are not symmetric"
            )
        return min(max(p_lower, 0.0), 1.0)

    def _check(self, rate: float) -> None:
        useless = (self.n_labels - 1) / self.n_labels
        if rate >= useless:
            found = f"{rate:g}"
            if self.is_estimated:
                found = f"up to {rate:.4g} ({self.rate}; label more texts, or mend the oracle)"
            raise InconsistentErrorRateError(
                f"symmetric error rate {found}: with {self.n_labels} labels it must be below {useless:g}, where the "
                "label says nothing about the text and beyond which the correction would point the wrong way"
            )


@dataclass(frozen=True)
class FalsePositives:
    """Texts of another label are taken for the certified one at most so often; missed ones do no harm.

    Attributes
    ----------
    rates : mapping of label to ErrorRate
        P[oracle says label | an ideal reader says another]; estimated ones enter with their UPPER bound.

    Raises
    ------
    TypeError
        Anything but a mapping to `ErrorRate`.
    """

    rates: Mapping[str, ErrorRate]

    def __post_init__(self) -> None:
        if not isinstance(self.rates, Mapping):
            raise TypeError(
                f"FalsePositives({self.rates!r}): each label has a rate; use FalsePositives({{LABEL: ErrorRate(0.05)}})"
            )
        for label, rate in self.rates.items():
            _check_rate(rate, f"FalsePositives({{{label!r}: ", "})")

    @property
    def assumption(self) -> str:
        """The assumption in words."""
        listed = "; ".join(f"{label}: {rate}" for label, rate in self.rates.items())
        return (
            "among texts for noisy copies of this image whose true label is another one, the oracle takes at most this "
            f"share for the certified label ({listed}{'; upper bounds used' if self.is_estimated else ''})"
        )

    @property
    def is_estimated(self) -> bool:
        """Whether a part of alpha must be spent on a rate."""
        return any(rate.is_estimated for rate in self.rates.values())

    def corrected(self, q_lower: float, *, label: str, alpha: float) -> float:
        """Lower bound of p; see `ErrorModel`."""
        if label not in self.rates:
            raise InconsistentErrorRateError(
                f"no false-positive rate is given for the label {label!r}, only for {', '.join(self.rates) or 'none'}"
            )
        rate = self.rates[label].upper(alpha)
        return 0.0 if rate >= 1 else max((q_lower - rate) / (1 - rate), 0.0)


@dataclass(frozen=True)
class TotalErrors:
    """The oracle is wrong on at most this share of the texts, in any way it likes.

    Attributes
    ----------
    rate : ErrorRate
        P[oracle's label is not an ideal reader's] for noisy copies of this image; the UPPER bound of an estimated one
        is used.

    Raises
    ------
    TypeError
        A rate that is no `ErrorRate`.
    """

    rate: ErrorRate

    def __post_init__(self) -> None:
        _check_rate(self.rate, "TotalErrors(", ")")

    @property
    def assumption(self) -> str:
        """The assumption in words."""
        used = ", upper bound used" if self.is_estimated else ""
        return (
            f"for noisy copies of this image the oracle is wrong on at most this share of the texts ({self.rate}{used})"
        )

    @property
    def is_estimated(self) -> bool:
        """Whether a part of alpha must be spent on the rate."""
        return self.rate.is_estimated

    def corrected(self, q_lower: float, *, label: str, alpha: float) -> float:
        """Lower bound of p; see `ErrorModel`."""
        return max(q_lower - self.rate.upper(alpha), 0.0)


def check_error_model(model: Any) -> None:
    """Raise a TypeError for what is neither None nor an `ErrorModel`."""
    if model is not None and (isinstance(model, type) or not isinstance(model, ErrorModel)):
        raise TypeError(
            f"error_model={model!r} is no error model; use one of SymmetricErrors(ErrorRate(0.05)), "
            "FalsePositives({LABEL: ErrorRate(0.05)}) and TotalErrors(ErrorRate(0.05))"
        )


def split_alpha(model: ErrorModel | None, alpha: float, *, share: float = 0.5) -> tuple[float, float]:
    """Share alpha between the votes and an estimated error rate.

    Returns
    -------
    (float, float)
        For q and for the rate; they sum to alpha, so both bounds hold together with probability 1 - alpha. A known
        rate takes none of it.
    """
    check_alpha(alpha)
    _check_number("share", share, numbers.Real)
    if not 0 < share < 1:
        raise ValueError(f"share={share}: the part of alpha for the error rate lies in (0, 1)")
    if model is None or not model.is_estimated:
        return alpha, 0.0
    return alpha * (1 - share), alpha * share


def _check_rate(rate: Any, before: str, after: str) -> None:
    if not isinstance(rate, ErrorRate):
        raise TypeError(
            f"{before}{rate!r}{after}: a rate is an ErrorRate; write {before}ErrorRate(0.05){after} for a known rate, "
            "or ErrorRate(errors=COUNT, trials=COUNT) for an estimated one"
        )


def _check_number(name: str, value: Any, kind: type) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: give a {'whole ' * (kind is numbers.Integral)}number")


SAME, DIFFERENT = "same", "different"


@dataclass(frozen=True)
class Calibration:
    """How an oracle labelled texts of known truth.

    Attributes
    ----------
    oracle, version : str
    labels : tuple of str
    counts : tuple of tuple of int
        Texts by truth (row) and oracle's label (column); the last column counts texts without a label.
    failed : int
        Texts on which the oracle raised; they are among those without a label.
    unknown : tuple of int
        Texts whose truth nobody knows, by the oracle's label; the last one counts those without. Each counts as an
        error wherever it may be one. That is safe for `one_sided` and `TotalErrors`, which use upper bounds, and too
        much for `SymmetricErrors`, which uses the lower one.
    """

    oracle: str
    version: str
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    failed: int = 0
    unknown: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """Labelled texts."""
        return sum(map(sum, self.counts))

    def false_positives(self, label: str) -> ErrorRate:
        """Rate at which texts of other labels are taken for this one."""
        column = self._position(label)
        others = [row for place, row in enumerate(self.counts) if place != column]
        odd = sum(self.unknown[column : column + 1])
        errors, trials = sum(row[column] for row in others) + odd, sum(map(sum, others)) + odd
        return _counted(errors, trials, f"texts that are not {label!r}")

    def false_negatives(self, label: str) -> ErrorRate:
        """Rate at which texts of this label get another one, or none."""
        place = self._position(label)
        row, odd = self.counts[place], sum(self.unknown) - sum(self.unknown[place : place + 1])
        return _counted(sum(row) - row[place] + odd, sum(row) + odd, f"texts that are {label!r}")

    def total_errors(self) -> ErrorRate:
        """Rate of wrong or missing labels over all texts."""
        right = sum(row[place] for place, row in enumerate(self.counts))
        every = self.n + sum(self.unknown)
        return _counted(every - right, every, "texts")

    def one_sided(self) -> FalsePositives:
        """Error model with the false-positive rate of every label that it can be estimated for."""
        known = [label for label, row in zip(self.labels, self.counts, strict=True) if sum(row) < self.n]
        return FalsePositives({label: self.false_positives(label) for label in known})

    def table(self) -> pd.DataFrame:
        """False-positive and false-negative rates with two-sided 95 % Clopper-Pearson intervals, a row per label.

        Returns
        -------
        DataFrame with columns oracle, label, kind, errors, n, rate, low, high
            Labels for which there is no text to err on are left out.
        """
        rows = []
        for place, label in enumerate(self.labels):
            own = sum(self.counts[place])
            kinds = [("false positive", self.false_positives)] * (self.n > own)
            kinds += [("false negative", self.false_negatives)] * (own > 0)
            for kind, rate_of in kinds:
                errors, n = rate_of(label).errors, rate_of(label).trials
                rows.append((self.oracle, label, kind, errors, n, errors / n, *accuracy_interval(errors, n)))
        return pd.DataFrame(rows, columns=["oracle", "label", "kind", "errors", "n", "rate", "low", "high"])

    def _position(self, label: str) -> int:
        if label not in self.labels:
            raise ValueError(f"label {label!r} was not calibrated; there are {', '.join(self.labels)}")
        return self.labels.index(label)


def calibrate_oracle(oracle: Oracle, texts: Sequence[str | None], truths: Sequence[str | None]) -> Calibration:
    """Count an oracle's errors on texts of known truth.

    To serve an error model the texts must be the model's answers to noisy copies of images like the certified one,
    labelled independently of the oracle, by a person for example.

    Parameters
    ----------
    oracle : Oracle
    texts : sequence of str
    truths : sequence of str or None
        One of the oracle's labels for each text; None where nobody knows, see `Calibration`.

    Raises
    ------
    ValueError
        Different lengths, no texts, or a truth that is none of the labels.
    """
    if len(texts) != len(truths) or not len(texts):
        raise ValueError(f"{len(texts)} texts and {len(truths)} truths; calibration needs one truth for each text")
    odd = sorted(map(repr, set(truths) - {*oracle.labels, None}))
    if odd:
        raise ValueError(f"truths {', '.join(odd)} are none of the labels {', '.join(oracle.labels)}")
    answered = judged(oracle, texts)
    names = (*oracle.labels, None)
    counts = np.zeros((len(names), len(names)), dtype=int)
    for truth, label in zip(truths, answered.labels, strict=True):
        counts[names.index(truth), names.index(label)] += 1
    *known, unknown = map(tuple, counts.tolist())
    return Calibration(oracle.name, oracle.version, oracle.labels, tuple(known), answered.failed, unknown)


def calibrate_equivalence(
    equivalence: Equivalence, texts: Sequence[str | None], representatives: Sequence[str], same: Sequence[bool]
) -> Calibration:
    """Count an equivalence's errors on pairs of texts of which it is known whether they mean the same.

    Parameters
    ----------
    equivalence : Equivalence
    texts, representatives : sequence of str
        The pairs.
    same : sequence of bool

    Returns
    -------
    Calibration
        Of the labels ``same`` and ``different``; a false positive takes different texts for the same.
    """
    if not len(texts) == len(representatives) == len(same) or not len(texts):
        raise ValueError(
            f"{len(texts)} texts, {len(representatives)} representatives and {len(same)} truths: need pairs"
        )
    counts, failed = np.zeros((2, 3), dtype=int), 0
    for representative in dict.fromkeys(representatives):
        places = [place for place, other in enumerate(representatives) if other == representative]
        answered = judged(equivalence, [texts[place] for place in places], representative)
        failed += answered.failed
        for place, answer in zip(places, answered.labels, strict=True):
            counts[0 if same[place] else 1, 2 if answer is None else int(not answer)] += 1
    return Calibration(
        equivalence.name, equivalence.version, (SAME, DIFFERENT), tuple(map(tuple, counts.tolist())), failed
    )


def _counted(errors: int, trials: int, what: str) -> ErrorRate:
    if trials == 0:
        raise ValueError(f"no {what} were labelled, so their error rate is unknown")
    return ErrorRate(errors=errors, trials=trials)
