"""Notebook 04 as someone runs it who has BiomedCLIP's weights and MedMNIST, or an own model and own images.

Weights are random and tiny, in the layouts of the public ones.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import notebook_cells
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from transformers import BertConfig
from typer.testing import CliRunner

from medrobust_lib import cli
from medrobust_lib.data.splits import fraction_splits
from medrobust_lib.models.adapters import adapter_layout, load_adapter
from medrobust_lib.models.loading import load_model

pytestmark = pytest.mark.filterwarnings("ignore")
REAL = Path(os.environ.get("MEDROBUST_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data" / "real")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.-&,'"]
N_IMAGES = 12


@pytest.fixture(scope="module")
def builders():
    """What the tests of the models build their tiny models with."""
    path = Path(__file__).parents[1] / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("model_builders", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(builders, tmp_path_factory):
    """BiomedCLIP's files: a timm vision transformer of six blocks at 32 px, and a BERT that spells every word."""
    folder = tmp_path_factory.mktemp("weights") / "biomedclip"
    folder.mkdir()
    vocabulary = [*PIECES, *(f"##{letter}" for letter in PIECES[5:])]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=len(vocabulary), **small).save_pretrained(folder)
    builders.write_weights(folder, builders.biomedclip_configuration(str(folder), image_size=32))
    return folder.parent


@pytest.fixture
def user(weights, tmp_path, monkeypatch):
    """Someone with weights and data in folders of their own."""
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(weights))
    monkeypatch.setenv("MEDROBUST_DATA", str(tmp_path / "data"))
    notebook_cells.run_here_instead_of_in_a_kernel(monkeypatch)
    (tmp_path / "data" / "medmnist").mkdir(parents=True)
    return tmp_path


def write_stand_in(data: Path, name: str, *, train: int) -> None:
    """A small grey-scale file in MedMNIST's format; class 1 is brighter in the middle."""
    draw = np.random.default_rng(len(name))
    arrays = {}
    for split, count in (("train", train), ("val", 10), ("test", 20)):
        labels = (np.arange(count) % 3 > 0).astype(np.uint8)
        images = draw.integers(40, 120, (count, 28, 28)).astype(np.uint8)
        images[:, 8:20, 8:20] += 100 * labels[:, None, None]
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None]}
    np.savez(data / "medmnist" / f"{name}mnist.npz", **arrays)


