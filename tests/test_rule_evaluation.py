"""Scores of rules, and the rules that are shipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pgjax.errors import RequestError
from pgjax.experiments import rule_evaluation
from pgjax.experiments.meta_train import held_out, lpg
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
    assert said["sessions"][0]["command"].startswith("pgjax meta-train ")
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


def test_returns_are_those_of_meta_trainings_own_comparison():
    rule = learned_files.load("lpg:default", "lpg")
    spec, params = read_convention(rule.params, rule.convention)
    inner = lpg.inner_of(lpg.Args(levels="small", num_envs=16), spec)
    found = rule_evaluation.returns_of(rule, "small", 3, 2)
    alone = rule_evaluation.returns_of(rule, "small", 3, 2, others=False)
    levels, lives = held_out.sample(inner.family, 3), jnp.full(3, 2.0)
    expected = held_out.compare(inner, params, levels, lives, jax.random.split(jax.random.key(0), 1)[0])
    for name in ("rule", "a2c", "best"):
        np.testing.assert_allclose(found[name], getattr(expected, name), rtol=1e-5, atol=1e-6)
    for name in ("rule", "best"):
        np.testing.assert_allclose(alone[name], found[name], rtol=1e-5, atol=1e-6)


def test_two_kinds_differ_by_the_means_of_their_seeds(monkeypatch):
    """Scores 0.5, 0.6, 0.7 against 0.2, 0.4, each on two levels; Welch's interval from SciPy."""
    scores = dict(zip("abcde", (0.5, 0.6, 0.7, 0.2, 0.4), strict=True))
    monkeypatch.setattr(learned_files, "load", lambda name, kind: name)

    def returns_of(name, *_, **__):
        return {"rule": scores[name] * np.array([1.0, 3.0]), "best": np.array([1.0, 3.0])}

    monkeypatch.setattr(rule_evaluation, "returns_of", returns_of)
    text = rule_evaluation.kinds_table(tuple("abc"), tuple("de"), "small", 2, None)
    low, high = stats.ttest_ind([0.5, 0.6, 0.7], [0.2, 0.4], equal_var=False).confidence_interval()
    assert f"+0.300 [{low:+.3f}, {high:+.3f}]" in text and "0.500, 0.600, 0.700" in text


def test_a_single_rule_of_a_kind_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rule_evaluation", "lpg:default", "--against", "lpg:default", "lpg:default"])
    assert rule_evaluation.main() == 2 and "two rules or more" in capsys.readouterr().err
