"""Brushes shared by the phantom painters, and how a site records what they painted.

Everything is placed in unit coordinates: x to the right, y downwards, both 0 to 1 over the image. The random numbers
drawn never depend on the image size, so one seed gives one scene at any resolution. Coloured scenes are painted at
their size; gray ones on a canvas of `canvas_size`, with the brushes at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates

Field = NDArray[np.float32]
Path = NDArray[np.float64]
Range = tuple[float, float]

# Shapes are drawn on at least this many pixels a side, then averaged down.
SHAPE_RASTER = 192
# Blur of less than this many pixels is skipped: it would change no visible pixel.
INVISIBLE_BLUR = 0.25
# Integral of the squared cubic B-spline: the variance left of unit white noise, per axis.
SPLINE_VARIANCE = 151 / 315
# Gray scenes are drawn on at least this many pixels a side, then averaged down.
SMALLEST_CANVAS = 96


def unit_grid(size: int) -> tuple[Field, Field]:
    """Return x and y of the pixel centres, float32 [size, size] each."""
    return tuple(np.meshgrid(_centres(size), _centres(size)))


def ramp(values: ArrayLike, low: float, high: float) -> Field:
    """Rise smoothly from 0 at ``low`` to 1 at ``high`` (``low`` > ``high`` falls instead)."""
    t = np.clip((np.asarray(values, np.float32) - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def soften(field: Field, sigma: float) -> Field:
    """Blur a field [H, W]; ``sigma`` is a fraction of the image side."""
    pixels = sigma * field.shape[0]
    return gaussian_filter(field, pixels, truncate=3) if pixels > INVISIBLE_BLUR else field


def fractal_texture(
    rng: np.random.Generator, size: int, *, scale: float, octaves: int = 3, persistence: float = 0.5
) -> Field:
    """Smooth cloudy texture, mean about 0 and standard deviation about 1.

    Parameters
    ----------
    scale : float
        Distance between the knots of the coarsest octave, as a fraction of the image side.
    octaves, persistence : int, float
        Every further octave halves the scale and multiplies the amplitude by ``persistence``.

    Returns
    -------
    float32 [size, size]
    """
    ticks = _centres(size)
    total, power = np.zeros((size, size), np.float32), 0.0
    for octave in range(octaves):
        knots = int(np.ceil(2**octave / scale)) + 4
        values = rng.standard_normal((knots, knots), dtype=np.float32)
        shift = rng.uniform(1, 2, 2)
        (rows, down), (columns, across) = (_spline_weights(ticks * 2**octave / scale + s) for s in shift)
        # Not a matrix product: threads of a linear-algebra library cost more than they save here.
        bands = np.einsum("ik,ikj->ij", down, values[rows])
        amplitude = persistence**octave
        total += (amplitude / SPLINE_VARIANCE) * np.einsum("ijk,jk->ij", bands[:, columns], across)
        power += amplitude**2
    return total / np.float32(np.sqrt(power))


def texture_at(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """Smooth texture of unit grain at warped coordinates: mean about 0, standard deviation about 1.

    Stretch, turn or bend ``u`` and ``v`` first: fibres are texture that is long in ``u`` and short in
    ``v``. The texture repeats after 64 units.
    """
    values = rng.standard_normal((64, 64), dtype=np.float32)
    field = map_coordinates(values, [v, u], order=3, prefilter=False, mode="grid-wrap", output=np.float32)
    return field / np.float32(SPLINE_VARIANCE)


def turned(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    """Coordinates along and across the direction ``angle`` (radians)."""
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x


def blobs(
    rng: np.random.Generator,
    centres: ArrayLike,
    radii: ArrayLike,
    *,
    aspect: ArrayLike = 1.0,
    angle: ArrayLike = 0.0,
    irregularity: ArrayLike = 0.08,
    points: int = 36,
) -> Path:
    """Return closed outlines [n, points, 2] whose radii vary by random harmonics.

    Every argument is one value or one a blob. ``aspect`` is length over width at constant area; the
    long axis lies along ``angle`` (radians). ``irregularity`` is about the relative standard
    deviation of the radius.
    """
    centres = np.reshape(centres, (-1, 2))
    count = len(centres)
    radii, aspect, angle, irregularity = (
        np.broadcast_to(value, count)[:, None] for value in (radii, aspect, angle, irregularity)
    )
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    order = np.arange(2, 7)
    weight = irregularity * (rng.standard_normal((count, 5)) + 1j * rng.standard_normal((count, 5)))
    waves = np.exp(1j * order[:, None] * turn) / np.sqrt(2 * (order - 1))[:, None]
    reach = radii * np.maximum(1 + (weight @ waves).real, 0.2)
    along, across = reach * np.cos(turn) * np.sqrt(aspect), reach * np.sin(turn) / np.sqrt(aspect)
    cosine, sine = np.cos(angle), np.sin(angle)
    return centres[:, None] + np.stack([along * cosine - across * sine, along * sine + across * cosine], -1)


def blob(rng: np.random.Generator, centre: ArrayLike, radius: float, **shape: ArrayLike) -> Path:
    """Return one closed outline [points, 2]; ``shape`` as for ``blobs``."""
    return blobs(rng, centre, radius, **shape)[0]


def fill(size: int, outlines: Sequence[Path], values: ArrayLike = 1.0, *, softness: float = 0.0) -> Field:
    """Fill closed outlines, later ones over earlier ones, antialiased.

    Parameters
    ----------
    outlines : sequence of [n, 2] arrays
    values : float or sequence of floats in [0, 1]
        One for all, or one an outline.
    softness : float
        Standard deviation of the blur of the edges, as a fraction of the image side.

    Returns
    -------
    float32 [size, size] in [0, 1]
    """
    layer, pen, factor = _layer(size)
    for outline, value in zip(outlines, np.broadcast_to(values, len(outlines)), strict=True):
        pen.polygon((np.asarray(outline) * size * factor).ravel().tolist(), fill=round(255 * float(value)))
    return _field(layer, factor, softness)


def trace(
    size: int, paths: Sequence[Path], widths: ArrayLike, values: ArrayLike = 1.0, *, softness: float = 0.0
) -> Field:
    """Draw open paths [n, 2] as lines of the given widths (fractions of the side) and values."""
    layer, pen, factor = _layer(size)
    count = len(paths)
    for path, width, value in zip(paths, np.broadcast_to(widths, count), np.broadcast_to(values, count), strict=True):
        pixels = (np.asarray(path) * size * factor).ravel().tolist()
        pen.line(pixels, fill=round(255 * float(value)), width=max(1, round(width * size * factor)), joint="curve")
    return _field(layer, factor, softness)


def dots(size: int, centres: ArrayLike, radii: ArrayLike, values: ArrayLike = 1.0, *, softness: float = 0.0) -> Field:
    """Draw discs at ``centres`` [n, 2] with radii in fractions of the side."""
    layer, pen, factor = _layer(size)
    centres = np.reshape(centres, (-1, 2)) * size * factor
    count = len(centres)
    reach = np.broadcast_to(np.asarray(radii) * size * factor, count)
    boxes = np.concatenate([centres - reach[:, None], centres + reach[:, None]], 1).tolist()
    for box, value in zip(boxes, np.broadcast_to(values, count), strict=True):
        pen.ellipse(box, fill=round(255 * float(value)))
    return _field(layer, factor, softness)


def scatter(
    rng: np.random.Generator, spacing: float, *, jitter: float = 0.3, margin: float = 0.1, keep: Range | None = None
) -> NDArray[np.float64]:
    """Points [n, 2] about ``spacing`` apart over the image and its margin, in random order.

    A turned, shaken hexagonal lattice: nearly as even as Poisson-disc sampling, without its search.
    ``jitter`` is the standard deviation of the shaking in units of ``spacing``, ``keep`` the range of the share of
    points that stay.
    """
    reach = int(np.ceil((0.71 + margin) / spacing)) + 1
    columns, rows = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1))
    lattice = spacing * np.stack([columns + 0.5 * (rows % 2), rows * np.sqrt(0.75)], -1).reshape(-1, 2)
    angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5, 2) * spacing
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = 0.5 + shift + lattice @ turn.T + jitter * spacing * rng.standard_normal(lattice.shape)
    points = rng.permutation(points[np.all((points > -margin) & (points < 1 + margin), axis=1)])
    return points if keep is None else points[rng.random(len(points)) < rng.uniform(*keep)]


def wander(
    rng: np.random.Generator,
    start: ArrayLike,
    heading: ArrayLike,
    length: ArrayLike,
    *,
    curl: float = 0.5,
    steps: int = 24,
    bend: ArrayLike = 0.0,
) -> Path:
    """Random smooth path [steps + 1, 2]; ``heading``, ``bend`` (total turn) and ``curl`` in radians.

    With ``start`` [n, 2] and ``heading``, ``length`` and ``bend`` of one value or n: paths
    [n, steps + 1, 2].
    """
    start = np.asarray(start, np.float64)
    heading, length, bend = (np.asarray(v, np.float64)[..., None] for v in (heading, length, bend))
    turns = np.cumsum(rng.standard_normal((*start.shape[:-1], steps)), -1) * curl / np.sqrt(steps)
    angles = heading + turns + bend * np.linspace(0, 1, steps)
    steps_taken = (length / steps)[..., None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    walked = np.cumsum(steps_taken, -2)
    return start[..., None, :] + np.concatenate([np.zeros_like(walked[..., :1, :]), walked], -2)


def ribbon(path: Path, width: float, *, roundness: float = 4.0) -> Path:
    """Return the closed outline around a path [n, 2]: a sausage, or a spindle for ``roundness`` near 1.

    ``width`` is the full width at the middle; the higher ``roundness``, the blunter the ends.
    """
    along = np.abs(np.linspace(-1, 1, len(path)))
    half = _normals(path) * (0.5 * width * np.sqrt(1 - along**roundness))[:, None]
    return np.concatenate([path + half, (path - half)[::-1]])


def spindles(
    rng: np.random.Generator,
    centres: ArrayLike,
    angles: ArrayLike,
    lengths: ArrayLike,
    widths: ArrayLike,
    *,
    roundness: float = 4.0,
    bend: float = 0.3,
) -> Path:
    """Return closed outlines [n, 16, 2] of slightly bent rods.

    Blunt rods for ``roundness`` of 4 and more, pointed spindles near 1; ``bend`` is the standard
    deviation of the turn from end to end, in radians.
    """
    centres = np.reshape(centres, (-1, 1, 2))
    count = len(centres)
    angles, lengths, widths = (np.broadcast_to(v, count)[:, None] for v in (angles, lengths, widths))
    along = np.linspace(-1, 1, 8)
    lift = 0.25 * rng.normal(0, bend, (count, 1)) * (1 / 3 - along**2)
    half = widths / lengths * np.sqrt(1 - np.abs(along) ** roundness)
    u = 0.5 * lengths * np.concatenate([along, along[::-1]])
    v = 0.5 * lengths * np.concatenate([lift + half, (lift - half)[:, ::-1]], 1)
    cosine, sine = np.cos(angles), np.sin(angles)
    return centres + np.stack([u * cosine - v * sine, u * sine + v * cosine], -1)


def branches(
    rng: np.random.Generator,
    trunks: Path,
    widths: ArrayLike,
    *,
    taper: float = 0.5,
    per_path: float = 4.0,
    reach: float = 0.5,
    curl: float = 0.5,
) -> tuple[Path, NDArray[np.float64]]:
    """Grow side branches, and branches of these, from trunks [n, steps + 1, 2] of the given widths at their start.

    ``per_path`` is the mean number of side branches, ``reach`` their length relative to the parent, ``taper`` a
    path's width at its end over that at its start.

    Returns
    -------
    paths : float64 [m, steps + 1, 2]
        Trunks first.
    widths : float64 [m]
        Widths at the start of each path.
    """
    parents, thickness = np.asarray(trunks), np.asarray(widths, np.float64)
    paths, starts = [parents], [thickness]
    steps = parents.shape[1] - 1
    for _ in range(2):
        owner = np.repeat(np.arange(len(parents)), rng.poisson(per_path, len(parents)))
        place = rng.uniform(0.12, 0.95, len(owner))
        node = (place * (steps - 1)).astype(int)
        origin, ahead = parents[owner, node], parents[owner, node + 1] - parents[owner, node]
        aside = rng.choice([-1, 1], len(owner)) * rng.uniform(0.6, 1.4, len(owner)) * 0.7  # radians from the parent
        heading = np.arctan2(ahead[:, 1], ahead[:, 0]) + aside
        length = steps * np.linalg.norm(ahead, axis=1) * reach * rng.uniform(0.6, 1.3, len(owner))
        parents = wander(rng, origin, heading, length, curl=curl, steps=steps)
        narrowing = 1 - (1 - taper) * place
        thickness = thickness[owner] * narrowing * rng.uniform(0.5, 0.8, len(owner))
        paths.append(parents)
        starts.append(thickness)
    return np.concatenate(paths), np.concatenate(starts)


def tapered(paths: Path, widths: ArrayLike, *, taper: float = 0.5, thinnest: float = 0.0) -> Path:
    """Return outlines [n, 2 * points, 2] of paths [n, points, 2] that thin to ``taper`` of their width."""
    along = 1 - (1 - taper) * np.linspace(0, 1, paths.shape[1])
    half = 0.5 * np.maximum(np.asarray(widths)[:, None] * along, thinnest)[..., None] * _normals(paths)
    return np.concatenate([paths + half, (paths - half)[:, ::-1]], 1)


def cover(image: Field, colour: ArrayLike, alpha: Field) -> Field:
    """Lay an opaque colour (or an image [H, W, 3]) over an image where ``alpha`` [H, W] is 1."""
    return image + alpha[..., None] * (np.asarray(colour, np.float32) - image)


def transmit(stains: Sequence[tuple[Field, ArrayLike]], light: ArrayLike = (1.0, 1.0, 1.0)) -> Field:
    """Light left after dyes: Beer-Lambert, from pairs of density [H, W] and absorbance per channel."""
    absorbed = sum(density[..., None] * np.asarray(dye, np.float32) for density, dye in stains)
    return (np.asarray(light, np.float32) * np.exp(-absorbed)).astype(np.float32)


def finish(image: Field) -> Field:
    """Return the scene as every painter must: float32 [size, size, 3] in [0, 1]."""
    return np.clip(image, 0, 1).astype(np.float32)


def _centres(size: int) -> Field:
    """Pixel centres of one side, float32 [size]."""
    return (np.arange(size, dtype=np.float32) + 0.5) / size


def _layer(size: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """An oversampled gray layer, the pen that draws on it, and by what factor it is larger."""
    factor = max(2, -(-SHAPE_RASTER // size))
    layer = Image.new("L", (size * factor, size * factor))
    return layer, ImageDraw.Draw(layer), factor


def _field(layer: Image.Image, factor: int, softness: float) -> Field:
    return soften(np.asarray(layer.reduce(factor), np.float32) / 255, softness)


def _normals(paths: Path) -> Path:
    """Unit vectors across paths [..., points, 2]."""
    tangent = np.gradient(paths, axis=-2)
    normal = np.stack([-tangent[..., 1], tangent[..., 0]], -1)
    return normal / (np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-12)


def _spline_weights(places: Field) -> tuple[NDArray[np.int64], Field]:
    """Knots [n, 4] and weights [n, 4] of the four cubic B-splines that reach each place."""
    first = np.floor(places).astype(np.int64) - 1
    t = np.abs((places - first)[:, None] - np.arange(4)).astype(np.float32)
    weights = np.where(t < 1, 2 / 3 - t * t + t**3 / 2, np.maximum(2 - t, 0) ** 3 / 6)
    return first[:, None] + np.arange(4), weights


@dataclass(frozen=True)
class Site:
    """How one laboratory records a scene. Every range is drawn uniformly, once per image.

    Attributes
    ----------
    stain : tuple of three floats
        Exponent per RGB channel; scaling the optical density of a stain by ``s`` raises the
        transmitted light to the power ``s``.
    stain_jitter : float
        Standard deviation of the per-image, per-channel change of ``stain``.
    level, spread : Range
        Mean and standard deviation of the recorded intensities, as auto-exposure sets them.
    auto_exposure : float
        Share in [0, 1] of the way from the scene's own mean and spread to ``level`` and ``spread``.
    blur : Range
        Standard deviation of the optical blur, as a fraction of the image side.
    grain : Range
        Standard deviation of the sensor grain, in [0, 1] intensity units.
    gray : bool
        A one-channel detector: all three channels share the same grain.
    """

    stain: tuple[float, float, float]
    stain_jitter: float
    level: Range
    spread: Range
    auto_exposure: float
    blur: Range
    grain: Range
    gray: bool = False


def acquire(scene: NDArray[np.float32], site: Site, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Record a painted scene at a site.

    Parameters
    ----------
    scene : float32 [H, W, 3] in [0, 1]
        What lies under the lens, free of equipment.
    site : Site
        The laboratory.
    rng : numpy.random.Generator
        Draws the per-image settings; consumed in a fixed order.

    Returns
    -------
    uint8 [H, W, 3]
    """
    image = np.clip(scene, 1e-3, 1.0)
    stain = np.asarray(site.stain) + site.stain_jitter * rng.standard_normal(3)
    image = image ** np.clip(stain, 0.3, 3.0)
    level, spread = rng.uniform(*site.level), rng.uniform(*site.spread)
    # One gain and one offset for all channels: auto-exposure changes brightness, never hue.
    mean, share = image.mean(), site.auto_exposure
    gain = (1 - share) + share * spread / (image.std() + 1e-6)
    image = (image - mean) * gain + ((1 - share) * mean + share * level)
    blur = rng.uniform(*site.blur) * scene.shape[0]
    image = gaussian_filter(image, sigma=(blur, blur, 0))
    grain_shape = (*image.shape[:2], 1 if site.gray else 3)
    image = image + rng.uniform(*site.grain) * rng.standard_normal(grain_shape)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def canvas_size(size: int) -> int:
    """Side in pixels on which a scene of ``size`` px is drawn: small scenes are supersampled."""
    return max(size, SMALLEST_CANVAS)


