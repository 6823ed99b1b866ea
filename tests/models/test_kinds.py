"""Kinds of dual encoders: the features of each are those of its own library, and what it can do is what is written."""

import dataclasses
import functools
import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from medrobust_lib.adaptation.retraining import retrain_on_noise
from medrobust_lib.models.adapters import adapter_layout, adapter_parameters, attach_adapters, merge_adapters
from medrobust_lib.models.catalogue import DUAL_ENCODERS
from medrobust_lib.models.catalogue import KINDS as KINDS_TABLE
from medrobust_lib.models.loading import available_offline, check_kind, find_model, list_models, load_model
from medrobust_lib.models.open_clip import OpenClipEncoder
from medrobust_lib.models.text_frame import find_text_frame, why_not_learned
from medrobust_lib.models.transformers_clip import TransformersClipEncoder
from medrobust_lib.models.weights import missing_weights
from medrobust_lib.smoothing.methods import AdaptedPrompts, FixedPrompts
from medrobust_lib.smoothing.prompts import learn_prompts, text_prompts
from medrobust_lib.smoothing.table import certify_dataset

spec = importlib.util.spec_from_file_location("tiny_kinds", Path(__file__).with_name("tiny_kinds.py"))
tiny_kinds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_kinds)

KINDS = tuple(tiny_kinds.KINDS)
TABLE = {row["kind"]: row for row in KINDS_TABLE}
TEXTS = ["an image of debris.", "a histology patch of tissue, of lymphocytes", "tissue"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Function giving the folder of a kind, written once."""
    with tiny_kinds.timm_towers():

        @functools.cache
        def written(kind):
            folder = tmp_path_factory.mktemp("kind")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                tiny_kinds.KINDS[kind](folder)
            return folder

        yield written


@pytest.fixture(scope="module")
def loaded(folders):
    """Function giving the model of a kind, loaded once and not to be changed."""
    return functools.cache(lambda kind: load_model(f"local-dir:{folders(kind)}", device="cpu"))


def own_features(folder, images, texts):
    """Features of images and texts, of any norm, by the library's own processor, tokenizer and forward pass."""
    pictures = [Image.fromarray(image) for image in images]
    with torch.no_grad():
        if (folder / "open_clip_config.json").is_file():
            model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
            tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
            return model.eval().encode_image(torch.stack([*map(transform, pictures)])), model.encode_text(tokens)
        model = transformers.AutoModel.from_pretrained(folder).eval()
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        name = settings.get("image_processor_type") or settings["feature_extractor_type"]
        processor = getattr(transformers, name.replace("FeatureExtractor", "ImageProcessor") + "Pil")(**settings)
        pixels = torch.as_tensor(np.stack(processor(pictures)["pixel_values"]))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        width = {"max_length": 18 if isinstance(model, transformers.AltCLIPModel) else tiny_kinds.LENGTH}
        tokens = tokenizer(texts, padding="max_length", **width, return_tensors="pt")
        features = model.get_image_features(pixel_values=pixels), model.get_text_features(**tokens)
        return [feature.pooler_output for feature in features]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_its_library(kind, folders, loaded, images):
    model, folder = loaded(kind), folders(kind)
    check_kind(find_model(f"local-dir:{folder}"))
    images = [*images, np.random.default_rng(1).integers(0, 256, (33, 57, 3), dtype=np.uint8)]
    expected = [functional.normalize(features, dim=-1) for features in own_features(folder, images, TEXTS)]
    found = model.encode_image(model.prepare(images)), model.encode_text(TEXTS)
    for ours, theirs in zip(found, expected, strict=True):
        assert (theirs[0] - theirs[1]).abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    # One text alone is the same text, and its word embeddings lead to the same features.
    torch.testing.assert_close(model.encode_text(TEXTS[2]), expected[1][2:], atol=1e-5, rtol=0)
    tokens = model.tokenize(TEXTS)
    assert torch.equal(model.encode_embeddings(model.embed_tokens(tokens), tokens), model.encode_text(TEXTS))
    assert model.embed_dim == expected[0].shape[1] == expected[1].shape[1]
    assert model.image_size == tiny_kinds.SIDE


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_gives_nearly_the_same_features(kind, folders, loaded, images):
    exact, rounded = loaded(kind), load_model(f"local-dir:{folders(kind)}", device="cpu", dtype="bfloat16")
    for encode in (lambda model: model.encode_image(model.prepare(images)), lambda model: model.encode_text(TEXTS)):
        ours, theirs = encode(rounded), encode(exact)
        assert ours.dtype == torch.float32
        assert 0.98 < (ours * theirs).sum(dim=-1).min() < 1 - 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_the_whole_context_are_read_and_longer_ones_refused(kind, loaded):
    model = loaded(kind)
    longest = "x " * (model.context_length - len(find_text_frame(model).start) - 1)
    assert model.encode_text([longest]).isfinite().all()
    with pytest.raises(ValueError, match=f"has {model.context_length + 1} tokens .* reads at most"):
        model.encode_text([f"{longest} x"])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_can_be_learned(kind, loaded, check_prompts):
    check_prompts(loaded(kind))


@pytest.mark.parametrize("kind", ["SigLIP", "SigLIP 2", "open_clip SigLIP"])
def test_a_sigmoid_loss_means_scores_of_each_class_by_itself(kind, folders, loaded, images):
    model, folder = loaded(kind), folders(kind)
    features, classes = model.encode_image(model.prepare(images)), model.encode_text(TEXTS)
    own, bias = own_features(folder, images, TEXTS), -3.0
    cosine = functional.normalize(own[0], dim=-1) @ functional.normalize(own[1], dim=-1).T
    expected = 1 / (1 + torch.exp(-(float(np.exp(2.0)) * cosine + bias)))
    scores = model.sigmoid_scores(features, classes)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    if kind.startswith("SigLIP"):
        whole = transformers.AutoModel.from_pretrained(folder).eval()
        tokens = model.tokenize(TEXTS).ids
        pixels = (model.prepare(images) - 0.5) / 0.5
        with torch.no_grad():
            logits = whole(input_ids=tokens, pixel_values=pixels).logits_per_image
        torch.testing.assert_close(scores, logits.sigmoid(), atol=1e-5, rtol=0)
    assert torch.equal(scores.argmax(1), model.probabilities(features, classes).argmax(1))
    assert not torch.allclose(scores.sum(1), torch.ones(len(images)), atol=0.05)


def test_a_model_without_a_scale_of_its_cosines_is_refused(folders):
    network = transformers.AutoModel.from_pretrained(folders("CLIP"))
    del network.logit_scale
    with pytest.raises(ValueError, match="a CLIPModel has no logit_scale, by which cosines become probabilities"):
        TransformersClipEncoder(network, None, preprocessing=None, id="x", provenance={})


def test_a_model_trained_with_softmax_has_no_such_scores(loaded):
    model = loaded("CLIP")
    assert model.logit_bias is None
    features = model.encode_text(TEXTS)
    with pytest.raises(ValueError, match="was trained with softmax and has no logit_bias; take probabilities"):
        model.sigmoid_scores(features, features)


def test_a_bias_that_is_not_finite_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders("SigLIP"), tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["logit_bias"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"logit_bias=nan is not finite; the weights are damaged"):
        load_model(f"local-dir:{folder}", device="cpu")


def test_a_tokenizer_that_needs_more_packages_says_which(folders, monkeypatch):
    def lacking(place):
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library but it was not found")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lacking)
    id = f"local-dir:{folders('SigLIP')}"
    for refused in (lambda: load_model(id, device="cpu"), lambda: check_kind(find_model(id))):
        with pytest.raises(ValueError, match=r"run `pip install sentencepiece protobuf` .* SiglipTokenizer requires"):
            refused()


# What each kind can do


@pytest.fixture(scope="module")
def drawn(phantoms):
    """Eight images of two classes whose names the tiny tokenizers know."""
    words = {"classes": ("tissue", "debris"), "templates": ("an image of {}.",)}
    few = phantoms("breast", split="train", n=8)
    return dataclasses.replace(few, images=few.images.copy(), labels=few.labels.copy(), **words)


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_of_the_table_in_the_documentation(kind, loaded, drawn):
    row, model = TABLE[kind], loaded(kind)
    assert row["library"] == ("open_clip" if isinstance(model, OpenClipEncoder) else "transformers")
    assert row["start_token"] == bool(find_text_frame(model).start)
    assert row["scores"] == ["softmax", *(["sigmoid"] if model.logit_bias is not None else [])]
    assert row["prompts"] == (not why_not_learned(model))
    assert row["adapters"] == adapters_of(model)
    assert row["retraining"]
    assert set(row) - {"kind", "models", "such_as"} == {
        "library",
        "start_token",
        "prompts",
        "adapters",
        "retraining",
        "scores",
    }


def test_the_table_in_the_documentation_has_every_kind():
    assert tuple(TABLE) == KINDS


def adapters_of(model):
    try:
        layout = adapter_layout(model)
    except ValueError as error:
        assert "no place for adapters: the image tower has neither query, key and value" in str(error)
        return "refused"
    return "fused" if layout.fused else {"convolutions": "convolutions"}.get(layout.kind, "layers")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:re-training", "ignore:at sigma 0.1 16 draws reach")
def test_prompts_adaptation_retraining_and_certificates(kind, loaded, drawn):
    model = loaded(kind)
    form = {"sigmas": (0.1,), "shots": 2, "epochs": 2, "draws_per_image": 2, "template": "an image of {}."}
    learned = learn_prompts(model, drawn, **form)
    written = text_prompts(model, drawn.classes, "an image of {}.")
    texts = model.encode_text(["an image of tissue.", "an image of debris."])
    torch.testing.assert_close(written.class_features(model), texts, atol=1e-6, rtol=0)
    assert not torch.equal(learned.context, written.context)
    retrained = retrain_on_noise(model, drawn, sigma=0.1, epochs=1)
    pixels = model.prepare(drawn.images[:3])
    assert (retrained.encode_image(pixels) - model.encode_image(pixels)).abs().max() > 1e-3
    torch.testing.assert_close(retrained.encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-6, rtol=0)
    methods = [FixedPrompts("fixed", learned.class_features(model)), AdaptedPrompts("adapted", model, learned)]
    for encoder in (model, retrained):
        rows = certify_dataset(encoder, drawn, methods, sigmas=[0.1], n0=8, n=16)
        assert set(rows.guarantee) == {"standard", "frozen-prompt"}
        assert len(rows) == 16


@pytest.mark.parametrize("kind", [kind for kind, row in TABLE.items() if row["adapters"] != "refused"])
def test_adapters_learn_on_every_transformer_tower_and_never_on_its_pooling(kind, loaded):
    model = loaded(kind)
    adapted, layout = attach_adapters(model, rank=2), adapter_layout(model)
    assert layout.kind == "convolutions" or layout.blocks == 2
    pixels = torch.rand(3, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapted.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=0)
    parameters = adapter_parameters(adapted)
    assert not [name for name in parameters if "pool" in name or ".head." in name]
    optimiser = torch.optim.SGD(parameters.values(), lr=1.0)
    adapted.encode_image(pixels)[:, 0].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in parameters.items() if ".lora_B." in name)
    optimiser.step()
    moved = adapted.encode_image(pixels).detach()
    assert (moved - model.encode_image(pixels)).abs().max() > 1e-4
    merged = merge_adapters(adapted)
    torch.testing.assert_close(merged.encode_image(pixels), moved, atol=1e-5, rtol=0)
    assert merged.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["SigLIP", "open_clip CoCa"])
