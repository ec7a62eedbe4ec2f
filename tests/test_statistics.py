"""Statistics against plain loops, full enumeration, tables and simulation; what they claim of chance is what happens."""

import itertools
import math
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import Probe
from scipy import integrate, stats

import pgjax
from pgjax.envs import list_envs
from pgjax.errors import RequestError
from pgjax.experiments import aa_test, presets, reference_scores
from pgjax.experiments.statistics import (
    AGGREGATES,
    aggregates,
    all_pairs,
    holm,
    iqm,
    iqm_interval,
    paired_comparison,
    performance_profile,
    probability_of_improvement,
    seeds_needed,
    unpaired_comparison,
)


def rng_of(seed):
    return np.random.default_rng(seed)


def at_most(num_trials, chance):
    """What a count of ``num_trials`` events of this chance stays at or below with probability 0.999."""
    return stats.binom.ppf(0.999, num_trials, chance)


def at_least(num_trials, chance):
    return stats.binom.ppf(0.001, num_trials, chance)


# --- aggregates


def test_iqm_by_hand():
    assert iqm(np.arange(8)) == 3.5
    # The middle four of eight, so neither outlier counts; one of five is cut off at either end; none of three.
    assert iqm(np.array([1000, 0, 1, 2, 3, 4, 5, -1000])) == 2.5
    assert iqm(np.array([100, 0, 1, 2, 3])) == 2.0
    assert iqm(np.array([0, 1, 8])) == 3.0
    np.testing.assert_array_equal(iqm(np.array([[0, 4], [1, 5], [2, 6], [30, 70]])), [1.5, 5.5])
    assert iqm(np.array([[0, 1], [2, 30]]), axis=None) == 1.5


def test_iqm_interval_is_that_of_every_resample():
    values = np.array([3.0, 7.0, 4.0, 15.0])
    every = [np.sort(values[list(picks)])[1:3].mean() for picks in itertools.product(range(4), repeat=4)]
    for end, tail in zip(iqm_interval(values, 4000), (0.025, 0.975), strict=True):
        below, above = np.quantile(every, [max(0, tail - 0.015), min(1, tail + 0.015)])
        assert below <= end <= above
    assert iqm_interval(np.array([3.0])) == (3.0, 3.0)


def test_aggregates_by_hand():
    scores = np.array([[0.0, 1.0, 4.0, 0.5], [0.5, 2.0, 6.0, 0.5]])
    found = {name: interval.value for name, interval in aggregates({"a": scores})["a"].items()}
    # Sorted: 0, 0.5, 0.5, 0.5, 1, 2, 4, 6. Means of the tasks: 0.25, 1.5, 5, 0.5. Clipped at 1: 0, 1, 1, 0.5, 0.5, 1, 1, 0.5.
    assert found == {"iqm": 1.0, "mean": 1.8125, "median": 1.0, "optimality_gap": 1 - 5.5 / 8}


def test_aggregates_and_their_intervals_are_rliables():
    from rliable import library, metrics

    scores = rng_of(0).gamma(2.0, 0.4, size=(9, 4))
    theirs = {
        "iqm": metrics.aggregate_iqm,
        "mean": metrics.aggregate_mean,
        "median": metrics.aggregate_median,
        "optimality_gap": metrics.aggregate_optimality_gap,
    }
    assert list(theirs) == list(AGGREGATES)
    state = np.random.get_state()  # noqa: NPY002 rliable draws from the global generator
    np.random.seed(0)  # noqa: NPY002
    try:
        values, ends = library.get_interval_estimates(
            {"a": scores}, lambda x: np.array([function(x) for function in theirs.values()]), reps=1000
        )
    finally:
        np.random.set_state(state)  # noqa: NPY002
    ours = aggregates({"a": scores}, 4000)["a"]
    for i, interval in enumerate(ours.values()):
        np.testing.assert_allclose(interval.value, values["a"][i])
        # Each end of theirs has a Monte Carlo error of about 2 % of the width.
        np.testing.assert_allclose(interval[1:], ends["a"][:, i], atol=0.08 * (interval.high - interval.low))


