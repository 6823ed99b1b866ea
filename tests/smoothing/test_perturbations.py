"""What is smoothed over: the families' group laws, their noise, their words, and what is refused."""

import hashlib
import itertools
import json
import math
import sys
from typing import ClassVar

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import fft, ndimage
from scipy.stats import kstest, norm

import medrobust_lib as mr
from medrobust_lib import metrics
from medrobust_lib.corruptions.suites import MEDIMETA_C, find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing
from medrobust_lib.smoothing.bounds import maximum_radius
from medrobust_lib.smoothing.certificate import Certificate
from medrobust_lib.smoothing.certify import certify, predict
from medrobust_lib.smoothing.methods import FixedPrompts
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies
from medrobust_lib.smoothing.perturbations import (
    PERTURBATIONS,
    PIXEL_NOISE,
    Contrast,
    Perturbation,
    as_level,
    check_levels,
    find_perturbation,
)

CORRUPTIONS = [name for name in PERTURBATIONS if name != PIXEL_NOISE.name]
SHAPES = [(3, 8, 8), (3, 7, 12), (3, 13, 6)]
NUMBERS = {"n0": 20, "n": 60, "alpha": 0.05}


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(name, count, seed=1):
    """Parameters of a family, float64 [count, m]: of either sign, for the blur zero or more."""
    family = find_perturbation(name)
    theta = 3 * uniform(count, *family.shape((3, 8, 8)), seed=seed) - 1.5
    return theta.abs() if family.law == "exponential" else theta


def moved(name, pixels, *theta):
    return find_perturbation(name).apply(pixels, torch.tensor([theta], dtype=pixels.dtype))


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def gray_scale(seed=0):
    """All grey levels but black, at random: uint8 [32, 40]."""
    return np.random.default_rng(seed).integers(1, 256, (32, 40), dtype=np.uint8)


# The group


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_transformations_compose_like_addition(name, shape):
    family, image = find_perturbation(name), uniform(*shape)
    first, second = parameters(name, 6, seed=1), parameters(name, 6, seed=2)
    once = family.apply(image, first)
    assert once.shape == (6, *shape)
    assert (once - image).abs().amax(dim=(1, 2, 3)).min() > 1e-3  # it does something
    close(family.apply(once, second), family.apply(image, first + second))
    close(family.apply(family.apply(image, second), first), family.apply(image, first + second))


def test_pixel_noise_composes_like_addition():
    image, first, second = uniform(3, 7, 12), uniform(4, 3, 7, 12, seed=1), uniform(4, 3, 7, 12, seed=2)
    close(PIXEL_NOISE.apply(PIXEL_NOISE.apply(image, first), second), PIXEL_NOISE.apply(image, first + second))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_parameter_zero_is_the_image(name):
    family, image = find_perturbation(name), uniform(3, 7, 12)
    close(
        family.apply(image, torch.zeros(2, *family.shape((3, 7, 12)), dtype=image.dtype)), image.expand(2, -1, -1, -1)
    )


@pytest.mark.parametrize("name", ["contrast", "brightness", "contrast-brightness", "gamma"])
def test_the_opposite_parameter_undoes_it(name):
    family, image, theta = find_perturbation(name), uniform(3, 7, 12), parameters(name, 5)
    close(family.apply(family.apply(image, theta), -theta), image.expand(5, -1, -1, -1))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_of_a_batch_are_transformed_one_by_one(name):
    family, images, theta = find_perturbation(name), uniform(4, 3, 7, 12), parameters(name, 4)
    alone = torch.cat([family.apply(image, row[None]) for image, row in zip(images, theta, strict=True)])
    close(family.apply(images, theta), alone, atol=1e-12)


def test_contrast_does_not_move_the_mean_of_a_channel():
    image = uniform(3, 7, 12)
    found = moved("contrast", image, 1.3)[0]
    close(found.mean((1, 2)), image.mean((1, 2)), atol=1e-12)
    close(found.std((1, 2)), math.exp(1.3) * image.std((1, 2)), atol=1e-12)


def test_contrast_about_the_mean_commutes_with_brightness_and_about_zero_it_does_not():
    image, k, b = uniform(3, 7, 12), 0.8, 0.3
    one = moved("brightness", moved("contrast", image, k)[0], b)
    other = moved("contrast", moved("brightness", image, b)[0], k)
    close(one, other, atol=1e-12)
    close(moved("contrast-brightness", image, k, b), one, atol=1e-12)
    about_zero = math.exp(k) * (image + b) - (math.exp(k) * image + b)
    assert about_zero.min() > 0.3  # (e^k - 1) b everywhere: no sum of parameters is both


