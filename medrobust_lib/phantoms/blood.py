"""Blood phantoms: one white cell (or platelets) on a Wright-Giemsa smear of red cells.

The eight classes and their order are those of BloodMNIST. The morphology follows haematology's usual
criteria: lobes of the nucleus, density of the chromatin, colour of the cytoplasm, kind of granule.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.phantoms.painting import (
    Field,
    Path,
    blob,
    blobs,
    dots,
    fill,
    finish,
    fractal_texture,
    ramp,
    ribbon,
    scatter,
    soften,
    transmit,
    unit_grid,
)

Dye = tuple[float, float, float]

# Absorbance per RGB channel at unit density.
CHROMATIN: Dye = (0.95, 1.70, 0.58)
RED_CELL: Dye = (0.30, 0.46, 0.40)
BLUE: Dye = (0.60, 0.44, 0.10)
GREY_BLUE: Dye = (0.42, 0.40, 0.14)
LILAC: Dye = (0.17, 0.34, 0.13)
GREY_PINK: Dye = (0.34, 0.46, 0.26)
VIOLET_GRANULE: Dye = (1.35, 2.00, 0.80)
ORANGE_GRANULE: Dye = (0.16, 0.84, 0.74)
PINK_GRANULE: Dye = (0.34, 0.66, 0.22)
PURPLE_GRANULE: Dye = (0.62, 1.10, 0.32)


class Cytoplasm(NamedTuple):
    """Dye, its optical density, and how much the density varies."""

    dye: Dye
    density: float
    grain: float


class Chromatin(NamedTuple):
    """Optical density of a nucleus, how much it varies, and the size of its clumps in image sides."""

    density: float = 0.0
    clumps: float = 0.0
    clump: float = 0.05


class Granules(NamedTuple):
    """Centres [n, 2], radii [n] and dye of granules, and whether they lie over the nucleus too."""

    places: NDArray[np.float64] | tuple = ()
    radii: NDArray[np.float64] | tuple = ()
    dye: Dye = PURPLE_GRANULE
    over_nucleus: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell to draw, in unit coordinates; several bodies only for platelets, which come in groups.

    ``vacuoles`` and ``vacuole_radii`` are centres [n, 2] and radii [n].
    """

    bodies: list[Path]
    nucleus: list[Path]
    cytoplasm: Cytoplasm
    chromatin: Chromatin = field(default_factory=Chromatin)
    granules: Granules = field(default_factory=Granules)
    vacuoles: NDArray[np.float64] | tuple = ()
    vacuole_radii: NDArray[np.float64] | tuple = ()


def _basophil(rng: np.random.Generator, centre: NDArray, unit: float) -> Cell:
    radius = unit * rng.uniform(0.165, 0.21)
    angle = rng.uniform(0, np.pi)
    body = blob(rng, centre, radius, irregularity=0.05, aspect=rng.uniform(1, 1.2), angle=angle)
    nucleus = _lobes(rng, centre, radius, count=int(rng.integers(1, 4)), lobe=0.47, orbit=0.34)
    granules = _inside(rng, centre, radius * 0.98, radius * rng.uniform(0.15, 0.19), drop=0.12)
    return Cell(
        bodies=[body],
        nucleus=nucleus,
        cytoplasm=Cytoplasm(LILAC, 1.4, grain=0.2),
        chromatin=Chromatin(rng.uniform(0.55, 0.75), clumps=0.2, clump=0.16 * radius),
        granules=Granules(
            granules, radius * rng.uniform(0.055, 0.105, len(granules)), VIOLET_GRANULE, over_nucleus=True
        ),
    )


