"""Prompt learning on noisy features: CoOp, Few-Shot and Zero-Shot PromptSmooth, and sound variants.

A prompt is a few context vectors among the word embeddings of "... {class}.". The image tower never sees it,
so prompts are learned on features of noisy images that were encoded once.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medrobust_lib.checks import check_positive, check_whole
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.files import parsed, read_tensors, write_tensors
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.smoothing.noise import noisy_bank
from medrobust_lib.smoothing.prompt_frames import (
    Position,
    PromptFrame,
    empty_frame,
    frame_from_template,
    why_not_learned,
)

TRAINING_SIGMAS = (0.25, 0.5, 0.75, 1.0)
"""Noise levels that the authors of PromptSmooth train few-shot prompts with (issue 3 of their repository)."""

_INITIAL_STD = 0.02  # of randomly initialised context, as in CoOp
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Context vectors for the classes of one data set and one model.

    Attributes
    ----------
    context : float32 [n_context, w] or [K, n_context, w]
        Shared by all classes, or one per class.
    classes : tuple of str
        Prompt nouns, in label order.
    model : str
        Id of the model whose word embeddings the context lives among.
    position : {"end", "middle", "front"}
        Where the class name stands.
    template : str
        Hand-written prompt that the context replaces; empty for random initialisation.
    suffix : str
        Frozen text after the class name, where there is no template.
    provenance : dict
        JSON values: data set, shots, sigmas, seed, optimiser and whatever made the prompts.

    Raises
    ------
    ValueError
        A context that is not finite.
    """

    context: Tensor = field(repr=False)
    classes: tuple[str, ...]
    model: str
    position: Position = "end"
    template: str = ""
    suffix: str = "."
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        broken = int((~self.context.isfinite()).sum())
        if broken:
            raise ValueError(
                f"prompts for {self.model}: {broken} of {self.context.numel()} context values are not finite: learning "
                "diverged (lower learning_rate), or the text tower broke (load it in float32)"
            )

    def frame(self, model: DualEncoder) -> PromptFrame:
        """Build the prompts' tokens for a model.

        Raises
        ------
        ValueError
            The prompts belong to another model.
        """
        if model.id != self.model:
            raise ValueError(
                f"these prompts were learned for the model {self.model!r} and mean nothing to {model.id!r}; "
                "learn prompts for it, or load the other model"
            )
        if self.template:
            return frame_from_template(model, self.classes, self.template)
        return empty_frame(
            model, self.classes, n_context=self.context.shape[-2], position=self.position, suffix=self.suffix
        )

    def class_features(self, model: DualEncoder, classes: Sequence[str] | None = None) -> Tensor:
        """Unit-norm text features [K, d] of the prompts.

        Parameters
        ----------
        model : DualEncoder
        classes : sequence of str, optional
            Class nouns of the data they will be used on: checked to be those of the prompts, in this order.

        Raises
        ------
        ValueError
            Another model, or another list of classes.
        """
        if classes is not None and tuple(classes) != self.classes:
            raise ValueError(
                f"these prompts were learned for the classes {list(self.classes)}, not for {list(classes)}; "
                "learn prompts for these classes"
            )
        with torch.no_grad():
            return self.frame(model).features(model, self.context.to(model.device))

    def save(self, path: Path | str) -> Path:
        """Write the prompts as one safetensors file; everything but the vectors is JSON in its header."""
        path = Path(path)
        header = {
            "format": _FORMAT, "classes": list(self.classes), "model": self.model, "position": self.position,
            "template": self.template, "suffix": self.suffix, "provenance": self.provenance,
        }  # fmt: skip
        write_tensors(path, {"context": self.context}, key="prompts", header=header)
        return path

    @classmethod
    def load(cls, path: Path | str) -> "PromptSet":
        """Read prompts that `save` wrote.

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            The file holds no prompts of this format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no prompts at {path}; PromptSet.save writes them")
        tensors, header = read_tensors(path, key="prompts", kind="a readable file of prompts", advice="Copy it anew.")
        if header.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} holds no prompts of format {_FORMAT}; PromptSet.save writes them")
        with parsed(f"{path} holds no prompts that fit together", "Learn them again."):
            context, classes = tensors["context"], tuple(header.pop("classes"))
            if context.ndim not in (2, 3) or (context.ndim == 3 and len(context) != len(classes)) or not classes:
                raise ValueError(f"a context of shape {tuple(context.shape)} for {len(classes)} classes")
            return cls(context=context, classes=classes, **header)


def text_prompts(model: DualEncoder, classes: Sequence[str], template: str) -> PromptSet:
    """Hand-written prompt as a `PromptSet`, for instance as the start of per-image adaptation."""
    _check_learns(model)
    frame = frame_from_template(model, classes, template)
    return PromptSet(
        context=frame.text_context, classes=tuple(classes), model=model.id, template=template,
        provenance={"method": "hand-written"},
    )  # fmt: skip


def learn_prompts(
    model: DualEncoder,
    dataset: ImageDataset,
    *,
    sigmas: Sequence[float] = TRAINING_SIGMAS,
    shots: int = 16,
    epochs: int = 50,
    batch_size: int = 16,
    learning_rate: float = 0.002,
    draws_per_image: int = 16,
    seed: int = 0,
    **form: Any,
) -> PromptSet:
    """Few-Shot PromptSmooth: cross-entropy over noisy copies of a few labelled images.

    With ``sigmas=(0.0,)`` this is naive prompt learning (CoOp). The features of ``draws_per_image`` noisy
    copies of every shot are computed once and used in turn, epoch after epoch; with as many draws as epochs each
    epoch has noise of its own, as in the recipe of the paper. CoOp's random crops and mirror images are left out: they
    would need the image tower in every epoch.

    Parameters
    ----------
    model : DualEncoder
        Frozen.
    dataset : ImageDataset
        Labelled images, never those that will be certified.
    sigmas : sequence of float
        Noise levels in [0, 1] pixel units, >= 0; each noisy copy draws one of them.
    shots : int
        Images per class, drawn with the seed; a class with fewer gives all it has.
    epochs, batch_size, learning_rate
        SGD with momentum .9 and weight decay 5e-4; the first epoch at 1e-5, then a cosine to 0.
    draws_per_image : int
        Noisy copies of each shot.
    seed : int
        Of shots, noise, initialisation and order.
    **form
        ``n_context`` (5) context tokens; ``class_specific`` (False): one context per class instead of a shared one;
        ``position`` ("end", "middle", "front"): where the class name stands; ``template``: start from this hand-written
        prompt, whose tokens are the context, instead of from random vectors (standard deviation 0.02).

    Returns
    -------
    PromptSet

    Raises
    ------
    ValueError
        A parameter out of range, a class without images, or a model for which `why_not_learned` has an answer.

    References
    ----------
    Zhou et al. 2022 (CoOp), arXiv:2109.01134; PromptSmooth, Eq. 1.
    """
    _check_learns(model)
    sigmas = _checked_sigmas(sigmas)
    for name, value in {"epochs": epochs, "batch_size": batch_size, "draws_per_image": draws_per_image}.items():
        check_whole(name, value)
    check_positive("learning_rate", learning_rate)
    draw = np.random.default_rng(seed)
    chosen = draw_shots(dataset, shots, draw)
    generator = torch.Generator().manual_seed(seed)
    start = _start(model, dataset.classes, generator, **form)
    frame = start.frame(model)
    bank = noisy_bank(model, chosen, sigmas=sigmas, draws=draws_per_image, seed=seed, choose=draw)
    context = _fit(
        model, frame, start.context, bank, torch.from_numpy(chosen.labels), epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, generator=generator,
    )  # fmt: skip
    provenance = {
        "method": "CoOp" if sigmas == (0.0,) else "Few-Shot PromptSmooth",
        "dataset": dataset.id, "split": dataset.split, "images": [int(index) for index in chosen.indices],
        "shots": shots, "sigmas": list(sigmas), "epochs": epochs, "batch_size": batch_size,
        "learning_rate": learning_rate, "draws_per_image": draws_per_image,
        "class_specific": start.context.ndim == 3, "seed": seed,
    }  # fmt: skip
    return replace(start, context=context, provenance=provenance)


def _start(
    model: DualEncoder,
    classes: Sequence[str],
    generator: torch.Generator,
    *,
    n_context: int = 5,
    class_specific: bool = False,
    position: Position = "end",
    template: str = "",
) -> PromptSet:
    """Prompts to start learning from."""
    if template:
        start = text_prompts(model, classes, template)
    else:
        width = model.embed_tokens(model.tokenize(["x"])).shape[2]
        vectors = torch.empty(n_context, width).normal_(0, _INITIAL_STD, generator=generator)
        start = PromptSet(context=vectors, classes=tuple(classes), model=model.id, position=position)
    if class_specific:
        start = replace(start, context=start.context.expand(len(classes), -1, -1).clone())
    return start


def draw_shots(dataset: ImageDataset, shots: int, draw: np.random.Generator) -> ImageDataset:
    """Draw the same number of images of every class; a class with fewer gives all, with a warning.

    Raises
    ------
    ValueError
        shots below 1, or a class without images.
    """
    check_whole("shots", shots, hint=": few-shot learning needs at least one image per class")
    positions, short = [], []
    for label, noun in enumerate(dataset.classes):
        members = np.flatnonzero(dataset.labels == label)
        if not len(members):
            raise ValueError(f"{dataset.id}: no image of class {noun!r} to learn from")
        if len(members) < shots:
            short.append(f"{noun!r} has {len(members)}")
        positions.extend(draw.permutation(members)[:shots])
    if short:
        warnings.warn(
            f"{dataset.id}: {len(short)} of {len(dataset.classes)} classes have fewer images than shots={shots} "
            f"({', '.join(short)}); all are used",
            UserWarning,
            stacklevel=3,
        )
    return dataset.subset(np.array(positions))


def mean_prediction_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction over noisy copies; at least the mean of their entropies, by concavity.

    Parameters
    ----------
    logits : float [..., T, K]

    Returns
    -------
    float [...], in nats

    References
    ----------
    PromptSmooth, Eq. 2; Shu et al. 2022 (TPT), arXiv:2209.07511.
    """
    log_mean = functional.log_softmax(logits, dim=-1).logsumexp(dim=-2) - math.log(logits.shape[-2])
    return -(log_mean.exp() * log_mean).sum(dim=-1)


