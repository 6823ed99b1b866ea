"""MedCLIP, UniMed-CLIP and RobustMedCLIP, loaded from their authors' checkpoints without their authors' code.

MedCLIP (Wang et al. 2022, arXiv:2210.10163) is Swin-T or ResNet-50 beside Bio_ClinicalBERT: the towers are those of
transformers and torchvision. UniMed-CLIP (Khattak et al. 2024, arXiv:2412.10372) is ViT-B/16 beside BiomedBERT,
trained with a fork of open_clip whose ``CLIP`` class holds a BERT as ``text_encoder`` and takes an argument that
upstream does not know; upstream's ``CustomTextCLIP`` computes the same with other names, so the keys are renamed.
The sizes come with the package or are the defaults of the libraries, so that no network is needed. RobustMedCLIP
(Imam et al. 2025, arXiv:2505.15425) is BiomedCLIP whose fused ``qkv`` layers gain three separate low-rank products,
without any scaling: here each is added to its third of the layer's weight. Its second form is MedCLIP's ResNet with a
product beside each convolution: here it is added to the middle of the kernel.
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
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
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

Renames = Sequence[tuple[str, Any]]  # patterns, and what re.sub puts in the place of each
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
# RobustMedCLIP's model.pth with a ResNet: MedCLIP's towers, each adapted convolution in a wrapper.
_RESNET_RENAMES = (
    (r"^text_encoder\.", "text_model."),
    (r"^lora_resnet\.lora_medclip\.", "vision_model."),
    (r"\.(conv\d)\.conv\.", r".\1."),
)
# Index tables that older versions stored, which follow from the configuration; adapters that stand there twice.
_DERIVED = re.compile(r".*(position_ids|relative_position_index)|lora_resnet\.w_[AB]s\..*")


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


def convert_state_dict(
    state_dict: Mapping[str, Tensor], *, expected: Collection[str], renames: Renames = _FORK_RENAMES
) -> dict[str, Tensor]:
    """Checkpoint tensors under the names of the installed libraries.

    Derived index tables are left out, the parts of the Swin blocks renamed where transformers did so, and the towers of
    UniMed-CLIP and of RobustMedCLIP's ``model.pth`` by the `renames`, as a rule into the names of upstream's open_clip;
    a key among the `expected` ones, those of the network, keeps its name.
    """
    converted = {}
    for key, tensor in state_dict.items():
        if _DERIVED.fullmatch(key):
            continue
        if key not in expected:
            of_swin = key.startswith("vision_model.model.encoder.")
            for pattern, replacement in _SWIN_RENAMES if of_swin else renames:
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


_MEDCLIP_FILES = ("pytorch_model.bin", "model.safetensors")


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
    checkpoint = weights.find_weights(entry, _MEDCLIP_FILES, weights_dir=weights_dir)
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


# Where RobustMedCLIP adapts: a layer, and q, k or v of a fused one, else "". A [r, in] and B [out, r] of each place.
Place = tuple[str, str]
Adapters = dict[Place, tuple[Tensor, Tensor]]
# What a file may hold, in the order of the network: the places that must be adapted, and all that can be.
Layouts = tuple[Sequence[Place], Sequence[Place]]

_ADAPTER = re.compile(r"(?P<layer>.+)\.linear_(?P<side>[ab])_?(?P<part>[qkv]?)\.weight")
_SHORT_KEY = re.compile(r"w_(?P<side>[ab])_(?P<number>\d+)")
_HEAD_KEY = re.compile(r"fc_\d+in_\d+out")


def short_file_keys(
    tensors: Mapping[str, Tensor], *, layouts: Layouts, head: str, source: str | Path
) -> dict[str, Tensor]:
    """Tensors of the authors' ``lora_weights.safetensors`` under the network's names, the projection's being `head`.

    The file numbers its pairs ``w_a_000``, ``w_b_000``, ... in the order of the network. Of a vision transformer the
    authors' code collects q and v only, so that k, although trained, is not in the file.

    Raises
    ------
    ValueError
        If the pairs are incomplete, or as many as in neither layout; names the `source`.
    """
    sides: dict[str, dict[int, Tensor]] = {"a": {}, "b": {}}
    renamed = {}
    for key, tensor in tensors.items():
        match = _SHORT_KEY.fullmatch(key)
        if match:
            sides[match["side"]][int(match["number"])] = tensor
        else:
            renamed[head if _HEAD_KEY.fullmatch(key) else key] = tensor
    numbers = sorted(sides["a"])
    if numbers != sorted(sides["b"]) or numbers != list(range(len(numbers))):
        raise ValueError(
            f"{source}: the adapters must come in pairs numbered from 0; found w_a {numbers}, w_b {sorted(sides['b'])}"
        )
    places = {len(layout): layout for layout in layouts}.get(len(numbers))
    if places is None:
        sizes = " or ".join(str(len(layout)) for layout in layouts)
        raise ValueError(f"{source} holds {len(numbers)} adapter pairs; this image tower needs {sizes}")
    for number, (layer, part) in enumerate(places):
        for side in "ab":
            renamed[f"{layer}.linear_{side}{part and '_' + part}.weight"] = sides[side][number]
    return renamed


def take_adapters(
    state_dict: Mapping[str, Tensor], *, layouts: Layouts, source: str | Path
) -> tuple[Adapters, dict[str, Tensor]]:
    """Adapters, and the other tensors, of those under the network's names.

    Raises
    ------
    ValueError
        If a place that must be adapted is not, a factor lacks its partner, or the network has no such place; names the
        `source` and the first ten places.
    """
    found: dict[Place, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in state_dict.items():
        match = _ADAPTER.fullmatch(key)
        if match:
            found.setdefault((match["layer"], match["part"]), {})[match["side"]] = tensor
        else:
            others[key] = tensor
    needed, known = map(set, layouts)
    incomplete = {place for place in needed | found.keys() if set(found.get(place, ())) != {"a", "b"}}
    wrong = sorted(incomplete | found.keys() - known)
    if wrong:
        named = ", ".join(" ".join(place).strip() for place in wrong[:10])
        raise ValueError(f"{source}: adapters missing, incomplete or of no layer of the network: {named}")
    return {place: (pair["a"], pair["b"]) for place, pair in found.items()}, others


def add_products(network: nn.Module, adapters: Adapters, *, source: str | Path) -> None:
    """Add the products to the weights in place: to a third of a fused layer, or to the middle of a kernel.

    Raises
    ------
    ValueError
        If a pair does not fit its layer, or would make its weight NaN or infinite.
    """
    for (layer, part), (a, b) in adapters.items():
        whole = network.get_submodule(layer).weight.detach()
        middle = (size // 2 for size in whole.shape[2:])
        weight = whole.chunk(3)["qkv".index(part)] if part else whole[:, :, *middle]
        rows, columns = weight.shape
        adapter = f"{source}: the adapter of {layer} {part}".rstrip()
        if a.ndim != 2 or a.shape[1] != columns or b.shape != (rows, len(a)):
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise ValueError(f"{adapter} has {shapes}, not A (r, {columns}) and B ({rows}, r)")
        product = b.to(weight) @ a.to(weight)
        if not product.isfinite().all():
            raise ValueError(f"{adapter} holds NaN or infinite values")
        weight += product


def _find_adapted(entry: ModelEntry, base_id: str, own: Sequence[str], weights_dir: Path) -> tuple[Path, ModelEntry]:
    """The authors' file, and the row of the model that it adapts, of which a file of its `own` may lie beside."""
    checkpoint = weights.find_weights(entry, ("model.pth", "lora_weights.safetensors"), weights_dir=weights_dir)
    beside = any((checkpoint.parent / name).is_file() for name in own)
    return checkpoint, replace(find_model(base_id), id=entry.id if beside else base_id)


