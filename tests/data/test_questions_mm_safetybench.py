import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medrobust_lib.data import questions
from medrobust_lib.data.questions import (
    IMAGE_TYPES,
    SCENARIOS,
    list_scenarios,
    load_questions,
    parse_scenario,
    read_scenario,
)

ILLEGAL, FRAUD = "01-Illegal_Activitiy", "06-Fraud"
QUESTIONS = 12
GRAY = {"SD": 40, "TYPO": 120, "SD_TYPO": 200}


def entry(number):
    return {
        "Question": f"made-up question {number}",
        "Changed Question": f"made-up changed question {number}",
        "Key Phrase": f"made-up phrase {number}",
        "Rephrased Question": f"made-up question {number} about the bottom of the image",
        "Rephrased Question(SD)": f"made-up question {number} about the picture",
    }


@pytest.fixture
def root(tmp_path):
    """Two scenarios in the authors' layout; the numbers are written out of order."""
    for scenario in (ILLEGAL, FRAUD):
        write_questions(tmp_path, scenario, {str(number): entry(number) for number in reversed(range(QUESTIONS))})
        for image_type, gray in GRAY.items():
            folder = tmp_path / "mm-safetybench/imgs" / scenario / image_type
            folder.mkdir(parents=True)
            for number in range(QUESTIONS):
                pixels = np.full((8 + number, 16, 3), gray + number, np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=100)
    return tmp_path


def write_questions(root, scenario, content):
    path = root / "mm-safetybench/processed_questions" / f"{scenario}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def image_path(root, number, image_type="SD", scenario=ILLEGAL):
    return root / "mm-safetybench/imgs" / scenario / image_type / f"{number}.jpg"


def test_scenarios_are_the_published_ones():
    assert [scenario[:2] for scenario in SCENARIOS] == [f"{number:02}" for number in range(1, 14)]
    assert sum(SCENARIOS.values()) == 1680
    assert sum(SCENARIOS.values()) * len(IMAGE_TYPES) == 5040
    assert next(iter(SCENARIOS)) == "01-Illegal_Activitiy"  # the authors' spelling


@pytest.mark.parametrize(
    ("scenario", "numerator", "rate"),
    [
        # Attack rates in per cent as papers report them: each must be a whole number of questions.
        ("08-Political_Lobbying", 134, 87.58),
        ("08-Political_Lobbying", 151, 98.69),
        ("09-Privacy_Violence", 46, 33.09),
        ("09-Privacy_Violence", 129, 92.81),
        ("10-Legal_Opinion", 121, 93.08),
        ("07-Sex", 79, 72.48),
        ("06-Fraud", 21, 13.64),
        ("05-EconomicHarm", 92, 75.41),
    ],
)
def test_counts_reproduce_published_rates(scenario, numerator, rate):
    assert round(100 * numerator / SCENARIOS[scenario], 2) == rate


@pytest.mark.parametrize(
    ("suffix", "image_type", "question"),
    [
        ("", "SD", "made-up question 3 about the picture"),
        ("-SD", "SD", "made-up question 3 about the picture"),
        ("-TYPO", "TYPO", "made-up question 3 about the bottom of the image"),
        ("-SD_TYPO", "SD_TYPO", "made-up question 3 about the bottom of the image"),
    ],
)
def test_each_image_type_gets_its_own_question_and_image(root, suffix, image_type, question):
    found = read_scenario(f"mm-safetybench/06{suffix}", root=root)
    assert (found.questions[3], found.indices[3]) == (question, 3)
    assert found.images[3].shape == (11, 16, 3) and found.images[3].dtype == np.uint8
    assert (found.images[3] == GRAY[image_type] + 3).all()


def test_whole_scenario_comes_in_the_order_of_the_numbers(root):
    found = read_scenario("mm-safetybench/01", root=root)
    assert found.indices.tolist() == list(range(QUESTIONS))
    # 10 after 9, not after 1
    assert list(found.questions) == [f"made-up question {number} about the picture" for number in range(QUESTIONS)]


def test_index_is_the_position_where_numbers_are_left_out(root):
    write_questions(root, ILLEGAL, {number: entry(number) for number in ("11", "2", "5")})
    found = read_scenario("mm-safetybench/01", root=root)
    assert found.indices.tolist() == [0, 1, 2]
    assert [image.shape[0] for image in found.images] == [10, 13, 19]


