"""Parameters of notebooks: read, matched by name, checked before a kernel starts."""

import ast
import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

MODEL_PARAMETERS = ("model", "models", "compare_with")
VLM_PARAMETERS = ("vlm",)
DATASET_PARAMETERS = ("dataset", "datasets", "compare", "images")
ALL_AVAILABLE = ["available"]  # in a list of models: every one whose weights are here
_PATH_SCHEMES = ("folder", "csv", "local-dir")
# Which numbers a parameter of this name takes, and how an error says it.
_RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (r"n0?|n_\w+|\w+_draws", lambda value: value >= 1, "1 or more"),
    (r"sigmas?", lambda value: 0 <= value < math.inf, "0 or more (noise std in [0, 1] pixel units)"),
    (
        r"sigmas?",
        lambda value: value <= 10,  # as in bounds.check_sigma
        "10 or less (noise std in [0, 1] pixel units): divide a level in 0 to 255 units by 255",
    ),
    (r"seeds?", lambda value: value >= 0, "0 or more"),
    (r"alpha", lambda value: 0 < value < 1, "a number between 0 and 1"),
    (r"fraction", lambda value: 0 < value <= 1, "a share above 0 and up to 1"),
)
_GENERATIVE_ALPHA = 0.001  # at which notebooks certify generative models
_SCALARS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


class ParameterError(ValueError):
    """A parameter that no selected notebook knows, of the wrong type, or with a value that cannot work."""


def parse_parameters(assignments: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """Read ``name=value`` assignments (values are YAML) on top of a YAML file.

    Raises
    ------
    ParameterError
        An assignment without ``=``, a value that is no YAML, or a file that is no mapping.
    """
    parameters: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(Path(file).read_text())
        except yaml.YAMLError as error:
            raise ParameterError(f"{file} is no valid YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise ParameterError(f"{file} must hold a mapping of parameter names to values")
        parameters |= {str(name): value for name, value in loaded.items()}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ParameterError(f"-p {assignment}: write -p NAME=VALUE")
        try:
            parameters[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ParameterError(f"-p {assignment}: {value!r} is no valid YAML value ({error})") from error
    return parameters


def notebook_parameters(path: Path) -> dict[str, dict[str, Any]]:
    """Names, annotations, defaults and help of a notebook's parameters cell, as papermill reads them."""
    from papermill import inspect_notebook

    return inspect_notebook(str(path))


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
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
            ordered = [*close, *(other for other in names if other not in close)]
            raise ParameterError(
                f"unknown parameter {name!r} for notebook {', '.join(notebooks)}; valid: {', '.join(ordered)}"
            )
    assigned: dict[str, dict[str, Any]] = {}
    for number, specification in known.items():
        assigned[number] = {}
        for name, value in parameters.items():
            if name in specification:
                annotation = str(specification[name]["inferred_type_name"])
                assigned[number][name] = _in_range(name, absolute_ids(name, _checked(name, value, annotation)))
        if set(VLM_PARAMETERS) & specification.keys():
            _check_draws(assigned[number].get("n"))
        _check_judge(assigned[number].get("judge"))
    check_models({id for given in assigned.values() for name in MODEL_PARAMETERS for id in _ids(given.get(name))})
    _check_vlms({id for given in assigned.values() for name in VLM_PARAMETERS for id in _ids(given.get(name))})
    for number, given in assigned.items():
        if given.keys() & {*DATASET_PARAMETERS, "n_images", "wording_of", "prompts"}:
            defaults = {name: _default(spec) for name, spec in known[number].items()}
            if given.get("prompts") and "images" in defaults and not given.get("images"):
                raise ParameterError("parameter prompts: name the images they are for, images=folder:PATH or csv:PATH")
            smallest = _smallest_dataset(defaults | given, wanted=given.get("n_images"))
            if "n_images" in defaults and "n_images" not in given and smallest < defaults["n_images"]:
                given["n_images"] = smallest
    return assigned


def _checked(name: str, value: Any, annotation: str) -> Any:
    """Return the value if it fits the annotation of the parameters cell, else raise."""
    inner = re.fullmatch(r"list\[(\w+)\]", annotation)
    pair = re.fullmatch(r"dict\[(\w+), (\w+)\]", annotation)
    if inner:
        fits = isinstance(value, list) and all(_is_scalar(item, inner[1]) for item in value)
    elif pair:
        entries = value.items() if isinstance(value, dict) else [(None, None)]
        # A class folder may be called 0, which YAML reads as a number.
        fits = all(_is_scalar(str(key), pair[1]) and _is_scalar(item, pair[2]) for key, item in entries)
    else:
        fits = _is_scalar(value, annotation)
    if not fits:
        raise ParameterError(f"parameter {name}={value!r} is {type(value).__name__}, the notebook wants {annotation}")
    return value


def _is_scalar(value: Any, kind: str) -> bool:
    if kind not in _SCALARS:
        return True
    # bool is an int in Python, but `n_images=true` is a mistake.
    return isinstance(value, _SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool))


def _default(specification: Mapping[str, Any]) -> Any:
    """The default value of a parameter; None if its cell computes it."""
    try:
        return ast.literal_eval(specification["default"])
    except (ValueError, SyntaxError):
        return None


def _in_range(name: str, value: Any) -> Any:
    """Return the value if all that it holds can be taken by a parameter of this name, else raise."""
    for item in value if isinstance(value, list) else [value]:
        for pattern, allows, wanted in _RULES:
            if re.fullmatch(pattern, name) and isinstance(item, int | float) and not allows(item):
                raise ParameterError(f"parameter {name}={value!r}: give {wanted}")
        if name == "template" and item and "{}" not in str(item):
            raise ParameterError(f"parameter template={value!r}: write {{}} in the place of the class name")
    return value


def _check_draws(n: int | None) -> None:
    """Raise if so few draws of a generative model's answers can certify nothing."""
    if n is None:
        return
    from medrobust_lib.smoothing.bounds import minimum_draws

    needed = minimum_draws(_GENERATIVE_ALPHA)
    if n < needed:
        raise ParameterError(
            f"parameter n={n}: so few draws certify nothing at alpha {_GENERATIVE_ALPHA:g}; give {needed} or more"
        )


def _check_judge(judge: str | None) -> None:
    """Raise unless a language model can be asked at this address; an empty one asks none."""
    if not judge:
        return
    from medrobust_lib.generative.judge import chat_endpoint

    url, _, model = judge.partition("#")
    try:
        chat_endpoint(url, model=model)
    except ValueError as error:
        raise ParameterError(
            f"parameter judge: {error}. Its form is http(s)://ADDRESS#MODEL, such as "
            "http://localhost:8000/v1/chat/completions#MODEL; empty: no judge"
        ) from error


def _ids(value: Any) -> list[str]:
    """The ids that a parameter names, as a list."""
    if value == ALL_AVAILABLE:
        return []
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str) and item]


