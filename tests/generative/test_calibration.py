"""An oracle's errors on the model's own texts, and several numbers of draws from one bank, against closed forms."""

import math

import numpy as np
import pytest
import torch

from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.generative.answers import AnswerBank, Drawing, collect_answers
from medrobust_lib.generative.calibration import calibrate_on_answers, compare_draws
from medrobust_lib.generative.errors import ErrorRate
from medrobust_lib.generative.oracles import ExactMatch, OptionOracle
from medrobust_lib.models.vision_language import Completion

ORACLE = OptionOracle({"bright": (), "dark": ()})
SIGMA = 0.5


def question_set(levels, truths=None, prompts=None, first=0):
    """Grey images of levels 0 to 255."""
    n = len(levels)
    return QuestionSet(
        id="folder:greys",
        task="finding",
        images=np.stack([np.full((4, 4, 3), level, dtype=np.uint8) for level in levels]),
        questions=tuple(prompts or ["Which?"] * n),
        truths=tuple(truths or [None] * n),
        labels=("bright", "dark"),
        indices=np.arange(first, first + n, dtype=np.int64),
        licence="CC0-1.0",
        provenance={},
    )


class Shades:
    """Names the grey level that it sees, and remembers how it was asked."""

    id = "shades"

    def __init__(self):
        self.asked = []

    def prepare(self, images):
        return torch.stack([torch.from_numpy(image / np.float32(255)).permute(2, 0, 1) for image in images])

    def generate(self, pixels, prompt, **settings):
        self.asked += [(prompt, settings["temperature"], settings["max_new_tokens"], seed) for seed in settings["seed"]]
        return [f"shade {round(255 * float(image.mean()))}" for image in pixels]


# ---- several numbers of draws ----


def banks_of(questions, votes):
    """Banks in which so many of every twenty answers in a row are "bright", each with its own number of them."""
    banks = []
    for bright, image, index in zip(votes, Shades().prepare(questions.images), questions.indices, strict=True):
        texts = ["bright" if 3 * number % 20 < bright else "dark" for number in range(1000)]  # 3 and 20 share no factor
        kept = {("select", number): Completion("bright", finished=True) for number in range(20)}
        kept |= {("estimate", number): Completion(text, finished=True) for number, text in enumerate(texts)}
        drawing = Drawing(sigma=SIGMA)
        banks.append(AnswerBank(Shades(), image, "Which?", drawing, dataset=questions.id, index=int(index), kept=kept))
    return banks


def test_radii_and_their_ratios_are_those_of_the_closed_forms():
    # Of 10, 100 and 1000 unanimous votes alpha^(1/n) is proved.
    asked = question_set([200], ["bright"])
    table = compare_draws(banks_of(asked, [20]), asked, ORACLE, counts=[1000, 100, 10, 100]).set_index("n")
    assert list(table.index) == [10, 100, 1000]
    assert table.mean_radius.to_list() == pytest.approx(
        [SIGMA * 0.002974, SIGMA * 1.500475, SIGMA * 2.463263], rel=1e-3
    )
    assert table.radius_ratio[100] == pytest.approx(0.609, abs=5e-4)
    assert table.radius_ratio[1000] == table.accuracy_ratio[1000] == table.rule_ratio[1000] == 1
    assert (table.certified == 1).all() and (table.certified_accuracy == 1).all()


def test_the_rule_of_thumb_beside_them():
    asked = question_set([200])
    table = compare_draws(banks_of(asked, [20]), asked, ORACLE, counts=[10, 50, 100, 1000]).set_index("n")
    assert table.rule.to_list() == pytest.approx([0, 0.2833, 0.4932, 0.8397], abs=5e-5)
    assert table.rule_ratio[100] == pytest.approx(0.5873, abs=5e-5)
    # At another alpha, z is another one.
    other = compare_draws(banks_of(asked, [20]), asked, ORACLE, counts=[100], alpha=0.05)
    assert other.rule[0] == pytest.approx(1 - 1.64 * 1.644854 / 10)


def test_means_count_abstentions_and_wrong_answers():
    # 85 and 850 votes; 65 of 100 abstain and 650 of 1000 do not; a third question is unanimous and wrong.
    asked = question_set([200, 201, 202], ["bright", "bright", "dark"])
    table = compare_draws(banks_of(asked, [17, 13, 20]), asked, ORACLE, counts=[100, 1000]).set_index("n")
    assert table.questions.to_list() == [3, 3]
    assert table.certified.to_list() == [2, 3]
    assert table.certified_accuracy.to_list() == pytest.approx([1 / 3, 2 / 3])
    assert table.accuracy_ratio[100] == pytest.approx(1 / 2)
    assert table.mean_radius[100] == pytest.approx((0.280362 + 0 + SIGMA * 1.500475) / 3, abs=1e-6)
    of_650 = 3 * table.mean_radius[1000] - SIGMA * (0.886311 + 2.463263)
    assert 0 < of_650 < SIGMA * 0.385  # the quantile of 650 / 1000 itself
    assert table.radius_ratio[100] == table.mean_radius[100] / table.mean_radius[1000]


def test_unknown_truths_have_no_accuracy_and_nothing_certified_no_ratio():
    asked = question_set([200, 201], [None, "dark"])
    table = compare_draws(banks_of(asked, [17, 17]), asked, ORACLE, counts=[100])
    assert table.certified_accuracy[0] == 0  # of the one that is known
    assert math.isnan(table.accuracy_ratio[0])
    unknown = question_set([200])
    table = compare_draws(banks_of(unknown, [10]), unknown, ORACLE, counts=[20])
    assert math.isnan(table.certified_accuracy[0])
    assert (table.certified[0], table.mean_radius[0]) == (0, 0)
    assert math.isnan(table.radius_ratio[0]) and math.isnan(table.rule_ratio[0])


