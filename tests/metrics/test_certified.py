import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, norm

from medrobust_lib import metrics
from medrobust_lib.smoothing.bounds import maximum_radius


def certificates(**columns):
    """Five images of one method at one sigma: right, right, wrong, abstained, right with no radius."""
    return pd.DataFrame(
        {
            "dataset": "phantom/blood",
            "method": "zero-shot",
            "guarantee": "standard",
            "n_classes": 8,
            "sigma": 0.5,
            "image": [0, 1, 2, 3, 4],
            "label": [0, 0, 1, 1, 2],
            "predicted": [0, 0, 2, -1, 2],
            "radius": [1.0, 0.25, 1.5, 0.0, 0.0],
            "draws": [100, 200, 300, 400, 500],
        }
        | columns
    )


def by_radius(table):
    return table.set_index("radius")["certified_accuracy"].to_dict()


def test_certified_accuracy_of_five_images():
    table = metrics.certified_accuracy(certificates(), [0, 0.25, 0.26, 1.0, 1.5])
    # Wrong and abstained images stay in the denominator whatever their radius; a radius that is met exactly counts.
    assert by_radius(table) == {0: 0.6, 0.25: 0.4, 0.26: 0.2, 1.0: 0.2, 1.5: 0.0}
    assert (table["n"] == 5).all()
    assert (table["chance"] == 0.125).all()
    assert list(table.columns) == [
        "dataset",
        "method",
        "guarantee",
        "sigma",
        "radius",
        "certified_accuracy",
        "low",
        "high",
        "n",
        "chance",
    ]


def test_certified_accuracy_carries_clopper_pearson_intervals():
    table = metrics.certified_accuracy(certificates(), [0, 0.25, 1.5])
    for hits, row in zip((3, 2, 0), table.itertuples(), strict=True):
        assert (row.low, row.high) == pytest.approx(metrics.accuracy_interval(hits, 5))
    assert table["low"].iloc[-1] == 0
    assert table["high"].iloc[0] == pytest.approx(beta.ppf(0.975, 4, 2))


def test_an_abstention_is_never_correct_even_with_a_radius():
    # A table from elsewhere may mark abstentions by the prediction alone.
    rows = certificates(radius=[1.0] * 5)
    assert by_radius(metrics.certified_accuracy(rows, [0.5])) == {0.5: 0.6}
    everything = certificates(predicted=[-1] * 5, radius=[0.0] * 5)
    assert by_radius(metrics.certified_accuracy(everything, [0])) == {0: 0.0}


def test_certified_accuracy_falls_with_the_radius():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"sigma": 1.0, "image": range(200), "label": 0})
    rows["predicted"] = rng.integers(-1, 2, 200)
    rows["radius"] = rng.uniform(0, 2, 200)
    table = metrics.certified_accuracy(rows, np.linspace(0, 2, 30))
    assert np.all(np.diff(table["certified_accuracy"]) <= 0)
    assert table["certified_accuracy"].iloc[0] == np.mean(rows["predicted"] == 0)
    assert "chance" not in table


def test_radii_keep_the_order_they_were_asked_in():
    table = metrics.certified_accuracy(certificates(), [1, 0, 0.25])
    assert table["radius"].tolist() == [1, 0, 0.25]


def test_methods_and_noise_levels_are_told_apart():
    other = certificates(method="ensemble", predicted=[0, 0, 1, 1, 2], radius=[2.0] * 5)
    louder = certificates(sigma=1.0, predicted=[-1] * 5)
    rows = pd.concat([certificates(), other, louder])
    table = metrics.certified_accuracy(rows, [0.25])
    found = table.set_index(["method", "sigma"])["certified_accuracy"].to_dict()
    assert found == {("zero-shot", 0.5): 0.4, ("ensemble", 0.5): 1.0, ("zero-shot", 1.0): 0.0}


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("sampling", ("fixed", "sequential")),
        ("mode", ("predict", "evaluate")),
        ("alpha", (0.001, 0.05)),
        ("seed", (0, 1)),
    ],
)
def test_certificates_made_differently_are_never_pooled(column, values):
    rows = pd.concat([certificates(**{column: value}) for value in values])
    table = metrics.certified_accuracy(rows, [0])
    assert table[column].tolist() == list(values)
    assert (table["n"] == 5).all()


