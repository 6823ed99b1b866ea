"""Adapters and fine-tuning of demo-clip: what changes, what is remembered, finished and interrupted folders, errors."""

import contextlib
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

import medrobust_lib as mr
from medrobust_lib import metrics
from medrobust_lib.adaptation.adapting import AS_PUBLISHED, adapt_lora, fine_tune
from medrobust_lib.adaptation.training_images import Augmentation
from medrobust_lib.corruptions.suites import corrupted
from medrobust_lib.models.adapters import adapter_parameters, attached_adapters
from medrobust_lib.models.dual_encoder import find_image_tower

BEST = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 8, "rank": 4}
TUNED = {name: value for name, value in BEST.items() if name != "rank"} | {"learning_rate": 3e-4}
RECIPES = {adapt_lora: BEST, fine_tune: TUNED}
BALANCED_ACCURACY = metrics.balanced_accuracy
SETS = {"breast": 8, "oct": 12}


@pytest.fixture(scope="module")
def data(phantoms):
    """Training and validation images of two sets."""
    return tuple([phantoms(name, split=split, n=n) for name, n in SETS.items()] for split in ("train", "val"))


@contextlib.contextmanager
def rising_validation():
    """Validation that rises from epoch to epoch, so that the last one counts."""
    count = iter(range(10_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "balanced_accuracy", lambda *_: next(count) / 10_000)
        yield


@pytest.fixture(autouse=True)
def improving():
    with rising_validation():
        yield


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    """Function giving what a method learns, made once in memory or in a folder and not to be changed."""

    @functools.cache
    def made(method, *, in_folder=False):
        out = tmp_path_factory.mktemp("trained") / "below" / "breast-oct" if in_folder else None
        with rising_validation():
            return method(model, data[0], validation=data[1], out=out, **RECIPES[method]), out

    return made


@pytest.fixture
def adapted(trained):
    return trained(adapt_lora)[0]


@pytest.fixture
def steps(monkeypatch):
    """List with an entry for each step of training."""
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: taken.append(0) or step(self))
    return taken


def changed(before, after):
    assert before.keys() <= after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def features(model, data):
    return model.encode_image(model.prepare(data[1][0].images))


# What changes


def test_only_adapters_learn(model, data, adapted):
    untrained = adapt_lora(model, data[0], validation=data[1], **BEST | {"epochs": 0})
    names = set(adapter_parameters(adapted.model))
    assert changed(untrained.model.state_dict(), adapted.model.state_dict()) == names
    assert all(name.startswith("model.visual.") for name in names)
    assert adapted.trainable == sum(parameter.numel() for parameter in adapter_parameters(adapted.model).values())
    assert torch.equal(features(untrained.model, data), features(model, data))
    assert not torch.allclose(features(adapted.model, data), features(model, data), atol=1e-3)


def test_the_given_model_and_its_texts_stay(model, data, adapted):
    fresh = mr.load_model("demo-clip", device="cpu")
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert not changed(model.state_dict(), fresh.state_dict())
    assert (model.id, model.provenance) == (fresh.id, fresh.provenance)
    texts = ["an image of debris.", "a drusen"]
    assert torch.equal(model.encode_text(texts), adapted.model.encode_text(texts))


def test_the_adapted_model_is_frozen_and_ready_for_certificates(adapted):
    assert not any(part.training for part in adapted.model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in adapted.model.parameters())
    assert adapted.model.id == "demo-clip + adapters of rank 4"
    assert adapted.best_epoch == 2 and adapted.seconds > 0


def test_fine_tuning_changes_all_of_the_image_tower_and_no_statistics(model, trained):
    tuned, _ = trained(fine_tune)
    wanted = set(find_image_tower(model).parameters)
    # Shifts before a batch normalisation with frozen statistics still have gradients; keys' biases have none.
    moved = changed(model.state_dict(), tuned.model.state_dict())
    assert moved <= wanted and len(moved) >= len(wanted) - 1
    assert tuned.trainable == sum(model.state_dict()[name].numel() for name in wanted)
    assert not any("running" in name for name in moved)
    texts = ["an image of debris."]
    assert torch.equal(model.encode_text(texts), tuned.model.encode_text(texts))
    assert tuned.model.id == "demo-clip + fine-tuning"
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())


