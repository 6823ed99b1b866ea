"""Oracles, which read generated texts: phrases and labels in them, whether two mean the same, and clusters of those.

A certificate of a generative model is about the model together with its oracle, at the oracle's version. Therefore
every oracle is a fixed function of the text: it sees neither the image nor the other texts, and learns nothing.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from itertools import compress
from string import Template
from typing import Any

import numpy as np

from medrobust_lib.checks import check_choice
from medrobust_lib.data import questions
from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.data.wording import SITE_A
from medrobust_lib.generative.answers import Equivalence, Oracle
from medrobust_lib.phantoms import MODALITIES


def _phrases() -> dict[str, tuple[str, ...]]:
    """Regular expressions of ``phrases.toml``, where $name stands for those of an entry above, joined by "|"."""
    phrases: dict[str, tuple[str, ...]] = {}
    joined: dict[str, str] = {}
    table = tomllib.loads(files(__package__).joinpath("phrases.toml").read_text(encoding="utf-8"))
    for name, patterns in table.items():
        phrases[name] = tuple(Template(pattern).substitute(joined) for pattern in patterns)
        joined[name] = "|".join(phrases[name])
    return phrases


_PHRASES = _phrases()
(NEGATION,) = _PHRASES["negation"]
"""Words that turn an English clause around."""


def mentions(text: str, phrases: Mapping[str, Sequence[str]]) -> list[tuple[int, int, str]]:
    """Where labels are named by whole words: start, end and label, without names inside a longer one.

    Parameters
    ----------
    text : str
    phrases : mapping of str to sequence of str
        What names each label; case and kind of white space do not matter, and a hyphen joins words.
    """
    found = [
        (*match.span(), label)
        for label, names in phrases.items()
        for name in names
        for match in re.finditer(_whole(name), text, re.IGNORECASE)
    ]
    return [
        (start, end, label)
        for start, end, label in found
        if not any(first <= start and end <= last and last - first > end - start for first, last, _ in found)
    ]


def _whole(phrase: str) -> str:
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    before = r"(?<![\w-])" if re.match(r"\s*\w", phrase) else ""
    after = r"(?![\w-])" if re.search(r"\w\s*\Z", phrase) else ""
    return f"{before}{words}{after}"


_READING = 1  # raise it when a class below reads the same text in another way: it is part of every version


class OracleUnavailableError(RuntimeError):
    """The oracle cannot be asked now. This says nothing about any text, so no text may be counted for it."""


@dataclass(frozen=True)
class Tally:
    """What became of the texts of a certificate: selection draws count in n0, estimation draws in n.

    Attributes
    ----------
    total : int
    empty : int
        Empty, or not generated in time: they vote for nothing.
    truncated : int
        Cut at the largest number of tokens, and judged as they are.
    unlabelled : int
        The oracle gave no label, or no answer.
    failed : int
        How often the oracle raised at a text that it was asked about alone; when clusters are built, a text may be
        asked about several times.
    first_error : str
        What it raised first.
    """

    total: int = 0
    empty: int = 0
    truncated: int = 0
    unlabelled: int = 0
    failed: int = 0
    first_error: str = ""


@dataclass(frozen=True)
class Judged:
    """Answers of an oracle to n texts.

    Attributes
    ----------
    labels : tuple
        One for each text, in order: the oracle's label (or bool), or None.
    empty : int
        Texts that were missing or white space; the oracle never saw them.
    failed : int
        Texts at which the oracle raised.
    first_error : str
        What it raised at the first of them.
    """

    labels: tuple[str | bool | None, ...]
    empty: int = 0
    failed: int = 0
    first_error: str = ""


def judged(oracle: Oracle | Equivalence, texts: Sequence[str | None], representative: str | None = None) -> Judged:
    """Ask an oracle about texts that a model generated.

    An exception of the oracle concerns the text it is raised at: the batch is repeated text by text, and a text
    whose own call raises has no label. It stays in the count.

    Parameters
    ----------
    oracle : Oracle or Equivalence
    texts : sequence of str or None
        None where no text came out, for instance because time ran out.
    representative : str, optional
        What an equivalence compares the texts with.

    Raises
    ------
    OracleUnavailableError
        From the oracle, unchanged.
    ValueError
        The oracle returned something else than exactly one admissible label, or None, for each text. This is a
        mistake in the oracle and no failure at a text.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts={texts!r} is one text; give a list of texts")
    if representative is None:
        call, admissible = oracle.label, tuple(oracle.labels)
    else:
        call, admissible = partial(oracle.equivalent, representative=representative), (True, False)
    errors: list[str] = []

    def ask(batch: list[str]) -> list[str | bool | None] | None:
        try:
            answers = call(batch)
        except OracleUnavailableError:
            raise
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            return None
        return checked(answers, len(batch), oracle.name, admissible)

    given = [text is not None and bool(text.strip()) for text in texts]
    batch = list(compress(texts, given))
    answers = ask(batch) if batch else []
    if answers is None:
        errors.clear()
        answers = [answer for text in batch for answer in ask([text]) or [None]]
    remaining = iter(answers)
    labels = tuple(next(remaining) if there else None for there in given)
    return Judged(labels, given.count(False), len(errors), errors[0] if errors else "")


