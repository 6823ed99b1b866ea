"""What a generative model and an oracle must offer, and the answers to noisy copies, drawn once and kept."""

import operator
import time
from collections import UserDict
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import InitVar, asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medrobust_lib.checks import check_whole
from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.experiments import RowStore, map_items, open_store, progress
from medrobust_lib.models.vision_language import Completion
from medrobust_lib.models.weights import fingerprint
from medrobust_lib.places import VERSION
from medrobust_lib.smoothing.bounds import check_sigma
from medrobust_lib.smoothing.certify import check_image, check_not_training
from medrobust_lib.smoothing.noise import NoiseStream, Role, make_batches, noisy_copies


class GenerativeModel(Protocol):
    """What a model must offer; `load_vlm` gives one, and anybody's wrapper of a remote model may be another.

    Its answer to a copy must depend on that copy and its seed alone. It may also have ``complete`` (as `generate`,
    but with a `Completion` for each image), ``device``, ``dtype``, ``provenance`` and ``bytes_per_copy``. To keep
    answers in a folder, it needs the weights' hashes in ``provenance["files"]``, or ``version``: a string that changes
    whenever an answer could.
    """

    id: str

    def generate(
        self, pixels: Tensor, prompt: str, *, max_new_tokens: int, temperature: float, seed: Sequence[int]
    ) -> Sequence[str | None]:
        """Text for each of the images [n, 3, H, W]; None where none came out, for instance in time."""


class Oracle(Protocol):
    """Labels generated texts.

    Attributes
    ----------
    name, version : str
        Recorded in certificates; `version` changes whenever an answer could.
    labels : tuple of str
        Every label there is, fixed before any text is seen.
    """

    name: str
    version: str
    labels: tuple[str, ...]

    def label(self, texts: Sequence[str]) -> list[str | None]:
        """One of `labels` for each text, or None: no label, which counts as "not y" and never drops the text."""


class Equivalence(Protocol):
    """Tells whether texts mean the same as a frozen representative; need be neither symmetric nor transitive.

    `name` and `version` are as in `Oracle`.
    """

    name: str
    version: str

    def equivalent(self, texts: Sequence[str], representative: str) -> list[bool | None]:
        """Whether each text means the same as the representative; None: no verdict, which counts as "no"."""


def check_model(model: Any) -> None:
    """Raise a TypeError for what is no `GenerativeModel`, naming what is missing."""
    missing = [] if isinstance(getattr(model, "id", None), str) else ["`id`, a string"]
    if not callable(getattr(model, "generate", None)):
        missing.append("`generate(pixels, prompt, *, max_new_tokens, temperature, seed)`")
    if missing or isinstance(model, type):
        raise TypeError(
            f"{_what(model)} is no generative model: it lacks {' and '.join(missing) or 'its arguments'}; "
            "`load_vlm` gives a model, `load_model` only classifiers"
        )


def check_oracle(oracle: Any) -> None:
    """Raise a TypeError for what is neither an `Oracle` nor an `Equivalence`, naming what is missing."""
    labelled = callable(getattr(oracle, "label", None))
    if not labelled and not callable(getattr(oracle, "equivalent", None)):
        raise TypeError(
            f"{_what(oracle)} is no oracle: it needs `label(texts)`, or `equivalent(texts, representative)`"
        )
    if isinstance(oracle, type):
        raise TypeError(f"{_what(oracle)} is no oracle yet: give an instance, {oracle.__name__}(...)")
    needed = {"name": "a string", "version": "a string that changes whenever an answer could"}
    given = {name: getattr(oracle, name, None) for name in needed}
    missing = [f"`{name}`, {meaning}" for name, meaning in needed.items() if not isinstance(given[name], str)]
    if labelled and not _are_labels(getattr(oracle, "labels", None)):
        missing.append("`labels`, a tuple of every label as a string")
    if missing:
        raise TypeError(f"the oracle {_what(oracle)} lacks {' and '.join(missing)}; give it these attributes")


def _are_labels(labels: Any) -> bool:
    return isinstance(labels, list | tuple) and bool(labels) and all(isinstance(label, str) for label in labels)


