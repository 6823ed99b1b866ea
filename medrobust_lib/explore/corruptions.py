"""Instruments of notebooks 04 and 05: corrupted images, before and after adaptation, and model beside model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from medrobust_lib.corruptions.benchmark import corrupted
from medrobust_lib.corruptions.suites import find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.evaluation import Candidate
from medrobust_lib.explore.instrument import Instrument, image_slider
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.plots import leading, shorten, shown_of
from medrobust_lib.plots.panels import (
    add_caption,
    add_panel,
    add_picture,
    fixed_figure,
    plot_moves,
    plot_named_bars,
    plot_spectra,
    write_names,
)
from medrobust_lib.spectrum import dct_power, radial_profile

if TYPE_CHECKING:
    from ipywidgets import Widget


def adapters_view(
    base: DualEncoder,
    adapted: Mapping[str, DualEncoder],
    dataset: ImageDataset,
    class_features: Tensor,
    *,
    adapter: str,
    index: int,
    corruption: str,
    severity: int,
    suite: str = "medimeta-c",
    seed: int = 0,
) -> Figure:
    """Draw class probabilities of one image before and after adaptation, clean and corrupted.

    Parameters
    ----------
    base : DualEncoder
    adapted : mapping of str to DualEncoder
        Adapted models, by the name of their adapter; they share the text tower of `base`.
    dataset : ImageDataset
    class_features : float [K, d]
    adapter : str
        One of `adapted`.
    index : int
        Position in the data set, 0 to n-1.
    corruption : str
        A corruption of the suite.
    severity : int
        0 (clean) to 5.
    suite : {"medimeta-c", "medmnist-c"}
    seed : int
        Of the corruption.
    """
    clean = dataset.subset([index])
    worse = corrupted(clean, corruption, severity=severity, seed=seed, suite=suite)
    truth, names = int(clean.labels[0]), dataset.classes
    towers = [Candidate(tower, class_features) for tower in (base, adapted[adapter])]
    pairs = [[_probabilities(tower, data) for tower in towers] for data in (clean, worse)]
    kept = leading(np.max(pairs, axis=(0, 1)), keep=[truth])
    place, left_out = int(np.searchsorted(kept, truth)), shown_of(len(kept), len(names), "the likeliest")
    height = max(2.1, 0.25 * len(kept))
    figure = fixed_figure(10.8, height + 1.25 + 0.15 * bool(left_out))
    shown = [(clean, "clean", 0.1, 4.0), (worse, f"{corruption.replace('_', ' ')}, severity {severity}", 6.45, 8.6)]
    told = []
    for (data, title, left, bars_left), (before, after) in zip(shown, pairs, strict=True):
        add_picture(figure, (left, 0.45, 2.0, 2.0), data.images[0], title)
        bars = add_panel(figure, (bars_left, 0.45, 1.9, height), _answer(after, names, truth))
        plot_named_bars(
            after[kept], [names[k] for k in kept], bars, total=1, truth=place, before=before[kept],
            show_names=data is clean,
        )  # fmt: skip
        bars.set_xlabel("probability; thin: before" + left_out, fontsize=8)
        told.append(f"{title}: {names[int(before.argmax())]} before, {names[int(after.argmax())]} after")
    add_caption(figure, height + 0.95 + 0.15 * bool(left_out), f"{adapter}. {'; '.join(told)}. Truth: {names[truth]}.")
    return figure


def corruption_view(
    candidates: Mapping[str, Candidate],
    dataset: ImageDataset,
    *,
    index: int,
    corruption: str,
    severity: int,
    suite: str = "medimeta-c",
    seed: int = 0,
) -> Figure:
    """Draw one image and its corrupted version, their spectra, and what each model makes of both.

    Parameters
    ----------
    candidates : mapping of str to Candidate
        Models to compare, by the name shown.
    dataset : ImageDataset
    index : int
        Position in the data set, 0 to n-1.
    corruption : str
        A corruption of the suite.
    severity : int
        0 (clean) to 5.
    suite : {"medimeta-c", "medmnist-c"}
    seed : int
        Of the corruption.
    """
    clean = dataset.subset([index])
    worse = corrupted(clean, corruption, severity=severity, seed=seed, suite=suite)
    truth, names = int(clean.labels[0]), dataset.classes
    title = f"{corruption.replace('_', ' ')}, severity {severity}"
    height = max(2.0, 0.52 * len(candidates))
    figure = fixed_figure(10.8, height + 3.95)
    add_picture(figure, (0.1, 0.45, 2.0, 2.0), clean.images[0], f"clean: {shorten(names[truth], 22)}")
    add_picture(figure, (2.5, 0.45, 2.0, 2.0), worse.images[0], title)
    spectra = add_panel(figure, (5.3, 0.45, 5.2, 1.75), "power of the gray image (log scale)")
    plot_spectra({"clean": _spectrum(clean.images), "corrupted": _spectrum(worse.images)}, spectra)
    found = {who: [_probabilities(candidate, part) for part in (clean, worse)] for who, candidate in candidates.items()}
    moves = add_panel(figure, (1.9, 3.15, 4.6, height), "hollow: clean image; filled: corrupted")
    before, after = (np.array([pair[which][truth] for pair in found.values()]) for which in (0, 1))
    plot_moves(before, after, moves, right=[bool(pair[1].argmax() == truth) for pair in found.values()])
    write_names(list(found), moves, width=24)
    across = moves.get_yaxis_transform()
    for row, pair in enumerate(found.values()):
        words = [f"{shorten(names[int(one.argmax())], 36)} ({one.max():.0%})" for one in pair]
        moves.text(1.04, row, f"clean: {words[0]}\nnow: {words[1]}", transform=across, va="center", fontsize=8)
    words = "dot: the corrupted image is classified correctly; cross: it is not"
    add_caption(figure, height + 3.65, words)
    return figure


def explore_adapters(
    base: DualEncoder,
    adapted: Mapping[str, DualEncoder],
    dataset: ImageDataset,
    class_features: Tensor,
    *,
    suite: str = "medimeta-c",
    seed: int = 0,
) -> Instrument:
    """Build the instrument of notebook 04: choose an adapter, see one image before and after, clean and corrupted."""
    import ipywidgets as widgets

    adapter = widgets.Dropdown(options=list(adapted), description="adapter", layout=widgets.Layout(width="27em"))
    controls = {"adapter": adapter, **_corruption_controls(dataset, suite)}

    def draw(**values: object) -> Figure:
        return adapters_view(base, adapted, dataset, class_features, **values, suite=suite, seed=seed)

    return Instrument(draw, controls)


def explore_corruptions(
    candidates: Mapping[str, Candidate], dataset: ImageDataset, *, suite: str = "medimeta-c", seed: int = 0
) -> Instrument:
    """Build the instrument of notebook 05: image, corruption and severity; spectrum and answers of every model."""

    def draw(**values: object) -> Figure:
        return corruption_view(candidates, dataset, **values, suite=suite, seed=seed)

    return Instrument(draw, _corruption_controls(dataset, suite))


def _corruption_controls(dataset: ImageDataset, suite: str) -> "dict[str, Widget]":
    import ipywidgets as widgets

    return {
        "index": image_slider(len(dataset)),
        "corruption": widgets.Dropdown(options=find_suite(suite).names(dataset.id), description="corruption"),
        "severity": widgets.IntSlider(3, min=0, max=5, description="severity", continuous_update=False),
    }


@torch.no_grad()
def _probabilities(candidate: Candidate, data: ImageDataset) -> NDArray[np.float32]:
    """Class probabilities [K] of the only image of a data set."""
    encoder, class_features = candidate
    features = encoder.encode_image(encoder.prepare(data.images))
    return encoder.probabilities(features, class_features)[0].cpu().numpy()


def _spectrum(images: NDArray[np.uint8]) -> tuple[NDArray, NDArray]:
    """Frequency (fraction of Nyquist) and mean power of gray images without their mean."""
    gray = images.mean(3) / 255
    return radial_profile(dct_power(gray - gray.mean((1, 2), keepdims=True)))


def _answer(probabilities: NDArray, names: Sequence[str], truth: int) -> str:
    answer = int(probabilities.argmax())
    return f"{'right' if answer == truth else 'wrong'}: {shorten(names[answer], 22)}"
