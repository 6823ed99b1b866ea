"""Run what is missing of a study, and sum it up: a leaderboard, corruption errors between models, a page."""

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from medrobust_lib import experiments, metrics
from medrobust_lib.checks import check_choice
from medrobust_lib.experiments import Metric, Run, read_cards
from medrobust_lib.experiments.leaderboards import RANKS, comparable_tables
from medrobust_lib.experiments.report import described_figure, interval_text, write_page, write_report
from medrobust_lib.files import named_when_full, told
from medrobust_lib.places import VERSION
from medrobust_lib.runner import environment_variables
from medrobust_lib.studies.adapt_step import AdaptCell
from medrobust_lib.studies.benchmark_step import ANSWERS, BenchmarkCell, averaged_over, right_answers
from medrobust_lib.studies.cells import study_cells
from medrobust_lib.studies.steps import ALONE, Cell, Workers, short_id
from medrobust_lib.studies.study_file import Study

Spread = Literal["cells", "images"]
LEADERBOARD = "leaderboard.csv"
CLUSTER_TIMEOUT = 30.0  # seconds to wait for a scheduler's answer


class Where(NamedTuple):
    """Where cells run.

    Attributes
    ----------
    study : Path
        Folder of the study, which every worker must see under this path.
    notebooks : Path or None
        Folder of the notebooks; None: the project's.
    workers : Workers
        Who shares the images of one cell.
    """

    study: Path
    notebooks: Path | None = None
    workers: Workers = ALONE


def run_cell(where: Where, cell: Cell) -> tuple[float, str]:
    """Run one cell in its folder; what fails is told, not raised, so that other cells go on.

    What the cell prints, and the traceback of an error, goes to ``log.txt`` in its folder.

    Parameters
    ----------
    where : Where
    cell : Cell

    Returns
    -------
    seconds : float
    error : str
        The reason where it failed, else empty.
    """
    folder = cell.folder(where.study)
    started, reason = time.perf_counter(), ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.txt"
        full = named_when_full(path, "the cell's words were lost")
        with full, path.open("w", encoding="utf-8", buffering=1) as log, redirect_stdout(log):
            try:
                cell.run(where.study, notebooks=where.notebooks, workers=where.workers)
                write_report(folder)
            except Exception:
                with suppress(OSError):  # a disk that takes no traceback: the error itself is told
                    traceback.print_exc(file=log)
                raise
    except Exception as error:
        of_the_system = isinstance(error, OSError) and error.errno is not None
        reason = told(error) if of_the_system else f"{type(error).__name__}: {error}"
    return time.perf_counter() - started, reason


def write_results(study: Study, out: Path, finished: Sequence[Cell], failures: Mapping[str, str]) -> pd.DataFrame:
    """Write ``leaderboard.csv`` and ``index.html`` of a study and return the leaderboard.

    Both come from the cards of the finished cells alone, so they do not depend on how often the study was
    interrupted or on who computed what.

    Parameters
    ----------
    study : Study
    out : Path
        Its folder.
    finished : sequence of Cell
    failures : mapping of str to str
        Cells that failed, for the page.
    """
    folders, same_images = [cell.folder(out) for cell in finished], attrgetter("number", "dataset", "seed")
    benchmarks = sorted((cell for cell in finished if isinstance(cell, BenchmarkCell)), key=same_images)
    for _, group in groupby(benchmarks, key=same_images):
        folder = _write_corruption_errors(study, out, list(group))
        if folder is not None:
            folders.append(folder)
    cards = [card for folder in folders for card in read_cards(folder, nested=False)]
    table = experiments.leaderboard(cards)
    experiments.write_text_atomically(out / LEADERBOARD, table.to_csv(index=False, lineterminator="\n"))
    write_page(
        out / "index.html",
        "study",
        title=study.name,
        blocks=comparable_tables(table),
        ranks=RANKS,
        interval_text=interval_text,
        cells=[folder.name for folder in folders],
        cards=cards,
        figures=[described_figure(path) for folder in folders for path in folder.glob("figures/*_headline.png")],
        constant_share=metrics.classification.CONSTANT_SHARE,
        failures=failures,
        synthetic=any(dataset.startswith("phantom/") for dataset in study.datasets),
    )
    return table