def test_groups_with_an_unknown_model_are_kept():
    table = metrics.certified_accuracy(certificates(model=None), [0])
    assert len(table) == 1
    assert table["n"].item() == 5


def test_certified_accuracy_per_class():
    table = metrics.certified_accuracy(certificates(), [0, 0.5], per_class=True)
    found = table.set_index(["label", "radius"])["certified_accuracy"].to_dict()
    assert found == {(0, 0): 1.0, (0, 0.5): 0.5, (1, 0): 0.0, (1, 0.5): 0.0, (2, 0): 1.0, (2, 0.5): 0.0}
    assert table.groupby("label")["n"].first().to_dict() == {0: 2, 1: 2, 2: 1}
    # Weighted by their sizes, the classes make up the whole.
    whole = metrics.certified_accuracy(certificates(), [0, 0.5])["certified_accuracy"].to_numpy()
    parts = [np.average(part["certified_accuracy"], weights=part["n"]) for _, part in table.groupby("radius")]
    np.testing.assert_allclose(parts, whole)


def test_average_certified_radius_counts_wrong_answers_and_abstentions_as_zero():
    # (1 + 0.25 + 0 + 0 + 0) / 5; the wrong image's radius of 1.5 does not count.
    assert metrics.average_certified_radius(certificates()) == pytest.approx(0.25)
    assert metrics.average_certified_radius(certificates(predicted=[-1] * 5)) == 0


def test_an_average_over_different_noise_levels_is_refused():
    mixed = pd.concat([certificates(), certificates().assign(sigma=2.0)])
    with pytest.raises(ValueError, match="differ in sigma; an average over them means nothing"):
        metrics.average_certified_radius(mixed)


def test_average_certified_radius_is_the_area_under_the_certified_accuracy():
    rng = np.random.default_rng(1)
    rows = pd.DataFrame({"sigma": 1.0, "label": 0, "predicted": rng.integers(-1, 2, 300), "radius": rng.random(300)})
    step = 0.01
    table = metrics.certified_accuracy(rows, np.arange(step / 2, 1, step))
    assert table["certified_accuracy"].sum() * step == pytest.approx(metrics.average_certified_radius(rows), abs=step)


def test_certification_summary_of_five_images():
    summary = metrics.certification_summary(certificates())
    assert len(summary) == 1
    row = summary.iloc[0]
    assert row["smoothed_accuracy"] == 0.6
    assert (row["low"], row["high"]) == pytest.approx(metrics.accuracy_interval(3, 5))
    assert row["abstain_rate"] == pytest.approx(0.2)
    assert row["average_certified_radius"] == pytest.approx(0.25)
    assert row["majority_share"] == 0.5
    assert row["draws"] == 300
    assert row["n"] == 5
    assert row["chance"] == 0.125


def test_a_collapsed_classifier_shows_in_the_summary():
    constant = certificates(sigma=1.0, predicted=[0, 0, 0, 0, -1])
    silent = certificates(sigma=2.0, predicted=[-1] * 5, radius=[0.0] * 5)
    summary = metrics.certification_summary(pd.concat([constant, silent])).set_index("sigma")
    assert summary.loc[1.0, "majority_share"] == 1
    assert summary.loc[2.0, "abstain_rate"] == 1
    assert math.isnan(summary.loc[2.0, "majority_share"])
    assert summary.loc[2.0, "average_certified_radius"] == 0


def two_noise_levels():
    quiet = certificates(sigma=0.25, radius=[0.5, 0.25, 0, 0, 0.1])
    loud = certificates(sigma=1.0, radius=[2.0, 1.0, 0, 0, 0.0], predicted=[0, 0, 2, -1, -1])
    return [metrics.certified_accuracy(rows, [0, 0.1, 0.25, 1.0, 3.0]) for rows in (quiet, loud)]


