"""The loop of the methods with a replay: what is stored, when is learned, what a step costs, and how runs go on."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import NAMES, Probe
from scipy import stats
from test_probe_learning import ACTION_PROBES, ASK, GAMMA, SEEDS, VALUE_PROBES, AnyProbe

import pgjax
from pgjax import make_train
from pgjax.algorithms import make
from pgjax.errors import RequestError, RunError
from pgjax.host import lanes
from pgjax.host.runner import RunSpec, run
from pgjax.host.store import RunStore
from pgjax.networks import draw_kernels
from pgjax.spaces import Box, Discrete
from pgjax.stepwise import off_policy
from pgjax.stepwise.replay import Replay, Transition
from pgjax.stepwise.soft_networks import make_soft_networks
from pgjax.types import TimeStep

TINY = dict(num_steps=20, batch_size=4, warmup_steps=4, buffer_size=100, hidden_sizes=(4,))


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The observation is the number of steps since the start of the episode, which ends after three by itself or by a cut.

    Its actions lie in [-0.4, 1.2]. The reward is 10 times the observation plus the action, or NaN at ``spoiled``.
    """

    cut: bool = False
    spoiled: float = -1.0
    name = "ramp"
    default_params = None
    host_callback = False
    max_episode_steps = 3
    observation_space = Box((1,), 0.0, 3.0)
    action_space = Box((1,), -0.4, 1.2)

    def reset(self, key, params):
        obs = jnp.zeros((key.shape[0], 1))
        return obs, obs

    def step(self, key, env_state, action, params):
        final_obs = env_state + 1
        ended = final_obs[:, 0] == 3
        obs = jnp.where(ended[:, None], 0.0, final_obs)
        reward = 10 * env_state[:, 0] + action[:, 0]
        reward = jnp.where(env_state[:, 0] == self.spoiled, jnp.nan, reward)
        return obs, TimeStep(obs, reward, ended & (not self.cut), ended & self.cut, final_obs, {})

    def refresh(self, key, env_state, params):
        return env_state


def counting(core, key, learner, batch, hypers):
    """In place of a method's update: adds one to the critics, and a reward that is not finite spoils them."""
    params = learner.params._replace(critic=learner.params.critic + 1 + 0 * batch.reward.sum())
    return learner.replace(params=params), {"loss_value": (batch.obs**2).mean() + 1}


def one_step(env, **setup):
    """The bare loop, its first state, the one after an iteration, and what that reported."""
    algorithm = off_policy.make("bare", env, off_policy.Setup(**{**TINY, **setup}), off_policy.Hypers(), update=counting)
    state = algorithm.init(jax.random.key(0), algorithm.hypers)
    return algorithm, state, *jax.jit(algorithm.step)(state, algorithm.hypers)


def updates_of(start, state):
    (count,) = set(np.round(np.asarray(state.learner.params.critic - start.learner.params.critic), 3))
    return count


def stored(state, count):
    """The first transitions, in order, as NumPy."""
    return Transition(*(np.asarray(x)[0, :count] for x in state.replay.experience))


# --- replay


def numbered(first, count):
    x = jnp.arange(first, first + count, dtype=jnp.float32)
    return Transition(x[None, :, None], -x[None, :, None], 10 * x[None], (x % 2 == 0)[None], x[None, :, None] + 0.5)


def test_replay_keeps_the_newest_and_samples_all_of_them_alike():
    replay = Replay(10, 10, Box((1,)), Box((1,)))
    state, sample = replay.init(), jax.jit(jax.vmap(replay.sample, (None, 0)))
    for first in range(0, 16, 4):
        state = replay.add(state, numbered(first, 4))
        batch = sample(state, jax.random.split(jax.random.key(first), 200))
        batch = jax.tree.map(lambda x: x.reshape(2000, *x.shape[2:]), batch)
        values, counts = np.unique(batch.obs, return_counts=True)
        np.testing.assert_array_equal(values, np.arange(max(0, first - 6), first + 4))
        assert stats.chisquare(counts).pvalue > 1e-3
    # What belongs together stays together.
    np.testing.assert_array_equal(batch.action, -batch.obs)
    np.testing.assert_array_equal(batch.reward, 10 * batch.obs[:, 0])
    np.testing.assert_array_equal(batch.terminated, batch.obs[:, 0] % 2 == 0)
    np.testing.assert_array_equal(batch.final_obs, batch.obs + 0.5)


