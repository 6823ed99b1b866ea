import json
import re

import numpy as np
import pandas as pd
import pytest

from medrobust_lib.experiments import Metric, Run
from medrobust_lib.experiments.report import show_comparison
from medrobust_lib.metrics.classification import difference_interval, paired_interval
from medrobust_lib.studies.compare import compare_runs


@pytest.fixture
def save(tmp_path):
    """Write a card with per-image certificates (image, predicted) into a run; returns the run's folder."""

    def write(
        run,
        predicted=None,
        *,
        images=None,
        radius=0.1,
        metrics=None,
        model="demo-clip",
        sigma=0.1,
        patients=None,
        **parameters,
    ):
        folder = tmp_path / run
        tables = {}
        of = f"zero-shot (standard), sigma={sigma:g}"
        settings = {"method": "zero-shot", "guarantee": "standard", "sigma": sigma}
        if predicted is not None:
            images = np.arange(len(predicted)) if images is None else images
            tables["01-certify_certificates"] = pd.DataFrame(
                {"dataset": "phantom/chest", "model": model, "method": "zero-shot", "guarantee": "standard",
                 "sigma": sigma, "image": images,
                 "label": images % 3, "predicted": predicted, "radius": radius, "radius_tested": 0.1}
            ).assign(file=[f"a/{image}.png" for image in images])  # fmt: skip
            if patients is not None:
                tables["01-certify_certificates"]["patient"] = patients
            right = float((np.asarray(predicted) == images % 3).mean())
            metrics = metrics or [
                Metric("smoothed_accuracy", right, len(predicted), 0.0, 1.0, of=of, settings=settings)
            ]
        given = {"seed": 0, "radii": [0.1], "n": 100, **parameters}
        Run("01-certify", "Title", folder / f"cell{sigma}{given['n']}", given, 0.0).save_card(
            metrics=metrics, tables=tables, model={"id": model}, dataset={"id": "phantom/chest"}, prompts={}
        )
        return folder

    return write


def test_the_same_images_are_compared_one_by_one(save):
    labels = np.arange(40) % 3
    worse = np.where(np.arange(40) < 10, -1, labels)
    compared = compare_runs(save("a", worse), save("b", labels))
    (row,) = compared.table.to_dict("records")
    assert (row["metric"], row["of"], row["kind"], row["n"]) == (
        "smoothed_accuracy",
        "zero-shot (standard), sigma=0.1",
        "paired",
        "40",
    )
    assert (row["value_a"], row["value_b"], row["difference"]) == (0.75, 1.0, 0.25)
    assert (row["low"], row["high"]) == paired_interval(np.arange(40) < 10)
    assert row["p"] == pytest.approx(2 * 0.5**10)
    assert (compared.only_a, compared.only_b, compared.notes) == ([], [], [])


def test_images_on_which_two_runs_differ_are_named(save):
    labels = np.arange(6) % 3
    first, second = np.where(np.arange(6) == 1, -1, labels), np.where(np.arange(6) == 4, 0, labels)
    images = compare_runs(save("a", first), save("b", second)).images
    assert images[["image", "file", "change"]].values.tolist() == [[1, "a/1.png", 1], [4, "a/4.png", -1]]
    assert set(images["metric"]) == {"smoothed_accuracy"}


def test_a_run_that_gives_one_answer_is_named(save):
    labels = np.arange(30) % 3
    notes = compare_runs(save("a", labels), save("b", np.zeros(30, int))).notes
    assert [note for note in notes if "one answer" in note] == [
        "B gives nearly one answer to the images of phantom/chest (zero-shot (standard), sigma=0.1): what it gets "
        "right says little about the images"
    ]
    assert not any("one answer" in note for note in compare_runs(save("c", labels), save("d", labels)).notes)


def test_images_of_one_patient_do_not_count_as_many_in_a_comparison(save):
    labels, patients = np.arange(40) % 3, np.arange(40) // 10
    worse = np.where(np.arange(40) < 10, -1, labels)  # all images of one patient
    (row,) = compare_runs(save("a", worse, patients=patients), save("b", labels, patients=patients)).table.itertuples()
    assert row.n == "40 of 4 patients" and np.isnan(row.p)
    assert (row.low, row.high) == paired_interval(np.arange(40) < 10, groups=patients) and row.low < -0.2


def test_at_one_severity_an_image_is_right_or_wrong(undisturbed):
    table = compare_runs(undisturbed, undisturbed).table.set_index("metric")
    once = table.loc["accuracy"].query("of != 'clean'")
    assert len(once) == 7
    assert (once["p"] == 1).all()
    assert once[["low", "high"]].drop_duplicates().to_numpy().tolist() == [list(paired_interval(np.zeros(4)))]
    (several,) = table.loc[["average_accuracy"]].to_dict("records")  # a mean over corruptions is no share
    assert np.isnan(several["p"])