def _eosinophil(rng: np.random.Generator, centre: NDArray, unit: float) -> Cell:
    radius = unit * rng.uniform(0.165, 0.215)
    body = blob(rng, centre, radius, irregularity=0.03, aspect=rng.uniform(1, 1.15), angle=rng.uniform(0, 3))
    count = int(rng.choice([2, 2, 2, 3]))
    nucleus = _lobes(rng, centre, radius, count=count, lobe=0.46 if count == 2 else 0.36, orbit=0.46)
    granules = _inside(rng, centre, radius * 0.94, radius * 0.15, drop=0.02)
    return Cell(
        bodies=[body],
        nucleus=nucleus,
        cytoplasm=Cytoplasm(ORANGE_GRANULE, 0.34, grain=0.15),
        chromatin=Chromatin(rng.uniform(0.95, 1.2), clumps=0.28, clump=0.16 * radius),
        granules=Granules(granules, radius * rng.uniform(0.058, 0.085, len(granules)), ORANGE_GRANULE),
    )


def _erythroblast(rng: np.random.Generator, centre: NDArray, unit: float) -> Cell:
    radius = unit * rng.uniform(0.125, 0.175)
    body = blob(rng, centre, radius, irregularity=0.06, aspect=rng.uniform(1, 1.3), angle=rng.uniform(0, 3))
    share = rng.uniform(0.48, 0.64)
    seat = centre + _polar(rng, radius * rng.uniform(0, 0.8) * (1 - share))
    blue = rng.uniform(0, 0.6)
    cytoplasm = tuple(blue * b + (1 - blue) * p for b, p in zip(BLUE, GREY_PINK, strict=True))
    return Cell(
        bodies=[body],
        nucleus=[blob(rng, seat, share * radius, irregularity=0.02)],
        cytoplasm=Cytoplasm(cytoplasm, rng.uniform(0.85, 1.2), grain=0.08),
        chromatin=Chromatin(rng.uniform(1.45, 1.85), clumps=0.2, clump=0.22 * radius),
    )


def _immature_granulocyte(rng: np.random.Generator, centre: NDArray, unit: float) -> Cell:
    radius = unit * rng.uniform(0.195, 0.25)
    angle = rng.uniform(0, 2 * np.pi)
    body = blob(rng, centre, radius, irregularity=0.035, aspect=rng.uniform(1, 1.2), angle=angle)
    share = rng.uniform(0.62, 0.74)
    seat = centre + (0.9 - share) * radius * np.array([np.cos(angle), np.sin(angle)])
    nucleus = blob(rng, seat, share * radius, aspect=rng.uniform(1.1, 1.4), angle=angle + np.pi / 2, irregularity=0.03)
    if rng.random() < 0.6:
        nucleus = _indent(nucleus, seat, share * radius, angle + np.pi, depth=rng.uniform(0.15, 0.45))
    granules = _inside(rng, centre, radius * 0.92, radius * 0.12, drop=0.35)
    return Cell(
        bodies=[body],
        nucleus=[nucleus],
        cytoplasm=Cytoplasm(
            tuple((a + b) / 2 for a, b in zip(LILAC, BLUE, strict=True)), rng.uniform(0.7, 1.0), grain=0.2
        ),
        chromatin=Chromatin(rng.uniform(0.66, 0.86), clumps=0.22, clump=0.1 * radius),
        granules=Granules(
            granules, radius * rng.uniform(0.02, 0.042, len(granules)), PURPLE_GRANULE, over_nucleus=rng.random() < 0.3
        ),
    )


def _lymphocyte(rng: np.random.Generator, centre: NDArray, unit: float) -> Cell:
    radius = unit * rng.uniform(0.135, 0.185)
    body = blob(rng, centre, radius, irregularity=0.03, aspect=rng.uniform(1, 1.12), angle=rng.uniform(0, 3))
    share = rng.uniform(0.8, 0.93)
    seat = centre + _polar(rng, radius * (1 - share) * 0.9)
    return Cell(
        bodies=[body],
        nucleus=[blob(rng, seat, share * radius, irregularity=0.025)],
        cytoplasm=Cytoplasm(BLUE, rng.uniform(0.9, 1.3), grain=0.1),
        chromatin=Chromatin(rng.uniform(1.05, 1.4), clumps=0.2, clump=0.26 * radius),
    )


