import dataclasses
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import beta, binom, norm

import medrobust_lib as mr
from medrobust_lib.smoothing.certificate import ABSTAIN, GUARANTEES, Certificate, Guarantee
from medrobust_lib.smoothing.certify import certify, predict
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE
from medrobust_lib.smoothing.sequential import sequential_plan

SIGMA = 0.25
ADDRESS = {"seed": 3, "dataset": "phantom/test", "index": 7}
SHAPE = (3, 4, 4)


@pytest.fixture
def image():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))


def brighter_than(threshold):
    """Class 1 where the mean pixel exceeds a threshold."""
    return lambda pixels: (pixels.flatten(1).mean(1) > threshold).long()


def constant(label):
    return lambda pixels: torch.full((len(pixels),), label)


def of_mean_pixel(image, sigma, share):
    """Threshold that a given share of the noisy copies exceed."""
    return float(image.mean()) - sigma * image.numel() ** -0.5 * norm.ppf(share)


def bands(image, sigma, n_classes):
    """Classes 0 to K - 1 of equal probability: the mean pixel falls between quantiles of its law under noise."""
    edges = torch.tensor([of_mean_pixel(image, sigma, 1 - k / n_classes) for k in range(1, n_classes)])
    return lambda pixels: torch.bucketize(pixels.flatten(1).mean(1), edges)


def labels_of(classifier, image, sigma, role, n):
    stream = NoiseStream(**ADDRESS, sigma=sigma, role=role)
    return classifier(noisy_copies(image, stream, count=n)).numpy()


def cohen_certify(classifier, image, *, sigma, n0, n, alpha):
    """CERTIFY of Cohen et al. 2019, section 3.2.2, from the pseudo-code: (class, radius, p_lower, count)."""
    guess = np.bincount(labels_of(classifier, image, sigma, "select", n0)).argmax()
    count = (labels_of(classifier, image, sigma, "estimate", n) == guess).sum()
    p_lower = beta.ppf(alpha, count, n - count + 1) if count else 0.0
    return (guess, sigma * norm.ppf(p_lower), p_lower, count) if p_lower > 0.5 else (-1, 0.0, p_lower, count)


@pytest.mark.parametrize("share", [0.02, 0.35, 0.5, 0.6, 0.9, 0.99, 0.9999])
def test_fixed_sampling_is_the_published_procedure(image, share):
    classifier = brighter_than(of_mean_pixel(image, SIGMA, share))
    numbers = {"sigma": SIGMA, "n0": 50, "n": 400, "alpha": 0.001}
    predicted, radius, p_lower, k = cohen_certify(classifier, image, **numbers)
    found = certify(classifier, image, **numbers, bounds="one", **ADDRESS)
    assert (found.predicted, found.k, found.n, found.n0) == (predicted, k, 400, 50)
    assert (found.bounds, found.p_upper) == ("one", 1 - found.p_lower)
    # Two classes leave nothing to bound a second time.
    assert certify(classifier, image, **numbers, bounds="two", **ADDRESS) == found
    assert found.radius == pytest.approx(radius, abs=1e-12)
    assert found.p_lower == pytest.approx(p_lower, abs=1e-12)
    assert found.abstained == (predicted == -1)


@pytest.mark.parametrize("n_classes", [3, 5])
def test_one_bound_is_the_published_procedure_for_many_classes_too(image, n_classes):
    numbers = {"sigma": SIGMA, "n0": 50, "n": 400, "alpha": 0.001}
    edges = torch.tensor([of_mean_pixel(image, SIGMA, 0.7), of_mean_pixel(image, SIGMA, 0.15)])
    for classifier in (bands(image, SIGMA, n_classes), lambda x: torch.bucketize(x.flatten(1).mean(1), edges)):
        found = certify(classifier, image, **numbers, bounds="one", **ADDRESS)
        assert (found.predicted, found.radius, found.p_lower, found.k) == cohen_certify(classifier, image, **numbers)


