"""Faster training of low-rank adapters on small convolutions: one pass with the summed weight instead of three."""

import copy
import functools
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from medrobust_lib.adaptation.training import Recipe, Schedule, Softmax, templates_of, train_jointly
from medrobust_lib.adaptation.training_images import PAPER_AUGMENTATION, Augmentation
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.experiments import parameter_differences, write_text_atomically
from medrobust_lib.files import save_tensors
from medrobust_lib.models.dual_encoder import DualEncoder, find_image_tower
from medrobust_lib.models.weights import explained_errors, fingerprint
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
    changed = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _is_faster(layer)]
    for layer in changed:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _is_faster(layer: LoraLayer) -> bool:
    convolution = layer.get_base_layer()
    if not isinstance(convolution, nn.Conv2d):
        return False
    (adapter,) = layer.active_adapters
    of_adapters = sum(side[adapter].weight.numel() for side in (layer.lora_A, layer.lora_B))
    # A and B each take a forward pass and two backward passes, the whole weight one backward pass.
    return convolution.weight.numel() <= _LARGEST_EXCESS * 3 * of_adapters


def _forward(layer: LoraLayer, pixels: Tensor) -> Tensor:
    convolution = layer.get_base_layer()
    (adapter,) = layer.active_adapters
    weight = convolution.weight + layer.get_delta_weight(adapter)
    return torch.func.functional_call(convolution, {"weight": weight}, (pixels,))


_LOW_RANK, _FINE_TUNING = "low-rank adaptation", "fine-tuning of the image tower"
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
    templates: Sequence[str] | None = None,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-4,
    schedule: Schedule = "constant",
    softmax: Softmax = "masked",
    augmentation: Augmentation = PAPER_AUGMENTATION,
    seed: int = 0,
    out: Path | str | None = None,
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
    templates : sequence of str, optional
        Prompts of the class features, for all sets; default: the first of each set. Test with the same.
    epochs : int
        0 gives adapters that change nothing.
    batch_size : int
        At most so many images a step; where memory runs out, their gradients are accumulated over parts.
    learning_rate, weight_decay : float
        AdamW. The paper's 1e-4 is for a large pre-trained transformer; demo-clip takes 1e-3 with "one-cycle".
    schedule : {"constant", "one-cycle"}
    softmax : {"masked", "global"}
        Each image among the classes of its own set, or among all classes of all sets. With "global" the templates
        should tell the sets apart: two classes with one text cannot be.
    augmentation : Augmentation
    seed : int
        Of the adapters' first values, the order and the augmentation. Equal seeds give equal adapters on one CPU.
    out : path, optional
        Folder of the adapter, for `load_model` too. With the same parameters a finished one is loaded instead of
        trained; while it trains, ``<out>.training`` beside it keeps the last epoch, from which a later call goes on.

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
    recipe = Recipe(epochs, batch_size, learning_rate, weight_decay, schedule, softmax, augmentation, seed)
    plan = _plan(model, train, validation, templates, recipe, {"method": _LOW_RANK, "rank": rank, "qkv": qkv})
    # peft takes seconds to import.
    from medrobust_lib.models.adapters import adapter_parameters, attach_adapters, load_adapter, save_adapter

    out = None if out is None else Path(out).expanduser()
    if out is None or not _is_taken(out):
        adapted = attach_adapters(model, rank=rank, qkv=qkv, seed=seed)
        parameters = adapter_parameters(adapted)
        with summed_convolutions(adapted):
            record = _train(adapted, parameters, train, validation, templates, recipe, plan, out)
        if out is None:
            return _read(_finished(adapted, model, record, f"adapters of rank {rank}"), record)
        save_adapter(adapted, out, provenance=record)
    record = _stored(out, plan)
    shutil.rmtree(_state_folder(out), ignore_errors=True)
    return _read(load_adapter(model, out, merged=False), record)


