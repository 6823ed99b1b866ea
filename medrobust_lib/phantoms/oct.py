"""Retinal OCT phantoms: a macular B-scan, healthy or with one of three diseases.

Drawn after what the scan shows, from the top: dark vitreous, the retinal layers around the foveal pit,
the bright retinal pigment epithelium (RPE) on Bruch's membrane, the fading choroid. A layered model
carries all classes: disease changes the thickness of a layer, adds a compartment under or over the RPE,
or opens cysts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from medrobust_lib.phantoms.painting import (
    Field,
    bell,
    canvas_size,
    finish_gray,
    resample,
    smooth_curve,
    smooth_texture,
    speckle,
    step,
    unit_axes,
)

# Healthy compartments from the inner surface downwards: thickness beside the pit, share of it left in
# the pit's centre, reflectivity. Subretinal and sub-RPE spaces are closed in health.
COMPARTMENTS = (
    ("nerve fibres", 0.034, 0.02, 0.72),
    ("ganglion cells", 0.040, 0.02, 0.46),
    ("inner plexiform", 0.036, 0.05, 0.56),
    ("inner nuclear", 0.034, 0.05, 0.30),
    ("outer plexiform", 0.024, 0.25, 0.55),
    ("outer nuclear", 0.058, 1.25, 0.24),
    ("limiting membrane", 0.008, 1.0, 0.50),
    ("myoid", 0.014, 1.0, 0.28),
    ("ellipsoid", 0.017, 1.1, 0.80),
    ("outer segments", 0.015, 1.3, 0.46),
    ("subretinal space", 0.0, 0.0, 0.06),
    ("pigment epithelium", 0.021, 1.0, 0.97),
    ("sub-RPE space", 0.0, 0.0, 0.42),
)
NAMES = tuple(row[0] for row in COMPARTMENTS)
INNER_NUCLEAR, OUTER_NUCLEAR = NAMES.index("inner nuclear"), NAMES.index("outer nuclear")
SUBRETINAL, PIGMENT, SUB_RPE = (
    NAMES.index(name) for name in ("subretinal space", "pigment epithelium", "sub-RPE space")
)
FLUID = 0.05


@dataclass(frozen=True)
class Retina:
    """One scan being drawn; the painters change its arrays in place.

    Attributes
    ----------
    x, y : float32 [1, side], [side, 1]
        Unit image coordinates.
    fovea : float
        Position of the pit along x.
    membrane : float32 [1, side]
        Depth of Bruch's membrane.
    thickness : float32 [compartments, side]
        Thickness of every compartment at each x, in image sides.
    echo : list of float or float32 [side, side]
        Reflectivity of every compartment.
    """

    x: Field
    y: Field
    fovea: float
    membrane: Field
    thickness: Field
    echo: list[float | Field]

    @property
    def side(self) -> int:
        """Canvas side in pixels."""
        return self.y.shape[0]

    def top(self, compartment: int) -> Field:
        """Depth of the upper boundary of a compartment, float32 [1, side]."""
        return self.membrane - self.thickness[compartment:].sum(axis=0, keepdims=True)


def paint_neovascular(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Choroidal neovascularization: a lesion lifts and breaks the RPE, with fluid around it."""
    retina = _healthy(rng, canvas_size(size))
    x = retina.x[0]
    centre, width = retina.fovea + rng.normal(0, 0.09), rng.uniform(0.09, 0.19)
    plateau = np.exp(-(((x - centre) / (1.35 * width)) ** 4))
    rough = 1 + 0.16 * smooth_curve(rng, retina.side, 14)[0]
    severity = rng.uniform(0.55, 1.0)
    detached = rng.uniform(0.015, 0.085) * severity * plateau * rough
    retina.thickness[SUB_RPE] += detached
    clot = 0.5 + 0.13 * smooth_texture(rng, retina.side, (14, 14))
    serous = rng.random() < 0.25
    retina.echo[SUB_RPE] = 0.16 + 0.3 * (clot - 0.5) if serous else clot
    # Subretinal hyperreflective material over the lesion, clear fluid at its shoulders.
    material = np.exp(-(((x - centre - rng.normal(0, 0.03)) / (0.8 * width)) ** 4))
    fluid = np.exp(-(((x - centre - rng.normal(0, 0.6) * width) / (rng.uniform(1.4, 2.3) * width)) ** 4))
    material_depth = rng.uniform(0.02, 0.05) * severity * material * rough
    fluid_depth = rng.choice([0.0, 1.0], p=[0.3, 0.7]) * rng.uniform(0.015, 0.055) * fluid
    retina.thickness[SUBRETINAL] += material_depth + fluid_depth
    solid = np.clip(material_depth / (material_depth + fluid_depth + 1e-4), 0, 1)[None]
    height = retina.top(PIGMENT) - retina.y
    solid = step(solid * (material_depth + fluid_depth) - height, 0.012) * (material[None] > 0.1)
    retina.echo[SUBRETINAL] = FLUID + solid * (0.6 + 0.14 * smooth_texture(rng, retina.side, (18, 18)))
    broken = plateau * step(smooth_curve(rng, retina.side, 16) - 0.1, 0.8)[0]
    retina.thickness[PIGMENT] *= 1 + 0.35 * plateau * smooth_curve(rng, retina.side, 18)[0]
    retina.thickness[PIGMENT] = np.clip(retina.thickness[PIGMENT], 0.008, None)
    retina.echo[PIGMENT] = 0.95 - rng.uniform(0.3, 0.65) * broken[None]
    for outer in (OUTER_NUCLEAR + 1, OUTER_NUCLEAR + 2, OUTER_NUCLEAR + 3, OUTER_NUCLEAR + 4):
        retina.thickness[outer] *= 1 - 0.75 * plateau
    _drape(retina, gaussian_filter1d(detached + material_depth + fluid_depth, 0.02 * retina.side))
    cysts = _cysts(rng, retina, int(rng.integers(1, 5)), spread=0.1) if rng.random() < 0.3 else None
    return _scan(rng, retina, size, cysts=cysts, shadow=-rng.uniform(-0.3, 0.6) * plateau)


