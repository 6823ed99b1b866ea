"""The table of models: one row per model, and the one call that loads any of them."""

import difflib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.weights import DEMO_FOLDER, HUB_URL, has_checkpoint, hub_snapshot, read_sums

Loader = Callable[..., DualEncoder]

LOCAL_DIR_PREFIX = "local-dir:"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BACKENDS = "medrobust_lib.models"
_MODEL_PAGE = "see the model page"


@dataclass(frozen=True)
class WeightFile:
    """One file of a model.

    Attributes
    ----------
    name : str
        Name under ``weights_dir/<model id>/``.
    url : str
        Where the file is published.
    sha256 : str or None
        Checked at load where it is known.
    """

    name: str
    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class ModelEntry:
    """One row of the model table.

    Attributes
    ----------
    id : str
        Name for :func:`load_model`.
    family : str
        Architecture and training data in a few words.
    image_size : int
        Side of the image that the model reads, in pixels.
    parameters : int or None
        Number of parameters, computed from the architecture; None if not known.
    licence : str
        Licence of the weights.
    source : str
        Where the weights come from: ``open_clip:ARCHITECTURE/TAG``, ``hf-hub:OWNER/NAME`` (open_clip),
        ``hf:OWNER/NAME`` (transformers), ``local-dir:PATH``, or a URL.
    files : tuple of WeightFile
        What ``data_scripts/fetch_weights.py`` puts under ``weights_dir/<id>/``.
    citation : str
        Paper to cite.
    loader : str or callable
        ``"module:function"`` or a function, called as ``loader(entry, weights_dir=..., offline=...)``; it
        returns a float32 model on the CPU.
    """

    id: str
    family: str
    image_size: int
    parameters: int | None
    licence: str
    source: str
    files: tuple[WeightFile, ...]
    citation: str
    loader: str | Loader


def _hub_files(repository: str, *names: str) -> tuple[WeightFile, ...]:
    return tuple(WeightFile(name, f"{HUB_URL}{repository}/resolve/main/{name}") for name in names)


_BIOMED_BERT_FILES = _hub_files(
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract", "config.json", "tokenizer_config.json", "vocab.txt"
)
_CLINICAL_BERT_FILES = _hub_files("emilyalsentzer/Bio_ClinicalBERT", "vocab.txt")
_BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
_BIOMEDCLIP_FILES = (
    *_hub_files(_BIOMEDCLIP, "open_clip_config.json", "open_clip_pytorch_model.bin"),
    *_BIOMED_BERT_FILES,
)
_MEDCLIP_URL = "https://storage.googleapis.com/pytrial/"
_CLIP_CITATION = "Radford et al. 2021, arXiv:2103.00020"