@pytest.mark.parametrize("sampling", ["fixed", "sequential"])
def test_two_bounds_certify_an_answer_below_one_half(image, sampling):
    """Class 1 has .45, of nine others none more than .07: the first bound alone proves nothing."""
    edges = [of_mean_pixel(image, SIGMA, 1 - share) for share in (0.07, 0.14, 0.21, 0.28, 0.73, 0.8, 0.86, 0.93)]

    def classifier(pixels):
        return torch.bucketize(pixels.flatten(1).mean(1), torch.tensor(edges))

    numbers = {"sigma": SIGMA, "n": 1000, "sampling": sampling, **ADDRESS}
    radii = [0.05, 0.1, 0.15, 0.3] if sampling == "sequential" else None
    one, two = (certify(classifier, image, **numbers, radii=radii, bounds=bounds) for bounds in ("one", None))
    assert one.abstained
    assert (two.predicted, two.bounds) == (4, "two")
    assert 0.1 <= two.radius < SIGMA / 2 * (norm.ppf(0.45) - norm.ppf(0.07))
    assert two.p_lower < 0.45
    assert 0.07 < two.p_upper < two.p_lower
    assert two.radius <= SIGMA / 2 * (norm.ppf(two.p_lower) - norm.ppf(two.p_upper)) + 1e-12
    assert f"prove a probability above {str(two.p_lower)[:6]}, and below " in str(two)


def test_the_true_radius_is_approached_from_below(image):
    classifier = brighter_than(of_mean_pixel(image, SIGMA, 0.9))
    radii = [certify(classifier, image, sigma=SIGMA, n=n, **ADDRESS).radius for n in (100, 1000, 10_000)]
    true = SIGMA * norm.ppf(0.9)  # the distance to the hyperplane of equal mean
    assert radii == sorted(radii)
    assert 0.93 * true < radii[-1] < true


def test_a_constant_classifier_reaches_the_largest_radius_of_n_draws(image):
    certificate = certify(constant(2), image, sigma=SIGMA, n=10_000)
    assert certificate.radius == pytest.approx(3.1986 * SIGMA, abs=1e-4)
    assert (certificate.predicted, certificate.k, certificate.draws) == (2, 10_000, 10_100)


def test_selection_and_estimation_see_different_noise_and_only_their_own(image):
    seen = []

    def classifier(pixels):
        seen.append(pixels.clone())
        return torch.zeros(len(pixels), dtype=torch.int64)

    certify(classifier, image, sigma=SIGMA, n0=30, n=100, **ADDRESS, batch_size=1000)
    selection, estimation = seen
    for role, found, count in (("select", selection, 30), ("estimate", estimation, 100)):
        assert torch.equal(found, noisy_copies(image, NoiseStream(**ADDRESS, sigma=SIGMA, role=role), count=count))
    assert not torch.isclose(selection[:, None], estimation[None]).flatten(2).all(dim=2).any()


def test_votes_of_selection_are_not_counted(image):
    """The favourite of few selection draws is a lucky one; only fresh draws are fair to it."""
    classifier = bands(image, SIGMA, 5)
    found = certify(classifier, image, sigma=SIGMA, n0=10, n=500, **ADDRESS)
    selected = np.bincount(labels_of(classifier, image, SIGMA, "select", 10)).argmax()
    assert found.k == (labels_of(classifier, image, SIGMA, "estimate", 500) == selected).sum()
    assert found.predicted == ABSTAIN


@pytest.mark.parametrize("sampling", ["fixed", "sequential"])
@pytest.mark.parametrize("label", [None, 1])
def test_certificates_do_not_depend_on_the_batch_size(image, sampling, label):
    classifier = brighter_than(of_mean_pixel(image, SIGMA, 0.93))
    certificates = {
        certify(
            classifier, image, sigma=SIGMA, n0=70, n=500, sampling=sampling, label=label, batch_size=size, **ADDRESS
        )
        for size in (1, 7, 64, 1000, None)
    }
    assert len(certificates) == 1
    assert certificates.pop().predicted == 1


