"""Certificates of randomized smoothing: PREDICT and CERTIFY of Cohen et al., fixed or sequential.

The smoothed classifier g answers what its base classifier f answers most often under Gaussian noise,
g(x) = argmax_y P[f(x + e) = y] with e ~ N(0, sigma^2 I). A certificate says: g(x') is the predicted class for
every x' within an L2 radius of x. It is false with probability at most alpha, over the noise drawn to make it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from medrobust_lib.smoothing.batching import make_batches
from medrobust_lib.smoothing.bounds import (
    certified_radius,
    check_alpha,
    check_draws,
    check_sigma,
    lower_confidence_bound,
    minimum_draws,
)
from medrobust_lib.smoothing.noise import NoiseStream, Role, noisy_copies
from medrobust_lib.smoothing.sequential import sequential_plan

ABSTAIN = -1

Sampling = Literal["fixed", "sequential"]
Mode = Literal["predict", "evaluate"]
Guarantee = Literal["standard", "frozen-prompt", "candidate-set", "per-sample", "composite", "corrected"]
Classifier = Callable[[Tensor], Tensor]
Answers = Callable[[Role, int, int, Sequence[int]], Sequence[Tensor]]

GUARANTEES: dict[Guarantee, str] = {
    "standard": "the classifier was fixed before the image was seen; its smoothed answer is constant in the ball",
    "frozen-prompt": (
        "the prompt was fitted to this very image: the answer is constant in the ball for that frozen prompt only, "
        "not for a pipeline that adapts to the attacked image"
    ),
    "candidate-set": (
        "every prompt of a finite set, fixed in advance, gives this answer in the ball, so any choice among them does"
    ),
    "per-sample": "prompts are adapted inside the base classifier, noisy copy by noisy copy: constant in the ball",
    "composite": "the label that the oracle gives to the model's text is constant in the ball",
    "corrected": "the true label of the model's text is constant in the ball if the oracle's error model holds",
}


@dataclass(frozen=True)
class Certificate:
    """What is proved about one image at one noise level, and how.

    Attributes
    ----------
    predicted : int
        Class, or -1 for an abstention.
    radius : float
        L2 radius in [0, 1] pixel units at the size `image_shape`; 0 for an abstention.
    p_lower : float
        Lower bound of the probability that the base classifier gives `predicted` under noise; 0 where
        sequential sampling has proved nothing.
    k, n : int
        Votes for the tested class among the estimation draws made.
    n0 : int
        Selection draws that chose the tested class; 0 if its label was given.
    n_max : int
        Estimation draws allowed.
    alpha : float
        Probability that the certificate is false is at most this.
    sigma : float
        Noise standard deviation in [0, 1] pixel units.
    sampling : {"fixed", "sequential"}
    mode : {"predict", "evaluate"}
        Whether the class came from selection draws, or was the known label (for tables of certified accuracy
        only: it cannot be used where the label is unknown).
    guarantee : str
        Key of `GUARANTEES`.
    seed : int
    model, dtype, device : str
        The base classifier that was certified; a tower in bfloat16 is another classifier than one in float32.
    image_shape : tuple of int
        (3, H, W) of the certified pixels.
    """

    predicted: int
    radius: float
    p_lower: float
    k: int
    n: int
    n0: int
    n_max: int
    alpha: float
    sigma: float
    sampling: Sampling
    mode: Mode
    guarantee: Guarantee
    seed: int
    model: str
    dtype: str
    device: str
    image_shape: tuple[int, ...]

    @property
    def draws(self) -> int:
        """Noisy copies classified in all."""
        return self.n0 + self.n

    @property
    def abstained(self) -> bool:
        """Whether nothing was proved."""
        return self.predicted == ABSTAIN

    def __str__(self) -> str:
        how = f"{self.k} of {self.n} votes at sigma {self.sigma:g} ({self.sampling} sampling, alpha {self.alpha:g})"
        known = "; the class was the known label, so this serves evaluation only" if self.mode == "evaluate" else ""
        if self.abstained:
            return f"abstain: {how} prove no majority{known}"
        size = " x ".join(map(str, self.image_shape))
        radius = _rounded_down(self.radius)
        return (
            f"class {self.predicted} within L2 radius {radius} of this image ([0, 1] pixels, {size}): {how} "
            f"prove a probability above {_rounded_down(self.p_lower)}{known}. "
            f"Guarantee ({self.guarantee}): {GUARANTEES[self.guarantee]}"
        )


@dataclass(frozen=True)
class Verdict:
    """Outcome of the votes for one classifier; the fields mean what they mean in `Certificate`."""

    predicted: int
    radius: float
    p_lower: float
    k: int
    n: int


class Plan(Protocol):
    """When to look at the votes and what they prove then."""

    looks: Sequence[int]

    def step(self, look: int, k: int, proved: int) -> tuple[int, bool]: ...  # noqa: D102
    def p_lower(self, k: int, n: int, proved: int) -> float: ...  # noqa: D102
    def radius(self, k: int, n: int, proved: int) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class FixedPlan:
    """One look after n draws, with the Clopper-Pearson bound: CERTIFY of Cohen et al. 2019."""

    sigma: float
    n: int
    alpha: float

    @property
    def looks(self) -> tuple[int]:
        """Numbers of draws after which the votes are looked at."""
        return (self.n,)

    def step(self, look: int, k: int, proved: int) -> tuple[int, bool]:
        """Take the only look: (1 if a majority is proved else 0, True)."""
        return int(self.p_lower(k, self.n, 0) > 0.5), True

    def p_lower(self, k: int, n: int, proved: int) -> float:
        """Clopper-Pearson bound of k in n."""
        return lower_confidence_bound(k, n, self.alpha)

    def radius(self, k: int, n: int, proved: int) -> float:
        """Certified radius of k in n."""
        return certified_radius(self.p_lower(k, n, proved), self.sigma)


def predict(
    classifier: Classifier,
    image: Tensor,
    *,
    sigma: float,
    n: int = 100,
    alpha: float = 0.001,
    seed: int = 0,
    dataset: str = "",
    index: int = 0,
    batch_size: int | None = None,
) -> int:
    """Answer of the smoothed classifier, or an abstention: PREDICT of Cohen et al.

    Parameters
    ----------
    classifier : callable
        float32 [b, 3, H, W] in pixel units -> int64 [b]; an answer below 0 counts for no class.
    image : float32 [3, H, W]
        In [0, 1], at the classifier's size, not normalised.
    sigma : float
        Noise standard deviation, > 0, in [0, 1] pixel units.
    n : int
        Noisy copies.
    alpha : float in (0, 1)
        Probability of an answer other than g's is at most this.
    seed, dataset, index
        Address of the noise: role "select" of this image.
    batch_size : int, optional
        Default: from the free memory.

    Returns
    -------
    int
        Class, or -1 (abstain) if the two most frequent classes are too close.

    Raises
    ------
    ValueError
        A parameter out of range, named; an n that can never answer at this alpha.
    TypeError
        The image or the classifier's answers have the wrong type or shape.

    References
    ----------
    Cohen et al. 2019, arXiv:1902.02918, section 3.2.1 and Proposition 1.
    """
    check_sigma(sigma)
    check_alpha(alpha)
    fewest = minimum_draws(alpha / 2)  # the test is two-sided
    if n < fewest:
        raise ValueError(f"n={n} draws can never answer at alpha={alpha}, unanimous or not; use n >= {fewest}")
    _check_image(image)
    answers = classifier_answers(
        classifier, image, sigma=sigma, seed=seed, dataset=dataset, index=index, batch_size=batch_size
    )
    votes = _count(answers("select", 0, n, [0])[0])
    if not votes.any():
        return ABSTAIN
    order = np.argsort(-votes, kind="stable")
    first, second = int(votes[order[0]]), int(votes[order[1]]) if len(votes) > 1 else 0
    return int(order[0]) if binomtest(first, first + second, 0.5).pvalue <= alpha else ABSTAIN


def certify(
    classifier: Classifier,
    image: Tensor,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    sampling: Sampling = "fixed",
    radii: Sequence[float] | None = None,
    label: int | None = None,
    seed: int = 0,
    dataset: str = "",
    index: int = 0,
    batch_size: int | None = None,
) -> Certificate:
    """Certify the smoothed classifier's answer on one image.

    Parameters
    ----------
    classifier : callable
        float32 [b, 3, H, W] in pixel units -> int64 [b]; an answer below 0 counts for no class. It must be fixed
        before the image is seen: the certificate's guarantee is "standard". Its attributes ``id`` and ``dtype``,
        where it has them, are recorded.
    image : float32 [3, H, W]
        In [0, 1], at the classifier's size, not normalised; noise is drawn on its device.
    sigma : float
        Noise standard deviation, > 0, in [0, 1] pixel units.
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
        Radii of interest of sequential sampling; None: a grid of 0.05 sigma. Fixed sampling needs none.
    label : int, optional
        Evaluate mode: test this known label directly, without selection. For certified-accuracy tables only.
    seed, dataset, index
        Address of the noise.
    batch_size : int, optional
        Default: from the free memory. It is halved when memory runs out.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        A parameter out of range, named; an n that can never certify at this alpha.
    TypeError
        The image or the classifier's answers have the wrong type or shape.

    References
    ----------
    Cohen et al. 2019, arXiv:1902.02918, section 3.2.2 and Proposition 2; `medrobust_lib.smoothing.sequential`.
    """
    _check_image(image)
    check_mode_draws(n0, label is not None)
    if label is not None and label < 0:
        raise ValueError(f"label={label}: the known label is a class, 0 or higher; None lets selection draws choose")
    plan = make_plan(sampling, sigma=sigma, radii=radii, n=n, alpha=alpha)
    answers = classifier_answers(
        classifier, image, sigma=sigma, seed=seed, dataset=dataset, index=index, batch_size=batch_size
    )
    (verdict,) = take_votes(answers, 1, plan=plan, n0=n0, label=label)
    return Certificate(
        **vars(verdict),
        n0=0 if label is not None else n0,
        n_max=n,
        alpha=alpha,
        sigma=sigma,
        sampling=sampling,
        mode="predict" if label is None else "evaluate",
        guarantee="standard",
        seed=seed,
        model=getattr(classifier, "id", "own classifier"),
        dtype=str(getattr(classifier, "dtype", torch.float32)).removeprefix("torch."),
        device=image.device.type,
        image_shape=tuple(image.shape),
    )


def make_plan(sampling: Sampling, *, sigma: float, radii: Sequence[float] | None, n: int, alpha: float) -> Plan:
    """Check the numbers and return when to look and what is proved then.

    Raises
    ------
    ValueError
        Unknown sampling, sigma or alpha out of range, n too small to ever certify.
    """
    if sampling not in get_args(Sampling):
        raise ValueError(f"unknown sampling {sampling!r}; choose one of {', '.join(get_args(Sampling))}")
    check_sigma(sigma)
    check_alpha(alpha)
    check_draws(n, alpha)
    if sampling == "fixed":
        return FixedPlan(sigma=sigma, n=n, alpha=alpha)
    return sequential_plan(sigma=sigma, radii=radii, n=n, alpha=alpha)


def take_votes(answers: Answers, n_methods: int, *, plan: Plan, n0: int, label: int | None) -> list[Verdict]:
    """Run selection and estimation for several base classifiers on the same noise.

    Parameters
    ----------
    answers : callable of (role, first, count, positions)
        Returns int64 [count] for each classifier named by its position.
    n_methods : int
        Number of classifiers.
    plan : Plan
    n0 : int
        Selection draws.
    label : int or None
        Class to test for all classifiers, instead of selecting one.

    Returns
    -------
    list of Verdict
        Every certificate is valid on its own at the plan's alpha; sharing noise only makes them dependent.
    """
    everyone = range(n_methods)
    if label is None:
        selected = [_favourite(votes) for votes in answers("select", 0, n0, everyone)]
    else:
        selected = [label] * n_methods
    verdicts: dict[int, Verdict] = {
        position: Verdict(predicted=ABSTAIN, radius=0.0, p_lower=0.0, k=0, n=0)
        for position in everyone
        if selected[position] == ABSTAIN
    }
    active = [position for position in everyone if position not in verdicts]
    counts, proved, done = [0] * n_methods, [0] * n_methods, 0
    for look, draws in enumerate(int(value) for value in plan.looks):
        if not active:
            break
        for position, labels in zip(active, answers("estimate", done, draws - done, active), strict=True):
            counts[position] += int((labels == selected[position]).sum())
        done = draws
        for position in tuple(active):
            proved[position], finished = plan.step(look, counts[position], proved[position])
            if finished:
                k, certified = counts[position], proved[position]
                verdicts[position] = Verdict(
                    predicted=selected[position] if certified else ABSTAIN,
                    radius=plan.radius(k, draws, certified),
                    p_lower=plan.p_lower(k, draws, certified),
                    k=k,
                    n=draws,
                )
                active.remove(position)
    return [verdicts[position] for position in everyone]


def classifier_answers(
    classifier: Classifier,
    image: Tensor,
    *,
    sigma: float,
    seed: int,
    dataset: str,
    index: int,
    batch_size: int | None,
) -> Answers:
    """Let one classifier of pixels answer the noisy copies of one image."""
    batches = make_batches(batch_size, image.device, tuple(image.shape))

    @torch.no_grad()  # not inference mode: a base classifier may adapt to each copy by a gradient of its own
    def answers(role: Role, first: int, count: int, positions: Sequence[int]) -> list[Tensor]:
        stream = NoiseStream(seed, dataset, index, sigma, role)

        def answer(first: int, count: int) -> Tensor:
            return checked_answers(classifier(noisy_copies(image, stream, first=first, count=count)), count)

        return [torch.cat(list(batches.map(answer, first=first, count=count)))]

    return answers


def checked_answers(answers: Any, count: int) -> Tensor:
    """Bring a classifier's answers to the CPU, or say what is wrong with them.

    Raises
    ------
    TypeError
        Not int64 [count].
    """
    if not isinstance(answers, Tensor) or answers.dtype != torch.int64 or tuple(answers.shape) != (count,):
        what = f"{answers.dtype} {tuple(answers.shape)}" if isinstance(answers, Tensor) else type(answers).__name__
        raise TypeError(
            f"a base classifier maps [b, 3, H, W] to labels int64 [b]: expected int64 ({count},), got {what}; "
            "logits need .argmax(1)"
        )
    return answers.cpu()


def check_mode_draws(n0: int, label_given: bool) -> None:
    """Refuse a selection without draws."""
    if not label_given and n0 < 1:
        raise ValueError(f"n0={n0}: choosing a class takes at least one selection draw (100 is usual)")


def _check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3 or len(image) != 3:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be float [3, H, W] in [0, 1], not {what}; `model.prepare(images)[0]` gives one")
    low, high = (float(value) for value in torch.aminmax(image.detach()))
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(f"image values range over [{low:.4g}, {high:.4g}]: expected [0, 1], without normalisation")


def _rounded_down(bound: float) -> str:
    """Four digits that do not promise more than the bound: 0.99996 is not 1."""
    return str(Context(prec=4, rounding=ROUND_DOWN).create_decimal(repr(float(bound))))


def _count(labels: Tensor) -> np.ndarray:
    answered = labels[labels >= 0].numpy()
    return np.bincount(answered) if len(answered) else np.zeros(1, dtype=np.int64)


def _favourite(labels: Tensor) -> int:
    votes = _count(labels)
    return int(votes.argmax()) if votes.any() else ABSTAIN
