"""Prepare the four pathology sets as class folders: ROOT/pathology/NAME/images/{train,test}/CLASS/.

kather and pannuke are downloaded; skincancer and sicapv2 are fetched by hand and named with --source.
Beside the images a manifest.json records source, licence, hashes, split and counts.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tqdm.auto import tqdm

from medrobust_lib.files import file_sha256, inside, reported_errors
from medrobust_lib.places import default_data_root
from preparing.archives import extract
from preparing.folders import (
    Origin,
    listing_sha256,
    named_source,
    nuclei_counts,
    obtain,
    pannuke_class,
    read_table,
    require_columns,
    staged_dataset,
)

KATHER_RECORD = "https://zenodo.org/records/1214456"
# MD5 as shown on the record's page.
KATHER_ARCHIVES = {
    "train": ("NCT-CRC-HE-100K", "6fd702d11df6292bc054397ae038a464"),
    "test": ("CRC-VAL-HE-7K", "2fd1651b4f94ebd818ebf90ad2b6ce06"),
}
PANNUKE_PAGE = "https://warwick.ac.uk/fac/cross_fac/tia/data/pannuke"
# SHA-256 as recorded by the public loader of torch_em (computational-cell-analytics).
PANNUKE_SHA256 = {
    1: "6e19ad380300e8ce9480f9ab6a14cc91fa4b6a511609b40e3d70bdf9c881ed0b",
    2: "5bc540cc509f64b5f5a274d6e5a245527dbd3e6d3155d43555115c5d54709b07",
    3: "c14d372981c42f611ebc80afad01702b89cad8c1b3089daa31931cf5a4b1a39d",
}
SKIN_SPLITS = {"Train": "train", "Validation": "val", "Test": "test"}
GRADES = ["NC", "G3", "G4", "G5"]

Root = Annotated[Path | None, typer.Option(help="Data root; default MEDROBUST_DATA or ./data.")]
Archives = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder with the archives, if you have them."),
]
Folder = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder that you unpacked the download to.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a set that is prepared already.")]

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", help=__doc__)


@app.command()
def kather(root: Root = None, source: Archives = None, overwrite: Overwrite = False) -> None:
    """NCT-CRC-HE-100K (train) and CRC-VAL-HE-7K (test), nine tissues; 12.5 GB are downloaded.

    Licence: CC BY 4.0. Cite Kather et al., Predicting survival from colorectal cancer histology slides using
    deep learning, PLOS Medicine 16(1), 2019 (Zenodo record 1214456).
    """
    origin = Origin(
        source=KATHER_RECORD,
        licence="CC BY 4.0",
        citation="Kather et al., PLOS Medicine 16(1): e1002730, 2019",
        split="by the owners: NCT-CRC-HE-100K is train, CRC-VAL-HE-7K (other patients) is test",
    )
    with reported_errors():
        base = default_data_root(root)
        with staged_dataset("pathology/kather", root=base, origin=origin, overwrite=overwrite) as staged:
            for split, (name, md5) in KATHER_ARCHIVES.items():
                url = f"{KATHER_RECORD}/files/{name}.zip"
                archive = obtain(url, f"{name}.zip", source=source, root=base, md5=md5)
                extract(archive, staged.folder / split)
                (staged.folder / split / name).replace(staged.images / split)
                (staged.folder / split).rmdir()
            staged.facts["source_md5"] = {f"{name}.zip": md5 for name, md5 in KATHER_ARCHIVES.values()}
        typer.echo(f"{base / 'pathology/kather'}  ready")


@app.command()
def pannuke(root: Root = None, source: Archives = None, overwrite: Overwrite = False) -> None:
    """PanNuke, benign or malignant by its nuclei; folds 1 and 2 are train, fold 3 is test.

    Malignant: at least 10 neoplastic nuclei that are more than 30 % of all nuclei. Benign: no neoplastic
    nucleus. Tiles in between and tiles without nuclei are left out. About 13 GB of free space are needed
    while a fold is unpacked. Licence: CC BY-NC-SA 4.0. Cite Gamper et al., PanNuke, ECDP 2019, and PanNuke
    dataset extension, insights and baselines, arXiv 2003.10778.
    """
    origin = Origin(
        source=PANNUKE_PAGE,
        licence="CC BY-NC-SA 4.0",
        citation="Gamper et al., ECDP 2019; arXiv 2003.10778",
        split="by the owners' folds: 1 and 2 are train, 3 is test",
    )
    with reported_errors():
        base = default_data_root(root)
        with staged_dataset("pathology/pannuke", root=base, origin=origin, overwrite=overwrite) as staged:
            left_out = 0
            for fold, sha256 in PANNUKE_SHA256.items():
                name = f"fold_{fold}.zip"
                archive = obtain(f"{PANNUKE_PAGE}/{name}", name, source=source, root=base, sha256=sha256)
                members = [f"Fold {fold}/{kind}/fold{fold}/{kind}.npy" for kind in ("images", "masks")]
                with tempfile.TemporaryDirectory(dir=staged.folder, prefix=".fold-") as scratch:
                    paths = extract(archive, Path(scratch) / "arrays", members=members)
                    arrays = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in paths}
                    tiles = zip(arrays["images"], arrays["masks"], strict=True)
                    for index, (tile, masks) in enumerate(tqdm(tiles, desc=name, total=len(arrays["images"]))):
                        label = pannuke_class(nuclei_counts(masks))
                        if label is None:
                            left_out += 1
                            continue
                        split = "test" if fold == 3 else "train"
                        staged.add(split, label, f"fold{fold}_{index:04d}.png", tile.astype(np.uint8))
            staged.facts["source_sha256"] = {f"fold_{fold}.zip": sha256 for fold, sha256 in PANNUKE_SHA256.items()}
            staged.facts["left_out"] = left_out
        typer.echo(f"{base / 'pathology/pannuke'}  ready")


@app.command()
def skincancer(source: Folder = None, root: Root = None, overwrite: Overwrite = False) -> None:
    """Skin histology tiles in 16 classes, split by the `set` column of tiles-v2.csv.

    By hand: open https://doi.org/10.11588/data/7QCR8S (heiDATA), accept the terms, download data.zip (3.7 GB),
    unpack it, and name the folder that holds tiles-v2.csv and tiles/ with --source. The licence is stated on
    that page. Cite Kriegsmann et al., Deep learning for the detection of anatomical tissue structures and
    neoplasms of the skin on scanned histopathological tissue sections, Frontiers in Oncology 12, 2022.
    """
    origin = Origin(
        source="https://doi.org/10.11588/data/7QCR8S",
        licence="stated on the source's page",
        citation="Kriegsmann et al., Frontiers in Oncology 12: 1022967, 2022",
        split="by the owners: the column `set` of tiles-v2.csv",
    )
    with reported_errors():
        base, source = default_data_root(root), named_source(source, skincancer)
        table_path = source / "tiles-v2.csv"
        if not table_path.exists():
            raise FileNotFoundError(f"no tiles-v2.csv in {source}; --source is the folder that holds it and tiles/")
        table = read_table(table_path)
        require_columns(table, ["file", "class", "set"], table_path)
        unknown = sorted(set(table["set"]) - set(SKIN_SPLITS))
        if unknown:
            raise ValueError(f"{table_path} has the set {unknown[0]!r}; known are {', '.join(SKIN_SPLITS)}")
        with staged_dataset("pathology/skincancer", root=base, origin=origin, overwrite=overwrite) as staged:
            for file, label, split in tqdm(table[["file", "class", "set"]].itertuples(index=False), total=len(table)):
                # The column starts with the name of the unpacked folder, which a user may have changed.
                path = inside(source, str(file).removeprefix("data/"), source=table_path)
                staged.add(SKIN_SPLITS[split], label, path.name, path)
            staged.facts["source_sha256"] = {"tiles-v2.csv": file_sha256(table_path)}
        typer.echo(f"{base / 'pathology/skincancer'}  ready")


@app.command()
def sicapv2(source: Folder = None, root: Root = None, overwrite: Overwrite = False) -> None:
    """SICAPv2 prostate tiles in 4 classes (non-cancerous, Gleason 3, 4, 5), split by the owners' partition.

    By hand: open https://data.mendeley.com/datasets/9xxm58dvs3/2, download SICAPv2.zip, unpack it, and name
    the folder that holds images/ and partition/ with --source. Reading partition/Test/Train.xlsx and
    Test.xlsx needs openpyxl (`pip install openpyxl`), or save each as .csv beside it. Licence: CC BY 4.0.
    Cite Silva-Rodriguez et al., Going deeper through the Gleason scoring scale, Computer Methods and Programs
    in Biomedicine 195, 2020.
    """
    origin = Origin(
        source="https://data.mendeley.com/datasets/9xxm58dvs3/2",
        licence="CC BY 4.0",
        citation="Silva-Rodriguez et al., Computer Methods and Programs in Biomedicine 195: 105637, 2020",
        split="by the owners: partition/Test, whose train and test share no patient",
    )
    with reported_errors():
        base, source = default_data_root(root), named_source(source, sicapv2)
        with staged_dataset("pathology/sicapv2", root=base, origin=origin, overwrite=overwrite) as staged:
            for split in ("train", "test"):
                path = source / "partition" / "Test" / f"{split.capitalize()}.xlsx"
                table = read_table(path)
                require_columns(table, ["image_name", *GRADES], path)
                if not (table[GRADES].sum(axis="columns") == 1).all():
                    raise ValueError(f"{path} has rows without exactly one of {', '.join(GRADES)}")
                labels = table[GRADES].idxmax(axis="columns")
                for name, label in tqdm(zip(table["image_name"], labels, strict=True), desc=split, total=len(table)):
                    staged.add(split, label, name, inside(source / "images", name, source=path))
            tables = (source / "partition" / "Test").glob("T*.*")
            staged.facts["source_sha256"] = {table.name: file_sha256(table) for table in sorted(tables)}
            staged.facts["source_listing_sha256"] = listing_sha256((source / "images").iterdir(), base=source)
        typer.echo(f"{base / 'pathology/sicapv2'}  ready")


if __name__ == "__main__":
    app()
