"""The model table: what each model is, where its weights come from, and what must be said beside its numbers.

Of a folder in transformers' format its configuration, and the class it names, are asked what kind of model it holds.

The rows are data, in ``models.toml``. Ids with a prefix make rows of their own: ``local-dir:PATH`` for a folder,
``hf:OWNER/NAME`` for the hub, ``python:MODULE:FUNCTION`` for a loader of one's own.
"""

import importlib
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from medrobust_lib.data.wording import SITE_A
from medrobust_lib.files import read_json_object

if TYPE_CHECKING:
    from medrobust_lib.data.dataset import ImageDataset
    from medrobust_lib.data.questions import QuestionSet

Loader = Callable[..., Any]  # gives a DualEncoder, which this file cannot import: it needs this one

BACKENDS = "medrobust_lib.models"
HUB_URL = "https://huggingface.co/"
CONFIG_NAME = "config.json"  # of transformers
OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"  # of peft
LOCAL_DIR_PREFIX = "local-dir:"
HUB_PREFIX = "hf:"
PYTHON_PREFIX = "python:"
_SHIPPED = "shipped with medrobust_lib"
OWN_PREFIXES = (LOCAL_DIR_PREFIX, HUB_PREFIX, PYTHON_PREFIX)
DEMO_VLM = "demo-vlm"


@dataclass(frozen=True)
class ModelEntry:
    """One row of the model table.

    Attributes
    ----------
    id : str
        Name for :func:`load_model`, or for :func:`load_vlm`.
    family : str
        Architecture and training data in a few words.
    image_size : int
        Side of the image that a dual encoder reads, in pixels. Of a generative model: noise is added to [0, 1] pixels
        of this size, before the model's own processor resizes or tiles them. 0 where the files say it.
    licence : str
        Licence of the weights.
    source : str
        Where the weights come from: ``open_clip:ARCHITECTURE/TAG``, ``open_clip:ARCHITECTURE/OWNER/NAME`` for the
        only file of `files` in a repository without a configuration, ``hf-hub:OWNER/NAME`` (open_clip),
        ``hf:OWNER/NAME`` (transformers), ``local-dir:PATH`` (either), a URL, or a sentence for what is shipped.
    citation : str
        Paper to cite.
    parameters : int or None
        Number of parameters, computed from the architecture; None if not known.
    files : sequence of str
        Addresses of what ``data_scripts/fetch_weights.py`` puts under ``weights_dir/<id>/``, each by the last part of
        its address; all of the repository if empty.
    loader : str or callable
        Of a dual encoder: ``"module:function"`` of this room or a function, called as
        ``loader(entry, weights_dir=..., offline=...)``; it returns a float32 model on the CPU.
    terms : str
        Address of what must be accepted on the hub before it gives the files; empty where nothing must.
    image_options : mapping
        Settings of a generative model's image processor that differ from the model's own.
    """

    id: str
    family: str
    image_size: int
    licence: str
    source: str
    citation: str
    parameters: int | None = None
    files: Sequence[str] = ()
    loader: str | Loader = ""
    terms: str = ""
    image_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def generative(self) -> bool:
        """Whether the model writes text; the others are dual encoders."""
        return not self.loader

    @property
    def shipped(self) -> bool:
        """Whether the weights come with the package: those of the demo models, which saw phantoms only."""
        return self.source.startswith(_SHIPPED)


def read_table(name: str) -> dict[str, Any]:
    """Content of a TOML file that lies beside this one."""
    return tomllib.loads(files(BACKENDS).joinpath(name).read_text(encoding="utf-8"))


def _rows(kind: str) -> tuple[ModelEntry, ...]:
    rows = read_table("models.toml")[kind]
    return tuple(ModelEntry(**{**row, "files": tuple(row.get("files", ()))}) for row in rows)


KINDS: tuple[Mapping[str, Any], ...] = tuple(read_table("kinds.toml")["kinds"])
"""Kinds of dual encoders: which models are of it, and what it can do; each is held against a tiny model."""

DUAL_ENCODERS = _rows("dual_encoders")
GENERATIVE = _rows("generative")


