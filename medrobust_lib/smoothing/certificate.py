"""The record of one certificate, and in words what it guarantees."""

import tomllib
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_UP, Context
from importlib.resources import files
from typing import Literal

from medrobust_lib.smoothing.bounds import Bounds

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
        L2 radius in [0, 1] pixel units at the size `image_shape`; 0 for an abstention.
    p_lower : float
        Lower bound of the probability that the base classifier gives `predicted` under noise; 0 where
        sequential sampling has proved nothing.
    p_upper : float
        Upper bound of the probability of every other class, answers that are no class among them: 1 - p_lower
        where one bound is used, 1 where nothing is proved.
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
    sigma: float
    bounds: Bounds
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

    @property
    def votes(self) -> str:
        """The votes in words."""
        return f"{self.k} of {self.n} votes at sigma {self.sigma:g} ({self.sampling} sampling, alpha {self.alpha:g})"

    @property
    def ball(self) -> str:
        """The certified ball in words."""
        size = " x ".join(map(str, self.image_shape))
        return f"within L2 radius {_rounded_down(self.radius)} of this image ([0, 1] pixels, {size})"

    @property
    def bound(self) -> str:
        """`p_lower` in words."""
        return _rounded_down(self.p_lower)

    @property
    def rivals(self) -> str:
        """`p_upper` in words, where it says more than `p_lower`."""
        if self.bounds == "one":
            return ""
        return f", and below {_digits(self.p_upper, ROUND_UP)} for every other class"

    def __str__(self) -> str:
        known = "; the class was the known label, so this serves evaluation only" if self.mode == "evaluate" else ""
        if self.abstained:
            missing = "majority" if self.bounds == "one" else "lead over every other class"
            return f"abstain: {self.votes} prove no {missing}{known}"
        return (
            f"class {self.predicted} {self.ball}: {self.votes} prove a probability above {self.bound}{self.rivals}"
            f"{known}. "
            f"Guarantee ({self.guarantee}): {GUARANTEES[self.guarantee]}"
        )


def _rounded_down(bound: float) -> str:
    """Four digits that do not promise more than the bound: 0.99996 is not 1."""
    return _digits(bound, ROUND_DOWN)


def _digits(bound: float, rounding: str) -> str:
    return str(Context(prec=4, rounding=rounding).create_decimal(repr(float(bound))))
