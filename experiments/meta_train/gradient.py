"""LPG's meta-gradients: agents of all ages make K updates each, and the rule is moved along what would have made them better.

Agents whose lives end give way to newborn ones, on fresh levels or, as in GROOVE, on levels that teach most.

Source: Oh et al. 2020, arXiv 2007.08794; Jackson et al. 2023, arXiv 2310.02782 (GROOVE).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

from pgjax import on_policy
from pgjax.envs import grid_world
from pgjax.experiments.meta_train import MetaTrainer
from pgjax.experiments.meta_train import levels as levels_
from pgjax.experiments.meta_train.agents import Agent, Inner, Lived, a2c_earns, earns, live, new_agent, updates_of
from pgjax.host import lanes
from pgjax.learned.rule import init_rule
from pgjax.types import PyTree


class GradientState(struct.PyTreeNode):
    """rule, opt_state: parameters and Adam's state.  agents: [A].  buffer, slots [A]: of the curriculum, None without one.

    count: int32, meta-updates done.  refused: bool, whether one was ever refused because its gradient was not finite.
    """

    key: jax.Array
    rule: PyTree
    opt_state: PyTree
    agents: Agent
    buffer: Any
    slots: Any
    count: jax.Array
    refused: jax.Array


def make(
    inner: Inner,
    sample: levels_.Sampler,
    curriculum: levels_.Curriculum,
    *,
    num: int,
    parts: int,
    lr: float,
    max_grad_norm: float,
    devices: Sequence[lanes.Device],
    convention: dict[str, Any],
) -> MetaTrainer:
    """The meta-trainer of ``num`` agents side by side, ``parts`` of them one after the other.

    Args: sample: levels and lifetimes of agents.  lr: of Adam.  max_grad_norm: bound on the meta-gradient, 0 for none.
      devices: that the agents are split over, evenly.
    """
    spec = inner.algorithm.core.spec
    bound = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
    optimizer = optax.chain(bound, optax.adam(lr))
    keeps = curriculum.score != "random"
    scored = keeps and curriculum.score != "frozen"

    def born(key, level, lifetime):
        return jax.vmap(lambda *x: new_agent(inner, *x))(jax.random.split(key, num), level, lifetime)

    def init(key):
        key, key_rule, key_levels, key_agents, key_age = jax.random.split(key, 5)
        rule, buffer, slots = init_rule(spec, key_rule), None, None
        if keeps:
            buffer, slots = levels_.init_buffer(sample, key_levels, curriculum.buffer_size, num)
            level, lifetime = jax.tree.map(lambda x: x[slots], (buffer.level, buffer.lifetime))
        else:
            level, lifetime = jax.vmap(sample)(jax.random.split(key_levels, num))
        agents = born(key_agents, level, lifetime)
        # The first ones have part of their life behind them. authors' code: all are born at once, and with equal lives die at
        # once, so that a rule sees only young agents, then only old ones / here: all ages at all times.
        windows = jnp.floor(jax.random.uniform(key_age, (num,)) * jnp.ceil(lifetime / inner.window)).astype(jnp.int32)
        age = windows * inner.window * inner.algorithm.env_steps_per_iteration
        agents = agents.replace(state=agents.state.replace(env_steps=age))
        return GradientState(
            *(key, rule, optimizer.init(rule), agents, buffer, slots),
            count=jnp.zeros((), jnp.int32),
            refused=jnp.zeros((), bool),
        )

    def score_of(state, ended, lived: Lived, key):
        """[A], of the levels of agents that ended."""
        agents = state.agents
        level = agents.state.env_params
        keys = jax.random.split(key, (num, 2))
        if curriculum.score == "positive_value_loss":
            return lived.positive
        if curriculum.score == "l1_value_loss":
            return lived.absolute

        def regret(x):
            learner, level, lifetime, keys = x
            if curriculum.score == "optimal_regret":
                other = grid_world.optimal_return(inner.family, level)
            else:
                other = a2c_earns(inner, level, lifetime, keys[0])
            return other - earns(inner, learner, level, keys[1])

        # authors' code: for all agents at every meta-update / here: for those whose life has ended.
        chunk = min(num // parts, 8)
        return levels_.for_those(ended, regret, (agents.state.learner, level, agents.lifetime, keys), chunk)

    def succeed(state, ended, valid, lived, key):
        """Agents that ended give way to newborn ones on other levels. Returns the state and how many levels were replayed."""
        key_fresh, key_score, key_choice, key_agents = jax.random.split(key, 4)
        agents, buffer, slots, replayed = state.agents, state.buffer, state.slots, jnp.zeros(num, bool)
        if keeps:
            if scored:
                buffer = levels_.renew_lowest(buffer, sample, key_fresh, num)
                buffer = levels_.record(buffer, slots, ended, score_of(state, ended, lived, key_score), valid)
                buffer, choice = levels_.choose(buffer, key_choice, slots, ended, state.count, curriculum)
            else:
                buffer, choice = levels_.choose_any(buffer, key_choice, slots, ended)
            slots, replayed = choice
            level, lifetime = jax.tree.map(lambda x: x[slots], (buffer.level, buffer.lifetime))
        else:
            level, lifetime = jax.vmap(sample)(jax.random.split(key_fresh, num))
        fresh = born(key_agents, level, lifetime)
        agents = jax.tree.map(lambda new, old: _where(ended, new, old), fresh, agents)
        return state.replace(agents=agents, buffer=buffer, slots=slots), replayed.sum(dtype=jnp.float32)

    def step(state):
        key, key_live, key_succeed = jax.random.split(state.key, 3)
        late = updates_of(inner, state.agents) >= 0.5 * state.agents.lifetime
        gradient, agents, lived = meta_gradient(inner, state.rule, state.agents, key_live, parts, devices)
        direction, opt_state = optimizer.update(gradient, state.opt_state)
        moved = (optax.apply_updates(state.rule, direction), opt_state)
        # Refused once, not for ever: an agent that broke is replaced below, and took the gradient with it this time only.
        sound = on_policy.all_finite((moved, gradient))
        rule, opt_state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), moved, (state.rule, state.opt_state))
        broken = ~jax.vmap(on_policy.all_finite)((agents.state.learner, agents.critic))
        ended = (updates_of(inner, agents) >= agents.lifetime) | broken
        # No regret of an agent that broke, nor of one that began with an age: it had fewer updates than its opponent.
        valid = ~broken & (updates_of(inner, agents) <= inner.window * (state.count + 1))
        old = state.replace(key=key, rule=rule, opt_state=opt_state, agents=agents)
        new, replayed = jax.lax.cond(
            ended.any(), lambda s: succeed(s, ended, valid, lived, key_succeed), lambda s: (s, jnp.zeros(())), old
        )
        weight = late / jnp.maximum(late.sum(), 1)
        metrics = {name: getattr(lived, name).mean() for name in Lived._fields if name not in ("positive", "absolute")}
        metrics |= {
            # Reward a step of agents in the second half of their lives: what the rule is for.
            "reward_late": (lived.reward * weight).sum(),
            "grad_norm": optax.tree.norm(gradient),
            "ended": ended.sum(dtype=jnp.float32),
            "broken": broken.sum(dtype=jnp.float32),
            "refused": 1.0 - sound,
            "level_size": agents.state.env_params.size.mean(dtype=jnp.float32),
            "level_limit": agents.state.env_params.max_steps_in_episode.mean(dtype=jnp.float32),
        }
        if scored:
            known = ~new.buffer.new
            metrics |= {
                "replayed": replayed,
                "scored": known.sum(dtype=jnp.float32),
                "score": jnp.where(known, new.buffer.score, 0).sum() / jnp.maximum(known.sum(), 1),
            }
        metrics = {name: jnp.nan_to_num(value).astype(jnp.float32) for name, value in metrics.items()}
        return new.replace(count=state.count + 1, refused=state.refused | ~sound), metrics

    return MetaTrainer(
        init=init,
        step=step,
        learned=lambda state: state.rule,
        kind="lpg",
        convention=convention,
        # Of the agents' lives; a curriculum's opponents and returns at the end are not counted.
        env_steps_per_step=num * (inner.window + 1) * inner.algorithm.env_steps_per_iteration,
        devices=tuple(devices),
        curve="reward_late",
    )


def meta_gradient(inner: Inner, rule: PyTree, agents: Agent, key: jax.Array, parts: int, devices: Sequence[lanes.Device]):
    """The gradient of the agents' mean loss with respect to ``rule``, ``parts`` of them one after the other.

    Each of the ``devices`` has an equal share of the agents, and of every part; keys are the same however many there are.
    Returns: ``(gradient, agents, Lived [A])``.
    """
    keys = jax.random.split(key, len(agents.lifetime))

    def share(rule, agents, keys):
        num = len(keys)
        cut = jax.tree.map(lambda x: x.reshape(parts, num // parts, *x.shape[1:]), (agents, keys))

        def one(total, x):
            def mean_loss(rule):
                losses, rest = jax.vmap(lambda agent, key: live(inner, rule, agent, key))(*x)
                return losses.mean(), rest

            gradient, rest = jax.grad(mean_loss, has_aux=True)(rule)
            return jax.tree.map(lambda a, g: a + g / parts, total, gradient), rest

        gradient, rest = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, rule), cut)
        gradient = jax.lax.pmean(gradient, "lanes") if len(devices) > 1 else gradient
        return (gradient, *jax.tree.map(lambda x: x.reshape(num, *x.shape[2:]), rest))

    some, all_ = PartitionSpec("lanes"), PartitionSpec()
    return lanes.over_devices(share, devices, (all_, some, some), (all_, some, some))(rule, agents, keys)


def _where(flag: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Rows of ``new`` where ``flag`` [A], of keys too."""
    return jnp.where(flag.reshape(flag.shape + (1,) * (new.ndim - 1)), new, old)
