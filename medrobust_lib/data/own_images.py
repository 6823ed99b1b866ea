"""Own images: class folders (ImageFolder and CoOp style) and CSV tables, each listed cheaply or refused with advice."""

import io
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from medrobust_lib.checks import check_choice, suggest
from medrobust_lib.data.decoding import DICOM_SUFFIXES, IMAGE_SUFFIXES, image_shape, left_out
from medrobust_lib.data.dicom import patient_of
from medrobust_lib.data.inspection import first_of
from medrobust_lib.data.readers import SHOWN_PATH, SPLITS, UNSPLIT, Positions, Split, file_images, resolve_split
from medrobust_lib.data.wording import composed
from medrobust_lib.files import parsed, read_json_object

Labelled = Sequence[tuple[Path, str]]  # files, each with its class
Grouping = str | Callable[[str], str]  # how images are told to be of one patient; `load_dataset` explains it
CORRUPTED = "corrupted images"  # what `medrobust corrupt` calls its folders in their manifest.json
AUTO, UNGROUPED, BY_FOLDER, BY_DICOM, PATIENT = "auto", "none", "folder", "dicom", "patient"
_SPELLINGS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
_SPELLINGS |= {split: split for split in SPLITS}
_LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}  # that systems leave in folders, beside hidden files
# What BUSI and others add to the name of an image for the drawing of its lesion.
_MASK = re.compile(r"(.+)_(?:mask|seg|segmentation|label)s?(?:_\d+)?", re.IGNORECASE)


def class_folder_split(root: Path, split: str, *, bit_depth: int | None = None, group: Grouping = AUTO) -> Split:
    """List a split of class folders: ``root[/images]/{train,val,test}/{class}/files`` or ``root/{class}/files``.

    Where no split folder exists every image belongs to the split ``all``, which also answers to the
    default ``test``; ``train`` and ``val`` are refused, so that nobody trains on what they test. Classes
    are the union over all splits, so that a class missing from one split shifts no label; they are
    sorted by name, or by number where all names are numbers. An optional ``classnames.txt`` gives them words: a line
    for each, the folder's name, then a tab or space, then the name in words; a line with ``{}`` is a prompt template.
    Links to images and to class folders are followed.

    Images in folders below a class folder belong to that class, and each such folder is taken for a patient. A file is
    an image by its suffix, or, with any other suffix or none, by its content. What is left out is named in ``caveats``:
    files in class folders that are no images by suffix or content, images outside the class folders, folders beside the
    splits, and links that lead nowhere. Hidden files and what systems leave behind (Thumbs.db, desktop.ini, __MACOSX,
    @eaDir) are left out without a word.

    Parameters
    ----------
    root : Path
    split : str
    bit_depth : int or None
        As in `read_image`.
    group : str or callable
        As in `load_dataset`.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        Grouping by folders where there are none, no images, another layout, an empty class folder, an unknown split, or
        a folder ``classnames.txt`` does not name.
    """
    if root.is_file():
        raise ValueError(f"{root} is no folder but {file_advice(root)}")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root.absolute()}")
    base, folders = _split_folders(root)
    beside = [child for child in _children(base) if child not in folders.values() and folders.get(UNSPLIT) != base]
    passed_over = [child.name for child in beside if child.is_dir()]
    split = resolve_split(split, tuple(folders), str(root), beside=passed_over)
    found = {name: _class_files(folder) for name, folder in folders.items()}
    listing = {name: classes for name, (classes, _) in found.items()}
    counts: Counter[str] = Counter()
    for classes in listing.values():
        counts.update({code: len(paths) for code, paths in classes.items()})
    codes = _ordered(counts)
    _check_layout(root, folders, listing, outer=group in (BY_FOLDER, UNGROUPED))
    for code in codes:
        if code.encode("utf-8", "ignore").decode() != code:
            raise ValueError(f"class folder {code!r} in {base} has a name that is not UTF-8; rename it")
        if not counts[code]:
            raise ValueError(f"class folder {code!r} in {base} holds no images in any split; fill or remove it")
    images = [(path, code) for code in codes for path in listing[split].get(code, [])]
    if not images:
        raise ValueError(f"no images in split {split!r} of {root} ({folders[split]})")
    out = [path for _, others in found.values() for path in others]
    out += [child for child in beside if child.is_dir() or _is_image(child)]
    caveats = []
    if out:
        names = [str(path.relative_to(root)) for path in out]
        caveats.append(
            f"Left out of {root.resolve().name}, as no readable images or outside the class folders: {first_of(names)} "
            f"({len(out)} in all)."
        )
    if not callable(group):
        check_choice("group", group, (AUTO, UNGROUPED, BY_FOLDER, BY_DICOM))
    within = [path.relative_to(folders[split] / code).parts for path, code in images]
    patients = [parts[0] if len(parts) > 1 else "" for parts in within]
    nested = list(filter(None, patients))
    if group == BY_FOLDER and not nested:
        raise ValueError(
            f"group='folder': no image of {root} lies in a folder below its class folder, CLASS/PATIENT/FILE; move "
            "them so, or list them in a table with a column patient"
        )
    if nested:
        taken = " and each of these folders for a patient" if group in (AUTO, BY_FOLDER) else ""
        caveats.append(
            f"{len(nested)} of {len(images)} images lie in folders below their class folder and were taken for images "
            f"of that class{taken}."
        )
    listed = _listed(split, images, counts, source=root, folders=[root, base], bit_depth=bit_depth)
    groups = _groups(group, patients, listed.files, [path for path, _ in images])
    return replace(listed, splits=tuple(folders), caveats=(*caveats, *listed.caveats), groups=groups)


