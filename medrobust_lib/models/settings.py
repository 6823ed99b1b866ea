"""Settings in other people's files: each is honoured, or refused by name, and none is passed over."""

from collections.abc import Collection, Mapping
from typing import Any

HONOURED = None
"""In a table of settings: any value is followed, or can change nothing."""

Settings = Mapping[str, Collection[Any] | None]


def check_settings(found: Mapping[str, Any], supported: Settings, *, source: str) -> None:
    """Refuse the settings of a file that would have to be passed over.

    Parameters
    ----------
    found : mapping
        Names and values in the file; None stands for a setting that is left out.
    supported : mapping
        The values of each setting that are supported, or `HONOURED`.
    source : str
        The file, for the message.

    Raises
    ------
    ValueError
        A setting or value that is not supported; names it and what is.
    """
    for name, value in found.items():
        if value is None:
            continue
        if name not in supported:
            known = ", ".join(supported)
            raise ValueError(f"{source}: the setting {name}={value!r} is not supported; supported are {known}")
        values = supported[name]
        if values is not HONOURED and value not in values:
            known = " or ".join(map(repr, values))
            raise ValueError(f"{source}: {name}={value!r} is not supported; supported is {known}")
