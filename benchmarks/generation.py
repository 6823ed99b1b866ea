"""Answers to noisy copies: what batches, shared answers and sequential sampling save, and how fast a large layout is.

    python benchmarks/generation.py               # demo-vlm, about a minute on two cores
    python benchmarks/generation.py llava         # LLaVA-1.6 on Mistral-7B with random weights; wants an accelerator
    python benchmarks/generation.py llava --layers 2 --width 64 --draws 4   # the same code on a CPU, tiny

Random weights write nonsense as fast as trained ones write sense: every answer is made exactly as long as asked for.
The published times for LLaVA-1.6-7B are 2.8 s for 100 and 38 s for 1,000 draws (Seferis et al. 2025, arXiv:2509.16088).
"""

import time
from collections.abc import Callable
from typing import Annotated

import medrobust_lib as mr  # first: it lets torchvision import beside a CPU-only torch

# isort: split
import pandas as pd
import torch
import typer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from medrobust_lib.generative.answers import AnswerBank, Drawing
from medrobust_lib.generative.certify import certify_answers
from medrobust_lib.generative.oracles import ExactMatch, SameLabel, safety_oracle
from medrobust_lib.models.loading import resolve_device, resolve_dtype
from medrobust_lib.models.vision_language import VisionLanguageModel

GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
VOCABULARY = 32_064
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", help=__doc__)


@app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    draws: Annotated[int, typer.Option(min=10, help="Noisy copies.")] = 256,
) -> None:
    """demo-vlm: batches of several sizes, four oracles on shared answers, and sequential sampling."""
    if context.invoked_subcommand:
        return
    vlm = mr.load_vlm("demo-vlm", device="cpu")
    asked = mr.load_questions("phantom/blood", n=8)
    image = vlm.prepare(asked.images[:1])[0]

    def bank(size: int) -> AnswerBank:
        return AnswerBank(vlm, image, asked.questions[0], Drawing(sigma=0.25, max_new_tokens=24), batch_size=size)

    bank(8).answers("select", 0, 8)  # the first call of a network is slow
    seconds = {size: timed(lambda size=size: bank(size).answers("estimate", 0, draws)) for size in (1, 16, 64, 128)}
    rows = [{"batch": s, "ms a copy": 1e3 * t / draws, "of one by one": t / seconds[1]} for s, t in seconds.items()]
    typer.echo(f"demo-vlm on {torch.get_num_threads()} threads, {draws} copies\n{pd.DataFrame(rows).round(3)}\n")
    oracles = [safety_oracle(), SameLabel(safety_oracle()), ExactMatch(), safety_oracle()]
    rules = {"n0": 20, "n": draws}
    alone = timed(lambda: certify_answers(bank(128), oracles[0], **rules))
    shared = bank(128)
    together = timed(lambda: [certify_answers(shared, oracle, **rules) for oracle in oracles])
    typer.echo(f"four oracles on shared answers take {together / alone:.2f} times the time of one\n")
    for radius in (0.0, 0.1, 0.2):
        sequential = certify_answers(bank(128), oracles[0], n0=20, n=1000, sampling="sequential", radii=[radius])
        typer.echo(f"sequential sampling asks {sequential.composite.n} of at most 1000 draws for radius {radius:g}")


@app.command()
def llava(
    device: Annotated[str, typer.Option(help="auto, cpu or the name of an accelerator.")] = "auto",
    layers: Annotated[int, typer.Option(min=1, help="Of the language model; 32 is Mistral-7B.")] = 32,
    width: Annotated[int, typer.Option(min=32, help="Of the language model; 4096 is Mistral-7B.")] = 4096,
    tokens: Annotated[int, typer.Option(min=1, help="Length of every answer.")] = 64,
    draws: Annotated[list[int] | None, typer.Option(help="Noisy copies; default 100 and 1000.")] = None,
    batch: Annotated[int | None, typer.Option(help="Copies at a time; default from the free memory.")] = None,
) -> None:
    """LLaVA-1.6 on Mistral-7B, random weights: seconds for 100 and for 1,000 draws."""
    target = resolve_device(device)
    vlm = random_llava(target, layers=layers, width=width)
    # Without an end token no answer stops early.
    vlm.model.generation_config.eos_token_id = VOCABULARY - 1
    vlm.model.generation_config.min_new_tokens = tokens
    image = torch.rand(3, vlm.image_size, vlm.image_size, generator=torch.Generator().manual_seed(0)).to(target)
    how = Drawing(sigma=0.5, max_new_tokens=tokens)
    bank = AnswerBank(vlm, image, "what is in this image ?", how, batch_size=batch)
    bank.answers("select", 0, 2)
    name = torch.get_device_module(target).get_device_name() if target.type != "cpu" else "CPU"
    typer.echo(f"{sum(p.numel() for p in vlm.model.parameters()):,} parameters, {vlm.dtype}, {name}")
    for count in draws or (100, 1000):
        bank = AnswerBank(vlm, image, bank.prompt, how, batch_size=batch)
        seconds = timed(lambda bank=bank, count=count: bank.answers("estimate", 0, count))
        typer.echo(f"{count} draws of {tokens} tokens: {seconds:.1f} s, {count / seconds:.1f} answers a second")


def random_llava(device: torch.device, *, layers: int, width: int) -> VisionLanguageModel:
    """Build the published layout, its weights drawn on the device, with a vocabulary of numbered words."""
    names = ["<unk>", "<s>", "</s>", "<image>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    words = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(names[:4])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    side = 336
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=GRID
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}<image> {{ m['content'][1]['text'] }}{% endfor %}",
    )
    heads = max(1, width // 128)
    small = width < 1024
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64 if small else 1024,
            intermediate_size=256 if small else 4096,
            num_hidden_layers=3 if small else 24,
            num_attention_heads=4 if small else 16,
            image_size=side,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=round(3.5 * width),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            pad_token_id=2,
        ),
        image_grid_pinpoints=GRID,
        image_token_index=3,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=resolve_dtype("auto", device))
    return VisionLanguageModel(
        model.requires_grad_(False).eval(),
        processor,
        id="llava-1.6-mistral-7b, random weights",
        image_size=side,
        image_options={},
        provenance={},
    ).eval()


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work takes, with all of it done."""
    started = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    app()
