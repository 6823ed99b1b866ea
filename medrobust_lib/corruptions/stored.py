"""The two file layouts of corrupted sets: where each file lies, how it is written and how it is read.

``per-severity`` is the layout of MediMeta-C and of the MedMNIST-C of its authors:
``{set}/{split}/{corruption}_severity_{1..5}.npz`` and ``clean.npz`` with the keys ``images`` and ``labels``.
``concatenated`` is the official layout of MedMNIST-C: ``{set}/{corruption}.npz`` with the keys ``test_images``
and ``test_labels`` and the five severities one after the other.
A third, class folders of PNG, is read by `load_dataset` alone: `image_places` says where each image lies.

Files are written without compression. It would save about half of the space, but take several times as long as the
corruptions, tie the bytes to a version of zlib, hide the size until the end and make single images slow to read.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, count, islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medrobust_lib.checks import check_choice, suggest
from medrobust_lib.corruptions.functions import Pixels
from medrobust_lib.corruptions.suites import SEVERITIES, check_severity
from medrobust_lib.data.dataset import ImageDataset, check_labels
from medrobust_lib.data.decoding import as_rgb, listed_members, member_names_of, member_rows
from medrobust_lib.data.readers import SPLITS
from medrobust_lib.data.registry import DATASETS, labelled
from medrobust_lib.data.wording import class_wording
from medrobust_lib.experiments.store import read_parameters
from medrobust_lib.files import file_sha256, inside, parsed, read_json_object, whole_file

Layout = Literal["per-severity", "concatenated"]
CLEAN = "clean"
DESCRIPTION = "description"
KIND = "corrupted sets"  # in manifest.json, which other programs may use for other things
_WORDS = "classnames.txt"
_UNSAFE = re.compile(r"[^\w .()+-]|^\.+")  # in the name of a file, on some system
_CHUNK = 32  # images in memory at a time while a file is written
_UNUSABLE = "is not a usable file of corrupted images"
_FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # the time of writing would change the bytes


def set_folder(dataset: str) -> str:
    """Folder of a data set: the source's own name (``mammo_calc``, ``bloodmnist``), else the id's words."""
    row = DATASETS.get(dataset)
    if row is not None and row.kind in {"medmnist", "medimeta"}:
        return PurePosixPath(row.location).name
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in dataset)


def set_file(layout: Layout, dataset: str, split: str, corruption: str, severity: int) -> str:
    """Path of a file below the collection's folder, with forward slashes; severity 0 is the clean file."""
    folder = set_folder(dataset)
    if layout == "concatenated":
        return f"{folder}/{corruption if severity else CLEAN}.npz"
    return f"{folder}/{split}/{f'{corruption}_severity_{severity}' if severity else CLEAN}.npz"


def member_names(layout: Layout) -> tuple[str, str]:
    """Names of the two arrays in each file."""
    return ("test_images", "test_labels") if layout == "concatenated" else ("images", "labels")


def _class_folders(data: ImageDataset) -> list[str]:
    """Names of folders in the order of the classes, whatever they are called."""
    digits = len(str(len(data.classes) - 1))
    return [f"{label:0{digits}} {_UNSAFE.sub('_', name)}" for label, name in enumerate(data.classes)]


def image_places(data: ImageDataset) -> list[str]:
    """Where each image comes to lie: in its own place among class folders, else in a folder for its class."""
    folders, owners = _class_folders(data), data.groups or [""] * len(data)
    split = data.split if data.split in SPLITS else ""
    places: dict[str, None] = {}
    for file, label, owner in zip(data.files, data.labels, owners, strict=True):
        if not data.id.startswith("folder:"):  # a table's file may lie anywhere
            file = "/".join(_UNSAFE.sub("_", part) for part in (split, folders[label], owner, file) if part)
        counted = (f"{file}{f'.{k}' if k else ''}.png" for k in count())
        wanted = chain([str(PurePosixPath(file).with_suffix(".png"))], counted)
        places[next(place for place in wanted if place not in places)] = None  # a.jpg and a.tif may lie in one folder
    return list(places)


def check_outside(folder: Path, data: ImageDataset) -> None:
    """Refuse to write among the images of class folders, where what is written would be read as one of them."""
    source = Path(data.provenance["read_from"])
    if data.id.startswith("folder:") and folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{folder} lies in {source}, whose images are read; write to a folder outside it")


def write_words(root: Path, data: ImageDataset) -> None:
    """Say beside the class folders what the classes are called in prompts, where that is known."""
    source = Path(data.provenance["read_from"])
    if data.id.startswith("folder:"):
        found = [path for path in (source / _WORDS, source / "images" / _WORDS) if path.is_file()]
        text = found[0].read_text(encoding="utf-8-sig") if found else ""
    else:
        lines = [f"{folder}\t{name}" for folder, name in zip(_class_folders(data), data.classes, strict=True)]
        text = "\n".join([*lines, *data.templates]) + "\n"
    if text:
        with whole_file(root / _WORDS) as part:
            part.write_text(text, encoding="utf-8")


