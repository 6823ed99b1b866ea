from itertools import product

import pytest
from scipy.stats import binomtest

from medrobust_lib.generative.errors import ErrorRate, calibrate_equivalence, calibrate_oracle
from medrobust_lib.generative.oracles import ExactMatch, OracleUnavailableError


class Reader:
    """Reads a label from the first word; raises at "boom" and is away at "away"."""

    name, version = "reader", "3"
    labels = ("safe", "unsafe", "unclear")

    def label(self, texts):
        for text in texts:
            if text == "boom":
                raise RuntimeError("no such judge")
            if text == "away":
                raise OracleUnavailableError("endpoint is away")
        return [text.split()[0] if text.split()[0] in self.labels else None for text in texts]


# Truth, text, number of times.
CASES = [
    ("safe", "safe to go", 6),
    ("safe", "unsafe", 2),
    ("safe", "who knows", 1),
    ("safe", "boom", 1),
    ("unsafe", "unsafe", 4),
    ("unsafe", "safe", 3),
    ("unsafe", "  ", 1),
    ("unsafe", None, 2),
]


@pytest.fixture
def calibration():
    pairs = [(truth, text) for truth, text, times in CASES for _ in range(times)]
    return calibrate_oracle(Reader(), [text for _, text in pairs], [truth for truth, _ in pairs])


def test_counts_by_truth_and_label_with_texts_without_a_label_last(calibration):
    assert calibration.counts == ((6, 2, 0, 2), (3, 4, 0, 3), (0, 0, 0, 0))
    assert (calibration.n, calibration.failed) == (20, 1)
    assert (calibration.oracle, calibration.version, calibration.labels) == ("reader", "3", Reader.labels)


def test_rates(calibration):
    assert calibration.false_positives("safe") == ErrorRate(errors=3, trials=10)
    assert calibration.false_positives("unsafe") == ErrorRate(errors=2, trials=10)
    assert calibration.false_positives("unclear") == ErrorRate(errors=0, trials=20)
    assert calibration.false_negatives("safe") == ErrorRate(errors=4, trials=10)
    assert calibration.false_negatives("unsafe") == ErrorRate(errors=6, trials=10)
    assert calibration.total_errors() == ErrorRate(errors=10, trials=20)


def test_the_one_sided_model_has_the_rates_and_bounds_them_from_above(calibration):
    model = calibration.one_sided()
    assert dict(model.rates) == {label: calibration.false_positives(label) for label in Reader.labels}
    high = binomtest(3, 10).proportion_ci(0.98, method="exact").high
    assert model.corrected(0.9, label="safe", alpha=0.01) == pytest.approx((0.9 - high) / (1 - high))


def test_a_text_of_unknown_truth_counts_as_an_error_wherever_it_may_be_one():
    """Whatever the unknown truths are, no upper bound falls below the one that knowing them would give."""
    texts = ["safe", "safe", "unsafe", "unsafe", "safe here", "unsafe now", "who knows"]
    known = ["safe", "unsafe", "unsafe", "safe"]
    found = calibrate_oracle(Reader(), texts, [*known, None, None, None])
    assert (found.n, found.unknown) == (4, (1, 1, 0, 1))
    assert found.false_positives("safe") == ErrorRate(errors=2, trials=3)
    assert found.total_errors() == ErrorRate(errors=5, trials=7)
    for truths in product(Reader.labels, repeat=3):
        told = calibrate_oracle(Reader(), texts, [*known, *truths])
        assert found.total_errors().upper(0.01) >= told.total_errors().upper(0.01)
        for label in Reader.labels:
            assert found.false_positives(label).upper(0.01) >= told.false_positives(label).upper(0.01)
        for label in ("safe", "unsafe"):
            assert found.false_negatives(label).upper(0.01) >= told.false_negatives(label).upper(0.01)


def test_a_label_that_every_text_has_gets_no_false_positive_rate():
    calibration = calibrate_oracle(Reader(), ["safe", "unsafe"], ["safe", "safe"])
    assert set(calibration.one_sided().rates) == {"unsafe", "unclear"}
    with pytest.raises(ValueError, match="no texts that are not 'safe' were labelled, so their error rate is unknown"):
        calibration.false_positives("safe")
    with pytest.raises(ValueError, match="no texts that are 'unsafe' were labelled"):
        calibration.false_negatives("unsafe")
    assert list(calibration.table()[["label", "kind"]].itertuples(index=False, name=None)) == [
        ("safe", "false negative"),
        ("unsafe", "false positive"),
        ("unclear", "false positive"),
    ]


