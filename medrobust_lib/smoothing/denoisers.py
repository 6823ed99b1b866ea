"""Denoisers in front of a frozen model: DnCNN and one-shot diffusion, their networks, files and noise levels.

Randomized smoothing certifies any function of the noisy image that was fixed before the image was seen. "Denoise, then
classify" is such a function: its noise is the nominal N(0, sigma^2) on the image itself, and neither denoiser draws
noise of its own, clips its input or looks at the clean image. So the guarantee is the standard one, however good or bad
the denoiser is; a bad one only costs radius. `data_scripts/train_denoisers.py` trains them at full size, and
`data_scripts/train_demo_denoisers.py` those of the demo.
"""

import copy
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from medrobust_lib.checks import check_choice
from medrobust_lib.files import check_sums, read_tensors
from medrobust_lib.models.weights import explained_errors, fingerprint
from medrobust_lib.places import default_weights_dir

DIFFUSION_STEPS, FIRST_BETA, LAST_BETA = 1000, 1e-4, 2e-2


class DnCNN(nn.Module):
    """Residual denoiser: predicts the noise and takes it off; with a last layer of zeros it returns its input.

    Its state dict has the keys of Salman et al.'s published networks, which load into ``DnCNN()``.

    Parameters
    ----------
    depth : int
        Convolutions, >= 2; 17 in the paper.
    width : int
        Channels of the hidden layers; 64 in the paper.
    unshuffle : int
        Side of the pixel blocks that become channels first, a divisor of the image's sides. 1 is the paper's
        network; 2 sees twice as far for a quarter of the work, as in FFDNet.
    skip : float
        Share of the input that the prediction is taken from. 1 is the paper's network; a small or briefly trained
        one, which cannot rebuild strong noise exactly, does better with `linear_share`.

    References
    ----------
    Zhang et al. 2017 (DnCNN), arXiv:1608.03981; Zhang et al. 2018 (FFDNet), arXiv:1710.04026.
    """

    def __init__(self, *, depth: int = 17, width: int = 64, unshuffle: int = 1, skip: float = 1.0) -> None:
        super().__init__()
        if depth < 2 or width < 1 or unshuffle < 1:
            raise ValueError(
                f"DnCNN needs depth >= 2, width >= 1 and unshuffle >= 1, got {depth}, {width}, {unshuffle}"
            )
        self.architecture = {"depth": depth, "width": width, "unshuffle": unshuffle, "skip": skip}
        channels = 3 * unshuffle**2
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width, eps=1e-4), nn.ReLU(inplace=True)]
        self.dncnn = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1, bias=False))
        self.side, self.skip = unshuffle, float(skip)

    def forward(self, noisy: Tensor) -> Tensor:
        """Denoise float32 [b, 3, H, W]."""
        residual = self.dncnn(functional.pixel_unshuffle(noisy, self.side))
        return self.skip * noisy - functional.pixel_shuffle(residual, self.side)


