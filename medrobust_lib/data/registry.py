"""Data sets by id: the rows of the registry, one per set, and how a set is opened and loaded."""

import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medrobust_lib.checks import check_choice, check_keywords, check_whole, suggest
from medrobust_lib.data import readers
from medrobust_lib.data.dataset import (
    Draw,
    ImageDataset,
    balanced_positions,
    check_classes,
    check_draw,
    stratified_positions,
)
from medrobust_lib.data.decoding import Fit
from medrobust_lib.data.inspection import close_names, ignored_in, prevalence_changed, seen_in, tell
from medrobust_lib.data.own_images import AUTO, Grouping, class_folder_split, csv_split, file_advice
from medrobust_lib.data.readers import FALLBACK_SIZE, SPLITS, Split
from medrobust_lib.data.wording import ClassNames, ClassWording, checked_templates, class_wording, own_wording
from medrobust_lib.files import parsed, read_yaml
from medrobust_lib.places import default_data_root

Words = str | Mapping[str, Any] | None  # what the classes of own images are called, in one parameter
_WORDS = ("class_names", "templates", "like")
_FEW_PATIENTS = 20  # of fewer a bootstrap covers less than it says
QUESTIONS_PREFIX = "mm-safetybench/"  # of ids for `load_questions`


@dataclass(frozen=True)
class DatasetEntry:
    """One row: where a set lies, how it is read (a key of `_OPEN`), and what `list_datasets` says about it."""

    id: str
    kind: str
    modality: str
    licence: str
    source: str
    location: str = ""
    image_size: int = FALLBACK_SIZE
    sizes: Mapping[str, int] = field(default_factory=dict)  # images of each split
    command: str = ""


def registered(kind: str) -> Any:
    """One table of ``datasets.toml``."""
    return tomllib.loads(files("medrobust_lib.data").joinpath("datasets.toml").read_text(encoding="utf-8"))[kind]


DATASETS = {row["id"]: DatasetEntry(**row) for row in registered("datasets")}


def labelled(row: DatasetEntry, words: ClassWording, **found: Any) -> ImageDataset:
    """Images of a registered set or of one's own, in words.

    Parameters
    ----------
    row, words
        Say the id, modality and licence, and the classes and templates.
    **found
        The other fields of `ImageDataset`: split, images, labels, indices and provenance.
    """
    about = {"id": row.id, "modality": row.modality, "licence": row.licence}
    return ImageDataset(**about, classes=words.prompt_nouns, templates=words.templates, **found)


class SplitOptions(TypedDict, total=False):
    """Options of `open_split` and of all that draws by it; `load_dataset` explains them."""

    root: str | Path | None
    image_size: int | None
    wording: str
    like: str | None
    class_names: ClassNames
    templates: Sequence[str] | None
    words: Words
    group: Grouping
    bit_depth: int | None
    fit: Fit


