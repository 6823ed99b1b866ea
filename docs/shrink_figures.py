"""Store the figures of executed notebooks with few colours, so that the files stay small in version control.

Run by ``make nb-refresh``; the figures that a run saves to disk are not touched.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image

LARGE = 15_000  # bytes; beyond it fewer colours, chosen with more care, look the same


def shrink(png: str) -> str:
    """Reduce a base64 PNG to a palette of 256 colours, a large one to 64."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    smaller = _with_colours(picture, 256)
    if len(smaller) > LARGE:
        smaller = _with_colours(picture, 64)
    return base64.b64encode(smaller).decode("ascii")


def _with_colours(picture: Image.Image, colours: int) -> bytes:
    buffer = io.BytesIO()
    reduced = picture.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    reduced.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(paths: list[str]) -> None:
    """Shrink every PNG output of the notebooks in place."""
    for path in map(Path, paths):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = shrink(output.data["image/png"])
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