class UNet(nn.Module):
    """Compact noise predictor of a DDPM: residual blocks, one per level on the way down and up, no attention.

    Parameters
    ----------
    width : int
        Channels of the first level, a multiple of 8.
    multipliers : sequence of int
        Channels of each level in units of width; each level halves the resolution of the one before.
    unshuffle : int
        As for `DnCNN`. The image's sides are multiples of ``unshuffle * 2 ** (levels - 1)``.
    spread : float, optional
        Standard deviation of the clean pixels in [-1, 1]. With it the network corrects the best linear estimate
        of the noise, which a small or briefly trained one cannot rebuild; None is the plain noise predictor.

    References
    ----------
    Ho et al. 2020 (DDPM), arXiv:2006.11239; Karras et al. 2022, arXiv:2206.00364, Table 1 (the linear estimate).
    """

    def __init__(
        self,
        *,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        unshuffle: int = 1,
        spread: float | None = None,
    ) -> None:
        super().__init__()
        if width < 8 or width % 8 or not multipliers or unshuffle < 1:
            raise ValueError(
                f"UNet needs a width that is a multiple of 8, at least one level and unshuffle >= 1, "
                f"got {width}, {multipliers}, {unshuffle}"
            )
        self.architecture = {
            "width": width, "multipliers": list(multipliers), "unshuffle": unshuffle, "spread": spread,
        }  # fmt: skip
        self.width, self.unshuffle, self.spread = width, unshuffle, spread
        self.side = unshuffle * 2 ** (len(multipliers) - 1)
        widths = [width * multiplier for multiplier in multipliers]
        channels, embedding = 3 * unshuffle**2, 4 * width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        before = [width, *widths[:-1]]
        self.down = nn.ModuleList(ResidualBlock(*pair, embedding) for pair in zip(before, widths, strict=True))
        self.middle = ResidualBlock(widths[-1], widths[-1], embedding)
        self.up = nn.ModuleList(
            ResidualBlock(2 * inner, outer, embedding) for inner, outer in zip(widths[::-1], before[::-1], strict=True)
        )
        self.last = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, pixels: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the noise in scaled images, float32 [b, 3, H, W], at timesteps, float32 [b], whole or not."""
        time = self.time(_sinusoids(timesteps, self.width))
        hidden = self.first(functional.pixel_unshuffle(pixels, self.unshuffle))
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            hidden = block(functional.avg_pool2d(hidden, 2) if level else hidden, time)
            skips.append(hidden)
        hidden = self.middle(hidden, time)
        for block in self.up:
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), time)
            if skips:
                hidden = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
        predicted = functional.pixel_shuffle(self.last(hidden), self.unshuffle)
        if self.spread is None:
            return predicted
        level = _levels_at(timesteps)[:, None, None, None]
        total = level.square() + self.spread**2
        linear = level * (1 + level.square()).sqrt() * pixels / total
        return linear + self.spread / total.sqrt() * predicted


class ResidualBlock(nn.Module):
    """Two convolutions with the time embedding added between them, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedding, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        """Map float32 [b, inputs, h, w] and an embedding, float32 [b, e], to float32 [b, outputs, h, w]."""
        inner = self.conv1(functional.silu(self.norm1(hidden))) + self.time(time)[:, :, None, None]
        return self.shortcut(hidden) + self.conv2(functional.silu(self.norm2(inner)))


def _levels_at(timesteps: Tensor) -> Tensor:
    """Standard deviation of the noise in [-1, 1] pixels before scaling, at timesteps [b], whole or not."""
    places = timesteps.detach().cpu().double().numpy()
    logs = np.interp(places, np.arange(DIFFUSION_STEPS), np.log(2 * diffusion_sigmas()))
    return torch.from_numpy(np.exp(logs)).to(timesteps.device, torch.float32)


def _sinusoids(timesteps: Tensor, width: int) -> Tensor:
    """Transformer positions of timesteps: float32 [b, width], defined between whole timesteps, too."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=timesteps.device) / (width // 2))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def diffusion_sigmas() -> NDArray[np.float64]:
    """Noise level of each timestep in [0, 1] pixel units, increasing: sqrt((1 - abar) / abar) / 2.

    abar is the running product of 1 - beta with beta linear from 1e-4 to 2e-2 over 1,000 steps. The half comes
    from the diffusion's pixels, which run over [-1, 1].

    Returns
    -------
    float64 [1000]
    """
    kept = np.cumprod(1 - np.linspace(FIRST_BETA, LAST_BETA, DIFFUSION_STEPS))
    return np.sqrt((1 - kept) / kept) / 2


def matching_timestep(sigma: float) -> float:
    """Timestep at which a diffusion's images carry noise of sigma, between whole timesteps by log(sigma).

    Parameters
    ----------
    sigma : float
        In [0, 1] pixel units.

    Raises
    ------
    ValueError
        Less noise than at the first timestep, or more than at the last.

    References
    ----------
    Carlini et al. 2023, arXiv:2206.10550, section 3.
    """
    sigmas = diffusion_sigmas()
    if not sigmas[0] <= sigma <= sigmas[-1]:
        raise ValueError(f"sigma={sigma}: the diffusion's noise levels run from {sigmas[0]:.4f} to {sigmas[-1]:.1f}")
    return float(np.interp(math.log(sigma), np.log(sigmas), np.arange(DIFFUSION_STEPS)))


Objective = Literal["mse", "stability"]

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "models" / "demo" / "denoisers"
DEMO_FILES = {
    "mse": "dncnn-mse.safetensors",
    "stability": "dncnn-stability.safetensors",
    "diffusion": "diffusion.safetensors",
}

FORMAT = 1
HEADER = "denoiser"  # of a file: names the JSON beside the weights
ASKED = "interpolated"  # how files and ids say that a diffusion is asked at t* itself
_TOLERANCE = 1e-6  # relative, between a noise level asked for and one trained for


@dataclass(frozen=True, eq=False)
class DnCNNDenoiser:
    """Denoised smoothing: one frozen DnCNN per noise level, for the ``denoiser`` of a prompt method.

    Attributes
    ----------
    networks : mapping of float to DnCNN
        By the sigma that each was trained for; copied and frozen.
    objective : {"mse", "stability"}
        What they were trained to minimise.
    provenance : dict
        JSON values by the text of sigma.

    Raises
    ------
    ValueError
        No network, or an unknown objective.

    References
    ----------
    Salman et al. 2020 (denoised smoothing), arXiv:2003.01908.
    """

    networks: Mapping[float, DnCNN]
    objective: Objective
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, get_args(Objective))
        if not self.networks or not all(0 < sigma < math.inf for sigma in self.networks):
            raise ValueError(f"a denoiser needs networks by noise level > 0, got levels {list(self.networks)}")
        frozen = {float(sigma): _frozen(self.networks[sigma]) for sigma in sorted(self.networks)}
        object.__setattr__(self, "networks", frozen)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels that there is a network for."""
        return tuple(self.networks)

    @property
    def id(self) -> str:
        """Objective, noise levels and fingerprint of the networks."""
        return f"dncnn-{self.objective} sigma {', '.join(map(str, self.sigmas))} {_digest(*self.networks.values())}"

    def __call__(self, noisy: Tensor, sigma: float) -> Tensor:
        """Denoise pixels, float32 [b, 3, H, W], with noise of sigma.

        Raises
        ------
        ValueError
            No network for this sigma, or sides that its pixel blocks do not divide.
        """
        known = [level for level in self.networks if math.isclose(level, sigma, rel_tol=_TOLERANCE)]
        if not known:
            raise ValueError(
                f"no denoiser for sigma={sigma}: there is one each for {', '.join(map(str, self.sigmas))}; "
                "train it with data_scripts/train_denoisers.py --sigmas"
            )
        network = self.networks[known[0]].to(noisy.device)
        _check_sides(noisy, network.side)
        return network(noisy.float())


