"""What the README needs of a run of all notebooks: values, intervals, counts and times, in one small JSON file."""

import ast
import json
import os
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from medrobust_lib import metrics
from medrobust_lib.experiments import read_cards, write_text_atomically
from medrobust_lib.parameters import notebook_parameters
from medrobust_lib.runner import find_notebooks

FORMAT = 1
ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "docs" / "demo_results.json"
PROMPT_METHODS = ("zero-shot", "few-shot PromptSmooth", "PromptSmooth")
INTERVAL, SEEDS = "95 % interval", "lowest and highest seed"
_DIGITS = 4

Card = Mapping[str, Any]
Row = dict[str, Any]


def read_snapshot(path: Path = SNAPSHOT) -> dict[str, Any]:
    """Read the snapshot.

    Raises
    ------
    ValueError
        It has another format; the message says how to make it anew.
    """
    snapshot = json.loads(path.read_text(encoding="utf-8"))
    if snapshot.get("format") != FORMAT:
        raise ValueError(
            f"{path.name} has format {snapshot.get('format')}, this version reads {FORMAT}; "
            "make it anew with `python docs/generate.py --snapshot runs/demo`"
        )
    return snapshot


def write_snapshot(
    run_dir: Path, *, test_minutes: int | None = None, run_minutes: int | None = None, path: Path = SNAPSHOT
) -> dict[str, Any]:
    """Take from the cards and tables of a run what the README shows, and write it.

    Parameters
    ----------
    run_dir : Path
        Folder of a run with default parameters, such as ``make run`` leaves; notebooks may be missing.
    test_minutes : int or None
        Minutes that ``make test`` took; None keeps what the former snapshot says of it.
    run_minutes : int or None
        Minutes that ``make run`` took where ``make test`` did; None: it is the machine of `run_dir`.
    path : Path
        Where to write.

    Returns
    -------
    dict
        The snapshot.

    Raises
    ------
    FileNotFoundError
        No cards in the folder.
    ValueError
        A notebook was run with other parameters than its defaults, or its card lacks what is shown; `run_minutes`
        without `test_minutes`.
    """
    cards = {card["notebook"]: card for card in read_cards(run_dir, nested=False)}
    for number, card in cards.items():
        differing = changed_parameters(number, card["parameters"])
        if differing:
            raise ValueError(
                f"notebook {number} in {run_dir} was run with {', '.join(differing)} other than the default; the "
                "README shows the demo run: repeat it with `make run`"
            )
    if test_minutes is None and run_minutes is not None:
        raise ValueError(f"run_minutes={run_minutes} says where `make test` was timed; give test_minutes, too")
    if test_minutes is None and path.exists():
        test_minutes, run_minutes = (read_snapshot(path).get(name) for name in ("test_minutes", "test_run_minutes"))
    folder, times = run_dir / "cards", _times(cards, run_dir / "notebooks")
    snapshot = {
        "format": FORMAT,
        "cores": os.cpu_count(),
        "run_seconds": round(_wall_clock(times.values())),
        "test_minutes": test_minutes,
        "test_run_minutes": run_minutes,
        "peak_memory_mb": max((card["peak_memory_mb"] or 0) for card in cards.values()),
        "notebooks": {
            number: {
                "seconds": round(times[number][1] - times[number][0]),
                "parameters": card["parameters"],
                "synthetic": card["dataset"]["synthetic"],
                "results": _rounded(_RESULTS.get(number, _first_metric)(card, folder)),
            }
            for number, card in sorted(cards.items())
        },
        "curves": _rounded({name: draw(cards, folder) for name, draw in _CURVES.items()}),
    }
    write_text_atomically(path, json.dumps(snapshot, indent=1) + "\n")
    return snapshot


def changed_parameters(number: str, parameters: Mapping[str, Any]) -> list[str]:
    """Names of parameters that differ from the default in the notebook's parameters cell."""
    specification = notebook_parameters(find_notebooks([number])[number])
    defaults = {name: ast.literal_eval(entry["default"]) for name, entry in specification.items()}
    return [name for name, value in parameters.items() if name in defaults and value != defaults[name]]


def _times(cards: Mapping[str, Card], notebooks: Path) -> dict[str, tuple[float, float]]:
    """When each notebook began and ended, in seconds, its kernel's start included where the executed notebook tells."""
    times = {}
    for number, card in cards.items():
        end = datetime.fromisoformat(card["created"]).timestamp()
        times[number] = (end - card["seconds"], end)
    for path in notebooks.glob("*.ipynb"):
        told = nbformat.read(path, as_version=4).metadata.get("papermill", {})
        if told.get("end_time"):
            begun, ended = (datetime.fromisoformat(told[name]).timestamp() for name in ("start_time", "end_time"))
            times[path.name.split("_")[0]] = (begun, ended)
    return times