def paint_normal(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Healthy macula: every layer continuous around a foveal pit."""
    return _scan(rng, _healthy(rng, canvas_size(size)), size)


def paint_edema(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Diabetic macular edema: cystoid spaces in a thickened retina, hard exudates."""
    retina = _healthy(rng, canvas_size(size))
    centre, width = retina.fovea + rng.normal(0, 0.08), rng.uniform(0.13, 0.28)
    swelling = bell(retina.x[0] - centre, width) * rng.uniform(0.02, 0.14)
    retina.thickness[OUTER_NUCLEAR] += 0.65 * swelling
    retina.thickness[INNER_NUCLEAR] += 0.35 * swelling
    retina.thickness[:INNER_NUCLEAR] += 0.25 * swelling * rng.random()
    if rng.random() < 0.25:
        pool = np.exp(-(((retina.x[0] - retina.fovea) / rng.uniform(0.1, 0.2)) ** 4))
        retina.thickness[SUBRETINAL] += rng.uniform(0.015, 0.045) * pool
    cysts = _cysts(rng, retina, int(rng.integers(5, 26)), spread=0.8 * width)
    exudates = _exudates(rng, retina, int(rng.integers(0, 9)))
    return _scan(rng, retina, size, cysts=cysts, exudates=exudates)


def paint_drusen(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Drusen: deposits lift the unbroken RPE into bumps above a straight Bruch's membrane."""
    retina = _healthy(rng, canvas_size(size))
    x = retina.x[0]
    count = int(rng.integers(3, 12))
    lifted = np.zeros_like(x)
    for centre in rng.uniform(0.08, 0.92, count):
        width, height = rng.uniform(0.025, 0.075), rng.uniform(0.014, 0.044)
        bump = height * np.clip(1 - ((x - centre) / width) ** 2, 0, None) ** 0.8
        lifted = np.maximum(lifted, bump) + 0.15 * np.minimum(lifted, bump)
    retina.thickness[SUB_RPE] += lifted
    retina.echo[SUB_RPE] = rng.uniform(0.22, 0.42) + 0.06 * smooth_texture(rng, retina.side, (20, 20))
    _drape(retina, lifted)
    return _scan(rng, retina, size)


PAINTERS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float32]]] = {
    "choroidal neovascularization": paint_neovascular,
    "normal": paint_normal,
    "diabetic macular edema": paint_edema,
    "drusen": paint_drusen,
}


