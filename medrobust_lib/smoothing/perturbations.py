r"""What is smoothed over: noise on every pixel, or the parameter of a corruption.

A certificate can be had for every family of transformations T_theta of an image that composes like addition,
T_a(T_b(x)) = T_{a+b}(x). Smoothed over theta, the classifier answers g(x) = argmax_y P[f(T_e(x)) = y], e drawn from a
law of standard deviation sigma. Then f(T_e(T_theta(x))) = f(T_{e+theta}(x)): to corrupt the image is to move the law,
and every theorem about moved laws holds word for word in the parameter. Adding noise to pixels is the case
T_theta(x) = x + theta with as many parameters as there are pixel values, and the others have one or two:

=====================  =================================  ========================  ===================
name                   T_theta(x)                         parameter                 law
=====================  =================================  ========================  ===================
pixel-noise            x + theta                          every pixel value         normal
contrast               m + e^k (x - m)                    k, log of the factor      normal
brightness             x + b                              b, pixel value            normal
contrast-brightness    m + b + e^k (x - m)                (k, b)                    normal, two sigmas
gamma                  x^(e^g)                            g, log of the exponent    normal
blur                   Gaussian blur of variance s        s >= 0, pixels squared    exponential
=====================  =================================  ========================  ===================

Here m is the mean of each channel: contrast does not move it, so contrast and brightness commute (about 0 they do not,
and the certificate would be false). The blur reflects at the border, half a pixel outside, where the cosine transform
makes it exact. T is applied to float pixels and its result is neither rounded nor clipped, as noise on pixels is not:
a certificate speaks of T_theta(x), while a file that was rounded to 8 bits and clipped holds another image.

Rotation, scaling and translation that brings in new pixels interpolate, and JPEG, pixelation and motion blur are no
groups: none of them composes like addition, so they can be tried and not be certified in this way.

Sources: Cohen et al. 2019 (arXiv:1902.02918) for pixels; Li et al. 2021 (TSS, arXiv:2002.12398) for parameters, the
exponential law and contrast about 0; Pautov et al. 2023 (arXiv:2309.16710).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from medrobust_lib.checks import check_choice, check_positive
from medrobust_lib.corruptions.suites import SUITES, Suite, find_suite
from medrobust_lib.models.geometry import PIXEL_LIMIT
from medrobust_lib.smoothing.bounds import Law, check_sigma, rounded_down, rounded_up

Sigma = float | tuple[float, ...]

# Six sigmas of contrast make pixels as large as models take them for scaled: a draw beyond would end the run.
_LARGEST_CONTRAST = math.log(PIXEL_LIMIT) / 6
_LARGEST_GAMMA = 3.0  # exponents of e^3 = 20, or a twentieth, leave no image


@dataclass(frozen=True)
class Perturbation:
    """A family of transformations that composes like addition; one of your own is a subclass.

    Two objects with equal fields stand for the same family: a store tells families apart by ``name``.

    Attributes
    ----------
    name : str
    law : {"normal", "exponential"}
        Of the parameters; the exponential law, whose mean is its sigma, is for parameters that are never negative.
    usual_sigma : float or tuple of float
        A level to begin with: a tuple for several parameters.
    radii : tuple of float
        Radii of interest where none are named.
    units : str
        Of sigma and radius.
    counterparts : mapping of str to callable
        Name of a function of the suites -> its parameters, as keywords, to theta, a tuple.
    alike : frozenset of str
        Names among the counterparts that are relatives and not T itself up to rounding and clipping.
    """

    name: ClassVar[str]
    law: ClassVar[Law] = "normal"
    usual_sigma: ClassVar[Sigma]
    radii: ClassVar[tuple[float, ...]] = (0.0,)
    units: ClassVar[str]
    counterparts: ClassVar[Mapping[str, Callable[..., tuple[float, ...]]]] = MappingProxyType({})
    alike: ClassVar[frozenset[str]] = frozenset()

    def shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the parameters of one copy of an image [3, H, W]: one by default for each of `usual_sigma`."""
        return (len(self.usual_sigma) if isinstance(self.usual_sigma, tuple) else 1,)

    def check_sigma(self, sigma: Sigma) -> None:
        """Refuse a level that smooths nothing; a family refuses those of other units, too, with a ValueError."""
        for level in sigma if isinstance(sigma, tuple) else (sigma,):
            check_sigma(level, law=self.law)

    def check_image(self, image: tuple[int, ...], sigma: Sigma) -> None:
        """Refuse images [3, H, W] that are too small to be transformed."""

    def draw_into(self, row: Tensor, sigma: Sigma, generator: torch.Generator) -> None:
        """Fill the parameters of one copy, float32 of `shape`; one number is the sigma of each of them."""
        for place, level in enumerate(sigma if isinstance(sigma, tuple) else (sigma,) * len(row)):
            if self.law == "exponential" and level:
                row[place : place + 1].exponential_(1 / level, generator=generator)
            else:
                row[place : place + 1].normal_(0, level, generator=generator)

    def apply(self, pixels: Tensor, theta: Tensor) -> Tensor:
        """T_theta of one image [3, H, W] or of b images [b, 3, H, W], for theta [b, m]: float [b, 3, H, W]."""
        raise NotImplementedError(f"{type(self).__name__} has no apply(pixels, theta), which makes T_theta of images")

    def unit(self, sigma: Sigma) -> float:
        """Sigma in the units of the radius: 1 for several parameters, whose radius counts their sigmas."""
        return 1.0 if isinstance(sigma, tuple) else sigma

    def describe(self, radius: float, sigma: Sigma, *, image: tuple[int, ...]) -> str:
        """The certified region in words: for every T_theta(x) of which the answer is that of x."""
        return f"under every {self.name} up to {rounded_down(radius)} {self.units}"

    def severities(self, suite: str | Suite, *, dataset: str = "") -> dict[str, tuple[tuple[float, ...], ...]]:
        """Theta of severity 1 to 5 of every corruption of a suite that is of this family.

        Raises
        ------
        ValueError
            The suite has none; or unknown suite, or a suite that does not know the data set.
        """
        suite = find_suite(suite)
        found = {
            corruption.name: tuple(self.counterparts[function](**row) for row in corruption.severities)
            for corruption in suite.families[suite.family(dataset)]
            if (function := corruption.function.__name__) in self.counterparts
        }
        if not found:
            knowing = " and ".join(filter(None, map(self._known_to, SUITES.values())))
            where = f"; choose {knowing}" if knowing else ", and no suite has one"
            on = f" on {dataset}" if dataset else ""
            raise ValueError(f"suite {suite.id}{on} has no corruption of the family {self.name!r}{where}")
        return found

    def smoothed(
        self, labels: Tensor, grid: Tensor, *, at: Tensor, sigma: Sigma, n_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Answers of the smoothed classifier to T_theta(x), by a sum over a grid instead of by draws.

        A check of certificates, and no certificate: the base classifier may do anything between the points.

        Parameters
        ----------
        labels : int64 [n, G]
            Answers of the base classifier to n images at the points of the grid; below 0 for no class.
        grid : float [G, m]
            Evenly spaced, and three standard deviations wider than `at` to every side that the law reaches.
        at : float [C, m]
            Values of theta.
        sigma : float or tuple of float
        n_classes : int

        Returns
        -------
        answers : int64 [n, C]
        shares : float64 [n, C]
            Probability of the answer.
        """
        scales = torch.tensor(sigma if isinstance(sigma, tuple) else (sigma,), dtype=torch.float64)
        away = (grid.double()[None] - at.double()[:, None]) / scales  # [C, G, m]
        logs = -away.square().sum(-1) / 2
        if self.law == "exponential":
            logs = torch.where((away >= -1e-6).all(-1), -away.sum(-1), -torch.inf)
        weights = logs.softmax(1).T  # [G, C]
        shares = torch.stack([(labels == k).double() @ weights for k in range(n_classes)])  # [K, n, C]
        return shares.argmax(0), shares.amax(0)

    def _known_to(self, suite: Suite) -> str:
        """A suite that has corruptions of this family, with the kinds of data sets that have them; empty for none."""
        own = [
            kind for kind, rows in suite.families.items() if any(r.function.__name__ in self.counterparts for r in rows)
        ]
        return f"{suite.id} for {', '.join(own)}" if any(own) else suite.id if own else ""

    def covers(self, theta: Sequence[float], radius: float, sigma: Sigma) -> bool:
        """Whether theta lies in the certified region of a radius, whose rim counts, as in certified accuracy.

        Several exponential parameters: densities multiply, so it is the sum of the shifts that counts.
        """
        scales = sigma if isinstance(sigma, tuple) else (1.0,) * len(theta)
        levels = [value / scale for value, scale in zip(theta, scales, strict=True)]
        if self.law == "exponential":
            return min(levels) >= 0 and sum(levels) <= radius
        return math.hypot(*levels) <= radius

    def reach(self, radius: float, sigma: Sigma, *, dataset: str = "") -> str:
        """The suites' severities within a radius, in words; empty where no suite has a corruption of this family.

        Severities of suites with parameters for each kind of data set are those of `dataset`, where it is known.
        """
        told = []
        for suite in SUITES.values():
            try:
                found = self.severities(suite, dataset=dataset)
            except ValueError:  # none, or none for this data set
                continue
            for name, rows in found.items():
                inside = [self.covers(theta, radius, sigma) for theta in rows]
                severity = inside.index(False) if False in inside else len(inside)
                kind = " (a relative of it)" if name in self.alike else ""
                told.append(f"{suite.id} {name}{kind} {f'up to severity {severity}' if severity else 'at no severity'}")
        return "; ".join(told)


class PixelNoise(Perturbation):
    """Independent noise on every pixel value; the radius is an L2 distance."""

    name = "pixel-noise"
    usual_sigma = 0.25
    radii = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    units = "[0, 1] pixel units (L2)"

    def shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """As the image."""
        return image

    def check_sigma(self, sigma: Sigma) -> None:
        """Refuse what smooths nothing, and levels in 0 to 255."""
        check_sigma(_one(self, sigma))

    def draw_into(self, row: Tensor, sigma: Sigma, generator: torch.Generator) -> None:
        """Fill an image of noise."""
        row.normal_(0, sigma, generator=generator)

    def apply(self, pixels: Tensor, theta: Tensor) -> Tensor:
        """Add the noise."""
        return pixels + theta

    def describe(self, radius: float, sigma: Sigma, *, image: tuple[int, ...]) -> str:
        """The ball."""
        return f"within L2 radius {rounded_down(radius)} of this image ([0, 1] pixels, {' x '.join(map(str, image))})"


class Contrast(Perturbation):
    """The distance of every pixel value to its channel's mean, multiplied by e^k."""

    name = "contrast"
    usual_sigma = 0.55
    radii = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25)
    units = "log contrast factor"
    counterparts = MappingProxyType({
        "contrast": lambda factor: (math.log(factor),),
        "scale_contrast": lambda factor: (math.log(factor),),
    })  # fmt: skip
    alike = frozenset({"contrast_up", "contrast_down"})  # about the mean of the luma, and clipped upwards

    def check_sigma(self, sigma: Sigma) -> None:
        """Refuse what smooths nothing, and percents or factors."""
        _check_log("contrast", _one(self, sigma), most=_LARGEST_CONTRAST)

    def apply(self, pixels: Tensor, theta: Tensor) -> Tensor:
        """Multiply the contrast."""
        mean = pixels.mean(dim=(-2, -1), keepdim=True)
        return mean + theta[:, :1, None, None].exp() * (pixels - mean)

    def describe(self, radius: float, sigma: Sigma, *, image: tuple[int, ...]) -> str:
        """The contrast factors."""
        return f"at every contrast {_factors(radius)} times that of this image, about each channel's mean"


