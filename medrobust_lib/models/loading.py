"""Where and in which precision a model computes."""

import importlib
import inspect
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pandas as pd

from medrobust_lib.checks import closest
from medrobust_lib.downloads import read_sums
from medrobust_lib.models.catalogue import (
    BACKENDS,
    CONFIG_NAME,
    DEMO_VLM,
    DUAL_ENCODERS,
    FOLDER_PREFIX,
    GENERATIVE,
    HUB_PREFIX,
    HUB_URL,
    LOCAL_DIR_PREFIX,
    OPEN_CLIP_CONFIG_NAME,
    PYTHON_PREFIX,
    Loader,
    ModelEntry,
    VlmEntry,
    folder_entry,
    hub_entry,
    place_hint,
    python_entry,
)
from medrobust_lib.models.weights import (
    CHECKPOINT_SUFFIXES,
    DEMO_FOLDER,
    HUB_CHECKPOINTS,
    check_clip_type,
    check_no_adapter,
    check_tokenizer,
    check_writes_text,
    has_checkpoint,
    hub_snapshot,
    is_clip,
    local_folder,
)
from medrobust_lib.places import default_weights_dir

if TYPE_CHECKING:
    import torch

    from medrobust_lib.models.dual_encoder import DualEncoder

_DTYPES = ("float32", "bfloat16", "float16")


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
    if isinstance(dtype, torch.dtype) and dtype in [getattr(torch, name) for name in _DTYPES]:
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return getattr(torch, dtype)
    raise ValueError(f"dtype must be 'auto', {', '.join(map(repr, _DTYPES))}, not {dtype!r}")


_OWN_IDS = f"{LOCAL_DIR_PREFIX}PATH, {HUB_PREFIX}OWNER/NAME or {PYTHON_PREFIX}MODULE:FUNCTION"

# The one place that grows at run time: what register_model was given in this process.
_REGISTERED: dict[str, ModelEntry] = {}


def find_model(id: str) -> ModelEntry:
    """Row of a model.

    Parameters
    ----------
    id : str
        An id of :func:`list_models`; ``local-dir:PATH`` for a folder in open_clip's or transformers' format;
        ``hf:OWNER/NAME`` for a CLIP on the hub; or ``python:MODULE:FUNCTION`` for a loader of one's own, as in
        :func:`register_model`.

    Returns
    -------
    ModelEntry
        Its row.

    Raises
    ------
    ValueError
        If the id is unknown (the closest and all ids are named), or that of a generative model.
    """
    if id.startswith(LOCAL_DIR_PREFIX):
        return folder_entry(id)
    if id.startswith(HUB_PREFIX):
        return hub_entry(id)
    if id.startswith(PYTHON_PREFIX):
        return python_entry(id)
    rows = {entry.id: entry for entry in _entries()}
    if id in rows:
        return rows[id]
    generative = [entry.id for entry in GENERATIVE]
    if id in generative:
        raise ValueError(
            f"{id!r} is a generative model: load it with load_vlm({id!r}) (notebooks: the parameter `vlm`). "
            f"Dual encoders: {', '.join(rows)}, {_OWN_IDS}"
        )
    # The name under which the hub has a row's model stands for the row.
    close = [row for row in rows if id and rows[row].source.endswith(f":{id}")]
    close = close or closest(id, [*rows, *generative], cutoff=0.4)
    hint = f" did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"unknown model {id!r}:{hint}{place_hint(id)} Known: {', '.join(rows)}, {_OWN_IDS}; "
        f"generative ones (load_vlm): {', '.join(generative)}"
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
        ``hf:OWNER/NAME`` for a CLIP on the hub, which is downloaded into the hub cache once; or
        ``python:MODULE:FUNCTION`` for a loader of one's own, as in :func:`register_model`.
    device : str or torch.device
        ``"auto"`` takes the accelerator if there is one, else the CPU.
    dtype : str or torch.dtype
        ``"auto"`` is float32 on the CPU and bfloat16 on an accelerator; or ``"float32"``, ``"bfloat16"``,
        ``"float16"``. Features are float32 in any case.
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
        For an unknown id, device or dtype, a model that is no CLIP (its type named), weights that do not fit (keys
        listed), a wrong SHA-256, or an adapter that is damaged or of another model.
    FileNotFoundError
        If the weights are missing; names the places looked at and the command that fetches them. If the adapter is.
    """
    import torch  # deferred, with the encoder: the table above needs neither

    from medrobust_lib.models.dual_encoder import DualEncoder

    entry = find_model(id)
    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    loader = _resolve_loader(entry)
    folder = Path(weights_dir).expanduser() if weights_dir is not None else default_weights_dir()
    # Building a network draws its first weights from torch's global stream; a load must not move the caller's.
    with torch.random.fork_rng(devices=[]):
        model = loader(entry, weights_dir=folder, offline=offline)
    if not isinstance(model, DualEncoder):
        raise ValueError(
            f"the loader of {id!r} must return a DualEncoder, not {type(model).__name__} ({model!r:.60}); its form is "
            "loader(entry, *, weights_dir, offline) -> DualEncoder in float32 on the CPU"
        )
    if adapter is not None:
        from medrobust_lib.models.adapters import load_adapter  # peft is slow to import

        model = load_adapter(model.eval(), adapter)
    # Convolutions run up to twice as fast with the channels innermost; other layers do not mind.
    return model.requires_grad_(False).eval().to(device=target, dtype=precision, memory_format=torch.channels_last)


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
        known), available_offline, citation.
    """
    folder = Path(weights_dir).expanduser() if weights_dir is not None else default_weights_dir()
    rows = [
        {
            "id": entry.id,
            "family": entry.family,
            "image_size": entry.image_size,
            "parameters": entry.parameters,
            "licence": entry.licence,
            "source": entry.source,
            "sha256": _known_hashes(entry),
            "available_offline": available_offline(entry, weights_dir=folder),
            "citation": entry.citation,
        }
        for entry in _entries()
    ]
    return pd.DataFrame(rows).astype({"parameters": "Int64"})


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
    if (
        any(entry.id == id for entry in DUAL_ENCODERS)
        or id.startswith((LOCAL_DIR_PREFIX, HUB_PREFIX, PYTHON_PREFIX))
        or not id
    ):
        raise ValueError(f"the model id {id!r} is taken; choose another one")
    if not callable(loader):
        raise TypeError(f"loader must be a function returning a DualEncoder, not {type(loader).__name__}")
    _check_loader(loader, id=id)
    _REGISTERED[id] = ModelEntry(id, family, image_size, parameters, licence, source, (), citation, loader)


