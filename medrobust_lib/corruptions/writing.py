"""What a run of `write_benchmark` is going to write: files, sizes and the parameters that the bytes depend on."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from medrobust_lib.checks import suggest
from medrobust_lib.corruptions.functions import check_images
from medrobust_lib.corruptions.stored import (
    CLEAN,
    DESCRIPTION,
    KIND,
    Layout,
    as_stored,
    check_benchmark,
    described,
    image_chunks,
    member_names,
    read_corrupted,
    read_labels,
    remove_leftovers,
    set_file,
    write_npz,
)
from medrobust_lib.corruptions.suites import SEVERITIES, Suite, check_severity, corrupt, find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.experiments import RowStore, map_items, open_store, progress
from medrobust_lib.files import disk_full, file_sha256, size_text, whole_file
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


__all__ = ["BenchmarkPlan", "check_benchmark", "corrupted", "plan_benchmark", "read_corrupted", "write_benchmark"]


def corrupted(
    data: ImageDataset, name: str, *, severity: int, seed: int = 0, suite: str = "medimeta-c"
) -> ImageDataset:
    """Corrupt a data set in memory.

    The suite "medmnist-c" makes ultrasound, X-ray and OCT images gray, as the official files are; everything else is
    corrupted as RGB, so that noise on a gray image is coloured, as with the public implementations of ImageNet-C.
    Every image has its own random stream, keyed by (seed, data set, index in the full split, corruption,
    severity), so an image gets the same bytes in any subset, and in the files of `write_benchmark`.

    Parameters
    ----------
    data : ImageDataset
    name : str
        A corruption of the suite.
    severity : {0, 1, 2, 3, 4, 5}
        0 leaves the images as they are.
    seed : int
    suite : {"medimeta-c", "medmnist-c"}

    Returns
    -------
    ImageDataset
        The same id, labels and indices; ``provenance["corruption"]`` says what was done.

    Raises
    ------
    TypeError, ValueError
        As from `corrupt`: unknown corruption, severity or suite.
    """
    if not isinstance(data, ImageDataset):
        raise TypeError(f"data must be an ImageDataset, not {type(data).__name__}; bare arrays go to `corrupt`")
    gray = keeps_gray(suite, data.id)
    images = corrupt(
        _luma(data.images) if gray else data.images,
        name,
        severity=severity,
        seed=seed,
        dataset=data.id,
        suite=suite,
        indices=data.indices,
    )
    if gray:
        images = np.repeat(images[..., None], 3, axis=3)
    done = {"name": name, "severity": int(severity), "suite": suite, "seed": int(seed)}
    return replace(data, images=images, provenance=data.provenance | {"corruption": done})


def write_benchmark(
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
    jobs: int = 1,
) -> pd.DataFrame:
    """Write corrupted sets to a folder; the same call goes on with what a killed one left undone.

    The size is printed and compared with the free space first. Memory holds one clean data set while its
    clean file is written; afterwards each worker holds a few images.

    Parameters
    ----------
    folder : path
        Of the collection, for example ``data/MediMeta-C``.
    datasets : iterable of str
        Ids as for `load_dataset`. More data sets, corruptions and severities may be added by later calls;
        everything else must stay as it was.
    suite : {"medimeta-c", "medmnist-c"}
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
    jobs : int
        Worker processes; -1 for one per core. The bytes do not depend on it.

    Returns
    -------
    DataFrame
        ``table.csv``, one row per file: file, dataset, split, corruption, severities, images, bytes, sha256,
        made_with.

    Raises
    ------
    FileNotFoundError
        A data set is not on this computer.
    ValueError
        Unknown data set, suite, corruption, severity or layout; a folder that holds other things or sets
        made with other parameters (each difference is named); a lost file that came out with other bytes
        than recorded.
    OSError
        Too little space on the disk (`errno.ENOSPC`), before the start or on the way; the half-written file
        is removed, the others stay.
    """
    plan = plan_benchmark(
        folder,
        datasets,
        suite=suite,
        layout=layout,
        corruptions=corruptions,
        severities=severities,
        split=split,
        n=n,
        image_size=image_size,
        seed=seed,
        root=root,
    )
    print(plan)
    with open_store(plan.folder, parameters=plan.parameters) as store:
        remove_leftovers(plan.folder / file.file for file in plan.all_files)
        _check_space(plan)
        recorded = _recorded(store)
        done = {file.file for file in plan.all_files if _is_whole(plan.folder, file.file, recorded)}
        rows = progress(
            _written(plan, store, recorded, done, jobs),
            total=len(plan),
            done=len(done),
            description=f"write {plan.folder.name}",
            unit="files",
        )
        for row, seconds in rows:
            earlier = recorded.get(row["file"])
            if earlier is None:
                store.append(row["file"], [row], seconds=seconds)
            elif earlier["sha256"] != row["sha256"]:
                raise ValueError(
                    f"{plan.folder / row['file']} had to be written again and has SHA-256 {row['sha256']}, recorded is "
                    f"{earlier['sha256']} (made with {earlier['made_with']}; now {row['made_with']}). Use the earlier "
                    "versions, or write everything to another folder."
                )
        return store.table(sorted(store.done))


def _written(
    plan: BenchmarkPlan, store: RowStore, recorded: dict[str, Any], done: set[str], jobs: int
) -> Iterator[tuple[dict[str, Any], float]]:
    """Write what is missing, data set by data set; yields the row and the seconds of each new file."""
    for name, files in plan.files.items():
        description, clean, *others = files
        missing = [file for file in others if file.file not in done]
        for source in (description, clean) if missing else ():
            # Its size may be right and its content wrong, and everything else is made of it.
            path = plan.folder / source.file
            if source.file in done and file_sha256(path) != recorded[source.file]["sha256"]:
                path.unlink()
                done.discard(source.file)
        if not {description.file, clean.file} <= done:
            yield from _write_clean(plan, name, [file for file in (description, clean) if file.file not in done])
        if missing:
            results = map_items(_write_corrupted, missing, context=_context(plan, description, clean), jobs=jobs)
            with closing(results):
                for _, result in results:
                    yield result
        # Reached when the caller has recorded the last file: from here on the data set can be read.
        store.finish(sorted(store.done))


@dataclass(frozen=True)
class _Context:
    """What a worker needs besides the file to write; the images it reads from the clean file."""

    folder: Path
    clean: str
    layout: Layout
    suite: str
    seed: int
    split: str
    indices: tuple[int, ...]


def _context(plan: BenchmarkPlan, description: PlannedFile, clean: PlannedFile) -> _Context:
    facts = json.loads((plan.folder / description.file).read_text(encoding="utf-8"))
    return _Context(
        folder=plan.folder,
        clean=clean.file,
        layout=plan.parameters["layout"],
        suite=plan.parameters["suite"]["id"],
        seed=plan.parameters["seed"],
        split=plan.split,
        indices=tuple(facts["indices"]),
    )


def _write_corrupted(context: _Context, file: PlannedFile) -> tuple[dict[str, Any], float]:
    """Write one file, in a worker process: a few clean images at a time."""
    started = time.perf_counter()
    members = member_names(context.layout)
    clean = context.folder / context.clean
    shape, labels = read_labels(clean, members=members)
    indices = np.array(context.indices, dtype=np.int64)

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for severity in file.severities:
            first = 0
            for images in image_chunks(clean, members[0], len(labels)):
                yield corrupt(
                    images,
                    file.corruption,
                    severity=severity,
                    seed=context.seed,
                    dataset=file.dataset,
                    suite=context.suite,
                    indices=indices[first : first + len(images)],
                )
                first += len(images)

    path = context.folder / file.file
    repeated = np.tile(labels, len(file.severities))
    write_npz(
        path,
        chunks(),
        shape=(len(repeated), *shape[1:]),
        labels=as_stored(repeated, context.layout),
        members=members,
    )
    return _row(context.folder, file, context.split), time.perf_counter() - started


def _write_clean(
    plan: BenchmarkPlan, name: str, wanted: Sequence[PlannedFile]
) -> Iterator[tuple[dict[str, Any], float]]:
    started = time.perf_counter()
    parameters = plan.parameters
    data = load_dataset(
        name,
        split=plan.split,
        n=parameters["n"],
        seed=parameters["seed"],
        image_size=parameters["image_size"],
        root=plan.root,
    )
    for file in wanted:
        path = plan.folder / file.file
        if file.corruption == DESCRIPTION:
            with whole_file(path) as part:
                part.write_text(described(data), encoding="utf-8")
        else:
            images = _luma(data.images) if keeps_gray(parameters["suite"]["id"], data.id) else data.images
            write_npz(
                path,
                [images],
                shape=images.shape,
                labels=as_stored(data.labels, parameters["layout"]),
                members=member_names(parameters["layout"]),
            )
        yield _row(plan.folder, file, plan.split), time.perf_counter() - started


def _luma(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Gray images [n, H, W] of RGB images as Pillow makes them; equal channels keep their values."""
    return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])


def _row(folder: Path, file: PlannedFile, split: str) -> dict[str, Any]:
    path = folder / file.file
    return {
        "file": file.file,
        "dataset": file.dataset,
        "split": split,
        "corruption": file.corruption,
        "severities": " ".join(map(str, file.severities)),
        "images": file.images,
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "made_with": _makers(),
    }


def _makers() -> str:
    """Versions that the bytes may depend on."""
    others = (f"{package} {version(package)}" for package in ("numpy", "scipy", "pillow"))
    return ", ".join([f"medrobust {VERSION}", *others])


def _recorded(store: RowStore) -> dict[str, dict[str, Any]]:
    return {row["file"]: row for row in store.table(sorted(store.done)).to_dict("records")}


def _is_whole(folder: Path, file: str, recorded: dict[str, Any]) -> bool:
    path = folder / file
    return file in recorded and path.is_file() and path.stat().st_size == recorded[file]["bytes"]


def _check_space(plan: BenchmarkPlan) -> None:
    needed = plan.missing_bytes
    if needed > shutil.disk_usage(plan.folder).free:
        raise disk_full(plan.folder, f"{size_text(needed)} are to be written")