def fine_tune(
    model: DualEncoder,
    train: Sequence[ImageDataset],
    *,
    validation: Sequence[ImageDataset],
    templates: Sequence[str] | None = None,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-4,
    schedule: Schedule = "constant",
    softmax: Softmax = "masked",
    augmentation: Augmentation = PAPER_AUGMENTATION,
    seed: int = 0,
    out: Path | str | None = None,
) -> Adapted:
    """Train all parameters of the image tower, the statistics of batch normalisation apart.

    Everything else is as in `adapt_lora`, to be compared with it.

    Parameters
    ----------
    model, train, validation, templates, epochs, batch_size, learning_rate, weight_decay, schedule, softmax, \
augmentation, seed
        As in `adapt_lora`. Large pre-trained transformers usually take a learning rate of about 1e-5.
    out : path, optional
        Folder of the trained tower, which a later call with the same parameters loads; otherwise as in `adapt_lora`.

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
    recipe = Recipe(epochs, batch_size, learning_rate, weight_decay, schedule, softmax, augmentation, seed)
    plan = _plan(model, train, validation, templates, recipe, {"method": _FINE_TUNING})
    out = None if out is None else Path(out).expanduser()
    with torch.inference_mode(False), torch.enable_grad():
        tuned = copy.deepcopy(model).eval().to(torch.promote_types(model.dtype, torch.float32))
        parameters = find_image_tower(tuned).parameters
    if out is None or not _is_taken(out):
        record = _train(tuned, parameters, train, validation, templates, recipe, plan, out)
        if out is None:
            return _read(_finished(tuned, model, record, "fine-tuning"), record)
        _save_tower(parameters, out, record)
    record = _stored(out, plan)
    shutil.rmtree(_state_folder(out), ignore_errors=True)
    with explained_errors(str(out / _TOWER)):
        tuned.load_state_dict(tuned.state_dict() | load_file(out / _TOWER))
    return _read(_finished(tuned, model, record, out.name), record)


def _plan(
    model: DualEncoder,
    train: Sequence[ImageDataset],
    validation: Sequence[ImageDataset],
    templates: Sequence[str] | None,
    recipe: Recipe,
    method: Mapping[str, Any],
) -> dict[str, Any]:
    """Check what goes in, and return all that the result depends on, as JSON values."""
    check_not_training(model)
    for name, sets in (("train", train), ("validation", validation)):
        if isinstance(sets, ImageDataset):
            raise TypeError(f"{name} is one data set; give a list, [{sets.id!r}'s data set]")
        if not sets:
            raise ValueError(f"{name} holds no data set; give at least one")
        ids = [data.id for data in sets]
        for id in ids:
            if ids.count(id) > 1:
                raise ValueError(f"{name} holds {id!r} twice; give every data set once")
    for data in train:
        for noun, count in data.class_counts().items():
            if not count:
                raise ValueError(f"{data.id}: no image of class {noun!r} to learn from; train on images of all classes")
    _check_apart(train, validation)
    return {
        **method,
        "base": {
            "id": model.id,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": fingerprint(list(model.state_dict().values())),
        },
        "train": {data.id: _described(data, templates) for data in train},
        "validation": {data.id: _described(data, templates) for data in validation},
        "recipe": recipe.as_json(),
    }


def _check_apart(train: Sequence[ImageDataset], validation: Sequence[ImageDataset]) -> None:
    learned = {data.id: data for data in train}
    for shown in validation:
        data = learned.get(shown.id)
        if data is None:
            continue
        if data.classes != shown.classes:
            raise ValueError(
                f"{data.id}: the classes of training, {', '.join(data.classes)}, are not those of validation, "
                f"{', '.join(shown.classes)}; load both with the same wording"
            )
        shared = np.intersect1d(data.indices, shown.indices) if data.split == shown.split else []
        if len(shared):
            raise ValueError(
                f"{data.id}: {len(shared)} images of split {data.split!r} are both in training and in validation "
                f"(the first has index {shared[0]}); choose the best epoch on images that are not trained on"
            )


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


def _train(
    model: DualEncoder,
    parameters: Mapping[str, nn.Parameter],
    train: Sequence[ImageDataset],
    validation: Sequence[ImageDataset],
    templates: Sequence[str] | None,
    recipe: Recipe,
    plan: dict[str, Any],
    out: Path | None,
) -> dict[str, Any]:
    """Train in place; returns the plan and what came out, as JSON values."""
    outcome = train_jointly(
        model, parameters, train, validation=validation, templates=templates, recipe=recipe,
        folder=None if out is None else _state_folder(out),
        identity={name: value for name, value in plan.items() if name != "recipe"},
        description=f"{plan['method']} of {plan['base']['id']}",
    )  # fmt: skip
    if recipe.epochs and outcome.best_epoch == 0:
        warnings.warn(
            f"no epoch of {recipe.epochs} is better on the validation images than {plan['base']['id']} as it was, so "
            f"nothing was changed: try another learning_rate than {recipe.learning_rate:g}, more epochs, or more "
            "validation images",
            UserWarning,
            stacklevel=3,
        )
    history = outcome.history.astype(object)
    return {
        **plan,
        "history": history.where(history.notna(), None).to_dict("records"),
        "best_epoch": outcome.best_epoch,
        "trainable": sum(parameter.numel() for parameter in parameters.values()),
        "seconds": round(float(outcome.history.groupby("epoch")["seconds"].first().sum()), 1),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
    }


def _finished(model: DualEncoder, base: DualEncoder, record: dict[str, Any], change: str) -> DualEncoder:
    model.id = f"{base.id} + {change}"
    model.provenance = {**record, "base": {**base.provenance, **record["base"]}}
    return model.eval().requires_grad_(False).to(base.dtype)


def _read(model: DualEncoder, record: Mapping[str, Any]) -> Adapted:
    history = pd.DataFrame(record["history"]).astype({"loss": float})
    return Adapted(model, history, record["best_epoch"], record["trainable"], record["seconds"])


def _state_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.training")


def _is_taken(out: Path) -> bool:
    """Whether there is something in the folder already."""
    return out.is_file() or (out.is_dir() and any(out.iterdir()))


def _stored(out: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Record in a finished folder, if it is that of the plan."""
    path = out / _PROVENANCE
    if not path.is_file():
        raise ValueError(f"{out} holds something else than a finished adaptation; give another folder")
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete {out} and train anew") from error
    stored = {name: record[name] for name in plan if name in record}
    differences = [f"\n  {line}" for line in parameter_differences(stored, plan, holder="the folder")]
    if differences:
        raise ValueError(f"{out} was trained with other parameters; give another folder:{''.join(differences)}")
    return record


def _save_tower(parameters: Mapping[str, nn.Parameter], out: Path, record: Mapping[str, Any]) -> None:
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors(partial / _TOWER, parameters)
    write_text_atomically(partial / _PROVENANCE, json.dumps(record, indent=1) + "\n")
    partial.rename(out)
