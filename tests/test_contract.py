"""What every algorithm promises, in one table; an algorithm without a row fails."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from probe_envs import Probe

import pgjax
from pgjax import on_policy
from pgjax.algorithms import get, list_algorithms, make, ppo
from pgjax.distributions import DiagGaussian
from pgjax.errors import RequestError
from pgjax.host.checkpoints import load_checkpoint, save_checkpoint
from pgjax.learned.files import Learned
from pgjax.learned.rule import RuleSpec, convention_of, init_rule
from pgjax.networks import ActorCritic, Networks
from pgjax.training import with_horizon
from pgjax.types import Algorithm

# id -> fields of Setup for the tests below, besides those in TINY
TABLE = {
    "reinforce": dict(normalize_value=True, tail="bootstrap", value_steps=2),
    "a2c": dict(optimizer="rmsprop", reward_scaling="per_step"),
    "ppo": dict(num_epochs=2, num_minibatches=2, distribution="tanh_gaussian", learning_rate_schedule="adaptive_kl"),
    "ppo_kl": dict(num_epochs=2, num_minibatches=2, kl_direction="reverse"),
    "trpo": dict(value_epochs=2, value_minibatches=2, distribution="tanh_gaussian_state"),
    "vmpo": dict(num_epochs=2, num_minibatches=2, distribution="gaussian_state"),
    "mdpo": dict(num_epochs=2, value_epochs=2, value_minibatches=2, tsallis_index=1.5),
    "spo": dict(num_epochs=2, num_minibatches=2, minibatch_by="unroll", advantage_std="sample"),
    "fixpo": dict(num_epochs=2, num_minibatches=2, fixup_minibatches=2),
    "dpo": dict(num_epochs=2, num_minibatches=2, minibatch_by="unroll", advantage_recompute="minibatch"),
    "props": dict(num_epochs=2, num_minibatches=2, behavior_num_steps=2, behavior_minibatches=2, reward_scaling="batch"),
    "ros": dict(num_epochs=2, num_minibatches=2, behavior_optimizer="adam", distribution="gaussian_tanh_mean"),
}
# The same for methods that learn step by step, besides those in STEPWISE_TINY; they have settings of their own.
STEPWISE = {
    "sac": dict(update_ratio=0.25),
    "mdpo_off": dict(copy_period=3, tsallis_index=1.5),
    "avg": dict(num_steps=16),
    "iac": dict(num_steps=16, penultimate_norm=True, scaler="paper", entropy_bonus="both"),
    "sac1": dict(num_steps=16, scaler="code"),
    "td3_1": dict(num_steps=16),
}
# The same for methods that learn by a learned rule, which has to be given.
BY_RULE = {"lpg": dict(hidden_sizes=(4,), optimizer="adam")}
STEPWISE_TINY = dict(batch_size=4, buffer_size=24, warmup_steps=4)
# Methods for continuous actions alone.
CONTINUOUS_ONLY = ("avg", "iac", "sac1", "td3_1")
# Methods for discrete actions alone.
DISCRETE_ONLY = ("lpg",)
# What a method takes in place of these fields of other tests, where it has no such thing.
NO_SUCH = {"trpo": ("num_epochs", "num_minibatches"), "mdpo": ("num_minibatches",)}
PARTS = ("value_minibatches", "fixup_minibatches", "behavior_num_steps")
TINY = dict(num_envs=4, num_steps=4, hidden_sizes=(4,), normalize_obs=True)
COMMON_METRICS = """env_steps episodes episode_return episode_length loss_policy loss_value entropy kl kl_max ratio_min
    ratio_max ratio_deviation clip_fraction explained_variance grad_norm ess nonfinite""".split()
STEPWISE_METRICS = "env_steps episodes episode_return episode_length loss_policy loss_value grad_norm nonfinite".split()


# Those with settings, metrics and a loop of their own.
APART = STEPWISE | BY_RULE
RULE_METRICS = [name for name in COMMON_METRICS if name not in ("loss_value", "explained_variance")]


def tiny(name):
    """Fields of ``Setup`` that make an iteration of 16 environment steps, and what else has to be given."""
    if name in TABLE:
        return TINY | TABLE[name]
    fields = get(name).Setup.__dataclass_fields__
    setup = {key: value for key, value in (TINY | STEPWISE_TINY | APART[name]).items() if key in fields}
    return setup | ({"rule": random_rule()} if name in BY_RULE else {})


def random_rule(seed=0):
    """A small rule that nobody trained, with a say of its own on every step."""
    spec = RuleSpec(num_predictions=3, hidden_size=8, embedding_size=4, temporal="relative")
    return Learned("lpg", init_rule(spec, jax.random.key(seed)), convention_of(spec), {})


def env_of(name):
    return dataclasses.replace(ENV, continuous=False) if name in DISCRETE_ONLY else ENV


def flat(tree):
    """All numbers of a tree, or of a vector, as one vector."""
    return ravel_pytree(tree)[0]


def metrics_of(name):
    return STEPWISE_METRICS if name in STEPWISE else RULE_METRICS if name in BY_RULE else COMMON_METRICS


@dataclasses.dataclass(frozen=True)
class Paid(Probe):
    """A probe that pays ``params["gain"]`` times the reward."""

    default_params = {"gain": np.float32(1)}  # noqa: RUF012

    def step(self, key, env_state, action, params):
        env_state, timestep = super().step(key, env_state, action, params)
        return env_state, timestep._replace(reward=timestep.reward * params["gain"])


ENV = Paid("responding", continuous=True)


def gain(value):
    return {"gain": np.float32(value)}


def types_of(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), x.dtype, getattr(x, "weak_type", False)), tree)


def equal(one, two):
    """Bitwise, keys too."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def close(one, two, rtol):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(1e-3, np.abs(np.float64(x)).max(initial=0)))


