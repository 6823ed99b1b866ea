"""Layers with low-rank adapters: put on, listed and taken off by peft."""

import math
import re
from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from medrobust_lib.models.qkv import fuse_qkv

ADAPTER = "default"
"""peft's name for the only adapter of a layer."""


def inject_adapters(module: nn.Module, names: Sequence[str], *, rank: int, seed: int = 0) -> None:
    """Let peft put untrained adapters on the layers of these names, in place; all else is frozen.

    B is zero, A drawn from `seed` as ``torch.nn.Linear`` draws its weight; the global random stream stays where it is.
    """
    # alpha = rank: peft scales by alpha / rank. A string is a regular expression for whole names; peft would match
    # the entries of a list with the ends of names, too.
    config = LoraConfig(r=rank, lora_alpha=rank, bias="none", target_modules="|".join(map(re.escape, names)))
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(module).items():
            if ".lora_A." in name:
                start = torch.empty(parameter.shape)
                parameter.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every adapter by their names in the model; empty if there are none."""
    names = {
        f"{name}.{side}.{ADAPTER}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        for side in ("lora_A", "lora_B")
    }
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def remove_adapters(module: nn.Module) -> None:
    """Take the adapters off in place, after adding their products to the weights; split projections are fused again.

    Raises
    ------
    ValueError
        The weights would become NaN or infinite.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            module.set_submodule(name, layer.get_base_layer())
    fuse_qkv(module)
    del module.peft_config
