"""The rows of the data set registry: one per set, and nothing but facts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medrobust_lib import phantoms
from medrobust_lib.checks import suggest
from medrobust_lib.data.dataset import ImageDataset, check_classes, check_labels, stratified_positions
from medrobust_lib.data.decoding import Fit, fit_square
from medrobust_lib.data.inspection import close_names, ignored_in, seen_in, tell
from medrobust_lib.data.mm_safetybench import PREFIX as QUESTIONS_PREFIX
from medrobust_lib.data.readers import (
    SPLITS,
    Split,
    class_folder_split,
    csv_split,
    file_advice,
    medimeta_split,
    medmnist_file,
    medmnist_split,
    resolve_split,
)
from medrobust_lib.data.wording import SITE_A, ClassWording, checked_templates, class_wording, own_wording
from medrobust_lib.files import parsed
from medrobust_lib.places import default_data_root

FALLBACK_SIZE = 224
PHANTOM_SIZE = 64
NOT_COUNTED = (None, None, None)


@dataclass(frozen=True)
class DatasetEntry:
    """One row: where a set lies, how it is read, and what `list_datasets` says about it."""

    id: str
    kind: str
    location: str
    modality: str
    image_size: int
    sizes: tuple[int | None, int | None, int | None]
    licence: str
    source: str
    command: str = ""


def _phantom(name: str, modality: str) -> tuple[DatasetEntry, DatasetEntry]:
    row = partial(
        DatasetEntry,
        kind="phantom",
        location="",
        modality=modality,
        image_size=PHANTOM_SIZE,
        sizes=tuple(phantoms.SPLITS[split] for split in SPLITS),
        licence="MIT (drawn by this package)",
    )
    return (
        row(id=f"phantom/{name}", source="synthetic phantoms, acquisition site B (benchmark)"),
        row(
            id=f"phantom/{name}{SITE_A}",
            source="synthetic phantoms, acquisition site A (demo-clip's training site)",
        ),
    )


def _medmnist(name: str, modality: str, *sizes: int) -> DatasetEntry:
    source = f"MedMNIST v2, {name}mnist (Yang et al. 2023), https://zenodo.org/records/10519652"
    command = f"python data_scripts/download_medmnist.py {name}"
    location = f"medmnist/{name}mnist"
    return DatasetEntry(f"medmnist/{name}", "medmnist", location, modality, 28, sizes, "CC BY 4.0", source, command)


def _medimeta(name: str, folder: str, modality: str, *sizes: int) -> DatasetEntry:
    source = f"MedIMeta, {folder} (Woerner et al. 2025), https://zenodo.org/records/7884735"
    command = f"python data_scripts/download_medimeta.py {name}"
    location = f"medimeta/{folder}"
    return DatasetEntry(
        f"medimeta/{name}", "medimeta", location, modality, 224, sizes, "per set, see its info.yaml", source, command
    )


def _folders(
    id: str, modality: str, licence: str, source: str, *, script: str, sizes: tuple = NOT_COUNTED
) -> DatasetEntry:
    command = f"python data_scripts/{script} {id.rpartition('/')[2]}"
    return DatasetEntry(id, "folders", id, modality, FALLBACK_SIZE, sizes, licence, source, command)


_PATHOLOGY = partial(_folders, script="prepare_pathology.py")
_CHEST = partial(_folders, modality="chest X-ray", script="prepare_chest_xray.py")
DATASETS = {
    row.id: row
    for row in (
        *_phantom("histology", "colon histology, H&E"),
        *_phantom("blood", "blood smear microscopy"),
        *_phantom("breast", "breast ultrasound"),
        *_phantom("chest", "chest X-ray"),
        *_phantom("fundus", "fundus photography"),
        *_phantom("oct", "retinal OCT"),
        _medmnist("blood", "blood smear microscopy", 11959, 1712, 3421),
        _medmnist("breast", "breast ultrasound", 546, 78, 156),
        _medmnist("pneumonia", "chest X-ray", 4708, 524, 624),
        _medmnist("retina", "fundus photography", 1080, 120, 400),
        _medmnist("oct", "retinal OCT", 97477, 10832, 1000),
        _medimeta("pbc", "pbc", "blood smear microscopy", 11964, 1709, 3149),
        _medimeta("mammo", "mammo_calc", "mammography", 1332, 214, 326),
        _medimeta("pneumonia", "pneumonia", "chest X-ray", 4415, 817, 624),
        _medimeta("fundus", "fundus", "fundus photography", 1920, 640, 640),
        _medimeta("oct", "oct", "retinal OCT", 91615, 16694, 1000),
        _PATHOLOGY(
            "pathology/kather",
            "colon histology, H&E",
            "CC BY 4.0",
            "NCT-CRC-HE-100K and CRC-VAL-HE-7K (Kather et al. 2019), https://zenodo.org/records/1214456",
            sizes=(100000, None, 7180),
        ),
        _PATHOLOGY(
            "pathology/pannuke",
            "multi-organ histology, H&E",
            "CC BY-NC-SA 4.0",
            "PanNuke (Gamper et al. 2020)",
        ),
        _PATHOLOGY(
            "pathology/skincancer",
            "skin histology, H&E",
            "stated on the source's page",
            "skin tiles (Kriegsmann et al. 2022), https://doi.org/10.11588/data/7QCR8S",
        ),
        _PATHOLOGY(
            "pathology/sicapv2",
            "prostate histology, H&E",
            "CC BY 4.0",
            "SICAPv2 (Silva-Rodríguez et al. 2020), https://data.mendeley.com/datasets/9xxm58dvs3",
        ),
        _CHEST("chest/covid", licence="stated on the source's page", source="COVID-19 radiographs (Tahir et al. 2021)"),
        _CHEST("chest/rsna", licence="the challenge's rules", source="RSNA Pneumonia Detection Challenge 2018"),
    )
}


__all__ = [
    "ClassWording",
    "OpenSplit",
    "class_wording",
    "list_datasets",
    "load_dataset",
    "open_split",
]


def load_dataset(
    id: str,
    *,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    image_size: int | None = None,
    wording: str = "paper",
    like: str | None = None,
    class_names: Mapping[Any, str] | None = None,
    templates: Sequence[str] | None = None,
    bit_depth: int | None = None,
    fit: Fit = "crop",
) -> ImageDataset:
    """Load a data set by id, whole or as a seeded, class-stratified subset.

    Only the images drawn are decoded, and an image's pixels never depend on which others are drawn.

    Parameters
    ----------
    id : str
        An id of `list_datasets`, ``folder:PATH`` (class folders) or ``csv:PATH`` (columns path, label
        and optionally split); ``folder:PATH?bit_depth=12&fit=pad`` states the two parameters of these names where
        only an id can be given, in notebooks and studies.
    split : {"train", "val", "test"}
        A folder or table without splits gives all its images for ``test`` and calls the split ``all``.
    n : int or None
        Number of images, drawn by `stratified_positions`; None for the whole split.
    seed : int
        Which subset.
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
        Unknown id, split or wording, ``n`` outside the split, a label outside the class list, a corrupt
        file, fewer than two classes or two that differ in case, spaces or the form of letters only, ``class_names``
        that do not fit, or a template without its ``{}``.
    TypeError
        ``class_names`` is no mapping, or ``templates`` a single text.
    """
    found = open_split(
        id, split=split, root=root, image_size=image_size, wording=wording, like=like, class_names=class_names,
        templates=templates, bit_depth=bit_depth, fit=fit,
    )  # fmt: skip
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
    def classes(self) -> tuple[str, ...]:
        """Prompt noun of each label."""
        return self.words.prompt_nouns

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the data set in the order train, val, test; empty where it is not divided."""
        return tuple(name for name in SPLITS if name in self.listed.splits)

    def read(self, positions: NDArray[np.int64], **drawn: Any) -> ImageDataset:
        """Decode the images at ascending positions; ``drawn`` (JSON values) says in the provenance how they came."""
        images, resized, shapes = _decode(self.listed, positions, self.image_size, self.fit)
        names = [self.listed.files[place] if self.listed.files else f"image {place}" for place in positions]
        labels = self.labels[positions]
        seen = seen_in(images, labels, names=names, shapes=shapes if self.fit == "crop" else ())
        caveats = [*self.listed.caveats, *ignored_in(self.listed.ignored(positions), names), *seen]
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
        if self.words.start:
            provenance["start_template"] = self.words.start
        return ImageDataset(
            id=self.row.id,
            split=self.listed.split,
            images=images,
            labels=labels,
            classes=self.classes,
            templates=self.words.templates,
            modality=self.row.modality,
            licence=self.row.licence,
            provenance=provenance,
            indices=positions,
        )


