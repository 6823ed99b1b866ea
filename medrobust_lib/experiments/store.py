"""A folder of finished items that survives being killed at any moment.

``journal.jsonl`` gets one line per finished item, written by a single call to the system, so a kill can
tear at most the last line; the next run drops that line and does its item again. ``table.csv`` holds the
rows in the order of the keys asked for and no times, so it is the same, byte for byte, however often a
run was killed, in whatever order the items finished.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import pandas as pd

from medrobust_lib.experiments.cards import write_text_atomically
from medrobust_lib.files import lock, named_when_full, parsed, read_json_object

STORE_FORMAT = 1
SECONDS_COLUMN = "seconds"
Row = Mapping[str, str | int | float | bool | None]

_ABSENT = "no such parameter"
_SHOWN_CHARACTERS = 120


class _Item(NamedTuple):
    rows: tuple[Row, ...]
    seconds: float


class RowStore:
    """Rows of finished items in a folder; made by `open_store`, closed by ``with`` or `close`.

    Attributes
    ----------
    folder : Path
        Holds ``manifest.json``, ``journal.jsonl`` and, after `finish`, ``table.csv``.
    """

    def __init__(self, folder: Path, descriptor: int, items: dict[str, _Item]) -> None:
        self.folder = folder
        self._descriptor: int | None = descriptor
        self._items = items

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RowStore({str(self.folder)!r}, {len(self._items)} items done)"

    @property
    def done(self) -> frozenset[str]:
        """Keys of the items that need not be computed again."""
        return frozenset(self._items)

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def rows(self, key: str) -> tuple[Row, ...]:
        """Rows of one finished item.

        Raises
        ------
        KeyError
            It is not done.
        """
        return self._items[key].rows

    def append(self, key: str, rows: Sequence[Row], *, seconds: float) -> None:
        """Keep the rows of one finished item; they are in the file when this returns.

        Parameters
        ----------
        key : str
            Names the item, for example ``"17 sigma=0.25"``.
        rows : sequence of mapping
            Column name to str, int, float, bool or None; the same columns in every row of the store.
        seconds : float
            What the item took, >= 0. Kept apart from the rows, which must not depend on the clock.

        Raises
        ------
        ValueError
            The key is empty or done already, a value is NaN or infinite, the columns differ from those
            of the earlier rows, a column is called "seconds", or the store is closed.
        TypeError
            A value is no JSON scalar.
        OSError
            The line could not be written whole, for example because the disk is full; nothing of it stays.
        """
        if self._descriptor is None:
            raise ValueError(f"the store {self.folder} is closed; open it again with open_store")
        if not key or key in self._items:
            fault = "is done already" if key else "has no name"
            raise ValueError(f"item {key!r} {fault}; every item needs a key of its own")
        item = _Item(tuple(dict(row) for row in rows), float(seconds))
        if not (math.isfinite(item.seconds) and item.seconds >= 0):
            raise ValueError(f"seconds={seconds} of item {key!r}; expected a finite number >= 0")
        columns = next((list(earlier.rows[0]) for earlier in self._items.values() if earlier.rows), None)
        _check_rows(key, item.rows, columns)
        line = json.dumps({"key": key, "rows": item.rows, "seconds": item.seconds}, allow_nan=False) + "\n"
        _write_whole(self._descriptor, line.encode("ascii"), self.folder / "journal.jsonl")
        self._items[key] = item

    def table(self, keys: Iterable[str], *, with_seconds: bool = False) -> pd.DataFrame:
        """Rows of the given items, in the order of the keys.

        Parameters
        ----------
        keys : iterable of str
        with_seconds : bool
            Add a column "seconds" with what each row's item took (repeated in all rows of an item).

        Raises
        ------
        ValueError
            An item is not done; the message counts and names them.
        """
        wanted = list(keys)
        missing = [key for key in wanted if key not in self._items]
        if missing:
            names = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"{len(missing)} of {len(wanted)} items are not in {self.folder}: {names}; run them first")
        items = [self._items[key] for key in wanted]
        table = pd.DataFrame([row for item in items for row in item.rows])
        if with_seconds:
            table[SECONDS_COLUMN] = [item.seconds for item in items for _ in item.rows]
        return table

    def finish(self, keys: Iterable[str]) -> Path:
        """Write `table` of the given items, without times, to ``table.csv`` and return its path.

        Raises
        ------
        ValueError
            As `table`.
        """
        path = self.folder / "table.csv"
        write_text_atomically(path, self.table(keys).to_csv(index=False, lineterminator="\n"))
        return path

    def close(self) -> None:
        """Let others write to the folder; closing twice does no harm."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def open_store(folder: str | Path, *, parameters: Mapping[str, Any]) -> RowStore:
    """Open a folder for one computation: a new one, or the one that an earlier run left unfinished.

    Parameters
    ----------
    folder : path
        Made if missing.
    parameters : mapping
        Everything that the rows depend on, resolved; JSON values only. A store answers to one set of
        parameters for ever.

    Returns
    -------
    RowStore
        A context manager. Until it is closed (or its process ends, however it ends) no other process can
        open the folder, where the file system has locks.

    Raises
    ------
    ValueError
        The store belongs to other parameters (every difference is named), one of its files is corrupt, or the
        folder holds other things and no store.
    TypeError
        A parameter is no JSON value.
    RuntimeError
        Another process is writing to the store, or this one has not closed it.
    """
    folder = Path(folder)
    wanted = _json_values(parameters)
    journal = folder / "journal.jsonl"
    _check_own_folder(folder, journal)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    try:
        if not lock(descriptor):
            raise RuntimeError(
                f"the store {folder} is in use by another process, or left open in this one; "
                "wait for it, end it, or choose another folder"
            )
        _check_manifest(folder / "manifest.json", wanted, is_new=os.fstat(descriptor).st_size == 0)
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(descriptor, len(whole))
        return RowStore(folder, descriptor, _read_items(whole, journal))
    except BaseException:
        os.close(descriptor)
        raise


