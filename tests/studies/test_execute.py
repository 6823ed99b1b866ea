import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from medrobust_lib.data.registry import load_dataset
from medrobust_lib.experiments import leaderboard, read_cards
from medrobust_lib.studies.benchmark_step import BenchmarkCell
from medrobust_lib.studies.execute import LEADERBOARD, run_study
from medrobust_lib.studies.steps import described
from medrobust_lib.studies.study_file import read_study


@pytest.fixture
def study(study_file):
    return read_study(study_file())


def quiet(_):
    pass


def test_a_study_writes_cards_rows_a_leaderboard_and_a_page(undisturbed):
    table = pd.read_csv(undisturbed / LEADERBOARD)
    assert {"value", "low", "high", "n", "seed", "dtype", "model", "dataset", "parameters"} <= set(table.columns)
    assert {"commit", "changed", "torch", "medrobust-lib"} <= set(table.columns)
    assert set(table["dtype"]) == {"float32"}
    assert set(table["n"]) == {4}
    # `medrobust leaderboard` reads the same cards.
    again = leaderboard(read_cards(undisturbed))
    assert len(again) == len(table)
    rows = pd.read_csv(next(undisturbed.glob("cells/01*0.05*/cards/*_certificates.csv")))
    assert {"image", "label", "predicted", "radius"} <= set(rows.columns)
    shares = table[(table["metric"] == "smoothed_accuracy") & (table["of"] == "zero-shot (standard), sigma=0.05")]
    zero_shot = rows[rows["method"] == "zero-shot"]
    assert shares["value"].tolist() == [(zero_shot["predicted"] == zero_shot["label"]).mean()]
    page = (undisturbed / "index.html").read_text()
    # Twenty draws that agree prove p**20 = alpha: radius .054 at sigma .05, and not the .2 that was asked for.
    (beyond,) = table[table["of"] == "zero-shot (standard), sigma=0.05, radius=0.2 (the draws reach 0.05422)"].index
    assert table.loc[beyond, ["value", "low", "high"]].isna().all()
    assert 'data-label="value [95 % interval]" class="number-cell">–</td>' in page
    assert "cells/02-benchmark_demo-clip_phantom-chest_seed0/index.html" in page
    assert (undisturbed / "cells/02-benchmark_demo-clip_phantom-chest_seed0/index.html").exists()
    assert "synthetic drawings" in page


def test_the_page_of_a_study_shows_figures_prompts_chance_and_caveats(undisturbed):
    page = (undisturbed / "index.html").read_text()
    figures = re.findall(r'<a href="([^"]*)"><img src="([^"]*)" alt="([^"]*)"', page)
    captions = [
        "Certified accuracy over the radius: 1 certify demo-clip on phantom/chest, sigma 0.05, seed 0",
        "Certified accuracy over the radius: 1 certify demo-clip on phantom/chest, sigma 0.1, seed 0",
        "Accuracy over severity: 2 benchmark demo-clip on phantom/chest, seed 0",
    ]
    assert [alt for _, _, alt in figures] == re.findall("<figcaption>(.*?)</figcaption>", page) == captions
    assert all(
        (undisturbed / file).is_file() for _, *files in zip(captions, figures, strict=True) for file in files[0][:2]
    )
    behind = page[page.index('id="behind"') :]
    assert behind.count('data-label="chance">.333</td>') == 3
    (card,) = [card for card in read_cards(undisturbed) if card["notebook"] == "02-benchmark"]
    (share,) = [metric["value"] for metric in card["metrics"] if metric["name"] == "majority_share"]
    assert f'data-label="most frequent answer">{share:.3f}'.replace(">0.", ">.") in behind
    assert re.findall('nearly one answer">(.*?)<', behind) == ["–", "–", "no"]
    assert behind.count("synthetic phantoms, not patients&#39; images") == 3
    template = load_dataset("phantom/chest", n=4).templates[0]
    assert behind.count(template) == 3


