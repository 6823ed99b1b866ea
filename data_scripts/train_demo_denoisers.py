"""Train the demo denoisers on site-B phantoms, judge them on the val split, and write weights, hashes and card.

Everything is synthetic: the train split of phantom/histology and nothing else. The "mse" and "diffusion"
denoisers know no model; "stability" goes on from "mse" with demo-clip as its frozen judge, so run
`--only stability` after exchanging demo-clip's weights. Not for clinical use.
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

import medrobust_lib as mr
from medrobust_lib import metrics
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.experiments import write_text_atomically
from medrobust_lib.files import reported_errors
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.smoothing.denoisers import (
    DEMO_FILES,
    DEMO_FOLDER,
    DiffusionDenoiser,
    DnCNNDenoiser,
    load_denoiser,
    matching_timestep,
)
from medrobust_lib.smoothing.noise import NoiseStream
from preparing.downloads import record_sums
from training.denoisers import (
    Recipe,
    joined,
    level_at,
    linear_share,
    pixel_spread,
    psnr,
    save_denoiser,
    train_denoiser,
    train_diffusion,
)

DATASET = "phantom/histology"
SIGMAS = (0.1, 0.25, 0.5, 1.0)
DNCNN = {"depth": 6, "width": 32, "unshuffle": 2}
UNET = {"width": 24, "multipliers": (1, 2, 2), "unshuffle": 2}
STEPS = {"mse": 1500, "stability": 300, "diffusion": 1000}
CARD = """# Demo denoisers

Three denoisers that stand in front of a frozen model at smoothing time. **They have seen synthetic phantoms only.
Not for clinical use.** Trained on the train split of `{dataset}` (site B, {images} images of 64 x 64 px; no val or
test image, no label); every number below is from its val split.

| file | what | parameters | training | minutes | CPU threads |
| --- | --- | --- | --- | --- | --- |
{files}

