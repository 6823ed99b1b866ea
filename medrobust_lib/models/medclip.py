"""MedCLIP (Swin-T or ResNet-50 beside Bio_ClinicalBERT), loaded from the authors' checkpoint.

The towers are those of transformers and torchvision, built from configurations written out here, so that no
network is needed. Upstream: Wang et al. 2022, arXiv:2210.10163, and its public code.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from medrobust_lib.models.catalogue import ModelEntry
from medrobust_lib.models.dual_encoder import DualEncoder, Tokens, check_text_lengths
from medrobust_lib.models.geometry import Preprocessing
from medrobust_lib.models.weights import (
    describe_files,
    find_vocabulary,
    find_weights,
    load_strictly,
    read_state_dict,
)

CONTEXT_LENGTH = 77
EMBED_DIM = 512
IMAGE_MEAN, IMAGE_STD = 0.5862785803043838, 0.27950088968644304
TEXT_REPOSITORY = "emilyalsentzer/Bio_ClinicalBERT"
WEIGHT_NAMES = ("pytorch_model.bin", "model.safetensors")
LARGEST_LOG_SCALE = 4.6052

DEFAULT_PAD_LENGTH = 25
"""Positions over which a text is averaged by default; PromptSmooth and BAPLe pad MedCLIP's prompts to it."""

_RESNET50_BLOCKS = (3, 4, 6, 3)

