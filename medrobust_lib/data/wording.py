"""What each data set's classes are called in a prompt, read from classes.json, the only place of names."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

SITE_A = "-site-a"


@dataclass(frozen=True)
class ClassWording:
    """Names, prompt nouns and templates of one data set.

    Attributes
    ----------
    set_name : str
    wording : str
        ``paper``, ``clear``, or another key of the set's alternatives.
    names : tuple of str
        The source's own class names (folder codes, table values), in label order.
    prompt_nouns : tuple of str
        What stands in the prompt for each label.
    templates : tuple of str
        The first is the papers'; the rest form a small prompt ensemble.
    source : str
        Whose wording it is.
    spellings : dict
        Every accepted spelling, normalised by `spelled`, to its label.
    """

    set_name: str
    wording: str
    names: tuple[str, ...]
    prompt_nouns: tuple[str, ...]
    templates: tuple[str, ...]
    source: str
    spellings: Mapping[str, int]

    def label_of(self, name: str) -> int | None:
        """Label of a class name in any accepted spelling, or None."""
        return self.spellings.get(spelled(name))


def class_wording(set_name: str, *, wording: str = "paper") -> ClassWording:
    """Look up how a data set's classes are named.

    Parameters
    ----------
    set_name : str
        A registry id; ``phantom/X-site-a`` shares the wording of ``phantom/X``.
    wording : {"paper", "clear"}
        The papers' own words, or plainer ones where the papers' say little to a text tower (a set
        without plainer words gives the papers'). ``pathology/sicapv2`` has ``long`` as well.

    Raises
    ------
    ValueError
        Unknown set or wording; the closest names are given.
    """
    table = _table()
    key = set_name.removesuffix(SITE_A) if set_name.startswith("phantom/") else set_name
    if key not in table:
        raise ValueError(f"no class names for {set_name!r}.{suggest(set_name, table)}")
    entry = table[key]
    choices = ("paper", "clear", *(name for name in entry["alternatives"] if name != "clear"))
    if wording not in choices:
        raise ValueError(f"unknown wording {wording!r} for {set_name}.{suggest(wording, choices)}")
    nouns = entry["alternatives"].get(wording, entry["prompt_nouns"])
    return ClassWording(
        set_name=set_name,
        wording=wording,
        names=tuple(entry["names"]),
        prompt_nouns=tuple(nouns),
        templates=tuple(entry["templates"]),
        source=entry["source"],
        spellings=_spellings(entry),
    )


def spelled(name: str) -> str:
    """Reduce a class name to what decides whether two spellings mean the same class."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def suggest(value: str, choices: Any) -> str:
    """Finish an error message: the closest choices, or all of them where none is close."""
    choices = list(choices)
    close = difflib.get_close_matches(value, choices, n=3, cutoff=0.6)
    close = close or [choice for choice in choices if value and value.casefold() in choice.casefold()]
    if close:
        return f" Did you mean {' or '.join(map(repr, close))}?"
    return f" Choose one of: {', '.join(choices)}."


def _table() -> dict[str, dict[str, Any]]:
    return json.loads(files("medrobust_lib.data").joinpath("classes.json").read_text(encoding="utf-8"))


def _spellings(entry: Mapping[str, Any]) -> dict[str, int]:
    # Later lists must not steal a spelling: RSNA's "Normal" and a digit are decided by the first to claim them.
    spellings: dict[str, int] = {}
    for names in (entry["names"], entry["prompt_nouns"], *entry["alternatives"].values()):
        for label, name in enumerate(names):
            spellings.setdefault(spelled(name), label)
    for alias, name in entry.get("aliases", {}).items():
        spellings.setdefault(spelled(alias), entry["names"].index(name))
    for label in range(len(entry["names"])):
        spellings.setdefault(str(label), label)
    return spellings
