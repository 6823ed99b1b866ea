"""Readers of the public layouts. Each lists one split cheaply; only the images drawn are decoded.

MedMNIST npz, MedIMeta folders, class folders (ImageFolder and CoOp style) and CSV tables. Labels are
matched to the class list by name wherever the source states names, never by position alone.
"""

import io
import os
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from medrobust_lib.checks import suggest
from medrobust_lib.data.dataset import check_labels
from medrobust_lib.data.decoding import (
    IMAGE_SUFFIXES,
    MOST_PIXELS,
    check_pixels,
    image_shape,
    left_out,
    member_header,
    member_labels,
    member_names_of,
    member_rows,
    read_image,
    whole_numbers,
)
from medrobust_lib.data.inspection import first_of
from medrobust_lib.data.wording import ClassWording, composed
from medrobust_lib.files import parsed

UNSPLIT = "all"
SPLITS = ("train", "val", "test")
_SPLIT_SPELLINGS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_SPLIT_SPELLINGS |= {"test": "test", "testing": "test"}

_LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}  # that systems leave in folders, beside hidden files
# What BUSI and others add to the name of an image for the drawing of its lesion.
_MASK = re.compile(r"(.+)_(?:mask|seg|segmentation|label)s?(?:_\d+)?", re.IGNORECASE)
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
    files : tuple of N str
        File of every image below the source; empty where the images are not files.
    totals : tuple of int
        Images of each class in all splits together, where they were counted.
    caveats : tuple of str
        What the reader left out or took for granted, in sentences for the result cards.
    ignored : callable
        Positions -> what `left_out` says of each file.
    """

    split: str
    labels: NDArray[np.int64]
    codes: tuple[str, ...]
    names: tuple[str, ...]
    shapes: Callable[[], set[tuple[int, int]]]
    read: Callable[[NDArray[np.int64]], Images]
    source: str
    splits: tuple[str, ...] = SPLITS
    files: tuple[str, ...] = ()
    totals: tuple[int, ...] = ()
    caveats: tuple[str, ...] = ()
    ignored: Callable[[NDArray[np.int64]], Iterable[tuple[str, ...]]] = lambda positions: ()


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


def class_folder_split(root: Path, split: str, *, bit_depth: int | None = None) -> Split:
    """List a split of class folders: ``root[/images]/{train,val,test}/{class}/files`` or ``root/{class}/files``.

    Where no split folder exists every image belongs to the split ``all``, which also answers to the
    default ``test``; ``train`` and ``val`` are refused, so that nobody trains on what they test. Classes
    are the union over all splits, so that a class missing from one split shifts no label; they are
    sorted by name, or by number where all names are numbers. An optional ``classnames.txt`` gives them words: a line
    for each, the folder's name, then a tab or space, then the name in words. Links to images and to class folders are
    followed.

    Images in folders below a class folder, such as those of patients, belong to that class. A file is an image by its
    suffix, or, with any other suffix or none, by its content. What is left out is named in ``caveats``: files in class
    folders that are no images by suffix or content, images outside the class folders, folders beside the splits, and
    links that lead nowhere. Hidden files and what systems leave behind (Thumbs.db, desktop.ini, __MACOSX, @eaDir) are
    left out without a word.

    Parameters
    ----------
    root : Path
    split : str
    bit_depth : int or None
        As in `read_image`.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        No images, another layout, an empty class folder, an unknown split, or a folder ``classnames.txt`` does not
        name.
    """
    if root.is_file():
        raise ValueError(f"{root} is no folder but {file_advice(root)}")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root.absolute()}")
    base, folders = _split_folders(root)
    beside = [child.name for child in _subfolders(base) if child not in folders.values()]
    split = resolve_split(split, tuple(folders), str(root), beside=() if folders.get(UNSPLIT) == base else beside)
    found = {name: _class_files(folder) for name, folder in folders.items()}
    listing = {name: classes for name, (classes, _) in found.items()}
    codes = _ordered({code for classes in listing.values() for code in classes})
    _check_layout(root, folders, listing)
    for code in codes:
        if code.encode("utf-8", "ignore").decode() != code:
            raise ValueError(f"class folder {code!r} in {base} has a name that is not UTF-8; rename it")
        if not any(classes.get(code) for classes in listing.values()):
            raise ValueError(f"class folder {code!r} in {base} holds no images in any split; fill or remove it")
    files = [(path, label) for label, code in enumerate(codes) for path in listing[split].get(code, [])]
    if not files:
        raise ValueError(f"no images in split {split!r} of {root} ({folders[split]})")
    paths = [path for path, _ in files]
    shapes, read = _file_images(paths, bit_depth)
    out = [path for _, others in found.values() for path in others]
    if folders.get(UNSPLIT) != base:
        out += [
            child for child in _children(base) if child not in folders.values() and (child.is_dir() or _is_image(child))
        ]
    caveats = []
    if out:
        names = [str(path.relative_to(root)) for path in out]
        caveats.append(
            f"Left out of {root.resolve().name}, as no readable images or outside the class folders: {first_of(names)} "
            f"({len(out)} in all)."
        )
    nested = [path for path in paths if path.parent.parent != folders[split]]
    if nested:
        caveats.append(
            f"{len(nested)} of {len(paths)} images lie in folders below their class folder "
            f"({first_of([str(path.relative_to(root)) for path in nested])}) and were taken for images of that class."
        )
    names = tuple(str(path.relative_to(root)) for path in paths)
    return Split(
        split,
        np.array([label for _, label in files], dtype=np.int64),
        codes,
        _names(codes, (root, base)),
        shapes,
        read,
        str(root),
        tuple(folders),
        files=names,
        totals=tuple(sum(len(classes.get(code, [])) for classes in listing.values()) for code in codes),
        caveats=(*caveats, *_masks(names)),
        ignored=_ignored_in(paths),
    )


def csv_split(path: Path, split: str, *, bit_depth: int | None = None) -> Split:
    """List a split of a CSV table with the columns ``path``, ``label`` and, optionally, ``split``, in any case.

    Relative paths start at the CSV's folder and must stay inside it; absolute paths are taken as
    written. A path that names no file is also tried with forward slashes for backslashes and with its accents
    composed or decomposed. Labels are class names or integers, kept as text (``NA`` is a class name like any other)
    and ordered as class folders are; ``classnames.txt`` beside the CSV gives them words. Without a
    split column every row belongs to the split ``all`` (see `class_folder_split`).

    Raises
    ------
    FileNotFoundError
        The CSV or an image it lists does not exist.
    ValueError
        A column or value is missing, a row is longer than the header, a split is unknown, an image is listed twice, or
        a relative path leaves the folder; the line is named.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a table: write folder:{path}, or csv: and the table's own path")
    if not path.is_file():
        raise FileNotFoundError(f"no CSV file at {path.absolute()}")
    table = _csv_table(path)
    lines = zip(table.index, table.to_dict("records"), strict=True)
    rows = {number: _csv_row(path, number, row) for number, row in lines}
    seen: dict[Path, int] = {}
    for number, (file, _, _) in rows.items():
        if file in seen:
            raise ValueError(f"{path}, lines {seen[file]} and {number}: {file} is listed twice")
        seen[file] = number
    splits = tuple(sorted({row_split for _, _, row_split in rows.values()}))
    split = resolve_split(split, splits, str(path))
    codes = _ordered({label for _, label, _ in rows.values()})
    label_of = {code: label for label, code in enumerate(codes)}
    chosen = [(file, label_of[label]) for file, label, row_split in rows.values() if row_split == split]
    for file, _ in chosen:
        if not file.is_file():
            drive = "; a path with a drive is one of Windows: write it relative to the table's folder"
            hint = drive if re.search(r"(^|/)[A-Za-z]:[\\/]", str(file)) else ""
            raise FileNotFoundError(f"{path}, line {seen[file]}: no image file at {file}{hint}")
    shapes, read = _file_images([file for file, _ in chosen], bit_depth)
    labels = np.array([label for _, label in chosen], dtype=np.int64)
    counts = Counter(label for _, label, _ in rows.values())
    folder = path.absolute().parent
    names = tuple(str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name for file, _ in chosen)
    return Split(
        split, labels, codes, _names(codes, (path.parent,)), shapes, read, str(path), splits,
        files=names,
        caveats=tuple(_masks(names)),
        totals=tuple(counts[code] for code in codes),
        ignored=_ignored_in([file for file, _ in chosen]),
    )  # fmt: skip


