"""The commands on one's own images, ``medrobust certify`` and ``medrobust corrupt``, and what other commands share.

They import what they need when they are called, so that ``--help`` answers at once.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from medrobust_lib.checks import check_choice, closest
from medrobust_lib.places import DEVICE_VARIABLE, DTYPE_VARIABLE, default_runs_dir

if TYPE_CHECKING:
    from medrobust_lib.smoothing.paper_methods import PaperMethod

_VARIABLES = {"device": DEVICE_VARIABLE, "dtype": DTYPE_VARIABLE}
_SHOWN_FILES, _SHOWN_CHARACTERS, _HEADLINES = 5, 28, 2


def _for_all_models(context: typer.Context, option: typer.CallbackParam, value: str | None) -> str | None:
    """Make the value the default of every model that is loaded, also in kernels and worker processes."""
    if value is not None and not context.resilient_parsing:
        from medrobust_lib.models.loading import preferred
        from medrobust_lib.runner import environment_variables

        named = {_VARIABLES[option.name]: value}
        with environment_variables(named):
            preferred()
        context.with_resource(environment_variables(named))
    return value


def _some_jobs(jobs: int) -> int:
    if jobs != -1 and jobs < 1:
        raise ValueError(f"--jobs {jobs}: give the number of worker processes, or -1 for one per core")
    return jobs


Device = Annotated[
    str | None, Option(callback=_for_all_models, help="Where models compute: cpu, cuda, mps; default: the accelerator.")
]
Dtype = Annotated[
    str | None,
    Option(callback=_for_all_models, help="Precision of models: float32, bfloat16, float16, int8; default: by device."),
]
Data = Annotated[
    str, Argument(metavar="DATA", help="folder:PATH, csv:PATH, an id of `medrobust datasets`, or a bare path.")
]
Words = Annotated[
    str,
    Option(
        "--words",
        "--classes",
        help="What own classes are called: a YAML file or YAML with class_names, templates, like; or the id of a set.",
    ),
]
Number = Annotated[int | None, Option(help="So many images, a seeded draw; default: all.")]
Seed = Annotated[int, Option(help="Of the draw of images, and of the noise.")]
NoThumbnails = Annotated[bool, Option("--no-thumbnails", help="Keep no small pictures of single images.")]
Jobs = Annotated[int, Option(callback=_some_jobs, help="Images at a time; -1: one per core.")]


@contextlib.contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        command = shlex.join(["medrobust", *sys.argv[1:]])
        typer.echo(f"stopped; what is finished is kept. It goes on with\n    {command}", err=True)
        raise typer.Exit(130) from error


@_told_how_to_go_on()
def certify(
    data: Data,
    model: Annotated[str, Option(help="An id of `medrobust models`, local-dir:PATH, ...")],
    sigma: Annotated[float | None, Option(help="Noise level; default: 0.25 ([0, 1] pixels).")] = None,
    radius: Annotated[float | None, Option(help="Radius asked for; default: 0.1 (L2, [0, 1] pixels).")] = None,
    words: Words = "",
    method: Annotated[str, Option(help="zero-shot, few-shot, PromptSmooth, denoised, ...")] = "zero-shot",
    train: Annotated[str | None, Option(metavar="DATA", help="Images that few-shot methods learn from.")] = None,
    shots: Annotated[int | None, Option(help="Of each class, where something is learned; default: 16.")] = None,
    n: Annotated[int, Option(help="Noisy copies of an image that count, at most; 100 more choose its class.")] = 1000,
    alpha: Annotated[float, Option(help="A certificate is false with at most this probability.")] = 0.001,
    n_images: Number = None,
    seed: Seed = 0,
    perturbation: Annotated[str, Option(help="pixel-noise, contrast, brightness, gamma or blur.")] = "pixel-noise",
    sampling: Annotated[
        Literal["sequential", "fixed"], Option(help="Stop early where the answer is clear, or not.")
    ] = "sequential",
    out: Annotated[
        Path | None, Option(help="Run folder; default: below the project's runs, named by what is asked.")
    ] = None,
    no_thumbnails: NoThumbnails = False,
    jobs: Jobs = 1,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Prove how many images keep their right answer, and say which do not.

    The same command goes on after an interruption. Not for clinical use.
    """
    from medrobust_lib.experiments.cards import read_card
    from medrobust_lib.experiments.images import NO_THUMBNAILS_VARIABLE, read_image_table, worst_first
    from medrobust_lib.experiments.report import show, write_report
    from medrobust_lib.runner import check_run_dir, environment_variables, mark_run_dir
    from medrobust_lib.smoothing.perturbations import find_perturbation
    from medrobust_lib.studies.certify_step import certify_alone
    from medrobust_lib.studies.steps import Workers

    family = find_perturbation(perturbation)
    cell = certify_alone(
        _understood(data, words),
        model,
        train=None if train is None else _understood(train, words),
        method=_method(method, shots=shots, train=train),
        radius=min(r for r in family.radii if r > 0) if radius is None else radius,
        sigmas=(family.usual_sigma if sigma is None else sigma,),
        perturbation=perturbation,
        n=n,
        alpha=alpha,
        sampling=sampling,
        grid={"n_images": n_images, "seeds": (seed,), **({} if dtype is None else {"dtype": dtype})},
    )
    folder = check_run_dir(default_runs_dir() / cell.run_name if out is None else out)
    typer.echo(f"run folder: {folder}\nCtrl-C stops; finished images are kept, and the same command goes on")
    with environment_variables({NO_THUMBNAILS_VARIABLE: "1"} if no_thumbnails else {}):
        cell.run(mark_run_dir(folder), workers=Workers(jobs))
    card = read_card(folder / "cards" / f"{cell.card_name}.json")
    typer.echo("\n".join(["", *card["findings"], "", *(f"- {note}" for note in card["notes"]), ""]))
    table = folder / "cards" / f"{card['images']}.csv"
    rows = read_image_table(table)
    rows = rows.iloc[worst_first(rows)[:_SHOWN_FILES]].replace(
        {"file": rf"^.+(?=.{{{_SHOWN_CHARACTERS}}}$)"}, "…", regex=True
    )
    columns = ["file", "class_name", "predicted_name", "confidence", "radius"]
    show(rows[columns], title="look at these images first, wrong and surest at the top")
    typer.echo(f"every image: {table}\nreport: {write_report(folder)}")


