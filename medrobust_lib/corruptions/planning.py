"""What a run of `write_benchmark` is going to write: files, sizes and the parameters that the bytes depend on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from medrobust_lib.corruptions.layouts import (
    CLEAN,
    DESCRIPTION,
    KIND,
    Layout,
    set_file,
)
from medrobust_lib.corruptions.pixels import check_images
from medrobust_lib.corruptions.suites import SEVERITIES, Suite, check_severity, find_suite
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.data.wording import suggest
from medrobust_lib.files import size_text
from medrobust_lib.places import VERSION


@dataclass(frozen=True)
class PlannedFile:
    """One file to come.

    Attributes
    ----------
    file : str
        Path below the collection's folder.
    dataset : str
        Id of its `ImageDataset`.
    corruption : str
        Or "clean", or "description" (the JSON file with classes, prompts and indices).
    severities : tuple of int
        In the order of the images; (0,) for clean images.
    images : int
        Over all severities.
    size : int
        Bytes of the pixels; headers and labels add very little.
    """

    file: str
    dataset: str
    corruption: str
    severities: tuple[int, ...]
    images: int
    size: int


@dataclass(frozen=True)
class BenchmarkPlan:
    """What `write_benchmark` is going to write; made by `plan_benchmark`, said by ``str``.

    Attributes
    ----------
    folder : Path
        Of the collection.
    files : dict of str to tuple of PlannedFile
        By data set as asked for; the first is the description, the second the clean images.
    parameters : dict
        For ``manifest.json``: everything that the bytes depend on.
    split : str
    root : path or None
        Of the clean data sets.
    """

    folder: Path
    files: dict[str, tuple[PlannedFile, ...]]
    parameters: dict[str, Any]
    split: str
    root: str | Path | None

    def __len__(self) -> int:
        return sum(len(files) for files in self.files.values())

    @property
    def missing_bytes(self) -> int:
        """Bytes of the files that are not there yet."""
        return sum(file.size for file in self.all_files if not (self.folder / file.file).exists())

    @property
    def all_files(self) -> list[PlannedFile]:
        """Files of all data sets, in the order of writing."""
        return [file for files in self.files.values() for file in files]

    def __str__(self) -> str:
        sets = sum(len(file.severities) for file in self.all_files if file.severities != (0,))
        total, missing = sum(file.size for file in self.all_files), self.missing_bytes
        written = "" if missing == total else f", {size_text(total - missing)} of it is there already"
        return (
            f"{sets} corrupted sets of {', '.join(self.files)} and the clean images: {size_text(total)} in "
            f"{self.folder}{written}"
        )


def plan_benchmark(
    folder: str | Path,
    datasets: Iterable[str],
    *,
    suite: str = "medimeta-c",
    layout: Layout | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    split: str = "test",
    n: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
) -> BenchmarkPlan:
    """Work out what `write_benchmark` would write, from one image of each data set; parameters as there."""
    chosen = find_suite(suite)
    layout = layout or ("concatenated" if suite == "medmnist-c" else "per-severity")
    severities = tuple(dict.fromkeys(map(check_severity, severities)))
    _check_request(layout, severities, split)
    parameters = {
        "kind": KIND,
        "layout": layout,
        "suite": _constants(chosen),
        "seed": seed,
        "n": n,
        "image_size": image_size,
        "library": VERSION,
    }
    files: dict[str, tuple[PlannedFile, ...]] = {}
    for name in dict.fromkeys([datasets] if isinstance(datasets, str) else datasets):
        sample = load_dataset(name, split=split, n=1, root=root, image_size=image_size)
        available = sample.provenance["split_size"]
        if n is not None and not 1 <= n <= available:
            raise ValueError(f"n={n}: {name} has {available} images in split {split!r}; give 1 to {available}, or None")
        check_images(sample.images)
        names = chosen.names(sample.id) if corruptions is None else tuple(dict.fromkeys(corruptions))
        for corruption in names:
            chosen.corruption(corruption, dataset=sample.id)
        size = sample.images[0, ..., : 1 if keeps_gray(suite, sample.id) else 3].size
        groups = [severities] if layout == "concatenated" else [(severity,) for severity in severities]
        files[name] = _planned_files(sample.id, layout, split, names, groups, images=n or available, size=size)
    if not files:
        raise ValueError("no data sets named; give at least one id")
    places: dict[str, str] = {}
    for name, planned in files.items():
        other = places.setdefault(planned[1].file, name)
        if other != name:
            raise ValueError(f"{other} and {name} would both be written to {planned[1].file}; use a folder for each")
    return BenchmarkPlan(Path(folder), files, parameters, split, root)


def keeps_gray(suite: str, dataset: str) -> bool:
    """Whether a suite's images of a data set are gray: the official MedMNIST-C ends with the luma of each image."""
    found = find_suite(suite)
    return found.family(dataset) in found.gray


def _constants(suite: Suite) -> dict[str, Any]:
    families = {
        family or "every data set": {row.name: [dict(parameters) for parameters in row.severities] for row in rows}
        for family, rows in suite.families.items()
    }
    return {"id": suite.id, "parameters": families}


def _check_request(layout: str, severities: tuple[int, ...], split: str) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout {layout!r}.{suggest(str(layout), get_args(Layout))}")
    wrong = [severity for severity in severities if severity not in SEVERITIES]
    if wrong or not severities:
        named = f"severity {wrong[0]!r}" if wrong else "no severity"
        raise ValueError(f"{named} to write; give one or more of {', '.join(map(str, SEVERITIES))}")
    if layout == "concatenated" and (severities != SEVERITIES or split != "test"):
        raise ValueError(
            f"the concatenated layout holds severities 1 to 5 of the test split in every file; for severities "
            f"{', '.join(map(str, severities))} of {split!r} choose the layout 'per-severity'"
        )


def _planned_files(
    dataset: str,
    layout: Layout,
    split: str,
    corruptions: Sequence[str],
    groups: Sequence[tuple[int, ...]],
    *,
    images: int,
    size: int,
) -> tuple[PlannedFile, ...]:
    def planned(file: str, corruption: str, severities: tuple[int, ...]) -> PlannedFile:
        count = images * len(severities)
        return PlannedFile(
            file, dataset, corruption, severities, count, 0 if corruption == DESCRIPTION else count * size
        )

    clean = set_file(layout, dataset, split, CLEAN, 0)
    description = PurePosixPath(clean).with_name(f"{DESCRIPTION}.json")
    return (
        planned(str(description), DESCRIPTION, (0,)),
        planned(clean, CLEAN, (0,)),
        *(
            planned(set_file(layout, dataset, split, name, group[0]), name, group)
            for name in corruptions
            for group in groups
        ),
    )
