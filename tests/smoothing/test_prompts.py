"""Learned prompts: their tokens, their training on cached features, their files."""

import importlib
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

import medrobust_lib as mr
from medrobust_lib.adaptation.training_images import Augmentation
from medrobust_lib.data.dataset import draw_shots
from medrobust_lib.files import file_sha256
from medrobust_lib.models.dual_encoder import Tokens
from medrobust_lib.models.geometry import CropAndFlip
from medrobust_lib.models.weights import read_context, read_state_dict
from medrobust_lib.smoothing import paper_methods, prompts
from medrobust_lib.smoothing.methods import AdaptedPrompts, FixedPrompts
from medrobust_lib.smoothing.noise import NoiseStream
from medrobust_lib.smoothing.prompts import PromptSet, learn_prompts, mean_prediction_entropy, sharpen


@pytest.fixture(scope="module")
def train(phantoms):
    return phantoms("breast", split="train", n=24)


@pytest.fixture(scope="module")
def learned(model, train):
    return learn_prompts(model, train, sigmas=(0.1,), shots=4, epochs=2, draws_per_image=2, learning_rate=0.02)


# Models


@pytest.fixture
def tiny(monkeypatch):
    """Encoders of random weights."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return importlib.import_module("tiny_encoders")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Least", "x reads whole texts only: prompts are learned among word embeddings (embed_tokens)"),
        ("NoGradient", "x passes no gradient from the features of a text back to its word embeddings"),
        (
            "PadsInFront",
            "x does not frame every text by the same tokens with its padding at the end, so that there is no place "
            "among its words where prompts are learned",
        ),
    ],
)
def test_a_model_that_learns_no_prompts_says_why_before_an_image_is_encoded(tiny, kind, reason, train, monkeypatch):
    model = getattr(tiny, kind)("x")
    monkeypatch.setattr(tiny.Tiny, "encode_image", None)
    assert prompts.why_not_learned(model) == reason
    for learn in (lambda: learn_prompts(model, train), lambda: prompts.text_prompts(model, train.classes, "a {}")):
        with pytest.raises(ValueError, match=re.escape(f"{reason}; hand-written prompts work with it")):
            learn()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_models_that_learn_prompts_have_no_reason_not_to_in_any_gradient_mode(tiny, model, mode):
    models = model, tiny.Tiny("x")
    with mode():
        assert [prompts.why_not_learned(one) for one in models] == ["", ""]


# Tokens


@pytest.mark.parametrize("kind", ["Tiny", "NoStart", "Filled"])
def test_prompts_of_every_tokenizer_stand_where_its_text_stands(tiny, kind):
    model, template = getattr(tiny, kind)("x"), "a picture of {}, seen."
    classes = ("dense tissue", "bone")
    frame = prompts.frame_from_template(model, classes, template)
    texts = [template.replace("{}", noun) for noun in classes]
    tokens = model.tokenize(texts)
    assert torch.equal(frame.tokens.ids, tokens.ids)
    assert torch.equal(frame.tokens.mask, tokens.mask)
    first = 1 if kind == "Tiny" else 0
    assert frame.places.tolist() == [[first, first + 1, first + 2]] * 2
    assert torch.equal(frame.features(model, frame.text_context), model.encode_text(texts))
    # "." after the name, then the end token, then what fills the rest.
    names, end = model.tokenize(["dense tissue.", "bone."]).ids, [2, 0, 0]
    for position, places in {"end": (0, 1, 2), "middle": (0, 3, 4), "front": (2, 3, 4)}.items():
        empty = prompts.empty_frame(model, classes, n_context=3, position=position)
        expected = [first + place for place in places]
        assert empty.places[0].tolist() == expected
        kept = [value for place, value in enumerate(empty.tokens.ids[0].tolist()) if place not in expected]
        assert kept[: first + 6] == [*names[0].tolist()[: first + 3], *end]
        assert (
            empty.tokens.mask.sum(1).tolist() == [first + 7, first + 6] if kind != "Filled" else [tiny.CONTEXT - 1] * 2
        )
    most = model.context_length - first - 3  # beside "bone", "." and the end token
    assert prompts.empty_frame(model, ("bone",), n_context=most).tokens.ids.shape[1] == model.context_length
    with pytest.raises(ValueError, match="reads at most"):
        prompts.empty_frame(model, ("bone",), n_context=most + 1)


@pytest.mark.parametrize("kind", ["NoStart", "Filled"])
def test_prompts_are_learned_and_certified_with_every_tokenizer(tiny, kind, train, phantoms):
    model = getattr(tiny, kind)("x").eval()
    learned = learn_prompts(
        model, train, sigmas=(0.1,), shots=2, epochs=2, draws_per_image=2, template="a picture of {}"
    )
    assert learned.class_features(model).shape == (len(train.classes), tiny.WIDTH)
    few = phantoms("breast", n=2)
    methods = [FixedPrompts("learned", learned.class_features(model)), AdaptedPrompts("adapted", model, learned)]
    rows = mr.certify_dataset(model, few, methods, sigmas=[0.1], n0=8, n=16)
    assert set(rows.guarantee) == {"standard", "frozen-prompt"}


@pytest.mark.parametrize("dataset", ["phantom/histology", "phantom/chest"])
def test_starting_from_text_and_taking_no_step_gives_the_written_prompt_bit_for_bit(model, dataset):
    data = mr.load_dataset(dataset, n=9)
    for template in data.templates:
        written = prompts.text_prompts(model, data.classes, template)
        texts = [template.replace("{}", noun) for noun in data.classes]
        assert torch.equal(written.class_features(model), model.encode_text(texts)), template


def test_context_is_counted_in_tokens_not_in_words(model):
    frame = prompts.frame_from_template(model, ["mucus"], "An H&E image patch of {}.")
    assert frame.places.shape[1] == len(model.tokenize(["An H&E image patch of"]).ids[0]) - 2 > 5


@pytest.mark.parametrize("tunable", [1, 2, 5, None])
def test_freezing_words_of_the_start_does_not_change_it(model, tunable):
    data = mr.load_dataset("phantom/histology", n=9)
    written = prompts.text_prompts(model, data.classes, data.templates[0], tunable=tunable)
    texts = [data.templates[0].replace("{}", noun) for noun in data.classes]
    assert torch.equal(written.class_features(model), model.encode_text(texts))
    whole = prompts.text_prompts(model, data.classes, data.templates[0]).context
    assert torch.equal(written.context, whole[:tunable])


SIX = "a photomicrograph of the tissue showing {}."


def features_with(model, classes, moved):
    """Features of the written prompt whose first word embeddings are replaced."""
    tokens = model.tokenize([SIX.replace("{}", noun) for noun in classes])
    embeddings = model.embed_tokens(tokens).detach().clone()
    embeddings[:, 1 : 1 + len(moved)] = moved
    return model.encode_embeddings(embeddings, tokens)


def test_only_the_tunable_tokens_move(model, train):
    whole = prompts.text_prompts(model, train.classes, SIX).context
    start = prompts.text_prompts(model, train.classes, SIX, tunable=2)
    assert len(whole) >= 6 and start.context.shape == (2, 128)
    bank = prompts.noisy_bank(model, train.subset([0]), sigmas=(0.1,), draws=9, seed=0, choose=np.random.default_rng(0))
    moved = sharpen(model, start.frame(model), start.context, bank[0])
    assert ((moved - start.context).abs() > 1e-3).any(1).all()
    found = replace(start, context=moved)
    assert torch.allclose(found.class_features(model), features_with(model, train.classes, moved), atol=1e-6)
    assert not torch.allclose(found.class_features(model), start.class_features(model), atol=1e-4)


def test_a_few_tunable_tokens_take_the_step_that_all_would_take_with_the_others_held(model, train):
    """AdamW is element-wise, so freezing tokens leaves the first step of the others as it is."""
    bank = prompts.noisy_bank(model, train.subset([0]), sigmas=(0.1,), draws=9, seed=0, choose=np.random.default_rng(0))
    few, all_ = (prompts.text_prompts(model, train.classes, SIX, tunable=tunable) for tunable in (2, None))
    small, large = (sharpen(model, one.frame(model), one.context, bank[0]) for one in (few, all_))
    # Up to coordinates whose gradient is so near 0 that its sign is rounding.
    assert ((small - large[:2]).abs() < 1e-5).float().mean() > 0.95
    assert ((large[2:] - all_.context[2:]).abs() > 1e-3).any(1).all()


def test_few_shot_learning_freezes_the_other_tokens_too_and_a_file_keeps_them(model, train, tmp_path):
    change = {"sigmas": (0.1,), "shots": 2, "epochs": 2, "draws_per_image": 1, "learning_rate": 0.5}
    found = learn_prompts(model, train, template=SIX, tunable=2, **change)
    assert found.context.shape == (2, 128)
    assert not torch.allclose(found.context, prompts.text_prompts(model, train.classes, SIX, tunable=2).context)
    again = PromptSet.load(found.save(tmp_path / "prompts.safetensors"))
    assert torch.allclose(again.class_features(model), features_with(model, train.classes, found.context), atol=1e-6)


@pytest.mark.parametrize("tunable", [0, 60, 2.5, True])
def test_tunable_tokens_that_the_start_does_not_have_are_refused(model, train, tunable):
    reason = rf"tunable={tunable} is no whole number from 1 to \d+: 'a photo\w+ of the tissue showing' has \d+ tokens"
    with pytest.raises(ValueError, match=reason):
        prompts.text_prompts(model, train.classes, SIX, tunable=tunable)


def test_tunable_tokens_need_a_start(model, train):
    with pytest.raises(ValueError, match="tunable=2 counts tokens of a template, and none is given; use n_context"):
        learn_prompts(model, train, shots=2, tunable=2)


@pytest.mark.parametrize(
    ("position", "places"), [("end", [1, 2, 3, 4]), ("middle", [1, 2, 5, 6]), ("front", [3, 4, 5, 6])]
)
def test_the_class_name_stands_where_it_should(model, position, places):
    frame = prompts.empty_frame(model, ["adipose tissue"], n_context=4, position=position)
    assert frame.places.tolist() == [places]
    ids = frame.tokens.ids[0].tolist()
    written = model.tokenize(["adipose tissue."]).ids[0].tolist()
    assert [ids[i] for i in range(len(ids)) if i not in places] == written


def test_padding_after_the_end_token_can_be_cut_exactly(model):
    """What the text tower reads is as long as the longest prompt, not as its context."""
    texts = ["a benign mass.", "a malignant mass with a spiculated margin."]
    tokens = model.tokenize(texts)
    padded = Tokens(
        functional.pad(tokens.ids, (0, model.context_length - tokens.ids.shape[1])),
        functional.pad(tokens.mask, (0, model.context_length - tokens.mask.shape[1])),
    )
    assert tokens.ids.shape[1] < model.context_length
    long = model.encode_embeddings(model.embed_tokens(padded), padded)
    assert torch.allclose(model.encode_embeddings(model.embed_tokens(tokens), tokens), long, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_context": 0}, "n_context=0 is no whole number of 1 or more: a learned prompt"),
        ({"n_context": 60}, r"prompts of \d+ tokens .* demo-clip, which reads at most 48"),
        ({"position": "centre"}, "unknown position 'centre'; choose one of end, middle, front"),
    ],
)
def test_frames_that_cannot_be_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        prompts.empty_frame(model, ["mucus"], **({"n_context": 4} | change))


@pytest.mark.parametrize("template", ["no place", "{} alone"])
def test_a_template_needs_text_before_its_class(model, template):
    with pytest.raises(ValueError, match="needs text before the class name"):
        prompts.frame_from_template(model, ["mucus"], template)


# Few-shot


def test_learning_lowers_the_loss_on_noisy_shots(model, phantoms):
    train = phantoms("chest", split="train", n=24)
    change = {"sigmas": (0.25,), "shots": 8, "draws_per_image": 2, "n_context": 4}
    short = learn_prompts(model, train, epochs=1, **change)  # the warm-up epoch hardly moves
    long = learn_prompts(model, train, epochs=12, learning_rate=0.02, **change)
    bank = prompts.noisy_bank(model, train, sigmas=(0.25,), draws=2, seed=9, choose=np.random.default_rng(0))
    labels = torch.tensor(train.labels).repeat_interleave(2)

    def loss(found):
        logits = model.logit_scale * bank.flatten(0, 1) @ found.class_features(model).T
        return float(functional.cross_entropy(logits, labels))

    assert loss(long) < loss(short) - 0.05


def test_only_the_context_is_learned_and_in_float32(model, train, learned):
    assert learned.context.dtype == torch.float32
    assert learned.context.shape == (5, 128)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    own = learn_prompts(model, train, sigmas=(0.1,), shots=2, epochs=2, draws_per_image=1, class_specific=True)
    assert own.context.shape == (2, 5, 128)
    assert not torch.equal(own.context[0], own.context[1])


def test_the_seed_decides_everything(model, train, learned):
    change = {"sigmas": (0.1,), "shots": 4, "epochs": 2, "draws_per_image": 2, "learning_rate": 0.02}
    with torch.no_grad():  # gradients that are switched off outside do not matter either
        assert torch.equal(learn_prompts(model, train, **change).context, learned.context)
    assert not torch.equal(learn_prompts(model, train, seed=1, **change).context, learned.context)


def test_as_many_draws_as_epochs_is_learning_on_fresh_noise(model, train):
    """The same steps written out, every image encoded anew at every visit."""
    epochs, shots, rate = 3, 2, 0.05
    cached = learn_prompts(
        model, train, sigmas=(0.1, 0.2), shots=shots, epochs=epochs, draws_per_image=epochs, learning_rate=rate
    )
    draw = np.random.default_rng(0)
    chosen = draw_shots(train, shots, draw)
    levels = draw.choice(np.array([0.1, 0.2]), size=(len(chosen), epochs))
    generator = torch.Generator().manual_seed(0)
    frame = prompts.empty_frame(model, train.classes, n_context=5)
    context = torch.empty(5, 128).normal_(0, 0.02, generator=generator).requires_grad_(True)
    optimiser = torch.optim.SGD([context], lr=rate, momentum=0.9, weight_decay=5e-4)
    pixels = model.prepare(chosen.images)
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = 1e-5 if epoch == 0 else rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for rows in torch.randperm(len(chosen), generator=generator).split(16):
            noisy = torch.stack([
                pixels[row] + NoiseStream(0, train.id, int(chosen.indices[row]), levels[row, epoch], "adapt").draw(
                    tuple(pixels.shape[1:]), first=epoch)[0]
                for row in rows.tolist()
            ])  # fmt: skip
            logits = model.logit_scale * model.encode_image(noisy) @ frame.features(model, context).T
            optimiser.zero_grad()
            functional.cross_entropy(logits, torch.from_numpy(chosen.labels)[rows]).backward()
            optimiser.step()
    assert torch.allclose(cached.context, context.detach(), atol=1e-5)


FEW = {"sigmas": (0.1, 0.2), "shots": 2, "epochs": 3, "draws_per_image": 3, "learning_rate": 0.05}


def test_a_crop_that_keeps_all_changes_nothing(model, train):
    plain = learn_prompts(model, train, **FEW)
    whole = learn_prompts(model, train, **FEW, augmentation=CropAndFlip(crop=1, flip=False))
    assert torch.equal(whole.context, plain.context)
    assert (whole.provenance["crop"], whole.provenance["flip"]) == (1, False)
    assert "crop" not in plain.provenance


def test_crops_depend_on_the_seed_alone(model, train):
    augmentation = CropAndFlip(crop=0.5)
    first, again = (learn_prompts(model, train, **FEW, augmentation=augmentation) for _ in range(2))
    assert torch.equal(first.context, again.context)
    for change in ({"augmentation": None}, {"augmentation": CropAndFlip(crop=1)}, {"seed": 1}):
        other = learn_prompts(model, train, **FEW | {"augmentation": augmentation} | change)
        assert not torch.equal(other.context, first.context)


def test_every_copy_is_cut_out_and_mirrored_anew_before_its_noise(model, train):
    shot = train.subset([0])
    pixels = model.prepare(shot.images)[0]
    stream = NoiseStream(0, train.id, int(shot.indices[0]), 0.1, "adapt")
    augmentation = CropAndFlip(crop=0.3)
    cut = [stream.cropped(pixels, augmentation, number=number) for number in range(4)]
    assert all(not torch.equal(one, other) for one in cut for other in (pixels, *cut) if one is not other)
    noisy = torch.stack([one + stream.draw(tuple(pixels.shape), first=i)[0] for i, one in enumerate(cut)])
    drawn = {"sigmas": (0.1,), "seed": 0, "choose": np.random.default_rng(0), "augmentation": augmentation}
    bank = prompts.noisy_bank(model, shot, draws=4, **drawn)
    with torch.no_grad():
        assert torch.allclose(bank[0], model.encode_image(noisy), atol=1e-5)


def test_with_as_many_draws_as_epochs_every_epoch_encodes_copies_of_its_own(model, train, monkeypatch):
    seen = []
    encode = type(model).encode_image
    monkeypatch.setattr(type(model), "encode_image", lambda own, pixels: seen.append(pixels) or encode(own, pixels))
    learn_prompts(model, train, **FEW | {"sigmas": (0.0,)}, augmentation=CropAndFlip(crop=0.3))
    copies = torch.cat(seen).flatten(1)
    assert len(copies) == 2 * 2 * 3  # shots, classes, epochs
    assert len(copies.unique(dim=0)) == 12


@pytest.mark.parametrize("wrong", [True, 0.8, Augmentation(sigmas=(0.1,)), Augmentation(corruptions=("contrast",))])
def test_what_prompts_are_not_learned_on_is_refused(model, train, wrong):
    with pytest.raises(ValueError, match=r"augmentation=.*: give None or CropAndFlip\(crop=..., flip=...\)"):
        learn_prompts(model, train, shots=2, augmentation=wrong)


def test_shots_are_balanced_and_too_few_are_told(train):
    draw = np.random.default_rng(0)
    chosen = draw_shots(train, 3, draw)
    assert list(np.bincount(chosen.labels)) == [3, 3]
    with pytest.warns(UserWarning, match=r"2 of 2 classes have fewer images than shots=50 \(.* has 12, .* has 12\)"):
        assert len(draw_shots(train, 50, draw)) == 24


def test_coop_is_the_noiseless_case(model, train):
    naive = learn_prompts(model, train, sigmas=(0.0,), shots=2, epochs=1, draws_per_image=1)
    assert naive.provenance["method"] == "CoOp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": ()}, r"sigmas=\(\): give at least one level in \[0, 1\] pixel units"),
        ({"sigmas": (-0.1,)}, "sigma=-0.1: smoothing needs noise"),
        ({"shots": 0}, "shots=0 is no whole number of 1 or more: few-shot learning"),
        ({"epochs": 0}, "epochs=0 is no whole number of 1"),
        ({"draws_per_image": 0}, "draws_per_image=0 is no whole number of 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is no number above 0"),
    ],
)
def test_impossible_training_is_refused(model, train, change, message):
    with pytest.raises(ValueError, match=message):
        learn_prompts(model, train, **change)


def test_a_class_without_images_is_named(model, train):
    benign = train.subset(train.labels == 0)
    with pytest.raises(ValueError, match=f"no image of class {train.classes[1]!r}"):
        learn_prompts(model, benign, shots=2, epochs=1)


# Zero-shot


def test_entropy_of_the_mean_is_at_least_the_mean_of_the_entropies():
    logits = torch.randn(7, 20, 5, generator=torch.Generator().manual_seed(0)) * 3
    probabilities = logits.softmax(-1)
    by_hand = -(probabilities.mean(1) * probabilities.mean(1).log()).sum(-1)
    assert torch.allclose(mean_prediction_entropy(logits), by_hand, atol=1e-6)
    each = -(probabilities * probabilities.log()).sum(-1).mean(1)
    assert (mean_prediction_entropy(logits) >= each - 1e-6).all()
    assert mean_prediction_entropy(torch.zeros(4, 5)) == pytest.approx(math.log(5))


def test_a_step_lowers_the_entropy_starts_anew_and_leaves_its_start_alone(model, train):
    frame = prompts.frame_from_template(model, train.classes, train.templates[0])
    start = frame.text_context
    before = start.clone()
    features = prompts.noisy_bank(
        model, train.subset([0]), sigmas=(0.1,), draws=30, seed=0, choose=np.random.default_rng(0)
    )[0]

    def entropy(context):
        return float(mean_prediction_entropy(model.logit_scale * features @ frame.features(model, context).T))

    once = sharpen(model, frame, start, features)
    assert entropy(once) < entropy(start)
    assert entropy(sharpen(model, frame, start, features, steps=5)) < entropy(once)
    assert torch.equal(start, before)
    assert torch.equal(once, sharpen(model, frame, start, features))
    # AdamW's first step moves every coordinate by the learning rate, whatever the gradient's size.
    assert (once - start).abs().max() == pytest.approx(5e-3, rel=0.05)
    with pytest.raises(ValueError, match="steps=0 is no whole number of 1 or more: adaptation takes"):
        sharpen(model, frame, start, features, steps=0)


# Files


def test_prompts_survive_saving(model, learned, tmp_path):
    path = learned.save(tmp_path / "below" / "prompts.safetensors")
    again = PromptSet.load(path)
    assert torch.equal(again.context, learned.context)
    assert (again.classes, again.model, again.provenance) == (learned.classes, learned.model, learned.provenance)
    assert torch.equal(again.class_features(model, learned.classes), learned.class_features(model))
    assert again.provenance["images"] and again.provenance["sigmas"] == [0.1]
    assert [file.name for file in path.parent.iterdir()] == ["prompts.safetensors"]


def test_prompts_of_another_model_or_class_list_are_refused_with_both_named(model, learned):
    with pytest.raises(ValueError, match="learned for the model 'plip' and mean nothing to 'demo-clip'"):
        PromptSet(context=learned.context, classes=learned.classes, model="plip").class_features(model)
    with pytest.raises(ValueError, match=r"learned for the classes \['malignant.* not for \['cat', 'dog'\]"):
        learned.class_features(model, ["cat", "dog"])


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompts at .*missing.safetensors"):
        PromptSet.load(tmp_path / "missing.safetensors")
    save_file({"context": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no prompts of format 1"):
        PromptSet.load(tmp_path / "other.safetensors")


# Prompts of CoOp's code


class Warmup(torch.optim.lr_scheduler.LRScheduler):
    """A schedule as Dassl's, with which CoOp is written: its state holds its successor, and that the optimiser."""

    def __init__(self, optimiser, successor):
        self.successor = successor
        super().__init__(optimiser)

    def get_lr(self):
        return [1e-5 for _ in self.base_lrs]

    def step(self, epoch=None):
        super().step(epoch) if self.last_epoch < 1 else self.successor.step(epoch)


