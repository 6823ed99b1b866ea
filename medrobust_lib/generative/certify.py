"""Certificates of what a generative model answers: a label, or a cluster of texts that mean the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medrobust_lib.generative.answers import (
    AnswerBank,
    Drawing,
    Equivalence,
    GenerativeModel,
    Oracle,
    StoredAnswers,
    check_oracle,
    open_answers,
)
from medrobust_lib.generative.errors import (
    SAME,
    ErrorModel,
    InconsistentErrorRateError,
    SymmetricErrors,
    check_error_model,
    split_alpha,
)
from medrobust_lib.generative.oracles import Judged, judged
from medrobust_lib.smoothing.bounds import certified_radius
from medrobust_lib.smoothing.certificate import ABSTAIN, Certificate, Guarantee, Sampling, Tally, about_text
from medrobust_lib.smoothing.certify import Verdict, check_mode_draws, make_plan, take_votes
from medrobust_lib.smoothing.noise import Role


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


_TESTED = 0  # the number that votes for the tested answer carry; all others count for no class


@dataclass(frozen=True)
class GenerativeCertificate:
    """What is proved about a model's answer to one question about one image.

    Attributes
    ----------
    answer : str or None
        The tested label, or the frozen representative's text; None if selection found none.
    composite : Certificate
        Of oracle after model; needs no assumption about the oracle.
    corrected : Certificate or None
        Of the true label, which is what an ideal reader would call the text (not the truth of the image), under
        `assumption`; None without an error model, or if it was refused.
    assumption : str
        The error model in words.
    refusal : str
        Why the error model could not be applied.
    oracle, oracle_version : str
    prompt : str
    temperature : float
    max_new_tokens : int
    tally : Tally
        Over selection and estimation draws.
    n_distinct : int
        Different texts among the estimation draws; 1 means that the model may answer the same to any image.
    clusters : tuple of Cluster
        Of the selection draws, in the order of their first text; empty for an oracle with labels.
    """

    answer: str | None
    composite: Certificate
    corrected: Certificate | None
    assumption: str
    refusal: str
    oracle: str
    oracle_version: str
    prompt: str
    temperature: float
    max_new_tokens: int
    tally: Tally
    n_distinct: int
    clusters: tuple[Cluster, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        lines = [
            f"question {self.prompt!r}, oracle {self.oracle} ({self.oracle_version})",
            f"tested answer: {self.answer!r}" if self.answer is not None else "no answer could be selected",
            f"without any assumption: {about_text(self.composite, self.answer, equivalence=bool(self.clusters))}",
        ]
        if self.corrected is not None:
            words = about_text(self.corrected, self.answer, equivalence=bool(self.clusters))
            lines.append(f"if the error model holds: {words}")
        if self.refusal:
            lines.append(f"error model refused: {self.refusal}")
        if self.assumption:
            lines.append(f"assumption: {self.assumption}")
        drawn = "noise" if self.temperature == 0 else "noise and decoding"
        labelled = ", and over the labelled texts where an error rate is estimated" if self.assumption else ""
        lines.append(
            f"alpha {self.composite.alpha:g}: a certificate is false with probability at most alpha, over the {drawn} "
            f"drawn{labelled}"
        )
        lines.append(self._texts_in_words())
        if self.n_distinct == 1 and self.composite.n > 1:
            lines.append("the model gave one and the same text every time; see whether it gives it for any image")
        return "\n".join(lines)

    def _texts_in_words(self) -> str:
        tally, n0 = self.tally, self.composite.n0
        failed = ""
        if tally.failed:
            # An equivalence is asked about a text several times, so its failures are calls and no texts.
            calls = f"failed calls of the oracle: {tally.failed}"
            texts = f"{tally.failed} because the oracle failed"
            failed = f" ({calls if self.clusters else texts}, first with {tally.first_error!r})"
        return (
            f"{n0} selection and {tally.total - n0} estimation texts: {tally.empty} empty, {tally.truncated} cut off, "
            f"{tally.unlabelled} without a {'verdict' if self.clusters else 'label'}{failed}; "
            "each counts in its own denominator"
        )


def certify_generative(
    vlm: GenerativeModel,
    image: Tensor,
    prompt: str,
    oracle: Oracle | Equivalence,
    *,
    sigma: float = 0.5,
    dataset: str = "",
    index: int = 0,
    batch_size: int | None = None,
    store: Path | str | None = None,
    **settings: Any,
) -> GenerativeCertificate:
    """Certify a generative model's answer to one question about one image.

    Parameters
    ----------
    vlm : GenerativeModel
        `load_vlm` gives one.
    image : float32 [3, H, W]
        In [0, 1], from ``vlm.prepare``: noise is added at this size, before the model's own processor.
    prompt : str
        The question; it is fixed, and nothing is proved about other wordings.
    oracle : Oracle or Equivalence
        Gives labels, or tells whether two texts mean the same. It must be a fixed function of the text.
    sigma : float
        Noise standard deviation, > 0, in [0, 1] pixel units.
    dataset, index
        Address of noise and decoding; give every image an index of its own.
    batch_size : int, optional
    store : path, optional
        Folder that keeps every answer as it comes: an interrupted run, or one whose judge went away, goes on there. An
        own model needs a `version` for it; see `GenerativeModel`.
    **settings
        seed, max_new_tokens and temperature of `Drawing`; n0, n, alpha, error_model, alpha_share, sampling and radii of
        `certify_answers`.

    Returns
    -------
    GenerativeCertificate

    Raises
    ------
    ValueError
        A parameter out of range, named; an n that can never certify (the smallest that can is named).
    TypeError
        The model, the image, the oracle or the error model is of the wrong kind; what is missing is named.
    RuntimeError
        The oracle raised at every text of selection that is not empty. Answers stay in `store`.
    OracleUnavailableError
        From a judge that cannot be reached. Answers stay in `store`.

    References
    ----------
    Seferis et al. 2025, arXiv:2509.16088, Algorithm 2, with separate draws for clusters and for votes.
    """
    drawing = {field.name for field in fields(Drawing)} & settings.keys()
    how = Drawing(sigma=sigma, **{name: settings.pop(name) for name in drawing})
    bank = AnswerBank(vlm, image, prompt, how, dataset=dataset, index=index, batch_size=batch_size)
    if store is None:
        return certify_answers(bank, oracle, **settings)
    with open_answers(store, vlm, how, dataset=dataset, prompts=[prompt]) as opened:
        bank.kept = StoredAnswers(opened, index=index, image=bank.image, prompt=prompt, sigma=how.sigma)
        return certify_answers(bank, oracle, **settings)


def certify_answers(
    bank: AnswerBank,
    oracle: Oracle | Equivalence,
    *,
    n0: int = 20,
    n: int = 100,
    alpha: float = 0.001,
    error_model: ErrorModel | None = None,
    alpha_share: float = 0.5,
    sampling: Sampling = "fixed",
    radii: Sequence[float] | None = None,
) -> GenerativeCertificate:
    """Certify from a bank of answers.

    Several oracles, and several numbers of draws, share a bank: each certificate is valid on its own, and they err
    together.

    Parameters
    ----------
    bank : AnswerBank
    oracle : Oracle or Equivalence
    n0 : int
        Selection draws: they choose the label, or build the clusters. Never used again.
    n : int
        Estimation draws; with sequential sampling at most so many.
    alpha : float in (0, 1)
        Probability that a certificate is false.
    error_model : ErrorModel, optional
        Adds a second certificate, about the true label, under its assumption: what an ideal reader would call the
        text, not the truth of the image. The label of an equivalence is "same", as `calibrate_equivalence` names it.
    alpha_share : float in (0, 1)
        Part of alpha spent on an error rate that is estimated.
    sampling, radii
        As in `certify`; radii belong to sequential sampling.

    Returns
    -------
    GenerativeCertificate

    Raises
    ------
    ValueError, TypeError, RuntimeError, OracleUnavailableError
        As `certify_generative`.
    """
    check_oracle(oracle)
    check_error_model(error_model)
    if sampling == "fixed" and radii is not None:
        raise ValueError(f"radii={radii!r}: only sampling='sequential' takes radii of interest; leave them out")
    labelled = callable(getattr(oracle, "label", None))
    check_mode_draws(n0, label_given=False)
    _check_number_of_labels(error_model, len(oracle.labels) if labelled else 2, oracle.name)
    sigma = bank.how.sigma
    alpha_votes, alpha_rate = split_alpha(error_model, alpha, share=alpha_share)
    plans = [make_plan(sampling, sigma=sigma, radii=radii, n=n, alpha=level) for level in (alpha, alpha_votes)]
    counter = _Counter(bank)
    clusters: tuple[Cluster, ...] = ()
    if labelled:
        selected = counter.judged(oracle, "select", 0, n0)
        counter.check_oracle_works(oracle.name, n_calls=counter.n_given)
        answer, number = _most_frequent(selected, oracle.labels)
    else:
        clusters = counter.clusters(oracle, n0)
        # If every call failed, every text was compared with itself and all that came after it.
        counter.check_oracle_works(oracle.name, n_calls=counter.n_given * (counter.n_given + 1) // 2)
        largest = max(clusters, key=lambda cluster: cluster.size, default=None)  # the first one among equals
        answer, number = (None, ABSTAIN) if largest is None else (largest.representative, _TESTED)

    def votes(role: Role, first: int, count: int, positions: Sequence[int]) -> list[Tensor]:
        found = counter.judged(oracle, role, first, count, None if labelled else answer)
        hits = [label == answer for label in found] if labelled else found
        drawn = torch.tensor([_TESTED if hit else ABSTAIN for hit in hits], dtype=torch.int64)
        return [drawn for _ in positions]

    verdicts = [Verdict(predicted=ABSTAIN, radius=0.0, p_lower=0.0, k=0, n=0) for _ in plans]
    if answer is not None:
        verdicts = take_votes(votes, plans, n0=n0, label=_TESTED)
    rules = {"n0": n0, "n_max": n, "alpha": alpha, "sampling": sampling}
    composite = _certificate(bank, verdicts[0], number, "composite", **rules)
    corrected, refusal = None, ""
    if error_model is not None:
        strict = _certificate(bank, verdicts[1], number, "corrected", **rules)
        tested = answer if labelled else SAME
        try:
            corrected = _corrected(strict, number, error_model, label=tested, alpha_rate=alpha_rate or alpha)
        except InconsistentErrorRateError as error:
            refusal = str(error)
    return GenerativeCertificate(
        answer=answer,
        composite=composite,
        corrected=corrected,
        assumption="" if error_model is None else error_model.assumption,
        refusal=refusal,
        oracle=oracle.name,
        oracle_version=oracle.version,
        prompt=bank.prompt,
        temperature=bank.how.temperature,
        max_new_tokens=bank.how.max_new_tokens,
        tally=counter.tally,
        n_distinct=len(set(bank.texts("estimate", 0, composite.n))) if composite.n else 0,
        clusters=clusters,
    )


def _check_number_of_labels(error_model: ErrorModel | None, n_labels: int, name: str) -> None:
    """Refuse symmetric errors over more or fewer labels than there are: the correction would promise too much."""
    if isinstance(error_model, SymmetricErrors) and error_model.n_labels != n_labels:
        raise ValueError(
            f"the error model exchanges {error_model.n_labels} labels, the oracle {name!r} has {n_labels}; "
            f"use SymmetricErrors(..., n_labels={n_labels}), or FalsePositives, which needs no number of labels"
        )


class _Counter:
    """Judges a bank's answers, and counts what became of them."""

    def __init__(self, bank: AnswerBank) -> None:
        self.bank = bank
        self.tally = Tally()

    def judged(
        self, oracle: Oracle | Equivalence, role: Role, first: int, count: int, representative: str | None = None
    ) -> tuple[str | bool | None, ...]:
        return self._noted(judged(oracle, self.bank.texts(role, first, count), representative), role, first)

    def clusters(self, equivalence: Equivalence, n0: int) -> tuple[Cluster, ...]:
        clusters, answers = cluster_texts(self.bank.texts("select", 0, n0), equivalence)
        self._noted(answers, "select", 0)
        return tuple(clusters)

    @property
    def n_given(self) -> int:
        """Texts that are not empty."""
        return self.tally.total - self.tally.empty

    def check_oracle_works(self, name: str, *, n_calls: int) -> None:
        """Raise if all calls failed: an abstention would hide a broken oracle."""
        if 0 < n_calls == self.tally.failed:
            raise RuntimeError(
                f"the oracle {name!r} failed at each of the {self.n_given} selection texts that are not empty, first "
                f"with {self.tally.first_error!r}; mend it, and ask again"
            )

    def _noted(self, answers: Judged, role: Role, first: int) -> tuple[Any, ...]:
        completions = self.bank.answers(role, first, len(answers.labels))
        self.tally += Tally(
            total=len(answers.labels),
            empty=answers.empty,
            truncated=sum(answer is not None and not answer.finished for answer in completions),
            unlabelled=answers.labels.count(None) - answers.empty,
            failed=answers.failed,
            first_error=answers.first_error,
        )
        return answers.labels


