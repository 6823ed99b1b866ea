import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrobust_lib.corruptions.stored import read_corrupted
from medrobust_lib.corruptions.suites import corrupted
from medrobust_lib.data.registry import load_dataset

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
DEMO = ["--datasets", "phantom/histology", "phantom/chest", "--n", "3", "--image-size", "28", "--jobs", "1"]


@pytest.fixture(scope="module", params=["make_medimeta_c", "make_medmnist_c"])
def script(request):
    return load_script(request.param)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def invoke(script, *arguments, exit_code=0, **environment):
    result = CliRunner().invoke(
        script.app, [str(argument) for argument in arguments], env={"COLUMNS": "250"} | environment
    )
    assert result.exit_code == exit_code, result.output
    return result


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help_names_the_options_and_the_layout(script):
    said = plain(invoke(script, "--help").output)
    for option in ("--datasets", "--out", "--jobs", "--n", "--severities", "--dry-run", "--check", "--layout"):
        assert option in said
    assert "175" in said
    assert "severity_S.npz" in said


def test_phantoms_are_written_checked_and_read_without_a_network(tmp_path):
    script = load_script("make_medimeta_c")
    said = invoke(script, *DEMO, "--out", tmp_path / "C").output
    assert "70 corrupted sets of phantom/histology, phantom/chest and the clean images: 508 kB in" in said
    assert "write C: 74 of 74 files" in said
    assert f"{tmp_path / 'C'}  ready, 74 files" in said
    assert f"{tmp_path / 'C'}  74 files verified" in invoke(script, "--check", "--out", tmp_path / "C").output
    read = read_corrupted(tmp_path / "C", "phantom/histology", "motion_blur", severity=5)
    made = corrupted(load_dataset("phantom/histology", n=3, image_size=28), "motion_blur", severity=5)
    np.testing.assert_array_equal(read.images, made.images)


def test_a_dry_run_writes_nothing(script, tmp_path):
    said = invoke(script, *DEMO, "--out", tmp_path / "C", "--dry-run", "--severities", "2, 4").output
    assert said.startswith("28 corrupted sets of phantom/histology, phantom/chest")
    assert list(tmp_path.iterdir()) == []


def test_the_official_suite_is_written_in_its_layout(tmp_path):
    script = load_script("make_medmnist_c")
    options = ["phantom/oct", "--suite", "medmnist-c", "--n", "2", "--image-size", "28", "--jobs", "1"]
    invoke(script, *options, "--corruptions", "pixelate,contrast_down", "--root", tmp_path)
    names = {path.name for path in (tmp_path / "MedMNIST-C-official" / "phantom_oct").iterdir()}
    assert names == {"pixelate.npz", "contrast_down.npz", "clean.npz", "description.json"}


def test_the_clinical_suite_is_written_gray_and_read_back(tmp_path):
    options = ["phantom/oct-site-a", "--suite", "clinical-c", "--n", "2", "--image-size", "28", "--jobs", "1"]
    invoke(load_script("make_medmnist_c"), *options, "--corruptions", "blink_line", "--root", tmp_path)
    read = read_corrupted(tmp_path / "MedMNIST-C-clinical", "phantom/oct-site-a", "blink_line", severity=4)
    data = load_dataset("phantom/oct-site-a", n=2, image_size=28)
    made = corrupted(data, "blink_line", severity=4, suite="clinical-c")
    np.testing.assert_array_equal(read.images, made.images)
    assert (read.images == read.images[..., :1]).all() and (read.images != data.images).any()


def test_medmnist_sets_are_found_below_the_root(tmp_path):
    script = load_script("make_medmnist_c")
    (tmp_path / "medmnist").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "medmnist" / "breastmnist.npz", test_images=images, test_labels=np.array([[0], [1]] * 3))
    options = ["--datasets", "medmnist/breast", "--root", tmp_path, "--jobs", "1", "--corruptions", "contrast"]
    invoke(script, *options)
    read = read_corrupted(tmp_path / "MedMNIST-C", "medmnist/breast", "contrast", severity=1)
    assert len(read) == 6
    assert (tmp_path / "MedMNIST-C" / "breastmnist" / "test" / "contrast_severity_5.npz").exists()


def test_a_missing_data_set_names_the_command_that_fetches_it(script, tmp_path):
    result = invoke(script, "--root", tmp_path, exit_code=1)
    assert re.match(r"error: med(imeta/pbc|mnist/blood) is not on this computer: .*\n", result.stderr)
    assert "python data_scripts/download_med" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["phantom/chst"], "error: unknown data set 'phantom/chst'. Did you mean 'phantom/chest'"),
        (["phantom/chest", "--severities", "1,six"], "error: severity 'six' is no number; give some of 1,2,3,4,5"),
        (["phantom/chest", "--severities", "9"], "error: severity 9: choose 1, 2, 3, 4 or 5"),
        (["phantom/chest", "--corruptions", "snow"], "error: unknown corruption 'snow'"),
        (["phantom/chest", "--check"], "error: no folder at"),
    ],
)
def test_bad_requests_end_in_one_line(script, tmp_path, arguments, message):
    result = invoke(script, *arguments, "--out", tmp_path / "C", exit_code=1)
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr


def test_a_check_names_what_is_spoilt(script, tmp_path):
    options = ["phantom/chest", "--n", "2", "--image-size", "28", "--corruptions", "contrast", "--out", tmp_path / "C"]
    invoke(script, *options, "--jobs", "1")
    path = tmp_path / "C" / "phantom_chest" / "test" / "contrast_severity_3.npz"
    path.write_bytes(path.read_bytes()[:-1])
    result = invoke(script, "--check", "--out", tmp_path / "C", exit_code=1)
    assert result.stdout == "phantom_chest/test/contrast_severity_3.npz  truncated\n"
    assert "error: 1 of 7 files in" in result.stderr
    invoke(script, *options, "--jobs", "1")
    assert "7 files verified" in invoke(script, "--check", "--out", tmp_path / "C").stdout
    other = invoke(script, *options, "--seed", "4", exit_code=1)
    assert "seed: the store has 0, this run asks 4" in other.stderr


def test_colour_folders_can_be_corrupted_too(tmp_path):
    for name in ("benign", "malignant"):
        picture = tmp_path / "mine" / name / "1.png"
        picture.parent.mkdir(parents=True)
        Image.fromarray(np.full((40, 40, 3), (200, 90, 120), np.uint8)).save(picture)
    options = ["--datasets", f"folder:{tmp_path / 'mine'}", "--corruptions", "brightness", "--jobs", "1"]
    invoke(load_script("make_medimeta_c"), *options, "--out", tmp_path / "C")
    assert read_corrupted(tmp_path / "C", "folder:mine", "brightness", severity=1).classes == ("benign", "malignant")