def _write_corruption_errors(study: Study, out: Path, cells: list[Cell]) -> Path | None:
    """A card with mCE and its kin relative to the reference; None where there is nothing to compare."""
    step = cells[0].step
    reference = step.reference or study.narrowed(step).models[0]
    by_model = {cell.model: cell for cell in cells}
    if reference not in by_model or len(by_model) < 2:
        return None
    first = by_model[reference]
    tables, right = [], {}
    for model, cell in by_model.items():
        cards = cell.folder(out) / "cards"
        tables.append(pd.read_csv(cards / f"{cell.card_name}_accuracy.csv"))
        answers = pd.read_csv(cards / f"{cell.card_name}_{ANSWERS}.csv")
        right[model] = right_answers(answers)
    images = answers.drop_duplicates("image").sort_values("image")  # the same ones for every model
    errors = metrics.corruption_error_table(pd.concat(tables), reference=reference)
    averaged = averaged_over(first.step.suite, first.step.severities)
    measured = {"suite": first.step.suite, "severities": sorted(first.step.severities)}
    numbers = []
    for row in errors.itertuples():
        rng = np.random.default_rng(first.seed or 0)
        pair = right[row.model], right[reference]
        patients = images.get("patient", ())
        interval = metrics.bootstrap_interval(metrics.mean_corruption_error, *pair, rng=rng, groups=patients)
        # In some resample the reference makes no error; or all images agree, and resamples of them know no spread.
        if not np.isfinite(interval).all() or (interval[0] == interval[1] and row.model != reference):
            interval = (None, None)
        if np.isfinite(row.mce):  # the reference errs under every corruption
            of = f"{averaged}, relative to {reference}"
            relative = {"settings": {**measured, "reference": reference}}
            numbers.append(Metric("mce", row.mce, row.n, *interval, of=of, model=row.model, **relative))
        about = {"model": row.model, "settings": measured}
        numbers.append(Metric("degradation", row.degradation, row.n, of=averaged, **about))
    number = f"{first.number:02d}-mce"
    compared = {"step": "mce", "models": list(by_model), "reference": reference}
    parameters = {**compared, "dataset": first.dataset, "seed": first.seed, **first.parameters}
    title = f"Corruption errors on {first.dataset} relative to {reference}"
    folder = out / "cells" / f"{number}_{short_id(first.dataset)}_seed{first.seed}"
    run = Run(number, title, folder, parameters, time.monotonic())
    (card,) = read_cards(first.folder(out), nested=False)
    notes = [*card["notes"], f"mCE is in percent of {reference}'s errors."]
    described = {"model": {"id": "", "dtype": card["model"]["dtype"]}, "notes": notes}
    described |= {"dataset": card["dataset"], "prompts": card["prompts"]}
    run.save_card(metrics=numbers, tables={f"{number}_errors": errors}, **described)
    write_report(folder)
    return folder


@dataclass(frozen=True)
class Finished:
    """A study after a call of `run_study`.

    Attributes
    ----------
    folder : Path
    leaderboard : DataFrame
        Of all finished cells; empty if there is none.
    cells : int
        Number of cells that were asked for.
    done : int
        Finished cells, those of earlier calls among them.
    failures : mapping of str to str
        Label of each failed cell and why it failed.
    """

    folder: Path
    leaderboard: pd.DataFrame
    cells: int
    done: int
    failures: Mapping[str, str]


