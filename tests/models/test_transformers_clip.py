import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from medrobust_lib.models.catalogue import check_writes_text
from medrobust_lib.models.geometry import prepare_images
from medrobust_lib.models.loading import available_offline, check_kind, find_model, load_model
from medrobust_lib.models.transformers_clip import read_preprocessing

END_OF_TEXT = 49407


def reference(folder, images, texts):
    """Unit-norm features by transformers' own processor, tokenizer and forward pass."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = torch.as_tensor(
        processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    )
    tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        image_features = model.get_image_features(pixel_values=pixels).pooler_output
        text_features = model.get_text_features(**tokens).pooler_output
    return (
        torch.nn.functional.normalize(image_features, dim=-1),
        torch.nn.functional.normalize(text_features, dim=-1),
    )


def assert_parity(encoder, folder, images, texts):
    expected_images, expected_texts = reference(folder, images, texts)
    assert (expected_images[0] - expected_images[1]).abs().max() > 1e-3
    assert (expected_texts[0] - expected_texts[1]).abs().max() > 1e-3
    image_features = encoder.encode_image(encoder.prepare(images))
    torch.testing.assert_close(image_features, expected_images, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_text(texts), expected_texts, atol=1e-5, rtol=0)
    tokens = encoder.tokenize(texts)
    through_embeddings = encoder.encode_embeddings(encoder.embed_tokens(tokens), tokens)
    torch.testing.assert_close(through_embeddings, expected_texts, atol=1e-5, rtol=0)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.fixture
def plip_folder(plip_folders, tmp_path):
    return Path(shutil.copytree(plip_folders(2, False), tmp_path / "weights" / "plip"))


def load_plip(folder, **arguments):
    return load_model("plip", device="cpu", weights_dir=folder.parent, **arguments)


@pytest.mark.parametrize(
    ("end_token", "safetensors"), [(2, False), (END_OF_TEXT, True)], ids=["as published", "in today's format"]
)
def test_plip_loads_through_the_unchanged_hub_call(
    plip_folders, hub_cache, tmp_path, images, texts, end_token, safetensors
):
    snapshot = hub_cache("vinid/plip")
    shutil.copytree(plip_folders(end_token, safetensors), snapshot, dirs_exist_ok=True)
    encoder = load_model("plip", device="cpu", weights_dir=tmp_path, offline=True)
    assert_parity(encoder, snapshot, images, texts)
    assert (encoder.image_size, encoder.embed_dim, encoder.context_length) == (32, 24, 77)
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    weights = snapshot / ("model.safetensors" if safetensors else "pytorch_model.bin")
    assert encoder.provenance["files"][weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert available_offline(find_model("plip"), weights_dir=tmp_path)


def test_plip_loads_from_the_files_that_the_registry_lists(plip_folder, images, texts):
    assert {path.name for path in plip_folder.iterdir()} == {url.rpartition("/")[2] for url in find_model("plip").files}
    encoder = load_plip(plip_folder)
    assert_parity(encoder, plip_folder, images, texts)


def test_old_position_buffers_are_in_the_checkpoint_of_the_test(plip_folder):
    stored = torch.load(plip_folder / "pytorch_model.bin", weights_only=True)
    assert {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"} <= set(stored)


def test_full_size_key_layout_and_parameter_count():
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(vision_config={"patch_size": 32}))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == 398
    assert shapes["text_model.encoder.layers.11.self_attn.q_proj.weight"] == (512, 512)
    assert shapes["vision_model.embeddings.patch_embedding.weight"] == (768, 3, 32, 32)
    assert shapes["visual_projection.weight"] == (512, 768)
    assert sum(parameter.numel() for parameter in model.parameters()) == find_model("plip").parameters


def test_embeddings_steer_the_features_under_a_causal_mask(plip_folder):
    encoder = load_plip(plip_folder)
    tokens = encoder.tokenize(["an image", "an image of debris and tissue"])
    embeddings = encoder.embed_tokens(tokens).requires_grad_(True)
    encoder.encode_embeddings(embeddings, tokens)[0, 0].backward()
    size = embeddings.grad[0].abs().sum(dim=1)
    assert (size[tokens.mask[0]] > 0).all()
    assert (size[~tokens.mask[0]] == 0).all()


def test_tokens_are_clips_and_too_long_texts_are_refused(plip_folder):
    encoder = load_plip(plip_folder)
    texts = ["An H&E image of {debris}!!", "a " * 75]
    tokens = encoder.tokenize(texts)
    expected = SimpleTokenizer()(texts)
    for row, mask, whole in zip(tokens.ids, tokens.mask, expected, strict=True):
        assert row[mask].tolist() == whole[: int(mask.sum())].tolist()
        assert row[mask][-1] == END_OF_TEXT
    with pytest.raises(ValueError, match=r"has 78 tokens \(start and end included\), but plip reads at most 77"):
        encoder.encode_text(["a " * 76])


def test_bfloat16_keeps_unit_norm_float32_features(plip_folder, images, texts):
    exact, rounded = load_plip(plip_folder), load_plip(plip_folder, dtype="bfloat16")
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    for ours, theirs in (
        (rounded.encode_image(rounded.prepare(images)), exact.encode_image(exact.prepare(images))),
        (rounded.encode_text(texts), exact.encode_text(texts)),
    ):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.norm(dim=-1), torch.ones(len(ours)), atol=1e-6)
        assert (ours * theirs).sum(dim=-1).min() > 0.99


@pytest.fixture
def safe_folder(plip_folders, tmp_path):
    return Path(shutil.copytree(plip_folders(2, True, merges=False), tmp_path / "weights" / "plip"))


def test_missing_unexpected_and_misshapen_keys_are_listed(safe_folder):
    path = safe_folder / "model.safetensors"
    tensors = load_file(path)
    lost = sorted(key for key in tensors if key.startswith("text_model.encoder.layers.1"))
    kept = {key: value for key, value in tensors.items() if key not in lost}
    save_file({**kept, "stranger.weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    assert len(lost) == 16
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_plip(safe_folder)
    assert f"16 missing keys: {', '.join(lost[:10])} and 6 more" in str(caught.value)
    assert "1 unexpected keys: stranger.weight" in str(caught.value)
    save_file({**tensors, "logit_scale": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"logit_scale"):
        load_plip(safe_folder)


def test_a_wrong_hash_and_a_damaged_file_are_refused(safe_folder):
    (safe_folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    with pytest.raises(ValueError, match=r"model\.safetensors has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        load_plip(safe_folder)
    (safe_folder / "SHA256SUMS").unlink()
    path = safe_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot read the weights of .*plip"):
        load_plip(safe_folder)


def test_a_pickled_object_is_refused(plip_folder):
    torch.save({"logit_scale": plip_folder}, plip_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot read the weights of .*plip.*more than tensors"):
        load_plip(plip_folder)


def test_missing_weights_name_places_script_and_source(hub_cache, tmp_path):
    hub_cache("nothing/here")
    with pytest.raises(FileNotFoundError, match="offline, so no download was tried") as caught:
        load_model("plip", device="cpu", weights_dir=tmp_path / "weights", offline=True)
    message = str(caught.value)
    assert str(tmp_path / "weights" / "plip") in message
    assert str(tmp_path / "hub") in message
    assert "python data_scripts/fetch_weights.py plip" in message
    assert "source: hf:vinid/plip" in message


def test_a_tokenizer_without_its_files_is_refused(plip_folder):
    (plip_folder / "merges.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer in .*: it must hold tokenizer\.json, or vocab\.json"
    ) as no:
        load_plip(plip_folder)
    assert (
        f"hf download openai/clip-vit-base-patch32 --include 'tokenizer*' 'vocab*' 'merges*' --local-dir {plip_folder}"
        in (str(no.value))
    )
    (plip_folder / "merges.txt").write_text("#version: 0.2\n")
    (plip_folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    with pytest.raises(ValueError, match=r"plip: the tokenizer knows \d tokens, the text tower 49408"):
        load_plip(plip_folder)


@pytest.mark.parametrize("content", ["{}", "[]", "{", "null", '{"version": "1.0", "added_tokens": [], "model": {}}'])
def test_a_damaged_tokenizer_is_named(safe_folder, content):
    (safe_folder / "tokenizer.json").write_text(content)
    id = f"local-dir:{safe_folder}"
    for refused in (lambda: load_model(id, device="cpu"), lambda: check_kind(find_model(id))):
        with pytest.raises(ValueError, match="safe|plip"):
            refused()


def changed(folder, name, **settings):
    """Settings of one of the folder's JSON files; a double underscore leads into a part of it."""
    content = json.loads((folder / name).read_text())
    for key, value in settings.items():
        part, _, inner = key.rpartition("__")
        (content[part] if part else content)[inner] = value
    (folder / name).write_text(json.dumps(content))
    return folder


