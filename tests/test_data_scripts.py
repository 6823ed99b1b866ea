import errno
import hashlib
import importlib.util
import json
import shutil
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from typer.testing import CliRunner

from medrobust_lib import files
from medrobust_lib.data.registry import DATASETS, list_datasets, load_dataset
from medrobust_lib.models.loading import load_model
from preparing import downloads, folders

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
NAMES = [
    "download_medmnist", "download_medimeta", "download_mm_safetybench", "prepare_pathology", "prepare_chest_xray",
    "fetch_weights",
]  # fmt: skip
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there
KATHER = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    return {name: load_script(name) for name in NAMES}


def invoke(script, *arguments, exit_code=0):
    result = CliRunner().invoke(script.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == exit_code, result.output
    return result


def write_image(path, value, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8)).save(path)
    return path


def manifest_of(root, dataset_id):
    return json.loads((root / dataset_id / "manifest.json").read_text())


# ---- every script ----


def test_every_command_of_the_registry_exists(scripts):
    commands = [command for command in list_datasets()["script"] if command]
    assert len(commands) == 18
    for command in commands:
        _, path, *arguments = command.split()
        script = scripts[Path(path).stem]
        if len(script.app.registered_commands) > 1:
            invoke(script, *arguments, "--help")
        else:
            assert arguments[0] in set(script.SetName)


@pytest.mark.parametrize("name", NAMES)
def test_help_names_licence_and_citation(scripts, name):
    script = scripts[name]
    subcommands = [command.callback.__name__ for command in script.app.registered_commands]
    pages = [["--help"]] if len(subcommands) == 1 else [[subcommand, "--help"] for subcommand in subcommands]
    for page in pages:
        text = invoke(script, *page).output.lower()
        assert "--root" in text or "--weights-dir" in text
        assert "licence" in text or "terms" in text or "rules" in text, page
        assert "cit" in text, page


def test_offline_every_script_names_address_and_remedy(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts["download_medmnist"], "RECORD", CLOSED)
    result = invoke(scripts["download_medmnist"], "breast", "--root", tmp_path, exit_code=1)
    assert f"error: cannot fetch {CLOSED}/breastmnist.npz?download=1" in result.stderr
    assert f"save it as {tmp_path}/medmnist/breastmnist.npz" in result.stderr
    monkeypatch.setattr(
        scripts["download_medimeta"],
        "zenodo_files",
        lambda record: downloads.zenodo_files(record, api=CLOSED + "/{record}"),
    )
    result = invoke(scripts["download_medimeta"], "mammo", "--root", tmp_path, exit_code=1)
    assert f"error: cannot read {CLOSED}/7884735" in result.stderr
    assert "Check the network" in result.stderr
    monkeypatch.setattr(scripts["prepare_pathology"], "KATHER_RECORD", CLOSED)
    result = invoke(scripts["prepare_pathology"], "kather", "--root", tmp_path, exit_code=1)
    assert f"error: cannot fetch {CLOSED}/files/NCT-CRC-HE-100K.zip" in result.stderr
    assert not (tmp_path / "pathology/kather").exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("prepare_pathology", "skincancer"),
        ("prepare_pathology", "sicapv2"),
        ("prepare_chest_xray", "covid"),
        ("prepare_chest_xray", "rsna"),
    ],
)
def test_a_set_fetched_by_hand_says_how(scripts, tmp_path, name, command):
    result = invoke(scripts[name], command, "--root", tmp_path, exit_code=1)
    assert "error: this set is fetched by hand, then named with --source." in result.stderr
    assert "https://" in result.stderr
    assert "Cite" in result.stderr


# ---- MedMNIST and MedIMeta ----


def served(monkeypatch, script, content):
    """Let a script's download find `content` on the line instead of the network."""

    def download(url, path, **expected):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(content)
        return downloads.download(url, path, **expected)

    monkeypatch.setattr(script, "download", download)


def test_medmnist_with_a_wrong_md5_is_kept_aside(scripts, tmp_path, monkeypatch):
    served(monkeypatch, scripts["download_medmnist"], b"something else")
    result = invoke(scripts["download_medmnist"], "blood", "--size", "64", "--root", tmp_path, exit_code=1)
    assert "expected 2b94928a2ae4916078ca51e05b6b800b" in result.stderr
    assert [path.name for path in (tmp_path / "medmnist").iterdir()] == ["bloodmnist_64.npz.wrong-hash"]


def test_medmnist_hashes_are_complete_and_distinct(scripts):
    hashes = [md5 for sizes in scripts["download_medmnist"].MD5.values() for md5 in sizes.values()]
    assert len(set(hashes)) == 20
    assert all(len(md5) == 32 and int(md5, 16) >= 0 for md5 in hashes)