def test_another_address_is_other_noise(image):
    classifier = brighter_than(of_mean_pixel(image, SIGMA, 0.7))
    others = [{**ADDRESS, "seed": 4}, {**ADDRESS, "dataset": "phantom/other"}, {**ADDRESS, "index": 8}]
    counts = {certify(classifier, image, sigma=SIGMA, n=2000, **address).k for address in [ADDRESS, *others]}
    assert len(counts) == 4


@pytest.mark.parametrize("sigma", [1, 1.0, np.float64(1)])
def test_equal_noise_levels_are_the_same_noise_however_they_are_written(image, sigma):
    classifier = brighter_than(of_mean_pixel(image, 1.0, 0.7))
    found = certify(classifier, image, sigma=sigma, n=300, seed=np.int64(3), dataset="phantom/test", index=7)
    assert found.k == (labels_of(classifier, image, 1.0, "estimate", 300) == 1).sum()


# Answers that count for no class


def test_an_answer_below_zero_is_a_vote_against(image):
    threshold = of_mean_pixel(image, SIGMA, 0.8)

    def hesitant(pixels):
        return torch.where(brighter_than(threshold)(pixels) == 1, 3, -1)

    found = certify(hesitant, image, sigma=SIGMA, n=400, **ADDRESS)
    assert found.predicted == 3
    assert found.k == (labels_of(hesitant, image, SIGMA, "estimate", 400) == 3).sum() < 400


@pytest.mark.parametrize("sampling", ["fixed", "sequential"])
def test_a_classifier_without_any_answer_abstains(image, sampling):
    found = certify(constant(-1), image, sigma=SIGMA, n0=25, n=100, sampling=sampling)
    assert (found.predicted, found.radius, found.p_lower, found.k, found.n, found.draws) == (ABSTAIN, 0, 0, 0, 0, 25)
    assert predict(constant(-1), image, sigma=SIGMA) == ABSTAIN


# Gradients


def test_a_base_classifier_may_use_gradients_of_its_own_and_none_are_kept_otherwise(image):
    def classifier(pixels):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            bias = torch.zeros((), requires_grad=True)
            (bias * pixels.flatten(1).mean(1) + bias).sum().backward()
        assert bias.grad > 0
        return torch.ones(len(pixels), dtype=torch.int64)

    assert certify(classifier, image.clone().requires_grad_(True), sigma=SIGMA, n=100).predicted == 1


# Sequential sampling


def test_sequential_sampling_follows_its_plan_on_the_same_draws(image):
    classifier = brighter_than(of_mean_pixel(image, SIGMA, 0.9))
    radii = (0.1, 0.2, 0.3)
    plan = sequential_plan(sigma=SIGMA, radii=radii, n=2000, alpha=0.001)
    votes = np.cumsum(labels_of(classifier, image, SIGMA, "estimate", 2000))
    proved = 0
    for look, draws in enumerate(plan.looks):
        proved, finished, *_ = plan.step(look, int(votes[draws - 1]), proved)
        if finished:
            break
    found = certify(classifier, image, sigma=SIGMA, n=2000, sampling="sequential", radii=radii, **ADDRESS)
    assert (found.k, found.n, found.n_max) == (votes[draws - 1], draws, 2000)
    assert found.radius == plan.radii[proved - 1] == 0.2
    assert found.p_lower == pytest.approx(norm.cdf(0.2 / SIGMA))


def test_sequential_sampling_stops_when_the_question_is_answered(image):
    numbers = {"sigma": SIGMA, "n": 10_000, "sampling": "sequential", "radii": (0.0, 0.1)}
    certain = certify(constant(1), image, **numbers)
    hopeless = certify(constant(1), image, **numbers, label=0)
    assert (certain.predicted, certain.radius) == (1, 0.1)
    assert (hopeless.predicted, hopeless.k) == (ABSTAIN, 0)
    assert certain.n < 100
    assert hopeless.n < 100


