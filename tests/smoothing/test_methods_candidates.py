"""A finite set of prompts fixed in advance: certified together, each at its share of alpha."""

import pytest
import torch
from scipy.stats import binom
from torch.nn import functional

import medrobust_lib as mr
from medrobust_lib.smoothing.bounds import certified_radius, lower_confidence_bound
from medrobust_lib.smoothing.certificate import ABSTAIN
from medrobust_lib.smoothing.certify import FixedPlan, Verdict, agreement, take_votes
from medrobust_lib.smoothing.methods import CandidatePrompts, FixedPrompts

SIGMA, N0, N, ALPHA = 0.1, 10, 100, 0.01


@pytest.fixture(scope="module")
def data(phantoms):
    return phantoms("breast", n=4)


@pytest.fixture(scope="module")
def candidates(model, data):
    return tuple(model.class_features(data.classes, [template]) for template in data.templates[:3])


def certify(model, data, methods, **change):
    settings = {"sigmas": [SIGMA], "n0": N0, "n": N, "alpha": ALPHA, "sampling": "fixed"} | change
    return mr.certify_dataset(model, data, methods, **settings)


def test_the_radius_is_the_smallest_of_the_candidates_each_at_its_share_of_alpha(model, data, candidates):
    joined = certify(model, data, [CandidatePrompts("set", candidates)])
    single = certify(
        model, data, [FixedPrompts(f"prompt {i}", f) for i, f in enumerate(candidates)], alpha=ALPHA / len(candidates)
    )
    assert (joined.guarantee == "candidate-set").all()
    for row in joined.itertuples():
        parts = single[single.image == row.image]
        agree = parts.predicted.nunique() == 1 and (parts.predicted >= 0).all()
        assert row.predicted == (parts.predicted.iloc[0] if agree else ABSTAIN)
        assert row.radius == (parts.radius.min() if agree else 0)
    assert (joined.predicted >= 0).any()


@pytest.mark.parametrize("sampling", ["fixed", "sequential"])
def test_one_candidate_is_the_ordinary_certificate(model, data, candidates, sampling):
    change = {"sampling": sampling, "radii": [0, 0.05, 0.1]}
    ours = certify(model, data, [CandidatePrompts("set", candidates[:1])], **change)
    theirs = certify(model, data, [FixedPrompts("set", candidates[0])], **change)
    same = ["image", "predicted", "radius", "p_lower", "k", "n", "draws"]
    assert ours[same].equals(theirs[same])


def test_the_set_may_stand_among_other_methods(model, data, candidates):
    alone = certify(model, data, [CandidatePrompts("set", candidates)], sampling="sequential", radii=[0, 0.1])
    mixed = certify(
        model, data, [FixedPrompts("one", candidates[1]), CandidatePrompts("set", candidates)], sampling="sequential",
        radii=[0, 0.1],
    )  # fmt: skip
    among = mixed[mixed.method == "set"].reset_index(drop=True)
    assert among.drop(columns="seconds").equals(alone.drop(columns="seconds"))


def test_candidates_that_disagree_abstain(model, data, candidates):
    opposite = CandidatePrompts("set", (candidates[0], candidates[0].flip(0)))
    rows = certify(model, data, [opposite])
    assert (rows.predicted == ABSTAIN).all()
    assert (rows.radius == 0).all()


def test_agreement_takes_the_weakest():
    strong = Verdict(predicted=2, radius=0.5, p_lower=0.9, k=95, n=100)
    weak = Verdict(predicted=2, radius=0.1, p_lower=0.6, k=70, n=120)
    assert agreement([strong, weak]) == Verdict(predicted=2, radius=0.1, p_lower=0.6, k=70, n=120)
    other = Verdict(predicted=1, radius=0.3, p_lower=0.8, k=80, n=90)
    assert agreement([strong, other]).predicted == ABSTAIN
    rest = [Verdict(predicted=1, p_lower=0.4, p_upper=upper, bounds="two") for upper in (0.3, 0.2)]
    assert agreement(rest) == rest[0]
    apart = agreement([rest[0], Verdict(predicted=2, radius=0.1, p_lower=0.6, p_upper=0.4)])
    assert (apart.predicted, apart.p_lower, apart.p_upper) == (ABSTAIN, 0.4, 0.4)
    nothing = Verdict(predicted=ABSTAIN, radius=0.0, p_lower=0.0, k=3, n=12)
    assert agreement([strong, nothing]).predicted == agreement([nothing, nothing]).predicted == ABSTAIN


def test_plans_of_different_looks_share_their_draws():
    asked = []

    def answers(role, first, count, positions):
        asked.append((role, first, count, tuple(positions)))
        return [torch.zeros(count, dtype=torch.int64) for _ in positions]

    plans = [FixedPlan(sigma=0.5, n=50, alpha=0.01), FixedPlan(sigma=0.5, n=80, alpha=0.001)]
    first, second = take_votes(answers, plans, n0=10, label=None)
    assert asked == [("select", 0, 10, (0, 1)), ("estimate", 0, 50, (0, 1)), ("estimate", 50, 30, (1,))]
    assert (first.n, second.n) == (50, 80)
    assert second.radius == certified_radius(lower_confidence_bound(80, 80, 0.001), 0.5)


def test_union_bound_holds_and_is_needed():
    """All candidates sit exactly at one half: some set is certified at most alpha of the time, but not at full alpha.

    A certificate of the set is false if any of its members' is; with independent votes the members err separately.
    """
    alpha, members, n = 0.2, 4, 40

    def chance_of_an_error(level):
        plan = FixedPlan(sigma=1.0, n=n, alpha=level)
        certifying = [k for k in range(n + 1) if plan.step(0, k).proved]
        return 1 - (1 - binom.pmf(certifying, n, 0.5).sum()) ** members

    assert chance_of_an_error(alpha / members) <= alpha < chance_of_an_error(alpha)


def test_bad_candidates_are_refused():
    with pytest.raises(ValueError, match="needs at least one prompt"):
        CandidatePrompts("empty", ())
    with pytest.raises(ValueError, match="must be unit-norm"):
        CandidatePrompts("long", (functional.normalize(torch.ones(2, 3), dim=1), torch.ones(2, 3)))
