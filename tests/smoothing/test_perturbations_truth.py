"""Certificates of a corruption's parameter against the truth: known ranges, exact failure rates, and an attack."""

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from scipy.optimize import brentq
from scipy.stats import binom, binomtest

from medrobust_lib.smoothing import bounds
from medrobust_lib.smoothing.certificate import ABSTAIN
from medrobust_lib.smoothing.certify import FixedPlan, certify, predict
from medrobust_lib.smoothing.methods import PromptClassifier
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies
from medrobust_lib.smoothing.perturbations import find_perturbation
from medrobust_lib.smoothing.sequential import operating_characteristics, sequential_plan

# Classifiers whose range of one answer is known exactly: (classifier, true radius) of an image and a seed.


def random_image(seed, shape=(3, 12, 16)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def distance(seed, most):
    """How far an image lies from the decision, of either sign."""
    draw = np.random.default_rng(seed)
    return float(draw.uniform(0.05, most) * draw.choice([-1, 1]))


def of_mean(image, seed):
    """Brightness: the mean against a threshold; what is added moves it by as much."""
    away = distance(seed, 0.4)
    threshold = float(image.mean()) - away
    return lambda pixels: pixels.mean((1, 2, 3)) > threshold, abs(away)


def of_spread(image, seed):
    """Contrast: the standard deviation of a channel against a threshold; its log moves by k."""
    away = distance(seed, 0.8)
    threshold = float(image[1].std()) * math.exp(-away)
    return lambda pixels: pixels[:, 1].std((1, 2)) > threshold, abs(away)


def of_both(image, seed):
    """Contrast and brightness: a linear function of (k, b), whose distance counts in sigmas."""
    slopes, away = np.random.default_rng(seed).uniform(-1, 1, 2), distance(seed, 1.0)
    spread, mean = float(image[0].std()), float(image[2].mean())

    def classifier(pixels):
        k, b = (pixels[:, 0].std((1, 2)) / spread).log(), pixels[:, 2].mean((1, 2)) - mean
        return slopes[0] * k + slopes[1] * b + away > 0

    return classifier, abs(away) / math.hypot(*(slopes * SIGMAS["contrast-brightness"]))


def of_pixel(image, seed):
    """Gamma: one pixel against a threshold, x^(e^g) > t exactly where g < log(log t / log x)."""
    away, value = distance(seed, 1.2), float(image[0, 2, 3])
    threshold = value ** math.exp(away)
    return lambda pixels: pixels[:, 0, 2, 3] > threshold, abs(away)


def of_mean_power(image, seed):
    """Gamma: the mean of the powers falls with g; where it crosses is found by bisection."""
    away = distance(seed, 1.2)
    threshold = float((image.double() ** math.exp(away)).mean())
    found = brentq(lambda g: float((image.double() ** math.exp(g)).mean()) - threshold, -3, 3)
    assert found == pytest.approx(away, abs=1e-9)
    return lambda pixels: pixels.mean((1, 2, 3)) > threshold, abs(away)


def of_wave(image, seed):
    """Blur: one cosine of the image against a threshold that its damping reaches at variance s.

    The answer is 1 where variance plus exponential noise is below s, with probability 1 - exp((theta - s) / sigma): a
    majority as long as theta < s - sigma log 2.
    """
    row, column = 1 + seed % 3, seed % 4
    wave = np.zeros(image.shape[1:])
    wave[row, column] = 1
    wave = torch.from_numpy(dctn(wave, type=3, norm="ortho")).float()  # the inverse of type 2
    square = (np.pi * row / image.shape[1]) ** 2 + (np.pi * column / image.shape[2]) ** 2
    coefficient = float((image[0] * wave).sum())
    sign = math.copysign(1, coefficient)
    s = SIGMAS["blur"] * (math.log(2) + np.random.default_rng(seed).uniform(0.1, 2.5))
    threshold = abs(coefficient) * math.exp(-square * s / 2)
    return lambda pixels: sign * (pixels[:, 0] * wave).sum((1, 2)) > threshold, s - SIGMAS["blur"] * math.log(2)


SIGMAS = {"brightness": 0.2, "contrast": 0.4, "contrast-brightness": (0.4, 0.2), "gamma": 0.6, "blur": 2.0}
KNOWN = {
    "brightness": [of_mean],
    "contrast": [of_spread],
    "contrast-brightness": [of_both],
    "gamma": [of_pixel, of_mean_power],
    "blur": [of_wave],
}
CASES = [(name, make) for name, makers in KNOWN.items() for make in makers]


@pytest.mark.parametrize(("name", "make"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_no_certified_radius_exceeds_the_true_one(name, make):
    radii, shares = find_perturbation(name).radii, []
    for seed in range(25):
        image = random_image(seed)
        classifier, true = make(image, seed)
        address = {"sigma": SIGMAS[name], "perturbation": name, "n0": 20, "alpha": 0.001, "seed": seed}
        expected = int(classifier(image[None])[0])
        fixed = certify(classifier, image, n=400, **address)
        stopped = certify(classifier, image, n=400, sampling="sequential", radii=radii, **address)
        for found in (fixed, stopped):
            assert found.radius < true
            assert found.predicted in (expected, ABSTAIN)
        assert stopped.radius in (0.0, *radii)
        shares.append(fixed.radius / min(true, fixed.perturbation.unit(SIGMAS[name]) * 2))
    assert np.mean(shares) > 0.5


@pytest.mark.parametrize(("name", "make"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_many_draws_come_close_to_the_true_radius(name, make):
    image = random_image(3)
    family = find_perturbation(name)
    unit = family.unit(SIGMAS[name])
    seed = next(seed for seed in range(100) if 0.8 < make(image, seed)[1] / unit < 1.6)
    classifier, true = make(image, seed)
    found = certify(classifier, image, sigma=SIGMAS[name], perturbation=name, n=10_000)
    assert 0.9 * true < found.radius < true


@pytest.mark.parametrize("seed", range(5))
def test_what_looks_at_the_mean_alone_is_certified_for_every_contrast_that_the_draws_reach(seed):
    image = random_image(seed)
    classifier, _ = of_mean(image, seed)
    found = certify(classifier, image, sigma=0.4, perturbation="contrast", n=1000, seed=seed)
    assert found.radius == bounds.maximum_radius(1000, 0.001, 0.4)


def test_predict_answers_as_the_corrupted_image_is_answered():
    """On either side of the critical blur, s - sigma log 2."""
    image = random_image(3)
    classifier, true = of_wave(image, 3)
    blur = find_perturbation("blur")
    for theta, answer in ((0.0, 1), (true - 0.6, 1), (true + 0.6, 0)):
        blurred = blur.apply(image, torch.tensor([[theta]]))[0].clamp(0, 1)
        assert predict(classifier, blurred, sigma=2.0, perturbation="blur", n=2000) == answer


# How often a certificate is false at the worst case: a probability just at what a radius needs.


@pytest.mark.parametrize("law", ["normal", "exponential"])
@pytest.mark.parametrize("n", [50, 400, 2000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_fixed_certificates_fail_at_the_boundary_with_at_most_alpha(law, n, alpha):
    plan, votes = FixedPlan(sigma=0.7, n=n, alpha=alpha, law=law), np.arange(n + 1)
    radii = np.array([plan.step(0, int(k)).radius for k in votes])
    used = []
    for level in (0.0, 0.1, 0.5, 1.0, 1.5):
        p = bounds.needed_probability(0.7 * level, 0.7, law=law)
        # Exactly at the boundary every larger radius is false, and at radius 0 every claim is.
        failure = binom.pmf(votes, n, p)[radii > 0.7 * level * (1 + 1e-12)].sum()
        assert failure <= alpha * (1 + 1e-9)
        used.append(failure)
    assert max(used) > 0.3 * alpha


@pytest.mark.parametrize("law", ["normal", "exponential"])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_sequential_certificates_fail_at_the_boundary_with_at_most_alpha(law, alpha):
    plan = sequential_plan(sigma=0.7, radii=(0.0, 0.1, 0.3, 0.7, 1.0), n=600, alpha=alpha, law=law)
    assert len(plan.radii) == 5
    used = []
    for place, radius in enumerate(plan.radii):
        p = bounds.needed_probability(radius, 0.7, law=law)
        proved, _ = operating_characteristics(plan, p)
        assert proved[place] <= alpha * (1 + 1e-9)
        used.append(proved[place])
    assert max(used) > 0.3 * alpha


# The attack: with one or two parameters it can try them all.

POSITIONS = (0, 3, 4, 15)
ATTACKED = {"contrast": 0.3, "brightness": 0.1, "contrast-brightness": (0.3, 0.1), "gamma": 0.3, "blur": 0.3}
OUTSIDE = {"contrast": 2.0, "brightness": 0.5, "contrast-brightness": 5.0, "gamma": 2.0, "blur": 8.0}


@pytest.fixture(scope="module")
def data(phantoms):
    return phantoms("blood", n=16).subset(POSITIONS)


@pytest.fixture(scope="module")
def classifier(model, data):
    return PromptClassifier(model, model.class_features(data.classes, data.templates[:1]))


def rim(name, radius):
    """Parameters on the edge of the certified region, and on a grid inside it; for the blur on one side only."""
    if name == "contrast-brightness":
        angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
        scales = radius * np.array(ATTACKED[name])
        return [tuple(scales * (math.cos(angle), math.sin(angle))) for angle in angles] + [tuple(0.5 * scales / 2**0.5)]
    low = 0.0 if name == "blur" else -radius
    return [(float(theta),) for theta in np.linspace(low, radius, 7)]


@torch.inference_mode()
def answer(classifier, image, name, *, n):
    """The smoothed answer, by fresh draws; the image may have left [0, 1], as T is not clipped."""
    stream = NoiseStream(1, "attack", 0, ATTACKED[name], "select", find_perturbation(name))
    labels = classifier(noisy_copies(image, stream, count=n))
    first, second = torch.bincount(labels, minlength=2).sort(descending=True)[0][:2].tolist()
    told = binomtest(first, first + second, 0.5).pvalue < 0.001
    return int(labels.bincount().argmax()) if told else ABSTAIN


@pytest.mark.parametrize("name", ATTACKED)
def test_no_parameter_in_the_certified_range_changes_the_answer_and_some_outside_does(classifier, data, name):
    family, certified, outside = find_perturbation(name), 0, 0
    for place in (0, 2):
        image = classifier.model.prepare(data.images[place : place + 1])[0]
        address = {"dataset": data.id, "index": int(data.indices[place])}
        found = certify(classifier, image, sigma=ATTACKED[name], perturbation=name, n0=30, n=250, **address)
        if found.abstained:
            continue
        certified += 1
        for theta in rim(name, 0.999 * found.radius):
            assert family.covers(theta, found.radius, ATTACKED[name])
            changed = family.apply(image, torch.tensor([theta]))[0]
            assert answer(classifier, changed, name, n=64) in (found.predicted, ABSTAIN), theta
        for theta in rim(name, OUTSIDE[name]):
            changed = family.apply(image, torch.tensor([theta]))[0]
            outside += answer(classifier, changed, name, n=64) not in (found.predicted, ABSTAIN)
    assert certified
    assert outside
