"""Two runs side by side: image by image where both kept their answers, card by card elsewhere."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from medrobust_lib.evaluation import CLEAN
from medrobust_lib.experiments import read_cards
from medrobust_lib.experiments.leaderboards import results_of
from medrobust_lib.metrics.classification import (
    difference_interval,
    is_constant_predictor,
    mcnemar_p,
    mean_interval,
    paired_interval,
)
from medrobust_lib.studies.benchmark_step import correct_shares

COLUMNS = ("dataset", "model", "metric", "of", "value_a", "value_b", "difference", "low", "high", "n", "kind", "p")
PAIRED, UNPAIRED = "paired", "unpaired"
_IMAGE_COLUMNS = {"image", "label", "predicted", "dataset", "model"}
# What may differ between two runs and must then be told, or tells two results of one run apart.
_SETTINGS = (
    "n_images", "draw", "n0", "n", "n_draws", "alpha", "sampling", "mode", "bounds", "radii", "methods",
    "suite", "severities", "dtype",
)  # fmt: skip
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
    images : DataFrame
        Images on which the runs differ, where both kept their answers and an image can only be right or wrong:
        dataset, model, metric, of, image, file and change (1: only B is right, -1: only A is).
    only_a, only_b : list of str
        Results without a partner, a line for each data set, model and metric.
    notes : list of str
        What else differs.
    """

    table: pd.DataFrame
    images: pd.DataFrame
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

    @property
    def what(self) -> str:
        return self.of if self.seed in (None, 0) else ", ".join(filter(None, (self.of, f"seed={self.seed}")))


class _Answers(NamedTuple):
    """Values of one metric, one for each image."""

    rows: pd.DataFrame  # columns value, label and, where known, patient, by index of the image
    binary: bool = False  # every value is 0 or 1: right or wrong
    largest: float = 1.0  # how far two images' values can be apart
    constant: bool = False  # nearly all images got one answer


# One result of a card: its row of the leaderboard, "answers", those behind it if they were kept, and "given", settings.
_Result = Mapping[str, Any]


