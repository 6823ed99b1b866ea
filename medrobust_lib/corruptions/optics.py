"""What happens to photographs of the retina and to slides under a microscope: light, glass, stain and hands.

Lengths are shares of the image's side. Gray images of the fundus stay gray; slides are coloured, and a gray one comes
back as the luma of what its RGB copy turns into.
"""

import math

import numpy as np
from scipy import ndimage, signal

from medrobust_lib.corruptions.functions import on_rgb
from medrobust_lib.corruptions.radiology import Light, blurred, on_light, places

# Optical densities of hematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001).
_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_INKS = ((1.3, 0.8, 0.15), (1.2, 0.3, 0.9), (1.3, 1.3, 1.2))  # optical densities of a blue, a green and a black pen
_PARTICLES = 60  # of dust, of which the first ones appear

# ---- fundus photographs ----


@on_light
def uneven_illumination(image: Light, *, falloff: float, rng: np.random.Generator) -> Light:
    """Hold the camera off the pupil's middle: light falls off from a bright place towards the far side.

    Shen et al. 2021 (IEEE Trans Medical Imaging 40:996) describe and simulate it as a disturbance of transmission.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    falloff : float
        Light at a distance d, in sides, from the bright place is exp(-falloff * d^2) of what it was.
    rng : numpy.random.Generator
        Draws the direction.

    Returns
    -------
    uint8 of the same shape
    """
    (down, right), angle = places(image), rng.uniform(0, 2 * math.pi)
    squares = (down - 0.35 * math.sin(angle)) ** 2 + (right - 0.35 * math.cos(angle)) ** 2
    return image * (1 + min(falloff, 1) * 0.15) * np.exp(-falloff * squares)


@on_light
def cataract_haze(image: Light, *, haze: float) -> Light:
    """Look through a cloudy lens: part of the light comes back scattered, and the rest is blurred a little.

    A haze that is light of the whole field, after Peli and Peli 1989 (IEEE Trans Medical Imaging 8:401) and the
    simulation of Li et al. 2022 (arXiv:2203.07737). Outside the field it stays dark.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    haze : float
        Share of the light that is scattered, in [0, 1).

    Returns
    -------
    uint8 of the same shape
    """
    wide = blurred(image, 0.15)
    scattered = 0.15 + 0.4 * wide + 0.5 * wide.mean(2, keepdims=True)
    return image + _field(image) * ((1 - haze) * blurred(image, 0.015 * haze) + haze * scattered - image)


@on_light
def lens_dust(image: Light, *, particles: float, rng: np.random.Generator) -> Light:
    """Leave dust on the front lens: gray and dark blurred disks, out of focus, the same at every eye.

    The artefacts of Shen et al. 2021 (IEEE Trans Medical Imaging 40:996).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    particles : float
        Their number, up to 60; the fraction is the last one's opacity.
    rng : numpy.random.Generator
        Draws places, radii (.015 to .08 of the side), tones and opacities.

    Returns
    -------
    uint8 of the same shape
    """
    down, right = places(image)
    drawn = rng.uniform((-0.45, -0.45, 0.015, 0.3, 0), (0.45, 0.45, 0.08, 0.8, 1), (_PARTICLES, 5))
    for number, (top, left, radius, opacity, tone) in enumerate(drawn[: math.ceil(particles)]):
        squares = ((down - top) ** 2 + (right - left) ** 2) / radius**2
        cover = min(particles - number, 1) * opacity * np.exp(-(squares**2))
        image = image + cover * ((0.7 if tone < 0.6 else 0.1) - image)
    return image


@on_light
def overexposed_disc(image: Light, *, exposure: float, rng: np.random.Generator) -> Light:
    """Flash too strongly: the brightest place, mostly the optic disc, and its surroundings burn out, red first.

    Gain that is largest at the disc, with a veil of flare; channels that are full turn yellow and then white (Shen et
    al. 2021, IEEE Trans Medical Imaging 40:996, on over-exposure).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    exposure : float
        How many times as much light falls on the brightest place, beyond what did.
    rng : numpy.random.Generator
        Draws how far the flash reaches: .2 to .3 of the side.

    Returns
    -------
    uint8 of the same shape
    """
    down, right = places(image)
    top, left = np.unravel_index(blurred(image, 0.04).mean(2).argmax(), image.shape[:2])
    squares = (down - down[top]) ** 2 + (right - right[:, left]) ** 2
    glow = exposure * np.exp(-squares / (2 * rng.uniform(0.2, 0.3) ** 2))
    flare = 0.03 * glow * blurred(image, 0.1).max(2, keepdims=True)
    return image + _field(image) * (image * (glow + 0.05 * exposure) + flare)


def _field(light: Light) -> Light:
    """Where the fundus is seen, 0 to 1 [H, W, 1]: not in the black around it, which no flash lights."""
    return (8 * blurred(light, 0.01).max(2, keepdims=True) - 0.8).clip(0, 1)


# ---- slides ----


@on_rgb
@on_light
def stain_shift(image: Light, *, shift: float, rng: np.random.Generator) -> Light:
    """Stain in another laboratory: more or less of each dye, in optical density.

    Colour deconvolution (Ruifrok and Johnston 2001); hematoxylin and eosin are multiplied and moved as by Tellez et al.
    2019 (Medical Image Analysis 58:101544), the rest stays. In blood smears blue dyes take the part of hematoxylin.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    shift : float
        Amounts are multiplied by exp(shift * u) and moved by .05 * shift * v, with u and v uniform on -1 to 1.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 of the same shape
    """
    scale, moved = rng.uniform(-shift, shift, (2, 3)) * (1, 1, 0)
    amounts = _density(image) @ np.linalg.inv(_STAINS)
    return 10 ** -((amounts * np.exp(scale) + 0.05 * moved) @ np.array(_STAINS))


