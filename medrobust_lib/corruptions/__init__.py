"""Image corruptions: pure functions, the two suites that order them by severity, and one call that applies them."""

from medrobust_lib.corruptions.suites import MEDIMETA_C, MEDMNIST_C, SUITES, Suite, corrupt

__all__ = ["MEDIMETA_C", "MEDMNIST_C", "SUITES", "Suite", "corrupt"]
