"""Train demo-vlm: a tiny LLaVA that answers questions about synthetic phantoms, in transformers' own format.

Everything is synthetic: the "pretrain" split of both acquisition sites, and answers written for it in
medrobust_lib/data/questions.json. No train, val or test image is seen. A first stage teaches the image tower the
classes; in a second one the projector and the language model learn to answer three questions in many wordings, first
with the tower frozen and at last with everything in motion. Some of the images carry mild Gaussian noise, so that
answers fade with noise instead of collapsing at once. About half an hour on two CPU cores that do nothing else. Not
for clinical use.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import medrobust_lib  # noqa: F401 - installs the torchvision guard before transformers needs it

# isort: split
import numpy as np
import pandas as pd
import torch
import typer
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from medrobust_lib.data.questions import PHANTOM_TASKS, action_token, actions, answer_wordings, question_wordings
from medrobust_lib.experiments import write_text_atomically
from medrobust_lib.files import reported_errors
from medrobust_lib.models.catalogue import DEMO_VLM
from medrobust_lib.models.weights import DEMO_FOLDER
from medrobust_lib.phantoms import SPLITS, phantom_classes
from preparing.downloads import record_sums
from preparing.pretraining import render_many, shifted

MODALITIES = ("histology", "blood", "chest", "oct")
SITES = ("A", "B")
IMAGE_SIZE, PATCH_SIZE = 64, 8
MEAN, STD = 0.5, 0.25
START, END, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the weights; written beside them."""

    images_per_site: int = SPLITS["pretrain"] // 2
    weights_of_modalities: tuple[int, ...] = (2, 2, 3, 3)
    batch_size: int = 64
    tower_steps: int = 3000
    tower_learning_rate: float = 1e-3
    frozen_steps: int = 900
    joint_steps: int = 700
    language_learning_rate: float = 2e-3
    joint_learning_rate: float = 3e-4
    weight_decay: float = 0.05
    shift_pixels: int = 3
    noise_share: float = 0.5
    largest_sigma: float = 0.4
    seed: int = 0


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")] = DEMO_FOLDER / DEMO_VLM,
    images: Annotated[int, typer.Option(min=60, help="Images per modality and site.")] = Recipe.images_per_site,
    tower_steps: Annotated[int, typer.Option(min=1, help="Steps of the image tower.")] = Recipe.tower_steps,
    frozen_steps: Annotated[int, typer.Option(min=1, help="Steps with a frozen tower.")] = Recipe.frozen_steps,
    joint_steps: Annotated[int, typer.Option(min=1, help="Steps of the whole model.")] = Recipe.joint_steps,
    seed: Annotated[int, typer.Option(help="Seed of weights, order, wordings and augmentation.")] = Recipe.seed,
) -> None:
    """Render phantoms, train the image tower, then the language model on top of it, and write both."""
    recipe = Recipe(
        images_per_site=images,
        tower_steps=tower_steps,
        frozen_steps=frozen_steps,
        joint_steps=joint_steps,
        seed=seed,
    )
    started = time.monotonic()
    torch.manual_seed(seed)  # weights are initialised inside transformers, from torch's own stream
    parts = [
        render_many(MODALITIES, split="pretrain", site=site, count=images, image_size=IMAGE_SIZE) for site in SITES
    ]
    pixels, labels = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    processor = make_processor()
    model = make_model(processor.tokenizer)
    stream = Batches(pixels, labels, recipe)
    log = [
        train_tower(model, stream, recipe),
        train_answers(model, processor, stream, recipe, steps=frozen_steps, frozen=True),
        train_answers(model, processor, stream, recipe, steps=joint_steps, frozen=False),
    ]
    seconds = time.monotonic() - started
    save(out, model, processor, pd.concat(log), recipe, seconds)
    typer.echo(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {seconds / 60:.1f} minutes")


def class_names() -> list[tuple[str, str]]:
    """(modality, class) of every label, in the order of `render_many`."""
    return [(modality, name) for modality in MODALITIES for name in phantom_classes(modality)]


def every_text() -> list[str]:
    """Every question and answer, for the tokenizer."""
    questions = [text for task in PHANTOM_TASKS for text in question_wordings(task)]
    answers = [text for place in class_names() for task in PHANTOM_TASKS for text in answer_wordings(*place, task)]
    return list(dict.fromkeys([*questions, *answers, "USER: ASSISTANT:"]))


def make_processor() -> LlavaProcessor:
    """Train a small byte-level vocabulary, and join it with CLIP's image processor and a chat template."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(every_text(), trainer)
    # One token each, and no special ones: they are answers, which a decoder must not leave out.
    tokenizer.add_tokens([AddedToken(action_token(action), normalized=False) for action in actions()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, tokenizer.token_to_id(START))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=256,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=wrapped,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Build the network with random weights."""
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


class Batches:
    """An endless stream of augmented, partly noisy batches in which hard modalities come more often."""

    def __init__(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64], recipe: Recipe) -> None:
        self.pixels, self.labels, self.recipe = pixels, labels, recipe
        self.rng = np.random.default_rng(recipe.seed)
        self.noise = torch.Generator().manual_seed(recipe.seed)
        modality = np.array([MODALITIES.index(name) for name, _ in class_names()])[labels]
        self.pool = np.repeat(np.arange(len(labels)), np.array(recipe.weights_of_modalities)[modality])
        self.order, self.place = self.rng.permutation(self.pool), 0

    def draw(self) -> tuple[Tensor, NDArray[np.int64]]:
        """Normalised pixels float32 [b, 3, H, W] and labels [b]."""
        size = self.recipe.batch_size
        if self.place + size > len(self.order):
            self.order, self.place = self.rng.permutation(self.pool), 0
        chosen = self.order[self.place : self.place + size]
        self.place += size
        images = shifted(self.pixels[chosen], self.recipe.shift_pixels, self.rng)
        mirrored = self.rng.random(len(images)) < 0.5
        images[mirrored] = images[mirrored, :, ::-1]
        sigmas = self.rng.uniform(0, self.recipe.largest_sigma, len(images))
        sigmas *= self.rng.random(len(images)) < self.recipe.noise_share
        clean = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        noisy = clean + torch.randn(clean.shape, generator=self.noise) * torch.from_numpy(sigmas).float().view(
            -1, 1, 1, 1
        )
        return (noisy - MEAN) / STD, self.labels[chosen]


