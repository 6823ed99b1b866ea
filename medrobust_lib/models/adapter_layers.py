"""Layers of an image tower that low-rank adapters go on: found, opened to them, fitted with them, and closed again.

Most vision transformers compute queries, keys and values by one matrix of three times the width. A low-rank product
on that matrix shares its inner factor among the three; to adapt them separately, as RobustMedCLIP does, they must
first be three layers.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from medrobust_lib.models.dual_encoder import DualEncoder, layers_run, probes


class SplitProjection(nn.Module):
    """Three layers, q, k and v, in the place of one ``nn.Linear`` that gave queries, keys and values side by side.

    On the CPU the output is bit for bit the same if the width is a multiple of 16, else the same up to rounding.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        biases = (None,) * 3 if fused.bias is None else fused.bias.chunk(3)
        for part, weight, bias in zip("qkv", fused.weight.chunk(3), biases, strict=True):
            self.add_module(part, _linear(weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., 3 d]."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def fused(self) -> nn.Linear:
        """The one layer again."""
        layers = (self.q, self.k, self.v)
        bias = None if self.q.bias is None else torch.cat([layer.bias for layer in layers])
        return _linear(torch.cat([layer.weight for layer in layers]), bias)


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` as self-attention, its projections being layers of their own.

    torch's layer hands its weights to a function, past any adapter on a layer. The arithmetic here is that of
    ``nn.MultiheadAttention`` bit for bit, without its shortcut for frozen weights, which rounds differently (about
    1e-6).

    Attributes
    ----------
    qkv : Module
        [..., d] -> [..., 3 d].
    out : Linear
        [..., d] -> [..., d].
    heads : int
        Number of heads.

    Raises
    ------
    ValueError
        The layer does more than self-attention over batches [b, L, d], or has dropout.
    """

    # What torch's transformer layer asks for; without a bias it takes no shortcut past the adapters.
    batch_first, in_proj_bias = True, None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if not is_plain(attention):
            raise ValueError(
                "only attention over [b, L, d] with keys and values of width d, without dropout and added keys, can "
                f"be taken apart, not {attention}"
            )
        self.qkv: nn.Module = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out = attention.out_proj
        self.heads = attention.num_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None,
        key_padding_mask: None = None, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """[b, L, d] and a mask [L, L] or [b * heads, L, L] -> [b, L, d], and None for the weights."""
        if key is not query or value is not query or need_weights or key_padding_mask is not None or is_causal:
            raise ValueError(
                "this layer computes self-attention only, without padding, and returns no attention weights"
            )
        batch, length, width = query.shape
        # Sequence first and the same strides as torch's layer: the order in which sums are taken decides the last bit.
        joint = self.qkv(query.transpose(0, 1)).unflatten(-1, (3, width))
        q, k, v = (
            part.reshape(length, batch * self.heads, -1).transpose(0, 1).view(batch, self.heads, length, -1)
            for part in joint.permute(2, 0, 1, 3).contiguous()
        )
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(batch, self.heads, length, length)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask)
        attended = attended.permute(2, 0, 1, 3).reshape(length * batch, width)
        return self.out(attended).view(length, batch, width).transpose(0, 1), None

    def fused(self) -> nn.MultiheadAttention:
        """The layer of torch again."""
        projection = self.qkv.fused() if isinstance(self.qkv, SplitProjection) else self.qkv
        width = self.out.in_features
        bias = projection.bias is not None
        attention = nn.MultiheadAttention(width, self.heads, bias=bias, batch_first=True, device="meta")
        attention.in_proj_weight = projection.weight
        if bias:
            attention.in_proj_bias = projection.bias
        attention.out_proj = self.out
        return attention


def is_fused(name: str, layer: nn.Module) -> bool:
    """Whether a layer of this name computes queries, keys and values at once: timm's ``qkv``, torch's attention."""
    if isinstance(layer, nn.MultiheadAttention):
        return is_plain(layer)
    return name.rpartition(".")[2] == "qkv" and isinstance(layer, nn.Linear) and layer.out_features % 3 == 0


def is_plain(attention: nn.MultiheadAttention) -> bool:
    """Whether the layer is one that `SelfAttention` can stand for."""
    extras = attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn
    same_width = attention.in_proj_weight is not None
    return same_width and attention.batch_first and not attention.dropout and not extras


def open_attention(tower: nn.Module) -> None:
    """Turn every ``nn.MultiheadAttention`` below `tower` into `SelfAttention`, in place."""
    _replace(tower, lambda _, layer: isinstance(layer, nn.MultiheadAttention), SelfAttention)


def split_qkv(tower: nn.Module) -> None:
    """Make three ``nn.Linear`` called q, k and v of every fused projection below `tower`, in place.

    Fused are timm's ``qkv`` layers, and ``nn.MultiheadAttention`` as open_clip uses it; other towers stay as they
    are. Layers keep device, type and mode; gradients are as before if all parameters of a layer agreed on them.

    Parameters
    ----------
    tower : Module
        A vision transformer, or one block of it.

    Raises
    ------
    ValueError
        An ``nn.MultiheadAttention`` has dropout, added keys or another layout than [b, L, d].
    """
    open_attention(tower)
    _replace(tower, is_fused, SplitProjection)


def fuse_qkv(tower: nn.Module) -> None:
    """Undo `split_qkv` (and `open_attention`) in place: the same keys and values of the state dict as before.

    Adapters must have been merged or taken off.
    """
    for kind in (SelfAttention, SplitProjection):
        _replace(tower, lambda _, layer, kind=kind: isinstance(layer, kind), kind.fused)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Layer with copies of these parameters; made on the meta device, so that no random number is drawn."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _replace(
    tower: nn.Module, chosen: Callable[[str, nn.Module], bool], make: Callable[[nn.Module], nn.Module]
) -> None:
    """Put what is made of a layer in its place, in its mode and requiring gradients as it does."""
    for name, layer in list(tower.named_modules()):
        if name and chosen(name, layer):
            learns = any(parameter.requires_grad for parameter in layer.parameters())
            tower.set_submodule(name, make(layer).train(layer.training).requires_grad_(learns))


ADAPTER = "default"
"""peft's name for the only adapter of a layer."""
_MIDDLE = "parametrizations.weight.original"  # torch's name for what `_Middle` is made of


class _Middle(nn.Module):
    """Kernels of 1 x 1 as the middle of larger ones, which are zero elsewhere."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.row, self.column = height // 2, width // 2
        self.margins = (self.column, width - 1 - self.column, self.row, height - 1 - self.row)

    def forward(self, middle: Tensor) -> Tensor:
        return functional.pad(middle, self.margins)

    def right_inverse(self, kernel: Tensor) -> Tensor:
        return kernel[:, :, self.row : self.row + 1, self.column : self.column + 1].clone()


def keep_middle(module: nn.Module) -> None:
    """Leave A of the adapters of convolutions the middle of its kernel alone, in place; 1 x 1 is what it holds then."""
    for layer in module.modules():
        if isinstance(layer, LoraLayer) and layer.lora_A[ADAPTER].weight[0, 0].numel() > 1:
            side = layer.lora_A[ADAPTER]
            parametrize.register_parametrization(side, "weight", _Middle(*side.kernel_size))


def whole_kernels(module: nn.Module, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of peft's state dict of the module, A as large as its kernel: as peft's files have it."""
    whole = {}
    for name, tensor in adapters.items():
        if name.endswith(_MIDDLE):
            side = name.removesuffix(f".{_MIDDLE}").removesuffix(f".{ADAPTER}")
            name, tensor = f"{side}.weight", module.get_submodule(f"{side}.{ADAPTER}").weight.detach()
        whole[name] = tensor
    return whole


def inject_adapters(module: nn.Module, names: Sequence[str], *, rank: int, middle: bool = False, seed: int = 0) -> None:
    """Let peft put untrained adapters on the layers of these names, in place; all else is frozen.

    B is zero, A drawn from `seed` as ``torch.nn.Linear`` draws its weight; the global random stream stays where it is.
    Of a convolution A has the whole kernel, or only its `middle`.
    """
    # alpha = rank: peft scales by alpha / rank. A string is a regular expression for whole names; peft would match
    # the entries of a list with the ends of names, too.
    config = LoraConfig(r=rank, lora_alpha=rank, bias="none", target_modules="|".join(map(re.escape, names)))
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    if middle:
        keep_middle(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(module).items():
            if ".lora_A." in name:
                start = torch.empty(parameter.shape)
                parameter.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every adapter by their names in the model; empty if there are none."""
    ends = tuple(f".lora_{side}.{ADAPTER}.{name}" for side in "AB" for name in ("weight", _MIDDLE))
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}


def remove_adapters(module: nn.Module) -> None:
    """Take the adapters off in place, after adding their products to the weights; split projections are fused again.

    Raises
    ------
    ValueError
        The weights would become NaN or infinite.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            module.set_submodule(name, layer.get_base_layer())
    fuse_qkv(module)
    del module.peft_config


# How the libraries call three projections that are layers of their own: CLIP and Swin of transformers 5, and its ViT.
_TRIPLES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


class AdapterLayout(NamedTuple):
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

    kind: Literal["query, key, value", "convolutions"]
    names: tuple[str, ...]
    blocks: int
    fused: bool


def adapter_layout(model: DualEncoder) -> AdapterLayout:
    """Layers of the image tower that adapters go to, or went to; nothing is changed.

    These are the query, key and value projections of every attention block: fused ones of timm and of open_clip's own
    transformer, separate ones of transformers' CLIP, ViT and Swin. A tower without them gets adapters on its
    convolutions, but for those of the shortcuts (``downsample``), grouped and dilated ones. Only layers count that
    run when an image is encoded: open_clip's attention pooling, for one, hands the weights of its layers to a function,
    so that an adapter there would learn nothing. The model must be in evaluation mode: an image and a text are encoded.

    Raises
    ------
    ValueError
        The tower has neither, or its convolutions are less than half of it; says what it has.
    """
    if hasattr(model, "attached"):
        return model.attached.layout
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
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    with torch.no_grad():
        image, text = (layers_run(model, encode, kinds) for encode in probes(model))
    return {
        name: layer
        for name, layer in model.named_modules()
        if name in image.keys() - text.keys()
        and not (isinstance(layer, nn.MultiheadAttention) and len({id(given) for given in image[name][:3]}) > 1)
    }


def _is_adaptable_convolution(name: str, layer: nn.Module) -> bool:
    """Not grouped, which peft cannot merge, nor dilated or padded by anything but zeros, which it ignores."""
    if not isinstance(layer, nn.Conv2d) or "downsample" in name.split("."):
        return False
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def _size(layers: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())
