"""Runs and their result cards: what was asked, what came out, and in which environment; and the source behind it."""

import ast
import hashlib
import inspect
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medrobust_lib.experiments import images as single_images
from medrobust_lib.files import parsed, read_json_object, whole_file
from medrobust_lib.places import DEVICE_VARIABLE, default_runs_dir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARD_FORMAT = 2
_READ_FORMATS = (1, CARD_FORMAT)  # metrics of the first had no settings
_PARTS = {
    "notebook": str, "title": str, "parameters": dict, "parameters_hash": str, "model": dict, "dataset": dict,
    "metrics": list, "tables": list, "environment": dict, "git": dict, "created": str,
}  # fmt: skip
_LATER = {"question": "", "findings": [], "images": ""}  # a card written before them lacks them
_METRIC_PARTS = {
    "name": str, "of": str, "n": int | float, "value": int | float | None, "low": int | float | None,
    "high": int | float | None, "settings": dict,
}  # fmt: skip
# Settings of a metric that tell competitors apart. Every other setting tells what was measured.
COMPETITOR = ("method", "variant")
_AGAIN = "Delete it and run the notebook again."
# In the text of JSON: from a root to the last separator of a path, of Unix, of Windows or percent-encoded. What a value
# or an option of an id begins with may have blanks in its parts; inside a sentence they end a path with slashes.
_PLACE = re.compile(
    r"""(?ix)
    ((?:"|[?&][\w-]+=)(?:[\w.+-]{2,}(?::|%3A))*)
    (?:(?:(?<=file:)|(?<!:))//+|~?(?:/|%2F)|[a-z](?::|%3A)(?:/|\\\\|%2F|%5C)|(?:\\\\){2}[\w.$-]+\\\\)(?!\s)
    (?:(?:(?!&\w+=|:[\s/\\]|%2F|%5C)[^/"?\\])+(?:/|\\\\|%2F|%5C))*(?!%2F|%5C|[/"?\\\s])
    | (?:(?<=file:)//+|(?<![\w./%)<])~?(?:/|%2F))(?:(?:(?!%2F)[^/"?:;,\\\s])+(?:/|%2F))*(?=[\w.~-])
    | (?<![\w\\])(?:[a-z]:(?:\\\\|/)|(?:\\\\){2}[\w.$-]+\\\\)(?:[^/"?:;,\\]+\\\\|[^/"?:;,\\\s]+/)*(?=[^/"?\\\s])
    """
)
RUN_DIR_VARIABLE = "MEDROBUST_RUN_DIR"
HEADLESS_VARIABLE = "MEDROBUST_HEADLESS"
BY_HAND = "by-hand"  # the run of notebooks that a person executes
CAPTION_KEY = "Description"  # the PNG specification's keyword for a caption
_RECORDED_PACKAGES = ("medrobust-lib", "torch", "open_clip_torch", "transformers", "peft", "numpy", "scipy")
_RECORDED_EXTRAS = ("onnxruntime",)  # computes image towers in int8


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes
    ----------
    name : str
        Snake-case name, for example ``balanced_accuracy``.
    value : float
        Fractions lie in [0, 1]. NaN, with low and high, where the draws of a certificate cannot reach what was
        asked: kept as null, shown as a dash.
    n : int
        Number of images (or cases) behind the value.
    low, high : float or None
        Two-sided 95 % interval, where one was computed.
    of : str
        What it was measured on in words, if the card holds several (for example ``sigma=0.25``).
    model, dataset : str
        Their ids, where they are not the card's own.
    settings : mapping
        The same as names and JSON values, by which the rows behind the number are found in the card's tables.
    """

    name: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    of: str = ""
    model: str = ""
    dataset: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One execution of one notebook. Create it with `start_run`.

    Attributes
    ----------
    number : str
        The notebook's number, for example ``"01"``.
    title : str
    folder : Path
        The run's folder; cards, tables and figures go below it.
    parameters : dict
        Resolved parameters, JSON values only.
    started : float
        Seconds of the monotonic clock.
    left_out : list of str
        What `leave_out` was told, for the card.
    image_tables : list of str
        Name of what `save_images` kept, for the card.
    """

    number: str
    title: str
    folder: Path
    parameters: dict[str, Any]
    started: float = field(repr=False)
    left_out: list[str] = field(default_factory=list, repr=False)
    image_tables: list[str] = field(default_factory=list, repr=False)

    @property
    def parameters_hash(self) -> str:
        """What tells these parameters from others; see `parameters_hash`."""
        return parameters_hash(without_folders(self.parameters))

    def save_figure(self, figure: "Figure", name: str, *, caption: str = "") -> Path:
        """Write a figure to ``figures/<number>_<name>.png``.

        Parameters
        ----------
        figure : matplotlib.figure.Figure
        name : str
            Part of the file's name; ``headline`` comes first in the report.
        caption : str
            What the report writes below it; kept in the file itself.

        Returns
        -------
        Path
            The PNG.
        """
        path = self.folder / "figures" / f"{self.number}_{name}.png"
        described = {CAPTION_KEY: caption} if caption else {}
        with whole_file(path) as partial:
            figure.savefig(partial, format="png", dpi=150, bbox_inches="tight", metadata=described)
        return path

    def leave_out(self, part: str, reason: str) -> None:
        """Say in one line that a part of the notebook does not run here and why; the card's notes say it too.

        Parameters
        ----------
        part : str
            For example ``"learned prompts"``.
        reason : str
            What is missing, and what would mend it.
        """
        self.left_out.append(f"Left out: {part}: {reason}")
        print(self.left_out[-1])

    def save_images(
        self, table: pd.DataFrame, images: Sequence[NDArray[np.uint8]] | None = None, *, thumbnails: bool = True
    ) -> Path:
        """Keep a table of single images, and small pictures of those that need a look first, for the report.

        To be called before `save_card`; a second call replaces the first.

        Parameters
        ----------
        table : DataFrame
            One row per image, as `data.image_table` and `certify_dataset` give it: file, label, class_name, predicted
            (-1: abstain), predicted_name, and patient, confidence, radius and guarantee where known.
        images : uint8 [n, H, W, 3] or sequence of uint8 [H, W, 3], optional
            The image of each row of the table, in its order.
        thumbnails : bool
            False leaves the pictures out, as ``medrobust run --no-thumbnails`` does.

        Returns
        -------
        Path
            The table, ``cards/<number>_images.csv``; the pictures lie in ``images/<number>/``.

        Raises
        ------
        ValueError
            As `check_image_table`: nothing is written.
        """
        unwanted = not thumbnails or os.environ.get(single_images.NO_THUMBNAILS_VARIABLE)
        single_images.check_image_table(table, images)
        single_images.write_thumbnails(self.folder / "images" / self.number, table, None if unwanted else images)
        self.image_tables[:] = [f"{self.number}_images"]
        path = self.folder / "cards" / f"{self.number}_images.csv"
        write_text_atomically(path, table.to_csv(index=False))
        return path

    def save_card(
        self,
        *,
        metrics: Sequence[Metric],
        tables: Mapping[str, pd.DataFrame],
        model: Mapping[str, Any],
        dataset: Mapping[str, Any],
        prompts: Mapping[str, Any],
        notes: Sequence[str] = (),
        question: str = "",
        findings: Sequence[str] = (),
    ) -> Path:
        """Write ``cards/<number>.json`` and each table as ``cards/<name>.csv`` beside it.

        Parameters
        ----------
        metrics : sequence of Metric
        tables : mapping of name to tidy DataFrame
            One observation a row.
        model, dataset, prompts : mapping
            What was used; JSON values only.
        notes : sequence of str
            What a reader must know beside the numbers, for example that the data are synthetic. What was left out
            follows them.
        question : str
            What the notebook asks, in a sentence.
        findings : sequence of str
            What this run answers, in two sentences computed from its numbers.

        Returns
        -------
        Path
            The card.

        Raises
        ------
        TypeError
            The question is no text, or the findings are no sequence of texts.
        """
        _check_parts({"question": question, "findings": findings}, {"question": str, "findings": list | tuple})
        card = {
            "format": CARD_FORMAT,
            "notebook": self.number,
            "title": self.title,
            "question": question,
            "findings": list(findings),
            "parameters": self.parameters,
            "parameters_hash": self.parameters_hash,
            "model": dict(model),
            "dataset": dict(dataset),
            "prompts": dict(prompts),
            "metrics": [_record(metric) for metric in metrics],
            "tables": sorted(tables),
            "images": "".join(self.image_tables),
            "notes": [*notes, *self.left_out],
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_memory_mb": peak_memory_mb(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "git": git_state(),
        }
        card = without_folders(card)
        for name, table in tables.items():
            write_text_atomically(self.folder / "cards" / f"{name}.csv", table.to_csv(index=False))
        path = self.folder / "cards" / f"{self.number}.json"
        write_text_atomically(path, json.dumps(card, indent=2, allow_nan=False) + "\n")
        return path


