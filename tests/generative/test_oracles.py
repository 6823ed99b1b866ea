import pickle

import numpy as np
import pytest
import torch

from medrobust_lib.data import questions
from medrobust_lib.generative.judges import EmbeddingEquivalence
from medrobust_lib.generative.oracles import (
    ExactMatch,
    KeywordOracle,
    OptionOracle,
    OracleUnavailableError,
    SameLabel,
    action_oracle,
    finding_oracle,
    judged,
    refusal_oracle,
    safety_oracle,
)
from medrobust_lib.phantoms import MODALITIES


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
        (np.array([0.5, np.nan]), "returned the label 0.5"),
        (np.array([["a"], ["b"]]), r"returned the label \['a'\]"),
    ],
)
def test_an_inadmissible_answer_is_a_mistake_of_the_oracle_and_not_counted(answers, message):
    class Odd(Scripted):
        name = "odd"

        def label(self, texts):
            return answers

    with pytest.raises(ValueError, match=message):
        judged(Odd({}), ["x", "y"])


@pytest.mark.parametrize("answers", [np.array(["a", "b"]), np.array(["a", "b"], dtype=object), ("a", "b")])
def test_labels_may_come_in_an_array(answers):
    class Even(Scripted):
        def label(self, texts):
            return answers

    assert judged(Even({}), ["x", "y"]).labels == ("a", "b")


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
    texts = ["An APPLE.", "ham", "pears and ham", "bread", "apples, pears"]
    assert oracle.label(texts) == ["fruit", "meat", None, None, "fruit"]


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


@pytest.mark.parametrize(("name", "truth"), [("benign", "safe"), ("malignant", "unsafe")])
def test_nine_in_ten_of_the_demo_answers_are_read_rightly(name, truth):
    texts = questions.answer_wordings("breast", name, "safety")
    assert safety_oracle().label(texts).count(truth) >= 0.9 * len(texts)


@pytest.mark.parametrize("text", ["the patient is not " * 3000, "I can't " * 3000, "no, " * 3000, "a" * 50_000])
def test_long_texts_take_no_quadratic_time(text):
    # Not timed: with a quadratic pattern this test would run for minutes.
    assert len(safety_oracle().label([text]) + refusal_oracle().label([text])) == 2


# Options


CELLS = OptionOracle({"lymphocyte": ["small round cell"], "lymphocytes": [], "normal": ["healthy"], "abnormal": []})


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("I see a Lymphocyte.", "lymphocyte"),
        ("Lymphocytes!", "lymphocytes"),
        ("a small\n  round cell", "lymphocyte"),
        ("This is abnormal.", "abnormal"),
        ("normal", "normal"),
        ("non-normal, normal-looking", None),
        ("normal or abnormal", None),
        ("normal, that is, healthy", "normal"),
        ("subnormality", None),
    ],
)
def test_options_are_whole_words(text, label):
    assert CELLS.label([text]) == [label]


def test_the_longest_name_wins_where_one_contains_the_other():
    oracle = OptionOracle({"retina": [], "healthy": ["healthy retina of the eye"], "lens": ["of the eye lens"]})
    assert oracle.label(["a retina", "a healthy retina of the eye", "a healthy retina"]) == ["retina", "healthy", None]
    # Two names that overlap without one containing the other are both named.
    assert oracle.label(["healthy retina of the eye lens"]) == [None]


def test_letters_stand_for_no_option():
    assert OptionOracle({"yes": [], "no": []}).label(["(B)"]) == [None]


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"x": ["The  Same"], "y": ["the same"]}, {}, "'the same' names the options 'x' and 'y'"),
        ({"x": ["y"], "y": []}, {}, "'y' names the options 'x' and 'y'"),
        ({"x": [" "]}, {}, "'x' has a blank name or none at all"),
        ({"x": []}, {"use_names": False}, "'x' has a blank name or none at all"),
        ({"x": "abc"}, {}, r"options\['x'\] is the string 'abc'"),
        ({}, {}, "options is empty"),
    ],
)
def test_options_that_cannot_work_are_refused(options, settings, message):
    with pytest.raises(ValueError, match=message):
        OptionOracle(options, **settings)


def test_every_setting_of_options_is_in_the_version():
    options = {"x": ["a"], "y": ["b"]}
    oracles = [OptionOracle(options), OptionOracle(options, use_names=False)]
    assert len({oracle.version for oracle in [*oracles, OptionOracle({"x": ["a"], "y": ["c"]})]}) == 3


