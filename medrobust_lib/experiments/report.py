"""What a run left, to be read: one static page that needs no network, and tables in a terminal."""

import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import typer
from jinja2 import Environment, PackageLoader, StrictUndefined
from latex2mathml import exceptions
from latex2mathml.converter import convert as latex_to_mathml
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from pygments.formatters import HtmlFormatter
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from medrobust_lib.experiments import read_cards, write_text_atomically
from medrobust_lib.experiments.cards import CAPTION_KEY, without_folders
from medrobust_lib.experiments.images import SHOWN_IMAGES, read_image_table, worst_first
from medrobust_lib.experiments.leaderboards import RANKS, comparable_tables
from medrobust_lib.files import parsed
from medrobust_lib.places import VERSION

_MATH = re.compile(r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.DOTALL)
# The converter's errors share no base of their own.
_REFUSALS = tuple(kind for kind in vars(exceptions).values() if isinstance(kind, type))
_HEADING = re.compile(r"^#+ +(.+)", re.MULTILINE)
WIDE = 1.9  # width over height from which a figure gets the whole row
_RADIUS = r"(?:^|, )(radius=[^,\s]+)(?: \(the draws reach [^)]+\))?"
_MEASURED_ON = ["dataset", "model", "of", "n"]
_PLAIN_NAME = re.compile(r"\w[\w.-]*")
# Options of rich's columns: numbers are never broken over lines, long names are.
_NUMBER = {"justify": "right", "no_wrap": True}
_FOLDED = {"overflow": "fold"}
_RAMP = " .:-=+*#%@"
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
)
NOTICE = "For teaching and research. Not for clinical use."


