"""Scores of rules, and the rules that are shipped."""

import numpy as np
import pytest

from pgjax.errors import RequestError
from pgjax.experiments import rule_evaluation
from pgjax.learned import files as learned_files
from pgjax.learned.rule import read_convention


def test_a_score_is_a_ratio_of_means_with_an_interval_over_levels():
    best = np.array([1.0, 2.0, 3.0, 0.5])
    np.testing.assert_allclose(rule_evaluation.score(0.5 * best, best), (0.5, 0.5, 0.5))
    np.testing.assert_allclose(rule_evaluation.score(0.5 * best, best, 0.75 * best), (-0.25, -0.25, -0.25))
    # By the delta method: the variance of a ratio of means r = a / b is that of (x - r y) / b.
    rng = np.random.default_rng(0)
    best = rng.uniform(1, 3, 400)
    returns = best * rng.uniform(0.5, 1, 400)
    ratio, low, high = rule_evaluation.score(returns, best)
    error = np.std(returns - ratio * best) / best.mean() / np.sqrt(400)
    np.testing.assert_allclose((ratio - low, high - ratio), 1.96 * error, rtol=0.1)


@pytest.mark.parametrize("name", sorted(learned_files.shipped("lpg")))
def test_a_shipped_rule_says_where_it_comes_from(name):
    rule = learned_files.load(f"lpg:{name}", "lpg")
    read_convention(rule.params, rule.convention)
    said = rule.provenance
    assert said["sessions"][0]["command"].startswith("pgjax meta-train ") and said["status"] == "finished"
    assert said["steps_done"] == said["request"]["steps"] == len(said["curve"]["value"])
    assert said["held_out"]["normalized_rule"] > 0.5


def test_levels_without_a_known_optimum_are_refused():
    with pytest.raises(RequestError, match="levels = 'rand_dense'"):
        rule_evaluation.returns_of(learned_files.load("lpg:default", "lpg"), "rand_dense", 2, 1)


@pytest.mark.slow
def test_the_shipped_rule_teaches_and_the_untrained_one_does_not():
    found = rule_evaluation.returns_of(learned_files.load("lpg:default", "lpg"), "small", 64, 60)
    for other in (found["start"], 0.7 * found["best"]):
        assert rule_evaluation.score(found["rule"], found["best"], other)[1] > 0
