"""Advantages and returns against loops over their definitions, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import estimators
from pgjax.errors import RequestError

pytestmark = pytest.mark.usefixtures("strict")

# Compiled once per shape and mode; called eagerly, every loop would compile again.
gae = jax.jit(estimators.gae, static_argnames="mode")
gae_brax = jax.jit(estimators.gae_brax, static_argnames="mode")
reward_to_go = jax.jit(estimators.reward_to_go)
complete_returns_mask = jax.jit(estimators.complete_returns_mask)
n_step_return = jax.jit(estimators.n_step_return, static_argnames="n")
lambda_return = jax.jit(estimators.lambda_return)

GAMMA, LAMBDA = 0.9, 0.7
MODES = ("bootstrap", "mask", "terminate")


def segment(num_steps=12, num_envs=40, seed=0, end_share=0.3):
    """Random rewards, values and flags. Every entry of ``next_value`` is drawn afresh, also where no episode ends."""
    rng = np.random.default_rng(seed)
    reward, value, next_value = rng.normal(size=(3, num_steps, num_envs))
    terminated, truncated = rng.random((2, num_steps, num_envs)) < end_share / 2
    return reward, value, next_value, terminated, truncated & ~terminated


def continuing_segment(**kwargs):
    """As ``segment``, but V'[t] = V[t+1] wherever the episode goes on, as in a real rollout. Adds V[T]."""
    reward, value, next_value, terminated, truncated = segment(**kwargs)
    last_value = np.random.default_rng(1).normal(size=value.shape[1:])
    after = np.concatenate([value[1:], last_value[None]])
    next_value = np.where(terminated | truncated, next_value, after)
    return (reward, value, next_value, terminated, truncated), after


def gae_by_definition(reward, value, next_value, terminated, truncated, gamma, lam):
    """Σ_l (γλ)^l δ[t+l] Π_{j<l} (1 - done[t+j]), term by term."""
    delta = reward + gamma * (1 - terminated) * next_value - value
    done = np.maximum(terminated, truncated)
    num_steps = len(reward)
    advantage = np.zeros_like(reward)
    for t in range(num_steps):
        for l in range(num_steps - t):
            alive = np.ones_like(reward[0])
            for j in range(l):
                alive = alive * (1 - done[t + j])
            advantage[t] += (gamma * lam) ** l * delta[t + l] * alive
    return advantage


def brax_by_definition(reward, value, value_after, terminated, truncated, gamma, lam):
    """The published recursion, from V of the *returned* next observation: ``x, vs, advantage``."""
    m, goes_on = 1.0 - truncated, 1.0 - terminated
    delta = (reward + gamma * goes_on * value_after - value) * m
    x = np.zeros_like(reward)
    running = np.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        running = delta[t] + gamma * lam * goes_on[t] * m[t] * running
        x[t] = running
    vs = value + x
    vs_after = np.concatenate([vs[1:], value_after[-1:]])
    return x, vs, m * (reward + gamma * goes_on * vs_after - value)


def test_three_by_two_by_hand():
    # gamma = 0.5, lambda = 0.5, so the sum decays by 0.25.
    # env 0: r = 1, 2, 3; V = 4, 2, 6; V' = 2, 6, 8; no end.
    #   delta = 1 + 1 - 4 = -2,  2 + 3 - 2 = 3,  3 + 4 - 6 = 1
    #   A[2] = 1,  A[1] = 3 + 0.25 = 3.25,  A[0] = -2 + 0.8125 = -1.1875
    # env 1: r = 1, 1, 1; V = 2, 2, 2; truncated at 0 with V' = 10, terminated at 1 with V' = 100 (must not count).
    #   V'[2] = 4;  delta = 1 + 5 - 2 = 4,  1 - 2 = -1,  1 + 2 - 2 = 1;  nothing is carried over an end: A = 4, -1, 1
    reward = jnp.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    value = jnp.array([[4.0, 2.0], [2.0, 2.0], [6.0, 2.0]])
    next_value = jnp.array([[2.0, 10.0], [6.0, 100.0], [8.0, 4.0]])
    terminated = jnp.array([[False, False], [False, True], [False, False]])
    truncated = jnp.array([[False, True], [False, False], [False, False]])
    advantage, target = gae(reward, value, next_value, terminated, truncated, 0.5, 0.5)
    np.testing.assert_array_equal(advantage, [[-1.1875, 4.0], [3.25, -1.0], [1.0, 1.0]])
    np.testing.assert_array_equal(target, [[2.8125, 6.0], [5.25, 1.0], [7.0, 3.0]])


