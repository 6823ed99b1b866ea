"""safetensors files with a JSON header of our own: written whole or not at all, read with errors that name them."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medrobust_lib.files import parsed, whole_file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, key: str, header: Mapping[str, Any]) -> None:
    """Write tensors, with a JSON header in the same file so that it can never belong to others.

    Raises
    ------
    OSError
        The file could not be written; the one that was there stays.
    """
    with whole_file(path) as part:
        save_tensors(part, tensors, metadata={key: json.dumps(dict(header))})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in place, readable by anyone as other files are.

    Raises
    ------
    OSError
        It could not be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # its own words for the system's errors, without the file
        refused = re.search(r"os error (\d+)", str(error))
        if refused is None:
            raise OSError(f"{path} could not be written: {error}") from error
        raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(path)) from error
    path.chmod(0o644)  # safetensors writes for the owner only


def read_tensors(path: Path, *, key: str, kind: str, advice: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file that `write_tensors` wrote; the header is empty where it has another key.

    Raises
    ------
    ValueError
        The file is damaged; it is named, as in `medrobust_lib.files.parsed`.
    """
    with parsed(f"{path} is not {kind}", advice), safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(key, "{}"))
        if not isinstance(header, dict):
            raise TypeError(f"its header {key!r} is no object")
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 - it is no mapping
