"""What a generative model and an oracle must offer, and checks that they do before anything is drawn."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


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
    missing = [
        f"`{name}`, {meaning}"
        for name, meaning in (("name", "a string"), ("version", "a string that changes whenever an answer could"))
        if not isinstance(getattr(oracle, name, None), str)
    ]
    if labelled and not _are_labels(getattr(oracle, "labels", None)):
        missing.append("`labels`, a tuple of every label as a string")
    if missing:
        raise TypeError(f"the oracle {_what(oracle)} lacks {' and '.join(missing)}; give it these attributes")


def _are_labels(labels: Any) -> bool:
    return isinstance(labels, list | tuple) and bool(labels) and all(isinstance(label, str) for label in labels)


def _what(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__
