"""Certificates by votes on noisy copies: `take_votes` is the algorithm, `certify` and `predict` ask it of one image.

The smoothed classifier g answers what its base classifier f answers most often under Gaussian noise,
g(x) = argmax_y P[f(x + e) = y] with e ~ N(0, sigma^2 I). A certificate says: g(x') is the predicted class for every x'
within an L2 radius of x. It is false with probability at most alpha, over the noise drawn to make it. Where another
perturbation is smoothed over, such as contrast, T_e(x) stands for x + e and the radius is one of its parameter
(`medrobust_lib.smoothing.perturbations`).
"""

import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from medrobust_lib.checks import check_choice, check_keywords
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.smoothing import bounds
from medrobust_lib.smoothing.bounds import Bounds, FixedPlan, Law
from medrobust_lib.smoothing.certificate import ABSTAIN, Certificate, Guarantee, Mode, Sampling
from medrobust_lib.smoothing.noise import Batches, NoiseStream, Role, make_batches, map_copies
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE, Sigma, as_level, find_perturbation
from medrobust_lib.smoothing.sequential import SequentialPlan, sequential_plan

BaseClassifier = Callable[[Tensor], Tensor]
Answers = Callable[[Role, int, int, Sequence[int]], Sequence[Tensor]]

# What `certify` and `predict` pass on.
_ADDRESS = {"seed": 0, "dataset": "", "index": 0, "batch_size": None, "perturbation": PIXEL_NOISE.name}

LABEL_LIMIT = 1_000_000
"""Votes of selection are counted in a table with a row for each class; a label from here on is a mistake."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of the votes for one classifier; the fields mean what they mean in `Certificate`."""

    predicted: int = ABSTAIN
    radius: float = 0.0
    p_lower: float = 0.0
    k: int = 0
    n: int = 0
    p_upper: float = 1.0
    bounds: Bounds = "one"


Plan = FixedPlan | SequentialPlan


@dataclass(frozen=True)
class Rules:
    """How the images of a table are certified.

    Attributes
    ----------
    n0, n : int
        Selection draws, and estimation draws (at most so many in sequential sampling).
    alpha : float in (0, 1)
        Failure probability of each certificate, that is of each row; it is not shared out over rows.
    sampling : {"sequential", "fixed"}
        Both keep alpha. Fixed sampling gives radii of any value, sequential sampling the named ones.
    mode : {"predict", "evaluate"}
        "evaluate" tests the known label without selection: fewer draws, for certified-accuracy tables only.
    radii : sequence of float, optional
        Radii of interest of sequential sampling; 0 is always among them. Few of them spare many draws. None: a grid
        of 0.05 sigma, which spares few.
    bounds : {"two", "one"}, optional
        "one" is the published procedure: the other classes have at most 1 - p_lower. "two" bounds the strongest of them
        by itself on those images where the selection draws promise more of it. None: "two" where there are selection
        draws anyway, "one" in evaluate mode, where "two" takes n0 draws for this choice alone.

    Raises
    ------
    ValueError
        An unknown mode, sampling or number of bounds, or a selection without draws.
    """

    n0: int = bounds.N0
    n: int = bounds.N
    alpha: float = bounds.ALPHA
    sampling: Sampling = "sequential"
    mode: Mode = "predict"
    radii: Sequence[float] | None = PIXEL_NOISE.radii
    bounds: Bounds | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("sampling", self.sampling, get_args(Sampling))
        if self.bounds is None:
            object.__setattr__(self, "bounds", "two" if self.mode == "predict" else "one")
        check_choice("bounds", self.bounds, get_args(Bounds))
        if self.mode == "evaluate" and self.bounds == "one":
            object.__setattr__(self, "n0", 0)
        elif self.n0 < 1:
            what = "a class" if self.mode == "predict" else "between one bound and two"
            raise ValueError(f"n0={self.n0}: choosing {what} takes at least one selection draw (100 is usual)")

    def plan(self, sigma: float, *, share: int = 1, law: Law = "normal") -> Plan:
        """When to look at one noise level, and what one bound proves then, for each of so many that share alpha.

        Raises
        ------
        ValueError
            sigma, alpha, radii or law out of range, n too small to ever certify.
        """
        alpha = self.alpha if share == 1 else self.alpha / share
        if self.sampling == "fixed":
            return FixedPlan(sigma=sigma, n=self.n, alpha=alpha, law=law)
        return sequential_plan(sigma=sigma, radii=self.radii, n=self.n, alpha=alpha, law=law)


