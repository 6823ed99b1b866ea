"""Kinds of dual encoders: the features of each are those of its own library, and what it can do is what is written."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from medrobust_lib.models.loading import available_offline, check_kind, find_model, load_model
from medrobust_lib.models.text_frame import find_text_frame

spec = importlib.util.spec_from_file_location("tiny_kinds", Path(__file__).with_name("tiny_kinds.py"))
tiny_kinds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_kinds)

KINDS = tuple(tiny_kinds.KINDS)
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


def test_any_repository_that_the_hub_guards_says_so(tmp_path, monkeypatch, hub_cache):
    hub_cache("nothing/here")

    def guarded(*arguments, **options):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", guarded)
    monkeypatch.setattr(transformers.CLIPImageProcessor, "get_image_processor_dict", lambda place: (CLIP_IMAGES, {}))
    with pytest.raises(FileNotFoundError, match=r"accepted first: log in at https://huggingface.co/owner/name, agree"):
        load_model("hf:owner/name", device="cpu", weights_dir=tmp_path, offline=False)


CLIP_IMAGES = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}


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