def test_each_tasks_seeds_are_resampled_apart():
    # Only seeds vary: with none differing within a task there is no interval, however far apart the tasks are.
    table = aggregates({"a": np.array([[0.0, 10.0, 3.0]] * 5), "b": np.array([[1.0, 2.0]])})
    for intervals in table.values():
        for value, low, high in intervals.values():
            assert low == value == high
    # Independent between tasks: the variance of the mean over two tasks is half that of one.
    seeds = np.arange(50.0)
    one, two = (aggregates({"a": scores}, 4000)["a"]["mean"] for scores in (seeds, np.stack([seeds, seeds], 1)))
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(math.sqrt(0.5), rel=0.08)


def test_methods_do_not_change_each_others_numbers():
    x, y = rng_of(0).normal(size=(2, 8, 3))
    both = aggregates({"x": x, "y": y[:5]})
    assert both["y"] == aggregates({"y": y[:5]})["y"] and both["x"] == aggregates({"x": x})["x"]


def test_intervals_hold_the_true_value_as_often_as_they_say():
    assert aa_test.EXPONENTIAL_IQM == pytest.approx(2 * integrate.quad(lambda u: -math.log1p(-u), 0.25, 0.75)[0])
    # 95 % within a point, for the bootstrap is an approximation, and the binomial spread of 300 trials.
    for held in aa_test.coverage(30, 4, expanded=False, trials=300).values():
        assert at_least(300, 0.94) <= held <= at_most(300, 0.96)


def test_with_few_seeds_only_the_expanded_interval_does():
    plain, expanded = (aa_test.coverage(4, 3, wide, trials=300) for wide in (False, True))
    assert plain["mean"] < at_least(300, 0.95), "docs/statistics.md warns of it"
    assert expanded["iqm"] >= at_least(300, 0.94) and expanded["mean"] >= at_least(300, 0.93)


def test_performance_profile_is_the_share_above():
    scores = np.round(rng_of(0).normal(size=(7, 3)), 1)
    thresholds = np.array([-1.0, 0.0, scores[2, 1], 5.0])
    profile, low, high = performance_profile(scores, thresholds)
    for k, threshold in enumerate(thresholds):
        above = [scores[s, t] > threshold for s in range(7) for t in range(3)]
        assert profile[k] == pytest.approx(sum(above) / 21)
    assert (low <= profile).all() and (profile <= high).all() and profile[-1] == 0
    # A bootstrap of one task's share above a threshold is a binomial.
    share, low, high = performance_profile(np.arange(20.0), [13.5], num_resamples=20_000)
    assert share[0] == 0.3
    np.testing.assert_allclose([low[0], high[0]], stats.binom.ppf([0.025, 0.975], 20, 0.3) / 20)


def test_probability_of_improvement_is_the_share_of_wins():
    rng = rng_of(0)
    x, y = rng.integers(4, size=(5, 2)) + 0.0, rng.integers(4, size=(7, 2)) + 0.0
    wins = 0.0
    for t in range(2):
        for i in range(5):
            for j in range(7):
                wins += 1.0 if x[i, t] > y[j, t] else 0.5 if x[i, t] == y[j, t] else 0.0
    found = probability_of_improvement(x, y)
    assert found.value == pytest.approx(wins / 70)
    assert found.low < found.value < found.high
    assert probability_of_improvement(y, x).value == pytest.approx(1 - found.value)
    assert probability_of_improvement(x + 10, y) == (1, 1, 1)


def test_probability_of_improvement_has_the_interval_of_every_resample():
    x, y = np.array([1.0, 4.0, 6.0]), np.array([0.0, 3.0, 5.0])
    picks = [list(p) for p in itertools.product(range(3), repeat=3)]
    every = [np.mean(x[i][:, None] > y[j]) for i in picks for j in picks]
    found = probability_of_improvement(x, y, 8000)
    for end, tail in zip(found[1:], (0.025, 0.975), strict=True):
        below, above = np.quantile(every, [tail - 0.01, tail + 0.01])
        assert below <= end <= above