def test_seeds_decide_the_adapters(model, data, adapted):
    again = adapt_lora(model, data[0], validation=data[1], **BEST)
    assert not changed(adapted.model.state_dict(), again.model.state_dict())
    other = adapt_lora(model, data[0], validation=data[1], seed=1, **BEST)
    names = set(adapter_parameters(adapted.model))
    assert changed(adapted.model.state_dict(), other.model.state_dict()) == names
    starts = [adapt_lora(model, data[0], validation=data[1], epochs=0, seed=seed) for seed in (0, 1)]
    differing = changed(*(start.model.state_dict() for start in starts))
    assert differing == {name for name in names if ".lora_A." in name}  # B begins as zero


def test_adaptation_wins_on_images_it_has_not_seen(model, phantoms, monkeypatch):
    monkeypatch.setattr(metrics, "balanced_accuracy", BALANCED_ACCURACY)
    splits = (phantoms("blood", split=split, n=64) for split in ("train", "val", "test"))
    train, val, test = (corrupted(part, "contrast", severity=3) for part in splits)  # there is something to win
    adapted = adapt_lora(model, [train], validation=[val], epochs=5, learning_rate=1e-3, schedule="one-cycle")
    texts = model.class_features(test.classes, test.templates[:1])
    share = [
        ((each.encode_image(each.prepare(test.images)) @ texts.T).argmax(1).numpy() == test.labels).mean()
        for each in (model, adapted.model)
    ]
    assert share[1] > share[0] + 0.1
    means = adapted.history.groupby("epoch").val_mean.first()
    assert adapted.best_epoch == means.idxmax() > 0


# What is remembered


def test_the_recipe_and_the_images_are_kept(model, data, adapted):
    kept = adapted.model.provenance
    json.dumps(kept, allow_nan=False)
    assert (kept["method"], kept["rank"], kept["qkv"]) == ("low-rank adaptation", 4, "separate")
    assert kept["recipe"] == {
        "epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 1e-4, "schedule": "constant",
        "softmax": "masked", "seed": 0,
        "augmentation": {"crop": 0.8, "flip": True, "sigmas": [], "corruptions": [], "share": 0.5},
    }  # fmt: skip
    for part, sets in (("train", data[0]), ("validation", data[1])):
        for each in sets:
            found = kept[part][each.id]
            assert found["indices"] == each.indices.tolist() and found["split"] == each.split
            assert found["templates"] == [each.templates[0]] and found["classes"] == list(each.classes)
    assert kept["base"]["id"] == "demo-clip" and kept["base"]["licence"] == model.provenance["licence"]
    assert [row["epoch"] for row in kept["history"]] == adapted.history.epoch.tolist() == [0, 0, 1, 1, 2, 2]
    assert kept["best_epoch"] == 2


def test_the_training_as_published_is_that_of_the_authors_code(model, data):
    train = [dataclasses.replace(each, templates=each.templates[1:]) for each in data[0]]
    adapted = adapt_lora(model, train, validation=data[1], **{**AS_PUBLISHED, "epochs": 1})
    kept = adapted.model.provenance
    for part, template in (("train", "a medical image of {} belonging"), ("validation", "a medical image of a {} be")):
        assert all(facts["templates"][0].startswith(template) for facts in kept[part].values())
    assert (kept["rank"], kept["qkv"], AS_PUBLISHED["epochs"]) == (16, "separate", 20)
    assert kept["recipe"] == {
        "epochs": 1, "batch_size": 256, "learning_rate": 1e-4, "weight_decay": 1e-4, "schedule": "constant",
        "softmax": "global", "logits": "raw", "seed": 42,
        "augmentation": {"crop": 0.8, "flip": True, "sigmas": [], "corruptions": [], "share": 0.5},
    }  # fmt: skip
    assert adapted.best_epoch == 1 and not torch.equal(features(adapted.model, data), features(model, data))


def test_adapters_of_the_middle_of_a_kernel_are_trained_and_kept(model, data, tmp_path):
    options = {"validation": data[1], "rank": 2, "epochs": 1, "learning_rate": 1e-2, "out": tmp_path / "middle"}
    adapted = adapt_lora(model, data[0], kernel="middle", **options)
    assert adapted.model.provenance["kernel"] == attached_adapters(adapted.model).kernel == "middle"
    assert adapted.trainable < adapt_lora(model, data[0], validation=data[1], rank=2, epochs=0).trainable
    again = adapt_lora(model, data[0], kernel="middle", **options)
    assert torch.equal(features(again.model, data), features(adapted.model, data))
    assert not torch.equal(features(adapted.model, data), features(model, data))
    with pytest.raises(ValueError, match="kernel"):
        adapt_lora(model, data[0], **options)


