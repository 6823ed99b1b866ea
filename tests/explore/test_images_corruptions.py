import numpy as np
import pytest

from medrobust_lib import SUITES, explore
from medrobust_lib.adaptation import adapting
from medrobust_lib.corruptions.suites import corrupted
from medrobust_lib.evaluation import Candidate
from medrobust_lib.models.adapters import load_adapter


@pytest.fixture(scope="module")
def adapted(model):
    found = {}
    for seed in (0, 1):
        folder = adapting.find_demo_adapter(model, adapting.DEMO_DATASETS, fraction=0.1, rank=16, seed=seed)
        found[f"seed {seed}"] = load_adapter(model, folder)
    return found


@pytest.fixture(scope="module")
def candidates(model, data):
    return {
        name: Candidate(model, model.class_features(data.classes, [template]))
        for name, template in (("own", data.templates[0]), ("off topic", "a photo of a dog next to {}"))
    }


def chances(model, texts, data):
    return model.probabilities(model.encode_image(model.prepare(data.images)), texts)[0].detach().numpy()


def test_corruption_view_shows_clean_and_corrupted(candidates, data):
    figure = explore.corruption_view(candidates, data, index=1, corruption="contrast", severity=4)
    clean, worse = figure.axes[:2]
    np.testing.assert_array_equal(clean.images[0].get_array(), data.images[1])
    expected = corrupted(data.subset([1]), "contrast", severity=4)
    np.testing.assert_array_equal(worse.images[0].get_array(), expected.images[0])
    assert worse.get_title(loc="left") == "contrast, severity 4"


def test_probabilities_of_the_true_class_are_those_of_each_model(candidates, data):
    figure = explore.corruption_view(candidates, data, index=2, corruption="gaussian_noise", severity=5)
    hollow, *filled = figure.axes[3].collections[1:]
    truth, worse = data.labels[2], corrupted(data.subset([2]), "gaussian_noise", severity=5)
    before = [chances(*candidate, data.subset([2]))[truth] for candidate in candidates.values()]
    after = [chances(*candidate, worse)[truth] for candidate in candidates.values()]
    np.testing.assert_allclose(hollow.get_offsets()[:, 0], before, atol=1e-5)
    shown = {y: x for part in filled for x, y in part.get_offsets()}
    np.testing.assert_allclose([shown[0], shown[1]], after, atol=1e-5)


def test_at_severity_zero_nothing_moves(candidates, data):
    figure = explore.corruption_view(candidates, data, index=2, corruption="gaussian_noise", severity=0)
    clean, same = figure.axes[2].lines[:2]
    np.testing.assert_array_equal(clean.get_ydata(), same.get_ydata())


def test_noise_raises_and_blur_lowers_the_high_frequencies(candidates, data):
    for corruption, sign in (("gaussian_noise", 1), ("zoom_blur", -1)):
        figure = explore.corruption_view(candidates, data, index=0, corruption=corruption, severity=5)
        clean, worse = (line.get_ydata()[-5:].mean() for line in figure.axes[2].lines[:2])
        assert sign * (worse - clean) > 0.3


def test_every_control_of_the_corruption_instrument_changes_the_picture(candidates, data):
    instrument = explore.explore_corruptions(candidates, data)
    assert instrument.controls["corruption"].options == SUITES["medimeta-c"].corruptions
    seen = [instrument.picture.value]
    for name, value in (("index", 3), ("corruption", "pixelate"), ("severity", 5)):
        instrument.controls[name].value = value
        seen.append(instrument.picture.value)
    assert len(set(seen)) == 4
    assert instrument.message.value == ""


def test_an_unknown_corruption_is_named(candidates, data):
    with pytest.raises(ValueError, match="fog"):
        explore.corruption_view(candidates, data, index=0, corruption="fog", severity=1)


def test_adapters_view_shows_probabilities_before_and_after(model, adapted, data, texts):
    chosen = {"adapter": "seed 1", "index": 2, "corruption": "motion_blur", "severity": 3}
    figure = explore.adapters_view(model, adapted, data, texts, **chosen)
    worse = corrupted(data.subset([2]), "motion_blur", severity=3)
    count = len(data.classes)
    for bars, part in ((figure.axes[1], data.subset([2])), (figure.axes[3], worse)):
        shown = [bar.get_width() for bar in bars.patches]
        np.testing.assert_allclose(shown[:count], chances(model, texts, part), atol=1e-5)
        np.testing.assert_allclose(shown[count:], chances(adapted["seed 1"], texts, part), atol=1e-5)


def test_every_control_of_the_adapter_instrument_changes_the_picture(model, adapted, data, texts):
    instrument = explore.explore_adapters(model, adapted, data, texts)
    seen = [instrument.picture.value]
    for name, value in (("adapter", "seed 1"), ("index", 3), ("corruption", "pixelate"), ("severity", 5)):
        instrument.controls[name].value = value
        seen.append(instrument.picture.value)
    assert len(set(seen)) == 5
    assert instrument.message.value == ""


def test_long_names_do_not_run_into_anything(model, adapted, histology, overlaps):
    texts = model.class_features(histology.classes, histology.templates[:1])
    index = int((histology.labels == 8).argmax())
    chosen = {"index": index, "corruption": "gaussian_noise", "severity": 2}
    figure = explore.adapters_view(model, adapted, histology, texts, adapter="seed 0", **chosen)
    assert overlaps(figure) == ([], [])
    many = {f"classifier number {k}": Candidate(model, texts) for k in range(6)}
    assert overlaps(explore.corruption_view(many, histology, **chosen)) == ([], [])
