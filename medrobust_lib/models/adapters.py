"""Low-rank adapters (LoRA, through peft) on the image tower of any dual encoder.

The frozen weight W of a layer gains a product B A of rank r, with B = 0 at the start, so that the adapted model begins
as the model itself; nothing is scaled and nothing is dropped. In a vision transformer the adapted layers are the
query, key and value projections of every attention block (Imam et al. 2025, arXiv:2505.15425); in a residual network
they are the convolutions, where A is a convolution with the kernel and stride of the layer, or with the middle of that
kernel alone, and B one of 1 x 1. The text tower is never touched.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft import __version__ as peft_version
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from medrobust_lib.checks import check_choice, check_whole
from medrobust_lib.files import file_sha256, parsed, save_tensors
from medrobust_lib.models import adapter_layers
from medrobust_lib.models.adapter_layers import AdapterLayout, adapter_layout, adapter_parameters, inject_adapters
from medrobust_lib.models.catalogue import ADAPTER_CONFIG_NAME, foreign_adapter
from medrobust_lib.models.dual_encoder import DualEncoder, find_image_tower, probes
from medrobust_lib.models.weights import explained_errors, fingerprint
from medrobust_lib.places import VERSION

QKV = Literal["separate", "fused"]
Kernel = Literal["whole", "middle"]

_TENSORS, _CONFIG, _PROVENANCE = "adapter_model.safetensors", ADAPTER_CONFIG_NAME, "provenance.json"
_PEFT_PREFIX = "base_model.model."
_FORMAT = 1


class AttachedAdapters(NamedTuple):
    """What an adapted model keeps about its adapters.

    Attributes
    ----------
    base_id : str
        ``id`` of the model that was adapted.
    base_weights : str
        Its `weights_identity`.
    layout : AdapterLayout
        Of that model.
    rank : int
    qkv : str
        "separate" or "fused".
    kernel : str
        "whole" or "middle".
    """

    base_id: str
    base_weights: str
    layout: AdapterLayout
    rank: int
    qkv: QKV
    kernel: Kernel


class TrainableShare(NamedTuple):
    """Numbers of parameters; the adapters count in all three."""

    adapters: int
    image_tower: int
    model: int


def attach_adapters(
    model: DualEncoder, *, rank: int = 16, qkv: QKV = "separate", kernel: Kernel = "whole", seed: int = 0
) -> DualEncoder:
    """Copy of the model with low-rank adapters that have yet to learn.

    Parameters
    ----------
    model : DualEncoder
        Not changed. The copy is in float32, whatever the model's type.
    rank : int
        r, at least 1.
    qkv : str
        "separate" takes a fused projection apart and gives q, k and v an adapter each: 6 r d numbers a block of width
        d. "fused" puts one adapter on the fused projection, which therefore shares A: 4 r d numbers.
        The two differ where the tower has a fused projection; elsewhere "fused" is refused.
    kernel : str
        Of A on a convolution: "whole", the layer's, or "middle", 1 x 1 on the pixels under the middle of the layer's
        kernel: RobustMedCLIP's path beside a convolution, for an even number of rows at a stride of 2. Only for a
        tower that is adapted on its convolutions.
    seed : int
        Of A, drawn as by ``torch.nn.Linear``; B is zero. The global random stream stays where it is.

    Returns
    -------
    DualEncoder
        In evaluation mode, on the device of `model`, with the same id; only the adapters require a gradient.
        Features are exactly those of `model`; up to rounding (about 1e-6) in open_clip's own transformer, whose
        attention torch computes by a shortcut while all its weights are frozen.

    Raises
    ------
    ValueError
        A parameter out of range, a model that has adapters already or is in float16, or a tower without a place or a
        gradient.

    References
    ----------
    Hu et al. 2022, arXiv:2106.09685.
    """
    check_whole("rank", rank, hint=", usually 4, 8 or 16")
    check_choice("qkv", qkv, get_args(QKV))
    check_choice("kernel", kernel, get_args(Kernel))
    if attached_adapters(model) is not None:
        raise ValueError(f"{model.id} has adapters already; merge_adapters makes a plain model of it first")
    with torch.inference_mode(False):
        identity = weights_identity(model)
        adapted = model.trainable_copy()
        layout = adapter_layout(adapted)
        if qkv == "fused" and not layout.fused:
            raise ValueError(
                f"qkv='fused': {model.id} has no fused query-key-value projection (its adapters go on "
                f"{layout.kind.replace('query, key, value', 'separate query, key, value layers')}); take 'separate'"
            )
        if kernel == "middle" and layout.kind != "convolutions":
            raise ValueError(f"kernel='middle': the adapters of {model.id} go on {layout.kind} layers; take 'whole'")
        names = _open_layers(adapted, layout, qkv)
        inject_adapters(adapted, names, rank=rank, middle=kernel == "middle", seed=seed)
        with torch.enable_grad():
            if not probes(adapted.eval())[0]().requires_grad:
                raise ValueError(
                    f"{model.id}: adapters cannot learn, since no gradient reaches them from the features of an image: "
                    "labels have none, scores do"
                )
    adapted.attached = AttachedAdapters(model.id, identity, layout, rank, qkv, kernel)
    return adapted.eval()  # peft makes its layers in training mode


def attached_adapters(model: DualEncoder) -> AttachedAdapters | None:
    """What is known about the adapters of a model; None for one without, or with merged ones."""
    return getattr(model, "attached", None)


def trainable_share(model: DualEncoder) -> TrainableShare:
    """Parameters of the adapters, of the whole image tower and of the whole model, which is in evaluation mode."""
    with torch.inference_mode(False), torch.enable_grad():
        tower = find_image_tower(copy.deepcopy(model)).parameters
    groups = adapter_parameters(model).values(), tower.values(), model.parameters()
    return TrainableShare(*(sum(parameter.numel() for parameter in group) for group in groups))


def merge_adapters(model: DualEncoder) -> DualEncoder:
    """Copy of the model with the products added to the weights: the layers and state-dict keys of the base again.

    Returns
    -------
    DualEncoder
        Frozen, in evaluation mode, with the id and provenance of `model`.

    Raises
    ------
    ValueError
        The model has no adapters, or they hold NaN or infinite values.
    """
    _required(model)
    with torch.inference_mode(False):
        merged = copy.deepcopy(model)
        adapter_layers.remove_adapters(merged)
    del merged.attached
    return merged.eval().requires_grad_(False)


def save_adapter(
    model: DualEncoder, folder: Path | str, *, provenance: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> Path:
    """Write the adapters of a model, unmerged, as a folder that is there whole or not at all.

    It holds peft's ``adapter_model.safetensors`` and ``adapter_config.json``, and ``provenance.json``: what was given,
    and under "adapter" the base model with the fingerprint of its weights, rank, layout, hashes and versions.

    Parameters
    ----------
    model : DualEncoder
        From `attach_adapters`, trained.
    folder : path
        New; its name becomes part of the id of the model that `load_adapter` makes.
    provenance : mapping
        JSON values: how the adapters were trained.
    dtype : torch.dtype
        Of the file; ``torch.float16`` halves it and rounds. Adapters compute in float32 again when loaded.

    Raises
    ------
    ValueError
        The model has no adapters, or `provenance` has "adapter" itself or holds what is no JSON.
    FileExistsError
        There is something at `folder`.
    """
    attached = _required(model)
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists; delete it or give another folder, adapters are not overwritten")
    if "adapter" in provenance:
        raise ValueError("provenance has an entry 'adapter', which is kept for the adapter itself; rename it")
    adapters = adapter_layers.whole_kernels(model, get_peft_model_state_dict(model, save_embedding_layers=False))
    tensors = {f"{_PEFT_PREFIX}{name}": tensor.to(dtype) for name, tensor in adapters.items()}
    try:
        given = json.dumps(dict(provenance), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance holds more than JSON values: {error}") from error
    with whole_folder(folder) as partial:
        save_tensors(partial / _TENSORS, tensors)
        config = replace(model.peft_config[adapter_layers.ADAPTER], inference_mode=True)
        config.save_pretrained(str(partial))
        adapter = {
            "format": _FORMAT,
            "base": {"id": attached.base_id, "weights": attached.base_weights},
            "kind": attached.layout.kind,
            "blocks": attached.layout.blocks,
            "rank": attached.rank,
            "qkv": attached.qkv,
            "kernel": attached.kernel,
            "parameters": sum(parameter.numel() for parameter in adapter_parameters(model).values()),
            "files": {name: file_sha256(partial / name) for name in (_TENSORS, _CONFIG)},
            "versions": {"medrobust_lib": VERSION, "peft": peft_version, "torch": torch.__version__},
        }
        text = json.dumps({**json.loads(given), "adapter": adapter}, indent=1)
        (partial / _PROVENANCE).write_text(text + "\n", encoding="utf-8")
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` if all goes well and disappears otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield partial
        partial.chmod(0o755)  # made for the owner only
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone if all went well


def describe_adapter(folder: Path | str) -> dict[str, Any]:
    """Content of ``provenance.json`` of an adapter folder whose files are those that were written.

    Raises
    ------
    FileNotFoundError
        The folder or one of its files is not there.
    ValueError
        A file is damaged or of another format.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder {folder}; save_adapter or adapt_lora writes one")
    missing = [name for name in (_TENSORS, _CONFIG, _PROVENANCE) if not (folder / name).is_file()]
    if missing:
        foreign = f". If save_adapter did not write it: {foreign_adapter(folder)}" if missing == [_PROVENANCE] else ""
        raise FileNotFoundError(
            f"the adapter folder {folder} lacks {', '.join(missing)}; copy it anew or train again{foreign}"
        )
    with parsed(f"{folder / _PROVENANCE} is damaged or of another kind", "Copy the folder anew or train again."):
        content = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))
        adapter = content["adapter"]
        written, known = adapter["format"], dict(adapter["files"])
    if written != _FORMAT:
        raise ValueError(f"{folder} holds an adapter of format {written!r}, not {_FORMAT}: another version wrote it")
    for name in (_TENSORS, _CONFIG):
        if known.get(name) != file_sha256(folder / name):
            raise ValueError(f"{folder / name} is damaged: it is not the file that was saved; copy it anew")
    return content


