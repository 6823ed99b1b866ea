"""What a study will do: its cells, and what they cost before any of them runs."""

import contextlib
import hashlib
import io
import re
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medrobust_lib import metrics
from medrobust_lib.corruptions.suites import SEVERITIES, find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.evaluation import CLEAN, Candidate, accuracy_table, corruption_answers
from medrobust_lib.experiments import Metric, Run
from medrobust_lib.experiments.report import write_report
from medrobust_lib.files import named_when_full, told
from medrobust_lib.metrics.classification import share_interval
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.loading import load_model
from medrobust_lib.runner import find_notebooks, run_notebooks
from medrobust_lib.smoothing.certificate import GUARANTEES
from medrobust_lib.smoothing.study import certify_dataset
from medrobust_lib.studies.study_file import BenchmarkStep, CertifyStep, NotebookStep, Study, notebook_assignments

_LONGEST_PART = 32
_PROBE_SECONDS = 1.0
_PROBE_DRAWS = 10  # the fewest that a certificate at alpha 0.001 takes
# Bytes, about: a row of certificates in the journal and in two tables, an answer, and a cell's other files.
_CERTIFICATE_BYTES, _ANSWER_BYTES, _CELL_BYTES = 1_100, 60, 16_000


@dataclass(frozen=True)
class Cell:
    """One piece of a study: it runs on its own, is finished or not, and has a folder and a result card.

    Attributes
    ----------
    name : str
        Names the folder; unique in the study.
    number : int
        Of its step in the file, from 1.
    kind : {"certify", "benchmark", "notebook"}
    model, dataset : str
        Ids; empty for a notebook that has no such parameter.
    seed : int or None
    parameters : dict
        Everything else that shapes its results, as JSON values; of a notebook the parameters that it is given.
    notebook : str
        Number of the notebook.
    """

    name: str
    number: int
    kind: str
    model: str
    dataset: str
    seed: int | None
    parameters: dict[str, Any] = field(repr=False)
    notebook: str = ""

    @property
    def label(self) -> str:
        """What a person reads in tables."""
        what = f"notebook {self.notebook}" if self.notebook else self.kind
        sigma = f"sigma {self.parameters['sigma']:g}" if self.kind == "certify" else ""
        seed = "" if self.seed is None else f"seed {self.seed}"
        return ", ".join(filter(None, (f"{self.number} {what}", self.model, self.dataset, sigma, seed)))


@dataclass(frozen=True)
class Estimate:
    """What a cell costs; None where nobody knows.

    Attributes
    ----------
    images : int or None
    draws : int or None
        Encodings of noisy or corrupted images, at most.
    seconds : float or None
        In one process of this machine.
    size : int or None
        Bytes on disk.
    """

    images: int | None
    draws: int | None
    seconds: float | None
    size: int | None


def plan_cells(study: Study, *, notebooks: Path | None = None) -> list[Cell]:
    """Cells of a study, in the order of its file.

    Parameters
    ----------
    study : Study
    notebooks : Path, optional
        Folder of the notebooks; default: the project's.
    """
    cells = []
    for number, step in enumerate(study.steps, start=1):
        if isinstance(step, NotebookStep):
            for chosen, given in notebook_assignments(study, step, notebooks=notebooks):
                cells.append(_cell(number, "notebook", chosen, given, notebook=step.notebook))
            continue
        for model in study.models:
            for dataset in study.datasets:
                for seed in study.seeds:
                    chosen = {"model": model, "dataset": dataset, "seed": seed}
                    shared = {"n_images": study.n_images, "dtype": study.dtype}
                    for own in _settings(study, step):
                        cells.append(_cell(number, step.kind, chosen, shared | own))
    return cells


