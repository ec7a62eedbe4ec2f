"""Running statistics against NumPy float64, Gymnasium and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.wrappers.utils import RunningMeanStd

from pgjax import normalizers
from pgjax.normalizers import RunningMoments, init_moments

pytestmark = pytest.mark.usefixtures("strict")

update_moments = jax.jit(normalizers.update_moments)
normalize = jax.jit(normalizers.normalize)
denormalize = jax.jit(normalizers.denormalize)
SCALINGS = {
    "batch": jax.jit(normalizers.scale_rewards_batch),
    "per_step": jax.jit(normalizers.scale_rewards_per_step),
    "purejaxrl": jax.jit(normalizers.scale_rewards_purejaxrl),
}
PRIOR = normalizers.VEC_NORMALIZE_PRIOR_COUNT
GAMMA = 0.9


def batches(num=6, seed=0, shape=(5, 4), size=3, offset=0.0, scale=1.0):
    """Batches [*shape, size] whose mean and spread wander, so that merging them is not trivial."""
    rng = np.random.default_rng(seed)
    return [
        (offset + scale * (rng.normal(size=size) + rng.lognormal(size=size) * rng.normal(size=(*shape, size)))).astype(
            np.float32
        )
        for _ in range(num)
    ]


@pytest.mark.parametrize(
    "offset, scale", [(0.0, 1.0), (1e3, 1.0), (-1e4, 0.1), (0.0, 1e-5), (3e5, 1e4)], ids=lambda x: f"{x:g}"
)
def test_merged_batches_equal_numpy_over_all_samples(offset, scale):
    """Also far from zero, where a sum of squares in float32 has no digit left, and for tiny variances."""
    data = batches(offset=offset, scale=scale)
    moments = init_moments((3,))
    for batch in data:
        moments = update_moments(moments, batch)
    samples = np.concatenate([batch.reshape(-1, 3) for batch in data]).astype(np.float64)
    np.testing.assert_allclose(moments.mean, samples.mean(0), rtol=1e-5, atol=1e-5 * scale + 1e-6 * abs(offset))
    np.testing.assert_allclose(moments.var, samples.var(0), rtol=1e-4 if abs(offset) < 1e4 * scale else 3e-3)
    assert moments.count == len(samples) and moments.count.dtype == jnp.int32
    assert moments.mean.dtype == moments.var.dtype == jnp.float32


def test_leading_axes_batch_sizes_and_order_do_not_matter(float64):
    data = np.random.default_rng(0).normal(size=(24, 2, 3))
    whole = update_moments(init_moments((2, 3), jnp.float64), data)
    np.testing.assert_allclose(whole.mean, data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.var, data.var(0), rtol=1e-12)
    reshaped = update_moments(init_moments((2, 3), jnp.float64), data.reshape(4, 3, 2, 2, 3))
    unequal = init_moments((2, 3), jnp.float64)
    for part in (data[20:], data[:1], data[1:20]):
        unequal = update_moments(unequal, part)
    one_by_one = init_moments((2, 3), jnp.float64)
    for sample in data:  # no leading axis is one sample
        one_by_one = update_moments(one_by_one, sample)
    empty = update_moments(whole, data[:0])
    for other in (reshaped, unequal, one_by_one, empty):
        np.testing.assert_allclose(other.mean, whole.mean, atol=1e-14)
        np.testing.assert_allclose(other.var, whole.var, rtol=1e-12)
        assert other.count == 24


def test_scalar_moments_and_lanes():
    data = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    lanes = jax.vmap(lambda _: init_moments(()))(jnp.arange(3))
    lanes = jax.jit(jax.vmap(normalizers.update_moments))(lanes, data)
    np.testing.assert_allclose(lanes.mean, data.mean(1), atol=1e-6)
    np.testing.assert_allclose(lanes.var, data.var(1), rtol=1e-5)


def test_prior_count_equals_gymnasium():
    ours, theirs = init_moments((3,)), RunningMeanStd(epsilon=PRIOR, shape=(3,))
    for batch in batches(offset=5.0, shape=(4,)):
        ours = update_moments(ours, batch, PRIOR)
        theirs.update(batch.astype(np.float64))
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5)
        np.testing.assert_allclose(ours.var, theirs.var, rtol=1e-4)


def test_count_goes_on_past_2_to_the_24_and_stays_at_its_limit():
    moments = RunningMoments(jnp.zeros(()), jnp.ones(()), jnp.int32(2**24))
    for i in range(1, 4):
        moments = update_moments(moments, jnp.ones((1,)))
        assert moments.count == 2**24 + i
    moments = RunningMoments(jnp.zeros(()), jnp.ones(()), jnp.int32(2**31 - 3))
    for _ in range(3):
        moments = update_moments(moments, jnp.full((1000,), 5.0))
        assert moments.count == 2**31 - 1
        assert 0 < moments.mean < 1e-5 and 1 <= moments.var < 1.0001


def test_statistics_do_not_drift_when_a_batch_is_a_tiny_share():
    """10 000 batches with exactly the moments held, each a share of 5e-8 to 8e-8, around float32's rounding error."""
    batch = jnp.array([1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0])  # mean 2, variance 1
    for count in (100_000_000, 130_000_000, 160_000_000):
        start = RunningMoments(jnp.float32(2.0), jnp.float32(1.0), jnp.int32(count))
        step = jax.jit(lambda moments: jax.lax.fori_loop(0, 10_000, lambda _, m: normalizers.update_moments(m, batch), moments))
        end = step(start)
        assert end.count == count + 80_000
        np.testing.assert_allclose([end.mean, end.var], [2.0, 1.0], rtol=1e-6)


