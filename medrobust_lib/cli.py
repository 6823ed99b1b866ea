"""The command line: one function for each command, those on one's own images in `medrobust_lib.image_commands`.

Commands import what they need when they are called, so that ``--help`` answers at once.
"""

import contextlib
import inspect
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from medrobust_lib.checks import closest
from medrobust_lib.files import reported_errors, told
from medrobust_lib.image_commands import Device, Dtype, NoThumbnails, certify, corrupt, show_headlines
from medrobust_lib.places import VERSION, default_runs_dir

if TYPE_CHECKING:
    from medrobust_lib.doctor import Finding
    from medrobust_lib.studies.execute import Finished

# What fits a terminal; --json gives everything, with hashes, sources and citations.
MODEL_COLUMNS = ("id", "kind", "image_size", "learns", "available_offline")
VLM_COLUMNS = ("id", "family", "image_size", "parameters", "available_offline")
DATASET_COLUMNS = ("id", "modality", "classes", "test", "available")
_SHOWN_ROWS, _MOST_COLUMNS = 120, 7
# What the first look shows.
_QUICK: Mapping[str, Any] = MappingProxyType(
    {"models": ("demo-clip", "demo-clip-vit"), "dataset": "phantom/blood", "images": 48, "corruption": "zoom_blur",
     "severity": 3, "sigma": 0.1, "n": 1000}
)  # fmt: skip

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(certify)
app.command()(corrupt)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"medrobust {VERSION}")
        raise typer.Exit


@app.callback()
def shared(
    version: Annotated[bool, Option("--version", help="Print it and stop.", is_eager=True, callback=_version)] = False,
) -> None:
    """Measure how far a medical vision-language model can be trusted when the image gets worse.

    For teaching and research, not for clinical use.
    """


def main() -> None:
    """Entry point: expected errors become one readable message and exit code 1, the project's own warnings notes."""
    with reported_errors(), warnings.catch_warnings():
        warnings.showwarning = _noted(warnings.showwarning)
        app()


