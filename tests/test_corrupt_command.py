"""`medrobust corrupt` writes what `corrupted` gives, in folders that load as the source did."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from medrobust_lib.corruptions.stored import image_places, read_corrupted
from medrobust_lib.corruptions.suites import corrupted
from medrobust_lib.data.registry import load_dataset


def content(folder):
    """Every file below a folder but the journal, which knows the time."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".jsonl"}


def test_class_folders_keep_their_layout_names_labels_and_words(invoke, own_images, tmp_path):
    out = tmp_path / "worse"
    words = ["corrupt", own_images, "--suite", "medimeta-c", "--corruption", "contrast", "--severity", 3, "--out", out]
    code, text, _ = invoke(*words)
    assert code == 0
    assert f"{own_images} is read as folder:{own_images}" in text
    assert "6 images of folder:mine (split test; 64 x 64 px, as they are) under contrast of medimeta-c at " in text
    source, result = load_dataset(f"folder:{own_images}"), load_dataset(f"folder:{out}")
    assert [name.rpartition(".")[0] for name in result.files] == [name.rpartition(".")[0] for name in source.files]
    assert {name.rpartition(".")[2] for name in result.files} == {"png"}
    assert (result.labels == source.labels).all()
    assert (result.classes, result.templates) == (source.classes, source.templates)
    assert (result.images == corrupted(source, "contrast", severity=3).images).all()
    assert not (result.images == source.images).all()


def test_another_source_gets_a_folder_for_each_class_and_its_labels_and_words_come_back(invoke, tmp_path):
    options = ["--corruption", "contrast", "--corruption", "gaussian_noise", "--severity", 1, "--severity", 5]
    code, text, _ = invoke("corrupt", "phantom/blood", *options, "--n-images", 9, "--seed", 4, "--out", tmp_path / "w")
    assert code == 0 and "CORRUPTION/SEVERITY" in text
    source = load_dataset("phantom/blood", n=9, seed=4)
    result = load_dataset(f"folder:{tmp_path / 'w' / 'gaussian_noise' / '5'}")
    assert (result.classes, result.templates) == (source.classes, source.templates)
    place = [f"image {index}.png" for index in source.indices]
    found = {name.rpartition("/")[2]: (label, image) for name, label, image in
             zip(result.files, result.labels, result.images, strict=True)}  # fmt: skip
    assert [found[name][0] for name in place] == source.labels.tolist()
    worse = corrupted(source, "gaussian_noise", severity=5, seed=4).images
    assert all((found[name][1] == image).all() for name, image in zip(place, worse, strict=True))


def test_a_table_gives_folders_of_its_classes_and_patients_and_no_two_files_meet(invoke, tmp_path):
    draw = np.random.default_rng(0)
    rows = ["path,label,patient"]
    for name, label, patient in (("x.png", "ill", "p/1"), ("x.bmp", "ill", "p/1"), ("y.png", "..", "q")):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name)
        rows.append(f"{name},{label},{patient}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    code, *_ = invoke("corrupt", tmp_path / "list.csv", "--corruption", "contrast", "--out", out)
    assert code == 0
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert written == ["0 _/q/y.png", "1 ill/p_1/x.bmp.png", "1 ill/p_1/x.png"]
    source, result = load_dataset(f"csv:{tmp_path / 'list.csv'}"), load_dataset(f"folder:{out}")
    assert sorted(result.labels) == sorted(source.labels) and result.classes == source.classes
    assert sorted(result.groups) == ["p_1", "p_1", "q"]


def test_all_splits_on_request_and_a_manifest_that_names_no_folder(invoke, own_images, tmp_path):
    code, text, _ = invoke("corrupt", own_images, "--corruption", "contrast", "--split", "all", "--out", tmp_path / "w")
    assert code == 0 and "14 images of folder:mine (split train, test;" in text
    assert len(load_dataset(f"folder:{tmp_path / 'w'}", split="train")) == 8
    manifest = (tmp_path / "w" / "manifest.json").read_text()
    facts = json.loads(manifest)["parameters"]
    assert (facts["dataset"], facts["seed"], facts["severities"], facts["licence"]) == (
        "folder:mine",
        0,
        [3],
        "not stated",
    )
    assert facts["suite"]["id"] == "medimeta-c" and "Not for clinical use" in facts["note"] and facts["library"]
    assert str(own_images.parent) not in manifest


def test_what_is_missing_is_written_again_to_the_same_bytes(invoke, own_images, tmp_path, monkeypatch):
    words = ["corrupt", own_images, "--corruption", "gaussian_noise", "--severity", 2, "--out", tmp_path / "w"]
    assert invoke(*words)[0] == 0
    before = content(tmp_path / "w")
    _, lost, torn, *_ = sorted((tmp_path / "w").rglob("*.png"))
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[:100])
    code, text, _ = invoke(*words)
    assert code == 0 and "(4 resumed)" in text
    assert content(tmp_path / "w") == before
    assert invoke(*words[:-1], tmp_path / "two", "--jobs", 2)[0] == 0
    assert content(tmp_path / "two") == before


def test_places_stay_beside_their_images_however_files_are_called(phantoms):
    files = ("a.png", "a.bmp", "a.bmp.png", "a.tif", "b/a.png", "b_a.png")
    data = replace(phantoms("breast", split="test", n=6), id="folder:mine", files=files)
    assert image_places(data) == ["a.png", "a.bmp.png", "a.bmp.png.png", "a.tif.png", "b/a.png", "b_a.png"]
    many = {"images": np.repeat(data.images[:1], 8, 0), "labels": np.zeros(8, int), "indices": np.arange(8)}
    data = replace(data, id="csv:mine", files=("b/a.png", "b_a.png", "b_a.bmp", "b/a.bmp") * 2, **many)
    places = image_places(data)
    assert len({*places}) == 8 and places[4].endswith("b_a.png.1.png")


