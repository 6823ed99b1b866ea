"""How often an oracle errs, counted on labelled texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from medrobust_lib.generative.oracle import Equivalence, Oracle, judged
from medrobust_lib.generative.oracle_errors import ErrorRate, FalsePositives
from medrobust_lib.metrics import accuracy_interval

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
    """

    oracle: str
    version: str
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    failed: int = 0

    @property
    def n(self) -> int:
        """Labelled texts."""
        return sum(map(sum, self.counts))

    def false_positives(self, label: str) -> ErrorRate:
        """Rate at which texts of other labels are taken for this one."""
        column = self._position(label)
        others = [row for place, row in enumerate(self.counts) if place != column]
        return _counted(sum(row[column] for row in others), sum(map(sum, others)), f"texts that are not {label!r}")

    def false_negatives(self, label: str) -> ErrorRate:
        """Rate at which texts of this label get another one, or none."""
        row = self.counts[self._position(label)]
        return _counted(sum(row) - row[self._position(label)], sum(row), f"texts that are {label!r}")

    def total_errors(self) -> ErrorRate:
        """Rate of wrong or missing labels over all texts."""
        right = sum(row[place] for place, row in enumerate(self.counts))
        return _counted(self.n - right, self.n, "texts")

    def one_sided(self) -> FalsePositives:
        """Error model with the false-positive rate of every label that it can be estimated for."""
        column_sums = [self.n - sum(row) for row in self.counts]
        known = [label for label, others in zip(self.labels, column_sums, strict=True) if others]
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
                rate = rate_of(label)
                low, high = accuracy_interval(rate.errors, rate.trials)
                rows.append(
                    {
                        "oracle": self.oracle,
                        "label": label,
                        "kind": kind,
                        "errors": rate.errors,
                        "n": rate.trials,
                        "rate": rate.errors / rate.trials,
                        "low": low,
                        "high": high,
                    }
                )
        return pd.DataFrame(rows)

    def _position(self, label: str) -> int:
        if label not in self.labels:
            raise ValueError(f"label {label!r} was not calibrated; there are {', '.join(self.labels)}")
        return self.labels.index(label)


def calibrate_oracle(oracle: Oracle, texts: Sequence[str | None], truths: Sequence[str]) -> Calibration:
    """Count an oracle's errors on texts of known truth.

    To serve an error model the texts must be the model's answers to noisy copies of images like the certified one,
    labelled independently of the oracle, by a person for example.

    Parameters
    ----------
    oracle : Oracle
    texts : sequence of str
    truths : sequence of str
        One of the oracle's labels for each text.

    Raises
    ------
    ValueError
        Different lengths, no texts, or a truth that is none of the labels.
    """
    if len(texts) != len(truths) or not len(texts):
        raise ValueError(f"{len(texts)} texts and {len(truths)} truths; calibration needs one truth for each text")
    unknown = sorted(map(repr, set(truths) - set(oracle.labels)))
    if unknown:
        raise ValueError(f"truths {', '.join(unknown)} are none of the labels {', '.join(oracle.labels)}")
    answered = judged(oracle, texts)
    columns = (*oracle.labels, None)
    counts = np.zeros((len(oracle.labels), len(columns)), dtype=int)
    for truth, label in zip(truths, answered.labels, strict=True):
        counts[oracle.labels.index(truth), columns.index(label)] += 1
    return Calibration(oracle.name, oracle.version, oracle.labels, tuple(map(tuple, counts.tolist())), answered.failed)


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
    return ErrorRate(errors=int(errors), trials=int(trials))
