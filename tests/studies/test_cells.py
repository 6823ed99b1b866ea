import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import norm

from medrobust_lib.corruptions.suites import find_suite
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.smoothing.prompts import PromptSet
from medrobust_lib.smoothing.sequential import operating_characteristics, sequential_plan
from medrobust_lib.studies.cells import estimate_cells, measured_rate, study_cells
from medrobust_lib.studies.steps import short_id
from medrobust_lib.studies.study_file import read_study

TEXT = """
models: [demo-clip]
datasets: [phantom/chest, phantom/blood]
seeds: [0, 3]
n_images: 6
steps:
  - certify: {sigmas: [0.1, 0.25], n: 1000, radii: [0.1]}
  - certify: {sigmas: [0.1], n: 1000, mode: evaluate, sampling: fixed}
  - benchmark: {severities: [1, 3]}
"""


@pytest.fixture
def cells(study_file):
    study = read_study(study_file(TEXT))
    return study, study_cells(study)


def test_a_cell_for_every_combination_with_a_name_of_its_own(cells):
    _, found = cells
    assert len(found) == 8 + 4 + 4 == len({cell.name for cell in found})
    assert found[0].name == "01-certify_demo-clip_phantom-chest_sigma0.1_seed0"
    assert found[0].label == "1 certify demo-clip on phantom/chest, sigma 0.1, seed 0"
    assert found[-1].name == "03-benchmark_demo-clip_phantom-blood_seed3"
    assert json.loads(json.dumps(found[0].parameters)) == found[0].parameters
    assert found[0].parameters["radii"] == [0.1]


def test_a_folder_is_named_after_the_images_and_no_path_of_a_machine():
    ids = [f"folder:/home/somebody/scans?words=%2Fhome%2Fsomebody%2F{words}.yaml&group=folder" for words in "ab"]
    first, second = map(short_id, ids)
    assert first != second and all(re.fullmatch("folder-scans-[0-9a-f]{6}", name) for name in (first, second))


def test_long_and_foreign_ids_make_short_names_that_stay_apart():
    first, second = (short_id(f"local-dir:/{'x' * 80}/{end}") for end in ("a-b", "a/b"))
    assert first != second
    assert len(first) < 50
    assert "/" not in first + second


def test_estimates_are_counts_times_the_measured_rates(cells, monkeypatch):
    study, found = cells
    monkeypatch.setattr("medrobust_lib.studies.cells.encodings_per_second", lambda model, dataset, *, dtype: 50.0)
    monkeypatch.setattr("medrobust_lib.studies.cells._seconds_to_corrupt", lambda dataset, suite: 0.5)
    estimates = dict(zip([cell.label for cell in found], estimate_cells(study, found), strict=True))
    sequential = estimates["1 certify demo-clip on phantom/chest, sigma 0.1, seed 0"]
    assert (sequential.images, sequential.draws, sequential.seconds) == (6, 6 * 1100, 6 * 1100 / 50)
    assert estimates["2 certify demo-clip on phantom/chest, sigma 0.1, seed 0"].draws == 6 * 1000  # the label is known
    corruptions = len(find_suite("medimeta-c").names("phantom/chest"))
    benchmark = estimates["3 benchmark demo-clip on phantom/chest, seed 0"]
    assert benchmark.draws == 6 * (1 + 2 * corruptions)
    assert benchmark.seconds == pytest.approx(benchmark.draws / 50 + 6 * 2 * corruptions * 0.5)


def test_notebooks_are_priced_by_earlier_cards_or_not_at_all(study_file, notebooks, tmp_path):
    study = read_study(
        study_file("models: [demo-clip]\ndatasets: [phantom/chest]\nsteps: [{notebook: '1'}]\n"), notebooks=notebooks
    )
    found = study_cells(study, notebooks=notebooks)
    assert estimate_cells(study, found, earlier=tmp_path / "runs")[0].seconds is None
    for run, seconds in (("a", 10.0), ("b", 30.0), ("c", 14.0)):
        card = tmp_path / "runs" / run / "cards" / "01.json"
        card.parent.mkdir(parents=True)
        facts = {"format": 1, "notebook": "01", "title": "x", "parameters": {"model": "demo-clip"}, "seconds": seconds}
        empty = {name: {} for name in ("model", "dataset", "prompts", "environment", "git")}
        rest = {"metrics": [], "tables": [], "notes": [], "parameters_hash": "0", "peak_memory_mb": None, "created": ""}
        card.write_text(json.dumps(facts | empty | rest))
    assert estimate_cells(study, found, earlier=tmp_path / "runs")[0].seconds == 14.0


