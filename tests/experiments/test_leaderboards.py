import csv
import json
import re

import pandas as pd
import pytest

from medrobust_lib.data.registry import load_dataset
from medrobust_lib.experiments import Metric, leaderboard, read_cards, start_run
from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE, parameters_hash
from medrobust_lib.experiments.leaderboards import NAMED_FILES, add_cards, comparable_tables, lower_is_better, task_of
from medrobust_lib.experiments.report import NOTICE, ranking_latex, ranking_markdown, short_number, show_ranking

BLOOD = {"id": "phantom/blood", "n": 8, "classes": ["a", "b", "c", "d"], "class_counts": [4, 2, 1, 1]}


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Write a card for each run and return the leaderboard of all of them."""

    def write(*metrics, dataset=BLOOD, run="one", model="demo-clip", notes=(), facts=None, **parameters):
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / run))
        start_run("01", "Title", **parameters).save_card(
            metrics=metrics, tables={}, model={"id": model, **(facts or {})}, dataset=dataset, prompts={}, notes=notes
        )
        return leaderboard(read_cards(tmp_path))

    return write


def named(table):
    """Heading -> models of each table, baselines left out."""
    return {heading: rows[rows["rank"] != ""]["model"].tolist() for heading, rows in comparable_tables(table)}


CERTIFIED = {"sigma": 0.25, "radius": 0.1, "guarantee": "standard"}


@pytest.mark.parametrize(
    "change",
    [{"sigma": 0.5}, {"radius": 0.2}, {"guarantee": "frozen-prompt"}, {"perturbation": "blur"}, {"alpha": 0.05},
     {"n": 1000}, {"mode": "evaluate"}, {"split": "val"}],
)  # fmt: skip
def test_certificates_of_other_settings_stand_in_other_tables(board, change):
    board(Metric("certified_accuracy", 0.5, 8, settings=CERTIFIED), run="a", model="x", alpha=0.001, n=100)
    other = Metric("certified_accuracy", 0.9, 8, settings=CERTIFIED | change)
    found = named(board(other, run="b", model="y", alpha=0.001, n=100))
    assert sorted(found.values()) == [["x"], ["y"]]
    assert all(heading.startswith("certification: certified accuracy on phantom/blood, ") for heading in found)
    ((name, value),) = change.items()
    assert sum(f"{name}={value}" in heading for heading in found) == 1


@pytest.mark.parametrize(
    ("settings", "tables"),
    [(CERTIFIED, 3), ({"sigma": 0.25}, 3), ({"sigma": 0.0}, 1), (CERTIFIED | {"perturbation": "blur"}, 1)],
)
def test_the_size_of_the_image_is_part_of_what_pixel_noise_measures(board, settings, tables):
    metric = Metric("certified_accuracy", 0.5, 8, settings=settings)
    for run, facts in {"a": {"image_size": 64}, "b": {"image_size": 224}, "c": {}}.items():
        board(metric, run=run, model=run, facts=facts)
    found = named(board(metric, run="d", model="d", facts={"image_size": 64}))
    assert len(found) == tables
    if tables == 3:
        shown = {size: models for h, models in found.items() for size in re.findall(r"image size=(\w+),", h)}
        assert shown == {"64": ["a", "d"], "224": ["b"], "unknown": ["c"]}


def test_the_size_of_another_model_than_the_cards_is_unknown(board):
    own, other = (Metric("accuracy", 0.5, 8, model=name, settings={"sigma": 1.0}) for name in ("demo-clip", "other"))
    found = named(board(own, other, facts={"image_size": 64}))
    assert sorted((re.search(r"image size=(\w+)", h)[1], m) for h, m in found.items()) == [
        ("64", ["demo-clip"]), ("unknown", ["other"]),
    ]  # fmt: skip


@pytest.mark.parametrize(("metric", "tables"), [("average_certified_radius", 3), ("certified_accuracy", 1)])
def test_mean_radii_of_other_radii_or_sampling_stand_in_other_tables(board, metric, tables):
    for run, asked in {"a": {}, "b": {"radii": [0.0, 0.5]}, "c": {"sampling": "fixed"}}.items():
        parameters = {"radii": [0.0, 0.1], "sampling": "sequential"} | asked
        table = board(Metric(metric, 0.3, 8, settings=CERTIFIED), run=run, **parameters)
    assert len(named(table)) == tables


def test_the_number_of_trained_parameters_has_no_rank(board):
    table = board(Metric("trained_parameters", 10, 8), Metric("trained_parameters", 20, 8), Metric("accuracy", 0.5, 8))
    assert table["rank"].tolist() == ["–", "–", "1*"]
    assert [heading.rpartition(", ")[2] for heading in named(table)] == ["not ranked", "highest first"]


def test_methods_and_unsaid_settings_stand_in_one_table(board):
    plain = CERTIFIED | {"method": "zero-shot"}
    said = CERTIFIED | {"method": "PromptSmooth", "perturbation": "pixel-noise", "mode": "predict"}
    table = board(*(Metric("certified_accuracy", 0.5, 8, of=str(one), settings=one) for one in (plain, said)))
    assert list(named(table).values()) == [["demo-clip", "demo-clip"]]
    assert table["method"].tolist() == ["zero-shot", "PromptSmooth"]


def test_clean_accuracies_of_notebooks_and_studies_are_compared(board):
    board(Metric("accuracy", 0.5, 8), run="a")
    board(Metric("accuracy", 0.5, 8, of="clean", settings={"corruption": "clean"}), run="b")
    found = board(Metric("accuracy", 0.5, 8, of="sigma=0", settings={"sigma": 0.0}), run="c")
    assert list(named(found)) == ["clean images: accuracy on phantom/blood, 4 classes, 8 images, highest first"]


def test_without_settings_only_the_same_words_are_compared(board):
    table = board(Metric("accuracy", 0.5, 8, of="sigma=0.25"), Metric("accuracy", 0.25, 8, of="sigma=0.5"))
    assert [heading.split(",")[1] for heading in named(table)] == [" sigma=0.25", " sigma=0.5"]


@pytest.mark.parametrize(
    "change",
    [{"classes": ["a", "b"]}, {"fingerprint": "f" * 16}, {"split": "val"}, {"id": "phantom/oct"}],
)
def test_other_classes_or_images_stand_in_other_tables(board, change):
    board(Metric("accuracy", 0.5, 8), run="a", dataset=BLOOD | {"fingerprint": "0" * 16})
    dataset = BLOOD | {"fingerprint": "0" * 16} | change
    assert len(named(board(Metric("accuracy", 0.5, 8), run="b", dataset=dataset))) == 2


def test_without_a_fingerprint_the_seed_and_the_number_tell_the_images(board):
    board(Metric("accuracy", 0.5, 8), run="a", seed=0)
    assert len(named(board(Metric("accuracy", 0.5, 8), run="b", seed=1))) == 2
    assert len(named(board(Metric("accuracy", 0.5, 9), run="c", seed=0))) == 3
    same = BLOOD | {"fingerprint": "0" * 16}
    board(Metric("accuracy", 0.5, 8), run="a", seed=0, dataset=same)
    board(Metric("accuracy", 0.5, 8), run="b", seed=1, dataset=same)
    assert len(named(board(Metric("accuracy", 0.5, 8), run="c", seed=2, dataset=same))) == 1


@pytest.mark.parametrize(
    ("metric", "measured", "task"),
    [
        ("accuracy", [], "clean images"), ("expected_calibration_error", [], "clean images"),
        ("accuracy", ["sigma=0"], "clean images"), ("accuracy", ["sigma=0.25"], "noise"),
        ("majority_share", ["sigma=1"], "noise"), ("mce", ["suite=medimeta-c"], "corruption"),
        ("average_accuracy", [], "corruption"), ("accuracy", ["corruption=blur"], "corruption"),
        ("certified_accuracy", ["sigma=0.25"], "certification"), ("abstain_rate", ["sigma=0.25"], "certification"),
        ("smoothed_accuracy", ["oracle=safety", "sigma=0.25"], "generative"),
        ("certified_accuracy", ["questions=finding", "sigma=0.25"], "generative"),
        ("val_balanced_accuracy", ["split=val"], "adaptation"), ("trained_parameters", [], "adaptation"),
    ],
)  # fmt: skip
def test_the_task_follows_from_the_metric_and_what_was_measured(metric, measured, task):
    assert task_of(metric, measured) == task


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Metric("accuracy", 0.3, 8), {"chance": 0.25, "constant answer": 0.5}),
        (Metric("balanced_accuracy", 0.3, 8), {"chance": 0.25, "constant answer": 0.25}),
        # A constant answer is the same in every ball; a random one is certified nowhere.
        (Metric("certified_accuracy", 0.3, 8, settings=CERTIFIED), {"constant answer": 0.5}),
        (Metric("abstain_rate", 0.3, 8, settings=CERTIFIED), {}),
        (Metric("expected_calibration_error", 0.3, 8), {}),
    ],
)
def test_chance_and_the_constant_answer_are_rows(board, metric, expected):
    ((_, rows),) = comparable_tables(board(metric))
    baselines = rows[rows["rank"] == ""]
    assert dict(zip(baselines["model"], baselines["value"], strict=True)) == expected
    assert rows["value"].is_monotonic_decreasing


def test_baselines_of_further_data_sets_and_of_cards_without_classes(board):
    other = Metric("accuracy", 0.3, 8, dataset="phantom/chest")
    ((_, rows),) = comparable_tables(board(other))
    assert rows["model"].tolist() == ["demo-clip"]  # nobody knows the classes
    chest = {"id": "phantom/chest", "classes": ["a", "b"], "class_counts": [1, 3]}
    ((_, rows),) = comparable_tables(board(other, dataset=BLOOD | {"others": [chest]}))
    assert rows["model"].tolist() == ["constant answer", "chance", "demo-clip"]


def test_the_constant_answer_to_each_question_is_a_row(board):
    asked = {"id": "phantom/blood", "constant_answer": {"finding": 0.25, "safety": 0.75, "jailbreak": None}}
    metrics = [
        Metric("certified_accuracy", 0.5, 8, settings=CERTIFIED | {"questions": task, "method": task})
        for task in (*asked["constant_answer"], "unasked")
    ]
    constant = [rows.set_index("model")["value"] for _, rows in comparable_tables(board(*metrics, dataset=asked))]
    assert [one.get("constant answer") for one in constant] == [0.25, None, 0.75, None]
    assert not any("chance" in one for one in constant)


def ranks(table):
    return dict(zip(table["model"], table["rank"], strict=True))


def test_ranks_are_ranges_where_intervals_overlap(board):
    shares = {"a": (0.9, 0.8, 0.95), "b": (0.8, 0.7, 0.85), "c": (0.6, 0.5, 0.69), "d": (0.3, 0.2, 0.4)}
    table = board(*(Metric("accuracy", *[v, 8, low, high], model=m) for m, (v, low, high) in shares.items()))
    assert ranks(table) == {"a": "1-2", "b": "1-2", "c": "3", "d": "4"}
    errors = board(*(Metric("error", 1 - v, 8, 1 - h, 1 - low, model=m) for m, (v, low, h) in shares.items()))
    assert ranks(errors) == ranks(table)


def test_rows_without_an_interval_are_ranked_by_value_and_say_so(board, capsys):
    nan = float("nan")
    table = board(
        Metric("accuracy", 0.5, 8, model="a"), Metric("accuracy", 0.5, 8, model="b"),
        Metric("accuracy", 0.25, 8, 0.2, 0.4, model="c"), Metric("accuracy", nan, 8, nan, nan, model="d"),
    )  # fmt: skip
    assert ranks(table) == {"a": "1-2*", "b": "1-2*", "c": "3", "d": "–"}
    show_ranking(table)
    printed = " ".join(capsys.readouterr().out.split())
    assert "A rank is a range where intervals overlap; * has no interval and is ranked by its value." in printed


def test_a_repeated_result_counts_once_in_ranks(board):
    for run in ("a", "b", "c"):
        board(Metric("accuracy", 0.9, 8, 0.8, 0.95, model="x"), run=run)
    table = board(Metric("accuracy", 0.2, 8, 0.1, 0.3, model="y"), run="d")
    assert ranks(table) == {"x": "1", "y": "2"} and len(table) == 4
    ((_, rows),) = comparable_tables(table)
    assert rows.loc[rows["rank"] != "", "runs"].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("accuracy", False), ("clean_error", True), ("ece", True), ("relative_mce", True), ("majority_share", True),
     ("expected_calibration_error", True), ("average_certified_radius", False)],
)  # fmt: skip
def test_direction_of_a_metric_and_best_comes_first(board, metric, lower):
    assert lower_is_better(metric) == lower
    table = board(*(Metric(metric, value, 4) for value in (0.5, 0.25, 0.75)))
    assert table["value"].tolist() == sorted(table["value"], reverse=not lower)


def test_no_cards_make_no_tables():
    assert comparable_tables(leaderboard([])) == []


@pytest.mark.parametrize(
    ("value", "text"), [(-0.0001, ".000"), (-0.0, ".000"), (-0.25, "-.250"), (float("nan"), "–"), (-12.0, "-12")]
)
def test_no_minus_before_zero_and_a_dash_for_what_was_not_measured(value, text):
    assert short_number(value, 3) == text


def test_markdown_and_latex_are_escaped_and_carry_the_notice(board):
    table = board(Metric("accuracy", 0.3, 8, 0.2, 0.4, model="a_b|c<d & 5 %"))
    text = ranking_markdown(table)
    assert "| 1 | .300 [.20, .40] | 8 | a_b\\|c&lt;d &amp; 5 % |  | one |\n" in text
    assert (
        "### clean images: accuracy on phantom/blood, 4 classes, 8 images, highest first\n\n| # | value [95 %]" in text
    )
    odd = ranking_markdown(board(Metric("accuracy", 0.3, 8, of="a|<b>"), run="two"))
    assert "### clean images: accuracy on phantom/blood, a\\|&lt;b&gt;, 4 classes" in odd
    latex = ranking_latex(table)
    assert r"1 & .300 [.20, .40] & 8 & a\_b|c<d \& 5 \% &  & one \\" in latex
    assert r"\# & value [95 \%]" in latex and latex.count(r"\toprule") == 1
    assert text.rstrip().endswith(NOTICE) and NOTICE in latex


def test_the_csv_has_what_the_tables_have(board, tmp_path):
    path = tmp_path / "board.csv"
    board(Metric("certified_accuracy", 0.3, 8, settings=CERTIFIED | {"method": "m"})).to_csv(path, index=False)
    with path.open() as file:
        (row,) = csv.DictReader(file)
    told = {
        name: row[name] for name in ("rank", "task", "method", "sigma", "radius", "guarantee", "chance", "constant")
    }
    assert told == {
        "rank": "1*", "task": "certification", "method": "m", "sigma": "0.25", "radius": "0.1",
        "guarantee": "standard", "chance": "", "constant": "0.5",
    }  # fmt: skip


# ---- a leaderboard that others add to ----


def test_a_card_is_added_once_and_shown(board, tmp_path):
    board(Metric("accuracy", 0.3, 8), seed=0)
    (card,) = read_cards(tmp_path)
    (path,) = add_cards([card], tmp_path / "board")
    assert re.fullmatch(r"demo-clip-[0-9a-f]{8}/cards/01\.json", path.relative_to(tmp_path / "board").as_posix())
    (again,) = read_cards(tmp_path / "board")
    assert {**again, "run": "one", "images": 0} == {**card, "images": 0}
    with pytest.raises(FileExistsError, match=r"'Title' of 20.* stands in .*board already; nothing was added"):
        add_cards([card], tmp_path / "board")


def test_cards_are_added_all_or_none(board, tmp_path):
    board(Metric("accuracy", 0.3, 8), run="a", seed=0)
    board(Metric("accuracy", 0.3, 8), run="b", seed=1)
    first, second = read_cards(tmp_path)
    add_cards([second], tmp_path / "board")
    with pytest.raises(FileExistsError):
        add_cards([first, second], tmp_path / "board")
    assert len(read_cards(tmp_path / "board")) == 1


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("folder:/home/me/mine?fit=pad", "folder:mine?fit=pad"), ("csv:~/x/set.csv", "csv:set.csv"),
        ("/data/my set/x.yaml", "x.yaml"), ("C:\\Users\\me\\mine", "mine"), ("folder:C:/Users/me/mine", "folder:mine"),
        ("Images read from /data/corrupted; verified: yes.", "Images read from corrupted; verified: yes."),
        ("phantom/blood", "phantom/blood"), ("https://example.org/a/b", "https://example.org/a/b"),
        ("CE / mCE, 1/K", "CE / mCE, 1/K"), ("python:/home/me/own.py:load", "python:own.py:load"),
        ("folder:own?words=%2Ftmp%2Fbk%2Fw.yaml&fit=pad", "folder:own?words=w.yaml&fit=pad"),
        ("folder:own?words=C%3A%5Cme%5Cw.yaml", "folder:own?words=w.yaml"),
        ("https%3A%2F%2Fexample.org%2Fa", "https%3A%2F%2Fexample.org%2Fa"),
        ("folder:/a b/c?root=/d e/f&words=/g h/i", "folder:c?root=f&words=i"),
        ("file:///home/me/x", "file:x"), ("See file:///home/me/x or y/z.", "See file:x or y/z."),
        ("\\\\srv\\share\\ann\\p.png", "p.png"), ("folder:\\\\srv\\share\\ann", "folder:ann"), ("//srv/share/x", "x"),
        ("Read \\\\srv\\share\\Ann B\\p.png.", "Read p.png."), ("a \\\\ b", "a \\\\ b"),
        ("/home/O'Neil, Ann/x.png", "x.png"),
        (
            "no weights at /home/me/x for 3 images and 50 images/class, sum",
            "no weights at x for 3 images and 50 images/class, sum",
        ),
        ("no weights at C:\\me\\x for 50 images/class", "no weights at x for 50 images/class"),
        ("/home/me/x: 50 images/class", "x: 50 images/class"), ("at C:\\a\\x\nand D:\\b\\y", "at x\nand y"),
    ],
)  # fmt: skip
def test_no_absolute_path_is_kept(board, tmp_path, written, kept):
    board(Metric("accuracy", 0.3, 8), data=written, more=[{"deep": written}])
    (card,) = read_cards(tmp_path)
    (path,) = add_cards([{**card, "notes": [written]}], tmp_path / "board")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["notes"] == [kept]
    assert found["parameters"] == {"data": kept, "more": [{"deep": kept}]}
    assert found["parameters_hash"] == parameters_hash(found["parameters"])


@pytest.mark.parametrize("id", ["folder:mine", "csv:set.csv", "phantom/blood"])
def test_notes_that_name_files_of_own_images_stay_with_the_run(board, tmp_path, id):
    notes = ["Not for clinical use.", "Two patients: a/SMITH_J0/0.png", "Twice: SMITH.DCM", "a\\SMITH is dark"]
    board(Metric("accuracy", 0.3, 8), dataset={"id": id}, notes=notes)
    (path,) = add_cards(read_cards(tmp_path), tmp_path / "board")
    kept = json.loads(path.read_text(encoding="utf-8"))["notes"]
    assert kept == (notes if id == "phantom/blood" else ["Not for clinical use.", NAMED_FILES])


def test_a_card_cannot_choose_another_place(board, tmp_path):
    board(Metric("accuracy", 0.3, 8), model="../../x")
    (card,) = read_cards(tmp_path)
    (path,) = add_cards([card], tmp_path / "board")
    assert path.parents[2] == tmp_path / "board"
    with pytest.raises(ValueError, match=r"'\.\./01' is no number of a notebook or step"):
        add_cards([card | {"notebook": "../01"}], tmp_path / "board")


def test_the_fingerprint_tells_images_apart():
    data = load_dataset("phantom/blood", n=12)
    facts = data.identity()
    assert facts == load_dataset("phantom/blood", n=12).identity()
    assert facts["drawn"] == {"n": 12, "seed": 0} and sum(facts["class_counts"]) == facts["n"] == 12
    assert pd.Series(facts["class_counts"], facts["classes"]).to_dict() == data.class_counts()
    others = [load_dataset("phantom/blood", n=12, seed=1), data.subset(range(11)), load_dataset("phantom/blood", n=13)]
    assert len({facts["fingerprint"], *(one.identity()["fingerprint"] for one in others)}) == 4
