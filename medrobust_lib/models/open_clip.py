"""Models in open_clip's format: OpenAI CLIP, QuiltNet, BiomedCLIP, both of the demo, any ``local-dir:`` folder."""

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.hf_model import HFTextEncoder
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor
from torch.nn import functional

from medrobust_lib.files import file_sha256, parsed, read_json_object
from medrobust_lib.models import catalogue, weights
from medrobust_lib.models.catalogue import CONFIG_NAME, OPEN_CLIP_CONFIG_NAME, ModelEntry, read_table
from medrobust_lib.models.dual_encoder import DualEncoder, Tokens, check_text_lengths
from medrobust_lib.models.geometry import Preprocessing, per_channel
from medrobust_lib.models.text_frame import check_text_path, given_embeddings

_GEOMETRIES = {"shortest": "shortest-edge-crop", "squash": "squash"}
# open_clip's own inference transform reads "random" as bicubic.
_INTERPOLATIONS = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
# open_clip_config.json. open_clip builds the towers by it, but passes over what it does not know of the images.
_SETTINGS: Mapping[str, weights.Settings] = MappingProxyType(read_table("settings.toml")["open_clip"])
_TRANSLATED: weights.Settings = MappingProxyType(
    {"interpolation": tuple(_INTERPOLATIONS), "resize_mode": tuple(_GEOMETRIES)}
)
_KNOWN_TO_OPEN_CLIP: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "model_cfg": (
            *inspect.signature(open_clip.CoCa).parameters,
            *inspect.signature(open_clip.CLIP).parameters,
            "custom_text",
        ),
        "vision_cfg": tuple(field.name for field in fields(CLIPVisionCfg)),
        "text_cfg": tuple(field.name for field in fields(CLIPTextCfg)),
    }
)


class OpenClipEncoder(DualEncoder):
    """An open_clip model behind the common interface.

    Sequences are cut to the longest text of a call where the text tower allows it (a causal mask and pooling at
    the end token, or a BERT that masks its padding): features are the same and the text side runs several
    times faster.

    Parameters
    ----------
    model : open_clip.CLIP, open_clip.CustomTextCLIP or open_clip.CoCa
        The network, with its weights.
    tokenizer : callable
        open_clip's tokenizer of the same model.
    id : str
        Name of the model.
    provenance : dict
        Source, licence and files.

    Raises
    ------
    ValueError
        If the tokenizer does not belong to the text tower, or tower or geometry are of an unsupported kind.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, *, id: str, provenance: dict[str, Any]) -> None:
        bias = getattr(model, "logit_bias", None)
        super().__init__(
            id=id,
            preprocessing=read_preprocessing(model.visual.preprocess_cfg, source=id),
            embed_dim=_embed_dim(model),
            context_length=tokenizer.context_length,
            logit_scale=float(model.logit_scale.detach().exp()),
            logit_bias=None if bias is None else float(bias.detach()),
            provenance=provenance,
        )
        for layer in model.modules():
            if getattr(layer, "qkv", None) is not None and hasattr(layer, "qkv_bias_separate"):
                layer.qkv_bias_separate = True  # EVA hands its weights to a function else, past any adapter on them
        self.model = model
        self._tokenizer = tokenizer
        tower = self._text_tower
        if not isinstance(tower, (open_clip.CLIP, TextTransformer, HFTextEncoder)):
            raise ValueError(f"{self.id}: a text tower of type {type(tower).__name__} is not supported")
        if getattr(tokenizer, "tokenizer_mode", None):
            raise ValueError(f"{self.id}: the tokenizer mode {tokenizer.tokenizer_mode!r} is not supported")
        _check_tokenizer(tokenizer, tower.vocab_size, id=id)
        check_text_path(self, lambda texts: self.model.encode_text(self._tokenizer(texts).to(self.device)))

    @property
    def _text_tower(self) -> torch.nn.Module:
        """open_clip's plain CLIP holds the parts of its text tower itself."""
        return getattr(self.model, "text", self.model)

    @property
    def _pooling(self) -> tuple[str, int]:
        """At which token the text tower pools, and the id of the end token."""
        tower = self._text_tower
        plain = isinstance(tower, open_clip.CLIP)
        return (tower.text_pool_type, tower.text_eos_id) if plain else (tower.pool_type, tower.eos_id)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokens of k texts, on the CPU, without columns that are padding in every text."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = self._tokenizer(texts)
        mask = self._real_tokens(ids)
        full = mask[:, -1].nonzero().flatten().tolist()
        if full:
            # A full row may have been cut: count again with room for one token per byte.
            suspects = [texts[row] for row in full]
            room = max(self.context_length, *(len(text.encode()) for text in suspects)) + 4
            counts = self._real_tokens(self._tokenizer(suspects, context_length=room)).sum(dim=1).tolist()
            check_text_lengths(suspects, counts, context_length=self.context_length, model_id=self.id)
        tokens = Tokens(ids, mask)
        return tokens.trimmed() if self._padding_is_inert() else tokens

    def _real_tokens(self, ids: Tensor) -> Tensor:
        """True up to the last token that is not padding; CLIP's padding id 0 is also the id of "!"."""
        inner = getattr(self._tokenizer, "tokenizer", None)  # of Hugging Face; None for CLIP's own
        real = (ids != (0 if inner is None else inner.pad_token_id)).flip(1).cummax(dim=1).values.flip(1)
        if inner is not None and inner.pad_token_id == inner.eos_token_id:
            # Padded with end tokens: the first of them belongs to the text.
            real = real | functional.pad(real[:, :-1], (1, 0), value=True)
        return real

    def _padding_is_inert(self) -> bool:
        """Whether dropping trailing padding leaves the features unchanged."""
        tower = self._text_tower
        if isinstance(tower, HFTextEncoder):
            return True
        return not self._appends and tower.attn_mask is not None and self._pooling[0] in ("argmax", "eos")

    @property
    def _appends(self) -> bool:
        """Whether a class token stands behind the whole width of a text and pools it (CoCa)."""
        return getattr(self._text_tower, "cls_emb", None) is not None

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """Word embeddings [k, L, w], without positions, on the model's device."""
        tower = self._text_tower
        ids = tokens.ids.to(self.device)
        if isinstance(tower, HFTextEncoder):
            return tower.transformer.get_input_embeddings()(ids)
        return tower.token_embedding(ids)

    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        tower = self._text_tower
        if isinstance(tower, HFTextEncoder):
            mask = tokens.mask.long()
            return tower.proj(tower.pooler(tower.transformer(inputs_embeds=embeddings, attention_mask=mask), mask))
        if self._appends:
            with given_embeddings(tower.token_embedding, embeddings):
                return self.model.encode_text(tokens.ids)
        length = embeddings.shape[1]
        mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
        hidden = tower.ln_final(tower.transformer(embeddings + tower.positional_embedding[:length], attn_mask=mask))
        pool, end = self._pooling
        pooled = text_global_pool(hidden, tokens.ids, pool, eos_token_id=end)
        projection = tower.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection


