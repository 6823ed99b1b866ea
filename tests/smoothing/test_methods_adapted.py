"""Prompts that adapt to images, each with the guarantee it deserves."""

import numpy as np
import pytest
import torch

import medrobust_lib as mr
from medrobust_lib.smoothing import methods, prompts
from medrobust_lib.smoothing.methods import (
    AdaptationFeatures,
    AdaptedPrompts,
    FixedPrompts,
    PerSamplePrompts,
)
from medrobust_lib.smoothing.noise import NoiseStream
from medrobust_lib.smoothing.paper_methods import adapt_to_pool
from medrobust_lib.smoothing.prompts import mean_prediction_entropy

SIGMA = 0.1


@pytest.fixture(scope="module")
def data(phantoms):
    return phantoms("chest", n=3)


@pytest.fixture(scope="module")
def start(model, data):
    return prompts.text_prompts(model, data.classes, data.templates[0])


def adaptation(model, data, row=0, count=20):
    stream = NoiseStream(0, data.id, int(data.indices[row]), SIGMA, "adapt")
    return AdaptationFeatures.draw(model, model.prepare(data.images)[row], stream, count=count)


def certify(model, data, methods, **change):
    settings = {"sigmas": [SIGMA], "n0": 10, "n": 60, "alpha": 0.05, "sampling": "fixed"} | change
    return mr.certify_dataset(model, data, methods, **settings)


def test_per_image_prompts_are_the_sharpened_prompts_of_that_image(model, data, start):
    method = AdaptedPrompts("zero-shot PromptSmooth", model, start, n_adapt=20)
    found = adaptation(model, data)
    frame = start.frame(model)
    context = prompts.sharpen(model, frame, start.context, found.features)
    features = prompts.noisy_bank(model, data, sigmas=(SIGMA,), draws=8, seed=5, choose=np.random.default_rng(0))
    expected = (features.flatten(0, 1) @ frame.features(model, context).detach().T).argmax(1)
    assert torch.equal(method.classifier(found)(features.flatten(0, 1)), expected)
    with pytest.raises(ValueError, match="adapts to the image and needs its adaptation features"):
        method.classifier(None)


def test_every_image_starts_anew(model, data, start):
    method = AdaptedPrompts("adapted", model, start, n_adapt=10, steps=3)
    together = certify(model, data, [method]).drop(columns="seconds")
    alone = certify(model, data.subset([2]), [method]).drop(columns="seconds")
    assert together[together.image == alone.image[0]].reset_index(drop=True).equals(alone)
    assert (together.guarantee == "frozen-prompt").all()


def test_each_method_states_its_guarantee(model, data, start):
    methods = [
        FixedPrompts("fixed", start.class_features(model)),
        AdaptedPrompts("adapted", model, start, n_adapt=10),
        PerSamplePrompts("inside", model, start),
    ]
    rows = certify(model, data.subset([0]), methods)
    assert rows.guarantee.tolist() == ["standard", "frozen-prompt", "per-sample"]


def test_adaptation_inside_the_base_classifier_is_a_function_of_the_copy_alone(model, data, start):
    method = PerSamplePrompts("inside", model, start)
    features = prompts.noisy_bank(model, data, sigmas=(SIGMA,), draws=7, seed=0, choose=np.random.default_rng(0))
    features = features.flatten(0, 1)
    together = method.classifier()(features)
    assert together.dtype == torch.int64
    one_by_one = torch.cat([method.classifier()(row[None]) for row in features])
    assert torch.equal(together, one_by_one)
    with torch.inference_mode():  # as a caller may have it
        assert torch.equal(method.classifier()(features), together)


def test_adaptation_inside_the_base_classifier_takes_the_step_it_names(model, data, start):
    """One copy, one class list: the sign step written out."""
    feature = adaptation(model, data, count=1).features
    frame = start.frame(model)
    context = start.context.clone().requires_grad_(True)
    logits = model.logit_scale * feature @ frame.features(model, context).T
    mean_prediction_entropy(logits).backward()
    moved = start.context - 0.05 * context.grad.sign()
    expected = (feature @ frame.features(model, moved).detach().T).argmax(1)
    assert torch.equal(PerSamplePrompts("inside", model, start, learning_rate=0.05).classifier()(feature), expected)


