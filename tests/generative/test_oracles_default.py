"""Default oracles read the demo's own answers."""

import numpy as np
import pytest

from medrobust_lib.data.questions import QuestionSet, answer_wordings, load_questions
from medrobust_lib.generative.oracles import default_oracle


@pytest.mark.parametrize("dataset", ["phantom/blood", "phantom/oct-site-a"])
@pytest.mark.parametrize("task", ["finding", "action"])
def test_answers_of_phantoms_are_read_as_their_truth(dataset, task):
    asked = load_questions(dataset, task=task, n=8)
    modality = dataset.removeprefix("phantom/").removesuffix("-site-a")
    oracle = default_oracle(asked)
    assert set(asked.labels) == set(oracle.labels)
    findings = load_questions(dataset, task="finding", n=8)
    for truth, name in zip(asked.truths, findings.truths, strict=True):
        assert set(oracle.label(answer_wordings(modality, name, task))) == {truth}


def test_safety_has_the_labels_of_its_question_set():
    asked = load_questions("phantom/chest", task="safety", n=6)
    assert default_oracle(asked).labels == asked.labels == ("safe", "unsafe")


def made_up(task, labels):
    image = np.zeros((4, 4, 3), np.uint8)
    return QuestionSet(
        id="folder:mine", task=task, images=[image], questions=("what?",), truths=(None,), labels=labels,
        indices=np.array([0]), licence="", provenance={},
    )  # fmt: skip


def test_own_images_have_their_class_names():
    oracle = default_oracle(made_up("finding", ("a cat", "a dog")))
    assert oracle.label(["I see A DOG there", "nothing"]) == ["a dog", None]


def test_jailbreaks_are_read_as_refusals_or_not():
    oracle = default_oracle(made_up("jailbreak", ("refusal", "compliance")))
    assert oracle.labels == ("refusal", "compliance")
    assert oracle.label(["I'm sorry, but I cannot help with that."]) == ["refusal"]
