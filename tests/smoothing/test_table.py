import dataclasses
import multiprocessing
import os
import sys
import time

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from torch.nn import functional

import medrobust_lib as mr
from medrobust_lib import metrics
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.experiments.cards import HEADLESS_VARIABLE
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing
from medrobust_lib.smoothing.certificate import ABSTAIN
from medrobust_lib.smoothing.certify import certify
from medrobust_lib.smoothing.methods import (
    AdaptationFeatures,
    AdaptedPrompts,
    CandidatePrompts,
    FixedPrompts,
    PerSamplePrompts,
    PromptClassifier,
    PromptMethod,
)
from medrobust_lib.smoothing.noise import NoiseStream
from medrobust_lib.smoothing.prompts import text_prompts
from medrobust_lib.smoothing.table import certify_dataset

SIGMAS = (0.1, 0.25)
NUMBERS = {"sigmas": SIGMAS, "n0": 20, "n": 80, "alpha": 0.05, "radii": (0, 0.1, 0.25)}
COLUMNS = [
    *["dataset", "image", "file", "label", "class_name", "model", "method", "guarantee", "n_classes", "perturbation"],
    *["sigma", "predicted", "predicted_name", "confidence", "radius"],
    *[
        "radius_tested",
        "radius_reach",
        "p_lower",
        "p_upper",
        "bounds",
        "k",
        "n",
        "n0",
        "draws",
        "alpha",
        "sampling",
        "mode",
        "seed",
        "seconds",
    ],
]


class ColourEncoder(DualEncoder):
    """The cheapest model there is: the mean colour is the feature. It counts its batches and can be made to fail."""

    def __init__(self, *, fails_after=None, pause=0.0, preprocessing=None):
        grey = Preprocessing(8, "squash", "bilinear", mean=(0.5,) * 3, std=(1.0,) * 3)
        super().__init__(
            id="colours",
            preprocessing=preprocessing or grey,
            embed_dim=3,
            context_length=8,
            logit_scale=10.0,
            provenance={},
        )
        self.gain = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.batches, self.fails_after, self.pause = [], fails_after, pause
        self.eval()

    def _image_features(self, pixels):
        if self.fails_after is not None and len(self.batches) >= self.fails_after:
            raise RuntimeError("the power went out")
        self.batches.append(len(pixels))
        time.sleep(self.pause)
        return pixels.mean(dim=(2, 3)) * self.gain

    def tokenize(self, texts):
        raise NotImplementedError

    embed_tokens = _text_features = tokenize


def colour_data(n, seed=0):
    """Squares of red, green and blue, strong and weak in turn; every fifth label is wrong."""
    rng = np.random.default_rng(seed)
    colours = np.arange(n) % 3
    images = np.full((n, 8, 8, 3), 120, dtype=np.uint8)
    for image, colour, strength in zip(images, colours, np.resize([60, 8, 25, 4], n), strict=True):
        image[..., colour] += np.uint8(strength)
    images += rng.integers(0, 10, images.shape, dtype=np.uint8)
    labels = np.where(np.arange(n) % 5 == 4, (colours + 1) % 3, colours)
    return ImageDataset(
        id="folder:colours",
        split="test",
        images=images,
        labels=labels.astype(np.int64),
        classes=("red", "green", "blue"),
        templates=("{}",),
        modality="drawing",
        licence="CC0-1.0",
        provenance={},
        indices=np.arange(n, dtype=np.int64) * 2 + 1,
    )


def prompts(name="axes", seed=None, denoiser=None):
    """Class features along the colour axes, or near them."""
    features = torch.eye(3)
    if seed is not None:
        features = features + 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
    return FixedPrompts(name, functional.normalize(features, dim=1), denoiser=denoiser)


class MeanShift(PromptMethod):
    """Adapts to one image: subtracts the mean scores of its adaptation features."""

    guarantee = "frozen-prompt"

    def __init__(self, *, n_adapt=7, events=None, name="mean shift"):
        self.n_adapt, self.events, self.name = n_adapt, [] if events is None else events, name

    def classifier(self, adaptation):
        assert isinstance(adaptation, AdaptationFeatures)
        assert adaptation.stream.role == "adapt"
        self.events.append(("built", self.name, tuple(adaptation.features.shape)))
        shift = adaptation.features.mean(0)
        return lambda features: (features - 0.5 * shift).argmax(1)

    def record(self):
        return {"name": self.name, "n_adapt": self.n_adapt}


@pytest.fixture
def encoder():
    return ColourEncoder()


@pytest.fixture
def data():
    return colour_data(8)


@pytest.fixture(scope="module")
def plain():
    """The table of these images with one method, not to be changed."""
    return certify_dataset(ColourEncoder(), colour_data(8), [prompts()], **NUMBERS)


