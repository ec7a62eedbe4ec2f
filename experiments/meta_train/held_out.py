"""How good a rule is on levels that its meta-training did not see, beside A2C and the optimum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.envs import grid_world
from pgjax.experiments.meta_train.agents import Inner, a2c_earns, earns, raised
from pgjax.types import PyTree

# A stream of levels of its own.
_HELD_OUT = 0x68656C64


class Comparison(NamedTuple):
    """Returns [L] on L levels: of agents at the end of their lives by the rule, of A2C after as many updates, and the best.

    best: None where it is not known.
    """

    rule: jax.Array
    a2c: jax.Array
    best: jax.Array | None


def compare(inner: Inner, rule: PyTree, levels: PyTree, lifetime: jax.Array, key: jax.Array) -> Comparison:
    """Raises an agent by the rule, and one by A2C with the same network, step sizes and budget, on each of ``levels`` [L]."""

    def a2c(level, lifetime, key):
        return a2c_earns(inner, level, lifetime, jax.random.split(key, 4)[3])

    theirs = jax.vmap(a2c)(levels, lifetime, jax.random.split(key, len(lifetime)))
    family = inner.family
    best = jax.vmap(lambda level: grid_world.optimal_return(family, level))(levels) if family.tabular else None
    return Comparison(by_rule(inner, rule, levels, lifetime, key), theirs, best)


def by_rule(inner: Inner, rule: PyTree, levels: PyTree, lifetime: jax.Array, key: jax.Array) -> jax.Array:
    """Returns [L] at the end of a life by the rule on each of ``levels`` [L]; as in ``compare`` with the same key."""

    def on(level, lifetime, key):
        key_birth, key_life, key_play, _ = jax.random.split(key, 4)
        learner = raised(inner, rule, level, lifetime, key_birth, key_life).learner
        return earns(inner, learner, level, key_play)

    return jax.vmap(on)(levels, lifetime, jax.random.split(key, len(lifetime)))


def sample(family: grid_world.Family, num: int, seed: int = 0) -> PyTree:
    """Levels [L] of a stream that meta-training does not draw from; of a family of one level, that one."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), _HELD_OUT), num)
    return jax.vmap(family.sample)(keys)


def normalized_score(returns: np.ndarray, best: np.ndarray) -> float:
    """Mean return over levels, over the mean best return: 1 is optimal. A ratio of means, since the best may be near zero."""
    return float(np.mean(returns) / np.mean(best))


def report(inner: Inner, rule: PyTree, num: int, lifetime: float) -> dict[str, Any]:
    """The comparison on ``num`` levels after ``lifetime`` updates, as JSON values for the provenance."""
    found, lives = sample(inner.family, num), jnp.full(num, float(lifetime))
    compared = jax.jit(lambda rule, levels: compare(inner, rule, levels, lives, jax.random.key(0)))(rule, found)
    values = {name: np.asarray(x, np.float64) for name, x in compared._asdict().items() if x is not None}
    told: dict[str, Any] = {f"return_{name}": x.tolist() for name, x in values.items()}
    for name in ("rule", "a2c") if "best" in values else ():
        told[f"normalized_{name}"] = normalized_score(values[name], values["best"])
    return told