def csv_split(path: Path, split: str, *, bit_depth: int | None = None, group: Grouping = AUTO) -> Split:
    """List a split of a CSV table with the columns ``path``, ``label`` and, if you like, ``split`` and ``patient``.

    Columns may be written in any case. Relative paths start at the CSV's folder and must stay inside it; absolute paths
    are taken as written. A path that names no file is also tried with forward slashes for backslashes and with its
    accents composed or decomposed. Labels are class names or integers, kept as text (``NA`` is a class name like any
    other) and ordered as class folders are; ``classnames.txt`` beside the CSV gives them words. Without a split column
    every row belongs to the split ``all`` (see `class_folder_split`). ``group`` is that of `load_dataset`.

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
    table = _csv_table(path, group)
    lines = zip(table.index, table.to_dict("records"), strict=True)
    rows = {number: _csv_row(path, number, row) for number, row in lines}
    seen: dict[Path, int] = {}
    for number, (file, *_) in rows.items():
        if file in seen:
            raise ValueError(f"{path}, lines {seen[file]} and {number}: {file} is listed twice")
        seen[file] = number
    splits = tuple(sorted({row_split for _, _, row_split, _ in rows.values()}))
    split = resolve_split(split, splits, str(path))
    chosen = [(file, label) for file, label, row_split, _ in rows.values() if row_split == split]
    patients = [patient for _, _, row_split, patient in rows.values() if row_split == split]
    for file, _ in chosen:
        if not file.is_file():
            drive = "; a path with a drive is one of Windows: write it relative to the table's folder"
            hint = drive if re.search(r"(^|/)[A-Za-z]:[\\/]", str(file)) else ""
            raise FileNotFoundError(f"{path}, line {seen[file]}: no image file at {file}{hint}")
    counts = Counter(label for _, label, *_ in rows.values())
    listed = _listed(split, chosen, counts, source=path, folders=[path.absolute().parent], bit_depth=bit_depth)
    groups = _groups(group, patients, listed.files, [file for file, _ in chosen])
    return replace(listed, splits=splits, groups=groups)


def _listed(
    split: str, images: Labelled, counts: Mapping[str, int], *, source: Path, folders: list[Path], bit_depth: int | None
) -> Split:
    """A split of files below the first folder, each with its class.

    ``counts`` holds every class, and its images in all splits; any of the folders may hold their names in words.
    """
    codes = _ordered(counts)
    label_of = {code: label for label, code in enumerate(codes)}
    paths = [path for path, _ in images]
    shapes, read = file_images(paths, bit_depth)
    base = folders[0]
    words, templates = _names(codes, folders)
    inside = [path.is_relative_to(base) for path in paths]
    outside = [path.parts for path, within in zip(paths, inside, strict=True) if not within]
    # Of files elsewhere as much of the path as tells them apart.
    tail = next(length for length in itertools.count(1) if len({parts[-length:] for parts in outside}) == len(outside))
    names = tuple(
        str(path.relative_to(base)) if within else "/".join(path.parts[-tail:]).removeprefix("//")
        for path, within in zip(paths, inside, strict=True)
    )
    return Split(
        split=split,
        labels=np.array([label_of[code] for _, code in images], dtype=np.int64),
        codes=codes,
        names=words,
        templates=templates,
        shapes=shapes,
        read=read,
        source=str(source),
        files=names,
        totals=tuple(counts[code] for code in codes),
        caveats=tuple(_masks(names)),
        ignored=lambda positions: (left_out(paths[position]) for position in positions),
    )


def _groups(
    group: Grouping, stated: Sequence[str], files: Sequence[str], paths: Sequence[Path]
) -> Callable[[Positions], tuple[str, ...]]:
    """The patient of each image: what the caller makes of its file, what is stated beside it, or DICOM's PatientID.

    An image whose patient nobody states is a patient of its own.
    """
    if callable(group):
        return lambda positions: tuple(str(group(files[position])) for position in positions)
    dicom = group == BY_DICOM or (group == AUTO and all(path.suffix.lower() in DICOM_SUFFIXES for path in paths))
    if group != BY_DICOM and group != UNGROUPED and any(stated):
        return lambda positions: tuple(stated[position] or files[position] for position in positions)
    if dicom:
        return lambda positions: tuple(patient_of(paths[position]) or files[position] for position in positions)
    return lambda positions: ()


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


def _split_folders(root: Path) -> tuple[Path, dict[str, Path]]:
    for base in filter(Path.is_dir, (root, root / "images")):
        folders: dict[str, Path] = {}
        for folder in _subfolders(base):
            name = _SPELLINGS.get(folder.name.lower())
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


def _check_layout(
    root: Path, folders: Mapping[str, Path], listing: Mapping[str, Mapping[str, list[Path]]], *, outer: bool
) -> None:
    """Refuse folders that are no class folders, and say what they look like; ``outer``: the outer ones are stated."""
    expected = f"expected {root.name}/CLASS/FILE or {root.name}/SPLIT/CLASS/FILE"
    below: dict[Path, set[str]] = {}  # class folder -> folders in it that hold images, "" for the folder itself
    for split, classes in listing.items():
        for folder, paths in ((folders[split] / code, paths) for code, paths in classes.items() if paths):
            below[folder] = {path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths}
    if not below:
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
    inner = set.union(*below.values())
    names = first_of(sorted(inner))
    only = {folder.name for folder in below}
    for written, names_there in ((root, only), (root.parent, {root.name})):
        if names_there <= _corruptions_in(written):
            raise ValueError(
                f"`medrobust corrupt` wrote {written}, and {root} holds corruptions or severities, no classes: "
                f"name one of each, folder:{written}/CORRUPTION/SEVERITY"
            )
    for folder, parts in below.items():
        if any(part.lower() in _SPELLINGS for part in parts) and len(only) > 1:
            raise ValueError(
                f"{folder} holds folders for splits ({names}): {expected}. Make the splits the outer folders"
            )
    if len(only) == 1 and "" not in inner:
        (name,) = only
        fix = f"write folder:{root / name}" if UNSPLIT in folders else f"move what {name} holds up one level"
        raise ValueError(f"in {root} there is one folder only, {name!r}, which holds folders ({names}): {fix}")
    alike = len(below) > 1 and len(inner) > 1 and "" not in inner and all(parts == inner for parts in below.values())
    if alike and not outer:
        raise ValueError(
            f"the folders {first_of(sorted(only))} of {root} hold the same folders ({names}), and either may be the "
            f"classes: {expected}. If {first_of(sorted(only))} are the classes, and all in them is to be classified, "
            f"write folder:{root}?group=folder where {names} are patients, else folder:{root}?group=none; or list the "
            f"images in a table, csv:, with the columns path, label and patient. If {names} are the classes, write "
            f"folder:{root / min(only)}"
        )


def _corruptions_in(folder: Path) -> set[str]:
    """Corruptions that have folders of their own where `medrobust corrupt` wrote; none elsewhere."""
    try:
        parameters = read_json_object(folder / "manifest.json", "a manifest").get("parameters")
    except (OSError, ValueError):  # none, or another program's
        return set()
    if not isinstance(parameters, dict) or parameters.get("kind") != CORRUPTED:
        return set()
    several = len(parameters["corruptions"]) * len(parameters["severities"]) > 1
    return set(parameters["corruptions"]) if several else set()


def _ordered(codes: Iterable[str]) -> tuple[str, ...]:
    codes = sorted(codes)
    # As text '10' < '2', which would shift the labels of every set with more than ten numbered classes.
    return tuple(sorted(codes, key=int) if all(code.isdecimal() for code in codes) else codes)


def _names(codes: Sequence[str], folders: Sequence[Path]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes in words, and prompt templates, from ``classnames.txt`` where there is one."""
    path = next((folder / "classnames.txt" for folder in folders if (folder / "classnames.txt").is_file()), None)
    lines = [line for line in _text(path, "text in UTF-8").splitlines() if line.strip()] if path else []
    templates = tuple(line.strip() for line in lines if "{}" in line)
    named = dict(_named(unicodedata.normalize("NFC", line), codes) for line in lines if "{}" not in line)
    if not named and (templates or path is None):
        return tuple(re.sub(r"[_\-\s]+", " ", code).strip() for code in codes), templates
    for code in codes:
        if composed(code) not in named:
            raise ValueError(
                f"{path} gives no name for class {code!r}; it names {', '.join(named)}. Write a line with the class, a "
                "tab, and its name in words"
            )
    return tuple(named[composed(code)] for code in codes), templates


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


