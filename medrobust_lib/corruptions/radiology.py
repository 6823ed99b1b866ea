"""What happens to radiographs, ultrasound and OCT images on their way: physics first, then the display's logarithm.

Lengths are shares of the image's side, so that any size from 28 pixels on shows the same thing. Every function draws
one field for all channels: an image of equal channels keeps them equal.
"""

import functools
import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import gammaincinv

from medrobust_lib.corruptions.functions import Pixels, on_pixels

Light = NDArray[np.float64]
P = ParamSpec("P")

_DECADES = 1.5  # powers of ten of exposure between the black and the white of a radiograph
_PHOTONS = 20_000.0  # that reach a black pixel at full dose
_DECIBELS = 50.0  # between the black and the white of an ultrasound or OCT image
_NOISE = 10**-4.2  # power of an OCT scanner's noise, relative to white


def on_light(function: Callable[Concatenate[Light, P], Light]) -> Callable[Concatenate[Pixels, P], Pixels]:
    """As `on_pixels`, for a function of light in [0, 1], float64 [H, W, channels]; its result is clipped, rounded."""

    @functools.wraps(function)
    def on_bytes(image: Pixels, /, *args: P.args, **kwargs: P.kwargs) -> Pixels:
        light = function(np.atleast_3d(image) / 255, *args, **kwargs)
        return np.rint(light.clip(0, 1) * 255).astype(np.uint8).reshape(image.shape)

    return on_pixels(on_bytes)


def places(light: Light) -> tuple[Light, Light]:
    """Middle of each pixel, in shares of the shorter side from the middle of the image: [H, 1, 1] down, [1, W, 1]."""
    height, width = light.shape[:2]
    down, right = ((np.arange(side) + 0.5 - side / 2) / min(height, width) for side in (height, width))
    return down[:, None, None], right[None, :, None]


def blurred(light: Light, share: float) -> Light:
    """Gaussian blur whose standard deviation is a share of the shorter side."""
    return ndimage.gaussian_filter(light, share * min(light.shape[:2]), mode="nearest", axes=(0, 1))


# ---- radiographs, in which white is where few photons came through ----