def _what(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


Address = tuple[Role, int]


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn.

    Attributes
    ----------
    sigma : float
        Noise standard deviation, > 0, in [0, 1] pixel units at the size of the image.
    seed : int
        Of noise and decoding.
    max_new_tokens : int
        Longer answers are cut; the cut is part of the certified function.
    temperature : float
        0 decodes greedily. Above, every answer draws its own tokens, independently: a randomised base classifier.
    """

    sigma: float
    seed: int = 0
    max_new_tokens: int = 64
    temperature: float = 0.0

    def __post_init__(self) -> None:
        # 1 and 1.0, or NumPy's numbers, are the same drawing and find the same kept answers.
        for name, plain in (("sigma", float), ("temperature", float), ("seed", operator.index)):
            object.__setattr__(self, name, plain(getattr(self, name)))
        object.__setattr__(self, "max_new_tokens", operator.index(self.max_new_tokens))
        check_sigma(self.sigma)
        check_whole("max_new_tokens", self.max_new_tokens, hint="; an answer has at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: 0 (greedy) or a finite number above")


@dataclass(repr=False, eq=False)
class AnswerBank:
    """Answers to one question about noisy copies of one image.

    Every copy has an address (seed, data set, image, sigma, role, number), so its answer does not depend on how many
    others are asked for. Certificates by several oracles, or from fewer draws, share the answers.

    Parameters
    ----------
    vlm : GenerativeModel
    image : float32 [3, H, W]
        In [0, 1]; H x W is where the noise is added, on the device of the model.
    prompt : str
    how : Drawing
    dataset : str
    index : int
        Position of the image in its split: part of the address of the noise.
    batch_size : int, optional
        Copies at a time; default: from the free memory. It is halved when memory runs out.
    kept : mutable mapping of (role, number) to Completion or None
        Answers that are there already; new ones are put there at once (see `StoredAnswers`).

    Attributes
    ----------
    seconds : float
        Spent on drawing answers so far.
    drawn : int
        Answers drawn so far, in those seconds; answers that were kept before are none of them.

    Raises
    ------
    TypeError, ValueError
        An image of the wrong type, shape or range, an empty prompt, no generative model, or one in training mode.
    """

    vlm: GenerativeModel
    image: Tensor
    prompt: str
    how: Drawing
    dataset: str = field(default="", kw_only=True)
    index: int = field(default=0, kw_only=True)
    batch_size: InitVar[int | None] = field(default=None, kw_only=True)
    kept: MutableMapping[Address, Completion | None] | None = field(default=None, kw_only=True)
    seconds: float = field(default=0.0, init=False)
    drawn: int = field(default=0, init=False)

    def __post_init__(self, batch_size: int | None) -> None:
        check_model(self.vlm)
        check_image(self.image)
        check_not_training(self.vlm)
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt={self.prompt!r}: give the question as text")
        self.kept = {} if self.kept is None else self.kept
        self.image = self.image.to(getattr(self.vlm, "device", self.image.device))
        each = None
        if batch_size is None and hasattr(self.vlm, "bytes_per_copy"):
            each = self.vlm.bytes_per_copy(self.prompt, self.how.max_new_tokens)
        self._batches = make_batches(batch_size, self.image.device, tuple(self.image.shape), bytes_each=each)

    def answers(self, role: Role, first: int, count: int) -> list[Completion | None]:
        """Answers to copies number ``first`` to ``first + count - 1``; those not kept yet are drawn now."""
        missing = [number for number in range(first, first + count) if (role, number) not in self.kept]
        for run in np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1) if missing else []:
            for drawn in self._batches.map(partial(self._draw, role), first=int(run[0]), count=len(run)):
                self.kept.update(drawn)
        return [self.kept[role, number] for number in range(first, first + count)]

    def texts(self, role: Role, first: int, count: int) -> list[str | None]:
        """Texts of `answers`; None where none came out."""
        return [None if answer is None else answer.text for answer in self.answers(role, first, count)]

    def _draw(self, role: Role, first: int, count: int) -> dict[Address, Completion | None]:
        started = time.perf_counter()
        stream = NoiseStream(self.how.seed, self.dataset, self.index, self.how.sigma, role)
        copies = noisy_copies(self.image, stream, first=first, count=count)
        answer = getattr(self.vlm, "complete", self.vlm.generate)
        drawn = answer(
            copies,
            self.prompt,
            max_new_tokens=self.how.max_new_tokens,
            temperature=self.how.temperature,
            seed=stream.decoding_seeds(first, count),
        )
        self.seconds += time.perf_counter() - started
        self.drawn += count
        return dict(zip(((role, first + place) for place in range(count)), self._checked(drawn, count), strict=True))

    def _checked(self, drawn: Any, count: int) -> list[Completion | None]:
        if not isinstance(drawn, list | tuple):
            what = type(drawn).__name__
            raise TypeError(f"{self.vlm.id} returned a {what}; it must return a list with one answer for each image")
        if len(drawn) != count:
            raise ValueError(f"{self.vlm.id} gave {len(drawn)} answers for {count} images; it must give one for each")
        for answer in drawn:
            if not isinstance(answer, str | Completion | None):
                raise TypeError(
                    f"{self.vlm.id} answered {answer!r} ({type(answer).__name__}); answers are text or None"
                )
        return [Completion(answer, finished=True) if isinstance(answer, str) else answer for answer in drawn]


class StoredAnswers(UserDict[Address, Completion | None]):
    """Answers to one question about one image in a `RowStore`: each is on disk when it is set, and stays as it is.

    Parameters
    ----------
    store : RowStore
        From `open_answers`.
    bank : AnswerBank
        Whose answers they are. Another image or question under the same index has answers of its own.
    """

    def __init__(self, store: RowStore, bank: AnswerBank) -> None:
        super().__init__()
        self._store = store
        content = fingerprint([bank.image, torch.tensor(list(bank.prompt.encode()), dtype=torch.uint8)])
        self._prefix = f"image {bank.index} ({content}), sigma {bank.how.sigma!r}, "
        for key in store.done:
            if key.startswith(self._prefix):
                role, number = key.removeprefix(self._prefix).split()
                (row,) = store.rows(key)
                self.data[role, int(number)] = None if row["text"] is None else Completion(**row)

    def __setitem__(self, address: Address, answer: Completion | None) -> None:
        row = {"text": None, "finished": False} if answer is None else vars(answer)
        self._store.append(f"{self._prefix}{address[0]} {address[1]}", [row], seconds=0.0)
        super().__setitem__(address, answer)

    def __delitem__(self, address: Address) -> None:
        raise TypeError("kept answers are never deleted; use another folder")


def open_answers(
    folder: Path | str, vlm: GenerativeModel, how: Drawing, *, dataset: str, prompts: Sequence[str]
) -> RowStore:
    """Open a folder that keeps answers: a new one, or the one of an interrupted run.

    Raises
    ------
    ValueError, RuntimeError
        A model that neither its files nor a version tells from another one. Else as `open_store`: other parameters
        (each difference named), or a folder in use.
    """
    provenance = getattr(vlm, "provenance", {})
    version = getattr(vlm, "version", None)
    if not provenance.get("files") and not (isinstance(version, str) and version):
        raise ValueError(
            f"store={str(folder)!r}: kept answers could be another model's, for {vlm.id!r} has neither files in its "
            "`provenance` nor a `version`: give it a `version` attribute: a string that changes when an answer could"
        )
    parameters = {
        "medrobust_lib": VERSION,
        "model": vlm.id,
        "files": provenance.get("files", {}),
        "revision": provenance.get("revision"),
        **({} if version is None else {"version": str(version)}),
        "image_size": getattr(vlm, "image_size", None),
        "dtype": getattr(vlm, "precision", str(getattr(vlm, "dtype", "unknown")).removeprefix("torch.")),
        "device": _device(vlm).type,
        "dataset": dataset,
        "prompts": sorted(set(prompts)),
        **asdict(how),
    }
    return open_store(folder, parameters=parameters)


def collect_answers(
    vlm: Any,
    questions: QuestionSet,
    how: Drawing,
    *,
    n0: int,
    n: int,
    jobs: int = 1,
    batch_size: int | None = None,
    store: Path | str | None = None,
) -> list[AnswerBank]:
    """Answers to noisy copies of every image of a question set, n0 for selection and n for estimation each.

    Parameters
    ----------
    vlm : GenerativeModel
        With ``prepare``, as `load_vlm` gives it.
    questions : QuestionSet
    how : Drawing
    n0, n : int
    jobs : int
        Worker processes on the CPU; -1 for one per core.
    batch_size : int, optional
    store : path, optional
        Folder that keeps the answers of finished images: an interrupted run goes on there, and more draws may be asked
        for later; any other change is refused.

    Returns
    -------
    list of AnswerBank
        Complete up to n0 and n, in the order of the images.

    Raises
    ------
    ValueError
        A parameter out of range, a store that holds other answers, with the differences named, or as `open_answers`.
    """
    check_model(vlm)
    banks = [
        AnswerBank(vlm, vlm.prepare([image])[0], prompt, how, dataset=questions.id, index=int(index),
                   batch_size=batch_size)
        for image, prompt, index in zip(questions.images, questions.questions, questions.indices, strict=True)
    ]  # fmt: skip
    addresses: list[Address] = [("select", number) for number in range(n0)]
    addresses += [("estimate", number) for number in range(n)]
    with ExitStack() as stack:
        if store is not None:
            opened = open_answers(store, vlm, how, dataset=questions.id, prompts=questions.questions)
            stack.enter_context(opened)
            for bank in banks:
                bank.kept = StoredAnswers(opened, bank)
        missing = [bank for bank in banks if any(address not in bank.kept for address in addresses)]
        work = [(bank.image, bank.prompt, bank.index, dict(bank.kept)) for bank in missing]
        results = map_items(_collect, work, context=(vlm, how, questions.id, n0, n, batch_size), jobs=jobs)
        shown = progress(
            results,
            total=len(banks),
            done=len(banks) - len(missing),
            description=f"answers on {questions.id}",
            unit="images",
            resumes=store is not None,
        )
        for place, (answers, seconds) in shown:
            missing[place].kept.update(answers)
            missing[place].seconds, missing[place].drawn = seconds, len(answers)
    for bank in banks:  # they outlive the store, so what they hold is in memory
        bank.kept = {address: bank.kept[address] for address in addresses}
    return banks


def answer_once(
    vlm: Any,
    questions: QuestionSet,
    *,
    sigma: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch_size: int = 32,
) -> list[str | None]:
    """Answers to one noisy copy of each image: how a model does without smoothing.

    Parameters
    ----------
    vlm : GenerativeModel
        With ``prepare``.
    questions : QuestionSet
    sigma : float
        Noise standard deviation in [0, 1] pixel units; 0 asks about the clean images.
    seed : int
        Of the noise, whose role is "adapt": no certificate sees it.
    max_new_tokens : int
    temperature : float
        0 decodes greedily.
    batch_size : int

    Returns
    -------
    list of str or None
        In the order of the images.
    """
    check_model(vlm)
    texts: dict[int, str | None] = {}
    for prompt in dict.fromkeys(questions.questions):
        places = [place for place, other in enumerate(questions.questions) if other == prompt]
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            pixels, seeds = vlm.prepare([questions.images[place] for place in part]), []
            for row, place in enumerate(part):
                stream = NoiseStream(seed, questions.id, int(questions.indices[place]), sigma, "adapt")
                pixels[row] += stream.draw(tuple(pixels.shape[1:]))[0]
                seeds += stream.decoding_seeds(0, 1)
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seeds}
            texts |= dict(zip(part, vlm.generate(pixels.to(_device(vlm)), prompt, **options), strict=True))
    return [texts[place] for place in range(len(questions))]


def _collect(
    context: tuple[Any, Drawing, str, int, int, int | None],
    item: tuple[Tensor, str, int, Mapping[Address, Completion | None]],
) -> tuple[dict[Address, Completion | None], float]:
    """Answers of one image that are missing so far, and the seconds that they took."""
    vlm, how, dataset, n0, n, batch_size = context
    image, prompt, index, kept = item
    bank = AnswerBank(vlm, image, prompt, how, dataset=dataset, index=index, batch_size=batch_size, kept=dict(kept))
    bank.answers("select", 0, n0)
    bank.answers("estimate", 0, n)
    return {address: answer for address, answer in bank.kept.items() if address not in kept}, bank.seconds


def _device(vlm: Any) -> torch.device:
    return torch.device(getattr(vlm, "device", "cpu"))