def test_what_only_an_auditor_needs_may_be_absent(root):
    write_questions(root, ILLEGAL, {"0": {"Rephrased Question(SD)": "made-up question 0"}})
    assert read_scenario("mm-safetybench/01", root=root).questions == ("made-up question 0",)


def test_subset_is_seeded_ascending_nested_and_the_same_for_every_type(root):
    def drawn(n, seed, id="mm-safetybench/01"):
        return read_scenario(id, n=n, seed=seed, root=root).indices.tolist()

    first = drawn(5, 0)
    assert len(set(first)) == 5 and first == sorted(first)
    assert drawn(5, 0) == drawn(5, 0, "mm-safetybench/01-SD_TYPO") == first
    assert set(first) < set(drawn(8, 0))
    assert len({tuple(drawn(5, seed)) for seed in range(4)}) > 1
    assert drawn(QUESTIONS, 3) == list(range(QUESTIONS))


def test_only_the_drawn_images_are_decoded(root, monkeypatch):
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **how: opened.append(Path(path).name) or original(path, **how))
    drawn = read_scenario("mm-safetybench/01-TYPO", n=4, seed=1, root=root).indices.tolist()
    assert list(dict.fromkeys(opened)) == [f"{index}.jpg" for index in drawn]
    for number in set(range(QUESTIONS)) - set(drawn):
        image_path(root, number, "TYPO").unlink()
    assert len(read_scenario("mm-safetybench/01-TYPO", n=4, seed=1, root=root)) == 4


def test_root_is_the_default_data_root(root, monkeypatch):
    monkeypatch.setenv("MEDROBUST_DATA", str(root))
    assert len(read_scenario("mm-safetybench/01", n=2)) == 2
    assert list_scenarios()["available"].sum() == 6


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("mm-safetybench/14", "unknown scenario '14' in 'mm-safetybench/14'; write mm-safetybench/NN"),
        ("mm-safetybench/14", "Choose one of: 01-Illegal_Activitiy, 02-HateSpeech, 03-Malware_Generation"),
        ("mm-safetybench/", "unknown scenario ''"),
        ("mm-safetybench/Fraud", "Did you mean '06-Fraud'?"),
        ("mm-safetybench/1", "Did you mean '01-Illegal_Activitiy' or '10-Legal_Opinion'"),
        ("mm-safetybench/01-SDTYPO", "unknown image type 'SDTYPO' in 'mm-safetybench/01-SDTYPO'"),
        ("mm-safetybench/01-SDTYPO", "Did you mean 'SD_TYPO' or 'TYPO'"),
        ("mm-safetybench/01-sd", "Did you mean 'SD'?"),
        ("mm-safetybench/01-", "Choose one of: SD, TYPO, SD_TYPO."),
        ("mm-safetybench/06-Fraud", "write mm-safetybench/06 for SD images, or mm-safetybench/06-TYPE."),
    ],
)
def test_unknown_ids_are_answered_with_the_valid_ones(tmp_path, id, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_scenario(id, root=tmp_path)


def test_every_listed_id_is_understood(tmp_path):
    table = list_scenarios(root=tmp_path)
    assert len(table) == 39 and table["id"].is_unique
    for row in table.itertuples(index=False):
        assert parse_scenario(row.id) == (row.scenario, row[2])


def test_absent_set_names_folder_and_command(root):
    command = f"python data_scripts/download_mm_safetybench.py --root {root}"
    with pytest.raises(FileNotFoundError) as error:
        read_scenario("mm-safetybench/02", root=root)
    assert f"looked at {root}/mm-safetybench/processed_questions/02-HateSpeech.json" in str(error.value)
    assert command in str(error.value) and "MEDROBUST_DATA" in str(error.value)
    write_questions(root, "02-HateSpeech", {"0": entry(0)})
    with pytest.raises(FileNotFoundError) as error:
        read_scenario("mm-safetybench/02-TYPO", root=root)
    assert f"looked at {root}/mm-safetybench/imgs/02-HateSpeech/TYPO" in str(error.value)
    assert command in str(error.value)
    assert Path(questions.MM_COMMAND.split()[1]).name == "download_mm_safetybench.py"
    assert (Path(__file__).parents[2] / questions.MM_COMMAND.split()[1]).is_file()


@pytest.mark.parametrize("suffix", ["", "-TYPO", "-SD_TYPO"])
def test_question_file_without_the_field_of_the_image_type(root, suffix):
    field = "Rephrased Question" if suffix else "Rephrased Question(SD)"
    entries = {str(number): entry(number) for number in range(QUESTIONS)}
    del entries["7"][field]
    path = write_questions(root, ILLEGAL, entries)
    with pytest.raises(ValueError, match=re.escape(f"{path}: question 7 has no {field!r}")) as error:
        read_scenario(f"mm-safetybench/01{suffix}", n=1, root=root)
    assert "it has: Question, Changed Question, Key Phrase" in str(error.value)
    other = "" if suffix else "-TYPO"
    assert len(read_scenario(f"mm-safetybench/01{other}", root=root)) == QUESTIONS


@pytest.mark.parametrize("value", ["  ", None, 3])
def test_an_empty_question_is_none(root, value):
    write_questions(root, ILLEGAL, {"0": entry(0) | {"Rephrased Question(SD)": value}})
    with pytest.raises(ValueError, match="question 0 has no"):
        read_scenario("mm-safetybench/01", root=root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html>", "is not a JSON file"),
        ({}, "does not hold questions by id"),
        ([entry(0)], "does not hold questions by id"),
        ({"0": "made-up question 0"}, "does not hold questions by id"),
        ({"0": entry(0), "first": entry(1)}, "question id 'first' is not a number"),
    ],
)
def test_broken_question_file_is_named(root, content, message):
    path = write_questions(root, ILLEGAL, content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}") as error:
        read_scenario("mm-safetybench/01", root=root)
    assert questions.MM_COMMAND in str(error.value)