def take_votes(
    answers: Answers, plans: Sequence[Plan], *, n0: int, label: int | None, bounds: Bounds = "one"
) -> list[Verdict]:
    """Run selection and estimation for several base classifiers on the same noise.

    Parameters
    ----------
    answers : callable of (role, first, count, positions)
        Returns int64 [count] for each classifier named by its position.
    plans : sequence of Plan
        One for each classifier.
    n0 : int
        Selection draws.
    label : int or None
        Class to test for all classifiers, instead of selecting one.
    bounds : {"one", "two"}
        Two: the selection draws also choose between each plan and its like with two bounds, with a known label, too.

    Returns
    -------
    list of Verdict
        Every certificate is valid on its own at its plan's alpha; sharing noise only makes them dependent.
    """
    everyone = range(len(plans))
    # 1. Choose a class for each classifier: what it answers to most of n0 noisy copies, or the known label.
    drawn = answers("select", 0, n0, everyone) if label is None or bounds == "two" else []
    tested = [_favourite(labels) for labels in drawn] if label is None else [label] * len(plans)
    if bounds == "two":
        shares = [_leading(_tally(labels), of) for labels, of in zip(drawn, tested, strict=True)]
        plans = [plan.chosen(*counts, n0) for plan, counts in zip(plans, shares, strict=True)]
    # 2. Count how many fresh noisy copies get that class, and look at the count when the plan says so.
    looks = [{int(draws): look for look, draws in enumerate(plan.looks)} for plan in plans]
    verdicts = [Verdict() for _ in plans]
    votes, proved, done = [Counter() for _ in plans], [0] * len(plans), 0
    active = [position for position in everyone if tested[position] != ABSTAIN]
    for draws in sorted(set().union(*looks)):
        if not active:
            break
        for position, labels in zip(active, answers("estimate", done, draws - done, active), strict=True):
            votes[position] += _tally(labels)
        done = draws
        for position in [position for position in active if draws in looks[position]]:
            k, rival = _leading(votes[position], tested[position])
            # 3. Bound the probability of the class from below, and of its rivals from above: what do the counts prove?
            proof = plans[position].step(looks[position][draws], k, proved[position], rival)
            proved[position] = proof.proved
            if proof.finished:
                # 4. It is proved to be ahead: that class, within that radius. Otherwise abstain.
                predicted = tested[position] if proof.proved else ABSTAIN
                about = {"p_upper": proof.p_upper, "bounds": plans[position].bounds}
                verdicts[position] = Verdict(predicted, proof.radius, proof.p_lower, k, draws, **about)
                active.remove(position)
    return verdicts


def agreement(verdicts: Sequence[Verdict]) -> Verdict:
    """Join the verdicts of a finite set of classifiers: their common class with the smallest radius, or abstain.

    If each is wrong with probability at most alpha / M, all M hold at once with probability at least 1 - alpha, so
    any choice among the classifiers, even one that depends on the attacked image, gives this class in the ball.
    """
    weakest = replace(min(verdicts, key=lambda verdict: verdict.radius), n=max(verdict.n for verdict in verdicts))
    if len({verdict.predicted for verdict in verdicts}) > 1 or weakest.predicted == ABSTAIN:
        p_lower, p_upper = min(verdict.p_lower for verdict in verdicts), max(verdict.p_upper for verdict in verdicts)
        return replace(weakest, predicted=ABSTAIN, radius=0.0, p_lower=p_lower, p_upper=p_upper)
    return weakest


