"""Certificates against the truth, for classifiers whose smoothed answer and radius are known exactly.

The base classifier [w.x + b > 0] is linear: under noise it answers 1 with probability
Phi((w.x + b) / (sigma ||w||)), and its smoothed answer changes exactly at the distance |w.x + b| / ||w||.
"""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, multinomial, norm

from medrobust_lib.smoothing import bounds
from medrobust_lib.smoothing.certificate import ABSTAIN, GUARANTEES
from medrobust_lib.smoothing.certify import FixedPlan, Rules, Verdict, certify, take_votes
from medrobust_lib.smoothing.sequential import Proof, operating_characteristics, sequential_plan

ALPHA = 0.05  # far larger than in use, so that a few thousand cases can tell a broken bound
N, N0, SIGMA = 300, 30, 0.5
RADII = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SAMPLINGS = ("fixed", "sequential")
MODES = ("predict", "evaluate")


def plan_of(sampling):
    return Rules(sampling=sampling, radii=RADII, n=N, alpha=ALPHA).plan(SIGMA)


def simulated(p_one: float, rng: np.random.Generator):
    """Answers of a binary classifier that says 1 with probability p_one, without pixels."""

    def answers(role, first, count, positions):
        return [torch.from_numpy((rng.random(count) < p_one).astype(np.int64)) for _ in positions]

    return answers


def random_margins(n_cases: int, rng: np.random.Generator) -> np.ndarray:
    """Signed distances to the decision boundary; a third of them just below a radius asked for, the worst case."""
    margins = rng.uniform(0, 2.2 * SIGMA, n_cases)
    hardest = rng.random(n_cases) < 1 / 3
    margins[hardest] = rng.choice(RADII, hardest.sum()) * (1 - 1e-9) + 1e-9 * SIGMA
    return margins * rng.choice([-1, 1], n_cases)


def is_false(verdict: Verdict, margin: float) -> bool:
    """Whether a certificate claims the wrong class or too large a ball."""
    if verdict.predicted == ABSTAIN:
        return False
    return verdict.predicted != int(margin > 0) or verdict.radius > abs(margin)


def false_certificates(plan, mode: str, *, n_cases: int, seed: int) -> int:
    rng = np.random.default_rng(seed)
    wrong = 0
    for margin in random_margins(n_cases, rng):
        # In evaluate mode the known label need not be the class that the classifier prefers.
        label = int(rng.integers(2)) if mode == "evaluate" and rng.random() < 0.3 else int(margin > 0)
        answers = simulated(norm.cdf(margin / SIGMA), rng)
        (verdict,) = take_votes(answers, [plan], n0=N0, label=label if mode == "evaluate" else None)
        wrong += is_false(verdict, margin)
    return wrong


def more_often_than_alpha(wrong: int, n_cases: int) -> float:
    """p-value of "certificates are false with probability at most alpha"."""
    return binomtest(wrong, n_cases, ALPHA, alternative="greater").pvalue


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_certificates_are_false_no_more_often_than_alpha(sampling, mode):
    plan = plan_of(sampling)
    wrong = false_certificates(plan, mode, n_cases=1500, seed=1)
    assert more_often_than_alpha(wrong, 1500) > 0.01
    assert wrong > 0, "a third of the cases are as hard as can be, so alpha is nearly used up"


class UnboundedPlan(FixedPlan):
    """Broken on purpose: trusts the share of votes."""

    def step(self, look, k, proved=0, rival=0):
        return Proof(k > self.n / 2, True, bounds.certified_radius(k / self.n, self.sigma), k / self.n)


class TwiceAlphaPlan(FixedPlan):
    """Broken on purpose: the lower end of a two-sided interval at the wrong alpha."""

    def step(self, look, k, proved=0, rival=0):
        return FixedPlan(self.sigma, self.n, 2 * self.alpha).step(look, k, proved)


class RepeatedPlan(FixedPlan):
    """Broken on purpose: the fixed-n bound, looked at again and again until it proves something."""

    @property
    def looks(self):
        return tuple(range(20, self.n + 1, 20))

    def step(self, look, k, proved=0, rival=0):
        found = super().step(look, k, proved)
        return found._replace(finished=bool(found.proved) or look == len(self.looks) - 1)


