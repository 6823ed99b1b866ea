"""The step ``adapt``: a model that learns from a few clean images, for later steps to use under the step's name."""

import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from medrobust_lib import checks, metrics
from medrobust_lib.adaptation.adapting import adapt_lora, fine_tune, load_tuned
from medrobust_lib.adaptation.retraining import linear_probe
from medrobust_lib.adaptation.training import Logits, Recipe, Schedule, Softmax
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import open_split
from medrobust_lib.data.splits import FractionSplits, LearnFrom, fraction_splits
from medrobust_lib.evaluation import Candidate, corruption_probabilities
from medrobust_lib.experiments import Metric
from medrobust_lib.files import read_tensors, write_tensors
from medrobust_lib.models.adapters import load_adapter
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.loading import find_model
from medrobust_lib.smoothing.prompts import PromptSet, learn_prompts
from medrobust_lib.studies.steps import (
    ALONE,
    CELL_BYTES,
    PASSES,
    Cell,
    Estimate,
    Grid,
    Prices,
    Step,
    StudyError,
    Workers,
    described,
    seconds_for,
)

_ALWAYS = ("name", "models", "datasets", "method", "fraction", "learn_from", "n_val")
_TRAINING = ("epochs", "batch_size", "learning_rate", "weight_decay", "schedule", "softmax", "logits")
_TOWER = ("template", *_TRAINING)
_READS = {
    "LoRA": ("rank", "kernel", *_TOWER),
    "full fine-tuning": _TOWER,
    "linear probe": (),
    "prompts": ("epochs", "batch_size", "learning_rate"),
}
_ADAPTER, _PROBE, _PROMPTS = "adapter", "probe.safetensors", "prompts.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdaptStep(Step):
    """Few-shot adaptation of one model.

    Attributes
    ----------
    name : str
        Under which later steps name the adapted model in their ``models``.
    method : {"LoRA", "full fine-tuning", "linear probe", "prompts"}
        The first two learn jointly from all data sets of the step, the others from each alone.
    fraction : float
        Share of the images, in (0, 1], as in `fraction_splits`.
    learn_from : {"train", "val"}
        The split that the fraction is one of.
    n_val : int
        Images to choose the best epoch or strength by.
    template : int
        Which of a data set's templates is learned with, from 1; tests use the first.
    rank : int
        Of the adapters.
    kernel : {"whole", "middle"}
        Of the adapters of convolutions, as in `adapt_lora`; "middle" is for models with convolutions alone.
    epochs, batch_size, learning_rate, weight_decay, schedule, softmax, logits
        As in `adapt_lora`; prompts read the first three, as `learn_prompts` does. None as rate: that of the method.
    """

    kind: ClassVar[str] = "adapt"

    name: str
    method: Literal["LoRA", "full fine-tuning", "linear probe", "prompts"] = "LoRA"
    fraction: float = 0.1
    learn_from: LearnFrom = "train"
    n_val: int = 1_000
    template: int = 1
    rank: int = 16
    kernel: Literal["whole", "middle"] = "whole"
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    schedule: Schedule = "constant"
    softmax: Softmax = "masked"
    logits: Logits = "cosine"

    @property
    def jointly(self) -> bool:
        """Whether one model learns from all data sets."""
        return self.method in ("LoRA", "full fine-tuning")

    def check(self, grid: Grid, notebooks: Path | None) -> None:
        """Raise a ValueError for numbers out of range, for several models, and for images learned from and tested."""
        if len(grid.models) != 1:
            raise StudyError(f"{self.name!r} is one adapted model; name the one to adapt, models: [{grid.models[0]}]")
        if self.jointly and grid.dtype == "int8":
            raise StudyError(f"dtype: int8; an image tower in int8 cannot learn by {self.method!r}, take float32")
        for own in fields(self):
            value, read = getattr(self, own.name), (*_ALWAYS, *_READS[self.method])
            if value != own.default and own.name not in read:
                reads = ", ".join(_READS[self.method]) or "no setting of training"
                raise StudyError(f"{own.name}={value!r} means nothing to {self.method!r}, which reads {reads}")
        checks.check_positive("fraction", self.fraction, most=1)
        for number in ("n_val", "template", "rank"):
            checks.check_whole(number, getattr(self, number))
        self._recipe(0)
        for dataset in grid.datasets:
            found = open_split(dataset)
            if not {self.learn_from, "test"} <= set(found.splits):
                raise StudyError(
                    f"{dataset} has no {self.learn_from} split beside its test split, so what is learned from would be "
                    "tested too; divide it into folders train, val and test"
                )
            if self.template > len(found.words.templates):
                raise StudyError(f"template: {self.template}; {dataset} has {len(found.words.templates)} templates")

    def cells(self, number: int, grid: Grid, notebooks: Path | None) -> list[Cell]:
        """One for each seed, and where it does not learn jointly for each data set."""
        own = {**grid.shared, **self.settings()}
        sets = [grid.datasets] if self.jointly else [(dataset,) for dataset in grid.datasets]
        return [
            AdaptCell(number, self, model, "" if self.jointly else learned[0], seed, {**own, "learned": list(learned)})
            for model in grid.models
            for learned in sets
            for seed in grid.seeds
        ]

    def _recipe(self, seed: int) -> Recipe:
        given = {name: getattr(self, name) for name in _TRAINING}
        return Recipe(**{name: value for name, value in given.items() if value is not None}, seed=seed)


