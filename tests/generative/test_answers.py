import hashlib
import sys

import cloudpickle
import numpy as np
import pytest
import torch

from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.experiments import open_store
from medrobust_lib.generative.answers import (
    AnswerBank,
    Drawing,
    StoredAnswers,
    answer_once,
    collect_answers,
    open_answers,
)
from medrobust_lib.models.vision_language import Completion
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies

HOW = Drawing(sigma=0.5, seed=3)
ADDRESS = {"dataset": "phantom/test", "index": 7}
PROMPT = "What is this?"


class Hashing:
    """Its text is a function of pixels and seed alone. It counts its images and can be made to fail."""

    id, version = "hashing", "1"

    def __init__(self, *, fails_after=None):
        self.seen, self.settings, self.fails_after = [], [], fails_after

    def generate(self, pixels, prompt, *, max_new_tokens, temperature, seed):
        if self.fails_after is not None and len(self.seen) + len(pixels) > self.fails_after:
            raise RuntimeError("the power went out")
        self.seen += seed
        self.settings.append((prompt, max_new_tokens, temperature))
        return [self.text(image, prompt, own) for image, own in zip(pixels, seed, strict=True)]

    def text(self, image, prompt, seed):
        return hashlib.sha256(image.numpy().tobytes() + f"{prompt} {seed}".encode()).hexdigest()[:8]

    def prepare(self, images):
        return torch.stack([torch.from_numpy(image / np.float32(255)).permute(2, 0, 1) for image in images])


