"""Tiny generative models with random weights in the file layouts of the public ones."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
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

SIZE, PATCH = 32, 8
WORDS = "what is in this image ? a an the lung cell retina opacity drusen healthy grey dark bright small large no yes"
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**LAYERS, "num_hidden_layers": 3, "image_size": SIZE, "patch_size": PATCH}
PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
TURNS = "{% for message in messages %}" + PARTS + "{% endfor %}"


def word_tokenizer(*special: str, start: str | None, end: str, padding: str | None) -> PreTrainedTokenizerFast:
    """Train a vocabulary of whole words; a start token, if there is one, is put in front of every text."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict.fromkeys(["<unk>", *filter(None, (start, end, padding)), *special])
    trainer = trainers.WordLevelTrainer(special_tokens=list(names), show_progress=False)
    tokenizer.train_from_iterator([WORDS, "user assistant User Assistant USER ASSISTANT INST : [ ] /"], trainer)
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


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
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
    # Llama's tokenizer has no padding token; the public checkpoint adds one.
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
    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
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


def write(
    folder: Path, build: Callable[[], tuple[PreTrainedModel, ProcessorMixin]], *, seed: int = 0
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a tiny model and write it; weights so large that answers differ between images."""
    model, processor = build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                spread = 2 / parameter[0].numel() ** 0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
