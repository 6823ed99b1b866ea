import pytest

from medrobust_lib.generative.judges import RememberedOracle
from medrobust_lib.generative.oracles import OracleUnavailableError, judged


class Judge:
    """Says "long" or "short", or nothing about "?". It remembers its questions and may go away after some of them."""

    name, labels = "judge", ("long", "short")

    def __init__(self, *, version="1", leaves_after=None):
        self.version, self.leaves_after, self.asked = version, leaves_after, []

    def label(self, texts):
        if self.leaves_after is not None and len(self.asked) + len(texts) > self.leaves_after:
            raise OracleUnavailableError("endpoint is away")
        if "boom" in texts:
            raise RuntimeError("no such text")
        self.asked += texts
        return [None if text == "?" else "long" if len(text) > 3 else "short" for text in texts]


TEXTS = ["ab", "abcd", "?", "abc", "abcde", "ab"]
LABELS = ["short", "long", None, "short", "long", "short"]


def test_labels_are_the_oracles(tmp_path):
    judge = Judge(version="7")
    with RememberedOracle(judge, tmp_path) as oracle:
        assert (oracle.name, oracle.version, oracle.labels) == ("judge", "7", ("long", "short"))
        assert oracle.label(TEXTS) == LABELS
        assert oracle.label([]) == []
        assert judged(oracle, ["abcd", None, "?"]).labels == ("long", None, None)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_each_distinct_text_is_asked_about_once(tmp_path, chunk):
    first, second = Judge(), Judge()
    with RememberedOracle(first, tmp_path, chunk=chunk) as oracle:
        assert oracle.label(TEXTS) == LABELS
        assert oracle.label(TEXTS[::-1]) == LABELS[::-1]
    assert first.asked == ["ab", "abcd", "?", "abc", "abcde"]
    with RememberedOracle(second, tmp_path) as oracle:
        assert oracle.label([*TEXTS, "new one"]) == [*LABELS, "long"]
    assert second.asked == ["new one"]


def test_texts_that_differ_at_all_are_different(tmp_path):
    judge = Judge()
    with RememberedOracle(judge, tmp_path) as oracle:
        oracle.label(["abc", "abc ", "Abc", "\ud83d", "\ud83e"])
    assert len(judge.asked) == 5


def test_labels_given_before_an_oracle_went_away_stay(tmp_path):
    leaving, back = Judge(leaves_after=4), Judge()
    with RememberedOracle(leaving, tmp_path, chunk=2) as oracle, pytest.raises(OracleUnavailableError, match="away"):
        judged(oracle, TEXTS)
    assert leaving.asked == ["ab", "abcd", "?", "abc"]
    with RememberedOracle(back, tmp_path, chunk=2) as oracle:
        assert oracle.label(TEXTS) == LABELS
    assert back.asked == ["abcde"]


def test_failures_are_not_remembered(tmp_path):
    with RememberedOracle(Judge(), tmp_path) as oracle:
        answers = judged(oracle, ["ab", "boom", "abcd"])
        assert answers.labels == ("short", None, "long")
        assert (answers.failed, answers.first_error) == (1, "RuntimeError: no such text")

    class Repaired(Judge):
        def label(self, texts):
            return super().label([text.replace("boom", "fine") for text in texts])

    repaired = Repaired()
    with RememberedOracle(repaired, tmp_path) as oracle:
        assert judged(oracle, ["ab", "boom", "abcd"]).labels == ("short", "long", "long")
    assert repaired.asked == ["fine"]


def test_nothing_that_is_no_label_for_each_text_is_kept(tmp_path):
    """A label that is missing would move all later ones to other texts, for ever."""

    class Broken(Judge):
        def label(self, texts):
            labels = super().label(texts)
            return labels[1:] if len(texts) > 1 else labels

    with RememberedOracle(Broken(), tmp_path) as oracle:
        with pytest.raises(ValueError, match="the oracle 'judge' returned 1 labels for 2 texts"):
            oracle.label(["ab", "abcd"])
        assert oracle.label(["ab"]) == ["short"]

    class Inventive(Judge):
        def label(self, texts):
            return ["medium"] * len(texts)

    message = "returned the label 'medium'; it must return a list with one of long, short, or None"
    with RememberedOracle(Inventive(), tmp_path) as oracle, pytest.raises(ValueError, match=message):
        oracle.label(["ab", "abcd"])
    judge = Judge()
    with RememberedOracle(judge, tmp_path) as oracle:
        assert oracle.label(["ab", "abcd"]) == ["short", "long"]
    assert judge.asked == ["abcd"]


def test_another_version_or_oracle_needs_another_folder(tmp_path):
    RememberedOracle(Judge(), tmp_path).__exit__(None, None, None)
    with pytest.raises(ValueError, match='version: the store has "1", this run asks "2"'):
        RememberedOracle(Judge(version="2"), tmp_path)
    other = Judge()
    other.name, other.labels = "other", ("long", "short", "medium")
    with pytest.raises(ValueError, match=r"(?s)labels: the store has .*oracle: the store has \"judge\""):
        RememberedOracle(other, tmp_path)


@pytest.mark.parametrize("chunk", [0, -3])
def test_at_least_one_text_is_asked_about_at_a_time(tmp_path, chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk} is no whole number of 1 or more: at least one text"):
        RememberedOracle(Judge(), tmp_path / "new", chunk=chunk)
    assert not (tmp_path / "new").exists()