def test_medimeta_lands_where_the_reader_looks(scripts, tmp_path, monkeypatch):
    source = tmp_path / "mammo_calc.zip"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("mammo_calc/info.yaml", "id: mammo_calc\n")
        archive.writestr("mammo_calc/splits/test.txt", "images/000000.tiff\n")
    content = source.read_bytes()
    remote = downloads.RemoteFile("mammo_calc.zip", CLOSED, len(content), files.file_hash(source, "md5"))
    monkeypatch.setattr(scripts["download_medimeta"], "zenodo_files", lambda record: {"mammo_calc.zip": remote})
    served(monkeypatch, scripts["download_medimeta"], content)
    for _ in range(2):
        invoke(scripts["download_medimeta"], "mammo", "--root", tmp_path)
    assert (tmp_path / "medimeta/mammo_calc/splits/test.txt").exists()
    assert [path.name for path in (tmp_path / "medimeta").iterdir()] == ["mammo_calc"]
    available = list_datasets(root=tmp_path).set_index("id")["available"]
    assert available["medimeta/mammo"]
    assert not available["medimeta/pbc"]
    result = invoke(scripts["download_medimeta"], "pbc", "--root", tmp_path, exit_code=1)
    assert "record 7884735 has no pbc.zip; it has: mammo_calc.zip" in result.stderr


def test_every_medimeta_set_of_the_registry_can_be_fetched(scripts):
    rows = [row for row in DATASETS.values() if row.kind == "medimeta"]
    assert {row.command.rpartition(" ")[2]: PurePosixPath(row.location).name for row in rows} == scripts[
        "download_medimeta"
    ].FOLDERS
    assert len(rows) == 7, "RobustMedCLIP's training sets, with the five of MedMNIST"


# ---- pathology ----


@pytest.fixture
def kather_archives(scripts, tmp_path, monkeypatch):
    folder = tmp_path / "archives"
    folder.mkdir()
    tile = write_image(tmp_path / "tile.tif", 120).read_bytes()
    known = {}
    for split, (name, _) in scripts["prepare_pathology"].KATHER_ARCHIVES.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for code in KATHER:
                for index in range(2 if split == "train" else 1):
                    archive.writestr(f"{name}/{code}/{code}-{index}.tif", tile)
        known[split] = (name, files.file_hash(folder / f"{name}.zip", "md5"))
    monkeypatch.setattr(scripts["prepare_pathology"], "KATHER_ARCHIVES", known)
    return folder


def test_kather_becomes_class_folders(scripts, tmp_path, kather_archives):
    arguments = ["kather", "--source", kather_archives, "--root", tmp_path]
    invoke(scripts["prepare_pathology"], *arguments)
    manifest = manifest_of(tmp_path, "pathology/kather")
    assert manifest["counts"] == {"train": dict.fromkeys(KATHER, 2), "test": dict.fromkeys(KATHER, 1)}
    assert manifest["licence"] == "CC BY 4.0"
    assert set(manifest["source_md5"]) == {"NCT-CRC-HE-100K.zip", "CRC-VAL-HE-7K.zip"}
    assert {path.name for path in (tmp_path / "pathology/kather").iterdir()} == {"images", "manifest.json"}
    assert [path.name for path in (tmp_path / "pathology").iterdir()] == ["kather"]
    dataset = load_dataset("pathology/kather", split="test", root=tmp_path)
    assert dataset.labels.tolist() == list(range(9))

    result = invoke(scripts["prepare_pathology"], *arguments, exit_code=1)
    assert "is prepared already; pass --overwrite to build it anew" in result.stderr
    invoke(scripts["prepare_pathology"], *arguments, "--overwrite")


def test_kather_with_a_wrong_archive_changes_nothing(scripts, tmp_path, kather_archives):
    with (kather_archives / "CRC-VAL-HE-7K.zip").open("ab") as archive:
        archive.write(b"x")
    arguments = ["kather", "--source", kather_archives, "--root", tmp_path / "data"]
    result = invoke(scripts["prepare_pathology"], *arguments, exit_code=1)
    assert "CRC-VAL-HE-7K.zip has md5" in result.stderr
    assert (kather_archives / "CRC-VAL-HE-7K.zip").exists()
    assert not list((tmp_path / "data/pathology").iterdir())
    (kather_archives / "NCT-CRC-HE-100K.zip").unlink()
    result = invoke(scripts["prepare_pathology"], *arguments, exit_code=1)
    assert "error: no NCT-CRC-HE-100K.zip in" in result.stderr


@pytest.mark.parametrize(
    ("nuclei", "expected"),
    [
        ((10, 23, 0, 0, 0), "malignant"),  # 10 of 33 is just over 30 %
        ((9, 0, 20, 0, 0), None),
        ((3, 7, 0, 0, 0), None),
        ((12, 28, 0, 0, 0), None),  # exactly 30 % is not more than 30 %
        ((9, 0, 0, 0, 0), None),
        ((300, 0, 0, 0, 0), "malignant"),  # more nuclei than a byte can number
        ((0, 0, 0, 0, 1), "benign"),
        ((0, 0, 0, 0, 0), None),
        ((1, 5, 5, 0, 5), None),
    ],
)
def test_pannuke_rule_on_made_up_masks(nuclei, expected):
    masks = np.zeros((32, 32, 6))
    for channel, count in enumerate(nuclei):
        masks[..., channel].reshape(-1)[:count] = 1000 + np.arange(count)
    masks[..., 5] = masks[..., :5].sum(axis=-1) == 0
    counts = folders.nuclei_counts(masks)
    assert tuple(counts) == nuclei
    assert folders.pannuke_class(counts) == expected


