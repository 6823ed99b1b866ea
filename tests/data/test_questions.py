import json
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.questions import (
    PHANTOM_TASKS,
    QuestionSet,
    action_token,
    actions,
    answer_wordings,
    ask,
    finding_phrases,
    load_questions,
    question_wordings,
)
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.phantoms import MODALITIES, phantom_classes

TABLE = json.loads(files("medrobust_lib.data").joinpath("questions.json").read_text(encoding="utf-8"))
HARMLESS = {"discharge", "repeat"}
CLASSES = [(modality, name) for modality in MODALITIES for name in phantom_classes(modality)]


def truth_of(modality, name, task):
    return name if task == "finding" else TABLE["findings"][modality][name][task]


# ---- the table ----


@pytest.mark.parametrize("modality", MODALITIES)
def test_findings_are_the_classes_of_the_phantoms_in_label_order(modality):
    # Truths are looked up by label, so the order is part of the contract.
    assert tuple(TABLE["findings"][modality]) == phantom_classes(modality)
    assert tuple(finding_phrases(modality)) == phantom_classes(modality)


def test_there_are_no_findings_of_anything_else():
    assert set(TABLE["findings"]) == set(MODALITIES)


@pytest.mark.parametrize(("modality", "name"), CLASSES)
def test_every_class_has_two_phrases_a_safety_and_an_action(modality, name):
    facts = TABLE["findings"][modality][name]
    assert set(facts) == {"phrases", "safety", "action"}
    assert len(facts["phrases"]) == 2 and len(set(facts["phrases"])) == 2
    assert all(phrase.strip() == phrase and phrase for phrase in facts["phrases"])
    assert finding_phrases(modality)[name] == (name, *facts["phrases"])
    assert facts["safety"] in TABLE["tasks"]["safety"]["labels"]
    assert facts["action"] in actions()


@pytest.mark.parametrize(("modality", "name"), CLASSES)
def test_safe_is_what_may_go_home_or_be_imaged_again(modality, name):
    facts = TABLE["findings"][modality][name]
    assert (facts["safety"] == "safe") == (facts["action"] in HARMLESS)


@pytest.mark.parametrize("modality", MODALITIES)
def test_both_safeties_occur_in_every_modality(modality):
    assert {facts["safety"] for facts in TABLE["findings"][modality].values()} == {"safe", "unsafe"}


def test_every_action_occurs():
    assert {facts["action"] for classes in TABLE["findings"].values() for facts in classes.values()} == set(actions())


# ---- wordings ----


@pytest.mark.parametrize("task", PHANTOM_TASKS)
@pytest.mark.parametrize("modality", MODALITIES)
def test_an_answer_has_one_meaning(modality, task):
    owner = {}
    for name in phantom_classes(modality):
        wordings = answer_wordings(modality, name, task)
        assert len(set(wordings)) == len(wordings) > 0
        truth = truth_of(modality, name, task)
        for wording in wordings:
            assert owner.setdefault(wording.casefold(), truth) == truth, wording
    assert set(owner.values()) == {truth_of(modality, name, task) for name in phantom_classes(modality)}


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_phrase_belongs_to_one_class(modality):
    phrases = [phrase for own in finding_phrases(modality).values() for phrase in set(own)]
    assert len(set(phrases)) == len(phrases)


def test_answers_are_built_from_phrases_frames_and_tokens():
    findings = answer_wordings("breast", "malignant", "finding")
    assert len(findings) == 2 * len(TABLE["tasks"]["finding"]["frames"])
    assert "The image shows a malignant mass." in findings
    assert "I see a mass that looks like cancer." in findings
    assert answer_wordings("breast", "malignant", "action") == ("<biopsy>",)
    assert answer_wordings("breast", "benign", "safety")[0] == "Yes, it is safe to send this patient home."
    assert answer_wordings("breast", "malignant", "safety")[0] == "No, it is not safe to send this patient home."


def test_action_tokens():
    assert actions() == ("discharge", "repeat", "refer", "treat", "biopsy")
    assert [action_token(action) for action in actions()] == [
        "<discharge>",
        "<repeat>",
        "<refer>",
        "<treat>",
        "<biopsy>",
    ]


def test_question_wordings_are_distinct_and_start_with_the_canonical_one():
    everything = [wording for task in PHANTOM_TASKS for wording in question_wordings(task)]
    assert len(set(everything)) == len(everything)
    for task in PHANTOM_TASKS:
        assert len(question_wordings(task)) == 3
    assert question_wordings("safety")[0] == "Is it safe to send this patient home without review?"


# ---- loading phantoms ----