def available_offline(entry: ModelEntry, *, weights_dir: Path) -> bool:
    """Whether a model's weights are in ``weights_dir``, in the hub cache or in the package."""
    if entry.id == "demo-clip":
        return has_checkpoint(DEMO_FOLDER)
    if callable(entry.loader) or has_checkpoint(weights_dir / entry.id):
        return True
    if entry.source.startswith("https://"):
        return False  # its loader reads that folder only
    if entry.id.startswith(LOCAL_DIR_PREFIX):
        return has_checkpoint(Path(entry.id.removeprefix(LOCAL_DIR_PREFIX)).expanduser())
    if entry.id.startswith(HUB_PREFIX):
        return any(has_checkpoint(folder) for folder in _cached_folders(entry))
    places = [hub_location(file.url) for file in entry.files]
    return bool(places) and all(place is not None and _in_hub_cache(*place) for place in places)


def check_kind(entry: ModelEntry) -> None:
    """Raise unless the files of an own model, where they are here already, can be loaded: the checks of `load_model`.

    Cheap: settings and tokenizers are read, no weights. For the rows of the table there is nothing to check.

    Raises
    ------
    FileNotFoundError
        The folder or one of its files is missing.
    ValueError
        Another kind of model, or a setting that is not supported (names both), or a loader that cannot be called as
        loaders are.
    """
    if entry.id.startswith(LOCAL_DIR_PREFIX):
        folder = Path(entry.id.removeprefix(LOCAL_DIR_PREFIX)).expanduser()
        _module(entry).check_folder(folder, id=entry.id)
    elif entry.id.startswith(HUB_PREFIX):
        for folder in _cached_folders(entry):
            _check_snapshot(folder, id=entry.id)
    elif callable(entry.loader):
        _check_loader(entry.loader, id=entry.id)


def _check_snapshot(folder: Path, *, id: str) -> None:
    """`check_kind` for what is here of a repository of the hub."""
    if (folder / OPEN_CLIP_CONFIG_NAME).is_file() and not is_clip(folder):
        back_end = "open_clip"
    else:
        check_clip_type(folder, id=id)
        back_end = "transformers_clip"
    if has_checkpoint(folder):  # else the rest is still to be fetched
        importlib.import_module(f"{BACKENDS}.{back_end}").check_folder(folder, id=id)


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
    if not url.startswith(HUB_URL) or "/resolve/" not in url:
        return None
    repository, _, path = url.removeprefix(HUB_URL).partition("/resolve/")
    return repository, path.partition("/")[2]


