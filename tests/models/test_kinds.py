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

from medrobust_lib.models.loading import check_kind, find_model, load_model
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
