import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from medrobust_lib import metrics
from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.generative.answers import Drawing, collect_answers
from medrobust_lib.generative.certify import certify_answers, certify_questions
from medrobust_lib.generative.errors import ErrorRate, SymmetricErrors, TotalErrors
from medrobust_lib.generative.oracles import ExactMatch, OptionOracle
from medrobust_lib.models.vision_language import Completion
from medrobust_lib.smoothing.certificate import ABSTAIN

ORACLE = OptionOracle({"bright": (), "dark": ()})
RULES = {"n0": 20, "n": 100, "alpha": 0.01}
COLUMNS = [
    *[
        "dataset",
        "image",
        "file",
        "task",
        "question",
        "truth",
        "class_name",
        "answer",
        "answered",
        "label",
        "predicted",
        "predicted_name",
        "confidence",
        "model",
        "oracle",
    ],
    *["guarantee", "n_classes", "sigma", "radius", "p_lower", "k", "n", "n0", "n_max", "alpha", "sampling", "mode"],
    *["seed", "radius_tested", "radius_reach", "n_distinct"],
    *["empty", "truncated", "unlabelled", "failed", "refusal", "seconds"],
]


class Brightness:
    """Says whether the mean pixel is above one half, and nothing about very dark copies."""

    id = "brightness"

    def generate(self, pixels, prompt, **settings):
        means = pixels.mean(dim=(1, 2, 3)).tolist()
        return ["" if mean < 0.05 else "It is bright." if mean > 0.5 else "It is dark." for mean in means]

    def prepare(self, images):
        return torch.stack([torch.from_numpy(image / np.float32(255)).permute(2, 0, 1) for image in images])


def question_set(levels, truths, labels=("dark", "bright")):
    n = len(levels)
    return QuestionSet(
        id="folder:greys",
        task="finding",
        images=np.stack([np.full((8, 8, 3), round(255 * level), dtype=np.uint8) for level in levels]),
        questions=tuple(f"Question {place}?" for place in range(n)),
        truths=truths,
        labels=labels,
        indices=np.arange(n, dtype=np.int64) * 3,
        licence="CC0-1.0",
        provenance={},
    )


@pytest.fixture(scope="module")
def questions():
    """Right, right, wrong, too close to tell, and mostly without any answer."""
    return question_set((0.9, 0.2, 0.8, 0.5, 0.0), ("bright", "dark", "dark", "bright", "dark"))


def collected(questions):
    return collect_answers(Brightness(), questions, Drawing(sigma=0.25), n0=20, n=100)


@pytest.fixture(scope="module")
def banks(questions):
    return collected(questions)


def test_a_row_for_each_question_is_what_certify_answers_says(banks, questions):
    table = certify_questions(banks, questions, ORACLE, **RULES)
    assert list(table.columns) == COLUMNS
    assert list(table.image) == [0, 3, 6, 9, 12]
    assert list(table.question) == list(questions.questions)
    assert list(table.truth) == list(table.class_name) == list(questions.truths)
    assert list(table.file) == [f"image {index}" for index in table.image]
    assert list(table.predicted_name) == list(np.array(["dark", "bright", "abstain"])[table.predicted])
    assert list(table.label) == [1, 0, 0, 1, 0]
    assert list(table.predicted) == [1, 0, 1, ABSTAIN, ABSTAIN]
    for bank, row in zip(banks, table.itertuples(), strict=True):
        found = certify_answers(bank, ORACLE, **RULES)
        for name in ("sigma", "radius", "p_lower", "k", "n", "n0", "n_max", "alpha", "sampling", "mode", "seed"):
            assert getattr(row, name) == getattr(found.composite, name), name
        for name in ("empty", "truncated", "unlabelled", "failed"):
            assert getattr(row, name) == getattr(found.tally, name), name
        assert row.n_distinct == found.n_distinct
        assert row.seconds == bank.seconds > 0
    assert list(table.answer[:3]) == list(table.answered[:3]) == ["bright", "dark", "bright"]
    constants = {"dataset": "folder:greys", "task": "finding", "model": "brightness", "oracle": "option"}
    for column, value in {**constants, "guarantee": "composite", "n_classes": 2, "refusal": ""}.items():
        assert (table[column] == value).all(), column


def test_certified_accuracy_counts_every_image(banks, questions):
    table = certify_questions(banks, questions, ORACLE, **RULES)
    accuracy = metrics.certified_accuracy(table, [0.0, 10.0])
    assert accuracy.certified_accuracy[0] == 0.4
    assert np.isnan(accuracy.certified_accuracy[1])  # a hundred votes do not reach so far
    assert (accuracy.n == 5).all()
    assert (accuracy.chance == 0.5).all()