def open_split(
    id: str,
    *,
    split: str = "test",
    root: str | Path | None = None,
    image_size: int | None = None,
    wording: str = "paper",
    like: str | None = None,
    class_names: Mapping[Any, str] | None = None,
    templates: Sequence[str] | None = None,
    bit_depth: int | None = None,
    fit: Fit = "crop",
) -> OpenSplit:
    """Find a split and its labels without decoding an image, for draws that `load_dataset` does not offer.

    Parameters, errors and the meaning of ``split`` are those of `load_dataset`.
    """
    _check_size(image_size)
    scheme, _, path = id.partition(":")
    if scheme in {"folder", "csv"}:
        path, stated = _stated(path)
        bit_depth, fit = stated.get("bit_depth", bit_depth), stated.get("fit", fit)
    if fit not in get_args(Fit):
        raise ValueError(f"fit={fit!r}: choose one of {', '.join(get_args(Fit))}")
    if scheme in {"folder", "csv"} and path:
        own = {"class_names": class_names, "templates": templates, "bit_depth": bit_depth}
        listed, row, words = _own_split(scheme, Path(path).expanduser(), split, like, wording, **own)
        # Other pixels must not pass for the same set in a comparison of results.
        options = {"bit_depth": bit_depth, "fit": fit}
        changed = urlencode({name: value for name, value in options.items() if value not in (None, "crop")})
        row = replace(row, id=f"{row.id}?{changed}") if changed else row
    elif id in DATASETS:
        own = {"like": like, "class_names": class_names, "templates": templates, "bit_depth": bit_depth}
        for name, value in own.items():
            if value is not None:
                raise ValueError(f"{name}={value!r} is for folder: and csv: data; {id} has its own classes")
        row, words = DATASETS[id], class_wording(id, wording=wording)
        listed = _registered_split(row, words, split, Path(root) if root else default_data_root(), image_size)
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
    return OpenSplit(row, words, listed, size, fit, bit_depth)


