"""Two runs side by side: image by image where both kept their answers, card by card elsewhere."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from medrobust_lib.evaluation import CLEAN
from medrobust_lib.experiments import leaderboard, read_cards
from medrobust_lib.metrics.classification import difference_interval, mcnemar_p, mean_interval, paired_interval
from medrobust_lib.studies.cells import averaged_over, correct_shares

COLUMNS = ("dataset", "model", "metric", "of", "value_a", "value_b", "difference", "low", "high", "n", "kind", "p")
PAIRED, UNPAIRED = "paired", "unpaired"
_IMAGE_COLUMNS = {"image", "label", "predicted", "dataset", "model"}
# What may differ between two runs and must then be told, or tells two results of one run apart.
_SETTINGS = ("n_images", "n0", "n", "n_draws", "alpha", "sampling", "mode", "radii", "suite", "severities", "dtype")
_CIRCUMSTANCES = ("dtype", "commit", "python", "torch", "medrobust-lib", "open_clip_torch", "transformers", "numpy")


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found.

    Attributes
    ----------
    table : DataFrame
        One row per result that both runs have: dataset, model ("a -> b" where the runs have different ones),
        metric, of, value_a, value_b, difference (B minus A), low, high (its 95 % interval; NaN where a card has
        none), n (images), kind ("paired" or "unpaired"), p (exact McNemar test; NaN where it does not apply).
    only_a, only_b : list of str
        Results without a partner, a line for each data set, model and metric.
    notes : list of str
        What else differs.
    """

    table: pd.DataFrame
    only_a: list[str]
    only_b: list[str]
    notes: list[str]


class _Key(NamedTuple):
    """What a result is of; results with equal keys are compared."""

    model: str
    dataset: str
    metric: str
    of: str
    seed: int | None

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.dataset, self.model, self.metric.replace("_", " "), self.what)))

    @property
    def what(self) -> str:
        return self.of if self.seed in (None, 0) else ", ".join(filter(None, (self.of, f"seed={self.seed}")))


@dataclass(frozen=True, eq=False)
class _Answers:
    """Values of one metric, one for each image."""

    values: pd.Series  # by index of the image
    labels: pd.Series
    binary: bool = False  # every value is 0 or 1: right or wrong
    largest: float = 1.0  # how far two images' values can be apart


@dataclass(frozen=True, eq=False)
class _Result:
    """One result of a card: its row of the leaderboard, the answers behind it if they were kept, and settings."""

    row: Mapping[str, Any]
    answers: _Answers | None
    settings: Mapping[str, Any]


def compare_runs(run_a: Path, run_b: Path) -> Comparison:
    """Compare what two runs or studies found.

    Results are matched by data set, model, metric, seed and what they were measured on (noise level, radius,
    corruption). Where each run has a single model and they differ, these two are compared. Where both runs kept the
    answers to the same images, the difference is paired; its interval is `paired_interval` where an image can only
    be right or wrong, and a bootstrap over these images for means. Elsewhere it comes from the two intervals on the
    cards.

    Parameters
    ----------
    run_a, run_b : Path
        Folders with result cards, at any depth.

    Raises
    ------
    FileNotFoundError
        A folder without result cards.
    ValueError
        The runs have no result in common, or other labels for the same images.
    """
    a, b = _read(Path(run_a)), _read(Path(run_b))
    models_a, models_b = _models(a), _models(b)
    renamed = dict(zip(models_a, models_b, strict=True)) if len(models_a) == len(models_b) == 1 else {}
    rows, partners, notes = [], set(), []
    for key, result in a.items():
        partner = _partner(key, b, renamed)
        if partner is None:
            continue
        partners |= {("a", key), ("b", partner)}
        row = _paired(key, partner, result, b[partner])
        rows.append(row or _unpaired(key, partner, result.row, b[partner].row))
        notes += _differences(key, result, b[partner])
    if not rows:
        raise ValueError(
            f"{run_a} and {run_b} have no result in common: {_holding(a)} against {_holding(b)}; runs are matched by "
            "data set, model, metric, seed and what was measured"
        )
    if renamed and models_a != models_b:
        notes.append(f"the models differ: {models_a[0]} in A, {models_b[0]} in B")
    only = [_summary([key for key in run if (side, key) not in partners]) for side, run in (("a", a), ("b", b))]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    blocks = table.groupby(["dataset", "model", "metric"], sort=False).ngroup()
    table = table.iloc[np.argsort(blocks.to_numpy(), kind="stable")].reset_index(drop=True)
    return Comparison(table, *only, list(dict.fromkeys(notes)))