@pytest.mark.parametrize("variance", [0.3, 1.0, 4.0])
def test_the_blur_damps_cosines(variance):
    image = uniform(3, 13, 6)
    waves = fft.dctn(image.numpy(), axes=(1, 2), norm="ortho")
    rows, columns = (np.pi * np.arange(size) / size for size in image.shape[1:])
    damped = waves * np.exp(-variance / 2 * (rows[:, None] ** 2 + columns**2))
    expected = torch.from_numpy(fft.idctn(damped, axes=(1, 2), norm="ortho"))
    close(moved("blur", image, variance)[0], expected, atol=1e-12)


@pytest.mark.parametrize("variance", [4.0, 9.0, 30.0])
def test_the_blur_is_scipys_gaussian_reflected_half_a_pixel_outside(variance):
    """Below 4 square pixels scipy's kernel, sampled at whole pixels, is another one in the highest frequencies."""
    image = uniform(3, 21, 34)
    settings = {"sigma": (0, variance**0.5, variance**0.5), "truncate": 12}
    expected = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), mode="reflect", **settings))
    close(moved("blur", image, variance)[0], expected)
    mirrored = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), mode="mirror", **settings))
    assert (mirrored - expected).abs().max() > 1e-3


def test_gamma_is_a_power_that_keeps_black_and_white():
    image = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64).expand(3, 1, 4)
    close(moved("gamma", image, math.log(2))[0], image**2, atol=1e-12)
    close(moved("gamma", image, -math.log(2))[0], image**0.5, atol=1e-12)


# The suites


@pytest.mark.parametrize("severity", range(1, 6))
def test_contrast_is_that_of_medimeta_c_before_its_levels_are_cut(severity):
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    ((k,),) = (find_perturbation("contrast").severities("medimeta-c")["contrast"][severity - 1],)
    exact = 255 * moved("contrast", torch.from_numpy(image / 255).permute(2, 0, 1), k)[0].permute(1, 2, 0).numpy()
    found = MEDIMETA_C.corruption("contrast").apply(image, severity=severity, rng=np.random.default_rng(0))
    assert np.all((exact - found > -1e-9) & (exact - found < 1 + 1e-9))


@pytest.mark.parametrize("name", ["gamma_corr_up", "gamma_corr_down"])
def test_gamma_is_that_of_medmnist_c_to_a_grey_level(name):
    image = gray_scale()
    severities = find_perturbation("gamma").severities("medmnist-c", dataset="pneumonia")[name]
    corruption = find_suite("medmnist-c").corruption(name, dataset="pneumonia")
    for severity, theta in enumerate(severities, start=1):
        exact = 255 * moved("gamma", torch.from_numpy(image / 255).expand(3, -1, -1), *theta)[0, 0].numpy()
        found = corruption.apply(image, severity=severity, rng=np.random.default_rng(0))
        assert np.abs(found - exact).max() <= 1