def test_sequential_sampling_without_radii_asks_for_a_fine_grid(image):
    radius = certify(constant(1), image, sigma=SIGMA, n=1000, sampling="sequential").radius
    assert radius / SIGMA / 0.05 == pytest.approx(round(radius / SIGMA / 0.05), abs=1e-9)
    assert 2.2 * SIGMA < radius < 2.47 * SIGMA


# Evaluate mode


def test_evaluate_mode_tests_the_given_label_without_selection(image):
    classifier = brighter_than(of_mean_pixel(image, SIGMA, 0.9))
    right, wrong = (certify(classifier, image, sigma=SIGMA, n=500, label=label, **ADDRESS) for label in (1, 0))
    selected = certify(classifier, image, sigma=SIGMA, n=500, **ADDRESS)
    assert dataclasses.replace(right, mode="predict", n0=100) == selected
    assert (right.mode, right.n0, right.draws) == ("evaluate", 0, 500)
    assert (wrong.predicted, wrong.radius, wrong.k) == (ABSTAIN, 0, 500 - right.k)
    assert certify(classifier, image, sigma=SIGMA, n0=0, n=500, label=1, **ADDRESS) == right


def test_two_bounds_of_a_known_label_take_selection_draws_for_the_choice_alone(image):
    seen = []

    def classifier(pixels):
        seen.append(len(pixels))
        return torch.arange(len(pixels)) % 5 // 2  # .4, .4, .2: selection would take class 0

    numbers = {"sigma": SIGMA, "n0": 100, "n": 2000, "label": 2, "batch_size": 10_000, **ADDRESS}
    assert (certify(classifier, image, **numbers).bounds, seen) == ("one", [2000])
    two = certify(classifier, image, **numbers, bounds="two")
    assert seen[1:] == [100, 2000]
    assert (two.mode, two.n0, two.draws, two.k, two.predicted) == ("evaluate", 100, 2100, 400, ABSTAIN)
    assert two.bounds == "two"


# Records and words


class Stub:
    id = "stub"
    dtype = torch.bfloat16

    def __call__(self, pixels):
        return torch.ones(len(pixels), dtype=torch.int64)


def test_a_certificate_records_how_it_was_made(image):
    found = certify(Stub(), image, sigma=SIGMA, n0=20, n=200, alpha=0.01, sampling="sequential", radii=[0.1], seed=5)
    assert isinstance(found, Certificate)
    record = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    n = record.pop("n")
    assert n == record.pop("k") <= 200
    assert found.draws == 20 + n
    assert record == {
        "predicted": 1,
        "radius": 0.1,
        "p_lower": pytest.approx(norm.cdf(0.4)),
        "p_upper": pytest.approx(norm.cdf(-0.4)),
        "bounds": "one",
        "n0": 20,
        "n_max": 200,
        "alpha": 0.01,
        "sigma": 0.25,
        "sampling": "sequential",
        "mode": "predict",
        "guarantee": "standard",
        "seed": 5,
        "model": "stub",
        "dtype": "bfloat16",
        "device": "cpu",
        "image_shape": SHAPE,
        "perturbation": PIXEL_NOISE,
        "dataset": "",
    }


def test_a_plain_function_answers_float32_noise_whatever_the_image_was(image):
    seen = set()

    def classifier(pixels):
        seen.add(pixels.dtype)
        return torch.ones(len(pixels), dtype=torch.int64)

    found = certify(classifier, image.double(), sigma=SIGMA, n=100)
    assert (found.model, found.dtype, seen) == ("own classifier", "float32", {torch.float32})


def test_a_certificate_says_what_it_proves(image):
    text = str(certify(constant(1), image, sigma=SIGMA, n=1000))
    assert text.startswith("class 1 within L2 radius 0.6158 of this image ([0, 1] pixels, 3 x 4 x 4): 1000 of 1000")
    assert "at sigma 0.25 (fixed sampling, alpha 0.001)" in text
    assert f"Guarantee (standard): {GUARANTEES['standard']}" in text
    assert "evaluation only" not in text


