import json
import re
import shutil
import sys
import warnings
from importlib import metadata

import nbformat
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrobust_lib import cli, doctor, runner
from medrobust_lib.data import inspection
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.experiments import Metric, start_run
from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE
from medrobust_lib.models.loading import load_model
from medrobust_lib.places import VERSION

NOTEBOOK = """
from medrobust_lib.experiments import Metric, start_run
share = 1 / (n_images != 13)
run = start_run("01", "Tiny", model=model, n_images=n_images)
card = run.save_card(metrics=[Metric("accuracy", share / n_images, n_images)], tables={}, model={"id": model},
                     dataset={"id": "phantom/blood", "n": n_images, "synthetic": True}, prompts={})
"""


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    cells = [
        nbformat.v4.new_code_cell(
            'model: str = "demo-clip"  # model id\nn_images: int = 4  # 13 divides by zero\n',
            metadata={"tags": ["parameters"]},
        ),
        nbformat.v4.new_code_cell(NOTEBOOK),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "01_tiny.ipynb")
    return folder


@pytest.fixture
def save_run(tmp_path, monkeypatch):
    """Write a run with one card on phantom/blood; returns the folder of all runs."""

    def save(name: str, *metrics: Metric, model: str = "demo-clip", **parameters: object):
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "runs" / name))
        start_run("01", "Title", model=model, **parameters).save_card(
            metrics=metrics, tables={}, model={"id": model}, dataset={"id": "phantom/blood"}, prompts={}
        )
        monkeypatch.delenv(RUN_DIR_VARIABLE)
        return tmp_path / "runs"

    return save


@pytest.fixture
def runs(save_run):
    save_run("a", Metric("accuracy", 0.5, 8), Metric("majority_share", 0.3, 8), model="model-a")
    return save_run("b", Metric("accuracy", 0.75, 8), Metric("majority_share", 0.3, 8), model="model-b")


def test_a_loader_that_cannot_be_called_is_refused_in_one_line(invoke, notebooks, tmp_path):
    out = tmp_path / "out"
    code, _, error = invoke("run", "1", "-p", "model=python:os:getcwd", "--notebooks", notebooks, "--out", out)
    assert code == 1 and not out.exists()
    assert error.startswith("error: the loader of 'python:os:getcwd' must take the call getcwd(entry, ")
    assert error.count("\n") == 1