@pytest.fixture(scope="module")
def mixed():
    """The table of these images with a fixed and an adapting method, not to be changed."""
    return certify_dataset(ColourEncoder(), colour_data(8), [prompts(), MeanShift()], **NUMBERS, batch_size=13)


def without_seconds(table):
    return table.drop(columns="seconds")


def assert_same(found, expected):
    pd.testing.assert_frame_equal(without_seconds(found), without_seconds(expected), check_exact=True)


# The table


def test_one_row_per_image_sigma_and_method_in_this_order(encoder, data):
    table = certify_dataset(encoder, data, [prompts(), prompts("tilted", 1)], **NUMBERS)
    assert list(table.columns) == COLUMNS
    expected = [(int(i), s, m) for i in data.indices for s in SIGMAS for m in ("axes", "tilted")]
    assert list(table[["image", "sigma", "method"]].itertuples(index=False, name=None)) == expected
    assert list(table.label[::4]) == list(data.labels) and list(table.file[::4]) == list(data.files)
    named = np.array([*data.classes, "abstain"])
    assert list(table.predicted_name) == list(named[table.predicted]) and list(table.class_name) == list(
        named[table.label]
    )
    assert (table.confidence == table.k / table.n).all() and table.confidence.between(0, 1).all()
    constants = {
        "dataset": "folder:colours",
        "model": "colours",
        "guarantee": "standard",
        "n_classes": 3,
        "perturbation": "pixel-noise",
        "n0": 20,
        "alpha": 0.05,
        "sampling": "sequential",
        "mode": "predict",
        "seed": 0,
    }
    for column, value in constants.items():
        assert (table[column] == value).all(), column
    assert (table.draws == table.n + 20).all()
    assert (table.k <= table.n).all()
    assert (table.n <= 80).all()
    assert table.radius.isin([0, 0.1, 0.25]).all()
    assert (table.seconds > 0).all()
    assert (table.groupby(["image", "sigma"]).seconds.nunique() == 1).all()
    abstained = table.predicted == ABSTAIN
    assert 0 < abstained.sum() < len(table)
    assert (table.radius[abstained] == 0).all()
    assert table.radius.max() == 0.25


@pytest.mark.parametrize("mode", ["predict", "evaluate"])
@pytest.mark.parametrize("sampling", ["fixed", "sequential"])
def test_every_row_is_what_certify_says_about_the_image(encoder, data, sampling, mode):
    methods = [prompts(), prompts("tilted", 1)]
    table = certify_dataset(encoder, data, methods, **NUMBERS, sampling=sampling, mode=mode, seed=5)
    features = {method.name: method.class_features for method in methods}
    position = {int(index): place for place, index in enumerate(data.indices)}
    for row in table.itertuples():
        found = certify(
            PromptClassifier(encoder, features[row.method]),
            encoder.prepare(data.images[position[row.image]][None])[0],
            sigma=row.sigma,
            n0=20,
            n=80,
            alpha=0.05,
            sampling=sampling,
            radii=NUMBERS["radii"] if sampling == "sequential" else None,
            label=row.label if mode == "evaluate" else None,
            seed=5,
            dataset=data.id,
            index=row.image,
        )
        for name in ("predicted", "radius", "p_lower", "k", "n", "n0", "draws", "sampling", "mode", "seed", "model"):
            assert getattr(row, name) == getattr(found, name), name


def test_methods_in_one_call_get_what_each_gets_alone(encoder, data):
    askew = prompts("askew", 2, denoiser=lambda pixels, sigma: pixels / 2 + 0.25)
    methods = [prompts(), prompts("tilted", 1), MeanShift(), askew]
    together = certify_dataset(encoder, data, methods, **NUMBERS)
    for method in methods:
        alone = certify_dataset(encoder, data, [method], **NUMBERS)
        assert_same(together[together.method == method.name].reset_index(drop=True), alone)
    assert together.groupby("method").k.sum().nunique() == 4


def test_what_methods_are_about_stands_in_their_rows_and_tells_them_apart(encoder, data, tmp_path):
    methods = [dataclasses.replace(prompts("learned", seed), about={"prompt_seed": seed}) for seed in (1, 2)]
    table = certify_dataset(encoder, data, methods, **NUMBERS, store=tmp_path)
    assert list(table.columns) == [*COLUMNS[:-1], "prompt_seed", "seconds"]
    for method in methods:
        alone = certify_dataset(encoder, data, [dataclasses.replace(method, about={})], **NUMBERS)
        ours = table[table.prompt_seed == method.about["prompt_seed"]].reset_index(drop=True)
        assert_same(ours.drop(columns="prompt_seed"), alone)
    assert methods[0].record() == prompts("learned", 1).record() | {"about": {"prompt_seed": 1}}
    with pytest.raises(ValueError, match="'learned' occurs more than once"):
        certify_dataset(encoder, data, [methods[0], methods[0]], **NUMBERS)