def test_the_words_never_promise_more_than_the_numbers(image):
    certificate = certify(constant(1), image, sigma=SIGMA, n=100)
    text = str(dataclasses.replace(certificate, p_lower=0.99996, radius=0.98599))
    assert "a probability above 0.9999." in text
    assert "within L2 radius 0.9859 of" in text
    assert "for every other class" not in text
    text = str(dataclasses.replace(certificate, bounds="two", p_lower=0.41236, p_upper=0.21231))
    assert "prove a probability above 0.4123, and below 0.2124 for every other class. Guarantee" in text
    certificate = certify(constant(1), image, sigma=SIGMA, n=100, sampling="sequential", radii=[0.3])
    assert "within L2 radius 0.3 of" in str(certificate)


def test_a_certificate_of_a_known_label_says_so(image):
    for label in (1, 0):  # certified and not
        text = str(certify(constant(1), image, sigma=SIGMA, n=100, label=label))
        assert "the class was the known label, so this serves evaluation only" in text


def test_an_abstention_promises_nothing(image):
    text = str(certify(bands(image, SIGMA, 3), image, sigma=SIGMA, n=100, **ADDRESS))
    assert text.startswith("abstain: ")
    assert "radius" not in text
    assert "Guarantee" not in text


def test_an_abstention_of_two_bounds_says_what_they_lack(image):
    text = str(certify(bands(image, SIGMA, 9), image, sigma=SIGMA, n=100, **ADDRESS))
    assert "prove no lead over every other class" in text
    assert "radius" not in text


def test_certify_is_a_public_name():
    assert mr.certify is certify
    assert mr.predict is predict
    assert mr.Certificate is Certificate


# PREDICT


def first_copies_are_one(count):
    """Answers 1 for the first `count` copies and 0 for the others, whatever they show."""
    seen = 0

    def classifier(pixels):
        nonlocal seen
        numbers = torch.arange(seen, seen + len(pixels))
        seen += len(pixels)
        return (numbers < count).long()

    return classifier


@pytest.mark.parametrize(("count", "answer"), [(100, 1), (67, 1), (66, ABSTAIN), (50, ABSTAIN), (34, ABSTAIN), (33, 0)])
def test_predict_answers_from_67_of_100_votes_at_alpha_001(image, count, answer):
    assert predict(first_copies_are_one(count), image, sigma=SIGMA, n=100, alpha=0.001) == answer


def test_predict_compares_the_two_most_frequent_answers(image):
    """40 votes against 14 settle it, although 46 went to others."""

    def classifier(pixels):
        return torch.tensor([5] * 40 + [2] * 14 + [0, 1, 3, 4] * 11 + [-1] * 2)

    assert 2 * binom.sf(39, 54, 0.5) < 0.001
    assert predict(classifier, image, sigma=SIGMA, n=100, batch_size=100) == 5


def test_predict_uses_the_selection_noise_and_any_batch_size(image):
    classifier = brighter_than(of_mean_pixel(image, SIGMA, 0.64))
    votes = int(labels_of(classifier, image, SIGMA, "select", 200).sum())
    expected = 1 if 2 * binom.sf(votes - 1, 200, 0.5) <= 0.001 else ABSTAIN
    found = {predict(classifier, image, sigma=SIGMA, n=200, batch_size=b, **ADDRESS) for b in (1, 7, 64, 1000)}
    assert found == {expected}


