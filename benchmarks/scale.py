"""How far one machine goes: draws a second, and what the papers' whole protocols take at that rate.

    python benchmarks/scale.py                    # about three minutes on two cores
    python benchmarks/scale.py --seconds 20       # longer probes, on a busy machine

A draw is one noisy (or corrupted) image through the image tower, noise and votes included. On a CPU the rate is that of
one thread, in seconds of the CPU, so that other work on the machine counts little. The rate of a ViT-B/16 is
that of random weights: a network's speed does not depend on what it has learned. Of the protocols of the papers only
the numbers of images, noise levels and draws are used, nothing that a model said.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import medrobust_lib as mr  # first: it lets torchvision import beside a CPU-only torch

# isort: split
import numpy as np
import pandas as pd
import torch
import typer

from medrobust_lib.experiments import write_text_atomically
from medrobust_lib.experiments.report import duration
from medrobust_lib.models.loading import resolve_device, resolve_dtype
from medrobust_lib.smoothing.bounds import probability_of_radius
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies
from medrobust_lib.smoothing.sequential import operating_characteristics, sequential_plan
from medrobust_lib.studies.cells import measured_rate

DAY = 86_400
ALPHA, N0 = 0.001, 100
SIGMAS = (0.1, 0.25, 0.5, 1.0)
RADII = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # of PromptSmooth's tables
# Test images of the five sets of MediMeta-C and of the five of MedMNIST-C (their data sets' own sizes).
MEDIMETA = {"pbc": 3149, "mammo": 326, "pneumonia": 624, "fundus": 640, "oct": 1000}
MEDMNIST = {"blood": 3421, "breast": 156, "pneumonia": 624, "retina": 400, "oct": 1000}
CORRUPTED = 1 + 7 * 5  # the clean image, and seven corruptions at five severities
QUESTIONS = 1680  # text and image pairs of MM-SafetyBench's thirteen scenarios

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Protocol:
    """A paper's protocol, as a number of draws of one model.

    Attributes
    ----------
    name : str
    images : int
    draws : float
        Of one image, over all its noise levels.
    sequential : float or None
        The same with sequential sampling, where the library can price it.
    """

    name: str
    images: int
    draws: float
    sequential: float | None = None


def random_vit_b16(device: torch.device) -> Any:
    """A ViT-B/16 CLIP with random weights, built from open_clip's own configuration."""
    import open_clip

    from medrobust_lib.models.open_clip import OpenClipEncoder

    network = open_clip.create_model("ViT-B-16", pretrained=None)
    model = OpenClipEncoder(network, open_clip.get_tokenizer("ViT-B-16"), id="random-vit-b16", provenance={})
    return model.requires_grad_(False).eval().to(device=device, dtype=resolve_dtype("auto", device))


def vote_shares(model: Any, data: Any, *, sigma: float, copies: int) -> np.ndarray:
    """Share of the most frequent answer among noisy copies of each image, float64 [images]."""
    features = model.class_features(data.classes, data.templates[:1])
    shares = []
    with torch.inference_mode():
        for position, pixels in enumerate(model.prepare(data.images)):
            stream = NoiseStream(0, data.id, int(data.indices[position]), sigma, "estimate")
            encoded = model.encode_image(noisy_copies(pixels.to(model.device), stream, count=copies))
            labels = model.probabilities(encoded, features).argmax(1).cpu().numpy()
            shares.append(np.bincount(labels).max() / copies)
    return np.array(shares)


def expected_draws(shares: dict[float, np.ndarray], *, n: int) -> tuple[float, float]:
    """Mean draws of an image over the noise levels in sequential sampling, and points lost at the worst radius."""
    total, lost = 0.0, 0.0
    for sigma, values in shares.items():
        plan = sequential_plan(sigma=sigma, radii=RADII, n=n, alpha=ALPHA)
        known = {p: operating_characteristics(plan, p) for p in np.unique(values)}
        exact = [known[p] for p in values]
        total += N0 + float(np.mean([draws for _, draws in exact]))
        fixed = [np.mean(probability_of_radius(values, n, ALPHA, radius=r, sigma=sigma)) for r in plan.radii]
        lost = max(lost, 100 * float(np.max(np.array(fixed) - np.mean([proved for proved, _ in exact], axis=0))))
    return total, lost


