import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

spec = importlib.util.spec_from_file_location("tiny_vlms", Path(__file__).with_name("tiny_vlms.py"))
tiny_vlms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_vlms)

SIZE, PROMPT, ANSWER = tiny_vlms.SIZE, tiny_vlms.PROMPT, tiny_vlms.ANSWER
models, vlm, llava, pixels = tiny_vlms.models, tiny_vlms.vlm, tiny_vlms.llava, tiny_vlms.pixels
read_by_network, next_logits = tiny_vlms.read_by_network, tiny_vlms.next_logits


def pixel_values(vlm, pixels):
    return read_by_network(vlm, pixels)["pixel_values"]


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


@pytest.mark.parametrize("name", [name for name in tiny_vlms.FAMILIES if "llava-1.6" not in name])
def test_the_tower_reads_the_noisy_pixels_and_nothing_else(models, pixels, name):
    """At the size of the noise: normalised, not resized, not clipped, not rounded, and in one tile.

    LLaVA-1.6 cuts tiles and has no switch for them; the affine map above is what it keeps.
    """
    vlm, read = models(name), []
    convolution = next(layer for layer in vlm.model.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d))
    hook = convolution.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].detach().clone()))
    try:
        vlm.generate(pixels, PROMPT, max_new_tokens=1)
    finally:
        hook.remove()
    (seen,) = read
    if isinstance(convolution, torch.nn.Conv3d):
        seen = whole_images(seen)
    mean, std = (torch.tensor(getattr(vlm.processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    assert torch.allclose(seen * std[:, None, None] + mean[:, None, None], pixels, atol=1e-5)


def whole_images(patches):
    """Images [5, 3, S, S] of the two equal frames [5 (S / 4)^2, 3, 2, 4, 4] that a Qwen-VL reads in blocks of 2 x 2."""
    assert torch.equal(patches[:, :, 0], patches[:, :, 1])
    blocks = SIZE // 8
    patches = patches[:, :, 0].reshape(5, blocks, blocks, 2, 2, 3, 4, 4)
    return patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(5, 3, SIZE, SIZE)


@pytest.mark.parametrize("name", tiny_vlms.FAMILIES)
def test_the_network_is_asked_what_the_processor_makes_of_a_chat(models, pixels, name):
    """transformers' own way from messages to tokens; a start token that the template writes is not written twice."""
    vlm = models(name)
    content = [{"type": "image", "image": pixels[0]}, {"type": "text", "text": PROMPT}]
    chat = vlm.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_rescale": False, **vlm.image_options},
    )
    inputs = read_by_network(vlm, pixels[:1])
    assert {name for name, value in chat.items() if isinstance(value, torch.Tensor)} == set(inputs)
    for key, value in inputs.items():
        torch.testing.assert_close(value, chat[key], rtol=0, atol=1e-6)
    start = vlm.processor.tokenizer.bos_token_id
    assert inputs["input_ids"].eq(-1 if start is None else start).sum() == (start is not None)


def test_the_question_stands_in_the_chat_template_behind_its_image(models, pixels):
    expected = {
        "llava": "<s> USER : I what is in this image ? ASSISTANT :",
        "llava-1.6-mistral-7b": "<s> [ INST ] I what is in this image ? [/ INST ]",
        "llava-1.6-vicuna-7b": "<s> USER : I what is in this image ? ASSISTANT :",
        "smolvlm-256m": "<|im_start|> User : F G I F what is in this image ? <end_of_utterance> Assistant :",
        "qwen2-vl-2b": "<|im_start|> user V I E what is in this image ? <|im_end|> <|im_start|> assistant",
    }
    short = {"<fake_token_around_image>": "F", "<global-img>": "G", "<|vision_start|>": "V", "<|vision_end|>": "E"}
    for name, text in expected.items():
        vlm = models(name)
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


def test_log_likelihood_is_the_sum_over_the_answers_tokens(vlm, pixels):
    tokenizer = vlm.processor.tokenizer
    new = tokenizer(f"{ANSWER} {tiny_vlms.end_of_answer(tokenizer)}", add_special_tokens=False)["input_ids"]
    expected = []
    for image in pixels[:2]:
        inputs = read_by_network(vlm, image[None])
        logits = next_logits(vlm.model, inputs, new)[-len(new) - 1 : -1]
        expected.append(logits.log_softmax(dim=-1)[range(3), new].sum())
    found = vlm.log_likelihood(pixels[:2], PROMPT, ANSWER)
    assert len(new) == 3
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.stack(expected), atol=1e-3)
    assert (found[0] - found[1]).abs() > 0.1


def test_the_empty_answer_has_the_log_likelihood_of_the_end_token(llava, pixels):
    inputs = read_by_network(llava, pixels[:1])
    end = llava.processor.tokenizer.eos_token_id
    expected = next_logits(llava.model, inputs, [])[-1].log_softmax(dim=-1)[end]
    assert torch.allclose(llava.log_likelihood(pixels[:1], PROMPT, ""), expected, atol=1e-4)


def test_an_answer_follows_its_question_as_the_template_has_it(models, pixels, monkeypatch):
    seen = {}
    for name in ("llava", "qwen2-vl-2b"):
        processor = models(name).processor
        called = type(processor).__call__

        def spy(self, *args, called=called, name=name, **kwargs):
            seen.setdefault(name, kwargs["text"][0])
            return called(self, *args, **kwargs)

        monkeypatch.setattr(type(processor), "__call__", spy)
        models(name).log_likelihood(pixels[:1], PROMPT, ANSWER)
    assert seen["llava"].endswith("ASSISTANT: grey lung</s>")
    assert seen["qwen2-vl-2b"].endswith("<|im_start|>assistant\ngrey lung<|im_end|>")


def test_the_greedy_answer_is_likelier_than_others(vlm, pixels):
    images = torch.cat([pixels, pixels.flip(3)])
    answers = enumerate(vlm.complete(images, PROMPT, max_new_tokens=40))
    _, row, greedy = min((len(text.text), i, text.text) for i, text in answers if text.finished and text.text)
    image = images[row : row + 1]
    likely = float(vlm.log_likelihood(image, PROMPT, greedy))
    first, *rest = greedy.split()
    words = tiny_vlms.WORDS[:22]
    # Another first word could still lead to a likelier rest; a word more where the model ends cannot be likelier.
    others = [float(vlm.log_likelihood(image, PROMPT, " ".join([word, *rest]))) for word in words if word != first]
    assert np.mean(np.array(others) < likely) > 0.8
    assert all(float(vlm.log_likelihood(image, PROMPT, f"{greedy} {word}")) < likely for word in words[:5])


def test_log_likelihood_has_the_gradient_of_finite_differences(llava, pixels):
    image = pixels[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(llava.log_likelihood(image, PROMPT, ANSWER).sum(), image)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (llava.log_likelihood(image + sign * step, PROMPT, ANSWER).item() for sign in (1, -1))
    assert (up - down) / 2e-3 == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize("name", list(tiny_vlms.FAMILIES))
def test_the_gradient_reaches_every_image(models, pixels, name):
    images = pixels[:2].clone().requires_grad_()
    models(name).log_likelihood(images, PROMPT, ANSWER).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().flatten(1).max(dim=1).values > 1e-3).all()
    assert models(name).generate(images, PROMPT, max_new_tokens=2) == models(name).generate(
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


def test_text_features_are_the_sum_of_the_word_embeddings(llava):
    ids = llava.processor.tokenizer("grey lung", add_special_tokens=False)["input_ids"]
    expected = functional.normalize(llava.model.get_input_embeddings().weight[ids].sum(dim=0), dim=0)
    assert torch.allclose(llava.text_features(["grey lung"])[0], expected, atol=1e-5)
    assert torch.allclose(llava.text_features(["lung"])[0] @ llava.text_features(["lung"])[0], torch.ones(()))