def test_pannuke_folds_become_train_and_test(scripts, tmp_path, monkeypatch):
    archives = tmp_path / "archives"
    archives.mkdir()
    masks = np.zeros((3, 8, 8, 6))
    masks[0, ..., 0].reshape(-1)[:10] = np.arange(1, 11)  # malignant
    masks[1, 0, 0, 4] = 1  # benign
    masks[2, 0, 0, 0] = 1  # in between
    images = np.arange(3 * 8 * 8 * 3, dtype=np.float64).reshape(3, 8, 8, 3) % 256
    hashes = {}
    for fold in (1, 2, 3):
        with zipfile.ZipFile(archives / f"fold_{fold}.zip", "w") as archive:
            for kind, array in (("images", images), ("masks", masks)):
                with archive.open(f"Fold {fold}/{kind}/fold{fold}/{kind}.npy", "w") as stream:
                    np.save(stream, array, allow_pickle=False)
            archive.writestr(f"Fold {fold}/README.md", "not needed")
        hashes[fold] = files.file_sha256(archives / f"fold_{fold}.zip")
    monkeypatch.setattr(scripts["prepare_pathology"], "PANNUKE_SHA256", hashes)
    invoke(scripts["prepare_pathology"], "pannuke", "--source", archives, "--root", tmp_path)
    manifest = manifest_of(tmp_path, "pathology/pannuke")
    assert manifest["counts"] == {
        "train": {"benign": 2, "malignant": 2},
        "test": {"benign": 1, "malignant": 1},
    }
    assert manifest["left_out"] == 3
    assert manifest["source_sha256"]["fold_3.zip"] == hashes[3]
    tile = np.asarray(Image.open(tmp_path / "pathology/pannuke/images/test/malignant/fold3_0000.png"))
    assert (tile == images[0]).all()


def test_skincancer_follows_the_set_column(scripts, tmp_path):
    source = tmp_path / "data"
    names = [
        name
        for name in folders.class_wording("pathology/skincancer").spellings
        if name.startswith(("tumor", "nontumor"))
    ]
    classes = [name.replace(" ", "_") for name in names]
    assert len(classes) == 16
    rows = []
    for label in classes:
        for split in ("Train", "Validation", "Test"):
            write_image(source / "tiles" / label / f"{label}_{split}.jpg", 90)
            rows.append({"file": f"data/tiles/{label}/{label}_{split}.jpg", "class": label, "set": split})
    pd.DataFrame(rows).to_csv(source / "tiles-v2.csv", index=False)
    invoke(scripts["prepare_pathology"], "skincancer", "--source", source, "--root", tmp_path / "root")
    counts = manifest_of(tmp_path / "root", "pathology/skincancer")["counts"]
    assert counts == {split: dict.fromkeys(sorted(classes), 1) for split in ("test", "train", "val")}
    assert len(load_dataset("pathology/skincancer", split="val", root=tmp_path / "root")) == 16

    pd.DataFrame(rows[:-1]).to_csv(source / "tiles-v2.csv", index=False)
    arguments = ["skincancer", "--source", source, "--root", tmp_path / "root", "--overwrite"]
    result = invoke(scripts["prepare_pathology"], *arguments, exit_code=1)
    assert "would have no test images of:" in result.stderr
    assert manifest_of(tmp_path / "root", "pathology/skincancer")["counts"] == counts  # the old set is still whole
    pd.DataFrame(rows).drop(columns="set").to_csv(source / "tiles-v2.csv", index=False)
    result = invoke(scripts["prepare_pathology"], *arguments, exit_code=1)
    assert "tiles-v2.csv has no column set; it has: file, class" in result.stderr


def test_sicapv2_follows_the_partition(scripts, tmp_path):
    source, grades = tmp_path / "SICAPv2", ["NC", "G3", "G4", "G5"]
    (source / "partition/Test").mkdir(parents=True)
    for split in ("Train", "Test"):
        table = pd.DataFrame(np.eye(4, dtype=int), columns=grades)
        table.insert(0, "image_name", [f"{split}_{grade}.jpg" for grade in grades])
        table["G4C"] = 0
        table.to_csv(source / "partition/Test" / f"{split}.csv", index=False)
        for name in table["image_name"]:
            write_image(source / "images" / name, 200)
    arguments = ["sicapv2", "--source", source, "--root", tmp_path]
    invoke(scripts["prepare_pathology"], *arguments)
    manifest = manifest_of(tmp_path, "pathology/sicapv2")
    assert manifest["counts"] == {"train": dict.fromkeys(grades, 1), "test": dict.fromkeys(grades, 1)}
    assert set(manifest["source_sha256"]) == {"Train.csv", "Test.csv"}
    assert (tmp_path / "pathology/sicapv2/images/test/G5/Test_G5.jpg").exists()

    table.assign(NC=1).to_csv(source / "partition/Test/Test.csv", index=False)
    result = invoke(scripts["prepare_pathology"], *arguments, "--overwrite", exit_code=1)
    assert "has rows without exactly one of NC, G3, G4, G5" in result.stderr
    (source / "partition/Test/Train.csv").unlink()
    result = invoke(scripts["prepare_pathology"], *arguments, "--overwrite", exit_code=1)
    assert "Train.xlsx (nor Train.csv beside it)" in result.stderr


# ---- chest X-rays ----


