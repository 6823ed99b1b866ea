"""Download MedMNIST sets (Zenodo record 10519652) to ROOT/medmnist/ and verify them.

Licence of the five sets offered here: CC BY 4.0. Please cite Yang et al., MedMNIST v2 - A large-scale
lightweight benchmark for 2D and 3D biomedical image classification, Scientific Data 10:41, 2023, and the
source of each set. MedMNIST is not intended for clinical use.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medrobust_lib.files import reported_errors
from medrobust_lib.places import default_data_root
from preparing.downloads import download

RECORD = "https://zenodo.org/records/10519652/files"

# MD5 by size, as published in medmnist 3.0.2 (INFO[...]["MD5"], ["MD5_64"], ["MD5_128"], ["MD5_224"]).
MD5 = {
    "blood": {
        28: "7053d0359d879ad8a5505303e11de1dc",
        64: "2b94928a2ae4916078ca51e05b6b800b",
        128: "adace1e0ed228fccda1f39692059dd4c",
        224: "b718ff6835fcbdb22ba9eacccd7b2601",
    },
    "breast": {
        28: "750601b1f35ba3300ea97c75c52ff8f6",
        64: "742edef2a1fd1524b2efff4bd7ba9364",
        128: "363e4b3f8d712e9b5de15470a2aaadf1",
        224: "b56378a6eefa9fed602bb16d192d4c8b",
    },
    "pneumonia": {
        28: "28209eda62fecd6e6a2d98b1501bb15f",
        64: "8f4eceb4ccffa70c672198ea285246c6",
        128: "05b46931834c231683c68f40c47b2971",
        224: "d6a3c71de1b945ea11211b03746c1fe1",
    },
    "retina": {
        28: "bd4c0672f1bba3e3a89f0e4e876791e4",
        64: "afda852cc34dcda56f86ad2b2457dbcc",
        128: "e48e916a24454daf90583d4e6efb1a18",
        224: "eae7e3b6f3fcbda4ae613ebdcbe35348",
    },
    "oct": {
        28: "c68d92d5b585d8d81f7112f81e2d0842",
        64: "e229e9440236b774d9f0dfef9d07bdaf",
        128: "0a97e76651ace45c5d943ee3f65b63ae",
        224: "abc493b6d529d5de7569faaef2773ba3",
    },
}

SetName = StrEnum("SetName", {name: name for name in MD5})
Size = StrEnum("Size", {f"px{size}": str(size) for size in (28, 64, 128, 224)})

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    sets: Annotated[list[SetName] | None, typer.Argument(help="Sets to fetch; all five by default.")] = None,
    size: Annotated[list[Size] | None, typer.Option(help="Side in pixels; repeat for several. Default 28.")] = None,
    root: Annotated[Path | None, typer.Option(help="Data root; default MEDROBUST_DATA or ./data.")] = None,
) -> None:
    """Fetch the sets asked for."""
    with reported_errors():
        folder = default_data_root(root) / "medmnist"
        for name in sets or SetName:
            for side in map(int, size or [Size.px28]):
                file = f"{name}mnist.npz" if side == 28 else f"{name}mnist_{side}.npz"
                path = download(f"{RECORD}/{file}?download=1", folder / file, md5=MD5[name][side])
                typer.echo(f"{path}  verified")


if __name__ == "__main__":
    app()
