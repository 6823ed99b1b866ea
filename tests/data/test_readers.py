import re

import h5py
import numpy as np
import pytest
import yaml
from PIL import Image

from medrobust_lib.data.readers import (
    class_folder_split,
    csv_split,
    medimeta_split,
    medmnist_file,
    medmnist_split,
)
from medrobust_lib.data.wording import class_wording

PNEUMONIA = class_wording("medmnist/pneumonia")
FUNDUS = class_wording("medimeta/fundus")


def save(path, value=0, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)
    return path


def first(split, positions=(0,)):
    return list(split.read(np.array(positions)))


# MedMNIST


def write_npz(path, *, images, labels, split="test"):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{f"{split}_images": images, f"{split}_labels": labels})
    return path


@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize("shape", [(6, 28, 28), (6, 28, 28, 3), (6, 224, 224)])
def test_medmnist_gray_and_rgb_with_both_label_shapes(tmp_path, shape, column):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.array([0, 1, 1, 0, 1, 1], np.uint8)
    path = write_npz(tmp_path / "x.npz", images=images, labels=labels[:, None] if column else labels)
    split = medmnist_split(path, "test", PNEUMONIA)
    assert split.labels.dtype == np.int64 and split.labels.tolist() == labels.tolist()
    assert split.shapes() == {shape[1:3]}
    read = np.stack(first(split, [1, 4, 5]))
    expected = images[[1, 4, 5]]
    np.testing.assert_array_equal(read, expected if images.ndim == 4 else np.repeat(expected[..., None], 3, 3))
    assert read.dtype == np.uint8


def test_medmnist_takes_the_size_asked_for_else_the_largest(tmp_path):
    assert medmnist_file(tmp_path, "bloodmnist", None) is None
    for name in ("bloodmnist.npz", "bloodmnist_64.npz", "bloodmnist_128.npz"):
        (tmp_path / name).touch()
    assert medmnist_file(tmp_path, "bloodmnist", None).name == "bloodmnist_128.npz"
    assert medmnist_file(tmp_path, "bloodmnist", 28).name == "bloodmnist.npz"
    assert medmnist_file(tmp_path, "bloodmnist", 224).name == "bloodmnist_128.npz"


def test_medmnist_label_outside_the_list_names_file_value_and_list(tmp_path):
    images = np.zeros((2, 28, 28), np.uint8)
    path = write_npz(tmp_path / "x.npz", images=images, labels=np.array([[0], [4]], np.uint8))
    message = f"{path} (test_labels): label 4 (image 1; 1 such) is outside the class list: 0 'normal', 1 'pneumonia'"
    with pytest.raises(ValueError, match=re.escape(message)):
        medmnist_split(path, "test", PNEUMONIA)


def test_medmnist_missing_split_names_the_keys(tmp_path):
    images = np.zeros((2, 28, 28), np.uint8)
    path = write_npz(tmp_path / "x.npz", images=images, labels=np.zeros(2, np.uint8), split="train")
    with pytest.raises(ValueError, match="has no test_images and test_labels; it holds train_images, train_labels"):
        medmnist_split(path, "test", PNEUMONIA)


