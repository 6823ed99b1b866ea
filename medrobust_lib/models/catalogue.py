"""The rows of the model table: what each model is, where its weights come from, which loader reads them."""

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medrobust_lib.checks import suggest

if TYPE_CHECKING:
    from medrobust_lib.models.dual_encoder import DualEncoder

Loader = Callable[..., "DualEncoder"]

HUB_URL = "https://huggingface.co/"
CONFIG_NAME = "config.json"  # of transformers
OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
LOCAL_DIR_PREFIX = "local-dir:"
PYTHON_PREFIX = "python:"

BACKENDS = "medrobust_lib.models"
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
        ``hf:OWNER/NAME`` (transformers), ``local-dir:PATH`` (either), or a URL.
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

DUAL_ENCODERS: tuple[ModelEntry, ...] = (
    ModelEntry(
        id="demo-clip",
        family="small CLIP trained on synthetic phantoms",
        image_size=64,
        parameters=1_869_337,
        licence="MIT",
        source="shipped with medrobust_lib (models/demo/clip)",
        files=(WeightFile("open_clip_model.safetensors", ""),),
        citation="this package",
        loader=f"{BACKENDS}.open_clip:load_demo",
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
        loader=f"{BACKENDS}.open_clip:load_open_clip",
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
        loader=f"{BACKENDS}.open_clip:load_open_clip",
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
        loader=f"{BACKENDS}.transformers_clip:load_transformers_clip",
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
        loader=f"{BACKENDS}.open_clip:load_open_clip",
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
        loader=f"{BACKENDS}.open_clip:load_open_clip",
    ),
    ModelEntry(
        id="medclip-vit",
        family="MedCLIP: Swin-T and Bio_ClinicalBERT on chest X-rays",
        image_size=224,
        parameters=136_616_059,
        licence=_MODEL_PAGE,
        source=f"{_MEDCLIP_URL}medclip-vit-pretrained.zip",
        files=(
            WeightFile("medclip-vit-pretrained.zip", f"{_MEDCLIP_URL}medclip-vit-pretrained.zip"),
            *_CLINICAL_BERT_FILES,
        ),
        citation="Wang et al. 2022, arXiv:2210.10163",
        loader=f"{BACKENDS}.medclip:load_medclip",
    ),
    ModelEntry(
        id="medclip-rn50",
        family="MedCLIP: ResNet-50 and Bio_ClinicalBERT on chest X-rays",
        image_size=224,
        parameters=133_260_097,
        licence=_MODEL_PAGE,
        source=f"{_MEDCLIP_URL}medclip-pretrained.zip",
        files=(
            WeightFile("medclip-pretrained.zip", f"{_MEDCLIP_URL}medclip-pretrained.zip"),
            *_CLINICAL_BERT_FILES,
        ),
        citation="Wang et al. 2022, arXiv:2210.10163",
        loader=f"{BACKENDS}.medclip:load_medclip",
    ),
    ModelEntry(
        id="unimedclip",
        family="UniMed-CLIP: ViT-B/16 and BiomedBERT on six modalities",
        image_size=224,
        parameters=195_903_489,
        licence=_MODEL_PAGE,
        source="https://github.com/mbzuai-oryx/UniMed-CLIP (unimed_clip_vit_b16.pt)",
        files=_BIOMED_BERT_FILES,
        citation="Khattak et al. 2024, arXiv:2412.10372",
        loader=f"{BACKENDS}.unimedclip:load_unimedclip",
    ),
    ModelEntry(
        id="robustmedclip",
        family="BiomedCLIP with low-rank adapters, few-shot on clean medical images",
        image_size=224,
        parameters=195_902_721,
        licence=_MODEL_PAGE,
        source=f"{HUB_URL}razaimam45/RobustMedCLIP",
        files=_BIOMEDCLIP_FILES,
        citation="Imam et al. 2025, arXiv:2505.15425",
        loader=f"{BACKENDS}.robustmedclip:load_robustmedclip",
    ),
)


