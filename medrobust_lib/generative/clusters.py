"""Clusters of texts that mean the same, built on selection draws only."""

from collections.abc import Sequence
from dataclasses import dataclass

from medrobust_lib.generative.oracle import Equivalence, Judged, judged


@dataclass(frozen=True)
class Cluster:
    """Texts that mean the same as their first one.

    Attributes
    ----------
    representative : str
    size : int
    """

    representative: str
    size: int


def cluster_texts(texts: Sequence[str | None], equivalence: Equivalence) -> tuple[list[Cluster], Judged]:
    """Group texts by meaning, greedily in their order: a text joins the first representative it is equivalent to.

    An equivalence need be neither symmetric nor transitive, so another order may give other clusters; the order of the
    draws is fixed by their addresses.

    Parameters
    ----------
    texts : sequence of str or None
        Empty ones, and None, join no cluster.
    equivalence : Equivalence

    Returns
    -------
    clusters : list of Cluster
        In the order of their representatives.
    judged : Judged
        Number of its cluster for each text, or None; with the counts of empty texts and of failures.
    """
    numbers: list[int | None] = [None] * len(texts)
    waiting = [place for place, text in enumerate(texts) if text is not None and text.strip()]
    empty, failed, first_error = len(texts) - len(waiting), 0, ""
    clusters = []
    while waiting:
        representative = texts[waiting[0]]
        answers = judged(equivalence, [texts[place] for place in waiting], representative)
        failed, first_error = failed + answers.failed, first_error or answers.first_error
        # A text stands for itself, whatever an unreliable judge says.
        joined = [place for place, same in zip(waiting, answers.labels, strict=True) if same or place == waiting[0]]
        for place in joined:
            numbers[place] = len(clusters)
        clusters.append(Cluster(representative, len(joined)))
        waiting = [place for place in waiting if numbers[place] is None]
    return clusters, Judged(tuple(numbers), empty=empty, failed=failed, first_error=first_error)
