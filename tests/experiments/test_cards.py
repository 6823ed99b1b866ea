import errno
import json
import os
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from medrobust_lib import experiments, places
from medrobust_lib.experiments import Metric, cards, start_run
from medrobust_lib.experiments.cards import CAPTION_KEY, RUN_DIR_VARIABLE
from medrobust_lib.experiments.report import show_ranking, write_report


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "demo"))
    return start_run("01", "Title", model="demo-clip", sigmas=[0.0, 0.25])


def save(run, **changes):
    arguments = {
        "metrics": [Metric("accuracy", 0.75, 4, 0.2, 0.99), Metric("accuracy", 0.5, 8, of="sigma=0.25")],
        "tables": {"01_accuracy": pd.DataFrame({"model": ["demo-clip"], "accuracy": [0.75]})},
        "model": {"id": "demo-clip"},
        "dataset": {"id": "phantom/blood", "n": 4},
        "prompts": {"template": "{}"},
    }
    return run.save_card(**{**arguments, **changes})


def test_card_holds_numbers_as_numbers_and_everything_that_shaped_them(run):
    card = json.loads(save(run).read_text())
    assert card["parameters"] == {"model": "demo-clip", "sigmas": [0.0, 0.25]}
    assert card["metrics"][0] == {
        "name": "accuracy", "value": 0.75, "n": 4, "low": 0.2, "high": 0.99, "of": "", "model": "", "dataset": "",
        "settings": {},
    }  # fmt: skip
    assert re.fullmatch("[0-9a-f]{16}", card["parameters_hash"])
    assert card["seconds"] >= 0
    assert card["peak_memory_mb"] > 10
    assert {"python", "torch", "open_clip_torch", "medrobust-lib"} <= set(card["environment"])
    assert card["tables"] == ["01_accuracy"]


def test_card_and_tables_lie_in_the_runs_folder_and_no_part_files_stay(run, tmp_path):
    path = save(run)
    assert path == tmp_path / "demo" / "cards" / "01.json"
    assert pd.read_csv(path.with_name("01_accuracy.csv")).accuracy.tolist() == [0.75]
    assert sorted(p.name for p in path.parent.iterdir()) == ["01.json", "01_accuracy.csv"]


def test_hash_depends_on_parameters_only(run, monkeypatch, tmp_path):
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "elsewhere"))
    same = start_run("02", "Other", sigmas=[0.0, 0.25], model="demo-clip")
    other = start_run("01", "Title", model="demo-clip", sigmas=[0.0, 0.5])
    assert run.parameters_hash == same.parameters_hash != other.parameters_hash


def test_nan_is_refused_and_an_older_card_survives(run):
    before = save(run).read_text()
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        save(run, metrics=[Metric("accuracy", float("nan"), 4)])
    assert (run.folder / "cards" / "01.json").read_text() == before


def test_what_draws_cannot_reach_is_no_number_and_has_no_rank(run, tmp_path, capsys):
    nan = float("nan")
    beyond = Metric("certified_accuracy", nan, 4, nan, nan, of="radius=2")
    path = save(run, metrics=[beyond, Metric("certified_accuracy", 0.25, 4, 0.1, 0.6, of="radius=1")])
    assert [json.loads(path.read_text())["metrics"][0][name] for name in ("value", "low", "high")] == [None] * 3
    table = experiments.leaderboard(experiments.read_cards(tmp_path))
    assert table["of"].tolist() == ["radius=1", "radius=2"]
    assert table["value"].isna().tolist() == [False, True]
    show_ranking(table)
    assert re.search(r"– +– +4 .*radius=2", capsys.readouterr().out)
    index = write_report(tmp_path / "demo").read_text()
    assert "– where the draws cannot reach what was asked" in index and ">–</td>" in index


