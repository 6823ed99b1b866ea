"""`medrobust certify` answers in a sentence what its tables hold, goes on where it stopped, and refuses early."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from medrobust_lib import metrics
from medrobust_lib.experiments import read_cards
from medrobust_lib.experiments.images import read_image_table
from medrobust_lib.smoothing.table import certify_dataset
from medrobust_lib.studies.certify_step import certified_in_words

FEW = ("--sigma", 0.1, "--radius", 0.05, "--n", 100, "--alpha", 0.01)


def certificates(folder):
    return pd.read_csv(folder / "cards" / "01-certify_images.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def certified(own_images, tmp_path_factory):
    """A finished run on own images, made by the console script's own function; its folder is not to be changed."""
    from typer.testing import CliRunner

    from medrobust_lib import cli

    out = tmp_path_factory.mktemp("certified") / "run"
    words = ["certify", own_images, "--model", "demo-clip", *FEW, "--out", out, "--device", "cpu"]
    result = CliRunner().invoke(cli.app, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output, out


def test_the_sentence_has_the_numbers_of_the_table(certified):
    text, out = certified
    rows = certificates(out)
    held = int(((rows["label"] == rows["predicted"]) & (rows["radius"] >= 0.05)).sum())
    low, high = (f"{100 * limit:.0f} %" for limit in metrics.accuracy_interval(held, len(rows)))
    said = re.search(r"Of (\d+) images, (\d+) \((\d+ %), 95 % interval (\d+ %) to (\d+ %)\)", text)
    assert said.groups() == (str(len(rows)), str(held), f"{100 * held / len(rows):.0f} %", low, high)
    assert "under every change of L2 norm up to 0.05 ([0, 1] pixels, 64 x 64); zero-shot, sigma 0.1" in text
    assert "guarantee: standard, alpha 0.01 for each image." in text
    assert f"{(rows['predicted'] == -1).sum()} abstain; guessing would be right in 50 %" in text
    assert f"the commonest class alone in {100 * rows['label'].value_counts(normalize=True).max():.0f} %" in text
    assert "not for clinical use" in text


def test_the_images_that_need_a_look_are_named_worst_first(certified):
    text, out = certified
    rows = certificates(out)
    listed = re.findall(r"test/[ab]/\d+\.\w+", text)
    wrong = rows[(rows["predicted"] != rows["label"]) & (rows["predicted"] != -1)]
    assert len(listed) == 5 and set(listed[: len(wrong)]) >= set(wrong["file"][:5])


def test_the_folder_is_a_run_like_any_other(certified, invoke):
    _, out = certified
    (card,) = read_cards(out, nested=False)
    assert (card["notebook"], card["images"], card["parameters"]["dataset"]) == (
        "01-certify",
        "01-certify_images",
        "folder:mine",
    )
    assert len(card["findings"]) == 2 and card["question"] and card["environment"]["device"] == "cpu"
    assert (out / "index.html").is_file() and (out / "figures" / "01-certify_headline.png").is_file()
    assert len([*(out / "images" / "01-certify").glob("*.png")]) == 6
    code, text, _ = invoke("leaderboard", out, "--metric", "certified_accuracy")
    assert code == 0 and "folder:mine" in text
    told = [path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".csv", ".html", ".jsonl")]
    assert not [text for text in told if str(out.parent) in text or "/mine/" in text]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(certified, invoke, own_images, tmp_path):
    _, whole = certified
    out = tmp_path / "run"
    shutil.copytree(whole / "store", out / "store")
    journal = out / "store" / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]) + '{"key": "torn')
    (out / "store" / "table.csv").unlink()
    code, text, _ = invoke("certify", own_images, "--model", "demo-clip", *FEW, "--out", out)
    assert code == 0 and "(2 resumed)" in text
    for name in ("store/table.csv", "cards/01-certify_images.csv", "cards/01-certify_certified_accuracy.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_who_stops_before_anything_is_loaded_is_told_the_command_too(invoke, own_images, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("medrobust_lib.data.registry.path_and_query", stop)
    code, _, error = invoke("certify", own_images, "--model", "demo-clip")
    assert code == 130 and error.endswith(f"It goes on with\n    medrobust certify {own_images} --model demo-clip\n")


def test_the_same_question_has_the_same_folder_and_another_has_another(invoke, own_images, tmp_path, monkeypatch):
    from medrobust_lib.studies.certify_step import CertifyAlone

    folders = []
    monkeypatch.setattr("medrobust_lib.image_commands.default_runs_dir", lambda: tmp_path / "runs")

    def stop(cell, folder, **_):
        folders.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(CertifyAlone, "run", stop)
    for more in ((), (), ("--seed", 1), ("--words", "{templates: ['a scan of {}.']}")):
        code, _, error = invoke("certify", own_images, "--model", "demo-clip", *FEW, *more)
        assert code == 130 and f"It goes on with\n    medrobust certify {own_images} --model demo-clip --sigma" in error
    first, again, seed, words = folders
    assert first == again and len({first, seed, words}) == 3
    assert first.parent == tmp_path / "runs" and first.name.startswith("certify-demo-clip-folder-mine")


def test_words_methods_and_training_images_reach_the_certificates(invoke, own_images, tmp_path):
    words = "{class_names: {a: a harmless lump, b: a cancer}, templates: ['an ultrasound image of {}.']}"
    out = tmp_path / "run"
    train = tmp_path / "train"
    shutil.copytree(own_images / "train", train)
    options = ["--classes", words, "--method", "few-shot", "--train", train, "--shots", 2, "--n-images", 4]
    code, text, _ = invoke("certify", own_images, "--model", "demo-clip", *FEW, *options, "--out", out)
    assert code == 0 and "Of 4 images" in text and "few-shot PromptSmooth, sigma 0.1" in text
    (card,) = read_cards(out, nested=False)
    assert card["prompts"] == {"templates": ["an ultrasound image of {}."], "classes": ["a harmless lump", "a cancer"]}
    assert "Learned from folder:train." in card["notes"]
    assert str(tmp_path) not in (out / "cards" / "01-certify.json").read_text()


def test_an_image_without_a_draw_is_listed_too(certified, tmp_path):
    table = certificates(certified[1]).astype({"confidence": object})
    table.loc[0, ["predicted", "predicted_name", "confidence"]] = [-1, "abstain", ""]
    table.to_csv(tmp_path / "t.csv", index=False)
    assert np.isnan(read_image_table(tmp_path / "t.csv")["confidence"][0])


def test_a_corruption_is_certified_in_its_own_units(invoke, own_images, tmp_path):
    options = ["--perturbation", "contrast", "--n", 60, "--n-images", 2, "--alpha", 0.01, "--out", tmp_path / "run"]
    code, text, _ = invoke("certify", own_images, "--model", "demo-clip", *options)
    assert code == 0 and "under every change of contrast up to 0.1 (log contrast factor)" in text


@pytest.fixture
def shared_patient(own_images, tmp_path):
    """Two folders with an image each of one patient."""
    for side in ("learn", "judge"):
        for label, patients in (("a", ("anna", side)), ("b", (f"another of {side}",))):
            for patient in patients:
                shutil.copytree(own_images / "test" / label, tmp_path / side / "test" / label / patient)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--radius", 2], r"radius=2: n=1000 draws cannot reach it at sigma 0.25, even if all agree; it takes n=\d+"),
        (["--radius", 0], "radius"),
        (["--sigma", 64], "sigma"),
        (["--n-images", 7], "n_images=7 is no whole number from 1 to 6: folder:.*mine has so many test images"),
        (["--model", "demo-clap"], "'demo-clap'"),
        (["--method", "fewshot"], "unknown method 'fewshot'; choose one of few-shot, .*did you mean 'few-shot'"),
        (["--words", "{classes: {a: b}}"], "unknown a key of words 'classes'"),
        (["--perturbation", "contrasts"], "contrasts"),
        (["--alpha", 2], "alpha"),
        (["--jobs", 0], "^[^\n]*--jobs 0: give the number of worker processes, or -1"),
        (["--shots", 4], "--shots 4: zero-shot learns nothing; leave --shots out, or name another --method"),
        (["--train", "phantom/breast"], "--train phantom/breast: zero-shot learns nothing"),
        (["--words", "a fundus photograph " * 300], "is neither a YAML file nor YAML in braces"),
        (["--device", "cuba"], "--device or MEDROBUST_DEVICE: device 'cuba' cannot be used here"),
        (["--dtype", "float23"], "type for --dtype or MEDROBUST_DTYPE: 'float23'; choose one of auto, float32"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(invoke, own_images, tmp_path, options, message):
    model = [] if "--model" in options else ["--model", "demo-clip"]
    code, _, error = invoke("certify", own_images, *model, *options, "--out", tmp_path / "run")
    assert code == 1 and not (tmp_path / "run").exists()
    assert re.search(message, error), error


def test_a_radius_needs_as_many_draws_as_the_refusal_says(invoke, own_images, tmp_path):
    options = ["--sigma", 0.1, "--radius", 0.2, "--n-images", 2, "--out", tmp_path / "run"]
    command = ["certify", own_images, "--model", "demo-clip", *options]
    _, _, error = invoke(*command, "--n", 50)
    needed = int(re.search(r"it takes n=(\d+)", error)[1])
    assert invoke(*command, "--n", needed - 1)[0] == 1
    assert invoke(*command, "--n", needed)[0] == 0


def test_patients_on_both_sides_and_other_classes_are_refused(invoke, shared_patient, own_images, tmp_path):
    options = ["--model", "demo-clip", *FEW, "--method", "few-shot", "--shots", 1, "--out", tmp_path / "run"]
    code, _, error = invoke("certify", shared_patient / "judge", *options, "--train", shared_patient / "learn")
    assert code == 1 and "1 patients are in folder:learn and in folder:judge (the first is 'anna')" in error
    code, _, error = invoke("certify", own_images, *options, "--train", shared_patient / "learn")
    assert code == 1 and "folder:learn has the classes a, b, and folder:mine has" in error


def test_images_learned_from_are_not_tested_and_copies_are_named(invoke, own_images, tmp_path):
    shutil.copytree(own_images / "test", tmp_path / "mine")
    options = ["--model", "demo-clip", *FEW, "--method", "few-shot", "--shots", 1, "--out", tmp_path / "run"]
    code, _, error = invoke("certify", tmp_path / "mine", *options, "--train", f"{tmp_path / 'mine'}?group=none")
    assert code == 1 and "6 images are in folder:mine and in folder:mine (the first is '" in error, error
    table = tmp_path / "list.csv"
    rows = (f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted((tmp_path / "mine").rglob("*.*")))
    table.write_text("\n".join(["path,label", *rows]))
    code, _, error = invoke("certify", tmp_path / "mine", *options, "--train", table)
    assert code == 1 and "6 images are in csv:list.csv and in folder:mine" in error, error
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    assert invoke("certify", tmp_path / "mine", *options, "--train", tmp_path / "copy")[0] == 0
    notes = " ".join(read_cards(tmp_path / "run", nested=False)[0]["notes"])
    assert "6 of 6 test images are nearly identical" in notes


def test_a_killed_few_shot_run_goes_on_beside_another_card(invoke, certified, own_images, tmp_path, monkeypatch):
    from medrobust_lib.studies import certify_step

    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    more = ("--method", "few-shot", "--shots", 1, "--n-images", 2, "--no-thumbnails", "--out", out)
    with monkeypatch.context() as patched:
        patched.setattr(certify_step, "certify_dataset", stop)
        assert invoke("certify", own_images, "--model", "demo-clip", *FEW, *more)[0] == 130
    assert (out / "prompts").is_dir() and not (out / "store").exists()
    (out / "cards").mkdir()
    card = json.loads((certified[1] / "cards" / "01-certify.json").read_text())
    (out / "cards" / "01.json").write_text(json.dumps(card | {"notebook": "01", "images": "", "tables": []}))
    code, text, error = invoke("certify", own_images, "--model", "demo-clip", *FEW, *more)
    assert code == 0 and "Of 2 images" in text, error
    assert not [*(out / "images").rglob("*.png")]


def test_a_folder_of_other_things_is_no_run_folder(invoke, own_images, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-anna.txt").write_text("dear")
    code, _, error = invoke("certify", own_images, "--model", "demo-clip", *FEW, "--out", tmp_path / "letters")
    assert code == 1 and "holds other things than a run (to-anna.txt); give a new folder or that of a run" in error


def test_a_mistyped_folder_is_told_beside_the_one_that_is_there(invoke, tmp_path):
    (tmp_path / "xrays").mkdir()
    code, _, error = invoke("certify", tmp_path / "xrys", "--model", "demo-clip")
    assert code == 1 and f"Did you mean '{tmp_path / 'xrays'}'?" in error and "phantom/blood" not in error


def test_nearly_one_answer_for_all_images_is_said(model, phantoms):
    data = phantoms("breast", split="test", n=6)
    rows = certify_dataset(model, data, sigmas=[0.1], n=50, alpha=0.05).query("method == 'zero-shot'")
    for predicted, said in (
        (data.labels, "is the answer to"),
        (0, "nearly one answer for all"),
        (-1, "no image has an"),
    ):
        changed = rows.assign(predicted=predicted, radius=0.1)
        shares = metrics.certified_accuracy(changed, radii=[0.1])
        first, second = certified_in_words(changed, shares, data, radius=0.1, side=64)
        assert said in second
        assert ("nearly" in second) == (said.startswith("nearly"))
        assert first.startswith(f"Of 6 images, {(predicted == data.labels).sum()} (")
    patients = changed.assign(patient=["x", "x", "y", "y", "z", "z"])
    assert certified_in_words(patients, shares, data, radius=0.1, side=64)[0].startswith("Of 6 images of 3 patients, ")
    unknown = metrics.certified_accuracy(rows.assign(radius_tested=0.1), radii=[9.0])
    assert (
        "nothing is known at radius 9: the draws reach"
        in certified_in_words(rows, unknown, data, radius=9.0, side=64)[0]
    )
