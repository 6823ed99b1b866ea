"""Adaptation to degraded images: low-rank adapters of the image tower or all its weights, kept in a folder.

RobustMedCLIP (Imam et al. 2025) trains low-rank adapters of queries, keys and values jointly on several modalities.
This is the method; `AS_PUBLISHED` holds the settings of the authors' code, from which the defaults differ in softmax,
logits, batch size and seed, and says what no setting brings back.

Some adapters of the demo models come with the package: `find_demo_adapter`.
"""

import functools
import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medrobust_lib.adaptation.training import Recipe, Training, check_apart, check_learnable, templates_of
from medrobust_lib.adaptation.training_images import PAPER_AUGMENTATION, Augmentation
from medrobust_lib.checks import check_keywords
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.experiments import parameter_differences, write_text_atomically
from medrobust_lib.files import parsed, read_json_object, save_tensors
from medrobust_lib.models.dual_encoder import DualEncoder, find_image_tower
from medrobust_lib.models.weights import DEMO_FOLDER, explained_errors
from medrobust_lib.smoothing.certify import check_not_training

_LARGEST_EXCESS = 2.0  # of multiplications, which the two saved passes over memory make up for (measured on a CPU)


@contextmanager
def summed_convolutions(model: nn.Module) -> Iterator[None]:
    """While it lasts, let adapted convolutions compute with W + B A where that is faster; same values up to rounding.

    peft runs W, A and B one after the other. With the sum, the gradient of the whole weight is needed, which costs
    more multiplications than those of A and B where the convolution is large: such ones stay with peft.

    Parameters
    ----------
    model : nn.Module
        With peft's adapters, unmerged; afterwards as before.
    """
    from peft.tuners.lora import LoraLayer  # peft takes seconds to import

    changed = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _is_faster(layer)]
    for layer in changed:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _is_faster(layer: nn.Module) -> bool:
    convolution = layer.get_base_layer()
    if not isinstance(convolution, nn.Conv2d):
        return False
    (adapter,) = layer.active_adapters
    of_adapters = sum(side[adapter].weight.numel() for side in (layer.lora_A, layer.lora_B))
    # A and B each take a forward pass and two backward passes, the whole weight one backward pass.
    return convolution.weight.numel() <= _LARGEST_EXCESS * 3 * of_adapters


def _forward(layer: nn.Module, pixels: Tensor) -> Tensor:
    convolution = layer.get_base_layer()
    (adapter,) = layer.active_adapters
    weight = convolution.weight + layer.get_delta_weight(adapter)
    return torch.func.functional_call(convolution, {"weight": weight}, (pixels,))


_PROVENANCE, _TOWER = "provenance.json", "image_tower.safetensors"


@dataclass(frozen=True, eq=False)
class Adapted:
    """An adapted model and how it came about.

    Attributes
    ----------
    model : DualEncoder
        Frozen, in evaluation mode; low-rank adapters are not merged. Its ``provenance`` holds the parameters of the
        run, among them the images and templates of every data set, and the validation of every epoch.
    history : DataFrame
        One row for each epoch (0 is before training) and validation set: epoch, loss (mean over the epoch; NaN in
        epoch 0), seconds (of the epoch), dataset, n, val_accuracy, val_balanced_accuracy, val_mean (mean balanced
        accuracy over the sets).
    best_epoch : int
        Epoch whose parameters the model has: the highest `val_mean`, the earliest of equals; 0 is the model as given.
    trainable : int
        Number of trained parameters.
    seconds : float
        Of all epochs, those before an interruption included.
    """

    model: DualEncoder
    history: pd.DataFrame
    best_epoch: int
    trainable: int
    seconds: float


