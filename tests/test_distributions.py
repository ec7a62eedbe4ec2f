"""Distributions against distrax, SciPy, quadrature and sampling; action maps against their definitions."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pgjax.action_maps import ACTION_MAPS, make_action_map
from pgjax.distributions import Categorical, DiagGaussian, TanhGaussian
from pgjax.errors import RequestError
from pgjax.spaces import Box, Discrete

BATCH_SHAPES = [(), (2, 3)]


def logits(shape, seed=0, num_actions=4):
    return np.random.default_rng(seed).normal(scale=2.0, size=(*shape, num_actions))


def gaussian(cls, shape, seed=0, size=3):
    rng = np.random.default_rng(seed)
    return cls(jnp.asarray(rng.normal(size=(*shape, size))), jnp.asarray(rng.normal(scale=0.5, size=(*shape, size))))


# Compiled whole: called eagerly, every single operation would be compiled.
draw_noise = jax.jit(lambda dist, key, shape: dist.draw_noise(key, shape), static_argnums=2)
sample_with = jax.jit(lambda dist, noise: dist.sample_with(noise))
sample = jax.jit(lambda dist, key: dist.sample(key))
log_prob = jax.jit(lambda dist, action: dist.log_prob(action))
entropy = jax.jit(lambda dist, key: dist.entropy(key))
kl = jax.jit(lambda dist, other: dist.kl(other))


@jax.jit
def ours(dist, other, action, key):
    result = {
        "log_prob": dist.log_prob(action),
        "entropy": dist.entropy(key),
        "kl": dist.kl(other),
        "mode": dist.mode(),
    }
    if not isinstance(dist, Categorical):
        result |= {"kl_mean": dist.kl_mean(other), "kl_cov": dist.kl_cov(other)}
    return result


@jax.jit
def theirs(dist, other, action):
    """The same from distrax. The halves of the KL are whole ones with the other half of the parameters held."""
    reference, other_reference = dist.to_distrax(), other.to_distrax()
    result = {
        "log_prob": reference.log_prob(action),
        "entropy": reference.entropy(),
        "kl": reference.kl_divergence(other_reference),
        "mode": reference.mode(),
    }
    if not isinstance(dist, Categorical):
        moved = DiagGaussian(other.mean, dist.log_std).to_distrax()
        widened = DiagGaussian(dist.mean, other.log_std).to_distrax()
        result |= {"kl_mean": reference.kl_divergence(moved), "kl_cov": reference.kl_divergence(widened)}
    return result


def assert_equal_results(got, want, shape):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-12, err_msg=name)
        assert name == "mode" or got[name].shape == shape, name


@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_categorical_equals_distrax(float64, shape):
    dist, other = Categorical(jnp.asarray(logits(shape))), Categorical(jnp.asarray(logits(shape, seed=1)))
    action = jnp.asarray(np.random.default_rng(2).integers(4, size=shape))
    got = ours(dist, other, action, jax.random.key(0))
    assert_equal_results(got, theirs(dist, other, action), shape)
    assert got["mode"].dtype == jnp.int32 and got["mode"].shape == shape


@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_gaussian_equals_distrax(float64, shape):
    dist, other = gaussian(DiagGaussian, shape), gaussian(DiagGaussian, shape, seed=1)
    action = sample(dist, jax.random.key(0))
    assert_equal_results(ours(dist, other, action, jax.random.key(0)), theirs(dist, other, action), shape)


@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_tanh_gaussian_equals_distrax(float64, shape):
    """distrax takes the action after tanh, we take it before; its way back bounds the accuracy of this comparison."""
    dist, other = gaussian(TanhGaussian, shape), gaussian(TanhGaussian, shape, seed=1)
    u = sample(dist, jax.random.key(0))
    got = ours(dist, other, u, jax.random.key(0))
    np.testing.assert_allclose(got["log_prob"], jax.jit(lambda: dist.to_distrax().log_prob(jnp.tanh(u)))(), rtol=1e-9)
    inside = theirs(dist.base, other.base, u)
    assert_equal_results(got, {name: inside[name] for name in ("kl", "kl_mean", "kl_cov", "mode")}, shape)
    assert got["log_prob"].shape == got["entropy"].shape == shape


def test_distrax_is_imported_only_on_request():
    code = "import sys, pgjax.distributions, pgjax.networks; sys.exit('distrax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("strict")
class TestCategorical:
    def test_by_hand(self, float64):
        # p = 1/2, 1/4, 1/4: H = ½ log 2 + ½ log 4 = 1.5 log 2. Against uniform q: KL = log 3 - H.
        dist, uniform = Categorical(jnp.log(jnp.array([2.0, 1.0, 1.0]))), Categorical(jnp.zeros(3))
        np.testing.assert_allclose(jnp.exp(log_prob(dist, jnp.arange(3))), [0.5, 0.25, 0.25])
        np.testing.assert_allclose(entropy(dist, None), 1.5 * np.log(2))
        np.testing.assert_allclose(kl(dist, uniform), np.log(3) - 1.5 * np.log(2))
        assert dist.mode() == 0

    def test_frequencies(self):
        dist = Categorical(jnp.asarray(logits((2,)), jnp.float32))
        action = np.asarray(sample_with(dist, draw_noise(dist, jax.random.key(0), (20_000,))))
        assert action.shape == (20_000, 2) and action.dtype == np.int32
        for b in range(2):
            share = np.exp(logits((2,))[b])
            counts = np.bincount(action[:, b], minlength=4)
            assert stats.chisquare(counts, 20_000 * share / share.sum()).pvalue > 1e-3

    def test_a_ruled_out_action(self):
        """Probability 0 by a very low logit or -inf: never drawn, no share in entropy and KL, no NaN in gradients."""

        @jax.jit
        def quantities(logits):
            dist, sharper = Categorical(logits), Categorical(2 * logits)
            return jnp.stack([dist.log_prob(jnp.int32(0)), dist.entropy(), dist.kl(sharper)])

        want = quantities(jnp.array([0.3, -0.2]))
        jacobian_of = jax.jit(jax.jacobian(quantities))
        for low in (-1e9, -jnp.inf):
            masked = jnp.array([0.3, low, -0.2])
            np.testing.assert_allclose(quantities(masked), want, rtol=1e-5)
            jacobian = np.asarray(jacobian_of(masked))
            assert np.isfinite(jacobian).all() and (jacobian[:, 1] == 0).all()
            dist = Categorical(masked)
            assert not (sample_with(dist, draw_noise(dist, jax.random.key(0), (1000,))) == 1).any()
            assert dist.mode() == 0

    def test_kl_against_an_impossible_action_is_huge_and_its_gradient_finite(self):
        dist = Categorical(jnp.zeros(3))
        other = Categorical(jnp.array([0.0, 0.0, -1e9]))
        value, gradient = jax.jit(jax.value_and_grad(lambda other: dist.kl(other)))(other)
        assert value > 1e8
        np.testing.assert_allclose(gradient.logits, [0.5 - 1 / 3, 0.5 - 1 / 3, -1 / 3], rtol=1e-5)  # q - p

    def test_score_has_mean_zero_and_kl_curvature_is_its_covariance(self, float64):
        x = jnp.asarray(logits(()))
        prob = jax.nn.softmax(x)
        score = jax.jit(jax.vmap(lambda a: jax.grad(lambda x: Categorical(x).log_prob(a))(x)))(jnp.arange(4))
        np.testing.assert_allclose(prob @ score, 0, atol=1e-15)
        fisher = jnp.diag(prob) - jnp.outer(prob, prob)
        np.testing.assert_allclose(score.T @ jnp.diag(prob) @ score, fisher, atol=1e-14)
        hessian = jax.jit(jax.hessian(lambda y: Categorical(x).kl(Categorical(y))))(x)
        np.testing.assert_allclose(hessian, fisher, atol=1e-14)

    def test_entropy_of_extreme_and_uniform(self):
        np.testing.assert_allclose(entropy(Categorical(jnp.zeros(7)), None), np.log(7), rtol=1e-6)
        assert entropy(Categorical(jnp.array([1e4, 0.0, -1e4, 0.0, 0.0, 0.0, 0.0])), None) == 0


@pytest.mark.usefixtures("strict")
class TestDiagGaussian:
    def test_sum_over_action_dimensions(self, float64):
        dist = gaussian(DiagGaussian, (5,))
        action = sample(dist, jax.random.key(0))
        scipy_dist = stats.norm(np.asarray(dist.mean), np.exp(dist.log_std))
        np.testing.assert_allclose(log_prob(dist, action), scipy_dist.logpdf(action).sum(-1), rtol=1e-12)
        np.testing.assert_allclose(entropy(dist, None), scipy_dist.entropy().sum(-1), rtol=1e-12)

    def test_kl_and_its_halves_by_quadrature(self, float64):
        dist = DiagGaussian(jnp.array([0.3]), jnp.array([-0.2]))
        other = DiagGaussian(jnp.array([-0.4]), jnp.array([0.5]))
        x = np.linspace(-14, 14, 40_001)
        p, q = (stats.norm(float(d.mean[0]), np.exp(float(d.log_std[0]))) for d in (dist, other))
        got = ours(dist, other, x[:, None], jax.random.key(0))
        pairs = {
            "kl": (p, q),
            "kl_mean": (p, stats.norm(*(q.mean(), p.std()))),
            "kl_cov": (p, stats.norm(*(p.mean(), q.std()))),
        }
        for name, (a, b) in pairs.items():
            want = np.trapezoid(a.pdf(x) * (a.logpdf(x) - b.logpdf(x)), x)
            np.testing.assert_allclose(got[name], want, rtol=1e-9)

    def test_samples(self):
        dist = gaussian(DiagGaussian, (2,))
        dist = jax.tree.map(lambda x: x.astype(jnp.float32), dist)
        draws = np.asarray(sample_with(dist, draw_noise(dist, jax.random.key(0), (20_000,))))
        std = np.exp(dist.log_std)
        assert (np.abs(draws.mean(0) - dist.mean) < 4 * std / np.sqrt(20_000)).all()
        assert (np.abs(draws.std(0) / std - 1) < 4 / np.sqrt(2 * 20_000)).all()
        # Reparameterised: the derivative is 1 by the mean, and σ times the noise by log σ.
        noise = jnp.full((2, 3), 0.7)
        gradient = jax.jit(jax.grad(lambda dist: dist.sample_with(noise).sum()))(dist)
        np.testing.assert_allclose(gradient.mean, 1.0)
        np.testing.assert_allclose(gradient.log_std, 0.7 * std, rtol=1e-6)

    def test_kl_curvature_is_the_fisher_information(self, float64):
        """diag(1/σ², 2) in the coordinates (μ, log σ)."""
        mean, log_std = jnp.array([0.3, -1.0]), jnp.array([0.2, -0.7])
        dist = DiagGaussian(mean, log_std)
        hessian = jax.jit(jax.hessian(lambda x: dist.kl(DiagGaussian(x[:2], x[2:]))))(jnp.concatenate([mean, log_std]))
        want = np.diag(np.concatenate([np.exp(-2 * log_std), [2.0, 2.0]]))
        np.testing.assert_allclose(hessian, want, atol=1e-12)

    def test_small_kl_keeps_its_digits_in_float32(self):
        """d = 1e-3 apart in log σ: KL = d² (1 + O(d)), hardly above the rounding error of σ²/σ'²."""
        zero = jnp.zeros(1)
        np.testing.assert_allclose(kl(DiagGaussian(zero, zero + 1e-3), DiagGaussian(zero, zero)), 1e-6, rtol=1e-2)
        assert kl(DiagGaussian(zero, zero), DiagGaussian(zero, zero)) == 0

    def test_one_log_std_for_a_whole_batch_is_refused(self):
        dist = DiagGaussian(jnp.zeros((5, 2)), jnp.zeros(2))
        for call in (dist.entropy, lambda: dist.log_prob(jnp.zeros((5, 2))), lambda: dist.kl_cov(dist)):
            with pytest.raises(AssertionError):
                call()


