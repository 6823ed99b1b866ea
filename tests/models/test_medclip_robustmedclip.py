"""RobustMedCLIP: the authors' separate q, k, v adapters, as written in their wrapper, against ours through peft."""

import copy
import json
import re

import pytest
import timm
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig

from medrobust_lib.models.loading import find_model
from medrobust_lib.models.medclip import (
    add_products,
    load_robustmedclip,
    short_file_keys,
    take_adapters,
)
from medrobust_lib.models.open_clip import load_open_clip

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cell", "of", "blood", "platelet", "image", "##s"]
TEXTS = ["a blood cell", "images of a platelet"]
RANK, DIM = 4, 24
VISION = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


class AuthorsQKV(nn.Module):
    """The authors' wrapped layer: three products added in place to thirds of the fused output."""

    def __init__(self, qkv, rank, generator):
        super().__init__()
        self.qkv, self.dim = qkv, qkv.in_features
        for part in "qkv":
            for side, shape in (("a", (rank, self.dim)), ("b", (self.dim, rank))):
                layer = nn.Linear(shape[1], shape[0], bias=False)
                layer.weight.data = 0.2 * torch.randn(shape, generator=generator)
                setattr(self, f"linear_{side}_{part}", layer)

    def forward(self, x):
        qkv = self.qkv(x)
        qkv[:, :, : self.dim] += self.linear_b_q(self.linear_a_q(x))
        qkv[:, :, self.dim : -self.dim] += self.linear_b_k(self.linear_a_k(x))
        qkv[:, :, -self.dim :] += self.linear_b_v(self.linear_a_v(x))
        return qkv


class AuthorsModel(nn.Module):
    """Nesting of the authors' classes, which gives the keys of model.pth."""

    def __init__(self, clip, rank):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        clip = copy.deepcopy(clip)
        for block in clip.visual.trunk.blocks:
            block.attn.qkv = AuthorsQKV(block.attn.qkv, rank, generator)
        self.lora_vit = nn.Module()
        self.lora_vit.lora_vit = clip.visual
        self.text_encoder = clip.text

    def short_file(self, parts="qv"):
        """What save_lora_parameters writes: pairs numbered through the blocks, and the frozen projection."""
        layers = [block.attn.qkv for block in self.lora_vit.lora_vit.trunk.blocks]
        pairs = [(layer, part) for layer in layers for part in parts]
        head = self.lora_vit.lora_vit.head.proj
        tensors = {
            f"w_{side}_{number:03d}": getattr(layer, f"linear_{side}_{part}").weight.detach().clone()
            for number, (layer, part) in enumerate(pairs)
            for side in "ab"
        }
        return tensors | {f"fc_{head.in_features}in_{head.out_features}out": head.weight.detach().clone()}

    def image_features(self, pixels, *, with_keys=True):
        layers = [block.attn.qkv for block in self.lora_vit.lora_vit.trunk.blocks]
        kept = [layer.linear_b_k.weight.data.clone() for layer in layers]
        for layer, weight in zip(layers, kept, strict=True):
            layer.linear_b_k.weight.data = weight if with_keys else torch.zeros_like(weight)
        with torch.no_grad():
            features = nn.functional.normalize(self.lora_vit.lora_vit(pixels), dim=-1)
        for layer, weight in zip(layers, kept, strict=True):
            layer.linear_b_k.weight.data = weight
        return features