@pytest.mark.parametrize("lam", [0.0, LAMBDA, 1.0])
def test_every_pattern_of_ends_in_four_steps(float64, lam):
    """All 4^4 ways to place nothing, termination, truncation or both; where both are set, termination wins."""
    kinds = np.array(list(itertools.product(range(4), repeat=4))).T  # [4, 256]
    terminated, truncated = (kinds & 1).astype(bool), (kinds & 2).astype(bool)
    reward, value, next_value, _, _ = segment(4, kinds.shape[1])
    got, target = gae(reward, value, next_value, terminated, truncated, GAMMA, lam)
    want = gae_by_definition(reward, value, next_value, terminated, truncated & ~terminated, GAMMA, lam)
    np.testing.assert_allclose(got, want, atol=1e-13)
    np.testing.assert_allclose(target, want + value, atol=1e-13)

    got, _ = gae(reward, value, next_value, terminated, truncated, GAMMA, lam, mode="terminate")
    done = terminated | truncated
    want = gae_by_definition(reward, value, next_value, done, np.zeros_like(done), GAMMA, lam)
    np.testing.assert_allclose(got, want, atol=1e-13)

    only = truncated & ~terminated
    for mode in ("mask", "terminate"):
        got, want = (gae(reward, value, next_value, terminated, t, GAMMA, lam, mode=mode)[0] for t in (truncated, only))
        np.testing.assert_array_equal(got, want)
    got, want = (reward_to_go(reward, terminated, t, GAMMA, next_value) for t in (truncated, only))
    np.testing.assert_array_equal(got, want)


def test_long_float32_segment_with_float_flags():
    reward, value, next_value, terminated, truncated = segment(64, 8, end_share=0.1)
    want = gae_by_definition(reward, value, next_value, terminated, truncated, 0.99, 0.95)
    arrays = [jnp.asarray(x, jnp.float32) for x in (reward, value, next_value, terminated, truncated)]
    advantage, target = gae(*arrays, 0.99, 0.95)
    assert advantage.dtype == target.dtype == jnp.float32
    np.testing.assert_allclose(advantage, want, atol=1e-5)


def test_any_trailing_axes(float64):
    arrays = segment(5, 6)
    want, _ = gae(*arrays, GAMMA, LAMBDA)
    got, _ = gae(*(x.reshape(5, 2, 3) for x in arrays), GAMMA, LAMBDA)
    np.testing.assert_array_equal(got.reshape(5, 6), want)
    got, _ = gae(*(x[:, 0] for x in arrays), GAMMA, LAMBDA)
    np.testing.assert_array_equal(got, want[:, 0])