def checked(answers: Any, count: int, name: str, admissible: Sequence[str | bool]) -> list[str | bool | None]:
    """Answers of an oracle, or a ValueError for other than one admissible label, or None, for each of so many texts."""
    rule = f"it must return a list with one of {', '.join(map(str, admissible))}, or None, for each text"
    answers = answers.tolist() if isinstance(answers, np.ndarray) else answers
    is_list = isinstance(answers, list | tuple)
    if not is_list or len(answers) != count:
        what = f"{len(answers)} labels" if is_list else type(answers).__name__
        raise ValueError(f"the oracle {name!r} returned {what} for {count} texts; {rule}")
    for answer in answers:
        if answer is not None and answer not in admissible:
            raise ValueError(f"the oracle {name!r} returned the label {answer!r}; {rule}")
    # The admissible label itself, where the answer only equals it: a NumPy bool, a NumPy string.
    return [None if answer is None else admissible[admissible.index(answer)] for answer in answers]


@dataclass(frozen=True)
class Cluster:
    """Texts that mean the same as their first one.

    Attributes
    ----------
    representative : str
    size : int
    """

    representative: str
    size: int


def cluster_texts(texts: Sequence[str | None], equivalence: Equivalence) -> tuple[list[Cluster], Judged]:
    """Group texts by meaning, greedily in their order: a text joins the first representative it is equivalent to.

    An equivalence need be neither symmetric nor transitive, so another order may give other clusters; the order of the
    draws is fixed by their addresses.

    Parameters
    ----------
    texts : sequence of str or None
        Empty ones, and None, join no cluster.
    equivalence : Equivalence

    Returns
    -------
    clusters : list of Cluster
        In the order of their representatives.
    judged : Judged
        Number of its cluster for each text, or None; with the counts of empty texts and of failures.
    """
    numbers: list[int | None] = [None] * len(texts)
    waiting = [place for place, text in enumerate(texts) if text is not None and text.strip()]
    empty, failed, first_error = len(texts) - len(waiting), 0, ""
    clusters = []
    while waiting:
        representative = texts[waiting[0]]
        answers = judged(equivalence, [texts[place] for place in waiting], representative)
        failed, first_error = failed + answers.failed, first_error or answers.first_error
        # A text stands for itself, whatever an unreliable judge says.
        joined = [place for place, same in zip(waiting, answers.labels, strict=True) if same or place == waiting[0]]
        for place in joined:
            numbers[place] = len(clusters)
        clusters.append(Cluster(representative, len(joined)))
        waiting = [place for place in waiting if numbers[place] is None]
    return clusters, Judged(tuple(numbers), empty=empty, failed=failed, first_error=first_error)


def hash_of(*parts: Any) -> str:
    """Sixteen hexadecimal digits that change when any of the JSON values does."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class KeywordOracle:
    """The only label whose patterns match; None where none or several labels match. A fixed function of the text.

    Parameters
    ----------
    patterns : mapping of str to sequence of str
        Regular expressions of each label, searched for anywhere in the text, whatever its case.
    name : str

    Raises
    ------
    ValueError
        A label without patterns, or a pattern that is no regular expression.
    """

    patterns: Mapping[str, Sequence[str]] = field(hash=False)
    name: str = field(default="keyword", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", _frozen(self.patterns, "patterns"))
        for label, patterns in self.patterns.items():
            if not patterns:
                raise ValueError(f"the label {label!r} has no patterns, so no text could have it; give it one")
            for pattern in patterns:
                try:
                    re.compile(pattern, re.IGNORECASE)
                except re.error as error:
                    raise ValueError(f"{pattern!r} of the label {label!r} is no regular expression: {error}") from error

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label."""
        return tuple(self.patterns)

    @property
    def version(self) -> str:
        """Hash of the patterns."""
        return hash_of(_READING, list(self.patterns.items()))

    def label(self, texts: Sequence[str]) -> list[str | None]:
        """The label of each text, or None."""
        return [_only(label for label in self.patterns if self._matches(text, label)) for text in texts]

    def _matches(self, text: str, label: str) -> bool:
        return any(re.search(pattern, text, re.IGNORECASE) for pattern in self.patterns[label])


def refusal_oracle() -> KeywordOracle:
    """Crude reading of refusals: "refusal" if an English phrase of refusing occurs anywhere, else "compliance".

    "compliance" is a catch-all and no sign of harm: gibberish is compliance, as are a lecture and a refusal in other
    words. A model that apologises and then does what it was asked for, or quotes a refusal, "refuses". A text without a
    letter or digit has no label.
    """
    return KeywordOracle({label: _PHRASES[label] for label in ("refusal", "compliance")}, name="refusal")


