"""What the steps of a study do, each in its own cells."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from medrobust_lib.adaptation.adapting import adapt_lora
from medrobust_lib.adaptation.retraining import retrain_on_noise
from medrobust_lib.corruptions.stored import read_corrupted
from medrobust_lib.corruptions.suites import corrupted, find_suite
from medrobust_lib.corruptions.writing import write_benchmark
from medrobust_lib.data.questions import load_questions
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.data.splits import fraction_splits
from medrobust_lib.evaluation import Candidate, corruption_answers
from medrobust_lib.models.loading import load_model
from medrobust_lib.smoothing.bounds import maximum_radius
from medrobust_lib.studies.cells import estimate_cells, study_cells
from medrobust_lib.studies.execute import run_study
from medrobust_lib.studies.steps import StudyError
from medrobust_lib.studies.study_file import read_study

HEAD = "models: [demo-clip]\ndatasets: [phantom/chest]\nn_images: 4\n"
CERTIFY = "  - certify: {sigmas: [0.1], n0: 2, n: 8, alpha: 0.05, radii: [0.02], "


def quiet(line):
    pass


def run(study_file, tmp_path, text):
    study = read_study(study_file(text))
    finished = run_study(study, tmp_path / "out", announce=quiet)
    assert finished.failures == {}
    return study_cells(study), finished


def table(cell, tmp_path, name):
    return pd.read_csv(cell.folder(tmp_path / "out") / "cards" / f"{cell.card_name}_{name}.csv")


def test_denoised_diffusion_and_retrained_rows_stand_beside_the_others(study_file, tmp_path):
    methods = "methods: [zero-shot, denoised, {re-trained: {shots: 2, epochs: 1, seed: 5}}, diffusion]}\n"
    (cell,), _ = run(study_file, tmp_path, HEAD.replace("4", "2") + "steps:\n" + CERTIFY + methods)
    rows = table(cell, tmp_path, "certificates")
    assert rows["method"].tolist() == ["zero-shot", "denoised", "diffusion", "re-trained"] * 2
    assert set(rows["guarantee"]) == {"standard"} and set(rows["model"]) == {"demo-clip"}
    kept = cell.folder(tmp_path / "out") / "re-trained" / "re-trained.safetensors"
    model = load_model("demo-clip")
    train = load_dataset("phantom/chest", split="train")
    # The tower in the file is the one that re-training with these words gives.
    by_hand = retrain_on_noise(model, cell._splits().train, sigma=0.1, shots=2, epochs=1, batch_size=16, seed=5)
    from medrobust_lib.files import read_tensors

    tensors, header = read_tensors(kept, key="re-trained", kind="", advice="")
    assert header["seed"] == 5 and set(cell._splits().train.indices) <= set(train.indices)
    assert tensors and all(torch.equal(tensors[name], by_hand.state_dict()[name]) for name in tensors)


def test_functions_and_a_torchvision_resnet_are_models_of_a_study(study_file, tmp_path):
    head = "models: [python:tiny_encoders:load_least, python:tiny_encoders:load_resnet]\ndatasets: [phantom/breast]\n"
    text = head + "n_images: 4\nsteps:\n" + CERTIFY + "}\n  - benchmark: {severities: [2]}\n"
    (least, resnet, *benchmarks), finished = run(study_file, tmp_path, text)
    rows = [table(cell, tmp_path, "certificates") for cell in (least, resnet)]
    assert [found["method"].unique().tolist() for found in rows] == [["zero-shot", "zero-shot ensemble"], ["ResNet"]]
    assert [len(table(cell, tmp_path, "accuracy")) for cell in benchmarks] == [8, 8]
    data = load_dataset("phantom/breast", n=4)
    model = load_model("python:tiny_encoders:load_resnet", dtype="float32")
    clean = table(benchmarks[1], tmp_path, "answers").query("corruption == 'clean'")
    assert clean["predicted"].tolist() == model.encode_image(model.prepare(data.images)).argmax(1).tolist()
    assert finished.done == 4
    again = run_study(read_study(study_file(text)), tmp_path / "out", announce=quiet)
    assert (again.done, again.failures) == (4, {})


def test_every_noise_level_may_have_its_own_n(study_file):
    steps = "steps: [{certify: {sigmas: [0.1, 0.5], n: 1000, n_by_sigma: {0.5: 2000}, sampling: fixed}}]\n"
    small, large = study_cells(read_study(study_file(HEAD + steps)))
    assert (small.parameters["n"], large.parameters["n"]) == (1000, 2000)
    assert (small.most_draws, large.most_draws) == (1100, 2100)


@pytest.mark.parametrize(
    ("settings", "draws", "bounds"),
    [("", 1100, None), ("bounds: one", 1100, "one"), ("mode: evaluate", 1000, None),
     ("mode: evaluate, bounds: two", 1100, "two")],
)  # fmt: skip
def test_the_number_of_bounds_is_a_parameter_of_the_cell_and_may_cost_selection_draws(
    study_file, settings, draws, bounds
):
    steps = f"steps: [{{certify: {{sigmas: [0.1], n: 1000, {settings}}}}}]\n"
    (cell,) = study_cells(read_study(study_file(HEAD + steps)))
    assert (cell.most_draws, cell.parameters["bounds"]) == (draws, bounds)


LEARNING = """
datasets: [phantom/chest, phantom/blood]
models: [demo-clip]
n_images: 6
steps:
  - adapt: {name: with LoRA, fraction: 0.01, rank: 2, epochs: 1, n_val: 6, learning_rate: 1e-3, logits: raw}
  - adapt: {name: tuned, method: full fine-tuning, fraction: 0.01, epochs: 1, n_val: 6, datasets: [phantom/chest]}
  - adapt: {name: probed, method: linear probe, fraction: 0.02, n_val: 9, datasets: [phantom/chest]}
  - adapt: {name: prompted, method: prompts, fraction: 0.02, epochs: 2, n_val: 9, datasets: [phantom/chest]}
  - benchmark: {models: [demo-clip, with LoRA], severities: [5], reference: with LoRA}
  - benchmark: {models: [tuned, probed, prompted], datasets: [phantom/chest], severities: [5]}
  - certify: {models: [with LoRA], datasets: [phantom/blood], sigmas: [0.1], n0: 5, n: 20, alpha: 0.05, radii: [0.02]}