# Every setting of a CLIP's image processor, at values that change what the model sees.
PROCESSOR_SETTINGS = {
    "as published": {},
    "size": {"size": {"shortest_edge": 32}},
    "squash": {"size": {"height": 32, "width": 32}},
    "squash without crop": {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    "default_to_square": {"default_to_square": True},
    "use_square_size": {"use_square_size": True, "crop_size": 224, "size": {"shortest_edge": 224}},
    "resample": {"resample": 2},
    "do_normalize": {"do_normalize": False},
    "image_mean": {"image_mean": [0.1, 0.2, 0.3]},
    "image_std": {"image_std": [0.3, 0.2, 0.1]},
    "one mean": {"image_mean": 0.5, "image_std": 0.25},
    "do_rescale": {"do_rescale": False},
    "rescale_factor": {"rescale_factor": 0.01},
    "neither": {"do_rescale": False, "do_normalize": False},
    "factor alone": {"rescale_factor": 1 / 127.5, "do_normalize": False},
    "do_convert_rgb": {"do_convert_rgb": False},
    "left out": {"do_normalize": None, "image_mean": None, "do_rescale": None},
}


@pytest.mark.parametrize("settings", PROCESSOR_SETTINGS.values(), ids=PROCESSOR_SETTINGS)
def test_every_setting_of_the_image_processor_is_followed(safe_folder, settings):
    changed(safe_folder, "preprocessor_config.json", **settings)
    given = json.loads((safe_folder / "preprocessor_config.json").read_text())
    processor = CLIPImageProcessorPil.from_pretrained(safe_folder)
    ours = read_preprocessing(given, source="it")
    rng = np.random.default_rng(0)
    for shape in ((40, 40), (41, 70), (70, 41), (90, 33), (20, 20)):  # margins that are odd, images that are enlarged
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        expected = torch.as_tensor(processor([Image.fromarray(image)], return_tensors="pt")["pixel_values"])
        pixels = prepare_images([image], ours)
        found = (pixels - torch.tensor(ours.mean).view(3, 1, 1)) / torch.tensor(ours.std).view(3, 1, 1)
        assert pixels.min() >= 0
        assert pixels.max() <= 1
        torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["as published", "do_normalize", "do_rescale", "rescale_factor", "one mean", "squash"])
