import re
import unicodedata

import h5py
import numpy as np
import pydicom
import pytest
import yaml
from PIL import Image

from medrobust_lib.data.own_images import class_folder_split, csv_split
from medrobust_lib.data.readers import medimeta_split, medmnist_file, medmnist_split
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
    assert medmnist_file(tmp_path / "bloodmnist", None) is None
    for name in ("bloodmnist.npz", "bloodmnist_64.npz", "bloodmnist_128.npz"):
        (tmp_path / name).touch()
    assert medmnist_file(tmp_path / "bloodmnist", None).name == "bloodmnist_128.npz"
    assert medmnist_file(tmp_path / "bloodmnist", 28).name == "bloodmnist.npz"
    assert medmnist_file(tmp_path / "bloodmnist", 224).name == "bloodmnist_128.npz"


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


@pytest.mark.parametrize("name", ["dev", "test_set"])
def test_a_folder_that_is_passed_over_is_named_where_a_split_is_missed(tmp_path, name):
    layout(tmp_path, "train/a/1.png", "train/b/1.png", f"{name}/a/1.png", f"{name}/b/1.png")
    message = f"no split 'test'. Choose one of: train. Passed over: {name}; rename what is a split to train, val, test."
    with pytest.raises(ValueError, match=re.escape(message)):
        class_folder_split(tmp_path, "test")
    assert class_folder_split(tmp_path, "train").labels.tolist() == [0, 1]
    (tmp_path / name).rename(tmp_path / "test")
    assert class_folder_split(tmp_path, "test").labels.tolist() == [0, 1]


def test_two_folders_for_one_split_are_refused(tmp_path):
    save(tmp_path / "val" / "a" / "1.png")
    save(tmp_path / "valid" / "a" / "1.png")
    with pytest.raises(ValueError, match="two folders for split 'val': val, valid"):
        class_folder_split(tmp_path, "val")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no folder at {tmp_path / 'nowhere'}")):
        class_folder_split(tmp_path / "nowhere", "test")


def write_as(path, kind):
    """An image under a name that does not say its kind."""
    image = save(path.with_suffix(f".{kind}"))
    return image.rename(path)


def write_dicom(path, **elements):
    record = pydicom.Dataset()
    record.file_meta = pydicom.dataset.FileMetaDataset()
    record.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    record.SOPClassUID, record.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "2.25.1"
    if not elements:
        record.set_pixel_data(np.arange(256, dtype=np.uint8).reshape(16, 16), "MONOCHROME2", 8)
    record.update(elements)
    path.parent.mkdir(parents=True, exist_ok=True)
    record.save_as(path, enforce_file_format=True)
    return path


def test_images_in_folders_below_a_class_are_of_that_class_and_it_is_said(tmp_path):
    save(tmp_path / "a" / "0.png", value=1)
    save(tmp_path / "a" / "1.png", value=2)
    for place in range(3):
        save(tmp_path / "a" / "patient 7" / f"{place}.png", value=3)
        save(tmp_path / "b" / f"patient {place}" / "left" / "0.png", value=4)
    split = class_folder_split(tmp_path, "all")
    assert split.labels.tolist() == [0] * 5 + [1] * 3 and split.totals == (5, 3)
    assert [image[0, 0, 0] for image in first(split, range(8))] == [1, 2, 3, 3, 3, 4, 4, 4]
    assert split.files[:3] == ("a/0.png", "a/1.png", "a/patient 7/0.png") and split.files[7] == "b/patient 2/left/0.png"
    assert split.caveats == (
        "6 of 8 images lie in folders below their class folder and were taken for images of that class and each of "
        "these folders for a patient.",
    )
    assert split.groups(np.arange(8)) == (
        "a/0.png",
        "a/1.png",
        *["patient 7"] * 3,
        "patient 0",
        "patient 1",
        "patient 2",
    )
    alone = class_folder_split(tmp_path, "all", group="none")
    assert alone.groups(np.arange(8)) == () and alone.caveats[0].endswith("were taken for images of that class.")


