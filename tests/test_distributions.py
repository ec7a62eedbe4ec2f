"""Distributions against distrax, SciPy, quadrature and sampling; action maps against their definitions."""

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

BATCH_SHAPES = [(), (5,), (2, 3)]


def logits(shape, seed=0, num_actions=4):
    return np.random.default_rng(seed).normal(scale=2.0, size=(*shape, num_actions))


def gaussian(cls, shape, seed=0, size=3):
    rng = np.random.default_rng(seed)
    return cls(jnp.asarray(rng.normal(size=(*shape, size))), jnp.asarray(rng.normal(scale=0.5, size=(*shape, size))))


@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_categorical_equals_distrax(float64, shape):
    dist, other = Categorical(jnp.asarray(logits(shape))), Categorical(jnp.asarray(logits(shape, seed=1)))
    reference, other_reference = dist.to_distrax(), other.to_distrax()
    action = np.random.default_rng(2).integers(4, size=shape)
    np.testing.assert_allclose(dist.log_prob(action), reference.log_prob(action), rtol=1e-12)
    np.testing.assert_allclose(dist.entropy(), reference.entropy(), rtol=1e-12)
    np.testing.assert_allclose(dist.kl(other), reference.kl_divergence(other_reference), rtol=1e-12)
    np.testing.assert_array_equal(dist.mode(), reference.mode())
    assert dist.mode().dtype == jnp.int32 and dist.entropy().shape == dist.kl(other).shape == shape


@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_gaussian_equals_distrax(float64, shape):
    dist, other = gaussian(DiagGaussian, shape), gaussian(DiagGaussian, shape, seed=1)
    reference, other_reference = dist.to_distrax(), other.to_distrax()
    action = dist.sample(jax.random.key(0))
    np.testing.assert_allclose(dist.log_prob(action), reference.log_prob(action), rtol=1e-12)
    np.testing.assert_allclose(dist.entropy(), reference.entropy(), rtol=1e-12)
    np.testing.assert_allclose(dist.kl(other), reference.kl_divergence(other_reference), rtol=1e-12)
    np.testing.assert_array_equal(dist.mode(), reference.mode())
    # The two halves of V-MPO: the same divergence with the other half of the parameters held.
    moved = DiagGaussian(other.mean, dist.log_std).to_distrax()
    widened = DiagGaussian(dist.mean, other.log_std).to_distrax()
    np.testing.assert_allclose(dist.kl_mean(other), reference.kl_divergence(moved), rtol=1e-12)
    np.testing.assert_allclose(dist.kl_cov(other), reference.kl_divergence(widened), rtol=1e-12)
    for result in (dist.log_prob(action), dist.entropy(), dist.kl(other), dist.kl_mean(other), dist.kl_cov(other)):
        assert result.shape == shape


@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_tanh_gaussian_equals_distrax(float64, shape):
    """distrax takes the action after tanh, we take it before; its own inverse bounds the accuracy here."""
    dist, other = gaussian(TanhGaussian, shape), gaussian(TanhGaussian, shape, seed=1)
    u = dist.sample(jax.random.key(0))
    np.testing.assert_allclose(dist.log_prob(u), dist.to_distrax().log_prob(jnp.tanh(u)), rtol=1e-9)
    np.testing.assert_allclose(
        dist.kl(other), dist.base.to_distrax().kl_divergence(other.base.to_distrax()), rtol=1e-12
    )
    np.testing.assert_array_equal(dist.mode(), dist.mean)
    np.testing.assert_allclose(
        dist.kl(other),
        dist.kl_mean(TanhGaussian(other.mean, dist.log_std)) + (dist.kl(other) - dist.kl_mean(other)),
        rtol=1e-12,
    )
    assert dist.log_prob(u).shape == dist.entropy(jax.random.key(1)).shape == shape


def test_distrax_is_imported_only_on_request():
    code = "import sys, pgjax.distributions, pgjax.networks; sys.exit('distrax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("strict")
