import importlib
import io
import sys
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import medrobust_lib
from medrobust_lib.explore.instrument import Instrument, control, level_slider
from medrobust_lib.plots.panels import add_caption, fixed_figure


class Drawing:
    """A view that keeps count, fails on request and may leave figures open."""

    def __init__(self):
        self.asked = []

    def __call__(self, number):
        self.asked.append(number)
        figure = plt.figure(figsize=(1, 1), facecolor=(number / 10, 0, 0))
        if number == 7:
            plt.figure()
            raise ValueError("7 is <not> allowed; choose 0 to 6")
        return figure


@pytest.fixture
def drawing():
    return Drawing()


@pytest.fixture
def instrument(drawing):
    return Instrument(drawing, {"number": widgets.IntSlider(1, 0, 10)}, kept=3)


def red(instrument):
    return np.asarray(Image.open(io.BytesIO(instrument.picture.value)))[0, 0, 0]


def test_the_first_picture_is_there_at_once(instrument, drawing):
    assert drawing.asked == [1]
    assert red(instrument) == pytest.approx(255 * 0.1, abs=1)
    assert instrument.message.value == ""


def test_a_slider_has_a_name_a_tooltip_and_room(instrument):
    assert instrument.controls["number"].layout.width == "32em"
    sigma = level_slider([0.1, 0.5], 0.1)
    assert (sigma.description, sigma.tooltip) == ("sigma", "noise, in [0, 1] pixel units")
    assert control("Dropdown", "oracle", options=["a"]).tooltip == "oracle"
    wide = control("Dropdown", "adapter", options=["a"], layout={"width": "27em"})
    Instrument(lambda **values: plt.figure(figsize=(1, 1)), {"adapter": wide})
    assert (wide.layout.width, wide.layout.max_width) == ("27em", "100%")


def test_a_change_shows_the_picture_of_the_new_value(instrument):
    instrument.controls["number"].value = 5
    assert red(instrument) == pytest.approx(255 * 0.5, abs=1)


def test_going_back_draws_nothing(instrument, drawing):
    first = instrument.picture.value
    instrument.controls["number"].value = 2
    instrument.controls["number"].value = 1
    assert drawing.asked == [1, 2]
    assert instrument.picture.value == first


def test_only_the_latest_pictures_are_kept(instrument, drawing):
    for number in (2, 3, 4, 1):
        instrument.controls["number"].value = number
    assert drawing.asked == [1, 2, 3, 4, 1]  # the fourth picture pushed the first one out
    instrument.controls["number"].value = 4
    assert drawing.asked == [1, 2, 3, 4, 1]


def test_an_error_is_told_and_the_last_good_picture_stays(instrument, drawing):
    good = instrument.picture.value
    instrument.controls["number"].value = 7
    assert "ValueError: 7 is &lt;not&gt; allowed; choose 0 to 6" in instrument.message.value
    assert instrument.picture.value == good
    instrument.controls["number"].value = 2
    assert instrument.message.value == ""
    assert red(instrument) == pytest.approx(255 * 0.2, abs=1)
    # A failure is not kept: what was wrong may be mended by then.
    instrument.controls["number"].value = 7
    assert drawing.asked == [1, 7, 2, 7]


def test_going_back_to_a_kept_picture_takes_the_error_away(instrument):
    instrument.controls["number"].value = 7
    instrument.controls["number"].value = 1
    assert instrument.message.value == ""


def test_no_figure_stays_open(instrument):
    mine = plt.figure()
    for number in (3, 7, 4):
        instrument.controls["number"].value = number
    assert plt.get_fignums() == [mine.number]


def test_it_displays_its_widgets_controls_first(instrument):
    box, message, picture, caption = instrument.widget.children
    assert list(box.children) == [instrument.controls["number"]]
    assert (message, picture, caption) == (instrument.message, instrument.picture, instrument.caption)
    assert "application/vnd.jupyter.widget-view+json" in instrument._repr_mimebundle_()


def test_sentences_of_the_figure_are_shown_as_text_below_the_picture():
    def draw(number):
        figure = fixed_figure(2, 3)
        figure.add_artist(plt.Rectangle((0, 0.5), 1, 0.5, color="k"))
        add_caption(figure, 2.5, f"p < {number}\nand no more")
        return figure

    instrument = Instrument(draw, {"number": widgets.IntSlider(1, 0, 10)})
    assert ">p &lt; 1<br>and no more<" in instrument.caption.value
    height, width, _ = np.asarray(Image.open(io.BytesIO(instrument.picture.value))).shape
    assert 135 <= height <= 148  # of 270: the lower half, where the sentences were, is cut off
    assert width == 180
    instrument.controls["number"].value = 2
    instrument.controls["number"].value = 1
    assert "p &lt; 1" in instrument.caption.value


def test_a_hint_is_shown_as_text(drawing):
    instrument = Instrument(drawing, {"number": widgets.IntSlider()}, hint="a < b")
    assert instrument.widget.children[1].value == "<small>a &lt; b</small>"


def test_it_remembers_at_least_what_it_shows(drawing):
    with pytest.raises(ValueError, match="kept=0"):
        Instrument(drawing, {}, kept=0)


def test_a_level_slider_begins_at_the_nearest_level():
    slider = level_slider((0.0, 0.1, 0.5), 0.24)
    assert slider.value == 0.1
    assert not slider.continuous_update


def test_the_views_need_no_widgets(monkeypatch):
    library = Path(medrobust_lib.__file__).parent
    asking = {path.parent.name for path in library.rglob("*.py") if "ipywidgets" in path.read_text(encoding="utf-8")}
    assert asking <= {"explore"}
    for name in [name for name in sys.modules if name.startswith("medrobust_lib.explore")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(medrobust_lib, "explore", raising=False)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert importlib.import_module("medrobust_lib.explore").similarity_view
