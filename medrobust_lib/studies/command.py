"""``medrobust study`` and ``medrobust compare``; `medrobust_lib.cli` adds them to the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medrobust_lib.studies.study_file import Study

_SHOWN_ROWS = 120


def study(
    file: Annotated[Path, typer.Argument(help="YAML file: models, datasets, steps; see docs/studies.md.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study; default: runs/NAME.", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time on this machine; -1: one per core.")] = 1,
    cluster: Annotated[
        str | None, typer.Option(help="Scheduler of dask.distributed, tcp://HOST:PORT.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what it costs, and stop.")] = False,
    notebooks: Annotated[Path | None, typer.Option(help="Folder of the notebooks.", show_default=False)] = None,
) -> None:
    """Run a grid of models, data sets and steps; the same command goes on after an interruption."""
    from medrobust_lib.experiments.report import show_ranking
    from medrobust_lib.places import default_runs_dir
    from medrobust_lib.studies.study_file import read_study

    read = read_study(file, notebooks=notebooks)
    if dry_run:
        _show_plan(read, notebooks)
        return
    from medrobust_lib.studies.execute import run_study

    folder = default_runs_dir() / read.name if out is None else out
    typer.echo(f"study folder: {folder}")
    finished = run_study(read, folder, jobs=jobs, cluster=cluster, notebooks=notebooks, announce=typer.echo)
    table = finished.leaderboard
    if len(table) <= _SHOWN_ROWS:
        # The step and the seed tell the cells of one study apart; their whole names would not fit.
        show_ranking(table.assign(run=table["notebook"] + table["seed"].map(lambda seed: f" seed {seed}")))
    else:
        typer.echo(f"{len(table)} results; see them with: medrobust leaderboard {folder} --metric NAME")
    typer.echo(f"{finished.done} of {finished.cells} cells are done")
    typer.echo(f"leaderboard: {finished.folder / 'leaderboard.csv'}")
    typer.echo(f"page: {finished.folder / 'index.html'}")
    if finished.failures:
        reasons = "\n".join(f"  {label}: {reason}" for label, reason in finished.failures.items())
        raise RuntimeError(
            f"{len(finished.failures)} of {finished.cells} cells failed; the same command tries them again\n{reasons}"
        )


def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder of a study or a run.")],
    run_b: Annotated[Path, typer.Argument(help="Folder of another; differences are B minus A.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the table as CSV.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Compare two runs image by image where both kept their answers, and by their cards elsewhere."""
    from medrobust_lib.experiments import write_text_atomically
    from medrobust_lib.experiments.report import show_json
    from medrobust_lib.studies.compare import compare_runs

    compared = compare_runs(run_a, run_b)
    if csv is not None:
        write_text_atomically(csv, compared.table.to_csv(index=False, lineterminator="\n"))
    if as_json:
        show_json(compared.table)
        return
    _show_comparison(compared.table, run_a, run_b)
    for note in compared.notes:
        typer.echo(f"note: {note}")
    for name, left in (("A", compared.only_a), ("B", compared.only_b)):
        if left:
            typer.echo(f"only in {name}, without a partner:")
            typer.echo("".join(f"  {line}\n" for line in left), nl=False)


def _show_plan(read: "Study", notebooks: Path | None) -> None:
    import pandas as pd

    from medrobust_lib.experiments.report import show
    from medrobust_lib.files import size_text
    from medrobust_lib.places import default_runs_dir
    from medrobust_lib.studies.cells import estimate_cells, most_draws, plan_cells, unanimous_draws

    cells = plan_cells(read, notebooks=notebooks)
    estimates = estimate_cells(read, cells, earlier=default_runs_dir())

    def count(value: int | None) -> str:
        return "" if value is None else f"{value:,}"

    def total(values: list, text: object) -> str:
        known = [value for value in values if value is not None]
        more = " + ?" if len(known) < len(values) else ""
        return f"{text(sum(known))}{more}" if known else "?"

    rows = [
        {
            "cell": cell.label,
            "images": count(estimate.images),
            "draws": count(estimate.draws),
            "time": "?" if estimate.seconds is None else duration(estimate.seconds),
            "disk": "?" if estimate.size is None else size_text(estimate.size),
        }
        for cell, estimate in zip(cells, estimates, strict=True)
    ]
    rows.append(
        {
            "cell": f"sum of {len(cells)} cells",
            "images": "",
            "draws": count(sum(estimate.draws or 0 for estimate in estimates)),
            "time": total([estimate.seconds for estimate in estimates], duration),
            "disk": total([estimate.size for estimate in estimates], size_text),
        }
    )
    show(pd.DataFrame(rows), title=f"study {read.name}: what would run", right=("images", "draws", "time", "disk"))
    typer.echo(
        "draws: encodings of noisy or corrupted images. time: in one process of this machine, from a probe of about a\n"
        "second for each model; for notebooks the median of earlier cards, where there are any. disk: from the number\n"
        "of rows. ?: unknown. Nothing was run or written."
    )
    sequential = {
        (cell.parameters["sigma"], most_draws(cell)): unanimous_draws(cell)
        for cell in cells
        if cell.kind == "certify" and cell.parameters["sampling"] == "sequential"
    }
    if sequential:
        typer.echo("Sequential sampling stops earlier than the table says; an image whose copies all agree takes")
    for (sigma, most), expected in sequential.items():
        typer.echo(f"  {expected:,.0f} of {most:,} draws at sigma {sigma:g}")


def duration(seconds: float) -> str:
    """Seconds in a unit that a person can grasp."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _show_comparison(table: "pd.DataFrame", run_a: Path, run_b: Path) -> None:  # noqa: F821
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from medrobust_lib.experiments.report import short_number

    console = Console(highlight=False)
    console.print(f"A: {escape(str(run_a))}\nB: {escape(str(run_b))}", soft_wrap=True)
    console.print("difference: B minus A, with its 95 % interval")
    for (dataset, models, metric), block in table.groupby(["dataset", "model", "metric"], sort=False):
        console.print(f"\n[bold]{escape(metric.replace('_', ' '))}[/] on {escape(dataset)}, {escape(models)}")
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("A", "B", "difference", "n"):
            shown.add_column(column, justify="right", no_wrap=True)
        shown.add_column("kind", no_wrap=True)
        shown.add_column("p", justify="right", no_wrap=True)
        shown.add_column("of", overflow="fold")
        for row in block.itertuples():
            known = row.low == row.low
            interval = f" [{_signed(row.low, 2)}, {_signed(row.high, 2)}]" if known else ""
            shown.add_row(
                short_number(row.value_a, 3),
                short_number(row.value_b, 3),
                f"{_signed(row.difference, 3)}{interval}",
                row.n,
                row.kind,
                "" if row.p != row.p else f"{row.p:.2g}",
                escape(row.of),
            )
        console.print(shown)


def _signed(value: float, digits: int) -> str:
    from medrobust_lib.experiments.report import short_number

    text = short_number(abs(value), digits)
    # What rounds to zero, and what could not be measured, has no sign.
    zero = not text.strip("0.–")
    return text if zero else ("-" if value < 0 else "+") + text
