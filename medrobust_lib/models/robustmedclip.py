"""RobustMedCLIP: BiomedCLIP with the authors' low-rank adapters on queries, keys and values.

The authors wrap the fused ``qkv`` layer of every block of the vision tower and add three separate low-rank
products, without any scaling (Imam et al. 2025, arXiv:2505.15425, and its public code). Here the fused layer is taken
apart and peft adapts q, k and v, as in `medrobust_lib.models.adapters`.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from medrobust_lib.models.adapter_layers import (
    ADAPTER,
    PARTS,
    adapter_parameters,
    inject_adapters,
    remove_adapters,
    split_qkv,
)
from medrobust_lib.models.catalogue import OPEN_CLIP_CONFIG_NAME, ModelEntry
from medrobust_lib.models.loading import find_model
from medrobust_lib.models.open_clip import OpenClipEncoder, load_open_clip
from medrobust_lib.models.weights import describe_files, find_weights, load_strictly, read_state_dict

WEIGHT_NAMES = ("model.pth", "lora_weights.safetensors")

_SHORT_KEY = re.compile(r"w_(?P<side>[ab])_(?P<number>\d+)")
_HEAD_KEY = re.compile(r"fc_\d+in_\d+out")
_LONG_KEY = re.compile(
    r"lora_vit\.lora_vit\.trunk\.blocks\.(?P<block>\d+)\.attn\.qkv\.linear_(?P<side>[ab])_(?P<part>[qkv])\.weight"
)


@dataclass(frozen=True)
class QKVAdapter:
    """Low-rank products of one block, one for each adapted third of its ``qkv`` layer.

    Attributes
    ----------
    factors : mapping of str to (Tensor, Tensor)
        ``"q"``, ``"k"`` or ``"v"`` to A [r, d] and B [d, r]; the layer's weight gains ``B @ A`` in that third.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        shapes = {part: (tuple(a.shape), tuple(b.shape)) for part, (a, b) in self.factors.items()}
        if not shapes or set(shapes) - set(PARTS):
            raise ValueError(f"an adapter needs factors of q, k or v, not of {sorted(shapes)}")
        rank, width = next(iter(shapes.values()))[0]
        for part, shape in shapes.items():
            if shape != ((rank, width), (width, rank)):
                raise ValueError(
                    f"the {part} adapter has A {shape[0]} and B {shape[1]}, not A {(rank, width)} and B {(width, rank)}"
                )

    @property
    def rank(self) -> int:
        """Rank r of each product."""
        return next(iter(self.factors.values()))[0].shape[0]

    @property
    def width(self) -> int:
        """Width d of the block."""
        return next(iter(self.factors.values()))[0].shape[1]


def short_adapters(tensors: Mapping[str, Tensor], *, blocks: int, source: str | Path) -> list[QKVAdapter]:
    """Adapters of the authors' ``lora_weights.safetensors``.

    The file numbers its pairs ``w_a_000``, ``w_b_000``, ... block by block. The authors' code collects q and v
    only, so that k, although trained, is not in the file; a file with three pairs a block holds q, k, v.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Entries ``w_a_*`` [r, d] and ``w_b_*`` [d, r].
    blocks : int
        Number of blocks of the vision tower.
    source : str or Path
        Named in the error.

    Returns
    -------
    list of QKVAdapter
        One for each block.

    Raises
    ------
    ValueError
        If the pairs are incomplete, or are neither two nor three a block.
    """
    sides: dict[str, dict[int, Tensor]] = {"a": {}, "b": {}}
    for key, tensor in tensors.items():
        match = _SHORT_KEY.fullmatch(key)
        if match:
            sides[match["side"]][int(match["number"])] = tensor
    numbers = sorted(sides["a"])
    if numbers != sorted(sides["b"]) or numbers != list(range(len(numbers))):
        raise ValueError(
            f"{source}: the adapters must come in pairs numbered from 0; found w_a {numbers}, w_b {sorted(sides['b'])}"
        )
    parts = {2 * blocks: ("q", "v"), 3 * blocks: PARTS}.get(len(numbers))
    if parts is None:
        raise ValueError(
            f"{source} holds {len(numbers)} adapter pairs; a vision tower of {blocks} blocks needs "
            f"{2 * blocks} (q, v) or {3 * blocks} (q, k, v)"
        )
    pairs = [(sides["a"][number], sides["b"][number]) for number in numbers]
    step = len(parts)
    return [QKVAdapter(dict(zip(parts, pairs[i : i + step], strict=True))) for i in range(0, len(pairs), step)]


