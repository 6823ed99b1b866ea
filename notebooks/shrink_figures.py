"""Store the figures of executed notebooks with 256 colours, so that the files stay small in version control.

Run by ``make nb-refresh``; the figures that a run saves to disk are not touched.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image


def shrink(png: str) -> str:
    """Reduce a base64 PNG to a palette of 256 colours."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


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