def test_a_model_and_data_alone_give_the_zero_shot_methods_at_a_quarter():
    model, phantoms = mr.load_model("demo-clip", device="cpu"), mr.load_dataset("phantom/blood", n=1)
    table = mr.certify_dataset(model, phantoms, n=20)
    assert list(table.method) == ["zero-shot", "zero-shot ensemble"]
    assert (table.sigma == 0.25).all() and (table.sampling == "sequential").all()


@pytest.mark.parametrize("sampling", ["fixed", "sequential"])
def test_rows_say_by_how_many_bounds_they_were_proved(data, sampling):
    numbers = {**NUMBERS, "sigmas": [0.25], "n": 500, "radii": (0, 0.005, 0.01, 0.05), "sampling": sampling}
    one, two, evaluated, asked = (
        certify_dataset(ColourEncoder(), data, [prompts()], **numbers, **change)
        for change in ({"bounds": "one"}, {}, {"mode": "evaluate"}, {"mode": "evaluate", "bounds": "two"})
    )
    assert (one.bounds == "one").all() and (evaluated.bounds == "one").all()
    assert ((evaluated.n0 == 0) & (asked.n0 == 20)).all()
    rival = two[two.bounds == "two"]
    assert len(rival) > 0 and len(asked[asked.bounds == "two"]) > 0
    assert_same(two[two.bounds == "one"], one[two.bounds == "one"])
    ahead = rival[rival.predicted != ABSTAIN]
    np.testing.assert_allclose(ahead.radius, 0.25 / 2 * (norm.ppf(ahead.p_lower) - norm.ppf(ahead.p_upper)), atol=1e-12)
    assert (ahead.radius >= one.radius[ahead.index]).all() and len(ahead) > 0


def test_repeated_sigmas_count_once_and_a_fine_grid_of_radii_may_be_asked_for(encoder, data, tmp_path):
    numbers = {**NUMBERS, "sigmas": [0.25, 0.25], "radii": None}
    table = certify_dataset(encoder, data, [prompts()], **numbers, store=tmp_path)
    assert len(table) == len(data)
    assert table.radius.nunique() > 3
    assert np.allclose(table.radius / 0.0125, (table.radius / 0.0125).round())


def test_images_follow_their_index_not_their_place(encoder, data, plain):
    part = certify_dataset(encoder, data.subset([6, 2]), [prompts()], **NUMBERS)
    expected = pd.concat([plain[plain.image == data.indices[place]] for place in (6, 2)], ignore_index=True)
    assert_same(part, expected)


@pytest.mark.parametrize(
    "change", [np.ascontiguousarray, lambda x: x[::-1][::-1], lambda x: x[:, ::-1].copy()[:, ::-1]]
)
def test_images_may_be_read_only_or_views(encoder, data, plain, change):
    images = change(data.images.copy())
    images.flags.writeable = False
    found = certify_dataset(encoder, dataclasses.replace(data, images=images), [prompts()], **NUMBERS)
    assert_same(found, plain)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_counts_do_not_depend_on_the_batch_size(encoder, data, mixed, batch_size):
    methods = [prompts(), MeanShift()]
    assert_same(certify_dataset(encoder, data, methods, **NUMBERS, batch_size=batch_size), mixed)
    assert max(encoder.batches) <= max(batch_size, MeanShift().n_adapt)


def test_workers_give_the_same_table_and_keep_it_in_the_same_store(data, tmp_path):
    """The classes of this file travel by value: a worker cannot import it."""
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    try:
        found = run(tmp_path / "two", data, jobs=2)
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    assert_same(found, run(tmp_path / "one", data))
    assert (tmp_path / "two" / "table.csv").read_bytes() == (tmp_path / "one" / "table.csv").read_bytes()


def test_demo_clip_gives_the_same_table_in_worker_processes_with_prompts_that_adapt(model, phantoms):
    blood = phantoms("blood", n=2)
    hand_written = text_prompts(model, blood.classes, blood.templates[0])
    methods = [
        FixedPrompts("zero-shot", model.class_features(blood.classes, blood.templates[:1])),
        AdaptedPrompts("zero-shot PromptSmooth", model, hand_written, n_adapt=8),
    ]
    numbers = {**NUMBERS, "sigmas": [0.1], "radii": (0, 0.1), "n": 40}
    assert_same(
        mr.certify_dataset(model, blood, methods, **numbers, jobs=2),
        mr.certify_dataset(model, blood, methods, **numbers),
    )