def split_full_checkpoint(
    state_dict: Mapping[str, Tensor], *, blocks: int, source: str | Path
) -> tuple[list[QKVAdapter], dict[str, Tensor]]:
    """Adapters and backbone of the authors' ``model.pth``.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        ``lora_vit.lora_vit.*`` (vision tower with wrapped ``qkv`` layers) and ``text_encoder.*``.
    blocks : int
        Number of blocks of the vision tower.
    source : str or Path
        Named in the error.

    Returns
    -------
    adapters : list of QKVAdapter
        One for each block.
    backbone : dict of str to Tensor
        The other tensors under open_clip's names. The logit scale is not among them: the authors trained
        without a temperature and did not store it.

    Raises
    ------
    ValueError
        If a block has no q or v adapter, or a factor lacks its partner.
    """
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    backbone = {}
    for key, tensor in state_dict.items():
        match = _LONG_KEY.fullmatch(key)
        if match:
            found.setdefault((int(match["block"]), match["part"]), {})[match["side"]] = tensor
        elif not key.endswith("position_ids"):
            key = key.replace("lora_vit.lora_vit.", "visual.", 1).replace(".attn.qkv.qkv.", ".attn.qkv.")
            backbone[re.sub(r"^text_encoder\.", "text.", key)] = tensor
    needed = {(block, part) for block in range(blocks) for part in ("q", "v")}
    incomplete = [place for place in needed | set(found) if set(found.get(place, ())) != {"a", "b"}]
    outside = [place for place in found if place[0] >= blocks]
    if incomplete or outside:
        named = ", ".join(f"block {block} {part}" for block, part in sorted(incomplete + outside)[:10])
        raise ValueError(f"{source}: adapters missing, incomplete or beyond the {blocks} blocks: {named}")
    adapters = [
        QKVAdapter({part: (pair["a"], pair["b"]) for part in PARTS if (pair := found.get((block, part)))})
        for block in range(blocks)
    ]
    return adapters, backbone


