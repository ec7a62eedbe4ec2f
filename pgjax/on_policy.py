"""The loop every on-policy method shares: collect, estimate advantages, update.

A paper's file brings an ``update`` (often ``minibatch_sgd`` of its own objective), sometimes an ``estimate``, and gets an
``Algorithm`` from ``make``. Everything that decides whether two curves may be compared, from the boundaries of episodes to
the normalisers, lives here once.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from pgjax import estimators, metrics, normalizers, sampling_error
from pgjax.action_maps import make_action_map
from pgjax.errors import RequestError, close_names
from pgjax.networks import ActorCritic, Networks, make_networks
from pgjax.optimizers import init_opt_state, ravelled
from pgjax.spaces import Discrete
from pgjax.types import Algorithm, Environment, PyTree

_Hypers = TypeVar("_Hypers", bound=struct.PyTreeNode)
# Fields of Hypers that are no single number but the parameters of something learned.
LEARNED = ("objective", "rule")
# Counters are int32; float32 ones would stop counting at 2**24.
MAX_ENV_STEPS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Setup:
    """What fixes a shape, a loop length or a branch; each new value compiles again.

    num_envs, num_steps: the batch of one iteration, B environments times T steps.
    num_epochs, num_minibatches: passes over the batch, and the parts each pass is cut into.
    minibatch_by: ``transition`` shuffles single samples; ``unroll`` shuffles whole environments, keeping time together.
    boundary: how an episode's end enters the advantages: ``bootstrap`` (right), ``mask`` (Brax), ``terminate`` (CleanRL).
    advantage_form: ``gae``, or ``brax`` (lambda missing on the first link).
    brax_exact: with boundary ``mask``, let masked samples enter normalisation and loss as Brax does.
    advantage_recompute: with which critic: the one at ``rollout``, at each ``epoch``, or at each ``minibatch`` (unrolls only).
    normalize_advantage: over the ``minibatch``, the ``batch``, or ``none``.
    advantage_std: of the ``population`` (divide by N), or of the ``sample`` (by N - 1).
    value_loss: ``clipped`` (to value_clip_eps around the old value) or ``squared``; both carry the factor 1/2.
    learning_rate_schedule: ``linear`` to zero over the run, ``constant``, or ``adaptive_kl`` (towards desired_kl).
    optimizer: ``adam``; ``rmsprop`` (epsilon inside the root, accumulator from one), ``rmsprop_torch`` (outside, from zero).
    gradient_clip: by the norm over actor and critic ``joint``ly, over each ``separate``ly, ``elementwise``, or ``none``.
    early_stop: on the sampled KL exceeding target_kl: ``off``; ``minibatch``, before each step; ``epoch``, after the last
        minibatch of an epoch. Steps after the stop are masked.
    normalize_obs, normalize_value: running statistics, frozen within an iteration.
    reward_scaling: ``none``; ``batch``, ``per_step`` or ``purejaxrl`` accumulation of the discounted return's spread.
    distribution, action_map, torso, shared_torso, hidden_sizes, critic_hidden_sizes, activation, kernel_init,
    policy_head_scale, log_std_init: see ``pgjax.networks`` and ``pgjax.action_maps``.
    sampling_error: measured in every iteration by one of the protocols of ``pgjax.sampling_error``, whose fit takes
        ``sampling_error_epochs`` passes over the batch; or ``off``.
    """

    num_envs: int = 8
    num_steps: int = 128
    num_epochs: int = 1
    num_minibatches: int = 1
    minibatch_by: Literal["transition", "unroll"] = "transition"
    boundary: Literal["bootstrap", "mask", "terminate"] = "bootstrap"
    advantage_form: Literal["gae", "brax"] = "gae"
    brax_exact: bool = False
    advantage_recompute: Literal["rollout", "epoch", "minibatch"] = "rollout"
    normalize_advantage: Literal["minibatch", "batch", "none"] = "minibatch"
    advantage_std: Literal["population", "sample"] = "population"
    value_loss: Literal["clipped", "squared"] = "squared"
    learning_rate_schedule: Literal["linear", "constant", "adaptive_kl"] = "linear"
    optimizer: Literal["adam", "rmsprop", "rmsprop_torch"] = "adam"
    gradient_clip: Literal["joint", "separate", "elementwise", "none"] = "joint"
    early_stop: Literal["off", "minibatch", "epoch"] = "off"
    normalize_obs: bool = False
    normalize_value: bool = False
    reward_scaling: Literal["none", "batch", "per_step", "purejaxrl"] = "none"
    distribution: str = "auto"
    action_map: str = "auto"
    torso: str = "auto"
    shared_torso: bool = False
    hidden_sizes: tuple[int, ...] | None = None
    critic_hidden_sizes: tuple[int, ...] | None = None
    activation: str = "tanh"
    kernel_init: str = "orthogonal"
    policy_head_scale: float | None = 0.01
    log_std_init: float = 0.0
    sampling_error: Literal["off", "last_layer", "authors"] = "off"
    sampling_error_epochs: int = 2000


class Hypers(struct.PyTreeNode):
    """Numbers that only enter arithmetic; every leaf a float32 scalar, so new values never compile again.

    learning_rate: of the actor, and times ``critic_lr_scale`` of the critic.
    anneal_env_steps: the horizon over which schedules run, in environment steps; the runner fills it in.
    obs_clip, reward_clip: bounds after normalisation, in standard deviations.  reward_scale: factor on every reward.
    objective: parameters of a pluggable objective, a pytree, or None.
    """

    learning_rate: jax.Array | float = 3e-4
    critic_lr_scale: jax.Array | float = 1.0
    gamma: jax.Array | float = 0.99
    gae_lambda: jax.Array | float = 0.95
    value_coef: jax.Array | float = 0.5
    value_clip_eps: jax.Array | float = 0.2
    entropy_coef: jax.Array | float = 0.0
    max_grad_norm: jax.Array | float = 0.5
    adam_eps: jax.Array | float = 1e-5
    adam_b1: jax.Array | float = 0.9
    adam_b2: jax.Array | float = 0.999
    rmsprop_decay: jax.Array | float = 0.99
    rmsprop_eps: jax.Array | float = 1e-5
    target_kl: jax.Array | float = 0.02
    desired_kl: jax.Array | float = 0.01
    obs_clip: jax.Array | float = 10.0
    reward_clip: jax.Array | float = 10.0
    reward_scale: jax.Array | float = 1.0
    anneal_env_steps: jax.Array | float = np.inf
    objective: PyTree = None


class Learner(struct.PyTreeNode):
    """The learned part: what is held at its last finite value when an update goes non-finite.

    params: one vector for the actor and one for the critic; ``core.unravel`` gives the networks' trees.
    opt_state: one optimiser state for each of the two vectors.
    lr_scale: factor on the learning rate, moved by the ``adaptive_kl`` schedule, else one.
    extra: what a method learns besides, such as penalty coefficients; None if nothing.
    """

    params: ActorCritic
    opt_state: ActorCritic
    lr_scale: jax.Array
    obs_moments: Any
    reward_moments: Any
    value_moments: Any
    extra: PyTree


class State(struct.PyTreeNode):
    """All that is carried from one iteration to the next, for one lane.

    key: typed key. env_steps: int32. obs [B, *O] raw. reward_return, episode_return [B] float32, episode_length [B] int32.
    nonfinite: bool, whether an update was ever refused. memory: what a method keeps of earlier batches, else None.
    obs_clip: bound of normalised observations, kept here for the policy that is handed out.
    """

    key: jax.Array
    env_steps: jax.Array
    learner: Learner
    env_state: PyTree
    obs: jax.Array
    reward_return: jax.Array
    episode_return: jax.Array
    episode_length: jax.Array
    nonfinite: jax.Array
    env_params: PyTree
    obs_clip: jax.Array
    memory: PyTree


class Batch(struct.PyTreeNode):
    """One iteration's samples, ``[T, B, ...]``, or a minibatch of them, ``[N, ...]``.

    obs, final_obs: normalised with the frozen statistics.  action: in the policy's own space, before the action map.
    reward: scaled.  value, next_value: of ``obs`` and ``final_obs``; with value normalisation in normalised units.
    weight: 1 for samples that enter the losses, else 0; None if all do.
    present: bool, whether there is a sample at all, in a buffer that is not full yet; None if all are there.
    advantage: reward units, not yet normalised.  value_target: in the critic's units.
    """

    obs: jax.Array
    final_obs: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    dist_old: Any
    log_prob_old: jax.Array
    value: Any
    next_value: Any
    weight: Any = None
    advantage: Any = None
    value_target: Any = None
    present: Any = None


class Transitions(struct.PyTreeNode):
    """Steps [T, B, ...] as they were: obs and final_obs not normalised, action in the policy's own space, reward not scaled."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_obs: jax.Array


