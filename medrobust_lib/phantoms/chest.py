"""Chest radiograph phantoms: a child's frontal film, clear or with one of two patterns of pneumonia.

Drawn after what the projection shows: lungs darkened by air, ribs and clavicles, spine, heart and
mediastinum, diaphragm domes, stomach bubble. Bacterial pneumonia consolidates a lobe or a segment and
may show air bronchograms and an effusion; viral pneumonia thickens the interstitium of both lungs around
the hila. The image's left is the patient's right.
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
    smooth_texture,
    step,
    trace,
    unit_axes,
    wander,
)

# The lead marker of the patient's right side, as one pen stroke.
LETTER_R = np.array(
    [(0.0, 1.0), (0.0, 0.0), (0.45, 0.0), (0.6, 0.25), (0.45, 0.5), (0.0, 0.5), (0.25, 0.5), (0.65, 1.0)]
)


@dataclass(frozen=True)
class Chest:
    """Geometry of one film: body coordinates per pixel and where the lungs lie.

    Attributes
    ----------
    x, y : float32 [side, side]
        Body coordinates: x = -1 and 1 at the widest ribs, y = 0 at the lung apices and about 1 at
        the diaphragm.
    lungs : float32 [side, side]
        1 where there is lung in front of nothing else, 0 outside.
    density : float32 [side, side]
        Attenuation of the healthy chest without lung markings.
    frame : float64 [2, 3]
        Affine map from body coordinates to unit image coordinates.
    """

    x: Field
    y: Field
    lungs: Field
    density: Field
    frame: NDArray[np.float64]

    def to_image(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Body points [..., 2] in unit image coordinates."""
        return points @ self.frame[:, :2].T + self.frame[:, 2]


