"""Corrupted sets on disk, read back: ours checked against their manifest, others' taken as they are."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from medrobust_lib.corruptions.layouts import (
    CLEAN,
    DESCRIPTION,
    KIND,
    Layout,
    member_names,
    read_npz,
    set_file,
    set_folder,
)
from medrobust_lib.corruptions.suites import SEVERITIES, check_severity
from medrobust_lib.data.catalogue import DATASETS
from medrobust_lib.data.dataset import ImageDataset, check_labels
from medrobust_lib.data.wording import class_wording, suggest
from medrobust_lib.downloads import file_sha256
from medrobust_lib.files import inside, parsed, read_json_object

AGAIN = "Make the same call of write_benchmark, or run the same script, again: it writes what is missing."
_ANEW = "Delete the folder and write the sets again."


def read_corrupted(
    folder: str | Path,
    dataset: str,
    corruption: str = CLEAN,
    *,
    severity: int = 0,
    split: str = "test",
    verify: bool = True,
    label_order: Sequence[str] | None = None,
) -> ImageDataset:
    """Read one corrupted set, or the clean images, of a collection in either layout.

    Parameters
    ----------
    folder : path
        Of the collection: one written by `write_benchmark`, the authors' released MediMeta-C or MedMNIST-C
        (``{set}/{split}/{corruption}_severity_{1..5}.npz``), or the official MedMNIST-C (``{set}/{corruption}.npz``).
    dataset : str
        Id, such as "medimeta/pbc" for the folder ``pbc``.
    corruption : str
    severity : {0, 1, 2, 3, 4, 5}
        0 gives the clean images.
    split : str
    verify : bool
        Compare the SHA-256 with the manifest's; without it only the length is compared.
    label_order : sequence of str, optional
        For files without our manifest: the class that each label number of the file stands for, where it is not
        the order of the data set's class list.

    Returns
    -------
    ImageDataset
        ``provenance["verified"]`` says what was checked.

    Warns
    -----
    UserWarning
        There is no manifest of ours, so nothing can be verified.

    Raises
    ------
    FileNotFoundError
        No such folder or set; what there is is listed.
    ValueError
        A set that is half written, truncated or changed since it was written; a file that holds something
        else; labels outside the class list.
    """
    folder = Path(folder)
    severity = check_severity(severity)
    if corruption == CLEAN and severity:
        raise ValueError(f"severity={severity} of the clean images; name a corruption, or leave severity at 0")
    ledger = read_ledger(folder)
    if ledger is None:
        return _read_foreign(folder, dataset, corruption, severity, split, label_order)
    if label_order is not None:
        raise ValueError(f"label_order is for files without a manifest; {folder} has one, and labels of the class list")
    clean = set_file(ledger.layout, dataset, split, CLEAN, 0)
    file = set_file(ledger.layout, dataset, split, corruption, severity)
    description = Path(clean).with_name(f"{DESCRIPTION}.json").as_posix()
    for name in (description, file):
        _check_file(ledger, name, verify=verify)
    facts = read_json_object(folder / description, "a description of corrupted sets", _ANEW)
    parts = len(SEVERITIES) if ledger.layout == "concatenated" and severity else 1
    members = member_names(ledger.layout)
    images, labels = read_npz(folder / file, members=members, part=max(severity - 1, 0) % parts, parts=parts)
    done = {
        "name": corruption if severity else CLEAN,
        "severity": severity,
        "suite": ledger.parameters["suite"]["id"],
        "seed": ledger.parameters["seed"],
    }
    with parsed(f"{folder / description} does not describe {folder / file}", _ANEW):
        provenance = {
            "caveats": [],  # of sets written before there were any
            **facts["provenance"],
            "read_from": str(folder / file),
            "corruption": done,
            "verified": "SHA-256 of the manifest" if verify else "length only",
        }
        return ImageDataset(
            id=facts["id"],
            split=facts["split"],
            images=images,
            labels=labels,
            classes=tuple(facts["classes"]),
            templates=tuple(facts["templates"]),
            modality=facts["modality"],
            licence=facts["licence"],
            provenance=provenance,
            indices=np.array(facts["indices"], dtype=np.int64),
        )


def check_benchmark(folder: str | Path) -> pd.DataFrame:
    """Compare every file of a collection with its manifest; reads all of them.

    Returns
    -------
    DataFrame
        ``table.csv`` with the column "state": "whole", "missing", "truncated" or "changed".

    Raises
    ------
    ValueError
        The folder has no manifest of ours, or its run did not finish any data set.
    """
    ledger = read_ledger(Path(folder))
    if ledger is None:
        raise ValueError(f"{folder} has no manifest of corrupted sets, so nothing in it can be verified")
    states = [_state(ledger, file, verify=True) for file in ledger.rows]
    return pd.DataFrame(list(ledger.rows.values())).assign(state=states)


@dataclass(frozen=True)
class Ledger:
    """What a collection of ours records about itself: its folder, parameters and the row of each file."""

    folder: Path
    parameters: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def layout(self) -> Layout:
        """Which of the two file layouts the collection has."""
        return self.parameters["layout"]


def read_ledger(folder: Path) -> Ledger | None:
    """Manifest and table of a collection, or None where it has no manifest of ours."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder.absolute()}")
    manifest, table = folder / "manifest.json", folder / "table.csv"
    try:
        parameters = read_json_object(manifest, "a manifest")["parameters"]
        ours = parameters["kind"] == KIND
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        if manifest.exists() and (folder / "journal.jsonl").exists():
            raise ValueError(f"{manifest} is damaged; delete {folder} and write the sets again")
        return None
    if not table.exists():
        raise ValueError(f"{folder} is half written: its run was stopped before a data set was whole. {AGAIN}")
    with parsed(f"{manifest} does not say how the sets were made", _ANEW):
        if parameters["layout"] not in get_args(Layout) or not {"suite", "seed"} <= set(parameters):
            raise ValueError(f"its layout is {parameters['layout']!r}; it has {', '.join(parameters)}")
        parameters["suite"]["id"]
    with parsed(f"{table} is no table of corrupted sets", AGAIN):
        rows = pd.read_csv(table, dtype={"file": str, "severities": str, "sha256": str}, keep_default_na=False)
        rows[["bytes", "sha256"]]
        for file in rows["file"]:
            inside(folder, file, source=table)
        return Ledger(folder, parameters, {row["file"]: row for row in rows.to_dict("records")})


