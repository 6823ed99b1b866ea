"""Prompt methods: what turns the features of noisy images into answers, and what their certificates mean.

A method never sees the noise that certifies it. The prompts of `FixedPrompts` exist before any image; a method
that adapts to an image gets `AdaptationFeatures`, which only noise of the role "adapt" can fill, and has to
return its classifier before the first selection or estimation noise is drawn.

Zero-Shot PromptSmooth fits its prompt to the very image that is then certified: its certificates hold for the prompt
frozen at that image, not for the pipeline that would adapt anew to an attacked one. The other methods buy the guarantee
back, each at a price: adapt to a pool of other images, certify every prompt of a finite set, or adapt inside the base
classifier.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medrobust_lib.checks import check_whole
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.own import Classifier
from medrobust_lib.models.weights import fingerprint
from medrobust_lib.smoothing.certificate import ABSTAIN, Guarantee
from medrobust_lib.smoothing.noise import Batches, NoiseStream, map_copies
from medrobust_lib.smoothing.prompts import PromptFrame, PromptSet, check_steps, mean_prediction_entropy, sharpen

_COPIES_AT_A_TIME = 16  # that adapt to themselves, each with a text tower's pass for all classes

FeatureClassifier = Callable[[Tensor], Tensor]
Denoiser = Callable[[Tensor, float], Tensor]
Member = tuple[FeatureClassifier, Denoiser | None]  # a classifier, and the denoiser in front of its image tower


@dataclass(frozen=True, eq=False)
class AdaptationFeatures:
    """Features of noisy copies of one image that prompts may be fitted to.

    Attributes
    ----------
    features : float32 [T, d]
        Unit norm.
    stream : NoiseStream
        Where the noise came from; its role is "adapt".

    Raises
    ------
    ValueError
        The noise belongs to a certificate.
    """

    features: Tensor = field(repr=False)
    stream: NoiseStream

    def __post_init__(self) -> None:
        if self.stream.role != "adapt":
            raise ValueError(
                f"noise of role {self.stream.role!r} belongs to the certificate; prompts may only be fitted to "
                "noise of role 'adapt'"
            )

    @classmethod
    def draw(
        cls,
        model: DualEncoder,
        pixels: Tensor,
        stream: NoiseStream,
        *,
        count: int,
        denoiser: "Denoiser | None" = None,
        batches: Batches | None = None,
    ) -> "AdaptationFeatures":
        """Encode `count` noisy copies of one prepared image, float32 [3, H, W], denoised where asked."""

        @torch.no_grad()  # not inference mode, whose tensors no gradient of a prompt could pass
        def encode(copies: Tensor) -> Tensor:
            return model.encode_image(denoised(denoiser, copies, stream.sigma))

        parts = map_copies(encode, pixels, stream, batches=batches or Batches(count), count=count)
        return cls(torch.cat(list(parts)), stream)


class PromptMethod:
    """What `certify_dataset` asks of a method; a method of your own is a subclass.

    Attributes
    ----------
    name : str
        Names the method's rows.
    guarantee : str
        Key of `medrobust_lib.smoothing.certificate.GUARANTEES`: what a certificate of this method means.
    n_adapt : int
        Adaptation draws wanted per image and noise level; 0 if the prompts are fixed in advance.
    n_candidates : int
        Classifiers that have to agree, each at its share of alpha.
    denoiser : callable or None
        (noisy pixels [b, 3, H, W], sigma) -> pixels [b, 3, H, W], in front of the image tower. Methods with the
        same denoiser share the features. A store asks for its attribute ``id``, a text that changes with its weights.
    learned_on : str or None
        Name of the perturbation that the prompts were learned on: they are certified for no other. None: for any.
    about : mapping
        JSON values that become columns of the method's rows, such as the seed of its prompts. Methods of one name
        differ in them.
    """

    name: str
    guarantee: Guarantee = "standard"
    n_adapt: int = 0
    n_candidates: int = 1
    denoiser: Denoiser | None = None
    learned_on: str | None = None
    about: Mapping[str, Any] = MappingProxyType({})

    def classifier(self, adaptation: AdaptationFeatures | None) -> FeatureClassifier:
        """Return the map from features, float32 [b, d], to labels, int64 [b], for one image and noise level."""
        raise NotImplementedError

    def classifiers(self, adaptation: AdaptationFeatures | None) -> list[FeatureClassifier]:
        """All candidates; one, where the method does not choose among several."""
        return [self.classifier(adaptation)]

    def check_classes(self, classes: Sequence[str], dataset: str) -> None:
        """Raise ValueError where prompts were made for other classes: their answers would have no meaning."""

    def settings(self) -> dict[str, Any]:
        """What shapes the answers beside guarantee and denoiser, as JSON values."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """Everything that shapes the method's rows, as JSON values; decides whether a store may be resumed."""
        about = {"about": dict(self.about)} if self.about else {}
        own = {"name": self.name, "guarantee": self.guarantee, **self.settings()}
        return {**own, "denoiser": denoiser_id(self.denoiser), **about}


