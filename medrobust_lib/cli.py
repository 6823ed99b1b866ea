"""The command line: ``medrobust run | models | datasets | leaderboard | doctor``."""

import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich import box
from rich.console import Console
from rich.table import Table

# What fits a terminal; --json gives everything, with hashes, sources and citations.
MODEL_COLUMNS = ("id", "family", "image_size", "parameters", "available_offline")
DATASET_COLUMNS = ("id", "modality", "classes", "test", "available")

app = typer.Typer(
    help="How far can a medical vision-language model be trusted when the image gets worse? "
    "For teaching and research, not for clinical use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: expected errors become one readable message and exit code 1."""
    try:
        app()
    except (ValueError, FileNotFoundError, RuntimeError, PermissionError) as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(1)


@app.command()
def run(
    notebooks: Annotated[list[str] | None, typer.Argument(help="Numbers, for example 01 02; default: all.")] = None,
    parameter: Annotated[list[str] | None, typer.Option("-p", "--parameter", help="NAME=VALUE (YAML value).")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="YAML file of parameters.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: a new one, runs/DATE_TIME.", show_default=False)
    ] = None,
    folder: Annotated[Path | None, typer.Option("--notebooks", help="Folder of the notebooks.")] = None,
    describe: Annotated[bool, typer.Option("--describe", help="List the parameters and stop.")] = False,
) -> None:
    """Execute notebooks headlessly and write a report.

    In an existing run folder the executed notebooks replace their own earlier results and nothing else.
    """
    from medrobust_lib import runner
    from medrobust_lib.parameters import parse_parameters
    from medrobust_lib.report import write_report

    chosen = runner.find_notebooks(notebooks or (), folder=folder)
    if describe:
        _describe(chosen)
        return
    parameters = parse_parameters(parameter or (), file)
    try:
        executed = runner.run_notebooks(chosen, parameters, out, announce=typer.echo)
    except runner.NotebookError as error:
        typer.echo(f"report of what was executed: {write_report(error.run_dir)}")
        raise
    plural = "s" if len(executed) > 1 else ""
    typer.echo(f"{len(executed)} notebook{plural} in {sum(e.seconds for e in executed):.1f} s")
    typer.echo(f"report: {write_report(executed[0].run_dir)}")


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List the models that `load_model` knows, and the generative ones of `load_vlm`."""
    from medrobust_lib import list_models, list_vlms

    tables = {"models": list_models(), "generative models (vlm)": list_vlms()}
    if as_json:
        _show(pd.concat(tables.values()), as_json=True, title="")
        return
    for title, table in tables.items():
        _show(table, as_json=False, title=title, columns=MODEL_COLUMNS)


@app.command()
def datasets(
    root: Annotated[Path | None, typer.Option(help="Folder of downloaded data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List the data sets that `load_dataset` knows, and the scenarios of MM-SafetyBench for notebook 06."""
    from medrobust_lib import list_datasets
    from medrobust_lib.data.mm_safetybench import PREFIX, list_scenarios

    _show(list_datasets(root=root), as_json=as_json, title="data sets", columns=DATASET_COLUMNS)
    if not as_json:
        scenarios = list_scenarios(root=root).groupby("scenario", sort=False)
        table = scenarios.agg(questions=("questions", "first"), available=("available", "all")).reset_index()
        table.insert(0, "id", PREFIX + table["scenario"].str[:2])
        _show(table, as_json=False, title="questions for generative models (images: SD, TYPO, SD_TYPO)")


