"""A study in a YAML file: what to run on which models and data sets, checked before anything runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from medrobust_lib import checks
from medrobust_lib import parameters as notebook_parameters
from medrobust_lib.data.dataset import check_draw
from medrobust_lib.data.questions import scenario_size
from medrobust_lib.models.loading import list_models
from medrobust_lib.runner import find_notebooks
from medrobust_lib.smoothing.paper_methods import PaperMethod
from medrobust_lib.studies.adapt_step import AdaptStep
from medrobust_lib.studies.benchmark_step import BenchmarkStep
from medrobust_lib.studies.certify_step import CertifyStep
from medrobust_lib.studies.notebook_step import NotebookStep
from medrobust_lib.studies.questions_step import QuestionsStep, asks_questions
from medrobust_lib.studies.steps import Cell, Grid, Step, StudyError

STEPS: dict[str, type[Step]] = {
    step.kind: step for step in (CertifyStep, BenchmarkStep, AdaptStep, QuestionsStep, NotebookStep)
}
# The study gives these to every notebook, from the key of its file.
_GRID = {"model": "models", "dataset": "datasets", "seed": "seeds", "n_images": "n_images"}
_LONGEST_NAME = 60
_DATASET_KEYS = ("id", "words", "group")
_TAKES = f"a list of one or more of: {', '.join(STEPS)}"


@dataclass(frozen=True, kw_only=True)
class Study(Grid):
    """A grid: every step on every model, data set and seed, or on those that it names. `read_study` makes it.

    Attributes
    ----------
    name : str
    steps : tuple of Step
    """

    name: str
    steps: tuple[Step, ...] = field(metadata={"takes": _TAKES})

    def narrowed(self, step: Step) -> Grid:
        """What a step runs on."""
        own = {name: getattr(step, name) or getattr(self, name) for name in ("models", "datasets")}
        return Grid(**{f.name: own.get(f.name, getattr(self, f.name)) for f in fields(Grid)})

    def record(self) -> dict[str, Any]:
        """JSON values; steps are numbered, so that a refusal can name the one that differs."""
        steps = {str(number): {step.kind: asdict(step)} for number, step in enumerate(self.steps, start=1)}
        return asdict(self) | {"steps": steps}


def read_study(path: Path, *, notebooks: Path | None = None) -> Study:
    """Read a study file and check everything that can be known before anything runs.

    All mistakes in writing are told together, one a line; once there are none, all values that cannot work.

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
    study = parse_study(notebook_parameters.read_yaml(path), name=path.stem, where=str(path), notebooks=notebooks)
    check_study(study, where=str(path), notebooks=notebooks)
    return study


def parse_study(given: Any, *, name: str, where: str, notebooks: Path | None = None) -> Study:
    """Make a study of what a YAML file holds; whether it can run is told by `check_study`.

    Parameters
    ----------
    given : object
        The file's content.
    name : str
        Of a study that has none.
    where : str
        What a message calls the file.
    notebooks : Path, optional
        As in `read_study`.
    """
    if not isinstance(given, dict):
        raise StudyError(f"{where} must hold a mapping with the keys {', '.join(f.name for f in fields(Study))}")
    given, steps, written = {"name": name} | given, [], []
    with together() as each:
        with each():
            if isinstance(given.get("datasets"), list):
                given["datasets"] = [_dataset(one, where=f"{where}: datasets") for one in given["datasets"]]
            values = filled(given, Study, where=where, without=("steps",))
        with each():
            if "steps" in given and not (isinstance(given["steps"], list) and given["steps"]):
                raise StudyError(f"{where}: steps is {_TAKES}")
            written = given.get("steps", [])
        for place, step in enumerate(written, start=1):
            with each():
                steps.append(_step(step, notebooks, where=f"{where}, step {place}"))
    # Workers and notebooks work in other folders: paths in ids become absolute.
    values = {name: notebook_parameters.absolute_ids(name, value) for name, value in values.items()}
    return Study(**values, steps=tuple(steps))


def _dataset(given: Any, *, where: str) -> Any:
    """An id, of a mapping with what its classes are called and how images are known to be of one patient."""
    if not isinstance(given, dict):
        return given
    for key in given:
        checks.check_choice(f"key of a data set in {where}", key, _DATASET_KEYS)
    if not isinstance(given.get("id"), str):
        raise StudyError(f"{where}: {given}: give the id, {{id: folder:PATH, words: ..., group: ...}}")
    with located(where):
        return notebook_parameters.stated_id(**given)


