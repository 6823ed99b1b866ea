import sys

import nbformat
import pytest

from medrobust_lib import runner
from medrobust_lib.experiments import HEADLESS_VARIABLE, RUN_DIR_VARIABLE

PARAMETERS = """model: str = "demo-clip"  # model id
n_images: int = 5  # how many
sigma: float = 0.25  # noise
sigmas: list[float] = [0.0]  # levels
fast: bool = False  # skip the slow part
"""


def write_notebook(folder, name: str, *cells: str, parameters: str = PARAMETERS):
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[tagged, *map(nbformat.v4.new_code_cell, cells)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def notebooks(tmp_path):
    write_notebook(tmp_path, "01_first")
    write_notebook(tmp_path, "02_second", parameters="model: str = 'x'  # id\nn_votes: int = 3  # votes\n")
    return runner.find_notebooks(folder=tmp_path)


def test_notebooks_are_found_by_number_with_or_without_zero(notebooks, tmp_path):
    assert list(notebooks) == ["01", "02"]
    for wanted in ("2", "02", "02_second", "notebooks/02_second.ipynb"):
        assert list(runner.find_notebooks([wanted], folder=tmp_path)) == ["02"]


def test_unknown_notebook_and_empty_folder_are_named(notebooks, tmp_path):
    with pytest.raises(ValueError, match="unknown notebook '7'; there are 01, 02"):
        runner.find_notebooks(["7"], folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="no notebooks in .*pass --notebooks FOLDER"):
        runner.find_notebooks(folder=tmp_path / "empty")


def test_values_are_yaml_and_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("model: plip\nsigmas: [0, 0.5]\n")
    parsed = runner.parse_parameters(["model=demo-clip", "n_images=20", "fast=true", "template=a {} b"], file)
    assert parsed == {
        "model": "demo-clip", "sigmas": [0, 0.5], "n_images": 20, "fast": True, "template": "a {} b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("assignments", "content", "message"),
    [
        (["model"], None, "-p model: write -p NAME=VALUE"),
        (["x=[1"], None, r"-p x=\[1: '\[1' is no valid YAML value"),
        ([], "- a\n", "must hold a mapping of parameter names to values"),
        ([], "a: [1", "is no valid YAML"),
    ],
)
def test_unreadable_parameters_are_named(tmp_path, assignments, content, message):
    file = None
    if content is not None:
        file = tmp_path / "params.yaml"
        file.write_text(content)
    with pytest.raises(runner.ParameterError, match=message):
        runner.parse_parameters(assignments, file)


def test_each_notebook_gets_the_parameters_it_knows(notebooks):
    assigned = runner.assign_parameters(notebooks, {"model": "plip", "n_votes": 9})
    assert assigned == {"01": {"model": "plip"}, "02": {"model": "plip", "n_votes": 9}}


def test_unknown_parameter_lists_the_valid_ones_closest_first(notebooks):
    with pytest.raises(runner.ParameterError, match="unknown parameter 'n_image' for notebook 01, 02; valid: n_images"):
        runner.assign_parameters(notebooks, {"n_image": 5})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("n_images", "many", "int"),
        ("n_images", 2.5, "int"),
        ("n_images", True, "int"),
        ("fast", 1, "bool"),
        ("sigma", "0.25", "float"),
        ("sigmas", 0.25, r"list\[float\]"),
        ("sigmas", ["a"], r"list\[float\]"),
        ("model", None, "str"),
    ],
)
def test_wrong_type_is_refused_before_anything_runs(notebooks, name, value, wanted):
    with pytest.raises(runner.ParameterError, match=f"parameter {name}=.*the notebook wants {wanted}"):
        runner.assign_parameters(notebooks, {name: value})


def test_int_is_welcome_where_float_is_wanted(notebooks):
    assert runner.assign_parameters(notebooks, {"sigma": 1, "sigmas": [0, 1]})["01"] == {"sigma": 1, "sigmas": [0, 1]}


def test_run_executes_with_parameters_environment_and_this_interpreter(tmp_path):
    code = f"""
import os, sys
print(model, n_images, os.environ["{HEADLESS_VARIABLE}"], os.environ["{RUN_DIR_VARIABLE}"], sys.executable)
"""
    write_notebook(tmp_path, "01_first", code)
    lines = []
    executed = runner.run_notebooks(
        runner.find_notebooks(folder=tmp_path), {"n_images": 7}, tmp_path / "out", announce=lines.append
    )
    output = nbformat.read(executed[0].path, as_version=4).cells[-1].outputs[0].text.split()
    assert output == ["demo-clip", "7", "1", str(tmp_path / "out"), sys.executable]
    assert lines[0] == "01_first ..."
    assert lines[1].startswith("01_first done in ")
    assert executed[0].seconds > 0
    import os

    assert HEADLESS_VARIABLE not in os.environ


def test_failure_shows_the_cell_and_keeps_the_notebook(tmp_path):
    write_notebook(tmp_path, "01_first", "before = 1", "divided = before / 0")
    with pytest.raises(runner.NotebookError) as caught:
        runner.run_notebooks(runner.find_notebooks(folder=tmp_path), {}, tmp_path / "out", announce=lambda _: None)
    message = str(caught.value)
    assert "01_first.ipynb failed in cell 3 with ZeroDivisionError: division by zero" in message
    assert "    divided = before / 0" in message
    assert "\x1b" not in message
    assert (tmp_path / "out" / "notebooks" / "01_first.ipynb").exists()


def test_kernel_of_another_python_is_refused(monkeypatch):
    class Foreign:
        def get_kernel_spec(self, _):
            return type("Spec", (), {"argv": ["/elsewhere/python"]})

    runner.check_kernel()
    monkeypatch.setattr("jupyter_client.kernelspec.KernelSpecManager", Foreign)
    with pytest.raises(RuntimeError, match="runs /elsewhere/python, not .*ipykernel install --sys-prefix"):
        runner.check_kernel()