class Built:
    """An algorithm with its functions compiled, counting how often ``step`` is traced."""

    def __init__(self, name):
        self.algorithm = make(name, env_of(name), **tiny(name))
        self.hypers = with_horizon(self.algorithm.hypers, 1000)
        self.traces = 0

        def step(state, hypers):
            self.traces += 1
            return self.algorithm.step(state, hypers)

        self.init = jax.jit(self.algorithm.init)
        self.step = jax.jit(step)
        self.act = jax.jit(self.algorithm.act)

    def run(self, state, hypers, iterations):
        for _ in range(iterations):
            state, metrics = self.step(state, hypers)
        return state, metrics


@pytest.fixture(scope="module", params=list_algorithms())
def built(request):
    assert request.param in {*TABLE, *APART}, f"{request.param!r} has no row in TABLE, STEPWISE or BY_RULE"
    return Built(request.param)


def test_the_table_has_no_row_too_many():
    assert sorted([*TABLE, *APART]) == sorted(list_algorithms())


def test_parts_of_an_algorithm(built):
    algorithm = built.algorithm
    assert isinstance(algorithm, Algorithm) and algorithm.env == env_of(algorithm.name)
    assert algorithm.name in list_algorithms() and algorithm.env_steps_per_iteration == 16
    assert dataclasses.replace(algorithm.setup) == algorithm.setup and hash(algorithm.setup)
    for leaf in jax.tree.leaves(algorithm.hypers):
        assert leaf.dtype == np.float32 and not getattr(leaf, "weak_type", False)
    module = get(algorithm.name)
    title = module.__doc__.upper().replace("-", "")
    assert title.startswith(algorithm.name.upper().replace("_", "")), "the first line names the method"
    fields = {*type(algorithm.setup).__dataclass_fields__, *type(algorithm.hypers).__dataclass_fields__}
    assert fields.issuperset(module.DEFINING), "what defines a method is among its settings"
    assert type(module.Setup()) is type(algorithm.setup) and type(module.Hypers()) is type(algorithm.hypers)


def test_steps_keep_the_state_and_report_fixed_scalars(built):
    state = built.init(jax.random.key(0), built.hypers, gain(1))
    expected = types_of(state)
    before, names = built.traces, None
    for i in range(3):
        state, metrics = built.step(state, built.hypers)
        assert types_of(state) == expected
        names = names or set(metrics)
        assert set(metrics) == names
        assert metrics["env_steps"] == state.env_steps == 16 * (i + 1)
    assert built.traces <= before + 1
    assert names.issuperset(metrics_of(built.algorithm.name))
    for name, value in metrics.items():
        assert value.shape == () and value.dtype == (jnp.int32 if name == "env_steps" else jnp.float32), name
        assert np.isfinite(value), name
    assert metrics["episodes"] == 16 and metrics["episode_length"] == 1 and metrics["nonfinite"] == 0
    if built.algorithm.name in STEPWISE:
        assert not names & {"kl", "ess", "ratio_max", "clip_fraction"}, "what does not apply is absent"
        return
    assert metrics["kl"] >= 0 and metrics["kl_max"] >= metrics["kl"] and 0 < metrics["ess"] <= 1
    assert metrics["ratio_min"] <= 1 <= metrics["ratio_max"] and 0 <= metrics["clip_fraction"] <= 1


