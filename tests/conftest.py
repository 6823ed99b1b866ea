import os

# Before any library that reads it: a failed look-up on the hub waits half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

import nbformat
import pytest

import medrobust_lib  # noqa: F401 - installs the torchvision guard before any test module imports it

NOTEBOOK_PARAMETERS = """model: str = "demo-clip"  # model id
n_images: int = 5  # how many
sigma: float = 0.25  # noise
sigmas: list[float] = [0.0]  # levels
fast: bool = False  # skip the slow part
"""


@pytest.fixture
def write_notebook():
    """Write a notebook with a parameters cell into a folder."""

    def write(folder, name: str, *cells: str, parameters: str = NOTEBOOK_PARAMETERS):
        tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        notebook = nbformat.v4.new_notebook(
            cells=[tagged, *map(nbformat.v4.new_code_cell, cells)],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
        path = folder / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    return write
