"""Readers of the public layouts. Each lists one split cheaply; only the images drawn are decoded.

MedMNIST npz, MedIMeta folders, class folders (ImageFolder and CoOp style) and CSV tables. Labels are
matched to the class list by name wherever the source states names, never by position alone.
"""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from medrobust_lib.data.dataset import check_labels
from medrobust_lib.data.decoding import IMAGE_SUFFIXES, image_shape, read_image
from medrobust_lib.data.npz import member_header, member_rows
from medrobust_lib.data.wording import ClassWording, suggest

UNSPLIT = "all"
SPLITS = ("train", "val", "test")
_SPLIT_SPELLINGS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_SPLIT_SPELLINGS |= {"test": "test", "testing": "test"}

Images = Iterator[NDArray[np.uint8]]


@dataclass(frozen=True)
class Split:
    """One split of a source: listed, not yet decoded.

    Attributes
    ----------
    split : str
        ``train``, ``val``, ``test`` or ``all``.
    labels : int64 [N]
        Indices into ``names``.
    codes : tuple of str
        The source's own class names (folder names, table values).
    names : tuple of str
        The same classes in words.
    shapes : callable
        All (height, width) that occur in the split; for files this reads headers only.
    read : callable
        Ascending positions -> uint8 [H, W, 3] images, one at a time.
    source : str
        File or folder that was read.
    splits : tuple of str
        All splits of the source; ``("all",)`` where it is not divided.
    """

    split: str
    labels: NDArray[np.int64]
    codes: tuple[str, ...]
    names: tuple[str, ...]
    shapes: Callable[[], set[tuple[int, int]]]
    read: Callable[[NDArray[np.int64]], Images]
    source: str
    splits: tuple[str, ...] = SPLITS


def medmnist_file(folder: Path, name: str, image_size: int | None) -> Path | None:
    """Pick ``name[_64|_128|_224].npz``: the size asked for if it is there, else the largest, else None."""
    files = {size: folder / f"{name}{'' if size == 28 else f'_{size}'}.npz" for size in (28, 64, 128, 224)}
    found = {size: path for size, path in files.items() if path.is_file()}
    if not found:
        return None
    return found.get(image_size or 0, found[max(found)])


