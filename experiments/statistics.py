"""Numbers with intervals: plain functions on arrays of one value per seed, or per seed and task.

Scores are arrays [S, T], a row a seed and a column a task, or [S] where there is one task. Every cell must be there and
finite. What each statistic is for, and how far it can be trusted with few seeds: ``docs/statistics.md``.

All resampling starts from a fixed seed: the same scores give the same numbers. The aggregates are rliable's (Agarwal et al.
2021, arXiv 2108.13264), computed here because rliable 1.2.0 draws from NumPy's global generator whatever ``random_state`` it
is given; the tests compare the two.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from pgjax.errors import RequestError

# Bootstrap resamples, and regroupings of the randomisation tests where there are too many to do them all.
RESAMPLES, REGROUPINGS = 2000, 9999
# Up to so many regroupings the randomisation tests do all of them, and are exact.
MOST_EXACT = 2**16
# Numbers in memory at once while resampling.
_CHUNK = 2_000_000
# More seeds than anybody runs: ``seeds_needed`` gives up here.
_MOST_SEEDS = 10_000_000


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """What a test says of two methods.

    difference: mean over tasks of the difference of means, first minus second, in score units; its interval holds exactly
    the shifts that the test does not reject, so it excludes 0 when ``p_value <= level``. Infinite ends mean that there are
    too few seeds for the level.
    p_value: two-sided.  num_pairs: pairs of runs behind it; None where the runs are not paired.
    """

    difference: Interval
    p_value: float
    num_pairs: int | None


class Pair(NamedTuple):
    """One of the comparisons of ``all_pairs``.

    probability: that a run of ``first`` beats one of ``second``.  p_adjusted: Holm's, over all pairs.
    """

    first: str
    second: str
    comparison: Comparison
    probability: Interval
    p_adjusted: float


# --- aggregates


def iqm(values: np.ndarray, axis: int | None = 0) -> np.ndarray:
    """Interquartile mean along ``axis``: the mean of the middle half (Agarwal et al. 2021, arXiv 2108.13264).

    A quarter of the values, rounded down, is cut off at either end: with fewer than four it is the mean.
    ``axis=None`` is over everything, which for scores [S, T] is rliable's IQM.
    Raises: RequestError for a value that is not finite, which would be cut off as if it were the best.
    """
    values = _finite(values, "values")
    if axis is None:
        values, axis = values.ravel(), 0
    return stats.trim_mean(values, 0.25, axis=axis)


def iqm_interval(
    values: np.ndarray, num_resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile-bootstrap interval of the interquartile mean over seeds.

    Args: values [S] or [S, ...], seeds in front; every further entry is resampled by the same seeds.
    Returns: ``(low, high)``, scalars or [...]; with one seed both are its value, for there is no spread to resample.
    Raises: RequestError for a value that is not finite.
    """
    values = _finite(values, "values")
    picks = np.random.default_rng(seed).integers(len(values), size=(num_resamples, len(values)))
    resampled = stats.trim_mean(values[picks], 0.25, axis=1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail], axis=0)
    return low, high


# Each maps scores [..., S, T] to [...].
AGGREGATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "iqm": lambda x: stats.trim_mean(x.reshape(*x.shape[:-2], -1), 0.25, axis=-1),
    "mean": lambda x: x.mean((-2, -1)),
    "median": lambda x: np.median(x.mean(-2), axis=-1),
    "optimality_gap": lambda x: 1 - np.minimum(x, 1).mean((-2, -1)),
}


