import re

import numpy as np
import pytest

from medrobust_lib.data.dataset import ImageDataset, balanced_positions, check_draw, stratified_positions

LABELS = np.array([0] * 50 + [1] * 30 + [2] * 20)


def make(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "id": "folder:cells",
        "split": "test",
        "images": rng.integers(0, 256, (5, 12, 10, 3), dtype=np.uint8),
        "labels": np.array([0, 1, 1, 0, 1]),
        "classes": ("round <b>cell</b>", "long & thin cell"),
        "templates": ("an image of a {}.", "a {}."),
        "modality": "microscopy",
        "licence": "CC BY 4.0",
        "provenance": {"source": "a <script>", "synthetic": False},
        "indices": np.array([3, 5, 8, 9, 20]),
    }
    return ImageDataset(**(fields | changes))


def test_length_counts_and_repr():
    dataset = make()
    assert len(dataset) == 5
    assert dataset.class_counts() == {"round <b>cell</b>": 2, "long & thin cell": 3}
    assert repr(dataset) == (
        "ImageDataset('folder:cells', split='test', 5 images of 10 × 12 px, 2 classes, microscopy)"
    )
    assert "synthetic phantoms" in repr(make(provenance={"synthetic": True}))


def test_absent_classes_count_zero():
    assert make(labels=np.zeros(5, np.int64)).class_counts()["long & thin cell"] == 0


def test_html_escapes_every_text_and_shows_each_class():
    page = make()._repr_html_()
    assert "<b>cell" not in page and "<script>" not in page
    assert "round &lt;b&gt;cell&lt;/b&gt;" in page and "long &amp; thin cell" in page
    assert page.count("data:image/jpeg;base64,") == 5
    assert "5 images of 10 × 12 px" in page and "CC BY 4.0" in page
    assert "not patients" not in page
    assert "not patients" in make(provenance={"synthetic": True})._repr_html_()


def test_html_says_how_many_of_the_split_were_drawn():
    assert "5 of 3,421 images" in make(provenance={"split_size": 3421})._repr_html_()


def test_thumbnails_show_every_class_of_a_sorted_split():
    labels = np.repeat([0, 1], 30)
    dataset = make(images=np.zeros((60, 8, 8, 3), np.uint8), labels=labels, indices=np.arange(60))
    names = [name for name, _ in dataset._thumbnails()]
    assert len(names) == 8 and names.count("round <b>cell</b>") == 4


def test_subset_keeps_the_positions_in_the_full_split():
    dataset = make()
    picked = dataset.subset([4, 1])
    assert picked.indices.tolist() == [20, 5] and picked.labels.tolist() == [1, 1]
    np.testing.assert_array_equal(picked.images[0], dataset.images[4])
    assert dataset.subset(dataset.labels == 0).indices.tolist() == [3, 9]


@pytest.mark.parametrize("positions, value", [([0, 5], "5"), ([-1], "-1")])
def test_subset_refuses_positions_outside(positions, value):
    with pytest.raises(IndexError, match=f"position {value} is outside 0 to 4"):
        make().subset(positions)


def test_subset_refuses_a_mask_of_another_length():
    with pytest.raises(IndexError, match=r"mask of shape \(4,\) for 5 images"):
        make().subset(np.ones(4, bool))


