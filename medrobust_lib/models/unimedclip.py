"""UniMed-CLIP (ViT-B/16 beside BiomedBERT): the authors' checkpoint in upstream open_clip.

The authors trained with a fork of open_clip whose ``CLIP`` class holds a BERT as ``text_encoder`` and takes an
argument that upstream does not know. Upstream's ``CustomTextCLIP`` computes the same with other names, so the keys
are renamed and the fork is not needed. Upstream: Khattak et al. 2024, arXiv:2412.10372, and its public code.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from open_clip import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.model import set_model_preprocess_cfg
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg
from torch import Tensor
from transformers import BertConfig

from medrobust_lib.models.catalogue import ModelEntry
from medrobust_lib.models.open_clip import OpenClipEncoder
from medrobust_lib.models.weights import (
    describe_files,
    find_vocabulary,
    find_weights,
    load_strictly,
    read_state_dict,
)

TEXT_REPOSITORY = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
WEIGHT_NAMES = ("unimed_clip_vit_b16.pt", "unimed_clip_vit_b16.safetensors")


@dataclass(frozen=True)
class UniMedCLIPArchitecture:
    """Sizes of the two towers.

    Attributes
    ----------
    vision : CLIPVisionCfg
        open_clip's own vision transformer; activations are QuickGELU.
    text : BertConfig
        Configuration of the text tower; its ``vocab_size`` is the one that the tokenizer must have.
    embed_dim : int
        d, length of a feature.
    context_length : int
        Most tokens of a text.
    """

    vision: CLIPVisionCfg
    text: BertConfig
    embed_dim: int = 512
    context_length: int = 256


def published_architecture() -> UniMedCLIPArchitecture:
    """Sizes of the public ``unimed_clip_vit_b16.pt``: ViT-B/16 and BERT base with an uncased vocabulary."""
    return UniMedCLIPArchitecture(
        vision=CLIPVisionCfg(image_size=224, layers=12, width=768, patch_size=16),
        text=BertConfig(
            vocab_size=30_522,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            hidden_act="gelu",
            max_position_embeddings=512,
            type_vocab_size=2,
            layer_norm_eps=1e-12,
            pad_token_id=0,
        ),
    )


def build_network(architecture: UniMedCLIPArchitecture, *, text_folder: Path) -> CustomTextCLIP:
    """Upstream's network with random weights.

    Parameters
    ----------
    architecture : UniMedCLIPArchitecture
        Sizes of the towers.
    text_folder : Path
        Receives the text tower's ``config.json``, which open_clip reads from a folder or the hub only.

    Returns
    -------
    CustomTextCLIP
        With CLIP's own image preprocessing noted on it.
    """
    architecture.text.save_pretrained(text_folder)
    network = CustomTextCLIP(
        embed_dim=architecture.embed_dim,
        vision_cfg=architecture.vision,
        text_cfg=CLIPTextCfg(
            hf_model_name=str(text_folder),
            hf_model_pretrained=False,
            hf_proj_type="mlp",
            hf_pooler_type="cls_last_hidden_state_pooler",
        ),
        quick_gelu=True,
    )
    set_model_preprocess_cfg(network, asdict(PreprocessCfg(size=architecture.vision.image_size)))
    return network


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the fork under upstream's names.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        ``visual.*``, ``text_encoder.*`` and ``logit_scale``, as the fork stores them.

    Returns
    -------
    dict of str to Tensor
        ``visual.*``, ``text.*`` and ``logit_scale``, without the derived ``position_ids``; a key of another kind
        keeps its name.
    """
    return {
        f"text.{key.removeprefix('text_encoder.')}" if key.startswith("text_encoder.") else key: tensor
        for key, tensor in state_dict.items()
        if not key.endswith("position_ids")
    }


def load_unimedclip(
    entry: ModelEntry,
    *,
    weights_dir: Path | None,
    offline: bool,
    architecture: UniMedCLIPArchitecture | None = None,
) -> OpenClipEncoder:
    """UniMed-CLIP from ``weights_dir/<id>/unimed_clip_vit_b16.pt`` (or ``.safetensors`` with the same keys).

    Parameters
    ----------
    entry : ModelEntry
        Row of the registry.
    weights_dir : Path or None
        Folder of all weights. ``vocab.txt`` is looked for beside the weights, then on the hub.
    offline : bool
        Whether to leave the network alone.
    architecture : UniMedCLIPArchitecture, optional
        Other sizes than the published ones.

    Returns
    -------
    OpenClipEncoder
        In float32 on the CPU, frozen, in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If weights or vocabulary are missing, naming the places looked at and the command to run.
    ValueError
        If keys or shapes do not fit (the first ten are listed), or the vocabulary has the wrong size.
    """
    architecture = architecture or published_architecture()
    weights = find_weights(entry, WEIGHT_NAMES, weights_dir=weights_dir)
    vocabulary = find_vocabulary(entry, TEXT_REPOSITORY, weights_dir=weights_dir, offline=offline)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = build_network(architecture, text_folder=folder)
        tokenizer = _read_tokenizer(vocabulary, architecture, folder)
    load_strictly(network, convert_state_dict(read_state_dict(weights)), source=weights)
    encoder = OpenClipEncoder(network, tokenizer, id=entry.id, provenance=describe_files(entry, weights, vocabulary))
    return encoder.eval().requires_grad_(False)


def _read_tokenizer(vocabulary: Path, architecture: UniMedCLIPArchitecture, folder: Path) -> HFTokenizer:
    """open_clip's wrapper of the lower-casing BERT tokenizer; ``folder`` holds the text tower's config.json."""
    shutil.copyfile(vocabulary, folder / "vocab.txt")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = HFTokenizer(str(folder), context_length=architecture.context_length)
    known, expected = len(tokenizer.tokenizer), architecture.text.vocab_size
    if known != expected:
        raise ValueError(
            f"{vocabulary} holds {known:,} tokens, but {expected:,} expected by the text tower: it belongs to "
            "another model or is cut short; delete it and fetch it again"
        )
    return tokenizer
