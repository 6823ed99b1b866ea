import dataclasses

import numpy as np
import pytest
import torch

import medrobust_lib as mr
from medrobust_lib.generative.answers import AnswerBank, Drawing
from medrobust_lib.generative.certify import certify_answers, certify_generative
from medrobust_lib.generative.errors import ErrorRate, FalsePositives, SymmetricErrors, TotalErrors
from medrobust_lib.generative.oracles import Cluster, ExactMatch, OptionOracle, OracleUnavailableError, SameLabel
from medrobust_lib.models.vision_language import Completion
from medrobust_lib.smoothing.bounds import certified_radius, lower_confidence_bound
from medrobust_lib.smoothing.certificate import ABSTAIN, GUARANTEES
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE
from medrobust_lib.smoothing.sequential import sequential_plan

PROMPT = "Is it safe?"
IMAGE = torch.rand((3, 8, 8), generator=torch.Generator().manual_seed(0))
ADDRESS = {"seed": 3, "dataset": "phantom/test", "index": 7}
YES_NO = OptionOracle({"no": (), "yes": ()})


class Scripted:
    """Answers by a script: the seed of a draw tells its role and number."""

    id, version = "scripted", "1"

    def __init__(self, select, estimate, *, sigma=0.5):
        self.script, self.asked, self.pixels = {}, [], []
        for role, texts in (("select", select), ("estimate", estimate)):
            seeds = NoiseStream(**ADDRESS, sigma=sigma, role=role).decoding_seeds(0, len(texts))
            self.script |= dict(zip(seeds, texts, strict=True))

    def generate(self, pixels, prompt, *, max_new_tokens, temperature, seed):
        assert prompt == PROMPT
        self.asked += seed
        self.pixels.append(pixels.clone())
        return [self.script[own] for own in seed]


def certified(select, estimate, oracle=YES_NO, **options):
    vlm = Scripted(select, estimate)
    options = {"n0": len(select), "n": len(estimate), **options}
    return certify_generative(vlm, IMAGE, PROMPT, oracle, **options, **ADDRESS)


def votes(k, n=100, *, answer="yes", other="no"):
    """K votes among n, mixed up."""
    texts = np.array([answer] * k + [other] * (n - k))
    return np.random.default_rng(k).permutation(texts).tolist()


# The numbers


@pytest.mark.parametrize("oracle", [YES_NO, ExactMatch(), SameLabel(YES_NO)], ids=lambda oracle: oracle.name)
@pytest.mark.parametrize("k", [0, 50, 65, 66, 85, 99, 100])
def test_a_certificate_is_the_bound_of_the_votes_for_the_selected_answer(k, oracle):
    found = certified(["yes"] * 20, votes(k), oracle)
    composite, bound = found.composite, lower_confidence_bound(k, 100, 0.001)
    assert found.answer == "yes"
    assert (composite.k, composite.n, composite.n0, composite.draws) == (k, 100, 20, 120)
    assert composite.p_lower == pytest.approx(bound, abs=1e-12)
    assert composite.radius == pytest.approx(certified_radius(bound, 0.5), abs=1e-12)
    assert composite.abstained == (k < 66)
    if not composite.abstained:
        assert composite.predicted == (1 if oracle is YES_NO else 0)
    assert (found.corrected, found.assumption, found.refusal) == (None, "", "")


def test_known_radii():
    assert certified(["yes"] * 20, votes(85)).composite.radius == pytest.approx(0.280362, abs=1e-6)
    assert certified(["yes"] * 20, votes(100)).composite.radius == pytest.approx(0.5 * 1.500475, abs=1e-6)
    loose = certified(["yes"] * 20, votes(85), alpha=0.05)
    assert loose.composite.p_lower == pytest.approx(0.778463, abs=1e-6)


