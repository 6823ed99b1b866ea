import functools
import importlib.util
import json
import re
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForImageTextToText

from medrobust_lib.models.dual_encoder import BrokenFeaturesError
from medrobust_lib.models.vision_language import Completion, RowSampler

spec = importlib.util.spec_from_file_location("tiny_vlms", Path(__file__).with_name("tiny_vlms.py"))
tiny_vlms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_vlms)

SIZE, PROMPT, ANSWER = tiny_vlms.SIZE, tiny_vlms.PROMPT, tiny_vlms.ANSWER
models, vlm, llava, pixels = tiny_vlms.models, tiny_vlms.vlm, tiny_vlms.llava, tiny_vlms.pixels
read_by_network, next_logits = tiny_vlms.read_by_network, tiny_vlms.next_logits


# Decoding


def test_a_greedy_answer_does_not_depend_on_its_batch(vlm, pixels):
    answers = vlm.generate(pixels, PROMPT, max_new_tokens=8)
    assert len(answers) == 5
    assert len(set(answers)) >= 4, answers
    assert [vlm.generate(pixels[i : i + 1], PROMPT, max_new_tokens=8)[0] for i in range(5)] == answers
    order = [3, 0, 4, 2, 1]
    assert vlm.generate(pixels[order], PROMPT, max_new_tokens=8) == [answers[i] for i in order]
    assert vlm.generate(pixels, "is this a lung ?", max_new_tokens=8) != answers


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_model_whose_scores_are_not_finite_writes_no_answer(vlm, pixels, temperature):
    """The largest of NaN is token 0: the same text for every image, which would be certified."""
    vlm = cloudpickle.loads(cloudpickle.dumps(vlm))
    with torch.no_grad():
        vlm.model.get_output_embeddings().weight.mul_(torch.nan)
    with pytest.raises(BrokenFeaturesError, match="next token are not finite for 5 of 5 images.*dtype='float32'"):
        vlm.generate(pixels, PROMPT, max_new_tokens=2, temperature=temperature)


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


def test_only_an_ended_answer_is_finished(llava, tmp_path, pixels):
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


def test_settings_of_the_checkpoint_do_not_change_greedy_decoding(llava, tmp_path, pixels):
    tiny_vlms.write(tmp_path / "llava", tiny_vlms.plain_llava)
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
        "eos_token_id": llava.processor.tokenizer.eos_token_id,
    }
    (tmp_path / "llava" / "generation_config.json").write_text(json.dumps(own))
    loaded = tiny_vlms.load("llava", tmp_path)
    answers = loaded.generate(pixels, PROMPT, max_new_tokens=8)
    assert answers == llava.generate(pixels, PROMPT, max_new_tokens=8)

    # Step by step, the largest logit.
    inputs = read_by_network(llava, pixels[:1])
    new = []
    while len(new) < 8 and new[-1:] != [llava.processor.tokenizer.eos_token_id]:
        new.append(int(next_logits(llava.model, inputs, new)[-1].argmax()))
    assert llava.processor.tokenizer.decode(new, skip_special_tokens=True).strip() == answers[0]
    with torch.no_grad():
        ids = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava").generate(
            **inputs, max_new_tokens=8, do_sample=False
        )
    assert ids[0, -len(new) :].tolist() != new


# Memory


def test_bytes_per_copy_are_the_cache_one_layer_and_the_image_tower(models, pixels):
    for name in ("llava", "llava-1.6-vicuna-7b"):
        vlm = models(name)
        inputs = read_by_network(vlm, pixels[:1])
        kept = vlm.model.generate(
            **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True
        ).past_key_values
        cache = sum(tensor.numel() * tensor.itemsize for layer in kept.layers for tensor in (layer.keys, layer.values))
        tokens = inputs["input_ids"].shape[1] + 7  # the last of the 8 tokens is not put into the cache
        layer, tower = tokens * (4 * 32 + 3 * 64) * 4, 64 * inputs["pixel_values"].numel() * 4
        assert vlm.bytes_per_copy(PROMPT, 7) == cache + layer + tower
    half = vlm.bytes_per_copy(PROMPT, 20) - tower
    vlm = tiny_vlms.load("llava-1.6-vicuna-7b", Path(vlm.model.config._name_or_path).parent, dtype="bfloat16")
    assert vlm.bytes_per_copy(PROMPT, 20) - tower == half // 2


# The rest


def test_bfloat16_answers_and_workers_copies(models, pixels, tmp_path):
    vlm = tiny_vlms.load("llava", tmp_path, dtype="bfloat16")
    assert vlm.dtype == torch.bfloat16
    assert vlm.log_likelihood(pixels, PROMPT, ANSWER).dtype == torch.float32
    answers = vlm.generate(pixels, PROMPT, max_new_tokens=4)
    assert len(set(answers)) > 2
    # How models are sent to workers.
    assert cloudpickle.loads(cloudpickle.dumps(vlm)).generate(pixels, PROMPT, max_new_tokens=4) == answers


def test_repr_tells_the_facts(llava):
    assert re.fullmatch(
        r"VisionLanguageModel\(id='local-dir:.*llava', LlavaForConditionalGeneration, noise at 32 px, "
        r"dtype=float32, device='cpu'\)",
        repr(llava),
    )


def test_wrong_pixels_are_refused(llava, pixels):
    images = (255 * pixels.clamp(0, 1)).to(torch.uint8)
    for wrong, error, message in (
        (images, TypeError, r"not torch\.uint8; use prepare\(\) first"),
        (images.numpy(), TypeError, "not ndarray"),
        (pixels[0], ValueError, r"must be \[n, 3, 32, 32\] for local-dir:.*not \(3, 32, 32\)"),
        (pixels[..., :31], ValueError, r"not \(5, 3, 32, 31\)"),
        (pixels[:0], ValueError, "pixels hold no image"),
        (images.float(), ValueError, r"range over \[0, 255\]: expected \[0, 1\] plus noise; divide 0\.\.255 by 255"),
        (pixels.where(pixels < 1, torch.nan), ValueError, "pixels hold NaN or infinite values in image 0"),
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
        ({"max_new_tokens": 0}, "max_new_tokens=0 is no whole number of 1 or more; an answer has at least one token"),
        ({"temperature": -0.1}, r"temperature=-0\.1: 0 \(greedy\) or a finite number above"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"seed": [1, 2]}, "2 seeds for 5 images; give one integer, or one for each image"),
    ],
)
def test_wrong_parameters_are_refused(llava, pixels, options, message):
    with pytest.raises(ValueError, match=message):
        llava.generate(pixels, **{"prompt": PROMPT} | options)
