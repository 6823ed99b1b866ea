"""Readers of the public layouts. Each lists one split cheaply; only the images drawn are decoded.

MedMNIST npz, MedIMeta folders, class folders (ImageFolder and CoOp style) and CSV tables. Labels are
matched to the class list by name wherever the source states names, never by position alone.
"""

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from medrobust_lib.data.dataset import check_labels
from medrobust_lib.data.decoding import IMAGE_SUFFIXES, MOST_PIXELS, check_pixels, image_shape, read_image
from medrobust_lib.data.npz import member_header, member_labels, member_names_of, member_rows, whole_numbers
from medrobust_lib.data.wording import ClassWording, suggest
from medrobust_lib.files import parsed

UNSPLIT = "all"
SPLITS = ("train", "val", "test")
_SPLIT_SPELLINGS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_SPLIT_SPELLINGS |= {"test": "test", "testing": "test"}

_SHOWN_PATH = 80  # characters
_MOST_BRACKETS = 1000
_AGAIN = "Download the set again."

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
    with parsed(f"{path} is not a readable MedMNIST file", "Download it again."), zipfile.ZipFile(path) as archive:
        keys = member_names_of(archive)
        if not {f"{split}_images", f"{split}_labels"} <= set(keys):
            raise ValueError(f"it has no {split}_images and {split}_labels; it holds {', '.join(keys)}")
        shape, _ = member_header(archive, f"{split}_images")
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise ValueError(f"{split}_images has shape {shape}; expected [N, H, W] or [N, H, W, 3]")
        labels = member_labels(archive, f"{split}_labels", count=shape[0])
    check_labels(labels, wording.names, f"{path} ({split}_labels)")
    return Split(
        split=split,
        labels=labels,
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
    task, to_label = _medimeta_task(_existing(folder / "info.yaml"), wording)
    labels_file = _existing(folder / "task_labels" / f"{task}.npy")
    with parsed(f"{labels_file} holds no labels", _AGAIN):
        # Mapped, not read: the size that its header states is compared with the file's.
        every_label = whole_numbers(np.load(labels_file, mmap_mode="r", allow_pickle=False))
    members = _medimeta_members(_existing(folder / "splits" / f"{split}.txt"))
    if len(members) and members[-1] >= len(every_label):
        raise ValueError(
            f"{labels_file} has {len(every_label)} labels, but the {split} split names image {members[-1]}"
        )
    numbers = every_label[members]
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
    name, space, human name) gives them words. Links to images and to folders are followed.

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
        if code.encode("utf-8", "ignore").decode() != code:
            raise ValueError(f"class folder {code!r} in {base} has a name that is not UTF-8; rename it")
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
    with parsed(f"{path} is not a readable CSV table (UTF-8, commas)"):
        # What a short row leaves out is NaN all the same.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True).fillna("")
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
            with parsed(f"{path} is no list of class names in UTF-8"):
                text = path.read_text(encoding="utf-8")
            lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
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
    try:
        leaves = not file.resolve().is_relative_to(folder.resolve())
        file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long for the system, a NUL in it, links in a circle
        shown = str(written)[:_SHOWN_PATH]
        raise ValueError(f"{table}, line {number}: {shown!r} cannot be the path of a file") from error
    if leaves and not written.is_absolute():
        raise ValueError(
            f"{table}, line {number}: {written} leaves the folder of the CSV; "
            "move the file inside or write its absolute path"
        )
    split = row.get("split", UNSPLIT).strip()
    if "split" in row and split.lower() not in _SPLIT_SPELLINGS:
        raise ValueError(f"{table}, line {number}: unknown split {split!r}.{suggest(split, SPLITS)}")
    return file, row["label"].strip(), _SPLIT_SPELLINGS.get(split.lower(), UNSPLIT)


