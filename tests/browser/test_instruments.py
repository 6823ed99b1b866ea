"""Every instrument in JupyterLab in a real browser: it appears, and moving a control changes the picture."""

import hashlib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "runs" / "browser"
MOST_MS = 150_000  # for a notebook to come up to its instrument; a quiet machine needs a tenth
ANSWER_MS = 30_000
PICTURE = ".jp-OutputArea-output img.widget-image"
ERROR = '[data-mime-type="application/vnd.jupyter.stderr"]:has(.ansi-red-fg)'  # a traceback, not a warning

# What each Explore cell takes for granted, made from demo data: as little as shows the instrument.
COMMON = """
import medrobust_lib as mr

# isort: split
import matplotlib.pyplot as plt
import pandas as pd
import torch

from medrobust_lib import explore, plots

plots.set_style()
interactive, seed, model, suite = True, 0, "demo-clip", "medimeta-c"
"""
CLASSIFIER = (
    COMMON
    + """
encoder = mr.load_model(model)
data = mr.load_dataset("phantom/histology", n=18)
"""
)
SETUPS = {
    "02": CLASSIFIER
    + """
texts = {model: encoder.class_features(data.classes, data.templates[:1])}
sigmas, example = [0.0, 0.1, 0.5], 3
""",
    "03": CLASSIFIER
    + """
from medrobust_lib.smoothing import prompts

sigma, sigmas = 0.25, [0.25, 0.5]
named = zip(("hand-written prompt", "few-shot prompt"), data.templates)
starts = {name: prompts.text_prompts(encoder, data.classes, template) for name, template in named}
adaptation = explore.Adaptation(encoder, data.subset(range(2)), starts, seed=seed)
guarantees = {"zero-shot": "standard", "PromptSmooth": "frozen-prompt"}
summary = pd.DataFrame([
    {"method": name, "guarantee": guarantee, "sigma": level, "radius": r, "certified_accuracy": share - r}
    for share, (name, guarantee) in zip((0.6, 0.9), guarantees.items()) for level in sigmas for r in (0.0, 0.25)
])
""",
    "04": CLASSIFIER
    + """
from collections import namedtuple

from medrobust_lib.adaptation import adapting
from medrobust_lib.models.adapters import load_adapter

Job = namedtuple("Job", "method fraction rank seed")
seed, fraction, rank, images = 1, 0.1, 16, data
encoder = mr.load_model("demo-clip-vit")
texts = encoder.class_features(data.classes, data.templates[:1])
planned = [Job("LoRA", fraction, r, seed) for r in (4, 16)]
towers = {
    job: load_adapter(encoder, adapting.find_demo_adapter(
        encoder, adapting.DEMO_DATASETS, fraction=fraction, rank=job.rank, seed=seed))
    for job in planned
}
""",
    "05": CLASSIFIER
    + """
from medrobust_lib.evaluation import Candidate

classes, middle, corruptions = list(data.classes), 3, list(mr.SUITES[suite].names(data.id))
compared = {data.id: {
    name: Candidate(encoder, encoder.class_features(classes, [template]))
    for name, template in (("demo-clip", data.templates[0]), ("another template", data.templates[1]))
}}
""",
    "08": CLASSIFIER
    + """
test = data
texts = {(model, test.id): encoder.class_features(data.classes, data.templates[:1])}
""",
    "06": COMMON
    + """
from medrobust_lib.generative.answers import Drawing, collect_answers
from medrobust_lib.generative.oracles import default_oracle
from medrobust_lib.generative.oracles import ExactMatch, SameLabel

model, tasks, free, is_demo = mr.load_vlm("demo-vlm"), ["safety", "finding"], "finding", True
sigma, n0, n, alpha = 0.25, 4, 20, 0.001
how = Drawing(sigma=sigma, max_new_tokens=24)
asked = {task: mr.load_questions("phantom/blood", task=task, n=2) for task in tasks}
oracles = {task: default_oracle(part) for task, part in asked.items()}
readers = {"keywords": SameLabel(oracles[free]), "naive": ExactMatch()}
banks = {task: collect_answers(model, part, how, n0=n0, n=n) for task, part in asked.items()}
""",
}
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def committed(number):
    """The committed notebook of a number."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return nbformat.read(path, as_version=4)


def explore_cell(number):
    """Source of the code cell below the heading Explore."""
    cells = committed(number).cells
    place = next(i for i, cell in enumerate(cells) if "## Explore" in cell.source)
    return cells[place + 1].source


def write(lab, name, notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, lab.folder / name)


def shown_picture(page):
    """Digest of the pixels that the browser shows."""
    pixels = page.evaluate(
        """selector => {
            const image = document.querySelector(selector), canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth;
            canvas.height = image.naturalHeight;
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL();
        }""",
        PICTURE,
    )
    return hashlib.sha256(pixels.encode()).hexdigest()


def errors(page):
    """Texts of everything on the page that tells of an error: of a cell, or of an instrument."""
    cells = page.locator(ERROR).all_inner_texts()
    return cells + [text for text in page.locator(".widget-html").all_inner_texts() if "Error" in text]


def wait_for_another_picture(page, source):
    """Wait until the picture has another source and its pixels are there."""
    page.wait_for_function(
        """([selector, source]) => {
            const image = document.querySelector(selector);
            return image && image.src !== source && image.complete && image.naturalWidth > 0;
        }""",
        arg=[PICTURE, source],
        timeout=ANSWER_MS,
    )


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 1500, "height": 1150})
    yield opened
    opened.close()


def open_and_run(page, lab, name):
    """Open a notebook, run all of its cells, and wait for the instrument, or for an error to report."""
    page.goto(lab.url(name), timeout=MOST_MS)
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext", timeout=MOST_MS)
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.ready; }")
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'", timeout=MOST_MS
    )
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(
        """([picture, error]) => {
            const image = document.querySelector(picture);
            return (image && image.naturalWidth > 0) || document.querySelector(error);
        }""",
        arg=[PICTURE, ERROR],
        timeout=MOST_MS,
    )
    assert errors(page) == []


def controls_in_words(page):
    """Of every control its name, whether the name is cut, what explains it (a slider's tooltip) and its width."""
    return page.evaluate(
        """() => [...document.querySelectorAll(".jp-OutputArea-output .widget-hslider, .jp-OutputArea-output select")]
            .map(found => found.closest(".widget-inline-hbox"))
            .map(row => [row, row.querySelector(".widget-label")])
            .map(([row, label]) => ({
                name: label.textContent, cut: label.scrollWidth > label.clientWidth,
                told: label.title || row.querySelector("select")?.labels.length, width: row.offsetWidth,
            }))"""
    )


def move_and_compare(page, lab, shot):
    """Move the instrument's first slider by a key; the picture has to change, and nothing may go wrong."""
    for control in controls_in_words(page):
        assert control["name"] and control["told"] and not control["cut"] and control["width"] >= 300, control
    before, source = shown_picture(page), page.locator(PICTURE).get_attribute("src")
    page.locator(PICTURE).scroll_into_view_if_needed()
    handle = page.locator(".jp-OutputArea-output .noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    wait_for_another_picture(page, source)
    page.locator(PICTURE).scroll_into_view_if_needed()
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{shot}.png")
    assert errors(page) == []
    assert shown_picture(page) != before
    lab.end_kernels()


def test_notebook_01_as_it_is_runs_and_its_instrument_answers(page, lab):
    notebook = committed("01")
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    small = {"interactive": "True", "n_images": "27", "compare": '["phantom/breast"]'}
    lines = []
    for line in parameters.source.splitlines():
        name, annotation = line.split(":")[0], line.split(" = ")[0]
        lines.append(f"{annotation} = {small[name]}" if name in small else line)
    parameters.source = "\n".join(lines)
    write(lab, "notebook01.ipynb", notebook)
    open_and_run(page, lab, "notebook01.ipynb")
    move_and_compare(page, lab, "01")


def test_an_error_of_a_cell_is_seen(page, lab):
    source = "import sys\nprint('a warning', file=sys.stderr)\nnobody"
    write(lab, "broken.ipynb", nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=KERNEL))
    with pytest.raises(AssertionError, match="name 'nobody' is not defined"):
        open_and_run(page, lab, "broken.ipynb")
    lab.end_kernels()


@pytest.mark.parametrize("number", list(SETUPS))
def test_the_explore_cell_of_each_notebook_answers(page, lab, number):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in (SETUPS[number], explore_cell(number))],
        metadata=KERNEL,
    )
    write(lab, f"instrument{number}.ipynb", notebook)
    open_and_run(page, lab, f"instrument{number}.ipynb")
    move_and_compare(page, lab, number)