def _resolve_loader(entry: ModelEntry) -> Loader:
    if callable(entry.loader):
        _check_loader(entry.loader, id=entry.id)
        return entry.loader
    return getattr(_module(entry), entry.loader.partition(":")[2])


def _module(entry: ModelEntry) -> ModuleType:
    return importlib.import_module(entry.loader.partition(":")[0])


def _entries() -> tuple[ModelEntry, ...]:
    return (*DUAL_ENCODERS, *_REGISTERED.values())


def _cached_folders(entry: ModelEntry) -> list[Path]:
    """The snapshot of an ``hf:`` model in the hub cache, if one of its configurations is in it."""
    repository = entry.id.removeprefix(HUB_PREFIX)
    found = [hub_snapshot(repository, name) for name in (CONFIG_NAME, OPEN_CLIP_CONFIG_NAME)]
    return [folder for folder in dict.fromkeys(found) if folder is not None]


def _in_hub_cache(repository: str, name: str) -> bool:
    """Whether a file is in the hub cache; a checkpoint counts in any of its formats."""
    is_checkpoint = name.endswith(CHECKPOINT_SUFFIXES)
    return any(hub_snapshot(repository, other) for other in (HUB_CHECKPOINTS if is_checkpoint else (name,)))


def _known_hashes(entry: ModelEntry) -> dict[str, str]:
    if entry.id == "demo-clip":
        return read_sums(DEMO_FOLDER)
    return {file.name: file.sha256 for file in entry.files if file.sha256 is not None}


DEMO_VLM_FOLDER = Path(__file__).parent / "demo" / "vlm"


def list_vlms(*, weights_dir: str | Path | None = None) -> pd.DataFrame:
    """Table of the models that `load_vlm` knows.

    Returns
    -------
    DataFrame
        One row per model: id, family, image_size (pixels), parameters, licence, source, available_offline, citation.
    """
    folder = Path(weights_dir).expanduser() if weights_dir is not None else default_weights_dir()
    rows = [
        {**vars(entry), "available_offline": vlm_available_offline(entry, weights_dir=folder)} for entry in GENERATIVE
    ]
    columns = ("id", "family", "image_size", "parameters", "licence", "source", "available_offline", "citation")
    return pd.DataFrame(rows, columns=list(columns)).astype({"parameters": "Int64"})


def vlm_available_offline(entry: VlmEntry, *, weights_dir: Path) -> bool:
    """Whether a model's weights are in the package, in ``weights_dir`` or in the hub cache."""
    folder = vlm_folder(entry, weights_dir) or hub_snapshot(entry.source.removeprefix(HUB_PREFIX), CONFIG_NAME)
    return folder is not None and has_checkpoint(folder)


def check_vlm(entry: VlmEntry, *, weights_dir: Path) -> None:
    """Raise unless the files of a model, where they are here already, can be loaded, as far as that is cheap to know.

    Raises
    ------
    FileNotFoundError
        The folder or one of its files is missing.
    ValueError
        Another kind of model.
    """
    folder = vlm_folder(entry, weights_dir) or hub_snapshot(entry.source.removeprefix(HUB_PREFIX), CONFIG_NAME)
    if folder is None:
        return
    check_no_adapter(folder, id=entry.id)
    check_writes_text(folder, id=entry.id)
    if entry.id.startswith(FOLDER_PREFIX):
        missing = [] if (folder / CONFIG_NAME).is_file() else [CONFIG_NAME]
        missing += [] if has_checkpoint(folder) else ["model weights"]
        if missing:
            raise FileNotFoundError(
                f"cannot load {entry.id!r}: no {' and no '.join(missing)} in {folder}; the folder must hold "
                "config.json, model.safetensors, and the files of its tokenizer and processor"
            )
        check_tokenizer(folder, id=entry.id)


def vlm_folder(entry: VlmEntry, weights_dir: Path) -> Path | None:
    """Folder on this computer that holds the files of a model, or None."""
    if entry.id == DEMO_VLM:
        return DEMO_VLM_FOLDER
    if entry.id.startswith(FOLDER_PREFIX):
        return Path(entry.id.removeprefix(FOLDER_PREFIX)).expanduser()
    return local_folder(entry.id, weights_dir)
