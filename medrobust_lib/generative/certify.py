"""Certificates of what a generative model answers, a label or a cluster of equal texts: of one image, or as a table."""

import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jinja2 import Environment, PackageLoader, Template
from torch import Tensor

from medrobust_lib.checks import check_keywords
from medrobust_lib.data.dataset import ABSTAINED
from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.generative import errors
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
from medrobust_lib.generative.oracles import Cluster, Judged, Tally, cluster_texts, judged
from medrobust_lib.models.vision_language import Completion
from medrobust_lib.smoothing.bounds import ALPHA, FEW_N, FEW_N0, certified_radius, maximum_radius, needed_probability
from medrobust_lib.smoothing.certificate import ABSTAIN, GUARANTEES, Certificate, Guarantee, Sampling
from medrobust_lib.smoothing.certify import Rules, Verdict, make_certificate, take_votes
from medrobust_lib.smoothing.noise import NoiseStream, Role

ALPHA_SHARE = 0.5  # of alpha, spent on an error rate that is estimated
_UNKNOWN = -2  # number of a truth that nobody knows; no certificate predicts it
_COPIED = ("sigma", "radius", "p_lower", "k", "n", "n0", "n_max", "alpha", "sampling", "mode", "seed")
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
    caveats : tuple of str
        What must be said of the model, such as that its answers may depend on their batch.
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
    caveats: tuple[str, ...] = ()

    def __str__(self) -> str:
        return _template().render(found=self).rstrip()

    def about(self, certificate: Certificate) -> str:
        """One of the two certificates in words that name its answer instead of a class number."""
        return _template().make_module({"found": self}).about(self, certificate).strip()


def _template() -> Template:
    words = Environment(loader=PackageLoader("medrobust_lib"), trim_blocks=True, lstrip_blocks=True, autoescape=False)
    words.globals["guarantees"] = GUARANTEES
    words.filters |= {"repr": repr, "shorten": partial(textwrap.shorten, width=80, placeholder=" ...")}
    return words.get_template("certificate.txt.j2")


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
    of_drawing = {field.name for field in fields(Drawing)}
    check_keywords(certify_generative, settings, [*of_drawing, *inspect.signature(certify_answers).parameters])
    drawing = of_drawing & settings.keys()
    how = Drawing(sigma=sigma, **{name: settings.pop(name) for name in drawing})
    bank = AnswerBank(vlm, image, prompt, how, dataset=dataset, index=index, batch_size=batch_size)
    if store is None:
        return certify_answers(bank, oracle, **settings)
    with open_answers(store, vlm, how, dataset=dataset, prompts=[prompt]) as opened:
        bank.kept = StoredAnswers(opened, bank)
        return certify_answers(bank, oracle, **settings)


def certify_answers(
    bank: AnswerBank,
    oracle: Oracle | Equivalence,
    *,
    n0: int = FEW_N0,
    n: int = FEW_N,
    alpha: float = ALPHA,
    error_model: errors.ErrorModel | None = None,
    alpha_share: float = ALPHA_SHARE,
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
    errors.check_error_model(error_model)
    if sampling == "fixed" and radii is not None:
        raise ValueError(f"radii={radii!r}: only sampling='sequential' takes radii of interest; leave them out")
    labelled = callable(getattr(oracle, "label", None))
    # Errors of the oracle are taken off p_lower, and all answers but one count alike: one bound, above one half.
    rules = Rules(n0=n0, n=n, alpha=alpha, sampling=sampling, radii=radii, bounds="one")
    _check_number_of_labels(error_model, len(oracle.labels) if labelled else 2, oracle.name)
    alpha_votes, alpha_rate = errors.split_alpha(error_model, alpha, share=alpha_share)
    plans = [replace(rules, alpha=level).plan(bank.how.sigma) for level in (alpha, alpha_votes)]
    clusters: list[Cluster] = []
    drawn = bank.texts("select", 0, n0)
    if labelled:
        readings = [judged(oracle, drawn)]
        answer, number = _most_frequent(readings[0].labels, oracle.labels)
    else:
        clusters, read = cluster_texts(drawn, oracle)
        readings = [read]
        largest = max(clusters, key=lambda cluster: cluster.size, default=None)  # the first one among equals
        answer, number = (None, ABSTAIN) if largest is None else (largest.representative, _TESTED)
    _check_oracle_works(readings[0], oracle.name, labelled=labelled)

    def votes(role: Role, first: int, count: int, positions: Sequence[int]) -> list[Tensor]:
        readings.append(judged(oracle, bank.texts(role, first, count), None if labelled else answer))
        found = readings[-1].labels
        hits = [label == answer for label in found] if labelled else found
        drawn = torch.tensor([_TESTED if hit else ABSTAIN for hit in hits], dtype=torch.int64)
        return [drawn for _ in positions]

    verdicts = [Verdict() for _ in plans]
    if answer is not None:
        verdicts = take_votes(votes, plans, n0=n0, label=_TESTED, bounds="one")
    n_drawn = max(verdict.n for verdict in verdicts)
    composite = _certificate(bank, verdicts[0], number, "composite", rules)
    corrected, refusal = None, ""
    if error_model is not None:
        strict = _certificate(bank, verdicts[1], number, "corrected", rules)
        tested = answer if labelled else errors.SAME
        try:
            corrected = _corrected(strict, number, error_model, label=tested, alpha_rate=alpha_rate or alpha)
        except errors.InconsistentErrorRateError as error:
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
        tally=_tally(bank.answers("select", 0, n0) + bank.answers("estimate", 0, n_drawn), readings),
        n_distinct=len(set(bank.texts("estimate", 0, composite.n))),
        clusters=tuple(clusters),
        caveats=tuple(getattr(bank.vlm, "caveats", ())),
    )