def test_a_certificate_records_how_it_was_made():
    found = certified(["no"] * 12, ["no"] * 50, alpha=0.01, max_new_tokens=9, temperature=0.5)
    assert vars(found.composite) == {
        "predicted": 0,
        "radius": pytest.approx(found.composite.radius),
        "p_lower": lower_confidence_bound(50, 50, 0.01),
        "p_upper": 1 - lower_confidence_bound(50, 50, 0.01),
        "bounds": "one",
        "k": 50,
        "n": 50,
        "n0": 12,
        "n_max": 50,
        "alpha": 0.01,
        "sigma": 0.5,
        "sampling": "fixed",
        "mode": "predict",
        "guarantee": "composite",
        "seed": 3,
        "model": "scripted",
        "dtype": "float32",
        "device": "cpu",
        "image_shape": (3, 8, 8),
        "perturbation": PIXEL_NOISE,
        "dataset": "phantom/test",
    }
    assert (found.oracle, found.oracle_version, found.prompt) == ("option", YES_NO.version, PROMPT)
    assert (found.max_new_tokens, found.temperature) == (9, 0.5)


def test_selection_and_estimation_see_different_noise_and_only_their_own():
    vlm = Scripted(["yes"] * 20, ["yes"] * 40)
    certify_generative(vlm, IMAGE, PROMPT, YES_NO, n0=20, n=40, **ADDRESS, batch_size=100)
    streams = {role: NoiseStream(**ADDRESS, sigma=0.5, role=role) for role in ("select", "estimate")}
    assert vlm.asked == streams["select"].decoding_seeds(0, 20) + streams["estimate"].decoding_seeds(0, 40)
    for found, (role, count) in zip(vlm.pixels, (("select", 20), ("estimate", 40)), strict=True):
        assert torch.equal(found, noisy_copies(IMAGE, streams[role], count=count)), role


@pytest.mark.parametrize("oracle", [YES_NO, ExactMatch()], ids=lambda oracle: oracle.name)
def test_votes_of_selection_are_never_counted(oracle):
    unlucky = certified(["no"] * 20, ["yes"] * 100, oracle)
    assert (unlucky.answer, unlucky.composite.k) == ("no", 0)
    assert unlucky.composite.abstained
    lucky = certified(["yes"] * 11 + ["no"] * 9, votes(70), oracle)
    assert (lucky.answer, lucky.composite.k, lucky.composite.n) == ("yes", 70, 100)


def test_among_equals_the_first_label_is_tested_or_the_first_cluster_seen():
    select = ["yes", "no"] * 10
    assert certified(select, votes(80)).answer == "no"
    assert certified(select, votes(80), ExactMatch()).answer == "yes"


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_certificates_do_not_depend_on_the_batch_size(batch_size):
    assert certified(votes(15, 20), votes(80), batch_size=batch_size) == certified(votes(15, 20), votes(80))


# Clusters


def test_clusters_are_those_of_the_selection_draws_alone():
    found = certified(["b", "a", "c", "a", "b", "a"], ["a"] * 40 + ["d"] * 60, ExactMatch(), n=100)
    assert found.clusters == (Cluster("b", 2), Cluster("a", 3), Cluster("c", 1))
    assert (found.answer, found.composite.k) == ("a", 40)
    assert certified(votes(9, 10), votes(80)).clusters == ()


def test_estimation_asks_whether_a_text_is_equivalent_to_the_frozen_representative():
    """Not to the cluster: "2" joined "0", and "4" is near "2", but the question is about "0"."""

    class Near:
        name, version = "near", "1"

        def equivalent(self, texts, representative):
            return [None if text == "?" else abs(int(text) - int(representative)) <= 2 for text in texts]

    found = certified(["0", "2", "1"], ["2"] * 70 + ["4"] * 20 + ["?"] * 10, Near())
    assert found.clusters == (Cluster("0", 3),)
    assert (found.answer, found.composite.k) == ("0", 70)
    assert found.tally.unlabelled == 10


# Sequential sampling


@pytest.mark.parametrize("oracle", [YES_NO, ExactMatch()], ids=lambda oracle: oracle.name)
def test_sequential_sampling_follows_its_plan(oracle):
    radii, estimate = (0.1, 0.2, 0.3), votes(475, 500)
    plan = sequential_plan(sigma=0.5, radii=radii, n=500, alpha=0.001)
    proved = 0
    for look, draws in enumerate(plan.looks):
        proved, finished, *_ = plan.step(look, estimate[:draws].count("yes"), proved)
        if finished:
            break
    found = certified(["yes"] * 20, estimate, oracle, sampling="sequential", radii=radii)
    assert (found.composite.n, found.composite.n_max) == (draws, 500)
    assert found.composite.k == estimate[:draws].count("yes")
    assert found.composite.radius == plan.radii[proved - 1] == 0.3
    assert found.tally.total == 20 + draws < 520
    assert found.composite.sampling == "sequential"