def test_brightness_is_that_of_medimeta_c_on_gray_images_until_it_clips():
    image = gray_scale()
    coloured = np.stack([image, image // 2, image // 4], axis=-1)
    corruption = MEDIMETA_C.corruption("brightness")
    for severity, (b,) in enumerate(find_perturbation("brightness").severities("medimeta-c")["brightness"], start=1):
        exact = 255 * moved("brightness", torch.from_numpy(image / 255).expand(3, -1, -1), b)[0, 0].numpy()
        found = corruption.apply(image, severity=severity, rng=np.random.default_rng(0)).astype(float)
        assert np.abs(found - exact.clip(0, 255)).max() <= 1.01
        assert (exact > 256).any()
        found = corruption.apply(coloured, severity=severity, rng=np.random.default_rng(0)).astype(float)
        assert np.abs(found - (coloured + 255 * b).clip(0, 255)).max() > 10  # it multiplies what has colour


def test_severities_are_the_parameters_of_the_suites_functions():
    contrast, blur = find_perturbation("contrast"), find_perturbation("blur")
    assert contrast.severities("medimeta-c") == {
        "contrast": tuple(
            (pytest.approx(k, abs=5e-7),) for k in (-0.916291, -1.203973, -1.609438, -2.302585, -2.995732)
        )
    }
    found = contrast.severities("medmnist-c", dataset="medmnist/blood")
    assert found["contrast_up"][0] == pytest.approx((0.0953102,))
    assert found["contrast_down"][4] == pytest.approx((-0.6931472,))
    assert blur.severities("medmnist-c", dataset="pneumonia") == {
        "gaussian_blur": tuple((pytest.approx(variance),) for variance in (0.64, 1.21, 1.96, 2.89, 4.0))
    }
    both = find_perturbation("contrast-brightness").severities("medimeta-c")
    assert both["brightness"] == tuple((0.0, added) for added in (0.1, 0.2, 0.3, 0.4, 0.5))
    assert both["contrast"][0] == pytest.approx((-0.9162907, 0.0))


@pytest.mark.parametrize(
    ("name", "suite", "dataset", "message"),
    [
        ("gamma", "medimeta-c", "", "has no corruption of the family 'gamma'; choose medmnist-c for pneumonia$"),
        ("brightness", "medmnist-c", "oct", "medmnist-c on oct has no .* 'brightness'; choose medimeta-c$"),
        ("contrast", "clinical-c", "oct", "choose medimeta-c and medmnist-c for blood, breast, pneumonia, retina, oct"),
        ("pixel-noise", "medimeta-c", "", "'pixel-noise', and no suite has one"),
        ("contrast", "medmeta-c", "", "unknown suite 'medmeta-c'.*medimeta-c"),
        ("contrast", "medmnist-c", "fundoscopy", "none for 'fundoscopy'"),
    ],
)  # fmt: skip
def test_a_suite_without_the_family_is_refused_with_those_that_have_it(name, suite, dataset, message):
    with pytest.raises(ValueError, match=message):
        find_perturbation(name).severities(suite, dataset=dataset)


# Noise


def by_hand(address, shape, draw):
    """Noise of an address, as its hash seeds torch's generator."""
    digest = hashlib.blake2b(json.dumps(address).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))
    return draw(torch.empty(shape), generator)


def test_copies_by_pixel_noise_are_bit_for_bit_those_from_before_there_was_a_choice():
    image = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    found = noisy_copies(image, NoiseStream(3, "phantom/blood", 7, 0.25, "select"), first=11, count=3)
    for number, copy in enumerate(found, start=11):
        noise = by_hand(
            [3, "phantom/blood", 7, 0.25, "select", number],
            (3, 6, 5),
            lambda row, generator: row.normal_(0, 0.25, generator=generator),
        )
        assert torch.equal(copy, image + noise)


def test_parameters_come_from_the_address_that_names_the_perturbation():
    key = [3, "phantom/blood", 7]
    normal, exponential = (
        lambda row, generator: row.normal_(0, 0.4, generator=generator),
        lambda row, generator: row.exponential_(1 / 2.0, generator=generator),
    )
    contrast = NoiseStream(*key, 0.4, "estimate", find_perturbation("contrast")).draw((3, 6, 5), first=5)
    assert torch.equal(contrast[0], by_hand([*key, 0.4, "estimate", "contrast", 5], 1, normal))
    blur = NoiseStream(*key, 2.0, "estimate", find_perturbation("blur")).draw((3, 6, 5), first=5)
    assert torch.equal(blur[0], by_hand([*key, 2.0, "estimate", "blur", 5], 1, exponential))

    def pair(row, generator):
        row[:1].normal_(0, 0.4, generator=generator)
        row[1:].normal_(0, 0.2, generator=generator)
        return row

    both = NoiseStream(*key, (0.4, 0.2), "estimate", find_perturbation("contrast-brightness")).draw((3, 6, 5), first=5)
    assert torch.equal(both[0], by_hand([*key, [0.4, 0.2], "estimate", "contrast-brightness", 5], 2, pair))


def test_another_perturbation_or_another_pair_has_other_noise():
    key = (0, "phantom/blood", 3)
    streams = [NoiseStream(*key, 0.4, "estimate", find_perturbation(n)) for n in ("contrast", "brightness", "gamma")]
    pairs = [(0.4, 0.2), (0.2, 0.4), (0.4, 0.4)]
    streams += [NoiseStream(*key, pair, "estimate", find_perturbation("contrast-brightness")) for pair in pairs]
    levels = [stream.draw((3, 4, 4), count=500)[:, 0].numpy() / as_first(stream.sigma) for stream in streams]
    for one, other in itertools.combinations(levels, 2):
        assert not (one == other).any()
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / 500**0.5


def as_first(sigma):
    return sigma[0] if isinstance(sigma, tuple) else sigma


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_parameters_have_their_law_and_do_not_depend_on_their_company(name):
    family = find_perturbation(name)
    stream = NoiseStream(0, "phantom/blood", 3, family.usual_sigma, "estimate", family)
    draws = stream.draw((3, 4, 4), count=3000)
    assert draws.shape == (3000, *family.shape((3, 4, 4)))
    for number in (0, 1, 2, 999):
        assert torch.equal(stream.draw((3, 4, 4), first=number)[0], draws[number])
    scales = family.usual_sigma if isinstance(family.usual_sigma, tuple) else (family.usual_sigma,)
    for column, scale in zip(draws.numpy().T, scales, strict=True):
        assert kstest(column / scale, {"normal": "norm", "exponential": "expon"}[family.law]).pvalue > 1e-3
    if len(scales) == 2:
        assert abs(np.corrcoef(draws.numpy().T)[0, 1]) < 4 / 3000**0.5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_level_zero_is_the_image_whatever_memory_held_before(name):
    family = find_perturbation(name)
    row = torch.full(family.shape((3, 8, 8)), math.nan)
    family.draw_into(row, 0.0, torch.Generator())
    assert torch.equal(row, torch.zeros_like(row))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_counts_do_not_depend_on_the_batch_size(name):
    image, family = uniform(3, 24, 30).float(), find_perturbation(name)
    edge = float(image.square().mean())

    def classifier(pixels):
        return (pixels.square().mean((1, 2, 3)) > edge).long()

    found = [
        certify(classifier, image, sigma=family.usual_sigma, perturbation=name, **NUMBERS, batch_size=size)
        for size in (7, 64)
    ]
    assert found[0] == found[1]
    assert found[0].perturbation is family


# Levels


@pytest.mark.parametrize(
    ("name", "sigma", "message"),
    [
        ("pixel-noise", 64, r"divide a level in 0 to 255 units by 255"),
        ("contrast", 25, r"sigma=25\.0 is no number above 0 and up to 0.577623: .* of the log of the contrast"),
        ("contrast", 0, r"sigma=0\.0 is no number above 0"),
        ("contrast", math.nan, r"sigma=nan is no number"),
        ("contrast", (0.4, 0.2), r"sigma=\(0\.4, 0\.2\): contrast has one parameter; give one number"),
        ("brightness", 40, r"sigma=40\.0 is no number above 0 and up to 1: .* divide one in 0 to 255 by 255"),
        ("gamma", -1, r"sigma=-1\.0 is no number above 0 and up to 3: .* of the gamma factor"),
        ("blur", 0, r"sigma=0\.0 is no number above 0: the mean variance of the blur in square pixels"),
        ("blur", 30, r"blur of so many square pixels is 33 pixels wide, the image has 24 x 30; take sigma up to 16"),
        ("contrast-brightness", 0.4, r"sigma=0\.4: contrast-brightness takes a pair such as \(0\.55, 0\.2\)"),
        ("contrast-brightness", (0.4, 0.2, 0.1), r"takes a pair"),
        ("contrast-brightness", (0.4, 51), r"sigma=51\.0 is no number above 0 and up to 1: .*brightness"),
        ("contrast-brightness", (0.4, 0), r"sigma=0\.0 is no number above 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("asked", [certify, predict])
def test_levels_of_other_units_are_refused(asked, name, sigma, message):
    with pytest.raises(ValueError, match=message):
        asked(lambda pixels: torch.zeros(len(pixels)), torch.rand(3, 24, 30), sigma=sigma, perturbation=name)


def test_the_advised_blur_is_accepted():
    with pytest.raises(ValueError, match=r"take sigma up to 21\.77$"):
        check_levels([22], find_perturbation("blur"), 28)
    assert check_levels([21.77], find_perturbation("blur"), 28) == (21.77,)


@pytest.mark.parametrize("sigma", [(0.4, 0.2), [0.4, 0.2], np.array([0.4, 0.2]), torch.tensor([0.4, 0.2]).double()])
def test_a_pair_may_be_written_in_several_ways(sigma):
    found = certify(
        lambda pixels: (pixels.mean((1, 2, 3)) > 0.4).long(), torch.full((3, 4, 4), 0.5), sigma=sigma,
        perturbation="contrast-brightness", **NUMBERS,
    )  # fmt: skip
    assert found.sigma == pytest.approx((0.4, 0.2))
    assert isinstance(found.sigma, tuple)


@pytest.mark.parametrize("sigma", [1, np.float32(1), np.array(1.0), torch.tensor(1.0)])
def test_one_level_may_be_written_in_several_ways(sigma):
    assert as_level(sigma) == 1.0
    found = certify(lambda x: torch.zeros(len(x)).long(), torch.rand(3, 4, 4), sigma=sigma, **NUMBERS)
    assert type(found.sigma) is float


def test_levels_count_once_and_zero_is_one_where_images_may_be_clean():
    both = find_perturbation("contrast-brightness")
    assert check_levels([[0.4, 0.2], (0.4, 0.2), 0], both, 64) == ((0.4, 0.2), 0.0)
    with pytest.raises(ValueError, match=r"sigma=0\.0: contrast-brightness takes a pair"):
        check_levels([0], both, 64, clean=False)
    with pytest.raises(ValueError, match=r"give at least one level in log contrast factor"):
        check_levels([], find_perturbation("contrast"), 64)


@pytest.mark.parametrize("unknown", ["contrst", Contrast])
def test_an_unknown_perturbation_is_refused_with_those_that_there_are(unknown):
    with pytest.raises(ValueError, match=r"unknown perturbation .*; choose one of pixel-noise, contrast, brightness, "):
        find_perturbation(unknown)


def test_families_are_equal_by_what_they_are():
    assert Contrast() == find_perturbation("contrast") == find_perturbation(Contrast())
    assert Contrast() != find_perturbation("gamma")


# Words


def certificate(name, radius, sigma, dataset="", shape=(3, 64, 64)):
    numbers = {"p_lower": 0.9, "k": 950, "n": 1000, "n0": 100, "n_max": 1000, "alpha": 0.001, "seed": 0}
    numbers |= {"p_upper": 0.1, "bounds": "one"}
    return Certificate(
        **numbers, predicted=2, radius=radius, sigma=sigma, sampling="fixed", mode="predict", guarantee="standard",
        model="demo-clip", dtype="float32", device="cpu", image_shape=shape, perturbation=find_perturbation(name),
        dataset=dataset,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "radius", "sigma", "dataset", "region"),
    [
        ("pixel-noise", 0.25, 0.25, "", "within L2 radius 0.25 of this image ([0, 1] pixels, 3 x 64 x 64)"),
        (
            *("contrast", 1.0, 0.4, "phantom/histology"),
            "at every contrast from 0.3679 to 2.718 times that of this image, about each channel's mean "
            "(medimeta-c contrast up to severity 1)",
        ),
        (
            *("contrast", 1.3, 0.4, "medmnist/blood"),
            "at every contrast from 0.2726 to 3.669 times that of this image, about each channel's mean "
            "(medimeta-c contrast up to severity 2; medmnist-c contrast_up (a relative of it) up to severity 5; "
            "medmnist-c contrast_down (a relative of it) up to severity 5)",
        ),
        (
            *("brightness", 0.25, 0.2, ""),
            "with any amount from -0.25 to 0.25 added to every pixel value "
            "(medimeta-c brightness (a relative of it) up to severity 2)",
        ),
        (
            *("contrast-brightness", 1.0, (0.4, 0.2), ""),
            "inside the ellipse through contrasts from 0.6704 to 1.491 times that of this image, about each channel's "
            "mean, and amounts from -0.2 to 0.2 added to every pixel value (medimeta-c brightness (a relative of it) "
            "up to severity 2; medimeta-c contrast at no severity)",
        ),
        ("gamma", 0.2, 0.6, "", "at every gamma from 0.8188 to 1.221 (exponent of the pixel values)"),
        (
            *("gamma", 0.2, 0.6, "medmnist/pneumonia"),
            "at every gamma from 0.8188 to 1.221 (exponent of the pixel values) (medmnist-c gamma_corr_up up to "
            "severity 2; medmnist-c gamma_corr_down up to severity 1)",
        ),
        (
            *("blur", 2.0, 2.0, "medmnist/pneumonia"),
            "under every Gaussian blur of a standard deviation up to 1.414 pixels (3 x 64 x 64) (medmnist-c "
            "gaussian_blur (a relative of it) up to severity 3)",
        ),
    ],
)
def test_a_certificate_names_its_range_and_the_severities_in_it(name, radius, sigma, dataset, region):
    found = certificate(name, radius, sigma, dataset)
    assert found.region == region
    assert str(found).startswith(f"class 2 {region}: 950 of 1000 votes at sigma ")
    assert ("0.4 and 0.2" in str(found)) == isinstance(sigma, tuple)


@pytest.mark.parametrize(
    ("name", "severity", "theta"),
    [
        *(("contrast", number, -math.log(factor)) for number, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1)),
        *(("brightness", number, number / 10) for number in range(1, 6)),
    ],
)
def test_a_severity_is_reached_just_above_its_parameter_and_not_just_below(name, severity, theta):
    family = find_perturbation(name)
    below = "at no severity" if severity == 1 else f"up to severity {severity - 1}"
    assert family.reach(theta - 1e-6, 0.4).endswith(below)
    assert family.reach(theta + 1e-6, 0.4).endswith(f"up to severity {severity}")


def test_the_words_never_promise_more_than_the_radius():
    for radius in np.linspace(0.011, 2.9, 50):
        words = find_perturbation("contrast").describe(radius, 0.4, image=(3, 8, 8)).split()
        low, high = float(words[words.index("from") + 1]), float(words[words.index("to") + 1])
        assert math.exp(-radius) <= low < 1 < high <= math.exp(radius)
        words = find_perturbation("blur").describe(radius, 2.0, image=(3, 8, 8)).split()
        assert 0.99 * radius < float(words[words.index("to") + 1]) ** 2 <= radius


def test_the_region_is_an_ellipse_or_one_sided():
    both, blur = find_perturbation("contrast-brightness"), find_perturbation("blur")
    for angle in np.linspace(0, 2 * np.pi, 13):
        rim = (0.4 * 1.5 * math.cos(angle), 0.2 * 1.5 * math.sin(angle))
        assert both.covers([0.999 * value for value in rim], 1.5, (0.4, 0.2))
        assert not both.covers([1.001 * value for value in rim], 1.5, (0.4, 0.2))
    assert blur.covers((0.0,), 1.0, 2.0)
    assert blur.covers((0.99,), 1.0, 2.0)
    assert not blur.covers((1.01,), 1.0, 2.0)
    assert not blur.covers((-0.01,), 1.0, 2.0)


def test_several_exponential_parameters_add_up():
    """Shifts of two exponential laws multiply the density by e^(a / s + b / t): no Euclidean length."""

    class Two(Perturbation):
        name, law, usual_sigma = "two", "exponential", (1.0, 2.0)

    assert Two().covers((0.49, 1.0), 1.0, (1.0, 2.0))
    assert not Two().covers((0.51, 1.0), 1.0, (1.0, 2.0))
    assert not Two().covers((-0.01, 0.1), 1.0, (1.0, 2.0))


# One of one's own, and tables


class Red(Perturbation):
    """An amount added to the first channel only."""

    name = "red"
    usual_sigma = 0.2
    radii = (0.0, 0.05, 0.1)
    units = "[0, 1] value of red"
    counterparts: ClassVar = {}

    def check_sigma(self, sigma):
        if not 0 < sigma <= 1:
            raise ValueError(f"sigma={sigma}: red is 0 to 1")

    def apply(self, pixels, theta):
        return pixels + theta[:, :1, None, None] * torch.tensor([1.0, 0.0, 0.0])[:, None, None]

    def describe(self, radius, sigma, *, image):
        return f"with up to {radius:.3f} of red"


class MeanColour(DualEncoder):
    """The mean colour is the feature, so that every answer is known."""

    def __init__(self):
        gray = Preprocessing(12, "squash", "bilinear", mean=(0.5,) * 3, std=(1.0,) * 3)
        super().__init__(
            id="colours", preprocessing=gray, embed_dim=3, context_length=8, logit_scale=10.0, provenance={}
        )
        self.gain = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.eval()

    def _image_features(self, pixels):
        return pixels.mean(dim=(2, 3)) * self.gain

    def tokenize(self, texts):
        raise NotImplementedError

    embed_tokens = _text_features = tokenize


@pytest.fixture
def encoder():
    return MeanColour()


@pytest.fixture
def colours():
    """Squares that are a little red, green or blue."""
    rng, n = np.random.default_rng(0), 6
    images = rng.integers(100, 140, (n, 12, 12, 3)).astype(np.uint8)
    for place, image in enumerate(images):
        image[..., place % 3] += np.uint8(20 + 10 * place)
    about = {"modality": "drawing", "licence": "CC0-1.0", "provenance": {}}
    return ImageDataset(
        id="folder:colours", split="test", images=images, labels=np.arange(n, dtype=np.int64) % 3,
        classes=("red", "green", "blue"), templates=("{}",), indices=np.arange(n, dtype=np.int64), **about,
    )  # fmt: skip


AXES = [FixedPrompts("axes", torch.eye(3))]


def test_a_perturbation_of_ones_own_is_certified(encoder):
    image = torch.full((3, 8, 8), 0.5)
    found = certify(
        lambda pixels: (pixels[:, 0].mean((1, 2)) > 0.35).long(), image, sigma=0.2, perturbation=Red(), n=5000
    )
    assert 0.13 < found.radius <= 0.15 + 1e-6
    assert found.region == f"with up to {found.radius:.3f} of red"
    unmoved = certify(
        lambda pixels: (pixels[:, 1].mean((1, 2)) > 0.35).long(), image, sigma=0.2, perturbation=Red(), n=500
    )
    assert unmoved.k == unmoved.n
    with pytest.raises(ValueError, match="sigma=2.0: red is 0 to 1"):
        certify(lambda pixels: pixels, image, sigma=2, perturbation=Red())


def test_a_table_of_ones_own_perturbation_is_the_same_from_two_workers(encoder, colours):
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    try:
        found = mr.certify_dataset(encoder, colours, AXES, perturbation=Red(), **NUMBERS, jobs=2)
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    alone = mr.certify_dataset(encoder, colours, AXES, perturbation=Red(), **NUMBERS)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), alone.drop(columns="seconds"))
    assert set(found["perturbation"]) == {"red"}
    assert set(found["sigma"]) == {0.2}
    assert set(found["radius"]) <= {0.0, 0.05, 0.1}
    assert found["radius"].max() > 0


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_row_of_a_table_is_what_certify_says(encoder, colours, name):
    family = find_perturbation(name)
    rows = mr.certify_dataset(encoder, colours, AXES, perturbation=name, **NUMBERS)
    assert (rows["perturbation"] == name).all()
    for place, row in enumerate(rows.itertuples()):
        found = certify(
            lambda pixels: (encoder.encode_image(pixels) @ torch.eye(3)).argmax(1),
            encoder.prepare(colours.images[place : place + 1])[0],
            sigma=family.usual_sigma, radii=family.radii, sampling="sequential", perturbation=family,
            dataset=colours.id, index=place, **NUMBERS,
        )  # fmt: skip
        assert (row.predicted, row.radius, row.k, row.n) == (found.predicted, found.radius, found.k, found.n)
        assert row.radius <= row.radius_reach


