"""Certificates of generative models against the truth: answers whose probabilities, and robust radii, are known."""

import functools

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from medrobust_lib.generative.answers import AnswerBank, Drawing
from medrobust_lib.generative.certify import certify_answers, certify_generative
from medrobust_lib.generative.errors import ErrorRate, FalsePositives, SymmetricErrors
from medrobust_lib.generative.oracles import ExactMatch, OptionOracle, cluster_texts
from medrobust_lib.models.vision_language import Completion
from medrobust_lib.smoothing import bounds

ALPHA, SIGMA, N0 = 0.05, 0.5, 20  # alpha far larger than in use, so that some hundred cases tell a broken bound
IMAGE = torch.full((3, 8, 8), 0.5)

# The same counts come back thousands of times; certificates make their plans themselves, so remembering is put below.
exact_bound = bounds.lower_confidence_bound
cached_bound = functools.cache(exact_bound)


def lower_bound(k, n, alpha):
    return cached_bound(k, n, alpha) if isinstance(k, int) else exact_bound(k, n, alpha)


@pytest.fixture(autouse=True)
def remembered_bounds(monkeypatch):
    monkeypatch.setattr("medrobust_lib.smoothing.bounds.lower_confidence_bound", lower_bound)


class Named:
    id = "prescribed"

    def generate(self, pixels, prompt, **settings):
        raise AssertionError("every answer is prescribed")


def bank_of(select, estimate):
    """A bank whose answers are prescribed."""
    kept = {("select", number): Completion(text, finished=True) for number, text in enumerate(select)}
    kept |= {("estimate", number): Completion(text, finished=True) for number, text in enumerate(estimate)}
    return AnswerBank(Named(), IMAGE, "Which?", Drawing(sigma=SIGMA), kept=kept, batch_size=1)


def more_often_than(alpha, wrong, n_cases):
    """p-value of "this happens with probability at most alpha"."""
    return binomtest(wrong, n_cases, alpha, alternative="greater").pvalue


# K answers of equal probability: the selected one has the probability 1 / K, so no bound may exceed that.

CASES = [(2, 100), (10, 50), (50, 100)]
N_CASES = 600
MISSES_OF_SAME_SAMPLE = {(2, 100): 0.087, (10, 50): 0.24, (50, 100): 0.572}


