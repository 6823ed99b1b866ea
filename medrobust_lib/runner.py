"""Execute notebooks headlessly through papermill, strict about names and types of parameters."""

import contextlib
import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medrobust_lib.experiments import HEADLESS_VARIABLE, RUN_DIR_VARIABLE, project_root

KERNEL = "python3"
_SCALARS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


class ParameterError(ValueError):
    """A parameter that no selected notebook knows, or of the wrong type."""


class NotebookError(RuntimeError):
    """A notebook that failed; the message shows the failing cell and the end of its traceback."""


@dataclass(frozen=True)
class Executed:
    """One executed notebook: its number, output file and wall-clock seconds."""

    number: str
    path: Path
    seconds: float


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
            raise ValueError(f"unknown notebook {wanted!r}; there are {', '.join(known)}")
        chosen[key] = known[key]
    return chosen


def parse_parameters(assignments: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """Read ``name=value`` assignments (values are YAML) on top of a YAML file.

    Raises
    ------
    ParameterError
        An assignment without ``=``, a value that is no YAML, or a file that is no mapping.
    """
    parameters: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(Path(file).read_text())
        except yaml.YAMLError as error:
            raise ParameterError(f"{file} is no valid YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise ParameterError(f"{file} must hold a mapping of parameter names to values")
        parameters |= {str(name): value for name, value in loaded.items()}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ParameterError(f"-p {assignment}: write -p NAME=VALUE")
        try:
            parameters[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ParameterError(f"-p {assignment}: {value!r} is no valid YAML value ({error})") from error
    return parameters


def notebook_parameters(path: Path) -> dict[str, dict[str, Any]]:
    """Names, annotations, defaults and help of a notebook's parameters cell, as papermill reads them."""
    from papermill import inspect_notebook

    return inspect_notebook(str(path))


def assign_parameters(notebooks: Mapping[str, Path], parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give each notebook the parameters it knows; refuse a name that none of them knows.

    Raises
    ------
    ParameterError
        Unknown name (closest valid names first) or a value of the wrong type.
    """
    known = {number: notebook_parameters(path) for number, path in notebooks.items()}
    names = sorted({name for specification in known.values() for name in specification})
    for name in parameters:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=len(names), cutoff=0.5)
            ordered = [*close, *(other for other in names if other not in close)]
            raise ParameterError(
                f"unknown parameter {name!r} for notebook {', '.join(notebooks)}; valid: {', '.join(ordered)}"
            )
    assigned: dict[str, dict[str, Any]] = {}
    for number, specification in known.items():
        assigned[number] = {}
        for name, value in parameters.items():
            if name in specification:
                annotation = str(specification[name]["inferred_type_name"])
                assigned[number][name] = _checked(name, value, annotation)
    return assigned


def run_notebooks(
    notebooks: Mapping[str, Path],
    parameters: Mapping[str, Any],
    out: Path,
    *,
    announce: Callable[[str], None] = print,
) -> list[Executed]:
    """Execute notebooks one after the other into a run folder.

    Parameters
    ----------
    notebooks : mapping of number to path
    parameters : mapping
        Checked before anything is executed.
    out : Path
        Run folder; executed notebooks go to ``out/notebooks``.
    announce : callable
        Receives one line before and after each notebook.

    Raises
    ------
    ParameterError
        As `assign_parameters`.
    NotebookError
        A cell failed; the notebook so far is kept in ``out/notebooks``.
    """
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    assigned = assign_parameters(notebooks, parameters)
    check_kernel()
    out = Path(out).resolve()
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    executed = []
    for number, path in notebooks.items():
        announce(f"{path.stem} ...")
        target = out / "notebooks" / path.name
        started = time.monotonic()
        try:
            with _environment({RUN_DIR_VARIABLE: str(out), HEADLESS_VARIABLE: "1", "TQDM_DISABLE": "1"}):
                execute_notebook(
                    path,
                    target,
                    assigned[number],
                    kernel_name=KERNEL,
                    progress_bar=False,
                    cwd=path.parent,
                    config=_kernel_configuration(),
                )
        except PapermillExecutionError as error:
            raise NotebookError(_readable(error, path, target)) from error
        executed.append(Executed(number, target, time.monotonic() - started))
        announce(f"{path.stem} done in {executed[-1].seconds:.1f} s")
    return executed


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


def _kernel_configuration() -> Any:
    """Encrypt the talk with the kernel where the installed libraries can, instead of warning about it."""
    import zmq
    from traitlets.config import Config

    return Config({"KernelManager": {"transport_encryption": "auto" if zmq.has("curve") else "disabled"}})


def _checked(name: str, value: Any, annotation: str) -> Any:
    """Return the value if it fits the annotation of the parameters cell, else raise."""
    inner = re.fullmatch(r"list\[(\w+)\]", annotation)
    if inner:
        fits = isinstance(value, list) and all(_is_scalar(item, inner[1]) for item in value)
    else:
        fits = _is_scalar(value, annotation)
    if not fits:
        raise ParameterError(f"parameter {name}={value!r} is {type(value).__name__}, the notebook wants {annotation}")
    return value


def _is_scalar(value: Any, kind: str) -> bool:
    if kind not in _SCALARS:
        return True
    # bool is an int in Python, but `n_images=true` is a mistake.
    return isinstance(value, _SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool))


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _readable(error: Any, source: Path, target: Path) -> str:
    """The failing cell, its error and where the half-executed notebook lies."""
    traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback or []))
    cell = "\n".join(f"    {line}" for line in str(error.source).strip().splitlines())
    return (
        f"{source.name} failed in cell {error.exec_count} with {error.ename}: {error.evalue}\n"
        f"the cell:\n{cell}\n"
        f"end of its traceback:\n" + "\n".join(traceback.splitlines()[-12:]) + f"\n"
        f"the notebook up to there: {target}"
    )