def _fill_adapted(network: nn.Module, checkpoint: Path, layouts: Layouts, head: str, renames: Renames) -> Adapters:
    tensors, own = weights.read_state_dict(checkpoint), network.state_dict()
    if any(_SHORT_KEY.fullmatch(key) for key in tensors):
        state_dict = own | short_file_keys(tensors, layouts=layouts, head=head, source=checkpoint)
    else:  # the logit scale is not in the file: the authors trained without a temperature
        converted = convert_state_dict(tensors, expected=own, renames=renames)
        state_dict = {"logit_scale": own["logit_scale"]} | converted
    adapters, backbone = take_adapters(state_dict, layouts=layouts, source=checkpoint)
    with weights.explained_errors(str(checkpoint)):
        network.load_state_dict(backbone)
    add_products(network, adapters, source=checkpoint)
    return adapters


def _warn_incomplete(checkpoint: Path, lacking: str, instead: str) -> None:
    consequence = f"{instead}, so the features differ from the published model's; use the full model.pth where you can"
    warnings.warn(f"{checkpoint} holds no {lacking}; {consequence}", UserWarning, stacklevel=3)


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
    checkpoint, base_entry = _find_adapted(entry, "biomedclip", [OPEN_CLIP_CONFIG_NAME], weights_dir)
    encoder = load_open_clip(base_entry, weights_dir=weights_dir, offline=offline)
    layers = [f"visual.trunk.blocks.{block}.attn.qkv" for block in range(len(encoder.model.visual.trunk.blocks))]
    layouts = tuple(list(itertools.product(layers, parts)) for parts in ("qv", "qkv"))
    adapters = _fill_adapted(encoder.model, checkpoint, layouts, "visual.head.proj.weight", _FORK_RENAMES)
    without_keys = len(layers) - sum(part == "k" for _, part in adapters)
    if without_keys:
        _warn_incomplete(
            checkpoint,
            f"k adapters for {without_keys} of {len(layers)} blocks (the authors' code trains them but does not save "
            "them in lora_weights.safetensors)",
            "they are set to zero",
        )
    base = {"id": "biomedclip", **encoder.provenance}
    encoder.id, encoder.provenance = entry.id, {**weights.describe_files(entry, checkpoint), "base": base}
    return encoder.eval().requires_grad_(False)


