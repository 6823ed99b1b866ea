# ruff: noqa: E402
import os

# Before any library that reads it: a failed look-up on the hub waits half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# Small tensors are slower on several threads, above all beside other processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

import sys

# jsonschema takes it where it is there, and it takes seconds to build parsers of addresses that no notebook has.
sys.modules.setdefault("rfc3987_syntax", None)

import functools
import importlib.util
from pathlib import Path

import hypothesis
import nbformat
import pytest
from PIL import Image

import medrobust_lib as mr  # installs the torchvision guard before any test module imports it
from medrobust_lib import cli
from medrobust_lib.experiments import write_text_atomically

spec = importlib.util.spec_from_file_location("hardening_table", Path(__file__).parent / "hardening" / "table.py")
hardening = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hardening)

# The lane tries the same values every time; `--hypothesis-profile default` tries others.
hypothesis.settings.register_profile("lane", derandomize=True)
hypothesis.settings.load_profile("lane")

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


@pytest.fixture(scope="session")
def model():
    """demo-clip, for every test: whoever changes a model takes a copy."""
    from medrobust_lib.models.weights import fingerprint

    model = mr.load_model("demo-clip", device="cpu")
    before = fingerprint([*model.state_dict().values()])
    yield model
    assert fingerprint([*model.state_dict().values()]) == before, "a test changed the model that all tests share"


@pytest.fixture(scope="session")
def phantoms():
    """Function giving the phantoms of a modality, drawn once and not to be changed."""

    @functools.cache
    def drawn(modality, **options):
        data = mr.load_dataset(f"phantom/{modality}", **options)
        data.images.flags.writeable = data.labels.flags.writeable = False
        return data

    return drawn


@pytest.fixture(scope="session")
def data(phantoms):
    """Eight images of eight classes, for every test that does not mind which."""
    return phantoms("blood", n=8)


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


@pytest.fixture
def invoke(monkeypatch, capsys):
    """Call the console script's own entry point; returns exit code, standard output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medrobust", *map(str, arguments)])
        capsys.readouterr()  # what fixtures printed is not the command's
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def own_images(tmp_path_factory, phantoms):
    """A folder of class folders, train/CLASS/FILE and test/CLASS/FILE, with words for its classes, read only."""
    root = tmp_path_factory.mktemp("own") / "mine"
    for split, n in (("train", 8), ("test", 6)):
        data = phantoms("breast", split=split, n=n)
        for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            folder = root / split / "ab"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.{'bmp' if number == 1 else 'png'}")
    (root / "classnames.txt").write_text(f"a\t{data.classes[0]}\nb\t{data.classes[1]}\n{data.templates[0]}\n")
    return root
