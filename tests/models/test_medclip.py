"""MedCLIP against independent forward passes: timm's Swin, torchvision's ResNet and a BERT written out here."""

import hashlib
import math
import pathlib
import re
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet
from transformers import BertConfig, BertTokenizer, SwinConfig

from medrobust_lib.models import medclip
from medrobust_lib.models.loading import find_model
from medrobust_lib.models.medclip import MedCLIPNetwork, convert_state_dict, load_medclip, published_network

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "chest", "x", "-", "ray", "of", "normal"),
    *("pneu", "##monia", "lung", "##s", "Normal", "opacity", ",", "in", "the"),
]
TEXTS = ["a chest x-ray of normal lungs", "pneumonia", "opacity in the lung, Normal"]
TINY_BERT = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=80,
)
TINY_SWIN = SwinConfig(image_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=7)
TINY = {"medclip-vit": (TINY_SWIN, 56), "medclip-rn50": ((1, 1, 1, 1), 64)}


def timm_swin():
    """The tiny Swin in timm, whose code shares nothing with transformers'."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=0,
    ).eval()


def published_swin_keys(swin):
    """timm's tensors under the names of MedCLIP's checkpoint (transformers 4), index tables included."""
    renames = (
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^patch_embed\.norm", "embeddings.norm"),
        (r"^norm\.", "layernorm."),
        (r"^layers\.(\d+)\.downsample", lambda m: f"encoder.layers.{int(m[1]) - 1}.downsample"),
        (r"^layers\.", "encoder.layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.relative_position", ".attention.self.relative_position"),
        (r"\.attn\.proj", ".attention.output.dense"),
        (r"\.mlp\.fc1", ".intermediate.dense"),
        (r"\.mlp\.fc2", ".output.dense"),
    )
    published = {}
    for key, tensor in swin.state_dict().items():
        if key.endswith("attn_mask"):
            continue
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        if ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                published[key.replace(".attn.qkv.", f".attention.self.{name}.")] = part
        else:
            published[key] = tensor
    for layer, (depth, heads) in enumerate(zip(TINY_SWIN.depths, TINY_SWIN.num_heads, strict=True)):
        for block in range(depth):
            assert published[
                f"encoder.layers.{layer}.blocks.{block}.attention.self.relative_position_bias_table"
            ].shape == (169, heads)
            published[f"encoder.layers.{layer}.blocks.{block}.attention.self.relative_position_index"] = torch.zeros(
                49, 49
            )
    return published


def random_bert(generator):
    """Tensors of the tiny text tower under the checkpoint's names."""
    width, inner = TINY_BERT.hidden_size, TINY_BERT.intermediate_size
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), width),
        "embeddings.position_embeddings.weight": (80, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    for layer in range(TINY_BERT.num_hidden_layers):
        block = f"encoder.layer.{layer}."
        for name, (rows, columns) in {
            "attention.self.query": (width, width),
            "attention.self.key": (width, width),
            "attention.self.value": (width, width),
            "attention.output.dense": (width, width),
            "intermediate.dense": (inner, width),
            "output.dense": (width, inner),
        }.items():
            shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{block}{name}.weight": (width,), f"{block}{name}.bias": (width,)}
    tensors = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return tensors | {"embeddings.position_ids": torch.arange(80)[None]}


def bert_hidden_states(tensors, ids, mask):
    """Plain BERT: embeddings, then post-norm attention and feed-forward blocks; every layer's output."""

    def linear(x, name):
        return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-12)

    def heads(x):
        return x.unflatten(-1, (TINY_BERT.num_attention_heads, -1)).transpose(1, 2)

    x = tensors["embeddings.word_embeddings.weight"][ids] + tensors["embeddings.token_type_embeddings.weight"][0]
    states = [norm(x + tensors["embeddings.position_embeddings.weight"][: ids.shape[1]], "embeddings.LayerNorm")]
    for layer in range(TINY_BERT.num_hidden_layers):
        x, block = states[-1], f"encoder.layer.{layer}"
        query, key, value = (heads(linear(x, f"{block}.attention.self.{n}")) for n in ("query", "key", "value"))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(dim=-1)
        attended = linear((weights @ value).transpose(1, 2).flatten(2), f"{block}.attention.output.dense")
        x = norm(x + attended, f"{block}.attention.output.LayerNorm")
        inner = functional.gelu(linear(x, f"{block}.intermediate.dense"))
        states.append(norm(x + linear(inner, f"{block}.output.dense"), f"{block}.output.LayerNorm"))
    return states


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def upstream_text_features(published, ids, mask):
    """MedCLIP's text tower: mean of layers 1, 2 and last over every position, then the projection."""
    prefix = "text_model.model."
    tensors = {key.removeprefix(prefix): value for key, value in published.items() if key.startswith(prefix)}
    states = bert_hidden_states(tensors, ids, mask)
    pooled = torch.stack([states[1], states[2], states[-1]]).mean(dim=(0, 2))
    return unit(pooled @ published["text_model.projection_head.weight"].T)