def aggregates(
    scores: Mapping[str, np.ndarray],
    num_resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    level: float = 0.95,
    expanded: bool = False,
) -> dict[str, dict[str, Interval]]:
    """IQM, mean, median and optimality gap of every method, with stratified percentile-bootstrap intervals.

    iqm: mean of the middle half of all S T scores.  mean: of all.  median: over tasks, of the mean over seeds.
    optimality_gap: 1 - mean of min(score, 1), how far short of score 1 the method falls; for normalised scores.
    Strata are tasks: each task's seeds are resampled apart, so the tasks count as given and only seeds vary.

    Args:
      scores: method -> [S, T] or [S]; methods may differ in their numbers of seeds.
      expanded: widen for few seeds. The plain percentile interval, rliable's, covers less than ``level`` then, as the
        bootstrap's variance is (S - 1) / S of the right one and its quantiles are the normal's. Here the percentiles are
        those of ``sqrt(S / (S - 1)) t`` with T (S - 1) degrees of freedom (Hesterberg's expanded percentile interval, arXiv
        1411.5279).
    Returns: method -> statistic -> Interval; with one seed the interval is its value, for there is no spread to resample.
    Raises: RequestError for scores with a cell that is missing or not finite.
    """
    table = {}
    for name, values in scores.items():
        values = _matrix(values, f"scores of {name}")
        tail = _tail(values.shape, level, expanded)
        # The same stream for every method: its numbers do not depend on who else is in the table.
        rng = np.random.default_rng(seed)
        draws = [
            [function(resampled) for function in AGGREGATES.values()] for resampled in _resamples(values, num_resamples, rng)
        ]
        table[name] = {
            statistic: _interval(function(values), np.concatenate(column), tail)
            for (statistic, function), column in zip(AGGREGATES.items(), zip(*draws, strict=True), strict=True)
        }
    return table


