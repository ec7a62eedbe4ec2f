"""PROPS and ROS: fits of the behaviour policy derived once more in NumPy, the buffer, and limits in which they are PPO."""

import dataclasses
import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from flax import struct
from probe_envs import Probe
from synthetic import O

from pgjax import metrics, on_policy, sampling_error
from pgjax.algorithms import ppo, props, ros
from pgjax.distributions import Categorical, DiagGaussian
from pgjax.errors import RequestError
from pgjax.experiments import presets
from pgjax.networks import ActorCritic, Networks
from pgjax.spaces import Box, Discrete
from pgjax.types import TimeStep

RATIOS = np.array([0.3, 0.69, 0.71, 1.0, 1.29, 1.31, 3.0])


# ---- The objective --------------------------------------------------------------------------------------------------


def test_clip_table(float64):
    """Slope in r: 0 below 1 - ε, else -1, to be maximised; also above 1 + ε."""
    value = props.props_surrogate(np.log(RATIOS), 0.3)
    np.testing.assert_allclose(value, [-0.7, -0.7, -0.71, -1, -1.29, -1.31, -3], rtol=1e-12)
    slope = jax.grad(lambda r: props.props_surrogate(jnp.log(r), 0.3).sum())(jnp.asarray(RATIOS))
    np.testing.assert_allclose(slope, [0, 0, -1, -1, -1, -1, -1], rtol=1e-9)
    np.testing.assert_allclose(props.props_surrogate(np.log(RATIOS), np.inf), -RATIOS, rtol=1e-12)


def test_both_divergences(float64):
    """Against samples, and against each other where the policies are close."""
    rng = np.random.default_rng(0)
    target = DiagGaussian(*(jnp.asarray(x) for x in rng.normal(size=(2, 1, 3)) / 2))
    dist = DiagGaussian(target.mean + 0.3, target.log_std - 0.2)
    draw = dist.sample_with(jnp.asarray(rng.normal(size=(400_000, 1, 3))))
    sampled = (dist.log_prob(draw) - target.log_prob(draw)).mean()
    mean = props.behavior_divergence(dist, target, "behavior_target_mean")[0]
    np.testing.assert_allclose(mean, sampled / 3, rtol=0.02)
    np.testing.assert_allclose(3 * mean, synthetic.kl((dist.mean, dist.log_std), (target.mean, target.log_std), None)[0])
    other = props.behavior_divergence(dist, target, "target_behavior")[0]
    np.testing.assert_allclose(other, synthetic.kl((target.mean, target.log_std), (dist.mean, dist.log_std), None)[0])
    p, q = np.array([0.2, 0.8]), np.array([0.5, 0.5])
    one, two = Categorical(jnp.log(p)[None]), Categorical(jnp.log(q)[None])
    np.testing.assert_allclose(props.behavior_divergence(one, two, "target_behavior")[0], (q * np.log(q / p)).sum())
    np.testing.assert_allclose(props.behavior_divergence(one, two, "behavior_target_mean")[0], (p * np.log(p / q)).sum())
    for kind in ("target_behavior", "behavior_target_mean"):
        np.testing.assert_allclose(props.behavior_divergence(dist, dist, kind), 0, atol=1e-15)


# ---- One fit --------------------------------------------------------------------------------------------------------

NUM = 24