def list_datasets(*, root: str | Path | None = None) -> pd.DataFrame:
    """Tabulate the registered data sets.

    Returns
    -------
    pandas.DataFrame
        id, modality, classes (their number), image size (px, of what `load_dataset` gives), train, val,
        test (images; missing until the script that decides has run), licence, source, available (on this
        computer), script (the command that fetches or prepares it).
    """
    folder = Path(root) if root else default_data_root()
    table = pd.DataFrame(
        {
            "id": row.id,
            "modality": row.modality,
            "classes": len(class_wording(row.id).names),
            "image size": _image_size(row, folder),
            **dict(zip(SPLITS, _sizes(row, folder), strict=True)),
            "licence": row.licence,
            "source": row.source,
            "available": _available(row, folder),
            "script": row.command,
        }
        for row in DATASETS.values()
    )
    return table.astype(dict.fromkeys(SPLITS, "Int64"))


def _sizes(row: DatasetEntry, root: Path) -> Sequence[int | None]:
    manifest = root / row.location / "manifest.json"
    if row.kind != "folders" or not manifest.is_file():
        return row.sizes
    counts = json.loads(manifest.read_text(encoding="utf-8"))["counts"]
    return [sum(counts[split].values()) if split in counts else None for split in SPLITS]


def _image_size(row: DatasetEntry, root: Path) -> int:
    if row.kind != "medmnist":
        return row.image_size
    path = medmnist_file(root / "medmnist", Path(row.location).name, None)
    return int(path.stem.partition("_")[2] or 28) if path else row.image_size


