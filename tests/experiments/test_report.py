import json
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import nbformat
import numpy as np
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
    assert ".750 [.20, .99]" in text
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
    assert text.index("synthetic phantoms, not patients&#39; images") < text.index(".750 [.20")


def shown_rows(text):
    """Cells of the rows of every table, as text."""
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr[^>]*>(.*?)</tr>", text) if "<td" in row]


def test_a_metric_of_another_model_says_so(run_dir):
    rows = shown_rows((run_dir / "index.html").read_text())
    assert rows == [
        ["&lt;script&gt;alert(1)&lt;/script&gt;", "", ".750 [.20, .99]", ""],
        ["plip", "sigma=1", "", ".500"],
    ]


def save_card(folder, number="01", **changes):
    """Replace the card of a notebook, with the images that it may have kept."""
    run = start_run(number, f"Title {number}")
    if "table" in changes:
        table = changes.pop("table")
        run.save_images(table, changes.pop("pictures", np.zeros((len(table), 8, 8, 3), np.uint8)))
    given = {"metrics": [], "tables": {}, "model": {"id": "m"}, "dataset": {"id": "d", "n": 4}, "prompts": {}}
    run.save_card(**given | changes)
    report.write_report(folder)
    return (folder / "index.html").read_text()


def test_numbers_stand_side_by_side_a_column_for_each_metric_and_radius(run_dir):
    """What is the same in every row is said once, and what cannot be measured is a dash."""
    nan = float("nan")
    metrics = [
        Metric("certified_accuracy", value, 8, value, value, of=f"{method} (standard), sigma=0.25, radius={radius}")
        for method, radius, value in [
            ("CoOp", 0, 0.75),
            ("CoOp", "1 (the draws reach 0.5)", nan),
            ("zero-shot", 0, -0.0001),
        ]
    ]  # fmt: skip
    text = save_card(run_dir, metrics=[*metrics, Metric("ece", 0.125, 8, of="CoOp (standard), sigma=0.25")])
    columns = re.findall("<th(?: [^>]*)?>(.*?)</th>", text)
    assert columns == ["measured on", "certified accuracy, radius=0", "certified accuracy, radius=1", "ece"]
    assert shown_rows(text) == [
        ["CoOp (standard), sigma=0.25", ".750 [.75, .75]", "–", ".125"],
        ["zero-shot (standard), sigma=0.25", ".000 [.00, .00]", "", ""],
    ]
    assert "Data set: d. Model: m. Images: 8." in text


def test_two_metrics_of_one_place_are_both_shown(run_dir):
    text = save_card(run_dir, metrics=[Metric("accuracy", 0.5, 4), Metric("accuracy", 0.25, 4)])
    assert shown_rows(text) == [[".500 / .250"]]


def test_a_notebook_says_what_it_asks_and_found(run_dir):
    text = save_card(run_dir, question="How <far>?", findings=["Not far.", "It falls."])
    assert '<p class="question">How &lt;far&gt;?</p>' in text
    assert '<p class="findings">Not far. It falls.</p>' in text
    contents = text[text.index("<nav") : text.index("</nav>")]
    assert '<a href="#notebook-01"><span class="number">01</span>Title 01</a> How &lt;far&gt;?' in contents


def test_without_findings_the_headline_metric_is_told_in_words(run_dir):
    metrics = [
        Metric("ece", 0.5, 4, 0.25, 0.75, of="a"),
        Metric("ece", 0.125, 4, of="b"),
        Metric("mce", 9.0, 4, of="c"),
    ]
    text = " ".join(save_card(run_dir, metrics=metrics).split())
    assert "Ece (a): .500, 95 % interval .25 to .75, from 4 images." in text
    assert "Of 2 measurements of ece the lowest is .125 (b) and the highest .500 (a)." in text


def test_captions_are_the_alternative_texts(run_dir):
    text = (run_dir / "index.html").read_text()
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert re.findall('alt="(.*?)"', text) == captions
    assert len(captions) == 2


def test_parameters_and_prompts_stand_in_words_and_without_the_folders_of_a_machine(run_dir):
    start_run("01", "Title")  # prints
    card = json.loads((run_dir / "cards" / "01.json").read_text())
    card["parameters"] = {"n_images": 12, "dataset": "folder:/home/somebody/scans", "sigmas": [0.1, 0.5], "words": {}}
    card["prompts"] = {"templates": ["a picture of {}"], "few_shot": {"images": list(range(99)), "shots": None}}
    (run_dir / "cards" / "01.json").write_text(json.dumps(card))
    report.write_report(run_dir)
    text = (run_dir / "index.html").read_text()
    told = re.findall(r"<dt>([^<]*)</dt><dd>\s*([^<]*?)\s*</dd>", text)
    assert {("n images", "12"), ("dataset", "folder:scans"), ("sigmas", "0.1, 0.5"), ("shots", "–")} <= {*told}
    assert ("templates", "a picture of {}") in told
    assert ("images", "0, 1, 2, 3, 4, 5, 6, 7 ... (99 in all)") in told
    assert "somebody" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("folder:/home/a/b", "folder:b"), ("csv:/a/b.csv", "csv:b.csv"), ("folder:/data", "folder:data"),
        ("folder:C:\\x\\y", "folder:y"), ("~/a/b", "b"), ("phantom/blood and / or ../x", "phantom/blood and / or ../x"),
        ("https://x.org/y/z", "https://x.org/y/z"), ("5 %/10 %", "5 %/10 %"), (3, 3),
    ],
)  # fmt: skip
def test_folders_of_a_machine_are_left_out(text, shown):
    assert report.without_folders(text) == shown