def write_npz(
    path: Path, chunks: Iterable[Pixels], *, shape: tuple[int, ...], labels: NDArray[np.int64], members: tuple[str, str]
) -> None:
    """Write images and labels as an npz file of fixed bytes, chunk by chunk.

    Parameters
    ----------
    path : Path
        Appears when it is whole; folders are made.
    chunks : iterable of uint8 [m, H, W] or [m, H, W, 3]
        In order; only one is in memory at a time.
    shape : tuple of int
        Of all chunks together.
    labels : int64 [n] or [n, 1]
    members : tuple of two str
        Names of the images and of the labels.

    Raises
    ------
    ValueError
        Images and labels of different number, or chunks that are not uint8 or do not add up to the shape.
    OSError
        The disk is full (`errno.ENOSPC`, `errno.EDQUOT`) or not writable; nothing of the file stays.
    """
    if len(labels) != shape[0]:
        raise ValueError(f"{path}: {shape[0]} images and {len(labels)} labels; each image needs one")
    with whole_file(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(_member(members[0]), "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(int(size) for size in shape)}
            np.lib.format.write_array_header_1_0(stream, header)
            count = 0
            for chunk in chunks:
                if chunk.dtype != np.uint8 or chunk.shape[1:] != tuple(shape[1:]):
                    raise ValueError(f"{path}: {chunk.dtype} images of shape {chunk.shape}; expected uint8 {shape}")
                stream.write(np.ascontiguousarray(chunk).data)
                count += len(chunk)
            if count != shape[0]:
                raise ValueError(f"{path}: {count} images came, {shape[0]} were announced")
        with archive.open(_member(members[1]), "w") as stream:
            np.lib.format.write_array(stream, np.ascontiguousarray(labels, "<i8"), (1, 0), allow_pickle=False)


def image_chunks(path: Path, member: str, count: int) -> Iterator[Pixels]:
    """The first `count` images of an npz file, a few at a time; a damaged one raises ValueError."""
    rows = member_rows(path, member, np.arange(count))
    while chunk := list(islice(rows, _CHUNK)):
        yield np.stack(chunk)


def read_npz(
    path: Path, *, members: tuple[str, str], part: int = 0, parts: int = 1
) -> tuple[Pixels, NDArray[np.int64]]:
    """Read images and labels, or one of several equal parts of them, without unpickling anything.

    Parameters
    ----------
    path : Path
    members : tuple of two str
        Names of the images (uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]) and of the labels (whole numbers
        [N] or [N, 1]).
    part, parts : int
        Which part to read, of how many; only its images are unpacked.

    Returns
    -------
    images : uint8 [N / parts, H, W, 3]
        Gray images are repeated over the channels.
    labels : int64 [N / parts]

    Raises
    ------
    ValueError
        Not a readable file, a missing or object array, another dtype or shape, images and labels of
        different number, or a number that does not divide into the parts; the file is named.
    """
    shape, labels = read_labels(path, members=members)
    with parsed(f"{path} {_UNUSABLE}"):
        if shape[0] % parts:
            raise ValueError(f"{shape[0]} images do not divide into {parts} severities")
        count = shape[0] // parts
        positions = np.arange(part * count, (part + 1) * count)
        images = np.empty((count, *shape[1:3], 3), np.uint8)
        for place, row in enumerate(member_rows(path, members[0], positions)):
            images[place] = as_rgb(row)
    return images, labels[positions]


def read_labels(path: Path, *, members: tuple[str, str]) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """Shape of the images and the labels of an npz file; errors as from `read_npz`."""
    with parsed(f"{path} {_UNUSABLE}"), zipfile.ZipFile(path) as archive:
        held = member_names_of(archive)
        missing = [name for name in members if name not in held]
        if missing:
            raise ValueError(f"no array {missing[0]!r} in it; it holds {', '.join(held) or 'nothing'}")
        return listed_members(archive, *members)


def remove_leftovers(files: Iterable[Path]) -> None:
    """Remove what a killed run wrote of files that it did not finish."""
    for folder in {file.parent for file in files}:
        for leftover in folder.glob(".*.part"):
            leftover.unlink()


def described(data: ImageDataset) -> str:
    """All of a data set but its images and labels, as JSON."""
    facts = {part.name: getattr(data, part.name) for part in fields(data) if part.name not in {"images", "labels"}}
    # Where the clean images lay on this computer is nobody's business, and no part of the set.
    facts["provenance"] = {name: value for name, value in data.provenance.items() if name != "read_from"}
    facts["indices"] = data.indices.tolist()
    named = {"files": data.files != tuple(f"image {index}" for index in data.indices), "groups": data.groups}
    facts = {name: value for name, value in facts.items() if named.get(name, True)}
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"{name}.npy", _FIXED_DATE)
    info.create_system = 3  # Unix on every system
    info.external_attr = 0o644 << 16
    return info


_AGAIN = "Make the same call of write_benchmark, or run the same script, again: it writes what is missing."
_ANEW = "Delete the folder and write the sets again."


def read_corrupted(
    folder: str | Path,
    dataset: str,
    corruption: str = CLEAN,
    *,
    severity: int = 0,
    split: str = "test",
    verify: bool = True,
    label_order: Sequence[str] | None = None,
) -> ImageDataset:
    """Read one corrupted set, or the clean images, of a collection in either layout.

    Parameters
    ----------
    folder : path
        Of the collection: one written by `write_benchmark`, the authors' released MediMeta-C or MedMNIST-C
        (``{set}/{split}/{corruption}_severity_{1..5}.npz``), or the official MedMNIST-C (``{set}/{corruption}.npz``).
    dataset : str
        Id, such as "medimeta/pbc" for the folder ``pbc``.
    corruption : str
    severity : {0, 1, 2, 3, 4, 5}
        0 gives the clean images.
    split : str
    verify : bool
        Compare the SHA-256 with the manifest's; without it only the length is compared.
    label_order : sequence of str, optional
        For files without our manifest: the class that each label number of the file stands for, where it is not
        the order of the data set's class list.

    Returns
    -------
    ImageDataset
        ``provenance["verified"]`` says what was checked.

    Warns
    -----
    UserWarning
        There is no manifest of ours, so nothing can be verified.

    Raises
    ------
    FileNotFoundError
        No such folder or set; what there is is listed.
    ValueError
        A set that is half written, truncated or changed since it was written; a file that holds something
        else; labels outside the class list.
    """
    folder = Path(folder)
    severity = check_severity(severity)
    if corruption == CLEAN and severity:
        raise ValueError(f"severity={severity} of the clean images; name a corruption, or leave severity at 0")
    ledger = read_ledger(folder)
    if ledger is None:
        return _read_foreign(folder, dataset, corruption, severity, split, label_order)
    if label_order is not None:
        raise ValueError(f"label_order is for files without a manifest; {folder} has one, and labels of the class list")
    layout: Layout = ledger.parameters["layout"]
    clean = set_file(layout, dataset, split, CLEAN, 0)
    file = set_file(layout, dataset, split, corruption, severity)
    description = Path(clean).with_name(f"{DESCRIPTION}.json").as_posix()
    for name in (description, file):
        ledger.check(name, verify=verify)
    facts = read_json_object(folder / description, "a description of corrupted sets", _ANEW)
    images, labels = _read_severity(folder / file, layout, severity)
    suite, seed = ledger.parameters["suite"]["id"], ledger.parameters["seed"]
    done = {"name": corruption if severity else CLEAN, "severity": severity, "suite": suite, "seed": seed}
    with parsed(f"{folder / description} does not describe {folder / file}", _ANEW):
        facts["provenance"] = {
            "caveats": [],  # of sets written before there were any
            **facts["provenance"],
            "read_from": str(folder / file),
            "corruption": done,
            "verified": "SHA-256 of the manifest" if verify else "length only",
        }
        facts |= {name: tuple(facts.get(name, ())) for name in ("classes", "templates", "files", "groups")}
        facts["indices"] = np.array(facts["indices"], dtype=np.int64)
        return ImageDataset(**facts, images=images, labels=labels)


def _read_severity(path: Path, layout: Layout, severity: int) -> tuple[Pixels, NDArray[np.int64]]:
    """Images and labels of one severity: of a corruption's concatenated file, one of its parts."""
    parts = len(SEVERITIES) if layout == "concatenated" and severity else 1
    return read_npz(path, members=member_names(layout), part=(severity - 1) % parts, parts=parts)


@dataclass(frozen=True)
class Ledger:
    """What a collection of ours records about itself: its folder, parameters and the row of each file."""

    folder: Path
    parameters: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]

    def state(self, file: str, *, verify: bool = True) -> str:
        """One of missing, truncated, changed and whole; a file without a record is missing."""
        path, row = self.folder / file, self.rows.get(file)
        if row is None or not path.is_file():
            return "missing"
        if path.stat().st_size != row["bytes"]:
            return "truncated"
        return "changed" if verify and file_sha256(path) != row["sha256"] else "whole"

    def check(self, file: str, *, verify: bool) -> None:
        """Refuse a file that is not there or not as it was written."""
        path = self.folder / file
        if file not in self.rows:
            if path.exists():
                raise ValueError(f"{path} is there, but its run was stopped before the data set was whole. {_AGAIN}")
            held = [known for known in self.rows if known.endswith(".npz")]
            raise FileNotFoundError(f"no {file} in {self.folder}.{suggest(file, held)}")
        state, recorded = self.state(file, verify=verify), self.rows[file]
        if state != "whole":
            size = path.stat().st_size if path.is_file() else 0
            says = {
                "missing": "is recorded but not there",
                "truncated": f"has {size} bytes, {recorded['bytes']} are recorded",
                "changed": f"has changed since it was written: its SHA-256 is not the recorded {recorded['sha256']}. "
                "Delete it",
            }
            raise ValueError(f"{path} {says[state]}. {_AGAIN}")