def _check_tokenizer(tokenizer: Any, vocab_size: int | None, *, id: str) -> None:
    """`check_vocabulary` of open_clip's wrapper, for a text tower of this many tokens if they are known."""
    inner = getattr(tokenizer, "tokenizer", None)
    known = tokenizer.vocab_size if inner is None else len(inner)
    weights.check_vocabulary(known, vocab_size or known, "right" if inner is None else inner.padding_side, id=id)


def read_preprocessing(settings: Mapping[str, Any], *, source: str) -> Preprocessing:
    """Preprocessing from open_clip's ``preprocess_cfg``.

    Raises
    ------
    ValueError
        A setting that would have to be passed over, or an image that is not square.
    """
    weights.check_settings(settings, _SETTINGS["preprocess_cfg"] | _TRANSLATED, source=source)
    cfg = merge_preprocess_dict(PreprocessCfg(), settings)
    with parsed(source):
        sides = set(per_channel(cfg["size"]))
        if len(sides) != 1:
            raise ValueError(f"unsupported size {cfg['size']}; need a square")
        return Preprocessing(
            image_size=sides.pop(),
            geometry=_GEOMETRIES[cfg["resize_mode"]],
            interpolation=_INTERPOLATIONS[cfg["interpolation"]],
            mean=per_channel(cfg["mean"]),
            std=per_channel(cfg["std"]),
        )


