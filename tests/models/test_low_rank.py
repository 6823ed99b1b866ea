"""Low-rank adapters on every kind of image tower that the library loads, in the real layouts with tiny weights."""

import copy
import json
import shutil
import socket

import numpy as np
import open_clip
import pytest
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from peft import PeftModel
from tokenizers import BertWordPieceTokenizer
from torch import nn
from torch.nn import functional
from transformers import BertConfig, SwinConfig

from medrobust_lib import load_model
from medrobust_lib.models import low_rank
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens
from medrobust_lib.models.low_rank import (
    adapter_layout,
    adapter_parameters,
    attach_adapters,
    attached_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    trainable_share,
    weights_identity,
)
from medrobust_lib.models.medclip_backend import MedCLIPArchitecture, MedCLIPEncoder, MedCLIPNetwork
from medrobust_lib.models.open_clip_backend import OpenClipEncoder

KINDS = ("timm ViT", "open_clip ViT", "HF CLIP", "HF Swin", "torchvision ResNet", "CLIP ResNet")
FORMS = [*((kind, "separate") for kind in KINDS), ("timm ViT", "fused"), ("open_clip ViT", "fused")]
TEXTS = ["an image of tissue", "debris"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "x", "an", "image", "of", "tissue", "debris"]
SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def medclip(vision, folder, *, image_size):
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    bert = BertConfig(vocab_size=len(WORDS), **SMALL_BERT)
    network = MedCLIPNetwork(MedCLIPArchitecture(vision=vision, text=bert, embed_dim=24, image_size=image_size))
    tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    return MedCLIPEncoder(network, tokenizer, id="medclip", image_size=image_size, provenance={"source": "this test"})


@pytest.fixture(scope="session")
def loaded(builders, plip_folders, tmp_path_factory):
    """Function giving a tiny model of a kind, made once; none of the functions under test may change it."""
    models = {}

    def make(kind):
        folder = tmp_path_factory.mktemp("models")
        torch.manual_seed(0)
        if kind == "timm ViT":
            builders.write_bert(folder)
            builders.write_weights(folder, builders.biomedclip_configuration(str(folder)))
        elif kind == "open_clip ViT":
            size = builders.write_word_tokenizer(folder, context_length=16)
            builders.write_weights(folder, builders.tiny_configuration(size, hf_tokenizer_name="beside"))
        elif kind == "HF CLIP":
            shutil.copytree(plip_folders(2, True), folder / "plip")
            return load_model("plip", device="cpu", weights_dir=folder)
        elif kind == "HF Swin":
            swin = SwinConfig(image_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=7)
            return builders.randomise(medclip(swin, folder, image_size=56)).requires_grad_(False)
        elif kind == "torchvision ResNet":
            return builders.randomise(medclip((1, 1, 1, 1), folder, image_size=64)).requires_grad_(False)
        else:
            return load_model("demo-clip", device="cpu")
        return load_model(f"local-dir:{folder}", device="cpu")

    def get(kind):
        if kind not in models:
            models[kind] = make(kind)
        return models[kind]

    return get


@pytest.fixture(params=KINDS)
def model(request, loaded):
    return loaded(request.param)


@pytest.fixture
def demo(loaded):
    return loaded("CLIP ResNet")