def test_a_pool_of_other_images_lowers_their_entropy_and_keeps_the_standard_guarantee(model, data, start):
    pool = mr.load_dataset("phantom/chest", split="val", n=9)
    assert methods.disjoint(pool, data)
    assert not methods.disjoint(data, data)
    adapted = adapt_to_pool(model, start, pool, sigma=SIGMA, steps=4)
    bank = prompts.noisy_bank(model, pool, sigmas=(SIGMA,), draws=1, seed=0, choose=np.random.default_rng(0))

    def entropy(found):
        return float(mean_prediction_entropy(model.logit_scale * bank @ found.class_features(model).T).mean())

    assert entropy(adapted) < entropy(start)
    assert adapted.provenance["pool"]["split"] == "val"
    rows = certify(model, data, [FixedPrompts("pool", adapted.class_features(model))])
    assert (rows.guarantee == "standard").all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m, s, p: AdaptedPrompts("x", m, s, n_adapt=0),
            "n_adapt=0 is no whole number of 1 or more: adaptation needs",
        ),
        (
            lambda m, s, p: AdaptedPrompts("x", m, s, steps=0),
            "steps=0 is no whole number of 1 or more: adaptation takes",
        ),
        (lambda m, s, p: PerSamplePrompts("x", m, s, learning_rate=-1.0), "learning_rate=-1.0 is no number above 0"),
        (lambda m, s, p: adapt_to_pool(m, s, p, sigma=0.0), "sigma=0.0: smoothing needs noise"),
    ],
)
def test_impossible_adaptation_is_refused(model, start, data, make, message):
    with pytest.raises(ValueError, match=message):
        make(model, start, data)


def test_frozen_words_stay_whatever_adapts_the_others(model, data):
    template = "a frontal chest radiograph showing {}."
    start = prompts.text_prompts(model, data.classes, template, tunable=2)
    found = adaptation(model, data)

    def answers(method):
        return method.classifier(found)(found.features)

    def expected(context):
        tokens = model.tokenize([template.replace("{}", noun) for noun in data.classes])
        embeddings = model.embed_tokens(tokens).detach().clone()
        embeddings[:, 1:3] = context
        return model.encode_embeddings(embeddings, tokens)

    context = prompts.sharpen(model, start.frame(model), start.context, found.features, steps=3, learning_rate=0.1)
    adapted = AdaptedPrompts("adapted", model, start, steps=3, learning_rate=0.1)
    assert torch.equal(answers(adapted), (found.features @ expected(context).T).argmax(1))
    pooled = adapt_to_pool(model, start, data, sigma=SIGMA, learning_rate=0.1)
    assert pooled.context.shape == (2, 128) and not torch.equal(pooled.context, start.context)
    assert torch.allclose(pooled.class_features(model), expected(pooled.context), atol=1e-6)
    assert answers(PerSamplePrompts("inside", model, start)).shape == (20,)


def test_stores_tell_methods_apart_by_words_that_are_frozen(model, data):
    one, other = (
        prompts.text_prompts(model, data.classes, template, tunable=1) for template in ("a chest {}.", "a cat {}.")
    )
    assert torch.equal(one.context, other.context)
    assert AdaptedPrompts("x", model, one).record() != AdaptedPrompts("x", model, other).record()


def test_stores_tell_methods_apart(model, data, start):
    one = AdaptedPrompts("x", model, start).record()
    assert AdaptedPrompts("x", model, start).record() == one
    assert AdaptedPrompts("x", model, start, steps=2).record() != one
    assert PerSamplePrompts("x", model, start).record() != PerSamplePrompts("x", model, start, steps=2).record()