@dataclass(frozen=True, eq=False)
class _Prompts(PromptMethod):
    """What every method of ours states."""

    name: str
    denoiser: Denoiser | None = field(default=None, kw_only=True)
    learned_on: str | None = field(default=None, kw_only=True)
    about: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True, eq=False)
class FixedPrompts(_Prompts):
    """Zero-shot or learned prompts that were fixed before the image was seen: the standard guarantee.

    Attributes
    ----------
    name : str
    class_features : float32 [K, d]
        Unit-norm text features.
    denoiser, learned_on, about
        As in `PromptMethod`.

    Raises
    ------
    ValueError
        Class features that are not unit-norm [K, d].
    """

    class_features: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        features = self.class_features
        if features.ndim != 2 or not torch.allclose(
            features.float().norm(dim=1), torch.ones(len(features), device=features.device), atol=1e-3
        ):
            raise ValueError(
                f"method {self.name!r}: class_features must be unit-norm [K, d], got {tuple(features.shape)}; "
                "`model.class_features(classes, templates)` gives them"
            )

    def classifier(self, adaptation: AdaptationFeatures | None = None) -> FeatureClassifier:
        """Nearest class feature; the softmax and its scale do not change which one is nearest."""

        def answer(features: Tensor) -> Tensor:
            return nearest_class(features.float() @ self.class_features.to(features.device).float().T)

        return answer

    def check_classes(self, classes: Sequence[str], dataset: str) -> None:
        """Raise ValueError for another number of classes."""
        if len(self.class_features) != len(classes):
            raise ValueError(
                f"method {self.name!r} has {len(self.class_features)} class texts, {dataset} has {len(classes)} classes"
            )

    def settings(self) -> dict[str, Any]:
        """Fingerprint of the features."""
        return {"class_features": fingerprint([self.class_features])}


@dataclass(frozen=True, eq=False)
class CandidatePrompts(_Prompts):
    """A finite set of prompts fixed in advance: certified if all agree, each at alpha / M, with the smallest radius.

    Whatever rule chooses one of the candidates, on the clean or on an attacked image, gives the certified class
    within the radius: the sound form of choosing a prompt per image. With one candidate it is `FixedPrompts`.

    Attributes
    ----------
    name : str
    candidates : tuple of float32 [K, d]
        Unit-norm text features of each prompt.
    denoiser, learned_on, about
        As in `PromptMethod`.

    Raises
    ------
    ValueError
        No candidate, or class features that are not unit-norm [K, d].
    """

    candidates: tuple[Tensor, ...] = field(repr=False)
    guarantee = "candidate-set"

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError(f"method {self.name!r}: a candidate set needs at least one prompt")
        self._members()  # checks each

    @property
    def n_candidates(self) -> int:
        """Number of prompts."""
        return len(self.candidates)

    def classifiers(self, adaptation: AdaptationFeatures | None = None) -> list[FeatureClassifier]:
        """One classifier of features per candidate."""
        return [member.classifier() for member in self._members()]

    def check_classes(self, classes: Sequence[str], dataset: str) -> None:
        """Raise ValueError where a candidate has another number of classes."""
        for member in self._members():
            member.check_classes(classes, dataset)

    def settings(self) -> dict[str, Any]:
        """Fingerprints of the candidates."""
        return {"candidates": [fingerprint([features]) for features in self.candidates]}

    def _members(self) -> list[FixedPrompts]:
        return [FixedPrompts(self.name, features) for features in self.candidates]


