"""Write the generated parts of README.md and docs/*.md (tables, expected output, citations) and the README's picture.

Each part stands between `<!-- generated: NAME -->` and `<!-- end -->`. Without options the parts are rewritten from
the notebooks, the library's lists, CITATION.cff and docs/demo_results.json. `--snapshot runs/demo` first refreshes
docs/demo_results.json from a run of all notebooks and redraws the picture. `--check` writes nothing and exits with 1,
naming what drifted.
"""

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import medrobust_lib as mr  # before torchvision-based packages

# isort: split
import nbformat
import pandas as pd
import typer
import yaml
from demo_snapshot import INTERVAL, ROOT, SEEDS, SNAPSHOT, changed_parameters, read_snapshot, write_snapshot

from medrobust_lib.data import published, questions
from medrobust_lib.data.published import load_published
from medrobust_lib.experiments import write_text_atomically
from medrobust_lib.models.catalogue import DUAL_ENCODERS, KINDS
from medrobust_lib.runner import find_notebooks
from medrobust_lib.smoothing.certificate import GUARANTEES
from medrobust_lib.studies.cells import estimate_cells
from medrobust_lib.studies.protocols import list_protocols
from medrobust_lib.studies.questions_step import QuestionsCell

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
_NO_BREAK = "\N{NO-BREAK SPACE}"
# Encodings a second of a ViT-B/16 at 224 px in one thread, as benchmarks/scale.py printed them into docs/studies.md.
_DRAWS_A_SECOND, _CORES, _FEW_DAYS = 3.43, 2, 3
MISSING = "not in the present snapshot"
# The files of the library to read for a notebook, in this order; the package's docstring has the same table.
READING = {
    "01": ["data/dataset", "models/dual_encoder", "models/loading", "metrics/classification"],
    "02": ["smoothing/noise", "smoothing/bounds", "smoothing/certificate", "smoothing/certify", "smoothing/sequential"],
    "03": ["smoothing/prompts", "smoothing/methods", "smoothing/paper_methods", "metrics/certified"],
    "03b": ["smoothing/table", "smoothing/denoisers", "data/splits"],
    "04": ["models/adapters", "adaptation/training_images", "adaptation/training", "adaptation/adapting"],
    "05": ["corruptions/functions", "corruptions/suites", "evaluation", "metrics/corruption"],
    "06": ["generative/answers", "generative/oracles", "generative/errors", "generative/certify"],
    "07": ["data/readers", "data/decoding", "data/inspection"],
    "08": ["smoothing/perturbations"],
}
_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Snapshot = Mapping[str, Any]

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    snapshot: Annotated[Path | None, typer.Option(help="Run folder to refresh docs/demo_results.json from.")] = None,
    test_minutes: Annotated[int | None, typer.Option(help="Minutes that `make test` took.")] = None,
    run_minutes: Annotated[
        int | None, typer.Option(help="Minutes that `make run` took there, where that is another machine.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if anything drifted.")] = False,
) -> None:
    """Generate, or check."""
    if check:
        drifted = drift()
        for what in drifted:
            typer.echo(f"drifted: {what}")
        if drifted:
            typer.echo("mend it with `python docs/generate.py` (after a run: `--snapshot runs/demo`)")
            raise typer.Exit(1)
        return
    if snapshot is not None:
        write_snapshot(snapshot, test_minutes=test_minutes, run_minutes=run_minutes)
    from front_picture import PICTURE, drawn_from, save_picture, source_hash

    found = read_snapshot()
    if snapshot is not None or drawn_from() != source_hash(found):
        save_picture(found)
        typer.echo(f"drawn: {PICTURE.relative_to(ROOT)}")
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = with_parts(before, found)
        if after != before:
            write_text_atomically(page, after)
            typer.echo(f"rewritten: {page.relative_to(ROOT)}")


def drift(pages: Sequence[Path] = PAGES, snapshot: Path = SNAPSHOT) -> list[str]:
    """Name everything that no longer follows from its source: parts of pages, the picture, the snapshot."""
    from front_picture import PICTURE, drawn_from, source_hash

    found = read_snapshot(snapshot)
    drifted = []
    for page in pages:
        parts = drifted_parts(page.read_text(encoding="utf-8"), found)
        drifted += [f"{page.name}, part {name!r}" for name in parts]
    if drawn_from() != source_hash(found):
        drifted.append(f"{PICTURE.name}, drawn from another {snapshot.name}")
    for number, entry in found["notebooks"].items():
        changed = changed_parameters(number, entry["parameters"])
        if changed:
            drifted.append(f"{snapshot.name}: notebook {number} has other defaults now ({', '.join(changed)})")
    return drifted