def certify_questions(
    banks: Sequence[AnswerBank],
    questions: QuestionSet,
    oracle: Oracle | Equivalence,
    *,
    reader: Oracle | None = None,
    **rules: Any,
) -> pd.DataFrame:
    """Certify the answers to every question of a set.

    Parameters
    ----------
    banks : sequence of AnswerBank
        From `collect_answers`, one for each question.
    questions : QuestionSet
    oracle : Oracle or Equivalence
    reader : Oracle, optional
        Reads the label of a frozen representative, to compare it with the truth; a label oracle needs none.
    **rules
        n0, n, alpha, error_model, alpha_share, sampling and radii of `certify_answers`.

    Returns
    -------
    DataFrame
        A row per image, and a second one for its corrected certificate where there is an error model (an abstention
        if the model was refused, so that the image counts): columns dataset,
        image (index in the split), file, patient (where known), task, question, truth (class_name is the same), answer,
        answered (the answer's label), label (number of the truth, -2 if unknown), predicted (number of the certified
        label, -1: abstain), predicted_name, confidence (k / n), model, oracle, guarantee,
        n_classes, sigma, radius, radius_tested (the largest that was asked for), radius_reach (the largest that n_max
        votes for this label can prove; both NaN where the error model leaves none), p_lower, k, n, n0, n_max, alpha,
        sampling, seed, n_distinct, empty, truncated, unlabelled, failed, refusal, seconds (of generating the bank).
        `metrics.certified_accuracy` takes its rows of known truth.

    Raises
    ------
    ValueError
        A bank of another question, or as `certify_answers`.
    """
    check_keywords(certify_questions, rules, inspect.signature(certify_answers).parameters)
    _check_banks(banks, questions)
    labelled = callable(getattr(oracle, "label", None))
    rows = []
    patients = [{"patient": patient} for patient in questions.groups] or [{}] * len(questions)
    for bank, truth, file, patient in zip(banks, questions.truths, questions.files, patients, strict=True):
        found = certify_answers(bank, oracle, **rules)
        answered = found.answer if reader is None or found.answer is None else judged(reader, [found.answer]).labels[0]
        for certificate in _certificates(found):
            rows.append(
                {
                    "dataset": questions.id,
                    "image": bank.index,
                    "file": file,
                    **patient,
                    "task": questions.task,
                    "question": bank.prompt,
                    "truth": truth,
                    "class_name": truth,
                    "answer": found.answer,
                    "answered": answered,
                    "label": _number(questions.labels, truth, otherwise=_UNKNOWN),
                    "predicted": ABSTAIN
                    if certificate.abstained
                    else _number(questions.labels, answered, otherwise=len(questions.labels)),
                    "predicted_name": ABSTAINED if certificate.abstained else answered,
                    "confidence": certificate.k / certificate.n if certificate.n else None,
                    "model": certificate.model,
                    "oracle": found.oracle,
                    "guarantee": certificate.guarantee,
                    "n_classes": len(questions.labels),
                    **{name: getattr(certificate, name) for name in _COPIED},
                    **_limits(certificate, found.answer if labelled else errors.SAME, rules),
                    "n_distinct": found.n_distinct,
                    **{name: getattr(found.tally, name) for name in ("empty", "truncated", "unlabelled", "failed")},
                    "refusal": found.refusal,
                    "seconds": bank.seconds,
                }
            )
    return pd.DataFrame(rows)


def _check_number_of_labels(error_model: errors.ErrorModel | None, n_labels: int, name: str) -> None:
    """Refuse symmetric errors over more or fewer labels than there are: the correction would promise too much."""
    if isinstance(error_model, errors.SymmetricErrors) and error_model.n_labels != n_labels:
        raise ValueError(
            f"the error model exchanges {error_model.n_labels} labels, the oracle {name!r} has {n_labels}; "
            f"use SymmetricErrors(..., n_labels={n_labels}), or FalsePositives, which needs no number of labels"
        )


