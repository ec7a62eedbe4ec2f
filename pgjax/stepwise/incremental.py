"""The loop of the incremental methods: one environment, one transition, one update, and nothing is stored.

A paper's file brings an ``update`` of one transition and gets an ``Algorithm`` from ``make``. A learner has no batch axis;
thousands of them are lanes, vmapped outside of the loop, each with parameters, optimiser, normaliser and numbers of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax import normalizers
from pgjax.action_maps import make_action_map
from pgjax.networks import ActorCritic
from pgjax.on_policy import all_finite, as_hypers, check_choices, check_counts
from pgjax.optimizers import adam
from pgjax.stepwise.incremental_networks import IncrementalNetworks
from pgjax.stepwise.soft_critic import bellman_target
from pgjax.stepwise.td_scaling import init_td_scale, update_td_scale
from pgjax.types import Algorithm, Environment, Metrics, PyTree

# Settings that belong to the methods of this loop, which a comparison at shared settings leaves to them: a learner of one
# sample at a time, its networks and normalisations, and step sizes to suit.
DEFINING = (
    *("num_steps", "normalize_obs", "boundary", "action_map", "hidden_sizes", "activation", "kernel_init"),
    *("learning_rate", "adam_b1", "adam_b2", "adam_eps"),
)

# A stream of its own for what is drawn once per iteration; steps are numbered below this.
_REFRESH = 2**32 - 1
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What fixes a shape, a loop length or a branch; each new value compiles again.

    num_steps: environment steps, and updates, of one iteration.
    normalize_obs: running statistics of the observations, updated with each before it is normalised.
    penultimate_norm: the last hidden features of every network have length one.
    scaler: how TD errors are scaled: ``code`` or ``paper``, see ``pgjax.stepwise.td_scaling``, or ``none``.
    boundary: what a time limit is: cut from outside and valued beyond (``bootstrap``), or an end (``terminate``), as in the
        authors' wrapper of DM Control.
    std_param: σ of the actor's output h is exp(h/2) (``exp_half``) or exp(h) (``exp``).
    action_map: ``tanh_clip``, clipped into the bounds and not rescaled, or ``tanh_affine``; see ``pgjax.action_maps``.
    hidden_sizes, activation, kernel_init: see ``pgjax.stepwise.incremental_networks``.
    """

    num_steps: int = 1000
    normalize_obs: bool = True
    penultimate_norm: bool = True
    scaler: Literal["code", "paper", "none"] = "code"
    boundary: Literal["bootstrap", "terminate"] = "bootstrap"
    std_param: Literal["exp_half", "exp"] = "exp_half"
    action_map: Literal["tanh_clip", "tanh_affine"] = "tanh_clip"
    hidden_sizes: tuple[int, ...] = (256, 256)
    activation: str = "leaky_relu"
    kernel_init: str = "orthogonal"


class Hypers(struct.PyTreeNode):
    """Numbers that only enter arithmetic; every leaf a float32 scalar, so new values never compile again.

    learning_rate: of the actor.  critic_lr: learning rate of the critic. Both are constant over the run.
    """

    learning_rate: jax.Array | float = 6.3e-3
    critic_lr: jax.Array | float = 8.7e-3
    gamma: jax.Array | float = 0.99
    adam_b1: jax.Array | float = 0.0
    adam_b2: jax.Array | float = 0.999
    adam_eps: jax.Array | float = 1e-8


class Learner(struct.PyTreeNode):
    """The learned part: what is held at its last finite value when an update goes non-finite.

    params: trees of the actor and of the critics.  opt_state: one Adam state for each of the two.
    obs_moments, td_scale: running statistics, None where switched off.  extra: what a method learns besides, else None.
    """

    params: ActorCritic
    opt_state: ActorCritic
    obs_moments: Any
    td_scale: Any
    extra: PyTree


class State(struct.PyTreeNode):
    """All that is carried from one iteration to the next, for one lane.

    key: typed key, the same for ever: step n draws from its n-th descendant, however steps are cut into iterations.
    env_steps: int32.  env_state: of one environment, with an axis [1].  obs: [*O] raw, counted already in the statistics that
    it was met with; those of a warm start have not seen it.
    episode_return: [] float32.  episode_length: [] int32.  nonfinite: [] bool, whether an update was ever refused.
    noise_scale: standard deviation of exploration in [-1, 1], kept for the policy that is handed out; None if the policy
    has a spread of its own.
    """

    key: jax.Array
    env_steps: jax.Array
    learner: Learner
    env_state: PyTree
    obs: jax.Array
    episode_return: jax.Array
    episode_length: jax.Array
    nonfinite: jax.Array
    env_params: PyTree
    noise_scale: Any


