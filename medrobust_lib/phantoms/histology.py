"""Histology phantoms: nine colon tissues in haematoxylin and eosin.

The classes and their order are those of NCT-CRC-HE (ADI BACK DEB LYM MUC MUS NORM STR TUM). Painters
lay down dye densities; light is then absorbed by both dyes as in a real section.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.phantoms.painting import (
    Field,
    Path,
    blobs,
    dots,
    fill,
    finish,
    fractal_texture,
    ramp,
    scatter,
    soften,
    spindles,
    texture_at,
    trace,
    transmit,
    turned,
    unit_grid,
    wander,
)

# Absorbance per RGB channel at unit density.
HAEMATOXYLIN = np.array([0.76, 0.96, 0.42])
EOSIN = np.array([0.16, 0.80, 0.40])
MUCIN = np.array([0.44, 0.42, 0.17])
DUST = np.array([0.80, 0.84, 0.80])

Layers = list[tuple[Field, NDArray]]  # optical density of each dye, with the dye


def _adipose(rng: np.random.Generator, size: int, zoom: float) -> Layers:
    x, y = unit_grid(size)
    spacing = zoom * rng.uniform(0.26, 0.4)
    seats = scatter(rng, spacing, jitter=0.2, margin=spacing)
    sway = [0.016 * fractal_texture(rng, size, scale=0.25, octaves=2) for _ in range(2)]
    squares = (x + sway[0] - seats[:, 0, None, None]) ** 2 + (y + sway[1] - seats[:, 1, None, None]) ** 2
    distances = np.sqrt(np.partition(squares, 1, axis=0)[:2])
    width = rng.uniform(0.014, 0.034) * np.exp(0.3 * fractal_texture(rng, size, scale=0.3, octaves=2))
    # Blurring the thin walls before the threshold rounds the corners, where cells meet. No wall is
    # drawn thinner than a pixel, or it would break into dots.
    gap, pixel = distances[1] - distances[0], 1 / size
    wall = ramp(soften(ramp(gap, 1.4 * width + pixel, 0.3 * width), 0.012), 0.15, 0.75)
    wall *= 0.75 + 0.25 * fractal_texture(rng, size, scale=0.05)
    # A fibrous septum runs through some lobules.
    along, across = turned(x - rng.random(), y - rng.random(), rng.uniform(0, np.pi))
    thickness = rng.choice([0.0, 0.0, 0.06, 0.12]) * rng.uniform(0.6, 1.4)
    bend = across + sway[0] + 0.08 * np.sin(5 * along)
    septum = ramp(np.abs(bend), thickness + 0.012, thickness - 0.012) * (thickness > 0)
    fibres = 0.75 + 0.2 * texture_at(rng, 4 * along + 9, 40 * bend + 32)
    wall = np.maximum(wall, septum * fibres)
    near = np.argsort(np.linalg.norm(seats[:, None] - seats, axis=2), axis=1)[:, 1]
    chosen = rng.random(len(seats)) < rng.uniform(0.2, 0.7)
    middle, across = (seats + seats[near])[chosen] / 2, (seats - seats[near])[chosen]
    angle = np.arctan2(across[:, 1], across[:, 0]) + np.pi / 2
    count = len(middle)
    shape = {"aspect": rng.uniform(1.8, 3.5, count), "angle": angle}
    nuclei = fill(size, blobs(rng, middle, zoom * rng.uniform(0.016, 0.024, count), **shape), softness=0.003)
    # Membranes that lie flat in the section veil a cell.
    haze = rng.uniform(0.02, 0.3) * ramp(fractal_texture(rng, size, scale=0.3), -0.2, 2.5)
    haematoxylin = 1.05 * nuclei + rng.uniform(0.05, 0.4) * (wall + haze)
    return [(haematoxylin, HAEMATOXYLIN), (0.7 * wall + haze, EOSIN)]


def _background(rng: np.random.Generator, size: int, zoom: float) -> Layers:
    x, y = unit_grid(size)
    along, _ = turned(x - 0.5, y - 0.5, rng.uniform(0, 2 * np.pi))
    place = rng.uniform(0, 1, 2)
    shade = rng.uniform(0.1, 0.4) * along + rng.uniform(0, 0.5) * ((x - place[0]) ** 2 + (y - place[1]) ** 2)
    shade += 0.02 * fractal_texture(rng, size, scale=0.4, octaves=2)
    # Dust lies in every plane: small and sharp, or wide and faint when out of focus.
    count = int(rng.integers(0, 14))
    radii, values = zoom * rng.uniform(0.003, 0.012, count), rng.uniform(0.2, 0.8, count)
    dust = dots(size, rng.random((count, 2)), radii, values, softness=0.002)
    count = int(rng.integers(0, 6))
    radii, values = zoom * rng.uniform(0.02, 0.07, count), rng.uniform(0.05, 0.25, count)
    dust += dots(size, rng.random((count, 2)), radii, values, softness=0.012)
    streaks = [
        wander(rng, rng.random(2), rng.uniform(0, 6.3), rng.uniform(0.05, 0.4), curl=1.5)
        for _ in range(int(rng.integers(0, 3)))
    ]
    grime = shade - shade.min() + 0.4 * dust + 0.15 * trace(size, streaks, 0.006, softness=0.004)
    residue = 0.03 * rng.random() * (1 + fractal_texture(rng, size, scale=0.5))
    share = rng.uniform(0.25, 0.6)
    colour = share * (MUCIN + 0.4 * EOSIN) + (1 - share) * DUST
    return [(0.7 * grime, colour), (np.maximum(residue, 0), EOSIN)]


def _debris(rng: np.random.Generator, size: int, zoom: float) -> Layers:
    lumps = fractal_texture(rng, size, scale=0.25 * zoom, octaves=4, persistence=0.75)
    grains = fractal_texture(rng, size, scale=0.03 * zoom, octaves=2, persistence=0.8)
    smudge = ramp(fractal_texture(rng, size, scale=0.12 * zoom, octaves=3, persistence=0.6), 0.2, 1.8)
    holes = ramp(lumps, -0.9, -1.7)
    points = scatter(rng, 0.085 * zoom, jitter=0.5, margin=0.02, keep=(0.1, 0.8))
    # Nuclei burst into fragments (karyorrhexis): crumbs of every size around a lost centre.
    crumbs = np.repeat(points, 3, axis=0) + 0.017 * zoom * rng.standard_normal((3 * len(points), 2))
    count = len(crumbs)
    radii = zoom * 0.012 * np.exp(0.5 * rng.standard_normal(count))
    shape = {"aspect": rng.uniform(1, 2, count), "angle": rng.uniform(0, np.pi, count), "points": 14}
    shapes = blobs(rng, crumbs, radii, irregularity=0.2, **shape)
    dust = fill(size, shapes, rng.uniform(0.15, 1, count), softness=0.003)
    eosin = (0.75 + 0.17 * lumps + 0.16 * grains) * (1 - 0.8 * holes)
    return [(1.3 * dust + 0.35 * smudge * (1 - holes), HAEMATOXYLIN), (eosin, EOSIN)]


def _lymphocytes(rng: np.random.Generator, size: int, zoom: float) -> Layers:
    spacing = zoom * rng.uniform(0.062, 0.075)
    points = scatter(rng, spacing, jitter=0.13, margin=0.04, keep=(0.7, 0.98))
    radii = spacing * rng.normal(0.415, 0.03, len(points))
    shape = {"aspect": rng.uniform(1, 1.2, len(points)), "angle": rng.uniform(0, np.pi, len(points))}
    nuclei = _nuclei(rng, size, points, radii, irregularity=0.05, speckle=0.2, **shape)
    matrix = rng.uniform(0.25, 0.75) + 0.12 * fractal_texture(rng, size, scale=0.12, octaves=3)
    gaps = ramp(fractal_texture(rng, size, scale=0.15), 0.8, 1.8)
    matrix = np.maximum(matrix, 0) * (1 - 0.7 * gaps)
    return [(1.35 * nuclei + 0.15 * (1 - gaps), HAEMATOXYLIN), (matrix, EOSIN)]


def _mucus(rng: np.random.Generator, size: int, zoom: float) -> Layers:
    x, y = unit_grid(size)
    along, across = turned(x, y, rng.uniform(0, 2 * np.pi))
    bend = 0.10 * fractal_texture(rng, size, scale=0.5 * zoom, octaves=2)
    bend += 0.03 * fractal_texture(rng, size, scale=0.16 * zoom, octaves=2)
    threads = texture_at(rng, 2.2 * along / zoom, 13 * (across + bend) / zoom)
    wisps = texture_at(rng, 3 * along / zoom, 26 * (across + 1.2 * bend) / zoom)
    patches = fractal_texture(rng, size, scale=0.3)
    strands = np.exp(-7 * threads**2) * ramp(patches, -1.0, 1.0) + 0.35 * np.exp(-3 * wisps**2) * ramp(patches, 1, -1)
    cloud = rng.uniform(0.15, 0.45) * (1 + 0.45 * fractal_texture(rng, size, scale=0.4))
    mucin = np.maximum(cloud + rng.uniform(0.2, 0.5) * strands, 0.02)
    count = int(rng.integers(0, 7))
    radii = zoom * rng.uniform(0.018, 0.034, count)
    shape = {"irregularity": 0.15, "aspect": rng.uniform(1, 2, count)}
    cells = _nuclei(rng, size, rng.random((count, 2)), radii, speckle=0.2, **shape)
    tint = rng.uniform(0.03, 0.25) * (1 + strands)
    eosin = tint + 0.25 * soften(cells, 0.01)
    return [(0.9 * cells + 0.08 * strands, HAEMATOXYLIN), (eosin, EOSIN), (mucin, MUCIN)]


def _muscle(rng: np.random.Generator, size: int, zoom: float) -> Layers:
    x, y = unit_grid(size)
    angle = rng.uniform(0, np.pi)
    along, across = turned(x - 0.5, y - 0.5, angle)
    phase, pitch, lift = rng.uniform(0, 6.3), rng.uniform(0.5, 1.0) * zoom, rng.uniform(0.005, 0.03)
    wave = lift * np.sin(2 * np.pi * along / pitch + phase)
    wave += 0.012 * fractal_texture(rng, size, scale=0.5, octaves=2)
    v = across + wave
    fibres = texture_at(rng, 2.5 * along / zoom + 9, 26 * v / zoom + 32)
    strands = texture_at(rng, 3.5 * along / zoom + 9, 60 * v / zoom + 32)
    bundles = texture_at(rng, 1.0 * along / zoom + 9, 8 * v / zoom + 32)
    clefts = np.exp(-rng.uniform(6, 24) * bundles**2) * rng.uniform(0.1, 0.95)
    eosin = (rng.uniform(0.5, 0.95) + 0.15 * fibres + 0.08 * strands) * (1 - clefts)
    seats = scatter(rng, zoom * rng.uniform(0.13, 0.2), jitter=0.35, margin=0.1)
    place = turned(*(seats - 0.5).T, angle)[0]
    slope = 2 * np.pi * lift / pitch * np.cos(2 * np.pi * place / pitch + phase)
    lengths, widths = rng.uniform(0.09, 0.17, len(seats)), rng.uniform(0.022, 0.034, len(seats))
    cigars = spindles(rng, seats, angle - np.arctan(slope), zoom * lengths, zoom * widths)
    nuclei = fill(size, cigars, rng.uniform(0.5, 1, len(cigars)), softness=0.003)
    haematoxylin = 1.05 * nuclei * (1 + 0.08 * strands) + rng.uniform(0, 0.4)
    return [(haematoxylin, HAEMATOXYLIN), (np.maximum(eosin, 0.05), EOSIN)]


def _mucosa(rng: np.random.Generator, size: int, zoom: float) -> Layers:
    radius = zoom * rng.uniform(0.19, 0.26)
    seats = scatter(rng, 2.35 * radius, jitter=0.05, margin=1.2 * radius)
    stretch, tilt = rng.uniform(1, 1.5), rng.uniform(0, np.pi)
    radii = radius * rng.uniform(0.9, 1.05, len(seats))
    walls, lumens, goblets, nuclei = _crypts(rng, seats, radii, stretch, tilt)
    epithelium = fill(size, walls, softness=0.003)
    lumen = fill(size, lumens, softness=0.006)
    vacuole = fill(size, goblets, rng.uniform(0.75, 1, len(goblets)), softness=0.004) * (1 - lumen)
    basal = fill(size, nuclei, rng.uniform(0.65, 1, len(nuclei)), softness=0.002)
    points = scatter(rng, zoom * 0.075, jitter=0.3, margin=0.03, keep=(0.5, 0.9))
    radii = zoom * rng.uniform(0.017, 0.027, len(points))
    shape = {"aspect": rng.uniform(1, 1.9, len(points)), "angle": rng.uniform(0, np.pi, len(points))}
    between = 1 - fill(size, walls, softness=0.008)
    stroma = _nuclei(rng, size, points, radii, speckle=0.2, **shape) * between
    weave = fractal_texture(rng, size, scale=0.08, octaves=3)
    cleft = ramp(soften(epithelium, 0.012) * between, 0.08, 0.3)
    matrix = np.maximum(0.42 + 0.18 * weave, 0.03) * between * (1 - 0.7 * cleft)
    tissue = epithelium * (1 - lumen)
    haematoxylin = 1.2 * basal + 1.2 * stroma + 0.22 * tissue * (1 - vacuole)
    eosin = matrix + tissue * (0.55 + 0.08 * weave) * (1 - 0.9 * vacuole)
    mucin = tissue * vacuole * (0.3 + 0.08 * weave) + 0.1 * lumen
    return [(haematoxylin, HAEMATOXYLIN), (eosin, EOSIN), (mucin, MUCIN)]


def _crypts(
    rng: np.random.Generator, seats: NDArray, radii: NDArray, stretch: float, tilt: float
) -> tuple[Path, Path, Path, Path]:
    """Return the outlines [n, points, 2] of the crypts' walls, lumens, goblet vacuoles, basal nuclei.

    Drawn around the origin at radius 1, then brought to size, stretched and tilted together.
    """
    crypts = len(seats)
    everyone = np.arange(crypts)
    walls = blobs(rng, np.zeros((crypts, 2)), 1, irregularity=0.04, points=60)
    middles = 0.05 * rng.standard_normal((crypts, 2))
    lumens = blobs(rng, middles, rng.uniform(0.12, 0.2, crypts), irregularity=0.15)
    goblet_owner, turn, places, crowd = _ring(rng, rng.integers(11, 17, crypts), (0.5, 0.58), keep=0.85)
    shape = {"aspect": 1.5, "angle": turn, "irregularity": 0.05, "points": 18}
    vacuoles = blobs(rng, places, 3.4 / crowd * rng.uniform(0.6, 0.7, len(turn)), **shape)
    nucleus_owner, turn, places, _ = _ring(rng, rng.integers(20, 28, crypts), (0.83, 0.92))
    count = len(turn)
    shape = {"aspect": rng.uniform(1, 1.5, count), "angle": turn, "points": 14}
    nuclei = blobs(rng, places, rng.uniform(0.085, 0.115, count), **shape)
    proportions = np.array([np.sqrt(stretch), 1 / np.sqrt(stretch)])
    cosine, sine = np.cos(tilt), np.sin(tilt)
    rotation = np.array([[cosine, sine], [-sine, cosine]])
    groups = ((walls, everyone), (lumens, everyone), (vacuoles, goblet_owner), (nuclei, nucleus_owner))
    return tuple(
        seats[owner, None] + (outlines * radii[owner, None, None] * proportions) @ rotation
        for outlines, owner in groups
    )


def _ring(
    rng: np.random.Generator, counts: NDArray[np.int64], reach: tuple[float, float], *, keep: float = 1.0
) -> tuple[NDArray[np.int64], NDArray[np.float64], Path, NDArray[np.int64]]:
    """Owner, angle, place and ring size of cells set at nearly even angles around each of several crypts."""
    owner = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    phase = rng.uniform(0, 2 * np.pi, len(counts))
    shaken = rank + 0.13 * rng.standard_normal(len(owner))
    angle = phase[owner] + 2 * np.pi * shaken / counts[owner]
    kept = rng.random(len(owner)) < keep
    owner, angle = owner[kept], angle[kept]
    places = rng.uniform(*reach, len(angle))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return owner, angle, places, counts[owner]


def _stroma(rng: np.random.Generator, size: int, zoom: float) -> Layers:
    x, y = unit_grid(size)
    angle = rng.uniform(0, np.pi)
    along, across = turned(x - 0.5, y - 0.5, angle)
    bend = 0.11 * fractal_texture(rng, size, scale=0.35 * zoom, octaves=2)
    v = across + bend
    fibres = texture_at(rng, 4 * along / zoom + 9, 20 * v / zoom + 32)
    strands = texture_at(rng, 7 * along / zoom + 9, 48 * v / zoom + 32)
    loose = ramp(texture_at(rng, 3 * along / zoom + 9, 9 * v / zoom + 32), 0.1, 1.3) * rng.uniform(0.6, 0.95)
    eosin = (0.6 + 0.2 * fibres + 0.12 * strands) * (1 - loose)
    seats = scatter(rng, zoom * rng.uniform(0.1, 0.14), jitter=0.4, margin=0.05)
    rows, columns = np.clip((seats[:, ::-1] * size).astype(int), 0, size - 1).T
    drop, climb = np.gradient(v)
    flow = np.arctan2(drop[rows, columns], climb[rows, columns]) + np.pi / 2
    flow = flow + 0.15 * rng.standard_normal(len(seats))
    lengths, widths = rng.uniform(0.06, 0.13, len(seats)) * zoom, rng.uniform(0.02, 0.034, len(seats)) * zoom
    shapes = spindles(rng, seats, flow, lengths, widths, roundness=1.6, bend=0.8)
    nuclei = fill(size, shapes, rng.uniform(0.6, 1, len(seats)), softness=0.003)
    count = int(rng.integers(0, 16))
    round_cells = _nuclei(rng, size, rng.random((count, 2)), zoom * rng.uniform(0.022, 0.027, count), speckle=0.2)
    haematoxylin = 1.1 * np.maximum(nuclei, round_cells) + 0.08 * (1 - loose)
    return [(haematoxylin, HAEMATOXYLIN), (np.maximum(eosin, 0.04), EOSIN), (0.12 * loose, MUCIN)]


def _tumour(rng: np.random.Generator, size: int, zoom: float) -> Layers:
    spacing = zoom * rng.uniform(0.34, 0.55)
    seats = scatter(rng, spacing, jitter=0.12, margin=0.6 * spacing)
    count = len(seats)
    shape = {"aspect": rng.uniform(1, 1.8, count), "angle": rng.uniform(0, np.pi, count), "points": 60}
    walls = blobs(rng, seats, spacing * rng.uniform(0.46, 0.54, count), irregularity=0.1, **shape)
    # Malignant glands have ragged lumens, or have lost them.
    openness = rng.uniform(0.08, 0.62, count)
    lumens = blobs(rng, seats, spacing * openness / 2, irregularity=0.22, **shape)
    crowd = zoom * rng.uniform(0.046, 0.058)
    seats, angles = _stratified(rng, walls, lumens, crowd)
    count = len(seats)
    radii = 0.53 * crowd * np.exp(0.2 * rng.standard_normal(count))
    shape = {"aspect": rng.uniform(1.1, 2.3, count), "angle": angles}
    nuclei = _nuclei(rng, size, seats, radii, speckle=0.25, vesicular=rng.uniform(0.2, 0.5), **shape)
    places = seats + 0.2 * radii[:, None] * rng.standard_normal((count, 2))
    nucleoli = dots(size, places, 0.26 * radii, rng.random(count) < 0.6)
    body = fill(size, walls, softness=0.004)
    lumen = fill(size, lumens, openness > 0.15, softness=0.003)
    weave = fractal_texture(rng, size, scale=0.06, octaves=3)
    secretion = lumen * ramp(fractal_texture(rng, size, scale=0.1), 0.4, 1.6)
    points = scatter(rng, 0.1 * zoom, jitter=0.3, margin=0.03)
    thin = spindles(rng, points, rng.uniform(0, np.pi, len(points)), 0.08 * zoom, 0.024 * zoom, roundness=2)
    along, across = turned(*unit_grid(size), rng.uniform(0, np.pi))
    fibres = texture_at(rng, 5 * along, 24 * across + 0.05 * weave)
    stroma = (1 - body) * (0.5 + 0.15 * fibres)
    haematoxylin = 1.1 * nuclei * (1 - lumen) + 0.45 * nucleoli * body * (1 - lumen)
    haematoxylin += 0.9 * fill(size, thin, 0.9) * (1 - body)
    haematoxylin += rng.uniform(0.12, 0.3) * body * (1 - lumen) + 0.35 * secretion
    eosin = body * (1 - lumen) * (0.5 + 0.1 * weave) + stroma + 0.5 * secretion
    return [(haematoxylin, HAEMATOXYLIN), (np.maximum(eosin, 0), EOSIN), (0.06 * lumen, MUCIN)]


def _stratified(
    rng: np.random.Generator, walls: NDArray, lumens: NDArray, crowd: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places [n, 2] and angles [n] of nuclei piled up between the lumens and the walls of glands."""
    girth = np.linalg.norm(np.diff(walls, axis=1), axis=2).sum(1)
    depth = np.linalg.norm(walls - lumens, axis=2).mean(1)
    places, angles = [], []
    for wall, lumen, length, thickness in zip(walls, lumens, girth, depth, strict=True):
        rows = np.arange(0.1, 0.75, 1.25 * crowd / thickness)
        for row in rows:
            count = int(length * (1 - row) / (0.95 * crowd))
            node = np.linspace(0, len(wall), count, endpoint=False) + 0.3 * rng.standard_normal(count)
            node = node.astype(int) % len(wall)
            share = (1 - row + 0.4 * crowd / thickness * rng.standard_normal(count))[:, None]
            places.append(share * wall[node] + (1 - share) * lumen[node])
            across = wall[node] - lumen[node]
            angles.append(np.arctan2(across[:, 1], across[:, 0]) + 0.3 * rng.standard_normal(count))
    places, angles = np.concatenate(places), np.concatenate(angles)
    seen = np.all((places > -0.05) & (places < 1.05), axis=1)
    return places[seen], angles[seen]