class Brightness(Perturbation):
    """The same amount added to every pixel value."""

    name = "brightness"
    usual_sigma = 0.2
    radii = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    units = "[0, 1] pixel value"
    counterparts = MappingProxyType({"brightness": lambda added: (added,)})
    alike = frozenset({"brightness"})  # raises HSV's value: the same on gray images until it clips

    def check_sigma(self, sigma: Sigma) -> None:
        """Refuse what smooths nothing, and levels in 0 to 255."""
        _check_brightness(_one(self, sigma))

    def apply(self, pixels: Tensor, theta: Tensor) -> Tensor:
        """Add the amount."""
        return pixels + theta[:, :1, None, None]

    def describe(self, radius: float, sigma: Sigma, *, image: tuple[int, ...]) -> str:
        """The amounts."""
        return f"with any amount from -{rounded_down(radius)} to {rounded_down(radius)} added to every pixel value"


class ContrastBrightness(Perturbation):
    """Contrast about each channel's mean and brightness at once; the region is an ellipse, the radius in sigmas."""

    name = "contrast-brightness"
    usual_sigma = (Contrast.usual_sigma, Brightness.usual_sigma)
    radii = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
    units = "standard deviations"
    counterparts = MappingProxyType({
        "contrast": lambda factor: (math.log(factor), 0.0),
        "scale_contrast": lambda factor: (math.log(factor), 0.0),
        "brightness": lambda added: (0.0, added),
    })  # fmt: skip
    alike = Contrast.alike | Brightness.alike

    def check_sigma(self, sigma: Sigma) -> None:
        """Refuse anything but two levels, each in its own units."""
        if not isinstance(sigma, tuple) or len(sigma) != 2:
            raise ValueError(
                f"sigma={sigma!r}: contrast-brightness takes a pair such as {self.usual_sigma}; several levels are a "
                "list of pairs"
            )
        _check_log("contrast", sigma[0], most=_LARGEST_CONTRAST)
        _check_brightness(sigma[1])

    def apply(self, pixels: Tensor, theta: Tensor) -> Tensor:
        """Multiply the contrast and add the amount."""
        return Contrast().apply(pixels, theta) + theta[:, 1:, None, None]

    def describe(self, radius: float, sigma: Sigma, *, image: tuple[int, ...]) -> str:
        """The ellipse, by its axes."""
        contrast, brightness = (radius * level for level in sigma)
        amount = rounded_down(brightness)
        return (
            f"inside the ellipse through contrasts {_factors(contrast)} times that of this image, about each channel's "
            f"mean, and amounts from -{amount} to {amount} added to every pixel value"
        )