class Transition(NamedTuple):
    """One step of the environment as an update sees it, without a batch axis.

    obs, next_obs: [*O] normalised, each with the statistics of its own time; ``next_obs`` is the successor before any reset.
    action: [A] before ``squash``.  noise: [A] standard normal, what it was made of.
    fresh_noise: [K, A] standard normal, for the actions that the update samples.
    reward: [] raw.  terminated, truncated: [] bool, after ``setup.boundary``.  env_steps: int32 [], steps before this one.
    """

    obs: jax.Array
    action: jax.Array
    noise: jax.Array
    fresh_noise: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    next_obs: jax.Array
    env_steps: jax.Array


class Counted(NamedTuple):
    """What metrics are made of, per step and in sum.

    learned: [M] metrics of the update in order of their names, 0 where it was refused.  updates: [] those that were not.
    episodes: [3] episodes that ended, their returns and their lengths.
    """

    learned: jax.Array
    updates: jax.Array
    episodes: jax.Array


class Policy(NamedTuple):
    """The part that acts: the actor's parameters, the observation statistics (or None), exploration's scale (or None)."""

    actor: PyTree
    obs_moments: Any
    noise_scale: Any


class Core(NamedTuple):
    """The static things every part needs. action_map: actions before ``networks.squash`` to the environment's bounds."""

    env: Environment
    setup: Any
    networks: IncrementalNetworks
    action_map: Callable[[jax.Array], jax.Array]