BUILT_IN: tuple[ModelEntry, ...] = (
    ModelEntry(
        id="demo-clip",
        family="small CLIP trained on synthetic phantoms",
        image_size=64,
        parameters=None,
        licence="MIT",
        source="shipped with medrobust_lib (models/demo/clip)",
        files=(WeightFile("open_clip_model.safetensors", ""),),
        citation="this package",
        loader=f"{_BACKENDS}.open_clip_backend:load_demo",
    ),
    ModelEntry(
        id="clip-vit-b16",
        family="OpenAI CLIP ViT-B/16",
        image_size=224,
        parameters=149_620_737,
        licence="MIT",
        source="open_clip:ViT-B-16-quickgelu/openai",
        files=_hub_files("timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors"),
        citation=_CLIP_CITATION,
        loader=f"{_BACKENDS}.open_clip_backend:load_open_clip",
    ),
    ModelEntry(
        id="clip-rn50",
        family="OpenAI CLIP RN50",
        image_size=224,
        parameters=102_007_137,
        licence="MIT",
        source="open_clip:RN50-quickgelu/openai",
        files=_hub_files("timm/resnet50_clip.openai", "open_clip_model.safetensors"),
        citation=_CLIP_CITATION,
        loader=f"{_BACKENDS}.open_clip_backend:load_open_clip",
    ),
    ModelEntry(
        id="plip",
        family="CLIP ViT-B/32 tuned on pathology images from Twitter",
        image_size=224,
        parameters=151_277_313,
        licence=_MODEL_PAGE,
        source="hf:vinid/plip",
        files=_hub_files(
            "vinid/plip",
            "config.json",
            "preprocessor_config.json",
            "pytorch_model.bin",
            "tokenizer_config.json",
            "vocab.json",
            "merges.txt",
        ),
        citation="Huang et al. 2023, Nature Medicine 29, 2307-2316",
        loader=f"{_BACKENDS}.transformers_backend:load_transformers_clip",
    ),
    ModelEntry(
        id="quilt-b32",
        family="CLIP ViT-B/32 tuned on Quilt-1M histopathology",
        image_size=224,
        parameters=151_277_313,
        licence=_MODEL_PAGE,
        source="hf-hub:wisdomik/QuiltNet-B-32",
        files=_hub_files("wisdomik/QuiltNet-B-32", "open_clip_config.json", "open_clip_pytorch_model.bin"),
        citation="Ikezogwo et al. 2023, arXiv:2306.11207",
        loader=f"{_BACKENDS}.open_clip_backend:load_open_clip",
    ),
    ModelEntry(
        id="biomedclip",
        family="BiomedCLIP: ViT-B/16 and PubMedBERT on PMC-15M",
        image_size=224,
        parameters=195_902_721,
        licence="MIT",
        source=f"hf-hub:{_BIOMEDCLIP}",
        files=_BIOMEDCLIP_FILES,
        citation="Zhang et al. 2023, arXiv:2303.00915",
        loader=f"{_BACKENDS}.open_clip_backend:load_open_clip",
    ),
    ModelEntry(
        id="medclip-vit",
        family="MedCLIP: Swin-T and Bio_ClinicalBERT on chest X-rays",
        image_size=224,
        parameters=None,
        licence=_MODEL_PAGE,
        source=f"{_MEDCLIP_URL}medclip-vit-pretrained.zip",
        files=(
            WeightFile("medclip-vit-pretrained.zip", f"{_MEDCLIP_URL}medclip-vit-pretrained.zip"),
            *_CLINICAL_BERT_FILES,
        ),
        citation="Wang et al. 2022, arXiv:2210.10163",
        loader=f"{_BACKENDS}.medclip_backend:load_medclip",
    ),
    ModelEntry(
        id="medclip-rn50",
        family="MedCLIP: ResNet-50 and Bio_ClinicalBERT on chest X-rays",
        image_size=224,
        parameters=None,
        licence=_MODEL_PAGE,
        source=f"{_MEDCLIP_URL}medclip-pretrained.zip",
        files=(
            WeightFile("medclip-pretrained.zip", f"{_MEDCLIP_URL}medclip-pretrained.zip"),
            *_CLINICAL_BERT_FILES,
        ),
        citation="Wang et al. 2022, arXiv:2210.10163",
        loader=f"{_BACKENDS}.medclip_backend:load_medclip",
    ),
    ModelEntry(
        id="unimedclip",
        family="UniMed-CLIP: ViT-B/16 and BiomedBERT on six modalities",
        image_size=224,
        parameters=None,
        licence=_MODEL_PAGE,
        source="https://github.com/mbzuai-oryx/UniMed-CLIP (unimed_clip_vit_b16.pt)",
        files=_BIOMED_BERT_FILES,
        citation="Khattak et al. 2024, arXiv:2412.10372",
        loader=f"{_BACKENDS}.unimedclip_backend:load_unimedclip",
    ),
    ModelEntry(
        id="robustmedclip",
        family="BiomedCLIP with low-rank adapters on corrupted medical images",
        image_size=224,
        parameters=None,
        licence=_MODEL_PAGE,
        source="hf:razaimam45/RobustMedCLIP",
        files=_BIOMEDCLIP_FILES,
        citation="Imam et al. 2025, arXiv:2505.09425",
        loader=f"{_BACKENDS}.robustmedclip_backend:load_robustmedclip",
    ),
)

# The one place that grows at run time: what register_model was given in this process.
_REGISTERED: dict[str, ModelEntry] = {}


def default_weights_dir() -> Path:
    """Folder of weights: the environment variable ``MEDROBUST_WEIGHTS``, else ``weights`` in the repository.

    Where the package is installed without its repository, ``weights`` in the current folder.
    """
    configured = os.environ.get("MEDROBUST_WEIGHTS")
    if configured:
        return Path(configured).expanduser()
    repository = Path(__file__).parents[2]
    return (repository if (repository / "pyproject.toml").is_file() else Path.cwd()) / "weights"