def _tally(drawn: Sequence[Completion | None], readings: Sequence[Judged]) -> Tally:
    """What became of answers that an oracle has read in several parts."""
    return Tally(
        total=len(drawn),
        empty=sum(part.empty for part in readings),
        truncated=sum(answer is not None and not answer.finished for answer in drawn),
        unlabelled=sum(part.labels.count(None) - part.empty for part in readings),
        failed=sum(part.failed for part in readings),
        first_error=next((part.first_error for part in readings if part.failed), ""),
    )


def _check_oracle_works(read: Judged, name: str, *, labelled: bool) -> None:
    """Raise if all calls failed: an abstention would hide a broken oracle."""
    n_texts = len(read.labels) - read.empty
    # An equivalence that always fails has compared every text with itself and all that came after it.
    n_calls = n_texts if labelled else n_texts * (n_texts + 1) // 2
    if 0 < n_calls == read.failed:
        raise RuntimeError(
            f"the oracle {name!r} failed at each of the {n_texts} selection texts that are not empty, first "
            f"with {read.first_error!r}; mend it, and ask again"
        )


def _most_frequent(labels: Sequence[str | None], known: Sequence[str]) -> tuple[str | None, int]:
    """Label that occurs most often, the first of the known ones among equals, and its number."""
    number = max(range(len(known)), key=lambda place: labels.count(known[place]))
    return (known[number], number) if known[number] in labels else (None, ABSTAIN)


def _certificate(bank: AnswerBank, verdict: Verdict, number: int, guarantee: Guarantee, rules: Rules) -> Certificate:
    named = verdict if verdict.predicted == ABSTAIN else replace(verdict, predicted=number)
    stream = NoiseStream(bank.how.seed, bank.dataset, bank.index, bank.how.sigma, "estimate")
    return make_certificate(named, rules, stream, guarantee=guarantee, classifier=bank.vlm, image=bank.image)


def _corrected(
    strict: Certificate, number: int, error_model: errors.ErrorModel, *, label: str | None, alpha_rate: float
) -> Certificate:
    """Certificate of the true label from that of the oracle's label, at the votes' share of alpha."""
    if number == ABSTAIN:  # nothing was selected
        return strict
    p_lower = error_model.corrected(strict.p_lower, label=label, alpha=alpha_rate)
    if not 0 <= p_lower <= 1:  # also catches NaN
        raise ValueError(f"the error model {error_model!r} gave the lower bound {p_lower}, which is no probability")
    if p_lower <= 0.5:
        return replace(strict, predicted=ABSTAIN, radius=0.0, p_lower=p_lower, p_upper=1 - p_lower)
    radius = certified_radius(p_lower, strict.sigma)
    return replace(strict, predicted=number, radius=radius, p_lower=p_lower, p_upper=1 - p_lower)


def _certificates(found: GenerativeCertificate) -> list[Certificate]:
    if found.corrected is not None:
        return [found.composite, found.corrected]
    if not found.refusal:
        return [found.composite]
    refused = replace(found.composite, predicted=ABSTAIN, radius=0.0, p_lower=0.0, p_upper=1.0, guarantee="corrected")
    return [found.composite, refused]


def _limits(certificate: Certificate, label: str | None, asked: Mapping[str, Any]) -> dict[str, float]:
    """Largest radii that were asked for and that unanimous votes for a label would prove."""
    rate = asked.get("error_model") if certificate.guarantee == "corrected" else None
    sigma, n, alpha = certificate.sigma, certificate.n_max, certificate.alpha
    alpha_votes, alpha_rate = errors.split_alpha(rate, alpha, share=asked.get("alpha_share", ALPHA_SHARE))
    rules = Rules(n=n, alpha=alpha_votes, sampling=certificate.sampling, radii=asked.get("radii"), bounds="one")
    largest = {
        "radius_tested": rules.plan(sigma).largest_radius,
        "radius_reach": maximum_radius(n, alpha_votes, sigma),
    }
    if rate is None:
        return largest
    if label is None:
        return dict.fromkeys(largest, float("nan"))
    try:
        proved = [
            rate.corrected(float(needed_probability(radius, sigma)), label=label, alpha=alpha_rate or alpha)
            for radius in largest.values()
        ]
    except errors.InconsistentErrorRateError:  # fewer votes than all would be believed
        return dict.fromkeys(largest, float("nan"))
    return {name: float(certified_radius(max(p, 0.0), sigma)) for name, p in zip(largest, proved, strict=True)}


def _check_banks(banks: Sequence[AnswerBank], questions: QuestionSet) -> None:
    asked = [(bank.dataset, bank.index, bank.prompt) for bank in banks]
    wanted = [
        (questions.id, int(index), prompt) for index, prompt in zip(questions.indices, questions.questions, strict=True)
    ]
    if len(asked) != len(wanted):
        raise ValueError(f"{len(asked)} banks for {len(wanted)} questions; `collect_answers` gives one for each")
    for found, right in zip(asked, wanted, strict=True):
        if found != right:
            raise ValueError(f"a bank of {found} stands where the question is {right}; keep the order of the questions")


def _number(labels: Sequence[str], label: str | None, *, otherwise: int) -> int:
    return labels.index(label) if label in labels else otherwise
