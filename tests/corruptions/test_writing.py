import errno
import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from medrobust_lib.corruptions import stored, writing
from medrobust_lib.corruptions.stored import read_corrupted
from medrobust_lib.corruptions.suites import corrupt, corrupted
from medrobust_lib.corruptions.writing import CorruptedSets, write_benchmark
from medrobust_lib.data.registry import load_dataset
from preparing.corrupted_sets import check_benchmark

CHEST, OCT = "phantom/chest", "phantom/oct"
OFFICIAL = {"suite": "medmnist-c", "severities": (1, 2, 3, 4, 5)}
SMALL = {"n": 5, "seed": 3, "image_size": 28, "corruptions": ["contrast", "gaussian_noise"], "severities": (1, 4)}


def contents(folder):
    """Bytes of every file but the journal, whose order and times may differ."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "journal.jsonl")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "C"
    table = write_benchmark(folder, [CHEST, OCT], **SMALL)
    return SimpleNamespace(folder=folder, table=table, contents=contents(folder))


def fails_after(monkeypatch, calls, error):
    """Let `corrupt` fail after so many calls."""
    count = iter(range(calls))

    def failing(*arguments, **options):
        if next(count, None) is None:
            raise error
        return corrupt(*arguments, **options)

    monkeypatch.setattr(writing, "corrupt", failing)


# ---- on the fly ----


def test_images_are_corrupted_by_their_place_in_the_full_split():
    data = load_dataset(CHEST, n=6, image_size=28)
    noisy = corrupted(data, "gaussian_noise", severity=3, seed=2)
    again = corrupted(data.subset([4, 1]), "gaussian_noise", severity=3, seed=2)
    np.testing.assert_array_equal(again.images, noisy.images[[4, 1]])
    assert (noisy.images != data.images).mean() > 0.5
    assert (noisy.id, noisy.classes) == (data.id, data.classes)
    np.testing.assert_array_equal(noisy.labels, data.labels)
    done = {"name": "gaussian_noise", "severity": 3, "suite": "medimeta-c", "seed": 2}
    assert noisy.provenance == data.provenance | {"corruption": done}
    other_seed = corrupted(data, "gaussian_noise", severity=3, seed=3)
    assert (other_seed.images != noisy.images).any()
    assert (corrupted(data, "contrast", severity=0).images == data.images).all()


def test_the_official_suite_ends_gray_where_its_files_do():
    chest = load_dataset(CHEST, n=2, image_size=28)
    coloured = corrupted(chest, "gaussian_noise", severity=5).images
    gray = corrupted(chest, "gaussian_noise", severity=5, suite="medmnist-c").images
    assert (coloured[..., 0] != coloured[..., 1]).any()
    assert (gray == gray[..., :1]).all()
    blood = corrupted(load_dataset("phantom/blood", n=2, image_size=28), "saturate", severity=1, suite="medmnist-c")
    assert (blood.images[..., 0] != blood.images[..., 1]).any()


# ---- written and read ----


@pytest.mark.parametrize("dataset", [CHEST, OCT])
@pytest.mark.parametrize("name", SMALL["corruptions"])
def test_files_hold_what_is_made_on_the_fly(whole, dataset, name):
    data = load_dataset(dataset, n=5, seed=3, image_size=28)
    read = read_corrupted(whole.folder, dataset, name, severity=4)
    made = corrupted(data, name, severity=4, seed=3)
    np.testing.assert_array_equal(read.images, made.images)
    np.testing.assert_array_equal(read.labels, made.labels)
    np.testing.assert_array_equal(read.indices, made.indices)
    for attribute in ("id", "split", "classes", "templates", "modality", "licence"):
        assert getattr(read, attribute) == getattr(made, attribute)
    assert read.provenance["corruption"] == made.provenance["corruption"]
    assert read.provenance["verified"] == "SHA-256 of the manifest"
    assert read.synthetic
    np.testing.assert_array_equal(read_corrupted(whole.folder, dataset).images, data.images)


@pytest.mark.parametrize("dataset", [CHEST, "phantom/blood"])
def test_the_official_layout_comes_back_severity_by_severity(tmp_path, dataset):
    names = ["pixelate", "contrast_down"]
    table = write_benchmark(tmp_path / "C", [dataset], suite="medmnist-c", n=4, image_size=28, corruptions=names)
    data = load_dataset(dataset, n=4, image_size=28)
    with np.load(tmp_path / "C" / stored.set_folder(dataset) / "pixelate.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"test_images", "test_labels"}
        assert arrays["test_images"].shape == ((20, 28, 28) if dataset == CHEST else (20, 28, 28, 3))
        np.testing.assert_array_equal(arrays["test_labels"], np.tile(data.labels, 5)[:, None])
    assert table["severities"].tolist() == ["0", "1 2 3 4 5", "0", "1 2 3 4 5"]
    assert table["images"].tolist() == [4, 20, 4, 20]
    for severity in (1, 3, 5):
        read = read_corrupted(tmp_path / "C", dataset, "pixelate", severity=severity)
        made = corrupted(data, "pixelate", severity=severity, suite="medmnist-c")
        np.testing.assert_array_equal(read.images, made.images)
        np.testing.assert_array_equal(read.labels, data.labels)
    np.testing.assert_array_equal(read_corrupted(tmp_path / "C", dataset).images, data.images)


def test_the_files_are_those_of_the_authors_layout_with_a_manifest(whole):
    sets = {f"{name}_severity_{severity}.npz" for name in SMALL["corruptions"] for severity in (1, 4)}
    for dataset in ("phantom_chest", "phantom_oct"):
        found = {path.name for path in (whole.folder / dataset / "test").iterdir()}
        assert found == {*sets, "clean.npz", "description.json"}
    with np.load(whole.folder / "phantom_chest" / "test" / "contrast_severity_1.npz") as arrays:
        assert arrays["images"].shape == (5, 28, 28, 3)
        assert arrays["labels"].shape == (5,)
    parameters = json.loads((whole.folder / "manifest.json").read_text())["parameters"]
    constants = parameters["suite"]["parameters"]["every data set"]
    assert constants["contrast"] == [{"factor": factor} for factor in (0.4, 0.3, 0.2, 0.1, 0.05)]
    assert (parameters["seed"], parameters["n"], parameters["library"]) == (3, 5, writing.VERSION)
    row = whole.table.set_index("file").loc["phantom_oct/test/gaussian_noise_severity_4.npz"]
    path = whole.folder / row.name
    assert (row["dataset"], row["corruption"], row["severities"], row["images"]) == (OCT, "gaussian_noise", "4", 5)
    assert row["bytes"] == path.stat().st_size
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "numpy" in row["made_with"]


def test_the_bytes_do_not_depend_on_workers(whole, tmp_path):
    write_benchmark(tmp_path / "C", [CHEST, OCT], jobs=2, **SMALL)
    assert contents(tmp_path / "C") == whole.contents


def test_the_bytes_do_not_depend_on_how_many_images_are_in_memory(whole, tmp_path, monkeypatch):
    seen = []

    def watched(images, *arguments, **options):
        seen.append(len(images))
        return corrupt(images, *arguments, **options)

    monkeypatch.setattr(stored, "_CHUNK", 2)
    monkeypatch.setattr(writing, "corrupt", watched)
    write_benchmark(tmp_path / "C", [CHEST, OCT], **SMALL)
    assert contents(tmp_path / "C") == whole.contents
    assert seen == [2, 2, 1] * 8


@pytest.mark.hardening(
    area="interruption", tried="an interrupt between and within files of a corrupted benchmark",
    outcome="goes on; all files are the same, byte for byte",
)  # fmt: skip
@pytest.mark.parametrize("calls", [0, 3, 6])
def test_a_stopped_run_goes_on_to_the_same_bytes(whole, tmp_path, monkeypatch, capsys, calls):
    folder = tmp_path / "C"
    with monkeypatch.context() as patched:
        fails_after(patched, calls, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            write_benchmark(folder, [CHEST, OCT], **SMALL)
    half = r"half written: its run was stopped|is there, but its run was stopped|no phantom_oct.test.description"
    with pytest.raises((ValueError, FileNotFoundError), match=half):
        read_corrupted(folder, OCT, "contrast", severity=1)
    # A kill at worse moments: amid a file, between a file and its line, amid a line.
    (folder / "phantom_chest" / "test" / ".contrast_severity_1.npz.7.part").write_bytes(b"half")
    (folder / "phantom_chest" / "test" / "gaussian_noise_severity_4.npz").write_bytes(b"unrecorded")
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"key": "phantom_chest/test/contr')
    capsys.readouterr()
    write_benchmark(folder, [CHEST, OCT], **SMALL)
    assert contents(folder) == whole.contents
    assert "resumed)" in capsys.readouterr().out


def test_a_finished_run_writes_nothing_again(whole, capsys, monkeypatch):
    times = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*.npz")}
    fails_after(monkeypatch, 0, AssertionError("nothing is left to corrupt"))
    table = write_benchmark(whole.folder, [CHEST], **SMALL)
    assert times == {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*.npz")}
    assert contents(whole.folder) == whole.contents
    assert len(table) == 12
    said = capsys.readouterr().out
    assert "58.8 kB of it is there already" in said
    assert "6 of 6 files" in said


def test_sets_can_be_added_to_a_collection(whole, tmp_path):
    write_benchmark(tmp_path / "C", [OCT], **SMALL | {"severities": (4,)})
    write_benchmark(tmp_path / "C", [OCT], **SMALL)
    write_benchmark(tmp_path / "C", [CHEST], **SMALL)
    assert contents(tmp_path / "C") == whole.contents


@pytest.mark.hardening(
    area="stores", tried="corrupted sets that are missing, cut off or changed",
    outcome="named when read; the same call writes them again",
)  # fmt: skip
@pytest.mark.parametrize("spoil", ["missing", "truncated", "changed"])
@pytest.mark.parametrize("file", ["clean.npz", "contrast_severity_4.npz", "description.json"])
def test_a_spoilt_set_is_named_and_mended(whole, tmp_path, spoil, file):
    folder = tmp_path / "C"
    write_benchmark(folder, [CHEST], **SMALL | {"corruptions": ["contrast"]})
    before = contents(folder)
    path = folder / "phantom_chest" / "test" / file
    content = path.read_bytes()
    if spoil == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-50] if spoil == "truncated" else bytes([content[0] ^ 1]) + content[1:])
    states = check_benchmark(folder).set_index("file")["state"]
    assert states[states != "whole"].to_dict() == {f"phantom_chest/test/{file}": spoil}
    wanted = {"corruption": "contrast", "severity": 4} if file.startswith("contrast") else {}
    message = {
        "missing": "is recorded but not there. Make the same call of write_benchmark, or run the same script, again",
        "truncated": f"has {len(content) - 50} bytes, {len(content)} are recorded. Make the same call",
        "changed": "has changed since it was written: its SHA-256 is not the recorded .* Delete it. Make the same call",
    }[spoil]
    with pytest.raises(ValueError, match=rf"phantom_chest.test.{file} {message}"):
        read_corrupted(folder, CHEST, **wanted)
    if spoil == "changed":
        path.unlink()
    write_benchmark(folder, [CHEST], **SMALL | {"corruptions": ["contrast"]})
    assert contents(folder) == before


@pytest.mark.parametrize("file", ["clean.npz", "description.json"])
def test_nothing_is_made_of_spoilt_sources(whole, tmp_path, file):
    folder = tmp_path / "C"
    write_benchmark(folder, [CHEST, OCT], **SMALL | {"corruptions": ["contrast"]})
    path = folder / "phantom_oct" / "test" / file
    content = bytearray(path.read_bytes())
    content[3000 if file == "clean.npz" else -6] ^= 1  # a pixel; a digit of the last index
    path.write_bytes(content)
    write_benchmark(folder, [CHEST, OCT], **SMALL)
    assert contents(folder) == whole.contents


def test_another_result_for_a_lost_file_is_not_taken(tmp_path, monkeypatch):
    folder = tmp_path / "C"
    write_benchmark(folder, [CHEST], **SMALL)
    path = folder / "phantom_chest" / "test" / "contrast_severity_4.npz"
    path.unlink()
    monkeypatch.setattr(writing, "corrupt", lambda images, name, **options: images // 2)
    with pytest.raises(
        ValueError, match=r"contrast_severity_4\.npz had to be written again and has SHA-256 .*recorded"
    ):
        write_benchmark(folder, [CHEST], **SMALL)


# ---- refused ----


def test_a_folder_of_other_parameters_is_refused(whole):
    with pytest.raises(ValueError, match=r"(?s)other parameters:.*n: the store has 5, this run asks 7.*seed: "):
        write_benchmark(whole.folder, [CHEST], **SMALL | {"n": 7, "seed": 1})
    with pytest.raises(ValueError, match=r"(?s)other parameters:.*layout: .*suite\.id: the store has \"medimeta-c\""):
        write_benchmark(whole.folder, [CHEST], suite="medmnist-c", n=5, image_size=28)
    assert contents(whole.folder) == whole.contents


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.txt\) and no store"):
        write_benchmark(tmp_path, [CHEST], **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": ["phantom/chst"]}, "unknown data set 'phantom/chst'. Did you mean 'phantom/chest'"),
        ({"datasets": []}, "no data sets named"),
        ({"corruptions": ["contrst"]}, r"unknown corruption 'contrst' .*did you mean 'contrast'"),
        ({"severities": (1, 6)}, "severity 6: choose 1, 2, 3, 4 or 5"),
        ({"severities": (0, 1)}, "severity 0 to write; give one or more of 1, 2, 3, 4, 5"),
        ({"severities": ()}, "no severity to write"),
        ({"suite": "imagenet-c"}, "unknown suite 'imagenet-c'; choose one of medimeta-c, medmnist-c"),
        ({"layout": "flat"}, "unknown layout 'flat'; choose one of per-severity, concatenated"),
        ({"layout": "concatenated"}, "the concatenated layout holds severities 1 to 5 of the test split"),
        ({"n": 1000}, "n=1000: phantom/chest has 720 images in split 'test'; give 1 to 720"),
        (
            {"datasets": ["phantom/histology"], "suite": "medmnist-c", "severities": (1, 2, 3, 4, 5)},
            "none for 'phantom/histology'",
        ),
        ({"image_size": 16}, "28"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_benchmark(tmp_path / "C", **{"datasets": [CHEST]} | SMALL | options)
    assert list(tmp_path.iterdir()) == []


def test_two_sets_of_one_folder_are_refused(tmp_path):
    for parent in ("a", "b"):
        for name in ("x", "y"):
            picture = tmp_path / parent / "mine" / name / "1.png"
            picture.parent.mkdir(parents=True)
            Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(picture)
    ids = [f"folder:{tmp_path / parent / 'mine'}" for parent in "ab"]
    with pytest.raises(ValueError, match=r"would both be written to folder_mine.test.clean\.npz; use a folder"):
        CorruptedSets(tmp_path / "C", ids)
    table = write_benchmark(tmp_path / "C", ids[:1], corruptions=["contrast"], severities=(2,))
    assert set(table["dataset"]) == {"folder:mine"}
    texts = [path.read_text() for path in (tmp_path / "C").rglob("*") if path.suffix in {".json", ".csv", ".jsonl"}]
    assert len(texts) == 4
    assert not [text for text in texts if str(tmp_path) in text]  # where images lay here is no part of the set
    read = read_corrupted(tmp_path / "C", "folder:mine", "contrast", severity=2)
    assert (read.classes, len(read), read.split) == (("x", "y"), 2, "all")


# ---- the disk ----


def test_the_plan_says_what_comes(tmp_path, whole):
    assert len(CorruptedSets(tmp_path, CHEST, **SMALL)) == 6
    sets = CorruptedSets(tmp_path, [CHEST, OCT], **SMALL)
    assert len(sets) == 12
    assert sets.missing_bytes == 10 * 5 * 28 * 28 * 3
    assert str(sets) == (f"8 corrupted sets of phantom/chest, phantom/oct and the clean images: 118 kB in {tmp_path}")
    assert list(tmp_path.iterdir()) == []
    again = CorruptedSets(whole.folder, [CHEST, OCT], **SMALL)
    assert str(again).endswith(", 118 kB of it is there already")


@pytest.mark.hardening(
    area="disk and folders", tried="a disk too small for a benchmark",
    outcome="refused before anything is written",
)  # fmt: skip
def test_too_small_a_disk_is_noticed_before_the_start(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=1e6, used=9e5, free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"118 kB are to be written; 100 kB are free: free some, or name a folder on"):
        write_benchmark(tmp_path / "C", [CHEST, OCT], **SMALL)
    assert list((tmp_path / "C").rglob("*.npz")) == []


@pytest.mark.hardening(
    area="disk and folders", tried="a disk that fills up while a benchmark is written",
    outcome="a message with the free space; files that were whole stay",
)  # fmt: skip
def test_a_disk_that_fills_up_spoils_nothing(whole, tmp_path, monkeypatch):
    folder = tmp_path / "C"
    with monkeypatch.context() as patched:
        fails_after(patched, 3, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(
            OSError, match=r"the disk is full: gaussian_noise_severity_4\.npz could not be written"
        ) as full:
            write_benchmark(folder, [CHEST, OCT], **SMALL)
    assert full.value.errno == errno.ENOSPC
    assert not [path for path in folder.rglob("*") if path.suffix == ".part"]
    written = {name: content for name, content in contents(folder).items() if name.endswith(".npz")}
    assert len(written) == 4
    assert written.items() <= whole.contents.items()
    write_benchmark(folder, [CHEST, OCT], **SMALL)
    assert contents(folder) == whole.contents