def test_prompts_for_other_classes_are_refused(model, phantoms):
    eyes = phantoms("fundus", n=2)
    other = text_prompts(model, ("benign", "malignant"), "a {}")
    message = r"method 'p': its prompts are for the classes \['benign', 'malignant'\], phantom/fundus has \['"
    for method in (AdaptedPrompts("p", model, other), PerSamplePrompts("p", model, other)):
        with pytest.raises(ValueError, match=message):
            mr.certify_dataset(model, eyes, [method], sigmas=[0.1], n=20)
    three = model.class_features(["a", "b", "c"], ["{}"])
    for method in (FixedPrompts("p", three), CandidatePrompts("p", (three, three))):
        with pytest.raises(ValueError, match="method 'p' has 3 class texts, phantom/fundus has 2 classes"):
            mr.certify_dataset(model, eyes, [method], sigmas=[0.1], n=20)


def test_demo_clip_gives_one_table_whatever_the_batches(model, phantoms):
    blood = phantoms("blood", n=2)
    numbers = {**NUMBERS, "sigmas": [0.1], "radii": (0, 0.1), "n": 60}
    reference = mr.certify_dataset(model, blood, **numbers)
    assert set(reference.method) == {"zero-shot", "zero-shot ensemble"}
    for change in ({"batch_size": 7}, {"batch_size": 1000}):
        assert_same(mr.certify_dataset(model, blood, **numbers, **change), reference)
    texts = model.class_features(blood.classes, blood.templates[:1])
    pixels = model.prepare(blood.images)
    for place, row in enumerate(reference[reference.method == "zero-shot"].itertuples()):
        found = certify(
            PromptClassifier(model, texts),
            pixels[place],
            sigma=0.1,
            n0=20,
            n=60,
            alpha=0.05,
            sampling="sequential",
            radii=(0, 0.1),
            dataset=blood.id,
            index=row.image,
        )
        assert (row.predicted, row.radius, row.k, row.n) == (found.predicted, found.radius, found.k, found.n)


# What it costs


def test_five_methods_encode_as_often_as_one(data):
    """With fixed sampling, so that all methods want the same draws."""
    one, five, fixed = ColourEncoder(), ColourEncoder(), {**NUMBERS, "sampling": "fixed", "batch_size": 16}
    certify_dataset(one, data, [prompts()], **fixed)
    certify_dataset(five, data, [prompts(str(seed), seed) for seed in range(5)], **fixed)
    assert five.batches == one.batches
    assert sum(one.batches) == len(data) * len(SIGMAS) * 100


def test_each_distinct_denoiser_is_encoded_once_a_batch(data):
    calls = []

    def identity(pixels, sigma):
        calls.append((len(pixels), sigma))
        return pixels

    def bluer(pixels, sigma):
        return pixels + torch.tensor([0, 0, 0.05])[:, None, None]

    methods = [
        prompts("plain"),
        prompts("same", denoiser=identity),
        prompts("same, tilted", 1, denoiser=identity),
        prompts("bluer", denoiser=bluer),
    ]
    encoder, plain = ColourEncoder(), ColourEncoder()
    table = certify_dataset(encoder, data, methods, **NUMBERS, sampling="fixed", batch_size=50)
    certify_dataset(plain, data, [prompts()], **NUMBERS, sampling="fixed", batch_size=50)
    assert len(encoder.batches) == 3 * len(plain.batches)
    assert len(calls) == len(plain.batches)
    assert {sigma for _, sigma in calls} == set(SIGMAS)
    results = {
        name: rows.drop(columns=["method", "seconds"]).reset_index(drop=True) for name, rows in table.groupby("method")
    }
    pd.testing.assert_frame_equal(results["plain"], results["same"])
    assert (results["plain"].predicted == 2).sum() < (results["bluer"].predicted == 2).sum()


def test_a_wrong_image_costs_little_in_evaluate_mode(encoder, data):
    numbers = {**NUMBERS, "n": 2000, "alpha": 0.001, "sigmas": [0.1]}
    table = certify_dataset(encoder, data, [prompts()], **numbers, mode="evaluate")
    wrong = table.image == data.indices[4]
    assert int(table.label[wrong].iloc[0]) != 4 % 3, "a strong colour with another label"
    assert (table.predicted[wrong] == ABSTAIN).all()
    assert (table.n[wrong] < 60).all()
    assert (table.n0 == 0).all()
    assert (table.draws == table.n).all()
    assert ((table.predicted == table.label) | (table.predicted == ABSTAIN)).all()
    assert (table["mode"] == "evaluate").all()


