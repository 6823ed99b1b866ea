"""Every notebook with 2, 30 and 200 classes, with classes of one image, and with an encoder that offers the minimum.

Cells run in this process, with an encoder of random weights on patches of colour: what is tested is that a notebook
reaches its end, that its card is saved and says what was left out, and that its figures keep a size.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE, Run
from medrobust_lib.models.weights import DEMO_FOLDER
from medrobust_lib.runner import find_notebooks

MOST_INCHES = 16  # of a figure as it is saved: 2,400 dots at 150 an inch
# What the parameters cannot make small; each is written in the notebook as it stands here.
CHEAPER = {
    "03": {"0.001, 50, 4, 6": "0.001, 1, 1, 1", "range(9)": "range(2)"},
    "03b": {"(1, 4, 16, most_shots)": "(1, 16)", "(1, 2, 5, 8)": "(2, 5)", "draws_per_image=4": "draws_per_image=1"},
    "04": {'{"epochs": 20,': '{"epochs": 1,', "range(300)": "range(2)"},
    "06": {"runs: int = 4000": "runs: int = 10"},
}
SMALL = {
    "01": {"compare": []},
    "02": {"sigmas": [0.0, 0.25]},
    "03": {"sigmas": [0.25], "n_draws": 50, "shots": 1},
    "03b": {"n_draws": 50, "epochs": 1},
    "04": {"fraction": 0.01, "rank": 2},
    "05": {"datasets": []},
    "06": {"vlm": f"local-dir:{DEMO_FOLDER.parent / 'vlm'}", "n": 10, "n_images": 2},
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
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # no worker processes
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr("medrobust_lib.models.loading._REGISTERED", {})
    # The exact expectation is tested with the bounds; its sums over ten thousand draws take longer than all the rest.
    monkeypatch.setattr(
        "medrobust_lib.smoothing.bounds.expected_radius",
        lambda q, n, alpha, *, sigma=1.0: sigma * np.maximum(norm.ppf(np.clip(q, 0.5, 0.999)), 0),
    )
    monkeypatch.setattr(Run, "save_figure", lambda run, figure, name, *, caption="": None)

    def run(number: str, folder: str | Path, *, model: str = "tiny") -> tuple[dict, str]:
        path, n_images = (folders(folder), FOLDERS[folder][1]) if isinstance(folder, str) else (folder, 6)
        images = f"folder:{path}"
        given = {"n_images": n_images, "model": f"python:tiny_encoders:load_{model}"}
        given |= {"images" if number == "07" else "dataset": images} | SMALL.get(number, {})
        given |= {"datasets": [images]} if number == "04" else {}
        with plt.rc_context(), torch.enable_grad():
            run_cells(number, given, measure=str(folder).startswith("200"))
        card = json.loads((tmp_path / "run" / "cards" / f"{number}.json").read_text(encoding="utf-8"))
        said = capsys.readouterr().out
        assert re.findall(r"^Left out: .+$", said, re.MULTILINE) == [x for x in card["notes"] if x[:8] == "Left out"]
        return card, said

    yield run
    plt.close("all")
    torch.set_grad_enabled(True)


def write_patches(folder: Path, counts: list[int]) -> None:
    """Class folders of noisy patches, a colour for each class."""
    draw = np.random.default_rng(0)
    for label, count in enumerate(counts):
        (folder / f"class {label:03d}").mkdir(parents=True)
        for number in range(count):
            patch = draw.integers(0, 256, 3) * 0.7 + draw.normal(30, 30, (28, 28, 3))
            Image.fromarray(patch.clip(0, 255).astype(np.uint8)).save(folder / f"class {label:03d}" / f"{number}.png")


def run_cells(number: str, given: dict, *, measure: bool) -> None:
    """Execute the code cells in order, render what a cell ends with as Jupyter would; measuring figures is slow."""
    names: dict = {"display": lambda *shown: [one._repr_html_() for one in shown]}
    cheaper = dict(CHEAPER.get(number, {}))
    for place, cell in enumerate(nbformat.read(find_notebooks()[number], as_version=4).cells):
        if cell.cell_type != "code":
            continue
        source = cell.source
        for old in [old for old in cheaper if old in source]:
            source = source.replace(old, cheaper.pop(old))
        tree = ast.parse(source)
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"notebook {number}, cell {place}", "exec"), names)
        if last is not None:
            value = eval(compile(last, f"notebook {number}, cell {place}", "eval"), names)
            getattr(value, "_repr_html_", lambda: None)()
        if "parameters" in cell.metadata.get("tags", []):
            names.update({name: value for name, value in given.items() if name in names})
        for figure in map(plt.figure, plt.get_fignums() if measure else ()):
            box = figure.get_tightbbox(figure.canvas.get_renderer())
            assert max(box.size) <= MOST_INCHES, f"cell {place}: a figure of {box.size} inches"
        plt.close("all")
    assert not cheaper, f"not in notebook {number}: {list(cheaper)}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", list(FOLDERS)[:3])
@pytest.mark.parametrize("number", list(find_notebooks()))
def test_it_reaches_its_end(finish, number, folder):
    model = "least" if folder == "2 classes" and number not in OF_PROMPTS else "tiny"
    card, said = finish(number, folder, model=model)
    assert card["metrics"] and card["tables"]
    left_out = [note for note in card["notes"] if note.startswith("Left out: ")]
    assert [note for note in left_out if "learned prompts" in note] == (
        ["Left out: learned prompts: least reads whole texts only: prompts are learned among word embeddings "
         "(embed_tokens)"] if model == "least" and number in ("04", "05", "07") else []
    )  # fmt: skip
    if number == "01" and folder.startswith("200"):
        assert "Left out: 170 classes: no image of them among 30; raise n_images" in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", ["05", "07"])
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
    with pytest.raises(ValueError, match="least reads whole texts only.*; notebooks 01, 02, 04, 05 and 07 need no"):
        finish(number, "2 classes", model="least")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", ["04", "05", "07"])
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