@pytest.mark.parametrize("arrange", [lambda a, b: [a, b], lambda a, b: [b, a]])
@pytest.mark.parametrize("ignore_index", [True, False])
def test_envelope_takes_the_best_noise_level_for_each_radius(arrange, ignore_index):
    quiet, loud = two_noise_levels()
    table = pd.concat(arrange(quiet, loud), ignore_index=ignore_index)
    envelope = metrics.certified_envelope(table).set_index("radius").sort_index()
    assert envelope["certified_accuracy"].to_dict() == {0: 0.6, 0.1: 0.6, 0.25: 0.4, 1.0: 0.4, 3.0: 0.0}
    # At 0.25 and 3 both are equally good: the smaller sigma is kept.
    assert envelope["sigma"].to_dict() == {0: 0.25, 0.1: 0.25, 0.25: 0.25, 1.0: 1.0, 3.0: 0.25}
    assert (envelope["convention"] == "best sigma per radius").all()
    assert envelope.loc[1.0, "low"] == pytest.approx(metrics.accuracy_interval(2, 5)[0])


def test_envelope_keeps_methods_and_classes_apart():
    rows = pd.concat([certificates(), certificates(sigma=1.0), certificates(method="ensemble")])
    assert len(metrics.certified_envelope(metrics.certified_accuracy(rows, [0, 1]))) == 4
    assert len(metrics.certified_envelope(metrics.certified_accuracy(rows, [0, 1], per_class=True))) == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.certified_accuracy(certificates(label=-1), [0]),
            "labels below 0: -1 stands for an abstention",
        ),
        (
            lambda: metrics.certified_accuracy(certificates().drop(columns=["radius", "label"]), [0]),
            r"no certificates to summarise: 5 rows, missing columns \['label', 'radius'\]",
        ),
        (lambda: metrics.certified_accuracy(certificates().iloc[:0], [0]), "no certificates to summarise: 0 rows"),
        (
            lambda: metrics.certification_summary(certificates().drop(columns="draws")),
            r"5 rows, missing columns \['draws'\]",
        ),
        (
            lambda: metrics.certified_accuracy(certificates()[["label", "predicted", "radius"]], [0]),
            "certificates need at least one grouping column of dataset, model, method",
        ),
        (lambda: metrics.certified_accuracy(certificates(), []), r"radii=\[\]: give at least one radius"),
        (lambda: metrics.certified_accuracy(certificates(), [0, -0.1]), r"radii=\[0.0, -0.1\]: give at least one"),
        (lambda: metrics.certified_accuracy(certificates(), [math.nan]), r"radii=\[nan\]: give at least one radius"),
        (
            lambda: metrics.certified_accuracy(pd.concat([certificates(), certificates()]), [0]),
            "an image occurs twice in one group of certificates",
        ),
        (
            lambda: metrics.certification_summary(certificates(image=[0, 1, 2, 3, 3])),
            "an image occurs twice in one group of certificates",
        ),
        (
            lambda: metrics.average_certified_radius(certificates().iloc[:0]),
            "there are no certificates to average over",
        ),
        (
            lambda: metrics.certified_envelope(pd.DataFrame({"radius": [0.0]})),
            "the table has no column sigma, certified_accuracy; its columns are radius",
        ),
    ],
)
def test_bad_certificates_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# by class


def test_balanced_certified_accuracy_of_five_images():
    table = metrics.balanced_certified_accuracy(certificates(), [0, 0.5])
    # Classes 0, 1, 2 hold 2, 2 and 1 images: all, none and all are right; at 0.5 half of class 0 is left.
    assert table["balanced"].tolist() == pytest.approx([2 / 3, 0.5 / 3])
    assert table["classes_certified"].tolist() == [2, 1]
    assert table["classes"].tolist() == [3, 3]
    plain = metrics.certified_accuracy(certificates(), [0, 0.5])
    pd.testing.assert_frame_equal(table[plain.columns], plain)


