"""Small valid files, damaged at random: each reader reads, or says what is wrong with which file."""

import importlib.util
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
import torch
import yaml
from hypothesis import given
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medrobust_lib.adaptation.training import load_state, save_state
from medrobust_lib.corruptions.stored import read_corrupted, read_npz, write_npz
from medrobust_lib.corruptions.writing import write_benchmark
from medrobust_lib.data.decoding import image_shape, read_dicom, read_image
from medrobust_lib.data.own_images import class_folder_split, csv_split
from medrobust_lib.data.questions import read_questions
from medrobust_lib.data.readers import medimeta_split, medmnist_split
from medrobust_lib.data.wording import class_wording
from medrobust_lib.experiments import Metric, leaderboard, open_store, read_cards, start_run
from medrobust_lib.files import read_sums
from medrobust_lib.models.weights import read_state_dict
from medrobust_lib.smoothing.prompts import PromptSet
from preparing.corrupted_sets import check_benchmark
from preparing.folders import read_table

spec = importlib.util.spec_from_file_location("spoiling", Path(__file__).with_name("spoiling.py"))
spoiling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(spoiling)
spec = importlib.util.spec_from_file_location(
    "compression", Path(__file__).parent.parent / "data" / "test_dicom_compression.py"
)
compression = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compression)
damages, damaged, fuzz = spoiling.damages, spoiling.damaged, spoiling.fuzz

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
PNEUMONIA = class_wording("medmnist/pneumonia")
FUNDUS = class_wording("medimeta/fundus")


def npz(save, images=PIXELS, labels=(0, 1, 1, 0, 1, 1)):
    stream = io.BytesIO()
    save(stream, test_images=images, test_labels=np.array(labels, np.uint8)[:, None])
    return stream.getvalue()


def read_all(split):
    split.shapes()
    images = list(split.read(np.arange(len(split.labels))))
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in images)
    return images


# MedMNIST


@pytest.mark.hardening(
    area="damaged files", tried="MedMNIST npz",
    outcome="read, or refused with the file named",
)  # fmt: skip
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_medmnist(tmp_path, judge, save):
    path, whole = tmp_path / "breastmnist.npz", npz(save)

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        judge(path, lambda: read_all(medmnist_split(path, "test", PNEUMONIA)))

    run()


# Images


def encoded(kind, **options):
    stream = io.BytesIO()
    Image.fromarray(options.pop("pixels", PIXELS[0])).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.hardening(
    area="damaged files",
    tried="PNG, JPEG, TIFF, BMP, WebP and GIF images",
    outcome="read, or refused with the file named",
)
@pytest.mark.parametrize(
    "suffix, whole",
    [
        ("png", encoded("PNG")),
        ("jpg", encoded("JPEG")),
        ("tiff", encoded("TIFF")),
        ("tif", encoded("TIFF", pixels=PIXELS[0, ..., 0].astype(np.uint16) * 200, compression="tiff_deflate")),
        ("bmp", encoded("BMP")),
        ("webp", encoded("WEBP")),
        ("gif", encoded("GIF")),
    ],
)
def test_images(tmp_path, judge, suffix, whole):
    path = tmp_path / f"image.{suffix}"

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        image = judge(path, lambda: read_image(path))
        judge(path, lambda: image_shape(path))
        assert image is None or (image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3)

    run()


def dicom(**elements):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["fuzz"])
    meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    record = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    record.SOPClassUID, record.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    record.PatientName, record.Rows, record.Columns, record.SamplesPerPixel = "Phantom", 12, 10, 1
    record.PhotometricInterpretation, record.BitsAllocated, record.BitsStored = "MONOCHROME2", 16, 12
    record.HighBit, record.PixelRepresentation = 11, 0
    record.WindowCenter, record.WindowWidth = 400, 800
    record.RescaleSlope, record.RescaleIntercept = 1, -20
    record.PixelData = (PIXELS[0, ..., 0].astype("<u2") * 16).tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(record, name)
        else:
            setattr(record, name, value)
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, record, enforce_file_format=True)
    return stream.getvalue()


@pytest.mark.hardening(
    area="damaged files", tried="DICOM images in two transfer syntaxes", outcome="read, or refused with the file named"
)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_dicom(tmp_path, judge, syntax):
    path, whole = tmp_path / "scan.dcm", dicom(syntax=syntax)

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        image = judge(path, lambda: read_dicom(path))
        judge(path, lambda: image_shape(path))
        assert image is None or (image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3)

    run()


