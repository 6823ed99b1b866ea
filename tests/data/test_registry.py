import json
import re
import unicodedata
from importlib.resources import files

import numpy as np
import pandas as pd
import pydicom
import pytest
import yaml
from PIL import Image

import medrobust_lib
from medrobust_lib.checks import closest, suggest
from medrobust_lib.data.registry import list_datasets, load_dataset
from medrobust_lib.data.splits import fraction_splits
from medrobust_lib.data.wording import class_wording, spelled
from medrobust_lib.phantoms import MODALITIES, SPLITS, phantom_classes

# Most images here are of one colour, to be told apart by it: dark, and copies of each other.
pytestmark = pytest.mark.filterwarnings("ignore:.*before anything is measured")

TABLE = json.loads(files("medrobust_lib.data").joinpath("classes.json").read_text(encoding="utf-8"))
REGISTERED = {name: entry for name, entry in TABLE.items() if name != "unregistered"}


def save(path, value=0, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)
    return path


def write_medmnist(root, name, *, side=28, n=40, classes=2, split="test"):
    (root / "medmnist").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(side)
    path = root / "medmnist" / f"{name}{'' if side == 28 else f'_{side}'}.npz"
    images = rng.integers(0, 256, (n, side, side), dtype=np.uint8)
    labels = (np.arange(n) % classes).astype(np.uint8)[:, None]
    np.savez_compressed(path, **{f"{split}_images": images, f"{split}_labels": labels})
    return images


# class names


@pytest.mark.parametrize("name", TABLE)
def test_wording_is_complete_and_unambiguous(name):
    entry = TABLE[name]
    lists = [entry["names"], entry["prompt_nouns"], *entry["alternatives"].values()]
    assert len({len(names) for names in lists}) == 1
    assert all(len(set(names)) == len(names) for names in lists)
    assert 5 <= len(entry["templates"]) <= 8 and len(set(entry["templates"])) == len(entry["templates"])
    assert all(template.count("{}") == 1 for template in entry["templates"])
    assert entry["source"]
    owner = {}
    for names in lists:
        for label, spelling in enumerate(names):
            assert owner.setdefault(spelled(spelling), label) == label, spelling
    for alias, target in entry.get("aliases", {}).items():
        assert owner.setdefault(spelled(alias), entry["names"].index(target)) == entry["names"].index(target)


def test_registry_and_wording_name_the_same_sets():
    ids = set(list_datasets()["id"])
    assert {id.removesuffix("-site-a") for id in ids} == set(REGISTERED)
    assert {id for id in ids if id.endswith("-site-a")} == {f"phantom/{name}-site-a" for name in MODALITIES}


@pytest.mark.parametrize("modality", MODALITIES)
def test_phantom_names_are_the_painters_names(modality):
    wording = class_wording(f"phantom/{modality}")
    assert wording.names == wording.prompt_nouns == phantom_classes(modality)
    assert class_wording(f"phantom/{modality}-site-a").names == wording.names


def test_the_papers_words_and_order():
    kather = class_wording("pathology/kather")
    assert kather.names == ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
    assert kather.prompt_nouns[8] == "colorectal adenocarcinoma epithelium"
    assert kather.templates[0] == "An H&E image patch of {}."
    pannuke = class_wording("pathology/pannuke")  # certified with one sentence, adapted from another
    assert (pannuke.templates[0], pannuke.start) == ("An H&E image of {} tissue.", "An H&E image patch of {}.")
    assert class_wording("pathology/sicapv2").templates[0] == "a histopathology slide showing {}"
    assert class_wording("medimeta/oct").prompt_nouns == ("CNV", "NORMAL", "DME", "DRUSEN")
    assert class_wording("medimeta/pbc").templates[0] == "a medical image of a {} belonging to pbc"
    aml = class_wording("medimeta/aml")
    assert (len(aml.names), aml.names[4], aml.templates[1]) == (
        *(15, "LYA Lymphocyte (atypical)"),
        "a medical image of {} belonging to aml",
    )
    assert class_wording("medimeta/mammo_mass").prompt_nouns == ("malignant", "benign")
    assert class_wording("medmnist/breast").prompt_nouns == ("malignant", "normal, benign")
    assert class_wording("medmnist/retina").prompt_nouns == ("0", "1", "2", "3", "4")
    assert len(class_wording("pathology/skincancer").names) == 16
    assert len(class_wording("pathology/sicapv2").names) == 4