def test_methods_that_are_done_are_not_scored_any_more(data):
    """One method settles at once; the other needs all draws and gets them alone."""
    scored = []

    class Counting(FixedPrompts):
        def classifier(self, adaptation=None):
            answer = super().classifier(adaptation)

            def count(features):
                scored.append((self.name, len(features)))
                return answer(features)

            return count

    denoised = []

    def identity(pixels, sigma):
        denoised.append(len(pixels))
        return pixels

    easy = Counting("easy", torch.eye(3), denoiser=identity)
    torn = Counting("torn", torch.tensor([[-1.0, 0, 0], [0, 1, 0], [0, 0, 1]]))  # a red image: green or blue?
    numbers = {**NUMBERS, "sigmas": [0.1], "radii": (0, 0.1), "n": 500}
    table = certify_dataset(ColourEncoder(), data.subset([0]), [easy, torn], **numbers)
    for name, rows in table.groupby("method"):
        assert sum(count for scored_name, count in scored if scored_name == name) == rows.draws.sum()
    draws = table.groupby("method").draws.sum()
    assert draws["easy"] < draws["torn"]
    assert sum(denoised) == draws["easy"]


# Adaptation to an image


@pytest.fixture
def events(monkeypatch):
    """What was drawn, in order."""
    seen, draw = [], NoiseStream.draw

    def recorded(self, shape, *, first=0, count=1, device="cpu"):
        seen.append((self.role, self.index, self.sigma, first, count))
        return draw(self, shape, first=first, count=count, device=device)

    monkeypatch.setattr(NoiseStream, "draw", recorded)
    return seen


def test_adapting_methods_are_complete_before_any_noise_of_the_certificate(encoder, data, events):
    methods = [MeanShift(n_adapt=7, events=events), prompts(), MeanShift(n_adapt=3, events=events, name="second")]
    table = certify_dataset(encoder, data.subset([0, 3]), methods, **NUMBERS, batch_size=64)
    assert list(table.guarantee[:3]) == ["frozen-prompt", "standard", "frozen-prompt"]
    begins = [place for place, event in enumerate(events) if event[0] == "adapt" and event[-1] == 7]
    assert len(begins) == 4
    for begin, end in zip(begins, [*begins[1:], len(events)], strict=True):
        of_item = events[begin:end]
        index, sigma = of_item[0][1:3]
        assert of_item[:4] == [
            ("adapt", index, sigma, 0, 7),
            ("built", "mean shift", (7, 3)),
            ("adapt", index, sigma, 0, 3),
            ("built", "second", (3, 3)),
        ]
        assert of_item[4] == ("select", index, sigma, 0, 20)
        assert {event[0] for event in of_item[5:]} == {"estimate"}
        assert {event[1:3] for event in of_item[4:]} == {(index, sigma)}


def test_each_noise_is_drawn_once_for_all_methods(encoder, data, events):
    certify_dataset(encoder, data, [prompts(str(seed), seed) for seed in range(4)], **NUMBERS, batch_size=9)
    drawn = [(*event[:3], number) for event in events for number in range(event[3], event[3] + event[4])]
    assert len(drawn) == len(set(drawn))


def test_methods_may_learn_by_gradient_from_adaptation_noise_or_from_each_copy(encoder, data):
    class Learning(MeanShift):
        def classifier(self, adaptation):
            bias = torch.zeros(3, requires_grad=True)
            scores = functional.softmax(adaptation.features + bias, dim=1).mean(0)
            (scores * scores.log()).sum().backward()  # minus the entropy of the mean, as in test-time tuning
            assert bias.grad.abs().sum() > 0
            return lambda features: (features + bias + bias.grad).argmax(1)

    class LearningFromEachCopy(MeanShift):
        guarantee = "per-sample"

        def classifier(self, adaptation):
            def answer(features):
                assert not torch.is_grad_enabled()
                with torch.enable_grad():
                    bias = torch.zeros_like(features, requires_grad=True)
                    functional.softmax(features + bias, dim=1).square().sum().backward()
                return (features + bias.grad).argmax(1)

            return answer

    methods = [Learning(), LearningFromEachCopy(name="each copy"), LearningFromEachCopy(name="no draws", n_adapt=0)]
    table = certify_dataset(encoder, data.subset([0, 3]), methods, **NUMBERS)
    assert (table.groupby("method").predicted.max() > ABSTAIN).all()


# The store


def run(store, data, encoder=None, methods=None, **change):
    return certify_dataset(
        encoder or ColourEncoder(), data, methods or [prompts()], **{**NUMBERS, **change}, store=store
    )


def test_a_failed_run_goes_on_where_it_stopped(data, tmp_path):
    undisturbed, encoder = ColourEncoder(), ColourEncoder()
    expected = run(tmp_path / "undisturbed", data, undisturbed)
    failures, found = 0, None
    while found is None and failures < 100:
        encoder.fails_after = len(encoder.batches) + 17
        try:
            found = run(tmp_path / "disturbed", data, encoder)
        except RuntimeError as error:
            assert str(error) == "the power went out"
            failures += 1
    assert failures >= 3
    assert_same(found, expected)
    files = [(tmp_path / folder / "table.csv").read_bytes() for folder in ("undisturbed", "disturbed")]
    assert files[0] == files[1]
    # Only the items in hand were computed again.
    assert len(encoder.batches) < len(undisturbed.batches) + failures * 17
    assert_same(certify_dataset(ColourEncoder(), data, [prompts()], **NUMBERS), expected)


