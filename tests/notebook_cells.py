"""Runs of whole notebooks inside the test's process, where a kernel of its own would only cost time.

A kernel, its worker processes and their imports take longer than all cells of a notebook with small parameters. What is
tested here is the cells; kernels and papermill are tested with the runner.
"""

import ast
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbformat import NotebookNode
from scipy.stats import norm

from medrobust_lib.data import published

# What the parameters cannot make small; each is written in the notebook as it stands here.
CHEAPER = {
    "03": {
        "0.001, 50, 4, 6": "0.001, 1, 1, 1", "range(9)": "range(2)", "max(100, n_draws": "max(20, n_draws",
        "max(50, n // 8)": "max(20, n // 8)",
    },
    "03b": {
        "(1, 4, 16, most_shots)": "(1, 16)", "(1, 2, 5, 8)": "(2, 5)", "draws_per_image=4": "draws_per_image=1",
        "(0, 1, 2, 4, 8, 16)": "(0, 1, 2)",
    },
    "04": {
        '{"epochs": 20,': '{"epochs": 1,', "range(300)": "range(2)", "0.15], 100": "0.15], 20",
        'epochs=25, batch_size': 'epochs=1, batch_size',
    },
    "05": {'len(levels), "epochs": 20': 'len(levels), "epochs": 1'},
    "06": {"runs = [], 4000": "runs = [], 10", "0.001, 20": "0.001, 5"},
    "08": {
        "epochs=20, draws_per_image=4": "epochs=1, draws_per_image=1", '{"epochs": 20,': '{"epochs": 1,',
        "per_side = both.usual_sigma, 41": "per_side = both.usual_sigma, 9",
    },
    "07": {
        '"demo-clip") else recipe': '"demo-clip") else recipe\nrecipe = recipe | {"epochs": 1}',
        '"batch_size": 32}': '"batch_size": 32, "epochs": 1}',
        '"n0": 50, "n": 500': '"n0": 10, "n": 50',
    },
}  # fmt: skip
# They read the papers' tables alone, so that every run of a notebook gives the same.
ABOUT_THE_PAPERS = ("rows_of_table_2", "entries_that_do_not_fit", "constant_predictors", "rankings_by_choice")


def run_cells(
    path: Path,
    given: Mapping[str, Any],
    *,
    after_cell: Callable[[int], None] = lambda place: None,
    cheaper: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Execute the code cells in order and render what a cell ends with as Jupyter would.

    Parameters
    ----------
    path : Path
        Of the notebook.
    given : mapping
        Parameters; names that the notebook does not know are left out.
    after_cell : callable
        Called with the place of each code cell while its figures are open.
    cheaper : mapping
        What to write in place of what stands in the notebook, beside `CHEAPER`.
    """
    names: dict = {"display": lambda *shown: [_rendered(one) for one in shown]}
    cheaper = {**CHEAPER.get(path.name.split("_")[0], {}), **cheaper}
    try:
        with plt.rc_context(), torch.enable_grad():
            for place, cell in enumerate(nbformat.read(path, as_version=4).cells):
                if cell.cell_type == "code":
                    _run_cell(cell, names, given, cheaper, f"{path.stem}, cell {place}")
                    after_cell(place)
                    plt.close("all")
        assert not cheaper, f"not in notebook {path.name}: {list(cheaper)}"
    finally:
        torch.set_grad_enabled(True)
        plt.close("all")
        names.clear()


def _run_cell(cell: NotebookNode, names: dict, given: Mapping[str, Any], cheaper: dict[str, str], where: str) -> None:
    source = cell.source
    for old in [old for old in cheaper if old in source]:
        source = source.replace(old, cheaper.pop(old))
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), names)
    if last is not None:
        _rendered(eval(compile(last, where, "eval"), names))
    if "parameters" in cell.metadata.get("tags", []):
        names.update({name: value for name, value in given.items() if name in names})


def _rendered(value: object) -> None:
    getattr(value, "_repr_html_", lambda: None)()


def make_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker processes, what follows from the papers' tables once, and no sums over ten thousand draws.

    The exact expectation is tested with the bounds.
    """
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    monkeypatch.setattr(
        "medrobust_lib.smoothing.bounds.expected_radius",
        lambda q, n, alpha, *, sigma=1.0: sigma * np.maximum(norm.ppf(np.clip(q, 0.5, 0.999)), 0),
    )
    for name in ABOUT_THE_PAPERS:
        found = _about_the_papers(name)
        monkeypatch.setattr(published, name, lambda found=found, **given: found(**given).copy())


@cache
def _about_the_papers(name: str) -> Callable[..., pd.DataFrame]:
    return cache(getattr(published, name))


def run_here_instead_of_in_a_kernel(monkeypatch: pytest.MonkeyPatch, **cheaper: Mapping[str, str]) -> None:
    """Let ``medrobust run`` go its whole way, but for the kernel and the pages that show what it left."""

    def execute_notebook(source: Path, target: Path, parameters: Mapping[str, Any], **_: object) -> None:
        run_cells(source, parameters, **cheaper)

    make_cheap(monkeypatch)
    monkeypatch.setattr("papermill.execute_notebook", execute_notebook)
    monkeypatch.setattr("medrobust_lib.experiments.report.write_report", lambda folder, **_: folder / "index.html")
