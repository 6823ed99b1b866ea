"""The papers' own experiments: study files that say which published table they reproduce, and from what they differ.

A protocol is a study file with one key more, ``reproduces``. It stands in the folder ``protocols`` of the project.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medrobust_lib import checks
from medrobust_lib import parameters as notebook_parameters
from medrobust_lib.data.questions import MM_COMMAND, SCENARIOS, list_scenarios, parse_scenario
from medrobust_lib.data.registry import list_datasets
from medrobust_lib.files import size_text
from medrobust_lib.models.catalogue import fetch_command
from medrobust_lib.models.loading import available_offline, find_model
from medrobust_lib.places import default_weights_dir, project_root
from medrobust_lib.smoothing.paper_methods import PaperMethod
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE
from medrobust_lib.studies.adapt_step import AdaptStep
from medrobust_lib.studies.benchmark_step import BenchmarkStep
from medrobust_lib.studies.cells import study_cells
from medrobust_lib.studies.questions_step import QuestionsStep, asks_questions
from medrobust_lib.studies.steps import Cell, Grid, StudyError
from medrobust_lib.studies.study_file import (
    STEPS,
    Study,
    check_keys,
    check_study,
    located,
    parse_study,
    typed_values,
)

EXPECTED = ("lower", "higher", "either", "none")
# The kind of step that each layout of a table is made of; `reproduction` makes them.
LAYOUTS = {
    "certified accuracy": "certify",
    "initial contexts": "certify",
    "certified accuracy, not published": "certify",
    "times": "certify",
    "corruption errors": "benchmark",
    "corruption errors, not published": "benchmark",
    "few-shot variants": "benchmark",
    "numbers of draws": "questions",
}


@dataclass(frozen=True)
class Deviation:
    """One known difference between a protocol and what was published.

    Attributes
    ----------
    what : str
    expect : {"lower", "higher", "either", "none"}
        Where it moves our numbers relative to the published ones.
    """

    what: str
    expect: str

    def __post_init__(self) -> None:
        checks.check_choice("expect", self.expect, EXPECTED)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a protocol says of the table that it reproduces.

    Attributes
    ----------
    paper, table, title : str
    layout : str
        A key of `LAYOUTS`.
    images : int or None
        Number of images behind each published share; 0: all of our test images; None: the paper does not say.
    unstated : tuple of str
        Published rows, by their method, for which the paper does not say it although it does for the others.
    names : mapping of str to str
        The paper's names of our models, data sets and methods.
    deviations : sequence of Deviation
    needs : str
        What else it needs, in words.
    demo : mapping
        ``words``: what takes the place of ids; ``settings``: what takes the place of settings, wherever they stand;
        those of the whole study also where it has none.
    """

    paper: str
    table: str
    title: str
    layout: str
    images: int | None = None
    unstated: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    deviations: tuple[Deviation, ...] = ()
    needs: str = ""
    demo: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.check_choice("layout", self.layout, LAYOUTS)
        if self.images is not None:
            checks.check_whole("images", self.images, least=0)
        twice = [name for name, count in Counter(self.names.values()).items() if count > 1]
        if twice:
            raise ValueError(f"names: two of ours are called {twice[0]!r}; rows would fall together")