def protocols(sequential: float) -> list[Protocol]:
    """The papers' protocols; `sequential` draws an image take the place of 4 x 10,100."""
    fixed = len(SIGMAS) * (N0 + 10_000)
    every = sum(MEDIMETA.values()) + sum(MEDMNIST.values())
    return [
        Protocol("one image, one noise level", 1, N0 + 10_000, sequential / len(SIGMAS)),
        Protocol("PromptSmooth: one data set", 500, fixed, sequential),
        Protocol("PromptSmooth: six data sets", 3000, fixed, sequential),
        Protocol("the same, each of five methods alone", 3000, 5 * fixed),
        Protocol("MediMeta-C: five data sets", sum(MEDIMETA.values()), CORRUPTED),
        Protocol("MediMeta-C and MedMNIST-C", every, CORRUPTED),
    ]


@app.command()
def main(
    seconds: Annotated[float, typer.Option(help="Length of each probe.")] = 8.0,
    images: Annotated[int, typer.Option(help="Images whose vote shares price sequential sampling.")] = 48,
    copies: Annotated[int, typer.Option(help="Noisy copies of each of them.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu or the name of an accelerator.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write the text here.")] = None,
) -> None:
    """Measure and print."""
    target = resolve_device(device)
    on_cpu = target.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    clock = time.process_time if on_cpu else time.perf_counter
    data = mr.load_dataset("phantom/blood", n=images)
    demo = mr.load_model("demo-clip", device=target)
    models = {"demo-clip, 64 px": demo, "ViT-B/16, 224 px, random weights": random_vit_b16(target)}
    rates = {name: measured_rate(model, data, seconds=seconds, clock=clock) for name, model in models.items()}
    slowest = min(rates, key=rates.get)
    one = f"one thread of {os.cpu_count()} cores" if on_cpu else torch.get_device_module(target).get_device_name(target)
    lines = [
        f"device {target.type}: {one}",
        "",
        pd.DataFrame(
            {"model": name, "dtype": str(models[name].dtype)[6:], "draws/s": rate, "ratio": rate / rates[slowest]}
            for name, rate in rates.items()
        ).to_string(index=False, float_format=lambda value: f"{value:.3g}"),
        "",
    ]
    shares = {sigma: vote_shares(demo, data, sigma=sigma, copies=copies) for sigma in SIGMAS}
    sequential, lost = expected_draws(shares, n=10_000)
    fixed = len(SIGMAS) * (N0 + 10_000)
    lines += [
        f"sequential sampling of the papers' eight radii, priced from demo-clip's votes on {images} phantoms,",
        f"sigma {SIGMAS}, n=10,000, alpha={ALPHA}: {sequential:,.0f} draws an image instead of {fixed:,} "
        f"(x{fixed / sequential:.1f}); at most {lost:.2f} points of certified accuracy lost",
        "",
    ]
    rows = []
    for protocol in protocols(sequential):
        for sampling, draws in (("fixed", protocol.draws), ("sequential", protocol.sequential)):
            if draws is None:
                continue
            total = protocol.images * draws
            times = {name.split(",")[0]: duration(total / rate) for name, rate in rates.items()}
            enough = f"{np.ceil(total / rates[slowest] / DAY):,.0f}"
            kind = "-" if protocol.draws < 100 else sampling
            row = {"protocol": protocol.name, "images": f"{protocol.images:,}", "sampling": kind}
            rows.append(row | {"draws": f"{total:,.0f}", **times, "for a day": enough})
    lines.append(pd.DataFrame(rows).to_string(index=False))
    lines += [
        "",
        "for a day: how many such processes do it with a ViT-B/16 within a day.",
        f"One of them makes {rates[slowest] * DAY:,.0f} draws a day: {rates[slowest] * DAY / fixed:.1f} images of "
        f"PromptSmooth's protocol with fixed,",
        f"{rates[slowest] * DAY / sequential:.1f} with sequential sampling. What is larger wants an accelerator or a "
        "cluster.",
        f"Oracle smoothing of MM-SafetyBench: {QUESTIONS:,} questions are {QUESTIONS * 100:,} answers at n=100 and "
        f"{QUESTIONS * 1000:,} at n=1000;",
        f"at the published 2.8 s and 38 s a question that is {duration(QUESTIONS * 2.8)} and "
        f"{duration(QUESTIONS * 38)} on the authors' accelerators (not measured here).",
    ]
    text = "\n".join(lines)
    print(text)
    if out is not None:
        write_text_atomically(out, text + "\n")


if __name__ == "__main__":
    app()
