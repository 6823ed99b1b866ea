"""All cells of a study in the order of its file, and what they cost before any of them runs."""

import contextlib
import io
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import typer

from medrobust_lib.corruptions.suites import corrupted, find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.questions import SCENARIOS, load_questions, parse_scenario
from medrobust_lib.data.registry import DATASETS, load_dataset, open_split
from medrobust_lib.data.wording import class_wording
from medrobust_lib.experiments import read_cards
from medrobust_lib.experiments.report import duration, show
from medrobust_lib.files import size_text
from medrobust_lib.generative.answers import AnswerBank, Drawing
from medrobust_lib.models.loading import load_model
from medrobust_lib.models.vision_language import load_vlm
from medrobust_lib.places import default_runs_dir
from medrobust_lib.smoothing.bounds import ALPHA, minimum_draws
from medrobust_lib.smoothing.methods import zero_shot_methods
from medrobust_lib.smoothing.table import certify_dataset
from medrobust_lib.studies.adapt_step import AdaptCell, AdaptStep
from medrobust_lib.studies.certify_step import CertifyCell, CertifyStep
from medrobust_lib.studies.questions_step import asks_questions
from medrobust_lib.studies.steps import Cell, Estimate, Prices, StudyError
from medrobust_lib.studies.study_file import Study, split_size

_PROBE_DRAWS = minimum_draws(ALPHA)  # the fewest that certify anything
_PROBE_ANSWERS = 4
_ANY = "phantom/blood"  # what is measured with where no data set is here


def study_cells(study: Study, *, notebooks: Path | None = None) -> list[Cell]:
    """Cells of a study, in the order of its file.

    Parameters
    ----------
    study : Study
    notebooks : Path, optional
        Folder of the notebooks; default: the project's.

    Raises
    ------
    StudyError
        A step cannot use what an adapt step makes.
    """
    cells: list[Cell] = []
    made: dict[str, list[AdaptCell]] = {}
    for number, step in enumerate(study.steps, start=1):
        found = step.cells(number, study.narrowed(step), notebooks)
        cells += [replace(cell, source=_source(cell, made)) if cell.model in made else cell for cell in found]
        if isinstance(step, AdaptStep):
            made[step.name] = [cell for cell in found if isinstance(cell, AdaptCell)]
    labels: dict[str, str] = {}
    for cell in cells:
        if cell.name in labels:
            raise StudyError(f"{labels[cell.name]!r} and {cell.label!r} would share the folder {cell.name}; rename one")
        labels[cell.name] = cell.label
    return cells


def _source(cell: Cell, made: dict[str, list[AdaptCell]]) -> AdaptCell:
    """The cell that makes the model of another one."""
    fits = [one for one in made[cell.model] if one.seed == cell.seed and cell.dataset in one.parameters["learned"]]
    if not fits:
        raise StudyError(f"{cell.model!r} learns nothing from {cell.dataset}; name the data sets of step {cell.number}")
    if isinstance(cell.step, CertifyStep) and not fits[0].step.jointly:
        raise StudyError(
            f"{cell.model!r} has no image tower of its own: certify the method CoOp, or few-shot PromptSmooth, instead"
        )
    return fits[0]


def estimate_cells(
    study: Study, cells: Sequence[Cell], *, earlier: Path | None = None, measured: bool = True
) -> list[Estimate]:
    """Price the cells by a short probe of each model on this machine; nothing is written.

    Parameters
    ----------
    study : Study
    cells : sequence of Cell
        From `study_cells`.
    earlier : Path, optional
        Folder of earlier runs, whose cards tell what notebooks took; default: none.
    measured : bool
        False leaves the probe out, and with it the seconds.

    Returns
    -------
    list of Estimate
        The seconds of certify cells are those of all draws; sequential sampling stops earlier.
    """
    rates: dict[str, float | None] = {}

    def answering(cell: Cell) -> float | None:
        if measured and cell.model not in rates:
            rates[cell.model] = _where_here(answers_per_second, cell)
        return rates.get(cell.model)

    def rate(model: str) -> float | None:
        return _where_here(encodings_per_second, model, _shown(study), dtype=study.dtype) if measured else None

    prices = Prices(
        images=cache(lambda dataset: study.n_images or _size(dataset, "test")),
        size=cache(_size),
        classes=cache(_classes),
        rate=cache(rate),
        answering=answering,
        corrupting=cache(_seconds_to_corrupt),
        notebooks=_seconds_of_notebooks(earlier),
    )
    return [cell.estimate(prices) for cell in cells]


