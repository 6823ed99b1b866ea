"""Write MedMNIST-C from five MedMNIST sets: the papers' seven corruptions, or the official suite.

`--suite medimeta-c` (the default) writes what the MediMeta-C paper evaluates as MedMNIST-C: 7 corruptions x 5
severities, 175 corrupted sets, as OUT/SET/SPLIT/CORRUPTION_severity_S.npz. `--suite medmnist-c` writes the official
MedMNIST-C, whose corruptions and parameters differ by data set, as OUT/SET/CORRUPTION.npz with the severities one
after the other. `--suite clinical-c` writes what scanners and hands do (docs/corruptions.md), in the first layout.
The sets are read in the largest size on this computer; both papers use 224 px (30 GB):
`python data_scripts/download_medmnist.py --size 224`. A run that was stopped goes on when it is started again.

Official suite: Di Salvo et al., MedMNIST-C: comprehensive benchmark and improved classifier robustness, 2024. Its
random numbers cannot be repeated image by image, so these are not its authors' files.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medrobust_lib.corruptions import SUITES
from medrobust_lib.places import default_data_root
from preparing import corrupted_sets

DATASETS = [f"medmnist/{name}" for name in ("blood", "breast", "pneumonia", "retina", "oct")]
FOLDERS = {"medimeta-c": "MedMNIST-C", "medmnist-c": "MedMNIST-C-official", "clinical-c": "MedMNIST-C-clinical"}
SuiteName = StrEnum("SuiteName", {name.replace("-", "_"): name for name in SUITES})

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    named: corrupted_sets.Named = None,
    datasets: corrupted_sets.Datasets = None,
    suite: Annotated[SuiteName, typer.Option(help="Whose corruptions and parameters.")] = SuiteName.medimeta_c,
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
    folder: Path = out or default_data_root(root) / FOLDERS[suite]
    corrupted_sets.run_command(
        folder,
        [*(datasets or []), *(named or [])] or DATASETS,
        suite=suite.value,
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