def _available(row: DatasetEntry, root: Path) -> bool:
    if row.kind == "phantom":
        return True
    if row.kind == "medmnist":
        return medmnist_file(root / "medmnist", Path(row.location).name, None) is not None
    marker = "info.yaml" if row.kind == "medimeta" else "images"
    return (root / row.location / marker).exists()


def _stated(path: str) -> tuple[str, dict[str, Any]]:
    """A path, and what is stated behind it, as in ``PATH?bit_depth=12&fit=pad``."""
    name, mark, query = path.rpartition("?")
    if not mark or Path(path).expanduser().exists():
        return path, {}
    with parsed(
        f"{query!r} behind {name}", "It may state bit_depth=NUMBER and fit=crop or fit=pad, with & between them."
    ):
        stated: dict[str, Any] = dict(parse_qsl(query, strict_parsing=True))
        if unknown := set(stated) - {"bit_depth", "fit"}:
            raise ValueError(f"{min(unknown)} is unknown")
        return name, {key: int(value) if key == "bit_depth" else value for key, value in stated.items()}


def _registered_split(row: DatasetEntry, words: ClassWording, split: str, root: Path, image_size: int | None) -> Split:
    if row.kind == "phantom":
        split = resolve_split(split, tuple(phantoms.SPLITS), row.id)
        return _phantom_split(row, words, split, image_size or row.image_size)
    if row.kind in {"medmnist", "medimeta"}:
        split = resolve_split(split, SPLITS, row.id)
    if not _available(row, root):
        where = root / row.location
        looked = f"{where.parent / where.name}[_64|_128|_224].npz" if row.kind == "medmnist" else str(where)
        raise FileNotFoundError(
            f"{row.id} is not on this computer: looked at {looked}. Get it with\n"
            f"    {row.command} --root {root}\n"
            "or name the folder that holds it with root=... or MEDROBUST_DATA."
        )
    folder = root / row.location
    if row.kind == "medmnist":
        return medmnist_split(medmnist_file(folder.parent, folder.name, image_size), split, words)
    if row.kind == "medimeta":
        return medimeta_split(folder, split, words)
    return _renamed(class_folder_split(folder, split), words)