def read_parameters(folder: Path) -> dict[str, Any] | None:
    """What the store in a folder was made with, without opening it; None where there is no manifest of a store."""
    try:
        parameters = read_json_object(folder / "manifest.json", "a manifest")["parameters"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return parameters if isinstance(parameters, dict) else None


def _check_own_folder(folder: Path, journal: Path) -> None:
    """Refuse a folder of other things: `finish` would replace a table.csv among them."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a store needs a folder")
    if folder.is_dir() and not journal.exists():
        others = sorted(path.name for path in folder.iterdir() if path.name[0] != "." and path.name != "manifest.json")
        if others:
            named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise ValueError(
                f"{folder} holds other files ({named}) and no store; give a new or an empty folder for results"
            )


def _json_values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in parameters.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            fault = f"parameter {name}={value!r} is no JSON value ({error})"
            raise TypeError(f"{fault}; give plain numbers, text, lists") from error
    return json.loads(json.dumps(dict(parameters)))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _check_manifest(path: Path, wanted: dict[str, Any], *, is_new: bool) -> None:
    """Write the manifest of a new store; refuse the folder of another computation."""
    if not path.exists():
        if not is_new:
            raise ValueError(
                f"{path} is missing, so nobody can tell what the rows beside it belong to; use another folder"
            )
        digest = hashlib.sha256(_canonical(wanted).encode()).hexdigest()[:16]
        manifest = {"format": STORE_FORMAT, "parameters": wanted, "hash": digest}
        write_text_atomically(path, json.dumps(manifest, indent=2, allow_nan=False) + "\n")
        return
    with parsed(f"{path} is no manifest of a store", "Restore it or use another folder."):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, stored = manifest["format"], dict(manifest["parameters"])
        _canonical(stored)
    if version != STORE_FORMAT:
        raise ValueError(f"{path} has store format {version}, this version reads {STORE_FORMAT}; use another folder")
    differences = list(parameter_differences(stored, wanted, holder="the store"))
    if differences:
        listed = "".join(f"\n  {line}" for line in differences)
        raise ValueError(
            f"the store {path.parent} belongs to other parameters:{listed}\n"
            "Use another folder for this run, or ask for what the store has."
        )


def parameter_differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], *, holder: str, prefix: str = ""
) -> Iterable[str]:
    """Name every JSON value in which two nested mappings differ, one line each, for a refusal.

    Parameters
    ----------
    stored, wanted : mapping
        What the `holder` was made with, and what is asked now.
    holder : str
        For the reader: "the store" has one value, this run asks another.
    prefix : str
        In front of every name.
    """
    for name in sorted({*stored, *wanted}):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from parameter_differences(old, new, holder=holder, prefix=f"{prefix}{name}.")
            continue
        has, asks = (_canonical(values[name]) if name in values else _ABSENT for values in (stored, wanted))
        if has != asks:
            yield f"{prefix}{name}: {holder} has {_shown(has)}, this run asks {_shown(asks)}"


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


def _read_items(content: bytes, path: Path) -> dict[str, _Item]:
    items: dict[str, _Item] = {}
    columns: list[str] | None = None
    for number, line in enumerate(content.splitlines(), start=1):
        with parsed(
            f"{path}, line {number} is corrupt, {line[:60]!r}", "Delete that line: its item is computed again."
        ):
            entry = json.loads(line)
            key, item = entry["key"], _Item(tuple(entry["rows"]), float(entry["seconds"]))
            if not isinstance(key, str) or key in items or not all(isinstance(row, dict) for row in item.rows):
                raise ValueError(f"key {key!r} is no text, or here twice, or its rows are no rows")
            columns = _check_rows(key, item.rows, columns)
        items[key] = item
    return items


def _check_rows(key: str, rows: Sequence[Row], columns: list[str] | None) -> list[str] | None:
    """Return the columns of the store, which those of its first row become; raise where rows do not fit its table."""
    for row in rows:
        columns = columns or list(row)
        if set(row) != set(columns):
            raise ValueError(f"item {key!r} has columns {', '.join(row)}; the store's rows have {', '.join(columns)}")
        for column, value in row.items():
            where = f"column {column!r} of item {key!r}"
            if not isinstance(column, str) or not isinstance(value, str | int | float | bool | None):
                kinds = "rows hold str, int, float, bool or None"
                raise TypeError(f"{where} holds {value!r} ({type(value).__name__}); {kinds}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where} is {value}; rows hold finite numbers, or None where there is none")
            if column == SECONDS_COLUMN:
                raise ValueError(f"{where}: times make the table differ from run to run; give them as seconds=")
    return columns


def _write_whole(descriptor: int, line: bytes, path: Path) -> None:
    """Append one line, by one call unless the disk takes a part first, or leave the file as it was."""
    end = os.fstat(descriptor).st_size
    written = 0
    try:
        with named_when_full(path, "the item was not added, those before it are kept"):
            while written < len(line):  # the second call says why the first one took a part only
                written += os.write(descriptor, line[written:])
    finally:
        if written != len(line):
            os.ftruncate(descriptor, end)
