"""One image file to uint8 RGB, and the arrays of an npz image by image.

PNG, JPEG, TIFF, BMP, WebP and GIF are read through Pillow, DICOM through pydicom.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydicom.pixels import apply_color_lut, get_decoder

from medrobust_lib.checks import check_whole
from medrobust_lib.data import dicom
from medrobust_lib.files import parsed

Fit = Literal["crop", "pad"]

DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}) | DICOM_SUFFIXES
MOST_PIXELS = 178_956_970  # of one image: from here on Pillow refuses, for fear of a decompression bomb
# Pillow tells a file's kind from its content, and hands PostScript, for one, to another program.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
_ORIENTATION, _PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _SUBFILE = 274, 262, 258, 339, 254  # tags of TIFF 6.0
_REDUCED, _MASK = 1, 4  # bits of its NewSubfileType
_COLOURS = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR"})
_ADVICE = "Replace or remove the file, or save it anew as PNG."
_EXPORT = "Replace or remove the file, or export it anew."
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_image(path: str | Path, *, bit_depth: int | None = None) -> NDArray[np.uint8]:
    """Decode one image file.

    Gray images are repeated over three channels; palettes are resolved. Values are scaled by the full range
    of the file's bits (16 bits: 65535 to 255; colour keeps its upper byte), never stretched per image, so
    exposures stay comparable. Alpha, colour profiles and EXIF rotation are ignored as in the papers' loaders,
    and of several pictures the first counts, as in viewers, or the largest page of a TIFF: `left_out` tells of both.
    For DICOM see `read_dicom`.

    Parameters
    ----------
    path : str or Path
    bit_depth : int or None
        Bits that the values really have, 1 to 32, where the file has room for more: 12 takes 4095 for full
        scale in a 16-bit PNG. A file with fewer bits keeps its own full scale, so that 8-bit files may lie beside
        deeper ones; DICOM files state their own and are not touched.

    Returns
    -------
    uint8 [H, W, 3]

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Corrupt or floating-point image, TIFF pages of one size, or values beyond the bit depth; the file is named.
    """
    if bit_depth is not None:
        check_whole("bit_depth", bit_depth, most=32, hint=": give the bits that the values have, or None")
    path = _existing(path)
    if _is_dicom(path):
        return read_dicom(path)
    with parsed(f"{path} is not a readable image", _ADVICE), _opened(path) as picture:
        # As stored, before Pillow brings it to a mode of its own: 16-bit colour it cuts down to 8 bits.
        cut = ";16" in str(picture.tile) and not picture.mode.startswith("I")
        picture.load()
        tags = getattr(picture, "tag_v2", {})
        signed = picture.mode == "L" and tags.get(_SAMPLE_FORMAT) == (2,)  # of 8 bits, which Pillow overlooks
        gray = signed or picture.mode[0] in "IF"
        if picture.mode in {"La", "RGBa"}:  # multiplied by alpha
            picture = picture.convert(picture.mode.upper())
        values = np.asarray(picture) if gray else np.array(picture.convert("RGB"))
        bits = int(tags.get(_BITS, (16,))[0]) if gray else 8
    if values.dtype == np.float32:
        raise ValueError(f"{path} holds floating-point values of unknown range; save it with 8 or 16 bits")
    if cut and bit_depth is not None and bit_depth < 16:
        raise ValueError(
            f"{path}: of 16-bit colour only the upper 8 bits are read, so bit_depth={bit_depth} cannot be; save it "
            "with 8 bits"
        )
    full = min(bits, 16) if cut or bit_depth is None else min(bits, bit_depth)
    scaled = _scaled(values.view(np.int8) if signed else values, full, path)
    # Pillow turns white-is-zero round for up to 8 bits only.
    scaled = 255 - scaled if gray and tags.get(_PHOTOMETRIC) == 0 else scaled
    return as_rgb(scaled) if gray else scaled


def read_dicom(path: str | Path) -> NDArray[np.uint8]:
    """Decode one single-frame DICOM image for display.

    The modality LUT (rescale) comes first, then the first VOI LUT or complete window, whose full output
    range is mapped to 0..255; a one-frame file of the enhanced kind states them in its functional groups.
    Without one, data of up to 8 bits are mapped from the modality LUT's whole range, and deeper data are
    stretched from their own minimum to their maximum, as viewers do. Padding is left out of that and black.
    MONOCHROME1 (or an inverse presentation LUT) is inverted, so that bright always means dense. Overlays
    are not drawn. Files without a preamble are read; compressed ones may need the extra ``[dicom]``.

    Returns
    -------
    uint8 [H, W, 3]

    Raises
    ------
    ValueError
        Corrupt file, missing element, no decoder for its compression, several frames, floating-point
        values, or colour that is not RGB, YBR of 8 bits or a palette; the file is named.
    """
    path = Path(path)
    says = f"{path} is not a readable DICOM image"
    with parsed(says, _EXPORT):
        record = dicom.read_record(path)
        dicom.check_image(record)
        check_pixels(record.Rows, record.Columns)
        frames, bits = int(record.get("NumberOfFrames") or 1), record.BitsStored
        photometric, samples = str(record.PhotometricInterpretation), record.SamplesPerPixel
        decoder = get_decoder(record.file_meta.TransferSyntaxUID)
    if frames > 1:
        raise ValueError(f"{path} holds {frames} frames; one image per file is expected. Export single frames.")
    if not decoder.is_available:
        raise ValueError(f"{path} is compressed as {decoder.UID.name}. {dicom.plug_ins(decoder)}")
    with parsed(says, dicom.plug_ins(decoder) or _EXPORT):
        dicom.check_stream(record)
        pixels = record.pixel_array
        if photometric in {"MONOCHROME1", "MONOCHROME2"} and samples == 1:
            return as_rgb(dicom.display_gray(record, pixels))
        if photometric == "PALETTE COLOR":
            colours = apply_color_lut(pixels, record)[..., :3]
            if colours.dtype == np.uint8 and pixels.max() > 255:  # pydicom counts them modulo 256
                raise ValueError("its palette has more than 256 entries of 8 bits")
            pixels, bits = colours, 8 * colours.itemsize
    # pydicom has turned YBR into RGB.
    right_bits = bits == 8 or not photometric.startswith("YBR_FULL")
    if photometric in _COLOURS and pixels.ndim == 3 and pixels.dtype.kind == "u" and right_bits:
        return np.ascontiguousarray(_scaled(pixels, bits, path))
    raise ValueError(
        f"{path}: {photometric} data of {samples} x {bits} bits are not supported; "
        "MONOCHROME1, MONOCHROME2, RGB, PALETTE COLOR and 8-bit YBR are"
    )


def left_out(path: str | Path) -> tuple[str, ...]:
    """What `read_image` leaves out of one file, from its header, in words that a set can count.

    Returns
    -------
    tuple of str
        Some of ``further pictures``, ``transparency``, ``EXIF rotation``, ``colour profile`` (other than
        sRGB), ``unequal pixel sides`` and, for DICOM of more than 8 bits, ``absolute brightness (no window:
        stretched by each image's own range)``; empty for most files.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_image`.
    """
    path = _existing(path)
    with parsed(f"{path} is not a readable image", _ADVICE):
        if _is_dicom(path):
            return dicom.left_out_of(path)
        with _opened(path) as picture:
            profile = (picture.info.get("icc_profile") or b"sRGB").replace(b"\0", b"")
            sides = picture.info.get("dpi", (1, 1))
            found = {
                "further pictures": getattr(picture, "n_frames", 1) > 1,
                "transparency": picture.has_transparency_data,
                "EXIF rotation": picture.getexif().get(_ORIENTATION, 1) != 1,
                "colour profile": b"sRGB" not in profile,
                "unequal pixel sides": round(sides[0]) != round(sides[1]),
            }
    return tuple(what for what, there in found.items() if there)


def image_shape(path: str | Path) -> tuple[int, int]:
    """Height and width from the header alone; raises as `read_image`."""
    path = _existing(path)
    with parsed(f"{path} is not a readable image", _ADVICE):
        if _is_dicom(path):
            header = dicom.read_record(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "Rows", "Columns"])
            shape = int(dicom.stated(header, "Rows")), int(dicom.stated(header, "Columns"))
        else:
            with _opened(path) as picture:
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


def fit_square(image: NDArray[np.uint8], size: int, *, fit: Fit = "crop") -> NDArray[np.uint8]:
    """Bring the shortest edge to ``size`` (bicubic, antialiased) and crop the centre square, or pad to a square.

    Parameters
    ----------
    image : uint8 [H, W, 3]
    size : int
        Side in pixels, positive.
    fit : {"crop", "pad"}
        ``pad`` brings the longest edge to ``size`` and centres the image between black bars.

    Returns
    -------
    uint8 [size, size, 3]
        The image itself where it already has that size.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    if fit == "pad":
        return np.asarray(ImageOps.pad(Image.fromarray(image), (size, size), Image.Resampling.BICUBIC))
    scale = size / min(height, width)
    height, width = max(size, round(height * scale)), max(size, round(width * scale))
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with Image.open(path, formats=_FORMATS) as picture:
        if picture.format == "TIFF" and picture.n_frames > 1:
            _seek_main_page(picture)
        yield picture


def _seek_main_page(picture: Image.Image) -> None:
    sizes = {}
    for page in range(picture.n_frames):
        picture.seek(page)
        if not picture.tag_v2.get(_SUBFILE, 0) & (_REDUCED | _MASK):
            sizes[page] = picture.size
    main = max(sizes, key=lambda page: math.prod(sizes[page]), default=0)  # thumbnails often bear no flag
    rivals = [page for page, size in sizes.items() if page != main and size == sizes[main]]
    if rivals:
        width, height = sizes[main]
        raise ValueError(
            f"pages {main + 1} and {rivals[0] + 1} of {picture.n_frames} are both {height} x {width} pixels, and "
            "which is meant it does not say; one image per file is expected, so split it first"
        )
    picture.seek(main)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path}")
    return path


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() in DICOM_SUFFIXES or dicom.begins_as_dicom(path)