def test_an_action_is_its_token_and_not_the_word():
    oracle = action_oracle()
    assert oracle.labels == questions.actions()
    assert oracle.label([questions.action_token(action) for action in oracle.labels]) == list(oracle.labels)
    assert oracle.label(["refer", "<refer><treat>", "I choose <refer>."]) == [None, None, "refer"]


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_right_finding_of_the_demo_is_read(modality):
    oracle = finding_oracle(modality)
    assert oracle.labels == tuple(questions.finding_phrases(modality))
    for name in oracle.labels:
        texts = questions.answer_wordings(modality, name, "finding")
        assert set(oracle.label(texts)) == {name}


def test_an_unknown_modality_is_named():
    with pytest.raises(ValueError, match="unknown modality 'bloods'; choose one of .*; did you mean 'blood'"):
        finding_oracle("bloods")


# Equivalences


ANGLES = {"same": 0, "near": 20, "far": 90, "opposite": 180}


def encode(texts):
    radians = np.deg2rad([ANGLES.get(text, 45) for text in texts])
    rows = 3 * np.stack([np.cos(radians), np.sin(radians)], axis=1)
    rows[[text == "zero" for text in texts]] = 0
    rows[[text == "nan" for text in texts]] = np.nan
    return rows


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda rows: torch.tensor(rows, dtype=torch.float32)])
def test_embeddings_are_compared_by_their_cosine_and_need_no_unit_norm(kind):
    texts = ["same", "near", "far", "opposite", "zero", "nan"]
    answers = {}
    for threshold in (-0.999, 0.93, 0.94, 1):
        equivalence = EmbeddingEquivalence(lambda texts: kind(encode(texts)), threshold, name="e", version="1")
        answers[threshold] = equivalence.equivalent(texts, "same")
    assert np.cos(np.deg2rad(20)) == pytest.approx(0.9397, abs=1e-4)
    assert answers == {
        -0.999: [True, True, True, False, None, None],
        0.93: [True, True, False, False, None, None],
        0.94: [True, False, False, False, None, None],
        1: [True, False, False, False, None, None],
    }


def test_a_text_is_equivalent_to_itself_at_the_largest_threshold_in_any_direction():
    rows = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
    equivalence = EmbeddingEquivalence(lambda texts: rows[[int(text) for text in texts]], 1, name="e", version="1")
    assert all(equivalence.equivalent([str(i)], str(i)) == [True] for i in range(200))


@pytest.mark.parametrize("threshold", [-1, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match=rf"threshold={threshold}: choose a cosine in \(-1, 1\]"):
        EmbeddingEquivalence(encode, threshold, name="e", version="1")


def test_the_version_holds_encoder_and_threshold():
    pairs = [(0.5, "1"), (0.6, "1"), (0.5, "2")]
    assert len({EmbeddingEquivalence(encode, t, name="e", version=v).version for t, v in pairs}) == 3


def test_what_an_encoder_does_wrong_is_said():
    with pytest.raises(ValueError, match="features of the representative 'zero' are zero or not finite"):
        EmbeddingEquivalence(encode, 0.5, name="e", version="1").equivalent(["same"], "zero")
    with pytest.raises(ValueError, match=r"returned \(1, 2\) for 2 texts, not \[n, d\]"):
        EmbeddingEquivalence(lambda _: np.ones((1, 2)), 0.5, name="e", version="1").equivalent(["same"], "same")


def test_the_naive_equivalence_forgives_white_space_only():
    texts = [" It is safe.\n", "it is safe.", "It  is safe."]
    assert ExactMatch().equivalent(texts, "It is safe.") == [True, False, False]


def test_the_same_label_is_equivalent_and_none_is_equivalent_to_nothing():
    equivalence = SameLabel(action_oracle())
    texts = ["so <refer>", "<treat>", "nothing"]
    assert equivalence.equivalent(texts, "<refer>") == [True, False, False]
    assert equivalence.equivalent(texts, "nothing") == [False, False, False]
    assert (equivalence.name, equivalence.version) == ("same-label/action", action_oracle().version)
    assert judged(equivalence, texts, "<refer>").labels == (True, False, False)


@pytest.mark.parametrize(
    "oracle",
    [safety_oracle(), refusal_oracle(), action_oracle(), finding_oracle("blood"), ExactMatch(), SameLabel(CELLS)],
    ids=lambda oracle: oracle.name,
)
def test_oracles_travel_to_workers(oracle):
    copy = pickle.loads(pickle.dumps(oracle))
    assert (copy, copy.name, copy.version) == (oracle, oracle.name, oracle.version)
    assert isinstance(hash(copy), int)