def test_unanimous_draws_are_those_of_the_sequential_plan(cells):
    cell = cells[1][0]
    expected = operating_characteristics(sequential_plan(sigma=0.1, radii=[0.1], n=1000, alpha=0.001), 1.0)[1]
    assert cell.unanimous_draws() == pytest.approx(100 + expected)
    assert cell.unanimous_draws() < 1100


def test_a_rate_is_draws_over_time_and_prints_nothing(capsys):
    import medrobust_lib as mr

    data = mr.load_dataset("phantom/chest", n=3)
    assert measured_rate(mr.load_model("demo-clip"), data, seconds=0.01) > 0
    assert capsys.readouterr().out == ""


METHODS = ["zero-shot", "few-shot PromptSmooth", "PromptSmooth"]
LITTLE = "{shots: 1, epochs: 1}"


def written(methods):
    return "[" + ", ".join(name if name == "zero-shot" else f"{{{name}: {LITTLE}}}" for name in methods) + "]"


LEARNING = f"""
models: [demo-clip]
datasets: [phantom/chest]
n_images: 3
steps:
  - certify: {{sigmas: [0.1], n0: 5, n: 20, alpha: 0.05, radii: [0.02], methods: {written(METHODS)}}}
"""


def test_a_cell_certifies_learned_prompts_on_images_that_were_not_learned_from(study_file, tmp_path):
    (cell,) = study_cells(read_study(study_file(LEARNING)))
    cell.run(tmp_path)
    rows = pd.read_csv(cell.folder(tmp_path) / "cards" / "01-certify_certificates.csv")
    assert rows["method"].tolist() == METHODS * 3
    assert rows.groupby("method")["guarantee"].first()[METHODS].tolist() == ["standard", "standard", "frozen-prompt"]
    assert rows["image"].unique().tolist() == load_dataset("phantom/chest", n=3).indices.tolist()
    card = json.loads((cell.folder(tmp_path) / "cards" / "01-certify.json").read_text())
    assert "train and test are the data set's own splits" in card["notes"]
    assert [method["method"] for method in card["parameters"]["methods"]] == METHODS


def test_adapting_and_learning_are_priced(study_file, monkeypatch):
    monkeypatch.setattr("medrobust_lib.studies.cells.encodings_per_second", lambda model, dataset, *, dtype: 50.0)
    for methods, draws, learning in ((METHODS, 25 + 100, 16 * 3), (METHODS[:2], 25, 16 * 3)):
        study = read_study(study_file(LEARNING.replace(written(METHODS), written(methods))))
        assert estimate_cells(study, study_cells(study))[0].draws == 3 * draws + learning


def test_learned_prompts_are_certified_on_the_draw_that_was_asked_for(study_file, tmp_path):
    asked = LEARNING.replace("n_images: 3", "n_images: 4\ndraw: balanced\nseeds: [2]")
    (cell,) = study_cells(read_study(study_file(asked)))
    cell.run(tmp_path / "divided")
    rows = pd.read_csv(cell.folder(tmp_path / "divided") / "cards" / "01-certify_certificates.csv")
    wanted = load_dataset("phantom/chest", n=4, seed=2, draw="balanced").indices
    assert rows["image"].unique().tolist() == wanted.tolist()