@pytest.fixture
def without_shortcut():
    """Frozen attention computed as if it were trained: torch's shortcut for it rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def pixels(model, count=3):
    size = model.image_size
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(model, **options):
    """Adapters after a few optimiser steps on random targets."""
    adapted = attach_adapters(model, **{"rank": 4, **options})
    images, generator = pixels(adapted), torch.Generator().manual_seed(2)
    targets = functional.normalize(torch.randn(3, model.embed_dim, generator=generator), dim=1)
    optimiser = torch.optim.AdamW(adapter_parameters(adapted).values(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        (-(adapted.encode_image(images) * targets).sum()).backward()
        optimiser.step()
    return adapted


def same_state(a, b):
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# Where adapters go


def test_layouts(loaded):
    found = {kind: adapter_layout(loaded(kind)) for kind in KINDS}
    shapes = {kind: (layout.kind, len(layout.names), layout.blocks, layout.fused) for kind, layout in found.items()}
    assert shapes == {
        "timm ViT": ("query, key, value", 6, 6, True),
        "open_clip ViT": ("query, key, value", 2, 2, True),
        "HF CLIP": ("query, key, value", 6, 2, False),
        "HF Swin": ("query, key, value", 12, 4, False),
        "torchvision ResNet": ("convolutions", 13, 13, False),
        "CLIP ResNet": ("convolutions", 15, 15, False),
    }
    assert found["timm ViT"].names[5] == "model.visual.trunk.blocks.5.attn.qkv"
    assert found["open_clip ViT"].names[1] == "model.visual.transformer.resblocks.1.attn"
    last = [name.rpartition(".")[2] for name in found["HF CLIP"].names]
    assert last == ["q_proj", "k_proj", "v_proj"] * 2
    for kind, layout in found.items():
        tower = {"HF CLIP": "model.vision_model.", "HF Swin": "network.vision_model."}.get(kind)
        tower = tower or ("network.vision_model." if kind == "torchvision ResNet" else "model.visual.")
        assert all(name.startswith(tower) for name in layout.names), kind
        assert not [name for name in layout.names if "downsample" in name or "attnpool" in name]


def test_an_adapted_model_keeps_the_layout_of_its_base(model):
    assert adapter_layout(attach_adapters(model, rank=1)) == adapter_layout(model)


class Own(DualEncoder):
    """A user's own image tower beside a text tower without parameters."""

    def __init__(self, tower):
        super().__init__(
            id="own",
            preprocessing=Preprocessing(32, "squash", "bilinear", mean=(0,) * 3, std=(1,) * 3),
            embed_dim=4,
            context_length=4,
            logit_scale=1.0,
            provenance={},
        )
        self.tower = tower

    def _image_features(self, pixels):
        return self.tower(pixels)

    def tokenize(self, texts):
        return Tokens(torch.ones(len(texts), 4, dtype=torch.int64), torch.ones(len(texts), 4, dtype=torch.bool))

    def embed_tokens(self, tokens):
        return tokens.ids[..., None].expand(-1, -1, 4).to(self.device, self.dtype)

    def _text_features(self, embeddings, tokens):
        return embeddings.sum(dim=1)


def test_a_tower_without_a_place_says_what_it_has():
    linear = Own(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 4))).eval()
    with pytest.raises(ValueError, match=r"own: no place for adapters: .* it has 1 Conv2d, 2 Linear"):
        attach_adapters(linear)
    with pytest.raises(ValueError, match="it has no layer with weights"):
        adapter_layout(Own(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())))


def test_layers_whose_weights_are_read_past_them_get_no_adapter():
    """As in open_clip's attention pooling: an adapter on such a layer would never learn."""

    class Bypassed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 3, stride=4)
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 4) for _ in range(3))

        def forward(self, x):
            x = self.convolution(x).mean(dim=(2, 3))
            return sum(functional.linear(x, layer.weight) for layer in (self.q_proj, self.k_proj, self.v_proj))

    assert adapter_layout(Own(Bypassed()).eval()).names == ("tower.convolution",)


def test_a_layer_that_texts_run_through_as_well_gets_no_adapter():
    class Shared(Own):
        def _text_features(self, embeddings, tokens):
            return self.tower[0](embeddings[:, None].expand(-1, 3, -1, -1)).mean(dim=(2, 3))

    tower = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 32, 3), nn.Conv2d(32, 4, 3), nn.AdaptiveAvgPool2d(1))
    assert adapter_layout(Own(tower.append(nn.Flatten())).eval()).names == ("tower.0", "tower.1", "tower.2")
    assert adapter_layout(Shared(tower).eval()).names == ("tower.1", "tower.2")