def write_dicom(path, value):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    record = pydicom.Dataset()
    record.file_meta = meta
    record.SOPClassUID, record.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    record.PhotometricInterpretation, record.SamplesPerPixel = "MONOCHROME2", 1
    record.Rows = record.Columns = 16
    record.BitsAllocated = record.BitsStored = 8
    record.HighBit, record.PixelRepresentation = 7, 0
    record.PixelData = np.full((16, 16), value, dtype=np.uint8).tobytes()
    record.save_as(path, enforce_file_format=True)


@pytest.fixture
def rsna_source(tmp_path):
    source = tmp_path / "rsna-download"
    (source / "stage_2_train_images").mkdir(parents=True)
    classes = ["Lung Opacity", "No Lung Opacity / Not Normal", "Normal"]
    rows, mapping = [], []
    for index in range(30):
        patient, label = f"patient-{index:02d}", classes[index % 3]
        rows += [{"patientId": patient, "class": label}] * (1 + index % 4)  # a row a box
        write_dicom(source / "stage_2_train_images" / f"{patient}.dcm", index)
        # Two images each of 15 people; 6 apart, so both have the same class.
        person = index if index % 6 < 3 else index - 3
        mapping.append({"subset_img_id": patient, "img_id": f"{person:08d}_{index:03d}.png"})
    table = pd.DataFrame(rows).sample(frac=1, random_state=0)
    table.to_csv(source / "stage_2_detailed_class_info.csv", index=False)
    (source / "mapping.json").write_text(json.dumps(mapping))
    return source


def split_patients(root):
    images = root / "chest/rsna/images"
    return {split: {path.stem for path in (images / split).rglob("*.png")} for split in ("train", "test")}


def test_rsna_is_split_by_patient(scripts, tmp_path, rsna_source):
    arguments = ["rsna", "--source", rsna_source, "--root", tmp_path]
    invoke(scripts["prepare_chest_xray"], *arguments)
    patients = split_patients(tmp_path)
    assert not patients["train"] & patients["test"]
    assert len(patients["train"] | patients["test"]) == 30
    manifest = manifest_of(tmp_path, "chest/rsna")
    folders = ["lung_opacity", "no_lung_opacity_not_normal", "normal"]
    assert manifest["counts"] == {"train": dict.fromkeys(folders, 8), "test": dict.fromkeys(folders, 2)}
    assert (manifest["seed"], manifest["split"]) == (0, "by patientId, class by class, 1/5 test")
    written = tmp_path / "chest/rsna/images/train"
    picture = np.asarray(Image.open(next(written.rglob("*.png"))))
    assert picture.shape == (16, 16)  # gray stays gray

    invoke(scripts["prepare_chest_xray"], *arguments, "--overwrite")
    assert split_patients(tmp_path) == patients
    invoke(scripts["prepare_chest_xray"], *arguments, "--overwrite", "--seed", "1")
    assert split_patients(tmp_path) != patients
    assert len(load_dataset("chest/rsna", split="test", root=tmp_path)) == 6


def test_rsna_keeps_an_nih_patient_together(scripts, tmp_path, rsna_source):
    mapping = rsna_source / "mapping.json"
    arguments = [
        "rsna",
        "--source",
        rsna_source,
        "--root",
        tmp_path,
        "--nih-mapping",
        mapping,
        "--longest-side",
        "28",
    ]
    invoke(scripts["prepare_chest_xray"], *arguments)
    person = {entry["subset_img_id"]: entry["img_id"][:8] for entry in json.loads(mapping.read_text())}
    people = {split: {person[name] for name in names} for split, names in split_patients(tmp_path).items()}
    assert not people["train"] & people["test"]
    assert len(people["train"] | people["test"]) == 15
    assert manifest_of(tmp_path, "chest/rsna")["split"].startswith("by NIH patient")
    mapping.write_text("[]")
    result = invoke(scripts["prepare_chest_xray"], *arguments, "--overwrite", exit_code=1)
    assert "does not name 30 of the images, for example patient-00" in result.stderr


def test_rsna_refuses_a_patient_with_two_classes(scripts, tmp_path, rsna_source):
    table = rsna_source / "stage_2_detailed_class_info.csv"
    table.write_text("patientId,class\np1,Normal\np1,Lung Opacity\n")
    result = invoke(scripts["prepare_chest_xray"], "rsna", "--source", rsna_source, "--root", tmp_path, exit_code=1)
    assert "gives patient p1 two classes" in result.stderr


def test_shrunk_keeps_the_shape_of_the_picture(scripts):
    pixels = np.zeros((100, 50, 3), dtype=np.uint8)
    shrunk = scripts["prepare_chest_xray"].shrunk
    assert shrunk(pixels, 40).shape == (40, 20, 3)
    assert shrunk(pixels, 200) is pixels
    assert shrunk(pixels, None) is pixels


def test_covid_is_split_by_image_without_masks(scripts, tmp_path):
    source = tmp_path / "COVID-19_Radiography_Dataset"
    for name in ("COVID", "Normal", "Viral Pneumonia"):
        for index in range(10):
            write_image(source / name / "images" / f"{name}-{index}.png", index)
            write_image(source / name / "masks" / f"{name}-{index}.png", 255)
    invoke(scripts["prepare_chest_xray"], "covid", "--source", source, "--root", tmp_path)
    manifest = manifest_of(tmp_path, "chest/covid")
    assert manifest["counts"] == {"train": {"covid": 8, "normal": 8}, "test": {"covid": 2, "normal": 2}}
    assert manifest["seed"] == 0
    assert len(manifest["source_listing_sha256"]) == 64