@on_light
def quantum_noise(image: Light, *, dose: float, rng: np.random.Generator) -> Light:
    """Expose with fewer photons: their number is Poisson, so white areas, behind bone and heart, get noisiest.

    The gray level is the negative logarithm of the exposure (Bushberg et al. 2012, The Essential Physics of Medical
    Imaging); a photon more or less is seen by that.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    dose : float
        Share of a dose of 20 000 photons in a black pixel, > 0.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    expected = dose * _PHOTONS * _exposure(image).mean(2, keepdims=True)
    counted = np.maximum(rng.poisson(expected), 0.5)  # a pixel without a photon is as white as half a photon makes it
    return image - np.log10(counted / expected) / _DECADES


@on_light
def scatter_veil(image: Light, *, ratio: float) -> Light:
    """Add scattered photons: a broad veil that lifts the dark and takes contrast by 1 / (1 + ratio).

    The scatter is the exposure spread by a wide Gaussian (Boone et al. 1986, Medical Physics 13:254), in a fixed ratio
    to what came straight; the display is set to the same mean exposure.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    ratio : float
        Of scattered to primary photons; without a grid 1 to 5 in the chest.

    Returns
    -------
    uint8 of the same shape
    """
    exposure = _exposure(image)
    return _developed((exposure + ratio * blurred(exposure, 0.2)) / (1 + ratio))


@on_light
def collimator_edge(image: Light, *, share: float, rng: np.random.Generator) -> Light:
    """Close the collimator too far: two neighbouring blades with a soft edge cover tissue; what lies below stays white.

    The edge is as wide as the focal spot's penumbra, and the blades are turned a little against the detector (Bushberg
    et al. 2012).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    share : float
        Of the side that each blade covers.
    rng : numpy.random.Generator
        Draws the corner and the angle, up to 6 degrees.

    Returns
    -------
    uint8 of the same shape
    """
    (down, right), signs = places(image), rng.choice((-1, 1), 2)
    turned = math.tan(math.radians(rng.uniform(-6, 6)))
    first, second = signs[0] * (down + turned * right), signs[1] * (right - turned * down)
    inside = np.minimum(first + np.abs(down).max(), second + np.abs(right).max()) - share
    opened = (inside / 0.02 + 0.5).clip(0, 1)
    return opened * image + (1 - opened) * (0.9 + 0.05 * image)


@on_light
def grid_lines(image: Light, *, depth: float, rng: np.random.Generator) -> Light:
    """Leave the anti-scatter grid standing: its lamellae, undersampled by the detector, show as even stripes.

    Grid lines sit in a narrow band of frequencies (Lin et al. 2006, J Digit Imaging 19:351) and beat with the pixels.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    depth : float
        Of the stripes, in gray levels from 0 to 1.
    rng : numpy.random.Generator
        Draws the period (1/40 to 1/20 of the side, at least 3 pixels), the phase and a tilt up to 3 degrees.

    Returns
    -------
    uint8 of the same shape
    """
    down, right = places(image)
    period = max(rng.uniform(1 / 40, 1 / 20), 3 / min(image.shape[:2]))
    tilt, phase = math.radians(rng.uniform(-3, 3)), rng.uniform(0, 2 * math.pi)
    across = math.cos(tilt) * right + math.sin(tilt) * down
    return image + depth * np.sin(2 * math.pi * across / period + phase) / 2


@on_light
def patient_motion(image: Light, *, length: float, rng: np.random.Generator) -> Light:
    """Breathe during the exposure: the mean of the exposures along a line that runs up and down, more or less.

    Motion unsharpness adds photons, not gray levels, so dark lungs wash over bright ribs (Bushberg et al.
    2012).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    length : float
        Of the way, as a share of the side.
    rng : numpy.random.Generator
        Draws the direction, up to 30 degrees from the vertical.

    Returns
    -------
    uint8 of the same shape
    """
    way, angle = length * min(image.shape[:2]), math.radians(rng.uniform(-30, 30))
    steps = np.linspace(-way / 2, way / 2, math.ceil(way) + 1)
    exposure = _exposure(image)
    moved = [
        ndimage.shift(exposure, (step * math.cos(angle), step * math.sin(angle), 0), order=1, mode="nearest")
        for step in steps
    ]
    return _developed(np.mean(moved, axis=0))


def _exposure(light: Light) -> Light:
    return 10 ** (-_DECADES * light)


def _developed(exposure: Light) -> Light:
    return -np.log10(exposure) / _DECADES


# ---- ultrasound and OCT, in which gray levels are decibels of what was sent back ----


@on_light
def speckle(image: Light, *, looks: float, rng: np.random.Generator) -> Light:
    """Add fully developed speckle, averaged over a number of independent looks: gamma-distributed intensity.

    One look is exponential (Goodman 1976; Wagner et al. 1983, IEEE Trans Sonics Ultrason 30:156; for OCT Schmitt et al.
    1999, J Biomed Opt 4:95). Grains are twice as wide as deep; where nothing echoes, none appear.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    looks : float
        At least 1, not only whole numbers; fewer are grainier.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    grain = max(0.5, min(image.shape[:2]) / 160)
    waves = ndimage.gaussian_filter(rng.normal(size=(2, *image.shape[:2], 1)), (0, grain, 2 * grain, 0), mode="wrap")
    intensity = (waves**2).sum(0)
    share = -np.expm1(-intensity / intensity.mean())  # of weaker places: uniform on 0 to 1
    gain = gammaincinv(looks, share.clip(1e-6, 1 - 1e-9)) / looks
    return image + np.minimum(8 * image, 1) * 10 * np.log10(gain) / _DECIBELS


@on_light
def acoustic_shadow(image: Light, *, width: float, rng: np.random.Generator) -> Light:
    """Put a strong reflector into the beam: a bright echo, and below it a widening shadow of little sound.

    Calcifications, ribs and air send the sound back (Feldman et al. 2009, RadioGraphics 29:1179); some 25 decibels
    are missing below.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
        The transducer is at the top.
    width : float
        Of the reflector, as a share of the side.
    rng : numpy.random.Generator
        Draws its place in the upper third.

    Returns
    -------
    uint8 of the same shape
    """
    down, right = places(image)
    aside = right - rng.uniform(-0.3, 0.3)
    below = down - down.min() - rng.uniform(0.03, 0.25) - aside**2 / (width + 0.1)  # the reflector is convex
    reach = width / 2 * (1 + 0.3 * below.clip(0)) - np.abs(aside)
    inside = (reach / (0.03 + 0.1 * below.clip(0)) + 0.5).clip(0, 1)
    echo = 0.35 * np.exp(-((below / 0.02) ** 2))
    return image + inside * (echo - 25 / _DECIBELS * (below / 0.15).clip(0, 1))


@on_light
def gain_error(image: Light, *, decibels: float, rng: np.random.Generator) -> Light:
    """Turn the overall gain too high or too low: all echoes by the same decibels, until they meet black or white.

    The receiver's amplifier comes before the logarithm, so gain adds to gray levels (Szabo 2014, Diagnostic Ultrasound
    Imaging).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    decibels : float
        Of the error.
    rng : numpy.random.Generator
        Draws its sign.

    Returns
    -------
    uint8 of the same shape
    """
    return image + rng.choice((-1, 1)) * decibels / _DECIBELS


