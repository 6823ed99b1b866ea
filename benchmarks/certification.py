"""Certification side by side: draws, sharing between methods, time and memory, and the rate on a GPU.

Everything that is compared runs in one call of this script, on the same images, and is printed as a ratio.

    python benchmarks/certification.py                    # all parts, about ten minutes on two cores
    python benchmarks/certification.py draws sharing      # some of them
    python benchmarks/certification.py bounds             # one bound and two on the same draws, a few minutes
    python benchmarks/certification.py precision          # bfloat16 and int8 against float32 on the CPU, two minutes
    python benchmarks/certification.py rate --out FILE    # on an accelerator: less than ten minutes
"""

import copy
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import medrobust_lib as mr  # first: it lets torchvision import beside a CPU-only torch

# isort: split
import numpy as np
import pandas as pd
import torch
import typer

from medrobust_lib import metrics
from medrobust_lib.experiments import write_text_atomically
from medrobust_lib.experiments.cards import environment
from medrobust_lib.models.int8 import PACKAGES, int8_tower
from medrobust_lib.models.loading import resolve_device
from medrobust_lib.models.weights import DEMO_FOLDER
from medrobust_lib.smoothing.bounds import probability_of_radius
from medrobust_lib.smoothing.methods import FixedPrompts, PromptClassifier, zero_shot_methods
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies, suggested_batch_size
from medrobust_lib.smoothing.perturbations import PERTURBATIONS, PIXEL_NOISE, Perturbation
from medrobust_lib.smoothing.sequential import operating_characteristics, price_of_radii, sequential_plan
from medrobust_lib.studies.cells import measured_rate

ALPHA, N0, N = 0.001, 100, 10_000
SIGMAS = (0.1, 0.25, 0.5, 1.0)
# Dense peak of bfloat16 matrix products, in FLOP/s, by what the device calls itself (vendor's data sheets).
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}

app = typer.Typer(add_completion=False)


def draws(dataset: str, images: int, probe: int) -> pd.DataFrame:
    """(a) Mean draws and certified accuracy of sequential against fixed sampling at equal alpha.

    Asked for the papers' eight radii, and for the grid of 0.05 sigma that stands in where no radii are named.
    The vote shares of `probe` noisy copies stand for the true probabilities; everything after that is exact
    (no second sampling), so that a loss of 0.1 points is visible with few images.
    """
    model, data = mr.load_model("demo-clip"), mr.load_dataset(dataset, n=images)
    features = model.class_features(data.classes, data.templates)
    rows = []
    for sigma in SIGMAS:
        plans = {
            "papers'": sequential_plan(sigma=sigma, radii=PIXEL_NOISE.radii, n=N, alpha=ALPHA),
            "grid": sequential_plan(sigma=sigma, n=N, alpha=ALPHA),
        }
        shares = _vote_shares(model, data, features, sigma=sigma, n=probe)
        votes = {
            "evaluate": shares[np.arange(len(data)), data.labels],
            "predict, class that wins": shares.max(axis=1),
        }
        for (radii, plan), (mode, p) in itertools.product(plans.items(), votes.items()):
            exact = [operating_characteristics(plan, value) for value in p]
            sequential = np.mean([proved for proved, _ in exact], axis=0)
            fixed = np.array([np.mean(probability_of_radius(p, N, ALPHA, radius=r, sigma=sigma)) for r in plan.radii])
            extra = N0 if mode.startswith("predict") else 0
            mean = float(np.mean([count for _, count in exact])) + extra
            rows.append(
                {
                    "radii": radii,
                    "mode": mode,
                    "sigma": sigma,
                    "sequential draws": mean,
                    "fixed draws": N0 + N,
                    "ratio": mean / (N0 + N),
                    "points lost at worst": 100 * float(np.max(fixed - sequential)),
                    "certified at radius 0": float(sequential[0]),
                }
            )
    table = pd.DataFrame(rows)
    means = table.groupby(["radii", "mode"], sort=False).agg(
        {
            "sequential draws": "mean",
            "fixed draws": "mean",
            "points lost at worst": "max",
            "certified at radius 0": "mean",
        }
    )
    means["ratio"] = means["sequential draws"] / means["fixed draws"]
    return pd.concat([table, means.reset_index().assign(sigma="all")])[list(table.columns)]