def performance_profile(
    scores: np.ndarray, thresholds: Sequence[float] | np.ndarray, num_resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of runs, over seeds and tasks, whose score is above each threshold (rliable's score distribution).

    Args: scores [S, T] or [S].  thresholds [K].
    Returns: ``profile, low, high``, [K] each; low and high are the pointwise 95 % stratified percentile-bootstrap interval,
    equal to the profile with one seed.
    Raises: RequestError for scores with a cell that is missing or not finite.
    """
    scores = _matrix(scores, "scores")
    above = scores[..., None] > _finite(thresholds, "thresholds")
    weights = _weights(np.random.default_rng(seed), scores.shape, num_resamples)
    resampled = np.einsum("rst,stk->rk", weights, above) / scores.size
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return above.mean((0, 1)), low, high


def probability_of_improvement(
    x: np.ndarray, y: np.ndarray, num_resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Interval:
    """Probability that a run of the first method beats a run of the second one on the same task, averaged over tasks.

        mean over tasks t of  1 / (m n) sum over i, j of  [x[i, t] > y[j, t]] + [x[i, t] = y[j, t]] / 2

    which is Mann and Whitney's U over m n. The interval is the stratified percentile bootstrap, both methods' seeds resampled
    apart. It is narrow with few seeds, and of no width when one method beats the other in every run: whether methods differ
    is for ``paired_comparison`` or ``unpaired_comparison`` to say.

    Args: x [m, T] or [m], y [n, T] or [n], the same tasks.
    Raises: RequestError for scores with a cell that is missing or not finite, or different numbers of tasks.
    """
    x, y = _two(x, y)
    wins = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    rng = np.random.default_rng(seed)
    weights_x = _weights(rng, x.shape, num_resamples)
    weights_y = _weights(rng, y.shape, num_resamples)
    resampled = np.einsum("rit,ijt,rjt->r", weights_x, wins, weights_y, optimize=True) / (x.size * len(y))
    return _interval(wins.mean(), resampled, (1 - level) / 2)


# --- tests of a difference


def paired_comparison(x: np.ndarray, y: np.ndarray, *, level: float = 0.05, seed: int = 0) -> Comparison:
    """Sign-flip test of the mean difference between two methods that ran on the same seeds.

    If the methods are alike, each difference ``d = x[s, t] - y[s, t]`` could as well have had the other sign. The p-value is
    twice the share of sign patterns, the observed one among them, whose mean difference is at least as far out on the
    observed side: all of them up to 16 pairs, 9999 random ones above. Assumes that differences are independent across seeds
    and tasks and, for the interval, symmetric about the true one. The interval holds the shifts that are not rejected; its
    ends are order statistics of the means of subsets of d (Hartigan 1969, "Using subsample values as typical values").

    With fewer than 6 pairs nothing can be significant at 5 %: the smallest p-value is ``2 / 2^pairs``.
    Args: x, y [S, T] or [S]: the same seed in the same row.  level: 1 - confidence of the interval.
    Raises: RequestError for scores with a cell that is missing or not finite, or of different shapes.
    """
    x, y = _two(x, y)
    if x.shape != y.shape:
        raise RequestError(
            f"scores of {len(x)} and {len(y)} seeds cannot be paired; give the same seeds of both, or compare them unpaired"
        )
    difference = (x - y).ravel()
    subsets, counts = _subsets(difference.size, seed)
    tolerance = 1e-12 * np.abs(difference).sum()
    interval, p_value = _randomisation(subsets @ difference, counts, difference.mean(), tolerance, level)
    return Comparison(interval, p_value, difference.size)


def unpaired_comparison(x: np.ndarray, y: np.ndarray, *, level: float = 0.05, seed: int = 0) -> Comparison:
    """Permutation test of the difference of means between two methods whose runs have nothing in common.

    If the methods are alike, any regrouping of a task's m + n runs into m and n was as likely. The p-value is twice the
    share of regroupings, within each task, the observed one among them, whose difference is at least as far out on the
    observed side: all of them where there are at most 65 536 (8 against 8 on one task: 12 870), 9999 random ones above.
    The interval holds the shifts that are not rejected, if the methods differ by a shift: its ends are order statistics of
    the differences between equally many runs of either method.

    The smallest p-value of n against n seeds on one task is ``2 / binomial(2 n, n)``: 0.1 for 3, 0.029 for 4. Methods that
    differ in spread but not in mean are called different more often than ``level`` if their numbers of seeds differ.
    Args: x [m, T] or [m], y [n, T] or [n], the same tasks.  level: 1 - confidence of the interval.
    Raises: RequestError for scores with a cell that is missing or not finite, or different numbers of tasks.
    """
    x, y = _two(x, y)
    groups, counts = _groups(len(x), len(y), x.shape[1], seed)
    pooled = np.concatenate([x, y])
    # Runs of x that leave for the other group less the runs of y that take their place.
    sums = x.sum() - groups @ pooled.ravel()
    tolerance = 1e-12 * np.abs(pooled).sum()
    interval, p_value = _randomisation(sums, counts, x.mean() - y.mean(), tolerance, level)
    return Comparison(interval, p_value, None)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values adjusted for their number (Holm 1979): the chance of any false rejection stays below the level.

    The k-th smallest of K, from 1, is multiplied by K - k + 1, and is not smaller than the one before it.
    Args: p_values [K].  Returns: [K], in the same order, at most 1.
    Raises: RequestError for a value outside [0, 1].
    """
    p_values = _finite(p_values, "p_values")
    if p_values.ndim != 1 or ((p_values < 0) | (p_values > 1)).any():
        raise RequestError("p_values must be a flat list of numbers between 0 and 1")
    order = np.argsort(p_values)
    adjusted = np.empty_like(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * factors))
    return adjusted


def all_pairs(scores: Mapping[str, np.ndarray], paired: bool = True, *, level: float = 0.05, seed: int = 0) -> list[Pair]:
    """Every two methods compared, p-values corrected for the number of pairs.

    The methods differ, with at most ``level`` chance of any false claim in the whole list, where ``p_adjusted <= level``.
    The intervals are each pair's own, not corrected.

    Args: scores: method -> [S, T] or [S].  paired: the methods ran on the same seeds, in the same rows.
    Returns: a Pair for every two, in the order of ``scores``.
    Raises: RequestError as ``paired_comparison`` or ``unpaired_comparison``.
    """
    test = paired_comparison if paired else unpaired_comparison
    matrices = {name: _matrix(values, f"scores of {name}") for name, values in scores.items()}
    names = list(itertools.combinations(matrices, 2))
    compared = []
    for first, second in names:
        try:
            compared.append(test(matrices[first], matrices[second], level=level, seed=seed))
        except RequestError as error:
            raise RequestError(f"{first} and {second}: {error}") from None
    adjusted = holm([comparison.p_value for comparison in compared])
    return [
        Pair(a, b, comparison, probability_of_improvement(matrices[a], matrices[b], seed=seed), float(p))
        for (a, b), comparison, p in zip(names, compared, adjusted, strict=True)
    ]


def seeds_needed(x: np.ndarray, y: np.ndarray, power: float = 0.8, level: float = 0.05, *, paired: bool = False) -> int | None:
    """Seeds per method and task with which the difference seen here would be found with probability ``power``.

    The smallest n for which a two-sided t test (Welch's; paired: of the differences) reaches the power, from the noncentral t
    distribution with noncentrality ``delta sqrt(n / V)``. delta is the observed difference, V the sum of the observed
    variances of either method and every task, over T^2; the degrees of freedom are Welch and Satterthwaite's. For large n
    that is the textbook's ``(z[1 - level/2] + z[power])^2 V / delta^2``. No fewer than the randomisation tests need to reach
    the level at all.

    Assumes runs about normally distributed and the observed difference and spread to be the true ones. Both are guesses
    from the seeds at hand: of a true difference of 0 a finite number comes out too.
    Args: x [m, T] or [m], y [n, T] or [n], at least 2 seeds each.
    Returns: the number; None if the means are equal or it is above ten million.
    Raises: RequestError for scores with a cell that is missing or not finite, a single seed, a power or level outside (0, 1).
    """
    x, y = _two(x, y)
    if min(len(x), len(y)) < 2:
        raise RequestError("seeds_needed: one seed has no spread to go by; give at least 2 of either method")
    if not (0 < level < 1 and level < power < 1):
        raise RequestError(f"power = {power}, level = {level}: need 0 < level < power < 1")
    if paired and x.shape != y.shape:
        raise RequestError(f"scores of {len(x)} and {len(y)} seeds cannot be paired; give the same seeds of both")
    num_tasks = x.shape[1]
    delta = abs(x.mean() - y.mean())
    if delta <= 1e-12 * (np.abs(x).mean() + np.abs(y).mean()):
        return None
    groups = [x - y] if paired else [x, y]
    variances = np.concatenate([group.var(0, ddof=1) for group in groups]) / num_tasks**2
    total = variances.sum()
    if paired:
        fewest = next(n for n in itertools.count(1) if 2 / 2 ** (n * num_tasks) <= level)
    else:
        fewest = next(n for n in itertools.count(1) if 2 / math.comb(2 * n, n) ** num_tasks <= level)
    fewest = max(2, fewest)
    if total <= 1e-24 * delta**2:
        return fewest

    def reaches(n: int) -> bool:
        df = (n - 1) * total**2 / (variances**2).sum()
        noncentrality = delta * math.sqrt(n / total)
        critical = stats.t.ppf(1 - level / 2, df)
        reached = stats.nct.sf(critical, df, noncentrality) + stats.nct.cdf(-critical, df, noncentrality)
        # Far out, and with many degrees of freedom, SciPy's noncentral t is NaN; there it is the normal.
        if not np.isfinite(reached):
            reached = stats.norm.sf(critical - noncentrality)
        return bool(reached >= power)

    if reaches(fewest):
        return fewest
    too_few, enough = fewest, 2 * fewest
    while not reaches(enough):
        too_few, enough = enough, 2 * enough
        if enough > _MOST_SEEDS:
            return None
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        too_few, enough = (too_few, middle) if reaches(middle) else (middle, enough)
    return enough


# --- what they are made of


def _finite(values, what: str) -> np.ndarray:
    try:
        values = np.asarray(values, np.float64)
    except ValueError:
        raise RequestError(f"{what} are not an array; each task needs the same number of seeds") from None
    if not np.isfinite(values).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        where = f"seed row {index[0]}" + (f", task column {index[1]}" if len(index) == 2 else "")
        raise RequestError(f"{what}: {values[index]} in {where} is not finite; leave that seed or that task out")
    return values


def _matrix(scores, what: str) -> np.ndarray:
    """Scores as float64 [S, T]."""
    scores = _finite(scores, what)
    if scores.ndim == 1:
        scores = scores[:, None]
    if scores.ndim != 2 or not scores.size:
        raise RequestError(f"{what} have shape {list(scores.shape)}; give [seeds, tasks], or [seeds] for one task")
    return scores


def _two(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = _matrix(x, "scores of the first method"), _matrix(y, "scores of the second method")
    if x.shape[1] != y.shape[1]:
        raise RequestError(f"scores of {x.shape[1]} and {y.shape[1]} tasks cannot be compared; give the same tasks of both")
    return x, y


def _resamples(scores: np.ndarray, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Stratified bootstrap samples of scores [S, T], some [R, S, T] at a time."""
    chunk = max(1, _CHUNK // scores.size)
    for start in range(0, num_resamples, chunk):
        count = min(chunk, num_resamples - start)
        picks = rng.integers(len(scores), size=(count, *scores.shape))
        yield np.take_along_axis(scores[None], picks, axis=1)


def _weights(rng: np.random.Generator, shape: tuple[int, int], num_resamples: int) -> np.ndarray:
    """How often a stratified bootstrap picks each seed of each task, [R, S, T]."""
    num_seeds, num_tasks = shape
    counts = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=(num_resamples, num_tasks))
    return counts.swapaxes(1, 2).astype(np.float64)


def _tail(shape: tuple[int, int], level: float, expanded: bool) -> float:
    """Probability to cut off at either end of the bootstrap distribution."""
    num_seeds, num_tasks = shape
    if not expanded or num_seeds == 1:
        return (1 - level) / 2
    quantile = stats.t.ppf((1 - level) / 2, num_tasks * (num_seeds - 1))
    return float(stats.norm.cdf(math.sqrt(num_seeds / (num_seeds - 1)) * quantile))


def _interval(value, resampled: np.ndarray, tail: float) -> Interval:
    low, high = np.percentile(resampled, [100 * tail, 100 - 100 * tail])
    return Interval(float(value), float(low), float(high))


def _randomisation(
    sums: np.ndarray, counts: np.ndarray, value: float, tolerance: float, level: float
) -> tuple[Interval, float]:
    """Interval and two-sided p-value of a randomisation test of a mean difference.

    Every regrouping other than the observed one takes ``sums`` off what the observed one has, or, if the true difference
    is delta, ``sums - delta counts``. So it is at least as far up as the observed one where ``sums / counts <= delta``, and
    delta is rejected from below if that holds for few of them: the ends of the interval are order statistics of the ratio.
    The observed regrouping counts too (Phipson and Smyth 2010), which keeps the level with random regroupings.
    """
    total = 1 + len(sums)
    far_out = 1 + min(np.count_nonzero(sums <= tolerance), np.count_nonzero(sums >= -tolerance))
    rank = math.floor(level / 2 * total + 1e-9)
    low, high = -math.inf, math.inf
    if rank:
        ratios = np.sort(sums / counts)
        low, high = ratios[rank - 1], ratios[-rank]
    return Interval(float(value), float(low), float(high)), float(min(1, 2 * far_out / total))


# Many comparisons have the same shape, and the regroupings take longer to make than to use.
@functools.lru_cache(maxsize=8)
def _subsets(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Non-empty subsets of n things, [G, n] of 0 and 1, and their sizes [G]: all, or random ones if they are too many."""
    if 2**n <= MOST_EXACT:
        subsets = np.arange(1, 2**n)[:, None] >> np.arange(n) & 1
    else:
        subsets = np.random.default_rng(seed).integers(2, size=(REGROUPINGS, n))
        subsets = subsets[subsets.any(1)]
    return subsets.astype(np.float64), subsets.sum(1)


@functools.lru_cache(maxsize=8)
def _groups(m: int, n: int, num_tasks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices of m of m + n runs within each task, other than the first m everywhere, and how many of the first m are left out.

    Returns: [G, (m + n) T] of 0 and 1, and [G]: all of them, or random ones if they are too many.
    """
    if math.comb(m + n, m) ** num_tasks <= MOST_EXACT:
        chosen = np.zeros((math.comb(m + n, m), m + n))
        for row, members in zip(chosen, itertools.combinations(range(m + n), m), strict=True):
            row[list(members)] = 1
        which = np.indices((len(chosen),) * num_tasks).reshape(num_tasks, -1)
        groups = np.stack([chosen[row] for row in which], axis=-1)
    else:
        members = np.broadcast_to((np.arange(m + n) < m)[None, :, None], (REGROUPINGS, m + n, num_tasks))
        groups = np.random.default_rng(seed).permuted(members.astype(np.float64), axis=1)
    counts = m * num_tasks - groups[:, :m].sum((1, 2))
    others = counts > 0
    return groups[others].reshape(others.sum(), -1), counts[others]