def unit_axes(side: int) -> tuple[Field, Field]:
    """Pixel centres in [0, 1]: x float32 [1, side] to the right, y float32 [side, 1] downwards."""
    return _centres(side)[None, :], _centres(side)[:, None]


def resample(field: Field, shape: tuple[int, int]) -> Field:
    """Bicubic resampling of float32 [h, w] to ``shape`` (rows, columns), anti-aliased when shrinking."""
    return np.asarray(Image.fromarray(field).resize(shape[::-1], Image.Resampling.BICUBIC))


def smooth_texture(rng: np.random.Generator, side: int, cells: tuple[int, int]) -> Field:
    """Smooth Gaussian texture, float32 [side, side], about ``cells`` (rows, columns) humps across."""
    lattice = rng.standard_normal((cells[0] + 1, cells[1] + 1), dtype=np.float32)
    return resample(lattice, (side, side))


def smooth_curve(rng: np.random.Generator, side: int, cells: int) -> Field:
    """Smooth Gaussian texture along x, float32 [1, side]."""
    return resample(rng.standard_normal((1, cells + 1), dtype=np.float32), (1, side))


def speckle(rng: np.random.Generator, side: int, cells: tuple[int, int]) -> Field:
    """Amplitude of a fully developed speckle pattern (Rayleigh, mean near 1), float32 [side, side].

    Interference of many scatterers makes both quadratures Gaussian; ``cells`` is the number of
    speckle grains down and across.
    """
    one, other = smooth_texture(rng, side, cells), smooth_texture(rng, side, cells)
    return np.sqrt(one * one + other * other) * np.float32(0.95)


def step(distance: Field, width: float) -> Field:
    """Smooth step from 0 to 1 as ``distance`` goes from ``-width / 2`` to ``width / 2``."""
    return ramp(distance, -width / 2, width / 2)


def bell(distance: Field, width: float) -> Field:
    """Gaussian bump: 1 at distance 0, standard deviation ``width``.

    Of a texture: bright lines along its zero crossings, such as septa, ligaments or a reticular mesh.
    """
    scaled = distance * np.float32(1 / width)
    return np.exp(np.float32(-0.5) * scaled * scaled)


def finish_gray(gray: Field, size: int) -> NDArray[np.float32]:
    """Shrink a drawn canvas to ``size`` px and repeat it over three equal channels, clipped to [0, 1]."""
    if gray.shape[0] != size:
        gray = resample(np.ascontiguousarray(gray, dtype=np.float32), (size, size))
    return np.repeat(np.clip(gray, 0, 1).astype(np.float32)[..., None], 3, axis=2)
