"""Is this installation sound? Every check says what it found and how to mend it."""

import json
import platform
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medrobust_lib import _torchvision, runner
from medrobust_lib.files import told
from medrobust_lib.places import project_root

REFERENCE_FILE = Path(__file__).parent / "models" / "demo" / "demo-clip" / "reference_prediction.json"
# Different processors sum in a different order; a wrong preprocessing or weight moves far more.
REFERENCE_TOLERANCE = 1e-3


class Finding(NamedTuple):
    """One check: its name, whether it passed, and what was found (with the fix if it did not)."""

    check: str
    passed: bool
    detail: str


def examine() -> Iterator[Finding]:
    """Run all checks, one finding at a time."""
    for check in (_python, _packages, _torchvision_import, _kernel, _accelerator, _weights, _data, _reference):
        name = check.__name__.lstrip("_").replace("_", " ")
        try:
            yield Finding(name, True, check())
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            yield Finding(name, False, told(error))


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
    for name in PACKAGES:  # an extra that `make install` leaves out
        if find_spec(name) is None:
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
