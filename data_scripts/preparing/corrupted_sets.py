"""What the two scripts that write corrupted sets share: their options, and what to do with them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import pandas as pd
import typer

from medrobust_lib.corruptions.stored import Layout, read_ledger
from medrobust_lib.corruptions.suites import SEVERITIES
from medrobust_lib.corruptions.writing import CorruptedSets, write_benchmark
from medrobust_lib.files import reported_errors

LayoutName = StrEnum("LayoutName", {name.replace("-", "_"): name for name in get_args(Layout)})

Named = Annotated[
    list[str] | None,
    typer.Argument(metavar="[DATASETS]...", help="Data sets, as after --datasets.", show_default=False),
]
Datasets = Annotated[list[str] | None, typer.Option(help="Data sets by id, one or more.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Folder of the collection.", show_default=False)]
Severities = Annotated[str, typer.Option(help="Numbers from 1 to 5, with commas.")]
Corruptions = Annotated[str, typer.Option(help="Names, with commas; all of the suite by default.", show_default=False)]
LayoutOption = Annotated[
    LayoutName | None,
    typer.Option(help="One file per severity, or the five severities in one file.", show_default=False),
]
Split = Annotated[str, typer.Option(help="train, val or test.")]
Number = Annotated[int | None, typer.Option(help="Images of each data set, drawn by class; all by default.", min=1)]
ImageSize = Annotated[int | None, typer.Option(help="Side in pixels; the source's own by default.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Of the corruptions and of the images drawn by --n.", min=0)]
Jobs = Annotated[int, typer.Option(help="Worker processes; -1 is one per core.")]
Root = Annotated[
    Path | None,
    typer.Option(help="Folder of the clean data sets; default MEDROBUST_DATA.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be written and how large it is.")]
Check = Annotated[bool, typer.Option("--check", help="Only compare what is there with its manifest.")]

ALL_SEVERITIES = ",".join(map(str, SEVERITIES))


def run_command(folder: Path, datasets: list[str], *, dry_run: bool, check: bool, jobs: int, **options: Any) -> None:
    """Write a collection, or plan or check it, and report on standard output; what a user can mend ends in one line."""
    with reported_errors():
        if check:
            table = check_benchmark(folder)
            spoilt = table[table["state"] != "whole"]
            for row in spoilt.itertuples():
                typer.echo(f"{row.file}  {row.state}")
            if len(spoilt):
                raise ValueError(
                    f"{len(spoilt)} of {len(table)} files in {folder} are not as written; delete what has changed "
                    "and run the script again without --check"
                )
            typer.echo(f"{folder}  {len(table)} files verified")
            return
        names = [name for text in datasets for name in text.split(",") if name]
        options["severities"] = tuple(map(_severity, _listed(options["severities"])))
        options["corruptions"] = _listed(options["corruptions"]) or None
        if dry_run:
            typer.echo(CorruptedSets(folder, names, **options))
            return
        table = write_benchmark(folder, names, jobs=jobs, **options)
        typer.echo(f"{folder}  ready, {len(table)} files with their SHA-256 in table.csv")


def check_benchmark(folder: str | Path) -> pd.DataFrame:
    """Compare every file of a collection with its manifest; reads all of them.

    Returns
    -------
    DataFrame
        ``table.csv`` with the column "state": "whole", "missing", "truncated" or "changed".

    Raises
    ------
    ValueError
        The folder has no manifest of ours, or its run did not finish any data set.
    """
    ledger = read_ledger(Path(folder))
    if ledger is None:
        raise ValueError(f"{folder} has no manifest of corrupted sets, so nothing in it can be verified")
    return pd.DataFrame(list(ledger.rows.values())).assign(state=list(map(ledger.state, ledger.rows)))


def _listed(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _severity(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"severity {text!r} is no number; give some of {ALL_SEVERITIES}")
    return int(text)