@_told_how_to_go_on()
def corrupt(
    data: Data,
    out: Annotated[Path, Option(help="A new folder, or one that the same command began.")],
    suite: Annotated[str, Option(help="medimeta-c, medmnist-c or clinical-c.")] = "medimeta-c",
    corruption: Annotated[list[str] | None, Option(help="Of the suite, several times; default: all.")] = None,
    severity: Annotated[list[int] | None, Option(help="1 to 5, several times; default: 3.")] = None,
    kind: Annotated[str, Option(help="What own images show, where the suite asks: radiograph, fundus, ...")] = "",
    split: Annotated[str, Option(help="train, val or test; all: every split there is.")] = "test",
    file_format: Annotated[
        Literal["png", "npz"], Option("--format", help="Image files in class folders, or the benchmark's arrays.")
    ] = "png",
    n_images: Number = None,
    image_size: Annotated[int | None, Option(help="Side in pixels; default: as `load_dataset` gives them.")] = None,
    seed: Seed = 0,
    jobs: Jobs = 1,
) -> None:
    """Write images that got worse, in class folders that every other command reads.

    The same command goes on after an interruption.
    """
    from medrobust_lib.corruptions.writing import write_benchmark, write_folders
    from medrobust_lib.data.readers import SPLITS
    from medrobust_lib.data.registry import load_dataset, open_split

    dataset, severities = _understood(data), tuple(dict.fromkeys(severity or (3,)))
    corruption = list(dict.fromkeys(corruption or ())) or None
    drawn = {"n": n_images, "image_size": image_size}
    how = {"suite": suite, "corruptions": corruption, "severities": severities, "seed": seed, "jobs": jobs, **drawn}
    splits = (split,)
    if split == "all":
        splits = ("test",)
        for one in SPLITS:
            with contextlib.suppress(ValueError):  # it has no such split; what else is wrong is met in reading
                splits = open_split(dataset, split=one).splits or splits
    if file_format == "npz" and kind:
        raise ValueError(f"--kind {kind} is for --format png: arrays are named after their data set alone")
    if file_format == "npz":
        for one in splits:
            write_benchmark(out, [dataset], layout="per-severity", split=one, **how)
        sets = [load_dataset(dataset, split=one, seed=seed, **drawn) for one in splits]
    else:
        sets = write_folders(out, dataset, kind=kind, splits=splits, **how)
    first = sets[0]
    height, width = first.images.shape[1:3]
    size = f"{width} x {height} px, {first.provenance['resized'] or 'as they are'}"
    named = ", ".join(corruption or ["every corruption"])
    typer.echo(
        f"{sum(map(len, sets))} images of {first.id} (split {', '.join(one.split for one in sets)}; {size}) under "
        f"{named} of {suite} at severity {', '.join(map(str, severities))}: {out}\n"
        f"licence: {first.licence}; that of the source goes with them. Not for clinical use."
    )
    if file_format == "png":
        below = "" if len(corruption or ()) == len(severities) == 1 else "/CORRUPTION/SEVERITY"
        typer.echo(f"read them as folder:{out}{below}")


