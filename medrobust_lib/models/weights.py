"""Weight files: where they lie, whether they are intact, and errors that say what to do when they are not."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # only to recognise torch's refusal: nothing is unpickled here
from typing import TYPE_CHECKING

from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError

from medrobust_lib.downloads import file_sha256
from medrobust_lib.files import read_json_object

if TYPE_CHECKING:
    from torch import Tensor


DEMO_FOLDER = Path(__file__).parent / "demo" / "clip"
CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_CHECKPOINTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
HUB_URL = "https://huggingface.co/"
CONFIG_NAME = "config.json"  # of transformers
ADAPTER_CONFIG_NAME = "adapter_config.json"  # of peft
OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
# A tokenizer is complete with any of these.
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("tokenizer.model",))
CLIP_TYPE = "clip"  # of the configuration of a transformers CLIPModel

_LISTED_KEYS = 10
_HASHED_SUFFIXES = (*CHECKPOINT_SUFFIXES, ".json", ".txt")


def local_folder(model_id: str, weights_dir: Path | None) -> Path | None:
    """``weights_dir/<model id>`` if a checkpoint lies in it, else None."""
    if weights_dir is None or not has_checkpoint(weights_dir / model_id):
        return None
    return weights_dir / model_id


def has_checkpoint(folder: Path) -> bool:
    """Whether a weight file lies directly in ``folder``."""
    return folder.is_dir() and any(path.suffix in CHECKPOINT_SUFFIXES for path in folder.iterdir())


def hub_snapshot(repository: str, filename: str) -> Path | None:
    """Folder of a hub repository's cached main revision, if ``filename`` is in it."""
    path = try_to_load_from_cache(repository, filename)
    return Path(path).parent if isinstance(path, str) else None


def check_clip_type(folder: Path, *, id: str) -> None:
    """Raise unless the ``config.json`` of a folder is that of a ``CLIPModel`` of transformers.

    Raises
    ------
    ValueError
        Naming the ``model_type`` found, what is supported, and the other loader if the model writes text.
    """
    found = _model_type(folder)
    if found == CLIP_TYPE:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as GENERATIVE

    if found in GENERATIVE:
        advice = f"It writes text: load it with load_vlm({id!r}) (notebooks: the parameter `vlm`)"
    else:
        advice = (
            f"Supported are model_type {CLIP_TYPE!r} (CLIPModel) and folders or repositories with "
            f"{OPEN_CLIP_CONFIG_NAME}; wrap any other model in a DualEncoder and name it with register_model"
        )
    raise ValueError(f"{id!r} is no CLIP: its {CONFIG_NAME} has model_type {found!r}. {advice}")


def is_clip(folder: Path) -> bool:
    """Whether a folder holds the ``config.json`` of a ``CLIPModel`` of transformers."""
    return (folder / CONFIG_NAME).is_file() and _model_type(folder) == CLIP_TYPE


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
    if (folder / OPEN_CLIP_CONFIG_NAME).is_file() or is_clip(folder):
        raise ValueError(
            f"{id!r} is a CLIP and writes no text: load it with load_model({id!r}) (notebooks: the parameter `model`)"
        )


def check_tokenizer(folder: Path, *, id: str, published: str = "") -> None:
    """Raise unless the files of a tokenizer lie in a folder: without them transformers asks for unrelated packages.

    Parameters
    ----------
    folder : Path
    id : str
        Of the model, for the message.
    published : str
        Repository on the hub that has them, if one is known.

    Raises
    ------
    FileNotFoundError
        Names the files and where to get them.
    """
    if any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        return
    wanted = ", or ".join(" and ".join(names) for names in TOKENIZER_FILES)
    source = "Copy them from where the weights come from"
    if published:
        source += (
            f"; if its vocabulary is that of {published}, `hf download {published} --include 'tokenizer*' 'vocab*' "
            f"'merges*' --local-dir {folder}` fetches them"
        )
    raise FileNotFoundError(f"{id!r}: no tokenizer in {folder}: it must hold {wanted}. {source}")


