import importlib.util
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageCms
from pydicom.sequence import Sequence

from medrobust_lib.data.decoding import as_rgb, fit_square, image_shape, left_out, read_image

SUBFILE, WIDTH, BITS, PHOTOMETRIC, SAMPLES, EXTRA, SAMPLE_FORMAT = 254, 256, 258, 262, 277, 338, 339  # TIFF's tags
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


spec = importlib.util.spec_from_file_location("dicom_files", Path(__file__).with_name("dicom_files.py"))
dicom_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dicom_files)
write_dicom = dicom_files.write_dicom


def png(pixels):
    """A PNG of 16-bit colour, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(*pages, order="<"):
    """A TIFF of the given tags and pixels, uncompressed, all of which Pillow cannot write."""
    content = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    for number, (tags, pixels) in enumerate(pages):
        bits, data = 8 * pixels.itemsize, pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        tags = {
            WIDTH: pixels.shape[1],
            257: pixels.shape[0],
            BITS: bits,
            259: 1,
            278: pixels.shape[0],
            279: len(data),
            **tags,
        }
        place = len(content) + 2 + 12 * (len(tags) + 1) + 4
        tags[273] = place
        table, lists = b"", b""
        for tag, value in sorted(tags.items()):
            values = value if isinstance(value, tuple) else (value,)
            packed = struct.pack(f"{order}{len(values)}I", *values)
            if len(values) > 1:
                lists, packed = lists + packed, struct.pack(f"{order}I", place + len(data) + len(lists))
            table += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
        last = number == len(pages) - 1
        link = 0 if last else place + len(data) + len(lists)
        content += struct.pack(f"{order}H", len(tags)) + table + struct.pack(f"{order}I", link) + data + lists
    return content


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
    np.testing.assert_array_equal(read_image(path, bit_depth=12)[..., 0], expected)
    np.testing.assert_array_equal(read_image(path, bit_depth=16), read_image(path))
    with pytest.raises(ValueError, match=rf"x{suffix} holds values from 0 to 4095; full scale is 1023"):
        read_image(path, bit_depth=10)


def test_depth_below_eight_bits_and_beyond_what_a_file_has_room_for(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(RAMP // 16).save(path)  # 0 to 15
    np.testing.assert_array_equal(read_image(path, bit_depth=4)[..., 0], RAMP // 16 * 17)
    np.testing.assert_array_equal(read_image(path, bit_depth=8), read_image(path))
    with pytest.raises(ValueError, match=r"x\.png holds values from 0 to 15; full scale is 7"):
        read_image(path, bit_depth=3)
    np.testing.assert_array_equal(read_image(path, bit_depth=12), read_image(path))
    for depth in (0, 33, True, 12.5, "12"):
        with pytest.raises(ValueError, match=rf"bit_depth={depth!r} is no whole number from 1 to 32: give the bits"):
            read_image(path, bit_depth=depth)


def test_sixteen_bit_colour_keeps_its_upper_bytes(tmp_path):
    colours = np.random.default_rng(1).integers(0, 65536, (5, 4, 3), dtype=np.uint16)
    path = tmp_path / "deep.png"
    path.write_bytes(png(colours))
    np.testing.assert_array_equal(read_image(path), colours >> 8)
    np.testing.assert_array_equal(read_image(path, bit_depth=16), colours >> 8)
    with pytest.raises(
        ValueError, match=r"deep\.png: of 16-bit colour only the upper 8 bits are read, so bit_depth=12"
    ):
        read_image(path, bit_depth=12)


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


# Several pictures in a file


def test_pages_of_one_size_are_refused(tmp_path):
    frames = [Image.fromarray(RAMP)] * 3
    frames[0].save(tmp_path / "stack.tiff", save_all=True, append_images=frames[1:])
    for reader in (read_image, image_shape):
        with pytest.raises(ValueError, match=r"stack\.tiff .*pages 1 and 2 of 3 are both 8 x 8 pixels.*split it first"):
            reader(tmp_path / "stack.tiff")


def test_first_picture_of_a_phone_and_of_an_animation(tmp_path):
    first, second = Image.fromarray(np.dstack([RAMP] * 3)), Image.new("RGB", (4, 4), "red")
    for name, kind, options in (
        ("phone.jpg", "MPO", {"quality": 100, "subsampling": 0}),
        ("move.gif", "GIF", {}),
        ("move.webp", "WEBP", {"lossless": True}),
        ("move.png", "PNG", {}),
    ):
        more = second if kind == "MPO" else second.resize((8, 8))
        first.save(tmp_path / name, kind, save_all=True, append_images=[more], **options)
        with Image.open(tmp_path / name) as picture:
            assert picture.n_frames == 2
        np.testing.assert_allclose(gray(tmp_path / name), RAMP, atol=1)
        assert image_shape(tmp_path / name) == (8, 8)
        assert left_out(tmp_path / name) == ("further pictures",)


@pytest.mark.parametrize("order", [1, -1], ids=["large first", "thumbnail first"])
def test_thumbnail_of_a_tiff_is_passed_over(tmp_path, order):
    pages = [({PHOTOMETRIC: 1}, RAMP), ({PHOTOMETRIC: 1, SUBFILE: 1}, RAMP[::2, ::2])]
    path = tmp_path / "x.tiff"
    path.write_bytes(tiff(*pages[::order]))
    np.testing.assert_array_equal(gray(path), RAMP)
    assert image_shape(path) == (8, 8) and left_out(path) == ("further pictures",)


@pytest.mark.parametrize("order", [1, -1], ids=["large first", "small first"])
def test_the_largest_page_counts_where_none_is_flagged(tmp_path, order):
    path, pages = tmp_path / "x.tiff", [Image.fromarray(RAMP[::step, ::step]) for step in (1, 2, 2, 4)][::order]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(gray(path), RAMP)
    assert image_shape(path) == (8, 8) and left_out(path) == ("further pictures",)
    pages = [pages[1], *2 * [Image.fromarray(RAMP)]]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="pages 2 and 3 of 3 are both 8 x 8 pixels"):
        read_image(path)


def test_pages_that_are_all_flagged(tmp_path):
    path = tmp_path / "x.tiff"
    path.write_bytes(tiff(*2 * [({PHOTOMETRIC: 1, SUBFILE: 1}, RAMP)]))
    np.testing.assert_array_equal(gray(path), RAMP)


# What a TIFF's tags say of its values


@pytest.mark.parametrize("bits", [8, 16])
def test_white_is_zero(tmp_path, bits):
    values = RAMP if bits == 8 else RAMP.astype(np.uint16) * 257 + 3
    path = tmp_path / "x.tiff"
    path.write_bytes(tiff(({PHOTOMETRIC: 0}, values)))
    expected = np.round((2**bits - 1 - values.astype(float)) / (2**bits - 1) * 255)
    np.testing.assert_array_equal(gray(path), expected)
    path.write_bytes(tiff(({PHOTOMETRIC: 1}, values)))
    np.testing.assert_array_equal(255 - gray(path), expected)


def test_white_is_zero_of_one_bit_and_with_a_depth(tmp_path):
    path = tmp_path / "x.tiff"
    path.write_bytes(tiff(({PHOTOMETRIC: 0, BITS: 1, WIDTH: 8}, np.array([[0b10110000], [1]], np.uint8))))
    assert (gray(path) == 255 - 255 * np.array([[1, 0, 1, 1, 0, 0, 0, 0], [0] * 7 + [1]])).all()
    path.write_bytes(tiff(({PHOTOMETRIC: 0}, np.array([[0, 1023, 4095]], np.uint16))))
    assert read_image(path, bit_depth=12)[0, :, 0].tolist() == [255, 191, 0]


def test_sixteen_bits_in_big_endian_order(tmp_path):
    values = RAMP.astype(np.uint16) * 257
    path = tmp_path / "x.tiff"
    path.write_bytes(tiff(({PHOTOMETRIC: 1}, values), order=">"))
    np.testing.assert_array_equal(gray(path), RAMP)


def test_packed_twelve_bits_fill_their_own_range(tmp_path):
    values, path = [0, 1000, 2048, 4095], tmp_path / "x.tiff"
    packed = int("".join(f"{value:012b}" for value in values), 2).to_bytes(6, "big")
    path.write_bytes(tiff(({PHOTOMETRIC: 1, BITS: 12, WIDTH: 4}, np.frombuffer(packed, np.uint8)[None])))
    assert gray(path)[0].tolist() == [round(value / 4095 * 255) for value in values]
    np.testing.assert_array_equal(read_image(path, bit_depth=16), read_image(path))


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_signed_values_are_refused_below_zero(tmp_path, dtype):
    path = tmp_path / "x.tiff"
    path.write_bytes(tiff(({PHOTOMETRIC: 1, SAMPLE_FORMAT: 2}, np.array([[-3, 5]], dtype))))
    with pytest.raises(ValueError, match=r"x\.tiff holds values from -3 to 5; full scale is (255|65535)"):
        read_image(path)
    path.write_bytes(tiff(({PHOTOMETRIC: 1, SAMPLE_FORMAT: 2}, np.array([[0, 127]], dtype))))
    assert gray(path).tolist() == [[0, 127 if dtype == np.int8 else 0]]
    assert read_image(path, bit_depth=7)[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("extra", [1, 2], ids=["multiplied by alpha", "alpha apart"])
def test_gray_with_alpha(tmp_path, extra):
    pixels = np.array([[[100, 255], [50, 128]]], np.uint8)
    path = tmp_path / "x.tiff"
    path.write_bytes(tiff(({PHOTOMETRIC: 1, BITS: (8, 8), SAMPLES: 2, EXTRA: extra}, pixels)))
    np.testing.assert_allclose(gray(path), [[100, 50 if extra == 2 else 50 / 128 * 255]], atol=1)
    assert left_out(path) == ("transparency",)
    (tmp_path / "deep.png").write_bytes(png(pixels.astype(np.uint16) * 257))
    assert gray(tmp_path / "deep.png").tolist() == [[100, 50]]


def test_colour_models_other_than_rgb(tmp_path):
    """Against closed forms: D50 white and black in CIELAB, and ink on white paper."""
    path = tmp_path / "lab.tiff"
    path.write_bytes(
        tiff(({PHOTOMETRIC: 8, BITS: (8, 8, 8), SAMPLES: 3}, np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8)))
    )
    np.testing.assert_allclose(read_image(path), [[[255] * 3, [0] * 3]], atol=1)
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, 8:] = [255, 0, 0, 0]
    for name in ("ink.tiff", "ink.jpg"):  # the JPEG is inverted, as Adobe writes it
        Image.fromarray(ink, "CMYK").save(tmp_path / name)
        np.testing.assert_allclose(read_image(tmp_path / name)[0, [0, 15]], [[255] * 3, [0, 255, 255]], atol=3)


def test_what_is_left_out_is_told(tmp_path):
    path, colours = tmp_path / "x.png", Image.fromarray(np.dstack([RAMP] * 3))
    colours.save(path)
    assert left_out(path) == ()
    exif = Image.Exif()
    exif[274] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    colours.save(path, exif=exif, icc_profile=profile, dpi=(300, 100), transparency=(0, 0, 0))
    np.testing.assert_array_equal(gray(path), RAMP)
    assert left_out(path) == ("transparency", "EXIF rotation", "colour profile", "unequal pixel sides")
    colours.save(path, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert left_out(path) == ()
    dicom = write_dicom(tmp_path / "x.dcm", RAMP, PixelSpacing=["0.5", "0.5"])
    assert left_out(dicom) == ()
    assert left_out(write_dicom(dicom, RAMP, PixelAspectRatio=["4", "3"])) == ("unequal pixel sides",)
    with pytest.raises(FileNotFoundError, match="no image file at"):
        left_out(tmp_path / "none.png")


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


def test_fit_square_keeps_the_centre_of_the_long_edge():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    np.testing.assert_array_equal(fit_square(image, 40), np.full((40, 40, 3), 200))
    assert fit_square(image, 20).shape == (20, 20, 3)
    assert fit_square(image.transpose(1, 0, 2), 33).shape == (33, 33, 3)
    square = image[:, :40]
    assert fit_square(square, 40) is square


@pytest.mark.parametrize(
    ("shape", "channels"), [((4, 5), 3), ((4, 5, 1), 3), ((4, 5, 2), 2), ((4, 5, 3), 3), ((4, 5, 4), 4)]
)
def test_no_channel_of_an_image_disappears(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    made = as_rgb(image)
    assert made.shape == (4, 5, channels)
    np.testing.assert_array_equal(made[..., :1].ravel(), image.reshape(4, 5, -1)[..., :1].ravel())
