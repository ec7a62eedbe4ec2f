"""The incremental methods: whole updates replayed in NumPy, their normalisations by hand, limits, and learners side by side."""

import dataclasses
import math

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from incremental_replay import A, O, Observations, Replay, Track, ends, leaves_of, norm, to_float64
from probe_envs import Probe

from pgjax import normalizers
from pgjax.algorithms import avg, get, iac, make
from pgjax.errors import RequestError
from pgjax.spaces import Box
from pgjax.stepwise import incremental
from pgjax.stepwise.incremental_networks import make_incremental_networks
from pgjax.stepwise.td_scaling import init_td_scale, update_td_scale
from pgjax.types import TimeStep

ENV = Track()
TINY = dict(hidden_sizes=(4, 3))
ALL_ON = dict(normalize_obs=True, penultimate_norm=True, scaler="code")
ALL_OFF = dict(normalize_obs=False, penultimate_norm=False, scaler="none")
# A large epsilon keeps Adam from magnifying the rounding of the differences.
HYPERS = dict(learning_rate=0.02, critic_lr=0.05, gamma=0.9, adam_b1=0.6, adam_b2=0.9, adam_eps=0.01)


def close_trees(found, expected, atol=1e-6):
    assert len(leaves_of(found)) == len(leaves_of(expected))
    for x, y in zip(leaves_of(found), leaves_of(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


# ---- Whole updates --------------------------------------------------------------------------------------------------

VARIANTS = {
    "avg": ("avg", {}, dict(alpha=0.3)),
    "avg_basic": ("avg", dict(**ALL_OFF, std_param="exp"), dict(alpha=0.3)),
    "avg paper": ("avg", dict(scaler="paper", boundary="terminate"), dict(alpha=0.3)),
    "iac": ("iac", dict(**ALL_ON, entropy_bonus="both"), dict(alpha=0.3)),
    "sac1": ("sac1", ALL_ON, dict(temperature=0.3, temperature_lr=0.1, tau=0.2)),
    "td3_1": ("td3_1", ALL_ON, dict(tau=0.2, exploration_noise=0.7, target_noise=0.6, target_noise_clip=0.3)),
}
STEPS = 5
REPORTED = """env_steps episodes episode_return episode_length nonfinite loss_policy loss_value td_scale td_error grad_norm
    grad_norm_actor grad_norm_critic critic_head_norm action_size""".split()
SQUASHED = ["entropy", "entropy_gaussian"]
OWN = {"avg": SQUASHED, "iac": SQUASHED, "sac1": [*SQUASHED, "temperature"], "td3_1": []}


def doubles(algorithm, seed, where):
    """A fresh state in double precision, with statistics that have seen its observation in double precision."""
    state = to_float64(algorithm.init(jax.random.key(seed), algorithm.hypers, where))
    if state.learner.obs_moments is None:
        return state
    moments = incremental.observe(to_float64(normalizers.init_moments((O,))), state.obs)
    return state.replace(learner=state.learner.replace(obs_moments=moments))


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_worked_out_by_hand(variant):
    name, setup, hypers = VARIANTS[variant]
    with jax.enable_x64(True):
        algorithm = make(name, ENV, {**HYPERS, **hypers}, num_steps=STEPS, **TINY, **setup)
        hypers, step = to_float64(algorithm.hypers), jax.jit(algorithm.step)
        # Ended twice or cut twice: the same program.
        for where in (ends(terminate_at=2), ends(truncate_at=2)):
            fresh = doubles(algorithm, 3, where)
            replay = Replay(name, algorithm, fresh, hypers, where).run(STEPS)
            state, metrics = step(fresh, hypers)

            actor, critics = state.learner.params
            close_trees(actor, replay.actor)
            close_trees(critics, replay.critics)
            assert not equal_trees(actor, fresh.learner.params.actor)
            if name == "td3_1":
                close_trees(tuple(state.learner.extra), replay.target)
            if name == "sac1":
                close_trees(state.learner.extra["target"], replay.target)
                np.testing.assert_allclose(state.learner.extra["log_temperature"], replay.log_temperature, atol=1e-7)
            np.testing.assert_allclose(state.obs, replay.x, atol=1e-7)
            if algorithm.setup.normalize_obs:
                np.testing.assert_allclose(state.learner.obs_moments.mean, replay.observations.mean, rtol=1e-6)
                np.testing.assert_allclose(state.learner.obs_moments.var, replay.observations.var, rtol=1e-6)
            assert sorted(metrics) == sorted([*REPORTED, *OWN[name]])
            for column in {*replay.rows[0]} - {"reward", "ended", "delta"}:
                expected = np.mean([row[column] for row in replay.rows])
                np.testing.assert_allclose(metrics[column], expected, rtol=1e-4, err_msg=column)
            assert metrics["episodes"] == sum(row["ended"] for row in replay.rows) == 2
            returns = [sum(row["reward"] for row in replay.rows[first : first + 2]) for first in (0, 2)]
            np.testing.assert_allclose(metrics["episode_return"], np.mean(returns), atol=1e-7)
            np.testing.assert_allclose(state.episode_return, replay.rows[4]["reward"], atol=1e-7)
            assert metrics["episode_length"] == 2 and metrics["nonfinite"] == 0


# ---- One step under the microscope ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_step():
    """``one_step(env_params, **hypers) -> (state before, state after, metrics)`` of AVG, in float64, one program for all."""
    with jax.enable_x64(True):
        algorithm = make("avg", ENV, HYPERS, num_steps=1, **TINY)
        start = doubles(algorithm, 1, ends())
        program = jax.jit(algorithm.step)

    def run(where=None, state=None, **hypers):
        with jax.enable_x64(True):
            before = start if state is None else state
            before = before.replace(env_params=ends() if where is None else where)
            changed = algorithm.hypers.replace(**{k: np.float64(v) for k, v in hypers.items()})
            return before, *program(before, to_float64(changed))

    run.algorithm = algorithm
    return run


# Adam that moves by the gradient itself: g / (|g| + eps) times eps, for eps far above every g.
DESCENT = dict(adam_b1=0.0, adam_b2=0.0, adam_eps=1e10, learning_rate=1e10, critic_lr=1e10)


def moved(before, after, part):
    """What was subtracted from the parameters of ``actor`` or ``critic``."""
    return jax.tree.map(lambda x, y: x - y, getattr(before.learner.params, part), getattr(after.learner.params, part))


def equal_trees(one, two):
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(leaves_of(one), leaves_of(two), strict=True))


def test_actor_and_critic_move_at_once_from_the_same_parameters(one_step):
    ends_ = {(a, c): one_step(learning_rate=a, critic_lr=c)[1].learner.params for a in (0, 1) for c in (0, 1)}
    assert equal_trees(ends_[0, 1].critic, ends_[1, 1].critic) and equal_trees(ends_[1, 0].actor, ends_[1, 1].actor)
    assert not equal_trees(ends_[0, 0].critic, ends_[0, 1].critic) and not equal_trees(ends_[0, 0].actor, ends_[1, 0].actor)


def test_the_critics_gradient_is_that_of_its_own_value_alone(one_step):
    """-2 δ / σ² ∇Q(s, a): none of it comes through the target or the scale."""
    before, after, metrics = one_step(**DESCENT)
    networks = one_step.algorithm.core.networks
    with jax.enable_x64(True):
        replay = Replay("avg", one_step.algorithm, before, to_float64(one_step.algorithm.hypers), ends()).run(1)
        moments = before.learner.obs_moments
        s = normalizers.normalize(moments, before.obs)
        noise = jax.random.normal(jax.random.split(jax.random.fold_in(before.key, 0))[0], (2, A), jnp.float64)[0]
        action = jnp.tanh(networks.policy(before.learner.params.actor, s).sample_with(noise))
        slope = jax.grad(lambda critic: networks.value(critic[0], s, action))(before.learner.params.critic)
        (row,) = replay.rows
        expected = jax.tree.map(lambda g: -2 * row["delta"] / row["td_scale"] ** 2 * g, slope)
        close_trees(moved(before, after, "critic"), expected, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm_critic"], norm(expected), rtol=1e-6)


def test_adam_from_a_fresh_state_moves_by_the_sign_and_forgets_the_size():
    hypers = incremental.Hypers(adam_b1=np.float32(0), adam_b2=np.float32(0.999), adam_eps=np.float32(1e-8))
    rng = np.random.default_rng(0)
    gradient = {"a": rng.normal(size=(5, 4)).astype(np.float32), "b": np.float32([1e-9, -1e-8, 0, 3.0])}
    params = jax.tree.map(np.zeros_like, gradient)
    fresh = incremental.adam(hypers).init(params)
    after, state = incremental.descend(hypers, params, fresh, gradient, 0.1)
    for name, g in gradient.items():
        np.testing.assert_allclose(after[name], -0.1 * g / (np.abs(g) + 1e-8), rtol=2e-5)
    larger = {"a": 100 * gradient["a"], "b": gradient["b"]}
    scaled, scaled_state = incremental.descend(hypers, params, fresh, larger, 0.1)
    np.testing.assert_allclose(scaled["a"], after["a"], rtol=1e-5)
    # And again, where the second moments remember.
    one, _ = incremental.descend(hypers, after, state, jax.tree.map(lambda g: -2 * g, gradient), 0.1)
    two, _ = incremental.descend(hypers, scaled, scaled_state, jax.tree.map(lambda g: -2 * g, larger), 0.1)
    np.testing.assert_allclose(two["a"] - scaled["a"], one["a"] - after["a"], rtol=1e-5)


def test_an_end_hides_what_comes_after_and_a_cut_does_not(one_step):
    """The targets of the same transition, read from the TD error."""
    with jax.enable_x64(True):
        where = {"on": ends(), "terminated": ends(terminate_at=1), "truncated": ends(truncate_at=1)}
        found = {name: one_step(params) for name, params in where.items()}
    before, after, metrics = found["on"]
    errors = {name: row["td_error"] * row["td_scale"] for name, (_, _, row) in found.items()}
    for name in ("terminated", "truncated"):
        # The next episode is begun after both, and the statistics have seen its first observation.
        assert (found[name][1].obs > 10).all() and (np.abs(after.obs) < 10).all()
        assert found[name][1].learner.obs_moments.count == 3 and after.learner.obs_moments.count == 2
        assert found[name][2]["episodes"] == 1 and metrics["episodes"] == 0
    # On or cut: the same true successor is valued, whatever observation comes next.
    assert errors["on"] == errors["truncated"]
    reward = float(after.episode_return)
    networks = one_step.algorithm.core.networks
    with jax.enable_x64(True):
        s = normalizers.normalize(before.learner.obs_moments, before.obs)
        noise = jax.random.normal(jax.random.split(jax.random.fold_in(before.key, 0))[0], (2, A), jnp.float64)[0]
        action = jnp.tanh(networks.policy(before.learner.params.actor, s).sample_with(noise))
        q = networks.value(before.learner.params.critic[0], s, action)
        np.testing.assert_allclose(errors["terminated"], np.abs(reward - q), rtol=1e-9)
    assert abs(errors["terminated"] - errors["on"]) > 1e-3
    # The scale of the authors' code counts a return where the task ended, and lets it go on over a cut.
    scales = {name: state.learner.td_scale for name, (_, state, _) in found.items()}
    assert scales["terminated"].squared_return.count == 1 and scales["terminated"].return_ == 0
    assert scales["truncated"].squared_return.count == 0 and scales["truncated"].return_ == scales["on"].return_ != 0


# ---- Networks -------------------------------------------------------------------------------------------------------


def networks_of(env=ENV, seed=0, **setup):
    setup = avg.Setup(**{"hidden_sizes": (16, 8), **setup})
    networks = make_incremental_networks(env, setup)
    return networks, networks.init(jax.random.key(seed))


def many(scale=1.0, num=500):
    rng = np.random.default_rng(0)
    return jnp.asarray(scale * rng.normal(size=(num, O))), jnp.asarray(rng.uniform(-1, 1, size=(num, A)))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_with_unit_features_every_output_begins_between_minus_one_and_one(scale):
    networks, params = networks_of()
    obs, action = many(scale)
    q = networks.value(params.critic[0], obs, action)
    dist = networks.policy(params.actor, obs)
    assert (np.abs(q) <= 1 + 1e-6).all() and (np.abs(dist.mean) <= 1 + 1e-6).all()
    assert (np.abs(2 * dist.log_std) <= 1 + 1e-6).all()  # h, whose half is log σ
    assert np.abs(q).max() > 0.3 and np.abs(dist.mean).max() > 0.3
    # And never beyond the size of its last layer.
    wild = jax.tree.map(lambda x: 3 * x + 0.1, params.critic[0])
    bound = np.linalg.norm(wild["value"]["kernel"]) + np.abs(wild["value"]["bias"]).max()
    assert (np.abs(networks.value(wild, obs, action)) <= bound + 1e-5).all()
    loose, params = networks_of(penultimate_norm=False)
    if scale == 1e6:
        assert np.abs(loose.value(params.critic[0], obs, action)).max() > 1


def test_without_biases_the_size_of_the_input_makes_no_difference():
    networks, params = networks_of()
    obs, action = many()
    scaled = jax.tree.map(lambda x: x, params.actor)
    scaled["hidden"][0]["kernel"] = 7 * params.actor["hidden"][0]["kernel"]
    for one, other in ((params.actor, 7 * obs), (scaled, obs)):
        np.testing.assert_allclose(networks.policy(one, other).mean, networks.policy(params.actor, obs).mean, atol=1e-5)
    q = networks.value(params.critic[0], obs, action)
    np.testing.assert_allclose(networks.value(params.critic[0], 7 * obs, 7 * action), q, atol=1e-5)
    loose, params = networks_of(penultimate_norm=False)
    assert np.abs(loose.policy(params.actor, 7 * obs).mean - loose.policy(params.actor, obs).mean).max() > 0.1


def test_kernels_begin_orthogonal_with_gain_one_and_biases_at_zero():
    _, params = networks_of()
    layers = [*params.actor["hidden"], params.actor["mean"], params.actor["spread"]]
    layers += [*params.critic[0]["hidden"], params.critic[0]["value"]]
    assert [layer["kernel"].shape for layer in layers] == [(3, 16), (16, 8), (8, 2), (8, 2), (5, 16), (16, 8), (8, 1)]
    for layer in layers:
        w = np.asarray(layer["kernel"])
        product = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        np.testing.assert_allclose(product, np.eye(len(product)), atol=1e-5)
        assert (layer["bias"] == 0).all()


def test_features_of_nothing_are_nothing_and_have_a_gradient():
    networks, params = networks_of()
    zero = jnp.zeros(O)
    value, slope = jax.value_and_grad(lambda critic: networks.value(critic, zero, jnp.zeros(A)))(params.critic[0])
    assert value == 0 and all(np.isfinite(leaf).all() for leaf in leaves_of(slope))


def with_output(networks, params, mean, h):
    """An actor that gives these numbers whatever it sees."""
    actor = jax.tree.map(jnp.zeros_like, params.actor)
    actor["mean"]["bias"], actor["spread"]["bias"] = jnp.full(A, mean), jnp.full(A, h)
    return networks.policy(actor, jnp.ones(O))


@pytest.mark.parametrize(("mean", "h"), [(0.0, 0.0), (0.7, -1.5), (-1.2, 1.9), (0.3, 5.0)])
@pytest.mark.parametrize("std_param", ["exp_half", "exp"])
def test_the_policy_is_a_density_whose_variance_is_the_exponential(float64, mean, h, std_param):
    networks, params = networks_of(std_param=std_param)
    dist = with_output(networks, to_float64(params), mean, h)
    std = math.exp(min(h, 2.0) / (2 if std_param == "exp_half" else 1))
    np.testing.assert_allclose(jnp.exp(dist.log_std), std, rtol=1e-12)
    # ∫ π(a) da over (-1, 1) in one dimension, by a = tanh u.
    one = jax.tree.map(lambda x: x[:1], dist)
    u = np.linspace(mean - 12 * std, mean + 12 * std, 200_001)
    density = np.exp(one.log_prob(u[:, None])) / np.cosh(u) ** 2
    np.testing.assert_allclose(np.trapezoid(density, u), 1, atol=1e-6)
    reference = distrax.Transformed(distrax.Normal(mean, std), distrax.Tanh())
    near = np.linspace(-3, 3, 50)
    np.testing.assert_allclose(one.log_prob(near[:, None]), reference.log_prob(np.tanh(near)), atol=1e-5)
    assert np.isfinite(one.log_prob(np.array([[20.0], [-20.0]]))).all()


def test_the_actors_gradient_is_the_reparametrised_one(float64):
    """Q(s, a) = c·a and α = 0: dL/dμ_j = -c_j (1 - a_j²)."""
    c, mean, noise = np.array([0.7, -1.3]), np.array([0.2, -0.5]), np.array([1.1, -0.4])

    def loss(mean):
        u = mean + np.exp(-0.3) * noise
        return avg.avg_policy_loss(0.0, c @ jnp.tanh(u), 0.0)

    action = np.tanh(mean + np.exp(-0.3) * noise)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(mean)), -c * (1 - action**2), rtol=1e-12)