def test_the_fraction_of_the_training_split_is_kept(model, data):
    tenth = dataclasses.replace(data[0][0], provenance={**data[0][0].provenance, "fraction": 0.1})
    found = adapt_lora(model, [tenth], validation=data[1][:1], **BEST | {"epochs": 0})
    assert found.model.provenance["train"]["phantom/breast"]["fraction"] == 0.1


def test_a_run_without_improvement_is_told(model, data, monkeypatch):
    monkeypatch.setattr(metrics, "balanced_accuracy", lambda *_: 0.5)
    with pytest.warns(UserWarning, match="no epoch of 2 is better on the validation images than demo-clip") as told:
        found = adapt_lora(model, data[0], validation=data[1], **BEST)
    assert told[0].filename == __file__
    assert found.best_epoch == 0
    assert torch.equal(features(found.model, data), features(model, data))


# Folders


@pytest.mark.parametrize("method", [adapt_lora, fine_tune])
def test_a_finished_folder_is_loaded_instead_of_trained(model, data, trained, steps, method):
    first, out = trained(method, in_folder=True)
    assert [path.name for path in out.parent.iterdir()] == ["breast-oct"]
    steps.clear()
    again = method(model, data[0], validation=data[1], out=str(out), **RECIPES[method])
    assert not steps
    assert torch.equal(features(first.model, data), features(again.model, data))
    assert not torch.equal(features(first.model, data), features(model, data))
    assert again.history.equals(first.history)
    assert (again.best_epoch, again.trainable, again.seconds) == (first.best_epoch, first.trainable, first.seconds)
    assert again.model.id == first.model.id == "demo-clip + breast-oct"
    assert again.model.provenance == first.model.provenance


def test_an_adapter_folder_is_what_load_model_takes(data, adapted, trained):
    made, out = trained(adapt_lora, in_folder=True)
    assert torch.equal(features(made.model, data), features(adapted.model, data))
    loaded = mr.load_model("demo-clip", device="cpu", adapter=out)
    assert torch.allclose(features(loaded, data), features(made.model, data), atol=1e-5)
    assert loaded.id == made.model.id
    assert loaded.provenance["recipe"] == made.model.provenance["recipe"]


@pytest.mark.hardening(
    area="interruption", tried="an interrupt during adapt_lora and fine_tune with a folder",
    outcome="the same call goes on; the result is the undisturbed one",
)  # fmt: skip
@pytest.mark.parametrize("method", [adapt_lora, fine_tune])
def test_an_interrupted_folder_is_continued(model, data, trained, tmp_path, monkeypatch, steps, method):
    change, (expected, _) = RECIPES[method], trained(method)
    counted = torch.optim.AdamW.step
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        # In the last of three steps of the second epoch.
        broken.setattr(torch.optim.AdamW, "step", lambda self: counted(self) if len(steps) < 5 else stop())
        steps.clear()
        method(model, data[0], validation=data[1], out=tmp_path / "made", **change)
    assert [path.name for path in tmp_path.iterdir()] == ["made.training"]
    with pytest.raises(ValueError, match="recipe.seed: the store has 0, this run asks 5"):
        method(model, data[0], validation=data[1], out=tmp_path / "made", seed=5, **change)
    steps.clear()
    resumed = method(model, data[0], validation=data[1], out=tmp_path / "made", **change)
    assert len(steps) == 3
    assert torch.equal(features(expected.model, data), features(resumed.model, data))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def stop():
    raise KeyboardInterrupt


def test_a_folder_of_other_parameters_is_refused(model, data, tmp_path):
    few = {"validation": data[1], "epochs": 0}
    adapt_lora(model, data[0], rank=2, out=tmp_path / "made", **few)
    rank, crop = "rank: the folder has 2, this run asks 3", "augmentation.crop: the folder has 0.8, this run asks 1"
    with pytest.raises(ValueError, match="other parameters") as refused:
        adapt_lora(model, data[0], rank=3, augmentation=Augmentation(crop=1), out=tmp_path / "made", **few)
    assert rank in str(refused.value) and crop in str(refused.value)
    with pytest.raises(ValueError, match=r"train.phantom/breast.n: the folder has 8, this run asks 6"):
        adapt_lora(model, [data[0][0].subset(range(6)), data[0][1]], rank=2, out=tmp_path / "made", **few)
    brighter = dataclasses.replace(data[0][0], images=data[0][0].images | np.uint8(1))
    with pytest.raises(ValueError, match='breast.content: the folder has "[0-9a-f]{16}", this run asks "[0-9a-f]{16}"'):
        adapt_lora(model, [brighter, data[0][1]], rank=2, out=tmp_path / "made", **few)
    method = 'method: the folder has "low-rank adaptation", this run asks "fine-tuning of the image tower"'
    with pytest.raises(ValueError, match=method):
        fine_tune(model, data[0], out=tmp_path / "made", **few)


