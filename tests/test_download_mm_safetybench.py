import importlib.util
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrobust_lib import files
from medrobust_lib.data import questions
from medrobust_lib.data.questions import IMAGE_TYPES, list_scenarios, read_scenario
from preparing import downloads

SCRIPT = Path(__file__).parents[1] / "data_scripts" / "download_mm_safetybench.py"
SMALL = {"01-Illegal_Activitiy": 3, "06-Fraud": 12}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script with two small scenarios, and a download that finds made-up questions instead of the network."""
    spec = importlib.util.spec_from_file_location("download_mm_safetybench", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.asked = []

    def download(url, path, **expected):
        module.asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(made_up(SMALL[path.stem])), encoding="utf-8")
        return downloads.download(url, path, **expected)

    monkeypatch.setattr(module, "download", download)
    monkeypatch.setattr(questions, "SCENARIOS", SMALL)
    return module


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def source(tmp_path):
    """The authors' archive, unpacked."""
    folder = tmp_path / "unpacked"
    for scenario, count in SMALL.items():
        for kind in IMAGE_TYPES:
            place = folder / "MM-SafetyBench(imgs)" / scenario / kind
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(place / f"{number}.jpg")
    return folder


def made_up(count):
    fields = ("Question", "Key Phrase", "Rephrased Question", "Rephrased Question(SD)")
    return {str(number): {field: f"made-up {field} {number}" for field in fields} for number in range(count)}


def packed(source):
    path = source.parent / "MM-SafetyBench(imgs).zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(source.rglob("*.jpg")):
            archive.write(file, file.relative_to(source))
        archive.writestr("__MACOSX/MM-SafetyBench(imgs)/06-Fraud/SD/._0.jpg", b"")
    return path