def upstream_pixels(image, size):
    """MedCLIP's feature extractor on one PIL image: black 8-bit square of at least ``size``, then a bicubic resize."""
    side = max(size, *image.size)
    square = Image.new("L", (side, side), 0)
    square.paste(image, (int((side - image.width) / 2), int((side - image.height) / 2)))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return (torch.from_numpy((pixels - 0.5862785803043838) / 0.27950088968644304).float()).expand(1, 3, size, size)


def load(model_id, weights_dir):
    """The model at a fraction of its size."""
    vision, size = TINY[model_id]
    entry = replace(find_model(model_id), image_size=size)
    with patch.object(medclip, "published_network", lambda id: MedCLIPNetwork(vision, TINY_BERT, 24)):
        return load_medclip(entry, weights_dir=weights_dir, offline=True)


@pytest.fixture(scope="module")
def published():
    """State dict of a tiny MedCLIP-ViT exactly in the layout of the public file, and timm's image tower."""
    generator = torch.Generator().manual_seed(0)
    swin = timm_swin()
    with torch.no_grad():
        for tensor in swin.parameters():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    state_dict = {f"vision_model.model.{key}": value for key, value in published_swin_keys(swin).items()}
    state_dict |= {f"text_model.model.{key}": value for key, value in random_bert(generator).items()}
    state_dict["vision_model.projection_head.weight"] = torch.randn(24, 32, generator=generator)
    state_dict["text_model.projection_head.weight"] = torch.randn(24, 32, generator=generator)
    state_dict["logit_scale"] = torch.tensor(3.2)
    return state_dict, swin