def _monocyte(rng: np.random.Generator, centre: NDArray, unit: float) -> Cell:
    radius = unit * rng.uniform(0.205, 0.26)
    angle = rng.uniform(0, 2 * np.pi)
    body = blob(rng, centre, radius, irregularity=0.09, aspect=rng.uniform(1, 1.25), angle=angle)
    bow = rng.uniform(2.4, 4.0)
    turn = angle + np.linspace(-0.5, 0.5, 24) * bow
    arc = 0.5 * radius * np.stack([np.cos(turn), np.sin(turn)], 1)
    seat = centre - rng.uniform(0.5, 0.8) * arc.mean(0)
    nucleus = ribbon(seat + arc, radius * rng.uniform(0.72, 0.88), roundness=6)
    vacuoles = _inside(rng, centre, radius * 0.95, radius * 0.28, drop=rng.uniform(0.5, 0.9))
    return Cell(
        bodies=[body],
        nucleus=[nucleus],
        cytoplasm=Cytoplasm(GREY_BLUE, rng.uniform(0.9, 1.25), grain=0.22),
        chromatin=Chromatin(rng.uniform(0.75, 1.0), clumps=0.26, clump=0.14 * radius),
        vacuoles=vacuoles,
        vacuole_radii=radius * rng.uniform(0.04, 0.12, len(vacuoles)),
    )


def _neutrophil(rng: np.random.Generator, centre: NDArray, unit: float) -> Cell:
    radius = unit * rng.uniform(0.165, 0.215)
    body = blob(rng, centre, radius, irregularity=0.04, aspect=rng.uniform(1, 1.2), angle=rng.uniform(0, 3))
    count = int(rng.integers(3, 6))
    nucleus = _lobes(rng, centre, radius, count=count, lobe=0.34 - 0.025 * (count - 3), orbit=0.5)
    granules = _inside(rng, centre, radius * 0.93, radius * 0.13, drop=0.3)
    return Cell(
        bodies=[body],
        nucleus=nucleus,
        cytoplasm=Cytoplasm(LILAC, rng.uniform(0.7, 1.0), grain=0.25),
        chromatin=Chromatin(rng.uniform(1.05, 1.4), clumps=0.25, clump=0.12 * radius),
        granules=Granules(granules, radius * rng.uniform(0.018, 0.035, len(granules)), PINK_GRANULE),
    )


def _platelets(rng: np.random.Generator, centre: NDArray, unit: float) -> Cell:
    seats = [centre]
    for _ in range(int(rng.choice([0, 0, 1, 2]))):
        seats.append(centre + _polar(rng, unit * rng.uniform(0.1, 0.2)))
    return _platelet_group(rng, np.array(seats), unit * rng.uniform(0.05, 0.08, len(seats)))


def _platelet_group(rng: np.random.Generator, centres: NDArray, radii: NDArray) -> Cell:
    shape = {"aspect": rng.uniform(1, 1.6, len(radii)), "angle": rng.uniform(0, np.pi, len(radii))}
    granules = [_inside(rng, c, 0.75 * r, 0.3 * r, drop=0.15) for c, r in zip(centres, radii, strict=True)]
    granule_radii = np.repeat(radii, [len(group) for group in granules])
    return Cell(
        bodies=list(blobs(rng, centres, radii, irregularity=0.1, **shape)),
        nucleus=[],
        cytoplasm=Cytoplasm(PURPLE_GRANULE, rng.uniform(0.4, 0.65), grain=0.3),
        granules=Granules(
            np.concatenate(granules), granule_radii * rng.uniform(0.12, 0.2, len(granule_radii)), PURPLE_GRANULE
        ),
    )


