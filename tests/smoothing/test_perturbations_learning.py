"""Learning from copies by another perturbation: prompts, pools, re-trained towers, adapters, and their records."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

import medrobust_lib as mr
from medrobust_lib import metrics
from medrobust_lib.adaptation.adapting import adapt_lora
from medrobust_lib.adaptation.retraining import retrain_on_noise
from medrobust_lib.adaptation.training import Recipe
from medrobust_lib.adaptation.training_images import Augmentation, add_noise
from medrobust_lib.data.splits import learning_splits
from medrobust_lib.smoothing import paper_methods
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies
from medrobust_lib.smoothing.paper_methods import READS, PaperMethod, adapt_to_pool, prompt_methods
from medrobust_lib.smoothing.perturbations import find_perturbation
from medrobust_lib.smoothing.prompts import PromptSet, learn_prompts

RECIPE = {"shots": 1, "epochs": 2, "draws_per_image": 2, "learning_rate": 0.02}
NUMBERS = {"n0": 5, "n": 20, "alpha": 0.05}
NAMES = ["zero-shot", "CoOp", "few-shot PromptSmooth", "few-shot + pool", "candidate set", "PromptSmooth"]


@pytest.fixture(scope="module")
def splits():
    return learning_splits("phantom/chest", shots=1, n_test=2, n_pool=2)


@pytest.fixture(scope="module")
def on_contrast(model, splits):
    return learn_prompts(model, splits.train, perturbation="contrast", **RECIPE)


def asked(method):
    return PaperMethod(method, **{name: value for name, value in RECIPE.items() if name in READS[method]})


def made(model, splits, names=NAMES, **options):
    given = {"train": splits.train, "pool": splits.pool} | options
    return prompt_methods(model, splits.test, [asked(name) for name in names], **given)


# Prompts


def test_prompts_learned_on_contrast_say_so_and_are_those_of_their_seed(model, splits, on_contrast, tmp_path):
    assert on_contrast.provenance["perturbation"] == on_contrast.learned_on == "contrast"
    assert on_contrast.provenance["sigmas"] == [0.55]
    again = learn_prompts(model, splits.train, perturbation=find_perturbation("contrast"), sigmas=[0.55], **RECIPE)
    assert torch.equal(again.context, on_contrast.context)
    for other in ("gamma", "pixel-noise"):
        found = learn_prompts(model, splits.train, perturbation=other, sigmas=[0.4], **RECIPE)
        assert found.learned_on == other
        assert not torch.equal(found.context, on_contrast.context)
    loaded = PromptSet.load(on_contrast.save(tmp_path / "prompts.safetensors"))
    assert loaded.learned_on == "contrast"


def test_prompts_that_saw_no_perturbation_suit_any_and_old_files_saw_pixel_noise(on_contrast, tmp_path):
    clean = replace(on_contrast, provenance=on_contrast.provenance | {"sigmas": [0.0]})
    assert clean.learned_on is None
    assert PromptSet.load(clean.save(tmp_path / "clean.safetensors")).learned_on is None
    old = {name: value for name, value in on_contrast.provenance.items() if name != "perturbation"}
    assert replace(on_contrast, provenance=old).learned_on == "pixel-noise"
    pooled = replace(clean, provenance=clean.provenance | {"pool": {}})
    assert pooled.learned_on == "contrast"


def test_prompts_by_a_pair_of_sigmas_are_learned_and_kept(model, splits, tmp_path):
    found = learn_prompts(model, splits.train, perturbation="contrast-brightness", **RECIPE)
    loaded = PromptSet.load(found.save(tmp_path / "prompts.safetensors"))
    assert loaded.provenance["sigmas"] == [[0.55, 0.2]]
    assert loaded.learned_on == "contrast-brightness"


def test_levels_of_learning_are_checked_in_the_units_of_the_perturbation(model, splits):
    with pytest.raises(ValueError, match="sigma=0.75 is no number above 0 and up to 0.57.* contrast"):
        learn_prompts(model, splits.train, perturbation="contrast", sigmas=(0.25, 0.75), **RECIPE)
    with pytest.raises(ValueError, match="takes a pair"):
        learn_prompts(model, splits.train, perturbation="contrast-brightness", sigmas=(0.4,), **RECIPE)


def test_prompts_are_certified_for_what_they_were_learned_on_only(model, splits, on_contrast):
    few_shot = made(model, splits, ["few-shot PromptSmooth"], sigma=0.4, perturbation="contrast")
    assert few_shot[0].learned_on == "contrast"
    asked = {"sigmas": [0.4], **NUMBERS}
    assert len(mr.certify_dataset(model, splits.test, few_shot, perturbation="contrast", **asked)) == 2
    for other in ("gamma", "pixel-noise"):
        advice = f"'contrast' and is to be certified for '{other}'; learn them with perturbation='{other}'"
        with pytest.raises(ValueError, match=advice):
            mr.certify_dataset(model, splits.test, few_shot, perturbation=other, **asked)
    clean = made(model, splits, ["zero-shot", "CoOp"], sigma=0.25)
    assert [method.learned_on for method in clean] == [None, None]
    assert len(mr.certify_dataset(model, splits.test, clean, perturbation="contrast", **asked)) == 4


def test_every_method_is_made_for_contrast_and_certified(model, splits, tmp_path):
    given = {"sigma": 0.4, "perturbation": "contrast", "kept": tmp_path}
    methods = made(model, splits, **given)
    learned = {method.name: method.learned_on for method in methods}
    assert learned == {name: None if name in ("zero-shot", "CoOp") else "contrast" for name in NAMES}
    rows = mr.certify_dataset(model, splits.test, methods, perturbation="contrast", sigmas=[0.4], **NUMBERS)
    assert rows["method"].tolist() == NAMES * 2
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = made(model, splits, **given)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    for first, second in zip(methods[1:4], again[1:4], strict=True):
        assert torch.equal(first.class_features, second.class_features)
    # The same numbers for another family are other prompts.
    other = made(model, splits, NAMES[1:4], sigma=0.4, perturbation="gamma", kept=tmp_path)
    assert [method.learned_on for method in other] == [None, "gamma", "gamma"]
    assert not torch.equal(other[1].class_features, methods[2].class_features)


def test_clean_prompts_of_two_parameters_see_the_image_as_it_is(model, splits):
    """A level of 0 once left the second parameter as the memory was."""
    for _ in range(3):
        (found,) = made(model, splits, ["CoOp"], sigma=(0.4, 0.2), perturbation="contrast-brightness")
        (clean,) = made(model, splits, ["CoOp"], sigma=0.25)
        torch.testing.assert_close(found.class_features, clean.class_features, atol=1e-4, rtol=0)


# Pools


def test_a_pool_is_adapted_to_by_the_perturbation(model, splits, on_contrast):
    found = adapt_to_pool(model, on_contrast, splits.pool, sigma=0.4, perturbation="contrast")
    assert found.learned_on == found.provenance["perturbation"] == "contrast"
    assert found.provenance["pool"]["sigma"] == 0.4
    assert found.context.shape == on_contrast.context.shape
    assert not torch.equal(found.context, on_contrast.context)
    with pytest.raises(ValueError, match="learned on 'contrast' cannot be adapted to a pool under 'gamma'"):
        adapt_to_pool(model, on_contrast, splits.pool, sigma=0.4, perturbation="gamma")
    with pytest.raises(ValueError, match="learned on 'contrast' cannot be adapted to a pool under 'pixel-noise'"):
        adapt_to_pool(model, on_contrast, splits.pool, sigma=0.4)
    written = mr.smoothing.prompts.text_prompts(model, splits.pool.classes, splits.pool.templates[0])
    assert adapt_to_pool(model, written, splits.pool, sigma=0.6, perturbation="gamma").learned_on == "gamma"


def test_pools_that_start_from_a_file_are_kept_apart_by_perturbation(model, splits, on_contrast, tmp_path, monkeypatch):
    start = replace(on_contrast, provenance={"method": "CoOp's code"})
    monkeypatch.setattr(paper_methods, "load_coop_context", lambda *_: start)
    method = PaperMethod("few-shot + pool", checkpoint="a file")
    given = {"train": splits.train, "pool": splits.pool, "sigma": 0.4, "kept": tmp_path}
    for name in ("pixel-noise", "contrast", "gamma", "contrast"):
        (found,) = prompt_methods(model, splits.test, [method], perturbation=name, **given)
        assert found.learned_on == name
    assert len(list(tmp_path.iterdir())) == 3


# Towers and adapters


@pytest.mark.filterwarnings("ignore:re-training demo-clip")
def test_a_tower_is_retrained_on_contrast(model, splits):
    words = {"sigma": 0.4, "epochs": 1, "learning_rate": 1e-4}
    found = retrain_on_noise(model, splits.train, perturbation="contrast", **words)
    assert found.id == "demo-clip retrained on contrast at sigma 0.4"
    assert (found.provenance["perturbation"], found.provenance["sigma"]) == ("contrast", 0.4)
    again = retrain_on_noise(model, splits.train, perturbation="contrast", **words)
    noise = retrain_on_noise(model, splits.train, **words)
    assert noise.id == "demo-clip retrained at sigma 0.4"
    assert found.provenance["last_loss"] == again.provenance["last_loss"] != noise.provenance["last_loss"]
    pair = retrain_on_noise(model, splits.train, perturbation="contrast-brightness", **words | {"sigma": (0.4, 0.2)})
    assert pair.id == "demo-clip retrained on contrast-brightness at sigma 0.4 and 0.2"
    rows = mr.certify_dataset(found, splits.test, perturbation="contrast", sigmas=[0.4], **NUMBERS)
    assert set(rows["model"]) == {found.id}


@pytest.mark.filterwarnings("ignore:re-training demo-clip")
def test_training_on_a_level_learns_from_the_copies_of_its_stream(model, splits):
    """The first loss is that of the first epoch's copies, drawn here by hand."""
    found = retrain_on_noise(model, splits.train, perturbation="gamma", sigma=0.6, epochs=1, learning_rate=1e-9)
    pixels = model.prepare(splits.train.images)
    streams = [
        NoiseStream(0, splits.train.id, int(i), 0.6, "adapt", find_perturbation("gamma")) for i in splits.train.indices
    ]
    copies = torch.cat([noisy_copies(image, stream) for image, stream in zip(pixels, streams, strict=True)])
    trained = model.trainable_copy()
    texts = model.class_features(splits.train.classes, splits.train.templates[:1])
    for module in trained.modules():  # as in training: the statistics are those of the batch
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train()
    logits = model.logit_scale * trained.encode_image(copies) @ texts.T
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(splits.train.labels))
    assert found.provenance["first_loss"] == pytest.approx(float(loss), rel=1e-4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_an_augmentation_perturbs_each_image_at_one_of_its_levels():
    pixels = torch.rand(400, 3, 8, 8, generator=seeded(9))
    augmentation = Augmentation(sigmas=(0.1, 0.5), perturbation="contrast")
    found = add_noise(pixels, augmentation, generator=seeded())
    assert torch.equal(found, add_noise(pixels, augmentation, generator=seeded()))
    k = (found.flatten(1).std(1) / pixels.flatten(1).std(1)).log()  # close to the parameter: channels have means
    torch.testing.assert_close(found.mean((2, 3)), pixels.mean((2, 3)))
    expected = math.sqrt((0.1**2 + 0.5**2) / 2)
    assert float(k.std()) == pytest.approx(expected, rel=0.15)
    pairs = Augmentation(sigmas=((0.4, 0.2), 0.0), perturbation="contrast-brightness")
    mixed = add_noise(pixels, pairs, generator=seeded())
    clean = (mixed - pixels).abs().amax((1, 2, 3)) < 1e-6
    assert 0.4 < float(clean.float().mean()) < 0.6


def test_noise_on_pixels_is_what_it_was():
    pixels = torch.rand(6, 3, 8, 8, generator=seeded(9))
    found = add_noise(pixels, Augmentation(sigmas=(0.1, 0.5)), generator=seeded())
    generator = seeded()
    levels = torch.tensor([0.1, 0.5])[torch.randint(2, (6,), generator=generator)]
    noise = torch.randn(pixels.shape, generator=generator)
    torch.testing.assert_close(found, pixels + levels[:, None, None, None] * noise)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbation": "contrst"}, "unknown perturbation 'contrst'.*did you mean 'contrast'"),
        ({"perturbation": find_perturbation("contrast")}, "unknown perturbation Contrast"),
        ({"perturbation": "contrast", "sigmas": (25,)}, "log of the contrast factor"),
        ({"perturbation": "contrast-brightness", "sigmas": (0.4,)}, "takes a pair"),
        ({"sigmas": ((0.4, 0.2),)}, "pixel-noise has one parameter"),
    ],
)
def test_augmentations_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_records_of_training_name_the_perturbation_and_those_of_pixel_noise_are_what_they_were():
    record = Recipe(augmentation=Augmentation(sigmas=(0.1,))).as_json()["augmentation"]
    assert record == {"crop": 0.8, "flip": True, "sigmas": [0.1], "corruptions": [], "share": 0.5}
    other = Augmentation(sigmas=((0.4, 0.2),), perturbation="contrast-brightness")
    record = json.loads(json.dumps(Recipe(augmentation=other).as_json()["augmentation"]))
    assert record["perturbation"] == "contrast-brightness"
    assert Augmentation(**record | {"sigmas": tuple(record["sigmas"])}) == other


def test_adapters_learn_from_copies_by_contrast(model, phantoms, monkeypatch):
    rising = itertools.count()  # so that the one epoch counts
    monkeypatch.setattr(metrics, "balanced_accuracy", lambda *_: next(rising) / 100)
    sets = ([phantoms("breast", split="train", n=6)], [phantoms("breast", split="val", n=4)])
    words = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "rank": 2}

    def adapted(**augmentation):
        found = adapt_lora(
            model, sets[0], validation=sets[1], augmentation=Augmentation(share=1.0, **augmentation), **words
        )
        return found.model.encode_image(model.prepare(sets[0][0].images))

    contrast = adapted(sigmas=(0.4,), perturbation="contrast")
    assert torch.equal(contrast, adapted(sigmas=(0.4,), perturbation="contrast"))
    assert not torch.equal(contrast, adapted(sigmas=(0.4,)))
