import functools
import importlib.util
import json
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.utils import logging

from medrobust_lib.files import file_sha256
from medrobust_lib.generative.certify import certify_generative
from medrobust_lib.generative.oracles import ExactMatch
from medrobust_lib.models import loading, vision_language
from medrobust_lib.models.loading import check_kind, find_model, list_vlms
from medrobust_lib.models.vision_language import load_vlm

spec = importlib.util.spec_from_file_location("tiny_vlms", Path(__file__).with_name("tiny_vlms.py"))
tiny_vlms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_vlms)

SIZE, PROMPT, ANSWER = tiny_vlms.SIZE, tiny_vlms.PROMPT, tiny_vlms.ANSWER
pixels = tiny_vlms.pixels
COMMIT = "89abcdef" * 5


@pytest.fixture
def folder(tmp_path):
    """A plain LLaVA, to be changed."""
    tiny_vlms.write(tmp_path / "a folder", tiny_vlms.plain_llava)
    return tmp_path / "a folder"


def load(folder, **options):
    return load_vlm(f"local-dir:{folder}", **{"device": "cpu", "image_size": SIZE} | options)


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})
    return tensors


def set_images(folder, **settings):
    """Change settings of the image processor."""
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"] |= settings
    path.write_text(json.dumps(content))


# Loading


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({}, 0),
        ({"do_normalize": False}, 0),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]}, 0),
        ({"do_resize": False}, 0),
        ({"do_center_crop": False}, 0),
        ({"do_convert_rgb": False}, 0),
        ({"size": {"shortest_edge": 48}}, 1),  # bytes are resized to whole levels
        ({"size": {"shortest_edge": 48}, "resample": 2}, 1),
        ({"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}, "resample": 2}, 1),
    ],
    ids=str,
)
def test_every_setting_of_the_image_processor_is_followed(folder, monkeypatch, settings, levels):
    set_images(folder, **settings)
    monkeypatch.setattr(vision_language, "_batch_caveats", lambda vlm: ())  # the tower does not take every size
    vlm = load(folder)
    image = np.random.default_rng(0).integers(60, 180, (SIZE, SIZE, 3), dtype=np.uint8)
    processor = AutoProcessor.from_pretrained(folder).image_processor
    expected = torch.as_tensor(processor([Image.fromarray(image)], return_tensors="pt")["pixel_values"]).float()
    found = vlm._inputs(vlm.prepare([image]), [vlm._chat(PROMPT)])["pixel_values"]
    spread = min(processor.image_std) if processor.do_normalize else 1.0
    torch.testing.assert_close(found, expected, atol=(1.2 * levels + 1e-3) / 255 / spread, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_rescale": False}, "do_rescale=False is not supported; supported is True"),
        ({"rescale_factor": 0.01}, "rescale_factor=0.01 is not supported; supported is 0.0039215"),
    ],
)
def test_another_scale_of_the_pixels_than_that_of_the_noise_is_refused(folder, settings, message):
    set_images(folder, **settings)
    with pytest.raises(ValueError, match=f"settings of the image processor: {message}"):
        load(folder)


def test_an_adapter_of_peft_is_no_model(folder, tmp_path):
    network = LlavaForConditionalGeneration.from_pretrained(folder)
    get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "tuned")
    id = f"local-dir:{tmp_path / 'tuned'}"
    for refused in (
        lambda: load(tmp_path / "tuned"),
        lambda: check_kind(find_model(id, generative=True), weights_dir=tmp_path),
    ):
        with pytest.raises(
            ValueError, match=r"an adapter that peft wrote (?s:.*)LlavaForConditionalGeneration\.from_pret"
        ):
            refused()