"""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "learning.yaml").write_text(LEARNING)
    study = read_study(folder / "learning.yaml")
    with warnings.catch_warnings(action="ignore"):
        finished = run_study(study, folder / "out", announce=quiet)
    assert finished.failures == {}
    return folder, study_cells(study), finished


@pytest.mark.filterwarnings("ignore")  # one epoch on few images
def test_later_steps_use_what_an_adapt_step_has_made(adapted):
    folder, cells, finished = adapted
    lora = next(cell for cell in cells if cell.variant == "with LoRA")
    assert (lora.model, lora.dataset, lora.parameters["learned"]) == (
        "demo-clip",
        "",
        ["phantom/chest", "phantom/blood"],
    )
    splits = [fraction_splits(id, fraction=0.01, n_val=6, n_test=1) for id in lora.parameters["learned"]]
    words = {"rank": 2, "epochs": 1, "learning_rate": 1e-3, "logits": "raw"}
    train, val = [split.train for split in splits], [split.val for split in splits]
    by_hand = adapt_lora(load_model("demo-clip"), train, validation=val, **words)
    data = load_dataset("phantom/chest", n=6)
    candidate = Candidate(by_hand.model, by_hand.model.class_features(data.classes, data.templates[:1]))
    expected = corruption_answers({"by hand": candidate}, data, severities=[5])
    cell = next(cell for cell in cells if cell.number == 5 and cell.model == "with LoRA" and "chest" in cell.dataset)
    rows = table(cell, folder, "answers")
    for corruption, found in rows.groupby("corruption"):
        assert found["predicted"].tolist() == expected["by hand", corruption, found["severity"].iloc[0]].tolist()
    errors = finished.leaderboard.query("metric == 'mce'")
    assert set(errors["of"]) == {"medimeta-c at 5, relative to with LoRA"}
    certified = table(next(cell for cell in cells if cell.number == 7), folder, "certificates")
    assert set(certified["model"]) == {"with LoRA"} and len(certified) == 6 * 2


def test_the_four_ways_to_adapt_tell_what_they_learned_from(adapted):
    folder, cells, finished = adapted
    for cell in cells[:4]:
        card = json.loads((cell.folder(folder / "out") / "cards" / f"{cell.card_name}.json").read_text())
        assert any("images of the split train" in note for note in card["notes"])
        assert card["metrics"][0]["name"] == "val_balanced_accuracy"
    trained = finished.leaderboard.query("metric == 'trained_parameters'")["value"]
    assert 0 < trained.min() < trained.max() < 2e6
    probed = next(cell for cell in cells if cell.model == "probed")
    model, data = load_model("demo-clip"), load_dataset("phantom/chest", n=6)
    assert not torch.equal(
        probed.class_features(model, data, folder / "out"), model.class_features(data.classes, data.templates[:1])
    )


def test_adapted_models_are_priced_before_they_are_made(study_file, monkeypatch):
    monkeypatch.setattr("medrobust_lib.studies.cells.encodings_per_second", lambda model, dataset, *, dtype: 50.0)
    monkeypatch.setattr("medrobust_lib.studies.cells._seconds_to_corrupt", lambda dataset, suite: 0.0)
    study = read_study(study_file(LEARNING))
    first, *_ = estimate_cells(study, study_cells(study))
    assert first.images == 14 + 14  # a hundredth of 1,440 each
    assert first.draws == 3 * 28 + 2 * 6


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            "[{adapt: {name: a, datasets: [phantom/oct]}}, {benchmark: {models: [a]}}]",
            "'a' learns nothing from phantom/chest",
        ),
        ("[{adapt: {name: a, method: prompts}}, {certify: {models: [a], sigmas: [0.1]}}]", "certify the method CoOp"),
    ],
)
def test_a_step_that_cannot_use_an_adapted_model_is_refused(study_file, steps, message):
    text = f"models: [demo-clip]\ndatasets: [phantom/chest, phantom/oct]\nsteps: {steps}\n"
    with pytest.raises(StudyError, match=message):
        study_cells(read_study(study_file(text)))


def test_probes_stand_in_the_leaderboard_under_their_names(adapted):
    _, _, finished = adapted
    assert {"tuned", "probed", "prompted", "with LoRA", "demo-clip"} <= set(finished.leaderboard["model"])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            "{name: a, method: linear probe, rank: 64}",
            "rank=64 means nothing to 'linear probe', which reads no",
        ),
        ("{name: a, method: prompts, template: 2}", "template=2 means nothing to 'prompts', which reads epochs"),
        ("{name: a, method: full fine-tuning, kernel: middle}", "kernel='middle' means nothing"),
        ("{name: demo-clip-vit}", "name: 'demo-clip-vit' is taken"),
        ("{name: ../../escaped}", "characters without /, and no point in front"),
        ("{name: ''}", "characters without /"),
    ],
)
def test_what_an_adaptation_cannot_be_is_refused(study_file, step, message):
    with pytest.raises(ValueError, match=message):
        read_study(study_file(f"models: [demo-clip]\ndatasets: [phantom/chest]\nsteps: [{{adapt: {step}}}]\n"))


def test_an_adapted_model_is_not_adapted_again(study_file):
    steps = "steps: [{adapt: {name: a}}, {adapt: {name: b, models: [a], method: linear probe}}]\n"
    with pytest.raises(StudyError, match="'a' is adapted already"):
        read_study(study_file("models: [demo-clip]\ndatasets: [phantom/chest]\n" + steps))


def test_two_cells_never_share_a_folder(study_file):
    adapt = "{{adapt: {{name: {}, fraction: 0.01, epochs: 0}}}}"
    both = "{benchmark: {models: [LoRA (1%), LoRA 1%]}}"
    steps = ", ".join([adapt.format("LoRA (1%)"), adapt.format("LoRA 1%"), both])
    text = f"models: [demo-clip]\ndatasets: [phantom/chest]\nsteps: [{steps}]\n"
    with pytest.raises(StudyError, match="would share the folder 03-benchmark_LoRA-1_"):
        study_cells(read_study(study_file(text)))


def test_a_folder_without_splits_cannot_be_adapted_to(study_file, tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(tmp_path / "mine" / name / f"{number}.png")
    text = f"models: [demo-clip]\ndatasets: ['folder:{tmp_path / 'mine'}']\nsteps: [{{adapt: {{name: a}}}}]\n"
    with pytest.raises(StudyError, match="has no train split beside its test split"):
        read_study(study_file(text))


def released(folder, data):
    """Corrupted images in the authors' layout, without a manifest of ours."""
    for name in ("clean", *find_suite("medimeta-c").names(data.id)):
        for severity in (1, 2) if name != "clean" else (0,):
            shown = data if severity == 0 else corrupted(data, name, severity=severity)
            path = (
                folder / "phantom_blood" / "test" / (f"{name}_severity_{severity}.npz" if severity else f"{name}.npz")
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, images=shown.images, labels=shown.labels)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_corrupted_images_are_read_from_a_folder_in_the_authors_layout(study_file, tmp_path):
    data = load_dataset("phantom/blood", n=8)
    released(tmp_path / "released", data)
    text = "models: [demo-clip]\ndatasets: [phantom/blood]\nsteps:\n  - benchmark: {severities: [1, 2], folder: %s}\n"
    (cell,), _ = run(study_file, tmp_path, text % (tmp_path / "released"))
    rows = table(cell, tmp_path, "answers")
    model = load_model("demo-clip")
    candidate = {"here": Candidate(model, model.class_features(data.classes, data.templates[:1]))}
    expected = corruption_answers(candidate, data, severities=[1, 2])
    for (corruption, severity), found in rows.groupby(["corruption", "severity"]):
        assert found["predicted"].tolist() == expected["here", corruption, severity].tolist()
    assert read_corrupted(tmp_path / "released", "phantom/blood").labels.tolist() == data.labels.tolist()