def test_mask_mode_is_the_recursion_of_brax(float64):
    (reward, value, next_value, terminated, truncated), after = continuing_segment()
    x, vs, advantage = brax_by_definition(reward, value, after, terminated, truncated, GAMMA, LAMBDA)
    got, target = gae(reward, value, next_value, terminated, truncated, GAMMA, LAMBDA, mode="mask")
    np.testing.assert_allclose(got, x, atol=1e-13)
    np.testing.assert_allclose(target, vs, atol=1e-13)
    assert truncated.any() and (np.asarray(got)[truncated] == 0).all()
    got, target = gae_brax(reward, value, next_value, terminated, truncated, GAMMA, LAMBDA)
    np.testing.assert_allclose(got, advantage, atol=1e-13)
    np.testing.assert_allclose(target, vs, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_brax_form_converts_to_gae(float64, mode):
    """A_brax = δ + (x - δ) / λ; the two agree for λ = 1; for λ = 0 it is a two-step advantage."""
    arrays, _ = continuing_segment()
    reward, value, next_value, terminated, truncated = arrays
    x, target = gae(*arrays, GAMMA, LAMBDA, mode=mode)
    form, target_form = gae_brax(*arrays, GAMMA, LAMBDA, mode=mode)
    ends = terminated | truncated if mode == "terminate" else terminated
    delta = reward + GAMMA * (1 - ends) * next_value - value
    if mode == "mask":
        delta = delta * (1 - truncated)
    np.testing.assert_allclose(form, delta + (x - delta) / LAMBDA, atol=1e-12)
    np.testing.assert_array_equal(target_form, target)
    np.testing.assert_allclose(gae_brax(*arrays, GAMMA, 1.0, mode=mode)[0], gae(*arrays, GAMMA, 1.0, mode=mode)[0], atol=1e-13)
    two_step = delta.copy()
    two_step[:-1] += GAMMA * (1 - (terminated | truncated)[:-1]) * delta[1:]
    np.testing.assert_allclose(gae_brax(*arrays, GAMMA, 0.0, mode=mode)[0], two_step, atol=1e-13)


def test_three_equal_ways_to_bootstrap(float64):
    """V of all final observations; V[t+1] but for ended steps; reward augmented where truncated, then a plain GAE."""
    (reward, value, next_value, terminated, truncated), after = continuing_segment()
    want, _ = gae(reward, value, next_value, terminated, truncated, GAMMA, LAMBDA)
    patched = np.where(terminated | truncated, next_value, after)
    got, _ = gae(reward, value, patched, terminated, truncated, GAMMA, LAMBDA)
    np.testing.assert_allclose(got, want, atol=1e-13)

    done = terminated | truncated
    augmented = reward + GAMMA * truncated * next_value
    running, plain = np.zeros(reward.shape[1]), np.zeros_like(reward)
    for t in reversed(range(len(reward))):
        running = augmented[t] + GAMMA * (1 - done[t]) * (after[t] + LAMBDA * running) - value[t]
        plain[t] = running
    np.testing.assert_allclose(want, plain, atol=1e-13)


def test_nothing_crosses_the_end_of_an_episode(float64):
    reward, value, next_value, _, _ = segment(8, 2)
    terminated, truncated = np.zeros((2, 8, 2), bool)
    terminated[3, 0] = truncated[3, 1] = True

    def advantage(reward=reward, value=value, next_value=next_value):
        return np.asarray(gae(reward, value, next_value, terminated, truncated, GAMMA, LAMBDA)[0])

    before = advantage()
    later = np.arange(8)[:, None] > 3  # value[4] is that of the reset observation
    after = advantage(reward + 5 * later, value + 7 * later, next_value - 3 * later)
    np.testing.assert_array_equal(after[:4], before[:4])
    assert (after[4:] != before[4:]).all()

    changed = next_value.copy()
    changed[3] += 1.0
    difference = advantage(next_value=changed) - before
    assert (difference[:, 0] == 0).all()  # behind a termination nothing counts
    want = np.where(np.arange(8) <= 3, GAMMA * (GAMMA * LAMBDA) ** (3.0 - np.arange(8)), 0)
    np.testing.assert_allclose(difference[:, 1], want, atol=1e-13)


def test_a_non_finite_value_behind_a_termination_stays_out():
    reward, value, next_value, terminated, truncated = segment()
    next_value = np.where(terminated, np.nan, next_value)
    assert np.isfinite(gae(reward, value, next_value, terminated, truncated, GAMMA, LAMBDA)[0]).all()
    masked = np.where(truncated, np.nan, next_value)
    assert np.isfinite(gae(reward, value, masked, terminated, truncated, GAMMA, LAMBDA, mode="mask")[0]).all()


def test_no_advantage_where_the_values_are_right(float64):
    reward, _, next_value, terminated, truncated = segment()
    value = reward + GAMMA * (1 - terminated) * next_value
    advantage, target = gae(reward, value, next_value, terminated, truncated, GAMMA, LAMBDA)
    np.testing.assert_allclose(advantage, 0, atol=1e-14)
    np.testing.assert_allclose(target, value, atol=1e-14)


def test_constant_reward_tells_the_modes_apart(float64):
    """r = 2 for ever is worth 20; only a mode that takes the time limit for an end sees anything else there."""
    _, _, _, _, truncated = segment(20, 5)
    assert truncated.any()
    reward, value = np.full_like(truncated, 2.0, float), np.full_like(truncated, 20.0, float)
    terminated = np.zeros_like(truncated)
    for mode, at_limit in (("bootstrap", 0.0), ("mask", 0.0), ("terminate", -0.9 * 20)):
        advantage = np.asarray(gae(reward, value, value, terminated, truncated, 0.9, LAMBDA, mode=mode)[0])
        np.testing.assert_allclose(advantage[truncated], at_limit, atol=1e-12)
        assert np.allclose(advantage, 0, atol=1e-12) == (mode != "terminate")


def test_potential_based_shaping_changes_nothing(float64):
    (reward, value, next_value, terminated, truncated), _ = continuing_segment()
    potential, next_potential = np.random.default_rng(2).normal(size=(2, *reward.shape))
    shaped = reward + GAMMA * (1 - terminated) * next_potential - potential
    want, _ = gae(reward, value, next_value, terminated, truncated, GAMMA, LAMBDA)
    got, _ = gae(shaped, value - potential, next_value - next_potential, terminated, truncated, GAMMA, LAMBDA)
    np.testing.assert_allclose(got, want, atol=1e-13)


def test_limits_of_lambda_and_gamma(float64):
    reward, value, next_value, terminated, truncated = segment()
    arrays = (reward, value, next_value, terminated, truncated)
    delta = reward + GAMMA * (1 - terminated) * next_value - value
    np.testing.assert_allclose(gae(*arrays, GAMMA, 0.0)[0], delta, atol=1e-14)
    np.testing.assert_allclose(gae(*arrays, 0.0, LAMBDA)[0], reward - value, atol=1e-14)

    never = np.zeros_like(terminated)
    after = np.concatenate([value[1:], next_value[-1:]])
    _, target = gae(reward, value, after, never, never, GAMMA, 1.0)
    steps = len(reward)
    for t in range(steps):
        want = sum(GAMMA**k * reward[t + k] for k in range(steps - t)) + GAMMA ** (steps - t) * after[-1]
        np.testing.assert_allclose(target[t], want, atol=1e-13)


def test_splitting_a_segment(float64):
    """Bootstrapping at a split changes nothing behind it, and before it something that decays as (γλ)^distance."""
    arrays, _ = continuing_segment(end_share=0.0)
    for lam in (0.0, LAMBDA):
        whole, _ = gae(*arrays, GAMMA, lam)
        first, _ = gae(*(x[:5] for x in arrays), GAMMA, lam)
        second, _ = gae(*(x[5:] for x in arrays), GAMMA, lam)
        np.testing.assert_allclose(second, whole[5:], atol=1e-13)
        decay = (GAMMA * lam) ** np.arange(5, 0, -1.0)
        np.testing.assert_allclose(whole[:5] - first, decay[:, None] * np.asarray(whole[5])[None], atol=1e-13)


@pytest.mark.parametrize("estimate", [estimators.gae, estimators.gae_brax])
def test_no_gradient_flows(estimate):
    arrays = [jnp.asarray(x, jnp.float32) for x in segment(6, 3)]

    def loss(reward, value, next_value, gamma, lam):
        advantage, target = estimate(reward, value, next_value, *arrays[3:], gamma, lam)
        return jnp.sum(advantage**2) + jnp.sum(target**2)

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(*arrays[:3], 0.9, 0.7):
        assert (np.asarray(gradient) == 0).all()


def test_vmap_over_lanes_and_numbers(float64):
    """Lanes with their own data and their own gamma and lambda equal single calls."""
    data = [segment(7, 3, seed) for seed in range(4)]
    gammas, lambdas = np.linspace(0.8, 1.0, 4), np.linspace(0.0, 1.0, 4)
    stacked = [np.stack(arrays) for arrays in zip(*data, strict=True)]
    got = jax.jit(jax.vmap(estimators.gae))(*stacked, gammas, lambdas)
    for i, arrays in enumerate(data):
        want = gae(*arrays, gammas[i], lambdas[i])
        np.testing.assert_allclose(got[0][i], want[0], atol=1e-13)
        np.testing.assert_allclose(got[1][i], want[1], atol=1e-13)


def test_bad_arguments():
    arrays = segment(4, 3)
    with pytest.raises(RequestError, match=r"'bootstrapp'.*bootstrap, mask, terminate") as caught:
        gae(*arrays, GAMMA, LAMBDA, mode="bootstrapp")
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="mask"):
        gae_brax(*arrays, GAMMA, LAMBDA, mode="none")
    with pytest.raises(AssertionError):
        gae(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4][:, 0], GAMMA, LAMBDA)
    with pytest.raises(AssertionError):
        reward_to_go(arrays[0], arrays[3][:-1], arrays[4], GAMMA)
    with pytest.raises(RequestError, match="n = 0"):
        n_step_return(arrays[0], arrays[2], arrays[3], arrays[4], GAMMA, n=0)


