"""Questions about images, one each, with what would be a right answer: the input of generative models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.checks import check_choice
from medrobust_lib.data import mm_safetybench
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.data.wording import SITE_A
from medrobust_lib.phantoms import MODALITIES

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

    def __post_init__(self) -> None:
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
    if id.startswith(mm_safetybench.PREFIX):
        return _jailbreak_questions(id, n=n, seed=seed, root=root)
    check_choice("task", task, PHANTOM_TASKS)
    return ask(load_dataset(id, split=split, n=n, seed=seed, root=root), task)


def ask(data: ImageDataset, task: str) -> QuestionSet:
    """Ask the same question about every image of a data set.

    Raises
    ------
    ValueError
        The data set has no truths for the task: only the phantoms have made-up safety and actions.
    """
    truths, labels = _truths(data, task)
    return QuestionSet(
        id=data.id,
        task=task,
        images=data.images,
        questions=question_wordings(task)[:1] * len(data),
        truths=tuple(truths[label] for label in data.labels),
        labels=labels,
        indices=data.indices,
        licence=data.licence,
        provenance=data.provenance,
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


def _truths(data: ImageDataset, task: str) -> tuple[list[str], tuple[str, ...]]:
    """Truth of each class label of a data set, and all labels of the task."""
    modality = data.id.removeprefix("phantom/").removesuffix(SITE_A)
    if not data.id.startswith("phantom/") or modality not in MODALITIES:
        if task == "finding":
            return list(data.classes), tuple(data.classes)
        raise ValueError(
            f"{data.id} has no truths for the task {task!r}: safety and actions are made up for the phantoms; "
            "use task='finding', whose truths are the class names"
        )
    findings = _table()["findings"][modality]
    if task == "finding":
        return list(findings), tuple(findings)
    return [facts[task] for facts in findings.values()], tuple(_table()["tasks"][task]["labels"])


def _jailbreak_questions(id: str, *, n: int | None, seed: int, root: Path | None) -> QuestionSet:
    # One id for one set, so that its noise does not depend on how it was spelled.
    scenario, image_type = mm_safetybench.parse_id(id)
    id = f"{mm_safetybench.PREFIX}{scenario[:2]}-{image_type}"
    rows = mm_safetybench.read_scenario(id, n=n, seed=seed, root=root)
    return QuestionSet(
        id=id,
        task="jailbreak",
        images=[row.image for row in rows],
        questions=tuple(row.question for row in rows),
        truths=(None,) * len(rows),
        labels=REFUSAL_LABELS,
        indices=np.array([row.index for row in rows], dtype=np.int64),
        licence=mm_safetybench.LICENCE,
        provenance={"source": mm_safetybench.SOURCE, "synthetic": False},
    )


def _table() -> Mapping[str, Any]:
    return json.loads(files("medrobust_lib.data").joinpath("questions.json").read_text(encoding="utf-8"))