def medmnist_split(path: Path, split: str, wording: ClassWording) -> Split:
    """List a split of a MedMNIST npz.

    Parameters
    ----------
    path : Path
        Keys ``{split}_images`` uint8 (N, H, W) or (N, H, W, 3) and ``{split}_labels`` (N,) or (N, 1).
    split : {"train", "val", "test"}
    wording : ClassWording
        Its label order is MedMNIST's.

    Raises
    ------
    ValueError
        Corrupt file, missing key, wrong shape, label outside the class list; the file is named.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = archive.files
            labels = archive[f"{split}_labels"] if f"{split}_labels" in keys else None
        with zipfile.ZipFile(path) as archive:
            shape, _ = member_header(archive, f"{split}_images") if f"{split}_images" in keys else ((), 0)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a readable MedMNIST file: {error}. Download it again.") from error
    if labels is None or not shape:
        raise ValueError(f"{path} has no {split}_images and {split}_labels; it holds {', '.join(keys)}")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or len(labels) != shape[0]:
        raise ValueError(f"{path}: {split}_images of shape {shape} do not fit {len(labels)} labels")
    return Split(
        split=split,
        labels=_checked_labels(labels, wording.names, f"{path} ({split}_labels)"),
        codes=wording.names,
        names=wording.prompt_nouns,
        shapes=lambda: {(shape[1], shape[2])},
        read=lambda positions: map(_rgb, member_rows(path, f"{split}_images", positions)),
        source=str(path),
        splits=tuple(name for name in SPLITS if f"{name}_images" in keys),
    )


def medimeta_split(folder: Path, split: str, wording: ClassWording) -> Split:
    """List a split of a MedIMeta data set folder.

    The task is the one whose label names are this class list, and its numbers are mapped through
    ``info.yaml`` by name: MedIMeta's own order differs from the papers' (fundus: 0 normal, 1 abnormal).

    Parameters
    ----------
    folder : Path
        Holds ``info.yaml``, ``images.hdf5`` or ``images/NNNNNN.tiff``, ``splits/{split}.txt`` and
        ``task_labels/{task}.npy``.
    split : {"train", "val", "test"}
    wording : ClassWording

    Raises
    ------
    FileNotFoundError
        A file of the layout is missing.
    ValueError
        No or several tasks fit the class list, or a label has no name.
    """
    info = yaml.safe_load(_existing(folder / "info.yaml").read_text(encoding="utf-8"))
    task, to_label = _medimeta_task(info, wording, folder / "info.yaml")
    labels_file = _existing(folder / "task_labels" / f"{task}.npy")
    raw = np.load(labels_file, allow_pickle=False)
    lines = _existing(folder / "splits" / f"{split}.txt").read_text(encoding="utf-8").split()
    members = np.array(sorted(int(Path(line).stem) for line in lines), dtype=np.int64)
    if len(members) and members[-1] >= len(raw):
        raise ValueError(f"{labels_file} has {len(raw)} labels, but the {split} split names image {members[-1]}")
    numbers = _integers(raw, str(labels_file))[members]
    unknown = np.flatnonzero(~np.isin(numbers, list(to_label)))
    if len(unknown):
        image = f"{members[unknown[0]]:06d}"
        listing = ", ".join(f"{number} {wording.names[label]!r}" for number, label in sorted(to_label.items()))
        raise ValueError(
            f"{labels_file}: label {numbers[unknown[0]]} of image {image} is outside the class list: {listing}"
        )
    container = folder / "images.hdf5"
    if container.is_file():
        shapes, read = _hdf5_images(container, members)
    else:
        paths = [_existing(folder / "images" / f"{member:06d}.tiff") for member in members]
        shapes, read = _file_images(paths)
    labels = np.array([to_label[int(number)] for number in numbers], dtype=np.int64)
    splits = tuple(name for name in SPLITS if (folder / "splits" / f"{name}.txt").is_file())
    return Split(split, labels, wording.names, wording.prompt_nouns, shapes, read, str(folder), splits)


def class_folder_split(root: Path, split: str) -> Split:
    """List a split of class folders: ``root[/images]/{train,val,test}/{class}/files`` or ``root/{class}/files``.

    Where no split folder exists every image belongs to the split ``all``, which also answers to the
    default ``test``; ``train`` and ``val`` are refused, so that nobody trains on what they test. Classes
    are the union over all splits, so that a class missing from one split shifts no label; they are
    sorted by name, or by number where all names are numbers. An optional ``classnames.txt`` (folder
    name, space, human name) gives them words.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        No images, an empty class folder, an unknown split, or a folder ``classnames.txt`` does not name.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root.absolute()}")
    base, folders = _split_folders(root)
    split = resolve_split(split, tuple(folders), str(root))
    listing = {name: _class_files(folder) for name, folder in folders.items()}
    codes = _ordered({code for classes in listing.values() for code in classes})
    if not any(files for classes in listing.values() for files in classes.values()):
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(
            f"no images in {root}: expected {root.name}/CLASS/FILE or {root.name}/SPLIT/CLASS/FILE with one of "
            f"{suffixes}"
        )
    for code in codes:
        if not any(classes.get(code) for classes in listing.values()):
            raise ValueError(f"class folder {code!r} in {base} holds no images in any split; fill or remove it")
    files = [(path, label) for label, code in enumerate(codes) for path in listing[split].get(code, [])]
    if not files:
        raise ValueError(f"no images in split {split!r} of {root} ({folders[split]})")
    shapes, read = _file_images([path for path, _ in files])
    labels = np.array([label for _, label in files], dtype=np.int64)
    return Split(split, labels, codes, _names(codes, (root, base)), shapes, read, str(root), tuple(folders))


