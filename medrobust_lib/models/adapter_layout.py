"""Which layers of an image tower low-rank adapters go to."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from medrobust_lib.models.dual_encoder import BrokenFeaturesError, DualEncoder
from medrobust_lib.models.qkv import is_fused

Kind = Literal["query, key, value", "convolutions"]

# How the libraries call three projections that are layers of their own: CLIP and Swin of transformers 5, and its ViT.
_TRIPLES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


@dataclass(frozen=True)
class AdapterLayout:
    """Where the adapters of a model go.

    Attributes
    ----------
    kind : str
        "query, key, value" or "convolutions".
    names : tuple of str
        Full names of the layers in the model: the fused projections, or q, k and v of each block, or convolutions.
    blocks : int
        Number of attention blocks; for convolutions their number.
    fused : bool
        Whether one layer of the model computes queries, keys and values.
    """

    kind: Kind
    names: tuple[str, ...]
    blocks: int
    fused: bool


def find_adapter_layout(model: DualEncoder) -> AdapterLayout:
    """Find the layers of the image tower that adapters go to; nothing is changed.

    These are the query, key and value projections of every attention block: fused ones of timm and of open_clip's own
    transformer, separate ones of transformers' CLIP, ViT and Swin. A tower without them gets adapters on its
    convolutions, but for those of the shortcuts (``downsample``), grouped and dilated ones. Only layers count that
    run when an image is encoded: open_clip's attention pooling, for one, hands the weights of its layers to a function,
    so that an adapter there would learn nothing.

    Raises
    ------
    ValueError
        The tower has neither, or its convolutions are less than half of it; says what it has.
    """
    layers = _image_layers(model)
    fused = tuple(name for name, layer in layers.items() if is_fused(name, layer))
    if fused:
        return AdapterLayout("query, key, value", fused, len(fused), fused=True)
    triples = tuple(
        names
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers)
        for names in (tuple(f"{parent}.{part}" for part in triple) for triple in _TRIPLES)
        if all(isinstance(layers.get(name), nn.Linear) for name in names)
    )
    if triples:
        return AdapterLayout("query, key, value", sum(triples, ()), len(triples), fused=False)
    convolutions = {name: layer for name, layer in layers.items() if _is_adaptable_convolution(name, layer)}
    if 2 * _size(convolutions.values()) < _size(layers.values()) or not convolutions:
        kinds = Counter(type(layer).__name__ for layer in layers.values())
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no layer with weights"
        raise ValueError(
            f"{model.id}: no place for adapters: the image tower has neither query, key and value projections that "
            f"are layers nor mainly plain convolutions; it has {found}"
        )
    return AdapterLayout("convolutions", tuple(convolutions), len(convolutions), fused=False)


def _image_layers(model: DualEncoder) -> dict[str, nn.Module]:
    """Linear, convolution and self-attention layers that run for an image and not for a text, in the model's order."""
    grey = torch.full((1, 3, model.image_size, model.image_size), 0.5, device=model.device)
    with torch.no_grad():
        own = _run(model, lambda: model.encode_image(grey)) - _run(model, lambda: model.encode_text(["x"]))
    return {name: layer for name, layer in model.named_modules() if name in own}


def _run(model: DualEncoder, encode: Callable[[], Tensor]) -> set[str]:
    found: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
            if not isinstance(layer, nn.MultiheadAttention) or len({id(given) for given in inputs[:3]}) == 1:
                found.add(name)

        return hook

    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    hooks = [
        layer.register_forward_hook(note(name)) for name, layer in model.named_modules() if isinstance(layer, kinds)
    ]
    try:
        with contextlib.suppress(BrokenFeaturesError):  # which layers run is asked, not what they give
            encode()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _is_adaptable_convolution(name: str, layer: nn.Module) -> bool:
    """Not grouped, which peft cannot merge, nor dilated or padded by anything but zeros, which it ignores."""
    if not isinstance(layer, nn.Conv2d) or "downsample" in name.split("."):
        return False
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def _size(layers: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())