def test_features_are_those_of_transformers_whatever_the_settings(safe_folder, images, texts, name):
    changed(safe_folder, "preprocessor_config.json", **PROCESSOR_SETTINGS[name])
    assert_parity(load_plip(safe_folder), safe_folder, images, texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize=False is not supported; supported is True"),
        ({"resample": 0}, "resample=0 is not supported; supported is 2 or 3"),
        ({"do_pad": True}, "do_pad=True is not supported; supported is False"),
        ({"crop_pct": 0.9}, "the setting crop_pct=0.9 is not supported; supported are size, crop_size, "),
        (
            {"image_processor_type": "ViTImageProcessor"},
            "image_processor_type='ViTImageProcessor' is not supported",
        ),
        ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "the setting auto_map="),
        ({"do_center_crop": False}, "unsupported preprocessing: size {'shortest_edge': 32}, .*do_center_crop=False"),
        ({"size": {"height": 32, "width": 30}}, "unsupported preprocessing: size {'height': 32, 'width': 30}"),
        ({"size": {"shortest_edge": 32, "longest_edge": 40}}, "unsupported preprocessing: size .*longest_edge"),
        ({"size": {"height": 40, "width": 40}}, "unsupported preprocessing: .*crop_size {'height': 32, 'width': 32}"),
        ({"crop_size": {"height": 16, "width": 16}}, "unsupported preprocessing: size .*crop_size {'height': 16"),
        ({"rescale_factor": 0.0}, "unsupported preprocessing: .*rescale_factor=0.0"),
        ({"image_std": [0.0, 1.0, 1.0]}, "mean and std need 3 values each, std above 0"),
        ({"image_mean": [0.5]}, "mean and std need 3 values each"),
        (
            {"size": 16, "crop_size": 16},
            "preprocessor_config.json makes images of 16 px, but the image tower .* reads 32 px",
        ),
    ],
)
def test_settings_of_the_image_processor_that_cannot_be_followed_are_refused(safe_folder, settings, message):
    changed(safe_folder, "preprocessor_config.json", **settings)
    id = f"local-dir:{safe_folder}"
    for refused in (lambda: load_model(id, device="cpu"), lambda: check_kind(find_model(id))):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "tokenizer_config.json",
            {"padding_side": "left"},
            "tokenizer_config.json: padding_side='left' is not supported",
        ),
        ("config.json", {"text_config__eos_token_id": 5}, "eos_token_id=5 of text_config, .* never writes; .* 513"),
        (
            "config.json",
            {"vision_config__num_channels": 1},
            "config.json: num_channels=1 is not supported; supported is 3",
        ),
        ("config.json", {"vision_config__image_size": 40}, "makes images of 32 px, but the image tower .* reads 40 px"),
    ],
)
def test_settings_of_the_towers_that_would_be_passed_over_are_refused(safe_folder, name, settings, message):
    changed(safe_folder, name, **settings)
    id = f"local-dir:{safe_folder}"
    for refused in (lambda: load_model(id, device="cpu"), lambda: check_kind(find_model(id))):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize("settings", [{"text_config__hidden_act": "gelu"}, {"vision_config__layer_norm_eps": 0.1}])
