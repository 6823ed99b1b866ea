"""Low-rank adapters on every kind of image tower that the library loads, in the real layouts with tiny weights."""

import copy

import numpy as np
import open_clip
import pytest
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import nn
from torch.nn import functional
from transformers import BertConfig

from medrobust_lib.models.adapters import (
    adapter_layout,
    adapter_parameters,
    attach_adapters,
    attached_adapters,
    merge_adapters,
    trainable_share,
)
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens
from medrobust_lib.models.medclip import MedCLIPNetwork
from medrobust_lib.models.open_clip import OpenClipEncoder

TEXTS = ["an image of tissue", "debris"]


@pytest.fixture
def each(each_kind, loaded):
    """A model of every kind."""
    return loaded(each_kind)


@pytest.fixture
def without_shortcut():
    """Frozen attention computed as if it were trained: torch's shortcut for it rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


# Where adapters go


def test_layouts(loaded, kinds):
    found = {kind: adapter_layout(loaded(kind)) for kind in kinds}
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


def test_an_adapted_model_keeps_the_layout_of_its_base(each):
    assert adapter_layout(attach_adapters(each, rank=1)) == adapter_layout(each)


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


def test_convolutions_that_peft_cannot_merge_are_left_out(pixels, trained):
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
def test_the_adapted_model_begins_as_its_base_exactly(loaded, form, pixels):
    kind, qkv = form
    model = loaded(kind)
    # Frozen like its base: where a gradient is needed, torch may sum in another order.
    adapted = attach_adapters(model, rank=4, qkv=qkv).requires_grad_(False)
    images = pixels(model)
    assert torch.equal(adapted.encode_image(images), model.encode_image(images))
    assert torch.equal(adapted.encode_text(TEXTS), model.encode_text(TEXTS))
    assert not adapted.training
    assert adapted.id == model.id


def test_the_shortcut_of_frozen_attention_agrees_up_to_rounding(loaded, pixels):
    model = loaded("open_clip ViT")
    images = pixels(model)
    found = attach_adapters(model).encode_image(images)
    assert torch.allclose(found, model.encode_image(images), atol=1e-6, rtol=0)


def test_only_adapters_require_a_gradient_and_the_base_stays_as_it_is(each):
    before = copy.deepcopy(each.state_dict())
    stream = torch.random.get_rng_state()
    adapted = attach_adapters(each, rank=2)
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == set(adapter_parameters(adapted))
    assert list(each.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in each.state_dict().items())
    assert not any(parameter.requires_grad for parameter in each.parameters())
    assert adapter_parameters(each) == {}
    assert attached_adapters(each) is None


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
    assert list(model.state_dict()) == list(demo.state_dict())
    assert all(torch.equal(tensor, demo.state_dict()[name]) for name, tensor in model.state_dict().items())
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
    network = builders.hollow(lambda: CustomTextCLIP(embed_dim=512, vision_cfg=vision, text_cfg=text))
    network.visual.preprocess_cfg = {"size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=16)
    model = OpenClipEncoder(network, tokenizer, id="biomedclip", provenance={})
    assert count(model, rank=16) == 12 * 3 * 16 * (768 + 768) == 884_736
    assert count(model, rank=16, qkv="fused") == 12 * 16 * (768 + 2304) == 589_824


def test_adapters_of_resnet50_count_kernels_and_no_shortcuts(builders, tmp_path):
    model = builders.medclip((1, 1, 1, 1), tmp_path, image_size=64)
    model.network.vision_model = builders.hollow(
        lambda: MedCLIPNetwork((3, 4, 6, 3), BertConfig(), embed_dim=24).vision_model
    )
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
    assert count(model, rank=16, kernel="middle") == 694_320, "RobustMedCLIP's"


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


def test_training_changes_all_adapters_and_nothing_else(each, pixels, trained):
    start = attach_adapters(each, rank=4)
    adapted = trained(each, qkv="separate")
    before, after = start.state_dict(), adapted.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(adapter_parameters(adapted))
    images = pixels(each)
    assert (adapted.encode_image(images) - each.encode_image(images)).abs().max() > 1e-3
    assert torch.equal(adapted.encode_text(TEXTS), each.encode_text(TEXTS))


def test_merged_equals_unmerged_and_has_the_layers_of_the_base(loaded, form, pixels, trained):
    kind, qkv = form
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


def test_separate_adapters_share_nothing_and_fused_ones_share_a(loaded, trained):
    model = loaded("timm ViT")
    name = "model.visual.trunk.blocks.0.attn.qkv.weight"
    ranks = {}
    for qkv in ("separate", "fused"):
        change = merge_adapters(trained(model, qkv=qkv)).state_dict()[name] - model.state_dict()[name]
        thirds = [torch.linalg.matrix_rank(third, rtol=1e-3).item() for third in change.chunk(3)]
        ranks[qkv] = (thirds, torch.linalg.matrix_rank(torch.cat(list(change.chunk(3))), rtol=1e-3).item())
    assert ranks == {"separate": ([4, 4, 4], 12), "fused": ([4, 4, 4], 4)}


def test_a_copy_of_an_adapted_model_is_independent(loaded, pixels, trained):
    adapted = trained(loaded("timm ViT"), qkv="separate")
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


# The middle of the kernels, which is RobustMedCLIP's path beside a convolution


def test_adapters_of_the_middle_are_the_authors_path(loaded, pixels, trained):
    """B A x at every pixel, resized to the convolution's output by nearest neighbour, of an even number of rows."""
    model = loaded("torchvision ResNet")
    adapted, images = trained(model, kernel="middle"), pixels(model)
    assert torch.equal(attach_adapters(model, kernel="middle").encode_image(images), model.encode_image(images))
    assert (adapted.encode_image(images) - model.encode_image(images)).abs().max() > 1e-3
    generator = torch.Generator().manual_seed(6)
    for name in adapter_layout(model).names:
        layer = adapted.get_submodule(name)
        a, b = (side["default"] for side in (layer.lora_A, layer.lora_B))
        x = torch.randn(1, layer.base_layer.in_channels, 12, 12, generator=generator)
        row, column = (size // 2 for size in layer.base_layer.kernel_size)
        product = b.weight[:, :, 0, 0] @ a.weight[:, :, row, column]
        with torch.no_grad():
            plain = layer.base_layer(x)
            beside = torch.einsum("oi,bihw->bohw", product, x)
            expected = plain + nn.functional.interpolate(beside, size=plain.shape[2:], mode="nearest")
            assert torch.allclose(layer(x), expected, atol=1e-5), name


def test_the_middle_alone_is_trained_and_merged(loaded, pixels, trained):
    model = loaded("torchvision ResNet")
    adapted, images = trained(model, kernel="middle"), pixels(model)
    merged = merge_adapters(adapted)
    assert torch.allclose(merged.encode_image(images), adapted.encode_image(images), atol=1e-5, rtol=0)
    assert [type(layer) for layer in merged.modules()] == [type(layer) for layer in model.modules()]
    assert list(merged.state_dict()) == list(model.state_dict())
    for name in adapter_layout(model).names:
        change = merged.get_submodule(name).weight - model.get_submodule(name).weight
        row, column = (size // 2 for size in change.shape[2:])
        assert change[:, :, row, column].abs().max() > 0
        change[:, :, row, column] = 0
        assert not change.any(), "the rest of the kernel stays as it is"
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == set(adapter_parameters(adapted))
    assert attached_adapters(adapted).kernel == "middle"


# Refusals


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "16"])
def test_ranks_are_positive_whole_numbers(demo, rank):
    with pytest.raises(ValueError, match=f"rank={rank!r} is no whole number of 1 or more, usually 4"):
        attach_adapters(demo, rank=rank)


def test_wrong_forms_and_second_adapters_are_refused(demo, loaded):
    with pytest.raises(
        ValueError, match="unknown qkv 'seperate'; choose one of separate, fused; did you mean 'separate'"
    ):
        attach_adapters(demo, qkv="seperate")
    with pytest.raises(ValueError, match=r"demo-clip has no fused .* on convolutions\); take 'separate'"):
        attach_adapters(demo, qkv="fused")
    with pytest.raises(ValueError, match=r"plip has no fused .* on separate query, key, value layers\)"):
        attach_adapters(loaded("HF CLIP"), qkv="fused")
    with pytest.raises(ValueError, match="unknown kernel 'centre'; choose one of whole, middle"):
        attach_adapters(demo, kernel="centre")
    with pytest.raises(ValueError, match="kernel='middle': the adapters of .* go on query, key, value layers; take 'w"):
        attach_adapters(loaded("timm ViT"), kernel="middle")
    with pytest.raises(ValueError, match="demo-clip has adapters already; merge_adapters"):
        attach_adapters(attach_adapters(demo))
