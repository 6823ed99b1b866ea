import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb

from medrobust_lib import metrics, plots

CLASSES = ["first", "second", "a third one with a very long name indeed"]


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()  # a figure that cannot be drawn fails here
    plt.close(figure)


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    return rng.integers(0, 3, 60), rng.integers(0, 3, 60)


def certified_table(*, methods=("zero-shot",), sigmas=(0.1, 0.25)):
    rows = [(m, s, r, 0.8 - r) for m in methods for s in sigmas for r in (0.25, 0.0)]
    table = pd.DataFrame(rows, columns=["method", "sigma", "radius", "certified_accuracy"])
    return table.assign(low=table.certified_accuracy - 0.1, high=table.certified_accuracy + 0.1)


def methods_table(**guarantees):
    """One noise level as `metrics.over_prompt_seeds` summarises it; methods by name and guarantee."""
    rows = [(m, g, r, 0.8 - r) for m, g in guarantees.items() for r in (0.25, 0.0, 0.1)]
    table = pd.DataFrame(rows, columns=["method", "guarantee", "radius", "certified_accuracy"]).assign(sigma=0.25)
    return table.assign(lowest=table.certified_accuracy - 0.1, highest=table.certified_accuracy + 0.1)


def variants_table(variants=("4", "1", "16"), radii=(0.25, 0.0)):
    rows = [(v, r, 0.1 * i + 0.5 - r) for i, v in enumerate(variants) for r in radii]
    table = pd.DataFrame(rows, columns=["variant", "radius", "certified_accuracy"])
    return table.assign(low=table.certified_accuracy - 0.1, high=table.certified_accuracy + 0.1)


def test_every_plot_labels_its_axes_with_units(answers):
    labels, predictions = answers
    probabilities = np.random.default_rng(1).dirichlet(np.ones(3), 60)
    levels = pd.DataFrame(
        {"model": "m", "sigma": [0.0, 0.5], "accuracy": [0.9, 0.2], "low": [0.8, 0.1], "high": [1, 0.3]}
    )
    shares = pd.DataFrame({"sigma": [0.0] * 3 + [0.5] * 3, "class": CLASSES * 2, "share": [0.3, 0.3, 0.4, 1, 0, 0]})
    features = pd.DataFrame({"x": [0, 1.0], "y": [1, 0.0], "class": CLASSES[:2], "kind": ["image", "text"]})
    spectrum = pd.DataFrame({"source": ["a", "a"], "frequency": [0.1, 0.2], "power": [1, 0.1]})
    templates = pd.DataFrame(
        {"template": ["{}", "ensemble"], "kind": ["own", "mean"], "accuracy": [0.5, 0.6], "low": 0.4, "high": 0.7}
    )
    draw = {
        "confusion": lambda ax: plots.plot_confusion(labels, predictions, CLASSES, ax),
        "recall": lambda ax: plots.plot_recall(labels, predictions, CLASSES, ax),
        "reliability": lambda ax: plots.plot_reliability(metrics.calibration_bins(probabilities, labels), ax),
        "templates": lambda ax: plots.plot_template_accuracy(templates, ax, chance=1 / 3),
        "features": lambda ax: plots.plot_feature_map(features, ax),
        "certified": lambda ax: plots.plot_certified_accuracy(certified_table(), ax, chance=0.5),
        "sigma": lambda ax: plots.plot_accuracy_against_sigma(levels, ax, chance=1 / 3),
        "shares": lambda ax: plots.plot_prediction_shares(shares, ax),
        "spectrum": lambda ax: plots.plot_spectrum(spectrum, ax),
        "votes": lambda ax: plots.plot_votes([3, 1, 0], CLASSES, ax, truth=1),
        "methods": lambda ax: plots.plot_certified_methods(methods_table(plain="standard"), ax, chance=0.5),
        "ablation": lambda ax: plots.plot_ablation(variants_table(), ax, chance=0.5),
        "similarity": lambda ax: plots.plot_similarity(pd.Series([0.1, 0.2], CLASSES[:2]), ax, truth="first"),
    }
    for name, plot in draw.items():
        figure, ax = plt.subplots()
        plot(ax)
        assert ax.get_xlabel(), name
        figure.canvas.draw()
        plt.close(figure)


def test_confusion_rows_are_shares_of_the_true_class(ax):
    plots.plot_confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), ["a", "b"], ax)
    assert [text.get_text() for text in ax.texts] == ["0.50", "0.50", "0.00", "1.00"]


