"""Download MedIMeta sets (Zenodo record 7884735) to ROOT/medimeta/NAME/ and verify them.

The checksums come from Zenodo at run time. The licence differs from set to set and is stated in the
info.yaml of each (the sets offered here: pbc, mammo (mammo_calc), pneumonia, fundus, oct, aml, mammo_mass). Please
cite Woerner, Jaques and Baumgartner, A comprehensive and easy-to-use multi-domain multi-task medical imaging
meta-dataset (MedIMeta), Scientific Data, 2025 (arXiv 2404.16000), and the source of each set.
"""

import tempfile
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medrobust_lib.files import reported_errors
from medrobust_lib.places import default_data_root
from preparing.archives import extract
from preparing.downloads import RemoteFile, download, zenodo_files

RECORD = 7884735
INFO_NAME = "info.yaml"

# The record's name of each set that the library reads.
FOLDERS = {
    name: "mammo_calc" if name == "mammo" else name
    for name in ("pbc", "mammo", "pneumonia", "fundus", "oct", "aml", "mammo_mass")
}

SetName = StrEnum("SetName", {name: name for name in FOLDERS})

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    sets: Annotated[list[SetName] | None, typer.Argument(help="Sets to fetch; all by default.")] = None,
    root: Annotated[Path | None, typer.Option(help="Data root; default MEDROBUST_DATA or ./data.")] = None,
) -> None:
    """Fetch the sets asked for."""
    with reported_errors():
        base = default_data_root(root)
        folders = [FOLDERS[name] for name in sets or SetName]
        missing = [name for name in folders if not (base / "medimeta" / name / INFO_NAME).exists()]
        files = zenodo_files(RECORD) if missing else {}
        for name in folders:
            if name in missing:
                install(files, name, base)
            typer.echo(f"{base / 'medimeta' / name}  ready")


def install(files: dict[str, RemoteFile], name: str, base: Path) -> None:
    """Fetch and unpack one set below ``BASE/medimeta``."""
    remote = files.get(f"{name}.zip")
    if remote is None:
        close = ", ".join(get_close_matches(f"{name}.zip", files, n=3)) or ", ".join(files)
        raise ValueError(f"record {RECORD} has no {name}.zip; it has: {close}")
    archive = download(remote.url, base / "downloads" / "medimeta" / remote.name, md5=remote.md5)
    final = base / "medimeta" / name
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{name}-") as scratch:
        extract(archive, Path(scratch) / "content")
        found = sorted((Path(scratch) / "content").rglob(INFO_NAME))
        if len(found) != 1:
            raise ValueError(f"{archive} holds {len(found)} files {INFO_NAME}, expected one")
        found[0].parent.replace(final)


if __name__ == "__main__":
    app()
