"""What is measured: pure functions of arrays and tables."""

from medrobust_lib.metrics.certified import (
    CERTIFICATE_GROUPS,
    average_certified_radius,
    certification_summary,
    certified_accuracy,
    certified_envelope,
)
from medrobust_lib.metrics.classification import (
    CONSTANT_SHARE,
    accuracy,
    accuracy_interval,
    balanced_accuracy,
    calibration_bins,
    expected_calibration_error,
    is_constant_predictor,
    majority_share,
    per_class_recall,
)

__all__ = [
    "CERTIFICATE_GROUPS",
    "CONSTANT_SHARE",
    "accuracy",
    "accuracy_interval",
    "average_certified_radius",
    "balanced_accuracy",
    "calibration_bins",
    "certification_summary",
    "certified_accuracy",
    "certified_envelope",
    "expected_calibration_error",
    "is_constant_predictor",
    "majority_share",
    "per_class_recall",
]
