"""A protocol's results beside the published numbers: the table in the paper's layout, every difference, a verdict.

All frames here are tidy: a row for each number, addressed by dataset, model and method (in the paper's words), by the
column of the table, and by the measure.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from medrobust_lib import metrics
from medrobust_lib.data.published import constant_predictors, entries_that_do_not_fit, load_published
from medrobust_lib.evaluation import CLEAN
from medrobust_lib.experiments import read_cards, write_text_atomically
from medrobust_lib.experiments.report import short_number, write_page
from medrobust_lib.files import read_json_object
from medrobust_lib.generative.calibration import by_draws
from medrobust_lib.metrics.classification import accuracy_interval, difference_interval
from medrobust_lib.studies.adapt_step import AdaptCell
from medrobust_lib.studies.benchmark_step import ANSWERS, BenchmarkCell, correct_shares, right_answers
from medrobust_lib.studies.certify_step import CERTIFICATES, CertifyCell
from medrobust_lib.studies.protocols import Protocol
from medrobust_lib.studies.questions_step import CERTIFIED_ANSWERS, QuestionsCell
from medrobust_lib.studies.steps import TIMES, Cell

KEYS = ["dataset", "model", "method", "column", "measure"]
AGREES, DIFFERS, NO_NUMBER = "agrees within the interval", "differs", "no image number reported"
NO_INTERVAL = "no interval to judge by"
ALL = "all"
_OURS = ["ours", "low", "high", "n", "detail", "guarantee"]
_JUDGED = ["difference_low", "difference_high", "verdict", "remark"]
_HALF, _NOTHING = 0.5, "–"


class Layout(NamedTuple):
    """How a published table is made of results.

    Attributes
    ----------
    ours : callable
        (protocol, folder of the study) -> frame with `KEYS`, ours, low, high, n, detail and guarantee.
    reported : callable
        () -> frame with `KEYS`, reported and remark.
    columns : str
        What the columns and numbers of the table are, in words.
    """

    ours: Callable[[Protocol, Path], pd.DataFrame]
    reported: Callable[[], pd.DataFrame]
    columns: str = ""


def compare_with_published(protocol: Protocol, folder: Path) -> pd.DataFrame:
    """Every number of a table: ours and the published one, their difference, and what follows.

    Parameters
    ----------
    protocol : Protocol
    folder : Path
        Of its study; cells without a result are left out.

    Returns
    -------
    DataFrame
        `KEYS`, ours with its 95 % interval low and high, n (images), detail (such as the noise level), guarantee (of a
        certificate), reported, difference (ours minus reported) with its interval difference_low and difference_high,
        verdict and remark (what speaks against the published number). The interval of a difference takes in that of
        the published number where the paper says of how many images it is.
    """
    layout = LAYOUTS[protocol.published.layout]
    names = protocol.published.names
    ours = layout.ours(protocol, folder)
    for key in ("dataset", "model", "method"):
        ours[key] = ours[key].map(lambda name: names.get(name, name))
    reported = layout.reported()
    table = ours.merge(reported, on=KEYS, how="left", validate="one_to_one")
    table["difference"] = table["ours"] - table["reported"]
    rows = [_judged(row, protocol) for row in table.itertuples()]
    return table.drop(columns="remark").join(pd.DataFrame(rows, index=table.index, columns=_JUDGED))


def write_reproduction(protocol: Protocol, folder: Path, failures: Mapping[str, str]) -> pd.DataFrame:
    """Write ``comparison.csv``, ``table.csv`` and ``reproduction.html`` beside a study, and return the comparison.

    Parameters
    ----------
    protocol : Protocol
    folder : Path
    failures : mapping of str to str
        Cells that failed, for the page.
    """
    table = compare_with_published(protocol, folder)
    printed = in_the_papers_layout(table)
    write_text_atomically(folder / "comparison.csv", table.to_csv(index=False, lineterminator="\n"))
    write_text_atomically(folder / "table.csv", printed.to_csv(lineterminator="\n"))
    cells, done = protocol.cells(), [cell for cell in protocol.cells() if (cell.folder(folder) / "cards").is_dir()]
    write_page(
        folder / "reproduction.html", "reproduction", protocol=protocol, printed=printed, failures=failures,
        verdicts=table["verdict"].value_counts(), remarks=table.loc[table["remark"].ne(""), [*KEYS, "remark"]],
        columns=LAYOUTS[protocol.published.layout].columns,
        cells=len(cells), done=len(done), synthetic=any(id.startswith("phantom/") for id in protocol.study.datasets),
    )  # fmt: skip
    return table


def in_the_papers_layout(table: pd.DataFrame) -> pd.DataFrame:
    """One row for a method, ours and the published one under it; columns as in the paper.

    Parameters
    ----------
    table : DataFrame
        From `compare_with_published`. Clean accuracy stands behind certified accuracy in parentheses, as papers print
        it; other measures have rows of their own. A guarantee that is not the standard one stands behind the method.
    """
    kinds = table.groupby(["dataset", "model", "method"], sort=False)["guarantee"].transform("max")
    special = ~kinds.isin(["", "standard", "composite"])
    table = table.assign(method=table["method"] + (", " + kinds).where(special, ""))
    if not set(table["measure"]) <= {"certified accuracy", "clean accuracy"}:
        table = table.assign(method=table["method"].where(table["method"] != "", table["measure"]))
    shown = []
    for source, nothing in (("ours", _NOTHING), ("reported", "")):
        text = [nothing if pd.isna(value) else short_number(value, 3) for value in table[source]]
        shown.append(table[["dataset", "model", "method", "column"]].assign(source=source, text=text))
    rows = ["dataset", "model", "method", "source"]
    order = list(dict.fromkeys(table["column"]))
    long = pd.concat(shown)
    joined = long.groupby([*rows, "column"], sort=False)["text"].agg(_with_parentheses).unstack("column")
    joined = joined.reindex(columns=order).fillna("")
    # A row of ours that nobody published has no second one under it.
    return joined[(joined != "").any(axis="columns") | (joined.index.get_level_values("source") == "ours")]


def _with_parentheses(texts: Iterable[str]) -> str:
    first, *others = texts
    return first + "".join(f" ({text})" for text in others if text not in ("", _NOTHING))


def _judged(row: NamedTuple, protocol: Protocol) -> dict[str, object]:
    """Verdict and interval of one number."""
    nothing = {"difference_low": np.nan, "difference_high": np.nan}
    if pd.isna(row.reported):
        return {**nothing, "verdict": "not published", "remark": ""}
    images, share = protocol.published.images, row.measure.endswith("accuracy")
    if images == 0:  # of the whole split, which is known where all of it was measured
        images = int(row.n) if row.n and protocol.study.n_images is None else None
    unstated = images is None or row.method in protocol.published.unstated
    averaged = row.measure == "accuracy" and row.column != CLEAN  # over severities, so that no image is counted
    remark = row.remark or (_impossible(row.reported, images) if share and not (unstated or averaged) else "")
    if pd.isna(row.ours):
        return {**nothing, "verdict": "not measured", "remark": remark}
    if unstated or pd.isna(row.low):
        return {**nothing, "verdict": NO_NUMBER if unstated else NO_INTERVAL, "remark": remark}
    # A ratio of errors of as many images is about as uncertain as ours.
    theirs = row.reported, row.reported - (row.ours - row.low), row.reported + (row.high - row.ours)
    if share:
        theirs = row.reported, *accuracy_interval(round(row.reported * images), images)
    low, high = difference_interval(theirs, (row.ours, row.low, row.high))
    verdict = AGREES if low <= 0 <= high else DIFFERS
    return {"difference_low": low, "difference_high": high, "verdict": verdict, "remark": remark}


def _impossible(share: float, images: int) -> str:
    """What is wrong with a printed share, if no number of so many images gives it."""
    decimals = len(repr(float(share)).partition(".")[2])
    if abs(share * images - round(share * images)) <= _HALF * 10.0**-decimals * images + 1e-9:
        return ""
    return f"no number of {images} images gives {100 * share:g} %"


def _finished(protocol: Protocol, folder: Path, kind: type[Cell], table: str) -> Iterable[tuple[Cell, pd.DataFrame]]:
    """Finished cells of one kind with one of their tables."""
    for cell in protocol.cells():
        path = cell.folder(folder) / "cards" / f"{cell.card_name}_{table}.csv"
        if isinstance(cell, kind) and path.is_file():
            found = pd.read_csv(path)
            (card,) = read_cards(cell.folder(folder), nested=False)
            counts = found["image"].value_counts() if "image" in found else pd.Series(1, range(card["dataset"]["n"]))
            whole = len(counts) == card["dataset"]["n"] and counts.nunique() == 1
            if not path.read_bytes().endswith(b"\n") or not whole:
                raise ValueError(
                    f"{path} is damaged; delete {cell.folder(folder)}, and the same command makes it again"
                )
            yield cell, found


def _times(cell: Cell, folder: Path) -> Mapping[str, float]:
    """What the clock said of a cell; nothing where it was not kept."""
    with contextlib.suppress(OSError, ValueError):
        times = read_json_object(cell.folder(folder) / TIMES, "times")
        return {name: float(seconds) for name, seconds in times.items()}
    return {}


def _frame(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    rows = [{"detail": "", "guarantee": ""} | row for row in rows]
    return pd.DataFrame(rows, columns=[*KEYS, *_OURS]).astype(dict.fromkeys(("ours", "low", "high"), float))


def _certified(protocol: Protocol, folder: Path) -> pd.DataFrame:
    """Envelope over noise levels, with the smoothed accuracy at the same level behind it, as the paper prints it."""
    found = list(_finished(protocol, folder, CertifyCell, CERTIFICATES))
    if not found:
        return _frame([])
    radii = sorted({0.0, *(radius for cell, _ in found for radius in cell.step.radii)})
    shown = {radius for cell, _ in found for radius in cell.step.radii}
    shares = pd.concat(metrics.certified_accuracy(rows, radii=radii) for _, rows in found)
    places = list(dict.fromkeys(shares[["dataset", "model", "method", "radius"]].itertuples(index=False, name=None)))
    shares = shares.set_index(["dataset", "model", "method", "radius"]).sort_index()
    best = metrics.certified_envelope(shares.reset_index()).set_index(shares.index.names)
    rows = []
    for key in places:
        *who, radius = key
        if radius not in shown:
            continue
        place = {"dataset": who[0], "model": who[1], "method": who[2], "column": f"{radius:g}"}
        if key not in best.index:
            reached = shares.loc[[key], "radius_reach"].max() >= radius
            detail = "not asked for" if reached else "beyond the reach of the draws"
            nothing = dict.fromkeys(("ours", "low", "high"), np.nan) | {"n": 0, "detail": detail}
            rows += [place | nothing | {"measure": measure} for measure in ("certified accuracy", "clean accuracy")]
            continue
        r = best.loc[key]
        place |= {"n": int(r["n"]), "detail": f"sigma {r['sigma']:g}", "guarantee": r["guarantee"]}
        share = {"ours": r["certified_accuracy"], "low": r["low"], "high": r["high"]}
        rows.append(place | share | {"measure": "certified accuracy"})
        if radius > 0 and not np.isnan(r["clean_accuracy"]):
            low, high = accuracy_interval(round(r["clean_accuracy"] * r["n"]), int(r["n"]))
            rows.append(place | {"measure": "clean accuracy", "ours": r["clean_accuracy"], "low": low, "high": high})
    return _frame(rows)


def _reported_certified() -> pd.DataFrame:
    tables = [load_published(f"promptsmooth_table{number}") for number in (2, 3)]
    measures = {"certified_accuracy": "certified accuracy", "clean_accuracy": "clean accuracy"}
    long = pd.concat(tables).rename(columns=measures)
    long["column"] = long["radius"].map("{:g}".format)
    return _melted(long, list(measures.values()))


def _reported_contexts() -> pd.DataFrame:
    table = load_published("promptsmooth_table4").rename(columns={"certified_accuracy": "certified accuracy"})
    table["method"], table["column"] = table["initial_context"], table["radius"].map("{:g}".format)
    return _melted(table, ["certified accuracy"])


def _melted(table: pd.DataFrame, measures: list[str]) -> pd.DataFrame:
    keys = [key for key in KEYS if key != "measure"]
    long = table.melt(keys, measures, var_name="measure", value_name="reported")
    return long.dropna(subset="reported").assign(remark="")


def _seconds(protocol: Protocol, folder: Path) -> pd.DataFrame:
    """Seconds of learning and of an image; every method has a step of its own."""
    rows = []
    for cell, table in _finished(protocol, folder, CertifyCell, CERTIFICATES):
        times = _times(cell, folder)
        spent = {"training": times.get("training", np.nan), "certification per sample": times.get("an_image", np.nan)}
        spent["total"] = sum(spent.values())
        for name, seconds in spent.items():
            place = {"dataset": ALL, "model": cell.model, "method": table["method"].iloc[-1], "column": name}
            about = {"measure": "seconds", "n": table["image"].nunique(), "detail": cell.variant}
            rows.append(place | about | {"ours": seconds, "low": np.nan, "high": np.nan})
    return _frame(rows)


def _reported_times() -> pd.DataFrame:
    table = load_published("promptsmooth_table5").rename(columns={"phase": "column", "seconds": "reported"})
    table = table.assign(dataset=ALL, model="PLIP", measure="seconds", remark="").dropna(subset="reported")
    return table[[*KEYS, "reported", "remark"]]


def _benchmarks(protocol: Protocol, folder: Path) -> pd.DataFrame:
    """Accuracies, and errors in percent of the reference's, clean and for each corruption; intervals over images."""
    rows, answers = [], {}
    for cell, table in _finished(protocol, folder, BenchmarkCell, ANSWERS):
        answers[cell.number, cell.dataset, cell.seed, cell.model] = cell, table
    for (number, dataset, seed, model), (cell, table) in answers.items():
        reference = cell.step.reference or protocol.study.narrowed(cell.step).models[0]
        base = answers.get((number, dataset, seed, reference))
        for place in _of_one(cell, table, None if base is None else base[1]):
            rows.append({"dataset": dataset, "model": model, "method": "", "n": table["image"].nunique(), **place})
    return _frame(rows)


