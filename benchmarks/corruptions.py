"""The seven corruptions of MediMeta-C side by side with the public functions, one core, all five severities.

    python benchmarks/corruptions.py                               # about a minute on one core
    python benchmarks/corruptions.py --public-packages FOLDER      # `pip install --target FOLDER imagecorruptions ...`

The public package imagecorruptions is timed if it can be imported. Version 1.1.2 needs modules that have gone since
(pkg_resources, scipy.ndimage.interpolation); stand-ins for them are put in place, and its corruptions run as they are.
Without the package, a plain version of the published formulas is timed instead, and the output says so.

Images are timed in memory, and as PNG files that either side decodes once before it makes all 35 variants. Where no
random numbers are involved, the largest difference in grey levels is printed beside the times.
"""

import os

# One core: before any library starts its threads.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import math
import platform
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import medrobust_lib as mr  # first: it lets torchvision import beside a CPU-only torch

# isort: split
import numpy as np
import pandas as pd
import scipy.ndimage
import torch
import typer
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image

from medrobust_lib.corruptions import MEDIMETA_C
from medrobust_lib.evaluation import Candidate, accuracy_table, corruption_answers
from medrobust_lib.models.weights import DEMO_FOLDER
from medrobust_lib.phantoms import MODALITIES

SEVERITIES = (1, 2, 3, 4, 5)
RANDOM = {"gaussian_noise", "impulse_noise", "motion_blur"}

PublicFunction = Callable[[Image.Image, int], np.ndarray]


def main(
    images: Annotated[int, typer.Option(help="Number of images.")] = 4,
    side: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 224,
    repeats: Annotated[int, typer.Option(help="Repetitions; medians are printed.")] = 3,
    dataset: Annotated[str, typer.Option(help="Data set id; its images are resized.")] = "phantom/histology",
    public_packages: Annotated[Path | None, typer.Option(help="Folder that holds imagecorruptions.")] = None,
) -> None:
    """Time both sides in turn and print milliseconds per image and their ratios."""
    batch = resized(mr.load_dataset(dataset, n=images).images, side)
    functions, source = public_functions(public_packages)
    typer.echo(f"{len(batch)} images of {side} x {side}, RGB; means of five severities; medians of {repeats} runs")
    typer.echo(f"against {source}")
    typer.echo(
        f"{platform.machine()}, one core; " + ", ".join(f"{p} {version(p)}" for p in ("numpy", "scipy", "pillow"))
    )
    rows = [compare(name, functions[name], batch, repeats) for name in MEDIMETA_C.corruptions]
    rows.append(total("sum of the seven, in memory", rows))
    rows.append(compare("jpeg_compression", functions["jpeg_compression"], batch, repeats))
    rows.append(from_disk(functions, batch, max(1, repeats - 1)))
    typer.echo(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="-"))
    typer.echo(gpu_line(batch, repeats))
    typer.echo(whole(functions, max(1, repeats - 2)))


def compare(name: str, public: PublicFunction, batch: np.ndarray, repeats: int) -> dict[str, object]:
    """Milliseconds per image of both sides, taken in turn, and how far they are apart."""

    def ours() -> np.ndarray:
        return np.stack([mr.corrupt(batch, name, severity=severity) for severity in SEVERITIES])

    def theirs() -> np.ndarray:
        pictures = [Image.fromarray(image) for image in batch]
        return np.stack([[np.uint8(public(picture, s)) for picture in pictures] for s in SEVERITIES])

    found, medians = in_turn({"ours": ours, "public": theirs}, repeats)
    difference = math.nan
    if name not in RANDOM:
        difference = int(np.abs(found["ours"].astype(int) - found["public"]).max())
    per_image = 1000 / (len(batch) * len(SEVERITIES))
    return as_row(name, medians["ours"] * per_image, medians["public"] * per_image, difference)


