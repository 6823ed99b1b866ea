"""Models by name: which there are, whether their weights are here, where and how they compute, what they can learn."""

import inspect
import logging
import os
import pkgutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from medrobust_lib.checks import check_choice, closest
from medrobust_lib.files import read_sums
from medrobust_lib.models import catalogue, weights
from medrobust_lib.models.catalogue import DUAL_ENCODERS, GENERATIVE, KINDS, Loader, ModelEntry, own_entry, place_hint
from medrobust_lib.places import DEVICE_VARIABLE, DTYPE_VARIABLE, default_weights_dir

if TYPE_CHECKING:
    import torch

    from medrobust_lib.models.dual_encoder import DualEncoder

_DTYPES = ("float32", "bfloat16", "float16")
_COLUMNS = ["id", "family", "image_size", "parameters", "licence", "source", "sha256", "available_offline", "citation"]
_CAPABILITIES = ["kind", "prompts", "adapters"]

QUANTISED: dict[Any, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
}
"""Names of quantised types, and what transformers' BitsAndBytesConfig is told for them."""

# The one place that grows at run time: what register_model was given in this process.
_REGISTERED: dict[str, ModelEntry] = {}


def resolve_device(device: "str | torch.device") -> "torch.device":
    """Device by name; ``"auto"`` is the machine's accelerator (CUDA, MPS, ...) if it has one, else the CPU.

    Raises
    ------
    ValueError
        If the device does not exist on this machine.
    """
    import torch  # deferred: listing models needs none

    if device == "auto":
        accelerated = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); try 'auto' or 'cpu'") from error
    return target


