"""CLIP models in the format of Hugging Face transformers: PLIP, ``hf:OWNER/NAME`` and anyone's folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from medrobust_lib.models.dual_encoder import DualEncoder, Tokens, check_text_lengths
from medrobust_lib.models.geometry import Preprocessing
from medrobust_lib.models.weights import (
    CONFIG_NAME,
    OPEN_CLIP_CONFIG_NAME,
    check_clip_type,
    check_hashes,
    expected_hashes,
    explained_errors,
    file_hashes,
    hub_access,
    hub_snapshot,
    local_folder,
    mismatch_error,
    missing_weights,
)

if TYPE_CHECKING:
    from medrobust_lib.models.registry import ModelEntry

# Pillow's number of the filter in preprocessor_config.json.
_FILTERS = {2: "bilinear", 3: "bicubic"}


class TransformersClipEncoder(DualEncoder):
    """A ``transformers.CLIPModel`` behind the common interface.

    transformers' text tower takes token ids only, so :meth:`encode_embeddings` walks through its parts: positions,
    encoder under a causal mask, final norm, pooling at the end token, projection.

    Parameters
    ----------
    model : transformers.CLIPModel
        The network, with its weights.
    tokenizer : transformers tokenizer
        Of the same model.
    preprocessing : Preprocessing
        Geometry and normalisation.
    id : str
        Name of the model.
    provenance : dict
        Source, licence and files.

    Raises
    ------
    ValueError
        If the tokenizer does not belong to the text tower.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: Any,
        *,
        preprocessing: Preprocessing,
        id: str,
        provenance: dict[str, Any],
    ) -> None:
        super().__init__(
            id=id,
            preprocessing=preprocessing,
            embed_dim=model.config.projection_dim,
            context_length=model.config.text_config.max_position_embeddings,
            logit_scale=float(model.logit_scale.detach().exp()),
            provenance=provenance,
        )
        self.model = model
        self._tokenizer = tokenizer
        vocabulary = model.config.text_config.vocab_size
        # Without its files a tokenizer comes up silently with a handful of special tokens.
        if not vocabulary // 2 <= len(tokenizer) <= vocabulary:
            raise ValueError(
                f"{id}: the tokenizer knows {len(tokenizer)} tokens, the text tower {vocabulary}; "
                "are the tokenizer files (tokenizer.json, or vocab.json and merges.txt) beside the weights?"
            )

    def _image_features(self, pixels: Tensor) -> Tensor:
        features = self.model.get_image_features(pixel_values=pixels)
        # transformers 5 returns an output object, earlier versions the tensor.
        return features if isinstance(features, Tensor) else features.pooler_output

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokens of k texts, on the CPU, padded to the longest of them."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = self._tokenizer(texts, padding=True, truncation=False, return_tensors="pt")
        mask = encoded["attention_mask"].bool()
        check_text_lengths(texts, mask.sum(dim=1).tolist(), context_length=self.context_length, model_id=self.id)
        return Tokens(encoded["input_ids"], mask)

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """Word embeddings [k, L, w], without positions, on the model's device."""
        return self.model.text_model.embeddings.token_embedding(tokens.ids.to(self.device))

    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        tower = self.model.text_model
        length = embeddings.shape[1]
        hidden = tower.embeddings(inputs_embeds=embeddings)
        causal = torch.full((length, length), torch.finfo(hidden.dtype).min, device=hidden.device).triu(1)
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=causal.to(hidden.dtype)[None, None])
        hidden = tower.final_layer_norm(hidden.last_hidden_state)
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.model.text_projection(hidden[rows, self._end_positions(tokens.ids)])

    def _end_positions(self, ids: Tensor) -> Tensor:
        """Where a text is pooled: its first end token."""
        end = self.model.config.text_config.eos_token_id
        # Old configurations, PLIP's among them, name id 2 by mistake: there the end token is the largest id.
        return ids.argmax(dim=1) if end == 2 else (ids == end).int().argmax(dim=1)


