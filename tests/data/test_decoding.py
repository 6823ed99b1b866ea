import re
import struct
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, SecondaryCaptureImageStorage, generate_uid

from medrobust_lib.data.decoding import fit_square, image_shape, read_image

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def write_dicom(path, pixels, *, photometric="MONOCHROME2", bits=None, **elements):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    record = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    record.SOPClassUID, record.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    record.Rows, record.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    record.SamplesPerPixel = 3 if colour else 1
    if colour:
        record.PlanarConfiguration = 0
    record.PhotometricInterpretation = photometric
    record.BitsAllocated = pixels.dtype.itemsize * 8
    record.BitsStored = bits or record.BitsAllocated
    record.HighBit = record.BitsStored - 1
    record.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(record, name, value)
    record.PixelData = pixels.tobytes()
    record.save_as(path, enforce_file_format=True)
    return path


def png(pixels):
    """A PNG of 16-bit colour, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def gray(path):
    image = read_image(path)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    assert (image == image[:, :, :1]).all()
    return image[:, :, 0]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".bmp"])
def test_gray_files_are_repeated_over_rgb(tmp_path, suffix):
    Image.fromarray(RAMP).save(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(gray(tmp_path / f"x{suffix}"), RAMP)


def test_rgb_palette_and_alpha(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), colours)
    Image.fromarray(colours).quantize(4).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == (9, 7, 3)
    Image.fromarray(np.dstack([colours, np.full((9, 7), 3, np.uint8)])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), colours)
    assert image_shape(tmp_path / "rgb.png") == (9, 7)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_divided_by_257(tmp_path, suffix):
    values = np.array([[0, 257], [32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(gray(tmp_path / f"x{suffix}"), [[0, 1], [128, 255]])


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_depth_states_full_scale(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(np.array([[0, 1024], [2048, 4095]], np.uint16)).save(path)
    assert gray(path).tolist() == [[0, 4], [8, 16]]
    expected = np.round(np.array([[0, 1024], [2048, 4095]]) / 4095 * 255)
    np.testing.assert_array_equal(read_image(path, depth=12)[..., 0], expected)
    np.testing.assert_array_equal(read_image(path, depth=16), read_image(path))
    with pytest.raises(ValueError, match=rf"x{suffix} holds values from 0 to 4095; full scale is 1023"):
        read_image(path, depth=10)


def test_depth_below_eight_bits_and_where_it_cannot_be(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(RAMP // 16).save(path)  # 0 to 15
    np.testing.assert_array_equal(read_image(path, depth=4)[..., 0], RAMP // 16 * 17)
    np.testing.assert_array_equal(read_image(path, depth=8), read_image(path))
    with pytest.raises(ValueError, match=r"x\.png holds values from 0 to 15; full scale is 7"):
        read_image(path, depth=3)
    with pytest.raises(ValueError, match=r"x\.png holds 8 bits, fewer than depth=12; leave depth out"):
        read_image(path, depth=12)
    for depth in (0, 33, True, 12.5, "12"):
        with pytest.raises(ValueError, match=rf"depth={depth!r}: give the bits"):
            read_image(path, depth=depth)


def test_sixteen_bit_colour_keeps_its_upper_bytes(tmp_path):
    colours = np.random.default_rng(1).integers(0, 65536, (5, 4, 3), dtype=np.uint16)
    path = tmp_path / "deep.png"
    path.write_bytes(png(colours))
    np.testing.assert_array_equal(read_image(path), colours >> 8)
    np.testing.assert_array_equal(read_image(path, depth=16), colours >> 8)
    with pytest.raises(ValueError, match=r"deep\.png: of 16-bit colour only the upper 8 bits are read, so depth=12"):
        read_image(path, depth=12)


def test_float_and_wide_integer_files_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match=r"f.tiff holds floating-point values"):
        read_image(tmp_path / "f.tiff")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "i.tiff")
    with pytest.raises(ValueError, match=r"i.tiff holds values from 70000 to 70000"):
        read_image(tmp_path / "i.tiff")


def test_corrupt_and_truncated_files_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is not a readable image")):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"text\.png is not a readable image"):
        image_shape(tmp_path / "text.png")
    for reader in (read_image, image_shape):
        with pytest.raises(FileNotFoundError, match=re.escape(f"no image file at {tmp_path / 'none.png'}")):
            reader(tmp_path / "none.png")


def test_image_stacks_are_refused(tmp_path):
    frames = [Image.fromarray(RAMP)] * 3
    frames[0].save(tmp_path / "stack.tiff", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"stack.tiff holds 3 frames; one image per file"):
        read_image(tmp_path / "stack.tiff")


def test_dicom_eight_bit_is_taken_as_stored(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", RAMP // 2)
    np.testing.assert_array_equal(gray(path), RAMP // 2)
    assert image_shape(path) == (8, 8)


def test_dicom_monochrome1_is_inverted(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", RAMP, photometric="MONOCHROME1")
    np.testing.assert_array_equal(gray(path), 255 - RAMP)


def test_dicom_is_recognised_without_a_suffix(tmp_path):
    write_dicom(tmp_path / "IM0001", RAMP)
    np.testing.assert_array_equal(gray(tmp_path / "IM0001"), RAMP)


def test_dicom_window_after_rescale(tmp_path):
    # Lung-like CT values: stored 0..4095 means -1024..3071; window centre 40, width 400 shows -160..240.
    stored = np.array([[0, 864], [1064, 1264], [4095, 1164]], np.uint16)
    path = write_dicom(
        tmp_path / "x.dcm",
        stored,
        bits=12,
        RescaleSlope="1",
        RescaleIntercept="-1024",
        WindowCenter="40",
        WindowWidth="400",
    )
    np.testing.assert_allclose(gray(path), [[0, 0], [128, 255], [255, 191]], atol=1)


def test_dicom_window_means_the_same_for_every_image(tmp_path):
    window = {"bits": 12, "WindowCenter": "2048", "WindowWidth": "4096"}
    dim = write_dicom(tmp_path / "dim.dcm", np.array([[0, 1024]], np.uint16), **window)
    bright = write_dicom(tmp_path / "bright.dcm", np.array([[1024, 4095]], np.uint16), **window)
    assert gray(dim)[0, 1] == gray(bright)[0, 0] == 64


def test_dicom_first_of_several_windows_is_used(tmp_path):
    stored = np.array([[0, 100, 4095]], np.uint16)
    path = write_dicom(tmp_path / "x.dcm", stored, bits=12, WindowCenter=["50", "2048"], WindowWidth=["100", "4096"])
    assert gray(path).tolist() == [[0, 255, 255]]


def test_dicom_without_a_window_is_stretched_from_minimum_to_maximum(tmp_path):
    stored = np.array([[-100, 0, 100]], np.int16)
    assert gray(write_dicom(tmp_path / "x.dcm", stored)).tolist() == [[0, 128, 255]]
    assert gray(write_dicom(tmp_path / "flat.dcm", np.full((2, 2), 900, np.uint16))).max() == 0


def test_dicom_lookup_table_may_invert(tmp_path):
    table = pydicom.Dataset()
    table.LUTDescriptor = [4, 0, 8]
    table.add(pydicom.DataElement("LUTData", "US", [255, 170, 85, 0]))
    stored = np.array([[0, 1, 2, 3]], np.uint16)
    path = write_dicom(tmp_path / "x.dcm", stored, bits=12, VOILUTSequence=Sequence([table]))
    assert gray(path).tolist() == [[255, 170, 85, 0]]


def test_dicom_sigmoid_window(tmp_path):
    stored = np.array([[0, 2048, 4095]], np.uint16)
    path = write_dicom(
        tmp_path / "x.dcm", stored, bits=12, WindowCenter="2048", WindowWidth="512", VOILUTFunction="SIGMOID"
    )
    assert gray(path).tolist() == [[0, 128, 255]]


def test_dicom_colour(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_image(write_dicom(tmp_path / "x.dcm", colours, photometric="RGB")), colours)
    path = write_dicom(tmp_path / "deep.dcm", colours.astype(np.uint16), photometric="RGB")
    with pytest.raises(ValueError, match=r"deep\.dcm: RGB data of 16 bits are not supported"):
        read_image(path)


def test_dicom_several_frames_are_refused(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", np.stack([RAMP] * 4), NumberOfFrames=4)
    with pytest.raises(ValueError, match=re.escape(f"{path} holds 4 frames; one image per file is expected")):
        read_image(path)


def test_dicom_damage_is_named(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", RAMP)
    whole = path.read_bytes()
    for content in (b"nothing of the kind", whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path} is not a readable DICOM image")):
            read_image(path)


def test_dicom_without_a_decoder_says_what_to_install(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", RAMP)
    record = pydicom.dcmread(path)
    record.file_meta.TransferSyntaxUID = JPEGLSLossless
    record.PixelData = encapsulate([b"\xff\xd8 no such stream"])
    record["PixelData"].is_undefined_length = True
    record.save_as(path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is compressed in a way .*; install pylibjpeg"):
        read_image(path)


def test_fit_square_keeps_the_centre_of_the_long_edge():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    np.testing.assert_array_equal(fit_square(image, 40), np.full((40, 40, 3), 200))
    assert fit_square(image, 20).shape == (20, 20, 3)
    assert fit_square(image.transpose(1, 0, 2), 33).shape == (33, 33, 3)
    square = image[:, :40]
    assert fit_square(square, 40) is square