def test_covid_qu_keeps_the_owners_split(scripts, tmp_path):
    source = tmp_path / "covid-qu"
    for split, count in (("Train", 3), ("Val", 1), ("Test", 2)):
        for name in ("COVID-19", "Non-COVID", "Normal"):
            for index in range(count):
                write_image(source / split / name / "images" / f"{index}.png", 90)
    invoke(scripts["prepare_chest_xray"], "covid", "--source", source, "--root", tmp_path)
    manifest = manifest_of(tmp_path, "chest/covid")
    assert manifest["counts"]["val"] == {"covid": 1, "normal": 1}
    assert manifest["counts"]["test"] == {"covid": 2, "normal": 2}
    assert manifest["seed"] is None
    (source / "Test/Normal").rename(source / "Test/Healthy")
    arguments = ["covid", "--source", source, "--root", tmp_path, "--overwrite"]
    result = invoke(scripts["prepare_chest_xray"], *arguments, exit_code=1)
    assert "error: no folder Normal in" in result.stderr


# ---- shared ground ----


def test_a_split_does_not_depend_on_the_order_of_the_rows():
    groups = [f"g{index}" for index in range(20)]
    labels = ["a", "b"] * 10
    chosen = folders.split_by_group(groups, labels, folds=4, seed=3)
    assert chosen.sum() == 5
    back = folders.split_by_group(groups[::-1], labels[::-1], folds=4, seed=3)
    assert (back[::-1] == chosen).all()
    with pytest.raises(ValueError, match="2 groups cannot be split into 4 folds"):
        folders.split_by_group(["g1", "g2"], ["a", "b"], folds=4, seed=3)


def test_an_unknown_class_folder_is_named(tmp_path):
    write_image(tmp_path / "images/train/tumour/1.png", 0)
    with pytest.raises(
        ValueError,
        match=r"pathology/pannuke has no class 'tumour' \(in train\); its classes are: benign, malignant",
    ):
        folders.class_counts("pathology/pannuke", tmp_path / "images")


def test_two_images_of_one_name_are_refused(tmp_path):
    staged = folders.StagedDataset("pathology/pannuke", tmp_path)
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    staged.add("train", "benign", "1.png", pixels)
    with pytest.raises(ValueError, match=r"two images of pathology/pannuke would be called train/benign/1\.png"):
        staged.add("train", "benign", "1.png", pixels)


def test_a_folder_of_someone_else_is_not_replaced(scripts, tmp_path, kather_archives):
    mine = write_image(tmp_path / "pathology/kather/images/train/ADI/mine.png", 1)
    arguments = ["kather", "--source", kather_archives, "--root", tmp_path]
    result = invoke(scripts["prepare_pathology"], *arguments, exit_code=1)
    assert "exists but was not made by this script" in result.stderr
    assert mine.exists()


def test_a_workbook_without_openpyxl_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "Train.xlsx").write_bytes(b"")

    def read_excel(path):
        raise ImportError("no openpyxl")

    monkeypatch.setattr(pd, "read_excel", read_excel)
    with pytest.raises(
        ImportError, match=r"Train\.xlsx needs openpyxl: `pip install openpyxl`, or save it as .*Train\.csv"
    ):
        folders.read_table(tmp_path / "Train.xlsx")


def test_a_table_with_longer_rows_than_its_header_is_refused(tmp_path):
    (tmp_path / "Train.csv").write_bytes(b"\xef\xbb\xbffile,class\na.png,tumour\n")
    assert folders.read_table(tmp_path / "Train.csv").file.tolist() == ["a.png"]
    (tmp_path / "Train.csv").write_text("file,class\n1,a.png,tumour\n2,b.png,skin\n")
    with pytest.raises(ValueError, match=r"Train\.csv is not a readable CSV table \(UTF-8, commas, no row longer"):
        folders.read_table(tmp_path / "Train.csv")


# ---- weights ----


def test_medclip_is_unpacked_and_recorded(scripts, tmp_path, monkeypatch):
    script = scripts["fetch_weights"]
    with zipfile.ZipFile(tmp_path / "published.zip", "w") as archive:
        archive.writestr("pytorch_model.bin", b"weights")
    content = (tmp_path / "published.zip").read_bytes()
    served(monkeypatch, script, content)
    asked = []

    def hf_hub_download(repository, name, *, revision, local_dir):
        asked.append((repository, name, revision))
        path = local_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"words")
        return str(path)

    monkeypatch.setattr(script, "hf_hub_download", hf_hub_download)
    for _ in range(2):
        invoke(script, "medclip-vit", "--weights-dir", tmp_path)
    folder = tmp_path / "medclip-vit"
    assert asked == [("emilyalsentzer/Bio_ClinicalBERT", "vocab.txt", "main")]
    assert (folder / "pytorch_model.bin").read_bytes() == b"weights"
    names = {"medclip-vit-pretrained.zip", "pytorch_model.bin", "vocab.txt"}
    assert {path.name for path in folder.iterdir()} == names | {"SHA256SUMS"}
    assert set(files.read_sums(folder)) == names
    (folder / "pytorch_model.bin").write_bytes(b"tampered")
    result = invoke(script, "medclip-vit", "--weights-dir", tmp_path, exit_code=1)
    assert "pytorch_model.bin is not the file that was fetched" in result.stderr


