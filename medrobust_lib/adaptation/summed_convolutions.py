"""Faster training of low-rank adapters on small convolutions: one pass with the summed weight instead of three."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_LARGEST_EXCESS = 2.0  # of multiplications, which the two saved passes over memory make up for (measured on a CPU)


@contextmanager
def summed_convolutions(model: nn.Module) -> Iterator[None]:
    """While it lasts, let adapted convolutions compute with W + B A where that is faster; same values up to rounding.

    peft runs W, A and B one after the other. With the sum, the gradient of the whole weight is needed, which costs
    more multiplications than those of A and B where the convolution is large: such ones stay with peft.

    Parameters
    ----------
    model : nn.Module
        With peft's adapters, unmerged; afterwards as before.
    """
    changed = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _is_faster(layer)]
    for layer in changed:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _is_faster(layer: LoraLayer) -> bool:
    convolution = layer.get_base_layer()
    if not isinstance(convolution, nn.Conv2d):
        return False
    (adapter,) = layer.active_adapters
    of_adapters = sum(side[adapter].weight.numel() for side in (layer.lora_A, layer.lora_B))
    # A and B each take a forward pass and two backward passes, the whole weight one backward pass.
    return convolution.weight.numel() <= _LARGEST_EXCESS * 3 * of_adapters


def _forward(layer: LoraLayer, pixels: Tensor) -> Tensor:
    convolution = layer.get_base_layer()
    (adapter,) = layer.active_adapters
    weight = convolution.weight + layer.get_delta_weight(adapter)
    return torch.func.functional_call(convolution, {"weight": weight}, (pixels,))
