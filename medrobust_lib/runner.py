"""Execute notebooks headlessly through papermill; `medrobust_lib.parameters` checks what they are given."""

import ast
import contextlib
import errno
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import zmq
from joblib import cpu_count
from jupyter_client import AsyncKernelManager
from traitlets.config import Config

from medrobust_lib.experiments import map_items, read_cards
from medrobust_lib.experiments.cards import HEADLESS_VARIABLE, RUN_DIR_VARIABLE
from medrobust_lib.experiments.store import read_parameters
from medrobust_lib.files import named_when_full, told
from medrobust_lib.parameters import assign_parameters
from medrobust_lib.places import default_runs_dir, project_root

_Notebook = tuple[str, Path]  # its number and file
_MARK = ".medrobust-run"  # a file that tells a run's folder from other folders before there are results
_SECONDS_BETWEEN_LINES = 30.0  # about a notebook's cells, where no terminal shows one line in place
_SAME_LINE = "\r\x1b[K"  # back to its beginning, and empty it
_Place = tuple[Path, dict[str, dict[str, Any]], dict[str, str]]  # run folder, parameters by number, variables
KERNEL = "python3"
THREADS_VARIABLE = "OMP_NUM_THREADS"
CORES_VARIABLE = "LOKY_MAX_CPU_COUNT"  # of joblib: how many cores a notebook may think there are
# An error of the system as Python writes it: number, words, and the last of its paths.
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_REFUSED = re.compile(rf"\[Errno (\d{{1,4}})\] (.*?)(?:: (?:.* -> )?({_QUOTED}))?", re.DOTALL)


class NotebookError(RuntimeError):
    """A notebook that failed; the message shows the failing cell and the end of its traceback.

    Attributes
    ----------
    run_dir : Path
        The run's folder, with the notebook up to the failing cell.
    """

    def __init__(self, message: str, run_dir: Path) -> None:
        super().__init__(message, run_dir)  # both, for the way back from a worker process
        self.run_dir = run_dir

    def __str__(self) -> str:
        return self.args[0]


class RunStopped(KeyboardInterrupt):
    """Ctrl-C during a run; the message says what is kept.

    Attributes
    ----------
    run_dir : Path
        The run's folder.
    left : tuple of str
        Numbers of the notebooks that have not reached their end.
    """

    def __init__(self, message: str, run_dir: Path, left: Sequence[str]) -> None:
        super().__init__(message, run_dir, left)  # all of them, for the way back from a worker process
        self.run_dir = run_dir
        self.left = tuple(left)

    def __str__(self) -> str:
        return self.args[0]


class Executed(NamedTuple):
    """One executed notebook: its number, output file and wall-clock seconds."""

    number: str
    path: Path
    seconds: float

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.path.parents[1]


class AskingKernelManager(AsyncKernelManager):
    """Stops a kernel by asking it to stop, without the interrupt that the base class sends before.

    A kernel's last reply arrives while it is still busy finishing that request. The interrupt sometimes
    hits it there and is logged as an error, although every cell has succeeded. A kernel that does not
    follow the request is still terminated, as in the base class.
    """

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        """Stop the kernel process; ``now`` kills it at once."""
        if now or not self.owns_kernel:
            await super().shutdown_kernel(now=now, restart=restart)
            return
        self.shutting_down = True
        self.stop_restarter()
        await self.request_shutdown(restart=restart)
        await self.finish_shutdown(restart=restart)
        await self.cleanup_resources(restart=restart)


def find_notebooks(numbers: Sequence[str] = (), *, folder: Path | None = None) -> dict[str, Path]:
    """Locate notebooks by number.

    Parameters
    ----------
    numbers : sequence of str
        ``"01"``, ``"1"`` or a file's name; empty for all.
    folder : Path, optional
        Where the notebooks lie; default ``notebooks/`` of the project.

    Returns
    -------
    dict of number to path, in order

    Raises
    ------
    FileNotFoundError
        The folder holds no notebooks.
    ValueError
        Unknown number; the message lists what exists.
    """
    folder = folder or project_root() / "notebooks"
    known = {path.name.split("_")[0]: path for path in sorted(folder.glob("[0-9]*_*.ipynb"))}
    if not known:
        raise FileNotFoundError(f"no notebooks in {folder}; run from a checkout or pass --notebooks FOLDER")
    chosen = {}
    for wanted in numbers or known:
        key = Path(wanted).stem.split("_")[0]
        key = key.zfill(2) if key.isdigit() else key
        if key not in known:
            # A shell takes the value of -p apart at its spaces, and what follows them stands in a notebook's place.
            hint = "" if wanted.isalnum() else ". Quotes keep a value with spaces together: -p 'NAME=VALUE'"
            raise ValueError(f"unknown notebook {wanted!r}; there are {', '.join(known)}{hint}")
        chosen[key] = known[key]
    return chosen


