"""Where in the frequency spectrum an image's energy lies, by the discrete cosine transform."""

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn


def dct_power(images: NDArray) -> NDArray[np.float64]:
    """Mean squared DCT coefficient per frequency.

    Parameters
    ----------
    images : float [n, H, W]
        Gray images in [0, 1] units; the transform is orthonormal, so white noise of standard
        deviation sigma has power sigma^2 at every frequency.

    Returns
    -------
    float64 [H, W]
        Row and column are the vertical and horizontal frequency in half cycles per image.
    """
    return np.mean(dctn(np.asarray(images, np.float64), axes=(1, 2), norm="ortho") ** 2, axis=0)


def radial_profile(power: NDArray, *, n_bins: int = 24) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average a DCT power map over rings of equal frequency.

    Parameters
    ----------
    power : float [H, W]
        As `dct_power` returns it.
    n_bins : int
        Number of rings; rings without a coefficient are left out.

    Returns
    -------
    frequency : float64 [m]
        Ring centre as a fraction of the Nyquist frequency, 0 to sqrt(2) (the corner).
    mean_power : float64 [m]
    """
    rows, columns = (np.arange(side) / side for side in power.shape)
    radius = np.hypot(rows[:, None], columns[None, :])
    edges = np.linspace(0, np.sqrt(2), n_bins + 1)
    ring = np.clip(np.digitize(radius.ravel(), edges) - 1, 0, n_bins - 1)
    count = np.bincount(ring, minlength=n_bins)
    total = np.bincount(ring, power.ravel(), n_bins)
    filled = count > 0
    return ((edges[:-1] + edges[1:]) / 2)[filled], total[filled] / count[filled]