def folder_entry(id: str) -> ModelEntry:
    """Row of a ``local-dir:PATH`` model, whose folder says the rest: open_clip's format, else transformers'."""
    folder = Path(id.removeprefix(LOCAL_DIR_PREFIX)).expanduser()
    by_transformers = (folder / CONFIG_NAME).is_file() and not (folder / OPEN_CLIP_CONFIG_NAME).is_file()
    if by_transformers:
        return _own_entry(id, "CLIP folder in transformers' format", "transformers_clip:load_transformers_clip")
    return _own_entry(id, "open_clip folder", "open_clip:load_open_clip")


def hub_entry(id: str) -> ModelEntry:
    """Row of an ``hf:OWNER/NAME`` model, whose repository says the rest.

    Raises
    ------
    ValueError
        The id is not of this form.
    """
    owner, _, name = id.removeprefix(HUB_PREFIX).partition("/")
    if not owner or not name or "/" in name:
        raise ValueError(
            f"{id!r} names no repository on the hub: write {HUB_PREFIX}OWNER/NAME; a folder on this computer is "
            f"{LOCAL_DIR_PREFIX}PATH"
        )
    return _own_entry(id, "CLIP from the hub", "transformers_clip:load_hub_clip")


def python_entry(id: str) -> ModelEntry:
    """Row of a ``python:MODULE:FUNCTION`` model, which a loader of one's own makes.

    Raises
    ------
    ValueError
        The id is not of this form, or there is no such module or function.
    """
    module, _, function = id.removeprefix(PYTHON_PREFIX).partition(":")
    if not module or not function.isidentifier():
        raise ValueError(f"{id!r} names no loader: write {PYTHON_PREFIX}MODULE:FUNCTION, such as python:my_models:load")
    try:
        loader = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{id!r}: {error}; install the module into this environment, or name its folder in PYTHONPATH"
        ) from error
    if not callable(loader):
        raise ValueError(f"{id!r}: the module {module} has no function {function!r}")
    return replace(_own_entry(id, "own model", ""), loader=loader)


def _own_entry(id: str, family: str, loader: str) -> ModelEntry:
    return ModelEntry(
        id=id,
        family=family,
        image_size=0,
        parameters=None,
        licence="not stated",
        source=id,
        files=(),
        citation="",
        loader=f"{BACKENDS}.{loader}",
    )


DEMO_VLM = "demo-vlm"
FOLDER_PREFIX = "local-dir:"
HUB_PREFIX = "hf:"
_DEFAULT_SIZE = 336  # of models that the table does not know: the size of LLaVA's image tower

# Without `do_resize` an image would be enlarged to four times the side of the tile that it is then shrunk to.
_ONE_TILE = (("do_image_splitting", False), ("do_resize", False))


@dataclass(frozen=True)
class VlmEntry:
    """One row of the table of generative models.

    Attributes
    ----------
    id : str
        Name for `load_vlm`.
    family : str
        Architecture in a few words.
    image_size : int
        S: noise is added to [0, 1] pixels of S x S, before the model's own processor resizes or tiles them.
    parameters : int or None
        Number of parameters; None if not known.
    licence : str
        Licence of the weights.
    source : str
        ``hf:OWNER/NAME`` on the hub, ``local-dir:PATH``, or a sentence for what ships with the package.
    citation : str
        Paper to cite.
    image_options : tuple of (str, object)
        Names and values of the image processor's settings that differ from the model's own.
    """

    id: str
    family: str
    image_size: int
    parameters: int | None
    licence: str
    source: str
    citation: str
    image_options: tuple[tuple[str, object], ...] = ()