def test_adaptation_starts_from_the_papers_sentence_unless_templates_are_given(tmp_path):
    for name in ("benign", "malignant"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), 99).save(tmp_path / name / "1.png")
    path = f"folder:{tmp_path}"
    assert load_dataset(path, like="pathology/pannuke").start_template == "An H&E image patch of {}."
    assert load_dataset(path, like="pathology/pannuke", templates=["tissue: {}"]).start_template == "tissue: {}"
    assert load_dataset("phantom/histology", n=9).start_template == "An H&E image patch of {}."


def test_clear_wording_is_used_where_there_is_one():
    assert class_wording("medmnist/retina", wording="clear").prompt_nouns[4] == "proliferative diabetic retinopathy"
    kather = class_wording("pathology/kather", wording="clear")
    assert kather.wording == "clear" and kather.prompt_nouns == class_wording("pathology/kather").prompt_nouns
    assert "Gleason" in class_wording("pathology/sicapv2", wording="clear").prompt_nouns[1]
    assert class_wording("pathology/sicapv2", wording="long").prompt_nouns[3].startswith("gleason grade 5")


def test_labels_are_found_in_any_accepted_spelling():
    pbc = class_wording("medimeta/pbc")
    assert pbc.label_of("ig") == pbc.label_of("Immature_Granulocyte") == pbc.label_of("3") == 3
    assert class_wording("chest/rsna").label_of("No Lung Opacity / Not Normal") == 1
    assert class_wording("pathology/kather").label_of("tum") == 8
    assert class_wording("medmnist/retina").label_of("4") == 4
    assert pbc.label_of("macrophage") is None and pbc.label_of("8") is None
    aml = class_wording("medimeta/aml")
    assert aml.label_of("LYT") == aml.label_of("typical lymphocyte") == 5
    assert aml.label_of("PMB Promyelocyte (bilobled)") == aml.label_of("bilobed promyelocyte") == 13


def test_unknown_wording_and_set_name_the_choices():
    with pytest.raises(ValueError, match=r"no class names for 'medimeta/pcb'. Did you mean .*'medimeta/pbc'"):
        class_wording("medimeta/pcb")
    with pytest.raises(ValueError, match="unknown wording of medimeta/oct 'clearer'; choose one of paper, clear"):
        class_wording("medimeta/oct", wording="clearer")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("PLIP", ["plip"]),  # the case alone differs: nothing else is meant
        ("biomedclop", ["BiomedCLIP"]),
        ("Plop", ["plip"]),
        ("STRASSE", ["straße"]),
        ("", []),
        ("xyzzy", []),
    ],
)
def test_the_case_of_letters_does_not_hide_what_is_meant(value, expected):
    choices = ("plip", "BiomedCLIP", "straße", "clip-vit-b16")
    assert closest(value, choices) == expected
    if expected:
        assert suggest(value, choices) == f" Did you mean {expected[0]!r}?"


def test_data_sets_and_their_wordings_are_found_in_any_case():
    for id, meant in (("PHANTOM/Blood", "phantom/blood"), ("Pathology/SICAPv2", "pathology/sicapv2")):
        with pytest.raises(ValueError, match=rf"unknown data set '{id}'\. Did you mean '{meant}'\?"):
            load_dataset(id)
    with pytest.raises(ValueError, match="unknown wording of medimeta/oct 'Clear'; .* did you mean 'clear'"):
        class_wording("medimeta/oct", wording="Clear")


# the table and the root


def test_table_of_data_sets(tmp_path):
    table = list_datasets(root=tmp_path)
    assert list(table) == [
        "id",
        "modality",
        "classes",
        "image size",
        "train",
        "val",
        "test",
        "licence",
        "source",
        "available",
        "script",
    ]
    rows = table.set_index("id")
    assert rows.loc["medmnist/blood", ["classes", "train", "val", "test"]].tolist() == [8, 11959, 1712, 3421]
    assert rows.loc["phantom/oct", ["train", "val", "test"]].tolist() == [
        SPLITS[split] for split in ("train", "val", "test")
    ]
    assert pd.isna(rows.loc["chest/rsna", "test"]) and rows.loc["pathology/kather", "test"] == 7180
    phantom = rows.index.str.startswith("phantom/")
    assert rows["available"][phantom].all() and not rows["available"][~phantom].any()
    assert (rows["script"][~phantom].str.match(r"python data_scripts/\w+\.py \w+")).all()


