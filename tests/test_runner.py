import itertools
import os
import sys

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from medrobust_lib import runner
from medrobust_lib.experiments.cards import HEADLESS_VARIABLE, RUN_DIR_VARIABLE
from medrobust_lib.experiments.report import write_report


@pytest.fixture
def notebooks(tmp_path, write_notebook):
    write_notebook(tmp_path, "01_first")
    write_notebook(tmp_path, "02_second", parameters="model: str = 'demo-clip'  # id\nn_votes: int = 3  # votes\n")
    return runner.find_notebooks(folder=tmp_path)


def test_notebooks_are_found_by_number_with_or_without_zero(notebooks, tmp_path):
    assert list(notebooks) == ["01", "02"]
    for wanted in ("2", "02", "02_second", "notebooks/02_second.ipynb"):
        assert list(runner.find_notebooks([wanted], folder=tmp_path)) == ["02"]


def test_unknown_notebook_and_empty_folder_are_named(notebooks, tmp_path):
    with pytest.raises(ValueError, match="unknown notebook '7'; there are 01, 02"):
        runner.find_notebooks(["7"], folder=tmp_path)
    with pytest.raises(ValueError, match=r"unknown notebook '0.25\]'; there are 01, 02. Quotes keep a value"):
        runner.find_notebooks(["01", "0.25]"], folder=tmp_path)  # -p sigmas=[0.1, 0.25] without quotes
    with pytest.raises(FileNotFoundError, match="no notebooks in .*pass --notebooks FOLDER"):
        runner.find_notebooks(folder=tmp_path / "empty")


def test_run_executes_with_parameters_environment_and_this_interpreter(tmp_path, write_notebook):
    code = f"""
import os, sys
print(model, n_images, os.environ["{HEADLESS_VARIABLE}"], os.environ["{RUN_DIR_VARIABLE}"], sys.executable)
"""
    write_notebook(tmp_path, "01_first", code)
    lines = []
    executed = runner.run_notebooks(
        runner.find_notebooks(folder=tmp_path), {"n_images": 7}, tmp_path / "out", announce=lines.append
    )
    output = nbformat.read(executed[0].path, as_version=4).cells[-1].outputs[0].text.split()
    assert output == ["demo-clip", "7", "1", str(tmp_path / "out"), sys.executable]
    folder, how_to_stop, *_ = lines
    assert (folder, how_to_stop) == (f"run folder: {tmp_path / 'out'}", "Ctrl-C stops; finished notebooks are kept")
    assert lines[2] == "01_first ..."
    assert lines[3].startswith("01_first done in ")
    assert executed[0].seconds > 0
    assert executed[0].run_dir == tmp_path / "out"
    assert HEADLESS_VARIABLE not in os.environ


@pytest.mark.parametrize("jobs", [1, 2])
def test_after_each_notebook_the_report_can_be_written(tmp_path, write_notebook, jobs):
    for name in ("01_first", "02_second", "03_third"):
        write_notebook(tmp_path, name, "pass")
    seen = []
    found, out = runner.find_notebooks(folder=tmp_path), tmp_path / "out"
    runner.run_notebooks(found, {}, out, announce=lambda _: None, report=lambda *call: seen.append(call), jobs=jobs)
    assert [folder for folder, _ in seen] == [out] * 3
    assert [len(left) for _, left in seen] == [2, 1, 0]
    assert all(set(later) < set(left) for (_, left), (_, later) in itertools.pairwise(seen))


def test_failure_shows_the_cell_and_keeps_the_notebook(tmp_path, write_notebook):
    write_notebook(tmp_path, "01_first", "before = 1", "divided = before / 0")
    with pytest.raises(runner.NotebookError) as caught:
        runner.run_notebooks(runner.find_notebooks(folder=tmp_path), {}, tmp_path / "out", announce=lambda _: None)
    message = str(caught.value)
    assert "01_first.ipynb failed in cell 3 with ZeroDivisionError: division by zero" in message
    assert "    divided = before / 0" in message
    assert "\x1b" not in message
    assert (tmp_path / "out" / "notebooks" / "01_first.ipynb").exists()