def estimate_cells(study: Study, cells: Sequence[Cell], *, earlier: Path | None = None) -> list[Estimate]:
    """Price the cells by a short probe of each model on this machine; nothing is written.

    Parameters
    ----------
    study : Study
    cells : sequence of Cell
        From `plan_cells`.
    earlier : Path, optional
        Folder of earlier runs, whose cards tell what notebooks took; default: none.

    Returns
    -------
    list of Estimate
        The seconds of certify cells are those of all draws; sequential sampling stops earlier.
    """
    sizes = {dataset: _images(dataset, study.n_images) for dataset in {cell.dataset for cell in cells if _is_own(cell)}}
    rates: dict[str, float] = {}
    for cell in cells:
        if _is_own(cell) and cell.model not in rates:
            rates[cell.model] = encodings_per_second(cell.model, cell.dataset, dtype=study.dtype)
    corrupting: dict[tuple[str, str], float] = {}
    taken = _seconds_of_notebooks(earlier)
    estimates = []
    for cell in cells:
        if cell.kind == "certify":
            images = sizes[cell.dataset]
            draws = images * most_draws(cell)
            size = _CELL_BYTES + 2 * images * _CERTIFICATE_BYTES
            estimates.append(Estimate(images, draws, draws / rates[cell.model], size))
        elif cell.kind == "benchmark":
            images = sizes[cell.dataset]
            suite = find_suite(cell.parameters["suite"])
            draws = images * (1 + len(suite.names(cell.dataset)) * len(cell.parameters["severities"]))
            key = (cell.dataset, suite.id)
            if key not in corrupting:
                corrupting[key] = _seconds_to_corrupt(*key)
            seconds = draws / rates[cell.model] + (draws - images) * corrupting[key]
            estimates.append(Estimate(images, draws, seconds, _CELL_BYTES + draws * _ANSWER_BYTES))
        else:
            seconds = taken.get((cell.notebook.zfill(2), cell.model)) or None
            estimates.append(Estimate(cell.parameters.get("n_images"), None, seconds, None))
    return estimates


def most_draws(cell: Cell) -> int:
    """Draws of one image of a certify cell, selection draws included; sequential sampling stops earlier."""
    return (cell.parameters["n0"] if cell.parameters["mode"] == "predict" else 0) + cell.parameters["n"]


def unanimous_draws(cell: Cell) -> float:
    """Expected draws of an image whose noisy copies all get the same answer, in sequential sampling."""
    from medrobust_lib.smoothing.sequential import operating_characteristics, sequential_plan

    p = cell.parameters
    plan = sequential_plan(sigma=p["sigma"], radii=p["radii"], n=p["n"], alpha=p["alpha"])
    return operating_characteristics(plan, 1.0)[1] + most_draws(cell) - p["n"]


def encodings_per_second(model_id: str, dataset: str, *, dtype: str = "auto") -> float:
    """Noisy copies that pass through a model in a second, noise and votes included: about a second's probe.

    Parameters
    ----------
    model_id, dataset : str
        The data set gives the image and the texts.
    dtype : str
        As in `load_model`.
    """
    from medrobust_lib.models.loading import load_model

    return measured_rate(load_model(model_id, dtype=dtype), _probed(dataset))