def _healthy(rng: np.random.Generator, side: int) -> Retina:
    x, y = unit_axes(side)
    fovea = 0.5 + rng.normal(0, 0.07)
    level, tilt = rng.uniform(0.55, 0.74), rng.normal(0, 0.1)
    curve = rng.uniform(-0.12, 0.25)
    membrane = level + tilt * (x - 0.5) - curve * (x - fovea) ** 2 + 0.004 * smooth_curve(rng, side, 4)
    pit = rng.uniform(0.75, 1.0) * bell(x - fovea, rng.uniform(0.07, 0.12))
    scale = rng.uniform(0.85, 1.2)
    count = len(COMPARTMENTS)
    beside, left, echoes = (np.array(values)[:, None] for values in list(zip(*COMPARTMENTS, strict=True))[1:])
    wavy = resample(rng.standard_normal((count, 7), dtype=np.float32), (count, side))
    thickness = beside * scale * rng.uniform(0.88, 1.12, (count, 1)) * (1 + (left - 1) * pit) * (1 + 0.03 * wavy)
    # The nerve fibre layer is thicker towards the optic disc, on either side.
    thickness[0] *= (1 + rng.uniform(-1.2, 1.2) * (x - fovea))[0]
    thickness = thickness.astype(np.float32)
    echo = list(echoes[:, 0] * rng.uniform(0.93, 1.07, count))
    return Retina(x=x, y=y, fovea=fovea, membrane=membrane, thickness=np.clip(thickness, 0, None), echo=echo)


def _drape(retina: Retina, lifted: NDArray[np.float32]) -> None:
    """Let the outer nuclear layer take up a lift from below, so that the inner surface stays smooth."""
    nuclear = retina.thickness[OUTER_NUCLEAR]
    retina.thickness[OUTER_NUCLEAR] = nuclear - 0.8 * nuclear * (1 - np.exp(-lifted / (0.8 * nuclear + 1e-4)))


def _cysts(rng: np.random.Generator, retina: Retina, tries: int, *, spread: float) -> Field:
    """Dark ovals in the nuclear layers: 1 inside, 0 outside, float32 [side, side]."""
    wobble_x = 0.15 * smooth_texture(rng, retina.side, (16, 16))
    wobble_y = 0.15 * smooth_texture(rng, retina.side, (16, 16))
    opened = np.zeros((retina.side, retina.side), np.float32)
    placed: dict[int, list[tuple[float, float]]] = {INNER_NUCLEAR: [], OUTER_NUCLEAR: []}
    for _ in range(tries):
        layer = int(rng.choice([INNER_NUCLEAR, OUTER_NUCLEAR], p=[0.35, 0.65]))
        centre = np.clip(retina.fovea + rng.normal(0, spread), 0.05, 0.95)
        column = int(centre * retina.side)
        room = retina.thickness[layer, column]
        middle = retina.top(layer)[0, column] + room * rng.uniform(0.42, 0.58)
        down = np.clip(room * rng.uniform(0.36, 0.56), 0.013, 0.09)
        across = down * rng.uniform(0.5, 1.2)
        # A thin septum of tissue stays between neighbours.
        if any(abs(centre - other) < 0.95 * (across + reach) for other, reach in placed[layer]):
            continue
        placed[layer].append((centre, across))
        across_x, down_y = (retina.x - centre) / across + wobble_x, (retina.y - middle) / down + wobble_y
        opened = np.maximum(opened, step(1 - (across_x * across_x + down_y * down_y), 0.4))
    return opened


