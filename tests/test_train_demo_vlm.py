"""One command trains a model that load_vlm reads; its pieces do what the script says."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from medrobust_lib.data.questions import PHANTOM_TASKS, actions, answer_wordings, load_questions, question_wordings
from medrobust_lib.files import check_sums
from medrobust_lib.models.vision_language import load_vlm
from medrobust_lib.phantoms import phantom_classes

SCRIPT = Path(__file__).parents[1] / "data_scripts" / "train_demo_vlm.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_demo_vlm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def processor(script):
    return script.make_processor()


def test_one_command_trains_a_model_that_the_library_loads(script, tmp_path):
    app = typer.Typer()
    app.command()(script.main)
    arguments = [
        "--out",
        str(tmp_path),
        "--images",
        "60",
        "--tower-steps",
        "1",
        "--frozen-steps",
        "1",
        "--joint-steps",
        "1",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    check_sums(tmp_path)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert (recipe["tower_steps"], recipe["images_per_site"]) == (1, 60)
    assert (tmp_path / "training_log.csv").read_text().startswith("stage,step,loss,seconds\n")
    vlm = load_vlm(f"local-dir:{tmp_path}", device="cpu", image_size=64)
    asked = load_questions("phantom/blood", task="action", n=8)
    assert len(vlm.generate(vlm.prepare(asked.images), asked.questions[0], max_new_tokens=3)) == 8


def test_every_question_and_answer_survives_the_tokenizer(script, processor):
    for text in script.every_text():
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text
    for action in actions():
        assert len(processor.tokenizer(f"<{action}>", add_special_tokens=False)["input_ids"]) == 1


def test_a_conversation_is_one_question_with_one_right_answer(script, processor):
    conversations = script.tokenized_conversations(processor)
    assert len(conversations) == len(script.class_names())
    rng, decode = np.random.default_rng(0), processor.tokenizer.decode
    for label, place in enumerate(script.class_names()):
        for _ in range(5):
            ids, n_answer = script.draw_conversation(conversations[label], rng)
            answer = decode(ids[-n_answer:], skip_special_tokens=True).strip()
            asked = decode(ids[:-n_answer], skip_special_tokens=True)
            (task,) = [task for task in PHANTOM_TASKS if any(text in asked for text in question_wordings(task))]
            assert answer in answer_wordings(*place, task)
            assert ids[-1] == processor.tokenizer.eos_token_id
            assert ids.count(processor.tokenizer.convert_tokens_to_ids(script.IMAGE)) == 64


def test_batches_hold_what_the_recipe_says(script):
    n = len(script.class_names())
    recipe = script.Recipe(batch_size=32, noise_share=0.0, shift_pixels=0)
    pixels = np.repeat(np.arange(n, dtype=np.uint8)[:, None, None, None], 64, 1).repeat(64, 2).repeat(3, 3)
    stream = script.Batches(pixels, np.arange(n), recipe)
    images, labels = stream.draw()
    assert images.shape == (32, 3, 64, 64)
    assert torch.allclose(images[:, 0, 0, 0], (torch.from_numpy(labels).float() / 255 - 0.5) / 0.25)
    modality = np.array([script.MODALITIES.index(name) for name, _ in script.class_names()])
    share = np.bincount(modality[stream.pool]) / np.bincount(modality)
    assert tuple(share) == recipe.weights_of_modalities
    noisy, _ = script.Batches(pixels, np.arange(n), script.Recipe(noise_share=1.0, shift_pixels=0)).draw()
    assert float(noisy.flatten(1).std(dim=1).max()) > 0.5


def test_labels_follow_the_order_of_the_phantoms(script):
    names = script.class_names()
    assert names[0] == ("histology", phantom_classes("histology")[0])
    assert len(names) == len(set(names))
