import os

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants

import medrobust_lib
from medrobust_lib.models import loading
from medrobust_lib.models.adapters import adapter_parameters, attach_adapters, merge_adapters, save_adapter
from medrobust_lib.models.catalogue import ModelEntry
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens
from medrobust_lib.models.loading import (
    available_offline,
    check_kind,
    find_model,
    hub_location,
    list_models,
    load_model,
    register_model,
    resolve_device,
    resolve_dtype,
)
from medrobust_lib.models.weights import hub_access

BUILT_IN_IDS = [
    "demo-clip",
    "demo-clip-vit",
    "clip-vit-b16",
    "clip-rn50",
    "plip",
    "quilt-b32",
    "biomedclip",
    "medclip-vit",
    "medclip-rn50",
    "unimedclip",
    "robustmedclip",
    "robustmedclip-rn50",
    "medsiglip-448",
    "siglip2-base",
    "pubmedclip",
    "bmc-clip",
]
FACTS = {
    "family": "mean colour",
    "image_size": 8,
    "licence": "MIT",
    "source": "this test",
    "citation": "nobody",
}


class MeanColour(DualEncoder):
    """A user's own model, with a dropout layer to notice a forgotten eval()."""

    def __init__(self):
        super().__init__(
            id="mean-colour",
            preprocessing=Preprocessing(8, "squash", "bilinear", mean=(0,) * 3, std=(1,) * 3),
            embed_dim=3,
            context_length=4,
            logit_scale=1.0,
            provenance={"source": "this test"},
        )
        self.layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))

    def _image_features(self, pixels):
        return self.layer(pixels.mean(dim=(2, 3)))

    def tokenize(self, texts):
        return Tokens(torch.ones(len(texts), 4, dtype=torch.int64), torch.ones(len(texts), 4, dtype=torch.bool))

    def embed_tokens(self, tokens):
        return tokens.ids[..., None].expand(-1, -1, 3).to(self.device, self.dtype)

    def _text_features(self, embeddings, tokens):
        return embeddings.sum(dim=1)


@pytest.fixture
def registered(monkeypatch):
    """An empty list of registered models, put back afterwards."""
    monkeypatch.setattr(loading, "_REGISTERED", {})


def test_list_models_is_one_row_per_model(tmp_path, hub_cache):
    hub_cache("nothing/here")
    table = list_models(weights_dir=tmp_path)
    assert list(table["id"]) == BUILT_IN_IDS
    assert list(table.columns) == [
        "id",
        "family",
        "image_size",
        "parameters",
        "licence",
        "source",
        "sha256",
        "available_offline",
        "citation",
        "kind",
        "prompts",
        "adapters",
    ]
    table = table.set_index("id")
    assert table.loc["clip-vit-b16", "licence"] == "MIT"
    assert table.loc["biomedclip", "parameters"] == 195_902_721
    assert pd.api.types.is_integer_dtype(table["parameters"])
    assert not table.loc["clip-vit-b16":, "available_offline"].any()
    assert (table["citation"] != "").all()


def test_weights_in_the_folder_make_a_model_available(tmp_path, hub_cache):
    hub_cache("nothing/here")
    folder = tmp_path / "medclip-vit"
    folder.mkdir()
    (folder / "medclip-vit-pretrained.zip").touch()
    assert not available_offline(find_model("medclip-vit"), weights_dir=tmp_path)
    (folder / "pytorch_model.bin").touch()
    table = list_models(weights_dir=tmp_path).set_index("id")
    assert table.loc["medclip-vit", "available_offline"]
    assert not table.loc["medclip-rn50", "available_offline"]


def test_weights_in_the_hub_cache_count_once_all_repositories_are_there(tmp_path, hub_cache):
    biomedclip = find_model("biomedclip")
    weights = hub_cache("microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224")
    for name in ("open_clip_config.json", "open_clip_pytorch_model.bin"):
        (weights / name).touch()
    assert not available_offline(biomedclip, weights_dir=tmp_path)
    bert = hub_cache("microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract")
    for name in ("config.json", "tokenizer_config.json", "vocab.txt"):
        (bert / name).touch()
    assert available_offline(biomedclip, weights_dir=tmp_path)


def test_every_published_file_has_an_address_and_a_plain_name():
    for entry in loading.DUAL_ENCODERS:
        names = [url.rpartition("/")[2] for url in entry.files]
        assert len(set(names)) == len(names)
        assert all(names)
        for url in entry.files:
            assert url.startswith("https://") or entry.shipped


def test_every_loader_exists():
    for entry in loading.DUAL_ENCODERS:
        assert callable(loading._resolve_loader(entry))


