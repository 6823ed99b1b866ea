"""What a study will do: its cells, what they cost before any of them runs, and how each of them runs."""

import contextlib
import hashlib
import io
import re
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from medrobust_lib import metrics
from medrobust_lib.corruptions.suites import SEVERITIES, corrupted, find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import load_dataset, open_split
from medrobust_lib.data.splits import learning_splits
from medrobust_lib.evaluation import CLEAN, Candidate, accuracy_table, corruption_answers
from medrobust_lib.experiments import Metric, Run, read_cards
from medrobust_lib.metrics.classification import share_interval
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.loading import load_model
from medrobust_lib.runner import find_notebooks, run_notebooks
from medrobust_lib.smoothing.bounds import ALPHA, minimum_draws
from medrobust_lib.smoothing.certificate import GUARANTEES
from medrobust_lib.smoothing.methods import AdaptedPrompts, zero_shot_methods
from medrobust_lib.smoothing.sequential import operating_characteristics, sequential_plan
from medrobust_lib.smoothing.table import (
    ADAPTED_METHODS,
    CANDIDATES,
    LEARNED_METHODS,
    certify_dataset,
    prompt_methods,
)
from medrobust_lib.studies.study_file import Step, Study

CERTIFICATES, ANSWERS = "certificates", "answers"  # ends of the names of the tables with one row an image
_LONGEST_PART = 32
_COPIES_OF_A_SHOT = 16  # that a prompt is learned from
_PROBE_DRAWS = minimum_draws(ALPHA)  # the fewest that certify anything
# Bytes, about: a row of certificates in the journal and in two tables, an answer, and a cell's other files.
_CERTIFICATE_BYTES, _ANSWER_BYTES, _CELL_BYTES = 1_100, 60, 16_000


class Estimate(NamedTuple):
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


class Prices(NamedTuple):
    """What this machine needs, measured when first asked for and then remembered.

    Attributes
    ----------
    images : callable
        Number of test images, from the id of a data set.
    rate : callable
        Draws in a second, from the id of a model.
    corrupting : callable
        Seconds for a corrupted image, from the ids of a data set and a suite.
    notebooks : mapping of (str, str) to float
        Seconds, by number and model, as far as earlier cards tell.
    """

    images: Callable[[str], int]
    rate: Callable[[str], float]
    corrupting: Callable[[str, str], float]
    notebooks: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Cell(ABC):
    """One piece of a study: it runs on its own, is finished or not, and has a folder and a result card.

    Attributes
    ----------
    number : int
        Of its step in the file, from 1.
    step : Step
    model, dataset : str
        Ids; empty for a notebook that has no such parameter.
    seed : int or None
    parameters : dict
        Everything else that shapes its results, as JSON values; of a notebook the parameters that it is given.
    """

    number: int
    step: Step = field(repr=False)
    model: str
    dataset: str
    seed: int | None
    parameters: dict[str, Any] = field(repr=False)

    @property
    def what(self) -> str:
        """Kind of the step, for people."""
        return self.step.kind

    @property
    def variant(self) -> str:
        """Which of several cells of one step, model, data set and seed."""
        return ""

    @property
    def label(self) -> str:
        """What a person reads in tables."""
        seed = "" if self.seed is None else f"seed {self.seed}"
        return ", ".join(filter(None, (f"{self.number} {self.what}", self.model, self.dataset, self.variant, seed)))

    @property
    def name(self) -> str:
        """Names the folder; unique in the study."""
        parts = [f"{self.number:02d}-{self.what.replace(' ', '-')}", short_id(self.model), short_id(self.dataset)]
        parts += [self.variant.replace(" ", ""), "" if self.seed is None else f"seed{self.seed}"]
        return "_".join(filter(None, parts))

    def folder(self, study: Path) -> Path:
        """Its run folder, below the folder of its study."""
        return study / "cells" / self.name

    @abstractmethod
    def estimate(self, prices: Prices) -> Estimate:
        """What it costs."""

    @abstractmethod
    def run(self, folder: Path, *, notebooks: Path | None) -> None:
        """Write its card and tables into a folder."""

    def begin(self, folder: Path, title: str) -> tuple[Run, DualEncoder]:
        """Start the clock and load the model."""
        where = {"step": self.step.kind, "model": self.model, "dataset": self.dataset, "seed": self.seed}
        number = f"{self.number:02d}-{self.step.kind}"
        run = Run(number, title, folder, where | self.parameters, time.monotonic())
        return run, load_model(self.model, dtype=self.parameters["dtype"])

    def images(self) -> ImageDataset:
        """The test images that are measured."""
        n, draw = self.parameters["n_images"], self.parameters["draw"]
        return load_dataset(self.dataset, n=n, seed=self.seed or 0, draw=draw)