class Fitting:
    """A fit of PROPS on 24 samples of a linear Gaussian policy, and what it is made of."""

    def __init__(self, hypers=(), module=props, **setup):
        defaults = dict(num_envs=1, num_steps=12, behavior_num_steps=3, behavior_minibatches=1, behavior_epochs=1)
        self.case = synthetic.shipped(module, {}, **(defaults if module is props else {"num_steps": 12}) | setup)
        self.hypers = self.case.with_(**dict(hypers))
        self.policy = synthetic.random_policy()
        self.target = synthetic.make_learner(self.case, self.policy).params.actor
        rng = np.random.default_rng(3)
        self.obs = rng.normal(size=(NUM, 1, O))
        mean, log_std = synthetic.distribution(self.policy, self.obs)
        # Not quite its own actions: some are too frequent.
        self.action = mean + np.exp(log_std) * (0.4 + 0.8 * rng.normal(size=mean.shape))
        self.samples = self.judged(self.policy)
        self.opt_state = props._optimizer(self.case.core.setup, self.hypers).init(self.target)
        self.run = jax.jit(
            lambda opt_state, samples, present, hypers: props.fit_behavior(
                self.case.core, jax.random.key(0), self.target, opt_state, samples, present, hypers
            )
        )

    def judged(self, policy):
        mean, log_std = synthetic.distribution(policy, self.obs)
        dist = DiagGaussian(jnp.asarray(mean), jnp.asarray(log_std))
        return props.Samples(self.obs, self.action, dist, synthetic.log_prob(policy, self.obs, self.action))

    def __call__(self, opt_state=None, present=None, samples=None):
        present = np.ones((NUM, 1), bool) if present is None else present
        return self.run(opt_state or self.opt_state, samples or self.samples, present, self.hypers)

    def policy_of(self, actor):
        critic = synthetic.make_learner(self.case, self.policy).params.critic
        return synthetic.policy_of(self.case, dataclasses.make_dataclass("L", ["params"])(ActorCritic(actor, critic)))

    def descent(self, num_steps, adam=None, rows=slice(None), kind="behavior_target_mean"):
        """The policies of so many full-batch steps from θ by hand, with the sampled KL before each of them."""
        obs, action = self.obs[rows, 0], self.action[rows, 0]
        h = {name: float(getattr(self.hypers, name)) for name in props.Hypers.__dataclass_fields__ if "behavior" in name}
        policy, path, kls = self.policy, [self.policy], []
        old = synthetic.distribution(self.policy, obs)
        for _ in range(num_steps):
            log_ratio = synthetic.log_prob(policy, obs, action) - synthetic.log_prob(self.policy, obs, action)
            ratio = np.exp(log_ratio)
            kls.append((ratio - 1 - log_ratio).mean())
            weight = (ratio * (ratio > 1 - h["behavior_clip_eps"]) / len(obs))[:, None]
            gradient = synthetic.pull_back(obs, *(weight * slope for slope in synthetic.score(policy, obs, action)))
            reverse = kind == "behavior_target_mean"
            penalty = synthetic.kl_gradient(policy, old, obs, reverse=reverse) / (2 if reverse else 1)
            gradient = gradient + h["behavior_kl_coef"] * penalty
            gradient = gradient * min(1, h["behavior_max_grad_norm"] / np.linalg.norm(gradient))
            direction = adam.direction(gradient) if adam else gradient
            policy = synthetic.moved(policy, -h["behavior_learning_rate"] * direction)
            path.append(policy)
        return path, kls

    def equals(self, actor, policy, rtol=1e-9):
        np.testing.assert_allclose(synthetic.vector(self.policy_of(actor)), synthetic.vector(policy), rtol=rtol, atol=1e-12)


def test_ros_takes_one_plain_step_away_from_what_the_data_hold_too_often(float64):
    fitting = Fitting({"behavior_learning_rate": 0.3, "behavior_max_grad_norm": np.inf}, ros)
    obs, action = fitting.obs[:, 0], fitting.action[:, 0]
    likelihood = synthetic.pull_back(obs, *(slope / NUM for slope in synthetic.score(fitting.policy, obs, action)))
    actor, _, fit = fitting()
    fitting.equals(actor, synthetic.moved(fitting.policy, -0.3 * likelihood))
    assert fit.steps == 1 and not fit.failed
    before, after = (synthetic.log_prob(p, obs, action).mean() for p in (fitting.policy, fitting.policy_of(actor)))
    assert after < before


def test_the_first_step_on_a_table_is_frequency_less_probability(float64):
    """Softmax over four actions in one state: θ - φ = freq_D - π_θ, so over-sampled actions become rarer."""
    spaces = SimpleNamespace(observation_space=Box((1,)), action_space=Discrete(4))
    case = synthetic.shipped(ros, {}, spaces, num_steps=4)
    core = case.core
    target = core.networks.init(jax.random.key(0)).actor.astype(jnp.float64)
    action = jnp.array([0, 0, 0, 0, 1, 1, 2, 3, 3, 0])[:, None]
    obs = jnp.zeros((10, 1, 1))
    dist = core.networks.policy(ActorCritic(target, None), obs)
    samples = props.Samples(obs, action, dist, dist.log_prob(action))
    fitted, *_ = props.fit_behavior(
        core, jax.random.key(0), target, (), samples, jnp.ones((10, 1), bool), case.with_(behavior_learning_rate=1.0)
    )
    freq, prob = np.array([5, 2, 1, 2]) / 10, np.full(4, 0.25)  # at the observation 0 all logits are the zero bias
    before, after = (
        np.asarray(core.unravel(ActorCritic(actor, None)).actor["head"]["params"]["Dense_0"]["bias"])
        for actor in (target, fitted)
    )
    np.testing.assert_allclose(before - after, freq - prob, rtol=1e-12, atol=1e-15)
    moved = np.exp(after) / np.exp(after).sum()
    assert ((moved < prob) == (freq > prob)).all()


