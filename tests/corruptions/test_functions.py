"""Every corruption against a slow, independent reading of its published formula, or against its law."""

import io
import math

import medrobust_lib as mr

# isort: split
import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage, stats
from torchvision.transforms import functional as torchvision_functional

from medrobust_lib.corruptions import MEDIMETA_C, MEDMNIST_C
from medrobust_lib.corruptions.blur import defocus_blur, gaussian_blur, line_blur, zoom_blur
from medrobust_lib.corruptions.functions import (
    brightness,
    bubble,
    contrast,
    gamma_correction,
    gaussian_noise,
    impulse_noise,
    jpeg_compression,
    pixelate,
    saturate,
    scale_brightness,
    scale_contrast,
    shot_noise,
    speckle_noise,
    stain_deposit,
)

SEVERITIES = (1, 2, 3, 4, 5)


def parameters(name, severity):
    return dict(MEDIMETA_C.corruption(name).severities[severity - 1])


def cut(image):
    """Float image in [0, 1] to bytes, as ImageNet-C does it."""
    return np.uint8(np.clip(image, 0, 1) * 255)


def differences(first, second):
    """Largest difference in grey levels, and the share of values that differ."""
    levels = np.abs(first.astype(int) - second)
    return levels.max(), (levels > 0).mean()


def generator(seed=0):
    return np.random.default_rng(seed)


# ImageNet-C, exactly


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("constant", [None, 0, 1, 77, 100, 254, 255])
def test_contrast_is_the_float_formula_bit_for_bit(picture, severity, constant):
    image = picture if constant is None else np.full_like(picture, constant)
    kept = parameters("contrast", severity)["factor"]
    unit = image / 255.0
    means = unit.mean(axis=(0, 1), keepdims=True)
    np.testing.assert_array_equal(contrast(image, factor=kept), cut((unit - means) * kept + means))


def test_contrast_cuts_as_floats_do_where_a_level_is_a_whole_number():
    # Half black, half 250: the mean is 125 exactly, and many levels land on whole numbers.
    image = np.zeros((32, 32, 3), np.uint8)
    image[16:] = 250
    unit = image / 255.0
    means = unit.mean(axis=(0, 1), keepdims=True)
    for kept in (0.4, 0.2, 0.1):
        np.testing.assert_array_equal(contrast(image, factor=kept), cut((unit - means) * kept + means))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_is_what_a_box_filter_and_its_nearest_pixels_give(picture, severity):
    factor = parameters("pixelate", severity)["factor"]
    side = math.floor(224 * factor)
    small = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)
    expected = small.resize((224, 224), Image.Resampling.BOX)
    np.testing.assert_array_equal(pixelate(picture, factor=factor), np.asarray(expected))
    nearest = ((np.arange(224) + 0.5) * side / 224).astype(int)
    np.testing.assert_array_equal(expected, np.asarray(small)[nearest][:, nearest])


def test_pixelate_by_half_averages_two_by_two_pixels():
    image = np.zeros((32, 32), np.uint8)
    image[0, 0], image[1, 1] = 100, 60
    pixels = pixelate(image, factor=0.5)
    assert (pixels[:2, :2] == 40).all()
    assert not pixels[2:].any()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_pils_file_read_back(picture, gray, severity, tmp_path):
    quality = parameters("jpeg_compression", severity)["quality"]
    Image.fromarray(picture).save(tmp_path / "colour.jpg", quality=quality)
    expected = np.asarray(Image.open(tmp_path / "colour.jpg"))
    np.testing.assert_array_equal(jpeg_compression(picture, quality=quality), expected)
    file = io.BytesIO()
    Image.fromarray(gray).convert("RGB").save(file, "JPEG", quality=quality)
    np.testing.assert_array_equal(jpeg_compression(gray, quality=quality), np.asarray(Image.open(file).convert("L")))


