"""What is measured: pure functions of arrays and tables."""

# ruff: noqa: F401 -- what is imported here is what the room offers

from medrobust_lib.metrics.certified import (
    average_certified_radius,
    balanced_certified_accuracy,
    certification_summary,
    certified_accuracy,
    certified_envelope,
    over_prompt_seeds,
    table_of_radii,
)
from medrobust_lib.metrics.classification import (
    accuracy,
    accuracy_interval,
    balanced_accuracy,
    bootstrap_interval,
    calibration_bins,
    expected_calibration_error,
    is_constant_predictor,
    majority_share,
    mcnemar_p,
    mean_interval,
    per_class_recall,
    share_interval,
)
from medrobust_lib.metrics.corruption import (
    AGGREGATIONS,
    average_accuracy,
    corruption_error,
    corruption_error_layout,
    corruption_error_table,
    degradation,
    mean_corruption_error,
    relative_clean_error,
    relative_mean_corruption_error,
)
