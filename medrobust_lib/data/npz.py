"""Read single images out of an npz file without unpacking the whole array."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def member_header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], int]:
    """Shape of a uint8 member and the byte at which its values begin."""
    with archive.open(f"{member}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _NPY_HEADERS:
            raise ValueError(f"{member} is written in NPY version {version}")
        shape, fortran_order, dtype = _NPY_HEADERS[version](stream)
        if fortran_order or dtype != np.uint8:
            raise ValueError(f"{member} is {dtype}{' in Fortran order' * fortran_order}, not uint8 in C order")
        return shape, stream.tell()


def member_rows(path: Path, member: str, positions: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Rows of a uint8 member at ascending positions, one at a time; a damaged row raises ValueError."""
    # Streamed: a 224 px member is gigabytes once unpacked, a drawn subset megabytes.
    with zipfile.ZipFile(path) as archive:
        shape, offset = member_header(archive, member)
        size = int(np.prod(shape[1:]))
        with archive.open(f"{member}.npy") as stream:
            for position in positions:
                try:
                    stream.seek(offset + int(position) * size)
                    row = np.frombuffer(stream.read(size), np.uint8).reshape(shape[1:])
                except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
                    raise ValueError(f"{path}: {member} is damaged at image {position}: {error}") from error
                yield row