def test_convolutions_that_peft_cannot_merge_are_left_out():
    convolutions = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 64, 3, padding=1),
    ]
    model = Own(nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))).eval()
    assert adapter_layout(model).names == ("tower.0", "tower.4")
    adapted = trained(model)
    images = pixels(model)
    assert torch.allclose(merge_adapters(adapted).encode_image(images), adapted.encode_image(images), atol=1e-5)


# At the start


@pytest.mark.usefixtures("without_shortcut")
@pytest.mark.parametrize(("kind", "qkv"), FORMS)
def test_the_adapted_model_begins_as_its_base_exactly(loaded, kind, qkv):
    model = loaded(kind)
    # Frozen like its base: where a gradient is needed, torch may sum in another order.
    adapted = attach_adapters(model, rank=4, qkv=qkv).requires_grad_(False)
    images = pixels(model)
    assert torch.equal(adapted.encode_image(images), model.encode_image(images))
    assert torch.equal(adapted.encode_text(TEXTS), model.encode_text(TEXTS))
    assert not adapted.training
    assert adapted.id == model.id


def test_the_shortcut_of_frozen_attention_agrees_up_to_rounding(loaded):
    model = loaded("open_clip ViT")
    images = pixels(model)
    found = attach_adapters(model).encode_image(images)
    assert torch.allclose(found, model.encode_image(images), atol=1e-6, rtol=0)


def test_only_adapters_require_a_gradient_and_the_base_stays_as_it_is(model):
    before = copy.deepcopy(model.state_dict())
    stream = torch.random.get_rng_state()
    adapted = attach_adapters(model, rank=2)
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == set(adapter_parameters(adapted))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert adapter_parameters(model) == {}
    assert attached_adapters(model) is None