@pytest.mark.hardening(
    area="damaged files", tried="the streams of compressed DICOM: JPEG Lossless, JPEG-LS, JPEG 2000",
    outcome="read, or refused with the file named",
)  # fmt: skip
@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_dicom(tmp_path, judge, syntax):
    path, pixels = tmp_path / "scan.dcm", np.kron(PIXELS[0, ..., 0].astype("<u2") * 16, np.ones((4, 4), "<u2"))
    path.write_bytes(dicom(Rows=48, Columns=40, PixelData=pixels.tobytes()))
    record = pydicom.dcmread(path)
    if syntax == JPEGLosslessSV1:
        record.file_meta.TransferSyntaxUID = syntax
        record.PixelData = encapsulate([compression.jpeg_lossless(pixels, 12)])
        record["PixelData"].VR = "OB"
    else:
        record.compress(syntax)
    record.save_as(path)
    assert read_dicom(path).shape == (48, 40, 3)
    whole = path.read_bytes()
    start = len(whole) - len(record.PixelData)

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(whole[:start] + damaged(whole[start:], changes))
        judge(path, lambda: read_dicom(path))

    run()


# MedIMeta


@pytest.fixture
def medimeta(tmp_path):
    folder = tmp_path / "fundus"
    for name in ("splits", "task_labels"):
        (folder / name).mkdir(parents=True)
    tasks = [
        {"task_name": "disease", "task_target": "BINARY_CLASSIFICATION", "labels": {0: "normal", 1: "abnormal"}},
        {"task_name": "kinds", "task_target": "MULTILABEL_CLASSIFICATION", "labels": {0: "DR", 1: "MH"}},
    ]
    (folder / "info.yaml").write_text(yaml.safe_dump({"id": "fundus", "tasks": tasks}))
    np.save(folder / "task_labels" / "disease.npy", np.array([0, 1, 1, 0, 1, 0]))
    (folder / "splits" / "test.txt").write_text("images/000005.tiff\nimages/000002.tiff\nimages/000004.tiff\n")
    with h5py.File(folder / "images.hdf5", "w") as container:
        container["images"] = PIXELS
    return folder


@pytest.mark.hardening(
    area="damaged files", tried="each file of a MedIMeta folder: info.yaml, labels, splits, images.hdf5",
    outcome="read, or refused with the file or folder named",
)  # fmt: skip
@pytest.mark.parametrize("name", ["info.yaml", "task_labels/disease.npy", "splits/test.txt", "images.hdf5"])
def test_medimeta(medimeta, judge, name):
    path = medimeta / name
    whole = path.read_bytes()

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        # A number out of its place may be found out only beside the file that it points into.
        judge(path, lambda: read_all(medimeta_split(medimeta, "test", FUNDUS)), named=str(medimeta))

    run()


# Tables and lists


@pytest.mark.hardening(
    area="damaged files", tried="CSV tables of images", outcome="read, or refused with the file named"
)
def test_csv(tmp_path, judge):
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(PIXELS[0]).save(tmp_path / name)
    path = tmp_path / "table.csv"
    whole = b'path,label,split\na.png,malignant,test\nb.png,benign,test\n"c.png",benign,train\n'

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        judge(path, lambda: read_all(csv_split(path, "test")))

    run()


@pytest.mark.hardening(
    area="damaged files", tried="classnames.txt",
    outcome="read, or refused with the file named",
)  # fmt: skip
def test_class_names(tmp_path, judge):
    for name in ("0", "1"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(PIXELS[0]).save(tmp_path / "set" / name / "a.png")
    path = tmp_path / "set" / "classnames.txt"

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged("0 normal lung\n1 pneumonia, lobär\n".encode(), changes))
        judge(path, lambda: class_folder_split(tmp_path / "set", "test"))

    run()


@pytest.mark.hardening(
    area="damaged files", tried="tables that the preparing scripts read", outcome="read, or refused with the file named"
)
def test_tables_of_the_preparing_scripts(tmp_path, judge):
    path = tmp_path / "tiles.csv"

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(b'file,class,set\ndata/a.png,"tumour",Train\ndata/b.png,skin,Test\n', changes))
        judge(path, lambda: read_table(path))

    run()


@pytest.mark.hardening(
    area="damaged files", tried="question files of MM-SafetyBench", outcome="read, or refused with the file named"
)
def test_questions(tmp_path, judge):
    path = tmp_path / "01.json"
    whole = json.dumps({str(n): {"Question": "q", "Rephrased Question": "r", "Key Phrase": "k"} for n in range(3)})

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole.encode(), changes))
        judge(path, lambda: read_questions(path))

    run()


@pytest.mark.hardening(
    area="damaged files", tried="SHA256SUMS",
    outcome="read, or refused with the file named",
)  # fmt: skip
def test_recorded_sums(tmp_path, judge):
    (tmp_path / "model.bin").write_bytes(b"abc")
    path = tmp_path / "SHA256SUMS"
    whole = b"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  model.bin\n"

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        judge(path, lambda: read_sums(tmp_path))

    run()


