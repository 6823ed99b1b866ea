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
DATASET, SEED, DRAWN = "phantom/histology", 0, 27
NOISE = (0.1, 0.25, 0.5)  # std, [0, 1] pixel units
BLUR = (1, 3, 5)  # severities
NAMES = {
    "zero-shot": "before: plain prompts",
    "few-shot PromptSmooth": "after: prompts learned from noise",
    "PromptSmooth": "after, and adapted to each image:\nholds for the frozen prompt only",
}


def source_hash(snapshot: Mapping[str, Any]) -> str:
    """SHA-256 of all of the snapshot that is drawn."""
    drawn = {name: snapshot["curves"][name] for name in ("noise", "severity", "certified")}
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
    """Draw the picture: images with answers above, three curves below.

    Parameters
    ----------
    snapshot : mapping
        As `demo_snapshot.read_snapshot` gives it; a curve that it lacks is left blank and says so.
    """
    plots.set_style()
    figure = plt.figure(figsize=(10, 6.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
    above, below, foot = figure.subfigures(3, 1, height_ratios=(1, 1.45, 0.11))
    _draw_images(above)
    panels = below.subplots(1, 3, sharey=True, gridspec_kw={"width_ratios": (1, 1.2, 1.2)})
    panels[0].set_ylim(0, 1)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1))
    for axes, (name, draw) in zip(panels, _PANELS.items(), strict=True):
        if snapshot["curves"][name] is None:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "not in this snapshot", ha="center", transform=axes.transAxes)
        else:
            draw(axes, snapshot["curves"][name])
    foot.text(
        0.5,
        0.45,
        "Synthetic phantoms, not patients' images. Model: demo-clip. Bands: 95 % interval over images. "
        "Not for clinical use.",
        ha="center",
        va="center",
        fontsize=9.5,
        color="0.3",
    )
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
    pixels = {"clean": clean}
    for sigma in NOISE:
        streams = [NoiseStream(SEED, data.id, int(index), sigma, "estimate") for index in data.indices]
        noisy = [noisy_copies(image, stream)[0] for image, stream in zip(clean, streams, strict=True)]
        pixels[f"noise, σ = {sigma:g}"] = torch.stack(noisy)
    for severity in BLUR:
        worse = mr.corrupted(data, "motion_blur", severity=severity, seed=SEED)
        pixels[f"motion blur {severity} of 5"] = model.prepare(worse.images)
    answers = np.stack([model.probabilities(model.encode_image(p), texts).argmax(1).numpy() for p in pixels.values()])
    right = answers == data.labels
    place = int(np.flatnonzero(right[0] & ~right[len(NOISE)] & ~right[-1])[0])
    versions = {name: p[place].clamp(0, 1).permute(1, 2, 0).numpy() for name, p in pixels.items()}
    return data.subset([place]), versions, answers[:, place]


def _draw_images(figure: Any) -> None:
    data, versions, answers = worsening()
    truth = int(data.labels[0])
    figure.suptitle(f"One image getting worse, and what the model answers (truth: {data.classes[truth]})", x=0.008,
                    ha="left", fontsize=11.5, fontweight="bold")  # fmt: skip
    for axes, (title, image), answer in zip(figure.subplots(1, len(versions)), versions.items(), answers, strict=True):
        colour = plots.CORRECT if answer == truth else plots.WRONG
        axes.imshow(image)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(visible=True, color=colour, linewidth=2.5)
        axes.set_title(title, fontsize=9.5, loc="center")
        # A tick or a cross says it without colour.
        words = data.classes[answer].replace(" ", "\n", 1)
        axes.set_xlabel(f"{'✓' if answer == truth else '✗'} {words}", fontsize=9.5, color=colour, fontweight="bold")


def _draw_noise(axes: Axes, curve: Mapping[str, Any]) -> None:
    points = pd.DataFrame(curve["points"])
    axes.fill_between(points["sigma"], points["low"], points["high"], color=plots.PALETTE[0], alpha=0.2, lw=0)
    axes.plot(points["sigma"], points["accuracy"], color=plots.PALETTE[0], marker="o")
    _chance(axes, curve["chance"])
    _title(axes, "Accuracy under noise", f"{_short(curve['dataset'])}, {curve['n']} images")
    axes.set_xlabel("noise σ ([0, 1] pixel units)", fontsize=10)


