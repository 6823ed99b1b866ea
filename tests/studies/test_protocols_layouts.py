"""Every protocol runs on the layouts of the public weights and data, with random weights and drawn images."""

import functools
import json

import pandas as pd
import public_layouts
import pytest
import yaml
from typer.testing import CliRunner

from medrobust_lib import cli
from medrobust_lib import parameters as notebook_parameters
from medrobust_lib.studies import protocols
from medrobust_lib.studies.adapt_step import AdaptCell
from medrobust_lib.studies.certify_step import CertifyCell
from medrobust_lib.studies.execute import run_study
from medrobust_lib.studies.protocols import list_protocols, protocols_folder, read_protocol
from medrobust_lib.studies.reproduction import ALL, KEYS, LAYOUTS, write_reproduction

pytestmark = pytest.mark.filterwarnings("ignore")  # so few images do not speak for their set
FOLDER = protocols_folder()
PROTOCOLS = {protocol.name: protocol for protocol in list_protocols(folder=FOLDER)}
# 40 draws reach the radius 0.75 at sigma 1; the fewest shots and epochs.
SMALL = {
    "n_images": 2, "n": 40, "n0": 5, "sigmas": [1.0], "shots": 1, "epochs": 1, "severities": [3], "rank": 2,
    "batch_size": 64, "n_val": 1, "max_new_tokens": 1,
}  # fmt: skip
DRAWS = "oracle-smoothing-draws"
TABLE_6, TABLES_2_3 = "robustmedclip-table6", "robustmedclip-tables-2-3"
NUMBERS = ("ours", "low", "high", "n", "reported", "difference", "difference_low", "difference_high")


def shrunken(given, small):
    """What was read, with other settings wherever they stand."""
    if isinstance(given, dict):
        return {key: small.get(key, shrunken(value, small)) for key, value in given.items()}
    return [shrunken(value, small) for value in given] if isinstance(given, list) else given