def make(
    name: str,
    env: Environment,
    setup: Setup,
    hypers: Hypers,
    *,
    update: Callable[[Core, Learner, Transition, Any], tuple[Learner, Metrics]],
    make_networks: Callable[..., IncrementalNetworks],
    num_fresh: int = 0,
    init_extra: Callable | None = None,
    noise_scale: Callable[[Any], jax.Array | None] = lambda hypers: None,
) -> Algorithm:
    """Puts a method together from its parts.

    Args:
      name: public id.  env, setup, hypers: as the names say; ``hypers`` are the defaults of the returned algorithm.
      update: ``(core, learner, transition, hypers) -> (learner, metrics)``, with fixed scalar metrics that are non-finite if a
        gradient is.
      make_networks: ``(env, setup) -> IncrementalNetworks``.  num_fresh: K, actions that an update samples.
      init_extra: ``(core, hypers, params) -> pytree`` for ``Learner.extra``.
      noise_scale: ``hypers -> []``, the exploration of a deterministic actor.

    Raises: RequestError naming the field, the value and the remedy.
    """
    check_counts(setup, ["num_steps"])
    check_choices(setup)
    hypers = as_hypers(hypers)
    networks = make_networks(env, setup)
    core = Core(env, setup, networks, make_action_map(setup.action_map, env.action_space))
    obs_shape, action_shape = env.observation_space.shape, env.action_space.shape

    def params_of(env_params):
        return env.default_params if env_params is None else env_params

    def init(key, hypers, env_params=None):
        key, key_network, key_reset, key_state = jax.random.split(key, 4)
        params = networks.init(key_network)
        env_state, obs = env.reset(jax.random.split(key_reset, 1), params_of(env_params))
        learner = Learner(
            params=params,
            opt_state=ActorCritic(*(adam(hypers).init(tree) for tree in params)),
            obs_moments=observe(normalizers.init_moments(obs_shape), obs[0]) if setup.normalize_obs else None,
            td_scale=init_td_scale() if setup.scaler != "none" else None,
            extra=init_extra(core, hypers, params) if init_extra else None,
        )
        return State(
            key=key_state,
            env_steps=jnp.zeros((), jnp.int32),
            learner=learner,
            env_state=env_state,
            obs=obs[0],
            episode_return=jnp.zeros(()),
            episode_length=jnp.zeros((), jnp.int32),
            nonfinite=jnp.zeros((), bool),
            env_params=env_params,
            noise_scale=_as_float32(noise_scale(hypers)),
        )

    def transition(hypers, env_step, env_params, carry, xs):
        """One step of the environment and the update on it: a body for scan."""
        learner, env_state, obs, nonfinite, episode_return, episode_length = carry
        env_steps, draw, noise = xs
        normalized = normalize(learner.obs_moments, obs)
        action = networks.policy(learner.params.actor, normalized, noise_scale(hypers)).sample_with(noise[0])
        env_state, timestep = env_step(draw, env_state, core.action_map(action)[None], env_params)
        timestep = jax.tree.map(lambda x: x[0], timestep._replace(metrics=None))
        ended = timestep.terminated | timestep.truncated
        is_end = setup.boundary == "terminate"

        # First the true successor, which the update values, then the observation that the next episode begins with.
        moments = observe(learner.obs_moments, timestep.final_obs)
        new, metrics = update(
            core,
            learner.replace(obs_moments=moments),
            Transition(
                obs=normalized,
                action=action,
                noise=noise[0],
                fresh_noise=noise[1:],
                reward=timestep.reward,
                terminated=ended if is_end else timestep.terminated,
                truncated=jnp.zeros_like(ended) if is_end else timestep.truncated,
                next_obs=normalize(moments, timestep.final_obs),
                env_steps=env_steps,
            ),
            hypers,
        )
        new = new.replace(obs_moments=_where(ended, observe(moments, timestep.obs), moments))

        # At once, because the policy acts again in the next step. Finite norms of the gradients and finite numbers to scale
        # them with leave finite parameters (see ``descend``), which need not be read once more: in the fused update of Adam
        # the select costs nothing, while looking at every new parameter first makes a step a third slower.
        learned = jnp.stack([metrics[name] for name in sorted(metrics)])  # as one array: each number costs a kernel
        sound = ~nonfinite & all_finite((learned, new.obs_moments, new.td_scale, hypers))
        learner = _where(sound, new, learner)

        episode = jnp.stack([jnp.ones_like(episode_return), episode_return + timestep.reward, episode_length + 1])
        counted = Counted(
            learned=jnp.where(sound, learned, 0),
            updates=sound.astype(learned.dtype),
            episodes=jnp.where(ended, episode, 0),
        )
        episode_return = jnp.where(ended, 0, episode_return + timestep.reward)
        episode_length = jnp.where(ended, 0, episode_length + 1)
        carry = (learner, env_state, timestep.obs.astype(obs.dtype), ~sound, episode_return, episode_length)
        return carry, counted, metrics

    def step(state, hypers):
        hypers = jax.tree.map(jnp.asarray, hypers)
        env_params = params_of(state.env_params)
        env_steps = state.env_steps + jnp.arange(setup.num_steps, dtype=jnp.int32)
        key_refresh = jax.random.fold_in(jax.random.fold_in(state.key, _REFRESH), state.env_steps)
        env_state = env.refresh(key_refresh, state.env_state, env_params)
        # All random numbers are drawn before the scan, in a few large operations instead of many small ones.
        keys = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(state.key, number)))(env_steps)
        shape, dtype = (1 + num_fresh, *action_shape), state.episode_return.dtype
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys[:, 0])
        presample = getattr(env, "presample", None)
        draws, env_step = keys[:, 1:], env.step
        if presample:
            draws, env_step = presample(draws, env_params), env.step_presampled  # pyright: ignore[reportAttributeAccessIssue]

        def one(carry, xs):
            carry, total = carry
            carry, counted, _ = transition(hypers, env_step, env_params, carry, xs)
            return (carry, jax.tree.map(jnp.add, total, counted)), None

        xs = (env_steps, draws, noise)
        carry = (
            *(state.learner, env_state, state.obs, state.nonfinite),
            *(state.episode_return, state.episode_length),
        )
        first = jax.tree.map(lambda x: x[0], xs)
        shapes, names = jax.eval_shape(lambda *args: transition(hypers, env_step, env_params, *args)[1:], carry, first)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (carry, total), _ = jax.lax.scan(one, (carry, nothing), xs)
        learner, env_state, obs, nonfinite, episode_return, episode_length = carry

        episodes, return_, length = total.episodes
        metrics = {
            "env_steps": state.env_steps + setup.num_steps,
            "episodes": episodes,
            "episode_return": return_ / episodes,  # NaN where no episode ended
            "episode_length": length / episodes,
            # Over the updates that were made: none in a lane that went non-finite before.
            **dict(zip(sorted(names), total.learned / jnp.maximum(total.updates, 1), strict=True)),
            "nonfinite": nonfinite.astype(jnp.float32),
        }
        explored = jax.tree.map(
            lambda new, old: jnp.where(nonfinite, old, new).astype(old.dtype), noise_scale(hypers), state.noise_scale
        )
        return (
            state.replace(
                env_steps=metrics["env_steps"],
                learner=learner,
                env_state=env_state,
                obs=obs,
                episode_return=episode_return,
                episode_length=episode_length,
                nonfinite=nonfinite,
                noise_scale=explored,
            ),
            metrics,
        )

    def act(policy, obs, key=None):
        dist = networks.policy(policy.actor, normalize(policy.obs_moments, obs), policy.noise_scale)
        return core.action_map(dist.mode() if key is None else dist.sample(key))

    def warm_start(state, policy):
        learner = state.learner
        params = learner.params._replace(actor=policy.actor)
        return state.replace(learner=learner.replace(params=params, obs_moments=policy.obs_moments))

    return Algorithm(
        init=init,
        step=step,
        policy=lambda state: Policy(state.learner.params.actor, state.learner.obs_moments, state.noise_scale),
        act=act,
        warm_start=warm_start,
        setup=setup,
        hypers=hypers,
        name=name,
        env=env,
        env_steps_per_iteration=setup.num_steps,
        core=core,
    )


