import pytest

from medrobust_lib.corruptions import MEDIMETA_C, MEDMNIST_C, SUITES
from medrobust_lib.corruptions.suites import check_severity, find_suite


def test_medimeta_c_has_the_seven_of_the_papers_tables_and_jpeg_beside_them():
    seven = "gaussian_noise impulse_noise motion_blur zoom_blur brightness contrast pixelate"
    assert " ".join(MEDIMETA_C.corruptions) == seven
    assert MEDIMETA_C.names("phantom/oct") == MEDIMETA_C.corruptions
    assert MEDIMETA_C.extra == ("jpeg_compression",)


def test_medmnist_c_has_the_official_list_of_each_data_set_in_order():
    first = ("pixelate", "jpeg_compression")
    lists = {
        "blood": "defocus_blur motion_blur brightness_up brightness_down contrast_up contrast_down saturate "
        "stain_deposit bubble",
        "breast": "speckle_noise motion_blur brightness_up brightness_down contrast_down",
        "pneumonia": "gaussian_noise speckle_noise impulse_noise shot_noise gaussian_blur brightness_up "
        "brightness_down contrast_up contrast_down gamma_corr_up gamma_corr_down",
        "retina": "gaussian_noise speckle_noise defocus_blur motion_blur brightness_down contrast_down",
        "oct": "speckle_noise defocus_blur motion_blur contrast_down",
    }
    assert {family: MEDMNIST_C.names(family) for family in MEDMNIST_C.families} == {
        family: (*first, *names.split()) for family, names in lists.items()
    }
    assert set(MEDMNIST_C.corruptions) == {name for family in lists for name in MEDMNIST_C.names(family)}
    assert len(MEDMNIST_C.corruptions) == len(set(MEDMNIST_C.corruptions))


@pytest.mark.parametrize(
    ("dataset", "name", "severity", "expected"),
    [
        ("blood", "pixelate", 1, {"factor": 0.6}),
        ("blood", "motion_blur", 4, {"radius": 10, "sigma": 7}),
        ("breast", "brightness_up", 5, {"factor": 2.0}),
        ("breast", "motion_blur", 3, {"radius": 9, "sigma": 10}),
        ("pneumonia", "shot_noise", 3, {"photons": 150}),
        ("pneumonia", "impulse_noise", 5, {"amount": 0.02}),
        ("pneumonia", "gamma_corr_down", 5, {"exponent": 0.4}),
        ("retina", "defocus_blur", 2, {"radius": 5, "edge_sigma": 0.2}),
        ("retina", "jpeg_compression", 5, {"quality": 5}),
        ("oct", "speckle_noise", 5, {"sigma": 0.6}),
        ("oct", "defocus_blur", 1, {"radius": 0.5, "edge_sigma": 0.6}),
        ("oct", "contrast_down", 5, {"factor": 0.15}),
    ],
)
def test_parameters_are_those_of_the_official_registry(dataset, name, severity, expected):
    assert dict(MEDMNIST_C.corruption(name, dataset=dataset).severities[severity - 1]) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gaussian_noise", {"sigma": 0.38}),
        ("impulse_noise", {"amount": 0.27}),
        ("motion_blur", {"radius": 20, "sigma": 15}),
        ("brightness", {"added": 0.5}),
        ("contrast", {"factor": 0.05}),
        ("pixelate", {"factor": 0.25}),
        ("jpeg_compression", {"quality": 7}),
    ],
)
def test_parameters_are_imagenet_cs(name, expected):
    assert dict(MEDIMETA_C.corruption(name).severities[4]) == expected


def test_zoom_factors_are_counted_as_the_public_implementation_does():
    rows = MEDIMETA_C.corruption("zoom_blur").severities
    assert [(len(row["factors"]), row["factors"][-1]) for row in rows] == [
        *((12, 1.11), (16, 1.1500000000000001), (11, 1.2000000000000002), (13, 1.2400000000000002)),
        (11, 1.3000000000000003),
    ]
    assert all(list(row) == ["factors"] and isinstance(row["factors"], tuple) for row in rows)


def test_every_corruption_has_five_severities_and_cannot_be_changed():
    for suite in SUITES.values():
        for rows in suite.families.values():
            assert all(len(corruption.severities) == 5 for corruption in rows)
    with pytest.raises(TypeError):
        MEDIMETA_C.corruption("contrast").severities[0]["factor"] = 1
    with pytest.raises(TypeError):
        SUITES["mine"] = MEDIMETA_C
    with pytest.raises(TypeError):
        MEDMNIST_C.family_of["mine"] = "blood"


def test_a_suite_is_found_by_its_id_or_is_one():
    assert find_suite("medimeta-c") is find_suite(MEDIMETA_C) is MEDIMETA_C
    with pytest.raises(ValueError, match="unknown suite 'imagenet-c'; choose one of medimeta-c, medmnist-c"):
        find_suite("imagenet-c")
    assert MEDMNIST_C.family("medimeta/fundus") == "retina"
    assert MEDMNIST_C.family("phantom/blood-site-a") == "blood"
    assert check_severity(0) == 0
