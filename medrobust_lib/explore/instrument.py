"""What all instruments share: controls above one picture, errors in words, and pictures kept for going back."""

import gc
import html
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from medrobust_lib.plots.panels import take_caption

if TYPE_CHECKING:
    from ipywidgets import Widget

logger = logging.getLogger(__name__)

_KEPT = 64
_DPI = 90  # sharp enough on a screen; every dot more is paid for at every move
_WIDTH = "32em"  # of a control: a slider of 300 pixels has a name and a value beside it
_MARGIN = 10  # pixels below the lowest panel


class Instrument:
    """Controls above the picture that they redraw.

    A picture is a function of the controls' values alone; the latest ones are kept, so that going back shows them at
    once. What goes wrong is told in a line between controls and picture, and the last good picture stays.

    Parameters
    ----------
    draw : callable
        From the values of the controls, by name, to a figure.
    controls : mapping of str to Widget
        In the order in which they are shown; values must be hashable.
    hint : str
        A line of help below the controls.
    kept : int
        Pictures to remember, at least 1.

    Attributes
    ----------
    controls : dict of str to Widget
    picture : ipywidgets.Image
        PNG.
    message : ipywidgets.HTML
        Empty where all is well.
    caption : ipywidgets.HTML
        What the figure says in sentences.
    widget : ipywidgets.VBox
        What is displayed.
    """

    def __init__(
        self, draw: Callable[..., Figure], controls: Mapping[str, "Widget"], *, hint: str = "", kept: int = _KEPT
    ) -> None:
        import ipywidgets as widgets

        if kept < 1:
            raise ValueError(f"kept={kept}: at least the picture that is shown is remembered")
        self.controls = dict(controls)
        # No alternative text comes with this widget; the controls and the line below them say what is drawn.
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.message = widgets.HTML(layout=widgets.Layout(min_height="1.6em"))
        self.caption = widgets.HTML(layout=widgets.Layout(max_width="75em"))
        # Only what worked is kept: an error is none of the cache's results.
        self._shown = lru_cache(kept)(lambda **values: picture_of(partial(draw, **values)))
        for widget in self.controls.values():
            widget.style = {"description_width": "7.5em"}
            widget.layout.width, widget.layout.max_width = widget.layout.width or _WIDTH, "100%"
            widget.observe(self._changed, "value")
        help_lines = [widgets.HTML(f"<small>{html.escape(hint)}</small>")] if hint else []
        rows = widgets.Box(list(self.controls.values()), layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = widgets.VBox([rows, *help_lines, self.message, self.picture, self.caption])
        self.redraw()

    def redraw(self) -> None:
        """Show the picture of the present values: a kept one, or a new one."""
        values = {name: widget.value for name, widget in self.controls.items()}
        self.message.value = "<small>computing …</small>"
        try:
            self.picture.value, self.caption.value = self._shown(**values)
            self.message.value = ""
        except Exception as error:  # whatever it is, a person at the sliders has to read it
            logger.info("the instrument failed at %s", values, exc_info=True)
            what = html.escape(f"{type(error).__name__}: {error}")
            told = f'<span style="color:#a00000">{what}</span>'
            self.message.value = f"{told}<br><small>The picture shows the last values that worked.</small>"

    def _changed(self, change: Mapping[str, Any]) -> None:
        # A figure is full of cycles. They are collected at once, and nothing else is: left alone they grow old, and now
        # and then a collection of everything, with models and libraries in memory, takes longer than drawing does.
        enabled = gc.isenabled()
        gc.disable()
        try:
            self.redraw()
        finally:
            if enabled:
                gc.enable()
            gc.collect(1)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.widget._repr_mimebundle_(**options)


def picture_of(draw: Callable[[], Figure]) -> tuple[bytes, str]:
    """PNG of the figure that a function draws, and its caption as HTML; figures it opened are closed, come what may."""
    before = set(plt.get_fignums())
    try:
        figure = draw()
        caption = "<br>".join(html.escape(line) for line in take_caption(figure).splitlines())
        figure.set_dpi(_DPI)
        # `savefig` draws a figure of an automatic layout twice, and encodes transparency that is not there.
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        if caption:  # where it was is nothing now
            pixels = pixels[: np.flatnonzero((pixels != pixels[-1, -1]).any((1, 2)))[-1] + _MARGIN]
        png = io.BytesIO()
        # More compression takes longer than sending the bytes to a browser on the same computer.
        Image.fromarray(np.ascontiguousarray(pixels)).save(png, format="png", compress_level=1)
        return png.getvalue(), f'<div style="line-height:1.4;font-size:90%">{caption}</div>' if caption else ""
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def control(kind: str, description: str, **options: Any) -> "Widget":
    """Widget of ipywidgets by the name of its class; a slider or text tells its value when it is left, not before.

    ``tooltip`` says what the description is too short for, such as units.
    """
    import ipywidgets

    when_left = {} if kind == "Dropdown" else {"continuous_update": False}
    return getattr(ipywidgets, kind)(description=description, **{"tooltip": description} | when_left | options)


def image_slider(length: int, first: int = 0) -> "Widget":
    """Slider over the images of a data set."""
    told = "which image of the data set, from 0"
    return control("IntSlider", "image", value=first, min=0, max=length - 1, tooltip=told)


def level_slider(
    levels: Sequence[float], value: float, description: str = "sigma", tooltip: str = "noise, in [0, 1] pixel units"
) -> "Widget":
    """Slider over given noise levels, or other numbers; it begins at the one that is nearest to `value`."""
    nearest, options = min(levels, key=lambda level: abs(level - value)), [(f"{level:g}", level) for level in levels]
    return control("SelectionSlider", description, options=options, value=nearest, tooltip=tooltip)