def price(sigma: float = 0.5) -> pd.DataFrame:
    """Draws that each radius costs at sigma, for an image that every noisy copy classifies alike."""
    return price_of_radii(PIXEL_NOISE.radii, sigma=sigma, n=N, alpha=ALPHA)


def two_bounds(images: int, n: int = 1000, sigma: float = 0.25) -> pd.DataFrame:
    """Certified accuracy by one bound and by two, and draws, of zero-shot demo-clip on the same noise."""
    model, radii, rows = mr.load_model("demo-clip"), (0.0, 0.05, 0.1, 0.25, 0.5), []
    for dataset, sampling in itertools.product(("phantom/histology", "phantom/blood"), ("fixed", "sequential")):
        data = mr.load_dataset(dataset, n=images)
        method = zero_shot_methods(model, data)[0]
        for bounds in ("one", "two"):
            asked = {"sigmas": [sigma], "n0": N0, "n": n, "alpha": ALPHA, "radii": radii, "sampling": sampling}
            table = mr.certify_dataset(model, data, [method], bounds=bounds, **asked)
            shares = metrics.certified_accuracy(table, radii=radii).set_index("radius")["certified_accuracy"]
            row = {"dataset": dataset, "images": len(data), "sampling": sampling, "bounds": bounds}
            row |= {"by two": int((table["bounds"] == "two").sum()), "draws": table["draws"].mean()}
            rows.append(row | {f"r = {radius:g}": shares[radius] for radius in radii})
    return pd.DataFrame(rows)


def speed(repeats: int, n: int = 1000) -> pd.DataFrame:
    """Draws a second of both demo models, against a loop around open_clip itself with torch's own noise."""
    rows = []
    for id in ("demo-clip", "demo-clip-vit"):
        model, data = mr.load_model(id), mr.load_dataset("phantom/blood", n=8)
        features = model.class_features(data.classes, data.templates[:1])
        image, classifier = model.prepare(data.images[:1])[0], PromptClassifier(model, features)
        seconds = _alternate(
            {
                "open_clip": partial(_open_clip_loop, *_open_clip(id), features, image, n),
                "medrobust": partial(mr.certify, classifier, image, sigma=0.25, n0=100, n=n - 100),
            },
            repeats,
        )
        ratios = np.divide(seconds["open_clip"], seconds["medrobust"])
        rates = {f"{name}, draws/s": n / statistics.median(values) for name, values in seconds.items()}
        spread = {"ratio": statistics.median(ratios), "lowest": ratios.min(), "highest": ratios.max()}
        rows.append({"model": id, **rates, **spread, "repeats": repeats})
    return pd.DataFrame(rows)


def _open_clip(id: str) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    """Network of a demo model and its normalisation, both by open_clip alone."""
    import open_clip

    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{DEMO_FOLDER / id}")
    return network.eval(), preprocess.transforms[-1]


