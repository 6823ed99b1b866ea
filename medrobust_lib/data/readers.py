"""Readers of the published layouts and of phantoms. Each lists one split cheaply; only the images drawn are decoded.

MedMNIST npz, MedIMeta folders and phantoms; class folders and tables have a file of their own. Labels are matched to
the class list by name wherever the source states names, never by position alone.
"""

import math
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import yaml
from numpy.typing import NDArray

from medrobust_lib import phantoms
from medrobust_lib.checks import suggest
from medrobust_lib.data import decoding
from medrobust_lib.data.dataset import check_labels
from medrobust_lib.data.inspection import first_of
from medrobust_lib.data.wording import SITE_A, ClassWording
from medrobust_lib.files import parsed

UNSPLIT = "all"
SPLITS = ("train", "val", "test")
SHOWN_PATH = 80  # characters
FALLBACK_SIZE = 224
_MOST_BRACKETS = 1000
_IN_MEMORY = 2**30  # bytes of images; more are kept in a file
_AGAIN = "Download the set again."
_HOW = {"crop": "shortest edge to size (bicubic), centre crop", "pad": "longest edge to size (bicubic), black bars"}

Positions = NDArray[np.int64]
Images = Iterator[NDArray[np.uint8]]
Source = tuple[Callable[[], set[tuple[int, int]]], Callable[[Positions], Images]]  # shapes and read of a split


@dataclass(frozen=True)
class Split:
    """One split of a source: listed, not yet decoded.

    Attributes
    ----------
    split : str
        ``train``, ``val``, ``test`` or ``all``.
    labels : int64 [N]
        Indices into the class list, or into ``codes`` until `named` or `relabelled` gives other ones.
    shapes : callable
        All (height, width) that occur in the split; for files this reads headers only.
    read : callable
        Ascending positions -> uint8 [H, W, 3] images, one at a time.
    source : str
        File or folder that was read.
    splits : tuple of str
        All splits of the source; ``("all",)`` where it is not divided.
    codes : tuple of str
        The source's own class names (folder names, table values), where no class list says which it has.
    names : tuple of str
        The same classes in words.
    templates : tuple of str
        Prompts that lie beside the images; empty where there are none.
    files : tuple of N str
        File of every image below the source; empty where the images are not files.
    totals : tuple of int
        Images of each class in all splits together, where they were counted.
    caveats : tuple of str
        What the reader left out or took for granted, in sentences for the result cards.
    ignored : callable
        Positions -> what `left_out` says of each file.
    groups : callable
        Positions -> the patient of each image, or nothing where nobody knows.
    """

    split: str
    labels: NDArray[np.int64]
    shapes: Callable[[], set[tuple[int, int]]]
    read: Callable[[Positions], Images]
    source: str
    splits: tuple[str, ...] = SPLITS
    codes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    totals: tuple[int, ...] = ()
    caveats: tuple[str, ...] = ()
    ignored: Callable[[Positions], Iterable[tuple[str, ...]]] = lambda positions: ()
    groups: Callable[[Positions], Sequence[str]] = lambda positions: ()

    def named(self, words: ClassWording) -> "Split":
        """Give the split the labels of a class list, matching classes by name.

        Raises
        ------
        ValueError
            A class that is not in the list.
        """
        target = []
        for code, name in zip(self.codes, self.names, strict=True):
            label = words.label_of(code)
            label = words.label_of(name) if label is None else label
            if label is None:
                listing = ", ".join(f"{index} {known!r}" for index, known in enumerate(words.names))
                raise ValueError(
                    f"{self.source}: class {code!r} is outside the class list of {words.set_name}: {listing}. "
                    "Rename it, or leave `like` out and give class_names={...} and templates=[...]"
                )
            target.append(label)
        return self.relabelled(target)

    def relabelled(self, target: Sequence[int]) -> "Split":
        """Give the split other labels: ``target`` holds the new one of each of its classes."""
        return replace(self, labels=np.array(target, dtype=np.int64)[self.labels])

    def decode(
        self, positions: Positions, image_size: int | None, fit: decoding.Fit
    ) -> tuple[NDArray[np.uint8], str | None, list[tuple[int, int]]]:
        """Read images at ascending positions as squares of a size, None for their own.

        Returns
        -------
        images : uint8 [n, H, W, 3]
        resized : str or None
            How they were resized.
        shapes : list of (height, width)
            Of each image as it came.
        """
        shapes = self.shapes() if image_size is None else set()
        size = FALLBACK_SIZE if len(shapes) > 1 else image_size
        if size is None:
            (shape,) = shapes
            size = max(shape) if fit == "pad" else None
        images = _room_for((len(positions), *((size, size) if size else shape), 3))
        found: list[tuple[int, int]] = []
        for row, image in enumerate(self.read(positions)):
            found.append(image.shape[:2])
            images[row] = image if size is None else decoding.fit_square(image, size, fit=fit)
        edges = sorted(set(found))
        if size is None or edges == [(size, size)]:
            return images, None, found
        span = " to ".join(f"{width} × {height}" for height, width in dict.fromkeys((edges[0], edges[-1])))
        return images, f"{span} px -> {size} px: {_HOW[fit]}", found