def write_weights(folder, state_dict, words=WORDS):
    folder.mkdir(parents=True)
    torch.save(state_dict, folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder.parent


@pytest.fixture(scope="module")
def weights_dir(published, tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "medclip-vit", published[0])


@pytest.fixture(scope="module")
def model(weights_dir):
    return load("medclip-vit", weights_dir)


def test_swin_image_features_equal_timm(model, published):
    state_dict, swin = published
    pixels = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        normalised = (pixels - 0.5862785803043838) / 0.27950088968644304
        expected = unit(swin(normalised) @ state_dict["vision_model.projection_head.weight"].T)
        features = model.encode_image(pixels)
    assert torch.allclose(features, expected, atol=1e-5, rtol=0)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_a_feature_depends_on_its_text_only_and_is_upstreams(model, published):
    together = model.encode_text(TEXTS)
    for text, feature in zip(TEXTS, together, strict=True):
        assert torch.allclose(model.encode_text([text])[0], feature, atol=1e-6)
        real = int(model.tokenize([text]).mask.sum())
        ids = functional.pad(model.tokenize([text]).ids[:, :real], (0, 25 - real))
        expected = upstream_text_features(published[0], ids, torch.arange(25)[None] < real)
        assert torch.allclose(feature, expected[0], atol=1e-5, rtol=0)


def test_provenance_holds_the_hashes_of_the_files_read(model, weights_dir):
    files = model.provenance["files"]
    assert set(files) == {"pytorch_model.bin", "vocab.txt"}
    for name, digest in files.items():
        assert digest == hashlib.sha256((weights_dir / "medclip-vit" / name).read_bytes()).hexdigest()


def test_wrong_hash_is_refused(published, tmp_path):
    weights = write_weights(tmp_path / "medclip-vit", published[0])
    (weights / "medclip-vit" / "SHA256SUMS").write_text(f"{'0' * 64}  pytorch_model.bin\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        load("medclip-vit", weights)


def test_default_padding_is_25_and_recorded(model):
    assert model.provenance["pad_length"] == 25
    assert model.tokenize(["lung"]).ids.shape == (1, 25)
    assert torch.allclose(
        model.class_features(["normal", "pneumonia"], ["a chest x-ray of {}", "{}"])[:1],
        model.class_features(["normal"], ["a chest x-ray of {}", "{}"]),
        atol=1e-6,
    )


def test_embeddings_give_the_features_of_the_text(model):
    tokens = model.tokenize(TEXTS)
    embeddings = model.embed_tokens(tokens).detach().requires_grad_()
    features = model.encode_embeddings(embeddings, tokens)
    assert torch.allclose(features, model.encode_text(TEXTS), atol=1e-5)
    features[:, 0].sum().backward()
    assert embeddings.grad.abs().sum() > 0
    trimmed = tokens.trimmed()
    assert trimmed.ids.shape[1] == 11
    assert torch.allclose(model.encode_embeddings(model.embed_tokens(trimmed), trimmed), features, atol=1e-5)


def test_tokenizer_lower_cases_like_the_hub_tokenizer(model, weights_dir):
    reference = BertTokenizer.from_pretrained(weights_dir / "medclip-vit", do_lower_case=True)
    for text in TEXTS:
        expected = reference(text).input_ids
        tokens = model.tokenize([text])
        assert tokens.ids[0, : len(expected)].tolist() == expected
        assert tokens.mask.sum() == len(expected)
    assert WORDS.index("Normal") not in model.tokenize(["Normal"]).ids


@pytest.mark.parametrize("size", [(100, 60), (40, 90), (20, 30), (56, 56)])
def test_preprocessing_equals_the_published_feature_extractor(model, published, size):
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(array)
    prepared = model.prepare([image])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    assert torch.allclose((prepared - mean) / std, upstream_pixels(image, 56), atol=1e-5)


def test_resnet_features_equal_torchvision(published, tmp_path):
    generator = torch.Generator().manual_seed(2)
    resnet = ResNet(Bottleneck, [1, 1, 1, 1])
    resnet.fc = torch.nn.Linear(2048, 24, bias=False)
    with torch.no_grad():
        resnet.train()(torch.rand(16, 3, 64, 64, generator=generator))  # running statistics other than 0 and 1
    state_dict = {key: value for key, value in published[0].items() if not key.startswith("vision_model.")}
    state_dict |= {f"vision_model.model.{key}": value for key, value in resnet.state_dict().items()}
    weights = write_weights(tmp_path / "medclip-rn50", state_dict)
    model = load("medclip-rn50", weights)
    pixels = torch.rand(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        expected = unit(resnet.eval()((pixels - 0.5862785803043838) / 0.27950088968644304))
        assert torch.allclose(model.encode_image(pixels), expected, atol=1e-5, rtol=0)
        assert torch.allclose(model.encode_image(pixels[:1]), expected[:1], atol=1e-5, rtol=0), "no batch statistics"


@pytest.mark.parametrize(("stored", "scale"), [(3.2, math.exp(3.2)), (6.0, math.exp(4.6052)), (-1.0, 1.0)])
def test_logit_scale_is_clamped_as_upstream(published, tmp_path, stored, scale):
    weights = write_weights(tmp_path / "medclip-vit", published[0] | {"logit_scale": torch.tensor(stored)})
    model = load("medclip-vit", weights)
    assert model.logit_scale == pytest.approx(scale, rel=1e-5)


def full_size_swin_keys():
    """Names in the image tower of the public MedCLIP-ViT file, written from transformers 4's layout."""
    keys = ["embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.projection.bias"]
    keys += [f"{norm}.{kind}" for norm in ("embeddings.norm", "layernorm") for kind in ("weight", "bias")]
    for layer, depth in enumerate((2, 2, 6, 2)):
        for block in range(depth):
            prefix = f"encoder.layers.{layer}.blocks.{block}."
            keys += [
                f"{prefix}{part}.{kind}"
                for part in (
                    "layernorm_before",
                    "attention.self.query",
                    "attention.self.key",
                    "attention.self.value",
                    "attention.output.dense",
                    "layernorm_after",
                    "intermediate.dense",
                    "output.dense",
                )
                for kind in ("weight", "bias")
            ]
            keys += [f"{prefix}attention.self.relative_position_{name}" for name in ("bias_table", "index")]
        if layer < 3:
            downsample = f"encoder.layers.{layer}.downsample."
            keys += [f"{downsample}{part}" for part in ("reduction.weight", "norm.weight", "norm.bias")]
    return {f"vision_model.model.{key}" for key in keys} | {"vision_model.projection_head.weight"}


def test_full_size_layouts():
    with torch.device("meta"):
        vit, resnet = (published_network(name) for name in ("medclip-vit", "medclip-rn50"))
    assert sum(p.numel() for p in vit.vision_model.model.parameters()) == 27_519_354
    assert sum(p.numel() for p in vit.text_model.model.parameters()) == 108_310_272
    assert sum(p.numel() for p in resnet.vision_model.parameters()) == 23_508_032 + 2048 * 512
    assert vit.vision_model.projection_head.weight.shape == vit.text_model.projection_head.weight.shape == (512, 768)
    text_keys = {key for key in vit.state_dict() if not key.startswith("vision_model.")}
    assert {
        "logit_scale",
        "text_model.projection_head.weight",
        "text_model.model.pooler.dense.bias",
    } <= text_keys
    file_keys = full_size_swin_keys() | text_keys | {"text_model.model.embeddings.position_ids"}
    converted = convert_state_dict(dict.fromkeys(file_keys, torch.zeros(())), expected=set(vit.state_dict()))
    assert set(converted) == set(vit.state_dict())


def test_keys_of_the_installed_library_are_kept(model):
    state_dict = model.network.state_dict()
    assert set(convert_state_dict(state_dict, expected=set(state_dict))) == set(state_dict)


def test_missing_and_unexpected_keys_are_listed(published, tmp_path):
    broken = {key: value for key, value in published[0].items() if "text_model.model.encoder.layer.1" not in key}
    weights = write_weights(tmp_path / "medclip-vit", broken | {"surplus.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"16 missing.*text_model\.model\.encoder\.layer\.1.*and 6 more") as error:
        load("medclip-vit", weights)
    assert "1 unexpected" in str(error.value)
    assert "surplus.weight" in str(error.value)


def test_wrong_shape_is_named(published, tmp_path):
    broken = published[0] | {"text_model.projection_head.weight": torch.zeros(12, 32)}
    weights = write_weights(tmp_path / "medclip-vit", broken)
    with pytest.raises(ValueError, match=r"text_model\.projection_head\.weight.*\(12, 32\).*\(24, 32\)"):
        load("medclip-vit", weights)


def test_missing_weights_name_places_and_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_scripts/fetch_weights\.py medclip-vit") as error:
        load("medclip-vit", tmp_path)
    assert str(tmp_path / "medclip-vit" / "pytorch_model.bin") in str(error.value)


def test_missing_vocabulary_names_the_hub_id(published, tmp_path, monkeypatch):
    weights = write_weights(tmp_path / "medclip-vit", published[0])
    (weights / "medclip-vit" / "vocab.txt").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"emilyalsentzer/Bio_ClinicalBERT"):
        load("medclip-vit", weights)


def test_vocabulary_is_taken_from_the_hub_cache(published, model, tmp_path, monkeypatch):
    weights = write_weights(tmp_path / "medclip-vit", published[0])
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--emilyalsentzer--Bio_ClinicalBERT"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (weights / "medclip-vit" / "vocab.txt").rename(snapshot / "vocab.txt")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached = load("medclip-vit", weights)
    assert torch.equal(cached.encode_text(TEXTS), model.encode_text(TEXTS))
    assert set(cached.provenance["files"]) == {"pytorch_model.bin", "vocab.txt"}


def test_safetensors_with_the_same_keys_are_read(published, model, tmp_path):
    weights = write_weights(tmp_path / "medclip-vit", published[0])
    (weights / "medclip-vit" / "pytorch_model.bin").unlink()
    tensors = {key: value.contiguous().clone() for key, value in published[0].items()}
    save_file(tensors, weights / "medclip-vit" / "model.safetensors")
    loaded = load("medclip-vit", weights)
    assert torch.equal(loaded.encode_text(TEXTS), model.encode_text(TEXTS))


def test_half_precision_stays_close(weights_dir, model):
    half = load("medclip-vit", weights_dir)
    half = half.to(torch.bfloat16)
    pixels = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    for ours, reference in (
        (half.encode_image(pixels), model.encode_image(pixels)),
        (half.encode_text(TEXTS), model.encode_text(TEXTS)),
    ):
        assert ours.dtype == torch.float32
        assert (ours * reference).sum(dim=-1).min() > 0.99


def test_wrong_vocabulary_size_is_refused(published, tmp_path):
    weights = write_weights(tmp_path / "medclip-vit", published[0], words=WORDS[:5])
    with pytest.raises(ValueError, match=r"5 tokens.*21 expected"):
        load("medclip-vit", weights)


def test_pickled_code_is_refused(tmp_path):
    weights = write_weights(tmp_path / "medclip-vit", {"logit_scale": pathlib.PurePosixPath("x")})
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*more than tensors"):
        load("medclip-vit", weights)


def test_too_long_a_text_is_refused(model):
    with pytest.raises(ValueError, match=r"82 tokens.*at most 77"):
        model.tokenize(["lung " * 80])


def test_parameters_are_frozen_and_in_evaluation_mode(model):
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_prompts_can_be_learned(model, check_prompts):
    check_prompts(model)
