"""Running statistics: normalised observations, scaled rewards, normalised values.

Nothing here decides when to update. For observations: use one frozen :class:`RunningMoments` for the rollout and for
all gradient steps on it, then update it from the raw observations acted on, so that the probability ratio is exactly 1
at the first minibatch. For values: keep moments of shape () of the value targets, let the critic predict
``normalize(moments, target)`` and ``denormalize`` its output before computing advantages.
"""

import math

import chex
import flax.struct
import jax
import jax.numpy as jnp

_EPS = 1e-8  # added to the variance under the root
_COUNT_LIMIT = 2**31 - 1

# What VecNormalize and its relatives start from: mean 0 and variance 1 that weigh as much as this many samples.
VEC_NORMALIZE_PRIOR_COUNT = 1e-4


@flax.struct.dataclass
class RunningMoments:
    """Mean and variance of all samples so far.

    mean: shape O, float32.  var: shape O, float32, population variance (divided by n).  count: int32 scalar, samples.

    int32 because float32 stops counting at 2**24. The count stays at its limit of 2**31 - 1 samples, from where on
    the moments are an exponential average over that many. A merge is lost in float32's rounding when the new samples
    are a share below about 6e-8 of all: updates with one sample fade out after some 10**7, larger batches later in
    proportion. Before that the mean of something that is nearly always the same drifts, for what is rare survives the
    rounding and what is common does not: measured with one sample an update and one in a hundred away by as much as the
    mean, by 1 % of it in 10**6 updates and 3 % in 10**7.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def init_moments(shape: tuple[int, ...], dtype=jnp.float32) -> RunningMoments:
    """Moments of nothing: mean 0, variance 1, with which :func:`normalize` changes nothing."""
    return RunningMoments(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.zeros((), jnp.int32))


def update_moments(moments: RunningMoments, batch: jax.Array, prior_count: float = 0.0) -> RunningMoments:
    """Merges a batch into the moments.

    μ ← μ + w d;  σ² ← (1-w) σ² + w s² + w (1-w) d²;  d = m - μ;  w = n / (prior_count + count + n)

    with m and s² the batch's mean and variance and n its number of samples.

    Args:
      moments: of shape O.
      batch: [..., *O]; all leading axes are samples, none is one sample.
      prior_count: weight, in samples, of the mean 0 and variance 1 of the start; the same at every call. 0 gives the
        moments of the data; ``VEC_NORMALIZE_PRIOR_COUNT`` gives those of VecNormalize.

    Returns:
      RunningMoments of the same shape.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    shape, dtype = moments.mean.shape, moments.mean.dtype
    lead = batch.ndim - len(shape)
    chex.assert_shape(batch, (*batch.shape[:lead], *shape))
    n = math.prod(batch.shape[:lead])
    if n == 0:
        return moments
    batch = batch.astype(dtype).reshape(n, *shape)
    batch_mean, batch_var = jnp.mean(batch, axis=0), jnp.var(batch, axis=0)

    total = jnp.minimum(moments.count, _COUNT_LIMIT - n) + n
    weight = n / (total.astype(dtype) + prior_count)
    weight_old = (moments.count.astype(dtype) + prior_count) / (total.astype(dtype) + prior_count)
    delta = batch_mean - moments.mean
    # Starting from the heavier side: a large variance of small weight must not be added first and taken off again.
    var = jnp.where(
        weight > 0.5,
        batch_var + weight_old * (moments.var - batch_var + weight * jnp.square(delta)),
        moments.var + weight * (batch_var - moments.var + weight_old * jnp.square(delta)),
    )
    return RunningMoments(moments.mean + weight * delta, var, total)


def normalize(moments: RunningMoments, x: jax.Array, clip: float | jax.Array | None = None) -> jax.Array:
    """(x - μ) / √(σ² + 1e-8), then clipped to [-clip, clip] unless ``clip`` is None. x [..., *O]; same shape."""
    mean, scale = _mean_and_scale(moments, x)
    x = (x - mean) / scale
    return x if clip is None else jnp.clip(x, -clip, clip)


def denormalize(moments: RunningMoments, x: jax.Array) -> jax.Array:
    """x √(σ² + 1e-8) + μ, the inverse of :func:`normalize` without clip. x [..., *O]; same shape."""
    mean, scale = _mean_and_scale(moments, x)
    return x * scale + mean