def file_advice(path: Path) -> str:
    """What a file is that was given where a folder or another table is expected, and how to give it."""
    kind = "".join(path.suffixes[-2:]).lower()
    if path.suffix.lower() in {".csv", ".tsv", ".txt"}:
        return f"a table: write csv:{path}"
    if path.suffix.lower() in {".npz", ".npy"}:
        return (
            "a file of NumPy arrays: MedMNIST's are read by name, such as medmnist/breast with root=FOLDER where "
            "FOLDER/medmnist/breastmnist.npz lies; make an ImageDataset of other arrays, or save them as CLASS/FILE.png"
        )
    if kind.endswith((".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")):
        return "an archive: unpack it and write folder: and the folder that came out"
    if _is_image(path):
        return "an image: write folder: and the folder that holds the class folders, CLASS/FILE"
    return "a file: write folder: and a folder of class folders, or csv: and a table of images"


def resolve_split(split: str, available: Sequence[str], source: str, *, beside: Sequence[str] = ()) -> str:
    """Return the split to read, or raise ValueError naming what the source offers, and folders beside its splits."""
    if split in available:
        return split
    if tuple(available) == (UNSPLIT,):
        if split == "test":
            return UNSPLIT
        raise ValueError(f"{source} is not divided into splits, so it has no {split!r}; ask for {UNSPLIT!r}")
    advice = f" Passed over: {first_of(beside)}; rename what is a split to {', '.join(SPLITS)}." if beside else ""
    raise ValueError(f"{source} has no split {split!r}.{suggest(split, available)}{advice}")


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