def sharpen(
    model: DualEncoder,
    frame: PromptFrame,
    context: Tensor,
    features: Tensor,
    *,
    steps: int = 1,
    learning_rate: float = 5e-3,
) -> Tensor:
    """Zero-Shot PromptSmooth: take steps that lower the entropy of the mean prediction over noisy copies.

    Parameters
    ----------
    model : DualEncoder
    frame : PromptFrame
    context : float32 [n_context, w] or [K, n_context, w]
        Where the steps start; not changed.
    features : float32 [T, d] or [n, T, d]
        Unit-norm features of noisy copies of one image, or of n images whose entropies are averaged.
    steps : int
        AdamW steps (weight decay .01); the optimiser starts anew at every call.
    learning_rate : float

    Returns
    -------
    float32, shape of context
    """
    check_steps(steps, learning_rate)
    features = features.detach().float()
    with torch.enable_grad():
        learned = context.detach().float().clone().requires_grad_(True)
        optimiser = torch.optim.AdamW([learned], lr=learning_rate)
        for _ in range(steps):
            optimiser.zero_grad()
            logits = model.logit_scale * features @ frame.features(model, learned).T
            mean_prediction_entropy(logits).mean().backward()
            optimiser.step()
    return learned.detach()


def check_steps(steps: int, learning_rate: float) -> None:
    """Refuse an adaptation without steps, or with steps of no size."""
    check_whole("steps", steps, hint=": adaptation takes at least one step; FixedPrompts takes none")
    check_positive("learning_rate", learning_rate)