def test_an_error_model_adds_a_row_for_each_question(banks, questions):
    table = certify_questions(banks, questions, ORACLE, **RULES, error_model=TotalErrors(ErrorRate(0.1)))
    assert list(table.guarantee) == ["composite", "corrected"] * 5
    composite, corrected = (rows.reset_index() for _, rows in table.groupby("guarantee"))
    assert (corrected.radius <= composite.radius).all()
    assert (corrected.radius < composite.radius).any()
    assert metrics.certified_accuracy(table, [0.0]).n.tolist() == [5, 5]
    # All votes agree: q**100 = alpha, and a known share .1 of wrong labels may be among them.
    unanimous = 0.01 ** (1 / 100)
    assert composite.radius_reach[0] == pytest.approx(0.25 * norm.ppf(unanimous))
    assert corrected.radius_reach[0] == pytest.approx(0.25 * norm.ppf(unanimous - 0.1))
    assert (composite.radius_tested == composite.radius_reach).all()


def test_sequential_certificates_are_known_at_the_radii_asked_for_only(banks, questions):
    rules = {**RULES, "sampling": "sequential", "radii": [0.05]}
    table = certify_questions(banks, questions, ORACLE, **rules)
    assert (table.radius_tested == 0.05).all()
    accuracy = metrics.certified_accuracy(table, [0.05, 0.1, 0.2]).certified_accuracy
    assert accuracy.isna().tolist() == [False, True, True]


def test_an_image_at_which_the_error_model_is_refused_counts_as_an_abstention(banks, questions):
    """Left out, it would raise the share of the others."""
    table = certify_questions(banks, questions, ORACLE, **RULES, error_model=SymmetricErrors(ErrorRate(0.3)))
    corrected = table[table.guarantee == "corrected"]
    refused = corrected.refusal.str.contains("the votes prove")
    assert list(refused) == [True, True, True, False, False]
    assert (corrected.predicted[refused] == ABSTAIN).all()
    assert (corrected.loc[refused, ["radius", "p_lower"]] == 0).all(axis=None)
    accuracy = metrics.certified_accuracy(table, [0.0]).set_index("guarantee")
    assert accuracy.n.tolist() == [5, 5]
    assert accuracy.certified_accuracy.tolist() == [0.4, 0.0]


def test_a_reader_gives_the_label_of_a_frozen_representative(banks, questions):
    without = certify_questions(banks, questions, ExactMatch(), **RULES)
    assert list(without.answer[:3]) == list(without.answered[:3]) == ["It is bright.", "It is dark.", "It is bright."]
    assert list(without.predicted[:3]) == [2, 2, 2], "a text that is none of the labels"
    read = certify_questions(banks, questions, ExactMatch(), reader=ORACLE, **RULES)
    assert list(read.answer[:3]) == list(without.answer[:3])
    assert list(read.answered[:3]) == ["bright", "dark", "bright"]
    assert list(read.predicted[:4]) == [1, 0, 1, ABSTAIN]
    assert metrics.certified_accuracy(read, [0.0]).certified_accuracy.tolist() == [0.4]


def test_labels_are_numbered_by_the_questions_whatever_the_order_of_the_oracle(banks, questions):
    for oracle in (ORACLE, OptionOracle({"dark": (), "bright": ()})):
        assert list(certify_questions(banks, questions, oracle, **RULES).predicted[:4]) == [1, 0, 1, ABSTAIN]


def test_a_label_that_no_truth_can_have_is_never_right():
    questions = question_set((0.9, 0.2), ("dark", "dark"), labels=("dark",))
    assert list(certify_questions(collected(questions), questions, ORACLE, **RULES).predicted) == [1, 0]


def test_a_truth_that_nobody_knows():
    questions = question_set((0.9, 0.2), (None, "dark"))
    table = certify_questions(collected(questions), questions, ORACLE, **RULES)
    assert list(table.label) == [-2, 0]
    assert table.truth.isna().tolist() == [True, False]
    with pytest.raises(ValueError, match="labels below 0"):
        metrics.certified_accuracy(table, [0.0])
    assert metrics.certified_accuracy(table[table.label >= 0], [0.0]).certified_accuracy.tolist() == [1.0]


def test_no_selected_answer_is_an_abstention(questions):
    banks = collected(questions)
    banks[0].kept.update({("select", number): Completion("", finished=True) for number in range(20)})
    table = certify_questions(banks, questions, ORACLE, **RULES, reader=ORACLE, error_model=TotalErrors(ErrorRate(0.1)))
    assert [pd.isna(answer) for answer in table.answer[:3]] == [True, True, False]
    assert list(table.predicted[:2]) == [ABSTAIN, ABSTAIN]
    assert metrics.certified_accuracy(table, [0.0]).n.tolist() == [5, 5]


def test_banks_of_other_questions_are_refused(banks, questions):
    with pytest.raises(ValueError, match="4 banks for 5 questions; `collect_answers` gives one for each"):
        certify_questions(banks[:4], questions, ORACLE, **RULES)
    with pytest.raises(
        ValueError, match=r"a bank of \('folder:greys', 3, 'Question 1\?'\) stands where the question is"
    ):
        certify_questions([banks[1], banks[0], *banks[2:]], questions, ORACLE, **RULES)
