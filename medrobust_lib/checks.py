"""Arguments checked once and alike: each error names the value, what is valid, and the closest of it."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from operator import index


def closest(value: str, choices: Iterable[str], *, n: int = 3, cutoff: float = 0.6) -> list[str]:
    """At most n choices that are spelled like the value, best first; the only one if the case alone differs."""
    by_name = {choice.casefold(): choice for choice in choices}
    if value.casefold() in by_name:
        return [by_name[value.casefold()]]
    return [by_name[name] for name in difflib.get_close_matches(value.casefold(), by_name, n=n, cutoff=cutoff)]


def suggest(value: str, choices: Iterable[str]) -> str:
    """Finish an error message: the closest choices, or all of them where none is close."""
    choices = list(choices)
    close = closest(value, choices)
    close = close or [choice for choice in choices if value and value.casefold() in choice.casefold()]
    if close:
        return f" Did you mean {' or '.join(map(repr, close))}?"
    return f" Choose one of: {', '.join(choices)}."


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not among the choices.

    Raises
    ------
    ValueError
        Naming the value, all choices, and the closest where one is close.
    """
    choices = list(choices)
    if value not in choices:
        close = closest(value, choices, n=1) if isinstance(value, str) else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}{hint}")


def check_keywords(function: Callable, given: Iterable[str], passed_on: Iterable[str]) -> None:
    """Refuse a keyword that a function neither has nor passes on.

    Raises
    ------
    TypeError
        Naming the function that was called, the keyword, and the closest of those it takes, or all.
    """
    own = inspect.signature(function).parameters.values()
    known = [*(one.name for one in own if one.kind is not one.VAR_KEYWORD), *passed_on]
    for name in given:
        if name not in known:
            raise TypeError(f"{function.__name__}() takes no {name!r}.{suggest(name, known)}")


def check_whole(name: str, value: object, *, least: int = 1, most: float = math.inf, hint: str = "") -> int:
    """Return a whole number within bounds as an int; truth values are none.

    Raises
    ------
    ValueError
        Naming the value and the bounds; ``hint`` ends the sentence.
    """
    try:
        whole = None if isinstance(value, bool) else index(value)
    except TypeError:
        whole = None
    if whole is None or not least <= whole <= most:
        bounds = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} is no whole number {bounds}{hint}")
    return whole


def check_positive(name: str, value: object, *, most: float = math.inf, hint: str = "") -> None:
    """Refuse what is no finite number above zero, or lies above ``most``.

    Raises
    ------
    ValueError
        Naming the value and the bounds; ``hint`` ends the sentence.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number <= most or math.isinf(number):
        bounds = "above 0" if most == math.inf else f"above 0 and up to {most:g}"
        raise ValueError(f"{name}={value!r} is no number {bounds}{hint}")
