"""Image towers in int8 on the CPU: exported by torch, quantised and run by ONNX Runtime (the ``onnx`` extra)."""

import io
import logging
import tempfile
import warnings
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from medrobust_lib.models.dual_encoder import DualEncoder

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""The ``onnx`` extra; the last is what torch exports with."""

_LEAST_LIKENESS = 0.9  # far below what rounding does (0.999 on the demo models), far above an unlike network
_INSTEAD = "load the model with dtype='float32' or 'bfloat16'"


@dataclass(frozen=True)
class Int8Tower:
    """Image features by a quantised network, one image at a time.

    Dynamic quantisation takes the scale of its activations from the whole tensor. In a batch the features of an image
    would depend on its neighbours, and a certificate's base classifier is a function of one image.

    Attributes
    ----------
    network : bytes
        In ONNX's format, for a batch of one image.
    """

    network: bytes = field(repr=False)

    @cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # else it takes every core, in each worker
        return onnxruntime.InferenceSession(self.network, options, providers=["CPUExecutionProvider"])

    def __getstate__(self) -> dict[str, Any]:
        return {"network": self.network}  # a session cannot be packed for workers

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features float32 [n, d], of any norm, of normalised pixels [n, 3, S, S]; without a gradient.

        Raises
        ------
        ValueError
            If a gradient with respect to ``pixels`` is wanted.
        """
        if torch.is_grad_enabled() and pixels.requires_grad:
            raise ValueError(f"an image tower in int8 has no gradient; {_INSTEAD}")
        (given,), (features,) = self._session.get_inputs(), self._session.get_outputs()
        found = torch.empty(len(pixels), features.shape[1])
        for row, image in zip(found, pixels.detach().float().cpu().contiguous().numpy(), strict=True):
            row[:] = torch.from_numpy(self._session.run([features.name], {given.name: image[None]})[0][0])
        return found.to(pixels.device)


class _Tower(torch.nn.Module):
    """The image tower of a dual encoder as the network that torch exports."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model._image_features(pixels)


def check_int8(device: torch.device) -> None:
    """Raise unless image towers in int8 can be made here.

    Raises
    ------
    ValueError
        A device that is not the CPU.
    ImportError
        The ``onnx`` extra is missing.
    """
    if device.type != "cpu":
        raise ValueError(f"dtype='int8' computes on the CPU, not on {str(device)!r}; take device='cpu', or 'bfloat16'")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"dtype='int8' needs {', '.join(missing)}; install the onnx extra: "
            "pip install -c constraints.txt -e '.[onnx]'"
        )


@torch.no_grad()
def int8_tower(model: DualEncoder) -> Int8Tower:
    """Export and quantise the image tower of a model; nothing is left on the disk.

    Matrix products with weights become int8, convolutions and attention stay in float32: ONNX Runtime's integer
    convolutions are several times slower than those in float32. Weights have seven bits and a scale a channel, so
    that no processor saturates, and all give the same integers.

    Parameters
    ----------
    model : DualEncoder
        In float32 on the CPU, in evaluation mode; not changed.

    Raises
    ------
    ValueError
        The tower cannot be exported, has no matrix product with weights, or answers otherwise in int8.

    References
    ----------
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    size = model.image_size
    ramp = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
    with ExitStack() as afterwards:
        folder = Path(afterwards.enter_context(tempfile.TemporaryDirectory()))
        afterwards.enter_context(warnings.catch_warnings(action="ignore"))
        afterwards.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)  # the advice of both packages is to those who export by hand
        afterwards.enter_context(redirect_stderr(io.StringIO()))  # a graph that fails is printed whole
        whole, quantised = folder / "float32.onnx", folder / "int8.onnx"
        try:
            torch.onnx.export(_Tower(model).eval(), (ramp,), whole, dynamo=True, verbose=False)
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ValueError(f"{model.id}: the image tower cannot be exported ({reason}); {_INSTEAD}") from error
        quantize_dynamic(whole, quantised, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, reduce_range=True)
        tower = Int8Tower(quantised.read_bytes())
    if not any(node.op_type == "MatMulInteger" for node in onnx.load_from_string(tower.network).graph.node):
        raise ValueError(f"{model.id}: the image tower has no matrix product with weights to quantise; {_INSTEAD}")
    likeness = float(functional.cosine_similarity(tower(ramp), model._image_features(ramp)))
    if not likeness >= _LEAST_LIKENESS:  # NaN, too
        raise ValueError(
            f"{model.id}: in int8 the features of an image have the cosine {likeness:.3g} with those in float32, below "
            f"{_LEAST_LIKENESS}; {_INSTEAD}"
        )
    return tower