def test_a_folder_of_other_things_is_refused(model, data, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("mine")
    for method in (adapt_lora, fine_tune):
        with pytest.raises(ValueError, match="notes holds something else than a finished adaptation; give another"):
            method(model, data[0], validation=data[1], epochs=0, out=tmp_path / "notes")
    (tmp_path / "notes" / "provenance.json").write_text("{")
    with pytest.raises(ValueError, match="provenance.json is damaged: .* Delete .*notes and train anew"):
        fine_tune(model, data[0], validation=data[1], epochs=0, out=tmp_path / "notes")
    (tmp_path / "empty").mkdir()
    fine_tune(model, data[0], validation=data[1], epochs=0, out=tmp_path / "empty")
    tower = tmp_path / "empty" / "image_tower.safetensors"
    tower.write_bytes(tower.read_bytes()[:-5])
    with pytest.raises(ValueError, match="image_tower.safetensors, the file is damaged"):
        fine_tune(model, data[0], validation=data[1], epochs=0, out=tmp_path / "empty")


# Errors


def test_training_images_are_not_for_validation(model, data):
    train = data[0][0]
    with pytest.raises(
        ValueError, match=r"phantom/breast: 3 images of split 'train' are both in training and in valid"
    ):
        adapt_lora(model, [train], validation=[train.subset([2, 5, 7])])
    other = dataclasses.replace(train, split="val")  # the same numbers in another split are other images
    adapt_lora(model, [train], validation=[other], epochs=0)


def test_data_that_cannot_be_used_are_refused(model, data):
    train, val = data
    with pytest.raises(ValueError, match="train holds no data set; give at least one"):
        adapt_lora(model, [], validation=val)
    with pytest.raises(ValueError, match="validation holds no data set"):
        fine_tune(model, train, validation=[])
    with pytest.raises(TypeError, match="train is one data set; give a list"):
        adapt_lora(model, train[0], validation=val)
    with pytest.raises(ValueError, match="train holds 'phantom/breast' twice"):
        adapt_lora(model, [train[0], train[0]], validation=val)
    with pytest.raises(ValueError, match="phantom/breast: no image of class '.*' to learn from"):
        adapt_lora(model, [train[0].subset(train[0].labels > 0)], validation=val)
    renamed = dataclasses.replace(val[1], classes=("w", "x", "y", "z"))
    with pytest.raises(ValueError, match="phantom/oct: the classes of training, .* are not those of validation, w, x"):
        adapt_lora(model, train, validation=[val[0], renamed])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"qkv": "both"}, "unknown qkv 'both'"),
        ({"kernel": "rim"}, "unknown kernel 'rim'"),
        ({"epochs": -1}, "epochs=-1"),
        ({"softmax": "all"}, "unknown softmax 'all'"),
        ({"logits": "unit"}, "unknown logits 'unit'; choose one of cosine, raw"),
        ({"templates": ["no place"], "epochs": 0}, "template 'no place' lacks '{}'"),
    ],
)
def test_impossible_parameters_are_refused(model, data, change, message):
    with pytest.raises(ValueError, match=message):
        adapt_lora(model, data[0], validation=data[1], **change)


def test_a_model_in_training_mode_is_refused(data):
    model = mr.load_model("demo-clip", device="cpu").train()
    for method in (adapt_lora, fine_tune):
        with pytest.raises(ValueError, match=r"is in training mode.* call .eval\(\) first"):
            method(model, data[0], validation=data[1])


def test_bfloat16_is_trained_in_float32_and_comes_back(model, data):
    half = mr.load_model("demo-clip", device="cpu", dtype="bfloat16")
    for method, change in ((adapt_lora, BEST), (fine_tune, TUNED)):
        found = method(half, data[0], validation=data[1], **change)
        assert found.model.dtype == torch.bfloat16
        assert {part.weight.dtype for part in found.model.modules() if isinstance(part, nn.Conv2d)} == {torch.bfloat16}
        assert not torch.allclose(features(found.model, data), features(half, data), atol=1e-2)