@pytest.fixture
def dim(tmp_path):
    """A study of two cells on images of one's own that are nearly black, wider than high and of two classes."""
    draw = np.random.default_rng(0)
    for name in ("healthy", "ill"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for place in range(3):
            pixels = draw.integers(0, 30 + place, (48, 64), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mine" / name / f"{place}.png")
    steps = "[certify: {sigmas: [0.1, 0.2], n0: 5, n: 20, alpha: 0.05, radii: 0.02}]"
    path = tmp_path / "dim.yaml"
    path.write_text(f"models: [demo-clip]\ndatasets: ['folder:{tmp_path}/mine']\nn_images: 4\nsteps: {steps}\n")
    return path


def test_a_study_tells_what_to_know_of_a_set_once_and_of_the_images_measured(invoke, dim, tmp_path):
    code, _, error = invoke("study", dim, "--dry-run")
    assert (code, error) == (0, "")  # of the one or two images of a check there is nothing to tell
    code, _, error = invoke("study", dim, "--out", tmp_path / "out")
    assert code == 0
    first, *caveats = error.splitlines()
    assert first == "note: folder:mine, before anything is measured:"
    assert [caveat[:11] for caveat in caveats] == ["- 4 of 4 im", "- A centre "]


def test_warnings_of_other_libraries_stay_as_they_are_and_the_way_back_is_kept(invoke, monkeypatch):
    shown = warnings.showwarning

    def models():
        warnings.warn("theirs", UserWarning, stacklevel=1)
        inspection.tell("a set", ["a caveat"])
        inspection.tell("a set", ["a caveat"])

    monkeypatch.setattr(cli, "app", lambda: models() or sys.exit(0))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        seen = []
        warnings.showwarning = lambda message, *_, **__: seen.append(str(message))
        code, _, error = invoke("models")
        assert (code, error) == (0, "note: a set, before anything is measured:\n- a caveat\n")
        assert seen == ["theirs"]
    assert warnings.showwarning is shown


@pytest.fixture(scope="module")
def executed(notebooks, tmp_path_factory):
    """What a run without --out printed, and the folder that it made; parameters come from a file and a word."""
    folder = tmp_path_factory.mktemp("executed")
    (folder / "p.yaml").write_text("n_images: 8\nmodel: no-such-model\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "default_runs_dir", lambda: folder / "runs")
        words = ["run", "1", "-f", folder / "p.yaml", "-p", "model=demo-clip", "--notebooks", notebooks]
        result = CliRunner().invoke(cli.app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    (made,) = (folder / "runs").iterdir()
    return result.stdout, made


def test_the_version_is_printed(invoke):
    assert invoke("--version") == (0, f"medrobust {VERSION}\n", "")


def test_run_ends_with_the_first_numbers_and_says_how_to_stop(executed):
    text, _ = executed
    assert "Ctrl-C stops; finished notebooks are kept" in text
    assert re.search(r"^ *01 +accuracy +\.125", text, re.MULTILINE)


def test_device_and_precision_reach_the_models_and_go_with_the_command(invoke, monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "examine_model", lambda id: seen.append(load_model(id)) or [])
    assert invoke("doctor", "--model", "demo-clip", "--device", "cpu", "--dtype", "bfloat16")[0] == 0
    (model,) = seen
    assert (model.device.type, model.precision) == ("cpu", "bfloat16")
    assert load_model("demo-clip", device="cpu").precision == "float32"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MEDROBUST_DEVICE", "cuba", "MEDROBUST_DEVICE: device 'cuba'"),
        ("MEDROBUST_DTYPE", "half", "MEDROBUST_DTYPE: 'half'"),
    ],
)
def test_a_variable_that_cannot_work_is_named(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        load_model("demo-clip")
    assert load_model("demo-clip", device="cpu", dtype="float32").precision == "float32"


def test_run_executes_and_writes_a_report(executed):
    text, folder = executed
    assert "01_tiny done in" in text
    assert "1 notebook in " in text
    assert f"report: {folder / 'index.html'}" in text
    assert "to know" not in text
    assert ">.125" in (folder / "index.html").read_text()


def test_each_run_gets_a_folder_of_its_own_and_prints_it(executed):
    text, folder = executed
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    assert f"run folder: {folder}" in text


def test_parameters_come_from_a_file_and_from_the_command_which_counts(executed):
    card = json.loads((executed[1] / "cards" / "01.json").read_text())
    assert card["parameters"] == {"model": "demo-clip", "n_images": 8}


def test_run_says_how_many_things_to_know_stand_in_the_report(invoke, notebooks, executed, tmp_path):
    out = shutil.copytree(executed[1], tmp_path / "out")
    card = json.loads((out / "cards" / "01.json").read_text()) | {"notebook": "02", "notes": ["this", "that"]}
    (out / "cards" / "02.json").write_text(json.dumps(card))
    (out / "cards" / "03.json").write_text(json.dumps(card | {"notebook": "03", "notes": ["this"]}))
    code, text, _ = invoke("run", "1", "--notebooks", notebooks, "--out", out)
    assert code == 0 and text.endswith("\nto know beside the numbers, in the report: 2 notes\n")


def test_a_typo_fails_with_code_one_before_anything_is_written(invoke, notebooks, tmp_path):
    for assignment, message in (
        ("n_image=8", "unknown parameter 'n_image' for notebook 01; valid: n_images, model"),
        ("n_images=0", "parameter n_images=0: give 1 or more"),
        ("model=demo-clop", "unknown model 'demo-clop': did you mean 'demo-clip'"),
    ):
        code, _, error = invoke("run", "01", "-p", assignment, "--notebooks", notebooks, "--out", tmp_path / "out")
        assert code == 1
        assert message in error.replace("\n", " ")
        assert not (tmp_path / "out").exists()


def test_a_failing_notebook_fails_the_command_and_never_shows_older_results(invoke, notebooks, executed, tmp_path):
    out = shutil.copytree(executed[1], tmp_path / "out")
    code, text, error = invoke("run", "-p", "n_images=13", "--notebooks", notebooks, "--out", out)
    assert code == 1
    assert "failed in cell 3 with ZeroDivisionError" in error
    assert f"report of what was executed: {out / 'index.html'}" in text
    assert not (out / "cards" / "01.json").exists()
    page = (out / "index.html").read_text()
    assert ".125" not in page
    assert "did not reach its end" in page
    assert "ZeroDivisionError" in (out / "html" / "01_tiny.html").read_text()


def test_describe_prints_typed_parameters(invoke, notebooks):
    code, text, _ = invoke("run", "--describe", "--notebooks", notebooks)
    assert code == 0
    assert "n_images: int = 4  # 13 divides by zero" in text


def test_models_and_datasets_as_table_and_json(invoke):
    code, text, _ = invoke("models", "--json")
    models = json.loads(text)
    assert code == 0
    assert next(row for row in models if row["id"] == "demo-clip")["available_offline"] is True
    assert {"biomedclip", "medclip-vit", "plip", "quilt-b32", "robustmedclip"} <= {row["id"] for row in models}
    datasets = json.loads(invoke("datasets", "--json")[1])
    assert next(row for row in datasets if row["id"] == "phantom/oct")["available"] is True
    assert "demo-clip" in invoke("models")[1]
    shown = invoke("datasets")[1]
    assert "phantom/oct" in shown
    assert re.search(r"mm-safetybench/13 +13-Gov_Decision +149 +no", shown)
    assert {"demo-vlm", "llava-1.6-mistral-7b"} <= {row["id"] for row in models}


def test_leaderboard_sorts_by_a_metric_and_writes_csv(invoke, runs, tmp_path):
    csv = tmp_path / "board.csv"
    code, text, _ = invoke("leaderboard", runs, "--metric", "accuracy", "--csv", csv, "--json")
    assert code == 0
    assert [row["model"] for row in json.loads(text)] == ["model-b", "model-a"]
    assert csv.read_text().splitlines()[1].startswith("b,01,model-b,phantom/blood,accuracy,,0.75")


def test_leaderboard_writes_markdown_and_latex_of_the_same_rows(invoke, runs, tmp_path):
    markdown, latex = tmp_path / "board.md", tmp_path / "board.tex"
    words = ["--metric", "accuracy", "--markdown", markdown, "--latex", latex]
    assert invoke("leaderboard", runs, *words)[0] == 0
    for text in (markdown.read_text(), latex.read_text()):
        assert text.index("model-b") < text.index("model-a")
        assert "majority" not in text and "Not for clinical use" in text


def test_a_run_is_submitted_once_and_shown(invoke, runs, tmp_path):
    board = tmp_path / "board"
    code, text, _ = invoke("submit", runs / "a" / "cards" / "01.json", "--to", board)
    assert code == 0
    assert "ok   reference " in text and re.search(r"ok   card +Title: parameters as here; weights not checked;", text)
    code, _, error = invoke("submit", runs, "--to", board)  # all of them or none
    assert code == 1 and "stands in" in error and "nothing was added" in error
    assert len(json.loads(invoke("leaderboard", board, "--metric", "accuracy", "--json")[1])) == 1
    assert invoke("submit", runs / "b", "--to", board)[0] == 0
    shown = invoke("leaderboard", board, "--metric", "accuracy")[1]
    assert shown.index("model-b") < shown.index("model-a")


def test_submit_says_that_notes_with_names_of_files_stay_behind(invoke, runs, tmp_path):
    path = runs / "a" / "cards" / "01.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"dataset": {"id": "folder:mine"}, "notes": ["Dark: a/SMITH/0.png"]}))
    text = invoke("submit", path, "--to", tmp_path / "board")[1]
    assert re.search(r"added: .*01\.json \(Notes that may name files of the images were left out\.\)", text)


@pytest.fixture
def honest(save_run):
    """A card of demo-clip with the fingerprints of its weights and images, and a function that changes it."""
    runs = save_run("a", Metric("accuracy", 0.5, 8), n_images=8)
    path = runs / "a" / "cards" / "01.json"
    model, data = load_model("demo-clip", device="cpu", dtype="float32"), load_dataset("phantom/blood", n=8)
    card = json.loads(path.read_text()) | {"model": model.identity(), "dataset": data.identity()}

    def change(*place: str, value: object = None):
        part = card
        for name in place[:-1]:
            part = part[name]
        if place:
            part[place[-1]] = value
        path.write_text(json.dumps(card))
        return path

    return change


def test_a_card_whose_weights_and_images_are_those_here_is_added(invoke, honest, tmp_path):
    code, text, _ = invoke("submit", honest(), "--to", tmp_path / "board")
    assert code == 0 and "Title: parameters, weights, images as here\n" in text


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("parameters", "n_images"), 9, r"parameters have the hash \w+, it says \w+: somebody changed the card"),
        (("model", "weights"), "0" * 16, "its weights are 0{16}, here they are "),
        (("dataset", "fingerprint"), "0" * 16, "its images are 0{16}, here they are "),
        (("environment", "medrobust-lib"), "0.0.9", r"medrobust-lib 0\.0\.9 \(here: .*--allow-versions"),
        (("format",), 99, "card format 99"),
    ],
)
def test_a_card_that_does_not_hold_is_refused_with_the_reason(invoke, honest, tmp_path, place, value, reason):
    code, text, error = invoke("submit", honest(*place, value=value), "--to", tmp_path / "board")
    assert code == 1 and re.search(reason, text + error)
    assert not (tmp_path / "board").exists()