class Played(NamedTuple):
    """What ``play`` returns of its steps.

    dist: of the policy that acted, [T, B].  episode_return, episode_length: [T, B], of the episode up to and with this step.
    """

    transitions: Transitions
    dist: Any
    episode_return: jax.Array
    episode_length: jax.Array


class Policy(NamedTuple):
    """The part that acts: the actor's parameters, ravelled, and the observation statistics it was trained with (or None)."""

    actor: PyTree
    obs_moments: Any
    obs_clip: jax.Array


class Core(NamedTuple):
    """The static things every part needs.

    networks: take ravelled parameters, ``ActorCritic`` of two vectors.  unravel: those to the networks' trees.
    tree_policy: ``networks.policy`` on such a tree, for loops in which the parameters stay the same.
    action_map: policy-space actions to the environment's bounds.
    """

    env: Environment
    setup: Any
    networks: Networks
    unravel: Callable[[ActorCritic], ActorCritic]
    tree_policy: Callable[[ActorCritic, jax.Array], Any]
    action_map: Callable[[jax.Array], jax.Array]


def make(
    name: str,
    env: Environment,
    setup: Setup,
    hypers: Hypers,
    *,
    update: Callable,
    estimate: Callable | None = None,
    collector: Callable | None = None,
    init_extra: Callable | None = None,
    init_memory: Callable | None = None,
    networks: Networks | None = None,
) -> Algorithm:
    """Puts a method together from its parts.

    Args:
      name: public id.  env, setup, hypers: as the names say; ``hypers`` are the defaults of the returned algorithm.
      update: ``(core, key, learner, batch, hypers, progress) -> (learner, metrics)``: all gradient steps of one iteration.
      estimate: ``(core, hypers, learner, batch) -> batch`` with advantage, value_target and weight; GAE by default.
      collector: ``(core, keys, state, hypers) -> (state, batch, metrics, moments)``, in place of ``collect``; it gets four
        keys. It may move ``state.memory``, and ``state.learner.extra``, which the update then goes on from.
      init_extra: ``(core, hypers) -> pytree`` for ``Learner.extra``.
      init_memory: ``(core, hypers) -> pytree`` for ``State.memory``.
      networks: a ``Networks``; built from ``setup`` by default.

    Raises: RequestError naming the field, the value and the remedy.
    """
    validate(setup, env)
    hypers = as_hypers(hypers)
    networks = networks or make_networks(
        env.observation_space,
        env.action_space,
        hidden_sizes=setup.hidden_sizes,
        critic_hidden_sizes=setup.critic_hidden_sizes,
        activation=setup.activation,
        kernel_init=setup.kernel_init,
        policy_head_scale=setup.policy_head_scale,
        log_std_init=setup.log_std_init,
        distribution=setup.distribution,
        torso=setup.torso,
        shared_torso=setup.shared_torso,
    )
    tree_policy = networks.policy
    networks, unravel = ravelled(networks)
    core = Core(env, setup, networks, unravel, tree_policy, make_action_map(action_map_name(setup, env), env.action_space))
    estimate = estimate or gae_estimate
    collector = collector or collect

    def init(key, hypers, env_params=None):
        key, key_network, key_reset, key_state = jax.random.split(key, 4)
        params = networks.init(key_network)
        env_state, obs = env.reset(jax.random.split(key_reset, setup.num_envs), _env_params(env, env_params))
        zeros = jnp.zeros(setup.num_envs)
        learner = Learner(
            params=params,
            opt_state=init_opt_state(setup, hypers, params),
            lr_scale=jnp.ones(()),
            obs_moments=normalizers.init_moments(env.observation_space.shape) if setup.normalize_obs else None,
            reward_moments=normalizers.init_moments(()) if setup.reward_scaling != "none" else None,
            value_moments=normalizers.init_moments(()) if setup.normalize_value else None,
            extra=init_extra(core, hypers) if init_extra else None,
        )
        return State(
            key=key_state,
            env_steps=jnp.zeros((), jnp.int32),
            learner=learner,
            env_state=env_state,
            obs=obs,
            reward_return=zeros,
            episode_return=zeros,
            episode_length=jnp.zeros(setup.num_envs, jnp.int32),
            nonfinite=jnp.zeros((), bool),
            env_params=env_params,
            obs_clip=jnp.asarray(hypers.obs_clip, jnp.float32),
            memory=init_memory(core, hypers) if init_memory else None,
        )

    def step(state, hypers):
        key, key_update, key_entropy, *keys_collect, key_error = jax.random.split(state.key, 8)
        # Progress before the iteration: the first one runs at the full learning rate, the last one at 1/num_iterations of it.
        progress = jnp.clip(state.env_steps / hypers.anneal_env_steps, 0, 1)
        old = state.learner
        state, batch, collected, moments = collector(core, keys_collect, state, hypers)
        batch = estimate(core, hypers, old, batch)
        new, update_metrics = update(core, key_update, state.learner, batch, hypers, progress)
        # The statistics move only now, after the gradient steps: the ratio was exactly 1 at the first minibatch.
        value_moments = old.value_moments
        if setup.normalize_value and batch.value_target is not None:
            # Of the steps just taken: those that a buffer still holds were counted when they were new.
            target = normalizers.denormalize(value_moments, batch.value_target[-setup.num_steps :])
            value_moments = normalizers.update_moments(value_moments, target)
        new = new.replace(obs_moments=moments[0], reward_moments=moments[1], value_moments=value_moments)

        nonfinite, learner = gate(state.nonfinite, new, old)
        dist = networks.policy(learner.params, batch.obs)
        log_ratio = dist.log_prob(batch.action) - batch.log_prob_old
        step_metrics = {
            **collected,
            **update_metrics,
            **metrics.policy_change(log_ratio, batch.dist_old, dist, batch.present),
            "entropy": dist.entropy(key_entropy).mean(where=batch.present),
        }
        if setup.sampling_error != "off":
            error = sampling_error.of_batch(core, key_error, old.params, batch.obs, batch.action, batch.present)
            step_metrics |= {**error, **sampling_error.frequency_gap(batch.dist_old, batch.action, batch.present)}
        if batch.value_target is not None:
            step_metrics["explained_variance"] = metrics.explained_variance(batch.value, batch.value_target, batch.weight)
        step_metrics = {
            name: value if name.startswith("episode_") else jnp.where(nonfinite & jnp.isnan(value), 0, value)
            for name, value in step_metrics.items()
        }
        step_metrics["nonfinite"] = nonfinite.astype(jnp.float32)
        obs_clip = jnp.where(nonfinite, state.obs_clip, hypers.obs_clip).astype(state.obs_clip.dtype)
        state = state.replace(key=key, learner=learner, nonfinite=nonfinite, obs_clip=obs_clip)
        return state, step_metrics

    def act(policy, obs, key=None):
        if policy.obs_moments is not None:
            obs = normalizers.normalize(policy.obs_moments, obs, clip=policy.obs_clip)
        dist = networks.policy(ActorCritic(policy.actor, None), obs)
        return core.action_map(dist.mode() if key is None else dist.sample(key))

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