@pytest.mark.filterwarnings("ignore")
def test_the_clinical_suite_is_made_or_read_to_the_same_answers(study_file, tmp_path):
    write_benchmark(tmp_path / "written", ["phantom/breast"], suite="clinical-c", severities=[2], n=8)
    rows = {}
    for folder in ("", f", folder: {tmp_path / 'written'}"):
        step = f"{{benchmark: {{suite: clinical-c, severities: 2{folder}}}}}"
        out = tmp_path / ("read" if folder else "made")
        out.mkdir()
        text = f"models: [demo-clip]\ndatasets: [phantom/breast]\nn_images: 8\nsteps: [{step}]\n"
        (cell,), _ = run(study_file, out, text)
        rows[bool(folder)] = table(cell, out, "answers")
    assert rows[False]["corruption"].drop_duplicates().tolist() == ["clean", *find_suite("clinical-c").names("breast")]
    assert rows[False]["predicted"].tolist() == rows[True]["predicted"].tolist()


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_lacks_a_set_is_refused_before_anything_runs(study_file, tmp_path):
    folder = released(tmp_path / "released", load_dataset("phantom/blood", n=8))
    (folder / "phantom_blood" / "test" / "contrast_severity_1.npz").unlink()
    text = (
        f"models: [demo-clip]\ndatasets: [phantom/blood]\nsteps: [{{benchmark: {{severities: 1, folder: {folder}}}}}]\n"
    )
    with pytest.raises(FileNotFoundError, match="contrast"):
        read_study(study_file(text))


