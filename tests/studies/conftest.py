import pytest

from medrobust_lib.studies.execute import run_study
from medrobust_lib.studies.study_file import read_study

CARD = """
from medrobust_lib.experiments import Metric, start_run
run = start_run("01", "Tiny", model=model, n_images=n_images, sigma=sigma)
card = run.save_card(metrics=[Metric("accuracy", sigma, n_images)], tables={}, model={"id": model},
                     dataset={"id": "phantom/chest", "n": n_images, "synthetic": True}, prompts={})
"""
STUDY = """
models: [demo-clip]
datasets: [phantom/chest]
n_images: 4
steps:
  - certify: {sigmas: [0.05, 0.1], n0: 5, n: 20, alpha: 0.05, radii: [0.02, 0.2]}
  - benchmark: {severities: [2]}
"""


@pytest.fixture
def study_file(tmp_path):
    """Write a study file; returns its path."""

    def write(text: str = STUDY, name: str = "tiny"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def notebooks(tmp_path, write_notebook):
    """A folder with one notebook that writes a card."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder, "01_first", CARD)
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Folder of the study above, run once in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = folder / "tiny.yaml"
    path.write_text(STUDY)
    run_study(read_study(path), folder / "out", announce=lambda line: None)
    return folder / "out"