def _of_one(cell: Cell, table: pd.DataFrame, base: pd.DataFrame | None) -> Iterable[dict[str, object]]:
    shares = correct_shares(table)
    columns = {name: shares[name] for name in shares} | {"mean": shares.drop(columns=CLEAN).mean(axis="columns")}
    for name, values in columns.items():
        low, high = metrics.classification.share_interval(values)
        detail = "nearly one answer" if metrics.is_constant_predictor(table["predicted"].to_numpy()) else ""
        accuracy = {"ours": float(values.mean()), "low": low, "high": high}
        yield {"column": name, "measure": "accuracy", "detail": detail, **accuracy}
    if base is None:
        return
    clean = [rows[rows["corruption"] == CLEAN] for rows in (table, base)]
    mine, theirs = right_answers(table), right_answers(base)
    pairs = {name: (mine[[place]], theirs[[place]]) for place, name in enumerate(shares.drop(columns=CLEAN))}
    pairs["mean"] = mine, theirs
    pairs[CLEAN] = tuple((rows["predicted"] == rows["label"]).to_numpy()[None, None] for rows in clean)
    for name, (right, reference) in pairs.items():
        wrong = [1 - answers.mean(axis=2) for answers in (right, reference)]
        value = float(metrics.mean_corruption_error(*wrong))
        draw = np.random.default_rng(cell.seed or 0)
        low, high = metrics.bootstrap_interval(metrics.mean_corruption_error, right, reference, rng=draw)
        measure = {"measure": "percent of the reference's error", "detail": ""}
        yield {"column": name, **measure, "ours": value, "low": low, "high": high}


