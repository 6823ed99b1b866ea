"""Is this installation sound, is a model, and is a result card? Every check says what it found and how to mend it."""

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from medrobust_lib import _torchvision, runner
from medrobust_lib.experiments.cards import environment, parameters_hash
from medrobust_lib.files import told
from medrobust_lib.places import default_weights_dir, project_root

if TYPE_CHECKING:
    from medrobust_lib.data.dataset import ImageDataset
    from medrobust_lib.models.dual_encoder import DualEncoder

REFERENCE_FILE = Path(__file__).parent / "models" / "demo" / "demo-clip" / "reference_prediction.json"
# Different processors sum in a different order; a wrong preprocessing or weight moves far more.
REFERENCE_TOLERANCE = 1e-3
_LEVELS = 2  # of 256, by which the resize of torchvision, in processors of transformers, may differ from Pillow's
_SITE_PACKAGES = ("sphinx", "myst-nb", "pydata-sphinx-theme", "numpydoc")  # the extra docs
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)


class Finding(NamedTuple):
    """One check: its name, whether it passed, and what was found (with the fix if it did not)."""

    check: str
    passed: bool
    detail: str


def examine() -> Iterator[Finding]:
    """Run all checks, one finding at a time."""
    for check in (_python, _packages, _torchvision_import, _kernel, _accelerator, _weights, _data, _reference):
        yield _found(check)


def examine_model(id: str) -> Iterator[Finding]:
    """Load a dual encoder and check what a certificate relies on, one finding at a time.

    Parameters
    ----------
    id : str
        As for `load_model`.

    Yields
    ------
    Finding
        The model; its preprocessing beside that of its own library, where there is one; whether features are finite
        and independent of the rest of a batch; whether prompts and adapters can be learned; and draws of noise a
        second, with what a certificate would cost.
        After a model that cannot be loaded there are no others.
    """
    from medrobust_lib.data.registry import load_dataset
    from medrobust_lib.models.loading import load_model

    try:
        model = load_model(id)
    except Exception as error:  # one's own loader raises anything
        yield _failed("model", error)
        return
    yield Finding("model", True, repr(model))
    data = load_dataset("phantom/blood", n=8)
    for check in (_preprocessing, _features, _capabilities, _speed):
        yield _found(check, model, data, id)


def examine_cards(cards: Iterable[Mapping[str, Any]], *, allow_versions: bool = False) -> Iterator[Finding]:
    """Check whether result cards may join a leaderboard of this installation, one finding at a time.

    Parameters
    ----------
    cards : iterable of mapping
        From `read_cards`.
    allow_versions : bool
        Whether a card of another version of this library is told instead of refused.

    Yields
    ------
    Finding
        demo-clip's reference prediction; then one for each card: its parameters beside their hash, the versions, and
        the weights and images that it names beside those here, where they come with the package.
    """
    yield _found(_reference)
    for card in cards:
        yield _found(_card, card, allow_versions)


def _found(check: Callable[..., str], *given: Any) -> Finding:
    name = check.__name__.lstrip("_").replace("_", " ")
    try:
        return Finding(name, True, check(*given))
    except Exception as error:  # and so does one's own model
        return _failed(name, error)