@pytest.mark.parametrize(
    ("evalue", "reason"),
    [
        ("[Errno 30] Read-only file system: '/a'", "/a: read-only file system; name another place"),
        (f"[Errno 13] Permission denied: {chr(34)}/it's{chr(34)}", "/it's: permission denied; change its permissions"),
        ("[Errno 21] Is a directory: '/a.part' -> '/a\\\\b'", "/a\\b: is a directory; name a file"),
        ("[Errno 28] No space left on device", "no space left on device; free some"),
        ("[Errno 2] neither: 'a' nor 'b'", "neither: 'a' nor 'b'"),
        ("[Errno 2] words of its own: 'a'", "a: words of its own"),
        ("no number", None),
        ("[Errno 99999999999999999999] x", None),
        ("", None),
    ],
)
def test_an_error_of_the_system_in_a_cell_is_one_line(notebooks, tmp_path, monkeypatch, evalue, reason):
    def fail(*_, **__):
        raise PapermillExecutionError(2, 2, "run()", "OSError", evalue, ["Traceback", "the end"])

    monkeypatch.setattr("papermill.execute_notebook", fail)
    with pytest.raises(runner.NotebookError) as caught:
        runner.run_notebooks({"01": notebooks["01"]}, {}, tmp_path / "out", announce=lambda _: None)
    message = str(caught.value)
    assert message.endswith(f"the notebook up to there: {tmp_path / 'out' / 'notebooks' / '01_first.ipynb'}")
    if reason is None:
        assert f"01_first.ipynb failed in cell 2 with OSError: {evalue}\nthe cell:\n    run()\n" in message
    else:
        assert message.startswith(f"01_first.ipynb failed in cell 2: {reason}") and "\n" not in message


def test_ctrl_c_while_a_notebook_is_written_leaves_no_half_of_it(tmp_path, write_notebook, monkeypatch):
    for name in ("01_x", "02_x"):
        write_notebook(tmp_path, name)

    def killed_at_the_second(source, target, *_, **__):
        target.write_bytes(source.read_bytes())
        if target.name == "02_x.ipynb":
            target.write_bytes(source.read_bytes()[:200])
            raise KeyboardInterrupt

    monkeypatch.setattr("papermill.execute_notebook", killed_at_the_second)
    out = tmp_path / "out"
    with pytest.raises(runner.RunStopped) as stopped:
        runner.run_notebooks(runner.find_notebooks(folder=tmp_path), {}, out, announce=lambda line: None)
    assert stopped.value.left == ("02",)
    assert [path.name for path in (out / "notebooks").iterdir()] == ["01_x.ipynb"]
    assert "01_x.html" in write_report(out).read_text(encoding="utf-8")


def test_ctrl_c_survives_the_way_back_from_a_worker(tmp_path):
    import cloudpickle

    stopped = cloudpickle.loads(cloudpickle.dumps(runner.RunStopped("what is kept", tmp_path, ["02"])))
    assert (str(stopped), stopped.run_dir, stopped.left) == ("what is kept", tmp_path, ("02",))


