"""Adapted convolutions that run once, with the summed weight: the same features and gradients as peft's."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import medrobust_lib as mr
from medrobust_lib.adaptation.adapting import summed_convolutions
from medrobust_lib.models.adapter_layers import inject_adapters
from medrobust_lib.models.adapters import adapter_parameters, attach_adapters


@pytest.fixture(scope="module")
def adapted():
    model = attach_adapters(mr.load_model("demo-clip", device="cpu"), rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def features_and_gradients(model):
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    features = model.encode_image(pixels)
    gradients = torch.autograd.grad(features[:, :5].sum(), list(adapter_parameters(model).values()))
    return [features.detach(), *gradients]


def convolutions_run(model):
    """Numbers of passes through a convolution, by whether it is an adapter's or the model's own."""
    runs = {True: 0, False: 0}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: runs.update({"lora_" in name: runs["lora_" in name] + 1}))
        for name, part in model.named_modules() if isinstance(part, nn.Conv2d) and not isinstance(part, LoraLayer)
    ]  # fmt: skip
    with torch.no_grad():
        model.encode_image(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    return runs[True], runs[False]


def test_values_and_gradients_stay_and_passes_are_saved(adapted):
    before, passes = features_and_gradients(adapted), convolutions_run(adapted)
    with summed_convolutions(adapted):
        within, fewer = features_and_gradients(adapted), convolutions_run(adapted)
    assert len(before) == 31  # features, and A and B of 15 convolutions
    for expected, found in zip(before, within, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-6)
    assert not all(torch.equal(*pair) for pair in zip(before, within, strict=True))
    assert passes == (30, 19) and fewer[1] == 19
    assert 0 < fewer[0] < 30  # large ones stay with peft


def test_afterwards_all_is_as_before(adapted):
    before = features_and_gradients(adapted)
    with pytest.raises(KeyError), summed_convolutions(adapted):
        raise KeyError
    assert all(torch.equal(*pair) for pair in zip(before, features_and_gradients(adapted), strict=True))
    assert not any("forward" in vars(part) for part in adapted.modules())


def test_linear_layers_stay_with_peft():
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapters(model, ["0"], rank=2)
    assert isinstance(model[0], LoraLayer)
    with summed_convolutions(model):
        assert "forward" not in vars(model[0])