@pytest.mark.parametrize("kind", ["behavior_target_mean", "target_behavior"])
def test_fits_by_hand(float64, kind):
    """Two fits one after the other: both start from θ, Adam's moments go on."""
    numbers = {"behavior_learning_rate": 0.05, "behavior_target_kl": np.inf, "behavior_kl_coef": 0.7, "behavior_clip_eps": 0.1}
    fitting = Fitting(numbers, behavior_epochs=5, behavior_kl=kind)
    adam = synthetic.Adam(len(synthetic.vector(fitting.policy)), eps=1e-5)
    opt_state = None
    for _ in range(2):
        actor, opt_state, fit = fitting(opt_state)
        path, kls = fitting.descent(5, adam, kind=kind)
        fitting.equals(actor, path[-1], rtol=1e-7)
        assert fit.steps == 5
        np.testing.assert_allclose(fit.kl, kls[-1], rtol=1e-7)
    # The last steps were clipped in part, else this would not tell a clip from none.
    assert 0 < fit.clip_fraction < 1
    fresh, *_ = fitting()
    assert (np.abs(fresh - actor) > 1e-6).any()


def test_a_fit_ends_before_the_step_that_is_too_far(float64):
    numbers = {"behavior_learning_rate": 0.02, "behavior_target_kl": np.inf}
    fitting = Fitting(numbers, behavior_epochs=9)
    path, kls = fitting.descent(9, synthetic.Adam(len(synthetic.vector(fitting.policy)), eps=1e-5))
    assert (np.diff(kls) > 0).all() and kls[0] < 1e-15
    for steps in (1, 4, 9):
        # Halfway between the KL before the last step that is taken and before the next.
        limit = np.inf if steps == 9 else (kls[steps - 1] + kls[steps]) / 2
        fitting.hypers = fitting.case.with_(**{**numbers, "behavior_target_kl": limit})
        actor, opt_state, fit = fitting()
        assert fit.steps == steps and opt_state.count == steps
        fitting.equals(actor, path[steps], rtol=1e-7)


def test_a_vanishing_limit_leaves_exactly_one_step(float64):
    fitting = Fitting({"behavior_target_kl": 1e-9}, behavior_epochs=4, behavior_minibatches=3)
    assert fitting()[2].steps == 1


@pytest.mark.parametrize(("held", "parts"), [(21, 4), (24, 4), (10, 2)])
def test_parts_of_a_fit_are_those_of_the_whole_buffer(float64, held, parts):
    """b n = 24 transitions in four parts of six, of which a fit without the oldest three has four, the last one not full."""
    numbers = {"behavior_target_kl": np.inf, "behavior_learning_rate": 1e-6}
    fitting = Fitting(numbers, behavior_epochs=2, behavior_minibatches=4)
    newest = jax.tree.map(lambda x: x[-held:], fitting.samples)
    _, _, fit = fitting(samples=newest, present=np.ones((held, 1), bool))
    assert fit.steps == 2 * parts


@pytest.mark.parametrize(("count", "steps"), [(0, 0), (1, 1), (6, 1), (7, 2), (20, 4), (24, 4)])
def test_every_sample_that_is_there_is_seen_once_in_every_pass(float64, count, steps):
    """Minibatches of six: the last one is not full, empty ones take no step."""
    numbers = {"behavior_learning_rate": 1e-3, "behavior_kl_coef": 0.0, "behavior_target_kl": np.inf}
    numbers |= {"behavior_max_grad_norm": np.inf, "behavior_clip_eps": np.inf}
    fitting = Fitting(numbers, behavior_epochs=1, behavior_minibatches=4, behavior_optimizer="sgd")
    present = np.arange(NUM)[:, None] >= NUM - count
    actor, _, fit = fitting(present=present)
    assert fit.steps == steps
    if not count:
        np.testing.assert_array_equal(actor, fitting.target)
        return
    # What is not there may be anything.
    garbage = fitting.samples._replace(action=np.where(present[..., None], fitting.action, 1e3))
    np.testing.assert_array_equal(fitting(present=present, samples=garbage)[0], actor)
    if count % 6 == 0:
        # At a small rate the mean steps of equal minibatches add up to as many steps on the whole.
        path, _ = fitting.descent(1, rows=slice(NUM - count, None))
        moved = synthetic.vector(fitting.policy_of(actor)) - synthetic.vector(fitting.policy)
        whole = synthetic.vector(path[1]) - synthetic.vector(fitting.policy)
        np.testing.assert_allclose(moved, steps * whole, rtol=0.05, atol=1e-6)


def test_a_fit_that_goes_non_finite_leaves_the_target(float64):
    fitting = Fitting()
    fitting.hypers = fitting.hypers.replace(behavior_learning_rate=np.float64(np.nan))
    actor, _, fit = fitting()
    assert fit.failed
    np.testing.assert_array_equal(actor, fitting.target)


def test_defaults_of_ros_are_what_makes_props_ros():
    setup, hypers = ros.Setup(), ros.Hypers()
    assert (setup.behavior_num_steps, setup.behavior_epochs, setup.behavior_minibatches) == (1, 1, 1)
    assert setup.behavior_optimizer == "sgd" and hypers.behavior_kl_coef == 0
    assert np.isinf([hypers.behavior_clip_eps, hypers.behavior_target_kl]).all() and hypers.behavior_max_grad_norm == 0.5


