"""Train the two demo models, small CLIPs on site-A phantoms and their captions, in open_clip's own format.

Everything is synthetic. The models see the "pretrain" split of acquisition site A and nothing else: no image of
site B, no train, val or test image. `demo-clip` (residual network) learns from image-caption pairs; `demo-clip-vit`
(vision transformer) then takes over its text tower, frozen, and learns from the same pairs and from demo-clip's
features.

Exposure, contrast and a little noise vary in training as they do in acquisition, and no caption mentions them. Of the
images some carry what a person would call noise, and their captions say so, as captions of photographs do. Zero-shot
prompts, which do not mention noise, therefore fail on noisy images although the image tower still tells classes apart:
there is something for a learned prompt to win, as there is in large models. Not for clinical use.
"""

import contextlib
import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
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
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from medrobust_lib.data.wording import class_wording
from medrobust_lib.experiments import write_text_atomically
from medrobust_lib.files import read_tensors, reported_errors, write_tensors
from medrobust_lib.models.weights import DEMO_FOLDER, fingerprint
from medrobust_lib.phantoms import MODALITIES, SPLITS, phantom_classes
from preparing.pretraining import exposed, render_many, shifted

WEIGHTS = "open_clip_model.safetensors"
LOG_KEY = "log"
RANDOM_STATE = "random_state"  # of torch's own stream, which draws the weights that a stage begins with
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


class Wanted(StrEnum):
    """Which models to train."""

    BOTH = "both"
    RESIDUAL = "demo-clip"
    TRANSFORMER = "demo-clip-vit"


@dataclass(frozen=True)
class Stage:
    """A number of epochs along one schedule of the learning rate."""

    epochs: int
    learning_rate: float
    exposure_share: float  # of the images, recorded anew
    noise_share: float  # of the images; their captions say so
    repeats: dict[str, int]  # how often an epoch shows each image of a modality, where not once


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the weights; written into the model card."""

    stages: tuple[Stage, ...]
    images_per_modality: int = SPLITS["pretrain"]
    batch_size: int = 64
    weight_decay: float = 0.05
    warmup: float = 0.05
    shift_pixels: int = 3
    contrast: tuple[float, float] = (0.4, 1.25)
    brightness: float = 0.08
    gain: float = 0.05
    grain_share: float = 0.2
    grain_sigmas: tuple[float, float] = (0.0, 0.1)
    noise_sigmas: tuple[float, float] = (0.15, 0.6)
    distillation: float = 0.0
    hints: float = 0.0
    seed: int = 0


# The lesions of fundus and breast are the smallest and take the most looks to be found; those of fundus are found only
# where no noise hides them.
FIRST = Stage(7, 1e-3, 0.5, 0.4, {"breast": 2, "fundus": 2})
SEARCH, LAST = Stage(2, 1e-3, 0.25, 0.0, {"fundus": 6}), Stage(2, 5e-4, 0.25, 0.4, {"breast": 2, "fundus": 2})
RESIDUAL = Recipe((FIRST, SEARCH, LAST))
CLEAN, MIXED = (
    Stage(4, 1e-3, 0.25, 0.0, {"breast": 2, "fundus": 3}),
    Stage(3, 5e-4, 0.5, 0.4, {"breast": 2, "fundus": 2}),
)
TRANSFORMER = replace(RESIDUAL, stages=(CLEAN, MIXED), distillation=2.0, hints=1.0)
# CLIP's residual network (the layout of RN50, one block a stage), and CLIP's vision transformer.
TOWERS = {
    Wanted.RESIDUAL: {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    Wanted.TRANSFORMER: {"image_size": IMAGE_SIZE, "patch_size": 8, "layers": 4, "width": 128, "head_width": 32},
}
# The block of the transformer whose tokens are compared with the residual network's second stage, cell by cell:
# both see the image on a grid of 8 x 8.
HINTED_BLOCK = 1


@dataclass(frozen=True)
class Examples:
    """Phantoms of site A, uint8 [n, H, W, 3], and labels that run over the classes of all modalities, int64 [n]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the models' folders.")] = DEMO_FOLDER,
    only: Annotated[Wanted, typer.Option(help="demo-clip-vit alone needs demo-clip in that folder.")] = Wanted.BOTH,
    images: Annotated[int, typer.Option(min=32, help="Images per modality.")] = RESIDUAL.images_per_modality,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every stage, instead of the recipe's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order, captions and augmentation.")] = RESIDUAL.seed,
) -> None:
    """Render site-A phantoms, train the models on image-caption pairs, write weights, log and recipe."""
    tokenizer = train_tokenizer([text for texts in caption_table() for text in texts])
    modalities = tuple(MODALITIES)
    train_set, validation = (
        Examples(*render_many(modalities, split=split, site="A", count=count, image_size=IMAGE_SIZE))
        for split, count in (("pretrain", images), ("val", SPLITS["val"]))
    )
    if only is not Wanted.TRANSFORMER:
        recipe = shaped(RESIDUAL, images=images, epochs=epochs, seed=seed)
        build(out / Wanted.RESIDUAL, Wanted.RESIDUAL, tokenizer, train_set, validation, recipe)
    if only is not Wanted.RESIDUAL:
        recipe = shaped(TRANSFORMER, images=images, epochs=epochs, seed=seed)
        teacher = open_clip.CLIP(**model_config(tokenizer, TOWERS[Wanted.RESIDUAL])["model_cfg"])
        teacher.load_state_dict(load_file(out / Wanted.RESIDUAL / WEIGHTS))
        build(out / Wanted.TRANSFORMER, Wanted.TRANSFORMER, tokenizer, train_set, validation, recipe, teacher=teacher)