def _reported_errors() -> pd.DataFrame:
    """Tables 2 and 3, with what does not fit and what a constant answer would print."""
    table = load_published("robustmedclip_table2_mce").rename(columns={"percent_of_clip": "reported"})
    table["column"] = table["corruption"].fillna("mean")
    accuracy = load_published("robustmedclip_table3_accuracy").rename(columns={"accuracy": "reported"})
    accuracy["column"] = accuracy["corruption"]
    average = load_published("robustmedclip_table3_average").rename(columns={"average_accuracy": "reported"})
    parts = [
        table.assign(measure="percent of the reference's error"),
        accuracy.assign(measure="accuracy"),
        average.assign(measure="accuracy", column="mean"),
    ]
    long = pd.concat(parts).assign(method="", remark="")
    constant = constant_predictors().set_index(["dataset", "model"])["class"]
    told = [constant.get((row.dataset, row.model), "") for row in long.itertuples()]
    long["remark"] = [f"the row is that of the constant answer {name!r}" if name else "" for name in told]
    return long[[*KEYS, "reported", "remark"]]


def _variants(protocol: Protocol, folder: Path) -> pd.DataFrame:
    """Few-shot variants: what a benchmark says of them, and what their training took."""
    kept = {(CLEAN, "accuracy"), ("mean", "accuracy")}
    kept |= {(name, "percent of the reference's error") for name in (CLEAN, "mean")}
    table = _benchmarks(protocol, folder)
    chosen = [pair in kept for pair in zip(table["column"], table["measure"], strict=True)]
    table = table[np.array(chosen, dtype=bool)]
    rows = []
    for cell, _ in _finished(protocol, folder, AdaptCell, "validation"):
        (card,) = read_cards(cell.folder(folder), nested=False)
        (trained,) = [one["value"] for one in card["metrics"] if one["name"] == "trained_parameters"]
        hours = _times(cell, folder).get("training", np.nan) / 3600
        for name, value in (("training", hours), ("trained parameters", trained / 1e6)):
            unit = "hours" if name == "training" else "millions"
            for dataset in table["dataset"].unique():
                place = {"dataset": dataset, "model": cell.step.name, "method": "", "column": name, "measure": unit}
                rows.append(place | {"ours": value, "low": np.nan, "high": np.nan, "n": 0, "detail": cell.step.method})
    return pd.concat([table, _frame(rows)], ignore_index=True) if rows else table


