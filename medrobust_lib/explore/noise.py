"""Instrument of notebook 02: noise on an image, the votes over noisy copies, and what they prove."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.explore.encoded import EncodedImages
from medrobust_lib.explore.instrument import Instrument, image_slider, level_slider
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.plots import leading, shorten, shown_of
from medrobust_lib.plots.panels import (
    add_caption,
    add_panel,
    add_picture,
    add_words,
    fixed_figure,
    plot_named_bars,
    plot_proof,
)
from medrobust_lib.smoothing.bounds import certified_radius, check_alpha, lower_confidence_bound, minimum_count
from medrobust_lib.smoothing.certificate import ABSTAIN, GUARANTEES
from medrobust_lib.smoothing.votes import Verdict

N0, N, ALPHA = 20, 100, 0.001
"""Selection draws, estimation draws and failure probability of the certificates that instruments show."""

SIGMAS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
"""Noise levels of the slider, in [0, 1] pixel units."""


@torch.no_grad()
def noise_view(
    model: DualEncoder,
    dataset: ImageDataset,
    class_features: Tensor,
    *,
    index: int,
    sigma: float,
    n0: int = N0,
    n: int = N,
    alpha: float = ALPHA,
    seed: int = 0,
    encoded: EncodedImages | None = None,
) -> Figure:
    """Draw one noisy image and its prediction, the votes over n noisy copies, and the radius that they certify.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset
    class_features : float [K, d]
        Prompts that were fixed before the image was seen: the guarantee is the standard one.
    index : int
        Position in the data set, 0 to n-1.
    sigma : float
        Noise standard deviation in [0, 1] pixel units at the model's input size; at 0 nothing is certified.
    n0, n : int
        Draws that choose the class, and draws that count votes for it.
    alpha : float in (0, 1)
        Failure probability of the certificate.
    seed : int
    encoded : EncodedImages, optional
        Of the same model, data set and seed; keeps features from one call to the next.
    """
    encoded = encoded or EncodedImages(model, dataset, seed)
    check_alpha(alpha)
    verdict, votes = encoded.verdict(index, class_features, sigma=sigma, n0=n0, n=n, alpha=alpha)
    one = encoded.noisy(index, sigma=sigma, role="estimate", count=n)[:1]
    probabilities = model.probabilities(one, class_features)[0].cpu()
    truth = int(dataset.labels[index])
    names = dataset.classes
    kept = leading(votes, keep=[truth])
    height = max(2.5, 0.27 * len(kept))
    figure = fixed_figure(10.2, height + 1.75 + 0.15 * (len(kept) < len(names)))
    answer, chance = shorten(names[int(probabilities.argmax())], 30), float(probabilities.max())
    add_picture(figure, (0.1, 0.45, 2.4, 2.4), encoded.noisy_copy(index, sigma), f"truth: {shorten(names[truth], 28)}")
    add_words(
        figure, 0.1, 2.95, f"one copy at sigma = {sigma:g}; the model says\n{answer} ({chance:.0%})", width=60,
        color="0.15",
    )  # fmt: skip
    bars = add_panel(figure, (4.7, 0.45, 2.3, height), f"votes of {n} noisy copies")
    place = int(np.searchsorted(kept, truth))
    plot_named_bars(votes[kept], [names[k] for k in kept], bars, total=n, truth=place, counts=True)
    bars.axvline(n / 2, color="0.5", ls=":", lw=1)
    told = shown_of(len(kept), len(names), "those with most votes")
    bars.set_xlabel("votes; blue: the true class, dotted: half" + told, fontsize=8)
    _proof(figure, (8.05, 0.45, 2.0, height), verdict, names=names, truth=truth, sigma=sigma, n=n, alpha=alpha)
    words = proof_in_words(verdict, names, truth=truth, sigma=sigma, n0=n0, alpha=alpha)
    add_caption(figure, height + 1.05 + 0.15 * (len(kept) < len(names)), words)
    return figure


def _proof(
    figure: Figure,
    box: tuple[float, float, float, float],
    verdict: Verdict,
    *,
    names: tuple[str, ...],
    truth: int,
    sigma: float,
    n: int,
    alpha: float,
) -> None:
    if sigma == 0:
        add_panel(figure, box, "no noise, no certificate").set_axis_off()
        return
    told = "abstains" if verdict.predicted == ABSTAIN else f"certified radius {verdict.radius:.3f}"
    if verdict.predicted not in (ABSTAIN, truth):
        told = f"wrong class, radius {verdict.radius:.3f}"
    reach = lower_confidence_bound(n, n, alpha)
    grid = np.linspace(0.5, reach, 40)
    points = list(zip(grid, certified_radius(grid, sigma), strict=True))
    plot_proof(
        verdict.p_lower, add_panel(figure, box, told), reach=reach, radius_of=points, right=verdict.predicted == truth
    )


def proof_in_words(
    verdict: Verdict, names: tuple[str, ...], *, truth: int, sigma: float, n0: int, alpha: float, what: str = "standard"
) -> str:
    """What a verdict says, and what its guarantee means."""
    guarantee = f"Guarantee ({what}): {GUARANTEES[what]}."
    if sigma == 0:
        return f"Certificates need noise. {guarantee}"
    draws = f"{n0} draws choose the class, of {verdict.n} fresh ones {verdict.k} vote for it"
    proved = f"p > {verdict.p_lower:.3f} with confidence {1 - alpha:g}"
    if verdict.predicted == ABSTAIN:
        least = minimum_count(verdict.n, alpha) if verdict.n else 0
        return f"{draws}: {proved}. Abstains: {least} votes are the fewest that prove a majority. {guarantee}"
    wrong = "wrong: a certificate says that the answer stays, not that it is right"
    right = "right" if verdict.predicted == truth else wrong
    return f"{draws}: {proved}. Certified: {names[verdict.predicted]} ({right}). {guarantee}"


def explore_noise(
    model: DualEncoder,
    dataset: ImageDataset,
    class_features: Tensor,
    *,
    sigmas: tuple[float, ...] = SIGMAS,
    n0: int = N0,
    n: int = N,
    alpha: float = ALPHA,
    index: int = 0,
    seed: int = 0,
) -> Instrument:
    """Build the instrument of notebook 02: move the noise, see picture, votes and certified radius.

    Parameters
    ----------
    model, dataset, class_features, n0, n, alpha, seed
        As in `noise_view`.
    sigmas : tuple of float
        Levels of the slider.
    index : int
        Image to begin with.
    """
    encoded = EncodedImages(model, dataset, seed)
    controls = {"index": image_slider(len(dataset), index), "sigma": level_slider(sigmas, 0.1)}

    def draw(index: int, sigma: float) -> Figure:
        options = {"n0": n0, "n": n, "alpha": alpha, "seed": seed, "encoded": encoded}
        return noise_view(model, dataset, class_features, index=index, sigma=sigma, **options)

    return Instrument(draw, controls)
