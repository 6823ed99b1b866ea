"""Two functions, or a classifier, as a dual encoder."""

import functools
import re
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import medrobust_lib as mr
from medrobust_lib.models.adapters import attach_adapters
from medrobust_lib.models.dual_encoder import BrokenFeaturesError, find_image_tower
from medrobust_lib.models.own import Classifier, wrap
from medrobust_lib.models.text_frame import why_not_learned

SIDE = 8
GIVEN = {"image_size": SIDE, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0)}


def colours(pixels):
    return pixels.mean((2, 3))


def letters(texts):
    return np.array([[text.count(letter) + 1.0 for letter in "abc"] for text in texts])


def functions(**other):
    return {"image_features": colours, "text_features": letters, **GIVEN} | other


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 3)).eval()


def test_pixels_come_normalised_and_features_leave_at_norm_one():
    model = wrap(**functions())
    pixels = torch.tensor([0.6, 0.7, 0.1]).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
    torch.testing.assert_close(model.encode_image(pixels), torch.tensor([[1.0, 2.0, -0.2]]) / 5.04**0.5)
    torch.testing.assert_close(model.encode_text(["bba"]), torch.tensor([[2.0, 3.0, 1.0]]) / 14**0.5)
    assert (model.id, model.embed_dim, model.image_size) == ("colours", 3, SIDE)
    assert model.preprocessing.mean == GIVEN["mean"] and not model.training


def test_texts_come_in_lists_that_fit_into_memory():
    asked = []

    def counted(texts):
        asked.append(len(texts))
        return letters(texts)

    model = wrap(**functions(text_features=counted))
    assert model.encode_text(["a"] * 150).shape == (150, 3)
    assert asked == [1, 64, 64, 22]  # the first to see whether both features have one length


def test_functions_of_a_model_give_its_features_bit_for_bit():
    inner = mr.load_model("demo-clip", device="cpu")
    keys = ("image_size", "mean", "std", "geometry", "interpolation")
    settings = {key: getattr(inner.preprocessing, key) for key in keys}
    model = wrap(image_features=inner._image_features, text_features=inner.encode_text, **settings)
    data = mr.load_dataset("phantom/blood", n=8)
    shown = [one.encode_image(one.prepare(data.images)) for one in (inner, model)]
    spoken = [one.class_features(data.classes, data.templates) for one in (inner, model)]
    assert torch.equal(*shown)
    torch.testing.assert_close(*spoken, rtol=0, atol=1e-6)  # brought to norm 1 once more
    # Both functions are bound to one network, which is a part of the model once.
    assert len(model.networks) == 1 and model.id.endswith("._image_features")
    assert model.identity()["weights"] == inner.identity()["weights"]


@pytest.mark.parametrize(
    "kind", ["network", "bound", "closure", "partial", "inner", "object", "decorated", "default", "keyword"]
)
def test_the_weights_behind_a_function_tell_it_from_another(kind):
    def made(seed):
        net = network(seed)

        def closure(pixels):
            return net(pixels)

        @torch.no_grad()
        def decorated(pixels):
            return net(pixels)

        def default(pixels, module=net):
            return module(pixels)

        def keyword(pixels, *, module=net):
            return module(pixels)

        def apply(module, pixels):
            return module(pixels)

        # A global of its module, which only a comprehension names.
        scope = {"net": net, "torch": torch}
        exec("def inner(pixels):\n    return torch.cat([net(one[None]) for one in pixels])", scope)
        owner = SimpleNamespace(net=net)
        known = {
            "object": MethodType(lambda self, pixels: self.net(pixels), owner),
            "network": net,
            "bound": net.forward,
            "closure": closure,
            "decorated": decorated,
            "default": default,
            "keyword": keyword,
            "inner": scope["inner"],
        }
        function = known.get(kind) or functools.partial(apply, net)
        return Classifier(function, n_classes=3, image_size=SIDE, id="object" if kind == "object" else "")

    first, again, other = (made(seed).identity() for seed in (0, 0, 1))
    assert first == again != other
    assert first["id"] == {"network": "Sequential", "bound": "Sequential.forward", "partial": "apply"}.get(kind, kind)
    assert made(0).double().encode_image(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, 3)  # the network went along