def test_embeddings_of_one_thread_are_not_those_of_another(kind, loaded):
    model = loaded(kind)
    tokens = model.tokenize(TEXTS)
    given = [
        torch.randn(model.embed_tokens(tokens).shape, generator=torch.Generator().manual_seed(n)) for n in range(4)
    ]
    expected = [model.encode_embeddings(embeddings, tokens) for embeddings in given]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            found = threads.map(lambda embeddings: model.encode_embeddings(embeddings, tokens), given)
            assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))
    assert not model._text_features(given[0], tokens).equal(model._text_features(given[1], tokens))


# Rows of the table


@pytest.mark.parametrize(
    ("id", "kind"), [("medsiglip-448", "SigLIP"), ("siglip2-base", "SigLIP 2"), ("pubmedclip", "CLIP")]
)
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_rows_load_from_their_folder_and_from_the_hub_cache(id, kind, place, folders, loaded, hub_cache, tmp_path):
    entry = find_model(id)
    target = tmp_path / "weights" / id if place == "folder" else hub_cache(entry.source.removeprefix("hf:"))
    shutil.copytree(folders(kind), target, dirs_exist_ok=True)
    assert available_offline(entry, weights_dir=tmp_path / "weights") or entry.files  # of another name in this test
    model = load_model(id, device="cpu", weights_dir=tmp_path / "weights", offline=True)
    assert torch.equal(model.encode_text(TEXTS), loaded(kind).encode_text(TEXTS))
    assert model.provenance["licence"] == entry.licence