def test_short_numbers():
    given = {-0.0001: ".000", -0.5: "-.500", 0.0: ".000", 1.0: "1.000", 12.345: "12.35", float("nan"): "–"}
    assert {value: report.short_number(value, 3) for value in given} == given


def image_rows(n=4):
    table = {
        "file": [f"class/{row}.png" for row in range(n)], "label": 0, "class_name": "NA", "predicted": 0,
        "predicted_name": "NA", "confidence": np.linspace(0.1, 0.9, n), "patient": "007",
    }  # fmt: skip
    return pd.DataFrame(table)


def test_images_of_a_run_stand_worst_first_with_their_pictures(run_dir):
    table = image_rows().assign(predicted=[0, 1, -1, 1], predicted_name=["NA", "b", "abstain", "b"])
    assert '<a href="images.html#images-01">' in save_card(run_dir, table=table)
    text = (run_dir / "images.html").read_text()
    rows = [[re.sub("<[^>]*>", "", cell) for cell in row[1:]] for row in shown_rows(text)]
    assert rows == [
        ["wrong", "class/3.png", "007", "NA", "b", ".900"], ["wrong", "class/1.png", "007", "NA", "b", ".367"],
        ["no answer", "class/2.png", "007", "NA", "abstain", ".633"],
        ["right", "class/0.png", "007", "NA", "NA", ".100"],
    ]  # fmt: skip
    assert re.findall('src="(.*?)"', text) == [f"images/01/{row}.png" for row in (3, 1, 2, 0)]
    assert all((run_dir / "images" / "01" / f"{row}.png").is_file() for row in range(4))
    assert "4 rows: 2 wrong, 1 without an answer, 1 right." in text
    assert "Not for clinical use" in text
    assert "Wrong answers: the largest certified radius first" in text


def test_a_page_without_pictures_has_rows(run_dir):
    save_card(run_dir, table=image_rows(), pictures=None)
    text = (run_dir / "images.html").read_text()
    assert "<img" not in text
    assert len(shown_rows(text)) == 4


def test_a_long_table_of_images_is_cut_and_the_page_says_so(run_dir):
    save_card(run_dir, table=image_rows(501), pictures=None)
    text = (run_dir / "images.html").read_text()
    assert len(shown_rows(text)) == 500
    assert 'The first 500 in this order stand here, all 501 in <a href="cards/01_images.csv">' in text
    assert "class/499.png" in text
    assert "class/500.png" not in text  # right and of the highest confidence


def test_what_differs_between_the_rows_has_a_column(run_dir):
    save_card(run_dir, table=image_rows().assign(dataset="d", method=["a", "a", "b", "b"], sigma=0.25))
    text = (run_dir / "images.html").read_text()
    assert re.findall("<th(?: [^>]*)?>(.*?)</th>", text) == [
        "picture", "answer", "method", "file", "patient", "class", "predicted", "confidence",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("of", "to", "reason"),
    [("class/0.png", "/home/x/0.png", "'/home/x/0.png' .* is an absolute path"), (",NA,0,", ",NA,one,", ".*one")],
)
def test_a_damaged_table_of_images_is_named(run_dir, of, to, reason):
    save_card(run_dir, table=image_rows())
    path = run_dir / "cards" / "01_images.csv"
    path.write_text(path.read_text().replace(of, to))
    with pytest.raises(ValueError, match=rf"01_images\.csv is no table of single images: .*{reason}.*Run the notebook"):
        report.write_report(run_dir)


def test_pages_of_notebooks_lead_to_their_neighbours_and_back(run_dir):
    text = (run_dir / "html" / "01_first.html").read_text()
    assert 'rel="prev"' not in text
    assert 'rel="next"' not in text
    for name in ("02_second", "03_third"):
        (run_dir / "notebooks" / f"{name}.ipynb").write_text((run_dir / "notebooks" / "01_first.ipynb").read_text())
    report.write_report(run_dir)
    ways = [
        re.findall(r'<a (?:rel="(\w+)" )?href="(.*?)"', page.read_text()) for page in sorted(run_dir.glob("html/*"))
    ]
    back, first, second, third = ("", "../index.html"), "01_first.html", "02_second.html", "03_third.html"
    assert ways == [
        2 * [back, ("next", second)],
        2 * [("prev", first), back, ("next", third)],
        2 * [("prev", second), back],
    ]


def test_code_is_folded_and_says_how_long_it_is(run_dir):
    text = (run_dir / "html" / "01_first.html").read_text()
    assert '<details class="code"><summary>code, 1 line</summary>' in text
    assert text.index("</details>") < text.index("seen")  # what it printed stays in sight


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