def absolute_ids(name: str, value: Any) -> Any:
    """Make the path in each id of a model or data set absolute."""
    if isinstance(value, list | tuple):
        return type(value)(absolute_ids(name, item) for item in value)
    if name not in (*MODEL_PARAMETERS, *VLM_PARAMETERS, *DATASET_PARAMETERS) or not isinstance(value, str):
        return value
    scheme, _, path = value.partition(":")
    return f"{scheme}:{Path(path).expanduser().resolve()}" if scheme in _PATH_SCHEMES and path else value


def check_models(ids: Collection[str]) -> None:
    """Raise unless every model is known and its weights are here or can be downloaded."""
    if not ids:
        return
    from huggingface_hub import constants

    from medrobust_lib.models.registry import available_offline, check_kind, default_weights_dir, find_model

    for id in sorted(ids):
        entry = find_model(id)
        check_kind(entry)
        # Sources that are web pages are fetched by the script only, never by the loader.
        fetched_by_loader = not constants.HF_HUB_OFFLINE and not entry.source.startswith("https://")
        if not available_offline(entry, weights_dir=default_weights_dir()) and not fetched_by_loader:
            raise _not_here(id)


def _check_vlms(ids: Collection[str]) -> None:
    """Raise unless every generative model is known and its weights are here or can be downloaded."""
    if not ids:
        return
    from huggingface_hub import constants

    from medrobust_lib.models.catalogue import BUILT_IN
    from medrobust_lib.models.registry import default_weights_dir
    from medrobust_lib.models.vlm_catalogue import find_vlm
    from medrobust_lib.models.vlm_registry import check_vlm, vlm_available_offline

    for id in sorted(ids):
        entry = find_vlm(id, dual_encoders=[other.id for other in BUILT_IN])
        weights_dir = default_weights_dir()
        check_vlm(entry, weights_dir=weights_dir)
        if constants.HF_HUB_OFFLINE and not vlm_available_offline(entry, weights_dir=weights_dir):
            raise _not_here(id)


def _not_here(id: str) -> FileNotFoundError:
    from medrobust_lib.models.vlm_catalogue import fetch_command

    return FileNotFoundError(
        f"the weights of {id!r} are not on this computer; fetch them where there is a network with\n"
        f"    {fetch_command(id)}"
    )


def _smallest_dataset(parameters: Mapping[str, Any], *, wanted: int | None) -> float:
    """Test images of the smallest data set; raise unless each can be loaded and holds as many as are wanted."""
    from medrobust_lib.data import mm_safetybench
    from medrobust_lib.data.registry import load_dataset

    smallest = math.inf
    for id in dict.fromkeys(id for name in DATASET_PARAMETERS for id in _ids(parameters.get(name))):
        if id.startswith(mm_safetybench.PREFIX):
            smallest = min(smallest, _checked_size(id, mm_safetybench.scenario_size(id), wanted))
            continue
        words: dict[str, Any] = {}
        if id == parameters.get("dataset"):
            words = {"like": parameters.get("wording_of") or None}
        elif id == parameters.get("images") and parameters.get("prompts"):
            words = {"class_names": parameters["prompts"], "templates": ["{}"]}
        # One image of a set meets the errors that the notebook would meet half a minute later.
        size = load_dataset(id, n=1, image_size=64, **words).provenance["split_size"]
        smallest = min(smallest, _checked_size(id, size, wanted))
    return smallest


def _checked_size(id: str, size: int, wanted: int | None) -> int:
    if wanted is not None and wanted > size:
        raise ParameterError(f"parameter n_images={wanted}: the test split of {id} has {size} images")
    return size
