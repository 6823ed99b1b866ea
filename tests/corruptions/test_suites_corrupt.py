import numpy as np
import pytest

import medrobust_lib as mr
from medrobust_lib.corruptions import MEDIMETA_C, MEDMNIST_C, SUITES, corrupt
from medrobust_lib.corruptions.suites import random_stream

ALL = [
    (suite.id, family, name) for suite in SUITES.values() for family in suite.families for name in suite.names(family)
]
ALL.append(("medimeta-c", "", "jpeg_compression"))


def test_the_public_names_are_these():
    assert mr.corrupt is corrupt
    assert mr.SUITES is SUITES
    assert list(SUITES) == ["medimeta-c", "medmnist-c", "clinical-c"]


@pytest.mark.parametrize(("suite", "family", "name"), ALL)
@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (2, 33, 47), (2, 47, 33, 3)])
def test_every_corruption_takes_every_form_of_image(suite, family, name, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = images.copy()
    for severity in range(6):
        corrupted = corrupt(images, name, severity=severity, dataset=family, suite=suite)
        assert corrupted.shape == shape and corrupted.dtype == np.uint8
        assert corrupted.flags.writeable and not np.shares_memory(corrupted, images)
        assert np.array_equal(corrupted, images) == (severity == 0)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(("suite", "family", "name"), [row for row in ALL if row[0] != "clinical-c"])
def test_a_higher_severity_takes_an_image_further_away(pictures, suite, family, name):
    # The angle of a motion and the number of objects on an image are drawn; two severities may share their parameters.
    times, slack = {"motion_blur": (10, 0.01), "stain_deposit": (30, 0.1), "bubble": (30, 0.1)}.get(name, (1, 0))
    images = np.repeat(pictures, times, axis=0)
    far = [
        np.abs(corrupt(images, name, severity=severity, dataset=family, suite=suite) - images.astype(float)).mean()
        for severity in range(6)
    ]
    assert far[0] == 0
    assert (np.diff(far) > -slack * far[-1]).all(), np.round(far, 2)


@pytest.mark.parametrize("name", [*MEDIMETA_C.corruptions, "jpeg_compression"])
def test_an_image_does_not_depend_on_its_batch_order_or_neighbours(pictures, name):
    whole = corrupt(pictures, name, severity=4, dataset="phantom/blood")
    halves = [
        corrupt(pictures[first : first + 2], name, severity=4, dataset="phantom/blood", indices=[first, first + 1])
        for first in (0, 2, 4)
    ]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    drawn = np.array([5, 1, 3])
    picked = corrupt(pictures[drawn], name, severity=4, dataset="phantom/blood", indices=drawn)
    np.testing.assert_array_equal(picked, whole[drawn])
    single = corrupt(pictures[3], name, severity=4, dataset="phantom/blood", indices=[3])
    np.testing.assert_array_equal(single, whole[3])
    turned = corrupt(np.asfortranarray(pictures), name, severity=4, dataset="phantom/blood")
    np.testing.assert_array_equal(turned, whole)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"dataset": "phantom/oct"}, {"indices": [1, 2]}],
    ids=["seed", "dataset", "index"],
)
def test_each_part_of_the_address_changes_the_noise(pictures, other):
    same = np.repeat(pictures[:1], 2, axis=0)
    one = corrupt(same, "gaussian_noise", severity=2)
    assert (one[0] != one[1]).any()
    assert (one[0] != corrupt(same, "gaussian_noise", severity=2, **other)[0]).any()


def test_streams_stay_what_they_are():
    """Corrupted sets on disk and on the fly agree only as long as these numbers do."""
    first = random_stream(0, "medmnist/blood", 7, "gaussian_noise", 3).bit_generator.random_raw()
    assert first == 12553882896238858077
    assert (
        random_stream(np.int64(0), "medmnist/blood", np.int64(7), "gaussian_noise", 3).bit_generator.random_raw()
        == first
    )
    for address in [(1, "medmnist/blood", 7, "gaussian_noise", 3), (0, "medmnist/blood", 7, "impulse_noise", 3),
                    (0, "medmnist/blood", 7, "gaussian_noise", 4)]:  # fmt: skip
        assert random_stream(*address).bit_generator.random_raw() != first


@pytest.mark.parametrize("family", ["breast", "pneumonia", "oct"])
def test_gray_sets_of_medmnist_c_come_back_gray_from_rgb_copies(gray, family):
    copies = np.repeat(gray[None, :64, :64, None], 3, axis=3)
    corrupted = corrupt(copies, "speckle_noise", severity=4, dataset=family, suite="medmnist-c")
    assert (corrupted == corrupted[..., :1]).all()
    alone = corrupt(gray[:64, :64], "speckle_noise", severity=4, dataset=family, suite="medmnist-c")
    np.testing.assert_array_equal(corrupted[0, ..., 0], alone)