def test_other_numbers_compile_nothing(built):
    state = built.init(jax.random.key(0), built.hypers, gain(1))
    built.step(state, built.hypers)
    traces = built.traces
    changed = on_policy.as_hypers(built.hypers, **{name: 0.5 * getattr(built.hypers, name) for name in numbers(built)})
    usual, _ = built.step(state, built.hypers)
    other, _ = built.step(state.replace(env_params=gain(2)), changed)
    assert built.traces == traces
    assert (flat(usual.learner.params.actor) != flat(other.learner.params.actor)).any()


def test_plain_python_numbers_do_not_change_what_a_state_is_made_of(built):
    state = built.init(jax.random.key(0), built.hypers, gain(1))
    hypers = built.hypers.replace(gamma=0.5, learning_rate=1e-3)
    if hasattr(hypers, "obs_clip"):
        hypers = hypers.replace(obs_clip=5.0)
    assert types_of(jax.eval_shape(built.algorithm.step, state, hypers)[0]) == types_of(state)


def numbers(built):
    return [field.name for field in dataclasses.fields(built.hypers) if field.name not in on_policy.LEARNED]


def test_same_key_same_result_and_other_keys_other_results(built):
    starts = [built.init(jax.random.key(seed), built.hypers, gain(1)) for seed in (0, 0, 1)]
    equal(starts[0], starts[1])
    ends = [built.run(start, built.hypers, 2) for start in starts]
    equal(ends[0], ends[1])
    one, other = ends[0][0].learner.params, ends[2][0].learner.params
    assert all((flat(a) != flat(b)).any() for a, b in zip(one, other, strict=True))


def test_env_params_reach_the_environment(built):
    state = built.init(jax.random.key(0), built.hypers, gain(1))
    # Without learning, for a method that learns within an iteration acts differently after other rewards.
    hypers = built.hypers.replace(learning_rate=np.float32(0))
    _, once = built.step(state, hypers)
    _, thrice = built.step(state.replace(env_params=gain(3)), hypers)
    np.testing.assert_allclose(thrice["episode_return"], 3 * once["episode_return"], rtol=1e-6)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane_hypers(built, dtype):
    rates = np.array([1, 3, 1], dtype) * dtype(built.hypers.learning_rate)
    return [jax.tree.map(dtype, built.hypers.replace(learning_rate=rate)) for rate in rates]