def test_the_table_has_exact_intervals(calibration):
    table = calibration.table()
    assert list(table.columns) == ["oracle", "label", "kind", "errors", "n", "rate", "low", "high"]
    found = list(table[["label", "kind", "errors", "n"]].itertuples(index=False, name=None))
    assert found == [
        ("safe", "false positive", 3, 10),
        ("safe", "false negative", 4, 10),
        ("unsafe", "false positive", 2, 10),
        ("unsafe", "false negative", 6, 10),
        ("unclear", "false positive", 0, 20),
    ]
    for row in table.itertuples():
        interval = binomtest(row.errors, row.n).proportion_ci(0.95, method="exact")
        assert (row.low, row.high) == pytest.approx((interval.low, interval.high))
        assert row.rate == row.errors / row.n
    assert table.oracle.unique() == ["reader"]


# Equivalences


class SameFirstLetter:
    name, version = "initial", "1"

    def __init__(self):
        self.calls = []

    def equivalent(self, texts, representative):
        self.calls.append((representative, len(texts)))
        if "boom" in texts:
            raise RuntimeError("no such judge")
        return [None if text == "?" else text[0] == representative[0] for text in texts]


def test_pairs_of_texts_are_counted_as_same_or_different():
    pairs = [
        *[("apple", "ape", True)] * 4,
        *[("apple", "ape", False)] * 2,
        ("bee", "ape", True),
        *[("bee", "ant", False)] * 3,
        ("?", "ape", True),
        (None, "ant", False),
        ("boom", "owl", False),
    ]
    equivalence = SameFirstLetter()
    texts, representatives, same = zip(*pairs, strict=True)
    calibration = calibrate_equivalence(equivalence, texts, representatives, same)
    assert calibration.labels == ("same", "different")
    assert calibration.counts == ((4, 1, 1), (2, 3, 2))
    assert (calibration.n, calibration.failed) == (13, 1)
    assert calibration.false_positives("same") == ErrorRate(errors=2, trials=7)
    assert calibration.false_negatives("same") == ErrorRate(errors=2, trials=6)
    assert sorted(equivalence.calls) == [("ant", 3), ("ape", 8), ("owl", 1), ("owl", 1)]


def test_exact_match_never_takes_different_texts_for_the_same():
    texts, representatives = ["yes", "yes.", "no"], ["yes", "yes", "yes"]
    calibration = calibrate_equivalence(ExactMatch(), texts, representatives, [True, True, False])
    assert calibration.counts == ((1, 1, 0), (0, 1, 0))
    assert calibration.one_sided().rates["same"] == ErrorRate(errors=0, trials=1)


# Errors


def test_a_judge_that_is_away_is_no_wrong_answer():
    with pytest.raises(OracleUnavailableError, match="endpoint is away"):
        calibrate_oracle(Reader(), ["safe", "away"], ["safe", "safe"])


@pytest.mark.parametrize(("texts", "truths"), [(["a"], []), ([], []), (["a"], ["safe", "safe"])])
def test_every_text_needs_a_truth(texts, truths):
    with pytest.raises(ValueError, match=f"{len(texts)} texts and {len(truths)} truths; calibration needs one truth"):
        calibrate_oracle(Reader(), texts, truths)
    with pytest.raises(ValueError, match=rf"{len(texts)} texts, 2 representatives and {len(truths)} truths"):
        calibrate_equivalence(ExactMatch(), texts, ["b", "c"], truths)


def test_truths_are_labels_of_the_oracle():
    with pytest.raises(ValueError, match="truths 'harmful' are none of the labels safe, unsafe, unclear"):
        calibrate_oracle(Reader(), ["a", "b", "c"], ["harmful", None, "safe"])


def test_an_unknown_label_is_named(calibration):
    for rate in (calibration.false_positives, calibration.false_negatives):
        with pytest.raises(ValueError, match="label 'harmful' was not calibrated; there are safe, unsafe, unclear"):
            rate("harmful")