@dataclass(frozen=True)
class Protocol:
    """A study and what it reproduces, all of it or a part.

    Attributes
    ----------
    name : str
    published : Published
    study : Study
    only : mapping of str to tuple of str
        Models, data sets and numbers of steps that were asked for; empty: all.
    demo : bool
        Whether it runs on phantoms with the embedded models.
    """

    name: str
    published: Published
    study: Study
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    demo: bool = False

    def cells(self) -> list[Cell]:
        """The cells that were asked for, and those that make their models, in the order of the file."""
        every = study_cells(self.study)
        models, datasets, steps = (self.only.get(key, ()) for key in ("model", "dataset", "step"))
        reference = {
            number: getattr(step, "reference", "") or (*self.study.narrowed(step).models, "")[0]
            for number, step in enumerate(self.study.steps, start=1)
            if isinstance(step, BenchmarkStep)
        }
        base = {cell.model: cell.base for cell in every}
        chosen = [
            cell
            for cell in every
            if not isinstance(cell.step, AdaptStep)
            and (not models or {cell.model, base[cell.model]} & {*models} or cell.model == reference.get(cell.number))
            and (not datasets or cell.dataset in datasets)
            and (not steps or str(cell.number) in steps)
        ]
        if not chosen:
            raise StudyError(f"{self.name} has no cell of {self.part}")
        makers = [cell.source for cell in chosen if cell.source is not None]
        return [cell for cell in every if cell in chosen or cell in makers]

    @property
    def part(self) -> str:
        """What part was run, in words; empty for all of it."""
        return ", ".join(f"{key} {', '.join(values)}" for key, values in self.only.items() if values)

    def missing(self) -> list[str]:
        """What is not on this computer, with its size and the command that fetches it."""
        cells, found = self.cells(), []
        listed = list_datasets().set_index("id")
        for model in dict.fromkeys(cell.base for cell in cells):
            generative = any(isinstance(cell.step, QuestionsStep) for cell in cells if cell.base == model)
            entry = find_model(model, generative=generative)
            if not available_offline(entry, weights_dir=default_weights_dir()):
                bytes_each = 2 if generative else 4  # as they are published
                size = f"about {size_text(bytes_each * entry.parameters)}" if entry.parameters else "of unknown size"
                found.append(f"the weights of {model}, {size}: {fetch_command(model)}")
        learned = [id for cell in cells for id in cell.parameters.get("learned", ())]
        asked = dict.fromkeys([*(cell.dataset for cell in cells if cell.dataset), *learned])
        here = list_scenarios().set_index("id")["available"]
        if lacking := [id for id in asked if asks_questions(id) and not here[id]]:
            questions = sum(SCENARIOS[parse_scenario(id)[0]] for id in lacking)
            found.append(f"{lacking[0]} to {lacking[-1]}, {questions:,} questions with an image each: {MM_COMMAND}")
        for dataset in asked:
            if dataset in listed.index and not listed.loc[dataset, "available"]:
                row = listed.loc[dataset]
                images = row[["train", "val", "test"]].sum()
                size = f"{images:,} images of {row['image size']} px" if images else "images of unknown number"
                found.append(f"{dataset}, {size}: {row['script']}")
        return found

    def check(self) -> None:
        """Raise where something cannot run, before anything does.

        Raises
        ------
        FileNotFoundError
            Weights or data are missing: all of them are named, with sizes and commands.
        ValueError
            As `check_study`, for the part that was asked for.
        """
        if missing := self.missing():
            advice = "or leave it out with --only, or try --demo, which needs nothing"
            raise FileNotFoundError(f"{self.name} needs what is not here:\n  " + "\n  ".join(missing) + f"\n{advice}")
        check_study(self.study, where=self.name, cells=self.cells())


def protocols_folder() -> Path:
    """Where the protocols stand."""
    return project_root() / "protocols"


def list_protocols(*, folder: Path | None = None) -> list[Protocol]:
    """All protocols, by name."""
    folder = protocols_folder() if folder is None else folder
    return [read_protocol(path.stem, folder=folder) for path in sorted(folder.glob("*.yaml"))]


def read_protocol(
    name: str,
    *,
    only: Sequence[str] = (),
    demo: bool = False,
    sequential: bool = False,
    folder: Path | None = None,
) -> Protocol:
    """Read a protocol by its name; whether it can run here is told by `Protocol.check`.

    Parameters
    ----------
    name : str
        Of a file in the folder of protocols, without its ending.
    only : sequence of str
        ``model=ID``, ``dataset=ID`` and ``step=NUMBER``: what to run; several of one kind add up.
    demo : bool
        Put phantoms and the embedded models in place of data and weights, and small numbers in place of large ones.
    sequential : bool
        Sequential sampling at the same alpha in place of fixed.
    folder : Path, optional
        Of the protocols; default: the project's.

    Raises
    ------
    StudyError
        An unknown protocol, key, value, model or data set; the valid ones are named.
    """
    folder = protocols_folder() if folder is None else folder
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise StudyError(f"unknown protocol {name!r}.{checks.suggest(name, known)}")
    given = notebook_parameters.read_yaml(folder / f"{name}.yaml")
    if not isinstance(given, dict) or not isinstance(given.get("reproduces"), dict):
        raise StudyError(f"{folder / name}.yaml is a study without the key reproduces; run it with `medrobust study`")
    with located(f"{name}: reproduces"):
        published = _published(given.pop("reproduces"), where="the key")
    if demo:
        demo_words, demo_settings = (dict(published.demo.get(key) or {}) for key in ("words", "settings"))
        _check_demo(given, published, where=f"{name}: reproduces: demo")
        whole = {name: value for name, value in demo_settings.items() if name in Grid.__dataclass_fields__}
        given = _rewritten(given, demo_words, demo_settings) | whole
    if sequential:
        if not any("certify" in step for step in given.get("steps", ())):
            raise StudyError(f"{name} certifies nothing by votes over classes, so nothing can be sequential")
        given = _rewritten(given, {}, {"sampling": "sequential"})
        told = "Sequential sampling at the same alpha: an image that the draws leave undecided counts as not certified."
        published = replace(published, deviations=(Deviation(told, "lower"), *published.deviations))
    study = parse_study(given, name=name, where=name)
    _check_fits(published, study, where=f"{name}: reproduces")
    return Protocol(name, published, study, _chosen(only, study), demo)


