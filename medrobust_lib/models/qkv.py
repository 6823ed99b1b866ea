"""Query, key and value projections of attention apart from each other, and fused again.

Most vision transformers compute queries, keys and values by one matrix of three times the width. A low-rank product
on that matrix shares its inner factor among the three; to adapt them separately, as RobustMedCLIP does, they must
first be three layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

PARTS = ("q", "k", "v")


class SplitProjection(nn.Module):
    """Three layers in the place of one ``nn.Linear`` that gave queries, keys and values side by side.

    On the CPU the output is bit for bit the same if the width is a multiple of 16, else the same up to rounding.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        biases = (None,) * 3 if fused.bias is None else fused.bias.chunk(3)
        for part, weight, bias in zip(PARTS, fused.weight.chunk(3), biases, strict=True):
            self.add_module(part, _linear(weight.detach().clone(), None if bias is None else bias.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., 3 d]."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def fused(self) -> nn.Linear:
        """The one layer again."""
        layers = (self.q, self.k, self.v)
        bias = None if self.q.bias is None else torch.cat([layer.bias.detach() for layer in layers])
        return _linear(torch.cat([layer.weight.detach() for layer in layers]), bias)


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

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if not is_plain(attention):
            raise ValueError(
                "only attention over [b, L, d] with keys and values of width d, without dropout and added keys, can "
                f"be taken apart, not {attention}"
            )
        bias = attention.in_proj_bias
        self.qkv: nn.Module = _linear(
            attention.in_proj_weight.detach().clone(), None if bias is None else bias.detach().clone()
        )
        self.out = attention.out_proj
        self.heads = attention.num_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[b, L, d] and a mask [L, L] or [b * heads, L, L] -> [b, L, d], and None for the weights."""
        if key is not query or value is not query or need_weights:
            raise ValueError("this layer computes self-attention only, and returns no attention weights")
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
    for name, layer in list(tower.named_modules()):
        if name and isinstance(layer, nn.MultiheadAttention):
            tower.set_submodule(name, _like(SelfAttention(layer), layer))


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
    for name, layer in list(tower.named_modules()):
        if name and is_fused(name, layer):
            tower.set_submodule(name, _like(SplitProjection(layer), layer))


def fuse_qkv(tower: nn.Module) -> None:
    """Undo `split_qkv` (and `open_attention`) in place: the same keys and values of the state dict as before.

    Adapters must have been merged or taken off.
    """
    for kind in (SelfAttention, SplitProjection):
        for name, layer in list(tower.named_modules()):
            if name and isinstance(layer, kind):
                tower.set_submodule(name, _like(layer.fused(), layer))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Layer with these parameters; made on the meta device, so that no random number is drawn."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _like(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` in the mode of `old`, requiring gradients as it does."""
    return new.train(old.training).requires_grad_(any(parameter.requires_grad for parameter in old.parameters()))