def test_table_sees_what_is_on_this_computer(tmp_path):
    write_medmnist(tmp_path, "breastmnist", side=64)
    (tmp_path / "medimeta" / "mammo_calc").mkdir(parents=True)
    (tmp_path / "medimeta" / "mammo_calc" / "info.yaml").touch()
    save(tmp_path / "chest" / "covid" / "images" / "test" / "covid" / "1.png")
    table = list_datasets(root=tmp_path).set_index("id")
    assert table.loc[["medmnist/breast", "medmnist/blood"], "image size"].tolist() == [64, 28]
    rows = table["available"]
    found = set(rows.index[rows]) - set(rows.index[rows.index.str.startswith("phantom/")])
    assert found == {"medmnist/breast", "medimeta/mammo", "chest/covid"}


def test_sizes_of_a_prepared_set_come_from_its_manifest(tmp_path):
    folder = tmp_path / "chest" / "rsna"
    folder.mkdir(parents=True)
    counts = {"train": {"Normal": 4, "Lung Opacity": 3}, "test": {"Normal": 2}}
    (folder / "manifest.json").write_text(json.dumps({"counts": counts}))
    row = list_datasets(root=tmp_path).set_index("id").loc["chest/rsna"]
    assert (row["train"], row["test"]) == (7, 2) and pd.isna(row["val"])


def test_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDROBUST_DATA", str(tmp_path))
    images = write_medmnist(tmp_path, "pneumoniamnist")
    np.testing.assert_array_equal(load_dataset("medmnist/pneumonia").images[..., 0], images)


# loading


def test_phantoms_are_the_default_and_say_so():
    dataset = medrobust_lib.load_dataset("phantom/blood", n=16, seed=3)
    assert dataset.synthetic and "synthetic phantoms" in repr(dataset)
    assert "synthetic phantoms" in dataset.provenance["source"]
    assert dataset.images.shape == (16, 64, 64, 3)
    assert list(dataset.class_counts().values()) == [2] * 8
    assert (dataset.labels == dataset.indices % 8).all()
    site_a = load_dataset("phantom/blood-site-a", n=16, seed=3)
    assert (site_a.indices == dataset.indices).all() and (site_a.images != dataset.images).any()
    assert site_a.id == "phantom/blood-site-a"


def test_an_image_does_not_depend_on_which_others_are_drawn():
    whole = load_dataset("phantom/oct", split="val", n=60, image_size=32)
    part = load_dataset("phantom/oct", split="val", n=20, image_size=32)
    assert set(part.indices) < set(whole.indices)
    np.testing.assert_array_equal(part.images, whole.subset(np.isin(whole.indices, part.indices)).images)


def test_medmnist_subset_is_recorded_and_keeps_its_positions(tmp_path):
    images = write_medmnist(tmp_path, "pneumoniamnist")
    dataset = load_dataset("medmnist/pneumonia", n=10, seed=1, root=tmp_path)
    np.testing.assert_array_equal(dataset.images[..., 0], images[dataset.indices])
    assert dataset.class_counts() == {"normal": 5, "pneumonia": 5}
    assert dataset.provenance["split_size"] == 40 and dataset.provenance["seed"] == 1
    assert dataset.provenance["resized"] is None and not dataset.synthetic
    assert dataset.provenance["wording"] == "medmnist/pneumonia: paper"


