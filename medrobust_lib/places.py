"""Where things lie: the project, its data, weights and runs; and the version of the library that computes."""

import os
from pathlib import Path

VERSION = "0.1.0"
DEVICE_VARIABLE = "MEDROBUST_DEVICE"  # where models compute that are loaded with device="auto"
DTYPE_VARIABLE = "MEDROBUST_DTYPE"  # and in which precision, with dtype="auto"


def project_root() -> Path:
    """The checkout that holds this library, or the working folder for a plain installation."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def default_data_root(named: str | Path | None = None) -> Path:
    """Folder of the downloaded sets: the one named, else ``MEDROBUST_DATA``, else ``data`` below `project_root`."""
    return Path(named) if named else _named_by("MEDROBUST_DATA", "data")


def default_weights_dir() -> Path:
    """Folder of weights: ``MEDROBUST_WEIGHTS``, else ``weights`` below `project_root`."""
    return _named_by("MEDROBUST_WEIGHTS", "weights")


def default_runs_dir() -> Path:
    """Where runs go unless told otherwise: ``runs`` below `project_root`."""
    return project_root() / "runs"


def _named_by(variable: str, folder: str) -> Path:
    named = os.environ.get(variable)
    return Path(named).expanduser().resolve() if named else project_root() / folder