# ---- Running statistics ---------------------------------------------------------------------------------------------


def scales(form, rewards, gamma=0.99, terminated=(), truncated=(), decay=1.0):
    scale, sigmas = to_float64(init_td_scale()), []
    for i, reward in enumerate(rewards):
        flags = (jnp.asarray(i in which) for which in (terminated, truncated))
        scale, sigma = update_td_scale(scale, jnp.float64(reward), gamma, *flags, form, decay)
        sigmas.append(float(sigma))
    return scale, sigmas


def test_the_scale_of_three_rewards(float64):
    scale, sigmas = scales("code", [1, 2, 3], terminated=(2,))
    np.testing.assert_allclose(scale.reward.var, 2 / 3)
    assert scale.ends == 1
    np.testing.assert_allclose([scale.squared_return.mean, scale.squared_return.count], [36, 1])
    np.testing.assert_allclose(sigmas, [1, 0.5, 2.9168], atol=1e-4)
    assert scale.return_ == 0


def test_the_scale_where_little_happens(float64):
    assert scales("code", [2.0] * 50)[1] == [1.0] * 50
    # Once a return was seen, the floor is 0.01.
    _, sigmas = scales("code", [0.0, 0.0, 0.0], terminated=(1,))
    np.testing.assert_allclose(sigmas, [1, 0.01, 0.01])


