import pytest
import torch

from medrobust_lib.evaluation import projected_gradient

SHAPE = (3, 8, 8)


def random_image(seed, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weights():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))


def linear(weights):
    return lambda pixels: (pixels * weights).sum(dim=(1, 2, 3))


def distances(found, clean):
    return (found - clean).flatten(-3).norm(dim=-1)


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.4])
def test_a_linear_objective_has_its_best_point_along_its_gradient(weights, radius):
    image = random_image(0, 0.45, 0.55)
    found = projected_gradient(linear(weights), image, radius=radius)
    torch.testing.assert_close(found, image + radius * weights / weights.norm(), atol=1e-5, rtol=0)


def best_in_ball_and_box(weights, image, radius):
    """Maximum of w.x: x = clip(image + t w, 0, 1), where t puts it on the sphere; by bisection."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        point = (image + middle * weights).clamp(0, 1)
        low, high = (middle, high) if (point - image).norm() < radius else (low, middle)
    return (image + low * weights).clamp(0, 1)


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_in_the_box_a_linear_objective_comes_near_its_maximum(weights, radius):
    image = random_image(1)
    objective = linear(weights)
    best = float(objective(best_in_ball_and_box(weights, image, radius)[None]))
    clean = float(objective(image[None]))
    found = float(objective(projected_gradient(objective, image, radius=radius, steps=100)[None]))
    assert clean + 0.98 * (best - clean) < found <= best + 1e-4


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("radius", [0.05, 0.7, 3.0, 100.0])
def test_the_point_lies_in_the_ball_and_in_the_box(weights, radius, seed):
    images = torch.stack([random_image(0), torch.zeros(SHAPE), torch.ones(SHAPE)])

    def curved(pixels):
        return (linear(weights)(pixels) * 3).sin() + (pixels - 0.3).pow(2).sum(dim=(1, 2, 3))

    found = projected_gradient(curved, images, radius=radius, steps=15, step_size=radius, seed=seed)
    assert found.shape == images.shape
    assert (distances(found, images) <= radius * (1 + 1e-5)).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_best_point_met_is_returned_not_the_last(weights):
    image = random_image(2, 0.4, 0.6)
    values = []

    def recorded(pixels):
        value = -(linear(weights)(pixels) - linear(weights)(image[None]) - 0.5).abs()
        values.append(float(value.detach()))
        return value

    found = projected_gradient(recorded, image, radius=1.0, steps=7, step_size=0.9)
    assert len(values) == 8
    assert values[-1] < max(values), "the steps are far too long, so the last point is not the best"
    assert float(recorded(found[None])) == pytest.approx(max(values[:8]), abs=1e-5)


def test_a_best_point_inside_the_ball_is_found_there(weights):
    image = random_image(6, 0.4, 0.6)
    best = image + 0.2 * weights / weights.norm()
    found = projected_gradient(lambda x: -(x - best).pow(2).sum(dim=(1, 2, 3)), image, radius=0.5, steps=100)
    assert float(distances(found, best)) < 2.5 * 0.5 / 100  # the length of a step


def test_an_image_that_cannot_be_improved_is_returned_itself():
    image = random_image(3)
    found = projected_gradient(lambda pixels: -(pixels - image).pow(2).sum(dim=(1, 2, 3)), image, radius=0.5)
    assert torch.equal(found, image)
    flat = projected_gradient(lambda pixels: 0 * pixels.sum(dim=(1, 2, 3)), image, radius=0.5)
    assert torch.equal(flat, image)


@pytest.mark.parametrize("seed", [None, 5])
def test_images_together_are_what_each_is_alone(weights, seed):
    images = torch.stack([random_image(number) for number in range(3)])

    def objective(pixels):
        return (linear(weights)(pixels) / 5).tanh()

    together = projected_gradient(objective, images, radius=0.5, steps=10, seed=seed)
    if seed is None:
        alone = torch.stack([projected_gradient(objective, image, radius=0.5, steps=10) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    else:
        first = projected_gradient(objective, images[:1], radius=0.5, steps=10, seed=seed)
        torch.testing.assert_close(together[:1], first, atol=1e-5, rtol=0)
    # One image improves little and another much, so each keeps its own best point.
    assert (objective(together) > objective(images)).all()


def test_a_random_start_is_reproducible_and_leaves_the_image(weights):
    image, starts = random_image(4), []

    def recorded(pixels):
        starts.append(pixels.detach().clone()[0])
        return linear(weights)(pixels).tanh()

    state = torch.get_rng_state()
    runs = [projected_gradient(recorded, image, radius=0.4, steps=3, seed=seed) for seed in (1, 1, 2, None)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(runs[0], runs[1])
    first, again, other, plain = starts[::4]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(plain, image)
    inside = random_image(4, 0.4, 0.6)
    starts.clear()
    projected_gradient(recorded, inside, radius=0.4, seed=1)
    assert float(distances(starts[0], inside)) == pytest.approx(0.4, abs=1e-5)


def test_precision_and_gradient_mode_are_the_callers(weights):
    image = random_image(5, 0.4, 0.6)
    single = projected_gradient(linear(weights), image, radius=0.3)
    double = projected_gradient(linear(weights.double()), image.double(), radius=0.3)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert torch.equal(projected_gradient(linear(weights), image, radius=0.3), single)
    asked = image.clone().requires_grad_(True)
    found = projected_gradient(linear(weights), asked, radius=0.3)
    assert not found.requires_grad
    assert asked.grad is None


@pytest.mark.parametrize(
    "values", [{"radius": 0}, {"radius": -1}, {"radius": float("inf")}, {"radius": float("nan")}, {"steps": 0}]
)
def test_numbers_out_of_range_are_named(weights, values):
    message = "".join(f"{name}={value}.*" for name, value in values.items())
    with pytest.raises(ValueError, match=f"{message}: an attack needs a radius above 0 and at least one step"):
        projected_gradient(linear(weights), random_image(0), **{"radius": 0.5, "steps": 5, **values})


def test_an_objective_has_one_value_for_each_image(weights):
    with pytest.raises(ValueError, match=r"the objective returned \(\) for 2 images, not one value each"):
        projected_gradient(lambda pixels: (pixels * weights).sum(), torch.stack([random_image(0)] * 2), radius=1)


def test_an_objective_that_is_not_finite_is_no_failed_attack():
    with pytest.raises(ValueError, match=r"step 0: the objective is \[nan, nan\]"):
        projected_gradient(lambda images: images.flatten(1).sum(1) * torch.nan, torch.rand(2, 3, 4, 4), radius=0.5)