def test_a_lane_equals_its_single_run(built):
    hypers = [jax.tree.map(jnp.asarray, h) for h in lane_hypers(built, np.float32)]
    starts = [built.init(jax.random.key(i), h, gain(1 + i)) for i, h in enumerate(hypers)]
    lanes, lane_metrics = stack(starts), None
    # The last lane goes non-finite, which must not touch the others.
    hypers[2] = hypers[2].replace(learning_rate=jnp.float32(np.nan))
    step = jax.jit(jax.vmap(built.algorithm.step))
    for _ in range(3):
        lanes, lane_metrics = step(lanes, stack(hypers))
    for i in range(2):
        state, metrics = built.run(starts[i], hypers[i], 3)
        # Where an iteration holds 16 updates, one after the other, rounding has come further.
        close(jax.tree.map(lambda x, i=i: x[i], lanes), state, 1e-4 if built.algorithm.name in STEPWISE else 1e-5)
        for name, value in metrics.items():
            np.testing.assert_allclose(lane_metrics[name][i], value, rtol=1e-3, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(lane_metrics["nonfinite"], [0, 0, 1])
    frozen, start = jax.tree.map(lambda x: x[2], lanes.learner), starts[2].learner
    if hasattr(built.algorithm.setup, "warmup_steps"):
        # The observations of the warm-up had been counted before the first update.
        frozen, start = frozen.replace(obs_moments=None), start.replace(obs_moments=None)
    equal(frozen, start)
    np.testing.assert_array_equal(lanes.env_steps, [48, 48, 48])


def to_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


# All share the loop; the slow ones only guard what an algorithm adds to it.
@pytest.mark.parametrize("name", [n if n == "ppo" else pytest.param(n, marks=pytest.mark.slow) for n in [*TABLE, *APART]])
def test_a_lane_equals_its_single_run_in_float64(name):
    built = Built(name)
    starts = [built.init(jax.random.key(i), built.hypers, gain(1)) for i in range(2)]
    with jax.enable_x64(True):
        starts, hypers = [to_float64(start) for start in starts], lane_hypers(built, np.float64)[:2]

        def run(state, hypers):
            return jax.lax.fori_loop(0, 20, lambda _, state: built.algorithm.step(state, hypers)[0], state)

        lanes = jax.jit(jax.vmap(run))(stack(starts), stack(hypers))
        close(jax.tree.map(lambda x: x[1], lanes), jax.jit(run)(starts[1], hypers[1]), 1e-9)
        assert not lanes.nonfinite.any() and flat(lanes.learner.params.actor).dtype == np.float64


def test_actions_and_policies(built):
    algorithm = built.algorithm
    state = built.init(jax.random.key(0), built.hypers, gain(1))
    policy = algorithm.policy(state)
    assert sum(x.size for x in jax.tree.leaves(policy)) < sum(x.size for x in jax.tree.leaves(state)) / 2
    # A wide policy, whose samples must be brought into the bounds.
    wide = policy._replace(actor=jax.tree.map(lambda x: 3 * x + 1, policy.actor))
    obs = jnp.linspace(-1, 1, 50)[:, None]
    shape, dtype = ((50,), jnp.int32) if algorithm.name in DISCRETE_ONLY else ((50, 1), jnp.float32)
    modes = built.act(wide, obs, None)
    samples = [built.act(wide, obs, jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_allclose(modes, algorithm.act(wide, obs, None), rtol=1e-5)
    np.testing.assert_array_equal(samples[0], samples[1])
    assert (samples[0] != samples[2]).any() and (samples[0] != modes).any()
    for action in (modes, *samples):
        assert action.shape == shape and action.dtype == dtype
        assert (np.abs(action) <= 1).all() and (dtype == jnp.float32 or (action >= 0).all())
    assert np.abs(samples[0]).max() > 0.99


def test_warm_start_takes_over_the_policy_and_nothing_else(built):
    algorithm = built.algorithm
    trained, _ = built.run(built.init(jax.random.key(0), built.hypers, gain(1)), built.hypers, 2)
    fresh = built.init(jax.random.key(1), built.hypers, gain(1))
    warm = algorithm.warm_start(fresh, algorithm.policy(trained))
    equal(algorithm.policy(warm), algorithm.policy(trained))
    equal(warm.learner.params.critic, fresh.learner.params.critic)
    equal(warm.replace(learner=None), fresh.replace(learner=None))
    assert types_of(warm) == types_of(fresh)
    built.step(warm, built.hypers)


def test_a_state_from_disk_goes_on_bit_for_bit(built, tmp_path):
    state, _ = built.run(built.init(jax.random.key(0), built.hypers, gain(1)), built.hypers, 2)
    save_checkpoint(tmp_path, 2, state, {})
    loaded, _ = load_checkpoint(tmp_path, 2, jax.eval_shape(lambda: state))
    equal(loaded, state)
    equal(built.run(loaded, built.hypers, 2), built.run(state, built.hypers, 2))


def test_discrete_actions_give_the_same_metrics(built):
    setup = tiny(built.algorithm.name)
    if "distribution" in setup:
        setup["distribution"] = "auto"
    env = dataclasses.replace(ENV, continuous=False)
    if built.algorithm.name in CONTINUOUS_ONLY:
        with pytest.raises(RequestError, match="discrete actions"):
            make(built.algorithm.name, env, **setup)
        return
    algorithm = make(built.algorithm.name, env, **setup)
    state = jax.eval_shape(algorithm.init, jax.random.key(0), algorithm.hypers)
    after, metrics = jax.eval_shape(algorithm.step, state, algorithm.hypers)
    assert types_of(after) == types_of(state)
    assert set(metrics).issuperset(metrics_of(built.algorithm.name))


# ---- What can be plugged in -----------------------------------------------------------------------------------------

PLUG = dict(num_envs=4, num_steps=4, hidden_sizes=(), num_epochs=2, num_minibatches=2, gradient_clip="none")


def clipped(log_ratio, advantage, clip_eps=0.2):
    ratio = jnp.exp(log_ratio)
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantage)


def plugged(sample, params):
    """Ratio times advantage with two penalties on leaving the old policy, each with a coefficient."""
    kl = sample.dist_old.kl(sample.dist)
    assert sample.log_ratio.shape == sample.advantage.shape == kl.shape
    gain = jnp.exp(sample.log_ratio) * sample.advantage * (1 - sample.progress)
    return gain - params["kl_coef"] * kl - params["far_coef"] * sample.log_ratio**2


def plug_for(name):
    """``PLUG`` for an algorithm, with the parts that it cuts batches into besides."""
    own = {part: 2 for part in PARTS if part in get(name).Setup.__dataclass_fields__}
    return {key: value for key, value in PLUG.items() if key not in NO_SUCH.get(name, ())} | own


@pytest.mark.parametrize("name", TABLE)
def test_every_algorithm_takes_an_objective_of_either_form(name):
    calls = []

    def bare(log_ratio, advantage):
        calls.append(log_ratio.shape == advantage.shape)
        return clipped(log_ratio, advantage)

    def with_parameters(sample, params):
        calls.append(params["kl_coef"].dtype == jnp.float32)
        return plugged(sample, params)

    params = {"kl_coef": 1, "far_coef": 0.05}
    for objective in (bare, pgjax.Objective(with_parameters, params)):
        algorithm = make(name, ENV, objective=objective, **plug_for(name))
        state = jax.eval_shape(algorithm.init, jax.random.key(0), algorithm.hypers)
        jax.eval_shape(algorithm.step, state, algorithm.hypers)
        assert calls and all(calls)
        calls.clear()
    np.testing.assert_allclose(algorithm.hypers.objective["far_coef"], 0.05)


def test_an_objective_of_ratio_and_advantage_takes_the_place_of_the_papers():
    ends = []
    for objective in (None, clipped, lambda log_ratio, advantage: 0 * log_ratio):
        algorithm = ppo.make(ENV, ppo.Setup(**PLUG), ppo.Hypers(learning_rate=0.05), objective=objective)
        state = algorithm.init(jax.random.key(0), algorithm.hypers)
        ends.append(jax.jit(algorithm.step)(state, algorithm.hypers)[0].learner.params)
    start = state.learner.params
    np.testing.assert_allclose(ends[0].actor, ends[1].actor, rtol=1e-6)
    assert (ends[0].actor != start.actor).any()
    np.testing.assert_array_equal(ends[2].actor, start.actor)
    assert (ends[2].critic != start.critic).any()


def test_an_objective_with_parameters_is_swept_and_differentiated_through():
    with jax.enable_x64(True):
        params = {"kl_coef": 1.0, "far_coef": 0.5}
        objective = pgjax.Objective(plugged, params)
        algorithm = ppo.make(ENV, ppo.Setup(**PLUG), ppo.Hypers(learning_rate=0.2), objective=objective)
        state = to_float64(algorithm.init(jax.random.key(0), algorithm.hypers))
        hypers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), algorithm.hypers)

        @jax.jit
        @jax.value_and_grad
        def outcome(objective):
            return algorithm.step(state, hypers.replace(objective=objective))[0].learner.params.actor.sum()

        here, width = {name: jnp.float64(value) for name, value in params.items()}, 1e-6
        _, gradient = outcome(here)
        for name in params:
            up, down = (outcome({**here, name: here[name] + sign * width})[0] for sign in (1, -1))
            np.testing.assert_allclose(gradient[name], (up - down) / (2 * width), rtol=1e-3, atol=1e-7)
            assert abs(gradient[name]) > 1e-4
        assert outcome._cache_size() == 1