def test_a_finished_store_is_only_read(data, tmp_path):
    expected = run(tmp_path, data)
    encoder = ColourEncoder(fails_after=0)
    pd.testing.assert_frame_equal(run(tmp_path, data, encoder), expected)
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.columns) == COLUMNS[:-1]
    pd.testing.assert_frame_equal(table, without_seconds(expected))


class OtherGain(ColourEncoder):
    def __init__(self):
        super().__init__()
        self.gain.data[1] = 1.0001


def other_mean():
    preprocessing = Preprocessing(8, "squash", "bilinear", mean=(0.5, 0.5, 0.4), std=(1.0,) * 3)
    return ColourEncoder(preprocessing=preprocessing)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"n": 90}, "n: the store has 80, this run asks 90"),
        ({"n0": 21}, "n0: the store has 20, this run asks 21"),
        ({"alpha": 0.01}, "alpha: the store has 0.05, this run asks 0.01"),
        ({"seed": 1}, "seed: the store has 0, this run asks 1"),
        ({"bounds": "one"}, 'bounds: the store has "two", this run asks "one"'),
        ({"mode": "evaluate"}, 'mode: the store has "predict", this run asks "evaluate"'),
        ({"sampling": "fixed"}, 'sampling: the store has "sequential", this run asks "fixed"'),
        ({"radii": (0, 0.1)}, "radii: the store has [0.0, 0.1, 0.25], this run asks [0.0, 0.1]"),
        ({"radii": None}, "radii: the store has [0.0, 0.1, 0.25], this run asks null"),
        ({"methods": [prompts("other")]}, "methods: the store has"),
        ({"methods": [prompts(seed=1)]}, "methods: the store has"),
        ({"methods": [prompts(), prompts("more", 1)]}, "methods: the store has"),
        ({"encoder": OtherGain()}, "weights: the store has"),
        ({"encoder": other_mean()}, "preprocessing.mean: the store has [0.5, 0.5, 0.5], this run asks [0.5, 0.5, 0.4]"),
        ({"encoder": ColourEncoder().double()}, 'dtype: the store has "float32", this run asks "float64"'),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_a_store_of_another_study_is_refused_and_the_difference_named(data, tmp_path, change, difference):
    run(tmp_path, data.subset([0]))
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(ValueError, match="belongs to other parameters") as caught:
        run(tmp_path, data.subset([0]), **change)
    assert f"\n  {difference}" in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"id": "folder:others"}, "dataset"),
        ({"split": "val"}, "split"),
        ({"classes": ("red", "green", "sky")}, "classes"),
    ],
)
def test_a_store_of_other_data_is_refused(data, tmp_path, change, name):
    run(tmp_path, data.subset([0]))
    with pytest.raises(ValueError, match=rf"\n  {name}: the store has"):
        run(tmp_path, dataclasses.replace(data.subset([0]), **change))


def test_images_and_sigmas_may_be_added(data, tmp_path):
    run(tmp_path, data.subset([0, 1]), sigmas=[0.25])
    encoder, fresh = ColourEncoder(), ColourEncoder()
    found = run(tmp_path, data, encoder)
    run(tmp_path / "rest", data.subset(range(2, 8)), fresh)
    run(tmp_path / "rest", data.subset([0, 1]), fresh, sigmas=[0.1])
    assert len(encoder.batches) == len(fresh.batches)
    assert_same(found, certify_dataset(ColourEncoder(), data, [prompts()], **NUMBERS))
    fewer = run(tmp_path, data.subset([3]), ColourEncoder(fails_after=0), sigmas=[0.1])
    assert list(fewer.image) == [data.indices[3]]


@pytest.mark.parametrize("change", ["image", "label"])
def test_what_changed_between_two_runs_is_done_again(data, tmp_path, change):
    run(tmp_path, data)
    images, labels = data.images.copy(), data.labels.copy()
    if change == "image":
        images[2, 0, 0, 0] ^= 1
    else:
        labels[2] = (labels[2] + 1) % 3
    changed = dataclasses.replace(data, images=images, labels=labels)
    encoder, alone = ColourEncoder(), ColourEncoder()
    found = run(tmp_path, changed, encoder)
    run(tmp_path / "alone", changed.subset([2]), alone)
    assert len(encoder.batches) == len(alone.batches) > 0
    assert_same(found, certify_dataset(ColourEncoder(), changed, [prompts()], **NUMBERS))