def test_the_same_data_set_has_its_parameters_under_all_its_ids(pictures):
    family = corrupt(pictures, "defocus_blur", severity=3, dataset="blood", suite="medmnist-c")
    for dataset in ("phantom/blood", "medmnist/blood", "medimeta/pbc", "bloodmnist"):
        again = corrupt(pictures, "defocus_blur", severity=3, dataset=dataset, suite=MEDMNIST_C)
        np.testing.assert_array_equal(again, family)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gausian_noise"}, r"unknown corruption 'gausian_noise' in suite medimeta-c; choose one of "
         r"gaussian_noise, impulse_noise.*jpeg_compression \(did you mean 'gaussian_noise'\?\)"),
        ({"name": "bubble"}, "unknown corruption 'bubble' in suite medimeta-c.*suite medmnist-c has 'bubble'"),
        ({"name": "bubble", "suite": "medmnist-c", "dataset": "oct"},
         "unknown corruption 'bubble' in suite medmnist-c for oct; choose one of pixelate"),
        ({"suite": "MedMNIST-C"}, "unknown suite 'MedMNIST-C'.*; did you mean 'medmnist-c'"),
        ({"name": "Gaussian_Noise"}, r"\(did you mean 'gaussian_noise'\?\)"),
        ({"suite": "medimeta"}, "unknown suite 'medimeta'; choose one of medimeta-c, medmnist-c, clinical-c; did"),
        ({"suite": "medmnist-c", "dataset": "phantom/histology"},
         "none for 'phantom/histology'; it knows blood, breast, pneumonia, retina, oct"),
        ({"suite": "medmnist-c", "dataset": "medmnist/retinna"}, "did you mean 'retina'"),
        ({"severity": 6}, "severity 6: choose 1, 2, 3, 4 or 5, or 0 for the unchanged image"),
        ({"severity": -1}, "severity -1: choose"),
        ({"severity": 2.5}, "severity 2.5: choose"),
        ({"severity": True}, "severity True: choose"),
        ({"severity": "3"}, "severity '3': choose"),
        ({"indices": [0, 1]}, r"6 images but indices of shape \(2,\); give one index per image"),
        ({"indices": np.arange(6) / 2}, "whole numbers >= 0; got"),
        ({"indices": np.arange(6) - 3}, "whole numbers >= 0; got"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_with_the_valid_choices(pictures, arguments, message):
    arguments = {"name": "gaussian_noise", "severity": 1} | arguments
    with pytest.raises(ValueError, match=message):
        corrupt(pictures, **arguments)


RGB = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("severity", [0, 3])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (RGB.astype(np.float32), TypeError,
         r"float32 values, but corruptions take uint8; convert values in \[0, 1\]: \(image \* 255\)\.round\(\)"),
        (RGB.astype(np.uint16), TypeError, "uint16 values.*convert 16-bit pixels, after any windowing"),
        (RGB.astype(np.int64), TypeError, r"int64 values.*image.clip\(0, 255\)"),
        (RGB > 3, TypeError, r"bool values.*astype\(np.uint8\) \* 255"),
        (RGB.tolist(), TypeError, "images are a list; give a uint8 array"),
        (RGB[0, 0, 0], ValueError, r"shape \(3,\): give \[n, H, W, 3\]"),
        (RGB[:0], ValueError, r"no image in an array of shape \(0, 32, 32, 3\)"),
        (np.zeros((2, 32, 32, 4), np.uint8), ValueError, r"drop the alpha channel: images\[\.\.\., :3\]"),
        (np.zeros((32, 32, 4), np.uint8), ValueError, "drop the alpha channel"),
        (np.zeros((32, 32, 1), np.uint8), ValueError, r"drop the last axis: images\[\.\.\., 0\]"),
        (np.zeros((2, 3, 32, 32), np.uint8), ValueError, r"channels last: images.transpose\(0, 2, 3, 1\)"),
        (np.zeros((2, 32, 32, 5), np.uint8), ValueError, "the last axis must hold 3 channels"),
        (np.zeros((2, 27, 40, 3), np.uint8), ValueError, "27 x 40 pixels: each side needs at least 28"),
        (np.zeros((27, 40), np.uint8), ValueError, "27 x 40 pixels"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if isinstance(value, type) else None,
)  # fmt: skip
def test_images_of_a_wrong_kind_are_refused_with_the_way_out(images, error, message, severity):
    with pytest.raises(error, match=message):
        corrupt(images, "gaussian_noise", severity=severity)