def _medimeta_task(path: Path, wording: ClassWording) -> tuple[str, dict[int, int]]:
    with parsed(f"{path} is no description of a MedIMeta set", _AGAIN):
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > _MOST_BRACKETS:  # nested, they take the parser minutes
            raise ValueError(f"more than {_MOST_BRACKETS} brackets")
        tasks = [_named_labels(task) for task in yaml.safe_load(text)["tasks"]]
        fitting = {}
        for name, single, labels in tasks:
            mapping = {number: wording.label_of(label) for number, label in labels.items()}
            if single and sorted(mapping.values(), key=str) == list(range(len(wording.names))):
                fitting[name] = mapping
    if len(fitting) != 1:
        listing = "; ".join(f"{name}: {list(labels.values())}" for name, _, labels in tasks)
        raise ValueError(
            f"{path}: {len(fitting)} tasks have the classes {', '.join(wording.names)}; one is needed. Its tasks "
            f"are {listing}"
        )
    return next(iter(fitting.items()))


def _named_labels(task: Mapping) -> tuple[str, bool, dict[int, str]]:
    """Name of a task, whether an image has one label, and the label names by number."""
    name, labels = task["task_name"], dict(task["labels"])
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"the task name {str(name)[:_SHOWN_PATH]!r} is no file name")
    for label in labels.values():
        # A few aliases in YAML can stand for a list of lists that is too long to be written out.
        if not isinstance(label, str | int | float):
            raise TypeError(f"a label of {name!r} is a {type(label).__name__}, not a name")
    numbered = {int(number): str(label) for number, label in labels.items()}
    return name, "MULTILABEL" not in str(task.get("task_target", "")), numbered


def _medimeta_members(path: Path) -> NDArray[np.int64]:
    with parsed(f"{path} is no list of images by number", _AGAIN):
        numbers = sorted(int(Path(line).stem) for line in path.read_text(encoding="utf-8").split())
        if numbers and numbers[0] < 0:
            raise ValueError(f"image {numbers[0]}")
        return np.array(numbers, dtype=np.int64)


def _file_images(paths: list[Path]) -> tuple[Callable[[], set[tuple[int, int]]], Callable[..., Images]]:
    return (
        lambda: {image_shape(path) for path in paths},
        lambda positions: (read_image(paths[position]) for position in positions),
    )


def _hdf5_images(
    path: Path, members: NDArray[np.int64]
) -> tuple[Callable[[], set[tuple[int, int]]], Callable[..., Images]]:
    says = f"{path} is not a readable MedIMeta image file"
    with parsed(says, _AGAIN), h5py.File(path) as container:
        images = _own_images(container)
        shape, dtype = images.shape, images.dtype
    if len(shape) != 4 or shape[3] not in (1, 3) or dtype != np.uint8 or (len(members) and shape[0] <= members[-1]):
        raise ValueError(
            f"{path}: 'images' is {dtype} of shape {shape}; expected uint8 [N, H, W, 1 or 3] with "
            f"N > {max(members, default=0)}"
        )
    with parsed(says, _AGAIN):
        check_pixels(*shape[1:3])

    def read(positions: NDArray[np.int64]) -> Images:
        for position in positions:
            with parsed(says, _AGAIN), h5py.File(path) as container:
                image = _rgb(container["images"][members[position]])
            yield image

    return lambda: {(shape[1], shape[2])}, read


def _own_images(container: h5py.File) -> h5py.Dataset:
    """Refuse images that lie in another file, and pieces of the file that unpack to more than an image may hold."""
    if not isinstance(container.get("images", getlink=True), h5py.HardLink):
        raise ValueError("'images' is a link")
    images = container["images"]
    if images.external is not None or images.is_virtual:
        raise ValueError("'images' lies in other files")
    if images.chunks and np.prod(images.chunks, dtype=float) > 3 * MOST_PIXELS:
        raise ValueError(f"'images' comes in pieces of {images.chunks}")
    return images


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = image[:, :, None] if image.ndim == 2 else image
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.array(image)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"the MedIMeta folder is incomplete: no file at {path}")
    return path