def _reported_variants() -> pd.DataFrame:
    table = load_published("robustmedclip_table6")
    table["model"] = table["variant"] + ", " + table["few_shot_fraction"].map("{:.0%}".format)
    table["trained"] = table["parameters_million"] * table["trainable_fraction"]
    percent = "percent of the reference's error"
    columns = {
        "clean_accuracy": (CLEAN, "accuracy"), "corrupted_accuracy": ("mean", "accuracy"),
        "clean_error_percent_of_clip": (CLEAN, percent), "mce_percent_of_clip": ("mean", percent),
        "training_hours": ("training", "hours"), "trained": ("trained parameters", "millions"),
    }  # fmt: skip
    parts = [
        table.assign(method="", column=column, measure=measure, reported=table[name], remark="")
        for name, (column, measure) in columns.items()
    ]
    long = pd.concat(parts)
    wrong = entries_that_do_not_fit().query("source == 'Table 6'")
    for row in wrong.itertuples():
        told = f"does not follow from the accuracy beside it, which gives {row.recomputed:.1f}"
        long.loc[(long["reported"] == row.printed) & (long["measure"] == percent), "remark"] = told
    return long[[*KEYS, "reported", "remark"]]


def _draws(protocol: Protocol, folder: Path) -> pd.DataFrame:
    """What fewer draws cost and leave: radii and certified shares relative to the most draws, seconds a question."""
    found = list(_finished(protocol, folder, QuestionsCell, CERTIFIED_ANSWERS))
    tables = [(cell.dataset, cell.model, cell, rows) for cell, rows in found]
    every: list[dict[str, object]] = []
    for model in dict.fromkeys(model for _, model, *_ in tables):
        own = [(cell, rows) for _, of, cell, rows in tables if of == model]
        every_set = {cell.dataset for cell, _ in own} == set(protocol.study.datasets)
        together = ALL if every_set else f"{len(own)} of {len(protocol.study.datasets)} sets"
        for dataset, group in [*((cell.dataset, [(cell, rows)]) for cell, rows in own), (together, own)]:
            table = by_draws(pd.concat(rows for _, rows in group).query("guarantee == 'composite'"))
            times = [_times(cell, folder) for cell, _ in group]
            answer = np.mean([kept["an_answer"] for kept in times if "an_answer" in kept] or [np.nan])
            for r in table.itertuples():
                place = {"dataset": dataset, "model": model, "method": "", "column": f"{r.n}", "n": r.questions}
                share, nothing = r.certified / r.questions, (np.nan, np.nan)
                values = {
                    "certified share": (share, *accuracy_interval(r.certified, r.questions)),
                    "mean radius": (r.mean_radius, *nothing),
                    "radius relative to the most draws": (r.radius_ratio, *nothing),
                    "certified share relative to the most draws": (r.certified_ratio, *nothing),
                    "seconds a question": (answer * (group[0][0].step.n0 + r.n), *nothing),
                }
                for measure, (value, low, high) in values.items():
                    about = {"measure": measure, "guarantee": "composite", "ours": value, "low": low, "high": high}
                    every.append(place | about)
    return _frame(every)


