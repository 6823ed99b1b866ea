"""Judge demo-vlm on the phantoms' test splits, clean and noisy, and write its model card. Not for clinical use."""

import json
from pathlib import Path
from typing import Annotated

import typer

import medrobust_lib as mr
from medrobust_lib.data.questions import PHANTOM_TASKS
from medrobust_lib.experiments import write_text_atomically
from medrobust_lib.files import reported_errors
from medrobust_lib.generative.answers import answer_once
from medrobust_lib.generative.oracles import default_oracle, judged
from medrobust_lib.metrics import accuracy_interval
from medrobust_lib.models.catalogue import DEMO_VLM
from medrobust_lib.models.vision_language import VisionLanguageModel
from medrobust_lib.models.weights import DEMO_FOLDER

FOLDER = DEMO_FOLDER / DEMO_VLM
SIGMAS = (0.0, 0.1, 0.25, 0.5)
LONGEST = 24  # tokens of an answer
CARD = """# demo-vlm

A tiny LLaVA for demonstrations and tests, in transformers' own format. **It has seen synthetic phantoms only and knows
nothing about patients. Not for clinical use.** What it calls safe, and which action it names, is made up
(`medrobust_lib/data/questions.json`) and no medical advice.

| | |
|---|---|
| image tower | CLIP's vision transformer, {image_size} px, patches of {patch} px, width {width}, {layers} layers |
| language model | Llama, width {text_width}, {text_layers} layers, {vocabulary} tokens |
| parameters | {parameters:,} |
| training data | {images_per_site} phantoms per site and modality ({modalities}; sites {sites}), split "pretrain", with made-up answers |
| never seen | any train, val or test image; other modalities |
| first stage | {tower_steps} steps: image tower and a linear head on the classes, AdamW {tower_learning_rate} |
| second stage | {frozen_steps} steps: projector and language model at {language_learning_rate}, tower frozen |
| third stage | {joint_steps} steps: everything at {joint_learning_rate} |
| each step | {batch_size} images, one question each in one of its wordings, one of its right answers at random |
| augmentation | shifts of up to {shift_pixels} pixels, mirror images; a share of {noise_share} with Gaussian noise, sigma uniform in [0, {largest_sigma}] |
| training time | {minutes} minutes on {threads} CPU threads |
| weights | stored in float16, used in float32 |
| licence | MIT |

## Accuracy on test phantoms of site B

{n} images a set, one greedy answer each (at most {longest} tokens), read by `default_oracle`; sigma in [0, 1] pixel units
at {image_size} px. *Constant*: the best single answer. Clean with its 95 % Clopper-Pearson interval.

| data set | question | constant | clean | interval | {noisy_heads} |
| --- | --- | --- | --- | --- | {rules}
{rows}

Mean over the rows: clean {mean_clean:.3f}, sigma {last:g} {mean_last:.3f}.

Written by `data_scripts/evaluate_demo_vlm.py`; trained by `data_scripts/train_demo_vlm.py`, whose log is
`training_log.csv` and whose settings are `recipe.json`.
"""


def main(
    out: Annotated[Path, typer.Option(help="Folder to write MODEL_CARD.md to.")] = FOLDER,
    images: Annotated[int, typer.Option(min=1, help="Test images of each data set.")] = 240,
) -> None:
    """Answer every question about every modality at every noise level."""
    vlm = mr.load_vlm(DEMO_VLM, device="cpu")
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    rows = []
    for modality in recipe["modalities"]:
        for task in PHANTOM_TASKS:
            rows.append(row_of(vlm, f"phantom/{modality}", task, images))
            typer.echo(" ".join(map(str, rows[-1])))
    write_text_atomically(out / "MODEL_CARD.md", card(vlm, recipe, rows, images))


def row_of(vlm: VisionLanguageModel, dataset: str, task: str, n: int) -> list:
    """Data set, task, share of the best constant answer, n, and right answers at every noise level."""
    asked = mr.load_questions(dataset, task=task, n=n)
    oracle, hits = default_oracle(asked), []
    for sigma in SIGMAS:
        texts = answer_once(vlm, asked, sigma=sigma, max_new_tokens=LONGEST, batch_size=64)
        labels = judged(oracle, texts).labels
        hits.append(sum(label == truth for label, truth in zip(labels, asked.truths, strict=True)))
    return [dataset.removeprefix("phantom/"), task, round(asked.chance, 3), len(asked), *hits]


def card(vlm: VisionLanguageModel, recipe: dict, rows: list[list], images: int) -> str:
    """Text of the model card."""
    lines = []
    for dataset, task, constant, n, clean, *noisy in rows:
        low, high = accuracy_interval(clean, n)
        shares = " | ".join(f"{hits / n:.3f}" for hits in noisy)
        lines.append(f"| {dataset} | {task} | {constant:.3f} | {clean / n:.3f} | {low:.3f} to {high:.3f} | {shares} |")
    config = vlm.model.config
    return CARD.format(
        **{name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in recipe.items()},
        image_size=vlm.image_size,
        patch=config.vision_config.patch_size,
        width=config.vision_config.hidden_size,
        layers=config.vision_config.num_hidden_layers,
        text_width=config.text_config.hidden_size,
        text_layers=config.text_config.num_hidden_layers,
        vocabulary=config.text_config.vocab_size,
        parameters=sum(p.numel() for p in vlm.model.parameters()),
        n=images,
        longest=LONGEST,
        noisy_heads=" | ".join(f"sigma {sigma:g}" for sigma in SIGMAS[1:]),
        rules=" | ".join("---" for _ in SIGMAS[1:]) + " |",
        rows="\n".join(lines),
        mean_clean=sum(row[4] / row[3] for row in rows) / len(rows),
        last=SIGMAS[-1],
        mean_last=sum(row[-1] / row[3] for row in rows) / len(rows),
    )


if __name__ == "__main__":
    with reported_errors():
        typer.run(main)