def _paint(
    cell_of: Callable[[np.random.Generator, NDArray, float], Cell], rng: np.random.Generator, size: int
) -> NDArray[np.float32]:
    """Paint the smear around a cell of the class."""
    centre = 0.5 + rng.uniform(-0.07, 0.07, 2)
    unit = rng.uniform(0.85, 1.2)
    cell = cell_of(rng, centre, unit)
    cells = [cell, *_stray_platelets(rng, unit, cell)]
    bodies = fill(size, [body for each in cells for body in each.bodies], softness=0.003)
    layers = [(_red_cells(rng, size, unit, cell) * (1 - bodies), RED_CELL)]
    for each in cells:
        layers += _cell_layers(rng, size, each)
    tint = np.exp(0.06 * rng.standard_normal(3))
    strength = rng.uniform(0.8, 1.15)
    dyed = [(density, strength * tint * np.asarray(dye)) for density, dye in layers]
    return finish(transmit(dyed, _light(rng, size)))


def _cell_layers(rng: np.random.Generator, size: int, cell: Cell) -> list[tuple[Field, Dye]]:
    body = fill(size, cell.bodies, softness=0.003)
    nucleus = fill(size, cell.nucleus, softness=0.003)
    vacuoles = dots(size, cell.vacuoles, cell.vacuole_radii, softness=0.002)
    clumps = fractal_texture(rng, size, scale=max(cell.chromatin.clump, 0.012), octaves=2, persistence=0.7)
    cloud = 1 + cell.cytoplasm.grain * fractal_texture(rng, size, scale=0.05, octaves=2)
    # Cytoplasm is thicker at the membrane, where the smear curls it up.
    membrane = body * (1 + 0.5 * ramp(soften(body, 0.015), 1.0, 0.5))
    cytoplasm = cell.cytoplasm.density * membrane * cloud * (1 - nucleus) * (1 - 0.9 * vacuoles)
    rim = nucleus * ramp(soften(nucleus, 0.01), 1.0, 0.55)
    chromatin = cell.chromatin.density * nucleus * (1 + cell.chromatin.clumps * clumps + 0.2 * rim)
    speckles = dots(size, cell.granules.places, cell.granules.radii, rng.uniform(0.55, 1, len(cell.granules.places)))
    speckles = speckles * body * (1 if cell.granules.over_nucleus else 1 - 0.85 * nucleus)
    return [
        (np.maximum(cytoplasm, 0), cell.cytoplasm.dye),
        (np.maximum(chromatin, 0) * (1 - 0.5 * vacuoles), CHROMATIN),
        (speckles, cell.granules.dye),
    ]


def _red_cells(rng: np.random.Generator, size: int, unit: float, cell: Cell) -> Field:
    """Density of the biconcave red cells around the given cell."""
    radius = unit * rng.uniform(0.1, 0.13)
    points = scatter(
        rng, radius * rng.uniform(2.0, 2.9), jitter=rng.uniform(0.12, 0.25), margin=radius, keep=(0.7, 1.0)
    )
    for body in cell.bodies:
        middle = body.mean(0)
        extent = np.linalg.norm(body - middle, axis=1).max()
        points = points[np.linalg.norm(points - middle, axis=1) > extent + 0.75 * radius]
    pallor, depth = rng.uniform(0.42, 0.62), rng.uniform(0.45, 0.85)
    density = np.zeros((size, size), np.float32)
    # Two layers, so that overlapping cells add up as they do under the microscope.
    for layer in (points[::2], points[1::2]):
        count = len(layer)
        radii = radius * rng.normal(1, 0.08, count)
        shape = {"aspect": rng.uniform(1, 1.25, count), "angle": rng.uniform(0, np.pi, count)}
        discs = fill(size, blobs(rng, layer, radii, irregularity=0.025, points=24, **shape), softness=0.004)
        hollows = layer + 0.06 * radius * rng.standard_normal((count, 2))
        depths = np.clip(depth * rng.uniform(0.6, 1.1, count), 0, 1) * (rng.random(count) < 0.9)
        dips = dots(size, hollows, pallor * radii, depths, softness=0.14 * radius)
        density += discs * (1 - dips)
    return density