def measured_rate(
    model: Any, data: Any, *, seconds: float = _PROBE_SECONDS, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Draws of `certify_dataset` in a second, with a loaded model: the noisy-feature bank of one image.

    Parameters
    ----------
    model : DualEncoder
    data : ImageDataset
    seconds : float
        Length of the probe.
    clock : callable
        ``time.process_time`` counts this process's seconds on the CPU, whatever else the machine does.
    """
    from medrobust_lib.smoothing.methods import zero_shot_methods
    from medrobust_lib.smoothing.study import certify_dataset

    methods = zero_shot_methods(model, data)[:1]
    draws, rate = _PROBE_DRAWS, 0.0
    for _ in range(3):
        with contextlib.redirect_stdout(io.StringIO()):
            started = clock()
            certify_dataset(
                model, data.subset([0]), methods, sigmas=[0.25], n0=1, n=draws, sampling="fixed", radii=None
            )
            spent = clock() - started
        rate = (draws + 1) / spent
        # The first calls of a network are slow, and a few draws fill no batch.
        if spent >= seconds / 2:
            break
        draws = max(_PROBE_DRAWS, int(rate * seconds))
    return rate


def _is_own(cell: Cell) -> bool:
    return cell.kind != "notebook"


def _settings(study: Study, step: CertifyStep | BenchmarkStep) -> list[dict[str, Any]]:
    """Settings of each cell of a step on one model, data set and seed, as JSON values."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(step).items()}
    if isinstance(step, CertifyStep):
        del values["sigmas"]
        return [{"sigma": sigma, **values} for sigma in step.sigmas]
    return [values]


def _cell(number: int, kind: str, chosen: Mapping[str, Any], parameters: dict[str, Any], *, notebook: str = "") -> Cell:
    model, dataset, seed = chosen["model"] or "", chosen["dataset"] or "", chosen["seed"]
    parts = [f"{number:02d}-{'notebook-' + notebook if notebook else kind}", short_id(model), short_id(dataset)]
    if kind == "certify":
        parts.append(f"sigma{parameters['sigma']:g}")
    if seed is not None:
        parts.append(f"seed{seed}")
    return Cell("_".join(filter(None, parts)), number, kind, model, dataset, seed, parameters, notebook)


def short_id(id: str) -> str:
    """An id as part of a folder's name; one that had to be shortened stays unique by a piece of its hash."""
    text = re.sub(r"[^A-Za-z0-9.-]+", "-", id).strip("-.")
    if len(text) <= _LONGEST_PART and not id.partition(":")[2]:
        return text
    return f"{text[-_LONGEST_PART:].strip('-.')}-{hashlib.sha256(id.encode()).hexdigest()[:6]}"


def _images(dataset: str, n_images: int | None) -> int:
    from medrobust_lib.data.registry import open_split

    return n_images or len(open_split(dataset).labels)


def _probed(dataset: str) -> ImageDataset:
    from medrobust_lib.data.registry import load_dataset, open_split

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # so few images do not speak for the set
        return load_dataset(dataset, n=len(open_split(dataset).classes))


def _seconds_to_corrupt(dataset: str, suite: str) -> float:
    """Seconds a corrupted image takes, the mean over the corruptions of a suite at their middle severity."""
    from medrobust_lib.corruptions.suites import corrupted

    data = _probed(dataset).subset([0])
    names = find_suite(suite).names(dataset)
    started = time.perf_counter()
    for name in names:
        corrupted(data, name, severity=3, suite=suite)
    return (time.perf_counter() - started) / len(names)


def _seconds_of_notebooks(runs: Path | None) -> dict[tuple[str, str], float]:
    """Median seconds of each notebook and model, from the cards of earlier runs."""
    from medrobust_lib.experiments import read_cards

    taken: dict[tuple[str, str], list[float]] = {}
    try:
        cards = read_cards(runs) if runs is not None else []
    except FileNotFoundError:
        return {}
    for card in cards:
        taken.setdefault((card["notebook"], card["parameters"].get("model", "")), []).append(card["seconds"])
    return {key: statistics.median(seconds) for key, seconds in taken.items()}


CERTIFICATES, ANSWERS = "certificates", "answers"  # ends of the names of the tables with one row an image
LOG = "log.txt"


@dataclass(frozen=True)
class Site:
    """Where cells work.

    Attributes
    ----------
    folder : Path
        Of the study; every worker must see it under this path.
    notebooks : Path or None
        Folder of the notebooks; None: the project's.
    """

    folder: Path
    notebooks: Path | None = None

    def cell_folder(self, cell: Cell) -> Path:
        """Run folder of a cell."""
        return self.folder / "cells" / cell.name


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: seconds, and the reason where it failed."""

    seconds: float
    error: str = ""


def run_cell(site: Site, cell: Cell) -> Outcome:
    """Run one cell in its folder; what fails is told, not raised, so that other cells go on.

    What the cell prints goes to ``log.txt`` in its folder.
    """
    folder = site.cell_folder(cell)
    started = time.perf_counter()
    try:
        with _log(folder):
            if cell.kind == "certify":
                _certify(cell, folder)
            elif cell.kind == "benchmark":
                _benchmark(cell, folder)
            else:
                # The notebook's own card; its parameters were checked when the study was read.
                found = find_notebooks([cell.notebook], folder=site.notebooks)
                run_notebooks(found, cell.parameters, folder)
            write_report(folder)
    except Exception as error:
        of_the_system = isinstance(error, OSError) and error.errno is not None
        reason = told(error) if of_the_system else f"{type(error).__name__}: {error}"
        return Outcome(time.perf_counter() - started, reason)
    return Outcome(time.perf_counter() - started)


def _certify(cell: Cell, folder: Path) -> None:
    run, model, data = _begin(cell, folder, title=f"Certificates of {cell.model} on {cell.dataset}")
    p = cell.parameters
    rows = certify_dataset(
        model,
        data,
        sigmas=[p["sigma"]],
        **{name: p[name] for name in ("n0", "n", "alpha", "sampling", "mode", "radii")},
        seed=cell.seed or 0,
        store=folder / "store",
    ).drop(columns="seconds")  # a table must not depend on the clock
    shares = metrics.certified_accuracy(rows, radii=p["radii"])
    summary = metrics.certification_summary(rows)
    numbers = []
    for r in summary.itertuples():
        of = f"{r.method} ({r.guarantee}), sigma={r.sigma:g}"
        numbers.append(Metric("smoothed_accuracy", r.smoothed_accuracy, r.n, r.low, r.high, of=of))
        numbers.append(Metric("average_certified_radius", r.average_certified_radius, r.n, of=of))
        numbers.append(Metric("abstain_rate", r.abstain_rate, r.n, of=of))
    for r in shares[shares["radius"] > 0].itertuples():
        of = f"{r.method} ({r.guarantee}), sigma={r.sigma:g}, radius={r.radius:g}"
        of += f" (the draws reach {r.radius_reach:.4g})" if np.isnan(r.certified_accuracy) else ""
        numbers.append(Metric("certified_accuracy", r.certified_accuracy, r.n, r.low, r.high, of=of))
    notes = [f"Guarantee {name}: {GUARANTEES[name]}" for name in rows["guarantee"].unique()]
    if p["mode"] == "evaluate":
        notes.append("The known label was tested (mode evaluate): for tables only, no prediction was certified.")
    run.save_card(
        metrics=numbers,
        tables={f"{run.number}_{CERTIFICATES}": rows, f"{run.number}_certified_accuracy": shares},
        prompts={"templates": list(data.templates), "classes": list(data.classes)},
        **_described(model, data, notes),
    )


def _benchmark(cell: Cell, folder: Path) -> None:
    run, model, data = _begin(cell, folder, title=f"{cell.model} on corrupted images of {cell.dataset}")
    p = cell.parameters
    features = model.class_features(data.classes, data.templates[:1])
    answers = corruption_answers(
        {cell.model: Candidate(model, features)},
        data,
        suite=p["suite"],
        severities=p["severities"],
        seed=cell.seed or 0,
    )
    rows = pd.concat(
        pd.DataFrame(
            {
                "dataset": data.id,
                "model": name,
                "corruption": corruption,
                "severity": severity,
                "image": data.indices,
                "label": data.labels,
                "predicted": answer,
                "seed": cell.seed,
            }
        )
        for (name, corruption, severity), answer in answers.items()
    )
    table = accuracy_table(answers, data)
    run.save_card(
        metrics=benchmark_metrics(rows, table, suite=p["suite"]),
        tables={f"{run.number}_{ANSWERS}": rows, f"{run.number}_accuracy": table},
        prompts={"template": data.templates[0], "classes": list(data.classes)},
        **_described(model, data, [f"Suite {p['suite']}; severities are conventions."]),
    )


def benchmark_metrics(rows: pd.DataFrame, table: pd.DataFrame, *, suite: str) -> list[Metric]:
    """Numbers of one model's answers to clean and corrupted images; those of a corruption are means over severities.

    Parameters
    ----------
    rows : DataFrame
        One row per image, corruption and severity: corruption, severity, image, label, predicted.
    table : DataFrame
        From `medrobust_lib.evaluation.accuracy_table`.
    suite : str
        Named in every number, with the severities unless they are all.
    """
    clean = table[table["corruption"] == CLEAN].iloc[0]
    n = int(clean["n"])
    numbers = [
        Metric("accuracy", float(clean["accuracy"]), n, float(clean["low"]), float(clean["high"]), of=CLEAN),
        Metric("balanced_accuracy", float(clean["balanced_accuracy"]), n, of=CLEAN),
        Metric("majority_share", float(clean["majority_share"]), n, of=CLEAN),
    ]
    shares = correct_shares(rows)
    averaged = averaged_over(suite, rows["severity"])
    for corruption in shares.columns.drop(CLEAN):
        values = shares[corruption]
        of = f"{corruption}, {averaged}"
        numbers.append(Metric("accuracy", float(values.mean()), n, *share_interval(values), of=of))
    corrupted = shares.drop(columns=CLEAN).mean(axis="columns")
    numbers.append(Metric("average_accuracy", float(corrupted.mean()), n, *share_interval(corrupted), of=averaged))
    return numbers


def averaged_over(suite: str, severities: Iterable[int]) -> str:
    """What a mean over severities was taken over: the suite, with its severities unless they are all."""
    chosen = sorted(set(severities) - {0})
    return suite if chosen == list(SEVERITIES) else f"{suite} at {'+'.join(map(str, chosen))}"


def correct_shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of severities at which each image is classified correctly: a row an image, a column a corruption."""
    correct = rows.assign(correct=(rows["predicted"] == rows["label"]).astype(float))
    shares = correct.pivot_table(index="image", columns="corruption", values="correct", aggfunc="mean", sort=False)
    return shares[list(dict.fromkeys(rows["corruption"]))].sort_index()


def _begin(cell: Cell, folder: Path, *, title: str) -> tuple[Run, DualEncoder, ImageDataset]:
    p = cell.parameters
    run = Run(
        number=f"{cell.number:02d}-{cell.kind}",
        title=title,
        folder=folder,
        parameters={"step": cell.kind, "model": cell.model, "dataset": cell.dataset, "seed": cell.seed, **p},
        started=time.monotonic(),
    )
    data = load_dataset(cell.dataset, n=p["n_images"], seed=cell.seed or 0)
    return run, load_model(cell.model, dtype=p["dtype"]), data


def _described(model: DualEncoder, data: ImageDataset, notes: list[str]) -> dict[str, Any]:
    """Model, data set and notes of a card."""
    notes = [*data.caveats, *notes]
    if data.synthetic:
        notes = ["The images are synthetic phantoms: nobody's images.", *notes]
    return {
        "model": {"id": model.id, "dtype": str(model.dtype), "image_size": model.image_size},
        "dataset": {
            "id": data.id,
            "split": data.split,
            "n": len(data),
            "synthetic": data.synthetic,
            "wording": data.provenance["wording"],
        },
        "notes": notes,
    }


def answers_matrix(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Whether answers are right: bool [C, S, n] on corrupted and bool [n] on clean images, images in order."""
    correct = rows.assign(correct=rows["predicted"] == rows["label"]).sort_values("image", kind="stable")
    clean = correct[correct["corruption"] == CLEAN]["correct"].to_numpy()
    corruptions = list(dict.fromkeys(rows["corruption"][rows["corruption"] != CLEAN]))
    severities = sorted(set(rows["severity"][rows["corruption"] != CLEAN]))
    cells = correct.set_index(["corruption", "severity"])["correct"]
    return np.stack([[cells.loc[(c, s)].to_numpy() for s in severities] for c in corruptions]), clean


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[None]:
    """Send what is printed, and the traceback of an error, to the log of a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOG
    full = named_when_full(path, "the cell's words were lost")
    with full, path.open("w", encoding="utf-8", buffering=1) as log, contextlib.redirect_stdout(log):
        try:
            yield
        except Exception:
            with contextlib.suppress(OSError):  # a disk that takes no traceback: the error itself is told
                traceback.print_exc(file=log)
            raise