def test_an_outlier_among_very_many_samples_keeps_its_share():
    """Variance 1 of 8e8 samples and a batch of 8 with variance 1e10: 1 + 1e-8 1e10 = 101, less the batch's own share."""
    start = RunningMoments(jnp.float32(0.0), jnp.float32(1.0), jnp.int32(800_000_000))
    end = update_moments(start, jnp.tile(jnp.array([-1e5, 1e5]), 4))
    np.testing.assert_allclose(end.var, 101.0, rtol=1e-5)


def test_normalize_is_the_identity_before_any_data_and_invertible_after():
    data = batches()
    x = jnp.asarray(data[0])
    np.testing.assert_array_equal(normalize(init_moments((3,)), x), x)
    np.testing.assert_array_equal(denormalize(init_moments((3,)), x), x)
    moments = update_moments(init_moments((3,)), data[0])
    normalized = np.asarray(normalize(moments, x))
    np.testing.assert_allclose(normalized.mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std((0, 1)), 1, rtol=1e-4)
    np.testing.assert_allclose(denormalize(moments, normalized), x, atol=1e-5)
    mean, std = data[0].mean((0, 1), dtype=np.float64), data[0].std((0, 1), dtype=np.float64)
    np.testing.assert_allclose(normalize(moments, x[0, 0]), (data[0][0, 0] - mean) / std, atol=1e-5)


def test_clip_and_constant_features():
    moments = RunningMoments(jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.int32(5))
    x = jnp.array([[30.0, 0.0], [-0.5, 1.0]])
    np.testing.assert_allclose(normalize(moments, x, clip=10.0), [[10.0, 0.0], [-0.5, 10.0]])
    np.testing.assert_allclose(normalize(moments, x), [[30.0, 0.0], [-0.5, 1e4]], rtol=1e-6)


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        normalizers.update_moments(init_moments((3,)), jnp.zeros((5, 4)))
    with pytest.raises(AssertionError):
        normalizers.scale_rewards_batch(init_moments(()), jnp.zeros(3), jnp.zeros((5, 4)), jnp.zeros((5, 4)), GAMMA)
    with pytest.raises(AssertionError):
        normalizers.scale_rewards_batch(init_moments(()), jnp.zeros(4), jnp.zeros((5, 4)), jnp.zeros((5, 1)), GAMMA)


def rewards(num_steps=30, num_envs=4, seed=0):
    rng = np.random.default_rng(seed)
    return (3 + 2 * rng.normal(size=(num_steps, num_envs))).astype(np.float32), rng.random((num_steps, num_envs)) < 0.15


class PlainVecNormalize:
    """What VecNormalize does at a step, in float64: add, update, scale, clip, zero."""

    def __init__(self, num_envs, gamma, clip):
        self.rms, self.gamma, self.clip = RunningMeanStd(epsilon=1e-4, shape=()), gamma, clip
        self.returns = np.zeros(num_envs)

    def step(self, reward, done):
        self.returns = self.returns * self.gamma + reward
        self.rms.update(self.returns)
        scaled = np.clip(reward / np.sqrt(self.rms.var + 1e-8), -self.clip, self.clip)
        self.returns[done] = 0.0
        return scaled


class PlainPureJaxRL(PlainVecNormalize):
    """What PureJaxRL's wrapper does at a step: the mask multiplies the history before the reward is added; no clip."""

    def step(self, reward, done):
        self.returns = self.returns * self.gamma * (1 - done) + reward
        self.rms.update(self.returns)
        return reward / np.sqrt(self.rms.var + 1e-8)


@pytest.mark.parametrize("method, plain", [("per_step", PlainVecNormalize), ("purejaxrl", PlainPureJaxRL)])
def test_step_by_step_scalings_equal_the_plain_loops(method, plain):
    reward, done = rewards()
    reference = plain(4, GAMMA, 2.5)
    want = np.stack([reference.step(r.astype(np.float64), d) for r, d in zip(reward, done, strict=True)])
    moments, accumulator, scaled = SCALINGS[method](init_moments(()), jnp.zeros(4), reward, done, GAMMA, 2.5)
    np.testing.assert_allclose(scaled, want, rtol=2e-4)
    np.testing.assert_allclose(accumulator, reference.returns, rtol=1e-5)
    np.testing.assert_allclose([moments.mean, moments.var], [reference.rms.mean, reference.rms.var], rtol=1e-4)
    clipped = np.abs(want) == 2.5
    assert clipped.any() == (method == "per_step") and not clipped.all()