def drifted_parts(text: str, snapshot: Snapshot) -> list[str]:
    """Names of the parts of a page that differ from what would be generated."""
    return [match["name"] for match in _PART.finditer(text) if match[0] != _generated(match, snapshot)]


def with_parts(text: str, snapshot: Snapshot) -> str:
    """Return the page with all its parts generated anew.

    Raises
    ------
    ValueError
        A part has a name that nothing generates.
    """
    return _PART.sub(lambda match: _generated(match, snapshot), text)


def _generated(match: re.Match[str], snapshot: Snapshot) -> str:
    name = match["name"]
    if name not in PARTS:
        raise ValueError(f"no part {name!r} can be generated; there are {', '.join(PARTS)}")
    return f"{match[1]}{PARTS[name](snapshot)}\n{match[3]}"


# ---- the parts ----


def notebooks_part(snapshot: Snapshot) -> str:
    """Table of notebooks: number, title, question, time of the default run."""
    rows = []
    for number, path in find_notebooks().items():
        title, question = title_and_question(path)
        seconds = snapshot["notebooks"].get(number, {}).get("seconds")
        rows.append((number, f"[{title}](notebooks/{path.name})", question, _duration(seconds)))
    return _table(("", "notebook", "the question it answers", "in `make run`"), rows)


def title_and_question(path: Path) -> tuple[str, str]:
    """Title and question of a notebook, from its first cell.

    Raises
    ------
    ValueError
        The first cell has no heading, or no sentence in bold below it.
    """
    first = nbformat.read(path, as_version=4).cells[0].source
    title, question = re.search(r"^# \w+ (.+)$", first, re.MULTILINE), re.search(r"\*\*(.+?)\*\*", first, re.DOTALL)
    if title is None or question is None:
        raise ValueError(f"{path.name}: the first cell needs a line `# NUMBER TITLE` and a question in bold")
    return title[1], " ".join(question[1].split())


def output_part(snapshot: Snapshot) -> str:
    """What the two commands print, shortened: the Makefile's own lines, the runner's, and the times of the snapshot."""
    run, *tests = (_echoed(target) for target in ("run", "unit", "variants", "notebooks"))
    known = find_notebooks()
    lines = []
    for number, entry in snapshot["notebooks"].items():
        if number in known:
            lines.append(f"{known[number].stem} done in {entry['seconds']:.1f} s")
    shown = [*lines[:1], "...", *lines[-1:]] if len(lines) > 2 else lines
    printed = [
        "$ make run",
        run,
        "run folder: .../runs/demo",
        *shown,
        f"{len(lines)} notebooks in {snapshot['run_seconds']:.1f} s",
        "report: .../runs/demo/index.html",
        "",
        "$ make test",
        *(line for lane in tests for line in (lane, "=== ... passed in ... s ===")),
    ]
    minutes, gigabytes = math.ceil(snapshot["run_seconds"] / 60), snapshot["peak_memory_mb"] / 1000
    told = f"On {snapshot['cores']} CPU cores `make run` took about {minutes} minutes"
    if snapshot["test_minutes"]:
        elsewhere = snapshot.get("test_run_minutes")
        told += f" (on slower ones about {elsewhere} minutes, where" if elsewhere else " and"
        told += f" `make test` took about {snapshot['test_minutes']} minutes" + (")" if elsewhere else "")
    told += f"; the largest kernel needed {gigabytes:.1f} GB of memory, its workers aside."
    return "\n".join(["```text", *printed, "```", "", told])


