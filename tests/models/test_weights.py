import json
import zipfile

import numpy as np
import pytest
import torch

from medrobust_lib.models.catalogue import is_dual
from medrobust_lib.models.weights import explained_errors, fingerprint, read_state_dict


def test_a_fingerprint_changes_with_one_bit():
    texts = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    changed = texts.clone()
    changed.view(torch.int32)[3, 5] ^= 1
    assert fingerprint([changed]) != fingerprint([texts])
    assert fingerprint([texts.clone()]) == fingerprint([texts])
    assert len(fingerprint([texts])) == 16


def test_a_fingerprint_survives_another_layout_in_memory():
    values = torch.arange(240, dtype=torch.float32).reshape(2, 3, 5, 8)
    same = [
        values.to(memory_format=torch.channels_last),
        values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.cat([values, values])[:2],
        values.clone().requires_grad_(True),
    ]
    assert {fingerprint([tensor]) for tensor in same} == {fingerprint([values])}


def test_a_fingerprint_tells_shape_type_order_and_borders_apart():
    values = torch.arange(6)
    different = [
        [values],
        [values.reshape(2, 3)],
        [values.reshape(3, 2)],
        [values.int()],
        [values[:3], values[3:]],
        [values[3:], values[:3]],
        [values.flip(0)],
        [values, torch.zeros(())],
        [],
    ]
    assert len({fingerprint(tensors) for tensors in different}) == len(different)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_any_type_has_a_fingerprint(dtype):
    zero, one = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    assert fingerprint([zero]) != fingerprint([one])


def test_a_fingerprint_is_the_same_on_every_machine():
    assert fingerprint([torch.from_numpy(np.arange(4.0))]) == "dabd3a487e9764cc"


def test_a_truncated_download_is_damaged_and_no_danger(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    assert zipfile.is_zipfile(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(
        ValueError, match=r"model\.pth, the file is damaged: PytorchStreamReader.* Fetch it again"
    ) as error:
        read_state_dict(path)
    assert "may run code" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_a_file_that_is_no_json_is_called_so(content):
    message = "^cannot read the files of it, one is no valid JSON: .*; fetch it again$"
    with pytest.raises(ValueError, match=message), explained_errors("it"):
        json.loads(content.decode())


def test_a_configuration_that_is_a_list_is_told_so(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(
        ValueError, match=r"config\.json is not a model's configuration: it holds a list, not an object\."
    ):
        is_dual(tmp_path)