def load_dataset(
    id: str,
    *,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    draw: Draw = "stratified",
    **options: Unpack[SplitOptions],
) -> ImageDataset:
    """Load a data set by id, whole or as a seeded subset, class-stratified or class-balanced.

    Only the images drawn are decoded, and an image's pixels never depend on which others are drawn.

    Parameters
    ----------
    id : str
        An id of `list_datasets`, ``folder:PATH`` (class folders) or ``csv:PATH`` (columns path, label
        and optionally split and patient); ``folder:PATH?bit_depth=12&fit=pad&group=dicom`` states the parameters of
        these names where only an id can be given, in notebooks and studies.
    split : {"train", "val", "test"}
        A folder or table without splits gives all its images for ``test`` and calls the split ``all``.
    n : int or None
        Number of images to draw; None for the whole split.
    seed : int
        Which subset.
    draw : {"stratified", "balanced"}
        Classes keep their shares (`stratified_positions`), or have equally many images (`balanced_positions`, needs
        ``n``), as in PromptSmooth's tables. Balancing changes the prevalence; a caveat says what the best constant
        answer scores then, and ``provenance["draw"]`` is ``"balanced"``; without this key a draw is stratified.
    root : path or None
        Folder of the downloaded sets; None for `default_data_root`.
    image_size : int or None
        Side in pixels. None keeps the source's size; images of several sizes (every file's header is
        read to find out), and the pathology and chest sets, come at 224. It is recorded in
        ``provenance["resized"]``.
    wording : {"paper", "clear"}
        Which prompt nouns `class_wording` gives a registered set.
    like : str or None
        For ``folder:`` and ``csv:``: a registered id whose class list, templates and modality to take.
        Classes are matched by name, so several folders may share a class (normal, benign).
    class_names : mapping of str to str, optional
        For ``folder:`` and ``csv:``, instead of ``like``: what to call each class folder, or label of the table, in a
        prompt, ``{"folder": "prompt noun"}``. Every class is named; folders with one noun become one class. Neither
        this nor ``templates`` changes an image, its index or its noise.
    templates : sequence of str, optional
        For ``folder:`` and ``csv:``: own prompts with one ``{}`` each, such as ``["an ultrasound image of {}."]``.
    words : str or mapping, optional
        ``class_names``, ``templates`` and ``like`` in one, as commands, studies and notebooks take them: a mapping with
        these keys, the path of a YAML file with them, that YAML in braces, or the id that ``like`` takes.
    group : str or callable
        For ``folder:`` and ``csv:``: how images are known to be of one patient, who then stays in one split and counts
        once in intervals. "auto": the column ``patient`` of a table; folders below a class folder; else, if all files
        are DICOM, their PatientID (as a pseudonym). "folder" and "dicom" ask for one of these, the name of another
        column of the table for that, "none" for no groups. A callable gets the file as in ``ImageDataset.files`` and
        returns the patient.
    bit_depth : int or None
        For ``folder:`` and ``csv:``: bits that the values of PNG, TIFF and other files really have, where the files
        have room for more. None takes the file's own: with 12 bits in 16, the brightest value is then 16 of 255.
        It stands in the set's id, as does ``fit="pad"`` for these names, and so draws other noise.
    fit : {"crop", "pad"}
        How images become square. ``crop``: resizing brings the shortest edge to size (bicubic) and crops the centre;
        images that are not resized keep their shape, and most models crop them so. ``pad``: the longest edge is
        brought to size, that of the largest image if ``image_size`` is None and all images have one size, and
        the image is centred between black bars, so that nothing is cut off.

    Returns
    -------
    ImageDataset
        What a reader of any result must know (files left out, values that do not fill their range, the share that a
        centre crop throws away, images there twice, class names that look like misspellings) is in its ``caveats``,
        and one warning says it.

    Raises
    ------
    FileNotFoundError
        The set is not on this computer; the message names the folder and the command to run.
    ValueError
        Unknown id, split, draw or wording, ``n`` outside the split or missing for a balanced draw, a label outside the
        class list, a corrupt file, fewer than two classes or two that differ in case, spaces or the form of letters
        only, ``class_names`` that do not fit, or a template without its ``{}``.
    TypeError
        ``class_names`` is no mapping, or ``templates`` a single text.
    """
    check_keywords(load_dataset, options, SplitOptions.__annotations__)
    check_draw(draw, n=n)
    found = open_split(id, split=split, **options)
    if draw == "balanced":
        return found.read(balanced_positions(found.labels, n=n, seed=seed), n=n, seed=seed, draw=draw)
    return found.read(stratified_positions(found.labels, n=n, seed=seed), n=n, seed=seed)