def return_by_definition(reward, bootstrap, terminated, truncated, gamma, start, num_steps):
    """Adds rewards one by one from ``start`` until an end, the segment's end or ``num_steps`` rewards; then bootstraps.

    Returns the return without a bootstrap at the segment's end or after ``num_steps``; that bootstrap; the count.
    """
    total = 0.0
    for k in range(num_steps):
        t = start + k
        total += gamma**k * reward[t]
        if terminated[t]:
            return total, 0.0, k + 1
        if truncated[t]:
            return total + gamma ** (k + 1) * bootstrap[t], 0.0, k + 1
        if t + 1 == len(reward):
            break
    return total, gamma ** (k + 1) * bootstrap[t], k + 1


def columns(arrays):
    return [[x[:, b] for x in arrays] for b in range(arrays[0].shape[1])]


def test_reward_to_go(float64):
    reward, _, bootstrap, terminated, truncated = segment()
    got = np.asarray(reward_to_go(reward, terminated, truncated, GAMMA, bootstrap))
    bare = np.asarray(reward_to_go(reward, terminated, truncated, GAMMA))
    constant = np.asarray(reward_to_go(reward, terminated, truncated, GAMMA, 3.0))
    for b, (r, boot, term, trunc) in enumerate(columns((reward, bootstrap, terminated, truncated))):
        for t in range(len(r)):
            for result, value in ((got, boot), (bare, 0 * boot), (constant, 0 * boot + 3)):
                want, _, _ = return_by_definition(r, value, term, trunc, GAMMA, t, len(r))
                np.testing.assert_allclose(result[t, b], want, atol=1e-13)