def attach_published_adapters(visual: nn.Module, adapters: Sequence[QKVAdapter]) -> None:
    """Put the authors' adapters on a vision tower in place; `remove_adapters` merges them into its weights.

    Afterwards every block computes ``qkv(x) + [B_q A_q x, B_k A_k x, B_v A_v x]``; an absent product is zero.

    Parameters
    ----------
    visual : Module
        open_clip's timm tower, with ``trunk.blocks[i].attn.qkv``.
    adapters : sequence of QKVAdapter
        One for each block, all of rank r.

    Raises
    ------
    ValueError
        If number, rank or width of the adapters do not fit the tower.
    """
    layers = [block.attn.qkv for block in visual.trunk.blocks]
    ranks = {adapter.rank for adapter in adapters}
    widths = {adapter.width for adapter in adapters}
    if len(adapters) != len(layers) or len(ranks) != 1 or widths != {layers[0].in_features}:
        raise ValueError(
            f"{len(adapters)} adapters of rank {sorted(ranks)} and width {sorted(widths)} do not fit a tower of "
            f"{len(layers)} blocks of width {layers[0].in_features}; all ranks must be equal"
        )
    split_qkv(visual.trunk.blocks)
    places = [f"trunk.blocks.{block}.attn.qkv" for block in range(len(layers))]
    inject_adapters(visual, [f"{place}.{part}" for place in places for part in PARTS], rank=ranks.pop())
    published = {
        f"{place}.{part}.lora_{side}.{ADAPTER}.weight": factor
        for place, adapter in zip(places, adapters, strict=True)
        for part, pair in adapter.factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    with torch.no_grad():
        for name, parameter in adapter_parameters(visual).items():
            if name in published:
                parameter.copy_(published[name])


def apply_checkpoint(clip: nn.Module, tensors: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Turn BiomedCLIP into RobustMedCLIP with either of the authors' two files, in place and unmerged.

    Parameters
    ----------
    clip : Module
        open_clip model with a timm vision tower.
    tensors : mapping of str to Tensor
        Content of ``lora_weights.safetensors`` or ``model.pth``.
    source : str or Path
        Named in errors and warnings.

    Warns
    -----
    UserWarning
        If the file lacks the k adapters: they are then zero, and the model is not the one that was published.

    Raises
    ------
    ValueError
        If keys or shapes do not fit.
    """
    visual = clip.visual
    blocks = len(visual.trunk.blocks)
    if any(_SHORT_KEY.fullmatch(key) for key in tensors):
        adapters = short_adapters(tensors, blocks=blocks, source=source)
        heads = [key for key in tensors if _HEAD_KEY.fullmatch(key)]
        backbone = clip.state_dict() | {
            "visual.head.proj.weight" if key in heads else key: tensor
            for key, tensor in tensors.items()
            if not _SHORT_KEY.fullmatch(key)
        }
    else:
        adapters, backbone = split_full_checkpoint(tensors, blocks=blocks, source=source)
        backbone.setdefault("logit_scale", clip.state_dict()["logit_scale"])
    load_strictly(clip, backbone, source=source)
    without_keys = [block for block, adapter in enumerate(adapters) if "k" not in adapter.factors]
    if without_keys:
        warnings.warn(
            f"{source} holds no k adapters for {len(without_keys)} of {blocks} blocks (the authors' code trains "
            "them but does not save them in lora_weights.safetensors); they are set to zero, so the features "
            "differ from the published model's; use the full model.pth where you can",
            UserWarning,
            stacklevel=2,
        )
    attach_published_adapters(visual, adapters)


def load_robustmedclip(entry: ModelEntry, *, weights_dir: Path | None, offline: bool) -> OpenClipEncoder:
    """RobustMedCLIP: BiomedCLIP with the adapters in ``weights_dir/<id>/`` merged into its weights.

    ``model.pth`` is preferred, since ``lora_weights.safetensors`` lacks the k adapters.

    Parameters
    ----------
    entry : ModelEntry
        Row of the registry.
    weights_dir : Path or None
        Folder of all weights. BiomedCLIP is taken from ``weights_dir/<id>/`` if its configuration lies there, else
        loaded as the model ``biomedclip`` (its own folder, then the hub).
    offline : bool
        Whether to leave the network alone.

    Returns
    -------
    OpenClipEncoder
        In float32 on the CPU, frozen, in evaluation mode. Its logit scale is BiomedCLIP's: the authors trained
        and scored without one.

    Warns
    -----
    UserWarning
        If the file lacks the k adapters.

    Raises
    ------
    FileNotFoundError
        If the adapters or BiomedCLIP are missing, naming the places looked at and the command to run.
    ValueError
        If keys or shapes do not fit.
    """
    weights = find_weights(entry, WEIGHT_NAMES, weights_dir=weights_dir)
    base_entry = find_model("biomedclip")
    if (weights.parent / OPEN_CLIP_CONFIG_NAME).is_file():
        base_entry = replace(base_entry, id=entry.id)
    encoder = load_open_clip(base_entry, weights_dir=weights_dir, offline=offline)
    apply_checkpoint(encoder.model, read_state_dict(weights), source=weights)
    remove_adapters(encoder.model.visual)
    encoder.id = entry.id
    encoder.provenance = {
        **describe_files(entry, weights),
        "base": {"id": "biomedclip", **encoder.provenance},
    }
    return encoder.eval().requires_grad_(False)
