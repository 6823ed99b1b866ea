"""The one interface of every contrastive image-text model: images and texts to unit-norm features."""

import abc
import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # what all batch normalisation layers have in common

from medrobust_lib.models.geometry import ImageInput, Preprocessing, check_pixels, prepare_images
from medrobust_lib.models.weights import fingerprint

TEXT_CHUNK = 64
"""Texts encoded at a time by :meth:`DualEncoder.encode_text`: bounds memory, not the result."""

SOUND_TYPES = (
    "Load the model with dtype='float32' or 'bfloat16' (float16 ends at 65,504); if that does not help, its weights "
    "or its adapter are damaged"
)
"""The end of an error about numbers that are not finite."""

_LEAST_NORM = 1e-12  # below it torch's normalisation divides by this instead, and the feature is not of norm 1


@dataclass(frozen=True)
class Tokens:
    """Token ids of k texts.

    Attributes
    ----------
    ids : Tensor
        int64 [k, L], padded at the end; L is at most the model's context length.
    mask : Tensor
        bool [k, L]; True on real tokens, the start and end tokens included.
    """

    ids: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64:
            raise ValueError(f"token ids must be int64 [k, L], not {self.ids.dtype} {tuple(self.ids.shape)}")
        if self.mask.shape != self.ids.shape or self.mask.dtype != torch.bool:
            raise ValueError(
                f"the token mask must be bool {tuple(self.ids.shape)} like the ids, "
                f"not {self.mask.dtype} {tuple(self.mask.shape)}"
            )

    def __len__(self) -> int:
        return self.ids.shape[0]

    def trimmed(self) -> "Tokens":
        """Without the columns that are padding in every text (shorter sequences, same features)."""
        length = int(self.mask.any(dim=0).nonzero().max()) + 1 if self.mask.any() else self.ids.shape[1]
        return Tokens(self.ids[:, :length], self.mask[:, :length])

    def to(self, device: torch.device) -> "Tokens":
        """Copy on ``device``."""
        return Tokens(self.ids.to(device), self.mask.to(device))

    def __getitem__(self, rows: slice | Tensor) -> "Tokens":
        return Tokens(self.ids[rows], self.mask[rows])


def check_text_lengths(texts: Sequence[str], counts: Sequence[int], *, context_length: int, model_id: str) -> None:
    """Refuse texts that a tokenizer would cut silently.

    Parameters
    ----------
    texts : sequence of str
        The k texts.
    counts : sequence of int
        Untruncated token count of each text, special tokens included.
    context_length : int
        Most tokens the model reads.
    model_id : str
        Named in the error.

    Raises
    ------
    ValueError
        Naming the first text that is too long, its token count and the context length.
    """
    for text, count in zip(texts, counts, strict=True):
        if count > context_length:
            raise ValueError(
                f"the text {text!r} has {count} tokens (start and end included), "
                f"but {model_id} reads at most {context_length}; shorten the template or the class name"
            )


class BrokenFeaturesError(ValueError):
    """Features without a direction: not finite, or of length zero. The largest of NaN would be class 0, a vote."""


