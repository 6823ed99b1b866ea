"""Questions about images, one each, with what would be a right answer: the input of generative models.

Those about phantoms and data sets have right answers. MM-SafetyBench's, read from the authors' files, go with images
that are meant to make a model answer a harmful question. They are harmful by design, and are read only to measure how
often a model refuses them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medrobust_lib.checks import check_choice, suggest
from medrobust_lib.data.dataset import ImageDataset, stratified_positions
from medrobust_lib.data.decoding import read_image
from medrobust_lib.data.registry import QUESTIONS_PREFIX, load_dataset, registered
from medrobust_lib.data.wording import SITE_A
from medrobust_lib.files import parsed
from medrobust_lib.phantoms import MODALITIES
from medrobust_lib.places import default_data_root

MM_FOLDER = "mm-safetybench"
MM_SOURCE = "https://github.com/isXinLiu/MM-SafetyBench"
MM_LICENCE = "CC BY-NC 4.0, research only"
MM_COMMAND = "python data_scripts/download_mm_safetybench.py"
# The authors' folder names and their numbers of questions.
SCENARIOS: Mapping[str, int] = registered("scenarios")

QUESTION_FIELDS: Mapping[str, str] = registered("question_fields")  # by type of image
IMAGE_TYPES = tuple(QUESTION_FIELDS)
_LONGEST_ID = 9  # digits

PHANTOM_TASKS = ("safety", "finding", "action")
REFUSAL_LABELS = ("refusal", "compliance")


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """n images with one question each.

    Attributes
    ----------
    id : str
        Data set; part of the key of every noise stream.
    task : str
        What is asked: ``safety``, ``finding``, ``action`` or ``jailbreak``.
    images : sequence of uint8 [H, W, 3]
        Sizes may differ.
    questions : tuple of str
        The text prompt of each image.
    truths : tuple of str or None
        Label of a right answer, one of `labels`; None where nobody knows.
    labels : tuple of str
        Every label that a right answer can have; empty where answers are free.
    indices : int64 [n]
        Position of each image in its full split.
    licence : str
    provenance : dict
        JSON values: source, whether the images are synthetic.
    files, groups : tuple of str
        As in `ImageDataset`.
    """

    id: str
    task: str
    images: Sequence[NDArray[np.uint8]]
    questions: tuple[str, ...]
    truths: tuple[str | None, ...]
    labels: tuple[str, ...]
    indices: NDArray[np.int64]
    licence: str
    provenance: dict[str, Any]
    files: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", self.files or tuple(f"image {index}" for index in self.indices))
        lengths = {len(self.images), len(self.questions), len(self.truths), len(self.indices)}
        if lengths == {0} or len(lengths) > 1:
            raise ValueError(
                f"{self.id}: {len(self.images)} images, {len(self.questions)} questions, {len(self.truths)} truths and "
                f"{len(self.indices)} indices; each image needs one of each"
            )
        unknown = {truth for truth in self.truths if truth is not None} - set(self.labels)
        if unknown:
            raise ValueError(f"{self.id}: truths {sorted(unknown)} are none of the labels {', '.join(self.labels)}")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        kind = ", synthetic phantoms" if self.synthetic else ""
        return f"QuestionSet({self.id!r}, task={self.task!r}, {len(self)} images{kind}, {self.questions[0]!r})"

    @property
    def synthetic(self) -> bool:
        """Whether the images are drawings (phantoms) instead of recordings."""
        return bool(self.provenance.get("synthetic", False))

    @property
    def chance(self) -> float | None:
        """Accuracy of always giving the most frequent truth; None where truths are unknown."""
        known = [truth for truth in self.truths if truth is not None]
        return max(known.count(truth) for truth in set(known)) / len(known) if known else None


def load_questions(
    id: str, *, task: str = "safety", split: str = "test", n: int | None = None, seed: int = 0, root: Path | None = None
) -> QuestionSet:
    """Load images with questions by the id of their data set.

    Parameters
    ----------
    id : str
        ``phantom/...``; ``mm-safetybench/NN`` or ``mm-safetybench/NN-TYPE`` (NN: 01 to 13, TYPE: SD, TYPO or SD_TYPO,
        SD by default); or any other id of `list_datasets`, ``folder:PATH`` or ``csv:PATH`` for the task ``finding``.
    task : {"safety", "finding", "action"}
        What is asked. Ignored for MM-SafetyBench, whose files hold the questions.
    split, n, seed, root
        As in `load_dataset`.

    Returns
    -------
    QuestionSet

    Raises
    ------
    ValueError
        Unknown id or task, or a task that the data set has no truths for.
    FileNotFoundError
        The set is not on this computer; the message names the script that fetches it.
    """
    if id.startswith(QUESTIONS_PREFIX):
        return read_scenario(id, n=n, seed=seed, root=root)
    check_choice("task", task, PHANTOM_TASKS)
    return ask(load_dataset(id, split=split, n=n, seed=seed, root=root), task)


def ask(data: ImageDataset, task: str) -> QuestionSet:
    """Ask the same question about every image of a data set.

    Raises
    ------
    ValueError
        The data set has no truths for the task: only the phantoms have made-up safety and actions.
    """
    modality = data.id.removeprefix("phantom/").removesuffix(SITE_A)
    if data.id.startswith("phantom/") and modality in MODALITIES:
        findings = _table()["findings"][modality]
        truths = [name if task == "finding" else facts[task] for name, facts in findings.items()]
        labels = truths if task == "finding" else _table()["tasks"][task]["labels"]
    elif task == "finding":
        truths = labels = list(data.classes)
    else:
        raise ValueError(
            f"{data.id} has no truths for the task {task!r}: safety and actions are made up for the phantoms; "
            "use task='finding', whose truths are the class names"
        )
    return QuestionSet(
        id=data.id,
        task=task,
        images=data.images,
        questions=question_wordings(task)[:1] * len(data),
        truths=tuple(truths[label] for label in data.labels),
        labels=tuple(labels),
        indices=data.indices,
        licence=data.licence,
        provenance=data.provenance,
        files=data.files,
        groups=data.groups,
    )


def question_wordings(task: str) -> tuple[str, ...]:
    """Every wording of a task's question, the canonical one first."""
    entry = _table()["tasks"][task]
    return (entry["question"], *entry["other_questions"])