def collect(core: Core, keys, state: State, hypers: Hypers):
    """Plays T steps in B environments with the policy and statistics of ``state``. ``keys`` begin with three keys.

    Returns: ``(state, batch, metrics, (obs_moments, reward_moments))``; the state has everything but its learner moved on,
    and the moments, which already hold this batch, are to be installed after the gradient steps.
    """
    setup, learner = core.setup, state.learner
    state, draws = draw_rollout(core, keys, state, hypers)
    state, played = play(core, core.unravel(learner.params), state, draws, hypers)
    steps = played.transitions
    reward, reward_moments, state = scale_rewards(setup, hypers, learner.reward_moments, state, steps)
    batch = with_values(
        core,
        learner.params,
        Batch(
            obs=normalize_obs(learner, hypers, steps.obs),
            final_obs=normalize_obs(learner, hypers, steps.final_obs),
            action=steps.action,
            reward=reward,
            terminated=steps.terminated,
            truncated=steps.truncated,
            dist_old=played.dist,
            log_prob_old=played.dist.log_prob(steps.action),
            value=None,
            next_value=None,
        ),
    )
    state, collected = count_steps(setup, state, played)
    return state, batch, collected, (update_obs_moments(learner, steps.obs), reward_moments)


def normalize_obs(learner: Learner, hypers: Hypers, obs: jax.Array) -> jax.Array:
    """``obs`` [..., *O] with the learner's statistics, if it keeps some."""
    if learner.obs_moments is None:
        return obs
    return normalizers.normalize(learner.obs_moments, obs, clip=hypers.obs_clip)


