"""The step ``benchmark``: zero-shot answers to clean and corrupted images, made on the spot or read from a folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medrobust_lib.corruptions.stored import read_corrupted
from medrobust_lib.corruptions.suites import SEVERITIES, check_severity, corrupted, find_suite
from medrobust_lib.data.dataset import ImageDataset, balanced_positions, stratified_positions
from medrobust_lib.evaluation import CLEAN, Candidate, accuracy_table, corruption_probabilities
from medrobust_lib.experiments import Metric
from medrobust_lib.metrics.classification import share_interval
from medrobust_lib.plots.figures import legend_beside, plot_severity_curves
from medrobust_lib.studies.steps import (
    ALONE,
    CELL_BYTES,
    Cell,
    Estimate,
    Grid,
    Prices,
    Step,
    StudyError,
    Workers,
    described,
    places,
    seconds_for,
)

ANSWERS = "answers"  # end of the name of the table with one row an image
_ANSWER_BYTES = 60  # of a row, about


@dataclass(frozen=True, kw_only=True)
class BenchmarkStep(Step):
    """Zero-shot answers to the corruptions of a suite, and errors relative to a reference model.

    Attributes
    ----------
    suite : str
        "medimeta-c", "medmnist-c" or "clinical-c".
    severities : tuple of int
        Of 1 to 5.
    reference : str
        Model whose errors are 100; default: the first of the step.
    folder : str
        Of corrupted images that were written or released, as for `read_corrupted`: all of a set's images are taken
        from it, the clean ones too. Default: they are made on the spot.
    """

    kind: ClassVar[str] = "benchmark"

    suite: str = "medimeta-c"
    severities: tuple[int, ...] = SEVERITIES
    reference: str = ""
    folder: str = ""

    def __post_init__(self) -> None:
        if self.folder:  # workers have other working folders
            object.__setattr__(self, "folder", str(Path(self.folder).expanduser().absolute()))

    def check(self, grid: Grid, notebooks: Path | None) -> None:
        """Raise a ValueError for what is unknown, and for a folder that lacks a set."""
        suite = find_suite(self.suite)
        if not self.severities or 0 in map(check_severity, self.severities):
            raise StudyError(f"severities={list(self.severities)}: choose from 1, 2, 3, 4, 5")
        if self.reference and self.reference not in grid.models:
            raise StudyError(f"reference={self.reference!r} is none of the step's models: {', '.join(grid.models)}")
        for dataset in grid.datasets:
            names = suite.names(dataset)
            for name in names if self.folder else ():  # one file each: whatever else is wrong is told by its cell
                read_corrupted(self.folder, dataset, name, severity=self.severities[0])

    def cells(self, number: int, grid: Grid, notebooks: Path | None) -> list[Cell]:
        """One for each model, data set and seed."""
        return [BenchmarkCell(number, self, *place, {**grid.shared, **self.settings()}) for place in places(grid)]


class BenchmarkCell(Cell):
    """Answers of one model to the corruptions of a suite."""

    def estimate(self, prices: Prices) -> Estimate:
        """Price of corrupting and encoding."""
        images, suite = prices.images(self.dataset), find_suite(self.step.suite)
        if images is None:
            return Estimate(None, None, None, None)
        draws = images * (1 + len(suite.names(self.dataset)) * len(self.step.severities))
        seconds = seconds_for(draws, prices.rate(self.base))
        if seconds is not None and not self.step.folder:
            seconds += (draws - images) * prices.corrupting(self.dataset, suite.id)
        return Estimate(images, draws, seconds, CELL_BYTES + draws * _ANSWER_BYTES)

    def run(self, study: Path, *, notebooks: Path | None = None, workers: Workers = ALONE) -> None:
        """Classify every image, clean and corrupted."""
        run, model = self.begin(study, f"{self.model} on corrupted images of {self.shown}"), self.encoder(study)
        suite, seed, folder = self.step.suite, self.seed or 0, self.step.folder
        data = self._stored(CLEAN, severity=0) if folder else self.images()
        make = partial(self._read, data) if folder else partial(corrupted, suite=suite, seed=seed)
        found = corruption_probabilities(
            {self.model: Candidate(model, self.class_features(model, data, study))},
            data, suite=suite, severities=self.step.severities, make=make,
        )  # fmt: skip
        answers, tables = {}, []
        for (name, corruption, severity), probabilities in found:
            answer = answers[name, corruption, severity] = probabilities.argmax(1)
            about = {"model": name, "corruption": corruption, "severity": severity, "seed": self.seed}
            tables.append(data.image_table(answer, probabilities.max(1)).assign(**about))
        rows = pd.concat(tables)
        table = accuracy_table(answers, data)
        worse, clean = table[table["corruption"] != CLEAN], table[table["corruption"] == CLEAN]
        lines = pd.concat([clean.assign(corruption=name) for name in worse["corruption"].unique()] + [worse])
        figure = Figure()
        plot_severity_curves(lines, axes := figure.subplots(), by="corruption", chance=1 / len(data.classes))
        legend_beside(axes)
        run.save_figure(figure, "headline", caption=f"Accuracy over severity: {self.label}")
        numbers = _benchmark_metrics(rows, table, suite=suite)
        tables = {f"{run.number}_{ANSWERS}": rows, f"{run.number}_accuracy": table}
        prompts = {"template": data.templates[0], "classes": list(data.classes)}
        notes = [
            f"Suite {suite}; severities are conventions.",
            *([f"Images read from {folder}; verified: {data.provenance['verified']}."] if folder else []),
        ]
        run.save_card(metrics=numbers, tables=tables, prompts=prompts, **described(model, data, notes, name=self.model))

    def _stored(self, corruption: str, *, severity: int) -> ImageDataset:
        """A set of the folder, as many of its images as the study asks for."""
        found = read_corrupted(self.step.folder, self.dataset, corruption, severity=severity)
        n, draw = self.parameters["n_images"], self.parameters["draw"]
        positions = balanced_positions if draw == "balanced" else stratified_positions
        return found.subset(positions(found.labels, n=n, seed=self.seed or 0))

    def _read(self, clean: ImageDataset, data: ImageDataset, corruption: str, *, severity: int) -> ImageDataset:
        found = self._stored(corruption, severity=severity)
        if found.labels.tolist() != clean.labels.tolist():
            which = f"{corruption} at severity {severity}"
            raise ValueError(f"{self.step.folder}: {which} has other labels than the clean images of {self.dataset}")
        return replace(found, indices=clean.indices)


def _benchmark_metrics(rows: pd.DataFrame, table: pd.DataFrame, *, suite: str) -> list[Metric]:
    """Numbers of one model's answers to clean and corrupted images; those of a corruption are means over severities."""
    clean = table[table["corruption"] == CLEAN].iloc[0]
    n, about = int(clean["n"]), {"of": CLEAN, "settings": {"corruption": CLEAN}}
    shares = correct_shares(rows).drop(columns=CLEAN)
    severities = sorted({int(severity) for severity in rows["severity"]} - {0})
    averaged = averaged_over(suite, severities)
    patients = rows.drop_duplicates("image").set_index("image")["patient"] if "patient" in rows else None

    def mean(name: str, values: pd.Series, **corruption: str) -> Metric:
        of = ", ".join([*corruption.values(), averaged])
        settings = {**corruption, "suite": suite, "severities": severities}
        interval = share_interval(values, groups=patients.reindex(values.index) if patients is not None else ())
        return Metric(name, float(values.mean()), n, *interval, of=of, settings=settings)

    return [
        Metric("accuracy", float(clean["accuracy"]), n, float(clean["low"]), float(clean["high"]), **about),
        Metric("balanced_accuracy", float(clean["balanced_accuracy"]), n, **about),
        Metric("majority_share", float(clean["majority_share"]), n, **about),
        *(mean("accuracy", values, corruption=corruption) for corruption, values in shares.items()),
        mean("average_accuracy", shares.mean(axis="columns")),
    ]


def averaged_over(suite: str, severities: Sequence[int]) -> str:
    """What a mean over severities was taken over: the suite, with its severities unless they are all."""
    chosen = sorted(severities)
    return suite if chosen == list(SEVERITIES) else f"{suite} at {'+'.join(map(str, chosen))}"


def correct_shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of severities at which each image is classified correctly: a row an image, a column a corruption."""
    correct = rows.assign(correct=(rows["predicted"] == rows["label"]).astype(float))
    shares = correct.pivot_table(index="image", columns="corruption", values="correct", aggfunc="mean", sort=False)
    return shares[list(dict.fromkeys(rows["corruption"]))].sort_index()


def right_answers(rows: pd.DataFrame) -> np.ndarray:
    """Whether answers to corrupted images are right: bool [C, S, n], images in order."""
    rows = rows[rows["corruption"] != CLEAN]
    order = pd.MultiIndex.from_product([rows["corruption"].unique(), sorted(rows["severity"].unique())])
    right = rows.assign(right=rows["predicted"] == rows["label"])
    right = right.pivot(index=["corruption", "severity"], columns="image", values="right").loc[order]
    return right.to_numpy().reshape(*order.levshape, -1)
