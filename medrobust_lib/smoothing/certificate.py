"""The record of one certificate, and in words what it guarantees."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from medrobust_lib.smoothing.bounds import Bounds, rounded_down, rounded_up
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE, Perturbation, Sigma, level_in_words

ABSTAIN = -1

Sampling = Literal["fixed", "sequential"]

Mode = Literal["predict", "evaluate"]

Guarantee = Literal["standard", "frozen-prompt", "candidate-set", "per-sample", "composite", "corrected"]

GUARANTEES: dict[Guarantee, str] = tomllib.loads(
    files(__package__).joinpath("guarantees.toml").read_text(encoding="utf-8")
)
"""What a certificate of each guarantee states, in words."""


@dataclass(frozen=True)
class Certificate:
    """What is proved about one image at one noise level, and how.

    Attributes
    ----------
    predicted : int
        Class, or -1 for an abstention.
    radius : float
        In the units of the perturbation; 0 for an abstention. For pixel noise an L2 radius in [0, 1] pixel units at the
        size `image_shape`.
    p_lower : float
        Lower bound of the probability that the base classifier gives `predicted` under noise; 0 where
        sequential sampling has proved nothing.
    p_upper : float
        Upper bound of the probability of every other class, answers that are no class among them: 1 - p_lower
        where one bound is used, 1 where nothing is proved.
    k, n : int
        Votes for the tested class among the estimation draws made.
    n0 : int
        Selection draws, which chose the tested class and between one bound and two; 0 where neither was chosen.
    n_max : int
        Estimation draws allowed.
    alpha : float
        Probability that the certificate is false is at most this.
    sigma : float or tuple of float
        Standard deviation of the noise, in the units of the perturbation.
    bounds : {"one", "two"}
        Whether `p_upper` was bounded by itself, with half of alpha for each of the two.
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
    perturbation : Perturbation
        What was smoothed over.
    dataset : str
        Id of the data set, where it is known; the suites' severities may depend on it.
    """

    predicted: int
    radius: float
    p_lower: float
    p_upper: float
    k: int
    n: int
    n0: int
    n_max: int
    alpha: float
    sigma: Sigma
    bounds: Bounds
    sampling: Sampling
    mode: Mode
    guarantee: Guarantee
    seed: int
    model: str
    dtype: str
    device: str
    image_shape: tuple[int, ...]
    perturbation: Perturbation = PIXEL_NOISE
    dataset: str = ""

    @property
    def draws(self) -> int:
        """Noisy copies classified in all."""
        return self.n0 + self.n

    @property
    def abstained(self) -> bool:
        """Whether nothing was proved."""
        return self.predicted == ABSTAIN

    @property
    def votes(self) -> str:
        """The votes in words."""
        level = level_in_words(self.sigma)
        return f"{self.k} of {self.n} votes at sigma {level} ({self.sampling} sampling, alpha {self.alpha:g})"

    @property
    def region(self) -> str:
        """The certified region in words, and the severities of the suites that it holds."""
        region = self.perturbation.describe(self.radius, self.sigma, image=self.image_shape)
        reached = self.perturbation.reach(self.radius, self.sigma, dataset=self.dataset)
        return f"{region} ({reached})" if reached else region

    @property
    def bound(self) -> str:
        """`p_lower` in words."""
        return rounded_down(self.p_lower)

    @property
    def rivals(self) -> str:
        """`p_upper` in words, where it says more than `p_lower`."""
        if self.bounds == "one":
            return ""
        return f", and below {rounded_up(self.p_upper)} for every other class"

    def __str__(self) -> str:
        known = "; the class was the known label, so this serves evaluation only" if self.mode == "evaluate" else ""
        if self.abstained:
            missing = "majority" if self.bounds == "one" else "lead over every other class"
            return f"abstain: {self.votes} prove no {missing}{known}"
        return (
            f"class {self.predicted} {self.region}: {self.votes} prove a probability above {self.bound}{self.rivals}"
            f"{known}. Guarantee ({self.guarantee}): {GUARANTEES[self.guarantee]}"
        )