def test_a_class_that_does_not_exist_is_no_other_class_of_the_confusion_matrix(ax):
    with pytest.raises(IndexError):
        plots.plot_confusion(np.array([0, 0, 1]), np.array([0, 2, 1]), ["a", "b"], ax)
    many = [f"class {k}" for k in range(17)]
    plots.plot_confusion(np.array([16, 16], np.uint8), np.array([16, 16], np.uint8), many, ax)
    assert ax.collections[0].get_array().reshape(17, 17)[16, 16] == 1


def test_an_abstention_stays_in_the_confusion_matrix_denominator(ax):
    plots.plot_confusion(np.array([0, 0, 1, 1]), np.array([0, -1, 1, 1]), ["a", "b"], ax)
    assert [text.get_text() for text in ax.texts] == ["0.50", "0.00", "0.00", "1.00"]


def test_votes_title_counts_all_votes_and_colours_the_truth(ax):
    plots.plot_votes([30, 12, 8], CLASSES, ax, truth=1)
    assert ax.get_xlabel() == "votes out of 50"
    colours = [bar.get_facecolor()[:3] for bar in ax.patches]
    assert colours[1] == pytest.approx(plots.CORRECT)
    assert colours[0] == colours[2] != colours[1]


@pytest.mark.parametrize("votes", [[50, 0, 0], [20, 20, 10]])
def test_votes_axis_always_ends_at_all_votes(ax, votes):
    plots.plot_votes(votes, CLASSES, ax)
    assert ax.get_xlim() == (0, 50)


def test_names_that_are_cut_alike_keep_their_own_bars(ax):
    alike = ["a class with a very long common beginning, " * 2 + end for end in ("one", "two")]
    plots.plot_votes([30, 20], alike, ax)
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in ax.patches] == [(0, 30), (1, 20)]
    figure, other = plt.subplots()
    plots.plot_similarity(pd.Series([0.1, 0.2], alike), other, truth=alike[1])
    assert [label.get_text() for label in other.get_yticklabels()] == [plots.shorten(alike[0], 52)] * 2
    assert [bar.get_facecolor()[:3] == pytest.approx(plots.CORRECT) for bar in other.patches] == [False, True]
    plt.close(figure)


def test_feature_map_legend_follows_the_categories(ax):
    table = pd.DataFrame({"x": [0, 1.0], "y": [1, 0.0], "kind": ["image", "text"]})
    plots.plot_feature_map(table.assign(**{"class": pd.Categorical(["b", "a"], categories=["a", "b"])}), ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_legend().get_title().get_text() == "small: image, large: text"


def test_a_feature_map_without_texts_explains_no_sizes(ax):
    plots.plot_feature_map(pd.DataFrame({"x": [0, 1.0], "y": [1, 0.0], "kind": "image", "class": ["a", "b"]}), ax)
    assert not ax.get_legend().get_title().get_text()


def test_template_rows_share_the_colour_of_their_kind(ax):
    table = pd.DataFrame({"template": list("abc"), "kind": ["x", "y", "x"], "accuracy": 0.5, "low": 0.4, "high": 0.7})
    plots.plot_template_accuracy(table, ax, chance=0.1)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["x", "y", "chance"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]


def test_a_dominating_answer_is_named_on_its_bar(ax):
    table = pd.DataFrame({"sigma": [0.0] * 2 + [0.5] * 2, "class": ["a", "b"] * 2, "share": [0.7, 0.3, 0.0, 1.0]})
    plots.plot_prediction_shares(table, ax)
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["a\n70%", "b\n100%"]


def test_class_colours_are_distinct():
    colours = np.array([to_rgb(colour) for colour in plots.CLASS_COLOURS])
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=2)
    assert distance[~np.eye(len(colours), dtype=bool)].min() > 0.2


def test_spectrum_names_each_line_at_its_end(ax):
    table = pd.DataFrame({"source": ["images"] * 2 + ["noise"] * 2, "frequency": [0.1, 1.4] * 2, "power": [1, 0.1] * 2})
    plots.plot_spectrum(table, ax)
    assert {"images", "noise"} < {text.get_text() for text in ax.texts}
    assert ax.get_legend() is None


