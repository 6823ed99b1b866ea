"""Training of denoisers: DnCNN for one noise level, and the noise predictor of a DDPM for all."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medrobust_lib.checks import check_choice
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.experiments import progress
from medrobust_lib.files import write_tensors
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.loading import resolve_device
from medrobust_lib.models.weights import fingerprint
from medrobust_lib.smoothing.denoisers import (
    ASKED,
    DIFFUSION_STEPS,
    FORMAT,
    HEADER,
    DiffusionDenoiser,
    DnCNN,
    DnCNNDenoiser,
    Objective,
    ResidualBlock,
    UNet,
    diffusion_sigmas,
    matching_timestep,
)


def train_denoiser(
    model: DualEncoder | None,
    dataset: ImageDataset,
    *,
    sigma: float,
    objective: Objective = "mse",
    start: DnCNNDenoiser | None = None,
    class_features: Tensor | None = None,
    depth: int = 17,
    width: int = 64,
    unshuffle: int = 1,
    skip: float = 1.0,
    steps: int = 2000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    crop: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> DnCNNDenoiser:
    """Train a DnCNN for one noise level.

    "mse" minimises the mean squared error to the clean image. "stability" minimises the cross-entropy between
    the frozen model's class probabilities for the denoised image and those for the clean one; no label is used.

    Parameters
    ----------
    model : DualEncoder or None
        Frozen; brings images to its geometry. None, for "mse" only, takes them as they are.
    dataset : ImageDataset
        Images to train on, never those that will be certified.
    sigma : float
        Noise level in [0, 1] pixel units, > 0.
    objective : {"mse", "stability"}
    start : DnCNNDenoiser, optional
        Go on from its network of this sigma, whose architecture is kept: an "mse" start makes stability training
        far shorter.
    class_features : float32 [K, d], optional
        Unit-norm text features of "stability"; default: the first template of the data set.
    depth, width, unshuffle, skip
        Of `DnCNN`; the defaults are the paper's network.
    steps, batch_size, learning_rate
        Adam, the rate falling to 0 along a cosine.
    crop : int, optional
        Train on random squares of this side, for "mse" only.
    seed : int
        Of initialisation, order, crops and noise.
    device : str
        Where to train without a model; a model's own device otherwise.

    Returns
    -------
    DnCNNDenoiser
        For this sigma; `joined` puts several together.

    Raises
    ------
    ValueError
        A parameter out of range, or "stability" without a model or with crops.
    """
    check_choice("objective", objective, get_args(Objective))
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma}: a denoiser is trained for a noise level > 0 in [0, 1] pixel units")
    if objective == "stability" and (model is None or crop is not None):
        raise ValueError("stability training compares a model's answers on whole images: give a model and no crop")
    generator = torch.Generator().manual_seed(seed)
    target = model.device if model is not None else resolve_device(device)
    if start is not None and sigma not in start.networks:
        raise ValueError(f"start has no network for sigma={sigma}, only for {', '.join(map(str, start.sigmas))}")
    if start is None:
        with torch.random.fork_rng(devices=[]):  # layers draw weights from the global stream when they are built
            network = DnCNN(depth=depth, width=width, unshuffle=unshuffle, skip=skip)
        _initialise(network, generator)
        nn.init.zeros_(network.dncnn[-1].weight)  # the start is the identity, as in the published networks
    else:
        network = copy.deepcopy(start.networks[sigma]).requires_grad_(True)
    texts = class_features
    if objective == "stability" and texts is None:
        texts = model.class_features(dataset.classes, dataset.templates[:1])

    def loss(clean: Tensor) -> Tensor:
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        denoised = network(clean + sigma * noise)
        if objective == "mse":
            return functional.mse_loss(denoised, clean)
        return stability_loss(model, texts, denoised, clean)

    fitted = _fit(
        network.to(target), loss, _clean_batches(model, dataset, batch_size, crop, generator), steps=steps,
        learning_rate=learning_rate, description=f"DnCNN {objective}, sigma {sigma:g}",
    )  # fmt: skip
    provenance = {
        "dataset": dataset.id, "split": dataset.split, "images": len(dataset), "model": model.id if model else None,
        "start": start.id if start else None, "steps": steps, "batch_size": batch_size,
        "learning_rate": learning_rate, "crop": crop, "seed": seed, **fitted,
    }  # fmt: skip
    if objective == "stability":
        provenance["model_weights"] = fingerprint(list(model.state_dict().values()))
    return DnCNNDenoiser({float(sigma): network.cpu()}, objective, {str(float(sigma)): provenance})


def stability_loss(model: DualEncoder, class_features: Tensor, denoised: Tensor, clean: Tensor) -> Tensor:
    """Cross-entropy between the model's class probabilities for clean and for denoised images.

    Salman et al. use the clean image's hard label; the probabilities of a vision-language model say more.

    Parameters
    ----------
    model : DualEncoder
    class_features : float32 [K, d]
        Unit norm.
    denoised, clean : float32 [b, 3, S, S]

    Returns
    -------
    float32, scalar, differentiable in `denoised`
    """
    with torch.no_grad():
        wanted = model.probabilities(model.encode_image(clean), class_features)
    logits = model.logit_scale * model.encode_image(denoised) @ class_features.to(model.device).float().T
    return functional.cross_entropy(logits, wanted)


def train_diffusion(
    dataset: ImageDataset,
    *,
    model: DualEncoder | None = None,
    max_sigma: float | None = None,
    width: int = 64,
    multipliers: tuple[int, ...] = (1, 2, 2),
    unshuffle: int = 1,
    spread: float | None = None,
    steps: int = 20_000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> DiffusionDenoiser:
    """Train the noise predictor of a DDPM: mean squared error of the noise at timesteps drawn uniformly.

    Parameters
    ----------
    dataset : ImageDataset
        Images to train on, never those that will be certified.
    model : DualEncoder, optional
        Only brings images to its geometry; None takes them as they are.
    max_sigma : float, optional
        Train the timesteps up to this noise level in [0, 1] pixel units only: enough to denoise, not to generate.
        None trains all.
    width, multipliers, unshuffle, spread
        Of `UNet`; with a spread each timestep's error counts in units of what the linear estimate leaves.
    steps, batch_size, learning_rate, seed, device
        As for `train_denoiser`.

    Returns
    -------
    DiffusionDenoiser

    Raises
    ------
    ValueError
        A parameter out of range.
    """
    sigmas = diffusion_sigmas()
    last = DIFFUSION_STEPS - 1 if max_sigma is None else math.ceil(matching_timestep(max_sigma))
    levels = torch.from_numpy(2 * sigmas[: last + 1]).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        network = UNet(width=width, multipliers=tuple(multipliers), unshuffle=unshuffle, spread=spread)
    _initialise(network, generator)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.weight)  # each block starts as its shortcut
    target = model.device if model is not None else resolve_device(device)

    def loss(clean: Tensor) -> Tensor:
        timesteps = torch.randint(last + 1, (len(clean),), generator=generator)
        level = levels[timesteps].to(clean.device)[:, None, None, None]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        scaled = (2 * clean - 1 + level * noise) / (1 + level.square()).sqrt()
        error = (network(scaled, timesteps.to(clean.device).float()) - noise).square()
        return (error if spread is None else error * (1 + (level / spread).square())).mean()

    fitted = _fit(
        network.to(target), loss, _clean_batches(model, dataset, batch_size, None, generator), steps=steps,
        learning_rate=learning_rate, description="diffusion",
    )  # fmt: skip
    provenance = {
        "dataset": dataset.id, "split": dataset.split, "images": len(dataset), "timesteps": last + 1, "steps": steps,
        "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed, **fitted,
    }  # fmt: skip
    return DiffusionDenoiser(network.cpu(), (float(sigmas[0]), float(sigmas[last])), provenance=provenance)


def save_denoiser(
    denoiser: DnCNNDenoiser | DiffusionDenoiser, path: Path | str, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a denoiser, of a diffusion its `UNet`, as one safetensors file; all but the weights is JSON in its header.

    `medrobust_lib.smoothing.denoisers.load_denoiser` reads it. With ``dtype=torch.float16`` the file is half as large
    and the weights are rounded; they compute in float32 again when loaded.

    Raises
    ------
    ValueError
        A diffusion with another network than a `UNet`.
    """
    header = {"format": FORMAT, "kind": "dncnn" if isinstance(denoiser, DnCNNDenoiser) else "diffusion"}
    if isinstance(denoiser, DnCNNDenoiser):
        networks = {f"{sigma}": network for sigma, network in denoiser.networks.items()}
        header |= {
            "objective": denoiser.objective,
            "architectures": {sigma: network.architecture for sigma, network in networks.items()},
        }
        tensors = {
            f"{sigma}/{name}": tensor
            for sigma, network in networks.items()
            for name, tensor in network.state_dict().items()
        }
    else:
        if not isinstance(denoiser.network, UNet):
            raise ValueError(
                f"only a UNet can be saved, not {type(denoiser.network).__name__}, which is not ours to rebuild"
            )
        header |= {
            "architecture": denoiser.network.architecture,
            "sigma_range": list(denoiser.sigma_range),
            "timestep": ASKED,
        }
        tensors = denoiser.network.state_dict()
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    write_tensors(Path(path), tensors, key=HEADER, header={**header, "provenance": denoiser.provenance})
    return Path(path)