@pytest.mark.usefixtures("strict")
class TestTanhGaussian:
    @pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (0.8, -0.7), (-1.5, 0.4)])
    def test_density_entropy_and_kl_by_quadrature(self, float64, mean, log_std):
        """Over actions in (-1, 1): the density integrates to 1, -log p to the entropy, log p - log q to the KL."""
        action = np.tanh(np.linspace(-18, 18, 200_001))
        u = np.linspace(-18, 18, 200_001)[:, None]
        dist = TanhGaussian(jnp.array([mean]), jnp.array([log_std]))
        other = TanhGaussian(jnp.array([0.2]), jnp.array([0.1]))
        log_p, log_q = np.asarray(log_prob(dist, u)), np.asarray(log_prob(other, u))
        np.testing.assert_allclose(np.trapezoid(np.exp(log_p), action), 1.0, atol=1e-6)
        np.testing.assert_allclose(np.trapezoid(np.exp(log_p) * (log_p - log_q), action), kl(dist, other), atol=1e-5)

        want = -np.trapezoid(np.exp(log_p) * log_p, action)
        keys = jax.random.split(jax.random.key(3), 20_000)
        estimates = np.asarray(jax.jit(jax.vmap(dist.entropy))(keys))
        assert abs(estimates.mean() - want) < 4 * estimates.std() / np.sqrt(len(keys))

    def test_log_det_for_moderate_and_extreme_u(self, float64):
        dist = TanhGaussian(jnp.zeros((1,)), jnp.zeros((1,)))
        u = np.linspace(-5, 5, 101)[:, None]
        log_det = log_prob(dist.base, u) - log_prob(dist, u)
        np.testing.assert_allclose(log_det, np.log1p(-(np.tanh(u[:, 0]) ** 2)), atol=1e-9)
        far = jnp.array([[-20.0], [20.0], [-300.0], [300.0]])
        want = 2 * (np.log(2) - np.abs(far[:, 0]))  # where exp(-2|u|) is nothing beside 1
        np.testing.assert_allclose(log_prob(dist.base, far) - log_prob(dist, far), want, rtol=1e-12)

    def test_extremes_in_float32(self):
        """Finite values and gradients at |u| = 20, where float32's tanh(u) is 1 and 1 - tanh² is 0."""
        assert float(jnp.tanh(jnp.float32(20.0))) == 1.0

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
        def total(mean, log_std, u):
            dist = TanhGaussian(mean, log_std)
            return dist.log_prob(u) + dist.entropy(jax.random.key(0))

        for u in (-20.0, 20.0):
            for log_std in (-5.0, 0.0, 2.0):
                arguments = jnp.full(2, 0.9 * u), jnp.full(2, log_std), jnp.full(2, u)
                value, gradients = total(*arguments)
                assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)

    def test_entropy_needs_a_key_and_lets_the_gradient_through_the_draw(self):
        dist = TanhGaussian(jnp.array([0.5]), jnp.array([0.3]))
        with pytest.raises(RequestError, match="key"):
            dist.entropy()

        # H = log σ + const + log(1 - tanh²(μ + σ ε)): dH/dμ = -2 tanh(u), dH/dlog σ = 1 - 2 tanh(u) σ ε.
        u = sample(dist, jax.random.key(4))
        gradient = jax.jit(jax.grad(entropy))(dist, jax.random.key(4))
        np.testing.assert_allclose(gradient.mean, -2 * np.tanh(u), rtol=1e-5)
        np.testing.assert_allclose(gradient.log_std, 1 - 2 * np.tanh(u) * (u - dist.mean), rtol=1e-5)