def test_the_first_values_follow_from_the_seed(demo):
    first, again, other = (adapter_parameters(attach_adapters(demo, rank=2, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    sides = {".lora_A.": False, ".lora_B.": True}
    for side, zero in sides.items():
        tensors = [tensor for name, tensor in first.items() if side in name]
        assert len(tensors) == 15
        assert all((not tensor.any()) == zero for tensor in tensors)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)
    bound = 1 / np.sqrt(3 * 3 * 3)  # of torch.nn.Conv2d for 3 channels and a kernel of 3 x 3
    assert 0.8 * bound < first["model.visual.conv1.lora_A.default.weight"].abs().max() <= bound


def test_a_model_in_training_mode_keeps_its_statistics(demo):
    model = copy.deepcopy(demo).train()
    adapted = attach_adapters(model, rank=1)
    assert same_state(model, demo)
    assert not any(module.training for module in adapted.modules())
    assert model.training


def test_half_precision_is_trained_in_float32(demo):
    half = copy.deepcopy(demo).to(torch.bfloat16)
    adapted = attach_adapters(half, rank=2)
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float32}
    assert half.dtype == torch.bfloat16


# Numbers of parameters


def count(model, **options):
    return sum(tensor.numel() for tensor in adapter_parameters(attach_adapters(model, **options)).values())


def hollow(build):
    """A network of full size whose zeros take no time to draw."""
    with torch.device("meta"):
        network = build()
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
    return network


def test_adapters_of_biomedclips_layout_have_the_published_number_of_parameters(builders, tmp_path):
    builders.write_bert(tmp_path)
    vision = CLIPVisionCfg(timm_model_name="vit_base_patch16_224", timm_pool="", timm_proj="linear", image_size=224)
    text = CLIPTextCfg(
        hf_model_name=str(tmp_path),
        hf_tokenizer_name=str(tmp_path),
        hf_model_pretrained=False,
        hf_proj_type="mlp",
        hf_pooler_type="cls_last_hidden_state_pooler",
    )
    network = hollow(lambda: CustomTextCLIP(embed_dim=512, vision_cfg=vision, text_cfg=text))
    network.visual.preprocess_cfg = {"size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=16)
    model = OpenClipEncoder(network, tokenizer, id="biomedclip", provenance={})
    assert count(model, rank=16) == 12 * 3 * 16 * (768 + 768) == 884_736
    assert count(model, rank=16, qkv="fused") == 12 * 16 * (768 + 2304) == 589_824


def test_adapters_of_resnet50_count_kernels_and_no_shortcuts(tmp_path):
    model = medclip((1, 1, 1, 1), tmp_path, image_size=64)
    model.network.vision_model = hollow(lambda: MedCLIPNetwork(
        MedCLIPArchitecture(vision=(3, 4, 6, 3), text=BertConfig(vocab_size=len(WORDS), **SMALL_BERT), embed_dim=24)
    ).vision_model)  # fmt: skip
    model = model.eval()
    weights = [3 * 49 + 64]
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for _ in range(blocks):
            weights += [channels + width, width * 9 + width, width + 4 * width]
            channels = 4 * width
    assert len(weights) == adapter_layout(model).blocks == 49
    assert count(model, rank=16) == 16 * sum(weights)
    assert count(model, rank=4) == 4 * sum(weights)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_share_counts_adapters_tower_and_model(loaded, rank):
    model = loaded("timm ViT")
    separate, fused = attach_adapters(model, rank=rank), attach_adapters(model, rank=rank, qkv="fused")
    tower = sum(parameter.numel() for parameter in model.model.visual.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    own = 6 * 3 * rank * (64 + 64)
    assert trainable_share(separate) == (own, tower + own, total + own)
    assert trainable_share(fused).adapters == 6 * rank * (64 + 192)
    assert trainable_share(model) == (0, tower, total)
    assert {n for n, p in separate.named_parameters() if p.requires_grad} == set(adapter_parameters(separate))


# Training


def test_training_changes_all_adapters_and_nothing_else(model):
    start = attach_adapters(model, rank=4)
    adapted = trained(model)
    before, after = start.state_dict(), adapted.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(adapter_parameters(adapted))
    images = pixels(model)
    assert (adapted.encode_image(images) - model.encode_image(images)).abs().max() > 1e-3
    assert torch.equal(adapted.encode_text(TEXTS), model.encode_text(TEXTS))


@pytest.mark.parametrize(("kind", "qkv"), FORMS)
def test_merged_equals_unmerged_and_has_the_layers_of_the_base(loaded, kind, qkv):
    model = loaded(kind)
    adapted = trained(model, qkv=qkv)
    kept = copy.deepcopy(adapted.state_dict())
    merged = merge_adapters(adapted)
    images = pixels(model)
    assert torch.allclose(merged.encode_image(images), adapted.encode_image(images), atol=1e-5, rtol=0)
    assert [type(layer) for layer in merged.modules()] == [type(layer) for layer in model.modules()]
    assert list(merged.state_dict()) == list(model.state_dict())
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert (attached_adapters(merged), hasattr(merged, "peft_config")) == (None, False)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapted.state_dict().items())
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, model.state_dict()[n])}
    names = adapter_layout(model).names
    assert changed == {name for name in changed if name.rpartition(".")[0] in names and name.endswith("weight")}
    assert len(changed) == len(names)
    with pytest.raises(ValueError, match="has no adapters; attach_adapters"):
        merge_adapters(merged)


def test_separate_adapters_share_nothing_and_fused_ones_share_a(loaded):
    model = loaded("timm ViT")
    name = "model.visual.trunk.blocks.0.attn.qkv.weight"
    ranks = {}
    for qkv in ("separate", "fused"):
        change = merge_adapters(trained(model, qkv=qkv)).state_dict()[name] - model.state_dict()[name]
        thirds = [torch.linalg.matrix_rank(third, rtol=1e-3).item() for third in change.chunk(3)]
        ranks[qkv] = (thirds, torch.linalg.matrix_rank(torch.cat(list(change.chunk(3))), rtol=1e-3).item())
    assert ranks == {"separate": ([4, 4, 4], 12), "fused": ([4, 4, 4], 4)}