def test_predict_is_wrong_no_more_often_than_alpha(image):
    """At equal probabilities either answer is as good as wrong: it must abstain but for a share alpha of the seeds."""
    classifier = brighter_than(of_mean_pixel(image, SIGMA, 0.5))
    answers = [predict(classifier, image, sigma=SIGMA, n=40, alpha=0.1, seed=seed) for seed in range(400)]
    assert 0 < sum(answer != ABSTAIN for answer in answers) <= binom.ppf(0.999, 400, 0.1)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n": 9},
            r"n=9 draws can never certify at alpha=0\.001: even 9 of 9 give p_lower=0\.464 .*; use n >= 10",
        ),
        ({"n": 0}, "n=0 draws can never certify"),
        ({"alpha": 0.0}, r"alpha=0\.0: the failure probability of a certificate lies in \(0, 1\)"),
        ({"alpha": 1.0}, r"alpha=1\.0"),
        ({"sigma": 0.0}, r"sigma=0\.0: smoothing needs noise"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"sampling": "adaptive"}, "unknown sampling 'adaptive'; choose one of fixed, sequential"),
        ({"n0": 0}, "n0=0: choosing a class takes at least one selection draw"),
        ({"bounds": "three"}, "unknown bounds 'three'; choose one of one, two"),
        ({"bounds": "two", "label": 0, "n0": 0}, "n0=0: choosing between one bound and two takes at least one"),
        ({"label": -1}, "label=-1: the known label is a class, 0 or higher"),
        ({"batch_size": 0}, "batch_size=0: at least one noisy copy"),
        ({"sampling": "sequential", "radii": [-0.1]}, r"certified radii are finite and >= 0"),
    ],
)
def test_bad_parameters_of_certify_are_named(image, change, message):
    with pytest.raises(ValueError, match=message):
        certify(constant(0), image, **{"sigma": SIGMA, "n": 100, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 10}, r"n=10 draws can never answer at alpha=0\.001, unanimous or not; use n >= 11"),
        ({"n": 0}, "n=0 draws can never answer"),
        ({"alpha": 2.0}, r"alpha=2\.0"),
        ({"sigma": -1.0}, r"sigma=-1\.0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_parameters_of_predict_are_named(image, change, message):
    with pytest.raises(ValueError, match=message):
        predict(constant(0), image, **{"sigma": SIGMA, **change})


def test_eleven_unanimous_votes_suffice_for_predict(image):
    assert predict(constant(4), image, sigma=SIGMA, n=11) == 4


@pytest.mark.parametrize("function", [certify, predict])
@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda x: x * 255, ValueError, r"image values range over \[.*\]: expected \[0, 1\], without normalisation"),
        (lambda x: x - 0.6, ValueError, "expected \\[0, 1\\]"),
        (lambda x: x.where(x > 0.5, torch.nan), ValueError, r"range over \[nan, nan\]"),
        (
            lambda x: x[None],
            TypeError,
            r"image must be float \[3, H, W\] in \[0, 1\], not .*32 \(1, 3, 4, 4\)",
        ),
        (lambda x: x[0], TypeError, r"not torch\.float32 \(4, 4\)"),
        (lambda x: x.permute(1, 2, 0), TypeError, r"not torch\.float32 \(4, 4, 3\)"),
        (
            lambda x: (x * 255).byte(),
            TypeError,
            r"not torch\.uint8 \(3, 4, 4\); `model\.prepare\(images\)\[0\]`",
        ),
        (lambda x: x.numpy(), TypeError, "not ndarray"),
    ],
)
def test_bad_images_are_refused(image, function, broken, error, message):
    with pytest.raises(error, match=message):
        function(constant(0), broken(image), sigma=SIGMA)


SCORES = r"logits \[b, K\] need \.argmax\(1\), probabilities \[b\] of one class \(p > 0\.5\)"