def test_a_file_is_an_image_by_its_content_where_its_suffix_does_not_say(tmp_path):
    for name, kind in {
        "phone.jfif": "jpg",
        "no suffix": "png",
        "x.001": "tiff",
        "y.bmp2": "bmp",
        "z.dat": "webp",
    }.items():
        write_as(tmp_path / "a" / name, kind)
    write_dicom(tmp_path / "a" / "IM0001")
    write_dicom(tmp_path / "b" / "1.2.840.113")
    split = class_folder_split(tmp_path, "all")
    assert split.files == ("a/IM0001", "a/no suffix", "a/phone.jfif", "a/x.001", "a/y.bmp2", "a/z.dat", "b/1.2.840.113")
    assert split.caveats == () and split.labels.tolist() == [0] * 6 + [1]
    np.testing.assert_array_equal(first(split, [6])[0][..., 1], np.arange(256).reshape(16, 16))


def test_a_file_with_the_suffix_of_an_image_that_cannot_be_read_is_refused_by_name(tmp_path):
    layout(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "2.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:40])
    split = class_folder_split(tmp_path, "test")
    assert len(split.labels) == 3 and split.caveats == ()
    with pytest.raises(ValueError, match=r"a/2\.png is not a readable image: .* Replace or remove the file"):
        first(split, [1])


def test_what_is_left_out_is_counted_and_named(tmp_path):
    root = tmp_path / "set"
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png", "loose.png", "test/loose.png"):
        save(root / name)
    save(root / "holdout" / "a" / "1.png")
    (root / "test" / "b" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (root / "test" / "b" / "scans").symlink_to(root / "train")  # below a class, a link may lead in a circle
    write_dicom(root / "test" / "b" / "DICOMDIR", PatientID="7")  # a DICOM file, but without an image
    (root / "test" / "b" / "notes.txt").write_text("see page 3")
    (root / "README.md").write_text("about the set, and no image")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "__MACOSX/._1.png", "@eaDir/1.png"):
        (root / "test" / "a" / name).parent.mkdir(exist_ok=True)
        (root / "test" / "a" / name).write_bytes(b"litter")
    split = class_folder_split(root, "test")
    assert split.files == ("test/a/1.png", "test/b/1.png")
    (caveat,) = split.caveats
    assert caveat.startswith("Left out of set, as no readable images or outside the class folders: ")
    assert caveat.endswith(" and 4 more (7 in all).")
    everything = " ".join(class_folder_split(root, name).caveats[0] for name in ("test", "train"))
    assert "litter" not in everything and "README" not in everything


@pytest.mark.parametrize("form", ["folder", "csv"])
def test_masks_beside_their_images_are_counted(tmp_path, form):
    masks = ("b/x (1)_mask.png", "b/x (1)_mask_1.png", "m/2_Seg.tif", "m/3_segmentation.png", "m/4_label.png")
    images = ("b/x (1).png", "m/2.png", "m/3.jpg", "m/4.bmp", "m/5_mask.png", "b/2_mask.png", "b/flask.png")
    names = (*masks, *images)
    layout(tmp_path, *names)
    if form == "folder":
        split = class_folder_split(tmp_path, "test")
    else:
        rows = "".join(f"{name},{name[0]}\n" for name in sorted(names))
        split = csv_split(write_csv(tmp_path, f"path,label\n{rows}"), "test")
    (caveat,) = split.caveats
    assert caveat.startswith("5 of 12 images are called after another one as its mask or label (b/x (1)_mask.png, b/x")
    assert class_folder_split(layout(tmp_path / "n", *(f"n/{name}" for name in images)) / "n", "test").caveats == ()


def layout(root, *names):
    for name in names:
        save(root / name)
    return root


@pytest.mark.parametrize(
    "names, message",
    [
        ("dataset/a/1.png dataset/b/1.png", r"one folder only, 'dataset', .* \(a, b\): write folder:.*set/dataset$"),
        ("set/train/a/1.png set/test/b/1.png", r"'set', which holds folders \(test, train\): write folder:.*set/set$"),
        ("train/dataset/a/1.png test/dataset/b/1.png", "'dataset', which holds .*: move what dataset holds up"),
        ("a/train/1.png a/test/1.png b/train/1.png", "folders for splits .*: expected set/CLASS/FILE or set/SPLIT/"),
        ("1.png 2.png 3.png 4.png", r"4 images lie in .*set itself \(1.png, 2.png, 3.png and 1 more\).* in a table"),
        ("train/1.png test/2.png", "images lie in .* itself .* into a folder named after its class"),
        ("x/images/1.png x/masks/1.png y/images/1.png y/masks/1.png", r"x, y of .* hold the same folders \(images"),
    ],
)  # fmt: skip
def test_another_layout_is_named_with_what_helps(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        class_folder_split(layout(tmp_path / "set", *names.split()), "test")


def test_where_every_class_holds_every_patient_the_caller_says_which_is_which(tmp_path):
    root = layout(tmp_path / "set", "x/p/1.png", "x/q/2.png", "y/p/3.png", "y/q/4.png")
    with pytest.raises(ValueError, match=r"write folder:.*\?group=folder where p, q are patients, else .*\?group=none"):
        class_folder_split(root, "test")
    found = class_folder_split(root, "test", group="folder")
    assert (found.labels.tolist(), found.groups(np.arange(4))) == ([0, 0, 1, 1], ("p", "q", "p", "q"))
    assert class_folder_split(root, "test", group="none").groups(np.arange(4)) == ()


def test_graded_classes_beside_a_manifest_of_another_program_are_read(tmp_path):
    root = layout(tmp_path / "grades", "1/1.png", "2/1.png")
    patients = layout(tmp_path / "patients", "x/1/1.png", "x/2/1.png", "y/3/1.png")
    for folder in (root, patients, tmp_path):
        (folder / "manifest.json").write_text('{"parameters": ["a", "b"]}')
    assert class_folder_split(root, "test").labels.tolist() == [0, 1]
    assert class_folder_split(patients, "test").labels.tolist() == [0, 0, 1]


def test_layouts_that_only_look_alike_are_read(tmp_path):
    one_kind = layout(tmp_path / "one", "x/images/1.png", "y/images/1.png")  # the usual way of some tools
    patients = layout(tmp_path / "two", "x/p1/1.png", "x/p2/1.png", "y/p1/1.png", "y/p3/1.png")
    assert class_folder_split(one_kind, "test").labels.tolist() == [0, 1]
    assert class_folder_split(patients, "test").labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("t.csv", r"is no folder but a table: write csv:.*t\.csv$"),
        ("x.npz", "a file of NumPy arrays: MedMNIST's are read by name, such as medmnist/breast with root="),
        ("x.zip", "an archive: unpack it and write folder:"),
        ("x.tar.gz", "an archive: unpack it and write folder:"),
        ("x.png", "an image: write folder: and the folder that holds the class folders"),
        ("x.h5", "a file: write folder: and a folder of class folders, or csv:"),
    ],
)
def test_a_file_given_as_folder_is_named_with_what_helps(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(ValueError, match=message):
        class_folder_split(tmp_path / name, "test")


def test_lines_of_classnames_may_hold_folders_with_spaces_other_accents_and_a_mark_at_the_start(tmp_path):
    folder = unicodedata.normalize("NFD", "Zähne")
    layout(tmp_path, "lung/1.png", "lung nodule/1.png", "left lung/1.png", f"{folder}/1.png", "10 %/1.png")
    lines = (
        "Zähne the teeth\nlung a lung\nlung nodule a nodule of the lung\nleft lung\tlung on the left\n10 % one in ten\n"
    )
    (tmp_path / "classnames.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    split = class_folder_split(tmp_path, "test")
    assert dict(zip(split.codes, split.names, strict=True)) == {
        "lung": "a lung", "lung nodule": "a nodule of the lung", "left lung": "lung on the left",
        folder: "the teeth", "10 %": "one in ten",
    }  # fmt: skip


# CSV


def write_csv(folder, text):
    (folder / "table.csv").write_text(text)
    return folder / "table.csv"


def test_paths_of_other_systems_find_their_files(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Zähne") for form in ("NFC", "NFD"))
    save(tmp_path / "x" / "1.png", value=1)
    save(tmp_path / apart / f"{apart}.png", value=2)
    save(tmp_path / f"{composed}.png", value=3)
    rows = f"x\\1.png,a\n{composed}\\{composed}.png,b\n{apart}.png,b\n"
    split = csv_split(write_csv(tmp_path, f"\ufeffpath,label\n{rows}"), "test")
    assert split.labels.tolist() == [0, 1, 1]
    assert [image[0, 0, 0] for image in first(split, range(3))] == [1, 2, 3]
    with pytest.raises(ValueError, match="lines 2 and 3: .* is listed twice"):
        csv_split(write_csv(tmp_path, "path,label\nx\\1.png,a\nx/1.png,b\n"), "test")
    with pytest.raises(FileNotFoundError, match="line 2: no image file .*; a path with a drive is one of Windows"):
        csv_split(write_csv(tmp_path, "path,label\nC:\\x\\1.png,a\n"), "test")


def test_a_path_with_a_comma_is_read_in_quotes_and_refused_without(tmp_path):
    save(tmp_path / "a.png", value=1)
    save(tmp_path / "a.png,b.png", value=2)
    assert first(csv_split(write_csv(tmp_path, 'path,label\n"a.png,b.png",x\n'), "test"))[0][0, 0, 0] == 2
    # pandas would take the first column for the rows' names, and b.png for the path.
    for rows in ("a.png,b.png,x\na.png,b.png,y\n", "a.png,x\na.png,b.png,y\n", "a.png,x,\n"):
        with pytest.raises(
            ValueError, match=r"Expected 2 fields in line \d, saw 3. Save it .* comma in it into quotes"
        ):
            csv_split(write_csv(tmp_path, f"path,label\n{rows}"), "test")


def test_empty_lines_of_a_table_count_as_lines(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="line 5: no image file"):
        csv_split(write_csv(tmp_path, "path,label\n\na.png,x\n\nb.png,y\n\n"), "test")


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
        ("file,label\na.png,x\n", ValueError, "has no column 'path'; its columns are file, label. Call the column of"),
        ("Path,PATH,label\na.png,x,y\n", ValueError, "has more than one column 'path'"),
        ("path,label,label\na.png,x,y\n", ValueError, "has more than one column 'label'"),
        ("path;label\na.png;x\n", ValueError, "it has semicolons between its columns path, label. Save it as CSV"),
        ("path\tlabel\na.png\tx, y\n", ValueError, "it has tabs between its columns path, label. Save it as CSV"),
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


@pytest.mark.parametrize("content", [b"", b"path,label\na,b\nc,d,e,f\n"])
def test_unreadable_csv_is_named(tmp_path, content):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'table.csv'))} is not a readable CSV table"):
        csv_split(tmp_path / "table.csv", "test")


