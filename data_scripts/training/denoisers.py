"""Training of denoisers: DnCNN for one noise level, and the noise predictor of a DDPM for all."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from medrobust_lib.adaptation.training import load_state, save_state
from medrobust_lib.checks import check_choice, check_positive, check_whole
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
from training.images import DecodedImages

Images = ImageDataset | DecodedImages
Loss = Callable[[Tensor, torch.Generator], Tensor]  # of clean pixels [b, 3, H, W], on their device
Decay = Literal["cosine", "step"]


@dataclass(frozen=True)
class Recipe:
    """How a denoiser is trained, by Adam.

    Attributes
    ----------
    steps : int
    batch_size : int
        Images a step, at most all. What does not fill a step is left out of that epoch.
    learning_rate : float
    decay : {"cosine", "step"}
        The rate falls to 0 along a cosine, or to a tenth after each third of the steps, as after 30 of Salman et al.'s
        90 epochs.
    weight_decay : float
        Added to the gradient, in units of the weights.
    seed : int
        Of initialisation, order, crops and noise.

    Raises
    ------
    ValueError
        A number out of range, or an unknown decay.
    """

    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3
    decay: Decay = "cosine"
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least=least)
        check_positive("learning_rate", self.learning_rate)
        check_choice("decay", self.decay, get_args(Decay))

    def rate(self, step: int) -> float:
        """Learning rate of a step, 0 to ``steps - 1``."""
        if self.decay == "step":
            return self.learning_rate * 0.1 ** (3 * step // self.steps)
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2

    def rows(self, step: int, count: int) -> NDArray[np.int64]:
        """Which of `count` images a step takes, int64 [b]; the order is drawn anew for every epoch."""
        size = min(self.batch_size, count)
        epoch, place = divmod(step, count // size)
        return np.random.default_rng([self.seed, epoch]).permutation(count)[place * size : (place + 1) * size]


@dataclass(frozen=True)
class Keep:
    """Where a training keeps its state, so that it goes on there after it was killed, and after how many steps."""

    folder: Path
    every: int = 100


def train_denoiser(
    model: DualEncoder | None,
    dataset: Images,
    *,
    sigma: float,
    objective: Objective = "mse",
    start: DnCNNDenoiser | None = None,
    class_features: Tensor | None = None,
    recipe: Recipe = Recipe(),
    crop: int | None = None,
    device: str | torch.device = "auto",
    keep: Keep | None = None,
    **architecture: Any,
) -> DnCNNDenoiser:
    """Train a DnCNN for one noise level.

    "mse" minimises the mean squared error to the clean image. "stability" minimises the cross-entropy between
    the frozen model's class probabilities for the denoised image and those for the clean one; no label is used.

    Parameters
    ----------
    model : DualEncoder or None
        Frozen; brings images to its geometry. None, for "mse" only, takes them as they are.
    dataset : ImageDataset or DecodedImages
        Images to train on, never those that will be certified.
    sigma : float
        Noise level in [0, 1] pixel units, > 0.
    objective : {"mse", "stability"}
    start : DnCNNDenoiser, optional
        Go on from its network of this sigma, whose architecture is kept: an "mse" start makes stability training
        far shorter.
    class_features : float32 [K, d], optional
        Unit-norm text features of "stability"; default: the first template of the data set.
    recipe : Recipe
    crop : int, optional
        Train on random squares of this side, for "mse" only.
    device : str
        Where to train without a model; a model's own device otherwise.
    keep : Keep, optional
        A training that was killed goes on from its state and gives the same network on the same kind of device; how
        long it took is not recorded then.
    **architecture
        Of `DnCNN`; the defaults are the paper's network.

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
    if start is not None and sigma not in start.networks:
        raise ValueError(f"start has no network for sigma={sigma}, only for {', '.join(map(str, start.sigmas))}")
    if start is None:
        network = _initialised(DnCNN, architecture, recipe.seed)
        nn.init.zeros_(network.dncnn[-1].weight)  # the start is the identity, as in the published networks
    else:
        network = copy.deepcopy(start.networks[sigma]).requires_grad_(True)
    texts = class_features
    if objective == "stability" and texts is None:
        texts = model.class_features(dataset.classes, dataset.templates[:1])

    def loss(clean: Tensor, generator: torch.Generator) -> Tensor:
        denoised = network(clean + sigma * _noise(clean, generator))
        if objective == "mse":
            return functional.mse_loss(denoised, clean)
        return stability_loss(model, texts, denoised, clean)

    network = network.to(model.device if model is not None else resolve_device(device))
    fitted = _fit(
        network, loss, lambda rows, generator: _cropped(_pixels(model, dataset, rows), crop, generator),
        recipe=recipe, count=len(dataset), description=f"DnCNN {objective}, sigma {sigma:g}", keep=keep,
    )  # fmt: skip
    provenance = {
        **_origin(model, dataset, recipe), "model": model.id if model else None,
        "start": start.id if start else None, "crop": crop, **fitted,
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
    dataset: Images,
    *,
    max_sigma: float | None = None,
    recipe: Recipe = Recipe(),
    device: str | torch.device = "auto",
    keep: Keep | None = None,
    **architecture: Any,
) -> DiffusionDenoiser:
    """Train the noise predictor of a DDPM: mean squared error of the noise at timesteps drawn uniformly.

    Parameters
    ----------
    dataset : ImageDataset or DecodedImages
        Images to train on, as they are, never those that will be certified.
    max_sigma : float, optional
        Train the timesteps up to this noise level in [0, 1] pixel units only: enough to denoise, not to generate.
        None trains all.
    recipe, device, keep
        As for `train_denoiser`.
    **architecture
        Of `UNet`; with a spread each timestep's error counts in units of what the linear estimate leaves.

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
    network = _initialised(UNet, architecture, recipe.seed)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.weight)  # each block starts as its shortcut

    def loss(clean: Tensor, generator: torch.Generator) -> Tensor:
        timesteps = torch.randint(last + 1, (len(clean),), generator=generator, device=clean.device)
        level = levels.to(clean.device)[timesteps][:, None, None, None]
        noise = _noise(clean, generator)
        scaled = (2 * clean - 1 + level * noise) / (1 + level.square()).sqrt()
        error = (network(scaled, timesteps.float()) - noise).square()
        return (error if network.spread is None else error * (1 + (level / network.spread).square())).mean()

    fitted = _fit(
        network.to(resolve_device(device)), loss, lambda rows, generator: _pixels(None, dataset, rows),
        recipe=recipe, count=len(dataset), description="diffusion", keep=keep,
    )  # fmt: skip
    provenance = {**_origin(None, dataset, recipe), "timesteps": last + 1, **fitted}
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


def _origin(model: DualEncoder | None, dataset: Images, recipe: Recipe) -> dict[str, Any]:
    """JSON values that every denoiser states."""
    height, width = dataset.images.shape[1:3] if model is None else (model.image_size,) * 2
    return {
        "dataset": dataset.id, "split": dataset.split, "images": len(dataset), "pixels": f"{width} x {height}",
        **asdict(recipe),
    }  # fmt: skip


def _pixels(model: DualEncoder | None, dataset: Images, rows: NDArray[np.int64]) -> Tensor:
    """Clean images in [0, 1], float32 [b, 3, H, W]."""
    images = dataset.images[rows]
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 if model is None else model.prepare(images)


def _cropped(pixels: Tensor, side: int | None, generator: torch.Generator) -> Tensor:
    if side is None:
        return pixels
    height, width = pixels.shape[2:]
    if not 1 <= side <= min(height, width):
        raise ValueError(f"crop={side}: the images are {width} x {height} pixels")
    draw = {"generator": generator, "device": generator.device}
    top, left = (int(torch.randint(room + 1, (), **draw)) for room in (height - side, width - side))
    return pixels[:, :, top : top + side, left : left + side]


def _noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(pixels.shape, generator=generator, device=pixels.device)


def _fit(
    network: nn.Module,
    loss: Loss,
    batch: Callable[[NDArray[np.int64], torch.Generator], Tensor],
    *,
    recipe: Recipe,
    count: int,
    description: str,
    keep: Keep | None,
) -> dict[str, float]:
    """Minimise a loss of clean batches of `count` images; returns losses (first and last tenth), time and threads."""
    device, started = next(network.parameters()).device, time.monotonic()
    network.train()
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    optimiser = torch.optim.Adam(parameters.values(), weight_decay=recipe.weight_decay)
    record: dict[str, Any] = {"step": 0, "first_loss": 0.0, "last_loss": 0.0}  # the losses are sums until the end
    resumed = None if keep is None else load_state(keep.folder, parameters, optimiser, beside=buffers)
    if resumed is not None:
        kept, record = resumed
        for name, buffer in buffers.items():
            buffer.copy_(kept[name])
    done, total, tenth = record["step"], recipe.steps, max(1, recipe.steps // 10)
    steps = progress(
        range(done, total), total=total, done=done, description=description, unit="steps", resumes=keep is not None
    )
    for step in steps:
        # Keyed by the step: a resumed run draws what an uninterrupted one does.
        key = int(np.random.default_rng([recipe.seed, 0, step]).integers(2**63))
        generator = torch.Generator(device).manual_seed(key)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        optimiser.zero_grad()
        value = loss(batch(recipe.rows(step, count), generator).to(device), generator)
        value.backward()
        optimiser.step()
        found = value.item()
        if not math.isfinite(found):
            raise ValueError(f"training diverged in step {step + 1}: lower learning_rate={recipe.learning_rate}")
        record["step"] = step + 1
        record["first_loss"] += found * (step < tenth)
        record["last_loss"] += found * (step >= total - tenth)
        if keep is not None and record["step"] % keep.every == 0:
            save_state(keep.folder, parameters, optimiser, buffers, record)
    means = {name: record[name] / tenth for name in ("first_loss", "last_loss")}
    # How long it took would tell an interrupted run from another one.
    seconds = {"seconds": round(time.monotonic() - started, 1)} if keep is None else {}
    return {**means, **seconds, "threads": torch.get_num_threads()}


def _initialised(kind: type[nn.Module], architecture: dict[str, Any], seed: int) -> nn.Module:
    """A new network with weights drawn from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers draw weights from the global stream when they are built
        network = kind(**architecture)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