def _csv_table(path: Path, group: Grouping) -> pd.DataFrame:
    """Rows of a table as text, the index their lines; refuse another form, saying which it is.

    The column that ``group`` names becomes that of the patients.
    """
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
    if not callable(group) and group not in (AUTO, UNGROUPED, BY_DICOM):
        check_choice("group", group, (AUTO, UNGROUPED, BY_DICOM, *header))
        header = [PATIENT if name == group else f"other {name}" if name.lower() == PATIENT else name for name in header]
    for column, least in {"path": 1, "label": 1, "split": 0, PATIENT: 0}.items():
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
    table = table.set_axis(header, axis=1)[[name for name in ("path", "label", "split", PATIENT) if name in header]]
    return table.drop(columns=PATIENT, errors="ignore") if callable(group) or group in (UNGROUPED, BY_DICOM) else table


def _csv_row(table: Path, number: int, row: Mapping[str, str]) -> tuple[Path, str, str, str]:
    """File, class, split and patient of a row."""
    for column in ("path", "label", PATIENT):
        if not row.get(column, "-").strip():
            advice = "; give each image one, or ask for group='none'" if column == PATIENT else ""
            raise ValueError(f"{table}, line {number}: no {column}{advice}")
    folder = table.absolute().parent
    written = Path(row["path"].strip())
    try:
        file = _as_named(folder, str(written))
        leaves = not file.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # too long for the system, a NUL in it, links in a circle
        shown = str(written)[:SHOWN_PATH]
        raise ValueError(f"{table}, line {number}: {shown!r} cannot be the path of a file") from error
    if leaves and not written.is_absolute():
        raise ValueError(
            f"{table}, line {number}: {written} leaves the folder of the CSV; "
            "move the file inside or write its absolute path"
        )
    split = row.get("split", UNSPLIT).strip()
    if "split" in row and split.lower() not in _SPELLINGS:
        raise ValueError(f"{table}, line {number}: unknown split {split!r}.{suggest(split, SPLITS)}")
    return file, row["label"].strip(), _SPELLINGS.get(split.lower(), UNSPLIT), row.get(PATIENT, "").strip()


def _as_named(folder: Path, written: str) -> Path:
    """The file of a table's path, if need be with other slashes or accents composed otherwise; else the path itself."""
    slashes = (written, written.replace("\\", "/"))
    spellings = [written, *(unicodedata.normalize(form, text) for text in slashes for form in ("NFC", "NFD"))]
    return next((folder / name for name in spellings if (folder / name).is_file()), folder / written)