def test_certified_accuracy_has_a_line_per_sigma_and_method_in_order_of_the_radius(ax):
    plots.plot_certified_accuracy(certified_table(), ax, chance=0.5)
    assert ax.lines[0].get_xdata().tolist() == [0, 0.25]
    assert ax.lines[0].get_drawstyle() == "steps-pre"  # never above what is certified
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["sigma = 0.1", "sigma = 0.25", "chance"]
    both, lone = certified_table(methods=("coop", "zero-shot")), certified_table(sigmas=(0.25,))
    for table, labels in ((both, ["coop, sigma = 0.1", "coop, sigma = 0.25"]), (lone, ["sigma = 0.25"])):
        figure, other = plt.subplots()
        plots.plot_certified_accuracy(table, other)
        assert [text.get_text() for text in other.get_legend().get_texts()][: len(labels)] == labels
        plt.close(figure)


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_curve_ends_at_the_reach_of_the_draws_and_names_it(ax):
    table = certified_table().assign(radius_reach=lambda rows: 2 * rows.sigma)
    table.loc[table.radius > table.radius_reach, ["certified_accuracy", "low", "high"]] = np.nan
    plots.plot_certified_accuracy(table, ax)
    assert legend_texts(ax) == ["sigma = 0.1 (draws reach 0.2)", "sigma = 0.25"]
    assert np.isnan(ax.lines[0].get_ydata()).tolist() == [False, True]


def test_radii_of_a_corruption_are_no_distances_between_pixels(ax):
    pairs = certified_table().assign(perturbation="contrast-brightness")
    pairs = pairs.assign(sigma=pairs.sigma.map("{} and 0.2".format))
    plots.plot_certified_accuracy(pairs, ax)
    assert legend_texts(ax) == ["sigma = 0.1 and 0.2", "sigma = 0.25 and 0.2"]
    assert ax.get_xlabel() == "radius of contrast-brightness"
    mixed = pd.concat([pairs, certified_table().assign(perturbation="pixel-noise")])
    with pytest.raises(ValueError, match="radii of contrast-brightness, pixel-noise are in units of their own"):
        plots.plot_certified_accuracy(mixed, ax)
    methods = methods_table(plain="standard").assign(perturbation="blur")
    plots.plot_certified_methods(methods, ax)
    assert ax.get_xlabel() == "radius of blur"
    two = pd.concat([methods.assign(sigma=level) for level in ("0.1 and 0.2", "0.2 and 0.2")])
    with pytest.raises(ValueError, match="the table holds sigma 0.1 and 0.2, 0.2 and 0.2"):
        plots.plot_certified_methods(two, ax)


def test_certified_methods_are_broken_where_only_the_frozen_prompt_is_certified(ax):
    kinds = {"plain": "standard", "adapted": "frozen-prompt", "pool": "standard", "set": "candidate-set"}
    plots.plot_certified_methods(methods_table(**kinds), ax, chance=0.125)
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-", "-", ":"]
    assert legend_texts(ax) == [*kinds, "chance"]
    assert ax.get_legend().get_title().get_text() == "broken: frozen prompt only"
    assert "[0, 1] pixel units" in ax.get_xlabel()
    # Every method is known by its marker too, and none hides another of the same share.
    assert len({line.get_marker() for line in ax.lines[:4]}) == 4
    assert [line.get_ydata().tolist() for line in ax.lines[:4]] == [pytest.approx([0.8, 0.7, 0.55])] * 4
    starts = [line.get_xdata()[0] for line in ax.lines[:4]]
    assert len(set(starts)) == 4 and max(map(abs, starts)) < 0.05  # of 0.1 to the next radius
    bars = ax.collections[0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [pytest.approx((y - 0.1, y + 0.1)) for y in (0.8, 0.7, 0.55)]


def test_the_legend_of_methods_covers_no_data_and_can_be_left_out(ax):
    plots.plot_certified_methods(methods_table(plain="standard", adapted="frozen-prompt"), ax)
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1
    assert "chance" not in legend_texts(ax)
    figure, others = plt.subplots(1, 2)
    plots.plot_certified_methods(methods_table(plain="standard"), others[0], legend=False)
    plots.plot_ablation(variants_table(), others[1], legend=False)
    assert [other.get_legend() for other in others] == [None, None]
    plt.close(figure)


def test_shares_that_are_unknown_are_not_drawn(ax):
    table = methods_table(plain="standard")
    plots.plot_certified_methods(
        table.assign(certified_accuracy=table.certified_accuracy.where(table.radius < 0.2)), ax
    )
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.8, 0.7])


def test_methods_at_one_radius_only_can_be_drawn(ax):
    table = methods_table(plain="standard", pool="standard")
    plots.plot_certified_methods(table[table.radius == 0.1], ax)
    assert ax.lines[0].get_xdata() == pytest.approx([0.07])


def test_several_noise_levels_in_one_axes_are_refused(ax):
    table = pd.concat([methods_table(plain="standard").assign(sigma=sigma) for sigma in (0.25, 1.0)])
    with pytest.raises(ValueError, match=r"one noise level per axes; the table holds sigma 0.25, 1$"):
        plots.plot_certified_methods(table, ax)