def load_open_clip(entry: ModelEntry, *, weights_dir: Path, offline: bool) -> OpenClipEncoder:
    """Load a model in open_clip's format, from a folder or through open_clip's own call to the hub.

    Parameters
    ----------
    entry : ModelEntry
        Its ``source`` is ``local-dir:PATH``, ``hf-hub:OWNER/NAME``, ``open_clip:ARCHITECTURE/TAG``, or what is shipped.
    weights_dir : Path
        ``weights_dir/<id>/`` comes before the hub. It holds ``open_clip_config.json`` and a checkpoint, plus the
        tokenizer's files and the text tower's ``config.json`` if that is a Hugging Face model; for
        ``open_clip:`` sources the checkpoint alone.
    offline : bool
        Never download.

    Returns
    -------
    OpenClipEncoder
        float32, on the CPU.

    Raises
    ------
    FileNotFoundError
        If folder or weights are missing, naming where they were looked for.
    ValueError
        If keys do not fit, a file is damaged or has a wrong SHA-256, or the tokenizer is not the model's.
    """
    scheme, _, place = entry.source.partition(":")
    folder = weights.model_folder(entry, weights_dir)
    if entry.shipped and not (folder / OPEN_CLIP_CONFIG_NAME).is_file():
        raise FileNotFoundError(f"the package is incomplete: {folder / OPEN_CLIP_CONFIG_NAME} is missing; reinstall it")
    if folder is not None and (scheme != "open_clip" or (folder / OPEN_CLIP_CONFIG_NAME).is_file()):
        return _load_folder(entry, folder)
    try:
        with weights.hub_access(offline=offline), weights.explained_errors(entry.source):
            if scheme == "open_clip":
                return _load_named(entry, folder, *place.split("/", 1))
            model = open_clip.create_model_from_pretrained(entry.source, return_transform=False)
            tokenizer = open_clip.get_tokenizer(entry.source)
    except (OSError, RuntimeError) as error:
        raise weights.missing_weights(entry, weights_dir=weights_dir, offline=offline, reason=error) from error
    snapshot = weights.hub_snapshot(place, OPEN_CLIP_CONFIG_NAME)
    if snapshot is not None:
        _read_config(snapshot)
    provenance = weights.provenance(entry, _hub_hashes(place))
    return OpenClipEncoder(model, tokenizer, id=entry.id, provenance=provenance)