def _wall_clock(times: Collection[tuple[float, float]]) -> float:
    """Seconds from the first start to the last end; of notebooks that ran side by side less than their sum."""
    begun, ended = zip(*times, strict=True)
    return min(max(ended) - min(begun), sum(end - start for start, end in times))


# ---- one function a notebook: the rows of the table of results ----


def _results_01(card: Card, folder: Path) -> list[Row]:
    return [_from_metric(card, "accuracy", f"accuracy, zero-shot, {_dataset(card)}")]


def _results_02(card: Card, folder: Path) -> list[Row]:
    noisy = card["parameters"]["sigmas"][3]
    return [
        _from_metric(card, "accuracy", f"accuracy at σ = {noisy:g}, {_dataset(card)}", of=f"sigma={noisy:g}"),
        _from_metric(card, "majority_share", "share of the most frequent answer there", of=f"sigma={noisy:g}"),
    ]


def _results_03(card: Card, folder: Path) -> list[Row]:
    sigma, of = card["parameters"]["sigmas"][0], "{} ({}), sigma={:g}, radius=0.1"
    guarantees = dict.fromkeys(PROMPT_METHODS, "standard") | {"PromptSmooth": "frozen-prompt"}
    return [
        _from_metric(
            card,
            "certified_accuracy",
            f"certified at radius 0.1, σ = {sigma:g}, {_dataset(card)}: {method} (guarantee: {guarantee})",
            of=of.format(method, guarantee, sigma),
        )
        for method, guarantee in guarantees.items()
    ]


def _results_03b(card: Card, folder: Path) -> list[Row]:
    table = pd.read_csv(folder / "03b_ablations.csv")
    few_shot = ("shots", "context tokens", "training noise", "context", "class name")
    others = table[table["setting"].isin(few_shot) & (table["radius"] == 0.1)]["certified_accuracy"]
    sigma = card["parameters"]["sigma"]
    what = (
        f"certified at radius 0.1, σ = {sigma:g}, {_dataset(card)}, validation split: few-shot prompt of 16 shots; "
        f"all {len(others)} few-shot settings lie between {100 * others.min():.0f} and {100 * others.max():.0f} %"
    )
    return [_from_metric(card, "certified_accuracy", what, of=f"shots: 16 (standard), sigma={sigma:g}, radius=0.1")]


def _results_04(card: Card, folder: Path) -> list[Row]:
    table = pd.read_csv(folder / "04_adaptation.csv")
    sets = table["dataset"].nunique()
    before = table[table["method"] == "zero-shot"]
    lora = table[table["method"] == "LoRA"].groupby("seed")[["clean_error", "mce"]].mean()
    n = int(before["n"].sum())
    where = f"mean of {sets} phantom sets"
    return [
        _row(f"error on clean images before adaptation, {where}", before["clean_error"].mean(), n),
        _row(f"the same after LoRA, mean of {len(lora)} seeds", lora["clean_error"], n),
        _row(f"mCE of LoRA, percent of the errors before, {where}", lora["mce"] / 100, n),
    ]


def _results_05(card: Card, folder: Path) -> list[Row]:
    table = pd.read_csv(folder / "05_mce.csv")
    own = table[table["model"] == card["model"]["id"]]
    one, n = own[own["dataset"] == card["dataset"]["id"]].iloc[0], int(own["n"].sum())
    where = f"mean of {len(own)} phantom sets"
    lost = {"low": one["lost_low"], "high": one["lost_high"], "interval": INTERVAL}
    return [
        _row(f"accuracy on clean images, {where}", 1 - own["clean_error"].mean(), n),
        _row(f"accuracy on corrupted images, {where}", own["average_accuracy"].mean(), n),
        _row(f"lost to corruption, {_dataset(card)}", one["degradation"], int(one["n"])) | lost,
    ]


def _results_06(card: Card, folder: Path) -> list[Row]:
    sigma, of = card["parameters"]["sigma"], "{}, sigma={:g}, radius=0.1"
    named = {"finding": "the finding it names", "safety": "safe to send home or not"}
    return [
        _from_metric(
            card,
            "certified_accuracy",
            f"certified at radius 0.1, σ = {sigma:g}, {_dataset(card)}: {what} (guarantee: composite)",
            of=of.format(task, sigma),
        )
        for task, what in named.items()
    ]


def _results_07(card: Card, folder: Path) -> list[Row]:
    own = card["model"]["id"]
    named = {
        metric["model"].removeprefix(f"{own}, "): metric for metric in card["metrics"] if metric["name"] == "accuracy"
    }
    return [
        _row(f"accuracy, {'zero-shot' if name == own else name}, phantoms read from a folder", one["value"], one["n"])
        | _bounds(one)
        for name, one in named.items()
    ]


def _results_08(card: Card, folder: Path) -> list[Row]:
    suites = {"contrast": "MediMeta-C", "gamma": "MedMNIST-C", "blur": "MedMNIST-C"}
    return [
        _from_metric(
            card,
            "certified_accuracy",
            f"certified for every {name} up to severity 1 of {suite}, {_dataset(card)}: zero-shot "
            "(guarantee: standard)",
            of=f"zero-shot (standard), {name} up to severity 1",
        )
        for name, suite in suites.items()
    ]


