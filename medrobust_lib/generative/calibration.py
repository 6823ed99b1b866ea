"""What a study of questions measures first: how often its oracle errs on the model's texts, what fewer draws cost."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.generative.answers import AnswerBank, Drawing, Equivalence, Oracle, answer_once
from medrobust_lib.generative.certify import certify_questions
from medrobust_lib.generative.errors import Calibration, calibrate_oracle
from medrobust_lib.smoothing.bounds import ALPHA, FEW_N0, radius_ratio_rule


def calibrate_on_answers(
    vlm: Any,
    questions: QuestionSet,
    how: Drawing,
    oracle: Oracle,
    *,
    reference: Mapping[str, str],
    certified: QuestionSet,
) -> Calibration:
    """Count an oracle's errors on the model's own answers to one noisy copy of each image that is not certified.

    The error model that follows, ``calibrate_on_answers(...).one_sided()``, assumes that texts for the certified images
    are misread no more often than these; nothing here tests that.

    Parameters
    ----------
    vlm : GenerativeModel
        With ``prepare``.
    questions : QuestionSet
        Other images, or other questions about the same ones, than are certified.
    how : Drawing
        As for the certified answers. The noise has an address of its own: no certificate sees it.
    oracle : Oracle
    reference : mapping of str to str
        What an ideal reader calls a text, one of the oracle's labels: known wordings, or what a person wrote beside the
        answers. Texts that it lacks are of unknown truth, and count against the oracle (`Calibration`).
    certified : QuestionSet
        What is, or will be, certified.

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError
        A question about the same image is certified too, or the reference has a label that the oracle does not have.
    """
    shared = _asked(questions) & _asked(certified)
    if shared:
        raise ValueError(
            f"{len(shared)} of the {len(questions)} questions of {questions.id} are certified too; calibrate on other "
            "images, such as those of split='val'"
        )
    texts = answer_once(vlm, questions, **asdict(how))
    return calibrate_oracle(oracle, texts, [reference.get(text) for text in texts])


def compare_draws(
    banks: Sequence[AnswerBank],
    questions: QuestionSet,
    oracle: Oracle | Equivalence,
    *,
    counts: Sequence[int],
    reader: Oracle | None = None,
    n0: int = FEW_N0,
    alpha: float = ALPHA,
) -> pd.DataFrame:
    """Certify one bank of answers with several numbers of draws.

    Each certificate is valid on its own; they share their first draws, so they err together.

    Parameters
    ----------
    banks, questions, oracle, reader
        As in `certify_questions`, whose oracle is asked once for every number of draws.
    counts : sequence of int
        Estimation draws, such as 10 to 1000; answers that the banks lack are drawn.
    n0 : int
    alpha : float in (0, 1)

    Returns
    -------
    DataFrame
        A row for each n, the fewest first: n, questions, certified (how many do not abstain), certified_accuracy (share
        of the questions of known truth, NaN without any), mean_radius (abstentions are 0), certified_ratio,
        accuracy_ratio and radius_ratio (to those of the most draws), rule (share of the ideal radius,
        1 - 1.64 z / sqrt(n)), rule_ratio (to the rule for the most draws) and seconds (a question, for n0 + n answers
        in one process at the speed of the answers that were drawn and not read from a folder, NaN without any).

    Raises
    ------
    ValueError
        No counts, an n that can never certify, or as `certify_questions`.

    References
    ----------
    Seferis et al. 2025, arXiv:2509.16088, Corollary 5.4.
    """
    if not len(counts):
        raise ValueError("counts is empty; give numbers of estimation draws, such as [100, 1000]")
    rules = {"reader": reader, "n0": n0, "alpha": alpha}
    tables = [certify_questions(banks, questions, oracle, n=n, **rules) for n in sorted(set(counts))]
    drawn = sum(bank.drawn for bank in banks)
    each = sum(bank.seconds for bank in banks) / drawn if drawn else float("nan")
    found = by_draws(pd.concat(tables))
    return found.assign(seconds=each * (n0 + found.n))


def by_draws(rows: pd.DataFrame) -> pd.DataFrame:
    """What fewer draws leave, from the certificates of the same questions with several numbers of draws.

    Parameters
    ----------
    rows : DataFrame
        As from `certify_questions`, one guarantee.

    Returns
    -------
    DataFrame
        As from `compare_draws`, without seconds.
    """
    rows = rows.assign(certified=rows.predicted >= 0, right=(rows.predicted == rows.label).where(rows.truth.notna()))
    means = {
        "questions": ("image", "size"), "certified": ("certified", "sum"),
        "certified_accuracy": ("right", lambda right: right.astype(float).mean()), "mean_radius": ("radius", "mean"),
        "rule": ("alpha", "first"),
    }  # fmt: skip
    found = rows.groupby("n_max").agg(**means).rename_axis("n").reset_index()
    found["rule"] = [float(radius_ratio_rule(n, alpha)) for n, alpha in zip(found.n, found.rule, strict=True)]
    largest = found.iloc[-1].where(found.iloc[-1] > 0)  # a ratio to nothing is unknown
    ratios = {"certified_ratio": "certified", "accuracy_ratio": "certified_accuracy", "radius_ratio": "mean_radius"}
    ratios["rule_ratio"] = "rule"
    return found.assign(**{ratio: found[of] / largest[of] for ratio, of in ratios.items()})


def _asked(questions: QuestionSet) -> set[tuple[str, bytes]]:
    """Each question with the content of its image: splits of one data set number their images alike."""
    images = (np.ascontiguousarray(image) for image in questions.images)
    return {
        (prompt, hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest())
        for prompt, image in zip(questions.questions, images, strict=True)
    }