@torch.inference_mode()
def _open_clip_loop(network: Any, normalise: Callable, features: torch.Tensor, image: torch.Tensor, n: int) -> None:
    for _ in range(n // 100):
        copies = normalise(image.repeat(100, 1, 1, 1) + 0.25 * torch.randn(100, *image.shape))
        (network.encode_image(copies, normalize=True) @ features.T).argmax(1)


def sharing(repeats: int, images: int = 3, n: int = 500) -> pd.DataFrame:
    """(b) Time of seven prompt methods through one bank, against one method."""
    model, data = mr.load_model("demo-clip"), mr.load_dataset("phantom/blood", n=images)
    seven = [
        FixedPrompts(
            f"template {number}", model.class_features(data.classes, [data.templates[number % len(data.templates)]])
        )
        for number in range(7)
    ]

    def certify(methods: Sequence[FixedPrompts]) -> Callable[[], object]:
        return lambda: mr.certify_dataset(model, data, methods, sigmas=[0.25], n=n, sampling="fixed")

    seconds = _alternate({"one method": certify(seven[:1]), "seven methods": certify(seven)}, repeats)
    return _ratios(seconds, base="one method")


def perturbations(repeats: int, n: int = 1000, images: int = 2) -> pd.DataFrame:
    """(c) Time of a draw under every perturbation, against pixel noise; rounds are interleaved."""
    model, data = mr.load_model("demo-clip"), mr.load_dataset("phantom/blood", n=8)
    classifier = PromptClassifier(model, model.class_features(data.classes, data.templates[:1]))
    prepared = model.prepare(data.images[:images])

    def certify(family: Perturbation) -> Callable[[], object]:
        words = {"sigma": family.usual_sigma, "perturbation": family, "n0": N0, "n": n - N0}
        return lambda: [mr.certify(classifier, image, **words) for image in prepared]

    timed = {name: certify(family) for name, family in PERTURBATIONS.items()}
    seconds = _alternate(timed, repeats)
    table = _ratios(seconds, base=PIXEL_NOISE.name)
    return table.assign(**{"ms per draw": 1e3 * table["seconds"] / (n * images)})


def loops(n: int, art_n: int, repeats: int) -> pd.DataFrame:
    """(d) Seconds and peak memory of one image against a plain Cohen loop and, if installed, ART.

    Each runs in a process of its own, since peak memory is a property of processes; the memory of the process
    before certifying is taken off.
    """
    contenders = {"medrobust, fixed": n, "medrobust, sequential": n, "plain Cohen loop": n, "ART": art_n}
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, count in contenders.items():
            command = [sys.executable, __file__, "contender", name, "--n", str(count)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                measured[name].append(json.loads(done.stdout.splitlines()[-1]))
            elif name != "ART" or "ModuleNotFoundError" not in done.stderr:
                raise RuntimeError(done.stderr)
    rows = []
    for name, results in measured.items():
        if not results:
            rows.append({"contender": name, "note": "not installed"})
            continue
        seconds = statistics.median(result["seconds"] for result in results)
        rows.append(
            {
                "contender": name,
                "draws": results[0]["draws"],
                "seconds": seconds,
                "ms per draw": 1e3 * seconds / results[0]["draws"],
                "peak MB": statistics.median(result["peak_mb"] for result in results),
            }
        )
    table = pd.DataFrame(rows)
    cohen = table.set_index("contender").loc["plain Cohen loop"]
    table["seconds / Cohen"] = table["seconds"] / cohen["seconds"]
    table["ms per draw / Cohen"] = table["ms per draw"] / cohen["ms per draw"]
    return table


def rate(device: str, n: int, methods: int = 5, images: int = 3) -> pd.DataFrame:
    """(e) Seconds an image, share of the device's bfloat16 peak, and wait on the host, of three image towers."""
    from torch.utils.flop_counter import FlopCounterMode

    target = resolve_device(device)
    data = mr.load_dataset("phantom/blood", n=images)
    peak = next((value for name, value in BF16_PEAK.items() if name in _device_name(target)), float("nan"))
    rows = []
    for name in ("demo-clip", "ViT-B-32", "ViT-B-16"):
        model = _tower(name, target)
        prompts = [
            FixedPrompts(
                f"prompts {number}",
                torch.nn.functional.normalize(torch.randn(8, model.embed_dim, generator=_generator(number)), dim=1),
            )
            for number in range(methods)
        ]
        side = model.image_size
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.encode_image(torch.zeros(1, 3, side, side))
        # Warm-up: kernels are chosen, memory is reserved.
        mr.certify_dataset(model, data.subset([0]), prompts, sigmas=[0.25], n=min(n, 1000), sampling="fixed")
        for sampling, chosen in (("fixed", prompts[:1]), ("fixed", prompts), ("sequential", prompts)):
            table = mr.certify_dataset(model, data, chosen, sigmas=[0.25], n=n, sampling=sampling)
            per_image = table.groupby("image").agg({"seconds": "first", "draws": "max"})
            seconds, encoded = per_image["seconds"].median(), per_image["draws"].mean()
            rows.append(
                {
                    "tower": name,
                    "dtype": model.precision,
                    "batch": suggested_batch_size(target, (3, side, side)),
                    "sampling": sampling,
                    "methods": len(chosen),
                    "draws": encoded,
                    "seconds per image": seconds,
                    "draws/s": encoded / seconds,
                    "share of bf16 peak": counter.get_total_flops() * encoded / seconds / peak,
                    "waits on host": 1 - _device_seconds(model, data, int(encoded)) / seconds,
                }
            )
    return pd.DataFrame(rows).assign(device=_device_name(target))


def precision(images: int, repeats: int, copies: int = 200, sigmas: Sequence[float] = (0.1, 0.25)) -> pd.DataFrame:
    """(f) Draws a second of one thread on the CPU, in its own seconds, and votes that are others than in float32.

    All votes are on the same noisy copies. Votes of random weights would say nothing, so they are left out.
    """
    asked = ("float32", "bfloat16", *(["int8"] if all(map(find_spec, PACKAGES)) else []))
    data, threads, rows = mr.load_dataset("phantom/blood", n=images), torch.get_num_threads(), []
    torch.set_num_threads(1)
    for name in ("demo-clip", "demo-clip-vit", "ViT-B-16"):
        whole = _tower(name, torch.device("cpu"))
        models = {kind: _in_precision(whole, kind) for kind in asked}
        probe = partial(measured_rate, data=data, seconds=2.0, clock=time.process_time)
        rates = pd.DataFrame([{kind: probe(model) for kind, model in models.items()} for _ in range(repeats)])
        ratios = rates.div(rates["float32"], axis=0)
        votes = {
            kind: np.stack([_votes(model, data, _zero_shot(model, data), sigma=sigma, n=copies) for sigma in sigmas])
            for kind, model in models.items()
            if whole.id == name
        }
        for kind in asked:
            row = {"tower": name, "dtype": models[kind].precision, "draws/s": rates[kind].median()}
            row |= {"ratio": ratios[kind].median(), "lowest": ratios[kind].min(), "highest": ratios[kind].max()}
            row |= {f"differ, sigma {sigma}": np.nan for sigma in sigmas}
            if votes:
                differ = (votes[kind] != votes["float32"]).mean(axis=(1, 2))
                row |= {f"differ, sigma {sigma}": share for sigma, share in zip(sigmas, differ, strict=True)}
            rows.append(row | {"votes": votes[kind][0].size if votes else 0})
    torch.set_num_threads(threads)
    return pd.DataFrame(rows)


def _in_precision(model: Any, precision: str) -> Any:
    """Copy of a model in float32 whose towers, in int8 the image tower, compute in another precision."""
    found = copy.deepcopy(model)
    if precision != "int8":
        return found.to(getattr(torch, precision))
    found.int8 = int8_tower(model)
    return found


def _zero_shot(model: Any, data: Any) -> torch.Tensor:
    return model.class_features(data.classes, data.templates[:1])


def _tower(name: str, device: torch.device) -> Any:
    """A demo model, or an architecture of open_clip with random weights; bfloat16 on an accelerator."""
    import open_clip

    from medrobust_lib.models.open_clip import OpenClipEncoder

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if name.startswith("demo-"):
        return mr.load_model(name, device=str(device), dtype=dtype)
    network = open_clip.create_model(name, pretrained=None)
    model = OpenClipEncoder(network, open_clip.get_tokenizer(name), id=f"random-{name}", provenance={})
    return model.requires_grad_(False).eval().to(device=device, dtype=dtype, memory_format=torch.channels_last)


@torch.inference_mode()
def _device_seconds(model: Any, data: Any, draws: int) -> float:
    """Seconds for as many noisy copies with nothing that the host would wait for in between."""
    pixels = model.prepare(data.images[:1])[0].to(model.device)
    stream, size = NoiseStream(0, data.id, 0, 0.25, "estimate"), suggested_batch_size(model.device, pixels.shape)
    _synchronise(model.device)
    started = time.perf_counter()
    for first in range(0, draws, size):
        model.encode_image(noisy_copies(pixels, stream, first=first, count=min(size, draws - first)))
    _synchronise(model.device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@app.command()
def main(
    parts: Annotated[list[str] | None, typer.Argument(help="Some of the parts; default: all.")] = None,
    dataset: Annotated[str, typer.Option(help="Data set of part draws.")] = "phantom/blood",
    images: Annotated[int, typer.Option(help="Images of parts draws and bounds.")] = 48,
    probe: Annotated[int, typer.Option(help="Noisy copies that estimate each vote share.")] = 500,
    n: Annotated[int, typer.Option(help="Draws per image of parts loops and rate on a CPU.")] = 2000,
    repeats: Annotated[int, typer.Option(help="Repetitions of timings; medians are printed.")] = 3,
    device: Annotated[str, typer.Option(help="Device of part rate.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write the tables here as JSON.")] = None,
) -> None:
    """Run the chosen parts and print their tables."""
    on_cpu = resolve_device(device).type == "cpu"
    known: dict[str, tuple[str, Callable[[], pd.DataFrame]]] = {
        "draws": (f"(a) draws, {dataset}, n={N:,}, alpha={ALPHA}", lambda: draws(dataset, images, probe)),
        "bounds": (f"(a) one bound and two, zero-shot, sigma 0.25, n=1,000, alpha={ALPHA}", lambda: two_bounds(images)),
        "price": ("(a) price of each radius at sigma 0.5, in draws of a unanimous image", price),
        "speed": ("(a) both demo models against a plain loop around open_clip, 64 px", lambda: speed(repeats)),
        "sharing": ("(b) seven prompt methods, one bank", lambda: sharing(repeats)),
        "perturbations": ("(c) a draw under every perturbation, demo-clip", lambda: perturbations(repeats)),
        "loops": ("(d) one 64 px image, demo-clip", lambda: loops(n, min(n, 1000), repeats)),
        "rate": (
            "(e) demo-clip, and two transformers at 224 px with random weights",
            lambda: rate(device, 200 if on_cpu else N),
        ),
        "precision": (
            "(f) a thread of the CPU by precision, and votes unlike float32",
            lambda: precision(images, repeats),
        ),
    }
    unknown = sorted(set(parts or ()) - set(known))
    if unknown:
        raise typer.BadParameter(f"unknown part {', '.join(unknown)}; choose from {', '.join(known)}")
    record = {"environment": environment(), "device": _device_name(resolve_device(device)), "parts": {}}
    for name in parts or known:
        title, measure = known[name]
        started = time.perf_counter()
        table = measure()
        record["parts"][name] = json.loads(table.to_json(orient="records"))
        print(f"\n{title}\n{table.to_string(index=False, float_format=lambda value: f'{value:.4g}')}")
        print(f"measured in {time.perf_counter() - started:.0f} s", flush=True)
    if out is not None:
        write_text_atomically(out, json.dumps(record, indent=2) + "\n")


def contender(name: str, n: int) -> dict[str, float]:
    """Certify one image in this process and tell seconds and peak memory."""
    model, data = mr.load_model("demo-clip"), mr.load_dataset("phantom/blood", n=8)
    method = zero_shot_methods(model, data)[0]
    image, sigma = model.prepare(data.images[:1])[0], 0.05
    classifier = PromptClassifier(model, method.class_features)
    certify = {
        "medrobust, fixed": lambda: mr.certify(classifier, image, sigma=sigma, n0=N0, n=n).draws,
        "medrobust, sequential": lambda: (
            mr.certify(classifier, image, sigma=sigma, n0=N0, n=n, sampling="sequential", radii=PIXEL_NOISE.radii).draws
        ),
        "plain Cohen loop": lambda: _cohen_loop(model, method.class_features, image, sigma=sigma, n=n),
        "ART": lambda: _art(model, method.class_features, image, sigma=sigma, n=n),
    }[name]
    if name == "ART":
        import art.estimators.certification.randomized_smoothing  # noqa: F401 - the import is not part of the time
    with torch.inference_mode():
        model.encode_image(image[None])
    before, started = _peak_mb(), time.perf_counter()
    made = certify()
    return {"seconds": time.perf_counter() - started, "draws": made, "peak_mb": _peak_mb() - before}


@torch.inference_mode()
def _cohen_loop(model: Any, features: torch.Tensor, image: torch.Tensor, *, sigma: float, n: int) -> int:
    """CERTIFY written plainly: repeat, randn_like, add, classify, count on the host one answer at a time."""
    from scipy.stats import beta, norm

    def sample(number: int, batch_size: int = 100) -> np.ndarray:
        counts = np.zeros(len(features), dtype=int)
        for start in range(0, number, batch_size):
            this_batch = min(batch_size, number - start)
            batch = image.repeat((this_batch, 1, 1, 1))
            noise = torch.randn_like(batch) * sigma
            scores = model.probabilities(model.encode_image(batch + noise), features)
            for answer in scores.argmax(1).cpu().numpy():
                counts[answer] += 1
        return counts

    chosen = sample(N0).argmax().item()
    k = sample(n)[chosen].item()
    p_lower = beta.ppf(ALPHA, k, n - k + 1)
    _ = sigma * norm.ppf(p_lower)
    return N0 + n


def _art(model: Any, features: torch.Tensor, image: torch.Tensor, *, sigma: float, n: int) -> int:
    """The Adversarial Robustness Toolbox's certify, with as many selection draws as ours."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    class Scores(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return model.probabilities(model.encode_image(pixels), features)

    smoothed = PyTorchRandomizedSmoothing(
        model=Scores(), loss=torch.nn.CrossEntropyLoss(), input_shape=tuple(image.shape), nb_classes=len(features),
        channels_first=True, clip_values=None, sample_size=N0, scale=sigma, alpha=ALPHA,
    )  # fmt: skip
    smoothed.certify(image[None].numpy(), n=n, batch_size=100)
    return N0 + n


@torch.inference_mode()
def _vote_shares(model: Any, data: Any, features: torch.Tensor, *, sigma: float, n: int) -> np.ndarray:
    """Shares of n votes, float64 [images, K]."""
    votes = _votes(model, data, features, sigma=sigma, n=n)
    return np.stack([np.bincount(row, minlength=len(features)) for row in votes]) / n


@torch.inference_mode()
def _votes(model: Any, data: Any, features: torch.Tensor, *, sigma: float, n: int) -> np.ndarray:
    """Labels of n noisy copies of each image, int64 [images, n]."""
    answer = PromptClassifier(model, features)
    batch = suggested_batch_size(model.device, (3, model.image_size, model.image_size))
    votes = np.empty((len(data), n), dtype=np.int64)
    for row, pixels in enumerate(model.prepare(data.images)):
        stream = NoiseStream(0, data.id, int(data.indices[row]), sigma, "estimate")
        for first in range(0, n, batch):
            labels = answer(noisy_copies(pixels, stream, first=first, count=min(batch, n - first)))
            votes[row, first : first + batch] = labels.cpu().numpy()
    return votes


def _alternate(timed: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, so that a busy moment of the machine hits all alike; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(repeats + 1):
        for name, run in timed.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _ratios(seconds: dict[str, list[float]], *, base: str) -> pd.DataFrame:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return pd.DataFrame(
        [
            {"what": name, "seconds": value, f"ratio to {base}": value / medians[base], "repeats": len(seconds[name])}
            for name, value in medians.items()
        ]
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _device_name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    if sys.argv[1:2] == ["contender"]:
        print(json.dumps(contender(sys.argv[2], int(sys.argv[4]))))
    else:
        app()
