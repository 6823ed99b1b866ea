import importlib.util
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from medrobust_lib.files import check_sums, read_sums
from medrobust_lib.smoothing.denoisers import DEMO_FILES, load_denoiser

SCRIPT = Path(__file__).parents[1] / "data_scripts" / "train_demo_denoisers.py"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("train_demo_denoisers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return app


def invoke(app, *arguments, exit_code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == exit_code, result.output
    return result.output


def test_one_command_trains_everything_and_another_only_judges(app, tmp_path):
    small = ["--out", tmp_path, "--images", 18, "--threads", 1]
    invoke(app, *small, "--steps", 1)
    assert set(read_sums(tmp_path)) == set(DEMO_FILES.values())
    stability = load_denoiser(tmp_path / DEMO_FILES["stability"])
    mse = load_denoiser(tmp_path / DEMO_FILES["mse"])
    assert stability.sigmas == mse.sigmas == (0.1, 0.25, 0.5, 1.0)
    assert {origin["start"] for origin in stability.provenance.values()} == {mse.id}
    assert {origin["model"] for origin in mse.provenance.values()} == {None}
    before, card = read_sums(tmp_path), (tmp_path / "MODEL_CARD.md").read_text()
    assert "| 0.25 | stability |" in card
    assert "18 images of 64 x 64 px" in card
    (tmp_path / "MODEL_CARD.md").unlink()
    invoke(app, *small, "--no-train")
    assert (tmp_path / "MODEL_CARD.md").read_text() == card
    assert read_sums(tmp_path) == before
    invoke(app, *small, "--steps", 2, "--only", "stability")
    after = read_sums(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {DEMO_FILES["stability"]}
    check_sums(tmp_path)


def test_an_unknown_kind_is_refused(app, tmp_path):
    output = invoke(app, "--only", "dncnn", "--out", tmp_path, exit_code=2)
    assert "--only takes mse, stability, diffusion, not dncnn" in output
