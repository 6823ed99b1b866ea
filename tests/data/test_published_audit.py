import pandas as pd
import pytest

from medrobust_lib.data import published
from medrobust_lib.data.published import load_published

SETS = ["collection", "dataset"]


@pytest.fixture
def accuracies():
    return load_published("robustmedclip_table3_accuracy")


@pytest.fixture(scope="module")
def ranked():
    """The rankings as published and under other choices, not to be changed."""
    return published.rankings_by_choice()


def at(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def test_all_50_rows_of_table_2_follow_from_table_3():
    rows = published.rows_of_table_2()
    assert len(rows) == 50
    assert rows["fits"].all()
    assert rows["largest_deviation"].max() == pytest.approx(0.092, abs=0.001)
    adapted = at(rows, dataset="PBC", model="RobustMedCLIP").iloc[0]
    assert adapted["printed"] == 70.1
    assert adapted["recomputed"] == pytest.approx(70.15, abs=0.005)


def test_everything_printed_that_can_be_recomputed_is():
    table = published.recompute_published()
    assert table.groupby("source").size().to_dict() == {"Table 2": 450, "Table 3": 50, "Table 6": 11, "README": 10}
    assert table[["printed", "recomputed"]].notna().all(axis=None)
    assert not table.duplicated(["source", *SETS, "model", "entry"]).any()
    for source in ("Table 2", "Table 3"):
        assert at(table, source=source)["fits"].all()
    assert at(table, source="Table 3")["deviation"].abs().max() < 0.01


def test_exactly_three_entries_do_not_fit():
    table = published.entries_that_do_not_fit()
    found = {(row.source, row.model, row.entry): (row.printed, round(row.recomputed, 1)) for row in table.itertuples()}
    assert found == {
        ("Table 6", "RobustMedCLIP-ResNet, 3 %", "clean error"): (103.1, 106.1),
        ("README", "BioMedCLIP", "clean error"): (116.3, 126.4),
        ("README", "UniMedCLIP", "clean error"): (111.8, 101.8),
    }


@pytest.mark.parametrize("change", [0.002, -0.002])
def test_a_changed_accuracy_is_found_where_it_matters(accuracies, change):
    cell = (accuracies["dataset"] == "OCT") & (accuracies["model"] == "MedCLIP")
    cell &= accuracies["corruption"] == "motion_blur"
    accuracies.loc[cell, "accuracy"] += change
    rows = published.rows_of_table_2(accuracies)
    assert rows[~rows["fits"]][[*SETS, "model"]].to_numpy().tolist() == [["MediMeta-C", "OCT", "MedCLIP"]]
    extra = at(published.entries_that_do_not_fit(accuracies), source="Table 2")
    assert extra["entry"].to_list() == ["CE, motion_blur"]
    assert (extra["deviation"] * change < 0).all()


def test_constant_predictors_are_found_with_their_class_and_their_rank():
    table = published.constant_predictors()
    found = {
        (row.dataset, row.model): (row.count_, row.n, row.columns_at_share, row.every_column, row.rank_by_mce)
        for row in table.rename(columns={"count": "count_"}).itertuples()
    }
    assert found == {
        ("Mammo", "UniMedCLIP"): (129, 326, 8, True, 5),
        ("BreastMNIST", "UniMedCLIP"): (114, 156, 8, True, 1),
        ("Pneumonia", "BioMedCLIP"): (234, 624, 5, False, 4),
        ("Pneumonia", "UniMedCLIP"): (234, 624, 4, False, 3),
        ("Fundus", "BioMedCLIP"): (134, 640, 6, False, 5),
    }
    assert table["columns"].eq(8).all()
    fundus = at(table, dataset="Fundus").iloc[0]
    assert fundus["elsewhere"] == "gaussian_noise, contrast"
    assert fundus["share"] == 134 / 640
    assert fundus["class"] == "normal"
    assert fundus["mce"] == pytest.approx(372.25, abs=0.01)


def test_the_rule_asks_for_the_clean_column_and_for_a_class_of_that_size(accuracies, monkeypatch):
    clean = (accuracies["dataset"] == "Mammo") & (accuracies["corruption"] == "clean")
    accuracies.loc[clean & (accuracies["model"] == "UniMedCLIP"), "accuracy"] += 0.0002
    assert "Mammo" not in set(published.constant_predictors(accuracies)["dataset"])
    counts = load_published("test_class_counts")
    counts.loc[counts["dataset"] == "Fundus", "images"] = [505, 135]
    monkeypatch.setattr(published, "load_published", lambda name: counts)
    assert "Fundus" not in set(published.constant_predictors(accuracies)["dataset"])


def test_a_constant_row_of_ones_own_is_found(accuracies):
    own = accuracies["dataset"].eq("OCTMNIST") & accuracies["model"].eq("MedCLIP")
    accuracies.loc[own, "accuracy"] = 0.25
    found = at(published.constant_predictors(accuracies), dataset="OCTMNIST").iloc[0]
    assert (found["model"], found["count"], found["columns_at_share"]) == ("MedCLIP", 250, 8)
    assert found["class"].count(" or ") == 3  # four classes of 250


def test_other_choices_and_the_ranking(ranked):
    choices = ranked.groupby(["reference", "aggregation"])
    assert choices.ngroups == 6
    assert set(choices.size()) == {5 * 13}  # ten data sets and three means
    printed = at(ranked, reference="CLIP", aggregation="mean of ratios")
    assert (printed["moved"] == 0).all()
    means = at(printed, dataset="mean of 10").set_index("model")["mce"]
    assert means.round(2).to_dict() == {
        "CLIP": 100.0,
        "MedCLIP": 112.48,
        "BioMedCLIP": 126.88,
        "UniMedCLIP": 98.87,
        "RobustMedCLIP": 81.06,
    }
    sums = at(ranked, reference="CLIP", aggregation="ratio of sums", dataset="mean of 10").set_index("model")["mce"]
    assert sums.round(2).to_dict() == {
        "CLIP": 100.0,
        "MedCLIP": 111.91,
        "BioMedCLIP": 126.3,
        "UniMedCLIP": 98.12,
        "RobustMedCLIP": 80.98,
    }


def test_the_order_over_all_sets_is_the_same_under_every_choice_but_not_in_every_set(ranked):
    assert (at(ranked, dataset="mean of 10")["moved"] == 0).all()
    moved = ranked[ranked["moved"] != 0].groupby(["reference", "aggregation"])["dataset"].unique().map(list).to_dict()
    assert moved == {
        ("CLIP", "ratio of sums"): ["BreastMNIST"],
        ("BioMedCLIP", "mean of ratios"): ["BreastMNIST", "mean of 5"],
        ("BioMedCLIP", "ratio of sums"): ["BreastMNIST", "mean of 5"],
        ("mean of models", "mean of ratios"): ["BreastMNIST", "RetinaMNIST"],
        ("mean of models", "ratio of sums"): ["BreastMNIST"],
    }
    breast = at(ranked, reference="CLIP", aggregation="ratio of sums", dataset="BreastMNIST").set_index("model")
    assert breast.loc[["CLIP", "MedCLIP"], "rank"].to_list() == [5, 4]
    assert breast.loc[["CLIP", "MedCLIP"], "paper_rank"].to_list() == [4, 5]


def test_within_a_set_the_ratio_of_sums_ranks_alike_for_every_reference():
    table = published.rankings_by_choice()
    sums = at(table, aggregation="ratio of sums")
    sums = sums[~sums["dataset"].str.startswith("mean")]
    assert (sums.groupby([*SETS, "model"])["rank"].nunique() == 1).all()
    assert not set(table["model"]) & {"mean of models"}


def test_the_mean_of_models_errs_as_their_mean(accuracies):
    relative = published.published_corruption_errors(reference=published.MEAN_OF_MODELS)
    assert len(relative) == 50
    mean = relative.groupby(SETS)[["ratio_of_sums", "ce_zoom_blur", "relative_clean_error"]].mean()
    assert mean.to_numpy() == pytest.approx(100)


def test_an_unknown_reference_names_the_models():
    with pytest.raises(ValueError, match=r"no reference model 'MedCLP' for .*\. Did you mean 'MedCLIP'"):
        published.published_corruption_errors(reference="MedCLP")


def test_ties_share_a_rank():
    accuracies = load_published("robustmedclip_table3_accuracy")
    clip = at(accuracies, model="CLIP").set_index([*SETS, "corruption"])["accuracy"]
    same = accuracies["model"] == "MedCLIP"
    keys = pd.MultiIndex.from_frame(accuracies.loc[same, [*SETS, "corruption"]])
    accuracies.loc[same, "accuracy"] = clip.loc[keys].to_numpy()
    table = at(published.rankings_by_choice(accuracies), dataset="PBC", reference="BioMedCLIP")
    ranks = table.pivot(index="aggregation", columns="model", values="rank")
    assert (ranks["CLIP"] == ranks["MedCLIP"]).all()
