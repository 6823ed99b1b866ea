"""Prepare the two chest X-ray sets as class folders: ROOT/chest/NAME/images/{train,test}/CLASS/.

Both are on Kaggle, which asks for an account: fetch them by hand and name the folder with --source.
Beside the images a manifest.json records source, licence, hashes, seed, split and counts.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from medrobust_lib.data.decoding import read_dicom
from medrobust_lib.data.wording import spelled
from medrobust_lib.files import file_sha256, inside, parsed, reported_errors
from medrobust_lib.places import default_data_root
from preparing.folders import (
    Origin,
    listing_sha256,
    named_source,
    read_table,
    require_columns,
    split_by_group,
    staged_dataset,
)

COVID_CLASSES = {"covid": ("COVID", "COVID-19"), "normal": ("Normal",)}
COVID_QU_SPLITS = {"Train": "train", "Val": "val", "Test": "test"}
RSNA_TABLE = "stage_2_detailed_class_info.csv"
RSNA_IMAGES = "stage_2_train_images"

Root = Annotated[Path | None, typer.Option(help="Data root; default MEDROBUST_DATA or ./data.")]
Folder = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder that you unpacked the download to.")
]
Seed = Annotated[int, typer.Option(help="Seed of the split.")]
Folds = Annotated[int, typer.Option(min=2, help="One of so many parts is the test set; 5 means 20 %.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a set that is prepared already.")]

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", help=__doc__)


@app.command()
def covid(
    source: Folder = None, root: Root = None, seed: Seed = 0, folds: Folds = 5, overwrite: Overwrite = False
) -> None:
    """COVID-19 or normal, from the COVID-19 Radiography Database or from COVID-QU-Ex.

    By hand: https://www.kaggle.com/datasets/tawsifurrahman/covid19-radiography-database (folders COVID and
    Normal; split here, seeded, by image, because patients are not given) or
    https://www.kaggle.com/datasets/anasmohammedtahir/covidqu (folders Train, Val, Test; kept). Name the folder
    that holds those folders with --source. Use is subject to the terms stated there. Cite Rahman et al.,
    Computers in Biology and Medicine 132, 2021, and Chowdhury et al., IEEE Access 8, 2020.
    """
    with reported_errors():
        base, source = default_data_root(root), named_source(source, covid)
        table = covid_table(source)
        official = table["split"].notna().all()
        if not official:
            test = split_by_group(table["file"].tolist(), table["class"].tolist(), folds=folds, seed=seed)
            table["split"] = pd.Series(test).map({True: "test", False: "train"})
        origin = Origin(
            source="https://www.kaggle.com/datasets/tawsifurrahman/covid19-radiography-database or covidqu",
            licence="stated on the source's page",
            citation="Rahman et al., Computers in Biology and Medicine 132: 104319, 2021",
            split="by the owners" if official else f"by image, class by class, 1/{folds} test; patients are unknown",
            seed=None if official else seed,
        )
        with staged_dataset("chest/covid", root=base, origin=origin, overwrite=overwrite) as staged:
            for file, label, split in tqdm(table.itertuples(index=False), total=len(table)):
                staged.add(split, label, Path(file).name, source / file)
            files = (source / file for file in table["file"])
            staged.facts["source_listing_sha256"] = listing_sha256(files, base=source)
        typer.echo(f"{base / 'chest/covid'}  ready")


def covid_table(source: Path) -> pd.DataFrame:
    """Files (relative to `source`), their class, and their split where the owners made one."""
    rows = []
    parts = {name: split for name, split in COVID_QU_SPLITS.items() if (source / name).is_dir()}
    for part, split in (parts or {".": None}).items():
        for label, names in COVID_CLASSES.items():
            folders = [source / part / name for name in names if (source / part / name).is_dir()]
            if not folders:
                raise FileNotFoundError(f"no folder {' or '.join(names)} in {source / part}")
            inner = folders[0] / "images"  # the masks of newer releases lie beside it
            for path in sorted((inner if inner.is_dir() else folders[0]).iterdir()):
                if path.suffix.lower() in {".png", ".jpg", ".jpeg"}:
                    rows.append((path.relative_to(source).as_posix(), label, split))
    return pd.DataFrame(rows, columns=["file", "class", "split"])


@app.command()
def rsna(
    source: Folder = None,
    root: Root = None,
    seed: Seed = 0,
    folds: Folds = 5,
    nih_mapping: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="RSNA's mapping to NIH file names (JSON); with it, all images of an NIH patient stay together.",
        ),
    ] = None,
    longest_side: Annotated[
        int | None, typer.Option(min=28, help="Shrink images to this many pixels; default: keep 1024.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """RSNA Pneumonia Detection 2018 in 3 classes, split by patient.

    By hand: accept the rules at https://www.kaggle.com/c/rsna-pneumonia-detection-challenge, download, unpack,
    and name the folder that holds stage_2_detailed_class_info.csv and stage_2_train_images/ with --source. The
    table repeats patients (one row a box), so a split by rows would put the same image into train and test.
    Patient numbers there are one per image; the images come from NIH ChestX-ray14, where a patient may have
    several: give --nih-mapping (pneumonia-challenge-dataset-mappings_2018.json from RSNA's page) to keep those
    together, too. Use is subject to the challenge's rules. Cite Shih et al., Radiology: Artificial
    Intelligence 1(1), 2019.
    """
    with reported_errors():
        base, source = default_data_root(root), named_source(source, rsna)
        patients = rsna_patients(source / RSNA_TABLE)
        groups = patients["patientId"] if nih_mapping is None else nih_patients(patients["patientId"], nih_mapping)
        test = split_by_group(groups.tolist(), patients["class"].tolist(), folds=folds, seed=seed)
        unit = "patientId" if nih_mapping is None else "NIH patient"
        origin = Origin(
            source="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge",
            licence="the challenge's rules",
            citation="Shih et al., Radiology: Artificial Intelligence 1(1): e180041, 2019",
            split=f"by {unit}, class by class, 1/{folds} test",
            seed=seed,
        )
        with staged_dataset("chest/rsna", root=base, origin=origin, overwrite=overwrite) as staged:
            patients["split"] = pd.Series(test).map({True: "test", False: "train"})
            for patient, label, split in tqdm(patients.itertuples(index=False), total=len(patients)):
                pixels = read_dicom(inside(source / RSNA_IMAGES, f"{patient}.dcm", source=source / RSNA_TABLE))
                staged.add(split, label, f"{patient}.png", shrunk(pixels, longest_side))
            tables = [source / RSNA_TABLE, *([nih_mapping] if nih_mapping else [])]
            staged.facts["source_sha256"] = {path.name: file_sha256(path) for path in tables}
            staged.facts["longest_side"] = longest_side
        typer.echo(f"{base / 'chest/rsna'}  ready")


def rsna_patients(table_path: Path) -> pd.DataFrame:
    """One row a patient: patientId and class folder, sorted by patientId."""
    table = read_table(table_path)
    require_columns(table, ["patientId", "class"], table_path)
    table["class"] = [spelled(name).replace(" ", "_") for name in table["class"]]
    patients = table[["patientId", "class"]].drop_duplicates().sort_values("patientId", ignore_index=True)
    contradictory = patients.loc[patients["patientId"].duplicated(), "patientId"]
    if len(contradictory):
        raise ValueError(f"{table_path} gives patient {contradictory.iloc[0]} two classes")
    return patients


def nih_patients(patient_ids: pd.Series, mapping_path: Path) -> pd.Series:
    """The NIH patient of each RSNA image; NIH file names are PATIENT_NUMBER.png."""
    with parsed(f"{mapping_path} is not RSNA's mapping"):
        entries = json.loads(mapping_path.read_text(encoding="utf-8"))
        by_id = {entry["subset_img_id"]: entry["img_id"].partition("_")[0] for entry in entries}
    unknown = [patient for patient in patient_ids if patient not in by_id]
    if unknown:
        raise ValueError(f"{mapping_path} does not name {len(unknown)} of the images, for example {unknown[0]}")
    return patient_ids.map(by_id)


def shrunk(pixels: NDArray[np.uint8], longest_side: int | None) -> NDArray[np.uint8]:
    """The image, resized (Lanczos) so that its longer side has at most `longest_side` pixels."""
    height, width = pixels.shape[:2]
    if longest_side is None or max(height, width) <= longest_side:
        return pixels
    scale = longest_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


if __name__ == "__main__":
    app()
