"""What kind of model a folder in transformers' format holds: its configuration and the class it names are asked."""

import inspect
from pathlib import Path

from medrobust_lib.files import read_json_object
from medrobust_lib.models.catalogue import CONFIG_NAME, OPEN_CLIP_CONFIG_NAME

ADAPTER_CONFIG_NAME = "adapter_config.json"  # of peft


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