@pytest.mark.parametrize("cut", [False, True])
def test_what_is_stored(cut):
    _, _, state, _ = one_step(Ramp(cut), num_envs=2, num_steps=12)
    kept = stored(state, 24)
    obs, final_obs = (x.reshape(12, 2) for x in (kept.obs, kept.final_obs))
    np.testing.assert_array_equal(obs[:, 0], np.arange(12) % 3)
    # The successor before any reset, also where the next one is the first of another episode.
    np.testing.assert_array_equal(final_obs, obs + 1)
    # A cut is no end.
    np.testing.assert_array_equal(kept.terminated, (kept.obs[:, 0] == 2) & (not cut))
    # Actions in [-1, 1], which the environment got in its own bounds.
    assert np.abs(kept.action).max() <= 1 and np.ptp(kept.action) > 0.5
    np.testing.assert_allclose(kept.reward, 10 * kept.obs[:, 0] + 0.4 + 0.8 * kept.action[:, 0], rtol=1e-5, atol=1e-5)


def test_episodes_are_counted_over_iterations():
    algorithm, _, state, metrics = one_step(Ramp(), num_steps=4)
    assert metrics["episodes"] == 1 and metrics["episode_length"] == 3
    kept = stored(state, 4).reward
    np.testing.assert_allclose(metrics["episode_return"], kept[:3].sum(), rtol=1e-6)
    state, metrics = jax.jit(algorithm.step)(state, algorithm.hypers)
    np.testing.assert_allclose(metrics["episode_return"], stored(state, 8).reward[3:6].sum(), rtol=1e-6)
    assert metrics["env_steps"] == 8


# --- when is acted at random, and when is learned


def test_warm_up_is_uniform_and_teaches_nothing():
    algorithm, start, state, metrics = one_step(Ramp(), num_steps=500, warmup_steps=500, buffer_size=1000)
    assert stats.kstest(stored(state, 500).action[:, 0], "uniform", args=(-1, 2)).pvalue > 1e-3
    assert metrics["updates"] == 0
    # What was not measured is no zero.
    assert np.isnan(metrics["loss_value"])
    for before, after in zip(jax.tree.leaves(start.learner), jax.tree.leaves(state.learner), strict=True):
        np.testing.assert_array_equal(before, after)
    after, metrics = jax.jit(algorithm.step)(state, algorithm.hypers)
    assert metrics["updates"] == updates_of(state, after) == 500 and metrics["loss_value"] > 1
    assert stats.kstest(stored(after, 1000).action[500:, 0], "uniform", args=(-1, 2)).pvalue < 1e-3


def test_discrete_warm_up_is_uniform():
    _, _, state, _ = one_step(Probe("responding"), num_steps=400, warmup_steps=400, buffer_size=1000)
    actions = stored(state, 400).action
    assert actions.dtype == np.int32 and stats.chisquare(np.bincount(actions, minlength=2)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("ratio", "num_envs", "expected"),
    [
        (1.0, 1, (1, 1)),
        (1.0, 4, (1, 4)),
        (0.25, 4, (1, 1)),
        (0.25, 1, (4, 1)),
        (1.5, 1, (2, 3)),
        (1 / 3, 2, (3, 2)),
        (1 / 512, 4096, (1, 8)),
    ],
)
def test_pace_of_updates(ratio, num_envs, expected):
    setup = off_policy.Setup(num_envs=num_envs, num_steps=12, update_ratio=ratio)
    assert off_policy.pace(setup) == expected


@pytest.mark.parametrize(("ratio", "num_envs"), [(0.25, 1), (1.5, 2), (1.0, 4)])
def test_updates_are_as_many_as_asked_for(ratio, num_envs):
    algorithm, start, state, metrics = one_step(Ramp(), num_envs=num_envs, update_ratio=ratio, warmup_steps=20 * num_envs)
    assert metrics["updates"] == 0
    state, metrics = jax.jit(algorithm.step)(state, algorithm.hypers)
    assert metrics["updates"] == ratio * num_envs * 20 == updates_of(start, state)


