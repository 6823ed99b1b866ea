import os

# Before any library that reads it: a failed look-up on the hub waits half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

import importlib.util
from pathlib import Path

import nbformat
import pytest

import medrobust_lib  # noqa: F401 - installs the torchvision guard before any test module imports it
from medrobust_lib.experiments import write_text_atomically

spec = importlib.util.spec_from_file_location("hardening_table", Path(__file__).parent / "hardening" / "table.py")
hardening = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hardening)

NOTEBOOK_PARAMETERS = """model: str = "demo-clip"  # model id
n_images: int = 5  # how many
sigma: float = 0.25  # noise
sigmas: list[float] = [0.0]  # levels
fast: bool = False  # skip the slow part
"""


def pytest_addoption(parser):
    parser.addoption("--hardening-table", type=Path, metavar="FILE", help="write what the hardening tests found there")


def pytest_configure(config):
    if config.getoption("hardening_table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(hardening.Results(), "hardening-results")


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers(hardening.MARKER):
            said = marker.kwargs
            item.user_properties.append((hardening.MARKER, [said["area"], said["tried"], said["outcome"]]))


def pytest_sessionfinish(session, exitstatus):
    results = session.config.pluginmanager.get_plugin("hardening-results")
    if results is None:
        return
    if exitstatus or results.troubles:
        print(f"\nthe table was not written: {', '.join(results.troubles) or 'the run did not end well'}")
        return
    write_text_atomically(session.config.getoption("hardening_table"), results.page())


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