def test_sequential_sampling_draws_no_more_than_it_needs():
    vlm = Scripted(["yes"] * 20, ["yes"] * 1000)
    options = {"n0": 20, "n": 1000, "sampling": "sequential", "radii": (0.0, 0.1)}
    found = certify_generative(vlm, IMAGE, PROMPT, YES_NO, **options, **ADDRESS).composite
    assert (found.radius, found.k) == (0.1, found.n)
    assert len(vlm.asked) == found.draws < 120


# Everything counts


class Fragile:
    """Gives no label to "hm", raises at "boom"."""

    name, version, labels = "fragile", "1", ("yes", "no")

    def label(self, texts):
        if "boom" in texts:
            raise RuntimeError("no such text")
        return [text if text in self.labels else None for text in texts]

    def equals(self, texts, representative):
        return [label == representative for label in self.label(texts)]


class FragileEquivalence:
    name, version = "fragile", "1"

    def equivalent(self, texts, representative):
        return Fragile().equals(texts, representative)


@pytest.mark.parametrize("oracle", [Fragile(), FragileEquivalence()])
def test_empty_missing_cut_strange_and_failing_texts_all_count(oracle):
    estimate = ["yes"] * 70 + [""] * 5 + [None] * 4 + ["  "] + ["hm"] * 6 + ["boom"] * 3
    estimate += [Completion("yes", finished=False)] * 8 + [Completion("hm", finished=False)] * 3
    found = certified(["yes", "", None, Completion("yes", finished=False)], estimate, oracle)
    assert (found.composite.k, found.composite.n) == (78, 100)
    assert found.composite.p_lower == pytest.approx(lower_confidence_bound(78, 100, 0.001))
    tally = found.tally
    assert (tally.total, tally.empty, tally.truncated, tally.failed) == (104, 12, 12, 3)
    assert tally.first_error == "RuntimeError: no such text"
    assert tally.unlabelled == (12 if isinstance(oracle, Fragile) else 3)
    failures = "3 because the oracle failed" if isinstance(oracle, Fragile) else "failed calls of the oracle: 3"
    what = "12 without a label" if isinstance(oracle, Fragile) else "3 without a verdict"
    expected = f"12 empty, 12 cut off, {what} ({failures}, first with 'RuntimeError: no such text')"
    assert f"4 selection and 100 estimation texts: {expected}; each counts in its own denominator" in str(found)
    assert found.n_distinct == 6  # yes, "", None, "  ", hm, boom


class Numbered(Fragile):
    """Numbers its failures."""

    calls = 0

    def label(self, texts):
        if texts == ["boom"]:
            self.calls += 1
            raise RuntimeError(f"call {self.calls}")
        return super().label(texts)


def test_the_counts_of_selection_and_estimation_add_up_and_the_first_error_is_kept():
    found = certified(["yes", "boom", "", "yes"], ["boom", "hm", None, *["yes"] * 97], Numbered())
    tally = found.tally
    assert (tally.total, tally.empty, tally.truncated, tally.unlabelled, tally.failed) == (104, 2, 0, 3, 2)
    assert tally.first_error == "RuntimeError: call 1"
    assert certified(["yes"] * 4, ["boom", *["yes"] * 99], Numbered()).tally.first_error == "RuntimeError: call 1"


@pytest.mark.parametrize("oracle", [YES_NO, ExactMatch()], ids=lambda oracle: oracle.name)
def test_without_a_selected_answer_nothing_is_certified_or_drawn(oracle):
    vlm = Scripted(["", None, " "], ["yes"] * 100)
    found = certify_generative(
        vlm, IMAGE, PROMPT, oracle, n0=3, n=100, error_model=TotalErrors(ErrorRate(0.1)), **ADDRESS
    )
    assert found.answer is None
    for certificate in (found.composite, found.corrected):
        assert certificate.abstained
        assert (certificate.radius, certificate.p_lower, certificate.k, certificate.n) == (0, 0, 0, 0)
    assert found.corrected.guarantee == "corrected"
    assert (found.n_distinct, found.refusal, len(vlm.asked)) == (0, "", 3)
    assert "no answer could be selected" in str(found)