def update_obs_moments(learner: Learner, obs: jax.Array):
    """The learner's statistics with raw observations [T, B, *O] added; None if it keeps none."""
    return None if learner.obs_moments is None else normalizers.update_moments(learner.obs_moments, obs)


def draw_rollout(core: Core, keys, state: State, hypers: Hypers):
    """``(state, draws)``: environments ready for T steps, and all random numbers of those, [T, B, ...].

    They are drawn before the scan, in a few large operations instead of many small ones.
    """
    env, setup = core.env, core.setup
    env_params = _env_params(env, state.env_params)
    key_refresh, key_action, key_env = keys[:3]
    shape = (setup.num_steps, setup.num_envs)
    params = core.unravel(state.learner.params)
    noise = core.tree_policy(params, normalize_obs(state.learner, hypers, state.obs)).draw_noise(key_action, shape[:1])
    draws = jax.random.split(key_env, shape)
    if hasattr(env, "presample"):
        draws = env.presample(draws, env_params)  # pyright: ignore[reportAttributeAccessIssue]
    return state.replace(env_state=env.refresh(key_refresh, state.env_state, env_params)), (draws, noise)


def play(core: Core, params: ActorCritic, state: State, draws, hypers: Hypers) -> tuple[State, Played]:
    """Plays the steps of ``draws`` with the policy of ``params``, which are trees, and the statistics of ``state``."""
    env, learner = core.env, state.learner
    env_params = _env_params(env, state.env_params)
    env_step = env.step_presampled if hasattr(env, "presample") else env.step  # pyright: ignore[reportAttributeAccessIssue]

    def step(carry, draw):
        env_state, obs, episode_return, episode_length = carry
        draw_env, noise = draw
        dist = core.tree_policy(params, normalize_obs(learner, hypers, obs))
        action = dist.sample_with(noise)
        env_state, timestep = env_step(draw_env, env_state, core.action_map(action), env_params)
        episode_return = episode_return + timestep.reward
        episode_length = episode_length + 1
        ended = timestep.terminated | timestep.truncated
        steps = Transitions(obs, action, timestep.reward, timestep.terminated, timestep.truncated, timestep.final_obs)
        out = Played(steps, dist, episode_return, episode_length)
        episode_return, episode_length = jax.tree.map(
            lambda total: jnp.where(ended, 0, total), (episode_return, episode_length)
        )
        return (env_state, timestep.obs, episode_return, episode_length), out

    carry = (state.env_state, state.obs, state.episode_return, state.episode_length)
    (env_state, obs, episode_return, episode_length), played = jax.lax.scan(step, carry, draws)
    state = state.replace(env_state=env_state, obs=obs, episode_return=episode_return, episode_length=episode_length)
    return state, played