def test_a_cut_goes_on_in_the_code_and_ends_in_the_paper(float64):
    code, sigmas = scales("code", [1, 2, 3], truncated=(1,))
    assert code.return_ == 6 and code.squared_return.count == 0 and code.ends == 0
    paper, _ = scales("paper", [1, 2, 3, 4], gamma=0.5, truncated=(1,), terminated=(3,))
    # 1 + 0.5 * 2 and 3 + 0.5 * 4
    np.testing.assert_allclose([paper.squared_return.mean, paper.squared_return.count], [(2**2 + 5**2) / 2, 2])
    _, sigmas = scales("paper", [1, 20, 3, 4], gamma=0.5, truncated=(1,), terminated=(3,))
    assert sigmas[:3] == [1, 1, 1]
    expected = np.var([1, 20, 3, 4]) + np.var([0.5, 0, 0.5, 0]) * (11**2 + 5**2) / 2
    np.testing.assert_allclose(sigmas[3], np.sqrt(expected))


def test_the_scale_does_not_drift_where_ends_are_rare():
    """A million steps in float32, an end in every hundredth: σ² = γ² p (1 - p) E[G²], for rewards that do not vary."""

    @jax.jit
    def run(scale):
        def step(scale, number):
            end = number % 100 == 99
            return update_td_scale(scale, jnp.float32(1), jnp.float32(0.99), end, jnp.zeros_like(end), "code")

        return jax.lax.scan(step, scale, jnp.arange(1_000_000))[1]

    sigma = run(init_td_scale())
    expected = 0.99 * np.sqrt(0.01 * 0.99) * 100
    np.testing.assert_allclose(np.asarray(sigma)[[999, 99_999, 999_999]], expected, rtol=1e-5)