QUESTIONS = """
models: [demo-vlm]
datasets: [phantom/chest]
n_images: 3
steps:
  - questions: {sigma: 0.1, n0: 3, n: [10, 20], alpha: 0.05, max_new_tokens: 8, task: finding}
"""


def test_questions_are_certified_from_one_bank_for_every_n(study_file, tmp_path):
    (cell,), finished = run(study_file, tmp_path, QUESTIONS)
    rows = table(cell, tmp_path, "certified_answers")
    assert rows["n_max"].tolist() == [10] * 3 + [20] * 3
    asked = load_questions("phantom/chest", task="finding", n=3)
    assert rows["image"].tolist() == asked.indices.tolist() * 2
    assert np.isclose(rows["radius_reach"].iloc[-1], maximum_radius(20, 0.05, 0.1))
    assert (rows["k"][3:].to_numpy() >= rows["k"][:3].to_numpy()).all()  # the first ten are among the twenty
    board = finished.leaderboard
    assert set(board.query("metric == 'certified_share'")["of"]) == {"composite, n=10", "composite, n=20"}
    assert {"smoothed_accuracy", "average_certified_radius"} <= set(board["metric"])


def test_errors_of_the_oracle_are_counted_on_other_images(study_file, tmp_path):
    text = QUESTIONS.replace("n: [10, 20]", "n: 20, calibrate: 30").replace(
        "max_new_tokens: 8, task: finding", "task: safety"
    )
    (cell,), _ = run(study_file, tmp_path, text)
    rows = table(cell, tmp_path, "certified_answers")
    assert rows["guarantee"].tolist() == ["composite", "corrected"] * 3
    corrected, composite = (rows[rows["guarantee"] == name]["radius"].to_numpy() for name in ("corrected", "composite"))
    assert (corrected <= composite).all()  # misread answers cost radius
    card = json.loads((cell.folder(tmp_path / "out") / "cards" / "01-questions.json").read_text())
    assert any("texts of other images tell the oracle's errors" in note for note in card["notes"])