def test_processes_and_a_notebook_give_what_one_process_gives(study_file, notebooks, tmp_path, undisturbed):
    text = study_file().read_text() + "  - notebook: '01'\n    parameters: {sigma: 0.5}\n"
    study = read_study(study_file(text), notebooks=notebooks)
    finished = run_study(study, tmp_path / "out", jobs=2, notebooks=notebooks, announce=quiet)
    assert (finished.done, finished.failures) == (4, {})
    table = pd.read_csv(tmp_path / "out" / LEADERBOARD, dtype={"notebook": str})
    of_notebook = table["notebook"] == "01"
    assert table[of_notebook]["value"].tolist() == [0.5]
    rest = table[~of_notebook].drop(columns=["commit", "changed"]).reset_index(drop=True)
    alone = pd.read_csv(undisturbed / LEADERBOARD, dtype={"notebook": str}).drop(columns=["commit", "changed"])
    pd.testing.assert_frame_equal(rest, alone, check_dtype=False)


def test_a_failing_cell_loses_nothing_and_is_tried_again(study, tmp_path, monkeypatch, capsys):
    def broken(cell, study, **more):
        raise OSError("no space left")

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(BenchmarkCell, "run", broken)
        finished = run_study(study, tmp_path / "out", announce=lines.append)
    assert finished.done == 2
    assert finished.failures == {"2 benchmark demo-clip on phantom/chest, seed 0": "OSError: no space left"}
    assert [line.partition(": done in")[0] for line in lines] == [
        "1 certify demo-clip on phantom/chest, sigma 0.05, seed 0",
        "1 certify demo-clip on phantom/chest, sigma 0.1, seed 0",
        "FAILED 2 benchmark demo-clip on phantom/chest, seed 0; the other cells go on",
    ]
    assert "study tiny: 3 of 3 cells" in capsys.readouterr().out
    assert set(finished.leaderboard["notebook"]) == {"01-certify"}
    assert "OSError: no space left" in (tmp_path / "out" / "index.html").read_text()
    assert "Traceback" in next((tmp_path / "out").glob("cells/02*/log.txt")).read_text()
    lines.clear()
    finished = run_study(study, tmp_path / "out", announce=lines.append)
    assert (finished.done, finished.failures) == (3, {})
    assert len(lines) == 1, "only the cell that had failed ran"
    assert "no space left" not in (tmp_path / "out" / "index.html").read_text()


def test_a_cell_that_the_system_refuses_is_told_with_what_helps(study, tmp_path):
    (tmp_path / "out" / "cells").mkdir(parents=True)
    (tmp_path / "out" / "journal.jsonl").touch()
    blocked = tmp_path / "out" / "cells" / "02-benchmark_demo-clip_phantom-chest_seed0"
    blocked.write_text("a file where the cell's folder should be")
    finished = run_study(study, tmp_path / "out", announce=quiet)
    assert finished.done == 2
    assert list(finished.failures.values()) == [f"{blocked}: file exists; move it away, or give another name"]


def test_another_study_in_the_same_folder_is_refused_with_the_differences(study, study_file, tmp_path, undisturbed):
    before = (undisturbed / LEADERBOARD).read_bytes()
    other = read_study(study_file(study_file().read_text().replace("n: 20", "n: 30").replace("0.05, 0.1", "0.05")))
    with pytest.raises(ValueError, match="belongs to other parameters") as caught:
        run_study(other, undisturbed, announce=quiet)
    assert "study.steps.1.certify.n: the store has 20, this run asks 30" in str(caught.value)
    assert "study.steps.1.certify.sigmas: the store has [0.05, 0.1], this run asks [0.05]" in str(caught.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis.txt\) and no store"):
        run_study(study, tmp_path / "mine", announce=quiet)
    assert (undisturbed / LEADERBOARD).read_bytes() == before


