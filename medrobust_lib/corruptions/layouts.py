"""The two file layouts of corrupted sets: where each file lies, how it is written and how it is read.

``per-severity`` is the layout of MediMeta-C and of the MedMNIST-C of its authors:
``{set}/{split}/{corruption}_severity_{1..5}.npz`` and ``clean.npz`` with the keys ``images`` and ``labels``.
``concatenated`` is the official layout of MedMNIST-C: ``{set}/{corruption}.npz`` with the keys ``test_images``
and ``test_labels`` and the five severities one after the other.

Files are written without compression. It would save about half of the space, but take several times as long as the
corruptions, tie the bytes to a version of zlib, hide the size until the end and make single images slow to read.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.data.catalogue import DATASETS
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.npz import member_header, member_labels, member_names_of, member_rows
from medrobust_lib.files import parsed, whole_file

Layout = Literal["per-severity", "concatenated"]
CLEAN = "clean"
DESCRIPTION = "description"
KIND = "corrupted sets"  # in manifest.json, which other programs may use for other things
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


def write_npz(
    path: Path,
    chunks: Iterable[NDArray[np.uint8]],
    *,
    shape: tuple[int, ...],
    labels: NDArray[np.int64],
    members: tuple[str, str],
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


def image_chunks(path: Path, member: str, count: int) -> Iterator[NDArray[np.uint8]]:
    """The first `count` images of an npz file, a few at a time; a damaged one raises ValueError."""
    rows = member_rows(path, member, np.arange(count))
    while chunk := list(islice(rows, _CHUNK)):
        yield np.stack(chunk)


def read_npz(
    path: Path, *, members: tuple[str, str], part: int = 0, parts: int = 1
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
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
            images[place] = row[..., None] if row.ndim == 2 else row
    return images, labels[positions]


def read_labels(path: Path, *, members: tuple[str, str]) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """Shape of the images and the labels of an npz file; errors as from `read_npz`."""
    with parsed(f"{path} {_UNUSABLE}"), zipfile.ZipFile(path) as archive:
        held = member_names_of(archive)
        missing = [name for name in members if name not in held]
        if missing:
            raise ValueError(f"no array {missing[0]!r} in it; it holds {', '.join(held) or 'nothing'}")
        shape, _ = member_header(archive, members[0])
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise ValueError(f"{members[0]} has shape {shape}; expected [N, H, W] or [N, H, W, 3]")
        labels = member_labels(archive, members[1], count=shape[0])
    return shape, labels


def remove_leftovers(files: Iterable[Path]) -> None:
    """Remove what a killed run wrote of files that it did not finish."""
    for folder in {file.parent for file in files}:
        for leftover in folder.glob(".*.part"):
            leftover.unlink()


def as_stored(labels: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    """Labels in the layout's shape: MedMNIST's tools expect a column."""
    return labels[:, None] if layout == "concatenated" else labels


def described(data: ImageDataset) -> str:
    """All of a data set but its images and labels, as JSON."""
    facts = {
        "id": data.id,
        "split": data.split,
        "classes": data.classes,
        "templates": data.templates,
        "modality": data.modality,
        "licence": data.licence,
        # Where the clean images lay on this computer is nobody's business, and no part of the set.
        "provenance": {name: value for name, value in data.provenance.items() if name != "read_from"},
        "indices": data.indices.tolist(),
    }
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"{name}.npy", _FIXED_DATE)
    info.create_system = 3  # Unix on every system
    info.external_attr = 0o644 << 16
    return info
