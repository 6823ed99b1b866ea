"""Gradient attacks on images, to see what a certificate protects against."""

from collections.abc import Callable

import torch
from torch import Tensor


def projected_gradient(
    objective: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    radius: float,
    steps: int = 20,
    step_size: float | None = None,
    seed: int | None = None,
) -> Tensor:
    """Raise an objective within an L2 ball around an image: projected gradient ascent (PGD).

    Parameters
    ----------
    objective : callable
        float [n, 3, H, W] -> float [n], differentiable; larger is better for the attacker.
    image : float [3, H, W] or [n, 3, H, W]
        In [0, 1].
    radius : float
        Of the ball, > 0, in [0, 1] pixel units.
    steps : int
    step_size : float, optional
        Length of a step; default 2.5 radius / steps.
    seed : int, optional
        Start at a random point of the sphere instead of at the image.

    Returns
    -------
    Tensor
        Of the shape of `image`: the best point met, within the ball and within [0, 1].

    Raises
    ------
    ValueError
        A radius or a number of steps that is not positive, or an objective without one finite value for each image.

    References
    ----------
    Madry et al. 2018, arXiv:1706.06083, with the L2 norm.
    """
    if not 0 < radius < float("inf") or steps < 1:
        raise ValueError(f"radius={radius}, steps={steps}: an attack needs a radius above 0 and at least one step")
    single = image.ndim == 3
    clean = (image[None] if single else image).detach()
    step_size = 2.5 * radius / steps if step_size is None else step_size
    moved = clean.clone()
    if seed is not None:
        generator = torch.Generator(clean.device).manual_seed(seed)
        direction = torch.empty_like(clean).normal_(generator=generator)
        moved = _projected(clean + direction, clean, radius)
    best, best_value = moved.clone(), None
    for step in range(steps + 1):
        moved = moved.detach().requires_grad_(step < steps)
        with torch.enable_grad():
            value = objective(moved)
        if tuple(value.shape) != (len(clean),):
            raise ValueError(f"the objective returned {tuple(value.shape)} for {len(clean)} images, not one value each")
        reached = value.detach()
        if not reached.isfinite().all():
            raise ValueError(f"step {step}: the objective is {reached.tolist()}; an attack climbs finite values")
        best_value = torch.full_like(reached, -torch.inf) if best_value is None else best_value
        better = reached > best_value
        best[better], best_value[better] = moved.detach()[better], reached[better]
        if step < steps:
            (gradient,) = torch.autograd.grad(value, moved, torch.ones_like(value))
            moved = _projected(moved.detach() + step_size * _unit(gradient), clean, radius)
    return best[0] if single else best


def _projected(moved: Tensor, clean: Tensor, radius: float) -> Tensor:
    """Nearest point of the ball, then of [0, 1]: the second step only brings it closer to the clean image."""
    shift = moved - clean
    norm = shift.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return (clean + shift * (radius / norm).clamp(max=1.0)).clamp(0, 1)


def _unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
