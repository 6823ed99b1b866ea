"""Breast ultrasound phantoms: a hypoechoic mass in layered tissue, benign or malignant by its margin.

Drawn after what a B-mode scan of the breast shows: skin line, subcutaneous fat with Cooper's ligaments,
echogenic fibroglandular tissue, pectoral muscle, attenuation with depth. The margin carries the class
(circumscribed oval against angular, spiculated or microlobulated); orientation, posterior echoes and
calcifications lean one way, as in BI-RADS, but overlap.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.phantoms.painting import (
    Field,
    bell,
    canvas_size,
    finish_gray,
    smooth_curve,
    smooth_texture,
    speckle,
    step,
    unit_axes,
)

ANGLES = np.linspace(-np.pi, np.pi, 257)


@dataclass(frozen=True)
class Mass:
    """One mass to draw.

    Attributes
    ----------
    outline : float64 [257]
        Radius at each of `ANGLES`, about 1.
    warp, aspect : float
        How a texture bends the outline, in radii; length over depth.
    edge, halo, capsule : float
        Half the width of the margin in radii; brightness of the rim around it and of the line on it.
    posterior : float
        Darker (negative) or brighter tissue below.
    heterogeneity : float
        Texture inside.
    calcifications : int
    """

    outline: NDArray[np.float64]
    warp: float
    aspect: float
    edge: float
    halo: float
    capsule: float
    posterior: float
    heterogeneity: float
    calcifications: int


def paint_malignant(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Irregular mass: angular, spiculated or microlobulated margin, echogenic halo, often shadowing."""
    posterior = rng.choice([-1.0, 0.0, 1.0], p=[0.6, 0.3, 0.1])
    mass = Mass(
        outline=_irregular_outline(rng),
        warp=rng.uniform(0.06, 0.17),
        aspect=rng.uniform(0.75, 1.5),
        edge=rng.uniform(0.10, 0.26),
        halo=rng.uniform(0.05, 0.22),
        capsule=0.0,
        posterior=posterior * rng.uniform(0.45, 0.92),
        heterogeneity=rng.uniform(0.04, 0.11),
        calcifications=int(rng.integers(0, 7)) if rng.random() < 0.5 else 0,
    )
    return _paint(rng, size, mass)