def load_robustmedclip_resnet(entry: ModelEntry, *, weights_dir: Path, offline: bool) -> MedCLIPEncoder:
    """RobustMedCLIP's ResNet: MedCLIP with the adapters in ``weights_dir/<id>/`` merged into its convolutions.

    The authors add B A x, a 1 x 1 convolution, to what a convolution gives, by nearest neighbour at a stride of 2. For
    an even number of rows, which every layer has at 224 px, that pixel is the one under the middle of the kernel: B A
    is added there, and the features are theirs. Images are prepared as in their training: for CLIP, not for MedCLIP.
    Batch normalisation takes the stored statistics; when the authors tested, it took those of the batch.
    MedCLIP is taken from ``weights_dir/<id>/`` if it lies there, else loaded as the model ``medclip-rn50``; the logit
    scale is its own. Parameters and errors are those of `load_medclip`.

    Warns
    -----
    UserWarning
        For ``lora_weights.safetensors``, which lacks the statistics of batch normalisation that training changes.
    """
    checkpoint, base_entry = _find_adapted(entry, "medclip-rn50", _MEDCLIP_FILES, weights_dir)
    encoder = load_medclip(base_entry, weights_dir=weights_dir, offline=offline)
    layers = [name for name, layer in encoder.network.named_modules() if isinstance(layer, nn.Conv2d)]
    every = [(name, "") for name in layers if "downsample" not in name]
    layouts = [place for place in every if place[0].endswith("conv2")], every  # another version of the code: 3 x 3 only
    _fill_adapted(encoder.network, checkpoint, layouts, "vision_model.model.fc.weight", _RESNET_RENAMES)
    if checkpoint.suffix == ".safetensors":
        _warn_incomplete(checkpoint, "statistics of batch normalisation", "MedCLIP's are used")
    for_clip = {"geometry": "shortest-edge-crop", "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    encoder.preprocessing = replace(encoder.preprocessing, grayscale=False, **for_clip)
    base = {"id": "medclip-rn50", **encoder.provenance}
    encoder.id, encoder.provenance = entry.id, {**weights.describe_files(entry, checkpoint), "base": base}
    return encoder.eval().requires_grad_(False)
