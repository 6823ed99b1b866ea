"""Instruments for the hand: each is a pure view (values in, figure out) with controls in front of it.

The views also serve as static figures in headless runs. An instrument is loaded when it is asked for, so that no
notebook waits for what another one needs; so is ipywidgets.
"""

import importlib

_NAMES = {
    "answers": ["answer_view", "clusters_view", "explore_answers", "prepare_answers"],
    "images": [
        "adapters_view",
        "corruption_view",
        "explore_adapters",
        "explore_corruptions",
        "explore_noise",
        "noise_view",
    ],
    "instrument": ["Instrument"],
    "methods": [
        "Adaptation",
        "explore_methods",
        "explore_similarity",
        "few_images",
        "methods_view",
        "similarity_view",
    ],
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
