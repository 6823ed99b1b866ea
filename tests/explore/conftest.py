import matplotlib.pyplot as plt
import pytest

from medrobust_lib import load_dataset, load_model


@pytest.fixture(scope="session")
def model():
    return load_model("demo-clip", device="cpu")


@pytest.fixture(scope="session")
def data():
    return load_dataset("phantom/blood", n=8)


@pytest.fixture(scope="session")
def histology():
    """Nine classes, some with long names."""
    return load_dataset("phantom/histology", n=9)


@pytest.fixture(scope="session")
def texts(model, data):
    return model.class_features(data.classes, data.templates[:1])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def overlaps():
    """Pairs of texts of a figure that lie on each other, and texts that leave it."""

    def find(figure):
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        undrawn = [label for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for label in _undrawn(ax, axis)]
        texts = [
            text
            for text in figure.findobj(plt.Text)
            if text.get_text().strip() and text.get_visible() and text not in undrawn
        ]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        # One pixel of two boxes may touch: ascenders and descenders are counted, seen or not.
        shrunk = [(name, box.padded(-1.5)) for name, box in boxes]
        pairs = [
            (one, other)
            for i, (one, a) in enumerate(shrunk)
            for other, b in shrunk[i + 1 :]
            if a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1
        ]
        width, height = figure.canvas.get_width_height()
        outside = [name for name, box in shrunk if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
        return pairs, outside

    return find


def _undrawn(ax, axis):
    """Labels of ticks that are out of view or belong to axes that are switched off."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if not (ax.axison and low <= tick.get_loc() <= high)]