def test_hub_location_reads_addresses_of_files():
    assert hub_location("https://huggingface.co/vinid/plip/resolve/main/config.json") == ("vinid/plip", "config.json")
    assert hub_location("https://huggingface.co/vinid/plip") is None
    assert hub_location("https://example.org/a/resolve/main/b") is None


@pytest.mark.parametrize(
    ("wrong", "close"),
    [
        ("biomedclp", "'biomedclip'"),
        ("clip-vit-b/16", "'clip-vit-b16'"),
        ("demo_clip", "'demo-clip'"),
        ("PLIP", r"'plip'\? Known"),
        ("CLIP-ViT-B16", r"'clip-vit-b16'\? Known"),
        ("vinid/plip", "'plip'\\? A repository on the hub is hf:vinid/plip, a folder on this computer local-dir:PATH"),
        ("Demo-VLM", "'demo-vlm'"),
    ],
)
def test_unknown_ids_get_the_closest_matches(wrong, close):
    with pytest.raises(ValueError, match=f"unknown model '{wrong}': did you mean .*{close}") as caught:
        load_model(wrong)
    assert "Known: demo-clip, demo-clip-vit, clip-vit-b16" in str(caught.value)
    assert "local-dir:PATH, hf:OWNER/NAME or python:MODULE:FUNCTION" in str(caught.value)


@pytest.mark.parametrize("id", ["hf:name", "hf:", "hf:/name", "hf:owner/", "hf:a/b/c"])
def test_a_repository_has_an_owner_and_a_name(id):
    with pytest.raises(ValueError, match=f"'{id}' names no repository on the hub: write hf:OWNER/NAME; a folder"):
        find_model(id)


@pytest.mark.parametrize("id", ["/no/such/folder", "./mine", "../mine", "~/mine", "here", "C:\\\\mine"])
def test_a_folder_without_prefix_is_told_of_it(id, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"unknown model .* A folder on this computer is local-dir:") as caught:
        load_model(id)
    assert f"local-dir:{id}. Known" in str(caught.value)


def test_an_id_like_no_other_gets_the_list_alone():
    with pytest.raises(ValueError, match=r"unknown model 'xyzzy': Known: demo-clip"):
        load_model("xyzzy")


@pytest.mark.parametrize("id", ["demo-vlm", "llava-1.6-vicuna-7b"])
def test_a_generative_model_is_loaded_elsewhere(id):
    with pytest.raises(ValueError, match=rf"'{id}' is a generative model: load it with load_vlm\('{id}'\)"):
        load_model(id)


@pytest.mark.usefixtures("registered")
def test_a_user_registers_an_own_model_with_one_call(tmp_path):
    seen = {}

    def loader(entry, *, weights_dir, offline):
        seen.update(entry=entry, weights_dir=weights_dir, offline=offline)
        return MeanColour().train()

    medrobust_lib.register_model("mean-colour", loader, **FACTS, parameters=12)
    model = medrobust_lib.load_model("mean-colour", device="cpu", weights_dir=tmp_path)
    assert isinstance(model, MeanColour)
    assert not model.training
    assert not model.layer[1].training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert seen["entry"] == ModelEntry("mean-colour", "mean colour", 8, "MIT", "this test", "nobody", 12, loader=loader)
    assert seen["weights_dir"] == tmp_path
    assert seen["offline"] is True
    row = medrobust_lib.list_models().set_index("id").loc["mean-colour"]
    assert row["available_offline"]
    assert row["parameters"] == 12
    features = model.encode_image(model.prepare(np.full((2, 20, 20, 3), 90, dtype=np.uint8)))
    assert features.shape == (2, 3)
    with pytest.raises(ValueError, match="did you mean 'mean-colour'"):
        load_model("mean-color")


@pytest.mark.usefixtures("registered")
def test_registering_again_replaces_and_built_in_ids_are_taken():
    register_model("mine", lambda entry, **_: None, **FACTS)
    register_model("mine", lambda entry, **_: MeanColour(), **FACTS)
    assert list(list_models()["id"]).count("mine") == 1
    assert load_model("mine", device="cpu").id == "mean-colour"
    for taken in ("plip", "local-dir:x", "hf:x/y", ""):
        with pytest.raises(ValueError, match=f"the model id '{taken}' is taken"):
            register_model(taken, lambda entry, **_: None, **FACTS)
    with pytest.raises(TypeError, match="loader must be a function returning a DualEncoder, not str"):
        register_model("other", "module:function", **FACTS)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("made", "named"), [(torch.nn.Linear(1, 1), "Linear"), (None, "NoneType"), (MeanColour, "ABCMeta"), ("x", "str")]
)
def test_a_loader_must_return_a_dual_encoder(made, named):
    register_model("mine", lambda entry, **_: made, **FACTS)
    with pytest.raises(ValueError, match=rf"the loader of 'mine' must return a DualEncoder, not {named} .*its form is"):
        load_model("mine", device="cpu")


