import numpy as np
import pandas as pd
import pytest

from medrobust_lib import metrics

CORRUPTIONS = ["gaussian_noise", "zoom_blur", "contrast"]
MODELS = ["demo-clip", "adapted", "other"]


@pytest.fixture
def table():
    """Accuracies of three models on two data sets, three corruptions, five severities, and clean."""
    rng = np.random.default_rng(5)
    return pd.DataFrame(
        [
            {
                "model": model,
                "dataset": dataset,
                "corruption": corruption,
                "severity": severity,
                "n": 100 if dataset == "phantom/blood" else 60,
                "accuracy": rng.uniform(0.2, 0.6) if severity else 0.8,
                "balanced_accuracy": rng.uniform(0.2, 0.6) if severity else 0.7,
                "majority_share": 0.96 if model == "other" and severity != 2 else 0.3,
            }
            for dataset in ("phantom/blood", "phantom/oct")
            for model in MODELS
            for corruption, severity in [("clean", 0), *((c, s) for c in CORRUPTIONS for s in range(1, 6))]
        ]
    )


def row(result, **where):
    for column, value in where.items():
        result = result[result[column] == value]
    assert len(result) == 1
    return result.iloc[0]


def errors_of(table, model, dataset, measure="accuracy"):
    rows = table[(table["model"] == model) & (table["dataset"] == dataset) & (table["severity"] > 0)]
    return 1 - rows.pivot(index="corruption", columns="severity", values=measure).loc[CORRUPTIONS].to_numpy()


@pytest.mark.parametrize("measure", ["accuracy", "balanced_accuracy"])
def test_a_row_holds_what_the_array_functions_give(table, measure):
    result = metrics.corruption_error_table(
        table.sample(frac=1, random_state=0), reference="demo-clip", measure=measure
    )
    assert len(result) == 6
    found = row(result, model="adapted", dataset="phantom/oct")
    ours, base = (errors_of(table, model, "phantom/oct", measure) for model in ("adapted", "demo-clip"))
    clean = 0.2 if measure == "accuracy" else 0.3
    np.testing.assert_allclose(
        found[[f"ce_{name}" for name in CORRUPTIONS]].astype(float), metrics.corruption_error(ours, base)
    )
    assert found["mce"] == pytest.approx(metrics.mean_corruption_error(ours, base))
    assert found["ratio_of_sums"] == pytest.approx(100 * ours.sum() / base.sum())
    assert found["relative_mce"] == pytest.approx(metrics.relative_mean_corruption_error(ours, clean, base, clean).mean)
    assert found["relative_mce_left_out"] == 0
    assert found["clean_error"] == pytest.approx(clean)
    assert found["relative_clean_error"] == pytest.approx(100)
    assert found["average_accuracy"] == pytest.approx(1 - ours.mean())
    assert found["degradation"] == pytest.approx(ours.mean() - clean)
    assert (found["n"], found["reference"]) == (60, "demo-clip")


def test_the_reference_model_is_100_and_another_reference_changes_that(table):
    result = metrics.corruption_error_table(table, reference="adapted")
    percent = [c for c in result if c.startswith("ce_")] + ["mce", "ratio_of_sums", "relative_mce"]
    adapted = result[result["model"] == "adapted"][percent]
    np.testing.assert_allclose(adapted, 100)
    assert (result[result["model"] != "adapted"]["mce"] != 100).all()


def test_constant_predictors_are_flagged(table):
    result = metrics.corruption_error_table(table, reference="demo-clip")
    assert set(result[result["constant"]]["model"]) == {"other"}
    assert row(result, model="other", dataset="phantom/oct")["constant_share"] == pytest.approx(13 / 16)
    flagged = table.assign(constant=table["model"] == "adapted")
    result = metrics.corruption_error_table(flagged, reference="demo-clip")
    assert set(result[result["constant"]]["model"]) == {"adapted"}
    plain = metrics.corruption_error_table(table.drop(columns=["majority_share", "n"]), reference="demo-clip")
    assert not {"constant", "constant_share", "n"} & set(plain)


def test_the_guard_and_its_count_are_in_the_table(table):
    easy = (table["model"] == "demo-clip") & (table["corruption"] == "contrast")
    table.loc[easy, "accuracy"] = 0.79  # demo-clip loses one point only
    result = metrics.corruption_error_table(table, reference="demo-clip", least_rise=0.02)
    assert (result["relative_mce_left_out"] == 1).all()
    assert result["relative_mce"].notna().all()
    table.loc[easy, "accuracy"] = 1.0  # and now has no error: a ratio to it is undefined
    result = metrics.corruption_error_table(table, reference="demo-clip")
    assert result[["ce_contrast", "mce"]].isna().all(axis=None)
    assert result[["ratio_of_sums", "ce_zoom_blur"]].notna().all(axis=None)