def adapt_lora(
    model: DualEncoder,
    train: Sequence[ImageDataset],
    *,
    validation: Sequence[ImageDataset],
    rank: int = 16,
    qkv: Literal["separate", "fused"] = "separate",
    kernel: Literal["whole", "middle"] = "whole",
    templates: Sequence[str] | None = None,
    out: Path | str | None = None,
    **recipe: Any,
) -> Adapted:
    """Train low-rank adapters of the image tower jointly on several data sets.

    Parameters
    ----------
    model : DualEncoder
        In evaluation mode; not changed.
    train : sequence of ImageDataset
        Labelled images of one or more data sets, each with at least one image of every class.
    validation : sequence of ImageDataset
        Images to choose the best epoch by; none of them may be trained on, and none should be tested on.
    rank : int
        Of the adapters.
    qkv : {"separate", "fused"}
        Where queries, keys and values are one matrix: three adapters (RobustMedCLIP), or one for all.
    kernel : {"whole", "middle"}
        Of the adapters of convolutions: that of the layer, or its middle alone (RobustMedCLIP).
    templates : sequence of str, optional
        Prompts of the class features, for all sets; default: the first of each set. Test with the same.
    out : path, optional
        Folder of the adapter, for `load_model` too. With the same parameters a finished one is loaded instead of
        trained; while it trains, ``<out>.training`` beside it keeps the last epoch, from which a later call goes on.
    **recipe
        Fields of `Recipe`: ``epochs`` (20; 0 gives adapters that change nothing), ``batch_size`` (32),
        ``learning_rate`` (1e-4 is for a large pre-trained transformer; the demo models take `DEMO_RECIPE`),
        ``weight_decay`` (1e-4), ``schedule`` ("constant"), ``softmax`` ("masked"), ``logits`` ("cosine"),
        ``augmentation`` and ``seed`` (0, also of the adapters' first values). Equal seeds give equal adapters on one
        CPU. ``**AS_PUBLISHED`` gives all settings of the authors' code.

    Returns
    -------
    Adapted

    Warns
    -----
    UserWarning
        No epoch is better on the validation images than the model as it was.

    Raises
    ------
    ValueError
        A parameter out of range; a model in training mode or without a place for adapters; no data; a class without
        training images; an image both in training and in validation; training that diverges; `out` of other
        parameters (the differences are named) or with other files.
    RuntimeError
        `out` is being trained by another process.

    References
    ----------
    Hu et al. 2022 (LoRA), arXiv:2106.09685; Imam et al. 2025 (RobustMedCLIP), arXiv:2505.15425.
    """
    from medrobust_lib.models import adapters  # peft takes seconds to import

    check_keywords(adapt_lora, recipe, Recipe.__dataclass_fields__)
    method = {"method": "low-rank adaptation", "rank": rank, "qkv": qkv, "kernel": kernel}
    job = _Job(model, train, validation, templates, Recipe(**recipe), out, method)
    if not job.is_done:
        adapted = adapters.attach_adapters(model, rank=rank, qkv=qkv, kernel=kernel, seed=job.recipe.seed)
        with summed_convolutions(adapted):
            record = job.train_in_place(adapted, adapters.adapter_parameters(adapted))
        if job.out is None:
            return job.outcome(_finished(adapted, model, record, f"adapters of rank {rank}"), record)
        adapters.save_adapter(adapted, job.out, provenance=record)
    record = job.stored()
    return job.outcome(adapters.load_adapter(model, job.out, merged=False), record)


def fine_tune(
    model: DualEncoder,
    train: Sequence[ImageDataset],
    *,
    validation: Sequence[ImageDataset],
    templates: Sequence[str] | None = None,
    out: Path | str | None = None,
    **recipe: Any,
) -> Adapted:
    """Train all parameters of the image tower, the statistics of batch normalisation apart.

    Everything else is as in `adapt_lora`, to be compared with it.

    Parameters
    ----------
    model, train, validation, templates
        As in `adapt_lora`.
    out : path, optional
        Folder of the trained tower, which a later call with the same parameters loads; otherwise as in `adapt_lora`.
    **recipe
        As in `adapt_lora`. Large pre-trained transformers usually take a learning rate of about 1e-5.

    Returns
    -------
    Adapted
        The model computes in the type of the given one, although it was trained in float32.

    Warns
    -----
    UserWarning
        No epoch is better on the validation images than the model as it was.

    Raises
    ------
    ValueError, RuntimeError
        As in `adapt_lora`.
    """
    from medrobust_lib.models import adapters  # peft takes seconds to import

    check_keywords(fine_tune, recipe, Recipe.__dataclass_fields__)
    job = _Job(model, train, validation, templates, Recipe(**recipe), out, {"method": "fine-tuning of the image tower"})
    with torch.inference_mode(False), torch.enable_grad():
        tuned = model.trainable_copy()
        parameters = find_image_tower(tuned).parameters
    if not job.is_done:
        record = job.train_in_place(tuned, parameters)
        if job.out is None:
            return job.outcome(_finished(tuned, model, record, "fine-tuning"), record)
        with adapters.whole_folder(job.out) as partial:
            save_tensors(partial / _TOWER, parameters)
            write_text_atomically(partial / _PROVENANCE, json.dumps(record, indent=1) + "\n")
    record = job.stored()
    return job.outcome(load_tuned(model, job.out), record)