def test_a_pair_of_sigmas_is_a_text_in_the_rows_and_a_group_of_certified_accuracy(encoder, colours, tmp_path):
    pairs = [(0.4, 0.2), (0.2, 0.1)]
    asked = {"sigmas": pairs, "perturbation": "contrast-brightness", "radii": (0.0, 0.25, 0.5), **NUMBERS}
    rows = mr.certify_dataset(encoder, colours, AXES, **asked, store=tmp_path)
    assert rows["sigma"].tolist() == ["0.4 and 0.2", "0.2 and 0.1"] * 6
    shares = metrics.certified_accuracy(rows, radii=(0.0, 0.5))
    assert shares.groupby("sigma")["n"].first().to_dict() == {"0.2 and 0.1": 6, "0.4 and 0.2": 6}
    by_hand = ((rows["predicted"] == rows["label"]) & (rows["radius"] >= 0.5)).groupby(rows["sigma"]).mean()
    found = shares[shares["radius"] == 0.5].set_index("sigma")["certified_accuracy"]
    assert found.to_dict() == pytest.approx(by_hand.to_dict())
    assert set(metrics.certification_summary(rows)["sigma"]) == {"0.2 and 0.1", "0.4 and 0.2"}
    again = mr.certify_dataset(encoder, colours, AXES, **asked, store=tmp_path)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), rows.drop(columns="seconds"))


