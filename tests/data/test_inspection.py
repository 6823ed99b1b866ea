"""What is said of a set before anything is measured: right values, and nothing about sets that are in order."""

import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image

import medrobust_lib as mr
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.inspection import close_names, learned_too, near_copies, seen_in
from medrobust_lib.data.registry import open_split
from medrobust_lib.phantoms import MODALITIES

NOISE = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


def scenes(n, side=64, seed=0):
    """Smooth images that differ as photographs do, uint8 [n, side, side, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 6, 6), dtype=np.uint8)
    grown = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse]
    return np.repeat(np.stack(grown)[..., None], 3, axis=3)


def seen(images, labels=None, shapes=()):
    labels = np.zeros(len(images), np.int64) if labels is None else np.array(labels)
    return seen_in(images, labels, names=[f"{k}.png" for k in range(len(images))], shapes=shapes)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def again(image, *, quality, scale=1.0):
    """The image as it comes out of a JPEG file, of another size if wanted."""
    height, width = image.shape[:2]
    stream = io.BytesIO()
    small = Image.fromarray(image).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    small.save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).resize((width, height), Image.Resampling.BICUBIC))


def by_hand(images, **changes):
    fields = {
        "id": "mine", "split": "test", "images": images, "labels": np.arange(len(images)) % 2, "classes": ("a", "b"),
        "templates": ("{}",), "modality": "any", "licence": "any", "provenance": {}, "indices": np.arange(len(images)),
    }  # fmt: skip
    return ImageDataset(**(fields | changes))


# values


@pytest.mark.parametrize("bits", [4, 8, 10, 12, 14])
def test_twelve_bits_in_sixteen_are_told_with_the_depth_that_mends_them(tmp_path, bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, (4, 32, 32)).astype(np.uint16)
    values[:, 0, :2] = 0, 2**bits - 1
    for place, image in enumerate(values):
        write(tmp_path / "ab"[place % 2] / f"{place}.png", image)
    peak = round((2**bits - 1) / 257)
    with pytest.warns(UserWarning, match="before anything is measured") as told:
        data = mr.load_dataset(f"folder:{tmp_path}")
    assert len(told) == 1 and told[0].filename == __file__
    (caveat,) = data.caveats if peak > 1 else data.caveats[:1]
    assert (
        f"4 of 4 images do not fill their range and are nearly black to any model: values from 0 to {peak} of" in caveat
    )
    assert "(a/0.png, a/2.png, b/1.png and 1 more)" in caveat
    assert (f"folder:PATH?bit_depth={bits} of 16" in caveat) == (peak > 0)
    stated = open_split(f"folder:{tmp_path}?bit_depth={bits}&fit=pad")
    assert (stated.bit_depth, stated.fit, stated.row.id) == (bits, "pad", f"{data.id}?bit_depth={bits}&fit=pad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = mr.load_dataset(f"folder:{tmp_path}", bit_depth=bits)
    assert mended.caveats == [] and mended.provenance["bit_depth"] == bits
    exact = np.round(values[[0, 2, 1, 3]] * (255 / (2**bits - 1))).astype(np.uint8)
    np.testing.assert_array_equal(mended.images[..., 0], exact)


def test_what_changes_pixels_stands_in_the_id_and_what_does_not_changes_no_id(tmp_path):
    for name, image in zip("ab", scenes(2), strict=True):
        write(tmp_path / "set" / name / "1.png", image)
    path, table = f"folder:{tmp_path / 'set'}", tmp_path / "set" / "t.csv"
    table.write_text("path,label\na/1.png,a\nb/1.png,b\n")
    for query, given in {"": {}, "?bit_depth=12": {"bit_depth": 12}, "?fit=pad": {"fit": "pad"}}.items():
        assert mr.load_dataset(path + query).id == mr.load_dataset(path, **given).id == "folder:set" + query
        assert open_split(f"csv:{table}", **given).row.id == "csv:t.csv" + query
    assert open_split(f"{path}?fit=pad&bit_depth=12").row.id == "folder:set?bit_depth=12&fit=pad"
    assert open_split(f"{path}?fit=crop", image_size=32).row.id == "folder:set"


def test_a_table_takes_the_depth_too_and_a_registered_set_does_not(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.png", np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16).T)
    (tmp_path / "t.csv").write_text("path,label\na.png,a\nb.png,b\n")
    with pytest.warns(UserWarning, match="nearly identical"):
        assert mr.load_dataset(f"csv:{tmp_path / 't.csv'}", bit_depth=12).images.max() == 255
    with pytest.raises(ValueError, match=r"bit_depth=12 is for folder: and csv: data; phantom/chest has its own"):
        mr.load_dataset("phantom/chest", bit_depth=12)
    with pytest.raises(ValueError, match="0; full scale is 7|values from 0 to 4095; full scale is 7"):
        mr.load_dataset(f"csv:{tmp_path / 't.csv'}", bit_depth=3)


def test_a_stated_depth_leaves_files_of_eight_bits_beside_deeper_ones_alone(tmp_path):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    shown = np.round(ramp * (255 / 4095)).astype(np.uint8)
    for name, image in {"a/deep.png": ramp, "a/flat.png": shown[::-1], "b/one.png": shown.T}.items():
        write(tmp_path / name, image)
    Image.fromarray(NOISE[0]).save(tmp_path / "b" / "two.jpg", quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = mr.load_dataset(f"folder:{tmp_path}?bit_depth=12").images
    np.testing.assert_array_equal(images[:3, ..., 0], [shown, shown[::-1], shown.T])
    np.testing.assert_array_equal(images[3], np.asarray(Image.open(tmp_path / "b" / "two.jpg")))
    with pytest.raises(ValueError, match=r"deep\.png holds values from 0 to 4095; .* State the bits .* as bit_depth"):
        mr.load_dataset(f"folder:{tmp_path}?bit_depth=10")
    with pytest.raises(ValueError, match="bit_depth=99 is no whole number from 1 to 32: give the bits"):
        mr.load_dataset(f"folder:{tmp_path}?bit_depth=99")


def test_arrays_that_were_cast_before_they_were_scaled_are_told(tmp_path):
    with pytest.warns(UserWarning, match="values from 0 to 1 of 255") as told:
        data = by_hand((NOISE / 255).round().astype(np.uint8))
    assert len(told) == 1 and told[0].filename == __file__
    assert (
        "scale arrays to 0..255" in data.caveats[0]
        and data.caveats[0] in json.loads(json.dumps(data.provenance))["caveats"]
    )
    assert "do not fill their range" in data._repr_html_()
    # What was found belongs to the set: a part of it, or the set with other facts, says it again, and warns no more.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.subset([0, 1]).caveats == data.caveats


def test_hounsfield_units_with_an_offset_are_told_to_be_flat(tmp_path):
    units = np.round(scenes(4)[..., 0] * (2000 / 255)).astype(int) - 1000  # air to bone
    units[:, 0, :2] = -1000, 1000
    for place, image in enumerate(units):
        write(tmp_path / "ab"[place % 2] / f"{place}.png", (image + 32768).astype(np.uint16))
    with pytest.warns(UserWarning, match="nearly flat gray"):
        (caveat,) = mr.load_dataset(f"folder:{tmp_path}").caveats
    # round((32768 - 1000) / 257), round((32768 + 1000) / 257)
    assert "4 of 4 images are nearly flat gray to any model: 8 gray levels or fewer in each, from 124 to 131" in caveat
    assert "(a/0.png, a/2.png, b/1.png and 1 more)" in caveat and "plus 32768" in caveat


def test_one_hot_pixel_does_not_hide_twelve_bits_in_sixteen(tmp_path):
    values = np.round(scenes(4)[..., 0] * (4095 / 255)).astype(np.uint16)
    values[0, 5, 5] = 65535
    values[1:, 0, :9] = 4095
    for place, image in enumerate(values):
        write(tmp_path / "ab"[place % 2] / f"{place}.png", image)
    with pytest.warns(UserWarning, match="nearly black"):
        (caveat,) = mr.load_dataset(f"folder:{tmp_path}").caveats
    assert "4 of 4 images do not fill their range and are nearly black to any model: values from 0 to 16 of" in caveat
    assert "folder:PATH?bit_depth=12 of 16" in caveat
    assert caveat.endswith(
        "1 of them hold a few brighter pixels, up to 255 (a/0.png): bit_depth refuses values above it, so set these "
        "pixels to 0 first."
    )
    with pytest.raises(ValueError, match=r"0\.png holds values from \d+ to 65535; full scale is 4095"):
        mr.load_dataset(f"folder:{tmp_path}", bit_depth=12)


def test_few_bright_structures_and_white_background_are_none_of_ours():
    spots = np.zeros((2, 64, 64, 3), np.uint8)
    spots[0, 5:8, 5:8] = spots[1, 40:43, 20:23] = 220
    stain = 235 - NOISE[:2] // 12 - np.uint8([0, 3, 1])  # nothing but slide
    assert seen(spots) == [] and seen(stain) == []
    gray = np.repeat(224 + NOISE[:2, ..., :1] // 8, 3, axis=3)
    assert (
        "2 of 2 images are nearly flat gray to any model: 32 gray levels or fewer in each, from 224 to 255"
        in seen(gray)[0]
    )


def test_an_image_that_reaches_a_quarter_of_the_range_is_none_of_ours():
    edge = np.zeros((1, 8, 8, 3), np.uint8)
    edge[0, 0, 0] = 65
    assert seen(edge) == []
    assert seen(edge - (edge > 0).astype(np.uint8)) != []


# the centre crop


@pytest.mark.parametrize("image_size", [None, 24])
def test_what_a_centre_crop_throws_away_is_told_and_padding_keeps_it(tmp_path, image_size):
    bright = np.full((40, 64, 3), 200, np.uint8)
    bright[30:, 20:40] = 100
    bright[:, :4], bright[:, -4:] = 255, 90  # at the two ends, which a crop to 40 x 40 never shows
    for place, shift in enumerate((0, 60)):
        write(tmp_path / "ab"[place] / "1.png", bright - np.uint8(shift))
    with pytest.warns(UserWarning, match="up to 38 % of an image's area") as told:  # 1 - 40 / 64 = .375
        cropped = mr.load_dataset(f"folder:{tmp_path}", image_size=image_size)
    assert len(told) == 1 and len(cropped.caveats) == 1 and "or folder:PATH?fit=pad, keeps all" in cropped.caveats[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded = mr.load_dataset(f"folder:{tmp_path}", image_size=image_size, fit="pad")
    side = image_size or 64
    assert padded.images.shape == (2, side, side, 3) and padded.caveats == []
    assert padded.provenance["resized"] == f"64 × 40 px -> {side} px: longest edge to size (bicubic), black bars"
    bar = (side - round(side * 40 / 64)) // 2
    assert not padded.images[:, :bar].any() and not padded.images[:, side - bar :].any()
    middle = padded.images[:, side // 2]
    assert abs(int(middle[0, 0, 0]) - 255) <= 8 and abs(int(middle[0, -1, 0]) - 90) <= 8
    if image_size is None:
        np.testing.assert_array_equal(padded.images[0, 12:52], bright)


@pytest.mark.parametrize(
    "stated, message",
    [
        ("depth=12", "depth is unknown"),
        ("bit_depth=twelve", "invalid literal"),
        ("pad", "bad query field"),
        ("fit=p", "unknown fit 'p'"),
    ],
)
def test_what_an_id_states_wrongly_is_refused(tmp_path, stated, message):
    with pytest.raises(ValueError, match=message):
        open_split(f"folder:{tmp_path}?{stated}")


def test_a_wrong_fit_names_the_choices():
    with pytest.raises(ValueError, match="unknown fit .*; choose one of crop, pad"):
        mr.load_dataset("phantom/chest", fit="stretch")


@pytest.mark.parametrize("shape, said", [((64, 62), []), ((62, 64), []), ((64, 48), ["up to 25 %"]), ((64, 64), [])])
def test_the_share_of_a_set_made_by_hand(shape, said):
    images = scenes(3)[:, : shape[0], : shape[1]]
    found = seen(images, shapes=[images.shape[1:3]])
    assert len(found) == len(said) and all(text in found[0] for text in said)


# copies


@pytest.mark.parametrize("quality, scale", [(90, 1.0), (75, 1.0), (75, 0.75), (60, 1.0)])
def test_copies_saved_again_are_found_and_other_images_are_not(quality, scale):
    images = np.concatenate([scenes(20), mr.load_dataset("phantom/blood", n=16).images])
    copies = np.stack([again(image, quality=quality, scale=scale) for image in images])
    pairs = near_copies(copies, images)
    assert sorted(map(tuple, pairs.tolist())) == [(k, k) for k in range(len(images))]
    assert len(near_copies(images, images)) == 0


def test_images_that_are_dark_but_for_a_few_pixels_are_compared_by_these():
    spots = np.zeros((3, 64, 64, 3), np.uint8)
    spots[0, 5:8, 5:8] = spots[1, 40:43, 20:23] = 220
    assert len(near_copies(spots, spots)) == 0  # the third is blank
    assert near_copies(spots, spots.copy()).tolist() == [[0, 0], [1, 1], [2, 2]]
    # In the lowest bits of the range other images lie close together all the same.
    dark = scenes(8) // 16
    assert len(near_copies(dark, dark)) == 0


def test_pairs_of_copies_are_named_and_so_is_one_under_two_labels():
    images = scenes(6)[[0, 1, 2, 3, 1, 2]]
    found = seen(images, labels=[0, 0, 1, 1, 0, 0])
    assert found == [
        "4 of 6 images are nearly identical to another one (1.png = 4.png, 2.png = 5.png): each has a row of its own "
        "in tables, and they count twice in every share. Remove one file of each pair; "
        "data.inspection.near_copies(images, images) finds them all.",
        "2 images are nearly identical to one with another label (2.png = 5.png): one of the two labels is wrong, or "
        "the images do not show what the label says. Look at both, then mend the label or remove both.",
    ]
    assert seen(images[:4]) == [] and seen(images[:1]) == []


def test_test_images_that_are_learned_from_are_named_with_their_copies():
    images = scenes(8)
    assert learned_too(images[:3], images[3:]) == []
    (sentence,) = learned_too(images[:3], images[1:], names=["a", "b", "c"], learned_names=[*"defghij"])
    assert sentence.startswith("2 of 3 test images are nearly identical to images that are learned from (b = d, c = e)")
    (sentence,) = learned_too(images[:6], images[:1])
    assert "(test image 0 = train image 0)" in sentence
    assert sentence.endswith("Keep each in one of the two only.")


@pytest.mark.parametrize("modality", MODALITIES)
def test_phantoms_raise_no_warning(modality):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mr.load_dataset(f"phantom/{modality}", n=40, image_size=64).caveats == []


# names


@pytest.mark.parametrize(
    "names, counts, misspelt",
    [
        (("bacteria", "bactera", "virus"), (40, 1, 30), ["bactera"]),
        (("Bacteria ", "bacterie"), (3, 200), ["Bacteria "]),
        (("bacteria", "bactera"), (40, 20), []),  # many of both
        (("bacteria", "bactera"), (4, 1), []),  # few of both
        (("bacteria", "bacetria"), (40, 2), ["bacetria"]),
        (("lung_cancer", "lung cancer"), (2, 40), ["lung_cancer"]),
        (("normal", "abnormal"), (30, 3), []),
        (("typical", "atypical"), (30, 3), []),
        (("benign", "nonbenign"), (30, 3), []),
        (("hyperplasia", "hypoplasia"), (30, 3), []),
        (("intracellular", "intercellular"), (30, 3), []),
        (("stage_i", "stage_ii"), (30, 3), []),
        (("receptor+", "receptor-"), (30, 3), []),
        (("grade 1", "grade 2"), (80, 2), []),
        (("basophil", "platelet"), (80, 2), []),
        (("a", "b"), (80, 0), []),
    ],
)
def test_a_class_of_few_images_with_nearly_the_name_of_another_is_told(names, counts, misspelt):
    found = close_names(names, counts)
    assert len(found) == len(misspelt) and all(repr(name) in text for name, text in zip(misspelt, found, strict=True))


def test_a_misspelt_folder_is_told_with_its_counts_over_all_splits(tmp_path):
    for place, image in enumerate(scenes(14)):
        split, name = (
            ("train", "bactera") if place == 3 else (("train", "test")[place % 2], ("bacteria", "virus")[place % 3 > 0])
        )
        write(tmp_path / split / name / f"{place}.png", image)
    write(tmp_path / "train" / "bacteria" / "x.png", scenes(1, seed=5)[0])
    with pytest.warns(UserWarning, match=r"Class 'bactera' \(1 image\) is spelled nearly like 'bacteria' \(\d\)"):
        mr.load_dataset(f"folder:{tmp_path}")
    names = {"bactera": "bacterial pneumonia", "bacteria": "bacterial pneumonia", "virus": "viral pneumonia"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mr.load_dataset(f"folder:{tmp_path}", class_names=names).caveats == []
        open_split(f"folder:{tmp_path}")  # nothing is measured yet


@pytest.mark.parametrize("form", ["folder", "csv"])
def test_what_reading_ignores_in_files_is_counted_for_the_set(tmp_path, form):
    root = tmp_path / "set"
    turned = Image.Exif()
    turned[274] = 6
    rows = ["path,label"]
    for number, scene in enumerate(scenes(6)):
        path = root / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene).save(path, quality=95, **({"exif": turned} if number < 3 else {}))
        rows.append(f"{path.relative_to(root)},{path.parent.name}")
    clear = np.dstack([scenes(1, seed=9)[0], np.full((64, 64), 7, np.uint8)])
    write(root / "a" / "6.png", clear)
    (root / "list.csv").write_text("\n".join([*rows, "a/6.png,a"]))
    with pytest.warns(UserWarning, match="EXIF rotation of 3 .*, transparency of 1"):
        data = mr.load_dataset({"folder": f"folder:{root}", "csv": f"csv:{root / 'list.csv'}"}[form])
    turned_ones = {"folder": "a/0.jpg, a/2.jpg, b/1.jpg", "csv": "a/0.jpg, b/1.jpg, a/2.jpg"}[form]
    assert (
        f"Ignored in reading image files: EXIF rotation of 3 ({turned_ones}), transparency of 1 (a/6.png). Where it "
        "matters, rotate, flatten or convert them as a viewer shows them, and save them again."
    ) in data.caveats
