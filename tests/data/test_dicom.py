"""DICOM to gray: against pydicom's own tables and windows where it has them, else against the standard's formula."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from medrobust_lib.data.decoding import image_shape, left_out, read_image

spec = importlib.util.spec_from_file_location("dicom_files", Path(__file__).with_name("dicom_files.py"))
dicom_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dicom_files)
write_dicom = dicom_files.write_dicom

CT = np.random.default_rng(3).integers(0, 4096, (9, 7)).astype(np.uint16)
HU = {"bits": 12, "RescaleSlope": "1", "RescaleIntercept": "-1024"}
BYTES = np.arange(256, dtype=np.uint8).reshape(16, 16)


def gray(path):
    image = read_image(path)
    assert image.dtype == np.uint8 and image.shape[2] == 3 and (image == image[:, :, :1]).all()
    return image[:, :, 0]


def item(**elements):
    dataset = pydicom.Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def table(entries, *, first=0, bits=16, vr="US"):
    lut = item(LUTDescriptor=[len(entries) % 65536, first % 65536, bits], ModalityLUTType="US")
    if vr == "OW":
        entries = np.asarray(entries, "<u2").tobytes()
    lut.add(pydicom.DataElement("LUTData", vr, entries if vr == "OW" else np.asarray(entries).tolist()))
    return Sequence([lut])


def linear(values, center, width):
    """PS3.3 C.11.2.1.2.1."""
    return np.round(255 * np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1))


# Windows


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("slope", ["1", "-2", "0.5"])
def test_window_equals_pydicom(tmp_path, function, slope):
    elements = {"VOILUTFunction": function} if function else {}
    path = write_dicom(
        tmp_path / "x.dcm", CT, bits=12, RescaleSlope=slope, RescaleIntercept="-1024", WindowCenter="40",
        WindowWidth="400", **elements,
    )  # fmt: skip
    record = pydicom.dcmread(path)
    shown = apply_windowing(apply_modality_lut(record.pixel_array, record), record)
    low, high = np.array([0, 4095]) * float(slope) - 1024
    np.testing.assert_array_equal(gray(path), np.round(255 * (shown - low) / (high - low)))


@pytest.mark.parametrize(
    "centers, widths, pair",
    [
        ("40", "400", (40, 400)),
        ("40", None, None),
        (None, "400", None),
        ("40", "", None),
        ("", "", None),
        (["40", "600"], "400", (40, 400)),
        ("40", ["400", "1500"], (40, 400)),
        (["", "600"], ["400", "1500"], (600, 1500)),
        (["40", "600"], ["", "1500"], (600, 1500)),
        (["40", "600"], ["0", "1500"], (600, 1500)),
        ("40", "0.5", None),
        ("40", "-400", None),
    ],
)
def test_first_complete_window_counts(tmp_path, centers, widths, pair):
    window = {"WindowCenter": centers, "WindowWidth": widths}
    window = {name: value for name, value in window.items() if value is not None}
    path = write_dicom(tmp_path / "x.dcm", CT, **HU, **window)
    plain = gray(write_dicom(tmp_path / "plain.dcm", CT, **HU))
    assert len(np.unique(plain)) > 10
    np.testing.assert_array_equal(gray(path), plain if pair is None else linear(CT - 1024.0, *pair))


def test_width_below_one_where_the_function_is_not_linear(tmp_path):
    stored, window = np.array([[0, 100, 200]], np.uint16), {"WindowCenter": "100", "WindowWidth": "0.5"}
    exact = write_dicom(tmp_path / "x.dcm", stored, bits=12, VOILUTFunction="LINEAR_EXACT", **window)
    assert gray(exact).tolist() == [[0, 128, 255]]
    one = write_dicom(tmp_path / "y.dcm", stored, bits=12, WindowCenter="100", WindowWidth="1")
    assert gray(one).tolist() == [[0, 255, 255]]  # x > c - 0.5 is white, PS3.3 C.11.2.1.2.1
    wrong = write_dicom(tmp_path / "z.dcm", stored, bits=12, VOILUTFunction="CUBIC", **window)
    with pytest.raises(ValueError, match=r"z\.dcm .*CUBIC"):
        gray(wrong)


def test_functional_groups_of_a_one_frame_enhanced_image(tmp_path):
    rescale = item(RescaleSlope="2", RescaleIntercept="-1024", RescaleType="HU")
    window = item(WindowCenter="40", WindowWidth="400")
    shared = item(PixelValueTransformationSequence=Sequence([rescale]), FrameVOILUTSequence=Sequence([window]))
    own = item(FrameVOILUTSequence=Sequence([item(WindowCenter=["600", "40"], WindowWidth=["1500", "400"])]))
    common = {"bits": 12, "NumberOfFrames": 1, "SOPClassUID": EnhancedCTImageStorage}
    path = write_dicom(tmp_path / "x.dcm", CT, SharedFunctionalGroupsSequence=Sequence([shared]), **common)
    np.testing.assert_array_equal(gray(path), linear(CT * 2.0 - 1024, 40, 400))
    path = write_dicom(
        tmp_path / "y.dcm", CT, SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence([own]), **common,
    )  # fmt: skip
    np.testing.assert_array_equal(gray(path), linear(CT * 2.0 - 1024, 600, 1500))
    empty = write_dicom(
        tmp_path / "z.dcm", CT, SharedFunctionalGroupsSequence=Sequence([]),
        PerFrameFunctionalGroupsSequence=Sequence([item()]), **common,
    )  # fmt: skip
    np.testing.assert_array_equal(gray(empty), gray(write_dicom(tmp_path / "plain.dcm", CT, bits=12)))


@pytest.mark.parametrize(
    ("elements", "told"),
    [
        ({"bits": 12}, True),
        ({"bits": 9}, True),
        ({"bits": 8}, False),
        ({"bits": 12, "photometric": "MONOCHROME1", "WindowCenter": "40"}, True),
        ({"bits": 12, "WindowCenter": "40", "WindowWidth": "0"}, True),
        ({"bits": 12, "WindowCenter": "40", "WindowWidth": "400"}, False),
        ({"bits": 12, "VOILUTSequence": table(np.arange(4096))}, False),
        (
            {
                "bits": 12,
                "SharedFunctionalGroupsSequence": Sequence(
                    [item(FrameVOILUTSequence=Sequence([item(WindowCenter="40", WindowWidth="400")]))]
                ),
            },
            False,
        ),
    ],
)
def test_a_stretch_by_the_image_s_own_range_is_told(tmp_path, elements, told):
    stored = CT % 2 ** elements["bits"] // 2  # half of the range
    path = write_dicom(tmp_path / "x.dcm", stored, **elements)
    phrase = "absolute brightness (no window: stretched by each image's own range)"
    assert left_out(path) == ((phrase,) if told else ())
    path = write_dicom(tmp_path / "half.dcm", stored // 2, **elements)
    own = np.round(255 * ((stored // 2).astype(float) - (stored // 2).min()) / np.ptp(stored // 2))
    own = 255 - own if "photometric" in elements else own
    assert (gray(path) == own).all() == told
    path = write_dicom(tmp_path / "x.dcm", stored, **elements, PixelSpacing=["1", "2"])
    assert left_out(path) == ("unequal pixel sides", *((phrase,) if told else ()))


# Modality


def test_rescale_of_which_only_half_is_stated(tmp_path):
    window = {"bits": 12, "WindowCenter": "40", "WindowWidth": "400"}
    for half in ({"RescaleIntercept": "-1024"}, {"RescaleIntercept": "-1024", "RescaleSlope": ""}):
        np.testing.assert_array_equal(
            gray(write_dicom(tmp_path / "x.dcm", CT, **half, **window)), linear(CT - 1024.0, 40, 400)
        )
    path = write_dicom(tmp_path / "x.dcm", CT, RescaleSlope="2", **window)
    np.testing.assert_array_equal(gray(path), linear(CT * 2.0, 40, 400))


def test_eight_bits_without_a_window_pass_through_the_modality_lut(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", BYTES, RescaleSlope="-1", RescaleIntercept="255")
    np.testing.assert_array_equal(gray(path), 255 - BYTES)
    path = write_dicom(tmp_path / "x.dcm", BYTES // 4 + 50, RescaleSlope="3", RescaleIntercept="-10")
    np.testing.assert_array_equal(gray(path), BYTES // 4 + 50)  # of the whole range, not of this image
    path = write_dicom(tmp_path / "x.dcm", BYTES, ModalityLUTSequence=table(np.arange(256)[::-1] * 16, bits=16))
    record = pydicom.dcmread(path)
    np.testing.assert_array_equal(gray(path), np.round(apply_modality_lut(record.pixel_array, record) / 16))
    signed = BYTES.view(np.int8)
    np.testing.assert_array_equal(gray(write_dicom(tmp_path / "x.dcm", signed)), signed.astype(int) + 128)


def test_rescale_that_is_not_finite_is_refused(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", CT, bits=12, RescaleSlope="1e400", RescaleIntercept="0")
    with pytest.raises(ValueError, match=r"x\.dcm is not a readable DICOM image: its rescale or window is not finite"):
        gray(path)


# Look-up tables


@pytest.mark.parametrize("vr", ["US", "OW"])
def test_table_whose_entries_end_below_its_declared_bits(tmp_path, vr):
    lut = table(np.arange(4096), vr=vr)
    path = write_dicom(tmp_path / "x.dcm", CT, bits=12, VOILUTSequence=lut)
    np.testing.assert_array_equal(gray(path), np.round(CT / 4095 * 255))
    full = write_dicom(tmp_path / "y.dcm", CT, bits=12, VOILUTSequence=table(np.arange(4096) * 16, vr=vr))
    np.testing.assert_allclose(gray(full), CT / 4095 * 255, atol=0.51)


def test_table_of_eight_bits_with_more_than_256_entries(tmp_path):
    lut = table(np.arange(4096) // 16, bits=8, vr="OW")
    np.testing.assert_array_equal(gray(write_dicom(tmp_path / "x.dcm", CT, bits=12, VOILUTSequence=lut)), CT // 16)
    lut[0].LUTData = (np.arange(4096) // 16).astype(np.uint8).tobytes()  # two to a word
    np.testing.assert_array_equal(gray(write_dicom(tmp_path / "x.dcm", CT, bits=12, VOILUTSequence=lut)), CT // 16)


def test_table_that_begins_below_zero(tmp_path):
    lut = table(np.arange(4096), first=-1024, bits=12)
    path = write_dicom(tmp_path / "x.dcm", CT, **HU, VOILUTSequence=lut)
    np.testing.assert_array_equal(gray(path), np.round(CT / 4095 * 255))


def test_table_without_its_entries_is_named(tmp_path):
    for keyword, name in (("LUTData", r"LUT Data \(0028,3006\)"), ("LUTDescriptor", r"LUT Descriptor \(0028,3002\)")):
        lut = table(np.arange(4096))
        delattr(lut[0], keyword)
        path = write_dicom(tmp_path / "x.dcm", CT, bits=12, VOILUTSequence=lut)
        with pytest.raises(ValueError, match=rf"x\.dcm .*its data set has no {name}"):
            gray(path)


# Padding


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("ends", [(0, None), (4000, 4095), (4095, 4000)])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": "2000", "WindowWidth": "1000"}])
def test_padding_is_black_and_left_out_of_the_stretch(tmp_path, photometric, ends, window):
    stored = np.array([[1500, 1700, 2000, 2400], [ends[0], ends[1] or ends[0], 2000, 2500]], np.uint16)
    limit = {"PixelPaddingRangeLimit": ends[1]} if ends[1] else {}
    shown = gray(write_dicom(
        tmp_path / "x.dcm", stored, bits=12, photometric=photometric, PixelPaddingValue=ends[0], **limit, **window
    ))  # fmt: skip
    expected = linear(stored, 2000, 1000) if window else np.round(255 * np.clip((stored - 1500.0) / 1000, 0, 1))
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    expected[1, :2] = 0
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize("written", [-2000, 63536])
def test_padding_of_signed_values_with_either_sign(tmp_path, written):
    stored = np.array([[-2000, -1000, 0, 1000]], np.int16)
    path = write_dicom(tmp_path / "x.dcm", stored)
    record = pydicom.dcmread(path)
    record.add(pydicom.DataElement("PixelPaddingValue", "SS" if written < 0 else "US", written))
    record.save_as(path)
    assert gray(path).tolist() == [[0, 0, 128, 255]]


@pytest.mark.parametrize(
    ("kind", "bits", "ends", "padded"),
    [
        (np.uint8, 8, [-2000], []),
        (np.uint8, 8, [63536], []),
        (np.uint8, 8, [300], []),
        (np.uint8, 8, [-2000, -1000], []),
        (np.uint8, 8, [63536, 64536], []),
        (np.uint8, 8, [240, 300], range(240, 256)),
        (np.int8, 8, [200], []),
        (np.uint16, 12, [-2000], []),
        (np.uint16, 12, [-2000, 0], [0]),
        (np.uint16, 12, [0, -2000], [0]),
        (np.uint16, 12, [63536, 0], [0]),
        (np.uint16, 12, [4000, 65535], range(4000, 4096)),
        (np.uint16, 16, [-2000], [63536]),
        (np.uint16, 16, [-2000, -1000], range(63536, 64537)),
        (np.uint16, 16, [0, 40000], range(40001)),
        (np.int16, 16, [63536, 0], range(-2000, 1)),
        (np.int16, 16, [64536, 63536], range(-2000, -999)),
        (np.int16, 12, [63536], [-2000]),
        (np.uint32, 17, [-2000, 3], range(4)),
        (np.int32, 17, [63536], [63536]),
    ],
)
def test_padding_that_the_pixels_cannot_hold_pads_nothing_else(tmp_path, kind, bits, ends, padded):
    lowest = -(2 ** (bits - 1)) if np.dtype(kind).kind == "i" else 0
    stored = np.arange(lowest, lowest + 2**bits).reshape(16, -1)
    record = pydicom.dcmread(write_dicom(tmp_path / "x.dcm", stored.astype(kind), bits=bits))
    for keyword, end in zip(("PixelPaddingValue", "PixelPaddingRangeLimit"), ends, strict=False):
        record.add(pydicom.DataElement(keyword, "SS" if min(ends) < 0 else "US", end))
    record.WindowCenter, record.WindowWidth, record.VOILUTFunction = str(lowest - 5), "1", "LINEAR"  # all white
    record.save_as(tmp_path / "x.dcm")
    shown = gray(tmp_path / "x.dcm")
    assert stored[shown == 0].tolist() == list(padded) and set(np.unique(shown)) <= {0, 255}


def test_nothing_but_padding_is_black(tmp_path):
    path = write_dicom(
        tmp_path / "x.dcm", np.full((3, 3), 7, np.uint16), photometric="MONOCHROME1", PixelPaddingValue=7
    )
    assert gray(path).max() == 0


# Bits, polarity, colour


def test_bits_above_the_stored_ones_are_no_part_of_the_values(tmp_path):
    noise = np.random.default_rng(4).integers(0, 16, CT.shape).astype(np.uint16) << 12  # overlays of old files
    path = write_dicom(tmp_path / "x.dcm", CT | noise, bits=12)
    np.testing.assert_array_equal(gray(path), gray(write_dicom(tmp_path / "plain.dcm", CT, bits=12)))
    with pytest.raises(ValueError, match=r"x\.dcm .*12 of 16 bits stored, the highest 15"):
        gray(write_dicom(tmp_path / "x.dcm", CT << 4, bits=12, HighBit=15))


def test_inverse_presentation_is_inverted_once(tmp_path):
    for photometric, shape, inverted in (
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
    ):
        path = write_dicom(tmp_path / "x.dcm", BYTES, photometric=photometric, PresentationLUTShape=shape)
        np.testing.assert_array_equal(gray(path), 255 - BYTES if inverted else BYTES)


def test_big_endian_and_implicit_files(tmp_path):
    window = {"WindowCenter": "40", "WindowWidth": "400"}
    path = write_dicom(tmp_path / "x.dcm", CT, **HU, **window)
    expected = gray(path)
    record = pydicom.dcmread(path)
    for syntax, order in ((ImplicitVRLittleEndian, "<"), (ExplicitVRBigEndian, ">")):
        record.file_meta.TransferSyntaxUID = syntax
        record.PixelData = CT.astype(f"{order}u2").tobytes()
        pydicom.dcmwrite(path, record, implicit_vr=order == "<", little_endian=order == "<")
        np.testing.assert_array_equal(gray(path), expected)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_colour_of_any_depth_and_both_layouts(tmp_path, bits):
    colours = np.random.default_rng(0).integers(0, 2**bits, (6, 5, 3)).astype(np.uint8 if bits == 8 else np.uint16)
    expected = np.round(colours / (2**bits - 1) * 255)
    path = write_dicom(tmp_path / "x.dcm", colours, bits=bits, photometric="RGB")
    np.testing.assert_array_equal(read_image(path), expected)
    planes = colours.transpose(2, 0, 1).tobytes()
    path = write_dicom(
        tmp_path / "x.dcm", colours, bits=bits, photometric="RGB", PlanarConfiguration=1, PixelData=planes
    )
    np.testing.assert_array_equal(read_image(path), expected)


def test_ybr_against_the_formula(tmp_path):
    ybr = np.array([[[81, 90, 240], [145, 54, 34], [128, 128, 128]]], np.uint8)
    y, b, r = (ybr[..., channel].astype(float) - (0 if channel == 0 else 128) for channel in range(3))
    expected = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1)  # PS3.3 C.7.6.3.1.2
    path = write_dicom(tmp_path / "x.dcm", ybr, photometric="YBR_FULL")
    np.testing.assert_allclose(read_image(path), np.clip(expected, 0, 255), atol=0.51)
    for photometric in ("YBR_PARTIAL_422", "HSV"):
        with pytest.raises(ValueError, match=rf"x\.dcm: {photometric} data of 3 x 8 bits are not supported"):
            read_image(write_dicom(tmp_path / "x.dcm", ybr, photometric=photometric))


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes(tmp_path, bits):
    ramp = np.arange(256).astype(np.uint8 if bits == 8 else np.uint16) * (1 if bits == 8 else 257)
    colours = {"Red": ramp, "Green": ramp[::-1], "Blue": ramp // 2}
    elements = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, bits] for name in colours}
    elements |= {f"{name}PaletteColorLookupTableData": values.tobytes() for name, values in colours.items()}
    path = write_dicom(tmp_path / "x.dcm", BYTES, photometric="PALETTE COLOR", **elements)
    np.testing.assert_array_equal(read_image(path), np.stack([BYTES, 255 - BYTES, np.round(BYTES / 2 - 0.25)], -1))
    with pytest.raises(ValueError, match=r"y\.dcm is not a readable DICOM image: No suitable Palette"):
        read_image(write_dicom(tmp_path / "y.dcm", BYTES, photometric="PALETTE COLOR"))


# Files that are not as they should be


@pytest.mark.parametrize("suffix", [".dcm", ""])
@pytest.mark.parametrize("kept", ["elements", "elements with their meta information"])
def test_files_without_a_preamble_are_read(tmp_path, suffix, kept):
    path = write_dicom(tmp_path / f"scan{suffix}", CT, **HU, WindowCenter="40", WindowWidth="400")
    whole = path.read_bytes()
    start = 132 if "meta" in kept else 132 + 12 + int.from_bytes(whole[140:144], "little")
    expected = gray(path)
    path.write_bytes(whole[start:])
    np.testing.assert_array_equal(gray(path), expected)
    assert image_shape(path) == CT.shape


def test_files_that_are_no_dicom_say_so(tmp_path):
    path = tmp_path / "x.dcm"
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(200)):
        path.write_bytes(content)
        for reader in (read_image, image_shape):
            with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not .* it does not begin as DICOM does"):
                reader(path)


@pytest.mark.parametrize(
    "keyword, name",
    [
        ("Rows", "Rows (0028,0010)"),
        ("Columns", "Columns (0028,0011)"),
        ("SamplesPerPixel", "Samples per Pixel (0028,0002)"),
        ("PhotometricInterpretation", "Photometric Interpretation (0028,0004)"),
        ("BitsAllocated", "Bits Allocated (0028,0100)"),
        ("BitsStored", "Bits Stored (0028,0101)"),
        ("PixelRepresentation", "Pixel Representation (0028,0103)"),
        ("PixelData", "Pixel Data (7FE0,0010)"),
    ],
)
def test_missing_elements_are_named(tmp_path, keyword, name):
    path = write_dicom(tmp_path / "x.dcm", CT, bits=12, **{keyword: None})
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert f"{path} is not a readable DICOM image: its Secondary Capture Image Storage has no {name}" in str(
        caught.value
    )
    assert "attribute" not in str(caught.value)


def test_files_of_another_kind_are_named(tmp_path):
    path = write_dicom(tmp_path / "DICOMDIR", CT, Rows=None, PixelData=None, SOPClassUID=MediaStorageDirectoryStorage)
    with pytest.raises(ValueError, match=r"its Media Storage Directory Storage has no Rows"):
        read_image(path)
    values = np.ones((3, 3), np.float32)
    path = write_dicom(tmp_path / "x.dcm", values, PixelData=None, FloatPixelData=values.tobytes())
    with pytest.raises(ValueError, match=r"x\.dcm .*floating-point values of unknown range"):
        read_image(path)


def test_icon_is_not_taken_for_the_image(tmp_path):
    icon = item(
        Rows=2, Columns=2, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=8, BitsStored=8,
        HighBit=7, PixelRepresentation=0, PixelData=bytes(4),
    )  # fmt: skip
    path = write_dicom(tmp_path / "x.dcm", BYTES, IconImageSequence=Sequence([icon]))
    np.testing.assert_array_equal(gray(path), BYTES)
    with pytest.raises(ValueError, match=r"x\.dcm .*no Pixel Data"):
        gray(write_dicom(path, BYTES, IconImageSequence=Sequence([icon]), PixelData=None))
