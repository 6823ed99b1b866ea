"""Write a labelled contact sheet of synthetic phantoms: one row a class, one block of columns a site.

"all" gives an overview instead: one row a modality.

The phantoms are seeded drawings that imitate six imaging modalities. They are not patients' images.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from medrobust_lib.files import reported_errors, whole_file
from medrobust_lib.phantoms import LARGEST, MODALITIES, SITES, SMALLEST, phantom_classes, render_phantoms

ALL = "all"
OVERVIEW_COLUMNS = 9
Modality = StrEnum("Modality", {name: name for name in (*MODALITIES, ALL)})
Site = StrEnum("Site", {name: name for name in SITES})

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    modality: Annotated[Modality, typer.Argument(help="Imaging modality that the phantoms imitate.")],
    site: Annotated[
        list[Site] | None,
        typer.Option(help="Acquisition site; repeat the option for several, both by default."),
    ] = None,
    image_size: Annotated[int, typer.Option(min=SMALLEST, max=LARGEST, help="Side in pixels.")] = 128,
    samples: Annotated[int, typer.Option(min=1, max=40, help="Images a class and site.")] = 6,
    output: Annotated[
        Path | None, typer.Option(help="PNG to write; default phantoms-MODALITY.png in the current folder.")
    ] = None,
) -> None:
    """Draw the sheet and say where it is."""
    with reported_errors():
        sites = [choice.value for choice in site or Site]
        if modality.value == ALL:
            figure = overview(site=sites[-1], image_size=image_size)
        else:
            figure = contact_sheet(modality.value, sites=sites, image_size=image_size, samples=samples)
        path = output or Path(f"phantoms-{modality.value}.png")
        with whole_file(path) as part:
            figure.savefig(part, format=path.suffix[1:] or "png", dpi=110)
    typer.echo(f"wrote {path}")


def contact_sheet(modality: str, *, sites: list[str], image_size: int, samples: int) -> Figure:
    """Draw the first test phantoms of every class, sites side by side.

    Parameters
    ----------
    modality : str
        One of ``medrobust_lib.phantoms.MODALITIES``.
    sites : list of {"A", "B"}
    image_size : int
        Side of each phantom in pixels.
    samples : int
        Images of each class at each site.

    Returns
    -------
    matplotlib.figure.Figure
    """
    classes = phantom_classes(modality)
    # One narrow empty column between the sites.
    widths = [width for _ in sites for width in (*[1.0] * samples, 0.15)][:-1]
    # Wide enough for the title, which must never be cut.
    width, height = max(1.8 + 1.05 * sum(widths), 5.0), 0.7 + 1.05 * len(classes)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{modality}, {image_size} px: synthetic phantoms, not patients' images", fontsize=10)
    axes = figure.subplots(len(classes), len(widths), squeeze=False, width_ratios=widths)
    for gap in axes[:, samples :: samples + 1].flat:
        gap.set_axis_off()
    for number, site in enumerate(sites):
        block = axes[:, number * (samples + 1) :][:, :samples]
        block[0, 0].set_title(f"site {site}", loc="left", fontsize=9)
        images, labels = render_phantoms(
            modality, range(samples * len(classes)), split="test", site=site, image_size=image_size
        )
        for label, row in enumerate(block):
            for axis, image in zip(row, images[labels == label], strict=True):
                axis.imshow(image, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
    for name, axis in zip(classes, axes[:, 0], strict=True):
        axis.set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    return figure


def overview(*, site: str, image_size: int) -> Figure:
    """Draw one row of phantoms per modality, going through its classes again and again."""
    figure = Figure(figsize=(1.0 * OVERVIEW_COLUMNS + 1.1, 1.05 * len(MODALITIES) + 0.4), layout="constrained")
    figure.suptitle("synthetic phantoms, not patients' images", fontsize=10)
    axes = figure.subplots(len(MODALITIES), OVERVIEW_COLUMNS)
    for modality, row in zip(MODALITIES, axes, strict=True):
        images, _ = render_phantoms(modality, range(OVERVIEW_COLUMNS), split="test", site=site, image_size=image_size)
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(modality, rotation=0, ha="right", va="center", fontsize=9)
    return figure


if __name__ == "__main__":
    app()