def compare_runs(run_a: Path, run_b: Path) -> Comparison:
    """Compare what two runs or studies found.

    Results are matched by data set, model, metric, seed and what they were measured on (noise level, radius,
    corruption). Where each run has a single model and they differ, these two are compared. Where both runs kept the
    answers to the same images, the difference is paired; its interval is `paired_interval` where an image can only be
    right or wrong, and `mean_interval` for means, both over patients where one has several images. Elsewhere it comes
    from the two intervals on the cards.

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
    rows, changed, notes, partners = [], [], [], {}
    for key, result in a.items():
        partner = key if key in b else key._replace(model=renamed.get(key.model, key.model))
        if partner in b:
            partners[key] = partner
            model = key.model if key == partner else f"{key.model} -> {partner.model}"
            compared = _paired(key, result, b[partner]) or _unpaired(result, b[partner])
            what = (key.dataset, model, key.metric, key.what)
            rows.append((*what, *compared))
            changed += [(*what, *image) for image in _changed(result["answers"], b[partner]["answers"])]
            notes += _differences(key, result, b[partner])
            notes += [
                f"{side} gives nearly one answer to the images of {key.dataset} ({key.what}): what it gets right says "
                "little about the images"
                for side, one in (("A", result), ("B", b[partner]))
                if one["answers"] and one["answers"].constant
            ]
    if not rows:
        raise ValueError(
            f"{run_a} and {run_b} have no result in common: {_holding(a)} against {_holding(b)}; runs are matched by "
            "data set, model, metric, seed and what was measured"
        )
    if renamed and models_a != models_b:
        notes.append(f"the models differ: {models_a[0]} in A, {models_b[0]} in B")
    only = [_summary(key for key in run if key not in known) for run, known in ((a, partners), (b, partners.values()))]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    blocks = table.groupby(["dataset", "model", "metric"], sort=False).ngroup()
    table = table.loc[blocks.sort_values(kind="stable").index].reset_index(drop=True)
    images = pd.DataFrame(changed, columns=[*COLUMNS[:4], "image", "file", "change"])
    return Comparison(table, images, *only, list(dict.fromkeys(notes)))


def _read(folder: Path) -> dict[_Key, _Result]:
    """Results of every card below a folder, with the answers to single images where a table of the card has them."""
    found: dict[_Key, list[_Result]] = {}
    paths = sorted(folder.glob("**/cards/[0-9]*.json"))
    for path, card in zip(paths, read_cards(folder), strict=True):
        tables = [pd.read_csv(path.parent / f"{name}.csv") for name in card["tables"]]
        kept = [table for table in tables if set(table.columns) >= _IMAGE_COLUMNS]
        given = {name: card["parameters"][name] for name in _SETTINGS if name in card["parameters"]}
        given.setdefault("draw", "stratified")  # cards from before there was another
        for row in results_of(card):
            answers = next(filter(None, (_answers(row, table) for table in kept)), None)
            key = _Key(row["model"], row["dataset"], row["metric"], row["of"], card["parameters"].get("seed"))
            found.setdefault(key, []).append(row | {"answers": answers, "given": given})
    return dict(_told_apart(found))


def _told_apart(found: Mapping[_Key, list[_Result]]) -> Iterator[tuple[_Key, _Result]]:
    """Give results of one run that would share a key what differs between them, or else the names of their runs."""
    for key, results in found.items():
        names = [name for name in _SETTINGS if len({str(result["given"].get(name)) for result in results}) > 1]
        suffixes = [", ".join(f"{name}={result['given'].get(name)}" for name in names) for result in results]
        if len(set(suffixes)) < len(suffixes):
            suffixes = [result["run"] for result in results]
        for suffix, result in zip(suffixes, results, strict=True):
            yield key._replace(of=", ".join(filter(None, (key.of, suffix)))), result


def _answers(result: Mapping[str, Any], rows: pd.DataFrame) -> _Answers | None:
    """The values behind a result, one for each image; None where the rows do not hold them."""
    settings = result["settings"]
    rows = rows[(rows["model"] == result["model"]) & (rows["dataset"] == result["dataset"])]
    if not settings or np.isnan(result["value"]):  # beyond the reach of the draws there is no number
        return None
    if {"method", "guarantee", "sigma"} <= settings.keys() and "radius" in rows:
        return _certificates(result["metric"], rows, settings)
    if "severity" in rows and result["metric"] in ("accuracy", "average_accuracy"):
        return _corruptions(rows, settings)
    return None


def _certificates(metric: str, rows: pd.DataFrame, settings: Mapping[str, Any]) -> _Answers | None:
    same = (rows["method"] == settings["method"]) & (rows["guarantee"] == settings["guarantee"])
    rows = rows[same & np.isclose(rows["sigma"], settings["sigma"])]
    if rows.empty or rows["image"].duplicated().any():  # several groups in one: nobody knows which is which
        return None
    rows = rows.set_index("image")
    correct = rows["predicted"] == rows["label"]
    if metric == "average_certified_radius":
        largest = float(rows["radius_tested" if "radius_tested" in rows else "radius"].max())
        return _Answers(rows[_kept(rows)].assign(value=rows["radius"].where(correct, 0.0)), largest=largest)
    if metric == "abstain_rate":
        correct = rows["predicted"] < 0
    elif metric == "certified_accuracy":
        correct &= rows["radius"] >= settings["radius"]
    answered = rows.loc[rows["predicted"] >= 0, "predicted"].to_numpy()
    constant = len(answered) > 0 and is_constant_predictor(answered)
    return _Answers(rows[_kept(rows)].assign(value=correct.astype(float)), binary=True, constant=constant)


def _kept(rows: pd.DataFrame) -> list[str]:
    return [name for name in ("label", "file", "patient") if name in rows]


def _corruptions(rows: pd.DataFrame, settings: Mapping[str, Any]) -> _Answers:
    labels = rows.drop_duplicates("image").set_index("image")[_kept(rows)].sort_index()
    shares = correct_shares(rows)
    meant = [settings["corruption"]] if "corruption" in settings else shares.columns.drop(CLEAN, errors="ignore")
    once = settings.get("corruption") == CLEAN or len(settings["severities"]) == 1
    constant = is_constant_predictor(rows.loc[rows["corruption"].isin(meant), "predicted"].to_numpy())
    values = labels.assign(value=shares[meant].mean(axis="columns"))
    return _Answers(values, binary=once and len(meant) == 1, constant=constant)


def _paired(key: _Key, a: _Result, b: _Result) -> tuple[Any, ...] | None:
    """The difference over the images of which both runs kept the answers; None if there is none."""
    first, second = a["answers"], b["answers"]
    if first is None or second is None:
        return None
    common = first.rows.merge(second.rows, left_index=True, right_index=True, suffixes=("_a", "_b"))
    if common.empty:
        return None
    other = common[common["label_a"] != common["label_b"]]
    if len(other):
        labels = f"label {other['label_a'].iloc[0]} in A and {other['label_b'].iloc[0]} in B"
        subject = ", ".join(filter(None, (key.dataset, key.model, key.metric.replace("_", " "), key.what)))
        raise ValueError(
            f"{subject}: image {other.index[0]} has {labels}; the runs were made on "
            "different images, so they cannot be compared"
        )
    value_a, value_b = common["value_a"].to_numpy(), common["value_b"].to_numpy()
    change, p = value_b - value_a, float("nan")
    patients = common.get("patient_a", ())
    several = len(patients) > 0 and bool(patients.duplicated().any())  # images of one patient are no independent ones
    if first.binary and second.binary:
        interval = paired_interval(change, groups=patients)
        p = p if several else mcnemar_p(int((change > 0).sum()), int((change < 0).sum()))
    else:
        interval = mean_interval(change, groups=patients, largest=max(first.largest, second.largest))
    everything = len(common) == len(first.rows) == len(second.rows)
    n = str(len(common)) if everything else f"{len(common)} common"
    n += f" of {patients.nunique()} patients" if several else ""
    return value_a.mean(), value_b.mean(), change.mean(), *interval, n, PAIRED, p


def _changed(first: _Answers | None, second: _Answers | None) -> Iterator[tuple[int, str, int]]:
    """Image, file and change of what only one of two runs gets right."""
    if first and second and first.binary and second.binary and "file" in first.rows:
        change = (second.rows["value"] - first.rows["value"]).dropna().astype(int)
        for image, value in change[change != 0].items():
            yield int(image), first.rows.loc[image, "file"], value


def _unpaired(a: _Result, b: _Result) -> tuple[Any, ...]:
    limits = [(row["value"], row["low"], row["high"]) for row in (a, b)]
    known = bool(pd.notna(np.array(limits, dtype=float)).all())
    interval = difference_interval(*limits) if known else (float("nan"), float("nan"))
    n = str(a["n"]) if a["n"] == b["n"] else f"{a['n']} | {b['n']}"
    return a["value"], b["value"], b["value"] - a["value"], *interval, n, UNPAIRED, float("nan")


def _models(run: Mapping[_Key, _Result]) -> list[str]:
    return list(dict.fromkeys(key.model for key in run if key.model))


def _holding(run: Mapping[_Key, _Result]) -> str:
    datasets = dict.fromkeys(key.dataset for key in run)
    seeds = dict.fromkeys(str(key.seed) for key in run)
    return f"{', '.join(_models(run))} on {', '.join(datasets)} (seed {', '.join(seeds)})"


def _differences(key: _Key, a: _Result, b: _Result) -> list[str]:
    """What differs between two partners besides the result: settings, code and versions."""
    settings = [(f"{key.dataset}: {name}", a["given"].get(name), b["given"].get(name)) for name in _SETTINGS]
    where = [(name, a.get(name), b.get(name)) for name in a if name in _CIRCUMSTANCES]
    return [f"{name} is {old} in A and {new} in B" for name, old, new in settings + where if old != new]


def _summary(keys: Iterable[_Key]) -> list[str]:
    """One line for each data set, model and metric, with all that was measured."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for key in keys:
        lines.setdefault((key.dataset, key.model, key.metric.replace("_", " ")), []).append(key.what)
    return [
        f"{', '.join(filter(None, subject))}: {'; '.join(filter(None, of)) or 'all'}" for subject, of in lines.items()
    ]