def load_tuned(model: DualEncoder, folder: Path | str) -> DualEncoder:
    """The model with the image tower that `fine_tune` has left in a folder.

    Raises
    ------
    FileNotFoundError
        Nothing of `fine_tune` is there.
    ValueError
        A damaged file, or the tower of another model.
    """
    folder = Path(folder)
    if not (folder / _TOWER).is_file():
        raise FileNotFoundError(f"no fine-tuned image tower in {folder}; fine_tune(..., out=...) writes one")
    record = read_json_object(folder / _PROVENANCE, "the record of a fine-tuning", f"Delete {folder} and train anew.")
    if record.get("base") != json.loads(json.dumps(model.identity())):
        raise ValueError(f"{folder} holds the tower of another model than {model.id}; give the one that was tuned")
    tuned = model.trainable_copy()
    with explained_errors(str(folder / _TOWER)):
        tuned.load_state_dict(tuned.state_dict() | load_file(folder / _TOWER))
    return _finished(tuned, model, record, folder.name)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is trained on what, and where it is kept."""

    model: DualEncoder
    train: Sequence[ImageDataset]
    validation: Sequence[ImageDataset]
    templates: Sequence[str] | None
    recipe: Recipe
    out: Path | None
    method: Mapping[str, Any]
    identity: dict[str, Any] = field(init=False)  # all that the result depends on, as JSON values

    def __post_init__(self) -> None:
        check_not_training(self.model)
        for name, sets in (("train", self.train), ("validation", self.validation)):
            if isinstance(sets, ImageDataset):
                raise TypeError(f"{name} is one data set; give a list, [{sets.id!r}'s data set]")
            if not sets:
                raise ValueError(f"{name} holds no data set; give at least one")
            twice = [id for id, count in Counter(data.id for data in sets).items() if count > 1]
            if twice:
                raise ValueError(f"{name} holds {twice[0]!r} twice; give every data set once")
        shown = {data.id: data for data in self.validation}
        for data in self.train:
            check_learnable(data)
            if data.id in shown:
                check_apart(data, shown[data.id])
        identity = {
            **self.method,
            "base": self.model.identity(),
            "train": {data.id: _described(data, self.templates) for data in self.train},
            "validation": {id: _described(data, self.templates) for id, data in shown.items()},
            "recipe": self.recipe.as_json(),
        }
        object.__setattr__(self, "identity", identity)
        object.__setattr__(self, "out", None if self.out is None else Path(self.out).expanduser())

    @property
    def is_done(self) -> bool:
        """Whether there is something in the folder already."""
        return self.out is not None and (self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())))

    def train_in_place(self, model: DualEncoder, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """Train parameters of a model; returns its identity and what came out, as JSON values."""
        base, recipe = self.identity["base"]["id"], self.recipe
        described = f"{self.identity['method']} of {base}"
        training = Training(model, parameters, self.train, self.validation, self.templates, recipe, described)
        training.run(self._state, identity=self.identity)
        if recipe.epochs and training.best_epoch == 0:
            warnings.warn(
                f"no epoch of {recipe.epochs} is better on the validation images than {base} as it was, so nothing was "
                f"changed: try another learning_rate than {recipe.learning_rate:g}, more epochs, or more validation "
                "images",
                UserWarning,
                stacklevel=3,
            )
        history = training.history
        return {
            **self.identity,
            "history": history.astype(object).where(history.notna(), None).to_dict("records"),
            "best_epoch": training.best_epoch,
            "trainable": sum(parameter.numel() for parameter in parameters.values()),
            "seconds": round(float(history.groupby("epoch")["seconds"].first().sum()), 1),
            "device": model.device.type,
            "threads": torch.get_num_threads(),
        }

    def stored(self) -> dict[str, Any]:
        """Record in the finished folder, if it is that of this job; what its training kept is removed."""
        path = self.out / _PROVENANCE
        if not path.is_file():
            raise ValueError(f"{self.out} holds something else than a finished adaptation; give another folder")
        with parsed(f"{path} is damaged", f"Delete {self.out} and train anew."):
            record = dict(json.loads(path.read_text(encoding="utf-8")))
        known = {"kernel": "whole", **record}  # records from before there was a choice do not name it
        stored = {name: known[name] for name in self.identity if name in known}
        differences = "\n  ".join(parameter_differences(stored, self.identity, holder="the folder"))
        if differences:
            raise ValueError(f"{self.out} was trained with other parameters; give another folder:\n  {differences}")
        shutil.rmtree(self._state, ignore_errors=True)
        return record

    def outcome(self, model: DualEncoder, record: Mapping[str, Any]) -> Adapted:
        """The model with its record."""
        history = pd.DataFrame(record["history"]).astype({"loss": float})
        return Adapted(model, history, record["best_epoch"], record["trainable"], record["seconds"])

    @property
    def _state(self) -> Path | None:
        return None if self.out is None else self.out.with_name(f"{self.out.name}.training")


def _described(data: ImageDataset, templates: Sequence[str] | None) -> dict[str, Any]:
    """What identifies the images, labels and texts of a set."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (data.images, data.labels):
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return {
        "split": data.split, "n": len(data), "fraction": data.provenance.get("fraction"),
        "indices": data.indices.tolist(), "content": digest.hexdigest(), "classes": list(data.classes),
        "templates": templates_of(data, templates), "synthetic": data.synthetic,
    }  # fmt: skip


