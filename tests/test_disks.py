"""Disks, folders and names that take nothing, and Ctrl-C: one line with the path and what helps, and nothing lost."""

import importlib.util
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from medrobust_lib import cli
from medrobust_lib.experiments import Metric, Run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="other errors and signals there")
SCRIPTS = sorted((Path(__file__).parents[1] / "data_scripts").glob("*.py"))
LONG = "n" * 300
START = 'from medrobust_lib.experiments import Metric, start_run\nrun = start_run("01", "Tiny", model=model)'
CARD = """
run.save_card(metrics=[Metric("accuracy", .5, 4)], tables={}, model={"id": model},
              dataset={"id": "phantom/blood", "n": 4, "synthetic": True}, prompts={})
"""
FIGURE = """
import numpy as np
from matplotlib.figure import Figure
figure = Figure(figsize=(10, 10))
figure.add_subplot().imshow(np.random.default_rng(0).random((1500, 1500)))
run.save_figure(figure, "noise")
"""
STUDY = """
models: [demo-clip]
datasets: [phantom/chest]
n_images: 2
steps: [certify: {sigmas: 0.1, n0: 5, n: 20, alpha: 0.05, radii: 0.02}]
"""
NO_ROOM_FOR_IT = """
folder = run.folder / "figures"
folder.mkdir()
(folder / "01_noise.png").symlink_to("/dev/full")
"""
# The notebook sends Ctrl-C to the command, once, and then takes longer than anybody waits.
CTRL_C = """
import os, pathlib, signal, time, psutil
marker = pathlib.Path("kernel")
if not marker.exists():
    marker.write_text(str(os.getpid()))
    command = psutil.Process().parents()[GENERATION]
    os.kill(command.pid, signal.SIGINT)
    time.sleep(600)
"""

# The command in a process of its own. A shell's background jobs ignore SIGINT, and so would their children. What is
# kept out is a check of addresses that notebooks do not have, and takes seconds to import.
PROGRAM = [
    sys.executable,
    "-c",
    """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.modules["rfc3987_syntax"] = None
from medrobust_lib.cli import main
main()
""",
]


