"""The site that `make docs` built: all pages are in its contents, nothing comes from a network, formulas are there.

That nothing warned is checked by the build itself, whose warnings are errors.
"""

import json
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

import medrobust_lib as mr

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "docs" / "_build" / "html"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCES = [*PAGES, *NOTEBOOKS, *(ROOT / "docs").glob("**/*.rst"), *ROOT.glob("medrobust_lib/**/*.py")]
SOURCES += [ROOT / "docs" / "conf.py", *(ROOT / "docs" / "_templates").glob("**/*"), *(ROOT / "docs").glob("_static/*")]


@pytest.fixture(scope="module")
def html():
    """Text of every page of the site, by its path below the site."""
    front = SITE / "index.html"
    if not front.is_file() or front.stat().st_mtime < max(path.stat().st_mtime for path in SOURCES):
        pytest.skip("no site was built from the present sources: `make docs` builds it")
    pages = [path for path in SITE.rglob("*.html") if "_static" not in path.parts]
    return {str(path.relative_to(SITE)): path.read_text(encoding="utf-8") for path in pages}


def test_every_page_and_notebook_is_in_the_contents(html):
    contents = re.search(r'<nav class="bd-links" aria-label="Contents">.*?</nav>', html["index.html"], re.DOTALL)[0]
    linked = set(re.findall(r'href="([^"#]+)"', contents))
    wanted = {f"{path.relative_to(ROOT).with_suffix('')}.html" for path in [*PAGES, *NOTEBOOKS]} - {"README.html"}
    assert wanted <= linked
    assert wanted <= html.keys()
    assert "docs/api.html" in linked


def test_every_link_inside_the_site_leads_somewhere(html):
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in html.items()}
    lost = set()
    for page, text in html.items():
        if page.startswith("_modules"):  # viewcode's way back is wrong for names that a room offers again
            continue
        for target in set(re.findall(r'<(?:a|link|img|script)\b[^>]*?\b(?:href|src)="([^"]+)"', text)):
            path, _, anchor = unquote(unescape(target)).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            file = (SITE / page).parent / path.partition("?")[0] if path else SITE / page
            name = str(file.resolve().relative_to(SITE.resolve()))
            if not file.is_file() or (anchor and name in anchors and anchor not in anchors[name]):
                lost.add(f"{page}: {target}")
    assert sorted(lost) == []


def test_nothing_is_loaded_from_a_network(html):
    for page, text in html.items():
        for tag in re.findall(r"<(?:script|link|img|iframe|source|video|audio|object)\b[^>]*>", text):
            assert not re.search(r"""(?:src|href|data|srcset)=["']?\s*(?:https?:)?//""", tag), f"{page}: {tag}"
    for style in SITE.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?\s*(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_formulas_are_drawn_without_a_script(html):
    for path in NOTEBOOKS:
        cells = [
            cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown"
        ]
        displayed = sum("".join(cell["source"]).count("$$") for cell in cells) // 2
        page = html[f"notebooks/{path.stem}.html"]
        assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') >= displayed
        assert not re.search(r"<p>[^<]*\$\$", page)


def test_the_index_for_the_search_knows_the_pages(html):
    index = (SITE / "searchindex.js").read_text(encoding="utf-8")
    for path in [*PAGES, *NOTEBOOKS]:
        assert f'"{path.relative_to(ROOT).with_suffix("")}"' in index
    assert "search.html" in html


def test_no_page_tells_of_this_computer(html):
    assert [page for page, text in html.items() if str(ROOT) in text] == []


def test_pages_say_what_they_are_not_for(html):
    for page, text in html.items():
        assert re.search("not for clinical use", text, re.IGNORECASE), page


def test_the_page_of_the_library_names_what_the_package_offers():
    page = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    listed = re.findall(r"^   ~?(medrobust_lib\.\S+)$", page, re.MULTILINE)
    offered = {f"{mr._HOMES[name]}.{name}" for name in mr.__all__}
    rooms = {f"medrobust_lib.{path.parent.name}" for path in ROOT.glob("medrobust_lib/[a-z]*/__init__.py")}
    assert {*listed} >= offered | rooms