def _most_frequent(labels: Sequence[str | None], known: Sequence[str]) -> tuple[str | None, int]:
    """Label that occurs most often, the first of the known ones among equals, and its number."""
    counts = [labels.count(label) for label in known]
    if not any(counts):
        return None, ABSTAIN
    number = counts.index(max(counts))
    return known[number], number


def _certificate(bank: AnswerBank, verdict: Verdict, number: int, guarantee: Guarantee, **rules: Any) -> Certificate:
    return Certificate(
        **{**vars(verdict), "predicted": ABSTAIN if verdict.predicted == ABSTAIN else number},
        **rules,
        sigma=bank.how.sigma,
        mode="predict",
        guarantee=guarantee,
        seed=bank.how.seed,
        model=bank.vlm.id,
        dtype=str(getattr(bank.vlm, "dtype", torch.float32)).removeprefix("torch."),
        device=bank.image.device.type,
        image_shape=tuple(bank.image.shape),
    )


def _corrected(
    strict: Certificate, number: int, error_model: ErrorModel, *, label: str | None, alpha_rate: float
) -> Certificate:
    """Certificate of the true label from that of the oracle's label, at the votes' share of alpha."""
    if number == ABSTAIN:  # nothing was selected
        return strict
    p_lower = error_model.corrected(strict.p_lower, label=label, alpha=alpha_rate)
    if not 0 <= p_lower <= 1:  # also catches NaN
        raise ValueError(f"the error model {error_model!r} gave the lower bound {p_lower}, which is no probability")
    if p_lower <= 0.5:
        return replace(strict, predicted=ABSTAIN, radius=0.0, p_lower=p_lower)
    return replace(strict, predicted=number, radius=certified_radius(p_lower, strict.sigma), p_lower=p_lower)
