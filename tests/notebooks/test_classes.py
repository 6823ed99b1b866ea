"""Every notebook with 2, 30 and 200 classes, with classes of one image, and with an encoder that offers the minimum.

Cells run in this process, with an encoder of random weights on patches of colour: what is tested is that a notebook
reaches its end, that its card is saved and says what was left out, and that its figures keep a size.
"""

import json
import re
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import notebook_cells
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE, Run, without_folders
from medrobust_lib.models.weights import DEMO_FOLDER
from medrobust_lib.runner import find_notebooks

NOTEBOOKS = find_notebooks()
MOST_INCHES = 16  # of a figure as it is saved: 2,400 dots at 150 an inch
SMALL = {
    "02": {"sigmas": [0.0, 0.25]},
    "03": {"sigmas": [0.25], "n_draws": 50, "shots": 1, "n_images": 12},
    "03b": {"n_draws": 20, "epochs": 1, "n_images": 12},
    "04": {"fraction": 0.01, "rank": 2, "n_images": 12},
    "05": {"datasets": []},
    "08": {"datasets": [], "compare_with": [], "n_draws": 12},
    "06": {"vlm": f"local-dir:{DEMO_FOLDER / 'demo-vlm'}", "n": 10, "n_images": 2},
}
# Images of each class, and how many are drawn. None of these folders is divided into splits.
FOLDERS = {
    "2 classes": ([6, 6], 6),
    "30 classes, ten of one image": ([4] * 20 + [1] * 10, 30),
    "200 classes, fewer images drawn": ([4] * 10 + [2] * 190, 30),
    "30 classes of one image": ([1] * 30, 30),
}
OF_PROMPTS = ("03", "03b")  # notebooks whose question needs a model that learns prompts
OF_LEARNING = (*OF_PROMPTS, "04")  # and images to learn from
OF_ERRORS = ("04", "05", "07")  # compare errors
OF_SINGLE_IMAGES = ("01", "02", "03", "03b", "04", "07")  # keep a table of them, and sentences about the run
WITHOUT_PROMPTS = (*OF_ERRORS, "08")  # do without prompts where none can be learned
# Which encoder meets which folder: every notebook the least of encoders once, and those that compare errors have the
# two classes without an error further down.
RUNS = [
    (number, folder, "least" if folder[:2] == ("30" if number in OF_ERRORS else "2 ") else "tiny")
    for number in NOTEBOOKS
    for folder in list(FOLDERS)[number in OF_ERRORS : 3]
]
RUNS = [(number, folder, "tiny" if number in OF_PROMPTS else model) for number, folder, model in RUNS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of images by their names above; each is written when it is first asked for."""

    @cache
    def written(name: str) -> Path:
        path = tmp_path_factory.mktemp("images")
        write_patches(path, FOLDERS[name][0])
        return path

    return written


@pytest.fixture
def finish(tmp_path, monkeypatch, capsys, folders):
    """Run the code cells of a notebook on a folder; returns its card and what it printed, figures measured."""
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    notebook_cells.make_cheap(monkeypatch)
    monkeypatch.setattr("medrobust_lib.models.loading._REGISTERED", {})
    monkeypatch.setattr(Run, "save_figure", lambda run, figure, name, *, caption="": None)

    def run(number: str, folder: str | Path, *, model: str = "tiny") -> tuple[dict, str]:
        path, n_images = (folders(folder), FOLDERS[folder][1]) if isinstance(folder, str) else (folder, 6)
        images = f"folder:{path}"
        given = {"n_images": n_images, "model": f"python:tiny_encoders:load_{model}"}
        given |= {"dataset": images} | SMALL.get(number, {})
        given |= {"datasets": [images]} if number == "04" else {}
        measured = str(folder).startswith("200")
        notebook_cells.run_cells(NOTEBOOKS[number], given, after_cell=measure if measured else lambda place: None)
        card = json.loads((tmp_path / "run" / "cards" / f"{number}.json").read_text(encoding="utf-8"))
        said = capsys.readouterr().out
        told = [without_folders(line) for line in re.findall(r"^Left out: .+$", said, re.MULTILINE)]
        assert told == [note for note in card["notes"] if note[:8] == "Left out"]
        return card, said

    return run


def write_patches(folder: Path, counts: list[int]) -> None:
    """Class folders of noisy patches, a colour for each class."""
    draw = np.random.default_rng(0)
    for label, count in enumerate(counts):
        (folder / f"class {label:03d}").mkdir(parents=True)
        for number in range(count):
            patch = draw.integers(0, 256, 3) * 0.7 + draw.normal(30, 30, (28, 28, 3))
            Image.fromarray(patch.clip(0, 255).astype(np.uint8)).save(folder / f"class {label:03d}" / f"{number}.png")


def measure(place: int) -> None:
    """Refuse figures that grow with the number of classes; rendering them is slow."""
    for figure in map(plt.figure, plt.get_fignums()):
        box = figure.get_tightbbox(figure.canvas.get_renderer())
        assert max(box.size) <= MOST_INCHES, f"cell {place}: a figure of {box.size} inches"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("number", "folder", "model"), RUNS)
def test_it_reaches_its_end(finish, tmp_path, number, folder, model):
    card, said = finish(number, folder, model=model)
    assert card["metrics"] and card["tables"]
    left_out = [note for note in card["notes"] if note.startswith("Left out: ")]
    assert [note for note in left_out if "learned prompts" in note] == (
        ["Left out: learned prompts: least reads whole texts only: prompts are learned among word embeddings "
         "(embed_tokens)"] if model == "least" and number in WITHOUT_PROMPTS else []
    )  # fmt: skip
    if number in OF_SINGLE_IMAGES:
        first_cell = nbformat.read(NOTEBOOKS[number], as_version=4).cells[0].source
        assert card["question"] == re.search(r"\*\*(.+)\*\*", first_cell)[1].replace("*", "")
        assert len(card["findings"]) == 2 and all("95 % interval" in found for found in card["findings"])
        listed = pd.read_csv(tmp_path / "run" / "cards" / f"{card['images']}.csv")
        assert len(listed) and listed.file.str.fullmatch(r"class \d{3}/\d+\.png").all()
        assert not [metric for metric in card["metrics"] if metric["dataset"] not in ("", card["dataset"]["id"])]
    if number == "01":
        assert "alone, with no phantom beside it" in said
    if number == "01" and folder.startswith("200"):
        assert "Left out: 170 classes: no image of them among 30; raise n_images" in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", ["03", "07"])
def test_an_encoder_that_reads_texts_as_siglip_does_learns_prompts(finish, number):
    card, _ = finish(number, "2 classes", model="filled")
    assert card["metrics"]
    assert not [note for note in card["notes"] if "prompts" in note and note.startswith("Left out")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", ["05", "07", "08"])
def test_where_nothing_can_be_learned_the_model_is_measured_all_the_same(finish, number):
    card, _ = finish(number, "30 classes of one image")
    assert card["dataset"]["n"] == 30
    assert re.search("none is left to test|no class has two images", " ".join(card["notes"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", OF_LEARNING)
def test_a_notebook_about_learning_refuses_at_once_what_it_cannot_learn_from(finish, number):
    with pytest.raises(ValueError, match=r"(none is left|no class has two images).*; add images"):
        finish(number, "30 classes of one image")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", OF_PROMPTS)
def test_a_notebook_about_prompts_refuses_at_once_a_model_without_words(finish, number):
    with pytest.raises(ValueError, match="least reads whole texts only.*; notebooks 01, 02, 04, 05, 07 and 08 need no"):
        finish(number, "2 classes", model="least")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", ["02", "05"])
def test_a_classifier_that_reads_no_texts_is_measured(finish, number):
    card, _ = finish(number, "2 classes", model="resnet")
    assert card["metrics"] and card["tables"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", ["01", *OF_PROMPTS])
def test_a_notebook_about_texts_refuses_a_classifier_at_once(finish, number):
    with pytest.raises(ValueError, match="ResNet (is a classifier and )?reads no texts"):
        finish(number, "2 classes", model="resnet")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", OF_ERRORS)
def test_a_model_without_an_error_has_no_corruption_error_to_compare_with(finish, tmp_path, number):
    for name, colour in (("class 000", (230, 40, 40)), ("class 001", (40, 40, 230))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for shade in range(6):
            Image.new("RGB", (28, 28), tuple(part - 5 * shade for part in colour)).save(
                tmp_path / "images" / name / f"{shade}.png"
            )
    card, _ = finish(number, tmp_path / "images", model="sure")
    assert "average_accuracy" in {metric["name"] for metric in card["metrics"]}
    assert "mce" not in {metric["name"] for metric in card["metrics"]}
