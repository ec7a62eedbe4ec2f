"""A/A test of the statistics: PPO against itself, which no test may call different more often than its level says.

    python -m pgjax.experiments.aa_test [--env gymnax/CartPole-v1] [--seeds 1024] [--total-env-steps 20000] [--groups 5 8 16]
    python -m pgjax.experiments.aa_test --coverage      how often bootstrap intervals hold the true value, no training

Trains PPO with the environment's preset on that many seeds, plays each final policy, and cuts the seeds into disjoint groups
that are compared two and two. The budget is short on purpose: of policies that all earn the maximum nothing can be told.
"""

import argparse
import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from scipy import stats

import pgjax
from pgjax.evaluation import evaluate
from pgjax.experiments import presets
from pgjax.experiments.statistics import (
    aggregates,
    all_pairs,
    paired_comparison,
    probability_of_improvement,
    unpaired_comparison,
)
from pgjax.training import lane_keys
from pgjax.types import Algorithm

LEVEL = 0.05
# Methods in a table whose every pair is compared.
_METHODS = 4
# Lanes that are trained together.
_BATCH = 128
# Interquartile mean of the exponential distribution with mean 1: 2 [v - v ln v] from 1/4 to 3/4.
EXPONENTIAL_IQM = 1 + 0.5 * math.log(0.25) - 1.5 * math.log(0.75)