def test_a_constant_answer_gets_one_share_of_the_classes_however_skewed_the_images():
    labels = np.repeat([0, 1, 2, 3], [90, 5, 3, 2])
    rows = pd.DataFrame({"sigma": 1.0, "image": range(100), "label": labels, "predicted": 0, "radius": 3.0})
    row = metrics.balanced_certified_accuracy(rows, [1.0]).iloc[0]
    assert (row["certified_accuracy"], row["balanced"], row["classes_certified"]) == (0.9, 0.25, 1)


def test_balanced_certified_accuracy_keeps_groups_apart_and_unknown_models():
    rows = pd.concat([certificates(model=None), certificates(model=None, sigma=1.0, predicted=[-1] * 5)])
    table = metrics.balanced_certified_accuracy(rows, [0, 0, 0.5])
    assert table.set_index(["sigma", "radius"])["balanced"].to_dict() == pytest.approx(
        {(0.5, 0): 2 / 3, (0.5, 0.5): 0.5 / 3, (1.0, 0): 0, (1.0, 0.5): 0}
    )
    assert (table["classes"] == 3).all()


def test_where_one_class_was_not_tested_nothing_balanced_is_known():
    # The draws of class 2's image could have certified 0.5, but only 0.25 was asked for.
    rows = certificates(radius_tested=[1.0, 1.0, 1.0, 1.0, 0.25], radius_reach=1.0)
    table = metrics.balanced_certified_accuracy(rows, [0.25, 0.5, 2.0]).set_index("radius")
    assert table.loc[0.25, "classes_certified"] == 1
    assert table.loc[[0.5, 2.0], ["certified_accuracy", "balanced", "classes_certified"]].isna().all(axis=None)
    assert table.loc[0.5, "classes"] == 3


def test_beyond_the_reach_of_the_draws_nothing_is_known_and_the_reach_is_told():
    reach = maximum_radius(125, 0.001, 0.25)
    assert reach == pytest.approx(0.25 * norm.ppf(0.001 ** (1 / 125)))  # all votes agree: p**125 = alpha
    rows = certificates(sigma=0.25, radius=[reach, 0.25, 0.4, 0, 0], radius_reach=reach)
    table = metrics.certified_accuracy(rows, [0, 0.25, reach, 0.5])
    assert table["certified_accuracy"].tolist()[:3] == [0.6, 0.4, 0.2]
    assert table.loc[3, ["certified_accuracy", "low", "high"]].isna().all()
    assert (table["radius_reach"] == reach).all()
    # Seeds are summarised and the best sigma is chosen as before; what is unknown stays unknown.
    louder = certificates(sigma=1.0, radius=[0.6, 0, 0, 0, 0], radius_reach=4 * reach)
    both = metrics.certified_accuracy(pd.concat([rows, louder]), [0, 0.25, 0.5])
    seeds = metrics.over_prompt_seeds(both.assign(prompt_seed=0))
    assert seeds["radius_reach"].tolist() == [reach] * 3 + [4 * reach] * 3
    assert seeds["certified_accuracy"].isna().tolist() == [False, False, True] + [False] * 3
    envelope = metrics.certified_envelope(both).set_index("radius")
    assert envelope["sigma"].to_dict() == {0: 0.25, 0.25: 0.25, 0.5: 1.0}


# over the seeds of the prompts


def by_seed(*shares, n=20, **columns):
    """Certified accuracy of one method at one radius, a row per prompt seed."""
    rows = {"method": "few-shot", "guarantee": "standard", "sigma": 0.25, "radius": 0.1, "chance": 0.125}
    rows |= {"prompt_seed": range(len(shares)), "certified_accuracy": shares, "low": 0.0, "high": 1.0, "n": n}
    return pd.DataFrame(rows | columns)