def count_steps(setup, state: State, played: Played):
    """``(state, metrics)`` with T B more environment steps, and with the episodes that ended in them."""
    state = state.replace(env_steps=state.env_steps + setup.num_envs * setup.num_steps)
    ended = played.transitions.terminated | played.transitions.truncated
    episodes = ended.sum()
    return state, {
        "env_steps": state.env_steps,
        "episodes": episodes.astype(jnp.float32),
        "episode_return": jnp.where(ended, played.episode_return, 0).sum() / episodes,  # NaN where no episode ended
        "episode_length": jnp.where(ended, played.episode_length, 0).sum() / episodes,
    }


def scale_rewards(setup, hypers, moments, state: State, steps: Transitions):
    """``(scaled reward [T, B], moments, state)`` by the scaling that ``setup`` names; the state's discounted return goes on."""
    reward = steps.reward * hypers.reward_scale
    if setup.reward_scaling == "none":
        return reward, moments, state
    scale = {
        "batch": normalizers.scale_rewards_batch,
        "per_step": normalizers.scale_rewards_per_step,
        "purejaxrl": normalizers.scale_rewards_purejaxrl,
    }[setup.reward_scaling]
    ended = steps.terminated | steps.truncated
    moments, reward_return, reward = scale(moments, state.reward_return, reward, ended, hypers.gamma, hypers.reward_clip)
    return reward, moments, state.replace(reward_return=reward_return)


