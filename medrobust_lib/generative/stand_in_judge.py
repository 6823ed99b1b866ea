"""A stand-in for a language model as judge, for demonstrations without one."""

import re
from collections.abc import Mapping, Sequence

from sklearn.feature_extraction.text import TfidfVectorizer

from medrobust_lib.generative.oracle import fingerprint

_FENCED = re.compile(r"^~{8,}\n(.*?)\n~{8,}$", re.DOTALL | re.MULTILINE)
_FAMILIAR = 0.35  # cosine below which no known wording is similar enough for an answer


class StandInJudge:
    """Answers a `JudgeOracle`'s prompts with the label of the most similar known wording, in a sentence.

    Similarity is the cosine of TF-IDF weights of runs of three to five characters, so wordings that were never seen are
    often judged right, and sometimes wrong, as by a language model. It is none, and says so in its version.

    Parameters
    ----------
    wordings : mapping of str to sequence of str
        Label to texts that have it.
    """

    def __init__(self, wordings: Mapping[str, Sequence[str]]) -> None:
        self._labels = [label for label, texts in wordings.items() for _ in texts]
        known = [text for texts in wordings.values() for text in texts]
        self._vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5))
        self._known = self._vectorizer.fit_transform(known)
        self.version = (
            f"stand-in without a language model, {fingerprint(sorted(zip(self._labels, known, strict=True)))}"
        )

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        """Reply to each prompt; None where it holds no fenced text."""
        texts = [_FENCED.search(prompt) for prompt in prompts]
        similar = self._vectorizer.transform([match[1] if match else "" for match in texts]) @ self._known.T
        best, value = similar.argmax(axis=1).A1, similar.max(axis=1).toarray().ravel()
        return [
            None
            if match is None
            else f"The label is {self._labels[place]}."
            if cosine >= _FAMILIAR
            else "I cannot tell."
            for match, place, cosine in zip(texts, best, value, strict=True)
        ]