def _nuclei(
    rng: np.random.Generator,
    size: int,
    centres: NDArray,
    radii: NDArray,
    *,
    speckle: float,
    vesicular: float = 0.0,
    irregularity: float = 0.07,
    **shape: NDArray,
) -> Field:
    """Density of nuclei with uneven chromatin; ``vesicular`` ones are paler inside their membrane."""
    outlines = blobs(rng, centres, radii, irregularity=irregularity, points=20, **shape)
    mask = fill(size, outlines, rng.uniform(0.55, 1, len(outlines)), softness=0.002)
    if vesicular:
        middles = np.reshape(centres, (-1, 1, 2))
        mask = mask * (1 - vesicular * fill(size, middles + 0.7 * (outlines - middles), softness=0.004))
    return np.maximum(mask * (1 + speckle * fractal_texture(rng, size, scale=0.014, octaves=2)), 0)


def _paint(
    tissue: Callable[[np.random.Generator, int, float], Layers], rng: np.random.Generator, size: int
) -> NDArray[np.float32]:
    """Stain a tissue and look at it in slightly uneven light."""
    layers = tissue(rng, size, rng.uniform(0.85, 1.35))
    x, y = unit_grid(size)
    slope = rng.normal(0, 0.03, 2)
    shade = 1 + slope[0] * (x - 0.5) + slope[1] * (y - 0.5)
    light = shade[..., None] * (0.97 + 0.01 * rng.uniform(-1, 1, 3))
    thickness = 1 + 0.08 * fractal_texture(rng, size, scale=0.5, octaves=2)
    # Every slide is stained a little stronger or weaker, redder or bluer, whatever its tissue.
    stains = []
    for density, dye in layers:
        strength, hue = np.exp(0.28 * rng.standard_normal()), np.exp(0.1 * rng.standard_normal(3))
        stains.append((density * thickness, strength * hue * dye))
    return finish(transmit(stains, light))


PAINTERS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float32]]] = {
    "adipose tissue": partial(_paint, _adipose),
    "background": partial(_paint, _background),
    "debris": partial(_paint, _debris),
    "lymphocytes": partial(_paint, _lymphocytes),
    "mucus": partial(_paint, _mucus),
    "smooth muscle": partial(_paint, _muscle),
    "normal colon mucosa": partial(_paint, _mucosa),
    "cancer-associated stroma": partial(_paint, _stroma),
    "colorectal adenocarcinoma epithelium": partial(_paint, _tumour),
}
