"""The command line: ``medrobust run | models | datasets | leaderboard | doctor``."""

import json
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
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/latest"),
    folder: Annotated[Path | None, typer.Option("--notebooks", help="Folder of the notebooks.")] = None,
    describe: Annotated[bool, typer.Option("--describe", help="List the parameters and stop.")] = False,
) -> None:
    """Execute notebooks headlessly and write a report."""
    from medrobust_lib import runner
    from medrobust_lib.report import write_report

    chosen = runner.find_notebooks(notebooks or (), folder=folder)
    if describe:
        _describe(chosen)
        return
    parameters = runner.parse_parameters(parameter or (), file)
    executed = runner.run_notebooks(chosen, parameters, out, announce=lambda line: typer.echo(line))
    index = write_report(out)
    typer.echo(f"{len(executed)} notebooks in {sum(e.seconds for e in executed):.1f} s")
    typer.echo(f"report: {index}")


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List the models that `load_model` knows."""
    from medrobust_lib import list_models

    _show(list_models(), as_json=as_json, title="models", columns=MODEL_COLUMNS)


@app.command()
def datasets(
    root: Annotated[Path | None, typer.Option(help="Folder of downloaded data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List the data sets that `load_dataset` knows."""
    from medrobust_lib import list_datasets

    _show(list_datasets(root=root), as_json=as_json, title="data sets", columns=DATASET_COLUMNS)


@app.command()
def leaderboard(
    runs: Annotated[Path, typer.Argument(help="Folder that holds runs.")] = Path("runs"),
    metric: Annotated[str | None, typer.Option(help="Only this metric, best value first.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Collect the metrics of all runs, from their result cards only."""
    from medrobust_lib import experiments

    table = experiments.leaderboard(experiments.read_cards(runs))
    if metric is not None:
        known = sorted(table["metric"].unique())
        if metric not in known:
            raise ValueError(f"unknown metric {metric!r}; the cards hold {', '.join(known)}")
        table = table[table["metric"] == metric].sort_values("value", ascending=False)
    if csv is not None:
        experiments.write_text_atomically(csv, table.to_csv(index=False))
    _show(table, as_json=as_json, title=f"leaderboard of {runs}")


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
    from medrobust_lib.runner import notebook_parameters

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


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return "" if value is None else _escaped(str(value))


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
