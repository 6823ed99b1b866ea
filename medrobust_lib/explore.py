"""Instruments for the hand: each is a pure view (a figure of its inputs) with sliders in front of it.

The views also serve as static figures in headless runs. ipywidgets is loaded on first use.
"""

from collections.abc import Callable, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from medrobust_lib.corruptions.benchmark import corrupted
from medrobust_lib.corruptions.suites import find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.plots import plot_label_votes, plot_similarity, plot_votes, shorten
from medrobust_lib.smoothing.answers import AnswerBank, Drawing
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies, vote
from medrobust_lib.smoothing.oracle import Oracle, judged

if TYPE_CHECKING:
    from ipywidgets import Widget


@torch.inference_mode()
def similarity_view(model: DualEncoder, dataset: ImageDataset, *, index: int, prompts: Sequence[str]) -> Figure:
    """Draw one image and its cosine similarity with each prompt.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset
    index : int
        Position in the data set, 0 to n-1.
    prompts : sequence of str
        Whole sentences.
    """
    image = dataset.images[index]
    cosine = model.encode_image(model.prepare(image[None])) @ model.encode_text(prompts).T  # [1, k]
    similarities = pd.Series(cosine[0].cpu().numpy(), index=list(prompts))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.6 + 0.34 * max(6, len(prompts))), width_ratios=(1, 1.6), layout="constrained"
    )
    left.imshow(image)
    left.set_axis_off()
    left.set_title(f"image {index}\n{shorten(dataset.classes[dataset.labels[index]])}", fontsize=10)
    plot_similarity(similarities, right, truth=str(similarities.idxmax()))
    right.set_title("the closest prompt is coloured", fontsize=10)
    return figure


@torch.inference_mode()
def noise_view(
    model: DualEncoder,
    dataset: ImageDataset,
    class_features: Tensor,
    *,
    index: int,
    sigma: float,
    n: int = 64,
    seed: int = 0,
) -> Figure:
    """Draw one noisy image and the votes over n noisy copies of it.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset
    class_features : float [K, d]
    index : int
        Position in the data set, 0 to n-1.
    sigma : float
        Noise standard deviation in [0, 1] pixel units at the model's input size.
    n : int
        Number of noisy copies that vote.
    seed : int
    """
    pixels = model.prepare(dataset.images[index : index + 1])[0]
    stream = NoiseStream(seed, dataset.id, int(dataset.indices[index]), sigma, "estimate")
    shown = noisy_copies(pixels, stream)[0].clamp(0, 1).permute(1, 2, 0)  # [H, W, 3]
    votes = vote(model, class_features, pixels, stream, n=n).numpy()
    truth = int(dataset.labels[index])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(1, 1.6), layout="constrained")
    left.imshow(shown.numpy())
    left.set_axis_off()
    left.set_title(f"{shorten(dataset.classes[truth])}\nsigma = {sigma:g}", fontsize=10)
    plot_votes(votes, dataset.classes, right, truth=truth)
    right.set_title(f"majority: {dataset.classes[int(np.argmax(votes))]}; the true class is blue", fontsize=10)
    return figure


@torch.inference_mode()
def corruption_view(
    model: DualEncoder,
    dataset: ImageDataset,
    class_features: Tensor,
    *,
    index: int,
    corruption: str,
    severity: int,
    suite: str = "medimeta-c",
    seed: int = 0,
) -> Figure:
    """Draw one image, its corrupted version, and the cosine similarity of both with each class text.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset
    class_features : float [K, d]
    index : int
        Position in the data set, 0 to n-1.
    corruption : str
        A corruption of the suite.
    severity : int
        0 (clean) to 5.
    suite : {"medimeta-c", "medmnist-c"}
    seed : int
    """
    clean = dataset.subset([index])
    worse = corrupted(clean, corruption, severity=severity, seed=seed, suite=suite)
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.5), width_ratios=(1, 1.1, 1, 1.1), layout="constrained")
    truth = dataset.classes[clean.labels[0]]
    for picture, bars, shown, name in (
        (axes[0], axes[1], clean, f"clean\n{shorten(truth, 18)}"),
        (axes[2], axes[3], worse, f"{corruption}\nseverity {severity}"),
    ):
        cosine = model.encode_image(model.prepare(shown.images)) @ class_features.to(model.device).T  # [1, K]
        similarities = pd.Series(cosine[0].cpu().numpy(), index=list(dataset.classes))
        picture.imshow(shown.images[0])
        picture.set_axis_off()
        picture.set_title(name, fontsize=10)
        plot_similarity(similarities, bars, truth=truth)
        bars.set_title(f"closest text:\n{shorten(similarities.idxmax())}", fontsize=10)
    axes[3].tick_params(axis="y", labelleft=False)
    return figure