def test_what_neither_run_reaches_is_a_dash(undisturbed, capsys):
    table = compare_runs(undisturbed, undisturbed).table
    beyond = table[table.of.str.contains("the draws reach")]
    assert len(beyond) == 4
    assert beyond[["value_a", "value_b", "difference", "low", "high", "p"]].isna().all(axis=None)
    show_comparison(beyond)
    assert re.search(r"– +– +– +4 ", capsys.readouterr().out)


def test_only_common_images_count_and_the_table_says_so(save):
    a = save("a", np.zeros(8, dtype=int), images=np.arange(8))
    b = save("b", np.zeros(8, dtype=int), images=np.arange(4, 12))
    (row,) = compare_runs(a, b).table.to_dict("records")
    assert (row["n"], row["value_a"]) == ("4 common", row["value_b"])


def test_cards_without_answers_are_compared_unpaired(save):
    a = save("a", metrics=[Metric("accuracy", 0.5, 40, 0.34, 0.66), Metric("mce", 90.0, 40)])
    b = save("b", metrics=[Metric("accuracy", 0.7, 60, 0.57, 0.81), Metric("mce", 80.0, 60)])
    table = compare_runs(a, b).table.set_index("metric")
    assert set(table["kind"]) == {"unpaired"}
    assert set(table["n"]) == {"40 | 60"}
    assert (table["low"]["accuracy"], table["high"]["accuracy"]) == difference_interval(
        (0.5, 0.34, 0.66), (0.7, 0.57, 0.81)
    )
    assert table["difference"]["mce"] == -10
    assert np.isnan(table["low"]["mce"])


def test_runs_that_share_no_image_fall_back_to_their_cards(save):
    a = save("a", np.zeros(4, dtype=int), images=np.arange(4))
    b = save("b", np.zeros(4, dtype=int), images=np.arange(4, 8))
    assert compare_runs(a, b).table["kind"].tolist() == ["unpaired"]


def test_what_has_no_partner_is_listed(save):
    labels = np.arange(6) % 3
    for run, sigmas in (("a", (0.1, 0.25)), ("b", (0.1, 0.5))):
        for sigma in sigmas:
            folder = save(run, labels, sigma=sigma)
    compared = compare_runs(folder.parent / "a", folder.parent / "b")
    assert compared.table["of"].tolist() == ["zero-shot (standard), sigma=0.1"]
    assert compared.only_a == ["phantom/chest, demo-clip, smoothed accuracy: zero-shot (standard), sigma=0.25"]
    assert compared.only_b == ["phantom/chest, demo-clip, smoothed accuracy: zero-shot (standard), sigma=0.5"]


def test_one_model_each_is_compared_across_models_and_settings_that_differ_are_told(save):
    labels = np.arange(6) % 3
    compared = compare_runs(save("a", labels), save("b", labels, model="plip", n=500))
    assert compared.table["model"].tolist() == ["demo-clip -> plip"]
    assert compared.notes == [
        "phantom/chest: n is 100 in A and 500 in B",
        "the models differ: demo-clip in A, plip in B",
    ]


def test_two_results_of_one_run_under_one_name_are_told_apart_by_their_settings(save):
    labels = np.arange(6) % 3
    for run in ("a", "b"):
        for n in (100, 500):
            folder = save(run, labels, n=n)
    table = compare_runs(folder.parent / "a", folder.parent / "b").table
    assert sorted(table["of"]) == ["zero-shot (standard), sigma=0.1, n=100", "zero-shot (standard), sigma=0.1, n=500"]


def test_other_images_under_the_same_numbers_are_refused(save, tmp_path):
    a, b = save("a", np.zeros(6, dtype=int)), save("b", np.zeros(6, dtype=int))
    (path,) = b.glob("*/cards/*.csv")
    pd.read_csv(path).assign(label=1).to_csv(path, index=False)
    with pytest.raises(
        ValueError, match=r"image 0 has label 0 in A and 1 in B; the runs were made on different images"
    ):
        compare_runs(a, b)


def test_runs_without_anything_in_common_and_folders_without_cards_are_errors(save, tmp_path):
    a, b = save("a", np.zeros(6, dtype=int)), save("b", np.zeros(6, dtype=int), seed=1)
    with pytest.raises(
        ValueError, match=r"no result in common: demo-clip on phantom/chest \(seed 0\) against .*\(seed 1\)"
    ):
        compare_runs(a, b)
    with pytest.raises(FileNotFoundError, match="no result cards below"):
        compare_runs(a, tmp_path / "nothing")


def test_another_version_of_the_code_is_told(save):
    labels = np.arange(6) % 3
    a, b = save("a", labels), save("b", labels)
    (path,) = b.glob("*/cards/*.json")
    card = json.loads(path.read_text())
    card["environment"]["torch"] = "9.9"
    path.write_text(json.dumps(card))
    assert any(note.startswith("torch is ") and note.endswith(" and 9.9 in B") for note in compare_runs(a, b).notes)