@on_light
def tgc_error(image: Light, *, decibels: float, rng: np.random.Generator) -> Light:
    """Set the sliders of the time-gain compensation wrongly: bands of depth become too bright and too dark.

    Eight sliders, each for a part of the depth, should undo attenuation (Szabo 2014).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
        The transducer is at the top.
    decibels : float
        Standard deviation of a slider's error.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    sliders = rng.normal(size=8)
    wrong = np.interp(np.linspace(0, 7, len(image)), np.arange(8), sliders - sliders.mean())
    return image + wrong[:, None, None] * decibels / _DECIBELS


@on_light
def weak_signal(image: Light, *, loss: float, rng: np.random.Generator) -> Light:
    """Lose light in a cloudy or dry eye: the layers sink into the shot noise of the reference arm, which stays.

    The noise, complex and Gaussian, is added to the amplitude, before the logarithm (Leitgeb et al. 2003, Optics
    Express 11:889).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    loss : float
        Decibels that the signal loses; the noise is 42 decibels below white.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    kept = 10 ** (-loss / 10)
    # The image has noise of its own, which loses as much as the signal does: this is what is missing since.
    noise = rng.normal(scale=math.sqrt((1 - kept) * _NOISE / 2), size=(2, *image.shape[:2], 1))
    return _decibels((np.sqrt(kept * _power(image)) + noise[0]) ** 2 + noise[1] ** 2)


@on_light
def blink_line(image: Light, *, width: float, rng: np.random.Generator) -> Light:
    """Close the eye during the scan: the A-scans of that time hold nothing but noise.

    An OCT image is a row of A-scans, one after the other, so what is short in time is a stripe from top to bottom
    (Spaide et al. 2015, Retina 35:2163, on artefacts of eye motion and blinks).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    width : float
        Of the stripe, as a share of the side.
    rng : numpy.random.Generator
        Draws its middle and the noise.

    Returns
    -------
    uint8 of the same shape
    """
    right = places(image)[1]
    open_eye = ((np.abs(right - rng.uniform(-0.35, 0.35)) - width / 2) / 0.02 + 0.5).clip(0, 1)
    noise = 10 * np.log10(rng.exponential(size=(*image.shape[:2], 1)).clip(1e-3)) / _DECIBELS
    return open_eye * image + (1 - open_eye) * (np.quantile(image.mean(2), 0.1) + noise / 2)


@on_light
def lateral_defocus(image: Light, *, sigma: float, rng: np.random.Generator) -> Light:
    """Miss the focus: the spot on the retina widens and less light returns; depth stays sharp.

    In OCT lateral and axial resolution have nothing to do with each other (Drexler and Fujimoto 2015, Optical Coherence
    Tomography); intensities add up, not their decibels, and sink into the noise.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    sigma : float
        Standard deviation of the spot, as a share of the side.
    rng : numpy.random.Generator
        Draws the noise.

    Returns
    -------
    uint8 of the same shape
    """
    spot = sigma * min(image.shape[:2])
    kept = 1 / (1 + (sigma / 0.03) ** 2)
    power = ndimage.gaussian_filter1d(_power(image), spot, axis=1, mode="nearest")
    return _decibels(kept * power + (1 - kept) * _NOISE * rng.exponential(size=(*image.shape[:2], 1)))


@on_light
def axial_shift(image: Light, *, shift: float, rng: np.random.Generator) -> Light:
    """Move the eye between A-scans: columns slide up and down, in a slow drift with one jump.

    Kraus et al. 2012 (Biomedical Optics Express 3:1182) correct exactly this, A-scan by A-scan.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    shift : float
        Standard deviation of the drift, and the jump, as a share of the side.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    height, width = image.shape[:2]
    drift = ndimage.gaussian_filter1d(rng.normal(size=width), width / 24, mode="nearest")
    drift = (drift - drift.mean()) / drift.std() + rng.choice((-1, 1)) * (
        np.arange(width) > rng.uniform(0.2, 0.8) * width
    )
    rows = np.arange(height)[:, None] + shift * min(height, width) * drift
    columns = np.broadcast_to(np.arange(width), rows.shape)
    planes = [
        ndimage.map_coordinates(plane, (rows, columns), order=1, mode="nearest") for plane in np.moveaxis(image, 2, 0)
    ]
    return np.stack(planes, axis=2)


def _power(light: Light) -> Light:
    return 10 ** (_DECIBELS * (light - 1) / 10)


def _decibels(power: Light) -> Light:
    return 1 + 10 * np.log10(power) / _DECIBELS