def _children(folder: Path) -> list[Path]:
    return sorted(folder / name for name in _kept(path.name for path in folder.iterdir()))


def _kept(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(".") and name.lower() not in _LITTER]


def _subfolders(folder: Path) -> list[Path]:
    return [child for child in _children(folder) if child.is_dir()]


def _class_files(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The images of each class folder, and what is left out: other files there, and images beside the folders."""
    classes: dict[str, list[Path]] = {}
    out = [child for child in _children(folder) if not child.is_dir() and _is_image(child)]
    for child in _subfolders(folder):
        below = sorted(_files_below(child))
        classes[child.name] = [path for path in below if path.is_file() and _is_image(path)]
        kept = set(classes[child.name])
        out += [path for path in below if path not in kept]
    return classes, out


def _files_below(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]  # may lead back up
        folders[:] = _kept(folders)
        yield from (Path(place, name) for name in _kept([*files, *links]))


def _masks(files: Sequence[str]) -> list[str]:
    """Count the images that are named after another one beside them as its mask, in a sentence; none if none are."""
    stems = [str(Path(name).with_suffix("")) for name in files]
    there = set(stems)
    matches = map(_MASK.fullmatch, stems)
    masks = [name for name, match in zip(files, matches, strict=True) if match and match[1] in there]
    if not masks:
        return []
    return [
        f"{len(masks)} of {len(files)} images are called after another one as its mask or label ({first_of(masks)}) "
        "and were taken for images of their class: move masks out of the class folders, or list only images in a table."
    ]


def _is_image(path: Path) -> bool:
    """Whether a file says by its suffix, or else by its content, that `read_image` reads it."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        return path.is_file() and min(image_shape(path)) > 0
    except (OSError, ValueError):
        return False


def _check_layout(root: Path, folders: Mapping[str, Path], listing: Mapping[str, Mapping[str, list[Path]]]) -> None:
    """Refuse folders that are no class folders, and say what they look like."""
    expected = f"expected {root.name}/CLASS/FILE or {root.name}/SPLIT/CLASS/FILE"
    where = {
        path: folders[split] / code for split, classes in listing.items() for code in classes for path in classes[code]
    }
    if not where:
        (flat, *_) = [[path for path in _children(folder) if _is_image(path)] for folder in folders.values()]
        if flat:
            raise ValueError(
                f"{len(flat)} images lie in {flat[0].parent} itself ({first_of([path.name for path in flat])}), and "
                f"nothing says their classes: {expected}. Put each into a folder named after its class, or list them "
                "in a table with the columns path and label and write csv: and its path"
            )
        held = first_of([child.name for child in _children(root)]) or "nothing"
        raise ValueError(
            f"no images in {root}: {expected} with one of {', '.join(sorted(IMAGE_SUFFIXES))}, or with another suffix "
            f"and content of these kinds. It holds {held}"
        )
    below: dict[Path, set[str]] = {}
    for path, folder in where.items():
        below.setdefault(folder, set()).add(path.relative_to(folder).parts[0] if path.parent != folder else "")
    inner = set.union(*below.values())
    names = first_of(sorted(inner))
    only = {folder.name for folder in below}
    for folder, parts in below.items():
        if any(part.lower() in _SPLIT_SPELLINGS for part in parts) and len(only) > 1:
            raise ValueError(
                f"{folder} holds folders for splits ({names}): {expected}. Make the splits the outer folders"
            )
    if len(only) == 1 and "" not in inner:
        (name,) = only
        fix = f"write folder:{root / name}" if UNSPLIT in folders else f"move what {name} holds up one level"
        raise ValueError(f"in {root} there is one folder only, {name!r}, which holds folders ({names}): {fix}")
    if len(below) > 1 and len(inner) > 1 and "" not in inner and all(parts == inner for parts in below.values()):
        raise ValueError(
            f"the folders {first_of(sorted(only))} of {root} hold the same folders ({names}), and either may be the "
            f"classes: {expected}. If these are, write folder: and the path of one of those; or list the images in a "
            "table, csv:"
        )


def _ordered(codes: Iterable[str]) -> tuple[str, ...]:
    codes = sorted(codes)
    # As text '10' < '2', which would shift the labels of every set with more than ten numbered classes.
    return tuple(sorted(codes, key=int) if all(code.isdecimal() for code in codes) else codes)


def _names(codes: Sequence[str], folders: Sequence[Path]) -> tuple[str, ...]:
    for folder in folders:
        path = folder / "classnames.txt"
        if path.is_file():
            lines = _text(path, "text in UTF-8").splitlines()
            named = dict(_named(unicodedata.normalize("NFC", line), codes) for line in lines if line.strip())
            for code in codes:
                if composed(code) not in named:
                    raise ValueError(
                        f"{path} gives no name for class {code!r}; it names {', '.join(named)}. Write a line with the "
                        "class, a tab, and its name in words"
                    )
            return tuple(named[composed(code)] for code in codes)
    return tuple(re.sub(r"[_\-\s]+", " ", code).strip() for code in codes)


def _text(path: Path, form: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: save it as {form} (byte {error.start}: {error.reason})") from error


def _named(line: str, codes: Sequence[str]) -> tuple[str, str]:
    """Class and name of a line: up to its tab, else the longest class that it begins with, else its first word."""
    code, tab, name = line.partition("\t")
    if not tab or not code.strip():
        begun = [code for code in map(composed, codes) if f"{line.strip()} ".startswith(f"{code} ")]
        code = max(begun, key=len, default=line.split(maxsplit=1)[0])
        name = line.strip()[len(code) :]
    return code.strip(), name.strip() or code.strip()


def _csv_table(path: Path) -> pd.DataFrame:
    """Rows of a table as text, the index their lines; refuse another form, saying which it is."""
    text = _text(path, "CSV UTF-8")
    advice = "Save it as CSV with commas in UTF-8, and put a path or label with a comma in it into quotes."
    with parsed(f"{path} is not a readable CSV table (UTF-8, commas)", advice):
        first = text.partition("\n")[0].strip()
        for delimiter, called in {";": "semicolons", "\t": "tabs", "|": "vertical bars"}.items():
            if delimiter in first and "," not in first:
                raise ValueError(f"it has {called} between its columns {first.replace(delimiter, ', ')}")
        # The header is read as a row like the others: beside a longer row pandas would take the first column for names.
        table = pd.read_csv(
            io.StringIO(text), header=None, dtype=str, keep_default_na=False, skipinitialspace=True,
            skip_blank_lines=False,
        ).fillna("")  # fmt: skip
        table.index += 1
        table = table[(table != "").any(axis=1)]
        if table.empty:
            raise ValueError("it is empty")
    header, table = [name.strip() for name in table.iloc[0]], table.iloc[1:]
    for column, least in {"path": 1, "label": 1, "split": 0}.items():
        if column not in header:
            header = [column if name.lower() == column else name for name in header]
        if not least <= header.count(column) <= 1:
            raise ValueError(
                f"{path} has {'more than one' if column in header else 'no'} column {column!r}; its columns are "
                f"{', '.join(header)}. Call the column of the files path, that of the classes label and, if there is "
                "one, that of the splits split"
            )
    if table.empty:
        raise ValueError(f"no images in {path}: the table has no rows")
    return table.set_axis(header, axis=1)[[name for name in ("path", "label", "split") if name in header]]


def _csv_row(table: Path, number: int, row: Mapping[str, str]) -> tuple[Path, str, str]:
    for column in ("path", "label"):
        if not row[column].strip():
            raise ValueError(f"{table}, line {number}: no {column}")
    folder = table.absolute().parent
    written = Path(row["path"].strip())
    try:
        file = _as_named(folder, str(written))
        leaves = not file.resolve().is_relative_to(folder.resolve())
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


def _as_named(folder: Path, written: str) -> Path:
    """The file of a table's path, if need be with other slashes or accents composed otherwise; else the path itself."""
    slashes = (written, written.replace("\\", "/"))
    spellings = [written, *(unicodedata.normalize(form, text) for text in slashes for form in ("NFC", "NFD"))]
    return next((folder / name for name in spellings if (folder / name).is_file()), folder / written)


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
        numbers = sorted(int(Path(line).stem) for line in path.read_text(encoding="utf-8-sig").split())
        if numbers and numbers[0] < 0:
            raise ValueError(f"image {numbers[0]}")
        return np.array(numbers, dtype=np.int64)


def _file_images(
    paths: list[Path], bit_depth: int | None = None
) -> tuple[Callable[[], set[tuple[int, int]]], Callable[..., Images]]:
    return (
        lambda: {image_shape(path) for path in paths},
        lambda positions: (read_image(paths[position], bit_depth=bit_depth) for position in positions),
    )


def _ignored_in(paths: list[Path]) -> Callable[[NDArray[np.int64]], Iterable[tuple[str, ...]]]:
    return lambda positions: (left_out(paths[position]) for position in positions)


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