def load_adapter(model: DualEncoder, folder: Path | str, *, merged: bool = True) -> DualEncoder:
    """Copy of the model with the adapters of a folder; nothing but the folder is read.

    Parameters
    ----------
    model : DualEncoder
        The model that was adapted, in float32 or bfloat16; not changed. In bfloat16 the sums are rounded to it.
    folder : path
        What `save_adapter` wrote.
    merged : bool
        Add the products to the weights: as fast as the base. Else the adapters stay apart.

    Returns
    -------
    DualEncoder
        Frozen, in evaluation mode, with device and type of `model`. Its id is that of `model`, a plus sign and the
        name of the folder; its provenance is that of the folder, with the provenance of `model` under the base.

    Raises
    ------
    FileNotFoundError
        The folder or one of its files is not there.
    ValueError
        A file is damaged, or the adapters belong to other weights; both models are named.
    """
    folder = Path(folder).expanduser()
    content = describe_adapter(folder)
    adapter = content["adapter"]
    base, given = adapter["base"], weights_identity(model)
    if base["weights"] != given:
        raise ValueError(
            f"the adapter {folder} was trained on {base['id']!r} with weights {base['weights']}, not on {model.id!r} "
            f"with weights {given}; load that model, or train an adapter of this one"
        )
    with explained_errors(str(folder)):
        tensors = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in load_file(folder / _TENSORS).items()}
    with torch.inference_mode(False):
        adapted = attach_adapters(model, rank=adapter["rank"], qkv=adapter["qkv"])
        expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
        if expected != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError(f"the adapter {folder} does not fit the layers of {model.id!r}; train it again")
        set_peft_model_state_dict(adapted, tensors)
        if adapter.get("kernel") == "middle":
            adapter_layers.keep_middle(adapted)
            adapted.attached = adapted.attached._replace(kernel="middle")
        if merged:
            adapter_layers.remove_adapters(adapted)
            del adapted.attached
        adapted = adapted.requires_grad_(False).to(model.dtype)
    adapted.id = f"{model.id} + {folder.resolve().name}"
    origin = {**model.provenance, "id": model.id, "weights": given}
    adapted.provenance = {**content, "adapter": {**adapter, "base": origin}}
    return adapted