def test_a_gated_row_says_how_to_accept_its_terms(hub_cache, tmp_path):
    hub_cache("nothing/here")
    with pytest.raises(FileNotFoundError) as caught:
        load_model("medsiglip-448", device="cpu", weights_dir=tmp_path, offline=True)
    message = str(caught.value)
    assert "python data_scripts/fetch_weights.py medsiglip-448" in message
    assert "accepted first (https://developers.google.com/health-ai-developer-foundations/terms)" in message
    assert "log in at https://huggingface.co/google/medsiglip-448, agree, then run `hf auth login` here" in message


def test_any_repository_that_the_hub_guards_says_so(tmp_path):
    entry, guarded = (
        find_model("hf:owner/name"),
        OSError("You are trying to access a gated repo.\nMake sure to have it."),
    )
    message = str(missing_weights(entry, weights_dir=tmp_path, offline=False, reason=guarded))
    assert "accepted first: log in at https://huggingface.co/owner/name, agree, then run `hf auth login`" in message
    assert "accepted" not in str(missing_weights(entry, weights_dir=tmp_path, offline=False, reason=OSError("no net")))


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_bmc_clip_is_a_checkpoint_of_training_on_an_architecture(place, hub_cache, tmp_path, monkeypatch, images):
    native = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 2}
    architecture = {"embed_dim": 24, "vision_cfg": native, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14", architecture)
    network = tiny_kinds.randomise(open_clip.create_model("ViT-L-14", pretrained_text=False))
    folder = tmp_path / "weights" / "bmc-clip" if place == "folder" else hub_cache("BIOMEDICA/BMC_CLIP_CF")
    folder.mkdir(parents=True, exist_ok=True)
    hub_cache("nothing/here")
    assert not available_offline(find_model("bmc-clip"), weights_dir=tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match=r"fetch_weights\.py bmc-clip"):  # and no other weights in their place
        load_model("bmc-clip", device="cpu", weights_dir=tmp_path / "weights", offline=True)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {}}, folder / "BMC_CLIP_CF.pt")
    model = load_model("bmc-clip", device="cpu", weights_dir=tmp_path / "weights", offline=True)
    pixels = model.prepare(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.preprocessing.mean, model.preprocessing.std))
    with torch.no_grad():
        expected = network.encode_image((pixels - mean) / std, normalize=True)
    torch.testing.assert_close(model.encode_image(pixels), expected, atol=1e-5, rtol=0)
    assert model.preprocessing.mean == open_clip.OPENAI_DATASET_MEAN
    assert set(model.provenance["files"]) == {"BMC_CLIP_CF.pt"}
    assert available_offline(find_model("bmc-clip"), weights_dir=tmp_path / "weights")


