"""Let torchvision import beside a CPU-only torch.

The torchvision wheel on the Python package index is linked against a CUDA build of torch. Beside a
CPU-only torch its import raises ``operator torchvision::nms does not exist`` and takes timm,
open_clip, peft and parts of transformers down with it, although none of them needs that operator
here. Declaring the two missing operators is enough; where torchvision imports by itself, nothing is
changed. `torchvision.ops.nms` and `torchvision.io` stay unusable in the repaired case.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_SYMPTOM = "operator torchvision::nms does not exist"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class TorchvisionGuard(MetaPathFinder):
    """Import hook that repairs the first import of torchvision, and only that."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Let torchvision's own loader try twice; leave every other module alone."""
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_execute, spec.loader.exec_module)
        return spec


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Run the module's code; where it stops for want of the operators, declare them and run it again."""
    try:
        execute(module)
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise
        import torch  # deferred: importing medrobust_lib must not cost a torch import

        # The submodules that the failed import has left behind.
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _OPERATORS:
            library.define(schema)
        execute(module)
        # The declaration lives only as long as this object.
        module.medrobust_operator_library = library


def install_guard() -> None:
    """Put the guard in front of the import system, once; say so where an import of torchvision has failed already."""
    if "torchvision" not in sys.modules and any(name.startswith("torchvision.") for name in sys.modules):
        warnings.warn(
            "torchvision failed to import before medrobust_lib was imported. Beside a CPU-only torch its usual wheel "
            f"raises {_SYMPTOM!r}, and so do timm, open_clip, peft and parts of transformers; medrobust_lib repairs "
            "that. Import medrobust_lib first, or what failed once more from here on",
            stacklevel=3,
        )
    if "torchvision" not in sys.modules and not any(isinstance(f, TorchvisionGuard) for f in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionGuard())


def was_repaired() -> bool:
    """Whether the torchvision that is loaded in this process needed the repair."""
    return hasattr(sys.modules.get("torchvision"), "medrobust_operator_library")
