"""RobustMedCLIP: BiomedCLIP with the authors' low-rank adapters on queries, keys and values.

The authors wrap the fused ``qkv`` layer of every block of the vision tower and add three separate low-rank
products, without any scaling (Imam et al. 2025, arXiv:2505.15425, and its public code). Here each product is added to
its third of the layer's weight.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from medrobust_lib.models.catalogue import OPEN_CLIP_CONFIG_NAME, ModelEntry
from medrobust_lib.models.loading import find_model
from medrobust_lib.models.open_clip import OpenClipEncoder, load_open_clip
from medrobust_lib.models.weights import describe_files, find_weights, load_strictly, read_state_dict

# A [r, d] and B [d, r] by block and part (q, k or v) of its layer, whose weight gains B @ A in that third.
Adapters = dict[tuple[int, str], tuple[Tensor, Tensor]]

_SHORT_KEY = re.compile(r"w_(?P<side>[ab])_(?P<number>\d+)")
_HEAD_KEY = re.compile(r"fc_\d+in_\d+out")
_LONG_KEY = re.compile(
    r"lora_vit\.lora_vit\.trunk\.blocks\.(?P<block>\d+)\.attn\.qkv\.linear_(?P<side>[ab])_(?P<part>[qkv])\.weight"
)


def short_adapters(tensors: Mapping[str, Tensor], *, blocks: int, source: str | Path) -> Adapters:
    """Adapters of the authors' ``lora_weights.safetensors``, for a vision tower of so many blocks.

    The file numbers its pairs ``w_a_000``, ``w_b_000``, ... block by block. The authors' code collects q and v
    only, so that k, although trained, is not in the file; a file with three pairs a block holds q, k, v.

    Raises
    ------
    ValueError
        If the pairs are incomplete, or are neither two nor three a block; names the `source`.
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
    parts = {2 * blocks: "qv", 3 * blocks: "qkv"}.get(len(numbers))
    if parts is None:
        raise ValueError(
            f"{source} holds {len(numbers)} adapter pairs; a vision tower of {blocks} blocks needs "
            f"{2 * blocks} (q, v) or {3 * blocks} (q, k, v)"
        )
    places = [(block, part) for block in range(blocks) for part in parts]
    return {place: (sides["a"][number], sides["b"][number]) for number, place in enumerate(places)}


def split_full_checkpoint(
    state_dict: Mapping[str, Tensor], *, blocks: int, source: str | Path
) -> tuple[Adapters, dict[str, Tensor]]:
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
    adapters : dict
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
    needed = {(block, part) for block in range(blocks) for part in "qv"}
    incomplete = [place for place in needed | set(found) if set(found.get(place, ())) != {"a", "b"}]
    outside = [place for place in found if place[0] >= blocks]
    if incomplete or outside:
        named = ", ".join(f"block {block} {part}" for block, part in sorted(incomplete + outside)[:10])
        raise ValueError(f"{source}: adapters missing, incomplete or beyond the {blocks} blocks: {named}")
    return {place: (pair["a"], pair["b"]) for place, pair in found.items()}, backbone


def add_products(visual: nn.Module, adapters: Adapters, *, source: str | Path) -> None:
    """Add the products to the weights of open_clip's timm tower, with ``trunk.blocks[i].attn.qkv``, in place.

    Raises
    ------
    ValueError
        If a pair does not fit its layer, or would make its weight NaN or infinite.
    """
    for (block, part), (a, b) in adapters.items():
        layer = visual.trunk.blocks[block].attn.qkv
        width = layer.in_features
        if a.ndim != 2 or a.shape[1] != width or b.shape != a.shape[::-1]:
            raise ValueError(
                f"{source}, block {block}: the {part} adapter has A {tuple(a.shape)} and B {tuple(b.shape)}, not "
                f"A (r, {width}) and B ({width}, r)"
            )
        product = b.to(layer.weight) @ a.to(layer.weight)
        if not product.isfinite().all():
            raise ValueError(f"{source}, block {block}: the {part} adapter holds NaN or infinite values")
        with torch.no_grad():
            layer.weight[width * "qkv".index(part) :][:width] += product


def apply_checkpoint(clip: nn.Module, tensors: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Turn BiomedCLIP into RobustMedCLIP with either of the authors' two files, in place.

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
    blocks = len(clip.visual.trunk.blocks)
    if any(_SHORT_KEY.fullmatch(key) for key in tensors):
        adapters = short_adapters(tensors, blocks=blocks, source=source)
        backbone = clip.state_dict() | {
            "visual.head.proj.weight" if _HEAD_KEY.fullmatch(key) else key: tensor
            for key, tensor in tensors.items()
            if not _SHORT_KEY.fullmatch(key)
        }
    else:
        adapters, backbone = split_full_checkpoint(tensors, blocks=blocks, source=source)
        backbone.setdefault("logit_scale", clip.state_dict()["logit_scale"])
    load_strictly(clip, backbone, source=source)
    without_keys = blocks - sum(part == "k" for _, part in adapters)
    if without_keys:
        warnings.warn(
            f"{source} holds no k adapters for {without_keys} of {blocks} blocks (the authors' code trains "
            "them but does not save them in lora_weights.safetensors); they are set to zero, so the features "
            "differ from the published model's; use the full model.pth where you can",
            UserWarning,
            stacklevel=2,
        )
    add_products(clip.visual, adapters, source=source)


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
    weights = find_weights(entry, ("model.pth", "lora_weights.safetensors"), weights_dir=weights_dir)
    base_entry = find_model("biomedclip")
    if (weights.parent / OPEN_CLIP_CONFIG_NAME).is_file():
        base_entry = replace(base_entry, id=entry.id)
    encoder = load_open_clip(base_entry, weights_dir=weights_dir, offline=offline)
    apply_checkpoint(encoder.model, read_state_dict(weights), source=weights)
    encoder.id = entry.id
    encoder.provenance = {**describe_files(entry, weights), "base": {"id": "biomedclip", **encoder.provenance}}
    return encoder.eval().requires_grad_(False)