def _where_here(measure: Callable[..., float], *words: Any, **more: Any) -> float | None:
    """What was measured; None where weights or data are not on this computer."""
    with contextlib.suppress(FileNotFoundError):
        return measure(*words, **more)
    return None


def _shown(study: Study) -> str:
    """A data set to measure a model's rate with; phantoms where none is here, for the rate hangs on the model alone."""
    return next((id for id in study.datasets if not asks_questions(id) and _where_here(_found, id)), _ANY)


def _found(dataset: str) -> int:
    return len(open_split(dataset).labels)


def _size(dataset: str, split: str) -> int | None:
    """Images of a split, as published where the set is not on this computer."""
    try:
        return split_size(dataset) if split == "test" else len(open_split(dataset, split=split).labels)
    except FileNotFoundError:
        if asks_questions(dataset):
            return SCENARIOS[parse_scenario(dataset)[0]]
        return DATASETS[dataset].sizes.get(split) if dataset in DATASETS else None


def _classes(dataset: str) -> int:
    return len(class_wording(dataset).names if dataset in DATASETS else open_split(dataset).classes)


def answers_per_second(cell: Cell) -> float:
    """Answers of a generative model in a second, from a few to one question."""
    asked = load_questions(cell.dataset, task=cell.step.task, n=1)
    vlm = load_vlm(cell.model, dtype=cell.parameters["dtype"])
    how = Drawing(cell.step.sigma, 0, cell.step.max_new_tokens, cell.step.temperature)
    bank = AnswerBank(vlm, vlm.prepare([asked.images[0]])[0], asked.questions[0], how, dataset=asked.id)
    bank.answers("estimate", 0, 1)  # the first call of a network is slow
    started = time.perf_counter()
    bank.answers("estimate", 1, _PROBE_ANSWERS)
    return _PROBE_ANSWERS / (time.perf_counter() - started)


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


def _probed(dataset: str) -> ImageDataset:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # so few images do not speak for the set
        return load_dataset(dataset, n=len(open_split(dataset).classes))


def _seconds_to_corrupt(dataset: str, suite: str) -> float:
    """Seconds a corrupted image takes, the mean over the corruptions of a suite at their middle severity."""
    data = _probed(dataset if _where_here(_found, dataset) else _ANY).subset([0])
    names = find_suite(suite).names(data.id)
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


def show_estimates(read: Study, chosen: Sequence[Cell] | None = None, *, notebooks: Path | None = None) -> None:
    """Print what the chosen cells of a study, or all, would cost."""
    cells = study_cells(read, notebooks=notebooks) if chosen is None else chosen
    estimates = estimate_cells(read, cells, earlier=default_runs_dir())

    def count(value: int | None) -> str:
        return "" if value is None else f"{value:,}"

    def total(values: Sequence[float | None], text: Callable[[float], str]) -> str:
        known = [value for value in values if value is not None]
        more = " + ?" if len(known) < len(values) else ""
        return f"{text(sum(known))}{more}" if known else "?"

    rows = [
        (cell.label, count(one.images), count(one.draws), total([one.seconds], duration), total([one.size], size_text))
        for cell, one in zip(cells, estimates, strict=True)
    ]
    draws = total([one.draws for one in estimates], "{:,}".format)
    seconds = total([one.seconds for one in estimates], duration)
    rows.append((f"sum of {len(cells)} cells", "", draws, seconds, total([one.size for one in estimates], size_text)))
    numbers = ("images", "draws", "time", "disk")
    show(pd.DataFrame(rows, columns=["cell", *numbers]), title=f"study {read.name}: what would run", right=numbers)
    typer.echo(
        "draws: encodings of noisy or corrupted images. time: in one process of this machine, from a probe of about a\n"
        "second for each model; for notebooks the median of earlier cards, where there are any. disk: from the number\n"
        "of rows. ?: unknown. Nothing was run or written."
    )
    sequential = [cell for cell in cells if isinstance(cell, CertifyCell) and cell.step.sampling == "sequential"]
    stops = {(cell.variant, cell.most_draws): cell.unanimous_draws() for cell in sequential}
    if sequential:
        typer.echo("Sequential sampling stops earlier than the table says; an image whose copies all agree takes")
    for (variant, most), expected in stops.items():
        typer.echo(f"  {expected:,.0f} of {most:,} draws at {variant}")