def test_settings_of_the_towers_are_those_of_transformers(safe_folder, images, texts, settings):
    before = load_plip(safe_folder)
    encoder = load_plip(changed(safe_folder, "config.json", **settings))
    assert_parity(encoder, safe_folder, images, texts)
    difference = encoder.encode_image(encoder.prepare(images)) - before.encode_image(before.prepare(images))
    words = encoder.encode_text(texts) - before.encode_text(texts)
    assert max(difference.abs().max(), words.abs().max()) > 1e-4


def test_a_tokenizer_may_allow_fewer_tokens_than_the_tower(safe_folder):
    encoder = load_plip(changed(safe_folder, "tokenizer_config.json", model_max_length=10))
    assert encoder.context_length == 10
    with pytest.raises(ValueError, match="has 11 tokens .* reads at most 10"):
        encoder.encode_text(["a " * 9])


def test_settings_of_images_may_lie_among_those_of_a_processor(safe_folder, images, texts):
    settings = json.loads((safe_folder / "preprocessor_config.json").read_text())
    (safe_folder / "preprocessor_config.json").unlink()
    nested = {"processor_class": "CLIPProcessor", "image_processor": settings | {"do_normalize": False}}
    (safe_folder / "processor_config.json").write_text(json.dumps(nested))
    assert_parity(load_plip(safe_folder), safe_folder, images, texts)


