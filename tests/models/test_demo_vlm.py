"""The shipped generative model: small, intact, right on clean phantoms, less so under noise."""

import functools
import json

import pytest

from medrobust_lib import list_vlms, load_questions, load_vlm
from medrobust_lib.files import check_sums
from medrobust_lib.generative.answers import answer_once
from medrobust_lib.generative.oracles import default_oracle, judged
from medrobust_lib.models.weights import DEMO_FOLDER

FOLDER = DEMO_FOLDER / "demo-vlm"
PER_TASK = 48


@pytest.fixture(scope="module")
def vlm():
    return load_vlm("demo-vlm", device="cpu")


@pytest.fixture(scope="module")
def accuracy(vlm):
    @functools.cache
    def measure(modality, task, sigma):
        asked = load_questions(f"phantom/{modality}", task=task, n=PER_TASK)
        labels = judged(default_oracle(asked), answer_once(vlm, asked, sigma=sigma, max_new_tokens=24)).labels
        return sum(label == truth for label, truth in zip(labels, asked.truths, strict=True)) / PER_TASK

    return measure


def test_it_is_small_and_intact():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4_000_000
    check_sums(FOLDER)


def test_the_table_says_how_large_it_is(vlm):
    row = list_vlms().set_index("id").loc["demo-vlm"]
    assert row.parameters == sum(p.numel() for p in vlm.model.parameters())
    assert row.available_offline
    assert row.image_size == vlm.image_size == 64


@pytest.mark.parametrize("task", ["safety", "finding", "action"])
def test_it_is_right_on_clean_phantoms_and_less_so_on_noisy_ones(accuracy, task):
    clean, noisy = accuracy("blood", task, 0.0), accuracy("blood", task, 0.5)
    assert clean >= 0.85
    assert noisy < clean - 0.1


def test_every_modality_of_its_recipe_is_far_above_a_constant_answer(accuracy):
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    found = {modality: accuracy(modality, "finding", 0.0) for modality in recipe["modalities"]}
    assert sum(found.values()) / len(found) >= 0.85, found
    assert min(found.values()) >= 0.7, found


def test_its_card_says_what_it_is():
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert "Not for clinical use" in card
    assert "synthetic phantoms only" in card
    assert "no medical advice" in card
    rows = [
        line for line in card.splitlines() if line.startswith(("| histology |", "| blood |", "| chest |", "| oct |"))
    ]
    assert len(rows) == 12