def checked_answers(answers: Any, count: int, *, n_classes: int = LABEL_LIMIT) -> Tensor:
    """Bring a classifier's labels to the CPU as int64 [count], or say what is wrong with them.

    Parameters
    ----------
    answers : Tensor, array or sequence
        Whole numbers or bools [count]: classes from 0, or below 0 for no class.
    count : int
    n_classes : int
        A label from here on is no class.

    Raises
    ------
    TypeError
        Scores, texts or another shape: what is not finite is never a vote.
    ValueError
        A label that is no class.
    """
    kind = getattr(answers, "dtype", type(answers).__name__)
    if isinstance(answers, Tensor):
        answers = answers.detach().cpu()
        answers = (answers.double() if answers.is_floating_point() else answers).numpy()
    try:
        labels = np.asarray(answers)
    except ValueError:  # rows of different lengths
        labels = np.asarray(None)
    if labels.shape != (count,) or labels.dtype.kind not in "biu":
        unfit = int((~np.isfinite(labels)).sum()) if labels.dtype.kind == "f" else 0
        raise TypeError(
            f"a base classifier maps [b, 3, H, W] to labels, whole numbers [b]: expected int64 ({count},), got {kind} "
            f"{labels.shape}{f', {unfit} of them NaN or infinite' if unfit else ''}; logits [b, K] need .argmax(1), "
            "probabilities [b] of one class (p > 0.5)"
        )
    if count and labels.max() >= n_classes:
        raise ValueError(
            f"a base classifier answered with the label {labels.max()}: classes are 0 to {n_classes - 1}; answer below "
            "0 for no class"
        )
    return torch.from_numpy(labels.astype(np.int64))


def check_classifier(classifier: Any) -> None:
    """Refuse what is no map from pixels to labels: a dual encoder, which gives features, a class, or no callable."""
    if isinstance(classifier, DualEncoder):
        raise TypeError(
            f"{classifier.id} is a dual encoder, which gives features and no labels; a base classifier also has class "
            "texts:\n"
            "    from medrobust_lib.smoothing.methods import PromptClassifier\n"
            "    features = model.class_features(classes, templates)  # such as data.classes, data.templates\n"
            "    certify(PromptClassifier(model, features), image, ...)"
        )
    if not callable(classifier) or isinstance(classifier, type):
        what = f"the class {classifier.__name__}" if isinstance(classifier, type) else reprlib.repr(classifier)
        raise TypeError(f"classifier must be a function or object that maps [b, 3, H, W] to labels [b], not {what}")
    check_not_training(classifier)


def check_not_training(classifier: Any) -> None:
    """Refuse a network whose answers depend on the batch or on chance of its own (batch norm, dropout)."""
    parts = classifier.modules() if isinstance(classifier, torch.nn.Module) else [classifier]
    if training := [type(part).__name__ for part in parts if getattr(part, "training", False)]:
        raise ValueError(
            f"{training[0]} is in training mode, so an answer depends on the rest of its batch and is "
            "no fixed function of the noisy image; call .eval() first"
        )


def count_votes(labels: Tensor) -> np.ndarray:
    """Votes per class, int64; answers below 0 count for no class."""
    return np.bincount(labels[labels >= 0].numpy(), minlength=1)


def _favourite(labels: Tensor) -> int:
    votes = count_votes(labels)
    return int(votes.argmax()) if votes.any() else ABSTAIN


def _tally(labels: Tensor) -> Counter[int]:
    """Votes per class; all answers below 0 together are one class that no other may fall behind."""
    return Counter(labels.clamp(min=ABSTAIN).tolist())


def _leading(votes: Counter[int], tested: int) -> tuple[int, int]:
    """Votes for the tested class, and for its strongest rival."""
    return votes[tested], max((count for label, count in votes.items() if label != tested), default=0)


