"""Figures: each function draws one table or array on the axes it is given and reads no file."""

# ruff: noqa: F401 -- what is imported here is what the room offers

from medrobust_lib.plots.figures import (
    CLASS_COLOURS,
    CORRECT,
    MARKERS,
    MOST_CLASSES,
    PALETTE,
    REFERENCE,
    WRONG,
    image_grid,
    leading,
    plot_ablation,
    plot_before_after,
    plot_certified_accuracy,
    plot_certified_methods,
    plot_fractions,
    plot_radius_ratio,
    plot_robustness,
    plot_severity_curves,
    readable,
    set_style,
    shorten,
    shown_of,
)
from medrobust_lib.plots.panels import (
    plot_accuracy_against_sigma,
    plot_confusion,
    plot_error_models,
    plot_feature_map,
    plot_label_votes,
    plot_prediction_shares,
    plot_recall,
    plot_reliability,
    plot_similarity,
    plot_spectrum,
    plot_template_accuracy,
    plot_votes,
)