@dataclass(frozen=True, eq=False)
class PromptClassifier:
    """A dual encoder with class features as a base classifier of pixels, for `certify` and `predict`.

    Attributes
    ----------
    model : DualEncoder
    class_features : float32 [K, d]
        Unit-norm text features.
    """

    model: DualEncoder
    class_features: Tensor = field(repr=False)

    @property
    def id(self) -> str:
        """Id of the model."""
        return self.model.id

    @property
    def dtype(self) -> str:
        """Precision of the model, such as "float32" or "int8"."""
        return self.model.precision

    def __call__(self, pixels: Tensor) -> Tensor:
        """Labels int64 [b] of pixels float32 [b, 3, H, W]."""
        return FixedPrompts(self.id, self.class_features).classifier()(self.model.encode_image(pixels))


def nearest_class(scores: Tensor) -> Tensor:
    """Class of the largest score, int64 [b], of scores float [b, K]; ABSTAIN where that is not finite: no vote."""
    best = scores.max(dim=1)  # NaN, if there is one
    return best.indices.masked_fill(~best.values.isfinite(), ABSTAIN)


def zero_shot_methods(model: DualEncoder, data: ImageDataset) -> list[FixedPrompts]:
    """Zero-shot prompts of a data set: its first template, and the ensemble of all where there are several.

    Of a classifier, which reads none, the one method that it is, under its own name.
    """
    if isinstance(model, Classifier):
        return [FixedPrompts(model.id, model.class_features(data.classes))]
    methods = [FixedPrompts("zero-shot", model.class_features(data.classes, data.templates[:1]))]
    if len(data.templates) > 1:
        methods.append(FixedPrompts("zero-shot ensemble", model.class_features(data.classes, data.templates)))
    return methods


def denoised(denoiser: Denoiser | None, noisy: Tensor, sigma: float) -> Tensor:
    """Noisy pixels [b, 3, H, W] through a denoiser, where there is one.

    Raises
    ------
    TypeError
        The denoiser returned anything but pixels of that shape.
    """
    pixels = noisy if denoiser is None else denoiser(noisy, sigma)
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.shape != noisy.shape:
        what = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(
            f"the denoiser {getattr(denoiser, 'id', denoiser)!r} returned {what}; it must map noisy pixels "
            f"float32 {tuple(noisy.shape)} and sigma to pixels of the same shape"
        )
    return pixels


def denoiser_id(denoiser: Denoiser | None) -> str | None:
    """Text that stands for a denoiser in a store.

    Raises
    ------
    ValueError
        It has no attribute ``id``; its repr may be another one in the next process, or the same for other weights.
    """
    if denoiser is None or getattr(denoiser, "id", None):
        return None if denoiser is None else str(denoiser.id)
    raise ValueError(
        f"the denoiser {denoiser!r} has no `id`, so a store cannot tell it from another one; "
        "set its attribute `id` to a text that changes with its weights"
    )


@dataclass(frozen=True, eq=False)
class _MovedPrompts(_Prompts):
    """Prompts that steps move away from a start."""

    model: DualEncoder = field(repr=False)
    start: PromptSet
    steps: int = 1
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        check_steps(self.steps, self.learning_rate)
        object.__setattr__(self, "learned_on", self.learned_on or self.start.learned_on)

    def check_classes(self, classes: Sequence[str], dataset: str) -> None:
        """Raise ValueError for other classes than those of the start."""
        if list(self.start.classes) != list(classes):
            raise ValueError(
                f"method {self.name!r}: its prompts are for the classes {list(self.start.classes)}, {dataset} has "
                f"{list(classes)}"
            )

    def settings(self) -> dict[str, Any]:
        """Start and steps."""
        draws = {"n_adapt": self.n_adapt} if self.n_adapt else {}
        start = {"context": fingerprint([self.start.context]), "template": self.start.template}  # what is frozen, too
        return {**start, **draws, "steps": self.steps, "learning_rate": self.learning_rate}


