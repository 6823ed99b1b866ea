"""The one in-memory form of a labelled image set, and the seeded subset everyone draws from it."""

import base64
import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from medrobust_lib.checks import check_choice, check_whole
from medrobust_lib.data.inspection import close_names, seen_in, tell
from medrobust_lib.data.wording import check_distinct, checked_templates

Draw = Literal["stratified", "balanced"]
ABSTAINED = "abstain"  # in place of a class's name

_ROW_OF_THUMBNAILS, _MOST_THUMBNAILS = 9, 16
_THUMBNAIL_SIDE = 88


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images, labels and everything needed to prompt for them and to say where they come from.

    Attributes
    ----------
    id : str
        Registry id, or ``folder:NAME`` / ``csv:NAME``; part of the key of every noise stream.
    split : str
        ``train``, ``val``, ``test``, or ``all`` where the source has no splits.
    images : uint8 [n, H, W, 3]
        RGB, gray images repeated over the channels.
    labels : int64 [n]
        Indices into ``classes``.
    classes : tuple of str
        Prompt noun of each label.
    templates : tuple of str
        Prompt templates, each with one ``{}``; the first is the papers'.
    modality, licence : str
        For people; never parsed.
    provenance : dict
        JSON values: source, what was resized, whether the images are synthetic, how they were drawn, and under
        ``caveats`` the sentences that a result card must carry. Where ``caveats`` is missing, the images are looked
        at (see `seen_in`), what was found is put there, and one warning says it.
    indices : int64 [n]
        Position of each image in its full split, so that a noise stream belongs to an image and not to
        its place in a subset.
    files : tuple of n str
        Where each image comes from: a path below what the caller named, or ``image INDEX`` where it is no file.
    groups : tuple of n str
        The patient of each image, or whatever else images belong to; empty where nobody knows.

    Raises
    ------
    TypeError
        Wrong dtype of images, labels or indices, or provenance that JSON cannot hold.
    ValueError
        Wrong shapes, no images, fewer files or groups than images, fewer than two classes, class names that differ in
        case, spaces or the form of accents only, a label outside the class list, a template without its ``{}``, or an
        index that is negative or repeated.
    """

    id: str
    split: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    modality: str
    licence: str
    provenance: dict[str, Any]
    indices: NDArray[np.int64]
    files: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, dtype in (("images", np.uint8), ("labels", np.int64), ("indices", np.int64)):
            _check_array(self.id, name, getattr(self, name), dtype)
        if self.images.ndim != 4 or self.images.shape[3] != 3 or 0 in self.images.shape[1:3]:
            raise ValueError(f"{self.id}: images must be [n, H, W, 3], got shape {self.images.shape}")
        if len(self.images) == 0:
            raise ValueError(f"{self.id}: no images in split {self.split!r}")
        for name, array in (("labels", self.labels), ("indices", self.indices)):
            if array.shape != (len(self.images),):
                raise ValueError(f"{self.id}: {name} have shape {array.shape} for {len(self.images)} images")
        check_classes(self.classes, self.id)
        check_labels(self.labels, self.classes, self.id)
        checked_templates(self.templates, source=f"{self.id}: ")
        if self.indices.min() < 0 or len(np.unique(self.indices)) < len(self.indices):
            raise ValueError(f"{self.id}: indices must be distinct positions >= 0 in the full split")
        object.__setattr__(self, "files", self.files or tuple(f"image {index}" for index in self.indices))
        for name, names in (("files", self.files), ("groups", self.groups or self.files)):
            if len(names) != len(self.images):
                raise ValueError(f"{self.id}: {len(names)} {name} for {len(self.images)} images")
        json.dumps(self.provenance)
        if "caveats" not in self.provenance:
            found = seen_in(self.images, self.labels, names=self.files, shapes=[self.images.shape[1:3]])
            found += close_names(self.classes, list(self.class_counts().values()))
            object.__setattr__(self, "provenance", {**self.provenance, "caveats": found})
            tell(self.id, found)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def synthetic(self) -> bool:
        """Whether the images are drawings (phantoms) instead of recordings."""
        return bool(self.provenance.get("synthetic", False))

    @property
    def start_template(self) -> str:
        """Hand-written prompt that per-image adaptation starts from: the papers', else the first template."""
        return self.provenance.get("start_template", self.templates[0])

    @property
    def caveats(self) -> list[str]:
        """What a reader of any number on these images must know about them; sentences."""
        return list(self.provenance["caveats"])

    def subset(self, positions: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> "ImageDataset":
        """Return the images at the given positions of this data set (or under a boolean mask).

        Parameters
        ----------
        positions : sequence of int, or bool [n]
            0 to ``len(self) - 1``, in the order wanted.

        Raises
        ------
        IndexError
            A position outside this data set, or a mask of another length.
        """
        positions = np.asarray(positions)
        if positions.dtype == np.bool_:
            if positions.shape != (len(self),):
                raise IndexError(f"{self.id}: mask of shape {positions.shape} for {len(self)} images")
            positions = np.flatnonzero(positions)
        positions = positions.astype(np.int64).reshape(-1)
        outside = positions[(positions < 0) | (positions >= len(self))]
        if len(outside):
            raise IndexError(f"{self.id}: position {outside[0]} is outside 0 to {len(self) - 1}")
        chosen: dict[str, Any] = {name: getattr(self, name)[positions] for name in ("images", "labels", "indices")}
        for name in ("files", "groups"):
            values = getattr(self, name)
            chosen[name] = tuple(values[position] for position in positions) if values else ()
        return replace(self, **chosen)

    def image_table(self, predicted: ArrayLike, confidence: ArrayLike | None = None) -> pd.DataFrame:
        """Tabulate what was answered, a row for each image, with the names that people know it by.

        Parameters
        ----------
        predicted : int [n]
            Class of each image, or -1 for an abstention.
        confidence : float [n], optional
            In [0, 1].

        Returns
        -------
        DataFrame
            dataset, image (index in the full split), file, patient (where `groups` are known), label, class_name,
            predicted, predicted_name ("abstain" for -1), confidence (where given) and correct.

        Raises
        ------
        ValueError
            Another number of answers than images, or an answer that is no class and not -1.
        """
        predicted = np.asarray(predicted)
        if predicted.shape != self.labels.shape:
            raise ValueError(f"{self.id}: answers of shape {predicted.shape} for {len(self)} images")
        if predicted.min() < -1 or predicted.max() >= len(self.classes):
            wrong = predicted[(predicted < -1) | (predicted >= len(self.classes))][0]
            raise ValueError(f"{self.id}: answer {wrong} is neither -1 nor a class of 0 to {len(self.classes) - 1}")
        names = np.array([*self.classes, ABSTAINED])
        columns = {
            "dataset": self.id, "image": self.indices, "file": self.files,
            **({"patient": self.groups} if self.groups else {}),
            "label": self.labels, "class_name": names[self.labels], "predicted": predicted,
            "predicted_name": names[predicted],
            **({} if confidence is None else {"confidence": np.asarray(confidence, dtype=np.float64)}),
            "correct": predicted == self.labels,
        }  # fmt: skip
        return pd.DataFrame(columns)

    def sources(self) -> set[Path]:
        """What each image was read from: absolute paths, made up with the split and the index where it is no file."""
        root = Path(self.provenance["read_from"])
        root = {"folder": root, "csv": root.parent}.get(self.id.partition(":")[0], root / self.split)
        return {(root / file).resolve() for file in self.files}

    def class_counts(self) -> dict[str, int]:
        """Count the images of each class, in label order; absent classes count 0."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return {name: int(count) for name, count in zip(self.classes, counts, strict=True)}

    def identity(self) -> dict[str, Any]:
        """What tells these images from any others in a record: the data set's part of a result card.

        Returns
        -------
        dict
            id, split, n, synthetic, wording, classes, class_counts (in the order of the classes), drawn (n, seed and
            draw, as far as known) and fingerprint (16 hex digits of the SHA-256 of images, labels and positions).
        """
        digest = hashlib.sha256(str(self.images.shape).encode())
        for array in (self.images, self.labels, self.indices):
            digest.update(np.ascontiguousarray(array).data)
        drawn = {name: self.provenance[name] for name in ("n", "seed", "draw") if name in self.provenance}
        return {
            "id": self.id, "split": self.split, "n": len(self), "synthetic": self.synthetic,
            "wording": self.provenance.get("wording", ""), "classes": list(self.classes),
            "class_counts": list(self.class_counts().values()), "drawn": drawn, "fingerprint": digest.hexdigest()[:16],
        }  # fmt: skip

    def __repr__(self) -> str:
        _, height, width, _ = self.images.shape
        kind = ", synthetic phantoms" if self.synthetic else ""
        return (
            f"ImageDataset({self.id!r}, split={self.split!r}, {len(self)} images of {width} × {height} px, "
            f"{len(self.classes)} classes, {self.modality}{kind})"
        )

    def _repr_html_(self) -> str:
        from jinja2 import Template  # deferred: only cards need it

        _, height, width, _ = self.images.shape
        full = self.provenance.get("split_size", len(self))
        drawn = f"{len(self):,} images" if full == len(self) else f"{len(self):,} of {full:,} images"
        counts = " · ".join(f"{name} {count:,}" for name, count in self.class_counts().items())
        facts = {
            "split": f"{self.split}, {drawn} of {width} × {height} px",
            "classes": f"{len(self.classes)}: {counts}",
            "modality": self.modality,
            "prompt": self.templates[0] + (f"  (+ {len(self.templates) - 1} more)" if self.templates[1:] else ""),
            "resized": self.provenance.get("resized") or "no",
            "source": self.provenance.get("source", "not stated"),
            "licence": self.licence,
            **({"caveats": " ".join(self.caveats)} if self.caveats else {}),
        }
        lines = files("medrobust_lib").joinpath("templates", "dataset.html.j2").read_text(encoding="utf-8").splitlines()
        card = Template("".join(map(str.strip, lines)), autoescape=True)
        figures = [(name, *_figure(image)) for name, image in self._thumbnails()]
        return card.render(title=self.id, synthetic=self.synthetic, facts=facts, figures=figures, side=_THUMBNAIL_SIDE)

    def _thumbnails(self) -> list[tuple[str, NDArray[np.uint8]]]:
        # Round-robin over the classes, so that a class-sorted split still shows every class.
        rank = pd.Series(self.labels).groupby(self.labels).cumcount()
        per_class = max(1, _ROW_OF_THUMBNAILS // len(self.classes))
        chosen = np.lexsort((self.labels, rank))[: min(per_class * len(self.classes), _MOST_THUMBNAILS)]
        return [(self.classes[self.labels[position]], self.images[position]) for position in chosen]


def check_classes(classes: Sequence[str], source: str) -> None:
    """Raise ValueError unless there are two or more non-empty class names that are distinct when `folded`."""
    if len(classes) < 2:
        raise ValueError(
            f"{source}: one class only ({', '.join(map(repr, classes)) or 'none'}); "
            "zero-shot classification chooses between at least two classes"
        )
    for name in classes:
        if not name.strip():
            raise ValueError(f"{source}: empty class name in {list(classes)}")
        if list(classes).count(name) > 1:
            raise ValueError(f"{source}: class name {name!r} appears twice in {list(classes)}")
    check_distinct(classes, f"{source}: class names", "write them alike where they are one class")


def check_labels(labels: NDArray[np.int64], classes: Sequence[str], source: str) -> None:
    """Raise ValueError naming the first label outside the class list."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        listing = ", ".join(f"{index} {name!r}" for index, name in enumerate(classes))
        raise ValueError(
            f"{source}: label {labels[wrong[0]]} (image {wrong[0]}; {len(wrong)} such) is outside the class "
            f"list: {listing}"
        )


def stratified_positions(labels: NDArray[np.int64], *, n: int | None, seed: int) -> NDArray[np.int64]:
    """Draw a seeded, class-stratified subset of a split.

    Each class gets its share ``n * count / N`` rounded by largest remainder (ties to the lower label);
    where ``n`` allows it, a class rounded to nothing gets one image from the best-provided class. Within
    a class a fixed permutation, keyed by (seed, label), is read from its start, so a larger ``n`` almost
    always contains the smaller one.

    Parameters
    ----------
    labels : int64 [N]
    n : int or None
        1 to N; None takes the whole split.
    seed : int
        0 or more.

    Returns
    -------
    int64 [n]
        Ascending positions.

    Raises
    ------
    ValueError
        ``n`` outside 1 to N, a negative seed, or one of them no whole number.
    """
    seed = check_whole("seed", seed, least=0)
    if n is None:
        return np.arange(len(labels), dtype=np.int64)
    n = check_whole("n", n, most=len(labels), hint=": it counts images of this split; None takes all")
    return drawn_of_each_class(labels, _shares(np.unique_counts(labels).counts, n), seed=seed)


def balanced_positions(labels: NDArray[np.int64], *, n: int, seed: int) -> NDArray[np.int64]:
    """Draw a seeded subset of a split with equally many images of each class that occurs.

    Classes take turns in label order until n images are drawn, so that numbers differ by one at most, the lower labels
    having more; a class without images left is passed over. Within a class images come in the order of
    `stratified_positions`, so a larger ``n`` contains the smaller one.

    Parameters, returns and errors are those of `stratified_positions`, but ``n`` is never None.
    """
    seed = check_whole("seed", seed, least=0)
    n = check_whole("n", n, most=len(labels), hint=": it counts images of this split")
    counts = np.unique_counts(labels).counts
    turns = np.nonzero(np.arange(n)[:, None] < counts)[1]  # labels, round after round
    return drawn_of_each_class(labels, np.bincount(turns[:n], minlength=len(counts)), seed=seed)


def check_draw(draw: object, *, n: object, size: str = "n") -> None:
    """Raise ValueError for an unknown draw, or a balanced one without n, which the message calls by its name size."""
    check_choice("draw", draw, get_args(Draw))
    if draw == "balanced" and n is None:
        raise ValueError(
            f"draw='balanced' needs {size}, the number of images to draw; give it, or draw='stratified', which may "
            "take the whole split"
        )


def drawn_of_each_class(labels: NDArray[np.int64], numbers: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Draw so many images of each class that occurs; what is drawn of one does not depend on the others.

    Parameters
    ----------
    labels : int64 [N]
    numbers : int64 [classes that occur]
        By ascending label.
    seed : int

    Returns
    -------
    int64 [n]
        Ascending positions.
    """
    chosen = [
        np.random.default_rng([seed, int(value)]).permutation(np.flatnonzero(labels == value))[:number]
        for value, number in zip(np.unique(labels), numbers, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def draw_shots(dataset: ImageDataset, shots: int, draw: np.random.Generator) -> ImageDataset:
    """Draw the same number of images of every class; a class with fewer gives all, with a warning.

    Raises
    ------
    ValueError
        shots below 1, or a class without images.
    """
    check_whole("shots", shots, hint=": few-shot learning needs at least one image per class")
    counts = dataset.class_counts()
    for noun, count in counts.items():
        if not count:
            raise ValueError(f"{dataset.id}: no image of class {noun!r} to learn from")
    short = [f"{noun!r} has {count}" for noun, count in counts.items() if count < shots]
    if short:
        warnings.warn(
            f"{dataset.id}: {len(short)} of {len(counts)} classes have fewer images than shots={shots} "
            f"({', '.join(short)}); all are used",
            stacklevel=3,
        )
    positions = [draw.permutation(np.flatnonzero(dataset.labels == label))[:shots] for label in range(len(counts))]
    return dataset.subset(np.concatenate(positions))


def _shares(counts: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    # Whole-number arithmetic: a float quota could round the same share differently on two machines.
    share, remainder = np.divmod(counts * n, counts.sum())
    share[np.argsort(-remainder, kind="stable")[: n - share.sum()]] += 1
    if n >= len(counts):
        while (share == 0).any():
            share[np.argmax(share)] -= 1
            share[np.argmin(share)] += 1
    return share


def _check_array(source: str, name: str, array: object, dtype: type) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        found = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        advice = "; scale them to 0..255, round and cast" if name == "images" else ""
        raise TypeError(f"{source}: {name} must be a {dtype.__name__} array, got {found}{advice}")


def _figure(image: NDArray[np.uint8]) -> tuple[str, str]:
    """A thumbnail in base64, and how a browser has to scale it."""
    picture = Image.fromarray(image)
    # Enlarged smoothly, a 28 px image would look better than what the model gets.
    rendering = "pixelated" if max(picture.size) < _THUMBNAIL_SIDE else "auto"
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)  # a quarter of the size: thumbnails end up in notebooks
    return base64.b64encode(buffer.getvalue()).decode("ascii"), rendering