NO_IMAGES = {
    "images": np.zeros((0, 8, 8, 3), np.uint8),
    "labels": np.zeros(0, np.int64),
    "indices": np.zeros(0, np.int64),
}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"images": np.zeros((5, 8, 8, 3))}, TypeError, "images must be a uint8 array, got dtype float64; scale"),
        ({"images": [[0]]}, TypeError, "images must be a uint8 array, got list"),
        ({"images": np.zeros((5, 8, 8), np.uint8)}, ValueError, "images must be [n, H, W, 3], got shape (5, 8, 8)"),
        (NO_IMAGES, ValueError, "no images in split 'test'"),
        ({"labels": np.array([0, 1])}, ValueError, "labels have shape (2,) for 5 images"),
        ({"labels": np.zeros(5, np.int32)}, TypeError, "labels must be a int64 array, got dtype int32"),
        (
            {"labels": np.array([0, 1, 7, 0, 7])},
            ValueError,
            "label 7 (image 2; 2 such) is outside the class list: 0 'round <b>cell</b>', 1 'long & thin cell'",
        ),
        ({"labels": np.array([0, 1, -1, 0, 1])}, ValueError, "label -1 (image 2; 1 such) is outside"),
        ({"classes": ("cell",), "labels": np.zeros(5, np.int64)}, ValueError, "one class only ('cell')"),
        ({"classes": ("cell", "cell")}, ValueError, "class name 'cell' appears twice"),
        ({"classes": ("Cell", "cell")}, ValueError, "class names 'Cell' and 'cell' differ in case, spaces or the form"),
        ({"classes": ("caf\xe9", "cafe\u0301")}, ValueError, r"class names 'caf\xe9' and 'cafe\u0301' differ in case"),
        (
            {"classes": ("cell", "cell ")},
            ValueError,
            "class names 'cell' and 'cell ' differ in case, spaces or the form",
        ),
        ({"classes": ("cell", " ")}, ValueError, "empty class name"),
        ({"templates": ()}, ValueError, "no prompt templates"),
        ({"templates": ("a cell",)}, ValueError, "template 'a cell' needs exactly one {}"),
        ({"templates": ("a {} {}",)}, ValueError, "needs exactly one {}"),
        ({"indices": np.array([0, 1, 2, 3, 3])}, ValueError, "distinct positions"),
        ({"indices": np.array([-1, 1, 2, 3, 4])}, ValueError, "distinct positions"),
        ({"provenance": {"when": object()}}, TypeError, "not JSON serializable"),
    ],
)
def test_wrong_fields_are_refused(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(**changes)


def test_stratified_shares_follow_the_class_sizes():
    positions = stratified_positions(LABELS, n=10, seed=0)
    assert np.bincount(LABELS[positions]).tolist() == [5, 3, 2]
    assert (np.diff(positions) > 0).all()


def test_largest_remainder_breaks_ties_towards_the_lower_label():
    # Quotas of 11 images: 5.5, 3.3 and 2.2, so the one left over goes to label 0.
    assert np.bincount(LABELS[stratified_positions(LABELS, n=11, seed=0)]).tolist() == [6, 3, 2]
    assert np.bincount(np.repeat([0, 1], 5)[stratified_positions(np.repeat([0, 1], 5), n=3, seed=0)]).tolist() == [
        2,
        1,
    ]


def test_a_rare_class_gets_one_image_when_n_allows():
    labels = np.array([0] * 97 + [1] * 2 + [2])
    for n in (3, 4, 10, 99, 100):
        counts = np.bincount(labels[stratified_positions(labels, n=n, seed=0)], minlength=3)
        assert counts.sum() == n and counts.min() >= 1
    assert len(stratified_positions(labels, n=2, seed=0)) == 2


def test_every_size_draws_exactly_n_without_repetition():
    for n in range(1, 101):
        positions = stratified_positions(LABELS, n=n, seed=4)
        assert len(np.unique(positions)) == n
        assert (np.bincount(LABELS[positions], minlength=3) <= [50, 30, 20]).all()


def test_same_seed_same_subset_other_seed_other_subset():
    first = stratified_positions(LABELS, n=20, seed=1)
    np.testing.assert_array_equal(first, stratified_positions(LABELS, n=20, seed=1))
    assert set(first) != set(stratified_positions(LABELS, n=20, seed=2))
    assert set(first) < set(stratified_positions(LABELS, n=40, seed=1))


@pytest.mark.parametrize(
    ("sizes", "n", "counts"),
    [
        ([2000, 900, 800, 700, 600, 500, 400, 300, 60], 500, [56] * 5 + [55] * 4),
        ([900, 300, 200], 500, [167, 167, 166]),
        ([400, 300, 4], 20, [8, 8, 4]),  # the rare class is drawn whole and the others share the rest
        ([1, 2, 300], 10, [1, 2, 7]),
        ([5, 5, 5], 2, [1, 1, 0]),
        ([3, 1, 2], 6, [3, 1, 2]),
    ],
)
def test_a_balanced_draw_has_equally_many_images_of_each_class(sizes, n, counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    positions = balanced_positions(labels, n=n, seed=3)
    assert np.bincount(labels[positions], minlength=len(sizes)).tolist() == counts
    assert positions.dtype == np.int64 and (np.diff(positions) > 0).all()


def test_a_balanced_draw_passes_over_labels_that_do_not_occur():
    labels = np.repeat([1, 4], 10)
    assert np.bincount(labels[balanced_positions(labels, n=5, seed=0)]).tolist() == [0, 3, 0, 0, 2]


def test_a_balanced_draw_belongs_to_its_seed_and_grows_with_n():
    first = balanced_positions(LABELS, n=20, seed=3)
    np.testing.assert_array_equal(first, balanced_positions(LABELS, n=20, seed=3))
    assert set(first) != set(balanced_positions(LABELS, n=20, seed=4))
    assert set(first) < set(balanced_positions(LABELS, n=21, seed=3))
    # Within a class both draws read one order from its start: 3, 3 and 3 images of it, and 20, 12 and 8.
    assert set(balanced_positions(LABELS, n=9, seed=3)) < set(stratified_positions(LABELS, n=40, seed=3))


@pytest.mark.parametrize("n", [0, 101, 2.5, None])
def test_a_balanced_draw_refuses_what_is_no_number_of_its_images(n):
    with pytest.raises(ValueError, match=re.escape(f"n={n!r} is no whole number from 1 to 100: it counts images")):
        balanced_positions(LABELS, n=n, seed=0)


def test_draws_are_checked_with_the_valid_choices_and_the_fix():
    check_draw("stratified", n=None)
    check_draw("balanced", n=3)
    with pytest.raises(ValueError, match="unknown draw 'balancd'; choose one of stratified, balanced; did you mean"):
        check_draw("balancd", n=3)
    with pytest.raises(ValueError, match="draw='balanced' needs n_images, .*give it, or draw='stratified', which"):
        check_draw("balanced", n=None, size="n_images")


def test_none_takes_the_whole_split_in_order():
    np.testing.assert_array_equal(stratified_positions(LABELS, n=None, seed=0), np.arange(100))


@pytest.mark.parametrize("n", [0, -3, 101])
def test_n_outside_the_split_is_refused(n):
    with pytest.raises(
        ValueError,
        match=re.escape(f"n={n} is no whole number from 1 to 100: it counts images"),
    ):
        stratified_positions(LABELS, n=n, seed=0)


@pytest.mark.parametrize("n", [2.5, True, "10"])
def test_n_must_be_a_whole_number(n):
    with pytest.raises(ValueError, match=re.escape(f"n={n!r} is no whole number")):
        stratified_positions(LABELS, n=n, seed=0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1 is no whole number of 0 or more"):
        stratified_positions(LABELS, n=3, seed=-1)