@pytest.mark.parametrize("broken", [UnboundedPlan, TwiceAlphaPlan])
def test_the_count_of_false_certificates_tells_a_broken_bound(broken):
    wrong = false_certificates(broken(sigma=SIGMA, n=N, alpha=ALPHA), "predict", n_cases=800, seed=2)
    assert more_often_than_alpha(wrong, 800) < 1e-4


def test_testing_again_until_it_succeeds_breaks_alpha():
    rng = np.random.default_rng(3)
    plan = RepeatedPlan(sigma=SIGMA, n=N, alpha=ALPHA)
    verdicts = [take_votes(simulated(0.5, rng), [plan], n0=N0, label=1)[0] for _ in range(200)]
    assert more_often_than_alpha(sum(v.predicted != ABSTAIN for v in verdicts), 200) < 1e-6


class LinearClassifier:
    """Class 1 on one side of a hyperplane of pixels of [3, H, W], class 0 on the other."""

    def __init__(self, weights: torch.Tensor, bias: float) -> None:
        self.weights, self.bias = weights, bias

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.flatten(1) @ self.weights.flatten() + self.bias > 0).long()


def linear_case(margin: float, rng: np.random.Generator) -> tuple[LinearClassifier, torch.Tensor]:
    """A random image and a random linear classifier whose boundary passes at a signed distance from it."""
    image = torch.from_numpy(rng.random((3, 2, 2), dtype=np.float32))
    weights = torch.from_numpy(rng.standard_normal((3, 2, 2), dtype=np.float32))
    bias = margin * float(weights.norm()) - float(weights.flatten() @ image.flatten())
    return LinearClassifier(weights, bias), image


@pytest.mark.parametrize(("sampling", "mode"), [("fixed", "predict"), ("sequential", "evaluate")])
def test_certificates_from_noisy_pixels_are_false_no_more_often_than_alpha(sampling, mode):
    rng = np.random.default_rng(4)
    wrong = 0
    for case, margin in enumerate(random_margins(200, rng)):
        classifier, image = linear_case(margin, rng)
        certificate = certify(
            classifier,
            image,
            sigma=SIGMA,
            n0=N0,
            n=N,
            alpha=ALPHA,
            sampling=sampling,
            radii=RADII if sampling == "sequential" else None,
            label=int(margin > 0) if mode == "evaluate" else None,
            seed=case,
            batch_size=N,
        )
        wrong += is_false(certificate, margin)
    assert more_often_than_alpha(wrong, 200) > 0.01


def test_the_mean_radius_from_noisy_pixels_is_the_expected_one():
    rng = np.random.default_rng(5)
    margin = 1.2 * SIGMA
    radii = []
    for case in range(150):
        classifier, image = linear_case(margin, rng)
        radii.append(
            certify(classifier, image, sigma=SIGMA, n=200, alpha=ALPHA, label=1, seed=case, batch_size=200).radius
        )
    expected = bounds.expected_radius(norm.cdf(margin / SIGMA), 200, ALPHA, sigma=SIGMA)
    assert abs(np.mean(radii) - expected) < 4 * np.std(radii) / len(radii) ** 0.5
    assert np.mean(radii) < margin


@pytest.mark.parametrize("p", [0.6, 0.9, 0.99])
@pytest.mark.parametrize("mode", MODES)
def test_the_mean_radius_of_fixed_sampling_is_the_expected_one(p, mode):
    rng = np.random.default_rng(6)
    plan = plan_of("fixed")
    # With 300 selection draws the wrong class has no chance at these p.
    label = 1 if mode == "evaluate" else None
    radii = [take_votes(simulated(p, rng), [plan], n0=300, label=label)[0].radius for _ in range(800)]
    expected = bounds.expected_radius(p, N, ALPHA, sigma=SIGMA)
    assert abs(np.mean(radii) - expected) < 4 * np.std(radii) / len(radii) ** 0.5


