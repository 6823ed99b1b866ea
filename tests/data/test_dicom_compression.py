"""Compressed DICOM, from other packages' encoders or written bit by bit here; what loses nothing is read exactly."""

import importlib.util
import io
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from medrobust_lib.data.decoding import read_image

spec = importlib.util.spec_from_file_location("dicom_files", Path(__file__).with_name("dicom_files.py"))
dicom_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dicom_files)

DRAW = np.random.default_rng(5)
EIGHT = DRAW.integers(0, 256, (37, 33), dtype=np.uint8)
TWELVE = DRAW.integers(0, 4096, (37, 33)).astype(np.uint16)
SIXTEEN = DRAW.integers(0, 65536, (37, 33)).astype(np.uint16)
SIGNED = DRAW.integers(-2000, 2000, (37, 33)).astype(np.int16)
COLOUR = DRAW.integers(0, 256, (37, 33, 3), dtype=np.uint8)
GRAYS = [(EIGHT, 8), (TWELVE, 12), (SIXTEEN, 16), (SIGNED, 16)]
NAMES = ["8 bits", "12 bits", "16 bits", "signed"]


def write_plain(path, pixels, bits):
    return dicom_files.write_dicom(path, pixels, bits=bits, **({"photometric": "RGB"} if pixels.ndim == 3 else {}))


def write(path, pixels, bits, syntax, stream):
    record = pydicom.dcmread(write_plain(path, pixels, bits))
    if stream is None:
        record.compress(syntax, generate_instance_uid=False)
    else:
        record.file_meta.TransferSyntaxUID = syntax
        record.PixelData = encapsulate([stream])
        record["PixelData"].VR = "OB"
    record.save_as(path)
    return path


def same_as_plain(tmp_path, pixels, bits, syntax, stream=None):
    """Nothing is lost where the uncompressed twin gives the same image."""
    path = write(tmp_path / "x.dcm", pixels, bits, syntax, stream)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_image(path), read_image(write_plain(tmp_path / "plain.dcm", pixels, bits)))


# An encoder of the two kinds of JPEG that no installed package writes (ISO/IEC 10918-1, annexes F and H)


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def difference(number):
    """Category in 5 bits, whatever it is, and the bits that tell the number within it."""
    size = abs(number).bit_length()
    rest = number if number > 0 else number + (1 << size) - 1
    return f"{size:05b}" + (f"{rest:0{size}b}" if 0 < size < 16 else "")


def stuffed(bits):
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")


def categories(count):
    return segment(0xC4, bytes([0, 0, 0, 0, 0, count]) + bytes(11) + bytes(range(count)))


def frame(marker, precision, rows, columns, samples):
    parts = b"".join(bytes([part + 1, 0x11, 0]) for part in range(samples))
    return segment(marker, struct.pack(">BHHB", precision, rows, columns, samples) + parts)


def scan(samples, first, last):
    return segment(
        0xDA, bytes([samples]) + b"".join(bytes([part + 1, 0]) for part in range(samples)) + bytes([first, last, 0])
    )


PREDICTORS = {
    1: lambda a, b, c: a, 2: lambda a, b, c: b, 3: lambda a, b, c: c, 4: lambda a, b, c: a + b - c,
    5: lambda a, b, c: a + ((b - c) >> 1), 6: lambda a, b, c: b + ((a - c) >> 1), 7: lambda a, b, c: (a + b) >> 1,
}  # fmt: skip


def jpeg_lossless(pixels, precision, predictor=1):
    values = pixels.reshape(*pixels.shape[:2], -1).astype(int) & (2**precision - 1)
    bits = []
    for y, x, part in np.ndindex(values.shape):
        left = values[y, x - 1, part] if x else 0
        above = values[y - 1, x, part] if y else 0
        corner = values[y - 1, x - 1, part] if x and y else 0
        guess = (
            PREDICTORS[predictor](left, above, corner)
            if x and y
            else left
            if x
            else above
            if y
            else 2 ** (precision - 1)
        )
        number = int(values[y, x, part] - guess) % 65536
        bits.append(difference(number - 65536 if number > 32768 else number))
    samples = values.shape[2]
    head = categories(17) + frame(0xC3, precision, *values.shape[:2], samples) + scan(samples, predictor, 0)
    return b"\xff\xd8" + head + stuffed("".join(bits)) + b"\xff\xd9"


def jpeg_extended(blocks):
    """12 bits, one value to a block of 8 x 8: with every step of quantisation at 1 nothing is lost."""
    values = 8 * (blocks.astype(int) - 2048)
    numbers = np.diff(values.ravel(), prepend=0)
    bits = "".join(difference(int(number)) + "0" for number in numbers)
    steps, end_of_block = segment(0xDB, b"\0" + b"\1" * 64), segment(0xC4, bytes([0x10, 1]) + bytes(15) + b"\0")
    rows, columns = 8 * blocks.shape[0], 8 * blocks.shape[1]
    head = steps + frame(0xC1, 12, rows, columns, 1) + categories(16) + end_of_block + scan(1, 0, 63)
    return b"\xff\xd8" + head + stuffed(bits) + b"\xff\xd9"


@pytest.mark.parametrize("pixels, bits", GRAYS, ids=NAMES)
def test_jpeg_lossless(tmp_path, pixels, bits):
    same_as_plain(tmp_path, pixels, bits, JPEGLosslessSV1, jpeg_lossless(pixels, bits))


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_jpeg_lossless_with_any_predictor(tmp_path, predictor):
    same_as_plain(tmp_path, TWELVE, 12, JPEGLossless, jpeg_lossless(TWELVE, 12, predictor))


