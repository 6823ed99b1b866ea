"""A hospital's engineer with a folder of images types what the README says, and knows nothing of the code.

Every step is a command in a process of its own, as it is typed, and looks at nothing but what was printed and written.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

REAL = Path(os.environ.get("MEDROBUST_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data" / "real")
real_images = pytest.mark.skipif(
    not (REAL / "folders").is_dir(), reason=f"no real images at {REAL}; name their folder with MEDROBUST_REAL_DATA"
)
WORDS = "{class_names: {NORMAL: no finding, PNEUMONIA: pneumonia}, templates: ['a chest radiograph showing {}.']}"


def typed(*words, where, code=0):
    """What a command prints, which must end as it should."""
    command = [sys.executable, "-m", "medrobust_lib", *map(str, words)]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_film(path, patient, *, seed):
    """A DICOM file of 12 bits with a window, a bright field and a patient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :80]
    pixels = 800 + 2400 * np.exp(-((y - rng.uniform(30, 66)) ** 2 + (x - rng.uniform(25, 55)) ** 2) / 900)
    pixels = np.clip(pixels + rng.normal(0, 120, pixels.shape), 0, 4095).astype(np.uint16)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    record = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    record.SOPClassUID, record.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    record.PatientID, record.Rows, record.Columns, record.SamplesPerPixel = patient, 96, 80, 1
    record.PhotometricInterpretation, record.BitsAllocated, record.BitsStored = "MONOCHROME2", 16, 12
    record.HighBit, record.PixelRepresentation, record.WindowCenter, record.WindowWidth = 11, 0, 2048, 4096
    record.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    record.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An export as a hospital has it: class folders of DICOM files, several of each patient."""
    root = tmp_path_factory.mktemp("export")
    for number in range(24):
        name, patient = ("NORMAL", "PNEUMONIA")[number % 2], f"MRN-{4000 + number // 6 * 2 + number % 2}"
        write_film(root / "films" / name / f"film{number:02d}.dcm", patient, seed=number)
    return root


def cards_of(folder):
    return [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("cards/*.json"))]


def rows_of(path):
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def certified(archive):
    words = ["certify", "films", "--model", "demo-clip", "--sigma", 0.1, "--radius", 0.05, "--n", 100, "--alpha", 0.01]
    words += ["--words", WORDS, "--out", "runs/films"]
    return words, typed(*words, where=archive)


def test_one_command_says_how_many_answers_hold_and_which_images_need_a_look(archive, certified):
    _, said = certified
    assert re.search(r"Of 24 images", said) and "8 patients" in said
    assert "guarantee: standard" in said and "not for clinical use" in said
    rows = rows_of(next((archive / "runs" / "films" / "cards").glob("*_images.csv")))
    assert len(rows) == 24 and {row["class_name"] for row in rows} == {"no finding", "pneumonia"}
    assert all(re.fullmatch(r"(NORMAL|PNEUMONIA)/film\d\d\.dcm", row["file"]) for row in rows)
    assert len({row["patient"] for row in rows}) == 8 and "MRN" not in json.dumps(rows)
    assert any(row["file"] in said for row in rows)


def test_its_report_shows_the_images_and_tells_nothing_of_the_computer_or_the_patients(archive, certified):
    run = archive / "runs" / "films"
    pages = [(run / name).read_text(encoding="utf-8") for name in ("index.html", "images.html")]
    assert "film00.dcm" in pages[1] and "<img" in pages[1] and 'lang="en"' in pages[0]
    for text in (*pages, *cards_of(run)):
        assert str(archive) not in text and "MRN-" not in text


def test_the_same_command_again_has_nothing_left_to_do(archive, certified):
    words, said = certified
    before = (archive / "runs" / "films" / "cards").glob("*_images.csv")
    kept = {path: path.read_bytes() for path in before}
    again = typed(*words, where=archive)
    assert re.search(r"Of 24 images.*", again)[0] == re.search(r"Of 24 images.*", said)[0]
    assert kept == {path: path.read_bytes() for path in kept}


def test_prompts_learned_from_one_half_of_the_patients_are_certified_on_the_other(archive):
    words = ["certify", "films", "--model", "demo-clip", "--sigma", 0.1, "--radius", 0.05, "--n", 60, "--alpha", 0.05]
    said = typed(*words, "--method", "few-shot", "--shots", 2, "--out", "runs/few", where=archive)
    (card,) = map(json.loads, cards_of(archive / "runs" / "few"))
    assert any("all images of a patient on one side" in note for note in card["notes"])
    assert "few-shot PromptSmooth" in said


def test_worse_images_keep_their_names_and_can_be_measured(archive):
    asked = ["--suite", "medimeta-c", "--corruption", "contrast", "--severity", 3]
    said = typed("corrupt", "films", *asked, "--out", "paler", where=archive)
    assert "24 images" in said and "contrast of medimeta-c at severity 3" in said
    made = sorted(path.relative_to(archive / "paler").as_posix() for path in (archive / "paler").rglob("*.png"))
    assert len(made) == 24 and made[0] == "NORMAL/film00.png"
    with Image.open(archive / "paler" / made[0]) as picture:
        assert picture.size == (80, 96) and "80 x 96 px, as they are" in said
    assert (
        pydicom.dcmread(archive / "films" / "NORMAL" / "film00.dcm").PatientID == "MRN-4000"
    )  # the source is as it was
    few = ["--model", "demo-clip", "--sigma", 0.1, "--radius", 0.05, "--n", 60, "--alpha", 0.05, "--n-images", 6]
    assert "Of 6 images" in typed("certify", "folder:paler", *few, "--out", "runs/paler", where=archive)


def test_notebook_07_shows_own_images_only(archive):
    asked = ["-p", "dataset=folder:films", "-p", f"words={WORDS}", "-p", "n_images=12"]
    said = typed("run", "07", *asked, "--out", "runs/07", where=archive)
    assert "report:" in said
    (text,) = cards_of(archive / "runs" / "07")
    card = json.loads(text)
    assert card["dataset"]["id"].startswith("folder:films") and not card["dataset"].get("synthetic")
    assert len(card["findings"]) == 2 and card["question"] and str(archive) not in text
    rows = rows_of(archive / "runs" / "07" / "cards" / "07_images.csv")
    assert all(re.fullmatch(r"(NORMAL|PNEUMONIA)/film\d\d\.dcm", row["file"]) for row in rows)
    assert "film" in (archive / "runs" / "07" / "images.html").read_text(encoding="utf-8")


def test_results_are_ranked_where_they_can_be_compared(archive, certified):
    exports = ["--csv", "board.csv", "--markdown", "board.md", "--latex", "board.tex"]
    said = " ".join(typed("leaderboard", "runs", *exports, where=archive).lower().split())
    assert "certification: certified accuracy on folder:films" in said and "constant answer" in said
    assert all((archive / name).stat().st_size > 100 for name in ("board.csv", "board.md", "board.tex"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["certify", "film", "--model", "demo-clip"], "film"),
        (["certify", "films", "--model", "demo-klip"], "demo-clip"),
        (["certify", "films", "--model", "demo-clip", "--words", "{class_names: {NORML: x}}"], "NORML"),
        (["certify", "films", "--model", "demo-clip", "--sigma", "25"], "255"),
        (["corrupt", "films", "--corruption", "contrst", "--out", "x"], "contrast"),
        (["corrupt", "films", "--corruption", "contrast", "--out", "films"], "films"),
        (["run", "07", "-p", "images=folder:films"], "dataset"),
        (["run", "07", "-p", "dataset=folder:films", "--out", "films"], "films"),
    ],
)
def test_slips_of_the_hand_are_told_in_one_message_and_leave_nothing(archive, words, told):
    before = sorted(archive.rglob("*"))
    said = typed(*words, where=archive, code=1)
    assert told in said and "Traceback" not in said
    assert sorted(archive.rglob("*")) == before


@real_images
@pytest.mark.parametrize(("name", "like"), [("pneumonia", "medimeta/pneumonia"), ("breast_us", "medmnist/breast")])
def test_real_images_go_the_same_way(tmp_path, name, like):
    few = ["--model", "demo-clip", "--sigma", 0.1, "--radius", 0.05, "--n", 60, "--alpha", 0.05, "--n-images", 8]
    said = typed("certify", REAL / "folders" / name, *few, "--words", like, "--out", "run", where=tmp_path)
    assert "Of 8 images" in said and "not for clinical use" in said
    assert all(str(REAL) not in text for text in cards_of(tmp_path / "run"))
    rows = rows_of(next((tmp_path / "run" / "cards").glob("*_images.csv")))
    assert all((REAL / "folders" / name / row["file"]).is_file() for row in rows)


def test_the_version_is_printed(tmp_path):
    assert re.search(r"\d+\.\d+\.\d+", typed("--version", where=tmp_path))
