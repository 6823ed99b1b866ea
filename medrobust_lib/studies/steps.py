"""What every step of a study is, and every cell that it makes: one interface to check, to price and to run."""

import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from medrobust_lib.data.dataset import Draw, ImageDataset
from medrobust_lib.data.registry import load_dataset, path_and_query
from medrobust_lib.experiments import Run, write_text_atomically
from medrobust_lib.files import read_json_object
from medrobust_lib.models.catalogue import caveats
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.loading import load_model

_LONGEST_PART = 32
TIMES = "times.json"
PASSES = 3  # a step of training costs about as much as so many encodings
CELL_BYTES = 16_000  # of a cell's files that do not grow with its images, about

Place = tuple[str, str, int | None]  # a model, a data set, a seed


class StudyError(ValueError):
    """A study file that cannot be run as it is written."""


class Workers(NamedTuple):
    """Who shares the images of one cell.

    Attributes
    ----------
    jobs : int
        Processes; -1 for one per core.
    backend : {"loky", "dask"}
    """

    jobs: int = 1
    backend: str = "loky"


ALONE = Workers()


class Estimate(NamedTuple):
    """What a cell costs; None where nobody knows.

    Attributes
    ----------
    images : int or None
    draws : int or None
        Encodings of noisy or corrupted images, or answers of a generative model, at most.
    seconds : float or None
        In one process of this machine.
    size : int or None
        Bytes on disk.
    """

    images: int | None
    draws: int | None
    seconds: float | None
    size: int | None


class Prices(NamedTuple):
    """What this machine needs, measured when first asked for and then remembered; None where nobody knows.

    Attributes
    ----------
    images : callable
        Number of test images, from the id of a data set.
    size : callable
        Images of a split, from the id of a data set and the split.
    classes : callable
        Number of classes, from the id of a data set.
    rate : callable
        Draws in a second, from the id of a model.
    answering : callable
        Answers in a second, from a cell of questions.
    corrupting : callable
        Seconds for a corrupted image, from the ids of a data set and a suite.
    notebooks : mapping of (str, str) to float
        Seconds, by number and model, as far as earlier cards tell.
    """

    images: Callable[[str], int | None]
    size: Callable[[str, str], int | None]
    classes: Callable[[str], int]
    rate: Callable[[str], float | None]
    answering: Callable[["Cell"], float | None]
    corrupting: Callable[[str, str], float]
    notebooks: Mapping[tuple[str, str], float]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The models, data sets and seeds that steps run on, and how images are drawn.

    Attributes
    ----------
    datasets : tuple of str
        Ids as of `medrobust datasets`.
    models : tuple of str
        Ids as of `medrobust models`; may be left out where every step is a notebook, which takes its default then.
    seeds : tuple of int
        Of the image draw, the noise and the corruptions.
    n_images : int or None
        Test images of each data set, a seeded draw; None: all, and in notebooks their default.
    draw : {"stratified", "balanced"}
        How they are drawn, as in `load_dataset`; in notebooks and of questions always stratified.
    dtype : str
        Precision of the models, as in `load_model`; notebooks have their own.
    """

    datasets: tuple[str, ...] = field(metadata={"takes": "a list of data set ids, see `medrobust datasets`"})
    models: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    n_images: int | None = None
    draw: Draw = "stratified"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"

    @property
    def shared(self) -> dict[str, Any]:
        """Parameters of all cells but those of notebooks."""
        return {"n_images": self.n_images, "draw": self.draw, "dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One entry of ``steps``.

    Attributes
    ----------
    models, datasets : tuple of str
        Those of the study that it runs on; none: all. A model may also be the ``name`` of an earlier adapt step.
    """

    kind: ClassVar[str]
    generative: ClassVar[bool] = False  # whether its models answer in text

    models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()

    @abstractmethod
    def check(self, grid: Grid, notebooks: Path | None) -> None:
        """Raise a ValueError for settings that cannot work; ``grid`` is narrowed to the step's own."""

    @abstractmethod
    def cells(self, number: int, grid: Grid, notebooks: Path | None) -> list["Cell"]:
        """Its cells on a narrowed grid; ``number`` is its place in the file."""

    def settings(self) -> dict[str, Any]:
        """Its own settings as JSON values."""
        own = {name: value for name, value in asdict(self).items() if name not in ("models", "datasets")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}


def places(grid: Grid) -> list[Place]:
    """Every model with every data set and seed."""
    return list(product(grid.models, grid.datasets, grid.seeds))