def with_values(core: Core, params: ActorCritic, batch: Batch) -> Batch:
    """The batch with the critic's opinion of ``obs`` and of ``final_obs``, the successor before any reset."""
    value, next_value = (core.networks.value(params, obs) for obs in (batch.obs, batch.final_obs))
    return batch.replace(value=value, next_value=next_value)


def gae_estimate(core: Core, hypers: Hypers, learner: Learner, batch: Batch) -> Batch:
    """Fills in advantage, value_target and weight by generalised advantage estimation, as ``setup`` says."""
    setup, moments = core.setup, learner.value_moments
    value, next_value = batch.value, batch.next_value
    if moments is not None:
        value, next_value = (normalizers.denormalize(moments, v) for v in (value, next_value))
    form = {"gae": estimators.gae, "brax": estimators.gae_brax}[setup.advantage_form]
    advantage, value_target = form(
        batch.reward,
        value,
        next_value,
        batch.terminated,
        batch.truncated,
        hypers.gamma,
        hypers.gae_lambda,
        mode=setup.boundary,
    )
    if moments is not None:
        value_target = normalizers.normalize(moments, value_target)
    weight = None
    if setup.boundary == "mask" and not setup.brax_exact:
        weight = 1.0 - batch.truncated
    if batch.present is not None:
        weight = batch.present * (1.0 if weight is None else weight)
    return batch.replace(advantage=advantage, value_target=value_target, weight=weight)


def gate(nonfinite: jax.Array, new: PyTree, old: PyTree) -> tuple[jax.Array, PyTree]:
    """``(whether this lane is or became non-finite, new if it is not, else old)``.

    Only for the learned part: a select over environment state or a buffer would copy it.
    """
    nonfinite = nonfinite | ~all_finite(new)
    return nonfinite, jax.tree.map(lambda new, old: jnp.where(nonfinite, old, new), new, old)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every number of every floating leaf is finite, as one bool."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def action_map_name(setup: Setup, env: Environment) -> str:
    """``auto`` clips a Gaussian's sample to the bounds and squashes a tanh-Gaussian's into them."""
    if setup.action_map != "auto":
        return setup.action_map
    if isinstance(env.action_space, Discrete):
        return "identity"
    return "tanh_affine" if setup.distribution.startswith("tanh") else "clip"


def as_hypers(hypers: _Hypers, **changes) -> _Hypers:
    """Checks the numbers and turns every leaf into a float32 array, so that no later call traces again.

    Raises: RequestError for an unknown field, and for NaN, negative or out-of-range values.
    """
    names = [field.name for field in dataclasses.fields(hypers)]  # pyright: ignore[reportArgumentType]
    fields = {name: getattr(hypers, name) for name in names}
    for name, value in changes.items():
        if name not in fields:
            raise RequestError(f"hypers.{name} is not a hyperparameter here; {close_names(name, fields)}")
        fields[name] = value
    for name, value in fields.items():
        if name in LEARNED:
            fields[name] = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), value)
            continue
        if isinstance(value, Tracer):
            continue
        try:
            fields[name] = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            raise RequestError(f"hypers.{name} = {value!r} is not a number; give one") from None
        if fields[name].ndim:
            shape = fields[name].shape
            raise RequestError(f"hypers.{name} has shape {shape}, not a single number; to sweep, vmap over stacked hypers")
        _check_hyper(name, fields[name])
    return type(hypers)(**fields)