def test_certificates_of_one_method_with_prompts_of_several_seeds_are_summarised_seed_by_seed():
    rows = pd.concat([certificates(prompt_seed=0), certificates(prompt_seed=1, predicted=[0, 0, 1, 1, 2])])
    shares = metrics.certified_accuracy(rows, [0.0])
    assert dict(zip(shares["prompt_seed"], shares["certified_accuracy"], strict=True)) == {0: 0.6, 1: 1.0}
    assert metrics.over_prompt_seeds(shares)["certified_accuracy"].tolist() == [0.8]
    with pytest.raises(ValueError, match="differ in prompt_seed"):
        metrics.average_certified_radius(rows)


def test_over_prompt_seeds_gives_mean_extremes_and_an_interval_over_images():
    summary = metrics.over_prompt_seeds(by_seed(0.5, 0.7, 0.45))
    assert len(summary) == 1
    row = summary.iloc[0]
    assert row["certified_accuracy"] == pytest.approx(0.55)
    assert (row["lowest"], row["highest"], row["seeds"], row["n"], row["chance"]) == (0.45, 0.7, 3, 20, 0.125)
    assert (row["low"], row["high"]) == pytest.approx(metrics.accuracy_interval(11, 20))


def test_a_mean_between_two_counts_has_the_wider_interval():
    row = metrics.over_prompt_seeds(by_seed(0.5, 0.55)).iloc[0]  # 10 and 11 of 20
    assert row["low"] == metrics.accuracy_interval(10, 20)[0]
    assert row["high"] == metrics.accuracy_interval(11, 20)[1]
    # Shares are floats: three times 14 of 90 must stay 14, not become 14 to 15.
    row = metrics.over_prompt_seeds(by_seed(14 / 90, 14 / 90, 14 / 90, n=90)).iloc[0]
    assert (row["low"], row["high"]) == metrics.accuracy_interval(14, 90)


def test_methods_of_one_seed_or_of_fewer_images_stand_beside_the_others():
    table = pd.concat([by_seed(0.5, 0.7), by_seed(0.25, method="denoised", n=8), by_seed(0.5, 0.5, sigma=0.5)])
    summary = metrics.over_prompt_seeds(table).set_index(["method", "sigma"])
    assert list(summary.index) == [("few-shot", 0.25), ("denoised", 0.25), ("few-shot", 0.5)]
    assert summary["seeds"].tolist() == [2, 1, 2] and summary["n"].tolist() == [20, 8, 20]
    alone = summary.loc[("denoised", 0.25)]
    assert alone["lowest"] == alone["certified_accuracy"] == alone["highest"] == 0.25
    assert (alone["low"], alone["high"]) == pytest.approx(metrics.accuracy_interval(2, 8))


def test_a_seed_that_was_not_tested_leaves_no_mean():
    summary = metrics.over_prompt_seeds(by_seed(0.5, math.nan))
    assert summary[["certified_accuracy", "lowest", "highest", "low", "high"]].isna().all(axis=None)
    assert summary["seeds"].item() == 2


def test_seeds_of_real_tables_are_summarised_group_by_group():
    rows = pd.concat([certificates(), certificates(method="ensemble", model=None)])
    table = pd.concat(metrics.certified_accuracy(rows, [0, 0.5]).assign(prompt_seed=seed) for seed in (3, 5))
    summary = metrics.over_prompt_seeds(table)
    assert len(summary) == 4 and (summary["seeds"] == 2).all()
    assert {"dataset", "model", "guarantee"} < set(summary.columns) and "prompt_seed" not in summary


# the layout of published tables


