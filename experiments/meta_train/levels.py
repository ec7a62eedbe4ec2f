"""Which levels agents are trained on while a rule is learned: sampled afresh, or kept and played again if they are instructive.

GROOVE keeps a buffer of levels. When an agent's life ends, its level gets a score, by default its algorithmic regret: what an
A2C agent earns on it that was trained for as long, less what the agent of the rule earns. A new agent then gets a level of high
score, or one that nobody has played.

Source: Jackson et al. 2023, arXiv 2310.02782. The order of things is that of its authors' code, but that
levels are renewed only when somebody's life ended, not after every meta-update.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax import estimators
from pgjax.algorithms import lpg
from pgjax.envs import grid_world
from pgjax.errors import RequestError
from pgjax.networks import ActorCritic
from pgjax.types import Environment, PyTree

Score = Literal["random", "frozen", "alg_regret", "optimal_regret", "positive_value_loss", "l1_value_loss"]
Transform = Literal["rank", "proportional"]


# ---- The buffer -----------------------------------------------------------------------------------------------------


class Buffer(struct.PyTreeNode):
    """N levels. level, lifetime: [N].  score: [N].  active: [N] bool, an agent lives on it.  new: [N] bool, never scored.

    played: int32 [N], when it was last handed out, in meta-updates; -1 for never.
    """

    level: PyTree
    lifetime: jax.Array
    score: jax.Array
    active: jax.Array
    new: jax.Array
    played: jax.Array


class Curriculum(NamedTuple):
    """How levels are chosen; see ``Args`` in ``lpg.py``."""

    score: Score
    buffer_size: int
    p_replay: float
    transform: Transform
    temperature: float
    staleness: float


class Choice(NamedTuple):
    """slots: int32 [A], of every agent.  replayed: [A] bool, whether the agent was just given a level that had been scored."""

    slots: jax.Array
    replayed: jax.Array


# ``key -> (level, lifetime)``, consuming the key.
Sampler = Callable[[jax.Array], tuple[PyTree, jax.Array]]


def sampler(family: grid_world.Family, shortest: float, longest: float) -> Sampler:
    """Levels of ``family``, with lives between these numbers of updates, log-uniform."""

    def sample(key):
        key_level, key_life = jax.random.split(key)
        span = jax.random.uniform(key_life, minval=np.log(shortest), maxval=np.log(longest))
        return family.sample(key_level), jnp.round(jnp.exp(span))

    return sample


def check(curriculum: Curriculum, num_agents: int) -> None:
    """Raises RequestError for a curriculum that cannot be, naming field, value and remedy."""
    score, buffer_size = curriculum.score, curriculum.buffer_size
    if score != "random" and buffer_size < 3 * num_agents:
        raise RequestError(f"buffer_size = {buffer_size} must be at least 3 levels for each of the {num_agents} agents")
    for name in ("p_replay", "staleness"):
        if not 0 <= (value := getattr(curriculum, name)) <= 1:
            raise RequestError(f"{name} = {value} is a probability; give a value in [0, 1]")
    if not curriculum.temperature > 0:
        raise RequestError(f"temperature = {curriculum.temperature} must be above 0")


def init_buffer(sample: Sampler, key: jax.Array, size: int, num_agents: int) -> tuple[Buffer, jax.Array]:
    """``(buffer, slots [A])``: all levels new, agents on the first ones."""
    level, lifetime = jax.vmap(sample)(jax.random.split(key, size))
    active = jnp.arange(size) < num_agents
    buffer = Buffer(
        level=level,
        lifetime=lifetime,
        score=jnp.zeros(size),
        active=active,
        new=jnp.ones(size, bool),
        played=jnp.where(active, 0, -1),
    )
    return buffer, jnp.arange(num_agents, dtype=jnp.int32)


def renew_lowest(buffer: Buffer, sample: Sampler, key: jax.Array, num: int) -> Buffer:
    """The ``num`` lowest of the levels on which nobody lives give way to fresh ones; what was never scored is lowest.

    authors' code: here ``new`` is taken from ``active``, so unscored levels pass for scored ones / here: only these become new.
    """
    rank = jnp.where(buffer.active, jnp.inf, jnp.where(buffer.new, -jnp.inf, buffer.score))
    slots = jnp.argsort(rank)[:num]
    level, lifetime = jax.vmap(sample)(jax.random.split(key, num))
    return buffer.replace(
        level=jax.tree.map(lambda old, new: old.at[slots].set(new), buffer.level, level),
        lifetime=buffer.lifetime.at[slots].set(lifetime),
        score=buffer.score.at[slots].set(0.0),
        new=buffer.new.at[slots].set(True),
        played=buffer.played.at[slots].set(-1),
    )


def record(buffer: Buffer, slots: jax.Array, ended: jax.Array, score: jax.Array, valid: jax.Array | bool = True) -> Buffer:
    """The levels of agents that ``ended`` [A] get their ``score`` [A], and are free again.

    Where a score is not ``valid`` [A] or not finite, the level stays as one that was never scored.
    """
    # Where nobody's level is, nothing is written.
    slots = jnp.where(ended, slots, len(buffer.score))
    valid = valid & jnp.isfinite(score)
    return buffer.replace(
        score=buffer.score.at[slots].set(jnp.where(valid, score, 0.0), mode="drop"),
        active=buffer.active.at[slots].set(False, mode="drop"),
        new=buffer.new.at[slots].set(~valid, mode="drop"),
    )


def replay_weight(buffer: Buffer, now: jax.Array, curriculum: Curriculum) -> jax.Array:
    """log of how much each level wants to be replayed, [N]; -inf for those that cannot be.

    ``rank``: 1 / rank of its score; ``proportional``: exp(score / temperature). A share ``staleness`` of the weight goes by how
    long ago a level was played, as in prioritised level replay; the authors' code has none.
    """
    can, staleness = ~buffer.active & ~buffer.new, curriculum.staleness
    if curriculum.transform == "rank":
        rank = 1 + jnp.argsort(jnp.argsort(-jnp.where(can, buffer.score, -jnp.inf)))
        log_weight = -jnp.log(rank.astype(jnp.float32))
    else:
        log_weight = buffer.score / curriculum.temperature
    log_weight = jax.nn.log_softmax(jnp.where(can, log_weight, -jnp.inf))
    if staleness > 0:
        age = jnp.where(can, now - buffer.played, 0).astype(jnp.float32)
        stale = age / jnp.maximum(age.sum(), 1)
        log_weight = jnp.log((1 - staleness) * jnp.exp(log_weight) + staleness * stale)
    return jnp.where(can, log_weight, -jnp.inf)


def choose(buffer: Buffer, key, slots, ended, now, curriculum: Curriculum) -> tuple[Buffer, Choice]:
    """New levels for the agents that ``ended`` [A]: a scored one with probability ``p_replay``, else a new one.

    ``rank`` without staleness takes the levels of the highest scores, in order; otherwise they are drawn, without repetition.
    Nothing is replayed before there are as many scored levels as agents.
    """
    num = len(slots)
    key_replay, key_scored, key_new = jax.random.split(key, 3)
    log_weight = replay_weight(buffer, now, curriculum)
    if curriculum.transform != "rank" or curriculum.staleness > 0:
        log_weight = log_weight + jax.random.gumbel(key_scored, log_weight.shape)
    scored = jax.lax.top_k(log_weight, num)[1]
    fresh = ~buffer.active & buffer.new
    unseen = jax.lax.top_k(jnp.where(fresh, jax.random.uniform(key_new, fresh.shape), -1.0), num)[1]
    enough = (~buffer.active & ~buffer.new).sum() >= num
    replays = ended & enough & (jax.random.uniform(key_replay, (num,)) < curriculum.p_replay)

    def nth(flags):
        """Which of the agents so flagged an agent is, from 0 on."""
        return jnp.maximum(jnp.cumsum(flags) - 1, 0)

    # authors' code: candidate i is for agent i / here: the best candidate is for the first agent that needs one.
    given = jnp.where(replays, scored[nth(replays)], unseen[nth(ended & ~replays)])
    slots = jnp.where(ended, given, slots).astype(jnp.int32)
    taken = jnp.where(ended, slots, len(buffer.score))
    buffer = buffer.replace(
        active=buffer.active.at[taken].set(True, mode="drop"), played=buffer.played.at[taken].set(now, mode="drop")
    )
    return buffer, Choice(slots, replays)


def choose_any(buffer: Buffer, key, slots, ended) -> tuple[Buffer, Choice]:
    """New levels for the agents that ``ended``, all equally likely, whoever lives on them: for a buffer that stays as it is."""
    drawn = jax.random.randint(key, slots.shape, 0, len(buffer.score), jnp.int32)
    return buffer, Choice(jnp.where(ended, drawn, slots), jnp.zeros_like(ended))


# ---- What a level is worth ------------------------------------------------------------------------------------------


def episode_return(env: Environment, act: Callable, level: PyTree, key: jax.Array, num_envs: int) -> jax.Array:
    """Mean undiscounted return, [], of one fresh episode in each of ``num_envs`` environments.

    ``act``: ``(obs, key) -> action``.
    """
    key_start, key_steps = jax.random.split(key)
    env_state, obs = env.reset(jax.random.split(key_start, num_envs), level)

    def step(carry):
        t, env_state, obs, alive, total = carry
        key_act, key_env = jax.random.split(jax.random.fold_in(key_steps, t))
        env_state, timestep = env.step(jax.random.split(key_env, num_envs), env_state, act(obs, key_act), level)
        total = total + jnp.where(alive, timestep.reward, 0)
        return t + 1, env_state, timestep.obs, alive & ~(timestep.terminated | timestep.truncated), total

    carry = (jnp.int32(0), env_state, obs, jnp.ones(num_envs, bool), jnp.zeros(num_envs))
    *_, total = jax.lax.while_loop(lambda carry: carry[3].any() & (carry[0] < env.max_episode_steps), step, carry)
    return total.mean()


class A2C(NamedTuple):
    """Numbers of the antagonist; learning rates, bounds and networks are those of the rule's agent."""

    gamma: float
    gae_lambda: float
    entropy_coef: float = 0.01