def final_returns(algorithm: Algorithm, total_env_steps: int, num_seeds: int, num_episodes: int) -> np.ndarray:
    """Mean mode return of each seed's policy after ``total_env_steps``, [num_seeds]."""
    train = pgjax.make_train(algorithm, total_env_steps)

    def lane(seed):
        key_train, key_evaluate = lane_keys(jax.random.key(seed))
        state, _ = train(key_train, algorithm.hypers)
        return evaluate(algorithm, algorithm.policy(state), key_evaluate, num_episodes).mode_return.mean()

    lanes = jax.jit(jax.vmap(lane))
    batch = min(num_seeds, _BATCH)
    seeds = np.arange(-(-num_seeds // batch) * batch, dtype=np.uint32).reshape(-1, batch)
    return np.concatenate([lanes(part) for part in seeds])[:num_seeds].astype(np.float64)


def _disjoint(low_a: float, high_a: float, low_b: float, high_b: float) -> bool:
    return high_a < low_b or high_b < low_a


def _intervals_disjoint(x: np.ndarray, y: np.ndarray) -> bool:
    table = aggregates({"x": x, "y": y})
    return _disjoint(*table["x"]["iqm"][1:], *table["y"]["iqm"][1:])


def _chance_outside(x: np.ndarray, y: np.ndarray) -> bool:
    _, low, high = probability_of_improvement(x, y)
    return not low <= 0.5 <= high


def _excludes_zero(x: np.ndarray, y: np.ndarray) -> bool:
    _, low, high = unpaired_comparison(x, y, level=LEVEL).difference
    return not low <= 0 <= high


# What may be taken for "the two are different", of two groups of scores [S] each.
VERDICTS = {
    "unpaired_comparison, p <= 0.05": lambda x, y: unpaired_comparison(x, y, level=LEVEL).p_value <= LEVEL,
    "unpaired_comparison, interval without 0": _excludes_zero,
    "paired_comparison, p <= 0.05": lambda x, y: paired_comparison(x, y, level=LEVEL).p_value <= LEVEL,
    "Welch's t test, p <= 0.05 (SciPy)": lambda x, y: stats.ttest_ind(x, y, equal_var=False).pvalue <= LEVEL,
    "intervals of the IQM apart": _intervals_disjoint,
    "interval of the probability of improvement without 1/2": _chance_outside,
}


def any_pair(groups: np.ndarray, adjusted: bool) -> bool:
    """Whether any two of the methods ``groups`` [K, S] are called different, with p-values corrected or not."""
    pairs = all_pairs({str(k): scores for k, scores in enumerate(groups)}, paired=False, level=LEVEL)
    return any((pair.p_adjusted if adjusted else pair.comparison.p_value) <= LEVEL for pair in pairs)


def share_different(
    scores: np.ndarray, group: int, num_splits: int, seed: int = 0, verdicts: Sequence[str] = tuple(VERDICTS)
) -> dict[str, tuple[int, int]]:
    """How many comparisons of disjoint groups of ``group`` scores end in "different", by verdict: ``(called, comparisons)``.

    scores [N] are cut into groups ``num_splits`` times at random. Within one split the comparisons share no seed; those of
    different splits do, so their number overstates how precisely the share is known. That a split is drawn at random is what
    makes each of them a fair trial of a permutation test, whatever the scores.
    """
    rng = np.random.default_rng(seed)
    called = dict.fromkeys(verdicts, 0)
    family = {"any of 6 pairs, p <= 0.05, not corrected": 0, "any of 6 pairs, p_adjusted <= 0.05 (Holm)": 0}
    pairs = len(scores) // (2 * group)
    families = len(scores) // (_METHODS * group)
    for _ in range(num_splits):
        shuffled = rng.permutation(scores)
        for x, y in shuffled[: pairs * 2 * group].reshape(pairs, 2, group):
            for name in verdicts:
                called[name] += bool(VERDICTS[name](x, y))
        for groups in shuffled[: families * _METHODS * group].reshape(families, _METHODS, group):
            for name in family:
                family[name] += any_pair(groups, "Holm" in name)
    return {
        **{name: (count, pairs * num_splits) for name, count in called.items()},
        **{name: (count, families * num_splits) for name, count in family.items()},
    }


def coverage(num_seeds: int, num_tasks: int, expanded: bool, trials: int, num_resamples: int = 400) -> dict[str, int]:
    """In how many of ``trials`` draws of exponential scores [num_seeds, num_tasks] the 95 % interval holds the true value."""
    rng = np.random.default_rng(7)
    held = {"iqm": 0, "mean": 0}
    for _ in range(trials):
        scores = rng.exponential(size=(num_seeds, num_tasks))
        found = aggregates({"": scores}, num_resamples, expanded=expanded)[""]
        for name, true in (("iqm", EXPONENTIAL_IQM), ("mean", 1.0)):
            held[name] += found[name].low <= true <= found[name].high
    return held


def _say_coverage(trials: int = 1000) -> None:
    print("| seeds | tasks | IQM | IQM, expanded | mean | mean, expanded |\n|---|---|---|---|---|---|")
    for num_tasks in (1, 5):
        for num_seeds in (3, 5, 8, 16, 32):
            plain, expanded = (coverage(num_seeds, num_tasks, wide, trials) for wide in (False, True))
            shares = [f"{100 * held[name] / trials:.1f} %" for name in plain for held in (plain, expanded)]
            print(f"| {num_seeds} | {num_tasks} | " + " | ".join(shares) + " |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="gymnax/CartPole-v1")
    parser.add_argument("--seeds", type=int, default=1024)
    parser.add_argument("--total-env-steps", type=int, default=20_000)
    parser.add_argument("--episodes", type=int, default=16, help="that each final policy plays")
    parser.add_argument("--groups", type=int, nargs="+", default=[5, 8, 16], help="seeds of either side")
    parser.add_argument("--splits", type=int, default=10, help="random ways to cut the seeds into groups")
    parser.add_argument("--coverage", action="store_true", help="measure intervals on made-up scores instead")
    options = parser.parse_args(argv)
    if options.coverage:
        _say_coverage()
        return
    preset = presets.find("auto", "ppo", options.env)
    env = pgjax.make_env(options.env, **preset.get("env_options", {}))
    algorithm = pgjax.make("ppo", env, hypers=preset.get("hypers", {}), **preset.get("setup", {}))
    begin = time.perf_counter()
    returns = final_returns(algorithm, options.total_env_steps, options.seeds, options.episodes)
    print(
        f"PPO on {options.env}, preset {preset['name']}, {options.seeds} seeds of {options.total_env_steps:,} env steps, "
        f"{options.episodes} episodes each, {time.perf_counter() - begin:.0f} s"
    )
    print(
        "final returns: mean {:.1f}, std {:.1f}, quartiles {:.1f} {:.1f} {:.1f}".format(
            returns.mean(), returns.std(ddof=1), *np.percentile(returns, [25, 50, 75])
        )
    )
    for group in options.groups:
        print(f"\n{group} seeds against {group}, {options.splits} splits")
        for name, (count, comparisons) in share_different(returns, group, options.splits).items():
            print(f"  {name:<56} {100 * count / comparisons:5.1f} %  ({count} of {comparisons})")


if __name__ == "__main__":
    main()