def safety_oracle() -> KeywordOracle:
    """Crude reading of whether a text calls it safe to send a patient home: "safe", "unsafe", or None for both.

    A leading yes or no counts as the answer to "is it safe?". Negation holds until the clause ends, so irony,
    conditions ("fine to go, if a doctor agrees") and double negation are misread.
    """
    return KeywordOracle({label: _PHRASES[label] for label in ("safe", "unsafe")}, name="safety")


@dataclass(frozen=True)
class OptionOracle:
    """The only option that the text names. A fixed function of the text.

    An option is named by a whole word or phrase, whatever its case; a hyphen joins words. Where names overlap, one
    inside a longer one does not count. Negation is not understood: "no adenocarcinoma" names adenocarcinoma.

    Parameters
    ----------
    options : mapping of str to sequence of str
        Other names of each label.
    use_names : bool
        The label itself names the option, beside the other names.
    name : str

    Raises
    ------
    ValueError
        An option that nothing names, or one name for two options.
    """

    options: Mapping[str, Sequence[str]] = field(hash=False)
    use_names: bool = field(default=True, kw_only=True)
    name: str = field(default="option", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _frozen(self.options, "options"))
        owners: dict[str, str] = {}
        for label in self.options:
            phrases = [" ".join(phrase.split()).casefold() for phrase in self._phrases(label)]
            if not phrases or not all(phrases):
                raise ValueError(f"the option {label!r} has a blank name or none at all; give it a name")
            for phrase in phrases:
                if owners.setdefault(phrase, label) != label:
                    raise ValueError(f"{phrase!r} names the options {owners[phrase]!r} and {label!r}; keep it for one")

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label."""
        return tuple(self.options)

    @property
    def version(self) -> str:
        """Hash of the options and settings."""
        letters = False  # (A) and the like stand for no option
        return hash_of(_READING, list(self.options.items()), letters, self.use_names)

    def label(self, texts: Sequence[str]) -> list[str | None]:
        """The label of each text, or None."""
        phrases = {label: self._phrases(label) for label in self.options}
        return [_only(label for _, _, label in mentions(text, phrases)) for text in texts]

    def _phrases(self, label: str) -> tuple[str, ...]:
        return ((label,) if self.use_names else ()) + tuple(self.options[label])


def action_oracle() -> OptionOracle:
    """Read the demo's action tokens, such as ``<refer>``: the token itself, never the bare word."""
    tokens = {action: (questions.action_token(action),) for action in questions.actions()}
    return OptionOracle(tokens, use_names=False, name="action")


def finding_oracle(modality: str) -> OptionOracle:
    """Read the demo's answers about what a phantom of a modality, a key of `MODALITIES`, shows."""
    check_choice("modality", modality, MODALITIES)
    return OptionOracle(questions.finding_phrases(modality), name=f"finding/{modality}")


def default_oracle(asked: QuestionSet) -> Oracle:
    """Oracle for a question set: keywords for safety and refusals, parsers for findings and actions.

    Labels are those of the question set, where it has some.
    """
    if asked.task == "finding":
        modality = asked.id.removeprefix("phantom/").removesuffix(SITE_A)
        if asked.id.startswith("phantom/"):
            return finding_oracle(modality)
        return OptionOracle(dict.fromkeys(asked.labels, ()), name="finding")
    return {"safety": safety_oracle, "action": action_oracle, "jailbreak": refusal_oracle}[asked.task]()


@dataclass(frozen=True)
class ExactMatch:
    """Equivalent: the same characters up to surrounding white space. The naive choice, to compare others with."""

    name: str = field(default="exact", init=False)
    version: str = field(default=f"{_READING}", init=False)

    def equivalent(self, texts: Sequence[str], representative: str) -> list[bool | None]:
        """Whether each text is the representative."""
        return [text.strip() == representative.strip() for text in texts]


@dataclass(frozen=True)
class SameLabel:
    """Equivalent: the oracle gives both the same label; a text without a label is equivalent to nothing."""

    oracle: Oracle

    @property
    def name(self) -> str:
        """Name of the oracle, marked."""
        return f"same-label/{self.oracle.name}"

    @property
    def version(self) -> str:
        """Version of the oracle."""
        return self.oracle.version

    def equivalent(self, texts: Sequence[str], representative: str) -> list[bool | None]:
        """Whether each text has the representative's label."""
        target, *labels = self.oracle.label([representative, *texts])
        return [label in self.oracle.labels and label == target for label in labels]


def _only(labels: Iterable[str]) -> str | None:
    distinct = set(labels)
    return distinct.pop() if len(distinct) == 1 else None


def _frozen(table: Mapping[str, Sequence[str]], what: str) -> dict[str, tuple[str, ...]]:
    for label, entries in table.items():
        if isinstance(entries, str):
            raise ValueError(f"{what}[{label!r}] is the string {entries!r}; give a list of strings: [{entries!r}]")
    if not table:
        raise ValueError(f"{what} is empty; an oracle needs at least one label")
    return {label: tuple(entries) for label, entries in table.items()}