class TestCategorical:
    def test_by_hand(self, float64):
        # p = 1/2, 1/4, 1/4: H = ½ log 2 + ½ log 4 = 1.5 log 2. Against uniform q: KL = log 3 - H.
        dist, uniform = Categorical(jnp.log(jnp.array([2.0, 1.0, 1.0]))), Categorical(jnp.zeros(3))
        np.testing.assert_allclose(jnp.exp(dist.log_prob(jnp.arange(3))), [0.5, 0.25, 0.25])
        np.testing.assert_allclose(dist.entropy(), 1.5 * np.log(2))
        np.testing.assert_allclose(dist.kl(uniform), np.log(3) - 1.5 * np.log(2))
        assert dist.mode() == 0

    def test_frequencies(self):
        dist = Categorical(jnp.asarray(logits((2,)), jnp.float32))
        action = np.asarray(dist.sample_with(dist.draw_noise(jax.random.key(0), (20_000,))))
        assert action.shape == (20_000, 2) and action.dtype == np.int32
        for b in range(2):
            want = np.exp(np.asarray(dist.log_prob(jnp.broadcast_to(jnp.arange(4)[:, None], (4, 2))))[:, b])
            counts = np.bincount(action[:, b], minlength=4)
            assert stats.chisquare(counts, 20_000 * want / want.sum()).pvalue > 1e-3

    def test_a_ruled_out_action(self):
        """Probability 0 by a very low logit or by -inf: never drawn, no share in entropy and KL, no NaN in gradients."""
        for low in (-1e9, -jnp.inf):
            masked = jnp.array([0.3, low, -0.2])

            def quantities(logits):
                dist, other = Categorical(logits), Categorical(jnp.flip(logits + 1e-3 * jnp.arange(3)))
                same_support = Categorical(logits * 2)
                del other
                return jnp.stack([dist.log_prob(jnp.int32(0)), dist.entropy(), dist.kl(same_support)])

            two = Categorical(jnp.array([0.3, -0.2]))
            want = [two.log_prob(jnp.int32(0)), two.entropy(), two.kl(Categorical(jnp.array([0.6, -0.4])))]
            np.testing.assert_allclose(quantities(masked), want, rtol=1e-5)
            jacobian = np.asarray(jax.jacobian(quantities)(masked))
            assert np.isfinite(jacobian).all() and (jacobian[:, 1] == 0).all()
            dist = Categorical(masked)
            assert not (dist.sample_with(dist.draw_noise(jax.random.key(0), (1000,))) == 1).any()
            assert dist.mode() == 0

    def test_kl_against_an_impossible_action_is_huge_and_its_gradient_finite(self):
        dist = Categorical(jnp.zeros(3))
        kl, gradient = jax.value_and_grad(lambda x: dist.kl(Categorical(x)))(jnp.array([0.0, 0.0, -1e9]))
        assert kl > 1e8
        np.testing.assert_allclose(gradient, [0.5 - 1 / 3, 0.5 - 1 / 3, -1 / 3], rtol=1e-5)  # q - p

    def test_score_has_mean_zero_and_kl_curvature_is_its_covariance(self, float64):
        x = jnp.asarray(logits(()))
        prob = jax.nn.softmax(x)
        score = jax.vmap(lambda a: jax.grad(lambda x: Categorical(x).log_prob(a))(x))(jnp.arange(4))
        np.testing.assert_allclose(prob @ score, 0, atol=1e-15)
        fisher = jnp.diag(prob) - jnp.outer(prob, prob)
        np.testing.assert_allclose(score.T @ jnp.diag(prob) @ score, fisher, atol=1e-14)
        hessian = jax.hessian(lambda y: Categorical(x).kl(Categorical(y)))(x)
        np.testing.assert_allclose(hessian, fisher, atol=1e-14)

    def test_entropy_of_extreme_and_uniform(self):
        np.testing.assert_allclose(Categorical(jnp.zeros(7)).entropy(), np.log(7), rtol=1e-6)
        assert Categorical(jnp.array([1e4, 0.0, -1e4])).entropy() == 0


