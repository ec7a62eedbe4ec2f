"""MDPO's step size, divergences and mirror step, against closed forms and sums by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import Probe

from pgjax import on_policy
from pgjax.algorithms import mdpo
from pgjax.distributions import Categorical, DiagGaussian
from pgjax.errors import RequestError

TINY = dict(num_envs=4, num_steps=8, hidden_sizes=(4,), value_epochs=2, value_minibatches=2)


def test_step_size_falls_from_one_to_one_over_the_iterations(float64):
    iterations = 7
    t = [float(mdpo.mirror_step_size(1.0, jnp.float64(k / iterations), "linear")) for k in range(iterations)]
    np.testing.assert_allclose(t, [1 - k / iterations for k in range(iterations)], rtol=1e-12)
    assert t[0] == 1 and (np.diff(t) < 0).all() and 1 / t[-1] <= iterations + 1e-9
    assert mdpo.mirror_step_size(0.3, 0.9, "constant") == 0.3
    assert 0 < mdpo.mirror_step_size(1.0, jnp.float64(1.0), "linear") < 1e-5


def test_the_kl_is_that_of_the_new_policy_from_the_old(float64):
    old = DiagGaussian(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    new = DiagGaussian(jnp.full((1, 1), 0.3), jnp.full((1, 1), np.log(0.5)))
    np.testing.assert_allclose(mdpo.tsallis_divergence(new, old, 1.0), 0.3631472, atol=1e-7)
    np.testing.assert_allclose(mdpo.tsallis_divergence(old, new, 1.0), 0.9868528, atol=1e-7)


@pytest.mark.parametrize(("index", "expected"), [(1.0, 0.223805), (1.2, 0.211659), (1.5, 0.186089), (2.0, 0.14)])
def test_tsallis_divergence_of_the_specification(float64, index, expected):
    new, old = (Categorical(jnp.log(jnp.asarray([p]))) for p in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3]))
    np.testing.assert_allclose(mdpo.tsallis_divergence(new, old, index), expected, atol=1e-6)
    np.testing.assert_allclose(mdpo.tsallis_divergence(old, old, index), 0, atol=1e-12)


@pytest.mark.parametrize("index", [1.3, 2.0])
def test_tsallis_divergence_of_gaussians_by_quadrature(float64, index):
    x = np.linspace(-30, 30, 600_001)
    new, old = (0.4, 0.7), (-0.3, 1.1)

    def density(mean, std):
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))

    def log_q(p):
        return (p ** (index - 1) - 1) / (index - 1)

    p, k = density(*new), density(*old)
    one = np.trapezoid(p * (log_q(p) - index * log_q(k)) + (index - 1) * k * log_q(k), x)
    dists = [DiagGaussian(jnp.full((1, 2), mean), jnp.full((1, 2), np.log(std))) for mean, std in (new, old)]
    np.testing.assert_allclose(mdpo.tsallis_divergence(*dists, index), 2 * one, rtol=1e-6)
    np.testing.assert_allclose(mdpo.tsallis_divergence(dists[1], dists[1], index), 0, atol=1e-12)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_tsallis_is_never_negative_flat_at_the_old_policy_and_tends_to_the_kl(float64, kind):
    rng = np.random.default_rng(0)
    if kind == "categorical":
        old, new = (Categorical(jnp.asarray(rng.normal(size=(200, 4)))) for _ in range(2))
    else:
        old, new = (DiagGaussian(*(jnp.asarray(x) for x in 0.5 * rng.normal(size=(2, 200, 2)))) for _ in range(2))
    for index in (1.0, 1.0001, 1.5, 2.0):
        assert (mdpo.tsallis_divergence(new, old, index) > 0).all()
        slope = jax.grad(lambda dist, index=index: mdpo.tsallis_divergence(dist, old, index).sum())(old)
        assert all((np.abs(leaf) < 1e-9).all() for leaf in jax.tree.leaves(slope))
    np.testing.assert_allclose(
        mdpo.tsallis_divergence(new, old, 1.0001), mdpo.tsallis_divergence(new, old, 1.0), rtol=5e-3, atol=1e-3
    )


def test_many_steps_solve_the_mirror_step_of_a_bandit(float64):
    """π_new ∝ π_old exp(t A), of value (1/t) log Σ π_old exp(t A)."""
    prob, advantage, t = np.array([0.2, 0.5, 0.3]), np.array([1.0, 0, -1]), 0.5
    old = Categorical(jnp.log(prob)[None])

    def value(logits):
        new = Categorical(logits[None])
        log_ratio = jax.nn.log_softmax(logits) - jnp.log(prob)
        divergence = mdpo.tsallis_divergence(new, old, 1.0)
        return (prob * mdpo.mdpo_surrogate(log_ratio, advantage, divergence, t)).sum()

    def step(logits, _):
        return logits + 0.5 * jax.grad(value)(logits), None

    logits, _ = jax.jit(lambda logits: jax.lax.scan(step, logits, length=3000))(jnp.log(prob))
    np.testing.assert_allclose(jax.nn.softmax(logits), [0.325930, 0.494216, 0.179854], atol=1e-6)
    np.testing.assert_allclose(value(logits), 0.0232710, atol=1e-7)
    np.testing.assert_allclose(value(logits), np.log((prob * np.exp(t * advantage)).sum()) / t, rtol=1e-9)


def lanes(num_epochs, changes, **setup):
    """Learner after one iteration from the same start, for each change of the hyperparameters, and the start."""
    algorithm = mdpo.make(Probe("responding", continuous=True), mdpo.Setup(**TINY, num_epochs=num_epochs, **setup))
    base = algorithm.hypers.replace(learning_rate=np.float32(0.01))
    hypers = [on_policy.as_hypers(base, **change) for change in changes]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *hypers)
    state = algorithm.init(jax.random.key(0), base)
    ends, metrics = jax.jit(jax.vmap(algorithm.step, (None, 0)))(state, stacked)
    return state.learner, ends.learner, metrics


def test_one_step_is_a_policy_gradient_whatever_the_step_size():
    _, ends, _ = lanes(1, [dict(step_size=1.0), dict(step_size=1e-3)])
    np.testing.assert_array_equal(ends.params.actor[0], ends.params.actor[1])


def test_with_several_steps_a_small_step_size_holds_the_policy_back():
    start, ends, metrics = lanes(20, [dict(step_size=1e6), dict(step_size=1e-3)])
    assert metrics["kl_reverse"][1] < 0.1 * metrics["kl_reverse"][0]
    assert (ends.params.critic[0] != start.params.critic).any()
    # The critic's phase does not know of the policy's.
    np.testing.assert_allclose(ends.params.critic[0], ends.params.critic[1], rtol=1e-6)


def test_the_policy_phase_leaves_the_critic_alone_and_the_reverse():
    start, ends, _ = lanes(3, [dict(critic_lr_scale=0.0), dict(critic_lr_scale=1.0)])
    np.testing.assert_array_equal(ends.params.critic[0], start.params.critic)
    np.testing.assert_array_equal(ends.params.actor[0], ends.params.actor[1])
    assert (ends.opt_state.actor.count == 3).all() and (ends.opt_state.critic.count == 4).all()


def test_requests_that_make_no_sense_are_refused():
    env = Probe("responding", continuous=True)
    with pytest.raises(RequestError, match=r"tsallis_index = 3.0 is outside"):
        mdpo.make(env, dataclasses.replace(mdpo.Setup(**TINY), tsallis_index=3.0))
    with pytest.raises(RequestError, match="shared_torso"):
        mdpo.make(env, dataclasses.replace(mdpo.Setup(**TINY), shared_torso=True))
    with pytest.raises(RequestError, match="value_minibatches = 3 does not divide"):
        mdpo.make(env, dataclasses.replace(mdpo.Setup(**TINY), value_minibatches=3))