@dataclass(frozen=True)
class Cell(ABC):
    """One piece of a study: it runs on its own, is finished or not, and has a folder and a result card.

    Attributes
    ----------
    number : int
        Of its step in the file, from 1.
    step : Step
    model, dataset : str
        Ids; empty for a notebook that has no such parameter. The model may be the name of an adapted one.
    seed : int or None
    parameters : dict
        Everything else that shapes its results, as JSON values; of a notebook the parameters that it is given.
    source : Cell or None
        The cell that makes its model.
    """

    number: int
    step: Step = field(repr=False)
    model: str
    dataset: str
    seed: int | None
    parameters: dict[str, Any] = field(repr=False)
    source: "Cell | None" = field(default=None, repr=False)

    @property
    def what(self) -> str:
        """Kind of the step, for people."""
        return self.step.kind

    @property
    def variant(self) -> str:
        """Which of several cells of one step, model, data set and seed."""
        return ""

    @property
    def label(self) -> str:
        """What a person reads in tables: its step's number, what is done to which model on which data set, and how."""
        seed, where = "" if self.seed is None else f"seed {self.seed}", self.shown and f"on {self.shown}"
        done = " ".join(filter(None, (str(self.number), self.what, self.model, where)))
        return ", ".join(filter(None, (done, self.variant, seed)))

    @property
    def name(self) -> str:
        """Names the folder; unique in the study."""
        parts = [f"{self.number:02d}-{self.what.replace(' ', '-')}", short_id(self.model), short_id(self.dataset)]
        parts += [short_id(self.variant.replace(" ", "")), "" if self.seed is None else f"seed{self.seed}"]
        return "_".join(filter(None, parts))

    @property
    def card_name(self) -> str:
        """Number of its card and beginning of its tables' names."""
        return f"{self.number:02d}-{self.step.kind}"

    def folder(self, study: Path) -> Path:
        """Its run folder, below the folder of its study."""
        return study / "cells" / self.name

    @abstractmethod
    def estimate(self, prices: Prices) -> Estimate:
        """What it costs."""

    @abstractmethod
    def run(self, study: Path, *, notebooks: Path | None = None, workers: Workers = ALONE) -> None:
        """Write its card and tables into its folder in that of the study."""

    @property
    def base(self) -> str:
        """Id of the model before any adaptation."""
        return self.source.base if self.source else self.model

    @property
    def shown(self) -> str:
        """Its data set as cards and pages name it."""
        return shown_id(self.dataset)

    def begin(self, study: Path, title: str) -> Run:
        """Start the clock."""
        where = {"step": self.step.kind, "model": self.model, "dataset": self.shown, "seed": self.seed}
        return Run(self.card_name, title, self.folder(study), where | self.parameters, time.monotonic())

    def keep_times(self, study: Path, **seconds: float) -> None:
        """Keep what the clock said, apart from cards and tables, which must not depend on it; the first time counts."""
        path = self.folder(study) / TIMES
        kept = read_json_object(path, "times") if path.is_file() else {}
        write_text_atomically(path, json.dumps(seconds | kept))

    def encoder(self, study: Path) -> DualEncoder:
        """Its model, with what an adapt step has learned of the image tower."""
        model = load_model(self.base, dtype=self.parameters["dtype"])
        return self.source.adapted(model, study) if self.source else model

    def class_features(self, model: DualEncoder, data: ImageDataset, study: Path) -> Tensor:
        """Features of the class texts [K, d], or what an adapt step has learned in their place."""
        learned = self.source.texts(model, data, study) if self.source else None
        return model.class_features(data.classes, data.templates[:1]) if learned is None else learned

    def images(self) -> ImageDataset:
        """The test images that are measured."""
        n, draw = self.parameters["n_images"], self.parameters["draw"]
        return load_dataset(self.dataset, n=n, seed=self.seed or 0, draw=draw)


def seconds_for(draws: float | None, rate: float | None) -> float | None:
    """Time for so many draws; None where one of the two is not known."""
    return None if draws is None or rate is None else draws / rate


def shown_id(dataset: str) -> str:
    """Id of a data set without the folders that lead to it, and without what its classes are called."""
    scheme, colon, path = dataset.partition(":")
    path, query = path_and_query(path)
    kept = "&".join(part for part in query.split("&") if part and not part.startswith(("words=", "group=")))
    return f"{scheme}:{Path(path).name}{'?' if kept else ''}{kept}" if colon else dataset


def short_id(id: str) -> str:
    """An id as part of a folder's name; one that had to be shortened stays unique by a piece of its hash."""
    text = re.sub(r"[^A-Za-z0-9.-]+", "-", shown_id(id)).strip("-.")
    if len(text) <= _LONGEST_PART and not id.partition(":")[2]:
        return text
    return f"{text[-_LONGEST_PART:].strip('-.')}-{hashlib.sha256(id.encode()).hexdigest()[:6]}"


def described(model: DualEncoder, data: ImageDataset, notes: Sequence[str], *, name: str = "") -> dict[str, Any]:
    """Model, under another name where it was adapted, data set and notes of a card."""
    notes = [*caveats(model, data), *notes]
    return {
        "model": {**model.identity(), "id": name or model.id, "image_size": model.image_size},
        "dataset": data.identity(),
        "notes": notes,
    }
