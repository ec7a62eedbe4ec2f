"""Evolution of LPG's rule over whole lives: partners raise an agent each on the same level, and only who earned more counts.

Source: Jackson et al. 2024, arXiv 2402.05828 (TA-LPG), in the form of its authors' code, EmptyJackson/groove.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

from pgjax.experiments.meta_train import MetaTrainer
from pgjax.experiments.meta_train import levels as levels_
from pgjax.experiments.meta_train.agents import Inner, earns, raised
from pgjax.host import lanes
from pgjax.learned import evolution
from pgjax.learned.rule import init_rule
from pgjax.types import PyTree


class EvolutionState(struct.PyTreeNode):
    """es: of the evolution strategy."""

    key: jax.Array
    es: PyTree


def make(
    inner: Inner,
    sample: levels_.Sampler,
    *,
    num: int,
    parts: int,
    lr: float,
    lr_decay: float,
    sigma: float,
    start: Literal["drawn", "zero"],
    mean_life: float,
    devices: Sequence[lanes.Device],
    convention: dict[str, Any],
) -> MetaTrainer:
    """The meta-trainer of ``num`` pairs, ``parts`` of them one after the other.

    Args: sample: levels and lifetimes of pairs.  mean_life: in updates, of those.  devices: that the pairs are split over,
      evenly.  For the others see ``Args`` in ``lpg.py``.
    """
    spec = inner.algorithm.core.spec
    template = init_rule(spec, jax.random.key(0))
    schedule = dict(sigma_decay=1.0, sigma_min=sigma, learning_rate_decay=lr_decay, learning_rate_min=min(lr, 1e-5))
    es = evolution.open_es(template, 2 * num, sigma, lr, shaping="pair_ranks", **schedule)

    def init(key):
        key, key_rule, key_es = jax.random.split(key, 3)
        rule = init_rule(spec, key_rule)
        # authors' code: at zero, where the rule says nothing / here: where gradients start too, or at zero.
        return EvolutionState(key, es.init(key_es, jax.tree.map(jnp.zeros_like, rule) if start == "zero" else rule))

    def step(state):
        key, key_ask, key_tasks, key_runs, key_tell = jax.random.split(state.key, 5)
        population, asked = es.ask(state.es, key_ask)
        level, lifetime = tasks(key_tasks)
        fitness = fitness_of(inner, population, level, lifetime, key_runs, parts, devices)
        told = es.tell(asked, population, fitness, key_tell)
        pairs = fitness.reshape(num, 2)
        metrics = {
            "fitness_mean": jnp.nan_to_num(fitness).mean(),
            "fitness_best": jnp.nan_to_num(pairs.max(1)).mean(),
            # Where neither won, nothing is learned.
            "ties": evolution.ties(fitness).mean(),
            "failed": (~jnp.isfinite(fitness)).mean(),
            "sigma": es.sigma(told),
            "rule_norm": optax.tree.norm(es.mean(told)),
        }
        return EvolutionState(key, told), {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    def tasks(key):
        """Levels [A] and lives, the short ones first, so that those of a part end together."""
        level, lifetime = jax.vmap(sample)(jax.random.split(key, num))
        order = jnp.argsort(lifetime)
        return jax.tree.map(lambda x: x[order], (level, lifetime))

    return MetaTrainer(
        init=init,
        step=step,
        learned=lambda state: es.mean(state.es),
        kind="lpg",
        convention=convention,
        devices=tuple(devices),
        env_steps_per_step=round(2 * num * mean_life * inner.algorithm.env_steps_per_iteration),
    )


def fitness_of(
    inner: Inner,
    population: PyTree,
    level: PyTree,
    lifetime: jax.Array,
    key: jax.Array,
    parts: int,
    devices: Sequence[lanes.Device],
) -> jax.Array:
    """What agents earn at the end of their lives, [2 A]; both of a pair are born alike, on the same level.

    Args: population: rules [2 A], partners side by side.  level, lifetime: [A].  parts: of A, one after the other; each of the
      ``devices`` has an equal share of every part.
    """
    num = len(lifetime)

    def member(rule, level, lifetime, key, number, longest):
        # Partners begin as the same agent in the same place, and meet their own luck from then on.
        key_birth, key_own = jax.random.split(key)
        key_life, key_play = jax.random.split(jax.random.fold_in(key_own, number))
        state = raised(inner, rule, level, lifetime, key_birth, key_life, longest)
        return jnp.where(state.nonfinite, jnp.nan, earns(inner, state.learner, level, key_play))

    def part(x):
        rules, level, lifetime, keys = x
        longest = lifetime.max()
        both = jax.vmap(member, (0, None, None, None, 0, None))
        return jax.vmap(lambda a, b, c, d: both(a, b, c, d, jnp.arange(2), longest))(rules, level, lifetime, keys)

    keys = jax.random.split(key, num)
    xs = (jax.tree.map(lambda x: x.reshape(num, 2, *x.shape[1:]), population), level, lifetime, keys)
    xs = jax.tree.map(lambda x: x.reshape(parts, num // parts, *x.shape[1:]), xs)
    some = PartitionSpec(None, "lanes")
    earned = lanes.over_devices(lambda xs: jax.lax.map(part, xs), devices, (some,), some)
    return earned(xs).reshape(2 * num)
