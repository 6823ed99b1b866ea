import pytest

from medrobust_lib.data.questions import answer_wordings
from medrobust_lib.generative.judges import JudgeOracle, StandInJudge
from medrobust_lib.phantoms import phantom_classes

WORDINGS = {name: answer_wordings("blood", name, "finding") for name in phantom_classes("blood")}


@pytest.fixture(scope="module")
def oracle():
    return JudgeOracle(StandInJudge(WORDINGS), tuple(WORDINGS))


def test_known_wordings_are_judged_right(oracle):
    texts = [text for texts in WORDINGS.values() for text in texts]
    assert oracle.label(texts) == [name for name, texts in WORDINGS.items() for _ in texts]


def test_new_wordings_are_judged_by_likeness_and_strange_ones_not_at_all(oracle):
    assert oracle.label(["Probably monocyte, a large one", "the weather is nice today"]) == ["monocyte", None]


def test_a_prompt_without_a_fenced_text_has_no_reply():
    assert StandInJudge(WORDINGS)(["which label fits?"]) == [None]


def test_it_says_that_it_is_no_language_model_and_changes_with_its_wordings():
    version = StandInJudge(WORDINGS).version
    assert "without a language model" in version
    assert StandInJudge({**WORDINGS, "other": ("x y z",)}).version != version
