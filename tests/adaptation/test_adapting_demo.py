"""The adapters that come with the demo models: small, honest about their training, and found only where they fit."""

import copy
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from medrobust_lib import metrics
from medrobust_lib.adaptation import adapting
from medrobust_lib.adaptation.adapting import (
    DEMO_ADAPTERS,
    DEMO_DATASETS,
    DEMO_NOISE,
    DEMO_RECIPE,
    demo_folder_name,
    find_demo_adapter,
)
from medrobust_lib.adaptation.training_images import PAPER_AUGMENTATION, Augmentation
from medrobust_lib.data.splits import fraction_splits
from medrobust_lib.models.adapters import attach_adapters, attached_adapters, load_adapter, trainable_share
from medrobust_lib.models.loading import load_model

ROOT = Path(__file__).parents[2]
CARD = (DEMO_ADAPTERS / "MODEL_CARD.md").read_text(encoding="utf-8")
NAMES = ["/".join(row) for row in re.findall(r"^\| (\S+) \| `(\S+)` \|", CARD, re.MULTILINE)]  # MODEL/FOLDER
ONE = {"fraction": 0.1, "rank": 16, "seed": 1}
LARGEST = 3_000_000  # bytes of all folders together


@pytest.fixture(scope="module")
def planned():
    """The adapters that the script makes."""
    path = ROOT / "data_scripts" / "train_demo_adapters.py"
    spec = importlib.util.spec_from_file_location("train_demo_adapters", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {str(module.folder_of(Path(), job)): job for job in module.JOBS}


@pytest.fixture(scope="module")
def towers():
    return {id: load_model(id, device="cpu") for id in ("demo-clip", "demo-clip-vit")}


def stored(name):
    return json.loads((DEMO_ADAPTERS / name / "provenance.json").read_text(encoding="utf-8"))


def test_card_script_and_folders_name_the_same_adapters(planned):
    assert len(NAMES) >= 11
    assert list(planned) == NAMES
    assert sorted(NAMES) == sorted(f"{path.parent.name}/{path.name}" for path in DEMO_ADAPTERS.glob("*/*"))
    assert "**They have seen synthetic phantoms only. Not for clinical use.**" in CARD


def test_all_folders_together_are_small():
    files = [path for path in DEMO_ADAPTERS.rglob("*") if path.is_file()]
    assert len(files) == 1 + 3 * len(NAMES)
    assert 0 < sum(path.stat().st_size for path in files) <= LARGEST


def test_they_are_package_data():
    package = ROOT / "medrobust_lib"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["medrobust_lib"]
    covered = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in DEMO_ADAPTERS.rglob("*") if path.is_file()} <= covered


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_on_its_model_and_changes_its_image_features_only(towers, name):
    id, folder = name.split("/")
    model = towers[id]
    adapted = load_adapter(model, DEMO_ADAPTERS / name)
    assert adapted.id == f"{id} + {folder}"
    assert attached_adapters(adapted) is None
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    change = (adapted.encode_image(pixels) - model.encode_image(pixels)).norm(dim=1)
    assert (change > 0.02).all()
    assert torch.equal(adapted.encode_text(["a scan"]), model.encode_text(["a scan"]))


@pytest.mark.parametrize("name", NAMES)
def test_each_was_trained_as_its_name_says_on_train_images_only(planned, towers, name):
    job, facts = planned[name], stored(name)
    augmentation = DEMO_NOISE if job.noisy else PAPER_AUGMENTATION
    assert (
        demo_folder_name(fraction=job.fraction, rank=job.rank, seed=job.seed, augmentation=augmentation)
        == name.split("/")[1]
    )
    assert (facts["rank"], facts["adapter"]["rank"], facts["recipe"]["seed"]) == (job.rank, job.rank, job.seed)
    assert DEMO_RECIPE.items() <= facts["recipe"].items()
    assert facts["recipe"]["augmentation"]["sigmas"] == ([0.1, 0.2] if job.noisy else [])
    of_rank_1 = trainable_share(attach_adapters(towers[job.model], rank=1)).adapters
    assert facts["trainable"] == facts["adapter"]["parameters"] == job.rank * of_rank_1
    for role, split, fraction in (("train", "train", job.fraction), ("validation", "val", None)):
        assert list(facts[role]) == list(DEMO_DATASETS)
        for part in facts[role].values():
            assert (part["split"], part["fraction"], part["synthetic"]) == (split, fraction, True)
            assert len(set(part["indices"])) == part["n"] == len(part["indices"])
    assert not re.search(r'"test"', json.dumps(facts))