def write_report(run_dir: Path, *, running: Sequence[str] = ()) -> Path:
    """Write ``index.html`` of a run, and one page per executed notebook under ``html/``.

    The page of a notebook that has not changed since it was drawn is left as it is.

    Parameters
    ----------
    run_dir : Path
        A run folder with ``cards/`` or ``notebooks/``; ``figures/`` are used where they exist. A notebook
        without a card is shown as one that did not reach its end.
    running : sequence of str
        Numbers of notebooks that are not finished yet: the index names them and loads itself anew.

    Returns
    -------
    Path
        The index page.

    Raises
    ------
    FileNotFoundError
        The folder holds neither result cards nor executed notebooks.
    ValueError
        A card, a figure or a notebook is damaged, or a card names a file outside the folder; it is named.
    """
    run_dir = Path(run_dir)
    pages = {path.name.split("_")[0]: path for path in sorted((run_dir / "notebooks").glob("*.ipynb"))}
    pages = {number: path for number, path in pages.items() if number not in running}
    neighbours = dict(zip(pages, zip([None, *pages.values()], [*pages.values(), None][1:], strict=False), strict=True))
    cards = read_cards(run_dir, nested=False) if any((run_dir / "cards").glob("*.json")) or not pages else []
    finished = {card.get("notebook") for card in cards}
    unfinished = []
    for number, path in pages.items():
        with parsed(f"{path} is not a readable notebook", "Delete it, or run it again."):
            notebook = nbformat.read(path, as_version=4)
            # Papermill puts a note before the title of a notebook that failed.
            lines = (
                line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()
            )
            title = next((line.removeprefix("# ") for line in lines if line.startswith("# ")), path.stem)
            title = title.removeprefix(f"{number} ")
            page = run_dir / "html" / f"{path.stem}.html"
            beside = [one and one.stem for one in neighbours[number]]
            drawn = f"{VERSION} {hashlib.sha256(path.read_bytes() + repr(beside).encode()).hexdigest()}"
            if not page.is_file() or f'content="{drawn}"' not in page.read_text(encoding="utf-8"):
                body = Markup(notebook_body(notebook))
                write_page(page, "notebook", title=title, number=number, body=body, drawn=drawn, beside=beside)
        if number not in finished:
            unfinished.append({"number": number, "title": title, "path": path})
    shown = {"title": run_dir.resolve().name, "synthetic": any(card["dataset"].get("synthetic") for card in cards)}
    shown |= {"sections": [_section(card, run_dir, pages) for card in cards], "cards": cards}
    tables = [_images(card, run_dir) for card in cards if card["images"]]
    if tables:
        write_page(run_dir / "images.html", "images", tables=tables, **shown)
    return write_page(run_dir / "index.html", "index", unfinished=unfinished, running=running, **shown)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill one of the package's templates, with style and notice, and return the page's path."""
    # A style of code whose text reaches a contrast of at least 4.5 on a near-white background.
    colours = HtmlFormatter(style="xcode").get_style_defs(".highlight")
    style = Markup(_filled("style.css") + colours)
    write_text_atomically(path, _filled(f"{template}.html.j2", **values, style=style, notice=NOTICE))
    return path


def _filled(template: str, **values: Any) -> str:
    """Text of a template of the package; a value that it lacks is an error."""
    loader = PackageLoader("medrobust_lib", "templates")
    spaces = {"trim_blocks": True, "lstrip_blocks": True}
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **spaces)
    templates.globals |= {"interval_text": interval_text, "short_number": short_number}
    templates.filters["without_folders"] = lambda value: without_folders(str(value))
    return templates.get_template(template).render(**values)


def notebook_body(notebook: nbformat.NotebookNode) -> str:
    """Render a notebook to the inside of an HTML page that loads nothing from anywhere.

    Formulas become MathML, which browsers draw by themselves; figures stay embedded.
    """
    from nbconvert import HTMLExporter

    # The notebook is shown, not changed: the caller's object keeps its LaTeX.
    notebook = nbformat.from_dict(notebook)
    heading = "a notebook"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = ([heading] + _HEADING.findall(cell.source))[-1]
            cell.source = math_to_mathml(cell.source)
        for output in cell.get("outputs", ()):
            for kind in output.get("data", ()):
                if kind.startswith("image/"):  # what a screen reader says
                    output.metadata.setdefault(kind, {}).setdefault("alt", f"Figure in: {heading}")
    ours = {"template_file": "cells.html.j2", "extra_loaders": [PackageLoader("medrobust_lib", "templates")]}
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, **ours)
    return exporter.from_notebook_node(notebook)[0]


def math_to_mathml(markdown: str) -> str:
    """Replace ``$...$`` and ``$$...$$`` by MathML, outside code spans and fences.

    A formula with a command that the converter does not know stays as it was written.
    """

    def replace(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        latex = (match["block"] or match["inline"]).strip()
        try:
            mathml = latex_to_mathml(latex, display="block" if match["block"] else "inline")
        except _REFUSALS:
            mathml = "\\"
        # Unknown commands are copied, backslash and all, and half a formula reads worse than its source.
        return f"`{latex}`" if "\\" in mathml else mathml

    return _MATH.sub(replace, markdown)


def _section(card: Mapping[str, Any], run_dir: Path, pages: Mapping[str, Path]) -> Markup:
    """What the index shows of one card; links are relative to the index."""
    with parsed(f"{run_dir / 'cards'}: the card of notebook {card.get('notebook')!r} is damaged", "Run it again."):
        for name in (card["notebook"], *card["tables"], *filter(None, [card["images"]])):
            if not _PLAIN_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a notebook or table")
        figures = (run_dir / "figures").glob(f"{card['notebook']}_*.png")
        # The headline first, then as the notebook drew them.
        figures = sorted(figures, key=lambda path: (not path.stem.endswith("_headline"), path.stat().st_mtime_ns))
        shown = {"figures": [described_figure(path) for path in figures], "notebook": pages.get(card["notebook"])}
        return Markup(_filled("card.html.j2", card=card, numbers=_numbers(card), **shown))


def _numbers(card: Mapping[str, Any]) -> pd.DataFrame:
    """The metrics of a card side by side: a row for what they were measured on, a column for each metric and radius."""
    own = {name: card[name].get("id", "") for name in ("dataset", "model")}
    rows = ({**metric, **{name: metric.get(name) or id for name, id in own.items()}} for metric in card["metrics"])
    table = pd.DataFrame(rows, columns=[*_MEASURED_ON, "name", "value", "low", "high"])
    radius = table["of"].str.findall(_RADIUS).str.join("")
    table["metric"] = table["name"].str.replace("_", " ") + (", " + radius).where(radius != "", "")
    table["of"] = table["of"].str.replace(_RADIUS, "", regex=True).str.removeprefix(", ")
    table["value"] = [interval_text(row) for row in table.itertuples()]
    # What two metrics say of the same stands side by side: nothing is left out.
    shown = table.pivot_table("value", _MEASURED_ON, "metric", aggfunc=" / ".join, sort=False, fill_value="")
    return shown.reset_index()


def _images(card: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """What the page of images shows of one card: the rows of its per-image table, those that need a look first."""
    path = run_dir / "cards" / f"{card['images']}.csv"
    table = read_image_table(path)
    said = table["predicted"]
    table["verdict"] = np.select([said == -1, said != table["label"]], ["no answer", "wrong"], "right")
    order = worst_first(table)[:SHOWN_IMAGES]
    several = [name for name in ("dataset", "model", "method", "sigma") if name in table and table[name].nunique() > 1]
    rows = table.iloc[order].to_dict("records")
    for row, record in zip(order, rows, strict=True):
        picture = Path("images", card["notebook"], f"{row}.png")
        record["picture"] = picture.as_posix() if (run_dir / picture).is_file() else ""
    return {"card": card, "rows": rows, "n": len(table), "counts": table["verdict"].value_counts(), "several": several}


def described_figure(figure: Path) -> dict[str, Any]:
    """Caption of a figure, from the file itself or else from its name, and whether it wants a whole row."""
    name = figure.stem.partition("_")[2].replace("_", " ")
    with Image.open(figure) as picture:
        caption = picture.info.get(CAPTION_KEY) or name[:1].upper() + name[1:]
        return {"path": figure, "caption": caption, "wide": picture.width / picture.height > WIDE}


def show(table: pd.DataFrame, *, title: str, right: Sequence[str] = ()) -> None:
    """Print a table; the columns ``right`` are set as numbers, which are never broken over lines."""
    shown = {}
    for position, column in enumerate(table.columns):
        number = column in right or (pd.api.types.is_numeric_dtype(table[column]) and table[column].dtype != bool)
        # A number that is broken over lines cannot be read; where it gets narrow, the names are folded.
        whole = {"no_wrap": number or (position == 0 and not right)}
        shown[str(column).replace("_", " ")] = {"justify": "right" if number else "left", "overflow": "fold", **whole}
    _show_block(title, "", shown, [[_cell(value) for value in row] for row in table.itertuples(index=False)])


def show_text(markup: str) -> None:
    """Print a sentence in rich's markup, folded at the width of the terminal."""
    Console(highlight=False).print(markup)