@app.command()
def run(
    notebooks: Annotated[list[str] | None, Argument(help="Numbers, for example 01 02; default: all.")] = None,
    parameter: Annotated[
        list[str] | None, Option("-p", "--parameter", help="NAME=VALUE; 'NAME=[ONE, TWO]', 'NAME={KEY: VALUE}'.")
    ] = None,
    file: Annotated[Path | None, Option("-f", "--file", help="YAML file of parameters.")] = None,
    out: Annotated[Path | None, Option(help="Run folder; default: a new one in the project, runs/DATE_TIME.")] = None,
    folder: Annotated[Path | None, Option("--notebooks", help="Folder of the notebooks.")] = None,
    describe: Annotated[bool, Option("--describe", help="List the parameters and stop.")] = False,
    jobs: Annotated[int, Option(help="Notebooks at a time; -1: one per core.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
    no_thumbnails: NoThumbnails = False,
) -> None:
    """Execute notebooks headlessly and write a report.

    In an existing run folder the executed notebooks replace their own earlier results and nothing else.
    """
    from medrobust_lib import runner
    from medrobust_lib.experiments import read_cards
    from medrobust_lib.experiments.images import NO_THUMBNAILS_VARIABLE
    from medrobust_lib.experiments.report import write_report
    from medrobust_lib.parameters import as_written, notebook_parameters, parse_parameters

    started = time.monotonic()
    chosen = runner.find_notebooks(notebooks or (), folder=folder)
    if describe:
        for number, path in chosen.items():
            typer.echo(f"{number}  {path.stem}")
            for name, spec in notebook_parameters(path).items():
                typer.echo(f"    {name}: {spec['inferred_type_name']} = {spec['default']}  # {spec['help']}")
        return
    parameters = parse_parameters(parameter or (), file)
    how = {"announce": typer.echo, "report": _report_so_far, "jobs": jobs}
    try:
        with runner.environment_variables({NO_THUMBNAILS_VARIABLE: "1"} if no_thumbnails else {}):
            executed = runner.run_notebooks(chosen, parameters, out, **how)
    except runner.NotebookError as error:
        _report_what_there_is(error.run_dir)
        raise
    except runner.RunStopped as stopped:
        _report_what_there_is(stopped.run_dir)
        # What only finished notebooks know would be refused for the others.
        known = {name for number in stopped.left for name in notebook_parameters(chosen[number])}
        given = [f"{name}={as_written(value)}" for name, value in parameters.items() if name in known]
        options = [word for assignment in given for word in ("-p", assignment)]
        options += ["--notebooks", str(folder)] if folder else []
        options += ["--no-thumbnails"] if no_thumbnails else []
        command = ["medrobust", "run", *stopped.left, *options, "--out", str(stopped.run_dir), "--jobs", str(jobs)]
        typer.echo(f"stopped; {stopped}. It goes on with\n    {shlex.join(command)}", err=True)
        raise typer.Exit(130) from stopped
    plural = "s" if len(executed) > 1 else ""
    typer.echo(f"{len(executed)} notebook{plural} in {time.monotonic() - started:.1f} s")
    run_dir = executed[0].run_dir
    report = write_report(run_dir)
    cards = read_cards(run_dir, nested=False) if any((run_dir / "cards").glob("*.json")) else []
    show_headlines([card for card in cards if card["notebook"] in chosen])
    typer.echo(f"report: {report}")
    if notes := {note for card in cards for note in card["notes"]}:
        typer.echo(f"to know beside the numbers, in the report: {len(notes)} note{'s' if len(notes) > 1 else ''}")


@app.command()
def quick(device: Device = None, dtype: Dtype = None) -> None:
    """Take a first look: a corrupted image, a certificate and a small leaderboard, in the terminal."""
    from medrobust_lib import metrics
    from medrobust_lib.corruptions.suites import corrupted
    from medrobust_lib.data.registry import load_dataset
    from medrobust_lib.evaluation import Candidate, accuracy_table, corruption_answers
    from medrobust_lib.experiments.report import NOTICE, show, show_images, show_text
    from medrobust_lib.models.loading import load_model
    from medrobust_lib.smoothing.certify import certify
    from medrobust_lib.smoothing.methods import PromptClassifier

    show_text(f"[bold]medrobust, a first look.[/] The images are synthetic phantoms. {NOTICE}")
    data = load_dataset(_QUICK["dataset"], n=_QUICK["images"])
    texts = data.classes, data.templates[:1]
    models = {id: load_model(id) for id in _QUICK["models"]}
    candidates = {id: Candidate(model, model.class_features(*texts)) for id, model in models.items()}
    severity, corruption, first = _QUICK["severity"], _QUICK["corruption"], _QUICK["models"][0]
    answers = corruption_answers(candidates, data, severities=[severity])
    clean, blurred = answers[first, "clean", 0], answers[first, corruption, severity]
    # The first image that shows the point: named rightly as it is, wrongly when it is corrupted.
    place = int(((clean == data.labels) & (blurred != data.labels)).nonzero()[0][0])

    show_text(f"\n[bold]1. An image, clean and corrupted[/] ({data.id}, {corruption} at severity {severity} of 5)")
    show_images([data.images[place], corrupted(data, corruption, severity=severity).images[place]])
    before, after = (data.classes[answer[place]] for answer in (clean, blurred))
    show_text(f"it is: {data.classes[data.labels[place]]}; {first} says: {before} (clean), {after} (corrupted)")

    show_text("\n[bold]2. A certificate: what no small change of this image can do[/]")
    classifier = PromptClassifier(models[first], candidates[first].class_features)
    pixels = models[first].prepare(data.images[place : place + 1])[0]
    address = {"dataset": data.id, "index": int(data.indices[place])}
    certificate = certify(classifier, pixels, sigma=_QUICK["sigma"], n=_QUICK["n"], **address)
    named = "" if certificate.abstained else f"{first}, {data.classes[certificate.predicted]}: "
    show_text(f"{named}{certificate}")

    show_text(
        f"\n[bold]3. Two models[/] on {len(data)} such images, clean and under seven corruptions at severity {severity}"
        f": accuracy (guessing: {1 / len(data.classes):.3f}), and mCE: the error under each corruption in percent of "
        f"{first}'s, averaged; less is better"
    )
    errors = metrics.corruption_error_table(accuracy_table(answers, data), reference=first).sort_values("mce")
    errors["clean"], errors["mCE"] = 1 - errors["clean_error"], errors["mce"].round(1)
    errors = errors.rename(columns={"average_accuracy": "corrupted"})
    numbers = ["clean", "corrupted", "mCE"]
    show(errors[["model", *numbers]].round(3), title="the fewest errors first", right=numbers)
    show_text(
        "Next: [bold]make run[/] tells the whole story and writes runs/demo/index.html, [bold]make lab[/] opens the "
        "notebooks, [bold]medrobust run 07 -p dataset=folder:PATH[/] looks at your own images; see README.md."
    )


@app.command()
def study(
    file: Annotated[Path, Argument(help="YAML file: models, datasets, steps; see docs/studies.md.")],
    out: Annotated[Path | None, Option(help="Folder of the study; default: runs/NAME.")] = None,
    jobs: Annotated[int, Option(help="Cells at a time on this machine; -1: one per core.")] = 1,
    cluster: Annotated[str | None, Option(help="Scheduler of dask.distributed, tcp://HOST:PORT.")] = None,
    spread: Annotated[str, Option(help="Share out cells, or the images of a cell.")] = "cells",
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would run and what it costs, and stop.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    notebooks: Annotated[Path | None, Option(help="Folder of the notebooks.")] = None,
) -> None:
    """Run a grid of models, data sets and steps; the same command goes on after an interruption."""
    from medrobust_lib.experiments.report import show_ranking
    from medrobust_lib.studies.study_file import read_study

    read = read_study(file, notebooks=notebooks)
    read = read if dtype is None else replace(read, dtype=dtype)
    if dry_run:
        from medrobust_lib.studies.cells import show_estimates

        show_estimates(read, notebooks=notebooks)
        return
    from medrobust_lib.studies.execute import run_study

    folder = default_runs_dir() / read.name if out is None else out
    typer.echo(f"study folder: {folder}")
    how = {"jobs": jobs, "cluster": cluster, "spread": spread, "notebooks": notebooks}
    finished = run_study(read, folder, announce=typer.echo, **how)
    table = finished.leaderboard
    if table.empty:
        typer.echo("no cell has a result")
    elif len(table) <= _SHOWN_ROWS:
        # The step and the seed tell the cells of one study apart; their whole names would not fit.
        show_ranking(table.assign(run=table["notebook"] + table["seed"].map(lambda seed: f" seed {seed}")))
    else:
        typer.echo(f"{len(table)} results; see them with: medrobust leaderboard {folder} --metric NAME")
    typer.echo(f"{finished.done} of {finished.cells} cells are done")
    typer.echo(f"leaderboard: {finished.folder / 'leaderboard.csv'}")
    typer.echo(f"page: {finished.folder / 'index.html'}")
    _fail_with(finished)


@app.command()
def reproduce(
    name: Annotated[str | None, Argument(help="A protocol; none: list them all.")] = None,
    part: Annotated[
        list[str] | None, Argument(metavar="[model=ID] [dataset=ID] [step=NUMBER]", help="As after --only.")
    ] = None,
    out: Annotated[Path | None, Option(help="Folder of the results; default: runs/NAME.")] = None,
    only: Annotated[list[str] | None, Option(help="model=ID, dataset=ID or step=NUMBER: run this part.")] = None,
    demo: Annotated[bool, Option("--demo", help="Phantoms and embedded models, small numbers.")] = False,
    sequential: Annotated[bool, Option("--sequential", help="Sequential sampling, at the same alpha.")] = False,
    jobs: Annotated[int, Option(help="Cells at a time on this machine; -1: one per core.")] = 1,
    cluster: Annotated[str | None, Option(help="Scheduler of dask.distributed, tcp://HOST:PORT.")] = None,
    spread: Annotated[str, Option(help="Share out cells, or the images of a cell.")] = "cells",
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would run and what it costs, and stop.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Run a published table as it was published, and print it beside the published numbers."""
    from medrobust_lib.experiments.report import show
    from medrobust_lib.studies import protocols

    if name is None:
        _show_protocols()
        return
    read = protocols.read_protocol(name, only=[*(only or ()), *(part or ())], demo=demo, sequential=sequential)
    read = read if dtype is None else replace(read, study=replace(read.study, dtype=dtype))
    cells = read.cells()
    if dry_run:
        from medrobust_lib.studies.cells import show_estimates

        show_estimates(read.study, cells)
        for line in read.missing():
            typer.echo(f"needs {line}")
        return
    read.check()
    from medrobust_lib.studies.execute import run_study
    from medrobust_lib.studies.reproduction import in_the_papers_layout, write_reproduction

    variant = "".join(f"-{word}" for word, chosen in (("demo", demo), ("sequential", sequential)) if chosen)
    folder = default_runs_dir() / f"{name}{variant}" if out is None else out
    typer.echo(f"folder: {folder}")
    how = {"jobs": jobs, "cluster": cluster, "spread": spread, "cells": cells}
    finished = run_study(read.study, folder, announce=typer.echo, **how)
    table = write_reproduction(read, finished.folder, finished.failures)
    mark = " (DEMO: synthetic phantoms, embedded models)" if demo else ""
    typer.echo(f"{read.published.paper}, {read.published.table}{mark}; under our rows stand the published ones")
    for (dataset, model), block in in_the_papers_layout(table).groupby(["dataset", "model"], sort=False):
        block = block.droplevel(["dataset", "model"])
        if len(block.columns) > _MOST_COLUMNS:  # of a terminal's width
            block = block.T.rename_axis("")
            block.columns = [": ".join(key) for key in block.columns]
        printed = block.reset_index()
        show(printed, title=f"{model} on {dataset}", right=[name for name in printed if name in block.columns])
    typer.echo("; ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items()))
    if read.part:
        typer.echo(f"only a part was asked for: {read.part}")
    typer.echo(f"{finished.done} of {finished.cells} cells are done")
    typer.echo(f"every number: {finished.folder / 'comparison.csv'}\npage: {finished.folder / 'reproduction.html'}")
    _fail_with(finished)


@app.command()
def models(as_json: Annotated[bool, Option("--json", help="JSON instead of a table.")] = False) -> None:
    """List the models that `load_model` knows, and the generative ones of `load_vlm`."""
    import pandas as pd

    from medrobust_lib.experiments.report import show, show_json
    from medrobust_lib.models.loading import list_models, list_vlms

    if as_json:
        show_json(pd.concat([list_models(), list_vlms()]))
        return
    table = list_models()
    prompts = table["prompts"].map({"yes": "prompts"}).fillna("")
    adapters = (~table["adapters"].isin(["", "refused"])).map({True: "adapters", False: ""})
    table["learns"] = [", ".join(filter(None, pair)) for pair in zip(prompts, adapters, strict=True)]
    show(table[list(MODEL_COLUMNS)], title="models")
    show(list_vlms()[list(VLM_COLUMNS)], title="generative models (vlm)")


@app.command()
def datasets(
    root: Annotated[Path | None, Option(help="Folder of downloaded data.")] = None,
    as_json: Annotated[bool, Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List the data sets that `load_dataset` knows, and the scenarios of MM-SafetyBench for notebook 06."""
    from medrobust_lib.data.questions import list_scenarios
    from medrobust_lib.data.registry import QUESTIONS_PREFIX, list_datasets
    from medrobust_lib.experiments.report import show, show_json

    if root is not None:
        any(root.iterdir())  # a folder that cannot be read is not one without data
    if as_json:
        show_json(list_datasets(root=root))
        return
    show(list_datasets(root=root)[list(DATASET_COLUMNS)], title="data sets")
    scenarios = list_scenarios(root=root).groupby("scenario", sort=False)
    table = scenarios.agg(questions=("questions", "first"), available=("available", "all")).reset_index()
    table.insert(0, "id", QUESTIONS_PREFIX + table["scenario"].str[:2])
    show(table, title="questions for generative models (images: SD, TYPO, SD_TYPO)")


@app.command()
def leaderboard(
    runs: Annotated[Path | None, Argument(help="Folder that holds runs; default: the project's runs.")] = None,
    metric: Annotated[str | None, Option(help="Only this metric.")] = None,
    by_hand: Annotated[bool, Option("--by-hand", help="Also notebooks run by hand, without `medrobust run`.")] = False,
    csv: Annotated[Path | None, Option(help="Also write all rows and columns as CSV.")] = None,
    markdown: Annotated[Path | None, Option(help="Also write the tables as Markdown.")] = None,
    latex: Annotated[Path | None, Option(help="Also write the tables as LaTeX, for booktabs.")] = None,
    as_json: Annotated[bool, Option("--json", help="All rows and columns as JSON instead of tables.")] = False,
) -> None:
    """Rank what can be compared of the results of all runs, from their result cards only."""
    from medrobust_lib import experiments
    from medrobust_lib.experiments.cards import BY_HAND
    from medrobust_lib.experiments.report import ranking_latex, ranking_markdown, show_json, show_ranking

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
            close = closest(metric, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown metric {metric!r}; the cards hold {', '.join(known)}.{hint}")
        table = table[table["metric"] == metric]
    texts = ((csv, lambda rows: rows.to_csv(index=False)), (markdown, ranking_markdown), (latex, ranking_latex))
    for path, text in texts:
        if path is not None:
            experiments.write_text_atomically(path, text(table))
    typer.echo(f"{len(cards)} cards below {folder}", err=True)
    if as_json:
        show_json(table)
    else:
        show_ranking(table)


@app.command()
def submit(
    result: Annotated[Path, Argument(metavar="CARD_OR_RUN", help="A result card, or a folder of runs: all cards.")],
    to: Annotated[Path, Option(help="Folder of the leaderboard, for `medrobust leaderboard FOLDER`.")],
    allow_versions: Annotated[bool, Option("--allow-versions", help="Also cards of other versions.")] = False,
) -> None:
    """Check result cards and add them to a leaderboard that others add to, all of them or none."""
    from medrobust_lib.doctor import examine_cards
    from medrobust_lib.experiments.cards import read_card, read_cards
    from medrobust_lib.experiments.leaderboards import NAMED_FILES, add_cards

    cards = [read_card(result)] if result.is_file() else read_cards(result)
    _tell(examine_cards(cards, allow_versions=allow_versions))
    for path in add_cards(cards, to):
        left_out = f" ({NAMED_FILES})" if NAMED_FILES in read_card(path).get("notes", ()) else ""
        typer.echo(f"added: {path}{left_out}")


@app.command()
def compare(
    run_a: Annotated[Path, Argument(help="Folder of a study or a run.")],
    run_b: Annotated[Path, Argument(help="Folder of another; differences are B minus A.")],
    csv: Annotated[Path | None, Option(help="Also write the table as CSV.")] = None,
    images: Annotated[Path | None, Option(help="Write as CSV which images only one of them gets right.")] = None,
    as_json: Annotated[bool, Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Compare two runs image by image where both kept their answers, and by their cards elsewhere."""
    from medrobust_lib.data.inspection import first_of
    from medrobust_lib.experiments import write_text_atomically
    from medrobust_lib.experiments.report import show_comparison, show_json
    from medrobust_lib.studies.compare import compare_runs

    compared = compare_runs(run_a, run_b)
    for path, table in ((csv, compared.table), (images, compared.images)):
        if path is not None:
            write_text_atomically(path, table.to_csv(index=False, lineterminator="\n"))
    if as_json:
        show_json(compared.table)
        return
    typer.echo(f"A: {run_a}\nB: {run_b}\ndifference: B minus A, with its 95 % interval")
    show_comparison(compared.table)
    if differ := list(dict.fromkeys(compared.images["file"])):
        typer.echo(f"{len(differ)} images only one of them gets right somewhere: {first_of(differ)} (--images F: all)")
    for note in compared.notes:
        typer.echo(f"note: {note}")
    for name, left in (("A", compared.only_a), ("B", compared.only_b)):
        if left:
            typer.echo(f"only in {name}, without a partner:")
            typer.echo("".join(f"  {line}\n" for line in left), nl=False)


@app.command()
def doctor(
    model: Annotated[str | None, Option(help="Check this model instead, and price a certificate.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Check environment, kernel, weights, data, and demo-clip's reference prediction; or a model."""
    from medrobust_lib.doctor import examine, examine_model

    _tell(examine() if model is None else examine_model(model))


def _tell(findings: "Iterable[Finding]") -> None:
    failed = 0
    for finding in findings:
        failed += not finding.passed
        typer.echo(f"{'ok  ' if finding.passed else 'FAIL'} {finding.check:<20} {finding.detail}")
    if failed:
        raise RuntimeError(f"{failed} check{'s' if failed > 1 else ''} failed, see above")


def _noted(show: Callable[..., None]) -> Callable[..., None]:
    """Print each of the project's warnings once, without the line of code; ``show`` takes those of others."""
    noted: set[str] = set()

    def show_or_note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        callers = (caller.frame.f_globals.get("__name__", "") for caller in inspect.stack(0)[1:])
        warner = next(name for name in callers if name != "warnings")
        if not issubclass(category, UserWarning) or not warner.startswith("medrobust_lib."):
            show(message, category, *place, **more)
        elif str(message) not in noted:
            noted.add(str(message))
            typer.echo(f"note: {message}", err=True)

    return show_or_note


def _report_what_there_is(run_dir: Path) -> None:
    from medrobust_lib.experiments.report import write_report

    try:
        typer.echo(f"report of what was executed: {write_report(run_dir)}")
    except (OSError, ValueError) as error:  # the disk that the notebook has filled
        typer.echo(f"no report of what was executed: {told(error)}", err=True)


def _report_so_far(run_dir: Path, left: Sequence[str]) -> None:
    from medrobust_lib.experiments.report import write_report

    first = not (run_dir / "index.html").exists()
    with contextlib.suppress(OSError, ValueError):  # told at the end, when the whole report is written
        index = write_report(run_dir, running=left)
        if first and left:
            typer.echo(f"the report grows while the rest runs: {index}")


def _fail_with(finished: "Finished") -> None:
    if finished.failures:
        reasons = "\n".join(f"  {label}: {reason}" for label, reason in finished.failures.items())
        failed = f"{len(finished.failures)} of {finished.cells} cells failed"
        raise RuntimeError(f"{failed}; the same command tries them again\n{reasons}")


def _show_protocols() -> None:
    from medrobust_lib.experiments.report import show_text
    from medrobust_lib.studies.protocols import list_protocols

    for one in list_protocols():
        show_text(f"[bold]{one.name}[/]: {one.published.paper}, {one.published.table}. {one.published.title}.")
        for line in [*one.missing(), *filter(None, [one.published.needs])]:
            typer.echo(f"    needs {line}")
    typer.echo(
        "\nmedrobust reproduce NAME runs one; --dry-run prices it; --demo runs it on phantoms with embedded models."
    )
