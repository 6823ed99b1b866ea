"""Folders of low-rank adapters: what is in them, and that they are read back on their own base only."""

import copy
import hashlib
import json
import socket

import numpy as np
import pytest
import torch
from peft import PeftModel

from medrobust_lib.models import adapters
from medrobust_lib.models.adapters import (
    attach_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    trainable_share,
    weights_identity,
)


def same_state(a, b):
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def folder(demo, trained, tmp_path):
    provenance = {"epochs": 3, "base": "a word"}
    return save_adapter(trained(demo, qkv="separate"), tmp_path / "deep" / "site-b", provenance=provenance)


def test_saved_and_loaded_is_identical(loaded, form, pixels, trained, tmp_path, monkeypatch):
    kind, qkv = form
    model = loaded(kind)
    adapted = copy.deepcopy(trained(model, qkv=qkv))
    place = save_adapter(adapted, tmp_path / "mine", provenance={})
    monkeypatch.setattr(socket, "socket", None)  # whoever needs the network fails
    images = pixels(model)
    apart = load_adapter(model, place, merged=False)
    assert same_state(apart, adapted)
    adapted.requires_grad_(False)  # where a gradient is needed, torch may sum in another order
    assert torch.equal(apart.encode_image(images), adapted.encode_image(images))
    merged = load_adapter(model, place)
    assert same_state(merged, merge_adapters(adapted))
    assert list(merged.state_dict()) == list(model.state_dict())
    for other in (apart, merged):
        assert other.id == f"{model.id} + mine"
        assert not other.training
        assert not any(parameter.requires_grad for parameter in other.parameters())
    assert same_state(merge_adapters(apart), merged)


def test_adapters_of_the_middle_are_pefts_files_and_come_back(demo, pixels, trained, tmp_path):
    adapted = copy.deepcopy(trained(demo, kernel="middle"))
    place = save_adapter(adapted, tmp_path / "mine", provenance={})
    apart, merged, images = load_adapter(demo, place, merged=False), load_adapter(demo, place), pixels(demo)
    assert same_state(apart, adapted) and apart.attached == adapted.attached
    assert same_state(merged, merge_adapters(adapted))
    by_peft = PeftModel.from_pretrained(copy.deepcopy(demo), str(place)).base_model.model
    with torch.no_grad():
        assert torch.allclose(by_peft.encode_image(images), adapted.encode_image(images), atol=1e-5)
    facts = json.loads((place / "provenance.json").read_text())["adapter"]
    assert (facts["kernel"], facts["parameters"]) == ("middle", trainable_share(adapted).adapters)
    assert facts["parameters"] < trainable_share(attach_adapters(demo, rank=4)).adapters


