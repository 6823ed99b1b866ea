"""What DICOM files state, as far as `read_dicom` needs it: elements, streams, and the way from values to gray."""

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.datadict import dictionary_description
from pydicom.encaps import generate_frames
from pydicom.filereader import read_file_meta_info
from pydicom.misc import is_dicom
from pydicom.multival import MultiValue
from pydicom.pixels import apply_windowing
from pydicom.pixels.decoders.base import Decoder
from pydicom.tag import Tag

from medrobust_lib.files import parsed

_NEEDED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored")
_NEEDED += ("PixelRepresentation", "PixelData")
_SPACINGS = ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing")  # height first
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # markers of JPEG, and of JPEG-LS
_MOST_INFLATED = 2**30  # bytes that a deflated file may unpack to
_LARGEST_DEFLATION = 1032  # to 1: the limit of the method


def begins_as_dicom(path: Path) -> bool:
    """Whether a file begins with DICOM's preamble or, as old archives write it, with a first element."""
    with path.open("rb") as stream:
        start = stream.read(132)
    return start[128:] == b"DICM" or start[:2] in {b"\2\0", b"\x08\0"}  # its group


def read_record(path: Path, **options: Any) -> pydicom.Dataset:
    """Read a file with `pydicom.dcmread`, with or without a preamble.

    Raises
    ------
    Exception
        Whatever pydicom trips over; ValueError where the file is no DICOM or may unpack to gigabytes.
    """
    if not begins_as_dicom(path):
        raise ValueError("it does not begin as DICOM does")
    # pydicom unpacks a deflated file as a whole before it looks at anything in it.
    if is_dicom(path):
        deflated = read_file_meta_info(path).get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian
    else:
        deflated = uid.DeflatedExplicitVRLittleEndian.encode() in path.read_bytes()
    if deflated and path.stat().st_size * _LARGEST_DEFLATION > _MOST_INFLATED:
        raise ValueError(f"it is deflated and may unpack to more than {_MOST_INFLATED:,} bytes; export it uncompressed")
    record = pydicom.dcmread(path, force=True, **options)
    if "TransferSyntaxUID" not in record.file_meta:
        implicit, little = record.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        record.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return record


def stated(dataset: pydicom.Dataset, keyword: str) -> Any:
    """Value of an element that has to be there; ValueError with its name and number where it is not."""
    value = dataset.get(keyword)
    if value is None or (isinstance(value, str | bytes) and not value):
        meta = getattr(dataset, "file_meta", {})
        kind = uid.UID(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "").name
        raise ValueError(f"its {kind or 'data set'} has no {dictionary_description(keyword)} {Tag(keyword)}")
    return value


def check_image(record: pydicom.Dataset) -> None:
    """Refuse what is no image of whole numbers, naming the element.

    Raises
    ------
    ValueError
        A missing element, floating-point values, or numbers of samples and bits that cannot be.
    """
    if "FloatPixelData" in record or "DoubleFloatPixelData" in record:
        raise ValueError("it holds floating-point values of unknown range")
    for keyword in _NEEDED:
        stated(record, keyword)
    samples, allocated, bits = record.SamplesPerPixel, record.BitsAllocated, record.BitsStored
    highest = record.get("HighBit", bits - 1)
    if samples not in (1, 3) or not 1 <= bits <= allocated <= 32 or highest != bits - 1:
        raise ValueError(f"{samples} samples per pixel, {bits} of {allocated} bits stored, the highest {highest}")


def left_out_of(path: Path) -> tuple[str, ...]:
    """What `decoding.left_out` says of a DICOM file, from the header."""
    header = read_record(path, stop_before_pixels=True)
    height, width = next((header.get(keyword) for keyword in _SPACINGS if header.get(keyword)), (1, 1))
    found = () if float(height) == float(width) else ("unequal pixel sides",)
    _bring_up_functional_groups(header)
    gray = str(header.get("PhotometricInterpretation")) in {"MONOCHROME1", "MONOCHROME2"}
    if gray and (header.get("BitsStored") or 0) > 8 and not header.get("VOILUTSequence") and not _has_window(header):
        return (*found, "absolute brightness (no window: stretched by each image's own range)")
    return found


def patient_of(path: Path) -> str:
    """A pseudonym of a file's patient, 12 hex digits of the SHA-256 of its PatientID; empty where it states none.

    Whoever can guess a PatientID can compute its pseudonym: it keeps a name out of a table and makes nobody anonymous.

    Raises
    ------
    ValueError
        The file is no readable DICOM.
    """
    with parsed(f"{path} is no readable DICOM file, so its PatientID is not known", "Group by a table's column."):
        header = read_record(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "PatientID"])
        stated_id = str(header.get("PatientID") or "").strip()
    return hashlib.sha256(stated_id.encode()).hexdigest()[:12] if stated_id else ""


def plug_ins(decoder: Decoder) -> str:
    """What to install that decodes this compression; empty where nothing is missing."""
    if "pydicom" in decoder.available_plugins:  # nobody needs more for run lengths
        return ""
    # Not GDCM: at a damaged stream it ends the process.
    needs = (words.partition(" - requires ") for words in decoder.missing_dependencies)
    missing = " or ".join(packages for name, _, packages in needs if name != "gdcm")
    return missing and f'Install {missing}: pip install "medrobust-lib[dicom]"; or export the image uncompressed.'