def from_disk(functions: dict[str, PublicFunction], batch: np.ndarray, repeats: int) -> dict[str, object]:
    """Time for the seven of both sides from PNG files on, each decoded once."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.png" for number in range(len(batch))]
        for path, image in zip(paths, batch, strict=True):
            Image.fromarray(image).save(path)

        def ours() -> None:
            read = np.stack([np.asarray(Image.open(path)) for path in paths])
            for name in MEDIMETA_C.corruptions:
                for severity in SEVERITIES:
                    mr.corrupt(read, name, severity=severity)

        def theirs() -> None:
            for path in paths:
                picture = Image.open(path).convert("RGB")
                for name in MEDIMETA_C.corruptions:
                    for severity in SEVERITIES:
                        np.uint8(functions[name](picture, severity))

        _, medians = in_turn({"ours": ours, "public": theirs}, repeats)
    per_image = 1000 / (len(batch) * len(SEVERITIES))
    return as_row("sum of the seven, from disk", medians["ours"] * per_image, medians["public"] * per_image)


def whole(functions: dict[str, PublicFunction], repeats: int, n: int = 18) -> str:
    """Notebook 05's accuracies of both demo models: the library, and public packages one model at a time."""
    ids = ("demo-clip", "demo-clip-vit")
    sets = [mr.load_dataset(f"phantom/{modality}", n=n) for modality in MODALITIES]
    models = {id: mr.load_model(id) for id in ids}

    def ours() -> np.ndarray:
        found = []
        for data in sets:
            texts = data.classes, data.templates[:1]
            candidates = {id: Candidate(model, model.class_features(*texts)) for id, model in models.items()}
            table = accuracy_table(corruption_answers(candidates, data), data)
            found.append(table.groupby("model", sort=False).accuracy.mean())
        return np.array(found).T

    def theirs() -> np.ndarray:
        return np.array([[public_accuracy(functions, id, data) for data in sets] for id in ids])

    found, medians = in_turn({"ours": ours, "public": theirs}, repeats)
    apart = np.abs(found["ours"] - found["public"]).max()  # the random corruptions are drawn anew
    return (
        f"notebook 05's accuracies, {len(ids)} models, {len(sets)} sets of {n} images: ours {medians['ours']:.1f} s, "
        f"public packages {medians['public']:.1f} s, ratio {medians['public'] / medians['ours']:.2f}; mean accuracies "
        f"at most {apart:.3f} apart"
    )


@torch.inference_mode()
def public_accuracy(functions: dict[str, PublicFunction], id: str, data: mr.ImageDataset) -> float:
    """Accuracy of a demo model by open_clip alone, mean over the clean images and all corruptions and severities."""
    import open_clip

    folder = f"local-dir:{DEMO_FOLDER / id}"
    network, _, preprocess = open_clip.create_model_and_transforms(folder)
    sentences = [data.templates[0].replace("{}", name) for name in data.classes]
    texts = network.eval().encode_text(open_clip.get_tokenizer(folder)(sentences), normalize=True)
    pictures = [Image.fromarray(image) for image in data.images]
    variants = [pictures]
    for name in MEDIMETA_C.corruptions:
        for severity in SEVERITIES:
            worse = [np.uint8(functions[name](picture, severity)) for picture in pictures]
            variants.append([Image.fromarray(image) for image in worse])
    hits = []
    for variant in variants:
        features = network.encode_image(torch.stack([preprocess(picture) for picture in variant]), normalize=True)
        hits.append(np.mean((features @ texts.T).argmax(1).numpy() == data.labels))
    return float(np.mean(hits))


def in_turn(sides: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, object], dict[str, float]]:
    """Last result and median processor seconds of each side; what else runs on the machine then matters less."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found = {}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            started = time.process_time()
            found[name] = run()
            if turn:  # the first round warms up
                seconds[name].append(time.process_time() - started)
    return found, {name: statistics.median(values) for name, values in seconds.items()}


def as_row(what: str, ours: float, public: float, difference: float = math.nan) -> dict[str, object]:
    """Row of the printed table."""
    return {
        "what": what,
        "ours ms": ours,
        "public ms": public,
        "public / ours": public / ours,
        "largest difference": difference,
    }


def total(what: str, rows: list[dict[str, object]]) -> dict[str, object]:
    """Row of sums."""
    return as_row(what, sum(row["ours ms"] for row in rows), sum(row["public ms"] for row in rows))


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """Images at the side length, uint8 [n, side, side, 3]."""
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in images])


def public_functions(folder: Path | None) -> tuple[dict[str, PublicFunction], str]:
    """Functions of imagecorruptions, or the plain formulas, and a line that says which."""
    if folder is not None:
        sys.path.append(str(folder))
    resources = types.ModuleType("pkg_resources")
    resources.resource_filename = lambda package, name: name
    interpolation = types.ModuleType("scipy.ndimage.interpolation")
    interpolation.map_coordinates = scipy.ndimage.map_coordinates
    for module in (resources, interpolation):
        sys.modules.setdefault(module.__name__, module)
    try:
        from imagecorruptions import corruptions as public
    except ImportError as error:
        return PLAIN, f"a plain version of the published formulas, a stand-in for imagecorruptions ({error})"
    names = (*MEDIMETA_C.corruptions, "jpeg_compression")
    return {name: getattr(public, name) for name in names}, (
        f"imagecorruptions {_version('imagecorruptions')} on scikit-image {_version('scikit-image')}, "
        f"OpenCV {public.cv2.__version__}, with stand-ins for pkg_resources and scipy.ndimage.interpolation"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown version)"


def gpu_line(batch: np.ndarray, repeats: int) -> str:
    """Milliseconds per image of Gaussian noise by torch on a GPU, the transfers included, if there is a GPU."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return "no GPU here, so nothing was timed on one; the library corrupts on the CPU"

    def noise() -> np.ndarray:
        pixels = torch.from_numpy(batch).to(device).float()
        noisy = torch.randn_like(pixels).mul_(0.18 * 255).add_(pixels).clamp_(0, 255)
        return noisy.byte().cpu().numpy()

    _, medians = in_turn({"gpu": noise}, repeats)
    return f"gaussian_noise by torch on {device}, there and back: {medians['gpu'] * 1000 / len(batch):.4g} ms per image"


