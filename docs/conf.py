"""Sphinx: README, the pages of docs/, the notebooks as committed and the library's docstrings as one site.

The source folder is the repository itself, so that every relative link works on the site as it does in a checkout.
Nothing is executed, nothing is fetched, and the pages load nothing from a network.
"""

import re
import shutil
from pathlib import Path
from types import GenericAlias
from typing import Any

import medrobust_lib as mr  # before torchvision-based packages

# isort: split
from docutils import nodes
from latex2mathml.converter import convert as latex_to_mathml
from sphinx.application import Sphinx

project = "medrobust"
author = copyright = "medrobust contributors"
version = release = mr.__version__
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**", "notebooks/*.ipynb"]
exclude_patterns = [".*", "build", "runs", "data", "weights", "studies", "docs/_*", "**/.ipynb_checkpoints"]
templates_path = [str(Path(__file__).parent / "_templates")]  # autosummary looks below the source folder otherwise

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode", "numpydoc"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # the default would be loaded from a network
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
default_role = "code"
numpydoc_show_class_members = False
html_math_renderer = "mathml"

html_theme = "pydata_sphinx_theme"
html_title = "medrobust"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"**": ["contents.html"]}
html_theme_options = {
    "navbar_center": [],
    "navbar_persistent": ["search-button"],
    "secondary_sidebar_items": ["page-toc"],
    "article_footer_items": ["prev-next"],
    "footer_start": ["not-for-clinical-use.html"],
    "footer_end": [],
}

GUIDES = ["your_own", "certificates", "corruptions", "adaptation", "adapters", "generative", "studies", "cluster"]
OTHER_PAGES = sorted({page.stem for page in Path(__file__).parent.glob("*.md")} - {*GUIDES})
CONTENTS = {  # of the sidebar
    "Notebooks": ["notebooks/*"],
    "Guides": [f"docs/{page}" for page in GUIDES],
    "Reference": ["docs/api", *(f"docs/{page}" for page in OTHER_PAGES), "CONTRIBUTING", "CHANGELOG"],
}


def setup(app: Sphinx) -> None:
    """Register what is particular to this site."""
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("source-read", complete_source)
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("build-finished", name_front_page)


def complete_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """Add the contents to the front page, and let links to the library's files lead to their documentation."""
    source[0] = re.sub(
        r"\]\((?:\.\./)?medrobust_lib/([\w/]+)\.py\)",
        lambda link: f"](/docs/api/medrobust_lib.{link[1].replace('/', '.')}.rst)",
        source[0],
    )
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            listed = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{listed}\n```\n"


def skip_aliases(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Leave out names of types such as ``dict[str, int]``, at whose signature Sphinx 9.0 stops."""
    return True if isinstance(member, GenericAlias) else None


def write_math(translator: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers draw without a script."""
    block = isinstance(node, nodes.math_block)
    formula = latex_to_mathml(node.astext(), display="block" if block else "inline")
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def name_front_page(app: Sphinx, error: Exception | None) -> None:
    """Let the front page be found as index.html, too."""
    if error is None:
        shutil.copyfile(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")