def joined(*parts: DnCNNDenoiser) -> DnCNNDenoiser:
    """Put the networks of several noise levels together; a later one replaces an earlier one of its level.

    Raises
    ------
    ValueError
        Objectives differ.
    """
    if len({part.objective for part in parts}) > 1:
        raise ValueError(f"denoisers of different objectives: {', '.join(part.objective for part in parts)}")
    networks = {sigma: network for part in parts for sigma, network in part.networks.items()}
    provenance = {sigma: origin for part in parts for sigma, origin in part.provenance.items()}
    return DnCNNDenoiser(networks, parts[0].objective, provenance)


def level_at(timestep: float) -> float:
    """Noise level of a timestep in [0, 1] pixel units, between whole ones by its logarithm."""
    return math.exp(np.interp(timestep, np.arange(DIFFUSION_STEPS), np.log(diffusion_sigmas())))


def linear_share(dataset: ImageDataset, sigma: float) -> float:
    """Share of a noisy pixel that the best linear estimate of the clean one keeps: s^2 / (s^2 + sigma^2).

    s is `pixel_spread`, sigma the noise level in [0, 1] pixel units.
    """
    variance = pixel_spread(dataset) ** 2
    return variance / (variance + sigma**2)


def pixel_spread(dataset: ImageDataset) -> float:
    """Standard deviation of pixels around the mean colour, in [0, 1] units, from about 1,000 images."""
    some = dataset.images[:: max(1, len(dataset) // 1000)] / 255
    return float(np.sqrt(some.var(axis=(0, 1, 2)).mean()))


def psnr(pixels: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1]: float32 [b, 3, H, W] twice -> float32 [b]."""
    return -10 * (pixels - clean).square().flatten(1).mean(1).log10()


def _clean_batches(
    model: DualEncoder | None, dataset: ImageDataset, batch_size: int, crop: int | None, generator: torch.Generator
) -> Iterator[Tensor]:
    """Batches of clean pixels without end, epoch after epoch in a new order."""
    batch_size = min(batch_size, len(dataset))
    while True:
        order = torch.randperm(len(dataset), generator=generator)
        for rows in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
            images = dataset.images[rows.numpy()]
            pixels = (
                torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 if model is None else model.prepare(images)
            )
            yield pixels if crop is None else _cropped(pixels, crop, generator)


def _cropped(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    height, width = pixels.shape[2:]
    if not 1 <= side <= min(height, width):
        raise ValueError(f"crop={side}: the images are {width} x {height} pixels")
    top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in (height - side, width - side))
    return pixels[:, :, top : top + side, left : left + side]


def _fit(
    network: nn.Module,
    loss: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    *,
    steps: int,
    learning_rate: float,
    description: str,
) -> dict[str, float]:
    """Minimise a loss of clean batches with Adam; returns losses (first and last tenth) and time."""
    if steps < 1 or not learning_rate > 0:
        raise ValueError(f"steps={steps}, learning_rate={learning_rate}: take at least one step, with a rate > 0")
    device, started = next(network.parameters()).device, time.monotonic()
    network.train()
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    for _ in progress(range(steps), total=steps, description=description, unit="steps", resumes=False):
        optimiser.zero_grad()
        value = loss(next(batches).to(device))
        value.backward()
        optimiser.step()
        schedule.step()
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"training diverged in step {len(losses)}: lower learning_rate={learning_rate}")
    tenth = max(1, steps // 10)
    return {
        "first_loss": float(np.mean(losses[:tenth])),
        "last_loss": float(np.mean(losses[-tenth:])),
        "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
    }


def _initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights anew from a generator."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