@pytest.mark.parametrize("name", NAMES)
def test_each_improves_validation_by_its_own_record(name):
    facts = stored(name)
    means = [row["val_mean"] for row in facts["history"]]
    assert facts["best_epoch"] == int(np.argmax(means)) > 0
    assert 1 - max(means) < 0.85 * (1 - means[0])  # of the errors
    others = [stored(other)["history"][0]["val_mean"] for other in NAMES if other.split("/")[0] == name.split("/")[0]]
    assert means[0] == pytest.approx(np.mean(others), abs=0.001)  # they all start from the same weights and images
    row = next(line for line in CARD.splitlines() if line.startswith("| {} | `{}`".format(*name.split("/"))))
    assert f"| {means[0]:.3f} | {max(means):.3f} |" in row


@pytest.mark.parametrize("id", ["demo-clip", "demo-clip-vit"])
def test_the_improvement_can_be_measured(towers, id):
    """On the val images of the record, with half-precision weights as they are shipped."""
    model, name = towers[id], f"{id}/{demo_folder_name(**ONE)}"
    facts = stored(name)
    adapted = load_adapter(model, DEMO_ADAPTERS / name)
    scores = {model.id: [], adapted.id: []}
    for name in DEMO_DATASETS:
        part = fraction_splits(name, fraction=0.01, n_val=60, n_test=1)
        assert part.val.indices.tolist() == facts["validation"][name]["indices"]
        texts = model.class_features(part.val.classes, facts["validation"][name]["templates"])
        for tower in (model, adapted):
            with torch.inference_mode():
                answers = (tower.encode_image(model.prepare(part.val.images)) @ texts.T).argmax(1).numpy()
            scores[tower.id].append(metrics.balanced_accuracy(part.val.labels, answers))
    means = [row["val_mean"] for row in facts["history"]]
    before, after = (np.mean(values) for values in scores.values())
    assert before == pytest.approx(means[0], abs=0.01)
    assert after == pytest.approx(max(means), abs=0.01)
    assert 1 - after < 0.85 * (1 - before)


def test_an_adapter_is_found_for_exactly_its_training(towers):
    for id, model in towers.items():
        folder = DEMO_ADAPTERS / id / "rank16-10percent-seed1"
        assert find_demo_adapter(model, list(DEMO_DATASETS), **ONE) == folder
    model = towers["demo-clip-vit"]
    noisy = find_demo_adapter(model, DEMO_DATASETS, fraction=0.1, rank=16, seed=0, augmentation=DEMO_NOISE)
    assert noisy == DEMO_ADAPTERS / model.id / "rank16-10percent-seed0-noise"
    assert find_demo_adapter(model, DEMO_DATASETS, fraction=0.07, rank=16, seed=0).name == "rank16-7percent-seed0"


@pytest.mark.parametrize("name", NAMES)
def test_each_is_found_although_recipes_have_got_more_fields_since(planned, towers, name):
    job = planned[name]
    augmentation = DEMO_NOISE if job.noisy else PAPER_AUGMENTATION
    asked = {"fraction": job.fraction, "rank": job.rank, "seed": job.seed, "augmentation": augmentation}
    assert "logits" not in stored(name)["recipe"]
    assert find_demo_adapter(towers[job.model], DEMO_DATASETS, **asked) == DEMO_ADAPTERS / name


@pytest.mark.parametrize(
    "other",
    [
        {"datasets": DEMO_DATASETS[:5]},
        {"datasets": DEMO_DATASETS[::-1]},
        {"datasets": (*DEMO_DATASETS, "medmnist/breast")},
        {"fraction": 0.2},
        {"fraction": 0.101},
        {"rank": 2},
        {"seed": 7},
        {"augmentation": DEMO_NOISE},  # there is one for seed 0 only
    ],
    ids=lambda other: "-".join(other),
)
def test_nothing_is_found_for_another_training(model, other):
    asked = {"datasets": DEMO_DATASETS, **ONE, **other}
    assert find_demo_adapter(model, asked.pop("datasets"), **asked) is None


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(crop=0.5),
        Augmentation(flip=False),
        Augmentation(corruptions=("pixelate",)),
        Augmentation(sigmas=(0.5,)),
        Augmentation(sigmas=(0.1, 0.2), share=1.0),
    ],
    ids=str,
)
def test_nothing_is_found_for_another_augmentation(model, augmentation):
    assert find_demo_adapter(model, DEMO_DATASETS, fraction=0.1, rank=16, seed=0, augmentation=augmentation) is None
    assert find_demo_adapter(model, DEMO_DATASETS, **ONE, augmentation=augmentation) is None


def test_nothing_is_found_for_other_weights(model):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.visual.conv1.weight[0, 0, 0, 0] += 0.1
    assert find_demo_adapter(changed, DEMO_DATASETS, **ONE) is None
    assert find_demo_adapter(copy.deepcopy(model).to(torch.bfloat16), DEMO_DATASETS, **ONE) is not None


def test_a_folder_without_adapters_holds_none(model, tmp_path, monkeypatch):
    monkeypatch.setattr(adapting, "DEMO_ADAPTERS", tmp_path)
    assert find_demo_adapter(model, DEMO_DATASETS, **ONE) is None
