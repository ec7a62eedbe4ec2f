"""PROPS, Proximal Robust On-Policy Sampling (Corrado and Hanna 2023, arXiv 2311.08290).

PPO whose data are collected by another policy, so that they look more on-policy than on-policy data do. Every few steps the
behaviour policy φ starts from the target policy θ and moves a little away from the actions that the buffer holds too often.
PPO then updates θ on the last ``buffer_batches`` batches as if θ had collected them: no importance weights.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from pgjax import normalizers, on_policy, sampling_error
from pgjax.algorithms import ppo
from pgjax.errors import RequestError
from pgjax.networks import ActorCritic
from pgjax.optimizers import adam
from pgjax.spaces import Discrete
from pgjax.types import PyTree
from pgjax.updates import masked_mean, minibatch_sgd, plug

# How data are collected is all that is added to PPO, and no shared setting.
DEFINING = ()

# Quantiles of the ratio φ / θ over an iteration's steps that are reported.
RATIOS = {"behavior_ratio_min": 0.0, "behavior_ratio_q05": 0.05, "behavior_ratio_q95": 0.95, "behavior_ratio_max": 1.0}


@dataclasses.dataclass(frozen=True)
class Setup(ppo.Setup):
    """buffer_batches: b, how many batches of num_envs * num_steps transitions the buffer holds, the newest one included.

    behavior: ``fitted`` as above, or the ``target`` policy itself, which makes PPO-Buffer.
    behavior_num_steps: steps of each environment between two fits of the behaviour policy; divides num_steps.
    behavior_epochs, behavior_minibatches: passes of a fit over its data, and the parts that a full buffer (or batch, see
        behavior_data) is cut into; for what a fit leaves out there are fewer.
    behavior_optimizer: ``adam``, whose moments go on from fit to fit, or ``sgd``.
    behavior_kl: what ties φ to θ: ``target_behavior``, KL(θ ‖ φ), or ``behavior_target_mean``, KL(φ ‖ θ) divided by the number
        of action dimensions; ``auto`` is the former for discrete actions and the latter for continuous ones.
    behavior_data: what a fit corrects: the ``buffer`` without the transitions that the next steps will push out, or the
        ``current_batch``; ``auto`` is the latter if the buffer holds one batch only.
    stale_target: as in the authors' code, the first fit after an update takes ratios to the policy before the update.
    """

    buffer_batches: int = 2
    behavior: Literal["fitted", "target"] = "fitted"
    behavior_num_steps: int = 16
    behavior_epochs: int = 16
    behavior_minibatches: int = 8
    behavior_optimizer: Literal["adam", "sgd"] = "adam"
    behavior_kl: Literal["auto", "target_behavior", "behavior_target_mean"] = "auto"
    behavior_data: Literal["auto", "buffer", "current_batch"] = "auto"
    stale_target: bool = False


class Hypers(ppo.Hypers):
    """behavior_learning_rate: of the behaviour policy, constant.  behavior_max_grad_norm: bound on its gradient's norm.

    behavior_clip_eps: an action whose ratio φ / θ is below 1 - behavior_clip_eps is pushed down no further.
    behavior_kl_coef: λ, weight of the KL between φ and θ.  behavior_target_kl: a fit ends at a sampled KL above it, nats.
    """

    behavior_learning_rate: jax.Array | float = 1e-3
    behavior_clip_eps: jax.Array | float = 0.3
    behavior_kl_coef: jax.Array | float = 0.1
    behavior_target_kl: jax.Array | float = 0.03
    behavior_max_grad_norm: jax.Array | float = 0.5


def props_surrogate(log_ratio: jax.Array, clip_eps) -> jax.Array:
    """PROPS' objective per sample, to be maximised: min(-r, -clip(r, 1-ε, 1+ε)) with r = π_φ / π_θ.

    PPO's clipped surrogate at an advantage of -1 everywhere: the slope in r is -1, and 0 where r < 1 - ε. At φ = θ its mean
    descends the likelihood of the data, which leaves frequencies alone that are those of θ.
    Args: log_ratio [N], log r; clip_eps scalar.  Returns: [N].
    Source: eq. 4 of the paper, there (second-hand) with the sign inside the clip, which would be degenerate.
    """
    return ppo.clip_surrogate(log_ratio, -jnp.ones_like(log_ratio), clip_eps)


def behavior_divergence(dist, dist_target, kind: str) -> jax.Array:
    """The regulariser per state, [N] nats: KL(θ ‖ φ), or KL(φ ‖ θ) averaged over action dimensions.

    paper: KL(θ ‖ φ) (from memory, unverified) / authors' code: Gaussian: the second; discrete: the sampled action's term of the
    first / here: either, without sampling.
    """
    if kind == "target_behavior":
        return dist_target.kl(dist)
    dimensions = dist.mean.shape[-1] if hasattr(dist, "log_std") else 1
    return dist.kl(dist_target) / dimensions


class Samples(NamedTuple):
    """What a behaviour policy is fitted to, time in front, the newest last: obs normalised, θ's opinion beside it."""

    obs: jax.Array
    action: jax.Array
    dist: Any
    log_prob: jax.Array


