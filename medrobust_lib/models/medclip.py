"""MedCLIP, UniMed-CLIP and RobustMedCLIP, loaded from their authors' checkpoints without their authors' code.

MedCLIP (Wang et al. 2022, arXiv:2210.10163) is Swin-T or ResNet-50 beside Bio_ClinicalBERT: the towers are those of
transformers and torchvision. UniMed-CLIP (Khattak et al. 2024, arXiv:2412.10372) is ViT-B/16 beside BiomedBERT,
trained with a fork of open_clip whose ``CLIP`` class holds a BERT as ``text_encoder`` and takes an argument that
upstream does not know; upstream's ``CustomTextCLIP`` computes the same with other names, so the keys are renamed.
The sizes come with the package or are the defaults of the libraries, so that no network is needed. RobustMedCLIP
(Imam et al. 2025, arXiv:2505.15425) is BiomedCLIP whose fused ``qkv`` layers gain three separate low-rank products,
without any scaling: here each is added to its third of the layer's weight.
"""

import itertools
import math
import re
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from medrobust_lib.models import weights
from medrobust_lib.models.catalogue import OPEN_CLIP_CONFIG_NAME, ModelEntry
from medrobust_lib.models.dual_encoder import DualEncoder, Tokens, check_text_lengths
from medrobust_lib.models.geometry import Preprocessing
from medrobust_lib.models.loading import find_model
from medrobust_lib.models.open_clip import OpenClipEncoder, build_folder, load_open_clip

UNIMED_FOLDER = Path(__file__).with_name("unimedclip")
EMBED_DIM = 512
IMAGE_MEAN, IMAGE_STD = 0.5862785803043838, 0.27950088968644304
LARGEST_LOG_SCALE = 4.6052

PAD_LENGTH = 25
"""Positions over which a text is averaged at least, padding included; PromptSmooth and BAPLe pad MedCLIP's prompts to
it. MedCLIP's own code pads to the longest text of a batch, so that a feature changes with the texts beside it."""

