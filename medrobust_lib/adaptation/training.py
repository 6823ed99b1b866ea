"""Joint training of parameters of a model on several data sets: the recipe, the run, and the state it goes on from."""

import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medrobust_lib import metrics
from medrobust_lib.adaptation.training_images import PAPER_AUGMENTATION, Augmentation, TrainingImages, cache_budget
from medrobust_lib.checks import check_choice, check_positive, check_whole
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.experiments import open_store, progress
from medrobust_lib.files import parsed, read_tensors, write_tensors
from medrobust_lib.models.dual_encoder import BrokenFeaturesError, DualEncoder
from medrobust_lib.smoothing.noise import Batches
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE

_FILE = "state.safetensors"
_HEADER = "training"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Adam,
    best: Mapping[str, Tensor],
    record: dict[str, Any],
) -> None:
    """Write parameters, moments, the best parameters so far (or other tensors) and a JSON record, atomically.

    Parameters
    ----------
    folder : Path
        Exists.
    parameters : mapping of str to Parameter
    optimiser : torch.optim.Adam
        Of these parameters, after at least one step.
    best : mapping of str to Tensor
        Parameters of the best epoch, or what else is kept beside the parameters.
    record : dict
        JSON values; kept in the file's header, so that it can never belong to other tensors.
    """
    tensors = {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter
        tensors |= {f"{moment}.{name}": optimiser.state[parameter][moment] for moment in _MOMENTS}
    steps = {name: int(optimiser.state[parameter]["step"]) for name, parameter in parameters.items()}
    write_tensors(folder / _FILE, tensors, key=_HEADER, header={**record, "steps": steps})


def load_state(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Adam,
    *,
    beside: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Put a state into parameters and optimiser; returns the best parameters and the record, or None without a state.

    Where `save_state` kept other tensors than the best parameters, ``beside`` has their names and shapes.

    Raises
    ------
    ValueError
        The file is damaged or holds other tensors.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    anew = f"Delete {folder} and train anew."
    tensors, record = read_tensors(path, key=_HEADER, kind="a readable state", advice=anew)
    beside = parameters if beside is None else beside
    wanted = {f"best.{name}": tensor.shape for name, tensor in beside.items()}
    wanted |= {f"{part}.{name}": value.shape for name, value in parameters.items() for part in ("parameter", *_MOMENTS)}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise ValueError(f"{path} is no state of this training; delete {folder} and train anew")
    with parsed(f"{path} does not say how far the training was", anew):
        steps = {name: torch.tensor(float(record["steps"][name])) for name in parameters}
    del record["steps"]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
            optimiser.state[parameter] = {"step": steps[name], **moments}
    return {name: tensors[f"best.{name}"] for name in beside}, record


Schedule = Literal["constant", "one-cycle"]
Softmax = Literal["masked", "global"]
Logits = Literal["cosine", "raw"]

_WARM_UP = 0.1  # share of the steps in which one-cycle raises the rate, from 1/25 of it


@dataclass(frozen=True)
class Recipe:
    """How a tower is trained; epochs, rate, decay, schedule and augmentation are those of RobustMedCLIP's code.

    Its other settings are in `adapting.AS_PUBLISHED`.

    Attributes
    ----------
    epochs : int
        0 or more.
    batch_size : int
        At most so many images a step; the steps of an epoch are of equal size, give or take one image. Where memory
        runs out, gradients are accumulated over parts.
    learning_rate, weight_decay : float
        AdamW.
    schedule : {"constant", "one-cycle"}
        A constant rate (the paper), or one that rises to `learning_rate` over the first tenth of the steps and falls
        to almost 0, both along a cosine (Smith and Topin 2019, arXiv:1708.07120).
    softmax : {"masked", "global"}
        Each image among the classes of its own data set, or among all classes of all sets (the authors' code). With
        "global" the templates should tell the sets apart: two classes with one text cannot be.
    logits : {"cosine", "raw"}
        The model's ``logit_scale`` times the cosine (the paper, with the model's own temperature), or the product of
        the image feature as the tower gives it with the text feature of norm 1, without a scale (the authors' code).
        The length of an image feature then is a temperature that training may change; which class has the largest
        logit is the same in both.
    augmentation : Augmentation
    seed : int
        Of order and augmentation, keyed by the epoch.

    Raises
    ------
    ValueError
        A number out of range or an unknown schedule, softmax or kind of logits.
    """

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    schedule: Schedule = "constant"
    softmax: Softmax = "masked"
    logits: Logits = "cosine"
    augmentation: Augmentation = PAPER_AUGMENTATION
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least=least)
        check_positive("learning_rate", self.learning_rate)
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}: must be >= 0")
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("softmax", self.softmax, get_args(Softmax))
        check_choice("logits", self.logits, get_args(Logits))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, 0 to ``steps - 1``."""
        if self.schedule == "constant":
            return self.learning_rate
        peak, last = _WARM_UP * steps - 1, steps - 1
        if step <= peak:
            start, end, way = self.learning_rate / 25, self.learning_rate, step / peak if peak > 0 else 1.0
        else:
            start, end, way = self.learning_rate, self.learning_rate / 250_000, (step - peak) / (last - peak)
        return end + (start - end) / 2 * (1 + math.cos(math.pi * way))

    def as_json(self) -> dict[str, Any]:
        """JSON values of all fields; cosine logits are not named."""
        values = json.loads(json.dumps(asdict(self)))
        if self.logits == "cosine":  # records from before there was a choice are still those of the same training
            del values["logits"]
        if self.augmentation.perturbation == PIXEL_NOISE.name:  # likewise
            del values["augmentation"]["perturbation"]
        return values


def templates_of(data: ImageDataset, templates: Sequence[str] | None) -> list[str]:
    """Prompt templates to use with a data set: those given, or its first."""
    return list(data.templates[:1] if templates is None else templates)


def check_learnable(data: ImageDataset) -> None:
    """Refuse to learn classes that have no image."""
    for noun, count in data.class_counts().items():
        if not count:
            raise ValueError(f"{data.id}: no image of class {noun!r} to learn from; train on images of all classes")


def check_apart(data: ImageDataset, shown: ImageDataset) -> None:
    """Refuse validation images of other classes, or such as are trained on.

    Raises
    ------
    ValueError
        Naming the classes, or the first image.
    """
    if data.classes != shown.classes:
        raise ValueError(
            f"{data.id}: the classes of training, {', '.join(data.classes)}, are not those of validation, "
            f"{', '.join(shown.classes)}; load both with the same wording"
        )
    same = (data.id, data.split) == (shown.id, shown.split)
    shared = np.intersect1d(data.indices, shown.indices) if same else []
    if len(shared):
        raise ValueError(
            f"{data.id}: {len(shared)} images of split {data.split!r} are both in training and in validation "
            f"(the first has index {shared[0]}); choose by images that are not trained on"
        )


def summed_loss(logits: Tensor, targets: Tensor, allowed: Tensor) -> Tensor:
    """Cross-entropy summed over images.

    Parameters
    ----------
    logits : float [b, K]
        Over all classes of all data sets.
    targets : int64 [b]
    allowed : bool [b, K]
        Classes that an image is judged among.

    Returns
    -------
    float []
    """
    return cross_entropy(logits.masked_fill(~allowed, -math.inf), targets, reduction="sum")


@dataclass(eq=False)
class Training:
    """Training of some parameters of a model, in place and on several data sets; those of the best epoch stay in it.

    Minimises the cross-entropy of the recipe's logits of image features and class features, which are computed once,
    before training. Batch normalisation keeps its statistics and dropout stays off.

    Attributes
    ----------
    model : DualEncoder
        Is brought to evaluation mode.
    parameters : mapping of str to Parameter
        What is trained, by names that are the same in the next process; they require a gradient.
    train, validation : sequence of ImageDataset
        Every set once. The best epoch is chosen on `validation`, which is never trained on.
    templates : sequence of str or None
        Of the class features of all sets; None stands for the first of each set.
    recipe : Recipe
    description : str
        For the progress bar.
    best_epoch : int
        Epoch with the highest mean balanced accuracy on the validation sets so far, the earliest of equals.
    """

    model: DualEncoder
    parameters: Mapping[str, nn.Parameter]
    train: Sequence[ImageDataset]
    validation: Sequence[ImageDataset]
    templates: Sequence[str] | None
    recipe: Recipe
    description: str = "train"
    best_epoch: int = field(default=0, init=False)

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        self.model.eval()
        with torch.no_grad():
            texts = [self._class_features(data) for data in self.train]
            self._judged = [self._class_features(data) for data in self.validation]
        self._texts = torch.cat(texts)
        counts = [len(features) for features in texts]
        self._first_class = np.cumsum([0, *counts])[:-1]
        masked = torch.block_diag(*(torch.ones(1, count) for count in counts)).bool()
        self._allowed = (masked if self.recipe.softmax == "masked" else torch.ones_like(masked)).to(self.model.device)
        budget = cache_budget()
        self._images = TrainingImages(self.model, self.train, budget=budget)
        self._shown = TrainingImages(self.model, self.validation, budget=budget - self._images.bytes)
        self._batches = Batches(self.recipe.batch_size)
        self._optimiser = torch.optim.AdamW(self.parameters.values(), weight_decay=self.recipe.weight_decay)
        self._rows: list[dict[str, Any]] = []
        self._best: dict[str, Tensor] = {}

    def _class_features(self, data: ImageDataset) -> Tensor:
        return self.model.class_features(data.classes, templates_of(data, self.templates))

    @property
    def history(self) -> pd.DataFrame:
        """One row for each epoch (0 is before training) and validation set.

        Columns: epoch, loss (mean over the epoch; NaN in epoch 0), seconds (of the epoch, validation included),
        dataset, n, val_accuracy, val_balanced_accuracy, val_mean (mean balanced accuracy over the sets).
        """
        return pd.DataFrame(self._rows).astype({"loss": float})

    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(self, folder: Path | None = None, *, identity: Mapping[str, Any] | None = None) -> None:
        """Train what is left to train.

        Parameters
        ----------
        folder : Path, optional
            Where the state is kept after each epoch. An interrupted run goes on from the last of them, and gives the
            same parameters as an uninterrupted one on the same kind of device.
        identity : mapping, optional
            JSON values: everything that the result depends on, beside the recipe. A folder of another run is refused.

        Raises
        ------
        ValueError
            Training diverges, or `folder` belongs to other parameters (the differences are named).
        RuntimeError
            Not even one image fits into memory, `folder` is in use, or this has run before without it.
        """
        identity = {**(identity or {}), "recipe": self.recipe.as_json()}
        with nullcontext() if folder is None else open_store(folder, parameters=identity):
            self._train(folder)

    def _train(self, folder: Path | None) -> None:
        recipe = self.recipe
        resumed = None if folder is None else load_state(folder, self.parameters, self._optimiser)
        if resumed is None:
            if self._rows:
                raise RuntimeError("this training has run already, and its model is trained; make another Training")
            self._judge(0, None, time.monotonic())
        else:
            self._best, record = resumed
            self._rows, self.best_epoch = record["rows"], record["best_epoch"]
        done = self._rows[-1]["epoch"]
        per_epoch = math.ceil(len(self._images) / recipe.batch_size)
        if done < recipe.epochs:
            bar = progress(
                range(done * per_epoch, recipe.epochs * per_epoch), total=recipe.epochs * per_epoch,
                done=done * per_epoch, unit="steps", description=self.description, resumes=folder is not None,
            )  # fmt: skip
            for step in bar:
                epoch, place = divmod(step, per_epoch)
                if place == 0:
                    started, losses = time.monotonic(), []
                    # Keyed by the epoch: a resumed run draws what an uninterrupted one does.
                    rng = np.random.default_rng([recipe.seed, epoch])
                    generator = torch.Generator(self.model.device).manual_seed(int(rng.integers(2**63)))
                    batches = np.array_split(rng.permutation(len(self._images)), per_epoch)
                pixels = self._images.augmented(batches[place], recipe.augmentation, rng=rng, generator=generator)
                losses.append(self._step(pixels, batches[place], recipe.rate(step, recipe.epochs * per_epoch), epoch))
                if place == per_epoch - 1:
                    self._judge(epoch + 1, float(np.mean(losses)), started)
                    if folder is not None:
                        record = {"rows": self._rows, "best_epoch": self.best_epoch}
                        save_state(folder, self.parameters, self._optimiser, self._best, record)
        self._optimiser.zero_grad()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._best[name])

    def _step(self, pixels: Tensor, rows: NDArray[np.int64], rate: float, epoch: int) -> float:
        """One step of the optimiser; returns the mean loss of its images."""
        sets = self._images.set_of[rows]
        targets = torch.from_numpy(self._images.label_of[rows] + self._first_class[sets]).to(self.model.device)
        allowed = self._allowed[torch.from_numpy(sets)]

        def accumulate(size: int) -> float:
            self._optimiser.zero_grad()
            total = 0.0
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                loss = summed_loss(self._logits(pixels[part]), targets[part], allowed[part]) / len(rows)
                loss.backward()
                total += loss.item()
            return total

        loss = self._batches.until_it_fits(accumulate)
        if not math.isfinite(loss):
            raise self._diverged(epoch + 1)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        return loss

    def _logits(self, pixels: Tensor) -> Tensor:
        """Of all classes of all sets, float32 [b, K]."""
        if self.recipe.logits == "raw":
            return self.model.encode_image(pixels, unit=False) @ self._texts.T
        return self.model.logit_scale * self.model.encode_image(pixels) @ self._texts.T

    @torch.no_grad()
    def _judge(self, epoch: int, loss: float | None, started: float) -> None:
        """Add the rows of an epoch, and keep its parameters if it is the best so far."""
        scores = []
        for number, (data, texts) in enumerate(zip(self.validation, self._judged, strict=True)):
            rows = np.flatnonzero(self._shown.set_of == number)
            answers = self._batches.until_it_fits(functools.partial(self._answers, rows, texts, epoch))
            scores.append({
                "dataset": data.id, "n": len(data), "val_accuracy": metrics.accuracy(data.labels, answers),
                "val_balanced_accuracy": metrics.balanced_accuracy(data.labels, answers),
            })  # fmt: skip
        mean = float(np.mean([score["val_balanced_accuracy"] for score in scores]))
        if not self._rows or mean > max(row["val_mean"] for row in self._rows):
            self.best_epoch = epoch
            self._best = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        seconds = round(time.monotonic() - started, 3)
        of_epoch = {"epoch": epoch, "loss": loss, "seconds": seconds}
        self._rows += [{**of_epoch, **score, "val_mean": mean} for score in scores]

    def _answers(self, rows: NDArray[np.int64], texts: Tensor, epoch: int, size: int) -> NDArray[np.int64]:
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        try:
            features = torch.cat([self.model.encode_image(self._shown.pixels(part)) for part in parts])
        except BrokenFeaturesError as error:
            if epoch == 0:  # nothing was trained yet: the model is to blame
                raise
            raise self._diverged(epoch) from error
        return (features @ texts.T).argmax(1).cpu().numpy()

    def _diverged(self, epoch: int) -> ValueError:
        return ValueError(
            f"training diverged in epoch {epoch} of {self.recipe.epochs}: "
            f"lower learning_rate={self.recipe.learning_rate:g}"
        )