The two DnCNN files hold one network per sigma ({architecture}; `skip` is the linear
estimate's share of the noisy pixel, see `linear_share`). "stability" goes on from "mse"
with {model} as its frozen judge and has to be trained again when that model's weights change. The DDPM is asked at
the interpolated timestep, whose noise level is the nominal sigma exactly:

| sigma | timestep t* | noise level at t* |
| --- | --- | --- |
{timesteps}

None draws noise of its own, so a denoiser with a classifier behind it is an ordinary base classifier and its
certificate is for the nominal sigma.

## On {n} val images, one noisy copy each

PSNR in dB, mean over images. Accuracy: {model}, zero-shot, first template, with its 95 % Clopper-Pearson interval;
{clean:.3f} on clean images; chance {chance:.3f}.

{table}

"stability" asks for the model's answer and not for the image: its pictures can be further from the clean ones than
the noisy ones are, while the answers are closer.

Weights are stored in float16 and used in float32. Every file's SHA-256 stands in `SHA256SUMS` and is checked when it is
loaded. Written by
`data_scripts/train_demo_denoisers.py`.
"""


def main(
    only: Annotated[list[str] | None, typer.Option(help="mse, stability or diffusion; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = DEMO_FOLDER,
    model: Annotated[str, typer.Option(help="Model of the stability objective and of the accuracies.")] = "demo-clip",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each training instead of the recipe's.")] = None,
    images: Annotated[int | None, typer.Option(min=18, help="Images of the train and val split to use.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    train: Annotated[bool, typer.Option(help="--no-train only judges what is there and writes the card.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and noise.")] = 0,
) -> None:
    """Train the chosen denoisers, then judge all that are there on val and write card and hashes."""
    wanted = list(DEMO_FILES) if only is None else [kind for kind in DEMO_FILES if kind in only]
    if only is not None and (unknown := set(only) - set(DEMO_FILES)):
        raise typer.BadParameter(f"--only takes {', '.join(DEMO_FILES)}, not {', '.join(sorted(unknown))}")
    torch.set_num_threads(threads)
    encoder = mr.load_model(model, device="cpu", dtype="float32")
    if train:
        data = mr.load_dataset(DATASET, split="train", n=images)
        for kind in wanted:
            count = STEPS[kind] if steps is None else steps
            trained = train_kind(kind, encoder, data, out=out, steps=count, seed=seed)
            save_denoiser(trained, out / DEMO_FILES[kind], dtype=torch.float16)
    present = [kind for kind, name in DEMO_FILES.items() if (out / name).is_file()]
    record_sums(out, [DEMO_FILES[kind] for kind in present])
    card = write_card({kind: load_denoiser(out / DEMO_FILES[kind]) for kind in present}, encoder, images=images)
    write_text_atomically(out / "MODEL_CARD.md", card)
    typer.echo(card)


def train_kind(
    kind: str, model: DualEncoder, data: ImageDataset, *, out: Path, steps: int, seed: int
) -> DnCNNDenoiser | DiffusionDenoiser:
    """Train one kind for all noise levels."""
    recipe = Recipe(steps=steps, batch_size=16, learning_rate=1e-3 if kind == "stability" else 2e-3, seed=seed)
    if kind == "diffusion":
        spread = round(2 * pixel_spread(data), 4)  # a diffusion's pixels run over [-1, 1]
        return train_diffusion(data, max_sigma=max(SIGMAS), recipe=recipe, device="cpu", spread=spread, **UNET)
    if kind == "mse":
        parts = [
            train_denoiser(
                None, data, sigma=sigma, recipe=recipe, crop=32, device="cpu",
                skip=round(linear_share(data, sigma), 4), **DNCNN,
            )
            for sigma in SIGMAS
        ]  # fmt: skip
    else:
        start = load_denoiser(out / DEMO_FILES["mse"])
        parts = [
            train_denoiser(model, data, sigma=sigma, objective="stability", start=start, recipe=recipe)
            for sigma in SIGMAS
        ]
    return joined(*parts)


@torch.inference_mode()
def judge(
    denoisers: dict[str, DnCNNDenoiser | DiffusionDenoiser], model: DualEncoder, data: ImageDataset
) -> tuple[pd.DataFrame, float]:
    """One row per noise level and denoiser, "none" first, and the accuracy on clean images."""
    clean = model.prepare(data.images)
    texts = model.class_features(data.classes, data.templates[:1])

    def accuracy(pixels: torch.Tensor) -> tuple[float, str]:
        features = torch.cat([model.encode_image(part) for part in pixels.split(64)])
        answers = model.probabilities(features, texts).argmax(1).numpy()
        low, high = metrics.accuracy_interval(int((answers == data.labels).sum()), len(data))
        return metrics.accuracy(data.labels, answers), f"{low:.3f} to {high:.3f}"

    rows = []
    for sigma in SIGMAS:
        streams = [NoiseStream(0, data.id, int(index), sigma, "adapt") for index in data.indices]
        noisy = clean + torch.cat([stream.draw(tuple(clean.shape[1:])) for stream in streams])
        for name, denoise in [("none", None), *denoisers.items()]:
            pixels = noisy if denoise is None else torch.cat([denoise(part, sigma) for part in noisy.split(64)])
            share, interval = accuracy(pixels)
            rows.append({
                "sigma": sigma, "denoiser": name, "PSNR": float(psnr(pixels, clean).mean()), "accuracy": share,
                "interval": interval,
            })  # fmt: skip
    return pd.DataFrame(rows), accuracy(clean)[0]


def write_card(
    denoisers: dict[str, DnCNNDenoiser | DiffusionDenoiser], model: DualEncoder, *, images: int | None
) -> str:
    """Text of the model card."""
    data = mr.load_dataset(DATASET, split="val", n=images)
    table, clean = judge(denoisers, model, data)
    files = []
    for kind, denoiser in denoisers.items():
        runs = [denoiser.provenance] if kind == "diffusion" else list(denoiser.provenance.values())
        networks = [denoiser.network] if kind == "diffusion" else list(denoiser.networks.values())
        parameters = sum(p.numel() for network in networks for p in network.parameters())
        training = f"{runs[0]['steps']} steps of {runs[0]['batch_size']} images" + (" per sigma" if runs[1:] else "")
        minutes = sum(run["seconds"] for run in runs) / 60
        files.append([
            f"`{DEMO_FILES[kind]}`", "DDPM, one-shot" if kind == "diffusion" else f"DnCNN, {kind}", f"{parameters:,}",
            training, f"{minutes:.1f}", str(runs[0]["threads"]),
        ])  # fmt: skip
    first = next(iter(denoisers.values()))
    origin = first.provenance if isinstance(first, DiffusionDenoiser) else next(iter(first.provenance.values()))
    exact = [
        [f"{sigma:g}", f"{matching_timestep(sigma):.2f}", f"{level_at(matching_timestep(sigma)):.4f}"]
        for denoiser in denoisers.values() if isinstance(denoiser, DiffusionDenoiser) for sigma in SIGMAS
    ]  # fmt: skip
    shown = table.assign(
        sigma=table["sigma"].map("{:g}".format),
        PSNR=table["PSNR"].map("{:z.1f}".format),
        accuracy=table["accuracy"].map("{:.3f}".format),
    )
    return CARD.format(
        dataset=DATASET, images=origin["images"], n=len(data), model=model.id,
        clean=clean, chance=1 / len(data.classes), files=table_rows(files), timesteps=table_rows(exact),
        architecture=", ".join(f"{name} {value}" for name, value in DNCNN.items()),
        table=table_rows([list(shown.columns), ["---"] * shown.shape[1], *shown.to_numpy().tolist()]),
    )  # fmt: skip


def table_rows(rows: list[list[str]]) -> str:
    """Lines of a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    with reported_errors():
        typer.run(main)