def test_networks_of_ones_own():
    """One weight for the actor, one for the critic."""

    def policy(params, obs):
        mean = params.actor["slope"] * obs
        return DiagGaussian(mean, jnp.full_like(mean, -2.0))

    networks = Networks(
        init=lambda key: ActorCritic({"slope": 0.1 * jax.random.normal(key)}, {"height": jnp.zeros(())}),
        policy=policy,
        value=lambda params, obs: params.critic["height"] + 0 * obs[..., 0],
    )
    hypers = {"learning_rate": 0.02}
    algorithm = make("ppo", Probe("responding", True), hypers, networks=networks, num_envs=16, num_steps=8)
    state = algorithm.init(jax.random.key(0), algorithm.hypers)
    assert state.learner.params.actor.shape == state.learner.params.critic.shape == (1,)
    step = jax.jit(algorithm.step)
    for _ in range(30):
        state, _ = step(state, algorithm.hypers)
    slope = algorithm.core.unravel(state.learner.params).actor["slope"]
    obs = jnp.array([[-1.0], [1.0]])
    np.testing.assert_allclose(algorithm.act(algorithm.policy(state), obs, None), jnp.clip(slope * obs, -1, 1))
    # The best action is half the observation.
    assert 0.2 < slope < 0.8


# ---- Requests that cannot work --------------------------------------------------------------------------------------

