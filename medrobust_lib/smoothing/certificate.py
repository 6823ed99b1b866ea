"""The record of one certificate, of what became of its texts if it has some, and in words what it guarantees."""

import textwrap
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context
from typing import Literal

ABSTAIN = -1

Sampling = Literal["fixed", "sequential"]

Mode = Literal["predict", "evaluate"]

Guarantee = Literal["standard", "frozen-prompt", "candidate-set", "per-sample", "composite", "corrected"]

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
    "corrected": (
        "what an ideal reader would call the model's text (its true label, not the truth of the image) is constant in "
        "the ball if the oracle's error model holds"
    ),
}

_EQUIVALENCE_GUARANTEES: dict[Guarantee, str] = {
    "composite": "in the whole ball the oracle calls most of the model's texts equivalent to that frozen text",
    "corrected": (
        "in the whole ball an ideal reader would call most of the model's texts equivalent to that frozen text, if the "
        "oracle's error model holds; this says nothing about the truth of the image"
    ),
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
        how = _votes(self)
        known = "; the class was the known label, so this serves evaluation only" if self.mode == "evaluate" else ""
        if self.abstained:
            return f"abstain: {how} prove no majority{known}"
        return (
            f"class {self.predicted} {_ball(self)}: {how} "
            f"prove a probability above {_rounded_down(self.p_lower)}{known}. "
            f"Guarantee ({self.guarantee}): {GUARANTEES[self.guarantee]}"
        )


@dataclass(frozen=True)
class Tally:
    """What became of the texts of a certificate: selection draws count in n0, estimation draws in n.

    Attributes
    ----------
    total : int
    empty : int
        Empty, or not generated in time: they vote for nothing.
    truncated : int
        Cut at the largest number of tokens, and judged as they are.
    unlabelled : int
        The oracle gave no label, or no answer.
    failed : int
        How often the oracle raised at a text that it was asked about alone; when clusters are built, a text may be
        asked about several times.
    first_error : str
        What it raised first.
    """

    total: int = 0
    empty: int = 0
    truncated: int = 0
    unlabelled: int = 0
    failed: int = 0
    first_error: str = ""

    def __add__(self, other: "Tally") -> "Tally":
        counted = ("total", "empty", "truncated", "unlabelled", "failed")
        counts = {name: getattr(self, name) + getattr(other, name) for name in counted}
        return Tally(**counts, first_error=self.first_error or other.first_error)


def about_text(certificate: Certificate, answer: str | None, *, equivalence: bool) -> str:
    """A "composite" or "corrected" certificate in words that name its answer instead of a class number.

    Parameters
    ----------
    certificate : Certificate
    answer : str or None
        The tested label, or the frozen text of an equivalence; None if selection found none.
    equivalence : bool
        Whether texts were compared with the answer instead of labelled.
    """
    if answer is None:
        return "abstain: nothing was selected, so nothing was tested"
    corrected = certificate.guarantee == "corrected"
    named = repr(textwrap.shorten(answer, 80, placeholder=" ..."))
    if equivalence:
        tested, guarantees = f"texts equivalent to {named}", _EQUIVALENCE_GUARANTEES
        other = named if certificate.abstained else "it"
        event = f"{'an ideal reader would call' if corrected else 'the oracle calls'} a text equivalent to {other}"
    else:
        tested, guarantees = named, GUARANTEES
        event = f"an ideal reader would call the text {named}" if corrected else f"the oracle's label is {named}"
    if not certificate.abstained:
        return (
            f"{tested} {'stay the majority ' if equivalence else ''}{_ball(certificate)}: {_votes(certificate)} "
            f"prove{', with the error model,' if corrected else ''} that {event} with probability above "
            f"{_rounded_down(certificate.p_lower)} under noise. "
            f"Guarantee ({certificate.guarantee}): {guarantees[certificate.guarantee]}"
        )
    if not corrected:
        return f"abstain: {_votes(certificate)} prove no majority {'of' if equivalence else 'for'} {tested}"
    left = f"only p > {_rounded_down(certificate.p_lower)}" if certificate.p_lower > 0 else "no bound of p"
    return (
        f"abstain: after the error model {left} remains, not above one half (p: probability under noise that {event})"
    )


def _votes(certificate: Certificate) -> str:
    return (
        f"{certificate.k} of {certificate.n} votes at sigma {certificate.sigma:g} ({certificate.sampling} sampling, "
        f"alpha {certificate.alpha:g})"
    )


def _ball(certificate: Certificate) -> str:
    size = " x ".join(map(str, certificate.image_shape))
    return f"within L2 radius {_rounded_down(certificate.radius)} of this image ([0, 1] pixels, {size})"


def _rounded_down(bound: float) -> str:
    """Four digits that do not promise more than the bound: 0.99996 is not 1."""
    return str(Context(prec=4, rounding=ROUND_DOWN).create_decimal(repr(float(bound))))