def _phantom_split(row: DatasetEntry, words: ClassWording, split: str, image_size: int) -> Split:
    name = row.id.removeprefix("phantom/").removesuffix(SITE_A)
    site = "A" if row.id.endswith(SITE_A) else "B"

    def render(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        return phantoms.render_phantoms(name, positions, split=split, site=site, image_size=image_size)[0]

    labels = np.arange(phantoms.SPLITS[split], dtype=np.int64) % len(words.names)
    return Split(
        split=split,
        labels=labels,
        codes=words.names,
        names=words.prompt_nouns,
        shapes=lambda: {(image_size, image_size)},
        read=render,
        source=f"medrobust_lib.phantoms, {name}, site {site}",
    )


def _own_split(
    scheme: str,
    path: Path,
    split: str,
    like: str | None,
    wording: str,
    *,
    class_names: Mapping[Any, str] | None,
    templates: Sequence[str] | None,
    bit_depth: int | None,
) -> tuple[Split, DatasetEntry, ClassWording]:
    reader: Callable[..., Split] = {"folder": class_folder_split, "csv": csv_split}[scheme]
    listed = reader(path, split, bit_depth=bit_depth)
    if like is None and class_names is None:
        listed = replace(listed, caveats=(*listed.caveats, *close_names(listed.codes, listed.totals)))
    if like is not None and like not in DATASETS:
        raise ValueError(f"unknown data set {like!r} for like.{suggest(like, DATASETS)}")
    if like is not None and class_names is not None:
        raise ValueError(f"give class_names or like={like!r}, not both: each of them names the classes")
    if like is None and wording != "paper":
        raise ValueError(f"wording={wording!r} needs like=..., the registered set whose words to take")
    if like is not None:
        words = class_wording(like, wording=wording)
        listed = _renamed(listed, words)
        if templates is not None:
            words = replace(words, templates=checked_templates(templates), start="")
    else:
        words = own_wording(
            listed.codes, listed.names, class_names=class_names, templates=templates, source=listed.source
        )
        labels = np.array([words.spellings[code] for code in listed.codes], dtype=np.int64)[listed.labels]
        listed = replace(listed, labels=labels, codes=words.names, names=words.prompt_nouns)
    row = DatasetEntry(
        # The name alone keys the noise, so that a moved folder keeps its noise.
        id=f"{scheme}:{path.resolve().name}",
        kind=scheme,
        location=str(path),
        modality=DATASETS[like].modality if like else "not stated",
        image_size=0,
        sizes=NOT_COUNTED,
        licence="not stated",
        source=f"own images, {path.resolve().name}",
    )
    return listed, row, words


def _renamed(listed: Split, words: ClassWording) -> Split:
    """Give a split the labels of a known class list, matching classes by name."""
    target = []
    for code, name in zip(listed.codes, listed.names, strict=True):
        label = words.label_of(code)
        label = words.label_of(name) if label is None else label
        if label is None:
            listing = ", ".join(f"{index} {known!r}" for index, known in enumerate(words.names))
            raise ValueError(
                f"{listed.source}: class {code!r} is outside the class list of {words.set_name}: {listing}. "
                "Rename it, or leave `like` out and give class_names={...} and templates=[...]"
            )
        target.append(label)
    labels = np.array(target, dtype=np.int64)[listed.labels]
    check_labels(labels, words.names, listed.source)
    return replace(listed, labels=labels, codes=words.names, names=words.prompt_nouns)


def _decode(
    listed: Split, positions: NDArray[np.int64], image_size: int | None, fit: Fit
) -> tuple[NDArray[np.uint8], str | None, list[tuple[int, int]]]:
    """Images, how they were resized, and the shape of each as it came."""
    shapes = listed.shapes() if image_size is None else set()
    size = FALLBACK_SIZE if len(shapes) > 1 else image_size
    if size is None:
        (shape,) = shapes
        size = max(shape) if fit == "pad" else None
    images = np.empty((len(positions), *((size, size) if size else shape), 3), np.uint8)
    found: list[tuple[int, int]] = []
    for row, image in enumerate(listed.read(positions)):
        found.append(image.shape[:2])
        images[row] = image if size is None else fit_square(image, size, fit=fit)
    edges = sorted(set(found))
    if size is None or edges == [(size, size)]:
        return images, None, found
    span = " to ".join(f"{width} × {height}" for height, width in dict.fromkeys((edges[0], edges[-1])))
    how = {"crop": "shortest edge to size (bicubic), centre crop", "pad": "longest edge to size (bicubic), black bars"}
    return images, f"{span} px -> {size} px: {how[fit]}", found


def _check_size(image_size: Any) -> None:
    if image_size is None:
        return
    if isinstance(image_size, bool) or not isinstance(image_size, int | np.integer) or image_size < 8:
        raise ValueError(f"image_size={image_size!r}: give a whole number of pixels, 8 or more, or None")
