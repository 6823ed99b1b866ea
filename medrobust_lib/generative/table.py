"""Certificates of a generative model over a set of questions, as one table."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.generative.answers import AnswerBank
from medrobust_lib.generative.certify import GenerativeCertificate, certify_answers
from medrobust_lib.generative.errors import SAME, ErrorModel, InconsistentErrorRateError, split_alpha
from medrobust_lib.generative.oracles import (
    Equivalence,
    Oracle,
    judged,
)
from medrobust_lib.smoothing.bounds import certified_radius, maximum_radius, needed_probability
from medrobust_lib.smoothing.certificate import ABSTAIN, Certificate
from medrobust_lib.smoothing.certify import make_plan

_UNKNOWN = -2  # number of a truth that nobody knows; no certificate predicts it
_COPIED = ("sigma", "radius", "p_lower", "k", "n", "n0", "n_max", "alpha", "sampling", "mode", "seed")


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
        image (index in the split), task, question, truth, answer, answered (the answer's label), label (number of the
        truth, -2 if unknown), predicted (number of the certified label, -1: abstain), model, oracle, guarantee,
        n_classes, sigma, radius, radius_tested (the largest that was asked for), radius_reach (the largest that n_max
        votes for this label can prove; both NaN where the error model leaves none), p_lower, k, n, n0, n_max, alpha,
        sampling, seed, n_distinct, empty, truncated, unlabelled, failed, refusal, seconds (of generating the bank).
        `metrics.certified_accuracy` takes its rows of known truth.

    Raises
    ------
    ValueError
        A bank of another question, or as `certify_answers`.
    """
    _check_banks(banks, questions)
    rows = []
    for bank, truth in zip(banks, questions.truths, strict=True):
        found = certify_answers(bank, oracle, **rules)
        answered = found.answer if reader is None or found.answer is None else judged(reader, [found.answer]).labels[0]
        for certificate in _certificates(found):
            rows.append(
                {
                    "dataset": questions.id,
                    "image": bank.index,
                    "task": questions.task,
                    "question": bank.prompt,
                    "truth": truth,
                    "answer": found.answer,
                    "answered": answered,
                    "label": _number(questions.labels, truth, otherwise=_UNKNOWN),
                    "predicted": ABSTAIN
                    if certificate.abstained
                    else _number(questions.labels, answered, otherwise=len(questions.labels)),
                    "model": certificate.model,
                    "oracle": found.oracle,
                    "guarantee": certificate.guarantee,
                    "n_classes": len(questions.labels),
                    **{name: getattr(certificate, name) for name in _COPIED},
                    **_limits(certificate, found.answer if callable(getattr(oracle, "label", None)) else SAME, **rules),
                    "n_distinct": found.n_distinct,
                    **{name: getattr(found.tally, name) for name in ("empty", "truncated", "unlabelled", "failed")},
                    "refusal": found.refusal,
                    "seconds": bank.seconds,
                }
            )
    return pd.DataFrame(rows)


def _certificates(found: GenerativeCertificate) -> list[Certificate]:
    if found.corrected is not None:
        return [found.composite, found.corrected]
    if not found.refusal:
        return [found.composite]
    refused = replace(found.composite, predicted=ABSTAIN, radius=0.0, p_lower=0.0, guarantee="corrected")
    return [found.composite, refused]


def _limits(
    certificate: Certificate,
    label: str | None,
    *,
    error_model: ErrorModel | None = None,
    alpha_share: float = 0.5,
    radii: Sequence[float] | None = None,
    **_: Any,
) -> dict[str, float]:
    """Largest radii that were asked for and that unanimous votes for a label would prove."""
    rate = error_model if certificate.guarantee == "corrected" else None
    sigma, n, alpha = certificate.sigma, certificate.n_max, certificate.alpha
    alpha_votes, alpha_rate = split_alpha(rate, alpha, share=alpha_share)
    plan = make_plan(certificate.sampling, sigma=sigma, radii=radii, n=n, alpha=alpha_votes)
    largest = {"radius_tested": plan.largest_radius, "radius_reach": maximum_radius(n, alpha_votes, sigma)}
    if rate is None:
        return largest
    if label is None:
        return dict.fromkeys(largest, float("nan"))
    try:
        proved = [
            rate.corrected(float(needed_probability(radius, sigma)), label=label, alpha=alpha_rate or alpha)
            for radius in largest.values()
        ]
    except InconsistentErrorRateError:  # fewer votes than all would be believed
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