def test_observation_statistics_are_those_of_all_observations_acted_on():
    _, _, state, _ = one_step(Ramp(), normalize_obs=True, num_envs=2)
    obs = stored(state, 40).obs
    np.testing.assert_allclose(state.learner.obs_moments.mean, obs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.learner.obs_moments.var, obs.var(0), rtol=1e-5)
    assert state.learner.obs_moments.count == 40
    assert obs.max() == 2, "stored as they came"


def test_minibatches_are_normalised_with_the_statistics_from_before_the_step():
    """Observation and successor alike: on the ramp they are one apart, so 1 / σ when normalised."""

    def update(core, key, learner, batch, hypers):
        return learner, {"loss_value": (batch.final_obs - batch.obs).mean()}

    setup = off_policy.Setup(**{**TINY, "normalize_obs": True})
    algorithm = off_policy.make("bare", Ramp(), setup, off_policy.Hypers(), update=update)
    _, metrics = jax.jit(algorithm.step)(algorithm.init(jax.random.key(0), algorithm.hypers), algorithm.hypers)
    seen = np.arange(20) % 3
    expected = [1 / seen[:t].std() for t in range(setup.warmup_steps, 20)]
    np.testing.assert_allclose(metrics["loss_value"], np.mean(expected), rtol=1e-5)


def test_a_spoiled_reward_freezes_the_learner_at_once_and_acting_goes_on():
    algorithm, start, state, metrics = one_step(Ramp(spoiled=0.0), normalize_obs=True)
    assert metrics["nonfinite"] == 1 and all(np.isfinite(v) for n, v in metrics.items() if not n.startswith("episode_"))
    assert updates_of(start, state) < 20  # minibatches without a spoiled one may have come first
    kept = stored(state, 20)
    assert np.isfinite(kept.action).all() and np.isnan(kept.reward).sum() == 7
    after, metrics = jax.jit(algorithm.step)(state, algorithm.hypers)
    assert metrics["nonfinite"] == 1 and metrics["env_steps"] == 40 and (stored(after, 40).obs[:, 0] == np.arange(40) % 3).all()
    for x, y in zip(jax.tree.leaves(after.learner), jax.tree.leaves(state.learner), strict=True):
        np.testing.assert_array_equal(x, y)


# --- what it costs


@pytest.mark.parametrize(("name", "num_lanes"), [("sac", 1), ("sac", 3), pytest.param("mdpo_off", 3, marks=pytest.mark.slow)])
def test_a_step_never_copies_the_buffer(name, num_lanes):
    """The compiled program's own memory is less than any field of the buffer."""
    algorithm = make(name, Probe("responding", continuous=True), **{**TINY, "buffer_size": 1_000_000})
    state = jax.eval_shape(algorithm.init, jax.random.key(0), algorithm.hypers)
    step = algorithm.step
    if num_lanes > 1:
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_lanes, *x.shape), x.dtype), state)
        step = jax.vmap(algorithm.step, (0, None))
    analysis = jax.jit(step, donate_argnums=0).lower(state, algorithm.hypers).compile().memory_analysis()
    assert analysis.argument_size_in_bytes > num_lanes * 17_000_000
    assert analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes < 500_000


# --- runs


SPEC = dict(
    algorithm="sac",
    env="gymnax/Pendulum-v1",
    total_env_steps=240,
    setup={**TINY, "normalize_obs": True},
    num_evals=2,
    eval_episodes=2,
    log_every=2,
    devices=1,
)


