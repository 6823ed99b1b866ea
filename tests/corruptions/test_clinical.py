"""The suite clinical-c: physics of each corruption on images whose answer is known, and the calibrated table."""

import tomllib
from functools import partial
from importlib.resources import files

import numpy as np
import pytest

import calibrate_clinical as calibration
from medrobust_lib.corruptions import CLINICAL_C, corrupt, optics, radiology
from medrobust_lib.corruptions.suites import corrupted
from medrobust_lib.data.registry import DATASETS, load_dataset

ALL = [(family, name) for family in CLINICAL_C.families for name in CLINICAL_C.names(family)]
TABLE = tomllib.loads(files("medrobust_lib.corruptions").joinpath("clinical.toml").read_text(encoding="utf-8"))
SIZE = 96


def flat(level, channels=1, size=SIZE):
    return np.full((size, size, channels)[: 2 + (channels > 1)], level, np.uint8)


def generator(seed=0):
    return np.random.default_rng(seed)


# ---- the table ----


def test_the_table_is_what_the_script_searches():
    assert {family: (*searches,) for family, (_, searches) in calibration.FAMILIES.items()} == {
        family: CLINICAL_C.names(family) for family in CLINICAL_C.families
    }
    for heading in ("similarity", "similarity_at_224"):
        assert {family: (*rows,) for family, rows in TABLE[heading].items()} == {
            family: CLINICAL_C.names(family) for family in CLINICAL_C.families
        }


@pytest.mark.parametrize(("family", "name"), ALL)
def test_severities_reach_their_similarity_or_go_to_the_limit(family, name):
    search, reached = calibration.FAMILIES[family][1][name], TABLE["similarity"][family][name]
    values = [row[search.parameter] for row in CLINICAL_C.corruption(name, dataset=family).severities]
    assert (np.diff(values) * (search.strong - search.mild) > 0).all()
    assert (np.diff(reached) < 0).all()
    missed = [abs(one - target) > 0.01 for one, target in zip(reached, calibration.TARGETS, strict=True)]
    assert missed == sorted(missed)  # once a target is out of reach, those behind it are
    assert (
        values[-1] == search.strong if missed[-1] else reached[-1] == pytest.approx(calibration.TARGETS[-1], abs=0.01)
    )


@pytest.mark.parametrize(
    ("family", "name", "severity"),
    [
        ("radiograph", "quantum_noise", 2),
        ("radiograph", "collimator_edge", 4),
        ("ultrasound", "speckle", 1),
        ("oct", "axial_shift", 5),
        ("oct", "weak_signal", 3),
        ("fundus", "cataract_haze", 2),
        ("histology", "stain_shift", 5),
        ("blood", "pen_mark", 3),
    ],
)
def test_the_table_comes_out_again(family, name, severity):
    make = partial(corrupted, name=name, severity=severity, suite="clinical-c")
    found = calibration.mean_similarity(calibration.reference_sets(family), lambda data: make(data).images)
    assert found == pytest.approx(TABLE["similarity"][family][name][severity - 1], abs=0.005)


def test_a_search_finds_what_is_in_the_table(monkeypatch):
    monkeypatch.setattr(calibration, "STEPS", 8)
    found = calibration.calibrated("oct", "lateral_defocus", calibration.OCT["lateral_defocus"])
    expected = [row["sigma"] for row in CLINICAL_C.corruption("lateral_defocus", dataset="oct").severities]
    np.testing.assert_allclose([value for value, _ in found], expected, rtol=0.05)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_other_images_get_worse_with_severity(family, name):
    data = load_dataset(f"phantom/{calibration.FAMILIES[family][0]}", n=12)
    far = [
        calibration.mean_similarity(
            [data], lambda data, s=severity: corrupted(data, name, severity=s, suite="clinical-c").images
        )
        for severity in (0, 1, 3, 5)
    ]
    assert far[0] == 1
    assert (np.diff(far) < 0.01).all() and far[1] < 0.999 and far[3] < far[1] - 0.03, far


def test_similarity_is_that_of_wang_and_others():
    image = generator().integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert calibration.similarity(image, image) == 1
    expected = (2 * 100 * 150 + 2.55**2) / (100**2 + 150**2 + 2.55**2)
    assert calibration.similarity(flat(100, 3), flat(150, 3)) == pytest.approx(expected, abs=1e-9)
    assert calibration.similarity(image, 255 - image) < -0.5


