"""A study in a YAML file: what to run on which models and data sets, checked before anything runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

from medrobust_lib import checks
from medrobust_lib import parameters as notebook_parameters
from medrobust_lib.corruptions.suites import SEVERITIES, check_severity, find_suite
from medrobust_lib.data.dataset import Draw, check_draw
from medrobust_lib.data.registry import open_split
from medrobust_lib.runner import find_notebooks
from medrobust_lib.smoothing.bounds import ALPHA, N0, N, check_alpha, check_draws, check_sigma
from medrobust_lib.smoothing.certificate import Mode, Sampling
from medrobust_lib.smoothing.table import LEARNED_METHODS, PROMPT_METHODS

# The study gives these to every notebook, from the key of its file.
_GRID = {"model": "models", "dataset": "datasets", "seed": "seeds", "n_images": "n_images"}
_LONGEST_NAME = 60
_TAKES = "a list of one or more of: certify, benchmark, notebook"

Place = tuple[str, str, int | None]  # a model, a data set, a seed


class StudyError(ValueError):
    """A study file that cannot be run as it is written."""


@dataclass(frozen=True)
class CertifyStep:
    """Certificates of prompt methods: the arguments of `certify_dataset`, under the same names.

    Attributes
    ----------
    sigmas : tuple of float
        Noise standard deviations, > 0, in [0, 1] pixel units; each is a cell of its own.
    n0, n, alpha, sampling, mode
        As in `certify_dataset`.
    radii : tuple of float
        L2 radii of the table, in [0, 1] pixel units; sequential sampling is asked for them.
    methods : tuple of str
        Of `medrobust_lib.smoothing.table.PROMPT_METHODS`; none: zero-shot and its ensemble.
    shots, epochs
        Of the methods that learn prompts, as in `learn_prompts`.
    tunable : int or None
        Tokens of the hand-written prompt that zero-shot PromptSmooth moves, as in `prompt_methods`.
    """

    kind: ClassVar[str] = "certify"

    sigmas: tuple[float, ...]
    n0: int = N0
    n: int = N
    alpha: float = ALPHA
    sampling: Sampling = "sequential"
    mode: Mode = "predict"
    radii: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    methods: tuple[str, ...] = ()
    shots: int = 16
    epochs: int = 50
    tunable: int | None = None

    def check(self, study: "Study", notebooks: Path | None) -> None:
        """Raise a ValueError for numbers that `certify_dataset` would refuse."""
        if not self.sigmas or not self.radii:
            raise StudyError("give at least one value each for sigmas and radii")
        for sigma in self.sigmas:
            check_sigma(sigma)
        check_alpha(self.alpha)
        check_draws(self.n, self.alpha)
        if self.mode == "predict":
            checks.check_whole("n0", self.n0, hint=": at least one draw chooses the class")
        if min(self.radii) < 0:
            raise StudyError(f"radii={list(self.radii)}: radii are 0 or more")
        for name in self.methods:
            checks.check_choice("methods", name, PROMPT_METHODS)
        learned = LEARNED_METHODS & set(self.methods)
        checks.check_whole("shots", self.shots, hint=": images of each class to learn prompts from")
        checks.check_whole("epochs", self.epochs)
        if self.tunable is not None:
            checks.check_whole("tunable", self.tunable)
            if "zero-shot PromptSmooth" not in self.methods:
                raise StudyError(f"tunable={self.tunable} is for the method zero-shot PromptSmooth; name it in methods")
        if (self.shots, self.epochs) != (CertifyStep.shots, CertifyStep.epochs) and not learned:
            raise StudyError(f"shots and epochs are for methods that learn: {', '.join(sorted(LEARNED_METHODS))}")
        for dataset in study.datasets if learned else ():
            found = open_split(dataset)
            found = open_split(dataset, split="train") if "train" in found.splits else found
            if missing := [found.classes[k] for k in set(range(len(found.classes))) - set(found.labels.tolist())]:
                raise StudyError(f"{dataset}: no image to learn from of class {', '.join(map(repr, missing))}")

    def assignments(self, study: "Study", notebooks: Path | None) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Yield the place and the parameters of every cell."""
        for place, sigma in product(study.places, self.sigmas):
            own = {name: value for name, value in _json(self).items() if name != "sigmas"}
            yield place, {**study.shared, "sigma": sigma, **own}


