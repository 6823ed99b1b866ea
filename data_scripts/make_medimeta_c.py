"""Write MediMeta-C: 7 corruptions x 5 severities of five MedIMeta sets, 175 corrupted sets in 31 GB.

Layout: OUT/SET/SPLIT/CORRUPTION_severity_S.npz with images and labels, clean.npz beside them, and a manifest with
every parameter and the SHA-256 of every file. A run that was stopped goes on when it is started again. Any data
set of the library may be named; `--datasets phantom/histology phantom/chest --n 20` needs no download.

The benchmark is Imam, Marew and Yaqub, On the robustness of medical vision-language models, MIUA 2025; its authors
published no constants, so these are ImageNet-C's, and the files are not the authors' files.
"""

from pathlib import Path

import typer

from medrobust_lib.places import default_data_root
from preparing import corrupted_sets

DATASETS = [f"medimeta/{name}" for name in ("pbc", "mammo", "pneumonia", "fundus", "oct")]

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    named: corrupted_sets.Named = None,
    datasets: corrupted_sets.Datasets = None,
    out: corrupted_sets.Out = None,
    corruptions: corrupted_sets.Corruptions = "",
    severities: corrupted_sets.Severities = corrupted_sets.ALL_SEVERITIES,
    layout: corrupted_sets.LayoutOption = None,
    split: corrupted_sets.Split = "test",
    n: corrupted_sets.Number = None,
    image_size: corrupted_sets.ImageSize = None,
    seed: corrupted_sets.Seed = 0,
    jobs: corrupted_sets.Jobs = -1,
    root: corrupted_sets.Root = None,
    dry_run: corrupted_sets.DryRun = False,
    check: corrupted_sets.Check = False,
) -> None:
    """Write, plan or check the collection."""
    folder: Path = out or default_data_root(root) / "MediMeta-C"
    corrupted_sets.run_command(
        folder,
        [*(datasets or []), *(named or [])] or DATASETS,
        suite="medimeta-c",
        corruptions=corruptions,
        severities=severities,
        layout=layout and layout.value,
        split=split,
        n=n,
        image_size=image_size,
        seed=seed,
        root=root,
        jobs=jobs,
        dry_run=dry_run,
        check=check,
    )


if __name__ == "__main__":
    app()