class Answering(Hashing):
    """Gives any fixed answers."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate(self, pixels, prompt, **settings):
        return self.answers


@pytest.fixture
def image():
    return torch.rand((3, 8, 8), generator=torch.Generator().manual_seed(0))


def bank_of(vlm, image, how=HOW, **options):
    return AnswerBank(vlm, image, PROMPT, how, **{**ADDRESS, **options})


def question_set(n=3, *, prompts=("What is this?", "Is it safe?"), seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return QuestionSet(
        id="phantom/test",
        task="safety",
        images=images,
        questions=tuple(np.resize(prompts, n).tolist()),
        truths=(None,) * n,
        labels=(),
        indices=np.arange(n, dtype=np.int64) * 2 + 1,
        licence="CC0-1.0",
        provenance={"synthetic": True},
    )


# One bank


def test_answers_are_the_models_texts_for_the_noisy_copies_and_their_seeds(image):
    vlm = Hashing()
    for role in ("select", "estimate"):
        stream = NoiseStream(3, "phantom/test", 7, 0.5, role)
        copies, seeds = noisy_copies(image, stream, first=2, count=5), stream.decoding_seeds(2, 5)
        expected = [vlm.text(copy, PROMPT, seed) for copy, seed in zip(copies, seeds, strict=True)]
        assert bank_of(vlm, image).texts(role, 2, 5) == expected
        assert bank_of(vlm, image).answers(role, 2, 1) == [Completion(expected[0], finished=True)]


@pytest.mark.parametrize("batch_size", [1, 3, 50, None])
def test_answers_do_not_depend_on_batches_order_or_number(image, batch_size):
    reference = bank_of(Hashing(), image, batch_size=7).texts("estimate", 0, 20)
    assert len(set(reference)) == 20
    assert bank_of(Hashing(), image, batch_size=batch_size).texts("estimate", 0, 20) == reference
    asked = bank_of(Hashing(), image, batch_size=batch_size)
    assert asked.texts("estimate", 12, 5) == reference[12:17]
    asked.texts("select", 0, 4)
    assert asked.texts("estimate", 3, 17) == reference[3:]
    assert asked.texts("estimate", 0, 20) == reference


@pytest.mark.parametrize(
    "change", [{"how": Drawing(sigma=0.4, seed=3)}, {"how": Drawing(sigma=0.5, seed=4)}, {"dataset": "b"}, {"index": 8}]
)
def test_every_part_of_the_address_matters(image, change):
    assert not set(bank_of(Hashing(), image).texts("select", 0, 5)) & set(
        bank_of(Hashing(), image, **change).texts("select", 0, 5)
    )


def test_no_answer_is_drawn_twice(image):
    vlm = Hashing()
    bank = bank_of(vlm, image, batch_size=4)
    for first, count in ((3, 4), (0, 10), (9, 1), (2, 12), (0, 14)):
        assert len(bank.texts("estimate", first, count)) == count
    assert len(vlm.seen) == len(set(vlm.seen)) == 14
    assert sorted(number for _, number in bank.kept) == list(range(14))
    assert bank.answers("estimate", 5, 0) == []


def test_the_model_gets_the_prompt_and_the_settings(image):
    vlm = Hashing()
    bank_of(vlm, image, Drawing(sigma=0.5, max_new_tokens=9, temperature=0.7)).texts("select", 0, 1)
    assert vlm.settings == [(PROMPT, 9, 0.7)]


def test_a_models_own_completions_say_whether_they_are_finished(image):
    class Completing(Hashing):
        def complete(self, pixels, prompt, **settings):
            texts = super().generate(pixels, prompt, **settings)
            return [Completion(text, finished=place % 2 == 0) for place, text in enumerate(texts)]

        def generate(self, *args, **settings):
            raise AssertionError("`complete` says more")

    bank = bank_of(Completing(), image, batch_size=2)
    assert [answer.finished for answer in bank.answers("select", 0, 4)] == [True, False, True, False]
    assert bank.texts("select", 0, 4) == bank_of(Hashing(), image).texts("select", 0, 4)


def test_missing_and_empty_answers_are_answers(image):
    bank = bank_of(Answering(["yes", None, "", Completion("cut", finished=False)]), image)
    assert bank.texts("select", 0, 4) == ["yes", None, "", "cut"]
    assert bank.answers("select", 1, 3) == [None, Completion("", True), Completion("cut", False)]


def test_memory_that_runs_out_halves_the_batches_and_changes_nothing(image):
    class Large(Hashing):
        def generate(self, pixels, prompt, **settings):
            if len(pixels) > 3:
                raise MemoryError
            return super().generate(pixels, prompt, **settings)

    vlm = Large()
    assert bank_of(vlm, image, batch_size=8).texts("select", 0, 9) == bank_of(Hashing(), image).texts("select", 0, 9)
    assert len(vlm.seen) == 9


def test_a_model_that_knows_its_memory_sets_the_batch_size(image):
    class Heavy(Hashing):
        def bytes_per_copy(self, prompt, max_new_tokens):
            assert (prompt, max_new_tokens) == (PROMPT, 64)
            return 1 << 60

    vlm = Heavy()
    bank_of(vlm, image).texts("select", 0, 3)
    assert len(vlm.settings) == 3


def test_time_is_counted_while_answers_are_drawn(image):
    bank = bank_of(Hashing(), image)
    assert (bank.seconds, bank.drawn) == (0, 0)
    bank.texts("select", 0, 3)
    spent = bank.seconds
    assert spent > 0
    bank.texts("select", 0, 3)
    assert (bank.seconds, bank.drawn) == (spent, 3)
    bank.texts("select", 1, 4)
    assert bank.drawn == 5


def test_noise_is_drawn_on_the_device_of_the_model(image):
    class Elsewhere(Hashing):
        device = torch.device("meta")

    assert bank_of(Elsewhere(), image, batch_size=1).image.device.type == "meta"


def test_equal_drawings_are_equal_however_they_are_written():
    plain = Drawing(sigma=1.0, seed=2, max_new_tokens=9, temperature=0.0)
    other = Drawing(sigma=np.float32(1), seed=np.int64(2), max_new_tokens=np.int32(9), temperature=0)
    assert other == plain
    assert repr(other) == repr(plain)


# What is refused


@pytest.mark.parametrize("answers", [[], ["a"], ["a", "b", "c"]])
def test_one_answer_for_each_image(image, answers):
    with pytest.raises(ValueError, match=f"hashing gave {len(answers)} answers for 2 images; it must"):
        bank_of(Answering(answers), image).texts("select", 0, 2)


def test_one_text_is_no_list_of_letters(image):
    with pytest.raises(TypeError, match="hashing returned a str; it must return a list with one answer for each image"):
        bank_of(Answering("no"), image).texts("select", 0, 2)


def test_answers_are_text(image):
    with pytest.raises(TypeError, match=r"hashing answered 3 \(int\); answers are text or None"):
        bank_of(Answering(["a", 3]), image).texts("select", 0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0}, "sigma=0.0: smoothing needs noise"),
        ({"sigma": 127.5}, "sigma=127.5: noise levels are in \\[0, 1\\] pixel units; divide"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is no whole number of 1 or more; an answer has at least one token"),
        ({"temperature": -0.5}, r"temperature=-0.5: 0 \(greedy\) or a finite number above"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_drawings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Drawing(**{"sigma": 0.5, **change})


@pytest.mark.parametrize("prompt", ["", "  \n", None, 3])
def test_a_question_is_text(image, prompt):
    with pytest.raises(ValueError, match=rf"prompt={prompt!r}: give the question as text".replace("\\", r"\\")):
        AnswerBank(Hashing(), image, prompt, HOW)


def test_an_image_is_float_pixels_between_0_and_1(image):
    with pytest.raises(TypeError, match=r"image must be float \[3, H, W\] in \[0, 1\], not torch.uint8"):
        bank_of(Hashing(), (image * 255).byte())
    with pytest.raises(ValueError, match=r"image values range over \[0.* expected \[0, 1\]"):
        bank_of(Hashing(), image * 255)
    with pytest.raises(ValueError, match="batch_size=0: at least one noisy copy"):
        bank_of(Hashing(), image, batch_size=0)


def test_a_model_in_training_mode_is_no_fixed_function(image):
    class Network(torch.nn.Module, Hashing):
        pass

    with pytest.raises(ValueError, match="Network is in training mode"):
        bank_of(Network(), image)
    assert bank_of(Network().eval(), image).image.shape == (3, 8, 8)


class Nameless:
    def generate(self, pixels, prompt, **settings):
        raise AssertionError("never asked")


class Mute:
    id = "mute"

    def encode_image(self, pixels):
        raise AssertionError("never asked")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Nameless(), "Nameless is no generative model: it lacks `id`, a string; `load_vlm` gives a model"),
        (Mute(), r"Mute is no generative model: it lacks `generate\(pixels, prompt, .*`load_vlm` gives a model"),
        ("demo", "str is no generative model: it lacks `id`, a string and `generate"),
        (Hashing, "the class Hashing is no generative model: it lacks its arguments"),
    ],
)
def test_a_model_that_cannot_generate_is_refused_first(image, model, message):
    with pytest.raises(TypeError, match=message):
        bank_of(model, image)
    with pytest.raises(TypeError, match=message):
        collect_answers(model, question_set(), HOW, n0=4, n=6)
    with pytest.raises(TypeError, match=message):
        answer_once(model, question_set())


# Kept answers


def stored(store, image, *, index=7, prompt=PROMPT, sigma=0.5):
    return StoredAnswers(store, AnswerBank(Hashing(), image, prompt, Drawing(sigma=sigma), index=index))


TEXTS = {
    ("select", 0): Completion("yes", finished=True),
    ("select", 1): None,
    ("estimate", 0): Completion("", finished=True),
    ("estimate", 1): Completion("cut \ud83d – ß", finished=False),
}


def test_stored_answers_come_back_as_they_were(image, tmp_path):
    with open_store(tmp_path, parameters={}) as store:
        stored(store, image).update(TEXTS)
        assert dict(stored(store, image)) == TEXTS
    with open_store(tmp_path, parameters={}) as store:
        found = stored(store, image)
        assert dict(found) == TEXTS
        assert len(found) == 4
        assert ("select", 2) not in found
        with pytest.raises(KeyError, match="select"):
            found["select", 2]
        with pytest.raises(ValueError, match="is done already"):
            found["select", 0] = Completion("no", finished=True)
        with pytest.raises(TypeError, match="kept answers are never deleted"):
            del found["select", 0]


def test_stored_answers_belong_to_one_image_question_and_noise(image, tmp_path):
    """All of these share the index 7, or begin like it."""
    with open_store(tmp_path, parameters={}) as store:
        stored(store, image).update(TEXTS)
        others = [
            stored(store, image, index=77),
            stored(store, image, sigma=0.25),
            stored(store, image, prompt="Is it safe?"),
            stored(store, image.flip(2)),
        ]
        assert [len(other) for other in others] == [0, 0, 0, 0]
        for number, other in enumerate(others):
            other["select", 0] = Completion(str(number), finished=True)
        assert [other["select", 0].text for other in others] == ["0", "1", "2", "3"]
        assert dict(stored(store, image, sigma=np.float64(0.5))) == TEXTS


def test_only_missing_answers_are_drawn_after_a_crash(image, tmp_path):
    reference = bank_of(Hashing(), image).texts("estimate", 0, 20)
    dying = Hashing(fails_after=11)
    with open_answers(tmp_path, dying, HOW, dataset="phantom/test", prompts=[PROMPT]) as store:
        bank = bank_of(dying, image, batch_size=3, kept=stored(store, image))
        with pytest.raises(RuntimeError, match="the power went out"):
            bank.texts("estimate", 0, 20)
    assert len(dying.seen) == 9
    healthy = Hashing()
    with open_answers(tmp_path, healthy, HOW, dataset="phantom/test", prompts=[PROMPT]) as store:
        assert bank_of(healthy, image, kept=stored(store, image)).texts("estimate", 0, 20) == reference
    assert len(healthy.seen) == 11
    assert not set(healthy.seen) & set(dying.seen)


def test_what_answers_depend_on_is_part_of_their_folder(tmp_path):
    class Described(Hashing):
        image_size, dtype, device = 8, torch.bfloat16, "cpu"
        provenance = {"files": {"model.safetensors": "ab"}, "revision": "c0ffee", "licence": "unimportant"}  # noqa: RUF012

    asked = {"dataset": "phantom/test", "prompts": ["b", "a", "b"]}
    open_answers(tmp_path, Described(), HOW, **asked).close()
    open_answers(tmp_path, Described(), HOW, dataset="phantom/test", prompts=["a", "b"]).close()
    Described.provenance = {"files": {"model.safetensors": "cd"}, "revision": "decaf"}
    Described.image_size, Described.dtype, Described.id = 16, torch.float32, "other"
    with pytest.raises(ValueError, match="belongs to other parameters") as caught:
        open_answers(tmp_path, Described(), Drawing(sigma=0.25, temperature=1), dataset="c", prompts=["a"])
    named = {line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]}
    assert named == {
        *("model", "files.model.safetensors", "revision", "image_size", "dtype"),
        *("dataset", "prompts", "sigma", "seed", "temperature"),
    }


def test_an_own_model_without_a_version_keeps_nothing(tmp_path):
    class Unversioned(Hashing):
        version = None

    asked = {"dataset": "phantom/test", "prompts": [PROMPT]}
    for version in (None, "", 3):
        Unversioned.version = version
        with pytest.raises(
            ValueError, match="'hashing' has neither files in its `provenance` nor a `version`: give it"
        ):
            open_answers(tmp_path / "own", Unversioned(), HOW, **asked)
    with pytest.raises(ValueError, match="give it a `version` attribute: a string that changes when"):
        collect_answers(Unversioned(), question_set(), HOW, n0=4, n=6, store=tmp_path / "own")
    assert not (tmp_path / "own").exists()
    Unversioned.version, Unversioned.provenance = None, {"files": {"model.safetensors": "ab"}}
    open_answers(tmp_path / "files", Unversioned(), HOW, **asked).close()


def test_another_version_of_an_own_model_has_other_answers(tmp_path):
    class Newer(Hashing):
        version = "2"

    asked = {"dataset": "phantom/test", "prompts": [PROMPT]}
    open_answers(tmp_path, Hashing(), HOW, **asked).close()
    with pytest.raises(ValueError, match="version: the store has .*1.*, this run asks .*2"):
        open_answers(tmp_path, Newer(), HOW, **asked)


# A set of questions


def texts_of(banks, n0=4, n=6):
    return [bank.texts("select", 0, n0) + bank.texts("estimate", 0, n) for bank in banks]


def test_collected_answers_are_what_each_image_gets_alone():
    questions, vlm = question_set(), Hashing()
    banks = collect_answers(vlm, questions, HOW, n0=4, n=6)
    assert len(vlm.seen) == 30
    for place, bank in enumerate(banks):
        assert (bank.index, bank.prompt) == (2 * place + 1, questions.questions[place])
        alone = AnswerBank(
            Hashing(), Hashing().prepare([questions.images[place]])[0], questions.questions[place], HOW,
            dataset="phantom/test", index=2 * place + 1,
        )  # fmt: skip
        assert texts_of([bank]) == texts_of([alone])
        assert bank.seconds > 0
    assert len(vlm.seen) == 30, "the banks are complete"


def test_workers_collect_the_same_answers(tmp_path):
    """The classes of this file travel by value: a worker cannot import it."""
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    try:
        banks = collect_answers(Hashing(), question_set(), HOW, n0=4, n=6, jobs=2, store=tmp_path)
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    reference = texts_of(collect_answers(Hashing(), question_set(), HOW, n0=4, n=6))
    assert texts_of(banks) == reference
    idle = Hashing(fails_after=0)
    assert texts_of(collect_answers(idle, question_set(), HOW, n0=4, n=6, store=tmp_path)) == reference


@pytest.mark.hardening(
    area="interruption", tried="an interrupt while answers of a generative model are collected",
    outcome="goes on with the next image",
)  # fmt: skip
def test_an_interrupted_collection_goes_on_with_the_next_image(tmp_path):
    dying, healthy = Hashing(fails_after=25), Hashing()
    with pytest.raises(RuntimeError, match="the power went out"):
        collect_answers(dying, question_set(), HOW, n0=4, n=6, batch_size=2, store=tmp_path)
    banks = collect_answers(healthy, question_set(), HOW, n0=4, n=6, store=tmp_path)
    assert len(healthy.seen) == 10
    assert texts_of(banks) == texts_of(collect_answers(Hashing(), question_set(), HOW, n0=4, n=6))


def test_more_draws_and_more_images_cost_only_what_is_new(tmp_path):
    collect_answers(Hashing(), question_set(2), HOW, n0=4, n=6, store=tmp_path)
    again = Hashing()
    banks = collect_answers(again, question_set(3), HOW, n0=5, n=9, store=tmp_path)
    assert len(again.seen) == 2 * 4 + 14
    assert texts_of(banks, 5, 9) == texts_of(collect_answers(Hashing(), question_set(3), HOW, n0=5, n=9), 5, 9)
    fewer = collect_answers(Hashing(fails_after=0), question_set(3), HOW, n0=2, n=3, store=tmp_path)
    assert [len(bank.kept) for bank in fewer] == [5, 5, 5]


def test_another_image_or_question_under_the_same_index_is_drawn_anew(tmp_path):
    collect_answers(Hashing(), question_set(3), HOW, n0=4, n=6, store=tmp_path)
    for other in (question_set(3, seed=1), question_set(3, prompts=("Is it safe?", "What is this?"))):
        banks = collect_answers(Hashing(), other, HOW, n0=4, n=6, store=tmp_path)
        assert texts_of(banks) == texts_of(collect_answers(Hashing(), other, HOW, n0=4, n=6))


def test_a_folder_of_other_answers_is_refused(tmp_path):
    collect_answers(Hashing(), question_set(), HOW, n0=4, n=6, store=tmp_path)
    for how, message in (
        (Drawing(sigma=0.25, seed=3), "sigma: the store has 0.5, this run asks 0.25"),
        (Drawing(sigma=0.5, seed=3, temperature=1), "temperature: the store has 0.0, this run asks 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            collect_answers(Hashing(), question_set(), how, n0=4, n=6, store=tmp_path)
    with pytest.raises(ValueError, match="prompts: the store has .*this run asks"):
        collect_answers(Hashing(), question_set(prompts=["Why?"]), HOW, n0=4, n=6, store=tmp_path)


# Without smoothing


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_one_noisy_copy_of_each_image_is_asked_its_own_question(batch_size):
    class Reading(Hashing):
        def text(self, image, prompt, seed):
            return super().text(image, prompt, None)

    questions, vlm = question_set(5), Reading()
    clean = vlm.prepare(questions.images)
    expected = [vlm.text(image, prompt, 0) for image, prompt in zip(clean, questions.questions, strict=True)]
    assert answer_once(vlm, questions, batch_size=batch_size) == expected
    noisy = [
        vlm.text(noisy_copies(image, NoiseStream(4, "phantom/test", 2 * place + 1, 0.5, "adapt"))[0], prompt, 0)
        for place, (image, prompt) in enumerate(zip(clean, questions.questions, strict=True))
    ]
    assert answer_once(vlm, questions, sigma=0.5, seed=4, batch_size=batch_size) == noisy
    assert {temperature for _, _, temperature in vlm.settings} == {0.0}
    answer_once(vlm, questions, batch_size=batch_size, temperature=0.7)
    assert {temperature for _, _, temperature in vlm.settings} == {0.0, 0.7}