def test_missing_and_corrupt_images_are_named(root):
    path = image_path(root, 4)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a readable image")):
        read_scenario("mm-safetybench/01", root=root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"no image file at {path}")) as error:
        read_scenario("mm-safetybench/01", root=root)
    assert f"{questions.MM_COMMAND} --root {root} --overwrite" in str(error.value)


def test_n_and_seed_outside_the_scenario(root):
    for n in (0, QUESTIONS + 1):
        with pytest.raises(ValueError, match=f"n={n} is no whole number from 1 to 12"):
            read_scenario("mm-safetybench/01", n=n, root=root)
    with pytest.raises(ValueError, match="seed=-1"):
        read_scenario("mm-safetybench/01", n=2, seed=-1, root=root)
    with pytest.raises(ValueError, match="n=2.5 is no whole number"):
        read_scenario("mm-safetybench/01", n=2.5, root=root)


def test_list_scenarios_says_what_is_here(root):
    image_path(root, 2, "TYPO").unlink()
    table = list_scenarios(root=root).set_index("id")
    assert list(table.columns) == ["scenario", "image type", "questions", "images", "available"]
    assert table["questions"].sum() == 5040
    assert table.loc["mm-safetybench/01-SD"].tolist() == [ILLEGAL, "SD", 97, 12, True]
    assert table.loc["mm-safetybench/01-TYPO"].tolist() == [ILLEGAL, "TYPO", 97, 11, False]
    assert table.loc["mm-safetybench/02-SD"].tolist() == ["02-HateSpeech", "SD", 163, 0, False]
    assert table["available"].sum() == 5


def test_load_questions_gives_a_question_set(root):
    questions = load_questions("mm-safetybench/01", n=5, seed=2, root=root)
    assert (questions.id, questions.task, questions.labels) == (
        "mm-safetybench/01-SD", "jailbreak", ("refusal", "compliance"),
    )  # fmt: skip
    assert questions.indices.dtype == np.int64 and len(questions) == 5
    assert questions.truths == (None,) * 5 and questions.chance is None
    assert questions.licence == "CC BY-NC 4.0, research only"
    assert questions.provenance["source"] == "https://github.com/isXinLiu/MM-SafetyBench"
    assert not questions.synthetic
    typed = load_questions("mm-safetybench/01-SD_TYPO", task="anything", root=root)
    assert len(typed) == QUESTIONS and typed.questions[0].endswith("bottom of the image")
