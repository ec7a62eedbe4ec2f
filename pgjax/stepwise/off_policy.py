"""The loop of the methods that learn from a replay buffer: act, store, learn, step by step.

A paper's file brings an ``update``, one gradient step on a minibatch, and gets an ``Algorithm`` from ``make``. Episodes' ends,
warm-up, replay, normalisation and the pace of updates live here once.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from pgjax import metrics, normalizers
from pgjax.action_maps import make_action_map
from pgjax.errors import RequestError
from pgjax.networks import ActorCritic
from pgjax.on_policy import Policy, as_hypers, check_choices, check_counts, gate
from pgjax.optimizers import adam
from pgjax.spaces import Discrete
from pgjax.stepwise.replay import Replay, Transition
from pgjax.stepwise.soft_networks import RavelledNetworks, SoftNetworks, make_soft_networks, ravelled
from pgjax.types import Algorithm, Environment, PyTree


@dataclasses.dataclass(frozen=True)
class Setup:
    """What fixes a shape, a loop length or a branch; each new value compiles again.

    num_envs, num_steps: one iteration plays T steps in B environments, learning all the while.
    update_ratio: gradient updates for each environment step. With several environments, and below one, updates come
        together: 1/512 with 4096 environments are 8 updates after each step of all of them.
    batch_size: transitions in a minibatch.  buffer_size: transitions kept, per lane.
    warmup_steps: environment steps with uniformly random actions before learning begins.
    critic: ``q``, with target copies of the two Q, or ``v``, with a state value and a copy of it.
    actor_value: what the actor climbs, the ``min`` of the two Q or the ``first``.
    normalize_obs: running statistics of the observations that were acted on.
    hidden_sizes, critic_hidden_sizes, activation, kernel_init: see ``pgjax.stepwise.soft_networks``.
    """

    num_envs: int = 1
    num_steps: int = 1000
    update_ratio: float = 1.0
    batch_size: int = 256
    buffer_size: int = 1_000_000
    warmup_steps: int = 1000
    critic: Literal["q", "v"] = "q"
    actor_value: Literal["min", "first"] = "min"
    normalize_obs: bool = False
    hidden_sizes: tuple[int, ...] | None = None
    critic_hidden_sizes: tuple[int, ...] | None = None
    activation: str = "relu"
    kernel_init: str = "glorot_uniform"


class Hypers(struct.PyTreeNode):
    """Numbers that only enter arithmetic; every leaf a float32 scalar, so new values never compile again.

    learning_rate: of the actor, and times ``critic_lr_scale`` of the critics.  tau: Polyak weight of the target copies.
    reward_scale: factor on every reward.  obs_clip: bound of normalised observations, in standard deviations.
    """

    learning_rate: jax.Array | float = 3e-4
    critic_lr_scale: jax.Array | float = 1.0
    gamma: jax.Array | float = 0.99
    tau: jax.Array | float = 0.005
    reward_scale: jax.Array | float = 1.0
    adam_eps: jax.Array | float = 1e-8
    adam_b1: jax.Array | float = 0.9
    adam_b2: jax.Array | float = 0.999
    obs_clip: jax.Array | float = 10.0


class Learner(struct.PyTreeNode):
    """The learned part: what is held at its last finite value when an update goes non-finite.

    params: one vector for the actor and one for all critics.  target: the vector of the critics' copies.
    opt_state: one Adam state for each vector of ``params``.  extra: what a method learns besides, None if nothing.
    """

    params: ActorCritic
    target: jax.Array
    opt_state: ActorCritic
    obs_moments: Any
    extra: PyTree


class State(struct.PyTreeNode):
    """All that is carried from one iteration to the next, for one lane.

    key: typed key.  env_steps: int32.  obs [B, *O] raw.  replay: see ``replay.py``; not learned, and never selected.
    episode_return [B] float32, episode_length [B] int32.  nonfinite: bool, whether an update was ever refused.
    obs_clip: bound of normalised observations, kept here for the policy that is handed out.
    """

    key: jax.Array
    env_steps: jax.Array
    learner: Learner
    env_state: PyTree
    obs: jax.Array
    replay: PyTree
    episode_return: jax.Array
    episode_length: jax.Array
    nonfinite: jax.Array
    env_params: PyTree
    obs_clip: jax.Array


class Core(NamedTuple):
    """The static things every part needs.

    squash: tanh, or nothing for discrete actions.  action_map: actions in [-1, 1] to the environment's bounds.
    """

    env: Environment
    setup: Any
    networks: RavelledNetworks
    replay: Replay
    squash: Callable[[jax.Array], jax.Array]
    action_map: Callable[[jax.Array], jax.Array]


def make(
    name: str,
    env: Environment,
    setup: Setup,
    hypers: Hypers,
    *,
    update: Callable,
    init_extra: Callable | None = None,
    networks: SoftNetworks | None = None,
    act_deterministic: bool = False,
) -> Algorithm:
    """Puts a method together from its parts.

    Args:
      name: public id.  env, setup, hypers: as the names say; ``hypers`` are the defaults of the returned algorithm.
      update: ``(core, key, learner, batch, hypers) -> (learner, metrics)``, one gradient step on a ``Transition`` [N] with
        normalised observations.
      init_extra: ``(core, hypers, params) -> pytree`` for ``Learner.extra``.
      networks: ``SoftNetworks``; built from ``setup`` by default.
      act_deterministic: after warm-up, act in training with the mode instead of a sample.

    Raises: RequestError naming the field, the value and the remedy.
    """
    steps_between, updates_each = pace(setup)
    hypers = as_hypers(hypers)
    networks = networks or make_soft_networks(
        env.observation_space,
        env.action_space,
        state_value=setup.critic == "v",
        hidden_sizes=setup.hidden_sizes,
        critic_hidden_sizes=setup.critic_hidden_sizes,
        activation=setup.activation,
        kernel_init=setup.kernel_init,
    )
    discrete = isinstance(env.action_space, Discrete)
    if not discrete and not _bounded(env.action_space):
        raise RequestError(f"{name} squashes actions into bounds and {env.name} has none; clip its action space to finite ones")
    core = Core(
        env,
        setup,
        ravelled(networks, setup.critic),
        Replay(setup.buffer_size, setup.batch_size, env.observation_space, env.action_space),
        (lambda action: action) if discrete else jnp.tanh,
        make_action_map("identity" if discrete else "clip_affine", env.action_space),
    )

    def init(key, hypers, env_params=None):
        key, key_network, key_reset, key_state = jax.random.split(key, 4)
        params = core.networks.init(key_network)
        env_state, obs = env.reset(
            jax.random.split(key_reset, setup.num_envs), env.default_params if env_params is None else env_params
        )
        learner = Learner(
            params=params,
            target=core.networks.target_of(params.critic),
            opt_state=ActorCritic(*(adam(hypers).init(vector) for vector in params)),
            obs_moments=normalizers.init_moments(env.observation_space.shape) if setup.normalize_obs else None,
            extra=init_extra(core, hypers, params) if init_extra else None,
        )
        return State(
            key=key_state,
            env_steps=jnp.zeros((), jnp.int32),
            learner=learner,
            env_state=env_state,
            obs=obs,
            replay=core.replay.init(),
            episode_return=jnp.zeros(setup.num_envs),
            episode_length=jnp.zeros(setup.num_envs, jnp.int32),
            nonfinite=jnp.zeros((), bool),
            env_params=env_params,
            obs_clip=jnp.asarray(hypers.obs_clip, jnp.float32),
        )

    def step(state, hypers):
        key, key_refresh, key_update, *keys_act = jax.random.split(state.key, 6)
        env_params = env.default_params if state.env_params is None else state.env_params
        state = state.replace(key=key, env_state=env.refresh(key_refresh, state.env_state, env_params))
        draws, env_step = _draw(core, keys_act, state, env_params)

        def act_and_learn(state, xs):
            draws, key = xs
            warming_up = state.env_steps < setup.warmup_steps
            state, transitions, collected = play(core, state, draws, hypers, warming_up, env_step, act_deterministic)
            state = state.replace(replay=core.replay.add(state.replay, transitions))
            count = jnp.where(warming_up, 0, updates_each)
            learner, learned = learn(core, update, key, state, hypers, count)
            if setup.normalize_obs:
                # After the gradient steps, as everywhere.
                moments = normalizers.update_moments(learner.obs_moments, transitions.obs)
                learner = learner.replace(obs_moments=moments)
            # Here and not once an iteration: the policy acts again at once, and must not act with what is not finite.
            nonfinite, learner = gate(state.nonfinite, learner, state.learner)
            return state.replace(learner=learner, nonfinite=nonfinite), (collected, learned, count)

        rounds = setup.num_steps // steps_between
        draws = jax.tree.map(lambda x: x.reshape(rounds, steps_between, *x.shape[1:]), draws)
        state, (collected, learned, count) = jax.lax.scan(act_and_learn, state, (draws, jax.random.split(key_update, rounds)))

        episodes, return_, length = (x.sum() for x in collected)
        count = count.sum()
        # NaN, not 0, while nothing is learned yet.
        updated = jnp.where(count > 0, 1.0, jnp.nan)
        step_metrics = {
            "env_steps": state.env_steps,
            "episodes": episodes,
            "episode_return": return_ / episodes,  # NaN where no episode ended
            "episode_length": length / episodes,
            **{
                name: updated * (value.max() if metrics.reduction(name) == "max" else value.sum() / jnp.maximum(count, 1))
                for name, value in learned.items()
            },
            "updates": count.astype(episodes.dtype),
        }
        step_metrics = {
            name: value if name.startswith("episode_") else jnp.where(state.nonfinite & jnp.isnan(value), 0, value)
            for name, value in step_metrics.items()
        }
        step_metrics["nonfinite"] = state.nonfinite.astype(jnp.float32)
        obs_clip = jnp.where(state.nonfinite, state.obs_clip, hypers.obs_clip).astype(state.obs_clip.dtype)
        return state.replace(obs_clip=obs_clip), step_metrics

    def act(policy, obs, key=None):
        if policy.obs_moments is not None:
            obs = normalizers.normalize(policy.obs_moments, obs, clip=policy.obs_clip)
        dist = core.networks.policy(policy.actor, obs)
        return core.action_map(core.squash(dist.mode() if key is None else dist.sample(key)))

    def warm_start(state, policy):
        learner = state.learner
        params = learner.params._replace(actor=policy.actor)
        return state.replace(learner=learner.replace(params=params, obs_moments=policy.obs_moments))

    return Algorithm(
        init=init,
        step=step,
        policy=lambda state: Policy(state.learner.params.actor, state.learner.obs_moments, state.obs_clip),
        act=act,
        warm_start=warm_start,
        setup=setup,
        hypers=hypers,
        name=name,
        env=env,
        env_steps_per_iteration=setup.num_envs * setup.num_steps,
        core=core,
    )


def _draw(core: Core, keys, state: State, env_params):
    """All random numbers of an iteration's acting, drawn before its loop, ``[T, B, ...]``; and the step that takes them.

    Returns: ``(environment's, policy's noise, uniform actions), env_step``.
    """
    env, setup = core.env, core.setup
    key_env, key_noise, key_uniform = keys
    shape = (setup.num_steps, setup.num_envs)
    dist = jax.eval_shape(core.networks.policy, state.learner.params.actor, state.obs)
    noise = dist.draw_noise(key_noise, shape[:1])
    if isinstance(env.action_space, Discrete):
        uniform = jax.random.randint(key_uniform, shape, 0, env.action_space.num, jnp.int32)
    else:
        uniform = jax.random.uniform(key_uniform, (*shape, *env.action_space.shape), noise.dtype, -1, 1)
    draws, env_step = jax.random.split(key_env, shape), env.step
    if presample := getattr(env, "presample", None):
        draws, env_step = presample(draws, env_params), env.step_presampled  # pyright: ignore[reportAttributeAccessIssue]
    return (draws, noise, uniform), env_step


def play(core: Core, state: State, draws, hypers, warming_up, env_step: Callable, deterministic: bool = False):
    """Acts for as many steps as there are ``draws``, [K, B, ...], with the policy of ``state``, or uniformly at random.

    Returns: ``(state, transitions [K, B], (episodes, returns, lengths))``, the latter summed over episodes that ended.
    """
    learner = state.learner
    env_params = core.env.default_params if state.env_params is None else state.env_params

    def step(carry, draw):
        env_state, obs, episode_return, episode_length = carry
        draw_env, noise, uniform = draw
        dist = core.networks.policy(learner.params.actor, normalized(learner, obs, hypers))
        action = core.squash(dist.mode() if deterministic else dist.sample_with(noise))
        action = jnp.where(warming_up, uniform, action)
        env_state, timestep = env_step(draw_env, env_state, core.action_map(action), env_params)
        episode_return, episode_length = episode_return + timestep.reward, episode_length + 1
        ended = timestep.terminated | timestep.truncated
        transition = Transition(obs, action, timestep.reward, timestep.terminated, timestep.final_obs)
        out = (transition, (ended.sum(), jnp.where(ended, episode_return, 0).sum(), jnp.where(ended, episode_length, 0).sum()))
        episode_return, episode_length = (jnp.where(ended, 0, x) for x in (episode_return, episode_length))
        return (env_state, timestep.obs, episode_return, episode_length), out

    carry = (state.env_state, state.obs, state.episode_return, state.episode_length)
    (env_state, obs, episode_return, episode_length), (transitions, sums) = jax.lax.scan(step, carry, draws)
    state = state.replace(
        env_steps=state.env_steps + transitions.reward.size,
        env_state=env_state,
        obs=obs,
        episode_return=episode_return,
        episode_length=episode_length,
    )
    return state, transitions, tuple(x.sum().astype(jnp.float32) for x in sums)


def learn(core: Core, update: Callable, key, state: State, hypers, count: jax.Array):
    """``count`` gradient steps, each on a minibatch of its own. Returns: the learner, and metrics summed over the steps.

    A loop of traced length, not a branch: under vmap a branch would be taken by all, this one by none while all warm up.
    """

    def one(i, learner):
        key_sample, key_update = jax.random.split(jax.random.fold_in(key, i))
        batch = core.replay.sample(state.replay, key_sample)
        batch = batch._replace(
            obs=normalized(learner, batch.obs, hypers), final_obs=normalized(learner, batch.final_obs, hypers)
        )
        return update(core, key_update, learner, batch, hypers)

    def body(i, carry):
        learner, total = carry
        learner, said = one(i, learner)
        # What is reported as a maximum is never negative.
        total = {n: jnp.maximum(total[n], x) if metrics.reduction(n) == "max" else total[n] + x for n, x in said.items()}
        return learner, total

    said = jax.eval_shape(one, 0, state.learner)[1]
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in said.items()}
    return jax.lax.fori_loop(0, count, body, (state.learner, zeros))


def normalized(learner: Learner, obs: jax.Array, hypers) -> jax.Array:
    """``obs`` as the networks take it."""
    return obs if learner.obs_moments is None else normalizers.normalize(learner.obs_moments, obs, clip=hypers.obs_clip)


def pace(setup: Setup) -> tuple[int, int]:
    """``(steps of all environments between updates, updates then)``, after checking the setup.

    Raises: RequestError for a setup that cannot run, naming the field, the value and the remedy.
    """
    check_counts(setup, ("num_envs", "num_steps", "batch_size", "buffer_size", "warmup_steps"))
    check_choices(setup)
    if not setup.update_ratio > 0 or setup.update_ratio == float("inf"):
        raise RequestError(f"setup.update_ratio = {setup.update_ratio!r} must be above 0; 1 is one update per environment step")
    if setup.warmup_steps < setup.batch_size:
        raise RequestError(
            f"setup.warmup_steps = {setup.warmup_steps} is below batch_size = {setup.batch_size}; "
            "the first minibatch needs that many transitions"
        )
    ratio = Fraction(setup.update_ratio).limit_denominator(10**6) * setup.num_envs
    steps, updates = ratio.denominator, ratio.numerator
    if setup.num_steps % steps:
        raise RequestError(
            f"setup.update_ratio = {setup.update_ratio} with num_envs = {setup.num_envs} means {updates} updates every {steps} "
            f"steps, which does not divide num_steps = {setup.num_steps}; change one of them"
        )
    if setup.buffer_size < max(setup.batch_size, steps * setup.num_envs):
        raise RequestError(
            f"setup.buffer_size = {setup.buffer_size} is less than a minibatch or what is stored between updates; "
            f"give at least {max(setup.batch_size, steps * setup.num_envs)}"
        )
    return steps, updates


def _bounded(space) -> bool:
    return all(abs(bound) < float("inf") for bounds in space.bounds for bound in bounds.ravel())
