"""Train the low-rank adapters that come with the demo models, judge them on the val split, and write a card.

Everything is synthetic: a share of the train splits of the six site-B phantoms. Notebook 04 trains the smallest share
itself and takes the other seeds, shares and ranks from here. Delete a model's folder and run it again when that model's
weights change. Not for clinical use.
"""

import shutil
from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd
import torch
import typer

import medrobust_lib as mr
from medrobust_lib.adaptation.adapting import (
    DEMO_ADAPTERS,
    DEMO_DATASETS,
    DEMO_NOISE,
    DEMO_RECIPE,
    Adapted,
    adapt_lora,
    demo_folder_name,
)
from medrobust_lib.adaptation.training_images import PAPER_AUGMENTATION
from medrobust_lib.data.splits import fraction_splits
from medrobust_lib.experiments import map_items, write_text_atomically
from medrobust_lib.files import reported_errors
from medrobust_lib.models.adapters import save_adapter
from medrobust_lib.models.dual_encoder import DualEncoder

CARD = """# Demo adapters

Low-rank adapters of the image towers of the demo models: of queries, keys and values where there is attention, of the
convolutions otherwise. **They have seen synthetic phantoms only. Not for clinical use.**
Each was trained jointly on a share of the train splits of {datasets} (site B); the epoch that is kept was chosen on
{n_val} val images of each set. No test image was seen. Recipe: {recipe}; random crops of at least .8 of the area and
mirror images; AdamW. "noise": half of the training images carry Gaussian noise of sigma {sigmas}.

| model | folder | trained numbers | images | best epoch | val balanced accuracy before | after | seconds, one core |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Weights are stored in half precision and used in float32. Hashes, images, templates and versions are in each folder's
`provenance.json`, which is checked when an adapter is loaded: `load_model(MODEL, adapter=FOLDER)`. Written by
`data_scripts/train_demo_adapters.py`.
"""
N_VAL = 60
RANK = 16


class Job(NamedTuple):
    """One adapter."""

    model: str
    fraction: float
    rank: int
    seed: int
    noisy: bool = False


VIT, RESIDUAL = "demo-clip-vit", "demo-clip"
SEEDS = (0, 1, 2)
JOBS = (
    *(Job(VIT, 0.1, RANK, seed) for seed in SEEDS),
    Job(VIT, 0.1, RANK, 0, noisy=True),
    *(Job(VIT, fraction, RANK, seed) for fraction in (0.07, 0.03) for seed in SEEDS),
    *(Job(VIT, 0.01, RANK, seed) for seed in SEEDS[1:]),
    *(Job(VIT, 0.1, rank, seed) for rank in (8, 4) for seed in SEEDS),
    *(Job(RESIDUAL, 0.1, RANK, seed) for seed in SEEDS[:2]),
)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = DEMO_ADAPTERS,
    only: Annotated[int | None, typer.Option(min=1, help="Only the first so many adapters.")] = None,
    jobs: Annotated[int, typer.Option(help="Worker processes, one core each; -1: one per core.")] = -1,
) -> None:
    """Train every adapter that is not there yet, one at a time on each core, then write the card."""
    planned = JOBS[:only]
    missing = [job for job in planned if not folder_of(out, job).exists()]
    for _ in map_items(train, missing, context=out, jobs=jobs):
        pass
    rows = [row_of(mr.load_model(job.model, device="cpu", adapter=folder_of(out, job)), job) for job in planned]
    write_text_atomically(out / "MODEL_CARD.md", card(pd.DataFrame(rows)))
    typer.echo(f"{out}: {len(missing)} adapters trained, {len(planned)} there")


def name_of(job: Job) -> str:
    """Name of the folder."""
    augmentation = DEMO_NOISE if job.noisy else PAPER_AUGMENTATION
    return demo_folder_name(fraction=job.fraction, rank=job.rank, seed=job.seed, augmentation=augmentation)


def folder_of(out: Path, job: Job) -> Path:
    """Folder of an adapter."""
    return out / job.model / name_of(job)


def train(out: Path, job: Job) -> None:
    """Train one adapter and write its folder."""
    splits = [
        fraction_splits(name, fraction=job.fraction, n_val=N_VAL, n_test=1, seed=job.seed, test_seed=0)
        for name in DEMO_DATASETS
    ]
    model = mr.load_model(job.model, device="cpu")
    adapted = adapt_lora(
        model, [part.train for part in splits], validation=[part.val for part in splits], rank=job.rank,
        augmentation=DEMO_NOISE if job.noisy else PAPER_AUGMENTATION, seed=job.seed, **DEMO_RECIPE,
    )  # fmt: skip
    folder = folder_of(out, job)
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(adapted.model, folder, provenance=provenance_of(adapted), dtype=torch.float16)


def provenance_of(adapted: Adapted) -> dict:
    """The record of a training with one row an epoch instead of one for each epoch and data set."""
    means = adapted.history.drop_duplicates("epoch")[["epoch", "loss", "val_mean"]].round(4)
    history = means.astype(object).where(means.notna(), None).to_dict("records")
    return {**adapted.model.provenance, "history": history}


def row_of(model: DualEncoder, job: Job) -> dict:
    """One line of the card."""
    facts = model.provenance
    means = [row["val_mean"] for row in facts["history"]]
    return {
        "model": job.model,
        "folder": f"`{name_of(job)}`",
        "numbers": f"{facts['trainable']:,}",
        "images": sum(part["n"] for part in facts["train"].values()),
        "best": facts["best_epoch"],
        "before": f"{means[0]:.3f}",
        "after": f"{means[facts['best_epoch']]:.3f}",
        "seconds": f"{facts['seconds']:.0f}",
    }


def card(table: pd.DataFrame) -> str:
    """Text of the model card."""
    return CARD.format(
        datasets=", ".join(DEMO_DATASETS),
        n_val=N_VAL,
        recipe=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in DEMO_RECIPE.items()),
        sigmas=" or ".join(f"{sigma:g}" for sigma in DEMO_NOISE.sigmas),
        rows="\n".join("| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)),
    )


if __name__ == "__main__":
    with reported_errors():
        typer.run(main)
