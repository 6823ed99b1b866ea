"""Run a study: what is not finished yet, here or on a cluster, and sum up what is."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medrobust_lib.experiments import is_headless, map_items, open_store, progress
from medrobust_lib.places import VERSION
from medrobust_lib.runner import environment_variables
from medrobust_lib.studies.cells import Site, run_cell
from medrobust_lib.studies.plan import Cell, plan_cells
from medrobust_lib.studies.results import write_results
from medrobust_lib.studies.study_file import Study

CLUSTER_TIMEOUT = 30.0  # seconds to wait for a scheduler's answer


@dataclass(frozen=True)
class Finished:
    """A study after a call of `run_study`.

    Attributes
    ----------
    folder : Path
    leaderboard : DataFrame
        Of all finished cells; empty if there is none.
    cells : int
        Number of cells in the study.
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
    out = Path(out).expanduser().resolve()
    cells = plan_cells(study, notebooks=notebooks)
    site = Site(out, None if notebooks is None else Path(notebooks).resolve())
    manifest = {"study": study.record(), "medrobust_lib": VERSION}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        store = stack.enter_context(open_store(out, parameters=manifest))
        # A card that somebody deleted is made again.
        missing = [cell for cell in cells if cell.name not in store.done or not _has_card(site, cell)]
        done = len(cells) - len(missing)
        if cluster is not None and missing:
            _connect(stack, cluster, out)
        alone = jobs == 1 and cluster is None
        if not alone:  # bars of several processes would overwrite each other
            stack.enter_context(environment_variables({"TQDM_DISABLE": "1"}))
        results = map_items(run_cell, missing, context=site, jobs=jobs, backend="loky" if cluster is None else "dask")
        shown = progress(results, total=len(cells), done=done, description=f"study {study.name}", unit="cells")
        try:
            for position, outcome in shown:
                cell = missing[position]
                if outcome.error:
                    failures[cell.label] = outcome.error
                    announce(f"FAILED {cell.label}; the other cells go on")
                    continue
                if cell.name not in store.done:
                    store.append(cell.name, [_row(cell)], seconds=outcome.seconds)
                if is_headless() or not sys.stderr.isatty():
                    announce(f"{cell.label}: done in {outcome.seconds:.1f} s")
        except RuntimeError as error:
            # Workers that are killed again and again: what was finished stays, the rest is told.
            failures["cells without a result"] = str(error)
        finished = [cell for cell in cells if cell.name in store.done and _has_card(site, cell)]
        store.finish([cell.name for cell in finished])
        leaderboard = write_results(study, site, finished, failures)
    return Finished(out, leaderboard, len(cells), len(finished), failures)


def _row(cell: Cell) -> dict[str, Any]:
    return {
        "cell": cell.name,
        "step": cell.number,
        "kind": cell.kind,
        "model": cell.model,
        "dataset": cell.dataset,
        "seed": cell.seed,
    }


def _has_card(site: Site, cell: Cell) -> bool:
    return any((site.cell_folder(cell) / "cards").glob("[0-9]*.json"))


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