def test_no_folder_of_a_machine_enters_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDROBUST_RUN_DIR", str(tmp_path))
    folder = tmp_path / "somebody" / "scans"
    run = start_run("01", f"Images of {folder}", dataset=f"folder:{folder}?group=folder", words=f"{folder}/words.yaml")
    facts = {"model": {"id": f"local-dir:{folder}"}, "dataset": {"id": "folder:scans"}, "prompts": {"of": str(folder)}}
    facts |= {"question": f"What of {folder}?", "findings": [f"{folder} is small."]}
    metrics = [Metric("accuracy", 0.5, 4, of=str(folder), model=f"local-dir:{folder}", settings={"of": str(folder)})]
    text = run.save_card(metrics=metrics, tables={}, notes=[f"Images read from {folder}."], **facts).read_text()
    card = json.loads(text)
    assert card["parameters"] == {"dataset": "folder:scans?group=folder", "words": "words.yaml"}
    assert card["metrics"][0]["model"] == card["model"]["id"] == "local-dir:scans" and card["notes"] == [
        "Images read from scans."
    ]
    assert str(tmp_path) not in text and card["parameters_hash"] == run.parameters_hash


def test_parameters_must_be_json():
    with pytest.raises(TypeError, match="not JSON serializable"):
        start_run("01", "Title", model=object())


def test_resolved_parameters_are_printed(capsys):
    start_run("01", "Title", model="demo-clip", n_images=4)
    assert capsys.readouterr().out.splitlines() == ["model        demo-clip", "n_images     4"]


def test_by_hand_the_folder_does_not_depend_on_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    here = start_run("01", "Title").folder
    monkeypatch.chdir(tmp_path)
    assert start_run("01", "Title").folder == here == places.project_root() / "runs" / "by-hand"


def test_figures_are_written_under_the_notebooks_number(run):
    path = run.save_figure(Figure(figsize=(2, 1)), "curve")
    assert path == run.folder / "figures" / "01_curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["01_curve.png"]


@pytest.mark.parametrize("caption", ["Accuracy falls with \N{GREEK SMALL LETTER SIGMA}", ""])
def test_a_caption_travels_inside_the_figure(run, caption):
    path = run.save_figure(Figure(figsize=(2, 1)), "curve", caption=caption)
    with Image.open(path) as picture:
        assert picture.info.get(CAPTION_KEY, "") == caption


def test_leaderboard_comes_from_cards_alone(run, tmp_path):
    save(run)
    table = experiments.leaderboard(experiments.read_cards(tmp_path))
    assert table[["run", "notebook", "model", "dataset", "metric", "of", "value", "n"]].to_numpy().tolist() == [
        ["demo", "01", "demo-clip", "phantom/blood", "accuracy", "", 0.75, 4],
        ["demo", "01", "demo-clip", "phantom/blood", "accuracy", "sigma=0.25", 0.5, 8],
    ]


def test_leaderboard_tells_seed_precision_commit_and_versions(run, tmp_path):
    save(run, model={"id": "demo-clip", "dtype": "torch.bfloat16"})
    path = tmp_path / "demo" / "cards" / "01.json"
    card = json.loads(path.read_text())
    card["git"] = {"commit": "abc", "changed": True}
    card["parameters"]["seed"] = 3
    path.write_text(json.dumps(card))
    table = experiments.leaderboard(experiments.read_cards(tmp_path))
    assert table[["seed", "dtype", "commit", "changed"]].drop_duplicates().to_numpy().tolist() == [
        [3, "bfloat16", "abc", True]
    ]
    assert set(table["torch"]) == {card["environment"]["torch"]}
    assert set(table["medrobust-lib"]) == {card["environment"]["medrobust-lib"]}


def test_a_metric_belongs_to_the_model_and_data_set_that_it_names(run, tmp_path):
    metrics = [
        Metric("accuracy", 0.1, 4, of="sigma=0.25"),
        Metric("accuracy", 0.5, 4, of="mucus", model="biomedclip", dataset="medmnist/oct"),
    ]
    save(run, metrics=metrics)
    table = experiments.leaderboard(experiments.read_cards(tmp_path)).sort_values("value")
    assert table[["model", "dataset", "of"]].to_numpy().tolist() == [
        ["demo-clip", "phantom/blood", "sigma=0.25"],
        ["biomedclip", "medmnist/oct", "mucus"],
    ]


def test_cards_written_before_metrics_could_name_a_model_are_read(run, tmp_path):
    path = save(run)
    card = json.loads(path.read_text()) | {"format": 1}
    for metric in card["metrics"]:
        del metric["model"], metric["dataset"], metric["settings"]
    path.write_text(json.dumps(card))
    assert experiments.leaderboard(experiments.read_cards(tmp_path)).model.tolist() == ["demo-clip", "demo-clip"]