def _exudates(rng: np.random.Generator, retina: Retina, count: int) -> Field:
    """Bright lipid spots in the outer retina, float32 [side, side]."""
    spots = np.zeros((retina.side, retina.side), np.float32)
    for _ in range(count):
        centre = np.clip(retina.fovea + rng.normal(0, 0.2), 0.03, 0.97)
        column = int(centre * retina.side)
        depth = retina.top(INNER_NUCLEAR + 1)[0, column] + rng.uniform(-0.02, 0.03)
        gap = ((retina.x - centre) ** 2 + (1.4 * (retina.y - depth)) ** 2) / rng.uniform(0.006, 0.014) ** 2
        spots = np.maximum(spots, np.exp(-gap))
    return spots


def _scan(
    rng: np.random.Generator,
    retina: Retina,
    size: int,
    *,
    cysts: Field | None = None,
    exudates: Field | None = None,
    shadow: Field | None = None,
) -> NDArray[np.float32]:
    side, x, y = retina.side, retina.x, retina.y
    blur = np.float32(0.006)
    bounds = [retina.top(layer) for layer in range(len(COMPARTMENTS))] + [retina.membrane]
    image = np.zeros((side, side), np.float32) + 0.045
    for layer, echo in enumerate(retina.echo):
        inside = np.clip((y - bounds[layer]) / blur + 0.5, 0, 1) * np.clip((bounds[layer + 1] - y) / blur + 0.5, 0, 1)
        # Compartments thinner than the transition must not add light.
        inside = np.minimum(inside, np.clip((bounds[layer + 1] - bounds[layer]) / blur, 0, 1))
        image = image + inside * (echo - 0.045)

    fibres = 0.07 * smooth_texture(rng, side, (30, 8)) * step(y - bounds[0], 0.02)
    if cysts is not None:
        image = image + (FLUID - image) * 0.93 * cysts
    if exudates is not None:
        image = np.maximum(image, 0.95 * exudates)

    under = np.clip(y - retina.membrane, 0, None)
    vessels = smooth_texture(rng, side, (16, 12))
    choroid = (0.52 + 0.11 * vessels) * np.exp(-under / rng.uniform(0.07, 0.16))
    choroid = choroid * (1 - 0.5 * bell(vessels + 0.9, 0.35))
    sclera = rng.uniform(0.0, 0.14) * bell(under - rng.uniform(0.16, 0.22), 0.035)
    image = image + step(y - retina.membrane, 0.008) * (choroid + sclera)

    # Bruch's membrane shows as a thin line of its own only where something lifts the RPE off it.
    lifted = step(retina.thickness[SUB_RPE] - 0.012, 0.012)[None]
    image = image + 0.22 * lifted * bell(y - retina.membrane, 0.0035)

    shade = np.ones((1, side), np.float32)
    for _ in range(int(rng.integers(0, 4))):
        shade = shade * (1 - rng.uniform(0.15, 0.5) * bell(x - rng.uniform(0, 1), rng.uniform(0.006, 0.015)))
    # Vessels and opaque lesions shade what lies under them.
    deep = step(y - bounds[INNER_NUCLEAR], 0.03)
    image = image * (1 - deep * (1 - shade))
    if shadow is not None:
        image = image * (1 + step(y - retina.membrane, 0.02) * shadow[None])
    if rng.random() < 0.3:
        gap = rng.uniform(0.01, 0.05) + rng.uniform(0.0, 0.5) * (x - retina.fovea) ** 2
        hyaloid = gaussian_filter1d(bounds[0], 0.06 * side) - gap
        image = image + rng.uniform(0.1, 0.3) * bell(y - hyaloid, 0.006)

    falloff = 1 - rng.uniform(0, 0.35) * np.abs(x - rng.uniform(0.3, 0.7))
    image = image * (1 + fibres) * falloff
    grain = 0.5 * speckle(rng, side, (72, 54)) + 0.5 * speckle(rng, side, (150, 110))
    image = image * (0.5 + 0.5 * grain) + 0.03 * np.clip(grain[::-1] - 0.7, 0, None)
    return finish_gray(image, size)
