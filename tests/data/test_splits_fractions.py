"""A stratified fraction to learn from: what is drawn, what stays apart, and what does not depend on the draw."""

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medrobust_lib.data.registry import load_dataset
from medrobust_lib.data.splits import fraction_splits, learning_splits

# Most images here are of one colour, to be told apart by it: dark, and copies of each other.
pytestmark = pytest.mark.filterwarnings("ignore:.*before anything is measured")

ROOT = Path(os.environ.get("MEDROBUST_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data" / "real")
FRACTIONS = (0.01, 0.03, 0.07, 0.1, 0.5, 1.0)
PARTS = ("train", "val", "test")


def class_folders(root, counts):
    """Class folders "c0", "c1", ... with as many images as wanted; no two images are alike."""
    value = 0
    for name, count in enumerate(counts):
        for number in range(count):
            path = root / f"c{name}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            value += 1
            Image.fromarray(np.full((8, 8, 3), (value // 256, value % 256, name), np.uint8)).save(path)
    return root


def split_folders(root, **splits):
    for offset, (split, counts) in enumerate(splits.items()):
        class_folders(root / split, counts)
        # Marks the split, so that images of two splits differ.
        for path in (root / split).rglob("*.png"):
            Image.fromarray(np.asarray(Image.open(path)) + np.uint8([0, 0, 32 * (offset + 1)])).save(path)
    return root


def draw(dataset, fraction=0.1, *, n_val=10, n_test=20, **options):
    return fraction_splits(str(dataset), fraction=fraction, n_val=n_val, n_test=n_test, **options)


def counts(dataset):
    return list(dataset.class_counts().values())


def of_the_draw(found):
    """Its notes but for those on what the images look like: see above."""
    return tuple(note for note in found.notes if not re.match("(train|val) images: ", note))


def pixels(dataset):
    return {tuple(colour) for colour in dataset.images[:, 0, 0].tolist()}


def assert_disjoint(found):
    shown = [pixels(getattr(found, part)) for part in PARTS]
    assert len(set.union(*shown)) == sum(map(len, shown)) == sum(len(getattr(found, part)) for part in PARTS)


def test_phantoms_keep_their_own_splits_and_the_images_that_everyone_draws():
    found = draw("phantom/blood", 0.01, n_val=16, n_test=24, image_size=32, seed=3)
    assert found.divided and found.fraction == 0.01
    assert [getattr(found, part).split for part in PARTS] == ["train", "val", "test"]
    assert len(found.train) == 14 and set(counts(found.train)) == {1, 2}
    assert found.notes == ("train and test are the data set's own splits",)
    for split, n in (("val", 16), ("test", 24)):
        same = load_dataset("phantom/blood", split=split, n=n, seed=0, image_size=32)
        np.testing.assert_array_equal(getattr(found, split).images, same.images)
        assert getattr(found, split).provenance == same.provenance
    learned = load_dataset("phantom/blood", split="train", n=14, seed=3, image_size=32)
    np.testing.assert_array_equal(found.train.images, learned.images)


def test_classes_keep_their_shares_and_each_gives_one_image(tmp_path):
    folder = f"folder:{split_folders(tmp_path, train=[60, 30, 10], val=[5, 5, 5], test=[9, 9, 9])}"
    assert [counts(draw(folder, fraction).train) for fraction in (0.1, 0.5, 1)] == [
        [6, 3, 1],
        [30, 15, 5],
        [60, 30, 10],
    ]
    few = draw(folder, 0.01)
    assert counts(few.train) == [1, 1, 1]
    assert of_the_draw(few)[1:] == ("3 of 100 train images are learned from, where 1 % would be 1: one of each class",)
    assert of_the_draw(draw(folder, 0.1)) == ("train and test are the data set's own splits",)
    assert_disjoint(draw(folder, 1, n_val=100, n_test=100))


def test_shares_are_rounded_to_the_nearest_number_of_images(tmp_path):
    folder = f"folder:{split_folders(tmp_path, train=[50, 50], val=[2, 2], test=[2, 2])}"
    # 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996 in binary.
    assert [len(draw(folder, fraction).train) for fraction in (0.07, 0.29, 0.034, 0.036)] == [7, 29, 3, 4]


SOURCES = {
    "own splits": {"train": [60, 30, 10], "val": [6, 6, 6], "test": [9, 9, 9]},
    "no val split": {"train": [60, 30, 10], "test": [9, 9, 9]},
    "test only": {"test": [60, 30, 10]},
}


@pytest.fixture(params=[*SOURCES, "no splits", "val and test"])
def folder(request, tmp_path):
    if request.param == "no splits":
        return f"folder:{class_folders(tmp_path, [60, 30, 10])}"
    splits = SOURCES.get(request.param, {"val": [6, 6, 6], "test": [60, 30, 10]})
    return f"folder:{split_folders(tmp_path, **splits)}"


def test_larger_fractions_contain_the_smaller_and_nothing_is_shared(folder):
    previous = set()
    for fraction in FRACTIONS:
        found = draw(folder, fraction)
        assert_disjoint(found)
        assert previous <= pixels(found.train)
        previous = pixels(found.train)
    assert len(previous) > 30


def test_other_seeds_and_fractions_are_judged_on_the_same_images(folder):
    first = draw(folder, 0.1, seed=0)
    for other in (draw(folder, 0.1, seed=1), draw(folder, 0.5, seed=2), draw(folder, 1.0)):
        assert pixels(first.train) != pixels(other.train)
        for part in ("val", "test"):
            np.testing.assert_array_equal(getattr(first, part).images, getattr(other, part).images)
            assert getattr(first, part).provenance == getattr(other, part).provenance
    judged_otherwise = draw(folder, 0.1, test_seed=1)
    for part in ("val", "test"):
        assert pixels(getattr(first, part)) != pixels(getattr(judged_otherwise, part))
    again = draw(folder, 0.1, seed=0)
    np.testing.assert_array_equal(first.train.indices, again.train.indices)


def test_train_images_do_not_depend_on_how_many_are_validated(tmp_path):
    folder = f"folder:{split_folders(tmp_path, train=[20, 10, 3], test=[2] * 3)}"
    few, many = (draw(folder, 0.5, n_val=n_val) for n_val in (1, 100))
    assert few.train.indices.tolist() == many.train.indices.tolist()
    assert (len(few.val), len(many.val)) == (1, 7)
    assert set(few.val.indices) <= set(many.val.indices)
    assert "7 of the 33 train images are kept for validation, 1 of them used, and" in few.notes[1]


def test_without_a_val_split_a_fifth_of_each_class_is_kept_from_training(tmp_path):
    folder = f"folder:{split_folders(tmp_path, train=[20, 10, 3, 2, 1], test=[2] * 5)}"
    found = draw(folder, 1.0, n_val=100)
    assert counts(found.val) == [4, 2, 1, 1, 0] and counts(found.train) == [16, 8, 2, 1, 1]
    assert (found.train.split, found.val.split, found.test.split) == ("train", "train", "test")
    assert of_the_draw(found)[1:] == (
        "no val split: 8 of the 36 train images are kept for validation and not learned from",
        "28 of 36 train images are learned from, where 100 % would be 36: all but those for validation",
        "no image for validation: c4",
    )
    few = draw(folder, 1.0, n_val=3)
    assert len(few.val) == 3 and len(few.train) == 28
    tenth = draw(folder, 0.25)
    assert len(tenth.train) == 9 and tenth.train.provenance["of"] == 36  # of all train images


@pytest.mark.parametrize("images", [[10, 7, 4], [5, 4], [60, 4, 2]])
def test_a_folder_without_splits_is_divided_class_by_class(tmp_path, images):
    folder = f"folder:{class_folders(tmp_path, images)}"
    found = draw(folder, 1.0, n_val=100, n_test=100, seed=5)
    half = [max(1, count // 2) for count in images]
    kept = [max(1, count // 5) if count > 1 else 0 for count in half]
    assert not found.divided
    assert counts(found.test) == [count - learned for count, learned in zip(images, half, strict=True)]
    assert counts(found.val) == kept
    assert counts(found.train) == [learned - out for learned, out in zip(half, kept, strict=True)]
    assert_disjoint(found)
    assert "patients may be on both sides" in found.notes[0]
    assert found.train.provenance["of"] == sum(half)


# The fraction is one of the val split


def test_the_val_split_of_phantoms_is_learned_from_and_the_train_split_validates():
    options = {"n_val": 16, "n_test": 24, "image_size": 32}
    usual, found = draw("phantom/blood", 1.0, **options), draw("phantom/blood", 1.0, learn_from="val", **options)
    assert [getattr(found, part).split for part in PARTS] == ["val", "train", "test"]
    assert (found.divided, found.fraction, len(found.val)) == (True, 1.0, 16)
    whole = load_dataset("phantom/blood", split="val", image_size=32)
    np.testing.assert_array_equal(found.train.images, whole.images)
    assert found.train.provenance["of"] == len(whole) < len(usual.train)
    assert found.train.provenance["drawn"] == "stratified fraction of the val images, at least one of each class"
    np.testing.assert_array_equal(found.test.images, usual.test.images)
    images = [image.tobytes() for part in PARTS for image in getattr(found, part).images]
    assert len(set(images)) == len(images)
    assert found.notes == (
        "val and test are the data set's own splits",
        "learned from are images of the split 'val', validation images come from the split 'train'",
    )


def test_fractions_of_the_val_split_are_counted_nested_and_judged_alike(tmp_path):
    folder = f"folder:{split_folders(tmp_path, train=[9, 9, 9], val=[60, 30, 10], test=[9, 9, 9])}"
    found = [draw(folder, fraction, seed=3, learn_from="val") for fraction in (0.01, 0.1, 0.3, 0.75, 1)]
    assert [counts(one.train) for one in found] == [[1, 1, 1], [6, 3, 1], [18, 9, 3], [45, 23, 7], [60, 30, 10]]
    assert of_the_draw(found[0])[2:] == (
        "3 of 100 val images are learned from, where 1 % would be 1: one of each class",
    )
    for smaller, larger in itertools.pairwise(found):
        assert pixels(smaller.train) < pixels(larger.train)
        for part in ("val", "test"):
            np.testing.assert_array_equal(getattr(smaller, part).images, getattr(larger, part).images)
    assert all(one.train.split == "val" and one.val.split == "train" for one in found)
    assert_disjoint(found[-1])
    other = draw(folder, 0.1, seed=4, learn_from="val")
    assert pixels(other.train) != pixels(found[1].train) and pixels(other.val) == pixels(found[1].val)


def test_without_a_train_split_a_fifth_of_the_val_split_validates(tmp_path):
    folder = f"folder:{split_folders(tmp_path, val=[20, 10, 1], test=[9, 9, 9])}"
    found = draw(folder, 1.0, n_val=100, n_test=100, learn_from="val")
    assert [counts(getattr(found, part)) for part in PARTS] == [[16, 8, 1], [4, 2, 0], [9, 9, 9]]
    assert_disjoint(found)
    assert of_the_draw(found) == (
        "val and test are the data set's own splits",
        "no train split: 6 of the 31 val images are kept for validation and not learned from",
        "25 of 31 val images are learned from, where 100 % would be 31: all but those for validation",
        "no image for validation: c2",
    )


def test_the_train_split_is_learned_from_by_default(folder):
    usual, named = draw(folder, 0.1), draw(folder, 0.1, learn_from="train")
    assert usual.notes == named.notes
    for part in PARTS:
        np.testing.assert_array_equal(getattr(usual, part).images, getattr(named, part).images)
        assert getattr(usual, part).provenance == getattr(named, part).provenance


@pytest.mark.parametrize(
    ("splits", "has"),
    [
        ({"train": [9, 9], "test": [9, 9]}, "its splits: train, test"),
        ({"test": [9, 9]}, "its splits: test"),
        ({}, "it has no splits"),
    ],
)
def test_learning_from_a_val_split_that_is_not_there_is_refused_with_what_to_do(tmp_path, splits, has):
    folder = split_folders(tmp_path, **splits) if splits else class_folders(tmp_path, [9, 9])
    message = f"no val split to learn from ({has}); ask for learn_from='train', or keep images apart in a split 'val'"
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(f"folder:{folder}", learn_from="val")


def test_provenance_says_how_the_images_came_and_can_be_stored(tmp_path):
    found = draw(f"folder:{split_folders(tmp_path, **SOURCES['own splits'])}", np.float64(0.1), seed=4, test_seed=2)
    facts = json.loads(json.dumps(found.train.provenance))
    assert {key: facts[key] for key in ("fraction", "of", "n", "seed", "test_seed", "split_size")} == {
        "fraction": 0.1, "of": 100, "n": 10, "seed": 4, "test_seed": 2, "split_size": 100,
    }  # fmt: skip
    assert found.test.provenance["seed"] == found.val.provenance["seed"] == 2


def test_only_the_images_drawn_are_decoded(tmp_path, monkeypatch):
    folder = f"folder:{class_folders(tmp_path, [40, 40])}"
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **how: opened.append(path) or original(path, **how))
    found = draw(folder, 0.1, n_val=4, n_test=6, image_size=8)
    drawn = np.concatenate([getattr(found, part).indices for part in PARTS])
    assert len(set(opened)) == len(drawn) == 4 + 4 + 6
    for index in set(range(80)) - set(drawn.tolist()):
        (tmp_path / f"c{index // 40}" / f"{index % 40:03}.png").write_bytes(b"damaged")
    again = draw(folder, 0.1, n_val=4, n_test=6, image_size=8)
    for part in PARTS:
        np.testing.assert_array_equal(getattr(found, part).images, getattr(again, part).images)


@pytest.mark.parametrize("draw", [
    lambda folder: fraction_splits(folder, fraction=1.0, n_val=9, n_test=9),
    lambda folder: learning_splits(folder, shots=3, n_test=9, n_pool=9),
])  # fmt: skip
def test_what_train_and_validation_images_look_like_is_told_beside_the_test_images(tmp_path, draw):
    turned, random = Image.Exif(), np.random.default_rng(5)
    turned[274] = 6
    for split, rotated, peak in (("train", turned, 256), ("val", None, 40), ("test", None, 256)):
        for number in range(6):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            scene = random.integers(0, peak, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(scene).save(path, **({"exif": rotated} if rotated else {}))
    (tmp_path / "loose.png").write_bytes(path.read_bytes())
    found = draw(f"folder:{tmp_path}")
    first, rotation, dim = found.notes
    assert first == "train and test are the data set's own splits"
    assert rotation.startswith("train images: Ignored in reading image files: EXIF rotation of 6 (train/a/0.png, ")
    assert re.match("(val|pool) images: 6 of 6 images do not fill their range and are nearly black to any model", dim)
    assert len(found.test.caveats) == 1  # the loose file, which is told there


def test_a_class_of_the_list_without_images_is_named(tmp_path):
    for split in PARTS:
        for value, code in enumerate(("ADI", "TUM")):
            path = tmp_path / "pathology" / "kather" / "images" / split / code / "1.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)
    found = draw("pathology/kather", 1.0, root=tmp_path)
    assert len(found.train) == 2
    assert re.match("no image to learn from: background, .*normal colon mucosa", found.notes[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (
                {"fraction": wrong},
                f"fraction={wrong!r} is no number above 0 and up to 1: give a share",
            )
            for wrong in (0, -0.1, 1.01, 10, True, "0.1", float("nan"))
        ),
        ({"n_val": 0}, "n_val=0 is no whole number of 1 or more"),
        ({"n_test": 2.5}, "n_test=2.5 is no whole number of 1 or more"),
        ({"seed": -1}, "seed=-1 is no whole number of 0 or more"),
        ({"test_seed": True}, "test_seed=True is no whole number of 0 or more"),
        ({"image_size": 3}, "image_size=3 is no whole number of 8 or more"),
        ({"learn_from": "test"}, "unknown learn_from 'test'; choose one of train, val"),
        ({"learn_from": "val", "fraction": 0}, "up to 1: give a share of the val images, such as 0.1"),
    ],
)
def test_bad_numbers_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw("phantom/blood", **change)


def test_sets_too_small_for_three_parts_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="each class has one image, .* none is left to test; add images"):
        draw(f"folder:{class_folders(tmp_path / 'one', [1, 1, 1])}")
    message = "no class has two images to learn from, so none is left for validation; add images, or keep"
    for name, folders in {"undivided": {"test": [2, 3]}, "train": {"train": [1, 1], "test": [2, 2]}}.items():
        with pytest.raises(ValueError, match=message):
            draw(f"folder:{split_folders(tmp_path / name, **folders)}")
    alone = split_folders(tmp_path / "val", val=[1, 1], test=[2, 2])
    with pytest.raises(ValueError, match="apart in a split 'train' beside 'test'"):
        draw(f"folder:{alone}", learn_from="val")


@pytest.mark.skipif(
    not (ROOT / "folders").is_dir(), reason=f"no real images at {ROOT}; name their folder with MEDROBUST_REAL_DATA"
)
@pytest.mark.parametrize(
    ("name", "like", "sizes"),
    [("pbc", "medimeta/pbc", [8, 56, 560]), ("breast_us", "medmnist/breast", [5, 55, 546])],
)
def test_fractions_of_real_folders(name, like, sizes):
    folder = f"folder:{ROOT / 'folders' / name}"
    options = {"n_val": 1000, "n_test": 20, "like": like, "image_size": 32}
    found = [draw(folder, fraction, **options) for fraction in (0.01, 0.1, 1)]
    assert [len(one.train) for one in found] == sizes
    assert set(found[0].train.indices) < set(found[1].train.indices) < set(found[2].train.indices)
    assert all(min(counts(one.train)) >= 1 for one in found)


@pytest.mark.skipif(
    not (ROOT / "medmnist").is_dir(), reason=f"no real images at {ROOT}; name their folder with MEDROBUST_REAL_DATA"
)
def test_a_tenth_of_a_medmnist_file():
    found = draw("medmnist/breast", root=ROOT, n_val=78, n_test=156)
    assert [len(getattr(found, part)) for part in PARTS] == [55, 78, 156]
    whole = np.array(counts(load_dataset("medmnist/breast", split="train", root=ROOT)))
    np.testing.assert_allclose(counts(found.train), 0.1 * whole, atol=0.75)  # 54.6 in all


def test_copies_of_train_images_among_the_test_images_are_counted(tmp_path):
    drawn = np.random.default_rng(0)
    for split, name, number in ((s, n, k) for s in ("train", "val", "test") for n in "ab" for k in range(3)):
        path = tmp_path / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    assert draw(f"folder:{tmp_path}", 1.0, n_test=6).copies == []
    (tmp_path / "test" / "a" / "0.png").write_bytes((tmp_path / "train" / "b" / "2.png").read_bytes())
    (sentence,) = draw(f"folder:{tmp_path}", 1.0, n_test=6).copies
    assert sentence.startswith("1 of 6 test images are nearly identical to images that are learned from")