@pytest.mark.usefixtures("registered")
def test_weights_that_an_earlier_load_rounded_are_not_called_float32():
    shared = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2)).eval()
    register_model("mine", lambda entry, **_: medrobust_lib.Classifier(shared, n_classes=2, image_size=8), **FACTS)
    for dtype in ("float32", "bfloat16", "bfloat16"):
        assert load_model("mine", device="cpu", dtype=dtype).precision == dtype
    with pytest.raises(
        ValueError, match=r"'mine' returned weights in torch.bfloat16, not in float32.* within the load"
    ):
        load_model("mine", device="cpu", dtype="float32")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("loader", [os.getcwd, lambda: None, lambda entry: None, lambda weights_dir, offline: None])
def test_a_loader_must_take_what_loaders_are_called_with(loader):
    with pytest.raises(
        ValueError, match=r"the loader of 'mine' must take the call .*\(entry, weights_dir=\.\.\., offline="
    ):
        register_model("mine", loader, **FACTS)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_dtype_is_what_was_asked_for(dtype, expected, images):
    register_model("mine", lambda entry, **_: MeanColour(), **FACTS)
    model = load_model("mine", device="cpu", dtype=dtype)
    assert model.dtype == expected
    assert next(model.parameters()).dtype == expected
    features = model.encode_image(model.prepare(images))
    assert features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=-1), torch.ones(5), atol=1e-6)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", ["int4", "double", torch.int64, 3])
def test_wrong_dtypes_are_refused(dtype):
    register_model("mine", lambda entry, **_: MeanColour(), **FACTS)
    with pytest.raises(ValueError, match="dtype must be 'auto', 'float32', 'bfloat16', 'float16', not"):
        load_model("mine", device="cpu", dtype=dtype)


def test_device_auto_is_the_accelerator_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert resolve_device("auto") == torch.device("mps")
    assert resolve_dtype("auto", torch.device("mps")) == torch.bfloat16
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["xpu:17", "toaster"])
def test_devices_that_are_not_here_are_refused(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here .* try 'auto' or 'cpu'"):
        load_model("demo-clip", device=device)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("variable", "argument", "expected"),
    [("1", None, True), ("true", None, True), ("0", None, False), ("", None, False), ("1", False, False)],
)
def test_offline_follows_the_environment_unless_said(monkeypatch, variable, argument, expected):
    seen = []

    def loader(entry, *, weights_dir, offline):
        seen.append(offline)
        return MeanColour()

    monkeypatch.setenv("HF_HUB_OFFLINE", variable)
    register_model("mine", loader, **FACTS)
    load_model("mine", device="cpu", offline=argument)
    assert seen == [expected]


def test_hub_access_is_switched_and_put_back(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(KeyError), hub_access(offline=True):
        assert constants.is_offline_mode()
        raise KeyError
    assert not constants.is_offline_mode()


def test_loading_leaves_the_callers_random_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model("demo-clip", device="cpu")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_in_float32_before_the_type_changes(tmp_path, dtype):
    base = load_model("demo-clip", device="cpu")
    adapted = attach_adapters(base, rank=2)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.add_(0.05)
    folder = save_adapter(adapted, tmp_path / "tissue", provenance={"epochs": 0})
    model = load_model("demo-clip", device="cpu", dtype=dtype, adapter=str(folder))
    expected = merge_adapters(adapted).to(model.dtype).state_dict()
    assert model.id == "demo-clip + tissue"
    assert model.provenance["epochs"] == 0
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(model.model.visual.conv1.weight, base.model.visual.conv1.weight.to(model.dtype))
    assert model.model.visual.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_missing_adapter_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter folder .*nowhere"):
        load_model("demo-clip", device="cpu", adapter=tmp_path / "nowhere")


def test_a_loader_of_ones_own_is_named_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "import medrobust_lib as mr\n\n"
        "def load(entry, *, weights_dir, offline):\n"
        "    return mr.load_model('demo-clip')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model("python:own_models:load", device="cpu")
    assert model.image_size == 64 and not model.training
    assert available_offline(find_model("python:own_models:load"), weights_dir=tmp_path)
    for id, message in (
        ("python:own_models", "names no loader: write python:MODULE:FUNCTION"),
        ("python:own_models:save", "the module own_models has no function 'save'"),
        ("python:no_such_models:load", "No module named 'no_such_models'; install the module .* PYTHONPATH"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(id)
    for refused in (lambda: load_model("python:os:getcwd"), lambda: check_kind(find_model("python:os:getcwd"))):
        with pytest.raises(
            ValueError, match=r"must take the call getcwd\(entry, weights_dir=\.\.\., offline=\.\.\.\) and"
        ):
            refused()
