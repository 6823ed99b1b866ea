"""The rows of the data set registry: one per set, and nothing but facts."""

from dataclasses import dataclass
from functools import partial

from medrobust_lib.data import phantoms
from medrobust_lib.data.readers import SPLITS
from medrobust_lib.data.wording import SITE_A

FALLBACK_SIZE = 224
PHANTOM_SIZE = 64
NOT_COUNTED = (None, None, None)


@dataclass(frozen=True)
class DatasetEntry:
    """One row: where a set lies, how it is read, and what `list_datasets` says about it."""

    id: str
    kind: str
    location: str
    modality: str
    image_size: int
    sizes: tuple[int | None, int | None, int | None]
    licence: str
    source: str
    command: str = ""


def _phantom(name: str, modality: str) -> tuple[DatasetEntry, DatasetEntry]:
    row = partial(
        DatasetEntry,
        kind="phantom",
        location="",
        modality=modality,
        image_size=PHANTOM_SIZE,
        sizes=tuple(phantoms.SPLITS[split] for split in SPLITS),
        licence="MIT (drawn by this package)",
    )
    return (
        row(id=f"phantom/{name}", source="synthetic phantoms, acquisition site B (benchmark)"),
        row(
            id=f"phantom/{name}{SITE_A}",
            source="synthetic phantoms, acquisition site A (demo-clip's training site)",
        ),
    )


def _medmnist(name: str, modality: str, *sizes: int) -> DatasetEntry:
    source = f"MedMNIST v2, {name}mnist (Yang et al. 2023), https://zenodo.org/records/10519652"
    command = f"python data_scripts/download_medmnist.py {name}"
    location = f"medmnist/{name}mnist"
    return DatasetEntry(f"medmnist/{name}", "medmnist", location, modality, 28, sizes, "CC BY 4.0", source, command)


def _medimeta(name: str, folder: str, modality: str, *sizes: int) -> DatasetEntry:
    source = f"MedIMeta, {folder} (Woerner et al. 2025), https://zenodo.org/records/7884735"
    command = f"python data_scripts/download_medimeta.py {name}"
    location = f"medimeta/{folder}"
    return DatasetEntry(
        f"medimeta/{name}", "medimeta", location, modality, 224, sizes, "per set, see its info.yaml", source, command
    )


def _folders(
    id: str, modality: str, licence: str, source: str, *, script: str, sizes: tuple = NOT_COUNTED
) -> DatasetEntry:
    command = f"python data_scripts/{script} {id.rpartition('/')[2]}"
    return DatasetEntry(id, "folders", id, modality, FALLBACK_SIZE, sizes, licence, source, command)


_PATHOLOGY = partial(_folders, script="prepare_pathology.py")
_CHEST = partial(_folders, modality="chest X-ray", script="prepare_chest_xray.py")
DATASETS = {
    row.id: row
    for row in (
        *_phantom("histology", "colon histology, H&E"),
        *_phantom("blood", "blood smear microscopy"),
        *_phantom("breast", "breast ultrasound"),
        *_phantom("chest", "chest X-ray"),
        *_phantom("fundus", "fundus photography"),
        *_phantom("oct", "retinal OCT"),
        _medmnist("blood", "blood smear microscopy", 11959, 1712, 3421),
        _medmnist("breast", "breast ultrasound", 546, 78, 156),
        _medmnist("pneumonia", "chest X-ray", 4708, 524, 624),
        _medmnist("retina", "fundus photography", 1080, 120, 400),
        _medmnist("oct", "retinal OCT", 97477, 10832, 1000),
        _medimeta("pbc", "pbc", "blood smear microscopy", 11964, 1709, 3149),
        _medimeta("mammo", "mammo_calc", "mammography", 1332, 214, 326),
        _medimeta("pneumonia", "pneumonia", "chest X-ray", 4415, 817, 624),
        _medimeta("fundus", "fundus", "fundus photography", 1920, 640, 640),
        _medimeta("oct", "oct", "retinal OCT", 91615, 16694, 1000),
        _PATHOLOGY(
            "pathology/kather",
            "colon histology, H&E",
            "CC BY 4.0",
            "NCT-CRC-HE-100K and CRC-VAL-HE-7K (Kather et al. 2019), https://zenodo.org/records/1214456",
            sizes=(100000, None, 7180),
        ),
        _PATHOLOGY(
            "pathology/pannuke",
            "multi-organ histology, H&E",
            "CC BY-NC-SA 4.0",
            "PanNuke (Gamper et al. 2020)",
        ),
        _PATHOLOGY(
            "pathology/skincancer",
            "skin histology, H&E",
            "stated on the source's page",
            "skin tiles (Kriegsmann et al. 2022), https://doi.org/10.11588/data/7QCR8S",
        ),
        _PATHOLOGY(
            "pathology/sicapv2",
            "prostate histology, H&E",
            "CC BY 4.0",
            "SICAPv2 (Silva-Rodríguez et al. 2020), https://data.mendeley.com/datasets/9xxm58dvs3",
        ),
        _CHEST("chest/covid", licence="stated on the source's page", source="COVID-19 radiographs (Tahir et al. 2021)"),
        _CHEST("chest/rsna", licence="the challenge's rules", source="RSNA Pneumonia Detection Challenge 2018"),
    )
}
