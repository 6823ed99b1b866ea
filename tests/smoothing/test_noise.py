import itertools

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies, noisy_features, vote

KEY = {"seed": 0, "dataset": "phantom/blood", "index": 3, "sigma": 0.5, "role": "estimate"}
PINNED = [-0.234383, -0.359585, 0.11853]
PINNED_SEEDS = [442354182981401830, -5470865254765373447]


def test_draws_are_standard_normal_times_sigma():
    draws = NoiseStream(**KEY).draw((3, 16, 16), count=40)
    assert kstest(draws.numpy().ravel() / 0.5, "norm").pvalue > 1e-3
    assert draws.dtype == torch.float32


def test_any_part_of_a_stream_can_be_drawn_anywhere():
    stream = NoiseStream(**KEY)
    whole = stream.draw((3, 5, 5), count=12)
    parts = [stream.draw((3, 5, 5), first=first, count=count) for first, count in [(0, 1), (1, 4), (5, 7)]]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 2, 2), (3, 3, 5), (1, 7, 9)])
def test_a_draw_does_not_depend_on_its_company(shape):
    """Tiny images take another path through torch's generator, which keeps half of a pair for the next call."""
    stream = NoiseStream(**KEY)
    whole = stream.draw(shape, count=9)
    for number in range(9):
        assert torch.equal(stream.draw(shape, first=number)[0], whole[number])


def test_a_stream_is_the_same_in_every_session():
    """Stores and published tables rest on it: a changed value here means that old runs cannot be continued."""
    draw = NoiseStream(0, "phantom/blood", 3, 0.5, "estimate").draw((3, 8, 8), first=41)[0]
    torch.testing.assert_close(draw.flatten()[:3], torch.tensor(PINNED), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", [1, 1.0, np.float64(1), np.float32(1)])
def test_equal_addresses_are_one_stream_however_they_are_written(sigma):
    plain = NoiseStream(2, "phantom/blood", 3, 1.0, "select").draw((3, 4, 4))
    assert torch.equal(NoiseStream(np.int64(2), "phantom/blood", np.int32(3), sigma, "select").draw((3, 4, 4)), plain)


def test_no_draw_comes_twice():
    draws = NoiseStream(**KEY).draw((3, 2, 2), count=5000).flatten(1).numpy()
    assert len(np.unique(draws, axis=0)) == 5000


def test_draws_of_a_stream_are_independent():
    """Their mean shrinks, and their lengths scatter, as independent Gaussians do."""
    draws = NoiseStream(**KEY).draw((3, 8, 8), count=4000).flatten(1).numpy() / KEY["sigma"]
    assert kstest(draws.mean(0) * 4000**0.5, "norm").pvalue > 1e-3
    assert kstest((draws**2).sum(1), "chi2", args=(192,)).pvalue > 1e-3
    successive = (draws[1:] * draws[:-1]).sum(1) / 192**0.5  # standard normal, nearly
    assert abs(successive.mean()) < 4 / 3999**0.5
    assert abs(successive.std() - 1) < 0.05


def test_streams_with_different_keys_are_different_and_uncorrelated():
    other = {"seed": 1, "dataset": "phantom/oct", "index": 4, "sigma": 0.25, "role": "adapt"}
    streams = [NoiseStream(**KEY), *(NoiseStream(**{**KEY, name: value}) for name, value in other.items())]
    draws = [s.draw((3, 32, 32))[0].flatten() / s.sigma for s in streams]
    for a, b in itertools.combinations(draws, 2):
        assert not (a == b).any()
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1


def test_decoding_seeds_belong_to_a_draw_and_are_other_numbers_than_its_noise_comes_from():
    stream = NoiseStream(**KEY)
    seeds = stream.decoding_seeds(0, 2000)
    assert stream.decoding_seeds(700, 3) == seeds[700:703]
    assert stream.decoding_seeds(5, 0) == []
    assert len(set(seeds)) == 2000
    other = {"seed": 1, "dataset": "phantom/oct", "index": 4, "sigma": 0.25, "role": "select"}
    for name, value in other.items():
        assert not set(NoiseStream(**{**KEY, name: value}).decoding_seeds(0, 2000)) & set(seeds), name
    for number, seed in enumerate(seeds[:200]):
        from_seed = torch.empty(3, 4, 4).normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
        assert not (from_seed == stream.draw((3, 4, 4), first=number)[0]).any()
    # Uniform on the signed 64-bit numbers, and no function of the noise.
    uniform = np.array(seeds, dtype=float) / 2**64 + 0.5
    assert kstest(uniform, "uniform").pvalue > 1e-3
    first_pixels = stream.draw((3, 2, 2), count=2000)[:, 0, 0, 0].numpy()
    assert abs(np.corrcoef(uniform, first_pixels)[0, 1]) < 4 / 2000**0.5


def test_decoding_seeds_are_the_same_in_every_session():
    stream = NoiseStream(0, "phantom/blood", 3, 0.5, "estimate")
    assert stream.decoding_seeds(41, 2) == PINNED_SEEDS


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
    reference = noisy_features(model, data, sigma=0.25, role="estimate", batch_size=5)
    found = noisy_features(model, data, sigma=0.25, role="estimate", batch_size=batch_size)
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=0)


def test_features_follow_the_image_not_its_place(model, data):
    everything = noisy_features(model, data, sigma=0.25, role="estimate")
    some = noisy_features(model, data.subset([7, 2]), sigma=0.25, role="estimate")
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