def resolve_dtype(dtype: "str | torch.dtype", device: "torch.device") -> "torch.dtype":
    """Floating-point type by name; ``"auto"`` is float32 on the CPU and bfloat16 elsewhere.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    import torch

    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {name: getattr(torch, name) for name in _DTYPES}
    if dtype in (*known, *known.values()):
        return known.get(dtype, dtype)
    raise ValueError(
        f"dtype must be 'auto', {', '.join(map(repr, _DTYPES))}, not {dtype!r}; load_model also takes 'int8', load_vlm "
        f"{' and '.join(map(repr, QUANTISED))}"
    )


def quantised_options(dtype: str, device: "torch.device") -> dict[str, Any]:
    """Options of transformers' ``from_pretrained`` that quantise weights, by a name of `QUANTISED`, as they are read.

    Raises
    ------
    ImportError
        A package is missing; names the command that installs it.
    ValueError
        bitsandbytes does not compute on this device; names those on which it does.
    """
    missing = " ".join(package for package in ("bitsandbytes", "accelerate") if find_spec(package) is None)
    if missing:
        raise ImportError(f"dtype={dtype!r} needs more packages: pip install {missing}; or choose dtype='bfloat16'")
    from bitsandbytes import supported_torch_devices
    from transformers import BitsAndBytesConfig

    if device.type not in supported_torch_devices:
        raise ValueError(
            f"dtype={dtype!r}: bitsandbytes does not compute on {device.type!r}, only on "
            f"{', '.join(sorted(supported_torch_devices))}; choose such a device, or dtype='bfloat16'"
        )
    # It says of every product of matrices that its inputs are cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": BitsAndBytesConfig(**QUANTISED[dtype]), "device_map": {"": device}}


def preferred(
    device: "str | torch.device" = "auto", dtype: "str | torch.dtype" = "auto"
) -> "tuple[str | torch.device, str | torch.dtype]":
    """Device and type, where they are ``"auto"`` those that ``MEDROBUST_DEVICE`` and ``MEDROBUST_DTYPE`` name.

    The commands set these variables by ``--device`` and ``--dtype``, for notebooks and worker processes too.

    Raises
    ------
    ValueError
        If one of the two variables is asked and names a device or type that cannot be used.
    """
    if device == "auto":
        device = os.environ.get(DEVICE_VARIABLE) or "auto"
        try:
            resolve_device(device)
        except ValueError as error:
            raise ValueError(f"--device or {DEVICE_VARIABLE}: {error}") from error
    if dtype == "auto":
        dtype = os.environ.get(DTYPE_VARIABLE) or "auto"
        check_choice(f"type for --dtype or {DTYPE_VARIABLE}:", dtype, ("auto", *_DTYPES, *QUANTISED))
    return device, dtype


def settled(
    device: "str | torch.device", dtype: "str | torch.dtype", weights_dir: str | Path | None, offline: bool | None
) -> tuple["torch.device", "torch.dtype", Path, bool]:
    """What `load_model` and `load_vlm` are asked for, with defaults filled in; raises as `resolve_device` does."""
    target = resolve_device(device)
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return target, resolve_dtype(dtype, target), _weights_dir(weights_dir), offline


def find_model(id: str, *, generative: bool = False) -> ModelEntry:
    """Row of a model.

    Parameters
    ----------
    id : str
        An id of :func:`list_models`, or of :func:`list_vlms`; ``local-dir:PATH`` for a folder in open_clip's or
        transformers' format; ``hf:OWNER/NAME`` for a model on the hub; or ``python:MODULE:FUNCTION`` for a loader of
        one's own, as in :func:`register_model`.
    generative : bool
        Whether a model that writes text is meant, for :func:`load_vlm`; else a dual encoder.

    Returns
    -------
    ModelEntry
        Its row.

    Raises
    ------
    ValueError
        If the id is unknown (the closest and all ids are named), or that of a model of the other kind.
    """
    own = own_entry(id, generative=generative)
    if own is not None:
        return own
    dual = {entry.id: entry for entry in _dual_encoders()}
    writing = {entry.id: entry for entry in GENERATIVE}
    rows, others = (writing, dual) if generative else (dual, writing)
    if id in rows:
        return rows[id]
    forms = f"{catalogue.LOCAL_DIR_PREFIX}PATH, {catalogue.HUB_PREFIX}OWNER/NAME"
    known = f"{', '.join(rows)}, {forms}{'' if generative else f' or {catalogue.PYTHON_PREFIX}MODULE:FUNCTION'}"
    if id in others:
        kind = "a dual encoder and writes no text" if generative else "a generative model"
        call, parameter = ("load_model", "model") if generative else ("load_vlm", "vlm")
        raise ValueError(
            f"{id!r} is {kind}: load it with {call}({id!r}) (notebooks: the parameter `{parameter}`). "
            f"{'Generative models' if generative else 'Dual encoders'}: {known}"
        )
    # The name under which the hub has a row's model stands for the row.
    close = [row for row in rows if id and rows[row].source.endswith(f":{id}")]
    close = close or closest(id, [*rows, *others], cutoff=0.4)
    hint = f" did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"unknown {'vision-language ' if generative else ''}model {id!r}:{hint}{place_hint(id)} Known: {known}; "
        f"{'dual encoders (load_model)' if generative else 'generative ones (load_vlm)'}: {', '.join(others)}"
    )


def load_model(
    id: str,
    *,
    device: "str | torch.device" = "auto",
    dtype: "str | torch.dtype" = "auto",
    weights_dir: str | Path | None = None,
    offline: bool | None = None,
    adapter: str | Path | None = None,
) -> "DualEncoder":
    """Load a model, ready for inference.

    Parameters
    ----------
    id : str
        An id of :func:`list_models`; ``local-dir:PATH`` for a folder in open_clip's or transformers' format;
        ``hf:OWNER/NAME`` for one on the hub, which is downloaded into the hub cache once; or
        ``python:MODULE:FUNCTION`` for a loader of one's own, as in :func:`register_model`.
    device : str or torch.device
        ``"auto"`` takes what ``MEDROBUST_DEVICE`` names, else the accelerator if there is one, else the CPU.
    dtype : str or torch.dtype
        ``"auto"`` is what ``MEDROBUST_DTYPE`` names, else float32 on the CPU and bfloat16 on an accelerator; or
        ``"float32"``, ``"bfloat16"``, ``"float16"``. ``"int8"``, on the CPU alone,
        quantises the image tower for ONNX Runtime (the ``onnx`` extra):
        texts stay in float32, prompts can be learned, towers cannot. Features are float32 in any case.
    weights_dir : path, optional
        Folder with ``<model id>/<files>``; by default :func:`default_weights_dir`. The hub cache comes next.
    offline : bool, optional
        Never download; by default what the environment variable ``HF_HUB_OFFLINE`` says.
    adapter : path, optional
        Folder of low-rank adapters trained on this model; they are merged into its weights in float32.

    Returns
    -------
    DualEncoder
        In evaluation mode, no parameter requiring a gradient.

    Raises
    ------
    ValueError
        For an unknown id, device or dtype, a model that is no dual encoder (its type named), weights that do not fit
        (keys listed), a wrong SHA-256, an adapter that is damaged or of another model, or int8 on another device or of
        a tower that cannot be quantised.
    FileNotFoundError
        If the weights are missing; names the places looked at and the command that fetches them. If the adapter is.
    ImportError
        For int8, if the ``onnx`` extra is missing; names the line that installs it.
    """
    import torch  # deferred, with the encoder: the table above needs neither

    from medrobust_lib.models.dual_encoder import DualEncoder

    entry = find_model(id)
    device, dtype = preferred(device, dtype)
    in_int8 = dtype in ("int8", torch.int8)
    if in_int8:
        from medrobust_lib.models.int8 import check_int8, int8_tower

        device, dtype = resolve_device("cpu" if device == "auto" else device), torch.float32
        check_int8(device)
    target, precision, folder, offline = settled(device, dtype, weights_dir, offline)
    loader = _resolve_loader(entry)
    # Building a network draws its first weights from torch's global stream; a load must not move the caller's.
    with torch.random.fork_rng(devices=[]):
        model = loader(entry, weights_dir=folder, offline=offline)
    if not isinstance(model, DualEncoder):
        raise ValueError(
            f"the loader of {id!r} must return a DualEncoder, not {type(model).__name__} ({model!r:.60}); its form is "
            "loader(entry, *, weights_dir, offline) -> DualEncoder in float32 on the CPU"
        )
    types = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    if rounded := types - {torch.float32, torch.float64, precision}:
        raise ValueError(
            f"the loader of {id!r} returned weights in {rounded.pop()}, not in float32, so {precision} would be a name "
            "for rounded numbers. A network that is made outside of the loader keeps the type of an earlier load: make "
            "it, or read its weights, within the loader; a checkpoint in that type needs .float() there"
        )
    if adapter is not None:
        from medrobust_lib.models.adapters import load_adapter  # peft is slow to import

        model = load_adapter(model.eval(), adapter)
    if in_int8:
        model.int8 = int8_tower(model.eval())
    # Convolutions run up to twice as fast with the channels innermost; other layers do not mind.
    model.to(device=target, dtype=precision, memory_format=torch.channels_last)
    return model.requires_grad_(False).eval()


def list_models(*, weights_dir: str | Path | None = None) -> pd.DataFrame:
    """Table of the models that :func:`load_model` knows.

    Parameters
    ----------
    weights_dir : path, optional
        Where to look for weights; by default :func:`default_weights_dir`.

    Returns
    -------
    DataFrame
        One row per model: id, family, image_size (pixels), parameters, licence, source, sha256 (by file, where
        known), available_offline, citation, and of a kind that ``kinds.toml`` describes: kind, prompts (whether they
        can be learned) and adapters (where low-rank adapters go).
    """
    of_kinds = {id: {**row, "prompts": "yes" if row["prompts"] else "no"} for row in KINDS for id in row["models"]}
    table = _table(_dual_encoders(), _weights_dir(weights_dir))
    told = [[of_kinds.get(id, {}).get(name, "") for name in _CAPABILITIES] for id in table["id"]]
    return pd.concat([table, pd.DataFrame(told, columns=_CAPABILITIES)], axis=1)


def list_vlms(*, weights_dir: str | Path | None = None) -> pd.DataFrame:
    """Table of the models that `load_vlm` knows.

    Returns
    -------
    DataFrame
        One row per model: the columns of `list_models` but sha256.
    """
    return _table(GENERATIVE, _weights_dir(weights_dir)).drop(columns="sha256")


def _table(entries: Iterable[ModelEntry], weights_dir: Path) -> pd.DataFrame:
    rows = [
        {
            **vars(entry),
            "sha256": read_sums(weights.DEMO_FOLDER / entry.id) if entry.shipped else {},
            "available_offline": available_offline(entry, weights_dir=weights_dir),
        }
        for entry in entries
    ]
    return pd.DataFrame(rows, columns=_COLUMNS).astype({"parameters": "Int64"})


def register_model(
    id: str,
    loader: Loader,
    *,
    family: str,
    image_size: int,
    licence: str,
    source: str,
    citation: str,
    parameters: int | None = None,
) -> None:
    """Add an own model to the table, for this process; ``python:MODULE:FUNCTION`` names a loader everywhere.

    Parameters
    ----------
    id : str
        New name; registering it again replaces the earlier loader.
    loader : callable
        ``loader(entry, *, weights_dir, offline)`` returning a :class:`DualEncoder` in float32 on the CPU.
    family, licence, source, citation : str
        Shown by :func:`list_models`.
    image_size : int
        Side of the image that the model reads, in pixels.
    parameters : int, optional
        Number of parameters.

    Raises
    ------
    ValueError
        If the id belongs to a built-in model or holds the prefix of a folder, the hub or a loader, or the loader
        does not take what loaders are called with.
    TypeError
        If the loader cannot be called.
    """
    if not id or id.startswith(catalogue.OWN_PREFIXES) or any(entry.id == id for entry in DUAL_ENCODERS):
        raise ValueError(f"the model id {id!r} is taken; choose another one")
    if not callable(loader):
        raise TypeError(f"loader must be a function returning a DualEncoder, not {type(loader).__name__}")
    _check_loader(loader, id=id)
    _REGISTERED[id] = ModelEntry(id, family, image_size, licence, source, citation, parameters, loader=loader)


def available_offline(entry: ModelEntry, *, weights_dir: Path) -> bool:
    """Whether a model's weights are in the package, in ``weights_dir`` or in the hub cache."""
    if callable(entry.loader):
        return True
    folder = weights.model_folder(entry, weights_dir)
    if folder is not None:
        return weights.has_checkpoint(folder)
    if entry.source.startswith("https://"):
        return False  # its loader reads that folder only
    if not entry.files:
        cached = _cached_folder(entry)
        return cached is not None and weights.has_checkpoint(cached)
    places = [hub_location(url) for url in entry.files]
    return all(place is not None and _in_hub_cache(*place) for place in places)


