"""Leaderboards: which results can be compared, in which order they stand, and a folder of cards to add to."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from medrobust_lib.experiments.cards import COMPETITOR, parameters_hash, without_folders, write_text_atomically

LOWER_IS_BETTER = ("error", "ece", "mce", "degradation", "majority_share", "abstain_rate")
TASKS: Mapping[str, str] = MappingProxyType(
    {
        "generative": "oracle=|questions=", "certification": "certified|smoothed_accuracy|abstain_rate",
        "adaptation": "^val_|^trained_", "corruption": "mce|degradation|average_accuracy|corruption=",
        "noise": r"sigma=(?!0(?!\.))", "clean images": "",
    }
)  # fmt: skip
# No quality: neither more nor less of it is better.
UNRANKED = ("trained_parameters",)
NAMED_FILES = "Notes that may name files of the images were left out."
_OWN_IMAGES = ("folder:", "csv:")
_FILE_NAME = re.compile(r"\S[/\\]|[/\\]\S|\.(?:png|jpe?g|tiff?|bmp|webp|dcm|dicom)\b", re.IGNORECASE)
# What else a certificate depends on; cards of studies have it among their parameters.
_OF_CERTIFICATES = ("alpha", "n", "mode")
_OF_MEAN_RADII = ("radii", "sampling")  # a radius is one of those asked for
_PIXEL_NOISE = "pixel-noise"
_UNSAID: Mapping[str, Any] = MappingProxyType(
    {"corruption": "clean", "sigma": 0, "perturbation": _PIXEL_NOISE, "mode": "predict", "split": "test"}
)
_COLUMNS = ("run", "notebook", "model", "dataset", "metric", "of", "value", "low", "high", "n", "parameters", "rank")
_COLUMNS += ("table", "task", "method", "sigma", "radius", "guarantee", "chance", "constant")
_SAME = ["parameters", "model", "of", "value", "n"]
RANKS = "A rank is a range where intervals overlap; * has no interval and is ranked by its value."


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
        `comparable_tables`); task; method (without settings what the metric is of), sigma, radius and guarantee, where
        the metric has them; chance and constant, the
        values of a random and of a constant answer, where the card tells the classes and their images; seed and dtype
        where the card states them, commit and changed of the checkout, and a column for each version in the card's
        environment. Sorted by table, the best value first (see `lower_is_better`), what could not be measured (NaN)
        last.
    """
    others = dict.fromkeys(name for card in cards for name in _circumstances(card))
    rows = [row for card in cards for row in results_of(card)]
    table = pd.DataFrame(rows, columns=[*_COLUMNS, *others])
    table = table.astype(dict.fromkeys(("value", "low", "high", "chance", "constant"), float))
    order = table["value"].where(table["metric"].map(lower_is_better).astype(bool), -table["value"])
    table = table.assign(rank=order).sort_values(["table", "rank"], kind="stable", ignore_index=True)
    ranks = [rank for _, block in table.groupby("table", sort=False) for rank in _ranks(block)]
    return table.assign(rank=pd.Series(ranks, dtype=object))