def test_another_version_is_told_where_it_is_allowed(invoke, honest, tmp_path):
    path = honest("environment", "medrobust-lib", value="0.0.9")
    code, text, _ = invoke("submit", path, "--to", tmp_path / "board", "--allow-versions")
    assert code == 0 and "medrobust-lib 0.0.9 (here: " in text


def test_nothing_is_added_where_the_reference_prediction_does_not_come_out(invoke, honest, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "REFERENCE_TOLERANCE", -1.0)
    code, text, _ = invoke("submit", honest(), "--to", tmp_path / "board")
    assert code == 1 and "FAIL reference" in text and not (tmp_path / "board").exists()


def test_leaderboard_names_unknown_metrics_and_empty_folders(invoke, runs, tmp_path):
    code, _, error = invoke("leaderboard", runs, "--metric", "auc")
    assert code == 1
    assert "unknown metric 'auc'; the cards hold accuracy, majority_share." in error
    assert "Did you mean 'accuracy'?" in invoke("leaderboard", runs, "--metric", "acuracy")[2]
    assert invoke("leaderboard", tmp_path / "nothing")[0] == 1


def test_leaderboard_fits_eighty_columns_in_blocks_by_metric_and_data_set(invoke, save_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = "2026-11-23_14-05-12"
    save_run(long, Metric("clean_error", 0.25, 180, 0.1936, 0.3201, of="sigma=0.25"), model="robustmedclip")
    save_run("b", Metric("clean_error", 0.2, 180, dataset="phantom/oct"), Metric("mce", 1.256, 180))
    runs = save_run("c", Metric("clean_error", 0.125, 180, of="sigma=0.25"), Metric("accuracy", 1.0, 1))
    text = invoke("leaderboard", runs)[1]
    assert max(map(len, text.splitlines())) <= 80
    lines = [re.sub(r" {2,}", "|", line.strip()) for line in text.splitlines() if re.search(r"\w", line)]
    assert lines == [
        "clean images: accuracy on phantom/blood, 1 images, highest first",
        "#|value|n|model|of|run",
        "1*|1.000|1|demo-clip|c",
        "clean images: clean error on phantom/oct, 180 images, lowest first",
        "#|value|n|model|of|run",
        "1*|.200|180|demo-clip|b",
        "corruption: mce on phantom/blood, 180 images, lowest first",
        "#|value|n|model|of|run",
        "1*|1.256|180|demo-clip|b",
        "noise: clean error on phantom/blood, sigma=0.25, 180 images, lowest first",
        "#|value [95 %]|n|model|of|run",
        "1*|.125|180|demo-clip|sigma=0.25|c",
        f"2|.250 [.19, .32]|180|robustmedclip|sigma=0.25|{long}",
        "A rank is a range where intervals overlap; * has no interval and is ranked by",
        "its value.",
    ]


def test_leaderboard_shows_a_repeated_result_once_but_exports_it_every_time(invoke, save_run):
    for name in ("a", "b"):
        save_run(name, Metric("accuracy", 0.5, 8))
    save_run("c", Metric("accuracy", 0.5, 8), other=1)
    runs = save_run("d", Metric("accuracy", 0.25, 8), other=1)
    rows = [line for line in invoke("leaderboard", runs)[1].splitlines() if "demo-clip" in line]
    assert [re.split(r" {2,}", row.strip()) for row in rows] == [
        ["1-2*", ".500", "8", "demo-clip", "a (+1 more)"],
        ["1-2*", ".500", "8", "demo-clip", "c"],
        ["3*", ".250", "8", "demo-clip", "d"],
    ]
    assert len(json.loads(invoke("leaderboard", runs, "--json")[1])) == 4


def test_leaderboard_holds_runs_by_hand_only_when_asked(invoke, save_run):
    runs = save_run("by-hand", Metric("accuracy", 0.5, 8))
    code, _, error = invoke("leaderboard", runs)
    assert code == 1
    assert "holds only notebooks run by hand; show them with --by-hand" in error
    save_run("a", Metric("accuracy", 0.25, 8))
    assert [row["run"] for row in json.loads(invoke("leaderboard", runs, "--json")[1])] == ["a"]
    assert [row["run"] for row in json.loads(invoke("leaderboard", runs, "--by-hand", "--json")[1])] == ["by-hand", "a"]
    assert [row["run"] for row in json.loads(invoke("leaderboard", runs / "by-hand", "--json")[1])] == ["by-hand"]


def test_doctor_finds_a_sound_environment():
    findings = list(doctor.examine())
    assert [finding.check for finding in findings] == [
        "python", "packages", "torchvision import", "kernel", "accelerator", "weights", "data", "reference",
    ]  # fmt: skip
    assert [finding for finding in findings if not finding.passed] == []


@pytest.fixture
def other_packages(monkeypatch):
    """NumPy at another version than the tested one, and no pandas."""
    installed = metadata.version

    def version(name):
        if name == "pandas":
            raise metadata.PackageNotFoundError(name)
        return "1.0.0" if name == "numpy" else installed(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.usefixtures("other_packages")
def test_doctor_fails_the_command_and_names_the_check(invoke):
    code, text, error = invoke("doctor")
    assert code == 1
    assert "FAIL packages" in text
    assert "1 check failed, see above" in error


def test_doctor_notices_another_prediction(monkeypatch, tmp_path):
    reference = json.loads(doctor.REFERENCE_FILE.read_text())
    reference["probabilities"][0][0] += 0.01
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(reference))
    monkeypatch.setattr(doctor, "REFERENCE_FILE", path)
    finding = list(doctor.examine())[-1]
    assert not finding.passed
    assert "demo-clip differs from its reference prediction by 0.01" in finding.detail


@pytest.mark.usefixtures("other_packages")
def test_doctor_names_packages_at_other_versions():
    finding = next(f for f in doctor.examine() if f.check == "packages")
    assert not finding.passed
    assert re.search(r"numpy 1\.0\.0 \(tested: \d+\.\d+\.\d+\); pandas missing \(tested: ", finding.detail)


def test_help_is_offered_without_arguments():
    result = CliRunner().invoke(cli.app, [])
    assert "leaderboard" in result.output
    assert "not for clinical use" in result.output.lower()