DISTRIBUTIONS = {
    "categorical": lambda shape: Categorical(jnp.asarray(logits(shape), jnp.float32)),
    "gaussian": lambda shape: gaussian(DiagGaussian, shape),
    "tanh_gaussian": lambda shape: gaussian(TanhGaussian, shape),
}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", DISTRIBUTIONS)
class TestEveryDistribution:
    def test_noise_drawn_ahead_gives_the_samples_of_the_loop(self, name):
        """The noise of a whole rollout, used row by row in a scan or all together: same actions; and rows differ."""
        dist = DISTRIBUTIONS[name]((3,))
        noise = draw_noise(dist, jax.random.key(0), (6,))
        together = sample_with(dist, noise)
        _, in_loop = jax.lax.scan(lambda _, row: (None, dist.sample_with(row)), None, noise)
        np.testing.assert_allclose(together, in_loop, rtol=1e-5)
        assert len(np.unique(np.asarray(noise).reshape(6, -1), axis=0)) == 6
        np.testing.assert_array_equal(
            sample(dist, jax.random.key(1)), sample_with(dist, draw_noise(dist, jax.random.key(1), ()))
        )
        np.testing.assert_allclose(log_prob(dist, together)[2], log_prob(dist, together[2]), rtol=1e-6)

    def test_noise_needs_shapes_only(self, name):
        shapes = jax.eval_shape(lambda: DISTRIBUTIONS[name]((3,)))
        noise = shapes.draw_noise(jax.random.key(0), (6,))
        np.testing.assert_array_equal(noise, DISTRIBUTIONS[name]((3,)).draw_noise(jax.random.key(0), (6,)))

    def test_no_other_class_has_its_structure(self, name):
        """One jitted function may be called with all of them: compilation caches tell them apart by this alone."""
        structure = jax.tree.structure(DISTRIBUTIONS[name]((3,)))
        equal = [other for other, make in DISTRIBUTIONS.items() if jax.tree.structure(make((3,))) == structure]
        assert equal == [name]
        assert jax.tree.structure(DISTRIBUTIONS[name]((3,))) == structure

    def test_is_a_pytree_to_stack_index_and_map(self, name):
        dist = DISTRIBUTIONS[name]((3,))
        action = sample(dist, jax.random.key(0))
        one = jax.tree.map(lambda x: x[2], dist)
        np.testing.assert_allclose(log_prob(one, action[2]), log_prob(dist, action)[2], rtol=1e-6)
        mapped = jax.jit(jax.vmap(log_prob))(dist, action)
        np.testing.assert_allclose(mapped, log_prob(dist, action), rtol=1e-6)
        _, stacked = jax.lax.scan(lambda carry, _: (carry, dist), 0, None, length=2)
        assert type(stacked) is type(dist) and kl(stacked, stacked).shape == (2, 3)

    def test_kl_is_zero_at_itself_with_zero_gradient(self, name):
        dist = DISTRIBUTIONS[name]((3,))
        np.testing.assert_allclose(kl(dist, dist), 0, atol=1e-6)
        gradient = jax.jit(jax.grad(lambda other: dist.kl(other).sum()))(dist)
        for leaf in jax.tree.leaves(gradient):
            np.testing.assert_allclose(leaf, 0, atol=1e-6)