def test_notebooks_run_side_by_side_and_share_the_cores(tmp_path, write_notebook, monkeypatch):
    import joblib

    # Each waits for the other: one after the other they would never end.
    code = """
import os, pathlib, time
here = pathlib.Path(os.environ["MEDROBUST_RUN_DIR"])
(here / number).touch()
while not (here / other).exists():
    time.sleep(0.01)
print(os.environ["OMP_NUM_THREADS"], os.environ["LOKY_MAX_CPU_COUNT"], os.getppid())
"""
    for number, other in (("01", "02"), ("02", "01")):
        write_notebook(tmp_path, f"{number}_x", f"number, other = {number!r}, {other!r}", code)
    for name in ("OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT"):
        monkeypatch.delenv(name, raising=False)
    found = runner.find_notebooks(folder=tmp_path)
    lines = []
    executed = runner.run_notebooks(found, {}, tmp_path / "out", announce=lines.append, jobs=2)
    assert [one.number for one in executed] == ["01", "02"]
    printed = [nbformat.read(one.path, as_version=4).cells[-1].outputs[0].text.split() for one in executed]
    each = str(max(1, joblib.cpu_count() // 2))
    assert {(threads, workers) for threads, workers, _ in printed} == {(each, each)}
    assert len({parent for *_, parent in printed} | {str(os.getpid())}) == 3
    assert lines[2] == "2 notebooks, 2 at a time: 01_x, 02_x ..."
    assert sorted(line.partition(" in ")[0] for line in lines[3:]) == ["01_x done", "02_x done"]


def test_the_number_of_threads_that_the_user_sets_reaches_the_kernels(tmp_path, write_notebook, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for name in ("01_first", "02_second"):
        write_notebook(tmp_path, name, "import os; print(os.environ['OMP_NUM_THREADS'])")
    executed = runner.run_notebooks(
        runner.find_notebooks(folder=tmp_path), {}, tmp_path / "out", announce=lambda _: None, jobs=2
    )
    printed = [nbformat.read(one.path, as_version=4).cells[-1].outputs[0].text.strip() for one in executed]
    assert printed == ["7", "7"]


def test_of_several_notebooks_a_failing_one_does_not_stop_the_others(tmp_path, write_notebook):
    write_notebook(tmp_path, "01_first", "divided = 1 / 0")
    write_notebook(tmp_path, "02_second", "print('reached')")
    write_notebook(tmp_path, "03_third", "[][1]")
    lines, reports = [], []
    with pytest.raises(runner.NotebookError) as caught:
        runner.run_notebooks(
            runner.find_notebooks(folder=tmp_path), {}, tmp_path / "out", announce=lines.append, jobs=2,
            report=lambda folder, left: reports.append(left),
        )  # fmt: skip
    assert sorted(map(len, reports)) == [0, 1, 2]  # a failed one is not still to come
    assert caught.value.run_dir == tmp_path / "out"
    message = str(caught.value)
    assert message.index("01_first.ipynb failed in cell 2 with ZeroDivisionError") < message.index(
        "03_third.ipynb failed in cell 2 with IndexError"
    )
    second = nbformat.read(tmp_path / "out" / "notebooks" / "02_second.ipynb", as_version=4)
    assert second.cells[-1].outputs[0].text == "reached\n"
    assert "01_first FAILED; the other notebooks go on" in lines


def test_jobs_are_checked_before_anything_is_written(notebooks, tmp_path):
    with pytest.raises(ValueError, match="jobs=0; give the number of notebooks at a time, or -1 for one per core"):
        runner.run_notebooks(notebooks, {}, tmp_path / "out", jobs=0)
    assert not (tmp_path / "out").exists()


def test_a_notebook_error_survives_the_way_back_from_a_worker(tmp_path):
    import cloudpickle

    error = cloudpickle.loads(cloudpickle.dumps(runner.NotebookError("what happened", tmp_path)))
    assert (str(error), error.run_dir) == ("what happened", tmp_path)


def test_a_kernel_that_is_still_busy_with_its_last_reply_is_not_interrupted(tmp_path, capfd, write_notebook):
    # The window that a plain shutdown sometimes hits, made a second wide.
    code = """
import inspect, time
handlers = get_ipython().kernel.shell_handlers
original = handlers["kernel_info_request"]
async def slow(*arguments):
    result = original(*arguments)
    if inspect.isawaitable(result):
        await result
    time.sleep(1)
handlers["kernel_info_request"] = slow
"""
    write_notebook(tmp_path, "01_first", code)
    runner.run_notebooks(runner.find_notebooks(folder=tmp_path), {}, tmp_path / "out", announce=lambda _: None)
    assert "KeyboardInterrupt" not in capfd.readouterr().err


def test_a_run_into_an_old_folder_replaces_its_own_results_and_nothing_else(notebooks, tmp_path, monkeypatch):
    out = tmp_path / "out"
    old = ("cards/01.json", "cards/01_accuracy.csv", "figures/01_x.png", "html/01_first.html", "index.html")
    kept = (
        "cards/02.json",
        "cards/02_noise.csv",
        "figures/02_x.png",
        "notebooks/02_second.ipynb",
        "rows/01.csv",
        "x.txt",
    )
    for name in (*old, *kept, "notebooks/01_first.ipynb"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    runner.mark_run_dir(out)
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: None)
    runner.run_notebooks({"01": notebooks["01"]}, {}, out, announce=lambda _: None)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("[!.]*.*")) == sorted(kept)


def test_new_run_folders_never_coincide(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "default_runs_dir", lambda: tmp_path / "runs")
    folders = {runner.new_run_dir() for _ in range(3)}
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {tmp_path / "runs"}


def test_an_unusable_run_folder_is_refused(notebooks, tmp_path):
    source = tmp_path / "notebooks" / "01_first.ipynb"
    source.parent.mkdir()
    source.write_text(notebooks["01"].read_text())
    runner.mark_run_dir(tmp_path)
    with pytest.raises(ValueError, match="would overwrite the notebook .*01_first.ipynb; give another folder"):
        runner.run_notebooks({"01": source}, {}, tmp_path, announce=lambda _: None)
    assert source.exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give a folder, or none for a new one below"):
        runner.run_notebooks(notebooks, {}, tmp_path / "file", announce=lambda _: None)


def test_kernel_of_another_python_is_refused(monkeypatch):
    class Foreign:
        def get_kernel_spec(self, _):
            return type("Spec", (), {"argv": ["/elsewhere/python"]})

    runner.check_kernel()
    monkeypatch.setattr("jupyter_client.kernelspec.KernelSpecManager", Foreign)
    with pytest.raises(RuntimeError, match="runs /elsewhere/python, not .*ipykernel install --sys-prefix"):
        runner.check_kernel()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_says_which_cell_it_is_at(tmp_path, write_notebook, monkeypatch, capsys, terminal):
    monkeypatch.setattr(runner, "_SECONDS_BETWEEN_LINES", -1.0)
    path = write_notebook(tmp_path, "01_first", "pass", "pass")
    for parameters, cells in (({}, 3), ({"n_images": 1}, 4)):  # papermill adds a cell for what is given
        with runner._cells_told(path, parameters, in_place=terminal) as tell:
            tell(cell=None, cell_index=1)
        line = f"01_first cell 2 of {cells}"
        assert capsys.readouterr().out == (f"\r\x1b[K{line}\r\x1b[K" if terminal else f"{line}\n")


def test_elsewhere_than_on_a_terminal_a_line_about_cells_comes_now_and_then_only(tmp_path, write_notebook, capsys):
    write_notebook(tmp_path, "01_first", "pass", "pass")
    runner.run_notebooks(runner.find_notebooks(folder=tmp_path), {}, tmp_path / "out", announce=lambda _: None)
    assert "cell" not in capsys.readouterr().out


def test_a_folder_of_other_things_is_refused_and_left_alone(notebooks, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    for name in ("a.doc", "b.doc", "c.doc", "index.html"):
        (out / name).write_text("years of work")
    with pytest.raises(ValueError, match=r"other things than a run \(a.doc, b.doc, c.doc, ...\); give a new folder"):
        runner.run_notebooks(notebooks, {}, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys(
        ("a.doc", "b.doc", "c.doc", "index.html"), "years of work"
    )
    for name in ("notebooks", "cards", "store"):
        (out / name).mkdir()
    (out / "cards" / "01.json").write_text('{"suit": "hearts"}')
    (out / "log.txt").touch()
    with pytest.raises(ValueError, match="other things than a run"):
        runner.check_run_dir(out)
    (tmp_path / "empty").mkdir()
    assert runner.check_run_dir(tmp_path / "empty") == tmp_path / "empty"