class Gamma(Perturbation):
    """Pixel values in [0, 1] raised to the power e^g."""

    name = "gamma"
    usual_sigma = 0.5
    radii = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    units = "log gamma"
    counterparts = MappingProxyType({"gamma_correction": lambda exponent: (math.log(exponent),)})

    def check_sigma(self, sigma: Sigma) -> None:
        """Refuse what smooths nothing, and percents or exponents."""
        _check_log("gamma", _one(self, sigma), most=_LARGEST_GAMMA)

    def apply(self, pixels: Tensor, theta: Tensor) -> Tensor:
        """Raise to the power."""
        return pixels ** theta[:, :1, None, None].exp()

    def describe(self, radius: float, sigma: Sigma, *, image: tuple[int, ...]) -> str:
        """The exponents."""
        return f"at every gamma {_factors(radius)} (exponent of the pixel values)"


class Blur(Perturbation):
    """Gaussian blur, reflected half a pixel outside the border; its variances add, and sigma is their mean."""

    name = "blur"
    law = "exponential"
    usual_sigma = 2.0
    radii = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    units = "variance in square pixels"
    counterparts = MappingProxyType({"gaussian_blur": lambda width: ((0.15 * width + 0.35) ** 2,)})
    alike = frozenset({"gaussian_blur"})  # a kernel that is cut off, mirrored at the border's pixels

    def check_sigma(self, sigma: Sigma) -> None:
        """Refuse what smooths nothing."""
        hint = ": the mean variance of the blur in square pixels (1 / rate of its exponential law), such as 2"
        check_positive("sigma", _one(self, sigma), hint=hint)

    def check_image(self, image: tuple[int, ...], sigma: Sigma) -> None:
        """Refuse images that are smaller than three standard deviations of the mean blur to either side."""
        width = 6 * math.sqrt(sigma)
        if min(image[-2:]) < width:
            size = " x ".join(map(str, image[-2:]))
            raise ValueError(
                f"sigma={sigma:g}: a blur of so many square pixels is {width:.0f} pixels wide, the image has {size}; "
                f"take sigma up to {rounded_down((min(image[-2:]) / 6) ** 2)}"
            )

    def apply(self, pixels: Tensor, theta: Tensor) -> Tensor:
        """Blur rows and columns."""
        rows, columns = (self._matrix(pixels, theta[:, 0], axis) for axis in (-2, -1))
        return rows @ pixels @ columns.mT

    @staticmethod
    def _matrix(pixels: Tensor, variance: Tensor, axis: int) -> Tensor:
        """[b, 1, N, N]: the blur of one axis by cosine transform, frequencies damped by exp(-s w^2 / 2), and back."""
        size = pixels.shape[axis]
        places = torch.arange(size, dtype=torch.float64)
        frequencies = math.pi * places / size
        cosines = torch.cos(frequencies[:, None] * (places + 0.5)) * math.sqrt(2 / size)
        cosines[0] /= math.sqrt(2)
        cosines, frequencies = cosines.to(pixels), frequencies.to(pixels)
        damped = torch.exp(-variance.to(pixels)[:, None] * frequencies**2 / 2)
        return ((cosines.T * damped[:, None, :]) @ cosines)[:, None]

    def describe(self, radius: float, sigma: Sigma, *, image: tuple[int, ...]) -> str:
        """The widths."""
        size, deviation = " x ".join(map(str, image)), rounded_down(math.sqrt(radius))
        return f"under every Gaussian blur of a standard deviation up to {deviation} pixels ({size})"