# ---- The buffer -----------------------------------------------------------------------------------------------------


@struct.dataclass
class Counted:
    time: jax.Array


@dataclasses.dataclass(frozen=True)
class Counter:
    """An endless clock: the observation and the reward are the number of the step, in each of B environments."""

    name = "test/Counter"
    observation_space = Box((1,))
    action_space = Discrete(2)
    max_episode_steps = 1000
    default_params = None
    host_callback = False

    def reset(self, key, params):
        obs = jnp.zeros((key.shape[0], 1))
        return Counted(obs), obs

    def step(self, key, env_state, action, params):
        time = env_state.time + 1
        ended = time[:, 0] % 7 == 0
        # Every seventh step ends an episode, by termination and by truncation in turn; the clock goes on.
        cut = ended & (time[:, 0] % 14 == 0)
        return Counted(time), TimeStep(time, env_state.time[:, 0], ended & ~cut, cut, time, {})

    def refresh(self, key, env_state, params):
        return env_state


def collecting(algorithm, hypers=None):
    """``state -> (state, batch, metrics)``: iterations without an update, but with the statistics that one leaves."""
    hypers = algorithm.hypers if hypers is None else hypers

    @jax.jit
    def step(state):
        key, *keys = jax.random.split(state.key, 5)
        learner = state.learner
        state, batch, metrics, (obs_moments, reward_moments) = props.collect(algorithm.core, keys, state, hypers)
        batch = on_policy.gae_estimate(algorithm.core, hypers, learner, batch)
        learner = state.learner.replace(obs_moments=obs_moments, reward_moments=reward_moments)
        return state.replace(key=key, learner=learner), batch, metrics

    return step


BUFFER = dict(num_envs=2, num_steps=6, behavior_num_steps=2, hidden_sizes=(), num_minibatches=2, num_epochs=2)


@pytest.mark.parametrize(("batches", "data"), [(3, "auto"), (1, "auto"), (1, "buffer")])
def test_what_the_buffer_holds_and_what_a_fit_sees(batches, data):
    seen = []

    def fit(core, key, target, opt_state, samples, present, hypers):
        jax.debug.callback(lambda *x: seen.append(x), samples.obs[..., 0], present, ordered=True)
        return target, opt_state, props.Fit(jnp.int32(0), jnp.float32(0), jnp.float32(0), jnp.zeros((), bool))

    with mock.patch.object(props, "fit_behavior", fit):
        algorithm = props.make(Counter(), props.Setup(**BUFFER, buffer_batches=batches, behavior_data=data))
        state = algorithm.init(jax.random.key(0), algorithm.hypers)
        step = collecting(algorithm)
        for done in range(1, 5):
            state, _, _ = step(state)
            held = min(done, batches) * 6
            time = np.asarray(state.memory.steps.obs)[-held:, :, 0]
            # The last b T steps in order of time, for each environment.
            np.testing.assert_array_equal(time, np.arange(6 * done - held, 6 * done)[:, None].repeat(2, 1))
            np.testing.assert_array_equal(state.memory.steps.final_obs[-held:, :, 0], time + 1)
            np.testing.assert_array_equal(state.memory.steps.reward[-held:], time)
            assert state.memory.num_steps == held
    jax.effects_barrier()
    assert len(seen) == 4 * 3
    for number, (obs, present) in enumerate(seen):
        iteration, phase = divmod(number, 3)
        now = 6 * iteration + 2 * phase
        oldest = max(0, now - 6 * batches + 2)  # the two steps that will be pushed out are left out
        if batches == 1 and data == "auto":
            oldest = 6 * iteration
        np.testing.assert_array_equal(obs[present[:, 0], 0], np.arange(oldest, now))
        assert (present[:, 0] == present[:, 1]).all()


def plain_gae(reward, value, next_value, terminated, truncated, gamma=0.99, lam=0.95):
    advantage, later = np.zeros_like(reward), np.zeros(reward.shape[1])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * np.where(terminated[t], 0, next_value[t]) - value[t]
        later = delta + gamma * lam * np.where(terminated[t] | truncated[t], 0, later)
        advantage[t] = later
    return advantage