@pytest.mark.parametrize("p", [0.4, 0.7, 0.95])
def test_sequential_sampling_does_what_its_plan_predicts(p):
    rng = np.random.default_rng(7)
    plan = plan_of("sequential")
    verdicts = [take_votes(simulated(p, rng), [plan], n0=N0, label=1)[0] for _ in range(700)]
    proved, draws = operating_characteristics(plan, p)
    for radius, chance in zip(plan.radii, proved, strict=True):
        found = sum(v.predicted == 1 and v.radius >= radius for v in verdicts)
        assert binomtest(found, len(verdicts), min(1.0, chance)).pvalue > 1e-3, radius
    spent = np.array([v.n for v in verdicts])
    assert abs(spent.mean() - draws) < 4 * spent.std() / len(spent) ** 0.5 + 1e-9


def test_sequential_sampling_of_a_wrong_label_stops_early():
    rng = np.random.default_rng(8)
    plan = plan_of("sequential")
    (verdict,) = take_votes(simulated(0.05, rng), [plan], n0=N0, label=1)
    assert verdict.predicted == ABSTAIN
    assert verdict.n < N / 4


# Why "frozen-prompt" is not "standard": one pixel decides which prompt is used.


def adapt(image: torch.Tensor):
    """Adapt to an image by its first value: both prompts give classifiers that are constant everywhere."""
    answer = int(image[0, 0, 0] >= 0.5)
    return lambda pixels: torch.full((len(pixels),), answer)


def at(value: float) -> torch.Tensor:
    image = torch.zeros(3, 1, 1)
    image[0, 0, 0] = value
    return image


def test_prompts_adapted_to_the_image_have_certificates_that_the_adapting_pipeline_breaks():
    left, right = at(0.499), at(0.501)
    distance = float((left - right).norm())
    certificates = [certify(adapt(image), image, sigma=0.25, n=1000) for image in (left, right)]
    largest = bounds.maximum_radius(1000, 0.001, 0.25)
    assert [c.radius for c in certificates] == [largest, largest]
    assert largest > 100 * distance
    # Each frozen classifier keeps its word at the other image, and yet the two pipelines disagree there.
    assert int(adapt(left)(right[None])) == certificates[0].predicted == 0
    assert int(adapt(right)(left[None])) == certificates[1].predicted == 1
    assert "not for a pipeline that adapts to the attacked image" in GUARANTEES["frozen-prompt"]
    assert "fixed before the image was seen" in GUARANTEES["standard"]


