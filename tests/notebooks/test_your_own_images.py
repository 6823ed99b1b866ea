"""Notebook 07 as someone runs it who has own images, own prompts and a CLIP of their own."""

import importlib.util
import json
import os
import re
from pathlib import Path

import notebook_cells
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medrobust_lib import cli
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.metrics import share_interval
from medrobust_lib.models.adapters import attach_adapters, load_adapter, trainable_share
from medrobust_lib.models.loading import load_model
from medrobust_lib.models.text_frame import why_not_learned
from medrobust_lib.smoothing.prompts import learn_prompts

pytestmark = pytest.mark.filterwarnings("ignore")
REAL = Path(os.environ.get("MEDROBUST_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data" / "real")
PROMPTS = {"lesion": "an ultrasound image of a bright lesion.", "healthy": "an ultrasound image without a lesion."}
WORDS = json.dumps({"class_names": PROMPTS, "templates": ["{}"]})  # JSON is YAML


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Someone with a model in the hub cache, and images in a folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def no_kernel(monkeypatch):
    """The notebook's cells run in this process."""
    notebook_cells.run_here_instead_of_in_a_kernel(monkeypatch)


def write_clip(hub: Path, repository: str) -> None:
    """A tiny CLIP in transformers' format, with random weights, as `hf download` leaves it."""
    path = Path(__file__).parents[1] / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("model_builders", path)
    builders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builders)
    root = hub / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / builders.REVISION
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(builders.REVISION)
    builders.write_plip(snapshot, end_token=49407, safetensors=True)


def write_images(folder: Path, *, healthy: int, lesion: int) -> None:
    """Images of two sizes; those of one class are brighter in the middle."""
    draw = np.random.default_rng(0)
    for name, count in {"healthy": healthy, "lesion": lesion}.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = draw.integers(30, 110, (48, 40 + 8 * (number % 2))).astype(np.uint8)
            image[16:32, 16:32] += 120 * (name == "lesion")
            Image.fromarray(image).save(folder / name / f"{number:02d}.png")