def train_tower(model: LlavaForConditionalGeneration, stream: Batches, recipe: Recipe) -> pd.DataFrame:
    """Teach the image tower the classes through a linear head that is thrown away afterwards."""
    tower = model.model.vision_tower
    head = nn.Linear(tower.config.hidden_size, len(class_names()))
    tower.train()
    optimizer, schedule = optimise(
        [(nn.ModuleList([tower, head]), recipe.tower_learning_rate)], recipe, recipe.tower_steps
    )

    def loss() -> Tensor:
        pixels, labels = stream.draw()
        states = tower(pixels).last_hidden_state[:, 1:].mean(dim=1)
        return functional.cross_entropy(head(states), torch.from_numpy(labels), label_smoothing=0.05)

    return descend(loss, optimizer, schedule, steps=recipe.tower_steps, stage="tower")


def train_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    stream: Batches,
    recipe: Recipe,
    *,
    steps: int,
    frozen: bool,
) -> pd.DataFrame:
    """Teach the language model to answer; one question in one wording to each image of a batch."""
    tower = model.model.vision_tower.requires_grad_(not frozen)
    model.train()
    language = nn.ModuleList([model.model.multi_modal_projector, model.model.language_model])
    if frozen:
        groups = [(language, recipe.language_learning_rate)]
    else:
        groups = [(language, recipe.joint_learning_rate), (tower, recipe.joint_learning_rate)]
    optimizer, schedule = optimise(groups, recipe, steps)
    conversations = tokenized_conversations(processor)
    pad, image = processor.tokenizer.pad_token_id, processor.tokenizer.convert_tokens_to_ids(IMAGE)

    def loss() -> Tensor:
        pixels, labels = stream.draw()
        rows = [draw_conversation(conversations[label], stream.rng) for label in labels]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids, _ in rows])
        answered = torch.arange(length)[None] >= length - torch.tensor([n for _, n in rows])[:, None]
        targets = torch.where(answered & (ids != image), ids, _IGNORED_LABEL)
        return model(input_ids=ids, attention_mask=(ids != pad).long(), pixel_values=pixels, labels=targets).loss

    return descend(loss, optimizer, schedule, steps=steps, stage="language" if frozen else "joint")