# ---- the families ----


def test_every_registered_data_set_has_the_family_of_its_modality():
    words = {
        "X-ray": "radiograph", "mammography": "radiograph", "ultrasound": "ultrasound", "OCT": "oct",
        "fundus": "fundus", "histology": "histology", "blood": "blood",
    }  # fmt: skip
    for row in DATASETS.values():
        assert CLINICAL_C.family(row.id) == next(family for word, family in words.items() if word in row.modality)


def test_own_images_are_refused_with_the_families():
    with pytest.raises(ValueError, match="none for 'folder:mine'; it knows radiograph, ultrasound, oct, fundus"):
        CLINICAL_C.names("folder:mine")
    with pytest.raises(ValueError, match=r"unknown corruption 'pen_mrk' in suite clinical-c for blood.*'pen_mark'\?"):
        CLINICAL_C.corruption("pen_mrk", dataset="medmnist/blood")
    with pytest.raises(ValueError, match="unknown corruption 'tissue_fold' in suite clinical-c for blood"):
        CLINICAL_C.corruption("tissue_fold", dataset="phantom/blood")


# ---- every corruption ----


@pytest.mark.parametrize(("family", "name"), ALL)
def test_the_same_address_gives_the_same_image_of_any_size(family, name):
    modality = calibration.FAMILIES[family][0]
    for size in (28, 61, SIZE):
        data = load_dataset(f"phantom/{modality}", n=2, image_size=size)
        options = {"severity": 4, "suite": "clinical-c", "dataset": data.id}
        both = corrupt(data.images, name, **options)
        assert both.shape == data.images.shape and both.dtype == np.uint8
        assert (both != data.images).any((1, 2, 3)).all()
        again = corrupt(data.images[1], name, indices=[1], **options)
        np.testing.assert_array_equal(again, both[1])
        if CLINICAL_C.corruption(name, dataset=family).random:
            other = corrupt(data.images[1], name, indices=[2], **options)
            assert (other != both[1]).any()


@pytest.mark.parametrize(("family", "name"), ALL)
def test_gray_stays_gray(family, name, gray):
    image = gray[:64, :64]
    one = corrupt(image, name, severity=3, suite="clinical-c", dataset=family)
    three = corrupt(np.repeat(image[..., None], 3, axis=2), name, severity=3, suite="clinical-c", dataset=family)
    if family in CLINICAL_C.gray:
        np.testing.assert_array_equal(three, np.repeat(one[..., None], 3, axis=2))
    elif family == "fundus":
        assert (three == three[..., :1]).all()


@pytest.mark.parametrize(("family", "name"), ALL)
@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_images_are_no_accident(family, name, level):
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        for severity in (1, 5):
            corrupt(flat(level, 3, 40), name, severity=severity, suite="clinical-c", dataset=family)


# ---- physics ----


def test_quantum_noise_is_that_of_the_dose_and_largest_in_white():
    def spread(level, dose):
        return radiology.quantum_noise(flat(level), dose=dose, rng=generator()).std() / 255

    for level in (60, 130):
        photons = 0.01 * 20_000 * 10 ** (-1.5 * level / 255)
        assert spread(level, 0.01) == pytest.approx(1 / (1.5 * np.log(10) * np.sqrt(photons)), rel=0.1)
    assert spread(130, 0.01) > spread(60, 0.01) > spread(60, 0.04)


def test_scatter_takes_contrast_by_the_ratio():
    image = flat(100)
    image[::2] = 110  # finer than scatter is
    contrast = np.ptp(radiology.scatter_veil(image, ratio=1).astype(int)[40:50])
    assert contrast == 5
    np.testing.assert_array_equal(radiology.scatter_veil(flat(77), ratio=3), flat(77))


def test_collimator_blades_cover_their_share_and_are_white():
    shut = radiology.collimator_edge(flat(20), share=0.25, rng=generator())
    assert (shut > 200).mean() == pytest.approx(1 - 0.75**2, abs=0.05)
    assert (shut == 20).mean() == pytest.approx(0.75**2, abs=0.05)


def test_grid_lines_are_even_and_have_their_depth():
    lined = radiology.grid_lines(flat(128), depth=0.2, rng=generator()).astype(int)
    assert np.ptp(lined) == pytest.approx(0.2 * 255, abs=4)
    assert lined.mean() == pytest.approx(128, abs=2)


