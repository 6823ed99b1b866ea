"""DICOM and pictures made to do harm: impossible headers, other formats under their names, decompression bombs."""

import importlib.util
import io
import os
import struct
import zlib
from pathlib import Path

import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from medrobust_lib.data.decoding import image_shape, read_image

spec = importlib.util.spec_from_file_location("spoiling", Path(__file__).with_name("spoiling.py"))
spoiling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(spoiling)
refused = spoiling.refused


# DICOM


def write_dicom(path, *, syntax=ExplicitVRLittleEndian, **elements):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    record = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    plain = {
        "SOPClassUID": SecondaryCaptureImageStorage, "SOPInstanceUID": "1.2.3", "Rows": 8, "Columns": 8,
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 12,
        "HighBit": 11, "PixelRepresentation": 0, "PixelData": bytes(128),
    }  # fmt: skip
    for name, value in {**plain, **elements}.items():
        if value is not None:
            setattr(record, name, value)
    record.save_as(path, enforce_file_format=True)
    # Whatever the file says about itself, its bytes are plain.
    content = path.read_bytes()
    old, new = (uid.encode() + b"\0" * (len(uid) % 2) for uid in (ExplicitVRLittleEndian, syntax))
    group = content[140:144]
    changed = content.replace(struct.pack("<2sH", b"UI", len(old)) + old, struct.pack("<2sH", b"UI", len(new)) + new, 1)
    path.write_bytes(changed.replace(group, struct.pack("<I", struct.unpack("<I", group)[0] + len(new) - len(old)), 1))
    return path


@pytest.mark.hardening(
    area="hostile files", tried="DICOM with impossible bits, enormous or no sizes, missing elements, false compression",
    outcome="refused before memory is taken, file named",
)  # fmt: skip
@pytest.mark.parametrize(
    "elements",
    [
        {"Rows": 65535, "Columns": 65535},
        {"Rows": 65535, "Columns": 65535, "syntax": RLELossless},
        {"Rows": 0},
        {"Rows": None},
        {"BitsStored": 0},
        {"BitsStored": 17},
        {"BitsAllocated": 3},
        {"BitsStored": None},
        {"SamplesPerPixel": 4},
        {"SamplesPerPixel": None},
        {"PhotometricInterpretation": None},
        {"PixelData": None},
        {"PixelData": b"\0\0"},
        {"PixelRepresentation": None},
        {"syntax": RLELossless},
        {"syntax": "1.2.840.10008.1.2.4.50"},
        {"syntax": "1.2.3.4"},
    ],
)
def test_dicom(tmp_path, modest, elements):
    path = write_dicom(tmp_path / "scan.dcm", **elements)
    refused(path, lambda: read_image(path))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.hardening(
    area="hostile files", tried="a DICOM file whose deflated content may unpack to gigabytes",
    outcome="refused before it is unpacked, file named",
)  # fmt: skip
def test_deflated_dicom(tmp_path, modest):
    path = write_dicom(tmp_path / "scan.dcm")
    with path.open("rb") as stream:
        plain = pydicom.dcmread(stream)
    plain.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    plain.save_as(path)
    assert read_image(path).shape == (8, 8, 3)
    with path.open("ab") as stream:
        squeeze = zlib.compressobj(9, wbits=-15)
        stream.write(squeeze.compress(bytes(2_000_000)) + os.urandom(1_100_000))
    refused(path, lambda: read_image(path), "may unpack to more than")
    refused(path, lambda: image_shape(path), "may unpack to more than")


# Pictures


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def looping_tiff():
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, "TIFF")
    content = bytearray(stream.getvalue())
    (first,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * entries, first)
    return bytes(content)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.hardening(
    area="hostile files", tried="PNG and TIFF with gigantic headers, PostScript and GIF under other names",
    outcome="refused before memory is taken, file named; no other program is started",
)  # fmt: skip
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.png", png_header(60_000, 60_000)),
        ("a.png", png_header(2**31 - 1, 2**31 - 1)),
        ("a.tiff", b"II*\0\x08\0\0\0\xff\xff"),
        ("a.png", POSTSCRIPT),
        ("a.jpg", b"GIF89a" + bytes(100)),
        ("a.png", b""),
        ("a.bmp", b"BM" + b"\xff" * 60),
    ],
)
def test_pictures(tmp_path, modest, monkeypatch, name, content):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("another program was started"))
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, lambda: read_image(path))
    refused(path, lambda: image_shape(path))


@pytest.mark.hardening(
    area="hostile files", tried="a TIFF whose list of pages leads back to its beginning",
    outcome="ends: read as one page or refused",
)  # fmt: skip
def test_looping_tiff(tmp_path):
    path = tmp_path / "loop.tiff"
    path.write_bytes(looping_tiff())
    try:
        assert read_image(path).shape == (4, 4, 3)
    except ValueError as error:
        assert path.name in str(error)
