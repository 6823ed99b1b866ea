"""Generative vision-language models by name: the one call that loads any of them with transformers."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from medrobust_lib.downloads import read_sums
from medrobust_lib.models.catalogue import BUILT_IN as DUAL_ENCODERS
from medrobust_lib.models.devices import resolve_device, resolve_dtype
from medrobust_lib.models.settings import Settings, check_settings
from medrobust_lib.models.vision_language import Completion, RowSampler, VisionLanguageModel
from medrobust_lib.models.vlm_catalogue import (
    FOLDER_PREFIX,
    HUB_PREFIX,
    VlmEntry,
    fetch_command,
    find_vlm,
)
from medrobust_lib.models.vlm_registry import check_vlm, vlm_folder
from medrobust_lib.models.weights import (
    check_hashes,
    explained_errors,
    file_hashes,
    hub_access,
    mismatch_error,
)
from medrobust_lib.places import default_weights_dir

__all__ = [
    "Completion",
    "RowSampler",
    "VisionLanguageModel",
    "load_vlm",
]

_COMMIT_DIGITS = 40
_RESCALING: Settings = {"do_rescale": (True,), "rescale_factor": (1 / 255,)}


def load_vlm(
    id: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    weights_dir: str | Path | None = None,
    offline: bool | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> VisionLanguageModel:
    """Load a generative vision-language model, ready for inference.

    Parameters
    ----------
    id : str
        An id of `list_vlms`, ``local-dir:PATH`` for a folder in transformers' format, or ``hf:OWNER/NAME``.
    device, dtype, weights_dir, offline
        As in `load_model`. bfloat16 answers may depend on the batch they are computed in; float32 ones do not.
    image_size : int, optional
        S, the side in pixels at which noise is added and radii are meant; default: the table's.
    revision : str, optional
        Commit of the hub repository, 40 hexadecimal digits.
    trust_remote_code : bool
        Run code that comes with the weights. Only with a pinned `revision`, so that it cannot change unseen.

    Returns
    -------
    VisionLanguageModel
        In evaluation mode, no parameter requiring a gradient.

    Raises
    ------
    ValueError
        For an unknown id, device or dtype, weights that do not fit, a wrong SHA-256, or remote code that is not pinned.
    FileNotFoundError
        If the weights are missing; names the places looked at and the command that fetches them.
    ImportError
        If transformers needs another package for this model (num2words for SmolVLM2); names it.
    """
    entry = find_vlm(id, dual_encoders=[other.id for other in DUAL_ENCODERS])
    if trust_remote_code and not _is_commit(revision):
        raise ValueError(
            f"trust_remote_code=True runs code from the repository of {id!r}: pin it with revision=COMMIT "
            f"({_COMMIT_DIGITS} hexadecimal digits, not {revision!r}), and read it first"
        )
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size}: give a number of pixels, or None for {entry.image_size}")
    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    weights = Path(weights_dir).expanduser() if weights_dir is not None else default_weights_dir()
    folder = vlm_folder(entry, weights)
    place = entry.source.removeprefix(HUB_PREFIX) if folder is None else str(folder)
    files: dict[str, str] = {}
    check_vlm(entry, weights_dir=weights)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise _missing(entry, place, offline=offline, reason="there is no config.json")
        files = check_hashes(folder, read_sums(folder))
    pinned = {"revision": revision} if folder is None else {}
    # Code may also lie in another repository than the weights: it is pinned, too.
    code = {"trust_remote_code": trust_remote_code, **({"code_revision": revision} if trust_remote_code else {})}
    try:
        with hub_access(offline=offline), _no_progress_bar(), torch.random.fork_rng(devices=[]):
            network = _read_network(place, dtype=precision, **pinned, **code)
            processor = _read_processor(place, **pinned, **code)
    except OSError as error:
        places = place if folder is not None else f"{weights / id} and the hub cache {constants.HF_HUB_CACHE}"
        raise _missing(entry, places, offline=offline, reason=str(error).splitlines()[0]) from error
    if folder is None:
        snapshot = try_to_load_from_cache(place, "config.json", revision=revision)
        if isinstance(snapshot, str):
            revision, files = Path(snapshot).parent.name, file_hashes(Path(snapshot).parent)
    return VisionLanguageModel(
        network.requires_grad_(False).eval().to(target),
        processor,
        id=id,
        image_size=image_size or entry.image_size,
        image_options=dict(entry.image_options),
        provenance={"source": entry.source, "revision": revision, "licence": entry.licence, "files": files},
    ).eval()


def _read_network(place: str, **options: Any) -> PreTrainedModel:
    """The network with its weights, every one of which has a place in it and comes from the files."""
    with explained_errors(place):
        # Wrong shapes are asked for here to be refused below, by name.
        network, report = AutoModelForImageTextToText.from_pretrained(
            place, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if getattr(network, "peft_config", None):
        raise ValueError(f"{place} holds no model of its own but an adapter of peft; merge it into its base first")
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    misshapen = [key for key, *_ in report["mismatched_keys"]]
    if missing or unexpected or misshapen:
        raise mismatch_error(place, missing=missing, unexpected=unexpected, misshapen=misshapen)
    return network


def _read_processor(place: str, **options: Any) -> ProcessorMixin:
    """Image processor, tokenizer and chat template, all of them."""
    try:
        with explained_errors(place):
            processor = AutoProcessor.from_pretrained(place, **options)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot make the processor of {place}; are its tokenizer's files complete? {reason}"
        ) from error
    # Its processor is handed noisy [0, 1] pixels, which are what 8-bit images become by this rescaling alone.
    rescaling = {name: getattr(processor.image_processor, name, None) for name in _RESCALING}
    check_settings(rescaling, _RESCALING, source=f"{place}, settings of the image processor")
    if processor.chat_template is None:
        raise ValueError(f"{place} has no chat template, so its question has no agreed form; add chat_template.jinja")
    return processor


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a progress bar over what a notebook or a command shows, for a while."""
    shown, of_hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hub's own environment variable has the last word, and it says so
        logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if shown:
                logging.enable_progress_bar()  # and that of the hub
            (enable_progress_bars if of_hub else disable_progress_bars)()


def _missing(entry: VlmEntry, places: str, *, offline: bool, reason: str) -> FileNotFoundError:
    if entry.id.startswith(FOLDER_PREFIX):
        remedy = "the folder must hold config.json, model.safetensors, and the files of its tokenizer and processor"
    else:
        tried = "offline, so no download was tried" if offline else "the download failed"
        remedy = f"{tried}; run `{fetch_command(entry.id)}` where there is a network"
        if entry.id.startswith(HUB_PREFIX):
            remedy += ", after which it loads offline, too, from the hub cache"
    return FileNotFoundError(
        f"cannot load {entry.id!r}; looked in {places}: {remedy}; source: {entry.source}. Reason: {reason}"
    )


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == _COMMIT_DIGITS and set(revision) <= set("0123456789abcdef")