def answer_view(
    vlm: Any, questions: QuestionSet, oracle: Oracle, *, index: int, sigma: float, n: int = 60, seed: int = 0
) -> Figure:
    """Draw an image, noisy copies of it with the model's answers, and the oracle's votes.

    Parameters
    ----------
    vlm : VisionLanguageModel
    questions : QuestionSet
    oracle : Oracle
    index : int
        Position in `questions`.
    sigma : float
        Noise standard deviation, > 0, in [0, 1] pixel units.
    n : int
        Noisy copies.
    seed : int
    """
    pixels = vlm.prepare([questions.images[index]])[0].to(vlm.device)
    how = Drawing(sigma=sigma, seed=seed)
    address = {"dataset": questions.id, "index": int(questions.indices[index])}
    bank = AnswerBank(vlm, pixels, questions.questions[index], how, **address)
    texts = bank.texts("select", 0, n)
    labels = judged(oracle, texts).labels
    copies = noisy_copies(pixels, NoiseStream(seed, questions.id, address["index"], sigma, "select"), count=3).cpu()
    figure, axes = plt.subplots(1, 5, figsize=(11.5, 2.6), width_ratios=(1, 1, 1, 1, 1.4), layout="constrained")
    truth = questions.truths[index]
    shown = [(pixels.cpu(), f"clean\n{'' if truth is None else 'truth: ' + truth}")]
    shown += [(copy, fill(texts[number] or "(no answer)", 24)) for number, copy in enumerate(copies)]
    for ax, (picture, title) in zip(axes[:4], shown, strict=True):
        ax.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
        ax.set_axis_off()
        ax.set_title(title, fontsize=8, loc="center")
    votes = {name: labels.count(name) for name in oracle.labels if name in labels}
    if None in labels:
        votes["no label"] = labels.count(None)
    plot_label_votes(votes, axes[4], answer=max(votes, key=votes.get))
    axes[4].set_title(f"{n} copies, sigma = {sigma:g}", fontsize=9)
    return figure


def explore_similarity(model: DualEncoder, dataset: ImageDataset) -> "Widget":
    """Build the instrument of notebook 01: pick an image, edit the prompts, see the similarities move."""
    import ipywidgets as widgets

    first = [dataset.templates[0].replace("{}", name) for name in dataset.classes]
    index = widgets.IntSlider(0, 0, len(dataset) - 1, description="image")
    prompts = widgets.Textarea(
        "\n".join(first), description="prompts", layout=widgets.Layout(width="95%", height="11em")
    )

    def draw(index: int, prompts: str) -> Figure:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        return similarity_view(model, dataset, index=index, prompts=lines or first)

    return _instrument(draw, index=index, prompts=prompts)


def explore_noise(model: DualEncoder, dataset: ImageDataset, class_features: Tensor, *, seed: int = 0) -> "Widget":
    """Build the instrument of notebook 02: move the noise, see picture, votes and majority."""
    import ipywidgets as widgets

    index = widgets.IntSlider(0, 0, len(dataset) - 1, description="image", continuous_update=False)
    sigma = widgets.FloatSlider(0.25, min=0, max=1, step=0.05, description="sigma", continuous_update=False)

    def draw(index: int, sigma: float) -> Figure:
        return noise_view(model, dataset, class_features, index=index, sigma=sigma, seed=seed)

    return _instrument(draw, index=index, sigma=sigma)


def explore_corruptions(
    model: DualEncoder, dataset: ImageDataset, class_features: Tensor, *, suite: str = "medimeta-c", seed: int = 0
) -> "Widget":
    """Build the instrument of notebook 05: choose image, corruption and severity, see image and answer change."""
    import ipywidgets as widgets

    index = widgets.IntSlider(0, 0, len(dataset) - 1, description="image", continuous_update=False)
    corruption = widgets.Dropdown(options=find_suite(suite).names(dataset.id), description="corruption")
    severity = widgets.IntSlider(3, min=0, max=5, description="severity", continuous_update=False)

    def draw(index: int, corruption: str, severity: int) -> Figure:
        shown = {"index": index, "corruption": corruption, "severity": severity}
        return corruption_view(model, dataset, class_features, **shown, suite=suite, seed=seed)

    return _instrument(draw, index=index, corruption=corruption, severity=severity)


def explore_answers(vlm: Any, questions: QuestionSet, oracle: Oracle, *, seed: int = 0) -> "Widget":
    """Build the instrument of notebook 06: choose image and noise, read the answers, see the votes."""
    import ipywidgets as widgets

    index = widgets.IntSlider(0, 0, len(questions) - 1, description="image", continuous_update=False)
    sigma = widgets.FloatSlider(0.25, min=0.05, max=1, step=0.05, description="sigma", continuous_update=False)

    def draw(index: int, sigma: float) -> Figure:
        return answer_view(vlm, questions, oracle, index=index, sigma=sigma, seed=seed)

    return _instrument(draw, index=index, sigma=sigma)


def _instrument(draw: Callable[..., Figure], **controls: "Widget") -> "Widget":
    """Stack controls over the figure that they redraw."""
    import ipywidgets as widgets
    from IPython.display import display

    def redraw(**values: object) -> None:
        figure = draw(**values)
        display(figure)
        plt.close(figure)

    return widgets.VBox([*controls.values(), widgets.interactive_output(redraw, controls)])