def check_study(
    study: Study, *, where: str, notebooks: Path | None = None, cells: Sequence[Cell] | None = None
) -> None:
    """Check everything that can be known before anything runs.

    Parameters
    ----------
    study : Study
    where : str
        As in `parse_study`.
    notebooks : Path, optional
        As in `read_study`.
    cells : sequence of Cell, optional
        Those that will run, where not all of them do; what only the others need is not looked for.

    Raises
    ------
    ValueError, FileNotFoundError
        As in `read_study`.
    """
    steps = {number: (step, study.narrowed(step)) for number, step in enumerate(study.steps, start=1)}
    if cells is not None:
        steps = {number: (step, _of_cells(cells, number, grid)) for number, (step, grid) in steps.items()}
    made: list[str] = []
    with together() as each:
        with each(), located(where):
            _check_study(study)
        if not all(isinstance(step, NotebookStep) for step in study.steps):
            for dataset in dict.fromkeys(id for _, grid in steps.values() for id in grid.datasets):
                with each(), located(where):
                    _check_size(study, dataset)
        for number, (step, grid) in steps.items():
            with each(), located(f"{where}, step {number}, {step.kind}"):
                _check_names(step, grid, study, made)
                if cells is None or grid.models:
                    if not isinstance(step, NotebookStep):  # which has checks of its own
                        loaded = {model for model in grid.models if model not in made}
                        notebook_parameters.check_models(loaded, generative=step.generative)
                    step.check(grid, notebooks)
            if isinstance(step, AdaptStep):
                made.append(step.name)


def _of_cells(cells: Sequence[Cell], number: int, grid: Grid) -> Grid:
    """The part of a step's grid that some cells cover."""
    own = [cell for cell in cells if cell.number == number]
    datasets = {id for cell in own for id in (cell.dataset, *cell.parameters.get("learned", ()))}
    narrow = {"models": {cell.model for cell in own}, "datasets": datasets}
    return replace(grid, **{name: tuple(id for id in getattr(grid, name) if id in ids) for name, ids in narrow.items()})


def _check_names(step: Step, grid: Grid, study: Study, made: list[str]) -> None:
    """Raise for models and data sets of a step that the study does not have, and for names that stand for two."""
    for key, known in (("models", [*study.models, *made]), ("datasets", study.datasets)):
        for name in getattr(step, key):
            checks.check_choice(f"{key} of a step", name, known)
    if isinstance(step, AdaptStep):
        _check_name(step.name)
        if step.name in (*study.models, *made, *list_models()["id"]):
            raise StudyError(f"name: {step.name!r} is taken; give the adapted model a name of its own")
        if twice := [model for model in grid.models if model in made]:
            raise StudyError(f"{twice[0]!r} is adapted already; adapt a model of the study")
    if wrong := [dataset for dataset in grid.datasets if asks_questions(dataset) and not step.generative]:
        kind = step.kind
        if not isinstance(step, NotebookStep):
            raise StudyError(f"{wrong[0]} holds questions and has no classes for {kind}; name the step's own datasets")


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
    return step(**filled(settings, step, where=f"{where}, {kind}"))


def _notebook_step(given: dict[str, Any], notebooks: Path | None, *, where: str) -> NotebookStep:
    narrow = filled(given, NotebookStep, where=where, without=("notebook", "parameters"))
    number, parameters = given["notebook"], given.get("parameters") or {}
    if not isinstance(number, str) or not isinstance(parameters, dict):
        raise StudyError(f'{where}: write `notebook: "02"` and, below it, parameters as names with values')
    for name in parameters:
        if name in _GRID:
            raise StudyError(f"{where}: {name!r} comes from the study; set `{_GRID[name]}` at the top of the file")
    with located(f"{where}, notebook"):
        ((number, path),) = find_notebooks([number.zfill(2)], folder=notebooks).items()
        known = notebook_parameters.notebook_parameters(path)
        return NotebookStep(
            notebook=number, parameters=parameters | notebook_parameters.declared(parameters, known), **narrow
        )