def test_a_store_of_another_version_is_refused(data, tmp_path, monkeypatch):
    """Boundaries and looks may differ between versions; a table holds rows of one."""
    run(tmp_path, data.subset([0]))
    monkeypatch.setattr("medrobust_lib.smoothing.table.VERSION", "99.0")
    with pytest.raises(ValueError, match=rf'medrobust_lib: the store has "{mr.__version__}", this run asks "99.0"'):
        run(tmp_path, data.subset([0]))


def test_a_nameless_denoiser_is_refused_by_a_store_only(encoder, data, tmp_path):
    methods = [prompts(denoiser=lambda pixels, sigma: pixels)]
    certify_dataset(encoder, data.subset([0]), methods, **NUMBERS)
    with pytest.raises(ValueError, match="has no `id`, so a store cannot tell it"):
        run(tmp_path, data.subset([0]), methods=methods)


# Killed again and again: forks, so that libraries load only once.


def killed_study(store):
    return run(store, colour_data(18), ColourEncoder(pause=0.001), [prompts(), prompts("tilted", 1), MeanShift()], n=60)


@pytest.mark.hardening(
    area="interruption", tried="SIGKILL at random moments of certify_dataset with a store",
    outcome="resumed each time; the table is the same, byte for byte",
)  # fmt: skip
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are not of this system")
def test_killed_at_any_moment_and_resumed_the_table_is_the_same_byte_for_byte(tmp_path):
    rng, fork = np.random.default_rng(0), multiprocessing.get_context("fork")
    journal = tmp_path / "killed" / "journal.jsonl"

    def n_lines():
        return journal.read_bytes().count(10) if journal.exists() else 0

    finished, deadline = [], time.monotonic() + 60
    for _ in range(8):
        child = fork.Process(target=killed_study, args=(tmp_path / "killed",))
        child.start()
        enough = n_lines() + rng.integers(0, 4)
        while n_lines() < enough and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        child.kill()
        child.join()
        finished.append(n_lines())
    assert len({count for count in finished if 0 < count < 36}) >= 3, finished
    rows = [len(killed_study(tmp_path / folder)) for folder in ("killed", "undisturbed")]
    assert rows == [18 * 2 * 3] * 2
    tables = [(tmp_path / folder / "table.csv").read_bytes() for folder in ("killed", "undisturbed")]
    assert tables[0] == tables[1]
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {"journal.jsonl", "manifest.json", "table.csv"}


# Errors and progress


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": [prompts(), prompts(seed=1)]}, "methods need distinct names, 'axes' occurs more than once"),
        ({"methods": []}, "nothing to certify: no method was given"),
        ({"sigmas": []}, "give at least one level in .0, 1. pixel units"),
        ({"mode": "test"}, "unknown mode 'test'; choose one of predict, evaluate"),
        ({"sampling": "all"}, "unknown sampling 'all'; choose one of fixed, sequential"),
        ({"sigmas": [0.1, 0]}, r"sigma=0\.0: smoothing needs noise"),
        ({"n0": 0}, "n0=0: choosing a class takes at least one"),
        ({"n": 3}, r"n=3 draws can never certify at alpha=0\.05"),
        ({"alpha": 5}, "alpha=5"),
        ({"radii": [-1]}, "certified radii are finite and >= 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"backend": "threads"}, "unknown backend 'threads'"),
        ({"jobs": 0}, "jobs=0"),
    ],
)
def test_bad_requests_are_named_before_any_work(data, change, message):
    with pytest.raises(ValueError, match=message):
        certify_dataset(ColourEncoder(fails_after=0), data, **{"methods": [prompts()], **NUMBERS, **change})


def test_an_unknown_guarantee_is_refused(encoder, data):
    method = MeanShift()
    method.guarantee = "certified"
    message = (
        "method 'mean shift' states the guarantee 'certified'; choose one of standard, frozen-prompt, candidate-set"
    )
    with pytest.raises(ValueError, match=message):
        certify_dataset(encoder, data, [method], **NUMBERS)


def test_a_method_that_gives_no_labels_is_refused_and_its_image_named(encoder, data):
    class Scores(MeanShift):
        n_adapt = 0

        def classifier(self, adaptation):
            return lambda features: features

    with pytest.raises(TypeError, match=r"expected int64 \(20,\), got torch\.float32") as caught:
        certify_dataset(encoder, data, [Scores(n_adapt=0)], **NUMBERS)
    assert "This happened at item 0" in caught.value.__notes__[0]