def test_a_part_in_training_mode_is_refused_when_a_model_is_made_and_when_it_is_certified():
    net = nn.Sequential(network(), nn.Dropout(0.5)).eval()
    model = Classifier(net, n_classes=3, image_size=SIDE)
    net[1].train()
    with pytest.raises(ValueError, match="Dropout is in training mode"):
        Classifier(net, n_classes=3, image_size=SIDE)
    with pytest.raises(ValueError, match="Dropout is in training mode"):
        mr.certify_dataset(model, mr.load_dataset("phantom/histology", n=9), n=50)


def test_where_no_weights_are_found_a_record_says_that_it_cannot_tell_them():
    with pytest.warns(UserWarning, match="colours: no network was found behind image_features and text_features, so a"):
        wrap(**functions()).identity()
    with pytest.warns(UserWarning, match="behind text_features, so"):
        wrap(**functions(image_features=network())).identity()


def test_labels_and_scores_give_the_same_answers():
    net, pixels = network(), torch.rand(20, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    expected = net(pixels).argmax(1)
    assert len(expected.unique()) > 1

    def labels(pixels):
        return net(pixels).argmax(1).numpy().astype(np.uint8)

    for function in (net, labels):
        model = Classifier(function, n_classes=3, image_size=SIDE)
        texts = model.class_features(["x", "y", "z"], ["whatever {}"])
        assert torch.equal(texts, torch.eye(3))
        assert torch.equal(model.probabilities(model.encode_image(pixels), texts).argmax(1), expected)
    scores = functional.normalize(net(pixels), dim=1)
    torch.testing.assert_close(Classifier(net, n_classes=3, image_size=SIDE).encode_image(pixels), scores)


def test_a_classifier_is_given_pixels_as_they_are_unless_it_says_otherwise():
    seen = []

    def watch(pixels):
        seen.append(pixels)
        return torch.zeros(len(pixels), dtype=torch.bool)

    for settings in ({}, {"mean": 0.5, "std": 0.25}):
        Classifier(watch, n_classes=2, image_size=SIDE, **settings).encode_image(torch.full((1, 3, SIDE, SIDE), 0.25))
    assert [float(pixels.mean()) for pixels in seen] == [0.25, -1.0]


def test_functions_of_numpy_are_given_what_numpy_knows():
    def labels(pixels):
        return (pixels.numpy().mean((1, 2, 3)) > 0.5).astype(int)

    model = Classifier(labels, n_classes=2, image_size=SIDE).to(torch.bfloat16)
    assert model.encode_image(torch.full((2, 3, SIDE, SIDE), 0.75)).tolist() == [[0, 1]] * 2


def test_prompts_are_refused_with_the_reason():
    whole = "colours reads whole texts only: prompts are learned among word embeddings (embed_tokens)"
    assert why_not_learned(wrap(**functions())) == whole
    model = Classifier(network(), n_classes=3, image_size=SIDE, id="mine")
    reason = "mine is a classifier and reads no texts, so there are no prompts"
    assert why_not_learned(model) == reason
    with pytest.raises(NotImplementedError, match=reason):
        model.encode_text(["x"])
    with pytest.raises(ValueError, match="mine tells 3 classes apart, these are 2: benign, malignant"):
        model.class_features(["benign", "malignant"])


def test_a_network_that_is_copied_with_the_model_takes_adapters_and_one_that_is_not_refuses_them():
    tower = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    tower.eval()
    before = [parameter.clone() for parameter in tower.parameters()]
    for function in (tower, tower.forward):
        model = Classifier(function, n_classes=3, image_size=SIDE)
        adapted = attach_adapters(model, rank=2)
        pixels = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(adapted.encode_image(pixels), model.encode_image(pixels))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.ones_(parameter)
        assert not torch.allclose(adapted.encode_image(pixels), model.encode_image(pixels))
        assert all(map(torch.equal, before, tower.parameters()))

    def closure(pixels):
        return tower(pixels)

    closed = Classifier(closure, n_classes=3, image_size=SIDE)
    with pytest.raises(ValueError, match="no place for adapters"):
        attach_adapters(closed)
    with pytest.raises(ValueError, match="no image tower to train"):
        find_image_tower(closed.trainable_copy())
    with pytest.raises(ValueError, match="no image tower to train"):
        find_image_tower(Classifier(lambda p: [tower][0](p), n_classes=3, image_size=SIDE, id="x").trainable_copy())


def test_scores_in_float64_that_float32_cannot_tell_apart_keep_their_order():
    scores = torch.tensor([[-1e5, -1e5 + 1e-4], [-1e5 + 1e-4, -1e5], [0.5, 0.5]], dtype=torch.float64)
    found = Classifier(lambda pixels: scores.numpy(), n_classes=2, image_size=SIDE, id="x").encode_image(
        torch.zeros(3, 3, SIDE, SIDE)
    )
    assert found.argmax(1).tolist() == [1, 0, 0] and float(found[2, 0]) == float(found[2, 1]) > 0
    assert (found[:2].amax(1) > found[:2].amin(1)).all()


def test_labels_of_a_network_take_no_adapters():
    class Labels(nn.Sequential):
        def forward(self, pixels):
            return super().forward(pixels).argmax(1)

    model = Classifier(Labels(nn.Conv2d(3, 3, SIDE), nn.Flatten()).eval(), n_classes=3, image_size=SIDE)
    with pytest.raises(ValueError, match="Labels: adapters cannot learn, since no gradient reaches them"):
        attach_adapters(model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: wrap(**functions(image_features=lambda p: p.mean((2, 3)))),
            ValueError,
            "a lambda has no name: give i",
        ),
        (lambda: wrap(**functions(text_features="a")), TypeError, "text_features must be a function, not str"),
        (lambda: wrap(**functions(text_features=lambda t: letters(t)[:, :2])), ValueError, "length 3, text_features 2"),
        (lambda: wrap(**functions(text_features=lambda t: letters(t)[0])), ValueError, "features [1, d] here, not"),
        (lambda: wrap(**functions(image_features=network().train())), ValueError, "Sequential is in training mode"),
        (
            lambda: wrap(**functions(text_features=lambda t: None)),
            TypeError,
            "text_features returned NoneType, no numb",
        ),
        (lambda: wrap(**functions(std=(1, 1, 0))), ValueError, "std above 0"),
        (lambda: Classifier(colours, n_classes=1, image_size=8), ValueError, "n_classes"),
        (lambda: Classifier(3, n_classes=2, image_size=8), TypeError, "must be a function, not int"),
    ],
)
def test_what_does_not_fit_is_named_before_any_work(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (torch.tensor([0, 3]), ValueError, "mine answered with the label 3: classes are 0 to 2"),
        (torch.tensor([-1, 0]), ValueError, "mine answered with the label -1: classes are 0 to 2"),
        (torch.tensor([0.2, 0.9]), TypeError, "probabilities of one class need (p > 0.5)"),
        (torch.zeros(2, 4), TypeError, "floats [2, 3] for 3 classes, not to torch.float32 (2, 4)"),
        (np.array(["a", "b"]), TypeError, "mine: the classifier returned ndarray, no numbers"),
        (torch.full((2, 3), torch.nan), BrokenFeaturesError, "not finite"),
    ],
)
def test_answers_that_are_none_are_refused(answer, error, message):
    model = Classifier(lambda pixels: answer, n_classes=3, image_size=SIDE, id="mine")
    with pytest.raises(error, match=re.escape(message)):
        model.encode_image(torch.zeros(2, 3, SIDE, SIDE))