@dataclass(frozen=True)
class BenchmarkStep:
    """Zero-shot answers to the corruptions of a suite; errors relative to the study's first model.

    Attributes
    ----------
    suite : str
        "medimeta-c" or "medmnist-c".
    severities : tuple of int
        Of 1 to 5.
    """

    kind: ClassVar[str] = "benchmark"

    suite: str = "medimeta-c"
    severities: tuple[int, ...] = SEVERITIES

    def check(self, study: "Study", notebooks: Path | None) -> None:
        """Raise a ValueError for an unknown suite or severity, or a data set that the suite does not know."""
        suite = find_suite(self.suite)
        for dataset in study.datasets:
            suite.names(dataset)
        if not self.severities or 0 in map(check_severity, self.severities):
            raise StudyError(f"severities={list(self.severities)}: choose from 1, 2, 3, 4, 5")

    def assignments(self, study: "Study", notebooks: Path | None) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Yield the place and the parameters of every cell."""
        for place in study.places:
            yield place, {**study.shared, **_json(self)}


@dataclass(frozen=True)
class NotebookStep:
    """A notebook, by its number; the study sets its model, dataset, seed and n_images where it has them.

    Attributes
    ----------
    notebook : str
        For example "02".
    parameters : dict
        The notebook's other parameters.
    """

    kind: ClassVar[str] = "notebook"

    notebook: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def check(self, study: "Study", notebooks: Path | None) -> None:
        """Raise a ValueError where a parameter cannot work."""
        list(self.assignments(study, notebooks))

    def assignments(self, study: "Study", notebooks: Path | None) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Yield the place and the checked parameters of every cell; it is not repeated over what it has not."""
        found = find_notebooks([self.notebook], folder=notebooks)
        ((number, path),) = found.items()
        known = notebook_parameters.notebook_parameters(path)
        grid = {"model": study.models, "dataset": study.datasets, "seed": study.seeds}
        for place in product(*(values if name in known and values else (None,) for name, values in grid.items())):
            given = {name: value for name, value in zip(grid, place, strict=True) if value is not None}
            if study.n_images is not None and "n_images" in known:
                given["n_images"] = study.n_images
            model, dataset, seed = place
            assigned = notebook_parameters.assign_parameters(found, given | self.parameters)[number]
            yield (model or "", dataset or "", seed), assigned


Step = CertifyStep | BenchmarkStep | NotebookStep
STEPS: dict[str, type[Step]] = {step.kind: step for step in (CertifyStep, BenchmarkStep, NotebookStep)}


@dataclass(frozen=True)
class Study:
    """A grid: every step on every model, data set and seed. `read_study` makes and checks it.

    Attributes
    ----------
    name : str
    datasets : tuple of str
        Ids as of `medrobust datasets`.
    steps : tuple of Step
    models : tuple of str
        Ids as of `medrobust models`; may be left out where every step is a notebook, which takes its default then.
    seeds : tuple of int
        Of the image draw, the noise and the corruptions.
    n_images : int or None
        Test images of each data set, a seeded draw; None: all, and in notebooks their default.
    draw : {"stratified", "balanced"}
        How they are drawn in certify and benchmark steps, as in `load_dataset`; in notebooks always stratified.
    dtype : str
        Precision of the models in certify and benchmark steps, as in `load_model`.
    """

    name: str
    datasets: tuple[str, ...] = field(metadata={"takes": "a list of data set ids, see `medrobust datasets`"})
    steps: tuple[Step, ...] = field(metadata={"takes": _TAKES})
    models: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    n_images: int | None = None
    draw: Draw = "stratified"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @property
    def places(self) -> Iterator[Place]:
        """Every model with every data set and seed."""
        return product(self.models, self.datasets, self.seeds)

    @property
    def shared(self) -> dict[str, Any]:
        """Parameters of all certify and benchmark cells."""
        return {"n_images": self.n_images, "draw": self.draw, "dtype": self.dtype}

    def record(self) -> dict[str, Any]:
        """JSON values; steps are numbered, so that a refusal can name the one that differs."""
        steps = {str(number): {step.kind: asdict(step)} for number, step in enumerate(self.steps, start=1)}
        return asdict(self) | {"steps": steps}


def read_study(path: Path, *, notebooks: Path | None = None) -> Study:
    """Read a study file and check everything that can be known before anything runs.

    Parameters
    ----------
    path : Path
        A YAML file.
    notebooks : Path, optional
        Folder of the notebooks; default: the project's.

    Raises
    ------
    StudyError
        No valid YAML, an unknown key or value (closest valid names given), or a value that cannot work.
    ParameterError
        A value of the wrong type.
    ValueError, FileNotFoundError
        An unknown model, data set or notebook, or one that is not on this computer.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyError(f"no study file at {path}; examples/noise-on-blood.yaml is one to start from")
    given = notebook_parameters.read_yaml(path)
    if not isinstance(given, dict):
        raise StudyError(f"{path} must hold a mapping with the keys {', '.join(f.name for f in fields(Study))}")
    given = {"name": path.stem} | given
    _check_keys(given, Study, where=str(path))
    steps = given.pop("steps")
    if not isinstance(steps, list) or not steps:
        raise StudyError(f"{path}: steps is {_TAKES}")
    # Workers and notebooks work in other folders: paths in ids become absolute.
    values = _values(given, Study, where=str(path))
    values = {name: notebook_parameters.absolute_ids(name, value) for name, value in values.items()}
    steps = [_step(step, notebooks, where=f"{path}, step {place}") for place, step in enumerate(steps, start=1)]
    study = Study(**values, steps=tuple(steps))
    with _located(str(path)):
        _check_study(study)
    notebook_parameters.check_models(set(study.models))
    for number, step in enumerate(study.steps, start=1):
        with _located(f"{path}, step {number}, {step.kind}"):
            step.check(study, notebooks)
    return study


def _json(step: Step) -> dict[str, Any]:
    """The settings of a step as JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(step).items()}