@on_rgb
@on_light
def out_of_focus(image: Light, *, radius: float) -> Light:
    """Scan beside the focal plane: every point becomes a disk, the aperture's picture.

    Geometrical optics of a defocused objective; Kohlberger et al. 2019 (J Pathology Informatics 10:39) on slides.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    radius : float
        Of the disk, as a share of the side.

    Returns
    -------
    uint8 of the same shape
    """
    pixels = radius * min(image.shape[:2])
    reach = math.ceil(pixels)
    steps = np.arange(-reach, reach + 1)
    disk = (pixels + 1 - np.hypot(steps[:, None], steps)).clip(0, 1)[..., None]
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    return signal.fftconvolve(padded, disk / disk.sum(), mode="valid", axes=(0, 1))


@on_rgb
@on_light
def tissue_fold(image: Light, *, width: float, rng: np.random.Generator) -> Light:
    """Fold the section onto itself: along a wavy band two layers lie above each other, and their densities add up.

    Generated as by Wang et al. 2021 (J Pathology Informatics 12:54): the second layer is tissue from elsewhere, here
    the image turned upside down.

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    width : float
        Of the fold, as a share of the side.
    rng : numpy.random.Generator
        Draws where it lies, and how it winds.

    Returns
    -------
    uint8 of the same shape
    """
    density, inside = _density(image), _band(image, width, 0.02, rng)
    return 10 ** -(density + inside * (blurred(density[::-1, ::-1], 0.01) + 0.1))


@on_rgb
@on_light
def mounting_bubble(image: Light, *, radius: float, rng: np.random.Generator) -> Light:
    """Leave air below the cover slip: a dark refracting rim, and pale tissue out of focus behind it.

    One of the artefacts of Wang et al. 2021 (J Pathology Informatics 12:54).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    radius : float
        As a share of the side; a large bubble passes the border.
    rng : numpy.random.Generator
        Draws its middle.

    Returns
    -------
    uint8 of the same shape
    """
    top, left, oval, lit = rng.uniform((-0.3, -0.3, 0.85, -math.pi), (0.3, 0.3, 1.15, math.pi))
    down, right = (line - middle for line, middle in zip(places(image), (top, left), strict=True))
    beyond = np.hypot(down * oval, right / oval) - radius
    inside = (0.5 - beyond / 0.02).clip(0, 1)
    density = _density(image)
    pale = 0.5 * blurred(density, 0.03)
    rim = (0.35 + 0.2 * np.cos(np.arctan2(down, right) - lit)) * np.exp(-((beyond / 0.015) ** 2))
    return 10 ** -(density + inside * (pale - density) + rim)


@on_rgb
@on_light
def pen_mark(image: Light, *, width: float, rng: np.random.Generator) -> Light:
    """Mark the slide with a felt pen: a stroke of blue, green or black ink on the glass, tissue shimmering through.

    Ink is a dye, so its optical density adds to the tissue's; marker lines of Wang et al. 2021 (J Pathology Informatics
    12:54).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    width : float
        Of the stroke, as a share of the side.
    rng : numpy.random.Generator
        Draws the ink, and where the stroke runs.

    Returns
    -------
    uint8 of the same shape
    """
    ink = np.array(_INKS[rng.integers(len(_INKS))])
    streaks = ndimage.gaussian_filter(rng.normal(size=image.shape[:2]), 0.02 * min(image.shape[:2]))[..., None]
    cover = _band(image, width, 0.006, rng) * (0.8 + 0.1 * streaks / streaks.std()).clip(0, 1.2)
    return 10 ** -(_density(image) + cover * ink)


@on_rgb
@on_light
def scanner_stripe(image: Light, *, depth: float, rng: np.random.Generator) -> Light:
    """Scan with a line camera of unequal pixels: each draws a line of its own brightness along the way of the stage.

    Uncorrected gains, of single pixels and of the strips that are stitched together (photo-response non-uniformity;
    EMVA 1288 for its measurement).

    Parameters
    ----------
    image : uint8 [H, W, 3] or [H, W]
    depth : float
        Standard deviation of the logarithm of a strip's gain; of a pixel's it is a third.
    rng : numpy.random.Generator
        Draws the gains, and whether the stage moves along or across.

    Returns
    -------
    uint8 of the same shape
    """
    along = int(rng.integers(2))
    lines = (
        rng.normal(size=image.shape[along]) / 3
        + np.repeat(rng.normal(size=8), -(-image.shape[along] // 8))[: image.shape[along]]
    )
    gain = np.exp(depth * (lines - lines.mean()))
    return image * (gain[:, None, None] if along == 0 else gain[None, :, None])


def _density(light: Light) -> Light:
    """Optical density, of black as if a quarter of a gray level were left."""
    return -np.log10(light.clip(1 / 1020))


def _band(light: Light, width: float, wave: float, rng: np.random.Generator) -> Light:
    """Cover, 0 to 1 [H, W, 1], of a winding band across the image."""
    (down, right), angle = places(light), rng.uniform(0, math.pi)
    along, across = (math.cos(angle) * right + math.sin(angle) * down, math.cos(angle) * down - math.sin(angle) * right)
    bend, phase, place = rng.uniform((-0.3, 0, -0.25), (0.3, 2 * math.pi, 0.25))
    distance = np.abs(across - place - bend * along**2 - wave * np.sin(12 * along + phase))
    return ((width / 2 - distance) / 0.015 + 0.5).clip(0, 1)