def predict(
    classifier: BaseClassifier,
    image: Tensor,
    *,
    sigma: Sigma,
    n: int = bounds.FEW_N,
    alpha: float = bounds.ALPHA,
    **address: Any,
) -> int:
    """Answer of the smoothed classifier, or an abstention: PREDICT of Cohen et al.

    Parameters
    ----------
    classifier : callable
        float32 [b, 3, H, W] in pixel units -> labels [b], whole numbers in a tensor, array or list; one below 0 counts
        for no class.
    image : float32 [3, H, W]
        In [0, 1], at the classifier's size, not normalised.
    sigma : float or tuple of float
        Standard deviation of the noise, > 0, in the units of the perturbation; for pixel noise in [0, 1] pixel units.
    n : int
        Noisy copies.
    alpha : float in (0, 1)
        Probability of an answer other than g's is at most this.
    **address
        As in `certify`; the noise has the role "select".

    Returns
    -------
    int
        Class, or -1 (abstain) if the two most frequent classes are too close.

    Raises
    ------
    ValueError
        A parameter out of range, named; an n that can never answer at this alpha.
    TypeError
        The image or the classifier's answers have the wrong type or shape; the classifier is a dual encoder.

    References
    ----------
    Cohen et al. 2019, arXiv:1902.02918, section 3.2.1 and Proposition 1.
    """
    check_keywords(predict, address, _ADDRESS)
    bounds.check_alpha(alpha)
    fewest = bounds.minimum_draws(alpha / 2)  # the test is two-sided
    if n < fewest:
        raise ValueError(f"n={n} draws can never answer at alpha={alpha}, unanimous or not; use n >= {fewest}")
    answers, _ = _answers(classifier, image, sigma, address)
    votes = count_votes(answers("select", 0, n, [0])[0])
    if not votes.any():
        return ABSTAIN
    order = np.argsort(-votes, kind="stable")
    first, second = int(votes[order[0]]), int(votes[order[1]]) if len(votes) > 1 else 0
    return int(order[0]) if binomtest(first, first + second, 0.5).pvalue <= alpha else ABSTAIN


def certify(
    classifier: BaseClassifier,
    image: Tensor,
    *,
    sigma: Sigma,
    n0: int = bounds.N0,
    n: int = bounds.N,
    alpha: float = bounds.ALPHA,
    sampling: Sampling = "fixed",
    radii: Sequence[float] | None = None,
    label: int | None = None,
    bounds: Bounds | None = None,
    **address: Any,
) -> Certificate:
    """Certify the smoothed classifier's answer on one image.

    Parameters
    ----------
    classifier : callable
        float32 [b, 3, H, W] in pixel units -> labels [b], whole numbers in a tensor, array or list; one below 0 counts
        for no class. It must be fixed before the image is seen, and one answer must not depend on the rest of the
        batch: the certificate's guarantee is "standard". Its attributes ``id`` and ``dtype``, where it has them, are
        recorded.
    image : float32 [3, H, W]
        In [0, 1], at the classifier's size, not normalised; noise is drawn on its device.
    sigma : float or tuple of float
        Standard deviation of the noise, > 0, in the units of the perturbation; for pixel noise in [0, 1] pixel units.
    n0 : int
        Selection draws that choose the class; they are never used again.
    n : int
        Estimation draws: all of them in fixed, at most so many in sequential sampling.
    alpha : float in (0, 1)
        Failure probability of the certificate.
    sampling : {"fixed", "sequential"}
        Fixed: one Clopper-Pearson bound, a radius of any value. Sequential: the same alpha, draws stop early,
        the radius is one of `radii`.
    radii : sequence of float, optional
        Radii of interest of sequential sampling; few of them spare many draws. None: a grid of 0.05 sigma, which
        spares few. Fixed sampling needs none.
    label : int, optional
        Evaluate mode: test this known label directly, without selection. For certified-accuracy tables only.
    bounds : {"two", "one"}, optional
        As in `Rules`: "one" is the published procedure, None two bounds where they promise more, without a label.
    **address
        ``seed`` (0), ``dataset`` ("") and ``index`` (0): address of the noise. Give every image an index of its own:
        certificates on the same noise are each valid, but err together. ``batch_size``: noisy copies at a time;
        default: from the free memory. It is halved when memory runs out. ``perturbation``: "pixel-noise" (default),
        "contrast", "brightness", "contrast-brightness" (a pair of sigmas), "gamma", "blur" or a `Perturbation`; sigma,
        radii and the certificate's radius are in the units of its parameter.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        A parameter out of range, named; an n that can never certify at this alpha.
    TypeError
        The image or the classifier's answers have the wrong type or shape; the classifier is a dual encoder.

    Notes
    -----
    The fixed procedure with one bound is CERTIFY of Cohen et al. (2019), with f the classifier:

    1. choose    class = the most frequent f(image + noise) over n0 draws (role "select")
    2. count     k = how many of n fresh draws (role "estimate") give that class
    3. bound     p_lower = Clopper-Pearson(k, n, alpha), one-sided
    4. answer    p_lower > 1/2: class, with radius sigma Phi^-1(p_lower); else abstain with radius 0

    Two bounds are the theorem's own: both at alpha / 2, p_upper the largest upper bound of another class, and radius
    sigma / 2 (Phi^-1(p_lower) - Phi^-1(p_upper)) where p_lower > p_upper, which may be below 1/2.

    References
    ----------
    Cohen et al. 2019, arXiv:1902.02918, section 3.2.2 and Proposition 2; `medrobust_lib.smoothing.sequential`.
    """
    check_keywords(certify, address, _ADDRESS)
    answers, stream = _answers(classifier, image, sigma, address)
    mode = "predict" if label is None else "evaluate"
    rules = Rules(n0=n0, n=n, alpha=alpha, sampling=sampling, mode=mode, radii=radii, bounds=bounds)
    if label is not None and label < 0:
        raise ValueError(f"label={label}: the known label is a class, 0 or higher; None lets selection draws choose")
    plan = rules.plan(stream.perturbation.unit(stream.sigma), law=stream.perturbation.law)
    (verdict,) = take_votes(answers, [plan], n0=rules.n0, label=label, bounds=rules.bounds)
    return make_certificate(verdict, rules, stream, guarantee="standard", classifier=classifier, image=image)