@pytest.mark.parametrize("function", [certify, predict])
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda n: torch.randn(n, 5), TypeError, rf"got torch\.float32 \(\d+, 5\); {SCORES}"),
        (lambda n: torch.zeros(n), TypeError, rf"expected int64 \(\d+,\), got torch\.float32 \(\d+,\); {SCORES}"),
        (lambda n: torch.zeros(n, dtype=torch.bfloat16), TypeError, r"got torch\.bfloat16"),
        (lambda n: np.full(n, np.nan), TypeError, r"got float64 \((\d+),\), \1 of them NaN or infinite"),
        (lambda n: [0.0, np.inf] * (n // 2), TypeError, r"got list \(\d+,\), \d+ of them NaN or infinite"),
        (lambda n: torch.zeros(1, dtype=torch.int64), TypeError, r"got torch\.int64 \(1,\)"),
        (lambda n: np.zeros((n, 1), dtype=int), TypeError, r"got int64 \(\d+, 1\)"),
        (lambda n: [[0], [0, 1]] * (n // 2), TypeError, "got list"),
        (lambda n: ["cat"] * n, TypeError, "got list"),
        (lambda n: [None] * n, TypeError, "got list"),
        (lambda n: None, TypeError, "got NoneType"),
        (lambda n: 3, TypeError, "got int"),
        (lambda n: torch.full((n,), 10**6), ValueError, "the label 1000000: classes are 0 to 999999; answer below 0"),
        (lambda n: np.full(n, 2**63, dtype=np.uint64), ValueError, "the label 9223372036854775808: classes are"),
    ],
)
def test_bad_answers_are_refused(image, function, answer, error, message):
    with pytest.raises(error, match=message):
        function(lambda pixels: answer(len(pixels)), image, sigma=SIGMA)


@pytest.mark.parametrize(
    "given",
    [
        lambda labels: labels.int(),
        lambda labels: labels.bool(),
        lambda labels: labels.numpy(),
        lambda labels: labels.numpy().astype(np.uint8),
        lambda labels: labels.numpy().astype(bool),
        lambda labels: labels.tolist(),
        lambda labels: list(labels),
        lambda labels: pd.Series(labels.numpy()),
    ],
    ids=["int32", "torch bool", "numpy", "uint8", "numpy bool", "list", "list of tensors", "pandas"],
)
def test_whole_numbers_are_labels_whatever_holds_them(image, given):
    classifier = brighter_than(of_mean_pixel(image, SIGMA, 0.9))
    for function in (certify, predict):
        expected = function(classifier, image, sigma=SIGMA, n=300, **ADDRESS)
        assert function(lambda pixels: given(classifier(pixels)), image, sigma=SIGMA, n=300, **ADDRESS) == expected


def test_what_gives_no_labels_is_refused_with_what_does(model, image):
    prepared = model.prepare(np.zeros((1, 64, 64, 3), dtype=np.uint8))[0]
    for function in (certify, predict):
        with pytest.raises(TypeError, match="demo-clip is a dual encoder, which gives features and no label") as caught:
            function(model, prepared, sigma=SIGMA)
        for given, named in ((torch.nn.Linear, "the class Linear"), ("demo-clip", "'demo-clip'"), (image, "tensor")):
            with pytest.raises(TypeError, match=rf"maps \[b, 3, H, W\] to labels \[b\], not {named}"):
                function(given, image, sigma=SIGMA)
    # The lines of the message do what they say.
    lines = "\n".join(line.strip() for line in str(caught.value).splitlines()[1:]).replace("...", "sigma=SIGMA, n=100")
    names = {"model": model, "image": prepared, "classes": ["a", "b"], "templates": ["{}"]}
    exec(lines.replace("certify(", "found = certify("), globals(), names)
    features = model.class_features(["a", "b"], ["{}"])
    direct = certify(lambda pixels: (model.encode_image(pixels) @ features.T).argmax(1), prepared, sigma=SIGMA, n=100)
    assert names["found"] == dataclasses.replace(direct, model="demo-clip")


def test_a_network_in_training_mode_is_refused():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout())
    for ask in (certify, predict):
        with pytest.raises(ValueError, match=r"Sequential is in training mode.*call .eval\(\) first"):
            ask(network, torch.zeros(3, 2, 2), sigma=0.1)


def test_noise_in_units_of_0_to_255_is_refused():
    with pytest.raises(ValueError, match=r"sigma=64.0: .* divide a level in 0 to 255 units by 255 \(0.251\)"):
        certify(lambda pixels: torch.zeros(len(pixels), dtype=torch.int64), torch.zeros(3, 2, 2), sigma=64.0)


def test_every_guarantee_has_its_sentence_and_no_other():
    assert set(GUARANTEES) == set(get_args(Guarantee))
    assert all(sentence and "\n" not in sentence for sentence in GUARANTEES.values())