def write_base(folder):
    """A tiny BiomedCLIP in open_clip's folder format: timm vision tower, BERT, MLP projection."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}), encoding="utf-8")
    BertConfig(**BERT).save_pretrained(folder)
    text = {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 32}
    clip = CustomTextCLIP(
        embed_dim=DIM,
        vision_cfg=CLIPVisionCfg(**VISION),
        text_cfg=CLIPTextCfg(hf_model_name=str(folder), hf_model_pretrained=False, **text),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in clip.parameters():
            if tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
        clip.logit_scale.fill_(3.0)
    config = {
        "model_cfg": {
            "embed_dim": DIM,
            "vision_cfg": VISION,
            "text_cfg": {"hf_model_name": "microsoft/none", "hf_tokenizer_name": "microsoft/none", **text},
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    return clip.eval()


LAYER = "visual.trunk.blocks.{}.attn.qkv".format


def layouts(blocks):
    return [[(LAYER(block), part) for block in range(blocks) for part in parts] for parts in ("qv", "qkv")]


def adapters_of(layers):
    return {
        (LAYER(block), part): tuple(getattr(layer, f"linear_{side}_{part}").weight for side in "ab")
        for block, layer in enumerate(layers)
        for part in "qkv"
    }


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    return root, write_base(root / "biomedclip")


@pytest.fixture(scope="module")
def authors(base_folder):
    return AuthorsModel(base_folder[1], RANK).eval()


@pytest.fixture
def weights_dir(base_folder, tmp_path):
    (tmp_path / "biomedclip").symlink_to(base_folder[0] / "biomedclip")
    (tmp_path / "robustmedclip").mkdir()
    return tmp_path


def load(root):
    return load_robustmedclip(find_model("robustmedclip"), weights_dir=root, offline=True)


def normalised(model, pixels):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    return (pixels - mean) / std


def random_pixels():
    return torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(2))


def test_full_checkpoint_gives_the_authors_features(authors, base_folder, weights_dir):
    state_dict = authors.state_dict() | {"text_encoder.transformer.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(state_dict, weights_dir / "robustmedclip" / "model.pth")
    save_file({"w_a_000": torch.zeros(1)}, weights_dir / "robustmedclip" / "lora_weights.safetensors")
    model = load(weights_dir)
    pixels = random_pixels()
    expected = authors.image_features(normalised(model, pixels))
    assert torch.allclose(model.encode_image(pixels), expected, atol=1e-5, rtol=0)
    base = load_open_clip(find_model("biomedclip"), weights_dir=weights_dir, offline=True)
    assert (model.encode_image(pixels) - base.encode_image(pixels)).abs().max() > 1e-2
    assert torch.equal(model.encode_text(TEXTS), base.encode_text(TEXTS))
    assert model.logit_scale == pytest.approx(torch.tensor(3.0).exp().item())


def test_published_short_file_lacks_keys_and_warns(authors, weights_dir):
    save_file(authors.short_file(), weights_dir / "robustmedclip" / "lora_weights.safetensors")
    with pytest.warns(UserWarning, match=r"holds no k adapters for 6 of 6 blocks.*model\.pth"):
        model = load(weights_dir)
    pixels = random_pixels()
    inputs = normalised(model, pixels)
    features = model.encode_image(pixels)
    assert torch.allclose(features, authors.image_features(inputs, with_keys=False), atol=1e-5, rtol=0)
    assert (features - authors.image_features(inputs)).abs().max() > 1e-3, "the k adapters matter"


def test_short_file_with_keys_is_complete(authors, weights_dir, recwarn):
    save_file(authors.short_file("qkv"), weights_dir / "robustmedclip" / "lora_weights.safetensors")
    model = load(weights_dir)
    assert not [w for w in recwarn if "adapters" in str(w.message)]
    pixels = random_pixels()
    expected = authors.image_features(normalised(model, pixels))
    assert torch.allclose(model.encode_image(pixels), expected, atol=1e-5, rtol=0)


def test_projection_in_the_short_file_is_used(authors, weights_dir):
    tensors = authors.short_file("qkv")
    head = next(key for key in tensors if key.startswith("fc_"))
    tensors[head] = -tensors[head]
    save_file(tensors, weights_dir / "robustmedclip" / "lora_weights.safetensors")
    model = load(weights_dir)
    pixels = random_pixels()
    expected = -authors.image_features(normalised(model, pixels))
    assert torch.allclose(model.encode_image(pixels), expected, atol=1e-5, rtol=0)


def test_base_may_lie_beside_the_adapters(authors, base_folder, tmp_path):
    write_base(tmp_path / "robustmedclip")
    torch.save(authors.state_dict(), tmp_path / "robustmedclip" / "model.pth")
    model = load(tmp_path)
    assert model.id == "robustmedclip"
    assert "model.pth" in model.provenance["files"]
    assert model.provenance["base"]["id"] == "biomedclip"
    assert model.provenance["base"]["files"]["open_clip_pytorch_model.bin"]
    assert not any(p.requires_grad for p in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_merged_equals_the_written_formula():
    generator = torch.Generator().manual_seed(3)
    clip = nn.Module()
    clip.visual = nn.Module()
    clip.visual.trunk = timm.create_model("test_vit", num_classes=0).eval()
    wrapped = copy.deepcopy(clip.visual.trunk)
    for block in wrapped.blocks:
        block.attn.qkv = AuthorsQKV(block.attn.qkv, 3, generator)
    pixels = random_pixels()
    with torch.no_grad():
        before, expected = clip.visual.trunk(pixels), wrapped(pixels)
        add_products(clip, adapters_of(block.attn.qkv for block in wrapped.blocks), source="file")
        merged = clip.visual.trunk(pixels)
    assert torch.allclose(merged, expected, atol=1e-5, rtol=0)
    assert (before - expected).abs().max() > 1e-2


def test_parameter_count_of_the_published_adapters():
    with torch.device("meta"):
        trunk = timm.create_model("vit_base_patch16_224", num_classes=0)
        layers = [AuthorsQKV(block.attn.qkv, 16, None) for block in trunk.blocks]
    assert sum(factor.numel() for pair in adapters_of(layers).values() for factor in pair) == 884_736


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("text_encoder.proj.0.weight", {}, r"1 missing keys: text\.proj\.0\.weight"),
        (None, {"teacher.weight": torch.zeros(1)}, r"1 unexpected keys: teacher\.weight"),
        (
            "lora_vit.lora_vit.trunk.blocks.2.attn.qkv.linear_b_v.weight",
            {},
            r"incomplete.*: visual\.trunk\.blocks\.2\.attn\.qkv v",
        ),
        (
            None,
            {"lora_vit.lora_vit.trunk.blocks.1.attn.qkv.linear_a_k.weight": torch.zeros(2, 64)},
            r"blocks\.1\.attn\.qkv k has A \(2, 64\)",
        ),
    ],
)
def test_a_broken_full_checkpoint_is_refused(authors, weights_dir, drop, add, message):
    state_dict = {key: value for key, value in authors.state_dict().items() if key != drop} | add
    torch.save(state_dict, weights_dir / "robustmedclip" / "model.pth")
    with pytest.raises(ValueError, match=message):
        load(weights_dir)


def test_full_checkpoint_without_keys_warns(authors, weights_dir):
    state_dict = {key: value for key, value in authors.state_dict().items() if "_k.weight" not in key}
    torch.save(state_dict, weights_dir / "robustmedclip" / "model.pth")
    with pytest.warns(UserWarning, match="no k adapters"):
        model = load(weights_dir)
    pixels = random_pixels()
    expected = authors.image_features(normalised(model, pixels), with_keys=False)
    assert torch.allclose(model.encode_image(pixels), expected, atol=1e-5, rtol=0)


def test_wrong_number_of_pairs_is_refused():
    tensors = {f"w_{side}_{n:03d}": torch.zeros(2, 2) for side in "ab" for n in range(5)}
    with pytest.raises(ValueError, match=r"file holds 5 adapter pairs; this image tower needs 24 or 36"):
        short_file_keys(tensors, layouts=layouts(12), head="head", source="file")
    with pytest.raises(ValueError, match=r"pairs numbered from 0; found w_a \[0, 1, 2, 3, 4\], w_b \[0, 1, 2, 3\]"):
        lacking = {k: v for k, v in tensors.items() if k != "w_b_004"}
        short_file_keys(lacking, layouts=layouts(12), head="head", source="file")


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_pairs_are_numbered_with_any_number_of_digits(digits):
    tensors = {f"w_{side}_{n:0{digits}d}": torch.full((2, 2), n) for side in "ab" for n in range(12)}
    renamed = short_file_keys(tensors, layouts=layouts(6), head="head", source="file")
    assert renamed["visual.trunk.blocks.5.attn.qkv.linear_b_v.weight"][0, 0] == 11


def test_a_short_file_of_b_alone_is_told_so(weights_dir):
    save_file({"w_b_000": torch.zeros(2, 2)}, weights_dir / "robustmedclip" / "lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"pairs numbered from 0; found w_a \[\], w_b \[0\]"):
        load(weights_dir)


def test_all_bad_places_are_named_at_once_and_nothing_is_taken_away():
    name = "visual.trunk.blocks.{}.attn.qkv.linear_{}_{}.weight".format
    places = [(block, side, part) for block in (0, 2) for side in "ab" for part in "qkv"]
    tensors = {name(*place): torch.zeros(2, 2) for place in places if place != (0, "b", "k")}
    message = (
        r"^file: adapters missing, incomplete or of no layer of the network: "
        + ", ".join(re.escape(f"{LAYER(block)} {part}") for block, part in ("0k", "1q", "1v", "2k", "2q", "2v"))
        + "$"
    )
    with pytest.raises(ValueError, match=message):
        take_adapters(tensors, layouts=layouts(2), source="file")
    inside = {key: tensor for key, tensor in tensors.items() if ".0." in key and "_k." not in key} | {
        "a": torch.ones(1)
    }
    adapters, others = take_adapters(inside, layouts=layouts(1), source="file")
    assert (set(adapters), set(others), len(inside)) == ({(LAYER(0), "q"), (LAYER(0), "v")}, {"a"}, 5)


def test_unknown_entries_of_a_short_file_are_refused(authors, weights_dir):
    tensors = authors.short_file("qkv") | {"w_c_000": torch.zeros(1)}
    save_file(tensors, weights_dir / "robustmedclip" / "lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected keys: w_c_000"):
        load(weights_dir)


def test_adapters_with_infinite_values_are_refused(authors, weights_dir):
    key = "lora_vit.lora_vit.trunk.blocks.2.attn.qkv.linear_b_v.weight"
    torch.save(authors.state_dict() | {key: torch.full((64, RANK), torch.inf)}, weights_dir / "robustmedclip/model.pth")
    with pytest.raises(ValueError, match=r"blocks\.2\.attn\.qkv v holds NaN or infinite values"):
        load(weights_dir)


def test_missing_adapters_name_places_and_command(weights_dir):
    with pytest.raises(FileNotFoundError, match=r"data_scripts/fetch_weights\.py robustmedclip") as error:
        load(weights_dir)
    assert "model.pth" in str(error.value)
    assert "lora_weights.safetensors" in str(error.value)
