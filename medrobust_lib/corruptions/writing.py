"""Corrupted sets on disk: arrays as benchmarks have them (`write_benchmark`), or image files (`write_folders`).

`CorruptedSets` says which arrays come and how large they are; what is missing is written. The folder of a collection
is a row store (`medrobust_lib.experiments.open_store`): ``manifest.json`` holds the parameters with all constants of
the suite, ``table.csv`` every file with its SHA-256.
"""

import hashlib
import inspect
import json
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from medrobust_lib.checks import check_choice, check_keywords
from medrobust_lib.corruptions import stored
from medrobust_lib.corruptions.functions import Pixels, check_images
from medrobust_lib.corruptions.suites import (
    SEVERITIES,
    check_severity,
    corrupt,
    corrupted,
    find_suite,
    keeps_gray,
    luma,
)
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.own_images import CORRUPTED
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.experiments import RowStore, map_items, open_store, progress
from medrobust_lib.files import disk_full, file_sha256, size_text, whole_file
from medrobust_lib.places import VERSION


@dataclass(frozen=True)
class CorruptedFile:
    """One file to come.

    Attributes
    ----------
    file : str
        Path below the collection's folder.
    dataset : str
        Id of its `ImageDataset`.
    split : str
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
    split: str
    corruption: str
    severities: tuple[int, ...]
    images: int
    size: int


@dataclass(frozen=True)
class CorruptedSets:
    """What `write_benchmark` is going to write, worked out from one image of each data set; ``str`` says it.

    Attributes
    ----------
    folder : path
        Of the collection, for example ``data/MediMeta-C``.
    datasets : iterable of str
        Ids as for `load_dataset`. More data sets, corruptions and severities may be added by later calls;
        everything else must stay as it was.
    suite : {"medimeta-c", "medmnist-c", "clinical-c"}
    layout : {"per-severity", "concatenated"}, optional
        See `medrobust_lib.corruptions.stored`. Default: "concatenated" for the suite "medmnist-c".
    corruptions : sequence of str, optional
        Of the suite; all that it evaluates by default.
    severities : sequence of int
        Of 1 to 5; the concatenated layout always has all.
    split : str
        The concatenated layout has the test split only.
    n : int, optional
        A seeded, class-stratified subset of so many images of each data set.
    image_size : int, optional
        Side in pixels; the source's own by default.
    seed : int
        Of the corruptions and of the subset.
    root : path, optional
        Folder of the clean data sets.
    files : dict of str to tuple of CorruptedFile
        Worked out: by data set; the first is the description, the second the clean images.

    Raises
    ------
    FileNotFoundError
        A data set is not on this computer.
    ValueError
        Unknown data set, suite, corruption, severity or layout, or two data sets of one folder.
    """

    folder: Path
    datasets: Iterable[str]
    _: KW_ONLY
    suite: str = "medimeta-c"
    layout: stored.Layout | None = None
    corruptions: Sequence[str] | None = None
    severities: Sequence[int] = SEVERITIES
    split: str = "test"
    n: int | None = None
    image_size: int | None = None
    seed: int = 0
    root: str | Path | None = None
    files: dict[str, tuple[CorruptedFile, ...]] = field(init=False)

    def __post_init__(self) -> None:
        find_suite(self.suite)
        names = (self.datasets,) if isinstance(self.datasets, str) else tuple(dict.fromkeys(self.datasets))
        resolved = {
            "folder": Path(self.folder),
            "datasets": names,
            "layout": self.layout or ("concatenated" if self.suite == "medmnist-c" else "per-severity"),
            "severities": tuple(dict.fromkeys(map(check_severity, self.severities))),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        check_choice("layout", self.layout, get_args(stored.Layout))
        if 0 in self.severities or not self.severities:
            named = "severity 0" if self.severities else "no severity"
            raise ValueError(f"{named} to write; give one or more of {', '.join(map(str, SEVERITIES))}")
        if self.layout == "concatenated" and (self.severities != SEVERITIES or self.split != "test"):
            raise ValueError(
                f"the concatenated layout holds severities 1 to 5 of the test split in every file; for severities "
                f"{', '.join(map(str, self.severities))} of {self.split!r} choose the layout 'per-severity'"
            )
        if not self.datasets:
            raise ValueError("no data sets named; give at least one id")
        object.__setattr__(self, "files", {name: self._files_of(name) for name in names})
        places: dict[str, str] = {}
        for name, (_, clean, *_) in self.files.items():
            other = places.setdefault(clean.file, name)
            if other != name:
                raise ValueError(f"{other} and {name} would both be written to {clean.file}; use a folder for each")

    def __len__(self) -> int:
        return len(self.all_files)

    @property
    def all_files(self) -> list[CorruptedFile]:
        """Files of all data sets, in the order of writing."""
        return [file for files in self.files.values() for file in files]

    @property
    def missing_bytes(self) -> int:
        """Bytes of the files that are not there yet."""
        return sum(file.size for file in self.all_files if not (self.folder / file.file).exists())

    @property
    def parameters(self) -> dict[str, Any]:
        """For ``manifest.json``: everything that the bytes depend on."""
        return {
            "kind": stored.KIND,
            "layout": self.layout,
            "suite": suite_record(self.suite),
            "seed": self.seed,
            "n": self.n,
            "image_size": self.image_size,
            "library": VERSION,
        }

    def __str__(self) -> str:
        sets = sum(len(file.severities) for file in self.all_files if file.severities != (0,))
        total, missing = sum(file.size for file in self.all_files), self.missing_bytes
        written = "" if missing == total else f", {size_text(total - missing)} of it is there already"
        return (
            f"{sets} corrupted sets of {', '.join(self.files)} and the clean images: {size_text(total)} in "
            f"{self.folder}{written}"
        )

    def _files_of(self, name: str) -> tuple[CorruptedFile, ...]:
        """Files of one data set."""
        sample = load_dataset(name, split=self.split, n=1, root=self.root, image_size=self.image_size)
        available = sample.provenance["split_size"]
        if self.n is not None and not 1 <= self.n <= available:
            raise ValueError(
                f"n={self.n}: {name} has {available} images in split {self.split!r}; give 1 to {available}, or None"
            )
        stored.check_outside(self.folder, sample)
        check_images(sample.images)
        suite = find_suite(self.suite)
        corruptions = suite.names(sample.id) if self.corruptions is None else tuple(dict.fromkeys(self.corruptions))
        for corruption in corruptions:
            suite.corruption(corruption, dataset=sample.id)
        images = self.n or available
        size = sample.images[0, ..., : 1 if keeps_gray(suite, sample.id) else 3].size
        together = [self.severities] if self.layout == "concatenated" else [(s,) for s in self.severities]
        files = []
        for corruption, severities in [(stored.CLEAN, (0,)), *product(corruptions, together)]:
            file = stored.set_file(self.layout, sample.id, self.split, corruption, severities[0])
            count = images * len(severities)
            files.append(CorruptedFile(file, sample.id, self.split, corruption, severities, count, count * size))
        description = str(PurePosixPath(files[0].file).with_name(f"{stored.DESCRIPTION}.json"))
        return CorruptedFile(description, sample.id, self.split, stored.DESCRIPTION, (0,), images, 0), *files


def write_benchmark(folder: str | Path, datasets: Iterable[str], *, jobs: int = 1, **options: Any) -> pd.DataFrame:
    """Write corrupted sets to a folder; the same call goes on with what a killed one left undone.

    The size is printed and compared with the free space first. Memory holds one clean data set while its
    clean file is written; afterwards each worker holds a few images.

    Parameters
    ----------
    folder, datasets, **options
        As in `CorruptedSets`: suite, layout, corruptions, severities, split, n, image_size, seed and root.
    jobs : int
        Worker processes; -1 for one per core. The bytes do not depend on it.

    Returns
    -------
    DataFrame
        ``table.csv``, one row per file: file, dataset, split, corruption, severities, images, bytes, sha256,
        made_with.

    Raises
    ------
    FileNotFoundError, ValueError
        As from `CorruptedSets`; a folder that holds other things or sets made with other parameters (each
        difference is named); a lost file that came out with other bytes than recorded.
    OSError
        Too little space on the disk (`errno.ENOSPC`), before the start or on the way; the half-written file
        is removed, the others stay.
    """
    check_keywords(write_benchmark, options, inspect.signature(CorruptedSets).parameters)
    sets = CorruptedSets(folder, datasets, **options)
    print(sets)
    with open_store(sets.folder, parameters=sets.parameters) as store:
        stored.remove_leftovers(sets.folder / file.file for file in sets.all_files)
        if sets.missing_bytes > shutil.disk_usage(sets.folder).free:
            raise disk_full(sets.folder, f"{size_text(sets.missing_bytes)} are to be written")
        recorded = {file: store.rows(file)[0] for file in store.done}
        ledger = stored.Ledger(sets.folder, sets.parameters, recorded)
        done = {file.file for file in sets.all_files if ledger.state(file.file, verify=False) == "whole"}
        written = _written(sets, store, ledger, done, jobs)
        said = f"write {sets.folder.name}"
        for row, seconds in progress(written, total=len(sets), done=len(done), description=said, unit="files"):
            earlier = recorded.get(row["file"])
            if earlier is None:
                store.append(row["file"], [row], seconds=seconds)
            elif earlier["sha256"] != row["sha256"]:
                raise ValueError(
                    f"{sets.folder / row['file']} had to be written again and has SHA-256 {row['sha256']}, recorded is "
                    f"{earlier['sha256']} (made with {earlier['made_with']}; now {row['made_with']}). Use the earlier "
                    "versions, or write everything to another folder."
                )
        return store.table(sorted(store.done))


def write_folders(
    folder: str | Path,
    dataset: str,
    *,
    suite: str = "medimeta-c",
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = (3,),
    kind: str = "",
    splits: Sequence[str] = ("test",),
    seed: int = 0,
    jobs: int = 1,
    **drawn: Any,
) -> list[ImageDataset]:
    """Write corrupted images as PNG in class folders; the same call goes on with what a killed one left undone.

    Of class folders every file keeps its place and, but for the suffix, its name. Other sources get a folder for each
    class, in their order, and names and prompts in ``classnames.txt``: the result loads with the same labels. The
    pixels are those of `corrupted`.

    Parameters
    ----------
    folder : path
        Holds the class folders, or ``CORRUPTION/SEVERITY`` with them if there are several.
    dataset : str
        As in `load_dataset`.
    suite : str
    corruptions : sequence of str, optional
        All that the suite evaluates by default.
    severities : sequence of int
        Of 1 to 5.
    kind : str
        A family of the suite, for own images where it has several.
    splits : sequence of str
    seed : int
        Of the corruptions and of the draw.
    jobs : int
        Worker processes; -1 for one per core.
    **drawn
        n, image_size and what else `load_dataset` takes.

    Returns
    -------
    list of ImageDataset
        What was corrupted, a data set for each split.

    Raises
    ------
    ValueError
        An unknown corruption, severity or kind; a folder that holds other things, or was made with other parameters or
        of other images (each difference is named), or that lies in the source.
    """
    known = find_suite(suite)
    if kind:
        check_choice("kind of images", kind, filter(None, known.families))
    severities = tuple(dict.fromkeys(map(check_severity, severities)))
    if 0 in severities or not severities:
        raise ValueError(f"severities={list(severities)}: give one or more of {', '.join(map(str, SEVERITIES))}")
    sets = [load_dataset(dataset, split=split, seed=seed, **drawn) for split in splits]
    # The last part of an id tells its family, and the whole addresses its random numbers.
    named = [replace(data, id=f"{data.id}/{kind}") if kind else data for data in sets]
    first = named[0]
    stored.check_outside(Path(folder), first)
    check_images(first.images)
    names = known.names(first.id) if corruptions is None else tuple(dict.fromkeys(corruptions))
    for name in names:
        known.corruption(name, dataset=first.id)
    cells = list(product(names, severities))
    roots = {cell: "" if len(cells) == 1 else f"{cell[0]}/{cell[1]}/" for cell in cells}
    items = {
        root + file: (number, position, *cell)
        for number, data in enumerate(named)
        for position, file in zip(range(len(data)), stored.image_places(data), strict=True)
        for cell, root in roots.items()
    }
    missing_classes = {*range(len(first.classes))} - {int(label) for data in named for label in data.labels}
    if missing_classes:
        absent = ", ".join(first.classes[label] for label in sorted(missing_classes))
        warnings.warn(f"no image of {absent} is written, so the new folders have fewer classes", stacklevel=2)
    pixels = hashlib.sha256()
    for data in named:
        pixels.update(np.ascontiguousarray(data.images).data)
    parameters = {
        "kind": CORRUPTED, "dataset": first.id, "licence": first.licence, "synthetic": first.synthetic,
        "note": "The licence of the source goes with these images. Not for clinical use.",
        "suite": suite_record(suite), "corruptions": list(names), "severities": list(severities), "seed": seed,
        "splits": list(splits), "drawn": drawn, "size": list(first.images.shape[1:3]), "pixels": pixels.hexdigest(),
        "library": VERSION,
    }  # fmt: skip
    folder = Path(folder)
    with open_store(folder, parameters=parameters) as store:
        for root in roots.values():
            stored.write_words(folder / root, first)
        known_bytes = {file: store.rows(file)[0]["sha256"] for file in store.done}
        whole = {file for file in known_bytes if (folder / file).is_file()}
        whole = {file for file in whole if file_sha256(folder / file) == known_bytes[file]}
        missing = [file for file in items if file not in whole]
        written = map_items(
            _write_image, [(file, *items[file]) for file in missing], context=(folder, named, suite, seed), jobs=jobs
        )
        words = {"description": f"corrupt {first.id}", "unit": "images"}
        for _, (row, seconds) in progress(written, total=len(items), done=len(items) - len(missing), **words):
            if row["file"] not in store.done:
                store.append(row["file"], [row], seconds=seconds)
        store.finish(items)
    return sets


def _write_image(
    context: tuple[Path, list[ImageDataset], str, int], item: tuple[str, int, int, str, int]
) -> tuple[dict[str, Any], float]:
    """Write one image, in a worker process."""
    started = time.perf_counter()
    (folder, sets, suite, seed), (file, number, position, corruption, severity) = context, item
    data = sets[number].subset([position])
    label = int(data.labels[0])
    with whole_file(folder / file) as part:
        image = corrupted(data, corruption, severity=severity, seed=seed, suite=suite).images[0]
        Image.fromarray(image).save(part, format="PNG")
    row = {"file": file, "source": data.files[0], "split": data.split, "label": label, "class": data.classes[label]}
    row |= {"corruption": corruption, "severity": severity, "sha256": file_sha256(folder / file)}
    return row, time.perf_counter() - started


def suite_record(suite: str) -> dict[str, Any]:
    """A suite with all its constants, for ``manifest.json``."""
    families = {
        family or "every data set": {row.name: [dict(values) for values in row.severities] for row in rows}
        for family, rows in find_suite(suite).families.items()
    }
    return {"id": suite, "parameters": families}


def _written(
    sets: CorruptedSets, store: RowStore, ledger: stored.Ledger, done: set[str], jobs: int
) -> Iterator[tuple[dict[str, Any], float]]:
    """Write what is missing, data set by data set; yields the row and the seconds of each new file."""
    for name, files in sets.files.items():
        description, clean, *others = files
        missing = [file for file in others if file.file not in done]
        for source in (description, clean) if missing else ():
            # Its size may be right and its content wrong, and everything else is made of it.
            if source.file in done and ledger.state(source.file) == "changed":
                (sets.folder / source.file).unlink()
                done.discard(source.file)
        if not {description.file, clean.file} <= done:
            yield from _write_clean(sets, name, [file for file in (description, clean) if file.file not in done])
        if missing:
            facts = json.loads((sets.folder / description.file).read_text(encoding="utf-8"))
            context = (sets, sets.folder / clean.file, np.array(facts["indices"], dtype=np.int64))
            with closing(map_items(_write_corrupted, missing, context=context, jobs=jobs)) as results:
                for _, result in results:
                    yield result
        # Reached when the caller has recorded the last file: from here on the data set can be read.
        store.finish(sorted(store.done))


def _write_corrupted(
    context: tuple[CorruptedSets, Path, NDArray[np.int64]], file: CorruptedFile
) -> tuple[dict[str, Any], float]:
    """Write one file, in a worker process: a few clean images at a time."""
    started = time.perf_counter()
    sets, clean, indices = context
    members = stored.member_names(sets.layout)
    shape, labels = stored.read_labels(clean, members=members)

    def chunks() -> Iterator[Pixels]:
        options = {"seed": sets.seed, "dataset": file.dataset, "suite": sets.suite}
        for severity in file.severities:
            first = 0
            for images in stored.image_chunks(clean, members[0], len(labels)):
                where = indices[first : first + len(images)]
                yield corrupt(images, file.corruption, severity=severity, indices=where, **options)
                first += len(images)

    _write_set(sets, file, chunks(), shape[1:], np.tile(labels, len(file.severities)))
    return _row(sets, file), time.perf_counter() - started


def _write_clean(
    sets: CorruptedSets, name: str, wanted: Sequence[CorruptedFile]
) -> Iterator[tuple[dict[str, Any], float]]:
    started = time.perf_counter()
    options = {"split": sets.split, "n": sets.n, "seed": sets.seed, "image_size": sets.image_size, "root": sets.root}
    data = load_dataset(name, **options)
    for file in wanted:
        if file.corruption == stored.DESCRIPTION:
            with whole_file(sets.folder / file.file) as part:
                part.write_text(stored.described(data), encoding="utf-8")
        else:
            images = luma(data.images) if keeps_gray(sets.suite, data.id) else data.images
            _write_set(sets, file, [images], images.shape[1:], data.labels)
        yield _row(sets, file), time.perf_counter() - started


def _write_set(
    sets: CorruptedSets,
    file: CorruptedFile,
    chunks: Iterable[Pixels],
    shape: tuple[int, ...],
    labels: NDArray[np.int64],
) -> None:
    """Write images of a shape and their labels in the layout of the sets."""
    column = labels[:, None] if sets.layout == "concatenated" else labels  # MedMNIST's tools expect a column
    members = stored.member_names(sets.layout)
    stored.write_npz(sets.folder / file.file, chunks, shape=(len(labels), *shape), labels=column, members=members)


def _row(sets: CorruptedSets, file: CorruptedFile) -> dict[str, Any]:
    path = sets.folder / file.file
    facts = {name: value for name, value in asdict(file).items() if name != "size"}
    facts["severities"] = " ".join(map(str, file.severities))
    # The bytes may depend on these versions.
    others = [f"{package} {version(package)}" for package in ("numpy", "scipy", "pillow")]
    made_with = ", ".join([f"medrobust {VERSION}", *others])
    return facts | {"bytes": path.stat().st_size, "sha256": file_sha256(path), "made_with": made_with}