def test_a_representative_is_compared_with_the_truth_by_a_reader():
    asked = question_set([200], ["bright"])
    table = compare_draws(banks_of(asked, [17]), asked, ExactMatch(), reader=ORACLE, counts=[100])
    assert (table.certified[0], table.certified_accuracy[0]) == (1, 1)


def test_seconds_are_those_of_answers_that_were_drawn():
    asked = question_set([200, 201])
    banks = banks_of(asked, [20, 20])
    assert compare_draws(banks, asked, ORACLE, counts=[10]).seconds.isna().all()  # all were kept before
    for bank, seconds, drawn in zip(banks, (3.0, 5.0), (300, 500), strict=True):
        bank.seconds, bank.drawn = seconds, drawn
    table = compare_draws(banks, asked, ORACLE, counts=[100, 1000], n0=20)
    assert table.seconds.to_list() == pytest.approx([1.2, 10.2])  # a hundredth of a second each


def test_answers_that_are_missing_are_drawn_and_counted():
    asked, vlm = question_set([200]), Shades()
    banks = collect_answers(vlm, asked, Drawing(sigma=1e-6), n0=20, n=10)
    assert (banks[0].drawn, len(vlm.asked)) == (30, 30)
    table = compare_draws(banks, asked, ExactMatch(), counts=[10, 50])
    assert (banks[0].drawn, len(vlm.asked)) == (70, 70)
    assert (table.certified == 1).all() and (table.seconds > 0).all()


@pytest.mark.parametrize(
    ("counts", "message"),
    [([], "counts is empty; give numbers"), ([100, 9], "n=9 draws can never certify at alpha=0.001.*use n >= 10")],
)
def test_counts_that_prove_nothing_are_refused(counts, message):
    asked = question_set([200])
    with pytest.raises(ValueError, match=message):
        compare_draws(banks_of(asked, [20]), asked, ORACLE, counts=counts)


# ---- an oracle's errors on the model's own texts ----


class Threshold:
    """Calls shades from a level on bright, and has no label for others than shades."""

    name, version, labels = "threshold", "1", ("bright", "dark")

    def __init__(self, level):
        self.level = level

    def label(self, texts):
        return ["bright" if int(text.split()[1]) >= self.level else "dark" for text in texts]


HOW = Drawing(sigma=1e-6, seed=3, max_new_tokens=7, temperature=0.5)
CERTIFIED = question_set([255], first=0)


def test_three_errors_among_two_hundred_texts():
    others, vlm = question_set(range(200)), Shades()
    reference = {f"shade {level}": "dark" for level in range(256)}
    found = calibrate_on_answers(vlm, others, HOW, Threshold(197), reference=reference, certified=CERTIFIED)
    assert found.counts == ((0, 0, 0), (3, 197, 0))
    rate = found.false_positives("bright")
    assert rate == ErrorRate(errors=3, trials=200)
    assert (rate.lower(0.0005), rate.upper(0.0005)) == pytest.approx((0.000752, 0.067793), abs=5e-7)
    # 85 of 100 votes at half of alpha.
    proved = found.one_sided().corrected(0.702855, label="bright", alpha=0.0005)
    assert proved == pytest.approx((0.702855 - 0.067793) / (1 - 0.067793), abs=1e-6)


def test_answers_are_drawn_as_the_certified_ones_are():
    vlm = Shades()
    calibrate_on_answers(vlm, question_set([1, 2, 3]), HOW, Threshold(5), reference={}, certified=CERTIFIED)
    assert [(temperature, tokens) for _, temperature, tokens, _ in vlm.asked] == [(0.5, 7)] * 3
    assert len({seed for *_, seed in vlm.asked}) == 3  # each decodes with random numbers of its own


def test_texts_that_the_reference_lacks_count_against_the_oracle():
    reference = {f"shade {level}": "dark" for level in range(10)}
    others = question_set([*range(10), 20, 30, 31])
    found = calibrate_on_answers(Shades(), others, HOW, Threshold(30), reference=reference, certified=CERTIFIED)
    assert (found.n, found.unknown) == (10, (2, 1, 0))
    assert found.false_positives("bright") == ErrorRate(errors=2, trials=12)


def test_what_is_certified_never_calibrates():
    vlm, certified = Shades(), question_set([7, 8])
    with pytest.raises(ValueError, match="2 of the 3 questions of folder:greys are certified too; calibrate on other"):
        calibrate_on_answers(
            vlm, question_set([6, 7, 8], first=5), HOW, Threshold(5), reference={}, certified=certified
        )
    assert not vlm.asked
    # The splits of a set number their images alike, and one image may be asked about twice.
    for others in (question_set([1, 2]), question_set([7, 8], prompts=["And which?"] * 2)):
        calibrate_on_answers(vlm, others, HOW, Threshold(5), reference={}, certified=certified)
    assert len(vlm.asked) == 4


def test_a_reference_with_a_label_of_its_own_is_refused():
    with pytest.raises(ValueError, match="truths 'grey' are none of the labels bright, dark"):
        calibrate_on_answers(
            Shades(), question_set([1]), HOW, Threshold(5), reference={"shade 1": "grey"}, certified=CERTIFIED
        )