# ImageNet-C, within one grey level


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_adds_to_the_value_of_hsv(picture, severity):
    added = parameters("brightness", severity)["added"]
    image = picture.copy()
    image[:8], image[8:16], image[16:24] = 0, 255, [0, 0, 9]
    hsv = rgb_to_hsv(image / 255.0)
    hsv[..., 2] = np.minimum(hsv[..., 2] + added, 1)
    largest, share = differences(brightness(image, added=added), cut(hsv_to_rgb(hsv)))
    assert largest <= 1
    assert share < 0.15


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_is_the_mean_of_enlarged_centres(picture, severity):
    factors = parameters("zoom_blur", severity)["factors"]
    unit = (picture / 255.0).astype(np.float32)
    total = unit.copy()
    for factor in factors:
        crop = math.ceil(224 / factor)
        start = (224 - crop) // 2
        enlarged = ndimage.zoom(unit[start : start + crop, start : start + crop], (factor, factor, 1), order=1)
        trim = (len(enlarged) - 224) // 2
        total += enlarged[trim : trim + 224, trim : trim + 224]
    largest, share = differences(zoom_blur(picture, factors=factors), cut(total / (len(factors) + 1)))
    assert largest <= 1
    assert share < 0.005


def test_zoom_factors_are_those_numpy_counts():
    """An end point slips into the first list: np.arange(1, 1.11, 0.01) has twelve members."""
    factors = [parameters("zoom_blur", severity)["factors"] for severity in SEVERITIES]
    assert [len(row) for row in factors] == [12, 16, 11, 13, 11]
    assert [row[-1] for row in factors] == pytest.approx([1.11, 1.15, 1.2, 1.24, 1.3])


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 64), (41, 90)])
@pytest.mark.parametrize("angle", [-45, -20.5, 0, 7, 45])
def test_line_blur_weights_the_pixels_along_a_line(pictures, height, width, angle):
    image = np.resize(pictures[0], (height, width, 3))
    for severity in SEVERITIES:
        radius, sigma = parameters("motion_blur", severity).values()
        taps = 2 * radius + 1
        weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(taps)]
        expected = np.zeros(image.shape)
        for i, weight in enumerate(weights):
            down = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
            right = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
            rows = np.clip(np.arange(height) + down, 0, height - 1)
            columns = np.clip(np.arange(width) + right, 0, width - 1)
            expected += weight / sum(weights) * image[rows][:, columns]
        largest, share = differences(line_blur(image, radius=radius, sigma=sigma, angle=angle), expected.astype(int))
        assert largest <= 1
        assert share < 0.05


def test_the_package_imagecorruptions_leaves_out_what_a_line_has_beyond_the_image(pictures):
    """As documented: where the line fits into the image it and ours agree, at 28 pixels and severity 5 it is darker."""
    lost = {}
    for size, severity in ((64, 5), (28, 1), (28, 5)):
        image = np.resize(pictures[0], (size, size, 3)).astype(np.float32)
        radius, sigma = parameters("motion_blur", severity).values()
        weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
        theirs = np.zeros(image.shape)
        for i, weight in enumerate(weights / weights.sum()):
            down, right = (math.ceil(i * part - 0.5) for part in (math.sin(0.2), math.cos(0.2)))
            if max(down, right) >= size:
                break
            rows, columns = (np.minimum(np.arange(size) + step, size - 1) for step in (down, right))
            theirs += weight * image[rows][:, columns]
        ours = line_blur(image.astype(np.uint8), radius=radius, sigma=sigma, angle=math.degrees(0.2))
        lost[size, severity] = (ours.astype(int) - theirs.astype(int)).max()
    assert lost[64, 5] <= 1
    assert lost[28, 1] <= 1
    assert lost[28, 5] > 5


@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
def test_blurs_leave_a_constant_area_alone(level):
    image = np.full((60, 60), level, np.uint8)
    for severity in SEVERITIES:
        assert (line_blur(image, **parameters("motion_blur", severity), angle=12) == level).all()
        assert (zoom_blur(image, **parameters("zoom_blur", severity)) == level).all()
    assert (defocus_blur(image, radius=5, edge_sigma=0.1) == level).all()
    assert (gaussian_blur(image, width=7) == level).all()


# MedMNIST-C, within one grey level


