"""Models of one's own without a class of one's own: two functions, or a classifier, as a dual encoder."""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medrobust_lib.checks import check_whole
from medrobust_lib.models.dual_encoder import TEXT_CHUNK, DualEncoder, text_list
from medrobust_lib.models.geometry import Geometry, Interpolation, Preprocessing, per_channel


class _OfFunctions(DualEncoder):
    """What functions share that see pixels and whole texts, and no tokens.

    The networks that they are, are bound to, or name in their source are parts of the model: they follow it to a device
    and a dtype, and their weights tell it from another one.
    """

    def __init__(self, given: dict[str, Any], preprocessing: Preprocessing, *, id: str, logit_scale: float) -> None:
        for what, function in given.items():
            if not callable(function):
                raise TypeError(f"{what} must be a function, not {type(function).__name__}")
        id = id or _name_of(next(iter(given.values())))
        networks = {what: _networks(function) for what, function in given.items()}
        parts = list(dict.fromkeys(network for found in networks.values() for network in found))
        if training := [type(part).__name__ for network in parts for part in network.modules() if part.training]:
            raise ValueError(
                f"{id}: {training[0]} is in training mode, so an answer depends on the rest of its batch and is no "
                "fixed function of the image; call .eval() first"
            )
        super().__init__(
            id=id, preprocessing=preprocessing, embed_dim=0, context_length=0, logit_scale=logit_scale,
            provenance={"source": "functions of one's own"},
        )  # fmt: skip
        self._given = dict(given)  # not as attributes: a network among them would be a part twice
        self.networks = nn.ModuleList(parts)
        self._untold = [what for what, found in networks.items() if not found]
        if (first := next(self.networks.parameters(), None)) is not None and first.is_floating_point():
            self._anchor = self._anchor.to(first)
        self.eval()

    def _call(self, what: str, given: Any) -> Tensor:
        """What a function gives, as a tensor on the model's device."""
        if what in self._untold and isinstance(given, Tensor):
            given = given.float()  # NumPy knows no bfloat16
        found = self._given[what](given)
        try:
            return torch.as_tensor(found, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{self.id}: {what} returned {type(found).__name__}, no numbers: {error}") from error

    def identity(self) -> dict[str, str]:
        """What tells this model from any other in a record, as far as it can be told."""
        if self._untold:
            warnings.warn(
                f"{self.id}: no network was found behind {' and '.join(self._untold)}, so a store cannot tell these "
                "weights from others: give another id with other weights",
                stacklevel=2,
            )
        return super().identity()

    def tokenize(self, *given: Any) -> Any:
        """Not offered, nor what builds on it: the functions take texts as they are."""
        raise NotImplementedError

    embed_tokens = _text_features = tokenize


class Wrapped(_OfFunctions):
    """Two functions, one of normalised pixels and one of texts."""

    def _features(self, what: str, given: Any, count: int) -> Tensor:
        found = self._call(what, given)
        if found.shape[:1] != (count,) or found.ndim != 2 or not found.is_floating_point():
            raise ValueError(
                f"{self.id}: {what} must return floating-point features [{count}, d] here, not {found.dtype} "
                f"{tuple(found.shape)}"
            )
        return found

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self._features("image_features", pixels, len(pixels))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm features of texts, float32 [k, d]; see `DualEncoder.encode_text`."""
        texts = text_list(texts)
        chunks = [texts[start : start + TEXT_CHUNK] for start in range(0, len(texts), TEXT_CHUNK)]
        return self._unit(torch.cat([self._features("text_features", part, len(part)) for part in chunks]), of="texts")


def wrap(
    *,
    image_features: Callable[[Tensor], Any],
    text_features: Callable[[list[str]], Any],
    image_size: int,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    id: str = "",
    geometry: Geometry = "shortest-edge-crop",
    interpolation: Interpolation = "bicubic",
    logit_scale: float = 100.0,
) -> DualEncoder:
    """Make a dual encoder of two functions, for everything but learned prompts.

    Parameters
    ----------
    image_features : callable
        Pixels float [b, 3, S, S], normalised, on the model's device and in its dtype (float32 where no network is
        found behind the function), to features [b, d] of any norm.
    text_features : callable
        A list of k texts to features [k, d] of any norm.
    image_size : int
        S, in pixels.
    mean, std : float or three floats
        Of each channel, in [0, 1] pixel units: what the pixels are normalised by.
    id : str
        Default: the name of ``image_features``.
    geometry, interpolation : str
        How images become S x S; see `Preprocessing`. The defaults are CLIP's.
    logit_scale : float
        Of the cosine, for probabilities; answers do not depend on it.

    Returns
    -------
    DualEncoder
        In evaluation mode. The networks behind the functions are parts of it and must be in evaluation mode, too;
        nothing about them is changed.

    Raises
    ------
    TypeError, ValueError
        No functions, or a network in training mode; features that are not [1, d] for one image and one text, or d
        differs; an id that is missing, since a lambda has no name.
    """
    square = Preprocessing(image_size, geometry, interpolation, per_channel(mean), per_channel(std))
    given = {"image_features": image_features, "text_features": text_features}
    model = Wrapped(given, square, id=id, logit_scale=logit_scale)
    with torch.no_grad():
        image = model.encode_image(torch.full((1, 3, image_size, image_size), 0.5), unit=False)
        text = model.encode_text(["x"])
    if image.shape != text.shape:
        raise ValueError(
            f"{model.id}: image_features have length {image.shape[1]}, text_features {text.shape[1]}; both must come "
            "from the projections into the space that images and texts share"
        )
    model.embed_dim = image.shape[1]
    return model


class Classifier(_OfFunctions):
    """A classifier as a dual encoder: its scores are the features of an image, and class k has the k-th unit vector.

    The nearest class is then the one with the largest score, so that tables, stores, perturbations, corruptions and
    studies treat it as they treat any model. It reads no words: class k is the k-th of the data set, whatever its name.

    Parameters
    ----------
    function : callable
        Pixels float [b, 3, S, S] to labels, whole numbers [b] of 0 to ``n_classes - 1``, or to scores float
        [b, n_classes], such as logits: tensors or arrays.
    n_classes : int
    image_size : int
        S, in pixels.
    mean, std : float or three floats
        What pixels in [0, 1] are normalised by before the function sees them; by default nothing.
    id : str
        Default: the function's attribute ``id``, or its name.
    geometry, interpolation : str
        How images become S x S; see `Preprocessing`.

    Raises
    ------
    TypeError, ValueError
        No function, fewer than two classes, a network in training mode, or an id that is missing, since a lambda has
        no name.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        *,
        n_classes: int,
        image_size: int,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        id: str = "",
        geometry: Geometry = "shortest-edge-crop",
        interpolation: Interpolation = "bicubic",
    ) -> None:
        check_whole("n_classes", n_classes, least=2)
        square = Preprocessing(image_size, geometry, interpolation, per_channel(mean), per_channel(std))
        super().__init__({"the classifier": function}, square, id=id, logit_scale=1.0)
        self.embed_dim = n_classes

    def _image_features(self, pixels: Tensor) -> Tensor:
        found, n_classes = self._call("the classifier", pixels), self.embed_dim
        if found.shape == (len(pixels), n_classes) and found.is_floating_point():
            # Features are float32, where log-likelihoods, far from 0, would tie; the largest is at 1 instead.
            return found - found.amax(1, keepdim=True) + 1 if found.dtype == torch.float64 else found
        if found.shape != (len(pixels),) or found.is_floating_point() or found.is_complex():
            raise TypeError(
                f"{self.id} must map {len(pixels)} images to labels, whole numbers [{len(pixels)}], or to scores, "
                f"floats [{len(pixels)}, {n_classes}] for {n_classes} classes, not to {found.dtype} "
                f"{tuple(found.shape)}; probabilities of one class need (p > 0.5)"
            )
        labels = found.long()
        if len(wrong := labels[(labels < 0) | (labels >= n_classes)]):
            raise ValueError(f"{self.id} answered with the label {int(wrong[0])}: classes are 0 to {n_classes - 1}")
        return functional.one_hot(labels, n_classes).float()

    def tokenize(self, *given: Any) -> Any:
        """Not offered, nor what builds on it: a classifier reads no texts."""
        raise NotImplementedError(f"{self.id} is a classifier and reads no texts, so there are no prompts")

    def class_features(self, classes: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
        """Unit vectors, float32 [K, K], whatever the words.

        Raises
        ------
        ValueError
            Another number of classes than the classifier has.
        """
        if len(classes) != self.embed_dim:
            raise ValueError(
                f"{self.id} tells {self.embed_dim} classes apart, these are {len(classes)}: {', '.join(classes)}"
            )
        return torch.eye(self.embed_dim, device=self.device)


def _networks(function: Any) -> list[nn.Module]:
    """Networks that a function is, is bound to, also as attributes or defaults, or names in its source."""
    known = [function]
    while isinstance(function, functools.partial):
        known += [*function.args, *function.keywords.values()]
        function = function.func
    owner = getattr(function, "__self__", function)
    known += [function, owner, *getattr(owner, "__dict__", {}).values()]
    function = inspect.unwrap(function)  # of torch.no_grad and other decorators
    if inspect.isfunction(function):
        known += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        known += inspect.getclosurevars(function).nonlocals.values()
        codes = [function.__code__]
        for code in codes:  # grows: a comprehension or an inner function has a code of its own
            codes += filter(inspect.iscode, code.co_consts)
            known += [function.__globals__.get(name) for name in code.co_names]
    return list(dict.fromkeys(one for one in known if isinstance(one, nn.Module)))


def _name_of(function: Any) -> str:
    """Name of a function or of a network's class."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "id", "") or getattr(function, "__qualname__", type(function).__name__)
    name = str(name).rpartition("<locals>.")[2]
    if name == "<lambda>":
        raise ValueError("a lambda has no name: give id=..., or a function with a name, so that records can tell it")
    return name