@dataclass(frozen=True, eq=False)
class DiffusionDenoiser:
    """Diffusion smoothing: the one-shot estimate of the clean image by a DDPM's noise predictor.

    Noisy pixels are mapped to [-1, 1], where their noise is 2 sigma, and scaled by sqrt(abar) = 1 / sqrt(1 +
    4 sigma^2), as at timestep t* with sqrt((1 - abar) / abar) = 2 sigma. The noise predicted there is taken off
    and the result clamped. Nothing is drawn: rounding t* up and adding noise to match would certify another
    sigma than the nominal one.

    Attributes
    ----------
    network : torch.nn.Module
        (pixels float32 [b, 3, H, W], timesteps float32 [b]) -> predicted noise; copied and frozen. `UNet`, or any
        other, wrapped to this call.
    sigma_range : (float, float)
        Lowest and highest noise level trained for, in [0, 1] pixel units.
    provenance : dict
        JSON values.

    References
    ----------
    Carlini et al. 2023, arXiv:2206.10550.
    """

    network: nn.Module
    sigma_range: tuple[float, float]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", _frozen(self.network))

    @property
    def id(self) -> str:
        """Fingerprint of the network, which is asked at t* itself, between whole timesteps."""
        return f"diffusion t* {ASKED} {_digest(self.network)}"

    def __call__(self, noisy: Tensor, sigma: float) -> Tensor:
        """Denoise pixels, float32 [b, 3, H, W], with noise of sigma; the result lies in [0, 1].

        Raises
        ------
        ValueError
            A sigma that the network was not trained for, or sides that its levels do not divide.
        """
        low, high = self.sigma_range
        if not low * (1 - _TOLERANCE) <= sigma <= high * (1 + _TOLERANCE):
            raise ValueError(f"sigma={sigma}: this diffusion was trained for noise levels from {low:.4g} to {high:.4g}")
        _check_sides(noisy, getattr(self.network, "side", 1))
        signed = 2 * noisy.float() - 1
        timesteps = torch.full((len(noisy),), matching_timestep(sigma), device=noisy.device)
        noise = self.network.to(noisy.device)(signed / math.sqrt(1 + 4 * sigma**2), timesteps)
        return ((signed - 2 * sigma * noise).clamp(-1, 1) + 1) / 2


