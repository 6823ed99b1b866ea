"""Read arrays out of an npz file: never a pickle, never more memory than the file itself vouches for."""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.data.decoding import check_pixels
from medrobust_lib.files import parsed

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def member_names_of(archive: zipfile.ZipFile) -> tuple[str, ...]:
    """Names of the arrays, without the ending of the files that hold them."""
    return tuple(name.removesuffix(".npy") for name in archive.namelist())


def member_header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], int]:
    """Shape of a uint8 member and the byte at which its values begin."""
    shape, fortran_order, dtype, offset = _header(archive, member)
    if fortran_order or dtype != np.uint8:
        raise ValueError(f"{member} is {dtype}{' in Fortran order' * fortran_order}, not uint8 in C order")
    check_pixels(*shape[1:3])
    return shape, offset


def member_labels(archive: zipfile.ZipFile, member: str, *, count: int) -> NDArray[np.int64]:
    """Whole numbers, one for each of so many images.

    Raises
    ------
    ValueError
        Another number of labels, another shape than [N] or [N, 1], or no whole numbers.
    """
    shape, _, dtype, offset = _header(archive, member)
    if not shape or shape[0] != count:
        raise ValueError(f"{count} images and {shape[0] if shape else 'no'} labels; each image needs one")
    if shape[1:] not in ((), (1,)):
        raise ValueError(f"one whole-number label per image is needed, got {dtype} of shape {shape}")
    with archive.open(f"{member}.npy") as stream:
        stream.seek(offset)
        return whole_numbers(np.frombuffer(stream.read(), dtype))


def whole_numbers(raw: NDArray) -> NDArray[np.int64]:
    """Labels [N] or [N, 1] of any number type as int64 [N].

    Raises
    ------
    ValueError
        Another shape, or values that are not whole numbers.
    """
    flat = raw[:, 0] if raw.ndim == 2 and raw.shape[1] == 1 else raw
    with np.errstate(invalid="ignore"):  # a NaN is refused in words
        if flat.ndim != 1 or flat.dtype.kind not in "iufb" or (flat.astype(np.int64) != flat).any():
            raise ValueError(f"one whole-number label per image is needed, got {raw.dtype} of shape {raw.shape}")
        return flat.astype(np.int64)


def member_rows(path: Path, member: str, positions: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Rows of a uint8 member at ascending positions, one at a time; a damaged row raises ValueError."""
    # Streamed: a 224 px member is gigabytes once unpacked, a drawn subset megabytes.
    with zipfile.ZipFile(path) as archive:
        shape, offset = member_header(archive, member)
        size = math.prod(shape[1:])
        with archive.open(f"{member}.npy") as stream:
            for position in positions:
                with parsed(f"{path}: {member} is damaged at image {position}"):
                    stream.seek(offset + int(position) * size)
                    row = np.frombuffer(stream.read(size), np.uint8).reshape(shape[1:])
                yield row


def _header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order and type of a member of plain numbers, and the byte at which its values begin."""
    with archive.open(f"{member}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _NPY_HEADERS:
            raise ValueError(f"{member} is written in NPY version {version}")
        shape, fortran_order, dtype = _NPY_HEADERS[version](stream)
        if dtype.kind not in "iufb":
            raise ValueError(f"{member} is {dtype}, not an array of numbers")
        stored, declared = archive.getinfo(f"{member}.npy").file_size - stream.tell(), math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or stored != declared:
            raise ValueError(f"{member} declares the shape {shape}, {declared} bytes, and has {stored}")
        return shape, fortran_order, dtype, stream.tell()