@dataclass(frozen=True)
class OpenSplit:
    """A split of a data set that is found and labelled, with no image decoded yet; made by `open_split`."""

    row: DatasetEntry
    words: ClassWording
    listed: Split
    image_size: int | None
    fit: Fit = "crop"
    bit_depth: int | None = None

    @property
    def labels(self) -> NDArray[np.int64]:
        """Label of every image of the split, int64 [N]."""
        return self.listed.labels

    @property
    def groups(self) -> tuple[str, ...]:
        """Patient of every image of the split; empty where nobody knows."""
        return tuple(self.listed.groups(np.arange(len(self.labels))))

    @property
    def patients(self) -> set[str]:
        """The patients that are stated; an image whose patient nobody states is a group of its own."""
        return {*self.groups} - {*self.listed.files}

    @property
    def classes(self) -> tuple[str, ...]:
        """Prompt noun of each label."""
        return self.words.prompt_nouns

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the data set in the order train, val, test; empty where it is not divided."""
        return tuple(name for name in SPLITS if name in self.listed.splits)

    def read(self, positions: NDArray[np.int64], **drawn: Any) -> ImageDataset:
        """Decode the images at ascending positions; ``drawn`` (JSON values) says in the provenance how they came."""
        images, resized, shapes = self.listed.decode(positions, self.image_size, self.fit)
        names = tuple(self.listed.files[place] if self.listed.files else f"image {place}" for place in positions)
        labels, groups = self.labels[positions], tuple(self.listed.groups(positions))
        seen = seen_in(images, labels, names=names, shapes=shapes if self.fit == "crop" else ())
        caveats = [*self.listed.caveats, *ignored_in(self.listed.ignored(positions), names), *seen]
        if alone := len({*groups} & {*names}):
            caveats.append(f"{alone} of {len(names)} images state no patient: each counts as a patient of its own.")
        if len(set(groups)) == 1 < len(groups):
            caveats.append(
                f"All {len(groups)} images drawn are stated to be of one patient, so no number on them has a useful "
                "interval; where that is a placeholder, give a table with a column patient, or group='none'."
            )
        elif groups and (patients := len(set(groups))) < len(groups):
            few = patients < _FEW_PATIENTS
            caveats.append(
                "Patients have several images: intervals are over patients, and what is divided here keeps all images "
                "of one together."
                + few
                * f" Of {patients} patients the bootstrap intervals of mCE and of what is lost cover too little."
            )
        if drawn.get("draw") == "balanced":
            caveats.append(prevalence_changed(labels, self.labels))
        tell(self.row.id, caveats)
        provenance = {
            "source": self.row.source,
            "read_from": self.listed.source,
            "synthetic": self.row.kind == "phantom",
            "split_size": len(self.labels),
            **drawn,
            "resized": resized,
            "bit_depth": self.bit_depth,
            "wording": f"{self.words.set_name}: {self.words.wording}",
            "caveats": caveats,
        }
        if groups:
            provenance["patients"] = len(set(groups))
        if self.words.start:
            provenance["start_template"] = self.words.start
        split = self.listed.split
        found = {"images": images, "labels": labels, "indices": positions, "files": names, "groups": groups}
        return labelled(self.row, self.words, split=split, provenance=provenance, **found)


def open_split(id: str, *, split: str = "test", **options: Unpack[SplitOptions]) -> OpenSplit:
    """Find a split and its labels without decoding an image, for draws that `load_dataset` does not offer.

    Parameters, errors and the meaning of ``split`` are those of `load_dataset`.
    """
    check_keywords(open_split, options, SplitOptions.__annotations__)
    image_size = options.get("image_size")
    if image_size is not None:
        check_whole("image_size", image_size, least=8, hint=": give the side in pixels, or None")
    scheme, _, path = id.partition(":")
    if scheme in {"folder", "csv"}:
        path, stated = _stated(path)
        options |= stated
    check_choice("fit", options.setdefault("fit", "crop"), get_args(Fit))
    options |= _in_words(options)
    if scheme in {"folder", "csv"} and path:
        listed, row, words = _own_split(scheme, Path(path).expanduser(), split, options)
    elif id in DATASETS:
        for name in ("like", "class_names", "templates", "bit_depth", "group"):
            if options.get(name) not in (None, AUTO):
                raise ValueError(f"{name}={options[name]!r} is for folder: and csv: data; {id} has its own classes")
        row, words = DATASETS[id], class_wording(id, wording=options.get("wording", "paper"))
        listed = _registered_split(row, words, split, default_data_root(options.get("root")), image_size)
    else:
        if id.startswith(QUESTIONS_PREFIX):
            raise ValueError(f"{id!r} holds questions and has no classes: load it with load_questions({id!r})")
        if Path(id).expanduser().is_dir():
            raise ValueError(f"unknown data set {id!r}, but there is such a folder: write 'folder:{id}'")
        if Path(id).expanduser().is_file():
            raise ValueError(f"unknown data set {id!r}; it is {file_advice(Path(id).expanduser())}")
        raise ValueError(f"unknown data set {id!r}.{suggest(id, [*DATASETS, 'folder:PATH', 'csv:PATH'])}")
    check_classes(words.prompt_nouns, listed.source)
    size = image_size or (FALLBACK_SIZE if row.kind == "folders" else None)
    return OpenSplit(row, words, listed, size, options["fit"], options.get("bit_depth"))


def list_datasets(*, root: str | Path | None = None) -> pd.DataFrame:
    """Tabulate the registered data sets.

    Returns
    -------
    pandas.DataFrame
        id, modality, classes (their number), image size (px, of what `load_dataset` gives), train, val,
        test (images; missing until the script that decides has run), licence, source, available (on this
        computer), script (the command that fetches or prepares it).
    """
    folder = default_data_root(root)
    places = [(row, _place(row, folder)) for row in DATASETS.values()]
    table = pd.DataFrame(
        {
            "id": row.id,
            "modality": row.modality,
            "classes": len(class_wording(row.id).names),
            "image size": _image_size(row, place),
            **dict.fromkeys(SPLITS),
            **_sizes(row, folder),
            "licence": row.licence,
            "source": row.source,
            "available": place is not None,
            "script": row.command,
        }
        for row, place in places
    )
    return table.astype(dict.fromkeys(SPLITS, "Int64"))


def _sizes(row: DatasetEntry, root: Path) -> Mapping[str, int]:
    manifest = root / row.location / "manifest.json"
    if row.kind != "folders" or not manifest.is_file():
        return row.sizes
    counts = json.loads(manifest.read_text(encoding="utf-8"))["counts"]
    return {split: sum(counts[split].values()) for split in SPLITS if split in counts}


def _image_size(row: DatasetEntry, place: Path | None) -> int:
    if row.kind != "medmnist" or place is None:
        return row.image_size
    return int(place.stem.partition("_")[2] or 28)  # files of 28 px have no size in their names


def _place(row: DatasetEntry, root: Path, image_size: int | None = None) -> Path | None:
    """File or folder of a registered set, None where it is not on this computer."""
    where = root / row.location
    if row.kind == "medmnist":
        return readers.medmnist_file(where, image_size)
    mark = {"phantom": "", "medimeta": "info.yaml", "folders": "images"}[row.kind]
    return where if not mark or (where / mark).exists() else None


# How each kind is opened, given its row, its place, the split, the words and the image size asked for.
_OPEN: Mapping[str, Callable[[DatasetEntry, Path, str, ClassWording, int | None], Split]] = {
    "phantom": lambda row, _, split, words, size: readers.phantom_split(row.id, split, words, size or row.image_size),
    "medmnist": lambda row, place, split, words, size: readers.medmnist_split(place, split, words),
    "medimeta": lambda row, place, split, words, size: readers.medimeta_split(place, split, words),
    "folders": lambda row, place, split, words, size: class_folder_split(place, split).named(words),
}


def _registered_split(row: DatasetEntry, words: ClassWording, split: str, root: Path, image_size: int | None) -> Split:
    if row.kind != "folders":  # those may have other splits
        split = readers.resolve_split(split, SPLITS, row.id)
    place = _place(row, root, image_size)
    if place is None:
        ending = "[_64|_128|_224].npz" if row.kind == "medmnist" else ""
        raise FileNotFoundError(
            f"{row.id} is not on this computer: looked at {root / row.location}{ending}. Get it with\n"
            f"    {row.command} --root {root}\n"
            "or name the folder that holds it with root=... or MEDROBUST_DATA."
        )
    return _OPEN[row.kind](row, place, split, words, image_size)


def _own_split(scheme: str, path: Path, split: str, options: SplitOptions) -> tuple[Split, DatasetEntry, ClassWording]:
    wording, like, bit_depth = options.get("wording", "paper"), options.get("like"), options.get("bit_depth")
    class_names, group = options.get("class_names"), options.get("group", AUTO)
    listed = (class_folder_split if scheme == "folder" else csv_split)(path, split, bit_depth=bit_depth, group=group)
    templates = options.get("templates")
    if templates is None and like is None:
        templates = listed.templates or None
    if like is None:
        if wording != "paper":
            raise ValueError(f"wording={wording!r} needs like=..., the registered set whose words to take")
        if class_names is None:
            listed = replace(listed, caveats=(*listed.caveats, *close_names(listed.codes, listed.totals)))
        words = own_wording(
            listed.codes, listed.names, class_names=class_names, templates=templates, source=listed.source
        )
        listed = listed.relabelled([words.spellings[code] for code in listed.codes])
    else:
        if like not in DATASETS:
            raise ValueError(f"unknown data set {like!r} for like.{suggest(like, DATASETS)}")
        if class_names is not None:
            raise ValueError(f"give class_names or like={like!r}, not both: each of them names the classes")
        words = class_wording(like, wording=wording)
        listed = listed.named(words)
        if templates is not None:
            words = replace(words, templates=checked_templates(templates), start="")
    # Other pixels must not pass for the same set in a comparison of results.
    pixels = {"bit_depth": bit_depth, "fit": options["fit"]}
    changed = urlencode({name: value for name, value in pixels.items() if value not in (None, "crop")})
    name = path.resolve().name  # alone keys the noise, so that a moved folder keeps its noise
    id = f"{scheme}:{name}?{changed}" if changed else f"{scheme}:{name}"
    modality = DATASETS[like].modality if like else "not stated"
    row = DatasetEntry(id=id, kind=scheme, modality=modality, licence="not stated", source=f"own images, {name}")
    return listed, row, words


def _in_words(options: SplitOptions) -> dict[str, Any]:
    """What ``words`` stands for; raises for what is no words, and for what is said twice."""
    words = options.get("words")
    if not words:
        return {}
    if isinstance(words, str):
        if words in DATASETS:
            words = {"like": words}
        elif words.lstrip().startswith("{"):
            words = read_yaml(words, says=f"words={words}")
        elif os.path.isfile(Path(words).expanduser()):  # noqa: PTH113 - what is too long a path is none
            words = read_yaml(Path(words).expanduser())
        else:
            raise ValueError(
                f"words={words!r} is neither a YAML file nor YAML in braces, such as {{class_names: {{CLASS: NOUN}}, "
                f"templates: ['a picture of {{}}.']}}, nor the id of a data set.{suggest(words, DATASETS)}"
            )
    if not isinstance(words, Mapping):
        raise TypeError(f"words={words!r}: give a mapping with any of {', '.join(_WORDS)}")
    for name in words:
        check_choice("a key of words", name, _WORDS)
        if options.get(name) is not None:
            raise ValueError(f"{name} is given twice: by itself and in words")
    return dict(words)


def path_and_query(path: str) -> tuple[str, str]:
    """A path, and what is stated behind it as it is written, as in ``PATH?bit_depth=12&fit=pad``."""
    name, mark, query = path.rpartition("?")
    if not mark or os.path.exists(Path(path).expanduser()):  # noqa: PTH110 - what is too long a path is none
        return path, ""
    return name, query


def _stated(path: str) -> tuple[str, dict[str, Any]]:
    """A path, and the options stated behind it."""
    name, query = path_and_query(path)
    if name == path:
        return path, {}
    advice = "It may state bit_depth=NUMBER, fit=crop or fit=pad, and group=HOW, with & between them."
    with parsed(f"{query!r} behind {name}", advice):
        pairs = parse_qsl(query, strict_parsing=True)
        stated: dict[str, Any] = dict(pairs)
        if len(stated) < len(pairs):
            raise ValueError("one of its keys is stated twice")
        if unknown := set(stated) - {"bit_depth", "fit", "group", "words"}:
            raise ValueError(f"{min(unknown)} is unknown")
        return name, {key: int(value) if key == "bit_depth" else value for key, value in stated.items()}