def test_ablation_keeps_the_order_of_its_variants_and_has_a_line_per_radius(ax):
    plots.plot_ablation(variants_table(), ax, chance=0.125)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "1", "16"]
    assert legend_texts(ax) == ["radius 0", "radius 0.25", "chance"]
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert ax.lines[1].get_ydata().tolist() == pytest.approx([0.25, 0.35, 0.45])
    assert all(ax.lines[0].get_xdata() < ax.lines[1].get_xdata())
    assert tuple(ax.collections[1].get_segments()[2][:, 1]) == pytest.approx((0.35, 0.55))
    assert ax.get_xlabel() == "variant"


def test_ablation_leaves_a_gap_where_a_variant_was_not_measured_at_a_radius(ax):
    table = variants_table()
    plots.plot_ablation(table[(table.variant != "1") | (table.radius != 0.25)], ax)
    assert np.isnan(ax.lines[1].get_ydata()).tolist() == [False, True, False]


def test_ablation_names_its_setting_and_breaks_long_names(ax):
    table = variants_table(["authors'", "sigma of the certificate"]).assign(setting="training noise")
    plots.plot_ablation(table, ax)
    assert ax.get_xlabel() == "training noise"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["authors'", "sigma of the\ncertificate"]
    with pytest.raises(ValueError, match='variant "authors\'" occurs twice at radius 0.25; draw one setting at a time'):
        plots.plot_ablation(pd.concat([table, table]), ax)


def test_noise_axis_says_its_unit(ax):
    table = pd.DataFrame({"model": ["m"], "sigma": [0.1], "accuracy": [0.5], "low": [0.4], "high": [0.6]})
    plots.plot_accuracy_against_sigma(table, ax, chance=0.1)
    assert "[0, 1] pixel units" in ax.get_xlabel()


def test_image_grid_hides_the_axes_of_empty_places():
    figure = plots.image_grid(np.zeros((4, 8, 8, 3), np.uint8), ["a", "b", "c", "d"], n_columns=3)
    assert len(figure.axes) == 6
    assert not any(axis.axison for axis in figure.axes)
    plt.close(figure)


def test_shorten_marks_the_cut():
    assert plots.shorten("mucus") == "mucus"
    assert plots.shorten("colorectal adenocarcinoma epithelium", 12) == "colorectal…"
    assert len(plots.shorten("x" * 90)) == 24


def test_palette_is_told_apart_in_gray_and_under_deuteranopia():
    # The palette's first four colours, which carry meaning, differ in luminance or along the blue axis.
    colours = np.array(plots.PALETTE[:4])
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    for i in range(4):
        for j in range(i):
            assert max(abs(luminance[i] - luminance[j]), abs(colours[i, 2] - colours[j, 2])) > 0.05


CURVES = pd.DataFrame(
    {
        "model": ["a"] * 3 + ["b"] * 3,
        "severity": [5, 0, 1] * 2,
        "accuracy": [0.2, 0.9, 0.5] * 2,
        "mce": [90, 80, 85] * 2,
    }
)


def test_severity_curves_run_from_clean_to_worst(ax):
    plots.plot_severity_curves(CURVES, ax, chance=0.25)
    first, second, chance = ax.lines
    assert first.get_xdata().tolist() == [0, 1, 5]
    assert first.get_ydata().tolist() == [0.9, 0.5, 0.2]
    assert (second.get_label(), chance.get_label()) == ("b", "chance")


def test_severity_curves_of_errors_mark_the_reference(ax):
    plots.plot_severity_curves(CURVES, ax, value="mce")
    assert ax.lines[-1].get_ydata() == [100, 100]


def test_robustness_marks_models_by_colour_sets_by_marker_and_constants_hollow(ax):
    table = pd.DataFrame(
        {"dataset": ["x", "x"], "model": ["a", "b"], "average_accuracy": [0.4, 0.6], "mce": [100, 70.0],
         "low": [100, 60.0], "high": [100, 80.0], "constant": [False, True]}
    )  # fmt: skip
    plots.plot_robustness(table, ax)
    points = [collection for collection in ax.collections if isinstance(collection, PathCollection)]
    assert [tuple(point.get_offsets()[0]) for point in points] == [(0.4, 100), (0.6, 70)]
    assert points[0].get_facecolor()[0][:3] == pytest.approx(points[0].get_edgecolor()[0][:3])
    assert points[1].get_facecolor()[0][:3].tolist() == [1, 1, 1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "x"]


