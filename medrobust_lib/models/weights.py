"""Weight files: where they lie, whether they are intact, and errors that say what to do when they are not."""

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # only to recognise torch's refusal: nothing is unpickled here
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError

from medrobust_lib.files import file_sha256, parsed, read_sums
from medrobust_lib.models import catalogue
from medrobust_lib.models.catalogue import HUB_PREFIX, ModelEntry, fetch_command

if TYPE_CHECKING:
    from torch import Tensor

DEMO_FOLDER = Path(__file__).parent / "demo"  # one folder for each model that comes with the package, by its id
CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_CHECKPOINTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
# A tokenizer is complete with any of these.
TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tokenizer.model",),
    ("spiece.model",),
)
VOCABULARY_NAME = "vocab.txt"
FOLDER_CONTENT = (
    "the folder must hold config.json, model.safetensors, preprocessor_config.json or processor_config.json, and the "
    "tokenizer's files"
)

_LISTED_KEYS = 10
# In a checkpoint of CoOp's code beside the tensors: its schedule is stored as an object, and with it the optimiser.
_OF_TRAINING = (
    "torch.optim.lr_scheduler.CosineAnnealingLR", "torch.optim.sgd.SGD", "collections.defaultdict", "builtins.dict",
)  # fmt: skip


def model_folder(entry: ModelEntry, weights_dir: Path) -> Path | None:
    """Folder on this computer for the files of a model; None if no checkpoint lies in ``weights_dir/<model id>``."""
    if entry.shipped:
        return DEMO_FOLDER / entry.id
    if entry.source.startswith(catalogue.LOCAL_DIR_PREFIX):
        return Path(entry.source.removeprefix(catalogue.LOCAL_DIR_PREFIX)).expanduser()
    folder = weights_dir / entry.id
    return folder if has_checkpoint(folder) else None


def has_checkpoint(folder: Path) -> bool:
    """Whether a weight file lies directly in ``folder``."""
    return folder.is_dir() and any(path.suffix in CHECKPOINT_SUFFIXES for path in folder.iterdir())


def hub_snapshot(repository: str, *names: str) -> Path | None:
    """Folder of a hub repository's cached main revision, if one of these files is in it."""
    paths = (try_to_load_from_cache(repository, name) for name in names)
    return next((Path(path).parent for path in paths if isinstance(path, str)), None)


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


def check_vocabulary(n_tokens: int, vocab_size: int, padding_side: str, *, id: str) -> None:
    """Raise ValueError unless a tokenizer pads at the end and is that of a text tower, as far as its size tells.

    Without its files a tokenizer comes up silently with a handful of special tokens.
    """
    check_settings({"padding_side": padding_side}, {"padding_side": ("right",)}, source=f"{id}, tokenizer_config.json")
    if not vocab_size // 2 <= n_tokens <= vocab_size:
        raise ValueError(
            f"{id}: the tokenizer knows {n_tokens} tokens, the text tower {vocab_size}; are the tokenizer files beside "
            "the weights (tokenizer.json, or vocab.json and merges.txt, or vocab.txt and config.json)?"
        )


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
        if path.is_file() and path.suffix in (*CHECKPOINT_SUFFIXES, ".json", ".txt")
    }