def show_headlines(cards: Sequence[Mapping[str, Any]]) -> None:
    """Print the first numbers of each card."""
    import pandas as pd

    from medrobust_lib.experiments.report import interval_text, show

    rows = [
        (card["notebook"], row.name.replace("_", " "), interval_text(row), row.of)
        for card in cards
        for row in pd.DataFrame(card["metrics"][:_HEADLINES]).itertuples(index=False)
    ]
    if rows:
        table = pd.DataFrame(rows, columns=["card", "metric", "value [95 %]", "measured on"])
        show(table, title="the first numbers of each card", right=["value [95 %]"])


def _understood(data: str, words: str = "") -> str:
    """The id of what was named, a bare path among them, its paths absolute, with the words of its classes."""
    from medrobust_lib.data.registry import DATASETS, path_and_query
    from medrobust_lib.parameters import absolute_ids, stated_id

    path = Path(path_and_query(data)[0]).expanduser()
    if not data.startswith(("folder:", "csv:")) and os.path.exists(path):  # noqa: PTH110 - what is too long a path is none
        data = f"{'folder' if path.is_dir() else 'csv'}:{data}"
        typer.echo(f"{path} is read as {data}")
    elif ":" not in data and data not in DATASETS:
        near = closest(path.name, [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else [], n=1)
        hint = f" Did you mean {str(path.with_name(near[0]))!r}?" if near else ""
        raise ValueError(
            f"no folder or table {data!r} is here, and no data set has this id.{hint} See: medrobust datasets"
        )
    return stated_id(absolute_ids("dataset", data), words=words)


def _method(named: str, *, shots: int | None, train: str | None) -> "PaperMethod":
    """The method of a name, in any case."""
    from medrobust_lib.smoothing.paper_methods import LEARNED_METHODS, READS, PaperMethod

    by_name = {"few-shot": "few-shot PromptSmooth"} | {name.casefold(): name for name in READS}
    name = by_name.get(named.casefold(), "")
    if not name:
        check_choice("method", named, ["few-shot", *READS])
    for option, value in (("--shots", shots), ("--train", train)):
        if value is not None and name in READS and name not in LEARNED_METHODS:
            raise ValueError(f"{option} {value}: {name} learns nothing; leave {option} out, or name another --method")
    return PaperMethod(name, **({} if shots is None else {"shots": shots}))
