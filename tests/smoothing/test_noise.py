import itertools

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from medrobust_lib import load_dataset, load_model
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies, noisy_features, vote

KEY = {"seed": 0, "dataset": "phantom/blood", "index": 3, "sigma": 0.5, "role": "estimate"}


@pytest.fixture(scope="module")
def model():
    return load_model("demo-clip", device="cpu")


@pytest.fixture(scope="module")
def data():
    return load_dataset("phantom/blood", n=10)


def test_draws_are_standard_normal_times_sigma():
    draws = NoiseStream(**KEY).draw((3, 16, 16), count=40)
    assert kstest(draws.numpy().ravel() / 0.5, "norm").pvalue > 1e-3
    assert draws.dtype == torch.float32


def test_any_part_of_a_stream_can_be_drawn_anywhere():
    stream = NoiseStream(**KEY)
    whole = stream.draw((3, 5, 5), count=12)
    parts = [stream.draw((3, 5, 5), first=first, count=count) for first, count in [(0, 1), (1, 4), (5, 7)]]
    assert torch.equal(whole, torch.cat(parts))


def test_streams_with_different_keys_are_different_and_uncorrelated():
    other = {"seed": 1, "dataset": "phantom/oct", "index": 4, "sigma": 0.25, "role": "adapt"}
    streams = [NoiseStream(**KEY), *(NoiseStream(**{**KEY, name: value}) for name, value in other.items())]
    draws = [s.draw((3, 32, 32))[0].flatten() / s.sigma for s in streams]
    for a, b in itertools.combinations(draws, 2):
        assert not (a == b).any()
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(1)
    first = NoiseStream(**KEY).draw((3, 4, 4))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, NoiseStream(**KEY).draw((3, 4, 4)))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_sigma_zero_returns_the_image():
    pixels = torch.rand(3, 8, 8)
    copies = noisy_copies(pixels, NoiseStream(**{**KEY, "sigma": 0.0}), count=2)
    assert torch.equal(copies, pixels.expand(2, 3, 8, 8))


def test_noise_is_not_clipped():
    copies = noisy_copies(torch.ones(3, 8, 8), NoiseStream(**KEY), count=4)
    assert copies.max() > 1.5


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_features_do_not_depend_on_the_batch_size(model, data, batch_size):
    reference = noisy_features(model, data, sigma=0.25, batch_size=5)
    found = noisy_features(model, data, sigma=0.25, batch_size=batch_size)
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=0)


def test_features_follow_the_image_not_its_place(model, data):
    everything = noisy_features(model, data, sigma=0.25)
    some = noisy_features(model, data.subset([7, 2]), sigma=0.25)
    torch.testing.assert_close(some, everything[[7, 2]], atol=1e-5, rtol=0)


def test_votes_sum_to_n_and_do_not_depend_on_the_batch_size(model, data):
    texts = model.class_features(data.classes, data.templates[:1])
    pixels = model.prepare(data.images[:1])[0]
    counts = [vote(model, texts, pixels, NoiseStream(**KEY), n=50, batch_size=b) for b in (7, 64)]
    assert int(counts[0].sum()) == 50
    assert torch.equal(counts[0], counts[1])


def test_votes_at_sigma_zero_are_unanimous(model, data):
    texts = model.class_features(data.classes, data.templates[:1])
    pixels = model.prepare(data.images[:1])[0]
    votes = vote(model, texts, pixels, NoiseStream(**{**KEY, "sigma": 0.0}), n=5)
    clean = int(model.probabilities(model.encode_image(pixels[None]), texts).argmax())
    np.testing.assert_array_equal(votes, 5 * np.eye(8)[clean])


def test_bad_keys_are_named():
    with pytest.raises(ValueError, match=r"sigma=-0\.1: noise levels are standard deviations >= 0"):
        NoiseStream(**{**KEY, "sigma": -0.1})
    with pytest.raises(ValueError, match="unknown noise role 'train'; choose one of adapt, select, estimate"):
        NoiseStream(**{**KEY, "role": "train"})