@app.command()
def leaderboard(
    runs: Annotated[
        Path | None, typer.Argument(help="Folder that holds runs; default: runs.", show_default=False)
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Only this metric.")] = None,
    by_hand: Annotated[
        bool, typer.Option("--by-hand", help="Also notebooks run by hand, without `medrobust run`.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write all rows and columns as CSV.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All rows and columns as JSON instead of tables.")] = False,
) -> None:
    """Rank the results of all runs by metric and data set, from their result cards only."""
    from medrobust_lib import experiments
    from medrobust_lib.experiments.cards import BY_HAND, default_runs_dir

    folder = default_runs_dir() if runs is None else runs
    cards = experiments.read_cards(folder)
    if not by_hand and folder.resolve().name != BY_HAND:
        cards = [card for card in cards if card["run"] != BY_HAND]
        if not cards:
            raise ValueError(f"{folder} holds only notebooks run by hand; show them with --by-hand")
    table = experiments.leaderboard(cards)
    if metric is not None:
        known = sorted(table["metric"].unique())
        if metric not in known:
            close = difflib.get_close_matches(metric, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown metric {metric!r}; the cards hold {', '.join(known)}.{hint}")
        table = table[table["metric"] == metric]
    if csv is not None:
        experiments.write_text_atomically(csv, table.to_csv(index=False))
    if as_json:
        _show(table, as_json=True, title="")
    else:
        _show_ranking(table)


@app.command()
def doctor() -> None:
    """Check environment, kernel, weights, data, and demo-clip's reference prediction."""
    from medrobust_lib.doctor import examine

    failed = 0
    for finding in examine():
        failed += not finding.passed
        typer.echo(f"{'ok  ' if finding.passed else 'FAIL'} {finding.check:<20} {finding.detail}")
    if failed:
        raise RuntimeError(f"{failed} check{'s' if failed > 1 else ''} failed, see above")


def _describe(notebooks: dict[str, Path]) -> None:
    from medrobust_lib.parameters import notebook_parameters

    for number, path in notebooks.items():
        typer.echo(f"{number}  {path.stem}")
        for name, spec in notebook_parameters(path).items():
            typer.echo(f"    {name}: {spec['inferred_type_name']} = {spec['default']}  # {spec['help']}")


def _show(table: pd.DataFrame, *, as_json: bool, title: str, columns: Sequence[str] | None = None) -> None:
    if as_json:
        typer.echo(json.dumps(json.loads(table.to_json(orient="records")), indent=2))
        return
    table = table[list(columns)] if columns else table
    console = Console(highlight=False)
    shown = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(table.columns):
        numeric = pd.api.types.is_numeric_dtype(table[column]) and table[column].dtype != bool
        name, justify = str(column).replace("_", " "), "right" if numeric else "left"
        shown.add_column(name, justify=justify, overflow="fold", no_wrap=position == 0)
    for row in table.itertuples(index=False):
        shown.add_row(*(_cell(value) for value in row))
    console.print(shown)


def _show_ranking(table: pd.DataFrame) -> None:
    """One narrow table per metric and data set; a result that several runs agree on is one row."""
    from medrobust_lib.experiments.cards import lower_is_better

    console = Console(highlight=False)
    for (metric, dataset), block in table.groupby(["metric", "dataset"], sort=False):
        best = "lowest" if lower_is_better(metric) else "highest"
        console.print(f"[bold]{_escaped(metric.replace('_', ' '))}[/] on {_escaped(dataset)}, {best} first")
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        shown.add_column("#", justify="right")
        shown.add_column("value [95 %]" if block["low"].notna().any() else "value", no_wrap=True)
        shown.add_column("n", justify="right", no_wrap=True)
        for column in ("model", "of", "run"):
            shown.add_column(column, overflow="fold")
        same = ["parameters", "model", "of", "value", "n"]
        runs = block.groupby(same, sort=False)["run"].unique()
        results = block.drop_duplicates(same)
        ranks = results["value"].rank(method="min", ascending=lower_is_better(metric)).astype(int)
        for rank, names, (_, row) in zip(ranks, runs, results.iterrows(), strict=True):
            run = f"{names[0]} (+{len(names) - 1} more)" if len(names) > 1 else names[0]
            cells = (str(rank), _interval(row), str(row["n"]), row["model"], row["of"], run)
            shown.add_row(*map(_escaped, cells))
        console.print(shown)


def _interval(row: pd.Series) -> str:
    """A value and its interval, as short as they can be told: ``.764 [.70, .82]``."""
    value = _short(row["value"], 3)
    return value if pd.isna(row["low"]) else f"{value} [{_short(row['low'], 2)}, {_short(row['high'], 2)}]"


def _short(value: float, digits: int) -> str:
    """No zero before the point, and four figures from ten on."""
    text = f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.4g}"
    return re.sub(r"^(-?)0(?=\.)", r"\1", text)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return "" if value is None else _escaped(str(value))


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
