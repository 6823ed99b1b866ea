"""The step ``notebook``: a notebook with the models, data sets and seeds of the study."""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from medrobust_lib import parameters as notebook_parameters
from medrobust_lib.runner import find_notebooks, mark_run_dir, run_notebooks
from medrobust_lib.studies.steps import ALONE, Cell, Estimate, Grid, Prices, Step, Workers


@dataclass(frozen=True, kw_only=True)
class NotebookStep(Step):
    """A notebook, by its number; the study sets its model, dataset, seed and n_images where it has them.

    Attributes
    ----------
    notebook : str
        For example "02".
    parameters : dict
        The notebook's other parameters.
    """

    kind: ClassVar[str] = "notebook"

    notebook: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def check(self, grid: Grid, notebooks: Path | None) -> None:
        """Raise a ValueError where a parameter cannot work."""
        self.cells(0, grid, notebooks)

    def cells(self, number: int, grid: Grid, notebooks: Path | None) -> list[Cell]:
        """One for each model, data set and seed that the notebook has a parameter for, with checked parameters."""
        found = find_notebooks([self.notebook], folder=notebooks)
        ((place, path),) = found.items()
        known = notebook_parameters.notebook_parameters(path)
        axes = {"model": grid.models, "dataset": grid.datasets, "seed": grid.seeds}
        made: list[Cell] = []
        for values in product(*(values if name in known and values else (None,) for name, values in axes.items())):
            given = {name: value for name, value in zip(axes, values, strict=True) if value is not None}
            if grid.n_images is not None and "n_images" in known:
                given["n_images"] = grid.n_images
            model, dataset, seed = values
            assigned = notebook_parameters.assign_parameters(found, given | self.parameters)[place]
            made.append(NotebookCell(number, self, model or "", dataset or "", seed, assigned))
        return made


class NotebookCell(Cell):
    """One run of a notebook, with the notebook's own card; its parameters were checked when the study was read."""

    @property
    def what(self) -> str:
        """The notebook."""
        return f"notebook {self.step.notebook}"

    def estimate(self, prices: Prices) -> Estimate:
        """What earlier runs took."""
        seconds = prices.notebooks.get((self.step.notebook, self.model)) or None
        return Estimate(self.parameters.get("n_images"), None, seconds, None)

    def run(self, study: Path, *, notebooks: Path | None = None, workers: Workers = ALONE) -> None:
        """Execute it."""
        folder = mark_run_dir(self.folder(study))  # it has a log already
        run_notebooks(find_notebooks([self.step.notebook], folder=notebooks), self.parameters, folder)
