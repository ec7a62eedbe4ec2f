"""Off-policy MDPO against the equations, in NumPy, and where it meets SAC."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import Probe
from soft_reference import A, N, Reference, gradient, problem

from pgjax.algorithms import make, mdpo_off, sac
from pgjax.distributions import Categorical, TanhGaussian
from pgjax.errors import RequestError
from pgjax.stepwise.soft_critic import Actions, draw_actions, expect, log_prob

# A large epsilon, so that Adam's first step tells how large a gradient was.
HYPERS = mdpo_off.Hypers(learning_rate=0.1, critic_lr_scale=2.0, tau=0.3, temperature=0.4, kl_coef=1.5, adam_eps=1.0)


def with_older(discrete, hypers=HYPERS, **setup):
    """Core, a learner whose older copy is another policy, and a minibatch."""
    core, learner, batch = problem(discrete, mdpo_off, mdpo_off.Setup(**setup), hypers)
    older = learner.extra.replace(actor=0.8 * learner.params.actor + 0.1)
    return core, learner.replace(extra=older), batch


def update(core, learner, batch, hypers, key):
    return jax.jit(lambda learner: mdpo_off.update(core, key, learner, batch, hypers))(learner)


@pytest.mark.parametrize(
    ("discrete", "critic", "index"), [(d, c, i) for d in (False, True) for c in ("q", "v") for i in (1.0, 1.4, 2.0)]
)
def test_one_update_is_that_of_the_equations(float64, discrete, critic, index):
    core, learner, batch = with_older(discrete, critic=critic, tsallis_index=index)
    noise_next, noise = (np.asarray(jax.random.normal(key, (N, A))) for key in jax.random.split(jax.random.key(3)))
    after, metrics = update(core, learner, batch, HYPERS, jax.random.key(3))
    old = np.asarray(learner.extra.actor)
    reference = Reference(
        discrete, critic, True, HYPERS, HYPERS.temperature, index, HYPERS.kl_coef, older=old, floor=mdpo_off.MIN_DENSITY
    )
    actor, new_critic, target = reference.step(learner, batch, noise_next, noise)
    np.testing.assert_allclose(after.params.actor, actor, atol=1e-7)
    np.testing.assert_allclose(after.params.critic, new_critic, atol=1e-7)
    np.testing.assert_allclose(after.target, target, atol=1e-7)
    np.testing.assert_allclose(after.extra.actor, actor, atol=1e-7)  # copied after the first update
    # New from old, in nats, by a sum or the Gaussians' formula.
    new, older = (core.networks.policy(jnp.asarray(x), batch.obs) for x in (actor, old))
    if discrete:
        p, k = (np.asarray(jax.nn.softmax(d.logits)) for d in (new, older))
        kl = (p * np.log(p / k)).sum(-1)
    else:
        spread = np.exp(2 * (new.log_std - older.log_std))
        kl = 0.5 * (spread + ((new.mean - older.mean) / np.exp(older.log_std)) ** 2 - 1 - np.log(spread)).sum(-1)
    np.testing.assert_allclose(metrics["kl_reverse"], np.mean(kl), rtol=1e-6)
    np.testing.assert_allclose(metrics["kl_reverse_max"], np.max(kl), rtol=1e-6)


def test_regularisation_of_mean_and_spread(float64):
    core, learner, batch = with_older(False)
    noise = np.asarray(jax.random.normal(jax.random.split(jax.random.key(3))[1], (N, A)))
    reference = Reference(False, "v", True, HYPERS, 0.4, 1.0, 1.5, older=np.asarray(learner.extra.actor), floor=1e-6)
    actor, obs = np.asarray(learner.params.actor), np.asarray(batch.obs)

    def loss(actor):
        mean, log_std = np.split(np.concatenate([obs, np.ones((N, 1))], -1) @ actor.reshape(3, -1), 2, -1)
        # Means over samples and dimensions.
        reg = 0.7 * ((mean**2).sum() / (N * A) + (log_std**2).sum() / (N * A))
        return reference.policy_loss(actor, np.asarray(learner.params.critic)[:14], obs, noise) + reg

    slope = gradient(loss, actor)
    after, _ = update(core, learner, batch, HYPERS.replace(actor_reg=0.7), jax.random.key(3))
    np.testing.assert_allclose(after.params.actor, actor - 0.1 * slope / (np.abs(slope) + 1), atol=1e-7)


@pytest.mark.parametrize(("index", "expected"), [(1.0, 0.223805), (1.2, 0.211659), (1.5, 0.186089), (2.0, 0.14)])
def test_expected_costs_make_the_divergence_of_the_specification(float64, index, expected):
    """E_p[log_q p - q log_q k] + (q - 1) E_k[log_q k], the last term without the policy."""
    new, old = (Categorical(jnp.log(jnp.asarray([p]))) for p in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3]))
    of_new, of_old = (draw_actions(dist, jax.random.key(0)) for dist in (new, old))
    cost, cost_old = (mdpo_off.tsallis_cost(dist, of_new, index) for dist in (new, old))
    constant = (index - 1) * expect(of_old, mdpo_off.tsallis_cost(old, of_old, index))
    np.testing.assert_allclose(expect(of_new, cost - index * cost_old) + constant, expected, atol=1e-6)
    # The loss with c = 1 and λ = Q = 0 is that divergence.
    loss = expect(of_new, mdpo_off.mdpo_policy_loss(cost, cost_old, 0.0, 0.0, 1.0, index))
    np.testing.assert_allclose(loss + constant, expected, atol=1e-6)


@pytest.mark.parametrize("index", [1.0, 1.3, 2.0])
def test_divergences_are_positive_but_for_the_policy_itself(float64, index):
    rng = np.random.default_rng(0)
    new, old = (Categorical(jnp.asarray(rng.normal(size=(200, 4)))) for _ in range(2))

    def divergence(new, old):
        of_new, of_old = (draw_actions(dist, jax.random.key(0)) for dist in (new, old))
        costs = (mdpo_off.tsallis_cost(dist, of_new, index) for dist in (new, old))
        constant = (index - 1) * expect(of_old, mdpo_off.tsallis_cost(old, of_old, index))
        return expect(of_new, mdpo_off.mdpo_policy_loss(*costs, 0.0, 0.0, 1.0, index)) + constant

    assert divergence(new, old).min() > 1e-4
    np.testing.assert_allclose(divergence(old, old), 0, atol=1e-14)


def test_where_the_index_is_one_the_cost_is_log_pi_above_the_floor(float64):
    rng = np.random.default_rng(0)
    dist = TanhGaussian(*(jnp.asarray(0.5 * rng.normal(size=(20, 2))) for _ in range(2)))
    actions = draw_actions(dist, jax.random.key(1))
    np.testing.assert_allclose(mdpo_off.tsallis_cost(dist, actions, 1.0), log_prob(dist, actions), rtol=1e-10)
    np.testing.assert_allclose(
        mdpo_off.tsallis_cost(dist, actions, 1.0001), mdpo_off.tsallis_cost(dist, actions, 1.0), rtol=2e-3
    )
    # Far out the density of each dimension is held at 1e-6, without slope.
    far = TanhGaussian(jnp.zeros((1, 2)), jnp.full((1, 2), -3.0))
    for index in (1.0, 1.5):
        value, slope = jax.value_and_grad(lambda u: mdpo_off.tsallis_cost(far, Actions(u, None, None), index).sum())(  # noqa: B023
            jnp.full((1, 2), 2.0)
        )
        floor = np.log(1e-6) if index == 1 else (1e-6**0.5 - 1) / 0.5
        np.testing.assert_allclose(value, 2 * floor, rtol=1e-12)
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("continuous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_where_divergence_and_entropy_cost_alike_it_is_sac_step_by_step(continuous):
    """c = λ, with a state value and the first Q: what the preset ``sac_v1_fixed_alpha`` is."""
    env, common = Probe("responding", continuous), dict(critic="v", actor_value="first", hidden_sizes=(8,))
    common |= dict(num_steps=60, batch_size=16, warmup_steps=20, buffer_size=40)

    def end(name, setup, **numbers):
        algorithm = make(name, env, {"learning_rate": 0.01, "temperature": 0.2, **numbers}, **common, **setup)
        state = algorithm.init(jax.random.key(0), algorithm.hypers)
        with jax.enable_x64(True):
            return jax.jit(algorithm.step)(to_float64(state), to_float64(algorithm.hypers))[0]

    one = end("sac", {"temperature": "fixed"})
    other = end("mdpo_off", {"copy_period": 7}, kl_coef=0.2)
    assert other.learner.extra.updates == 40 and one.learner.params.actor.dtype == np.float64
    for x, y in zip(*(jax.tree.leaves(end.learner.replace(extra=None)) for end in (one, other)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(one.replay.experience.action, other.replay.experience.action, rtol=1e-9, atol=1e-12)
    another = end("mdpo_off", {"copy_period": 7}, kl_coef=0.5)
    assert np.abs(one.learner.params.actor - another.learner.params.actor).max() > 1e-4


def to_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def test_loss_at_the_older_copy_and_the_gradients_mean(float64):
    """At θ = θ_old the loss is E[λ log π - Q], and E∇(log π_θ - log π_old) is 0, the slope of a divergence at its zero."""
    rng = np.random.default_rng(0)
    mean, log_std = rng.normal(size=2), -0.5 + 0.1 * rng.normal(size=2)
    noise, num = jnp.asarray(rng.normal(size=(200_000, 2))), 200_000

    def dist(x):
        return TanhGaussian(*(jnp.broadcast_to(part, (num, 2)) for part in x))

    def difference(x, old):
        u = dist(x).sample_with(noise)
        return (log_prob(dist(x), Actions(u, None, None)) - log_prob(dist(old), Actions(u, None, None))).mean()

    here = (jnp.asarray(mean), jnp.asarray(log_std))
    slopes = jax.jit(jax.grad(difference))(here, here)
    for slope in slopes:
        np.testing.assert_allclose(slope, 0, atol=5 * 2 / np.sqrt(num) / np.exp(log_std.min()))
    q, cost = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=5))
    np.testing.assert_allclose(mdpo_off.mdpo_policy_loss(cost, cost, q, 0.3, 2.0), 0.3 * cost - q, rtol=1e-12)


def test_at_the_older_copy_only_the_sample_moves_its_density(float64):
    """At θ = θ_old: the value of SAC's loss, but not its gradient, for the older copy is seen through the sample alone."""
    core, learner, batch = problem(False, mdpo_off, mdpo_off.Setup(), HYPERS)
    np.testing.assert_array_equal(learner.extra.actor, learner.params.actor)
    actor, critic, obs = (np.asarray(x) for x in (learner.params.actor, learner.params.critic, batch.obs))
    noise = np.asarray(jax.random.normal(jax.random.split(jax.random.key(3))[1], (N, A)))
    ours, sacs = (Reference(False, "v", True, HYPERS, 0.4, 1.0, c, older=actor, floor=1e-6) for c in (1.5, None))
    losses = [lambda x, loss=reference: loss.policy_loss(x, critic[:14], obs, noise) for reference in (ours, sacs)]
    np.testing.assert_allclose(losses[0](actor), losses[1](actor), rtol=1e-12)
    slopes = [gradient(loss, actor) for loss in losses]
    assert np.abs(slopes[0] - slopes[1]).max() > 1e-2
    after, metrics = update(core, learner, batch, HYPERS, jax.random.key(3))
    np.testing.assert_allclose(metrics["loss_policy"], losses[0](actor), rtol=1e-9)
    np.testing.assert_allclose(after.params.actor, actor - 0.1 * slopes[0] / (np.abs(slopes[0]) + 1), atol=1e-7)