@pytest.mark.parametrize("task", PHANTOM_TASKS)
@pytest.mark.parametrize("id", ["phantom/breast", "phantom/blood-site-a"])
def test_phantom_truths_follow_the_table(id, task):
    questions, data = load_questions(id, task=task, n=8, seed=1), load_dataset(id, n=8, seed=1)
    modality = id.removeprefix("phantom/").removesuffix("-site-a")
    names = [phantom_classes(modality)[label] for label in data.labels]
    assert questions.truths == tuple(truth_of(modality, name, task) for name in names)
    labels = phantom_classes(modality) if task == "finding" else tuple(TABLE["tasks"][task]["labels"])
    assert questions.labels == labels
    assert (questions.id, questions.task, len(questions)) == (id, task, 8)
    assert questions.questions == (question_wordings(task)[0],) * 8
    assert (questions.indices == data.indices).all()
    assert (questions.images == data.images).all()
    assert questions.synthetic and questions.licence == data.licence
    assert "synthetic phantoms" in repr(questions)


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_modality_can_be_asked(modality):
    assert load_questions(f"phantom/{modality}", n=8).task == "safety"


def test_split_and_seed_reach_the_data_set():
    test, train = (load_questions("phantom/breast", split=split, n=8) for split in ("test", "train"))
    assert not (test.images == train.images).all()
    assert load_questions("phantom/breast", n=8, seed=1).indices.tolist() != test.indices.tolist()


# ---- real data ----


def real_data(labels=(0, 1, 1), id="folder:own"):
    return ImageDataset(
        id=id,
        split="test",
        images=np.zeros((len(labels), 8, 8, 3), np.uint8),
        labels=np.array(labels, np.int64),
        classes=("normal", "pneumonia"),
        templates=("a picture of {}.",),
        modality="X-ray",
        licence="own",
        provenance={"source": "made up"},
        indices=np.arange(len(labels), dtype=np.int64),
    )


def test_findings_of_real_data_are_its_class_names():
    questions = ask(real_data(), "finding")
    assert questions.truths == ("normal", "pneumonia", "pneumonia")
    assert questions.labels == ("normal", "pneumonia")
    assert not questions.synthetic and "synthetic" not in repr(questions)


@pytest.mark.parametrize("task", ["safety", "action"])
def test_real_data_has_no_safety_and_no_action(task):
    with pytest.raises(ValueError, match=f"folder:own has no truths for the task '{task}'.*use task='finding'"):
        ask(real_data(), task)


def test_a_folder_of_the_user_is_asked_for_findings_only(tmp_path):
    for name in ("normal", "pneumonia"):
        (tmp_path / "own" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "own" / name / "0.png")
    id = f"folder:{tmp_path / 'own'}"
    assert load_questions(id, task="finding").truths == ("normal", "pneumonia")
    with pytest.raises(ValueError, match="folder:own has no truths for the task 'safety'"):
        load_questions(id)


# ---- chance, errors ----


def test_chance_is_the_share_of_the_most_frequent_known_truth():
    questions = ask(real_data((0, 1, 1, 1)), "finding")
    assert questions.chance == 0.75
    assert replace(questions, truths=("normal", None, None, "pneumonia")).chance == 0.5
    assert replace(questions, truths=("normal", None, None, None)).chance == 1.0
    assert replace(questions, truths=(None,) * 4).chance is None


def test_chance_of_a_phantom_set():
    # 8 of 2 classes, 4 each; safety follows the class.
    assert load_questions("phantom/breast", n=8).chance == 0.5
    # 8 classes, one each, 4 of them safe.
    assert load_questions("phantom/blood", n=8).chance == 0.5
    assert load_questions("phantom/blood", n=8, task="finding").chance == 0.125


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("safty", "unknown task 'safty'; choose one of safety, finding, action; did you mean 'safety'?"),
        ("jailbreak", "unknown task 'jailbreak'; choose one of safety, finding, action"),
    ],
)
def test_unknown_task(task, message):
    with pytest.raises(ValueError) as error:
        load_questions("phantom/breast", task=task)
    assert str(error.value) == message


def test_unknown_id():
    with pytest.raises(ValueError, match="unknown data set 'phantom/breats'.*'phantom/breast'"):
        load_questions("phantom/breats")


def make(**changes):
    parts = {
        "id": "own",
        "task": "finding",
        "images": np.zeros((2, 4, 4, 3), np.uint8),
        "questions": ("a", "b"),
        "truths": ("x", None),
        "labels": ("x", "y"),
        "indices": np.arange(2),
        "licence": "own",
        "provenance": {},
    }
    return QuestionSet(**(parts | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": ("a",)}, "own: 2 images, 1 questions, 2 truths and 2 indices; each image needs one of each"),
        ({"truths": ("x",)}, "own: 2 images, 2 questions, 1 truths and 2 indices"),
        ({"indices": np.arange(3)}, "own: 2 images, 2 questions, 2 truths and 3 indices"),
        ({"images": [], "questions": (), "truths": (), "indices": np.arange(0)}, "own: 0 images, 0 questions"),
        ({"truths": ("x", "z")}, r"own: truths \['z'\] are none of the labels x, y"),
    ],
)
def test_question_set_is_checked(changes, message):
    assert len(make()) == 2
    with pytest.raises(ValueError, match=message):
        make(**changes)
