"""Features that instruments look at again and again: encoded when first asked for, then kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.experiments import progress
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.smoothing.batching import make_batches
from medrobust_lib.smoothing.certificate import ABSTAIN
from medrobust_lib.smoothing.methods import FixedPrompts
from medrobust_lib.smoothing.noise import NoiseStream, Role, noisy_copies
from medrobust_lib.smoothing.votes import Verdict, make_plan, take_votes

_KEPT = 256  # feature sets: some tens of megabytes
_TEXTS_KEPT = 1024


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Features of single images of a data set, clean and under noise, and of sentences.

    Attributes
    ----------
    model : DualEncoder
    dataset : ImageDataset
    seed : int
        Of the noise; draws have the addresses that certificates use, so votes here are votes there.
    """

    model: DualEncoder
    dataset: ImageDataset
    seed: int = 0
    _clean: Callable[[int], Tensor] = field(init=False, repr=False)
    _noisy: Callable[[int, float, Role, int], Tensor] = field(init=False, repr=False)
    _text: Callable[[str], Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Caches of this object, not of the class: they go when it goes.
        object.__setattr__(self, "_clean", lru_cache(_KEPT)(self._encode))
        object.__setattr__(self, "_noisy", lru_cache(_KEPT)(self._encode_noisy))
        object.__setattr__(self, "_text", lru_cache(_TEXTS_KEPT)(self._encode_text))

    def pixels(self, index: int) -> Tensor:
        """Image as the model takes it, float32 [3, H, W] in [0, 1]."""
        return self.model.prepare(self.dataset.images[index : index + 1])[0].to(self.model.device)

    def clean(self, index: int) -> Tensor:
        """Feature of an image, float32 [d], unit norm."""
        return self._clean(index)

    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Features of sentences, float32 [k, d], unit norm."""
        return torch.stack([self._text(sentence) for sentence in sentences])

    def noisy(self, index: int, *, sigma: float, role: Role, count: int) -> Tensor:
        """Features of the first noisy copies of an image, float32 [count, d], unit norm."""
        return self._noisy(index, float(sigma), role, count)

    def noisy_copy(self, index: int, sigma: float) -> Tensor:
        """First copy that votes in a certificate, float32 [3, H, W]; not clipped."""
        return noisy_copies(self.pixels(index), self._stream(index, sigma, "estimate"))[0]

    def verdict(
        self, index: int, class_features: Tensor, *, sigma: float, n0: int, n: int, alpha: float
    ) -> tuple[Verdict, np.ndarray]:
        """Certificate of one image with prompts that are fixed by now, and the votes behind it.

        Returns
        -------
        verdict : Verdict
            As `certify` gives it, with fixed sampling; at sigma 0 nothing is certified.
        votes : int64 [K]
            Of the estimation draws.

        Raises
        ------
        ValueError
            n that can never certify at this alpha.
        """
        classify = FixedPrompts("chosen", class_features).classifier()

        def answers(role: Role, first: int, count: int, positions: Sequence[int]) -> list[Tensor]:
            wanted = first + count
            labels = classify(self.noisy(index, sigma=sigma, role=role, count=wanted)).cpu()[first:]
            return [labels for _ in positions]

        votes = np.bincount(answers("estimate", 0, n, [0])[0].numpy(), minlength=len(class_features))
        if sigma == 0:
            return Verdict(predicted=ABSTAIN, radius=0.0, p_lower=0.0, k=0, n=0), votes
        plan = make_plan("fixed", sigma=sigma, radii=None, n=n, alpha=alpha)
        return take_votes(answers, [plan], n0=n0, label=None)[0], votes

    def prepare(self, indices: Sequence[int], *, sigmas: Sequence[float], draws: Sequence[tuple[Role, int]]) -> None:
        """Encode noisy copies ahead, and show how far it is."""
        work = [(index, float(sigma)) for index in indices for sigma in sigmas]
        for index, sigma in progress(
            work, total=len(work), description="prepare the instrument", unit="images x sigmas", resumes=False
        ):
            for role, count in draws:
                self.noisy(index, sigma=sigma, role=role, count=count)

    def _stream(self, index: int, sigma: float, role: Role) -> NoiseStream:
        return NoiseStream(self.seed, self.dataset.id, int(self.dataset.indices[index]), sigma, role)

    # No inference mode: prompts are adapted to these features, and a gradient has to pass.
    @torch.no_grad()
    def _encode(self, index: int) -> Tensor:
        return self.model.encode_image(self.pixels(index)[None])[0].float()

    @torch.no_grad()
    def _encode_text(self, sentence: str) -> Tensor:
        return self.model.encode_text([sentence])[0].float()

    @torch.no_grad()
    def _encode_noisy(self, index: int, sigma: float, role: Role, count: int) -> Tensor:
        if sigma == 0:  # all copies are the image
            return self.clean(index).expand(count, -1)
        pixels, stream = self.pixels(index), self._stream(index, sigma, role)

        def encode(first: int, count: int) -> Tensor:
            return self.model.encode_image(noisy_copies(pixels, stream, first=first, count=count)).float()

        return torch.cat(list(make_batches(None, pixels.device, tuple(pixels.shape)).map(encode, first=0, count=count)))