def test_a_balanced_draw_is_recorded_and_says_what_one_answer_scores(tmp_path):
    for name, number in (("a", 12), ("b", 6), ("c", 2)):
        for place in range(number):
            path = tmp_path / "mine" / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([number, place]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    id = f"folder:{tmp_path / 'mine'}"
    with pytest.warns(UserWarning, match="Class-balanced draw"):
        data = load_dataset(id, n=8, draw="balanced", seed=3)
    assert list(data.class_counts().values()) == [3, 3, 2]
    assert {name: data.provenance[name] for name in ("n", "seed", "draw")} == {"n": 8, "seed": 3, "draw": "balanced"}
    assert data.caveats[-1] == (
        "Class-balanced draw: the best constant answer is right on 3 of 8 images (37.5 %; in the whole split 60.0 %), "
        "and accuracy on the draw is no estimate of accuracy at the data set's own prevalence."
    )
    again, other = (load_dataset(id, n=8, draw="balanced", seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(data.images, again.images)
    assert data.indices.tolist() == again.indices.tolist() == sorted(data.indices) != other.indices.tolist()
    stratified = load_dataset(id, n=8, seed=3)
    assert stratified.indices.tolist() == load_dataset(id, n=8, seed=3, draw="stratified").indices.tolist()
    assert list(stratified.class_counts().values()) == [5, 2, 1]
    assert "draw" not in stratified.provenance
    assert not [caveat for caveat in stratified.caveats if "draw" in caveat]


def test_a_draw_that_cannot_be_is_refused_before_the_data_are_looked_for(tmp_path):
    with pytest.raises(ValueError, match="draw='balanced' needs n, the number of images to draw"):
        load_dataset("pathology/kather", root=tmp_path, draw="balanced")
    with pytest.raises(ValueError, match="unknown draw 'random'; choose one of stratified, balanced"):
        load_dataset("pathology/kather", root=tmp_path, n=4, draw="random")


def test_medmnist_prefers_the_largest_file_and_records_resizing(tmp_path):
    write_medmnist(tmp_path, "pneumoniamnist")
    large = write_medmnist(tmp_path, "pneumoniamnist", side=64)
    dataset = load_dataset("medmnist/pneumonia", n=4, root=tmp_path)
    np.testing.assert_array_equal(dataset.images[..., 0], large[dataset.indices])
    assert load_dataset("medmnist/pneumonia", n=4, root=tmp_path, image_size=28).provenance["resized"] is None
    resized = load_dataset("medmnist/pneumonia", n=4, root=tmp_path, image_size=96)
    assert resized.images.shape == (4, 96, 96, 3)
    assert resized.provenance["resized"].startswith("64 × 64 px -> 96 px")


def write_medimeta(folder, tasks, *, task, numbers):
    """A MedIMeta set whose test images show these labels of one task."""
    for name in ("splits", "task_labels", "images"):
        (folder / name).mkdir(parents=True)
    (folder / "info.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    np.save(folder / "task_labels" / f"{task}.npy", np.array(numbers)[:, None])
    paths = [f"images/{index:06d}.tiff" for index in range(len(numbers))]
    (folder / "splits" / "test.txt").write_text("\n".join(paths))
    for path in paths:
        Image.fromarray(np.full((24, 24), 50, np.uint8)).save(folder / path)


@pytest.mark.parametrize(("name", "folder"), [("mammo", "mammo_calc"), ("mammo_mass", "mammo_mass")])
def test_medimeta_is_found_under_its_own_folder_name(tmp_path, name, folder):
    shapes = {"task_name": "mass shape", "task_target": "MULTILABEL_CLASSIFICATION", "labels": {0: "OVAL", 1: "ROUND"}}
    task = {"task_name": "pathology", "task_target": "BINARY_CLASSIFICATION", "labels": {0: "benign", 1: "malignant"}}
    write_medimeta(tmp_path / "medimeta" / folder, [task, shapes], task="pathology", numbers=[0, 1, 1])
    dataset = load_dataset(f"medimeta/{name}", root=tmp_path)
    assert dataset.classes == ("malignant", "benign") and dataset.labels.tolist() == [1, 0, 0]


def test_aml_has_the_names_of_its_own_description(tmp_path):
    names = """BAS Basophil, EBO Erythroblast, EOS Eosinophil, KSC Smudge cell, LYA Lymphocyte (atypical),
        LYT Lymphocyte (typical), MMZ Metamyelocyte, MOB Monoblast, MON Monocyte, MYB Myelocyte, MYO Myeloblast,
        NGB Neutrophil (band), NGS Neutrophil (segmented), PMB Promyelocyte (bilobled), PMO Promyelocyte"""
    labels = dict(enumerate(" ".join(names.split()).split(", ")))
    task = {"task_name": "morphological class", "task_target": "MULTICLASS_CLASSIFICATION", "labels": labels}
    write_medimeta(tmp_path / "medimeta" / "aml", [task], task="morphological class", numbers=[14, 5, 3])
    dataset = load_dataset("medimeta/aml", root=tmp_path)
    assert dataset.classes == tuple(labels.values()) and dataset.labels.tolist() == [14, 5, 3]
    assert list_datasets(root=tmp_path).set_index("id").loc["medimeta/aml", ["train", "val", "test"]].isna().all()


def test_prepared_folders_take_the_papers_label_order(tmp_path):
    for code in ("TUM", "ADI", "NORM"):
        save(tmp_path / "pathology" / "kather" / "images" / "test" / code / "1.png", size=(300, 240))
    save(tmp_path / "pathology" / "kather" / "images" / "train" / "ADI" / "1.png")
    dataset = load_dataset("pathology/kather", root=tmp_path)
    assert dataset.labels.tolist() == [0, 6, 8] and len(dataset.classes) == 9
    assert dataset.images.shape == (3, 224, 224, 3)
    assert dataset.provenance["resized"] == "300 × 240 px -> 224 px: shortest edge to size (bicubic), centre crop"
    with pytest.raises(ValueError, match=r"has no split 'val'. Choose one of: test, train"):
        load_dataset("pathology/kather", split="val", root=tmp_path)


def test_prepared_folder_with_a_foreign_class_is_refused(tmp_path):
    save(tmp_path / "chest" / "covid" / "images" / "test" / "covid" / "1.png")
    save(tmp_path / "chest" / "covid" / "images" / "test" / "influenza" / "1.png")
    message = r"class 'influenza' is outside the class list of chest/covid: 0 'covid', 1 'normal'"
    with pytest.raises(ValueError, match=message):
        load_dataset("chest/covid", root=tmp_path)


def test_own_folder_uses_its_names_and_neutral_templates(tmp_path):
    save(tmp_path / "cells" / "blast_cell" / "1.png", value=9)
    save(tmp_path / "cells" / "mature-cell" / "1.png")
    dataset = load_dataset(f"folder:{tmp_path / 'cells'}")
    assert dataset.id == "folder:cells" and dataset.split == "all"
    assert dataset.classes == ("blast cell", "mature cell")
    assert dataset.templates == class_wording("unregistered").templates
    assert dataset.images.shape == (2, 16, 16, 3) and dataset.images[0].max() == 9
    assert dataset.provenance["read_from"] == str(tmp_path / "cells")


def test_own_folder_can_be_read_like_a_registered_set(tmp_path):
    for index, name in enumerate(("normal", "benign", "malignant")):
        save(tmp_path / "busi" / name / "1.png", value=index)
    dataset = load_dataset(f"folder:{tmp_path / 'busi'}", like="medmnist/breast")
    # Files come in folder order: benign, malignant, normal; normal and benign are one class there.
    assert dataset.classes == ("malignant", "normal, benign") and dataset.labels.tolist() == [1, 0, 1]
    assert dataset.modality == "breast ultrasound"
    assert dataset.templates == class_wording("medmnist/breast").templates
    with pytest.raises(ValueError, match="class 'benign' is outside the class list of medmnist/pneumonia"):
        load_dataset(f"folder:{tmp_path / 'busi'}", like="medmnist/pneumonia")
    with pytest.raises(ValueError, match=r"unknown data set 'medmnist/brest' for like. Did you mean 'medmnist/breast'"):
        load_dataset(f"folder:{tmp_path / 'busi'}", like="medmnist/brest")


def test_own_folder_takes_class_names_and_templates_from_the_call(tmp_path):
    folder = tmp_path / "us"
    for value, name in enumerate(("M", "N", "B")):
        save(folder / name / "1.png", value=value)
    nouns = {"M": "a malignant tumour", "B": "a benign lesion", "N": "no lesion"}
    given = {"class_names": nouns, "templates": ["an ultrasound image of {}."]}
    plain, dataset = load_dataset(f"folder:{folder}"), load_dataset(f"folder:{folder}", **given)
    # In the order of the folders, whatever that of the mapping.
    assert dataset.classes == ("a benign lesion", "a malignant tumour", "no lesion")
    assert dataset.templates == ("an ultrasound image of {}.",)
    assert dataset.provenance["wording"] == "unregistered: class_names and templates of the call"
    # Words change what a model is asked, and nothing about images and the addresses of their noise.
    assert dataset.id == plain.id == "folder:us"
    for name in ("images", "labels", "indices"):
        np.testing.assert_array_equal(getattr(dataset, name), getattr(plain, name))
    assert load_dataset(f"folder:{folder}", templates=["{}"]).classes == plain.classes == ("B", "M", "N")
    assert load_dataset(f"folder:{folder}", class_names=nouns).templates == class_wording("unregistered").templates
    drawn = load_dataset(f"folder:{folder}", n=2, seed=1, **given)
    np.testing.assert_array_equal(drawn.indices, load_dataset(f"folder:{folder}", n=2, seed=1).indices)


def test_folders_with_one_noun_become_one_class_with_the_images_where_they_were(tmp_path):
    for value, name in enumerate(("benign", "malignant", "normal")):
        save(tmp_path / name / "1.png", value=value)
    nouns = {"normal": "no tumour", "benign": "no tumour", "malignant": "a malignant tumour"}
    dataset = load_dataset(f"folder:{tmp_path}", class_names=nouns)
    assert dataset.classes == ("no tumour", "a malignant tumour")
    assert dataset.labels.tolist() == [0, 1, 0] and dataset.indices.tolist() == [0, 1, 2]
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    # Without a word from the caller, two folders that read alike are a mistake.
    save(tmp_path / "other" / "a_b" / "1.png")
    save(tmp_path / "other" / "a-b" / "1.png")
    with pytest.raises(ValueError, match="classes 'a-b' and 'a_b' are both called 'a b'; give them one name"):
        load_dataset(f"folder:{tmp_path / 'other'}")


def test_class_names_may_be_keyed_by_the_numbers_of_a_table_and_templates_join_a_known_wording(tmp_path):
    for number in range(2):
        save(tmp_path / f"{number}.png")
    (tmp_path / "list.csv").write_text("path,label\n0.png,0\n1.png,1\n")
    id = f"csv:{tmp_path / 'list.csv'}"
    assert load_dataset(id, class_names={0: "healthy", 1: "ill"}).classes == ("healthy", "ill")
    like = load_dataset(id, like="medmnist/pneumonia", templates=["a radiograph, {}"])
    assert like.classes == ("normal", "pneumonia") and like.templates == ("a radiograph, {}",)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"class_names": {"cat": "x", "mature": "y"}},
            ValueError,
            r"has no class 'cat'\. Choose one of: blast, mature",
        ),
        ({"class_names": {"blasts": "x", "mature": "y"}}, ValueError, r"no class 'blasts'\. Did you mean 'blast'"),
        ({"class_names": {"blast": "x"}}, ValueError, "class_names has no noun for 'mature' of .*; name every class"),
        ({"class_names": {"blast": "x", "mature": " "}}, ValueError, "class_names: the noun of 'mature' is empty"),
        ({"class_names": {"blast": "x", "mature": 3}}, TypeError, "the noun of 'mature' is 3, not a text"),
        ({"class_names": ["x", "y"]}, TypeError, "give a mapping such as {'blast': 'what to call it in a prompt'}"),
        ({"class_names": {"blast": "x", "mature": "x"}}, ValueError, "one class only"),
        ({"templates": ["a cell"]}, ValueError, "template 'a cell' needs exactly one {} in the place of the class"),
        ({"templates": ["{} {}"]}, ValueError, "template '{} {}' needs exactly one {}"),
        ({"templates": "a {}."}, TypeError, r"templates='a {}.' is one text: give a list, \['a {}.'\]"),
        ({"templates": []}, ValueError, "no prompt templates: give at least one"),
        (
            {"class_names": {"blast": "x", "mature": "y"}, "like": "medmnist/blood"},
            ValueError,
            "give class_names or like='medmnist/blood', not both",
        ),
    ],
)
def test_words_that_do_not_fit_own_images_are_refused(tmp_path, given, error, message):
    for name in ("blast", "mature"):
        save(tmp_path / name / "1.png")
    with pytest.raises(error, match=message):
        load_dataset(f"folder:{tmp_path}", **given)