def check_kind(entry: ModelEntry, *, weights_dir: Path | None = None) -> None:
    """Raise unless the files of a model, where they are here already, can be loaded: the checks of the loaders.

    Cheap: settings and tokenizers are read, no weights. For the dual encoders of the table there is nothing to check.

    Raises
    ------
    FileNotFoundError
        The folder or one of its files is missing.
    ValueError
        Another kind of model, or a setting that is not supported (names both), or a loader that cannot be called as
        loaders are.
    """
    if callable(entry.loader):
        _check_loader(entry.loader, id=entry.id)
        return
    folder = weights.model_folder(entry, _weights_dir(weights_dir))
    cached = _cached_folder(entry) if entry.source.startswith(catalogue.HUB_PREFIX) else None
    if entry.generative:
        if folder is not None or cached is not None:
            _check_vlm_folder(folder or cached, id=entry.id)
    elif entry.id.startswith(catalogue.LOCAL_DIR_PREFIX):
        _from_room(f"{entry.loader.partition(':')[0]}:check_folder")(folder, id=entry.id)
    elif entry.id.startswith(catalogue.HUB_PREFIX) and cached is not None:
        _check_snapshot(cached, id=entry.id)


def _check_vlm_folder(folder: Path, *, id: str) -> None:
    """`check_kind` for what is here of a generative model."""
    catalogue.check_no_adapter(folder, id=id)
    catalogue.check_writes_text(folder, id=id)
    if id.startswith(catalogue.LOCAL_DIR_PREFIX):
        checkpoints = [path.name for path in folder.glob("*") if path.suffix in weights.CHECKPOINT_SUFFIXES]
        wanted = {catalogue.CONFIG_NAME: [catalogue.CONFIG_NAME], "model weights": checkpoints}
        weights.check_complete(folder, wanted, id=id)
        weights.check_tokenizer(folder, id=id)