def _state(ledger: Ledger, file: str, *, verify: bool) -> str:
    path, row = ledger.folder / file, ledger.rows[file]
    if not path.is_file():
        return "missing"
    if path.stat().st_size != row["bytes"]:
        return "truncated"
    return "changed" if verify and file_sha256(path) != row["sha256"] else "whole"


def _check_file(ledger: Ledger, file: str, *, verify: bool) -> None:
    path = ledger.folder / file
    if file not in ledger.rows:
        if path.exists():
            raise ValueError(f"{path} is there, but its run was stopped before the data set was whole. {AGAIN}")
        held = [known for known in ledger.rows if known.endswith(".npz")]
        raise FileNotFoundError(f"no {file} in {ledger.folder}.{suggest(file, held)}")
    state = _state(ledger, file, verify=verify)
    recorded = ledger.rows[file]
    if state == "missing":
        raise ValueError(f"{path} is recorded but not there. {AGAIN}")
    if state == "truncated":
        raise ValueError(f"{path} has {path.stat().st_size} bytes, {recorded['bytes']} are recorded. {AGAIN}")
    if state == "changed":
        raise ValueError(
            f"{path} has changed since it was written: its SHA-256 is not the recorded {recorded['sha256']}. "
            f"Delete it. {AGAIN}"
        )


def _read_foreign(
    folder: Path, dataset: str, corruption: str, severity: int, split: str, label_order: Sequence[str] | None
) -> ImageDataset:
    """Read a file that came without our manifest, trusting its name and its labels."""
    if dataset not in DATASETS:
        raise ValueError(
            f"{folder} has no manifest of ours, so the classes come from the registry, which has no {dataset!r}."
            f"{suggest(dataset, DATASETS)}"
        )
    row, words = DATASETS[dataset], class_wording(dataset)
    path, layout = _foreign_file(folder, dataset, corruption, severity, split)
    parts = len(SEVERITIES) if layout == "concatenated" else 1
    part = severity - 1 if layout == "concatenated" else 0
    images, labels = read_npz(path, members=member_names(layout), part=part, parts=parts)
    if label_order is not None:
        order = [words.label_of(name) for name in label_order]
        if None in order or sorted(order) != list(range(len(words.names))):
            raise ValueError(f"label_order={list(label_order)}: name each class of {dataset} once: {list(words.names)}")
        check_labels(labels, label_order, str(path))
        labels = np.array(order, dtype=np.int64)[labels]
    warnings.warn(
        f"{folder} has no manifest of ours: nothing was verified, neither that {path.name} is whole and unchanged nor "
        f"that its labels follow the class list {', '.join(words.names)}",
        UserWarning,
        stacklevel=3,
    )
    return ImageDataset(
        id=dataset,
        split=split,
        images=images,
        labels=labels,
        classes=words.prompt_nouns,
        templates=words.templates,
        modality=row.modality,
        licence=row.licence,
        provenance={
            "source": f"{row.source}; corrupted by others",
            "read_from": str(path),
            "synthetic": row.kind == "phantom",
            "split_size": len(labels),
            "corruption": {"name": corruption if severity else CLEAN, "severity": severity},
            "verified": "nothing: no manifest beside the files",
            "caveats": [],  # what corruptions do to images is no fault of the set
        },
        indices=np.arange(len(labels)),
    )


def _foreign_file(folder: Path, dataset: str, corruption: str, severity: int, split: str) -> tuple[Path, Layout]:
    layouts: tuple[Layout, ...] = ("per-severity", "concatenated") if severity else ("per-severity",)
    looked = [(folder / set_file(layout, dataset, split, corruption, severity), layout) for layout in layouts]
    for path, layout in looked:
        if path.is_file():
            return path, layout
    if not severity:
        raise FileNotFoundError(
            f"no clean images at {looked[0][0]}; take them from load_dataset({dataset!r}, split={split!r})"
        )
    place = folder / set_folder(dataset)
    held = sorted(path.relative_to(folder).as_posix() for path in place.rglob("*.npz"))
    names = ", ".join(str(path) for path, _ in looked)
    listing = (
        f" It holds {', '.join(held[:8])}{', ...' * (len(held) > 8)}." if held else f" There is no set in {place}."
    )
    raise FileNotFoundError(f"no {corruption} of severity {severity} of {dataset}: looked at {names}.{listing}")
