"""A study in a YAML file: what to run on which models and data sets, checked before anything runs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_args

from medrobust_lib import parameters as notebook_parameters
from medrobust_lib.corruptions.suites import SEVERITIES, check_severity, find_suite
from medrobust_lib.data import wording
from medrobust_lib.smoothing.bounds import check_alpha, check_draws, check_sigma
from medrobust_lib.smoothing.certificate import Mode, Sampling

GRID_PARAMETERS = ("model", "dataset", "seed", "n_images")  # the study's own: it gives them to every notebook
DTYPES = ("auto", "float32", "bfloat16", "float16")
_LONGEST_NAME = 60


class StudyError(ValueError):
    """A study file that cannot be run as it is written."""


@dataclass(frozen=True)
class CertifyStep:
    """Certificates of zero-shot prompts: the arguments of `certify_dataset`, under the same names.

    Attributes
    ----------
    sigmas : tuple of float
        Noise standard deviations, > 0, in [0, 1] pixel units; each is a cell of its own.
    n0, n, alpha, sampling, mode
        As in `certify_dataset`.
    radii : tuple of float
        L2 radii of the table, in [0, 1] pixel units; sequential sampling is asked for them.
    """

    kind: ClassVar[str] = "certify"

    sigmas: tuple[float, ...]
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    sampling: str = "sequential"
    mode: str = "predict"
    radii: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)

    def check(self, datasets: Collection[str]) -> None:
        """Raise a ValueError for numbers that `certify_dataset` would refuse."""
        if not self.sigmas or not self.radii:
            raise StudyError("give at least one value each for sigmas and radii")
        for sigma in self.sigmas:
            check_sigma(sigma)
        check_alpha(self.alpha)
        check_draws(self.n, self.alpha)
        if self.mode == "predict" and self.n0 < 1:
            raise StudyError(f"n0={self.n0}: at least one draw chooses the class")
        if min(self.radii) < 0:
            raise StudyError(f"radii={list(self.radii)}: radii are 0 or more")
        for name, choices in (("sampling", get_args(Sampling)), ("mode", get_args(Mode))):
            _check_choice(name, getattr(self, name), choices)


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

    def check(self, datasets: Collection[str]) -> None:
        """Raise a ValueError for an unknown suite or severity, or a data set that the suite does not know."""
        suite = find_suite(self.suite)
        for dataset in datasets:
            suite.names(dataset)
        if not self.severities or 0 in map(check_severity, self.severities):
            raise StudyError(f"severities={list(self.severities)}: choose from 1, 2, 3, 4, 5")


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


Step = CertifyStep | BenchmarkStep | NotebookStep
STEPS: dict[str, type[CertifyStep] | type[BenchmarkStep]] = {"certify": CertifyStep, "benchmark": BenchmarkStep}


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
        Test images of each data set, a seeded, class-stratified draw; None: all, and in notebooks their default.
    dtype : str
        Precision of the models in certify and benchmark steps, as in `load_model`.
    """

    name: str
    datasets: tuple[str, ...] = field(metadata={"takes": "a list of data set ids, see `medrobust datasets`"})
    steps: tuple[Step, ...] = field(metadata={"takes": "a list of one or more of: certify, benchmark, notebook"})
    models: tuple[str, ...] = field(default=(), metadata={"takes": "a list of model ids, see `medrobust models`"})
    seeds: tuple[int, ...] = (0,)
    n_images: int | None = None
    dtype: str = "auto"

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
        A notebook's parameter is unknown, of the wrong type or out of range.
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
    _check_keys(given, fields(Study), where=str(path))
    steps = given.pop("steps")
    if not isinstance(steps, list) or not steps:
        raise StudyError(f"{path}: steps is a list of one or more of: certify, benchmark, notebook")
    study = Study(
        # Workers and notebooks work in other folders: paths in ids become absolute.
        **{
            name: notebook_parameters.absolute_ids(name, value)
            for name, value in _values(given, Study, where=str(path)).items()
        },
        steps=tuple(_step(step, notebooks, where=f"{path}, step {place}") for place, step in enumerate(steps, start=1)),
    )
    _check_study(study, path, notebooks)
    return study


