"""What ``medrobust doctor --model ID`` finds in sound and in unsound models."""

import importlib.util
import re
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from medrobust_lib import cli, doctor
from medrobust_lib.models.loading import load_model
from medrobust_lib.models.own import Classifier
from medrobust_lib.models.weights import DEMO_FOLDER

CHECKS = ["model", "preprocessing", "features", "capabilities", "speed"]


@pytest.fixture(autouse=True)
def rate(monkeypatch):
    """A machine of 101 draws a second: the 10,100 draws of a certificate take 100 s."""
    monkeypatch.setattr("medrobust_lib.studies.cells.measured_rate", lambda model, data: 101.0)


@pytest.fixture
def examined(monkeypatch):
    """Findings by check of the model that a function makes."""

    def examine(make):
        module = types.ModuleType("some_models")
        module.load = lambda entry, *, weights_dir, offline: make()
        monkeypatch.setitem(sys.modules, "some_models", module)
        return {one.check: one for one in doctor.examine_model("python:some_models:load")}

    return examine


def demo(**changes):
    model = load_model("demo-clip", device="cpu", dtype="float32")
    model.preprocessing = replace(model.preprocessing, **changes)
    return model


def test_a_sound_model_passes_and_a_certificate_is_priced():
    result = CliRunner().invoke(cli.app, ["doctor", "--model", "demo-clip"])
    assert result.exit_code == 0, result.output
    assert re.findall(r"^ok   (\w+)", result.output, re.MULTILINE) == CHECKS
    assert "that of open_clip within 0.0 of 256 levels, on four sizes" in result.output
    assert "prompts can be learned; low-rank adapters have their place" in " ".join(result.output.split())
    assert re.search(
        r"101 draws a second on \w+ in \w+; a certificate of n=10,000 takes at most 1.7 minut", result.output
    )


def test_a_model_that_cannot_be_loaded_is_the_only_finding():
    (finding,) = doctor.examine_model(f"local-dir:{DEMO_FOLDER / 'demo-vlm'}")
    assert (finding.check, finding.passed) == ("model", False)
    result = CliRunner().invoke(cli.app, ["doctor", "--model", "demo-vlm"])
    assert result.exit_code == 1 and "load it with load_vlm('demo-vlm')" in result.output


def test_whatever_ones_own_loader_or_model_raises_is_a_finding(examined, monkeypatch):
    found = examined(lambda: {}["weights"])
    assert list(found) == ["model"]
    assert found["model"][1:] == (False, "KeyError: 'weights'")
    monkeypatch.setattr("medrobust_lib.studies.cells.measured_rate", lambda model, data: [][0])
    found = examined(demo)
    assert list(found) == CHECKS
    assert found["speed"][1:] == (False, "IndexError: list index out of range")


def test_a_clip_of_transformers_is_compared_with_its_own_processor(tmp_path):
    path = Path(__file__).parent / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("model_builders", path)
    builders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builders)
    builders.write_plip(tmp_path, end_token=49407, safetensors=True)
    found = {one.check: one for one in doctor.examine_model(f"local-dir:{tmp_path}")}
    assert [one.check for one in found.values() if one.passed] == CHECKS
    levels = re.match(r"that of CLIPImageProcessor\w* within (\d\.\d) of 256 levels", found["preprocessing"].detail)
    assert float(levels[1]) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation": "bilinear"}, r"pixels differ by \d+.\d of 256 levels from those of open_clip"),
        ({"geometry": "squash"}, r"pixels differ by \d+.\d of 256 levels from those of open_clip"),
        ({"mean": (0.5, 0.5, 0.55)}, r"pixels differ by \d+.\d of 256 levels from those of open_clip"),
        ({"image_size": 32}, r"open_clip makes \{\(3, 64, 64\)\} of images, this library \(3, 32, 32\)"),
    ],
)
def test_another_preprocessing_than_the_models_own_is_found(examined, changes, message):
    found = examined(lambda: demo(**changes))
    assert not found["preprocessing"].passed and re.match(message, found["preprocessing"].detail)


def test_a_classifier_has_no_processor_to_compare_with_and_any_number_of_classes(examined):
    found = examined(lambda: Classifier(lambda x: x.mean((2, 3)) + 1, n_classes=3, image_size=8, id="colours"))
    assert [one.check for one in found.values() if one.passed] == CHECKS
    assert found["preprocessing"].detail == (
        "no processor of its own to compare with; to 8 px, shortest-edge-crop, bicubic"
    )


def test_adapters_have_a_place_only_where_a_copy_takes_them(examined):
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 8), torch.nn.Flatten()).eval()
    places = "low-rank adapters have their place"
    for function, fits in ((tower, True), (lambda pixels: tower(pixels), False)):
        found = examined(lambda function=function: Classifier(function, n_classes=3, image_size=8, id="x"))
        assert found["capabilities"].passed and (places in found["capabilities"].detail) is fits

    class Session:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, pixels):
            return pixels.mean((2, 3)) + 1

    found = examined(lambda: Classifier(Session(), n_classes=3, image_size=8))
    assert [one.check for one in found.values() if one.passed] == CHECKS
    assert "cannot pickle" in found["capabilities"].detail


def test_answers_that_hang_on_the_batch_and_features_that_are_not_finite_are_found(examined):
    def ranked(pixels):
        return pixels.mean((2, 3)) - pixels.mean((0, 2, 3))

    found = examined(lambda: Classifier(lambda x: ranked(x) + 1, n_classes=3, image_size=8, id="ranks"))
    assert [one.check for one in found.values() if not one.passed] == ["features"]
    assert re.match(r"features alone and in a batch differ by 0\.\d+ \(rounding: 0.0001\)", found["features"].detail)
    found = examined(lambda: Classifier(lambda x: torch.log(x).mean((2, 3)), n_classes=3, image_size=8, id="logs"))
    assert not found["features"].passed and "are not finite" in found["features"].detail
