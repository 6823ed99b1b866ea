"""What a training run writes after each epoch, so that it goes on from there when it was interrupted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from medrobust_lib.models.weights import explained_errors

_FILE = "state.safetensors"
_HEADER = "training"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.AdamW,
    best: Mapping[str, Tensor],
    record: dict[str, Any],
) -> None:
    """Write parameters, moments, the best parameters so far and a JSON record as one file, atomically.

    Parameters
    ----------
    folder : Path
        Exists.
    parameters : mapping of str to Parameter
    optimiser : torch.optim.AdamW
        Of these parameters, after at least one step.
    best : mapping of str to Tensor
        Parameters of the best epoch.
    record : dict
        JSON values; kept in the file's header, so that it can never belong to other tensors.
    """
    tensors = {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter
        tensors |= {f"{moment}.{name}": optimiser.state[parameter][moment] for moment in _MOMENTS}
    steps = {name: int(optimiser.state[parameter]["step"]) for name, parameter in parameters.items()}
    partial = folder / f".{_FILE}.part"
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        partial,
        metadata={_HEADER: json.dumps({**record, "steps": steps})},
    )
    partial.replace(folder / _FILE)


def load_state(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.AdamW
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Put a state into parameters and optimiser; returns the best parameters and the record, or None without a state.

    Raises
    ------
    ValueError
        The file is damaged or holds other tensors.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    with explained_errors(str(path)):
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(_HEADER, "null"))
        tensors = load_file(path)
    wanted = {f"{part}.{name}" for name in parameters for part in ("best", "parameter", *_MOMENTS)}
    if record is None or set(tensors) != wanted:
        raise ValueError(f"{path} is no state of this training; delete {folder} and train anew")
    steps = record.pop("steps")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            optimiser.state[parameter] = {
                "step": torch.tensor(float(steps[name])),
                **{moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS},
            }
    return {name: tensors[f"best.{name}"] for name in parameters}, record
