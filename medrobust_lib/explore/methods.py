"""Instruments of notebooks 01 and 03: an image against sentences of one's own, and prompts adapted to an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from medrobust_lib.data.dataset import ImageDataset, stratified_positions
from medrobust_lib.explore.images import EncodedImages
from medrobust_lib.explore.instrument import Instrument, control, image_slider, level_slider
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.plots import MOST_CLASSES, leading, panels, readable, shorten, shown_of
from medrobust_lib.smoothing.bounds import ALPHA, FEW_N, FEW_N0
from medrobust_lib.smoothing.certificate import ABSTAIN, GUARANTEES
from medrobust_lib.smoothing.certify import Verdict
from medrobust_lib.smoothing.prompts import PromptFrame, PromptSet, mean_prediction_entropy, sharpen

_ROW = 0.3  # inches
_TOP = 3.2  # inches above the panels of one image, below those of all


@torch.no_grad()
def similarity_view(
    model: DualEncoder,
    dataset: ImageDataset,
    *,
    index: int,
    prompts: Sequence[str],
    limits: tuple[float, float] | None = None,
    encoded: EncodedImages | None = None,
) -> Figure:
    """Draw one image, its cosine similarity with each prompt, and the softmax probabilities over these prompts.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset
    index : int
        Position in the data set, 0 to n-1.
    prompts : sequence of str
        Whole sentences, one or more. All take part in the softmax; of more than 24 the closest are shown.
    limits : (float, float), optional
        Range of the cosines shown; values beyond widen it. Default: that of these prompts.
    encoded : EncodedImages, optional
        Of the same model and data set; keeps features from one call to the next.

    Raises
    ------
    ValueError
        No prompt.
    """
    if not prompts:
        raise ValueError("no prompt: give at least one, one a line")
    encoded = encoded or EncodedImages(model, dataset)
    texts = encoded.texts(prompts)
    cosine = (encoded.clean(index)[None] @ texts.T)[0].cpu()
    probabilities = model.probabilities(encoded.clean(index)[None], texts)[0].cpu().numpy()
    kept = leading(cosine.numpy())
    left_out = f"; the {len(kept)} closest of {len(prompts)}" if len(kept) < len(prompts) else ""
    values, probabilities, prompts = cosine.numpy()[kept], probabilities[kept], [prompts[k] for k in kept]
    closest = int(values.argmax())
    height = max(2.4, _ROW * len(prompts))
    figure = panels.fixed_figure(10.2, height + 1.05)
    truth = dataset.classes[dataset.labels[index]]
    panels.add_picture(figure, (0.1, 0.45, 2.3, 2.3), dataset.images[index], f"image {index}: {shorten(truth, 26)}")
    left = panels.add_panel(figure, (5.9, 0.45, 2.0, height), "cosine similarity")
    panels.plot_dots(values, left, chosen=closest, limits=limits or (float(values.min()), float(values.max())))
    panels.write_names(prompts, left, truth=closest, width=48)
    right = panels.add_panel(figure, (8.2, 0.45, 1.6, height), "softmax over these prompts")
    panels.plot_named_bars(probabilities, (), right, total=1, truth=closest)
    left.set_xlabel(f"blue: the closest prompt{left_out}")
    right.set_xlabel("probability")
    return figure


@torch.no_grad()
def explore_similarity(model: DualEncoder, dataset: ImageDataset, *, template: str = "") -> Instrument:
    """Build the instrument of notebook 01: pick an image, edit the prompts, see similarities and probabilities move.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset
    template : str
        Of the prompts to begin with, with ``{}`` for the class; default: the data set's first.
    """
    encoded = EncodedImages(model, dataset)
    first = [(template or dataset.templates[0]).replace("{}", name) for name in dataset.classes]
    # One scale for all images, so that a dot that moves is a similarity that moves.
    some = torch.stack([encoded.clean(index) for index in range(min(len(dataset), 2 * min(len(first), MOST_CLASSES)))])
    cosines = some @ encoded.texts(first).T
    limits = float(cosines.min()), float(cosines.max())
    rows = {"rows": min(12, len(first) + 1), "layout": {"width": "95%"}}
    text = control("Textarea", "prompts", value="\n".join(first), **rows)

    def draw(index: int, prompts: str) -> Figure:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        return similarity_view(model, dataset, index=index, prompts=lines or first, limits=limits, encoded=encoded)

    hint = "One prompt a line. Leave the box (Tab, or a click beside it) to see the effect; empty it to begin again."
    return Instrument(draw, {"index": image_slider(len(dataset)), "prompts": text}, hint=hint)


MOST_STEPS = 5


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Per-image prompts on a few images: what steps of PromptSmooth do to probabilities, votes and certificates.

    Attributes
    ----------
    model : DualEncoder
    dataset : ImageDataset
        The images to look at; a few, if they are prepared ahead.
    starts : mapping of str to PromptSet
        Where the steps may begin, by the name shown.
    n_adapt, n0, n : int
        Noisy copies to adapt to, to choose the class and to count votes.
    alpha : float
    seed : int
        Of the noise.
    """

    model: DualEncoder
    dataset: ImageDataset
    starts: Mapping[str, PromptSet]
    n_adapt: int = 100
    n0: int = FEW_N0
    n: int = FEW_N
    alpha: float = ALPHA
    seed: int = 0

    @cached_property
    def encoded(self) -> EncodedImages:
        """Features of these images."""
        return EncodedImages(self.model, self.dataset, self.seed)

    def copies(self, index: int, sigma: float) -> Tensor:
        """Features of the noisy copies to adapt to, float32 [n_adapt, d]."""
        return self.encoded.noisy(index, sigma=sigma, role="adapt", count=self.n_adapt)

    def class_features(self, start: str, index: int, *, sigma: float, steps: int) -> Tensor:
        """Text features after some steps on one image, float32 [K, d]; with 0 steps those of the start."""
        # Without a step nothing depends on the image.
        return self._adapted(start, index, float(sigma), steps) if steps else self._adapted(start, 0, 0.0, 0)

    def __post_init__(self) -> None:
        # A cache of this object, not of the class: it goes when it goes.
        object.__setattr__(self, "_adapted", lru_cache(512)(self._adapted))

    @cached_property
    def _frames(self) -> dict[str, PromptFrame]:
        with torch.inference_mode(False):  # a gradient has to pass through them
            return {name: one.frame(self.model) for name, one in self.starts.items()}

    def _adapted(self, start: str, index: int, sigma: float, steps: int) -> Tensor:
        frame = self._frames[start]
        context = self.starts[start].context.to(self.model.device)
        if steps:
            context = sharpen(self.model, frame, context, self.copies(index, sigma), steps=steps)
        with torch.no_grad():
            return frame.features(self.model, context)


