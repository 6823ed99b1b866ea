"""Train demo-clip: a small CLIP on site-A phantoms and their captions, in open_clip's own format.

Everything is synthetic. The model sees the "pretrain" split of acquisition site A and nothing else:
no image of site B, no train, val or test image. A first stage has clean images only; in a second one
half of the images carry Gaussian noise, and their captions say so, as captions of photographs do.
Zero-shot prompts, which do not mention noise, therefore fail on noisy images although the image tower
still tells classes apart: there is something for a learned prompt to win, as there is in large models.
About 45 minutes on two CPU cores. Not for clinical use.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import medrobust_lib  # noqa: F401 - installs the torchvision guard before open_clip needs it

# isort: split
import numpy as np
import open_clip
import pandas as pd
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from medrobust_lib.data.wording import class_wording
from medrobust_lib.experiments import write_text_atomically
from medrobust_lib.files import reported_errors
from medrobust_lib.phantoms import MODALITIES, SPLITS, phantom_classes
from preparing.pretraining import render_many, shifted

FOLDER = Path(__file__).resolve().parent.parent / "medrobust_lib" / "models" / "demo" / "clip"
IMAGE_SIZE = 64
CONTEXT_LENGTH = 48
PAD, START, END = "<pad>", "<start>", "<end>"

# Wording around the class name, beside the templates of classes.json.
PHRASES = {
    "histology": (
        "{}", "{}, H&E stain", "a colon tissue tile with {}", "histology of the large bowel: {}",
        "this H&E image patch contains {}", "tissue type: {}", "a microscopic view of {} in the colon",
    ),
    "blood": (
        "{}", "a {} in a blood smear", "Wright-Giemsa stained {}", "the cell in the centre is a {}",
        "cell type: {}", "a microscope picture of a {} among red blood cells",
    ),
    "breast": (
        "{}", "{} breast mass", "breast ultrasound with a {} lesion", "an ultrasound of a {} breast tumour",
        "the mass looks {}", "sonography of the breast, {}",
    ),
    "chest": (
        "{}", "chest X-ray: {}", "a frontal chest radiograph showing {}", "the lungs show {}",
        "radiograph of a child's chest, {}", "finding: {}",
    ),
    "fundus": (
        "{}", "a {} fundus", "fundus photograph, {}", "a colour photograph of a {} retina",
        "the retina looks {}", "{} eye background",
    ),
    "oct": (
        "{}", "OCT scan: {}", "an optical coherence tomography image showing {}", "retinal layers with {}",
        "a cross-section of the retina, {}", "retinal OCT, finding {}",
    ),
}  # fmt: skip

# How a caption says that its image is noisy.
NOISY = ("a noisy image: {}", "{}, noisy", "grainy: {}", "noisy {}", "{} with strong noise")


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the weights; written into the model card."""

    images_per_modality: int = SPLITS["pretrain"]
    epochs: int = 12
    batch_size: int = 64
    captions_per_class: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    shift_pixels: int = 3
    noise_epochs: int = 4
    noise_learning_rate: float = 4e-4
    noise_share: float = 0.5
    noise_sigmas: tuple[float, float] = (0.05, 0.6)
    seed: int = 0


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")] = FOLDER,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pretrain split.")] = Recipe.epochs,
    images: Annotated[int, typer.Option(min=32, help="Images per modality.")] = Recipe.images_per_modality,
    noise_epochs: Annotated[int, typer.Option(min=0, help="Passes of the noisy stage.")] = Recipe.noise_epochs,
    seed: Annotated[int, typer.Option(help="Seed of weights, order, captions and augmentation.")] = Recipe.seed,
    first_stage: Annotated[
        Path | None, typer.Option(help="Folder of a finished first stage: only the noisy stage is trained.")
    ] = None,
) -> None:
    """Render site-A phantoms, train the two towers on image-caption pairs, write weights, log and card."""
    recipe = Recipe(images_per_modality=images, epochs=epochs, noise_epochs=noise_epochs, seed=seed)
    started = time.monotonic()
    torch.manual_seed(seed)  # weights are initialised inside open_clip, from torch's own stream
    captions = caption_table()
    tokenizer = train_tokenizer([text for texts in captions for text in texts])
    config = model_config(tokenizer)
    model = open_clip.CLIP(**config["model_cfg"])
    pixels, labels = render_many(tuple(MODALITIES), split="pretrain", site="A", count=images, image_size=IMAGE_SIZE)
    validation = render_many(tuple(MODALITIES), split="val", site="A", count=60, image_size=IMAGE_SIZE)
    preprocess = config["preprocess_cfg"]
    clean = tokenized(tokenizer, captions)
    if first_stage is None:
        logs = [train(model, pixels, labels, clean, validation, preprocess, recipe).assign(stage="clean")]
    else:
        model.load_state_dict(load_file(first_stage / "open_clip_model.safetensors"))
        logs = [pd.read_csv(first_stage / "training_log.csv").assign(stage="clean")]
    if noise_epochs:
        noisy = tokenized(tokenizer, noisy_captions(captions))
        log = train(model, pixels, labels, clean, validation, preprocess, recipe, noisy_tokens=noisy)
        logs.append(log.assign(stage="noisy"))
    log = pd.concat(logs)
    seconds = time.monotonic() - started + (0 if first_stage is None else float(logs[0]["seconds"].iloc[-1]))
    save(out, model, tokenizer, config, log, recipe, seconds)
    typer.echo(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {seconds / 60:.1f} minutes")


def caption_table() -> list[list[str]]:
    """Captions of every (modality, class) pair, in the order of `render_many`'s labels."""
    table = []
    for modality in MODALITIES:
        wordings = [class_wording(f"phantom/{modality}", wording=wording) for wording in ("paper", "clear")]
        for label in range(len(phantom_classes(modality))):
            texts = [
                template.format(wording.prompt_nouns[label])
                for wording in wordings
                for template in (*wording.templates, *PHRASES[modality])
            ]
            table.append(list(dict.fromkeys(texts)))
    return table


def noisy_captions(captions: list[list[str]]) -> list[list[str]]:
    """The same captions for noisy images, wordings in turn."""
    return [[NOISY[number % len(NOISY)].format(text) for number, text in enumerate(texts)] for texts in captions]


def tokenized(tokenizer: PreTrainedTokenizerFast, captions: list[list[str]]) -> list[torch.Tensor]:
    """Token ids, int64 [captions, context], of every class."""
    return [
        torch.tensor(tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH)["input_ids"])
        for texts in captions
    ]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a small byte-level vocabulary on the captions; any other text still has tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[PAD, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The end token must have the highest id: open_clip's text tower pools where the id is largest.
    tokenizer.add_special_tokens([END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_max_length=CONTEXT_LENGTH,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, dict]:
    """open_clip's configuration of demo-clip, as it is written to open_clip_config.json."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            # CLIP's residual network (the layout of RN50, one block a stage): at this size convolutions learn
            # small lesions from far fewer images than a vision transformer does.
            "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": len(tokenizer),
                "width": 128,
                "heads": 4,
                "layers": 2,
                "hf_tokenizer_name": "demo-clip",
            },
        },
        "preprocess_cfg": {
            "size": IMAGE_SIZE,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def train(
    model: torch.nn.Module,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    tokens: list[torch.Tensor],
    validation: tuple[NDArray[np.uint8], NDArray[np.int64]],
    preprocess: dict,
    recipe: Recipe,
    *,
    noisy_tokens: list[torch.Tensor] | None = None,
) -> pd.DataFrame:
    """Minimise the contrastive loss; returns one row per epoch.

    With `noisy_tokens` it is the second stage: a share of the images is noisy and matches these captions only.
    """
    epochs = recipe.epochs if noisy_tokens is None else recipe.noise_epochs
    learning_rate = recipe.learning_rate if noisy_tokens is None else recipe.noise_learning_rate
    every_caption = tokens + (noisy_tokens or [])
    rng = np.random.default_rng(recipe.seed if noisy_tokens is None else [recipe.seed, 1])
    noise = torch.Generator().manual_seed(recipe.seed)
    # Vectors (biases, gains, the temperature) are not decayed, as in CLIP.
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    batches = len(labels) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=epochs * batches,
        pct_start=min(0.3, recipe.warmup_steps / (epochs * batches)),
        cycle_momentum=False,
    )
    rows, started = [], time.monotonic()
    for epoch in range(1, epochs + 1):
        model.train()
        order, losses = rng.permutation(len(labels)), []
        for step in tqdm(range(batches), desc=f"epoch {epoch}/{epochs}"):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            images = normalise(shifted(pixels[chosen], recipe.shift_pixels, rng), preprocess)
            image_labels = torch.from_numpy(labels[chosen])
            if noisy_tokens is not None:
                images, carry_noise = add_noise(images, recipe, preprocess, rng, noise)
                image_labels = image_labels + len(tokens) * carry_noise
            texts, text_labels = draw_captions(every_caption, recipe.captions_per_class, rng)
            loss = contrastive_loss(model, images, image_labels, texts, text_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            losses.append(loss.item())
        rows.append(
            {
                "epoch": epoch,
                "loss": round(float(np.mean(losses)), 4),
                "site_a_val_accuracy": round(accuracy_per_modality(model, *validation, tokens, preprocess), 4),
                "logit_scale": round(float(model.logit_scale.exp()), 2),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        typer.echo(json.dumps(rows[-1]))
    return pd.DataFrame(rows)


def add_noise(
    images: torch.Tensor, recipe: Recipe, preprocess: dict, rng: np.random.Generator, noise: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of a random level, in pixel units, on a random share of the images; tells which, int64 [n]."""
    carry_noise = torch.from_numpy(rng.random(len(images)) < recipe.noise_share)
    sigmas = torch.from_numpy(rng.uniform(*recipe.noise_sigmas, len(images))).float() * carry_noise
    std = torch.tensor(preprocess["std"]).view(1, 3, 1, 1)
    return images + torch.randn(images.shape, generator=noise) * sigmas.view(-1, 1, 1, 1) / std, carry_noise.long()


def contrastive_loss(
    model: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    texts: torch.Tensor,
    text_labels: torch.Tensor,
) -> torch.Tensor:
    """CLIP's symmetric loss, in which every caption of an image's class counts as a match.

    With 28 classes a batch holds many images of one class; plain CLIP would push their captions
    apart (UniCL, Yang et al. 2022, makes the same change).
    """
    image_features = model.encode_image(images, normalize=True)
    text_features = model.encode_text(texts, normalize=True)
    logits = model.logit_scale.exp() * image_features @ text_features.T
    matches = (labels[:, None] == text_labels[None, :]).float()
    present = matches.any(0)  # captions of classes that the batch happens to lack match nothing
    to_text = functional.cross_entropy(logits, matches / matches.sum(1, keepdim=True))
    to_image = functional.cross_entropy(logits.T[present], matches.T[present] / matches.T[present].sum(1, keepdim=True))
    return (to_text + to_image) / 2


@torch.inference_mode()
def accuracy_per_modality(
    model: torch.nn.Module,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    tokens: list[torch.Tensor],
    preprocess: dict,
) -> float:
    """Zero-shot accuracy within each modality with its first template, averaged over modalities."""
    model.eval()
    texts = model.encode_text(torch.stack([class_tokens[0] for class_tokens in tokens]), normalize=True)
    features = torch.cat(
        [model.encode_image(normalise(part, preprocess), normalize=True) for part in np.array_split(pixels, 20)]
    )
    scores, accuracies, first = (features @ texts.T).numpy(), [], 0
    for modality in MODALITIES:
        last = first + len(phantom_classes(modality))
        rows = (labels >= first) & (labels < last)
        accuracies.append(np.mean(scores[rows, first:last].argmax(1) + first == labels[rows]))
        first = last
    return float(np.mean(accuracies))


def draw_captions(
    tokens: list[torch.Tensor], count: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `count` captions of every class: tokens int64 [28 * count, L] and their classes."""
    texts = [texts[rng.choice(len(texts), count, replace=False)] for texts in tokens]
    return torch.cat(texts), torch.arange(len(tokens)).repeat_interleave(count)


def normalise(images: NDArray[np.uint8], preprocess: dict) -> torch.Tensor:
    """uint8 [n, H, W, 3] to the float32 [n, 3, H, W] that the image tower reads."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(preprocess[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def save(
    out: Path,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    config: dict,
    log: pd.DataFrame,
    recipe: Recipe,
    seconds: float,
) -> None:
    """Write weights, configuration, tokenizer, log and recipe."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights = out / "open_clip_model.safetensors"
    save_file(state, weights, metadata={"synthetic": "true", "clinical_use": "no"})
    weights.chmod(0o644)  # safetensors writes for the owner only, and a package is read by anyone
    write_text_atomically(out / "open_clip_config.json", json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    write_text_atomically(out / "training_log.csv", log.to_csv(index=False))
    write_text_atomically(
        out / "recipe.json",
        json.dumps({**asdict(recipe), "minutes": round(seconds / 60, 1), "threads": torch.get_num_threads()}, indent=2)
        + "\n",
    )


if __name__ == "__main__":
    with reported_errors():
        typer.run(main)