def _scaled(values: NDArray, bits: int, path: Path) -> NDArray[np.uint8]:
    full = 2**bits - 1
    if values.min() < 0 or values.max() > full:
        raise ValueError(
            f"{path} holds values from {values.min()} to {values.max()}; full scale is {full}. State the bits that "
            "they have as bit_depth, or save the image with values from 0 on"
        )
    return values.astype(np.uint8) if full == 255 else np.round(values * (255 / full)).astype(np.uint8)


def as_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image [H, W], [H, W, 1] or [H, W, 3] as [H, W, 3]: gray is repeated, any other number of channels kept."""
    planes = image if image.ndim == 3 else image[:, :, None]
    return np.repeat(planes, 3, axis=2) if planes.shape[2] == 1 else planes


def member_names_of(archive: zipfile.ZipFile) -> tuple[str, ...]:
    """Names of the arrays, without the ending of the files that hold them."""
    return tuple(name.removesuffix(".npy") for name in archive.namelist())


def listed_members(archive: zipfile.ZipFile, images: str, labels: str) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """Shape of the member of images, and the whole numbers of that of labels, one for each image.

    Raises
    ------
    ValueError
        Images other than uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], or of more than `MOST_PIXELS`; another number
        of labels, another shape of them than [N] or [N, 1], or no whole numbers.
    """
    shape, fortran_order, dtype, _ = _header(archive, images)
    if fortran_order or dtype != np.uint8:
        raise ValueError(f"{images} is {dtype}{' in Fortran order' * fortran_order}, not uint8 in C order")
    if len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"{images} has shape {shape}; expected [N, H, W] or [N, H, W, 3]")
    check_pixels(*shape[1:3])
    own, _, dtype, offset = _header(archive, labels)
    if not own or own[0] != shape[0]:
        raise ValueError(f"{shape[0]} images and {own[0] if own else 'no'} labels; each image needs one")
    if own[1:] not in ((), (1,)):
        raise ValueError(f"one whole-number label per image is needed, got {dtype} of shape {own}")
    with archive.open(f"{labels}.npy") as stream:
        stream.seek(offset)
        return shape, whole_numbers(np.frombuffer(stream.read(), dtype))


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
    """Rows of a member that `listed_members` accepts, at ascending positions; a damaged row raises ValueError."""
    # Streamed: a 224 px member is gigabytes once unpacked, a drawn subset megabytes.
    with zipfile.ZipFile(path) as archive:
        shape, _, _, offset = _header(archive, member)
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