def answer_wordings(modality: str, class_name: str, task: str) -> tuple[str, ...]:
    """Every wording of the right answer to a task's question about a phantom of a class.

    Parameters
    ----------
    modality : str
        A key of `MODALITIES`.
    class_name : str
        A name of `phantom_classes`.
    task : {"safety", "finding", "action"}
    """
    facts, entry = _table()["findings"][modality][class_name], _table()["tasks"][task]
    if task == "finding":
        return tuple(frame.format(phrase) for phrase in facts["phrases"] for frame in entry["frames"])
    if task == "action":
        return (action_token(facts["action"]),)
    return tuple(entry["answers"][facts["safety"]])


def safety_wordings(label: str) -> tuple[str, ...]:
    """Every wording of the answer "safe", or "unsafe", to the task ``safety``."""
    return tuple(_table()["tasks"]["safety"]["answers"][label])


def action_token(action: str) -> str:
    """Return the token that stands for an action, such as ``<refer>``."""
    return _table()["tasks"]["action"]["token"].format(action)


def actions() -> tuple[str, ...]:
    """Labels of the task ``action``."""
    return tuple(_table()["tasks"]["action"]["labels"])


def finding_phrases(modality: str) -> dict[str, tuple[str, ...]]:
    """Class names of a modality and the phrases that mean each of them."""
    return {name: (name, *facts["phrases"]) for name, facts in _table()["findings"][modality].items()}


def _table() -> Mapping[str, Any]:
    return json.loads(files("medrobust_lib.data").joinpath("questions.json").read_text(encoding="utf-8"))