def find_model(id: str) -> ModelEntry:
    """Row of a model.

    Parameters
    ----------
    id : str
        An id of :func:`list_models`, or ``local-dir:PATH`` for a folder in open_clip's format.

    Returns
    -------
    ModelEntry
        Its row.

    Raises
    ------
    ValueError
        If the id is unknown; the closest and all ids are named.
    """
    if id.startswith(LOCAL_DIR_PREFIX):
        return ModelEntry(
            id=id,
            family="open_clip folder",
            image_size=0,
            parameters=None,
            licence="not stated",
            source=id,
            files=(),
            citation="",
            loader=f"{_BACKENDS}.open_clip_backend:load_open_clip",
        )
    rows = {entry.id: entry for entry in _entries()}
    if id not in rows:
        close = difflib.get_close_matches(id, rows, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(f"unknown model {id!r}: {hint}Known: {', '.join(rows)}, or {LOCAL_DIR_PREFIX}PATH")
    return rows[id]


def load_model(
    id: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    weights_dir: str | Path | None = None,
    offline: bool | None = None,
) -> DualEncoder:
    """Load a model, ready for inference.

    Parameters
    ----------
    id : str
        An id of :func:`list_models`, or ``local-dir:PATH`` for a folder in open_clip's format.
    device : str or torch.device
        ``"auto"`` takes the accelerator if there is one, else the CPU.
    dtype : str or torch.dtype
        ``"auto"`` is float32 on the CPU and bfloat16 on an accelerator; or ``"float32"``, ``"bfloat16"``,
        ``"float16"``. Features are float32 in any case.
    weights_dir : path, optional
        Folder with ``<model id>/<files>``; by default :func:`default_weights_dir`. The hub cache comes next.
    offline : bool, optional
        Never download; by default what the environment variable ``HF_HUB_OFFLINE`` says.

    Returns
    -------
    DualEncoder
        In evaluation mode, no parameter requiring a gradient.

    Raises
    ------
    ValueError
        For an unknown id, device or dtype, weights that do not fit (keys listed), or a wrong SHA-256.
    FileNotFoundError
        If the weights are missing; names the places looked at and the script that fetches them.
    """
    entry = find_model(id)
    target = resolve_device(device)
    precision = _resolve_dtype(dtype, target)
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    loader = _resolve_loader(entry)
    model = loader(
        entry,
        weights_dir=Path(weights_dir).expanduser() if weights_dir is not None else default_weights_dir(),
        offline=offline,
    )
    if not isinstance(model, DualEncoder):
        raise TypeError(f"the loader of {id!r} must return a DualEncoder, not {type(model).__name__}")
    return model.requires_grad_(False).eval().to(device=target, dtype=precision)


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
    """Add an own model to the table, for this process.

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
        If the id belongs to a built-in model or holds the prefix of a folder.
    TypeError
        If the loader cannot be called.
    """
    if any(entry.id == id for entry in BUILT_IN) or id.startswith(LOCAL_DIR_PREFIX) or not id:
        raise ValueError(f"the model id {id!r} is taken; choose another one")
    if not callable(loader):
        raise TypeError(f"loader must be a function returning a DualEncoder, not {type(loader).__name__}")
    _REGISTERED[id] = ModelEntry(id, family, image_size, parameters, licence, source, (), citation, loader)


def available_offline(entry: ModelEntry, *, weights_dir: Path) -> bool:
    """Whether a model's weights are in ``weights_dir``, in the hub cache or in the package."""
    if entry.id == "demo-clip":
        return has_checkpoint(DEMO_FOLDER)
    if callable(entry.loader) or has_checkpoint(weights_dir / entry.id):
        return True
    published = (hub_location(file.url) for file in entry.files)
    folders = [hub_snapshot(*place) for place in published if place is not None]
    return bool(folders) and all(folders) and any(has_checkpoint(folder) for folder in folders if folder)


def hub_location(url: str) -> tuple[str, str] | None:
    """Repository and file name on the hub of a URL, or None if it points elsewhere."""
    if not url.startswith(HUB_URL) or "/resolve/" not in url:
        return None
    repository, _, path = url.removeprefix(HUB_URL).partition("/resolve/")
    return repository, path.partition("/")[2]


def resolve_device(device: str | torch.device) -> torch.device:
    """Device by name; ``"auto"`` is the machine's accelerator (CUDA, MPS, ...) if it has one, else the CPU.

    Raises
    ------
    ValueError
        If the device does not exist on this machine.
    """
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


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"dtype must be 'auto', {', '.join(map(repr, _DTYPES))}, not {dtype!r}")


def _resolve_loader(entry: ModelEntry) -> Loader:
    if callable(entry.loader):
        return entry.loader
    module, _, function = entry.loader.partition(":")
    return getattr(importlib.import_module(module), function)


def _entries() -> tuple[ModelEntry, ...]:
    return (*BUILT_IN, *_REGISTERED.values())


def _known_hashes(entry: ModelEntry) -> dict[str, str]:
    if entry.id == "demo-clip":
        return read_sums(DEMO_FOLDER)
    return {file.name: file.sha256 for file in entry.files if file.sha256 is not None}