def weights_identity(model: DualEncoder) -> str:
    """Fingerprint of the weights rounded to bfloat16: the same for a model in float32 and in bfloat16.

    Raises
    ------
    ValueError
        The model is in float16, from which the bfloat16 values cannot be had.
    """
    if model.dtype == torch.float16:
        raise ValueError(
            f"{model.id} is in float16, in which its weights cannot be recognised; load it in float32 or bfloat16, or "
            "give load_model the adapter, which it applies before it changes the type"
        )
    tensors = model.state_dict().values()
    return fingerprint([tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in tensors])


def _required(model: DualEncoder) -> AttachedAdapters:
    attached = attached_adapters(model)
    if attached is None:
        raise ValueError(f"{model.id} has no adapters; attach_adapters gives a copy that has")
    return attached


def _open_layers(model: DualEncoder, layout: AdapterLayout, qkv: QKV) -> list[str]:
    """Make layers of the fused projections where needed, in place; returns the names of those to adapt."""
    if not layout.fused:
        return list(layout.names)
    names = []
    for name in layout.names:
        block = model.get_submodule(name.rpartition(".")[0])
        projection = f"{name}.qkv" if isinstance(model.get_submodule(name), nn.MultiheadAttention) else name
        if qkv == "separate":
            adapter_layers.split_qkv(block)
            names += [f"{projection}.{part}" for part in "qkv"]
        else:
            adapter_layers.open_attention(block)
            names.append(projection)
    return names
