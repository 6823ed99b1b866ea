"""Image towers in int8: one image at a time, named in every record, and refused where they cannot be had or learn."""

import importlib.util
from dataclasses import fields

import cloudpickle
import pytest
import torch
from tiny_encoders import SIDE, Tiny
from torch import nn

import medrobust_lib as mr
from medrobust_lib.adaptation.adapting import adapt_lora, fine_tune
from medrobust_lib.adaptation.retraining import retrain_on_noise
from medrobust_lib.experiments.cards import environment
from medrobust_lib.models import int8, loading
from medrobust_lib.models.adapters import attach_adapters, save_adapter
from medrobust_lib.models.int8 import Int8Tower, check_int8, int8_tower
from medrobust_lib.models.loading import load_model, register_model
from medrobust_lib.models.text_frame import why_not_learned
from medrobust_lib.smoothing.certify import certify
from medrobust_lib.smoothing.methods import PromptClassifier
from medrobust_lib.smoothing.prompts import learn_prompts
from medrobust_lib.studies.steps import described

MISSING = [name for name in int8.PACKAGES if importlib.util.find_spec(name) is None]
needs_extra = pytest.mark.skipif(bool(MISSING), reason=f"the extra onnx is not installed: {', '.join(MISSING)}")
FACTS = {"family": "tiny", "image_size": SIDE, "licence": "MIT", "source": "this test", "citation": "nobody"}


@pytest.fixture(scope="module")
def data():
    return mr.load_dataset("phantom/blood", n=16)