@pytest.mark.parametrize(("radius", "edge_sigma"), [(0.5, 0.6), (1.5, 0.1), (3, 0.1), (6, 0.3), (8, 0.5)])
def test_defocus_blur_averages_over_a_softened_disk(pictures, radius, edge_sigma):
    image = pictures[0]
    places = range(-8, 9)
    disk = np.array([[float(x * x + y * y <= radius * radius) for x in places] for y in places])
    side = math.exp(-1 / (2 * edge_sigma**2))
    edge = np.outer([side, 1, side], [side, 1, side]) / (1 + 2 * side) ** 2
    kernel = ndimage.correlate(disk / disk.sum(), edge, mode="mirror")
    expected = np.stack([ndimage.correlate(image[..., c] / 255.0, kernel, mode="mirror") for c in range(3)], axis=-1)
    assert differences(defocus_blur(image, radius=radius, edge_sigma=edge_sigma), cut(expected))[0] <= 1


@pytest.mark.parametrize("width", [3, 5, 7, 9, 11])
def test_gaussian_blur_is_torchvisions(picture, width):
    expected = np.asarray(torchvision_functional.gaussian_blur(Image.fromarray(picture), kernel_size=[width, width]))
    assert differences(gaussian_blur(picture, width=width), expected)[0] <= 1


@pytest.mark.parametrize("exponent", [0.4, 0.9, 1.1, 1.6])
def test_gamma_is_torchvisions(gray, exponent):
    expected = np.asarray(torchvision_functional.adjust_gamma(Image.fromarray(gray), exponent))
    np.testing.assert_array_equal(gamma_correction(gray, exponent=exponent), expected)


@pytest.mark.parametrize("added", [0.05, 0.2])
def test_saturate_adds_to_the_saturation_of_hsv(picture, added):
    hsv = rgb_to_hsv(picture / 255.0)
    hsv[..., 1] = np.minimum(hsv[..., 1] + added, 1)
    assert differences(saturate(picture, added=added), cut(hsv_to_rgb(hsv)))[0] <= 1


def test_saturate_turns_gray_and_black_as_the_public_code_does():
    image = np.full((28, 28, 3), 100, np.uint8)
    image[:, 14:] = 0
    saturated = saturate(image, added=0.2)
    assert saturated[0, 0].tolist() == [100, 80, 80]  # hue 0 for a pixel without hue
    assert saturated[0, 20].tolist() == [0, 0, 0]


def test_scaled_brightness_and_contrast_multiply():
    image = np.full((28, 28), 100, np.uint8)
    image[:14] = 50
    assert np.unique(scale_brightness(image, factor=1.5)).tolist() == [75, 150]
    assert np.unique(scale_brightness(image, factor=3)).tolist() == [150, 255]
    assert np.unique(scale_contrast(image, factor=0.5)).tolist() == [62, 87]  # about 75, cut
    assert np.unique(scale_contrast(image, factor=2)).tolist() == [25, 125]


def test_stain_deposits_are_a_few_black_blots_off_the_border():
    image = np.full((224, 224, 3), 200, np.uint8)
    counts, areas = [], []
    for seed in range(60):
        stained = stain_deposit(image, most=3, side=24, rng=generator(seed))
        black = (stained == 0).all(-1)
        assert (stained[~black] == 200).all()
        assert not black[:10].any() and not black[-10:].any() and not black[:, :10].any() and not black[:, -10:].any()
        counts.append(ndimage.label(black, np.ones((3, 3)))[1])
        areas.append(black.sum() / (counts[-1] * 24 * 24))
    assert set(counts) == {1, 2, 3}
    assert np.mean(areas) == pytest.approx(0.53, abs=0.02)  # as documented; the official masks of this size: 0.625


def test_bubbles_only_brighten_and_grow_with_their_radius():
    image = np.full((224, 224, 3), 90, np.uint8)
    small = bubble(image, largest_radius=5, most=10, rng=generator(1))
    large = bubble(image, largest_radius=15, most=12, rng=generator(1))
    assert set(np.unique(small)) <= {90, 155, 174}  # 90 + 165 * 100/255 and 90 + 165 * 130/255
    assert 7 * np.pi * 5**2 * 0.5 < (small != 90).all(-1).sum() < (large != 90).all(-1).sum()
    assert 7 <= ndimage.label((small == 155).all(-1))[1] <= 10


# Noise, equal in law


