import functools
import importlib.util
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from medrobust_lib.models.vision_language import Completion, RowSampler

spec = importlib.util.spec_from_file_location("tiny_vlms", Path(__file__).with_name("tiny_vlms.py"))
tiny_vlms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_vlms)

SIZE, PROMPT, ANSWER = tiny_vlms.SIZE, "what is in this image ?", "grey lung"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Function giving a tiny model of a family, made once; tests do not change it."""
    weights = tmp_path_factory.mktemp("weights")
    return functools.cache(functools.partial(tiny_vlms.load, weights=weights))


@pytest.fixture(params=tiny_vlms.FAMILIES)
def vlm(request, load):
    return load(request.param)


@pytest.fixture
def llava(load):
    return load("llava")


@pytest.fixture(scope="module")
def pixels():
    """Five noisy images, far out of [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 * torch.randn(5, 3, SIZE, SIZE, generator=generator)
    noisy = torch.rand(5, 3, SIZE, SIZE, generator=generator) + noise
    assert noisy.min() < -1 < 2 < noisy.max()
    return noisy


def read_by_network(vlm, pixels):
    """The tensors that the network is called with at its first step."""
    seen = []
    hook = vlm.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    vlm.generate(pixels, PROMPT, max_new_tokens=1)
    hook.remove()
    return {name: value for name, value in seen[0].items() if isinstance(value, torch.Tensor)}


def pixel_values(vlm, pixels):
    return read_by_network(vlm, pixels)["pixel_values"]


def next_logits(model, inputs, new):
    """Logits after a question and the tokens ``new``, without a cache."""
    row = torch.tensor([new], dtype=torch.int64)
    longer = {"input_ids": torch.cat([inputs["input_ids"], row], dim=1)}
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], torch.full_like(row, fill)], dim=1)
    images = {name: inputs[name] for name in inputs if "pixel" in name or "image" in name}
    with torch.no_grad():
        return model(**longer, **images).logits[0]


# Decoding


def test_a_greedy_answer_does_not_depend_on_its_batch(vlm, pixels):
    answers = vlm.generate(pixels, PROMPT, max_new_tokens=8)
    assert len(answers) == 5
    assert len(set(answers)) >= 4, answers
    assert [vlm.generate(pixels[i : i + 1], PROMPT, max_new_tokens=8)[0] for i in range(5)] == answers
    order = [3, 0, 4, 2, 1]
    assert vlm.generate(pixels[order], PROMPT, max_new_tokens=8) == [answers[i] for i in order]
    assert vlm.generate(pixels, "is this a lung ?", max_new_tokens=8) != answers


def test_a_drawn_answer_depends_on_its_seed_and_not_on_its_batch(vlm, pixels):
    options = {"max_new_tokens": 8, "temperature": 1.5}
    state = torch.random.get_rng_state()
    drawn = vlm.generate(pixels, PROMPT, seed=[3, 1, 4, 1, 5], **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert vlm.generate(pixels, PROMPT, seed=[3, 1, 4, 1, 5], **options) == drawn
    assert vlm.generate(pixels[[4, 2]], PROMPT, seed=[5, 4], **options) == [drawn[4], drawn[2]]
    others = vlm.generate(pixels[[0] * 5], PROMPT, seed=7, **options)
    assert len(set(others)) == 5
    assert vlm.generate(pixels[[0] * 5], PROMPT, seed=np.arange(7, 12), **options) == others
    assert vlm.generate(pixels[:1], PROMPT, seed=np.int64(8), **options) == others[1:2]
    cold = vlm.generate(pixels, PROMPT, max_new_tokens=8, temperature=1e-6)
    assert cold == vlm.generate(pixels, PROMPT, max_new_tokens=8)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_row_sampler_draws_from_the_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -torch.inf])
    expected = torch.softmax(logits.double() / temperature, dim=0).numpy()
    # Seeds as `seed, seed + 1, ...` give them, one draw each; then many draws from a few seeds.
    for n_rows, n_calls in ((4000, 1), (20, 200)):
        sampler = RowSampler(temperature, range(n_rows), torch.device("cpu"))
        rows = logits.repeat(n_rows, 1)
        drawn = torch.cat([sampler(None, rows).argmax(dim=1) for _ in range(n_calls)])
        counts = torch.bincount(drawn, minlength=5).numpy()
        assert counts[4] == 0
        assert chisquare(counts[:4], 4000 * expected[:4]).pvalue > 0.01
        assert chisquare(counts[:4], 4000 * np.array([0.25] * 4)).pvalue < 1e-6