def shaped(recipe: Recipe, *, images: int, epochs: int | None, seed: int) -> Recipe:
    """A recipe with other numbers of images and epochs, and another seed."""
    stages = tuple(stage if epochs is None else replace(stage, epochs=epochs) for stage in recipe.stages)
    return replace(recipe, stages=stages, images_per_modality=images, seed=seed)


def build(
    folder: Path,
    name: Wanted,
    tokenizer: PreTrainedTokenizerFast,
    train_set: Examples,
    validation: Examples,
    recipe: Recipe,
    *,
    teacher: open_clip.CLIP | None = None,
) -> None:
    """Train one model and write its folder.

    Finished stages are kept beside the folder until the last is done: an interrupted training goes on behind them.
    """
    torch.manual_seed(recipe.seed)  # weights are initialised inside open_clip, from torch's own stream
    config = model_config(tokenizer, TOWERS[name])
    model = open_clip.CLIP(**config["model_cfg"])
    if teacher is not None:
        inherit_text_tower(model, teacher)
    kept, files, rows = folder.with_name(f"{folder.name}.stages"), [], []
    kept.mkdir(parents=True, exist_ok=True)
    for number in range(1, len(recipe.stages) + 1):
        so_far = asdict(replace(recipe, stages=recipe.stages[:number]))
        identity = [so_far, config, None if teacher is None else fingerprint([*teacher.state_dict().values()])]
        files.append(kept / f"{number}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}.safetensors")
        if files[-1].is_file():
            tensors, header = read_tensors(files[-1], key=LOG_KEY, kind="a finished stage", advice="Delete it.")
            torch.set_rng_state(tensors.pop(RANDOM_STATE))  # what a stage draws from it is what it would have drawn
            model.load_state_dict(tensors)
            rows = header["rows"]
            continue
        rows += train(
            model, tokenizer, train_set, validation, config["preprocess_cfg"], recipe, number=number, teacher=teacher
        )
        state = {**model.state_dict(), RANDOM_STATE: torch.get_rng_state()}
        write_tensors(files[-1], state, key=LOG_KEY, header={"rows": rows})
    log = pd.DataFrame(rows)
    seconds = log.groupby("stage")["seconds"].max().sum()
    save(folder, model, tokenizer, config, log, recipe, seconds)
    for file in files:
        file.unlink()
    with contextlib.suppress(OSError):  # stages of another recipe stay
        kept.rmdir()
    typer.echo(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters in {seconds / 60:.1f} minutes")


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


def model_config(tokenizer: PreTrainedTokenizerFast, tower: dict) -> dict[str, dict]:
    """open_clip's configuration of a demo model, as it is written to open_clip_config.json."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": tower,
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


def inherit_text_tower(model: open_clip.CLIP, teacher: open_clip.CLIP) -> None:
    """Give a model the teacher's text tower and temperature, and train neither."""
    own = {name: value for name, value in teacher.state_dict().items() if not name.startswith("visual.")}
    model.load_state_dict(own, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual."))


def train(
    model: open_clip.CLIP,
    tokenizer: PreTrainedTokenizerFast,
    train_set: Examples,
    validation: Examples,
    preprocess: dict,
    recipe: Recipe,
    *,
    number: int = 1,
    teacher: open_clip.CLIP | None = None,
) -> list[dict[str, float]]:
    """Minimise the contrastive loss in one stage, with a teacher its two terms, too; returns one row per epoch.

    The 28 classes with their captions come first, then the same classes with captions that speak of noise.
    """
    stage, captions = recipe.stages[number - 1], caption_table()
    clean = tokenized(tokenizer, captions)
    every_caption = clean + tokenized(tokenizer, noisy_captions(captions))
    if teacher is not None:  # its text tower is frozen, so every caption has its feature for good
        with torch.no_grad():
            every_caption = [model.encode_text(tokens, normalize=True) for tokens in every_caption]
    rng, noise = np.random.default_rng([recipe.seed, number]), torch.Generator().manual_seed(recipe.seed + number)
    lessons = None if teacher is None else Lessons(model, teacher)
    parameters = [p for part in (model, lessons) if part is not None for p in part.parameters() if p.requires_grad]
    # Vectors (biases, gains, the temperature) are not decayed, as in CLIP.
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=stage.learning_rate,
        betas=(0.9, 0.98),
    )
    places = repeated_places(train_set.labels, stage.repeats)
    batches = len(places) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=stage.learning_rate,
        total_steps=stage.epochs * batches,
        pct_start=recipe.warmup,
        cycle_momentum=False,
    )
    model.visual.to(memory_format=torch.channels_last)  # convolutions of pixels that lie so are faster on a CPU
    rows, started = [], time.monotonic()
    for epoch in range(1, stage.epochs + 1):
        model.train()
        places, losses = rng.permutation(places), []
        for step in tqdm(range(batches), desc=f"stage {number}, epoch {epoch}/{stage.epochs}", mininterval=20):
            chosen = places[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            images, is_noisy = photographed(train_set.pixels[chosen], recipe, stage, preprocess, rng, noise)
            labels = torch.from_numpy(train_set.labels[chosen]) + len(clean) * is_noisy
            texts, text_labels = draw_captions(every_caption, rng)
            # bfloat16 with plain attention: on processors with matrix units, twice as fast as float32 or more.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                image_features = model.encode_image(images, normalize=True).float()
                text_features = model.encode_text(texts, normalize=True).float() if teacher is None else texts
                loss = contrastive_loss(model.logit_scale.exp(), image_features, labels, text_features, text_labels)
                if lessons is not None:
                    towards_features, towards_cells = lessons(images, image_features)
                    loss = loss + recipe.distillation * towards_features + recipe.hints * towards_cells
                optimizer.zero_grad()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            losses.append(loss.item())
        accuracies = accuracy_per_modality(model, validation, clean, preprocess)
        rows.append(
            {
                "stage": number,
                "epoch": epoch,
                "loss": round(float(np.mean(losses)), 4),
                "site_a_val_accuracy": round(float(np.mean(list(accuracies.values()))), 4),
                **{modality: round(value, 4) for modality, value in accuracies.items()},
                "logit_scale": round(float(model.logit_scale.detach().exp()), 2),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        typer.echo(json.dumps(rows[-1]))
    for hook in () if lessons is None else lessons.hooks:  # the next stage has its own
        hook.remove()
    return rows


class Lessons(torch.nn.Module):
    """What a residual network teaches a vision transformer, beside the captions.

    Two distances on the same images: one minus the cosine between the towers' features (Hinton et al. 2015 on
    features), and the squared error between a linear map of the transformer's tokens and the cells of the residual
    network's second stage, normalised (the hints of FitNets, Romero et al. 2015).
    """

    def __init__(self, model: open_clip.CLIP, teacher: open_clip.CLIP) -> None:
        super().__init__()
        self.map = torch.nn.Linear(TOWERS[Wanted.TRANSFORMER]["width"], 8 * TOWERS[Wanted.RESIDUAL]["width"])
        # A list keeps the teacher out of this module's parameters.
        self.teacher = [teacher.eval().requires_grad_(False)]
        self.seen: dict[str, Tensor] = {}
        block = model.visual.transformer.resblocks[HINTED_BLOCK]
        self.hooks = (
            block.register_forward_hook(lambda _module, _inputs, tokens: self.seen.update(tokens=tokens)),
            teacher.visual.layer2.register_forward_hook(lambda _module, _inputs, cells: self.seen.update(cells=cells)),
        )

    def forward(self, images: Tensor, image_features: Tensor) -> tuple[Tensor, Tensor]:
        """Both distances for images [n, 3, H, W] that the transformer has just encoded as features [n, d]."""
        with torch.no_grad():
            wanted = self.teacher[0].encode_image(images, normalize=True).float()
            cells = self.seen["cells"].flatten(2).transpose(1, 2).float()
            cells = functional.layer_norm(cells, cells.shape[-1:])
        tokens = self.map(self.seen["tokens"][:, 1:]).float()  # without the class token
        return 1 - (image_features * wanted).sum(1).mean(), functional.mse_loss(tokens, cells)


def repeated_places(labels: NDArray[np.int64], repeats: dict[str, int]) -> NDArray[np.int64]:
    """Places of the images of one epoch, those of some modalities several times."""
    counts = np.concatenate([[repeats.get(name, 1)] * len(phantom_classes(name)) for name in MODALITIES])
    return np.repeat(np.arange(len(labels)), counts[labels])


def photographed(
    pixels: NDArray[np.uint8],
    recipe: Recipe,
    stage: Stage,
    preprocess: dict,
    rng: np.random.Generator,
    noise: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Photograph phantoms once more: shift, exposure, grain or noise; tells which are noisy, int64 [n]."""
    images = shifted(pixels, recipe.shift_pixels, rng)
    images = exposed(
        images.astype(np.float32) / 255,
        share=stage.exposure_share,
        contrast=recipe.contrast,
        brightness=recipe.brightness,
        gain=recipe.gain,
        rng=rng,
    )
    count, kind = len(images), rng.random(len(images))
    is_noisy = kind < stage.noise_share
    has_grain = ~is_noisy & (kind < stage.noise_share + recipe.grain_share)
    sigmas = is_noisy * rng.uniform(*recipe.noise_sigmas, count) + has_grain * rng.uniform(*recipe.grain_sigmas, count)
    drawn = torch.randn((count, 3, *pixels.shape[1:3]), generator=noise)
    noisy = torch.from_numpy(images).permute(0, 3, 1, 2) + drawn * torch.from_numpy(sigmas).float().view(-1, 1, 1, 1)
    return normalise(noisy, preprocess), torch.from_numpy(is_noisy).long()


def contrastive_loss(
    scale: Tensor, image_features: Tensor, labels: Tensor, text_features: Tensor, text_labels: Tensor
) -> Tensor:
    """CLIP's symmetric loss, in which every caption of an image's class counts as a match.

    With 28 classes a batch holds many images of one class; plain CLIP would push their captions
    apart (UniCL, Yang et al. 2022, makes the same change).
    """
    logits = scale * image_features @ text_features.T
    matches = (labels[:, None] == text_labels[None, :]).float()
    present = matches.any(0)  # captions of classes that the batch happens to lack match nothing
    to_text = functional.cross_entropy(logits, matches / matches.sum(1, keepdim=True))
    to_image = functional.cross_entropy(logits.T[present], matches.T[present] / matches.T[present].sum(1, keepdim=True))
    return (to_text + to_image) / 2


@torch.inference_mode()
def accuracy_per_modality(
    model: open_clip.CLIP, examples: Examples, tokens: list[Tensor], preprocess: dict
) -> dict[str, float]:
    """Zero-shot accuracy within each modality, with its first template."""
    model.eval()
    texts = model.encode_text(torch.stack([class_tokens[0] for class_tokens in tokens]), normalize=True)
    pixels = torch.from_numpy(examples.pixels).permute(0, 3, 1, 2)
    features = [model.encode_image(normalise(part / 255, preprocess), normalize=True) for part in pixels.split(64)]
    scores, accuracies, first = (torch.cat(features) @ texts.T).numpy(), {}, 0
    for modality in MODALITIES:
        last = first + len(phantom_classes(modality))
        rows = (examples.labels >= first) & (examples.labels < last)
        accuracies[modality] = float(np.mean(scores[rows, first:last].argmax(1) + first == examples.labels[rows]))
        first = last
    return accuracies


def draw_captions(tokens: list[Tensor], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a caption of every class, tokens or features [classes, ...], and the classes."""
    return torch.stack([texts[rng.integers(len(texts))] for texts in tokens]), torch.arange(len(tokens))


def normalise(images: Tensor, preprocess: dict) -> Tensor:
    """Pixels in [0, 1], float32 [n, 3, H, W], as the image tower reads them."""
    mean, std = (torch.tensor(preprocess[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


def save(
    out: Path,
    model: open_clip.CLIP,
    tokenizer: PreTrainedTokenizerFast,
    config: dict,
    log: pd.DataFrame,
    recipe: Recipe,
    seconds: float,
) -> None:
    """Write weights, configuration, tokenizer, log and recipe in half the bytes: float16."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    weights = out / WEIGHTS
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
