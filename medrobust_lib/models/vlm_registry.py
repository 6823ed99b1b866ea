"""The table of generative vision-language models, and where their weights lie on this computer."""

from pathlib import Path

import pandas as pd

from medrobust_lib.models.vlm_catalogue import BUILT_IN, DEMO_VLM, FOLDER_PREFIX, HUB_PREFIX, VlmEntry
from medrobust_lib.models.weights import (
    CONFIG_NAME,
    check_no_adapter,
    check_tokenizer,
    check_writes_text,
    has_checkpoint,
    hub_snapshot,
    local_folder,
)
from medrobust_lib.places import default_weights_dir

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
        {**vars(entry), "available_offline": vlm_available_offline(entry, weights_dir=folder)} for entry in BUILT_IN
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
