"""What sequential sampling saves and what it costs, exactly: no streams are simulated here."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from medrobust_lib.smoothing.bounds import minimum_draws, probability_of_radius
from medrobust_lib.smoothing.sequential import operating_characteristics, price_of_radii, sequential_plan

ALPHA, N = 0.001, 10_000
SIGMAS = (0.1, 0.25, 0.5, 1.0)
RADII = (0, 0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5)

# Probabilities p of the true class, as quantiles z = Phi^-1(p): wrong images, the contested middle, near certainty.
Z = np.concatenate([np.linspace(-3, -0.2, 15), np.arange(-0.15, 3.3, 0.06), [3.4, 3.6, 4.0, 5.0]])


def discretised(survival):
    """Weights of Z for a law given by its survival function of z."""
    edges = np.concatenate([[-np.inf], (Z[1:] + Z[:-1]) / 2, [np.inf]])
    return -np.diff([survival(edge) for edge in edges])


def published(radii, percent, *, sigma):
    """A law through certified accuracies in percent at radii, linear in z between them.

    Wrong images fall below z = 0, mostly far below; of the images certified at the last radius, half are certain.
    """
    z = [-3.0, -1.0, *(r / sigma for r in radii), radii[-1] / sigma + 1, 5.0]
    share = [1.0, (1 + percent[0] / 100) / 2, *(value / 100 for value in percent), percent[-1] / 200, percent[-1] / 200]
    return discretised(lambda value: 1.0 if value < -3 else 0.0 if value > 5 else np.interp(value, z, share))


# Table 2 of PromptSmooth: each group of radii with its accuracy at radius 0, at the sigma that can have given it.
GROUPS = (((0, 0.1, 0.25), 0.25), ((0, 0.5, 0.75), 0.5), ((0, 1.0, 1.25, 1.5), 1.0))
TABLE_2 = {
    "zero-shot": ((56.6, 49.4, 38.2), (28.9, 20.8, 17.6), (11, 11, 11, 11)),
    "CoOp": ((71.6, 66.7, 56.0), (22, 16.4, 14.2), (11, 11, 11, 11)),
    "few-shot": ((81.2, 78.2, 67.6), (75.6, 52.2, 35.6), (50.4, 26.4, 22.2, 17.6)),
    "PromptSmooth": ((82, 81.8, 81.0), (76.6, 74.8, 73.2), (54, 48.4, 47.2, 45.6)),
}
SMOOTH = {
    "collapse under noise": lambda sigma: discretised(lambda z: norm.sf(z, 1.2 - 1.5 * sigma, 1.2)),
    "a third certain, the rest wrong or contested": lambda sigma: discretised(
        lambda z: (z < 4.5) / 3 + 2 / 3 * norm.sf(z, -0.5, 1.0)
    ),
}


@pytest.fixture(scope="module")
def characteristics():
    """Per sigma, for each z: probabilities of each radius by sequential and by fixed sampling, and mean draws."""
    tables = {}
    for sigma in SIGMAS:
        plan, p = sequential_plan(sigma=sigma, radii=RADII), norm.cdf(Z)
        proved, draws = zip(*(operating_characteristics(plan, value) for value in p), strict=True)
        fixed = [probability_of_radius(p, N, ALPHA, radius=radius, sigma=sigma) for radius in plan.radii]
        tables[sigma] = np.array(proved), np.stack(fixed, axis=1), np.array(draws)
    return tables


def compare(characteristics, weights_by_sigma):
    """Largest loss of certified accuracy in points, and mean draws over the sigmas."""
    points, means = 0.0, []
    for sigma, weights in weights_by_sigma.items():
        proved, fixed, draws = characteristics[sigma]
        assert weights.sum() == pytest.approx(1)
        points = max(points, 100 * np.abs(weights @ fixed - weights @ proved).max())
        means.append(weights @ draws)
    return points, float(np.mean(means))


@pytest.mark.parametrize("law", SMOOTH)
def test_a_third_of_the_draws_for_the_same_certified_accuracy(characteristics, law):
    points, draws = compare(characteristics, {sigma: SMOOTH[law](sigma) for sigma in SIGMAS})
    assert points <= 0.3
    assert draws <= N / 3


@pytest.mark.parametrize("method", TABLE_2)
def test_a_third_of_the_draws_on_published_accuracies(characteristics, method):
    weights = {
        sigma: published(radii, percent, sigma=sigma)
        for (radii, sigma), percent in zip(GROUPS, TABLE_2[method], strict=True)
    }
    points, draws = compare(characteristics, weights)
    assert points <= 0.3
    assert draws <= N / 3


def test_wrong_images_stop_early(characteristics):
    for sigma in SIGMAS:
        _, _, draws = characteristics[sigma]
        assert draws[norm.cdf(Z) < 0.05].max() < 40
        assert draws.max() <= N


@pytest.mark.parametrize("p", [1.0, 0.995, 0.8])
def test_larger_radii_cost_more(p):
    table = price_of_radii(RADII, sigma=0.5, p=p)
    assert list(table.columns) == [
        "radius",
        "needed_probability",
        "minimum_count",
        "minimum_draws",
        "expected_draws",
        "certified",
    ]
    for column in ("radius", "needed_probability", "minimum_count", "minimum_draws"):
        assert table[column].is_monotonic_increasing
    # A radius that is out of reach adds a look, so that futility can stop a little earlier.
    assert np.all(np.diff(table["expected_draws"]) >= (0 if p == 1 else -0.02 * table["expected_draws"][:-1]))
    assert table["expected_draws"].max() <= N
    assert np.all(np.diff(table["certified"]) <= 1e-12)
    assert table["certified"].between(0, 1 + 1e-12).all()


def test_prices_of_an_image_that_never_wavers():
    table = price_of_radii([0.75, 0, 0.25], sigma=0.25).set_index("radius")
    assert table.index.tolist() == [0, 0.25, 0.75]
    assert table["minimum_count"].tolist() == [5156, 8526, 9997]
    assert table["minimum_draws"].tolist() == [10, 40, 5114]
    assert np.all(table["expected_draws"] >= table["minimum_draws"])
    assert table["expected_draws"].iloc[0] == 12
    np.testing.assert_allclose(table["certified"], 1)


def test_prices_of_radii_that_cannot_be_had():
    table = price_of_radii(RADII, sigma=0.1).set_index("radius")
    beyond = table.loc[[0.5, 0.75, 1.0, 1.25, 1.5]]
    np.testing.assert_array_equal(beyond["expected_draws"], N)
    np.testing.assert_array_equal(beyond["certified"], 0)
    np.testing.assert_array_equal(beyond["minimum_count"], N + 1)
    assert table["minimum_draws"].loc[0.5] == minimum_draws(ALPHA, radius=5, sigma=1)
    assert math.isinf(table["minimum_draws"].loc[1.5])