# transformers 5 renamed the parts of a Swin block; the checkpoint keeps the names of transformers 4.
_SWIN_RENAMES = (
    (r"\.attention\.self\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.self\.(relative_position_)", r".attention.relative_position_bias.\1"),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
# UniMed-CLIP's fork of open_clip, and RobustMedCLIP's model.pth: a vision tower with wrapped qkv layers beside a BERT.
_FORK_RENAMES = (
    (r"^text_encoder\.", "text."),
    (r"^lora_vit\.lora_vit\.", "visual."),
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
)
# Index tables that older versions stored; they follow from the configuration.
_DERIVED_KEYS = ("position_ids", "relative_position_index")


class _SwinTower(nn.Module):
    def __init__(self, config: SwinConfig, embed_dim: int) -> None:
        super().__init__()
        self.model = SwinModel(config)
        self.projection_head = nn.Linear(config.hidden_size, embed_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection_head(self.model(pixels).pooler_output)


def _resnet_tower(blocks: Sequence[int], embed_dim: int) -> nn.Sequential:
    network = ResNet(Bottleneck, list(blocks))
    network.fc = nn.Linear(network.fc.in_features, embed_dim, bias=False)
    return nn.Sequential(OrderedDict(model=network))


class _TextTower(nn.Module):
    def __init__(self, config: BertConfig, embed_dim: int) -> None:
        super().__init__()
        self.model = BertModel(config)
        self.projection_head = nn.Linear(config.hidden_size, embed_dim, bias=False)

    def forward(self, embeddings: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        encoded = self.model(inputs_embeds=embeddings, attention_mask=mask.long(), output_hidden_states=True)
        hidden = encoded.hidden_states
        layers = (hidden[1] + hidden[2] + hidden[-1]) / 3
        counted = pooled.to(layers.dtype)
        return self.projection_head((counted[:, :, None] * layers).sum(dim=1) / counted.sum(dim=1, keepdim=True))


class MedCLIPNetwork(nn.Module):
    """Both towers and the log of the logit scale, under the names that the public checkpoint uses.

    The image tower is a Swin transformer, or a ResNet with so many bottleneck blocks in each stage.
    """

    def __init__(
        self, vision: SwinConfig | tuple[int, int, int, int], text: BertConfig, embed_dim: int = EMBED_DIM
    ) -> None:
        super().__init__()
        tower = _SwinTower if isinstance(vision, SwinConfig) else _resnet_tower
        self.vision_model = tower(vision, embed_dim)
        self.text_model = _TextTower(text, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def published_network(model_id: str) -> MedCLIPNetwork:
    """Network of the public checkpoints ``medclip-vit`` and ``medclip-rn50``: Swin-T or ResNet-50, cased BERT base."""
    vision = SwinConfig() if model_id == "medclip-vit" else (3, 4, 6, 3)
    return MedCLIPNetwork(vision, BertConfig(vocab_size=28_996))


class MedCLIPEncoder(DualEncoder):
    """MedCLIP behind the common interface; its tokenizer lower-cases over Bio_ClinicalBERT's vocabulary."""

    def __init__(
        self, network: MedCLIPNetwork, tokenizer: BertWordPieceTokenizer, *, id: str, image_size: int, provenance: dict
    ) -> None:
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
            context_length=77,
            logit_scale=math.exp(log_scale),
            provenance={**provenance, "pad_length": PAD_LENGTH},
        )
        self.network = network
        self._tokenizer = tokenizer
        self._pad_id = tokenizer.token_to_id("[PAD]")

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.network.vision_model(pixels)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokens of k texts, padded to `PAD_LENGTH` positions at least.

        Text is lower-cased although the vocabulary is cased, as the tokenizer of the hub id does.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = self._tokenizer.encode_batch(texts)
        counts = [len(encoding) for encoding in encoded]
        check_text_lengths(texts, counts, context_length=self.context_length, model_id=self.id)
        for encoding in encoded:
            encoding.pad(max(PAD_LENGTH, *counts), pad_id=self._pad_id)
        masks = torch.tensor([encoding.attention_mask for encoding in encoded])
        return Tokens(torch.tensor([encoding.ids for encoding in encoded]), masks.bool())

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """Word embeddings [k, L, 768] of the tokens, without positions, on the model's device."""
        return self.network.text_model.model.get_input_embeddings()(tokens.ids.to(self.device))

    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        mask = tokens.mask
        absent = PAD_LENGTH - mask.shape[1]
        if absent > 0:
            padding = self.network.text_model.model.get_input_embeddings().weight[self._pad_id]
            embeddings = torch.cat([embeddings, padding.expand(len(mask), absent, -1)], dim=1)
            mask = functional.pad(mask, (0, absent))
        lengths = mask.sum(dim=1).clamp(min=PAD_LENGTH)
        pooled = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        return self.network.text_model(embeddings, mask, pooled)


def convert_state_dict(state_dict: Mapping[str, Tensor], *, expected: Collection[str]) -> dict[str, Tensor]:
    """Checkpoint tensors under the names of the installed libraries.

    Derived index tables are left out, the parts of the Swin blocks renamed where transformers did so, and the towers of
    UniMed-CLIP and of RobustMedCLIP's ``model.pth`` as upstream's open_clip calls them; a key among the `expected`
    ones, those of the network, keeps its name.
    """
    converted = {}
    for key, tensor in state_dict.items():
        if key.endswith(_DERIVED_KEYS):
            continue
        if key not in expected:
            renames = _SWIN_RENAMES if key.startswith("vision_model.model.encoder.") else _FORK_RENAMES
            for pattern, replacement in renames:
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
    _check_size(vocabulary, tokenizer.get_vocab_size(), vocab_size)
    lacking = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if tokenizer.token_to_id(token) is None]
    if lacking:
        raise ValueError(f"{vocabulary} lacks the special tokens {', '.join(lacking)}: it is no BERT vocabulary")
    return tokenizer


def _check_size(vocabulary: Path, known: int, expected: int) -> None:
    if known != expected:
        raise ValueError(
            f"{vocabulary} holds {known:,} tokens, but {expected:,} expected by the text tower: it belongs to "
            "another model or is cut short; delete it and fetch it again"
        )


def _find_vocabulary(entry: ModelEntry, repository: str, *, weights_dir: Path, offline: bool) -> Path:
    """The ``vocab.txt`` in ``weights_dir/<id>/``, else that of a hub repository.

    Raises
    ------
    FileNotFoundError
        Naming both places and the command that fetches the file.
    """
    place = weights_dir / entry.id / weights.VOCABULARY_NAME
    if place.is_file():
        return place
    try:
        with weights.hub_access(offline=offline):
            return Path(hf_hub_download(repository, weights.VOCABULARY_NAME, local_files_only=offline))
    except OSError as error:
        raise FileNotFoundError(
            f"no vocab.txt for the tokenizer of {entry.id}; looked at: {place}, {repository} on the hub"
            f"{' (cache only)' if offline else ''}. Run `python data_scripts/fetch_weights.py {entry.id}`"
        ) from error


def _fill(network: nn.Module, checkpoint: Path) -> None:
    state_dict = convert_state_dict(weights.read_state_dict(checkpoint), expected=network.state_dict())
    with weights.explained_errors(str(checkpoint)):
        network.load_state_dict(state_dict)


def load_medclip(entry: ModelEntry, *, weights_dir: Path, offline: bool) -> MedCLIPEncoder:
    """MedCLIP from ``weights_dir/<id>/pytorch_model.bin`` (or ``model.safetensors`` with the same keys).

    Parameters
    ----------
    entry : ModelEntry
        Row of ``medclip-vit`` or ``medclip-rn50``.
    weights_dir : Path
        Folder of all weights. ``vocab.txt`` is looked for beside the weights, then on the hub.
    offline : bool
        Whether to leave the network alone.

    Returns
    -------
    MedCLIPEncoder
        In float32 on the CPU, frozen, in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If weights or vocabulary are missing, naming the places looked at and the command to run.
    ValueError
        If keys or shapes do not fit (the first ten are listed), or the vocabulary has the wrong size.
    """
    checkpoint = weights.find_weights(entry, ("pytorch_model.bin", "model.safetensors"), weights_dir=weights_dir)
    vocabulary = _find_vocabulary(entry, "emilyalsentzer/Bio_ClinicalBERT", weights_dir=weights_dir, offline=offline)
    network = published_network(entry.id)
    tokenizer = read_tokenizer(vocabulary, vocab_size=network.text_model.model.config.vocab_size)
    _fill(network, checkpoint)
    provenance = weights.describe_files(entry, checkpoint, vocabulary)
    encoder = MedCLIPEncoder(network, tokenizer, id=entry.id, image_size=entry.image_size, provenance=provenance)
    return encoder.eval().requires_grad_(False)


def load_unimedclip(entry: ModelEntry, *, weights_dir: Path, offline: bool) -> OpenClipEncoder:
    """UniMed-CLIP from ``weights_dir/<id>/unimed_clip_vit_b16.pt`` (or ``.safetensors`` with the same keys).

    Its sizes, ViT-B/16 and uncased BERT base, stand in ``models/unimedclip`` in open_clip's format, CLIP's own image
    preprocessing with them.
    Parameters, result and errors are those of `load_medclip`.
    """
    names = ("unimed_clip_vit_b16.pt", "unimed_clip_vit_b16.safetensors")
    checkpoint = weights.find_weights(entry, names, weights_dir=weights_dir)
    bert = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    vocabulary = _find_vocabulary(entry, bert, weights_dir=weights_dir, offline=offline)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in (*UNIMED_FOLDER.glob("*.json"), vocabulary):
            shutil.copyfile(path, folder / path.name)  # the bytes alone: the installation may be read-only
        network, tokenizer = build_folder(folder)
    _check_size(vocabulary, len(tokenizer.tokenizer), network.text.vocab_size)
    _fill(network, checkpoint)
    provenance = weights.describe_files(entry, checkpoint, vocabulary)
    return OpenClipEncoder(network, tokenizer, id=entry.id, provenance=provenance).eval().requires_grad_(False)


# A [r, d] and B [d, r] by block and part (q, k or v) of its layer, whose weight gains B @ A in that third.
Adapters = dict[tuple[int, str], tuple[Tensor, Tensor]]

_ADAPTER_KEY = "visual.trunk.blocks.{}.attn.qkv.linear_{}_{}.weight"  # of a block, of A or B, of q, k or v
_ADAPTER = re.compile(
    r"visual\.trunk\.blocks\.(?P<block>\d+)\.attn\.qkv\.linear_(?P<side>[ab])_(?P<part>[qkv])\.weight"
)
_SHORT_KEY = re.compile(r"w_(?P<side>[ab])_(?P<number>\d+)")
_HEAD_KEY = re.compile(r"fc_\d+in_\d+out")


def short_file_keys(tensors: Mapping[str, Tensor], *, blocks: int, source: str | Path) -> dict[str, Tensor]:
    """Tensors of the authors' ``lora_weights.safetensors`` under open_clip's names, for a tower of so many blocks.

    The file numbers its pairs ``w_a_000``, ``w_b_000``, ... block by block. The authors' code collects q and v
    only, so that k, although trained, is not in the file; a file with three pairs a block holds q, k, v.

    Raises
    ------
    ValueError
        If the pairs are incomplete, or are neither two nor three a block; names the `source`.
    """
    sides: dict[str, dict[int, Tensor]] = {"a": {}, "b": {}}
    renamed = {}
    for key, tensor in tensors.items():
        match = _SHORT_KEY.fullmatch(key)
        if match:
            sides[match["side"]][int(match["number"])] = tensor
        else:
            renamed["visual.head.proj.weight" if _HEAD_KEY.fullmatch(key) else key] = tensor
    numbers = sorted(sides["a"])
    if numbers != sorted(sides["b"]) or numbers != list(range(len(numbers))):
        raise ValueError(
            f"{source}: the adapters must come in pairs numbered from 0; found w_a {numbers}, w_b {sorted(sides['b'])}"
        )
    parts = {2 * blocks: "qv", 3 * blocks: "qkv"}.get(len(numbers))
    if parts is None:
        raise ValueError(
            f"{source} holds {len(numbers)} adapter pairs; a vision tower of {blocks} blocks needs "
            f"{2 * blocks} (q, v) or {3 * blocks} (q, k, v)"
        )
    for number, (block, part) in enumerate(itertools.product(range(blocks), parts)):
        for side in "ab":
            renamed[_ADAPTER_KEY.format(block, side, part)] = sides[side][number]
    return renamed


def take_adapters(
    state_dict: Mapping[str, Tensor], *, blocks: int, source: str | Path
) -> tuple[Adapters, dict[str, Tensor]]:
    """Adapters, and the other tensors, of those under open_clip's names; for a vision tower of so many blocks.

    The k adapters may lack.

    Raises
    ------
    ValueError
        If a block has no q or v adapter, a factor lacks its partner, or the tower has no such block; names the
        `source` and the first ten places.
    """
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    others = {}
    for key, tensor in state_dict.items():
        match = _ADAPTER.fullmatch(key)
        if match:
            found.setdefault((int(match["block"]), match["part"]), {})[match["side"]] = tensor
        else:
            others[key] = tensor
    needed = set(itertools.product(range(blocks), "qv"))
    incomplete = {place for place in needed | set(found) if set(found.get(place, ())) != {"a", "b"}}
    outside = {place for place in found if place[0] >= blocks}
    if incomplete or outside:
        named = ", ".join(f"block {block} {part}" for block, part in sorted(incomplete | outside)[:10])
        raise ValueError(f"{source}: adapters missing, incomplete or beyond the {blocks} blocks: {named}")
    return {place: (pair["a"], pair["b"]) for place, pair in found.items()}, others


def add_products(visual: nn.Module, adapters: Adapters, *, source: str | Path) -> None:
    """Add the products to the weights of open_clip's timm tower, with ``trunk.blocks[i].attn.qkv``, in place.

    Raises
    ------
    ValueError
        If a pair does not fit its layer, or would make its weight NaN or infinite.
    """
    for (block, part), (a, b) in adapters.items():
        layer = visual.trunk.blocks[block].attn.qkv
        width = layer.in_features
        if a.ndim != 2 or a.shape[1] != width or b.shape != a.shape[::-1]:
            raise ValueError(
                f"{source}, block {block}: the {part} adapter has A {tuple(a.shape)} and B {tuple(b.shape)}, not "
                f"A (r, {width}) and B ({width}, r)"
            )
        product = b.to(layer.weight) @ a.to(layer.weight)
        if not product.isfinite().all():
            raise ValueError(f"{source}, block {block}: the {part} adapter holds NaN or infinite values")
        with torch.no_grad():
            layer.weight[width * "qkv".index(part) :][:width] += product


def load_robustmedclip(entry: ModelEntry, *, weights_dir: Path, offline: bool) -> OpenClipEncoder:
    """RobustMedCLIP: BiomedCLIP with the adapters in ``weights_dir/<id>/`` merged into its weights.

    ``model.pth`` is preferred, since ``lora_weights.safetensors`` lacks the k adapters, of which a warning tells.
    BiomedCLIP is taken from ``weights_dir/<id>/`` if its configuration lies there, else loaded as the model
    ``biomedclip``. The logit scale is BiomedCLIP's: the authors trained and scored without one.
    Parameters and errors are those of `load_medclip`.

    Warns
    -----
    UserWarning
        If the file lacks the k adapters: they are then zero, and the model is not the one that was published.
    """
    checkpoint = weights.find_weights(entry, ("model.pth", "lora_weights.safetensors"), weights_dir=weights_dir)
    base_entry = find_model("biomedclip")
    if (checkpoint.parent / OPEN_CLIP_CONFIG_NAME).is_file():
        base_entry = replace(base_entry, id=entry.id)
    encoder = load_open_clip(base_entry, weights_dir=weights_dir, offline=offline)
    tensors, own = weights.read_state_dict(checkpoint), encoder.model.state_dict()
    blocks = len(encoder.model.visual.trunk.blocks)
    if any(_SHORT_KEY.fullmatch(key) for key in tensors):
        state_dict = own | short_file_keys(tensors, blocks=blocks, source=checkpoint)
    else:  # the logit scale is not in the file: the authors trained without a temperature
        state_dict = {"logit_scale": own["logit_scale"]} | convert_state_dict(tensors, expected=own)
    adapters, backbone = take_adapters(state_dict, blocks=blocks, source=checkpoint)
    with weights.explained_errors(str(checkpoint)):
        encoder.model.load_state_dict(backbone)
    without_keys = blocks - sum(part == "k" for _, part in adapters)
    if without_keys:
        warnings.warn(
            f"{checkpoint} holds no k adapters for {without_keys} of {blocks} blocks (the authors' code trains "
            "them but does not save them in lora_weights.safetensors); they are set to zero, so the features "
            "differ from the published model's; use the full model.pth where you can",
            UserWarning,
            stacklevel=2,
        )
    add_products(encoder.model.visual, adapters, source=checkpoint)
    base = {"id": "biomedclip", **encoder.provenance}
    encoder.id, encoder.provenance = entry.id, {**weights.describe_files(entry, checkpoint), "base": base}
    return encoder.eval().requires_grad_(False)
