"""Figures: each function draws one table or array on the axes it is given and reads no file."""

from medrobust_lib.plots.adaptation import plot_before_after, plot_fractions
from medrobust_lib.plots.answers import (
    plot_accuracy_against_sigma,
    plot_confusion,
    plot_feature_map,
    plot_prediction_shares,
    plot_recall,
    plot_reliability,
    plot_similarity,
    plot_spectrum,
    plot_template_accuracy,
    plot_votes,
)
from medrobust_lib.plots.certified import plot_ablation, plot_certified_accuracy, plot_certified_methods
from medrobust_lib.plots.corruption import plot_robustness, plot_severity_curves
from medrobust_lib.plots.generative import plot_error_models, plot_label_votes, plot_radius_ratio
from medrobust_lib.plots.style import (
    CLASS_COLOURS,
    CORRECT,
    MARKERS,
    MOST_CLASSES,
    PALETTE,
    REFERENCE,
    WRONG,
    image_grid,
    leading,
    set_style,
    shorten,
    shown_of,
)

__all__ = [
    "CLASS_COLOURS",
    "CORRECT",
    "MARKERS",
    "MOST_CLASSES",
    "PALETTE",
    "REFERENCE",
    "WRONG",
    "image_grid",
    "leading",
    "plot_ablation",
    "plot_accuracy_against_sigma",
    "plot_before_after",
    "plot_certified_accuracy",
    "plot_certified_methods",
    "plot_confusion",
    "plot_error_models",
    "plot_feature_map",
    "plot_fractions",
    "plot_label_votes",
    "plot_prediction_shares",
    "plot_radius_ratio",
    "plot_recall",
    "plot_reliability",
    "plot_robustness",
    "plot_severity_curves",
    "plot_similarity",
    "plot_spectrum",
    "plot_template_accuracy",
    "plot_votes",
    "set_style",
    "shorten",
    "shown_of",
]