def check_folder(folder: Path, *, id: str, published: Collection[str] = ()) -> Path:
    """Raise unless a folder holds a model in open_clip's format, as far as this is known without reading its weights.

    Parameters
    ----------
    folder : Path
    id : str
        Named in errors.
    published : collection of str
        Addresses of the files that the model is published with; any other checkpoint is then no part of it.

    Returns
    -------
    Path
        The only checkpoint, or the preferred one of the names that open_clip publishes.

    Raises
    ------
    FileNotFoundError
        The folder or one of its files is missing.
    ValueError
        Several checkpoints, or a setting that is not supported.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} for the model {id!r}")
    catalogue.check_no_adapter(folder, id=id)
    if not (folder / OPEN_CLIP_CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {OPEN_CLIP_CONFIG_NAME}: it is not a model folder in open_clip's format, nor, without "
            "config.json, in transformers'"
        )
    text = _read_config(folder)["model_cfg"]["text_cfg"]
    tokenizer = text.get("hf_tokenizer_name")
    if tokenizer:
        weights.check_tokenizer(folder, id=id, published=tokenizer if tokenizer.count("/") == 1 else "")
    size = None if "hf_model_name" in text else text.get("vocab_size", CLIPTextCfg.vocab_size)
    with weights.hub_access(offline=True), weights.explained_errors(str(folder)):
        _check_tokenizer(open_clip.get_tokenizer(f"local-dir:{folder}"), size, id=id)
    return _checkpoint(folder, published)


def _checkpoint(folder: Path, published: Collection[str]) -> Path:
    """The only checkpoint of a folder, or the preferred one among names that stand for the same weights."""
    found = sorted(path for path in folder.iterdir() if path.suffix in weights.CHECKPOINT_SUFFIXES)
    found = [path for path in found if any(url.endswith(f"/{path.name}") for url in published)] or found
    if not found:
        raise FileNotFoundError(f"{folder} holds no weights ({', '.join(weights.CHECKPOINT_SUFFIXES)})")
    if len(found) > 1 and not {path.name for path in found} <= set(weights.HUB_CHECKPOINTS):
        raise ValueError(
            f"{folder} holds several checkpoints: {', '.join(path.name for path in found)}; leave the one that is "
            "meant, and move the others elsewhere"
        )
    return min(found, key=lambda path: weights.HUB_CHECKPOINTS.index(path.name) if len(found) > 1 else 0)


def _read_config(folder: Path) -> dict[str, Any]:
    """Content of ``open_clip_config.json`` whose settings of images are all supported; open_clip refuses the others."""
    config = read_json_object(folder / OPEN_CLIP_CONFIG_NAME, "a configuration of open_clip")
    source = str(folder / OPEN_CLIP_CONFIG_NAME)
    weights.check_settings(config, dict.fromkeys(("model_cfg", "preprocess_cfg"), weights.ANY), source=source)
    with parsed(f"{source} is not a configuration of open_clip"):
        parts = {"model_cfg": dict(config["model_cfg"]), "preprocess_cfg": dict(config.get("preprocess_cfg") or {})}
        parts |= {name: dict(parts["model_cfg"][name]) for name in ("vision_cfg", "text_cfg")}
    coca = "multimodal_cfg" in parts["model_cfg"]
    for part, names in _KNOWN_TO_OPEN_CLIP.items():
        supported = dict.fromkeys(names, weights.ANY) | _SETTINGS.get(part, {})
        weights.check_settings(parts[part], supported, source=f"{source}, {part}")
        if part != "model_cfg":  # CoCa's towers give the tokens beside the feature, those of all others do not
            given = {name: parts[part].get(name, False) for name in ("output_tokens", "embed_cls")}
            allowed = {"output_tokens": (coca,), "embed_cls": (False, coca)}
            weights.check_settings(given, allowed, source=f"{source}, {part}")
    images = parts["preprocess_cfg"]
    read = read_preprocessing(images, source=f"{source}, preprocess_cfg")
    size = parts["vision_cfg"].get("image_size", CLIPVisionCfg.image_size)
    if images.get("size") and {read.image_size} != set(per_channel(size)):
        raise ValueError(f"{source}: preprocess_cfg has images of {images['size']} px, vision_cfg reads {size} px")
    return config


def _load_named(entry: ModelEntry, folder: Path | None, architecture: str, tag: str) -> OpenClipEncoder:
    """A built-in architecture with a published tag, or with the checkpoint in ``folder`` or in a repository."""
    hashes = {} if folder is None else weights.check_hashes(folder)
    pretrained = tag if folder is None else str(_checkpoint(folder, entry.files))
    if folder is None and "/" in tag:  # a repository with nothing but the checkpoint
        path = Path(hf_hub_download(tag, entry.files[0].rpartition("/")[2]))
        pretrained, folder, hashes = str(path), path.parent, {path.name: file_sha256(path)}
    with weights.explained_errors(pretrained):
        model = open_clip.create_model_from_pretrained(architecture, pretrained=pretrained, return_transform=False)
    if folder is None:
        hashes = _hub_hashes(open_clip.get_pretrained_cfg(architecture, tag)["hf_hub"].rstrip("/"))
    tokenizer = open_clip.get_tokenizer(architecture)
    return OpenClipEncoder(model, tokenizer, id=entry.id, provenance=weights.provenance(entry, hashes))


def _load_folder(entry: ModelEntry, folder: Path) -> OpenClipEncoder:
    """A folder in open_clip's format; nothing is looked up elsewhere if it is complete."""
    checkpoint = check_folder(folder, id=entry.id, published=entry.files)
    hashes = weights.check_hashes(folder)
    with weights.explained_errors(str(checkpoint)):
        model, tokenizer = build_folder(folder)
        open_clip.load_checkpoint(model, str(checkpoint))
    return OpenClipEncoder(model, tokenizer, id=entry.id, provenance=weights.provenance(entry, hashes))


def build_folder(folder: Path) -> tuple[torch.nn.Module, Any]:
    """Network with random weights, and tokenizer, of a folder in open_clip's format."""
    name, own = f"local-dir:{folder}", {}
    text = _read_config(folder)["model_cfg"]["text_cfg"]
    if "hf_model_name" in text and (folder / CONFIG_NAME).is_file():  # instead of the one on the hub
        own["text_cfg"] = {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}
    with ExitStack() as afterwards:  # no warning: open_clip finds only some of the names that its training gives
        afterwards.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False, **own)
    return model, open_clip.get_tokenizer(name)


def _hub_hashes(repository: str) -> dict[str, str]:
    """SHA-256 of the cached files of the revision that was just loaded."""
    folder = weights.hub_snapshot(repository, OPEN_CLIP_CONFIG_NAME, *weights.HUB_CHECKPOINTS)
    return {} if folder is None else weights.file_hashes(folder)


def _embed_dim(model: torch.nn.Module) -> int:
    """Length of a feature, which open_clip does not keep on the model."""
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    with torch.inference_mode():
        return model.eval().encode_image(torch.zeros(1, 3, height, width)).shape[-1]
