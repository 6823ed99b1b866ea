"""Tiny generative models with random weights in the file layouts of the public ones."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

from medrobust_lib.models.vision_language import VisionLanguageModel, load_vlm

SIZE, PATCH = 32, 8
PROMPT, ANSWER = "what is in this image ?", "grey lung"
WORDS = (
    *("what", "is", "in", "this", "image", "?", "a", "an", "the", "lung", "cell", "retina", "opacity", "drusen"),
    *("healthy", "grey", "dark", "bright", "small", "large", "no", "yes", "user", "assistant", "User", "Assistant"),
    *("USER", "ASSISTANT", "INST", ":", "[", "]", "[/"),
)
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**LAYERS, "num_hidden_layers": 3, "image_size": SIZE, "patch_size": PATCH}
PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
TURNS = "{% for message in messages %}" + PARTS + "{% endfor %}"


def word_tokenizer(*special: str, start: str | None, end: str, padding: str) -> PreTrainedTokenizerFast:
    """Make a vocabulary of whole words; a start token, if there is one, is put in front of every text."""
    names = dict.fromkeys(["<unk>", *([start] if start else []), end, padding, *special, *WORDS])
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([name for name in names if name not in WORDS])
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token=start, eos_token=end, pad_token=padding
    )


def text_settings(tokenizer: PreTrainedTokenizerFast, **more: object) -> dict:
    """Settings of a tiny decoder with grouped key and value heads."""
    return {
        **LAYERS,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def image_settings(tokenizer: PreTrainedTokenizerFast, token: str = "<image>") -> dict:
    """What every configuration of a LLaVA says about images."""
    return {"image_token_index": tokenizer.convert_tokens_to_ids(token), "vision_feature_layer": -2}


def plain_llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA on Llama, as demo-vlm: noise and network have the same size."""
    tokenizer = word_tokenizer("<image>", start="<s>", end="</s>", padding="<pad>")
    size = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25]
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TURNS.replace("IMAGE", "USER: <image> ") + " ASSISTANT:",
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_seq_length=(SIZE // PATCH) ** 2,
        **image_settings(tokenizer),
    )
    return LlavaForConditionalGeneration(config), processor


