"""Leaderboards: which results can be compared, in which order they stand, and a folder of cards to add to."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medrobust_lib.experiments.cards import parameters_hash, write_text_atomically

LOWER_IS_BETTER = ("error", "ece", "mce", "degradation", "majority_share", "abstain_rate")
# Settings of a metric that tell competitors apart. Every other setting tells what was measured.
COMPETITOR = ("method", "variant")
# What else a certificate depends on; cards of studies have it among their parameters.
_OF_CERTIFICATES = ("alpha", "n", "mode")
_UNSAID = (("corruption", "clean"), ("sigma", 0), ("perturbation", "pixel-noise"), ("mode", "predict"))
_COLUMNS = ("run", "notebook", "model", "dataset", "metric", "of", "value", "low", "high", "n", "parameters", "rank")
_COLUMNS += ("table", "task", "sigma", "radius", "guarantee", "chance", "constant")
_SAME = ["parameters", "model", "of", "value", "n"]
BASELINES = {"chance": "chance", "constant": "constant answer"}
RANKS = "A rank is a range where intervals overlap; * has no interval and is ranked by its value."
# In the text of JSON: from a root to the last slash of a path, of Unix or of Windows.
_PLACE = re.compile(
    r'(?<![\w./])~?/(?!\s)(?:[^/"?:;,\\\n]+/)*(?=[\w.~-])|(?<!\w)[A-Za-z]:(?:\\\\|/)(?:[^"?/\\]+(?:\\\\|/))*'
)


def leaderboard(cards: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per metric of every card, from the cards alone.

    Parameters
    ----------
    cards : sequence of mapping
        From `read_cards`.

    Returns
    -------
    DataFrame with columns run, notebook, model, dataset, metric, of, value, low, high, n, parameters, ...
        Then ``rank`` within ``table``, the heading that results share which can be compared (see
        `comparable_tables`); task, sigma, radius and guarantee (where the metric has them); chance and constant, the
        values of a random and of a constant answer, where the card tells the classes and their images; seed and dtype
        where the card states them, commit and changed of the checkout, and a column for each version in the card's
        environment. Sorted by table, the best value first (see `lower_is_better`), what could not be measured (NaN)
        last.
    """
    others = dict.fromkeys(name for card in cards for name in _circumstances(card))
    table = pd.DataFrame(ranked_results(cards), columns=[*_COLUMNS, *others])
    table = table.astype(dict.fromkeys(("value", "low", "high", "chance", "constant"), float))
    ranks = [rank for _, block in table.groupby("table", sort=False) for rank in _ranks(block)]
    return table.assign(rank=pd.Series(ranks, dtype=object))


def comparable_tables(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Split a leaderboard into tables of results that can be compared, with chance and the constant answer.

    One table holds one task, data set and metric, measured with the same settings (sigma, radius, guarantee,
    perturbation, corruption, suite, severities, reference; of certificates also alpha, number of draws and mode) on
    the same images of the same classes. A metric without settings is compared with those of the same ``of`` only. The
    images are the same where cards hold the same fingerprint of them; without one, where number, draw and seed agree.

    Parameters
    ----------
    table : DataFrame
        From `leaderboard`, or rows of it.

    Returns
    -------
    list of (heading, DataFrame)
        Rows of the leaderboard, a result that several runs agree on once, with their number as ``runs``. Chance and
        the constant answer stand among them by value, without run or rank.
    """
    tables = []
    for heading, block in table.groupby("table", sort=False):
        counts = block.groupby(_SAME, sort=False, dropna=False)["run"].nunique()
        rows = [block.drop_duplicates(_SAME).assign(runs=counts.to_numpy())]
        for column, name in BASELINES.items():
            known = block[[column]].dropna().drop_duplicates()
            rows.append(known.set_axis(["value"], axis=1).assign(model=name, metric=block["metric"].iloc[0], rank=""))
        lowest = lower_is_better(block["metric"].iloc[0])
        both = pd.concat(rows).sort_values("value", ascending=lowest, kind="stable", ignore_index=True)
        tables.append((heading, both))
    return tables


def ranked_results(cards: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the `leaderboard`, without ranks, each with the settings of its metric.

    A metric belongs to the model and data set that it names, else to the card's.
    """
    rows = [row for card in cards for row in _results(card)]

    def rank(row: Mapping[str, Any]) -> tuple[str, bool, float]:
        value = row["value"] if lower_is_better(row["metric"]) else -row["value"]
        return row["table"], math.isnan(value), value

    return sorted(rows, key=rank)


def lower_is_better(metric: str) -> bool:
    """Whether the smallest value of a metric is the best: errors, and shares that grow as a model collapses."""
    return metric.endswith(LOWER_IS_BETTER)


def task_of(metric: str, settings: Mapping[str, Any], *, of: str = "") -> str:
    """What is asked of a model, from the name of a metric, its settings and, without any, its ``of``.

    The first rule that fits holds. Where conditions stand in ``of`` alone, the task of an accuracy is not stated.
    """
    rules = {
        "generative": "oracle" in settings,
        "certification": "certified" in metric or metric in ("smoothed_accuracy", "abstain_rate"),
        "adaptation": metric.startswith("val_") or metric == "trained_parameters",
        "corruption": metric.endswith(("mce", "degradation", "average_accuracy"))
        or settings.get("corruption", "clean") != "clean",
        "noise": settings.get("sigma", 0) != 0,
        "clean images": bool(settings) or not of,
    }
    return next((task for task, fits in rules.items() if fits), "not stated")


def add_card(card: Mapping[str, Any], folder: Path) -> Path:
    """Add a result card to a leaderboard: a folder that holds one file for each card, in a folder of its own.

    Of absolute paths only the last part is kept, wherever they stand on the card, and the hash of the parameters is
    that of what is kept. Tables of the run stay where they are.

    Parameters
    ----------
    card : mapping
        From `read_cards`.
    folder : Path
        Of the leaderboard; made where it is missing.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    FileExistsError
        The card stands there already: same parameters, model, data set and time.
    """
    text = json.dumps({name: value for name, value in card.items() if name != "run"}, ensure_ascii=False)
    kept = json.loads(_PLACE.sub("", text)) | {"tables": [], "images": ""}
    kept["parameters_hash"] = parameters_hash(kept["parameters"])
    model = kept["model"].get("id", "")
    told = json.dumps([kept["parameters_hash"], model, kept["dataset"].get("id", ""), kept["created"]])
    name = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-.") or "models"
    path = folder / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}" / "cards" / f"{kept['notebook']}.json"
    if path.exists():
        raise FileExistsError(f"this card stands in {folder} already: {path.relative_to(folder)}; nothing was added")
    write_text_atomically(path, json.dumps(kept, indent=2, allow_nan=False) + "\n")
    return path