def run_study(
    study: Study,
    out: Path,
    *,
    jobs: int = 1,
    cluster: str | None = None,
    spread: Spread = "cells",
    cells: Sequence[Cell] | None = None,
    notebooks: Path | None = None,
    announce: Callable[[str], None] = print,
) -> Finished:
    """Run the cells of a study that are not finished yet, and write its leaderboard.

    Parameters
    ----------
    study : Study
        From `read_study`.
    out : Path
        Folder of the study; it is made for this study and refuses every other.
    jobs : int
        Cells at a time on this machine, each in a process of its own; -1 for one per core.
    cluster : str, optional
        Address of a dask.distributed scheduler, ``tcp://HOST:PORT``; its workers run the cells. They must have
        this library and see ``out`` under the same path.
    spread : {"cells", "images"}
        What the processes or the workers share: whole cells, or the images of one cell of certificates or questions
        after the other, which is for few and large cells.
    cells : sequence of Cell, optional
        Those to run, where it is a part of the study; a later call with others goes on in the same folder.
    notebooks : Path, optional
        Folder of the notebooks; default: the project's.
    announce : callable
        Receives a line for each failed cell, and outside of a terminal for each finished one.

    Returns
    -------
    Finished
        A cell that failed costs no other cell; the next call tries it again.

    Raises
    ------
    ValueError
        The folder holds another study (every difference is named) or other things; jobs out of range; workers
        that do not see the folder.
    RuntimeError
        Another process runs this study, or no scheduler answers at the address.
    """
    check_choice("spread", spread, get_args(Spread))
    out = Path(out).expanduser().resolve()
    every = study_cells(study, notebooks=notebooks)
    cells = every if cells is None else list(cells)
    place = out, None if notebooks is None else Path(notebooks).resolve()
    manifest = {"study": study.record(), "medrobust_lib": VERSION}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        store = stack.enter_context(experiments.open_store(out, parameters=manifest))
        # A card that somebody deleted is made again.
        missing = [cell for cell in cells if cell.name not in store.done or not _has_card(out, cell)]
        done = len(cells) - len(missing)
        if cluster is not None and missing:
            _connect(stack, cluster, out)
        if jobs != 1 or cluster is not None:  # bars of several processes would overwrite each other
            stack.enter_context(environment_variables({"TQDM_DISABLE": "1"}))
        backend = "dask" if cluster is not None and missing else "loky"
        shared = spread == "images"
        where = Where(*place, workers=Workers(jobs, backend) if shared else ALONE)
        among = {"jobs": 1} if shared else {"jobs": jobs, "backend": backend}
        # What later cells load is made first.
        waves = [[cell for cell in missing if isinstance(cell, AdaptCell) is first] for first in (True, False)]
        results = (
            (wave[position], result)
            for wave in waves
            for position, result in experiments.map_items(run_cell, wave, context=where, **among)
        )
        words = {"description": f"study {study.name}", "unit": "cells"}
        try:
            for cell, (seconds, error) in experiments.progress(results, total=len(cells), done=done, **words):
                if error:
                    failures[cell.label] = error
                    announce(f"FAILED {cell.label}; the other cells go on")
                    continue
                if cell.name not in store.done:
                    what = {"cell": cell.name, "step": cell.number, "kind": cell.step.kind}
                    row = {"model": cell.model, "dataset": cell.dataset, "seed": cell.seed}
                    store.append(cell.name, [what | row], seconds=seconds)
                if experiments.is_headless() or not sys.stderr.isatty():
                    announce(f"{cell.label}: done in {seconds:.1f} s")
        except RuntimeError as stopped:
            # Workers that are killed again and again: what was finished stays, the rest is told.
            failures["cells without a result"] = str(stopped)
        finished = [cell for cell in every if cell.name in store.done and _has_card(out, cell)]
        store.finish([cell.name for cell in finished])
        leaderboard = write_results(study, out, finished, failures)
    done = sum(cell in finished for cell in cells)
    return Finished(out, leaderboard, len(cells), done, failures)


def _has_card(out: Path, cell: Cell) -> bool:
    """Whether the result of a cell is there: its card, and every table that the card names."""
    folder = cell.folder(out) / "cards"
    with suppress(FileNotFoundError):
        cards = read_cards(cell.folder(out), nested=False)
        return all((folder / f"{name}.csv").is_file() for card in cards for name in card["tables"])
    return False


def _connect(stack: ExitStack, address: str, folder: Path) -> None:
    """Make a client of a cluster the active one, after checking that its workers see the folder."""
    try:
        from distributed import Client
    except ImportError as error:
        raise RuntimeError(
            "--cluster needs dask.distributed; install the cluster extra: "
            "pip install -c constraints.txt -e '.[cluster]'"
        ) from error
    started = time.monotonic()
    try:
        client = stack.enter_context(Client(address, timeout=CLUSTER_TIMEOUT))
    except (OSError, ValueError) as error:
        waited = time.monotonic() - started
        raise RuntimeError(
            f"no scheduler answers at {address!r} ({error or type(error).__name__}, after {waited:.0f} s); start one "
            "with `dask scheduler` and give the address that it prints, such as tcp://10.0.0.1:8786"
        ) from error
    blind = [worker for worker, sees in client.run(Path.is_dir, folder).items() if not sees]
    if blind:
        raise ValueError(
            f"{len(blind)} workers do not see the folder {folder} ({', '.join(blind[:3])}); give --out on a file "
            "system that all of them share"
        )
