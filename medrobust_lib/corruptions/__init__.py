"""Image corruptions: pure functions, the three suites that order them by severity, and one call that applies them."""

from medrobust_lib.corruptions.suites import CLINICAL_C, MEDIMETA_C, MEDMNIST_C, SUITES, Suite, corrupt

__all__ = ["CLINICAL_C", "MEDIMETA_C", "MEDMNIST_C", "SUITES", "Suite", "corrupt"]
