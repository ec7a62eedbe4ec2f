"""Returns and advantages on time-major segments, with terminations and truncations kept apart.

Conventions of every function here. Arrays are ``[T, ...]``: time first, then any axes, independent of each other.
Index ``t`` is the transition from the observation acted on at ``t`` to its successor. ``value[t]`` is V of the
observation acted on, ``next_value[t]`` is V of the successor *before any reset*; ``reward[t]``, ``terminated[t]`` and
``truncated[t]`` belong to that same transition. Flags are bool, or float with 0 and 1. Where both flags are set,
termination wins. ``gamma`` and ``gae_lambda`` are scalars in [0, 1], traced or not. The end of the segment is not the
end of an episode. Rewards, values and results share one unit, that of the reward after any scaling. All results are
under stop-gradient. Shapes that differ raise AssertionError while tracing.
"""

import chex
import jax
import jax.numpy as jnp

from pgjax.errors import RequestError

BOUNDARY_MODES = ("bootstrap", "mask", "terminate")


def _boundaries(terminated, truncated) -> tuple[jax.Array, jax.Array]:
    """Flags as bool arrays that exclude each other; termination wins."""
    terminated, truncated = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
    return terminated, truncated & ~terminated


def _backward_sum(term: jax.Array, weight: jax.Array, last: jax.Array) -> jax.Array:
    """``y[t] = term[t] + weight[t] y[t+1]`` with ``y[T] = last``; all ``y[0..T-1]``."""
    dtype = jnp.result_type(term, weight, last)
    term, weight, last = term.astype(dtype), weight.astype(dtype), last.astype(dtype)

    def body(later, now):
        here = now[0] + now[1] * later
        return here, here

    # Not unrolled: on CPU unrolling made the loop up to 25 times slower to run and 10 times slower to compile.
    return jax.lax.scan(body, last, (term, weight), reverse=True)[1]