# --- tests of a difference


def sign_flip_p(difference):
    """Twice the share of sign patterns at least as far out on the observed side."""
    flipped = [np.dot(signs, difference) for signs in itertools.product([1, -1], repeat=len(difference))]
    observed = difference.sum()
    tails = [np.mean(np.array(flipped) >= observed - 1e-9), np.mean(np.array(flipped) <= observed + 1e-9)]
    return min(1, 2 * min(tails))


def regroup_p(x, y):
    """The same over regroupings of x [m, T] and y [n, T] within each task."""
    m = len(x)
    pooled = np.concatenate([x, y])
    choices = [list(c) for c in itertools.combinations(range(len(pooled)), m)]
    found = []
    for chosen in itertools.product(choices, repeat=x.shape[1]):
        parts = [pooled[c, t].mean() - np.delete(pooled[:, t], c).mean() for t, c in enumerate(chosen)]
        found.append(np.mean(parts))
    tails = [np.mean(np.array(found) >= found[0] - 1e-9), np.mean(np.array(found) <= found[0] + 1e-9)]
    return min(1, 2 * min(tails))


def test_paired_comparison_by_hand():
    # Of 2^6 sign patterns only all + is as far up: 2 / 64. The interval is then from the smallest to the largest.
    found = paired_comparison(np.arange(1.0, 7.0), np.zeros(6))
    assert found == ((3.5, 1.0, 6.0), 2 / 64, 6)
    # Five pairs cannot reach 5 %.
    found = paired_comparison(np.arange(1.0, 6.0), np.zeros(5))
    assert found.p_value == 2 / 32 and found.difference == (3.0, -math.inf, math.inf)
    assert paired_comparison(np.ones(8), np.ones(8)) == ((0, 0, 0), 1, 8)


def test_unpaired_comparison_by_hand():
    # Of binomial(8, 4) = 70 groups only one is as far up: 2 / 70. The smallest difference is 4 - 3, the largest 7 - 0.
    found = unpaired_comparison(np.arange(4.0, 8.0), np.arange(4.0))
    assert found == ((4.0, 1.0, 7.0), 2 / 70, None)
    found = unpaired_comparison(np.arange(3.0, 6.0), np.arange(3.0))
    assert found.p_value == 2 / 20 and found.difference == (3.0, -math.inf, math.inf)
    assert unpaired_comparison(np.ones(8), np.ones(6)) == ((0, 0, 0), 1, None)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rounded", [False, True])
def test_p_values_are_those_of_every_regrouping(seed, rounded):
    x, y = np.add(rng_of(seed).normal(size=(2, 5, 2)), [[[0.8]], [[0.0]]])
    if rounded:  # ties
        x, y = np.round(x), np.round(y)
    found = paired_comparison(x, y)
    assert found.p_value == pytest.approx(sign_flip_p((x - y).ravel())) and found.num_pairs == 10
    assert unpaired_comparison(x[:3], y[:4]).p_value == pytest.approx(regroup_p(x[:3], y[:4]))
    assert unpaired_comparison(x[:, :1], y[:4, :1]).p_value == pytest.approx(regroup_p(x[:, :1], y[:4, :1]))
    for test in (paired_comparison, unpaired_comparison):
        forth, back = test(x, y), test(y, x)
        assert back.p_value == forth.p_value and back.difference.low == pytest.approx(-forth.difference.high)


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_intervals_hold_the_shifts_that_are_not_rejected(level):
    x, y = np.add(rng_of(3).normal(size=(2, 4, 2)), [[[0.8]], [[0.0]]])
    for test, p in (
        (paired_comparison, lambda shift: sign_flip_p((x - y - shift).ravel())),
        (lambda *a, level: unpaired_comparison(a[0], a[1][:3], level=level), lambda shift: regroup_p(x - shift, y[:3])),
    ):
        _, low, high = test(x, y, level=level).difference
        width = high - low
        for end, outwards in ((low, -1), (high, 1)):
            assert p(end + outwards * 1e-6 * width) <= level < p(end - outwards * 1e-6 * width)
        assert all(p(shift) > level for shift in np.linspace(low, high, 7)[1:-1])
        assert all(p(shift) <= level for shift in (low - width, high + width))