def csv_split(path: Path, split: str) -> Split:
    """List a split of a CSV table with the columns ``path``, ``label`` and, optionally, ``split``.

    Relative paths start at the CSV's folder and must stay inside it; absolute paths are taken as
    written. Labels are class names or integers, kept as text (``NA`` is a class name like any other)
    and ordered as class folders are; ``classnames.txt`` beside the CSV gives them words. Without a
    split column every row belongs to the split ``all`` (see `class_folder_split`).

    Raises
    ------
    FileNotFoundError
        The CSV or an image it lists does not exist.
    ValueError
        A column or value is missing, a split is unknown, an image is listed twice, or a relative path
        leaves the folder; the line is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no CSV file at {path.absolute()}")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable CSV table (UTF-8, commas): {error}") from error
    missing = [column for column in ("path", "label") if column not in table]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(table)}")
    if table.empty:
        raise ValueError(f"no images in {path}: the table has no rows")
    rows = [_csv_row(path, number, row) for number, row in enumerate(table.to_dict("records"), start=2)]
    seen: dict[Path, int] = {}
    for number, (file, _, _) in enumerate(rows, start=2):
        if file in seen:
            raise ValueError(f"{path}, lines {seen[file]} and {number}: {file} is listed twice")
        seen[file] = number
    splits = tuple(sorted({row_split for _, _, row_split in rows}))
    split = resolve_split(split, splits, str(path))
    codes = _ordered({label for _, label, _ in rows})
    label_of = {code: label for label, code in enumerate(codes)}
    chosen = [(file, label_of[label]) for file, label, row_split in rows if row_split == split]
    for file, _ in chosen:
        if not file.is_file():
            raise FileNotFoundError(f"{path}, line {seen[file]}: no image file at {file}")
    shapes, read = _file_images([file for file, _ in chosen])
    labels = np.array([label for _, label in chosen], dtype=np.int64)
    return Split(split, labels, codes, _names(codes, (path.parent,)), shapes, read, str(path), splits)


def resolve_split(split: str, available: Sequence[str], source: str) -> str:
    """Return the split to read, or raise ValueError naming what the source offers."""
    if split in available:
        return split
    if tuple(available) == (UNSPLIT,):
        if split == "test":
            return UNSPLIT
        raise ValueError(f"{source} is not divided into splits, so it has no {split!r}; ask for {UNSPLIT!r}")
    raise ValueError(f"{source} has no split {split!r}.{suggest(split, available)}")


def _split_folders(root: Path) -> tuple[Path, dict[str, Path]]:
    for base in (root, root / "images"):
        if not base.is_dir():
            continue
        folders: dict[str, Path] = {}
        for folder in _subfolders(base):
            name = _SPLIT_SPELLINGS.get(folder.name.lower())
            if name in folders:
                raise ValueError(f"{base} has two folders for split {name!r}: {folders[name].name}, {folder.name}")
            if name:
                folders[name] = folder
        if folders:
            return base, folders
    return root, {UNSPLIT: root}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _class_files(folder: Path) -> dict[str, list[Path]]:
    return {
        child.name: sorted(
            file
            for file in child.iterdir()
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
        )
        for child in _subfolders(folder)
    }


def _ordered(codes: Iterable[str]) -> tuple[str, ...]:
    codes = sorted(codes)
    # As text '10' < '2', which would shift the labels of every set with more than ten numbered classes.
    return tuple(sorted(codes, key=int) if all(code.isdecimal() for code in codes) else codes)


def _names(codes: Sequence[str], folders: Sequence[Path]) -> tuple[str, ...]:
    for folder in folders:
        path = folder / "classnames.txt"
        if path.is_file():
            lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            named = {words[0]: words[-1].strip() for words in lines}
            for code in codes:
                if code not in named:
                    raise ValueError(f"{path} gives no name for class {code!r}; it names {', '.join(named)}")
            return tuple(named[code] for code in codes)
    return tuple(re.sub(r"[_\-\s]+", " ", code).strip() for code in codes)


def _csv_row(table: Path, number: int, row: Mapping[str, str]) -> tuple[Path, str, str]:
    for column in ("path", "label"):
        if not row[column].strip():
            raise ValueError(f"{table}, line {number}: no {column}")
    folder = table.absolute().parent
    written = Path(row["path"].strip())
    file = written if written.is_absolute() else folder / written
    if not written.is_absolute() and not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{table}, line {number}: {written} leaves the folder of the CSV; "
            "move the file inside or write its absolute path"
        )
    split = row.get("split", UNSPLIT).strip()
    if "split" in row and split.lower() not in _SPLIT_SPELLINGS:
        raise ValueError(f"{table}, line {number}: unknown split {split!r}.{suggest(split, SPLITS)}")
    return file, row["label"].strip(), _SPLIT_SPELLINGS.get(split.lower(), UNSPLIT)


def _medimeta_task(info: Mapping, wording: ClassWording, path: Path) -> tuple[str, dict[int, int]]:
    fitting = {}
    for task in info["tasks"]:
        mapping = {int(number): wording.label_of(str(name)) for number, name in task["labels"].items()}
        single = "MULTILABEL" not in str(task.get("task_target", ""))
        if single and sorted(mapping.values(), key=str) == list(range(len(wording.names))):
            fitting[task["task_name"]] = mapping
    if len(fitting) != 1:
        tasks = "; ".join(f"{task['task_name']}: {list(task['labels'].values())}" for task in info["tasks"])
        raise ValueError(
            f"{path}: {len(fitting)} tasks have the classes {', '.join(wording.names)}; one is needed. Its tasks "
            f"are {tasks}"
        )
    return next(iter(fitting.items()))


def _file_images(paths: list[Path]) -> tuple[Callable[[], set[tuple[int, int]]], Callable[..., Images]]:
    return (
        lambda: {image_shape(path) for path in paths},
        lambda positions: (read_image(paths[position]) for position in positions),
    )


def _hdf5_images(
    path: Path, members: NDArray[np.int64]
) -> tuple[Callable[[], set[tuple[int, int]]], Callable[..., Images]]:
    try:
        with h5py.File(path) as container:
            shape, dtype = container["images"].shape, container["images"].dtype
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} is not a readable MedIMeta image file: {error}. Download it again.") from error
    if len(shape) != 4 or shape[3] not in (1, 3) or dtype != np.uint8 or (len(members) and shape[0] <= members[-1]):
        raise ValueError(
            f"{path}: 'images' is {dtype} of shape {shape}; expected uint8 [N, H, W, 1 or 3] with N > {members[-1]}"
        )

    def read(positions: NDArray[np.int64]) -> Images:
        with h5py.File(path) as container:
            for position in positions:
                yield _rgb(container["images"][members[position]])

    return lambda: {(shape[1], shape[2])}, read


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = image[:, :, None] if image.ndim == 2 else image
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.array(image)


def _checked_labels(raw: NDArray, names: Sequence[str], source: str) -> NDArray[np.int64]:
    labels = _integers(raw, source)
    check_labels(labels, names, source)
    return labels


def _integers(raw: NDArray, source: str) -> NDArray[np.int64]:
    if raw.ndim == 2 and raw.shape[1] == 1:
        raw = raw[:, 0]
    if raw.ndim != 1 or raw.dtype.kind not in "iufb" or (raw.astype(np.int64) != raw).any():
        raise ValueError(f"{source}: one whole-number label per image is needed, got {raw.dtype} of shape {raw.shape}")
    return raw.astype(np.int64)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"the MedIMeta folder is incomplete: no file at {path}")
    return path