def without_folders(value: Any) -> Any:
    """A JSON value in which of every absolute path the last part is left: folders may tell a person or a machine.

    Of a path with blanks, commas or colons inside a sentence some folders may stay.
    """
    return json.loads(_PLACE.sub(r"\1", json.dumps(value, ensure_ascii=False)))


def parameters_hash(parameters: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of a card's parameters."""
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]


def start_run(number: str, title: str, **parameters: Any) -> Run:
    """Begin a run: start its clock, fix its folder and print its parameters.

    The folder comes from the runner through the environment; by hand it is ``runs/by-hand`` below
    the project.

    Parameters
    ----------
    number, title : str
        The notebook's number and title.
    **parameters
        The notebook's resolved parameters; JSON values.

    Raises
    ------
    TypeError
        A parameter is no JSON value.
    """
    json.dumps(parameters)
    folder = Path(os.environ.get(RUN_DIR_VARIABLE) or default_runs_dir() / BY_HAND)
    run = Run(number, title, folder, parameters, started=time.monotonic())
    for name, value in parameters.items():
        print(f"{name:<12} {value}")
    return run


def read_cards(runs_dir: Path, *, nested: bool = True) -> list[dict[str, Any]]:
    """Read every result card below a folder, each with its run's name under ``"run"``.

    Parameters
    ----------
    runs_dir : Path
    nested : bool
        False for one run's own cards, without those of runs inside its folder.

    Raises
    ------
    FileNotFoundError
        There is no card below the folder.
    OSError
        It is no folder, or it or one below it cannot be read.
    ValueError
        A card is damaged or of an unknown format; the message names the file.
    """

    def refused(error: OSError) -> None:
        raise error

    # A file, or a folder that cannot be read, is not one without cards; `glob` would pass over it.
    if Path(runs_dir).exists():
        for _ in os.walk(runs_dir, onerror=refused):
            if not nested:
                break
    paths = sorted(Path(runs_dir).glob(f"{'**/' if nested else ''}cards/[0-9]*.json"))
    cards = [{**read_card(path), "run": path.parent.parent.name} for path in paths]
    if not cards:
        raise FileNotFoundError(f"no result cards below {runs_dir}; `medrobust run 01` writes one")
    return cards


