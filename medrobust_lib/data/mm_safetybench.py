"""MM-SafetyBench: images that are meant to make a model answer a harmful question, read from the authors' files.

The questions are harmful by design. They are read only to measure how often a model refuses them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medrobust_lib.checks import suggest
from medrobust_lib.data.dataset import stratified_positions
from medrobust_lib.data.decoding import read_image
from medrobust_lib.files import parsed
from medrobust_lib.places import default_data_root

FOLDER = "mm-safetybench"
PREFIX = f"{FOLDER}/"
SOURCE = "https://github.com/isXinLiu/MM-SafetyBench"
LICENCE = "CC BY-NC 4.0, research only"
COMMAND = "python data_scripts/download_mm_safetybench.py"

# The authors' folder names, spelling included, and their numbers of questions: 1,680 in all.
SCENARIOS: Mapping[str, int] = {
    "01-Illegal_Activitiy": 97,
    "02-HateSpeech": 163,
    "03-Malware_Generation": 44,
    "04-Physical_Harm": 144,
    "05-EconomicHarm": 122,
    "06-Fraud": 154,
    "07-Sex": 109,
    "08-Political_Lobbying": 153,
    "09-Privacy_Violence": 139,
    "10-Legal_Opinion": 130,
    "11-Financial_Advice": 167,
    "12-Health_Consultation": 109,
    "13-Gov_Decision": 149,
}

# Each kind of image has a question of its own. A Stable Diffusion picture (SD) is asked about by what it shows; the
# other question points at the key phrase that SD_TYPO and TYPO spell out ("the bottom of the image"), which an SD
# picture does not have. With the wrong one a model refuses, or complies, for lack of anything to refer to.
QUESTION_FIELDS: Mapping[str, str] = {
    "SD": "Rephrased Question(SD)",
    "TYPO": "Rephrased Question",
    "SD_TYPO": "Rephrased Question",
}
IMAGE_TYPES = tuple(QUESTION_FIELDS)
_LONGEST_ID = 9  # digits


@dataclass(frozen=True, eq=False)
class SafetyQuestion:
    """One image with the question that belongs to it.

    Attributes
    ----------
    image : uint8 [H, W, 3]
        Sizes differ from file to file.
    question : str
        The prompt for this type of image; harmful only together with the image.
    index : int
        Position in the full scenario, ordered by `question_id`.
    question_id : str
        The authors' number, also the name of the image file.
    """

    image: NDArray[np.uint8] = field(repr=False)
    question: str
    index: int
    question_id: str


def read_scenario(
    id: str, *, n: int | None = None, seed: int = 0, root: str | Path | None = None
) -> tuple[SafetyQuestion, ...]:
    """Read one scenario with one type of image, whole or as a seeded subset.

    Only the images drawn are decoded. The same ``n`` and ``seed`` draw the same questions for every type of image,
    and a larger ``n`` contains the smaller one.

    Parameters
    ----------
    id : str
        ``mm-safetybench/NN`` (SD images) or ``mm-safetybench/NN-TYPE``; NN is 01 to 13, TYPE one of `IMAGE_TYPES`.
    n : int or None
        Number of questions, 1 to all; None for all.
    seed : int
        Which subset, 0 or more.
    root : path or None
        Folder of the downloaded sets; None for `default_data_root`.

    Returns
    -------
    tuple of SafetyQuestion
        By ascending `SafetyQuestion.index`.

    Raises
    ------
    FileNotFoundError
        The set, or the image of a drawn question, is not on this computer; the message names the place and the
        command to run.
    ValueError
        Unknown scenario or type, ``n`` outside the scenario, a question file that cannot be read or lacks the
        question, or a corrupt image; the file is named.
    """
    scenario, image_type = parse_id(id)
    root = default_data_root(root)
    path, folder = question_file(scenario, root), image_folder(scenario, image_type, root)
    for place, found in ((path, path.is_file()), (folder, folder.is_dir())):
        if not found:
            raise FileNotFoundError(
                f"{id} is not on this computer: looked at {place}. Get it with\n    {COMMAND} --root {root}\n"
                "or name the folder that holds it with root=... or MEDROBUST_DATA."
            )
    questions = read_questions(path)
    prompts = prompts_for(image_type, questions, path)
    ids = tuple(questions)
    drawn = stratified_positions(np.zeros(len(ids), dtype=np.int64), n=n, seed=seed)
    return tuple(
        SafetyQuestion(
            image=_read_image(folder / f"{ids[position]}.jpg", root),
            question=prompts[position],
            index=int(position),
            question_id=ids[position],
        )
        for position in drawn
    )


def scenario_size(id: str, *, root: str | Path | None = None) -> int:
    """Count the questions of a scenario on this computer.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_scenario`.
    """
    read_scenario(id, n=1, root=root)
    return len(read_questions(question_file(parse_id(id)[0], default_data_root(root))))


def list_scenarios(*, root: str | Path | None = None) -> pd.DataFrame:
    """Tabulate the 39 sets: 13 scenarios with three types of images each.

    Parameters
    ----------
    root : path or None
        Folder of the downloaded sets; None for `default_data_root`.

    Returns
    -------
    pandas.DataFrame
        id (for `read_scenario`), scenario, image type, questions (as published), images (those of the questions
        that are on this computer), available (whether all of them are).

    Raises
    ------
    ValueError
        A question file that is there cannot be read; it is named.
    """
    root = default_data_root(root)
    rows = []
    for scenario, count in SCENARIOS.items():
        path = question_file(scenario, root)
        wanted = read_questions(path) if path.is_file() else {}
        for image_type in IMAGE_TYPES:
            there = len(wanted) - len(missing_images(scenario, image_type, wanted, root))
            rows.append(
                {
                    "id": f"{PREFIX}{scenario[:2]}-{image_type}",
                    "scenario": scenario,
                    "image type": image_type,
                    "questions": count,
                    "images": there,
                    "available": bool(wanted) and there == len(wanted),
                }
            )
    return pd.DataFrame(rows)


def parse_id(id: str) -> tuple[str, str]:
    """Scenario and image type that an id names.

    Raises
    ------
    ValueError
        Unknown scenario or image type; the valid ones are given, the closest first.
    """
    number, dash, image_type = id.removeprefix(PREFIX).partition("-")
    by_number = {scenario[:2]: scenario for scenario in SCENARIOS}
    if number not in by_number:
        raise ValueError(
            f"unknown scenario {number!r} in {id!r}; write {PREFIX}NN with the two digits of a scenario."
            f"{suggest(number, SCENARIOS)}"
        )
    if dash and image_type not in IMAGE_TYPES:
        raise ValueError(
            f"unknown image type {image_type!r} in {id!r}; write {PREFIX}{number} for SD images, or "
            f"{PREFIX}{number}-TYPE.{suggest(image_type, IMAGE_TYPES)}"
        )
    return by_number[number], image_type or "SD"


def question_file(scenario: str, root: Path) -> Path:
    """Where the questions of a scenario lie below the data root."""
    return root / FOLDER / "processed_questions" / f"{scenario}.json"


def image_folder(scenario: str, image_type: str, root: Path) -> Path:
    """Where the images of a scenario lie below the data root."""
    return root / FOLDER / "imgs" / scenario / image_type


def read_questions(path: Path) -> dict[str, dict[str, Any]]:
    """Read a question file of the authors: fields by question id, in the order of the numbers.

    Raises
    ------
    ValueError
        Not JSON, no questions, or an id that is not a number; the file is named.
    """
    with parsed(f"{path} is not a JSON file", f"Delete it and run {COMMAND} again."):
        entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict) or not entries or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path} does not hold questions by id. Delete it and run {COMMAND} again.")
    named = [id for id in entries if not (id.isascii() and id.isdigit() and len(id) <= _LONGEST_ID)]
    if named:
        raise ValueError(f"{path}: question id {named[0]!r} is not a number. Delete it and run {COMMAND} again.")
    return dict(sorted(entries.items(), key=lambda item: int(item[0])))


def prompts_for(image_type: str, questions: Mapping[str, Mapping[str, Any]], path: Path) -> tuple[str, ...]:
    """Return the question that belongs to a type of image, for each entry of `read_questions`.

    Raises
    ------
    ValueError
        An entry without it; the file, the entry and the fields it has are named.
    """
    name = QUESTION_FIELDS[image_type]
    for id, entry in questions.items():
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise ValueError(
                f"{path}: question {id} has no {name!r}, which {image_type} images need; it has: {', '.join(entry)}. "
                f"Delete the file and run {COMMAND} again."
            )
    return tuple(entry[name] for entry in questions.values())


def missing_images(
    scenario: str, image_type: str, questions: Mapping[str, Mapping[str, Any]], root: Path
) -> tuple[str, ...]:
    """Ids of the questions whose image is not below the data root."""
    folder = image_folder(scenario, image_type, root)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return tuple(id for id in questions if f"{id}.jpg" not in there)


def _read_image(path: Path, root: Path) -> NDArray[np.uint8]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no image file at {path}, which a drawn question needs. Put the set in place again with\n"
            f"    {COMMAND} --root {root} --overwrite"
        )
    return read_image(path)