def notebook_assignments(
    study: Study, step: NotebookStep, *, notebooks: Path | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the grid values (model, dataset, seed) and the checked parameters of every run of a notebook step.

    A notebook without one of these parameters is not repeated over its values.

    Raises
    ------
    ParameterError, ValueError, FileNotFoundError
        As from `medrobust_lib.parameters.assign_parameters`.
    """
    found = _found(step.notebook, notebooks)
    ((number, path),) = found.items()
    known = notebook_parameters.notebook_parameters(path)
    grid = {"model": study.models, "dataset": study.datasets, "seed": study.seeds}
    axes = {name: values if name in known and values else (None,) for name, values in grid.items()}
    for model in axes["model"]:
        for dataset in axes["dataset"]:
            for seed in axes["seed"]:
                chosen = {"model": model, "dataset": dataset, "seed": seed}
                given = {name: value for name, value in chosen.items() if value is not None} | step.parameters
                if study.n_images is not None and "n_images" in known:
                    given["n_images"] = study.n_images
                yield chosen, notebook_parameters.assign_parameters(found, given)[number]


def closest(name: str, valid: Collection[str]) -> str:
    """The valid names, those that look like the given one first."""
    close = wording.closest(name, valid, cutoff=0.5)
    return ", ".join([*close, *(other for other in valid if other not in close)])


def _step(given: Any, notebooks: Path | None, *, where: str) -> Step:
    """One entry of ``steps``: a mapping with its kind as the only key, or a notebook with its parameters."""
    kinds = [*STEPS, "notebook"]
    if isinstance(given, str) and given in STEPS:
        given = {given: {}}
    if not isinstance(given, dict) or not given:
        raise StudyError(f"{where} is {given!r}; write one of {', '.join(kinds)} with its settings")
    kind = next((key for key in given if key in kinds), None)
    if kind is None:
        raise StudyError(
            f"{where}: unknown step {next(iter(given))!r}; there are {closest(str(next(iter(given))), kinds)}"
        )
    if kind == "notebook":
        _check_keys(given, fields(NotebookStep), where=where)
        parameters = given.get("parameters") or {}
        if not isinstance(given["notebook"], str) or not isinstance(parameters, dict):
            raise StudyError(f'{where}: write `notebook: "02"` and, below it, parameters as names with values')
        taken = [name for name in parameters if name in GRID_PARAMETERS]
        if taken:
            plural = {"model": "models", "dataset": "datasets", "seed": "seeds"}.get(taken[0], taken[0])
            raise StudyError(f"{where}: {taken[0]!r} comes from the study; set `{plural}` at the top of the file")
        number = given["notebook"].zfill(2)
        try:
            return NotebookStep(number, parameters | _declared(number, parameters, notebooks))
        except ValueError as error:
            raise StudyError(f"{where}, notebook: {error}") from error
    if len(given) > 1:
        raise StudyError(f"{where} has the keys {', '.join(map(str, given))}; begin each step with a dash of its own")
    settings = given[kind] or {}
    if not isinstance(settings, dict):
        raise StudyError(
            f"{where}: {kind} takes settings with names, such as {kind}: {{{fields(STEPS[kind])[0].name}: ...}}"
        )
    _check_keys(settings, fields(STEPS[kind]), where=f"{where}, {kind}")
    return STEPS[kind](**_values(settings, STEPS[kind], where=f"{where}, {kind}"))


def _found(number: str, notebooks: Path | None) -> dict[str, Path]:
    from medrobust_lib.runner import find_notebooks

    return find_notebooks([number], folder=notebooks)


def _declared(number: str, parameters: Mapping[str, Any], notebooks: Path | None) -> dict[str, Any]:
    """The parameters that a notebook knows, as numbers where it wants numbers."""
    (path,) = _found(number, notebooks).values()
    return notebook_parameters.declared(parameters, notebook_parameters.notebook_parameters(path))


def _check_keys(given: Mapping[Any, Any], known: Sequence[Field[Any]], *, where: str) -> None:
    names = [f.name for f in known]
    for key in given:
        if key not in names:
            raise StudyError(f"{where}: unknown key {key!r}; valid: {closest(str(key), names)}")
    for f in known:
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            takes = f.metadata.get("takes") or notebook_parameters.wanted(f.type)
            raise StudyError(f"{where}: {f.name} is missing; it takes {takes}")


def _values(given: Mapping[str, Any], kind: type, *, where: str) -> dict[str, Any]:
    """Values with the types of a dataclass's fields; a single value stands for a list of one."""
    types = {f.name: f.type for f in fields(kind)}
    return {name: notebook_parameters.typed(value, types[name], f"{where}: {name}") for name, value in given.items()}


def _check_study(study: Study, path: Path, notebooks: Path | None) -> None:
    own_steps = [step for step in study.steps if not isinstance(step, NotebookStep)]
    for name in ("models", "datasets", "seeds") if own_steps else ("datasets", "seeds"):
        if not getattr(study, name):
            raise StudyError(f"{path}: {name} is missing or empty; name at least one")
    if not study.name or len(study.name) > _LONGEST_NAME or "/" in study.name:
        raise StudyError(f"{path}: name: {study.name!r}; give 1 to {_LONGEST_NAME} characters without /")
    if min(study.seeds) < 0:
        raise StudyError(f"{path}: seeds: {list(study.seeds)}; seeds are 0 or more")
    if study.n_images is not None and study.n_images < 1:
        raise StudyError(f"{path}: n_images: {study.n_images}; give 1 or more, or leave it out for all test images")
    _check_choice(f"{path}: dtype", study.dtype, DTYPES)
    for number, step in enumerate(study.steps, start=1):
        if not isinstance(step, NotebookStep):
            try:
                step.check(study.datasets)
            except ValueError as error:
                raise StudyError(f"{path}, step {number}, {step.kind}: {error}") from error
    notebook_parameters.check_models(set(study.models))
    for dataset in study.datasets if own_steps else ():
        size = notebook_parameters.split_size(dataset)
        if study.n_images is not None and study.n_images > size:
            raise StudyError(f"{path}: n_images: {study.n_images}; the test split of {dataset} has {size} images")
    for number, step in enumerate(study.steps, start=1):
        if isinstance(step, NotebookStep):
            try:
                list(notebook_assignments(study, step, notebooks=notebooks))
            except ValueError as error:
                raise StudyError(f"{path}, step {number}, notebook: {error}") from error


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise StudyError(f"{name}: {value!r} is unknown; choose from {closest(value, choices)}")
