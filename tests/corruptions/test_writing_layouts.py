import errno
import zipfile

import numpy as np
import pytest

from medrobust_lib.corruptions import stored
from medrobust_lib.corruptions.stored import (
    image_chunks,
    read_labels,
    read_npz,
    remove_leftovers,
    set_file,
    set_folder,
    write_npz,
)

NAMES = ("images", "labels")


def pictures(count=5, shape=(30, 28, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(path, images, labels=None, members=NAMES):
    labels = np.arange(len(images)) if labels is None else labels
    write_npz(path, [images], shape=images.shape, labels=labels, members=members)


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [
        ("medimeta/mammo", "mammo_calc"),
        ("medimeta/pbc", "pbc"),
        ("medmnist/oct", "octmnist"),
        ("phantom/chest", "phantom_chest"),
        ("folder:my set/2", "folder_my_set_2"),
    ],
)
def test_sets_lie_where_their_authors_put_them(dataset, folder):
    assert set_folder(dataset) == folder


def test_file_names_are_those_of_both_layouts():
    assert set_file("per-severity", "medimeta/pbc", "test", "contrast", 3) == "pbc/test/contrast_severity_3.npz"
    assert set_file("per-severity", "medimeta/pbc", "val", "contrast", 0) == "pbc/val/clean.npz"
    assert set_file("concatenated", "medmnist/blood", "test", "bubble", 2) == "bloodmnist/bubble.npz"


@pytest.mark.parametrize("shape", [(30, 28, 3), (30, 28)])
def test_what_is_written_is_read_and_is_plain_npz(tmp_path, shape):
    images = pictures(shape=shape)
    write(tmp_path / "deep" / "a.npz", images, np.arange(5)[:, None])
    with np.load(tmp_path / "deep" / "a.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["images"], images)
        assert arrays["labels"].dtype == np.int64
    found, labels = read_npz(tmp_path / "deep" / "a.npz", members=NAMES)
    np.testing.assert_array_equal(found, images if len(shape) == 3 else np.repeat(images[..., None], 3, axis=3))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.npz"]


def test_bytes_do_not_depend_on_time_or_chunks(tmp_path):
    images = pictures()
    write(tmp_path / "a.npz", images)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        facts = {(info.date_time, info.create_system, info.compress_type) for info in archive.infolist()}
    assert facts == {((1980, 1, 1, 0, 0, 0), 3, zipfile.ZIP_STORED)}
    chunks = (images[first : first + 2] for first in (0, 2, 4))
    write_npz(tmp_path / "b.npz", chunks, shape=images.shape, labels=np.arange(5), members=NAMES)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_images_come_back_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_CHUNK", 2)
    images = pictures()
    write(tmp_path / "a.npz", images)
    chunks = list(image_chunks(tmp_path / "a.npz", "images", 5))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(chunks), images)


def test_a_part_of_a_compressed_file_is_read(tmp_path):
    images = pictures(15)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.tile(np.arange(3), 5)[:, None])
    found, labels = read_npz(tmp_path / "a.npz", members=NAMES, part=3, parts=5)
    np.testing.assert_array_equal(found, images[9:12])
    assert labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"a\.npz is not a usable file.*: 15 images do not divide into 4 severities"):
        read_npz(tmp_path / "a.npz", members=NAMES, part=0, parts=4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pictures(3), "labels": np.arange(2)}, "3 images and 2 labels; each image needs one"),
        ({"images": pictures(2), "labels": np.array([0, None])}, "labels is object, not an array of numbers"),
        ({"images": np.array([None, 3]), "labels": np.arange(2)}, "images is object, not an array of numbers"),
        ({"images": pictures(2) / 255, "labels": np.arange(2)}, "images is float64, not uint8"),
        ({"images": pictures(2), "labels": np.array([0.5, 1])}, "one whole-number label per image is needed"),
        ({"images": pictures(2), "labels": np.eye(2)}, r"one whole-number label .* got float64 of shape \(2, 2\)"),
        ({"images": pictures(2, (28, 28, 4)), "labels": np.arange(2)}, r"images has shape \(2, 28, 28, 4\)"),
        ({"pictures": pictures(2), "labels": np.arange(2)}, "no array 'images' in it; it holds pictures, labels"),
    ],
)
def test_other_contents_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz is not a usable file of corrupted images: {message}"):
        read_labels(tmp_path / "a.npz", members=NAMES)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 and then nothing"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is not a usable file of corrupted images"):
        read_labels(tmp_path / "a.npz", members=NAMES)
    np.save(tmp_path / "b.npy", pictures(2))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"b\.npz is not a usable file"):
        read_labels(tmp_path / "b.npz", members=NAMES)


def test_a_damaged_image_is_noticed(tmp_path):
    write(tmp_path / "a.npz", pictures())
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is not a usable file.*images is damaged at image"):
        read_npz(tmp_path / "a.npz", members=NAMES)


@pytest.mark.parametrize(
    ("chunks", "labels", "message"),
    [
        ([pictures(3)], 2, "3 images and 2 labels; each image needs one"),
        ([pictures(2)], 3, "2 images came, 3 were announced"),
        ([pictures(3) / 255], 3, r"float64 images of shape \(3, 30, 28, 3\); expected uint8"),
        ([pictures(3, (28, 28, 3))], 3, r"uint8 images of shape \(3, 28, 28, 3\); expected uint8"),
    ],
)
def test_nothing_wrong_is_written(tmp_path, chunks, labels, message):
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "a.npz", chunks, shape=(3, 30, 28, 3), labels=np.arange(labels), members=NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    write(tmp_path / "a.npz", pictures())
    before = (tmp_path / "a.npz").read_bytes()

    def write_on_a_full_disk(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile._ZipWriteFile, "write", write_on_a_full_disk)
    for name in ("a.npz", "b.npz"):
        with pytest.raises(OSError, match=rf"the disk is full: {name} could not be written.*B are free: free some, or"):
            write(tmp_path / name, pictures(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_bytes() == before


def test_other_troubles_of_the_disk_keep_their_words(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        write(tmp_path / "file" / "a.npz", pictures())


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in (".a.npz.17.part", ".hidden", "b.npz"):
        (tmp_path / name).touch()
    remove_leftovers([tmp_path / "a.npz", tmp_path / "b.npz"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "b.npz"]