def models_part(snapshot: Snapshot) -> str:
    """Tables of dual encoders and generative models."""
    tables = []
    models = mr.list_models()
    models = models[models["id"].isin([entry.id for entry in DUAL_ENCODERS])]  # a process may have registered others
    for loader, table in (("load_model", models), ("load_vlm", mr.list_vlms())):
        rows = []
        for row in table.itertuples():
            weights = "included" if row.source.startswith("shipped") else "fetch"
            size = "" if pd.isna(row.parameters) else f", {_millions(int(row.parameters))} parameters"
            what = f"{row.family}; {row.image_size}{_NO_BREAK}px{size}"
            rows.append((f"`{row.id}`", what, row.licence, weights))
        tables.append(f"With `{loader}`:\n\n{_table(('id', 'what', 'licence', 'weights'), rows)}")
    return "\n\n".join(tables)


def datasets_part(snapshot: Snapshot) -> str:
    """Table of data sets, a row a collection."""
    listed = mr.list_datasets()
    rows = []
    for collection, part in listed.groupby(listed["id"].str.split("/").str[0], sort=False):
        part = part[~part["id"].str.contains("-site-a")]
        names = ", ".join(part["id"].str.split("/").str[1])
        script = part["script"].str.rsplit(" ", n=1).str[0].iloc[0]
        size = f"{_counts(part['classes'])} classes, {_counts(part['image size'], f'{_NO_BREAK}px')}"
        shown = (f"`{collection}/{{{names}}}`", f"{_joined(part['modality'])}; {size}")
        rows.append((*shown, _joined(part["licence"]), _script(script)))
    count = sum(questions.SCENARIOS.values())
    what = f"{count:,} questions with images that test what a generative model refuses"
    last = f"`{questions.QUESTIONS_PREFIX}{{01, ..., {len(questions.SCENARIOS)}}}`"
    rows.append((last, what, questions.MM_LICENCE, _script(questions.MM_COMMAND)))
    own = "your own images: class folders, or a table; PNG, JPEG, TIFF, DICOM"
    rows.append(("`folder:PATH`, `csv:PATH`", own, "yours", ""))
    return _table(("id", "what", "licence", "script in `data_scripts/`"), rows)


def results_part(snapshot: Snapshot) -> str:
    """Headline results of every notebook in the snapshot."""
    rows = []
    for number, path in find_notebooks().items():
        entry = snapshot["notebooks"].get(number)
        if entry is None:
            rows.append((number, f"{title_and_question(path)[0]}: {MISSING}", "", ""))
            continue
        for place, result in enumerate(entry["results"]):
            number_shown = "" if place else number
            value = f"{_percent(result['value'])}{_spread(result)}"
            rows.append((number_shown, result["what"], value, str(result["n"])))
    header = ("", "measured on synthetic phantoms", f"value ({INTERVAL}, or {SEEDS}: *)", "images")
    return _table(header, rows)


def published_part(snapshot: Snapshot) -> str:
    """What the papers report beside the demo, and what an audit of the printed tables says."""
    header = ("", "reported", "this demo, on phantoms")
    comparison = _table(header, [*_certified_rows(snapshot), *_corruption_rows(snapshot)])
    rows, odd = published.rows_of_table_2(), published.entries_that_do_not_fit()
    suspects = published.constant_predictors()
    audit = (
        f"An audit of RobustMedCLIP's printed tables, from their own numbers: {rows['fits'].sum()} of the {len(rows)} "
        f"rows of Table 2 follow from Table 3; {len(odd)} printed entries elsewhere do not "
        f"({'; '.join(f'{o.source}: {o.model}, {o.entry}' for o in odd.itertuples())}); in {len(suspects)} rows the "
        "accuracies equal the share of one class on clean images and under several corruptions, which is what a "
        "constant answer would print. Notebook 05 shows each."
    )
    return f"{comparison}\n\n{audit}"


def reading_part(snapshot: Snapshot) -> str:
    """Table of the files that tell a notebook's story."""
    rows = []
    for number, names in READING.items():
        rows.append((number, ", ".join(f"[`{name}`](medrobust_lib/{name}.py)" for name in names)))
    return _table(("notebook", "files of `medrobust_lib`, in the order to read them"), rows)