@pytest.mark.parametrize("sigma", [0.08, 0.38])
def test_gaussian_noise_has_the_law_of_a_clipped_truncated_normal(sigma):
    noisy = gaussian_noise(np.full((224, 224, 3), 128, np.uint8), sigma=sigma, rng=generator())
    levels = np.arange(256)
    expected = stats.norm.cdf((levels + 1 - 128) / (255 * sigma))
    expected[255] = 1
    found = np.cumsum(np.bincount(noisy.ravel(), minlength=256)) / noisy.size
    assert np.abs(found - expected).max() < 1.95 / math.sqrt(noisy.size)  # Kolmogorov-Smirnov, one in a thousand
    across = np.corrcoef(noisy.reshape(-1, 3).T) - np.eye(3)
    assert np.abs(across).max() < 4 / math.sqrt(noisy.size / 3)


@pytest.mark.parametrize("amount", [0.005, 0.03, 0.27])
def test_impulse_noise_replaces_channel_values_by_salt_or_pepper(amount):
    noisy = impulse_noise(np.full((224, 224, 3), 100, np.uint8), amount=amount, rng=generator())
    assert set(np.unique(noisy)) == {0, 100, 255}
    for level in (0, 255):
        assert stats.binomtest(int((noisy == level).sum()), noisy.size, amount / 2).pvalue > 1e-3
    both = (noisy[..., 0] != 100) & (noisy[..., 1] != 100)
    assert stats.binomtest(int(both.sum()), both.size, amount**2).pvalue > 1e-3


def test_speckle_noise_scales_with_the_image():
    image = np.full((224, 224, 3), 60, np.uint8)
    noisy = speckle_noise(image, sigma=0.2, rng=generator())
    assert stats.kstest(noisy + generator(1).random(noisy.shape), "norm", args=(60, 12), axis=None).pvalue > 1e-3
    assert not speckle_noise(np.zeros_like(image), sigma=0.6, rng=generator()).any()


def test_shot_noise_counts_photons():
    noisy = shot_noise(np.full((224, 224, 3), 51, np.uint8), photons=100, rng=generator())
    photons = np.ceil(noisy / 2.55).astype(int)
    np.testing.assert_array_equal(np.floor(photons * 2.55 + 1e-9), noisy)
    assert photons.mean() == pytest.approx(20, abs=4 * math.sqrt(20 / noisy.size))
    assert photons.var() == pytest.approx(20, rel=0.03)


# Gray images


@pytest.mark.parametrize("suite", [MEDIMETA_C, MEDMNIST_C], ids=lambda suite: suite.id)
def test_gray_images_come_out_as_their_rgb_copies_do_in_luma(gray, suite):
    image = gray[:96, :80]
    copies = np.repeat(image[..., None], 3, axis=2)
    for family in suite.families:
        for corruption in suite.families[family]:
            for severity in (1, 5):
                alone = corruption.apply(image, severity=severity, rng=generator(3))
                colour = corruption.apply(copies, severity=severity, rng=generator(3))
                luma = np.asarray(Image.fromarray(colour).convert("L"))
                np.testing.assert_array_equal(alone, luma, err_msg=f"{family} {corruption.name} {severity}")


def test_functions_take_one_image_and_name_the_call_for_batches(pictures):
    with pytest.raises(ValueError, match=r"shape \(6, 64, 64, 3\) holds several images; `corrupt` takes batches"):
        contrast(pictures, factor=0.4)
    with pytest.raises(TypeError, match=r"float64 values.*\(image \* 255\)\.round\(\)\.astype\(np\.uint8\)"):
        brightness(pictures[0] / 255, added=0.1)


def test_results_are_writable_and_inputs_stay(picture):
    before = picture.copy()
    for corruption in (*MEDIMETA_C.families[""], *MEDMNIST_C.families["blood"], *MEDMNIST_C.families["pneumonia"]):
        result = corruption.apply(picture, severity=3, rng=generator())
        assert result.flags.writeable and result.flags.c_contiguous, corruption.name
        result[:] = 0
    np.testing.assert_array_equal(picture, before)
    assert mr.corrupt(picture, "contrast", severity=0) is not picture
