"""Dual encoders in the format of Hugging Face transformers: PLIP, SigLIP, ``hf:OWNER/NAME``, anyone's folder."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPImageProcessor, CLIPTextConfig, utils

from medrobust_lib.files import parsed
from medrobust_lib.models import catalogue, weights
from medrobust_lib.models.catalogue import CONFIG_NAME, HUB_PREFIX, OPEN_CLIP_CONFIG_NAME, ModelEntry, read_table
from medrobust_lib.models.dual_encoder import DualEncoder, Tokens, check_text_lengths
from medrobust_lib.models.geometry import Preprocessing, per_channel
from medrobust_lib.models.text_frame import check_text_path, given_embeddings

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
    """A class of transformers with ``get_image_features`` and ``get_text_features`` behind the common interface.

    The class itself computes all features, so masks, pooling and projections are its own. Its text tower takes token
    ids only: :meth:`encode_embeddings` puts the embeddings in the place of what its word embedding gives for them.
    A tower whose features depend on masked padding, too (SigLIP, which pools at the last position), gets texts of the
    full width, and the mask only if its tokenizer gives one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
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
        If the tokenizer does not belong to the text tower, or the images are not those that the image tower reads, or
        the model has no ``logit_scale``.
    """

    @torch.no_grad()
    def __init__(
        self, model: Any, tokenizer: Any, *, preprocessing: Preprocessing, id: str, provenance: dict[str, Any]
    ) -> None:
        if not hasattr(model, "logit_scale"):
            raise ValueError(
                f"{id}: a {type(model).__name__} has no logit_scale, by which cosines become probabilities"
            )
        text, bias = model.config.text_config, getattr(model, "logit_bias", None)
        super().__init__(
            id=id,
            preprocessing=preprocessing,
            embed_dim=getattr(model.config, "projection_dim", None) or text.projection_size,
            context_length=min(text.max_position_embeddings - _reserved(model), tokenizer.model_max_length),
            logit_scale=float(model.logit_scale.detach().exp()),
            logit_bias=None if bias is None else float(bias.detach()),
            provenance=provenance,
        )
        self.model = model
        self._tokenizer = tokenizer
        _check_parts(model.config, tokenizer, preprocessing, id=id)
        own, wide = (self._features(self._tokens(["x"], full_width=full)) for full in (False, True))
        self._full_width = not torch.allclose(own, wide, rtol=0, atol=1e-3 * float(own.norm()))
        check_text_path(self, self._own_text_features)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _features(self, tokens: Tokens) -> Tensor:
        tokens = tokens.to(self.device)
        return self.model.get_text_features(tokens.ids, attention_mask=tokens.mask.long()).pooler_output

    def _own_text_features(self, texts: list[str]) -> Tensor:
        padding = (
            {"padding": "max_length", "max_length": self.context_length} if self._full_width else {"padding": True}
        )
        inputs = self._tokenizer(texts, return_tensors="pt", **padding).to(self.device)
        return self.model.get_text_features(inputs["input_ids"], inputs.get("attention_mask")).pooler_output

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokens of k texts, on the CPU, padded to the longest of them or to the width that the tower reads."""
        return self._tokens([texts] if isinstance(texts, str) else list(texts), full_width=self._full_width)

    def _tokens(self, texts: list[str], *, full_width: bool) -> Tokens:
        rows = self._tokenizer(texts, truncation=False)["input_ids"]
        counts = torch.tensor([len(row) for row in rows])
        check_text_lengths(texts, counts.tolist(), context_length=self.context_length, model_id=self.id)
        padding = self._tokenizer.pad_token_id or 0
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
        if full_width:
            ids = functional.pad(ids, (0, self.context_length - ids.shape[1]), value=padding)
        real = torch.arange(ids.shape[1]) < counts[:, None]
        masked = not full_width or "attention_mask" in self._tokenizer.model_input_names
        return Tokens(ids, real if masked else torch.ones_like(real))

    @property
    def _words(self) -> torch.nn.Module:
        return self.model.text_model.get_input_embeddings()

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """Word embeddings [k, L, w], without positions, on the model's device."""
        return self._words(tokens.ids.to(self.device))

    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        with given_embeddings(self._words, embeddings):
            return self._features(tokens)


def _reserved(model: Any) -> int:
    """Positions that no token gets: RoBERTa counts from behind that of the padding."""
    tables = (part for name, part in model.text_model.named_modules() if name.endswith("position_embeddings"))
    return sum(table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None)