def make_certificate(
    verdict: Verdict, rules: Rules, stream: NoiseStream, *, guarantee: Guarantee, classifier: Any, image: Tensor
) -> Certificate:
    """Record of a verdict about an image, float [3, H, W], reached by the rules with a base classifier."""
    return Certificate(
        **vars(verdict),
        n0=rules.n0,
        n_max=rules.n,
        alpha=rules.alpha,
        sigma=stream.sigma,
        sampling=rules.sampling,
        mode=rules.mode,
        guarantee=guarantee,
        seed=stream.seed,
        model=getattr(classifier, "id", "own classifier"),
        dtype=getattr(classifier, "precision", str(getattr(classifier, "dtype", torch.float32)).removeprefix("torch.")),
        device=image.device.type,
        image_shape=tuple(image.shape),
        perturbation=stream.perturbation,
        dataset=stream.dataset,
    )


def _answers(
    classifier: BaseClassifier, image: Tensor, sigma: Sigma, address: Mapping[str, Any]
) -> tuple[Answers, NoiseStream]:
    """Let one classifier of pixels answer the noisy copies of one image; and the address of their noise."""
    check_classifier(classifier)
    check_image(image)

    def label(positions: Sequence[int], copies: Tensor) -> list[Tensor]:
        return [checked_answers(classifier(copies), len(copies))]

    where = _ADDRESS | address
    where["perturbation"] = find_perturbation(where["perturbation"])
    sigma = as_level(sigma)
    where["perturbation"].check_sigma(sigma)
    where["perturbation"].check_image(tuple(image.shape), sigma)
    batches = make_batches(where.pop("batch_size"), image.device, tuple(image.shape))
    stream = NoiseStream(**where, sigma=sigma, role="select")
    return answers_to_copies(label, image, stream, batches), stream


def answers_to_copies(
    label: Callable[[Sequence[int], Tensor], Sequence[Tensor]], image: Tensor, stream: NoiseStream, batches: Batches
) -> Answers:
    """Let classifiers answer the noisy copies of one image, for `take_votes`.

    Parameters
    ----------
    label : callable
        (positions of the classifiers, copies float32 [b, 3, H, W]) -> labels int64 [b] of each of them.
    image : float32 [3, H, W]
    stream : NoiseStream
        Address of the noise, whose role `take_votes` chooses.
    batches : Batches
        How many copies at a time.
    """

    @torch.no_grad()  # not inference mode: a base classifier may adapt to each copy by a gradient of its own
    def answers(role: Role, first: int, count: int, positions: Sequence[int]) -> list[Tensor]:
        noise = replace(stream, role=role)
        parts = map_copies(partial(label, positions), image, noise, batches=batches, first=first, count=count)
        return [torch.cat(labels) for labels in zip(*parts, strict=True)]

    return answers


def check_image(image: Tensor) -> None:
    """Refuse anything but float [3, H, W] in [0, 1]."""
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3 or len(image) != 3:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be float [3, H, W] in [0, 1], not {what}; `model.prepare(images)[0]` gives one")
    low, high = (float(value) for value in torch.aminmax(image.detach()))
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(f"image values range over [{low:.4g}, {high:.4g}]: expected [0, 1], without normalisation")
