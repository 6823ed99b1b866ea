"""The step ``certify``: certificates of the papers' methods, from one bank of noise for each model and noise level."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from medrobust_lib import checks, metrics
from medrobust_lib.adaptation.retraining import retrain_on_noise
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import load_dataset, open_split
from medrobust_lib.data.splits import LearningSplits, learning_splits
from medrobust_lib.experiments import Metric, Run
from medrobust_lib.files import read_tensors, write_tensors
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.loading import list_models
from medrobust_lib.models.weights import explained_errors
from medrobust_lib.parameters import check_models, split_size
from medrobust_lib.plots.figures import legend_beside, plot_certified_accuracy
from medrobust_lib.smoothing.bounds import ALPHA, N0, Bounds, N, check_alpha, check_draws, minimum_draws
from medrobust_lib.smoothing.certificate import GUARANTEES, Mode, Sampling
from medrobust_lib.smoothing.denoisers import find_denoiser, load_denoiser
from medrobust_lib.smoothing.methods import AdaptedPrompts, FixedPrompts, zero_shot_methods
from medrobust_lib.smoothing.paper_methods import (
    ADAPTED_METHODS,
    CANDIDATES,
    READS,
    RETRAINED,
    PaperMethod,
    prompt_methods,
)
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE, Perturbation, find_perturbation
from medrobust_lib.smoothing.sequential import operating_characteristics, sequential_plan
from medrobust_lib.smoothing.table import certify_dataset
from medrobust_lib.studies.steps import (
    ALONE,
    CELL_BYTES,
    PASSES,
    Cell,
    Estimate,
    Grid,
    Prices,
    Step,
    StudyError,
    Workers,
    described,
    places,
    seconds_for,
    short_id,
    shown_id,
)

CERTIFICATES = "certificates"  # end of the name of the table with one row an image
_KEY = "re-trained"
_CERTIFICATE_BYTES = 1_100  # of a row, in the journal and in two tables, about


@dataclass(frozen=True, kw_only=True)
class CertifyStep(Step):
    """Certificates: the arguments of `certify_dataset`, under the same names.

    Attributes
    ----------
    sigmas : tuple of float
        Noise standard deviations, > 0, in the units of the perturbation; each is a cell of its own.
    perturbation : str
        Name of what is smoothed over, one with a single parameter: contrast-brightness takes pairs of sigmas.
    n0, n, alpha, sampling, mode, bounds
        As in `certify_dataset`.
    n_by_sigma : dict of float to int
        Another n for some of the noise levels.
    radii : tuple of float
        Radii of the table in the units of the perturbation, for pixel noise L2 in [0, 1] pixel units; sequential
        sampling is asked for them.
    methods : tuple of PaperMethod
        None: zero-shot and its ensemble.
    """

    kind: ClassVar[str] = "certify"

    sigmas: tuple[float, ...]
    perturbation: str = PIXEL_NOISE.name
    n0: int = N0
    n: int = N
    n_by_sigma: dict[float, int] = field(default_factory=dict)
    alpha: float = ALPHA
    sampling: Sampling = "sequential"
    mode: Mode = "predict"
    bounds: Bounds | None = None
    radii: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    methods: tuple[PaperMethod, ...] = field(
        default=(), metadata={"takes": f"names, or {{NAME: {{shots: 4}}}}, of {', '.join(READS)}"}
    )

    @property
    def selects(self) -> bool:
        """Whether selection draws choose a class, or between one bound and two."""
        return self.mode == "predict" or self.bounds == "two"

    @property
    def family(self) -> Perturbation:
        """What is smoothed over."""
        return find_perturbation(self.perturbation)

    def draws_of(self, sigma: float) -> int:
        """The n of a noise level."""
        return self.n_by_sigma.get(sigma, self.n)

    def check(self, grid: Grid, notebooks: Path | None) -> None:
        """Raise a ValueError for numbers that `certify_dataset` would refuse, and for classes nobody can learn."""
        if not self.sigmas or not self.radii:
            raise StudyError("give at least one value each for sigmas and radii")
        check_alpha(self.alpha)
        self._check_perturbation(grid)
        for key in self.n_by_sigma:
            if key not in self.sigmas:
                raise StudyError(f"n_by_sigma: {key:g} is none of sigmas={list(self.sigmas)}")
        for sigma in self.sigmas:
            check_draws(self.draws_of(sigma), self.alpha)
        least = int(self.selects)
        what = "the class" if self.mode == "predict" else "between one bound and two"
        hint = f": at least one draw chooses {what}" if least else ""
        checks.check_whole("n0", self.n0, least=least, hint=hint)
        if min(self.radii) < 0:
            raise StudyError(f"radii={list(self.radii)}: radii are 0 or more")
        for method in self.methods:
            if method.method == RETRAINED and grid.dtype == "int8":
                raise StudyError(f"dtype: int8; an image tower in int8 cannot learn ({method.name}), take float32")
            for dataset in grid.datasets if "denoiser" in READS[method.method] else ():
                load_denoiser(method.denoiser or find_denoiser(method.method, dataset))
            if method.checkpoint and not Path(method.checkpoint).is_file():
                raise StudyError(f"{method.name}: no checkpoint at {method.checkpoint}")
        names = [short_id(method.name) for method in self.methods]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise StudyError(
                f"two methods are called {repeated[0]!r}, or nearly; give each a name of its own, name: ..."
            )
        for dataset in grid.datasets if any(method.learns for method in self.methods) else ():
            found = open_split(dataset)
            found = open_split(dataset, split="train") if "train" in found.splits else found
            if missing := [found.classes[k] for k in set(range(len(found.classes))) - set(found.labels.tolist())]:
                raise StudyError(f"{dataset}: no image to learn from of class {', '.join(map(repr, missing))}")

    def _check_perturbation(self, grid: Grid) -> None:
        """Raise for levels of other units, also of learning, and for methods that need noise on pixels."""
        family = self.family
        if isinstance(family.usual_sigma, tuple):
            raise StudyError(
                f"perturbation={self.perturbation!r} takes pairs of sigmas, and a cell has one number; call "
                f"certify_dataset(..., sigmas=[{family.usual_sigma}], perturbation={self.perturbation!r})"
            )
        known = list_models()
        sides = known.loc[known["id"].isin(grid.models), "image_size"].unique().tolist()
        for sigma in self.sigmas:
            family.check_sigma(sigma)
            for side in sides:
                family.check_image((3, side, side), sigma)
        for method in self.methods if family != PIXEL_NOISE else ():
            if "denoiser" in READS[method.method]:
                raise StudyError(
                    f"{method.name} removes noise from pixels, and {self.perturbation!r} adds none; leave it out"
                )
            for level in method.sigmas:
                if level:
                    family.check_sigma(level)

    def cells(self, number: int, grid: Grid, notebooks: Path | None) -> list[Cell]:
        """One for each model, data set, seed and noise level."""
        own = {name: value for name, value in self.settings().items() if name not in ("sigmas", "n_by_sigma")}
        return [
            CertifyCell(number, self, *place, {**grid.shared, **own, "sigma": sigma, "n": self.draws_of(sigma)})
            for place in places(grid)
            for sigma in self.sigmas
        ]


class CertifyCell(Cell):
    """Certificates of the methods with one model at one noise level."""

    @property
    def variant(self) -> str:
        """The noise level."""
        return f"{_named(self.step.perturbation)}sigma {self.parameters['sigma']:g}"

    @property
    def most_draws(self) -> int:
        """Draws of one image, selection draws included; sequential sampling stops earlier."""
        return (self.step.n0 if self.step.selects else 0) + self.parameters["n"]

    def unanimous_draws(self) -> float:
        """Expected draws of an image whose noisy copies all get the same answer, in sequential sampling."""
        step, family, n = self.step, self.step.family, self.parameters["n"]
        sigma = family.unit(self.parameters["sigma"])
        plan = sequential_plan(sigma=sigma, radii=step.radii, n=n, alpha=step.alpha, law=family.law)
        return operating_characteristics(plan, 1.0)[1] + self.most_draws - n

    def estimate(self, prices: Prices) -> Estimate:
        """Price of all draws, and of learning."""
        images, methods = prices.images(self.dataset), self.step.methods
        if images is None:
            return Estimate(None, None, None, None)
        kinds = [one.denoiser or one.method if "denoiser" in READS[one.method] else "" for one in methods]
        kinds = {one.method if one.method == RETRAINED else kind for one, kind in zip(methods, kinds, strict=True)}
        towers = max(1, len(kinds))  # what stands in front of a tower makes it another one
        adapting = AdaptedPrompts.n_adapt * any(one.method in ADAPTED_METHODS for one in methods)
        draws = images * (self.most_draws * towers + adapting)
        if learned := [one for one in methods if one.learns]:
            n_classes, drawn = prices.classes(self.dataset), {}
            for one in learned:
                several = CANDIDATES if one.method == "candidate set" else 1
                times = PASSES * one.epochs if one.method == RETRAINED else one.draws_per_image
                # All but these two start from the same few-shot prompts.
                what = (one.method in ("CoOp", RETRAINED) and one.method, one.seed, one.shots, times)
                drawn[what] = max(drawn.get(what, 0), several)
            draws += sum(n_classes * shots * times * several for (*_, shots, times), several in drawn.items())
        size = CELL_BYTES + 2 * images * _CERTIFICATE_BYTES * max(2, len(methods))
        return Estimate(images, draws, seconds_for(draws, prices.rate(self.base)), size)

    def run(self, study: Path, *, notebooks: Path | None = None, workers: Workers = ALONE) -> None:
        """Certify every image."""
        run, model = self.begin(study, f"Certificates of {self.model} on {self.shown}"), self.encoder(study)
        step, sigma, seed = self.step, self.parameters["sigma"], self.seed or 0
        learning = self._splits() if any(one.learns for one in step.methods) else None
        data = learning.test if learning else self.images()
        notes = self._learned_from(learning) if learning else []
        rules = {name: self.parameters[name] for name in ("n0", "n", "alpha", "sampling", "mode", "bounds", "radii")}
        rules |= {"sigmas": [sigma], "perturbation": step.family, "seed": seed, **workers._asdict()}
        one_tower = [one for one in step.methods if one.method != RETRAINED]
        methods = zero_shot_methods(model, data)
        if step.methods:
            sets = {"train": learning.train, "pool": learning.pool} if learning else {}
            kept = study / "prompts" / f"{short_id(self.model)}_{short_id(self.dataset)}_seed{seed}"
            started = time.monotonic()
            sets |= {"sigma": sigma, "perturbation": step.family}
            methods = prompt_methods(model, data, one_tower, seed=seed, kept=kept, **sets)
            self.keep_times(study, training=time.monotonic() - started)
        store, tables = self.folder(study), []
        if methods:
            tables.append(certify_dataset(model, data, methods, store=store / "store", **rules))
        for one in step.methods:
            if one.method == RETRAINED:
                kept = store / RETRAINED / short_id(one.name)
                path = kept.with_suffix(".safetensors")
                tower = _retrained(path, model, learning.train, one, sigma=sigma, perturbation=step.family, seed=seed)
                texts = FixedPrompts(one.name, tower.class_features(data.classes, data.templates[:1]))
                tables.append(certify_dataset(tower, data, [texts], store=kept, **rules))
        rows = pd.concat(tables).assign(model=self.model)
        self.keep_times(study, an_image=float(rows.groupby("image")["seconds"].first().mean()))
        rows = rows.drop(columns="seconds").sort_values(["image", "sigma"], kind="stable", ignore_index=True)
        shares = metrics.certified_accuracy(rows, radii=step.radii)
        notes += [f"Guarantee {name}: {GUARANTEES[name]}" for name in rows["guarantee"].unique()]
        if step.mode == "evaluate":
            notes.append("The known label was tested (mode evaluate): for tables only, no prediction was certified.")
        figure = Figure()
        plot_certified_accuracy(shares, axes := figure.subplots(), chance=1 / len(data.classes))
        legend_beside(axes)
        run.save_figure(figure, "headline", caption=f"Certified accuracy over the radius: {self.label}")
        numbers = _certificate_metrics(metrics.certification_summary(rows), shares)
        tables = {f"{run.number}_{CERTIFICATES}": rows, f"{run.number}_certified_accuracy": shares}
        prompts = {"templates": list(data.templates), "classes": list(data.classes)}
        radius = next(filter(None, step.radii), 0.0)
        said = described(model, data, notes, name=self.model)
        said["question"] = f"Which answers of {self.model} on {data.id} hold under every small change?"
        said["findings"] = certified_in_words(rows, shares, data, radius=radius, side=model.image_size)
        self.keep_images(run, rows, data)
        run.save_card(metrics=numbers, tables=tables, prompts=prompts, **said)

    def keep_images(self, run: Run, rows: pd.DataFrame, data: ImageDataset) -> None:
        """Keep what a page of single images needs; a study has too many cells for that."""

    def _splits(self) -> LearningSplits:
        """Images to learn from, to adapt to and to certify, none of them twice."""
        asked, seed = self._asked, self.seed or 0
        shots = max(one.shots for one in self.step.methods if one.learns)
        words = {"shots": shots, "n_test": asked, "n_pool": asked, "seed": seed, "draw": self.parameters["draw"]}
        return learning_splits(self.dataset, **words)

    @property
    def _asked(self) -> int:
        return self.parameters["n_images"] or len(open_split(self.dataset).labels)

    def _learned_from(self, learning: LearningSplits) -> list[str]:
        """What a reader must know of the images learned from."""
        left = f"{len(learning.test)} of {self._asked} images are left to certify; others are learned from"
        learned = [f"{one.name}: {one.shots} shots" for one in self.step.methods if one.learns]
        seed = f"drawn with seed {self.seed or 0} where the method has no other; kept in the folder prompts"
        told = f"Learned from so many images of each class at most, {seed}. {'; '.join(learned)}"
        pooled = any(one.method == "few-shot + pool" for one in self.step.methods)
        notes = [note for note in learning.notes if pooled or note != learning.pool_note]
        return [*notes, *([left] if len(learning.test) < self._asked else []), told]


@dataclass(frozen=True)
class CertifyAlone(CertifyCell):
    """A cell without a study, in a run folder of its own, of which every image is shown.

    Attributes
    ----------
    train : str or None
        Id of the images to learn from; None: those that `learning_splits` draws of the data set.
    """

    train: str | None = None

    @property
    def run_name(self) -> str:
        """Of a folder that only the same question gets."""
        asked = repr((self.dataset, self.train, self.seed, self.parameters)).encode()
        return f"certify-{short_id(self.model)}-{short_id(self.shown)}-{hashlib.sha256(asked).hexdigest()[:8]}"

    def folder(self, study: Path) -> Path:
        """That of the run itself."""
        return study

    def keep_images(self, run: Run, rows: pd.DataFrame, data: ImageDataset) -> None:
        """All of them."""
        run.save_images(rows, data.images)

    def _splits(self) -> LearningSplits:
        if self.train is None:
            return super()._splits()
        split = "train" if "train" in open_split(self.train).splits else "test"
        train, test = load_dataset(self.train, split=split), self.images()
        if train.classes != test.classes:
            raise ValueError(
                f"{train.id} has the classes {', '.join(train.classes)}, and {test.id} has {', '.join(test.classes)}; "
                "give both the same, in one order, with --words"
            )
        if shared := sorted({*train.groups} & {*test.groups}):
            raise ValueError(
                f"{len(shared)} patients are in {train.id} and in {test.id} (the first is {shared[0]!r}); an image of "
                "a patient who was learned from tells nothing, so move them to one side"
            )
        if same := sorted(train.sources() & test.sources()):
            raise ValueError(
                f"{len(same)} images are in {train.id} and in {test.id} (the first is {same[0].name!r}), and what was "
                "learned from tells nothing; give others, or no --train: images to learn from are set apart then"
            )
        made = LearningSplits(train=train, pool=train, test=test, divided=True, notes=())
        return replace(made, notes=(f"Learned from {train.id}.", *made.copies))


def certify_alone(
    dataset: str, model: str, *, method: PaperMethod, radius: float, train: str | None, grid: Mapping[str, Any],
    **settings: Any,
) -> CertifyAlone:  # fmt: skip
    """A cell that certifies one data set, after all that can be checked before it runs.

    Parameters
    ----------
    dataset, model, train
        As in `CertifyAlone`.
    method : PaperMethod
    radius : float
        The radius asked for, > 0; half of it is asked for, too.
    grid : mapping
        Other fields of `Grid`.
    **settings
        Fields of `CertifyStep`; one sigma.

    Raises
    ------
    ValueError, FileNotFoundError
        What cannot work; of a radius that the draws cannot reach the number of draws that can.
    """
    step = CertifyStep(radii=(radius, radius / 2, 0.0), methods=(method,), **settings)
    place = Grid(datasets=(dataset,), models=(model,), **grid)
    checks.check_positive("radius", radius)
    check_models({model})
    checks.check_whole("seed", place.seeds[0], least=0)
    size = split_size(dataset)
    if place.n_images is not None:
        checks.check_whole("n_images", place.n_images, most=size, hint=f": {dataset} has so many test images")
    step.check(replace(place, datasets=(train or dataset,)), None)
    (sigma,), family = step.sigmas, step.family
    needed = minimum_draws(step.alpha, radius=radius, sigma=family.unit(sigma), law=family.law)
    if needed > step.n:
        raise ValueError(
            f"radius={radius:g}: n={step.n} draws cannot reach it at sigma {sigma:g}, even if all agree; it takes "
            f"n={needed} or more, or a larger sigma"
        )
    (cell,) = step.cells(1, place, None)
    parameters = cell.parameters | ({} if train is None else {"train": shown_id(train)})
    return CertifyAlone(1, step, model, dataset, cell.seed, parameters, train=train)


def certified_in_words(
    rows: pd.DataFrame, shares: pd.DataFrame, data: ImageDataset, *, radius: float, side: int
) -> tuple[str, str]:
    """What the certificates of the first method say, in two sentences.

    Parameters
    ----------
    rows, shares : DataFrame
        From `certify_dataset`, of one noise level, and from `metrics.certified_accuracy`, with this radius.
    data : ImageDataset
    radius : float
    side : int
        Of the images that the model reads, in pixels.
    """
    first = shares[shares["radius"] == radius].iloc[0]
    rows = rows[(rows["method"] == first.method) & (rows["guarantee"] == first.guarantee)]
    family, n, row = find_perturbation(first.perturbation), len(rows), rows.iloc[0]
    people = f" of {rows['patient'].nunique()} patients" if "patient" in rows else ""
    change = "L2 norm" if family == PIXEL_NOISE else family.name
    units = f"[0, 1] pixels, {side} x {side}" if family == PIXEL_NOISE else family.units
    if np.isnan(first.certified_accuracy):
        held = f"nothing is known at radius {radius:g}: the draws reach {first.radius_reach:.3g}"
    else:
        kept = round(first.certified_accuracy * n)
        held = (
            f"{kept} ({_percent(kept / n)}, 95 % interval {_percent(first.low)} to {_percent(first.high)}) keep their "
            f"right answer under every change of {change} up to {radius:g} ({units})"
        )
    answered = rows.loc[rows["predicted"] >= 0, "predicted"]
    most = answered.value_counts()
    same = f"{data.classes[most.index[0]]!r} is the answer to {most.iloc[0]}" if len(most) else "no image has an answer"
    if len(most) and metrics.is_constant_predictor(answered.to_numpy()):
        same += ", nearly one answer for all: do not take it for knowledge"
    largest = max(data.class_counts().values()) / len(data)
    return (
        f"Of {n} images{people}, {held}; {first.method}, sigma {row.sigma:g}, guarantee: {first.guarantee}, "
        f"alpha {row.alpha:g} for each image.",
        f"{n - len(answered)} abstain; guessing would be right in {_percent(1 / len(data.classes))}, the "
        f"commonest class alone in {_percent(largest)}; {same}.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _retrained(
    path: Path,
    model: DualEncoder,
    train: ImageDataset,
    one: PaperMethod,
    *,
    sigma: float,
    perturbation: Perturbation,
    seed: int,
) -> DualEncoder:
    """The tower that was re-trained on this noise, from its file if it is there."""
    header = {"sigma": sigma, "seed": seed if one.seed is None else one.seed, "method": repr(one)}
    header |= _setting(perturbation.name)
    if not path.is_file():
        rate = {} if one.learning_rate is None else {"learning_rate": one.learning_rate}
        words = {"shots": one.shots, "epochs": one.epochs, "batch_size": one.batch_size, **rate}
        words |= {"sigma": sigma, "perturbation": perturbation, "seed": header["seed"]}
        made = retrain_on_noise(model, train, **words)
        known = model.state_dict()
        changed = {name: value for name, value in made.state_dict().items() if not torch.equal(value, known[name])}
        write_tensors(path, changed, key=_KEY, header=header)
    changed, found = read_tensors(path, key=_KEY, kind="a re-trained tower", advice="Delete it and train anew.")
    if found != header:
        raise ValueError(f"{path} holds a tower that was re-trained otherwise; delete it and train anew")
    tower = model.trainable_copy()
    with explained_errors(str(path)):
        tower.load_state_dict(tower.state_dict() | changed)
    return tower.eval().requires_grad_(False).to(model.dtype)


def _certificate_metrics(summary: pd.DataFrame, shares: pd.DataFrame) -> Sequence[Metric]:
    numbers = []
    for r in summary.itertuples():
        about: dict[str, Any] = {"of": _group_in_words(r), "settings": _group(r)}
        numbers.append(Metric("smoothed_accuracy", r.smoothed_accuracy, r.n, r.low, r.high, **about))
        numbers.append(Metric("average_certified_radius", r.average_certified_radius, r.n, **about))
        numbers.append(Metric("abstain_rate", r.abstain_rate, r.n, **about))
    for r in shares[shares["radius"] > 0].itertuples():
        of = f"{_group_in_words(r)}, radius={r.radius:g}"
        of += f" (the draws reach {r.radius_reach:.4g})" if np.isnan(r.certified_accuracy) else ""
        share = r.certified_accuracy, r.n, r.low, r.high
        numbers.append(Metric("certified_accuracy", *share, of=of, settings=_group(r) | {"radius": r.radius}))
    return numbers


def _group(row: Any) -> dict[str, Any]:
    named = {"method": row.method, "guarantee": row.guarantee, "sigma": row.sigma}
    return named | _setting(row.perturbation)


def _group_in_words(row: Any) -> str:
    return f"{row.method} ({row.guarantee}), {_named(row.perturbation)}sigma={row.sigma:g}"


def _setting(perturbation: str) -> dict[str, str]:
    """Pixel noise goes without saying: results from before there was a choice are still matched with new ones."""
    return {} if perturbation == PIXEL_NOISE.name else {"perturbation": perturbation}


def _named(perturbation: str) -> str:
    return "".join(f"{name} " for name in _setting(perturbation).values())