class AdaptCell(Cell):
    """The adaptation of one model with one seed."""

    @property
    def variant(self) -> str:
        """The name of the adapted model."""
        return self.step.name

    def estimate(self, prices: Prices) -> Estimate:
        """Price of all epochs, validation included."""
        learned, step = self.parameters["learned"], self.step
        sizes = [prices.size(id, step.learn_from) for id in learned]
        images = draws = None
        if None not in sizes:
            counts = zip(map(prices.classes, learned), sizes, strict=True)
            images = sum(max(n_classes, round(step.fraction * size)) for n_classes, size in counts)
            epochs = step.epochs if step.jointly else 1
            draws = epochs * (PASSES * images + step.n_val * len(sizes) * step.jointly)
        parameters = find_model(self.model).parameters or 0
        size = {"full fine-tuning": 4 * parameters, "LoRA": parameters // 10}.get(step.method, 0)
        return Estimate(images, draws, seconds_for(draws, prices.rate(self.model)), CELL_BYTES + size)

    def run(self, study: Path, *, notebooks: Path | None = None, workers: Workers = ALONE) -> None:
        """Adapt, and keep what was learned in the folder."""
        step, seed, folder = self.step, self.seed or 0, self.folder(study)
        run, model = self.begin(study, f"{step.name}: {step.method} of {self.model}"), self.encoder(study)
        words = {"fraction": step.fraction, "n_val": step.n_val, "n_test": 1, "learn_from": step.learn_from}
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # the one test image is not looked at
            splits = [fraction_splits(id, seed=seed, **words) for id in self.parameters["learned"]]
        train = [self._worded(split) for split in splits]
        val = [split.val for split in splits]
        notes: list[str] = []
        if step.jointly:
            numbers, table = self._train_tower(model, train, val, folder / _ADAPTER)
        else:
            ((one,), (shown,)) = train, val
            self._learn_texts(model, one, shown, folder)
            learned = {step.name: Candidate(model, self.texts(model, shown, study))}
            ((_, found),) = corruption_probabilities(learned, shown, corruptions=())
            answers = found.argmax(1)
            table = shown.image_table(answers, found.max(1))
            numbers = [_validated(shown, answers)]
        if step.jointly and not table.loc[table["epoch"] > 0, "val_mean"].gt(table["val_mean"].iloc[0]).any():
            notes = [f"No epoch was better on the validation images than {self.model} as it was: nothing was changed."]
        notes += [f"{data.id}: learned from {len(data)} images of the split {data.split}" for data in train]
        notes += [note for split in splits for note in split.notes]
        shown = described(model, val[0], notes)
        run.save_card(metrics=numbers, tables={f"{run.number}_validation": table}, prompts={}, **shown)

    def _worded(self, split: FractionSplits) -> ImageDataset:
        data = split.train
        return replace(data, templates=data.templates[self.step.template - 1 :])

    def _train_tower(
        self, model: DualEncoder, train: list[ImageDataset], val: list[ImageDataset], out: Path
    ) -> tuple[list[Metric], pd.DataFrame]:
        recipe = vars(self.step._recipe(self.seed or 0))
        if self.step.method == "LoRA":
            layers = {"rank": self.step.rank, "kernel": self.step.kernel}
            adapted = adapt_lora(model, train, validation=val, out=out, **layers, **recipe)
        else:
            adapted = fine_tune(model, train, validation=val, out=out, **recipe)
        self.keep_times(out.parents[2], training=adapted.seconds)
        history = adapted.history.drop(columns="seconds")
        best = history[history["epoch"] == adapted.best_epoch]
        about = {"settings": {"split": "val"}}
        numbers = [
            Metric("val_balanced_accuracy", share, int(n), of=f"{id}, epoch {adapted.best_epoch}", dataset=id, **about)
            for id, share, n in best[["dataset", "val_balanced_accuracy", "n"]].itertuples(index=False)
        ]
        return [*numbers, Metric("trained_parameters", float(adapted.trainable), int(best["n"].sum()))], history

    def _learn_texts(self, model: DualEncoder, train: ImageDataset, val: ImageDataset, folder: Path) -> None:
        """What takes the place of the class features: a linear probe, or prompts."""
        step = self.step
        if step.method == "linear probe" and not (folder / _PROBE).is_file():
            probe = linear_probe(model, train, validation=val)
            header = {**probe.provenance, "classes": list(train.classes)}
            write_tensors(folder / _PROBE, {"weights": probe.weights}, key="probe", header=header)
        if step.method == "prompts" and not (folder / _PROMPTS).is_file():
            most = int(pd.Series(train.labels).value_counts().max())
            words = {"epochs": step.epochs, "batch_size": step.batch_size}
            words |= {} if step.learning_rate is None else {"learning_rate": step.learning_rate}
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # classes of fewer images give all
                prompts = learn_prompts(model, train, sigmas=(0.0,), shots=most, seed=self.seed or 0, **words)
            prompts.save(folder / _PROMPTS)

    def adapted(self, model: DualEncoder, study: Path) -> DualEncoder:
        """The model with the image tower that was learned, under the name of the step."""
        folder = self.folder(study) / _ADAPTER
        if self.step.jointly:
            model = load_adapter(model, folder) if self.step.method == "LoRA" else load_tuned(model, folder)
            model.id = self.step.name
        return model

    def texts(self, model: DualEncoder, data: ImageDataset, study: Path) -> Tensor | None:
        """What takes the place of the class features [K, d]; None where the texts are those of the data set."""
        folder = self.folder(study)
        if self.step.method == "prompts":
            return PromptSet.load(folder / _PROMPTS).class_features(model, data.classes)
        if self.step.method == "linear probe":
            tensors, header = read_tensors(
                folder / _PROBE, key="probe", kind="a linear probe", advice="Delete its cell."
            )
            if header["classes"] != list(data.classes):
                raise ValueError(f"{folder} holds a probe of the classes {header['classes']}, not {list(data.classes)}")
            return tensors["weights"].to(model.device)
        return None


def _validated(data: ImageDataset, answers: NDArray[np.int64]) -> Metric:
    share = metrics.balanced_accuracy(data.labels, answers)
    return Metric("val_balanced_accuracy", share, len(data), of=data.id, settings={"split": "val"})