@pytest.mark.parametrize("header", ["Path,Label,Split,Age", "PATH, label ,SPLIT,age", "path,Label,split,Path"])
def test_column_names_may_differ_in_case(tmp_path, header):
    layout(tmp_path, "a.png", "b.png")
    split = csv_split(write_csv(tmp_path, f"{header}\na.png,x,test,1\nb.png,y,train,2\n"), "test")
    assert split.files == ("a.png",) and split.codes == ("x", "y") and split.splits == ("test", "train")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_in_another_encoding_is_told_how_to_save_it(tmp_path, encoding):
    layout(tmp_path, "x/1.png", "y/1.png")
    (tmp_path / "t.csv").write_text("path,label\nx/1.png,Zähne\ny/1.png,Ärzte\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"t\.csv is not UTF-8: save it as CSV UTF-8 \(byte \d+: "):
        csv_split(tmp_path / "t.csv", "test")
    (tmp_path / "classnames.txt").write_text("x Zähne\ny Ärzte\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"classnames\.txt is not UTF-8: save it as text in UTF-8 \(byte \d+: "):
        class_folder_split(tmp_path, "test")


def test_a_folder_given_as_table_is_named(tmp_path):
    with pytest.raises(ValueError, match="is a folder, not a table: write folder:"):
        csv_split(tmp_path, "test")


def test_missing_csv_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CSV file at .*none\.csv"):
        csv_split(tmp_path / "none.csv", "test")