def invoke(script, *arguments, exit_code=0):
    result = CliRunner().invoke(script.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == exit_code, result.output
    return result


def installed(root):
    return {path.relative_to(root).as_posix() for path in (root / "mm-safetybench").rglob("*") if path.is_file()}


def test_help_says_what_a_user_has_to_know(script):
    text = " ".join(invoke(script, "--help").output.split())
    for words in (
        "CC BY-NC 4.0, for research only",
        "harmful by design",
        "cite Liu et al.",
        "https://isxinliu.github.io/Project/MM-SafetyBench/",
        "https://github.com/isXinLiu/MM-SafetyBench",
        "--source",
    ):
        assert words in text


@pytest.mark.parametrize("pack", [True, False])
def test_set_lands_where_the_reader_looks(script, root, source, pack):
    given = packed(source) if pack else source
    result = invoke(script, "--root", root, "--source", given)
    assert script.asked == [f"{script.QUESTIONS}/{scenario}.json" for scenario in SMALL]
    assert "only to measure refusals" in result.output
    assert list_scenarios(root=root)["available"].all()
    found = read_scenario("mm-safetybench/06-SD_TYPO", root=root)
    assert list(found.questions) == [f"made-up Rephrased Question {number}" for number in range(12)]
    assert [int(image[0, 0, 0]) for image in found.images] == list(range(12))
    images = {f"{name}/{kind}/{id}.jpg" for name, count in SMALL.items() for kind in IMAGE_TYPES for id in range(count)}
    assert installed(root) == {
        "mm-safetybench/manifest.json",
        *(f"mm-safetybench/processed_questions/{scenario}.json" for scenario in SMALL),
        *(f"mm-safetybench/imgs/{image}" for image in images),
    }
    assert {path.name for path in root.iterdir()} == {"downloads", "mm-safetybench"}
    assert len(list(source.rglob("*.jpg"))) == 45  # the user's own files stay


def test_manifest(script, root, source):
    archive = packed(source)
    invoke(script, "--root", root, "--source", archive)
    manifest = json.loads((root / "mm-safetybench/manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"] == "https://github.com/isXinLiu/MM-SafetyBench"
    assert manifest["licence"] == "CC BY-NC 4.0, research only"
    assert "harmful by design" in manifest["note"]
    assert manifest["revision"] in script.QUESTIONS and len(manifest["revision"]) == 40
    assert manifest["counts"] == {
        scenario: {"questions": count, **dict.fromkeys(IMAGE_TYPES, count)} for scenario, count in SMALL.items()
    }
    folder = root / "mm-safetybench/processed_questions"
    assert manifest["questions_sha256"] == {path.name: files.file_sha256(path) for path in folder.iterdir()}
    assert manifest["images_from"] == archive.name
    assert manifest["images_from_sha256"] == files.file_sha256(archive)
    invoke(script, "--root", root, "--source", source, "--overwrite")
    again = json.loads((root / "mm-safetybench/manifest.json").read_text(encoding="utf-8"))
    assert again["images_from_sha256"] is None
    assert again["images_listing_sha256"] == manifest["images_listing_sha256"]


def test_without_images_it_says_where_they_are(script, root):
    result = invoke(script, "--root", root, exit_code=1)
    assert "error: the questions are in" in result.stderr
    assert "Fetch MM-SafetyBench(imgs).zip by hand" in result.stderr
    assert "https://isxinliu.github.io/Project/MM-SafetyBench/" in result.stderr
    assert "README of https://github.com/isXinLiu/MM-SafetyBench" in result.stderr
    assert "--source" in result.stderr
    assert not (root / "mm-safetybench").exists()
    assert len(list(root.glob("downloads/mm-safetybench/*/*.json"))) == 2


def test_missing_images_are_named_and_nothing_is_put_in_place(script, root, source):
    inner = source / "MM-SafetyBench(imgs)"
    shutil.rmtree(inner / "06-Fraud/SD")
    (inner / "01-Illegal_Activitiy/TYPO/1.jpg").unlink()
    for given in (source, packed(source)):
        result = invoke(script, "--root", root, "--source", given, exit_code=1)
        assert f"nothing was put in place: {given} is incomplete" in result.stderr
        assert "01-Illegal_Activitiy/TYPO: 1 of 3 images: 1.jpg\n" in result.stderr
        assert "06-Fraud/SD: 12 of 12 images: 0.jpg, 1.jpg, 2.jpg" in result.stderr
        assert "9.jpg and 2 more" in result.stderr
        assert "06-Fraud/TYPO" not in result.stderr
        assert {path.name for path in root.iterdir()} == {"downloads"}


def test_images_without_a_question_are_left_out(script, root, source):
    Image.new("RGB", (8, 8)).save(source / "MM-SafetyBench(imgs)/06-Fraud/SD/12.jpg")
    result = invoke(script, "--root", root, "--source", source)
    assert "1 images without a question were left out" in result.output
    assert not (root / "mm-safetybench/imgs/06-Fraud/SD/12.jpg").exists()


def test_ready_set_is_left_alone_unless_overwritten(script, root, source):
    invoke(script, "--root", root, "--source", source)
    before = (root / "mm-safetybench/manifest.json").stat().st_mtime_ns
    script.asked.clear()
    assert "ready already; --overwrite builds it anew" in invoke(script, "--root", root).output
    assert script.asked == []
    assert (root / "mm-safetybench/manifest.json").stat().st_mtime_ns == before

    (root / "mm-safetybench/imgs/06-Fraud/SD/3.jpg").unlink()
    result = invoke(script, "--root", root, exit_code=1)
    assert "06-Fraud/SD: 1 of 12 images: 3.jpg" in result.stderr
    assert "--overwrite and --source" in result.stderr
    (root / "mm-safetybench/processed_questions/01-Illegal_Activitiy.json").unlink()
    assert "01-Illegal_Activitiy: 0 of 3 questions" in invoke(script, "--root", root, exit_code=1).stderr
    invoke(script, "--root", root, "--source", source, "--overwrite")
    assert list_scenarios(root=root)["available"].all()


def test_a_failed_overwrite_keeps_the_old_set(script, root, source):
    invoke(script, "--root", root, "--source", source)
    before = installed(root)
    shutil.rmtree(source / "MM-SafetyBench(imgs)/06-Fraud")
    invoke(script, "--root", root, "--source", source, "--overwrite", exit_code=1)
    assert installed(root) == before


def test_a_folder_of_someone_else_is_not_touched(script, root, source):
    (root / "mm-safetybench").mkdir(parents=True)
    result = invoke(script, "--root", root, "--source", source, exit_code=1)
    assert "exists but was not made by this script; move it away or pass --overwrite" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (made_up(2), "01-Illegal_Activitiy.json holds 2 questions, expected 3. Delete it and run again."),
        ("<html>", "01-Illegal_Activitiy.json does not hold questions by id"),
        ({str(number): {"Question": "made-up"} for number in range(3)}, "question 0 has no 'Rephrased Question(SD)'"),
    ],
)
def test_wrong_question_file_is_refused(script, root, source, content, message):
    path = root / "downloads/mm-safetybench" / script.REVISION / "01-Illegal_Activitiy.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    result = invoke(script, "--root", root, "--source", source, exit_code=1)
    assert message in result.stderr
    assert not (root / "mm-safetybench").exists()


def test_source_that_is_something_else(script, root, source, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = invoke(script, "--root", root, "--source", empty, exit_code=1)
    assert f"{empty} has no folder such as 01-Illegal_Activitiy/SD with images. Fetch MM-Safety" in result.stderr
    text = tmp_path / "notes.txt"
    text.write_text("made-up")
    result = invoke(script, "--root", root, "--source", text, exit_code=1)
    assert "neither a zip nor a tar archive" in result.stderr
    shutil.copytree(source / "MM-SafetyBench(imgs)", source / "copy")
    result = invoke(script, "--root", root, "--source", source, exit_code=1)
    assert re.search(r"more than once, in MM-SafetyBench\(imgs\) and copy; name one of them", result.stderr)
    assert {path.name for path in root.iterdir()} == {"downloads"}


def test_offline_names_address_and_remedy(script, root, source, monkeypatch):
    closed = "http://127.0.0.1:9"  # the discard port: nothing listens there
    monkeypatch.setattr(script, "download", downloads.download)
    monkeypatch.setattr(script, "QUESTIONS", closed)
    result = invoke(script, "--root", root, "--source", source, exit_code=1)
    assert f"error: cannot fetch {closed}/01-Illegal_Activitiy.json" in result.stderr
    assert "with a browser and save it as" in result.stderr