def test_motion_runs_up_and_down_and_averages_exposures():
    image = flat(255)
    image[40:42] = 0  # a thin line through which much comes
    moved = radiology.patient_motion(image, length=0.2, rng=generator())
    assert (np.abs(np.argwhere(moved.min(1) < 250)[[0, -1], 0] - [31, 50]) <= 3).all()
    exposure = 10 ** (-1.5 * moved / 255)
    assert exposure.mean() == pytest.approx((10 ** (-1.5 * image / 255)).mean(), rel=0.05)


@pytest.mark.parametrize("looks", [1, 4, 16])
def test_speckle_is_gamma_distributed_intensity(looks):
    gains = [radiology.speckle(flat(100), looks=looks, rng=generator(seed)) for seed in range(4)]
    intensity = 10 ** ((np.array(gains, float) - 100) / 255 * 5)
    assert intensity.mean() == pytest.approx(1, rel=0.1)
    assert intensity.var() == pytest.approx(1 / looks, rel=0.25)
    assert (radiology.speckle(flat(0), looks=looks, rng=generator()) == 0).all()


def test_a_shadow_begins_below_a_bright_echo():
    shadowed = radiology.acoustic_shadow(flat(150), width=0.3, rng=generator()).astype(int)
    column = shadowed[:, shadowed.sum(0).argmin()]
    assert column[0] == 150 and column.max() > 200
    assert column.argmax() < 0.4 * SIZE
    assert (column[-20:] == 22).all() or (column[-20:] == 23).all()  # 25 of 50 decibels are missing
    assert (shadowed[-1] < 100).mean() == pytest.approx(0.3 * 1.25, abs=0.15)


def test_gain_moves_all_and_tgc_moves_depths():
    levels = {int(radiology.gain_error(flat(100), decibels=10, rng=generator(seed))[0, 0]) for seed in range(8)}
    assert levels == {100 - 51, 100 + 51}
    wrong = radiology.tgc_error(flat(128), decibels=2, rng=generator()).astype(int)
    assert (wrong == wrong[:, :1]).all() and len(np.unique(wrong)) > 8
    assert wrong.mean() == pytest.approx(128, abs=3)


def test_a_weak_signal_sinks_into_noise_that_stays():
    strong, weak, none = (radiology.weak_signal(flat(230), loss=loss, rng=generator()) for loss in (0.1, 10, 200))
    assert strong.mean() == pytest.approx(230, abs=1)
    assert weak.mean() == pytest.approx(230 - 51, abs=2)
    assert 10 * np.log10((10 ** (none / 51.0 - 5)).mean()) == pytest.approx(-42, abs=0.5)


def test_a_blink_is_a_stripe_of_its_width_from_top_to_bottom():
    image = np.tile(np.linspace(40, 250, SIZE).astype(np.uint8)[:, None], SIZE)
    blinked = radiology.blink_line(image, width=0.25, rng=generator())
    shut = (blinked != image).any(0)
    assert shut.mean() == pytest.approx(0.25, abs=0.05)
    assert blinked[:, shut][-20:].mean() < 90


