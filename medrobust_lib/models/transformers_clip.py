"""CLIP models in the format of Hugging Face transformers: PLIP, ``hf:OWNER/NAME`` and anyone's folder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, utils

from medrobust_lib.files import parsed
from medrobust_lib.models import weights
from medrobust_lib.models.catalogue import CONFIG_NAME, HUB_PREFIX, OPEN_CLIP_CONFIG_NAME, ModelEntry, read_table
from medrobust_lib.models.dual_encoder import DualEncoder, Tokens, check_text_lengths, check_text_path
from medrobust_lib.models.geometry import Preprocessing, per_channel

_WEIGHT_NAMES = (utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME, utils.WEIGHTS_NAME, utils.WEIGHTS_INDEX_NAME)
# Pillow's number of the filter in preprocessor_config.json.
_FILTERS = {2: "bilinear", 3: "bicubic"}
# Old configurations, PLIP's among them, name this end token by mistake: there it is the token of the largest id.
_UNKNOWN_END = 2
# preprocessor_config.json
_PROCESSOR_SETTINGS: weights.Settings = MappingProxyType(
    read_table("settings.toml")["transformers"] | {"resample": tuple(_FILTERS)}
)


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
        If the tokenizer does not belong to the text tower, or the images are not those that the image tower reads.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: Any, *, preprocessing: Preprocessing, id: str, provenance: dict[str, Any]
    ) -> None:
        super().__init__(
            id=id,
            preprocessing=preprocessing,
            embed_dim=model.config.projection_dim,
            context_length=min(model.config.text_config.max_position_embeddings, tokenizer.model_max_length),
            logit_scale=float(model.logit_scale.detach().exp()),
            provenance=provenance,
        )
        self.model = model
        self._tokenizer = tokenizer
        _check_parts(model.config, tokenizer, preprocessing, id=id)
        check_text_path(self, self._own_text_features)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _own_text_features(self, texts: list[str]) -> Tensor:
        inputs = self._tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        features = self.model.get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return features.pooler_output

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
        end = self.model.config.text_config.eos_token_id
        # A text is pooled at its first end token.
        is_end = tokens.ids if end == _UNKNOWN_END else (tokens.ids == end).int()
        return self.model.text_projection(hidden[rows, is_end.argmax(dim=1)])


def _check_parts(config: CLIPConfig, tokenizer: Any, preprocessing: Preprocessing, *, id: str) -> None:
    """Raise ValueError unless tokenizer and preprocessing are those of the two towers."""
    text, vision = config.text_config, config.vision_config
    weights.check_vocabulary(len(tokenizer), text.vocab_size, tokenizer.padding_side, id=id)
    if preprocessing.image_size != vision.image_size:
        raise ValueError(
            f"{id}: preprocessor_config.json makes images of {preprocessing.image_size} px, but the image tower of "
            f"config.json reads {vision.image_size} px"
        )
    weights.check_settings({"num_channels": vision.num_channels}, {"num_channels": (3,)}, source=f"{id}, config.json")
    written = tokenizer("x")["input_ids"]
    if text.eos_token_id not in (_UNKNOWN_END, *written):
        # transformers would pool every text at its first token, whatever it says.
        raise ValueError(
            f"{id}, config.json: texts are pooled at the token eos_token_id={text.eos_token_id} of text_config, which "
            f"its tokenizer never writes; it ends texts with {written[-1]}"
        )


def read_preprocessing(settings: Mapping[str, Any], *, source: str) -> Preprocessing:
    """Preprocessing from the settings of a ``CLIPImageProcessor``, as ``preprocessor_config.json`` holds them.

    Noise is added to [0, 1] pixels before anything else, so another scale or none goes into mean and standard
    deviation, where it has exactly the same effect.

    Raises
    ------
    ValueError
        A setting that would have to be passed over, or sizes and a crop that do not lead to one square.
    """
    weights.check_settings(settings, _PROCESSOR_SETTINGS, source=source)
    processor = CLIPImageProcessor(**settings)
    size, crop = _plain(processor.size), _plain(processor.crop_size) if processor.do_center_crop else None
    edge = size.get("shortest_edge") or size.get("height") or 0
    square = {"height": edge, "width": edge}
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    geometry = None
    if size == {"shortest_edge": edge} and crop == square:
        geometry = "shortest-edge-crop"
    elif size == square and crop in (None, square):
        geometry = "squash"
    if geometry is None or scale <= 0:
        raise ValueError(
            f"{source}: unsupported preprocessing: size {size}, crop_size {crop}, do_center_crop="
            f"{processor.do_center_crop}, rescale_factor={processor.rescale_factor}; need a shortest edge with a "
            "square crop of the same size, or height = width without another crop, and a factor above 0"
        )
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    with parsed(source):
        return Preprocessing(
            image_size=edge,
            geometry=geometry,
            interpolation=_FILTERS[processor.resample],
            mean=tuple(value / scale for value in per_channel(mean)),
            std=tuple(value / scale for value in per_channel(std)),
            floor_margin=True,
        )


def load_hub_clip(entry: ModelEntry, *, weights_dir: Path, offline: bool) -> DualEncoder:
    """Load ``hf:OWNER/NAME``: with transformers, or with open_clip where the repository has its format only.

    Parameters and errors are those of `load_transformers_clip`.
    """
    repository = entry.source.removeprefix(HUB_PREFIX)
    folder = weights.model_folder(entry, weights_dir) or _hub_folder(repository, CONFIG_NAME, offline=offline)
    # Beside open_clip's own configuration may lie that of a text tower or of a timm model.
    is_clip = folder is not None and weights.is_clip(folder)
    if not is_clip and _hub_folder(repository, OPEN_CLIP_CONFIG_NAME, offline=offline) is not None:
        from medrobust_lib.models.open_clip import load_open_clip

        return load_open_clip(replace(entry, source=f"hf-hub:{repository}"), weights_dir=weights_dir, offline=offline)
    if folder is not None and (folder / CONFIG_NAME).is_file():
        weights.check_clip_type(folder, id=entry.id)
    return load_transformers_clip(entry, weights_dir=weights_dir, offline=offline)


def load_transformers_clip(entry: ModelEntry, *, weights_dir: Path, offline: bool) -> TransformersClipEncoder:
    """Load a ``CLIPModel`` from a folder or through transformers' own call to the hub.

    Parameters
    ----------
    entry : ModelEntry
        Its ``source`` is ``hf:OWNER/NAME`` or ``local-dir:PATH``.
    weights_dir : Path
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
    place = entry.source.removeprefix(HUB_PREFIX)
    folder = weights.model_folder(entry, weights_dir)
    if folder is not None:
        place = str(folder)
        check_folder(folder, id=entry.id)
        weights.check_hashes(folder)
    try:
        with weights.hub_access(offline=offline or folder is not None), weights.explained_errors(place):
            tokenizer, preprocessing = _read_parts(place, id=entry.id)
            model = weights.read_pretrained(CLIPModel, place, dtype=torch.float32)
    except OSError as error:
        raise weights.missing_weights(entry, weights_dir=weights_dir, offline=offline, reason=error) from error
    folder = folder or weights.hub_snapshot(place, CONFIG_NAME)
    provenance = weights.provenance(entry, {} if folder is None else weights.file_hashes(folder))
    return TransformersClipEncoder(model, tokenizer, preprocessing=preprocessing, id=entry.id, provenance=provenance)