DISCRETE, CONTINUOUS = Probe("acting"), Probe("acting", continuous=True)
UNUSABLE_SETUPS = {
    "parts": (dict(num_envs=5, num_steps=2, num_minibatches=3), ["num_minibatches = 3", "num_steps = 10", "try"]),
    "zero": (dict(num_envs=0), ["num_envs = 0", ">= 1"]),
    "fraction": (dict(num_steps=2.5), ["num_steps = 2.5", "whole number"]),
    "choice": (dict(boundary="bootstap"), ["boundary = 'bootstap'", "bootstrap, mask, terminate"]),
    "optimizer": (dict(optimizer="sgd"), ["optimizer = 'sgd'", "adam, rmsprop, rmsprop_torch"]),
    "activation": (dict(activation="tahn"), ["activation = 'tahn'", "tanh"]),
    "width": (dict(hidden_sizes=(0,)), ["hidden_sizes = (0,)", "positive"]),
    "unknown": (dict(num_env=3), ["num_env ", "num_envs"]),
}


def one_line(error, words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# Cases about fields that methods which learn step by step have too, with one environment or with more.
EVERYONES = ("fraction", "activation", "width")
WITH_ENVS = ("zero", "unknown")


def cases_of(name):
    if name in TABLE:
        return UNUSABLE_SETUPS
    return EVERYONES + WITH_ENVS * ("num_envs" in get(name).Setup.__dataclass_fields__)


@pytest.mark.parametrize("name, case", [(name, case) for name in [*TABLE, *APART] for case in cases_of(name)])
def test_unusable_setups_are_refused_in_one_line(name, case):
    fields, words = UNUSABLE_SETUPS[case]
    with pytest.raises(RequestError) as error:
        make(name, DISCRETE, **fields)
    one_line(error, words)


@pytest.mark.parametrize(
    "env, fields, words",
    [
        (DISCRETE, dict(distribution="gaussian"), ["distribution = 'gaussian'", "'auto'"]),
        (CONTINUOUS, dict(distribution="categorical"), ["distribution = 'categorical'"]),
        (DISCRETE, dict(action_map="clip"), ["action_map = 'clip'", "'identity'"]),
        (CONTINUOUS, dict(action_map="identity"), ["action_map = 'identity'", "clip"]),
    ],
)
def test_distributions_and_maps_that_do_not_fit_the_actions(env, fields, words):
    with pytest.raises(RequestError) as error:
        make("ppo", env, **fields)
    one_line(error, words)


UNUSABLE_NUMBERS = [
    (dict(learning_rate=float("nan")), ["hypers.learning_rate", "finite"]),
    (dict(learning_rate=float("inf")), ["hypers.learning_rate", "finite"]),
    (dict(learning_rate=-1e-3), ["hypers.learning_rate = -0.001", ">= 0"]),
    (dict(gamma=1.5), ["hypers.gamma = 1.5", "[0, 1]"]),
    (dict(adam_b1=1.0), ["hypers.adam_b1 = 1.0", "below 1"]),
    (dict(gae_lambda=[0.5, 2.0]), ["hypers.gae_lambda has shape (2,)", "vmap"]),
    (dict(entropy_coef="much"), ["hypers.entropy_coef = 'much'", "number"]),
    (dict(anneal_env_steps=0), ["hypers.anneal_env_steps = 0", "environment steps"]),
    (dict(learning_rat=1.0), ["learning_rat ", "learning_rate"]),
]


@pytest.mark.parametrize("name", [*TABLE, *APART])
@pytest.mark.parametrize("hypers, words", UNUSABLE_NUMBERS)
def test_unusable_numbers_are_refused_in_one_line(name, hypers, words):
    field = next(iter(hypers))
    if name in APART and field not in (*get(name).Hypers.__dataclass_fields__, "learning_rat"):
        pytest.skip("has no such number")
    with pytest.raises(RequestError) as error:
        make(name, DISCRETE, hypers)
    one_line(error, words)


def test_unknown_algorithms_are_answered_with_close_ones():
    with pytest.raises(RequestError) as error:
        make("pppo", DISCRETE)
    one_line(error, ["'pppo'", "ppo"])