def _draw_severity(axes: Axes, curve: Mapping[str, Any]) -> None:
    points = pd.DataFrame(curve["points"])
    clean = points.loc[points["severity"] == 0, "accuracy"].mean()
    curves = points[points["severity"] > 0].pivot(index="severity", columns="corruption", values="accuracy")
    curves.loc[0] = clean
    curves = curves.sort_index()
    ends = curves.iloc[-1].sort_values()
    shown = {ends.index[0]: 3, ends.index[-1]: 4}
    if "motion_blur" in curves:
        shown.setdefault("motion_blur", 1)
    heights = _spread({name: ends[name] for name in shown}, 0.07)
    for name, values in curves.items():
        colour = plots.PALETTE[shown[name]] if name in shown else "0.8"
        axes.plot(values.index, values, color=colour, lw=2 if name in shown else 1, zorder=2 if name in shown else 1)
        if name in shown:
            axes.text(5.12, heights[name], name.replace("_", " "), color=colour, va="center", fontsize=9)
    mean = curves.mean(axis=1)
    axes.plot(mean.index, mean, color="black", marker="o", ms=4, lw=2.2, label=f"mean of {curves.shape[1]} corruptions")
    axes.legend(fontsize=9, loc="upper right")
    axes.set_xlim(0, 6.9)
    axes.set_xticks(range(6))
    _title(axes, "Accuracy under corruption", f"mean of {curve['datasets']} phantom sets, {curve['n']} images")
    axes.set_xlabel("severity (0: clean)", fontsize=10)


def _draw_certified(axes: Axes, curve: Mapping[str, Any]) -> None:
    points = pd.DataFrame(curve["points"])
    points = points[points["sigma"] == points["sigma"].iloc[0]]
    proved = points.groupby("radius")["certified_accuracy"].transform("max") > 0
    points = points[proved]
    for place, (method, rows) in enumerate(points.groupby("method", sort=False)):
        colour, line = plots.PALETTE[(0, 2, 1)[place]], "--" if rows["guarantee"].iloc[0] == "frozen-prompt" else "-"
        if line == "-":
            axes.fill_between(rows["radius"], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0, step="pre")
        axes.plot(rows["radius"], rows["certified_accuracy"], line, color=colour, drawstyle="steps-pre")
        axes.plot(rows["radius"], rows["certified_accuracy"], plots.MARKERS[place], color=colour, ms=5)
        axes.plot([], [], line, color=colour, marker=plots.MARKERS[place], ms=5, label=NAMES[method])
    _chance(axes, curve["chance"])
    sigma = points["sigma"].iloc[0]
    _title(axes, "Certified accuracy", f"{_short(curve['dataset'])}, {curve['n']} images, σ = {sigma:g}")
    axes.set_xlabel("L2 radius ([0, 1] pixel units)", fontsize=10)
    axes.legend(fontsize=9, loc="upper right")


_PANELS = {"noise": _draw_noise, "severity": _draw_severity, "certified": _draw_certified}


def _chance(axes: Axes, chance: float) -> None:
    axes.axhline(chance, color=plots.REFERENCE, ls=":", lw=1.2)
    axes.text(0.01, chance + 0.012, "chance", color="0.35", fontsize=8.5, transform=axes.get_yaxis_transform())


def _title(axes: Axes, title: str, below: str) -> None:
    axes.set_title(f"{title}\n", fontsize=11.5, fontweight="bold")
    axes.text(0, 1.03, below, transform=axes.transAxes, fontsize=9.5, color="0.3")


def _short(dataset: str) -> str:
    return f"phantom {dataset.split('/')[-1]}"


def _spread(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights of labels, at least a gap apart."""
    placed: dict[str, float] = {}
    last = -1.0
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        last = placed[name] = max(height, last + gap)
    return placed


def _information(texts: Mapping[str, str]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    for key, text in texts.items():
        information.add_text(key, text)
    return information