# ---- What updates are made of ---------------------------------------------------------------------------------------


def observe(moments, obs: jax.Array):
    """The statistics with one more raw observation [*O], as Gymnasium's ``NormalizeObservation`` counts; None stays None."""
    if moments is None:
        return None
    return normalizers.update_moments(moments, obs, normalizers.VEC_NORMALIZE_PRIOR_COUNT)


def normalize(moments, obs: jax.Array) -> jax.Array:
    """Observations [..., *O] in standard deviations from their mean, without a bound; as they are without statistics."""
    return obs if moments is None else normalizers.normalize(moments, obs)


def scale_td(setup, learner: Learner, reward: jax.Array, t: Transition, gamma, decay=1.0) -> tuple[Learner, jax.Array]:
    """The learner whose scale of TD errors has seen ``reward`` [] of this transition, and the scale σ []."""
    if setup.scaler == "none":
        return learner, jnp.ones_like(reward)
    scale, sigma = update_td_scale(learner.td_scale, reward, gamma, t.terminated, t.truncated, setup.scaler, decay)
    return learner.replace(td_scale=scale), sigma


def value_target(t: Transition, next_value: jax.Array, gamma) -> jax.Array:
    """r + γ (1 - terminated) V(s') [], without gradient; ``next_value`` is of the successor before any reset."""
    return bellman_target(t.reward, t.terminated, next_value, gamma)


def descend(hypers: Hypers, params: PyTree, opt_state: PyTree, gradient: PyTree, learning_rate) -> tuple[PyTree, PyTree]:
    """One step of Adam on one tree; returns ``(params, opt_state)``."""
    step, opt_state = adam(hypers).update(gradient, opt_state)
    # The bound lies where float32 ends: even an absurd learning rate leaves numbers that are finite.
    move = jax.tree.map(lambda p, u: jnp.clip(p - learning_rate * u, -_LARGEST, _LARGEST), params, step)
    return move, opt_state


def descend_both(hypers: Hypers, learner: Learner, gradient: ActorCritic) -> Learner:
    """One step of Adam on actor and critics at once, each with its learning rate."""
    rates = ActorCritic(hypers.learning_rate, hypers.critic_lr)
    stepped = [descend(hypers, *part) for part in zip(learner.params, learner.opt_state, gradient, rates, strict=True)]
    params, opt_state = (ActorCritic(*parts) for parts in zip(*stepped, strict=True))
    return learner.replace(params=params, opt_state=opt_state)


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all numbers of a tree, []."""
    return jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))


def diagnostics(core: Core, learner: Learner, t: Transition, gradient: ActorCritic, td_error, sigma) -> Metrics:
    """What every method reports of one update.

    Args: learner: before it.  gradient: of both losses.  td_error: [] of the first critic, in reward units.  sigma: its scale.
    Returns: ``td_scale`` σ; ``td_error`` |δ| / σ, of order one; ``grad_norm_actor``, ``grad_norm_critic`` and both together as
    ``grad_norm``; ``critic_head_norm``, the bound of the first critic's size with unit features and no bias; ``action_size``,
    mean |a| in [-1, 1].
    """
    actor, critic = (norm(part) for part in gradient)
    return {
        "td_scale": sigma,
        "td_error": jnp.abs(td_error) / sigma,
        "grad_norm": jnp.sqrt(actor**2 + critic**2),
        "grad_norm_actor": actor,
        "grad_norm_critic": critic,
        "critic_head_norm": norm(learner.params.critic[0]["value"]["kernel"]),
        "action_size": jnp.abs(core.networks.squash(t.action)).mean(),
    }


def _where(flag: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.where(flag, new, old), new, old)


def _as_float32(number):
    return None if number is None else jnp.asarray(number, jnp.float32)