def test_random_regroupings_agree_with_all_of_them():
    x, y = np.add(rng_of(5).normal(size=(2, 20)), [[0.4], [0]])
    sums = np.zeros(1)
    for d in x - y:
        sums = np.concatenate([sums + d, sums - d])
    exact = 2 * np.mean(sums >= (x - y).sum() - 1e-9)
    assert 0.02 < exact < 0.2
    # Twice a share of 9999 draws.
    error = 4 * 2 * math.sqrt(exact / 2 / 9999)
    assert paired_comparison(x, y).p_value == pytest.approx(exact, abs=error)

    x, y = x[:10], y[:10] + 0.3
    pooled = np.concatenate([x, y])
    sums = np.array([pooled[list(c)].sum() for c in itertools.combinations(range(20), 10)])
    exact = 2 * min(np.mean(sums >= sums[0] - 1e-9), np.mean(sums <= sums[0] + 1e-9))
    assert unpaired_comparison(x, y).p_value == pytest.approx(exact, abs=4 * 2 * math.sqrt(exact / 2 / 9999))
    low, high = unpaired_comparison(x, y).difference[1:]
    np.testing.assert_allclose([low, high], stats.ttest_ind(x, y).confidence_interval(), rtol=0.1)


DISTRIBUTIONS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: rng.exponential(size=size) ** 2,
    # Most runs at the maximum, as on CartPole.
    "ties": lambda rng, size: np.minimum(500, np.round(rng.normal(520, 40, size=size))),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(7,), (4, 3), (20, 2)], ids=str)
def test_equal_methods_are_called_different_in_no_more_than_5_percent(name, shape):
    rng, trials = rng_of(11), 200 if shape == (20, 2) else 600
    called = np.zeros(2)
    for _ in range(trials):
        x, y = DISTRIBUTIONS[name](rng, (2, *shape))
        comparisons = paired_comparison(x, y), unpaired_comparison(x, y)
        called += [comparison.p_value <= 0.05 for comparison in comparisons]
        for comparison in comparisons:
            value, low, high = comparison.difference
            assert low <= value <= high
            if name != "ties":
                assert (low > 0 or high < 0) == (comparison.p_value <= 0.05)
    assert (called <= at_most(trials, 0.05)).all(), called
    # Nor in much less, or the tests would be blind; the largest p-value below 5 % of 7 pairs is 6 / 128.
    assert name == "ties" or (called >= at_least(trials, 6 / 128)).all(), called


def test_holm_by_hand():
    # Ascending 0.005, 0.01, 0.03, 0.04 by 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and none below the one before it.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    assert holm([]).size == 0
    for wrong in ([0.5, 1.5], [0.1, math.nan]):
        with pytest.raises(RequestError, match="p_values"):
            holm(wrong)


def test_all_pairs():
    rng = rng_of(0)
    scores = {name: rng.normal(size=(8, 2)) + shift for name, shift in (("a", 0), ("b", 0.3), ("c", 3))}
    for paired, test in ((True, paired_comparison), (False, unpaired_comparison)):
        pairs = all_pairs(scores, paired)
        assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
        for pair in pairs:
            assert pair.comparison == test(scores[pair.first], scores[pair.second])
            assert pair.probability == probability_of_improvement(scores[pair.first], scores[pair.second])
        np.testing.assert_array_equal([p.p_adjusted for p in pairs], holm([p.comparison.p_value for p in pairs]))
        assert [pair.p_adjusted <= 0.05 for pair in pairs] == [False, True, True]
    scores["b"] = scores["b"][:6]
    with pytest.raises(RequestError, match="a and b: scores of 8 and 6 seeds cannot be paired"):
        all_pairs(scores)
    assert len(all_pairs(scores, paired=False)) == 3


