"""Notebook 03 as someone runs it who has PLIP's weights and prepared tiles, with random weights and drawn tiles."""

import json
import os
import shutil
from pathlib import Path

import notebook_cells
import numpy as np
import pandas as pd
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from typer.testing import CliRunner

from medrobust_lib import cli
from medrobust_lib.data.splits import learning_splits
from medrobust_lib.models.loading import load_model

TISSUES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
TEN_TILES = dict.fromkeys(TISSUES, 1) | {"NORM": 2}
pytestmark = pytest.mark.filterwarnings("ignore")
REAL = Path(os.environ.get("MEDROBUST_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data" / "real")
REAL_TILES = REAL / "folders" / "colon_tiles"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """PLIP's files: CLIP's real tokenizer and preprocessing at 224 px, and towers of one layer."""
    folder = tmp_path_factory.mktemp("weights") / "plip"
    folder.mkdir()
    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in tokenizer.encoder.items()}
    merges = "".join(f"{first} {second}\n" for first, second in tokenizer.bpe_ranks)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    preprocessing = {
        "feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "size": 224, "resample": 3,
        "do_center_crop": True, "crop_size": 224, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    configuration = CLIPConfig(
        text_config={**tower, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        vision_config={**tower, "image_size": 224, "patch_size": 32},
        projection_dim=24,
    )
    model = CLIPModel(configuration)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":  # untrained towers give nearly the same features to all inputs
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder.parent


def write_tiles(data: Path, *, real: bool = False, **counts: dict[str, int]) -> Path:
    """Tiles of 224 px in the layout that prepare_pathology.py leaves: drawn, each class in a colour of its own.

    With ``real``, real colon tiles take their place where a copy of them is at hand.
    """
    folder = data / "pathology" / "kather"
    draw = np.random.default_rng(0)
    for split, classes in counts.items():
        for code, count in classes.items():
            (folder / "images" / split / code).mkdir(parents=True)
            for number in range(count):
                colour = np.array([25 * TISSUES.index(code), 128, 200]) + draw.integers(-20, 20, (224, 224, 3))
                Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(
                    folder / "images" / split / code / f"{code}-{number}.tif"
                )
    if real and REAL_TILES.is_dir():
        for code in TISSUES:
            drawn = sorted((folder / "images").glob(f"*/{code}/*.tif"))
            for tile, path in zip(sorted(REAL_TILES.glob(f"*{code}-*.tif")), drawn, strict=True):
                shutil.copy(tile, path)
    (folder / "manifest.json").write_text(json.dumps({"counts": counts}))
    return data


@pytest.fixture
def user(weights, tmp_path, monkeypatch):
    """Someone with weights and data in folders of their own."""
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(weights))
    monkeypatch.setenv("MEDROBUST_DATA", str(tmp_path / "data"))
    notebook_cells.run_here_instead_of_in_a_kernel(monkeypatch)
    return tmp_path


def test_the_pieces_that_the_notebook_needs_are_found(user):
    write_tiles(user / "data", train=dict.fromkeys(TISSUES, 1), test={"NORM": 1})
    model = load_model("plip", device="cpu")
    splits = learning_splits("pathology/kather", shots=16, n_test=90, n_pool=90, seed=0)
    assert (model.image_size, len(splits.train), len(splits.test)) == (224, 9, 1)
    assert splits.divided and splits.pool.images.shape == (9, 224, 224, 3)


@pytest.mark.parametrize(
    ("tiles", "sigmas", "tested"),
    [
        ({"train": TEN_TILES, "test": dict.fromkeys(("LYM", "NORM", "STR", "TUM"), 1)}, [0.25, 0.5], 4),
        ({"test": TEN_TILES}, [0.25], 1),  # nine are learned from
    ],
    ids=["train and test", "test only"],
)
def test_notebook_runs_on_prepared_tiles_with_plip(user, tiles, sigmas, tested):
    write_tiles(user / "data", real="train" not in tiles, **tiles)
    parameters = {"model": "plip", "dataset": "pathology/kather", "sigmas": sigmas, "n_draws": 30}
    assignments = [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]
    result = CliRunner().invoke(cli.app, ["run", "03", *assignments, "--out", str(user / "out")])
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    card = json.loads((user / "out" / "cards" / "03.json").read_text(encoding="utf-8"))
    assert (parameters | {"n_images": sum(tiles["test"].values())}).items() <= card["parameters"].items()
    assert (card["model"]["id"], card["model"]["image_size"]) == ("plip", 224)
    assert (card["dataset"]["n"], card["dataset"]["synthetic"]) == (tested, False)
    left_out = [note.split(":")[1].strip() for note in card["notes"] if note.startswith("Left out: ")]
    assert left_out == ["denoised", "diffusion"]  # nobody trained one for these tiles
    table = pd.read_csv(user / "out" / "cards" / "03_certified_accuracy.csv")
    assert {"standard", "frozen-prompt", "candidate-set"} <= set(table["guarantee"])
    within = table["radius"] <= table["radius_reach"]
    assert table["certified_accuracy"][within].between(0, 1).all() and (table["n"] == tested).all()
    assert table["certified_accuracy"][~within].isna().all() and (~within).any()  # 30 draws do not reach all radii
    assert (user / "out" / "figures" / "03_headline.png").is_file()
    images = pd.read_csv(user / "out" / "cards" / "03_images.csv")
    assert (card["images"], len(images), set(images["guarantee"])) == ("03_images", tested, {"standard"})
    assert images["file"].str.endswith(".tif").all() and not images["file"].str.startswith("/").any()
    assert card["question"].endswith("?") and len(card["findings"]) == 2
    assert not [sentence for sentence in card["findings"] if "nan" in sentence]