def test_the_return_of_iac_discounts_backwards(float64):
    scale, _ = scales("code", [1, 2, 3], gamma=0.5, terminated=(2,), decay=0.5)
    np.testing.assert_allclose(scale.squared_return.mean, (0.25 * 1 + 0.5 * 2 + 3) ** 2)


def test_observations_are_normalised_as_gymnasium_does():
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(10_000, O)) * [1e-2, 3, 50] + [5, -1, 100]).astype(np.float32)

    def one(moments, x):
        moments = incremental.observe(moments, x)
        return moments, incremental.normalize(moments, x)

    moments, found = jax.jit(lambda data: jax.lax.scan(one, normalizers.init_moments((O,)), data))(data)
    reference = Observations(O)
    expected = np.stack([reference(x) for x in data.astype(np.float64)])
    np.testing.assert_allclose(moments.mean, reference.mean, rtol=1e-4)
    np.testing.assert_allclose(moments.var, reference.var, rtol=1e-4)
    np.testing.assert_allclose(found[100:], expected[100:], rtol=1e-3, atol=1e-3)
    assert (np.abs(found[0]) <= 0.0101).all() and np.abs(found[0]).max() > 0


# ---- Limits ---------------------------------------------------------------------------------------------------------


def test_without_entropy_and_spread_avg_is_ddpg_of_one_step(one_step):
    """The actor's step is ∇_a Q times ∇μ, at the mode."""
    networks = one_step.algorithm.core.networks
    with jax.enable_x64(True):
        start = one_step()[0]
        actor = jax.tree.map(lambda x: x, start.learner.params.actor)
        actor["spread"]["bias"] = actor["spread"]["bias"] - 1e3
        start = start.replace(learner=start.learner.replace(params=start.learner.params._replace(actor=actor)))
        before, after, metrics = one_step(state=start, alpha=0.0, **DESCENT)
        s = normalizers.normalize(before.learner.obs_moments, before.obs)

        def mode(actor):
            return jnp.tanh(networks.policy(actor, s).mode())

        slope = jax.grad(lambda action: networks.value(before.learner.params.critic[0], s, action))(mode(actor))
        (dpg,) = jax.vjp(mode, actor)[1](-slope)
        # σ = e^-10 is what is left between the sample and the mode.
        close_trees(moved(before, after, "actor"), dpg, atol=1e-3 * norm(dpg))
        assert norm(dpg) > 1e-2

        # The critic's is that of TD(0) from the mode of the next state.
        old = before.learner.params.critic[0]
        next_s = normalizers.normalize(after.learner.obs_moments, after.obs)
        acted = jnp.tanh(networks.policy(actor, s).mode())
        bootstrap = networks.value(old, next_s, jnp.tanh(networks.policy(actor, next_s).mode()))
        delta = after.episode_return + HYPERS["gamma"] * bootstrap - networks.value(old, s, acted)
        slope = jax.grad(lambda critic: networks.value(critic, s, acted))(old)
        td = jax.tree.map(lambda g: -2 * delta / metrics["td_scale"] ** 2 * g, slope)
        close_trees(moved(before, after, "critic"), (td,), atol=1e-3 * norm(td))
        assert norm(td) > 1e-2