def test_the_record_is_what_the_models_check(scripts, tmp_path):
    from medrobust_lib.models import weights

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    downloads.record_sums(tmp_path, ["model.safetensors"])
    weights.check_hashes(tmp_path)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("unimedclip", "checkpoints/unimed/unimed_clip_vit_b16.pt"),
        ("robustmedclip", "exp-rank-16/vit/fewshot_100_percent/checkpoints/best_model/model.pth"),
        ("robustmedclip-rn50", "exp-rank-16/resnet/fewshot_100_percent/checkpoints/best_model/model.pth"),
    ],
)
def test_checkpoints_in_folders_of_the_hub_are_found(scripts, monkeypatch, model, path):
    script = scripts["fetch_weights"]
    listed = [path, "README.md", "exp-rank-8/vit/fewshot_100_percent/checkpoints/best_model/model.pth"]
    monkeypatch.setattr(script.HfApi, "list_repo_files", lambda self, repository: listed)
    published = script.published_files(script.find_model(model))
    matching = [file for file in published if "razaimam45/RobustMedCLIP" in file.url]
    assert [(file.name, file.url.partition("/resolve/main/")[2]) for file in matching] == [(Path(path).name, path)]


def test_weights_offline_or_unknown(scripts, tmp_path):
    script = scripts["fetch_weights"]
    result = invoke(script, "plip", "--weights-dir", tmp_path, exit_code=1)
    assert "error: cannot fetch https://huggingface.co/vinid/plip/resolve/main/" in result.stderr
    assert "unset HF_HUB_OFFLINE" in result.stderr
    result = invoke(script, "unimedclip", "--weights-dir", tmp_path, exit_code=1)
    assert "unset HF_HUB_OFFLINE" in result.stderr
    result = invoke(script, "medsiglip-448", "--weights-dir", tmp_path, exit_code=1)
    assert (
        f"error: cannot fetch https://huggingface.co/google/medsiglip-448 (save its files in {tmp_path}"
        in result.stderr
    )
    assert "Its terms must be accepted first (https://developers.google.com/" in result.stderr
    result = invoke(script, "plib", "--weights-dir", tmp_path, exit_code=1)
    assert "error: unknown model 'plib': did you mean 'plip'" in result.stderr
    result = invoke(script, "lava", "--weights-dir", tmp_path, exit_code=1)
    assert "unknown model 'lava'" in result.stderr
    assert "llava-1.6-mistral-7b, llava-1.6-vicuna-7b" in result.stderr
    result = invoke(script, "hf:owner/name", "--weights-dir", tmp_path, exit_code=1)
    assert "run `hf download owner/name`" in result.stderr
    result = invoke(script, "demo-clip", "--weights-dir", tmp_path, exit_code=1)
    assert "demo-clip needs no download" in result.stderr


def test_a_generative_models_repository_is_fetched_whole_and_recorded(scripts, tmp_path, monkeypatch):
    script = scripts["fetch_weights"]
    asked = []

    def snapshot_download(repository, *, local_dir, allow_patterns):
        asked.append((repository, sorted(allow_patterns)))
        local_dir.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            if not (local_dir / name).exists():
                (local_dir / name).write_bytes(name.encode())

    monkeypatch.setattr(script, "snapshot_download", snapshot_download)
    for _ in range(2):
        invoke(script, "llava-1.6-mistral-7b", "--weights-dir", tmp_path)
    assert (
        asked == [("llava-hf/llava-v1.6-mistral-7b-hf", ["*.jinja", "*.json", "*.model", "*.safetensors", "*.txt"])] * 2
    )
    folder = tmp_path / "llava-1.6-mistral-7b"
    assert set(files.read_sums(folder)) == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    (folder / "config.json").write_bytes(b"tampered")
    result = invoke(script, "llava-1.6-mistral-7b", "--weights-dir", tmp_path, exit_code=1)
    assert "config.json is not the file that was fetched" in result.stderr


def test_a_disk_without_room_is_not_taken_for_a_hub_out_of_reach(scripts, tmp_path, monkeypatch):
    script = scripts["fetch_weights"]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "snapshot_download", full)
    result = invoke(script, "llava-1.6-mistral-7b", "--weights-dir", tmp_path, exit_code=1)
    assert f"error: {tmp_path / 'llava-1.6-mistral-7b'}: the disk is full: what came is kept; " in result.stderr
    assert "proxy" not in result.stderr and result.stderr.count("\n") == 1


def test_a_prepared_set_without_room_is_named(tmp_path):
    origin = folders.Origin(source="", licence="", citation="", split="")
    with (
        pytest.raises(OSError, match="the disk is full: the set could not be built and nothing") as caught,
        folders.staged_dataset("chest/covid", root=tmp_path, origin=origin, overwrite=False),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "chest/covid")
    assert list((tmp_path / "chest").iterdir()) == []