def paint_benign(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Circumscribed oval mass, usually wider than tall, thin capsule, often posterior enhancement."""
    posterior = rng.choice([-1.0, 0.0, 1.0], p=[0.12, 0.33, 0.55])
    mass = Mass(
        outline=_smooth_outline(rng),
        warp=0.02,
        aspect=rng.uniform(1.1, 2.1),
        edge=rng.uniform(0.05, 0.12),
        halo=rng.uniform(0.0, 0.06),
        capsule=rng.uniform(0.0, 0.22),
        posterior=posterior * rng.uniform(0.35, 0.85),
        heterogeneity=rng.uniform(0.02, 0.08),
        calcifications=int(rng.integers(1, 4)) if rng.random() < 0.15 else 0,
    )
    return _paint(rng, size, mass)


PAINTERS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float32]]] = {
    "malignant": paint_malignant,
    "benign": paint_benign,
}


def _smooth_outline(rng: np.random.Generator) -> NDArray[np.float64]:
    # Up to three gentle macrolobulations are still "circumscribed".
    radius = np.ones_like(ANGLES)
    for order, amplitude in ((2, 0.05), (3, 0.055), (4, 0.03)):
        radius += amplitude * rng.uniform(-1, 1) * np.cos(order * ANGLES + rng.uniform(0, 2 * np.pi))
    return radius


def _irregular_outline(rng: np.random.Generator) -> NDArray[np.float64]:
    radius = np.ones_like(ANGLES)
    for order in (2, 3, 4):
        radius += rng.uniform(0.03, 0.13) * np.cos(order * ANGLES + rng.uniform(0, 2 * np.pi))
    if rng.random() < 0.2:
        order = int(rng.integers(7, 12))
        bumps = np.abs(np.cos(order / 2 * ANGLES + rng.uniform(0, np.pi)))
        return radius + rng.uniform(0.25, 0.4) * (bumps - 0.6)
    count = int(rng.integers(5, 12))
    for centre in rng.uniform(-np.pi, np.pi, count):
        away = np.abs((ANGLES - centre + np.pi) % (2 * np.pi) - np.pi)
        height, width = rng.uniform(0.12, 0.62), rng.uniform(0.14, 0.5)
        radius += height * np.clip(1 - away / width, 0, 1) ** 1.3
    return radius / radius.mean()


def _paint(rng: np.random.Generator, size: int, mass: Mass) -> NDArray[np.float32]:
    """Draw tissue with a mass in it."""
    side = canvas_size(size)
    x, y = unit_axes(side)
    tissue = _layers(rng, side, x, y)

    scale = rng.uniform(0.085, 0.2)
    across, down = scale * mass.aspect**0.5, scale / mass.aspect**0.5
    centre_x, centre_y = rng.uniform(0.27, 0.73), rng.uniform(0.3, 0.52)
    turn = rng.normal(0, 0.22)
    right, below = x - centre_x, y - centre_y
    along = (right * np.cos(turn) + below * np.sin(turn)) / across
    through = (below * np.cos(turn) - right * np.sin(turn)) / down
    along = along + mass.warp * smooth_texture(rng, side, (18, 18))
    through = through + mass.warp * smooth_texture(rng, side, (18, 18))
    angle = np.arctan2(through, along)
    radius = np.sqrt(along * along + through * through) / np.interp(angle, ANGLES, mass.outline).astype(np.float32)
    inside = step(1 - radius, 2 * mass.edge)

    under = step(below - 0.3 * down, 1.4 * down) * bell(right * (1 - 0.25 * below), 0.65 * across)
    fade = 1 - step(below - rng.uniform(0.45, 0.8), 0.4)
    tissue = tissue * (1 + mass.posterior * (1.0 if mass.posterior < 0 else 0.9) * under * fade)
    refraction = bell(np.abs(right) - across, 0.02) * step(below, down)
    tissue = tissue * (1 - rng.uniform(0, 0.3) * refraction)

    tissue = tissue + mass.halo * bell(radius - 1.25, 0.2) + mass.capsule * bell(radius - 1.06, 0.06)
    texture = smooth_texture(rng, side, (22, 18))
    echo = rng.uniform(0.05, 0.17) + mass.heterogeneity * texture * (0.6 + 0.4 * radius)
    tissue = tissue * (1 - inside) + np.clip(echo, 0.02, 1) * inside
    for _ in range(mass.calcifications):
        spot_x, spot_y = rng.uniform(-0.55, 0.55, 2)
        tissue = tissue + rng.uniform(0.3, 0.6) * bell(np.hypot(along - spot_x, through - spot_y), 0.009 / scale)

    # Two grain sizes keep the speckle visible in thumbnails and fine on large images.
    grain = 0.5 * speckle(rng, side, (64, 44)) + 0.5 * speckle(rng, side, (150, 100))
    return finish_gray(tissue * (0.45 + 0.55 * grain), size)


def _layers(rng: np.random.Generator, side: int, x: Field, y: Field) -> Field:
    """Tissue without a mass: echo amplitude float32 [side, side]."""
    bend = 0.02 * smooth_curve(rng, side, 3) + rng.uniform(-0.05, 0.05) * (x - 0.5)
    depth = y + bend
    skin = rng.uniform(0.035, 0.06)
    fat_end = rng.uniform(0.16, 0.34) + 0.03 * smooth_curve(rng, side, 4)
    gland_end = rng.uniform(0.6, 0.85) + 0.025 * smooth_curve(rng, side, 3)

    patchy = smooth_texture(rng, side, (6, 4))
    strength = step(patchy, 2.5)
    ligaments = bell(smooth_texture(rng, side, (9, 3)), 0.11) * strength
    fat = 0.25 + 0.035 * smooth_texture(rng, side, (14, 8)) + 0.36 * ligaments
    lobules = smooth_texture(rng, side, (12, 6))
    bands = smooth_texture(rng, side, (24, 5))
    ducts = np.clip(bands - 0.4, 0, 1.5)
    density = rng.uniform(-0.15, 0.1)
    gland = 0.43 + 0.3 * density * patchy + 0.09 * lobules + 0.2 * ducts + 0.2 * ligaments
    gland = gland - 0.12 * np.clip(-bands - 0.6, 0, 1)
    fibres = bell(smooth_texture(rng, side, (30, 3)), 0.25)
    muscle = 0.14 + 0.3 * fibres * (0.25 + 0.75 * strength)

    in_gland = step(depth - fat_end, 0.04)
    in_muscle = step(depth - gland_end, 0.05)
    tissue = fat + (gland - fat) * in_gland
    tissue = tissue + (muscle - tissue) * in_muscle
    tissue = tissue + rng.uniform(0.15, 0.4) * bell(depth - gland_end, 0.012)
    skin_lines = 0.5 * bell(y - 0.2 * skin, 0.3 * skin) + 0.42 * bell(depth - skin, 0.009)
    tissue = np.where(depth < skin, 0.36, tissue) + skin_lines

    focus = rng.uniform(0.3, 0.5)
    decay = rng.uniform(0.2, 1.5)
    gain = np.exp(-decay * np.clip(y - focus, 0, 1) ** 1.3 * 1.6)
    # Imperfect probe contact and deeper ribs darken some columns.
    contact = 1 - rng.uniform(0, 0.55) * step(smooth_curve(rng, side, 5) - 1.0, 1.2) * step(y - 0.1, 0.5)
    return (np.clip(tissue, 0.02, 1.2) * gain * contact).astype(np.float32)