def test_an_adapter_of_peft_says_how_it_becomes_a_model(safe_folder, tmp_path, images, monkeypatch):
    # Settings that our own adapters do not have: another scale, magnitudes, ranks by layer, a trained projection.
    config = LoraConfig(
        r=4, lora_alpha=16, use_rslora=True, use_dora=True, rank_pattern={"layers.0.self_attn.q_proj": 2},
        target_modules=["q_proj", "v_proj"], layers_to_transform=[0], modules_to_save=["visual_projection"],
    )  # fmt: skip
    tuned = get_peft_model(CLIPModel.from_pretrained(safe_folder), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    tuned.save_pretrained(tmp_path / "tuned")
    id = f"local-dir:{tmp_path / 'tuned'}"
    for refused in (
        lambda: load_model(id, device="cpu"),
        lambda: check_kind(find_model(id)),
        lambda: load_model(f"local-dir:{safe_folder}", device="cpu", adapter=tmp_path / "tuned"),
    ):
        with pytest.raises(
            (ValueError, FileNotFoundError), match="an adapter that peft wrote .LORA, trained on"
        ) as caught:
            refused()
    monkeypatch.chdir(tmp_path)
    code = [line.strip() for line in str(caught.value).splitlines() if line.startswith("    ")]
    exec("\n".join(code), {})
    for name in ("preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(safe_folder / name, tmp_path / "merged")
    encoder = load_model("local-dir:merged", device="cpu")
    pixels = encoder.prepare(images)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (encoder.preprocessing.mean, encoder.preprocessing.std)
    )
    with torch.no_grad():
        expected = tuned.eval().get_image_features(pixel_values=(pixels - mean) / std).pooler_output
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(encoder.encode_image(pixels), expected, atol=1e-5, rtol=0)
    assert (load_plip(safe_folder).encode_image(pixels) - expected).abs().max() > 1e-3


def test_prompts_can_be_learned(plip_folder, check_prompts):
    check_prompts(load_plip(plip_folder))


# any CLIP: from the hub, or from a folder

HUB_ID = "hf:someone/their-clip"


@pytest.fixture
def in_hub(plip_folders, hub_cache):
    """Snapshot of a CLIP in the hub cache."""
    return Path(shutil.copytree(plip_folders(END_OF_TEXT, True), hub_cache("someone/their-clip"), dirs_exist_ok=True))


def test_any_clip_loads_from_the_hub_cache(in_hub, tmp_path, images, texts):
    assert available_offline(find_model(HUB_ID), weights_dir=tmp_path)
    check_kind(find_model(HUB_ID))
    encoder = load_model(HUB_ID, device="cpu", weights_dir=tmp_path, offline=True)
    assert_parity(encoder, in_hub, images, texts)
    assert (encoder.id, encoder.provenance["source"]) == (HUB_ID, HUB_ID)
    weights = in_hub / "model.safetensors"
    assert encoder.provenance["files"][weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_any_clip_loads_from_a_folder(plip_folder, tmp_path, images, texts):
    id = f"local-dir:{plip_folder}"
    assert available_offline(find_model(id), weights_dir=tmp_path)
    check_kind(find_model(id))
    encoder = load_model(id, device="cpu")
    assert_parity(encoder, plip_folder, images, texts)
    assert encoder.id == id


def test_a_repository_in_open_clips_format_only_is_loaded_by_open_clip(builders, hub_cache, tmp_path, images):
    snapshot = hub_cache("someone/their-clip")
    builders.write_weights(snapshot, builders.tiny_configuration(49408, context_length=77))
    expected = load_model(f"local-dir:{snapshot}", device="cpu")
    for configuration in (None, {"model_type": "bert"}):  # beside it may lie that of a text tower
        if configuration:
            (snapshot / "config.json").write_text(json.dumps(configuration))
        check_kind(find_model(HUB_ID))
        assert available_offline(find_model(HUB_ID), weights_dir=tmp_path)
        encoder = load_model(HUB_ID, device="cpu", weights_dir=tmp_path, offline=True)
        assert torch.equal(*(model.encode_image(model.prepare(images)) for model in (encoder, expected)))


@pytest.mark.parametrize(
    ("model_type", "advice"),
    [
        ("siglip2", "It reads patches of images of any shape .* google/siglip2-base-patch16-224"),
        ("xclip", "It reads videos"),
        ("flava", "Supported are the classes of transformers with get_image_features .* register_model"),
        ("vit", "Supported are the classes of transformers with get_image_features .* register_model"),
        (None, "Supported are the classes of transformers with get_image_features .* register_model"),
        ("llava_next", r"It writes text: load it with load_vlm\('{id}'\)"),
    ],
)
@pytest.mark.parametrize("where", ["hub", "folder"])
def test_another_model_is_refused_by_its_type(in_hub, tmp_path, model_type, advice, where):
    configuration = json.loads((in_hub / "config.json").read_text())
    (in_hub / "config.json").write_text(json.dumps(configuration | {"model_type": model_type}))
    id = HUB_ID if where == "hub" else f"local-dir:{in_hub}"
    message = f"'{id}' is no CLIP: its config.json has model_type {model_type!r}. {advice.format(id=id)}"
    with pytest.raises(ValueError, match=message):
        load_model(id, device="cpu", weights_dir=tmp_path, offline=True)
    with pytest.raises(ValueError, match=message):  # known before a weight is read
        check_kind(find_model(id))


def test_a_model_that_is_not_here_names_the_command_that_fetches_it(hub_cache, tmp_path):
    hub_cache("nothing/here")
    check_kind(find_model(HUB_ID))  # nothing is known about it
    assert not available_offline(find_model(HUB_ID), weights_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="offline, so no download was tried") as caught:
        load_model(HUB_ID, device="cpu", weights_dir=tmp_path, offline=True)
    assert "Run `hf download someone/their-clip` where there is a network" in str(caught.value)


def test_a_configuration_without_weights_is_not_available(in_hub, tmp_path):
    (in_hub / "model.safetensors").unlink()
    assert not available_offline(find_model(HUB_ID), weights_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download someone/their-clip"):
        load_model(HUB_ID, device="cpu", weights_dir=tmp_path, offline=True)


def test_an_incomplete_folder_says_what_it_must_hold(safe_folder):
    (safe_folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"the folder must hold config.json, model.safetensors, preprocessor"):
        load_model(f"local-dir:{safe_folder}", device="cpu")


def test_a_clip_is_pointed_out_to_whoever_wants_it_to_write(in_hub, demo_folder, tmp_path):
    for folder in (in_hub, demo_folder):
        with pytest.raises(ValueError, match=r"'it' is a CLIP and writes no text: load it with load_model\('it'\)"):
            check_writes_text(folder, id="it")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    check_writes_text(tmp_path, id="it")


def test_a_damaged_configuration_is_refused(in_hub):
    (in_hub / "config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"config\.json is not a model's configuration: Expecting property name.* Fetch it"
    ):
        load_model(HUB_ID, device="cpu", offline=True)