def test_a_folder_without_tokenizer_says_which_files_it_lacks(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    for refused in (
        lambda: load(folder),
        lambda: check_kind(find_model(f"local-dir:{folder}", generative=True), weights_dir=tmp_path),
    ):
        with pytest.raises(
            FileNotFoundError, match=r"no tokenizer in .*: it must hold tokenizer\.json, or vocab\.json and"
        ):
            refused()


@pytest.mark.parametrize("name", tiny_vlms.IN_TABLE)
def test_published_layouts_load_from_the_weights_folder(tmp_path, monkeypatch, pixels, name):
    monkeypatch.setattr(tiny_vlms.processing_smolvlm, "num2words", str)
    state = torch.random.get_rng_state()
    published = tiny_vlms.load(name, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert published.id == name
    assert published.image_size == SIZE
    assert published.dtype == torch.float32
    assert published.device == torch.device("cpu")
    assert not published.training
    assert not any(parameter.requires_grad for parameter in published.parameters())
    entry = find_model(name, generative=True)
    assert published.provenance["source"] == entry.source
    assert published.provenance["licence"] == entry.licence
    weights = sorted((tmp_path / name).glob("*.safetensors"))
    assert len(weights) == (2 if "llava" in name or name == "medgemma-4b" else 1)
    for path in weights:
        assert published.provenance["files"][path.name] == file_sha256(path)

    # The same model as transformers writes it today.
    tiny_vlms.write(tmp_path / "present", tiny_vlms.FAMILIES[name])
    present = load(tmp_path / "present")
    present.image_options = published.image_options  # the table's, beside the switches for tiles
    likely = published.log_likelihood(pixels, PROMPT, ANSWER)
    assert torch.allclose(present.log_likelihood(pixels, PROMPT, ANSWER), likely, atol=1e-3)
    assert likely.std() > 0.1
    assert present.generate(pixels, PROMPT, max_new_tokens=6) == published.generate(pixels, PROMPT, max_new_tokens=6)


def test_the_size_of_the_noise_is_the_tables_unless_asked_for(folder):
    assert {name: find_model(name, generative=True).image_size for name in tiny_vlms.IN_TABLE} == {
        "llava-1.6-mistral-7b": 336,
        "llava-1.6-vicuna-7b": 336,
        "smolvlm-256m": 512,
        "qwen2-vl-2b": 448,
        "qwen2.5-vl-3b": 448,
        "qwen3-vl-4b": 448,
        "medgemma-4b": 896,
        "llava-med-1.5": 336,
        "internvl3-2b": 448,
        "smolvlm2-500m": 512,
    }
    assert load(folder, image_size=None).image_size == SIZE, "that of the image tower of an own model"
    assert load(folder, image_size=48).prepare([Path(__file__).parents[2] / "docs" / "phantoms.png"]).shape[2:] == (
        48,
        48,
    )
    for size in (0, -8):
        with pytest.raises(ValueError, match=f"image_size={size} is no whole number of 1 or more pixels, nor None"):
            load(folder, image_size=size)


def test_a_model_loads_through_the_unchanged_hub_call(hub_cache, tmp_path, pixels):
    expected = tiny_vlms.load("qwen2-vl-2b", tmp_path / "weights").generate(pixels, PROMPT, max_new_tokens=6)
    snapshot = hub_cache("Qwen/Qwen2-VL-2B-Instruct")
    shutil.copytree(tmp_path / "weights" / "qwen2-vl-2b", snapshot, dirs_exist_ok=True)
    options = {"device": "cpu", "image_size": SIZE, "weights_dir": tmp_path / "nothing"}
    for vlm_id, revision in (
        ("qwen2-vl-2b", None),
        ("hf:Qwen/Qwen2-VL-2B-Instruct", None),
        ("qwen2-vl-2b", snapshot.name),
    ):
        loaded = load_vlm(vlm_id, revision=revision, **options)
        assert loaded.generate(pixels, PROMPT, max_new_tokens=6) == expected
        assert loaded.id == vlm_id
        assert loaded.provenance["revision"] == snapshot.name
        assert loaded.provenance["source"] == "hf:Qwen/Qwen2-VL-2B-Instruct"
        assert "model.safetensors" in loaded.provenance["files"]
    with pytest.raises(FileNotFoundError, match=r"'qwen2-vl-2b' are not here.*offline, so no download was tried"):
        load_vlm("qwen2-vl-2b", revision=COMMIT, **options)
    assert find_row("qwen2-vl-2b", tmp_path / "nothing")["available_offline"]


def test_a_pinned_commit_is_the_one_that_is_loaded(hub_cache, tmp_path, pixels):
    newest = hub_cache("somebody/llava")
    older = newest.parent / COMMIT
    for seed, snapshot in enumerate((newest, older)):
        tiny_vlms.write(snapshot, tiny_vlms.plain_llava, seed=seed)
    options = {"device": "cpu", "image_size": SIZE, "weights_dir": tmp_path / "nothing"}
    for revision, snapshot in ((None, newest), (COMMIT, older)):
        loaded = load_vlm("hf:somebody/llava", revision=revision, **options)
        expected = load(snapshot)
        assert loaded.generate(pixels, PROMPT, max_new_tokens=6) == expected.generate(pixels, PROMPT, max_new_tokens=6)
        assert loaded.provenance["revision"] == snapshot.name
        assert loaded.provenance["files"] == expected.provenance["files"]
    assert file_sha256(newest / "model.safetensors") != file_sha256(older / "model.safetensors")


@pytest.mark.parametrize(("name", "size"), [("internvl3-2b", SIZE), ("medgemma-4b", SIZE), ("qwen3-vl-4b", 448)])
def test_an_own_model_is_certified_at_the_size_of_its_tower_in_one_tile(tmp_path, name, size):
    tiny_vlms.write(tmp_path / "own", tiny_vlms.FAMILIES[name])
    own = load(tmp_path / "own", image_size=None)
    assert own.image_size == size
    tiles = {"internvl3-2b": {"crop_to_patches": False}, "medgemma-4b": {"do_pan_and_scan": False}}
    assert own.image_options == tiles.get(name, {})


def find_row(name, weights_dir):
    return list_vlms(weights_dir=weights_dir).set_index("id").loc[name]


def test_smolvlm2_says_which_package_it_needs(tmp_path):
    tiny_vlms.load("smolvlm2-500m", tmp_path)
    if importlib.util.find_spec("num2words") is None:
        with pytest.raises(ImportError, match="num2words"):
            load_vlm("smolvlm2-500m", device="cpu", image_size=SIZE, weights_dir=tmp_path)
    else:
        vlm = load_vlm("smolvlm2-500m", device="cpu", image_size=SIZE, weights_dir=tmp_path)
        assert vlm.image_size == SIZE


# Batches and types


def test_a_model_that_answers_alone_as_in_a_batch_has_no_caveat(folder):
    assert load(folder).caveats == ()
    for dtype in ("bfloat16", "float16"):
        (said,) = load(folder, dtype=dtype).caveats
        assert said.startswith(f"local-dir:{folder} in {dtype} may answer differently alone and in a batch: what is")


def test_a_model_that_answers_otherwise_in_a_batch_says_so_and_so_do_its_copies(folder, monkeypatch):
    forward = LlavaForConditionalGeneration.forward

    @functools.wraps(forward)
    def dependent(self, *arguments, **options):
        found = forward(self, *arguments, **options)
        if len(found.logits) > 1:
            found.logits = found.logits.flip(-1)
        return found

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", dependent)
    vlm = load(folder)
    (said,) = vlm.caveats
    assert said.startswith(f"local-dir:{folder} in float32 answers differently alone and in a batch")
    assert cloudpickle.loads(cloudpickle.dumps(vlm)).caveats == vlm.caveats
    image = vlm.prepare([np.zeros((SIZE, SIZE, 3), dtype=np.uint8)])[0]
    found = certify_generative(vlm, image, PROMPT, ExactMatch(), n0=2, n=20, max_new_tokens=1, batch_size=2)
    assert found.caveats == (said,)
    assert said in str(found)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_quantised_type_without_its_package_is_refused_with_the_command(folder, monkeypatch, dtype):
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    message = rf"dtype='{dtype}' needs more packages: pip install bitsandbytes; or choose dtype='bfloat16'"
    with pytest.raises(ImportError, match=message):
        load(folder, dtype=dtype)


def test_a_device_on_which_quantised_weights_do_not_compute_is_refused(folder, monkeypatch):
    package = SimpleNamespace(supported_torch_devices={"cuda", "xpu"})
    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    with pytest.raises(ValueError, match=r"bitsandbytes does not compute on 'cpu', only on cuda, xpu; choose such"):
        load(folder, dtype="nf4")


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("int8", {"load_in_8bit": True, "load_in_4bit": False}),
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}),
    ],
)
def test_a_quantised_type_is_asked_of_transformers_and_named(folder, monkeypatch, dtype, settings):
    """What transformers is asked for; the arithmetic is that of bitsandbytes, and the test below runs it."""
    asked = {}
    real = AutoModelForImageTextToText.from_pretrained

    def from_pretrained(place, *, quantization_config, device_map, **options):
        asked.update({name: getattr(quantization_config, name) for name in settings}, device=device_map)
        network, report = real(place, **options)
        network.config.quantization_config = quantization_config
        return network, report

    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(supported_torch_devices={"cpu"}))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    vlm = load(folder, dtype=dtype)
    assert asked == {**settings, "device": {"": torch.device("cpu")}}
    assert vlm.precision == f"{dtype} with bfloat16"
    assert vlm.dtype == torch.bfloat16
    assert f"in {dtype} with bfloat16 may answer differently" in vlm.caveats[0]
    image = vlm.prepare([np.zeros((SIZE, SIZE, 3), dtype=np.uint8)])[0]
    found = certify_generative(vlm, image, PROMPT, ExactMatch(), n0=2, n=20, max_new_tokens=1)
    assert found.composite.dtype == f"{dtype} with bfloat16"
    with pytest.raises(TypeError, match=f"in {dtype} with bfloat16 cannot be sent to another process: use jobs=1"):
        cloudpickle.dumps(vlm)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_quantised_weights_answer(tmp_path, monkeypatch, pixels, dtype):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setitem(tiny_vlms.LAYERS, "hidden_size", 64)  # quantised in blocks of 64 weights
    monkeypatch.setitem(tiny_vlms.LAYERS, "intermediate_size", 128)
    monkeypatch.setitem(tiny_vlms.VISION, "hidden_size", 64)
    monkeypatch.setitem(tiny_vlms.VISION, "intermediate_size", 128)
    tiny_vlms.write(tmp_path / "llava", tiny_vlms.plain_llava)
    vlm, plain = (load(tmp_path / "llava", dtype=kind) for kind in (dtype, "bfloat16"))
    assert vlm.precision == f"{dtype} with bfloat16"
    likely = vlm.log_likelihood(pixels, PROMPT, ANSWER)
    assert likely.isfinite().all()
    assert not torch.equal(likely, plain.log_likelihood(pixels, PROMPT, ANSWER))
    assert type(vlm.model.model.language_model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    answers = vlm.generate(pixels, PROMPT, max_new_tokens=4)
    assert vlm.generate(pixels, PROMPT, max_new_tokens=4) == answers


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_silent_for_the_load_only(folder, monkeypatch, shown):
    during, filters = [], list(warnings.filters)
    real = AutoModelForImageTextToText.from_pretrained

    def from_pretrained(*arguments, **options):
        during.append(logging.is_progress_bar_enabled())
        assert warnings.filters == filters, "what is set for the bars is not for the load"
        return real(*arguments, **options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    before = logging.is_progress_bar_enabled()
    try:
        for of_hub in (True, False):
            (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
            (enable_progress_bars if of_hub else disable_progress_bars)()
            load(folder)
            (folder / "chat_template.jinja").rename(folder / "away")
            with pytest.raises(ValueError, match="no chat template"):
                load(folder)
            (folder / "away").rename(folder / "chat_template.jinja")
            assert logging.is_progress_bar_enabled() == shown
            assert are_progress_bars_disabled() == (not of_hub)
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
    assert during == [False] * 4


# The table


def test_list_vlms_tells_what_is_here(tmp_path):
    tiny_vlms.load("llava-1.6-vicuna-7b", tmp_path)
    table = list_vlms(weights_dir=tmp_path)
    columns = ["id", "family", "image_size", "parameters", "licence", "source", "available_offline", "citation"]
    assert list(table.columns) == columns
    assert set(tiny_vlms.IN_TABLE) | {"demo-vlm", "smolvlm-500m"} == set(table["id"])
    assert table["id"].is_unique
    assert str(table["parameters"].dtype) == "Int64"
    here = table.set_index("id")["available_offline"].drop("demo-vlm")
    assert here[here].index.tolist() == ["llava-1.6-vicuna-7b"]
    assert (table.drop(columns=["parameters"]).astype(str) != "").all().all()


def test_a_model_whose_weights_are_not_there_is_not_available(hub_cache, tmp_path):
    snapshot = hub_cache("HuggingFaceTB/SmolVLM-500M-Instruct")
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "weights" / "smolvlm-500m").mkdir(parents=True)
    assert not find_row("smolvlm-500m", tmp_path / "weights")["available_offline"]
    (snapshot / "model.safetensors").touch()
    assert find_row("smolvlm-500m", tmp_path / "weights")["available_offline"]


def llava_next(text):
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = CLIPVisionConfig(**tower, image_size=336, patch_size=14, projection_dim=768)
    return LlavaNextForConditionalGeneration(LlavaNextConfig(vision_config=vision, text_config=text))


def idefics3(**text):
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = Idefics3Config(
        vision_config={**vision, "image_size": 512, "patch_size": 16},
        text_config={"model_type": "llama", "vocab_size": 49280, **text},
        scale_factor=4,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    return Idefics3ForConditionalGeneration(config)


def qwen2_vl():
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    more = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    config = Qwen2VLConfig(vision_config=vision, text_config={**text, **more}, tie_word_embeddings=True)
    return Qwen2VLForConditionalGeneration(config)


def qwen25_vl():
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    more = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={**text, **more}, tie_word_embeddings=True)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560}
    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    more = {"num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True}
    config = Qwen3VLConfig(vision_config=vision, text_config={**text, **more}, tie_word_embeddings=True)
    return Qwen3VLForConditionalGeneration(config)


def gemma3():
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    tower = SiglipVisionConfig(**vision, image_size=896, patch_size=14, vision_use_head=False)
    return Gemma3ForConditionalGeneration(Gemma3Config(vision_config=tower, text_config=Gemma3TextConfig(**text)))


SEVEN_BILLION = {"vocab_size": 32064, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
PUBLISHED_SIZES = {
    "llava-1.6-mistral-7b": lambda: llava_next(
        MistralConfig(**SEVEN_BILLION, intermediate_size=14336, num_key_value_heads=8)
    ),
    "llava-1.6-vicuna-7b": lambda: llava_next(LlamaConfig(**SEVEN_BILLION, intermediate_size=11008)),
    "smolvlm-256m": lambda: idefics3(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ),
    "smolvlm-500m": lambda: idefics3(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5
    ),
    "qwen2-vl-2b": qwen2_vl,
    "qwen2.5-vl-3b": qwen25_vl,
    "qwen3-vl-4b": qwen3_vl,
    "medgemma-4b": gemma3,
}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_numbers_of_parameters_are_those_of_the_published_configurations(name):
    with torch.device("meta"):
        network = PUBLISHED_SIZES[name]()
    assert sum(parameter.numel() for parameter in network.parameters()) == find_model(name, generative=True).parameters


# What is refused


def test_unknown_names_are_refused(folder):
    with pytest.raises(ValueError, match=r"unknown vision-language model 'smolvlm-265m'.*smolvlm-256m.*local-dir:PATH"):
        load_vlm("smolvlm-265m")
    types = (
        "'auto', 'float32', 'bfloat16', 'float16', not 'int4'; load_model also takes 'int8', load_vlm 'int8' and 'nf4'"
    )
    with pytest.raises(ValueError, match=f"dtype must be {types}"):
        load(folder, dtype="int4")
    with pytest.raises(ValueError, match="device 'abacus' cannot be used here"):
        load(folder, device="abacus")


@pytest.mark.parametrize("id", ["demo-clip", "plip"])
def test_a_dual_encoder_is_loaded_elsewhere(id):
    with pytest.raises(ValueError, match=rf"'{id}' is a dual encoder .* load it with load_model\('{id}'\)"):
        load_vlm(id)


@pytest.mark.parametrize("revision", [None, "main", "89abcdef", "Z" * 40, COMMIT.upper()])
def test_remote_code_needs_a_pinned_revision(folder, revision):
    with pytest.raises(ValueError, match=rf"pin it with revision=COMMIT \(40 hexadecimal digits, not {revision!r}\)"):
        load(folder, trust_remote_code=True, revision=revision)
    assert load(folder, trust_remote_code=True, revision=COMMIT).image_size == SIZE


def test_code_beside_the_weights_runs_only_when_trusted(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    strange = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (folder / "config.json").write_text(json.dumps(config | strange))
    ran = tmp_path / "ran"
    (folder / "strange.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass StrangeConfig: pass\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder)
    assert not ran.exists()
    with pytest.raises(Exception, match="Strange"):
        load(folder, trust_remote_code=True, revision=COMMIT)
    assert ran.exists()


@pytest.mark.parametrize("offline", [True, None])
def test_missing_weights_name_the_place_and_the_command(hub_cache, tmp_path, offline):
    hub_cache("nothing/here")
    with pytest.raises(FileNotFoundError, match="offline, so no download was tried") as caught:
        load_vlm("smolvlm-256m", device="cpu", weights_dir=tmp_path, offline=offline)
    message = str(caught.value)
    assert "python data_scripts/fetch_weights.py smolvlm-256m" in message
    assert "source: hf:HuggingFaceTB/SmolVLM-256M-Instruct" in message
    assert f"looked in {tmp_path / 'smolvlm-256m'} and the hub cache {tmp_path / 'hub'}" in message
    assert "\n" not in message


def test_a_missing_repository_of_the_hub_is_fetched_into_its_cache(hub_cache, tmp_path):
    hub_cache("nothing/here")
    with pytest.raises(FileNotFoundError, match="Run `hf download owner/name` where .*loads offline") as caught:
        load_vlm("hf:owner/name", device="cpu", weights_dir=tmp_path, offline=True)
    assert "fetch_weights" not in str(caught.value)


def test_a_failed_download_gives_its_reason(hub_cache, tmp_path, monkeypatch):
    hub_cache("nothing/here")

    def unreachable(*arguments, **options):
        assert not constants.HF_HUB_OFFLINE
        raise OSError("the hub cannot be reached\nand more")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match=r"\(the download failed\)\. Run .*Reason: the hub cannot be reached$"):
        load_vlm("smolvlm-256m", device="cpu", weights_dir=tmp_path, offline=False)
    assert constants.HF_HUB_OFFLINE


def test_incomplete_folders_say_what_is_missing(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere lacks config\.json and model weights; .*; the folder must hold config\.json"
    ):
        load(tmp_path / "nowhere")
    for name, error, message in (
        ("chat_template.jinja", ValueError, r"a folder has no chat template.*add chat_template\.jinja"),
        ("processor_config.json", FileNotFoundError, "a folder: the folder must hold.*Reason"),
        ("config.json", FileNotFoundError, r"a folder lacks config\.json; .*; the folder must hold config\.json"),
        (
            "model.safetensors",
            FileNotFoundError,
            r"a folder lacks model weights; .*; the folder must hold config\.json",
        ),
    ):
        (folder / name).rename(tmp_path / "away")
        with pytest.raises(error, match=message):
            load(folder)
        (tmp_path / "away").rename(folder / name)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"cannot make the processor of .*a folder; are its tokenizer's files complete\?"
    ):
        load(folder)


def test_sha256sums_in_the_folder_are_checked(folder):
    digest = file_sha256(folder / "model.safetensors")
    sums = folder / "SHA256SUMS"
    sums.write_text(f"{digest}  model.safetensors\n")
    assert load(folder).provenance["files"]["model.safetensors"] == digest
    sums.write_text(f"{'0' * 64}  model.safetensors\n")
    with pytest.raises(ValueError, match=rf"model.safetensors has SHA-256 {digest}, expected {'0' * 64}"):
        load(folder)
    sums.write_text(f"{digest}  model.safetensors\n{digest}  merges.txt\n")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt is missing although its SHA-256 is known"):
        load(folder)


def test_weights_that_do_not_fit_are_listed(folder):
    shorter = {"multi_modal_projector.linear_1.bias": torch.zeros(7)}
    whole = change_tensors(folder, lambda tensors: {**tensors, **shorter})
    with pytest.raises(
        ValueError, match=r"fit the model; 1 wrong shapes: model\.multi_modal_projector\.linear_1\.bias$"
    ):
        load(folder)

    def spoil(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
        return {**kept, "stranger.weight": torch.zeros(1)}

    change_tensors(folder, spoil)
    lost = sum(".mlp." in name for name in whole)
    with pytest.raises(ValueError, match=r"a folder does not fit the model") as caught:
        load(folder)
    message = str(caught.value)
    assert lost == 3 * 4 + 2 * 3
    assert f"{lost} missing keys: " in message
    assert f"and {lost - 10} more" in message
    assert "1 unexpected keys: stranger.weight" in message
    assert "1 wrong shapes: model.multi_modal_projector.linear_1.bias" in message


def test_damaged_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot read the weights of .*a folder, the file is damaged"):
        load(folder)