def test_medmnist_corrupt_file_is_named(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a readable MedMNIST file")):
        medmnist_split(path, "test", PNEUMONIA)


def test_medmnist_damage_inside_the_images_names_the_image(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    path = write_npz(tmp_path / "x.npz", images=images, labels=np.zeros(40, np.uint8))
    content = bytearray(path.read_bytes())
    content[10_000:12_000] = bytes(2_000)
    path.write_bytes(content)
    split = medmnist_split(path, "test", PNEUMONIA)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: test_images is damaged at image \d+"):
        first(split, range(40))


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((2, 28, 28)), np.zeros(2, np.uint8), "test_images is float64, not uint8"),
        (np.zeros((2, 28, 28), np.uint8), np.zeros(3, np.uint8), "2 images and 3 labels; each image needs one"),
        (np.zeros((2, 28, 28), np.uint8), np.zeros((2, 14), np.uint8), "one whole-number label per image"),
        (np.zeros((2, 28, 28), np.uint8), np.array([0.0, 0.5]), "one whole-number label per image"),
        (np.array([{}, {}]), np.zeros(2, np.uint8), "is not a readable MedMNIST file"),
    ],
)
def test_medmnist_unexpected_arrays_are_refused(tmp_path, images, labels, message):
    path = write_npz(tmp_path / "x.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=re.escape(message)):
        medmnist_split(path, "test", PNEUMONIA)


# MedIMeta


def write_medimeta(folder, *, images="hdf5", names=("normal", "abnormal"), labels=(0, 1, 1, 0, 1, 0), channels=3):
    for name in ("splits", "task_labels", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    tasks = [
        {
            "task_name": "disease presence",
            "task_target": "BINARY_CLASSIFICATION",
            "labels": dict(enumerate(names)),
        },
        {"task_name": "disease labels", "task_target": "MULTILABEL_CLASSIFICATION", "labels": {0: "DR", 1: "MH"}},
    ]
    (folder / "info.yaml").write_text(yaml.safe_dump({"id": "fundus", "tasks": tasks}))
    np.save(folder / "task_labels" / "disease presence.npy", np.array(labels))
    (folder / "splits" / "train.txt").write_text("images/000000.tiff\nimages/000001.tiff\n")
    (folder / "splits" / "test.txt").write_text("images/000005.tiff\nimages/000002.tiff\nimages/000004.tiff\n")
    pixels = np.stack([np.full((20, 20, channels), 10 * index, np.uint8) for index in range(6)])
    if images == "hdf5":
        with h5py.File(folder / "images.hdf5", "w") as container:
            container["images"] = pixels
    else:
        for index, image in enumerate(pixels):
            Image.fromarray(image.squeeze()).save(folder / "images" / f"{index:06d}.tiff")
    return folder


@pytest.mark.parametrize("images", ["hdf5", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_medimeta_maps_labels_by_name_and_reads_the_split(tmp_path, images, channels):
    split = medimeta_split(write_medimeta(tmp_path, images=images, channels=channels), "test", FUNDUS)
    # info.yaml: 0 normal, 1 abnormal; the papers' list: 0 abnormal, 1 normal. Images 2, 4, 5.
    assert split.labels.tolist() == [0, 0, 1]
    assert split.shapes() == {(20, 20)}
    assert [image[0, 0].tolist() for image in first(split, [0, 1, 2])] == [[20] * 3, [40] * 3, [50] * 3]


def test_medimeta_label_outside_the_list_names_file_image_and_list(tmp_path):
    folder = write_medimeta(tmp_path, labels=(0, 1, 1, 0, 9, 0))
    message = r"presence\.npy: label 9 of image 000004 is outside .*0 'normal', 1 'abnormal'"
    with pytest.raises(ValueError, match=message):
        medimeta_split(folder, "test", FUNDUS)


def test_medimeta_without_a_fitting_task_lists_the_tasks(tmp_path):
    folder = write_medimeta(tmp_path, names=("cat", "dog"))
    message = r"0 tasks have the classes abnormal, normal; .*disease presence: \['cat', 'dog'\]"
    with pytest.raises(ValueError, match=message):
        medimeta_split(folder, "test", FUNDUS)


@pytest.mark.parametrize("missing", ["info.yaml", "splits/test.txt", "task_labels/disease presence.npy"])
def test_medimeta_incomplete_folder_names_the_file(tmp_path, missing):
    folder = write_medimeta(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"no file at {folder / missing}")):
        medimeta_split(folder, "test", FUNDUS)


def test_medimeta_broken_container_and_short_labels_are_named(tmp_path):
    folder = write_medimeta(tmp_path, labels=(0, 1, 1))
    with pytest.raises(ValueError, match="has 3 labels, but the test split names image 5"):
        medimeta_split(folder, "test", FUNDUS)
    write_medimeta(folder)
    (folder / "images.hdf5").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"images\.hdf5 is not a readable MedIMeta image file"):
        medimeta_split(folder, "test", FUNDUS)


# class folders


def test_split_folders_share_one_class_list(tmp_path):
    for split, classes in {"train": ("a", "b", "c"), "val": ("a", "c"), "test": ("b", "c")}.items():
        for name in classes:
            save(tmp_path / split / name / "1.png", value=ord(name))
    # "b" is missing from val and "a" from test; neither may shift the labels of the rest.
    assert class_folder_split(tmp_path, "val").labels.tolist() == [0, 2]
    test = class_folder_split(tmp_path, "test")
    assert test.codes == ("a", "b", "c") and test.labels.tolist() == [1, 2]
    assert [image[0, 0, 0] for image in first(test, [0, 1])] == [ord("b"), ord("c")]


def test_images_folder_and_spelt_out_validation_are_found(tmp_path):
    save(tmp_path / "images" / "Validation" / "a" / "1.jpg")
    save(tmp_path / "images" / "test" / "b" / "1.jpg")
    assert class_folder_split(tmp_path, "val").labels.tolist() == [0]


def test_unsplit_folders_answer_to_test_and_all_but_never_to_train(tmp_path):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "1.png")
    for asked in ("test", "all"):
        split = class_folder_split(tmp_path, asked)
        assert split.split == "all" and split.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="not divided into splits, so it has no 'train'; ask for 'all'"):
        class_folder_split(tmp_path, "train")


def test_numbered_folders_sort_as_numbers(tmp_path):
    for number in range(12):
        save(tmp_path / str(number) / "1.png")
    split = class_folder_split(tmp_path, "all")
    assert split.codes == tuple(str(number) for number in range(12))
    assert split.labels.tolist() == list(range(12))