class Memory(struct.PyTreeNode):
    """The buffer.  steps: the last b T steps of each environment [b T, B], in order of time.

    num_steps: int32 [], how many of those there are; the first ones are missing.
    reference: ``(obs, action)`` [b T, B] that the target policies would have collected themselves, or None; see ``make``.
    """

    steps: on_policy.Transitions
    num_steps: jax.Array
    reference: PyTree


class Fit(NamedTuple):
    """How a fit went. steps: minibatch steps taken.  kl, clip_fraction: on the last minibatch that was looked at.

    failed: whether φ went non-finite, in which case θ itself collects.
    """

    steps: jax.Array
    kl: jax.Array
    clip_fraction: jax.Array
    failed: jax.Array


def fit_behavior(core, key, target, opt_state, samples: Samples, present, hypers):
    """Moves φ from θ down the likelihood of ``samples``: at most ``behavior_epochs`` passes of clipped, regularised steps.

    It stops before the first step whose minibatch shows a sampled KL above ``behavior_target_kl``. Samples that are not
    ``present`` come last in every pass, and minibatches without any are left out.

    Args:
      target: θ [P].  opt_state: of φ, from the fit before.  samples: [K, B, ...], with the policy that ratios are taken to.
      present: [K, B] bool.
    Returns: ``(φ [P], opt_state, Fit)``.
    """
    setup = core.setup
    optimizer = _optimizer(setup, hypers)
    samples, present = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (samples, present))
    num, count = len(present), present.sum()
    batches = setup.buffer_batches if _data_kind(setup) == "buffer" else 1
    size = -(-batches * setup.num_steps * setup.num_envs // setup.behavior_minibatches)
    num_parts = -(-num // size)

    def loss(actor, part: Samples, weight):
        dist = core.networks.policy(ActorCritic(actor, None), part.obs)
        log_ratio = dist.log_prob(part.action) - part.log_prob
        excess = jnp.expm1(log_ratio)  # r - 1
        objective = props_surrogate(log_ratio, hypers.behavior_clip_eps)
        objective = objective - hypers.behavior_kl_coef * behavior_divergence(dist, part.dist, _kl_kind(core))
        kl, clipped = masked_mean(excess - log_ratio, weight), masked_mean(excess < -hypers.behavior_clip_eps, weight)
        return -masked_mean(objective, weight), (kl, clipped)

    def shuffle(key):
        """A random order [num_parts, size] with what is not there behind everything else."""
        words = (jax.random.bits(key, (num,), jnp.uint32) >> 1) | ((~present).astype(jnp.uint32) << 31)
        return jnp.pad(jnp.argsort(words), (0, num_parts * size - num)).reshape(num_parts, size)

    def epoch(carry):
        number, *carry = carry
        order = shuffle(jax.random.fold_in(key, number)) if num_parts > 1 else None

        def minibatch_step(carry):
            number, actor, opt_state, going, fit = carry
            part, weight = samples, present * 1.0
            if order is not None:
                rows = order[number]
                part = jax.tree.map(lambda x: x[rows], samples)
                weight = (number * size + jnp.arange(size) < count) * 1.0
            gradient, (kl, clipped) = jax.grad(loss, has_aux=True)(actor, part, weight)
            going = ~(kl > hypers.behavior_target_kl)
            norm = jnp.linalg.norm(gradient)
            gradient = gradient * jnp.minimum(1.0, hypers.behavior_max_grad_norm / jnp.maximum(norm, 1e-12))
            direction, new_opt_state = optimizer.update(gradient, opt_state)
            new = (actor - hypers.behavior_learning_rate * direction, new_opt_state)
            actor, opt_state = jax.tree.map(lambda new, old: jnp.where(going, new, old), new, (actor, opt_state))
            return number + 1, actor, opt_state, going, fit._replace(steps=fit.steps + going, kl=kl, clip_fraction=clipped)

        def goes_on(carry):
            return carry[3] & (carry[0] * size < count)

        _, *carry = jax.lax.while_loop(goes_on, minibatch_step, (jnp.int32(0), *carry))
        return number + 1, *carry

    # Loops that end, not masked steps of fixed length: many fits stop after a tenth of their steps.
    nothing = jnp.zeros_like(samples.log_prob, shape=())
    fit = Fit(jnp.int32(0), nothing, nothing, jnp.zeros((), bool))
    _, actor, opt_state, _, fit = jax.lax.while_loop(
        lambda carry: carry[3] & (carry[0] < setup.behavior_epochs),
        epoch,
        (jnp.int32(0), target, opt_state, count > 0, fit),
    )
    failed = ~on_policy.all_finite(actor)
    return jnp.where(failed, target, actor), opt_state, fit._replace(failed=failed)


def collect(core, keys, state: on_policy.State, hypers):
    """T steps and the buffer that they complete, as ``on_policy.collect`` returns its batch; ``keys`` are four.

    The batch is the whole buffer, b T steps in order of time, under θ and with the statistics of now.
    """
    setup, learner, memory = core.setup, state.learner, state.memory
    *keys_rollout, key_behavior = keys
    key_fits, key_reference = jax.random.split(key_behavior)
    reference, reference_metrics = memory.reference, {}
    if setup.sampling_error != "off":
        reference, reference_metrics = _refer(core, key_reference, state, hypers)

    state, draws = on_policy.draw_rollout(core, keys_rollout, state, hypers)
    window = _judge(core, learner, hypers, memory.steps)
    play = _play_fitted if setup.behavior == "fitted" else _play_target
    state, window, played, behavior_metrics = play(core, key_fits, state, window, draws, hypers)

    _, reward_moments, state = on_policy.scale_rewards(setup, hypers, learner.reward_moments, state, played.transitions)
    steps = _push(memory.steps, played.transitions)
    num_steps = jnp.minimum(memory.num_steps + setup.num_steps, len(steps.reward))
    batch = on_policy.Batch(
        obs=window.obs,
        final_obs=on_policy.normalize_obs(learner, hypers, steps.final_obs),
        action=window.action,
        reward=_scale(setup, hypers, reward_moments, steps.reward),
        terminated=steps.terminated,
        truncated=steps.truncated,
        dist_old=window.dist,
        log_prob_old=window.log_prob,
        value=None,
        next_value=None,
        present=_newest(num_steps, steps.reward.shape) if setup.buffer_batches > 1 else None,
    )
    batch = on_policy.with_values(core, learner.params, batch)
    state, collected = on_policy.count_steps(setup, state, played)
    state = state.replace(memory=Memory(steps, num_steps, reference))
    moments = (on_policy.update_obs_moments(learner, played.transitions.obs), reward_moments)
    return state, batch, {**collected, **behavior_metrics, **reference_metrics}, moments


def _play_target(core, key, state, window, draws, hypers):
    """T steps of the target policy."""
    state, played = on_policy.play(core, core.unravel(state.learner.params), state, draws, hypers)
    return state, _push(window, _judge(core, state.learner, hypers, played.transitions)), played, {}


def _play_fitted(core, key, state, window, draws, hypers):
    """T steps, ``behavior_num_steps`` at a time, before each of which the behaviour policy is fitted anew."""
    setup, learner, num_old = core.setup, state.learner, state.memory.num_steps
    length = setup.behavior_num_steps
    phases = setup.num_steps // length
    stale = _judge(core, learner, hypers, state.memory.steps, learner.extra["previous"]) if setup.stale_target else None

    def phase(carry, x):
        state, window, opt_state = carry
        number, key, draws = x
        samples = window
        if stale is not None:
            # authors' code: ratios to the policy before the update, for φ that starts from the one after / here: an option.
            samples = jax.tree.map(lambda now, stale: jnp.where(number == 0, stale, now), window, stale)
        # Without the steps that the next ones will push out.
        samples = jax.tree.map(lambda x: x[length:], samples)
        held = number * length + (num_old if _data_kind(setup) == "buffer" else 0)
        present = _newest(held, samples.log_prob.shape)
        actor, opt_state, fit = fit_behavior(core, key, learner.params.actor, opt_state, samples, present, hypers)
        state, played = on_policy.play(core, core.unravel(ActorCritic(actor, None)), state, draws, hypers)
        window = _push(window, _judge(core, learner, hypers, played.transitions))
        return (state, window, opt_state), (played, fit, (held > 0) * 1.0)

    draws = jax.tree.map(lambda x: x.reshape(phases, length, *x.shape[1:]), draws)
    xs = (jnp.arange(phases), jax.random.split(key, phases), draws)
    (state, window, opt_state), by_phase = jax.lax.scan(phase, (state, window, learner.extra["opt_state"]), xs)
    played, fits, counts = by_phase
    played = jax.tree.map(lambda x: x.reshape(setup.num_steps, *x.shape[2:]), played)

    extra = {**learner.extra, "opt_state": opt_state}
    if setup.stale_target:
        extra["previous"] = learner.params.actor
    # A fit that failed collected with θ; the learner is held all the same, for its optimiser may be spoilt.
    state = state.replace(learner=learner.replace(extra=extra), nonfinite=state.nonfinite | fits.failed.any())
    target = jax.tree.map(lambda x: x[-setup.num_steps :], window)
    ratio = jnp.exp(played.dist.log_prob(target.action) - target.log_prob)
    return (
        state,
        window,
        played,
        {
            # Exact, of the policies that collected, at the states they met.
            "behavior_kl": played.dist.kl(target.dist).mean(),
            **dict(zip(RATIOS, jnp.quantile(ratio, jnp.array(list(RATIOS.values()))), strict=True)),
            # Over the fits that had something to fit to.
            "behavior_kl_sampled": masked_mean(fits.kl, counts),
            "behavior_clip_fraction": masked_mean(fits.clip_fraction, counts),
            "behavior_steps": masked_mean(fits.steps * 1.0, counts),
        },
    )


def _refer(core, key, state, hypers):
    """Adds what θ itself would have collected from here on to the reference; ``(reference, its sampling error)``.

    paper: nothing of this (not read) / authors' code: all b target policies play again at every measurement / here: each one
    plays once, and the buffer keeps it.
    """
    learner = state.learner
    *keys_rollout, key_error = jax.random.split(key, 4)
    num_steps = state.memory.num_steps + core.setup.num_steps
    state, draws = on_policy.draw_rollout(core, keys_rollout, state, hypers)
    _, played = on_policy.play(core, core.unravel(learner.params), state, draws, hypers)
    obs, action = _push(state.memory.reference, (played.transitions.obs, played.transitions.action))
    seen = on_policy.normalize_obs(learner, hypers, obs)
    present = _newest(num_steps, obs.shape[:2])
    error = sampling_error.of_batch(core, key_error, learner.params, seen, action, present)
    return (obs, action), {f"{name}_reference": value for name, value in error.items()}


def make(
    env,
    setup: Setup = Setup(),
    hypers: Hypers = Hypers(),  # noqa: B008
    *,
    objective=None,
    networks=None,
    name: str = "props",
):
    """PROPS on ``env``. ``objective`` replaces the clipped surrogate of the target's update, as in PPO.

    With ``sampling_error`` on there is ``sampling_error_reference`` beside it, that of data which the same target policies
    collect themselves, from the same states; they cost as many environment steps again, which are not counted.
    """
    on_policy.validate(setup, env)
    _validate(setup)

    def clipped(sample, hypers, extra):
        return ppo.clip_surrogate(sample.log_ratio, sample.advantage, hypers.clip_eps)

    objective, hypers = plug(objective, clipped, hypers)
    descend = minibatch_sgd(objective)

    def update(core, key, learner, batch, hypers, progress):
        """PPO's, on the whole buffer."""
        core = core._replace(setup=dataclasses.replace(setup, num_steps=len(batch.reward)))
        extra = learner.extra
        learner, metrics = descend(core, key, learner.replace(extra=None), batch, hypers, progress)
        return learner.replace(extra=extra), metrics

    def init_extra(core, hypers):
        if setup.behavior == "target":
            return None
        actor = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(core.networks.init, jax.random.key(0)).actor)
        extra = {"opt_state": _optimizer(setup, hypers).init(actor)}
        # Before the first update nothing is stale, and there is nothing to fit to either.
        return {**extra, "previous": actor} if setup.stale_target else extra

    def init_memory(core, hypers):
        shape = (setup.buffer_batches * setup.num_steps, setup.num_envs)
        obs = jnp.zeros((*shape, *env.observation_space.shape))

        def act(key, obs):
            return core.networks.policy(core.networks.init(key), obs).mode()

        action = jax.eval_shape(act, jax.random.key(0), obs)
        action = jnp.zeros(action.shape, action.dtype)
        ended = jnp.zeros(shape, bool)
        steps = on_policy.Transitions(obs, action, jnp.zeros(shape), ended, ended, obs)
        return Memory(steps, jnp.int32(0), None if setup.sampling_error == "off" else (obs, action))

    return on_policy.make(
        name,
        env,
        setup,
        hypers,
        update=update,
        collector=collect,
        init_extra=init_extra,
        init_memory=init_memory,
        networks=networks,
    )


def _judge(core, learner, hypers, steps: on_policy.Transitions, actor=None) -> Samples:
    """Raw steps as samples, with the opinion of ``actor`` [P], θ if None."""
    obs = on_policy.normalize_obs(learner, hypers, steps.obs)
    dist = core.networks.policy(ActorCritic(learner.params.actor if actor is None else actor, None), obs)
    return Samples(obs, steps.action, dist, dist.log_prob(steps.action))


def _push(buffer: PyTree, new: PyTree) -> PyTree:
    """``buffer`` [K, ...] with its oldest steps pushed out by ``new`` [M, ...]: always in order of time."""
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new])[len(new) :], buffer, new)