def _residual_and_trace(reward, value, next_value, terminated, truncated, gamma, mode):
    """One-step residual ``delta[t]`` and the bool ``follows[t]``: does step ``t+1`` continue the sum of step ``t``?"""
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    chex.assert_axis_dimension_gt(reward, 0, 0)
    terminated, truncated = _boundaries(terminated, truncated)
    if mode == "terminate":
        terminated, truncated = terminated | truncated, jnp.zeros_like(truncated)
    elif mode not in BOUNDARY_MODES:
        raise RequestError(f"boundary mode {mode!r} is unknown; choose one of {', '.join(BOUNDARY_MODES)}")
    # Selected, not multiplied by zero: a non-finite value of a state behind the end must not enter.
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    if mode == "mask":
        delta = jnp.where(truncated, 0.0, delta)
    return delta, ~(terminated | truncated)


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    gae_lambda: float | jax.Array,
    mode: str = "bootstrap",
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates and λ-return targets.

    δ[t] = r[t] + γ (1 - terminated[t]) V'[t] - V[t]
    A[t] = δ[t] + γ λ (1 - done[t]) A[t+1];  A[T] = 0
    R[t] = A[t] + V[t]

    with V' = ``next_value`` and done = terminated or truncated: termination cuts the bootstrap, both cut the sum.

    Args:
      reward, value, next_value, terminated, truncated: [T, ...], see the head of this module.
      gamma, gae_lambda: scalars γ and λ.
      mode: what a truncation does. ``"bootstrap"``: as above. ``"mask"``: a truncated step has A = 0 and R = V, so it
        teaches nothing, and the step before it bootstraps from it (as Brax treats it). ``"terminate"``: it counts as a
        termination.

    Returns:
      advantage [T, ...], value_target [T, ...].

    Raises:
      RequestError: unknown mode.

    Source: Schulman et al. 2015, arXiv 1506.02438, eq. 16, for a finite segment as in arXiv 1707.06347, eqs. 11-12.
    paper: Monte-Carlo value target / authors' code: λ-return / here: λ-return.
    """
    delta, follows = _residual_and_trace(reward, value, next_value, terminated, truncated, gamma, mode)
    advantage = _backward_sum(delta, gamma * gae_lambda * follows, jnp.zeros_like(delta[0]))
    return jax.lax.stop_gradient((advantage, advantage + value))


def gae_brax(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    gae_lambda: float | jax.Array,
    mode: str = "mask",
) -> tuple[jax.Array, jax.Array]:
    """The advantage form of Brax, an ablation: a one-step advantage towards the λ-return.

    A[t] = δ[t] + γ (1 - done[t]) x[t+1];  R[t] = x[t] + V[t];  x[T] = 0

    where x is the advantage of :func:`gae` in the same mode: λ is missing on the first link. Equal to :func:`gae` for
    λ = 1; a two-step advantage for λ = 0. Arguments, shapes and errors as there; the value target is the same.
    ``mode="mask"`` gives the numbers of Brax; the other modes apply its form to the other treatments of truncation.

    Source: google/brax, ``brax/training/agents/ppo/losses.py``, ``compute_gae``.
    paper: λ on every link / authors' code (Brax): not on the first / here: as Brax.
    """
    delta, follows = _residual_and_trace(reward, value, next_value, terminated, truncated, gamma, mode)
    x = _backward_sum(delta, gamma * gae_lambda * follows, jnp.zeros_like(delta[0]))
    x_next = jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])
    return jax.lax.stop_gradient((delta + gamma * follows * x_next, x + value))


def reward_to_go(
    reward: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    bootstrap_value: jax.Array | float = 0.0,
) -> jax.Array:
    """Discounted Monte-Carlo returns.

    G[t] = r[t] + γ ((1 - done[t]) G[t+1] + truncated[t] B[t]);  G[T] = 0

    Args:
      reward, terminated, truncated: [T, ...].
      gamma: scalar γ.
      bootstrap_value: B, [T, ...] or scalar: what a truncated step is worth beyond its reward. V of the successor
        before any reset bootstraps time limits; the default 0 treats them as the end.

    Where the segment ends within an episode the return lacks the rest of it. Either drop those steps with
    :func:`complete_returns_mask`, or mark the last step truncated unless it terminated, so that B stands for the rest.

    Returns:
      return_ [T, ...].

    Source: Williams 1992; boundaries as in Lehmann 2024, arXiv 2401.13662, where B = 0.
    """
    chex.assert_equal_shape([reward, terminated, truncated])
    chex.assert_axis_dimension_gt(reward, 0, 0)
    terminated, truncated = _boundaries(terminated, truncated)
    bootstrap_value = jnp.broadcast_to(jnp.asarray(bootstrap_value, reward.dtype), reward.shape)
    ends_here = reward + gamma * jnp.where(truncated, bootstrap_value, 0.0)
    follows = ~(terminated | truncated)
    return jax.lax.stop_gradient(_backward_sum(ends_here, gamma * follows, jnp.zeros_like(ends_here[0])))


def complete_returns_mask(terminated: jax.Array, truncated: jax.Array) -> jax.Array:
    """Where :func:`reward_to_go` holds every reward of the rest of its episode.

    valid[t] = max over k >= t of done[k]

    Args: terminated, truncated: [T, ...].  Returns: bool [T, ...].
    """
    chex.assert_equal_shape([terminated, truncated])
    done = jnp.asarray(terminated, bool) | jnp.asarray(truncated, bool)
    return jax.lax.cummax(done.astype(jnp.int8), axis=0, reverse=True).astype(bool)


def n_step_return(
    reward: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    n: int,
) -> jax.Array:
    """Returns over at most ``n`` rewards, then bootstrapped.

    G[t] = Σ_{k<m} γ^k r[t+k] + γ^m (1 - terminated[t+m-1]) V'[t+m-1]

    where m <= n counts the steps up to the first end of an episode or the end of the segment, whichever comes first.

    Args:
      reward, next_value, terminated, truncated: [T, ...].
      gamma: scalar γ.
      n: static int, at least 1. The work grows with ``min(n, T)``.

    Returns:
      value_target [T, ...].

    Raises:
      RequestError: n < 1.

    Source: Mnih et al. 2016, arXiv 1602.01783, section 4, which lets m run to the end of the segment (``n >= T``).
    """
    if n < 1:
        raise RequestError(f"n = {n} steps is not a return; give n >= 1")
    chex.assert_equal_shape([reward, next_value, terminated, truncated])
    chex.assert_axis_dimension_gt(reward, 0, 0)
    if n >= reward.shape[0]:
        return lambda_return(reward, next_value, terminated, truncated, gamma, 1.0)
    terminated, truncated = _boundaries(terminated, truncated)
    one_step = reward + gamma * jnp.where(terminated, 0.0, next_value)
    stops = (terminated | truncated).at[-1].set(True)

    def extend(_, target):  # a target over k steps, one step later, becomes one over k + 1 steps here
        return jnp.where(stops, one_step, reward + gamma * jnp.roll(target, -1, axis=0))

    return jax.lax.stop_gradient(jax.lax.fori_loop(1, n, extend, one_step))


def lambda_return(
    reward: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    gae_lambda: float | jax.Array,
) -> jax.Array:
    """λ-returns: the value targets of :func:`gae` in mode ``"bootstrap"``, without V of the observation acted on.

    R[t] = r[t] + γ ((1 - terminated[t]) (1 - λ c[t]) V'[t] + λ c[t] R[t+1]);  c[t] = 1 - done[t];  R[T] = V'[T-1]

    Args: reward, next_value, terminated, truncated: [T, ...].  gamma, gae_lambda: scalars γ and λ.
    Returns: value_target [T, ...].
    Source: Sutton and Barto 2018, section 12.1, written backwards in time.
    """
    chex.assert_equal_shape([reward, next_value, terminated, truncated])
    chex.assert_axis_dimension_gt(reward, 0, 0)
    terminated, truncated = _boundaries(terminated, truncated)
    trace = gae_lambda * ~(terminated | truncated)
    bootstrap = jnp.where(terminated, 0.0, (1 - trace) * next_value)
    return jax.lax.stop_gradient(_backward_sum(reward + gamma * bootstrap, gamma * trace, next_value[-1]))
