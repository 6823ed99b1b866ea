"""How many noisy copies go through a model at once: what memory allows, less when it did not."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

Result = TypeVar("Result")

_LARGEST = {"cpu": 128}  # larger batches fall out of a processor's cache and are slower, not faster
_LARGEST_ON_ACCELERATORS = 1024
_WORKING_SET = 64  # activations of the tested towers, in float32 copies of the input, with a margin
_SHARE_OF_FREE_MEMORY = 0.5
# What torch says where it raises no error of its own kind: the CPU of Linux and of Windows, MPS, cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")

logger = logging.getLogger(__name__)


@dataclass
class Batches:
    """A batch size that halves itself when memory runs out, and says so.

    Attributes
    ----------
    size : int
        Draws at a time, >= 1. It changes memory and speed, never which noise is drawn.

    Raises
    ------
    ValueError
        A size below 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"batch_size={self.size}: at least one noisy copy goes through the model at a time")

    def map(self, compute: Callable[[int, int], Result], *, first: int, count: int) -> Iterator[Result]:
        """Yield ``compute(first, n)`` for consecutive batches of draws that together cover `count`.

        Parameters
        ----------
        compute : callable of (first, count)
            Called again, with half as many draws, after running out of memory.
        first, count : int
            Numbers of the draws.

        Raises
        ------
        RuntimeError, MemoryError
            From `compute`, if not even one draw fits.
        """
        stop = first + count
        while first < stop:
            step = min(self.size, stop - first)
            try:
                result = compute(first, step)
            except (RuntimeError, MemoryError) as error:
                if step == 1 or not is_out_of_memory(error):
                    raise
            else:
                yield result
                first += step
                continue
            # Outside the handler, where the failed batch is no longer referenced.
            self.size = step // 2
            logger.warning("out of memory with batches of %d noisy copies; going on with %d", step, self.size)
            release_cached_memory()


def make_batches(
    size: int | None, device: torch.device, shape: tuple[int, ...], *, bytes_each: int | None = None
) -> Batches:
    """Batches of the given size, or of what the free memory of the device affords for images of a shape."""
    return Batches(suggested_batch_size(device, shape, bytes_each=bytes_each) if size is None else size)


def suggested_batch_size(device: torch.device, shape: tuple[int, ...], *, bytes_each: int | None = None) -> int:
    """Choose a batch size from the free memory of a device.

    Parameters
    ----------
    device : torch.device
    shape : tuple of int
        Shape of one image, for example ``(3, 224, 224)``.
    bytes_each : int, optional
        Memory that one copy takes, where it is known better than from its shape.

    Returns
    -------
    int
        A power of two, 1 to 128 on a CPU and to 1024 elsewhere.
    """
    per_image = bytes_each or _WORKING_SET * torch.Size(shape).numel() * torch.float32.itemsize
    affordable = max(1, int(_SHARE_OF_FREE_MEMORY * _free_memory(device) / per_image))
    return min(_LARGEST.get(device.type, _LARGEST_ON_ACCELERATORS), 1 << (affordable.bit_length() - 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or on an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _free_memory(device: torch.device) -> int:
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return module.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def release_cached_memory() -> None:
    """Give memory that torch keeps for later back to the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()
