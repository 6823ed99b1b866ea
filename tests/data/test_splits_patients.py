"""No patient is on two sides of a split that is drawn here, and what it costs to let one be."""

import numpy as np
import pytest
from PIL import Image

from medrobust_lib.data.splits import fraction_splits, learning_splits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def hospital(root, *, patients, images=4, classes=2, split=None, seed=0):
    """A table of patients with one diagnosis and several images each, every one of which shows its patient."""
    rng = np.random.default_rng(seed)
    root.mkdir(exist_ok=True)
    lines = ["path,label,patient" + (",split" if split else "")]
    for patient in range(patients):
        looks = rng.integers(40, 216, (8, 8, 3))
        for image in range(images):
            pixels = np.clip(looks + rng.normal(0, 12, looks.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{patient}-{image}.png")
            # The diagnosis is not to be seen: every second patient has it, whatever they look like.
            line = f"{patient}-{image}.png,class {patient % classes},p{patient}"
            lines.append(line + (f",{split(patient, image)}" if split else ""))
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    return f"csv:{root / 'list.csv'}"


def nearest_neighbour_accuracy(train, test):
    known, asked = (part.images.reshape(len(part), -1).astype(float) for part in (train, test))
    nearest = ((asked[:, None] - known[None]) ** 2).sum(-1).argmin(1)
    return float((train.labels[nearest] == test.labels).mean())


def test_patients_on_both_sides_flatter_a_model_that_knows_nothing(tmp_path):
    table = hospital(tmp_path, patients=40)
    ask = {"fraction": 1.0, "n_val": 4, "n_test": 200}
    honest, leaked = (fraction_splits(table, **ask, group=group) for group in ("auto", "none"))
    assert nearest_neighbour_accuracy(leaked.train, leaked.test) > 0.8  # it recognises faces
    assert nearest_neighbour_accuracy(honest.train, honest.test) < 0.65  # chance is 0.5
    assert "all images of a patient on one side" in honest.notes[0]
    assert "patients may be on both sides" in leaked.notes[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3])
def test_no_patient_is_in_two_parts_and_every_class_is_in_each(tmp_path, seed, classes):
    table = hospital(tmp_path, patients=18, images=3, classes=classes, seed=seed)
    few = learning_splits(table, shots=2, n_test=20, n_pool=6, seed=seed)
    some = fraction_splits(table, fraction=0.5, n_val=5, n_test=30, seed=seed, test_seed=seed)
    for parts in ((few.train, few.pool, few.test), (some.train, some.val, some.test)):
        groups = [set(part.groups) for part in parts]
        assert not groups[0] & groups[2] and not groups[1] & groups[2]
        for part in (parts[0], parts[2]):
            assert set(part.labels) == set(range(classes))
    assert not set(some.train.groups) & set(some.val.groups)
    assert max(few.train.class_counts().values()) <= 4
    again = learning_splits(table, shots=2, n_test=20, n_pool=6, seed=seed)
    assert again.train.files == few.train.files and again.test.files == few.test.files


def test_a_patient_with_two_diagnoses_stays_together(tmp_path):
    hospital(tmp_path, patients=6, images=2)
    lines = (tmp_path / "list.csv").read_text().splitlines()
    lines = [line.replace(",p1", ",p0").replace(",p3", ",p2") for line in lines]  # p0 and p2 have both classes
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    for seed in range(8):
        parts = fraction_splits(f"csv:{tmp_path / 'list.csv'}", fraction=1.0, n_val=1, n_test=20, test_seed=seed)
        assert not set(parts.train.groups) & set(parts.test.groups)
        assert set(parts.test.labels) == {0, 1}


def test_the_only_patient_of_a_class_is_learned_from_and_it_is_said(tmp_path):
    hospital(tmp_path, patients=5, images=3, classes=4)  # classes 1, 2 and 3 have one patient each
    parts = learning_splits(f"csv:{tmp_path / 'list.csv'}", shots=2, n_test=20, n_pool=2)
    assert {parts.test.classes[label] for label in parts.test.labels} == {"class 0"}
    one = hospital(tmp_path / "one", patients=2, images=3)
    with pytest.raises(ValueError, match="each class has one patient, 6 images in all, which is needed to learn from"):
        fraction_splits(one, fraction=1.0, n_val=1, n_test=3)


def test_patients_on_both_sides_of_given_splits_are_counted(tmp_path):
    table = hospital(tmp_path, patients=6, split=lambda patient, image: "test" if image == 0 else "train")
    notes = learning_splits(table, shots=1, n_test=6, n_pool=2).notes
    assert "6 patients are in both train and test, so results look better than they are" in notes[0]
    third = {0: "test", 1: "val"}
    notes = learning_splits(
        hospital(tmp_path / "c", patients=6, split=lambda patient, image: third.get(image, "train")),
        shots=1, n_test=6, n_pool=2,
    ).notes  # fmt: skip
    assert all(
        f"6 patients are in both {pair}" in notes[0] for pair in ("train and test", "train and val", "test and val")
    )
    apart = hospital(tmp_path / "b", patients=6, split=lambda patient, image: "test" if patient > 3 else "train")
    assert learning_splits(apart, shots=1, n_test=6, n_pool=2).notes[0].endswith("are the data set's own splits")


def test_where_every_image_is_of_another_patient_nothing_changes(tmp_path):
    table = hospital(tmp_path, patients=12, images=1)
    asked = {"shots": 1, "n_test": 6, "n_pool": 2}
    known, unknown = learning_splits(table, **asked), learning_splits(table, **asked, group="none")
    assert known.train.files == unknown.train.files and known.test.files == unknown.test.files