def comparable_tables(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Split a leaderboard into tables of results that can be compared, with chance and the constant answer.

    One table holds one task, data set and metric, measured with the same settings (sigma, radius, guarantee,
    perturbation, corruption, suite, severities, reference; under pixel noise also the model's image size; of
    certificates also alpha, number of draws and mode, and of their mean radius the radii asked for and the sampling) on
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
        for column, name in (("chance", "chance"), ("constant", "constant answer")):
            rows.append(pd.DataFrame({"value": block[column].dropna().unique(), "model": name, "rank": ""}))
        lowest = lower_is_better(block["metric"].iloc[0])
        both = pd.concat(rows).sort_values("value", ascending=lowest, kind="stable", ignore_index=True)
        order = "not ranked" if block["metric"].iloc[0] in UNRANKED else f"{'lowest' if lowest else 'highest'} first"
        tables.append((f"{heading}, {order}", both))
    return tables


def lower_is_better(metric: str) -> bool:
    """Whether the smallest value of a metric is the best: errors, and shares that grow as a model collapses."""
    return metric.endswith(LOWER_IS_BETTER)


def task_of(metric: str, measured: Sequence[str]) -> str:
    """What is asked of a model: the first of `TASKS` that a metric's name or what was measured (NAME=VALUE) shows."""
    said = ", ".join([metric, *measured])
    return next(task for task, pattern in TASKS.items() if re.search(pattern, said))


def add_cards(cards: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Add result cards to a leaderboard: a folder with one file for each card, in a folder of its own.

    Of an absolute path only the last part is kept, wherever it stands on a card, and the hash of the parameters
    becomes that of what is kept. Tables stay with the run. Where the data set is of somebody's own files (``folder:``
    or ``csv:``), notes with a word like a path or an image's name are left out; `NAMED_FILES` takes their place.

    Parameters
    ----------
    cards : iterable of mapping
        From `read_cards`.
    folder : Path
        Of the leaderboard; made where it is missing.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    FileExistsError
        A card stands there already (same parameters, model, data set and time); then none is added.
    ValueError
        A card whose number names no file.
    """
    texts = {}
    for card in cards:
        kept = without_folders({name: value for name, value in card.items() if name != "run"})
        kept |= {"tables": [], "images": ""}
        notes = kept.get("notes", [])
        if any(part.get("id", "").startswith(_OWN_IMAGES) for part in _sets(kept).values()):
            safe = [note for note in notes if not _FILE_NAME.search(note)]
            kept["notes"] = safe if safe == notes else [*safe, NAMED_FILES]
        kept["parameters_hash"] = parameters_hash(kept["parameters"])
        model, number, told = kept["model"].get("id", ""), kept["notebook"], f"{card['title']!r} of {card['created']}"
        if not re.fullmatch(r"\d[\w-]*", number):
            raise ValueError(f"{told}: {number!r} is no number of a notebook or step; give the card as it was written")
        unique = json.dumps([kept["parameters_hash"], model, kept["dataset"].get("id"), kept["created"]])
        name = re.sub("[^A-Za-z0-9]+", "-", model).strip("-") or "models"
        path = folder / f"{name}-{hashlib.sha256(unique.encode()).hexdigest()[:8]}" / "cards" / f"{number}.json"
        if path in texts or path.exists():
            raise FileExistsError(f"{told} stands in {folder} already; nothing was added")
        texts[path] = json.dumps(kept, indent=2, allow_nan=False) + "\n"
    for path, text in texts.items():
        write_text_atomically(path, text)
    return list(texts)


def results_of(card: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the `leaderboard` of one card, without ranks, each with the settings of its metric.

    A metric belongs to the model and data set that it names, else to the card's.
    """
    sets = _sets(card)
    for metric in card["metrics"]:
        name, dataset = metric["name"], metric.get("dataset") or card["dataset"].get("id", "")
        settings, facts = metric.get("settings", {}), sets.get(dataset, {})
        measured = _measured(metric, facts, card)
        task = task_of(name, measured)
        yield {
            "run": card["run"],
            "notebook": card["notebook"],
            "model": metric.get("model") or card["model"].get("id", ""),
            "dataset": dataset,
            "metric": name,
            **{key: metric[key] for key in ("of", "low", "high", "n")},
            "value": math.nan if metric["value"] is None else metric["value"],
            "settings": settings,
            "parameters": card["parameters_hash"],
            "table": f"{task}: {name.replace('_', ' ')} on {', '.join([dataset, *measured])}",
            "task": task,
            "method": ", ".join(settings[key] for key in COMPETITOR if key in settings) if settings else metric["of"],
            **{key: settings.get(key) for key in ("sigma", "radius", "guarantee")},
            **_baselines(task, name, facts, settings),
            **_circumstances(card),
        }


def _sets(card: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a card tells of each of its data sets, by id."""
    return {part.get("id", ""): part for part in (*card["dataset"].get("others", ()), card["dataset"])}


def _measured(metric: Mapping[str, Any], facts: Mapping[str, Any], card: Mapping[str, Any]) -> list[str]:
    """What results that can be compared share besides metric and data set, in words."""
    parameters, model = card["parameters"], card["model"]
    settings = {"split": facts.get("split", "test")} | metric.get("settings", {})
    if "guarantee" in settings:
        names = _OF_CERTIFICATES + (_OF_MEAN_RADII if metric["name"] == "average_certified_radius" else ())
        settings = {name: parameters[name] for name in names if name in parameters} | settings
    # The same noise in pixels hides less of a larger image, and an L2 radius is another share of it.
    if settings.get("sigma") and settings.get("perturbation", _PIXEL_NOISE) == _PIXEL_NOISE:
        own = metric.get("model") in (None, "", model.get("id"))
        settings["image_size"] = (model.get("image_size") if own else None) or "unknown"
    said = [
        f"{name.replace('_', ' ')}={str(value).removesuffix('.0')}"
        for name, value in sorted(settings.items())
        if name not in COMPETITOR and _UNSAID.get(name) != value
    ]
    said += [metric["of"]] if metric["of"] and not metric.get("settings") else []
    said += [f"{len(facts['classes'])} classes"] if "classes" in facts else []
    drawn = [f"{name} {parameters[name]}" for name in ("draw", "seed") if parameters.get(name) is not None]
    images = facts.get("fingerprint", "")[:6] or ", ".join(drawn)
    return [*said, f"{metric['n']} images" + (f" ({images})" if images else "")]


def _baselines(
    task: str, metric: str, facts: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, float | None]:
    """Accuracy of a random and of a constant answer; the former is never certified, the latter at every radius."""
    facts = facts if metric.endswith("accuracy") else {}
    if settings.get("questions") in (known := facts.get("constant_answer", {})):
        return {"chance": None, "constant": known[settings["questions"]]}
    classes, counts = len(facts.get("classes", ())), [count for count in facts.get("class_counts", ()) if count]
    constant = (
        1 / len(counts) if counts and "balanced" in metric else max(counts, default=math.nan) / sum(counts or [1])
    )
    certified = task in ("certification", "generative")
    return {"chance": 1 / classes if classes and not certified else math.nan, "constant": constant}


def _ranks(block: pd.DataFrame) -> list[str]:
    """Best and worst place of every row of one table: a row is ahead only where its whole interval is."""
    once = block[~block["metric"].isin(UNRANKED)].drop_duplicates(_SAME).dropna(subset="value")
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