def test_jpeg_lossless_colour(tmp_path):
    same_as_plain(tmp_path, COLOUR, 8, JPEGLosslessSV1, jpeg_lossless(COLOUR, 8))


def test_jpeg_extended_of_twelve_bits(tmp_path):
    blocks = DRAW.integers(0, 4096, (3, 2)).astype(np.uint16)
    pixels = np.kron(blocks, np.ones((8, 8), np.uint16))
    same_as_plain(tmp_path, pixels, 12, JPEGExtended12Bit, jpeg_extended(blocks))


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless], ids=["JPEG-LS", "JPEG 2000", "RLE"])
@pytest.mark.parametrize("pixels, bits", [*GRAYS, (COLOUR, 8)], ids=[*NAMES, "colour"])
def test_other_lossless_compressions(tmp_path, pixels, bits, syntax):
    same_as_plain(tmp_path, pixels, bits, syntax)


def test_high_throughput_jpeg_2000_is_known(tmp_path):
    with pytest.raises(ValueError, match=r"x\.dcm is not a readable DICOM image"):
        read_image(write(tmp_path / "x.dcm", EIGHT, 8, HTJ2KLossless, b"\xff\x4f\xff\x51 no such stream"))


def test_lossy_compressions_stay_close(tmp_path):
    smooth = np.add.outer(np.arange(32), np.arange(40)).astype(np.uint8) * 3
    stream = io.BytesIO()
    Image.fromarray(smooth).save(stream, "JPEG", quality=95)
    path = write(tmp_path / "x.dcm", smooth, 8, JPEGBaseline8Bit, stream.getvalue())
    np.testing.assert_allclose(read_image(path)[..., 0], smooth, atol=4)
    for syntax, options in ((JPEGLSNearLossless, {"jls_error": 2}), (JPEG2000, {"j2k_cr": [4]})):
        record = pydicom.dcmread(write_plain(path, smooth, 8))
        record.compress(syntax, **options)
        record.save_as(path)
        np.testing.assert_allclose(read_image(path)[..., 0], smooth, atol=4)


# What cannot be read


@pytest.mark.parametrize(
    "syntax, needs",
    [
        (JPEGLosslessSV1, "pylibjpeg-libjpeg"),
        (JPEGLSLossless, "pyjpegls"),
        (JPEGExtended12Bit, "pylibjpeg-libjpeg"),
        (HTJ2KLossless, "pylibjpeg-openjpeg"),
    ],
)
def test_missing_plug_in_is_named_with_the_command(tmp_path, monkeypatch, syntax, needs):
    stream = jpeg_extended(np.full((2, 2), 7, np.uint16)) if syntax == JPEGExtended12Bit else jpeg_lossless(TWELVE, 12)
    pixels = np.zeros((16, 16), np.uint16) if syntax == JPEGExtended12Bit else TWELVE
    path = write(tmp_path / "x.dcm", pixels, 12, syntax, stream)
    decoder = pydicom.pixels.get_decoder(syntax)
    without = {name: plug_in for name, plug_in in decoder._available.items() if name == "pillow"}
    absent = dict.fromkeys(["pylibjpeg"], pydicom.pixels.decoders.pylibjpeg.DECODER_DEPENDENCIES[syntax])
    if syntax == JPEGLSLossless:
        absent["pyjpegls"] = pydicom.pixels.decoders.pyjpegls.DECODER_DEPENDENCIES[syntax]
    monkeypatch.setattr(decoder, "_available", without)
    monkeypatch.setattr(decoder, "_unavailable", {**absent, "gdcm": ("gdcm>=3.0.10",)})
    with pytest.raises(ValueError) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message and needs in message and "gdcm" not in message
    assert 'pip install "medrobust-lib[dicom]"; or export the image uncompressed' in message


@pytest.mark.parametrize("syntax, stream", [
    (JPEGLosslessSV1, jpeg_lossless(EIGHT, 8)), (JPEGLosslessSV1, jpeg_lossless(np.zeros((999, 2), np.uint8), 8)),
    (JPEG2000Lossless, b"\xff\x4f\xff\x51" + bytes(4) + struct.pack(">IIII", 60_000, 60_000, 0, 0)),
])  # fmt: skip
def test_stream_of_another_size_than_the_header_is_refused(tmp_path, syntax, stream):
    path = write(tmp_path / "x.dcm", EIGHT[:20], 8, syntax, stream)
    with pytest.raises(
        ValueError, match=r"x\.dcm .*its header states 20 x 33 pixels, its stream (37 x 33|999 x 2|60000 x 60000)"
    ):
        read_image(path)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, JPEGExtended12Bit, RLELossless])
def test_damaged_streams_are_named(tmp_path, syntax):
    path = write(tmp_path / "x.dcm", TWELVE, 12, syntax, b"\xff\xd8\xff\xe0 no such stream")
    with pytest.raises(ValueError, match=r"x\.dcm is not a readable DICOM image.* Replace or remove the file"):
        read_image(path)


def test_unknown_compression_is_named(tmp_path):
    path = write(tmp_path / "x.dcm", TWELVE, 12, pydicom.uid.UID("1.2.3.4"), b"\0\0")
    with pytest.raises(ValueError, match=r"x\.dcm is not a readable DICOM image.*1\.2\.3\.4"):
        read_image(path)