class CertifyCell(Cell):
    """Certificates of prompt methods of one model at one noise level."""

    @property
    def variant(self) -> str:
        """The noise level."""
        return f"sigma {self.parameters['sigma']:g}"

    @property
    def most_draws(self) -> int:
        """Draws of one image, selection draws included; sequential sampling stops earlier."""
        return (self.step.n0 if self.step.mode == "predict" else 0) + self.step.n

    def unanimous_draws(self) -> float:
        """Expected draws of an image whose noisy copies all get the same answer, in sequential sampling."""
        step, sigma = self.step, self.parameters["sigma"]
        plan = sequential_plan(sigma=sigma, radii=step.radii, n=step.n, alpha=step.alpha)
        return operating_characteristics(plan, 1.0)[1] + self.most_draws - step.n

    def estimate(self, prices: Prices) -> Estimate:
        """Price of all draws."""
        images = prices.images(self.dataset)
        methods = set(self.step.methods)
        draws = images * (self.most_draws + AdaptedPrompts.n_adapt * bool(ADAPTED_METHODS & methods))
        if learned := LEARNED_METHODS & methods:
            few_shot = CANDIDATES if "candidate set" in learned else int(learned != {"CoOp"})
            shots = self.step.shots * len(open_split(self.dataset).classes)
            draws += (("CoOp" in learned) + few_shot) * _COPIES_OF_A_SHOT * shots
        size = _CELL_BYTES + 2 * images * _CERTIFICATE_BYTES * max(2, len(self.step.methods))
        return Estimate(images, draws, draws / prices.rate(self.model), size)

    def run(self, folder: Path, *, notebooks: Path | None) -> None:
        """Certify every image."""
        run, model = self.begin(folder, f"Certificates of {self.model} on {self.dataset}")
        step, sigma, seed, notes = self.step, self.parameters["sigma"], self.seed or 0, []
        learning: dict[str, Any] = {}
        if LEARNED_METHODS & set(step.methods):
            asked = self.parameters["n_images"] or len(open_split(self.dataset).labels)
            draw = self.parameters["draw"]
            splits = learning_splits(self.dataset, shots=step.shots, n_test=asked, n_pool=asked, seed=seed, draw=draw)
            data, notes = splits.test, list(splits.notes)
            if len(data) < asked:
                notes.append(f"{len(data)} of {asked} images are left to certify; others are learned from")
            notes.append(f"Prompts: {step.shots} shots of each class at most, drawn with seed {seed}; folder prompts/")
            learning = {"train": splits.train, "pool": splits.pool, "shots": step.shots, "epochs": step.epochs}
            learning["draws_per_image"] = _COPIES_OF_A_SHOT
        else:
            data = self.images()
        methods = zero_shot_methods(model, data)
        if step.methods:
            ask = {"sigma": sigma, "seed": seed, "tunable": step.tunable, "kept": folder / "prompts"}
            methods = prompt_methods(model, data, step.methods, **ask, **learning)
        rules = {name: self.parameters[name] for name in ("n0", "n", "alpha", "sampling", "mode", "radii")}
        rows = certify_dataset(model, data, methods, store=folder / "store", sigmas=[sigma], seed=seed, **rules)
        rows = rows.drop(columns="seconds")  # a table must not depend on the clock
        shares = metrics.certified_accuracy(rows, radii=step.radii)
        notes += [f"Guarantee {name}: {GUARANTEES[name]}" for name in rows["guarantee"].unique()]
        if step.mode == "evaluate":
            notes.append("The known label was tested (mode evaluate): for tables only, no prediction was certified.")
        numbers = _certificate_metrics(metrics.certification_summary(rows), shares)
        tables = {f"{run.number}_{CERTIFICATES}": rows, f"{run.number}_certified_accuracy": shares}
        prompts = {"templates": list(data.templates), "classes": list(data.classes)}
        run.save_card(metrics=numbers, tables=tables, prompts=prompts, **_described(model, data, notes))