# --- how many seeds


def with_moments(mean, std, num_seeds=12, seed=0):
    """Scores of exactly this mean and standard deviation."""
    values = rng_of(seed).normal(size=num_seeds)
    return mean + std * (values - values.mean()) / values.std(ddof=1)


def test_seeds_needed_are_those_of_the_tables():
    # Cohen 1988, two-sided t test at 5 % with power 0.8: 64 each for d = 0.5, 26 for 0.8, 17 for 1; 34 pairs for 0.5.
    for d, expected in ((0.5, 64), (0.8, 26), (1.0, 17)):
        assert seeds_needed(with_moments(d, 1), with_moments(0, 1, seed=1)) == expected
        assert seeds_needed(with_moments(0, 3), with_moments(3 * d, 3, seed=1)) == expected
    base = with_moments(0, 5)
    assert seeds_needed(base + with_moments(0.5, 1, seed=2), base, paired=True) == 34
    # Where n is large, z takes the place of t.
    x, y = with_moments(0.01, 1), with_moments(0, 2, seed=1)
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.9)
    assert seeds_needed(x, y, power=0.9) == pytest.approx(z**2 * (1 + 4) / 0.01**2, rel=1e-3)
    # Four tasks count as four times the seeds.
    tasks = [np.stack([with_moments(mean, 1, seed=10 * k + t) for t in range(4)], 1) for k, mean in enumerate((0, 0.5))]
    assert seeds_needed(*tasks) in (16, 17)


def test_seeds_needed_at_the_ends():
    x = with_moments(0, 1)
    assert seeds_needed(x, with_moments(0, 1, seed=1)) is None and seeds_needed(x, x) is None
    assert seeds_needed(x, x + 1e-9) is None
    # 4 against 4, or 6 pairs, is the least with which the tests reach 5 %.
    assert seeds_needed(x, x + 1000) == 4 and seeds_needed(np.zeros(3), np.ones(3)) == 4
    assert seeds_needed(x, x[::-1] + 1000, paired=True) == 6
    with pytest.raises(RequestError, match="one seed"):
        seeds_needed(np.ones(1), x)
    with pytest.raises(RequestError, match=r"power = 1\.5"):
        seeds_needed(x, x + 1, power=1.5)