def read_ledger(folder: Path) -> Ledger | None:
    """Manifest and table of a collection, or None where it has no manifest of ours."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder.absolute()}")
    parameters = read_parameters(folder)
    if parameters is None or parameters.get("kind") != KIND:
        if (folder / "manifest.json").exists() and (folder / "journal.jsonl").exists():
            raise ValueError(f"{folder / 'manifest.json'} is damaged; delete {folder} and write the sets again")
        return None
    table = folder / "table.csv"
    if not table.exists():
        raise ValueError(f"{folder} is half written: its run was stopped before a data set was whole. {_AGAIN}")
    with parsed(f"{folder / 'manifest.json'} does not say how the sets were made", _ANEW):
        check_choice("layout", parameters["layout"], get_args(Layout))
        parameters["suite"]["id"], parameters["seed"]
    with parsed(f"{table} is no table of corrupted sets", _AGAIN):
        rows = pd.read_csv(table, dtype={"file": str, "severities": str, "sha256": str}, keep_default_na=False)
        rows[["bytes", "sha256"]]
        for file in rows["file"]:
            inside(folder, file, source=table)
        return Ledger(folder, parameters, {row["file"]: row for row in rows.to_dict("records")})


def _read_foreign(
    folder: Path, dataset: str, corruption: str, severity: int, split: str, label_order: Sequence[str] | None
) -> ImageDataset:
    """Read a file that came without our manifest, trusting its name and its labels."""
    if dataset not in DATASETS:
        raise ValueError(
            f"{folder} has no manifest of ours, so the classes come from the registry, which has no {dataset!r}."
            f"{suggest(dataset, DATASETS)}"
        )
    row, words = DATASETS[dataset], class_wording(dataset)
    path, layout = _foreign_file(folder, dataset, corruption, severity, split)
    images, labels = _read_severity(path, layout, severity)
    if label_order is not None:
        order = [words.label_of(name) for name in label_order]
        if None in order or sorted(order) != list(range(len(words.names))):
            raise ValueError(f"label_order={list(label_order)}: name each class of {dataset} once: {list(words.names)}")
        check_labels(labels, label_order, str(path))
        labels = np.array(order, dtype=np.int64)[labels]
    message = (
        f"{folder} has no manifest of ours: nothing was verified, neither that {path.name} is whole and unchanged nor "
        f"that its labels follow the class list {', '.join(words.names)}"
    )
    warnings.warn(message, UserWarning, stacklevel=3)
    provenance = {
        "source": f"{row.source}; corrupted by others",
        "read_from": str(path),
        "synthetic": row.kind == "phantom",
        "split_size": len(labels),
        "corruption": {"name": corruption if severity else CLEAN, "severity": severity},
        "verified": "nothing: no manifest beside the files",
        "wording": f"{words.set_name}: {words.wording}",
        "caveats": [],  # what corruptions do to images is no fault of the set
    }
    places = np.arange(len(labels))
    return labelled(row, words, split=split, images=images, labels=labels, indices=places, provenance=provenance)


def _foreign_file(folder: Path, dataset: str, corruption: str, severity: int, split: str) -> tuple[Path, Layout]:
    layouts: tuple[Layout, ...] = ("per-severity", "concatenated") if severity else ("per-severity",)
    looked = [(folder / set_file(layout, dataset, split, corruption, severity), layout) for layout in layouts]
    for path, layout in looked:
        if path.is_file():
            return path, layout
    if not severity:
        raise FileNotFoundError(
            f"no clean images at {looked[0][0]}; take them from load_dataset({dataset!r}, split={split!r})"
        )
    place = folder / set_folder(dataset)
    held = sorted(path.relative_to(folder).as_posix() for path in place.rglob("*.npz"))
    names = ", ".join(str(path) for path, _ in looked)
    listing = (
        f" It holds {', '.join(held[:8])}{', ...' * (len(held) > 8)}." if held else f" There is no set in {place}."
    )
    raise FileNotFoundError(f"no {corruption} of severity {severity} of {dataset}: looked at {names}.{listing}")