def read_preprocessing(processor: Any) -> Preprocessing:
    """Preprocessing from the settings of a ``CLIPImageProcessor``.

    Raises
    ------
    ValueError
        If it does not resize the shortest edge and cut out a centred square of the same size.
    """
    size = _plain(processor.size)
    crop = _plain(processor.crop_size)
    edge = size.get("shortest_edge")
    if edge is None or {crop.get("height"), crop.get("width")} != {edge} or processor.resample not in _FILTERS:
        raise ValueError(
            f"unsupported preprocessing: size {size}, crop {crop}, filter {processor.resample}; need a shortest "
            "edge, a square crop of the same size, and a bilinear or bicubic filter"
        )
    return Preprocessing(
        image_size=edge,
        geometry="shortest-edge-crop",
        interpolation=_FILTERS[processor.resample],
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


def load_hub_clip(entry: "ModelEntry", *, weights_dir: Path | None, offline: bool) -> DualEncoder:
    """Load ``hf:OWNER/NAME``: with transformers, or with open_clip where the repository has its format only.

    Parameters and errors are those of `load_transformers_clip`.
    """
    repository = entry.source.removeprefix("hf:")
    folder = local_folder(entry.id, weights_dir) or _hub_folder(repository, CONFIG_NAME, offline=offline)
    try:
        if folder is not None and (folder / CONFIG_NAME).is_file():
            check_clip_type(folder, id=entry.id)
    except ValueError:
        # Beside open_clip's own configuration lies that of a text tower or of a timm model.
        if _hub_folder(repository, OPEN_CLIP_CONFIG_NAME, offline=offline) is None:
            raise
    else:
        if folder is not None or _hub_folder(repository, OPEN_CLIP_CONFIG_NAME, offline=offline) is None:
            return load_transformers_clip(entry, weights_dir=weights_dir, offline=offline)
    from medrobust_lib.models.open_clip_backend import load_open_clip

    return load_open_clip(replace(entry, source=f"hf-hub:{repository}"), weights_dir=weights_dir, offline=offline)


def load_transformers_clip(entry: "ModelEntry", *, weights_dir: Path | None, offline: bool) -> TransformersClipEncoder:
    """Load a ``CLIPModel`` from a folder or through transformers' own call to the hub.

    Parameters
    ----------
    entry : ModelEntry
        Its ``source`` is ``hf:OWNER/NAME`` or ``local-dir:PATH``.
    weights_dir : Path or None
        ``weights_dir/<id>/`` comes before the hub; it holds the files of the repository.
    offline : bool
        Never download.

    Returns
    -------
    TransformersClipEncoder
        float32, on the CPU.

    Raises
    ------
    FileNotFoundError
        If the weights are missing, naming where they were looked for.
    ValueError
        If the model is another than CLIP, keys do not fit, a file is damaged or has a wrong SHA-256, or the tokenizer
        is not the model's.
    """
    scheme, _, place = entry.source.partition(":")
    folder = Path(place).expanduser() if scheme == "local-dir" else local_folder(entry.id, weights_dir)
    if folder is not None:
        place = str(folder)
        if (folder / CONFIG_NAME).is_file():
            check_clip_type(folder, id=entry.id)
        check_hashes(folder, expected_hashes(entry, folder))
    try:
        with hub_access(offline=offline or scheme == "local-dir"), explained_errors(place):
            model, report = CLIPModel.from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            tokenizer = AutoTokenizer.from_pretrained(place)
            processor = CLIPImageProcessor.from_pretrained(place)
    except OSError as error:
        if scheme == "local-dir":
            raise FileNotFoundError(
                f"cannot load {entry.id!r}: the folder must hold config.json, model.safetensors, "
                f"preprocessor_config.json and the tokenizer's files. Reason: {str(error).splitlines()[0]}"
            ) from error
        raise missing_weights(entry, weights_dir=weights_dir, offline=offline, reason=error) from error
    misshapen = [str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]]
    if report["missing_keys"] or report["unexpected_keys"] or misshapen:
        raise mismatch_error(
            place, missing=report["missing_keys"], unexpected=report["unexpected_keys"], misshapen=misshapen
        )
    folder = folder or hub_snapshot(place, CONFIG_NAME)
    return TransformersClipEncoder(
        model,
        tokenizer,
        preprocessing=read_preprocessing(processor),
        id=entry.id,
        provenance={
            "source": entry.source,
            "licence": entry.licence,
            "files": {} if folder is None else file_hashes(folder),
        },
    )


def _hub_folder(repository: str, name: str, *, offline: bool) -> Path | None:
    """Folder in the hub cache with a small file of a repository, fetched where that is allowed; None if there is none.

    Of an error of the hub, too: the loader that follows meets the same and explains it.
    """
    try:
        with hub_access(offline=offline):
            return Path(hf_hub_download(repository, name, local_files_only=offline)).parent
    except OSError:
        return None


def _plain(size: Any) -> dict[str, int]:
    """Size object of transformers as a dictionary of the values that are set."""
    return {name: value for name, value in dict(size).items() if value is not None}