def test_adaptation_inside_the_base_classifier_is_certified_for_what_it_is():
    def per_sample(pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([adapt(noisy)(noisy[None]) for noisy in pixels])

    near = certify(per_sample, at(0.499), sigma=0.25, n=1000)
    assert near.abstained
    certificate = certify(per_sample, at(0.9), sigma=0.25, n=1000)
    assert certificate.predicted == 1
    assert 0.3 < certificate.radius <= 0.4  # the true distance to the change at 0.5 is 0.4


# Two bounds


TWO_N = 30


@pytest.fixture(scope="module")
def trinomial():
    """Every outcome of 30 draws of three classes, and true probabilities: a grid, and ties for the first place."""
    outcomes = np.array([(a, b, TWO_N - a - b) for a in range(TWO_N + 1) for b in range(TWO_N + 1 - a)])
    grid = np.array([(a, b, 40 - a - b) for a in range(41) for b in range(41 - a)]) / 40
    return outcomes, grid, np.array([multinomial.pmf(outcomes, TWO_N, p) for p in grid])


def proofs_of(plan, outcomes):
    return [plan.step(0, int(k), 0, int(max(others))) for k, *others in outcomes]


@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_two_fixed_bounds_fail_with_probability_at_most_alpha_exactly(trinomial, law):
    outcomes, grid, chances = trinomial

    def worst(alpha):
        proofs = proofs_of(FixedPlan(1.0, TWO_N, alpha, law, "two"), outcomes)
        lower, upper, radius = (
            np.array([getattr(p, name) for p in proofs]) for name in ("p_lower", "p_upper", "radius")
        )
        assert np.all(upper <= 1 - lower)
        true, second = grid[:, :1], grid[:, 1:].max(axis=1, keepdims=True)
        false_bound = (lower > true) | (upper < second)
        false_ball = radius > bounds.certified_radius(true, 1.0, p_upper=second, law=law) + 1e-12
        assert not np.any(false_ball & ~false_bound)
        return [(chances * false).sum(axis=1).max() for false in (false_bound, false_ball)]

    for found in worst(ALPHA):
        assert 0.2 * ALPHA < found <= ALPHA
    assert worst(2 * ALPHA)[0] > ALPHA, "a whole alpha for each of the two is too much"


@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_selection_that_sees_the_counts_takes_the_rule_with_the_larger_radius(trinomial, law):
    outcomes, *_ = trinomial
    one = FixedPlan(1.0, TWO_N, ALPHA, law)
    two = FixedPlan(1.0, TWO_N, ALPHA, law, "two")
    rules = set()
    for (k, *others), by_one, by_two in zip(outcomes, proofs_of(one, outcomes), proofs_of(two, outcomes), strict=True):
        chosen = one.chosen(int(k), int(max(others)), TWO_N)
        assert chosen.step(0, int(k), 0, int(max(others))).radius == max(by_one.radius, by_two.radius)
        rules.add((chosen.bounds, by_one.radius > 0, by_two.radius > 0))
    assert {("one", True, True), ("two", True, True), ("two", False, True)} <= rules


@pytest.mark.parametrize("law", ["normal", "exponential"])
@pytest.mark.parametrize(("n0", "n"), [(1, 30), (2, 31), (7, 100), (100, 1000)])
def test_two_classes_have_no_use_for_a_second_bound(n0, n, law):
    fixed = FixedPlan(SIGMA, n, ALPHA, law)
    sequential = sequential_plan(sigma=SIGMA, radii=RADII, n=n, alpha=ALPHA, law=law)
    for plan in (fixed, sequential):
        assert all(plan.chosen(k, n0 - k, n0) is plan for k in range(n0 + 1))


def of_many(p, rng):
    """Answers of a classifier with these probabilities, the last of which is for no class."""

    def answers(role, first, count, positions):
        drawn = rng.choice(len(p), size=count, p=p)
        return [torch.from_numpy(np.where(drawn == len(p) - 1, -1 - drawn % 3, drawn)) for _ in positions]

    return answers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_certificates_by_two_bounds_are_false_no_more_often_than_alpha(sampling, mode):
    """Nine classes and no class, two or more of them close; no class, too, must never be first."""
    rng, plan, wrong, by_two = np.random.default_rng(9), plan_of(sampling), 0, 0
    for case in range(700):
        shares = rng.dirichlet(np.full(10, 0.5))
        shares = np.sort(shares)[::-1]
        if case % 2:  # the worst case: two are equal
            shares[:2] = shares[:2].mean()
        rng.shuffle(shares)
        label = int(rng.integers(9)) if mode == "evaluate" else None
        (verdict,) = take_votes(of_many(shares, rng), [plan], n0=N0, label=label, bounds="two")
        by_two += verdict.bounds == "two"
        if verdict.predicted != ABSTAIN:
            true = shares[verdict.predicted]
            second = np.delete(shares, verdict.predicted).max()
            wrong += true <= second or verdict.radius > SIGMA / 2 * (norm.ppf(true) - norm.ppf(second))
    assert more_often_than_alpha(wrong, 700) > 0.01
    assert by_two > 100


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_answers_that_are_no_class_are_one_rival(sampling):
    rng, plan = np.random.default_rng(10), plan_of(sampling)

    def certified(p):
        return [take_votes(of_many(p, rng), [plan], n0=200, label=0, bounds="two")[0] for _ in range(40)]

    # .4 for class 0; what is left goes to eight classes, or is spread over three labels below 0.
    spread, together = certified([0.4, *[0.07] * 8, 0.04]), certified([0.4, *[0.02] * 8, 0.44])
    assert all(verdict.predicted == 0 and verdict.bounds == "two" for verdict in spread)
    assert sum(verdict.predicted == 0 for verdict in together) <= 40 * 3 * ALPHA


def test_classes_that_were_never_seen_are_rivals_without_votes():
    proof = FixedPlan(SIGMA, 200, ALPHA, bounds="two").step(0, 60, 0, 0)
    assert proof.proved
    assert proof.p_upper == bounds.upper_confidence_bound(0, 200, ALPHA / 2) > 0
