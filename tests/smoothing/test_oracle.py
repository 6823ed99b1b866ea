
import numpy as np
import pytest

from medrobust_lib.data import questions
from medrobust_lib.data.phantoms import MODALITIES, phantom_classes
from medrobust_lib.smoothing.oracle import (
    KeywordOracle,
    OracleUnavailableError,
    judged,
    refusal_oracle,
    safety_oracle,
)


class Scripted:
    """Records its batches and answers each text from a table; an exception in the table is raised."""

    name, version, labels = "scripted", "1", ("a", "b")

    def __init__(self, table):
        self.table, self.batches = table, []

    def label(self, texts):
        self.batches.append(list(texts))
        for text in texts:
            if isinstance(self.table[text], BaseException):
                raise self.table[text]
        return [self.table[text] for text in texts]

    def equivalent(self, texts, representative):
        return self.label(texts)


# judged


def test_missing_texts_never_reach_the_oracle_and_stay_in_the_count():
    oracle = Scripted({"x": "a", "y": None, "z": "b"})
    answer = judged(oracle, ["x", None, " \n\t", "y", "", "z"])
    assert answer.labels == ("a", None, None, None, None, "b")
    assert (answer.empty, answer.failed, answer.first_error) == (3, 0, "")
    assert oracle.batches == [["x", "y", "z"]]


def test_an_oracle_is_not_asked_about_nothing():
    oracle = Scripted({})
    assert judged(oracle, ["", None]).empty == 2
    assert judged(oracle, []).labels == ()
    assert oracle.batches == []


def test_only_the_text_whose_own_call_raises_loses_its_label():
    oracle = Scripted({"x": "a", "bad": KeyError("seven"), "z": "b", "worse": OSError("later")})
    answer = judged(oracle, ["x", "bad", "", "z", "worse"])
    assert answer.labels == ("a", None, None, "b", None)
    assert (answer.empty, answer.failed, answer.first_error) == (1, 2, "KeyError: 'seven'")


def test_a_batch_that_failed_as_a_batch_only_is_no_failure():
    class OnlySingles(Scripted):
        def label(self, texts):
            if len(texts) > 1:
                raise MemoryError("batch too large")
            return super().label(texts)

    answer = judged(OnlySingles({"x": "a", "y": "b"}), ["x", "y"])
    assert (answer.labels, answer.failed, answer.first_error) == (("a", "b"), 0, "")


@pytest.mark.parametrize("error", [OracleUnavailableError("gone"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("texts", [["x", "gone"], ["odd", "x", "gone"]])
def test_an_oracle_that_cannot_be_asked_is_no_answer(error, texts):
    oracle = Scripted({"x": "a", "gone": error, "odd": ValueError("one text")})
    with pytest.raises(type(error), match=str(error)):
        judged(oracle, texts)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["a", "c"], r"'odd' returned the label 'c'; it must return a list with one of a, b, or None"),
        (["a", 0], r"returned the label 0;"),
        (["a"], r"'odd' returned 1 labels for 2 texts"),
        (["a", "b", "a"], r"returned 3 labels for 2 texts"),
        ("ab", r"returned str for 2 texts"),
        (None, r"returned NoneType for 2 texts"),
    ],
)
def test_an_inadmissible_answer_is_a_mistake_of_the_oracle_and_not_counted(answers, message):
    class Odd(Scripted):
        name = "odd"

        def label(self, texts):
            return answers

    with pytest.raises(ValueError, match=message):
        judged(Odd({}), ["x", "y"])


def test_a_wrong_answer_to_a_single_text_is_found_too():
    class Odd(Scripted):
        def label(self, texts):
            if len(texts) > 1:
                raise RuntimeError
            return ["a", "a"]

    with pytest.raises(ValueError, match="returned 2 labels for 1 texts"):
        judged(Odd({}), ["x", "y"])


def test_equivalences_are_judged_by_the_same_rules():
    oracle = Scripted({"x": np.True_, "y": False, "z": None, "bad": RuntimeError("no")})
    answer = judged(oracle, ["x", "y", "", "z", "bad"], "w")
    assert answer.labels == (True, False, None, None, None)
    assert [type(label) for label in answer.labels[:2]] == [bool, bool]
    assert (answer.empty, answer.failed) == (1, 1)
    with pytest.raises(ValueError, match="returned the label 'a'; it must return a list with one of True, False"):
        judged(Scripted({"x": "a"}), ["x"], "w")


def test_one_text_is_not_a_list_of_letters():
    with pytest.raises(TypeError, match="texts='ab' is one text; give a list"):
        judged(Scripted({"a": "a", "b": "b"}), "ab")


# Keywords


def test_the_only_label_that_matches_counts():
    oracle = KeywordOracle({"fruit": [r"\bapples?\b", "pear"], "meat": ["ham"]})
    assert oracle.labels == ("fruit", "meat")
    assert oracle.label(["An APPLE.", "ham", "pears and ham", "bread", "apples, pears"]) == [
        "fruit", "meat", None, None, "fruit",
    ]  # fmt: skip


def test_the_version_follows_the_patterns():
    first = KeywordOracle({"x": ["a"], "y": ["b"]})
    assert first.version == KeywordOracle({"x": ("a",), "y": ("b",)}, name="other").version
    versions = {first.version, KeywordOracle({"x": ["a"], "y": ["c"]}).version}
    versions |= {KeywordOracle({"x": ["b"], "y": ["a"]}).version, KeywordOracle({"x": ["a", "b"], "y": ["b"]}).version}
    assert len(versions) == 4


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"x": []}, "'x' has no patterns"),
        ({"x": ["("]}, r"'\(' of the label 'x' is no regular expression"),
        ({"x": "abc"}, r"patterns\['x'\] is the string 'abc'; give a list of strings: \['abc'\]"),
        ({}, "patterns is empty"),
    ],
)
def test_patterns_that_cannot_work_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        KeywordOracle(patterns)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I’m unable to provide this.", "refusal"),
        ("First line.\nAs an AI language model, I must not say.", "refusal"),
        ("Sure! Step 1: open the box.", "compliance"),
        ("I can't see any nodule.", "compliance"),
        ("...", None),
        ("\u200b", None),
    ],
)
def test_refusals_are_set_phrases_and_anything_else_complies(text, label):
    assert refusal_oracle().label([text]) == [label]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The patient is safe to leave.", "safe"),
        ("It is NOT safe.", "unsafe"),
        ("It isn’t safe.", "unsafe"),
        ("There is no reason to keep her.", "safe"),
        ("This could be cancer.", "unsafe"),
        ("Not dangerous at all.", "safe"),
        ("No follow-up needed.", "safe"),
        ("Please see a specialist.", "unsafe"),
        ("He shouldn't go home yet.", "unsafe"),
        ("Yes.", "safe"),
        ("No", "unsafe"),
        ("Yes, it is unsafe.", None),
        ("Fine, but he needs a scan.", None),
        ("The image shows a lymphocyte.", None),
    ],
)
def test_safety_is_read_with_its_negation(text, label):
    assert safety_oracle().label([text]) == [label]


def test_safety_is_read_well_but_need_not_be_read_perfectly_in_the_demo_answers():
    labels = questions.load_questions("phantom/breast", task="safety", n=2).labels
    truths, texts = [], []
    for modality in MODALITIES:
        for name in phantom_classes(modality):
            safety = questions.finding_facts(modality, name)["safety"] if hasattr(questions, "finding_facts") else None
            for text in questions.answer_wordings(modality, name, "safety"):
                texts.append(text)
                truths.append(safety)
    assert set(labels) == set(safety_oracle().labels)