def llava_next(text_config: type[PreTrainedConfig], template: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-1.6: a view of the whole image and tiles of it."""
    tokenizer = word_tokenizer("<image>", start="<s>", end="</s>", padding="<pad>")
    grid = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_grid_pinpoints=grid
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text_config(**text_settings(tokenizer)),
        image_grid_pinpoints=grid,
        **image_settings(tokenizer),
    )
    return LlavaNextForConditionalGeneration(config), processor


def llava_next_mistral() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-1.6 on Mistral."""
    return llava_next(MistralConfig, TURNS.replace("IMAGE", "[INST] <image>\n") + " [/INST]")


def llava_next_vicuna() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-1.6 on Vicuna."""
    return llava_next(LlamaConfig, TURNS.replace("IMAGE", "USER: <image>\n") + " ASSISTANT:")


def tiles_and_tokenizer() -> tuple[dict, PreTrainedTokenizerFast, str]:
    """Image processor's settings, tokenizer and chat template that SmolVLM and SmolVLM2 share."""
    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(2) for column in range(2)]
    tokenizer = word_tokenizer(
        "<image>", "<fake_token_around_image>", "<global-img>", *places,
        start="<|im_start|>", end="<end_of_utterance>", padding="<|im_end|>",
    )  # fmt: skip
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # the template writes the start
    images = {"size": {"longest_edge": 2 * SIZE}, "max_image_size": {"longest_edge": SIZE}, "resample": 1}
    template = (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
        + PARTS.replace("IMAGE", "<image>")
        + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    return images, tokenizer, template


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """SmolVLM, whose public checkpoints are of the class Idefics3."""
    images, tokenizer, template = tiles_and_tokenizer()
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**images), tokenizer, image_seq_len=(SIZE // PATCH) ** 2 // 4, chat_template=template
    )
    config = Idefics3Config(
        vision_config=VISION,
        text_config={"model_type": "llama", **text_settings(processor.tokenizer)},
        scale_factor=2,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return Idefics3ForConditionalGeneration(config), processor


def smolvlm2() -> tuple[PreTrainedModel, ProcessorMixin]:
    """SmolVLM2, which also reads videos."""
    images, tokenizer, template = tiles_and_tokenizer()
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**images),
        tokenizer,
        SmolVLMVideoProcessor(**images),
        image_seq_len=(SIZE // PATCH) ** 2 // 4,
        chat_template=template,
    )
    config = SmolVLMConfig(
        vision_config=VISION,
        text_config={"model_type": "llama", **text_settings(tokenizer)},
        scale_factor=2,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return SmolVLMForConditionalGeneration(config), processor


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2-VL: any resolution, no start token, tied embeddings."""
    tokenizer = word_tokenizer(
        "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
        start=None, end="<|im_end|>", padding="<|endoftext|>",
    )  # fmt: skip
    images = {"patch_size": 4, "size": {"shortest_edge": 16**2, "longest_edge": 64**2}}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**images),
        tokenizer,
        Qwen2VLVideoProcessor(**images),
        chat_template="{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        + PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    tokens = ("vision_start", "vision_end", "image_pad", "video_pad")
    start, end, image, video = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in tokens)
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
        text_config=text_settings(
            tokenizer,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            tie_word_embeddings=True,
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config), processor


# By the id under which the public checkpoint is loaded, or by a name for what the table does not have.
FAMILIES = {
    "llava": plain_llava,
    "llava-1.6-mistral-7b": llava_next_mistral,
    "llava-1.6-vicuna-7b": llava_next_vicuna,
    "smolvlm-256m": smolvlm,
    "smolvlm2": smolvlm2,
    "qwen2-vl-2b": qwen2_vl,
}
IN_TABLE = tuple(name for name in FAMILIES if name not in ("llava", "smolvlm2"))


def load(name: str, weights: Path, **options: object) -> VisionLanguageModel:
    """Write a tiny model below a weights folder if it is not there, and load it as a user would."""
    folder = weights / name
    # SmolVLM2's processor insists on a package that it uses for the length of a video only.
    with patch.object(processing_smolvlm, "num2words", str):
        if not folder.exists():
            write(folder, FAMILIES[name])
            if name in IN_TABLE:
                as_published(folder)
        vlm_id = name if name in IN_TABLE else f"local-dir:{folder}"
        usual = {"weights_dir": weights, "offline": True, "device": "cpu", "image_size": SIZE}
        return load_vlm(vlm_id, **usual | options)


def write(folder: Path, build: Callable[[], tuple[PreTrainedModel, ProcessorMixin]], *, seed: int = 0) -> None:
    """Write a tiny model in transformers' present layout; weights so large that answers differ between images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=2 / parameter[0].numel() ** 0.5)
            # Words and the end alone are ever said, so that an answer's text tells its tokens.
            tokenizer = processor.tokenizer
            silent = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
            model.get_output_embeddings().weight[sorted(silent)] = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def as_published(folder: Path) -> None:
    """Turn a folder into the layout of the public checkpoints, which are older than the present one."""
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    processor = json.loads((folder / "processor_config.json").read_text())
    processor.pop("video_processor", None)
    images = processor.pop("image_processor") | {"processor_class": processor["processor_class"]}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "llava_next":
        split_weights(folder)
    if config["model_type"] == "qwen2_vl":
        (folder / "processor_config.json").unlink()
        size = images.pop("size")
        images |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        old = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        (folder / "config.json").write_text(json.dumps({**text, **config, **old}))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def split_weights(folder: Path) -> None:
    """Name the tensors of the image tower as LLaVA-1.6's checkpoints do, in two files with an index."""
    whole = folder / "model.safetensors"
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in load_file(whole).items()
    }
    whole.unlink()
    index = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        held = {name: tensor for name, tensor in tensors.items() if index[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VisionLanguageModel]:
    """Function giving a tiny model of a family, made once; tests do not change it."""
    weights = tmp_path_factory.mktemp("weights")
    return functools.cache(functools.partial(load, weights=weights))


@pytest.fixture(params=FAMILIES)
def vlm(request: pytest.FixtureRequest, models: Callable[[str], VisionLanguageModel]) -> VisionLanguageModel:
    """Every family."""
    return models(request.param)


@pytest.fixture
def llava(models: Callable[[str], VisionLanguageModel]) -> VisionLanguageModel:
    """The plain LLaVA."""
    return models("llava")


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    """Five noisy images, far out of [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 * torch.randn(5, 3, SIZE, SIZE, generator=generator)
    noisy = torch.rand(5, 3, SIZE, SIZE, generator=generator) + noise
    assert noisy.min() < -1 < 2 < noisy.max()
    return noisy


def read_by_network(model: VisionLanguageModel, images: Tensor) -> dict[str, Tensor]:
    """The tensors that the network is called with for `PROMPT`."""
    with patch.object(model.model, "generate", wraps=model.model.generate) as generate:
        model.generate(images, PROMPT, max_new_tokens=1)
    return {name: value for name, value in generate.call_args.kwargs.items() if isinstance(value, Tensor)}


def next_logits(network: PreTrainedModel, inputs: dict[str, Tensor], new: list[int]) -> Tensor:
    """Logits [L, vocabulary] of one question followed by the tokens ``new``, without a cache."""
    row = torch.tensor([new], dtype=torch.int64)
    longer = {"input_ids": torch.cat([inputs["input_ids"], row], dim=1)}
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], torch.full_like(row, fill)], dim=1)
    images = {name: inputs[name] for name in inputs if "pixel" in name or "image" in name}
    with torch.no_grad():
        return network(**longer, **images).logits[0]