def test_without_entropy_and_scale_iac_is_the_textbooks(float64):
    """w += β 2 δ s and θ += α δ ∇log π for linear functions, in numbers worked out from the Gaussian."""
    algorithm = make("iac", ENV, dict(**DESCENT, gamma=0.9), num_steps=1, hidden_sizes=(), entropy_bonus="none", **ALL_OFF)
    start = to_float64(algorithm.init(jax.random.key(2), algorithm.hypers, ends()))
    # Observations near 10 would drown the Gaussian.
    start = start.replace(obs=start.obs / 10, env_state=start.env_state.replace(obs=start.env_state.obs / 10))
    after, _ = algorithm.step(start, to_float64(algorithm.hypers))
    s, next_s = np.asarray(start.obs), np.asarray(after.obs)
    actor, (critic,) = jax.tree.map(np.asarray, start.learner.params)
    v = [(x @ critic["value"]["kernel"] + critic["value"]["bias"])[0] for x in (s, next_s)]
    delta = float(after.episode_return) + 0.9 * v[1] - v[0]
    (new_critic,) = after.learner.params.critic
    np.testing.assert_allclose(new_critic["value"]["kernel"][:, 0] - critic["value"]["kernel"][:, 0], 2 * delta * s, rtol=1e-5)
    noise = np.asarray(jax.random.normal(jax.random.split(jax.random.fold_in(start.key, 0))[0], (1, A), jnp.float64))[0]
    std = np.exp((s @ actor["spread"]["kernel"] + actor["spread"]["bias"]) / 2)
    # d log N(u; μ, σ) / dμ = ε / σ;  with σ = exp(h/2), d/dh = (ε² - 1) / 2
    change = jax.tree.map(lambda new, old: np.asarray(new - old), after.learner.params.actor, actor)
    np.testing.assert_allclose(change["mean"]["kernel"], delta * np.outer(s, noise / std), rtol=1e-5)
    np.testing.assert_allclose(change["spread"]["kernel"], delta * np.outer(s, (noise**2 - 1) / 2), rtol=1e-5)