class BenchmarkCell(Cell):
    """Answers of one model to the corruptions of a suite."""

    def estimate(self, prices: Prices) -> Estimate:
        """Price of corrupting and encoding."""
        images, suite = prices.images(self.dataset), find_suite(self.step.suite)
        draws = images * (1 + len(suite.names(self.dataset)) * len(self.step.severities))
        seconds = draws / prices.rate(self.model) + (draws - images) * prices.corrupting(self.dataset, suite.id)
        return Estimate(images, draws, seconds, _CELL_BYTES + draws * _ANSWER_BYTES)

    def run(self, folder: Path, *, notebooks: Path | None) -> None:
        """Classify every image, clean and corrupted."""
        run, model = self.begin(folder, f"{self.model} on corrupted images of {self.dataset}")
        data = self.images()
        suite, seed = self.step.suite, self.seed or 0
        candidate = Candidate(model, model.class_features(data.classes, data.templates[:1]))
        answers = corruption_answers(
            {self.model: candidate}, data, suite=suite, severities=self.step.severities, seed=seed
        )
        rows = pd.concat(
            pd.DataFrame(
                {"dataset": data.id, "model": name, "corruption": corruption, "severity": severity}
                | {"image": data.indices, "label": data.labels, "predicted": answer, "seed": self.seed}
            )
            for (name, corruption, severity), answer in answers.items()
        )
        table = accuracy_table(answers, data)
        numbers = _benchmark_metrics(rows, table, suite=suite)
        tables = {f"{run.number}_{ANSWERS}": rows, f"{run.number}_accuracy": table}
        prompts = {"template": data.templates[0], "classes": list(data.classes)}
        described = _described(model, data, [f"Suite {suite}; severities are conventions."])
        run.save_card(metrics=numbers, tables=tables, prompts=prompts, **described)


class NotebookCell(Cell):
    """One run of a notebook, with the notebook's own card; its parameters were checked when the study was read."""

    @property
    def what(self) -> str:
        """The notebook."""
        return f"notebook {self.step.notebook}"

    def estimate(self, prices: Prices) -> Estimate:
        """What earlier runs took."""
        seconds = prices.notebooks.get((self.step.notebook, self.model)) or None
        return Estimate(self.parameters.get("n_images"), None, seconds, None)

    def run(self, folder: Path, *, notebooks: Path | None) -> None:
        """Execute it."""
        run_notebooks(find_notebooks([self.step.notebook], folder=notebooks), self.parameters, folder)


_CELLS: dict[str, type[Cell]] = {"certify": CertifyCell, "benchmark": BenchmarkCell, "notebook": NotebookCell}


def study_cells(study: Study, *, notebooks: Path | None = None) -> list[Cell]:
    """Cells of a study, in the order of its file.

    Parameters
    ----------
    study : Study
    notebooks : Path, optional
        Folder of the notebooks; default: the project's.
    """
    return [
        _CELLS[step.kind](number, step, *place, parameters)
        for number, step in enumerate(study.steps, start=1)
        for place, parameters in step.assignments(study, notebooks)
    ]


def estimate_cells(study: Study, cells: Sequence[Cell], *, earlier: Path | None = None) -> list[Estimate]:
    """Price the cells by a short probe of each model on this machine; nothing is written.

    Parameters
    ----------
    study : Study
    cells : sequence of Cell
        From `study_cells`.
    earlier : Path, optional
        Folder of earlier runs, whose cards tell what notebooks took; default: none.

    Returns
    -------
    list of Estimate
        The seconds of certify cells are those of all draws; sequential sampling stops earlier.
    """
    prices = Prices(
        images=cache(lambda dataset: study.n_images or len(open_split(dataset).labels)),
        rate=cache(lambda model: encodings_per_second(model, study.datasets[0], dtype=study.dtype)),
        corrupting=cache(_seconds_to_corrupt),
        notebooks=_seconds_of_notebooks(earlier),
    )
    return [cell.estimate(prices) for cell in cells]


def encodings_per_second(model_id: str, dataset: str, *, dtype: str = "auto") -> float:
    """Noisy copies that pass through a model in a second, noise and votes included: about a second's probe.

    Parameters
    ----------
    model_id, dataset : str
        The data set gives the image and the texts.
    dtype : str
        As in `load_model`.
    """
    return measured_rate(load_model(model_id, dtype=dtype), _probed(dataset))