def _stray_platelets(rng: np.random.Generator, unit: float, cell: Cell) -> list[Cell]:
    places = rng.uniform(0.02, 0.98, (int(rng.choice([0, 0, 1, 2])), 2))
    clear = [np.linalg.norm(np.concatenate(cell.bodies) - place, axis=1).min() > 0.12 for place in places]
    places = places[np.array(clear, bool)]
    return [_platelet_group(rng, places, unit * rng.uniform(0.025, 0.05, len(places)))] if len(places) else []


def _light(rng: np.random.Generator, size: int) -> Field:
    x, y = unit_grid(size)
    slope = rng.normal(0, 0.04, 2)
    shade = 1 + slope[0] * (x - 0.5) + slope[1] * (y - 0.5)
    warmth = rng.uniform(-0.4, 1.0)
    colour = np.array([0.985, 0.945 - 0.02 * abs(warmth), 0.93 - 0.1 * warmth])
    return np.clip(shade[..., None] * colour, 0, 1).astype(np.float32)


def _lobes(
    rng: np.random.Generator, centre: NDArray, radius: float, *, count: int, lobe: float, orbit: float
) -> list[Path]:
    """Nuclear lobes on an arc, joined by thin strands; ``lobe`` and ``orbit`` in units of the radius."""
    step = rng.uniform(0.85, 1.1) * 2 * np.pi / max(count + 0.6, 2.2)
    angles = rng.uniform(0, 2 * np.pi) + step * np.arange(count) + 0.15 * rng.standard_normal(count)
    reach = radius * orbit * rng.uniform(0.85, 1.1, count)
    seats = centre + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    radii, aspects = radius * lobe * rng.uniform(0.85, 1.15, count), rng.uniform(1.1, 1.5, count)
    shapes = blobs(rng, seats, radii, aspect=aspects, angle=angles + np.pi / 2, irregularity=0.05)
    strands = [ribbon(np.linspace(a, b, 8), 0.17 * radius, roundness=20) for a, b in pairwise(seats)]
    return strands + list(shapes)


def _inside(
    rng: np.random.Generator, centre: NDArray, radius: float, spacing: float, *, drop: float
) -> NDArray[np.float64]:
    """Points about ``spacing`` apart within a disc, a share ``drop`` left out."""
    scale = 2 * radius
    points = centre + scale * (scatter(rng, spacing / scale, jitter=0.25, margin=0.0) - 0.5)
    points = points[np.linalg.norm(points - centre, axis=1) < radius]
    return points[rng.random(len(points)) >= drop]


def _indent(outline: Path, centre: NDArray, radius: float, angle: float, *, depth: float) -> Path:
    """Push an outline inwards on the side that faces ``angle``: a kidney from an oval."""
    offset = outline - centre
    bearing = np.arctan2(offset[:, 1], offset[:, 0]) - angle
    bearing = (bearing + np.pi) % (2 * np.pi) - np.pi
    return centre + offset * (1 - depth * np.exp(-((bearing / 0.55) ** 2)))[:, None]


def _polar(rng: np.random.Generator, distance: float) -> NDArray[np.float64]:
    angle = rng.uniform(0, 2 * np.pi)
    return distance * np.array([np.cos(angle), np.sin(angle)])


PAINTERS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float32]]] = {
    "basophil": partial(_paint, _basophil),
    "eosinophil": partial(_paint, _eosinophil),
    "erythroblast": partial(_paint, _erythroblast),
    "immature granulocyte": partial(_paint, _immature_granulocyte),
    "lymphocyte": partial(_paint, _lymphocyte),
    "monocyte": partial(_paint, _monocyte),
    "neutrophil": partial(_paint, _neutrophil),
    "platelet": partial(_paint, _platelets),
}