def _check_snapshot(folder: Path, *, id: str) -> None:
    """`check_kind` for what is here of a repository of the hub."""
    if (folder / catalogue.OPEN_CLIP_CONFIG_NAME).is_file() and not catalogue.is_dual(folder):
        back_end = "open_clip"
    else:
        catalogue.check_dual(folder, id=id)
        back_end = "transformers_clip"
    if weights.has_checkpoint(folder):  # else the rest is still to be fetched
        _from_room(f"{back_end}:check_folder")(folder, id=id)


def _check_loader(loader: Loader, *, id: str) -> None:
    """Raise ValueError unless a loader of one's own takes what loaders are called with."""
    try:
        inspect.signature(loader).bind(None, weights_dir=None, offline=False)
    except TypeError as error:
        name = getattr(loader, "__name__", type(loader).__name__)
        raise ValueError(
            f"the loader of {id!r} must take the call {name}(entry, weights_dir=..., offline=...) and return a "
            f"DualEncoder in float32 on the CPU: {error}"
        ) from error
    except ValueError:  # compiled functions may not tell
        return


def hub_location(url: str) -> tuple[str, str] | None:
    """Repository and file name on the hub of a URL, or None if it points elsewhere."""
    if not url.startswith(catalogue.HUB_URL) or "/resolve/" not in url:
        return None
    repository, _, path = url.removeprefix(catalogue.HUB_URL).partition("/resolve/")
    return repository, path.partition("/")[2]


