"""Prompt methods that adapt to images: PromptSmooth's per-image prompts, and variants that keep the full guarantee.

Zero-Shot PromptSmooth fits its prompt to the very image that is then certified. Its certificates hold for the
prompt frozen at that image, not for the pipeline that would adapt anew to an attacked image. The other methods
here buy back the guarantee, each at a price: adapt to a pool of other images, certify every prompt of a finite
set, or adapt inside the base classifier.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.weights import fingerprint
from medrobust_lib.smoothing.bounds import check_sigma
from medrobust_lib.smoothing.certificate import Guarantee
from medrobust_lib.smoothing.methods import (
    AdaptationFeatures,
    Denoiser,
    FeatureClassifier,
    FixedPrompts,
    denoiser_id,
    nearest_class,
)
from medrobust_lib.smoothing.prompt_frames import PromptFrame
from medrobust_lib.smoothing.prompts import PromptSet, mean_prediction_entropy, noisy_bank, sharpen

ADAPTATION_DRAWS = 100
"""Noisy copies that PromptSmooth adapts to."""


@dataclass(frozen=True, eq=False)
class AdaptedPrompts:
    """Zero-Shot PromptSmooth, or PromptSmooth when it starts from few-shot prompts: one prompt per image.

    Attributes
    ----------
    name : str
    model : DualEncoder
    start : PromptSet
        Where every image starts anew: a hand-written prompt or few-shot prompts.
    n_adapt : int
        Noisy copies to adapt to, at the noise level of the certificate.
    steps : int
        AdamW steps on the entropy of the mean prediction.
    learning_rate : float

    References
    ----------
    PromptSmooth, section 3.2 and Eq. 2; the optimiser and its rate are those of the authors' code.
    """

    name: str
    model: DualEncoder = field(repr=False)
    start: PromptSet
    n_adapt: int = ADAPTATION_DRAWS
    steps: int = 1
    learning_rate: float = 5e-3
    denoiser: Denoiser | None = None
    guarantee: Guarantee = field(default="frozen-prompt", init=False)
    _frame: PromptFrame = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_steps(self.steps, self.learning_rate)
        if self.n_adapt < 1:
            raise ValueError(f"n_adapt={self.n_adapt}: adaptation needs at least one noisy copy (100 is usual)")
        # Tokens and word embeddings are the same for every image; a gradient has to pass through them.
        with torch.inference_mode(False):
            object.__setattr__(self, "_frame", self.start.frame(self.model))

    def classifier(self, adaptation: AdaptationFeatures | None) -> FeatureClassifier:
        """Adapt to the image and freeze the result."""
        if adaptation is None:
            raise ValueError(f"method {self.name!r} adapts to the image and needs its adaptation features")
        context = sharpen(
            self.model, self._frame, self.start.context.to(self.model.device), adaptation.features, steps=self.steps,
            learning_rate=self.learning_rate,
        )  # fmt: skip
        with torch.no_grad():
            return FixedPrompts(self.name, self._frame.features(self.model, context)).classifier()

    def record(self) -> dict[str, Any]:
        """Everything that shapes the answers."""
        return {
            "name": self.name, "guarantee": self.guarantee, "context": fingerprint([self.start.context]),
            "n_adapt": self.n_adapt, "steps": self.steps, "learning_rate": self.learning_rate,
            "denoiser": denoiser_id(self.denoiser),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class PerSamplePrompts:
    """Adaptation inside the base classifier: every noisy copy adapts the prompt to itself alone, then is classified.

    The base classifier is then one fixed function of its noisy input, so Cohen's theorem covers the adaptation.
    Each noisy copy costs a step through the text tower for all classes.

    Attributes
    ----------
    name, model, start, steps, learning_rate
        As in `AdaptedPrompts`; plain gradient steps on the entropy of the copy's own prediction, since AdamW's first
        step depends on the sign of the gradient only.
    chunk : int
        Noisy copies adapted at a time.
    """

    name: str
    model: DualEncoder = field(repr=False)
    start: PromptSet
    steps: int = 1
    learning_rate: float = 5e-3
    chunk: int = 16
    denoiser: Denoiser | None = None
    guarantee: Guarantee = field(default="per-sample", init=False)
    n_adapt: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        _check_steps(self.steps, self.learning_rate)

    def classifier(self, adaptation: AdaptationFeatures | None = None) -> FeatureClassifier:
        """Return the map from features to labels that adapts within."""
        frame = self.start.frame(self.model)

        def answer(features: Tensor) -> Tensor:
            # Features of certification come without gradients; the prompt's gradient needs ordinary tensors.
            with torch.inference_mode(False), torch.enable_grad():
                return torch.cat([self._answer(frame, part.clone()) for part in features.split(self.chunk)])

        return answer

    def _answer(self, frame: Any, features: Tensor) -> Tensor:
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

    def record(self) -> dict[str, Any]:
        """Everything that shapes the answers."""
        return {
            "name": self.name, "guarantee": self.guarantee, "context": fingerprint([self.start.context]),
            "steps": self.steps, "learning_rate": self.learning_rate, "denoiser": denoiser_id(self.denoiser),
        }  # fmt: skip


def adapt_to_pool(
    model: DualEncoder,
    start: PromptSet,
    pool: ImageDataset,
    *,
    sigma: float,
    copies: int = 1,
    steps: int = 1,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> PromptSet:
    """Lower the entropy on a pool of unlabelled images that will not be certified: a standard guarantee.

    Parameters
    ----------
    model : DualEncoder
    start : PromptSet
    pool : ImageDataset
        Its labels are not looked at.
    sigma : float
        Noise level, > 0, in [0, 1] pixel units.
    copies : int
        Noisy copies of each image; the entropy of their mean prediction is averaged over images.
    steps : int
        AdamW steps over the whole pool. One, as for the per-image prompt: every further step makes answers surer,
        right or wrong.
    learning_rate : float
    seed : int
        Of the noise.

    Returns
    -------
    PromptSet
        To be used with `FixedPrompts`.
    """
    check_sigma(sigma)
    _check_steps(steps, learning_rate)
    if copies < 1:
        raise ValueError(f"copies={copies}: at least one noisy copy of each image is needed")
    bank = noisy_bank(model, pool, sigmas=(sigma,), draws=copies, seed=seed, choose=np.random.default_rng(seed))
    frame = start.frame(model)
    context = start.context.detach().float().to(model.device).clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([context], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            logits = model.logit_scale * bank @ frame.features(model, context).T
            mean_prediction_entropy(logits).mean().backward()
            optimiser.step()
    provenance = start.provenance | {
        "pool": {"dataset": pool.id, "split": pool.split, "images": [int(index) for index in pool.indices],
                 "sigma": sigma, "copies": copies, "steps": steps, "learning_rate": learning_rate, "seed": seed},
    }  # fmt: skip
    return replace(start, context=context.detach().cpu(), provenance=provenance)


def _check_steps(steps: int, learning_rate: float) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: adaptation takes at least one step; FixedPrompts takes none")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate}: must be > 0")


def disjoint(pool: ImageDataset, certified: ImageDataset) -> bool:
    """Whether no image of the pool is among those to be certified, by content."""
    known: set[str] = {fingerprint([torch.from_numpy(image)]) for image in certified.images}
    return not any(fingerprint([torch.from_numpy(image)]) in known for image in pool.images)
