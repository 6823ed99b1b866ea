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
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
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
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
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
VICUNA = TURNS.replace("IMAGE", "USER: <image> ") + " ASSISTANT:"
MISTRAL = TURNS.replace("IMAGE", "[INST] <image>\n") + " [/INST]"


def word_tokenizer(*special: str, start: str | None, end: str, padding: str, **named: str) -> PreTrainedTokenizerFast:
    """Make a vocabulary of whole words; a start token, if there is one, is put in front of every text.

    ``named`` are special tokens that a processor asks its tokenizer for by a name.
    """
    names = dict.fromkeys(["<unk>", *([start] if start else []), end, padding, *special, *named.values(), *WORDS])
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([name for name in names if name not in WORDS])
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token=start,
        eos_token=end,
        pad_token=padding,
        **({"extra_special_tokens": named} if named else {}),
    )


def end_of_answer(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that ends an answer: Gemma's ends a turn, and is not its tokenizer's end of a text."""
    return "<end_of_turn>" if "<end_of_turn>" in tokenizer.get_vocab() else tokenizer.eos_token


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


def plain_llava(
    text_config: type[PreTrainedConfig] = LlamaConfig, template: str = VICUNA
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA, on Llama as demo-vlm: noise and network have the same size."""
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
        chat_template=template,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text_config(**text_settings(tokenizer)),
        image_seq_length=(SIZE // PATCH) ** 2,
        **image_settings(tokenizer),
    )
    return LlavaForConditionalGeneration(config), processor


def llava_med() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-Med 1.5, converted: a plain LLaVA on Mistral."""
    return plain_llava(MistralConfig, MISTRAL)


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
    return llava_next(MistralConfig, MISTRAL)


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


def qwen_parts(
    processor: type[ProcessorMixin], videos: type[ProcessorMixin], **images: object
) -> tuple[ProcessorMixin, dict]:
    """The processor of a Qwen-VL, and what its configuration says about tokens."""
    tokenizer = word_tokenizer(
        "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
        start=None, end="<|im_end|>", padding="<|endoftext|>",
    )  # fmt: skip
    images = {"patch_size": 4, "size": {"shortest_edge": 16**2, "longest_edge": 64**2}, **images}
    made = processor(
        Qwen2VLImageProcessor(**images),
        tokenizer,
        videos(**images),
        chat_template="{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        + PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    tokens = {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
    return made, {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2-VL: any resolution, no start token, tied embeddings."""
    processor, tokens = qwen_parts(Qwen2VLProcessor, Qwen2VLVideoProcessor)
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
        text_config=text_settings(processor.tokenizer, rope_parameters=ROPE, tie_word_embeddings=True),
        tie_word_embeddings=True,
        **tokens,
    )
    return Qwen2VLForConditionalGeneration(config), processor


def qwen25_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2.5-VL: most layers of its image tower attend within windows."""
    processor, tokens = qwen_parts(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=text_settings(processor.tokenizer, rope_parameters=ROPE, tie_word_embeddings=True),
        tie_word_embeddings=True,
        **tokens,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen3-VL: features of several layers of the image tower enter the decoder."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor, tokens = qwen_parts(Qwen3VLProcessor, Qwen3VLVideoProcessor, **half)
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    config = Qwen3VLConfig(
        vision_config={**vision, "patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        text_config=text_settings(processor.tokenizer, head_dim=8, rope_parameters={**ROPE, "mrope_interleaved": True}),
        tie_word_embeddings=False,
        **tokens,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Gemma 3, which MedGemma is: the template writes the start token, and an answer ends with its turn."""
    tokenizer = word_tokenizer(
        "<start_of_turn>", "<end_of_turn>", start="<bos>", end="<eos>", padding="<pad>",
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>",
    )  # fmt: skip
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer,
        image_seq_length=4,
        chat_template="{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
        + PARTS.replace("IMAGE", "<start_of_image>")
        + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Gemma3TextConfig(
            **text_settings(tokenizer, head_dim=8, layer_types=["sliding_attention", "full_attention"])
        ),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    network = Gemma3ForConditionalGeneration(config)
    network.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    return network, processor


def internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """InternVL 3 in transformers' own layout: tiles unless told otherwise, no start token."""
    tokenizer = word_tokenizer(
        "<|im_start|>", start=None, end="<|im_end|>", padding="<|endoftext|>",
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    size = {"size": {"height": SIZE, "width": SIZE}}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**size, crop_to_patches=True, min_patches=2, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(**size),
        image_seq_length=4,
        chat_template="{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        + PARTS.replace("IMAGE", "<IMG_CONTEXT>\n")
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    config = InternVLConfig(
        vision_config={**VISION, "attention_bias": True},
        text_config=Qwen2Config(**text_settings(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config), processor


# By the id under which the public checkpoint is loaded, or by a name for what the table does not have.
FAMILIES = {
    "llava": plain_llava,
    "llava-1.6-mistral-7b": llava_next_mistral,
    "llava-1.6-vicuna-7b": llava_next_vicuna,
    "smolvlm-256m": smolvlm,
    "smolvlm2-500m": smolvlm2,
    "qwen2-vl-2b": qwen2_vl,
    "qwen2.5-vl-3b": qwen25_vl,
    "qwen3-vl-4b": qwen3_vl,
    "medgemma-4b": gemma3,
    "llava-med-1.5": llava_med,
    "internvl3-2b": internvl,
}
IN_TABLE = tuple(name for name in FAMILIES if name != "llava")


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
            silent = set(tokenizer.all_special_ids) - {tokenizer.convert_tokens_to_ids(end_of_answer(tokenizer))}
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
    if config["model_type"] in ("llava", "llava_next", "gemma3"):
        split_weights(folder)
    if config["model_type"] in ("qwen2_vl", "qwen2_5_vl"):
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
    """Name the tensors of the image tower as checkpoints of LLaVA and of Gemma 3 do, in two files with an index."""
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
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], torch.full_like(row, fill)], dim=1)
    images = {name: inputs[name] for name in inputs if "pixel" in name or "image" in name}
    with torch.no_grad():
        return network(**longer, **images).logits[0]