def _first_metric(card: Card, folder: Path) -> list[Row]:
    """Of a notebook without rows of its own: its first metric, one with an interval if there is any."""
    metric = next((one for one in card["metrics"] if one["low"] is not None), card["metrics"][0])
    what = ", ".join(
        filter(None, (metric["name"].replace("_", " "), metric["of"], metric["dataset"] or _dataset(card)))
    )
    return [_row(what, metric["value"], metric["n"]) | _bounds(metric)]


_RESULTS: dict[str, Callable[[Card, Path], list[Row]]] = {
    "01": _results_01,
    "02": _results_02,
    "03": _results_03,
    "03b": _results_03b,
    "04": _results_04,
    "05": _results_05,
    "06": _results_06,
    "07": _results_07,
    "08": _results_08,
}


# ---- what the picture and the comparison with the papers draw on ----


def _severity_curves(cards: Mapping[str, Card], folder: Path) -> Row | None:
    if "05" not in cards:
        return None
    table = pd.read_csv(folder / "05_corruptions.csv")
    own = table[table["model"] == cards["05"]["model"]["id"]]
    points = own.groupby(["corruption", "severity"], sort=False)["accuracy"].mean().reset_index()
    errors = pd.read_csv(folder / "05_mce.csv")
    own_errors = errors[errors["model"] == cards["05"]["model"]["id"]]
    whole = [cards["05"]["model"]["id"], *cards["05"]["parameters"]["compare_with"]]
    means = table[table["model"].isin(whole)].groupby(["model", "severity"], sort=False)["accuracy"].mean()
    return {
        "datasets": int(own["dataset"].nunique()),
        "n": int(own_errors["n"].sum()),
        "lost": own_errors["degradation"].mean(),
        "clean": 1 - own_errors["clean_error"].mean(),
        "chance": table.loc[table["model"] == "constant answer", "accuracy"].mean(),  # of sets as even as the phantoms
        "means": means.reset_index().to_dict("records"),
        "points": points.to_dict("records"),
    }


def _certified_curves(cards: Mapping[str, Card], folder: Path) -> Row | None:
    if "03" not in cards:
        return None
    table = pd.read_csv(folder / "03_certified_accuracy.csv")
    table = table[table["method"].isin(PROMPT_METHODS)]
    summary = metrics.over_prompt_seeds(table).dropna(subset="certified_accuracy")  # beyond the reach of the draws
    shown = ["method", "guarantee", "sigma", "radius", "certified_accuracy", "low", "high", "seeds"]
    return {
        "dataset": _dataset(cards["03"]),
        "n": int(summary["n"].iloc[0]),
        "chance": 1 / len(cards["03"]["dataset"]["classes"]),
        "points": summary[shown].to_dict("records"),
    }


def _adaptation(cards: Mapping[str, Card], folder: Path) -> Row | None:
    if "04" not in cards:
        return None
    table = pd.read_csv(folder / "04_adaptation.csv")
    means = table.groupby("method")[["clean_error", "mce", "degradation"]].mean()
    return {method: means.loc[method].to_dict() for method in ("zero-shot", "LoRA")}


_CURVES: dict[str, Callable[[Mapping[str, Card], Path], Row | None]] = {
    "severity": _severity_curves,
    "certified": _certified_curves,
    "adaptation": _adaptation,
}


# ---- rows ----


def _row(what: str, value: float | pd.Series, n: int) -> Row:
    """One result; a series holds one value a seed, and becomes their mean and range."""
    if isinstance(value, pd.Series):
        spread = {"low": value.min(), "high": value.max(), "interval": SEEDS}
        return {"what": what, "value": value.mean(), **spread, "n": n}
    return {"what": what, "value": value, "low": None, "high": None, "interval": "", "n": n}


def _from_metric(card: Card, name: str, what: str, *, of: str = "") -> Row:
    for metric in card["metrics"]:
        if metric["name"] == name and metric["of"] == of and not metric["dataset"]:
            return _row(what, metric["value"], metric["n"]) | _bounds(metric)
    raise ValueError(
        f"the card of notebook {card['notebook']} has no metric {name!r} of {of!r}; it may be renamed: change "
        f"_results_{card['notebook']} in docs/demo_snapshot.py"
    )


def _bounds(metric: Mapping[str, Any]) -> Row:
    return {"low": metric["low"], "high": metric["high"], "interval": "" if metric["low"] is None else INTERVAL}


def _dataset(card: Card) -> str:
    return str(card["dataset"]["id"])


def _rounded(value: Any) -> Any:
    """The same structure with plain numbers of few digits; unknown ones (NaN) are None."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, float):  # numpy's, too
        return None if pd.isna(value) else round(float(value), _DIGITS)
    return value