def test_batch_scaling_uses_one_variance_that_includes_the_batch():
    moments, accumulator = init_moments(()), jnp.zeros(4)
    carried, seen = np.zeros(4), []
    for seed in range(3):
        reward, done = rewards(seed=seed)
        moments, accumulator, scaled = SCALINGS["batch"](moments, accumulator, reward, done, GAMMA, None)
        for r, d in zip(reward.astype(np.float64), done, strict=True):
            carried = r + GAMMA * carried
            seen.append(carried)
            carried = np.where(d, 0.0, carried)
        everything = np.stack(seen)
        # The start, mean 0 and variance 1, weighs 1e-4 of a sample.
        n = everything.size
        var = (1e-4 * 1 + n * everything.var() + everything.mean() ** 2 * n * 1e-4 / (n + 1e-4)) / (n + 1e-4)
        np.testing.assert_allclose(moments.var, var, rtol=1e-4)
        np.testing.assert_allclose(scaled, reward / np.sqrt(var), rtol=1e-4)
        np.testing.assert_allclose(accumulator, carried, rtol=1e-5)


@pytest.mark.parametrize("method", SCALINGS)
def test_the_accumulator_goes_on_across_batches(method):
    """Two halves leave what the whole leaves; step by step they also scale alike."""
    reward, done = rewards()
    whole = SCALINGS[method](init_moments(()), jnp.zeros(4), reward, done, GAMMA, 10.0)
    first = SCALINGS[method](init_moments(()), jnp.zeros(4), reward[:15], done[:15], GAMMA, 10.0)
    second = SCALINGS[method](first[0], first[1], reward[15:], done[15:], GAMMA, 10.0)
    np.testing.assert_allclose(second[1], whole[1], rtol=1e-5)
    np.testing.assert_allclose(second[0].var, whole[0].var, rtol=1e-4)
    assert second[0].count == whole[0].count == reward.size
    if method != "batch":
        np.testing.assert_allclose(np.concatenate([first[2], second[2]]), whole[2], rtol=1e-4)


@pytest.mark.parametrize("method", SCALINGS)
def test_the_accumulator_does_not_depend_on_the_statistics(method):
    """So the statistics may be held back while the environments go on."""
    reward, done = rewards()
    held = RunningMoments(jnp.float32(7.0), jnp.float32(50.0), jnp.int32(1000))
    a = SCALINGS[method](init_moments(()), jnp.ones(4), reward, done.astype(np.float32), GAMMA, 10.0)
    b = SCALINGS[method](held, jnp.ones(4), reward, done, GAMMA, 10.0)
    np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize("method", SCALINGS)
def test_scaling_divides_and_never_shifts(method):
    """Zero stays zero, signs stay, and the unit of the rewards drops out."""
    reward, done = rewards()
    reward[::3] = 0.0
    scaled = np.asarray(SCALINGS[method](init_moments(()), jnp.zeros(4), reward, done, GAMMA, 10.0)[2])
    np.testing.assert_array_equal(np.sign(scaled), np.sign(reward))
    larger = np.asarray(SCALINGS[method](init_moments(()), jnp.zeros(4), 1000 * reward, done, GAMMA, 10.0)[2])
    np.testing.assert_allclose(larger[5:], scaled[5:], rtol=1e-2)


def test_done_separates_episodes_but_for_purejaxrl():
    """Reward 1 then an end: the next return starts at 0 plus its reward; PureJaxRL carries the last reward over."""
    reward, done = jnp.array([[1.0], [1.0], [1.0]]), jnp.array([[False], [True], [False]])
    for method, want in (("batch", 1.0), ("per_step", 1.0), ("purejaxrl", 1.0 + 0.5 * 1.0)):
        _, accumulator, _ = SCALINGS[method](init_moments(()), jnp.zeros(1), reward, done, 0.5, None)
        np.testing.assert_allclose(accumulator, [want])


def test_scaling_lanes_with_their_own_gamma():
    data = [rewards(seed=seed) for seed in range(3)]
    reward, done = (jnp.stack(x) for x in zip(*data, strict=True))
    gammas = jnp.array([0.5, 0.9, 0.99])
    lanes = jax.vmap(lambda _: init_moments(()))(gammas)
    got = jax.jit(jax.vmap(normalizers.scale_rewards_batch))(lanes, jnp.zeros((3, 4)), reward, done, gammas)
    for i in range(3):
        want = SCALINGS["batch"](init_moments(()), jnp.zeros(4), reward[i], done[i], gammas[i], 10.0)
        np.testing.assert_allclose(got[2][i], want[2], rtol=1e-5)
