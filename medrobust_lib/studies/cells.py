"""The work of one cell: certificates, a benchmark or a notebook, written as a run folder with a result card."""

import contextlib
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medrobust_lib import metrics
from medrobust_lib.corruptions.suites import SEVERITIES
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.evaluation import CLEAN, Candidate, accuracy_table, corruption_answers
from medrobust_lib.experiments import Metric, Run
from medrobust_lib.files import named_when_full, told
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.registry import load_model
from medrobust_lib.report import write_report
from medrobust_lib.runner import find_notebooks, run_notebooks
from medrobust_lib.smoothing.certificate import GUARANTEES
from medrobust_lib.smoothing.study import certify_dataset
from medrobust_lib.studies.intervals import share_interval
from medrobust_lib.studies.plan import Cell

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
