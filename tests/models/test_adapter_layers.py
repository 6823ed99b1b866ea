"""Query, key and value projections apart and together again: the same features, the same state dict."""

import copy

import open_clip
import pytest
import timm
import torch
from torch import nn

from medrobust_lib.models.adapter_layers import (
    SelfAttention,
    SplitProjection,
    fuse_qkv,
    is_fused,
    open_attention,
    split_qkv,
)


@pytest.fixture
def without_shortcut():
    """Frozen attention computed as if it were trained: torch's shortcut for it rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture(params=["timm", "open_clip"])
def tower(request, builders):
    torch.manual_seed(0)
    if request.param == "timm":
        made = timm.create_model("test_vit", num_classes=0, img_size=32)
    else:
        made = open_clip.transformer.VisionTransformer(32, 8, width=64, layers=2, heads=4, mlp_ratio=2, output_dim=16)
    return builders.randomise(made).requires_grad_(False)


def pixels(count=2):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("without_shortcut")
def test_splitting_changes_no_bit_of_the_features(tower):
    expected = tower(pixels())
    split_qkv(tower)
    layers = [layer for layer in tower.modules() if isinstance(layer, SplitProjection)]
    assert len(layers) == len(getattr(tower, "blocks", None) or tower.transformer.resblocks)
    assert all(type(getattr(layer, part)) is nn.Linear for layer in layers for part in "qkv")
    assert torch.equal(tower(pixels()), expected)


def test_torchs_shortcut_agrees_up_to_rounding(tower):
    expected = tower(pixels())
    split_qkv(tower)
    assert torch.allclose(tower(pixels()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [split_qkv, open_attention])
def test_fusing_is_the_exact_way_back(tower, change):
    before, features = copy.deepcopy(tower.state_dict()), tower(pixels())
    kinds = [type(module) for module in tower.modules()]
    stream = torch.random.get_rng_state()
    change(tower)
    fuse_qkv(tower)
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert list(tower.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    assert [type(module) for module in tower.modules()] == kinds
    assert torch.equal(tower(pixels()), features)
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_parts_are_the_thirds_in_order():
    layer = nn.Linear(4, 12)
    parts = SplitProjection(layer)
    for number, part in enumerate("qkv"):
        assert torch.equal(getattr(parts, part).weight, layer.weight[4 * number : 4 * number + 4])
        assert torch.equal(getattr(parts, part).bias, layer.bias[4 * number : 4 * number + 4])
    x = torch.randn(2, 5, 4)
    assert torch.allclose(parts(x), layer(x), atol=1e-6)
    assert SplitProjection(nn.Linear(4, 12, bias=False)).fused().bias is None


def test_parts_are_copies(tower):
    before = copy.deepcopy(tower)
    split = copy.deepcopy(tower)
    split_qkv(split)
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), before.parameters(), strict=True))


@pytest.mark.usefixtures("without_shortcut")
@pytest.mark.parametrize("shape", [(5, 5), (6, 5, 5)], ids=["one mask", "a mask for every head"])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_under_a_mask_is_that_of_torch(shape, bias):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
    if bias:
        nn.init.normal_(layer.in_proj_bias)
    x, mask = torch.randn(3, 5, 8), torch.randn(shape)
    expected, _ = layer(x, x, x, need_weights=False, attn_mask=mask)
    found, weights = SelfAttention(layer)(x, x, x, need_weights=False, attn_mask=mask)
    assert torch.allclose(found, expected, atol=1e-6)
    assert weights is None
    assert (found - layer(x, x, x, need_weights=False)[0]).abs().max() > 1e-3


def test_only_self_attention_is_computed():
    layer = SelfAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(1, 3, 8)
    for arguments in ((x, x.clone(), x), (x, x, x.clone())):
        with pytest.raises(ValueError, match="self-attention only"):
            layer(*arguments, need_weights=False)
    with pytest.raises(ValueError, match="returns no attention weights"):
        layer(x, x, x, need_weights=True)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.1}, {"batch_first": False}, {"kdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_other_attention_is_refused(options):
    layer = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
    assert not is_fused("attn", layer)
    with pytest.raises(ValueError, match="can be taken apart, not MultiheadAttention"):
        split_qkv(nn.Sequential(layer))


def test_what_counts_as_fused():
    assert is_fused("visual.attn.qkv", nn.Linear(8, 24))
    assert not is_fused("visual.attn.qkv", nn.Linear(8, 25))
    assert not is_fused("visual.attn.kv", nn.Linear(8, 24))
    assert not is_fused("visual.attn.qkv", nn.Conv2d(8, 24, 1))
    assert is_fused("visual.attn", nn.MultiheadAttention(8, 2, batch_first=True))


def test_torchs_own_transformer_runs_on_opened_attention():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0, batch_first=True)
    tower, x = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(3, 5, 16)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    with torch.no_grad():
        expected = [tower(x), tower(x, mask=mask, is_causal=False)]
        split_qkv(tower)
        torch.testing.assert_close([tower(x), tower(x, mask=mask, is_causal=False)], expected, rtol=0, atol=1e-5)
        tower.layers[0].self_attn.qkv.q.weight.add_(1)  # it is asked, not passed by
        assert not torch.allclose(tower(x), expected[0], atol=1e-3)
    with pytest.raises(ValueError, match="without padding"):
        tower(x, src_key_padding_mask=torch.zeros(3, 5, dtype=torch.bool))
