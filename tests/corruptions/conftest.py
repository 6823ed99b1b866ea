import numpy as np
import pytest
from scipy.ndimage import gaussian_filter


def textured(height, width, *, seed=0, channels=3):
    """Coarse and fine structure over the whole range of grey levels, coloured."""
    rng = np.random.default_rng(seed)
    coarse, fine = (
        gaussian_filter(rng.normal(size=(height, width, channels)), (s, s, 0), mode="reflect") * s for s in (5, 1)
    )
    return np.clip(128 + 220 * coarse + 60 * fine, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def pictures():
    """Six textured RGB images of 64 x 64."""
    return np.stack([textured(64, 64, seed=seed) for seed in range(6)])


@pytest.fixture(scope="session")
def picture():
    """One textured RGB image of 224 x 224, the size the constants are meant for."""
    return textured(224, 224)


@pytest.fixture(scope="session")
def gray(picture):
    return np.ascontiguousarray(picture[..., 1])