def run_notebook(user: Path, model: str, datasets: list[str], **parameters: object) -> dict:
    """``medrobust run 04`` for a model and data sets; returns the card."""
    given = {"model": model, "datasets": f"[{','.join(datasets)}]", "fraction": 0.1, **parameters}
    assignments = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
    arguments = ["run", "04", *assignments, "--out", str(user / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return json.loads((user / "out" / "cards" / "04.json").read_text(encoding="utf-8"))


def check(user: Path, card: dict, datasets: list[str], *, rank: int) -> None:
    """What the notebook leaves, whatever the model and the data."""
    assert card["parameters"]["model"] == card["model"]["id"]
    assert (card["dataset"]["all"], card["parameters"]["fraction"]) == (datasets, 0.1)
    assert (card["dataset"]["n"], card["dataset"]["synthetic"]) == (N_IMAGES, False)
    tables = {
        name: pd.read_csv(user / "out" / "cards" / f"04_{name}.csv", dtype={"seed": str})
        for name in ("adaptation", "corruptions", "ablations", "certified")
    }
    adaptation, cells = tables["adaptation"], tables["corruptions"]
    assert list(dict.fromkeys(adaptation.dataset)) == list(dict.fromkeys(cells.dataset)) == datasets
    methods = {"zero-shot", "LoRA", "LoRA, noise", "full fine-tuning", "linear probe", "learned prompts"}
    for _, rows in adaptation.groupby("dataset"):
        assert set(rows.method) == methods
        assert set(rows[rows.method == "LoRA"].seed) == {"0", "1", "2"}
        assert set(rows[rows.method == "LoRA"]["rank"]) == {rank}
        assert (rows.n == N_IMAGES).all()
        assert rows[["clean_error", "average_accuracy"]].stack().between(0, 1).all()
    assert cells[cells.corruption != "clean"].groupby(["corruption", "severity"]).ngroups == 7 * 5
    assert set(tables["ablations"].fraction) == {0.1, 0.07, 0.03, 0.01}
    assert set(tables["certified"].guarantee) == {"standard"}
    assert (user / "out" / "figures" / "04_headline.png").is_file()
    images = pd.read_csv(user / "out" / "cards" / "04_images.csv")
    assert images.groupby("dataset", sort=False).size().to_dict() == dict.fromkeys(datasets, N_IMAGES)
    assert not images["file"].str.startswith("/").any() and images["confidence"].between(0, 1).all()
    assert card["question"].endswith("?") and len(card["findings"]) == 2


def check_adapters(user: Path, datasets: list[str], *, rank: int) -> None:
    """The adapters that were trained are there, go on BiomedCLIP again, and saw the right images."""
    base = load_model("biomedclip", device="cpu")
    layout = adapter_layout(base)
    assert (layout.kind, layout.blocks, layout.fused) == ("query, key, value", 6, True)
    folders = [path.parent for path in (user / "out").rglob("adapter_config.json")]
    facts = [load_adapter(base, folder).provenance for folder in folders]
    numbers = {found["trainable"] for found in facts if found["rank"] == rank}
    assert numbers == {layout.blocks * 3 * rank * (64 + 64)}
    # Three seeds and one with noise, three smaller fractions, and the lower of the ranks 8 and 4.
    assert len(facts) == 3 + 1 + 3 + sum(lower < rank for lower in (8, 4))
    for found in facts:
        assert list(found["train"]) == list(found["validation"]) == datasets
        assert {part["split"] for part in found["train"].values()} == {"train"}
        assert {part["split"] for part in found["validation"].values()} == {"val"}


def test_the_two_data_sets_of_the_command_are_adapted_to_at_once(user):
    datasets = ["medmnist/breast", "medmnist/pneumonia"]
    write_stand_in(user / "data", "breast", train=60)
    write_stand_in(user / "data", "pneumonia", train=90)
    splits = fraction_splits("medmnist/pneumonia", fraction=0.1, n_val=60, n_test=N_IMAGES)
    assert (len(splits.train), len(splits.val), len(splits.test), splits.train.synthetic) == (9, 10, 12, False)
    card = run_notebook(user, "biomedclip", datasets, n_images=N_IMAGES, rank=8)
    check(user, card, datasets, rank=8)
    check_adapters(user, datasets, rank=8)


def test_the_notebook_runs_on_the_real_breast_images(user):
    path = REAL / "medmnist" / "breastmnist.npz"
    if not path.is_file():
        pytest.skip(f"no {path}; name the folder of real images with MEDROBUST_REAL_DATA")
    shutil.copy(path, user / "data" / "medmnist")
    card = run_notebook(user, "biomedclip", ["medmnist/breast"], n_images=N_IMAGES)
    assert card["dataset"]["id"] == "medmnist/breast"
    check(user, card, ["medmnist/breast"], rank=16)
    check_adapters(user, ["medmnist/breast"], rank=16)


def test_the_notebook_runs_on_undivided_folders_with_open_clips_own_transformer(user, builders):
    """No splits, a data set that is not in the registry, and attention that holds its weights itself."""
    model, images = user / "mine", user / "colours"
    model.mkdir()
    size = builders.write_word_tokenizer(model, context_length=48)
    builders.write_weights(model, builders.tiny_configuration(size, context_length=48, hf_tokenizer_name="beside"))
    draw = np.random.default_rng(0)
    for name, colour in (("tissue", (200, 60, 120)), ("debris", (60, 120, 200))):
        (images / name).mkdir(parents=True)
        for number in range(14):
            pixels = (np.array(colour) + draw.integers(-50, 50, (36, 40, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(images / name / f"{number}.png")
    card = run_notebook(user, f"local-dir:{model}", [], dataset=f"folder:{images}", n_images=N_IMAGES, rank=2)
    check(user, card, ["folder:colours"], rank=2)
    for path in (user / "out").rglob("provenance.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        (learned,), (shown,) = facts["train"].values(), facts["validation"].values()
        assert not set(learned["indices"]) & set(shown["indices"])
