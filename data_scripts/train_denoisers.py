"""Train the denoisers of denoised and of diffusion smoothing on the train split of any data set.

KIND is "mse" or "stability" (Salman et al. 2020, arXiv:2003.01908: a DnCNN for each sigma) or "diffusion" (Carlini et
al. 2023, arXiv:2206.10550: one DDPM for all, asked once). "stability" has a frozen judge, `--model`, and may go on from
an "mse" file, `--start`. No label is used, and no image of another split is seen.

Defaults of a DnCNN are the paper's: 17 layers of 64 channels, 90 epochs, Adam with a rate of 1e-3 that falls to a tenth
after each third, weight decay 1e-4; steps of 32 images are ours. The published diffusions are too large to be trained
for one data set. This one has the multipliers of DDPM at 256 px with half its width, and its smaller rate (Ho et al.
2020, arXiv:2006.11239), and learns the noise levels up to the largest sigma only.

A training that was stopped goes on when it is started again. `--dry-run` says what it costs. Not for clinical use.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

import medrobust_lib as mr
from medrobust_lib.checks import check_choice, check_whole
from medrobust_lib.data.registry import OpenSplit, open_split
from medrobust_lib.experiments import open_store
from medrobust_lib.experiments.report import duration
from medrobust_lib.files import disk_full, parsed, reported_errors, size_text
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.loading import resolve_device
from medrobust_lib.smoothing.bounds import check_sigma
from medrobust_lib.smoothing.denoisers import (
    DEMO_FILES,
    DiffusionDenoiser,
    DnCNNDenoiser,
    UNet,
    denoiser_path,
    load_denoiser,
)
from training.denoisers import Images, Keep, Recipe, joined, save_denoiser, train_denoiser, train_diffusion
from training.images import decoded

IMAGE_SIZE, EPOCHS, DIFFUSION_STEPS = 224, 90, 100_000
DEPTH, WIDTH = 17, 64
MULTIPLIERS = [1, 1, 2, 2, 4, 4]
PROBED, PROBE_STEPS = 2, 2  # images a step, and steps, of the probe on a CPU, where they cost the same each


@dataclass(frozen=True)
class Plan:
    """Everything that the denoiser depends on."""

    kind: str
    split: OpenSplit
    positions: NDArray[np.int64]
    image_size: int
    sigmas: tuple[float, ...]
    model: DualEncoder | None
    start: DnCNNDenoiser | None
    recipe: Recipe
    architecture: dict[str, Any]
    device: torch.device

    @property
    def networks(self) -> dict[str, float]:
        """Noise level of each network that is trained, by a name."""
        if self.kind == "diffusion":
            return {"diffusion": max(self.sigmas)}
        return {f"sigma-{sigma}": sigma for sigma in self.sigmas}

    def settings(self) -> dict[str, Any]:
        """JSON values; another run in the same place is refused where they differ."""
        return {
            "kind": self.kind, "dataset": self.split.row.id, "split_size": len(self.split.labels),
            "images": len(self.positions), "image_size": self.image_size, "sigmas": list(self.sigmas),
            "model": self.model.identity() if self.model else None, "start": self.start.id if self.start else None,
            "texts": [self.split.words.templates[0], *self.split.classes] if self.model else None,
            "architecture": self.architecture, **asdict(self.recipe),
        }  # fmt: skip

    def train(
        self, data: Images, sigma: float, *, recipe: Recipe | None = None, keep: Keep | None = None
    ) -> DnCNNDenoiser | DiffusionDenoiser:
        """Train the network of one noise level, or the diffusion up to it."""
        how = {"recipe": recipe or self.recipe, "device": self.device, "keep": keep, **self.architecture}
        if self.kind == "diffusion":
            return train_diffusion(data, max_sigma=sigma, **how)
        return train_denoiser(self.model, data, sigma=sigma, objective=self.kind, start=self.start, **how)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    kind: Annotated[str, typer.Argument(help="mse, stability or diffusion.")],
    dataset: Annotated[str, typer.Argument(help="Data set id, or folder:PATH or csv:PATH with a train split.")],
    sigmas: Annotated[str, typer.Option(help="Noise levels; the diffusion is trained up to the largest.")] = (
        "0.1,0.25,0.5,1"
    ),
    out: Annotated[Path | None, typer.Option(help="File; by default below the folder of weights.")] = None,
    model: Annotated[str | None, typer.Option(help="Frozen judge of stability.")] = None,
    start: Annotated[Path | None, typer.Option(help="mse file that stability goes on from.")] = None,
    n_images: Annotated[
        int | None, typer.Option(min=1, help="Images of the train split, drawn at random; default all.")
    ] = (None),
    image_size: Annotated[int | None, typer.Option(min=8, help="Side in pixels; the judge's, or 224.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="90 for DnCNN.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of epochs; 100,000 for the diffusion.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="1e-3 for DnCNN, 2e-4 for the diffusion.")] = None,
    depth: Annotated[int | None, typer.Option(min=2, help="Layers of a DnCNN; 17.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of a DnCNN or a U-Net's first level; 64.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two saved states.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu, or another of torch's.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of images, weights, order and noise.")] = 0,
    root: Annotated[Path | None, typer.Option(help="Folder of the data sets; default MEDROBUST_DATA.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it costs on this machine.")] = False,
) -> None:
    """Train, or go on where an earlier call was stopped."""
    check_choice("kind", kind, DEMO_FILES)
    with parsed(f"--sigmas {sigmas}", "Give noise levels with commas between them, such as 0.25,0.5."):
        levels = tuple(sorted({float(sigma) for sigma in sigmas.split(",")}))
    for sigma in levels:
        check_sigma(sigma)
    place, judge, begin = resolve_device(device), None, None
    if (kind == "stability") != (model is not None) or (start is not None and kind != "stability"):
        raise ValueError(
            "stability needs its frozen judge, --model, and may have a --start; mse and diffusion have none"
        )
    if model is not None:
        judge = mr.load_model(model, device=place, dtype="float32")
    if start is not None:
        begin = load_denoiser(start)
        if not isinstance(begin, DnCNNDenoiser) or not {*levels} <= {*begin.sigmas}:
            raise ValueError(f"--start {start} holds {begin.id}, not a DnCNN for each sigma of {sigmas}")
    side = image_size or (judge.image_size if judge else IMAGE_SIZE)
    if judge and side != judge.image_size:
        raise ValueError(f"--image-size {side}: {judge.id} reads {judge.image_size} pixels; leave --image-size out")
    stated = {name: value for name, value in {"depth": depth, "width": width}.items() if value is not None}
    if (stated and begin) or (depth and kind == "diffusion"):
        raise ValueError(f"{', '.join(stated)}: a --start keeps its networks' own, and a diffusion has no --depth")
    if kind == "diffusion":
        architecture = {"width": width or WIDTH, "multipliers": MULTIPLIERS}
        with torch.device("meta"):
            blocks = UNet(**architecture).side
        if side % blocks:
            raise ValueError(f"--image-size {side}: the diffusion's network takes sides that are multiples of {blocks}")
    else:
        architecture = {} if begin else {"depth": depth or DEPTH, "width": width or WIDTH}
    found = open_split(dataset, split="train", image_size=side, root=root)
    count = check_whole("--n-images", n_images or len(found.labels), most=len(found.labels))
    if epochs and steps:
        raise ValueError(f"--epochs {epochs} and --steps {steps}: give one of them")
    if kind == "diffusion" and not epochs:
        steps = steps or DIFFUSION_STEPS
    recipe = Recipe(
        steps=steps or (epochs or EPOCHS) * (count // min(batch_size, count)), batch_size=batch_size, seed=seed,
        **({"learning_rate": learning_rate or 2e-4} if kind == "diffusion" else
           {"learning_rate": learning_rate or 1e-3, "decay": "step", "weight_decay": 1e-4}),
    )  # fmt: skip
    positions = np.sort(np.random.default_rng(seed).permutation(len(found.labels))[:count])
    plan = Plan(kind, found, positions, side, levels, judge, begin, recipe, architecture, place)
    path = out or denoiser_path(kind, dataset)
    if path.suffix != ".safetensors":
        raise ValueError(f"--out {path}: give a file name that ends in .safetensors")
    if dry_run:
        typer.echo("\n".join(price(plan, path, save_every)))
    else:
        carry_out(plan, path, save_every)


def carry_out(plan: Plan, path: Path, save_every: int) -> None:
    """Train what is missing of a plan and write the file; the folder beside it then only says what it was made with."""
    folder = path.with_suffix(".training")
    if path.exists() and not folder.exists():
        raise ValueError(f"{path} is there, and nothing tells with which settings; give another --out or delete it")
    images = folder / "images.npy"
    needed = 0 if images.exists() or path.exists() else image_bytes(plan)
    if shutil.disk_usage(next(place for place in path.absolute().parents if place.is_dir())).free < needed:
        raise disk_full(path, f"{size_text(needed)} are needed for the decoded images")
    with open_store(folder, parameters=plan.settings()):
        if not path.is_file():
            data = decoded(plan.split, plan.positions, image_size=plan.image_size, path=images)
            parts = []
            for name, sigma in plan.networks.items():
                part = folder / f"{name}.safetensors"
                if not part.is_file():
                    save_denoiser(plan.train(data, sigma, keep=Keep(folder / name, save_every)), part)
                parts.append(load_denoiser(part))
            save_denoiser(parts[0] if plan.kind == "diffusion" else joined(*parts), path)
        for name in plan.networks:
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / f"{name}.safetensors").unlink(missing_ok=True)
        images.unlink(missing_ok=True)
    typer.echo(f"{path}  ready: {load_denoiser(path).id}")


def image_bytes(plan: Plan) -> int:
    """Size of the decoded images."""
    return len(plan.positions) * plan.image_size**2 * 3


def price(plan: Plan, path: Path, save_every: int) -> Iterator[str]:
    """Lines of what a plan costs, from a few steps on a few images here; writes nothing."""
    size = min(plan.recipe.batch_size, len(plan.positions))
    probed = min(size, PROBED) if plan.device.type == "cpu" else size
    started = time.monotonic()
    data = plan.split.read(plan.positions[:probed])
    decoding = (time.monotonic() - started) / probed * len(plan.positions)
    kept: dict[int, int] = {}  # bytes that a step keeps for its gradient, by address

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    sigma = next(iter(plan.networks.values()))
    recipe = replace(plan.recipe, batch_size=probed, steps=1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        trained = plan.train(data, sigma, recipe=recipe)
    shorter, longer = (seconds_of(plan, data, sigma, replace(recipe, steps=steps)) for steps in (1, 1 + PROBE_STEPS))
    step = (longer - shorter) / PROBE_STEPS * size / probed
    network = trained.network if plan.kind == "diffusion" else trained.networks[sigma]
    weights = 4 * sum(value.numel() for value in network.state_dict().values())
    total = plan.recipe.steps * len(plan.networks)
    yield (
        f"{plan.kind} denoiser of {plan.split.row.id}, {len(plan.positions):,} images of {plan.image_size} px: "
        f"{total:,} steps of {size} images ({', '.join(plan.networks)}) on {plan.device}"
    )
    yield f"time    about {duration(decoding + total * step)}: {step:.3g} s a step, and {duration(decoding)} to decode"
    yield (
        f"disk    {size_text(image_bytes(plan) + (6 + len(plan.networks)) * weights)} while it trains, then "
        f"{size_text(len(plan.networks) * weights)}: {path}"
    )
    yield f"memory  about {size_text(sum(kept.values()) * size / probed + 4 * weights)} on {plan.device} for a step"
    yield f"stop    loses at most {save_every} steps, {duration(save_every * step)}"


def seconds_of(plan: Plan, data: Images, sigma: float, recipe: Recipe) -> float:
    """Seconds that a short training takes."""
    started = time.monotonic()
    plan.train(data, sigma, recipe=recipe)
    return time.monotonic() - started


if __name__ == "__main__":
    with reported_errors():
        app()
