import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta

from medrobust_lib import metrics


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
            r"an envelope needs columns sigma, radius and certified_accuracy, got \['radius'\]",
        ),
    ],
)
def test_bad_certificates_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