def test_names_lose_underscores_and_classnames_txt_wins(tmp_path):
    save(tmp_path / "TUM_1" / "1.png")
    save(tmp_path / "smooth-muscle" / "1.png")
    assert class_folder_split(tmp_path, "all").names == ("TUM 1", "smooth muscle")
    (tmp_path / "classnames.txt").write_text("smooth-muscle smooth muscle tissue\nTUM_1 tumour epithelium\n")
    assert class_folder_split(tmp_path, "all").names == ("tumour epithelium", "smooth muscle tissue")
    (tmp_path / "classnames.txt").write_text("TUM_1 tumour epithelium\n")
    with pytest.raises(ValueError, match=r"classnames.txt gives no name for class 'smooth-muscle'; it names TUM_1"):
        class_folder_split(tmp_path, "all")


def test_other_and_hidden_files_are_ignored(tmp_path):
    save(tmp_path / "a" / "1.PNG")
    save(tmp_path / "b" / "1.png")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "a" / "._1.png").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    assert class_folder_split(tmp_path, "all").labels.tolist() == [0, 1]


def test_no_images_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=rf"no images in {re.escape(str(tmp_path))}: expected .*CLASS/FILE"):
        class_folder_split(tmp_path, "test")


def test_empty_class_folder_is_named(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"class folder 'b' in .* holds no images in any split"):
        class_folder_split(tmp_path, "test")


def test_empty_and_unknown_splits_are_named(tmp_path):
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / "train" / "b" / "1.png")
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images in split 'test'"):
        class_folder_split(tmp_path, "test")
    with pytest.raises(ValueError, match=r"has no split 'val'. Choose one of: test, train"):
        class_folder_split(tmp_path, "val")


def test_two_folders_for_one_split_are_refused(tmp_path):
    save(tmp_path / "val" / "a" / "1.png")
    save(tmp_path / "valid" / "a" / "1.png")
    with pytest.raises(ValueError, match="two folders for split 'val': val, valid"):
        class_folder_split(tmp_path, "val")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no folder at {tmp_path / 'nowhere'}")):
        class_folder_split(tmp_path / "nowhere", "test")


# CSV


def write_csv(folder, text):
    (folder / "table.csv").write_text(text)
    return folder / "table.csv"


def test_csv_with_splits_relative_and_absolute_paths(tmp_path):
    inside, outside = tmp_path / "set", tmp_path / "elsewhere"
    save(inside / "x" / "1.png", value=1)
    save(inside / "2.png", value=2)
    far = save(outside / "3.png", value=3)
    table = write_csv(inside, f"path,label,split\nx/1.png,benign,test\n2.png,NA,train\n{far},NA,Test\n")
    split = csv_split(table, "test")
    # The label "NA" is a class name, not a missing value; uppercase sorts first.
    assert split.codes == ("NA", "benign") and split.labels.tolist() == [1, 0]
    assert [image[0, 0, 0] for image in first(split, [0, 1])] == [1, 3]


def test_csv_without_splits_and_with_numbers_for_classes(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    table = write_csv(tmp_path, "path,label\na.png,10\nb.png,2\nc.png,10\n")
    (tmp_path / "classnames.txt").write_text("2 mild disease\n10 severe disease\n")
    split = csv_split(table, "test")
    assert split.split == "all" and split.names == ("mild disease", "severe disease")
    assert split.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("file,label\na.png,x\n", ValueError, "has no column 'path'; its columns are file, label"),
        ("path,label\n", ValueError, "the table has no rows"),
        ("path,label\na.png,\n", ValueError, "line 2: no label"),
        ("path,label\na.png,x\na.png,y\n", ValueError, "lines 2 and 3: "),
        ("path,label\n../a.png,x\n", ValueError, "line 2: ../a.png leaves the folder of the CSV"),
        ("path,label,split\na.png,x,tset\n", ValueError, "line 2: unknown split 'tset'. Did you mean 'test'?"),
        ("path,label\na.png,x\nb.png,y\n", FileNotFoundError, "line 3: no image file at "),
    ],
)
def test_csv_mistakes_name_the_line(tmp_path, text, error, message):
    save(tmp_path / "a.png")
    with pytest.raises(error, match=re.escape(message)):
        csv_split(write_csv(tmp_path, text), "test")


@pytest.mark.parametrize("content", [b"", b"path,label\n\xff\xfe.png,x\n", b"path,label\na,b\nc,d,e,f\n"])
def test_unreadable_csv_is_named(tmp_path, content):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'table.csv'))} is not a readable CSV table"):
        csv_split(tmp_path / "table.csv", "test")


def test_missing_csv_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CSV file at .*none\.csv"):
        csv_split(tmp_path / "none.csv", "test")