@pytest.mark.parametrize("below", ["", "test/worse", "new"])
@pytest.mark.parametrize("form", ["png", "npz"])
def test_nothing_is_written_among_the_images_that_are_read(invoke, own_images, below, form):
    before = content(own_images)
    words = ["--corruption", "contrast", "--format", form, "--out", own_images / below]
    code, _, error = invoke("corrupt", own_images, *words)
    assert code == 1 and "write to a folder outside it" in error
    assert content(own_images) == before


def test_all_splits_are_found_without_a_test_split_and_what_is_named_twice_counts_once(invoke, own_images, tmp_path):
    shutil.copytree(own_images / "train", tmp_path / "mine" / "train")
    shutil.copytree(own_images / "test", tmp_path / "mine" / "val")
    twice = ["--corruption", "contrast", "--corruption", "contrast", "--severity", 3, "--severity", 3]
    code, text, error = invoke("corrupt", tmp_path / "mine", *twice, "--split", "all", "--out", tmp_path / "w")
    assert code == 0, error
    assert (
        "14 images of folder:mine (split train, val;" in text and "under contrast of medimeta-c at severity 3:" in text
    )
    assert "CORRUPTION/SEVERITY" not in text and (tmp_path / "w" / "val" / "a").is_dir()


def test_arrays_of_the_benchmark(invoke, own_images, tmp_path):
    words = ["corrupt", own_images, "--corruption", "contrast", "--severity", 3, "--out", tmp_path / "w"]
    assert invoke(*words, "--format", "npz")[0] == 0
    read = read_corrupted(tmp_path / "w", f"folder:{own_images.name}", "contrast", severity=3)
    assert (read.images == corrupted(load_dataset(f"folder:{own_images}"), "contrast", severity=3).images).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "clinical-c"], "none for 'folder:mine'; it knows radiograph, .*--kind of `medrobust corrupt`"),
        (["--suite", "clinical-c", "--kind", "skin"], "unknown kind of images 'skin'; choose one of radiograph"),
        (["--kind", "blood"], "unknown kind of images 'blood'"),
        (["--format", "npz", "--kind", "blood"], "--kind blood is for --format png"),
        (["--corruption", "contrasts"], "unknown corruption 'contrasts'.*did you mean 'contrast'"),
        (["--severity", "0"], r"severities=\[0\]: give one or more of 1, 2"),
        (["--severity", "6"], "severity 6: choose 1, 2"),
        (["--split", "val"], "'val'"),
        (["--n-images", "7"], "n=7"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(invoke, own_images, tmp_path, options, message):
    out = tmp_path / "w"
    code, _, error = invoke("corrupt", own_images, "--out", out, *options)
    assert code == 1 and not out.exists()
    assert re.search(message, error)


def test_folders_of_other_things_and_of_other_corruptions_are_refused(invoke, own_images, tmp_path):
    words = ["corrupt", own_images, "--corruption", "contrast", "--out", tmp_path / "w"]
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.doc").write_text("years of work")
    code, _, error = invoke(*words)
    assert code == 1 and "holds other files (thesis.doc) and no store" in error
    (tmp_path / "w" / "thesis.doc").unlink()
    assert invoke(*words)[0] == 0
    code, _, error = invoke(*words, "--severity", 4)
    assert code == 1 and "severities: the store has [3], this run asks [4]" in error


def test_kinds_of_own_images_have_parameters_of_their_own(invoke, own_images, tmp_path):
    words = ["corrupt", own_images, "--suite", "clinical-c", "--kind", "ultrasound", "--out", tmp_path / "w"]
    code, text, _ = invoke(*words)
    assert code == 0 and "under every corruption of clinical-c" in text
    names = {path.name for path in (tmp_path / "w").iterdir() if path.is_dir()}
    assert names and len([*(tmp_path / "w").rglob("*.png")]) == 6 * len(names)


def test_folders_of_corruptions_and_severities_are_no_classes(invoke, tmp_path):
    out, words = tmp_path / "worse", ("--corruption", "contrast", "--corruption", "motion_blur")
    code, _, error = invoke("corrupt", "phantom/blood", "--n-images", 8, *words, "--severity", 3, "--out", out)
    assert code == 0, error
    for folder in (out, out / "contrast"):
        with pytest.raises(ValueError, match="corruptions or severities, no classes: .*worse/CORRUPTION/SEVERITY"):
            load_dataset(f"folder:{folder}")
    assert len(load_dataset(f"folder:{out}/contrast/3")) == 8


def test_patients_numbered_like_severities_stay_patients(invoke, tmp_path):
    draw = np.random.default_rng(0)
    for number, place in enumerate(("x/1", "x/2", "y/1", "y/2")):
        (tmp_path / "in" / place).mkdir(parents=True)
        pixels = draw.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / place / f"{number}.png")
    given = ("corrupt", f"folder:{tmp_path / 'in'}?group=folder", "--corruption", "contrast")
    code, _, error = invoke(*given, "--severity", 3, "--out", tmp_path / "out")
    assert code == 0, error
    assert load_dataset(f"folder:{tmp_path / 'out'}?group=folder").groups == ("1", "2", "1", "2")