# The published formulas as one would first write them: floats, one image at a time.


def _cut(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 1) * 255


def _plain_gaussian_noise(picture: Image.Image, severity: int) -> np.ndarray:
    image = np.array(picture) / 255.0
    return _cut(image + np.random.default_rng().normal(size=image.shape, scale=_constants("gaussian_noise", severity)))


def _plain_impulse_noise(picture: Image.Image, severity: int) -> np.ndarray:
    image, rng = np.array(picture) / 255.0, np.random.default_rng()
    replaced = rng.random(image.shape) <= _constants("impulse_noise", severity)
    salt = rng.random(image.shape) <= 0.5
    image[replaced & salt], image[replaced & ~salt] = 1, 0
    return _cut(image)


def _plain_motion_blur(picture: Image.Image, severity: int) -> np.ndarray:
    image = np.array(picture)
    radius, sigma = MEDIMETA_C.corruption("motion_blur").severities[severity - 1].values()
    angle = math.radians(np.random.default_rng().uniform(-45, 45))
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    blurred = np.zeros(image.shape)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down, right = math.ceil(step * math.sin(angle) - 0.5), math.ceil(step * math.cos(angle) - 0.5)
        rows = np.clip(np.arange(image.shape[0]) + down, 0, image.shape[0] - 1)
        columns = np.clip(np.arange(image.shape[1]) + right, 0, image.shape[1] - 1)
        blurred += weight * image[rows][:, columns]
    return np.clip(blurred, 0, 255)


def _plain_zoom_blur(picture: Image.Image, severity: int) -> np.ndarray:
    image = (np.array(picture) / 255.0).astype(np.float32)
    side, factors = len(image), _constants("zoom_blur", severity)
    mean = image.copy()
    for factor in factors:
        crop = math.ceil(side / factor)
        first = (side - crop) // 2
        centre = image[first : first + crop, first : first + crop]
        enlarged = scipy.ndimage.zoom(centre, (factor, factor, 1), order=1)
        trim = (len(enlarged) - side) // 2
        mean += enlarged[trim : trim + side, trim : trim + side]
    return _cut(mean / (len(factors) + 1))


def _plain_brightness(picture: Image.Image, severity: int) -> np.ndarray:
    hsv = rgb_to_hsv(np.array(picture) / 255.0)
    hsv[..., 2] = np.clip(hsv[..., 2] + _constants("brightness", severity), 0, 1)
    return _cut(hsv_to_rgb(hsv))


def _plain_contrast(picture: Image.Image, severity: int) -> np.ndarray:
    image = np.array(picture) / 255.0
    means = image.mean(axis=(0, 1), keepdims=True)
    return _cut((image - means) * _constants("contrast", severity) + means)


def _plain_pixelate(picture: Image.Image, severity: int) -> np.ndarray:
    factor = _constants("pixelate", severity)
    small = picture.resize((int(picture.width * factor), int(picture.height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.NEAREST))


def _plain_jpeg_compression(picture: Image.Image, severity: int) -> np.ndarray:
    with tempfile.SpooledTemporaryFile() as file:
        picture.save(file, "JPEG", quality=_constants("jpeg_compression", severity))
        return np.asarray(Image.open(file))


def _constants(name: str, severity: int) -> float | tuple[float, ...]:
    (value,) = MEDIMETA_C.corruption(name).severities[severity - 1].values()
    return value


PLAIN: dict[str, PublicFunction] = {
    "gaussian_noise": _plain_gaussian_noise,
    "impulse_noise": _plain_impulse_noise,
    "motion_blur": _plain_motion_blur,
    "zoom_blur": _plain_zoom_blur,
    "brightness": _plain_brightness,
    "contrast": _plain_contrast,
    "pixelate": _plain_pixelate,
    "jpeg_compression": _plain_jpeg_compression,
}


if __name__ == "__main__":
    typer.run(main)