def load_denoiser(path: Path | str) -> DnCNNDenoiser | DiffusionDenoiser:
    """Read what ``data_scripts/training/denoisers.py`` wrote (`save_denoiser`).

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        The file is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no denoiser at {path}; data_scripts/train_denoisers.py makes one")
    tensors, header = read_tensors(path, key=HEADER, kind="a readable file of a denoiser", advice="Copy it anew.")
    if header.get("format") != FORMAT or header.get("kind") not in ("dncnn", "diffusion"):
        found = f"a denoiser of kind {header['kind']!r}" if "kind" in header else "something else"
        raise ValueError(f"{path} holds {found}, not a denoiser of kind 'dncnn' or 'diffusion' and format {FORMAT}")
    with explained_errors(str(path)):
        if header["kind"] == "diffusion":
            check_choice("timestep", header["timestep"], [ASKED])
            network = _filled(UNet, header["architecture"], tensors)
            return DiffusionDenoiser(network, tuple(header["sigma_range"]), header["provenance"])
        networks = {}
        for sigma, architecture in header["architectures"].items():
            start = f"{sigma}/"
            weights = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            networks[float(sigma)] = _filled(DnCNN, architecture, weights)
        return DnCNNDenoiser(networks, header["objective"], header["provenance"])


def load_demo_denoisers(kind: str) -> DnCNNDenoiser | DiffusionDenoiser:
    """Load a denoiser shipped with the library: trained on synthetic phantoms, for the demo only.

    Parameters
    ----------
    kind : {"mse", "stability", "diffusion"}

    Raises
    ------
    ValueError
        Unknown kind.
    DownloadError
        The file is not the one that was shipped.
    """
    check_choice("demo denoiser", kind, DEMO_FILES)
    check_sums(DEMO_FOLDER, [DEMO_FILES[kind]])
    return load_denoiser(DEMO_FOLDER / DEMO_FILES[kind])


def denoiser_path(kind: str, dataset: str, *, weights_dir: Path | str | None = None) -> Path:
    """Where `data_scripts/train_denoisers.py` puts the denoiser of a kind ("mse", "stability", "diffusion").

    Of ``folder:PATH`` and ``csv:PATH`` the last part of the path counts, as in the id of the loaded set.
    """
    scheme, mark, path = dataset.partition(":")
    name = f"{scheme}-{Path(path).expanduser().resolve().name}" if mark else dataset
    folder = default_weights_dir() if weights_dir is None else Path(weights_dir)
    return folder / "denoisers" / (re.sub(r"[^\w.-]", "-", name) + f"-{kind}.safetensors")


def find_denoiser(kind: str, dataset: str, *, weights_dir: Path | str | None = None) -> Path:
    """File of the denoiser that a study's method takes on a data set, for `load_denoiser`.

    Phantoms always have those that are shipped with the library, whatever else was trained on them.

    Parameters
    ----------
    kind : {"denoised", "diffusion"}
        Name of the method; "denoised" takes the "stability" networks if they are there, otherwise "mse".
    dataset : str
        Id, as `load_dataset` takes it.
    weights_dir : Path, optional
        Instead of `default_weights_dir`.

    Raises
    ------
    ValueError
        Unknown kind.
    FileNotFoundError
        None was trained; the message has the command that trains one.
    DownloadError
        A shipped file is not the one that was shipped.
    """
    choices = {"denoised": ("stability", "mse"), "diffusion": ("diffusion",)}
    check_choice("kind of denoiser", kind, choices)
    if dataset.startswith("phantom/"):
        check_sums(DEMO_FOLDER, [DEMO_FILES[choices[kind][0]]])
        return DEMO_FOLDER / DEMO_FILES[choices[kind][0]]
    paths = [denoiser_path(name, dataset, weights_dir=weights_dir) for name in choices[kind]]
    for path in paths:
        if path.is_file():
            return path
    out = "" if weights_dir is None else f" --out {shlex.quote(str(paths[-1]))}"
    raise FileNotFoundError(
        f"no denoiser for {dataset}: looked for {' and '.join(map(str, paths))}. Train one with\n"
        f"    python data_scripts/train_denoisers.py {choices[kind][-1]} {shlex.quote(dataset)}{out}"
    )


def _frozen(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval().requires_grad_(False)


def _digest(*networks: nn.Module) -> str:
    """Fingerprint of weights and architectures: the same weights behind another skip are another denoiser."""
    architectures = json.dumps([getattr(network, "architecture", None) for network in networks])
    weights = [tensor for network in networks for tensor in network.state_dict().values()]
    return fingerprint([torch.tensor(list(architectures.encode()), dtype=torch.uint8), *weights])


def _check_sides(pixels: Tensor, side: int) -> None:
    height, width = pixels.shape[2:]
    if height % side or width % side:
        raise ValueError(f"images of {width} x {height} pixels: this denoiser takes sides that are multiples of {side}")


def _filled(kind: type[nn.Module], architecture: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # layers draw weights from the global stream when they are built
        network = kind(**architecture)
    network.load_state_dict(weights)
    return network
