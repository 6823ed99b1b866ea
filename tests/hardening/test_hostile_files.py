"""Files made to do harm: code in pickles, headers that promise what is not there, sizes that would fill memory."""

import importlib.util
import io
import json
import os
import pickle
import struct
import zipfile
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medrobust_lib.corruptions.stored import read_npz
from medrobust_lib.data.own_images import class_folder_split, csv_split
from medrobust_lib.data.questions import read_questions
from medrobust_lib.data.readers import medimeta_split, medmnist_split
from medrobust_lib.data.wording import class_wording
from medrobust_lib.experiments import open_store
from medrobust_lib.models.weights import read_state_dict
from medrobust_lib.smoothing.prompts import PromptSet
from preparing.corrupted_sets import check_benchmark

spec = importlib.util.spec_from_file_location("spoiling", Path(__file__).with_name("spoiling.py"))
spoiling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(spoiling)
refused = spoiling.refused

PNEUMONIA, FUNDUS = class_wording("medmnist/pneumonia"), class_wording("medimeta/fundus")


@pytest.fixture
def payload(tmp_path):
    """An object whose unpickling makes a file, and that file."""
    trace = tmp_path / "trace"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    yield Payload()
    assert not trace.exists(), "code from a file was run"


# Pickled code


@pytest.mark.hardening(
    area="hostile files", tried="pickled objects in npz, npy and both kinds of torch checkpoint",
    outcome="refused, file named; the code in them does not run",
)  # fmt: skip
@pytest.mark.parametrize("kind", ["medmnist", "corrupted", "medimeta", "pt", "old"])
def test_pickles(tmp_path, payload, kind):
    objects = np.empty(2, object)
    objects[:] = [payload, payload]
    if kind in ("medmnist", "corrupted"):
        path = tmp_path / "breastmnist.npz"
        images = np.zeros((2, 28, 28), np.uint8)
        np.savez(path, test_images=images, test_labels=objects, images=objects, labels=np.zeros(2, np.uint8))
        read = {
            "medmnist": lambda: medmnist_split(path, "test", PNEUMONIA),
            "corrupted": lambda: read_npz(path, members=("images", "labels")),
        }[kind]
    elif kind == "medimeta":
        folder = write_medimeta(tmp_path / "set")
        path = folder / "task_labels" / "disease.npy"
        np.save(path, objects, allow_pickle=True)
        read = partial(medimeta_split, folder, "test", FUNDUS)
    else:
        path = tmp_path / "model.pt"
        torch.save({"weight": payload}, path, _use_new_zipfile_serialization=kind == "pt")
        read = partial(read_state_dict, path)
    refused(path, read)


def test_the_payload_would_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "made").is_dir()


# Promises of npz and npy