@torch.no_grad()
def methods_view(
    table: pd.DataFrame, adaptation: Adaptation, *, method: str, sigma: float, index: int, start: str, steps: int
) -> Figure:
    """Draw certified accuracy with one method highlighted, and one image before and after steps on its own prompt.

    Parameters
    ----------
    table : DataFrame
        Columns method, guarantee, sigma, radius, certified_accuracy, as `metrics.over_prompt_seeds` gives them.
    adaptation : Adaptation
    method : str
        Of the table; one that has no row at this sigma is said to have none.
    sigma : float
        In [0, 1] pixel units; one of the table.
    index : int
        Position in the data set of `adaptation`.
    start : str
        Prompt that the steps begin with, one of ``adaptation.starts``.
    steps : int
        Steps on the entropy of the mean prediction, 0 or more; the method of the paper takes one.
    """
    curves = table[table.sigma == sigma].dropna(subset="certified_accuracy")
    names, truth = readable(adaptation.dataset.classes), int(adaptation.dataset.labels[index])
    height = max(1.9, 0.23 * min(len(names), MOST_CLASSES))
    figure = panels.fixed_figure(10.6, 2.75 + height + 1.75)
    title = f"{shorten(method, 44)}, sigma = {sigma:g}; grey: other methods"
    curve = panels.add_panel(figure, (0.75, 0.5, 5.6, 1.85), title)
    if method in set(curves.method):
        panels.plot_chosen_curve(curves, curve, chosen=method)
    else:
        curve.text(0.5, 0.5, f"the table has no {method!r} at sigma = {sigma:g}", ha="center", va="center", fontsize=9)
        curve.set_axis_off()
    for guarantee in table[table.method == method].guarantee[:1]:  # none of a method that the table lacks
        words = f"Guarantee ({guarantee}): {GUARANTEES[guarantee]}."
        panels.add_words(figure, 6.7, 0.6, words, width=62, fontsize=8.5)
    _one_image(figure, adaptation, height=height, index=index, sigma=sigma, start=start, steps=steps)
    fixed = "The prompt it starts from was fixed before the image: standard guarantee."
    frozen = f"After a step: guarantee (frozen-prompt): {GUARANTEES['frozen-prompt']}."
    panels.add_caption(figure, _TOP + height + 0.75, f"{fixed}\n{frozen}")
    words = f"Below: one image under noise, truth: {names[truth]}. Thin bars: before the steps."
    panels.add_words(figure, 6.7, 1.75, words, width=62, fontsize=8.5)
    return figure