def _resolve_loader(entry: ModelEntry) -> Loader:
    if callable(entry.loader):
        _check_loader(entry.loader, id=entry.id)
        return entry.loader
    return _from_room(entry.loader)


def _from_room(place: str) -> Any:
    """The ``"module:function"`` of this room."""
    return pkgutil.resolve_name(f"{catalogue.BACKENDS}.{place}")


def _dual_encoders() -> tuple[ModelEntry, ...]:
    return (*DUAL_ENCODERS, *_REGISTERED.values())


def _weights_dir(given: str | Path | None) -> Path:
    return default_weights_dir() if given is None else Path(given).expanduser()


def _cached_folder(entry: ModelEntry) -> Path | None:
    """The snapshot of an ``hf:`` source in the hub cache, if one of its configurations is in it."""
    repository = entry.source.removeprefix(catalogue.HUB_PREFIX)
    return weights.hub_snapshot(repository, catalogue.CONFIG_NAME, catalogue.OPEN_CLIP_CONFIG_NAME)


def _in_hub_cache(repository: str, name: str) -> bool:
    """Whether a file is in the hub cache; a checkpoint counts in any of its formats."""
    names = (name, *weights.HUB_CHECKPOINTS) if name.endswith(weights.CHECKPOINT_SUFFIXES) else (name,)
    return weights.hub_snapshot(repository, *names) is not None
