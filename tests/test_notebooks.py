"""Structure of the committed notebooks, so that the nbval lane really compares something."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from medrobust_lib.parameters import notebook_parameters
from medrobust_lib.runner import find_notebooks

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HEADINGS = [
    "What you will learn", "Parameters", "Set-up", "Theory", "Practice", "Headline figure and table",
    "What to notice", "Limits and soundness", "The papers' numbers beside ours", "Exercises", "Save the card",
    "Explore",
]  # fmt: skip
MOST_LINES = 25  # of a code cell, all lines counted
WIDEST = 96  # characters of a code line: pages show no more
SHORTER = {  # notebooks that keep a stricter rule, one a line
    "03": 15,
    "03b": 15,
    "04": 15,
    "05": 20,
    "06": 20,
    "08": 20,
}
NEEDS_GUARD = re.compile(r"^\s*(?:import|from)\s+(torchvision|timm|open_clip|peft|transformers)\b", re.MULTILINE)


@pytest.fixture(params=PATHS, ids=[path.stem for path in PATHS])
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def outputs_text(cell):
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", ""))
        parts += [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(map(str, parts))


def test_there_are_notebooks():
    assert len(PATHS) >= 2


def test_is_valid_and_uses_the_plain_kernel(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata
    assert "widgets" not in notebook.metadata


def test_is_committed_executed_in_order_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert not [cell for cell in notebook.cells if "papermill" in cell.metadata]


def test_has_checked_cells_with_output(notebook):
    checked = [cell for cell in code_cells(notebook) if "nbval-check-output" in tags(cell)]
    assert len([cell for cell in checked if outputs_text(cell).strip()]) >= 3
    assert all(outputs_text(cell).strip() for cell in checked), "a checked cell without output checks nothing"


def test_only_known_tags(notebook):
    known = {"parameters", "nbval-check-output", "nbval-ignore-output", "nbval-skip", "nbval-raises-exception"}
    assert {tag for cell in notebook.cells for tag in tags(cell)} <= known


def test_one_parameters_cell_of_annotated_literals_with_comments(notebook, path):
    cells = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    assert len(cells) == 1
    tree = ast.parse(cells[0].source)
    assert 1 <= len(tree.body) <= 9
    for statement, line in zip(tree.body, cells[0].source.splitlines(), strict=True):
        assert isinstance(statement, ast.AnnAssign), line
        ast.literal_eval(statement.value)
        assert re.search(r"  # \w", line), f"no comment: {line}"
    inferred = notebook_parameters(path)
    assert len(inferred) == len(tree.body)
    assert all(spec["help"] for spec in inferred.values())


def test_parameters_that_any_study_varies_have_the_same_names_everywhere(path):
    names = set(notebook_parameters(path))
    assert {"n_images", "seed", "interactive"} <= names
    assert len(names & {"dataset", "images"}) == 1  # a data set, or images of one's own
    assert len(names & {"model", "vlm"}) == 1  # a dual encoder, or a generative model


def test_headings_follow_the_agreed_order(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    assert notebook.cells[0].source.startswith("# ")


def test_sizes(notebook, path):
    assert len(notebook.cells) <= 64
    assert path.stat().st_size <= 400_000
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= SHORTER.get(path.name.split("_")[0], MOST_LINES), cell.source
        assert max(map(len, cell.source.splitlines())) <= WIDEST, cell.source


def test_no_shell_installs_no_silencing_and_no_machine_paths(notebook):
    for cell in code_cells(notebook):
        assert not re.search(r"^\s*[!%](pip|conda)", cell.source, re.MULTILINE)
        assert not cell.source.rstrip().endswith(";")
        assert not re.search(r"(/home/|/work/|/tmp/|/Users/|[A-Z]:\\)", cell.source + outputs_text(cell))


def test_numbers_with_a_sign_are_never_minus_zero(notebook):
    for cell in code_cells(notebook):
        assert not re.findall(r":\+\.\d", cell.source), "write :+z.3f, so that what rounds to zero has no minus"
        assert not re.search(r"(?<![\w.])[-−]0\.0+(?![\d.]|e)", outputs_text(cell))


def test_library_is_imported_before_what_needs_the_torchvision_guard(notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    ours = re.search(r"^import medrobust_lib", source, re.MULTILINE)
    assert ours
    other = NEEDS_GUARD.search(source)
    assert other is None or ours.start() < other.start()


def test_the_card_is_saved_before_explore_which_is_the_last_cell(notebook):
    card, explore = code_cells(notebook)[-2:]
    assert "run.save_card(" in card.source
    assert "explore." in explore.source and "interactive" in explore.source


def test_three_exercises_with_hidden_answers(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    exercises = text.split("## Exercises")[1].split("## Save the card")[0]
    assert exercises.count("<details><summary>answer</summary>") == 3


def test_says_that_phantoms_are_synthetic_and_nothing_is_clinical(notebook):
    text = "\n".join(cell.source for cell in notebook.cells).lower()
    assert "synthetic phantoms" in text
    assert "not for clinical use" in text


def test_prose_cites_no_number_that_only_a_cell_can_know(notebook):
    """Percentages in prose belong to the papers (marked reported) or to definitions, never to a run."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and "reported" not in cell.source.lower():
            assert not re.search(r"\b\d+(\.\d+)? ?(%|points)", cell.source.replace("90 % sure", "")), cell.source


def test_the_notebooks_with_a_stricter_rule_exist():
    assert set(SHORTER) <= {path.name.split("_")[0] for path in PATHS}


def test_the_nbval_lane_fails_when_a_checked_output_is_wrong(tmp_path):
    """The lane is only worth running if it can fail."""
    cell = nbformat.v4.new_code_cell(
        "print(6 * 7)",
        execution_count=1,
        metadata={"tags": ["nbval-check-output"]},
        outputs=[nbformat.v4.new_output("stream", name="stdout", text="")],
    )
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    )
    for name, text in (("right", "42\n"), ("wrong", "43\n")):
        cell.outputs[0].text = text
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    # Without it nbformat is there seconds earlier, as in conftest.py.
    (tmp_path / "rfc3987_syntax.py").write_text("raise ImportError")
    lane = [sys.executable, "-m", "pytest", "-rA", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider"]
    lane += ["--nbval-sanitize-with", str(ROOT / "tests" / "nbval_sanitize.cfg"), "--rootdir", str(tmp_path)]
    finished = subprocess.run(
        [*lane, "right.ipynb", "wrong.ipynb"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1, finished.stdout
    assert re.findall(r"^(PASSED|FAILED) (\w+)", finished.stdout, re.MULTILINE) == [
        ("PASSED", "right"),
        ("FAILED", "wrong"),
    ]


def test_the_runner_finds_the_same_notebooks():
    assert list(find_notebooks().values()) == PATHS