def read_card(path: Path) -> dict[str, Any]:
    """Read one result card; errors are those of `read_cards`."""
    card = read_json_object(path, "a result card", _AGAIN)
    if card.get("format") not in _READ_FORMATS:
        raise ValueError(f"{path} has card format {card.get('format')}, this version reads 1 to {CARD_FORMAT}")
    with parsed(f"{path} is a damaged result card", _AGAIN):
        card = _LATER | card
        _check_parts(card, _PARTS | {name: type(value) for name, value in _LATER.items()})
        for metric in card["metrics"]:
            where = f"metric {metric.get('name')!r}: "
            _check_parts({"settings": {}, **metric}, _METRIC_PARTS, where=where)
            named = dict.fromkeys(COMPETITOR, "") | metric.get("settings", {})
            _check_parts(named, dict.fromkeys(COMPETITOR, str), where=where)
    return card


def _record(metric: Metric) -> dict[str, Any]:
    """A metric as a card keeps it: beyond the reach of the draws there is no number at all."""
    record = asdict(metric)
    if all(record[name] is not None and math.isnan(record[name]) for name in ("value", "low", "high")):
        record |= dict.fromkeys(("value", "low", "high"))
    return record


def _check_parts(record: Mapping[str, Any], parts: Mapping[str, Any], *, where: str = "") -> None:
    """Raise an error where a card or a metric lacks something that a leaderboard or a report counts on."""
    for name, kind in parts.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"{where}{name!r} is {record[name]!r}, a {type(record[name]).__name__}")


def is_headless() -> bool:
    """Whether a runner (not a person in JupyterLab) executes the notebook."""
    return bool(os.environ.get(HEADLESS_VARIABLE))


def environment() -> dict[str, str]:
    """Versions of Python, the operating system and the packages that shape numbers, and the device that models use."""
    versions = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    versions["device"] = os.environ.get(DEVICE_VARIABLE) or _accelerator() or "cpu"
    names = (*_RECORDED_PACKAGES, *filter(find_spec, _RECORDED_EXTRAS))
    return versions | {name: metadata.version(name) for name in names}


def _accelerator() -> str:
    import torch  # deferred: cards are also read, which needs none

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else ""


def git_state() -> dict[str, Any]:
    """Commit of the project and whether its tracked files were changed; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (FileNotFoundError, subprocess.SubprocessError):  # no git, no checkout, or a disk too slow to wait for
        return {}
    commit = told[0].removeprefix("# branch.oid ")
    return {} if commit == "(initial)" else {"commit": commit, "changed": any(line[0] != "#" for line in told)}


def peak_memory_mb() -> float | None:
    """Largest resident memory of this process so far, in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if platform.system() == "Darwin" else 1e3), 1)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees either the old or the whole new content."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


class Source(str):
    """Python code that a notebook displays in colours, and as it is where there are none."""

    __repr__ = str.__str__

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"


def show_source(function: Callable[..., Any]) -> Source:
    """Source of a function or class without its docstring and decorators; comments stay.

    Parameters
    ----------
    function : callable
        Of this library, for example `medrobust_lib.smoothing.certify.take_votes`.

    Returns
    -------
    Source
        A string; as the last line of a cell it is displayed as code.
    """
    lines = dedent(inspect.getsource(inspect.unwrap(function))).splitlines()
    (node,) = ast.parse("\n".join(lines)).body
    hidden = set(range(1, node.lineno))  # decorators stand above
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        hidden |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return Source("\n".join(line for number, line in enumerate(lines, start=1) if number not in hidden))