@pytest.mark.usefixtures("strict")
class TestActionMaps:
    BOX = Box((3,), (-2.0, -1.0, 0.0), (2.0, 0.5, 3.0))
    U = np.array([[0.0, 0.0, 0.0], [0.5, -0.5, 0.5], [-9.0, -9.0, -9.0], [9.0, 9.0, 9.0]])

    @pytest.mark.parametrize(
        "name, want",
        [
            ("clip", [[0, 0, 0], [0.5, -0.5, 0.5], [-2, -1, 0], [2, 0.5, 3]]),
            ("clip_affine", [[0, -0.25, 1.5], [1, -0.625, 2.25], [-2, -1, 0], [2, 0.5, 3]]),
            # tanh(0.5) = 0.46211716
            ("tanh_affine", [[0, -0.25, 1.5], [0.924234, -0.596588, 2.193176], [-2, -1, 0], [2, 0.5, 3]]),
            ("tanh_clip", [[0, 0, 0], [0.462117, -0.462117, 0.462117], [-1, -1, 0], [1, 0.5, 1]]),
        ],
    )
    def test_values(self, name, want):
        action_map = make_action_map(name, self.BOX)
        np.testing.assert_allclose(action_map(jnp.asarray(self.U, jnp.float32)), want, atol=1e-6)
        np.testing.assert_allclose(action_map(jnp.asarray(self.U[1], jnp.float32)), want[1], atol=1e-6)

    @pytest.mark.parametrize("name", ["clip", "clip_affine", "tanh_affine", "tanh_clip"])
    def test_never_out_of_bounds_not_even_by_rounding(self, name):
        rng = np.random.default_rng(0)
        low = rng.normal(scale=10.0, size=200).astype(np.float32)
        high = low + rng.random(200).astype(np.float32) * 7
        space = Box((200,), tuple(map(float, low)), tuple(map(float, high)))
        action_map = jax.jit(make_action_map(name, space))
        for u in (1.0, -1.0, 30.0, -30.0, 0.3):
            action = np.asarray(action_map(jnp.full((2, 200), u)))
            assert action.dtype == np.float32 and (action >= low).all() and (action <= high).all()

    def test_infinite_bounds(self):
        space = Box((2,), -np.inf, np.inf)
        u = jnp.array([-1e6, 3.0])
        np.testing.assert_array_equal(make_action_map("clip", space)(u), u)
        np.testing.assert_allclose(make_action_map("tanh_clip", space)(u), np.tanh(u), rtol=1e-6)
        np.testing.assert_array_equal(make_action_map("clip", Box((2,), 0.0, np.inf))(u), [0.0, 3.0])

    def test_identity(self):
        action = jnp.arange(3)
        assert make_action_map("identity", Discrete(3))(action) is action

    @pytest.mark.parametrize(
        "name, space, match",
        [
            ("clipp", BOX, "clipp.*did you mean.*clip"),
            ("clip", Discrete(3), "identity"),
            ("identity", BOX, "clip"),
            ("tanh_affine", Box((2,)), "finite"),
            ("clip_affine", Box((2,), (0.0, 0.0), (1.0, np.inf)), "finite"),
        ],
    )
    def test_errors_are_one_line(self, name, space, match):
        with pytest.raises(RequestError, match=match) as caught:
            make_action_map(name, space)
        assert "\n" not in str(caught.value) and name in str(caught.value)

    def test_names(self):
        assert set(ACTION_MAPS) == {"clip", "clip_affine", "tanh_affine", "tanh_clip", "identity"}