def _newest(count: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[K, B] bool: the last ``count`` steps."""
    return jnp.broadcast_to((jnp.arange(shape[0], 0, -1) <= count)[:, None], shape)


def _scale(setup, hypers, moments, reward: jax.Array) -> jax.Array:
    """Raw rewards of the whole buffer by today's statistics, whichever way ``reward_scaling`` gathers them."""
    reward = reward * hypers.reward_scale
    if moments is None:
        return reward
    return normalizers.rescale(moments, reward, None if setup.reward_scaling == "purejaxrl" else hypers.reward_clip)


def _optimizer(setup, hypers) -> optax.GradientTransformation:
    """The behaviour policy's, without learning rate."""
    if setup.behavior_optimizer == "sgd":
        return optax.identity()
    return adam(hypers)


def _kl_kind(core) -> str:
    kind, discrete = core.setup.behavior_kl, isinstance(core.env.action_space, Discrete)
    return kind if kind != "auto" else "target_behavior" if discrete else "behavior_target_mean"


def _data_kind(setup) -> str:
    kind = setup.behavior_data
    return kind if kind != "auto" else "buffer" if setup.buffer_batches > 1 else "current_batch"


def _validate(setup: Setup) -> None:
    steps, length, batches = setup.num_steps, setup.behavior_num_steps, setup.buffer_batches
    if batches > 1 and setup.minibatch_by == "unroll":
        raise RequestError("setup.minibatch_by = 'unroll' would mix batches of the buffer; use 'transition'")
    if batches > 1 and setup.early_stop == "epoch":
        raise RequestError("setup.early_stop = 'epoch' looks at minibatches that may still be empty; use 'minibatch'")
    if setup.behavior == "target":
        if setup.stale_target:
            raise RequestError("setup.stale_target = True has no effect with behavior = 'target'; use False")
        return
    if steps % length:
        near = sorted((n for n in range(1, steps + 1) if steps % n == 0), key=lambda n: abs(n - length))[:3]
        raise RequestError(
            f"setup.behavior_num_steps = {length} does not divide num_steps = {steps}; try {', '.join(map(str, sorted(near)))}"
        )
    if steps == length and (batches == 1 or _data_kind(setup) == "current_batch"):
        raise RequestError(
            f"setup.behavior_num_steps = {length} is all of num_steps, which leaves nothing to fit to; use less, or "
            "behavior = 'target'"
        )