def test_advantages_on_the_buffer_are_those_of_the_trajectory():
    """With the critic of now, across the seams between batches and the ends of episodes."""
    algorithm = props.make(Counter(), props.Setup(**BUFFER, buffer_batches=3, behavior="target"))
    state, step = algorithm.init(jax.random.key(0), algorithm.hypers), collecting(algorithm)
    for done in range(1, 5):
        # Another critic in every iteration.
        slope, height = 0.1 * done, -1.0 * done
        critic = jnp.array([height, slope], jnp.float32)
        learner = state.learner.replace(params=state.learner.params._replace(critic=critic))
        state, batch, _ = step(state.replace(learner=learner))
        held = min(done, 3) * 6
        time = np.arange(6 * done - held, 6 * done, dtype=float)[:, None].repeat(2, 1)
        ended, cut = (time + 1) % 7 == 0, (time + 1) % 14 == 0
        expected = plain_gae(time, slope * time + height, slope * (time + 1) + height, ended & ~cut, cut)
        np.testing.assert_allclose(batch.advantage[-held:], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(batch.present, np.arange(18, 0, -1)[:, None].repeat(2, 1) <= held)
        np.testing.assert_array_equal(batch.weight, batch.present)


def test_rewards_and_observations_of_the_buffer_are_scaled_with_statistics_of_now():
    setup = props.Setup(**BUFFER, normalize_obs=True, reward_scaling="per_step")
    algorithm = props.make(Counter(), setup, props.Hypers(reward_clip=1.5))
    state, step = algorithm.init(jax.random.key(0), algorithm.hypers), collecting(algorithm)
    for _ in range(3):
        state, batch, _ = step(state)
    time = np.arange(6.0, 18)[:, None].repeat(2, 1)
    # Frozen in the iteration: the statistics of the first twelve steps of both environments.
    mean, std = np.arange(12).mean(), np.arange(12).std()
    np.testing.assert_allclose(batch.obs[..., 0], (time - mean) / std, rtol=1e-5)
    np.testing.assert_allclose(batch.final_obs[..., 0], (time + 1 - mean) / std, rtol=1e-5)
    moments = state.learner.reward_moments
    np.testing.assert_allclose(batch.reward, np.minimum(time / np.sqrt(moments.var), 1.5), rtol=1e-5)
    assert moments.count == 36 and (batch.reward < 1.5).any()


def test_a_filling_buffer_is_cut_into_fewer_minibatches():
    """Half full, two minibatches of the buffer are one: PPO's first iteration on its own batch."""
    hypers = dict(learning_rate=0.01)
    shared = {name: value for name, value in BUFFER.items() if name != "behavior_num_steps"}
    buffered = props.make(Probe("responding"), props.Setup(**BUFFER, behavior="target"), props.Hypers(**hypers))
    plain = ppo.make(Probe("responding"), ppo.Setup(**shared | {"num_minibatches": 1}), ppo.Hypers(**hypers))
    ends = []
    for algorithm in (buffered, plain):
        state = algorithm.init(jax.random.key(0), algorithm.hypers)
        step = jax.jit(algorithm.step)
        state, first = step(state, algorithm.hypers)
        ends.append((state, first))
    one, two = ends
    for a, b in zip(one[0].learner.params, two[0].learner.params, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # Every number of PPO's is that of the half that is there.
    for name, value in two[1].items():
        np.testing.assert_allclose(one[1][name], value, rtol=2e-3, atol=2e-4, err_msg=name)
    assert one[0].learner.opt_state.actor.count == 2
    state, _ = jax.jit(buffered.step)(one[0], buffered.hypers)
    assert state.learner.opt_state.actor.count == 2 + 4


def test_numbers_about_the_policys_change_leave_out_what_is_not_there(float64):
    rng = np.random.default_rng(0)
    old, new = (Categorical(jnp.asarray(rng.normal(size=(20, 3)))) for _ in range(2))
    action = rng.integers(3, size=20)
    log_ratio = new.log_prob(action) - old.log_prob(action)
    present = np.arange(20) >= 8
    some = metrics.policy_change(log_ratio, old, new, jnp.asarray(present))
    alone = metrics.policy_change(log_ratio[8:], *(Categorical(d.logits[8:]) for d in (old, new)))
    for name, value in alone.items():
        np.testing.assert_allclose(some[name], value, rtol=1e-6, err_msg=name)


# ---- Whole iterations -----------------------------------------------------------------------------------------------


# What conftest.py turns off that rounds differently.
AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True}


def run(algorithm, iterations, hypers=None, key=0, compiler_options=None):
    hypers = algorithm.hypers if hypers is None else hypers
    step, rows = jax.jit(algorithm.step, compiler_options=compiler_options), []
    state = algorithm.init(jax.random.key(key), hypers)
    for _ in range(iterations):
        state, row = step(state, hypers)
        rows.append(row)
    return state, rows


# How PPO is set in the presets that compare the two.
PPO = dict(normalize_obs=True, reward_scaling="batch", early_stop="minibatch", boundary="terminate", advantage_std="sample")


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("settings", [dict(normalize_obs=True), PPO], ids=["few", "as compared"])
def test_without_a_learning_rate_of_its_own_it_is_ppo_with_a_buffer(batches, settings):
    """To the bit, by the compiler that users have; the one of the tests rounds the two programs otherwise."""
    env = Probe("responding", continuous=True)
    numbers = dict(learning_rate=0.01, behavior_learning_rate=0.0)
    ends = []
    for behavior in ("fitted", "target"):
        setup = props.Setup(**BUFFER, **settings, buffer_batches=batches, behavior=behavior)
        state, rows = run(props.make(env, setup, props.Hypers(**numbers)), 3, compiler_options=AS_USERS_COMPILE)
        ends.append((state.replace(learner=state.learner.replace(extra=None)), rows))
    for one, other in zip(jax.tree.leaves(ends[0][0]), jax.tree.leaves(ends[1][0]), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)
    assert ends[0][1][-1]["behavior_kl"] < 1e-12
    if batches == 1:
        shared = {name: value for name, value in BUFFER.items() if name != "behavior_num_steps"}
        state, rows = run(ppo.make(env, ppo.Setup(**shared, **settings), ppo.Hypers(learning_rate=0.01)), 3)
        for a, b in zip(ends[1][0].learner.params, state.learner.params, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        for name, value in rows[-1].items():
            np.testing.assert_allclose(ends[1][1][-1][name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("stale", [False, True])
def test_ratios_are_to_the_target_of_now_at_the_start_of_every_fit(stale):
    setup = dict(**BUFFER, behavior_epochs=1, behavior_minibatches=1, stale_target=stale)
    algorithm = props.make(Probe("responding"), props.Setup(**setup))
    state, step = algorithm.init(jax.random.key(0), algorithm.hypers), collecting(algorithm)
    for done in range(3):
        state, _, row = step(state)
        # The only minibatch of a fit is looked at before its step.
        seen = float(row["behavior_kl_sampled"])
        assert (seen > 1e-5) if stale and done else (seen < 1e-10)
        assert row["behavior_kl"] > 0
        # In place of an update.
        state = state.replace(learner=moved_apart(state.learner))


def test_moments_of_the_behaviour_policy_go_on_from_fit_to_fit():
    """Adam's count is that of all steps of all fits, in every iteration so far; the target's is its own."""
    hypers = props.Hypers(behavior_target_kl=np.inf)
    setup = props.Setup(**BUFFER, behavior_epochs=2, behavior_minibatches=2)
    algorithm = props.make(Probe("responding"), setup, hypers)
    state, step, total = algorithm.init(jax.random.key(0), algorithm.hypers), collecting(algorithm), 0
    for held in ((0, 1, 1), (1, 2, 2)):
        # Minibatches of twelve transitions, halves of a full buffer: with 0, 4 and 8 of them in it, then with 12, 16 and 20.
        total += 2 * sum(held)
        state, _, row = step(state)
        # The first fit of all had nothing to fit to, and is left out of the mean.
        assert row["behavior_steps"] * np.count_nonzero(held) == 2 * sum(held)
        assert state.learner.extra["opt_state"].count == total
    assert state.learner.opt_state.actor.count == 0


def test_ratios_and_means_over_fits_are_those_of_the_policies_that_collected():
    def fit(core, key, target, opt_state, samples, present, hypers):
        # Fits are told apart by how much they had.
        had = present.sum().astype(jnp.float32)
        return (
            target + 0.3 * (-1.0) ** jnp.arange(target.size),
            opt_state,
            props.Fit(present.sum(), had, had / 100, jnp.zeros((), bool)),
        )

    with mock.patch.object(props, "fit_behavior", fit):
        algorithm = props.make(Probe("responding"), props.Setup(**BUFFER))
        start = algorithm.init(jax.random.key(0), algorithm.hypers)
        state, _, row = collecting(algorithm)(start)
    steps = jax.tree.map(lambda x: x[-6:], state.memory.steps)
    target, behavior = (
        algorithm.core.networks.policy(learner.params, steps.obs).log_prob(steps.action)
        for learner in (start.learner, moved_apart(start.learner))
    )
    ratio = np.exp(np.asarray(behavior) - np.asarray(target))
    assert np.ptp(ratio) > 0.1
    found = [row[f"behavior_ratio_{name}"] for name in ("min", "q05", "q95", "max")]
    np.testing.assert_allclose(found, np.quantile(ratio, [0, 0.05, 0.95, 1]), rtol=1e-5)
    # Fits of 0, 4 and 8 transitions; the first is none.
    assert row["behavior_steps"] == 6 and row["behavior_kl_sampled"] == 6
    np.testing.assert_allclose(row["behavior_clip_fraction"], 0.06, rtol=1e-6)


def moved_apart(learner):
    """The learner with another actor, by as much in every parameter and in turn up and down."""
    actor = learner.params.actor
    return learner.replace(params=learner.params._replace(actor=actor + 0.3 * (-1.0) ** jnp.arange(actor.size)))


def test_a_behaviour_policy_that_goes_non_finite_is_told_and_holds_the_learner():
    algorithm = props.make(Probe("responding", continuous=True), props.Setup(**BUFFER))
    state, _ = run(algorithm, 1)
    bad = algorithm.hypers.replace(behavior_learning_rate=np.float32(np.nan))
    after, row = jax.jit(algorithm.step)(state, bad)
    assert row["nonfinite"] == 1 and after.nonfinite
    for one, other in zip(jax.tree.leaves(after.learner), jax.tree.leaves(state.learner), strict=True):
        np.testing.assert_array_equal(one, other)
    # The buffer goes on, with actions of the target policy.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.memory))
    assert after.memory.num_steps == 12


# ---- Sampling error -------------------------------------------------------------------------------------------------

K = 10


@dataclasses.dataclass(frozen=True)
class Arms:
    """K actions, nothing to see, every step an episode."""

    name = "test/Arms"
    observation_space = Box((1,))
    action_space = Discrete(K)
    max_episode_steps = 1
    default_params = None
    host_callback = False

    def reset(self, key, params):
        return Counted(jnp.zeros(key.shape)), jnp.zeros((key.shape[0], 1))

    def step(self, key, env_state, action, params):
        obs, ended = jnp.zeros((key.shape[0], 1)), jnp.ones(key.shape, bool)
        return env_state, TimeStep(obs, jnp.zeros(key.shape), ended, ~ended, obs, {})

    def refresh(self, key, env_state, params):
        return env_state


# Logits as parameters.
ARMS = Networks(
    init=lambda key: ActorCritic(0.5 * jax.random.normal(key, (K,)), jnp.zeros(1)),
    policy=lambda params, obs: Categorical(jnp.broadcast_to(params.actor, (*obs.shape[:-1], K))),
    value=lambda params, obs: 0 * obs[..., 0] + params.critic[0],
)


def bandit_errors(module, numbers, num_steps, seeds=40, **setup):
    """Exact sampling errors [seeds] after so many steps with a fixed target."""
    setup = dict(num_envs=1, num_steps=num_steps, num_epochs=1, num_minibatches=1, buffer_batches=1, **setup)
    algorithm = module.make(Arms(), module.Setup(**setup), module.Hypers(learning_rate=0.0), networks=ARMS)
    hypers = algorithm.hypers.replace(**{name: np.float32(value) for name, value in numbers.items()})

    def error(key):
        state, _ = algorithm.step(algorithm.init(key, hypers), hypers)
        action = state.memory.steps.action
        return sampling_error.tabular(jnp.zeros_like(action), action, jax.nn.softmax(state.learner.params.actor)[None])

    return np.asarray(jax.jit(jax.vmap(error))(jax.random.split(jax.random.key(0), seeds)))


@functools.cache
def on_policy_errors(num):
    return bandit_errors(props, {}, num, seeds=200, behavior="target")


def test_on_policy_errors_are_those_of_wilks_law():
    """k = 9. The second term is the law's own error at so few samples."""
    errors = on_policy_errors(256)
    assert abs(errors.mean() - 9 / 512) < 4 * np.sqrt(18) / 512 / np.sqrt(200) + 9 / 256**1.5


@pytest.mark.parametrize(("num", "share", "seeds"), [(256, 0.55, 20), pytest.param(1024, 0.35, 40, marks=pytest.mark.slow)])
def test_props_has_a_fraction_of_the_sampling_error_of_on_policy_data(num, share, seeds):
    numbers = {"behavior_learning_rate": 0.01}
    setup = dict(behavior_num_steps=16, behavior_epochs=16, behavior_minibatches=4)
    errors = bandit_errors(props, numbers, num, seeds, **setup)
    assert errors.mean() < share * on_policy_errors(num).mean()


def test_ros_lowers_the_sampling_error_and_with_the_wrong_sign_raises_it():
    usual = on_policy_errors(256)
    right, wrong = (bandit_errors(ros, {"behavior_learning_rate": rate}, 256, 20) for rate in (10, -10))
    assert right.mean() < 0.6 * usual.mean()
    assert wrong.mean() > usual.mean() + 4 * usual.std() / np.sqrt(20)


def test_the_reference_is_what_the_target_would_have_collected():
    """With a learning rate of zero for φ both are on-policy: equal in mean, though not the same numbers."""
    numbers = dict(learning_rate=0.0, behavior_learning_rate=0.0)
    setup = dict(num_envs=4, num_steps=32, hidden_sizes=(), num_minibatches=1, behavior_num_steps=16, behavior_minibatches=1)
    setup |= dict(behavior_epochs=1, sampling_error="last_layer", sampling_error_epochs=200)
    algorithm = props.make(Probe("constant"), props.Setup(**setup), props.Hypers(**numbers))

    def errors(key):
        state = algorithm.init(key, algorithm.hypers)
        first, _ = algorithm.step(state, algorithm.hypers)
        return algorithm.step(first, algorithm.hypers)[1]

    rows = jax.jit(jax.vmap(errors))(jax.random.split(jax.random.key(0), 100))
    one, other = np.asarray(rows["sampling_error"]), np.asarray(rows["sampling_error_reference"])
    assert (one != other).mean() > 0.9
    for found in (one, other):
        # One free parameter and 256 samples.
        assert abs(found.mean() - 1 / 512) < 4 * np.sqrt(2) / 512 / np.sqrt(50)
    assert (rows["action_frequency_gap"] < 0.2).all() and (rows["action_frequency_gap"] > 0).any()


# ---- Presets --------------------------------------------------------------------------------------------------------

# Target's batch and learning rate; behaviour's batch, learning rate, limit of the KL, its coefficient, minibatches, clip range.
MUJOCO = {
    "Swimmer": (1e6, 2048, 1e-3, 1024, 1e-5, 0.03, 0.1, 16, 0.3),
    "Hopper": (1e6, 2048, 1e-3, 256, 1e-3, 0.05, 0.3, 16, 0.3),
    "HalfCheetah": (2e6, 1024, 1e-4, 512, 1e-3, 0.05, 0.3, 16, 0.3),
    "Walker2d": (2e6, 2048, 1e-3, 256, 1e-3, 0.1, 0.3, 32, 0.3),
    "Ant": (4e6, 2048, 1e-4, 256, 1e-3, 0.03, 0.1, 16, 0.05),
    "Humanoid": (6e6, 8192, 1e-4, 256, 1e-4, 0.1, 0.1, 32, 0.3),
}


@pytest.mark.parametrize("task", MUJOCO)
@pytest.mark.parametrize("version", ["v4", "v5"])
def test_presets_of_mujoco_are_the_released_settings(task, version):
    preset = presets.find("auto", "props", f"mujoco/{task}-{version}")
    setup, hypers = preset["setup"], preset["hypers"]
    found = (
        *(preset["total_env_steps"], setup["num_steps"], hypers["learning_rate"], setup["behavior_num_steps"]),
        *(hypers["behavior_learning_rate"], hypers["behavior_target_kl"], hypers["behavior_kl_coef"]),
        *(setup["behavior_minibatches"], hypers["behavior_clip_eps"]),
    )
    assert found == MUJOCO[task]
    assert (setup["buffer_batches"], setup["num_epochs"], setup["num_minibatches"], setup["behavior_epochs"]) == (2, 10, 32, 16)


@pytest.mark.parametrize("task", ["TwoStep", "GridWorld-5x5"])
def test_presets_of_the_toy_tasks_are_the_released_settings(task):
    """One minibatch in both fits, the authors' entropy bonus and time limit; on TwoStep the learning rate falls to zero."""
    for name in ("ppo", "props", "ros"):
        preset = presets.find("auto", name, f"toy/{task}")
        setup, hypers = preset["setup"], preset["hypers"]
        assert (setup["num_epochs"], setup["num_minibatches"], setup["boundary"]) == (1, 1, "terminate")
        assert hypers["entropy_coef"] == 0.01 and setup["advantage_std"] == "sample"
        assert setup.get("learning_rate_schedule", "linear") == ("linear" if task == "TwoStep" else "constant")
    preset = presets.find("auto", "props", f"toy/{task}")
    setup, hypers = preset["setup"], preset["hypers"]
    assert (setup["behavior_epochs"], setup["behavior_minibatches"], setup["buffer_batches"]) == (16, 1, 1)
    assert (hypers["behavior_clip_eps"], hypers["behavior_kl_coef"], hypers["behavior_target_kl"]) == (0.3, 0, 1)
    found = preset["total_env_steps"], setup["num_steps"], hypers["learning_rate"]
    found += setup["behavior_num_steps"], hypers["behavior_learning_rate"]
    assert found == ((40_000, 200, 0.5, 5, 0.5) if task == "TwoStep" else (60_000, 300, 0.01, 30, 0.005))


# ---- Requests that cannot work --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(num_steps=10, behavior_num_steps=4), "behavior_num_steps = 4 does not divide num_steps = 10; try 1, 2, 5"),
        (dict(num_steps=16, buffer_batches=1), "behavior_num_steps = 16 is all of num_steps"),
        (dict(num_steps=16, behavior_data="current_batch"), "nothing to fit to"),
        (dict(buffer_batches=0), "buffer_batches = 0 must be a whole number"),
        (dict(minibatch_by="unroll"), "minibatch_by = 'unroll'"),
        (dict(early_stop="epoch"), "early_stop = 'epoch'"),
        (dict(behavior="target", stale_target=True), "stale_target = True has no effect"),
        (dict(behavior_kl="forward"), "behavior_kl = 'forward' is not one of"),
    ],
)
def test_requests_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(RequestError, match=words):
        props.make(Probe("responding"), props.Setup(**fields))


def test_parts_of_a_fit_need_not_divide_the_batch():
    props.make(Probe("responding"), props.Setup(num_envs=1, num_steps=32, behavior_minibatches=3))
