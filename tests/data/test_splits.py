import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medrobust_lib.data.registry import load_dataset, open_split
from medrobust_lib.data.splits import learning_splits

# Most images here are of one colour, to be told apart by it: dark, and copies of each other.
pytestmark = pytest.mark.filterwarnings("ignore:.*before anything is measured")


def save(path, value):
    """An image that its number identifies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), 0, np.uint8) + np.uint8(value)).save(path)
    return path


def class_folders(root, counts):
    """Class folders "c0", "c1", ... with as many images as wanted; no two images are alike."""
    value = 0
    for name, count in enumerate(counts):
        for number in range(count):
            save(root / f"c{name}" / f"{number}.png", value := value + 1)
    return root


def values(dataset):
    return set(dataset.images[:, 0, 0, 0].tolist())


def draw(dataset, *, shots=2, n_test=5, n_pool=4, seed=0, **options):
    return learning_splits(str(dataset), shots=shots, n_test=n_test, n_pool=n_pool, seed=seed, **options)


def test_phantoms_keep_their_own_splits():
    found = draw("phantom/blood", n_test=16, n_pool=8, image_size=32)
    assert found.divided
    assert [part.split for part in (found.train, found.pool, found.test)] == ["train", "val", "test"]
    assert list(found.train.class_counts().values()) == [4] * 8  # twice the shots
    assert (len(found.pool), len(found.test)) == (8, 16)
    assert found.test.images.shape == (16, 32, 32, 3) and found.test.synthetic
    assert found.notes == ("train and test are the data set's own splits",)
    # The test images are those that every notebook draws with this seed.
    same = load_dataset("phantom/blood", n=16, seed=0, image_size=32)
    np.testing.assert_array_equal(found.test.images, same.images)
    assert found.test.provenance == same.provenance
    assert found.train.provenance["drawn"] == "at most 4 of each class"


def test_a_seed_gives_its_images_again_and_another_seed_gives_others():
    first, again, other = (draw("phantom/oct", seed=seed, image_size=28) for seed in (0, 0, 1))
    for part in ("train", "pool", "test"):
        np.testing.assert_array_equal(getattr(first, part).images, getattr(again, part).images)
        assert set(getattr(first, part).indices) != set(getattr(other, part).indices)


def test_more_images_than_there_are_means_all(tmp_path):
    for split, counts in (("train", [9, 9, 9]), ("val", [4, 5, 6]), ("test", [7, 8, 9])):
        class_folders(tmp_path / split, counts)
    found = draw(f"folder:{tmp_path}", n_test=10_000, n_pool=10_000)
    assert (len(found.pool), len(found.test)) == (15, 24)
    assert list(found.train.class_counts().values()) == [4, 4, 4]


def test_every_class_gets_its_shots_in_a_skewed_split(tmp_path):
    class_folders(tmp_path / "train", [3, 40])
    class_folders(tmp_path / "test", [1, 1])
    found = draw(f"folder:{tmp_path}", shots=4)
    assert list(found.train.class_counts().values()) == [3, 8]
    assert "fewer than 4 images to learn from: c0 3" in found.notes


def test_a_folder_with_splits_and_no_val_takes_other_train_images_as_its_pool(tmp_path):
    class_folders(tmp_path / "train", [7, 6])
    class_folders(tmp_path / "test", [3, 3])
    found = draw(f"folder:{tmp_path}")
    assert found.divided
    assert (found.train.split, found.pool.split, found.test.split) == ("train", "train", "test")
    assert not values(found.train) & values(found.pool) and len(found.pool) == 4
    assert found.notes[1] == "no val split: the pool comes from the split 'train'"
    more = draw(f"folder:{tmp_path}", n_pool=8)  # five others are left, three of the learned ones join them
    assert len(values(more.pool)) == 8 and len(values(more.pool) & values(more.train)) == 3
    assert more.notes[1].endswith("; 3 of its 8 images are learned from too")
    assert len(draw(f"folder:{tmp_path}", n_pool=100).pool) == 13


def test_a_folder_with_three_splits_takes_val_as_its_pool(tmp_path):
    for split in ("train", "valid", "test"):
        class_folders(tmp_path / split, [3, 2])
    found = draw(f"folder:{tmp_path}", n_pool=100)
    assert found.divided and found.pool.split == "val" and len(found.pool) == 5


@pytest.mark.parametrize("counts", [[6, 9, 4], [30, 2]])
def test_a_folder_without_splits_is_divided_class_by_class(tmp_path, counts):
    class_folders(tmp_path, counts)
    found = draw(f"folder:{tmp_path}", n_test=100)
    assert not found.divided
    assert list(found.train.class_counts().values()) == [min(4, count // 2) for count in counts]
    assert not values(found.train) & values(found.test)
    assert len(values(found.train) | values(found.test)) == sum(counts)
    assert values(found.pool) <= values(found.train)  # nothing else is left
    assert {part.split for part in (found.train, found.pool, found.test)} == {"all"}
    assert found.notes[0] == (
        "the data set has no splits: its images were divided class by class, patients may be on both sides"
    )


def test_a_divided_folder_fills_its_pool_with_images_that_are_not_used_otherwise(tmp_path):
    class_folders(tmp_path, [20, 20])
    found = draw(f"folder:{tmp_path}", n_test=6, n_pool=10)
    assert (len(found.train), len(found.pool), len(found.test)) == (8, 10, 6)
    assert len(values(found.train) | values(found.pool) | values(found.test)) == 24


@pytest.mark.parametrize(
    ("counts", "learned", "tested"),
    [([1] * 8 + [2], [1] * 9, 1), ([3, 3, 2, 2], [1] * 4, 6), ([7, 1, 1, 1], [3, 1, 1, 1], 4)],
    ids=["nine classes", "four classes", "three single images"],
)
def test_ten_tiles(tmp_path, counts, learned, tested):
    class_folders(tmp_path, counts)
    for seed in range(3):
        found = draw(f"folder:{tmp_path}", shots=16, n_test=90, n_pool=90, seed=seed)
        assert list(found.train.class_counts().values()) == learned
        assert len(found.test) == tested and not values(found.train) & values(found.test)
        single = [f"c{name}" for name, count in enumerate(counts) if count == 1]
        note = f"one image only, learned from and not tested: {', '.join(single)}"
        assert (note in found.notes) == bool(single)
        assert not set(single) & {found.test.classes[label] for label in found.test.labels}


def test_a_set_with_test_images_only_is_divided_and_says_so(tmp_path):
    class_folders(tmp_path / "images" / "test", [3, 3])
    found = draw(f"folder:{tmp_path}")
    assert not found.divided and {part.split for part in (found.train, found.test)} == {"test"}
    assert not values(found.train) & values(found.test)
    assert found.notes[0].startswith("the data set has no train split (test only): its images were divided")


def test_a_set_without_test_images_is_refused(tmp_path):
    class_folders(tmp_path / "train", [3, 3])
    with pytest.raises(ValueError, match=r"has no split 'test'. Choose one of: train"):
        draw(f"folder:{tmp_path}")


def write_csv(root, splits):
    lines = ["path,label" + ",split" * (splits is not None)]
    for number in range(12):
        save(root / f"{number}.png", number)
        lines.append(f"{number}.png,{'ab'[number % 2]}" + (f",{splits[number % 3]}" if splits else ""))
    (root / "list.csv").write_text("\n".join(lines))
    return f"csv:{root / 'list.csv'}"


def test_csv_with_and_without_splits(tmp_path):
    found = draw(write_csv(tmp_path, ["test", "train", "val"]), n_test=100, n_pool=100)
    assert found.divided
    assert values(found.train) == {1, 4, 7, 10} and values(found.pool) == {2, 5, 8, 11}
    assert values(found.test) == {0, 3, 6, 9}
    found = draw(write_csv(tmp_path, None), shots=1)
    assert not found.divided and list(found.train.class_counts().values()) == [2, 2]
    assert len(found.test) == 5 and not values(found.train) & values(found.test)


def write_breast(root, *splits):
    path = root / "medmnist" / "breastmnist.npz"
    path.parent.mkdir(parents=True)
    arrays = {}
    for offset, split in enumerate(splits):
        images = np.arange(20, dtype=np.uint8)[:, None, None] + np.full((1, 28, 28), 20 * offset, np.uint8)
        arrays |= {f"{split}_images": images, f"{split}_labels": (np.arange(20) % 4 > 0).astype(np.uint8)[:, None]}
    np.savez_compressed(path, **arrays)


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "test"), ("test",)])
def test_medmnist(tmp_path, splits):
    write_breast(tmp_path, *splits)
    found = draw("medmnist/breast", n_pool=8, root=tmp_path)
    assert found.divided == ("train" in splits)
    assert found.train.split == splits[0] and found.pool.split == (splits[-2] if splits[1:] else "test")
    assert list(found.train.class_counts().values()) == [4 if found.divided else 2, 4]
    assert not (values(found.train) | values(found.pool)) & values(found.test)


def test_only_the_images_drawn_are_read(tmp_path, monkeypatch):
    class_folders(tmp_path, [20, 20])
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **how: opened.append(path) or original(path, **how))
    first = draw(f"folder:{tmp_path}", image_size=16)
    drawn = np.concatenate([part.indices for part in (first.train, first.pool, first.test)])
    assert len(set(opened)) == len(drawn) == 17
    files = [tmp_path / f"c{index // 20}" / name for index in (0, 20) for name in sorted_names(tmp_path)]
    for index, file in enumerate(files):
        if index not in drawn:
            file.write_bytes(b"damaged")
    again = draw(f"folder:{tmp_path}", image_size=16)
    for part in ("train", "pool", "test"):
        np.testing.assert_array_equal(getattr(first, part).images, getattr(again, part).images)


def sorted_names(root: Path):
    return sorted(path.name for path in (root / "c0").iterdir())


def test_options_reach_the_data_set(tmp_path):
    for split in ("train", "test"):
        for code in ("normal", "benign", "malignant"):
            save(tmp_path / split / code / "1.png", 1)
    found = draw(f"folder:{tmp_path}", like="medmnist/breast", image_size=32)
    assert found.test.classes == ("malignant", "normal, benign") and found.test.images.shape == (3, 32, 32, 3)


def test_a_class_of_the_list_without_images_is_named(tmp_path):
    for split in ("train", "test"):
        for value, code in enumerate(("ADI", "TUM")):
            save(tmp_path / "pathology" / "kather" / "images" / split / code / "1.png", value)
    found = draw("pathology/kather", root=tmp_path)
    assert len(found.train) == 2
    assert re.match("no image to learn from: background, .*normal colon mucosa", found.notes[1])


def test_open_split_lists_splits_and_labels_without_reading(tmp_path):
    file = class_folders(tmp_path / "images" / "test", [2, 1]) / "c0" / "0.png"
    class_folders(tmp_path / "images" / "train", [1, 1])
    file.write_bytes(b"damaged")
    opened = open_split(f"folder:{tmp_path}", image_size=16)
    assert opened.splits == ("train", "test")
    assert opened.labels.tolist() == [0, 0, 1] and opened.classes == ("c0", "c1")
    assert opened.read(np.array([1, 2])).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="not a readable image"):
        opened.read(np.array([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": 0}, "shots=0 is no whole number of 1 or more"),
        ({"n_test": 2.5}, "n_test=2.5 is no whole number of 1 or more"),
        ({"n_pool": True}, "n_pool=True is no whole number of 1 or more"),
        ({"seed": -1}, "seed=-1 is no whole number of 0 or more"),
        ({"image_size": 3}, "image_size=3 is no whole number of 8 or more"),
    ],
)
def test_bad_numbers_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw("phantom/blood", **change)


def test_nothing_left_to_test_says_what_to_do(tmp_path):
    class_folders(tmp_path, [1, 1, 1])
    message = "each class has one image, 3 in all, which is needed to learn from, and none is left to test; add images"
    with pytest.raises(ValueError, match=message):
        draw(f"folder:{tmp_path}")


def test_missing_data_names_the_script_and_a_typo_its_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("python data_scripts/prepare_pathology.py kather --root")):
        draw("pathology/kather", root=tmp_path)
    with pytest.raises(ValueError, match=r"unknown data set 'phantom/blod'\. Did you mean 'phantom/blood'"):
        draw("phantom/blod")


def test_copies_of_learned_images_among_the_tested_ones_are_counted(tmp_path):
    drawn = np.random.default_rng(0)
    for split, name, number in ((s, n, k) for s in ("train", "test") for n in "ab" for k in range(3)):
        save(tmp_path / split / name / f"{number}.png", drawn.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert not any("nearly identical" in note for note in draw(f"folder:{tmp_path}", n_test=6).notes)
    (tmp_path / "test" / "a" / "0.png").write_bytes((tmp_path / "train" / "a" / "2.png").read_bytes())
    (note,) = [note for note in draw(f"folder:{tmp_path}", n_test=6).notes if "nearly identical" in note]
    assert note.startswith("1 of 6 test images are nearly identical to images that are learned from")