def write_checkpoint(folder, context, **more):
    """Write what CoOp's code writes after some steps: tensors, epoch, and the states of optimiser and schedule."""
    learned = torch.nn.Parameter(context.clone())
    optimiser = torch.optim.SGD([learned], lr=0.002, momentum=0.9, weight_decay=5e-4)
    schedule = Warmup(optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 50.0))
    for _ in range(3):
        (0 * learned).sum().backward()
        optimiser.step()
        schedule.step()
    tensors = {"ctx": context, "token_prefix": torch.zeros(2, 1, 128), "token_suffix": torch.zeros(2, 42, 128)}
    content = {"state_dict": tensors, "epoch": 50, "optimizer": optimiser.state_dict(), "val_result": None}
    path = folder / "prompt_learner" / "model.pth.tar-50"
    path.parent.mkdir()
    torch.save(content | {"scheduler": schedule.state_dict()} | more, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_context_of_coops_code_stands_before_the_class_names(model, train, tmp_path, dtype):
    context = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    path, safe = write_checkpoint(tmp_path, context), torch.serialization.get_safe_globals()
    found = paper_methods.load_coop_context(path, model, train.classes)
    assert torch.equal(found.context, context.float())
    # The prompt written out with placeholders, as CoOp does.
    tokens = model.tokenize([f"x x x x x {noun}." for noun in train.classes])
    embeddings = model.embed_tokens(tokens).detach().clone()
    embeddings[:, 1:6] = context
    assert torch.equal(found.class_features(model, train.classes), model.encode_embeddings(embeddings, tokens))
    assert found.provenance == {"method": "CoOp's code", "file": path.name, "sha256": file_sha256(path)}
    assert set(torch.serialization.get_safe_globals()) == set(safe)


def test_a_checkpoint_makes_no_object_of_training(tmp_path):
    """Neither optimiser nor schedule come to be, and what is not known to be of a training is refused by name."""
    path = write_checkpoint(tmp_path, torch.zeros(5, 128))
    with pytest.raises(ValueError, match=r"holds more than tensors, which may run code: torch.optim.lr_scheduler"):
        read_state_dict(path)
    with mock.patch.object(torch.optim.SGD, "__setstate__", side_effect=AssertionError):
        assert read_context(path, width=128, id="x").shape == (5, 128)
    (other := tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"model.pth.tar-50, .* holds more than tensors, which may run code: pathlib"):
        read_context(write_checkpoint(other, torch.zeros(5, 128), val_result=Path("x")), width=128, id="x")


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (torch.zeros(5, 512), r"shape \[5, 512\], the word embeddings of demo-clip have width 128; give one of shape"),
        (torch.zeros(128), r"shape \[128\], the word embeddings of demo-clip have width 128"),
        (torch.zeros(0, 128), r"shape \[0, 128\]"),
        (torch.zeros(2, 5, 128), r"holds 2 contexts, one per class, and does not say which class each belongs to"),
        (torch.full((5, 128), torch.nan), "640 of 640 context values are not finite"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(model, train, tmp_path, context, message):
    with pytest.raises(ValueError, match=message):
        paper_methods.load_coop_context(write_checkpoint(tmp_path, context), model, train.classes)


def test_a_checkpoint_without_a_context_is_refused_with_what_it_holds(model, train, tmp_path):
    path = write_checkpoint(tmp_path, torch.zeros(5, 128), state_dict={"visual.proj": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"tar-50 holds visual.proj, no 'ctx' of real numbers; give CoOp's prompt_l"):
        paper_methods.load_coop_context(path, model, train.classes)
    for odd in (torch.zeros(5, 128, dtype=torch.complex64), torch.zeros(5, 128).to_sparse(), torch.zeros(5, 128).int()):
        shutil.rmtree(path.parent)
        path = write_checkpoint(tmp_path, torch.zeros(5, 128), state_dict={"ctx": odd})
        with pytest.raises(ValueError, match="holds ctx, no 'ctx' of real numbers"):
            paper_methods.load_coop_context(path, model, train.classes)
    with pytest.raises(FileNotFoundError, match="missing"):
        paper_methods.load_coop_context(tmp_path / "missing", model, train.classes)