def paint_normal(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Clear lungs: only the branching vessels of the hila."""
    chest = _chest(rng, canvas_size(size), inflation=rng.uniform(-0.03, 0.05))
    density = chest.density + _vessels(rng, chest, strength=rng.uniform(0.06, 0.14))
    return _film(rng, density, size)


def paint_bacterial(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Dense focal or lobar consolidation with a blurred border and air bronchograms."""
    chest = _chest(rng, canvas_size(size), inflation=rng.uniform(-0.06, 0.04))
    density = chest.density + _vessels(rng, chest, strength=rng.uniform(0.06, 0.14))
    foci = 2 if rng.random() < 0.22 else 1
    for _ in range(foci):
        density = density + _consolidation(rng, chest)
    if rng.random() < 0.22:
        density = density + _effusion(rng, chest)
    return _film(rng, density, size)


def paint_viral(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Reticular and peribronchial markings around both hila; the lungs tend to be overinflated."""
    chest = _chest(rng, canvas_size(size), inflation=rng.uniform(-0.02, 0.09))
    density = chest.density + _vessels(rng, chest, strength=rng.uniform(0.08, 0.16))
    density = density + _interstitial(rng, chest, severity=rng.uniform(0.45, 1.0))
    return _film(rng, density, size)


PAINTERS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float32]]] = {
    "normal": paint_normal,
    "bacterial pneumonia": paint_bacterial,
    "viral pneumonia": paint_viral,
}


def _film(rng: np.random.Generator, density: Field, size: int) -> NDArray[np.float32]:
    # Film saturates in the densest parts, as 1 - exp(-density) does.
    film = 1 - np.exp(-1.5 * np.clip(density, 0, None))
    if rng.random() < 0.5:
        letter = rng.uniform(0.04, 0.07) * LETTER_R + (rng.uniform(0.03, 0.1), rng.uniform(0.05, 0.5))
        film = np.maximum(film, 0.9 * trace(film.shape[0], [letter], 0.009))
    return finish_gray(film, size)


def _chest(rng: np.random.Generator, side: int, *, inflation: float) -> Chest:
    columns, rows = unit_axes(side)
    turn = rng.normal(0, 0.035)
    width, height = rng.uniform(2.25, 2.85), rng.uniform(1.42, 1.8)
    middle = np.array([rng.normal(0, 0.07), rng.uniform(0.46, 0.56)])
    spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    to_body = spin * np.array([[width], [height]])
    x = to_body[0, 0] * (columns - 0.5) + to_body[0, 1] * (rows - 0.5) + middle[0]
    y = to_body[1, 0] * (columns - 0.5) + to_body[1, 1] * (rows - 0.5) + middle[1]
    x, y = x.astype(np.float32), y.astype(np.float32)
    to_image = np.linalg.inv(to_body)
    frame = np.column_stack([to_image, 0.5 - to_image @ middle])

    off = np.abs(x)
    wall = (0.99 * np.clip(y + 0.03, 0, None) ** rng.uniform(0.26, 0.34)).astype(np.float32)
    peak = rng.uniform(0.83, 0.9) + inflation
    steep = rng.uniform(0.4, 0.8) * (1 - 4 * max(inflation, 0))
    dome = peak + rng.uniform(0.02, 0.07) * step(x, 0.4) + steep * np.clip(off - 0.42, 0, None) ** 2
    spine = 0.03 * np.sin(2 * y + rng.uniform(0, 6)) * rng.uniform(0, 1)
    hilum = rng.uniform(0.2, 0.25) + 0.03 * bell(y - 0.42, 0.12)

    lungs = step(wall - off, 0.07) * step(dome - y, 0.035) * step(off - hilum * (0.8 + 0.3 * y), 0.06)
    heart = _heart(rng, x, y)
    thymus = rng.uniform(0, 0.16) * step(0.42 - y, 0.1) * step(y - 0.05, 0.1) if rng.random() < 0.4 else 0.0
    middle_wall = step(0.19 + thymus + 0.06 * np.clip(y, 0, 1) - np.abs(x - spine), 0.12)

    body = _body(rng, x, y, off)
    clear = lungs * (1 - 0.75 * heart)
    density = body * (0.62 + 0.12 * y) - 0.52 * clear * (0.9 + 0.15 * (off - 0.5))
    shadow = np.maximum(0.26 * heart * step(dome + 0.05 - y, 0.1), 0.3 * middle_wall * body)
    density = density + np.maximum(shadow, 0.3 * step(y - dome, 0.03) * body * step(1.1 - off, 0.3))
    density = density + _bones(rng, x, y, off, wall=wall, spine=spine, body=body)
    airway = bell(x - spine - 0.02, 0.035) * step(0.3 - y, 0.1) * step(y + 0.25, 0.2)
    density = density - rng.uniform(0.1, 0.22) * airway
    if rng.random() < 0.55:
        bubble = np.sqrt(((x - rng.uniform(0.3, 0.6)) / 0.24) ** 2 + ((y - dome - 0.12) / 0.09) ** 2)
        density = density - rng.uniform(0.15, 0.45) * step(1 - bubble, 0.5)
    return Chest(x=x, y=y, lungs=clear, density=density, frame=frame)


def _heart(rng: np.random.Generator, x: Field, y: Field) -> Field:
    centre_x, centre_y = rng.uniform(0.1, 0.2), rng.uniform(0.64, 0.72)
    tilt = rng.uniform(0.35, 0.75)
    along = (x - centre_x) * np.cos(tilt) + (y - centre_y) * np.sin(tilt)
    across = (y - centre_y) * np.cos(tilt) - (x - centre_x) * np.sin(tilt)
    ratio = np.sqrt((along / rng.uniform(0.4, 0.48)) ** 2 + (across / rng.uniform(0.27, 0.33)) ** 2)
    return step(1 - ratio, 0.16)


def _body(rng: np.random.Generator, x: Field, y: Field, off: Field) -> Field:
    """Soft-tissue silhouette: trunk, neck and arms."""
    flank = rng.uniform(0.98, 1.06) + 0.1 * np.clip(y, 0, 1.2)
    shoulder = -0.16 + 0.16 * np.clip(off - 0.3, 0, None)
    # The trunk is round, so the beam crosses less tissue towards the flank.
    trunk = np.sqrt(np.clip((flank - off) / 0.22, 0, 1)) * step(y - shoulder, 0.14)
    neck = step(rng.uniform(0.3, 0.4) - off, 0.08)
    raised = rng.random() < 0.5
    reach = np.array([0.5, -0.42]) if raised else np.array([0.32, 0.75])
    from_x, from_y = off - 0.92, y - 0.03
    along = np.clip((from_x * reach[0] + from_y * reach[1]) / (reach @ reach), 0, 1.5)
    gap = np.sqrt((from_x - along * reach[0]) ** 2 + (from_y - along * reach[1]) ** 2)
    arm = step(0.17 - gap, 0.08)
    humerus = step(0.045 - gap, 0.04)
    return np.maximum(np.maximum(trunk, 0.8 * neck), 0.72 * arm) + 0.22 * humerus * step(off - 0.9, 0.1)


def _bones(
    rng: np.random.Generator, x: Field, y: Field, off: Field, *, wall: Field, spine: Field, body: Field
) -> Field:
    spacing = rng.uniform(0.098, 0.115)
    start = rng.uniform(0, 1)
    bow = rng.uniform(0.14, 0.26)
    cage = step(wall + 0.05 - off, 0.05) * step(off - 0.1, 0.08) * step(1.15 - y, 0.3) * step(y + 0.03, 0.06)
    back = (y + 0.10 * off - bow * off**3) / spacing + start
    ribs = _rib(back, 0.26)
    slope = rng.uniform(0.2, 0.34)
    front = (y + slope * off) / (1.12 * spacing) + rng.uniform(0, 1)
    front_cage = cage * step(off - 0.42, 0.3)
    density = rng.uniform(0.11, 0.17) * cage * ribs + rng.uniform(0.03, 0.07) * front_cage * _rib(front, 0.3)
    # Ribs turn tangential to the beam at the chest wall and look denser there.
    density = density + 0.2 * bell(off - wall - 0.02, 0.035) * (0.35 + 0.65 * ribs) * cage
    collar = 0.02 - 0.1 * off + 0.05 * np.sin(5.5 * off) + rng.uniform(-0.03, 0.03)
    clavicle = step(0.026 - np.abs(y - collar), 0.02) * step(off - 0.1, 0.04) * step(0.84 - off, 0.05)
    density = density + rng.uniform(0.16, 0.26) * clavicle
    vertebra = (y / rng.uniform(0.085, 0.1) + rng.uniform(0, 1)) % 1
    column = step(0.115 - np.abs(x - spine), 0.04)
    bodies = 0.5 + 0.5 * step(np.abs(vertebra - 0.5) * -1 + 0.38, 0.15)
    return density + rng.uniform(0.1, 0.2) * column * bodies * step(body, 0.5)


def _rib(phase: Field, half_width: float) -> Field:
    away = np.abs(phase % 1 - 0.5)
    return step(half_width - away, 0.12) * (0.75 + 0.25 * step(away - 0.5 * half_width, 0.2))


def _hila(rng: np.random.Generator) -> NDArray[np.float64]:
    """Body coordinates [2, 2] of the right and the left hilum."""
    return np.column_stack([rng.uniform(0.26, 0.32, 2) * (-1, 1), rng.uniform(0.38, 0.46, 2)])


def _outward(
    rng: np.random.Generator,
    starts: NDArray[np.float64],
    headings: NDArray[np.float64],
    lengths: NDArray[np.float64],
    *,
    steps: int = 7,
) -> NDArray[np.float64]:
    """Wandering paths [k, steps + 1, 2] in body coordinates; heading 0 points away from the midline."""
    outward = np.where(starts[:, :1] < 0, -1, 1)
    walks = wander(rng, np.zeros_like(starts), headings, lengths, curl=0.4, steps=steps)
    return starts[:, None] + walks * np.stack([outward, np.ones_like(outward)], -1)


def _vessels(rng: np.random.Generator, chest: Chest, *, strength: float) -> Field:
    headings = np.tile([-1.0, -0.3, 0.3, 0.75, 1.15], 2) + rng.normal(0, 0.15, 10)
    trunks = _outward(rng, np.repeat(_hila(rng), 5, axis=0), headings, rng.uniform(0.35, 0.6, 10))
    parent = np.arange(30) % 10
    fork = rng.choice([-1, 1], 30) * rng.uniform(0.4, 0.9, 30)
    forks = trunks[parent, rng.integers(1, 6, 30)]
    twigs = _outward(rng, forks, headings[parent] + fork, rng.uniform(0.12, 0.3, 30), steps=5)
    trunks, twigs = chest.to_image(trunks), chest.to_image(twigs)
    paths = [*trunks[:, :4], *trunks, *twigs]
    widths = [0.012] * 10 + [0.007] * 10 + [0.004] * 30
    drawn = trace(chest.x.shape[0], paths, widths, softness=0.004)
    return strength * drawn * (0.25 + 0.75 * chest.lungs)


def _consolidation(rng: np.random.Generator, chest: Chest) -> Field:
    side = chest.x.shape[0]
    sign = rng.choice([-1, 1])
    zone = rng.choice(["upper", "middle", "lower"], p=[0.27, 0.28, 0.45])
    level = {"upper": 0.22, "middle": 0.45, "lower": 0.68}[zone] + rng.normal(0, 0.05)
    centre = np.array([sign * rng.uniform(0.42, 0.68), level])
    radii = rng.uniform(0.2, 0.42), rng.uniform(0.14, 0.27)
    ratio = np.sqrt(((chest.x - centre[0]) / radii[0]) ** 2 + ((chest.y - centre[1]) / radii[1]) ** 2)
    cloud = smooth_texture(rng, side, (9, 9))
    patch = step(1 - ratio + 0.22 * cloud, rng.uniform(0.4, 0.9))
    if zone == "upper" and rng.random() < 0.5:
        # An upper lobe ends sharply at the horizontal fissure.
        patch = step(1.35 - ratio, 0.7) * step(level + 0.1 + 0.1 * (np.abs(chest.x) - 0.5) - chest.y, 0.03)
    start = centre - np.array([sign * 0.2, 0.0])
    air = _outward(rng, np.tile(start, (4, 1)), rng.uniform(-0.8, 0.9, 4), rng.uniform(0.25, 0.45, 4))
    bronchi = trace(side, list(chest.to_image(air)), 0.011, softness=0.003) * rng.uniform(0.1, 0.45)
    texture = 1 + 0.1 * smooth_texture(rng, side, (22, 22))
    return rng.uniform(0.2, 0.5) * patch * texture * (1 - bronchi) * np.sqrt(chest.lungs)


def _effusion(rng: np.random.Generator, chest: Chest) -> Field:
    """Fluid in one costophrenic angle, rising along the wall."""
    sign = rng.choice([-1, 1])
    level = rng.uniform(0.62, 0.85) - 0.35 * np.clip(np.abs(chest.x) - 0.55, 0, None)
    on_side = step(sign * chest.x - 0.15, 0.1)
    return rng.uniform(0.25, 0.42) * step(chest.y - level, 0.12) * on_side * chest.lungs


def _interstitial(rng: np.random.Generator, chest: Chest, *, severity: float) -> Field:
    side = chest.x.shape[0]
    spread = rng.uniform(0.28, 0.46)
    hila = _hila(rng)
    away = [np.sqrt(((chest.x - hilum_x) / 1.1) ** 2 + (chest.y - hilum_y) ** 2) for hilum_x, hilum_y in hila]
    near = bell(np.minimum(*away), spread)
    headings = rng.uniform(-1.5, 1.5, 56)
    toward = np.column_stack([np.tile([-1, 1], 28) * np.cos(headings), np.sin(headings)])
    starts = np.tile(hila, (28, 1)) + rng.uniform(0, 0.45, (56, 1)) * toward
    streaks = _outward(rng, starts, headings + rng.normal(0, 0.35, 56), rng.uniform(0.06, 0.2, 56), steps=4)
    turn = np.linspace(0, 2 * np.pi, 13)
    circle = np.column_stack([np.cos(turn), np.sin(turn)])
    cuffs = rng.uniform(0.018, 0.03, (6, 1, 1)) * circle + starts[:6, None]
    paths = [*chest.to_image(streaks), *chest.to_image(cuffs)]
    widths = np.concatenate([rng.uniform(0.004, 0.012, 56), np.full(6, 0.007)])
    lines = trace(side, paths, widths, softness=0.004)
    mesh = bell(smooth_texture(rng, side, (22, 22)), 0.35)
    haze = 0.5 + 0.3 * smooth_texture(rng, side, (8, 8))
    pattern = 0.18 * lines * (0.3 + 0.7 * near) + (0.24 * mesh + 0.14 * haze) * near
    return severity * pattern * chest.lungs