def _read(folder: Path) -> dict[_Key, _Result]:
    """Results of every card below a folder, with the answers to single images where a table of the card has them."""
    found: dict[_Key, list[_Result]] = {}
    paths = sorted(folder.glob("**/cards/[0-9]*.json"))
    for path, card in zip(paths, read_cards(folder), strict=True):
        parameters = card["parameters"]
        answers = {}
        for name in card["tables"]:
            table = pd.read_csv(path.parent / f"{name}.csv")
            if set(table.columns) >= _IMAGE_COLUMNS:
                answers |= dict(_image_values(table, parameters))
        settings = {name: parameters[name] for name in _SETTINGS if name in parameters}
        for row in leaderboard([card]).to_dict("records"):
            name = (row["model"], row["dataset"], row["metric"], row["of"])
            result = _Result(row, answers.get(name), settings)
            found.setdefault(_Key(*name, parameters.get("seed")), []).append(result)
    return dict(_told_apart(found))


def _told_apart(found: Mapping[_Key, list[_Result]]) -> Iterator[tuple[_Key, _Result]]:
    """Give results of one run that would share a key what differs between them, or else the names of their runs."""
    for key, results in found.items():
        if len(results) == 1:
            yield key, results[0]
            continue
        names = [name for name in _SETTINGS if len({str(result.settings.get(name)) for result in results}) > 1]
        suffixes = [", ".join(f"{name}={result.settings.get(name)}" for name in names) for result in results]
        if len(set(suffixes)) < len(suffixes):
            suffixes = [result.row["run"] for result in results]
        for suffix, result in zip(suffixes, results, strict=True):
            yield key._replace(of=", ".join(filter(None, (key.of, suffix)))), result


def _image_values(
    table: pd.DataFrame, parameters: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, str, str, str], _Answers]]:
    """Per-image values of a table, under the names that the numbers on its card have."""
    for (model, dataset), rows in table.groupby(["model", "dataset"], sort=False):
        if {"radius", "method", "guarantee", "sigma"} <= set(rows.columns):
            for (method, guarantee, sigma), group in rows.groupby(["method", "guarantee", "sigma"], sort=False):
                values = _certificates(group, f"{method} ({guarantee}), sigma={sigma:g}", parameters.get("radii", ()))
                yield from (((model, dataset, *name), answers) for name, answers in values)
        elif {"corruption", "severity"} <= set(rows.columns):
            values = _corruptions(rows, parameters.get("suite", ""))
            yield from (((model, dataset, *name), answers) for name, answers in values)


def _certificates(rows: pd.DataFrame, of: str, radii: Iterable[float]) -> Iterator[tuple[tuple[str, str], _Answers]]:
    if rows["image"].duplicated().any():  # several groups in one: nobody knows which is which
        return
    rows = rows.set_index("image")
    labels, correct = rows["label"], rows["predicted"] == rows["label"]
    yield ("smoothed_accuracy", of), _Answers(correct.astype(float), labels, binary=True)
    for radius in radii:
        certified = (correct & (rows["radius"] >= radius)).astype(float)
        yield ("certified_accuracy", f"{of}, radius={radius:g}"), _Answers(certified, labels, binary=True)
    largest = float(rows["radius_tested"].max()) if "radius_tested" in rows else float(rows["radius"].max())
    yield ("average_certified_radius", of), _Answers(rows["radius"].where(correct, 0.0), labels, largest=largest)
    yield ("abstain_rate", of), _Answers((rows["predicted"] < 0).astype(float), labels, binary=True)


def _corruptions(rows: pd.DataFrame, suite: str) -> Iterator[tuple[tuple[str, str], _Answers]]:
    labels = rows.drop_duplicates("image").set_index("image")["label"].sort_index()
    shares = correct_shares(rows)
    averaged = averaged_over(suite, rows["severity"])
    once = rows.loc[rows["corruption"] != CLEAN, "severity"].nunique() == 1
    for corruption in shares.columns:
        clean = corruption == CLEAN
        name = CLEAN if clean else f"{corruption}, {averaged}"
        yield ("accuracy", name), _Answers(shares[corruption], labels, binary=clean or once)
    corrupted = shares.drop(columns=CLEAN, errors="ignore")
    mean = corrupted.mean(axis="columns")
    yield ("average_accuracy", averaged), _Answers(mean, labels, binary=once and len(corrupted.columns) == 1)


