"""How fast the notebooks' instruments answer: from a control's new value to the finished picture, in milliseconds.

    python benchmarks/explore.py                  # all instruments on the demo models, about two minutes on two cores
    python benchmarks/explore.py noise answers    # some of them
    python benchmarks/explore.py --steps 200

Each instrument takes a seeded random walk: one control after the other gets a value drawn from those it offers. The
times are those of values that had not been shown before; going back is timed beside them. Preparation, what happens
before the first picture, is timed apart. The way to the browser is not in it. Beside the time on the clock stands that
of the processor, all threads together, which says more on a machine that does other work too.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any

import medrobust_lib as mr  # first: it lets torchvision import beside a CPU-only torch

# isort: split
import numpy as np
import pandas as pd
import torch
import typer

from medrobust_lib import explore, plots
from medrobust_lib.adaptation import adapting
from medrobust_lib.evaluation import Candidate
from medrobust_lib.generative.oracles import ExactMatch, SameLabel, default_oracle
from medrobust_lib.models.adapters import load_adapter
from medrobust_lib.smoothing import prompts

DATASET = "phantom/histology"  # nine classes with long names: the slowest figures

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", help=__doc__)


def similarity() -> explore.Instrument:
    """Notebook 01."""
    return explore.explore_similarity(mr.load_model("demo-clip"), mr.load_dataset(DATASET, n=180))


def noise() -> explore.Instrument:
    """Notebook 02."""
    model, data = mr.load_model("demo-clip"), mr.load_dataset(DATASET, n=180)
    return explore.explore_noise(model, data, model.class_features(data.classes, data.templates[:1]))


def methods() -> explore.Instrument:
    """Notebook 03; the curves are made up, for only their number counts here."""
    model, data = mr.load_model("demo-clip"), mr.load_dataset(DATASET, n=90)
    names = [*(f"method {number}" for number in range(6)), "PromptSmooth"]
    radii = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    table = pd.DataFrame(
        [
            {
                "method": name,
                "guarantee": "frozen-prompt" if name == "PromptSmooth" else "standard",
                "sigma": sigma,
                "radius": radius,
                "certified_accuracy": max(0.0, 0.9 - radius - number / 10),
            }
            for number, name in enumerate(names)
            for sigma in (0.25, 0.5, 1.0)
            for radius in radii
        ]
    )
    starts = {
        f"prompt {number}": prompts.text_prompts(model, data.classes, data.templates[number]) for number in range(2)
    }
    return explore.explore_methods(table, explore.Adaptation(model, explore.few_images(data), starts))


def adapters() -> explore.Instrument:
    """Notebook 04, with the adapters that come with the demo's transformer."""
    model, data = mr.load_model("demo-clip-vit"), mr.load_dataset(DATASET, n=27)
    kinds = ((0.03, 16), (0.07, 16), (0.1, 4), (0.1, 8), (0.1, 16))
    folders = {
        f"{fraction:.0%} of the images, rank {rank}": adapting.find_demo_adapter(
            model, adapting.DEMO_DATASETS, fraction=fraction, rank=rank, seed=1
        )
        for fraction, rank in kinds
    }
    adapted = {name: load_adapter(model, folder) for name, folder in folders.items()}
    return explore.explore_adapters(model, adapted, data, model.class_features(data.classes, data.templates[:1]))


def corruptions() -> explore.Instrument:
    """Notebook 05, with as many classifiers as it compares."""
    model, data = mr.load_model("demo-clip"), mr.load_dataset(DATASET, n=90)
    candidates = {
        f"classifier {number}": Candidate(model, model.class_features(data.classes, [data.templates[number]]))
        for number in range(3)
    }
    return explore.explore_corruptions(candidates, data)


def answers() -> explore.Instrument:
    """Notebook 06: three questions about three images at three noise levels."""
    asked = {task: mr.load_questions("phantom/blood", task=task, n=24) for task in ("safety", "finding", "action")}
    readers = {
        task: {"labels": default_oracle(part), "same label": SameLabel(default_oracle(part)), "exact": ExactMatch()}
        for task, part in asked.items()
    }
    vlm = mr.load_vlm("demo-vlm")
    return explore.explore_answers(explore.prepare_answers(vlm, asked, readers, sigmas=(0.1, 0.25, 0.5)))


INSTRUMENTS: dict[str, Callable[[], explore.Instrument]] = {
    made.__name__: made for made in (similarity, noise, methods, adapters, corruptions, answers)
}


def walk(instrument: explore.Instrument, *, steps: int, seed: int) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of changes to new values, of the processor for these, and of changes back to values shown before.

    Raises
    ------
    RuntimeError
        A change ended in an error instead of a picture.
    """
    rng = np.random.default_rng(seed)
    controls = list(instrument.controls.values())
    new, processor, back = [], [], []
    seen = {_state(controls)}
    for number in range(steps):
        control = controls[rng.integers(len(controls))]
        value = _other_value(control, rng, number)
        if value == control.value:
            continue
        started, spent = time.perf_counter(), time.process_time()
        control.value = value
        elapsed, spent = 1e3 * (time.perf_counter() - started), 1e3 * (time.process_time() - spent)
        if instrument.message.value:
            raise RuntimeError(f"{_state(controls)}: {instrument.message.value}")
        if _state(controls) in seen:
            back.append(elapsed)
        else:
            new.append(elapsed)
            processor.append(spent)
        seen.add(_state(controls))
    for control in controls:  # to another value and back
        value = control.value
        control.value = _other_value(control, rng, steps)
        started = time.perf_counter()
        control.value = value
        back.append(1e3 * (time.perf_counter() - started))
    return new, processor, back


def _state(controls: list[Any]) -> tuple[Any, ...]:
    return tuple(control.value for control in controls)


def _other_value(control: Any, rng: np.random.Generator, number: int) -> Any:
    if hasattr(control, "options"):
        options = [option[1] if isinstance(option, tuple) else option for option in control.options]
        return options[rng.integers(len(options))]
    if isinstance(control.value, str):
        return f"{control.value.splitlines()[0]}\nsentence number {number}\nanother sentence, of some length"
    return int(rng.integers(control.min, control.max + 1))


@app.command()
def measure(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(INSTRUMENTS)}; none: all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Changes of the random walk.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the random walk.")] = 0,
) -> None:
    """Time the instruments and print a table."""
    unknown = set(names or ()) - set(INSTRUMENTS)
    if unknown:
        raise typer.BadParameter(f"unknown {', '.join(sorted(unknown))}; choose of {', '.join(INSTRUMENTS)}")
    plots.set_style()
    rows = []
    for name in names or INSTRUMENTS:
        started = time.perf_counter()
        instrument = INSTRUMENTS[name]()
        prepared = time.perf_counter() - started
        new, processor, back = walk(instrument, steps=steps, seed=seed)
        rows.append(
            {
                "instrument": name,
                "prepare (s)": prepared,
                "changes": len(new),
                "median (ms)": np.median(new),
                "worst (ms)": max(new),
                "processor, median": np.median(processor),
                "processor, worst": max(processor),
                "back, worst (ms)": max(back),
                "picture (kB)": len(instrument.picture.value) / 1e3,
            }
        )
    typer.echo(f"{torch.get_num_threads()} threads\n{pd.DataFrame(rows).round(1).to_string(index=False)}")


if __name__ == "__main__":
    app()
