"""V-MPO's weights, duals and trust region, by hand and in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import Probe

from pgjax import on_policy
from pgjax.algorithms import vmpo
from pgjax.distributions import Categorical, DiagGaussian
from pgjax.solvers.duals import init_duals, step_duals

TINY = dict(num_envs=8, num_steps=8, hidden_sizes=(4,), num_epochs=2, num_minibatches=2)


def psi_of(advantage, temperature, top_fraction=0.5, weight=None):
    """The E-step's weights by sorting, in NumPy."""
    advantage = np.asarray(advantage, float)
    counted = np.ones(len(advantage), bool) if weight is None else np.asarray(weight) > 0
    num = max(int(top_fraction * counted.sum()), 1)
    best = sorted(np.flatnonzero(counted), key=lambda i: -advantage[i])[:num]
    psi = np.zeros(len(advantage))
    psi[best] = np.exp((advantage[best] - advantage[best].max()) / temperature)
    return psi / psi.sum()


def shipped(advantage, temperature, top_fraction=0.5, weight=None):
    mask = vmpo.top_mask(jnp.asarray(advantage), top_fraction, weight)
    return np.asarray(vmpo.e_step_weights(jnp.asarray(advantage), temperature, mask)), np.asarray(mask)


def test_weights_are_the_softmax_of_the_better_half(float64):
    rng = np.random.default_rng(0)
    for num in (4, 7, 100):
        advantage = rng.normal(size=num)
        psi, mask = shipped(advantage, 0.7)
        np.testing.assert_allclose(psi, psi_of(advantage, 0.7), rtol=1e-12)
        assert mask.sum() == num // 2 and (psi >= 0).all() and (psi[~mask] == 0).all()
        np.testing.assert_allclose(psi.sum(), 1, rtol=1e-12)
        order = rng.permutation(num)
        np.testing.assert_allclose(shipped(advantage[order], 0.7)[0], psi[order], rtol=1e-12)
        np.testing.assert_allclose(shipped(advantage + 5, 0.7)[0], psi, rtol=1e-9)
        np.testing.assert_allclose(shipped(3 * advantage, 2.1)[0], psi, rtol=1e-9)


def test_samples_that_do_not_count_are_never_chosen_and_ties_are_kept(float64):
    advantage, weight = np.array([9.0, 1, 2, 3, 8, 0]), np.array([0.0, 1, 1, 1, 0, 1])
    psi, mask = shipped(advantage, 1.0, weight=jnp.asarray(weight))
    np.testing.assert_array_equal(mask, [0, 0, 1, 1, 0, 0])
    np.testing.assert_allclose(psi, psi_of(advantage, 1.0, weight=weight), rtol=1e-12)
    np.testing.assert_array_equal(shipped([1.0, 2, 2, 0], 1.0, 0.25)[1], [0, 1, 1, 0])


def test_weights_at_the_extremes_of_the_temperature():
    advantage = np.float32([0.1, 3, 2.9, -50, 1, 2, 0, -1])
    psi, mask = shipped(advantage, np.float32(1e8))
    np.testing.assert_allclose(psi, mask / 4, atol=1e-6)
    psi, _ = shipped(advantage, np.float32(1e-8))
    np.testing.assert_array_equal(psi, np.arange(8) == 1)
    loss, slope = jax.value_and_grad(vmpo.temperature_loss)(jnp.float32(1e-8), advantage, mask, 0.01)
    assert np.isfinite(loss) and np.isfinite(slope)


def test_slope_of_the_temperatures_dual_is_the_missing_kl(float64):
    rng = np.random.default_rng(1)
    advantage = rng.normal(size=60)
    mask = vmpo.top_mask(jnp.asarray(advantage), 0.5)
    loss = jax.value_and_grad(vmpo.temperature_loss)
    values = []
    for temperature in np.linspace(0.2, 3, 15):
        value, slope = loss(temperature, advantage, mask, 0.03)
        psi = psi_of(advantage, temperature)
        chosen = psi[psi > 0]
        np.testing.assert_allclose(slope, 0.03 - (chosen * np.log(chosen * len(chosen))).sum(), atol=1e-9)
        by_hand = temperature * (0.03 + np.log(np.mean(np.exp(advantage[np.asarray(mask)] / temperature))))
        np.testing.assert_allclose(value, by_hand, rtol=1e-9)
        np.testing.assert_allclose(loss(temperature, advantage + 2, mask, 0.03)[0], value + 2, rtol=1e-9)
        values.append(value)
    assert (np.diff(values, 2) > 0).all(), "convex"


