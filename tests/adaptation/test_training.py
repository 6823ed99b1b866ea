"""The training loop over several data sets: loss, schedule, choice of the epoch, interruptions, scarce memory."""

import dataclasses
import json
import logging
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from medrobust_lib import metrics
from medrobust_lib.adaptation.training import Recipe, Training, summed_loss
from medrobust_lib.adaptation.training_images import Augmentation, TrainingImages
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens

RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.01, augmentation=Augmentation(sigmas=(0.1,)))
PLAIN = Augmentation(crop=1, flip=False)


class TinyEncoder(DualEncoder):
    """Class texts are single letters with fixed features; the image tower is a matrix behind layers with two modes."""

    def __init__(self):
        grey = Preprocessing(8, "squash", "bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
        super().__init__(
            id="tiny", preprocessing=grey, embed_dim=6, context_length=4, logit_scale=10.0, provenance={}
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.norm, self.drop, self.matrix = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(192, 6)
        self.letters = nn.Embedding(128, 6)
        for parameter in (*self.matrix.parameters(), self.letters.weight):
            nn.init.normal_(parameter, generator=generator)
        self.eval().requires_grad_(False)

    def _image_features(self, pixels):
        return self.matrix(self.drop(self.norm(pixels).flatten(1)))

    def tokenize(self, texts):
        ids = torch.tensor([[ord(letter) for letter in text[:1]] for text in texts])
        return Tokens(ids, ids > 0)

    def embed_tokens(self, tokens):
        return self.letters(tokens.ids)

    def _text_features(self, embeddings, tokens):
        return embeddings.sum(dim=1)


def stripes(id, classes, n, seed, split="train", side=8):
    """Stripes of another width for every class."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % len(classes)
    rows = np.stack([np.arange(side) // (label + 1) % 2 for label in labels])
    images = draw.integers(60, 120, (n, side, side, 3)) + 80 * rows[:, :, None, None]
    return ImageDataset(
        id=id, split=split, images=images.astype(np.uint8), labels=labels.astype(np.int64), classes=classes,
        templates=("{}", "not {}"), modality="drawing", licence="CC0-1.0", provenance={},
        indices=np.arange(n, dtype=np.int64),
    )  # fmt: skip


TRAIN = (stripes("folder:one", ("a", "b"), 12, 0), stripes("folder:two", ("c", "d", "e"), 15, 1, side=10))
VALIDATION = (
    stripes("folder:one", ("a", "b"), 10, 2, "val"),
    stripes("folder:two", ("c", "d", "e"), 9, 3, "val", side=10),
)


def fit(recipe=RECIPE, *, model=None, train=TRAIN, validation=VALIDATION, folder=None, templates=None, identity=None):
    """Train the matrix of a model; returns its weights and the training."""
    model = TinyEncoder() if model is None else model
    parameters = dict(model.matrix.requires_grad_(True).named_parameters())
    outcome = Training(model, parameters, train, validation, templates, recipe)
    outcome.run(folder, identity=identity)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}, outcome


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_second_run_does_not_begin_again_in_a_trained_model():
    _, training = fit(dataclasses.replace(RECIPE, epochs=1))
    before = training.history
    with pytest.raises(RuntimeError, match="this training has run already"):
        training.run()
    assert training.history.equals(before) and len(before) == 4


# Loss and steps


def test_masked_and_global_softmax_by_hand():
    logits = torch.log(torch.tensor([[1.0, 3.0, 4.0, 8.0], [2.0, 2.0, 5.0, 1.0]]))
    targets = torch.tensor([1, 2])
    allowed = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert summed_loss(logits, targets, allowed).item() == pytest.approx(-math.log(3 / 4) - math.log(5 / 6))
    assert summed_loss(logits, targets, torch.ones_like(allowed)).item() == pytest.approx(
        -math.log(3 / 16) - math.log(5 / 10)
    )


@pytest.mark.parametrize("softmax", ["masked", "global"])
def test_a_step_minimises_the_stated_loss(softmax):
    model = TinyEncoder()
    recipe = Recipe(epochs=1, batch_size=27, softmax=softmax, augmentation=PLAIN)
    texts = torch.cat([model.class_features(data.classes, ["{}"]) for data in TRAIN])
    losses = []
    for number, data in enumerate(TRAIN):
        logits = 10 * model.encode_image(model.prepare(data.images)) @ texts.T
        own = (slice(0, 2), slice(2, 5))[number] if softmax == "masked" else slice(None)
        first = 0 if softmax == "masked" else (0, 2)[number]
        shares = torch.softmax(logits[:, own].double(), dim=1)
        losses += [-math.log(row[first + label]) for row, label in zip(shares, data.labels, strict=True)]
    _, outcome = fit(recipe, model=model)
    assert outcome.history.query("epoch == 1").loss.iloc[0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_raw_logits_leave_image_features_at_their_length_and_take_no_scale(tmp_path):
    model = TinyEncoder()
    recipe = Recipe(epochs=1, batch_size=27, softmax="global", logits="raw", augmentation=PLAIN)
    letters = model.letters.weight[[ord(letter) for letter in "abcde"]].detach().double()
    texts = letters / letters.pow(2).sum(1, keepdim=True).sqrt()
    pixels = torch.cat([model.prepare(data.images) for data in TRAIN]).double().flatten(1)
    pixels = (pixels - 0.5) / 0.25 / math.sqrt(1 + model.norm.eps)  # batch normalisation of untouched statistics
    weight = model.matrix.weight.detach().double().requires_grad_(True)
    chances = torch.softmax((pixels @ weight.T + model.matrix.bias.double()) @ texts.T, dim=1)
    targets = np.concatenate([TRAIN[0].labels, TRAIN[1].labels + 2])
    loss = -chances[np.arange(27), targets].log().mean()
    loss.backward()
    _, outcome = fit(recipe, model=model, folder=tmp_path / "state")
    assert outcome.history.query("epoch == 1").loss.iloc[0] == pytest.approx(loss.item(), rel=1e-5)
    moment = load_file(tmp_path / "state" / "state.safetensors")["exp_avg.weight"]  # a tenth of the first gradient
    torch.testing.assert_close(10 * moment.double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_cosine_logits_are_the_default_and_older_records_without_a_choice_are_theirs(tmp_path):
    assert Recipe() == Recipe(logits="cosine") != Recipe(logits="raw")
    assert "logits" not in Recipe().as_json()
    assert Recipe(logits="raw").as_json() == {**Recipe().as_json(), "logits": "raw"}
    fit(folder=tmp_path / "state")
    with pytest.raises(ValueError, match='recipe.logits: the store has .*, this run asks "raw"'):
        fit(dataclasses.replace(RECIPE, logits="raw"), folder=tmp_path / "state")


@pytest.mark.parametrize(("images", "batch_size"), [(12, 32), (13, 4), (7, 3)])
def test_every_image_is_seen_once_an_epoch(images, batch_size, monkeypatch):
    steps = []
    augmented = TrainingImages.augmented
    monkeypatch.setattr(
        TrainingImages, "augmented", lambda self, rows, *some, **more: steps.append(rows)
        or augmented(self, rows, *some, **more),
    )  # fmt: skip
    data = stripes("folder:one", ("a", "b"), images, 0)
    fit(Recipe(epochs=2, batch_size=batch_size), train=[data], validation=VALIDATION[:1])
    half = len(steps) // 2
    first, second = np.concatenate(steps[:half]), np.concatenate(steps[half:])
    assert sorted(first) == sorted(second) == list(range(images))
    assert images <= 3 or list(first) != list(second)
    assert max(map(len, steps)) <= batch_size
    assert max(map(len, steps)) - min(map(len, steps)) <= 1


def test_the_one_cycle_is_that_of_torch():
    recipe, steps = Recipe(learning_rate=0.3, schedule="one-cycle"), 57
    optimiser = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(steps):
        assert recipe.rate(step, steps) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9)
        optimiser.step()
        if step < steps - 1:
            schedule.step()
    for few in (1, 2, 5, 10, 11):
        rates = [recipe.rate(step, few) for step in range(few)]
        assert 0 < min(rates) <= max(rates) <= 0.3
    assert {Recipe(learning_rate=0.3).rate(step, 9) for step in range(9)} == {0.3}


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of each step of training."""
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: taken.append(self.param_groups[0]["lr"]) or step(self))
    return taken


def test_the_schedule_reaches_the_optimiser(rates):
    recipe = dataclasses.replace(RECIPE, schedule="one-cycle")
    fit(recipe)
    assert rates == [recipe.rate(number, 12) for number in range(12)]


def test_dropout_and_batch_statistics_are_frozen():
    model = TinyEncoder().train()
    before = {name: buffer.clone() for name, buffer in model.norm.named_buffers()}
    first, _ = fit(model=model)
    assert not any(part.training for part in model.modules())
    assert equal(before, dict(model.norm.named_buffers()))
    torch.manual_seed(77)  # a dropout in use would draw from the global stream
    assert equal(first, fit()[0])


# Seeds and templates


def test_the_seed_decides_order_and_augmentation():
    models = [TinyEncoder(), TinyEncoder()]
    before = torch.get_rng_state()
    first, outcome = fit(model=models[0])
    torch.rand(3)
    middle = torch.get_rng_state()
    again, same = fit(model=models[1])
    assert equal(first, again)
    assert torch.equal(torch.get_rng_state(), middle) and not torch.equal(before, middle)
    columns = ["epoch", "loss", "dataset", "n", "val_accuracy", "val_balanced_accuracy", "val_mean"]
    assert outcome.history[columns].equals(same.history[columns])
    assert not equal(first, fit(dataclasses.replace(RECIPE, seed=1))[0])


def test_inference_mode_outside_does_not_matter():
    model = TinyEncoder()
    with torch.inference_mode():
        inside, _ = fit(model=model)
    assert equal(inside, fit()[0])


def test_templates_are_the_first_of_each_set_unless_given(monkeypatch):
    seen = []
    class_features = TinyEncoder.class_features
    monkeypatch.setattr(
        TinyEncoder, "class_features",
        lambda self, classes, templates: seen.append((classes, list(templates), torch.is_grad_enabled()))
        or class_features(self, classes, templates),
    )  # fmt: skip
    fit()
    sets = [("a", "b"), ("c", "d", "e")]
    assert seen == [(classes, ["{}"], False) for classes in sets + sets]  # once for each set, none during training
    seen.clear()
    fit(templates=["x {}", "y {}"])
    assert [templates for _, templates, _ in seen] == [["x {}", "y {}"]] * 4


# The best epoch


def with_scores(monkeypatch, scores):
    """Validation that always gives these balanced accuracies, epoch by epoch, the same for both sets."""
    left = iter(np.repeat(scores, 2))
    monkeypatch.setattr(metrics, "balanced_accuracy", lambda *_: float(next(left)))


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.2, 0.5, 0.9, 0.7), 2), ((0.2, 0.5, 0.7, 0.7), 2), ((0.5, 0.5, 0.5, 0.5), 0), ((0.5, 0.4, 0.3, 0.6), 3)],
)
def test_parameters_of_the_best_epoch_stay(monkeypatch, scores, best):
    untrained = {name: parameter.clone() for name, parameter in TinyEncoder().matrix.named_parameters()}
    with_scores(monkeypatch, scores)
    chosen, outcome = fit()
    assert outcome.best_epoch == best
    assert outcome.history.groupby("epoch").val_mean.first().tolist() == pytest.approx(scores)
    with_scores(monkeypatch, (0.1, 0.2, 0.3, 0.4)[: best + 1])
    expected = fit(dataclasses.replace(RECIPE, epochs=best))[0] if best else untrained
    assert equal(chosen, expected)


