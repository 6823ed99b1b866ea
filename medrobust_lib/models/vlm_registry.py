"""The table of generative vision-language models, and where their weights lie on this computer."""

from pathlib import Path

import pandas as pd

from medrobust_lib.models.registry import default_weights_dir
from medrobust_lib.models.vlm_catalogue import BUILT_IN, DEMO_VLM, FOLDER_PREFIX, HUB_PREFIX, VlmEntry
from medrobust_lib.models.weights import has_checkpoint, hub_snapshot, local_folder

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
    folder = vlm_folder(entry, weights_dir) or hub_snapshot(entry.source.removeprefix(HUB_PREFIX), "config.json")
    return folder is not None and has_checkpoint(folder)


def vlm_folder(entry: VlmEntry, weights_dir: Path) -> Path | None:
    """Folder on this computer that holds the files of a model, or None."""
    if entry.id == DEMO_VLM:
        return DEMO_VLM_FOLDER
    if entry.id.startswith(FOLDER_PREFIX):
        return Path(entry.id.removeprefix(FOLDER_PREFIX)).expanduser()
    return local_folder(entry.id, weights_dir)