def protocols_part(snapshot: Snapshot) -> str:
    """Table of the papers' protocols: command, needs, and prices from their draws."""
    rows = []
    for protocol in list_protocols():
        cells, published = protocol.cells(), protocol.published
        draws = [one.draws for one in estimate_cells(protocol.study, cells, measured=False)]
        known, more = sum(draw or 0 for draw in draws), " and more" if None in draws else ""
        answers = any(isinstance(cell, QuestionsCell) for cell in cells)
        cores = "not measured" if answers else f"{_long(known / (_CORES * _DRAWS_A_SECOND))}{more}"
        price = f"{known:,} {'answers' if answers else 'encodings'}{more}: {cores}"
        models = {cell.base: None for cell in cells}
        collections = {cell.dataset.split("/")[0]: None for cell in cells if cell.dataset}
        needs = f"{_ticked(models)}; {_ticked(collections)}"
        paper = published.paper.partition(" (")[0]
        rows.append((f"{paper}: {published.table}", f"`{protocol.name}`", needs, price))
    return _table(("paper and table", "`medrobust reproduce`", "models; data", "two CPU cores (estimate)"), rows)


def clinical_part(snapshot: Snapshot) -> str:
    """Table of the suite clinical-c: what each corruption does, its parameter and what it reaches."""
    table = tomllib.loads((Path(mr.__file__).parent / "corruptions" / "clinical.toml").read_text(encoding="utf-8"))
    rows = []
    for family, corruptions in mr.SUITES["clinical-c"].families.items():
        for one in corruptions:
            (parameter,) = one.severities[0]
            values = ", ".join(f"{severity[parameter]:g}" for severity in one.severities)
            reached = [
                ", ".join(f"{value:.2f}".removeprefix("0") for value in table[size][family][one.name])
                for size in ("similarity", "similarity_at_224")
            ]
            rows.append((family, f"`{one.name}`", _first_sentence(one.function), f"`{parameter}`: {values}", *reached))
    return _table(("family", "corruption", "what it does", "severity 1 to 5", "SSIM", "at 224 px"), rows)


def guarantees_part(snapshot: Snapshot) -> str:
    """Table of what a certificate may say."""
    return _table(("guarantee", "what it says"), [(f"`{name}`", words) for name, words in GUARANTEES.items()])