def test_what_a_person_calls_an_answer_is_read_from_a_table(study_file, tmp_path):
    (tmp_path / "said.csv").write_text("text,label\nsafe,safe\nNA,unsafe\n")
    given = f"n: 20, calibrate: 5, reference: {tmp_path / 'said.csv'}, task: finding"
    text = QUESTIONS.replace("n: [10, 20], alpha: 0.05, max_new_tokens: 8, task: finding", f"alpha: 0.05, {given}")
    assert read_study(study_file(text)).steps[0].known_labels() == {"safe": "safe", "NA": "unsafe"}
    (tmp_path / "said.csv").write_text("answer,label\nsafe,safe\n")
    with pytest.raises(ValueError, match="it needs text and label"):
        read_study(study_file(text))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("n: 3, task: finding", "n=3 draws can never certify"),
        ("n: 10, judge: 'http://localhost'", "judge is no address with a model; write URL#MODEL"),
        ("n: 10, calibrate: 6, task: finding", "nobody knows how answers to 'finding' are to be read"),
        ("n: 10, reference: nowhere.csv", "give a number of images, too"),
        ("n: 10, task: what", "task"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(study_file, given, message):
    text = QUESTIONS.replace("n: [10, 20], alpha: 0.05, max_new_tokens: 8, task: finding", f"alpha: 0.05, {given}")
    with pytest.raises(ValueError, match=message):
        read_study(study_file(text))


def test_the_images_of_a_cell_are_shared_out_and_the_table_is_the_same(study_file, tmp_path):
    study = read_study(study_file(HEAD + "steps:\n" + CERTIFY.removesuffix(", ") + "}\n"))
    tables = []
    for words in ({}, {"jobs": 2, "spread": "images"}):
        out = tmp_path / f"{len(tables)}"
        run_study(study, out, announce=quiet, **words)
        tables.append({path.name: path.read_bytes() for path in out.glob("cells/*/cards/*.csv")})
    assert len(tables[0]) == 2 and tables[0] == tables[1]