# ---- Warm starts ----------------------------------------------------------------------------------------------------


def test_a_warm_start_copies_the_policy_for_its_targets_too():
    """TD3 values what the copy of its actor does: it must be the actor that was given, not the one drawn at random."""
    algorithm = make("td3_1", ENV, **TINY)
    fresh, other = (algorithm.init(jax.random.key(seed), algorithm.hypers) for seed in range(2))
    assert not equal_trees(fresh.learner.params.actor, other.learner.params.actor)
    warm = algorithm.warm_start(fresh, algorithm.policy(other)).learner
    assert equal_trees(warm.params.actor, other.learner.params.actor)
    assert equal_trees(warm.extra.actor, warm.params.actor) and equal_trees(warm.extra.critic, warm.params.critic)


# ---- Learners side by side ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lanes():
    """Starts and numbers of four AVG learners, and what runs 100 steps of many and of one; in double precision, because after
    so many updates single precision shows little but how rounding errors grow."""

    def program(step):
        step = jax.jit(step)

        def run(*args):
            with jax.enable_x64(True):
                return step(*args)

        return run

    with jax.enable_x64(True):
        algorithm = make("avg", ENV, HYPERS, num_steps=100, **TINY)
        hypers = [algorithm.hypers.replace(alpha=np.float32(alpha)) for alpha in (0.0, 0.1, 0.2, 0.3)]
        starts = [doubles(algorithm, seed, ends(terminate_at=7)) for seed in range(4)]
        starts, hypers = (jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (starts, map(to_float64, hypers)))
    return starts, hypers, program(jax.vmap(algorithm.step)), program(algorithm.step), program