@pytest.mark.parametrize("name", ["sac", pytest.param("mdpo_off", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_bit_for_bit_alike(tmp_path, name):
    """Stopped half-way, with a part of the replay filled, and taken up again by what the folder holds."""
    spec = RunSpec(**{**SPEC, "algorithm": name, "seeds": (0, 1)})
    algorithm = spec.build()
    with RunStore.create(tmp_path / "whole", spec.config()) as store:
        run(spec, store, algorithm=algorithm)

    def stop_after_the_first_evaluation(event):
        if event.kind == "evaluated":
            signal.raise_signal(signal.SIGINT)

    with RunStore.create(tmp_path / "parts", spec.config()) as store:
        assert run(spec, store, stop_after_the_first_evaluation, algorithm=algorithm).status == "interrupted"
    with RunStore.open(tmp_path / "parts", spec.config()) as store:
        assert run(spec, store, algorithm=algorithm).status == "finished"
    for kind in ("metrics", "evaluations"):
        order = ["seed", "iteration"] if kind == "metrics" else ["seed", "env_steps", "policy", "episode"]
        whole, parts = (
            getattr(pgjax.load(tmp_path / folder), kind).sort_values(order, ignore_index=True) for folder in ("whole", "parts")
        )
        assert len(whole) and whole.equals(parts)


@pytest.mark.parametrize(
    ("free", "said", "copies"),
    # Ten million transitions of 33 bytes: known before anything is compiled; and with their copy on the way to the disk.
    [(200, "the state of one lane alone needs", (1, 1.1)), pytest.param(400, "one lane needs", (2, 4), marks=pytest.mark.slow)],
)
def test_too_little_memory_names_the_buffer(tmp_path, monkeypatch, free, said, copies):
    spec = RunSpec(**{**SPEC, "setup": {**SPEC["setup"], "buffer_size": 10_000_000}})
    monkeypatch.setattr(lanes, "available_bytes", lambda device: free << 20)
    with pytest.raises(RunError, match=rf"{said} about \d+ MiB and {free} MiB are free; lower setup.buffer_size") as error:
        with RunStore.create(tmp_path / "run", spec.config()) as store:
            run(spec, store)
    needed = int(str(error.value).split("about ")[1].split()[0]) * 2**20
    assert copies[0] * 330e6 <= needed < copies[1] * 330e6


# --- networks


def test_networks_of_the_family():
    for action_space, shape in ((Box((2,), -1, 1), (2, 5)), (Discrete(3), (2, 5, 3))):
        networks = make_soft_networks(Box((4,)), action_space, state_value=True, hidden_sizes=(8,))
        params = networks.init(jax.random.key(0))
        obs, action = jnp.ones((5, 4)), jnp.ones((5, *action_space.shape))
        assert networks.q(params.critic["q"], obs, action).shape == shape and networks.v(params.critic["v"], obs).shape == (5,)
        first, second = (one["torso"]["params"]["Dense_0"]["kernel"] for one in params.critic["q"])
        assert (first != second).any(), "the two Q start apart"
    # log σ is held in [-20, 2].
    networks = make_soft_networks(Box((1,)), Box((1,), -1, 1), hidden_sizes=())
    actor = jax.tree.map(jnp.ones_like, networks.init(jax.random.key(0)).actor)
    np.testing.assert_array_equal(networks.policy(actor, jnp.array([[1e3], [-1e3], [0.0]])).log_std, [[2], [-20], [1]])
    # MinAtar's observations, discrete: with the convolution, as elsewhere.
    pictures = make_soft_networks(Box((6, 6, 2)), Discrete(3), hidden_sizes=(8,))
    params = pictures.init(jax.random.key(0))
    assert pictures.q(params.critic["q"], jnp.ones((5, 6, 6, 2)), None).shape == (2, 5, 3)
    flat = make_soft_networks(Box((6, 6, 2)), Box((1,), -1, 1), hidden_sizes=(8,))
    assert flat.q(flat.init(jax.random.key(0)).critic["q"], jnp.ones((5, 6, 6, 2)), jnp.ones((5, 1))).shape == (2, 5)


def test_glorot_kernels():
    for shape in ((30, 500), (3, 3, 4, 100)):
        (kernel,) = draw_kernels(jax.random.key(0), [shape], "glorot_uniform")
        bound = np.sqrt(6 / (np.prod(shape[:-1]) + shape[-1]))
        assert stats.kstest(np.ravel(kernel), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3


# --- requests that cannot work


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (dict(update_ratio=0.0), ["update_ratio = 0.0", "above 0"]),
        (dict(update_ratio=1 / 7), ["update_ratio", "1 updates every 7 steps", "num_steps = 20"]),
        (dict(warmup_steps=3), ["warmup_steps = 3", "batch_size = 4"]),
        (dict(buffer_size=3), ["buffer_size = 3", "at least 4"]),
        (dict(critic="x"), ["critic = 'x'", "q, v"]),
        (dict(batch_size=0), ["batch_size = 0", ">= 1"]),
        (dict(kernel_init="glorot"), ["kernel_init = 'glorot'", "glorot_uniform"]),
    ],
)
@pytest.mark.parametrize("name", ["sac", "mdpo_off"])
def test_unusable_setups_are_refused_in_one_line(name, setup, words):
    with pytest.raises(RequestError) as error:
        make(name, Ramp(), **{**TINY, **setup})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_actions_without_bounds_are_refused():
    env = dataclasses.make_dataclass("Unbounded", [], bases=(Ramp,), namespace={"action_space": Box((1,))}, frozen=True)()
    with pytest.raises(RequestError, match="ramp has none"):
        make("sac", env, **TINY)


# --- learning


PROBE_SETUP = dict(num_envs=4, num_steps=50, update_ratio=0.25, batch_size=64, warmup_steps=200, buffer_size=4000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sac", "mdpo_off"])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("critic", ["q", "v"])
def test_probes_are_learned(name, continuous, critic):
    """Values and best actions of six small problems, every seed, with hardly any temperature."""
    setup = PROBE_SETUP | dict(hidden_sizes=(16,), critic=critic) | ({"temperature": "fixed"} if name == "sac" else {})
    hypers = dict(gamma=GAMMA, learning_rate=3e-3, tau=0.05, temperature=0.003) | (
        {"kl_coef": 0.01} if name == "mdpo_off" else {}
    )
    algorithm = make(name, AnyProbe(continuous=continuous), hypers, **setup)
    train = make_train(algorithm, 12_000, log_every=60)
    all_lanes = jax.jit(jax.vmap(jax.vmap(train, (0, None, None)), (None, None, 0)))
    state, metrics = all_lanes(jax.random.split(jax.random.key(1), SEEDS), algorithm.hypers, jnp.arange(len(NAMES)))
    assert not metrics["nonfinite"].any()
    networks = algorithm.core.networks

    def ask(state, obs):
        action = algorithm.act(algorithm.policy(state), obs, None)
        q = networks.q(state.learner.params.critic, obs, action).min(0)
        value = q.max(-1) if q.ndim == 2 else q
        return value, action

    for number, probe in enumerate(NAMES):
        obs = jnp.asarray(np.resize(ASK[probe], (2, 1)), jnp.float32)
        lane = jax.tree.map(lambda x, number=number: x[number], state)
        values, actions = jax.vmap(ask, (0, None))(lane, obs)
        exact = Probe(probe, continuous).value(np.asarray(obs), GAMMA)
        if probe in VALUE_PROBES:
            np.testing.assert_allclose(
                values, np.tile(exact, (SEEDS, 1)), atol=0.07 * np.abs(exact).max(), rtol=0, err_msg=probe
            )
        if probe in ACTION_PROBES:
            best = np.asarray(Probe(probe, continuous).optimal_action(obs))
            atol = 0.1 if continuous else 0
            np.testing.assert_allclose(actions, np.broadcast_to(best, actions.shape), atol=atol, rtol=0, err_msg=probe)


@pytest.mark.slow
def test_pendulum_is_swung_up():
    """Three seeds after 10 000 steps with small networks; a random policy has about -1200, a good one -150."""
    hypers = dict(learning_rate=1e-3, temperature_lr=1e-3)
    algorithm = make(
        "sac", pgjax.make_env("gymnax/Pendulum-v1"), hypers, hidden_sizes=(64, 64), batch_size=128, buffer_size=10_000
    )
    train = make_train(algorithm, 10_000, num_evals=1, eval_episodes=16)
    _, metrics = jax.jit(jax.vmap(train, (0, None)))(jax.random.split(jax.random.key(0), 3), algorithm.hypers)
    assert (metrics["evaluations"].mode_return.mean((-1, -2)) > -300).all()
