"""Prompt methods: what turns the features of noisy images into answers, and what their certificates mean.

A method never sees the noise that certifies it. The prompts of `FixedPrompts` exist before any image; a method
that adapts to an image gets `AdaptationFeatures`, which only noise of the role "adapt" can fill, and has to
return its classifier before the first selection or estimation noise is drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.weights import fingerprint
from medrobust_lib.smoothing.batching import Batches
from medrobust_lib.smoothing.certificate import ABSTAIN, Guarantee
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies

FeatureClassifier = Callable[[Tensor], Tensor]
Denoiser = Callable[[Tensor, float], Tensor]


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
        def encode(first: int, count: int) -> Tensor:
            noisy = noisy_copies(pixels, stream, first=first, count=count)
            return model.encode_image(denoised(denoiser, noisy, stream.sigma))

        batches = batches or Batches(count)
        return cls(torch.cat(list(batches.map(encode, first=0, count=count))), stream)


class PromptMethod(Protocol):
    """What `certify_dataset` asks of a method.

    Attributes
    ----------
    name : str
        Names the method's rows.
    guarantee : str
        Key of `medrobust_lib.smoothing.certify.GUARANTEES`: what a certificate of this method means.
    n_adapt : int
        Adaptation draws wanted per image and noise level; 0 if the prompts are fixed in advance.
    denoiser : callable or None
        (noisy pixels [b, 3, H, W], sigma) -> pixels [b, 3, H, W], in front of the image tower. Methods with the
        same denoiser share the features. A store asks for its attribute ``id``, a text that changes with its weights.
    """

    name: str
    guarantee: Guarantee
    n_adapt: int
    denoiser: Denoiser | None

    def classifier(self, adaptation: AdaptationFeatures | None) -> FeatureClassifier:
        """Return the map from features, float32 [b, d], to labels, int64 [b], for one image and noise level."""
        ...

    def record(self) -> dict[str, Any]:
        """Everything that shapes the method's answers, as JSON values; decides whether a store may be resumed."""
        ...


@dataclass(frozen=True, eq=False)
class FixedPrompts:
    """Zero-shot or learned prompts that were fixed before the image was seen: the standard guarantee.

    Attributes
    ----------
    name : str
    class_features : float32 [K, d]
        Unit-norm text features.
    denoiser : callable or None

    Raises
    ------
    ValueError
        Class features that are not unit-norm [K, d].
    """

    name: str
    class_features: Tensor = field(repr=False)
    denoiser: Denoiser | None = None
    guarantee: Guarantee = field(default="standard", init=False)
    n_adapt: int = field(default=0, init=False)

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

    def record(self) -> dict[str, Any]:
        """Name and fingerprint of the features."""
        return {
            "name": self.name,
            "guarantee": self.guarantee,
            "class_features": fingerprint([self.class_features]),
            "denoiser": denoiser_id(self.denoiser),
        }


@dataclass(frozen=True, eq=False)
class CandidatePrompts:
    """A finite set of prompts fixed in advance: certified if all agree, each at alpha / M, with the smallest radius.

    Whatever rule chooses one of the candidates, on the clean or on an attacked image, gives the certified class
    within the radius: the sound form of choosing a prompt per image.

    Attributes
    ----------
    name : str
    candidates : tuple of float32 [K, d]
        Unit-norm text features of each prompt.
    denoiser : callable or None

    Raises
    ------
    ValueError
        No candidate, or class features that are not unit-norm [K, d].
    """

    name: str
    candidates: tuple[Tensor, ...] = field(repr=False)
    denoiser: Denoiser | None = None
    guarantee: Guarantee = field(default="candidate-set", init=False)
    n_adapt: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError(f"method {self.name!r}: a candidate set needs at least one prompt")
        self.classifiers()  # checks each

    def classifiers(self, adaptation: AdaptationFeatures | None = None) -> list[FeatureClassifier]:
        """One classifier of features per candidate."""
        return [FixedPrompts(self.name, features).classifier() for features in self.candidates]

    def record(self) -> dict[str, Any]:
        """Name and fingerprints of the candidates."""
        return {
            "name": self.name,
            "guarantee": self.guarantee,
            "candidates": [fingerprint([features]) for features in self.candidates],
            "denoiser": denoiser_id(self.denoiser),
        }


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
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model's towers."""
        return self.model.dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """Labels int64 [b] of pixels float32 [b, 3, H, W]."""
        return FixedPrompts(self.id, self.class_features).classifier()(self.model.encode_image(pixels))


def nearest_class(scores: Tensor) -> Tensor:
    """Class of the largest score, int64 [b], of scores float [b, K]; ABSTAIN where that is not finite: no vote."""
    best = scores.max(dim=1)  # NaN, if there is one
    return best.indices.masked_fill(~best.values.isfinite(), ABSTAIN)


def zero_shot_methods(model: DualEncoder, data: ImageDataset) -> list[FixedPrompts]:
    """Zero-shot prompts of a data set: its first template, and the ensemble of all where there are several."""
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
