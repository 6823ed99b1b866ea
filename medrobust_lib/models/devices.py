"""Where and in which precision a model computes."""

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Device by name; ``"auto"`` is the machine's accelerator (CUDA, MPS, ...) if it has one, else the CPU.

    Raises
    ------
    ValueError
        If the device does not exist on this machine.
    """
    if device == "auto":
        accelerated = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); try 'auto' or 'cpu'") from error
    return target


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Floating-point type by name; ``"auto"`` is float32 on the CPU and bfloat16 elsewhere.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"dtype must be 'auto', {', '.join(map(repr, _DTYPES))}, not {dtype!r}")