@dataclass(frozen=True, eq=False)
class AdaptedPrompts(_MovedPrompts):
    """Zero-Shot PromptSmooth, or PromptSmooth when it starts from few-shot prompts: one prompt per image.

    Attributes
    ----------
    name : str
    model : DualEncoder
    start : PromptSet
        Where every image starts anew: a hand-written prompt or few-shot prompts.
    steps : int
        AdamW steps on the entropy of the mean prediction.
    learning_rate : float
    denoiser, learned_on, about
        As in `PromptMethod`.
    n_adapt : int
        Noisy copies to adapt to, at the noise level of the certificate.

    References
    ----------
    PromptSmooth, section 3.2 and Eq. 2; the optimiser and its rate are those of the authors' code.
    """

    n_adapt: int = 100
    guarantee = "frozen-prompt"
    _frame: PromptFrame = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("n_adapt", self.n_adapt, hint=": adaptation needs at least one noisy copy (100 is usual)")
        # Tokens and word embeddings are the same for every image; a gradient has to pass through them.
        with torch.inference_mode(False):
            object.__setattr__(self, "_frame", self.start.frame(self.model))

    def classifier(self, adaptation: AdaptationFeatures | None) -> FeatureClassifier:
        """Adapt to the image and freeze the result."""
        if adaptation is None:
            raise ValueError(f"method {self.name!r} adapts to the image and needs its adaptation features")
        start = self.start.context.to(self.model.device)
        moves = {"steps": self.steps, "learning_rate": self.learning_rate}
        context = sharpen(self.model, self._frame, start, adaptation.features, **moves)
        with torch.no_grad():
            return FixedPrompts(self.name, self._frame.features(self.model, context)).classifier()


@dataclass(frozen=True, eq=False)
class PerSamplePrompts(_MovedPrompts):
    """Adaptation inside the base classifier: every noisy copy adapts the prompt to itself alone, then is classified.

    The base classifier is then one fixed function of its noisy input, so Cohen's theorem covers the adaptation.
    Each noisy copy costs a step through the text tower for all classes.

    Attributes
    ----------
    name, model, start, steps, learning_rate, denoiser, about
        As in `AdaptedPrompts`; plain gradient steps on the entropy of the copy's own prediction, since AdamW's first
        step depends on the sign of the gradient only.
    """

    guarantee = "per-sample"

    def classifier(self, adaptation: AdaptationFeatures | None = None) -> FeatureClassifier:
        """Return the map from features to labels that adapts within."""
        frame = self.start.frame(self.model)

        def answer(features: Tensor) -> Tensor:
            # Features of certification come without gradients; the prompt's gradient needs ordinary tensors.
            with torch.inference_mode(False), torch.enable_grad():
                return torch.cat([self._answer(frame, part.clone()) for part in features.split(_COPIES_AT_A_TIME)])

        return answer

    def _answer(self, frame: PromptFrame, features: Tensor) -> Tensor:
        """Labels int64 [b] of features [b, d], each under a prompt of its own."""
        count, n_classes = len(features), len(frame.places)
        shape = (count, *frame.places.shape, frame.embeddings.shape[2])
        start = self.start.context.to(self.model.device).float().expand(shape[1:])
        context = start.expand(shape).clone().requires_grad_(True)  # [b, K, n_context, w]
        repeated = replace(
            frame,
            tokens=frame.tokens[torch.arange(n_classes).repeat(count)],
            embeddings=frame.embeddings.repeat(count, 1, 1),
            places=frame.places.repeat(count, 1),
        )

        def logits() -> Tensor:
            texts = repeated.features(self.model, context.flatten(0, 1)).view(count, n_classes, -1)
            return self.model.logit_scale * torch.einsum("bd,bkd->bk", features.float(), texts)

        for _ in range(self.steps):
            (gradient,) = torch.autograd.grad(mean_prediction_entropy(logits()[:, None]).sum(), context)
            if self.start.context.ndim == 2:  # a shared context moves by the sum of its classes' gradients
                gradient = gradient.sum(dim=1, keepdim=True).expand_as(gradient)
            # The sign is what AdamW's first step follows; it makes the step independent of the gradient's size.
            context = (context - self.learning_rate * gradient.sign()).detach().requires_grad_(True)
        with torch.no_grad():
            return nearest_class(logits())


def disjoint(pool: ImageDataset, certified: ImageDataset) -> bool:
    """Whether no image of the pool is among those to be certified, by content."""
    known, found = (
        {fingerprint([torch.from_numpy(np.array(image))]) for image in dataset.images} for dataset in (certified, pool)
    )  # copies, because torch takes no read-only arrays
    return known.isdisjoint(found)