def test_defocus_is_lateral_and_shifts_are_axial():
    layers = np.tile(np.repeat([60, 200, 120, 230], SIZE // 4).astype(np.uint8)[:, None], SIZE)
    seen = radiology.lateral_defocus(layers, sigma=0.03, rng=generator()).mean(1)
    assert seen[24:48] == pytest.approx(200 - 51 * np.log10(2), abs=0.6)  # half of the light, edges as they were
    spot = np.full_like(layers, 50)
    spot[:, 48] = 250
    assert (radiology.lateral_defocus(spot, sigma=0.03, rng=generator()) > 100).sum(1).min() > 5
    edge = np.tile(np.repeat([60, 200], SIZE // 2).astype(np.uint8)[:, None], SIZE)
    surface = (radiology.axial_shift(edge, shift=0.04, rng=generator()) < 130).sum(0)
    assert 0.02 * SIZE < surface.std() < 0.08 * SIZE  # a drift of .04 and a jump of as much
    assert np.abs(np.diff(surface)).max() >= 3 > np.median(np.abs(np.diff(surface)))
    np.testing.assert_array_equal(radiology.axial_shift(layers.T.copy(), shift=0.04, rng=generator()), layers.T)


def test_light_falls_off_and_haze_stays_in_the_field():
    lit = optics.uneven_illumination(flat(200), falloff=3, rng=generator()).astype(int)
    assert lit.max() == pytest.approx(230, abs=1)
    assert lit.min() < 60
    field = flat(0, 3)
    field[30:60, 30:60] = (180, 90, 40)
    hazy = optics.cataract_haze(field, haze=0.8).astype(int)
    assert np.ptp(hazy[40, 40]) < np.ptp(field[40, 40].astype(int)) / 2
    assert (hazy[:10] == 0).all()


def test_dust_appears_particle_by_particle():
    few, more = (optics.lens_dust(flat(100), particles=n, rng=generator()) for n in (3, 4))
    assert 0 < (few != 100).mean() < (more != 100).mean() < 0.3
    assert (optics.lens_dust(flat(100), particles=1e-9, rng=generator()) == 100).all()


def test_the_brightest_place_burns_out():
    image = flat(60, 3)
    image[20:28, 60:68] = (200, 150, 80)
    burnt = optics.overexposed_disc(image, exposure=1, rng=generator())
    assert (burnt[22:26, 62:66, :2] == 255).all()
    assert burnt[-1, 0].max() < 80


def test_stains_are_multiplied_in_density():
    rows = [optics.stain_shift(flat(200, 3), shift=0.8, rng=generator(seed))[0, 0] for seed in range(6)]
    assert len(np.unique(rows, axis=0)) == 6
    image = generator().integers(1, 256, (40, 40, 3), dtype=np.uint8)
    unchanged = optics.stain_shift(image, shift=0, rng=generator()).astype(int)
    assert np.abs(unchanged - image).max() == 0
    # Between two grays the density of a dye differs by as much as before, times what it was multiplied with.
    stains = np.array([(0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)])
    pair = np.rint(255 * 10 ** -(np.array([0.2, 0.6])[:, None] * stains[1])).astype(np.uint8)  # eosin, and more of it
    shown = optics.stain_shift(np.repeat(pair, (20, 20), axis=0)[:, None].repeat(40, 1), shift=0.4, rng=generator(1))
    amounts = -np.log10(shown[[0, -1], 0] / 255) @ np.linalg.inv(stains)
    grown = amounts[1] - amounts[0]
    assert np.exp(-0.4) < grown[1] / 0.4 < np.exp(0.4) and abs(grown[1] / 0.4 - 1) > 0.02
    assert grown[[0, 2]] == pytest.approx([0, 0], abs=0.03)


def test_focus_spreads_a_point_over_a_disk_and_keeps_the_light():
    image = flat(0, 3)
    image[48, 48] = 255
    seen = optics.out_of_focus(image, radius=4 / SIZE)[..., 0]
    away = np.hypot(*(np.mgrid[:SIZE, :SIZE] - 48))
    assert (seen[away <= 4] == seen.max()).all() and (seen[away >= 5] == 0).all()  # the edge is one pixel soft
    np.testing.assert_array_equal(optics.out_of_focus(flat(131, 3), radius=0.1), flat(131, 3))


def test_folds_add_densities_and_pens_add_ink():
    folded = optics.tissue_fold(flat(128, 3), width=0.2, rng=generator())
    twice = 255 * (128 / 255) ** 2 * 10**-0.1
    assert folded.min() == pytest.approx(twice, abs=1.5)
    assert (folded < 100).mean() == pytest.approx(0.2, abs=0.1)
    marked = optics.pen_mark(flat(230, 3), width=0.2, rng=generator())
    assert (marked <= 230).all()
    assert (marked.min(2) < 150).mean() == pytest.approx(0.2, abs=0.1)


def test_a_bubble_has_a_dark_rim_and_a_pale_inside():
    image = flat(100, 3)
    bubble = optics.mounting_bubble(image, radius=0.2, rng=generator())[..., 0]
    assert (bubble > 130).mean() == pytest.approx(np.pi * 0.2**2, abs=0.03)
    assert 0 < (bubble < 90).mean() < 0.1


def test_stripes_are_constant_along_the_stage():
    striped = optics.scanner_stripe(flat(128, 3), depth=0.1, rng=generator()).astype(int)
    assert (striped == striped[:1]).all() or (striped == striped[:, :1]).all()
    assert np.log(striped / 128).std() == pytest.approx(0.1, rel=0.5)