def advantages(value: jax.Array, rollout: lpg.Rollout, gamma, gae_lambda) -> tuple[jax.Array, jax.Array]:
    """``(advantage, value_target)`` [T, B] from ``value`` [T + 1, B] of a rollout; an end by time limit is an end."""
    never = jnp.zeros_like(rollout.end)
    return estimators.gae(rollout.reward, value[:-1], value[1:], rollout.end, never, gamma, gae_lambda)


def normalized(advantage: jax.Array) -> jax.Array:
    """With mean 0 and standard deviation 1 over all samples."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def train_a2c(env, setup, hypers, numbers: A2C, level, lifetime, key):
    """The policy of an A2C agent after ``lifetime`` updates on ``level``: the agent that a rule's agent is compared with.

    One step per rollout of as many environments and steps as ``setup`` says, with the agent's kind of network, optimiser,
    bounds and rates; the value function has the predictor's. Under vmap all go on until the longest life ends.
    Returns: ``(policy, params)``, the former ``(params, obs) -> Categorical``.
    """
    actor = lpg.make_agent(env.observation_space, env.action_space.num, 1, setup)
    critic = lpg.make_network(env.observation_space, 1, setup)
    key_actor, key_critic, key_reset, key_life = jax.random.split(key, 4)
    params = ActorCritic(actor.init(key_actor).actor, critic.init(key_critic))
    env_state, obs = env.reset(jax.random.split(key_reset, setup.num_envs), level)
    zeros = jnp.zeros(setup.num_envs)
    state = lpg.State(
        key=key_life,
        env_steps=jnp.zeros((), jnp.int32),
        learner=lpg.Learner(params, lpg.init_opt_state(setup, hypers, params)),
        env_state=env_state,
        obs=obs,
        episode_return=zeros,
        episode_length=jnp.zeros(setup.num_envs, jnp.int32),
        nonfinite=jnp.zeros((), bool),
        env_params=level,
    )
    rates = ActorCritic(hypers.learning_rate, hypers.predictor_lr)

    def loss(params, rollout):
        dist = actor.policy(params, rollout.obs[:-1])
        # The trailing axis of a value is dropped at once: left, it would pair every step with every other one.
        value = critic.apply(params.critic, rollout.obs)[..., 0]
        advantage, target = advantages(jax.lax.stop_gradient(value), rollout, numbers.gamma, numbers.gae_lambda)
        policy_loss = -(normalized(advantage) * dist.log_prob(rollout.action)).mean()
        value_loss = ((value[:-1] - target) ** 2).mean()
        return policy_loss - numbers.entropy_coef * dist.entropy().mean() + value_loss

    def update(number, state):
        keys = jax.random.split(jax.random.fold_in(key_life, number), 3)
        state, _, rollout = lpg.collect(env, setup, actor, keys, state, hypers)
        learner = state.learner
        gradient = jax.grad(loss)(learner.params, rollout)
        stepped = lpg.descend(setup, hypers, learner.params, learner.opt_state, gradient, rates)
        return state.replace(learner=learner.replace(params=stepped[0], opt_state=stepped[1]))

    state = jax.lax.fori_loop(0, jnp.asarray(lifetime, jnp.int32), update, state)
    return actor.policy, state.learner.params


def a2c_return(env, setup, hypers, numbers: A2C, level, lifetime, key) -> jax.Array:
    """What the antagonist earns on ``level`` after ``lifetime`` updates, []."""
    key_train, key_play = jax.random.split(key)
    policy, params = train_a2c(env, setup, hypers, numbers, level, lifetime, key_train)
    return episode_return(env, lambda obs, key: policy(params, obs).sample(key), level, key_play, setup.num_envs)


def for_those(flags: jax.Array, fn: Callable, xs: PyTree, chunk: int) -> jax.Array:
    """``fn`` of those rows of ``xs`` [A, ...] that are flagged, ``chunk`` at a time, [A]; zero for the others.

    The work is that of the flagged ones alone, rounded up to whole chunks: with vmap all would be computed.
    """
    num = len(flags)
    order = jnp.argsort(~flags)
    result = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], xs))

    def body(carry):
        i, out = carry
        place = jnp.minimum(i * chunk + jnp.arange(chunk), num - 1)
        rows = order[place]
        values = jax.vmap(fn)(jax.tree.map(lambda x: x[rows], xs))
        return i + 1, out.at[rows].set(values)

    carry = (jnp.int32(0), jnp.zeros(num, result.dtype))
    out = jax.lax.while_loop(lambda carry: carry[0] * chunk < flags.sum(), body, carry)[1]
    return jnp.where(flags, out, 0)
