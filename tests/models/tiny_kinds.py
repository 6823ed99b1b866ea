"""Tiny dual encoders of the kinds people bring, with random weights, as folders in the layout of the public ones.

`KINDS` gives for each kind the function that writes its folder. Only what has no small form is left out: vocabularies
are a handful of words, and SigLIP's tokenizer is one with the same frame (no start token, end tokens as padding).
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig

WORDS = ("a", "an", "image", "of", "tissue", "lymphocytes", "debris", "histology", "patch", "x", ".", ",")
SIDE, LENGTH, FEATURES = 32, 20, 24
TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
VISION = {**TOWER, "image_size": SIDE, "patch_size": 8}
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
MASKED = ("input_ids", "attention_mask")


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights whose features differ between inputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                parameter.fill_(2.0)
            elif name == "logit_bias":
                parameter.fill_(-3.0)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_words(folder: Path, special: str, frame: str, *, padding: str, inputs: tuple[str, ...] = MASKED) -> int:
    """A lower-casing word tokenizer; special tokens come first, but for an end token that only the frame names."""
    last = [token for token in frame.split() if token not in ("$A", *special.split())]
    vocabulary = {word: index for index, word in enumerate((*special.split(), *WORDS, *last))}
    unknown = next(word for word in vocabulary if "unk" in word.lower())
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [(token, vocabulary[token]) for token in frame.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=around)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=padding,
        unk_token=unknown,
        eos_token=around[-1][0],
        model_max_length=LENGTH,
        model_input_names=list(inputs),
        padding_side="right",
    ).save_pretrained(folder)
    return len(vocabulary)


# transformers


def write_pretrained(folder: Path, name: str, text: dict, processor: dict, **settings: object) -> None:
    """A class of transformers by its name: configuration, weights and the settings of images."""
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=VISION, **settings)
    randomise(getattr(transformers, f"{name}Model")(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def clip(folder: Path) -> None:
    """OpenAI's: causal, pooled at the end token."""
    size = write_words(folder, "<pad> <unk> <start> <end>", "<start> $A <end>", padding="<pad>")
    text = {**TOWER, "vocab_size": size, "max_position_embeddings": LENGTH, "bos_token_id": 2, "eos_token_id": 3}
    write_pretrained(
        folder, "CLIP", text, {"image_processor_type": "CLIPImageProcessor", **CROP}, projection_dim=FEATURES
    )


def metaclip_2(folder: Path) -> None:
    """Another class with CLIP's parts."""
    size = write_words(folder, "<pad> <unk> <start> <end>", "<start> $A <end>", padding="<pad>")
    text = {**TOWER, "vocab_size": size, "max_position_embeddings": LENGTH, "bos_token_id": 2, "eos_token_id": 3}
    write_pretrained(
        folder, "MetaClip2", text, {"image_processor_type": "CLIPImageProcessor", **CROP}, projection_dim=FEATURES
    )


def siglip(folder: Path) -> None:
    """SigLIP and MedSigLIP: padding is end tokens, and the text is read off the last of them."""
    size = write_words(folder, "<pad> </s> <unk>", "$A </s>", padding="</s>", inputs=("input_ids",))
    text = {**TOWER, "vocab_size": size, "max_position_embeddings": LENGTH, "projection_size": 32}
    processor = {"image_processor_type": "SiglipImageProcessor", **SQUARE, "resample": 3, "do_convert_rgb": None}
    write_pretrained(folder, "Siglip", text, processor)


def siglip_2(folder: Path) -> None:
    """SigLIP 2 of a fixed resolution: the same class; Gemma's tokenizer has a token of its own for padding."""
    size = write_words(folder, "<pad> <eos> <bos> <unk>", "$A <eos>", padding="<pad>", inputs=("input_ids",))
    text = {**TOWER, "vocab_size": size, "max_position_embeddings": LENGTH, "projection_size": 32}
    processor = {"image_processor_type": "SiglipImageProcessor", **SQUARE, "resample": 2}
    write_pretrained(folder, "Siglip", text, processor)


def altclip(folder: Path) -> None:
    """XLM-R as the text tower: positions count from behind that of the padding."""
    size = write_words(folder, "<s> <pad> </s> <unk>", "<s> $A </s>", padding="<pad>")
    text = {
        **TOWER, "vocab_size": size, "max_position_embeddings": LENGTH, "pad_token_id": 1, "project_dim": 32,
    }  # fmt: skip
    processor = {"feature_extractor_type": "CLIPFeatureExtractor", **CROP}
    write_pretrained(folder, "AltCLIP", text, processor, projection_dim=FEATURES)


def chinese_clip(folder: Path) -> None:
    """BERT as the text tower; images are squashed."""
    size = write_words(folder, "[PAD] [UNK] [CLS] [SEP]", "[CLS] $A [SEP]", padding="[PAD]")
    text = {**TOWER, "vocab_size": size, "max_position_embeddings": LENGTH, "pad_token_id": 0}
    processor = {"feature_extractor_type": "ChineseCLIPFeatureExtractor", **SQUARE, "do_center_crop": False}
    write_pretrained(folder, "ChineseCLIP", text, processor, projection_dim=FEATURES)


# open_clip

