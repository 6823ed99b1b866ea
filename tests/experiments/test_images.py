import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medrobust_lib.experiments import images, read_cards, start_run
from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "demo"))
    return start_run("01", "Title")


def table(n=3, **columns):
    given = {"file": [f"a/{row}.png" for row in range(n)], "label": 0, "class_name": "a", "predicted": 0}
    return pd.DataFrame(given | {"predicted_name": "a"} | columns)


def save(run):
    return run.save_card(metrics=[], tables={}, model={}, dataset={}, prompts={})


def pictures(run):
    return sorted(path.name for path in (run.folder / "images").rglob("*.png"))


def test_a_table_of_images_is_kept_with_small_pictures_and_the_card_names_it(run):
    shapes = [(200, 100, 3), (28, 28, 3), (96, 400, 3)]
    path = run.save_images(table(), [np.full(shape, 7 * row, np.uint8) for row, shape in enumerate(shapes)])
    assert path == run.folder / "cards" / "01_images.csv"
    pd.testing.assert_frame_equal(pd.read_csv(path), table())
    assert json.loads(save(run).read_text())["images"] == "01_images"
    assert pictures(run) == ["0.png", "1.png", "2.png"]
    with Image.open(run.folder / "images" / "01" / "2.png") as picture:
        assert picture.size == (96, 23)
        assert picture.getpixel((5, 5)) == (14, 14, 14)
    assert not list(run.folder.rglob("*.part"))


@pytest.mark.parametrize("switch", ["parameter", "variable", "no images"])
def test_no_small_pictures_stay_where_they_are_not_wanted(run, monkeypatch, switch):
    three = np.zeros((3, 8, 8, 3), np.uint8)
    run.save_images(table(), three)
    assert len(pictures(run)) == 3
    if switch == "variable":
        monkeypatch.setenv(images.NO_THUMBNAILS_VARIABLE, "1")
    run.save_images(table(), None if switch == "no images" else three, thumbnails=switch != "parameter")
    assert pictures(run) == []
    assert len(pd.read_csv(run.folder / "cards" / "01_images.csv")) == 3


def test_pictures_are_kept_of_what_a_page_shows_only(run, monkeypatch):
    monkeypatch.setattr(images, "SHOWN_IMAGES", 1)
    run.save_images(table(predicted=[0, 1, 0]), np.zeros((3, 8, 8, 3), np.uint8))
    assert pictures(run) == ["1.png"]


@pytest.mark.parametrize(
    ("given", "held", "message"),
    [
        (table().drop(columns=["file", "label"]), None, "lacks file, label; it needs file, label, class_name"),
        (table(file=["a.png", "/home/x/b.png", "c.png"]), None, "'/home/x/b.png' of a table of images is an absolute"),
        (table(file=["a.png", "C:\\x\\b.png", "c.png"]), None, "is an absolute path; give it relative to the data"),
        (table(), np.zeros((2, 8, 8, 3), np.uint8), "2 images for a table of 3 rows; give one for each row"),
    ],
)
def test_a_table_that_cannot_be_shown_is_refused_and_nothing_is_written(run, given, held, message):
    with pytest.raises(ValueError, match=message.replace("\\", "\\\\")):
        run.save_images(given, held)
    assert not run.folder.exists()


def test_worst_first():
    given = table(
        9,
        predicted=[0, 0, -1, 1, 1, 1, 0, -1, 0],
        confidence=[0.9, 0.6, 0.5, 0.7, 0.9, 0.6, 0.6, 0.4, 0.2],
        radius=[0.2, 0.1, 0.0, 0.1, 0.1, 0.3, 0.1, 0.0, np.nan],
    )
    # Wrong: radius .3, then .1 at .9 and .7; no answer: .4, .5; right: no radius, .1 twice in its order, .2.
    assert images.worst_first(given).tolist() == [5, 4, 3, 7, 2, 8, 1, 6, 0]
    assert images.worst_first(given.drop(columns="radius")).tolist()[:5] == [4, 3, 5, 7, 2]
    assert images.worst_first(given.drop(columns=["radius", "confidence"])).tolist() == [3, 4, 5, 2, 7, 0, 1, 6, 8]
    assert images.worst_first(given[:0]).tolist() == []


def test_a_card_says_what_was_asked_and_found_and_older_cards_do_not(run, tmp_path):
    asked = {"question": "How far?", "findings": ("Not far.", "It falls.")}
    path = run.save_card(metrics=[], tables={}, model={}, dataset={}, prompts={}, **asked)
    card = json.loads(path.read_text())
    assert {name: card[name] for name in ("question", "findings", "images")} == {
        "question": "How far?", "findings": ["Not far.", "It falls."], "images": "",
    }  # fmt: skip
    path.write_text(json.dumps({name: card[name] for name in card if name not in ("question", "findings", "images")}))
    (older,) = read_cards(tmp_path)
    assert (older["question"], older["findings"], older["images"]) == ("", [], "")
    path.write_text(json.dumps(card | {"findings": "Not far."}))
    with pytest.raises(ValueError, match=r"01\.json is a damaged result card: 'findings' is 'Not far\.', a str"):
        read_cards(tmp_path)


def test_findings_are_a_sequence(run):
    with pytest.raises(TypeError, match="'findings' is 'One sentence', a str"):
        run.save_card(metrics=[], tables={}, model={}, dataset={}, prompts={}, findings="One sentence")


@pytest.mark.parametrize(("option", "kept"), [([], ["0.png"]), (["--no-thumbnails"], [])])
def test_the_command_leaves_small_pictures_out(invoke, run, tmp_path, option, kept):
    import nbformat

    folder = tmp_path / "notebooks"
    folder.mkdir()
    source = (
        "import numpy as np, pandas as pd\nfrom medrobust_lib.experiments import start_run\n"
        "run = start_run('01', 't')\n"
        "row = dict(file='a.png', label=0, class_name='a', predicted=0, predicted_name='a')\n"
        "run.save_images(pd.DataFrame([row]), np.zeros((1, 8, 8, 3), np.uint8))\n"
    )
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "01_first.ipynb")
    code, _, error = invoke("run", "01", "--notebooks", folder, "--out", run.folder, *option)
    assert code == 0, error
    assert pictures(run) == kept