def measured_rate(
    model: Any, data: Any, *, seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter
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
    methods, image = zero_shot_methods(model, data)[:1], data.subset([0])
    draws, rate = _PROBE_DRAWS, 0.0
    for _ in range(3):
        with contextlib.redirect_stdout(io.StringIO()):
            started = clock()
            certify_dataset(model, image, methods, sigmas=[0.25], n0=1, n=draws, sampling="fixed", radii=None)
            spent = clock() - started
        rate = (draws + 1) / spent
        # The first calls of a network are slow, and a few draws fill no batch.
        if spent >= seconds / 2:
            break
        draws = max(_PROBE_DRAWS, int(rate * seconds))
    return rate


def short_id(id: str) -> str:
    """An id as part of a folder's name; one that had to be shortened stays unique by a piece of its hash."""
    text = re.sub(r"[^A-Za-z0-9.-]+", "-", id).strip("-.")
    if len(text) <= _LONGEST_PART and not id.partition(":")[2]:
        return text
    return f"{text[-_LONGEST_PART:].strip('-.')}-{hashlib.sha256(id.encode()).hexdigest()[:6]}"


def _probed(dataset: str) -> ImageDataset:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # so few images do not speak for the set
        return load_dataset(dataset, n=len(open_split(dataset).classes))


def _seconds_to_corrupt(dataset: str, suite: str) -> float:
    """Seconds a corrupted image takes, the mean over the corruptions of a suite at their middle severity."""
    data = _probed(dataset).subset([0])
    names = find_suite(suite).names(dataset)
    started = time.perf_counter()
    for name in names:
        corrupted(data, name, severity=3, suite=suite)
    return (time.perf_counter() - started) / len(names)


def _seconds_of_notebooks(runs: Path | None) -> dict[tuple[str, str], float]:
    """Median seconds of each notebook and model, from the cards of earlier runs."""
    taken: dict[tuple[str, str], list[float]] = {}
    with contextlib.suppress(FileNotFoundError):
        for card in read_cards(runs) if runs is not None else ():
            taken.setdefault((card["notebook"], card["parameters"].get("model", "")), []).append(card["seconds"])
    return {key: statistics.median(seconds) for key, seconds in taken.items()}


def _certificate_metrics(summary: pd.DataFrame, shares: pd.DataFrame) -> list[Metric]:
    numbers = []
    for r in summary.itertuples():
        of = f"{r.method} ({r.guarantee}), sigma={r.sigma:g}"
        about = {"of": of, "settings": {"method": r.method, "guarantee": r.guarantee, "sigma": r.sigma}}
        numbers.append(Metric("smoothed_accuracy", r.smoothed_accuracy, r.n, r.low, r.high, **about))
        numbers.append(Metric("average_certified_radius", r.average_certified_radius, r.n, **about))
        numbers.append(Metric("abstain_rate", r.abstain_rate, r.n, **about))
    for r in shares[shares["radius"] > 0].itertuples():
        of = f"{r.method} ({r.guarantee}), sigma={r.sigma:g}, radius={r.radius:g}"
        of += f" (the draws reach {r.radius_reach:.4g})" if np.isnan(r.certified_accuracy) else ""
        settings = {"method": r.method, "guarantee": r.guarantee, "sigma": r.sigma, "radius": r.radius}
        share = r.certified_accuracy, r.n, r.low, r.high
        numbers.append(Metric("certified_accuracy", *share, of=of, settings=settings))
    return numbers


def _benchmark_metrics(rows: pd.DataFrame, table: pd.DataFrame, *, suite: str) -> list[Metric]:
    """Numbers of one model's answers to clean and corrupted images; those of a corruption are means over severities."""
    clean = table[table["corruption"] == CLEAN].iloc[0]
    n, about = int(clean["n"]), {"of": CLEAN, "settings": {"corruption": CLEAN}}
    shares = correct_shares(rows).drop(columns=CLEAN)
    severities = sorted({int(severity) for severity in rows["severity"]} - {0})
    averaged = averaged_over(suite, severities)

    def mean(name: str, values: pd.Series, **corruption: str) -> Metric:
        of = ", ".join([*corruption.values(), averaged])
        settings = {**corruption, "suite": suite, "severities": severities}
        return Metric(name, float(values.mean()), n, *share_interval(values), of=of, settings=settings)

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


def _described(model: DualEncoder, data: ImageDataset, notes: list[str]) -> dict[str, Any]:
    """Model, data set and notes of a card."""
    notes = [*data.caveats, *notes]
    if data.synthetic:
        notes = ["The images are synthetic phantoms: nobody's images.", *notes]
    about = {"id": data.id, "split": data.split, "n": len(data), "synthetic": data.synthetic}
    return {
        "model": {"id": model.id, "dtype": str(model.dtype), "image_size": model.image_size},
        "dataset": about | {"wording": data.provenance["wording"]},
        "notes": notes,
    }