GENERATIVE: tuple[VlmEntry, ...] = (
    VlmEntry(
        id=DEMO_VLM,
        family="tiny LLaVA trained on phantoms of histology, blood, chest and oct",
        image_size=64,
        parameters=1_601_280,
        licence="MIT",
        source="shipped with medrobust_lib (models/demo/vlm)",
        citation="this package",
    ),
    VlmEntry(
        id="llava-1.6-mistral-7b",
        family="LLaVA-1.6 (LLaVA-NeXT) on Mistral-7B",
        image_size=336,
        parameters=7_566_747_648,
        licence="Apache-2.0",
        source="hf:llava-hf/llava-v1.6-mistral-7b-hf",
        citation="Liu et al. 2024, arXiv:2310.03744",
    ),
    VlmEntry(
        id="llava-1.6-vicuna-7b",
        family="LLaVA-1.6 (LLaVA-NeXT) on Vicuna-7B",
        image_size=336,
        parameters=7_063_431_168,
        licence="Llama 2 Community License",
        source="hf:llava-hf/llava-v1.6-vicuna-7b-hf",
        citation="Liu et al. 2024, arXiv:2310.03744",
    ),
    VlmEntry(
        id="smolvlm-256m",
        family="SmolVLM 256M, images in one tile",
        image_size=512,
        parameters=256_484_928,
        licence="Apache-2.0",
        source="hf:HuggingFaceTB/SmolVLM-256M-Instruct",
        citation="Marafioti et al. 2025, arXiv:2504.05299",
        image_options=_ONE_TILE,
    ),
    VlmEntry(
        id="smolvlm-500m",
        family="SmolVLM 500M, images in one tile",
        image_size=512,
        parameters=507_482_304,
        licence="Apache-2.0",
        source="hf:HuggingFaceTB/SmolVLM-500M-Instruct",
        citation="Marafioti et al. 2025, arXiv:2504.05299",
        image_options=_ONE_TILE,
    ),
    VlmEntry(
        id="qwen2-vl-2b",
        family="Qwen2-VL 2B",
        image_size=448,
        parameters=2_208_985_600,
        licence="Apache-2.0",
        source="hf:Qwen/Qwen2-VL-2B-Instruct",
        citation="Wang et al. 2024, arXiv:2409.12191",
    ),
)


def find_vlm(id: str, *, dual_encoders: Collection[str] = ()) -> VlmEntry:
    """Row of a generative model; ``local-dir:PATH`` and ``hf:OWNER/NAME`` make one.

    Parameters
    ----------
    id : str
    dual_encoders : collection of str
        Ids of models that do not generate, to say of one of them how it is loaded.

    Raises
    ------
    ValueError
        If the id is unknown; the closest ids are named.
    """
    if id.startswith((FOLDER_PREFIX, HUB_PREFIX)):
        return VlmEntry(id, "model in transformers' format", _DEFAULT_SIZE, None, "not stated", id, "")
    rows = {entry.id: entry for entry in GENERATIVE}
    if id in dual_encoders:
        raise ValueError(
            f"{id!r} is a dual encoder and writes no text: load it with load_model({id!r}) (notebooks: the parameter "
            f"`model`). Generative models: {', '.join(rows)}"
        )
    if id not in rows:
        raise ValueError(
            f"unknown vision-language model {id!r}.{suggest(id, rows)}{place_hint(id)} {FOLDER_PREFIX}PATH and "
            f"{HUB_PREFIX}OWNER/NAME work too"
        )
    return rows[id]


def place_hint(id: str) -> str:
    """Part of an error message for an id that is a path or a repository without its prefix; else empty."""
    owner, slash, name = id.partition("/")
    if id and (Path(id).is_dir() or owner in ("", ".", "..") or id[0] == "~" or "\\" in id):
        return f" A folder on this computer is {FOLDER_PREFIX}{id}."
    repository = f"A repository on the hub is {HUB_PREFIX}{id}, a" if name and "/" not in name else "A"
    return f" {repository} folder on this computer {FOLDER_PREFIX}PATH." if slash else ""


def fetch_command(id: str) -> str:
    """Command that brings a model's weights onto this computer."""
    if id.startswith(HUB_PREFIX):
        return f"hf download {id.removeprefix(HUB_PREFIX)}"
    return f"python data_scripts/fetch_weights.py {id}"
