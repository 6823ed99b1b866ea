"""Tables in a terminal: lists and rankings."""

import json
import re
from collections.abc import Sequence

import pandas as pd
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medrobust_lib.experiments.cards import lower_is_better


def show(table: pd.DataFrame, *, title: str, columns: Sequence[str] | None = None, right: Sequence[str] = ()) -> None:
    """Print a table, or some of its columns; ``right`` are set as numbers, which are never broken over lines."""
    table = table[list(columns)] if columns else table
    console = Console(highlight=False)
    shown = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(table.columns):
        number = column in right or (pd.api.types.is_numeric_dtype(table[column]) and table[column].dtype != bool)
        name, justify = str(column).replace("_", " "), "right" if number else "left"
        # A number that is broken over lines cannot be read; where it gets narrow, the names are folded.
        shown.add_column(name, justify=justify, overflow="fold", no_wrap=number or (position == 0 and not right))
    for row in table.itertuples(index=False):
        shown.add_row(*(_cell(value) for value in row))
    console.print(shown)


def show_json(table: pd.DataFrame) -> None:
    """Print every row and column as JSON records."""
    typer.echo(json.dumps(json.loads(table.to_json(orient="records")), indent=2))


def show_ranking(table: pd.DataFrame) -> None:
    """Print one narrow table per metric and data set; a result that several runs agree on is one row."""
    console = Console(highlight=False)
    for (metric, dataset), block in table.groupby(["metric", "dataset"], sort=False):
        best = "lowest" if lower_is_better(metric) else "highest"
        console.print(f"[bold]{escape(metric.replace('_', ' '))}[/] on {escape(dataset)}, {best} first")
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        shown.add_column("#", justify="right")
        shown.add_column("value [95 %]" if block["low"].notna().any() else "value", no_wrap=True)
        shown.add_column("n", justify="right", no_wrap=True)
        for column in ("model", "of", "run"):
            shown.add_column(column, overflow="fold")
        same = ["parameters", "model", "of", "value", "n"]
        runs = block.groupby(same, sort=False, dropna=False)["run"].unique()
        results = block.drop_duplicates(same)
        ascending = lower_is_better(metric)
        ranks = results["value"].rank(method="min", ascending=ascending, na_option="bottom").astype(int)
        for rank, names, (_, row) in zip(ranks, runs, results.iterrows(), strict=True):
            run = f"{names[0]} (+{len(names) - 1} more)" if len(names) > 1 else names[0]
            cells = (str(rank), interval_text(row), str(row["n"]), row["model"], row["of"], run)
            shown.add_row(*map(escape, cells))
        console.print(shown)


def interval_text(row: pd.Series) -> str:
    """A value and its interval, as short as they can be told: ``.764 [.70, .82]``."""
    value = short_number(row["value"], 3)
    return value if pd.isna(row["low"]) else f"{value} [{short_number(row['low'], 2)}, {short_number(row['high'], 2)}]"


def short_number(value: float, digits: int) -> str:
    """No zero before the point, and four figures from ten on; a dash for what could not be measured."""
    if pd.isna(value):
        return "–"
    text = f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.4g}"
    return re.sub(r"^(-?)0(?=\.)", r"\1", text)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return "" if value is None else escape(str(value))