PIXEL_NOISE = PixelNoise()
PERTURBATIONS: Mapping[str, Perturbation] = MappingProxyType(
    {one.name: one for one in (PIXEL_NOISE, Contrast(), Brightness(), ContrastBrightness(), Gamma(), Blur())}
)


def find_perturbation(perturbation: str | Perturbation) -> Perturbation:
    """The family of a name, or the one that is given.

    Raises
    ------
    ValueError
        Unknown name; the valid ones and the closest match are given.
    """
    if isinstance(perturbation, Perturbation):
        return perturbation
    check_choice("perturbation", perturbation, PERTURBATIONS)
    return PERTURBATIONS[perturbation]


def as_level(sigma: Any) -> Sigma:
    """A noise level as a float, or as a tuple of floats; a TypeError for anything else, texts and truth values too."""
    try:
        if isinstance(sigma, str | bytes | bool):
            raise TypeError
        return float(sigma) if np.ndim(sigma) == 0 else tuple(float(level) for level in sigma)
    except (TypeError, ValueError):
        raise TypeError(f"sigma={sigma!r}: give a number, or a tuple of numbers for several parameters") from None


def level_in_words(sigma: Sigma) -> str:
    """A noise level: "0.25", or "0.4 and 0.2"."""
    return " and ".join(f"{level:g}" for level in (sigma if isinstance(sigma, tuple) else (sigma,)))