def test_grid_names_rows_and_takes_titles_for_the_first_row_only():
    images = np.zeros((6, 8, 8, 3), np.uint8)
    figure = plots.image_grid(images, ["one", "two", "three"], n_columns=3, rows=["top", "bottom"])
    assert [axis.get_title(loc="center") for axis in figure.axes] == ["one", "two", "three", "", "", ""]
    assert [axis.texts[0].get_text() for axis in (figure.axes[0], figure.axes[3])] == ["top", "bottom"]
    plt.close(figure)


MANY = [f"class {k}" for k in range(200)]


@pytest.fixture
def many_answers():
    """Of 200 classes, the last ten are never found, and class 190 is answered instead of them."""
    labels = np.arange(400) % 200
    predictions = np.where(labels >= 190, 190, labels)
    predictions[np.flatnonzero(labels == 190)] = 191
    return labels, predictions


def tick_names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_leading_keeps_the_largest_in_their_order_and_what_it_is_told_to():
    assert plots.leading([1, 9, np.nan, 5], most=2).tolist() == [1, 3]
    assert plots.leading([1, 9, np.nan, 5], most=2, keep=[2]).tolist() == [1, 2]
    assert plots.leading([3, 3, 3], most=3).tolist() == [0, 1, 2]
    assert plots.leading(range(200)).tolist() == list(range(176, 200))


def test_what_is_shown_is_said_only_where_something_is_left_out():
    assert plots.shown_of(9, 9, "the closest") == ""
    assert plots.shown_of(24, 200, "the closest") == ";\nshown: 24 of 200 classes, the closest"
    assert plots.shown_of(24, 200) == ";\nshown: 24 of 200 classes"


def test_recall_of_many_classes_shows_those_found_least(ax, many_answers):
    plots.plot_recall(*many_answers, MANY, ax)
    names = tick_names(ax.yaxis)
    assert len(names) == 24 and set(MANY[190:]) <= set(names)
    assert "shown: 24 of 200 classes, found least or answered most" in ax.get_xlabel()
    assert ax.patches[names.index("class 190")].get_width() == 0  # recall


def test_confusion_of_many_classes_shows_those_with_most_errors(ax, many_answers):
    plots.plot_confusion(*many_answers, MANY, ax)
    names = tick_names(ax.yaxis)
    assert len(names) == 24 and set(MANY[190:]) <= set(names) and names == tick_names(ax.xaxis)
    cells = ax.collections[0].get_array().reshape(24, 24)
    assert cells[names.index("class 199"), names.index("class 190")] == 1
    assert cells[names.index("class 190"), names.index("class 191")] == 1
    assert "shown: 24 of 200 classes, those with most errors" in ax.get_xlabel()


def test_similarities_of_many_classes_are_the_closest_and_the_true_one(ax):
    plots.plot_similarity(pd.Series(np.arange(200) / 200, index=MANY), ax, truth="class 3")
    assert tick_names(ax.yaxis) == ["class 3", *MANY[177:]]
    assert next(bar.get_width() for bar in ax.patches) == 3 / 200
    assert "shown: 24 of 200 classes, the closest" in ax.get_xlabel()


def test_votes_of_many_classes_keep_their_total_and_the_rows_asked_for(ax):
    votes = np.zeros(200, int)
    votes[[5, 150]] = 10, 40
    plots.plot_votes(votes, MANY, ax, truth=7, shown=[5, 7, 150])
    assert tick_names(ax.yaxis) == ["class 5", "class 7", "class 150"]
    assert [bar.get_width() for bar in ax.patches] == [10, 0, 40]
    assert ax.get_xlabel() == "votes out of 50;\nshown: 3 of 200 classes"


def test_prediction_shares_of_many_classes_still_add_up(ax):
    shares = np.array([0.5] + [0.5 / 199] * 199)
    table = pd.DataFrame({"sigma": 0.0, "class": MANY, "share": shares})
    plots.plot_prediction_shares(table, ax)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(names) == 13 and names[0] == "188 more classes"
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(1)


def test_a_feature_map_of_many_classes_colours_those_with_most_images(ax):
    kinds = {"image": [k for k in range(200) for _ in range(1 + (k >= 180))], "text": list(range(200))}
    rows = [{"x": k, "y": 0.0, "class": MANY[k], "kind": kind} for kind, found in kinds.items() for k in found]
    plots.plot_feature_map(pd.DataFrame(rows), ax)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["176 more classes", *MANY[:4], *MANY[180:]]
    looks = {(tuple(c.get_facecolor()[0][:3]), c.get_paths()[0].vertices.tobytes()) for c in ax.collections[1::2]}
    assert len(looks) == 24  # no two classes look alike