def test_a_model_that_always_says_the_same_is_noticed():
    sentence = "the model gave one and the same text every time; see whether it gives it for any image"
    constant, nearly = certified(["yes"] * 20, ["yes"] * 100), certified(["yes"] * 20, votes(99))
    assert (constant.n_distinct, nearly.n_distinct) == (1, 2)
    assert sentence in str(constant)
    assert sentence not in str(nearly)


# Error models


def test_a_corrected_certificate_stands_beside_the_composite_one():
    model = FalsePositives({"yes": ErrorRate(0.1), "no": ErrorRate(0.4)})
    found = certified(["yes"] * 20, votes(85), error_model=model)
    assert found.composite == certified(["yes"] * 20, votes(85)).composite
    corrected = found.corrected
    assert corrected.p_lower == pytest.approx(0.680563, abs=1e-6)
    assert corrected.radius == pytest.approx(0.2346, abs=5e-5)
    bounds = {"p_lower": corrected.p_lower, "p_upper": 1 - corrected.p_lower}
    assert corrected == dataclasses.replace(found.composite, guarantee="corrected", radius=corrected.radius, **bounds)
    assert found.assumption == model.assumption
    lines = str(found).splitlines()
    assert any(line.startswith("without any assumption: 'yes' within L2 radius 0.2803") for line in lines)
    assert any(line.startswith("if the error model holds: 'yes' within L2 radius 0.2346") for line in lines)
    assert f"assumption: {model.assumption}" in lines
    assert GUARANTEES["corrected"] in str(found)


def test_a_correction_may_lose_the_majority():
    found = certified(["yes"] * 20, votes(85), error_model=TotalErrors(ErrorRate(0.25)))
    assert not found.composite.abstained
    assert (found.corrected.predicted, found.corrected.radius) == (ABSTAIN, 0)
    assert found.corrected.p_lower == pytest.approx(0.712507 - 0.25, abs=1e-6)
    assert (
        "if the error model holds: abstain: after the error model only p > 0.4625 remains, not above one half "
        "(p: probability under noise that an ideal reader would call the text 'yes')"
    ) in str(found)
    nothing = certified(["yes"] * 20, votes(85), error_model=TotalErrors(ErrorRate(0.9)))
    assert "abstain: after the error model no bound of p remains" in str(nothing)


def test_alpha_is_shared_with_an_estimated_rate_and_only_with_that():
    estimated = TotalErrors(ErrorRate(errors=3, trials=200))
    found = certified(["yes"] * 20, votes(85), error_model=estimated)
    assert found.corrected.p_lower == pytest.approx(0.702855 - 0.067793, abs=1e-6)
    assert found.corrected.alpha == found.composite.alpha == 0.001
    assert found.composite.p_lower == pytest.approx(0.712507, abs=1e-6)
    uneven = certified(["yes"] * 20, votes(85), error_model=estimated, alpha_share=0.9).corrected.p_lower
    expected = lower_confidence_bound(85, 100, 0.0001) - estimated.rate.upper(0.0009)
    assert uneven == pytest.approx(expected, abs=1e-12)
    symmetric = SymmetricErrors(ErrorRate(errors=3, trials=200))
    grown = certified(["yes"] * 20, votes(85), error_model=symmetric).corrected.p_lower
    assert grown == pytest.approx((0.702855 - 0.000752) / (1 - 2 * 0.000752), abs=1e-6)


def test_an_error_model_that_the_votes_contradict_is_refused():
    found = certified(["yes"] * 20, votes(99), error_model=SymmetricErrors(ErrorRate(0.2)))
    assert found.corrected is None
    assert not found.composite.abstained
    assert "gives no label with probability above 0.8, but the votes prove 0.9114" in found.refusal
    assert f"error model refused: {found.refusal}" in str(found)
    missing = certified(["yes"] * 20, votes(99), error_model=FalsePositives({"no": ErrorRate(0.1)}))
    assert missing.refusal == "no false-positive rate is given for the label 'yes', only for no"