def levels_table():
    """Two methods at two noise levels, and one on fewer images at one level of its own."""
    shares = {
        ("zero-shot", "standard", 0.25): {0.0: 0.6, 0.1: 0.4, 0.5: 0.0, 1.0: 0.0},
        ("zero-shot", "standard", 1.0): {0.0: 0.3, 0.1: 0.3, 0.5: 0.2, 1.0: 0.1},
        ("adapted", "frozen-prompt", 0.25): {0.0: 0.7, 0.1: 0.7, 0.5: 0.0, 1.0: 0.0},
        ("adapted", "frozen-prompt", 1.0): {0.0: 0.7, 0.1: 0.7, 0.5: 0.6, 1.0: 0.6},
        ("denoised", "standard", 0.12): {0.0: 0.5, 0.1: 0.25},
    }
    rows = [
        {
            "method": method,
            "guarantee": guarantee,
            "sigma": sigma,
            "radius": radius,
            "certified_accuracy": share,
            "n": n,
        }
        for (method, guarantee, sigma), found in shares.items()
        for n in [8 if method == "denoised" else 40]
        for radius, share in found.items()
    ]
    table = pd.DataFrame(rows)
    return table.assign(radius_reach=table.sigma.map({0.12: 0.2, 0.25: 0.45, 1.0: 1.5})).pipe(unknown_beyond)


def unknown_beyond(table):
    """Shares beyond the reach of the draws are missing, as `certified_accuracy` leaves them."""
    return table.assign(certified_accuracy=table.certified_accuracy.where(table.radius <= table.radius_reach))


def test_table_of_radii_reads_as_published_tables_do():
    table = metrics.table_of_radii(levels_table(), [0.1, 0.5, 1.0])
    assert list(table.columns) == ["0.1", "0.5", "1"]
    assert list(table.index) == [("zero-shot", "standard"), ("adapted", "frozen-prompt"), ("denoised", "standard")]
    assert table.loc["zero-shot"].iloc[0].tolist() == ["40.0 (60.0)", "20.0 (30.0)", "10.0 (30.0)"]
    # On a tie the smaller noise level is kept; what was not measured stays empty.
    assert table.loc["adapted"].iloc[0].tolist() == ["70.0 (70.0)", "60.0 (70.0)", "60.0 (70.0)"]
    assert table.loc["denoised"].iloc[0].tolist() == ["25.0 (50.0)", "", ""]


def test_a_radius_that_no_draws_can_prove_is_a_dash_and_not_a_zero():
    some = levels_table().query("sigma != 1")
    table = metrics.table_of_radii(some, [1.0, 0.5, 0.1])
    assert list(table.columns) == ["1", "0.5", "0.1"]
    assert table.loc["zero-shot"].iloc[0].tolist() == ["–", "–", "40.0 (60.0)"]
    assert table.loc["denoised"].iloc[0].tolist() == ["", "", "25.0 (50.0)"]
    nothing = metrics.table_of_radii(some, [1.0])
    assert nothing["1"].tolist() == ["–", "–", ""]
    # A true zero stays one.
    none_left = some.assign(certified_accuracy=some.certified_accuracy.where(some.radius == 0, 0.0))
    assert metrics.table_of_radii(none_left, [0.1])["0.1"].iloc[0] == "0.0 (60.0)"


def test_reach_may_differ_from_method_to_method():
    table = levels_table()
    fewer = (table.method == "zero-shot") & (table.sigma == 1.0)
    table = unknown_beyond(table.assign(radius_reach=table.radius_reach.mask(fewer, 0.6)))
    table = metrics.table_of_radii(table, [1.0])
    assert table["1"].tolist() == ["–", "60.0 (70.0)", ""]


def in_pairs(table):
    """The same shares at two levels, as a perturbation of two parameters has them."""
    return table.assign(sigma=table.sigma.map("{} and 0.1".format))


def test_the_envelope_takes_one_number_and_pairs_side_by_side():
    table = levels_table().query("method == 'zero-shot'").assign(perturbation="contrast")
    pairs = in_pairs(table[table.sigma == 1]).assign(perturbation="contrast-brightness")
    found = metrics.certified_envelope(pd.concat([pairs, table])).groupby("perturbation")["sigma"].unique()
    assert found["contrast-brightness"].tolist() == ["1.0 and 0.1"]
    assert set(found["contrast"]) == set(metrics.certified_envelope(table)["sigma"])


