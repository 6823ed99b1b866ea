"""Measure and prove how far a medical vision-language model can be trusted when the image gets worse.

The public names are loaded on first use, so importing the package costs nothing; it only makes sure
that torchvision can be imported beside a CPU-only torch. Not for clinical use.
"""

import importlib
from typing import TYPE_CHECKING

from medrobust_lib._torchvision import install_guard
from medrobust_lib.places import VERSION

if TYPE_CHECKING:
    from medrobust_lib.corruptions.stored import read_corrupted
    from medrobust_lib.corruptions.suites import SUITES, corrupt, corrupted
    from medrobust_lib.data.dataset import ImageDataset
    from medrobust_lib.data.questions import load_questions
    from medrobust_lib.data.registry import list_datasets, load_dataset
    from medrobust_lib.generative.certify import GenerativeCertificate, certify_generative
    from medrobust_lib.models.dual_encoder import DualEncoder
    from medrobust_lib.models.loading import list_models, list_vlms, load_model, register_model
    from medrobust_lib.models.vision_language import load_vlm
    from medrobust_lib.smoothing.certificate import Certificate
    from medrobust_lib.smoothing.certify import certify, predict
    from medrobust_lib.smoothing.study import certify_dataset

__version__ = VERSION
__all__ = [
    "SUITES",
    "Certificate",
    "DualEncoder",
    "GenerativeCertificate",
    "ImageDataset",
    "certify",
    "certify_dataset",
    "certify_generative",
    "corrupt",
    "corrupted",
    "list_datasets",
    "list_models",
    "list_vlms",
    "load_dataset",
    "load_model",
    "load_questions",
    "load_vlm",
    "predict",
    "read_corrupted",
    "register_model",
]

_HOMES = {
    "SUITES": "medrobust_lib.corruptions.suites",
    "Certificate": "medrobust_lib.smoothing.certificate",
    "DualEncoder": "medrobust_lib.models.dual_encoder",
    "GenerativeCertificate": "medrobust_lib.generative.certify",
    "ImageDataset": "medrobust_lib.data.dataset",
    "certify": "medrobust_lib.smoothing.certify",
    "certify_dataset": "medrobust_lib.smoothing.study",
    "certify_generative": "medrobust_lib.generative.certify",
    "corrupt": "medrobust_lib.corruptions.suites",
    "corrupted": "medrobust_lib.corruptions.suites",
    "list_datasets": "medrobust_lib.data.registry",
    "list_models": "medrobust_lib.models.loading",
    "list_vlms": "medrobust_lib.models.loading",
    "load_dataset": "medrobust_lib.data.registry",
    "load_model": "medrobust_lib.models.loading",
    "load_questions": "medrobust_lib.data.questions",
    "load_vlm": "medrobust_lib.models.vision_language",
    "predict": "medrobust_lib.smoothing.certify",
    "read_corrupted": "medrobust_lib.corruptions.stored",
    "register_model": "medrobust_lib.models.loading",
}

install_guard()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'medrobust_lib' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