def check_hashes(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """SHA-256 of the files of ``folder`` after comparing them with its ``SHA256SUMS``.

    Parameters
    ----------
    folder : Path
    names : collection of str, optional
        The only files to look at, as another may be large, or gone.

    Raises
    ------
    FileNotFoundError
        If a file with a recorded hash is not there.
    ValueError
        If a file's hash differs; file and both hashes are named.
    """
    found = file_hashes(folder) if names is None else {}
    for name, digest in read_sums(folder).items():
        if names is not None and name not in names:
            continue
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


def mismatch_error(source: str, differences: Mapping[str, Collection[str]]) -> ValueError:
    """Error listing the keys by which a checkpoint and an architecture differ, under what they differ in."""
    parts = []
    for title, keys in differences.items():
        if keys:
            more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
            parts.append(f"{len(keys)} {title}: {', '.join(sorted(keys)[:_LISTED_KEYS])}{more}")
    return ValueError(f"{source} does not fit the model; {'; '.join(parts)}")


@contextmanager
def explained_errors(source: str) -> Iterator[None]:
    """Turn the libraries' errors about a model's files into a ValueError that names ``source`` and the keys.

    Of a state dict that does not fit it counts missing keys, unexpected keys and wrong shapes, and lists the first ten
    of each.
    """
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
            reason = message.splitlines()[0].partition(". ")[0]
            raise ValueError(
                f"cannot read the weights of {source}, the file is damaged: {reason}. Fetch it again"
            ) from error
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
        del os.environ[switch]
        if switch_before is not None:
            os.environ[switch] = switch_before


def _key_error(source: str, message: str) -> ValueError:
    """Error from the text of ``torch.nn.Module.load_state_dict``, which may list hundreds of keys."""

    def quoted(title: str) -> list[str]:
        found = re.search(rf'{title} key\(s\) in state_dict: ((?:"[^"]*"(?:, )?)*)', message)
        return re.findall(r'"([^"]*)"', found[1]) if found else []

    shapes = r"size mismatch for ([^:]+):.*?torch\.Size\(\[(.*?)\]\) from checkpoint.*?torch\.Size\(\[(.*?)\]\)"
    misshapen = [f"{key} is ({found}), not ({wanted})" for key, found, wanted in re.findall(shapes, message)]
    differences = {"missing keys": quoted("Missing"), "unexpected keys": quoted("Unexpected")}
    return mismatch_error(source, differences | {"wrong shapes": misshapen})


def find_weights(entry: ModelEntry, names: Sequence[str], *, weights_dir: Path) -> Path:
    """First of several file names that exists in ``weights_dir/<id>/``, compared with its known hash.

    Parameters
    ----------
    entry : ModelEntry
        Row of the model table.
    names : sequence of str
        Accepted file names, preferred one first.
    weights_dir : Path
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
        If a file has another SHA-256 than ``SHA256SUMS`` says.
    """
    places = [weights_dir / entry.id / name for name in names]
    for place in places:
        if place.is_file():
            check_hashes(place.parent, (place.name, VOCABULARY_NAME))
            return place
    raise FileNotFoundError(
        f"no weights of {entry.id}; looked at: {', '.join(map(str, places))}. "
        f"Run `python data_scripts/fetch_weights.py {entry.id}`; source: {entry.source}"
    )


class _Blank:
    """Stands in for what is passed over in a torch file: an empty mapping is made of it, whatever the file asks for."""

    def __new__(cls, *_: object) -> OrderedDict:
        return OrderedDict()


def read_state_dict(path: Path, *, passed_over: Collection[str] = ()) -> dict[str, "Tensor"]:
    """Tensors of a ``.safetensors`` file or of a torch file, which is read without running pickled code.

    A training checkpoint is unwrapped (``state_dict``), and the ``module.`` that distributed training puts in
    front of every key is removed. Objects of the classes that are ``passed_over``, by their full names, are not made.

    Raises
    ------
    ValueError
        If the file is damaged, holds anything but tensors and plain values, or holds no state dict.
    """
    import torch
    from safetensors.torch import load_file

    # The inner one knows torch's messages; damaged bytes make its reader raise anything else as well.
    with parsed(f"cannot read the weights of {path}", "Fetch them again."), explained_errors(str(path)):
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([(_Blank, name) for name in passed_over]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict but an object of type {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(value, torch.Tensor) or not isinstance(key, str):
            raise ValueError(f"{path} is no state dict: {key!r} is of type {type(value).__name__}, not a tensor")
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def read_context(path: Path, *, width: int, id: str) -> "Tensor":
    """Context vectors float32 [n, width], shared by all classes, of a prompt learner that CoOp's code saved.

    Raises
    ------
    ValueError
        As `read_state_dict`; no ``ctx`` in it, one context per class, or another width than that of the model ``id``.
    """
    tensors = read_state_dict(path, passed_over=_OF_TRAINING)
    context = tensors.get("ctx")
    if context is None or not context.is_floating_point() or str(context.layout) != "torch.strided":
        found = ", ".join(sorted(tensors)[:_LISTED_KEYS])
        raise ValueError(f"{path} holds {found}, no 'ctx' of real numbers; give CoOp's prompt_learner/model.pth.tar-50")
    context = context.float()
    if context.ndim == 3:
        raise ValueError(
            f"{path} holds {len(context)} contexts, one per class, and does not say which class each belongs to; give "
            "one that all classes share (CSC False)"
        )
    if context.ndim != 2 or context.shape[1] != width or not len(context):
        raise ValueError(
            f"{path} holds a context of shape {list(context.shape)}, the word embeddings of {id} have width {width}; "
            f"give one of shape [n, {width}], or the model that this one was learned for"
        )
    return context


def provenance(entry: ModelEntry, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Where a model comes from: source, licence, and SHA-256 by name of the files that were read."""
    return {"source": entry.source, "licence": entry.licence, "files": dict(hashes)}


def describe_files(entry: ModelEntry, *paths: Path) -> dict[str, Any]:
    """`provenance` of a model that was read from these files alone."""
    return provenance(entry, {path.name: file_sha256(path) for path in paths})


def missing_weights(entry: ModelEntry, *, weights_dir: Path, offline: bool, reason: Exception) -> FileNotFoundError:
    """Error for weights that are neither here nor to be had; names the places and the remedy."""
    why = str(reason).splitlines()[0].partition(" Last error:")[0]
    if entry.source.startswith(catalogue.LOCAL_DIR_PREFIX):
        folder = entry.source.removeprefix(catalogue.LOCAL_DIR_PREFIX)
        return FileNotFoundError(f"cannot load {entry.id!r} from {folder}: {FOLDER_CONTENT}. Reason: {why}")
    tried = "offline, so no download was tried" if offline else "the download failed"
    later = ", after which it loads offline, too, from the hub cache" if entry.id.startswith(HUB_PREFIX) else ""
    return FileNotFoundError(
        f"the weights of {entry.id!r} are not here: looked in {weights_dir / entry.id} and the hub cache "
        f"{constants.HF_HUB_CACHE} ({tried}). Run `{fetch_command(entry.id)}` where there is a network{later}; source: "
        f"{entry.source}.{catalogue.gate_hint(entry, reason)} Reason: {why}"
    )


def check_complete(folder: Path, wanted: Mapping[str, Collection[str]], *, id: str) -> None:
    """Raise unless a folder holds a model's files: under what each is called, the names of which one must be there.

    Raises
    ------
    FileNotFoundError
        Says what is missing, what the folder holds and what it must hold.
    """
    missing = [what for what, names in wanted.items() if not any((folder / name).is_file() for name in names)]
    if missing:
        held = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing, or is not there"
        raise FileNotFoundError(
            f"cannot load {id!r}: {folder} lacks {' and '.join(missing)}; it holds {held}; {FOLDER_CONTENT}"
        )


def read_pretrained(kind: Any, place: str, **options: Any) -> Any:
    """Network of a class of transformers, every weight of which has a place in it and comes from the files.

    Raises
    ------
    ValueError
        Keys or shapes do not fit (listed), the files are damaged, or they are those of an adapter.
    """
    with explained_errors(place):
        # Wrong shapes are asked for here to be refused below, by name.
        network, report = kind.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if getattr(network, "peft_config", None):
        raise ValueError(f"{place} holds no model of its own but an adapter of peft; merge it into its base first")
    differences = {name: report[name.replace(" ", "_")] for name in ("missing keys", "unexpected keys")}
    differences["wrong shapes"] = [key for key, *_ in report["mismatched_keys"]]
    if any(differences.values()):
        raise mismatch_error(place, differences)
    return network


ANY = "any"
"""In a table of settings: any value is followed, or can change nothing."""

Settings = Mapping[str, Collection[Any]]


def check_settings(found: Mapping[str, Any], supported: Settings, *, source: str) -> None:
    """Refuse the settings of a file that would have to be passed over.

    Parameters
    ----------
    found : mapping
        Names and values in the file; None stands for a setting that is left out.
    supported : mapping
        The values of each setting that are supported, or `ANY`.
    source : str
        The file, for the message.

    Raises
    ------
    ValueError
        A setting or value that is not supported; names it and what is.
    """
    for name, value in found.items():
        if value is None:
            continue
        if name not in supported:
            known = ", ".join(supported)
            raise ValueError(f"{source}: the setting {name}={value!r} is not supported; supported are {known}")
        if supported[name] != ANY and value not in supported[name]:
            known = " or ".join(map(repr, supported[name]))
            raise ValueError(f"{source}: {name}={value!r} is not supported; supported is {known}")