def test_an_equivalence_is_corrected_by_its_rate_of_false_sameness():
    rates = FalsePositives({"same": ErrorRate(0.1), "different": ErrorRate(0.4)})
    found = certified(["yes"] * 20, votes(85), ExactMatch(), error_model=rates)
    assert found.corrected.p_lower == pytest.approx(0.680563, abs=1e-6)
    refused = certified(["yes"] * 20, votes(85), ExactMatch(), error_model=FalsePositives({"yes": ErrorRate(0.1)}))
    assert refused.refusal == "no false-positive rate is given for the label 'same', only for yes"


def test_sequential_sampling_is_corrected_from_what_it_proved():
    options = {"sampling": "sequential", "radii": (0.1, 0.2), "error_model": TotalErrors(ErrorRate(0.1))}
    found = certified(["yes"] * 20, votes(460, 500), **options)
    assert found.composite.radius == 0.2
    assert found.corrected.p_lower == pytest.approx(found.composite.p_lower - 0.1, abs=1e-12)
    assert found.corrected.radius == certified_radius(found.corrected.p_lower, 0.5) > 0


# A judge that goes away, and answers that stay


class Leaving(Fragile):
    """Can be asked only so many times."""

    def __init__(self, calls):
        self.calls = calls

    def label(self, texts):
        self.calls -= 1
        if self.calls < 0:
            raise OracleUnavailableError("endpoint is away")
        return super().label(texts)


def test_answers_stay_when_the_judge_goes_away(tmp_path):
    numbers, texts = {"n0": 20, "n": 100, "store": tmp_path, **ADDRESS}, (["yes"] * 20, votes(85))
    for calls, drawn in ((0, 20), (1, 100), (1, 0)):
        vlm = Scripted(*texts)
        with pytest.raises(OracleUnavailableError, match="endpoint is away"):
            certify_generative(vlm, IMAGE, PROMPT, Leaving(calls), **numbers)
        assert len(vlm.asked) == drawn
    idle = Scripted([], [])
    found = certify_generative(idle, IMAGE, PROMPT, Fragile(), **numbers)
    assert idle.asked == []
    assert found == certified(*texts, Fragile())


def test_a_store_serves_several_oracles_and_images(tmp_path):
    texts = (["yes"] * 20, votes(85))
    certify_generative(Scripted(*texts), IMAGE, PROMPT, YES_NO, n0=20, n=100, store=tmp_path, **ADDRESS)
    again = certify_generative(Scripted([], []), IMAGE, PROMPT, ExactMatch(), n0=10, n=50, store=tmp_path, **ADDRESS)
    assert again.composite.k == texts[1][:50].count("yes")
    other = Scripted(["no"] * 20, ["no"] * 100)
    found = certify_generative(other, 1 - IMAGE, PROMPT, YES_NO, n0=20, n=100, store=tmp_path, **ADDRESS)
    assert (found.answer, len(other.asked)) == ("no", 120), "the same address, but another image"