def test_leaderboard_of_cards_without_metrics_has_its_columns(run, tmp_path):
    save(run, metrics=[])
    assert list(experiments.leaderboard(experiments.read_cards(tmp_path)).columns)[:2] == ["run", "notebook"]


def test_cards_of_runs_inside_a_run_are_read_only_when_wanted(run, tmp_path, monkeypatch):
    save(run)
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(run.folder / "inner"))
    save(start_run("01", "Title"))
    assert [card["run"] for card in experiments.read_cards(run.folder)] == ["demo", "inner"]
    assert [card["run"] for card in experiments.read_cards(run.folder, nested=False)] == ["demo"]


def test_missing_broken_and_foreign_cards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no result cards below .*; `medrobust run 01` writes one"):
        experiments.read_cards(tmp_path)
    card = tmp_path / "x" / "cards" / "01.json"
    card.parent.mkdir(parents=True)
    card.write_text("{")
    with pytest.raises(ValueError, match=r"01\.json is not a result card: .* Delete it and run the notebook again"):
        experiments.read_cards(tmp_path)
    card.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has card format 99, this version reads 1 to 2"):
        experiments.read_cards(tmp_path)


def test_a_folder_that_cannot_be_read_is_not_passed_over(run, tmp_path, monkeypatch):
    save(run)
    (tmp_path / "private").mkdir()
    scan = os.scandir

    def refused(path):
        if Path(path).name == "private":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="private"):
        experiments.read_cards(tmp_path)
    assert len(experiments.read_cards(tmp_path / "demo", nested=False)) == 1
    with pytest.raises(NotADirectoryError):
        experiments.read_cards(tmp_path / "demo" / "cards" / "01.json")


def test_a_figure_is_whole_or_as_it_was(run):
    figure = Figure(figsize=(1, 1))
    path = run.save_figure(figure, "curve", caption="old")
    before = path.read_bytes()

    def full(file, **_):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    figure.savefig = full
    with pytest.raises(OSError, match=r"disk is full: 01_curve\.png could not be written") as caught:
        run.save_figure(figure, "curve")
    assert caught.value.filename == str(path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {path.name: before}


@pytest.mark.hardening(
    area="interruption", tried="an error while a card is written",
    outcome="the old card stays whole",
)  # fmt: skip
def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "card.json"
    experiments.write_text_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        experiments.write_text_atomically(path, "new")
    assert path.read_text() == "old"


def test_what_is_left_out_is_told_in_one_line_and_on_the_card(run, capsys):
    run.leave_out("learned prompts", "no word embeddings")
    assert capsys.readouterr().out.splitlines()[-1] == "Left out: learned prompts: no word embeddings"
    card = json.loads(save(run, notes=["synthetic"]).read_text())
    assert card["notes"] == ["synthetic", "Left out: learned prompts: no word embeddings"]


def test_a_damaged_metric_is_named_with_its_value(run, tmp_path):
    save(run)
    path = run.folder / "cards" / "01.json"
    card = json.loads(path.read_text())
    card["metrics"][1] |= {"name": "average_accuracy", "value": "much"}
    path.write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"metric 'average_accuracy': 'value' is 'much', a str"):
        experiments.read_cards(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card["metrics"][1]["settings"].update(method=None), "metric 'accuracy': 'method' is None"),
        (lambda card: card.pop("created"), "'created'"),
    ],
)
def test_what_a_leaderboard_counts_on_is_looked_at_when_a_card_is_read(run, tmp_path, change, said):
    path = save(run)
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))
    with pytest.raises(ValueError, match=rf"01\.json is a damaged result card: {said}"):
        experiments.read_cards(tmp_path)


def test_a_report_needs_no_notes_on_a_card(run):
    save(run)
    path = run.folder / "cards" / "01.json"
    card = json.loads(path.read_text())
    del card["notes"]
    path.write_text(json.dumps(card))
    assert "Title" in write_report(run.folder).read_text(encoding="utf-8")


def test_a_checkout_without_a_commit_is_none(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(cards, "__file__", str(tmp_path / "medrobust_lib" / "experiments" / "cards.py"))
    assert cards.git_state() == {}


def test_a_git_that_does_not_answer_costs_no_card(monkeypatch):
    def slow(*_, timeout, **__):
        raise subprocess.TimeoutExpired("git", timeout)

    monkeypatch.setattr(cards.subprocess, "run", slow)
    assert cards.git_state() == {}
