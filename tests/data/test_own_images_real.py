"""The readers on real medical images, where a copy is at hand."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from medrobust_lib.data.decoding import read_image
from medrobust_lib.data.registry import list_datasets, load_dataset
from medrobust_lib.data.wording import class_wording

ROOT = Path(os.environ.get("MEDROBUST_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data" / "real")
pytestmark = pytest.mark.skipif(
    not (ROOT / "folders").is_dir(),
    reason=f"no real images at {ROOT}; name their folder with MEDROBUST_REAL_DATA",
)
FOLDERS = {
    "pbc": ("medimeta/pbc", {"train": 560, "val": 80, "test": 240}, [30] * 8),
    "pneumonia": ("medimeta/pneumonia", {"train": 600, "val": 120, "test": 225}, None),
    "breast_us": ("medmnist/breast", {"train": 546, "val": 78, "test": 156}, [43, 113]),
    "fundus": ("medimeta/fundus", {"train": 361, "val": 72, "test": 167}, None),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_class_folders_read_like_the_set_they_come_from(name):
    like, sizes, counts = FOLDERS[name]
    for split, size in sizes.items():
        dataset = load_dataset(f"folder:{ROOT / 'folders' / name}", split=split, n=24, like=like)
        assert dataset.provenance["split_size"] == size
        assert dataset.images.shape == (24, 224, 224, 3) and dataset.images.std() > 10
        assert dataset.classes == class_wording(like).prompt_nouns
        assert min(dataset.class_counts().values()) >= 1
    if counts:
        whole = load_dataset(f"folder:{ROOT / 'folders' / name}", like=like, image_size=32)
        assert list(whole.class_counts().values()) == counts


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_is_said_of_test_images_that_are_in_order(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_dataset(f"folder:{ROOT / 'folders' / name}", image_size=64).caveats == []


def test_copies_in_a_published_set_are_counted():
    with pytest.warns(UserWarning, match="6 of 624 images are nearly identical to another one"):
        dataset = load_dataset("medmnist/pneumonia", root=ROOT)
    assert len({image.tobytes() for image in dataset.images}) == 624 - 3  # three pairs, equal in each pixel


def test_folder_and_label_agree_under_the_papers_order():
    dataset = load_dataset(f"folder:{ROOT / 'folders' / 'fundus'}", n=6, like="medimeta/fundus")
    for label, folder in enumerate(("abnormal", "normal")):
        paths = sorted((ROOT / "folders" / "fundus" / "test" / folder).iterdir())
        shown = [read_image(path) for path in paths]
        for image in dataset.images[dataset.labels == label]:
            assert any(np.array_equal(image, candidate) for candidate in shown)


@pytest.mark.parametrize(
    "id, sizes, majority",
    [
        ("medmnist/breast", {"train": 546, "val": 78, "test": 156}, 114),
        ("medmnist/pneumonia", {"train": 4708, "val": 524, "test": 624}, 390),
    ],
)
def test_medmnist_files(id, sizes, majority):
    assert list_datasets(root=ROOT).set_index("id").loc[id, "available"]
    for split, size in sizes.items():
        dataset = load_dataset(id, split=split, root=ROOT)
        assert dataset.images.shape == (size, 28, 28, 3)
    assert max(dataset.class_counts().values()) == majority


def test_tiff_tiles():
    tiles = sorted((ROOT / "folders" / "colon_tiles").glob("*.tif"))
    assert len(tiles) == 10
    for tile in tiles:
        image = read_image(tile)
        assert image.shape == (224, 224, 3) and image.dtype == np.uint8
    background = next(read_image(tile) for tile in tiles if tile.name.startswith("BACK"))
    assert background.mean() > 200
