"""Put MM-SafetyBench (13 scenarios, 1,680 questions, 5,040 pairs with images) into ROOT/mm-safetybench/.

The questions come from the authors' repository. The images are fetched by hand: they are one archive,
MM-SafetyBench(imgs).zip, on Google Drive, linked in the README of https://github.com/isXinLiu/MM-SafetyBench
(project page: https://isxinliu.github.io/Project/MM-SafetyBench/). Name the archive, or the folder that you
unpacked it to, with --source. Everything takes its place at once when no image is missing.

The questions are harmful by design. They are here for one purpose: to measure how often a model refuses them.

Licence as stated by the authors: CC BY-NC 4.0, for research only; the terms of GPT-4 and of Stable Diffusion, which
wrote the questions and drew the images, apply as well. Please cite Liu et al., MM-SafetyBench: A Benchmark for
Safety Evaluation of Multimodal Large Language Models, ECCV 2024 (arXiv 2311.17600).
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm.auto import tqdm

from medrobust_lib.data import questions as bench
from medrobust_lib.data.questions import IMAGE_TYPES, MM_FOLDER
from medrobust_lib.files import file_sha256, named_when_full, reported_errors
from medrobust_lib.places import default_data_root
from preparing.archives import extract
from preparing.downloads import download
from preparing.folders import MANIFEST_NAME, listing_sha256

# A commit, not a branch: the questions that were audited must stay the questions that are fetched.
REVISION = "b80eedea3db312c09ded2082813390f68e750ef3"
QUESTIONS = f"https://raw.githubusercontent.com/isXinLiu/MM-SafetyBench/{REVISION}/data/processed_questions"
PROJECT_PAGE = "https://isxinliu.github.io/Project/MM-SafetyBench/"
NOTE = "The questions are harmful by design; they are shown to models only to measure refusals."
CITATION = "Liu et al., MM-SafetyBench, ECCV 2024, arXiv 2311.17600"
BY_HAND = (
    f"Fetch MM-SafetyBench(imgs).zip by hand: the README of {bench.MM_SOURCE} links to it on Google Drive "
    f"(project page: {PROJECT_PAGE}). Then name the archive, or the folder that you unpacked it to, with --source."
)
NAMED_IDS = 10  # of the missing images of one kind; the rest is counted

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    source: Annotated[
        Path | None, typer.Option(exists=True, help="The images: MM-SafetyBench(imgs).zip, or its unpacked folder.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Data root; default MEDROBUST_DATA or ./data.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set that is there already.")] = False,
) -> None:
    """Fetch the questions and put them in place together with the images."""
    with reported_errors():
        base = default_data_root(root)
        final = base / MM_FOLDER
        if (final / MANIFEST_NAME).exists() and not overwrite:
            require_complete(base, f"{final} is prepared, but", "Run again with --overwrite and --source.")
            typer.echo(f"{final}  ready already; --overwrite builds it anew")
            return
        if final.exists() and not overwrite:
            raise FileExistsError(f"{final} exists but was not made by this script; move it away or pass --overwrite")
        typer.echo(NOTE)
        files = fetch_questions(base)
        if source is None:
            raise ValueError(f"the questions are in {files[0].parent}, the images are still missing. {BY_HAND}")
        unused = install(files, source, base, final)
        if unused:
            typer.echo(f"{unused} images without a question were left out")
        typer.echo(f"{final}  ready")


def fetch_questions(base: Path) -> list[Path]:
    """Download the question file of each scenario and check it against the published number of questions."""
    files = []
    for scenario, count in bench.SCENARIOS.items():
        name = f"{scenario}.json"
        path = download(f"{QUESTIONS}/{name}", base / "downloads" / MM_FOLDER / REVISION / name)
        questions = bench.read_questions(path)
        if len(questions) != count:
            raise ValueError(f"{path} holds {len(questions)} questions, expected {count}. Delete it and run again.")
        for image_type in IMAGE_TYPES:
            bench.prompts_for(image_type, questions, path)
        files.append(path)
    return files


def install(files: list[Path], source: Path, base: Path, final: Path) -> int:
    """Build the set aside, check it, and move it to `final`; returns how many images have no question."""
    base.mkdir(parents=True, exist_ok=True)
    full = named_when_full(final, "the set could not be built and nothing of it was kept")
    with full, tempfile.TemporaryDirectory(dir=base, prefix=f".{MM_FOLDER}-") as scratch:
        packed = source.is_file()
        if packed:
            extract(source, Path(scratch) / "content")
        # What was unpacked here can be moved; the user's own folder is copied and stays as it is.
        put = Path.replace if packed else shutil.copyfile
        images = scenarios_in(Path(scratch) / "content" if packed else source, source)
        offered = sum(1 for kind in IMAGE_TYPES for _ in images.glob(f"*/{kind}/*.jpg"))
        new = Path(scratch) / "new"
        for path in tqdm(files, unit="scenario"):
            target = bench.question_file(path.stem, new)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            questions = bench.read_questions(path)
            for kind in IMAGE_TYPES:
                folder = bench.image_folder(path.stem, kind, new)
                folder.mkdir(parents=True)
                for name in (f"{id}.jpg" for id in questions):
                    if (images / path.stem / kind / name).is_file():
                        put(images / path.stem / kind / name, folder / name)
        require_complete(new, f"nothing was put in place: {source} is incomplete;", BY_HAND)
        text = json.dumps(manifest(new, files, source), indent=2, ensure_ascii=False)
        (new / MM_FOLDER / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
        installed = sum(1 for _ in new.rglob("*.jpg"))
        if final.exists():
            final.replace(Path(scratch) / "old")
        (new / MM_FOLDER).replace(final)
    return offered - installed


def scenarios_in(folder: Path, source: Path) -> Path:
    """Find the folder of the scenarios in the archive of the images, however deep it lies."""
    found = {
        path.parent
        for path in folder.rglob("*-*")
        if path.name in bench.SCENARIOS
        and "__MACOSX" not in path.parts
        and any((path / kind).is_dir() for kind in IMAGE_TYPES)
    }
    if not found:
        example = f"{next(iter(bench.SCENARIOS))}/{IMAGE_TYPES[0]}"
        raise FileNotFoundError(f"{source} has no folder such as {example} with images. {BY_HAND}")
    if len(found) > 1:
        listing = " and ".join(sorted(str(path.relative_to(folder)) for path in found))
        raise ValueError(f"{source} holds the scenarios more than once, in {listing}; name one of them with --source")
    return found.pop()


def require_complete(root: Path, what: str, remedy: str) -> None:
    """Raise a FileNotFoundError that names every missing question file and image below a data root."""
    gaps = []
    for scenario, count in bench.SCENARIOS.items():
        path = bench.question_file(scenario, root)
        questions = bench.read_questions(path) if path.is_file() else {}
        if len(questions) != count:
            gaps.append(f"{scenario}: {len(questions)} of {count} questions")
        for kind in IMAGE_TYPES:
            missing = bench.missing_images(scenario, kind, questions, root)
            if missing:
                rest = f" and {len(missing) - NAMED_IDS} more" if len(missing) > NAMED_IDS else ""
                names = ", ".join(f"{id}.jpg" for id in missing[:NAMED_IDS])
                gaps.append(f"{scenario}/{kind}: {len(missing)} of {len(questions)} images: {names}{rest}")
    if gaps:
        raise FileNotFoundError(f"{what} this is missing:\n" + "".join(f"    {gap}\n" for gap in gaps) + remedy)


def manifest(root: Path, files: list[Path], source: Path) -> dict[str, Any]:
    """Where the set comes from and what is in it."""
    folder = root / MM_FOLDER
    table = bench.list_scenarios(root=root)
    counts = table.pivot(index="scenario", columns="image type", values="images").to_dict("index")
    return {
        "dataset": MM_FOLDER,
        "source": bench.MM_SOURCE,
        "project_page": PROJECT_PAGE,
        "revision": REVISION,
        "licence": bench.MM_LICENCE,
        "citation": CITATION,
        "note": NOTE,
        "questions_sha256": {path.name: file_sha256(path) for path in files},
        "images_from": source.name,
        "images_from_sha256": file_sha256(source) if source.is_file() else None,
        "images_listing_sha256": listing_sha256((folder / "imgs").rglob("*.jpg"), base=folder / "imgs"),
        "counts": {path.stem: {"questions": len(bench.read_questions(path)), **counts[path.stem]} for path in files},
    }


if __name__ == "__main__":
    app()