def _reported_draws() -> pd.DataFrame:
    table = load_published("smoothing_vlms_draws").rename(columns={"value": "reported"})
    table = table.assign(dataset=ALL, method="", column=table["n"].astype(str), remark="")
    return table[[*KEYS, "reported", "remark"]]


def _nothing_reported() -> pd.DataFrame:
    return pd.DataFrame(columns=[*KEYS, "reported", "remark"]).astype({"reported": float})


_RADII = (
    "Columns are L2 radii in [0, 1] pixel units; in parentheses stands the smoothed accuracy at the same noise level."
)
_ERRORS = "Accuracies are means over severities; errors are in percent of the reference's, so 100 is as good as it is."
LAYOUTS: Mapping[str, Layout] = {
    "certified accuracy": Layout(_certified, _reported_certified, _RADII),
    "initial contexts": Layout(_certified, _reported_contexts, _RADII),
    "certified accuracy, not published": Layout(_certified, _nothing_reported, _RADII),
    "times": Layout(_seconds, _reported_times, "Seconds."),
    "corruption errors": Layout(_benchmarks, _reported_errors, _ERRORS),
    "corruption errors, not published": Layout(_benchmarks, _nothing_reported, _ERRORS),
    "few-shot variants": Layout(_variants, _reported_variants, _ERRORS),
    "numbers of draws": Layout(_draws, _reported_draws, "Columns are numbers of draws; abstentions have radius 0."),
}