class DualEncoder(torch.nn.Module, abc.ABC):
    """An image tower and a text tower whose unit-norm features meet in one space.

    A back end subclasses it, calls ``super().__init__(...)``, registers its network, and implements
    ``_image_features``, ``tokenize``, ``embed_tokens`` and ``_text_features``.
    Normalisation by mean and standard deviation happens inside :meth:`encode_image`, so noise is always added
    in pixel units, where [0, 1] is black to white.

    Parameters
    ----------
    id : str
        Name under which the model was loaded.
    preprocessing : Preprocessing
        Geometry and normalisation.
    embed_dim : int
        d, the length of a feature.
    context_length : int
        Most tokens a text may have, start and end included.
    logit_scale : float
        Multiplicative scale of the cosine (already exponentiated; about 100 for CLIP).
    provenance : dict
        JSON values: source, files with their SHA-256, licence.
    logit_bias : float, optional
        What a model trained with a sigmoid loss (SigLIP) adds to the scaled cosine; None for one without.

    Raises
    ------
    ValueError
        A scale that is not finite or not above 0, or a bias that is not finite.
    """

    # Instead of `_image_features` in a model of int8, whose tower is no network of torch (`models.int8`).
    int8: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        *,
        id: str,
        preprocessing: Preprocessing,
        embed_dim: int,
        context_length: int,
        logit_scale: float,
        provenance: dict[str, Any],
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.id = id
        self.preprocessing = preprocessing
        self.embed_dim = int(embed_dim)
        self.context_length = int(context_length)
        self.logit_scale = float(logit_scale)
        if not 0 < self.logit_scale < math.inf:
            raise ValueError(f"{id}: logit_scale={self.logit_scale} is not finite and above 0; the weights are damaged")
        self.logit_bias = None if logit_bias is None else float(logit_bias)
        if self.logit_bias is not None and not math.isfinite(self.logit_bias):
            raise ValueError(f"{id}: logit_bias={self.logit_bias} is not finite; the weights are damaged")
        self.provenance = provenance
        # Follows every .to(...): tells device and dtype even for a model without parameters.
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)

    @abc.abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """Features [n, d] (any norm) of normalised pixels [n, 3, S, S] in the model's device and dtype."""

    @abc.abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokens of k texts, on the CPU.

        Raises
        ------
        ValueError
            If a text has more tokens than ``context_length`` (see :func:`check_text_lengths`).
        """

    @abc.abstractmethod
    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """Word embeddings [k, L, w] of the tokens, without positions, on the model's device."""

    @abc.abstractmethod
    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        """Features [k, d] (any norm) of word embeddings [k, L, w] in the model's device and dtype."""

    @property
    def image_size(self) -> int:
        """S, the side of the square image that the model reads, in pixels."""
        return self.preprocessing.image_size

    @property
    def device(self) -> torch.device:
        """Device on which the model lies."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type in which the towers compute; features are float32 whatever it is."""
        return self._anchor.dtype

    @property
    def precision(self) -> str:
        """Name of `dtype`, such as "float32"; "int8" where the image tower is quantised, the texts' in `dtype`."""
        return str(self.dtype).removeprefix("torch.") if self.int8 is None else "int8"

    def identity(self) -> dict[str, str]:
        """What tells this model from any other in a record: id, precision, and the fingerprint of its weights."""
        return {"id": self.id, "dtype": self.precision, "weights": fingerprint(list(self.state_dict().values()))}

    def trainable_copy(self) -> Self:
        """Copy in evaluation mode, in float32 or what is more precise; ValueError in int8."""
        if self.int8 is not None:
            raise ValueError(
                f"{self.id} is in int8: its image tower has no gradient and cannot learn. Train it in float32, then "
                "load it with dtype='int8'; adapters are merged before (load_model's adapter)"
            )
        return copy.deepcopy(self).eval().to(torch.promote_types(self.dtype, torch.float32))

    def prepare(self, images: ImageInput) -> Tensor:
        """Bring images to the model's geometry, without normalising them.

        Parameters
        ----------
        images : array or sequence
            uint8 [n, H, W, 3] or [n, H, W]; or a sequence of PIL images, uint8 [H, W, 3] or [H, W] arrays,
            and paths of image files, sizes mixed as you like.

        Returns
        -------
        Tensor
            float32 [n, 3, S, S] in [0, 1], on the CPU: 0.6 MB an image at S = 224, so go by batches.

        Raises
        ------
        TypeError, ValueError, FileNotFoundError
            For NaN, a wrong dtype, range or shape, or a file that is missing or corrupt (named).
        """
        return prepare_images(images, self.preprocessing)

    def encode_image(self, pixels: Tensor, *, unit: bool = True) -> Tensor:
        """Unit-norm features of images in pixel units; differentiable with respect to ``pixels``.

        Parameters
        ----------
        pixels : Tensor
            float [n, 3, S, S], as :meth:`prepare` gives them; noise may carry values out of [0, 1].
        unit : bool
            False leaves the features at the length that the tower gives them, and unchecked.

        Returns
        -------
        Tensor
            float32 [n, d], rows of L2 norm 1, on the model's device.

        Raises
        ------
        TypeError, ValueError
            If ``pixels`` is not floating point, not [n, 3, S, S], not finite, or in 0..255.
        BrokenFeaturesError
            If a feature that carries no gradient is not finite, or zero; with a gradient the loss will tell.
        """
        check_pixels(pixels, image_size=self.image_size, model=self.id)
        pixels = pixels.to(device=self.device, dtype=torch.promote_types(torch.float32, self.dtype))
        mean = pixels.new_tensor(self.preprocessing.mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.preprocessing.std).view(1, 3, 1, 1)
        # (pixels - mean) / std in one pass over memory.
        normalised = torch.addcmul(-mean / std, pixels, 1 / std)
        features = (self.int8 or self._image_features)(normalised.to(self.dtype))
        return self._unit(features, of="images") if unit else features.float()

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm features of texts.

        Parameters
        ----------
        texts : sequence of str
            k texts; a single string counts as one text.

        Returns
        -------
        Tensor
            float32 [k, d], rows of L2 norm 1, on the model's device.

        Raises
        ------
        TypeError, ValueError
            If there is no text, one is not a string, or one is longer than the context.
        BrokenFeaturesError
            If a feature is not finite, or zero.
        """
        tokens = self.tokenize(text_list(texts))
        chunks = [tokens[start : start + TEXT_CHUNK] for start in range(0, len(tokens), TEXT_CHUNK)]
        return torch.cat([self.encode_embeddings(self.embed_tokens(chunk), chunk) for chunk in chunks])

    def encode_embeddings(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        """Unit-norm features of word embeddings; differentiable with respect to them (prompt learning).

        Parameters
        ----------
        embeddings : Tensor
            float [k, L, w], such as :meth:`embed_tokens` gives them, some perhaps learned.
        tokens : Tokens
            The tokens that the embeddings stand for; their mask and end tokens steer attention and pooling.

        Returns
        -------
        Tensor
            float32 [k, d], rows of L2 norm 1, on the model's device.

        Raises
        ------
        ValueError
            If embeddings and tokens disagree on [k, L].
        BrokenFeaturesError
            If a feature that carries no gradient is not finite, or zero.
        """
        if embeddings.ndim != 3 or embeddings.shape[:2] != tokens.ids.shape:
            raise ValueError(
                f"embeddings must be [k, L, w] with [k, L] = {tuple(tokens.ids.shape)} of the tokens, "
                f"not {tuple(embeddings.shape)}"
            )
        embeddings = embeddings.to(device=self.device, dtype=self.dtype)
        return self._unit(self._text_features(embeddings, tokens.to(self.device)), of="texts")

    def class_features(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Prompt ensemble: mean over templates of the unit-norm text features, brought back to norm 1.

        Parameters
        ----------
        classes : sequence of str
            K prompt nouns.
        templates : sequence of str
            Each holds ``{}`` where the noun goes.

        Returns
        -------
        Tensor
            float32 [K, d], rows of L2 norm 1.

        Raises
        ------
        TypeError, ValueError
            If a list is empty, an element is no string, or a template lacks ``{}``.

        References
        ----------
        Radford et al. 2021, arXiv:2103.00020, section 3.1.4.
        """
        classes, templates = text_list(classes), text_list(templates)
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"the template {template!r} lacks '{{}}', the place of the class name")
        texts = [template.replace("{}", name) for name in classes for template in templates]
        features = self.encode_text(texts).view(len(classes), len(templates), -1)
        return self._unit(features.mean(dim=1), of="prompt ensembles")

    def probabilities(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """Softmax over classes of ``logit_scale`` times the cosine.

        Parameters
        ----------
        image_features : Tensor
            float32 [n, d], unit norm.
        class_features : Tensor
            float32 [K, d], unit norm.

        Returns
        -------
        Tensor
            float32 [n, K], rows summing to 1.

        Raises
        ------
        BrokenFeaturesError
            For features that are not finite, whatever made them: softmax and argmax would take them for class 0.
        """
        return functional.softmax(self.logit_scale * self._cosine(image_features, class_features), dim=-1)

    def sigmoid_scores(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """How well each class fits by itself: sigmoid of ``logit_scale`` times the cosine plus ``logit_bias``.

        What a model trained with a sigmoid loss (SigLIP) means by its numbers, float32 [n, K] in [0, 1]; arguments are
        those of :meth:`probabilities`, and so is the best class, up to ties by rounding. As a confidence the two
        differ: these do not sum to 1, and the bias, which softmax does not see, makes all low where no class fits.

        Raises
        ------
        ValueError
            As `probabilities`; or the model has no ``logit_bias``: it was trained with softmax.

        References
        ----------
        Zhai et al. 2023, arXiv:2303.15343, section 3.2.
        """
        if self.logit_bias is None:
            raise ValueError(f"{self.id} was trained with softmax and has no logit_bias; take probabilities")
        return torch.sigmoid(self.logit_scale * self._cosine(image_features, class_features) + self.logit_bias)

    def _cosine(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """Cosines float32 [n, K], checked to be finite."""
        cosine = image_features.float() @ class_features.to(image_features.device).float().T
        if not cosine.detach().isfinite().all():
            images, classes = (int((~x.isfinite()).any(dim=1).sum()) for x in (image_features, class_features))
            raise BrokenFeaturesError(
                f"{self.id}: the features of {images} of {len(image_features)} images and of {classes} of "
                f"{len(class_features)} classes are not finite, so they have no probabilities"
            )
        return cosine

    def _unit(self, features: Tensor, *, of: str) -> Tensor:
        """Features [n, d] at norm 1, float32; ``of`` says in the error what they are features of."""
        features = features.float()
        norms = features.norm(dim=-1, keepdim=True)
        # A gradient belongs to a loss, which is not finite either, and whose trainer knows the remedy.
        if not norms.requires_grad:
            low, high = torch.stack(torch.aminmax(norms)).tolist()  # one transfer; NaN stays NaN
            if not (low >= _LEAST_NORM and high < math.inf):
                broken = int((~((norms >= _LEAST_NORM) & norms.isfinite())).sum())
                raise BrokenFeaturesError(
                    f"{self.id} in {self.precision}: the features of {broken} of {len(norms)} "
                    f"{of} are not finite or have no length (below {_LEAST_NORM:g}, or beyond float32), so they have "
                    f"no answer. {SOUND_TYPES}"
                )
        return features / norms.clamp_min(_LEAST_NORM)

    def __repr__(self) -> str:
        # The towers' hundreds of layers would drown the facts; print(model.model) shows them.
        return (
            f"{type(self).__name__}(id={self.id!r}, image_size={self.image_size}, embed_dim={self.embed_dim}, "
            f"context_length={self.context_length}, dtype={self.precision}, device={str(self.device)!r})"
        )


def text_list(texts: Sequence[str]) -> list[str]:
    """Texts as a checked, non-empty list of strings."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("no text given: at least one string is needed")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings, not {type(text).__name__}: {text!r}")
    return texts


class ImageTower(NamedTuple):
    """What only image features depend on: parameters and batch normalisation layers, by their names in the model."""

    parameters: dict[str, nn.Parameter]
    norms: dict[str, _BatchNorm]


def find_image_tower(model: DualEncoder) -> ImageTower:
    """Find the image tower by one backward pass, whatever the back end calls its parts.

    Afterwards exactly the parameters of the tower require a gradient, so give a copy.
    """
    model.requires_grad_(True)
    image, text = (_reached(model, encode) for encode in probes(model))
    own = image - text
    model.requires_grad_(False)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in own}
    if not parameters:
        raise ValueError(
            f"{model.id}: image features depend on no parameter of their own that a gradient reaches, so there is no "
            "image tower to train"
        )
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    norms = {name: norm for name, norm in model.named_modules() if name in own and isinstance(norm, _BatchNorm)}
    return ImageTower(parameters, norms)


def probes(model: DualEncoder) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Two calls that show by what they use which parts are the image tower's: one encodes an image, one a text."""
    grey = torch.full((1, 3, model.image_size, model.image_size), 0.5, device=model.device)
    return lambda: model.encode_image(grey), lambda: model.encode_text(["x"])


def layers_run(
    model: nn.Module, encode: Callable[[], Tensor], kinds: tuple[type[nn.Module], ...]
) -> dict[str, tuple[Any, ...]]:
    """Names of the layers of these kinds that run in a call, and their inputs; what features come out is not asked."""
    found: dict[str, tuple[Any, ...]] = {}
    with contextlib.ExitStack() as hooks, contextlib.suppress(BrokenFeaturesError, NotImplementedError):
        for name, layer in model.named_modules():
            if isinstance(layer, kinds):
                hook = layer.register_forward_hook(lambda _, inputs, __, name=name: found.update({name: inputs}))
                hooks.callback(hook.remove)
        encode()
    return found


def _reached(model: DualEncoder, encode: Callable[[], Tensor]) -> set[str]:
    """Names of the parameters and batch normalisation layers that features depend on."""
    features: list[Tensor] = []
    found = set(layers_run(model, lambda: features.append(encode()), (_BatchNorm,)))
    named = dict(model.named_parameters())
    if named and features and features[0].requires_grad:
        gradients = torch.autograd.grad(features[0].sum(), list(named.values()), allow_unused=True)
        found.update(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)
    return found
