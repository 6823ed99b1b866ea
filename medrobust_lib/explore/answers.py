"""Instrument of notebook 06: answers by meaning, and the radii that they certify, with and without oracle errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.experiments import progress
from medrobust_lib.explore.instrument import Instrument, control, level_slider
from medrobust_lib.generative import errors
from medrobust_lib.generative.answers import AnswerBank, Drawing
from medrobust_lib.generative.certify import GenerativeCertificate, certify_answers
from medrobust_lib.generative.oracles import Equivalence, Oracle, judged
from medrobust_lib.plots import panels, plot_label_votes, shorten
from medrobust_lib.smoothing.bounds import ALPHA, FEW_N, FEW_N0, certified_radius, maximum_radius
from medrobust_lib.smoothing.certificate import GUARANTEES
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies

RATES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
_SHOWN = 7  # groups of answers; the rest is counted together


class Group(NamedTuple):
    """Answers of one meaning: a label or the representative of a cluster, how many, and an example."""

    name: str
    size: int
    example: str


@dataclass(frozen=True, eq=False)
class AnswerGrid:
    """Answers of a generative model to a few images under a few noise levels, drawn ahead.

    Attributes
    ----------
    questions : mapping of str to QuestionSet
        By the name of the task.
    oracles : mapping of str to (mapping of str to Oracle or Equivalence)
        Readers of each task's answers, by the name shown.
    banks : mapping of (str, int, float) to AnswerBank
        By task, position in the question set and sigma; complete up to `n0` and `n`.
    n0, n : int
        Selection draws, and estimation draws at most.
    alpha : float
    """

    questions: Mapping[str, QuestionSet]
    oracles: Mapping[str, Mapping[str, Oracle | Equivalence]]
    banks: Mapping[tuple[str, int, float], AnswerBank]
    n0: int = FEW_N0
    n: int = 100
    alpha: float = ALPHA

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have answers."""
        return tuple(dict.fromkeys(task for task, _, _ in self.banks))

    @property
    def positions(self) -> tuple[int, ...]:
        """Images that have answers."""
        return tuple(sorted({position for _, position, _ in self.banks}))

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels that have answers."""
        return tuple(sorted({sigma for _, _, sigma in self.banks}))


def prepare_answers(
    vlm: Any,
    questions: Mapping[str, QuestionSet],
    oracles: Mapping[str, Mapping[str, Oracle | Equivalence]],
    *,
    sigmas: Sequence[float],
    positions: Sequence[int] = (0, 1, 2),
    n0: int = FEW_N0,
    n: int = FEW_N,
    alpha: float = ALPHA,
    how: Drawing | None = None,
    known: Mapping[str, Sequence[AnswerBank]] | None = None,
) -> AnswerGrid:
    """Draw the answers that the instrument shows, with a bar of progress: a model is too slow to ask at every move.

    Parameters
    ----------
    vlm : VisionLanguageModel
    questions : mapping of str to QuestionSet
    oracles : mapping of str to (mapping of str to Oracle or Equivalence)
    sigmas : sequence of float
        Noise levels, > 0, in [0, 1] pixel units.
    positions : sequence of int
        Images of each question set; those beyond its end are left out.
    n0, n, alpha
        As in `certify_generative`.
    how : Drawing, optional
        How answers are drawn, but for the noise level; default: 24 tokens at most, seed 0.
    known : mapping of str to sequence of AnswerBank, optional
        Banks of `collect_answers` with the same draws, by task: their answers are not drawn again.
    """
    how = how or Drawing(sigma=sigmas[0], max_new_tokens=24)
    there = {(task, bank.index, bank.how): bank for task, given in (known or {}).items() for bank in given}
    places = [place for place in positions if place < min(map(len, questions.values()))]
    banks = {}
    for (task, part), sigma, position in product(questions.items(), map(float, sigmas), places):
        drawn, index = replace(how, sigma=sigma), int(part.indices[position])
        bank = there.get((task, index, drawn))
        if bank is None:
            image = vlm.prepare([part.images[position]])[0]
            bank = AnswerBank(vlm, image, part.questions[position], drawn, dataset=part.id, index=index)
        banks[task, position, sigma] = bank
    told = {"description": "answers for the instrument", "unit": "images x sigmas x questions"}
    wanted = {*(("select", number) for number in range(n0)), *(("estimate", number) for number in range(n))}
    empty = [bank for bank in banks.values() if not wanted <= bank.kept.keys()]
    for bank in progress(empty, total=len(banks), done=len(banks) - len(empty), resumes=False, **told):
        bank.answers("select", 0, n0)
        bank.answers("estimate", 0, n)
    return AnswerGrid(questions, oracles, banks, n0=n0, n=n, alpha=alpha)


@torch.no_grad()
def clusters_view(
    grid: AnswerGrid, *, task: str, index: int, sigma: float, n: int, oracle: str, error_rate: float
) -> Figure:
    """Draw the answers to noisy copies of one image, grouped by meaning, and the radii that they certify.

    Parameters
    ----------
    grid : AnswerGrid
    task : str
        Which question.
    index : int
        Position of the image in the question set.
    sigma : float
        In [0, 1] pixel units, one of ``grid.sigmas``.
    n : int
        Estimation draws, at most ``grid.n``.
    oracle : str
        Name of the reader, one of ``grid.oracles[task]``.
    error_rate : float in [0, 1]
        Known rate at which the oracle is assumed to err; what that means depends on the error model.

    Raises
    ------
    KeyError
        No answers were drawn at this task, image and sigma, or the task has no such reader; both are listed.
    """
    part, readers = grid.questions[task], grid.oracles[task]
    if oracle not in readers:
        raise KeyError(f"the question of {task} has no reader {oracle!r}; choose one of {', '.join(readers)}")
    if (task, index, sigma) not in grid.banks:
        raise KeyError(f"no answers for {task}, image {index}, sigma {sigma:g}; there are some at sigma "
                       f"{', '.join(f'{level:g}' for level in grid.sigmas)} and images {grid.positions}")  # fmt: skip
    bank, reader = grid.banks[task, index, sigma], readers[oracle]
    found = certify_answers(bank, reader, n0=grid.n0, n=n, alpha=grid.alpha)
    groups = answer_groups(bank, reader, found, n=n)
    radii, refusals = corrected_radii(found, reader, error_rate=error_rate, alpha=grid.alpha)
    height = max(2.3, 0.46 * len(groups))
    figure = panels.fixed_figure(10.8, height + 2.35)
    truth = part.truths[index]
    panels.add_picture(figure, (0.1, 0.75, 2.0, 2.0), bank.image, f"image {int(part.indices[index])}, clean")
    panels.add_words(figure, 0.1, 0.1, f"{bank.prompt}   Truth: {truth or 'not known'}.", width=150, fontsize=10)
    copy = noisy_copies(bank.image, NoiseStream(bank.how.seed, bank.dataset, bank.index, sigma, "estimate"))[0]
    panels.add_picture(figure, (2.3, 0.75, 1.1, 1.1), copy, f"sigma {sigma:g}")
    bars = panels.add_panel(figure, (5.9, 0.75, 1.25, height), f"{n} answers, by meaning")
    chosen = next((row for row, group in enumerate(groups) if group.name == found.answer), None)
    sizes = [group.size for group in groups]
    panels.plot_named_bars(sizes, [], bars, total=n, truth=chosen)
    across = bars.get_yaxis_transform()
    for row, group in enumerate(groups):
        # The name of a cluster is a text itself; saying it twice would be no help.
        head = "" if group.example == group.name else f"{shorten(group.name, 38)}\n"
        text = f"{head}{fill(shorten(group.example, 80), 34)}"
        bars.text(-0.06, row, text, transform=across, ha="right", va="center", fontsize=7.5, color="0.15")
    bars.set_xlabel("blue: tested")
    # Knowing the rate of symmetric errors can prove more than the votes alone.
    most = max(maximum_radius(n, grid.alpha, sigma), *radii.values())
    nothing = {name: "refused" if name in refusals else "abstains" for name in radii}
    told = [f"{radius:.3f}" if radius else nothing[name] for name, radius in radii.items()]
    proved = panels.add_panel(figure, (8.75, 0.75, 1.5, 2.3), "certified radius")
    panels.plot_named_bars(list(radii.values()), list(radii), proved, total=most, truth=0, told=told)
    proved.set_xticks((0, most), ("0", f"{most:.2f}"))
    proved.set_xlabel("L2, [0, 1] pixels")
    panels.add_caption(figure, height + 1.35, _words(found, oracle, error_rate))
    return figure


def answer_groups(
    bank: AnswerBank, reader: Oracle | Equivalence, found: GenerativeCertificate, *, n: int
) -> list[Group]:
    """Group the first n estimation answers by label, or by the clusters that selection froze.

    The tested group comes first, the others by their size. Answers that no group takes are counted at the end.
    """
    texts = bank.texts("estimate", 0, n)
    if callable(getattr(reader, "label", None)):
        names: list[str | None] = list(judged(reader, texts).labels)
    else:
        names = [None] * n
        # The tested one first: its count is then the number of votes for it.
        order = sorted(found.clusters, key=lambda cluster: cluster.representative != found.answer)
        for cluster in order:
            left = [place for place in range(n) if names[place] is None and texts[place]]
            same = judged(reader, [texts[place] for place in left], cluster.representative).labels if left else ()
            for place, joins in zip(left, same, strict=True):
                names[place] = cluster.representative if joins else None
    members: dict[str | None, list[str]] = {}
    for name, text in zip(names, texts, strict=True):
        members.setdefault(name, []).append(text or "(no answer)")
    rest = members.pop(None, [])
    groups = [Group(name, len(own), max(own, key=own.count)) for name, own in members.items()]
    groups.sort(key=lambda group: (group.name != found.answer, -group.size))
    beyond = [text for group in groups[_SHOWN:] for text in members[group.name]] + rest
    groups = groups[:_SHOWN]
    return groups + [Group("in no group", len(beyond), max(beyond, key=beyond.count))] if beyond else groups


def corrected_radii(
    found: GenerativeCertificate, reader: Oracle | Equivalence, *, error_rate: float, alpha: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Radii of the oracle's label, and of the true one under each error model with a known rate.

    Returns
    -------
    radii : dict of str to float
        0 where nothing is certified.
    refusals : dict of str to str
        Why an error model cannot be true.
    """
    labelled = callable(getattr(reader, "label", None))
    label, rate = (found.answer if labelled else errors.SAME), errors.ErrorRate(error_rate)
    models: dict[str, errors.ErrorModel] = {
        "symmetric errors": errors.SymmetricErrors(rate, n_labels=len(reader.labels) if labelled else 2),
        "false positives": errors.FalsePositives({label: rate}),
        "any errors": errors.TotalErrors(rate),
    }
    radii, refusals = {"oracle's label": found.composite.radius}, {}
    for name, model in models.items():
        try:
            # A known rate takes nothing of alpha, so the bound of the votes is that of the composite certificate.
            proved = found.composite.p_lower
            p_lower = 0.0 if found.answer is None else model.corrected(proved, label=label, alpha=alpha)
            radii[name] = float(certified_radius(p_lower, found.composite.sigma))
        except errors.InconsistentErrorRateError as error:
            radii[name], refusals[name] = 0.0, str(error)
    return radii, refusals