def show_images(images: Sequence[NDArray[np.uint8]]) -> None:
    """Print square images uint8 [H, H, 3] side by side, as characters: in colour, or else their lightness."""
    console = Console()
    side = max(2, min(32, console.width // len(images) - 2) // 2 * 2)
    coloured = console.color_system and not console.no_color and console.encoding.startswith("utf")
    small = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX)) for image in images]
    text = Text()
    for row in range(0, side, 2):  # a character is about twice as high as wide
        for image in small:
            for above, below in zip(image[row], image[row + 1], strict=True):
                if coloured:
                    text.append("▀", style="rgb({},{},{}) on rgb({},{},{})".format(*above, *below))
                else:
                    text.append(_RAMP[round((above.mean() + below.mean()) / 510 * (len(_RAMP) - 1))])
            text.append("  ")
        text.append("\n")
    console.print(text, end="")


def show_json(table: pd.DataFrame) -> None:
    """Print every row and column as JSON records."""
    typer.echo(json.dumps(json.loads(table.to_json(orient="records")), indent=2))


def show_ranking(table: pd.DataFrame) -> None:
    """Print a leaderboard: one narrow table for what can be compared, see `comparable_tables`."""
    for heading, rows in comparable_tables(table):
        texts, (title, _, rest) = ranking_texts(rows), heading.partition(" on ")
        columns = dict.fromkeys(texts, _FOLDED) | dict.fromkeys(texts.columns[:3], _NUMBER)
        _show_block(title, f" on {rest}", columns, texts.to_numpy())
    show_text(RANKS)