def check_keys(given: Mapping[Any, Any], kind: type, *, where: str) -> None:
    """Raise for a key that a dataclass has no field for, and for a field without default that is missing."""
    names = [f.name for f in fields(kind)]
    if unknown := [key for key in given if key not in names]:
        valid = ((key, notebook_parameters.closest_first(str(key), names)) for key in unknown)
        raise StudyError("\n".join(f"{where}: unknown key {key!r}; valid: {names}" for key, names in valid))
    needed = [f for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [f for f in needed if f.name not in given]:
        takes = ((f.name, f.metadata.get("takes") or notebook_parameters.wanted(f.type)) for f in missing)
        raise StudyError("\n".join(f"{where}: {name} is missing; it takes {what}" for name, what in takes))


def typed_values(given: Mapping[str, Any], kind: type, *, where: str) -> dict[str, Any]:
    """Values with the types of a dataclass's fields; a single value stands for a list of one."""
    types, values = {f.name: f.type for f in fields(kind)}, {}
    with together() as each:
        for name, value in given.items():
            with each():
                if get_args(types[name])[:1] == (PaperMethod,):
                    values[name] = _methods(value, where=where)
                else:
                    values[name] = notebook_parameters.typed(value, types[name], f"{where}: {name}")
    return values


def filled(given: Mapping[str, Any], kind: type, *, where: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """Checked keys and typed values of a dataclass, but for the values of some keys."""
    known = {f.name: given[f.name] for f in fields(kind) if f.name in given and f.name not in without}
    values: dict[str, Any] = {}
    with together() as each:
        with each():
            check_keys(given, kind, where=where)
        with each():
            values = typed_values(known, kind, where=where)
    return values


def _methods(given: Any, *, where: str) -> tuple[PaperMethod, ...]:
    """Names of methods, or mappings of one name to its settings."""
    found = []
    for entry in given if isinstance(given, list) else [given]:
        named = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(named, dict) or len(named) != 1:
            raise StudyError(f"{where}: methods: {entry!r}; write a name, or {{NAME: {{shots: 4}}}}")
        ((method, settings),) = named.items()
        if not isinstance(settings, dict | None) or "method" in (settings or {}):
            raise StudyError(f"{where}: methods, {method}: {settings!r}; settings are names with values, {{shots: 4}}")
        settings = {"method": method} | (settings or {})
        settings |= {  # workers have other working folders
            name: str(Path(settings[name]).expanduser().absolute())
            for name in ("checkpoint", "denoiser")
            if isinstance(settings.get(name), str)
        }
        values = filled(settings, PaperMethod, where=f"{where}: methods, {method}")
        with located(f"{where}: methods"):
            found.append(PaperMethod(**values))
    return tuple(found)


def _check_study(study: Study) -> None:
    alone = all(isinstance(step, NotebookStep) for step in study.steps)
    for name in ("datasets", "seeds") if alone else ("models", "datasets", "seeds"):
        if not getattr(study, name):
            raise StudyError(f"{name} is missing or empty; name at least one")
    _check_name(study.name)
    if min(study.seeds) < 0:
        raise StudyError(f"seeds: {list(study.seeds)}; seeds are 0 or more")
    check_draw(study.draw, n=study.n_images, size="n_images")
    if study.n_images is not None:
        checks.check_whole("n_images", study.n_images, hint="; leave it out for all test images")


def _check_size(study: Study, dataset: str) -> None:
    size = split_size(dataset)
    if study.n_images is not None and study.n_images > size:
        raise StudyError(f"n_images: {study.n_images}; the test split of {dataset} has {size} images")


def _check_name(name: str) -> None:
    if not name or len(name) > _LONGEST_NAME or "/" in name or name.startswith("."):
        raise StudyError(f"name: {name!r}; give 1 to {_LONGEST_NAME} characters without /, and no point in front")


def split_size(dataset: str) -> int:
    """Test images, or questions, of a set."""
    return scenario_size(dataset) if asks_questions(dataset) else notebook_parameters.split_size(dataset)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say where in the file a value stands that cannot work."""
    try:
        yield
    except ValueError as error:
        raise StudyError(f"{where}: {error}") from error


@contextmanager
def together() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Collect the errors of several parts, each in a context of its own, and raise them as one, a line each.

    What is told of one place is not told again of others; a single error is raised as it is, and where all is about
    files that are missing, so is the error.
    """
    found: dict[str, Exception] = {}

    @contextmanager
    def each() -> Iterator[None]:
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            found.setdefault(str(error.__cause__ or error), error)

    yield each
    if len(found) == 1:
        raise next(iter(found.values()))
    if found:
        missing = all(isinstance(error, FileNotFoundError) for error in found.values())
        raise (FileNotFoundError if missing else StudyError)("\n".join(map(str, found.values())))
