"""The step ``questions``: certified answers of generative models, several numbers of draws from one bank of answers."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from medrobust_lib import checks
from medrobust_lib.data.questions import PHANTOM_TASKS, QuestionSet, load_questions, safety_wordings
from medrobust_lib.data.registry import QUESTIONS_PREFIX, open_split
from medrobust_lib.experiments import Metric
from medrobust_lib.generative.answers import Drawing, collect_answers
from medrobust_lib.generative.calibration import calibrate_on_answers
from medrobust_lib.generative.certify import certify_questions
from medrobust_lib.generative.judges import remembered_judge
from medrobust_lib.generative.oracles import default_oracle, safety_oracle
from medrobust_lib.metrics.classification import share_interval
from medrobust_lib.models.vision_language import load_vlm
from medrobust_lib.smoothing.bounds import ALPHA, check_alpha, check_draws
from medrobust_lib.smoothing.certificate import GUARANTEES
from medrobust_lib.studies.steps import (
    ALONE,
    CELL_BYTES,
    Cell,
    Estimate,
    Grid,
    Prices,
    Step,
    StudyError,
    Workers,
    places,
    seconds_for,
)

CERTIFIED_ANSWERS = "certified_answers"  # end of the name of the table with one row an image and n
_ANSWER_BYTES = 400  # of a kept answer, about


@dataclass(frozen=True, kw_only=True)
class QuestionsStep(Step):
    """Oracle smoothing of answers: the arguments of `collect_answers` and `certify_questions`, under the same names.

    Attributes
    ----------
    sigma : float
        Noise standard deviation, > 0, in [0, 1] pixel units.
    n : tuple of int
        Numbers of estimation draws; the smaller ones use the first answers of the largest.
    n0, alpha, temperature, max_new_tokens
        As in `certify_questions` and `Drawing`.
    task : {"safety", "finding", "action"}
        As in `load_questions`; MM-SafetyBench has its own.
    judge : str
        ``URL#MODEL`` of a chat server whose model is the oracle, as in `remembered_judge`; default: `default_oracle`.
    calibrate : int
        Images of the val split on whose answers the oracle's errors are counted, for a second certificate of what an
        ideal reader would call the answer, as in `calibrate_on_answers`; 0: none.
    reference : str
        CSV file with the columns text and label: what a person calls such answers. Default: the known wordings, which
        only phantoms' safety questions have.
    """

    kind: ClassVar[str] = "questions"
    generative: ClassVar[bool] = True

    sigma: float
    n: tuple[int, ...]
    n0: int = 10
    alpha: float = ALPHA
    temperature: float = 0.0
    max_new_tokens: int = 64
    task: str = "safety"
    judge: str = ""
    calibrate: int = 0
    reference: str = ""

    def __post_init__(self) -> None:
        if self.reference:  # workers have other working folders
            object.__setattr__(self, "reference", str(Path(self.reference).expanduser().absolute()))

    def check(self, grid: Grid, notebooks: Path | None) -> None:
        """Raise a ValueError for numbers that `certify_questions` would refuse."""
        self._drawing(0)
        checks.check_whole("n0", self.n0)
        check_alpha(self.alpha)
        checks.check_choice("task", self.task, PHANTOM_TASKS)
        if not self.n:
            raise StudyError("n: give at least one number of draws")
        for n in self.n:
            check_draws(n, self.alpha)
        if self.judge and not re.match("https?://[^#]+#.", self.judge):
            raise StudyError("judge is no address with a model; write URL#MODEL")
        checks.check_whole("calibrate", self.calibrate, least=0)
        if self.calibrate:
            self.known_labels()
        elif self.reference:
            raise StudyError("reference says what answers are, for calibrate: give a number of images, too")
        for dataset in grid.datasets if self.calibrate else ():
            if asks_questions(dataset):
                raise StudyError(f"{dataset} has no other images to calibrate on; leave calibrate out")
            if self.calibrate > (size := len(open_split(dataset, split="val").labels)):
                raise StudyError(f"calibrate: {self.calibrate}; the val split of {dataset} has {size} images")

    def cells(self, number: int, grid: Grid, notebooks: Path | None) -> list[Cell]:
        """One for each model, set of questions and seed."""
        shared = {"n_images": grid.n_images, "dtype": grid.dtype}
        return [QuestionsCell(number, self, *place, {**shared, **self.settings()}) for place in places(grid)]

    def known_labels(self) -> dict[str, str]:
        """What an ideal reader calls a text, for calibration."""
        if self.reference:
            if not Path(self.reference).is_file():
                raise StudyError(f"reference: no file at {self.reference}")
            table = pd.read_csv(self.reference, dtype=str, keep_default_na=False)
            if not {"text", "label"} <= set(table):
                raise StudyError(f"{self.reference} has the columns {', '.join(table)}; it needs text and label")
            return dict(zip(table["text"], table["label"], strict=True))
        if self.task != "safety":
            raise StudyError(f"nobody knows how answers to {self.task!r} are to be read; give reference: FILE.csv")
        return {text: label for label in safety_oracle().labels for text in safety_wordings(label)}

    def _drawing(self, seed: int) -> Drawing:
        return Drawing(self.sigma, seed, self.max_new_tokens, self.temperature)


class QuestionsCell(Cell):
    """Certified answers of one model to the questions of one set."""

    def estimate(self, prices: Prices) -> Estimate:
        """Price of all answers."""
        images = prices.images(self.dataset)
        if images is None:
            return Estimate(None, None, None, None)
        draws = images * (self.step.n0 + max(self.step.n)) + self.step.calibrate
        seconds = seconds_for(draws, prices.answering(self))
        return Estimate(images, draws, seconds, CELL_BYTES + draws * _ANSWER_BYTES)

    def run(self, study: Path, *, notebooks: Path | None = None, workers: Workers = ALONE) -> None:
        """Ask, and certify what is answered."""
        step, seed, folder = self.step, self.seed or 0, self.folder(study)
        run = self.begin(study, f"Certified answers of {self.model} on {self.dataset}")
        asked = load_questions(self.dataset, task=step.task, n=self.parameters["n_images"], seed=seed)
        oracle = default_oracle(asked)
        vlm = load_vlm(self.model, dtype=self.parameters["dtype"])
        words = {"n0": step.n0, "n": max(step.n), "jobs": workers.jobs, "store": folder / "store"}
        banks = collect_answers(vlm, asked, step._drawing(seed), **words)
        rules, notes = {"n0": step.n0, "alpha": step.alpha}, []
        with contextlib.ExitStack() as stack:
            if step.judge:
                judge = remembered_judge(step.judge, oracle.labels, folder=folder / "judge")
                oracle = stack.enter_context(judge)
            if step.calibrate:
                others = load_questions(self.dataset, task=step.task, split="val", n=step.calibrate, seed=seed)
                drawing, known = step._drawing(seed), step.known_labels()
                found = calibrate_on_answers(vlm, others, drawing, oracle, reference=known, certified=asked)
                rules["error_model"] = found.one_sided()
                notes.append(
                    f"{found.n} texts of other images tell the oracle's errors. {rules['error_model'].assumption}"
                )
            tables = [certify_questions(banks, asked, oracle, n=n, **rules) for n in sorted(step.n)]
        rows = pd.concat(tables).drop(columns="seconds")
        if spent := [bank.seconds for bank in banks if bank.seconds]:  # the others were kept from before
            self.keep_times(study, an_answer=sum(spent) / len(spent) / (step.n0 + max(step.n)))
        notes += [f"Guarantee {name}: {GUARANTEES[name]}" for name in rows["guarantee"].unique()]
        notes.append(f"Oracle {oracle.name}, version {oracle.version}.")
        notes.append("Certificates of several n share the answers: each is valid on its own, they err together.")
        measured = {"sigma": step.sigma, "questions": asked.task, "oracle": oracle.name}
        run.save_card(
            metrics=_answer_metrics(rows, measured), tables={f"{run.number}_{CERTIFIED_ANSWERS}": rows}, prompts={},
            model={"id": vlm.id, "dtype": vlm.precision, "image_size": vlm.image_size},
            dataset=_described(asked), notes=notes,
        )  # fmt: skip


def _described(asked: QuestionSet) -> dict[str, object]:
    kind = {"synthetic": asked.synthetic, "wording": asked.task, "constant_answer": {asked.task: asked.chance}}
    return {"id": asked.id, "split": "test", "n": len(asked), **kind}


def _answer_metrics(rows: pd.DataFrame, settings: Mapping[str, Any]) -> list[Metric]:
    """Certified share, mean radius and, where truths are known, certified accuracy, for each n."""
    numbers = []
    for (n, guarantee), block in rows.groupby(["n_max", "guarantee"], sort=False):
        certified, size = block["predicted"] >= 0, len(block)
        about = {"of": f"{guarantee}, n={n}", "settings": {**settings, "n": int(n), "guarantee": guarantee}}
        shares = {"certified_share": certified}
        if block["truth"].notna().all():
            shares["smoothed_accuracy"] = certified & (block["predicted"] == block["label"])
        for name, hits in shares.items():
            low, high = share_interval(hits, groups=block.get("patient", ()))
            numbers.append(Metric(name, float(hits.mean()), size, low, high, **about))
        radius = float(block["radius"].where(certified, 0.0).mean())
        numbers.append(Metric("average_certified_radius", radius, size, **about))
    return numbers


def asks_questions(dataset: str) -> bool:
    """Whether an id is one of questions, which have no classes."""
    return dataset.startswith(QUESTIONS_PREFIX)