def test_generative_models_offline_or_shipped(scripts, tmp_path):
    script = scripts["fetch_weights"]
    result = invoke(script, "smolvlm-256m", "--weights-dir", tmp_path, exit_code=1)
    assert "error: cannot fetch https://huggingface.co/HuggingFaceTB/SmolVLM-256M-Instruct" in result.stderr
    assert "unset HF_HUB_OFFLINE" in result.stderr
    result = invoke(script, "demo-vlm", "--weights-dir", tmp_path, exit_code=1)
    assert "demo-vlm needs no download" in result.stderr


def test_a_hub_file_with_a_wrong_hash_is_kept_aside(scripts, tmp_path, monkeypatch):
    script = scripts["fetch_weights"]

    def hf_hub_download(repository, name, *, revision, local_dir):
        local_dir.mkdir(parents=True)
        (local_dir / name).write_bytes(b"weights")
        return str(local_dir / name)

    monkeypatch.setattr(script, "hf_hub_download", hf_hub_download)
    file = script.WeightFile("a.bin", "https://huggingface.co/o/n/resolve/main/a.bin", "0" * 64)
    with pytest.raises(
        files.DownloadError,
        match=f"has sha256 {hashlib.sha256(b'weights').hexdigest()}, expected 0{{64}}",
    ):
        script.fetch(file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.wrong-hash"]


@pytest.mark.parametrize("modality", ["oct", "all"])
def test_contact_sheets_are_written(tmp_path, modality):
    path = tmp_path / "sheet.png"
    invoke(load_script("show_phantoms"), modality, "--image-size", 28, "--samples", 2, "--output", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_contact_sheets_say_that_phantoms_are_synthetic():
    script = load_script("show_phantoms")
    sheet = script.contact_sheet("oct", sites=["A"], image_size=28, samples=1)
    assert sheet.get_suptitle() == "oct, 28 px: synthetic phantoms, not patients' images"


def test_demo_clips_captions_never_mention_a_class_of_another_set():
    script = load_script("train_demo_clip")
    captions = script.caption_table()
    assert len(captions) == 28
    assert all(len(texts) >= 8 for texts in captions)
    everything = [text for texts in captions for text in texts]
    assert "{}" not in "".join(everything)


def test_demo_clips_tokenizer_ends_with_the_highest_id_and_knows_any_text():
    script = load_script("train_demo_clip")
    tokenizer = script.train_tokenizer(["a neutrophil", "a platelet"] * 3)
    ids = tokenizer(["a neutrophil", "Ωß 漢"])["input_ids"]
    assert {row[-1] for row in ids} == {len(tokenizer) - 1}
    assert tokenizer.unk_token is None
    assert tokenizer.decode(ids[1][1:-1]).strip() == "ωß 漢"


def test_demo_clips_loss_is_smallest_when_images_meet_their_captions():
    script = load_script("train_demo_clip")
    scale, corners = torch.tensor(20.0), torch.eye(4)
    labels, text_labels = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    right = script.contrastive_loss(scale, corners[labels], labels, corners[text_labels], text_labels)
    wrong = script.contrastive_loss(scale, corners[1 - labels], labels, corners[text_labels], text_labels)
    assert right < 0.7 < wrong
    assert torch.isfinite(right)


def test_demo_clips_photographs_tell_noise_from_acquisition():
    script = load_script("train_demo_clip")
    stage = script.Stage(epochs=1, learning_rate=1e-3, exposure_share=0.0, noise_share=0.4, repeats={})
    recipe = script.Recipe((stage,), shift_pixels=0, noise_sigmas=(0.5, 0.5), grain_sigmas=(0.1, 0.1))
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    pixels = np.full((400, 16, 16, 3), 128, np.uint8)
    streams = np.random.default_rng(0), torch.Generator().manual_seed(0)
    images, is_noisy = script.photographed(pixels, recipe, stage, preprocess, *streams)
    spread = 0.25 * images.flatten(1).std(dim=1)  # back in pixel units
    assert torch.equal(is_noisy.bool(), spread > 0.3)  # what the caption calls noisy, and nothing else
    assert is_noisy.float().mean() == pytest.approx(stage.noise_share, abs=0.08)
    grainy = (spread > 0.05) & ~is_noisy.bool()
    assert grainy.float().mean() == pytest.approx(recipe.grain_share, abs=0.08)
    assert spread[grainy].mean() == pytest.approx(0.1, abs=0.01)
    assert (spread[~grainy & ~is_noisy.bool()] < 1e-6).all()


def test_exposure_changes_a_share_of_the_images_and_stays_in_range():
    script = load_script("train_demo_clip")
    images = np.random.default_rng(0).random((300, 8, 8, 3), dtype=np.float32)
    ranges = {"contrast": (0.4, 0.5), "brightness": 0.0, "gain": 0.0}
    other = script.exposed(images, share=0.5, **ranges, rng=np.random.default_rng(1))
    changed = (other != images).any((1, 2, 3))
    assert changed.mean() == pytest.approx(0.5, abs=0.1)
    assert other.dtype == np.float32
    shrunk = other[changed].std((1, 2, 3)) / images[changed].std((1, 2, 3))
    assert ((shrunk > 0.39) & (shrunk < 0.51)).all()
    assert np.allclose(other.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5)
    wild = script.exposed(
        images, share=1.0, contrast=(1.2, 2.0), brightness=0.5, gain=0.5, rng=np.random.default_rng(2)
    )
    assert wild.min() >= 0
    assert wild.max() <= 1


def test_repeated_modalities_come_several_times_in_an_epoch():
    script = load_script("train_demo_clip")
    labels = np.arange(28)
    places = script.repeated_places(labels, {"breast": 2, "fundus": 3})
    counts = np.bincount(places)
    assert counts.sum() == 28 + 2 + 4
    assert sorted(np.flatnonzero(counts == 2)) == [17, 18]
    assert sorted(np.flatnonzero(counts == 3)) == [22, 23]


@pytest.mark.parametrize("chosen", ["both", "demo-clip-vit"])
def test_one_script_trains_both_demo_models(chosen, tmp_path):
    script = load_script("train_demo_clip")
    script.SPLITS = {"val": 18}
    small = {"out": tmp_path, "images": 18, "epochs": 1, "seed": 0}
    script.main(only=script.Wanted.RESIDUAL if chosen != "both" else script.Wanted.BOTH, **small)
    if chosen != "both":
        script.main(only=script.Wanted(chosen), **small)
    texts = []
    for id in ("demo-clip", "demo-clip-vit"):
        model = load_model(f"local-dir:{tmp_path / id}", device="cpu")
        texts.append(model.encode_text(["a neutrophil"]))
        assert b'"F16"' in (tmp_path / id / "open_clip_model.safetensors").read_bytes()
        recipe = json.loads((tmp_path / id / "recipe.json").read_text())
        assert ({stage["epochs"] for stage in recipe["stages"]}, recipe["images_per_modality"]) == ({1}, 18)
        log = (tmp_path / id / "training_log.csv").read_text().splitlines()
        assert len(log) == 1 + len(recipe["stages"])
    assert torch.allclose(*texts, atol=1e-6)  # the transformer has taken over the text tower
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-clip", "demo-clip-vit"]


def with_the_demos_teacher(script, folder):
    """demo-clip in a folder of its own, for the transformer to learn from; its tokens are those of the captions."""
    shutil.copytree(script.DEMO_FOLDER / "demo-clip", folder / "demo-clip")
    return folder


@pytest.mark.parametrize("model", ["RESIDUAL", "TRANSFORMER"])
def test_a_demo_models_training_goes_on_behind_its_last_finished_stage(tmp_path, monkeypatch, model):
    script = load_script("train_demo_clip")
    script.SPLITS = {"val": 18}
    script.RESIDUAL, script.TRANSFORMER = (
        script.replace(recipe, stages=recipe.stages[:1] * 2) for recipe in (script.RESIDUAL, script.TRANSFORMER)
    )
    run = {"only": script.Wanted[model], "images": 18, "epochs": 1, "seed": 0}
    if model == "TRANSFORMER":
        for name in ("whole", "stopped"):
            with_the_demos_teacher(script, tmp_path / name)
    script.main(out=tmp_path / "whole", **run)
    train, calls = script.train, []

    def stopped(*args, number, **options):
        calls.append(number)
        if number == 2 and len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, number=number, **options)

    monkeypatch.setattr(script, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        script.main(out=tmp_path / "stopped", **run)
    foreign = tmp_path / "stopped" / f"{run['only']}.stages" / "1-of-another-recipe.safetensors"
    foreign.touch()
    script.main(out=tmp_path / "stopped", **run)
    assert calls == [1, 2, 2]
    assert list(foreign.parent.iterdir()) == [foreign]  # its own stages are done with, others' are not
    one, other = (
        load_model(f"local-dir:{tmp_path / name / run['only']}", device="cpu") for name in ("whole", "stopped")
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_stage_of_another_teacher_is_trained_anew(tmp_path, monkeypatch):
    script = load_script("train_demo_clip")
    script.SPLITS = {"val": 18}
    script.TRANSFORMER = script.replace(script.TRANSFORMER, stages=script.TRANSFORMER.stages[:1] * 2)
    weights = with_the_demos_teacher(script, tmp_path) / "demo-clip" / script.WEIGHTS
    run = {"only": script.Wanted.TRANSFORMER, "images": 18, "epochs": 1, "seed": 0}
    train, calls = script.train, []

    def stopped(*args, number, **options):
        calls.append(number)
        if calls == [1, 2]:
            raise KeyboardInterrupt
        return train(*args, number=number, **options)

    monkeypatch.setattr(script, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        script.main(out=tmp_path, **run)
    state = script.load_file(weights)
    script.save_file(state | {"logit_scale": state["logit_scale"] + 0.5}, weights)
    script.main(out=tmp_path, **run)
    assert calls == [1, 2, 1, 2]


def test_demo_clips_augmentation_only_shifts():
    script = load_script("train_demo_clip")
    images = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
    shifted = script.shifted(images, 3, np.random.default_rng(1))
    assert shifted.shape == images.shape
    # The middle of every image is somewhere in the shifted one, untouched.
    for image, other in zip(images, shifted, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(other, (8, 8, 3)).reshape(-1, 8, 8, 3)
        assert (windows == image[4:12, 4:12]).all((1, 2, 3)).any()