def test_the_temperature_settles_where_the_weights_have_the_kl_asked_for():
    rng = np.random.default_rng(2)
    advantage = jnp.asarray(rng.normal(size=200), jnp.float32)
    mask = vmpo.top_mask(advantage, 0.5)

    def step(duals, _):
        slope = jax.grad(vmpo.temperature_loss)(duals["temperature"], advantage, mask, 0.1)
        return step_duals(duals, {"temperature": slope}, 1e-2, 1e-8), None

    duals, _ = jax.jit(lambda duals: jax.lax.scan(step, duals, length=2000))(init_duals(temperature=3.0))
    psi = psi_of(advantage, float(duals["temperature"]))
    chosen = psi[psi > 0]
    np.testing.assert_allclose((chosen * np.log(chosen * len(chosen))).sum(), 0.1, rtol=0.05)


def test_the_two_parts_of_a_gaussians_kl(float64):
    rng = np.random.default_rng(3)
    mean, log_std, moved, widened = rng.normal(size=(4, 50, 3))
    old, new = DiagGaussian(jnp.asarray(mean), jnp.asarray(log_std)), DiagGaussian(jnp.asarray(moved), jnp.asarray(widened))
    kls = vmpo.trust_region_kls(old, new)
    var, var_new = np.exp(2 * log_std), np.exp(2 * widened)
    np.testing.assert_allclose(kls["alpha_mean"], 0.5 * ((moved - mean) ** 2 / var).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(kls["alpha_cov"], 0.5 * (var / var_new - 1 + np.log(var_new / var)).sum(-1), rtol=1e-7)
    whole = kls["alpha_cov"] + 0.5 * ((moved - mean) ** 2 / var_new).sum(-1)
    np.testing.assert_allclose(old.kl(new), whole, rtol=1e-9)
    same = vmpo.trust_region_kls(old, old)
    for part in same.values():
        np.testing.assert_array_equal(part, 0)


def test_guide_kls_are_a_policys_with_itself():
    old, new = DiagGaussian(jnp.zeros((5, 2)), jnp.zeros((5, 2))), DiagGaussian(jnp.ones((5, 2)), jnp.ones((5, 2)))
    kls, pull = jax.vjp(lambda new: vmpo._guide_kls(old, new), new)
    np.testing.assert_array_equal(kls["alpha_mean"], np.zeros(5))
    np.testing.assert_array_equal(kls["alpha_cov"], np.full(5, 0.5))
    for leaf in jax.tree.leaves(pull(jax.tree.map(jnp.ones_like, kls))):
        np.testing.assert_array_equal(leaf, 0)


def taken(monkeypatch, env, **setup):
    """The objective and the dual update that the shipped algorithm hands to the shared update."""
    caught = {}

    def catch(objective, estimate=None, *, update_extra=None):
        caught.update(objective=objective, update_extra=update_extra)
        return lambda *args: None

    monkeypatch.setattr(vmpo, "minibatch_sgd", catch)
    vmpo.make(env, vmpo.Setup(**setup))
    return caught["objective"], caught["update_extra"]


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_loss_and_gradients_of_the_paper(float64, monkeypatch, kind):
    """-Σ ψ log π + mean Σ α KL, with ψ, α held; the duals' gradients beside it (eqs. 7-9)."""
    rng = np.random.default_rng(4)
    advantage = rng.normal(size=12)
    objective, update_extra = taken(monkeypatch, Probe("responding", continuous=kind == "gaussian"))
    hypers = vmpo.Hypers(temperature_eps=0.02, alpha_mean_eps=0.01, alpha_cov_eps=5e-5, alpha_eps=0.1, dual_learning_rate=1.0)
    if kind == "gaussian":
        parts = [jnp.asarray(x) for x in rng.normal(size=(4, 12, 2))]
        old, new = DiagGaussian(*parts[:2]), DiagGaussian(*parts[2:])
        action, alphas = rng.normal(size=(12, 2)), {"alpha_mean": 1.3, "alpha_cov": 0.4}
    else:
        old, new = (Categorical(jnp.asarray(rng.normal(size=(12, 3)))) for _ in range(2))
        action, alphas = rng.integers(3, size=12), {"alpha": 2.0}
    extra = init_duals(temperature=0.8, **alphas)

    def sample_at(new):
        log_ratio = new.log_prob(action) - old.log_prob(action)
        return on_policy_sample(log_ratio, advantage, new, old)

    psi = psi_of(advantage, np.float32(0.8))

    def by_hand(new):
        kls = {"alpha": old.kl} if kind == "categorical" else {"alpha_mean": old.kl_mean, "alpha_cov": old.kl_cov}
        kls = {name: kl(new) for name, kl in kls.items()}
        return (psi * new.log_prob(action)).sum() - sum(np.float32(alphas[name]) * kl.mean() for name, kl in kls.items())

    found = jax.grad(lambda new: objective(sample_at(new), hypers, extra).mean())(new)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.grad(by_hand)(new)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    # At the old policy the trust region has no slope: the first step is weighted maximum likelihood.
    first = jax.grad(lambda new: objective(sample_at(new), hypers, extra).mean())(old)
    likelihood = jax.grad(lambda new: (psi * new.log_prob(action)).sum())(old)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(likelihood), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    # Adam's first step is the sign of the gradient ε - KL: the multiplier of a violated bound rises.
    after = update_extra(sample_at(new), hypers, extra)
    for name, kl in vmpo.trust_region_kls(old, new).items():
        rises = float(kl.mean()) > getattr(hypers, name + "_eps")
        np.testing.assert_allclose(after[name], max(alphas[name] + (1 if rises else -1), 1e-8), rtol=1e-5)
    assert after["temperature"] > 0.8 or psi_kl(psi) < 0.02


def psi_kl(psi):
    chosen = psi[psi > 0]
    return (chosen * np.log(chosen * len(chosen))).sum()


def on_policy_sample(log_ratio, advantage, dist, dist_old):
    from pgjax.types import Sample

    return Sample(log_ratio, jnp.asarray(advantage), dist, dist_old, 0.0)


@pytest.fixture(scope="module")
def runs():
    """Some iterations under several hyperparameters, as lanes of one program: ``{name: (state, metrics of each)}``."""
    algorithm = vmpo.make(Probe("responding", continuous=True), vmpo.Setup(**TINY))
    base = algorithm.hypers.replace(learning_rate=np.float32(1e-2), dual_learning_rate=np.float32(0.05))
    changes = {
        "plain": {},
        "held": dict(alpha_mean=1e5, alpha_cov=1e5, dual_learning_rate=0.0),
        "tight": dict(alpha_mean_eps=0.0, alpha_cov_eps=0.0, alpha_mean=0.0, alpha_cov=0.0),
        "loose": dict(alpha_mean_eps=1e3, alpha_cov_eps=1e3, temperature_eps=1e3, alpha_mean=0.1, alpha_cov=0.1),
    }
    hypers = [on_policy.as_hypers(base, **change) for change in changes.values()]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *hypers)

    def run(hypers):
        state = algorithm.init(jax.random.key(0), hypers)
        return jax.lax.scan(lambda state, _: algorithm.step(state, hypers), state, length=6)

    states, metrics = jax.jit(jax.vmap(run))(stacked)
    return {name: jax.tree.map(lambda x, i=i: x[i], (states, metrics)) for i, name in enumerate(changes)}