_AT_MOST_ONE = ("gamma", "gae_lambda", "rmsprop_decay", "tau")
_BELOW_ONE = ("adam_b1", "adam_b2")
_MAY_BE_INFINITE = (
    *("max_grad_norm", "target_kl", "obs_clip", "reward_clip", "anneal_env_steps", "value_clip_eps"),
    *("behavior_clip_eps", "behavior_target_kl", "behavior_max_grad_norm"),
)


def _check_hyper(name, value):
    shown = value.item()
    if np.isnan(value):
        raise RequestError(f"hypers.{name} = {shown} is not a number; give a finite one")
    if value < 0:
        raise RequestError(f"hypers.{name} = {shown} is negative; give a value >= 0")
    if name in _AT_MOST_ONE and value > 1:
        raise RequestError(f"hypers.{name} = {shown} is above 1; give a value in [0, 1]")
    if name in _BELOW_ONE and value >= 1:
        raise RequestError(f"hypers.{name} = {shown} must be below 1; give a value in [0, 1)")
    if name not in _MAY_BE_INFINITE and np.isinf(value):
        raise RequestError(f"hypers.{name} = {shown} is infinite; give a finite value")
    if name == "anneal_env_steps" and value == 0:
        raise RequestError("hypers.anneal_env_steps = 0; give the number of environment steps the run will take")


def validate(setup: Setup, env: Environment) -> None:
    """Raises RequestError for a setup that cannot run, naming the field, the value and the remedy."""
    counts = ("num_envs", "num_steps", "_epochs", "_minibatches", "_iterations", "_batches")
    check_counts(setup, [field.name for field in dataclasses.fields(setup) if field.name.endswith(counts)])
    check_choices(setup)
    unrolls = setup.minibatch_by == "unroll"
    # What a behaviour policy is fitted to grows, and ends in a minibatch that is not full.
    cut = (field.name for field in dataclasses.fields(setup) if field.name != "behavior_minibatches")
    for name in (name for name in cut if name.endswith("_minibatches")):
        _check_divides(name, getattr(setup, name), setup, unrolls)
    if setup.advantage_recompute == "minibatch" and not unrolls:
        raise RequestError(
            "setup.advantage_recompute = 'minibatch' needs time-contiguous samples; add setup.minibatch_by = 'unroll'"
        )
    if setup.advantage_recompute == "minibatch" and setup.normalize_advantage == "batch":
        raise RequestError(
            "setup.normalize_advantage = 'batch' has no effect with advantage_recompute = 'minibatch'; use 'minibatch'"
        )
    if setup.boundary != "mask" and setup.brax_exact:
        raise RequestError(f"setup.brax_exact = True has no effect with boundary = {setup.boundary!r}; use boundary = 'mask'")


def check_counts(setup: Any, names: Iterable[str], where: str = "setup.") -> None:
    """Raises RequestError unless these fields are whole numbers from 1 on. where: what stands before a field's name."""
    for name in names:
        value = getattr(setup, name)
        if not isinstance(value, int) or value < 1:
            raise RequestError(f"{where}{name} = {value!r} must be a whole number >= 1")


def check_choices(setup: Any, where: str = "setup.") -> None:
    """Raises RequestError unless every field of a few choices is one of them. where: what stands before a field's name."""
    for name, hint in get_type_hints(type(setup)).items():
        value = getattr(setup, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise RequestError(f"{where}{name} = {value!r} is not one of {', '.join(get_args(hint))}")


def _check_divides(name: str, value: int, setup: Setup, unrolls: bool) -> None:
    parts, what = (setup.num_envs, "num_envs") if unrolls else (setup.num_envs * setup.num_steps, "num_envs * num_steps")
    if parts % value:
        near = [n for n in range(1, parts + 1) if parts % n == 0]
        near = sorted(near, key=lambda n: abs(n - value))[:3]
        raise RequestError(f"setup.{name} = {value} does not divide {what} = {parts}; try {', '.join(map(str, sorted(near)))}")


def _env_params(env: Environment, env_params: PyTree) -> PyTree:
    """None stands for the defaults, which the compiler then sees as constants."""
    return env.default_params if env_params is None else env_params
