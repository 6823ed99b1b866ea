import hashlib
import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import BertConfig

from medrobust_lib.models import loading
from medrobust_lib.models.loading import available_offline, check_kind, find_model, load_model
from medrobust_lib.models.open_clip import OpenClipEncoder

BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
BIOMED_BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"


def reference(name, images, texts, **arguments):
    """Unit-norm features by open_clip's own transform, tokenizer and forward pass."""
    model, transform = open_clip.create_model_from_pretrained(name, **arguments)
    model.eval()
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        return (
            model.encode_image(pixels, normalize=True),
            model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True),
            model.logit_scale.exp().item(),
        )


def assert_parity(encoder, expected, images, texts):
    """Features of both towers within 1e-5 of the reference, which itself tells the inputs apart."""
    expected_images, expected_texts, logit_scale = expected
    assert (expected_images[0] - expected_images[1]).abs().max() > 1e-4
    assert (expected_texts[0] - expected_texts[1]).abs().max() > 1e-4
    image_features = encoder.encode_image(encoder.prepare(images))
    torch.testing.assert_close(image_features, expected_images, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_text(texts), expected_texts, atol=1e-5, rtol=0)
    tokens = encoder.tokenize(texts)
    through_embeddings = encoder.encode_embeddings(encoder.embed_tokens(tokens), tokens)
    torch.testing.assert_close(through_embeddings, expected_texts, atol=1e-5, rtol=0)
    assert encoder.logit_scale == pytest.approx(logit_scale)
    assert encoder.embed_dim == expected_images.shape[1]
    assert image_features.dtype == torch.float32
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def assert_embeddings_steer_the_features(encoder, text):
    """Gradients reach the word embeddings of the text, and of nothing behind its end in a causal tower."""
    tokens = encoder.tokenize([text, text + " tissue tissue"])
    embeddings = encoder.embed_tokens(tokens).requires_grad_(True)
    encoder.encode_embeddings(embeddings, tokens)[0, 0].backward()
    size = embeddings.grad[0].abs().sum(dim=1)
    assert (size[tokens.mask[0]] > 0).all()
    assert (size[~tokens.mask[0]] == 0).all()


def meta_model(name, **arguments):
    """A full-size architecture without memory for its weights."""
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta", load_weights=False, pretrained_text=False, **arguments)


