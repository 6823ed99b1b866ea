"""The image tower of any dual encoder: what image features depend on and text features do not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # what all batch normalisation layers have in common

from medrobust_lib.models.dual_encoder import DualEncoder


@dataclass(frozen=True, eq=False)
class ImageTower:
    """What only image features depend on: parameters and batch normalisation layers, by their names in the model."""

    parameters: dict[str, nn.Parameter]
    norms: dict[str, _BatchNorm]

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes."""
        statistics = {
            f"{name}.{part}": buffer for name, norm in self.norms.items() for part, buffer in norm.named_buffers()
        }
        return {**self.parameters, **statistics}


def find_image_tower(model: DualEncoder) -> ImageTower:
    """Find the image tower by one backward pass, whatever the back end calls its parts.

    Afterwards exactly the parameters of the tower require a gradient, so give a copy.
    """
    model.requires_grad_(True)
    grey = torch.full((1, 3, model.image_size, model.image_size), 0.5, device=model.device)
    own = _reached(model, lambda: model.encode_image(grey)) - _reached(model, lambda: model.encode_text(["x"]))
    model.requires_grad_(False)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in own}
    if not parameters:
        raise ValueError(
            f"{model.id}: image features depend on no parameter of their own that a gradient reaches, so there is no "
            "image tower to train"
        )
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return ImageTower(parameters, {name: norm for name, norm in _norms(model).items() if name in own})


def _reached(model: DualEncoder, encode: Callable[[], Tensor]) -> set[str]:
    """Names of the parameters and batch normalisation layers that features depend on."""
    found: set[str] = set()
    hooks = [norm.register_forward_hook(lambda *_, name=name: found.add(name)) for name, norm in _norms(model).items()]
    try:
        features = encode()
    finally:
        for hook in hooks:
            hook.remove()
    if features.requires_grad:
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        found.update(name for name, gradient in zip(names, gradients, strict=True) if gradient is not None)
    return found


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