def citations_part(snapshot: Snapshot) -> str:
    """BibTeX of this software and of the papers, from CITATION.cff."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version = f"version {cff['version']}"
    own = {"author": f"{{{cff['authors'][0]['name']}}}", "title": f"{{{cff['title']}}}"}
    (year,) = re.findall(r"Copyright \(c\) (\d{4})", (ROOT / "LICENSE").read_text(encoding="utf-8"))
    own |= {"year": year, "note": version}
    entries = [_bibtex("software", "medrobust", own)]
    for paper in cff["references"]:
        authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
        fields = {"author": authors, "title": f"{{{paper['title']}}}"}
        if "conference" in paper:
            fields["booktitle"] = paper["conference"]["name"]
        arxiv = next(one["value"] for one in paper["identifiers"] if one["value"].startswith("arXiv:"))
        fields |= {"year": str(paper["year"]), "eprint": arxiv.removeprefix("arXiv:"), "archiveprefix": "arXiv"}
        key = paper["authors"][0]["family-names"].lower() + str(paper["year"])
        entries.append(_bibtex("inproceedings" if "conference" in paper else "misc", key, fields))
    return "\n".join(["```bibtex", *entries, "```"])


def kinds_part(_: Snapshot) -> str:
    """Table of kinds of dual encoders and what each can do, which a test holds to them."""
    adapters = {
        "layers": "on q, k and v",
        "fused": "on q, k and v, taken apart",
        "convolutions": "on its convolutions",
        "refused": "refused",
    }
    rows = [
        (
            f"{row['kind']} ({row['library']})" if row["library"] not in row["kind"] else row["kind"],
            " ".join(filter(None, (", ".join(f"`{id}`" for id in row["models"]), row.get("such_as", "")))),
            ("yes" if row["start_token"] else "yes, without a start token") if row["prompts"] else "refused",
            adapters[row["adapters"]],
            "yes" if row["retraining"] else "refused",
            " and ".join(row["scores"]),
        )
        for row in KINDS
    ]
    return _table(("kind", "such as", "prompts", "low-rank adapters", "re-training, certificates", "scores"), rows)


PARTS: dict[str, Callable[[Snapshot], str]] = {
    "output": output_part,
    "notebooks": notebooks_part,
    "models": models_part,
    "datasets": datasets_part,
    "results": results_part,
    "published": published_part,
    "protocols": protocols_part,
    "clinical": clinical_part,
    "guarantees": guarantees_part,
    "kinds": kinds_part,
    "reading": reading_part,
    "citations": citations_part,
}


# ---- rows and cells ----


def _certified_rows(snapshot: Snapshot) -> list[tuple[str, str, str]]:
    """Certified accuracy at two radii, at the best sigma for each, as the paper prints it."""
    table = load_published("promptsmooth_table2").set_index(["method", "radius"])["certified_accuracy"]
    curve = snapshot["curves"]["certified"]
    ours = None
    if curve is not None:
        # Best sigma for each radius: the convention of the published table.
        ours = pd.DataFrame(curve["points"]).groupby(["method", "radius"])["certified_accuracy"].max()
    named = {
        "zero-shot (no prompt learning)": ("zero-shot", "plain prompts"),
        "few-shot PromptSmooth": ("few-shot PromptSmooth", "prompts learned from noise (few-shot)"),
        "PromptSmooth": ("PromptSmooth", "and adapted to each image (frozen prompt)"),
    }
    return [
        (
            f"certified accuracy at radius {radius:g}, {words}",
            f"{_percent(table[printed, radius])} (PLIP, KatherColon)",
            MISSING if ours is None else f"{_percent(ours[method, radius])} (demo-clip, {curve['dataset']})",
        )
        for radius in (0.1, 0.5)
        for printed, (method, words) in named.items()
    ]


def _corruption_rows(snapshot: Snapshot) -> list[tuple[str, str, str]]:
    """Adaptation relative to the model that was adapted: BioMedCLIP in the paper, demo-clip-vit here."""
    errors = published.published_corruption_errors(reference="BioMedCLIP").groupby("model")
    paper = errors[["clean_error", "mce", "degradation"]].mean()
    base, tuned = paper.loc["BioMedCLIP"], paper.loc["RobustMedCLIP"]
    ours = snapshot["curves"]["adaptation"]
    lines = (
        ("error on clean images, before → after low-rank adaptation", "clean_error", True),
        ("mCE after adaptation, percent of the errors before", "mce", False),
        ("accuracy lost to corruption, before → after", "degradation", True),
    )
    rows = []
    for words, name, both in lines:
        there, here = _percent(tuned["mce"] / 100), MISSING
        if both:
            there = f"{_percent(base[name], 1)} → {_percent(tuned[name], 1)}"
        if ours is not None:
            before, after = ours["zero-shot"][name], ours["LoRA"][name]
            here = f"{_percent(before, 1)} → {_percent(after, 1)}" if both else _percent(after / 100)
        rows.append((words, f"{there} (BioMedCLIP, ten sets)", here))
    return rows


def _echoed(target: str) -> str:
    """What the Makefile announces first for a target."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(rf"^{target}:.*\n\t@echo \"(.+)\"$", makefile, re.MULTILINE)
    if recipe is None:
        raise ValueError(f'Makefile: the recipe of {target} no longer begins with @echo "..."')
    return recipe[1]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _first_sentence(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("\n")[0].rstrip(".")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return f"{5 * round(seconds / 5)} s" if seconds < 100 else _minutes(seconds)


def _long(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:,.0f} days" if days >= _FEW_DAYS else f"{seconds / 3600:,.0f} hours"


def _ticked(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _minutes(seconds: float) -> str:
    return f"{round(2 * seconds / 60) / 2:g} min"


def _percent(fraction: float, decimals: int = 0) -> str:
    return f"{100 * fraction:.{decimals}f} %"


def _spread(result: Mapping[str, Any]) -> str:
    if result["low"] is None:
        return ""
    star = " *" if result["interval"] == SEEDS else ""
    return f" ({_percent(result['low'])} to {_percent(result['high'])}{star})"


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def _counts(column: pd.Series, unit: str = "") -> str:
    known = sorted(set(column.dropna().astype(int)))
    return f"{known[0]}{unit}" if len(known) == 1 else f"{known[0]} to {known[-1]}{unit}"


def _joined(column: pd.Series) -> str:
    return "; ".join(dict.fromkeys(column))


def _script(command: str) -> str:
    return f"`{command.rsplit('/', 1)[-1]}`" if command else "none: included"


def _bibtex(kind: str, key: str, fields: Mapping[str, str]) -> str:
    inside = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@{kind}{{{key},\n{inside}\n}}"


if __name__ == "__main__":
    app()