def ranking_texts(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells of one of the `comparable_tables` as texts: rank, value with interval, n, model, of, run."""
    runs = [
        f"{run} (+{more:.0f} more)" if more > 0 else run
        for run, more in zip(rows["run"], rows["runs"] - 1, strict=True)
    ]
    texts = {
        "#": rows["rank"],
        "value [95 %]" if rows["low"].notna().any() else "value": [interval_text(row) for row in rows.itertuples()],
        "n": rows["n"].map("{:.0f}".format, na_action="ignore"),
        "model": rows["model"],
        "of": rows["method"],
        "run": runs,
    }
    return pd.DataFrame(texts).fillna("")


def ranking_markdown(table: pd.DataFrame) -> str:
    """A leaderboard as Markdown."""
    blocks = []
    for heading, rows in comparable_tables(table):
        texts = ranking_texts(rows).map(_markdown)
        lines = [texts.columns, ["---"] * len(texts.columns), *texts.to_numpy()]
        blocks.append(f"### {_markdown(heading)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join([*blocks, f"{RANKS} {NOTICE}\n"])


def _markdown(text: str) -> str:
    return html.escape(text, quote=False).replace("|", r"\|")


def ranking_latex(table: pd.DataFrame) -> str:
    """A leaderboard as LaTeX tables, for the package booktabs."""
    blocks = []
    for heading, rows in comparable_tables(table):
        texts = ranking_texts(rows).rename(columns=_latex).map(_latex)
        blocks.append(texts.style.hide(axis="index").to_latex(hrules=True, caption=_latex(heading)))
    return "\n".join([*blocks, f"% {RANKS} {NOTICE}\n"])


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def show_comparison(table: pd.DataFrame) -> None:
    """Print one table per data set, models and metric of what `compare_runs` found."""
    columns = {**dict.fromkeys(("A", "B", "difference", "n"), _NUMBER), "kind": {"no_wrap": True}}
    columns |= {"p": _NUMBER} if table["p"].notna().any() else {}
    for (dataset, models, metric), block in table.groupby(["dataset", "model", "metric"], sort=False):
        rows = []
        for row in block.itertuples():
            interval = "" if pd.isna(row.low) else f" [{_signed(row.low, 2)}, {_signed(row.high, 2)}]"
            values = short_number(row.value_a, 3), short_number(row.value_b, 3), _signed(row.difference, 3) + interval
            p = ["" if pd.isna(row.p) else f"{row.p:.2g}"] if "p" in columns else []
            rows.append((*values, row.n, row.kind, *p, row.of))
        Console().print()
        _show_block(metric.replace("_", " "), f" on {dataset}, {models}", {**columns, "of": _FOLDED}, rows)


def _show_block(title: str, rest: str, columns: Mapping[str, Mapping[str, Any]], rows: Sequence[Sequence[Any]]) -> None:
    """Print a heading, its title in bold, and a table without a frame.

    ``columns`` are names with the options of rich's columns.
    """
    console = Console(highlight=False)
    console.print(f"[bold]{escape(title)}[/]{escape(rest)}")
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, options in columns.items():
        shown.add_column(name, **options)
    for row in rows:
        shown.add_row(*(escape(str(cell)) for cell in row))
    console.print(shown)


def interval_text(row: Any) -> str:
    """The value of a row and its interval, as short as they can be told: ``.764 [.70, .82]``."""
    value = short_number(row.value, 3)
    return value if pd.isna(row.low) else f"{value} [{short_number(row.low, 2)}, {short_number(row.high, 2)}]"


def short_number(value: float, digits: int) -> str:
    """No zero before the point, and four figures from ten on; a dash for what could not be measured."""
    if pd.isna(value):
        return "–"
    # What rounds to zero has no sign.
    text = f"{value:z.{digits}f}" if abs(value) < 10 else f"{value:.4g}"
    return re.sub(r"^(-?)0(?=\.)", r"\1", text)


def duration(seconds: float) -> str:
    """Seconds in a unit that a person can grasp."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _signed(value: float, digits: int) -> str:
    text = short_number(abs(value), digits)
    # What rounds to zero, and what could not be measured, has no sign.
    zero = not text.strip("0.–")
    return text if zero else ("-" if value < 0 else "+") + text


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:z.4g}"
    return "" if value is None else str(value)
