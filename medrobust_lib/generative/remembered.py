"""Labels of an oracle on disk: a slow or paid judge is asked once about each text, and never twice."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from medrobust_lib.experiments import open_store
from medrobust_lib.generative.oracle import Oracle


class RememberedOracle:
    """An oracle whose labels stay in a folder, which is sound because an oracle is a fixed function of the text.

    A context manager. When the oracle stops in the middle, because its endpoint went away for example, the labels it
    gave before are there for the next run. Texts at which it raises are not remembered.

    Parameters
    ----------
    oracle : Oracle
    folder : path
        Belongs to this oracle at this version; others are refused.
    chunk : int
        Texts asked about at a time; at most so many labels are lost when the oracle stops.

    Raises
    ------
    ValueError
        The folder holds labels of another oracle or version, or other things; chunk below 1.
    """

    def __init__(self, oracle: Oracle, folder: Path | str, *, chunk: int = 16) -> None:
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: at least one text is asked about at a time")
        self.oracle, self.chunk = oracle, chunk
        parameters = {"oracle": oracle.name, "version": oracle.version, "labels": list(oracle.labels)}
        self._store = open_store(folder, parameters=parameters)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    @property
    def name(self) -> str:
        """Name of the oracle."""
        return self.oracle.name

    @property
    def version(self) -> str:
        """Version of the oracle."""
        return self.oracle.version

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the oracle."""
        return self.oracle.labels

    def label(self, texts: Sequence[str]) -> list[str | None]:
        """Labels of texts; the oracle is asked about new ones only, each once.

        Raises
        ------
        ValueError
            The oracle returned something else than one of its labels, or None, for each text; nothing of it is kept.
        """
        new = [text for text in dict.fromkeys(texts) if _key(text) not in self._store]
        for start in range(0, len(new), self.chunk):
            part = new[start : start + self.chunk]
            for text, label in zip(part, self._checked(self.oracle.label(part), len(part)), strict=True):
                self._store.append(_key(text), [{"text": text, "label": label}], seconds=0.0)
        return [self._store.rows(_key(text))[0]["label"] for text in texts]

    def _checked(self, labels: Sequence[str | None], count: int) -> Sequence[str | None]:
        """Refuse what would be kept for ever: labels of other texts, or none of the oracle's."""
        if len(labels) != count:
            raise ValueError(f"the oracle {self.name!r} returned {len(labels)} labels for {count} texts")
        strange = [label for label in labels if label is not None and label not in self.labels]
        if strange:
            raise ValueError(
                f"the oracle {self.name!r} returned the label {strange[0]!r}; its labels are {', '.join(self.labels)}"
            )
        return labels


def _key(text: str) -> str:
    # Half a surrogate pair is what a model that counts UTF-16 units leaves where it cuts an answer.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