@pytest.mark.parametrize("period", [1, 3])
def test_the_older_copy_changes_every_so_many_updates_only(period):
    setup = dict(num_steps=1, batch_size=4, warmup_steps=4, buffer_size=20, hidden_sizes=(4,), copy_period=period)
    algorithm = make("mdpo_off", Probe("responding", continuous=True), {"learning_rate": 0.01}, **setup)
    step, state, copies = jax.jit(algorithm.step), algorithm.init(jax.random.key(0), algorithm.hypers), []
    start = state.learner.params.actor
    for i in range(12):
        before = state.learner.extra.actor
        state, _ = step(state, algorithm.hypers)
        if i < 4:
            np.testing.assert_array_equal(state.learner.extra.actor, start)
        elif (i - 4) % period == 0:
            np.testing.assert_array_equal(state.learner.extra.actor, state.learner.params.actor)
            copies.append(i)
        else:
            np.testing.assert_array_equal(state.learner.extra.actor, before)
    assert len(copies) == -(-8 // period)


def test_a_warm_start_stays_close_to_the_policy_it_starts_from():
    algorithm = make("mdpo_off", Probe("responding", continuous=True), hidden_sizes=(4,), buffer_size=300)
    states = [algorithm.init(jax.random.key(seed), algorithm.hypers) for seed in range(2)]
    warm = algorithm.warm_start(states[0], algorithm.policy(states[1]))
    np.testing.assert_array_equal(warm.learner.extra.actor, states[1].learner.params.actor)


def test_acting_with_the_mode_leaves_no_noise_after_warm_up():
    setup = dict(num_steps=40, batch_size=4, warmup_steps=10, buffer_size=40, hidden_sizes=(4,))
    for deterministic in (True, False):
        env = Probe("acting", continuous=True)
        algorithm = make("mdpo_off", env, {"learning_rate": 0.0}, act_deterministic=deterministic, **setup)
        state, _ = jax.jit(algorithm.step)(algorithm.init(jax.random.key(0), algorithm.hypers), algorithm.hypers)
        acted = np.asarray(state.replay.experience.action)[0, :, 0]
        assert np.ptp(acted[:10]) > 0.5
        assert np.ptp(acted[10:]) == 0 if deterministic else np.ptp(acted[10:]) > 0.5


def test_sac_fixed_temperature_is_what_the_preset_says():
    from pgjax.experiments import presets

    preset = presets.find("sac_v1_fixed_alpha", "sac", "")
    setup = sac.Setup(**{k: tuple(v) if isinstance(v, list) else v for k, v in preset["setup"].items()})
    assert (setup.critic, setup.actor_value, setup.temperature) == ("v", "first", "fixed")
    assert preset["hypers"]["temperature"] == 0.2 and setup.hidden_sizes == (256, 256) and setup.warmup_steps == 10_000


def test_requests_that_make_no_sense_are_refused():
    env = Probe("responding", continuous=True)
    with pytest.raises(RequestError, match=r"tsallis_index = 2.5 is outside"):
        make("mdpo_off", env, tsallis_index=2.5)
    with pytest.raises(RequestError, match=r"copy_period = 0 must be a whole number"):
        make("mdpo_off", env, copy_period=0)