def _mean_and_scale(moments: RunningMoments, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.broadcast_to(moments.mean, x.shape), jnp.broadcast_to(jnp.sqrt(moments.var + _EPS), x.shape)


# Reward scaling. The running discounted return of each environment is environment state and must always go on; the
# moments are learned, and a guard against non-finite numbers may hold them back. Hence two arguments, two results.


def rescale(moments: RunningMoments, reward: jax.Array, clip) -> jax.Array:
    """``reward`` of any shape over the standard deviation in ``moments`` [], within ±``clip``, None for no bound.

    Never shifted: subtracting a mean would change what is optimal.
    """
    scaled = reward / jnp.broadcast_to(jnp.sqrt(moments.var + _EPS), reward.shape)
    return scaled if clip is None else jnp.clip(scaled, -clip, clip)


def scale_rewards_batch(
    moments: RunningMoments,
    accumulator: jax.Array,
    reward: jax.Array,
    done: jax.Array,
    gamma: float | jax.Array,
    clip: float | jax.Array | None = 10.0,
) -> tuple[RunningMoments, jax.Array, jax.Array]:
    """Scales a whole batch by one number: the spread of the discounted returns so far, this batch included.

    G[t] = r[t] + γ (1 - done[t-1]) G[t-1];  Var is updated once, with all G;  scaled[t] = clip(r[t] / √(Var + 1e-8))

    Args:
      moments: of shape (), of the returns G of all environments; ``init_moments(())`` at the start.
      accumulator: [B] (1 - done[t]) G[t] of the step before this batch; zeros at the start.
      reward: [T, B] raw rewards.
      done: [T, B] bool or 0/1, terminated or truncated, of the same transitions.
      gamma: scalar γ, the algorithm's own.
      clip: bound of the scaled reward's size; None for no bound.

    Returns:
      moments, accumulator [B], scaled reward [T, B].

    Source: VecNormalize (openai/baselines, Stable-Baselines3).
    authors' code: update and scale at every step / here: once per batch, so that one batch has one reward function.
    """
    done = _done(accumulator, reward, done)

    def body(accumulator, now):
        reward_t, done_t = now
        return_ = reward_t + gamma * accumulator
        return jnp.where(done_t, 0.0, return_).astype(accumulator.dtype), return_

    accumulator, return_ = jax.lax.scan(body, accumulator, (reward, done))
    moments = update_moments(moments, return_, VEC_NORMALIZE_PRIOR_COUNT)
    return moments, accumulator, rescale(moments, reward, clip)


def scale_rewards_per_step(
    moments: RunningMoments,
    accumulator: jax.Array,
    reward: jax.Array,
    done: jax.Array,
    gamma: float | jax.Array,
    clip: float | jax.Array | None = 10.0,
) -> tuple[RunningMoments, jax.Array, jax.Array]:
    """As VecNormalize: at each step add the reward, update the variance, scale, then zero the return where done.

    Arguments and results as :func:`scale_rewards_batch`.
    """
    done = _done(accumulator, reward, done)

    def body(carry, now):
        (moments, accumulator), (reward_t, done_t) = carry, now
        return_ = reward_t + gamma * accumulator
        moments = update_moments(moments, return_, VEC_NORMALIZE_PRIOR_COUNT)
        accumulator = jnp.where(done_t, 0.0, return_).astype(accumulator.dtype)
        return (moments, accumulator), rescale(moments, reward_t, clip)

    (moments, accumulator), scaled = jax.lax.scan(body, (moments, accumulator), (reward, done))
    return moments, accumulator, scaled


def scale_rewards_purejaxrl(
    moments: RunningMoments,
    accumulator: jax.Array,
    reward: jax.Array,
    done: jax.Array,
    gamma: float | jax.Array,
    clip: float | jax.Array | None = None,
) -> tuple[RunningMoments, jax.Array, jax.Array]:
    """As PureJaxRL's wrapper, to reproduce its numbers: another accumulator, step by step, without a clip.

    G[t] = r[t] + γ (1 - done[t]) G[t-1]

    This drops the history one step early and lets an episode's last reward leak into the next episode. Arguments and
    results as :func:`scale_rewards_batch`, but the accumulator is G itself, never zeroed, and ``clip`` is ignored.

    Source: luchris429/purejaxrl, ``purejaxrl/wrappers.py``, ``NormalizeVecReward``.
    """
    del clip
    done = _done(accumulator, reward, done)

    def body(carry, now):
        (moments, accumulator), (reward_t, done_t) = carry, now
        accumulator = (reward_t + gamma * jnp.where(done_t, 0.0, accumulator)).astype(accumulator.dtype)
        moments = update_moments(moments, accumulator, VEC_NORMALIZE_PRIOR_COUNT)
        return (moments, accumulator), rescale(moments, reward_t, None)

    (moments, accumulator), scaled = jax.lax.scan(body, (moments, accumulator), (reward, done))
    return moments, accumulator, scaled


def _done(accumulator: jax.Array, reward: jax.Array, done: jax.Array) -> jax.Array:
    """``done`` as bool, after checking all shapes."""
    chex.assert_equal_shape([reward, done])
    chex.assert_shape(reward, (None, *accumulator.shape))
    return jnp.asarray(done, bool)