def own_entry(id: str, *, generative: bool = False) -> ModelEntry | None:
    """Row of a model whose id says where it is, or None for an id without such a prefix.

    Raises
    ------
    ValueError
        The id has the prefix but not the form, or there is no such module or function.
    """
    place = id.partition(":")[2]
    if id.startswith(HUB_PREFIX):
        owner, _, name = place.partition("/")
        if not owner or not name or "/" in name:
            raise ValueError(
                f"{id!r} names no repository on the hub: write {HUB_PREFIX}OWNER/NAME; a folder on this computer is "
                f"{LOCAL_DIR_PREFIX}PATH"
            )
        loader: str | Loader = "transformers_clip:load_hub_clip"
    elif id.startswith(LOCAL_DIR_PREFIX):
        folder = Path(place).expanduser()
        by_transformers = (folder / CONFIG_NAME).is_file() and not (folder / OPEN_CLIP_CONFIG_NAME).is_file()
        loader = "transformers_clip:load_transformers_clip" if by_transformers else "open_clip:load_open_clip"
    elif id.startswith(PYTHON_PREFIX) and not generative:
        loader = _own_loader(id, *place.partition(":")[::2])
    else:
        return None
    return ModelEntry(id, "own model", 0, "not stated", id, citation="", loader="" if generative else loader)


def _own_loader(id: str, module: str, function: str) -> Loader:
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
    return loader


def place_hint(id: str) -> str:
    """Part of an error message for an id that is a path or a repository without its prefix; else empty."""
    owner, slash, name = id.partition("/")
    if id and (Path(id).is_dir() or owner in ("", ".", "..") or id[0] == "~" or "\\" in id):
        return f" A folder on this computer is {LOCAL_DIR_PREFIX}{id}."
    repository = f"A repository on the hub is {HUB_PREFIX}{id}, a" if name and "/" not in name else "A"
    return f" {repository} folder on this computer {LOCAL_DIR_PREFIX}PATH." if slash else ""


def fetch_command(id: str) -> str:
    """Command that brings a model's weights onto this computer."""
    if id.startswith(HUB_PREFIX):
        return f"hf download {id.removeprefix(HUB_PREFIX)}"
    return f"python data_scripts/fetch_weights.py {id}"


def gate_hint(entry: ModelEntry, reason: Exception | None = None) -> str:
    """Part of an error message for weights that the hub gives only to those who accepted their terms; else empty."""
    if not entry.terms and "gated repo" not in str(reason):
        return ""
    named = f" ({entry.terms})" if entry.terms else ""
    page = f"{HUB_URL}{entry.source.partition(':')[2]}"
    return f" Its terms must be accepted first{named}: log in at {page}, agree, then run `hf auth login` here."


def check_dual(folder: Path, *, id: str) -> None:
    """Raise unless the ``config.json`` of a folder is that of a dual encoder which one back end can load.

    Raises
    ------
    ValueError
        Naming the ``model_type`` found, what is supported, and the other loader if the model writes text.
    """
    found = _model_type(folder)
    if reason := _why_not_dual(found):
        raise ValueError(f"{id!r} is no CLIP: its {CONFIG_NAME} has model_type {found!r}. {reason.format(id=id)}")


def is_dual(folder: Path) -> bool:
    """Whether a folder holds the ``config.json`` of a dual encoder of transformers."""
    return (folder / CONFIG_NAME).is_file() and not _why_not_dual(_model_type(folder))


