"""Prompt learning side by side with the straightforward way: images encoded at every step, prompts padded in full.

    python benchmarks/prompts.py        # about two minutes on two cores

Both ways see the same noise and take the same steps; the largest difference of their contexts is printed beside
the times, so that "faster" is known to mean "the same, faster".
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import medrobust_lib as mr  # first: it lets torchvision import beside a CPU-only torch

# isort: split
import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor
from torch.nn import functional

from medrobust_lib.data.dataset import ImageDataset, draw_shots
from medrobust_lib.models.dual_encoder import DualEncoder, Tokens
from medrobust_lib.smoothing.methods import AdaptationFeatures
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies
from medrobust_lib.smoothing.prompts import (
    PromptFrame,
    empty_frame,
    learn_prompts,
    mean_prediction_entropy,
    sharpen,
    text_prompts,
)

LEARNING_RATE, SIGMAS = 0.002, (0.25, 0.5, 0.75, 1.0)


def main(
    model_id: Annotated[str, typer.Option("--model", help="Model id.")] = "demo-clip",
    dataset: Annotated[str, typer.Option(help="Data set id.")] = "phantom/histology",
    shots: Annotated[int, typer.Option(help="Images per class.")] = 4,
    epochs: Annotated[int, typer.Option(help="Epochs of few-shot learning.")] = 12,
    steps: Annotated[int, typer.Option(help="Steps of per-image adaptation.")] = 4,
    repeats: Annotated[int, typer.Option(help="Repetitions; medians are printed.")] = 3,
) -> None:
    """Time both ways in turn and print their ratios."""
    model = mr.load_model(model_id)
    train, test = mr.load_dataset(dataset, split="train"), mr.load_dataset(dataset, n=9)
    rows = [
        compare(
            f"few-shot, {shots} shots, {epochs} epochs",
            lambda: learn_prompts(
                model, train, sigmas=SIGMAS, shots=shots, epochs=epochs, draws_per_image=epochs,
                learning_rate=LEARNING_RATE,
            ).context,
            lambda: plain_few_shot(model, train, shots=shots, epochs=epochs),
            repeats,
        ),
        compare(
            f"few-shot, {shots} shots, {epochs} epochs, 4 draws per image",
            lambda: learn_prompts(
                model, train, sigmas=SIGMAS, shots=shots, epochs=epochs, draws_per_image=4,
                learning_rate=LEARNING_RATE,
            ).context,
            lambda: plain_few_shot(model, train, shots=shots, epochs=epochs),
            repeats,
            same=False,
        ),
        compare(
            f"one image, 100 noisy copies, {steps} steps",
            lambda: adapt(model, test, steps=steps),
            lambda: plain_adapt(model, test, steps=steps),
            repeats,
        ),
        compare("text features of all classes, padding cut", *text_towers(model, test), 5 * repeats),
    ]  # fmt: skip
    typer.echo(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.4g}"))


def compare(
    what: str, ours: Callable[[], Tensor], plain: Callable[[], Tensor], repeats: int, *, same: bool = True
) -> dict[str, object]:
    """Median seconds of both, taken in turn, and the largest difference of what they return."""
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in range(repeats + 1):
        found = {}
        for name, run in (("ours", ours), ("plain", plain)):
            started = time.perf_counter()
            found[name] = run()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    difference = float((found["ours"] - found["plain"]).abs().max()) if same else math.nan
    return {
        "what": what,
        "ours s": medians["ours"],
        "plain s": medians["plain"],
        "plain / ours": medians["plain"] / medians["ours"],
        "largest difference": difference,
    }


def plain_few_shot(model: DualEncoder, train: ImageDataset, *, shots: int, epochs: int) -> Tensor:
    """CoOp's loop with noise: every image is encoded at every visit, every prompt padded to the context length."""
    draw = np.random.default_rng(0)
    chosen = draw_shots(train, shots, draw)
    levels = draw.choice(np.array(SIGMAS), size=(len(chosen), epochs))
    generator = torch.Generator().manual_seed(0)
    frame = padded(model, empty_frame(model, train.classes, n_context=5))
    context = torch.empty(5, frame.embeddings.shape[2]).normal_(0, 0.02, generator=generator)
    context = context.to(model.device).requires_grad_(True)
    optimiser = torch.optim.SGD([context], lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    labels = torch.from_numpy(chosen.labels).to(model.device)
    for epoch in range(epochs):
        rate = 1e-5 if epoch == 0 else LEARNING_RATE * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for group in optimiser.param_groups:
            group["lr"] = rate
        for rows in torch.randperm(len(chosen), generator=generator).split(16):
            pixels = model.prepare(chosen.images[rows.numpy()]).to(model.device)
            for place, row in enumerate(rows.tolist()):
                stream = NoiseStream(0, train.id, int(chosen.indices[row]), float(levels[row, epoch]), "adapt")
                pixels[place] += stream.draw(tuple(pixels.shape[1:]), first=epoch, device=model.device)[0]
            logits = model.logit_scale * model.encode_image(pixels) @ frame.features(model, context).T
            optimiser.zero_grad()
            functional.cross_entropy(logits, labels[rows]).backward()
            optimiser.step()
    return context.detach().cpu()


def adapt(model: DualEncoder, test: ImageDataset, *, steps: int) -> Tensor:
    """Adaptation of one image as `AdaptedPrompts` does it, noise and encoding included."""
    start, pixels, stream = _adaptation(model, test)
    found = AdaptationFeatures.draw(model, pixels, stream, count=100)
    return sharpen(model, start.frame(model), start.context.to(model.device), found.features, steps=steps).cpu()


def plain_adapt(model: DualEncoder, test: ImageDataset, *, steps: int) -> Tensor:
    """Test-time prompt tuning as it is usually written: the copies are encoded anew for every step."""
    start, pixels, stream = _adaptation(model, test)
    frame = padded(model, start.frame(model))
    context = start.context.to(model.device).clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([context], lr=5e-3)
    copies = noisy_copies(pixels, stream, count=100)
    for _ in range(steps):
        optimiser.zero_grad()
        logits = model.logit_scale * model.encode_image(copies) @ frame.features(model, context).T
        mean_prediction_entropy(logits).backward()
        optimiser.step()
    return context.detach().cpu()


def text_towers(model: DualEncoder, test: ImageDataset) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Text features with the padding after the longest prompt cut, and with all of it."""
    frame = text_prompts(model, test.classes, test.templates[0]).frame(model)
    full = padded(model, frame)

    def run(which: PromptFrame) -> Callable[[], Tensor]:
        def features() -> Tensor:
            with torch.no_grad():
                return which.features(model, which.text_context)

        return features

    return run(frame), run(full)


def padded(model: DualEncoder, frame: PromptFrame) -> PromptFrame:
    """The same prompts, padded to the model's context length."""
    missing = model.context_length - frame.tokens.ids.shape[1]
    tokens = Tokens(functional.pad(frame.tokens.ids, (0, missing)), functional.pad(frame.tokens.mask, (0, missing)))
    return PromptFrame(tokens, model.embed_tokens(tokens).detach().float(), frame.places)


def _adaptation(model: DualEncoder, test: ImageDataset) -> tuple:
    pixels = model.prepare(test.images[:1])[0].to(model.device)
    stream = NoiseStream(0, test.id, int(test.indices[0]), 0.25, "adapt")
    return text_prompts(model, test.classes, test.templates[0]), pixels, stream


if __name__ == "__main__":
    typer.run(main)