def _check_parts(config: Any, tokenizer: Any, preprocessing: Preprocessing, *, id: str) -> None:
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
    if isinstance(text, CLIPTextConfig) and text.eos_token_id not in (_UNKNOWN_END, *written):
        # transformers would pool every text at its first token, whatever it says.
        raise ValueError(
            f"{id}, config.json: texts are pooled at the token eos_token_id={text.eos_token_id} of text_config, which "
            f"its tokenizer never writes; it ends texts with {written[-1]}"
        )


def read_preprocessing(settings: Mapping[str, Any], *, source: str) -> Preprocessing:
    """Preprocessing from the settings of an image processor, as ``preprocessor_config.json`` holds them.

    Noise is added to [0, 1] pixels before anything else, so another scale or none goes into mean and standard
    deviation, where it has exactly the same effect.

    Raises
    ------
    ValueError
        A setting that would have to be passed over, or sizes and a crop that do not lead to one square.
    """
    weights.check_settings(settings, _PROCESSOR_SETTINGS, source=source)
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIPImageProcessor"
    # Its kinds differ in what they do by default.
    processor = getattr(transformers, re.sub("(Fast|Pil)$", "", named.replace("FeatureExtractor", "ImageProcessor")))(
        **settings
    )
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
    is_dual = folder is not None and catalogue.is_dual(folder)
    if not is_dual and _hub_folder(repository, OPEN_CLIP_CONFIG_NAME, offline=offline) is not None:
        from medrobust_lib.models.open_clip import load_open_clip

        return load_open_clip(replace(entry, source=f"hf-hub:{repository}"), weights_dir=weights_dir, offline=offline)
    if folder is not None and (folder / CONFIG_NAME).is_file():
        catalogue.check_dual(folder, id=entry.id)
    return load_transformers_clip(entry, weights_dir=weights_dir, offline=offline)


def load_transformers_clip(entry: ModelEntry, *, weights_dir: Path, offline: bool) -> TransformersClipEncoder:
    """Load a dual encoder from a folder or through transformers' own call to the hub.

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
        If the model is no dual encoder, keys do not fit, a file is damaged or has a wrong SHA-256, or the tokenizer
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
            model = weights.read_pretrained(AutoModel, place, dtype=torch.float32)
    except OSError as error:
        raise weights.missing_weights(entry, weights_dir=weights_dir, offline=offline, reason=error) from error
    folder = folder or weights.hub_snapshot(place, CONFIG_NAME)
    provenance = weights.provenance(entry, {} if folder is None else weights.file_hashes(folder))
    return TransformersClipEncoder(model, tokenizer, preprocessing=preprocessing, id=entry.id, provenance=provenance)


def check_folder(folder: Path, *, id: str) -> None:
    """Raise unless a folder holds a dual encoder that can be loaded, as far as this is known without its weights.

    Raises
    ------
    FileNotFoundError
        A file is missing; names it.
    ValueError
        The model is no dual encoder, or one of its settings is not supported.
    """
    catalogue.check_no_adapter(folder, id=id)
    if (folder / CONFIG_NAME).is_file():
        catalogue.check_dual(folder, id=id)
    wanted = {
        CONFIG_NAME: [CONFIG_NAME],
        # Newer processors keep the settings of images among their own.
        utils.IMAGE_PROCESSOR_NAME: [utils.PROCESSOR_NAME, utils.IMAGE_PROCESSOR_NAME],
        " or ".join(_WEIGHT_NAMES): _WEIGHT_NAMES,
    }
    weights.check_complete(folder, wanted, id=id)
    with weights.hub_access(offline=True), weights.explained_errors(str(folder)):
        config = AutoConfig.from_pretrained(str(folder))
        # Nearly every CLIP shares this vocabulary.
        published = "openai/clip-vit-base-patch32" if isinstance(config.text_config, CLIPTextConfig) else ""
        weights.check_tokenizer(folder, id=id, published=published)
        _check_parts(config, *_read_parts(str(folder), id=id), id=id)


def _read_parts(place: str, *, id: str) -> tuple[Any, Preprocessing]:
    """Tokenizer and preprocessing of a folder or repository."""
    settings, _ = CLIPImageProcessor.get_image_processor_dict(place)
    preprocessing = read_preprocessing(settings, source=f"{id}, preprocessor_config.json")
    try:
        return AutoTokenizer.from_pretrained(place), preprocessing
    except ImportError as error:  # SigLIP's, of which no other form need be published
        needed = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{id}: run `pip install sentencepiece protobuf` for its tokenizer. Reason: {needed}"
        ) from error


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
