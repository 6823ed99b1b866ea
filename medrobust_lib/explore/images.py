"""Instruments of notebooks 02, 04 and 05: one image under noise, before and after adaptation, and corrupted.

Features that are looked at again and again are encoded when first asked for, then kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from medrobust_lib.corruptions.functions import dct_power, radial_profile
from medrobust_lib.corruptions.suites import corrupted, find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.evaluation import Candidate
from medrobust_lib.experiments import progress
from medrobust_lib.explore.instrument import Instrument, control, image_slider, level_slider
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.plots import CLASS_COLOURS, leading, panels, readable, shorten, shown_of
from medrobust_lib.smoothing import bounds
from medrobust_lib.smoothing.bounds import ALPHA, FEW_N, FEW_N0
from medrobust_lib.smoothing.certificate import ABSTAIN, GUARANTEES
from medrobust_lib.smoothing.certify import FixedPlan, Verdict, certify, take_votes
from medrobust_lib.smoothing.methods import FixedPrompts, PromptClassifier
from medrobust_lib.smoothing.noise import NoiseStream, Role, make_batches, noisy_copies
from medrobust_lib.smoothing.perturbations import find_perturbation

_KEPT = 256  # feature sets: some tens of megabytes


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Features of single images of a data set, clean and under noise, and of sentences.

    Attributes
    ----------
    model : DualEncoder
    dataset : ImageDataset
    seed : int
        Of the noise; draws have the addresses that certificates use, so votes here are votes there.
    """

    model: DualEncoder
    dataset: ImageDataset
    seed: int = 0

    def __post_init__(self) -> None:
        # Caches of this object, not of the class: they go when it goes.
        for name, most in {"clean": _KEPT, "noisy": _KEPT, "transformed": _KEPT, "text": 1024}.items():
            object.__setattr__(self, name, lru_cache(most)(getattr(self, name)))

    def pixels(self, index: int) -> Tensor:
        """Image as the model takes it, float32 [3, H, W] in [0, 1]."""
        return self.model.prepare(self.dataset.images[index : index + 1])[0].to(self.model.device)

    # No inference mode: prompts are adapted to these features, and a gradient has to pass.
    @torch.no_grad()
    def clean(self, index: int) -> Tensor:
        """Feature of an image, float32 [d], unit norm."""
        return self.model.encode_image(self.pixels(index)[None])[0].float()

    @torch.no_grad()
    def noisy(self, index: int, *, sigma: float, role: Role, count: int) -> Tensor:
        """Features of the first noisy copies of an image, float32 [count, d], unit norm."""
        if sigma == 0:  # all copies are the image
            return self.clean(index).expand(count, -1)
        pixels, stream = self.pixels(index), self._stream(index, sigma, role)

        def encode(first: int, count: int) -> Tensor:
            return self.model.encode_image(noisy_copies(pixels, stream, first=first, count=count)).float()

        return torch.cat(list(make_batches(None, pixels.device, tuple(pixels.shape)).map(encode, first=0, count=count)))

    @torch.no_grad()
    def text(self, sentence: str) -> Tensor:
        """Feature of a sentence, float32 [d], unit norm."""
        return self.model.encode_text([sentence])[0].float()

    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Features of sentences, float32 [k, d], unit norm."""
        return torch.stack([self.text(sentence) for sentence in sentences])

    def noisy_copy(self, index: int, sigma: float) -> Tensor:
        """First copy that votes in a certificate, float32 [3, H, W]; not clipped."""
        return noisy_copies(self.pixels(index), self._stream(index, sigma, "estimate"))[0]

    def verdict(
        self, index: int, class_features: Tensor, *, sigma: float, n0: int, n: int, alpha: float
    ) -> tuple[Verdict, np.ndarray]:
        """Certificate of one image with prompts that are fixed by now, and the votes behind it.

        Returns
        -------
        verdict : Verdict
            As `certify` gives it, with fixed sampling and one bound; at sigma 0 nothing is certified.
        votes : int64 [K]
            Of the estimation draws.

        Raises
        ------
        ValueError
            n that can never certify at this alpha.
        """
        classify = FixedPrompts("chosen", class_features).classifier()

        def answers(role: Role, first: int, count: int, positions: Sequence[int]) -> list[Tensor]:
            wanted = first + count
            labels = classify(self.noisy(index, sigma=sigma, role=role, count=wanted)).cpu()[first:]
            return [labels for _ in positions]

        votes = np.bincount(answers("estimate", 0, n, [0])[0].numpy(), minlength=len(class_features))
        if sigma == 0:
            return Verdict(predicted=ABSTAIN, radius=0.0, p_lower=0.0, k=0, n=0), votes
        plan = FixedPlan(sigma=sigma, n=n, alpha=alpha)
        return take_votes(answers, [plan], n0=n0, label=None, bounds="one")[0], votes

    @torch.no_grad()
    def transformed(self, index: int, perturbation: str, parameters: tuple[float, ...]) -> Tensor:
        """Features of an image under a perturbation of one parameter, float32 [G, d], unit norm."""
        theta = torch.tensor(parameters, device=self.model.device)[:, None]
        return self.model.encode_image(find_perturbation(perturbation).apply(self.pixels(index), theta)).float()

    def prepare(self, indices: Sequence[int], *, sigmas: Sequence[float], draws: Sequence[tuple[Role, int]]) -> None:
        """Encode noisy copies ahead, and show how far it is."""
        work = [(index, float(sigma)) for index in indices for sigma in sigmas]
        for index, sigma in progress(
            work, total=len(work), description="prepare the instrument", unit="images x sigmas", resumes=False
        ):
            for role, count in draws:
                self.noisy(index, sigma=sigma, role=role, count=count)

    def _stream(self, index: int, sigma: float, role: Role) -> NoiseStream:
        return NoiseStream(self.seed, self.dataset.id, int(self.dataset.indices[index]), sigma, role)


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
    n: int = FEW_N,
    seed: int = 0,
    encoded: EncodedImages | None = None,
) -> Figure:
    """Draw one noisy image and its prediction, the votes over n noisy copies, and the radius that they certify.

    The failure probability of the certificate is `bounds.ALPHA`, and `bounds.FEW_N0` draws choose the class.

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
    n : int
        Draws that count votes for the class.
    seed : int
    encoded : EncodedImages, optional
        Of the same model, data set and seed; keeps features from one call to the next.
    """
    encoded = encoded or EncodedImages(model, dataset, seed)
    verdict, votes = encoded.verdict(index, class_features, sigma=sigma, n0=FEW_N0, n=n, alpha=ALPHA)
    one = encoded.noisy(index, sigma=sigma, role="estimate", count=n)[:1]
    probabilities = model.probabilities(one, class_features)[0].cpu()
    truth, names = int(dataset.labels[index]), readable(dataset.classes)
    kept = leading(votes, keep=[truth])
    left_out = shown_of(len(kept), len(names), "those with most votes")
    height, more = max(2.5, 0.27 * len(kept)), 0.15 * bool(left_out)
    figure = panels.fixed_figure(10.2, height + 1.75 + more)
    title = f"truth: {shorten(names[truth], 28)}"
    panels.add_picture(figure, (0.1, 0.45, 2.4, 2.4), encoded.noisy_copy(index, sigma), title)
    answer = f"{shorten(names[int(probabilities.argmax())], 30)} ({float(probabilities.max()):.0%})"
    words = f"one copy at sigma = {sigma:g}; the model says\n{answer}"
    panels.add_words(figure, 0.1, 2.95, words, width=60, color="0.15")
    bars = panels.add_panel(figure, (4.7, 0.45, 2.3, height), f"votes of {n} noisy copies")
    panels.plot_named_bars(votes, names, bars, total=n, truth=truth, shown=kept)
    bars.axvline(n / 2, color="0.5", ls=":", lw=1)
    bars.set_xlabel("votes; blue: the true class, dotted: half" + left_out)
    right = verdict.predicted == truth
    title = f"{'certified' if right else 'wrong class,'} radius {verdict.radius:.3f}"
    title = "abstains" if verdict.predicted == ABSTAIN else title
    proof = panels.add_panel(figure, (8.05, 0.45, 2.0, height), title if sigma else "no noise, no certificate")
    if sigma:
        provable = np.linspace(0.5, bounds.lower_confidence_bound(n, n, ALPHA), 40)
        curve = provable, bounds.certified_radius(provable, sigma)
        panels.plot_proof(verdict.p_lower, proof, curve=curve, right=right)
    else:
        proof.set_axis_off()
    words = proof_in_words(verdict, names, truth=truth, sigma=sigma, n0=FEW_N0, alpha=ALPHA)
    panels.add_caption(figure, height + 1.05 + more, words)
    return figure


def proof_in_words(verdict: Verdict, names: tuple[str, ...], *, truth: int, sigma: float, n0: int, alpha: float) -> str:
    """What a verdict says, and what its guarantee means."""
    guarantee = f"Guarantee (standard): {GUARANTEES['standard']}."
    if sigma == 0:
        return f"Certificates need noise. {guarantee}"
    draws = f"{n0} draws choose the class, of {verdict.n} fresh ones {verdict.k} vote for it"
    proved = f"p > {verdict.p_lower:.3f} with confidence {1 - alpha:g}"
    if verdict.predicted == ABSTAIN:
        least = bounds.minimum_count(verdict.n, alpha) if verdict.n else 0
        return f"{draws}: {proved}. Abstains: {least} votes are the fewest that prove a majority. {guarantee}"
    wrong = "wrong: a certificate says that the answer stays, not that it is right"
    right = "right" if verdict.predicted == truth else wrong
    return f"{draws}: {proved}. Certified: {names[verdict.predicted]} ({right}). {guarantee}"


def explore_noise(
    model: DualEncoder, dataset: ImageDataset, class_features: Tensor, *, n: int = FEW_N, index: int = 0, seed: int = 0
) -> Instrument:
    """Build the instrument of notebook 02: move the noise, see picture, votes and certified radius.

    Parameters
    ----------
    model, dataset, class_features, n, seed
        As in `noise_view`.
    index : int
        Image to begin with.
    """
    encoded = EncodedImages(model, dataset, seed)
    controls = {"index": image_slider(len(dataset), index), "sigma": level_slider(SIGMAS, 0.1)}
    draw = partial(noise_view, model, dataset, class_features, n=n, seed=seed, encoded=encoded)
    return Instrument(draw, controls)


ONE_PARAMETER = ("contrast", "brightness", "gamma", "blur")
"""Perturbations that a slider can move."""


@torch.no_grad()
def range_view(
    model: DualEncoder,
    dataset: ImageDataset,
    class_features: Tensor,
    *,
    perturbation: str,
    index: int,
    share: float,
    n: int = FEW_N,
    seed: int = 0,
    encoded: EncodedImages | None = None,
) -> Figure:
    """Draw one image under a corruption, the bare and the smoothed answers along its parameter, and what is certified.

    Parameters
    ----------
    model, dataset, class_features, index, n, seed, encoded
        As in `noise_view`.
    perturbation : {"contrast", "brightness", "gamma", "blur"}
        Smoothed over at its ``usual_sigma``.
    share : float in [-1, 1]
        Place of the shown image in the range of the parameter, which is two sigma to both sides; of a blur, which has
        no other side, the size counts and the range is four sigma.
    """
    encoded, family = encoded or EncodedImages(model, dataset, seed), find_perturbation(perturbation)
    sigma, one_sided = family.usual_sigma, family.law == "exponential"
    most = (4 if one_sided else 2) * sigma
    theta = most * (abs(share) if one_sided else share)
    grid = np.arange(0 if one_sided else -50, 101 if one_sided else 51) * sigma / 10
    labels = (encoded.transformed(index, perturbation, tuple(grid.tolist())) @ class_features.T).argmax(1).cpu()
    shown = np.abs(grid) <= most + 1e-9
    points = torch.from_numpy(grid)[:, None]
    answers, shares = family.smoothed(
        labels[None], points, at=points[shown], sigma=sigma, n_classes=len(class_features)
    )
    address = {"dataset": dataset.id, "index": int(dataset.indices[index]), "seed": seed, "perturbation": family}
    classifier = PromptClassifier(model, class_features)
    found = certify(classifier, encoded.pixels(index), sigma=sigma, n0=FEW_N0, n=n, **address)
    truth, names = int(dataset.labels[index]), readable(dataset.classes)
    figure = panels.fixed_figure(10.2, 4.1)
    panels.add_picture(figure, (0.1, 0.4, 2.3, 2.3), encoded.pixels(index), f"truth: {shorten(names[truth], 26)}")
    moved = family.apply(encoded.pixels(index), torch.tensor([[theta]], device=model.device))[0]
    panels.add_picture(figure, (2.6, 0.4, 2.3, 2.3), moved, f"{perturbation} {theta:+z.2f}")
    ax = panels.add_panel(figure, (5.6, 0.4, 4.4, 2.3), f"answers along {perturbation}")
    told = list(dict.fromkeys([*labels[shown].tolist(), *answers[0].tolist()]))
    for place, label in enumerate(told):
        colour = CLASS_COLOURS[place % len(CLASS_COLOURS)]
        name = f"{shorten(names[label], 20)}{' (true)' if label == truth else ''}"
        ax.plot(grid[shown], np.where(labels[shown] == label, -0.08, np.nan), "|", color=colour, ms=7, label=name)
        ax.plot(grid[shown], np.where(answers[0] == label, shares[0], np.nan), color=colour, lw=2)
    if not found.abstained:
        ax.axvspan(0 if one_sided else -found.radius, found.radius, color="0.9", zorder=0)
    ax.axvline(theta, color="0.4", lw=1, ls=":")
    ax.set(xlabel=family.units, ylabel="share of the smoothed answer", ylim=(-0.15, 1.02), xlim=grid[shown][[0, -1]])
    ax.legend(fontsize=7, loc="lower right", framealpha=0.9)
    where = "ticks: bare answers; curves: smoothed answers on a grid; gray: certified range; dotted: the shown image"
    panels.add_caption(figure, 3.3, f"{found}. {where[0].upper()}{where[1:]}.")
    return figure


def explore_ranges(
    model: DualEncoder, dataset: ImageDataset, class_features: Tensor, *, n: int = FEW_N, index: int = 0, seed: int = 0
) -> Instrument:
    """Build the instrument of notebook 08: move a corruption, see image, answers and certified range.

    Parameters
    ----------
    model, dataset, class_features, n, index, seed
        As in `explore_noise`.
    """
    encoded = EncodedImages(model, dataset, seed)
    told = {"tooltip": "share of the widest range shown, to either side"}
    controls = {
        "perturbation": control("Dropdown", "corruption", options=ONE_PARAMETER),
        "index": image_slider(len(dataset), index),
        "share": control("FloatSlider", "how far", value=0.5, min=-1.0, max=1.0, step=0.05, **told),
    }
    draw = partial(range_view, model, dataset, class_features, n=n, seed=seed, encoded=encoded)
    return Instrument(draw, controls)


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
    suite : {"medimeta-c", "medmnist-c", "clinical-c"}
    seed : int
        Of the corruption.
    """
    clean = dataset.subset([index])
    worse = corrupted(clean, corruption, severity=severity, seed=seed, suite=suite)
    truth, names = int(clean.labels[0]), readable(dataset.classes)
    towers = [Candidate(tower, class_features) for tower in (base, adapted[adapter])]
    pairs = [[_probabilities(tower, data) for tower in towers] for data in (clean, worse)]
    kept = leading(np.max(pairs, axis=(0, 1)), keep=[truth])
    left_out = shown_of(len(kept), len(names), "the likeliest")
    height, more = max(2.1, 0.25 * len(kept)), 0.15 * bool(left_out)
    figure = panels.fixed_figure(10.8, height + 1.25 + more)
    shown = [(clean, "clean", 0.1, 4.0), (worse, f"{corruption.replace('_', ' ')}, severity {severity}", 6.45, 8.6)]
    told = []
    for (data, title, left, bars_left), (before, after) in zip(shown, pairs, strict=True):
        panels.add_picture(figure, (left, 0.45, 2.0, 2.0), data.images[0], title)
        was, now = names[int(before.argmax())], names[int(after.argmax())]
        answer = f"{'right' if int(after.argmax()) == truth else 'wrong'}: {shorten(now, 22)}"
        bars = panels.add_panel(figure, (bars_left, 0.45, 1.9, height), answer)
        shown_names = names if data is clean else ()
        panels.plot_named_bars(after, shown_names, bars, total=1, truth=truth, before=before, shown=kept)
        bars.set_xlabel("probability; thin: before" + left_out)
        told.append(f"{title}: {was} before, {now} after")
    panels.add_caption(figure, height + 0.95 + more, f"{adapter}. {'; '.join(told)}. Truth: {names[truth]}.")
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
    suite : {"medimeta-c", "medmnist-c", "clinical-c"}
    seed : int
        Of the corruption.
    """
    clean = dataset.subset([index])
    worse = corrupted(clean, corruption, severity=severity, seed=seed, suite=suite)
    truth, names = int(clean.labels[0]), readable(dataset.classes)
    title = f"{corruption.replace('_', ' ')}, severity {severity}"
    height = max(2.0, 0.52 * len(candidates))
    figure = panels.fixed_figure(10.8, height + 3.95)
    panels.add_picture(figure, (0.1, 0.45, 2.0, 2.0), clean.images[0], f"clean: {shorten(names[truth], 22)}")
    panels.add_picture(figure, (2.5, 0.45, 2.0, 2.0), worse.images[0], title)
    spectra = panels.add_panel(figure, (5.3, 0.45, 5.2, 1.75), "power of the gray image (log scale)")
    panels.plot_spectra({"clean": _spectrum(clean.images), "corrupted": _spectrum(worse.images)}, spectra)
    found = [[_probabilities(candidate, part) for part in (clean, worse)] for candidate in candidates.values()]
    moves = panels.add_panel(figure, (1.9, 3.15, 4.6, height), "hollow: clean image; filled: corrupted")
    before, after = np.array(found).transpose(1, 0, 2)  # [C, K] each
    panels.plot_moves(before[:, truth], after[:, truth], moves, right=after.argmax(1) == truth)
    panels.write_names(list(candidates), moves, width=24)
    across = moves.get_yaxis_transform()
    for row, pair in enumerate(found):
        words = [f"{shorten(names[int(one.argmax())], 36)} ({one.max():.0%})" for one in pair]
        moves.text(1.04, row, f"clean: {words[0]}\nnow: {words[1]}", transform=across, va="center", fontsize=8)
    words = "dot: the corrupted image is classified correctly; cross: it is not"
    panels.add_caption(figure, height + 3.65, words)
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
    adapter = control("Dropdown", "adapter", options=list(adapted), layout={"width": "27em"})
    controls = {"adapter": adapter, **_corruption_controls(dataset, suite)}
    draw = partial(adapters_view, base, adapted, dataset, class_features, suite=suite, seed=seed)
    return Instrument(draw, controls)


def explore_corruptions(
    candidates: Mapping[str, Candidate], dataset: ImageDataset, *, suite: str = "medimeta-c", seed: int = 0
) -> Instrument:
    """Build the instrument of notebook 05: image, corruption and severity; spectrum and answers of every model."""
    draw = partial(corruption_view, candidates, dataset, suite=suite, seed=seed)
    return Instrument(draw, _corruption_controls(dataset, suite))


def _corruption_controls(dataset: ImageDataset, suite: str) -> dict[str, Any]:
    return {
        "index": image_slider(len(dataset)),
        "corruption": control("Dropdown", "corruption", options=find_suite(suite).names(dataset.id)),
        "severity": control("IntSlider", "severity", value=3, min=0, max=5, tooltip="0: clean, 5: strongest"),
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