def _model_type(folder: Path) -> str | None:
    """``model_type`` of the ``config.json`` in a folder."""
    try:
        return json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG_NAME} is no valid JSON ({error}); fetch it again") from error


def fingerprint(tensors: Sequence["Tensor"]) -> str:
    """First 16 hex digits of the BLAKE2 hash of the tensors' shapes, types and bytes."""
    import torch  # deferred: listing models computes nothing

    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by file name of the weights and configuration files of ``folder``."""
    return {
        path.name: file_sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _HASHED_SUFFIXES
    }


def check_hashes(folder: Path, expected: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the files of ``folder`` after comparing them with the expected ones.

    Raises
    ------
    FileNotFoundError
        If a file with an expected hash is not there.
    ValueError
        If a file's hash differs; file and both hashes are named.
    """
    found = file_hashes(folder)
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing although its SHA-256 is known ({digest})")
        actual = found.get(name) or file_sha256(path)
        if actual != digest:
            raise ValueError(
                f"{path} has SHA-256 {actual}, expected {digest}: it is damaged or another version; "
                "delete it and fetch it again"
            )
    return found


def mismatch_error(
    source: str, *, missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str] = ()
) -> ValueError:
    """Error listing the keys by which a checkpoint and an architecture differ."""
    parts = [
        _listed(name, keys)
        for name, keys in (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", misshapen))
        if keys
    ]
    return ValueError(f"{source} does not fit the model; {'; '.join(parts)}")


@contextmanager
def explained_errors(source: str) -> Iterator[None]:
    """Turn the libraries' errors about a model's files into a ValueError that names ``source`` and the keys."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the files of {source}, one is no valid JSON: {error}; fetch it again") from error
    except (OSError, ValueError, ImportError, MemoryError):
        raise
    except RuntimeError as error:
        message = str(error)
        if "loading state_dict" in message:
            raise _key_error(source, message) from error
        if "PytorchStreamReader" in message or "Invalid magic number" in message:
            raise ValueError(f"cannot read the weights of {source}, the file is damaged: {message}") from error
        raise
    except (SafetensorError, UnpicklingError, EOFError) as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # torch names what it did not unpickle far below
        reason = refused[1] if refused else (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot read the weights of {source}, the file is damaged or holds more than tensors, which may run code: "
            f"{reason.rstrip('.')}. Fetch it again, or save model.state_dict() alone where it comes from"
        ) from error
    except Exception as error:  # A damaged tokenizer raises KeyError, TypeError, or the bare class.
        raise ValueError(
            f"cannot read the files of {source}: {type(error).__name__}: {error}; fetch them again"
        ) from error


@contextmanager
def hub_access(*, offline: bool) -> Iterator[None]:
    """Let the hub's libraries download, or keep them from it, for a while.

    open_clip has no argument for it, so the constant that the libraries ask is set and put back.
    Converting someone's repository to safetensors in the background, which transformers does by default, is
    switched off.
    """
    switch = "DISABLE_SAFETENSORS_CONVERSION"
    offline_before, switch_before = constants.HF_HUB_OFFLINE, os.environ.get(switch)
    constants.HF_HUB_OFFLINE = offline
    os.environ[switch] = "1"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline_before
        if switch_before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = switch_before


def _key_error(source: str, message: str) -> ValueError:
    """Error from the text of ``torch.nn.Module.load_state_dict``, which may list hundreds of keys."""

    def quoted(title: str) -> list[str]:
        found = re.search(rf'{title} key\(s\) in state_dict: ((?:"[^"]*"(?:, )?)*)', message)
        return re.findall(r'"([^"]*)"', found[1]) if found else []

    return mismatch_error(
        source,
        missing=quoted("Missing"),
        unexpected=quoted("Unexpected"),
        misshapen=re.findall(r"size mismatch for ([^:]+):", message),
    )


def _listed(title: str, keys: Collection[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _LISTED_KEYS} more" if len(names) > _LISTED_KEYS else ""
    return f"{len(names)} {title}: {', '.join(names[:_LISTED_KEYS])}{more}"