def write_folder(path, **counts):
    """Class folders of patches that are not divided into splits."""
    draw = np.random.default_rng(0)
    for name, count in counts.items():
        (path / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(path / name / f"{number}.png")
    return path


def test_what_is_learned_from_an_undivided_folder_is_not_certified_and_that_is_said(study_file, tmp_path):
    images = write_folder(tmp_path / "images", a=6, b=6)
    asked = LEARNING.replace("phantom/chest", f"folder:{images}").replace("n_images: 3", "n_images: 12")
    (cell,) = study_cells(read_study(study_file(asked)))
    cell.run(tmp_path / "out")
    cards = cell.folder(tmp_path / "out") / "cards"
    card = json.loads(next(cards.glob("*.json")).read_text())
    rows = pd.read_csv(next(cards.glob("*_certificates.csv")))
    assert rows["image"].nunique() == card["dataset"]["n"] == 12 - 4
    assert "8 of 12 images are left to certify; others are learned from" in card["notes"]
    assert not any("pool" in note for note in card["notes"])  # no method of it adapts to one


def test_a_cell_goes_on_with_the_prompts_that_it_learned(study_file, tmp_path, monkeypatch):
    (cell,) = study_cells(read_study(study_file(LEARNING)))
    cell.run(tmp_path)
    (kept,) = (tmp_path / "prompts").glob("*/*")
    assert PromptSet.load(kept).provenance["shots"] == 1
    monkeypatch.setattr(
        "medrobust_lib.smoothing.paper_methods.learn_prompts", lambda *_, **__: pytest.fail("learned again")
    )
    table = cell.folder(tmp_path) / "store" / "table.csv"
    before = table.read_bytes()
    cell.run(tmp_path)
    assert table.read_bytes() == before


CONTRAST = f"""
models: [demo-clip]
datasets: [phantom/chest]
n_images: 2
steps:
  - certify: {{sigmas: [0.4], perturbation: contrast, n0: 5, n: 40, alpha: 0.05, radii: [0.1, 0.25],
              methods: [zero-shot, {{few-shot PromptSmooth: {LITTLE}}}, {{re-trained: {LITTLE}}}]}}
"""


@pytest.mark.filterwarnings("ignore:re-training demo-clip")
def test_a_step_certifies_for_a_corruption_with_what_is_learned_on_it(study_file, tmp_path):
    (cell,) = study_cells(read_study(study_file(CONTRAST)))
    assert cell.label == "1 certify demo-clip on phantom/chest, contrast sigma 0.4, seed 0"
    cell.run(tmp_path)
    cards = cell.folder(tmp_path) / "cards"
    rows = pd.read_csv(cards / "01-certify_certificates.csv")
    assert rows["method"].tolist() == ["zero-shot", "few-shot PromptSmooth", "re-trained"] * 2
    assert set(rows["perturbation"]) == {"contrast"}
    assert set(rows["radius"]) <= {0.0, 0.1, 0.25}
    metric = next(m for m in json.loads((cards / "01-certify.json").read_text())["metrics"] if "radius=0.25" in m["of"])
    assert metric["of"] == "zero-shot (standard), contrast sigma=0.4, radius=0.25"
    assert metric["settings"]["perturbation"] == "contrast"
    (learned,) = (tmp_path / "prompts").glob("*/*.safetensors")
    assert PromptSet.load(learned).provenance["perturbation"] == "contrast"
    (tower,) = cell.folder(tmp_path).glob("re-trained/*.safetensors")
    before = tower.read_bytes()
    cell.run(tmp_path)  # from its files
    assert tower.read_bytes() == before
    assert pd.read_csv(cards / "01-certify_certificates.csv").equals(rows)


def test_the_price_of_a_step_follows_the_law_of_its_perturbation(study_file):
    def draws(name, sigma, radius):
        asked = f"{{sigmas: [{sigma}], perturbation: {name}, n: 2000, radii: [{radius}]}}"
        text = f"models: [demo-clip]\ndatasets: [phantom/chest]\nsteps: [{{certify: {asked}}}]\n"
        return study_cells(read_study(study_file(text)))[0].unanimous_draws()

    # A normal and an exponential radius that need the same probability, .8, and another.
    assert draws("blur", 2.0, 2 * -math.log(0.4)) == pytest.approx(
        draws("contrast", 0.4, 0.4 * norm.ppf(0.8)), rel=0.02
    )
    assert draws("blur", 2.0, 4.0) > draws("contrast", 0.4, 0.4)


def test_a_notebook_says_in_its_label_what_it_runs_on(study_file, notebooks):
    text = "models: [demo-clip]\ndatasets: [phantom/chest]\nsteps: [{notebook: '1'}]\n"
    (cell,) = study_cells(read_study(study_file(text), notebooks=notebooks), notebooks=notebooks)
    assert (cell.label, cell.name) == ("1 notebook 01 demo-clip", "01-notebook-01_demo-clip")  # it has no data set
