"""Parameters of notebooks: read, matched by name, checked before a kernel starts."""

import ast
import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Optional, Union, get_args, get_origin
from urllib.parse import urlencode

import yaml
from huggingface_hub import constants

from medrobust_lib import checks
from medrobust_lib.data.questions import scenario_size
from medrobust_lib.data.registry import QUESTIONS_PREFIX, load_dataset, path_and_query
from medrobust_lib.files import read_yaml
from medrobust_lib.models.catalogue import fetch_command
from medrobust_lib.models.loading import available_offline, check_kind, find_model
from medrobust_lib.places import default_weights_dir
from medrobust_lib.smoothing.bounds import ALPHA, LARGEST_SIGMA, minimum_draws

MODEL_PARAMETERS = ("model", "models", "compare_with")
VLM_PARAMETERS = ("vlm",)
DATASET_PARAMETERS = ("dataset", "datasets", "compare")
WORDS_PARAMETER = "words"  # what the classes of `dataset` are called
ALL_AVAILABLE = ["available"]  # in a list of models: every one whose weights are here
_PATH_SCHEMES = ("folder", "csv", "local-dir")
# Which numbers a parameter of this name takes, and how an error says it.
_RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (r"n0?|n_\w+|\w+_draws", lambda value: value >= 1, "1 or more"),
    (r"sigmas?", lambda value: value >= 0, "0 or more (noise std in [0, 1] pixel units)"),
    (
        r"sigmas?",
        lambda value: value <= LARGEST_SIGMA,
        f"{LARGEST_SIGMA:g} or less (noise std in [0, 1] pixel units): divide a level in 0 to 255 units by 255",
    ),
    (r"seeds?", lambda value: value >= 0, "0 or more"),
    (r"alpha", lambda value: 0 < value < 1, "a number between 0 and 1"),
    (r"fraction", lambda value: 0 < value <= 1, "a share above 0 and up to 1"),
)
_NOTHING = ("", "null", "none", "~")
_SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# How an error calls one value of a type, several, and what a list of them looks like.
_WORDS = {
    str: ("text, in quotes if it holds ': ' or brackets", "texts", "[one, two]"),
    int: ("a whole number", "whole numbers", "[1, 2]"),
    float: ("a number", "numbers", "[0.1, 0.25]"),
    bool: ("true or false", "true or false", "[true, false]"),
}
# The annotations of a parameters cell, as papermill hands them over: "list[float]".
_DECLARED = {
    formatannotation(kind).replace(" ", ""): kind
    for scalar in _WORDS
    for kind in (scalar, list[scalar], dict[str, scalar], Optional[scalar])  # noqa: UP045 - the text is wanted
}


class ParameterError(ValueError):
    """A parameter that no selected notebook knows, of the wrong type, or with a value that cannot work."""


class _TextDumper(yaml.SafeDumper):
    """Writes every key without the "? " that YAML puts before long ones, and escapes the ends of lines in a text."""

    def analyze_scalar(self, scalar: str) -> yaml.emitter.ScalarAnalysis:
        # Elsewhere than between double quotes YAML folds them, and an end of line that is not "\n" becomes a blank.
        analysis = super().analyze_scalar(scalar)
        if analysis.multiline:
            analysis.allow_flow_plain = analysis.allow_single_quoted = False
        return analysis

    def check_simple_key(self) -> bool:
        return True


def closest_first(name: str, valid: Collection[str]) -> str:
    """The valid names, those that look like the given one first."""
    return ", ".join(dict.fromkeys([*checks.closest(name, valid, cutoff=0.5), *valid]))