# transformers 5 renamed the parts of a Swin block; the checkpoint keeps the names of transformers 4.
_SWIN_RENAMES = (
    (r"\.attention\.self\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.self\.(relative_position_)", r".attention.relative_position_bias.\1"),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
# Index tables that older versions stored; they follow from the configuration.
_DERIVED_KEYS = ("position_ids", "relative_position_index")


def clinical_bert() -> BertConfig:
    """Configuration of Bio_ClinicalBERT: BERT base with the cased vocabulary."""
    return BertConfig(
        vocab_size=28_996,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu",
        max_position_embeddings=512,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        pad_token_id=0,
    )


def swin_tiny() -> SwinConfig:
    """Configuration of microsoft/swin-tiny-patch4-window7-224."""
    return SwinConfig(
        image_size=224,
        patch_size=4,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        mlp_ratio=4.0,
        qkv_bias=True,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


@dataclass(frozen=True)
class MedCLIPArchitecture:
    """Sizes of the two towers.

    Attributes
    ----------
    vision : SwinConfig or tuple of 4 ints
        Configuration of a Swin transformer, or the number of bottleneck blocks in each stage of a ResNet.
    text : BertConfig
        Configuration of the text tower; its ``vocab_size`` is the one that the tokenizer must have.
    embed_dim : int
        d, length of a feature.
    image_size : int
        Side of the image, in pixels.
    """

    vision: SwinConfig | tuple[int, int, int, int]
    text: BertConfig
    embed_dim: int = EMBED_DIM
    image_size: int = 224


def published_architecture(model_id: str) -> MedCLIPArchitecture:
    """Sizes of the public checkpoints ``medclip-vit`` and ``medclip-rn50``.

    Raises
    ------
    ValueError
        For another id.
    """
    if model_id == "medclip-vit":
        return MedCLIPArchitecture(vision=swin_tiny(), text=clinical_bert())
    if model_id == "medclip-rn50":
        return MedCLIPArchitecture(vision=_RESNET50_BLOCKS, text=clinical_bert())
    raise ValueError(
        f"no published MedCLIP called {model_id!r}; there are medclip-vit and medclip-rn50 "
        "(pass architecture=... for other sizes)"
    )


class _SwinTower(nn.Module):
    def __init__(self, config: SwinConfig, embed_dim: int) -> None:
        super().__init__()
        self.model = SwinModel(config)
        self.projection_head = nn.Linear(config.hidden_size, embed_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection_head(self.model(pixels).pooler_output)


class _ResNetTower(nn.Module):
    def __init__(self, blocks: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        from torchvision.models.resnet import Bottleneck, ResNet

        self.model = ResNet(Bottleneck, list(blocks))
        self.model.fc = nn.Linear(self.model.fc.in_features, embed_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)


class _TextTower(nn.Module):
    def __init__(self, config: BertConfig, embed_dim: int) -> None:
        super().__init__()
        self.model = BertModel(config)
        self.projection_head = nn.Linear(config.hidden_size, embed_dim, bias=False)

    def forward(self, embeddings: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        hidden = self.model(
            inputs_embeds=embeddings, attention_mask=mask.long(), output_hidden_states=True
        ).hidden_states
        layers = (hidden[1] + hidden[2] + hidden[-1]) / 3
        weights = pooled.to(layers.dtype)
        return self.projection_head((weights[:, :, None] * layers).sum(dim=1) / weights.sum(dim=1, keepdim=True))


class MedCLIPNetwork(nn.Module):
    """Both towers and the log of the logit scale, under the names that the public checkpoint uses."""

    def __init__(self, architecture: MedCLIPArchitecture) -> None:
        super().__init__()
        vision = _SwinTower if isinstance(architecture.vision, SwinConfig) else _ResNetTower
        self.vision_model = vision(architecture.vision, architecture.embed_dim)
        self.text_model = _TextTower(architecture.text, architecture.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


class MedCLIPEncoder(DualEncoder):
    """MedCLIP behind the common interface.

    Parameters
    ----------
    network : MedCLIPNetwork
        Both towers, weights loaded.
    tokenizer : BertWordPieceTokenizer
        Lower-casing WordPiece tokenizer over Bio_ClinicalBERT's vocabulary.
    id : str
        Name under which the model was loaded.
    image_size : int
        Side of the image, in pixels.
    pad_length : int or None
        Positions over which the word vectors of a text are averaged, padding included:

        * an int p: the first ``max(p, number of real tokens)`` positions of each text. A feature then
          depends on its own text only, so class features are the same whatever is encoded beside them.
          0 averages the real tokens only; the default 25 is what PromptSmooth and BAPLe use.
        * None: all positions of the batch, padded to its longest text, as in MedCLIP's own code. A feature
          then changes with the texts encoded beside it.
    provenance : dict
        JSON values: source, files, licence.
    """

    def __init__(
        self,
        network: MedCLIPNetwork,
        tokenizer: BertWordPieceTokenizer,
        *,
        id: str,
        image_size: int,
        pad_length: int | None = DEFAULT_PAD_LENGTH,
        provenance: dict,
    ) -> None:
        if pad_length is not None and not 0 <= pad_length <= CONTEXT_LENGTH:
            raise ValueError(f"pad_length must be None or an int in [0, {CONTEXT_LENGTH}], not {pad_length}")
        log_scale = min(max(float(network.logit_scale.detach()), 0.0), LARGEST_LOG_SCALE)
        super().__init__(
            id=id,
            preprocessing=Preprocessing(
                image_size=image_size,
                geometry="pad-square",
                interpolation="bicubic",
                mean=(IMAGE_MEAN,) * 3,
                std=(IMAGE_STD,) * 3,
                grayscale=True,
            ),
            embed_dim=network.text_model.projection_head.out_features,
            context_length=CONTEXT_LENGTH,
            logit_scale=math.exp(log_scale),
            provenance={**provenance, "pad_length": pad_length},
        )
        self.network = network
        self.pad_length = pad_length
        self._tokenizer = tokenizer
        self._pad_id = tokenizer.token_to_id("[PAD]")

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.network.vision_model(pixels)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokens of k texts, padded to ``max(pad_length, longest text)`` positions.

        With ``pad_length=None`` the padding, and hence the features, depend on the longest of ``texts``; with
        an int they do not (see :class:`MedCLIPEncoder`). Text is lower-cased although the vocabulary is cased,
        as the tokenizer of the hub id does.

        Parameters
        ----------
        texts : sequence of str
            k texts of at most 77 tokens, start and end included.

        Returns
        -------
        Tokens
            ids int64 [k, L] and mask bool [k, L].

        Raises
        ------
        ValueError
            If a text is longer than 77 tokens.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        counts = [len(ids) for ids in encoded]
        check_text_lengths(texts, counts, context_length=self.context_length, model_id=self.id)
        ids = torch.full((len(texts), max(self.pad_length or 0, *counts)), self._pad_id)
        for row, tokens in zip(ids, encoded, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return Tokens(ids, torch.arange(ids.shape[1]) < torch.tensor(counts)[:, None])

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """Word embeddings [k, L, 768] of the tokens, without positions, on the model's device."""
        return self.network.text_model.model.get_input_embeddings()(tokens.ids.to(self.device))

    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        if self.pad_length is None:
            pooled = torch.ones_like(tokens.mask)
            return self.network.text_model(embeddings, tokens.mask, pooled)
        mask = tokens.mask
        absent = self.pad_length - mask.shape[1]
        if absent > 0:
            padding = self.network.text_model.model.get_input_embeddings().weight[self._pad_id]
            embeddings = torch.cat([embeddings, padding.expand(len(mask), absent, -1)], dim=1)
            mask = functional.pad(mask, (0, absent))
        lengths = mask.sum(dim=1).clamp(min=self.pad_length)
        pooled = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        return self.network.text_model(embeddings, mask, pooled)


def convert_state_dict(state_dict: Mapping[str, Tensor], *, expected: Collection[str]) -> dict[str, Tensor]:
    """Checkpoint tensors under the names of the installed libraries.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        As stored by MedCLIP's authors: ``vision_model.*``, ``text_model.*`` and ``logit_scale``.
    expected : collection of str
        Keys of the network; a key among them keeps its name.

    Returns
    -------
    dict of str to Tensor
        The same tensors without derived index tables (``position_ids``, ``relative_position_index``), the parts
        of the Swin blocks renamed where transformers did so.
    """
    converted = {}
    for key, tensor in state_dict.items():
        if key.endswith(_DERIVED_KEYS):
            continue
        if key not in expected and key.startswith("vision_model.model.encoder."):
            for pattern, replacement in _SWIN_RENAMES:
                key = re.sub(pattern, replacement, key)
        converted[key] = tensor
    return converted


def read_tokenizer(vocabulary: Path, *, vocab_size: int) -> BertWordPieceTokenizer:
    """Lower-casing WordPiece tokenizer over a ``vocab.txt``, one token a line.

    Raises
    ------
    ValueError
        If the file does not hold ``vocab_size`` tokens, the special ones among them.
    """
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"{vocabulary} holds {tokenizer.get_vocab_size():,} tokens, but {vocab_size:,} expected by the text "
            "tower: it belongs to another model or is cut short; delete it and fetch it again"
        )
    lacking = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if tokenizer.token_to_id(token) is None]
    if lacking:
        raise ValueError(f"{vocabulary} lacks the special tokens {', '.join(lacking)}: it is no BERT vocabulary")
    return tokenizer


def load_medclip(
    entry: ModelEntry,
    *,
    weights_dir: Path | None,
    offline: bool,
    pad_length: int | None = DEFAULT_PAD_LENGTH,
    architecture: MedCLIPArchitecture | None = None,
) -> MedCLIPEncoder:
    """MedCLIP from ``weights_dir/<id>/pytorch_model.bin`` (or ``model.safetensors`` with the same keys).

    Parameters
    ----------
    entry : ModelEntry
        Row of the registry; its id is ``medclip-vit`` or ``medclip-rn50`` unless ``architecture`` is given.
    weights_dir : Path or None
        Folder of all weights. ``vocab.txt`` is looked for beside the weights, then on the hub.
    offline : bool
        Whether to leave the network alone.
    pad_length : int or None
        See :class:`MedCLIPEncoder`.
    architecture : MedCLIPArchitecture, optional
        Other sizes than the published ones.

    Returns
    -------
    MedCLIPEncoder
        In float32 on the CPU, frozen, in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If weights or vocabulary are missing, naming the places looked at and the command to run.
    ValueError
        If keys or shapes do not fit, if the vocabulary has the wrong size, or for an unknown id.
    """
    architecture = architecture or published_architecture(entry.id)
    weights = find_weights(entry, WEIGHT_NAMES, weights_dir=weights_dir)
    vocabulary = find_vocabulary(entry, TEXT_REPOSITORY, weights_dir=weights_dir, offline=offline)
    tokenizer = read_tokenizer(vocabulary, vocab_size=architecture.text.vocab_size)
    network = MedCLIPNetwork(architecture)
    state_dict = convert_state_dict(read_state_dict(weights), expected=network.state_dict().keys())
    load_strictly(network, state_dict, source=weights)
    encoder = MedCLIPEncoder(
        network,
        tokenizer,
        id=entry.id,
        image_size=architecture.image_size,
        pad_length=pad_length,
        provenance=describe_files(entry, weights, vocabulary),
    )
    return encoder.eval().requires_grad_(False)