def test_a_killed_study_goes_on_and_ends_with_the_same_leaderboard(study_file, tmp_path, undisturbed):
    path = study_file()
    code = "from medrobust_lib.cli import main; main()"
    command = [sys.executable, "-c", code, "study", str(path), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    journal = tmp_path / "killed" / "journal.jsonl"
    while not (journal.exists() and journal.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert 1 <= len(done) < 3
    card = next((tmp_path / "killed" / "cells" / done[0] / "cards").glob("*.json"))
    made = card.stat().st_mtime_ns
    study = read_study(path)
    finished = run_study(study, tmp_path / "killed", announce=quiet)
    assert finished.done == 3
    assert card.stat().st_mtime_ns == made, "a finished cell does not run again"
    assert (tmp_path / "killed" / LEADERBOARD).read_bytes() == (undisturbed / LEADERBOARD).read_bytes()
    assert (tmp_path / "killed" / "table.csv").read_bytes() == (undisturbed / "table.csv").read_bytes()


def test_models_are_compared_by_corruption_errors_relative_to_the_first(study_file, tmp_path, monkeypatch):
    import medrobust_lib as mr

    def load(id, **arguments):
        return mr.load_model("demo-clip", **arguments)

    text = "models: [demo-clip, other]\ndatasets: [phantom/histology]\nn_images: 18\n"
    text += "steps: [{benchmark: {severities: [5]}}]\n"
    monkeypatch.setattr("medrobust_lib.parameters.check_models", lambda ids, *, generative: None)
    monkeypatch.setattr("medrobust_lib.studies.steps.load_model", load)
    table = run_study(read_study(study_file(text)), tmp_path / "out", announce=quiet).leaderboard
    errors = table[table["metric"] == "mce"].set_index("model")
    assert errors["value"].to_dict() == {"demo-clip": 100.0, "other": 100.0}  # the same model under two names
    assert set(errors["low"].dropna()) <= {100.0}
    assert set(errors["of"]) == {"medimeta-c at 5, relative to demo-clip"}


def test_no_scheduler_is_an_error_that_says_what_to_start(study, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("medrobust_lib.studies.execute.CLUSTER_TIMEOUT", 0.5)
    with pytest.raises(
        RuntimeError, match=r"no scheduler answers at 'tcp://127.0.0.1:9'.*start one with `dask schedul"
    ):
        run_study(study, tmp_path / "out", cluster="tcp://127.0.0.1:9", announce=quiet)


@pytest.mark.filterwarnings("ignore:(?s).*Class-balanced draw")
def test_a_study_draws_as_its_file_says_and_its_cards_tell(study_file, tmp_path):
    head = "models: [demo-clip]\ndatasets: [phantom/chest]\nseeds: [3]\nn_images: 8\ndraw: balanced\n"
    steps = "steps:\n  - certify: {sigmas: [0.1], n0: 2, n: 20, alpha: 0.05}\n  - benchmark: {severities: [5]}\n"
    finished = run_study(read_study(study_file(head + steps)), tmp_path / "out", announce=quiet)
    expected = load_dataset("phantom/chest", n=8, seed=3, draw="balanced")
    assert finished.failures == {}
    for table in ("certificates", "answers"):
        (rows,) = [pd.read_csv(path) for path in (tmp_path / "out" / "cells").glob(f"*/cards/*_{table}.csv")]
        assert sorted(set(rows["image"])) == expected.indices.tolist()
    for path in (tmp_path / "out" / "cells").glob("*/cards/*.json"):
        card = json.loads(path.read_text())
        assert card["parameters"]["draw"] == "balanced"
        assert expected.caveats[-1] in card["notes"]


def test_what_was_found_in_the_images_is_on_the_card_of_a_cell():
    data = load_dataset("phantom/chest", n=3)
    data = replace(data, provenance=data.provenance | {"caveats": ["Left out of mine: a/notes.txt (1 in all)."]})
    model = SimpleNamespace(id="m", identity=lambda: {"id": "m"}, image_size=64, provenance={})
    notes = described(model, data, ["a note"])["notes"]
    assert notes[2:] == [*data.caveats, "For teaching and research, not for clinical use.", "a note"]