def test_oracles_and_numbers_of_draws_share_a_bank():
    vlm = Scripted(["yes"] * 20, votes(85))
    bank = AnswerBank(vlm, IMAGE, PROMPT, Drawing(sigma=0.5, seed=3), dataset="phantom/test", index=7)
    counts = [certify_answers(bank, oracle, n=n).composite.k for n in (100, 40) for oracle in (YES_NO, ExactMatch())]
    assert counts == [85, 85, *[votes(85)[:40].count("yes")] * 2]
    assert len(vlm.asked) == 120


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 9}, "n=9 draws can never certify at alpha=0.001.*use n >= 10"),
        ({"n": 10, "error_model": TotalErrors(ErrorRate(errors=0, trials=99))}, "alpha=0.0005.*use n >= 11"),
        ({"n0": 0}, "n0=0: choosing a class takes at least one selection draw"),
        ({"alpha": 0}, "alpha=0"),
        ({"sigma": 128}, "divide a level in 0 to 255 units by 255"),
        ({"sampling": "greedy"}, "unknown sampling 'greedy'; choose one of fixed, sequential"),
        ({"alpha_share": 1}, "share=1"),
        ({"temperature": -1}, "temperature=-1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_numbers_out_of_range_are_named_before_anything_is_drawn(options, message):
    vlm = Scripted([], [])
    with pytest.raises(ValueError, match=message):
        certify_generative(vlm, IMAGE, PROMPT, YES_NO, **{**options, **ADDRESS})
    assert vlm.asked == []


def test_other_kinds_of_things_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"dict is no oracle: it needs `label\(texts\)`, or `equivalent"):
        certify_generative(Scripted([], []), IMAGE, PROMPT, {"yes": "safe"}, **ADDRESS)
    with pytest.raises(TypeError, match="Lens is no generative model: it lacks .*`load_vlm` gives a model"):
        certify_generative(type("Lens", (), {"id": "clip"})(), IMAGE, PROMPT, YES_NO, **ADDRESS)
    with pytest.raises(TypeError, match=r"error_model=0.05 is no error model; use one of"):
        certify_generative(Scripted([], []), IMAGE, PROMPT, YES_NO, error_model=0.05, **ADDRESS)
    with pytest.raises(TypeError, match=r"image must be float \[3, H, W\]"):
        certify_generative(Scripted([], []), IMAGE.numpy(), PROMPT, YES_NO, store=tmp_path, **ADDRESS)
    with pytest.raises(ValueError, match="prompt='': give the question as text"):
        certify_generative(Scripted([], []), IMAGE, "", YES_NO, **ADDRESS)


class Bare:
    def label(self, texts):
        raise AssertionError("never asked")


@pytest.mark.parametrize(
    ("attributes", "missing"),
    [
        ({}, "lacks `name`, a string and `version`, a string that changes .* and `labels`, a tuple"),
        (
            {"name": "own", "labels": ("a", "b")},
            "lacks `version`, a string that changes whenever an answer could; give",
        ),
        ({"name": "own", "version": 1, "labels": ("a", "b")}, "lacks `version`, a string"),
        ({"name": "own", "version": "1"}, "lacks `labels`, a tuple of every label as a string; give it these"),
        ({"name": "own", "version": "1", "labels": "ab"}, "lacks `labels`"),
        ({"name": "own", "version": "1", "labels": ()}, "lacks `labels`"),
    ],
)
def test_what_an_oracle_lacks_is_named_before_anything_is_drawn(attributes, missing):
    oracle, vlm = Bare(), Scripted([], [])
    vars(oracle).update(attributes)
    with pytest.raises(TypeError, match=f"the oracle Bare {missing}"):
        certify_generative(vlm, IMAGE, PROMPT, oracle, **ADDRESS)
    with pytest.raises(
        TypeError, match=r"the class ExactMatch is no oracle yet: give an instance, ExactMatch\(\.\.\.\)"
    ):
        certify_generative(vlm, IMAGE, PROMPT, ExactMatch, **ADDRESS)
    assert vlm.asked == []


def test_radii_of_interest_belong_to_sequential_sampling():
    vlm = Scripted([], [])
    with pytest.raises(ValueError, match=r"radii=\(0.1,\): only sampling='sequential' takes radii of interest"):
        certify_generative(vlm, IMAGE, PROMPT, YES_NO, radii=(0.1,), **ADDRESS)
    assert vlm.asked == []


@pytest.mark.parametrize("oracle", [Fragile(), FragileEquivalence()])
def test_an_oracle_that_fails_at_every_selection_text_is_no_abstention(oracle, tmp_path):
    select, estimate = ["boom"] * 3 + [""], votes(85)
    vlm = Scripted(select, estimate)
    with pytest.raises(
        RuntimeError,
        match="'fragile' failed at each of the 3 selection texts .* first with 'RuntimeError: no such text'",
    ):
        certify_generative(vlm, IMAGE, PROMPT, oracle, n0=4, store=tmp_path, **ADDRESS)
    assert len(vlm.asked) == 4
    again = Scripted([], estimate)
    mended = certify_generative(again, IMAGE, PROMPT, ExactMatch(), n0=4, store=tmp_path, **ADDRESS)
    assert (mended.answer, len(again.asked)) == ("boom", 100), "the answers have stayed"