@pytest.fixture(scope="module")
def whole():
    return load_model("demo-clip-vit", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def quantised():
    return load_model("demo-clip-vit", dtype="int8")


@pytest.fixture(scope="module")
def prepared(whole, data):
    return whole.prepare(data.images)


# ---- without the extra ----


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(int8, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ImportError, match=r"needs onnxruntime; .* pip install -c constraints.txt -e '\.\[onnx\]'"):
        load_model("demo-clip", device="cpu", dtype="int8")


def test_nothing_is_loaded_before_the_refusal(monkeypatch):
    monkeypatch.setattr(loading, "_REGISTERED", {})
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    register_model("mine", lambda entry, **_: pytest.fail("loaded"), **FACTS)
    with pytest.raises(ImportError, match="onnx, onnxruntime, onnxscript"):
        load_model("mine", dtype=torch.int8)


def test_int8_is_of_the_cpu():
    with pytest.raises(ValueError, match=r"dtype='int8' computes on the CPU, not on 'cuda:0'; take device='cpu'"):
        check_int8(torch.device("cuda:0"))


def test_a_model_without_int8_says_its_own_type(whole, prepared, data):
    assert (whole.precision, whole.identity()["dtype"]) == ("float32", "float32")
    half = load_model("demo-clip-vit", device="cpu", dtype="bfloat16")
    classifier = PromptClassifier(half, half.class_features(data.classes, data.templates[:1]))
    found = certify(classifier, prepared[0], index=0, sigma=0.1, n0=10, n=50, dataset=data.id)
    assert (half.precision, found.dtype, found.guarantee) == ("bfloat16", "bfloat16", "standard")


# ---- features ----


@needs_extra
@pytest.mark.parametrize("id", ["demo-clip", "demo-clip-vit"])
def test_features_are_those_of_float32_up_to_rounding(id, data):
    exact, rounded = load_model(id, device="cpu"), load_model(id, dtype="int8")
    pixels = exact.prepare(data.images)
    expected, found = exact.encode_image(pixels), rounded.encode_image(pixels)
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    assert not torch.equal(found, expected)  # it is quantised
    assert (found * expected).sum(dim=1).min() > 0.999
    assert torch.equal(rounded.encode_text(list(data.classes)), exact.encode_text(list(data.classes)))


@needs_extra
def test_features_of_an_image_do_not_depend_on_its_batch(quantised, prepared):
    together = quantised.encode_image(prepared)
    loud = torch.cat(
        [prepared[:1], 3 * torch.randn(3, *prepared.shape[1:], generator=torch.Generator().manual_seed(0))]
    )
    assert torch.equal(together[:1], quantised.encode_image(prepared[:1]))
    assert torch.equal(together[:1], quantised.encode_image(loud)[:1])
    assert torch.equal(together.flip(0), quantised.encode_image(prepared.flip(0)))


@needs_extra
def test_a_batch_through_dynamic_quantisation_would_depend_on_it(tmp_path):
    """Why images go one at a time: the scale of a batch is that of its largest value."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    layer = nn.Linear(8, 4)
    rows = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [100.0]])
    with torch.no_grad():
        torch.onnx.export(
            layer.eval(),
            (rows,),
            tmp_path / "whole.onnx",
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("n")},),
        )
    quantize_dynamic(tmp_path / "whole.onnx", tmp_path / "int8.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    alone, together = (session.run(None, {name: batch.numpy()})[0] for batch in (rows[:1], rows))
    assert abs(alone[0] - together[0]).max() > 0.01


@needs_extra
def test_workers_get_the_same_tower(quantised, prepared):
    packed = cloudpickle.loads(cloudpickle.dumps(quantised))
    assert torch.equal(packed.encode_image(prepared), quantised.encode_image(prepared))
    assert [field.name for field in fields(Int8Tower)] == ["network"]


@needs_extra
def test_loading_leaves_the_random_stream_and_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_model("demo-clip-vit", dtype="int8")
    assert torch.equal(torch.rand(1), expected)
    assert not list(tmp_path.iterdir())


# ---- records ----


@needs_extra
def test_certificates_manifests_cards_and_identity_say_int8(whole, quantised, prepared, data, tmp_path):
    classifier = PromptClassifier(quantised, quantised.class_features(data.classes, data.templates[:1]))
    found = certify(classifier, prepared[0], index=0, sigma=0.1, n0=10, n=50, dataset=data.id)
    assert (found.dtype, found.guarantee) == ("int8", "standard")
    assert quantised.identity() == whole.identity() | {"dtype": "int8"}
    assert described(quantised, data, [])["model"]["dtype"] == "int8"
    assert "dtype=int8" in repr(quantised)
    assert "onnxruntime" in environment()
    one = data.subset([0])
    mr.certify_dataset(quantised, one, sigmas=[0.1], n=100, store=tmp_path)
    with pytest.raises(ValueError, match="dtype"):
        mr.certify_dataset(whole, one, sigmas=[0.1], n=100, store=tmp_path)


# ---- learning ----


@needs_extra
def test_prompts_are_learned_without_a_gradient_of_the_tower(quantised, data):
    assert why_not_learned(quantised) == ""
    learned = learn_prompts(quantised, data, shots=1, epochs=1, sigmas=(0.1,))
    assert learned.class_features(quantised).shape == (len(data.classes), quantised.embed_dim)


@needs_extra
@pytest.mark.parametrize(
    "train",
    [
        lambda model, data, val: attach_adapters(model, rank=2),
        lambda model, data, val: adapt_lora(model, [data], validation=[val], epochs=1),
        lambda model, data, val: fine_tune(model, [data], validation=[val], epochs=1),
        lambda model, data, val: retrain_on_noise(model, data, sigma=0.1, shots=1, epochs=1),
    ],
    ids=["adapters", "LoRA", "fine-tuning", "re-training"],
)
def test_the_tower_does_not_learn(train, quantised):
    splits = [mr.load_dataset("phantom/blood", split=split, n=16) for split in ("train", "val")]
    with pytest.raises(ValueError, match=r"demo-clip-vit is in int8: its image tower has no gradient .* in float32"):
        train(quantised, *splits)


@needs_extra
def test_a_gradient_of_pixels_is_refused(quantised, prepared):
    with pytest.raises(ValueError, match=r"in int8 has no gradient; load the model with dtype='float32' or 'bfloat16'"):
        quantised.encode_image(prepared[:1].clone().requires_grad_(True))


@needs_extra
def test_an_adapter_is_merged_before(whole, prepared, tmp_path):
    adapted = attach_adapters(whole, rank=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    save_adapter(adapted, tmp_path / "adapter", provenance={})
    exact = load_model(whole.id, device="cpu", adapter=tmp_path / "adapter")
    rounded = load_model(whole.id, dtype="int8", adapter=tmp_path / "adapter")
    base, expected, found = (model.encode_image(prepared) for model in (whole, exact, rounded))
    assert ((found * expected).sum(dim=1) > (found * base).sum(dim=1)).all()


# ---- towers that are refused ----


class Odd(Tiny):
    """An image tower whose path hangs on a value, which no export can follow."""

    def _image_features(self, pixels):
        return super()._image_features(pixels if pixels.sum().item() > 0 else -pixels)


class Moody(Tiny):
    """An image tower that is another network from its third call on, as an exported one may be."""

    calls = 0

    def __init__(self, id):
        super().__init__(id)
        self.last = nn.Linear(8, 8)

    def _image_features(self, pixels):
        self.calls += 1
        return self.last(super()._image_features(pixels)) * (1 if torch.compiler.is_exporting() else -1)


@needs_extra
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Tiny, "the image tower has no matrix product with weights to quantise; load the model with dtype='float32'"),
        (Odd, r"the image tower cannot be exported \(.+\); load the model with dtype='float32' or 'bfloat16'"),
        (Moody, r"in int8 the features of an image have the cosine -\d.* with those in float32, below 0.9"),
    ],
)
def test_towers_that_cannot_be_quantised_are_refused(kind, reason, capfd):
    with pytest.raises(ValueError, match=f"^tiny: {reason}"):
        int8_tower(kind("tiny").eval())
    assert capfd.readouterr() == ("", "")


@needs_extra
def test_a_classifier_that_gives_labels_is_refused_in_one_message(capfd):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 3)).eval()
    model = mr.Classifier(lambda pixels: net(pixels).argmax(1), n_classes=3, image_size=SIDE, id="tiny")
    with pytest.raises(ValueError, match="^tiny: the image tower cannot be exported"):
        int8_tower(model)
    assert capfd.readouterr() == ("", "")


@needs_extra
def test_every_kind_of_tower_goes_through(loaded, pixels, each_kind):
    model = loaded(each_kind)
    tower, seen = int8_tower(model), pixels(model)
    with torch.no_grad():
        found, expected = tower(seen), model._image_features(seen)
    assert nn.functional.cosine_similarity(found, expected).min() > 0.98
    assert torch.equal(tower(seen[:1]), found[:1])
