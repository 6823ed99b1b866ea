"""What each data set's classes are called in a prompt, read from classes.json, the only place of names."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from medrobust_lib.checks import check_choice, suggest

SITE_A = "-site-a"
ClassNames = Mapping[Any, str] | None  # what to call each class in a prompt


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
    spellings : dict
        Every accepted spelling, normalised by `spelled`, to its label.
    start : str
        Template that per-image adaptation starts from, where the papers' is not the first one; else empty.
    """

    set_name: str
    wording: str
    names: tuple[str, ...]
    prompt_nouns: tuple[str, ...]
    templates: tuple[str, ...]
    spellings: Mapping[str, int]
    start: str = ""

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
    check_choice(f"wording of {set_name}", wording, choices)
    nouns = entry["alternatives"].get(wording, entry["prompt_nouns"])
    names, templates = tuple(entry["names"]), tuple(entry["templates"])
    spellings, start = _spellings(entry), entry.get("start", "")
    return ClassWording(set_name, wording, names, tuple(nouns), templates, spellings, start)


def own_wording(
    codes: Sequence[str], nouns: Sequence[str], *, class_names: ClassNames, templates: Sequence[str] | None, source: str
) -> ClassWording:
    """Words for images that are in no registry: the names of their folders, or what the caller says.

    Parameters
    ----------
    codes : sequence of str
        The folders' names or the table's values, in label order.
    nouns : sequence of str
        The same in words; used where `class_names` is None.
    class_names : mapping of code to prompt noun, optional
        One entry for each code; codes with the same noun become one class, in the place of the first of them.
    templates : sequence of str, optional
        Sentences with one ``{}`` each; neutral ones where None.
    source : str
        File or folder, for errors.

    Returns
    -------
    ClassWording
        ``spellings`` holds every code.

    Raises
    ------
    ValueError
        A code without a noun, a noun for a code that does not exist, an empty noun, or a template without its ``{}``;
        without `class_names` also codes or nouns that are one when `folded`. TypeError for anything but texts.
    """
    if class_names is not None:
        noun_of = _given_nouns(codes, class_names, source)
    else:
        noun_of = dict(zip(codes, nouns, strict=True))
        advice = "give them one name where they are one class, or give class_names with a noun for each"
        check_distinct(codes, f"{source}: classes", advice)
        owner = {folded(noun): code for code, noun in noun_of.items()}
        for code, noun in noun_of.items():
            if owner[folded(noun)] != code:
                raise ValueError(
                    f"{source}: classes {code!r} and {owner[folded(noun)]!r} are both called {noun!r}; {advice}"
                )
    members = {noun: [code for code in codes if noun_of[code] == noun] for noun in noun_of.values()}
    given = [name for name, value in (("class_names", class_names), ("templates", templates)) if value is not None]
    return ClassWording(
        set_name="unregistered",
        wording=" and ".join(given) + " of the call" if given else "own",
        names=tuple(map(" + ".join, members.values())),
        prompt_nouns=tuple(members),
        templates=class_wording("unregistered").templates if templates is None else checked_templates(templates),
        spellings={code: label for label, group in enumerate(members.values()) for code in group},
    )


def checked_templates(templates: Sequence[str], *, source: str = "") -> tuple[str, ...]:
    """Return prompt templates, or raise: texts with one ``{}`` each, at least one; ``source`` begins the message."""
    if isinstance(templates, str):
        raise TypeError(f"{source}templates={templates!r} is one text: give a list, [{templates!r}]")
    if not templates:
        raise ValueError(f"{source}no prompt templates: give at least one such as 'an ultrasound image of {{}}.'")
    for template in templates:
        if not isinstance(template, str):
            raise TypeError(f"{source}template {template!r} is no text")
        if template.count("{}") != 1:
            raise ValueError(f"{source}template {template!r} needs exactly one {{}} in the place of the class name")
    return tuple(templates)


def _given_nouns(codes: Sequence[str], class_names: Mapping[Any, str], source: str) -> dict[str, str]:
    if not isinstance(class_names, Mapping):
        raise TypeError(
            f"class_names={class_names!r}: give a mapping such as {{{codes[0]!r}: 'what to call it in a prompt'}}; a "
            "list would depend on the order of the folders"
        )
    # A name typed here and a folder's name from another system may compose their accents differently.
    found = {composed(code): code for code in codes}
    written = {str(code): noun for code, noun in class_names.items()}
    given = {code if code in codes else found.get(composed(code), code.strip()): noun for code, noun in written.items()}
    for code, noun in given.items():
        if code not in codes:
            raise ValueError(f"class_names: {source} has no class {code!r}.{suggest(code, codes)}")
        if not isinstance(noun, str):
            raise TypeError(f"class_names: the noun of {code!r} is {noun!r}, not a text")
        if not noun.strip():
            raise ValueError(f"class_names: the noun of {code!r} is empty")
    missing = [code for code in codes if code not in given]
    if missing:
        raise ValueError(f"class_names has no noun for {', '.join(map(repr, missing))} of {source}; name every class")
    return {code: given[code].strip() for code in codes}


def spelled(name: str) -> str:
    """Reduce a class name to what decides whether two spellings mean the same class."""
    return re.sub(r"[\W_]+", " ", composed(name)).strip().casefold()


def composed(name: str) -> str:
    """A name with its accents composed (Unicode's form NFC) and without spaces around it."""
    return unicodedata.normalize("NFC", name).strip()


def folded(name: str) -> str:
    """A name without what people do not see as a difference: case, spaces around it, how its letters are composed.

    Unicode's compatibility caseless form (The Unicode Standard, definition D146) without characters that only format
    (category Cf, such as a zero-width space) and without the dot that an i has anyhow; runs of white space as one.
    """
    lower = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold()).replace("i\u0307", "i")
    return " ".join("".join(letter for letter in lower if unicodedata.category(letter) != "Cf").split())


def check_distinct(names: Sequence[str], what: str, advice: str) -> None:
    """Raise ValueError naming the first two names that are one when `folded`; "``what`` A and B ...; ``advice``"."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(folded(name), name)
        if other != name:
            shown = map(ascii if composed(other) == composed(name) else repr, (other, name))
            raise ValueError(
                f"{what} {' and '.join(shown)} differ in case, spaces or the form of letters only; {advice}"
            )


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
