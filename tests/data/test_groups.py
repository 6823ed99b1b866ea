"""Which images are of one patient: by a table, folders, DICOM or a function; and words in one parameter."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.registry import load_dataset

spec = importlib.util.spec_from_file_location("dicom_files", Path(__file__).with_name("dicom_files.py"))
dicom_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dicom_files)


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def folder_of_patients(root):
    """Two classes of two patients with two images each."""
    for number, (name, patient, view) in enumerate(
        (name, patient, view) for name in ("sick", "well") for patient in ("p1", "p2") for view in ("front", "side")
    ):
        save(root / name / f"{name}-{patient}" / f"{view}.png", number)
    return f"folder:{root}"


def table_of(root, *, column="patient", rows=("a", "a", "b", "c")):
    lines = [f"path,label,{column}"]
    for number, patient in enumerate(rows):
        save(root / f"{number}.png", number)
        lines.append(f"{number}.png,{'sick' if number % 2 else 'well'},{patient}")
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    return f"csv:{root / 'list.csv'}"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_and_groups_follow_the_images_into_subsets(tmp_path):
    data = load_dataset(folder_of_patients(tmp_path / "set"))
    assert data.files[0] == "sick/sick-p1/front.png" and data.files[-1] == "well/well-p2/side.png"
    assert data.groups[:4] == ("sick-p1", "sick-p1", "sick-p2", "sick-p2") and data.provenance["patients"] == 4
    assert str(tmp_path) not in "".join(data.files)
    assert sum("intervals are over patients" in said for said in data.caveats) == 1
    part = data.subset([5, 0])
    assert part.files == (data.files[5], data.files[0]) and part.groups == (data.groups[5], data.groups[0])
    assert load_dataset(f"folder:{tmp_path / 'set'}?group=none").groups == ()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("patients", "told"), [(19, True), (20, False)])
def test_of_a_few_patients_a_bootstrap_says_that_it_covers_too_little(tmp_path, patients, told):
    rows = [*range(patients), *range(patients)]
    said = " ".join(load_dataset(table_of(tmp_path, rows=rows)).caveats)
    assert "intervals are over patients" in said
    assert (f"Of {patients} patients the bootstrap intervals of mCE" in said) == told


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_images_that_are_no_files_are_named_by_their_place(tmp_path):
    phantoms = load_dataset("phantom/breast", n=4)
    assert phantoms.files == tuple(f"image {index}" for index in phantoms.indices) and phantoms.groups == ()
    facts = {"id": "mine", "split": "test", "images": np.zeros((2, 8, 8, 3), np.uint8), "classes": ("a", "b")}
    facts |= {"labels": np.array([0, 1]), "templates": ("{}",), "modality": "", "licence": "", "provenance": {}}
    mine = ImageDataset(**facts, indices=np.array([3, 9]))
    assert mine.files == ("image 3", "image 9")
    with pytest.raises(ValueError, match="mine: 1 groups for 2 images"):
        ImageDataset(**facts, indices=np.array([3, 9]), groups=("x",))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_table_names_patients_in_its_column_or_in_the_one_asked_for(tmp_path):
    assert load_dataset(table_of(tmp_path / "one", column=" Patient")).groups == ("a", "a", "b", "c")
    other = table_of(tmp_path / "two", column="case_id")
    assert load_dataset(other).groups == () and load_dataset(f"{other}?group=case_id").groups == ("a", "a", "b", "c")
    with pytest.raises(ValueError, match=r"group.*'case'.*case_id"):
        load_dataset(other, group="case")
    with pytest.raises(ValueError, match=r"list.csv, line 3: no patient; give each image one, or ask for group='none'"):
        load_dataset(table_of(tmp_path / "three", rows=("a", "", "b", "c")))
    assert load_dataset(f"csv:{tmp_path / 'three' / 'list.csv'}", group="none").groups == ()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_function_of_the_file_may_say_whose_it_is(tmp_path):
    data = load_dataset(table_of(tmp_path), group=lambda file: file[0] in "01")
    assert data.groups == ("True", "True", "False", "False")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_elsewhere_have_as_much_of_their_path_as_tells_them_apart(tmp_path):
    lines = ["path,label"]
    for number in range(4):
        save(tmp_path / "far" / f"{number}" / "img.png", number)
        lines.append(f"{tmp_path / 'far' / str(number) / 'img.png'},{'ab'[number // 2]}")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "list.csv").write_text("\n".join(lines))
    assert load_dataset(f"csv:{tmp_path / 'table' / 'list.csv'}").files == tuple(f"{n}/img.png" for n in range(4))


def test_grouping_by_folders_needs_folders_and_registered_sets_take_none(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match=r"group='folder': no image of .* lies in a folder below its class folder"):
        load_dataset(f"folder:{tmp_path}", group="folder")
    with pytest.raises(ValueError, match=r"group.*'patient'.*auto, none, folder, dicom"):
        load_dataset(f"folder:{tmp_path}", group="patient")
    with pytest.raises(ValueError, match="group='folder' is for folder: and csv: data"):
        load_dataset("phantom/blood", n=2, group="folder")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dicom_states_its_patient_who_is_shown_as_a_pseudonym(tmp_path):
    for number, patient in enumerate(("Müller^7", "Müller^7", "", "x")):
        path = tmp_path / "ab"[number % 2] / f"{number}.dcm"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
        dicom_files.write_dicom(path, pixels, PatientID=patient, SpecificCharacterSet="ISO_IR 192")
    data = load_dataset(f"folder:{tmp_path}")
    assert "1 of 4 images state no patient: each counts as a patient of its own." in data.caveats
    known = dict(zip(data.files, data.groups, strict=True))
    assert known["a/0.dcm"] == known["b/1.dcm"] != known["b/3.dcm"] and known["a/2.dcm"] == "a/2.dcm"
    assert known["b/3.dcm"] == hashlib.sha256(b"x").hexdigest()[:12] and "ller" not in str(data.groups)


def test_one_patient_for_all_images_is_told(tmp_path):
    with pytest.warns(UserWarning, match="All 4 images drawn are stated to be of one patient"):
        data = load_dataset(table_of(tmp_path, rows="aaaa"))
    assert sum("one patient" in said for said in data.caveats) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_words_are_a_mapping_a_file_its_text_or_the_id_of_a_set(tmp_path):
    where = folder_of_patients(tmp_path / "set")
    words = {"class_names": {"sick": "pneumonia", "well": "no finding"}, "templates": ["a film of {}."]}
    text = "{class_names: {sick: pneumonia, well: no finding}, templates: [a film of {}.]}"
    (tmp_path / "words.yaml").write_text(
        "class_names:\n  sick: pneumonia\n  well: no finding\ntemplates:\n- a film of {}.\n"
    )
    for given in (words, str(tmp_path / "words.yaml"), text.replace("[a film of {}.]", "['a film of {}.']")):
        data = load_dataset(where, words=given)
        assert data.classes == ("pneumonia", "no finding") and data.templates == ("a film of {}.",)
    breast = load_dataset("phantom/breast", n=2)
    (tmp_path / "set" / "sick").rename(tmp_path / "set" / "malignant")
    (tmp_path / "set" / "well").rename(tmp_path / "set" / "benign")
    assert load_dataset(where, words="phantom/breast").templates == breast.templates
    assert load_dataset(where, words="").classes == ("benign", "malignant")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("no-such.yaml", "words='no-such.yaml' is neither a YAML file nor YAML in braces"),
        ("phantom/brest", "Did you mean 'phantom/breast'"),
        ({"nouns": {}}, "a key of words.*'nouns'.*class_names, templates, like"),
        ({"like": "phantom/breast"}, "like is given twice"),
    ],
)
def test_what_cannot_be_words_is_refused(tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        load_dataset(folder_of_patients(tmp_path), words=words, like="phantom/breast")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_classnames_txt_may_hold_prompts(tmp_path):
    where = folder_of_patients(tmp_path)
    (tmp_path / "classnames.txt").write_text(
        "sick\tpneumonia\nwell\tno finding\n\nA chest film of {}.\nA {} in a child.\n"
    )
    data = load_dataset(where)
    assert data.classes == ("pneumonia", "no finding")
    assert data.templates == ("A chest film of {}.", "A {} in a child.")
    assert load_dataset(where, templates=["{}!"]).templates == ("{}!",)
    (tmp_path / "classnames.txt").write_text("A chest film of {}.\n")
    assert load_dataset(where).classes == ("sick", "well")


def test_a_table_of_answers_names_file_class_and_patient():
    data = load_dataset("phantom/breast", n=3)
    table = data.image_table([0, -1, 1], confidence=[0.5, 0.25, 1.0])
    assert list(table.columns) == [
        "dataset", "image", "file", "label", "class_name", "predicted", "predicted_name", "confidence", "correct",
    ]  # fmt: skip
    assert table["predicted_name"].tolist() == [data.classes[0], "abstain", data.classes[1]]
    assert table["class_name"].tolist() == [data.classes[label] for label in data.labels] and not table["correct"][1]
    assert "confidence" not in data.image_table([0, 0, 0])
    with pytest.raises(ValueError, match=r"answers of shape \(2,\) for 3 images"):
        data.image_table([0, 0])
    with pytest.raises(ValueError, match="answer 7 is neither -1 nor a class of 0 to 1"):
        data.image_table([0, 7, 0])