@pytest.mark.parametrize("paired", [False, True])
def test_with_the_seeds_needed_the_difference_is_found_as_often_as_asked(paired):
    first, second = with_moments(1.2, 1.5), with_moments(0, 0.8, seed=1)
    if paired:
        second = first - with_moments(1.2, 1.5, seed=2)
    needed = seeds_needed(first, second, paired=paired)
    assert 10 <= needed <= 30
    rng, trials, found = rng_of(2), 400, {needed: 0, needed // 2: 0}
    for num_seeds in found:
        for _ in range(trials):
            if paired:
                difference = rng.normal(1.2, 1.5, size=num_seeds)
                comparison = paired_comparison(difference, np.zeros(num_seeds))
            else:
                comparison = unpaired_comparison(rng.normal(1.2, 1.5, num_seeds), rng.normal(0, 0.8, num_seeds))
            found[num_seeds] += comparison.p_value <= 0.05
    # Within two points, for the tests are not the t tests of the formula, and the binomial spread.
    assert at_least(trials, 0.78) <= found[needed] <= at_most(trials, 0.85), found
    assert found[needed // 2] < at_least(trials, 0.75)


# --- what is refused, and what is the same


def test_scores_with_a_missing_cell_are_refused_in_one_line():
    good = np.ones((4, 2))
    holed = good.copy()
    holed[2, 1] = np.nan
    ragged = [[1.0, 2.0], [3.0]]
    endless = good * np.inf
    for bad, words in (
        (holed, "nan in seed row 2, task column 1 is not finite"),
        (endless, "inf in seed row 0, task column 0"),
        (ragged, "each task needs the same number of seeds"),
        (np.ones((2, 2, 2)), "shape [2, 2, 2]"),
        (np.ones((0, 2)), "shape [0, 2]"),
    ):
        for call in (
            lambda bad=bad: aggregates({"ppo": bad}),
            lambda bad=bad: performance_profile(bad, [0.0]),
            lambda bad=bad: probability_of_improvement(good, bad),
            lambda bad=bad: paired_comparison(bad, good),
            lambda bad=bad: unpaired_comparison(good, bad),
            lambda bad=bad: all_pairs({"a": good, "b": bad}),
            lambda bad=bad: seeds_needed(good, bad),
        ):
            with pytest.raises(RequestError) as error:
                call()
            assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RequestError, match="scores of ppo"):
        aggregates({"ppo": holed})
    for call in (iqm, iqm_interval):
        with pytest.raises(RequestError, match="not finite"):
            call(holed)
    for call in (probability_of_improvement, paired_comparison, unpaired_comparison, seeds_needed):
        with pytest.raises(RequestError, match="2 and 1 tasks"):
            call(good, good[:, :1])


def test_the_same_scores_give_the_same_numbers():
    x, y = rng_of(0).normal(size=(2, 12, 3))

    def everything(state):
        np.random.seed(state)  # noqa: NPY002 nothing may depend on it
        return (
            aggregates({"x": x, "y": y}, expanded=True),
            [part.tolist() for part in performance_profile(x, [0.0, 1.0])],
            all_pairs({"x": x, "y": y}),
            all_pairs({"x": x, "y": y}, paired=False),
        )

    assert everything(1) == everything(2)


# --- reference scores

ENTRIES = reference_scores.all_reference_scores()


@pytest.mark.parametrize("env", ENTRIES)
def test_reference_scores_are_whole(env):
    entry = ENTRIES[env]
    low, high = entry.random_interval
    assert low <= entry.random <= high < entry.reference and entry.random_episodes >= 256
    assert env in entry.random_source and entry.random_source.startswith("python -m pgjax.experiments.reference_scores ")
    assert len(entry.reference_source) > 20
    np.testing.assert_allclose(reference_scores.normalize([entry.random, entry.reference], env), [0, 1])
    assert reference_scores.normalize((entry.random + entry.reference) / 2, env) == pytest.approx(0.5)


def test_environments_with_a_preset_have_reference_scores():
    assert {entry.name for entry in list_envs()} >= set(ENTRIES)
    wanted = [env for env in presets.list_presets() if env.partition("/")[0] in ("gymnax", "brax", "mujoco")]
    assert len(wanted) > 30 and set(wanted) <= set(ENTRIES)


def test_the_file_is_what_the_command_writes():
    text = reference_scores.FILE.read_text()
    assert tomllib.loads(text).keys() == ENTRIES.keys(), "an entry has no reference"
    assert reference_scores.as_toml(tomllib.loads(text)) == text


def test_an_environment_without_reference_scores_is_refused():
    with pytest.raises(RequestError, match="gymnax/FourRooms-misc") as error:
        reference_scores.normalize(1.0, "gymnax/FourRooms-misc")
    assert "python -m pgjax.experiments.reference_scores gymnax/FourRooms-misc" in str(error.value)


@pytest.mark.parametrize("env", ["gymnax/CartPole-v1", "gymnax/Pendulum-v1"])
def test_the_random_policy_measured_again_earns_what_is_stored(env):
    entry, again = ENTRIES[env], reference_scores.measure(env, 512, seed=1)
    halves = [(high - low) / 2 for low, high in (entry.random_interval, again["random_interval"])]
    # Four standard errors of the difference; the intervals are 1.96 wide.
    assert abs(again["random"] - entry.random) < 4 / 1.96 * math.hypot(*halves)


class Roomy(Probe):
    """A probe whose bound on the episode length is above its time limit."""

    max_episode_steps = 12

    def step(self, key, env_state, action, params):
        return Probe(self.kind).step(key, env_state, action, params)


def test_random_returns_are_of_one_full_episode_each():
    assert (reference_scores.random_returns(Probe("endless"), 300, batch=128) == np.full(300, 5)).all()
    assert (reference_scores.random_returns(Roomy("endless"), 10, batch=4) == np.full(10, 5)).all()
    assert (reference_scores.random_returns(Probe("delayed"), 10, batch=4) == np.full(10, 1)).all()
    # Right and wrong equally often: 1 or -1.
    returns = reference_scores.random_returns(Probe("acting"), 1000)
    assert set(returns) == {-1, 1} and abs(returns.sum()) < 4 * math.sqrt(1000)
    # -(action - 1/2)^2 of an action uniform on [-1, 1]: -(1/3 + 1/4) in the mean.
    returns = reference_scores.random_returns(Probe("acting", continuous=True), 1000)
    assert returns.mean() == pytest.approx(-7 / 12, abs=4 * returns.std() / math.sqrt(1000))


# --- A/A


@pytest.fixture(scope="module")
def final_scores():
    """What PPO earns on a probe after a budget that leaves it half-way: 2048 seeds, and 512 at a larger learning rate."""
    setup = dict(num_envs=4, num_steps=8, num_minibatches=2, num_epochs=2, hidden_sizes=(4,))
    algorithm = pgjax.make("ppo", Probe("responding", continuous=True), **setup)
    train = pgjax.make_train(algorithm, 320)
    rates = jnp.repeat(jnp.array([0.02, 0.06]), np.array([2048, 512]))

    @jax.jit
    @jax.vmap
    def lanes(key, rate):
        return train(key, algorithm.hypers.replace(learning_rate=rate))[1]["episode_return"][-1]

    return np.split(np.asarray(lanes(jax.random.split(jax.random.key(0), 2560), rates), np.float64), [2048])


def test_of_all_ways_to_cut_a_pool_the_level_is_called_different():
    """What makes any A/A test come out: 924 ways to call six of twelve runs a method, 46 of them significant at 5 %."""
    pool = np.random.default_rng(1).normal(size=12) ** 3
    called = 0
    for members in itertools.combinations(range(12), 6):
        x, y = pool[list(members)], np.delete(pool, members)
        called += unpaired_comparison(x, y).p_value <= 0.05
    assert called == 2 * math.floor(0.025 * 924)


def test_ppo_is_rarely_called_different_from_itself(final_scores):
    """128 comparisons of 8 seeds against 8, no seed in two of them, so their number of false calls is binomial."""
    scores = final_scores[0]
    assert len(np.unique(scores)) > 2000, "of equal scores nothing could be called different"
    tests = [name for name in aa_test.VERDICTS if "comparison" in name]
    assert len(tests) == 3
    called = aa_test.share_different(scores, group=8, num_splits=1, verdicts=tests)
    for name in tests:
        count, comparisons = called[name]
        assert comparisons == 128 and at_least(128, 0.04) <= count <= at_most(128, 0.05), (name, count)
    count, comparisons = called["any of 6 pairs, p_adjusted <= 0.05 (Holm)"]
    assert comparisons == 64 and count <= at_most(64, 0.05)
    # Without the correction about one table in five has a false claim.
    assert called["any of 6 pairs, p <= 0.05, not corrected"][0] > at_most(64, 0.05)


def test_another_learning_rate_is_called_different(final_scores):
    slow, fast = (scores[:512].reshape(-1, 8) for scores in final_scores)
    for test in (paired_comparison, unpaired_comparison):
        found = np.mean([test(x, y).p_value <= 0.05 for x, y in zip(slow, fast, strict=True)])
        assert found > 0.5, (test, found)