# Corrupted sets


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection") / "C"
    write_benchmark(folder, ["phantom/chest"], n=3, image_size=28, corruptions=["contrast"], severities=(1,))
    return folder


@pytest.mark.hardening(
    area="damaged files", tried="each kind of file of a corrupted benchmark, with and without verifying",
    outcome="read, or refused with the collection named",
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "table.csv", "phantom_chest/test/description.json", "phantom_chest/test/contrast_severity_1.npz"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_corrupted_sets(collection, judge, name, verify):
    path = collection / name
    whole = path.read_bytes()

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        judge(
            path,
            lambda: read_corrupted(collection, "phantom/chest", "contrast", severity=1, verify=verify),
            named=str(collection),
        )
        judge(path, lambda: check_benchmark(collection), named=str(collection))

    try:
        run()
    finally:
        path.write_bytes(whole)


@pytest.mark.hardening(
    area="damaged files", tried="corrupted sets without a manifest", outcome="read, or refused with the file named"
)
def test_released_sets(tmp_path, judge):
    path = tmp_path / "contrast_severity_1.npz"
    write_npz(path, [PIXELS], shape=PIXELS.shape, labels=np.arange(6), members=("images", "labels"))
    whole = path.read_bytes()

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        judge(path, lambda: read_npz(path, members=("images", "labels")))

    run()


# Cards, stores, prompts, checkpoints


@pytest.mark.hardening(
    area="damaged files", tried="result cards, read for the leaderboard",
    outcome="read, or refused with the file named",
)  # fmt: skip
def test_cards(tmp_path, judge, monkeypatch):
    monkeypatch.setenv("MEDROBUST_RUN_DIR", str(tmp_path))
    path = start_run("01", "Zero-shot").save_card(
        metrics=[Metric("accuracy", 0.5, 4, 0.1, 0.9)], tables={}, model={"id": "demo-clip"},
        dataset={"id": "phantom/blood"}, prompts={}, notes=["synthetic phantoms"],
    )  # fmt: skip
    whole = path.read_bytes()

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        judge(path, lambda: leaderboard(read_cards(tmp_path)))

    run()


@pytest.mark.hardening(
    area="damaged files", tried="journal and manifest of a store",
    outcome="read (a torn last line is dropped), or refused with the store named",
)  # fmt: skip
@pytest.mark.parametrize("name", ["journal.jsonl", "manifest.json"])
def test_stores(tmp_path, judge, name):
    parameters = {"model": "demo-clip", "sigmas": [0.25, 0.5], "sampling": {"n": 1000}}
    with open_store(tmp_path / "study", parameters=parameters) as store:
        for number in range(4):
            store.append(f"image {number}", [{"image": number, "radius": number / 3, "note": None}], seconds=0.5)
    path = tmp_path / "study" / name
    whole = path.read_bytes()

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))

        def read():
            with open_store(tmp_path / "study", parameters=parameters) as store:
                return store.table(sorted(store.done))

        judge(path, read, named=str(tmp_path / "study"))

    run()


@pytest.mark.hardening(
    area="damaged files", tried="learned prompts in safetensors", outcome="read, or refused with the file named"
)
def test_prompts(tmp_path, judge):
    path = tmp_path / "prompts.safetensors"
    context = torch.linspace(-1, 1, 24).reshape(4, 6)
    PromptSet(context=context, classes=("cat", "dog"), model="demo-clip", provenance={"seed": 0}).save(path)
    whole = path.read_bytes()

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        found = judge(path, lambda: PromptSet.load(path))
        assert found is None or found.context.shape[-1] > 0

    run()


@pytest.mark.hardening(
    area="damaged files", tried="states of a training of adapters",
    outcome="read, or refused with the file named",
)  # fmt: skip
def test_training_states(tmp_path, judge):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
    optimiser = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimiser.step()
    save_state(tmp_path, {"weight": weight}, optimiser, {"weight": weight.clone()}, {"rows": [], "best_epoch": 1})
    path = tmp_path / "state.safetensors"
    whole = path.read_bytes()

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        judge(path, lambda: load_state(tmp_path, {"weight": weight}, optimiser))

    run()


@pytest.mark.hardening(
    area="damaged files", tried="checkpoints: safetensors, both kinds of torch file",
    outcome="read, or refused with the file named",
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "old"])
def test_checkpoints(tmp_path, judge, suffix):
    path = tmp_path / f"model.{suffix}"
    tensors = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.zeros(2)}
    if suffix == "safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=suffix == "pt")
    whole = path.read_bytes()

    @fuzz
    @given(damages())
    def run(changes):
        path.write_bytes(damaged(whole, changes))
        judge(path, lambda: read_state_dict(path))

    run()
