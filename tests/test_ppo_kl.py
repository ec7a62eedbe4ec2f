"""PPO-KL: its penalty, its rule for the coefficient, and its whole update replayed in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from probe_envs import Probe
from synthetic import O

from pgjax import updates
from pgjax.algorithms import ppo, ppo_kl, trpo
from pgjax.distributions import DiagGaussian
from pgjax.networks import ActorCritic
from pgjax.solvers import second_order
from pgjax.types import Sample

# What does not bear on the policy's step is switched off, so that the actor can be followed alone.
ALONE = dict(gradient_clip="none", normalize_advantage="none", learning_rate_schedule="constant")
POLICY = synthetic.random_policy()
BATCH = synthetic.random_batch(POLICY)


# ---- The rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, target, kl, factor",
    [
        ("paper", 0.01, 0.01, 1),
        ("paper", 0.01, 0.016, 2),
        ("paper", 0.01, 0.01 / 1.6, 1 / 2),
        ("paper", 0.01, 0.0149, 1),
        ("paper", 0.01, 0.0067, 1),
        ("paper", 0.01, 0.0066, 1 / 2),
        ("paper", 0.01, 0.0, 1 / 2),
        ("paper", 0.01, 10.0, 2),
        # On the very bounds: numbers that float32 holds exactly.
        ("paper", 0.5, 0.75, 1),
        ("paper", 0.75, 0.5, 1),
        ("paper", 0.5, np.nextafter(np.float32(0.75), np.float32(1)), 2),
        ("paper", 0.75, np.nextafter(np.float32(0.5), np.float32(0)), 1 / 2),
        ("modular_rl", 0.01, 0.01, 1),
        ("modular_rl", 0.01, 0.0129, 1),
        ("modular_rl", 0.01, 0.0131, 1.5),
        ("modular_rl", 0.01, 0.0071, 1),
        ("modular_rl", 0.01, 0.0069, 1 / 1.5),
        ("fixed", 0.01, 0.0, 1),
        ("fixed", 0.01, 10.0, 1),
        # Not a number is no reason to move.
        ("paper", 0.01, np.nan, 1),
    ],
)
def test_the_coefficient_moves_as_in_the_table(rule, target, kl, factor):
    for coefficient in np.float32([0.25, 1, 96]):
        moved = ppo_kl.adapt_kl_coef(coefficient, np.float32(kl), np.float32(target), rule)
        np.testing.assert_allclose(moved, coefficient * factor, rtol=1e-6)


@pytest.mark.parametrize("rule", ["paper", "modular_rl"])
def test_the_coefficient_stays_positive_and_finite_for_ever(rule):
    @jax.jit
    def after(kl):
        return jax.lax.fori_loop(0, 2000, lambda _, c: ppo_kl.adapt_kl_coef(c, kl, 0.01, rule), jnp.float32(1))

    assert 0 < after(jnp.float32(0)) < 1e-3 and 1e3 < after(jnp.float32(1)) < np.inf


# ---- The penalty ----------------------------------------------------------------------------------------------------


def objective_of(monkeypatch, **setup):
    taken = []
    monkeypatch.setattr(ppo_kl, "minibatch_sgd", lambda objective: taken.append(objective))
    ppo_kl.make(synthetic.SPACES, ppo_kl.Setup(num_envs=4, num_steps=6, **setup))
    return taken[0]


# KL(N(0, 1) || N(0.3, 0.5)) = ln 0.5 + (1 + 0.09) / 0.5 - 1/2, and the other way round ln 2 + (0.25 + 0.09) / 2 - 1/2.
@pytest.mark.parametrize("direction, number", [("forward", 0.9868528), ("reverse", 0.3631472)])
def test_the_penalty_is_the_kl_in_the_direction_asked_for_summed_over_actions(float64, monkeypatch, direction, number):
    objective = objective_of(monkeypatch, kl_direction=direction)
    old = DiagGaussian(np.zeros((3, 2)), np.zeros((3, 2)))
    new = DiagGaussian(np.full((3, 2), 0.3), np.full((3, 2), np.log(0.5)))
    log_ratio, advantage = np.log([0.5, 1, 3]), np.array([1.0, -2.0, 0.5])
    sample = Sample(log_ratio, advantage, new, old, 0.0)
    value = objective(sample, ppo_kl.Hypers(), {"kl_coef": 0.7})
    np.testing.assert_allclose(
        value, [0.5 - 0.7 * 2 * number, -2 - 0.7 * 2 * number, 1.5 - 0.7 * 2 * number], rtol=0, atol=1e-6
    )
    # The hinge counts the mean KL of the minibatch beyond twice the target; below that there is none.
    for target, excess in ((0.1, 2 * number - 0.2), (number + 0.01, 0.0)):
        hinged = objective(sample, ppo_kl.Hypers(kl_target=target, hinge_coef=1000.0), {"kl_coef": 0.7})
        np.testing.assert_allclose(value - hinged, 1000 * excess**2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_slope_of_the_penalty_is_zero_at_the_old_policy_and_then_beta_times_the_fisher_product(
    float64, monkeypatch, direction
):
    objective = objective_of(monkeypatch, kl_direction=direction, hidden_sizes=(3,))
    core = trpo.make(synthetic.SPACES, trpo.Setup(num_envs=4, num_steps=6, hidden_sizes=(3,), value_minibatches=1)).core
    rng = np.random.default_rng(0)
    start = rng.normal(size=core.networks.init(jax.random.key(0)).actor.shape) / 2
    obs, move, beta = rng.normal(size=(8, O)), rng.normal(size=start.shape), 0.7

    def dist_of(params):
        return core.networks.policy(ActorCritic(params, None), jnp.asarray(obs))

    @jax.jit
    def slopes(sizes):
        old = dist_of(start)

        def penalty(params):
            sample = Sample(jnp.zeros(8), jnp.zeros(8), dist_of(params), old, 0.0)
            return -objective(sample, ppo_kl.Hypers(), {"kl_coef": beta}).mean()

        found = jax.vmap(lambda size: jax.grad(penalty)(start + size * move))(sizes)
        return found, beta * second_order.fisher_operator(dist_of, start)(move)

    sizes = np.array([0.0, 1e-3, 5e-4])
    found, expected = slopes(sizes)
    np.testing.assert_allclose(found[0], 0, atol=1e-14)
    errors = [np.abs(found[i] / sizes[i] - expected).max() for i in (1, 2)]
    # To first order: what remains is halved with the step.
    assert errors[0] < 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.05)


# ---- The update -----------------------------------------------------------------------------------------------------


def replay(case, policy, beta, batch, hypers):
    """The policy and the coefficient after one iteration."""
    setup, arrays = case.core.setup, synthetic.samples(batch)
    reverse = setup.kl_direction == "reverse"
    key_permute, _ = jax.random.split(jax.random.key(7))
    adam = synthetic.Adam(len(synthetic.vector(policy)), eps=float(hypers.adam_eps))

    def divergence(policy, obs, dist_old):
        new = synthetic.distribution(policy, obs)
        return (synthetic.kl(new, dist_old, obs) if reverse else synthetic.kl(dist_old, new, obs)).mean()

    for index in np.asarray(updates.shuffled(setup, key_permute, setup.num_epochs)):
        obs, action, advantage, log_prob_old, dist_old = synthetic.part(arrays, index)
        excess = max(divergence(policy, obs, dist_old) - 2 * hypers.kl_target, 0)
        gradient = -synthetic.surrogate_gradient(policy, obs, action, advantage, log_prob_old)
        factor = beta + hypers.hinge_coef * 2 * excess
        gradient += factor * synthetic.kl_gradient(policy, dist_old, obs, reverse)
        policy = synthetic.moved(policy, -hypers.learning_rate * adam.direction(gradient))
    # With the final parameters, over the whole batch.
    kl = divergence(policy, arrays[0], arrays[-1])
    low, high, factor = {"paper": (1 / 1.5, 1.5, 2), "modular_rl": (0.7, 1.3, 1.5), "fixed": (0, np.inf, 1)}[setup.kl_rule]
    if kl < low * hypers.kl_target:
        beta = beta / factor
    elif kl > high * hypers.kl_target:
        beta = beta * factor
    return policy, beta, kl


@pytest.fixture(scope="module")
def cases():
    made = {}
    variants = {
        "forward": {},
        "reverse": dict(kl_direction="reverse"),
        "modular_rl": dict(kl_rule="modular_rl"),
        "fixed": dict(kl_rule="fixed"),
    }

    def get(name):
        if name not in made:
            made[name] = synthetic.shipped(
                ppo_kl, dict(learning_rate=0.05), num_epochs=2, num_minibatches=2, **ALONE, **variants[name]
            )
        return made[name]

    return get


def stepped(case, hypers, beta=0.7, seed=0):
    policy = synthetic.random_policy(seed)
    batch = synthetic.random_batch(policy)
    extra = {"kl_coef": np.float64(beta)}
    learner, metrics = case.run(synthetic.make_learner(case, policy, extra), batch, hypers)
    return (policy, batch), learner, metrics


@pytest.mark.parametrize(
    "variant, changes, moves",
    [
        ("forward", dict(kl_target=0.01), 2),
        ("forward", dict(kl_target=1.0), 1 / 2),
        ("forward", dict(kl_target=0.02, hinge_coef=50.0), 2),
        ("reverse", dict(kl_target=0.01), 2),
        ("reverse", dict(kl_target=0.02, hinge_coef=50.0), 2),
        ("modular_rl", dict(kl_target=0.01), 1.5),
        ("modular_rl", dict(kl_target=1.0), 1 / 1.5),
        ("fixed", dict(kl_target=0.01), 1),
    ],
)
def test_an_iteration_is_the_one_worked_out_by_hand(float64, cases, variant, changes, moves):
    case = cases(variant)
    hypers = case.with_(**changes)
    (policy, batch), learner, metrics = stepped(case, hypers)
    expected, beta, _ = replay(case, policy, 0.7, batch, hypers)
    found = synthetic.vector(synthetic.policy_of(case, learner))
    np.testing.assert_allclose(found, synthetic.vector(expected), rtol=0, atol=1e-9)
    np.testing.assert_allclose(learner.extra["kl_coef"], beta, rtol=1e-12)
    np.testing.assert_allclose(beta, 0.7 * moves, rtol=1e-12)
    # Reported is the one that was in force.
    np.testing.assert_allclose(metrics["kl_coef"], 0.7)


def test_the_coefficient_follows_the_kl_of_the_whole_batch_under_the_final_policy(float64, cases):
    """At targets just about 1.5 times off that KL the decision flips, so no other KL will do."""
    case, final = cases("forward"), []
    for target in (0.01, 0.3):
        # The target alone changes nothing before the rule is applied.
        (policy, batch), learner, _ = stepped(case, case.with_(kl_target=target))
        final.append(synthetic.kl(policy, synthetic.policy_of(case, learner), batch.obs))
    np.testing.assert_array_equal(*final)
    kl = final[0].mean()
    for off, factor in ((1 / 1.501, 2), (1 / 1.499, 1), (1.499, 1), (1.501, 0.5)):
        _, learner, _ = stepped(case, case.with_(kl_target=kl * off))
        np.testing.assert_allclose(learner.extra["kl_coef"], 0.7 * factor)


def test_without_a_penalty_it_is_ppo_without_a_clip(float64, cases):
    case = cases("fixed")
    clipless = synthetic.shipped(
        ppo, dict(learning_rate=0.05, clip_eps=1e6), num_epochs=2, num_minibatches=2, **ALONE, value_loss="clipped"
    )
    assert case.hypers.value_coef == clipless.hypers.value_coef
    (policy, batch), one, _ = stepped(case, case.hypers, beta=0.0)
    other, _ = clipless.run(synthetic.make_learner(clipless, policy), batch, clipless.hypers)
    np.testing.assert_allclose(one.params.actor, other.params.actor, rtol=1e-12)
    np.testing.assert_allclose(one.params.critic, other.params.critic, rtol=1e-12)


def test_the_coefficient_holds_the_policy_back(float64, cases):
    case, kls = cases("fixed"), []
    for beta in (0.0, 1.0, 30.0):
        (policy, batch), learner, _ = stepped(case, case.hypers, beta=beta)
        kls.append(synthetic.kl(policy, synthetic.policy_of(case, learner), batch.obs).mean())
    assert kls[0] > kls[1] > kls[2] > 0


def test_in_training_the_coefficient_starts_where_the_hypers_say_and_follows_the_rule():
    setup = ppo_kl.Setup(num_envs=16, num_steps=4, hidden_sizes=(4,))
    algorithm = ppo_kl.make(Probe("acting", continuous=True), setup, ppo_kl.Hypers(kl_coef=0.3, learning_rate=0.01))
    hypers = algorithm.hypers
    state = jax.jit(algorithm.init)(jax.random.key(0), hypers)
    assert state.learner.extra["kl_coef"] == np.float32(0.3)
    step, rows = jax.jit(algorithm.step), []
    for _ in range(20):
        state, metrics = step(state, hypers)
        rows.append((float(metrics["kl"]), float(metrics["kl_coef"]), float(state.learner.extra["kl_coef"])))
    kl, used, after = np.array(rows).T
    # The loop's own measure of the same KL, in float32.
    expected = np.where(kl < 0.01 / 1.5, used / 2, np.where(kl > 0.015, used * 2, used))
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    np.testing.assert_allclose(used[1:], after[:-1])
    assert len(set(after)) > 2
