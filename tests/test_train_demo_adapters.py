import importlib.util
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from medrobust_lib.models.adapters import load_adapter
from medrobust_lib.models.loading import load_model

SCRIPT = Path(__file__).parents[1] / "data_scripts" / "train_demo_adapters.py"
SETS = ("phantom/breast", "phantom/chest")


@pytest.fixture
def script(monkeypatch):
    """The script, with two adapters to train on few images."""
    spec = importlib.util.spec_from_file_location("train_demo_adapters", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    jobs = (module.Job("demo-clip", 0.01, 2, 1), module.Job("demo-clip", 0.02, 1, 0, noisy=True))
    monkeypatch.setattr(module, "JOBS", jobs)
    monkeypatch.setattr(module, "DEMO_DATASETS", SETS)
    monkeypatch.setattr(module, "N_VAL", 6)
    monkeypatch.setattr(module, "DEMO_RECIPE", {"epochs": 1, "learning_rate": 1e-3})
    return module


@pytest.fixture
def run(script, monkeypatch):
    """Function that runs the script and gives its output and the ranks that it trained."""
    trained = []
    adapt = script.adapt_lora

    def noted(*args, rank, **options):
        trained.append(rank)
        return adapt(*args, rank=rank, **options)

    monkeypatch.setattr(script, "adapt_lora", noted)
    app = typer.Typer()
    app.command()(script.main)

    def invoke(*arguments):
        trained.clear()
        result = CliRunner().invoke(app, ["--jobs", "1", *map(str, arguments)], env={"COLUMNS": "200"})
        assert result.exit_code == 0, f"{result.output}\n{result.exception}"
        return result.output, list(trained)

    return invoke


@pytest.mark.filterwarnings("ignore:no epoch of 1 is better")
def test_one_command_trains_what_is_missing_and_writes_the_card(run, tmp_path):
    first, second = (tmp_path / "demo-clip" / name for name in ("rank2-1percent-seed1", "rank1-2percent-seed0-noise"))
    output, trained = run("--out", tmp_path, "--only", 1)
    assert (trained, "1 adapters trained, 1 there" in output) == ([2], True)
    assert {path.name for path in tmp_path.iterdir()} == {"demo-clip", "MODEL_CARD.md"}
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert second.name not in (tmp_path / "MODEL_CARD.md").read_text()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.iterdir()}

    output, trained = run("--out", tmp_path)
    assert (trained, "1 adapters trained, 2 there" in output) == ([1], True)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.iterdir()} == before
    facts = {path: json.loads((path / "provenance.json").read_text()) for path in (first, second)}
    for path, sigmas, fraction, count in ((first, [], 0.01, 14), (second, [0.1, 0.2], 0.02, 29)):
        recipe = facts[path]["recipe"]
        assert (recipe["epochs"], recipe["learning_rate"], recipe["augmentation"]["sigmas"]) == (1, 1e-3, sigmas)
        assert list(facts[path]["train"]) == list(facts[path]["validation"]) == list(SETS)
        assert {(part["split"], part["fraction"], part["n"]) for part in facts[path]["train"].values()} == {
            ("train", fraction, count)
        }
        assert {(part["split"], part["n"]) for part in facts[path]["validation"].values()} == {("val", 6)}
        assert [row["epoch"] for row in facts[path]["history"]] == [0, 1]
        assert [set(row) for row in facts[path]["history"]] == [{"epoch", "loss", "val_mean"}] * 2
    model = load_model("demo-clip", device="cpu")
    assert load_adapter(model, second, merged=False).attached.rank == 1

    card = (tmp_path / "MODEL_CARD.md").read_text()
    means = [row["val_mean"] for row in facts[second]["history"]]
    best = facts[second]["best_epoch"]
    assert f"| demo-clip | `{second.name}` | 4,507 | 58 | {best} | {means[0]:.3f} | {means[best]:.3f} |" in card
    assert f"| demo-clip | `{first.name}` | 9,014 | 28 |" in card
    assert "6 val images of each set" in card
    assert "epochs 1, learning rate 0.001" in card

    (tmp_path / "MODEL_CARD.md").unlink()
    output, trained = run("--out", tmp_path)
    assert (trained, "0 adapters trained, 2 there" in output) == ([], True)
    assert (tmp_path / "MODEL_CARD.md").read_text() == card


@pytest.mark.filterwarnings("ignore:no epoch of 1 is better")
def test_adapters_are_stored_in_half_precision(run, tmp_path):
    run("--out", tmp_path, "--only", 1)
    tensors = tmp_path / "demo-clip" / "rank2-1percent-seed1" / "adapter_model.safetensors"
    assert b'"dtype":"F16"' in tensors.read_bytes()
    assert b'"dtype":"F32"' not in tensors.read_bytes()


def test_names_tell_the_planned_adapters_apart():
    spec = importlib.util.spec_from_file_location("train_demo_adapters", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folders = [module.folder_of(Path(), job) for job in module.JOBS]
    assert len(set(folders)) == len(folders) == len(set(module.JOBS))
    assert Path("demo-clip-vit", "rank16-10percent-seed0-noise") in folders
