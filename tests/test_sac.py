"""SAC against the equations, in NumPy and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import Probe
from soft_reference import NUM_ACTIONS, A, N, O, Reference, policy_out, problem

from pgjax.algorithms import make, sac
from pgjax.distributions import Categorical, DiagGaussian, TanhGaussian
from pgjax.errors import RequestError
from pgjax.experiments import presets
from pgjax.networks import ActorCritic
from pgjax.spaces import Box, Discrete
from pgjax.stepwise.soft_critic import Actions, bellman_target, draw_actions, expect, log_prob, polyak, taken
from pgjax.stepwise.soft_networks import SoftNetworks

# A large epsilon, so that Adam's first step tells how large a gradient was.
HYPERS = sac.Hypers(learning_rate=0.1, critic_lr_scale=2.0, tau=0.3, temperature=0.4, reward_scale=3.0, adam_eps=1.0)
FORMS = [(d, c, f) for d in (False, True) for c in ("q", "v") for f in ("min", "first")]


def stepped(discrete, critic="q", actor_value="min", temperature="auto", hypers=HYPERS, change=lambda batch: batch, **setup):
    """Learner before and after one update, the minibatch, and the core."""
    setup = sac.Setup(critic=critic, actor_value=actor_value, temperature=temperature, **setup)
    core, learner, batch = problem(discrete, sac, setup, hypers)
    update = jax.jit(lambda learner, batch: sac.update(core, jax.random.key(3), learner, batch, hypers))
    return learner, update(learner, change(batch)), batch, core


def noise_of(key):
    return np.asarray(jax.random.normal(key, (N, A)))


@pytest.mark.parametrize(("discrete", "critic", "actor_value"), FORMS)
def test_one_update_is_that_of_the_equations(float64, discrete, critic, actor_value):
    learner, (after, metrics), batch, _ = stepped(discrete, critic, actor_value)
    key_step, key_temperature = jax.random.split(jax.random.key(3))
    noise_next, noise = map(noise_of, jax.random.split(key_step))
    reference = Reference(discrete, critic, actor_value == "first", HYPERS, HYPERS.temperature)
    actor, new_critic, target = reference.step(learner, batch, noise_next, noise)
    np.testing.assert_allclose(after.params.actor, actor, atol=1e-7)
    np.testing.assert_allclose(after.params.critic, new_critic, atol=1e-7)
    np.testing.assert_allclose(after.target, target, atol=1e-7)
    assert np.abs(after.params.actor - learner.params.actor).max() > 1e-2
    # The dual, of the new actor and a sample of its own.
    u, _, prob = reference.actions(actor, np.asarray(batch.obs), noise_of(key_temperature))
    mean_log_prob = (prob * reference.cost(actor, np.asarray(batch.obs), u)).sum(-1).mean()
    target_entropy = 0.98 * np.log(NUM_ACTIONS) if discrete else -A
    slope = -HYPERS.temperature * (mean_log_prob + target_entropy)
    expected = np.log(HYPERS.temperature) - HYPERS.temperature_lr * slope / (abs(slope) + 1e-8)
    np.testing.assert_allclose(after.extra["log_temperature"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["temperature"], HYPERS.temperature, rtol=1e-6)


@pytest.mark.parametrize("critic", ["q", "v"])
def test_what_follows_an_end_counts_for_nothing_and_what_follows_a_cut_counts(float64, critic):
    ended = np.arange(N) % 3 == 0

    def moved(which):
        return lambda batch: batch._replace(final_obs=batch.final_obs + 5 * which[:, None])

    _, (usual, _), _, _ = stepped(False, critic)
    _, (after_ends, _), _, _ = stepped(False, critic, change=moved(ended))
    _, (after_others, _), _, _ = stepped(False, critic, change=moved(~ended))
    np.testing.assert_array_equal(usual.params.critic, after_ends.params.critic)
    assert np.abs(usual.params.critic - after_others.params.critic).max() > 1e-3
    nothing = bellman_target(jnp.ones(2), jnp.array([True, False]), jnp.array([np.inf, 2.0]), 0.5)
    np.testing.assert_array_equal(nothing, [1, 2])


def test_density_of_the_squashed_policy_integrates_to_one(float64):
    for mean, std in ((0.0, 1.0), (0.7, 0.3), (-1.5, 2.0)):
        u = np.linspace(mean - 12 * std, mean + 12 * std, 200_001)
        dist = TanhGaussian(jnp.full((len(u), 1), mean), jnp.full((len(u), 1), np.log(std)))
        density = np.exp(log_prob(dist, Actions(jnp.asarray(u)[:, None], None, None)))
        np.testing.assert_allclose(np.trapezoid(density, np.tanh(u)), 1, atol=1e-6)


def test_log_prob_far_out_is_finite_in_32_bits():
    """log(1 - tanh²(u)) is -18.6137 at 10 and -38.6137 at -20; the Gaussian itself has 0 there but for its constant."""
    for u, correction in ((10.0, -18.6137), (-20.0, -38.6137)):
        dist = TanhGaussian(jnp.full((1, 1), u), jnp.zeros((1, 1)))
        value, slope = jax.value_and_grad(lambda u, dist=dist: log_prob(dist, Actions(u, None, None))[0])(jnp.full((1, 1), u))
        np.testing.assert_allclose(value, -0.5 * np.log(2 * np.pi) - correction, rtol=1e-5)
        assert np.isfinite(slope).all()


def test_reparameterised_gradient_by_finite_differences(float64):
    """Of E[α log π - Q] with Q(a) = -(a - 0.3)² / 0.4, over (mean, log σ) at fixed noise."""
    noise, alpha = np.random.default_rng(0).normal(size=(50, 1)), 0.7

    def by_hand(x):
        u = x[0] + np.exp(x[1]) * noise
        gauss = -0.5 * noise**2 - x[1] - 0.5 * np.log(2 * np.pi)
        return (alpha * (gauss - np.log(1 - np.tanh(u) ** 2)) + (np.tanh(u) - 0.3) ** 2 / 0.4).mean()

    def ours(x):
        dist = TanhGaussian(jnp.full((50, 1), x[0]), jnp.full((50, 1), x[1]))
        actions = Actions(dist.sample_with(noise), jnp.tanh(dist.sample_with(noise)), None)
        q = -((actions.action - 0.3) ** 2).sum(-1) / 0.4
        return sac.sac_policy_loss(log_prob(dist, actions), q, alpha).mean()

    x = np.array([0.2, -0.5])
    steps = 1e-6 * np.eye(2)
    numeric = [(by_hand(x + step) - by_hand(x - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(jax.grad(ours)(jnp.asarray(x)), numeric, rtol=1e-7)


def test_the_optimum_at_a_quadratic_q_is_the_gaussian_of_its_width(float64):
    """Q(a) = -(a - c)² / 2v and no squashing: π is N(c, α v)."""
    c, v, alpha = 0.8, 0.5, 0.3
    half = np.random.default_rng(0).normal(size=500)
    noise = np.concatenate([half, -half])
    noise = jnp.asarray(noise / noise.std())[:, None]

    def loss(x):
        dist = DiagGaussian(jnp.full((1000, 1), x[0]), jnp.full((1000, 1), x[1]))
        action = dist.sample_with(noise)
        return sac.sac_policy_loss(dist.log_prob(action), -((action - c) ** 2).sum(-1) / (2 * v), alpha).mean()

    x, _ = jax.jit(lambda x: jax.lax.scan(lambda x, _: (x - 0.2 * jax.grad(loss)(x), None), x, length=500))(jnp.zeros(2))
    np.testing.assert_allclose(x, [c, 0.5 * np.log(alpha * v)], atol=1e-8)


@pytest.mark.parametrize(("entropy", "sign"), [(-3.0, 1), (-1.0, -1), (-2.0, 0)])
def test_temperature_rises_where_the_entropy_is_below_its_target(float64, entropy, sign):
    log_temperature, sampled = jnp.log(0.2), jnp.asarray(-entropy + np.array([-1.0, 1, -2, 2]))
    slope = jax.grad(sac.temperature_loss)(log_temperature, sampled, sac.target_entropy(Box((2,), -1, 1), 1.0))
    np.testing.assert_allclose(-slope, sign * 0.2, atol=1e-12)
    assert sac.target_entropy(Discrete(4), 0.5) == 0.5 * 0.98 * np.log(4)


def test_presets_are_the_published_settings():
    """Of softlearning (2019), of what MDPO was compared with, and of brax' notebook; see the specification's tables."""
    usual = dict(batch_size=256, buffer_size=1_000_000, warmup_steps=10_000, hidden_sizes=[256, 256], num_envs=1)
    numbers = dict(learning_rate=3e-4, gamma=0.99, tau=0.005)
    first = dict(critic="v", actor_value="first", temperature="fixed")
    brax = dict(num_envs=128, buffer_size=1_048_576, warmup_steps=8192, normalize_obs=True, kernel_init="lecun_uniform")
    swift = dict(learning_rate=6e-4, gamma=0.997, temperature_lr=3e-4, target_entropy_scale=0.5)
    published = {
        ("authors", ""): (usual, numbers | dict(temperature_lr=3e-4)),
        ("sac_v1_fixed_alpha", ""): (usual | first, numbers | dict(temperature=0.2)),
        ("auto", "brax/hopper"): (brax | dict(batch_size=512, update_ratio=64 / 128), swift | dict(reward_scale=30)),
        ("auto", "brax/walker2d"): (brax | dict(batch_size=128, update_ratio=32 / 128), swift | dict(reward_scale=5)),
    }
    for (name, env), (setup, hypers) in published.items():
        preset = presets.find(name, "sac", env)
        assert {field: preset["setup"].get(field) for field in setup} == setup, (name, env)
        assert {field: preset["hypers"].get(field) for field in hypers} == hypers, (name, env)
    steps = {env: presets.find("auto", "sac", env)["total_env_steps"] for env in ("brax/hopper", "brax/walker2d")}
    assert steps == {"brax/hopper": 6_553_600, "brax/walker2d": 7_864_320}
    assert [getattr(sac.Setup(), name) for name in ("activation", "critic", "actor_value")] == ["relu", "q", "min"]


def test_target_copies(float64):
    """After n steps towards the same parameters what is missing is (1 - τ)^n of the start; τ = 1 copies."""
    target, online = jnp.asarray([1.0, -2.0]), jnp.asarray([0.3, 5.0])
    moved = target
    for _ in range(5):
        moved = polyak(moved, online, 0.2)
    np.testing.assert_allclose(moved - online, 0.8**5 * (target - online), rtol=1e-12)
    np.testing.assert_array_equal(polyak(target, online, 1.0), online)


def test_the_smaller_q_is_what_counts(float64):
    """With both Q alike, min and first are the same; with a worse second one the minimum is lower."""
    core, learner, batch = problem(False, sac, sac.Setup(), HYPERS)
    half = learner.params.critic.size // 2
    same = learner.replace(
        params=learner.params._replace(critic=jnp.tile(learner.params.critic[:half], 2)),
        target=jnp.tile(learner.target[:half], 2),
    )
    ends = []
    for value in ("min", "first"):
        other = core._replace(setup=dataclasses.replace(core.setup, actor_value=value))
        update = jax.jit(lambda learner, core=other: sac.update(core, jax.random.key(0), learner, batch, HYPERS)[0])
        ends.append(update(same))
    np.testing.assert_allclose(ends[0].params.actor, ends[1].params.actor, rtol=1e-12)

    # The target's second Q lowered by a constant takes γ times it off every bootstrapped target, raised it changes nothing.
    def critic_after(shift):
        last = same.target.at[half + O].add(shift)  # the weight of the constant feature
        return update(same.replace(target=last)).params.critic

    np.testing.assert_array_equal(critic_after(0.0), critic_after(7.0))
    assert np.abs(critic_after(0.0) - critic_after(-7.0)).max() > 1e-3


@pytest.mark.parametrize("critic", ["q", "v"])
def test_each_loss_moves_its_own_parameters(float64, critic):
    start, (usual, _), _, _ = stepped(False, critic)
    _, (no_critic, _), _, _ = stepped(False, critic, hypers=HYPERS.replace(critic_lr_scale=0.0))
    np.testing.assert_array_equal(no_critic.params.critic, start.params.critic)
    assert (no_critic.params.actor != start.params.actor).any()
    # The actor's learning rate doubled at the same one of the critics.
    _, (faster, _), _, _ = stepped(False, critic, hypers=HYPERS.replace(learning_rate=0.2, critic_lr_scale=1.0))
    np.testing.assert_allclose(faster.params.critic, usual.params.critic, rtol=1e-12)
    assert (faster.params.actor != usual.params.actor).any()
    # And hardly any at that of the critics: what they learn is nothing to the actor.
    _, (still, _), _, _ = stepped(False, critic, hypers=HYPERS.replace(learning_rate=1e-12, critic_lr_scale=2e11))
    np.testing.assert_allclose(still.params.actor, start.params.actor, atol=1e-9)
    np.testing.assert_allclose(still.params.critic, usual.params.critic, rtol=1e-9)
    _, (no_dual, _), _, _ = stepped(False, critic, hypers=HYPERS.replace(temperature_lr=0.0))
    np.testing.assert_array_equal(no_dual.extra["log_temperature"], start.extra["log_temperature"])
    assert usual.extra["log_temperature"] != start.extra["log_temperature"]
    np.testing.assert_array_equal(no_dual.params.actor, usual.params.actor)
    np.testing.assert_array_equal(no_dual.params.critic, usual.params.critic)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("critic", ["q", "v"])
def test_rewards_and_temperature_in_other_units_change_nothing_but_the_critics(float64, discrete, critic):
    """Four times both: four times Q, and the same policy, step by step. Adam without epsilon knows no units."""
    ends, hypers = [], HYPERS.replace(adam_eps=0.0, learning_rate=0.01, critic_lr_scale=1.0)
    for k in (1.0, 4.0):
        setup = sac.Setup(critic=critic, temperature="fixed")
        core, learner, batch = problem(discrete, sac, setup, hypers)
        h = hypers.replace(reward_scale=3 * k, temperature=0.4 * k, critic_lr_scale=k)
        learner = learner.replace(params=learner.params._replace(critic=k * learner.params.critic), target=k * learner.target)
        step = jax.jit(lambda i, x, core=core, batch=batch, h=h: sac.update(core, jax.random.key(i), x, batch, h)[0])
        for i in range(5):
            learner = step(i, learner)
        ends.append(learner)
    np.testing.assert_allclose(ends[1].params.actor, ends[0].params.actor, rtol=1e-9)
    np.testing.assert_allclose(ends[1].params.critic, 4 * ends[0].params.critic, rtol=1e-9)
    np.testing.assert_allclose(ends[1].target, 4 * ends[0].target, rtol=1e-9)


def test_expectations_over_discrete_actions_are_sums(float64):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    dist, x = Categorical(logits), jnp.arange(12.0).reshape(4, 3)
    actions = draw_actions(dist, jax.random.key(0))
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(expect(actions, x), (prob * x).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(-expect(actions, log_prob(dist, actions)), dist.entropy(), rtol=1e-12)
    np.testing.assert_array_equal(taken(jnp.stack([x, -x]), jnp.array([0, 2, 1, 1])), [[0, 5, 7, 10], [0, -5, -7, -10]])


def known_q(q):
    """Networks with a Q that is given, ``q(action [N, 1]) -> [N]``, and a Gaussian inside that knows no state."""

    def policy(actor, obs):
        mean, log_std = (jnp.broadcast_to(x, obs.shape) for x in (actor["mean"], actor["log_std"]))
        return TanhGaussian(mean, log_std)

    return SoftNetworks(
        init=lambda key: ActorCritic({"mean": jnp.zeros(()), "log_std": jnp.zeros(())}, {"q": [jnp.zeros(())] * 2}),
        policy=policy,
        q=lambda params, obs, action: jnp.stack([q(action) + 0 * one for one in params]),
        v=lambda params, obs: obs[..., 0],
    )


def temperatures(q, temperature, iterations, **hypers):
    hypers = {"temperature": temperature, "learning_rate": 0.02, "temperature_lr": 0.02, "gamma": 0.0} | hypers
    setup = dict(num_steps=100, batch_size=64, warmup_steps=100, buffer_size=1000)
    algorithm = make("sac", Probe("constant", continuous=True), hypers, networks=known_q(q), **setup)
    step, state, rows = jax.jit(algorithm.step), algorithm.init(jax.random.key(0), algorithm.hypers), []
    for _ in range(iterations):
        state, metrics = step(state, algorithm.hypers)
        rows.append((float(metrics["temperature"]), float(metrics["entropy"])))
    return np.array(rows[1:])


def test_temperature_goes_to_zero_where_nothing_is_to_be_gained():
    """A constant Q: the policy becomes uniform, with entropy log 2 far above -1, so α falls all the way."""
    rows = temperatures(lambda action: 0 * action[..., 0], 1.0, 15)
    assert (np.diff(rows[:, 0]) < 0).all() and rows[-1, 0] < 0.01
    assert rows[5:, 1].min() > 0.5 * np.log(2)


def test_temperature_rises_until_the_entropy_meets_its_target():
    """A sharp peak and hardly any α: the policy first becomes too narrow, then α widens it."""
    rows = temperatures(lambda action: -200 * (action[..., 0] - 0.2) ** 2, 1e-3, 60)
    assert rows[:, 0].max() > 10 * rows[0, 0] and rows[:, 1].min() < -1.5
    np.testing.assert_allclose(rows[-5:, 1].mean(), -1, atol=0.1)
    # What N(c, α v) of width 1/400 gives: entropy ½ log(2πe α / 400) = -1, but for the squashing.
    np.testing.assert_allclose(rows[-5:, 0].mean(), 400 * np.exp(-2) / (2 * np.pi * np.e), rtol=0.2)


def test_networks_without_the_critic_that_is_asked_for_are_refused():
    with pytest.raises(RequestError, match="critic = 'v' needs networks with 'v'"):
        make("sac", Probe("acting", continuous=True), networks=known_q(lambda action: action[..., 0]), critic="v")


def test_policy_out_is_what_the_package_sees(float64):
    """The reference's networks are the package's."""
    core, learner, batch = problem(True, sac, sac.Setup(), HYPERS)
    out = policy_out(np.asarray(learner.params.actor), np.asarray(batch.obs), True, np)
    np.testing.assert_allclose(core.networks.policy(learner.params.actor, batch.obs).logits, out, rtol=1e-12)


def test_an_objective_of_ratio_and_advantage_is_refused():
    with pytest.raises(RequestError, match="sac takes no objective"):
        make("sac", Probe("acting", continuous=True), objective=lambda log_ratio, advantage: advantage)