def test_local_folder_with_its_own_vocabulary_matches_open_clip(demo_folder, images, texts):
    name = f"local-dir:{demo_folder}"
    encoder = load_model(name, device="cpu")
    assert isinstance(encoder.model, open_clip.CLIP)
    assert_parity(encoder, reference(name, images, texts), images, texts)
    assert_embeddings_steer_the_features(encoder, "a histology image")
    assert encoder.id == name
    assert encoder.preprocessing.mean == (0.5, 0.4, 0.3)
    assert encoder.context_length == 16
    assert (encoder.image_size, encoder.embed_dim) == (32, 24)
    weights = demo_folder / "open_clip_model.safetensors"
    assert encoder.provenance["files"][weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_demo_clip_loads_from_the_package_wherever_it_lies(demo_folder, images, texts, tmp_path, monkeypatch):
    elsewhere = tmp_path / "site-packages" / "demo"
    shutil.copytree(demo_folder, elsewhere / "demo-clip")
    monkeypatch.setattr("medrobust_lib.models.weights.DEMO_FOLDER", elsewhere)
    monkeypatch.chdir(tmp_path)
    encoder = load_model("demo-clip", device="cpu", weights_dir=tmp_path / "none")
    assert_parity(encoder, reference(f"local-dir:{demo_folder}", images, texts), images, texts)
    assert encoder.id == "demo-clip"


def test_demo_clip_absent_from_the_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("medrobust_lib.models.weights.DEMO_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the package is incomplete: .*open_clip_config\.json is missing"):
        load_model("demo-clip", device="cpu")


@pytest.mark.parametrize(
    "text_settings",
    [
        {"pool_type": "argmax"},
        {"pool_type": "eos", "eos_id": 14},
        {"pool_type": "last", "no_causal_mask": True},
        {"pool_type": "first", "no_causal_mask": True, "proj_type": "none", "width": 24},
        {"proj_bias": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize("custom_text", [False, True])
def test_every_kind_of_native_text_tower_matches(builders, tmp_path, images, texts, text_settings, custom_text):
    size = builders.write_word_tokenizer(tmp_path, context_length=16)
    configuration = builders.tiny_configuration(size, hf_tokenizer_name="x", **text_settings)
    configuration["model_cfg"]["custom_text"] = custom_text
    builders.write_weights(tmp_path, configuration)
    encoder = load_model(f"local-dir:{tmp_path}", device="cpu")
    assert isinstance(encoder.model, open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)
    assert_parity(encoder, reference(f"local-dir:{tmp_path}", images, texts), images, texts)
    length = encoder.tokenize(texts).ids.shape[1]
    # Padding may be dropped only where no token looks at what follows it.
    assert length == (16 if "no_causal_mask" in text_settings else 10)


def test_a_tokenizer_that_pads_with_end_tokens_keeps_the_first(builders, tmp_path, images, texts):
    size = builders.write_word_tokenizer(tmp_path, context_length=16, padding="[EOS]")
    builders.write_weights(tmp_path, builders.tiny_configuration(size, hf_tokenizer_name="x"))
    encoder = load_model(f"local-dir:{tmp_path}", device="cpu")
    assert_parity(encoder, reference(f"local-dir:{tmp_path}", images, texts), images, texts)
    assert encoder.tokenize(texts).mask.sum(dim=1).tolist() == [7, 10, 3]
    assert encoder.tokenize(["a " * 14]).ids.shape == (1, 16)
    with pytest.raises(ValueError, match="has 17 tokens"):
        encoder.tokenize(["a " * 15])


def test_biomedclip_loads_through_the_unchanged_hub_call(builders, hub_cache, images, texts, tmp_path):
    builders.write_bert(hub_cache(BIOMED_BERT))
    snapshot = hub_cache(BIOMEDCLIP)
    # The random weights are made before the hub's names can be resolved, from a local copy of the text tower.
    configuration = builders.biomedclip_configuration(str(hub_cache(BIOMED_BERT)))
    builders.write_weights(snapshot, configuration, name="open_clip_pytorch_model.bin")
    published = torch.load(snapshot / "open_clip_pytorch_model.bin", weights_only=True)
    # transformers stored this buffer when BiomedCLIP was published.
    published["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(published, snapshot / "open_clip_pytorch_model.bin")
    (snapshot / "open_clip_config.json").write_text(json.dumps(builders.biomedclip_configuration(BIOMED_BERT)))

    encoder = load_model("biomedclip", device="cpu", weights_dir=tmp_path, offline=True)
    assert_parity(encoder, reference(f"hf-hub:{BIOMEDCLIP}", images, texts), images, texts)
    assert encoder.context_length == 256
    assert encoder.tokenize(texts).ids.shape[1] < 30
    assert set(encoder.provenance["files"]) == {"open_clip_config.json", "open_clip_pytorch_model.bin"}
    assert loading.available_offline(find_model("biomedclip"), weights_dir=tmp_path)
    with pytest.raises(ValueError, match=r"has \d+ tokens .* biomedclip reads at most 256"):
        encoder.encode_text(["a " * 300])


def test_biomedclip_loads_from_a_folder_that_needs_no_hub(builders, hub_cache, images, texts, tmp_path):
    folder = tmp_path / "weights" / "biomedclip"
    folder.mkdir(parents=True)
    builders.write_bert(folder)
    builders.write_weights(folder, builders.biomedclip_configuration(str(folder)))
    expected = reference(f"local-dir:{folder}", images, texts)
    # As published: the text tower's name points at the hub, its config.json and vocabulary lie in the folder.
    (folder / "open_clip_config.json").write_text(json.dumps(builders.biomedclip_configuration(BIOMED_BERT)))
    hub_cache("nothing/here")
    encoder = load_model("biomedclip", device="cpu", weights_dir=tmp_path / "weights")
    assert_parity(encoder, expected, images, texts)
    fetched = {url.rpartition("/")[2] for url in find_model("biomedclip").files}
    assert fetched - {"open_clip_pytorch_model.bin"} <= {path.name for path in folder.iterdir()}


def test_biomedclip_has_the_published_key_layout(builders, tmp_path):
    BertConfig().save_pretrained(tmp_path)
    configuration = builders.biomedclip_configuration(str(tmp_path), vision="vit_base_patch16_224", image_size=224)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(configuration))
    shapes = {key: tuple(value.shape) for key, value in meta_model(f"local-dir:{tmp_path}").state_dict().items()}
    assert len(shapes) == 351
    assert shapes["visual.trunk.blocks.11.attn.qkv.weight"] == (2304, 768)
    assert shapes["visual.head.proj.weight"] == (512, 768)
    assert shapes["text.transformer.embeddings.word_embeddings.weight"] == (30522, 768)
    assert shapes["text.proj.0.weight"] == (640, 768)
    assert shapes["text.proj.2.weight"] == (512, 640)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == find_model("biomedclip").parameters


@pytest.mark.parametrize(
    ("model_id", "architecture", "keys", "key", "shape"),
    [
        ("clip-vit-b16", "ViT-B-16-quickgelu", 302, "visual.conv1.weight", (768, 3, 16, 16)),
        ("clip-rn50", "RN50-quickgelu", 489, "visual.attnpool.c_proj.weight", (1024, 2048)),
        ("quilt-b32", "ViT-B-32-quickgelu", 302, "visual.conv1.weight", (768, 3, 32, 32)),
    ],
)
def test_full_size_key_layout_and_parameter_counts(model_id, architecture, keys, key, shape):
    model = meta_model(architecture)
    state_dict = model.state_dict()
    assert len(state_dict) == keys
    assert tuple(state_dict[key].shape) == shape
    assert tuple(state_dict["token_embedding.weight"].shape) == (49408, 512)
    assert sum(parameter.numel() for parameter in model.parameters()) == find_model(model_id).parameters


@pytest.fixture
def tiny_architectures(builders, monkeypatch, tmp_path):
    """open_clip's two OpenAI architectures at a fraction of their size, under their own names."""
    from open_clip import factory

    for name, layers in (("ViT-B-16-quickgelu", 2), ("RN50-quickgelu", [1, 1, 1, 1])):
        configuration = builders.tiny_configuration(49408, context_length=77)["model_cfg"]
        configuration["vision_cfg"] = {**configuration["vision_cfg"], "layers": layers, "image_size": 64}
        if isinstance(layers, list):
            configuration["vision_cfg"] |= {"width": 8, "head_width": 16, "patch_size": None}
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, configuration)


@pytest.mark.parametrize(
    ("model_id", "architecture", "repository"),
    [
        ("clip-vit-b16", "ViT-B-16-quickgelu", "timm/vit_base_patch16_clip_224.openai"),
        ("clip-rn50", "RN50-quickgelu", "timm/resnet50_clip.openai"),
    ],
)
@pytest.mark.parametrize("place", ["hub", "folder"])
def test_openai_weights_load_from_hub_cache_and_folder(
    tiny_architectures, builders, hub_cache, tmp_path, images, texts, model_id, architecture, repository, place
):
    weights = tmp_path / "weights" / model_id
    weights.mkdir(parents=True)
    snapshot = hub_cache(repository)
    model = builders.randomise(open_clip.create_model(architecture))
    path = (snapshot if place == "hub" else weights) / "open_clip_model.safetensors"
    save_file(model.state_dict(), path)
    assert find_model(model_id).files[0].endswith(f"/{path.name}")
    assert repository in find_model(model_id).files[0]

    encoder = load_model(model_id, device="cpu", weights_dir=tmp_path / "weights")
    pretrained = "openai" if place == "hub" else str(path)
    assert_parity(encoder, reference(architecture, images, texts, pretrained=pretrained), images, texts)
    assert_embeddings_steer_the_features(encoder, "an H&E image of debris!!")
    assert encoder.preprocessing.mean == open_clip.OPENAI_DATASET_MEAN
    assert encoder.provenance["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert loading.available_offline(find_model(model_id), weights_dir=tmp_path / "weights")


def test_quiltnet_loads_through_the_unchanged_hub_call(builders, hub_cache, images, texts, tmp_path):
    snapshot = hub_cache("wisdomik/QuiltNet-B-32")
    configuration = builders.tiny_configuration(49408, context_length=77)
    builders.write_weights(snapshot, configuration, name="open_clip_pytorch_model.bin")
    encoder = load_model("quilt-b32", device="cpu", weights_dir=tmp_path)
    assert_parity(encoder, reference("hf-hub:wisdomik/QuiltNet-B-32", images, texts), images, texts)


def test_tokens_are_those_of_open_clip_and_too_long_texts_are_refused(builders, hub_cache, tmp_path):
    builders.write_weights(hub_cache("wisdomik/QuiltNet-B-32"), builders.tiny_configuration(49408, context_length=77))
    encoder = load_model("quilt-b32", device="cpu", weights_dir=tmp_path)
    texts = ["an image", "wow !! !? tissue", "a " * 75]
    tokens = encoder.tokenize(texts)
    assert torch.equal(tokens.ids, open_clip.get_tokenizer("ViT-B-32")(texts))
    assert tokens.mask.sum(dim=1).tolist() == [4, 6, 77]
    assert encoder.tokenize(texts[:1]).ids.shape == (1, 4)
    with pytest.raises(ValueError, match=r"has 78 tokens \(start and end included\), but quilt-b32 reads at most 77"):
        encoder.encode_text([*texts, "a " * 76])
    with pytest.raises(ValueError, match=r"has 302 tokens"):
        encoder.encode_text(["a " * 300])


def test_bfloat16_and_float16_keep_unit_norm_float32_features(demo_folder, images, texts):
    exact = load_model(f"local-dir:{demo_folder}", device="cpu")
    assert exact.dtype == torch.float32
    for dtype in ("bfloat16", torch.float16):
        encoder = load_model(f"local-dir:{demo_folder}", device="cpu", dtype=dtype)
        assert encoder.dtype in (torch.bfloat16, torch.float16)
        for ours, theirs in (
            (encoder.encode_image(encoder.prepare(images)), exact.encode_image(exact.prepare(images))),
            (encoder.encode_text(texts), exact.encode_text(texts)),
        ):
            assert ours.dtype == torch.float32
            assert torch.allclose(ours.norm(dim=-1), torch.ones(len(ours)), atol=1e-6)
            assert (ours * theirs).sum(dim=-1).min() > 0.99


def test_sha256sums_in_the_folder_are_checked(demo_folder):
    weights = demo_folder / "open_clip_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    sums = demo_folder / "SHA256SUMS"
    sums.write_text(f"{digest}  {weights.name}\n")
    assert load_model(f"local-dir:{demo_folder}", device="cpu").embed_dim == 24
    sums.write_text(f"{'0' * 64}  {weights.name}\n")
    with pytest.raises(ValueError, match=rf"open_clip_model.safetensors has SHA-256 {digest}, expected {'0' * 64}"):
        load_model(f"local-dir:{demo_folder}", device="cpu")
    sums.write_text(f"{digest}  {weights.name}\n{digest}  merges.txt\n")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt is missing although its SHA-256 is known"):
        load_model(f"local-dir:{demo_folder}", device="cpu")


def test_missing_and_unexpected_keys_are_listed(demo_folder):
    weights = demo_folder / "open_clip_model.safetensors"
    tensors = load_file(weights)
    lost = sorted(key for key in tensors if key.startswith("visual.transformer"))
    kept = {key: value for key, value in tensors.items() if key not in lost}
    kept["stranger.weight"] = torch.zeros(1)
    kept["ln_final.weight"] = torch.zeros(7)
    save_file(kept, weights)
    assert len(lost) == 24
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_model(f"local-dir:{demo_folder}", device="cpu")
    message = str(caught.value)
    assert str(demo_folder) in message
    assert f"24 missing keys: {', '.join(lost[:10])} and 14 more" in message
    assert "1 unexpected keys: stranger.weight" in message
    assert "1 wrong shapes: ln_final.weight" in message


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_damaged_and_pickled_weights_are_refused(demo_folder, name):
    whole = demo_folder / "open_clip_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    if name.endswith(".bin"):
        torch.save(tensors, demo_folder / name)
    else:
        save_file(tensors, demo_folder / name)
    assert load_model(f"local-dir:{demo_folder}", device="cpu").embed_dim == 24
    content = (demo_folder / name).read_bytes()
    (demo_folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot read the weights of .*damaged"):
        load_model(f"local-dir:{demo_folder}", device="cpu")
    torch.save({"state_dict": tensors, "code": demo_folder.__class__}, demo_folder / "open_clip_pytorch_model.bin")
    (demo_folder / "open_clip_model.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"holds more than tensors, which may run code: \w+.* Fetch it again, or save"):
        load_model(f"local-dir:{demo_folder}", device="cpu")


def test_incomplete_folders_say_what_is_missing(demo_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        load_model(f"local-dir:{tmp_path / 'nowhere'}", device="cpu")
    (demo_folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no weights \(.safetensors"):
        load_model(f"local-dir:{demo_folder}", device="cpu")
    (demo_folder / "open_clip_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no open_clip_config\.json"):
        load_model(f"local-dir:{demo_folder}", device="cpu")


def test_a_tokenizer_that_is_not_the_models_is_refused(demo_folder, builders, tmp_path):
    # Without tokenizer_config.json and tokenizer.json, a config.json alone gives a tokenizer of five tokens.
    for path in demo_folder.glob("tokenizer*"):
        path.unlink()
    BertConfig().save_pretrained(demo_folder)
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer in .*: it must hold tokenizer\.json, or .* vocab\.txt"
    ) as no:
        load_model(f"local-dir:{demo_folder}", device="cpu")
    assert "hf download" not in str(no.value)  # where it is from is not known
    (demo_folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ValueError, match=r"the tokenizer knows 5 tokens, the text tower 15; are the tokenizer files"):
        load_model(f"local-dir:{demo_folder}", device="cpu")
    configured(demo_folder, "model_cfg.text_cfg", hf_tokenizer_name="someone/words")
    (demo_folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"`hf download someone/words --include 'tokenizer\*' .* --local-dir /"):
        load_model(f"local-dir:{demo_folder}", device="cpu")
    builders.write_weights(tmp_path, builders.tiny_configuration(100))
    with pytest.raises(ValueError, match=r"the tokenizer knows 49408 tokens, the text tower 100"):
        load_model(f"local-dir:{tmp_path}", device="cpu")


@pytest.mark.parametrize(
    ("model_id", "source"),
    [
        ("clip-vit-b16", "open_clip:ViT-B-16-quickgelu/openai"),
        ("clip-rn50", "open_clip:RN50-quickgelu/openai"),
        ("quilt-b32", "hf-hub:wisdomik/QuiltNet-B-32"),
        ("biomedclip", f"hf-hub:{BIOMEDCLIP}"),
    ],
)
@pytest.mark.parametrize("offline", [True, None])
def test_missing_weights_name_places_script_and_source(hub_cache, tmp_path, model_id, source, offline):
    hub_cache("nothing/here")
    with pytest.raises(FileNotFoundError, match="offline, so no download was tried") as caught:
        load_model(model_id, device="cpu", weights_dir=tmp_path / "weights", offline=offline)
    message = str(caught.value)
    assert str(tmp_path / "weights" / model_id) in message
    assert str(tmp_path / "hub") in message
    assert f"python data_scripts/fetch_weights.py {model_id}" in message
    assert source in message


def test_a_failed_download_gives_its_reason(hub_cache, tmp_path, monkeypatch):
    hub_cache("nothing/here")

    def unreachable(*arguments, **options):
        assert not constants.is_offline_mode()
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match=r"\(the download failed\)") as caught:
        load_model("biomedclip", device="cpu", weights_dir=tmp_path, offline=False)
    assert "Reason: the hub cannot be reached" in str(caught.value)
    assert constants.is_offline_mode()


def test_a_hub_model_without_its_text_configuration_counts_as_missing(builders, hub_cache, tmp_path):
    snapshot = hub_cache(BIOMEDCLIP)
    builders.write_bert(tmp_path)
    builders.write_weights(snapshot, builders.biomedclip_configuration(str(tmp_path)))
    (snapshot / "open_clip_config.json").write_text(json.dumps(builders.biomedclip_configuration(BIOMED_BERT)))
    with pytest.raises(FileNotFoundError, match=r"the weights of 'biomedclip' are not here.*Reason"):
        load_model("biomedclip", device="cpu", weights_dir=tmp_path / "weights")


def configured(folder, part, **settings):
    """The folder, its open_clip_config.json changed in one part, such as "model_cfg.text_cfg"."""
    content = json.loads((folder / "open_clip_config.json").read_text())
    inner = content
    for name in part.split("."):
        inner = inner[name] if name else inner
    inner.update(settings)
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def drawn():
    """Images of any aspect: margins that are odd, images that are enlarged."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((40, 40), (41, 70), (91, 33), (20, 20))]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 32},
        {"size": [32, 32]},
        {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        {"mean": 0.5, "std": 0.25},
        {"mean": None, "std": None},
        {"interpolation": "bilinear"},
        {"interpolation": "random"},
        {"resize_mode": "squash"},
        {"resize_mode": None},
        {"mode": "RGB"},
        {"fill_color": 255},
    ],
    ids=str,
)
def test_every_setting_of_images_is_followed_as_open_clip_does(demo_folder, settings):
    name = f"local-dir:{configured(demo_folder, 'preprocess_cfg', **settings)}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    expected = torch.stack([transform(Image.fromarray(image)) for image in drawn()])
    encoder = load_model(name, device="cpu")
    pixels, side = encoder.prepare(drawn()), (3, 1, 1)
    mean, std = (torch.tensor(values).view(side) for values in (encoder.preprocessing.mean, encoder.preprocessing.std))
    torch.testing.assert_close((pixels - mean) / std, expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        features = functional.normalize(model.eval().encode_image(expected), dim=-1)
    torch.testing.assert_close(encoder.encode_image(pixels), features, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (
            "preprocess_cfg",
            {"resize_mode": "longest"},
            "resize_mode='longest' is not supported; supported is 'shortest'",
        ),
        ("preprocess_cfg", {"interpolation": "nearest"}, "preprocess_cfg: interpolation='nearest' is not supported"),
        ("preprocess_cfg", {"mode": "L"}, "mode='L' is not supported; supported is 'RGB'"),
        (
            "preprocess_cfg",
            {"crop_pct": 0.9},
            "the setting crop_pct=0.9 is not supported; supported are size, mean, std",
        ),
        ("preprocess_cfg", {"size": [32, 64]}, r"unsupported size \[32, 64\]; need a square"),
        ("preprocess_cfg", {"size": 64}, "preprocess_cfg has images of 64 px, vision_cfg reads 32 px"),
        ("preprocess_cfg", {"std": [0.0, 1, 1]}, "std above 0"),
        ("model_cfg", {"foo": 1}, "model_cfg: the setting foo=1 is not supported; supported are embed_dim"),
        ("model_cfg", {"multimodal_cfg": {}}, "vision_cfg: output_tokens=False is not supported; supported is True"),
        ("model_cfg.vision_cfg", {"foo": 1}, "vision_cfg: the setting foo=1 is not supported; supported are layers"),
        (
            "model_cfg.text_cfg",
            {"foo": 1},
            "text_cfg: the setting foo=1 is not supported; supported are context_length",
        ),
        ("model_cfg.text_cfg", {"embed_cls": True}, "embed_cls=True is not supported; supported is False"),
        ("model_cfg.text_cfg", {"output_tokens": True}, "output_tokens=True is not supported; supported is False"),
        ("model_cfg.text_cfg", {"tokenizer_mode": "clips"}, "tokenizer_mode='clips' is not supported"),
        (
            "",
            {"architecture": "x"},
            "the setting architecture='x' is not supported; supported are model_cfg, preprocess",
        ),
        ("", {"model_cfg": None}, "is not a configuration of open_clip"),
        ("model_cfg", {"text_cfg": 3}, "is not a configuration of open_clip"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(demo_folder, part, settings, message):
    id = f"local-dir:{configured(demo_folder, part, **settings)}"
    for refused in (lambda: load_model(id, device="cpu"), lambda: check_kind(find_model(id))):
        with pytest.raises(ValueError, match=rf"open_clip_config\.json.*{message}"):
            refused()


def test_unsupported_text_towers_are_refused(builders, tmp_path):
    size = builders.write_word_tokenizer(tmp_path, context_length=16)
    for settings, message in (({"tokenizer_mode": "clips"}, "mode 'clips'"),):
        configuration = builders.tiny_configuration(size, hf_tokenizer_name="x", **settings)
        configuration["model_cfg"]["custom_text"] = True
        builders.write_weights(tmp_path, configuration)
        name = f"local-dir:{tmp_path}"
        model = open_clip.create_model_from_pretrained(name, return_transform=False)
        with pytest.raises(ValueError, match=message):
            OpenClipEncoder(model, open_clip.get_tokenizer(name), id="mine", provenance={})


def test_a_tokenizer_that_pads_in_front_is_refused(demo_folder):
    path = demo_folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    id = f"local-dir:{demo_folder}"
    for refused in (lambda: load_model(id, device="cpu"), lambda: check_kind(find_model(id))):
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: padding_side='left' is not supported"):
            refused()


def test_text_features_that_are_not_open_clips_are_refused(builders, hub_cache, tmp_path):
    # The tower masks the token that its own configuration calls padding, whatever the tokenizer pads with.
    bert = tmp_path / "bert"
    bert.mkdir()
    builders.write_bert(bert)
    for path in bert.iterdir():
        shutil.copy(path, tmp_path)
    builders.write_weights(tmp_path, builders.biomedclip_configuration(str(bert)))
    load_model(f"local-dir:{tmp_path}", device="cpu")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"pad_token_id": 3}))
    with pytest.raises(ValueError, match=r"text features differ by .* from those of the library's own forward pass"):
        load_model(f"local-dir:{tmp_path}", device="cpu")


def trained(state):
    """What open_clip's training writes after an epoch."""
    distributed = {f"module.{key}": value for key, value in state.items()}
    return {"epoch": 3, "name": "run", "state_dict": distributed, "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize("name", ["epoch_3.pt", "mine.pth", "weights.bin"])
@pytest.mark.parametrize("form", [trained, dict], ids=["of training", "plain"])
def test_the_only_checkpoint_is_read_whatever_its_name(demo_folder, images, name, form, caplog):
    id = f"local-dir:{demo_folder}"
    expected = load_model(id, device="cpu").state_dict()
    (demo_folder / "open_clip_model.safetensors").unlink()
    weights = {key.removeprefix("model."): value for key, value in expected.items()}
    torch.save(form(weights), demo_folder / name)
    caplog.clear()
    assert available_offline(find_model(id), weights_dir=demo_folder)
    check_kind(find_model(id))
    found = load_model(id, device="cpu")
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    assert name in found.provenance["files"]
    assert not caplog.records  # open_clip speaks of missing weights and random ones


def test_several_checkpoints_are_refused_by_name_unless_they_are_one(demo_folder, builders):
    id = f"local-dir:{demo_folder}"
    expected = load_model(id, device="cpu").state_dict()
    published = demo_folder / "open_clip_model.safetensors"
    torch.save(
        {key: torch.zeros_like(value) for key, value in load_file(published).items()}, demo_folder / "epoch_3.pt"
    )
    for refused in (lambda: load_model(id, device="cpu"), lambda: check_kind(find_model(id))):
        with pytest.raises(
            ValueError, match=r"several checkpoints: epoch_3\.pt, open_clip_model\.safetensors; leave the"
        ):
            refused()
    # open_clip publishes both names with the same weights, and reads the first.
    (demo_folder / "epoch_3.pt").rename(demo_folder / "open_clip_pytorch_model.bin")
    found = load_model(id, device="cpu").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_open_clip_encoder_wraps_a_model_made_elsewhere(demo_folder, images):
    name = f"local-dir:{demo_folder}"
    model = open_clip.create_model_from_pretrained(name, return_transform=False)
    encoder = OpenClipEncoder(model, open_clip.get_tokenizer(name), id="mine", provenance={"source": "a test"})
    assert encoder.provenance == {"source": "a test"}
    assert encoder.encode_image(encoder.prepare(images)).shape == (5, 24)


def test_prompts_can_be_learned_with_biomedclip(builders, hub_cache, tmp_path, check_prompts):
    folder = tmp_path / "weights" / "biomedclip"
    folder.mkdir(parents=True)
    builders.write_bert(folder)
    builders.write_weights(folder, builders.biomedclip_configuration(str(folder)))
    check_prompts(load_model("biomedclip", device="cpu", weights_dir=tmp_path / "weights", offline=True))
