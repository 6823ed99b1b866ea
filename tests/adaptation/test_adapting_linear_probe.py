"""The linear probe: the regression it claims to be, the choice of its strength, and its use as class features."""

import json
import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from medrobust_lib import metrics
from medrobust_lib.adaptation.retraining import STRENGTHS, linear_probe
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.evaluation import Candidate, accuracy_table, corruption_answers
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens


class ColourEncoder(DualEncoder):
    """Features are the mean colour: easy to separate, easy to compute by hand."""

    def __init__(self):
        grey = Preprocessing(8, "squash", "bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
        super().__init__(
            id="colours", preprocessing=grey, embed_dim=3, context_length=9, logit_scale=20.0, provenance={}
        )
        self.eval()

    def _image_features(self, pixels):
        return pixels.mean(dim=(2, 3))

    def tokenize(self, texts):
        ids = torch.tensor([[ord(text[0])] for text in texts])
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    def embed_tokens(self, tokens):
        return functional.one_hot(tokens.ids, 128).float()

    def _text_features(self, embeddings, tokens):
        return embeddings.sum(dim=1)[:, :3] + 1


MODEL = ColourEncoder()


def colours(centres, per_class, *, spread=25.0, seed=0, **changes):
    """Images of one colour around the centre of their class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(centres)), per_class)
    shades = np.clip(np.array(centres)[labels] + spread * rng.standard_normal((len(labels), 3)), 0, 255)
    facts = {
        "id": "colours", "split": "train", "images": np.tile(shades[:, None, None], (1, 32, 32, 1)).astype(np.uint8),
        "labels": labels.astype(np.int64), "classes": tuple("abcd"[: len(centres)]), "templates": ("{}",),
        "modality": "none", "licence": "none", "provenance": {}, "indices": np.arange(len(labels)),
    }  # fmt: skip
    return ImageDataset(**(facts | changes))


THREE = [(200, 60, 60), (60, 200, 60), (60, 60, 200)]
NEAR = [(150, 100, 100), (100, 150, 100), (110, 110, 140)]
VALIDATION = colours(THREE, 20, seed=1, split="val")


def features(data):
    return MODEL.encode_image(MODEL.prepare(data.images)).double()


@pytest.mark.parametrize("centres", [NEAR, NEAR[:2]], ids=["three classes", "two classes"])
@pytest.mark.parametrize("strength", [1e-4, 0.1])
def test_weights_are_where_the_penalised_loss_is_least(centres, strength):
    train = colours(centres, 30)
    probe = linear_probe(MODEL, train, validation=colours(centres, 30, seed=1, split="val"), strengths=[strength])
    assert probe.weights.dtype == torch.float32 and probe.weights.shape == (len(centres), 3)
    shown, labels = features(train), torch.from_numpy(train.labels)

    def loss(weights):
        entropy = functional.cross_entropy(shown @ weights.T, labels, reduction="sum")
        return entropy + strength / 2 * weights.square().sum()

    found = MODEL.logit_scale * probe.weights.double()
    # The loss is strictly convex: its gradient vanishes at the minimum and nowhere else.
    at_start, at_end = (
        torch.autograd.functional.jacobian(loss, weights).abs().max() for weights in (torch.zeros_like(found), found)
    )
    assert at_end < 1e-3 < 1 < at_start
    assert probe.weights.is_contiguous()


def test_probabilities_of_the_model_are_those_of_the_regression():
    train = colours(NEAR[:2], 30)
    probe = linear_probe(MODEL, train, validation=colours(NEAR[:2], 30, seed=1, split="val"), strengths=[0.1])
    found = MODEL.probabilities(features(train).float(), probe.weights)
    difference = MODEL.logit_scale * (probe.weights[1] - probe.weights[0])
    torch.testing.assert_close(found[:, 1], torch.sigmoid(features(train).float() @ difference))
    assert found[:, 1].min() < 0.1 and found[:, 1].max() > 0.9


def test_the_strength_with_the_best_balanced_accuracy_is_chosen_and_all_are_listed():
    train, validation = colours(NEAR, [40, 10, 5]), colours(NEAR, [40, 10, 5], seed=1, split="val")
    probe = linear_probe(MODEL, train, validation=validation, strengths=[100.0, 0.001, 1.0])
    assert probe.choices.strength.tolist() == [0.001, 1.0, 100.0]
    best = probe.choices.set_index("strength").loc[probe.strength]
    assert probe.val_balanced_accuracy == best.val_balanced_accuracy == probe.choices.val_balanced_accuracy.max()
    assert probe.strength == 0.001 and probe.choices.val_balanced_accuracy.iloc[-1] < probe.val_balanced_accuracy
    answers = MODEL.probabilities(features(validation).float(), probe.weights).argmax(1).numpy()
    assert metrics.accuracy(validation.labels, answers) == probe.val_accuracy == best.val_accuracy
    assert metrics.balanced_accuracy(validation.labels, answers) == probe.val_balanced_accuracy


def test_of_equal_strengths_the_strongest_is_chosen():
    probe = linear_probe(MODEL, colours(THREE, 10), validation=VALIDATION, strengths=[0.001, 1.0, 0.01, 1.0])
    assert probe.choices.val_balanced_accuracy.tolist() == [1, 1, 1]
    assert probe.strength == 1.0
    assert probe.provenance["strength"] == 1.0


def test_validation_labels_decide_nothing_but_the_strength():
    train = colours(NEAR, 10)
    shuffled = colours(THREE, 20, seed=1, split="val", labels=np.roll(VALIDATION.labels, 20))
    one, other = (linear_probe(MODEL, train, validation=data, strengths=[0.1]) for data in (VALIDATION, shuffled))
    assert torch.equal(one.weights, other.weights) and one.val_accuracy != other.val_accuracy


def test_rows_serve_as_class_features_on_corrupted_images():
    train, test = colours(THREE, 10), colours(THREE, 5, seed=2, split="test", id="medimeta/pbc")
    probe = linear_probe(MODEL, train, validation=VALIDATION)
    answers = corruption_answers({"probe": Candidate(MODEL, probe.weights)}, test, severities=[1])
    table = accuracy_table(answers, test).set_index("corruption")
    assert table.loc["clean", "accuracy"] == 1
    assert probe.choices.strength.tolist() == sorted(STRENGTHS)


def test_provenance_names_the_images_and_can_be_stored():
    train = colours(THREE, 4, indices=np.arange(100, 112))
    facts = json.loads(json.dumps(linear_probe(MODEL, train, validation=VALIDATION).provenance))
    assert facts["model"] == facts["dataset"] == "colours" and facts["images"] == list(range(100, 112))
    assert facts["validation"] == {"split": "val", "images": list(range(60))}


@pytest.mark.parametrize("labels", [[0, 0, 2, 2], [0, 0, 0, 0]])
def test_a_class_without_images_is_named(labels):
    train = colours(THREE, [2, 1, 1], labels=np.array(labels))
    with pytest.raises(
        ValueError, match="colours: no image of class 'b' to learn from; train on images of all classes"
    ):
        linear_probe(MODEL, train, validation=VALIDATION)


def test_images_of_both_sets_are_refused():
    validation = colours(THREE, 2, seed=1, indices=np.arange(9, 15))
    with pytest.raises(
        ValueError, match="3 images of split 'train' are both in training and in validation .the first has index 9"
    ):
        linear_probe(MODEL, colours(THREE, 4), validation=validation)


def test_other_classes_in_validation_are_refused():
    with pytest.raises(ValueError, match="the classes of training, a, b, c, are not those of validation, a, b;"):
        linear_probe(MODEL, colours(THREE, 4), validation=colours(THREE[:2], 4, split="val"))


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ([], "strengths=(): give at least one"),
        ([1.0, 0.0], "strengths=0.0 is no number above 0: it is the weight of the penalty"),
        ([-1], "strengths=-1 is"),
        ([float("nan")], "strengths=nan is"),
        ([float("inf")], "strengths=inf is"),
    ],
)
def test_impossible_strengths_are_refused(strengths, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_probe(MODEL, colours(THREE, 4), validation=VALIDATION, strengths=strengths)
