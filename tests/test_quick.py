"""The first look in a terminal."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from medrobust_lib.cli import app
from medrobust_lib.experiments.report import show_images

MODELS = ("demo-clip", "demo-clip-vit")


@pytest.fixture(scope="module")
def printed():
    result = CliRunner().invoke(app, ["quick"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_it_shows_an_image_that_gets_worse(printed):
    truth, before, after = re.search(
        r"it is: (.*); demo-clip says: (.*) \(clean\), (.*) \(corrupted\)", printed
    ).groups()
    assert before == truth != after


def test_it_shows_a_certificate_with_its_guarantee(printed):
    assert re.search(r"class \d within L2 radius 0\.\d+ of this image", printed)
    assert "Guarantee (standard)" in printed


def test_it_shows_a_leaderboard_of_both_models_beside_chance(printed):
    assert "on 48 such images" in printed and "guessing: 0.125" in printed
    table = printed[printed.index("the fewest errors first") :]
    for id in MODELS:
        values = re.search(rf"^ *{id} +([\d.]+) +([\d.]+) +([\d.]+) *$", table, re.MULTILINE).groups()
        clean, corrupted, mce = map(float, values)
        assert 0.125 < corrupted < clean < 1
        assert mce > 0
    assert re.search(r"demo-clip +\S+ +\S+ +100 *$", table, re.MULTILINE)


def test_no_number_is_cut_in_a_narrow_terminal(printed):
    narrow = CliRunner().invoke(app, ["quick"], env={"COLUMNS": "40"}).output
    table = printed[printed.index("the fewest errors first") :]
    for number in re.findall(r"\b\d[\d.]*\b", table.split("Next:")[0]):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", narrow[narrow.index("the fewest") :]), number


def test_it_says_what_it_is_and_where_to_go_on(printed):
    assert "synthetic phantoms" in printed
    assert "Not for clinical use" in printed
    assert "make run" in printed


@pytest.mark.parametrize("width", [8, 40, 80, 200])
def test_images_fit_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    show_images([np.full((64, 64, 3), level, np.uint8) for level in (0, 255)])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(" ") and line.rstrip().endswith("@") for line in lines)  # dark beside light
    assert max(map(len, lines)) <= width
    assert len(lines) == min(16, (width // 2 - 2) // 2)


def test_images_are_characters_where_colours_are_not_wanted(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    show_images([np.full((64, 64, 3), level, np.uint8) for level in (0, 255)])
    printed = capsys.readouterr().out
    assert "▀" not in printed
    assert "@" in printed


def test_images_keep_their_colours_where_there_are_any(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    show_images([np.full((64, 64, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255))])
    printed = capsys.readouterr().out
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m▀" in printed
    assert "\x1b[38;2;0;0;255;48;2;0;0;255m▀" in printed