def _step(given: Any, notebooks: Path | None, *, where: str) -> Step:
    """One entry of ``steps``: a mapping with its kind as the only key, or a notebook with its parameters."""
    if isinstance(given, str) and given in STEPS:
        given = {given: {}}
    if not isinstance(given, dict) or not given:
        raise StudyError(f"{where} is {given!r}; write one of {', '.join(STEPS)} with its settings")
    kind = next((key for key in given if key in STEPS), None)
    if kind is None:
        first = str(next(iter(given)))
        valid = notebook_parameters.closest_first(first, STEPS)
        raise StudyError(f"{where}: unknown step {first!r}; there are {valid}")
    if kind == "notebook":
        return _notebook_step(given, notebooks, where=where)
    if len(given) > 1:
        raise StudyError(f"{where} has the keys {', '.join(map(str, given))}; begin each step with a dash of its own")
    settings, step = given[kind] or {}, STEPS[kind]
    if not isinstance(settings, dict):
        first = fields(step)[0].name
        raise StudyError(f"{where}: {kind} takes settings with names, such as {kind}: {{{first}: ...}}")
    _check_keys(settings, step, where=f"{where}, {kind}")
    return step(**_values(settings, step, where=f"{where}, {kind}"))


def _notebook_step(given: dict[str, Any], notebooks: Path | None, *, where: str) -> NotebookStep:
    _check_keys(given, NotebookStep, where=where)
    number, parameters = given["notebook"], given.get("parameters") or {}
    if not isinstance(number, str) or not isinstance(parameters, dict):
        raise StudyError(f'{where}: write `notebook: "02"` and, below it, parameters as names with values')
    for name in parameters:
        if name in _GRID:
            raise StudyError(f"{where}: {name!r} comes from the study; set `{_GRID[name]}` at the top of the file")
    with _located(f"{where}, notebook"):
        ((number, path),) = find_notebooks([number.zfill(2)], folder=notebooks).items()
        known = notebook_parameters.notebook_parameters(path)
        return NotebookStep(number, parameters | notebook_parameters.declared(parameters, known))


def _check_keys(given: Mapping[Any, Any], kind: type, *, where: str) -> None:
    names = [f.name for f in fields(kind)]
    for key in given:
        if key not in names:
            valid = notebook_parameters.closest_first(str(key), names)
            raise StudyError(f"{where}: unknown key {key!r}; valid: {valid}")
    for f in fields(kind):
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            takes = f.metadata.get("takes") or notebook_parameters.wanted(f.type)
            raise StudyError(f"{where}: {f.name} is missing; it takes {takes}")


def _values(given: Mapping[str, Any], kind: type, *, where: str) -> dict[str, Any]:
    """Values with the types of a dataclass's fields; a single value stands for a list of one."""
    types = {f.name: f.type for f in fields(kind)}
    return {name: notebook_parameters.typed(value, types[name], f"{where}: {name}") for name, value in given.items()}


def _check_study(study: Study) -> None:
    alone = all(isinstance(step, NotebookStep) for step in study.steps)
    for name in ("datasets", "seeds") if alone else ("models", "datasets", "seeds"):
        if not getattr(study, name):
            raise StudyError(f"{name} is missing or empty; name at least one")
    if not study.name or len(study.name) > _LONGEST_NAME or "/" in study.name:
        raise StudyError(f"name: {study.name!r}; give 1 to {_LONGEST_NAME} characters without /")
    if min(study.seeds) < 0:
        raise StudyError(f"seeds: {list(study.seeds)}; seeds are 0 or more")
    check_draw(study.draw, n=study.n_images, size="n_images")
    if study.n_images is not None:
        checks.check_whole("n_images", study.n_images, hint="; leave it out for all test images")
    for dataset in () if alone else study.datasets:
        size = notebook_parameters.split_size(dataset)
        if study.n_images is not None and study.n_images > size:
            raise StudyError(f"n_images: {study.n_images}; the test split of {dataset} has {size} images")


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Say where in the file a value stands that cannot work."""
    try:
        yield
    except ValueError as error:
        raise StudyError(f"{where}: {error}") from error