def parse_parameters(assignments: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """Read ``name=value`` assignments on top of a YAML file; `assign_parameters` gives the values their types.

    Raises
    ------
    ParameterError
        An assignment without ``=``, a name assigned twice, or a file that is no mapping.
    ValueError, OSError
        A file that is no valid YAML, or cannot be read.
    """
    loaded = {} if file is None else read_yaml(Path(file))
    if not isinstance(loaded, dict):
        raise ParameterError(f"{file} must hold a mapping of parameter names to values")
    given: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip()
        if not equals:
            raise ParameterError(f"-p {assignment}: write -p NAME=VALUE")
        if name in given:
            raise ParameterError(f"-p {name} is given twice, {given[name]} and {value}; a list is [ONE, TWO]")
        given[name] = value
    return {str(name): value for name, value in loaded.items()} | given


def as_written(value: str | list[Any] | dict[str, Any]) -> str:
    """What to write behind ``name=`` for a value of `parse_parameters`."""
    if isinstance(value, str):
        return value
    # Without an end to the line, at which YAML would break a long text.
    how = {"default_flow_style": True, "allow_unicode": True, "sort_keys": False, "width": math.inf}
    return yaml.dump(value, Dumper=_TextDumper, **how).strip()


def typed(value: Any, kind: Any, name: str) -> Any:
    """Return a value in its declared type, whether a person has written it or a program gives it.

    Parameters
    ----------
    value : object
        Text as it is written, also of numbers, lists and mappings; lists and mappings of it; or Python values.
    kind : type or None
        str, int, float or bool; a list, tuple (of values that differ) or dict of them; one of these or None.
        None: no type is declared, and what looks like a number or a list becomes one.
    name : str
        For the message.

    Returns
    -------
    object
        Text stays as it is. One value stands for a list of one, an empty text for a list or mapping of none.

    Raises
    ------
    ParameterError
        The value does not fit; the message names it, or the element of a list or mapping.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is None:
        return _undeclared(value)
    if origin in (Union, UnionType):
        nothing = value is None or (isinstance(value, str) and value.lower() in _NOTHING)
        return None if nothing else typed(value, inner[0], name)
    if origin is dict:
        entries = (read_yaml(value, says=f"{name}={value}") or {}) if isinstance(value, str) else value
        if not isinstance(entries, Mapping):
            raise ParameterError(f"{name}={value!r}: give {wanted(kind)}")
        return {
            typed(key, inner[0], f"a key of {name}"): typed(item, inner[1], f"{name}[{key!r}]")
            for key, item in entries.items()
        }
    if origin in (list, tuple):
        items = read_yaml(value, says=f"{name}={value}") if _is_flow(value, "[") else value
        items = [] if items == "" else items
        if isinstance(items, list | tuple):
            items = [typed(item, inner[0], f"{name}[{place}]") for place, item in enumerate(items)]
            return items if origin is list else tuple(dict.fromkeys(items))
    one = inner[0] if origin in (list, tuple) else kind
    found = _scalar(value, one)
    if found is None:
        raise ParameterError(f"{name}={value!r}: give {wanted(kind)}")
    return found if one is kind else origin([found])


def wanted(kind: Any) -> str:
    """Say in words what a declared type takes."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return wanted(inner[0])
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is dict:
        return f"a mapping of names to {_WORDS[inner[1]][1]}, such as {{NAME: VALUE}}"
    if origin in (list, tuple):
        return f"a list of {_WORDS[inner[0]][1]}, such as {_WORDS[inner[0]][2]}"
    return _WORDS[kind][0]


def _scalar(value: Any, kind: type) -> str | int | float | bool | None:
    """The value as this type; None where it is none."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool):  # an int in Python, but `n_images=true` is a mistake
        return value if kind is bool else None
    if kind is bool:
        return _SWITCHES.get(value.strip().lower()) if isinstance(value, str) else None
    try:
        exact = Decimal(str(value))  # a float holds 16 digits
        number = float(exact)
    except (ArithmeticError, ValueError):
        return None
    if not math.isfinite(number) or (kind is int and exact != int(exact)):
        return None
    return kind(exact)


def _undeclared(value: Any) -> Any:
    if isinstance(value, list):
        return [_undeclared(item) for item in value]
    if isinstance(value, dict):
        return {name: _undeclared(item) for name, item in value.items()}
    if _is_flow(value, "[", "{"):
        return _undeclared(read_yaml(value, says=value))
    found = [_scalar(value, kind) for kind in (int, float, bool)] if isinstance(value, str) else []
    return next((number for number in found if number is not None), value)


def _is_flow(value: Any, *brackets: str) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(brackets)


def notebook_parameters(path: Path) -> dict[str, dict[str, Any]]:
    """Names, annotations, defaults and help of a notebook's parameters cell, as papermill reads them."""
    from papermill import inspect_notebook

    return inspect_notebook(str(path))


def declared(parameters: Mapping[str, Any], specification: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a notebook knows, each `typed` as its cell declares it.

    Parameters
    ----------
    parameters : mapping
    specification : mapping
        From `notebook_parameters`.

    Raises
    ------
    ParameterError
        A value does not fit.
    """
    kinds = {name: str(entry["inferred_type_name"]).replace(" ", "") for name, entry in specification.items()}
    return {
        name: typed(value, _DECLARED.get(kinds[name]), f"parameter {name}")
        for name, value in parameters.items()
        if name in kinds
    }


def assign_parameters(notebooks: Mapping[str, Path], parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give each notebook the parameters it knows, after checking all that can be known before a kernel starts.

    Paths in ids (``folder:``, ``csv:``, ``local-dir:``) become absolute: a notebook works in another folder.
    Where `n_images` is not given and a data set has fewer test images than its default, it becomes their number.

    Raises
    ------
    ParameterError
        Unknown name (closest valid names first), a value of the wrong type or out of its range.
    ValueError, FileNotFoundError
        Unknown model or data set (closest ids named), or one that is not on this computer.
    """
    known = {number: notebook_parameters(path) for number, path in notebooks.items()}
    names = list(dict.fromkeys(name for specification in known.values() for name in specification))
    for name in parameters:
        if name not in names:
            valid = closest_first(name, names)
            raise ParameterError(f"unknown parameter {name!r} for notebook {', '.join(notebooks)}; valid: {valid}")
    assigned: dict[str, dict[str, Any]] = {}
    needed = minimum_draws(ALPHA)  # of a generative model's answers
    for number, specification in known.items():
        # A mapping of a YAML file; notebooks take it as text.
        text = {name: as_written(value) for name, value in parameters.items() if name == WORDS_PARAMETER and value}
        given = declared({**parameters, **text}, specification)
        given = {name: _in_range(name, absolute_ids(name, value)) for name, value in given.items()}
        if set(VLM_PARAMETERS) & specification.keys() and given.get("n", needed) < needed:
            few = f"parameter n={given['n']}: so few draws certify nothing"
            raise ParameterError(f"{few} at alpha {ALPHA:g}; give {needed} or more")
        if given.get("judge"):
            _check_judge(given["judge"])
        assigned[number] = given
    for kinds in (MODEL_PARAMETERS, VLM_PARAMETERS):
        ids = {id for given in assigned.values() for id in _ids(given, kinds)}
        check_models(ids, generative=kinds is VLM_PARAMETERS)
    for number, given in assigned.items():
        if given.keys() & {*DATASET_PARAMETERS, "n_images", WORDS_PARAMETER}:
            defaults = {name: _default(spec) for name, spec in known[number].items()}
            if given.get(WORDS_PARAMETER) and not (defaults | given).get("dataset"):
                raise ParameterError("parameter words: name the images they are for, dataset=folder:PATH or csv:PATH")
            smallest = _smallest_dataset(defaults | given, wanted=given.get("n_images"))
            if "n_images" in defaults and "n_images" not in given and smallest < defaults["n_images"]:
                given["n_images"] = smallest
    return assigned


def _default(specification: Mapping[str, Any]) -> Any:
    """The default value of a parameter; None if its cell computes it."""
    try:
        return ast.literal_eval(specification["default"])
    except (ValueError, SyntaxError):
        return None


def _in_range(name: str, value: Any) -> Any:
    """Return the value if all that it holds can be taken by a parameter of this name, else raise."""
    items = {f"[{place}]": item for place, item in enumerate(value)} if isinstance(value, list) else {"": value}
    for place, item in items.items():
        shown = f"parameter {name}{place}={item!r}"
        for pattern, allows, needed in _RULES:
            if re.fullmatch(pattern, name) and isinstance(item, int | float) and not allows(item):
                raise ParameterError(f"{shown}: give {needed}")
        if name == "template" and item and str(item).count("{}") != 1:
            raise ParameterError(f"{shown}: write {{}} once, in the place of the class name")
    return value


def _check_judge(judge: str) -> None:
    """Raise unless a language model can be asked at this address."""
    from medrobust_lib.generative.judges import chat_endpoint

    url, _, model = judge.partition("#")
    try:
        chat_endpoint(url, model=model)
    except ValueError as error:
        form = "http(s)://ADDRESS#MODEL, such as http://localhost:8000/v1/chat/completions#MODEL; empty: no judge"
        raise ParameterError(f"parameter judge: {error}. Its form is {form}") from error


def _ids(given: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The ids that parameters of these names hold, each once."""
    values = [given[name] for name in names if name in given and given[name] != ALL_AVAILABLE]
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in dict.fromkeys(items) if isinstance(item, str) and item]


def absolute_ids(name: str, value: Any) -> Any:
    """Make the path in each id of a model or data set absolute, and that of a file of words."""
    if isinstance(value, list | tuple):
        return type(value)(absolute_ids(name, item) for item in value)
    if name == WORDS_PARAMETER and os.path.isfile(value):  # noqa: PTH113 - what is too long a path is none
        return str(Path(value).resolve())
    if name not in (*MODEL_PARAMETERS, *VLM_PARAMETERS, *DATASET_PARAMETERS) or not isinstance(value, str):
        return value
    scheme, _, path = value.partition(":")
    if scheme not in _PATH_SCHEMES or not path:
        return value
    path, query = path_and_query(path)
    return f"{scheme}:{Path(path).expanduser().resolve()}" + (f"?{query}" if query else "")


def stated_id(id: str, **options: Any) -> str:
    """An id with what `load_dataset` is to be told behind its path, where an id alone can be given.

    Parameters
    ----------
    id : str
        ``folder:PATH`` or ``csv:PATH``.
    **options
        words and group; words may be a mapping, or the path of a file, which becomes absolute. Empty ones are left out.

    Raises
    ------
    ParameterError
        Options for a set that is not one's own.
    """
    texts = {name: as_written(value) for name, value in options.items() if value}
    if texts and not id.startswith(("folder:", "csv:")):
        raise ParameterError(f"{' and '.join(texts)}: {id} is not yours; they are for folder:PATH and csv:PATH")
    texts = {name: absolute_ids(name, text) for name, text in texts.items()}
    stated = path_and_query(id.partition(":")[2])[1]
    return f"{id}{'&' if stated else '?'}{urlencode(texts)}" if texts else id


def check_models(ids: Collection[str], *, generative: bool = False) -> None:
    """Raise unless every model, or generative model, is known and its weights are here or can be downloaded."""
    weights_dir = default_weights_dir()
    for id in sorted(ids):
        entry = find_model(id, generative=generative)
        check_kind(entry, weights_dir=weights_dir)
        # Sources that are web pages are fetched by the script only, never by the loader.
        fetched_by_loader = not constants.HF_HUB_OFFLINE and not entry.source.startswith("https://")
        if not available_offline(entry, weights_dir=weights_dir) and not fetched_by_loader:
            fetch = f"fetch them where there is a network with\n    {fetch_command(id)}"
            raise FileNotFoundError(f"the weights of {id!r} are not on this computer; {fetch}")


def _smallest_dataset(parameters: Mapping[str, Any], *, wanted: int | None) -> float:
    """Test images of the smallest data set; raise unless each can be loaded and holds as many as are wanted."""
    smallest = math.inf
    for id in _ids(parameters, DATASET_PARAMETERS):
        words = {"words": parameters.get(WORDS_PARAMETER)} if id == parameters.get("dataset") else {}
        size = scenario_size(id) if id.startswith(QUESTIONS_PREFIX) else split_size(id, **words)
        if wanted is not None and wanted > size:
            raise ParameterError(f"parameter n_images={wanted}: the test split of {id} has {size} images")
        smallest = min(smallest, size)
    return smallest


def split_size(id: str, **words: Any) -> int:
    """Test images of a data set; ``words`` go to `load_dataset`, whose errors are raised.

    One image is read: it meets the errors that a measurement would meet half a minute later.
    """
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # one image does not speak for the set
        return load_dataset(id, n=1, image_size=64, **words).provenance["split_size"]