def test_the_kl_is_to_the_policy_that_acted(runs):
    _, metrics = runs["plain"]
    assert (metrics["kl"] > 1e-7).all() and (metrics["nonfinite"] == 0).all()


def test_a_large_multiplier_holds_the_policy(runs):
    assert runs["held"][1]["kl"].max() < 0.1 * runs["plain"][1]["kl"].max()


def test_multipliers_rise_while_the_bound_is_broken_and_stay_positive_when_it_never_is(runs):
    _, metrics = runs["tight"]
    for name in ("alpha_mean", "alpha_cov"):
        assert (np.diff(metrics[name]) > 0).all()
        np.testing.assert_allclose(runs["loose"][1][name][-1], 1e-8, rtol=1e-5)
    np.testing.assert_allclose(runs["loose"][0].learner.extra["alpha_mean"], 1e-8, rtol=1e-5)


def test_guide_multipliers_drift_and_hold_nothing():
    algorithm = vmpo.make(Probe("responding", continuous=True), vmpo.Setup(**TINY, kl_form="guide"))
    hypers = on_policy.as_hypers(algorithm.hypers, dual_learning_rate=0.01, alpha_mean=0.05, alpha_cov=1.0)
    state = algorithm.init(jax.random.key(0), hypers)
    step = jax.jit(algorithm.step)
    for _ in range(3):
        state, metrics = step(state, hypers)
    np.testing.assert_allclose(metrics["alpha_mean"], 1e-8, rtol=1e-4)
    np.testing.assert_allclose(metrics["alpha_cov"], 1 + 3 * 4 * 0.01, rtol=1e-3)


def test_without_preference_the_gradient_vanishes_on_average(float64, monkeypatch):
    """All samples, infinite temperature: E[∇ log π] = 0."""
    objective, _ = taken(monkeypatch, Probe("responding", continuous=False))
    hypers = vmpo.Hypers(top_fraction=1.0)
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=3))
    prob = np.asarray(jax.nn.softmax(logits))
    action = rng.choice(3, size=200_000, p=prob)
    old = Categorical(jnp.broadcast_to(logits, (len(action), 3)))

    def value(logits):
        new = Categorical(jnp.broadcast_to(logits, old.logits.shape))
        log_ratio = new.log_prob(action) - old.log_prob(action)
        sample = on_policy_sample(log_ratio, rng.normal(size=len(action)), new, old)
        return objective(sample, hypers, init_duals(temperature=1e8, alpha=1.0)).mean()

    spread = np.sqrt(prob * (1 - prob) / len(action))
    assert (np.abs(jax.grad(value)(logits)) < 4 * spread).all()
