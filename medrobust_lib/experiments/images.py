"""The per-image table of a run: which images come first, and small pictures of them."""

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from medrobust_lib.files import parsed, whole_file

NO_THUMBNAILS_VARIABLE = "MEDROBUST_NO_THUMBNAILS"
SHOWN_IMAGES = 500  # on a page; the rest stays in the table
THUMBNAIL_SIDE = 96  # pixels at most
IMAGE_COLUMNS = ("file", "label", "class_name", "predicted", "predicted_name")


def check_image_table(table: pd.DataFrame, images: Sequence[NDArray[np.uint8]] | None) -> None:
    """Refuse what the page of images could not show, or should not.

    Raises
    ------
    ValueError
        Columns are missing, a file is an absolute path, or there is not one image for each row.
    """
    if missing := [name for name in IMAGE_COLUMNS if name not in table]:
        raise ValueError(
            f"a table of images lacks {', '.join(missing)}; it needs {', '.join(IMAGE_COLUMNS)}, "
            "as `data.image_table` and `certify_dataset` give them"
        )
    for file in table["file"].astype(str):
        if PurePosixPath(file).is_absolute() or PureWindowsPath(file).is_absolute():
            raise ValueError(f"file {file!r} of a table of images is an absolute path; give it relative to the data")
    if images is not None and len(images) != len(table):
        raise ValueError(
            f"{len(images)} images for a table of {len(table)} rows; give one for each row, in the order of the rows"
        )


def read_image_table(path: Path) -> pd.DataFrame:
    """Read a per-image table of a card; ValueError where it is none."""
    with parsed(f"{path} is no table of single images", "Run the notebook again."):
        kinds = dict.fromkeys(("file", "patient", "class_name", "predicted_name"), str)
        kinds |= {"label": int, "predicted": int}
        empty = {name: [""] for name in ("radius", "confidence")}
        # A class may be called NA.
        table = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=empty)
        check_image_table(table, None)
        worst_first(table)  # has numbers where it needs them
    return table


def worst_first(table: pd.DataFrame) -> NDArray[np.int64]:
    """Positions of the rows of a per-image table, those that need a look first.

    Wrong ones, the largest radius and then the highest confidence first; then those without an answer; then right
    ones, the smallest radius and then the lowest confidence first. What ties keeps its order.

    Parameters
    ----------
    table : DataFrame
        With columns label and predicted (-1: abstain), and radius and confidence where known.

    Returns
    -------
    int64 [n]
    """
    abstained, wrong = table["predicted"] == -1, table["predicted"] != table["label"]
    group = np.select([abstained, wrong], [1, 0], 2)
    sign = np.where(group == 0, -1.0, 1.0)
    # Where there is no radius, or no confidence, the other alone decides.
    known = table.reindex(columns=["confidence", "radius"]).astype(float).fillna(0.0)
    return np.lexsort((sign * known["confidence"], sign * known["radius"], group))


def write_thumbnails(folder: Path, table: pd.DataFrame, images: Sequence[NDArray[np.uint8]] | None) -> None:
    """Replace a folder by small PNGs of the images uint8 [H, W, 3] that a page shows of a table, the aspect kept.

    They are named by their row: the name of a source may tell who the patient is.
    """
    if folder.exists():
        shutil.rmtree(folder)
    for row in () if images is None else worst_first(table)[:SHOWN_IMAGES]:
        small = Image.fromarray(np.asarray(images[row]))
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        with whole_file(folder / f"{row}.png") as partial:
            small.save(partial, format="png")
