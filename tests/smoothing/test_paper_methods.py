"""The papers' methods by name."""

import pytest
import torch

from medrobust_lib.data.splits import learning_splits
from medrobust_lib.smoothing import paper_methods
from medrobust_lib.smoothing.denoisers import load_demo_denoisers
from medrobust_lib.smoothing.methods import zero_shot_methods
from medrobust_lib.smoothing.paper_methods import READS, RETRAINED, PaperMethod, adapt_to_pool, prompt_methods
from medrobust_lib.smoothing.prompts import PromptSet, learn_prompts
from medrobust_lib.smoothing.table import certify_dataset

RECIPE = {"shots": 1, "epochs": 2, "draws_per_image": 2}
NAMES = [name for name in READS if name != RETRAINED]
PROMPTS = [name for name in NAMES if "denoiser" not in READS[name]]


@pytest.fixture(scope="module")
def splits():
    return learning_splits("phantom/chest", shots=1, n_test=3, n_pool=3)


def asked(method, **settings):
    learning = {setting: value for setting, value in RECIPE.items() if setting in READS[method]}
    return PaperMethod(method, **learning | settings)


def made(model, splits, methods=NAMES, **options):
    given = {"train": splits.train, "pool": splits.pool, "sigma": 0.25, "seed": 4} | options
    methods = [asked(one) if isinstance(one, str) and one in READS else one for one in methods]
    return prompt_methods(model, splits.test, methods, **given)


def test_each_has_its_name_and_its_guarantee(model, splits):
    found = {method.name: method.guarantee for method in made(model, splits)}
    assert list(found) == NAMES
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
    for mine, theirs in zip(made(model, splits, NAMES[:2]), zero_shot, strict=True):
        assert torch.equal(mine.class_features, theirs.class_features)
    for name, kind in (("denoised", "stability"), ("diffusion", "diffusion")):
        assert torch.equal(by_name[name].class_features, zero_shot[0].class_features)
        assert by_name[name].denoiser.id == load_demo_denoisers(kind).id


def test_settings_reach_what_they_are_for(model, splits):
    methods = [
        asked("zero-shot PromptSmooth", tunable=2, steps=3),
        asked("zero-shot PromptSmooth", name="other words", template="a picture of {}"),
        asked("few-shot PromptSmooth", n_context=2, seed=9, crop=0.5),
        asked("PromptSmooth", class_specific=True, position="front"),
    ]
    moved, other, learned, own = made(model, splits, methods)
    assert own.start.context.shape[:2] == (len(splits.test.classes), 5)
    assert own.start.position == "front"
    assert (moved.start.context.shape[0], moved.steps) == (2, 3)
    assert (other.name, other.start.template) == ("other words", "a picture of {}")
    crops = methods[2].learning()["augmentation"]
    by_hand = learn_prompts(model, splits.train, n_context=2, seed=9, augmentation=crops, **RECIPE)
    assert crops.crop == 0.5
    assert torch.equal(learned.class_features, by_hand.class_features(model, splits.test.classes))


def test_what_several_need_is_learned_once(model, splits, monkeypatch):
    seeds = []

    def counted(model, data, *, seed, **recipe):
        seeds.append(seed)
        return learn_prompts(model, data, seed=seed, **recipe)

    monkeypatch.setattr(paper_methods, "learn_prompts", counted)
    made(model, splits, ["few-shot PromptSmooth", "few-shot + pool", "candidate set", "PromptSmooth"])
    assert seeds == [4, 5, 6]


def test_learned_prompts_are_kept_and_shared_by_noise_levels(model, splits, tmp_path, monkeypatch):
    names = ["CoOp", "few-shot + pool", "PromptSmooth"]
    first = made(model, splits, names, kept=tmp_path)
    kept = [PromptSet.load(path) for path in tmp_path.iterdir()]
    assert sorted(prompts.provenance["method"] for prompts in kept) == ["CoOp"] + 2 * ["Few-Shot PromptSmooth"]
    monkeypatch.setattr(paper_methods, "learn_prompts", lambda *_, **__: pytest.fail("learned again"))
    again = made(model, splits, names, kept=tmp_path, sigma=0.5)  # the pool is adapted to its noise, and only it
    assert len(list(tmp_path.iterdir())) == 4
    assert torch.equal(first[2].start.context, again[2].start.context)


def test_prompts_of_other_images_are_learned_anew(model, splits, tmp_path):
    first = made(model, splits, ["CoOp"], kept=tmp_path)
    others = learning_splits("phantom/chest", shots=1, n_test=3, n_pool=3, seed=1)
    assert others.train.indices.tolist() != splits.train.indices.tolist()
    second = made(model, splits, ["CoOp"], kept=tmp_path, train=others.train)
    assert len(list(tmp_path.iterdir())) == 2
    assert not torch.equal(first[0].class_features, second[0].class_features)


def test_all_of_them_are_certified_from_one_bank(model, splits):
    rows = certify_dataset(model, splits.test, made(model, splits), sigmas=[0.1], n0=5, n=20, alpha=0.05, radii=[0.02])
    assert rows["method"].tolist() == NAMES * 3
    assert rows.groupby("method")["guarantee"].nunique().eq(1).all()


@pytest.mark.parametrize(
    ("methods", "given", "message"),
    [
        ([asked("zero-shot"), "few-shot"], {}, "method 'few-shot'.*few-shot PromptSmooth"),
        (["CoOp"], {"train": None}, "method 'CoOp' needs train=, images to learn from that are not certified"),
        (["few-shot + pool"], {"pool": None}, "method 'few-shot \\+ pool' needs pool="),
        (["CoOp", "CoOp"], {}, "two methods are called 'CoOp'; give each a name of its own"),
        (["CoOp", asked("zero-shot PromptSmooth", tunable=50)], {}, "tunable=50"),
        (["CoOp", asked("denoised", denoiser="nowhere.safetensors")], {}, "no denoiser at nowhere"),
        (["CoOp"], {"sigma": -1}, "sigma"),
        ([asked(RETRAINED)], {}, "'re-trained' is another image tower"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_learned(model, splits, monkeypatch, methods, given, message):
    monkeypatch.setattr(paper_methods, "learn_prompts", lambda *_, **__: pytest.fail("learned"))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        made(model, splits, methods, **given)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("zero-shot", {"shots": 4}, "shots=4 means nothing to 'zero-shot', which reads template"),
        ("zero-shot ensemble", {"tunable": 4}, "tunable=4 .* reads nothing"),
        ("CoOp", {"sigmas": (0.5,)}, r"sigmas=\(0.5,\) means nothing to 'CoOp'"),
        ("CoOp", {"shots": 0}, "shots=0"),
        ("PromptSmooth", {"steps": 0}, "steps=0"),
        ("few-shot PromptSmooth", {"crop": 2.0}, "crop=2.0"),
        ("few-shot PromptSmooth", {"seed": -1}, "seed=-1"),
        ("few-shot PromptSmooth", {"position": "back"}, "position 'back'; choose one of end, middle, front"),
        ("zero-shot", {"class_specific": True}, "class_specific=True means nothing to 'zero-shot'"),
    ],
)
def test_settings_that_cannot_work_are_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        PaperMethod(method, **settings)
