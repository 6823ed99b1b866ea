"""Calibrate the suite clinical-c: find the parameter of each severity, and write the table of the library.

Severity 1 to 5 of every corruption has the same mean structural similarity (SSIM) to the clean images: .90, .80, .70,
.55, .40. The images are synthetic phantoms of the modality, 24 of each acquisition site's training split at 64 px:
drawings, not patients' images. Where even the strongest parameter that somebody might have seen changes less, the
parameters of the severities that are left go there in even steps, and the table says what they reach.
The table also says what the same parameters reach at 224 px.

`--sheets FOLDER` draws contact sheets instead: what to look at before one believes a table.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter

import medrobust_lib
from medrobust_lib.corruptions import optics, radiology
from medrobust_lib.corruptions.functions import Pixels
from medrobust_lib.corruptions.suites import (
    SEVERITIES,
    Corruption,
    corrupted,
    find_suite,
    keeps_gray,
    luma,
    random_stream,
)
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.experiments import write_text_atomically
from medrobust_lib.files import reported_errors, whole_file

TABLE = Path(medrobust_lib.__file__).parent / "corruptions" / "clinical.toml"
TARGETS = (0.90, 0.80, 0.70, 0.55, 0.40)
SIDE, EACH_SITE, STEPS = 64, 24, 10
LARGE, FEW = 224, 4  # side, and images of each site, of what is only measured
SHOWN = (1, 3, 5)


class Search(NamedTuple):
    """A parameter, from where nothing is seen to the strongest that somebody might have seen."""

    parameter: str
    mild: float
    strong: float


RADIOGRAPH = {
    "quantum_noise": Search("dose", 1, 0.0004),
    "scatter_veil": Search("ratio", 0.02, 6),
    "collimator_edge": Search("share", 0.005, 0.4),
    "grid_lines": Search("depth", 0.002, 0.4),
    "patient_motion": Search("length", 0.002, 0.25),
}
ULTRASOUND = {
    "speckle": Search("looks", 1000, 1),
    "acoustic_shadow": Search("width", 0.01, 0.7),
    "gain_error": Search("decibels", 0.2, 30),
    "tgc_error": Search("decibels", 0.2, 20),
}
OCT = {
    "speckle": Search("looks", 1000, 1),
    "weak_signal": Search("loss", 0.1, 25),
    "blink_line": Search("width", 0.005, 0.6),
    "lateral_defocus": Search("sigma", 0.001, 0.1),
    "axial_shift": Search("shift", 0.0005, 0.15),
}
FUNDUS = {
    "uneven_illumination": Search("falloff", 0.02, 12),
    "cataract_haze": Search("haze", 0.005, 0.97),
    "lens_dust": Search("particles", 0.05, 60),
    "overexposed_disc": Search("exposure", 0.02, 6),
}
BLOOD = {
    "stain_shift": Search("shift", 0.01, 0.8),
    "out_of_focus": Search("radius", 0.002, 0.15),
    "mounting_bubble": Search("radius", 0.02, 0.7),
    "pen_mark": Search("width", 0.005, 0.6),
    "scanner_stripe": Search("depth", 0.002, 0.3),
}
# Smears are spread, not cut: they have no folds.
HISTOLOGY = {**BLOOD, "tissue_fold": Search("width", 0.005, 0.4)}
# Of each family, the phantoms that stand for it, and its searches. Mammography has no phantom: chests stand for it.
FAMILIES = {
    "radiograph": ("chest", RADIOGRAPH),
    "ultrasound": ("breast", ULTRASOUND),
    "oct": ("oct", OCT),
    "fundus": ("fundus", FUNDUS),
    "histology": ("histology", HISTOLOGY),
    "blood": ("blood", BLOOD),
}
app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    output: Annotated[Path, typer.Option(help="Table to write.")] = TABLE,
    sheets: Annotated[Path | None, typer.Option(help="Folder for contact sheets, one a family; no table then.")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the sheets' images in pixels.", min=28, max=512)] = 128,
) -> None:
    """Write the table, or the sheets."""
    with reported_errors():
        if sheets is not None:
            for family in FAMILIES:
                with whole_file(sheets / f"{family}.png") as part:
                    contact_sheet(family, image_size=image_size).savefig(part, format="png", dpi=90)
                typer.echo(f"wrote {sheets / family}.png")
            return
        write_text_atomically(output, table())
    typer.echo(f"wrote {output}")


def table() -> str:
    """Find every parameter, and write them down as TOML."""
    lines: dict[str, list[str]] = {"families": [], "similarity": [], "similarity_at_224": []}
    for family, (_, searches) in FAMILIES.items():
        for heading, part in lines.items():
            part += ["", f"[{heading}.{family}]"]
        large = reference_sets(family, n=FEW, image_size=LARGE)
        for name, search in searches.items():
            found = calibrated(family, name, search)
            corruption = Corruption(name, _function(name), tuple({search.parameter: value} for value, _ in found))
            at_224 = [mean_similarity(large, partial(apply, corruption, severity=s)) for s in SEVERITIES]
            lines["families"].append(
                f"{name} = {{ {search.parameter} = {_listed([f'{value:g}' for value, _ in found])} }}"
            )
            lines["similarity"].append(f"{name} = {_listed([f'{reached:.3f}' for _, reached in found])}")
            lines["similarity_at_224"].append(f"{name} = {_listed([f'{reached:.2f}' for reached in at_224])}")
            typer.echo(" ".join(part[-1] for part in lines.values()))
    head = "# Parameters of clinical-c and the similarities they reach, by data_scripts/calibrate_clinical.py."
    return "\n".join([head, *(line for part in lines.values() for line in part), ""])


def _listed(words: list[str]) -> str:
    return f"[{', '.join(words)}]"


def _function(name: str) -> Callable[..., Pixels]:
    return getattr(radiology, name, None) or getattr(optics, name)


def calibrated(family: str, name: str, search: Search) -> list[tuple[float, float]]:
    """Parameter of each severity, to three digits, and the similarity it reaches."""
    sets = reference_sets(family)

    def reached(severity: int, value: float) -> float:
        corruption = Corruption(name, _function(name), ({search.parameter: value},) * len(TARGETS))
        return mean_similarity(sets, partial(apply, corruption, severity=severity))

    found = []
    for severity, target in enumerate(TARGETS, start=1):
        if reached(severity, search.strong) > target:
            steps = np.linspace(found[-1][0] if found else 0, search.strong, len(TARGETS) - len(found) + 1)[1:]
            values = [_rounded(step) for step in steps]
            return found + [(value, reached(place, value)) for place, value in enumerate(values, start=severity)]
        low, high = 0.0, 1.0  # of the way from mild to strong, on a logarithmic scale
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if reached(severity, _between(search, middle)) > target else (low, middle)
        value = _rounded(_between(search, (low + high) / 2))
        found.append((value, reached(severity, value)))
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _between(search: Search, way: float) -> float:
    return math.exp((1 - way) * math.log(search.mild) + way * math.log(search.strong))


def reference_sets(family: str, *, n: int = EACH_SITE, image_size: int = SIDE) -> list[ImageDataset]:
    """Training phantoms of both sites, by default those of the calibration."""
    modality, _ = FAMILIES[family]
    ids = (f"phantom/{modality}", f"phantom/{modality}-site-a")
    return [load_dataset(id, split="train", n=n, image_size=image_size) for id in ids]


def apply(corruption: Corruption, data: ImageDataset, *, severity: int) -> Pixels:
    """Corrupt as the suite does, from the same random streams."""
    clean = luma(data.images) if keeps_gray("clinical-c", data.id) else data.images
    streams = (random_stream(0, data.id, index, corruption.name, severity) for index in data.indices)
    made = [corruption.apply(image, severity=severity, rng=rng) for image, rng in zip(clean, streams, strict=True)]
    return np.stack([np.atleast_3d(image) + np.zeros(3, np.uint8) for image in made])


def mean_similarity(sets: list[ImageDataset], make: Callable[[ImageDataset], Pixels]) -> float:
    """Mean over all images of the similarity to the clean ones."""
    return float(
        np.mean([similarity(one, other) for data in sets for one, other in zip(data.images, make(data), strict=True)])
    )


def similarity(first: Pixels, second: Pixels) -> float:
    """Structural similarity of two images, uint8 [H, W, channels], averaged over pixels and channels.

    Wang et al. 2004 (IEEE Trans Image Processing 13:600): a Gaussian window of standard deviation 1.5 cut at 11 pixels,
    constants (.01 * 255)^2 and (.03 * 255)^2, borders of half a window left out.
    """
    smooth = partial(gaussian_filter, sigma=1.5, radius=5, axes=(0, 1))
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    spread_x, spread_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    common = smooth(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + 2.55**2) / (mean_x**2 + mean_y**2 + 2.55**2)
    structure = (2 * common + 7.65**2) / (spread_x + spread_y + 7.65**2)
    return float((light * structure)[5:-5, 5:-5].mean())


def contact_sheet(family: str, *, image_size: int, samples: int = 3) -> Figure:
    """Draw phantoms of a family: a row a corruption, and blocks of clean, mild, middle and strong columns."""
    suite, (modality, _) = find_suite("clinical-c"), FAMILIES[family]
    data = load_dataset(f"phantom/{modality}", split="test", n=samples, image_size=image_size)
    names = suite.names(family)
    figure = Figure(figsize=(1.15 * samples * (1 + len(SHOWN)) + 1.4, 1.2 * len(names) + 0.4), layout="constrained")
    figure.suptitle(f"clinical-c, {family}: synthetic phantoms, not patients' images", fontsize=10)
    axes = figure.subplots(len(names), samples * (1 + len(SHOWN)), squeeze=False)
    for name, row in zip(names, axes, strict=True):
        shown = [corrupted(data, name, severity=severity, suite="clinical-c") for severity in (0, *SHOWN)]
        for axis, image in zip(row, np.concatenate([part.images for part in shown]), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    for number, severity in enumerate(("clean", *(f"severity {severity}" for severity in SHOWN))):
        axes[0, number * samples].set_title(severity, loc="left", fontsize=9)
    return figure


if __name__ == "__main__":
    app()