@torch.enable_grad()  # notebooks often switch gradients off as a whole
def _fit(
    model: DualEncoder,
    frame: PromptFrame,
    start: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Tensor:
    """Minimise the cross-entropy of the bank; the context stays in float32 whatever the model computes in."""
    labels = labels.to(bank.device)
    context = start.detach().float().to(model.device).clone().requires_grad_(True)
    optimiser = torch.optim.SGD([context], lr=learning_rate, momentum=0.9, weight_decay=5e-4)

    def rate(epoch: int) -> float:
        return 1e-5 / learning_rate if epoch == 0 else (1 + math.cos(math.pi * epoch / epochs)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    for epoch in range(epochs):
        order = torch.randperm(len(bank), generator=generator).to(bank.device)
        for rows in order.split(batch_size):
            optimiser.zero_grad()
            logits = model.logit_scale * bank[rows, epoch % bank.shape[1]] @ frame.features(model, context).T
            functional.cross_entropy(logits, labels[rows]).backward()
            optimiser.step()
        schedule.step()
    return context.detach().cpu()


def _check_learns(model: DualEncoder) -> None:
    if reason := why_not_learned(model):
        raise ValueError(f"{reason}; hand-written prompts work with it (class_features)")


def _checked_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    sigmas = tuple(float(sigma) for sigma in np.atleast_1d(sigmas))
    if not sigmas or not all(0 <= sigma < math.inf for sigma in sigmas):
        raise ValueError(f"sigmas={sigmas}: give noise levels >= 0 in [0, 1] pixel units; (0.0,) is prompt learning "
                         "without noise (CoOp)")  # fmt: skip
    return sigmas