def test_numbers_of_parameters_are_those_of_the_published_configurations():
    def parameters(network):
        return sum(parameter.numel() for parameter in network.parameters())

    with torch.device("meta"):
        siglip_2 = transformers.SiglipConfig(text_config={"vocab_size": 256_000})
        assert parameters(transformers.SiglipModel(siglip_2)) == find_model("siglip2-base").parameters
        assert siglip_2.vision_config.image_size == find_model("siglip2-base").image_size
        large = open_clip.create_model("ViT-L-14", device="meta", load_weights=False, pretrained_text=False)
        assert parameters(large) == find_model("bmc-clip").parameters
    assert find_model("pubmedclip").parameters == find_model("plip").parameters  # both are ViT-B/32


def test_every_model_is_listed_once_and_the_table_of_models_says_its_kind():
    named = [id for row in KINDS_TABLE for id in row["models"]]
    assert len(named) == len(set(named))
    assert set(named) <= {entry.id for entry in DUAL_ENCODERS}
    table = list_models().set_index("id")
    assert table.loc["demo-clip", ["kind", "prompts", "adapters"]].tolist() == [
        "open_clip ResNet",
        "yes",
        "convolutions",
    ]
    assert table.loc["medsiglip-448", ["kind", "prompts", "adapters"]].tolist() == ["SigLIP", "yes", "layers"]
    assert table.loc["medclip-vit", "kind"] == ""  # a back end of its own