def write_shrunken(folder, name, **more):
    """A protocol with small settings in a folder of its own."""
    given = notebook_parameters.read_yaml(FOLDER / f"{name}.yaml")
    small = SMALL | ({"n": [10, 20], "n_images": 1} if name == DRAWS else {}) | more
    study = shrunken({key: value for key, value in given.items() if key != "reproduces"}, small)
    study |= {"reproduces": given["reproduces"], "n_images": small["n_images"]}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(study))
    return folder


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Someone with the weights and the data of all protocols in folders of their own."""
    root = tmp_path_factory.mktemp("user")
    for name in ("weights", "data", "scratch"):
        (root / name).mkdir()
    with public_layouts.fraction_of_their_size(root / "scratch") as patched:
        public_layouts.write_all_weights(root / "weights")
        public_layouts.write_all_data(root / "data")
        patched.setenv("MEDROBUST_WEIGHTS", str(root / "weights"))
        patched.setenv("MEDROBUST_DATA", str(root / "data"))
        yield root


@pytest.fixture(scope="module")
def ran(user):
    """Function that runs a protocol once: what was read, what is finished, and the comparison as it was written."""

    @functools.cache
    def run(name):
        protocol = read_protocol(name, folder=write_shrunken(user / "protocols", name))
        protocol.check()
        finished = run_study(protocol.study, user / name, cells=protocol.cells(), announce=lambda line: None)
        write_reproduction(protocol, finished.folder, finished.failures)
        return protocol, finished, read_comparison(finished.folder)

    return run


def read_comparison(folder):
    """``comparison.csv`` with its words as words."""
    table = pd.read_csv(folder / "comparison.csv", dtype=str, keep_default_na=False)
    return table.assign(**{name: pd.to_numeric(table[name]) for name in NUMBERS})


@pytest.mark.parametrize("name", PROTOCOLS)
def test_no_cell_of_a_protocol_fails(ran, name):
    _, finished, _ = ran(name)
    assert finished.failures == {}
    assert finished.done == finished.cells and finished.cells * levels(name) == len(PROTOCOLS[name].cells())
    for page in ("table.csv", "reproduction.html", "index.html"):
        assert (finished.folder / page).is_file()


def levels(name):
    """How many noise levels of the protocol became one."""
    return {len(getattr(step, "sigmas", ())) or 1 for step in PROTOCOLS[name].study.steps}.pop()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_model_data_set_and_method_is_compared_under_the_papers_names(ran, name):
    protocol, _, table = ran(name)
    called = {id: protocol.published.names.get(id, id) for cell in protocol.cells() for id in words_of(cell)}
    expected = {
        (ALL if protocol.published.layout == "times" else called[cell.dataset], called[cell.model], called[method])
        for cell in protocol.cells()
        if not isinstance(cell, AdaptCell)
        for method in methods_of(cell)
    }
    if protocol.published.layout == "numbers of draws":
        expected |= {(ALL, model, method) for _, model, method in expected}
    assert set(table[["dataset", "model", "method"]].itertuples(index=False, name=None)) == expected
    assert table["ours"].notna().any() and (table.loc[table["n"].notna(), "n"] >= 0).all()


def methods_of(cell):
    return [method.name for method in cell.step.methods] if isinstance(cell, CertifyCell) else [""]


def words_of(cell):
    return (cell.model, cell.dataset, *methods_of(cell))


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != DRAWS])
def test_every_published_number_stands_beside_ours_with_a_verdict(ran, name):
    protocol, _, table = ran(name)
    published = LAYOUTS[protocol.published.layout].reported()
    names = {*protocol.published.names.values(), ALL}
    published = published[published["dataset"].isin(names)]  # one list has the rows of two tables
    assert len(published) or protocol.published.layout.endswith("not published")
    found = published.drop(columns="remark").merge(table, on=KEYS, how="left", suffixes=("", " of ours"))
    assert found["reported of ours"].tolist() == pytest.approx(found["reported"].tolist())
    assert not found["verdict"].isin(["", "not published"]).any()
    others = table.merge(published[KEYS], on=KEYS, how="left", indicator=True).query("_merge == 'left_only'")
    assert others["reported"].isna().all() and set(others["verdict"]) <= {"not published"}


def remarks(table):
    """What speaks against published numbers, by where it stands."""
    return table[table["remark"] != ""].set_index(["dataset", "model", "method", "column"])["remark"]


@pytest.mark.parametrize(
    ("name", "impossible"),
    [
        (
            "promptsmooth-table2",
            {
                ("KatherColon", "PLIP", "zero-shot (no prompt learning)", "0.5"): "28.9 %",
                ("KatherColon", "PLIP", "zero-shot (no prompt learning)", "0.75"): "28.9 %",
                ("KatherColon", "PLIP", "naive prompt learning (CoOp)", "0.1"): "66.7 %",
            },
        ),
        ("promptsmooth-table3", {("RSNA Pneumonia", "MedCLIP", "denoised smoothing", "0.75"): "1.79 %"}),
    ],
)
def test_shares_that_no_number_of_500_images_gives_carry_a_remark(ran, name, impossible):
    found = remarks(ran(name)[2])
    assert found.to_dict() == {place: f"no number of 500 images gives {share}" for place, share in impossible.items()}


def test_a_number_that_does_not_follow_from_its_row_carries_a_remark(ran):
    _, _, table = ran(TABLE_6)
    found = remarks(table)
    place = ("PBC", "RobustMedCLIP-ResNet, 3%", "", "clean")
    assert found[place] == "does not follow from the accuracy beside it, which gives 106.1"
    assert table.set_index(KEYS).loc[(*place, "percent of the reference's error"), "reported"] == 103.1


def test_rows_of_a_constant_answer_carry_a_remark_and_means_of_a_part_none(ran):
    """Two images do not tell what is impossible of the whole split."""
    _, _, table = ran(TABLES_2_3)
    constant = table.query("dataset == 'Mammo' and model == 'UniMedCLIP'")
    assert set(constant["remark"]) == {"the row is that of the constant answer 'malignant'"}
    assert all(remark.startswith("the row is that of the constant answer") for remark in remarks(table))


def test_the_denoised_and_diffusion_rows_are_of_the_denoisers_beside_the_weights(ran, user):
    for name, dataset in (("promptsmooth-table2", "pathology/kather"), ("promptsmooth-table3", "chest/rsna")):
        protocol, finished, _ = ran(name)
        cell = next(cell for cell in protocol.cells() if cell.number == 1 and cell.dataset == dataset)
        (path,) = cell.folder(finished.folder).glob("cards/*_certificates.csv")
        rows = pd.read_csv(path)
        assert rows["method"].drop_duplicates().tolist() == ["denoised", "diffusion"]
        assert set(rows["guarantee"]) == {"standard"} and (rows["n"] == SMALL["n"]).all()


def test_only_the_resnets_are_adapted_in_the_middle_of_their_kernels(ran):
    protocol, finished, _ = ran(TABLE_6)
    cells = [cell for cell in protocol.cells() if isinstance(cell, AdaptCell)]
    assert len(cells) == 8
    for cell in cells:
        path = cell.folder(finished.folder) / "adapter" / "provenance.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["kernel"] == ("middle" if "ResNet" in cell.step.name else "whole")
        assert {part["split"] for part in record["train"].values()} == {"val"}
        assert len(record["train"]) == 12


def test_missing_weights_and_data_are_named_with_size_and_command_before_anything_runs(user, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "protocols_folder", lambda: user / "protocols")
    for name in PROTOCOLS:
        write_shrunken(user / "protocols", name)
    for variable in ("MEDROBUST_WEIGHTS", "MEDROBUST_DATA"):
        monkeypatch.setenv(variable, str(tmp_path / "empty"))
    for name in PROTOCOLS:
        missing = read_protocol(name).missing()
        study = PROTOCOLS[name].study
        # All kinds of questions come with one command.
        assert len(missing) == len(study.models) + (1 if name == DRAWS else len(study.datasets))
        for line in missing:
            assert ": python data_scripts/" in line and "\n" not in line
            assert any(word in line for word in (" GB: ", " MB: ", " images of ", " questions with an image each: "))
        refused = CliRunner().invoke(cli.app, ["reproduce", name, "--out", str(tmp_path / "out")])
        assert isinstance(refused.exception, FileNotFoundError)
        assert all(line in str(refused.exception) for line in missing)
    assert not (tmp_path / "out").exists()


def test_without_denoisers_the_steps_that_need_them_are_refused_and_the_others_run(user, tmp_path, monkeypatch):
    for folder in (user / "weights").iterdir():
        if folder.name != "denoisers":
            (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(tmp_path))
    for name in ("promptsmooth-table2", "promptsmooth-table3", "promptsmooth-table5"):
        folder = write_shrunken(user / "protocols", name)
        with pytest.raises(FileNotFoundError, match="python data_scripts/train_denoisers.py mse (pathology|chest)/"):
            read_protocol(name, folder=folder).check()
        advice = PROTOCOLS[name].published.needs.rpartition("--only ")[2]
        read_protocol(name, folder=folder, only=advice.split()).check()


def reproduce(user, monkeypatch, name, *words, **more):
    """The command on a part of a protocol; returns what it printed and the comparison."""
    write_shrunken(user / "parts", name, **more)
    monkeypatch.setattr(protocols, "protocols_folder", lambda: user / "parts")
    out = user / f"part of {name}"
    done = CliRunner().invoke(cli.app, ["reproduce", name, *words, "--out", str(out)])
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    return " ".join(done.output.split()), read_comparison(out)


def test_a_part_of_the_certificates_is_run_and_said(user, monkeypatch):
    asked = ("--only", "model=quilt-b32", "dataset=pathology/sicapv2")
    printed, table = reproduce(user, monkeypatch, "promptsmooth-table2", *asked)
    assert "only a part was asked for: model quilt-b32, dataset pathology/sicapv2" in printed
    assert "1 of 1 cells are done" in printed and "Quilt on SICAPv2" in printed
    assert set(table["model"]) == {"Quilt"} and set(table["dataset"]) == {"SICAPv2"} and len(set(table["method"])) == 5


def test_a_part_of_a_benchmark_has_its_reference_and_that_of_an_adapted_model_its_training(user, monkeypatch):
    asked = ("model=unimedclip", "dataset=medmnist/retina")
    printed, table = reproduce(user, monkeypatch, TABLES_2_3, *asked)
    assert "only a part was asked for: model unimedclip, dataset medmnist/retina" in printed
    assert "2 of 2 cells are done" in printed
    assert set(table["model"]) == {"CLIP", "UniMedCLIP"} and set(table["dataset"]) == {"RetinaMNIST"}
    part = read_protocol(TABLE_6, only=["model=RobustMedCLIP-ResNet, 3%", "dataset=medimeta/pbc"], folder=FOLDER)
    assert [(cell.what, cell.model) for cell in part.cells()] == [
        ("adapt", "medclip-rn50"), ("benchmark", "clip-vit-b16"), ("benchmark", "RobustMedCLIP-ResNet, 3%")
    ]  # fmt: skip


def test_a_part_of_the_questions_is_not_held_against_what_the_paper_says_of_all(user, monkeypatch):
    words = ("dataset=mm-safetybench/02-TYPO",)
    printed, table = reproduce(user, monkeypatch, DRAWS, *words, n=[100, 1000], n_images=1)
    assert "only a part was asked for: dataset mm-safetybench/02-TYPO" in printed and "1 of 1 cells" in printed
    assert set(table["dataset"]) == {"mm-safetybench/02-TYPO", "1 of 39 sets"}
    assert table["ours"].notna().all() and set(table["verdict"]) == {"not published"}
