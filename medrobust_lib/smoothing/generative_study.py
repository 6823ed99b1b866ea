"""Certificates of a generative model over a set of questions, as one table."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.smoothing.answers import AnswerBank
from medrobust_lib.smoothing.certificate import ABSTAIN
from medrobust_lib.smoothing.generative import certify_answers
from medrobust_lib.smoothing.oracle import Equivalence, Oracle, judged

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
        A row per image, and a second one for its corrected certificate where there is an error model: columns dataset,
        image (index in the split), task, question, truth, answer, answered (the answer's label), label (number of the
        truth, -2 if unknown), predicted (number of the certified label, -1: abstain), model, oracle, guarantee,
        n_classes, sigma, radius, p_lower, k, n, n0, n_max, alpha, sampling, seed, n_distinct, empty, truncated,
        unlabelled, failed, refusal, seconds (of generating the bank). `metrics.certified_accuracy` takes it.
    """
    rows = []
    for bank, position in zip(banks, range(len(questions)), strict=True):
        found = certify_answers(bank, oracle, **rules)
        answered = found.answer if reader is None or found.answer is None else judged(reader, [found.answer]).labels[0]
        truth = questions.truths[position]
        for certificate in filter(None, (found.composite, found.corrected)):
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
                    "n_distinct": found.n_distinct,
                    **{name: getattr(found.tally, name) for name in ("empty", "truncated", "unlabelled", "failed")},
                    "refusal": found.refusal,
                    "seconds": bank.seconds,
                }
            )
    return pd.DataFrame(rows)


def _number(labels: Sequence[str], label: str | None, *, otherwise: int) -> int:
    return labels.index(label) if label in labels else otherwise