def test_history_has_a_row_for_each_epoch_and_set():
    _, outcome = fit()
    history = outcome.history
    assert history.epoch.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert history.dataset.tolist() == ["folder:one", "folder:two"] * 4
    assert history.n.tolist() == [10, 9] * 4
    assert history.loss.isna().tolist() == [True] * 2 + [False] * 6
    assert (history.seconds > 0).all()
    means = history.groupby("epoch").val_balanced_accuracy.mean()
    assert history.groupby("epoch").val_mean.first().tolist() == pytest.approx(means.tolist())
    assert outcome.best_epoch == means.idxmax()


def test_validation_judges_each_image_among_its_own_classes():
    model = TinyEncoder()
    _, outcome = fit(Recipe(epochs=0), model=model)
    for row, data in zip(outcome.history.itertuples(), VALIDATION, strict=True):
        texts = model.class_features(data.classes, ["{}"])
        answers = (model.encode_image(model.prepare(data.images)) @ texts.T).argmax(1).numpy()
        assert row.val_accuracy == np.mean(answers == data.labels)
        recalls = [np.mean(answers[data.labels == label] == label) for label in range(len(data.classes))]
        assert row.val_balanced_accuracy == pytest.approx(np.mean(recalls))


def test_it_learns():
    _, outcome = fit(Recipe(epochs=15, batch_size=8, learning_rate=0.01, augmentation=Augmentation(crop=1)))
    means = outcome.history.groupby("epoch").val_mean.first()
    assert means[0] < 0.7 and means[outcome.best_epoch] > 0.95