def raw(tree):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in jax.tree.leaves(tree)
    ]


def test_a_learner_among_others_is_the_learner_alone(lanes):
    starts, hypers, many_steps, step, _ = lanes
    together, metrics = many_steps(starts, hypers)
    for i in range(4):
        alone, row = step(*jax.tree.map(lambda x, i=i: x[i], (starts, hypers)))
        for x, y in zip(raw(together), raw(alone), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-7)
        for name in row:
            np.testing.assert_allclose(metrics[name][i], row[name], rtol=1e-5, atol=1e-7, err_msg=name)
    order = np.array([2, 0, 3, 1])
    shuffled, _ = many_steps(*jax.tree.map(lambda x: x[order], (starts, hypers)))
    for x, y in zip(raw(together), raw(shuffled), strict=True):
        np.testing.assert_array_equal(x[order], y)


@pytest.mark.parametrize("what", ["parameter", "observation", "reward scale"])
def test_a_learner_that_goes_non_finite_is_frozen_and_leaves_the_others_alone(lanes, what):
    starts, hypers, many_steps, _, _ = lanes
    sound, _ = many_steps(starts, hypers)
    learner = starts.learner
    with jax.enable_x64(True):
        if what == "parameter":
            params = learner.params._replace(actor=jax.tree.map(lambda x: x.at[0].set(jnp.nan), learner.params.actor))
            hurt = starts.replace(learner=learner.replace(params=params))
        elif what == "observation":
            hurt = starts.replace(env_state=starts.env_state.replace(obs=starts.env_state.obs.at[0].set(jnp.nan)))
        else:
            scale = learner.td_scale.replace(return_=learner.td_scale.return_.at[0].set(jnp.inf))
            hurt = starts.replace(learner=learner.replace(td_scale=scale))
    ended, metrics = many_steps(hurt, hypers)
    np.testing.assert_array_equal(metrics["nonfinite"], [1, 0, 0, 0])
    for x, y in zip(raw(sound), raw(ended), strict=True):
        np.testing.assert_array_equal(x[1:], y[1:])
    for x, y in zip(raw(hurt.learner), raw(ended.learner), strict=True):
        np.testing.assert_array_equal(x[0], y[0], err_msg="the learned part stays as it was")
    assert (ended.env_steps == 100).all()
    assert all(np.isfinite(value).all() for name, value in metrics.items() if not name.startswith("episode_"))