def test_a_registered_set_keeps_its_own_words():
    for given in ({"class_names": {"a": "b"}}, {"templates": ["{}"]}):
        with pytest.raises(ValueError, match="is for folder: and csv: data; phantom/chest has its own classes"):
            load_dataset("phantom/chest", **given)


def test_fractions_of_own_images_take_the_same_words(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            for number in range(4):
                save(tmp_path / split / name / f"{number}.png", value=number)
    parts = fraction_splits(
        f"folder:{tmp_path}", fraction=1.0, n_val=2, n_test=8, class_names={"a": "x", "b": "y"}, templates=["{}!"]
    )
    for part in (parts.train, parts.val, parts.test):
        assert part.classes == ("x", "y") and part.templates == ("{}!",)


def test_a_series_of_dicom_files_without_suffix_is_read_through_its_table(tmp_path):
    for number in range(4):
        record = pydicom.Dataset()
        record.file_meta = pydicom.dataset.FileMetaDataset()
        record.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        record.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        record.SOPInstanceUID = f"2.25.{number + 1}"
        record.set_pixel_data(np.full((20, 20), 50 * number, np.uint8), "MONOCHROME1", 8)
        record.save_as(tmp_path / f"IM{number:06d}", enforce_file_format=True)
    rows = "".join(f"IM{number:06d},{'sick' if number % 2 else 'well'}\n" for number in range(4))
    (tmp_path / "labels.csv").write_text(f"path,label\n{rows}")
    dataset = load_dataset(
        f"csv:{tmp_path / 'labels.csv'}", class_names={"sick": "an ill patient", "well": "no finding"}
    )
    assert dataset.images[:, 0, 0, 0].tolist() == [255, 205, 155, 105]
    assert [dataset.classes[label] for label in dataset.labels] == ["no finding", "an ill patient"] * 2


def test_images_of_several_sizes_come_at_224_whatever_is_drawn(tmp_path):
    save(tmp_path / "a" / "1.png", size=(300, 200))
    save(tmp_path / "a" / "2.png", size=(50, 60))
    save(tmp_path / "b" / "1.png", size=(300, 200))
    whole = load_dataset(f"folder:{tmp_path}")
    assert whole.images.shape == (3, 224, 224, 3)
    assert whole.provenance["resized"].startswith("50 × 60 to 300 × 200 px")
    # Two images of one size are drawn, but the split has two sizes.
    for seed in range(4):
        assert load_dataset(f"folder:{tmp_path}", n=2, seed=seed).images.shape == (2, 224, 224, 3)
    assert load_dataset(f"folder:{tmp_path}", image_size=32).images.shape == (3, 32, 32, 3)


def test_equal_images_keep_their_own_size_even_if_not_square(tmp_path):
    save(tmp_path / "a" / "1.png", size=(30, 20))
    save(tmp_path / "b" / "1.png", size=(30, 20))
    assert load_dataset(f"folder:{tmp_path}").images.shape == (2, 20, 30, 3)


def test_only_the_images_drawn_are_decoded(tmp_path):
    for number in range(10):
        save(tmp_path / "a" / f"{number}.png")
        save(tmp_path / "b" / f"{number}.png")
    drawn = load_dataset(f"folder:{tmp_path}", n=4, image_size=16)
    names = [f"{'ab'[index // 10]}/{index % 10}.png" for index in range(20)]
    for index, name in enumerate(names):
        if index not in drawn.indices:
            (tmp_path / name).write_bytes(b"damaged")
    again = load_dataset(f"folder:{tmp_path}", n=4, image_size=16)
    np.testing.assert_array_equal(again.images, drawn.images)
    with pytest.raises(ValueError, match=r"\.png is not a readable image"):
        load_dataset(f"folder:{tmp_path}", image_size=16)


def test_csv_is_loaded(tmp_path):
    save(tmp_path / "1.png")
    save(tmp_path / "2.png")
    (tmp_path / "list.csv").write_text("path,label\n1.png,VIRUS\n2.png,normal\n")
    dataset = load_dataset(f"csv:{tmp_path / 'list.csv'}", like="medimeta/pneumonia", wording="clear")
    assert dataset.id == "csv:list.csv"
    assert dataset.labels.tolist() == [2, 0] and dataset.classes[2] == "viral pneumonia"


# classes that are one


ACCENTS = {form: unicodedata.normalize(form, "Kräuter") for form in ("NFC", "NFD")}


@pytest.mark.parametrize(
    "one, other",
    [
        ("Benign", "benign"),
        ("STRASSE", "straße"),
        ("benign", "benign "),
        ("two  spaces", "two spaces"),
        ("\uff21\uff22\uff23", "ABC"),  # full width
        ("ben\u200bign", "benign"),
        ("\u0130ris", "iris"),  # Turkish capital with a dot
        ("\ufb01brosis", "fibrosis"),
        tuple(ACCENTS.values()),
    ],
)
def test_classes_that_differ_in_what_nobody_sees_are_refused(tmp_path, one, other):
    save(tmp_path / "train" / one / "1.png")
    save(tmp_path / "test" / other / "1.png")
    for split in ("train", "test"):
        save(tmp_path / split / "malignant" / "1.png")
    shown = [ascii(name) if one in ACCENTS.values() else repr(name) for name in sorted((one, other))]
    message = (
        f"classes {shown[0]} and {shown[1]} differ in case, spaces or the form of letters only; give them one name"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset(f"folder:{tmp_path}")
    nouns = {one: "a benign tumour", other: "a benign tumour", "malignant": "a malignant tumour"}
    dataset = load_dataset(f"folder:{tmp_path}", class_names=nouns)
    assert dataset.class_counts() == {"a benign tumour": 1, "a malignant tumour": 1}
    with pytest.raises(ValueError, match="class names '.' and '.' differ in case"):
        load_dataset(f"folder:{tmp_path}", class_names=nouns | {one: "x", other: "X"})


def test_labels_of_a_table_that_differ_in_case_are_refused_and_a_known_set_joins_them(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png", value=ord(name))
    (tmp_path / "t.csv").write_text("path,label\na.png,Normal\nb.png,normal\nc.png,pneumonia\n")
    with pytest.raises(ValueError, match="classes 'Normal' and 'normal' differ in case"):
        load_dataset(f"csv:{tmp_path / 't.csv'}")
    assert load_dataset(f"csv:{tmp_path / 't.csv'}", like="medmnist/pneumonia").labels.tolist() == [0, 0, 1]


def test_class_names_and_known_sets_meet_names_with_other_accents(tmp_path):
    save(tmp_path / ACCENTS["NFD"] / "1.png")
    save(tmp_path / "b" / "1.png")
    nouns = {ACCENTS["NFC"]: "herbs", "b": "weeds"}
    assert load_dataset(f"folder:{tmp_path}", class_names=nouns).classes == ("herbs", "weeds")
    assert spelled(ACCENTS["NFD"]) == spelled(ACCENTS["NFC"]) != spelled("Krauter")


# mistakes


@pytest.mark.parametrize(
    "id, close",
    [
        ("phantom/blod", "phantom/blood"),
        ("medmnist/bloodmnist", "medmnist/blood"),
        ("kather", "pathology/kather"),
    ],
)
def test_unknown_id_gives_the_closest(id, close):
    with pytest.raises(ValueError, match=rf"unknown data set '{id}'\. Did you mean .*'{close}'"):
        load_dataset(id)


def test_a_file_without_a_scheme_is_named_with_what_helps(tmp_path):
    (tmp_path / "t.csv").write_text("path,label\n")
    (tmp_path / "x.npz").write_bytes(b"PK")
    for name, message in {"t.csv": f"write csv:{tmp_path / 't.csv'}", "x.npz": "MedMNIST's are read by name"}.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            load_dataset(str(tmp_path / name))


def test_questions_are_loaded_elsewhere():
    with pytest.raises(ValueError, match=r"'mm-safetybench/01' holds questions.*load_questions\('mm-safetybench/01'\)"):
        load_dataset("mm-safetybench/01")


def test_unknown_split_gives_the_closest():
    with pytest.raises(ValueError, match=r"phantom/blood has no split 'tests'. Did you mean 'test'"):
        load_dataset("phantom/blood", split="tests")


@pytest.mark.parametrize(
    "id, folder, command",
    [
        ("medmnist/blood", "medmnist/bloodmnist[_64|_128|_224].npz", "download_medmnist.py blood"),
        ("medimeta/mammo", "medimeta/mammo_calc", "download_medimeta.py mammo"),
        ("pathology/sicapv2", "pathology/sicapv2", "prepare_pathology.py sicapv2"),
        ("chest/rsna", "chest/rsna", "prepare_chest_xray.py rsna"),
    ],
)
def test_missing_data_names_the_folder_and_the_command(tmp_path, id, folder, command):
    message = (
        f"{id} is not on this computer: looked at {tmp_path / folder}. Get it with\n"
        f"    python data_scripts/{command} --root {tmp_path}"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_dataset(id, root=tmp_path)


def test_n_beyond_the_split_is_refused():
    with pytest.raises(ValueError, match="n=721 is no whole number from 1 to 720: it counts images of this split"):
        load_dataset("phantom/chest", n=721)


def test_one_class_only_is_refused(tmp_path):
    save(tmp_path / "cells" / "1.png")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}: one class only \('cells'\)"):
        load_dataset(f"folder:{tmp_path}")


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images in"):
        load_dataset(f"folder:{tmp_path}")


def test_label_outside_the_list_is_refused(tmp_path):
    write_medmnist(tmp_path, "pneumoniamnist", classes=3)
    with pytest.raises(ValueError, match=r"pneumoniamnist.npz \(test_labels\): label 2 .* 0 'normal', 1 'pneumonia'"):
        load_dataset("medmnist/pneumonia", root=tmp_path)


@pytest.mark.parametrize("size", [0, -4, 7, 2.5, True, "64"])
def test_wrong_image_size_is_refused(size):
    with pytest.raises(
        ValueError, match=re.escape(f"image_size={size!r} is no whole number of 8 or more: give the side in pixels")
    ):
        load_dataset("phantom/chest", image_size=size)


def test_words_for_own_images_come_from_a_registered_set_only(tmp_path):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "1.png")
    with pytest.raises(ValueError, match="wording='clear' needs like="):
        load_dataset(f"folder:{tmp_path}", wording="clear")
    with pytest.raises(ValueError, match="like='medmnist/breast' is for folder: and csv: data"):
        load_dataset("phantom/breast", like="medmnist/breast")
