"""Checkpoints outside open_clip's and transformers' formats: find, read without pickled code, load strictly."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from medrobust_lib.downloads import read_sums
from medrobust_lib.files import parsed
from medrobust_lib.models.catalogue import ModelEntry
from medrobust_lib.models.vlm_catalogue import fetch_command
from medrobust_lib.models.weights import (
    check_hashes,
    explained_errors,
    file_hashes,
    hub_access,
    mismatch_error,
)

VOCABULARY_NAME = "vocab.txt"


def find_weights(entry: ModelEntry, names: Sequence[str], *, weights_dir: Path | None) -> Path:
    """First of several file names that exists in ``weights_dir/<id>/``, compared with its known hash.

    Parameters
    ----------
    entry : ModelEntry
        Row of the registry.
    names : sequence of str
        Accepted file names, preferred one first.
    weights_dir : Path or None
        Folder of all weights.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileNotFoundError
        Naming every place looked at and the command that fetches the file.
    ValueError
        If a file has another SHA-256 than the registry or ``SHA256SUMS`` says.
    """
    places = [] if weights_dir is None else [weights_dir / entry.id / name for name in names]
    for place in places:
        if place.is_file():
            known = expected_hashes(entry, place.parent)
            # Only what is read here: a fetched archive beside it may be large, or gone.
            read = {name: known[name] for name in (place.name, VOCABULARY_NAME) if name in known}
            if read:
                check_hashes(place.parent, read)
            return place
    looked = ", ".join(map(str, places)) or "nowhere, as there is no weights folder"
    raise FileNotFoundError(
        f"no weights of {entry.id}; looked at: {looked}. "
        f"Run `python data_scripts/fetch_weights.py {entry.id}`; source: {entry.source}"
    )


def find_vocabulary(entry: ModelEntry, repository: str, *, weights_dir: Path | None, offline: bool) -> Path:
    """The ``vocab.txt`` in ``weights_dir/<id>/``, else that of a hub repository.

    Raises
    ------
    FileNotFoundError
        Naming both places and the command that fetches the file.
    """
    places = [] if weights_dir is None else [weights_dir / entry.id / VOCABULARY_NAME]
    if places and places[0].is_file():
        return places[0]
    try:
        with hub_access(offline=offline):
            return Path(hf_hub_download(repository, VOCABULARY_NAME, local_files_only=offline))
    except OSError as error:
        looked = ", ".join([*map(str, places), f"{repository} on the hub" + (" (cache only)" if offline else "")])
        raise FileNotFoundError(
            f"no vocab.txt for the tokenizer of {entry.id}; looked at: {looked}. "
            f"Run `python data_scripts/fetch_weights.py {entry.id}`"
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file or of a torch file, which is read without running pickled code.

    A training checkpoint is unwrapped (``state_dict``), and the ``module.`` that distributed training puts in
    front of every key is removed.

    Raises
    ------
    ValueError
        If the file is damaged, holds anything but tensors and plain values, or holds no state dict.
    """
    # The inner one knows torch's messages; damaged bytes make its reader raise anything else as well.
    with parsed(f"cannot read the weights of {path}", "Fetch them again."), explained_errors(str(path)):
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict but an object of type {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} is no state dict: {key!r} is of type {type(value).__name__}, not a tensor")
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load a state dict whose keys and shapes must agree with the module.

    Raises
    ------
    ValueError
        Counting missing keys, unexpected keys and wrong shapes, and listing the first ten of each.
    """
    expected = module.state_dict()
    missing = expected.keys() - state_dict.keys()
    unexpected = state_dict.keys() - expected.keys()
    misshapen = [
        f"{key} is {tuple(state_dict[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    if missing or unexpected or misshapen:
        raise mismatch_error(str(source), missing=missing, unexpected=unexpected, misshapen=misshapen)
    module.load_state_dict(state_dict)


def describe_files(entry: ModelEntry, *files: Path) -> dict[str, Any]:
    """Provenance of a loaded model: source, licence, and SHA-256 by name of the files that were read."""
    hashes = {folder: file_hashes(folder) for folder in {path.parent for path in files}}
    return {
        "source": entry.source,
        "licence": entry.licence,
        "files": {path.name: hashes[path.parent][path.name] for path in files},
    }


def expected_hashes(entry: ModelEntry, folder: Path) -> dict[str, str]:
    """SHA-256 by file name from ``SHA256SUMS`` in ``folder`` and from the registry, which has the last word."""
    return {**read_sums(folder), **{file.name: file.sha256 for file in entry.files if file.sha256 is not None}}


def missing_weights(
    entry: ModelEntry, *, weights_dir: Path | None, offline: bool, reason: Exception
) -> FileNotFoundError:
    """Error for weights that are neither here nor to be had; names the places and the remedy."""
    folder = f"{weights_dir / entry.id}" if weights_dir is not None else "no weights folder"
    tried = "offline, so no download was tried" if offline else "the download failed"
    return FileNotFoundError(
        f"the weights of {entry.id!r} are not here: looked in {folder} and in the hub cache "
        f"{constants.HF_HUB_CACHE} ({tried}). Run `{fetch_command(entry.id)}` where there "
        f"is a network; source: {entry.source}. Reason: {str(reason).splitlines()[0].partition(' Last error:')[0]}"
    )