def check_folder(folder: Path, *, id: str) -> None:
    """Raise unless a folder holds a CLIP that can be loaded, as far as this is known without reading its weights.

    Raises
    ------
    FileNotFoundError
        A file is missing; names it.
    ValueError
        The model is another than CLIP, or one of its settings is not supported.
    """
    weights.check_no_adapter(folder, id=id)
    if (folder / CONFIG_NAME).is_file():
        weights.check_clip_type(folder, id=id)
    wanted = {
        CONFIG_NAME: [CONFIG_NAME],
        # Newer processors keep the settings of images among their own.
        utils.IMAGE_PROCESSOR_NAME: [utils.PROCESSOR_NAME, utils.IMAGE_PROCESSOR_NAME],
        " or ".join(_WEIGHT_NAMES): _WEIGHT_NAMES,
    }
    weights.check_complete(folder, wanted, id=id)
    # Nearly every CLIP shares this vocabulary.
    weights.check_tokenizer(folder, id=id, published="openai/clip-vit-base-patch32")
    with weights.hub_access(offline=True), weights.explained_errors(str(folder)):
        _check_parts(CLIPConfig.from_pretrained(str(folder)), *_read_parts(str(folder), id=id), id=id)


def _read_parts(place: str, *, id: str) -> tuple[Any, Preprocessing]:
    """Tokenizer and preprocessing of a folder or repository."""
    settings, _ = CLIPImageProcessor.get_image_processor_dict(place)
    return AutoTokenizer.from_pretrained(place), read_preprocessing(settings, source=f"{id}, preprocessor_config.json")


def _hub_folder(repository: str, name: str, *, offline: bool) -> Path | None:
    """Folder in the hub cache with a small file of a repository, fetched where that is allowed; None if there is none.

    Of an error of the hub, too: the loader that follows meets the same and explains it.
    """
    try:
        with weights.hub_access(offline=offline):
            return Path(hf_hub_download(repository, name, local_files_only=offline)).parent
    except OSError:
        return None


def _plain(size: Any) -> dict[str, int]:
    """Size object of transformers as a dictionary of the values that are set."""
    return {name: value for name, value in dict(size).items() if value is not None}