def test_a_copy_of_an_adapted_model_is_independent(loaded):
    adapted = trained(loaded("timm ViT"))
    images = pixels(adapted)
    expected = adapted.encode_image(images)
    other = copy.deepcopy(adapted)
    assert attached_adapters(other) == attached_adapters(adapted)
    with torch.no_grad():
        for tensor in adapter_parameters(other).values():
            tensor.zero_()
    assert torch.equal(adapted.encode_image(images), expected)
    assert not torch.equal(other.encode_image(images), expected)


def test_broken_adapters_are_not_merged(demo):
    adapted = attach_adapters(demo, rank=1)
    with torch.no_grad():
        next(iter(adapter_parameters(adapted).values())).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        merge_adapters(adapted)


# Refusals


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "16"])
def test_ranks_are_positive_whole_numbers(demo, rank):
    with pytest.raises(ValueError, match=f"rank={rank!r}: a whole number of at least 1"):
        attach_adapters(demo, rank=rank)


def test_wrong_forms_and_second_adapters_are_refused(demo, loaded):
    with pytest.raises(ValueError, match="qkv='seperate': must be 'separate' or 'fused'; did you mean 'separate'"):
        attach_adapters(demo, qkv="seperate")
    with pytest.raises(ValueError, match=r"demo-clip has no fused .* on convolutions\); take 'separate'"):
        attach_adapters(demo, qkv="fused")
    with pytest.raises(ValueError, match=r"plip has no fused .* on separate query, key, value layers\)"):
        attach_adapters(loaded("HF CLIP"), qkv="fused")
    with pytest.raises(ValueError, match="demo-clip has adapters already; merge_adapters"):
        attach_adapters(attach_adapters(demo))


# Files


@pytest.fixture
def folder(demo, tmp_path):
    return save_adapter(trained(demo), tmp_path / "deep" / "site-b", provenance={"epochs": 3, "base": "a word"})


@pytest.mark.parametrize(("kind", "qkv"), FORMS)
def test_saved_and_loaded_is_identical(loaded, kind, qkv, tmp_path, monkeypatch):
    model = loaded(kind)
    adapted = trained(model, qkv=qkv)
    place = save_adapter(adapted, tmp_path / "mine", provenance={})
    monkeypatch.setattr(socket, "socket", None)  # whoever needs the network fails
    images = pixels(model)
    apart = load_adapter(model, place, merged=False)
    assert same_state(apart, adapted)
    adapted.requires_grad_(False)  # where a gradient is needed, torch may sum in another order
    assert torch.equal(apart.encode_image(images), adapted.encode_image(images))
    merged = load_adapter(model, place)
    assert same_state(merged, merge_adapters(adapted))
    assert list(merged.state_dict()) == list(model.state_dict())
    for other in (apart, merged):
        assert other.id == f"{model.id} + mine"
        assert not other.training
        assert not any(parameter.requires_grad for parameter in other.parameters())
    assert same_state(merge_adapters(apart), merged)


