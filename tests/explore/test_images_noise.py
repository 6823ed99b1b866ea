import numpy as np
import pytest

from medrobust_lib import certify, explore
from medrobust_lib.explore.images import EncodedImages, proof_in_words
from medrobust_lib.smoothing.bounds import ALPHA, FEW_N, FEW_N0
from medrobust_lib.smoothing.certify import Verdict
from medrobust_lib.smoothing.methods import PromptClassifier
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies, vote


def widths(ax):
    return np.array([bar.get_width() for bar in ax.patches])


def words(figure):
    return "\n".join(text.get_text() for text in figure.texts)


def test_votes_are_those_of_the_library_on_the_same_noise(model, data, texts):
    figure = explore.noise_view(model, data, texts, index=1, sigma=0.3, n=40, seed=5)
    stream = NoiseStream(5, data.id, int(data.indices[1]), 0.3, "estimate")
    expected = vote(model, texts, model.prepare(data.images[1:2])[0], stream, n=40)
    np.testing.assert_array_equal(widths(figure.axes[1])[: len(expected)], expected)


@pytest.mark.parametrize(("index", "sigma"), [(1, 0.1), (4, 0.25), (6, 1.0)])
def test_the_certificate_is_that_of_certify(model, data, texts, index, sigma):
    encoded = EncodedImages(model, data, seed=3)
    verdict, votes = encoded.verdict(index, texts, sigma=sigma, n0=FEW_N0, n=FEW_N, alpha=ALPHA)
    expected = certify(
        PromptClassifier(model, texts), model.prepare(data.images[index : index + 1])[0], sigma=sigma,
        n0=FEW_N0, n=FEW_N,
        alpha=ALPHA, bounds="one", seed=3, dataset=data.id, index=int(data.indices[index]),
    )  # fmt: skip
    assert (verdict.predicted, verdict.k, verdict.n) == (expected.predicted, expected.k, expected.n)
    assert verdict.radius == pytest.approx(expected.radius)
    assert votes.sum() == FEW_N


def test_at_sigma_zero_all_copies_agree_and_nothing_is_certified(model, data, texts):
    figure = explore.noise_view(model, data, texts, index=1, sigma=0.0, n=6)
    assert sorted(widths(figure.axes[1]))[-1] == 6
    assert figure.axes[2].get_title(loc="left") == "no noise, no certificate"
    assert "Certificates need noise" in words(figure)


def test_the_picture_is_the_first_copy_that_votes(model, data, texts):
    figure = explore.noise_view(model, data, texts, index=1, sigma=0.2, n=12)
    stream = NoiseStream(0, data.id, int(data.indices[1]), 0.2, "estimate")
    copy = noisy_copies(model.prepare(data.images[1:2])[0], stream)[0]
    np.testing.assert_allclose(
        figure.axes[0].images[0].get_array(), copy.clamp(0, 1).permute(1, 2, 0).numpy(), atol=1e-6
    )


def test_the_guarantee_is_named(model, data, texts):
    assert "Guarantee (standard):" in words(explore.noise_view(model, data, texts, index=0, sigma=0.1, n=20))


def test_abstentions_and_wrong_answers_are_called_so():
    shown = {"names": ("mucus", "debris"), "truth": 0, "sigma": 0.25, "n0": 20, "alpha": 0.001}
    split = proof_in_words(Verdict(predicted=-1, radius=0.0, p_lower=0.45, k=60, n=100), **shown)
    assert "Abstains: 66 votes are the fewest that prove a majority" in split
    wrong = proof_in_words(Verdict(predicted=1, radius=0.1, p_lower=0.7, k=85, n=100), **shown)
    assert "Certified: debris (wrong:" in wrong
    right = proof_in_words(Verdict(predicted=0, radius=0.1, p_lower=0.7, k=85, n=100), **shown)
    assert "Certified: mucus (right)" in right


def test_draws_that_can_never_certify_are_told_in_the_instrument(model, data, texts):
    instrument = explore.explore_noise(model, data, texts, n=5)
    assert "n=5 draws can never certify at alpha=0.001" in instrument.message.value


def test_image_and_sigma_change_the_picture(model, data, texts):
    instrument = explore.explore_noise(model, data, texts, n=12)
    seen = [instrument.picture.value]
    for name, value in (("sigma", 0.5), ("index", 3), ("sigma", 0.0)):
        instrument.controls[name].value = value
        seen.append(instrument.picture.value)
    assert len(set(seen)) == 4
    assert instrument.message.value == ""


@pytest.mark.parametrize("sigma", [0.0, 0.02, 1.0])
def test_long_names_do_not_run_into_anything(model, histology, overlaps, sigma):
    index = int((histology.labels == 8).argmax())
    texts = model.class_features(histology.classes, histology.templates[:1])
    assert overlaps(explore.noise_view(model, histology, texts, index=index, sigma=sigma)) == ([], [])


def test_noisy_features_are_encoded_once(model, data, monkeypatch):
    encoded = EncodedImages(model, data)
    first = encoded.noisy(0, sigma=0.2, role="estimate", count=3)
    monkeypatch.setattr(type(model), "encode_image", None)
    assert encoded.noisy(0, sigma=0.2, role="estimate", count=3) is first


def test_preparation_says_how_far_it_is(model, data, capsys):
    EncodedImages(model, data).prepare([0, 1], sigmas=[0.1], draws=[("select", 2)])
    assert "prepare the instrument: 2 of 2 images x sigmas" in capsys.readouterr().out