def _room_for(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Where images are put: in memory; many of them in a file without a name, which is gone with the array."""
    if math.prod(shape) <= _IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


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


def phantom_split(id: str, split: str, wording: ClassWording, image_size: int) -> Split:
    """List a split of phantoms, which are drawn when they are read."""
    name = id.removeprefix("phantom/").removesuffix(SITE_A)
    options = {"split": split, "site": "A" if id.endswith(SITE_A) else "B", "image_size": image_size}
    return Split(
        split=split,
        labels=np.arange(phantoms.SPLITS[split], dtype=np.int64) % len(wording.names),
        shapes=lambda: {(image_size, image_size)},
        read=lambda positions: phantoms.render_phantoms(name, positions, **options)[0],
        source=f"medrobust_lib.phantoms, {name}, site {options['site']}",
    )


def medmnist_file(place: Path, image_size: int | None) -> Path | None:
    """Pick ``place[_64|_128|_224].npz``: the size asked for if it is there, else the largest, else None."""
    files = {size: place.with_name(f"{place.name}_{size}.npz") for size in (224, 128, 64)}
    files[28] = place.with_name(f"{place.name}.npz")
    found = {size: path for size, path in files.items() if path.is_file()}
    return found.get(image_size or 0, next(iter(found.values()), None))


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
        keys = decoding.member_names_of(archive)
        if not {f"{split}_images", f"{split}_labels"} <= set(keys):
            raise ValueError(f"it has no {split}_images and {split}_labels; it holds {', '.join(keys)}")
        shape, labels = decoding.listed_members(archive, f"{split}_images", f"{split}_labels")
    check_labels(labels, wording.names, f"{path} ({split}_labels)")
    return Split(
        split=split,
        labels=labels,
        shapes=lambda: {(shape[1], shape[2])},
        read=lambda positions: map(decoding.as_rgb, decoding.member_rows(path, f"{split}_images", positions)),
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
        every_label = decoding.whole_numbers(np.load(labels_file, mmap_mode="r", allow_pickle=False))
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
        shapes, read = file_images(paths)
    labels = np.array([to_label[int(number)] for number in numbers], dtype=np.int64)
    splits = tuple(name for name in SPLITS if (folder / "splits" / f"{name}.txt").is_file())
    return Split(split, labels, shapes, read, str(folder), splits)


def _medimeta_task(path: Path, wording: ClassWording) -> tuple[str, dict[int, int]]:
    with parsed(f"{path} is no description of a MedIMeta set", _AGAIN):
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > _MOST_BRACKETS:  # nested, they take the parser minutes
            raise ValueError(f"more than {_MOST_BRACKETS} brackets")
        tasks = [_named_labels(task) for task in yaml.safe_load(text)["tasks"]]
        fitting = {}
        for name, single, labels in tasks:
            mapping = {number: wording.label_of(label) for number, label in labels.items()}
            if single and sorted(mapping.values(), key=str) == sorted(range(len(wording.names)), key=str):
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
        raise ValueError(f"the task name {str(name)[:SHOWN_PATH]!r} is no file name")
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


def _hdf5_images(path: Path, members: Positions) -> Source:
    says = f"{path} is not a readable MedIMeta image file"
    with parsed(says, _AGAIN), h5py.File(path) as container:
        images, last = _own_images(container), max(members, default=0)
        shape, dtype = images.shape, images.dtype
        if len(shape) != 4 or shape[3] not in (1, 3) or dtype != np.uint8 or (len(members) and shape[0] <= last):
            raise ValueError(f"'images' is {dtype} of shape {shape}; expected uint8 [N, H, W, 1 or 3] with N > {last}")
        decoding.check_pixels(*shape[1:3])

    def read(positions: NDArray[np.int64]) -> Images:
        for position in positions:
            with parsed(says, _AGAIN), h5py.File(path) as container:
                image = decoding.as_rgb(container["images"][members[position]])
            yield image

    return lambda: {(shape[1], shape[2])}, read


def _own_images(container: h5py.File) -> h5py.Dataset:
    """Refuse images that lie in another file, and pieces of the file that unpack to more than an image may hold."""
    if not isinstance(container.get("images", getlink=True), h5py.HardLink):
        raise ValueError("'images' is a link")
    images = container["images"]
    if images.external is not None or images.is_virtual:
        raise ValueError("'images' lies in other files")
    if images.chunks and np.prod(images.chunks, dtype=float) > 3 * decoding.MOST_PIXELS:
        raise ValueError(f"'images' comes in pieces of {images.chunks}")
    return images


def file_images(paths: Sequence[Path], bit_depth: int | None = None) -> Source:
    """``shapes`` and ``read`` of a `Split` whose images are files."""
    return (
        lambda: {decoding.image_shape(path) for path in paths},
        lambda positions: (decoding.read_image(paths[position], bit_depth=bit_depth) for position in positions),
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"the MedIMeta folder is incomplete: no file at {path}")
    return path