def _finished(model: DualEncoder, base: DualEncoder, record: dict[str, Any], change: str) -> DualEncoder:
    model.id = f"{base.id} + {change}"
    model.provenance = {**record, "base": {**base.provenance, **record["base"]}}
    return model.eval().requires_grad_(False).to(base.dtype)


DEMO_ADAPTERS = DEMO_FOLDER / "adapters"  # by the id of the model, then by `demo_folder_name`
DEMO_DATASETS = tuple(f"phantom/{name}" for name in ("histology", "blood", "breast", "chest", "fundus", "oct"))
DEMO_RECIPE: Mapping[str, Any] = MappingProxyType({"epochs": 10, "learning_rate": 2e-3, "schedule": "one-cycle"})
DEMO_FINE_TUNING: Mapping[str, Any] = MappingProxyType({**DEMO_RECIPE, "epochs": 5, "learning_rate": 1e-4})
"""For all weights of the image tower; like DEMO_RECIPE it was judged on validation images."""
AS_PUBLISHED: Mapping[str, Any] = MappingProxyType({
    "rank": 16,  # paper and code
    "qkv": "separate",  # paper and code
    "epochs": 20,  # paper and code
    "batch_size": 256,  # code
    "learning_rate": 1e-4,  # paper and code
    "weight_decay": 1e-4,  # code, of AdamW; the paper says Adam
    "schedule": "constant",  # code
    "softmax": "global",  # code; in the paper each image among the classes of its own data set
    "logits": "raw",  # code; the paper has cosines divided by a temperature
    "augmentation": PAPER_AUGMENTATION,  # code
    "seed": 42,  # code
})  # fmt: skip
"""Settings of RobustMedCLIP's code, for `adapt_lora`; where each stands is said beside it.

Two settings belong to the data sets. The fraction is one of the val split, ``fraction_splits(..., learn_from="val")``:
0.1, 0.3, 0.75 or 1 in the code, 1, 3, 7 or 10 % in the paper. And the code trains with the second template of its data
sets, "a medical image of {} belonging to pbc", and tests with the first, which has "a" before the class: give
``dataclasses.replace(data, templates=data.templates[1:])`` to train on, `data` as it is to validate and to test. For a
residual network the code has ``kernel="middle"``.

What still differs, beside the random numbers: the best epoch is chosen on validation images (theirs on the test split
by default); the data sets are those given (theirs are the twelve of ``medimeta/`` and ``medmnist/``); the adapters
of the keys start at zero and are saved (theirs start at random and are left out of the adapter file); the text
features are computed without dropout (theirs with it); the steps of an epoch are of equal size (theirs 256 images
and a rest); batch normalisation keeps its statistics (theirs takes those of the batch and moves the stored ones); and
an error in a batch ends the training (theirs goes on with the next).
"""
DEMO_NOISE = Augmentation(sigmas=(0.1, 0.2))
"""A second kind of adapters: half of the images carry Gaussian noise of one of these levels."""


def demo_folder_name(*, fraction: float, rank: int, seed: int, augmentation: Augmentation = PAPER_AUGMENTATION) -> str:
    """Name of the folder of an adapter."""
    noise = "-noise" if augmentation.sigmas else ""
    return f"rank{rank}-{100 * fraction:g}percent-seed{seed}{noise}"


def find_demo_adapter(
    model: DualEncoder,
    datasets: Sequence[str],
    *,
    fraction: float,
    rank: int,
    seed: int,
    augmentation: Augmentation = PAPER_AUGMENTATION,
) -> Path | None:
    """Folder of the adapter that was trained on exactly this, for `load_model` or `load_adapter`.

    Parameters
    ----------
    model : DualEncoder
        The model to adapt.
    datasets : sequence of str
        Ids, in order.
    fraction : float
        Of each train split, in (0, 1].
    rank : int
    seed : int
        Of the draw of images and of the training.
    augmentation : Augmentation

    Returns
    -------
    Path or None
        None where no such adapter comes with the package for a model of this id, or the model has other weights.
    """
    from medrobust_lib.models import adapters  # peft takes seconds to import

    name = demo_folder_name(fraction=fraction, rank=rank, seed=seed, augmentation=augmentation)
    folder = DEMO_ADAPTERS / model.id / name
    if tuple(datasets) != DEMO_DATASETS or not folder.is_dir():
        return None
    stored = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))
    same_recipe = stored["recipe"] == Recipe(**DEMO_RECIPE, augmentation=augmentation, seed=seed).as_json()
    return folder if same_recipe and stored["adapter"]["base"]["weights"] == adapters.weights_identity(model) else None