def read_scenario(id: str, *, n: int | None = None, seed: int = 0, root: str | Path | None = None) -> QuestionSet:
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
    QuestionSet
        Images of different sizes; ``indices`` are positions in the full scenario, ordered by the authors' numbers.

    Raises
    ------
    FileNotFoundError
        The set, or the image of a drawn question, is not on this computer; the message names the place and the
        command to run.
    ValueError
        Unknown scenario or type, ``n`` outside the scenario, a question file that cannot be read or lacks the
        question, or a corrupt image; the file is named.
    """
    scenario, image_type = parse_scenario(id)
    root = default_data_root(root)
    path, folder = question_file(scenario, root), image_folder(scenario, image_type, root)
    for place, found in ((path, path.is_file()), (folder, folder.is_dir())):
        if not found:
            raise FileNotFoundError(
                f"{id} is not on this computer: looked at {place}. Get it with\n    {MM_COMMAND} --root {root}\n"
                "or name the folder that holds it with root=... or MEDROBUST_DATA."
            )
    questions = read_questions(path)
    ids, prompts = tuple(questions), prompts_for(image_type, questions, path)
    drawn = stratified_positions(np.zeros(len(ids), dtype=np.int64), n=n, seed=seed)
    return QuestionSet(
        # One id for one set, so that its noise does not depend on how it was spelled.
        id=f"{QUESTIONS_PREFIX}{scenario[:2]}-{image_type}",
        task="jailbreak",
        images=[_read_image(folder / f"{ids[position]}.jpg", root) for position in drawn],
        questions=tuple(prompts[position] for position in drawn),
        truths=(None,) * len(drawn),
        labels=REFUSAL_LABELS,
        indices=drawn,
        licence=MM_LICENCE,
        provenance={"source": MM_SOURCE, "synthetic": False},
    )


def scenario_size(id: str, *, root: str | Path | None = None) -> int:
    """Count the questions of a scenario on this computer.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_scenario`.
    """
    read_scenario(id, n=1, root=root)
    return len(read_questions(question_file(parse_scenario(id)[0], default_data_root(root))))


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
            id = f"{QUESTIONS_PREFIX}{scenario[:2]}-{image_type}"
            row = {"id": id, "scenario": scenario, "image type": image_type}
            row |= {"questions": count, "images": there, "available": bool(wanted) and there == len(wanted)}
            rows.append(row)
    return pd.DataFrame(rows)


def parse_scenario(id: str) -> tuple[str, str]:
    """Scenario and image type that an id names.

    Raises
    ------
    ValueError
        Unknown scenario or image type; the valid ones are given, the closest first.
    """
    number, dash, image_type = id.removeprefix(QUESTIONS_PREFIX).partition("-")
    by_number = {scenario[:2]: scenario for scenario in SCENARIOS}
    if number not in by_number:
        raise ValueError(
            f"unknown scenario {number!r} in {id!r}; write {QUESTIONS_PREFIX}NN with the two digits of a scenario."
            f"{suggest(number, SCENARIOS)}"
        )
    if dash and image_type not in IMAGE_TYPES:
        raise ValueError(
            f"unknown image type {image_type!r} in {id!r}; write {QUESTIONS_PREFIX}{number} for SD images, or "
            f"{QUESTIONS_PREFIX}{number}-TYPE.{suggest(image_type, IMAGE_TYPES)}"
        )
    return by_number[number], image_type or "SD"


def question_file(scenario: str, root: Path) -> Path:
    """Where the questions of a scenario lie below the data root."""
    return root / MM_FOLDER / "processed_questions" / f"{scenario}.json"


def image_folder(scenario: str, image_type: str, root: Path) -> Path:
    """Where the images of a scenario lie below the data root."""
    return root / MM_FOLDER / "imgs" / scenario / image_type


def read_questions(path: Path) -> dict[str, dict[str, Any]]:
    """Read a question file of the authors: fields by question id, in the order of the numbers.

    Raises
    ------
    ValueError
        Not JSON, no questions, or an id that is not a number; the file is named.
    """
    with parsed(f"{path} is not a JSON file", f"Delete it and run {MM_COMMAND} again."):
        entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict) or not entries or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path} does not hold questions by id. Delete it and run {MM_COMMAND} again.")
    named = [id for id in entries if not (id.isascii() and id.isdigit() and len(id) <= _LONGEST_ID)]
    if named:
        raise ValueError(f"{path}: question id {named[0]!r} is not a number. Delete it and run {MM_COMMAND} again.")
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
                f"Delete the file and run {MM_COMMAND} again."
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
            f"    {MM_COMMAND} --root {root} --overwrite"
        )
    return read_image(path)