@pytest.fixture
def invoke(monkeypatch, capsys):
    """Call the console script's entry point with one line of words; returns exit code, standard output and error."""

    def call(line):
        monkeypatch.setattr(sys, "argv", ["medrobust", *line.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def places(tmp_path, monkeypatch, write_notebook):
    """A file, a folder, a full device, a study file, a notebook and a run, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks", "01_first", START, CARD)
    (tmp_path / "s.yaml").write_text(STUDY)
    Run("01", "Title", tmp_path / "runs" / "a", {"model": "demo-clip"}, started=time.monotonic()).save_card(
        metrics=[Metric("accuracy", 0.5, 8)], tables={}, model={"id": "demo-clip"}, dataset={"id": "phantom/blood"},
        prompts={},
    )  # fmt: skip
    return tmp_path


def one_line(error):
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert "Errno" not in error and ".part" not in error
    return error


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NO_FOLDER = "a file stands where a folder should be: move it away, or name another"
TOO_LONG = "file name too long; give a shorter name"
NO_FILE = "is a directory; name a file"
FULL = "the disk is full: full could not be written .* free some, or name a folder on another disk"


@pytest.mark.parametrize(
    ("line", "place", "helps"),
    [
        ("run 01 --notebooks notebooks --out file/x", "file/x", NO_FOLDER),
        ("run 01 --notebooks notebooks --out file", "file", "is a file; give a folder"),
        (f"run 01 --notebooks notebooks --out {LONG}", LONG, TOO_LONG),
        ("run 01 --notebooks notebooks -f folder", "folder", NO_FILE),
        ("run 01 --notebooks notebooks -f nothing", "nothing", "no such file or directory; check the name"),
        (f"run 01 --notebooks notebooks -f {LONG}", LONG, TOO_LONG),
        ("run 01 --notebooks file", "file", "pass --notebooks FOLDER"),
        ("study s.yaml --out file/x", "file/x", NO_FOLDER),
        ("study s.yaml --out file", "file", "a store needs a folder"),
        (f"study s.yaml --out {LONG}", LONG, TOO_LONG),
        ("study folder", "folder", "no study file at"),
        (f"study {LONG}", LONG, TOO_LONG),
        ("compare file runs", "file", NO_FOLDER),
        ("compare runs nothing", "nothing", "no result cards below"),
        (f"compare runs {LONG}", LONG, TOO_LONG),
        ("compare runs runs --csv folder", "folder", NO_FILE),
        ("leaderboard file", "file", NO_FOLDER),
        (f"leaderboard {LONG}", LONG, TOO_LONG),
        ("leaderboard runs --csv folder", "folder", NO_FILE),
        ("leaderboard runs --csv file/x.csv", "file", "file exists; move it away"),
        (f"leaderboard runs --csv {LONG}", LONG, TOO_LONG),
        ("leaderboard runs --csv full", "full", FULL),
        ("datasets --root file", "file", NO_FOLDER),
        ("datasets --root nothing", "nothing", "check the name"),
    ],
)
def test_places_that_do_not_fit_end_in_one_line(invoke, places, line, place, helps):
    before = sorted(path.name for path in places.iterdir())
    code, _, error = invoke(line)
    assert code == 1
    assert place in one_line(error)
    assert re.search(helps, error), error
    assert sorted(path.name for path in places.iterdir()) == before


@pytest.mark.parametrize(
    ("script", "arguments", "helps"),
    [
        ("download_medmnist", "blood --root file", NO_FOLDER),
        ("download_medmnist", f"blood --root {LONG}", TOO_LONG),
        ("show_phantoms", "blood --samples 1 --output full", FULL),
        ("make_medmnist_c", "phantom/chest --n 2 --image-size 28 --out file/x", NO_FOLDER),
        ("make_medmnist_c", f"phantom/chest --n 2 --image-size 28 --out {LONG}", TOO_LONG),
    ],
)
def test_scripts_say_the_same(places, script, arguments, helps):
    (path,) = (path for path in SCRIPTS if path.stem == script)
    done = CliRunner().invoke(load_script(path).app, arguments.split())
    assert done.exit_code == 1, done.output
    assert re.search(helps, one_line(done.stderr.splitlines(keepends=True)[-1])), done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_reports_errors_or_leaves_it_to_the_shared_command(path):
    source = path.read_text(encoding="utf-8")
    assert "with reported_errors():" in source or "run_command(" in source


# Notebooks


def test_a_notebook_without_room_says_so_in_one_line_and_keeps_what_there_is(invoke, places, write_notebook):
    write_notebook(places / "notebooks", "01_first", START, NO_ROOM_FOR_IT, FIGURE)
    code, out, error = invoke("run 01 --notebooks notebooks --out out")
    assert code == 1
    assert "01_first.ipynb failed in cell 4: " in one_line(error)
    figure, kept = places / "out/figures/01_noise.png", places / "out/notebooks/01_first.ipynb"
    assert f"{figure}: the disk is full: 01_noise.png could not be written and nothing of it was kept; " in error
    assert error.endswith(f"the notebook up to there: {kept}\n")
    assert kept.exists() and f"report of what was executed: {places / 'out/index.html'}" in out.replace("\n", "")


def test_other_errors_of_a_cell_keep_their_traceback(invoke, places, write_notebook):
    write_notebook(places / "notebooks", "01_first", "raise OSError('the model has no tokenizer')")
    code, _, error = invoke("run 01 --notebooks notebooks --out out")
    assert code == 1
    assert "failed in cell 2 with OSError: the model has no tokenizer\nthe cell:\n" in error


# Mounts


@pytest.fixture
def mounted(tmp_path):
    """Mount a small disk of its own; returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        return folder

    try:
        yield mount
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_fills_up_ends_in_one_line(invoke, places, mounted, write_notebook):
    disk = mounted("size=1500k")
    write_notebook(places / "notebooks", "01_first", START, FIGURE)
    write_notebook(places / "notebooks", "02_second", "print('x' * 3_000_000)")
    code, _, error = invoke(f"run 01 --notebooks notebooks --out {disk}/run")
    assert code == 1
    assert f"{disk}/run/figures/01_noise.png: the disk is full: " in one_line(error)
    assert list((disk / "run" / "figures").iterdir()) == []
    # The notebook itself does not fit.
    code, _, error = invoke(f"run 02 --notebooks notebooks --out {disk}/second")
    assert code == 1
    last = error.splitlines(keepends=True)[-1]
    assert f"{disk}/second/notebooks/02_second.ipynb: the disk is full: " in one_line(last)
    assert list((disk / "second" / "notebooks").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_keeps_a_study_and_the_same_command_goes_on(invoke, places, mounted):
    disk = mounted("size=400k")
    (disk / "ballast").write_bytes(bytes(380_000))
    code, _, error = invoke(f"study s.yaml --out {disk}/study")
    assert code == 1
    assert "the disk is full" in one_line(error.splitlines(keepends=True)[-1])
    (disk / "ballast").unlink()
    code, out, _ = invoke(f"study s.yaml --out {disk}/study")
    assert code == 0 and "1 of 1 cells are done" in out


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize(
    "line",
    [
        "run 01 --notebooks notebooks --out {}/run", "study s.yaml --out {}/study", "leaderboard runs --csv {}/x.csv",
        "compare runs runs --csv {}/x.csv",
    ],
)  # fmt: skip
def test_a_disk_that_is_read_only_ends_in_one_line(invoke, places, mounted, line):
    disk = mounted("size=100k", "ro")
    code, _, error = invoke(line.format(disk))
    assert code == 1
    assert f"error: {disk}/" in one_line(error)
    assert error.endswith(": read-only file system; name another place, in which you may write\n")


# Ctrl-C


def stopped_by_ctrl_c(places: Path, given: list[str], *, jobs: int) -> list[str]:
    """Run 01 and 02, which sends itself Ctrl-C; what the printed command that goes on says behind medrobust."""
    words = ["run", "01", "02", *given, "--notebooks", "notebooks", "--out", "out", "--jobs", str(jobs)]
    stopped = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, check=False, timeout=300)
    assert stopped.returncode == 130, stopped.stderr
    said, command = stopped.stderr.splitlines()
    out = places / "out"
    assert f"report of what was executed: {out / 'index.html'}\n" in stopped.stdout and (out / "index.html").exists()
    assert said.startswith(f"stopped; finished notebooks, with their results, are kept in {out}: ")
    kernel = int((places / "notebooks" / "kernel").read_text())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(kernel) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(kernel)
    first, *words = shlex.split(command)
    left = ["02"] if said.split(": ")[1].startswith("01. ") else ["01", "02"]
    assert [first, *words[: 1 + len(left)]] == ["medrobust", "run", *left]
    assert words[-6:] == ["--notebooks", "notebooks", "--out", str(out), "--jobs", str(jobs)]
    return words


def test_ctrl_c_says_what_is_kept_and_the_command_that_gives_the_rest_what_it_knows(places, write_notebook):
    write_notebook(places / "notebooks", "01_first", START, CARD)
    rest = 'model: str = "demo-clip"  # id\nprompts: dict[str, str] = {}  # texts\nn: int = 1  # draws\n'
    (places / "params.yaml").write_text("sigma: 0.5\nmodel: plip\nprompts: {A: is it a?, B: 'b: c'}\nn: 7\n")
    code = CTRL_C.replace("GENERATION", "0") + 'pathlib.Path("got").write_text(repr((model, prompts, n)))'
    write_notebook(places / "notebooks", "02_second", START.replace('"01"', '"02"'), CARD, code, parameters=rest)
    words = stopped_by_ctrl_c(places, ["-f", "params.yaml", "-p", "model=demo-clip", "-p", "fast=yes"], jobs=1)
    prompts = "prompts={A: 'is it a?', B: 'b: c'}"
    assert words[1:-6] == ["02", "-p", "model=demo-clip", "-p", prompts, "-p", "n=7"]
    cards = places / "out" / "cards"
    made = (cards / "01.json").stat().st_mtime_ns
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in cards.iterdir()) == ["01.json", "02.json"]
    assert (cards / "01.json").stat().st_mtime_ns == made
    got = (places / "notebooks" / "got").read_text()
    assert got == repr(("demo-clip", {"A": "is it a?", "B": "b: c"}, 7))


def test_ctrl_c_reaches_notebooks_that_run_side_by_side(places, write_notebook):
    write_notebook(places / "notebooks", "01_first", START, CARD)
    code = CTRL_C.replace("GENERATION", "1")  # a worker stands in between
    write_notebook(places / "notebooks", "02_second", START.replace('"01"', '"02"'), CARD, code)
    words = stopped_by_ctrl_c(places, ["-p", "model=demo-clip"], jobs=2)
    assert words[-8:-6] == ["-p", "model=demo-clip"]


def test_ctrl_c_in_a_study_says_that_the_same_command_goes_on(invoke, places, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("medrobust_lib.studies.execute.run_cell", stopped)
        code, out, _ = invoke("study s.yaml --out out")
    assert code == 130
    assert "study folder: out\n" in out
    assert re.search(r"study s: interrupted at 0 of 1 cells in .* s; the same call goes on from here\n", out)
    assert invoke("study s.yaml --out out")[0] == 0


def test_ctrl_c_in_a_script_is_told(places, monkeypatch):
    (path,) = (path for path in SCRIPTS if path.stem == "download_medmnist")
    script = load_script(path)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "download", stopped)
    done = CliRunner().invoke(script.app, ["blood", "--root", "folder"])
    assert done.exit_code == 130
    assert done.stderr == "stopped; what is whole is kept, and the same command makes what is missing\n"
