"""One image file to uint8 RGB: PNG, JPEG, TIFF, BMP and WebP through Pillow, DICOM through pydicom."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.filereader import read_file_meta_info
from pydicom.misc import is_dicom
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder
from pydicom.uid import UID

from medrobust_lib.files import parsed

DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}) | DICOM_SUFFIXES
MOST_PIXELS = 178_956_970  # of one image: from here on Pillow refuses, for fear of a decompression bomb
# Pillow tells a file's kind from its content, and hands PostScript, for one, to another program.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_MOST_INFLATED = 2**30  # bytes that a deflated DICOM file may unpack to
_LARGEST_DEFLATION = 1032  # to 1: the limit of the method
_ADVICE = "Replace or remove the file."


def read_image(path: str | Path, *, depth: int | None = None) -> NDArray[np.uint8]:
    """Decode one image file.

    Gray images are repeated over three channels; palettes are resolved, alpha is dropped, and EXIF
    rotation is ignored as in the papers' loaders. Values are scaled by the full range of the file's bits
    (16 bits: 65535 to 255), never stretched per image, so exposures stay comparable. For DICOM see `read_dicom`.

    Parameters
    ----------
    path : str or Path
    depth : int or None
        Bits that the values really have, 1 to 32, where the file has room for more: 12 takes 4095 for full
        scale in a 16-bit PNG. DICOM files state their own and are not touched.

    Returns
    -------
    uint8 [H, W, 3]

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Corrupt, multi-frame or floating-point image, or values beyond the depth; the file is named.
    """
    path = Path(path)
    if depth is not None and (isinstance(depth, bool) or depth not in range(1, 33)):
        raise ValueError(f"depth={depth!r}: give the bits that the values have, 1 to 32, or None")
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path}")
    if _is_dicom(path):
        return read_dicom(path)
    with parsed(f"{path} is not a readable image", _ADVICE), Image.open(path, formats=_FORMATS) as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames == 1:
            # As stored, before Pillow brings it to a mode of its own: 16-bit colour it cuts down to 8 bits.
            deep = ";16" in str(picture.tile)
            picture.load()
    if frames > 1:
        raise ValueError(f"{path} holds {frames} frames; one image per file is expected. Split it first.")
    if deep and not picture.mode.startswith("I") and depth not in (None, 16):
        raise ValueError(
            f"{path}: of 16-bit colour only the upper 8 bits are read, so depth={depth} cannot be; save it with 8 bits"
        )
    return _to_rgb(picture, path, None if deep and depth == 16 else depth)


def read_dicom(path: str | Path) -> NDArray[np.uint8]:
    """Decode one single-frame DICOM image for display.

    The modality LUT (rescale) comes first, then the first VOI LUT or window, whose full output range is
    mapped to 0..255. Without one, 8-bit data are taken as stored and deeper data are stretched from
    their own minimum to their maximum, as viewers do. MONOCHROME1 is inverted, so that bright always
    means dense.

    Returns
    -------
    uint8 [H, W, 3]

    Raises
    ------
    ValueError
        Corrupt file, no decoder for its compression, several frames, or colour data other than 8-bit RGB
        or YBR; the file is named.
    """
    path = Path(path)
    with parsed(f"{path} is not a readable DICOM image", _ADVICE):
        record = _dicom_record(path)
        frames = int(record.get("NumberOfFrames") or 1)
        photometric = str(record.PhotometricInterpretation)
        check_pixels(record.Rows, record.Columns)
        channels, bits = int(record.SamplesPerPixel), int(record.BitsStored)
        if channels not in (1, 3) or not 1 <= bits <= record.BitsAllocated <= 64:
            raise ValueError(f"{channels} samples per pixel, {bits} of {record.BitsAllocated} bits stored")
        syntax = UID(record.file_meta.TransferSyntaxUID)
    if frames > 1:
        raise ValueError(f"{path} holds {frames} frames; one image per file is expected. Export single frames.")
    if syntax.is_encapsulated and not _decodes(syntax):
        raise ValueError(
            f"{path} is compressed in a way that no installed decoder reads ({syntax.name}); "
            "install pylibjpeg or python-gdcm, or export the image uncompressed"
        )
    with parsed(f"{path} is not a readable DICOM image", _ADVICE):
        pixels = record.pixel_array
        if photometric in {"MONOCHROME1", "MONOCHROME2"}:
            gray = _display_gray(record, pixels)
            return _repeat(255 - gray if photometric == "MONOCHROME1" else gray)
    if pixels.ndim == 3 and pixels.dtype == np.uint8:
        # pydicom has already turned YBR into RGB.
        return np.ascontiguousarray(pixels)
    raise ValueError(
        f"{path}: {photometric} data of {bits} bits are not supported; "
        "MONOCHROME1, MONOCHROME2 and 8-bit RGB or YBR are"
    )


def image_shape(path: str | Path) -> tuple[int, int]:
    """Height and width from the header alone; raises as `read_image`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path}")
    with parsed(f"{path} is not a readable image", _ADVICE):
        if _is_dicom(path):
            header = _dicom_record(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
            shape = int(header.Rows), int(header.Columns)
        else:
            with Image.open(path, formats=_FORMATS) as picture:
                shape = picture.height, picture.width
        check_pixels(*shape)
    return shape


def check_pixels(height: int, width: int) -> None:
    """Refuse the size that a header states before memory is taken for it.

    Raises
    ------
    ValueError
        No pixels, or more than `MOST_PIXELS`.
    """
    if not (height > 0 and width > 0 and height * width <= MOST_PIXELS):
        raise ValueError(f"its header states {height} x {width} pixels; 1 to {MOST_PIXELS:,} can be read")


def fit_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Bring the shortest edge to ``size`` (bicubic, antialiased) and crop the centre square.

    Parameters
    ----------
    image : uint8 [H, W, 3]
    size : int
        Side in pixels, positive.

    Returns
    -------
    uint8 [size, size, 3]
        The image itself where it already has that size.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    height, width = max(size, round(height * scale)), max(size, round(width * scale))
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def _is_dicom(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in DICOM_SUFFIXES or (suffix not in IMAGE_SUFFIXES and is_dicom(path))


def _dicom_record(path: Path, **options: Any) -> pydicom.Dataset:
    syntax = read_file_meta_info(path).get("TransferSyntaxUID", UID(""))
    # pydicom unpacks such a file as a whole before it looks at anything in it.
    if syntax.is_deflated and path.stat().st_size * _LARGEST_DEFLATION > _MOST_INFLATED:
        raise ValueError(f"it is deflated and may unpack to more than {_MOST_INFLATED:,} bytes; export it uncompressed")
    return pydicom.dcmread(path, **options)


def _decodes(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _to_rgb(picture: Image.Image, path: Path, depth: int | None) -> NDArray[np.uint8]:
    if picture.mode == "F":
        raise ValueError(f"{path} holds floating-point values of unknown range; save it with 8 or 16 bits")
    gray = picture.mode.startswith("I")
    values = np.asarray(picture).astype(np.int64) if gray else np.array(picture.convert("RGB"))
    full = 2 ** (depth or (16 if gray else 8)) - 1
    if full > 255 and not gray:
        raise ValueError(f"{path} holds 8 bits, fewer than depth={depth}; leave depth out")
    if values.min() < 0 or values.max() > full:
        raise ValueError(f"{path} holds values from {values.min()} to {values.max()}; full scale is {full}")
    scaled = values if full == 255 else np.round(values * (255 / full))
    return _repeat(scaled.astype(np.uint8)) if gray else scaled.astype(np.uint8)


def _display_gray(record: pydicom.Dataset, pixels: NDArray) -> NDArray[np.uint8]:
    values = apply_modality_lut(pixels, record)
    low, high = float(values.min()), float(values.max())
    if record.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** record.VOILUTSequence[0].LUTDescriptor[2] - 1
        values = apply_voi_lut(np.round(values).astype(np.int64), record)
    elif record.get("WindowCenter") not in (None, ""):
        # Both ends of the output scale, not of this image: a window must mean the same for every image.
        with np.errstate(over="ignore"):
            low, high = apply_voi_lut(np.array([-(2.0**40), 2.0**40]), record)
            values = apply_voi_lut(values, record)
    elif record.BitsStored <= 8 and record.get("PixelRepresentation", 0) == 0:
        values, low, high = pixels, 0.0, 2.0**record.BitsStored - 1
    if high == low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float64) - low) / (high - low)
    return np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def _repeat(gray: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(gray[:, :, None], 3, axis=2)
