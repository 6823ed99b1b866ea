"""Images of a split, decoded once into a file that training reads a batch at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.data.decoding import fit_square
from medrobust_lib.data.registry import OpenSplit
from medrobust_lib.experiments import progress


@dataclass(frozen=True)
class DecodedImages:
    """What training asks of an `ImageDataset`, without its labels and with the images in a file.

    Attributes
    ----------
    id, split : str
    classes, templates : tuple of str
    path : Path
        Of a NumPy file, uint8 [n, S, S, 3].
    """

    id: str
    split: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    path: Path

    @property
    def images(self) -> NDArray[np.uint8]:
        """All images, uint8 [n, S, S, 3]: mapped anew each time, so that memory holds what was asked for only."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.images)


def decoded(split: OpenSplit, positions: NDArray[np.int64], *, image_size: int, path: Path) -> DecodedImages:
    """Decode images at ascending positions into a file, one at a time, unless it is there already.

    Parameters
    ----------
    split : OpenSplit
    positions : int64 [n]
    image_size : int
        S, to which images are brought as `load_dataset` does.
    path : Path
        Stands there when all images are in it.
    """
    if not path.is_file():
        # A name of its own, not one of the process: what a killed run leaves is written over, not left behind.
        part = path.with_suffix(".part")
        shape = (len(positions), image_size, image_size, 3)
        images = progress(
            split.listed.read(positions), total=len(positions), description=f"decode {split.row.id}", unit="images",
            resumes=False,
        )  # fmt: skip
        with part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image in images:
                file.write(fit_square(image, image_size, fit=split.fit).tobytes())
        part.replace(path)
    return DecodedImages(split.row.id, split.listed.split, split.classes, split.words.templates, path)
