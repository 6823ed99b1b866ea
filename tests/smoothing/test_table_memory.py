"""Data sets that do not fit into memory."""

import numpy as np
import pandas as pd

from medrobust_lib.data.registry import load_dataset
from medrobust_lib.models.loading import load_model
from medrobust_lib.smoothing.table import certify_dataset


def test_many_images_are_decoded_into_a_file_and_are_the_same(monkeypatch):
    in_memory = load_dataset("phantom/blood", n=6)
    monkeypatch.setattr("medrobust_lib.data.readers._IN_MEMORY", 0)
    in_a_file = load_dataset("phantom/blood", n=6)
    assert isinstance(in_a_file.images, np.memmap) and not isinstance(in_memory.images, np.memmap)
    assert np.array_equal(in_a_file.images, in_memory.images)
    model = load_model("demo-clip")
    rows = [certify_dataset(model, data, n0=2, n=20, alpha=0.05) for data in (in_memory, in_a_file)]
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in rows))
