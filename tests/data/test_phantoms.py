"""Synthetic phantoms: what they promise about streams, labels, sizes, and the absence of shortcuts."""

import functools
import itertools

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medrobust_lib.phantoms import MODALITIES, SPLITS, phantom_classes, render_phantoms

SIDE = 28


@functools.cache
def rendered(modality, split, site="B", n=24):
    """The first images of a split, drawn once for all tests that ask about them, and their labels."""
    images, labels = render_phantoms(modality, range(n), split=split, site=site, image_size=SIDE)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


every_modality = pytest.mark.parametrize("modality", MODALITIES)


def _chance(modality):
    return 1 / len(phantom_classes(modality))


def _crossval_accuracy(features, labels):
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return cross_val_score(model, features, labels, cv=5).mean()


@every_modality
@pytest.mark.parametrize("size", [28, 64, 130])
def test_images_are_uint8_rgb_of_the_asked_size(modality, size):
    images, labels = render_phantoms(modality, [0, 1], split="val", image_size=size)
    assert images.shape == (2, size, size, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1]


@every_modality
def test_the_largest_size_is_drawn(modality):
    images, _ = render_phantoms(modality, [0], split="test", image_size=512)
    assert images.shape == (1, 512, 512, 3)
    assert images.std() > 5


@every_modality
def test_painters_give_clean_float_scenes_in_range(modality):
    for name, painter in MODALITIES[modality].PAINTERS.items():
        scene = painter(np.random.default_rng(3), 40)
        assert scene.shape == (40, 40, 3), name
        assert scene.dtype == np.float32, name
        assert np.isfinite(scene).all(), name
        assert 0 <= scene.min() < scene.max() <= 1, name


@every_modality
def test_a_scene_keeps_its_layout_at_every_size(modality):
    """The random numbers drawn must not depend on the size: the large image, shrunk, is the small one."""
    painter = list(MODALITIES[modality].PAINTERS.values())[-1]
    small = painter(np.random.default_rng(11), 48)
    large = painter(np.random.default_rng(11), 192).reshape(48, 4, 48, 4, 3).mean((1, 3))
    stranger = painter(np.random.default_rng(12), 48)
    assert np.abs(small - large).mean() < 0.35 * np.abs(small - stranger).mean()


@every_modality
def test_rendering_is_deterministic_and_independent_of_the_subset(modality):
    images, labels = rendered(modality, "test")
    again, again_labels = render_phantoms(modality, [7, 5], split="test", image_size=SIDE)
    np.testing.assert_array_equal(again, images[[7, 5]])
    np.testing.assert_array_equal(again_labels, labels[[7, 5]])


@every_modality
def test_no_image_is_shared_by_splits_sites_or_indices(modality):
    seen = set()
    for split, site in itertools.product(SPLITS, "AB"):
        images, _ = rendered(modality, split, site, n=4)
        seen.update(image.tobytes() for image in images)
    assert len(seen) == 4 * len(SPLITS) * 2


@every_modality
def test_another_split_is_another_scene(modality):
    """Not one scene recorded twice: the recorded images are no more alike than two of one split."""
    test, train = rendered(modality, "test")[0][:12], rendered(modality, "train", n=12)[0]
    step = len(phantom_classes(modality))
    across = np.abs(test.astype(float) - train).mean((1, 2, 3))
    within = np.abs(test[:-step].astype(float) - test[step:]).mean()
    assert across.min() > 0.2 * within


@every_modality
def test_sites_record_differently(modality):
    site_a, site_b = (rendered(modality, "test", site)[0] for site in "AB")
    colours_a, colours_b = (images.mean((1, 2)) / images.mean((1, 2, 3))[:, None] for images in (site_a, site_b))
    contrast_a, contrast_b = (images.std((1, 2, 3)) for images in (site_a, site_b))
    fine_a, fine_b = (np.abs(np.diff(i.astype(float), axis=2)).mean((1, 2, 3)) for i in (site_a, site_b))
    features_a = np.column_stack([colours_a, contrast_a, fine_a, site_a.mean((1, 2, 3))])
    features_b = np.column_stack([colours_b, contrast_b, fine_b, site_b.mean((1, 2, 3))])
    features, sites = np.vstack([features_a, features_b]), np.repeat([0, 1], 24)
    assert _crossval_accuracy(features, sites) > 0.75