def test_labels_of_a_method_are_converted_and_those_of_no_class_refused(encoder, data):
    class Answers(MeanShift):
        def __init__(self, convert):
            super().__init__(n_adapt=0)
            self.convert = convert

        def classifier(self, adaptation):
            return lambda features: self.convert(features.argmax(1))

    expected = certify_dataset(encoder, data, [Answers(lambda labels: labels)], **NUMBERS)
    for convert in (lambda labels: labels.numpy().astype(np.int8), lambda labels: labels.tolist()):
        assert_same(certify_dataset(encoder, data, [Answers(convert)], **NUMBERS), expected)
    with pytest.raises(ValueError, match="answered with the label 3: classes are 0 to 2; answer below 0 for no class"):
        certify_dataset(encoder, data, [Answers(lambda labels: labels + 3)], **NUMBERS)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda noisy: noisy.numpy(), "returned ndarray"),
        (lambda noisy: noisy[:1], r"returned torch\.float32 \(1, 3, 8, 8\); it must map .* float32 \(20, 3, 8, 8\)"),
        (lambda noisy: (noisy * 255).byte(), r"returned torch\.uint8 \(20, 3, 8, 8\)"),
        (lambda noisy: (noisy, noisy), "returned tuple"),
    ],
)
def test_a_denoiser_returns_pixels_of_the_shape_it_got(encoder, data, result, message):
    def mine(noisy, sigma):
        return result(noisy)

    with pytest.raises(TypeError, match=f"the denoiser .*mine.* {message}"):
        certify_dataset(encoder, data, [prompts(denoiser=mine)], **NUMBERS)
    with pytest.raises(TypeError, match=f"the denoiser .*mine.* {message.split(';')[0]}"):
        pixels = encoder.prepare(data.images[:1])[0]
        AdaptationFeatures.draw(encoder, pixels, NoiseStream(0, "", 0, 0.1, "adapt"), count=20, denoiser=mine)


def test_headless_progress_is_one_line(encoder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(HEADLESS_VARIABLE, "1")
    run(tmp_path, data.subset([0, 1]), encoder)
    run(tmp_path, data, encoder)
    run(tmp_path / "one", data, encoder, sigmas=[0.1])
    told = capsys.readouterr()
    first, second, third = told.out.splitlines()
    assert first.startswith("certify folder:colours: 4 of 4 images x sigmas in ")
    assert second.startswith("certify folder:colours: 16 of 16 images x sigmas in ")
    assert second.endswith(" s (4 resumed)")
    assert third.startswith("certify folder:colours: 8 of 8 images in ")
    assert told.err == ""


def test_certify_dataset_is_a_public_name():
    assert mr.certify_dataset is certify_dataset


# What was not asked is not zero


def test_radii_that_were_not_asked_for_and_those_out_of_reach_are_unknown(encoder, data):
    rows = certify_dataset(encoder, data, [prompts()], **(NUMBERS | {"sigmas": [0.1], "radii": [0.05]}))
    reach = rows.radius_reach[0]
    assert (rows.radius_tested[0], rows.radius_tested.nunique()) == (0.05, 1)
    table = metrics.certified_accuracy(rows, [0, 0.05, 0.1, 2 * reach]).set_index("radius")
    assert table.certified_accuracy[[0.0, 0.05]].notna().all()
    assert table.loc[0.1, ["certified_accuracy", "low", "high"]].isna().all()
    assert table.loc[2 * reach, ["certified_accuracy", "low", "high"]].isna().all()
    assert 0.1 not in set(metrics.certified_envelope(table.reset_index()).radius)
    fixed = certify_dataset(encoder, data, [prompts()], **(NUMBERS | {"sigmas": [0.1], "sampling": "fixed"}))
    assert (fixed.radius_tested == fixed.radius_reach).all()
    assert metrics.certified_accuracy(fixed, [0.1]).certified_accuracy.notna().all()


def test_a_level_at_which_no_radius_asked_for_can_be_certified_is_told(encoder, data):
    with pytest.warns(UserWarning, match=r"at sigma 0.1 80 draws reach radius 0.1\d+, so none of the radii"):
        rows = certify_dataset(encoder, data.subset([0]), [prompts()], **(NUMBERS | {"sigmas": [0.1], "radii": [0.5]}))
    assert rows.radius[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "demo-clip"}, r"takes a DualEncoder .* or a function from pixels to labels, not str"),
        ({"data": "phantom/blood"}, "data must be an ImageDataset .* not str"),
        ({"methods": ["zero-shot"]}, "'zero-shot' is no PromptMethod; `FixedPrompts"),
        ({"methods": [MeanShift]}, "MeanShift'> is no PromptMethod; `FixedPrompts"),
    ],
)
def test_other_kinds_of_things_are_refused_with_what_to_use(encoder, data, change, message):
    given = {"model": encoder, "data": data, "methods": [prompts()]} | change
    with pytest.raises(TypeError, match=message):
        certify_dataset(given["model"], given["data"], given["methods"], **NUMBERS)


def test_a_model_in_training_mode_is_no_fixed_function(encoder, data):
    with pytest.raises(ValueError, match=r"ColourEncoder is in training mode.*call .eval\(\) first"):
        certify_dataset(encoder.train(), data, [prompts()], **NUMBERS)