def equal_answers(n_answers, n, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(n_answers, size=(N_CASES, N0 + n)).astype(str).tolist()


@pytest.mark.parametrize(("n_answers", "n"), CASES)
def test_separate_draws_for_clusters_and_votes_keep_alpha(n_answers, n):
    misses = false = 0
    for texts in equal_answers(n_answers, n, seed=1):
        composite = certify_answers(bank_of(texts[:N0], texts[N0:]), ExactMatch(), n0=N0, n=n, alpha=ALPHA).composite
        assert composite.n == n
        misses += composite.p_lower > 1 / n_answers
        false += not composite.abstained
    assert more_often_than(ALPHA, misses, N_CASES) > 0.01
    assert more_often_than(ALPHA, false, N_CASES) > 0.01
    assert misses > 0, "bounds that never miss would be needlessly loose"


@pytest.mark.parametrize(("n_answers", "n"), CASES)
def test_clusters_of_the_very_draws_that_are_counted_break_alpha(n_answers, n):
    """What the paper's Algorithm 2 does, taken as a certificate."""
    misses = 0
    for texts in equal_answers(n_answers, n, seed=2):
        clusters, _ = cluster_texts(texts[N0:], ExactMatch())
        misses += lower_bound(max(cluster.size for cluster in clusters), n, ALPHA) > 1 / n_answers
    expected = MISSES_OF_SAME_SAMPLE[n_answers, n]
    assert more_often_than(ALPHA, misses, N_CASES) < 1e-3
    assert binomtest(misses, N_CASES, expected).pvalue > 1e-3


class AnythingSeen:
    """Broken on purpose: it learns, so "equivalent" means "like any text that came before"."""

    name, version = "anything seen", "1"

    def __init__(self):
        self.seen = set()

    def equivalent(self, texts, representative):
        self.seen |= {*texts, representative}
        return [text in self.seen for text in texts]


def test_an_equivalence_that_learns_certifies_any_model():
    """This is why an oracle must be a fixed function of the text: the library cannot see that it is not."""
    texts = np.random.default_rng(3).integers(10**6, size=N0 + 100).astype(str).tolist()
    bank = bank_of(texts[:N0], texts[N0:])
    fooled = certify_answers(bank, AnythingSeen(), n0=N0, n=100, alpha=0.001).composite
    assert (fooled.k, fooled.p_lower) == (100, pytest.approx(0.933254, abs=1e-6))
    honest = certify_answers(bank, ExactMatch(), n0=N0, n=100, alpha=0.001).composite
    assert honest.abstained
    assert honest.k <= 1


# Truth of labels behind an oracle that errs


class Verbatim:
    """The label is the text."""

    name, version, labels = "verbatim", "1", ("harmless", "harmful")

    def label(self, texts):
        return list(texts)


@pytest.mark.parametrize("p", [0.45, 0.5, 0.7])
def test_corrected_certificates_keep_alpha_where_their_assumption_holds(p):
    """Harmful texts pass for harmless at the rate 0.3; the rate is estimated each time."""
    rng, wrong, misled, n_cases, n = np.random.default_rng(4), 0, 0, 300, 200
    for _ in range(n_cases):
        truths = rng.random(N0 + n) < p
        taken = truths | (rng.random(N0 + n) < 0.3)
        texts = np.where(taken, "harmless", "harmful").tolist()
        bank = bank_of(["harmless"] * N0, texts[N0:])
        rate = ErrorRate(errors=int(rng.binomial(300, 0.3)), trials=300)
        model = FalsePositives({"harmless": rate})
        found = certify_answers(bank, Verbatim(), n0=N0, n=n, alpha=ALPHA, error_model=model)
        wrong += found.corrected.p_lower > p
        symmetric = certify_answers(bank, Verbatim(), n0=N0, n=n, alpha=ALPHA, error_model=SymmetricErrors())
        misled += symmetric.corrected.p_lower > p
    assert more_often_than(ALPHA, wrong, n_cases) > 0.01
    assert more_often_than(ALPHA, misled, n_cases) < 1e-3, "the same errors, taken for symmetric ones"


# Truth in pixels: [w.x + b > 0] changes exactly at the distance |w.x + b| / ||w||.


class Sides:
    """Writes the side of a hyperplane that a copy lies on, in several wordings."""

    id = "sides"

    def __init__(self, weights, bias):
        self.weights, self.bias = weights, bias

    def generate(self, pixels, prompt, *, max_new_tokens, temperature, seed):
        scores = ((pixels * self.weights).sum(dim=(1, 2, 3)) + self.bias).tolist()
        return [
            f"It is {'bright' if score > 0 else 'dark'}{'!' * (own % 3)}"
            for score, own in zip(scores, seed, strict=True)
        ]


BRIGHTNESS = OptionOracle({"dark": (), "bright": ()})


class Saying:
    """Equivalent: the same word, whatever the marks behind it."""

    name, version = "saying", "1"

    def equivalent(self, texts, representative):
        return [text.strip("!") == representative.strip("!") for text in texts]


def hyperplane(margin, rng):
    """A model whose answer changes at a signed distance from the image."""
    weights = torch.from_numpy(rng.standard_normal((3, 8, 8))).float()
    length = float(weights.norm())
    return Sides(weights, margin * length - float((weights * IMAGE).sum()))


@pytest.mark.parametrize("oracle", [BRIGHTNESS, Saying()], ids=lambda oracle: oracle.name)
def test_certified_radii_exceed_the_true_distance_no_more_often_than_alpha(oracle):
    rng, wrong, useful, n_cases, n = np.random.default_rng(5), 0, 0, 250, 60
    for index in range(n_cases):
        margin = rng.choice([1e-3, 0.2, 0.5, 0.9]) * rng.choice([-1, 1])
        found = certify_generative(
            hyperplane(margin, rng), IMAGE, "Which side?", oracle, sigma=SIGMA, n0=10, n=n, alpha=ALPHA, index=index
        )
        said = found.answer.strip("!").removeprefix("It is ")
        claims = not found.composite.abstained
        wrong += claims and (said != ("bright" if margin > 0 else "dark") or found.composite.radius > abs(margin))
        useful += claims
    assert more_often_than(ALPHA, wrong, n_cases) > 0.01
    assert wrong > 0, "alpha is nearly used up"
    assert useful > n_cases / 3


def test_votes_have_the_probability_that_the_distance_gives():
    rng = np.random.default_rng(6)
    for margin in (-0.4, 0.1, 0.6):
        vlm = hyperplane(margin, rng)
        found = certify_generative(vlm, IMAGE, "Which side?", BRIGHTNESS, sigma=SIGMA, n0=50, n=2000, alpha=ALPHA)
        probability = norm.cdf(abs(margin) / SIGMA)
        assert binomtest(found.composite.k, 2000, probability).pvalue > 1e-3
        assert found.composite.radius == pytest.approx(abs(margin), abs=0.1)
        assert found.composite.radius < abs(margin)


def test_the_answer_holds_within_the_certified_radius_and_changes_beyond_the_distance():
    """Moved straight towards the hyperplane, which is the worst direction."""
    vlm = hyperplane(0.3, np.random.default_rng(7))
    towards = -vlm.weights / vlm.weights.norm()
    options = {"sigma": SIGMA, "n0": 50, "n": 2000, "alpha": 0.001}
    radius = certify_generative(vlm, IMAGE, "Which side?", BRIGHTNESS, **options).composite.radius
    assert 0.2 < radius < 0.3
    inside, outside = (
        certify_generative(vlm, (IMAGE + step * towards).clamp(0, 1), "Which side?", BRIGHTNESS, **options).answer
        for step in (0.75 * radius, 0.45)
    )
    assert (inside, outside) == ("bright", "dark")