def test_a_huge_learning_rate_freezes_finite_numbers(lanes):
    starts, hypers, many_steps, _, _ = lanes
    rates = np.array([3e38, *hypers.learning_rate[1:]])
    ended, metrics = many_steps(starts, hypers.replace(learning_rate=rates))
    assert all(np.isfinite(x).all() for x in raw(ended.learner))
    assert not metrics["nonfinite"][1:].any()


def test_iterations_may_be_cut_anywhere(lanes):
    starts, hypers, _, step, program = lanes
    start, numbers = jax.tree.map(lambda x: x[1], (starts, hypers))
    whole, _ = step(start, numbers)
    part = program(make("avg", ENV, HYPERS, num_steps=20, **TINY).step)
    state, total = start, 0.0
    for _ in range(5):
        state, metrics = part(state, numbers)
        total += metrics["episodes"]
    for x, y in zip(raw(whole), raw(state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
    assert total == 100 // 7


# ---- Bandit ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bandit(Track):
    """One step of reward -(a - 0.5)², then over."""

    observation_space = Box((1,))
    action_space = Box((1,), -1.0, 1.0)
    max_episode_steps = 1
    default_params = None

    def reset(self, key, params):
        obs = jnp.ones((key.shape[0], 1))
        return obs, obs

    def step(self, key, env_state, action, params):
        ended = jnp.ones(action.shape[0], bool)
        reward = -((action[:, 0] - 0.5) ** 2)
        return env_state, TimeStep(env_state, reward, ended, ~ended, env_state, {})


@pytest.mark.slow
def test_a_bandit_is_solved_by_most_learners():
    algorithm = make(
        "avg",
        Bandit(),
        dict(learning_rate=1e-3, critic_lr=1e-3, alpha=1e-3, gamma=0.99),
        num_steps=20_000,
        hidden_sizes=(32, 32),
    )
    keys = jax.random.split(jax.random.key(0), 64)
    states = jax.jit(jax.vmap(algorithm.init, (0, None)))(keys, algorithm.hypers)
    states, _ = jax.jit(jax.vmap(algorithm.step, (0, None)))(states, algorithm.hypers)

    def mean_action(state, key):
        policy = algorithm.policy(state)
        return algorithm.act(policy, jnp.ones((1000, 1)), key).mean()

    means = jax.jit(jax.vmap(mean_action))(states, keys)
    assert (np.abs(means - 0.5) < 0.1).mean() >= 0.9, np.sort(means)


# ---- Requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(num_steps=0), ["num_steps = 0", ">= 1"]),
        (dict(scaler="papre"), ["scaler = 'papre'", "code, paper, none"]),
        (dict(hidden_sizes=(0,)), ["hidden_sizes = (0,)", "positive"]),
        (dict(activation="lealy_relu"), ["activation", "leaky_relu"]),
        (dict(num_env=3), ["num_env"]),
    ],
)
def test_unusable_setups_are_refused(fields, words):
    with pytest.raises(RequestError) as error:
        make("avg", ENV, **fields)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_discrete_actions_and_objectives_are_refused():
    for name in ("avg", "iac", "sac1", "td3_1"):
        with pytest.raises(RequestError, match="discrete actions"):
            make(name, Probe("acting"))
        with pytest.raises(RequestError, match="takes no objective"):
            make(name, ENV, objective=lambda log_ratio, advantage: advantage)
    with pytest.raises(RequestError, match="policy_delay = 0"):
        make("td3_1", ENV, policy_delay=0)
    assert get("iac") is iac