@pytest.mark.parametrize("oracle", [Fragile(), FragileEquivalence()])
def test_one_text_that_the_oracle_can_read_is_enough(oracle):
    class Alone(type(oracle)):
        def equivalent(self, texts, representative):
            return Fragile().equals(texts, representative)

    assert certified(["yes", "boom", "boom"], votes(85), Alone()).answer == "yes"


# Words


def test_a_label_is_named_with_what_is_proved_of_it():
    lines = str(certified(["yes"] * 20, votes(85))).splitlines()
    assert (
        "without any assumption: 'yes' within L2 radius 0.2803 of this image ([0, 1] pixels, 3 x 8 x 8): 85 of 100 "
        "votes at sigma 0.5 (fixed sampling, alpha 0.001) prove that the oracle's label is 'yes' with probability "
        f"above 0.7125 under noise. Guarantee (composite): {GUARANTEES['composite']}"
    ) in lines
    assert "alpha 0.001: a certificate is false with probability at most alpha, over the noise drawn" in lines
    assert "20 selection and 100 estimation texts: 0 empty, 0 cut off, 0 without a label; " in lines[-1]
    assert "over the noise and decoding drawn" in str(certified(["yes"] * 20, votes(85), temperature=1.0))
    few = str(certified(["yes"] * 20, votes(50)))
    assert "abstain: 50 of 100 votes at sigma 0.5 (fixed sampling, alpha 0.001) prove no majority for 'yes'" in few


def test_an_equivalence_does_not_speak_of_labels():
    shown = str(certified(["yes"] * 20, votes(85), ExactMatch()))
    assert "without any assumption: texts equivalent to 'yes' stay the majority within L2 radius 0.2803" in shown
    assert "the oracle calls a text equivalent to it with probability above 0.7125" in shown
    assert "label" not in shown
    few = str(certified(["yes"] * 20, votes(50), ExactMatch()))
    assert "prove no majority of texts equivalent to 'yes'" in few
    assert "label" not in few
    rates = FalsePositives({"same": ErrorRate(0.1)})
    corrected = str(certified(["yes"] * 20, votes(85), ExactMatch(), error_model=rates))
    assert "with the error model, that an ideal reader would call a text equivalent to it" in corrected
    lost = str(certified(["yes"] * 20, votes(85), ExactMatch(), error_model=FalsePositives({"same": ErrorRate(0.6)})))
    assert "an ideal reader would call a text equivalent to 'yes')" in lost


def test_a_corrected_certificate_is_about_the_text_and_not_the_image():
    shown = str(certified(["yes"] * 20, votes(85), error_model=TotalErrors(ErrorRate(0.1))))
    assert "prove, with the error model, that an ideal reader would call the text 'yes' with probability above" in shown
    assert "not the truth of the image" in GUARANTEES["corrected"]
    assert "over the labelled texts where an error rate is estimated" in shown


@pytest.mark.parametrize("bound", [np.nan, 1.5, -0.1, np.inf])
def test_an_error_model_of_ones_own_gives_a_probability(bound):
    class Mine(TotalErrors):
        def corrected(self, q_lower, *, label, alpha):
            return bound

    with pytest.raises(
        ValueError, match=rf"the error model .*Mine\(.* gave the lower bound {bound}, which is no probab"
    ):
        certified(["yes"] * 20, votes(85), error_model=Mine(ErrorRate(0.1)))


def test_the_public_name():
    assert mr.certify_generative is certify_generative


@pytest.mark.parametrize(
    ("oracle", "labels"), [(YES_NO, 3), (ExactMatch(), 3), (OptionOracle({"a": (), "b": (), "yes": ()}), 2)]
)
def test_symmetric_errors_over_another_number_of_labels_are_refused(oracle, labels):
    model = SymmetricErrors(ErrorRate(0.05), n_labels=labels)
    with pytest.raises(
        ValueError, match=rf"exchanges {labels} labels, the oracle '{oracle.name}' has \d; use .*n_labels"
    ):
        certified(["yes"] * 5, votes(99), oracle, error_model=model)