def test_a_folder_holds_pefts_files_and_where_they_come_from(demo, folder):
    assert {path.name for path in folder.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "provenance.json",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["site-b"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (folder, *folder.iterdir()))
    content = json.loads((folder / "provenance.json").read_text())
    assert (content["epochs"], content["base"]) == (3, "a word")
    adapter = content["adapter"]
    assert adapter["base"] == {"id": "demo-clip", "weights": weights_identity(demo)}
    assert (adapter["rank"], adapter["qkv"], adapter["kind"]) == (4, "separate", "convolutions")
    assert adapter["parameters"] == count(demo, rank=4)
    assert set(adapter["versions"]) == {"medrobust_lib", "peft", "torch"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (4, 4, 0, "none")
    loaded = load_adapter(demo, folder).provenance
    assert loaded["epochs"] == 3
    assert loaded["adapter"]["base"] == {**demo.provenance, **adapter["base"]}


def test_peft_alone_reads_the_folder(demo, folder):
    alone = PeftModel.from_pretrained(copy.deepcopy(demo), str(folder)).base_model.model
    images = pixels(demo)
    assert torch.equal(alone.encode_image(images), load_adapter(demo, folder, merged=False).encode_image(images))


def test_the_same_weights_in_bfloat16_count_as_the_same(demo, folder):
    half = copy.deepcopy(demo).to(torch.bfloat16)
    assert weights_identity(half) == weights_identity(demo)
    loaded = load_adapter(half, folder)
    assert loaded.dtype == torch.bfloat16
    expected = load_adapter(demo, folder).encode_image(pixels(demo))
    assert (loaded.encode_image(pixels(demo)) - expected).abs().max() < 0.02
    with pytest.raises(ValueError, match="demo-clip is in float16, in which its weights cannot be recognised"):
        load_adapter(copy.deepcopy(demo).half(), folder)


def test_another_base_is_refused_with_both_names(demo, loaded, folder):
    other = loaded("timm ViT")
    with pytest.raises(ValueError, match=rf"was trained on 'demo-clip' with weights {weights_identity(demo)}, not on"):
        load_adapter(other, folder)
    changed = copy.deepcopy(demo)
    with torch.no_grad():
        changed.model.visual.conv1.weight[0, 0, 0, 0] += 0.1
    changed.id = "finetuned"
    with pytest.raises(ValueError, match=rf"not on 'finetuned' with weights {weights_identity(changed)}; load that"):
        load_adapter(changed, folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "provenance.json"])
def test_incomplete_and_damaged_folders_are_refused(demo, folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(bytes(content[: len(content) // 2]) if name == "provenance.json" else bytes(content))
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        load_adapter(demo, folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"site-b lacks {name}; copy it anew or train again"):
        load_adapter(demo, folder)


def test_missing_folders_and_other_formats_are_refused(demo, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter folder .*nowhere; save_adapter or adapt_lora writes one"):
        load_adapter(demo, tmp_path / "nowhere")
    path = folder / "provenance.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "adapter": {**content["adapter"], "rank": 5}}))
    with pytest.raises(ValueError, match="does not fit the layers of 'demo-clip'; train it again"):
        load_adapter(demo, folder)
    path.write_text(json.dumps({**content, "adapter": {**content["adapter"], "format": 2}}))
    with pytest.raises(ValueError, match="holds an adapter of format 2, not 1"):
        load_adapter(demo, folder)
    path.write_text(json.dumps({"epochs": 3}))
    with pytest.raises(ValueError, match=r"provenance\.json is damaged or of another kind"):
        load_adapter(demo, folder)


def test_saving_refuses_what_it_cannot_keep(demo, folder, tmp_path):
    adapted = attach_adapters(demo, rank=1)
    with pytest.raises(FileExistsError, match="site-b exists; delete it or give another folder"):
        save_adapter(adapted, folder, provenance={})
    with pytest.raises(ValueError, match="demo-clip has no adapters"):
        save_adapter(demo, tmp_path / "new", provenance={})
    with pytest.raises(ValueError, match="entry 'adapter'"):
        save_adapter(adapted, tmp_path / "new", provenance={"adapter": 1})
    for value in (np.zeros(2), float("nan")):
        with pytest.raises(ValueError, match="provenance holds more than JSON values"):
            save_adapter(adapted, tmp_path / "new", provenance={"value": value})
    assert not (tmp_path / "new").exists()


def test_an_interrupted_save_leaves_nothing(demo, tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(low_rank, "file_sha256", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(attach_adapters(demo, rank=1), tmp_path / "new", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_named_even_if_the_model_was_renamed(demo, tmp_path):
    adapted = trained(demo)
    adapted.id, adapted.provenance = "renamed", {}
    place = save_adapter(adapted, tmp_path / "new", provenance={})
    assert json.loads((place / "provenance.json").read_text())["adapter"]["base"]["id"] == "demo-clip"
    assert load_adapter(demo, place).id == "demo-clip + new"