def test_reward_to_go_of_a_constant_reward(float64):
    """Terminated after n steps: r (1 - γ^n) / (1 - γ). Truncated and bootstrapped: r / (1 - γ) from every step."""
    reward, end = np.full(9, 2.0), np.arange(9) == 8
    return_ = reward_to_go(reward, end, ~end & end, 0.9)
    np.testing.assert_allclose(return_[0], 2 * (1 - 0.9**9) / 0.1, rtol=1e-14)
    np.testing.assert_allclose(reward_to_go(reward, ~end & end, end, 0.9, 20.0), 20.0, rtol=1e-14)


def test_incomplete_returns_are_known_and_touch_nothing_else(float64):
    reward, _, _, terminated, truncated = segment(end_share=0.15)
    valid = np.asarray(complete_returns_mask(terminated, truncated))
    assert valid.dtype == bool
    done = terminated | truncated
    for t in range(len(done)):
        np.testing.assert_array_equal(valid[t], done[t:].any(axis=0))
    assert 0 < valid.sum() < valid.size
    # Other rewards after the last end change no valid return, and change every other one.
    before = np.asarray(reward_to_go(reward, terminated, truncated, GAMMA))
    after = np.asarray(reward_to_go(reward + 9 * ~valid, terminated, truncated, GAMMA))
    np.testing.assert_array_equal(after[valid], before[valid])
    assert (after[~valid] != before[~valid]).all()
    floats = complete_returns_mask(terminated.astype(np.float32), truncated.astype(np.float32))
    np.testing.assert_array_equal(floats, valid)


@pytest.mark.parametrize("n", [1, 2, 5, 12, 100])
def test_n_step_return(float64, n):
    reward, _, next_value, terminated, truncated = segment()
    got = np.asarray(n_step_return(reward, next_value, terminated, truncated, GAMMA, n=n))
    for b, (r, after, term, trunc) in enumerate(columns((reward, next_value, terminated, truncated))):
        for t in range(len(r)):
            total, tail, _ = return_by_definition(r, after, term, trunc, GAMMA, t, n)
            np.testing.assert_allclose(got[t, b], total + tail, atol=1e-13)


@pytest.mark.parametrize("lam", [0.0, LAMBDA, 1.0])
def test_lambda_return_is_the_mixture_of_n_step_returns(float64, lam):
    """(1 - λ) Σ_n λ^(n-1) G^(n), with all weight left over on the longest return; and the value target of GAE."""
    arrays, _ = continuing_segment()
    reward, _, next_value, terminated, truncated = arrays
    got = np.asarray(lambda_return(reward, next_value, terminated, truncated, GAMMA, lam))
    for b, (r, after, term, trunc) in enumerate(columns((reward, next_value, terminated, truncated))):
        for t in range(len(r)):
            longest = return_by_definition(r, after, term, trunc, GAMMA, t, len(r))[2]
            want = 0.0
            for n in range(1, longest + 1):
                total, tail, _ = return_by_definition(r, after, term, trunc, GAMMA, t, n)
                weight = lam ** (n - 1) * (1 - lam) if n < longest else lam ** (n - 1)
                want += weight * (total + tail)
            np.testing.assert_allclose(got[t, b], want, atol=1e-13)
    np.testing.assert_allclose(got, gae(*arrays, GAMMA, lam)[1], atol=1e-13)


def test_no_gradient_through_returns():
    reward, _, next_value, terminated, truncated = (jnp.asarray(x, jnp.float32) for x in segment(6, 3))

    def loss(reward, next_value):
        flags = terminated, truncated
        returns = (
            reward_to_go(reward, *flags, GAMMA, next_value),
            n_step_return(reward, next_value, *flags, GAMMA, n=3),
            n_step_return(reward, next_value, *flags, GAMMA, n=9),
            lambda_return(reward, next_value, *flags, GAMMA, LAMBDA),
        )
        return sum(jnp.sum(x**2) for x in returns)

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(reward, next_value):
        assert (np.asarray(gradient) == 0).all()
