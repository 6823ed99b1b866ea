import copy

import numpy as np
import pytest
import torch

import medrobust_lib as mr
from medrobust_lib import metrics
from medrobust_lib.corruptions.suites import corrupted
from medrobust_lib.evaluation import Candidate, accuracy_table, benchmark, corruption_answers, corruption_intervals


@pytest.fixture(scope="module")
def data(phantoms):
    return phantoms("histology", n=18)


@pytest.fixture(scope="module")
def candidates(model, data):
    words = model.class_features(data.classes, data.templates[:1])
    return {"as is": Candidate(model, words), "reversed": Candidate(model, words.flip(0))}


@pytest.fixture(scope="module")
def answers(candidates, data):
    return corruption_answers(candidates, data, severities=(2, 5), seed=3, batch_size=4)


def test_every_corruption_and_severity_is_answered_by_everyone(answers, data):
    names = mr.SUITES["medimeta-c"].corruptions
    expected = {(who, c, s) for who in ("as is", "reversed") for c in names for s in (2, 5)}
    assert set(answers) == expected | {(who, "clean", 0) for who in ("as is", "reversed")}
    assert all(answer.shape == (len(data),) and answer.dtype == np.int64 for answer in answers.values())


def test_answers_are_those_of_the_corrupted_images_one_by_one(answers, model, candidates, data):
    shown = corrupted(data, "impulse_noise", severity=5, seed=3)
    features = torch.cat([model.encode_image(model.prepare(shown.images[i : i + 1])) for i in range(len(data))])
    expected = (features @ candidates["as is"].class_features.T).argmax(1).numpy()
    np.testing.assert_array_equal(answers["as is", "impulse_noise", 5], expected)


def test_class_texts_decide_and_a_shared_tower_is_encoded_once(answers, model, candidates, data):
    for key, answer in answers.items():
        if key[0] == "as is":
            np.testing.assert_array_equal(answers["reversed", *key[1:]], len(data.classes) - 1 - answer)
    calls = []

    class Counting(type(model)):
        def encode_image(self, pixels):
            calls.append(len(pixels))
            return super().encode_image(pixels)

    tower = copy.deepcopy(model)
    tower.__class__ = Counting
    both = {name: Candidate(tower, candidate.class_features) for name, candidate in candidates.items()}
    corruption_answers(both, data, severities=(1,))
    assert sum(calls) == len(data) * 8  # clean and seven corruptions, not twice


def test_towers_of_one_geometry_share_the_prepared_images_and_an_own_geometry_is_kept(model, candidates, data):
    class Upside(type(model)):
        def prepare(self, images):
            return super().prepare(images).flip(2)

    prepared = []

    class Counting(type(model)):
        def prepare(self, images):
            prepared.append(len(images))
            return super().prepare(images)

    towers = [copy.deepcopy(model) for _ in range(3)]
    for tower, kind in zip(towers, (Counting, Counting, Upside), strict=True):
        tower.__class__ = kind
    words = candidates["as is"].class_features
    found = corruption_answers({str(i): Candidate(t, words) for i, t in enumerate(towers)}, data, severities=(1,))
    assert sum(prepared) == len(data) * 8
    plain = corruption_answers({"plain": Candidate(model, words)}, data, severities=(1,))
    flipped = model.encode_image(model.prepare(data.images).flip(2)) @ words.T
    for _, corruption, severity in plain:
        np.testing.assert_array_equal(found["1", corruption, severity], plain["plain", corruption, severity])
    np.testing.assert_array_equal(found["2", "clean", 0], flipped.argmax(1).numpy())


def test_pieces_change_no_answer(candidates, data, monkeypatch):
    words = {"corruptions": ["contrast"], "severities": [5], "batch_size": 2}
    whole = corruption_answers(candidates, data, **words)
    monkeypatch.setattr("medrobust_lib.evaluation._BATCHES", 1)
    for key, answer in corruption_answers(candidates, data, **words).items():
        assert answer.tolist() == whole[key].tolist()


