"""The README's first picture: one phantom getting worse, and the curves of the demo run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import medrobust_lib as mr  # before torchvision-based packages

# isort: split
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from medrobust_lib import plots
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies

PICTURE = Path(__file__).resolve().parent / "front_picture.png"
HASH_KEY = "Comment"  # the PNG keyword under which the source's hash stands
DATASET, SEED, DRAWN = "phantom/blood", 0, 32
NOISE = {"a little noise": 0.1, "more noise": 0.25, "much noise": 0.5}  # std, [0, 1] pixel units
BLUR = {"blurred": 2, "more blurred": 5}  # severities
NAMES = {"zero-shot": "asked in plain words", "few-shot PromptSmooth": "in words learned from\na few noisy images"}
MODELS = ("one demo model", "another one")
LARGE, SMALL = 15, 13  # points: ten inches become 500 pixels on a narrow page


def source_hash(snapshot: Mapping[str, Any]) -> str:
    """SHA-256 of all of the snapshot that is drawn."""
    drawn = {name: snapshot["curves"][name] for name in ("severity", "certified")}
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path = PICTURE) -> str:
    """Hash of the snapshot that a picture was drawn from; empty where there is none."""
    if not path.exists():
        return ""
    with Image.open(path) as picture:
        return str(picture.info.get(HASH_KEY, ""))


def save_picture(snapshot: Mapping[str, Any], path: Path = PICTURE) -> None:
    """Draw the picture and write it, with the hash of what it was drawn from."""
    figure = draw_picture(snapshot)
    partial = path.with_suffix(".part.png")
    # Opaque white, so that dark pages show it as well as light ones.
    figure.savefig(partial, dpi=160, facecolor="white", metadata={HASH_KEY: source_hash(snapshot)})
    plt.close(figure)
    with Image.open(partial) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(partial, optimize=True, pnginfo=_information({HASH_KEY: source_hash(snapshot)}))
    partial.replace(path)


def draw_picture(snapshot: Mapping[str, Any]) -> Figure:
    """Draw the picture: one image that gets worse above, two curves below.

    Parameters
    ----------
    snapshot : mapping
        As `demo_snapshot.read_snapshot` gives it; a curve that it lacks is left blank and says so.
    """
    plots.set_style()
    figure = plt.figure(figsize=(10, 7.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    above, below, foot = figure.subfigures(3, 1, height_ratios=(1, 1.5, 0.12))
    _draw_images(above)
    panels = below.subplots(1, 2, sharey=True)
    panels[0].set_ylim(0, 1)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1))
    for axes, (name, draw) in zip(panels, _PANELS.items(), strict=True):
        axes.tick_params(labelsize=SMALL)
        if snapshot["curves"][name] is None:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "not in this snapshot", ha="center", transform=axes.transAxes)
        else:
            draw(axes, snapshot["curves"][name])
    words = "Drawings, not patients' images. Not for clinical use."
    foot.text(0.5, 0.45, words, ha="center", va="center", fontsize=SMALL, color="0.3")
    return figure


def worsening() -> tuple[ImageDataset, dict[str, NDArray[np.float32]], NDArray[np.int64]]:
    """One phantom, its versions from left to right, and what demo-clip answers to each.

    Shown is the first image of a seeded draw that is named rightly when clean and wrongly at the strongest noise
    and the strongest blur: chosen because its answer changes.

    Returns
    -------
    data : ImageDataset
        Holds the one image.
    versions : dict of title to float32 [H, W, 3]
        In [0, 1]; noise is clipped for display only.
    answers : int64 [versions]
        Labels.
    """
    model = mr.load_model("demo-clip", device="cpu", dtype="float32")
    data = mr.load_dataset(DATASET, n=DRAWN, seed=SEED)
    texts = model.class_features(data.classes, data.templates[:1])
    clean = model.prepare(data.images)
    pixels = {"as drawn": clean}
    for title, sigma in NOISE.items():
        streams = [NoiseStream(SEED, data.id, int(index), sigma, "estimate") for index in data.indices]
        noisy = [noisy_copies(image, stream)[0] for image, stream in zip(clean, streams, strict=True)]
        pixels[title] = torch.stack(noisy)
    for title, severity in BLUR.items():
        worse = mr.corrupted(data, "motion_blur", severity=severity, seed=SEED)
        pixels[title] = model.prepare(worse.images)
    answers = np.stack([model.probabilities(model.encode_image(p), texts).argmax(1).numpy() for p in pixels.values()])
    right = answers == data.labels
    place = int(np.flatnonzero(right[0] & ~right[len(NOISE)] & ~right[-1])[0])
    versions = {name: p[place].clamp(0, 1).permute(1, 2, 0).numpy() for name, p in pixels.items()}
    return data.subset([place]), versions, answers[:, place]


def _draw_images(figure: Any) -> None:
    data, versions, answers = worsening()
    truth = int(data.labels[0])
    title = f"A drawn blood cell gets worse. What does a model call it? (Right: {data.classes[truth]}.)"
    figure.suptitle(title, x=0.008, ha="left", fontsize=LARGE, fontweight="bold")
    for axes, (title, image), answer in zip(figure.subplots(1, len(versions)), versions.items(), answers, strict=True):
        colour = plots.CORRECT if answer == truth else plots.WRONG
        axes.imshow(image)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(visible=True, color=colour, linewidth=3.5)
        axes.set_title(title, fontsize=SMALL, loc="center")
        # A tick or a cross says it without colour.
        words = data.classes[answer].replace(" ", "\n", 1)
        axes.set_xlabel(f"{'✓' if answer == truth else '✗'} {words}", fontsize=SMALL, color=colour, fontweight="bold")


def _draw_severity(axes: Axes, curve: Mapping[str, Any]) -> None:
    models = [rows for _, rows in pd.DataFrame(curve["means"]).groupby("model", sort=False)]
    for place, (rows, model) in enumerate(zip(models, MODELS, strict=True)):
        style = {"color": plots.PALETTE[place], "marker": plots.MARKERS[place], "lw": 2.5, "ms": 7}
        axes.plot(rows["severity"], rows["accuracy"], **style, label=model)
    _guessing(axes, curve["chance"])
    axes.legend(fontsize=SMALL, loc="upper right")
    axes.set_xticks(range(6))
    axes.set_title("How often is the answer right?", fontsize=LARGE, fontweight="bold")
    axes.set_xlabel("how bad the image is (0: as drawn)", fontsize=SMALL)


def _draw_certified(axes: Axes, curve: Mapping[str, Any]) -> None:
    points = pd.DataFrame(curve["points"])
    points = points[(points["sigma"] == points["sigma"].iloc[0]) & points["method"].isin(NAMES)]
    proved = points.groupby("radius")["certified_accuracy"].transform("max") > 0
    for place, (method, rows) in enumerate(points[proved].groupby("method", sort=False)):
        colour = plots.PALETTE[(0, 2)[place]]
        axes.fill_between(rows["radius"], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0, step="pre")
        style = {"color": colour, "marker": plots.MARKERS[place], "lw": 2.5, "ms": 7, "drawstyle": "steps-pre"}
        axes.plot(rows["radius"], rows["certified_accuracy"], **style, label=NAMES[method])
    _guessing(axes, curve["chance"])
    axes.set_title("How often is that proved to stay?", fontsize=LARGE, fontweight="bold")
    axes.set_xlabel("however the image changes, up to this size", fontsize=SMALL)
    axes.legend(fontsize=SMALL, loc="upper right")


def _guessing(axes: Axes, chance: float) -> None:
    axes.axhline(chance, color=plots.REFERENCE, ls=":", lw=1.5)
    axes.text(
        0.01, chance - 0.055, "blind guessing", color="0.35", fontsize=SMALL, transform=axes.get_yaxis_transform()
    )


_PANELS = {"severity": _draw_severity, "certified": _draw_certified}


def _information(texts: Mapping[str, str]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    for key, text in texts.items():
        information.add_text(key, text)
    return information