def _words(found: GenerativeCertificate, oracle: str, error_rate: float) -> str:
    told = found.about(found.composite)
    if found.composite.abstained:  # the library names a guarantee where there is one
        told += f". Guarantee (composite), for what is certified: {GUARANTEES['composite']}"
    return (
        f"Read by {oracle}: {told}.\n"
        f"The other radii assume that the oracle errs at a known rate of {error_rate:g}. Guarantee (corrected): what "
        "an ideal reader would make of the text, not the truth of the image, and only if that assumption holds."
    )


def explore_answers(grid: AnswerGrid) -> Instrument:
    """Build the instrument of notebook 06: question, image, noise, draws, reader and its errors.

    Parameters
    ----------
    grid : AnswerGrid
        From `prepare_answers`; only what is in it can be chosen.
    """
    first = grid.questions[grid.tasks[0]]
    images = [(f"image {int(first.indices[position])}", position) for position in grid.positions]
    counts = sorted({max(10, grid.n // 4), max(10, grid.n // 2), grid.n})
    controls = {
        "task": control("Dropdown", "question", options=grid.tasks),
        "index": control("Dropdown", "image", options=images),
        "sigma": level_slider(grid.sigmas, grid.sigmas[len(grid.sigmas) // 2]),
        "n": control("SelectionSlider", "draws n", options=counts, value=grid.n, tooltip="noisy copies that vote"),
        "oracle": control("Dropdown", "oracle", options=list(grid.oracles[grid.tasks[0]])),
        "error_rate": level_slider(RATES, 0.05, "error rate", "how often the oracle is wrong"),
    }

    def follow(change: Mapping[str, Any]) -> None:
        """Offer the readers of the question, and choose its first."""
        names = list(grid.oracles[change["new"]])
        if list(controls["oracle"].options) != names:
            controls["oracle"].options = names

    # Before the instrument looks at the controls, so that it never meets a question with another one's reader.
    controls["task"].observe(follow, "value")
    hint = "All answers shown were drawn before: moving a control asks the model nothing."
    return Instrument(partial(clusters_view, grid), controls, hint=hint)


def answer_view(
    vlm: Any, questions: QuestionSet, oracle: Oracle, *, index: int, sigma: float, n: int = 60, seed: int = 0
) -> Figure:
    """Draw an image, noisy copies of it with the model's answers, and the oracle's votes.

    Parameters
    ----------
    vlm : VisionLanguageModel
    questions : QuestionSet
    oracle : Oracle
    index : int
        Position in `questions`.
    sigma : float
        Noise standard deviation, > 0, in [0, 1] pixel units.
    n : int
        Noisy copies.
    seed : int
    """
    pixels = vlm.prepare([questions.images[index]])[0].to(vlm.device)
    how, place = Drawing(sigma=sigma, seed=seed), int(questions.indices[index])
    bank = AnswerBank(vlm, pixels, questions.questions[index], how, dataset=questions.id, index=place)
    texts = bank.texts("select", 0, n)
    labels = judged(oracle, texts).labels
    copies = noisy_copies(pixels, NoiseStream(seed, questions.id, place, sigma, "select"), count=3).cpu()
    figure, axes = plt.subplots(1, 5, figsize=(11.5, 2.6), width_ratios=(1, 1, 1, 1, 1.4), layout="constrained")
    truth = questions.truths[index]
    shown = [(pixels.cpu(), f"clean\n{'' if truth is None else 'truth: ' + truth}")]
    shown += [(copy, fill(texts[number] or "(no answer)", 24)) for number, copy in enumerate(copies)]
    for ax, (picture, title) in zip(axes[:4], shown, strict=True):
        ax.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
        ax.set_axis_off()
        ax.set_title(title, fontsize=8, loc="center")
    votes = {name: labels.count(name) for name in oracle.labels if name in labels}
    if None in labels:
        votes["no label"] = labels.count(None)
    plot_label_votes(votes, axes[4], answer=max(votes, key=votes.get))
    axes[4].set_title(f"{n} copies, sigma = {sigma:g}", fontsize=9)
    return figure
