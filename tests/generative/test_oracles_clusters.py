import random

import pytest

from medrobust_lib.generative.oracles import Cluster, ExactMatch, OracleUnavailableError, cluster_texts


class Rule:
    """An equivalence by any rule of (text, representative); it remembers its calls."""

    name, version = "rule", "1"

    def __init__(self, rule):
        self.rule, self.calls = rule, []

    def equivalent(self, texts, representative):
        self.calls.append((representative, list(texts)))
        return [self.rule(text, representative) for text in texts]


def near(text, representative):
    """Not transitive: 0 is near 2 and 2 is near 4, but 0 is not near 4."""
    return abs(int(text) - int(representative)) <= 2


def extends(text, representative):
    """Not symmetric."""
    return text.startswith(representative)


def as_sizes(clusters):
    return {cluster.representative: cluster.size for cluster in clusters}


def test_the_first_text_seen_represents_its_cluster():
    clusters, judged = cluster_texts(["no", "yes", "no ", "maybe", "yes", "no"], ExactMatch())
    assert clusters == [Cluster("no", 3), Cluster("yes", 2), Cluster("maybe", 1)]
    assert judged.labels == (0, 1, 0, 2, 1, 0)
    assert (judged.empty, judged.failed) == (0, 0)


def test_the_equivalence_is_asked_once_a_cluster_and_only_about_texts_without_one():
    rule = Rule(lambda text, representative: text == representative)
    clusters, _ = cluster_texts(["b", "a", "b", "c", "a", "", None], rule)
    assert rule.calls == [("b", ["b", "a", "b", "c", "a"]), ("a", ["a", "c", "a"]), ("c", ["c"])]
    assert len(rule.calls) == len(clusters)


def test_without_transitivity_the_order_decides():
    assert as_sizes(cluster_texts(["2", "0", "4"], Rule(near))[0]) == {"2": 3}
    assert as_sizes(cluster_texts(["0", "2", "4"], Rule(near))[0]) == {"0": 2, "4": 1}
    assert as_sizes(cluster_texts(["4", "2", "0"], Rule(near))[0]) == {"4": 2, "0": 1}


def test_without_symmetry_the_order_decides():
    assert as_sizes(cluster_texts(["no", "no opacity"], Rule(extends))[0]) == {"no": 2}
    assert as_sizes(cluster_texts(["no opacity", "no"], Rule(extends))[0]) == {"no opacity": 1, "no": 1}


def test_a_text_joins_the_first_cluster_it_fits():
    clusters, judged = cluster_texts(["0", "3", "2"], Rule(near))
    assert clusters == [Cluster("0", 2), Cluster("3", 1)]
    assert judged.labels == (0, 1, 0)


@pytest.mark.parametrize("seed", range(5))
def test_an_order_gives_the_same_clusters_every_time_and_covers_every_text(seed):
    texts = [str(value) for value in random.Random(seed).choices(range(12), k=40)]
    clusters, judged = cluster_texts(texts, Rule(near))
    assert cluster_texts(list(texts), Rule(near)) == (clusters, judged)
    assert sum(cluster.size for cluster in clusters) == 40
    for number, cluster in enumerate(clusters):
        members = [text for text, label in zip(texts, judged.labels, strict=True) if label == number]
        assert members[0] == cluster.representative
        assert len(members) == cluster.size
        assert all(near(text, cluster.representative) for text in members)


@pytest.mark.parametrize("seed", range(5))
def test_an_honest_equivalence_gives_the_same_clusters_in_every_order(seed):
    texts = [f"{value % 4}{value}" for value in random.Random(seed).choices(range(40), k=60)]
    same_start = Rule(lambda text, representative: text[0] == representative[0])
    sizes = {
        tuple(sorted((cluster.representative[0], cluster.size) for cluster in cluster_texts(order, same_start)[0]))
        for order in (texts, texts[::-1], sorted(texts))
    }
    assert len(sizes) == 1


def test_empty_texts_join_no_cluster():
    clusters, judged = cluster_texts([None, "a", "", " \n", "a"], ExactMatch())
    assert clusters == [Cluster("a", 2)]
    assert judged.labels == (None, 0, None, None, 0)
    assert judged.empty == 3


@pytest.mark.parametrize("texts", [[], [None, "", "\t"]])
def test_nothing_to_cluster_is_no_cluster_and_no_question(texts):
    rule = Rule(near)
    clusters, judged = cluster_texts(texts, rule)
    assert (clusters, judged.empty, rule.calls) == ([], len(texts), [])


@pytest.mark.parametrize("verdict", [False, None])
def test_a_text_stands_for_itself_whatever_the_equivalence_says(verdict):
    clusters, judged = cluster_texts(["a", "b"], Rule(lambda text, representative: verdict))
    assert clusters == [Cluster("a", 1), Cluster("b", 1)]
    assert judged.labels == (0, 1)


def test_texts_at_which_the_equivalence_fails_stay_and_failures_are_counted():
    def fragile(text, representative):
        if text == "odd":
            raise RuntimeError("odd text")
        return text == representative

    clusters, judged = cluster_texts(["a", "odd", "b", "a", "odd"], Rule(fragile))
    assert clusters == [Cluster("a", 2), Cluster("odd", 1), Cluster("b", 1), Cluster("odd", 1)]
    assert judged.labels == (0, 1, 2, 0, 3)
    assert judged.failed == 6  # two texts at "a", again at the first "odd", then one at "b" and at itself
    assert judged.first_error == "RuntimeError: odd text"


def test_a_judge_that_is_away_stops_everything():
    def away(text, representative):
        raise OracleUnavailableError("endpoint is away")

    with pytest.raises(OracleUnavailableError, match="endpoint is away"):
        cluster_texts(["a"], Rule(away))