def test_no_candidates_are_refused(data):
    with pytest.raises(ValueError, match="no candidates"):
        corruption_answers({}, data)


def test_table_fits_the_metrics(answers, data):
    table = accuracy_table(answers, data)
    assert len(table) == 2 * 15
    row = table[(table.model == "as is") & (table.corruption == "contrast") & (table.severity == 5)].iloc[0]
    assert row.accuracy == np.mean(answers["as is", "contrast", 5] == data.labels)
    assert row.low <= row.accuracy <= row.high
    errors = metrics.corruption_error_table(table, reference="as is").set_index("model")
    assert errors.mce["as is"] == pytest.approx(100)


def test_intervals_are_those_of_the_resampled_images_of_each_classifier(answers, data):
    table = corruption_intervals(answers, data, reference="reversed", rng=np.random.default_rng(0)).set_index("model")
    assert list(table.index) == ["as is", "reversed"] and set(table.dataset) == {data.id}
    names, rng = mr.SUITES["medimeta-c"].corruptions, np.random.default_rng(0)
    right = {who: np.array([[answers[who, c, s] == data.labels for s in (2, 5)] for c in names]) for who in table.index}
    for who in table.index:
        mce = metrics.bootstrap_interval(metrics.mean_corruption_error, right[who], right["reversed"], rng=rng)
        clean = answers[who, "clean", 0] == data.labels
        lost = metrics.bootstrap_interval(metrics.degradation, right[who], clean, rng=rng)
        assert table.loc[who, ["low", "high", "lost_low", "lost_high"]].tolist() == pytest.approx([*mce, *lost])
    assert table.low["as is"] < table.high["as is"] < 100


def test_intervals_need_answers_of_the_reference(answers, data):
    with pytest.raises(ValueError, match="no answers of the reference 'as it'. Did you mean 'as is'?"):
        corruption_intervals(answers, data, reference="as it", rng=np.random.default_rng(0))


def test_a_suite_with_lists_for_each_modality_is_taken_by_its_id(model, data):
    table = benchmark(model, data, suite="clinical-c", severities=(1, 5), batch_size=4)
    assert list(table.index) == ["clean", *mr.SUITES["clinical-c"].names("histology"), "mean"]
    shown = corrupted(data, "pen_mark", severity=5, suite="clinical-c")
    answered = (
        model.encode_image(model.prepare(shown.images)) @ model.class_features(data.classes, data.templates[:1]).T
    )
    assert table.severity_5["pen_mark"] == (answered.argmax(1).numpy() == data.labels).mean()


def test_one_call_gives_the_whole_table(answers, model, data):
    options = {"severities": (2, 5), "seed": 3, "batch_size": 4}
    table = benchmark(model, data, **options)
    names = list(mr.SUITES["medimeta-c"].corruptions)
    assert table.index.to_list() == ["clean", *names, "mean"]
    right = np.mean(answers["as is", "contrast", 5] == data.labels)
    assert table.loc["contrast", "severity_5"] == pytest.approx(right)
    clean = np.mean(answers["as is", "clean", 0] == data.labels)
    assert table.loc["clean", ["accuracy", "n", "chance"]].to_list() == pytest.approx(
        [clean, len(data), 1 / len(data.classes)]
    )
    assert table.loc["mean", "accuracy"] == pytest.approx(table.loc[names, "accuracy"].mean())
    if clean < 1:
        np.testing.assert_allclose(table.ce[names].astype(float), 100 * table.error[names] / (1 - clean))
    against = benchmark(model, data, reference=model, corruptions=["contrast"], **options)
    assert set(against.ce.dropna()) <= {100.0} and set(against.relative_to) == {model.id}
    constant = [metrics.is_constant_predictor(answers["as is", "contrast", severity]) for severity in (2, 5)]
    assert against.loc["contrast", "constant"] == any(constant)