def check_levels(sigmas: Any, perturbation: Perturbation, image_size: int, *, clean: bool = True) -> tuple[Sigma, ...]:
    """Bring noise levels to floats, or tuples of floats, each once, and refuse those of another family's units.

    Parameters
    ----------
    sigmas : float, or sequence of float or of tuples
    perturbation : Perturbation
    image_size : int
        Side of the model's input in pixels.
    clean : bool
        Whether 0, the image as it is, is a level.

    Raises
    ------
    ValueError
        No level, one out of range, or images that are too small for it.
    """
    alone = np.isscalar(sigmas) or getattr(sigmas, "shape", None) == ()
    levels = [as_level(sigma) for sigma in ([sigmas] if alone else sigmas)]
    if not levels:
        raise ValueError(f"sigmas={sigmas!r}: give at least one level in {perturbation.units}")
    for level in levels:
        if level != 0 or not clean:
            perturbation.check_sigma(level)
            perturbation.check_image((3, image_size, image_size), level)
    return tuple(dict.fromkeys(levels))


def _one(perturbation: Perturbation, sigma: Sigma) -> float:
    if isinstance(sigma, tuple):
        raise ValueError(f"sigma={sigma}: {perturbation.name} has one parameter; give one number")
    return sigma


def _check_log(what: str, sigma: float, *, most: float) -> None:
    hint = (
        f": the standard deviation of the log of the {what} factor; 0.4 draws two thirds of the factors in 0.67 to 1.5"
    )
    check_positive("sigma", sigma, most=most, hint=hint)


def _check_brightness(sigma: float) -> None:
    hint = ": the standard deviation of the added brightness in [0, 1] pixel values; divide one in 0 to 255 by 255"
    check_positive("sigma", sigma, most=1.0, hint=hint)


def _factors(radius: float) -> str:
    return f"from {rounded_up(math.exp(-radius))} to {rounded_down(math.exp(radius))}"
