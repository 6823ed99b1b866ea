"""What a study found: one leaderboard from the cards of its cells, corruption errors between models, a page."""

import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from medrobust_lib import metrics
from medrobust_lib.experiments import Metric, Run, leaderboard, read_cards, write_text_atomically
from medrobust_lib.report import write_report
from medrobust_lib.studies.cells import ANSWERS, Site, answers_matrix, averaged_over
from medrobust_lib.studies.plan import Cell, short_id
from medrobust_lib.studies.study_file import Study

LEADERBOARD = "leaderboard.csv"


def write_results(study: Study, site: Site, finished: Sequence[Cell], failures: Mapping[str, str]) -> pd.DataFrame:
    """Write ``leaderboard.csv`` and ``index.html`` of a study and return the leaderboard.

    Both come from the cards of the finished cells alone, so they do not depend on how often the study was
    interrupted or on who computed what.

    Parameters
    ----------
    study : Study
    site : Site
    finished : sequence of Cell
    failures : mapping of str to str
        Cells that failed, for the page.
    """
    folders = [site.cell_folder(cell) for cell in finished]
    benchmarks = [cell for cell in finished if cell.kind == "benchmark"]
    key = _benchmark_key
    for _, group in groupby(sorted(benchmarks, key=key), key=key):
        folder = _write_corruption_errors(study, site, list(group))
        if folder is not None:
            folders.append(folder)
    cards = [card for folder in folders for card in read_cards(folder, nested=False)]
    table = leaderboard(cards)
    write_text_atomically(site.folder / LEADERBOARD, table.to_csv(index=False, lineterminator="\n"))
    _write_page(study, site, table, folders, failures)
    return table


def _benchmark_key(cell: Cell) -> tuple[int, str, int]:
    return cell.number, cell.dataset, cell.seed or 0


def _write_corruption_errors(study: Study, site: Site, cells: list[Cell]) -> Path | None:
    """A card with mCE and its kin relative to the study's first model; None where there is nothing to compare."""
    reference = study.models[0]
    by_model = {cell.model: cell for cell in cells}
    if reference not in by_model or len(by_model) < 2:
        return None
    first = by_model[reference]
    tables, right = [], {}
    for model, cell in by_model.items():
        cards = site.cell_folder(cell) / "cards"
        tables.append(pd.read_csv(cards / f"{cell.number:02d}-benchmark_accuracy.csv"))
        right[model] = answers_matrix(pd.read_csv(cards / f"{cell.number:02d}-benchmark_{ANSWERS}.csv"))[0]
    errors = metrics.corruption_error_table(pd.concat(tables), reference=reference)
    averaged = averaged_over(first.parameters["suite"], first.parameters["severities"])
    numbers = []
    for row in errors.itertuples():
        rng = np.random.default_rng(first.seed or 0)
        pair = right[row.model], right[reference]
        interval = metrics.bootstrap_interval(metrics.mean_corruption_error, *pair, rng=rng)
        # In some resample the reference makes no error; or all images agree, and resamples of them know no spread.
        if not np.isfinite(interval).all() or (interval[0] == interval[1] and row.model != reference):
            interval = (None, None)
        if np.isfinite(row.mce):  # the reference errs under every corruption
            of = f"{averaged}, relative to {reference}"
            numbers.append(Metric("mce", row.mce, row.n, *interval, of=of, model=row.model))
        numbers.append(Metric("degradation", row.degradation, row.n, of=averaged, model=row.model))
    number = f"{first.number:02d}-mce"
    run = Run(
        number=number,
        title=f"Corruption errors on {first.dataset} relative to {reference}",
        folder=site.folder / "cells" / f"{number}_{short_id(first.dataset)}_seed{first.seed}",
        parameters={
            "step": "mce",
            "models": list(by_model),
            "reference": reference,
            "dataset": first.dataset,
            "seed": first.seed,
            **first.parameters,
        },
        started=time.monotonic(),
    )
    (card,) = read_cards(site.cell_folder(first), nested=False)
    run.save_card(
        metrics=numbers,
        tables={f"{number}_errors": errors},
        model={"id": "", "dtype": card["model"]["dtype"]},
        dataset=card["dataset"],
        prompts=card["prompts"],
        notes=[*card["notes"], f"mCE is in percent of {reference}'s errors."],
    )
    write_report(run.folder)
    return run.folder


def _write_page(
    study: Study, site: Site, table: pd.DataFrame, folders: Sequence[Path], failures: Mapping[str, str]
) -> None:
    from jinja2 import Environment, PackageLoader, select_autoescape
    from markupsafe import Markup

    from medrobust_lib.experiments.cards import lower_is_better
    from medrobust_lib.report import NOTICE, POLICY
    from medrobust_lib.terminal import interval_text

    templates = Environment(
        loader=PackageLoader("medrobust_lib", "templates"),
        autoescape=select_autoescape(["html", "j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    blocks = [
        {
            "metric": metric.replace("_", " "),
            "dataset": dataset,
            "best": "lowest" if lower_is_better(metric) else "highest",
            "rows": [{**row, "text": interval_text(row)} for row in block.to_dict("records")],
        }
        for (metric, dataset), block in table.groupby(["metric", "dataset"], sort=False)
    ]
    page = templates.get_template("study.html.j2").render(
        title=study.name,
        blocks=blocks,
        cells=[folder.name for folder in folders],
        failures=failures,
        synthetic=any(dataset.startswith("phantom/") for dataset in study.datasets),
        policy=POLICY,
        style=Markup(templates.get_template("style.css").render()),
        notice=NOTICE,
    )
    write_text_atomically(site.folder / "index.html", page)
