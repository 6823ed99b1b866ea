"""The papers' prompt methods by name."""

import pytest
import torch

from medrobust_lib.data.splits import learning_splits
from medrobust_lib.smoothing import table
from medrobust_lib.smoothing.methods import adapt_to_pool, zero_shot_methods
from medrobust_lib.smoothing.prompts import learn_prompts
from medrobust_lib.smoothing.table import PROMPT_METHODS, certify_dataset, prompt_methods

RECIPE = {"shots": 1, "epochs": 2, "draws_per_image": 2}


@pytest.fixture(scope="module")
def splits():
    return learning_splits("phantom/chest", shots=1, n_test=3, n_pool=3)


def made(model, splits, names=PROMPT_METHODS, **options):
    given = {"train": splits.train, "pool": splits.pool, "sigma": 0.25, "seed": 4} | RECIPE | options
    return prompt_methods(model, splits.test, names, **given)


def test_each_has_its_name_and_its_guarantee(model, splits):
    found = {method.name: method.guarantee for method in made(model, splits)}
    assert list(found) == list(PROMPT_METHODS)
    assert found.pop("candidate set") == "candidate-set"
    assert {found.pop("zero-shot PromptSmooth"), found.pop("PromptSmooth")} == {"frozen-prompt"}
    assert set(found.values()) == {"standard"}


def test_they_are_what_one_would_make_by_hand(model, splits):
    by_name = {method.name: method for method in made(model, splits)}
    classes = splits.test.classes
    few_shot = [learn_prompts(model, splits.train, seed=seed, **RECIPE) for seed in (4, 5, 6)]
    coop = learn_prompts(model, splits.train, sigmas=(0.0,), seed=4, **RECIPE)
    pool = adapt_to_pool(model, few_shot[0], splits.pool, sigma=0.25, seed=4)
    for name, prompt in {"few-shot PromptSmooth": few_shot[0], "CoOp": coop, "few-shot + pool": pool}.items():
        assert torch.equal(by_name[name].class_features, prompt.class_features(model, classes))
    for mine, theirs in zip(by_name["candidate set"].candidates, few_shot, strict=True):
        assert torch.equal(mine, theirs.class_features(model, classes))
    assert torch.equal(by_name["PromptSmooth"].start.context, few_shot[0].context)
    assert by_name["zero-shot PromptSmooth"].start.template == splits.test.start_template
    zero_shot = zero_shot_methods(model, splits.test)
    for mine, theirs in zip(made(model, splits, PROMPT_METHODS[:2]), zero_shot, strict=True):
        assert torch.equal(mine.class_features, theirs.class_features)


def test_only_the_tunable_tokens_of_the_written_prompt_move(model, splits):
    (method,) = made(model, splits, ["zero-shot PromptSmooth"], tunable=2)
    assert method.start.context.shape[0] == 2


def test_what_several_need_is_learned_once(model, splits, monkeypatch):
    seeds = []

    def counted(model, data, *, seed, **recipe):
        seeds.append(seed)
        return learn_prompts(model, data, seed=seed, **recipe)

    monkeypatch.setattr(table, "learn_prompts", counted)
    made(model, splits, ["few-shot PromptSmooth", "few-shot + pool", "candidate set", "PromptSmooth"])
    assert seeds == [4, 5, 6]


def test_all_of_them_are_certified_from_one_bank(model, splits):
    rows = certify_dataset(model, splits.test, made(model, splits), sigmas=[0.1], n0=5, n=20, alpha=0.05, radii=[0.02])
    assert rows["method"].tolist() == list(PROMPT_METHODS) * 3
    assert rows.groupby("method")["guarantee"].nunique().eq(1).all()


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["few-shot"], {}, "method 'few-shot'.*few-shot PromptSmooth"),
        (["CoOp"], {"train": None}, "method 'CoOp' needs train=, images to learn from that are not certified"),
        (["few-shot + pool"], {"pool": None}, "method 'few-shot \\+ pool' needs pool="),
        (["CoOp", "CoOp"], {}, "method 'CoOp' is named twice"),
        (["CoOp", "zero-shot PromptSmooth"], {"tunable": 50}, "tunable=50"),
        (["zero-shot"], {"epoch": 3}, "epoch"),
        (["CoOp"], {"sigma": -1}, "sigma"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_learned(model, splits, monkeypatch, names, given, message):
    monkeypatch.setattr(table, "learn_prompts", lambda *_, **__: pytest.fail("learned"))
    with pytest.raises((ValueError, TypeError), match=message):
        made(model, splits, names, **given)