def _one_image(
    figure: Figure, adaptation: Adaptation, *, height: float, index: int, sigma: float, start: str, steps: int
) -> None:
    dataset, truth = adaptation.dataset, int(adaptation.dataset.labels[index])
    copies, scale = adaptation.copies(index, sigma), adaptation.model.logit_scale
    prompts = [adaptation.class_features(start, index, sigma=sigma, steps=count) for count in (0, steps)]
    logits = [scale * copies @ features.T for features in prompts]  # [T, K] each
    before, after = (one.softmax(1).mean(0).cpu().numpy() for one in logits)
    entropies = [float(mean_prediction_entropy(one)) for one in logits]
    # With these prompts, frozen, and the same fresh noise for both.
    rules = {"n0": adaptation.n0, "n": adaptation.n, "alpha": adaptation.alpha}
    verdicts = [adaptation.encoded.verdict(index, one, sigma=sigma, **rules) for one in prompts]
    (was, votes_before), (now, votes) = verdicts
    kept = leading(np.maximum(before, after), keep=[truth])
    rows = {"truth": truth, "shown": kept}
    title = f"image {int(dataset.indices[index])}, sigma = {sigma:g}"
    panels.add_picture(figure, (0.1, _TOP, 1.9, 1.9), adaptation.encoded.noisy_copy(index, sigma), title)
    bars = panels.add_panel(figure, (4.1, _TOP, 2.2, height), f"mean probability, {adaptation.n_adapt} copies")
    panels.plot_named_bars(after, dataset.classes, bars, total=1, before=before, **rows)
    went = f"{steps} step{'s' * (steps != 1)} from the {start}"
    bars.set_xlabel(f"{went}\nentropy {entropies[0]:.2f} to {entropies[1]:.2f} nats")
    counts = panels.add_panel(figure, (7.3, _TOP, 2.2, height), f"votes of {adaptation.n} fresh copies")
    panels.plot_named_bars(votes, (), counts, total=adaptation.n, before=votes_before, **rows)
    told = [_told(one, readable(dataset.classes)) for one in (was, now)]
    left_out = shown_of(len(kept), len(dataset.classes), "the likeliest")
    counts.set_xlabel(f"before: {told[0]}\nafter: {told[1]}{left_out}")


def _told(verdict: Verdict, names: Sequence[str]) -> str:
    if verdict.predicted == ABSTAIN:
        return "abstains"
    return f"{shorten(names[verdict.predicted], 24)}, radius {verdict.radius:.3f}"


def explore_methods(table: pd.DataFrame, adaptation: Adaptation) -> Instrument:
    """Build the instrument of notebook 03: methods and noise levels, and steps of adaptation to one image.

    The noisy copies of every image of `adaptation` are encoded first, at all noise levels of the table.
    """
    sigmas = tuple(float(sigma) for sigma in sorted(table.sigma.unique()))
    dataset = adaptation.dataset
    draws = [("adapt", adaptation.n_adapt), ("select", adaptation.n0), ("estimate", adaptation.n)]
    adaptation.encoded.prepare(range(len(dataset)), sigmas=sigmas, draws=draws)
    named = [shorten(dataset.classes[label], 30) for label in dataset.labels]
    images = [(f"{position}: {name}", position) for position, name in enumerate(named)]
    methods = [str(name) for name in dict.fromkeys(table.method)]
    controls = {
        "method": control("Dropdown", "method", options=methods, value=methods[-1]),
        "sigma": level_slider(sigmas, sigmas[0]),
        "index": control("Dropdown", "image", options=images),
        "start": control("Dropdown", "start from", options=list(adaptation.starts)),
        "steps": control("IntSlider", "steps", value=1, min=0, max=MOST_STEPS, tooltip="of adaptation to this image"),
    }
    return Instrument(partial(methods_view, table, adaptation), controls)


def few_images(dataset: ImageDataset, n: int = 6, *, seed: int = 0) -> ImageDataset:
    """Some images of a data set, of as many classes as possible: as many as an instrument prepares ahead."""
    return dataset.subset(stratified_positions(dataset.labels, n=min(n, len(dataset)), seed=seed))
