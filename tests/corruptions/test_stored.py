import json
import warnings

import numpy as np
import pytest

from medrobust_lib.corruptions.stored import read_corrupted
from medrobust_lib.data.wording import class_wording
from preparing.corrupted_sets import check_benchmark


def pictures(count, *shape):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def released(tmp_path):
    """A folder as the authors of MediMeta-C share it: no manifest, no clean images, labels as a column."""
    place = tmp_path / "MediMeta-C" / "fundus" / "test"
    place.mkdir(parents=True)
    images, labels = pictures(4, 30, 32, 3), np.array([[1], [1], [0], [1]], np.uint8)
    np.savez_compressed(place / "contrast_severity_2.npz", images=images, labels=labels)
    return tmp_path / "MediMeta-C", images, labels[:, 0]


def read_unverified(*arguments, **options):
    with pytest.warns(UserWarning, match="no manifest of ours: nothing was verified"):
        return read_corrupted(*arguments, **options)


def test_the_authors_files_are_read_and_said_to_be_unverified(released):
    folder, images, labels = released
    message = r"nothing was verified, neither that contrast_severity_2\.npz is .* class list abnormal, normal"
    with pytest.warns(UserWarning, match=message) as caught:
        data = read_corrupted(folder, "medimeta/fundus", "contrast", severity=2)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, labels)
    assert (data.id, data.split) == ("medimeta/fundus", "test")
    assert data.classes == class_wording("medimeta/fundus").prompt_nouns
    assert data.provenance["verified"] == "nothing: no manifest beside the files"
    assert data.provenance["corruption"] == {"name": "contrast", "severity": 2}
    assert data.indices.tolist() == [0, 1, 2, 3]
    assert not data.synthetic


def test_gray_files_with_flat_labels_are_read(released):
    folder, _, _ = released
    place = folder / "oct" / "test"
    place.mkdir(parents=True)
    images = pictures(4, 30, 32)
    np.savez(place / "pixelate_severity_5.npz", images=images, labels=np.arange(4))
    np.savez(place / "clean.npz", images=images, labels=np.arange(4))
    data = read_unverified(folder, "medimeta/oct", "pixelate", severity=5)
    np.testing.assert_array_equal(data.images, np.repeat(images[..., None], 3, axis=3))
    assert read_unverified(folder, "medimeta/oct").provenance["corruption"] == {"name": "clean", "severity": 0}


def test_the_official_files_are_read_by_severity(tmp_path):
    images = pictures(15, 28, 28)
    (tmp_path / "breastmnist").mkdir()
    labels = np.tile([1, 0, 1], 5)[:, None]
    np.savez_compressed(tmp_path / "breastmnist" / "speckle_noise.npz", test_images=images, test_labels=labels)
    data = read_unverified(tmp_path, "medmnist/breast", "speckle_noise", severity=4)
    np.testing.assert_array_equal(data.images[..., 1], images[9:12])
    assert data.labels.tolist() == [1, 0, 1]


def test_labels_in_another_order_are_mapped_by_name(released):
    folder, images, _ = released
    place = folder / "oct" / "test"
    place.mkdir(parents=True)
    names = class_wording("medimeta/oct").names
    np.savez(place / "contrast_severity_2.npz", images=images, labels=np.arange(4))
    order = [names[1], names[2], names[0], names[3]]
    data = read_unverified(folder, "medimeta/oct", "contrast", severity=2, label_order=order)
    assert [names[label] for label in data.labels] == order
    for wrong in (order[:3], [order[0], *order[:3]], [*order[:3], "sick"]):
        with pytest.raises(ValueError, match="name each class of medimeta/oct once: "):
            read_corrupted(folder, "medimeta/oct", "contrast", severity=2, label_order=wrong)


def test_labels_outside_the_class_list_are_refused(released):
    folder, images, _ = released
    path = folder / "fundus" / "test" / "contrast_severity_2.npz"
    np.savez(path, images=images, labels=np.array([0, 1, 2, 0]))
    for order in (None, ["normal", "abnormal"]):
        with (
            warnings.catch_warnings(),
            pytest.raises(ValueError, match=r"label 2 \(image 2; 1 such\) is outside the class list"),
        ):
            warnings.simplefilter("ignore")
            read_corrupted(folder, "medimeta/fundus", "contrast", severity=2, label_order=order)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (
            ("medimeta/fundus", "pixelate", 2),
            FileNotFoundError,
            r"no pixelate of severity 2 of medimeta/fundus: looked at .*It holds fundus/test/contrast_severity_2\.npz",
        ),
        (("medimeta/fundus", "contrast", 3), FileNotFoundError, "no contrast of severity 3 of medimeta/fundus"),
        (("medimeta/fundus", "clean", 0), FileNotFoundError, r"take them from load_dataset\('medimeta/fundus'"),
        (("medimeta/pbc", "contrast", 2), FileNotFoundError, "There is no set in .*pbc"),
        (("medimeta/fundis", "contrast", 2), ValueError, "no 'medimeta/fundis'. Did you mean 'medimeta/fundus'"),
        (("medimeta/fundus", "contrast", 7), ValueError, "severity 7: choose 1, 2, 3, 4 or 5, or 0"),
        (("medimeta/fundus", "clean", 2), ValueError, "severity=2 of the clean images; name a corruption"),
    ],
)
def test_what_is_not_there_is_named(released, request_, error, message):
    dataset, corruption, severity = request_
    with pytest.raises(error, match=message):
        read_corrupted(released[0], dataset, corruption, severity=severity)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder at .*nowhere"):
        read_corrupted(tmp_path / "nowhere", "medimeta/pbc")


@pytest.mark.parametrize("manifest", ["[]", "not JSON", '{"parameters": {"kind": "something else"}}', '{"a": 1}'])
def test_another_programs_manifest_is_not_ours(released, manifest):
    folder, images, _ = released
    (folder / "manifest.json").write_text(manifest)
    np.testing.assert_array_equal(read_unverified(folder, "medimeta/fundus", "contrast", severity=2).images, images)
    with pytest.raises(ValueError, match="has no manifest of corrupted sets, so nothing in it can be verified"):
        check_benchmark(folder)


def test_a_damaged_manifest_of_ours_is_not_taken_for_anothers(released):
    folder, _, _ = released
    (folder / "manifest.json").write_text('{"format": 1, "parameters": {"kind": "corr')
    (folder / "journal.jsonl").touch()
    with pytest.raises(ValueError, match=r"manifest\.json is damaged; delete .* and write the sets again"):
        read_corrupted(folder, "medimeta/fundus", "contrast", severity=2)


def test_a_run_that_finished_nothing_is_half_written(released):
    folder, _, _ = released
    (folder / "manifest.json").write_text(json.dumps({"parameters": {"kind": "corrupted sets"}}))
    with pytest.raises(ValueError, match="half written: its run was stopped before a data set was whole. Make"):
        read_corrupted(folder, "medimeta/fundus", "contrast", severity=2)
