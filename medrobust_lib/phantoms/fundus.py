"""Fundus phantoms: colour photographs of the retina, without and with signs of diabetic retinopathy.

The two classes and their order are those of MedIMeta's fundus set. An abnormal eye shows some of
microaneurysms, blot haemorrhages, hard exudates and cotton-wool spots, from few and faint to many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.phantoms.painting import (
    Field,
    blobs,
    branches,
    cover,
    dots,
    fill,
    finish,
    fractal_texture,
    ramp,
    soften,
    tapered,
    texture_at,
    unit_grid,
    wander,
)

# Light that comes back, per RGB channel, relative to the retina around it.
BLOOD_FILTER = np.array([0.62, 0.33, 0.38])
VEIN_FILTER = np.array([0.70, 0.42, 0.50])
ARTERY_FILTER = np.array([0.86, 0.58, 0.60])


@dataclass(frozen=True)
class Eye:
    """Where things are, in unit coordinates.

    Attributes
    ----------
    aperture : float
        Radius of the camera's field of view.
    disc, macula : float64 [2]
        Centres of the optic disc and of the macula.
    disc_radius : float
    side : {-1, 1}
        Direction from the disc to the macula along x.
    """

    aperture: float
    disc: NDArray[np.float64]
    macula: NDArray[np.float64]
    disc_radius: float
    side: int


def _paint(rng: np.random.Generator, size: int, *, abnormal: bool) -> NDArray[np.float32]:
    x, y = unit_grid(size)
    side = int(rng.choice([-1, 1]))
    offset = np.array([-side * rng.uniform(0.18, 0.34), rng.uniform(-0.05, 0.05)])
    disc = 0.5 + offset
    macula = disc + np.array([side * rng.uniform(0.28, 0.34), rng.uniform(0.0, 0.05)])
    eye = Eye(rng.uniform(0.46, 0.5), disc, macula, rng.uniform(0.055, 0.075), side)
    image = _retina(rng, size, eye)
    image = _optic_disc(rng, image, eye)
    image = _vessels(rng, image, eye)
    if abnormal:
        image = _lesions(rng, image, eye)
    image = _reflexes(rng, image, eye)
    distance = np.hypot(x - 0.5, y - 0.5)
    inside = ramp(distance, eye.aperture + 0.006, eye.aperture - 0.006)
    inside *= ramp(np.abs(y - 0.5), rng.uniform(0.42, 0.52), 0.415)
    centre = rng.normal(0.5, 0.06, 2)
    falloff = 1 - rng.uniform(0.5, 1.4) * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2)
    return finish(image * (inside * falloff)[..., None])


def _retina(rng: np.random.Generator, size: int, eye: Eye) -> Field:
    """Pigment, choroidal texture and macula."""
    x, y = unit_grid(size)
    pigment = rng.random()
    light = np.array([0.86, 0.52, 0.32]) * (1 - pigment) + np.array([0.70, 0.30, 0.12]) * pigment
    cloud = 0.07 * fractal_texture(rng, size, scale=0.3, octaves=3)
    # Choroidal vessels shine through where pigment is thin: a blurred orange lattice.
    bend = 0.08 * fractal_texture(rng, size, scale=0.25, octaves=2)
    lattice = texture_at(rng, 9 * (x + bend) + 20, 13 * (y - bend) + 20)
    tessellation = rng.uniform(0, 0.12) * ramp(np.abs(lattice), 0.5, 0.0)
    grain = 0.02 * fractal_texture(rng, size, scale=0.02, octaves=2)
    texture = 1 + cloud + tessellation + grain
    distance = np.hypot(x - eye.macula[0], y - eye.macula[1])
    yellow = rng.uniform(0.25, 0.45) * np.exp(-((distance / rng.uniform(0.07, 0.1)) ** 2))
    fovea = 0.2 * np.exp(-((distance / 0.022) ** 2))
    shade = 1 - (yellow + fovea)[..., None] * np.array([0.75, 1.0, 1.0], np.float32)
    return texture[..., None] * light.astype(np.float32) * shade


def _optic_disc(rng: np.random.Generator, image: Field, eye: Eye) -> Field:
    size = image.shape[0]
    radius = eye.disc_radius
    shape = {"aspect": rng.uniform(1, 1.15), "angle": np.pi / 2, "irregularity": 0.02}
    rim = fill(size, blobs(rng, eye.disc, radius, **shape), softness=0.005)
    cup_seat = eye.disc + np.array([0.1 * eye.side, 0.0]) * radius
    cup = fill(size, blobs(rng, cup_seat, radius * rng.uniform(0.35, 0.6), **shape), softness=0.006)
    glow = soften(rim, 0.035)
    crescent = eye.disc + np.array([-eye.side * 0.25, 0.0]) * radius
    atrophy = fill(size, blobs(rng, crescent, 1.08 * radius, irregularity=0.03), softness=0.006)
    image = image * (1 + 0.25 * glow[..., None])
    image = cover(image, (0.93, 0.68, 0.42), 0.45 * rng.random() * atrophy)
    image = cover(image, (0.97, 0.72, 0.42), 0.85 * rim)
    return cover(image, (1.0, 0.91, 0.70), 0.85 * cup)


def _vessels(rng: np.random.Generator, image: Field, eye: Eye) -> Field:
    """Two veins and two arteries a half: arcades around the macula, and straighter nasal vessels."""
    size = image.shape[0]
    x, y = unit_grid(size)
    away = ramp(np.hypot(x - eye.macula[0], y - eye.macula[1]), 0.03, 0.07)
    half = np.array([-1, -1, 1, 1])
    temporal = np.array([True, False, True, False])
    for colour, width, shift in ((VEIN_FILTER, 0.017, 0.0), (ARTERY_FILTER, 0.012, 0.2)):
        lean = np.where(temporal, -shift - rng.uniform(0.1, 0.35, 4), shift + rng.uniform(0.2, 0.7, 4))
        bend = np.where(temporal, -rng.uniform(1.2, 1.7, 4), rng.uniform(-0.2, 0.4, 4))
        length = np.where(temporal, rng.uniform(0.7, 0.85, 4), 0.5)
        # Wander in the frame of an eye whose macula is to the right of the disc, then mirror.
        start = 0.15 * eye.disc_radius * rng.standard_normal((4, 2))
        trunks = wander(rng, start, half * (np.pi / 2 + lean), length, bend=half * bend, curl=0.35, steps=16)
        trunks = eye.disc + trunks * np.array([eye.side, 1])
        widths = width * np.where(temporal, 1, 0.75) * rng.uniform(0.85, 1.15, 4)
        paths, widths = branches(rng, trunks, widths, taper=0.4, reach=0.42, curl=0.6, per_path=3.2)
        outlines = tapered(paths, widths, taper=0.4, thinnest=0.004)
        # Thin vessels fade rather than narrow below what the lens resolves.
        order = np.argsort(widths)
        blood = fill(size, outlines[order], np.clip(widths[order] / 0.007, 0.3, 1), softness=0.0015)
        image = image * (1 - (blood * away)[..., None] * (1 - colour.astype(np.float32)))
    return image


def _lesions(rng: np.random.Generator, image: Field, eye: Eye) -> Field:
    """Draw one to four kinds of lesion; some eyes have mild, easily missed disease."""
    size = image.shape[0]
    severity = rng.choice([0.15, 0.5, 1.0, 1.6], p=[0.2, 0.3, 0.35, 0.15])
    strength = rng.uniform(0.55, 1)
    kinds = rng.random(3) < 0.55
    if not kinds.any():
        kinds[rng.integers(3)] = True
    if kinds[2]:
        seats = _on_retina(rng, eye, 1 + rng.poisson(2.0 * severity))
        shape = {"aspect": rng.uniform(1, 1.8, len(seats)), "angle": rng.uniform(0, np.pi, len(seats))}
        radii = rng.uniform(0.018, 0.036, len(seats))
        outlines = blobs(rng, seats, radii, irregularity=0.15, **shape)
        wool = fill(size, outlines, rng.uniform(0.6, 0.95, len(seats)), softness=0.009)
        image = cover(image, (0.97, 0.88, 0.68), 0.8 * strength * wool)
    if kinds[1]:
        image = cover(image, (1.0, 0.88, 0.48), 0.9 * strength * _exudates(rng, size, eye, severity))
    count = 2 + rng.poisson(12 * severity)
    aneurysms = _on_retina(rng, eye, count if kinds[0] else count // 3)
    radii, values = rng.uniform(0.004, 0.009, len(aneurysms)), rng.uniform(0.6, 1, len(aneurysms))
    bleeding = dots(size, aneurysms, radii, values, softness=0.002)
    if kinds[0]:
        seats = _on_retina(rng, eye, 1 + rng.poisson(4.5 * severity))
        shape = {"aspect": rng.uniform(1, 2.2, len(seats)), "angle": rng.uniform(0, np.pi, len(seats))}
        radii = 0.014 * np.exp(0.4 * rng.standard_normal(len(seats)))
        outlines = blobs(rng, seats, radii, irregularity=0.12, **shape)
        blots = fill(size, outlines, rng.uniform(0.7, 1, len(seats)), softness=0.003)
        bleeding = np.maximum(bleeding, blots)
    return image * (1 - strength * bleeding[..., None] * (1 - BLOOD_FILTER.astype(np.float32)))


def _exudates(rng: np.random.Generator, size: int, eye: Eye, severity: float) -> Field:
    """Cover of hard exudates: waxy specks in clusters and in rings around a leak."""
    specks, radii = [], []
    for seat in _on_retina(rng, eye, 1 + rng.poisson(1.8 * severity)):
        count = 4 + rng.poisson(20 * severity)
        if rng.random() < 0.4:
            turn, ring = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.035, 0.06)
            spread = ring * rng.normal(1, 0.15, (count, 1)) * np.stack([np.cos(turn), np.sin(turn)], 1)
        else:
            spread = rng.uniform(0.015, 0.035) * rng.standard_normal((count, 2))
        specks.append(seat + spread)
        radii.append(0.0058 * np.exp(0.45 * rng.standard_normal(count)))
    specks, radii = np.concatenate(specks), np.concatenate(radii)
    outlines = blobs(rng, specks, radii, irregularity=0.12, points=16)
    return fill(size, outlines, rng.uniform(0.6, 1, len(radii)), softness=0.0025)


def _on_retina(rng: np.random.Generator, eye: Eye, count: int) -> NDArray[np.float64]:
    """Places [count, 2] in the posterior pole, off the optic disc."""
    places = np.empty((0, 2))
    while len(places) < count:
        middle = 0.5 * (eye.macula + 0.5)
        tries = middle + 0.17 * rng.standard_normal((2 * count + 4, 2))
        clear = np.linalg.norm(tries - eye.disc, axis=1) > 1.7 * eye.disc_radius
        seen = np.linalg.norm(tries - 0.5, axis=1) < eye.aperture - 0.07
        places = np.concatenate([places, tries[clear & seen]])
    return places[:count]


def _reflexes(rng: np.random.Generator, image: Field, eye: Eye) -> Field:
    """Sheen of young retinas along the arcades, and the lamp's reflection in the cornea."""
    size = image.shape[0]
    x, y = unit_grid(size)
    distance = np.hypot(x - eye.macula[0], y - eye.macula[1])
    ring = np.exp(-(((distance - 0.17) / 0.05) ** 2)) * ramp(fractal_texture(rng, size, scale=0.15), 0.0, 2.0)
    image = cover(image, (0.95, 0.85, 0.7), rng.choice([0, 0.25]) * rng.random() * ring)
    seat = 0.5 + 0.04 * rng.standard_normal(2)
    glare = np.exp(-(((x - seat[0]) / 0.02) ** 2) - ((y - seat[1]) / 0.045) ** 2)
    return cover(image, (0.85, 0.8, 0.8), rng.choice([0, 0, 0.35]) * rng.random() * glare)


PAINTERS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float32]]] = {
    "abnormal": partial(_paint, abnormal=True),
    "normal": partial(_paint, abnormal=False),
}