@pytest.mark.usefixtures("strict")
class TestDiagGaussian:
    def test_sum_over_action_dimensions(self, float64):
        dist = gaussian(DiagGaussian, (5,))
        action = dist.sample(jax.random.key(0))
        scipy_dist = stats.norm(np.asarray(dist.mean), np.exp(dist.log_std))
        np.testing.assert_allclose(dist.log_prob(action), scipy_dist.logpdf(action).sum(-1), rtol=1e-12)
        np.testing.assert_allclose(dist.entropy(), scipy_dist.entropy().sum(-1), rtol=1e-12)

    def test_kl_and_its_halves_by_quadrature(self, float64):
        dist = DiagGaussian(jnp.array([0.3]), jnp.array([-0.2]))
        other = DiagGaussian(jnp.array([-0.4]), jnp.array([0.5]))
        x = np.linspace(-14, 14, 40_001)
        p, q = (stats.norm(float(d.mean[0]), np.exp(float(d.log_std[0]))) for d in (dist, other))
        pairs = {
            "kl": (p, q),
            "kl_mean": (p, stats.norm(*(q.mean(), p.std()))),
            "kl_cov": (p, stats.norm(*(p.mean(), q.std()))),
        }
        for name, (a, b) in pairs.items():
            want = np.trapezoid(a.pdf(x) * (a.logpdf(x) - b.logpdf(x)), x)
            np.testing.assert_allclose(getattr(dist, name)(other), want, rtol=1e-9)

    def test_samples(self):
        dist = gaussian(DiagGaussian, (2,))
        dist = jax.tree.map(lambda x: x.astype(jnp.float32), dist)
        draws = np.asarray(dist.sample_with(dist.draw_noise(jax.random.key(0), (20_000,))))
        std = np.exp(dist.log_std)
        assert (np.abs(draws.mean(0) - dist.mean) < 4 * std / np.sqrt(20_000)).all()
        assert (np.abs(draws.std(0) / std - 1) < 4 / np.sqrt(2 * 20_000)).all()
        # The noise is the derivative by σ, 1 the one by the mean: samples are reparameterised.
        noise = jnp.full((2, 3), 0.7)
        by_mean, by_log_std = (
            jax.grad(lambda d: d.sample_with(noise).sum())(dist).mean,
            jax.grad(lambda d: d.sample_with(noise).sum())(dist).log_std,
        )
        np.testing.assert_allclose(by_mean, 1.0)
        np.testing.assert_allclose(by_log_std, 0.7 * std, rtol=1e-6)

    def test_kl_curvature_is_the_fisher_information(self, float64):
        """diag(1/σ², 2) in the coordinates (μ, log σ)."""
        mean, log_std = jnp.array([0.3, -1.0]), jnp.array([0.2, -0.7])
        dist = DiagGaussian(mean, log_std)
        hessian = jax.hessian(lambda x: dist.kl(DiagGaussian(x[:2], x[2:])))(jnp.concatenate([mean, log_std]))
        want = np.diag(np.concatenate([np.exp(-2 * log_std), [2.0, 2.0]]))
        np.testing.assert_allclose(hessian, want, atol=1e-12)

    def test_small_kl_keeps_its_digits_in_float32(self):
        """1e-4 apart in log σ: KL = (1e-4)² to first order, far below the rounding error of σ²/σ'²."""
        zero = jnp.zeros(1)
        np.testing.assert_allclose(DiagGaussian(zero, zero + 1e-3).kl(DiagGaussian(zero, zero)), 1e-6, rtol=1e-2)
        assert DiagGaussian(zero, zero).kl(DiagGaussian(zero, zero)) == 0

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
        log_p, log_q = np.asarray(dist.log_prob(u)), np.asarray(other.log_prob(u))
        np.testing.assert_allclose(np.trapezoid(np.exp(log_p), action), 1.0, atol=1e-6)
        np.testing.assert_allclose(np.trapezoid(np.exp(log_p) * (log_p - log_q), action), dist.kl(other), atol=1e-5)

        entropy = -np.trapezoid(np.exp(log_p) * log_p, action)
        keys = jax.random.split(jax.random.key(3), 20_000)
        estimates = np.asarray(jax.vmap(dist.entropy)(keys))
        assert abs(estimates.mean() - entropy) < 4 * estimates.std() / np.sqrt(len(keys))

    def test_log_det_for_moderate_and_extreme_u(self, float64):
        dist = TanhGaussian(jnp.zeros((1,)), jnp.zeros((1,)))
        u = np.linspace(-5, 5, 101)[:, None]
        log_det = dist.base.log_prob(u) - dist.log_prob(u)
        np.testing.assert_allclose(log_det, np.log1p(-(np.tanh(u[:, 0]) ** 2)), atol=1e-9)
        far = jnp.array([[-20.0], [20.0], [-300.0], [300.0]])
        want = 2 * (np.log(2) - np.abs(far[:, 0]))  # where exp(-2|u|) is nothing beside 1
        np.testing.assert_allclose(dist.base.log_prob(far) - dist.log_prob(far), want, rtol=1e-12)

    def test_extremes_in_float32(self):
        """Finite values and gradients at |u| = 20, where float32's tanh(u) is 1 and 1 - tanh² is 0."""
        assert float(jnp.tanh(jnp.float32(20.0))) == 1.0

        def total(mean, log_std, u):
            dist = TanhGaussian(mean, log_std)
            return dist.log_prob(u) + dist.entropy(jax.random.key(0))

        for u in (-20.0, 20.0):
            for log_std in (-5.0, 0.0, 2.0):
                arguments = jnp.full(2, 0.9 * u), jnp.full(2, log_std), jnp.full(2, u)
                value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*arguments)
                assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)

    def test_entropy_needs_a_key_and_lets_the_gradient_through_the_draw(self):
        dist = TanhGaussian(jnp.array([0.5]), jnp.array([0.3]))
        with pytest.raises(RequestError, match="key"):
            dist.entropy()

        # H = log σ + const + log(1 - tanh²(μ + σ ε)): dH/dμ = -2 tanh(u), dH/dlog σ = 1 - 2 tanh(u) σ ε.
        u = dist.sample(jax.random.key(4))
        gradient = jax.grad(lambda d: d.entropy(jax.random.key(4)))(dist)
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
        """All noise of a rollout at once, row by row inside a scan or all together: the same actions, and rows differ."""
        dist = DISTRIBUTIONS[name]((3,))
        noise = dist.draw_noise(jax.random.key(0), (6,))
        together = dist.sample_with(noise)
        _, in_loop = jax.lax.scan(lambda _, row: (None, dist.sample_with(row)), None, noise)
        np.testing.assert_array_equal(together, in_loop)
        assert len(np.unique(np.asarray(noise).reshape(6, -1), axis=0)) == 6
        np.testing.assert_array_equal(
            dist.sample(jax.random.key(1)), dist.sample_with(dist.draw_noise(jax.random.key(1)))
        )
        np.testing.assert_allclose(dist.log_prob(together)[2], dist.log_prob(together[2]), rtol=1e-6)

    def test_noise_needs_shapes_only(self, name):
        shapes = jax.eval_shape(lambda: DISTRIBUTIONS[name]((3,)))
        noise = shapes.draw_noise(jax.random.key(0), (6,))
        np.testing.assert_array_equal(noise, DISTRIBUTIONS[name]((3,)).draw_noise(jax.random.key(0), (6,)))

    def test_is_a_pytree_to_stack_index_and_map(self, name):
        dist = DISTRIBUTIONS[name]((4,))
        action = dist.sample(jax.random.key(0))
        one = jax.tree.map(lambda x: x[2], dist)
        np.testing.assert_allclose(one.log_prob(action[2]), dist.log_prob(action)[2], rtol=1e-6)
        mapped = jax.vmap(lambda d, a: d.log_prob(a))(dist, action)
        np.testing.assert_allclose(mapped, dist.log_prob(action), rtol=1e-6)
        _, stacked = jax.lax.scan(lambda carry, _: (carry, dist), 0, None, length=2)
        assert type(stacked) is type(dist) and stacked.kl(stacked).shape == (2, 4)

    def test_kl_is_zero_at_itself_with_zero_gradient(self, name):
        dist = DISTRIBUTIONS[name]((4,))
        np.testing.assert_allclose(dist.kl(dist), 0, atol=1e-6)
        gradient = jax.grad(lambda other: dist.kl(other).sum())(dist)
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
        for u in (1.0, -1.0, 30.0, -30.0, 0.3):
            action = np.asarray(make_action_map(name, space)(jnp.full((2, 200), u)))
            assert action.dtype == np.float32 and (action >= low).all() and (action <= high).all()

    def test_infinite_bounds(self):
        space = Box((2,), -np.inf, np.inf)
        u = jnp.array([-1e6, 3.0])
        np.testing.assert_array_equal(make_action_map("clip", space)(u), u)
        np.testing.assert_array_equal(make_action_map("tanh_clip", space)(u), np.tanh(u))
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