def test_clean_images_may_be_listed_beside_every_corruption(table):
    clean = table[table["severity"] == 0]
    repeated = pd.concat([table, *(clean.assign(corruption=name) for name in CORRUPTIONS)])
    pd.testing.assert_frame_equal(
        metrics.corruption_error_table(repeated, reference="other"),
        metrics.corruption_error_table(table, reference="other"),
    )


def test_data_sets_with_different_corruptions_stand_in_one_table(table):
    rows = table[(table["dataset"] == "phantom/oct") | (table["corruption"] != "zoom_blur")]
    result = metrics.corruption_error_table(rows, reference="other")
    assert result["ce_zoom_blur"].isna().to_list() == [True] * 3 + [False] * 3
    assert result["mce"].notna().all()


@pytest.mark.parametrize(
    ("change", "reference", "message"),
    [
        (
            lambda t: t,
            "demo-clp",
            r"no reference model 'demo-clp' for phantom/blood\. Did you mean 'demo-clip'\?",
        ),
        (lambda t: t, "x", r"no reference model 'x' for phantom/blood\. Choose one of: demo-clip, adapted, other"),
        (lambda t: t.drop(columns="severity"), "other", r"missing columns \['severity'\]"),
        (lambda t: t.iloc[:0], "other", r"no accuracies to summarise: 0 rows"),
        (
            lambda t: t[~((t.model == "adapted") & (t.corruption == "contrast") & (t.severity > 3))],
            "other",
            r"model 'adapted' lacks contrast at severity 4, contrast at severity 5; every model needs",
        ),
        (lambda t: t[(t.model != "other") | (t.severity > 0)], "other", r"model 'other' lacks the clean images"),
        (
            lambda t: t[(t.model != "other") | (t.corruption == "clean")],
            "other",
            r"lacks gaussian_noise at severity 1, .* and 10 more",
        ),
        (lambda t: t[t.severity == 0], "other", r"holds clean images only \(severity 0\)"),
        (lambda t: t.assign(accuracy=100 * t.accuracy), "other", r"accuracy holds 80: give fractions in \[0, 1\]"),
        (
            lambda t: pd.concat([t, t[t.severity == 2].assign(accuracy=0.1)]),
            "other",
            r"two different values of accuracy for dataset=phantom/blood, model=demo-clip, corruption=gaussian_noise",
        ),
        (
            lambda t: t.assign(n=t.n.where(t.model != "other", 50)),
            "other",
            r"phantom/blood has cells of \[50, 100\] images; compare models on the same images",
        ),
    ],
)
def test_incomplete_or_wrong_tables_are_refused(table, change, reference, message):
    with pytest.raises(ValueError, match=message):
        metrics.corruption_error_table(change(table), reference=reference)


def test_the_reference_is_clip_unless_another_is_named():
    rows = [
        {"dataset": "d", "model": model, "corruption": "contrast", "severity": severity, "accuracy": accuracy}
        for model, shares in {"clip-vit-b16": (0.5, 0.2), "other": (0.9, 0.6)}.items()
        for severity, accuracy in enumerate(shares)
    ]
    table = metrics.corruption_error_table(pd.DataFrame(rows)).set_index("model")
    assert table.mce.to_dict() == pytest.approx({"clip-vit-b16": 100, "other": 50})
    with pytest.raises(ValueError, match="clip-vit-b16"):
        metrics.corruption_error_table(pd.DataFrame(rows[2:]))


def test_the_layout_has_a_row_for_each_set_and_model_and_their_means(table):
    errors = metrics.corruption_error_table(table, reference="demo-clip")
    layout = metrics.corruption_error_layout(errors)
    assert layout.index.to_list() == [(d, m) for d in ("phantom/blood", "phantom/oct", "mean") for m in MODELS]
    assert layout.columns.to_list() == ["clean", "gaussian noise", "zoom blur", "contrast", "mCE"]
    found = row(errors, dataset="phantom/oct", model="adapted")
    expected = found[["relative_clean_error", *(f"ce_{name}" for name in CORRUPTIONS), "mce"]].to_list()
    assert layout.loc["phantom/oct", "adapted"].to_list() == expected
    assert layout.loc["mean", "other"].mCE == pytest.approx(errors.mce[errors.model == "other"].mean())
    assert (layout.loc[:, "demo-clip", :] - 100).abs().max(axis=None) < 1e-9


def test_the_layout_averages_what_shares_a_name(table):
    errors = metrics.corruption_error_table(table, reference="demo-clip")
    errors["method"] = errors.model.replace({"demo-clip": "zero-shot", "adapted": "LoRA", "other": "LoRA"})
    layout = metrics.corruption_error_layout(errors, by="method")
    assert layout.index.get_level_values("method").to_list() == ["zero-shot", "LoRA"] * 3
    both = errors[(errors.dataset == "phantom/oct") & (errors.method == "LoRA")]
    assert layout.loc["phantom/oct", "LoRA"].mCE == pytest.approx(both.mce.mean())
