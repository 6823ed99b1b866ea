"""Let torchvision import beside a CPU-only torch.

The torchvision wheel on the Python package index is linked against a CUDA build of torch. Beside a
CPU-only torch its import raises ``operator torchvision::nms does not exist`` and takes timm,
open_clip, peft and parts of transformers down with it, although none of them needs that operator
here. Declaring the two missing operators is enough; where torchvision imports by itself, nothing is
changed. `torchvision.ops.nms` and `torchvision.io` stay unusable in the repaired case.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_SYMPTOM = "operator torchvision::nms does not exist"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class TorchvisionGuard(importlib.abc.MetaPathFinder):
    """Import hook that repairs the first import of torchvision, and only that."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Wrap torchvision's own loader; leave every other module alone."""
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RepairingLoader(spec.loader)
        return spec


class _RepairingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        # Resource readers and inspect ask the loader for its source and data files.
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._loader.exec_module(module)
        except RuntimeError as error:
            if _SYMPTOM not in str(error):
                raise
            forget_half_imported()
            library = declare_missing_operators()
            self._loader.exec_module(module)
            # The declaration lives only as long as this object.
            module.medrobust_operator_library = library


def forget_half_imported() -> None:
    """Drop the submodules that a failed import of torchvision left behind."""
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]


def declare_missing_operators() -> object:
    """Declare the operators whose absence stops the import; returns the owning torch library."""
    import torch  # deferred: importing medrobust_lib must not cost a torch import

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATORS:
        library.define(schema)
    return library


def install_guard() -> None:
    """Put the guard in front of the import system, once."""
    if "torchvision" not in sys.modules and not any(isinstance(f, TorchvisionGuard) for f in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionGuard())


def was_repaired() -> bool:
    """Whether the torchvision that is loaded in this process needed the repair."""
    return hasattr(sys.modules.get("torchvision"), "medrobust_operator_library")