def _check_demo(given: dict[str, Any], published: Published, *, where: str) -> None:
    """Raise for words that stand nowhere in the file, and for settings that nothing has."""
    text, known = repr(given), {*Grid.__dataclass_fields__, *PaperMethod.__dataclass_fields__}
    known |= {name for step in STEPS.values() for name in step.__dataclass_fields__}
    for word in published.demo.get("words") or {}:
        if word not in text:
            raise StudyError(f"{where}: words: {word!r} stands nowhere in the file")
    for setting in published.demo.get("settings") or {}:
        checks.check_choice(f"setting of {where}", setting, sorted(known))


def _published(given: dict[str, Any], *, where: str) -> Published:
    """The key ``reproduces``, checked."""
    check_keys(given, Published, where=where)
    deviations, demo = given.get("deviations") or [], given.get("demo") or {}
    for one in deviations if isinstance(deviations, list) else [deviations]:
        if not isinstance(one, dict):
            raise StudyError(f"{where}: deviations: {one!r}; write a list of {{what: ..., expect: ...}}")
        check_keys(one, Deviation, where=f"{where}: deviations")
    if not isinstance(demo, dict) or not set(demo) <= {"words", "settings"}:
        raise StudyError(f"{where}: demo: {demo!r}; it has words and settings, each names with values")
    plain = {name: value for name, value in given.items() if name not in ("deviations", "demo")}
    values = typed_values(plain, Published, where=where)
    return Published(**values, deviations=tuple(Deviation(**one) for one in deviations), demo=demo)


def _check_fits(published: Published, study: Study, *, where: str) -> None:
    """Raise where a table cannot be made of what the study measures."""
    kind = LAYOUTS[published.layout]
    steps = [step for step in study.steps if step.kind == kind]
    if not steps:
        raise StudyError(f"{where}: layout {published.layout!r} is made of {kind} steps, and there is none")
    if len(study.seeds) != 1:
        raise StudyError(f"{where}: seeds: {list(study.seeds)}; a table is of one seed, so give one")
    if published.layout == "times" and any(len(step.methods) != 1 or len(step.sigmas) != 1 for step in steps):
        raise StudyError(f"{where}: of times, each certify step has one method and one noise level")
    over = {step.perturbation for step in steps if kind == "certify"} - {PIXEL_NOISE.name}
    if over and not published.layout.endswith("not published"):
        raise StudyError(f"{where}: the published certificates are for pixel noise, and a step's are for {min(over)}")
    if over and len({step.perturbation for step in steps}) > 1:
        raise StudyError(f"{where}: radii of several perturbations are in units of their own; make a table of each")
    if published.layout == "few-shot variants" and not all(
        step.jointly for step in study.steps if isinstance(step, AdaptStep)
    ):
        raise StudyError(f"{where}: few-shot variants are LoRA or full fine-tuning; probes and prompts train no tower")


def _rewritten(given: Any, words: Mapping[str, str], settings: Mapping[str, Any]) -> Any:
    """What was read, with other words and settings; lists lose what then stands there twice."""
    if isinstance(given, dict):
        return {
            words.get(key, key): settings[key] if key in settings else _rewritten(value, words, settings)
            for key, value in given.items()
        }
    if isinstance(given, list):
        new = [_rewritten(value, words, settings) for value in given]
        return [value for place, value in enumerate(new) if value not in new[:place]]
    return words.get(given, given) if isinstance(given, str) else given


def _chosen(only: Sequence[str], study: Study) -> dict[str, tuple[str, ...]]:
    names = [step.name for step in study.steps if isinstance(step, AdaptStep)]
    numbers = [str(number) for number in range(1, len(study.steps) + 1)]
    known = {"model": (*study.models, *names), "dataset": study.datasets, "step": numbers}
    chosen: dict[str, tuple[str, ...]] = {}
    for one in only:
        key, mark, value = one.partition("=")
        if not mark or key not in known:
            raise StudyError(f"--only {one!r}: write model=ID, dataset=ID or step=NUMBER")
        checks.check_choice(f"--only {key}", value, known[key])
        chosen[key] = (*chosen.get(key, ()), value)
    return chosen