def tokenized_conversations(processor: LlavaProcessor) -> list[dict[str, tuple[list, list]]]:
    """Token ids of every question and every right answer, by class and task."""
    tokenizer, places = processor.tokenizer, IMAGE * (IMAGE_SIZE // PATCH_SIZE) ** 2
    asked = {
        task: [
            tokenizer(
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                    add_generation_prompt=True,
                ).replace(IMAGE, places)
            )["input_ids"]
            for text in question_wordings(task)
        ]
        for task in PHANTOM_TASKS
    }
    return [
        {
            task: (
                asked[task],
                [
                    tokenizer(f" {text}{END}", add_special_tokens=False)["input_ids"]
                    for text in answer_wordings(*place, task)
                ],
            )
            for task in PHANTOM_TASKS
        }
        for place in class_names()
    ]


def draw_conversation(by_task: dict[str, tuple[list, list]], rng: np.random.Generator) -> tuple[list[int], int]:
    """Token ids of one question with one of its right answers, and the number of tokens of the answer."""
    questions, answers = by_task[PHANTOM_TASKS[rng.integers(len(PHANTOM_TASKS))]]
    # The canonical wording is asked in half of the cases.
    question = questions[0 if rng.random() < 0.5 else rng.integers(len(questions))]
    answer = answers[rng.integers(len(answers))]
    return question + answer, len(answer)


def optimise(
    groups: list[tuple[nn.Module, float]], recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with one cycle of the learning rate; vectors (biases, gains) are not decayed."""
    parameters, rates = [], []
    for module, rate in groups:
        for decayed in (True, False):
            parameters.append(
                {
                    "params": [p for p in module.parameters() if (p.ndim >= 2) == decayed],
                    "weight_decay": recipe.weight_decay if decayed else 0.0,
                }
            )
            rates.append(rate)
    optimizer = torch.optim.AdamW(parameters, lr=rates[0], betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rates, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    return optimizer, schedule


def descend(
    loss_of_batch: Any,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    steps: int,
    stage: str,
) -> pd.DataFrame:
    """Take the steps; returns the mean loss of every hundred of them."""
    rows, losses, started = [], [], time.monotonic()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in tqdm(range(1, steps + 1), desc=stage):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            seconds = round(time.monotonic() - started, 1)
            rows.append({"stage": stage, "step": step, "loss": round(float(np.mean(losses)), 4), "seconds": seconds})
            typer.echo(json.dumps(rows[-1]))
            losses = []
    return pd.DataFrame(rows)


def save(
    out: Path,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    log: pd.DataFrame,
    recipe: Recipe,
    seconds: float,
) -> None:
    """Write weights, in half precision, configuration, processor, log and recipe."""
    out.mkdir(parents=True, exist_ok=True)
    model.requires_grad_(True).eval().half().save_pretrained(out)
    processor.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only; a package is read by anyone
    write_text_atomically(out / "training_log.csv", log.to_csv(index=False))
    facts = {
        **asdict(recipe),
        "modalities": MODALITIES,
        "sites": SITES,
        "minutes": round(seconds / 60, 1),
        "threads": torch.get_num_threads(),
    }
    write_text_atomically(out / "recipe.json", json.dumps(facts, indent=2) + "\n")
    not_loaded = {"recipe.json", "training_log.csv", "MODEL_CARD.md", "SHA256SUMS"}
    record_sums(out, sorted(path.name for path in out.iterdir() if path.name not in not_loaded))


if __name__ == "__main__":
    with reported_errors():
        typer.run(main)
