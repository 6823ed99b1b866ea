import numpy as np
import pytest

from medrobust_lib.corruptions.functions import dct_power, radial_profile


def test_white_noise_has_power_sigma_squared_everywhere():
    noise = 0.3 * np.random.default_rng(0).standard_normal((400, 16, 16))
    power = dct_power(noise)
    assert power.mean() == pytest.approx(0.09, rel=0.02)
    assert power.max() < 2 * 0.09


def test_energy_is_conserved():
    images = np.random.default_rng(1).random((3, 20, 28))
    assert dct_power(images).sum() == pytest.approx((images**2).sum() / 3)


def test_constant_image_lives_at_frequency_zero():
    power = dct_power(np.ones((1, 8, 8)))
    assert power[0, 0] == pytest.approx(64)
    assert np.abs(power).sum() == pytest.approx(64)


def test_profile_finds_the_frequency_of_a_cosine():
    x = (np.arange(32) + 0.5) * np.pi / 32
    wave = np.tile(np.cos(8 * x), (32, 1))[None]
    frequency, power = radial_profile(dct_power(wave), n_bins=32)
    assert frequency[power.argmax()] == pytest.approx(8 / 32, abs=np.sqrt(2) / 64)


def test_profile_of_flat_power_is_flat():
    _, power = radial_profile(np.ones((28, 40)))
    np.testing.assert_allclose(power, 1)
