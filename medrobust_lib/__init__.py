"""Measure and prove how far a medical vision-language model can be trusted when the image gets worse.

The public names are loaded on first use, so importing the package costs nothing; it only makes sure
that torchvision can be imported beside a CPU-only torch. Not for clinical use.

What each notebook is about, and the files to read for it, in this order:

======== =====================================================================================================
notebook files of ``medrobust_lib``
======== =====================================================================================================
01       data/dataset, models/dual_encoder, models/loading, metrics/classification
02       smoothing/noise, smoothing/bounds, smoothing/certificate, smoothing/certify, smoothing/sequential
03       smoothing/prompts, smoothing/methods, smoothing/paper_methods, metrics/certified
03b      smoothing/table, smoothing/denoisers, data/splits
04       models/adapters, adaptation/training_images, adaptation/training, adaptation/adapting
05       corruptions/functions, corruptions/suites, evaluation, metrics/corruption
06       generative/answers, generative/oracles, generative/errors, generative/certify
07       data/readers, data/decoding, data/inspection
08       smoothing/perturbations
======== =====================================================================================================

The rest (experiments, studies, plots, explore, the command line) runs, keeps and shows what these compute.
"""

import importlib

from medrobust_lib._torchvision import install_guard
from medrobust_lib.places import VERSION

__version__ = VERSION
_NAMES = {
    "corruptions.stored": ["read_corrupted"],
    "corruptions.suites": ["SUITES", "corrupt", "corrupted"],
    "data.dataset": ["ImageDataset"],
    "data.questions": ["load_questions"],
    "data.registry": ["list_datasets", "load_dataset"],
    "evaluation": ["benchmark"],
    "generative.certify": ["GenerativeCertificate", "certify_generative"],
    "models.dual_encoder": ["DualEncoder"],
    "models.loading": ["list_models", "list_vlms", "load_model", "register_model"],
    "models.own": ["Classifier", "wrap"],
    "models.vision_language": ["load_vlm"],
    "smoothing.certificate": ["Certificate"],
    "smoothing.certify": ["certify", "predict"],
    "smoothing.table": ["certify_dataset"],
}
_HOMES = {name: f"medrobust_lib.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)

install_guard()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'medrobust_lib' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
