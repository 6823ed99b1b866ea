import json
import shutil
import sys

import pytest

from medrobust_lib import cli
from medrobust_lib.experiments.report import duration
from medrobust_lib.studies.benchmark_step import BenchmarkCell


@pytest.fixture
def invoke(monkeypatch, capsys):
    """Call the console script's own entry point; returns exit code, standard output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medrobust", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def test_a_dry_run_prices_every_cell_and_writes_nothing(invoke, study_file, tmp_path, monkeypatch):
    monkeypatch.setattr("medrobust_lib.studies.cells.encodings_per_second", lambda model, dataset, *, dtype: 10.0)
    monkeypatch.setattr("medrobust_lib.studies.cells._seconds_to_corrupt", lambda dataset, suite: 0.0)
    path = study_file()
    before = sorted(tmp_path.rglob("*"))
    code, text, _ = invoke("study", path, "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    lines = [line.split() for line in text.splitlines()]
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 110
    priced = "1 certify demo-clip on phantom/chest, sigma 0.05, seed 0 4 100 10.0 s"
    assert any(" ".join(line).startswith(priced) for line in lines)
    assert "sum of 3 cells" in text
    assert "Nothing was run or written." in text
    assert "of 25 draws at sigma 0.05" in text


def test_a_dry_run_tells_perturbations_of_one_sigma_apart(invoke, study_file, monkeypatch):
    monkeypatch.setattr("medrobust_lib.studies.cells.encodings_per_second", lambda model, dataset, *, dtype: 10.0)
    steps = [f"{{sigmas: [2], n: 2000, radii: [0, 4], perturbation: {name}}}" for name in ("pixel-noise", "blur")]
    text = "models: [demo-clip]\ndatasets: [phantom/chest]\nn_images: 4\n"
    text += f"steps: [{', '.join(f'{{certify: {step}}}' for step in steps)}]\n"
    code, text, _ = invoke("study", study_file(text), "--dry-run")
    assert code == 0
    stops = dict(line.strip().split(" of 2,100 draws at ") for line in text.splitlines() if "draws at" in line)
    assert list(stops.values()) == ["sigma 2", "blur sigma 2"]


def test_a_study_prints_its_leaderboard_and_two_runs_compare(invoke, study_file, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "out")
    code, text, _ = invoke("study", study_file(), "--out", tmp_path / "out")
    assert code == 0
    assert "study tiny: 3 of 3 cells" in text
    assert "(3 resumed)" in text
    assert "certification: smoothed accuracy on phantom/chest, " in text
    assert "01-certify seed 0" in text
    assert "3 of 3 cells are done" in text
    written = ("--csv", tmp_path / "compared.csv", "--images", tmp_path / "images.csv")
    code, text, _ = invoke("compare", undisturbed, tmp_path / "out", *written)
    assert code == 0
    assert (tmp_path / "images.csv").read_text() == "dataset,model,metric,of,image,file,change\n"  # none differs
    assert max(len(line) for line in text.splitlines() if not line.startswith(("A:", "B:"))) <= 100
    assert "certified accuracy on phantom/chest, demo-clip" in text
    assert "paired" in text
    assert "only in" not in text
    rows = json.loads(invoke("compare", undisturbed, tmp_path / "out", "--json")[1])
    assert {row["difference"] for row in rows if "the draws reach" not in row["of"]} == {0.0}
    assert {row["difference"] for row in rows if "the draws reach" in row["of"]} == {None}
    assert len((tmp_path / "compared.csv").read_text().splitlines()) == len(rows) + 1


def test_a_failed_cell_fails_the_command_with_its_reason(invoke, study_file, tmp_path, undisturbed, monkeypatch):
    def broken(cell, study, **more):
        raise OSError("no space left")

    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(next(out.glob("cells/02*")))  # a result that is gone is made again
    monkeypatch.setattr(BenchmarkCell, "run", broken)
    code, _, error = invoke("study", study_file(), "--out", out)
    assert code == 1
    assert "1 of 3 cells failed; the same command tries them again" in error
    assert "2 benchmark demo-clip on phantom/chest, seed 0: OSError: no space left" in error


def test_errors_of_the_file_come_before_anything_runs(invoke, study_file, tmp_path):
    code, _, error = invoke("study", study_file("models: [demo-clip]\nsteps: []\n"), "--out", tmp_path / "out")
    assert code == 1
    assert "datasets is missing" in error
    assert not (tmp_path / "out").exists()
    assert invoke("study", tmp_path / "none.yaml")[0] == 1
    assert invoke("compare", tmp_path / "a", tmp_path / "b")[0] == 1


@pytest.mark.parametrize(("seconds", "text"), [(5, "5.0 s"), (90, "1.5 min"), (5400, "1.5 h"), (129_600, "1.5 d")])
def test_durations_are_told_in_a_unit_that_fits(seconds, text):
    assert duration(seconds) == text
