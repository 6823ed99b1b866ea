import pytest

from medrobust_lib import explore, load_questions, load_vlm
from medrobust_lib.explore.answers import answer_groups, corrected_radii
from medrobust_lib.generative.answers import Drawing, collect_answers
from medrobust_lib.generative.certify import certify_answers
from medrobust_lib.generative.errors import ErrorRate, FalsePositives, SymmetricErrors, TotalErrors
from medrobust_lib.generative.oracles import ExactMatch, SameLabel, default_oracle

N0, N = 4, 14


@pytest.fixture(scope="module")
def vlm():
    return load_vlm("demo-vlm", device="cpu")


@pytest.fixture(scope="module")
def asked():
    return {task: load_questions("phantom/blood", task=task, n=4) for task in ("finding", "action")}


@pytest.fixture(scope="module")
def readers(asked):
    oracles = {task: default_oracle(part) for task, part in asked.items()}
    return {
        "finding": {"labels": oracles["finding"], "same label": SameLabel(oracles["finding"]), "exact": ExactMatch()},
        "action": {"tokens": oracles["action"], "exact": ExactMatch()},
    }


@pytest.fixture(scope="module")
def grid(vlm, asked, readers):
    return explore.prepare_answers(vlm, asked, readers, sigmas=(0.1, 0.5), positions=(0, 3), n0=N0, n=N)


CHOSEN = {"task": "finding", "index": 3, "sigma": 0.5, "n": N, "oracle": "labels", "error_rate": 0.05}


def words(figure):
    return "\n".join(text.get_text() for text in figure.texts)


def test_answer_view_counts_every_copy_and_shows_sentences(vlm, asked):
    figure = explore.answer_view(vlm, asked["action"], default_oracle(asked["action"]), index=3, sigma=0.25, n=12)
    clean, *noisy, bars = figure.axes
    assert clean.get_title() == f"clean\ntruth: {asked['action'].truths[3]}"
    assert all(ax.get_title().startswith("<") for ax in noisy)
    assert sum(bar.get_width() for bar in bars.patches) == 12


def test_groups_hold_every_answer_once_and_the_tested_one_comes_first(grid):
    bank = grid.banks["finding", 3, 0.5]
    texts = bank.texts("estimate", 0, N)
    for reader in grid.oracles["finding"].values():
        found = certify_answers(bank, reader, n0=N0, n=N)
        groups = answer_groups(bank, reader, found, n=N)
        assert sum(group.size for group in groups) == N
        assert groups[0].name == found.answer
        assert groups[0].size == found.composite.k
        assert all(group.example in texts for group in groups)


def test_answers_of_many_meanings_are_counted_together(grid, monkeypatch):
    monkeypatch.setattr(explore.answers, "_SHOWN", 1)
    bank = grid.banks["finding", 3, 0.5]
    reader = grid.oracles["finding"]["labels"]
    groups = answer_groups(bank, reader, certify_answers(bank, reader, n0=N0, n=N), n=N)
    assert len(groups) == 2, "the answers at this noise have several meanings"
    assert groups[-1].name == "in no group"
    assert sum(group.size for group in groups) == N


def test_radii_are_those_of_certify_answers_with_the_error_model(grid):
    bank, reader, rate = grid.banks["finding", 3, 0.1], grid.oracles["finding"]["labels"], ErrorRate(0.05)
    found = certify_answers(bank, reader, n0=N0, n=N)
    assert found.composite.radius > 0
    radii, refusals = corrected_radii(found, reader, error_rate=0.05, alpha=0.001)
    assert refusals == {}
    expected = {
        "symmetric errors": SymmetricErrors(rate, n_labels=len(reader.labels)),
        "false positives": FalsePositives({found.answer: rate}),
        "any errors": TotalErrors(rate),
    }
    assert radii["oracle's label"] == pytest.approx(found.composite.radius)
    for name, error_model in expected.items():
        corrected = certify_answers(bank, reader, n0=N0, n=N, error_model=error_model).corrected
        assert radii[name] == pytest.approx(corrected.radius)


def test_a_rate_that_contradicts_the_votes_is_refused_and_said_so(grid):
    bank, reader = grid.banks["action", 0, 0.1], grid.oracles["action"]["tokens"]
    found = certify_answers(bank, reader, n0=N0, n=N)
    radii, refusals = corrected_radii(found, reader, error_rate=0.7, alpha=0.001)
    assert found.composite.p_lower > 0.5
    assert list(refusals) == ["symmetric errors"]
    assert radii["any errors"] == 0


def test_both_guarantees_are_named(grid):
    for oracle in ("labels", "exact"):
        told = words(explore.clusters_view(grid, **CHOSEN | {"oracle": oracle, "sigma": 0.1}))
        assert "Guarantee (composite)" in told.replace("\n", " ")
        assert "Guarantee (corrected):" in told.replace("\n", " ")


def test_what_was_not_drawn_is_named(grid):
    with pytest.raises(KeyError, match="no answers for finding, image 3, sigma 0.3; there are some at sigma 0.1, 0.5"):
        explore.clusters_view(grid, **CHOSEN | {"sigma": 0.3})
    with pytest.raises(KeyError, match="no reader 'judge'; choose one of labels, same label, exact"):
        explore.clusters_view(grid, **CHOSEN | {"oracle": "judge"})


def test_known_banks_are_used_and_not_drawn_again(vlm, asked, readers, monkeypatch):
    action = {"action": asked["action"]}
    known = {"action": collect_answers(vlm, asked["action"], Drawing(sigma=0.25, max_new_tokens=24), n0=1, n=10)}
    monkeypatch.setattr(type(vlm), "generate", None)
    monkeypatch.setattr(type(vlm), "complete", None, raising=False)
    grid = explore.prepare_answers(vlm, action, readers, sigmas=(0.25,), positions=(0, 2, 99), n0=1, n=10, known=known)
    assert grid.positions == (0, 2)
    assert grid.banks["action", 2, 0.25] is known["action"][2]


def test_every_control_changes_the_picture_and_the_model_is_not_asked(grid, vlm, monkeypatch):
    monkeypatch.setattr(type(vlm), "generate", None)
    monkeypatch.setattr(type(vlm), "complete", None, raising=False)
    instrument = explore.explore_answers(grid)
    seen = [(instrument.picture.value, instrument.caption.value)]
    changes = [("index", 3), ("sigma", 0.1), ("n", 10), ("oracle", "exact"), ("error_rate", 0.3), ("task", "action")]
    for name, value in changes:
        instrument.controls[name].value = value
        assert instrument.message.value == ""
        seen.append((instrument.picture.value, instrument.caption.value))
    assert len(set(seen)) == len(seen)


def test_another_question_offers_its_own_readers(grid):
    instrument = explore.explore_answers(grid)
    instrument.controls["oracle"].value = "same label"
    instrument.controls["task"].value = "action"
    assert instrument.controls["oracle"].options == ("tokens", "exact")
    assert instrument.controls["oracle"].value == "tokens"
    assert instrument.message.value == ""


@pytest.mark.parametrize("oracle", ["labels", "exact"])
def test_sentences_do_not_run_into_anything(grid, overlaps, oracle):
    assert overlaps(explore.clusters_view(grid, **CHOSEN | {"oracle": oracle})) == ([], [])