def _results(card: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    sets = {part.get("id", ""): part for part in (*card["dataset"].get("others", ()), card["dataset"])}
    for metric in card["metrics"]:
        name, dataset = metric["name"], metric.get("dataset") or card["dataset"].get("id", "")
        settings, facts = metric.get("settings", {}), sets.get(dataset, {})
        task = task_of(name, settings, of=metric["of"])
        yield {
            "run": card["run"],
            "notebook": card["notebook"],
            "model": metric.get("model") or card["model"].get("id", ""),
            "dataset": dataset,
            "metric": name,
            **{key: metric[key] for key in ("of", "low", "high", "n")},
            "value": float("nan") if metric["value"] is None else metric["value"],
            "settings": settings,
            "parameters": card["parameters_hash"],
            "table": _heading(task, dataset, metric, facts, card["parameters"]),
            "task": task,
            **{key: settings.get(key) for key in ("sigma", "radius", "guarantee")},
            **_baselines(task, name, facts),
            **_circumstances(card),
        }


def _heading(
    task: str, dataset: str, metric: Mapping[str, Any], facts: Mapping[str, Any], parameters: Mapping[str, Any]
) -> str:
    """What results that can be compared share, in words."""
    settings = metric.get("settings", {})
    if settings and task in ("certification", "generative"):
        settings = {name: parameters[name] for name in _OF_CERTIFICATES if name in parameters} | settings
    measured = [
        f"{name.replace('_', ' ')}={str(value).removesuffix('.0')}"
        for name, value in sorted(settings.items())
        if name not in COMPETITOR and (name, value) not in _UNSAID
    ]
    drawn = [f"{name} {parameters[name]}" for name in ("draw", "seed") if parameters.get(name) is not None]
    images = facts.get("fingerprint", "")[:6] or ", ".join(drawn)
    parts = [
        f"{task}: {metric['name'].replace('_', ' ')} on {dataset}",
        facts.get("split", "test").replace("test", ""),
        *(measured if settings else [metric["of"]]),
        f"{len(facts['classes'])} classes" if "classes" in facts else "",
        f"{metric['n']} images" + (f" ({images})" if images else ""),
        f"{'lowest' if lower_is_better(metric['name']) else 'highest'} first",
    ]
    return ", ".join(filter(None, parts))


def _baselines(task: str, metric: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy of a random and of a constant answer; the former is never certified, the latter at every radius."""
    counts = facts.get("class_counts", ()) if metric.endswith("accuracy") else ()
    classes = len(facts.get("classes", ())) if metric.endswith("accuracy") else 0
    largest = 1 / sum(count > 0 for count in counts) if "balanced" in metric and counts else 0.0
    return {
        "chance": 1 / classes if classes and task not in ("certification", "generative") else math.nan,
        "constant": largest or (max(counts) / sum(counts) if counts else math.nan),
    }


def _ranks(block: pd.DataFrame) -> list[str]:
    """Best and worst place of every row of one table: a row is ahead only where its whole interval is."""
    once = block.drop_duplicates(_SAME).dropna(subset="value")
    low, high = (once[side].fillna(once["value"]).to_numpy() for side in ("low", "high"))
    if lower_is_better(block["metric"].iloc[0]):
        low, high = -high, -low
    best = 1 + (low > high[:, None]).sum(axis=1)
    worst = len(once) - (high < low[:, None]).sum(axis=1)
    marks = once["low"].isna().map({True: "*", False: ""})
    ranks = [f"{a}{mark}" if a == b else f"{a}-{b}{mark}" for a, b, mark in zip(best, worst, marks, strict=True)]
    known = dict(zip(once[_SAME].itertuples(index=False, name=None), ranks, strict=True))
    return [known.get(row, "–") for row in block[_SAME].itertuples(index=False, name=None)]


def _circumstances(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a result may depend on besides its parameters' names: seed, precision, code and versions."""
    return {
        "seed": card["parameters"].get("seed"),
        "dtype": str(card["model"].get("dtype", "")).removeprefix("torch."),
        "commit": card["git"].get("commit", ""),
        "changed": card["git"].get("changed"),
        **card["environment"],
    }
