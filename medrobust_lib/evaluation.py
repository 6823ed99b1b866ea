"""Zero-shot classifiers on corrupted images: answers to every corruption and severity, and their table."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from medrobust_lib import metrics
from medrobust_lib.corruptions.benchmark import corrupted
from medrobust_lib.corruptions.suites import SEVERITIES, find_suite
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.models.dual_encoder import DualEncoder

CLEAN = "clean"
Answers = dict[tuple[str, str, int], NDArray[np.int64]]


class Candidate(NamedTuple):
    """A zero-shot classifier: an image tower and the features of its class texts."""

    encoder: DualEncoder
    class_features: Tensor  # float [K, d], unit norm


@torch.inference_mode()
def corruption_answers(
    candidates: Mapping[str, Candidate],
    data: ImageDataset,
    *,
    suite: str = "medimeta-c",
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    batch_size: int = 64,
) -> Answers:
    """Answers of classifiers on the clean images and on every corruption and severity of a suite.

    Each corrupted set is made once, in memory, and every classifier sees the same one; classifiers that share an
    image tower (the same object) share its features, those of one geometry the prepared images.

    Parameters
    ----------
    candidates : mapping of str to Candidate
        Classifiers under the names that tables will show.
    data : ImageDataset
    suite : {"medimeta-c", "medmnist-c"}
    severities : sequence of int
        Of 1 to 5.
    seed : int
        Of the corruptions.
    batch_size : int
        Changes memory and speed.

    Returns
    -------
    dict of (name, corruption, severity) to int64 [n]
        Predicted classes; clean images are ``(name, "clean", 0)``.

    Raises
    ------
    ValueError
        No candidates, or as from `medrobust_lib.corruptions.benchmark.corrupted`.
    """
    if not candidates:
        raise ValueError("no candidates to evaluate; give at least one")
    variants = [(CLEAN, 0), *((c, s) for c in find_suite(suite).names(data.id) for s in severities)]
    found: Answers = {}
    for corruption, severity in variants:
        shown = data if severity == 0 else corrupted(data, corruption, severity=severity, seed=seed, suite=suite)
        features = _features([encoder for encoder, _ in candidates.values()], shown.images, batch_size)
        for name, (encoder, class_features) in candidates.items():
            probabilities = encoder.probabilities(features[id(encoder)], class_features)
            found[name, corruption, severity] = probabilities.argmax(1).cpu().numpy()
    return found


def accuracy_table(answers: Answers, data: ImageDataset) -> pd.DataFrame:
    """Tidy accuracies of `corruption_answers`, as `medrobust_lib.metrics.corruption_error_table` takes them.

    Parameters
    ----------
    answers : dict of (name, corruption, severity) to int64 [n]
    data : ImageDataset
        The images that were answered.

    Returns
    -------
    DataFrame, one row per name, corruption and severity
        dataset, model, corruption, severity, n, accuracy with its 95 % Clopper-Pearson interval low and high,
        balanced_accuracy, majority_share, constant (gives nearly one answer).
    """
    rows = []
    for (name, corruption, severity), answer in answers.items():
        low, high = metrics.accuracy_interval(int((answer == data.labels).sum()), len(data))
        rows.append(
            {
                "dataset": data.id,
                "model": name,
                "corruption": corruption,
                "severity": severity,
                "n": len(data),
                "accuracy": metrics.accuracy(data.labels, answer),
                "low": low,
                "high": high,
                "balanced_accuracy": metrics.balanced_accuracy(data.labels, answer),
                "majority_share": metrics.majority_share(answer),
                "constant": metrics.is_constant_predictor(answer),
            }
        )
    return pd.DataFrame(rows)


def _features(encoders: Sequence[DualEncoder], images: NDArray[np.uint8], batch_size: int) -> dict[int, Tensor]:
    """Features by ``id`` of the encoder, each computed once; encoders of one geometry share the prepared images."""
    different = {id(encoder): encoder for encoder in encoders}
    parts: dict[int, list[Tensor]] = {key: [] for key in different}
    for start in range(0, len(images), batch_size):
        prepared: dict[Hashable, Tensor] = {}
        for key, encoder in different.items():
            geometry = (type(encoder).prepare, encoder.preprocessing)  # an own model may prepare in its own way
            if geometry not in prepared:
                prepared[geometry] = encoder.prepare(images[start : start + batch_size])
            parts[key].append(encoder.encode_image(prepared[geometry]))
    return {key: torch.cat(found) for key, found in parts.items()}
