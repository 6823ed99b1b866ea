"""What is generated in the README follows from its sources; the citation file, changelog and guide say what is true."""

import importlib.util
import json
import math
import re
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import medrobust_lib as mr
from medrobust_lib import cli
from medrobust_lib.experiments import Metric, start_run
from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE
from medrobust_lib.places import VERSION
from medrobust_lib.runner import find_notebooks

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
NUMBERS = list(find_notebooks())


@pytest.fixture
def docs(monkeypatch):
    """The scripts of docs/, which import each other by name when one of them is called."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return load("generate")


@pytest.fixture
def taking(docs):
    """The script that takes a snapshot of a run."""
    return load("demo_snapshot")


def load(name):
    spec = importlib.util.spec_from_file_location(f"front_door_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def snapshot(docs):
    return docs.read_snapshot()


def part_of(text, name):
    return re.search(rf"<!-- generated: {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)[1]


# ---- drift ----


def test_nothing_generated_has_drifted(docs):
    assert docs.drift() == [], "mend it with `python docs/generate.py` (after a run: `--snapshot runs/demo`)"


def test_check_says_what_drifted_and_writes_nothing(docs, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text(
        README.replace("Zero-shot inference](notebooks", "Zero shot inference](notebooks"), encoding="utf-8"
    )
    before = page.read_text(encoding="utf-8")
    monkeypatch.setattr(docs, "drift", lambda drift=docs.drift: drift([page]))
    result = CliRunner().invoke(docs.app, ["--check"])
    assert (result.exit_code, page.read_text(encoding="utf-8")) == (1, before)
    assert "drifted: README.md, part 'notebooks'\n" in result.output
    assert docs.with_parts(before, docs.read_snapshot()) == README


def test_every_part_is_shown_exactly_once(docs):
    shown = [name for page in docs.PAGES for name in re.findall(r"<!-- generated: ([\w-]+) -->", page.read_text())]
    assert sorted(shown) == sorted(docs.PARTS)


def test_an_unknown_part_is_refused(docs, snapshot):
    with pytest.raises(ValueError, match="no part 'tabel' can be generated; there are output, notebooks"):
        docs.with_parts("<!-- generated: tabel -->\n<!-- end -->", snapshot)


def test_the_picture_was_drawn_from_this_snapshot(snapshot, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    picture = load("front_picture")
    assert picture.drawn_from() == picture.source_hash(snapshot)
    snapshot["curves"]["severity"] = None
    assert picture.drawn_from() != picture.source_hash(snapshot)
    with Image.open(ROOT / "docs" / "front_picture.png") as image:
        assert image.mode == "P" and image.width >= 1500, "opaque, and sharp at the width of a page"
        assert "transparency" not in image.info
    assert (ROOT / "docs" / "front_picture.png").stat().st_size < 300_000


def test_the_picture_shows_an_image_whose_answer_changes_on_both_sides(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    data, versions, answers = load("front_picture").worsening()
    right = (answers == data.labels[0]).tolist()
    assert data.synthetic and len(versions) == len(answers) == 6
    assert (right[0], right[3], right[5]) == (True, False, False)


def test_the_size_that_the_caption_explains_is_what_it_says(snapshot):
    """0.5 in L2 over all values of the image, in steps of 255."""
    points = snapshot["curves"]["certified"]["points"]
    drawn = [point for point in points if point["sigma"] == points[0]["sigma"] and point["certified_accuracy"]]
    largest = max(point["radius"] for point in drawn)
    sizes = mr.list_models().set_index("id")["image_size"]
    assert largest == 0.5
    assert round(255 * largest / math.sqrt(3 * sizes["demo-clip"] ** 2)) == 1
    assert "size 0.5 is one colour of one pixel going half the way" in README
    assert "every value of the image moving by about one of 255 steps" in README


# ---- the snapshot ----


def test_snapshot_of_a_run(taking, tmp_path, monkeypatch):
    write_run(tmp_path / "demo", monkeypatch)
    path = tmp_path / "results.json"
    taken = taking.write_snapshot(tmp_path / "demo", test_minutes=7, path=path)
    assert json.loads(path.read_text()) == taken
    assert list(taken["notebooks"]) == ["01"]
    assert taken["notebooks"]["01"]["results"] == [
        {
            "what": "accuracy, zero-shot, phantom/histology",
            "value": 0.6667,
            "low": 0.5,
            "high": 0.8,
            "interval": "95 % interval",
            "n": 180,
        }
    ]
    assert (taken["test_minutes"], taken["curves"]["severity"]) == (7, None)
    # Without a new time the former one stays, and with it where it was taken.
    assert taking.write_snapshot(tmp_path / "demo", path=path)["test_minutes"] == 7
    taking.write_snapshot(tmp_path / "demo", test_minutes=9, run_minutes=3, path=path)
    kept = taking.write_snapshot(tmp_path / "demo", path=path)
    assert (kept["test_minutes"], kept["test_run_minutes"]) == (9, 3)
    with pytest.raises(ValueError, match="run_minutes=3 says where `make test` was timed; give test_minutes, too"):
        taking.write_snapshot(tmp_path / "demo", run_minutes=3, path=path)


def test_times_are_those_that_the_command_printed(taking, tmp_path, monkeypatch):
    write_run(tmp_path / "demo", monkeypatch)
    spent = {"start_time": "2026-01-01T00:00:00+00:00", "end_time": "2026-01-01T00:00:41+00:00", "duration": 41.0}
    notebook = nbformat.v4.new_notebook(metadata={"papermill": spent})
    (tmp_path / "demo" / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, tmp_path / "demo" / "notebooks" / "01_zero_shot_inference.ipynb")
    taken = taking.write_snapshot(tmp_path / "demo", path=tmp_path / "results.json")
    assert (taken["run_seconds"], taken["notebooks"]["01"]["seconds"]) == (41, 41)  # the card's clock begins later


def test_a_run_with_other_parameters_or_metrics_is_refused(taking, tmp_path, monkeypatch):
    write_run(tmp_path / "other", monkeypatch, n_images=7)
    with pytest.raises(ValueError, match=r"notebook 01 .* was run with n_images other than the default"):
        taking.write_snapshot(tmp_path / "other", path=tmp_path / "results.json")
    write_run(tmp_path / "renamed", monkeypatch, metric="accuracies")
    with pytest.raises(ValueError, match="card of notebook 01 has no metric 'accuracy'.*_results_01"):
        taking.write_snapshot(tmp_path / "renamed", path=tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


def test_a_notebook_with_other_defaults_than_in_the_snapshot_is_drift(docs, snapshot, tmp_path):
    snapshot["notebooks"]["01"]["parameters"]["n_images"] = 7
    file = tmp_path / "results.json"
    file.write_text(json.dumps(snapshot))
    assert "results.json: notebook 01 has other defaults now (n_images)" in docs.drift(snapshot=file)


def test_a_foreign_snapshot_is_refused(taking, tmp_path):
    (tmp_path / "results.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="results.json has format 99, this version reads 1; make it anew"):
        taking.read_snapshot(tmp_path / "results.json")


def test_adaptation_rows_are_means_over_sets_and_ranges_over_seeds(taking, tmp_path):
    rows = [("a", "zero-shot", "", 0.4, 100), ("b", "zero-shot", "", 0.2, 100)]
    rows += [(d, "LoRA", s, e, m) for s, e, m in ((0, 0.1, 80), (1, 0.2, 90)) for d in ("a", "b")]
    table = pd.DataFrame(rows, columns=["dataset", "method", "seed", "clean_error", "mce"]).assign(n=45)
    table.to_csv(tmp_path / "04_adaptation.csv", index=False)
    before, after, mce = taking._results_04({}, tmp_path)
    assert (before["value"], before["n"], before["low"]) == (pytest.approx(0.3), 90, None)
    assert (after["value"], after["low"], after["high"]) == tuple(map(pytest.approx, (0.15, 0.1, 0.2)))
    assert (mce["value"], mce["interval"]) == (pytest.approx(0.85), "lowest and highest seed")


def write_run(folder, monkeypatch, *, n_images=180, metric="accuracy"):
    """A run folder with the card of notebook 01."""
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(folder))
    run = start_run("01", "Zero-shot inference", model="demo-clip", n_images=n_images)
    run.save_card(
        metrics=[Metric(metric, 2 / 3, 180, 0.5, 0.8)],
        tables={},
        model={"id": "demo-clip"},
        dataset={"id": "phantom/histology", "synthetic": True},
        prompts={},
    )


# ---- the parts ----


def test_every_notebook_has_its_row_everywhere(docs, snapshot):
    missing = {**snapshot, "notebooks": {}, "curves": dict.fromkeys(snapshot["curves"])}
    for found in (snapshot, missing):
        for name in ("notebooks", "results"):
            part = docs.PARTS[name](found)
            assert all(f"| {number} |" in part for number in NUMBERS)
    assert docs.PARTS["notebooks"](missing).count("not in the present snapshot") == len(NUMBERS)
    assert docs.PARTS["published"](missing).count("not in the present snapshot") == 9


def test_models_and_data_sets_do_not_depend_on_what_is_on_this_computer(docs, snapshot, tmp_path, monkeypatch):
    before = [docs.PARTS[name](snapshot) for name in ("models", "datasets")]
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MEDROBUST_DATA", str(tmp_path))
    assert [docs.PARTS[name](snapshot) for name in ("models", "datasets")] == before


def test_reported_numbers_are_the_papers(docs, snapshot):
    part = docs.PARTS["published"](snapshot)
    assert "| 49 % (PLIP, KatherColon) |" in part  # PromptSmooth, Table 2: 49.4
    assert "| 82 % (PLIP, KatherColon) |" in part  # 81.8
    assert "50 of the 50 rows of Table 2 follow from Table 3; 3 printed entries elsewhere do not" in part


def test_the_numbers_of_the_tables_are_those_of_the_snapshot(docs, snapshot):
    one = {"what": "x", "value": 0.256, "low": 0.1, "high": 0.3449, "interval": "lowest and highest seed", "n": 12}
    entry = {**snapshot["notebooks"]["01"], "results": [one], "seconds": 241}
    found = {**snapshot, "notebooks": {**snapshot["notebooks"], "01": entry}}
    assert "| 01 | x | 26 % (10 % to 34 % *) | 12 |" in docs.PARTS["results"](found)
    assert "| 4 min |" in docs.PARTS["notebooks"](found)


def test_the_expected_output_is_what_the_command_prints(docs, snapshot, write_notebook, tmp_path):
    """A run of tiny notebooks, with everything that differs from run to run put aside."""
    cell = 'from medrobust_lib.experiments import start_run\nrun = start_run("01", "One")\n'
    cell += 'run.save_card(metrics=[], tables={}, model={"id": "m"}, dataset={"id": "d"}, prompts={})'
    (tmp_path / "notebooks").mkdir()
    for name in ("01_one", "02_two"):
        write_notebook(tmp_path / "notebooks", name, cell)
    arguments = ["run", "--notebooks", str(tmp_path / "notebooks"), "--out", str(tmp_path / "runs" / "demo")]
    printed = CliRunner().invoke(cli.app, arguments, catch_exceptions=False).output.splitlines()
    expected = part_of(README, "output").split("$ make test")[0].splitlines()
    lines = [line for line in expected if line and line not in ("...", "```text") and line[0] not in "$="]
    assert len(lines) == 5
    assert {normal(line) for line in lines} <= {normal(line) for line in printed}


def normal(line):
    line = re.sub(r"\S*/runs/demo", "RUN", line)
    return re.sub(r"\d\d\w*_\w+", "NOTEBOOK", re.sub(r"\d+\.\d+|\b\d+\b", "N", line))


def test_what_the_makefile_says_is_read_from_it(docs):
    part = docs.PARTS["output"](docs.read_snapshot())
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"^==>.*$", part, re.MULTILINE):
        assert f'@echo "{line}"' in makefile
    with pytest.raises(ValueError, match="the recipe of nothing no longer begins"):
        docs._echoed("nothing")


SPOKEN = {"half a": 0.5, "a": 1, "a minute and a half": 1.5, "two": 2, "three": 3, "four": 4, "five": 5}


def spoken_minutes(text):
    """What an introduction says: about two minutes, less than half a minute, about a minute and a half."""
    said = r"(?:about|less than|under) (a minute and a half|[a-z ]{1,6}(?= minutes?\b))"
    (words,) = re.findall(said, text)
    return SPOKEN[words]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_notebook_and_the_readme_name_one_time(number, snapshot):
    introduction = nbformat.read(find_notebooks()[number], as_version=4).cells[1].source
    minutes = snapshot["notebooks"][number]["seconds"] / 60
    assert minutes / 1.5 <= spoken_minutes(introduction) <= max(1.5 * minutes, 0.6), (
        f"the README: {minutes:.1f} minutes"
    )


def test_prose_beside_the_commands_agrees_with_the_project():
    python = PROJECT["requires-python"].removeprefix(">=")
    assert f"You need Python {python} or newer" in README
    disk = re.search(r"and (\d+ GB), once", (ROOT / "Makefile").read_text())[1]
    assert f"about {disk} of disk" in README


# ---- citation, changelog, guide ----


def test_citation_file_is_valid():
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "license", "version"} <= CITATION.keys()
    assert CITATION["authors"] == [{"name": "medrobust contributors"}]
    assert (CITATION["version"], CITATION["license"]) == (VERSION, PROJECT["license"])
    assert [entry["identifiers"][0]["value"] for entry in CITATION["references"]] == [
        "arXiv:2408.16769", "arXiv:2505.15425", "arXiv:2509.16088",
    ]  # fmt: skip
    for entry in CITATION["references"]:
        assert {"type", "title", "authors", "year", "url"} <= entry.keys()
        assert all(author.keys() == {"family-names", "given-names"} for author in entry["authors"])
        assert entry["url"].endswith(entry["identifiers"][0]["value"].removeprefix("arXiv:"))
        assert f"]({entry['url']})" in README
        assert entry["title"] in part_of(README, "citations")


def test_changelog_has_the_present_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([^]]+)\]", text, re.MULTILINE) == ["Unreleased", VERSION]


def test_contributing_guide_names_lanes_and_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([\w-]+)", text))
    assert {"test", "lint", "nb-refresh", "browser", "bench"} <= targets
    for name in re.findall(r"`((?:medrobust_lib|data|docs|tests)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).exists() or (ROOT / "medrobust_lib" / name).exists(), name


def test_pages_are_short_enough_to_be_read():
    assert len(README.splitlines()) <= 350
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