def npy(shape, dtype="|u1", content=b"", *, fortran=False):
    stream = io.BytesIO()
    header = {"descr": dtype, "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + content


def write_npz(path, method=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


FOUR = {"test_images": npy((4, 8, 8), content=bytes(256)), "test_labels": npy((4,), content=bytes(4))}


@pytest.mark.hardening(
    area="hostile files", tried="npz whose headers promise other arrays than it holds (up to terabytes)",
    outcome="refused before memory is taken, file named",
)  # fmt: skip
@pytest.mark.parametrize(
    "change",
    [
        {"test_labels": npy((10**13,), content=bytes(4))},
        {"test_labels": npy((4,), "<f8", bytes(4))},
        {"test_images": npy((10**7, 8, 8), content=bytes(256)), "test_labels": npy((10**7,), content=bytes(4))},
        {"test_images": npy((4, 10**6, 10**6), content=bytes(256))},
        {"test_images": npy((4, 8, -8), content=bytes(256))},
        {"test_images": npy((4, 8, 8), content=bytes(256), fortran=True)},
        {"test_images": npy((4, 0, 8))},
        {"test_labels": npy((4,), "<U9", bytes(144))},
        {"test_labels": npy((4,), "<f8", np.array([0, 1, np.nan, np.inf]).tobytes())},
        {"test_labels": b"\x93NUMPY\x01\x00\x10\x00{'shape': ((((((("},
        {"test_labels": b"\x93NUMPY\x09\x00"},
        {"test_labels": b""},
    ],
)
def test_npz_headers(tmp_path, modest, change):
    path = write_npz(tmp_path / "pneumoniamnist.npz", **{**FOUR, **change})
    refused(path, lambda: medmnist_split(path, "test", PNEUMONIA))
    refused(path, lambda: read_npz(path, members=("test_images", "test_labels")))


@pytest.mark.hardening(
    area="hostile files", tried="npz members marked as encrypted, or packed by an unknown method",
    outcome="refused, file named",
)  # fmt: skip
@pytest.mark.parametrize("offset, value", [(8, 1), (10, 99)])
def test_npz_methods(tmp_path, offset, value):
    path = write_npz(tmp_path / "pneumoniamnist.npz", **FOUR)
    content = bytearray(path.read_bytes())
    place = content.find(b"PK\x01\x02")
    while place >= 0:
        content[place + offset] = value
        place = content.find(b"PK\x01\x02", place + 1)
    path.write_bytes(content)
    refused(path, lambda: medmnist_split(path, "test", PNEUMONIA))
    refused(path, lambda: read_npz(path, members=("test_images", "test_labels")))


def test_the_npz_without_a_change_is_read(tmp_path):
    path = write_npz(tmp_path / "pneumoniamnist.npz", **FOUR)
    assert medmnist_split(path, "test", PNEUMONIA).labels.tolist() == [0, 0, 0, 0]
    assert read_npz(path, members=("test_images", "test_labels"))[0].shape == (4, 8, 8, 3)


# MedIMeta


def write_medimeta(folder, **files):
    for name in ("splits", "task_labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    task = {"task_name": "disease", "task_target": "BINARY", "labels": {0: "normal", 1: "abnormal"}}
    (folder / "info.yaml").write_text(yaml.safe_dump({"tasks": [task]}))
    np.save(folder / "task_labels" / "disease.npy", np.array([0, 1, 1]))
    (folder / "splits" / "test.txt").write_text("images/000000.tiff\nimages/000002.tiff\n")
    with h5py.File(folder / "images.hdf5", "w") as container:
        container["images"] = np.zeros((3, 8, 8, 3), np.uint8)
    return folder


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.hardening(
    area="hostile files", tried="info.yaml with Python tags, multiplying aliases, deep nesting, wrong types, paths",
    outcome="refused, file named",
)  # fmt: skip
@pytest.mark.parametrize(
    "text",
    [
        "tasks: !!python/object/apply:os.mkdir ['trace']",
        ALIASES + "tasks: [{task_name: disease, labels: {0: *l, 1: abnormal}}]",
        "[" * 5000,
        "tasks: [1, 2]",
        "tasks: {}",
        "tasks: [{task_name: disease, labels: [normal, abnormal]}]",
        "tasks: [{task_name: ../../disease, labels: {0: normal, 1: abnormal}}]",
        "tasks: [{task_name: [disease], labels: {0: normal, 1: abnormal}}]",
        "tasks: [{task_name: disease, labels: {zero: normal, 1: abnormal}}]",
        "- \t x: [",
        "",
    ],
)
def test_medimeta_descriptions(tmp_path, modest, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    folder = write_medimeta(tmp_path / "set")
    (folder / "info.yaml").write_text(text)
    refused(folder / "info.yaml", lambda: medimeta_split(folder, "test", FUNDUS))
    assert not (tmp_path / "trace").exists()


@pytest.mark.hardening(
    area="hostile files", tried="MedIMeta splits and labels that point to no image (negative, huge, words)",
    outcome="refused, file named",
)  # fmt: skip
@pytest.mark.parametrize(
    "name, content",
    [
        ("splits/test.txt", b"images/-1.tiff"),
        ("splits/test.txt", b"images/99999999999999999999999.tiff"),
        ("splits/test.txt", b"9" * 5000),
        ("splits/test.txt", b"images/one.tiff"),
        ("splits/test.txt", b"\xff\xfe0\x00"),
        ("task_labels/disease.npy", npy((10**13,), content=bytes(3))),
        ("task_labels/disease.npy", npy((), content=bytes(1))),
        ("task_labels/disease.npy", npy((3, 2), content=bytes(6))),
        ("task_labels/disease.npy", b""),
    ],
)
def test_medimeta_lists(tmp_path, modest, name, content):
    folder = write_medimeta(tmp_path / "set")
    (folder / name).write_bytes(content)
    refused(folder / name, lambda: medimeta_split(folder, "test", FUNDUS))


def link_to_a_file(container, other):
    container["images"] = h5py.ExternalLink(str(other), "images")


def stored_elsewhere(container, other):
    container.create_dataset("images", (3, 8, 8, 3), np.uint8, external=[(str(other), 0, h5py.h5f.UNLIMITED)])


def virtual(container, other):
    layout = h5py.VirtualLayout((3, 8, 8, 3), np.uint8)
    layout[...] = h5py.VirtualSource(str(other), "images", (3, 8, 8, 3))
    container.create_virtual_dataset("images", layout)


def enormous(container, other):
    container.create_dataset("images", (3, 60_000, 60_000, 3), np.uint8, chunks=(1, 64, 64, 3))


def in_enormous_pieces(container, other):
    container.create_dataset("images", (3, 8000, 8000, 3), np.uint8, chunks=(3, 8000, 8000, 3), maxshape=(None,) * 4)


def a_group(container, other):
    container.create_group("images")


def of_words(container, other):
    container["images"] = np.array([b"word"] * 3)


@pytest.mark.hardening(
    area="hostile files", tried="images.hdf5 that links to other files, or whose images or pieces are enormous",
    outcome="refused, file named; no other file is opened",
)  # fmt: skip
@pytest.mark.parametrize(
    "make", [link_to_a_file, stored_elsewhere, virtual, enormous, in_enormous_pieces, a_group, of_words]
)
def test_medimeta_containers(tmp_path, modest, make):
    other = tmp_path / "private.h5"
    with h5py.File(other, "w") as container:
        container["images"] = np.zeros((3, 8, 8, 3), np.uint8)
    folder = write_medimeta(tmp_path / "set")
    with h5py.File(folder / "images.hdf5", "w") as container:
        make(container, other)
    refused(folder / "images.hdf5", lambda: medimeta_split(folder, "test", FUNDUS))


# Tables and JSON


@pytest.mark.hardening(
    area="hostile files", tried="CSV in another encoding, with NUL bytes, short rows, and paths that are none",
    outcome="refused, file and line named",
)  # fmt: skip
@pytest.mark.parametrize(
    "content",
    [
        "path,label\na.png,x\n".encode("utf-16"),
        b"path,label\na\0.png,x\n",
        b"path,label\na.png\n",
        b"path,label\n" + b"a" * 5000 + b".png,x\n",
        b"path,label\n/" + b"a/" * 3000 + b".png,x\n",
        b"path,label\n\n",
        b"path,label\n" + b'"' * 999,
        b"path\na.png\n",
        b"",
    ],
)
def test_csv(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    refused(path, lambda: csv_split(path, "test"))


@pytest.mark.hardening(
    area="hostile files", tried="JSON nested without end, and numbers too long to be read",
    outcome="refused, file named",
)  # fmt: skip
@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, '{"0": ' + "9" * 5000 + "}", "NaN", '"text"'])
def test_json(tmp_path, text):
    questions = tmp_path / "questions.json"
    questions.write_text(text)
    refused(questions, lambda: read_questions(questions))
    with open_store(tmp_path / "study", parameters={}) as store:
        store.append("a", [{"x": 1}], seconds=0)
    manifest, journal = tmp_path / "study" / "manifest.json", tmp_path / "study" / "journal.jsonl"
    whole = manifest.read_text()
    manifest.write_text(text)
    refused(manifest, lambda: open_store(tmp_path / "study", parameters={}))
    refused(tmp_path / "study", lambda: check_benchmark(tmp_path / "study"))
    manifest.write_text(whole)
    journal.write_text(text + "\n")
    refused(journal, lambda: open_store(tmp_path / "study", parameters={}))


@pytest.mark.hardening(
    area="hostile files", tried="journals and manifests of stores with infinite, nested or mixed values",
    outcome="refused, file and line named",
)  # fmt: skip
@pytest.mark.parametrize(
    "line",
    [
        '{"key": "b", "rows": [{"x": 1}], "seconds": ' + "9" * 400 + "}",
        '{"key": "b", "rows": [{"x": NaN}], "seconds": 0}',
        '{"key": "b", "rows": [{"x": [1]}], "seconds": 0}',
        '{"key": "b", "rows": [{"y": 1}], "seconds": 0}',
        '{"key": "a", "rows": [{"x": 1}], "seconds": 0}',
        '{"key": 3, "rows": [{"x": 1}], "seconds": 0}',
    ],
)
def test_journals(tmp_path, line):
    with open_store(tmp_path, parameters={"n": 1}) as store:
        store.append("a", [{"x": 1}], seconds=0)
    journal = tmp_path / "journal.jsonl"
    journal.write_text(journal.read_text() + line + "\n")
    refused(journal, lambda: open_store(tmp_path, parameters={"n": 1}), "line 2 is corrupt")
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"format": 1, "parameters": {"n": NaN}}')
    refused(manifest, lambda: open_store(tmp_path, parameters={"n": 1}))


# Tensors


def write_prompts(path, header, tensors=None):
    from safetensors.torch import save_file

    tensors = tensors or {"context": torch.zeros(4, 6)}
    save_file(tensors, path, metadata={"prompts": header if isinstance(header, str) else json.dumps(header)})


GOOD = {"format": 1, "classes": ["cat", "dog"], "model": "demo-clip"}


@pytest.mark.hardening(
    area="hostile files", tried="prompts whose header or vectors do not fit, and a safetensors header of exabytes",
    outcome="refused, file named",
)  # fmt: skip
@pytest.mark.parametrize(
    "header, tensors",
    [
        ("[1]", None),
        ("{" * 5000, None),
        ({**GOOD, "classes": 3}, None),
        ({**GOOD, "more": 3}, None),
        ({"format": 1, "model": "demo-clip"}, None),
        (GOOD, {"other": torch.zeros(4, 6)}),
        (GOOD, {"context": torch.zeros(4)}),
        (GOOD, {"context": torch.zeros(3, 4, 6)}),
        ({**GOOD, "classes": []}, None),
    ],
)
def test_prompts(tmp_path, modest, header, tensors):
    path = tmp_path / "prompts.safetensors"
    write_prompts(path, GOOD)
    assert PromptSet.load(path).classes == ("cat", "dog")
    write_prompts(path, header, tensors)
    refused(path, lambda: PromptSet.load(path))
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(path, lambda: PromptSet.load(path))
    refused(path, lambda: read_state_dict(path))


@pytest.mark.hardening(
    area="paths and names", tried="class folders whose name is not UTF-8", outcome="refused, folder named",
)  # fmt: skip
@pytest.mark.skipif(os.name != "posix", reason="this system's file names are always Unicode")
def test_folder_names_that_are_not_text(tmp_path):
    for folder in (tmp_path / "set" / "fine", tmp_path / "set" / os.fsdecode(b"caf\xe9")):
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "a.png")
    with pytest.raises(ValueError, match=r"set has a name that is not UTF-8; rename it"):
        class_folder_split(tmp_path / "set", "test")
