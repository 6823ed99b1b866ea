"""Names with markup in them: no page of a report runs them, and no link leaves the run's folder."""

import json
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from medrobust_lib.experiments import Metric, report, start_run
from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt;",
    "]]><svg/onload=alert(1)>",
]
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "p", "main", "section", "div", "h2", "span", "a",
    "ul", "li", "dl", "dt", "dd", "table", "thead", "tr", "th", "tbody", "td", "figure", "img", "figcaption", "footer",
    "nav", "details", "summary", "h3", "small", "ol", "strong",
}  # fmt: skip


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.links, self.text = set(), set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data):
        self.text.append(data)


def parsed(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture
def run_dir(tmp_path, monkeypatch, request):
    hostile = request.param
    folder = tmp_path / hostile.replace("/", "_").replace("\0", "")
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(folder))
    run = start_run("01", hostile, model=hostile)
    run.save_figure(Figure(figsize=(2, 1)), hostile.replace("/", "_"), caption=hostile)
    row = {"file": f"a{hostile}", "patient": hostile, "label": 0, "class_name": hostile, "predicted": 1}
    run.save_images(pd.DataFrame([row | {"predicted_name": hostile}]), np.zeros((1, 8, 8, 3), np.uint8))
    run.save_card(
        metrics=[Metric(hostile, 0.5, 4, 0.1, 0.9, of=hostile, model=hostile, dataset=hostile)],
        tables={"01_accuracy": pd.DataFrame({hostile: [hostile]})},
        model={"id": hostile}, dataset={"id": hostile, "n": 4, "classes": [hostile]}, prompts={"template": hostile},
        notes=[hostile], question=hostile, findings=[hostile],
    )  # fmt: skip
    (folder / "notebooks").mkdir()
    for name in ("01_first.ipynb", f"02_{hostile.replace('/', '_')}.ipynb"):
        cells = [
            nbformat.v4.new_markdown_cell(f"# {hostile}"),
            nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("stream", text=hostile)]),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / name)
    report.write_report(folder)
    return folder


@pytest.mark.hardening(
    area="reports",
    tried="markup as run folder, title, model, data set, metric, note, caption, figure, notebook, image, patient",
    outcome="shown as text; no element or attribute comes in; all links relative and whole",
)  # fmt: skip
@pytest.mark.parametrize("run_dir", HOSTILE, indirect=True, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("name", ["index.html", "images.html"])
def test_names_stay_text(run_dir, name):
    index = parsed(run_dir / name)
    assert index.tags <= ALLOWED
    assert not [name for name in index.attributes if name.startswith("on")]
    assert index.links
    for link in index.links:
        parts = urlsplit(link)
        assert not parts.scheme and not parts.netloc and not parts.path.startswith("/")
        target = run_dir / unquote(parts.path)
        assert target.resolve().is_relative_to(run_dir.resolve()) and target.exists()


@pytest.mark.hardening(
    area="reports", tried="markup in the printed output and the file name of a notebook",
    outcome="shown as text; raw HTML that its author wrote stays, under a policy that runs no script",
)  # fmt: skip
@pytest.mark.parametrize("run_dir", HOSTILE, indirect=True, ids=range(len(HOSTILE)))
def test_notebook_pages_run_nothing(run_dir, request):
    hostile = request.node.callspec.params["run_dir"]
    pages = sorted((run_dir / "html").glob("*.html"))
    assert len(pages) == 2
    for path in pages:
        text = path.read_text(encoding="utf-8")
        head, _, body = text.partition("<main>")
        shown = "".join(parsed(path).text)
        assert body.count("<script>alert") <= 1  # in the heading, which is the author's own Markdown
        assert "<script" not in head and "default-src &#39;none&#39;" in head
        assert hostile in shown or "<" in hostile


@pytest.mark.hardening(
    area="reports", tried="cards that name tables or notebooks outside the run, or lack what is shown",
    outcome="refused, card named",
)  # fmt: skip
@pytest.mark.parametrize("run_dir", ["run"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        {"tables": ["../../secret"]}, {"tables": ["a/b"]}, {"tables": ["/etc/passwd"]}, {"tables": 3},
        {"notebook": "../01"}, {"notebook": 1}, {"metrics": [{"name": "accuracy"}]}, {"metrics": None},
        {"images": "../../secret"}, {"images": 1}, {"findings": "one"}, {"question": None},
        {"seconds": "long"}, {"git": None}, {"environment": {}},
    ],
    ids=str,
)  # fmt: skip
def test_cards_that_do_not_fit(run_dir, change):
    path = run_dir / "cards" / "01.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ValueError, match=r"cards: the card of notebook .* is damaged|cards/01\.json is a damaged result card"
    ):
        report.write_report(run_dir)


@pytest.mark.hardening(area="reports", tried="damaged notebooks in a run", outcome="refused, notebook named")
@pytest.mark.parametrize("run_dir", ["run"], indirect=True)
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"cells": 3, "nbformat": 4}'])
def test_damaged_notebooks_are_named(run_dir, content):
    (run_dir / "notebooks" / "01_first.ipynb").write_bytes(content)
    with pytest.raises(ValueError, match=r"01_first\.ipynb is not a readable notebook"):
        report.write_report(run_dir)
