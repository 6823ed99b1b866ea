"""Certificates of randomized smoothing: PREDICT and CERTIFY of Cohen et al., fixed or sequential.

The smoothed classifier g answers what its base classifier f answers most often under Gaussian noise,
g(x) = argmax_y P[f(x + e) = y] with e ~ N(0, sigma^2 I). A certificate says: g(x') is the predicted class for
every x' within an L2 radius of x. It is false with probability at most alpha, over the noise drawn to make it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from medrobust_lib.smoothing.batching import make_batches
from medrobust_lib.smoothing.bounds import check_alpha, check_sigma, minimum_draws
from medrobust_lib.smoothing.certificate import ABSTAIN, Certificate, Sampling
from medrobust_lib.smoothing.noise import NoiseStream, Role, noisy_copies
from medrobust_lib.smoothing.votes import (
    Answers,
    check_classifier,
    check_mode_draws,
    checked_answers,
    count_votes,
    make_plan,
    take_votes,
)

Classifier = Callable[[Tensor], Tensor]


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
        float32 [b, 3, H, W] in pixel units -> labels [b], whole numbers in a tensor, array or list; one below 0 counts
        for no class.
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
        The image or the classifier's answers have the wrong type or shape; the classifier is a dual encoder.

    References
    ----------
    Cohen et al. 2019, arXiv:1902.02918, section 3.2.1 and Proposition 1.
    """
    check_sigma(sigma)
    check_alpha(alpha)
    fewest = minimum_draws(alpha / 2)  # the test is two-sided
    if n < fewest:
        raise ValueError(f"n={n} draws can never answer at alpha={alpha}, unanimous or not; use n >= {fewest}")
    check_classifier(classifier)
    check_image(image)
    answers = classifier_answers(
        classifier, image, sigma=sigma, seed=seed, dataset=dataset, index=index, batch_size=batch_size
    )
    votes = count_votes(answers("select", 0, n, [0])[0])
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
        float32 [b, 3, H, W] in pixel units -> labels [b], whole numbers in a tensor, array or list; one below 0 counts
        for no class. It must be fixed before the image is seen, and one answer must not depend on the rest of the
        batch: the certificate's guarantee is "standard". Its attributes ``id`` and ``dtype``, where it has them, are
        recorded.
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
        Radii of interest of sequential sampling; few of them spare many draws. None: a grid of 0.05 sigma, which
        spares few. Fixed sampling needs none.
    label : int, optional
        Evaluate mode: test this known label directly, without selection. For certified-accuracy tables only.
    seed, dataset, index
        Address of the noise. Give every image an index of its own: certificates on the same noise are each valid,
        but err together.
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
        The image or the classifier's answers have the wrong type or shape; the classifier is a dual encoder.

    Notes
    -----
    The fixed procedure is CERTIFY of Cohen et al. (2019), with f the classifier:

    1. choose    class = the most frequent f(image + noise) over n0 draws (role "select")
    2. count     k = how many of n fresh draws (role "estimate") give that class
    3. bound     p_lower = Clopper-Pearson(k, n, alpha), one-sided
    4. answer    p_lower > 1/2: class, with radius sigma Phi^-1(p_lower); else abstain with radius 0

    References
    ----------
    Cohen et al. 2019, arXiv:1902.02918, section 3.2.2 and Proposition 2; `medrobust_lib.smoothing.sequential`.
    """
    check_classifier(classifier)
    check_image(image)
    check_mode_draws(n0, label is not None)
    if label is not None and label < 0:
        raise ValueError(f"label={label}: the known label is a class, 0 or higher; None lets selection draws choose")
    plan = make_plan(sampling, sigma=sigma, radii=radii, n=n, alpha=alpha)
    answers = classifier_answers(
        classifier, image, sigma=sigma, seed=seed, dataset=dataset, index=index, batch_size=batch_size
    )
    (verdict,) = take_votes(answers, [plan], n0=n0, label=label)
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


def check_image(image: Tensor) -> None:
    """Refuse anything but float [3, H, W] in [0, 1]."""
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3 or len(image) != 3:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be float [3, H, W] in [0, 1], not {what}; `model.prepare(images)[0]` gives one")
    low, high = (float(value) for value in torch.aminmax(image.detach()))
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(f"image values range over [{low:.4g}, {high:.4g}]: expected [0, 1], without normalisation")