def _partner(key: _Key, others: Mapping[_Key, _Result], renamed: Mapping[str, str]) -> _Key | None:
    for model in (key.model, renamed.get(key.model, key.model)):
        if key._replace(model=model) in others:
            return key._replace(model=model)
    return None


def _paired(key: _Key, partner: _Key, a: _Result, b: _Result) -> dict[str, Any] | None:
    """The difference over the images of which both runs kept the answers; None if there is none."""
    if a.answers is None or b.answers is None:
        return None
    first, second = a.answers, b.answers
    common = first.values.index.intersection(second.values.index)
    if common.empty:
        return None
    other = common[(first.labels.loc[common] != second.labels.loc[common]).to_numpy()]
    if len(other):
        raise ValueError(
            f"{key}: image {other[0]} has label {first.labels[other[0]]} in A and {second.labels[other[0]]} in B; the "
            "runs were made on different images, so they cannot be compared"
        )
    values_a, values_b = first.values.loc[common].to_numpy(), second.values.loc[common].to_numpy()
    change, p = values_b - values_a, float("nan")
    if first.binary and second.binary:
        gained, lost = int((change > 0).sum()), int((change < 0).sum())
        (low, high), p = paired_interval(gained, lost, len(change)), mcnemar_p(gained, lost)
    else:
        low, high = mean_interval(change, largest=max(first.largest, second.largest))
    everything = len(common) == len(first.values) == len(second.values)
    return {
        **_subject(key, partner),
        "value_a": values_a.mean(),
        "value_b": values_b.mean(),
        "difference": change.mean(),
        "low": low,
        "high": high,
        "n": str(len(common)) if everything else f"{len(common)} common",
        "kind": PAIRED,
        "p": p,
    }


def _unpaired(key: _Key, partner: _Key, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    limits = [(row["value"], row["low"], row["high"]) for row in (a, b)]
    known = bool(pd.notna(np.array(limits, dtype=float)).all())
    low, high = difference_interval(*limits) if known else (float("nan"), float("nan"))
    return {
        **_subject(key, partner),
        "value_a": a["value"],
        "value_b": b["value"],
        "difference": b["value"] - a["value"],
        "low": low,
        "high": high,
        "n": str(a["n"]) if a["n"] == b["n"] else f"{a['n']} | {b['n']}",
        "kind": UNPAIRED,
        "p": float("nan"),
    }


def _subject(key: _Key, partner: _Key) -> dict[str, Any]:
    models = key.model if key.model == partner.model else f"{key.model} -> {partner.model}"
    return {"dataset": key.dataset, "model": models, "metric": key.metric, "of": key.what}


def _models(run: Mapping[_Key, _Result]) -> list[str]:
    return list(dict.fromkeys(key.model for key in run if key.model))


def _holding(run: Mapping[_Key, _Result]) -> str:
    datasets = dict.fromkeys(key.dataset for key in run)
    seeds = dict.fromkeys(str(key.seed) for key in run)
    return f"{', '.join(_models(run))} on {', '.join(datasets)} (seed {', '.join(seeds)})"


def _differences(key: _Key, a: _Result, b: _Result) -> list[str]:
    """What differs between two partners besides the result: settings, code and versions."""
    settings = [(f"{key.dataset}: {name}", a.settings.get(name), b.settings.get(name)) for name in _SETTINGS]
    where = [(name, a.row.get(name), b.row.get(name)) for name in a.row if name in _CIRCUMSTANCES]
    return [f"{name} is {old} in A and {new} in B" for name, old, new in settings + where if old != new]


def _summary(keys: Iterable[_Key]) -> list[str]:
    """One line for each data set, model and metric, with all that was measured."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for key in keys:
        lines.setdefault((key.dataset, key.model, key.metric.replace("_", " ")), []).append(key.what)
    return [
        f"{', '.join(filter(None, subject))}: {'; '.join(filter(None, of)) or 'all'}" for subject, of in lines.items()
    ]