def test_row_sampler_takes_any_integer_as_seed():
    logits = torch.zeros(2, 50)
    big, small = (RowSampler(1.0, [seed, 0], torch.device("cpu"))(None, logits) for seed in (2**63 + 5, 5))
    assert torch.equal(big, small)
    assert not torch.equal(small[0], small[1])


def test_only_an_ended_answer_is_finished(load, tmp_path, pixels):
    llava = load("llava")
    assert not any(answer.finished for answer in llava.complete(pixels, PROMPT, max_new_tokens=1))
    ending = tiny_vlms.load("llava", tmp_path)
    weight = ending.model.lm_head.weight
    end = ending.processor.tokenizer.eos_token_id
    # The end gets twice the logit of the token that would have come first.
    first = ending.processor.tokenizer.convert_tokens_to_ids(llava.generate(pixels[:1], PROMPT, max_new_tokens=1)[0])
    weight[end] = 2 * weight[first]
    assert ending.complete(pixels[:1], PROMPT) == [Completion("", finished=True)]
    assert ending.generate(pixels[:1], PROMPT) == [""]


def test_every_end_token_of_the_checkpoint_ends_an_answer(tmp_path, pixels):
    plain = tiny_vlms.load("qwen2-vl-2b", tmp_path)
    words = plain.generate(pixels[1:2], PROMPT, max_new_tokens=8)[0].split()
    second = words[1]
    assert second not in words[:1]
    tokenizer = plain.processor.tokenizer
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(second)]
    (tmp_path / "qwen2-vl-2b" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    answer = tiny_vlms.load("qwen2-vl-2b", tmp_path).complete(pixels[1:2], PROMPT, max_new_tokens=8)
    assert answer == [Completion(f"{words[0]} {second}", finished=True)]


def test_settings_of_the_checkpoint_do_not_change_greedy_decoding(load, tmp_path, pixels):
    llava = load("llava")
    tiny_vlms.write(tmp_path / "llava", tiny_vlms.llava)
    own = {
        "do_sample": True,
        "temperature": 5.0,
        "top_p": 0.5,
        "top_k": 3,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "num_beams": 3,
        "max_length": 2,
        "suppress_tokens": list(range(4, 20)),
        "forced_bos_token_id": 5,
        "eos_token_id": llava.processor.tokenizer.eos_token_id,
    }
    (tmp_path / "llava" / "generation_config.json").write_text(json.dumps(own))
    loaded = tiny_vlms.load("llava", tmp_path)
    answers = loaded.generate(pixels, PROMPT, max_new_tokens=8)
    assert answers == llava.generate(pixels, PROMPT, max_new_tokens=8)

    # Step by step, the largest logit.
    inputs = {name: value[:1] for name, value in read_by_network(llava, pixels[:1]).items() if name != "position_ids"}
    new = []
    while len(new) < 8 and new[-1:] != [llava.processor.tokenizer.eos_token_id]:
        new.append(int(next_logits(llava.model, inputs, new)[-1].argmax()))
    assert llava.processor.tokenizer.decode(new, skip_special_tokens=True).strip() == answers[0]
    with torch.no_grad():
        ids = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava").generate(
            **inputs, max_new_tokens=8, do_sample=False
        )
    assert ids[0, -len(new) :].tolist() != new


# What the network sees


def test_prompts_are_padded_on_the_left(vlm):
    assert vlm.processor.tokenizer.padding_side == "left"
    assert vlm.processor.tokenizer.pad_token is not None