def test_a_folder_holds_pefts_files_and_where_they_come_from(demo, folder):
    assert {path.name for path in folder.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "provenance.json",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["site-b"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (folder, *folder.iterdir()))
    content = json.loads((folder / "provenance.json").read_text())
    assert (content["epochs"], content["base"]) == (3, "a word")
    adapter = content["adapter"]
    assert adapter["base"] == {"id": "demo-clip", "weights": weights_identity(demo)}
    assert (adapter["rank"], adapter["qkv"], adapter["kind"]) == (4, "separate", "convolutions")
    assert adapter["parameters"] == trainable_share(attach_adapters(demo, rank=4)).adapters
    assert set(adapter["versions"]) == {"medrobust_lib", "peft", "torch"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (4, 4, 0, "none")
    loaded = load_adapter(demo, folder).provenance
    assert loaded["epochs"] == 3
    assert loaded["adapter"]["base"] == {**demo.provenance, **adapter["base"]}


def test_peft_alone_reads_the_folder(demo, folder, pixels):
    alone = PeftModel.from_pretrained(copy.deepcopy(demo), str(folder)).base_model.model
    images = pixels(demo)
    assert torch.equal(alone.encode_image(images), load_adapter(demo, folder, merged=False).encode_image(images))


def test_the_same_weights_in_bfloat16_count_as_the_same(demo, folder, pixels):
    half = copy.deepcopy(demo).to(torch.bfloat16)
    assert weights_identity(half) == weights_identity(demo)
    loaded = load_adapter(half, folder)
    assert loaded.dtype == torch.bfloat16
    expected = load_adapter(demo, folder).encode_image(pixels(demo))
    assert (loaded.encode_image(pixels(demo)) - expected).abs().max() < 0.02
    with pytest.raises(ValueError, match="demo-clip is in float16, in which its weights cannot be recognised"):
        load_adapter(copy.deepcopy(demo).half(), folder)


def test_another_base_is_refused_with_both_names(demo, loaded, folder):
    other = loaded("timm ViT")
    with pytest.raises(ValueError, match=rf"was trained on 'demo-clip' with weights {weights_identity(demo)}, not on"):
        load_adapter(other, folder)
    changed = copy.deepcopy(demo)
    with torch.no_grad():
        changed.model.visual.conv1.weight[0, 0, 0, 0] += 0.1
    changed.id = "finetuned"
    with pytest.raises(ValueError, match=rf"not on 'finetuned' with weights {weights_identity(changed)}; load that"):
        load_adapter(changed, folder)


@pytest.mark.hardening(
    area="stores", tried="adapter folders with missing or damaged files",
    outcome="refused, file named",
)  # fmt: skip
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "provenance.json"])
def test_incomplete_and_damaged_folders_are_refused(demo, folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(bytes(content[: len(content) // 2]) if name == "provenance.json" else bytes(content))
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        load_adapter(demo, folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"site-b lacks {name}; copy it anew or train again"):
        load_adapter(demo, folder)


def test_missing_folders_and_other_formats_are_refused(demo, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter folder .*nowhere; save_adapter or adapt_lora writes one"):
        load_adapter(demo, tmp_path / "nowhere")
    path = folder / "provenance.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "adapter": {**content["adapter"], "rank": 5}}))
    with pytest.raises(ValueError, match="does not fit the layers of 'demo-clip'; train it again"):
        load_adapter(demo, folder)
    path.write_text(json.dumps({**content, "adapter": {**content["adapter"], "format": 2}}))
    with pytest.raises(ValueError, match="holds an adapter of format 2, not 1"):
        load_adapter(demo, folder)
    path.write_text(json.dumps({"epochs": 3}))
    with pytest.raises(ValueError, match=r"provenance\.json is damaged or of another kind"):
        load_adapter(demo, folder)


def test_saving_refuses_what_it_cannot_keep(demo, folder, tmp_path, monkeypatch):
    adapted = attach_adapters(demo, rank=1)
    with pytest.raises(FileExistsError, match="site-b exists; delete it or give another folder"):
        save_adapter(adapted, folder, provenance={})
    with pytest.raises(ValueError, match="demo-clip has no adapters"):
        save_adapter(demo, tmp_path / "new", provenance={})
    with pytest.raises(ValueError, match="entry 'adapter'"):
        save_adapter(adapted, tmp_path / "new", provenance={"adapter": 1})
    monkeypatch.setattr(adapters, "save_tensors", lambda *_: pytest.fail("written before everything was checked"))
    for value in (np.zeros(2), float("nan")):
        with pytest.raises(ValueError, match="provenance holds more than JSON values"):
            save_adapter(adapted, tmp_path / "new", provenance={"value": value})
    assert not (tmp_path / "new").exists()


@pytest.mark.hardening(
    area="interruption", tried="an interrupt while adapters are saved",
    outcome="nothing half written is left",
)  # fmt: skip
def test_an_interrupted_save_leaves_nothing(demo, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(hashlib, "file_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(attach_adapters(demo, rank=1), tmp_path / "new", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_named_even_if_the_model_was_renamed(demo, trained, tmp_path):
    adapted = copy.deepcopy(trained(demo, qkv="separate"))
    adapted.id, adapted.provenance = "renamed", {}
    place = save_adapter(adapted, tmp_path / "new", provenance={})
    assert json.loads((place / "provenance.json").read_text())["adapter"]["base"]["id"] == "demo-clip"
    assert load_adapter(demo, place).id == "demo-clip + new"