def _why_not_dual(model_type: str | None) -> str:
    """Why a type of transformers is no dual encoder of one square image and one text; empty where it is one."""
    # Deferred: a list of models needs none of it.
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as GENERATIVE
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if model_type in GENERATIVE:
        return "It writes text: load it with load_vlm({id!r}) (notebooks: the parameter `vlm`)"
    name = MODEL_MAPPING_NAMES.get(model_type)
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    towers = getattr(getattr(kind, "config_class", None), "sub_configs", {})
    if hasattr(kind, "get_video_features"):
        return "It reads videos, of which nothing here takes one frame for the whole"
    if not (hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features") and "vision_config" in towers):
        return (
            "Supported are the classes of transformers with get_image_features and get_text_features (CLIP, SigLIP, "
            f"AltCLIP, ChineseCLIP and others) and folders or repositories with {OPEN_CLIP_CONFIG_NAME}; wrap any "
            "other model in a DualEncoder and name it with register_model"
        )
    if "spatial_shapes" in inspect.signature(kind.get_image_features).parameters:
        return (
            "It reads patches of images of any shape (NaFlex), so that there is no square of pixels to add noise to; "
            "take its variant of a fixed resolution, such as google/siglip2-base-patch16-224"
        )
    return ""


def check_no_adapter(folder: Path, *, id: str) -> None:
    """Raise ValueError if a folder holds an adapter that peft wrote: transformers would load another base for it."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"{id!r} is no model of its own: {foreign_adapter(folder)}")


def foreign_adapter(folder: Path) -> str:
    """What an adapter folder of peft is, and the lines that make a model of it with the base it was trained on."""
    config = read_json_object(folder / ADAPTER_CONFIG_NAME, "the configuration of an adapter")
    base = config.get("base_model_name_or_path") or "BASE"
    kind = (config.get("auto_mapping") or {}).get("base_model_class") or "CLIPModel"
    return (
        f"{folder} holds an adapter that peft wrote ({config.get('peft_type')}, trained on {base}); merge it into its "
        "base with peft, which knows all its settings, and load the result:\n"
        "    from peft import PeftModel\n"
        f"    from transformers import {kind}\n"
        f"    base = {kind}.from_pretrained({str(base)!r})\n"
        f"    PeftModel.from_pretrained(base, {str(folder)!r}).merge_and_unload().save_pretrained('merged')\n"
        "Then copy the base's preprocessor_config.json and tokenizer's files into 'merged', which is local-dir:merged"
    )


def check_writes_text(folder: Path, *, id: str) -> None:
    """Raise ValueError if a folder that somebody wants to load with `load_vlm` holds a CLIP, which writes no text."""
    if (folder / OPEN_CLIP_CONFIG_NAME).is_file() or is_dual(folder):
        raise ValueError(
            f"{id!r} is a CLIP and writes no text: load it with load_model({id!r}) (notebooks: the parameter `model`)"
        )


def _model_type(folder: Path) -> str | None:
    """``model_type`` of the ``config.json`` in a folder."""
    return read_json_object(folder / CONFIG_NAME, "a model's configuration", "Fetch it again.").get("model_type")


# From here on the model sees either blown-up pixels or a thumbnail of what a reader of the images saw.
_SIZE_FACTOR = 3.0

CAVEATS: Mapping[str, str] = MappingProxyType(read_table("caveats.toml"))


def caveats(model: Any, dataset: "ImageDataset") -> list[str]:
    """Sentences that a result card of this model on this data set must carry.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset

    Returns
    -------
    list of str
        The weightiest first, the clinical disclaimer last, which is always there. Sentences name no data
        set, so that those of several sets can be merged without repetition.
    """
    from medrobust_lib.data.inspection import first_of  # deferred, as scipy with it: a list of models needs neither

    found = []
    base = model.provenance.get("base")  # a re-trained copy has seen what its base saw
    origin = base.get("id", model.id) if isinstance(base, Mapping) else base or model.id
    is_demo = any(entry.shipped and entry.id == origin for entry in DUAL_ENCODERS)
    if dataset.synthetic:
        found.append(CAVEATS["synthetic"])
        if not is_demo:
            found.append(CAVEATS["other_models_on_phantoms"])
        elif dataset.id.endswith(SITE_A):
            found.append(CAVEATS["own_site"].format(model=origin))
    elif is_demo:
        found.append(CAVEATS["demo_on_real"].format(model=origin))
    absent = [name for name, count in dataset.class_counts().items() if not count]
    if absent:
        found.append(f"No image of {len(absent)} of {len(dataset.classes)} classes was measured: {first_of(absent)}.")
    return [*found, *dataset.caveats, *_size_caveats(model, dataset), CAVEATS["not_clinical"]]


def vlm_caveats(vlm: Any, questions: "QuestionSet") -> list[str]:
    """Sentences that a result card of this generative model on these questions must carry; see `caveats`."""
    from medrobust_lib.phantoms import MODALITIES

    found = []
    if not questions.synthetic:
        if vlm.id == DEMO_VLM:
            found.append(CAVEATS["demo_on_real"].format(model=DEMO_VLM))
    elif vlm.id == DEMO_VLM:
        recipe = json.loads(files(BACKENDS).joinpath("demo", DEMO_VLM, "recipe.json").read_text(encoding="utf-8"))
        unseen = questions.id.removeprefix("phantom/").removesuffix(SITE_A) in {*MODALITIES} - {*recipe["modalities"]}
        if unseen:
            found.append(CAVEATS["unseen_modality"].format(model=DEMO_VLM))
        found += [CAVEATS["synthetic"], CAVEATS["made_up_answers"]]
    else:
        found += [CAVEATS["synthetic"], CAVEATS["made_up_answers"], CAVEATS["other_models_on_phantoms"]]
    of_model = getattr(vlm, "caveats", ())
    return [*found, *of_model, *questions.provenance.get("caveats", ()), CAVEATS["not_clinical"]]


def _size_caveats(model: Any, dataset: "ImageDataset") -> list[str]:
    shorter_edge = min(dataset.images.shape[1:3])
    sizes = f"{shorter_edge} px images for {model.id}'s {model.image_size} px input"
    if model.image_size >= _SIZE_FACTOR * shorter_edge:
        return [f"Preprocessing enlarges {sizes}: what the enlargement invents is blur, not detail."]
    if shorter_edge >= _SIZE_FACTOR * model.image_size:
        return [f"Preprocessing shrinks {sizes}: fine structures are lost before the model sees them."]
    return []
