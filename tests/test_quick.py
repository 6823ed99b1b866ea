"""The first look in a terminal."""

import re

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from medrobust_lib.cli import app
from medrobust_lib.quick import MODELS, picture


@pytest.fixture(scope="module")
def printed():
    result = CliRunner().invoke(app, ["quick"], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.output


def test_it_shows_an_image_that_gets_worse(printed):
    truth, before, after = re.search(r"it is: (.*); demo-clip says: (.*), then (.*)", printed).groups()
    assert before == truth != after


def test_it_shows_a_certificate_with_its_guarantee(printed):
    assert re.search(r"class \d within L2 radius 0\.\d+ of this image", printed)
    assert "Guarantee (standard)" in printed


def test_it_shows_a_leaderboard_of_both_models_beside_chance(printed):
    table = printed[printed.index("mCE   ") :]
    for id in MODELS:
        values = re.search(rf"^ *{id} +([\d.]+) +([\d.]+) +([\d.]+) +0\.125 +48", table, re.MULTILINE).groups()
        clean, corrupted, mce = map(float, values)
        assert 0.125 < corrupted < clean < 1
        assert mce > 0
    assert re.search(r"demo-clip +\S+ +\S+ +100 ", table)


def test_it_says_what_it_is_and_where_to_go_on(printed):
    assert "synthetic phantoms" in printed
    assert "Not for clinical use" in printed
    assert "make run" in printed


def test_the_picture_fits_the_terminal_and_keeps_colours_where_there_are_any():
    images = [np.full((64, 64, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255))]
    for width in (40, 80, 200):
        lines = picture(images, Console(width=width, color_system=None)).plain.splitlines()
        assert max(map(len, lines)) <= width
    coloured = picture(images, Console(width=80, color_system="truecolor", force_terminal=True))
    assert coloured.plain.splitlines()[0] == "▀" * len(coloured.plain.splitlines()[0])
    assert {str(span.style) for span in coloured.spans} >= {
        "rgb(255,0,0) on rgb(255,0,0)",
        "rgb(0,0,255) on rgb(0,0,255)",
    }