def test_a_store_goes_on_byte_for_byte_and_only_under_its_perturbation(encoder, colours, tmp_path):
    asked = {"sigmas": [(0.4, 0.2)], "perturbation": "contrast-brightness", **NUMBERS}
    mr.certify_dataset(encoder, colours.subset([0, 1]), AXES, **asked, store=tmp_path / "parts")
    mr.certify_dataset(encoder, colours, AXES, **asked, store=tmp_path / "parts")
    mr.certify_dataset(encoder, colours, AXES, **asked, store=tmp_path / "whole")
    assert (tmp_path / "parts" / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()
    mr.certify_dataset(encoder, colours, AXES, sigmas=[0.4], perturbation="contrast", store=tmp_path / "c", **NUMBERS)
    with pytest.raises(ValueError, match=r'perturbation: the store has "contrast", this run asks "gamma"'):
        mr.certify_dataset(encoder, colours, AXES, sigmas=[0.4], perturbation="gamma", store=tmp_path / "c", **NUMBERS)


def test_a_table_asks_for_the_radii_and_the_level_of_its_perturbation(encoder, colours):
    rows = mr.certify_dataset(encoder, colours, AXES, perturbation="contrast", n0=20, n=2000)
    sigma = 0.55
    assert set(rows["sigma"]) == {sigma}
    assert (rows["k"] == rows["n"]).all()  # the mean does not move
    assert (rows["radius"] == 1.25).all()  # the largest of Contrast.radii within reach, sigma Phi^-1(alpha^(1/n))
    assert rows["radius_reach"].iloc[0] == pytest.approx(sigma * norm.ppf(0.001 ** (1 / 2000)))


def test_a_radius_that_exponential_draws_cannot_reach_is_told_and_not_certified(encoder, colours):
    asked = {"sigmas": [2.0], "perturbation": "blur", **NUMBERS}
    rows = mr.certify_dataset(encoder, colours, AXES, radii=(0.0, 4.0, 400.0), **asked)
    reach = -2.0 * math.log(2 * (1 - 0.05 ** (1 / 60)))
    assert rows["radius_reach"].iloc[0] == pytest.approx(reach)
    assert (rows["radius"] == 4.0).all()
    with pytest.warns(UserWarning, match=rf"60 draws reach radius {reach:.3g}, so none of the radii"):
        mr.certify_dataset(encoder, colours, AXES, radii=(400.0,), **asked)
    found = certify(lambda x: torch.zeros(len(x)).long(), torch.rand(3, 30, 30), sigma=2.0, perturbation="blur", n=60)
    assert found.radius == pytest.approx(-2.0 * math.log(2 * (1 - 0.001 ** (1 / 60))))


def test_a_method_that_removes_noise_is_certified_for_pixel_noise_only(encoder, colours):
    denoised = FixedPrompts("denoised", torch.eye(3), denoiser=lambda pixels, sigma: pixels)
    with pytest.raises(ValueError, match="'denoised' removes noise from pixels, and 'contrast' adds none"):
        mr.certify_dataset(encoder, colours, [denoised], perturbation="contrast", **NUMBERS)


def test_evaluate_mode_tests_the_label(encoder, colours):
    rows = mr.certify_dataset(encoder, colours, AXES, perturbation="contrast", mode="evaluate", **NUMBERS)
    assert (rows["n0"] == 0).all()
    assert (rows["predicted"] == rows["label"]).all()


def test_no_draw_of_the_largest_contrast_is_refused_by_a_model(encoder):
    """Six sigmas, on an image whose one white pixel is far from the mean."""
    image = torch.zeros(3, 12, 12)
    image[:, 0, 0] = 1
    family = find_perturbation("contrast")
    largest = 0.577
    family.check_sigma(largest)
    for k in (-6 * largest, 6 * largest):
        assert encoder.encode_image(moved("contrast", image, k)).isfinite().all()
    with pytest.raises(ValueError, match=r"sigma=0\.58 is no number above 0 and up to 0\.577623"):
        family.check_sigma(0.58)


@pytest.mark.parametrize("sigma", [None, "a lot", "0.5", True, ((0.5, 0.2),), (0.5, None)])
def test_what_is_no_level_is_named(sigma):
    with pytest.raises(TypeError, match=r"sigma=.*: give a number, or a tuple of numbers for several parameters"):
        certify(darker, torch.zeros(3, 4, 4), sigma=sigma, perturbation="contrast-brightness")


def test_a_level_may_come_as_an_array_of_no_dimension():
    assert check_levels(np.array(0.5), PERTURBATIONS["contrast"], 64) == (0.5,)
    assert check_levels(torch.tensor(0.5), PERTURBATIONS["contrast"], 64) == (0.5,)


class Shift(Perturbation):
    """A brightness in steps of 16 grey levels; its level and its words are those of the base class."""

    name, usual_sigma, units = "shift", 3.0, "steps of 16 grey levels"

    def apply(self, pixels, theta):
        return pixels + theta[:, :1, None, None] * 16 / 255


@pytest.mark.parametrize("sampling", ["fixed", "sequential"])
def test_an_own_perturbation_has_units_of_its_own(sampling):
    words = {"n0": 20, "n": 60, "sampling": sampling}
    found = certify(darker, torch.full((3, 4, 4), 0.1), sigma=3, perturbation=Shift(), radii=[0.5, 30], **words)
    assert found.predicted == 1
    assert found.radius == (0.5 if sampling == "sequential" else pytest.approx(maximum_radius(60, 0.001, 3)))


def test_an_own_perturbation_says_its_region_and_refuses_levels():
    assert Shift().describe(0.5, 3.0, image=(3, 4, 4)) == "under every shift up to 0.5 steps of 16 grey levels"
    for sigma, words in ((51, "own takes units in which sigma is at most 10"), (0, "smoothing needs noise")):
        with pytest.raises(ValueError, match=rf"sigma={sigma}.*{words}"):
            certify(darker, torch.zeros(3, 4, 4), sigma=sigma, perturbation=Shift())


def test_an_own_perturbation_without_a_transformation_is_named():
    class Nothing(Perturbation):
        name, usual_sigma, units = "nothing", 1.0, ""

    with pytest.raises(NotImplementedError, match=r"Nothing has no apply\(pixels, theta\)"):
        certify(darker, torch.zeros(3, 4, 4), sigma=1, perturbation=Nothing())


def darker(pixels):
    return (pixels.mean((1, 2, 3)) < 1).long()
