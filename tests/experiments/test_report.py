import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import nbformat
import pandas as pd
import pytest
from matplotlib.figure import Figure

from medrobust_lib.experiments import Metric, report, start_run
from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE
from medrobust_lib.runner import find_notebooks


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(folder))
    run = start_run("01", "A <b>title</b>", model="demo-clip")
    run.save_figure(Figure(figsize=(2, 1)), "some_curve")
    run.save_figure(Figure(figsize=(2, 1)), "headline", caption="Accuracy <falls> with noise")
    run.save_card(
        metrics=[
            Metric("balanced_accuracy", 0.75, 4, 0.2, 0.99),
            Metric("accuracy", 0.5, 4, of="sigma=1", model="plip"),
        ],
        tables={"01_accuracy": pd.DataFrame({"accuracy": [0.75]})},
        model={"id": "<script>alert(1)</script>"},
        dataset={"id": "phantom/blood", "n": 4, "synthetic": True},
        prompts={},
        notes=["synthetic phantoms, not patients' images"],
    )
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nthe radius $R = \\sigma\\,\\Phi^{-1}(p)$ and `$not math$`"),
        nbformat.v4.new_code_cell("x = 1", outputs=[nbformat.v4.new_output("stream", text="seen\n")]),
    ]
    (folder / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / "01_first.ipynb")
    report.write_report(folder)
    return folder


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets = []

    def handle_starttag(self, tag, attrs):
        self.targets += [value for name, value in attrs if name in ("href", "src")]


def test_every_link_of_every_page_exists_and_is_relative(run_dir):
    for page in (run_dir / "index.html", run_dir / "html" / "01_first.html"):
        links = Links()
        links.feed(page.read_text())
        assert links.targets
        for target in links.targets:
            assert not re.match(r"[a-z]+:|/", target), target
            assert (page.parent / target.split("#")[0]).exists(), target


def test_pages_load_nothing_from_a_network(run_dir):
    for page in run_dir.rglob("*.html"):
        text = page.read_text()
        assert "<script" not in text
        assert "@import" not in text
        assert not re.search(r"url\(\s*['\"]?http", text)


def test_index_shows_card_figures_and_notice(run_dir):
    text = (run_dir / "index.html").read_text()
    assert "0.750 [0.200, 0.990]" in text
    assert 'src="figures/01_some_curve.png"' in text
    assert "Not for clinical use" in text
    assert "synthetic drawings, never from patients" in text
    assert 'name="viewport"' in text


def test_figures_have_their_caption_or_a_readable_name(run_dir):
    captions = re.findall("<figcaption>(.*?)</figcaption>", (run_dir / "index.html").read_text())
    assert captions == ["Accuracy &lt;falls&gt; with noise", "Some curve"]


def test_notes_stand_before_the_numbers(run_dir):
    text = (run_dir / "index.html").read_text()
    assert text.index('<ul class="notes"') < text.index("synthetic phantoms, not patients&#39; images")
    assert text.index("synthetic phantoms, not patients&#39; images") < text.index("0.750 [0.200")


def test_a_metric_of_another_model_says_so(run_dir):
    assert "<td>plip, sigma=1</td>" in (run_dir / "index.html").read_text()


def test_a_notebook_without_a_card_is_shown_as_unfinished(run_dir):
    notebook = nbformat.read(run_dir / "notebooks" / "01_first.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("An exception was encountered"))
    nbformat.write(notebook, run_dir / "notebooks" / "02_second.ipynb")
    report.write_report(run_dir)
    text = (run_dir / "index.html").read_text()
    assert text.count("did not reach its end") == 1
    assert '<span class="number">02</span>Title</h2>' in text
    assert '<a href="html/02_second.html">read it up to where it stopped</a>' in text
    assert (run_dir / "html" / "02_second.html").exists()
    (run_dir / "cards" / "01.json").unlink()
    report.write_report(run_dir)
    assert (run_dir / "index.html").read_text().count("did not reach its end") == 2


def test_while_notebooks_run_the_index_says_so_and_loads_itself_anew(run_dir):
    (run_dir / "notebooks" / "02_second.ipynb").write_text('{"half": ')  # papermill writes in place
    page = run_dir / "html" / "01_first.html"
    written = page.stat().st_mtime_ns
    report.write_report(run_dir, running=["02", "03"])
    text = (run_dir / "index.html").read_text()
    assert "Still to come: 02, 03." in text
    assert '<meta http-equiv="refresh"' in text
    assert "did not reach its end" not in text
    assert page.stat().st_mtime_ns == written  # a finished page is not drawn again
    other = (run_dir / "notebooks" / "01_first.ipynb").read_text().replace("# Title", "# Another title")
    (run_dir / "notebooks" / "01_first.ipynb").write_text(other)
    os.utime(run_dir / "notebooks" / "01_first.ipynb", ns=(0, 0))
    report.write_report(run_dir, running=["02", "03"])
    assert "Another title" in page.read_text()  # whatever the clock says
    (run_dir / "notebooks" / "02_second.ipynb").unlink()
    report.write_report(run_dir)
    text = (run_dir / "index.html").read_text()
    assert "Still to come" not in text
    assert "refresh" not in text.partition("<style>")[0]
    assert "refresh" not in page.read_text().partition("<style>")[0]


def test_a_changed_notebook_gets_a_new_page(run_dir):
    path, page = run_dir / "notebooks" / "01_first.ipynb", run_dir / "html" / "01_first.html"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell("a sentence more"))
    nbformat.write(notebook, path)
    os.utime(path, ns=(page.stat().st_mtime_ns, page.stat().st_mtime_ns))  # of one moment, by a coarse clock
    report.write_report(run_dir)
    assert "a sentence more" in page.read_text()