def _failed(check: str, error: Exception) -> Finding:
    # What has no words for a reader, such as a KeyError, is known by its kind.
    return Finding(check, False, told(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {error}")


def reference_prediction() -> dict[str, object]:
    """Probabilities of demo-clip on eight images of ``phantom/blood``, on the CPU in float32."""
    from medrobust_lib.data.registry import load_dataset
    from medrobust_lib.models.loading import load_model

    model = load_model("demo-clip", device="cpu", dtype="float32")
    data = load_dataset("phantom/blood", n=8)
    classes = model.class_features(data.classes, data.templates[:1])
    probabilities = model.probabilities(model.encode_image(model.prepare(data.images)), classes)
    return {
        "model": "demo-clip",
        "dataset": "phantom/blood",
        "images": len(data.images),
        "template": data.templates[0],
        "probabilities": [[round(p, 6) for p in row] for row in probabilities.tolist()],
    }


def _python() -> str:
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"


def _packages() -> str:
    """Compare what is installed with the tested pins, where the checkout holds them."""
    constraints = project_root() / "constraints.txt"
    if not constraints.exists():
        return "no constraints.txt beside this installation, versions not compared"
    from medrobust_lib.models.int8 import PACKAGES

    differ = []
    pins = dict(line.split("==", 1) for line in constraints.read_text().splitlines() if "==" in line and line[0] != "#")
    for name in (*PACKAGES, *_SITE_PACKAGES):  # extras that `make install` leaves out
        if find_spec(name.replace("-", "_")) is None:
            pins.pop(name, None)
    for name, pin in pins.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = "missing"
        if installed.split("+")[0] != pin:
            differ.append(f"{name} {installed} (tested: {pin})")
    if differ:
        mend = "`pip install -c constraints.txt -e .[dev,cluster,dicom]`"
        raise RuntimeError(f"not as tested: {'; '.join(differ)}. {mend} mends it")
    return f"{len(pins)} packages at their tested versions"


def _torchvision_import() -> str:
    import torchvision

    how = "repaired by the guard (CPU-only torch)" if _torchvision.was_repaired() else "imports by itself"
    return f"torchvision {torchvision.__version__} {how}"


def _kernel() -> str:
    runner.check_kernel()
    return "the Jupyter kernel 'python3' runs in this environment"


def _accelerator() -> str:
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return f"{device.type} with torch {torch.__version__}" if device else f"none, torch {torch.__version__} on the CPU"


def _weights() -> str:
    import pandas as pd

    from medrobust_lib.models.loading import list_models, list_vlms

    models = pd.concat([table[["id", "available_offline"]] for table in (list_models(), list_vlms())])
    found = models[models["available_offline"]]["id"].tolist()
    return f"{', '.join(found)} ({len(models) - len(found)} more with data_scripts/fetch_weights.py)"


def _data() -> str:
    from medrobust_lib.data.registry import list_datasets

    datasets = list_datasets()
    downloaded = [i for i in datasets[datasets["available"]]["id"] if not i.startswith("phantom/")]
    return f"phantoms, and {', '.join(downloaded) or 'nothing downloaded yet (see `medrobust datasets`)'}"


def _reference() -> str:
    expected = json.loads(REFERENCE_FILE.read_text())
    found = reference_prediction()
    gap = float(np.abs(np.subtract(found["probabilities"], expected["probabilities"])).max())
    if gap > REFERENCE_TOLERANCE:
        raise RuntimeError(
            f"demo-clip differs from its reference prediction by {gap:.4f} (allowed {REFERENCE_TOLERANCE}); "
            "the weights, the preprocessing or a library changed: reinstall with constraints.txt"
        )
    return f"demo-clip equals its reference prediction within {gap:.1e}"


def _card(card: Mapping[str, Any], allow_versions: bool) -> str:
    from medrobust_lib.data.registry import load_dataset
    from medrobust_lib.models import catalogue
    from medrobust_lib.models.loading import load_model

    model, data, mine, theirs = card["model"], card["dataset"], environment(), card["environment"]
    if (found := parameters_hash(card["parameters"])) != card["parameters_hash"]:
        raise ValueError(
            f"{card['title']}: its parameters have the hash {found}, it says {card['parameters_hash']}: "
            "somebody changed the card; run it again"
        )
    differ = [f"{name} {theirs.get(name)} (here: {mine[name]})" for name in mine if theirs.get(name) != mine[name]]
    if theirs.get("medrobust-lib") != mine["medrobust-lib"] and not allow_versions:
        raise ValueError(f"{card['title']}: {'; '.join(differ)}; run it again here, or allow it: --allow-versions")
    pairs = {}
    if "weights" in model and any(row.id == model["id"] and row.shipped for row in catalogue.DUAL_ENCODERS):
        pairs["weights"] = (
            model["weights"],
            load_model(model["id"], dtype=model.get("dtype", "auto")).identity()["weights"],
        )
    if "seed" in data.get("drawn", {}) and data["id"].startswith("phantom/"):
        again = load_dataset(data["id"], split=data["split"], **data["drawn"])
        pairs["images"] = data.get("fingerprint"), again.identity()["fingerprint"]
    for what, (named, here) in pairs.items():
        if named != here:
            raise ValueError(f"{card['title']}: its {what} are {named}, here they are {here}; run it again here")
    unchecked = [f"{what} not checked" for what in ("weights", "images") if what not in pairs]
    return "; ".join(
        [f"{card['title']}: parameters{''.join(f', {what}' for what in pairs)} as here", *unchecked, *differ]
    )


def _preprocessing(model: "DualEncoder", data: "ImageDataset", id: str) -> str:
    from PIL import Image

    name, own = _own_processor(model, id)
    if own is None:
        return f"{name}; to {model.image_size} px, {model.preprocessing.geometry}, {model.preprocessing.interpolation}"
    wide = Image.fromarray(data.images[0]).resize((301, 200))
    images = [Image.fromarray(data.images[1]), wide, wide.rotate(90, expand=True), wide.resize((61, 47))]
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (model.preprocessing.mean, model.preprocessing.std))
    found = [np.asarray(own(image)) for image in images]
    shapes, side = {one.shape for one in found}, model.image_size
    if shapes != {(3, side, side)}:
        raise ValueError(f"{name} makes {shapes} of images, this library (3, {side}, {side})")
    # Where the normalisation differs, so do the pixels that would have given the same values.
    gap = max(
        np.abs(one * std + mean - ours).max() for one, ours in zip(found, model.prepare(images).numpy(), strict=True)
    )
    if gap > _LEVELS / 255 + 1e-4:
        raise ValueError(
            f"pixels differ by {gap * 255:.1f} of 256 levels from those of {name}: size, crop, filter or normalisation "
            f"are not the model's ({model.preprocessing})"
        )
    return f"that of {name} within {gap * 255:.1f} of 256 levels, on four sizes"


def _own_processor(model: "DualEncoder", id: str) -> tuple[str, Callable[[Any], Any] | None]:
    """Name of what prepares an image in the model's own library, and a function that does; None without one."""
    from medrobust_lib.models import catalogue, weights
    from medrobust_lib.models.loading import find_model

    settings = getattr(getattr(getattr(model, "model", None), "visual", None), "preprocess_cfg", None)
    if settings is not None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return "open_clip", image_transform_v2(PreprocessCfg(**settings), is_train=False)
    entry = find_model(id)
    folder = weights.model_folder(entry, default_weights_dir())
    if folder is None and entry.source.startswith(catalogue.HUB_PREFIX):
        folder = weights.hub_snapshot(entry.source.removeprefix(catalogue.HUB_PREFIX), catalogue.CONFIG_NAME)
    if folder is None or not {"preprocessor_config.json", "processor_config.json"} & {x.name for x in folder.iterdir()}:
        return "no processor of its own to compare with", None
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    return type(processor).__name__, lambda image: processor(image, return_tensors="np")["pixel_values"][0]


def _features(model: "DualEncoder", data: "ImageDataset", id: str) -> str:
    import torch

    from medrobust_lib.models.own import Classifier

    pixels = model.prepare(data.images)
    noise, blank = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)), torch.zeros_like(pixels[:1])
    pixels = torch.cat([pixels, pixels + 0.25 * noise, pixels + noise, blank, blank + 1])
    with torch.inference_mode():  # features that are not finite raise an error of their own
        if not isinstance(model, Classifier):
            model.class_features(data.classes, data.templates)
        together, alone = model.encode_image(pixels), torch.cat([model.encode_image(one[None]) for one in pixels])
    gap, rounding = float((together - alone).abs().max()), 1e-4 if model.dtype == torch.float32 else 0.02
    if gap > rounding:
        raise ValueError(
            f"features alone and in a batch differ by {gap:.2g} (rounding: {rounding:g}): an answer hangs on the other "
            "copies, which no certificate allows; look for statistics of the batch, or certify with batch_size=1"
        )
    return f"finite, and the same alone and in a batch within {gap:.1e}: {len(pixels)} images, clean, noisy and blank"


def _capabilities(model: "DualEncoder", data: "ImageDataset", id: str) -> str:
    from medrobust_lib.models.adapters import attach_adapters
    from medrobust_lib.models.text_frame import why_not_learned

    try:
        attach_adapters(model, rank=1)  # to a copy, which a function may not be part of
        adapters = "low-rank adapters have their place"
    except (ValueError, TypeError) as error:  # a server or a session cannot be copied
        adapters = str(error)
    return f"zero-shot, corruptions and certificates; {why_not_learned(model) or 'prompts can be learned'}; {adapters}"


def _speed(model: "DualEncoder", data: "ImageDataset", id: str) -> str:
    from dataclasses import replace

    from medrobust_lib.models.own import Classifier
    from medrobust_lib.smoothing.bounds import N0, N
    from medrobust_lib.studies.cells import measured_rate

    if isinstance(model, Classifier):  # of other classes
        data = replace(data, classes=tuple(map(str, range(model.embed_dim))), labels=data.labels * 0)
    rate = measured_rate(model, data)
    return (
        f"{rate:,.0f} draws a second on {model.device} in {model.precision}; a certificate of n={N:,} takes at most "
        f"{(N0 + N) / rate / 60:.2g} minutes an image, sequential sampling less"
    )