NATIVE = {"image_size": SIDE, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": LENGTH, "width": 32, "heads": 2, "layers": 2, "hf_tokenizer_name": "beside"}


def write_open_clip(folder: Path, vision: dict, text: dict, processor: dict | None = None, **settings: object) -> None:
    """A configuration of open_clip with random weights."""
    model = {"embed_dim": FEATURES, **settings, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": model, "preprocess_cfg": processor or {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    network = randomise(open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False))
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")


def causal_words(folder: Path) -> dict:
    """Settings of a text tower that looks for the end token by its id, the highest."""
    size = write_words(folder, "<pad> <unk> <start>", "<start> $A <end>", padding="<pad>")
    return {**TEXT, "vocab_size": size}


@contextlib.contextmanager
def timm_towers() -> Iterator[None]:
    """While it lasts, timm knows towers of its classes that are small."""
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    eva_02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    made = {
        "tiny_siglip": lambda given: timm.models.VisionTransformer(**sizes, class_token=False, **given),
        "tiny_eva": lambda given: timm.models.Eva(**sizes, **{"global_pool": "token", **given}),
        "tiny_eva02": lambda given: timm.models.Eva(
            **sizes, **eva_02, use_rot_pos_emb=True, ref_feat_shape=(4, 4), **{"global_pool": "token", **given}
        ),
    }

    def build(name: str, arguments: dict) -> torch.nn.Module:
        tower = made[name]({key: arguments[key] for key in ("global_pool", "num_classes") if key in arguments})
        tower.default_cfg = {}
        return tower

    with pytest.MonkeyPatch.context() as patched:
        for name in made:
            entry = functools.partial(lambda name, pretrained=False, **given: build(name, given), name)
            patched.setitem(timm.models._registry._model_entrypoints, name, entry)
        yield


def timm_tower(name: str, **settings: object) -> dict:
    """vision_cfg of a timm tower."""
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": SIDE, **settings}


def open_clip_vit(folder: Path) -> None:
    """open_clip's own two transformers."""
    write_open_clip(folder, NATIVE, causal_words(folder), quick_gelu=True)


def open_clip_resnet(folder: Path) -> None:
    """OpenAI's residual network with attention pooling."""
    vision = {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 16}
    write_open_clip(folder, vision, causal_words(folder))


def open_clip_siglip(folder: Path) -> None:
    """timm's tower with attention pooling; a text tower without a mask that pools at the last position."""
    size = write_words(folder, "<pad> </s> <unk>", "$A </s>", padding="</s>")
    text = {
        **TEXT, "vocab_size": size, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6}, "tokenizer_kwargs": {"clean": "canonicalize"},
    }  # fmt: skip
    vision = timm_tower("tiny_siglip", timm_pool="map", timm_proj="none")
    images = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    write_open_clip(folder, vision, text, images, embed_dim=32, custom_text=True, init_logit_bias=-10)


def coca(folder: Path) -> None:
    """CoCa, as CONCH: a class token behind the text, towers that give their tokens, too, and a decoder."""
    text = {**causal_words(folder), "embed_cls": True, "output_tokens": True}
    decoder = {name: text[name] for name in ("context_length", "vocab_size", "width", "heads", "layers")}
    vision = {**NATIVE, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    write_open_clip(folder, vision, text, multimodal_cfg={**decoder, "attn_pooler_heads": 2}, custom_text=True)


def eva(folder: Path) -> None:
    """EVA-CLIP: one matrix for queries, keys and values, and biases of its own."""
    write_open_clip(folder, timm_tower("tiny_eva", timm_pool="token"), causal_words(folder))


def eva_02(folder: Path) -> None:
    """EVA-02-CLIP: queries, keys and values are layers of their own."""
    write_open_clip(folder, timm_tower("tiny_eva02", timm_pool="token"), causal_words(folder), custom_text=True)


def convnext(folder: Path) -> None:
    """A convolutional tower most of which are linear layers."""
    write_open_clip(folder, timm_tower("test_convnext", timm_pool="", timm_proj="linear"), causal_words(folder))


def hugging_face_text(folder: Path) -> None:
    """A RoBERTa of transformers as the text tower, pooled by the mean."""
    size = write_words(folder, "<s> <pad> </s> <unk>", "<s> $A </s>", padding="<pad>")
    sizes = {**TOWER, "vocab_size": size, "max_position_embeddings": LENGTH + 2, "pad_token_id": 1}
    RobertaConfig(**sizes).save_pretrained(folder)
    text = {
        "hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler", "context_length": LENGTH,
    }  # fmt: skip
    write_open_clip(folder, NATIVE, text)


KINDS: MappingProxyType[str, Callable[[Path], None]] = MappingProxyType(
    {
        "CLIP": clip,
        "MetaCLIP 2": metaclip_2,
        "SigLIP": siglip,
        "SigLIP 2": siglip_2,
        "AltCLIP": altclip,
        "ChineseCLIP": chinese_clip,
        "open_clip ViT": open_clip_vit,
        "open_clip ResNet": open_clip_resnet,
        "open_clip SigLIP": open_clip_siglip,
        "open_clip CoCa": coca,
        "open_clip EVA": eva,
        "open_clip EVA-02": eva_02,
        "open_clip ConvNeXt": convnext,
        "open_clip with RoBERTa": hugging_face_text,
    }
)