def run_notebook(user: Path, **parameters: object) -> dict:
    """``medrobust run 07``; returns the card."""
    (user / "parameters.yaml").write_text(json.dumps(parameters))
    arguments = ["run", "07", "-f", str(user / "parameters.yaml"), "--out", str(user / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return json.loads((user / "out" / "cards" / "07.json").read_text(encoding="utf-8"))


def read_tables(user: Path) -> tuple[pd.DataFrame, ...]:
    """Accuracies on clean and on corrupted images, and certificates."""
    names = ("accuracy", "corruptions", "certificates")
    return tuple(pd.read_csv(user / "out" / "cards" / f"07_{name}.csv") for name in names)


def test_an_undivided_folder_with_own_prompts_and_a_clip_of_the_hub(user, no_kernel):
    write_clip(user / "hub", "me/my-clip")
    write_images(user / "breast", healthy=10, lesion=6)
    (user / "breast" / "lesion" / "99.png").write_bytes((user / "breast" / "lesion" / "00.png").read_bytes())
    given = {"model": "hf:me/my-clip", "dataset": f"folder:{user / 'breast'}", "words": WORDS, "sigma": 0.05}
    card = run_notebook(user, **given)
    given |= {"dataset": "folder:breast"}  # no folder of this computer enters a card
    assert (card["parameters"] | given, card["model"]["id"]) == (card["parameters"], "hf:me/my-clip")
    assert card["dataset"]["classes"] == [PROMPTS["healthy"], PROMPTS["lesion"]]
    assert (card["dataset"]["id"], card["dataset"]["synthetic"]) == ("folder:breast", False)
    assert card["prompts"]["template"] == "{}"
    assert any("images were divided class by class, patients may be on both sides" in note for note in card["notes"])
    accuracy, corruptions, certificates = read_tables(user)
    methods = ["zero-shot", "learned prompts", "LoRA"]
    assert list(accuracy.name) == list(dict.fromkeys(corruptions.model)) == methods
    # 5 of 10 and 4 of 7 are left to test; the copy may have been drawn on either side.
    assert accuracy.n.nunique() == 1 and accuracy.n[0] in (8, 9) and (corruptions.n == accuracy.n[0]).all()
    assert corruptions[corruptions.corruption != "clean"].groupby("model").size().tolist() == [7 * 3] * 3
    assert set(certificates.guarantee) == {"standard"} and certificates.groupby("method").image.nunique().min() >= 8
    (folder,) = (user / "out" / "adapters").iterdir()
    facts = load_adapter(load_model("hf:me/my-clip", device="cpu"), folder).provenance
    assert list(facts["train"]) == ["folder:breast"]
    unchanged = any(note.startswith("LoRA: no epoch was better") for note in card["notes"])
    assert unchanged == (facts["best_epoch"] == 0)
    assert {path.name for path in user.iterdir()} == {"hub", "breast", "parameters.yaml", "out"}


def test_images_of_a_patient_stay_on_one_side_and_count_as_fewer(user, no_kernel):
    draw = np.random.default_rng(0)
    for name in ("healthy", "lesion"):
        for patient in range(6):
            (user / "breast" / name / f"p{patient}{name[0]}").mkdir(parents=True)
            for number in range(3):
                image = draw.integers(30, 110, (48, 48)).astype(np.uint8)
                image[:, : 4 * patient + 8] += 100
                Image.fromarray(image).save(user / "breast" / name / f"p{patient}{name[0]}" / f"{number}.png")
    card = run_notebook(user, dataset=f"folder:{user / 'breast'}")
    assert any("all images of a patient on one side" in note for note in card["notes"])
    images = pd.read_csv(user / "out" / "cards" / "07_images.csv")
    assert images.patient.nunique() < len(images) == card["dataset"]["n"]
    assert (images.file.str.split("/").str[1] == images.patient).all()
    assert images.right_when_corrupted.between(0, 1).all()
    accuracy = read_tables(user)[0].iloc[0]
    right = images.predicted == images.label
    assert (accuracy.low, accuracy.high) == pytest.approx(share_interval(right, groups=images.patient))
    assert (accuracy.low, accuracy.high) != pytest.approx(share_interval(right))


def test_too_few_images_to_divide_are_measured_and_nothing_is_learned(user, no_kernel):
    write_images(user / "two", healthy=1, lesion=1)
    rows = "healthy/00.png,healthy\nlesion/00.png,lesion\n"
    (user / "two" / "list.csv").write_text(f"path,label\n{rows}")
    card = run_notebook(user, dataset=f"csv:{user / 'two' / 'list.csv'}")
    assert (card["dataset"]["id"], card["dataset"]["n"]) == ("csv:list.csv", 2)
    assert any(note.startswith("Nothing was learned: ") for note in card["notes"])
    accuracy, corruptions, certificates = read_tables(user)
    assert list(accuracy.name) == ["zero-shot"] and set(corruptions.model) == set(certificates.method) == {"zero-shot"}
    assert len(certificates) == 2


def test_a_torchvision_resnet_is_measured_and_adapted_as_a_dual_encoder_is(user, no_kernel):
    write_images(user / "breast", healthy=12, lesion=12)
    given = {"model": "python:tiny_encoders:load_resnet", "dataset": f"folder:{user / 'breast'}", "sigma": 0.05}
    card = run_notebook(user, **given)
    assert card["model"]["id"] == "ResNet"
    reason = "ResNet is a classifier and reads no texts, so there are no prompts"
    assert f"Left out: learned prompts: {reason}" in card["notes"]
    accuracy, corruptions, certificates = read_tables(user)
    assert list(accuracy.name) == ["zero-shot", "LoRA"]
    # What its weights were set to tell apart it tells apart, by nothing but its own scores.
    assert accuracy.accuracy[0] == accuracy.balanced_accuracy[0] == 1
    plain = certificates[certificates.method == "zero-shot"]
    assert set(plain.model) == {"ResNet"} and set(certificates.guarantee) == {"standard"}
    assert len(plain) == 12 and (plain[plain.predicted != -1].radius > 0).any()
    assert corruptions[corruptions.corruption != "clean"].groupby("model").size().tolist() == [7 * 3] * 2


@pytest.mark.skipif(
    not (REAL / "folders" / "breast_us").is_dir(),
    reason=f"no real images at {REAL}; name their folder with MEDROBUST_REAL_DATA",
)
def test_real_ultrasound_images_in_class_folders(user, no_kernel):
    card = run_notebook(user, dataset=f"folder:{REAL / 'folders' / 'breast_us'}", n_images=14, fraction=0.05)
    assert card["dataset"] | {"classes": ["malignant", "normal benign"], "split": "test"} == card["dataset"]
    assert any("say nothing about medical models" in note for note in card["notes"])
    assert "train and test are the data set's own splits" in card["notes"]
    accuracy, _, certificates = read_tables(user)
    assert len(accuracy) == 3 and accuracy.accuracy.between(0, 1).all()
    answered = certificates[certificates.predicted != -1]
    assert (answered.radius >= 0).all() and (certificates.n_classes == 2).all()


def test_the_examples_of_the_page_about_own_images_and_models_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medrobust_lib.models.loading._REGISTERED", {})
    monkeypatch.chdir(tmp_path)
    for name in "BMN":
        (tmp_path / "my_images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "my_images" / name / "1.png")
    page = (Path(__file__).parents[2] / "docs" / "your_own.md").read_text(encoding="utf-8")
    data, functions, classifiers, model = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    run(data)
    assert "folder:my_images" in capsys.readouterr().out
    wrapped = run(functions)
    assert wrapped["model"].identity()["id"] == "two-functions" and len(wrapped["model"].networks) == 2
    assert set(wrapped["rows"].method) == {"zero-shot", "zero-shot ensemble"} and "mean" in wrapped["table"].index
    found = run(classifiers)
    assert [rows.method.unique().tolist() for rows in found["rows"]] == [["ResNet"], ["nearest"]]
    # A picture is its own nearest neighbour, and those beside it in pixel space are the same.
    assert (found["rows"][1].predicted == found["rows"][1].label).all()
    loaded = found["load_resnet"](None, weights_dir=None, offline=True)
    assert (loaded.image_size, loaded.embed_dim, len(loaded.networks)) == (224, 2, 1)
    small = run(model)["model"]
    assert small.id == "small" and why_not_learned(small) == ""
    few = load_dataset("phantom/breast", n=6)
    texts = [f"{'a ' * place}b" for place in range(4)]
    alone = torch.cat([small.encode_text([text]) for text in texts])
    torch.testing.assert_close(small.encode_text(texts), alone, rtol=0, atol=1e-5)  # padding changes nothing
    learned = learn_prompts(small, few, shots=1, sigmas=(0.0,), epochs=1, seed=0)
    assert not torch.equal(
        learned.class_features(small, few.classes), small.class_features(few.classes, ["a photo of {}"])
    )
    assert trainable_share(attach_adapters(small, rank=2)).adapters > 0


def run(example: str) -> dict:
    """Names that an example of the page leaves."""
    names: dict = {}
    exec(compile(example, "docs/your_own.md", "exec"), names)
    return names