def test_names_are_escaped(run_dir):
    text = (run_dir / "index.html").read_text()
    assert "<b>title</b>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_notebook_page_draws_formulas_without_javascript(run_dir):
    text = (run_dir / "html" / "01_first.html").read_text()
    assert "<math" in text
    assert "$not math$" in text
    assert "seen" in text
    source = nbformat.read(run_dir / "notebooks" / "01_first.ipynb", as_version=4)
    assert "$R = " in source.cells[0].source


def test_block_and_inline_formulas_but_not_code():
    converted = report.math_to_mathml("$$a$$ and $b$ and `$c$`\n```\n$d$\n```\ncosts 5 $")
    assert converted.count("<math") == 2
    assert 'display="block"' in converted
    assert "`$c$`" in converted
    assert "\n$d$\n" in converted
    assert converted.endswith("costs 5 $")


@pytest.mark.parametrize("notebook", find_notebooks().values(), ids=find_notebooks())
def test_every_formula_of_the_notebooks_survives(notebook):
    """No command, dollar or empty sign is left, fences pair, and letters are characters that every browser has."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "markdown"]
    converted = [report.math_to_mathml(cell.source) for cell in cells]
    assert "$" not in re.sub(r"```.*?```|`[^`]*`", "", "".join(converted), flags=re.DOTALL)
    formulas = [ElementTree.fromstring(found) for text in converted for found in re.findall("<math.*?</math>", text)]
    asked = sum(cell.source.count("$$") // 2 + len(re.findall(r"(?<!\$)\$(?!\$)", cell.source)) // 2 for cell in cells)
    assert len(formulas) == asked  # none fell back to its source
    for part in (part for formula in formulas for part in formula.iter()):
        kind, text = part.tag.rpartition("}")[2], part.text or ""
        assert not set(text) & set("\\${}"), text
        assert text.strip() or kind not in ("mi", "mn", "mo", "mtext"), "a sign was lost"
        # Browsers know one variant only; others must be letters of their own, which braces as in \mathcal{N} give.
        assert part.get("mathvariant", "normal") == "normal", text
    for formula in formulas:
        forms = [part.get("form") for part in formula.iter() if part.get("fence") == "true"]
        assert forms.count("prefix") == forms.count("postfix")


@pytest.mark.parametrize("latex", [r"t^* = \arg\min_t H", r"\nosuch{x} < 1", r"\left( x", "x_1_2", r"\sqrt"])
def test_a_formula_that_cannot_be_converted_stays_as_it_was_written(latex):
    assert report.math_to_mathml(f"so ${latex}$.") == f"so `{latex}`."


def test_the_least_prompt_is_named_argmin():
    converted = report.math_to_mathml(r"$\operatorname*{argmin}_t\; \mathbb{E}_x$")
    assert re.search(r"<msub><mo [^>]*>argmin</mo><mi>t</mi></msub>", converted)
    assert "&#x1D53C;" in converted  # double-struck E


def test_a_folder_without_cards_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result cards below"):
        report.write_report(tmp_path)


def test_images_of_a_notebook_are_described_by_their_heading_unless_they_say_what_they_show(caplog):
    png = {"image/png": "iVBORw0KGgo="}

    def cell(metadata):
        return nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("display_data", png, metadata=metadata)])

    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\n## The <first> part\n\ntext"), cell({}),
        nbformat.v4.new_markdown_cell("no heading"), cell({"image/png": {"alt": "two cells"}}),
        nbformat.v4.new_markdown_cell("## Second"), cell({}),
    ]  # fmt: skip
    body = report.notebook_body(nbformat.v4.new_notebook(cells=cells))
    texts = ["Figure in: The &lt;first&gt; part", "two cells", "Figure in: Second"]
    assert re.findall('alt="(.*?)"', body) == texts
    assert cells[1].outputs[0].metadata == {}
    assert "Alternative text" not in caplog.text
