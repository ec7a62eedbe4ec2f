"""Learned rules on levels that no meta-training sees, beside A2C, an untrained rule and the optimum.

    python -m pgjax.experiments.rule_evaluation lpg:default runs/groove/learned.npz --levels small --num 256 --updates 60
    python -m pgjax.experiments.rule_evaluation runs/groove-{0,1,2}/learned.npz --against runs/uniform-{0,1,2}/learned.npz

On every level an agent lives by each rule for as many updates, and one learns by A2C with the same network, step sizes and
budget. A score is the agents' mean return over the mean of the largest expected returns; its interval is a bootstrap over
levels, and differences to A2C are paired by level. All see the same levels.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from pgjax.envs import grid_world
from pgjax.errors import RequestError
from pgjax.experiments.compare import markdown_table
from pgjax.experiments.meta_train import held_out, lpg
from pgjax.experiments.reproduce.verdicts import centre, difference_interval, mean_interval
from pgjax.host import lanes
from pgjax.learned import files as learned_files
from pgjax.learned.rule import init_rule

_RESAMPLES = 10_000
_LEVEL = 0.95
# Agents side by side; more need more memory.
_CHUNK = 64


@dataclasses.dataclass
class Args:
    """Compare learned rules on unseen levels."""

    rules: tuple[str, ...]
    """Names or files, such as lpg:default."""
    levels: str = "small"
    """Grid-World levels whose optimum is known: a name of pgjax list envs behind grid/, of random levels."""
    num: int = 256
    """Levels."""
    updates: int | None = None
    """Updates of every agent; the longest life of each rule's meta-training if not given."""
    against: tuple[str, ...] = ()
    """Rules of another kind. Both kinds then have one rule for each seed of their meta-training, and what is told is their
    mean scores over those and the difference."""
    seed: int = 0
    """Of the levels and the agents."""
    out: Path | None = None
    """Write the table to this file as well."""


def returns_of(
    rule: learned_files.Learned, levels: str, num: int, updates: int | None, seed: int = 0, *, others: bool = True
) -> dict[str, np.ndarray]:
    """Returns [L] on ``num`` levels by name: ``rule``, ``best``, and with ``others`` ``a2c`` and the untrained ``start``.

    Raises: RequestError if the levels' optimum is not known.
    """
    inner, params = lpg.inner_of_rule(rule, levels)
    spec = inner.algorithm.core.spec
    if not inner.family.tabular:
        raise RequestError(f"levels = {levels!r}: their optimum is not known; choose tabular ones, such as small")
    if not inner.family.drawn:
        raise RequestError(f"levels = {levels!r} is a single one, with nothing to average over; choose others, such as small")
    if updates is None and "lifetime" not in rule.convention:
        raise RequestError("the rule does not say how long agents lived in its meta-training; give --updates")
    updates = updates or int(rule.convention["lifetime"][1])

    def part(rule, start, levels, key):
        lives = jnp.full(len(levels.size), float(updates))
        if not others:
            best = jax.vmap(lambda level: grid_world.optimal_return(inner.family, level))(levels)
            return {"rule": held_out.by_rule(inner, rule, levels, lives, key), "best": best}
        start = held_out.by_rule(inner, start, levels, lives, key)
        return {"start": start, **held_out.compare(inner, rule, levels, lives, key)._asdict()}

    run = jax.jit(part)
    params, start = jax.tree.map(jnp.asarray, params), init_rule(spec, jax.random.key(seed))
    found = held_out.sample(inner.family, num, seed)
    keys = jax.random.split(jax.random.key(seed), -(-num // _CHUNK))
    parts = [
        run(params, start, jax.tree.map(lambda x: x[i * _CHUNK : (i + 1) * _CHUNK], found), key)  # noqa: B023
        for i, key in enumerate(keys)
    ]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def score(returns: np.ndarray, best: np.ndarray, other: np.ndarray | None = None) -> tuple[float, float, float]:
    """Mean return over mean best return [L], less that of ``other``, and the ends of its bootstrap interval over levels."""
    gain = returns if other is None else returns - other
    picks = np.random.default_rng(0).integers(len(best), size=(_RESAMPLES, len(best)))
    resampled = gain[picks].mean(1) / best[picks].mean(1)
    low, high = np.quantile(resampled, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(gain.mean() / best.mean()), float(low), float(high)


def table(rules: tuple[str, ...], levels: str, num: int, updates: int | None, seed: int = 0) -> str:
    """Scores of all rules, as Markdown."""
    rows, seen = [], set()
    for name in rules:
        rule = learned_files.load(name, "lpg")
        returns = returns_of(rule, levels, num, updates, seed)
        best = returns["best"]
        setting = (updates or rule.convention["lifetime"][1], rule.convention.get("num_envs"))
        rows += [_row(name, returns["rule"], best, returns["a2c"]), _row(f"{name}, untrained", returns["start"], best, None)]
        # A2C's score depends on the budget, not on the rule.
        if setting not in seen:
            rows.append(_row("A2C" if len(rules) == 1 else f"A2C, {setting[0]} updates", returns["a2c"], best, None))
        seen.add(setting)
    return markdown_table(("rule", "score", "less A2C"), rows)


def kinds_table(
    rules: tuple[str, ...], against: tuple[str, ...], levels: str, num: int, updates: int | None, seed: int = 0
) -> str:
    """Mean scores of two kinds of rules over meta-seeds, with 95 % intervals over those (Student's, Welch's), as Markdown."""
    scores = []
    for names in (rules, against):
        found = [returns_of(learned_files.load(name, "lpg"), levels, num, updates, seed, others=False) for name in names]
        scores.append(np.array([held_out.normalized_score(returns["rule"], returns["best"]) for returns in found]))
    rows = [
        (label, ", ".join(f"{x:.3f}" for x in kind), "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(kind)))
        for label, kind in zip(("rules", "against"), scores, strict=True)
    ]
    (mean, *spread), (other, *other_spread) = (centre(kind) for kind in scores)
    told = difference_interval(mean - other, *spread, *other_spread)
    rows.append(("difference", "", "{:+.3f} [{:+.3f}, {:+.3f}]".format(*told)))
    return markdown_table(("kind", "scores", "mean"), rows)


def _row(name: str, returns: np.ndarray, best: np.ndarray, a2c: np.ndarray | None) -> tuple[str, str, str]:
    ahead = "" if a2c is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*score(returns, best, a2c))
    return name, "{:.3f} [{:.3f}, {:.3f}]".format(*score(returns, best)), ahead


def main() -> int:
    """The command."""
    args = tyro.cli(Args, config=(tyro.conf.PositionalRequiredArgs,))
    lanes.use_compilation_cache()
    try:
        if args.num < 2:
            raise RequestError(f"--num {args.num} must be at least 2")
        if args.updates is not None and args.updates < 1:
            raise RequestError(f"--updates {args.updates} must be at least 1")
        if args.against and min(len(args.rules), len(args.against)) < 2:
            raise RequestError("--against needs two rules or more of either kind; an interval over one is not to be had")
        settings = args.levels, args.num, args.updates, args.seed
        text = kinds_table(args.rules, args.against, *settings) if args.against else table(args.rules, *settings)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