def check_stream(record: pydicom.Dataset) -> None:
    """Refuse a compressed stream of another size than the header's: decoders believe it, at any cost."""
    syntax = record.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax == uid.RLELossless:
        return
    stream = next(generate_frames(record.PixelData, number_of_frames=1))
    if stream.startswith(b"\xff\xd8"):  # JPEG and JPEG-LS
        at = 2
        while stream[at + 1] not in _START_OF_FRAME:
            at += 1 if stream[at + 1] == 0xFF else 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        rows, columns = struct.unpack_from(">HH", stream, at + 5)
    else:  # JPEG 2000
        columns, rows, left, top = struct.unpack_from(">IIII", stream, stream.index(b"\xff\x4f\xff\x51") + 8)
        rows, columns = rows - top, columns - left
    if (rows, columns) != (record.Rows, record.Columns):
        raise ValueError(f"its header states {record.Rows} x {record.Columns} pixels, its stream {rows} x {columns}")


def display_gray(record: pydicom.Dataset, pixels: NDArray) -> NDArray[np.uint8]:
    """Stored values of one monochrome frame as viewers show them (see `read_dicom`).

    Parameters
    ----------
    record : Dataset
        Changed: what its functional groups say comes up, and its first complete window alone stays.
    pixels : integer [H, W]

    Returns
    -------
    uint8 [H, W]
    """
    _bring_up_functional_groups(record)
    padding = _padding(record, pixels)
    values = _modality(record, pixels.astype(np.int64))
    if record.get("VOILUTSequence"):
        values, high = _looked_up(record, record.VOILUTSequence[0], values)
        low = 0
    elif _has_window(record):
        # Both ends of the output scale, not of this image: a window must mean the same for every image.
        with np.errstate(over="ignore"):
            low, high = apply_windowing(np.array([-(2.0**40), 2.0**40]), record)
            values = apply_windowing(values, record)
    elif record.BitsStored <= 8:
        every = _modality(record, _every_stored(record))
        low, high = every.min(), every.max()
    else:
        image = values[~padding]
        low, high = (image.min(), image.max()) if len(image) else (0, 0)
    if not np.isfinite(float(low) + float(high)):
        raise ValueError("its rescale or window is not finite")
    scaled = (values.astype(np.float64) - low) / (high - low or np.inf)
    gray = np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
    if record.PhotometricInterpretation == "MONOCHROME1" or record.get("PresentationLUTShape") == "INVERSE":
        gray = 255 - gray  # stored inverted: the smallest value is shown white
    return np.where(padding, np.uint8(0), gray)


def _bring_up_functional_groups(record: pydicom.Dataset) -> None:  # PS3.3 C.7.6.16, of the only frame
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(record.get(groups) or [])[:1]:
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in list(group.get(macro) or [])[:1]:
                    record.update(item)


def _has_window(record: pydicom.Dataset) -> bool:
    record.VOILUTFunction = function = str(record.get("VOILUTFunction") or "LINEAR").upper()
    values = (record.get(keyword) for keyword in ("WindowCenter", "WindowWidth"))
    lists = (value if isinstance(value, MultiValue) else [value] for value in values)
    for center, width in zip(*lists, strict=False):
        missing = {None, ""} & {center, width}
        if not missing and width > 0 and (width >= 1 or function != "LINEAR"):  # PS3.3 C.11.2.1
            record.WindowCenter, record.WindowWidth = center, width
            return True
    return False


def _padding(record: pydicom.Dataset, pixels: NDArray) -> NDArray[np.bool_]:
    """Where the stored values are no image (PS3.3 C.7.5.1.1.2)."""
    value, limit = record.get("PixelPaddingValue"), record.get("PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(pixels.shape, bool)
    limit = value if limit is None else limit
    if pixels.itemsize <= 2:
        every = _every_stored(record)
        if not every[0] <= min(value, limit) <= max(value, limit) <= every[-1]:
            # Often written with the wrong sign, in their own 16 bits. Read round the circle of these, either end may
            # come first; padding is the way that leaves more for an image.
            ways = [(start, (end - start) % 2**16) for start, end in ((value, limit), (limit, value))]
            start, length = min(ways, key=lambda way: np.sum((every - way[0]) % 2**16 <= way[1]))
            return (pixels.astype(np.int64) - start) % 2**16 <= length
    return (pixels >= min(value, limit)) & (pixels <= max(value, limit))


def _every_stored(record: pydicom.Dataset) -> NDArray[np.int64]:
    """All values that the stored bits can hold, in order; of up to 16 bits."""
    lowest = -(2 ** (record.BitsStored - 1)) if record.PixelRepresentation else 0
    return np.arange(lowest, lowest + 2**record.BitsStored)


def _modality(record: pydicom.Dataset, pixels: NDArray) -> NDArray:
    if record.get("ModalityLUTSequence"):
        return _looked_up(record, record.ModalityLUTSequence[0], pixels)[0]
    slope, intercept = record.get("RescaleSlope"), record.get("RescaleIntercept")
    return pixels * float(1 if slope is None else slope) + float(intercept or 0)


def _looked_up(record: pydicom.Dataset, item: pydicom.Dataset, values: NDArray) -> tuple[NDArray, float]:
    """Values through a modality or VOI LUT, and the top of its scale; pydicom counts entries of 8 bits modulo 256."""
    count, first, bits = stated(item, "LUTDescriptor")
    data, count = stated(item, "LUTData"), count % 65536 or 65536
    if isinstance(data, bytes):
        order = "<" if record.file_meta.TransferSyntaxUID.is_little_endian else ">"
        data = np.frombuffer(data, f"{order}u2" if len(data) >= 2 * count else np.uint8)
    table = np.asarray(data, np.int64).reshape(-1)[:count]
    if first > 32767 and values.min() < 0:  # a negative number, written without its sign
        first -= 65536
    found = table[np.clip(np.round(values).astype(np.int64) - first, 0, len(table) - 1)]
    return found, min(2**bits - 1, table.max())