def test_no_epochs_change_nothing():
    weights, outcome = fit(Recipe(epochs=0))
    assert equal(weights, dict(TinyEncoder().matrix.named_parameters()))
    assert outcome.best_epoch == 0 and outcome.history.epoch.tolist() == [0, 0]


# Interruptions


class Interrupted(TinyEncoder):
    """Is stopped by a person after some steps of training."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def _image_features(self, pixels):
        if torch.is_grad_enabled():
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
        return super()._image_features(pixels)


@pytest.mark.hardening(
    area="interruption", tried="an interrupt at different steps of training",
    outcome="continued at the last epoch; the parameters are the same, bit for bit",
)  # fmt: skip
@pytest.mark.parametrize("steps", [2, 4, 5, 9])
def test_a_run_that_was_interrupted_gives_the_same(tmp_path, rates, steps):
    recipe = dataclasses.replace(RECIPE, schedule="one-cycle")
    expected, outcome = fit(recipe)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, model=Interrupted(steps), folder=tmp_path / "state")
    rates.clear()
    resumed, again = fit(recipe, folder=tmp_path / "state")
    assert len(rates) == 12 - steps // 4 * 4  # four steps an epoch; finished ones are not repeated
    assert equal(expected, resumed)
    assert again.best_epoch == outcome.best_epoch
    assert again.history.drop(columns="seconds").equals(outcome.history.drop(columns="seconds"))
    finished, _ = fit(recipe, folder=tmp_path / "state")
    assert equal(expected, finished) and len(rates) == 12 - steps // 4 * 4


class Slow(TinyEncoder):
    def _image_features(self, pixels):
        time.sleep(0.01)
        return super()._image_features(pixels)


@pytest.mark.hardening(
    area="interruption", tried="SIGKILL during training of adapters",
    outcome="continued at the last epoch; the parameters are the same, bit for bit",
)  # fmt: skip
def test_a_killed_process_is_continued(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=40)
    lines = (
        "import importlib.util, pathlib, sys, medrobust_lib.adaptation.adapting",
        "assert 'peft' not in sys.modules",  # it takes seconds to import, and notebooks import more than they use
        f"spec = importlib.util.spec_from_file_location('tests_here', {str(Path(__file__))!r})",
        "here = importlib.util.module_from_spec(spec); sys.modules['tests_here'] = here",
        "spec.loader.exec_module(here)",
        "recipe = here.dataclasses.replace(here.RECIPE, epochs=40)",
        f"here.fit(recipe, model=here.Slow(), folder=pathlib.Path({str(tmp_path / 'state')!r}))",
    )
    child = subprocess.Popen([sys.executable, "-c", "\n".join(lines)])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "state" / "state.safetensors").exists():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    resumed, outcome = fit(recipe, folder=tmp_path / "state")
    expected, same = fit(recipe)
    assert equal(expected, resumed)
    assert outcome.history.drop(columns="seconds").equals(same.history.drop(columns="seconds"))


def test_a_folder_of_another_run_is_refused(tmp_path):
    fit(folder=tmp_path / "state", identity={"train": {"folder:one": {"n": 12}}})
    with pytest.raises(
        ValueError, match=r"(?s)recipe.learning_rate: the store has 0.01, this run asks 0.02.*recipe.seed"
    ):
        recipe = dataclasses.replace(RECIPE, learning_rate=0.02, seed=3)
        fit(recipe, folder=tmp_path / "state", identity={"train": {"folder:one": {"n": 12}}})
    with pytest.raises(ValueError, match="train.folder:one.n: the store has 12, this run asks 13"):
        fit(folder=tmp_path / "state", identity={"train": {"folder:one": {"n": 13}}})


@pytest.mark.hardening(
    area="stores", tried="damaged training states and those of another training",
    outcome="refused, file named",
)  # fmt: skip
def test_a_damaged_state_is_explained(tmp_path):
    fit(folder=tmp_path / "state")
    path = tmp_path / "state" / "state.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="state.safetensors is not a readable state: "):
        fit(folder=tmp_path / "state")
    path.write_bytes(whole)
    model = TinyEncoder()
    with pytest.raises(ValueError, match="state.safetensors is no state of this training; delete"):
        other = {"other": model.matrix.weight.requires_grad_(True)}
        Training(model, other, TRAIN, VALIDATION, None, RECIPE).run(tmp_path / "state")
    json.dumps(RECIPE.as_json())


# Scarce memory


class SmallMemory(TinyEncoder):
    """Has room for the gradients of three images only."""

    room = 3

    def _image_features(self, pixels):
        if torch.is_grad_enabled() and len(pixels) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return super()._image_features(pixels)


@pytest.mark.parametrize("softmax", ["masked", "global"])
def test_scarce_memory_halves_the_batch_and_keeps_the_step(caplog, softmax):
    recipe = dataclasses.replace(RECIPE, softmax=softmax)
    expected, outcome = fit(recipe)
    with caplog.at_level(logging.WARNING, logger="medrobust_lib.smoothing.noise"):
        found, same = fit(recipe, model=SmallMemory())
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"out of memory with batches of {size} images; going on with {size // 2}" for size in (8, 4)]
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
    assert same.history.loss[2:].tolist() == pytest.approx(outcome.history.loss[2:].tolist(), rel=1e-5)


def test_errors_other_than_scarce_memory_get_through(monkeypatch):
    def broken(self, pixels):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(TinyEncoder, "_image_features", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit()
    monkeypatch.setattr(SmallMemory, "room", 0)
    monkeypatch.undo()
    monkeypatch.setattr(SmallMemory, "room", 0)
    with pytest.raises(torch.OutOfMemoryError):
        fit(model=SmallMemory())


# Prepared images


def test_images_that_fit_are_prepared_once(monkeypatch):
    prepared = []
    prepare = TinyEncoder.prepare
    monkeypatch.setattr(TinyEncoder, "prepare", lambda self, some: prepared.append(len(some)) or prepare(self, some))
    first, _ = fit()
    assert sum(prepared) == 27 + 19
    prepared.clear()
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=4 * 12 * 192))
    second, _ = fit()
    assert sum(prepared) == 3 * 27 + 4 * 19  # each in every epoch
    assert equal(first, second)
    prepared.clear()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=4 * 30 * 192))
    fit()
    assert sum(prepared) == 27 + 4 * 19  # the validation images no longer fit


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -1}, "epochs=-1 is no whole number of 0 or more"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"batch_size": 0}, "batch_size=0 is no whole number of 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is no number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must be >= 0"),
        ({"seed": -1}, "seed=-1"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; choose one of constant, one-cycle"),
        ({"softmax": "mask"}, "unknown softmax 'mask'; choose one of masked, global"),
        ({"logits": "cosines"}, "unknown logits 'cosines'; choose one of cosine, raw; did you mean 'cosine'"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


@pytest.mark.parametrize("epochs", [1, 3])
def test_divergence_names_the_learning_rate(epochs):
    with pytest.raises(ValueError, match=r"training diverged.*: lower learning_rate=1e\+30"):
        fit(Recipe(epochs=epochs, learning_rate=1e30, batch_size=27))