def run_notebooks(
    notebooks: Mapping[str, Path],
    parameters: Mapping[str, Any],
    out: Path | None = None,
    *,
    announce: Callable[[str], None] = print,
    report: Callable[[Path, Sequence[str]], None] = lambda _folder, _left: None,
    jobs: int = 1,
) -> list[Executed]:
    """Execute notebooks into a run folder, one after the other or several at a time.

    Parameters
    ----------
    notebooks : mapping of number to path
    parameters : mapping
        Checked before anything is executed or written.
    out : Path, optional
        Run folder; executed notebooks go to ``out/notebooks``. What these notebooks left there before is
        removed first. Default: a new folder, named by date and time, below ``runs``.
    announce : callable
        Receives a line with the folder, and one before and after each notebook; with several jobs one after
        each, as they finish.
    report : callable
        Receives the folder and the numbers that are left, after each notebook that has reached its end.
    jobs : int
        Notebooks at a time, each in a process of its own; -1 for one per core. Unless ``OMP_NUM_THREADS`` and
        ``LOKY_MAX_CPU_COUNT`` are set, their kernels share the cores out, threads as well as worker processes.

    Returns
    -------
    list of Executed
        In the order of ``notebooks``.

    Raises
    ------
    ParameterError, ValueError, FileNotFoundError
        As `assign_parameters`, an ``out`` that cannot be a run folder, or jobs neither -1 nor >= 1.
    NotebookError
        A cell failed, or the notebook could not be written; what there is of it is kept in ``out/notebooks``. One
        job stops there; of several the other notebooks are finished first, and the message holds every failure.
    RunStopped
        Ctrl-C; finished notebooks and their results are kept.
    """
    if jobs != -1 and jobs < 1:
        raise ValueError(f"jobs={jobs}; give the number of notebooks at a time, or -1 for one per core")
    assigned = assign_parameters(notebooks, parameters)
    check_kernel()
    out = new_run_dir() if out is None else _cleared(check_run_dir(out), notebooks)
    (mark_run_dir(out) / "notebooks").mkdir(exist_ok=True)
    announce(f"run folder: {out}")
    announce("Ctrl-C stops; finished notebooks are kept")
    jobs = min(cpu_count() if jobs == -1 else jobs, len(notebooks))
    tasks = list(notebooks.items())
    if jobs > 1:
        announce(f"{len(tasks)} notebooks, {jobs} at a time: {', '.join(path.stem for _, path in tasks)} ...")
        each = str(max(1, cpu_count() // jobs))
        share = {name: os.environ.get(name) or each for name in (THREADS_VARIABLE, CORES_VARIABLE)}
        results = map_items(_executed, tasks, context=(out, assigned, share), jobs=jobs)
    else:
        results = _one_by_one((out, assigned, {}), tasks, announce)
    executed: dict[int, Executed] = {}
    failures: dict[int, str] = {}
    try:
        with contextlib.closing(results):  # no worker writes any more when this is left
            for position, result in results:
                name = tasks[position][1].stem
                if isinstance(result, Executed):
                    executed[position] = result
                    announce(f"{name} done in {result.seconds:.1f} s")
                else:
                    failures[position] = str(result)
                    if jobs == 1:
                        break
                    announce(f"{name} FAILED; the other notebooks go on")
                report(out, [number for place, (number, _) in enumerate(tasks) if place not in executed | failures])
    except KeyboardInterrupt as error:
        left = [number for position, (number, _) in enumerate(tasks) if position not in executed]
        for number in left:
            _remove_half(out / "notebooks" / notebooks[number].name)
        done = ", ".join(one.number for one in executed.values()) or "none"
        message = f"finished notebooks, with their results, are kept in {out}: {done}"
        raise RunStopped(message, out, left) from error
    if failures:
        raise NotebookError("\n\n".join(failures[position] for position in sorted(failures)), out)
    return [executed[position] for position in sorted(executed)]


def _one_by_one(place: _Place, notebooks: Sequence[_Notebook], announce: Callable[[str], None]) -> Iterator[Any]:
    for position, (number, path) in enumerate(notebooks):
        announce(f"{path.stem} ...")
        yield position, _executed(place, (number, path))


def _executed(place: _Place, notebook: _Notebook) -> Executed | NotebookError:
    """Execute one notebook, in a worker process where there are several."""
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    (out, assigned, threads), (number, path) = place, notebook
    target = out / "notebooks" / path.name
    variables = {RUN_DIR_VARIABLE: str(out), HEADLESS_VARIABLE: "1", "TQDM_DISABLE": "1", **threads}
    # Encrypt the talk with the kernel where the installed libraries can, instead of warning about it.
    encryption = "auto" if zmq.has("curve") else "disabled"
    started = time.monotonic()
    try:
        kept = named_when_full(target, f"{target.name} could not be written and nothing of it was kept")
        # Several at a time would write into the same line.
        telling = _cells_told(path, assigned[number], in_place=not threads and sys.stdout.isatty())
        with environment_variables(variables), kept, telling as tell:
            execute_notebook(
                path,
                target,
                assigned[number],
                kernel_name=KERNEL,
                progress_bar=False,
                cwd=path.parent,
                config=Config({"KernelManager": {"transport_encryption": encryption}}),
                kernel_manager_class=AskingKernelManager,
                on_cell_start=tell,
            )
    except PapermillExecutionError as error:
        return NotebookError(_readable(error, path, target), out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _remove_half(target)
        return NotebookError(f"{path.name} failed: {told(error)}", out)
    return Executed(number, target, time.monotonic() - started)


@contextlib.contextmanager
def _cells_told(notebook: Path, parameters: Mapping[str, Any], *, in_place: bool) -> Iterator[Callable[..., None]]:
    """Give a hook for the engine that says which cell begins: in the same place, or a line now and then."""
    # papermill adds a cell for what is given.
    cells = len(json.loads(notebook.read_text(encoding="utf-8"))["cells"]) + bool(parameters)
    said = time.monotonic()

    def tell(*, cell_index: int, **_: Any) -> None:
        nonlocal said
        if in_place or time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            line = f"{notebook.stem} cell {cell_index + 1} of {cells}"
            print(f"{_SAME_LINE}{line}" if in_place else line, end="" if in_place else "\n", flush=True)

    try:
        yield tell
    finally:
        print(_SAME_LINE if in_place else "", end="", flush=True)


def _remove_half(notebook: Path) -> None:
    """Remove what is half written and no notebook, on which the report would stumble: papermill writes in place."""
    with contextlib.suppress(OSError):
        try:
            json.loads(notebook.read_text(encoding="utf-8"))
        except ValueError:
            notebook.unlink()


def new_run_dir() -> Path:
    """Create an empty run folder below ``runs``, named by the present date and time."""
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in itertools.count(1):
        folder = default_runs_dir() / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        # Several runs may start in the same second; only one of them can create the folder.
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("unreachable")


def check_kernel() -> None:
    """Make sure that the notebook kernel runs in this very environment.

    Raises
    ------
    RuntimeError
        The kernel is missing or belongs to another Python.
    """
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        interpreter = KernelSpecManager().get_kernel_spec(KERNEL).argv[0]
    except NoSuchKernel as error:
        raise RuntimeError("no Jupyter kernel 'python3'; install ipykernel into this environment") from error
    # A bare name is replaced by this interpreter when the kernel starts.
    if Path(interpreter).is_absolute() and Path(interpreter).absolute() != Path(sys.executable).absolute():
        raise RuntimeError(
            f"the Jupyter kernel 'python3' runs {interpreter}, not {sys.executable}; "
            f"fix it with `{sys.executable} -m ipykernel install --sys-prefix`"
        )


def check_run_dir(out: Path) -> Path:
    """The folder as an absolute path; refuse a file, and a folder of other things than a run."""
    out = Path(out).expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder, or none for a new one below {default_runs_dir()}")
    held = sorted(path.name for path in out.iterdir() if path.name[0] != ".") if out.exists() else []
    if held and not ((out / _MARK).is_file() or read_parameters(out / "store") or _holds_cards(out)):
        named = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise ValueError(f"--out {out} holds other things than a run ({named}); give a new folder or that of a run")
    return out


def mark_run_dir(out: Path) -> Path:
    """Make the folder, and mark it as that of a run: what is interrupted may go on in it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    return out


def _holds_cards(out: Path) -> bool:
    try:
        return bool(read_cards(out, nested=False))
    except (OSError, ValueError):
        return False


def _cleared(out: Path, notebooks: Mapping[str, Path]) -> Path:
    """Remove what earlier runs of these notebooks left in a folder, and the page that shows it."""
    for path in notebooks.values():
        if (out / "notebooks" / path.name).resolve() == path.resolve():
            raise ValueError(f"--out {out} would overwrite the notebook {path}; give another folder")
    stale = [out / "index.html", out / "images.html"]
    for number, path in notebooks.items():
        stale += [out / "cards" / f"{number}.json", out / "html" / f"{path.stem}.html", out / "notebooks" / path.name]
        stale += [*(out / "cards").glob(f"{number}_*.csv"), *(out / "figures").glob(f"{number}_*.png")]
        stale += (out / "images" / number).glob("*.png")
    for file in stale:
        file.unlink(missing_ok=True)
    return out


@contextlib.contextmanager
def environment_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; processes started meanwhile inherit them."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def _readable(error: Any, source: Path, target: Path) -> str:
    """The failing cell, its error and where the half-executed notebook lies; one line for an error of the system."""
    kept = f"the notebook up to there: {target}"
    if refused := _REFUSED.fullmatch(error.evalue):
        place = ast.literal_eval(refused[3]) if refused[3] else None
        reason = told(OSError(int(refused[1]), refused[2], place))
        return f"{source.name} failed in cell {error.exec_count}: {reason}; {kept}"
    traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback or []))
    cell = [f"    {line}" for line in str(error.source).strip().splitlines()]
    head = f"{source.name} failed in cell {error.exec_count} with {error.ename}: {error.evalue}"
    end = traceback.splitlines()[-12:]
    return "\n".join([head, "the cell:", *cell, "end of its traceback:", *end, kept])