def test_untested_shares_are_left_empty():
    table = levels_table().query("method == 'zero-shot'")
    unknown = table.assign(certified_accuracy=table.certified_accuracy.where(table.radius < 1.0))
    found = metrics.table_of_radii(unknown, [0.5, 1.0])
    assert found.iloc[0].tolist() == ["20.0 (30.0)", ""]
    assert metrics.certified_envelope(unknown)["radius"].tolist() == [0.0, 0.1, 0.5]


def test_the_envelope_keeps_the_numbers_behind_the_table():
    table = levels_table().assign(lowest=lambda t: t.certified_accuracy - 0.01, highest=0.9, seeds=3)
    envelope = metrics.certified_envelope(table).set_index(["method", "radius"])
    columns = ["sigma", "certified_accuracy", "clean_accuracy", "n"]
    assert envelope.loc[("zero-shot", 0.5), columns].tolist() == [1.0, 0.2, 0.3, 40]
    assert envelope.loc[("zero-shot", 0.1), columns].tolist() == [0.25, 0.4, 0.6, 40]
    assert envelope.loc[("denoised", 0.1), columns].tolist() == [0.12, 0.25, 0.5, 8]
    assert envelope.loc[("zero-shot", 0.5), "lowest"] == pytest.approx(0.19)
    some = table.query("method == 'adapted' and sigma == 0.25")
    assert metrics.certified_envelope(some)["certified_accuracy"].tolist() == [0.7, 0.7]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.over_prompt_seeds(by_seed(0.5).drop(columns=["n", "prompt_seed"])),
            "the table has no column prompt_seed, n; its columns are method, guarantee",
        ),
        (
            lambda: metrics.over_prompt_seeds(by_seed(0.5, 0.6, prompt_seed=7)),
            "prompt seed 7 occurs twice for 'few-shot' at sigma 0.25 and radius 0.1",
        ),
        (
            lambda: metrics.over_prompt_seeds(by_seed(0.5, 0.6, n=[20, 9])),
            "the seeds of 'few-shot' at sigma 0.25 were measured on 20, 9 images",
        ),
        (
            lambda: metrics.table_of_radii(levels_table().drop(columns="guarantee"), [0.1]),
            "the table has no column guarantee; its columns are method, sigma",
        ),
        (
            lambda: metrics.table_of_radii(levels_table(), [0.1, 0.75]),
            r"the table has no radius 0.75 \(0 gives the clean accuracy\); it has 0, 0.1, 0.5, 1",
        ),
        (
            lambda: metrics.table_of_radii(levels_table().query("radius > 0"), [0.1]),
            r"the table has no radius 0 \(0 gives the clean",
        ),
        (
            lambda: metrics.table_of_radii(pd.concat([levels_table().assign(dataset=name) for name in "ab"]), [0.1]),
            "rows occur twice for one method, guarantee, sigma, radius; give one at a time of: dataset",
        ),
        (
            lambda: metrics.table_of_radii(
                levels_table().assign(perturbation=lambda t: np.where(t.sigma == 1, "contrast", "pixel-noise")), [0.1]
            ),
            "radii of pixel-noise, contrast are in units of their own; give one perturbation at a time",
        ),
        (
            lambda: metrics.certified_envelope(in_pairs(levels_table().query("method == 'zero-shot'"))),
            "sigma '0.25 and 0.1', '1.0 and 0.1': radii of several parameters count standard deviations",
        ),
        (
            lambda: metrics.over_prompt_seeds(in_pairs(by_seed(0.5, 0.6, prompt_seed=7))),
            "prompt seed 7 occurs twice for 'few-shot' at sigma 0.25 and 0.1 and radius 0.1",
        ),
        (
            lambda: metrics.over_prompt_seeds(in_pairs(by_seed(0.5, 0.6, n=[20, 9]))),
            "the seeds of 'few-shot' at sigma 0.25 and 0.1 were measured on 20, 9 images",
        ),
    ],
)
def test_bad_tables_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
