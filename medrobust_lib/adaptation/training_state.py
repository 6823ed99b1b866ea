"""What a training run writes after each epoch, so that it goes on from there when it was interrupted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medrobust_lib.files import parsed
from medrobust_lib.models.tensor_files import read_tensors, write_tensors

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
    write_tensors(folder / _FILE, tensors, key=_HEADER, header={**record, "steps": steps})


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
    anew = f"Delete {folder} and train anew."
    tensors, record = read_tensors(path, key=_HEADER, kind="a readable state", advice=anew)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    wanted = {f"{part}.{name}": shapes[name] for name in shapes for part in ("best", "parameter", *_MOMENTS)}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise ValueError(f"{path} is no state of this training; delete {folder} and train anew")
    with parsed(f"{path} does not say how far the training was", anew):
        steps = {name: torch.tensor(float(record["steps"][name])) for name in parameters}
    del record["steps"]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            optimiser.state[parameter] = {
                "step": steps[name],
                **{moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS},
            }
    return {name: tensors[f"best.{name}"] for name in parameters}, record