@every_modality
def test_splits_are_balanced(modality):
    count = len(phantom_classes(modality))
    for split in ("train", "val", "test"):
        assert SPLITS[split] % count == 0, f"the last round of classes of {split} would be incomplete"
    last = range(SPLITS["test"] - count, SPLITS["test"])
    _, labels = render_phantoms(modality, last, split="test", image_size=28)
    assert sorted(labels.tolist()) == list(range(count))


@every_modality
def test_no_class_is_told_by_mean_and_spread_of_the_channels(modality):
    """Site B: shape and texture must carry the label, not brightness, contrast or hue."""
    classes = len(phantom_classes(modality))
    count = max(30 * classes, 100)
    images, labels = render_phantoms(modality, range(count), split="val", image_size=28)
    pixels = images.reshape(len(images), -1, 3) / 255
    features = np.hstack([pixels.mean(1), pixels.std(1)])
    chance = _chance(modality)
    limit = 0.75 if classes == 2 else chance + 0.6 * (1 - chance)
    assert _crossval_accuracy(features, labels) < limit


@every_modality
def test_classes_differ_in_what_is_drawn(modality):
    """Two classes painted from one seed differ visibly, and every class varies from seed to seed."""
    painters = MODALITIES[modality].PAINTERS
    scenes = {name: [paint(np.random.default_rng(s), 64) for s in (1, 2)] for name, paint in painters.items()}
    for first, second in itertools.combinations(scenes, 2):
        changed = np.abs(scenes[first][0] - scenes[second][0]).max(axis=2) > 0.05
        assert changed.mean() > 0.005, f"{first} and {second} look the same"
    for name, (one, other) in scenes.items():
        assert np.abs(one - other).mean() > 0.01, f"{name} does not vary"


@pytest.mark.parametrize("modality", ["histology", "blood"])
def test_shape_and_texture_tell_classes(modality):
    """A linear model on the power spectrum and the local contrast does well, where trivia fail."""
    classes = len(phantom_classes(modality))
    images, labels = render_phantoms(modality, range(16 * classes), split="val", site="A", image_size=48)
    grey = images.mean(3) - images.mean((1, 2, 3))[:, None, None]
    window = np.hanning(48) * np.hanning(48)[:, None]
    spectrum = np.log(np.abs(np.fft.rfft2(grey * window)) + 1)
    radius = 48 * np.hypot(*np.meshgrid(np.fft.rfftfreq(48), np.fft.fftfreq(48)))
    rings = [spectrum[:, (radius >= r) & (radius < r + 2)].mean(1) for r in range(0, 24, 2)]
    contrast = images.reshape(len(images), 8, 6, 8, 6, 3).std((2, 4)).reshape(len(images), -1)
    layout = PCA(12, random_state=0).fit_transform(contrast)
    chance = _chance(modality)
    assert _crossval_accuracy(np.column_stack([*rings, layout]), labels) > chance + 0.3 * (1 - chance)


def test_class_names_follow_the_public_sets():
    assert phantom_classes("fundus") == ("abnormal", "normal")
    assert phantom_classes("blood")[0] == "basophil"
    assert phantom_classes("blood")[-1] == "platelet"
    first_words = " ".join(name.split()[0] for name in phantom_classes("histology"))
    tissues = "adipose background debris lymphocytes mucus smooth normal cancer-associated colorectal"
    assert first_words == tissues


def test_unknown_modality_lists_the_choices():
    with pytest.raises(ValueError, match=r"modality 'retina'.*histology, blood, breast, chest, fundus, oct"):
        render_phantoms("retina", [0], split="test")


def test_unknown_split_and_site_list_the_choices():
    with pytest.raises(ValueError, match=r"split 'valid'.*train, val, test"):
        render_phantoms("blood", [0], split="valid")
    with pytest.raises(ValueError, match=r"site 'C'.*A, B"):
        render_phantoms("blood", [0], split="test", site="C")


@pytest.mark.parametrize("size", [20, 513])
def test_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=rf"image_size={size}.*28 to 512"):
        render_phantoms("oct", [0], split="test", image_size=size)


@pytest.mark.parametrize("index", [-1, 720])
def test_index_out_of_range_is_refused(index):
    with pytest.raises(ValueError, match=r"split 'test' run from 0 to 719"):
        render_phantoms("chest", [0, index], split="test")


def test_no_index_gives_no_image():
    images, labels = render_phantoms("blood", [], split="test", image_size=28)
    assert images.shape == (0, 28, 28, 3)
    assert labels.shape == (0,)