def test_noise_reaches_the_network_neither_clipped_nor_rounded(vlm, pixels):
    # An affine map: clipping to [0, 1] or rounding to 256 levels would break the sum.
    black = torch.zeros_like(pixels)
    whole = pixel_values(vlm, 3 * pixels) - pixel_values(vlm, black)
    parts = pixel_values(vlm, 2 * pixels) + pixel_values(vlm, pixels) - 2 * pixel_values(vlm, black)
    assert (whole - parts).abs().max() < 1e-4
    nudged = pixels.clone()
    nudged[:, :, SIZE // 2, SIZE // 2] += 1e-4
    change = (pixel_values(vlm, nudged) - pixel_values(vlm, pixels)).abs().max()
    assert 1e-5 < change < 1e-2
    assert (pixel_values(vlm, black - 0.25) - pixel_values(vlm, black)).abs().max() > 0.25


def test_normalisation_comes_after_the_noise(llava, pixels):
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(pixel_values(llava, pixels), expected, atol=1e-5)


def test_smolvlm_reads_one_tile_at_the_size_of_the_noise(load, pixels):
    one = pixel_values(load("smolvlm-256m"), pixels)
    assert one.shape == (5, 1, 3, SIZE, SIZE)
    assert torch.allclose(one[:, 0], (pixels - 0.5) / 0.5, atol=1e-5)
    assert pixel_values(load("smolvlm2"), pixels).shape == (5, 5, 3, SIZE, SIZE)


def test_the_question_stands_in_the_chat_template_behind_its_image(load, pixels):
    expected = {
        "llava": "<s> USER : I what is in this image ? ASSISTANT :",
        "llava-1.6-mistral-7b": "<s> [ INST ] I what is in this image ? [ / INST ]",
        "llava-1.6-vicuna-7b": "<s> USER : I what is in this image ? ASSISTANT :",
        "smolvlm-256m": "<|im_start|> User : F G I F what is in this image ? <end_of_utterance> Assistant :",
        "qwen2-vl-2b": "<|im_start|> user V I E what is in this image ? <|im_end|> <|im_start|> assistant",
    }
    short = {"<fake_token_around_image>": "F", "<global-img>": "G", "<|vision_start|>": "V", "<|vision_end|>": "E"}
    for name, text in expected.items():
        vlm = load(name)
        ids = read_by_network(vlm, pixels[:2])["input_ids"]
        assert torch.equal(ids[0], ids[1])
        image = vlm.processor.image_token
        words = re.sub(rf"({re.escape(image)} ?)+", "I ", vlm.processor.tokenizer.decode(ids[0]))
        for long, letter in short.items():
            words = words.replace(long, letter)
        assert " ".join(words.split()) == text, name


def test_prepare_cuts_nothing_off(llava):
    wide = np.full((10, 20, 3), 255, dtype=np.uint8)
    prepared = llava.prepare([wide])
    assert prepared.shape == (1, 3, SIZE, SIZE)
    assert prepared.dtype == torch.float32
    assert prepared[0, :, SIZE // 2].min() == 1
    assert prepared[0, :, [0, -1]].max() == 0


# Log-likelihood and features


def test_log_likelihood_is_the_sum_over_the_answers_tokens(vlm, pixels):
    tokenizer = vlm.processor.tokenizer
    new = [*tokenizer(ANSWER, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    expected = []
    for image in pixels[:2]:
        inputs = read_by_network(vlm, image[None])
        inputs.pop("position_ids", None)
        logits = next_logits(vlm.model, inputs, new)[-len(new) - 1 : -1]
        expected.append(logits.log_softmax(dim=-1)[range(3), new].sum())
    found = vlm.log_likelihood(pixels[:2], PROMPT, ANSWER)
    assert len(new) == 3
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.stack(expected), atol=1e-3)
    assert (found[0] - found[1]).abs() > 0.1


def test_the_empty_answer_has_the_log_likelihood_of_the_end_token(llava, pixels):
    inputs = read_by_network(llava, pixels[:1])
    inputs.pop("position_ids", None)
    end = llava.processor.tokenizer.eos_token_id
    expected = next_logits(llava.model, inputs, [])[-1].log_softmax(dim=-1)[end]
    assert torch.allclose(llava.log_likelihood(pixels[:1], PROMPT, ""), expected, atol=1e-4)


def test_an_answer_follows_its_question_as_the_template_has_it(load, pixels, monkeypatch):
    seen = {}
    for name in ("llava", "qwen2-vl-2b"):
        processor = load(name).processor
        called = type(processor).__call__

        def spy(self, *args, called=called, name=name, **kwargs):
            seen.setdefault(name, kwargs["text"][0])
            return called(self, *args, **kwargs)

        monkeypatch.setattr(type(processor), "__call__", spy)
        load(name).log_likelihood(pixels[:1], PROMPT, ANSWER)
    assert seen["llava"].endswith("ASSISTANT: grey lung</s>")
    assert seen["qwen2-vl-2b"].endswith("<|im_start|>assistant\ngrey lung<|im_end|>")


def test_the_greedy_answer_is_likelier_than_another(vlm, pixels):
    for i in range(3):
        greedy = vlm.generate(pixels[i : i + 1], PROMPT, max_new_tokens=3)[0]
        likely, *others = (
            float(vlm.log_likelihood(pixels[i : i + 1], PROMPT, text))
            for text in (greedy, "healthy large drusen", "no cell an")
        )
        assert likely > max(others)


def test_log_likelihood_has_the_gradient_of_finite_differences(llava, pixels):
    image = pixels[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(llava.log_likelihood(image, PROMPT, ANSWER).sum(), image)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (llava.log_likelihood(image + sign * step, PROMPT, ANSWER).item() for sign in (1, -1))
    assert (up - down) / 2e-3 == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize("name", list(tiny_vlms.FAMILIES))
def test_the_gradient_reaches_every_image(load, pixels, name):
    images = pixels[:2].clone().requires_grad_()
    load(name).log_likelihood(images, PROMPT, ANSWER).sum().backward()
    assert (images.grad.abs().flatten(1).max(dim=1).values > 1e-3).all()
    assert load(name).generate(images, PROMPT, max_new_tokens=2) == load(name).generate(
        pixels[:2], PROMPT, max_new_tokens=2
    )


def test_a_processor_without_gradient_is_named(llava, pixels, monkeypatch):
    processor = type(llava.processor.image_processor)
    preprocess = processor.preprocess
    monkeypatch.setattr(
        processor,
        "preprocess",
        lambda self, images, **options: preprocess(self, [i.detach() for [i] in images], **options),
    )
    with pytest.raises(RuntimeError, match="image processor of local-dir:.*llava passes no gradient on to the pixels"):
        llava.log_likelihood(pixels.clone().requires_grad_(), PROMPT, ANSWER)


def test_text_features_are_unit_norm_and_do_not_depend_on_their_batch(vlm):
    texts = ["grey lung", "a small dark opacity in the lung", ""]
    features = vlm.text_features(texts)
    assert features.shape == (3, 32)
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5)
    for text, feature in zip(texts, features, strict=True):
        assert torch.allclose(vlm.text_features([text])[0], feature, atol=1e-4)
    assert (features[0] @ features[1]) < 0.99
    end = vlm.processor.tokenizer.eos_token
    assert torch.allclose(vlm.text_features([end])[0], features[2], atol=1e-4)


def test_text_features_are_the_mean_of_the_last_states(llava):
    ids = llava.processor.tokenizer("grey lung", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = llava.model.model.language_model(input_ids=ids).last_hidden_state[0]
    expected = functional.normalize(states.mean(dim=0), dim=0)
    assert torch.allclose(llava.text_features(["grey lung"])[0], expected, atol=1e-5)


# Memory


def test_cache_bytes_are_those_of_the_cache(vlm, pixels):
    inputs = read_by_network(vlm, pixels[:1])
    inputs.pop("position_ids", None)
    kept = vlm.model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    # The last of the 8 tokens is not put into the cache.
    measured = sum(tensor.numel() * tensor.itemsize for layer in kept.layers for tensor in (layer.keys, layer.values))
    assert vlm.cache_bytes(PROMPT, 7) == measured
    tokens = inputs["input_ids"].shape[1] + 7
    assert measured == 2 * 2 * 2 * 8 * tokens * 4  # keys and values, layers, heads, width, tokens, bytes


def test_bytes_per_copy_add_one_layer_and_the_image_tower(load, pixels):
    for name in ("llava", "llava-1.6-vicuna-7b"):
        vlm = load(name)
        inputs = read_by_network(vlm, pixels[:1])
        tokens = inputs["input_ids"].shape[1] + 20
        layer, tower = tokens * (4 * 32 + 3 * 64) * 4, 64 * inputs["pixel_values"].numel() * 4
        assert vlm.bytes_per_copy(PROMPT, 20) == vlm.cache_bytes(PROMPT, 20) + layer + tower
    half = vlm.bytes_per_copy(PROMPT, 20) - tower
    vlm = tiny_vlms.load("llava-1.6-vicuna-7b", Path(vlm.model.config._name_or_path).parent, dtype="bfloat16")
    assert vlm.bytes_per_copy(PROMPT, 20) - tower == half // 2


# The rest


def test_bfloat16_answers_and_workers_copies(load, pixels, tmp_path):
    vlm = tiny_vlms.load("llava", tmp_path, dtype="bfloat16")
    assert vlm.dtype == torch.bfloat16
    assert vlm.log_likelihood(pixels, PROMPT, ANSWER).dtype == torch.float32
    answers = vlm.generate(pixels, PROMPT, max_new_tokens=4)
    assert len(set(answers)) > 2
    # joblib sends models to its workers in this way.
    assert pickle.loads(pickle.dumps(vlm)).generate(pixels, PROMPT, max_new_tokens=4) == answers


def test_repr_tells_the_facts(llava):
    assert re.fullmatch(
        r"VisionLanguageModel\(id='local-dir:.*llava', LlavaForConditionalGeneration, noise at 32 px, "
        r"dtype=torch.float32, device='cpu'\)",
        repr(llava),
    )


def test_wrong_pixels_are_refused(llava, pixels):
    images = (255 * pixels.clamp(0, 1)).to(torch.uint8)
    for wrong, error, message in (
        (images, TypeError, r"not torch\.uint8; use prepare\(\) first"),
        (images.numpy(), TypeError, "not ndarray"),
        (pixels[0], ValueError, r"must be \[n, 3, 32, 32\] for local-dir:.*not \(3, 32, 32\)"),
        (pixels[..., :31], ValueError, r"not \(5, 3, 32, 31\)"),
        (pixels[:0], ValueError, r"not \(0, 3, 32, 32\)"),
        (images.float(), ValueError, r"range over \[0, 255\]: expected \[0, 1\] plus noise; divide 0\.\.255 by 255"),
        (pixels.where(pixels < 1, torch.nan), ValueError, r"range over \[nan, nan\]"),
    ):
        for call in (llava.generate, functools.partial(llava.log_likelihood, answer=ANSWER)):
            with pytest.raises(error, match=message):
                call(wrong, prompt=PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt='': give the question as text"),
        ({"prompt": " \n"}, "give the question as text"),
        ({"prompt": None}, "prompt=None"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: an answer has at least one token"),
        ({"temperature": -0.1}, r"temperature=-0\.1: 0 \(greedy\) or a finite number above"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"seed": [1, 2]}, "2 seeds for 5 images; give one integer, or one for each image"),
    ],
)
def test_wrong_parameters_are_refused(llava, pixels, options, message):
    with pytest.raises(ValueError, match=message):
        llava.generate(pixels, **{"prompt": PROMPT} | options)
