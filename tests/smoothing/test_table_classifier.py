"""`certify_dataset` with a plain function from pixels to labels."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from torch import nn

import medrobust_lib as mr
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.smoothing.certify import certify
from medrobust_lib.smoothing.methods import FixedPrompts, zero_shot_methods
from medrobust_lib.smoothing.table import certify_dataset

SIDE = 8
NUMBERS = {"sigmas": [0.25], "n0": 20, "n": 200, "alpha": 0.05, "radii": (0, 0.1, 0.25)}


def bright(pixels):
    """Half of pixel space: whether the mean is above one half."""
    return pixels.mean((1, 2, 3)) > 0.5


class Scores(nn.Module):
    """The same, as two scores with weights."""

    image_size = SIDE

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, pixels):
        over = self.gain * (pixels.mean((1, 2, 3)) - 0.5)
        return torch.stack([-over, over], dim=1)


@pytest.fixture
def data():
    """Grey images from dark to bright, a little noise on them; their labels are right."""
    levels = np.array([100, 120, 125, 131, 135, 160], dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (6, SIDE, SIDE, 3)).copy()
    images += np.random.default_rng(0).integers(0, 2, images.shape, dtype=np.uint8)
    return ImageDataset(
        id="folder:greys", split="test", images=images, labels=(levels > 127).astype(np.int64),
        classes=("dark", "bright"), templates=("{}", "a {}"), modality="drawing", licence="CC0-1.0", provenance={},
        indices=np.arange(6, dtype=np.int64) + 10,
    )  # fmt: skip


@pytest.mark.parametrize("sampling", ["fixed", "sequential"])
def test_every_row_is_what_certify_says_of_the_function(data, sampling):
    table = certify_dataset(bright, data, **NUMBERS, sampling=sampling, seed=3)
    assert set(table.method) == set(table.model) == {"bright"} and set(table.guarantee) == {"standard"}
    for place, row in enumerate(table.itertuples()):
        found = certify(
            bright, torch.from_numpy(data.images[place]).permute(2, 0, 1) / 255, sigma=0.25, n0=20, n=200, alpha=0.05,
            sampling=sampling, radii=NUMBERS["radii"] if sampling == "sequential" else None, seed=3, dataset=data.id,
            index=row.image,
        )  # fmt: skip
        for name in ("predicted", "radius", "p_lower", "k", "n", "draws"):
            assert getattr(row, name) == getattr(found, name), name


def test_no_radius_passes_the_boundary_of_a_half_space(data):
    table = certify_dataset(bright, data, **(NUMBERS | {"n": 4000, "alpha": 0.001}), sampling="fixed")
    distance = np.abs(data.images.mean((1, 2, 3)) / 255 - 0.5) * (3 * SIDE**2) ** 0.5  # L2, in [0, 1] pixel units
    assert (table.radius <= distance).all()
    sure = table.predicted != -1
    assert (table.predicted == table.label)[sure].all() and sure.sum() >= 4
    votes = table.k / table.n
    assert np.abs(votes - norm.cdf(distance / 0.25))[sure].max() < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("perturbation", ["pixel-noise", "brightness"])
def test_scores_labels_and_a_fitted_regression_are_certified_alike(data, perturbation):
    flat = data.images.reshape(6, -1) / 255
    fitted = LogisticRegression(C=1e4).fit(flat, data.labels)
    net = Scores()

    def labels(pixels):
        return net(pixels).argmax(1).tolist()

    def regression(pixels):
        return fitted.predict(pixels.permute(0, 2, 3, 1).reshape(len(pixels), -1).numpy())

    rules = NUMBERS | {"sigmas": None, "radii": (0.05,), "perturbation": perturbation}
    tables = [certify_dataset(one, data, **rules) for one in (net.eval(), labels, regression)]
    assert [set(table.method) for table in tables] == [{"Scores"}, {"labels"}, {"regression"}]
    answers = [table[["predicted", "radius", "k", "n", "draws"]] for table in tables[:2]]
    pd.testing.assert_frame_equal(*answers)
    assert set(tables[2].perturbation) == {perturbation} and (tables[2].predicted != -1).any()


def test_stores_resume_and_refuse_other_weights_and_another_function(data, tmp_path):
    first = certify_dataset(Scores().eval(), data.subset([0, 1]), **NUMBERS, store=tmp_path)
    again = certify_dataset(Scores().eval(), data, **NUMBERS, store=tmp_path, jobs=2)
    pd.testing.assert_frame_equal(again[again.image < 12], first)
    pd.testing.assert_frame_equal(
        again.drop(columns="seconds"), certify_dataset(Scores().eval(), data, **NUMBERS).drop(columns="seconds")
    )
    with pytest.raises(ValueError, match=r"\n  weights: the store has"):
        certify_dataset(Scores(2.0).eval(), data, **NUMBERS, store=tmp_path)
    with (
        pytest.warns(UserWarning, match="bright: no network was found behind the classifier"),
        pytest.raises(ValueError, match=r'model: the store has "Scores", this run asks "bright"'),
    ):
        certify_dataset(bright, data, **NUMBERS, store=tmp_path)


def test_a_classifier_with_settings_and_methods_of_its_own(data):
    model = mr.Classifier(Scores().eval(), n_classes=2, image_size=4, id="small")
    assert [method.name for method in zero_shot_methods(model, data)] == ["small"]
    texts = model.class_features(data.classes)
    methods = [FixedPrompts("plain", texts), FixedPrompts("halved", texts, denoiser=lambda noisy, sigma: noisy / 2)]
    table = certify_dataset(model, data, methods, **NUMBERS)
    assert table[table.method == "halved"].predicted.isin([0, -1]).all()  # half of the light is dark
    assert (table[table.method == "plain"].predicted == 1).any()


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (bright, lambda data: data.images[:, :6], "are 6 x 8 px: give the classifier an attribute image_size"),
        (lambda pixels: bright(pixels), lambda data: data.images, "a lambda has no name"),
        (Scores(), lambda data: data.images, "Scores is in training mode"),
    ],
)
def test_what_a_function_lacks_is_named_before_any_work(data, function, change, message):
    images = change(data)
    other = ImageDataset(**{**vars(data), "images": images})
    with pytest.raises(ValueError, match=re.escape(message)):
        certify_dataset(function, other, **NUMBERS)
