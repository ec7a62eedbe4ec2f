"""The MuJoCo Playground adapter: ends of episodes, parity with Playground's own steps, swept physics, starts, options."""

import importlib.util
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("mujoco_playground")

# Before Playground itself, which the adapter imports without what is not needed.
import pgjax.envs.playground as adapter  # isort: skip
import mujoco
import scipy.stats
from ml_collections import config_dict
from mujoco import mjx
from mujoco_playground import MjxEnv, dm_control_suite
from mujoco_playground import State as PlaygroundState
from mujoco_playground.config import dm_control_suite_params

from pgjax.checks.environment import check_env
from pgjax.envs import change_params, from_playground, list_envs, make_env
from pgjax.errors import RequestError
from pgjax.experiments import presets
from pgjax.spaces import Box

LIMIT = 3
NAMES = [e.name for e in list_envs() if e.library == "playground" and "" not in e.broken]


def keys(seed, *shape):
    return jax.random.split(jax.random.key(seed), shape)


def stack(*trees):
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *trees)


class Toy(MjxEnv):
    """A point on a rail, pushed by its action. It starts at a random x in [0, 1) and ends after ``ends_at`` steps.

    The observation is a dict: the time since the start, and x. ``breaks_at`` makes the simulation go wrong at that time.
    The reward, the point's mass, comes from a method that the constructor picks, as some of Playground's tasks do. Its
    physics is its own, for MJX's takes seconds to compile; only the mass is read from MJX's model.
    """

    def __init__(self, ends_at=99, breaks_at=99):
        super().__init__(config_dict.create(ctrl_dt=0.02, sim_dt=0.01))
        self.ends_at, self.breaks_at = ends_at, breaks_at
        self._mj_model = mujoco.MjModel.from_xml_string(
            """<mujoco><worldbody><body>
            <joint type="slide" axis="1 0 0"/><geom size="0.1" mass="1"/>
            </body></worldbody></mujoco>"""
        )
        self._mjx_model = mjx.put_model(self._mj_model, impl="jax")
        self._reward = self._mass

    def _mass(self):
        return self.mjx_model.body_mass[1]

    def reset(self, rng):
        zero = jnp.zeros(())
        x = jax.random.uniform(rng, (1,))
        info = {"rng": rng}
        return PlaygroundState({"x": x, "speed": zero}, {"x": x, "time": zero}, zero, zero, {"speed": zero}, info)

    def step(self, state, action):
        speed = state.data["speed"] + 10 * action[0] / self._mass() * self.dt
        time = state.obs["time"] + 1
        x = jnp.where(time == self.breaks_at, jnp.nan, state.data["x"] + speed * self.dt)
        state.metrics.update(speed=speed)
        done = (time == self.ends_at) | jnp.isnan(x).any()
        reward = self._reward() + 0 * x[0]
        obs = {"x": x, "time": time}
        return PlaygroundState({"x": x, "speed": speed}, obs, reward, done.astype(float), state.metrics, state.info)

    xml_path = property(lambda self: "")
    action_size = property(lambda self: 1)
    mj_model = property(lambda self: self._mj_model)
    mjx_model = property(lambda self: self._mjx_model)


def rollout(env, num_envs, num_steps, params=None, actions=None, seed=0):
    """obs of the starts [B, *O], time steps [T, B, ...]; one compiled program."""
    params = env.default_params if params is None else params
    actions = jnp.zeros((num_steps, num_envs, *env.action_space.shape)) if actions is None else actions

    @jax.jit
    def run(start_keys, step_keys, actions, params):
        state, obs = env.reset(start_keys, params)
        return obs, jax.lax.scan(lambda s, x: env.step(x[0], s, x[1], params), state, (step_keys, actions))[1]

    return jax.tree.map(np.asarray, run(keys(seed, num_envs), keys(seed + 1, num_steps, num_envs), actions, params))


@pytest.fixture(scope="module")
def toy():
    """``(first_obs, steps)`` of 7 steps for a time limit of 3, by the step at which the task itself ends."""
    runs = {}
    for ends_at in (2, LIMIT, 99):
        runs[ends_at] = rollout(from_playground(Toy(ends_at), LIMIT), 4, 7)
    return runs


class TestEndsOfEpisodes:
    def test_flags(self, toy):
        expected = {2: ([1, 3, 5], []), LIMIT: ([2, 5], []), 99: ([], [2, 5])}
        for ends_at, (terminated, truncated) in expected.items():
            steps = toy[ends_at][1]
            for env in range(4):
                assert np.flatnonzero(steps.terminated[:, env]).tolist() == terminated
                assert np.flatnonzero(steps.truncated[:, env]).tolist() == truncated
            assert steps.terminated.dtype == steps.truncated.dtype == bool

    def test_final_obs_is_the_true_successor_and_obs_a_start(self, toy):
        for first_obs, steps in toy.values():
            before = np.concatenate([first_obs[None], steps.obs[:-1]])
            # A dict in the order of its sorted keys: time, then x, which stands still without a push.
            np.testing.assert_allclose(steps.final_obs, before + np.array([1.0, 0.0]), atol=1e-6)
            ended = steps.terminated | steps.truncated
            np.testing.assert_array_equal(steps.obs[~ended], steps.final_obs[~ended])
            assert (steps.obs[ended][:, 0] == 0).all() and (steps.final_obs[ended][:, 0] >= 2).all()
            starts = np.concatenate([first_obs[:, 1], steps.obs[ended][:, 1]])
            assert len(np.unique(starts)) > len(starts) // 2

    def test_rewards_and_metrics(self, toy):
        for _, steps in toy.values():
            np.testing.assert_allclose(steps.reward, 1.0)
            assert set(steps.metrics) == {"speed", "unstable"}
            assert all(x.dtype == np.float32 and not x.any() for x in steps.metrics.values())

    def test_a_simulation_that_goes_wrong_ends_its_episode_without_a_nan(self):
        _, steps = rollout(from_playground(Toy(breaks_at=2), LIMIT), 2, 4)
        np.testing.assert_array_equal(steps.terminated[:, 0], [False, True, False, True])
        assert not steps.truncated.any()
        np.testing.assert_array_equal(steps.reward[:, 0], [1, 0, 1, 0])
        np.testing.assert_array_equal(steps.metrics["unstable"][:, 0], [0, 1, 0, 1])
        np.testing.assert_array_equal(steps.final_obs[1], steps.obs[0])  # the last observation that there was
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(steps))

    def test_action_repeat_adds_rewards_and_stops_at_the_end(self):
        _, steps = rollout(from_playground(Toy(ends_at=3), LIMIT, action_repeat=2), 2, 4)
        np.testing.assert_array_equal(steps.reward[:, 0], [2, 1, 2, 1])
        np.testing.assert_array_equal(steps.terminated[:, 0], [False, True, False, True])
        np.testing.assert_array_equal(steps.final_obs[:, 0, 0], [2, 3, 2, 3])

    def test_check_env(self):
        report = check_env(from_playground(Toy(), LIMIT), num_steps=40)
        assert report.unseen == ("termination",) and report.truncated == 2 * 3 * (40 // LIMIT) and report.random_starts

    @pytest.mark.parametrize("full_reset", [False, True])
    def test_playgrounds_own_wrapper_loses_what_the_adapter_keeps(self, full_reset):
        """With ``full_reset`` a step that was truncated says it was not; the final observation is lost either way."""
        from mujoco_playground import wrapper

        env = wrapper.wrap_for_brax_training(Toy(), episode_length=LIMIT, full_reset=full_reset)
        state = jax.jit(env.reset)(jax.random.split(jax.random.PRNGKey(0), 2))
        step = jax.jit(env.step)
        for _ in range(LIMIT):
            state = step(state, jnp.zeros((2, 1)))
        assert (state.done == 1).all() and (state.obs["time"] == 0).all()
        np.testing.assert_array_equal(state.info["truncation"], [0, 0] if full_reset else [1, 1])

        _, steps = rollout(from_playground(Toy(), LIMIT), 2, LIMIT)
        assert steps.truncated[-1].all() and not steps.terminated.any() and (steps.final_obs[-1, :, 0] == LIMIT).all()


class TestParams:
    def test_mass_and_limit_are_swept_in_one_program(self):
        env = from_playground(Toy(), LIMIT)
        base = env.default_params
        mass = base.model.body_mass
        lanes = stack(*(change_params(env, {"model.body_mass": mass * m, "max_episode_steps": n}) for m, n in ((1, 3), (4, 2))))
        push = jnp.ones((3, 2, 1))
        _, steps = jax.vmap(lambda p: rollout_traced(env, p, push))(lanes)
        np.testing.assert_array_equal(steps.truncated[..., 0], [[False, False, True], [False, True, False]])
        speed = np.asarray(steps.metrics["speed"][:, 0, 0])
        np.testing.assert_allclose(speed, [0.2, 0.05], rtol=1e-4)  # 10 N for 0.02 s
        # Read by a method that the constructor picked and bound to the original.
        np.testing.assert_allclose(steps.reward[:, 0, 0], [1.0, 4.0], rtol=1e-6)

    def test_the_env_is_never_changed(self):
        raw = Toy()
        before = raw._mjx_model
        rollout(from_playground(raw, LIMIT), 2, 2)
        assert raw._mjx_model is before
        assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(vars(raw)))

    def test_params_reach_a_wrapped_env(self):
        from mujoco_playground import wrapper

        env = from_playground(wrapper.Wrapper(Toy()), LIMIT)
        heavy = change_params(env, {"model.body_mass": env.default_params.model.body_mass * 4})
        assert rollout(env, 2, 1, heavy)[1].reward[0, 0] == 4 and env.name == "playground/Toy"


def rollout_traced(env, params, actions):
    num_steps, num_envs = actions.shape[:2]
    state, obs = env.reset(keys(0, num_envs), params)
    step_keys = keys(1, num_steps, num_envs)
    return obs, jax.lax.scan(lambda s, x: env.step(x[0], s, x[1], params), state, (step_keys, actions))[1]


@pytest.fixture(scope="module")
def cartpole():
    """CartpoleBalance in two programs that all tests share, because compiling physics is what takes the time.

    ours: ``(first_obs, pool_obs, steps)`` of two lanes, the second with little gravity.  raw: ``(starts, steps)`` of
    Playground's own environment, the same starts first.
    """
    num_envs, num_steps = 128, 10
    env = make_env("playground/CartpoleBalance", episode_length=8)
    raw = dm_control_suite.load("CartpoleBalance", config_overrides={"impl": "jax"})
    actions = jax.random.uniform(jax.random.key(2), (num_steps, num_envs, 1), minval=-1.0, maxval=1.0)
    lanes = stack(env.default_params, change_params(env, {"model.opt.gravity": [0.0, 0.0, -1.0]}))

    def ours(params):
        state, obs = env.reset(keys(0, num_envs), params)
        step_keys = keys(1, num_steps, num_envs)
        steps = jax.lax.scan(lambda s, x: env.step(x[0], s, x[1], params), state, (step_keys, actions))[1]
        return obs, state.pool_obs, steps

    def by_hand():
        state = jax.vmap(raw.reset)(jnp.concatenate([keys(0, num_envs), keys(9, num_envs)]))

        def step(state, action):
            state = jax.vmap(raw.step)(state, action)
            return state, (state.obs, state.reward, state.metrics)

        first = jax.tree.map(lambda x: x[:num_envs], state)
        return state.obs, jax.lax.scan(step, first, actions)[1]

    out = jax.jit(jax.vmap(ours))(lanes), jax.jit(by_hand)()
    return jax.tree.map(np.asarray, out)


class TestTasks:
    def test_parity_with_playgrounds_own_steps(self, cartpole):
        """Observations, rewards and metrics of both from the same starts, step by step until the time limit."""
        (first_obs, _, steps), (starts, (obs, reward, metrics)) = cartpole
        np.testing.assert_allclose(first_obs[0], starts[:128], atol=1e-6)
        np.testing.assert_allclose(steps.final_obs[0, :8], obs[:8], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(steps.reward[0, :8], reward[:8], atol=1e-5)
        assert set(steps.metrics) == {*metrics, "unstable"}
        for name, values in metrics.items():
            np.testing.assert_allclose(steps.metrics[name][0, :8], values[:8], atol=1e-4)

    def test_the_time_limit(self, cartpole):
        _, pool_obs, steps = cartpole[0]
        assert not steps.terminated.any() and (steps.truncated == (np.arange(10) == 7)[:, None]).all()
        for lane in range(2):
            assert all((start == pool_obs[lane]).all(-1).any() for start in steps.obs[lane, 7])

    def test_gravity(self, cartpole):
        first_obs, _, steps = cartpole[0]
        np.testing.assert_allclose(first_obs[0], first_obs[1], atol=1e-6)
        assert np.abs(steps.final_obs[0] - steps.final_obs[1])[7].max() > 1e-3

    def test_the_pool_has_the_distribution_of_exact_starts(self, cartpole):
        """Kolmogorov and Smirnov's test on each entry of the observation; 0.001 shared by the entries."""
        pool, starts = cartpole[0][1][0], cartpole[1][0][128:]
        assert pool.shape == starts.shape and len(np.unique(pool, axis=0)) == len(pool)
        p_values = [scipy.stats.ks_2samp(pool[:, i], starts[:, i]).pvalue for i in range(starts.shape[1])]
        assert min(p_values) > 1e-3 / starts.shape[1]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["PendulumSwingup", "CartpoleBalance", "HopperHop"])
    def test_check_env(self, name):
        report = check_env(make_env(f"playground/{name}", episode_length=4), num_steps=10)
        assert report.truncated == 2 * 3 * 2 and report.unseen == ("termination",)

    @pytest.mark.slow
    def test_other_settings(self):
        env = make_env("playground/PendulumSwingup", ctrl_dt=0.01, action_repeat=3, episode_length=4, reset_mode="exact")
        assert env.observation_space == Box((3,)) and env.action_space == Box((1,), -1.0, 1.0)
        assert check_env(env, num_steps=10).truncated == 2 * 3 * 2

    def test_the_default_time_limit_counts_repetitions(self):
        assert make_env("playground/PendulumSwingup", action_repeat=3).max_episode_steps == 334

    def test_a_part_of_the_pool_is_renewed(self):
        env = from_playground(Toy(), LIMIT, refresh_size=16)
        state, _ = jax.jit(env.reset)(keys(0, 2), env.default_params)
        fresh = jax.jit(env.refresh)(jax.random.key(3), state, env.default_params)
        new = np.asarray(fresh.pool_obs != state.pool_obs).any(-1)
        assert new.sum() == 16
        assert (np.diff(np.concatenate([new, new[:1]]).astype(int)) != 0).sum() == 2  # one stretch, perhaps around the end
        np.testing.assert_array_equal(fresh.pool_obs[:, 1], fresh.pool_state.playground.data["x"][:, 0])


class TestRequests:
    def test_the_table_is_that_of_playground(self):
        assert {e.name for e in list_envs() if e.library == "playground"} == {
            f"playground/{name}" for name in dm_control_suite.ALL_ENVS
        }
        assert adapter.registered() == list(dm_control_suite.ALL_ENVS)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ctrl_d": 0.02}, "'ctrl_d' is unknown to playground/CartpoleBalance: did you mean ctrl_dt"),
            ({"vision": True}, "'vision' is unknown"),
            ({"impl": "wrap"}, "impl = 'wrap' is unknown: did you mean warp"),
            ({"ctrl_dt": "x"}, "ctrl_dt = 'x' does not fit; it is a number, by default 0.01"),
            ({"njmax": 2.5}, "njmax = 2.5 does not fit; it is a whole number"),
            ({"sim_dt": 0.0}, "sim_dt = 0.0 must be positive"),
            ({"ctrl_dt": 0.005}, "ctrl_dt = 0.005 is not a whole number of sim_dt = 0.01"),
            ({"episode_length": 0}, "episode_length = 0"),
            ({"action_repeat": 0}, "action_repeat = 0"),
            ({"action_repeat": 1.5}, "action_repeat = 1.5"),
            ({"reset_mode": "pol"}, "did you mean pool"),
        ],
    )
    def test_wrong_options_get_one_line(self, options, message):
        with pytest.raises(RequestError, match=message) as caught:
            make_env("playground/CartpoleBalance", **options)
        assert "\n" not in str(caught.value)

    def test_wrong_names(self):
        with pytest.raises(RequestError, match="did you mean CheetahRun"):
            make_env("playground/ChetahRun")
        with pytest.raises(RequestError, match="keeps no model in _mjx_model"):
            toy = Toy()
            del toy._mjx_model
            from_playground(toy)

    def test_what_is_missing_is_named(self, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "mujoco_playground", None)
            patch.delitem(sys.modules, "pgjax.envs.playground")
            with pytest.raises(RequestError, match=r"pip install 'pgjax\[playground\]'"):
                make_env("playground/CheetahRun")
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "warp" else find(name))
        with pytest.raises(RequestError, match="impl = 'warp' needs the package warp-lang"):
            make_env("playground/CheetahRun", impl="warp")

    def test_a_task_of_ones_own_that_is_registered_with_playground(self, monkeypatch):
        monkeypatch.setitem(dm_control_suite._envs, "Mine", lambda config, config_overrides: Toy())
        config = config_dict.create(ctrl_dt=0.02, sim_dt=0.01, episode_length=5, action_repeat=2, impl="jax")
        monkeypatch.setitem(dm_control_suite._cfgs, "Mine", lambda: config)
        assert make_env("playground/Mine").max_episode_steps == 3


def test_importing_is_quiet_and_leaves_out_what_is_not_needed(tmp_path):
    code = """
        import sys
        import pgjax.envs
        import pgjax.envs.playground as adapter
        with adapter.quiet_loading():  # the model of this task is dated, and MuJoCo says so
            adapter.mujoco_playground.dm_control_suite.load("CheetahRun", config_overrides={"impl": "jax"})
        unwanted = "warp", "brax", "trimesh", "mujoco_playground._src.locomotion", "mujoco_playground._src.registry"
        assert not set(unwanted) & set(sys.modules), set(unwanted) & set(sys.modules)
        assert "Go1JoystickFlatTerrain" in adapter.mujoco_playground.registry.ALL_ENVS
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "" and done.stderr == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_presets_say_what_playground_says(name):
    theirs = dm_control_suite_params.brax_ppo_config(name.partition("/")[2])
    preset = presets.find("auto", "ppo", name)
    setup, hypers = preset["setup"], preset["hypers"]
    assert preset["name"] == name and preset["total_env_steps"] == theirs.num_timesteps
    assert setup["num_envs"] == theirs.num_envs and setup["num_minibatches"] == theirs.num_minibatches
    assert setup["num_envs"] * setup["num_steps"] == theirs.batch_size * theirs.num_minibatches * theirs.unroll_length
    assert setup["num_epochs"] == theirs.num_updates_per_batch and setup["normalize_obs"] == theirs.normalize_observations
    ours = [hypers[k] for k in ("gamma", "learning_rate", "entropy_coef", "reward_scale")]
    assert ours == [theirs.discounting, theirs.learning_rate, theirs.entropy_cost, theirs.reward_scaling]
    assert theirs.action_repeat == 1 and theirs.episode_length == 1000
    assert not {"network_factory", "max_grad_norm", "clipping_epsilon", "gae_lambda"} & set(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_task_runs(name):
    env = make_env(name)
    actions = jax.random.uniform(jax.random.key(2), (3, 2, *env.action_space.shape), minval=-1.0, maxval=1.0)
    obs, steps = rollout(env, 2, 3, actions=actions)
    assert obs.shape[1:] == env.observation_space.shape and env.max_episode_steps == 1000
    assert np.isfinite(steps.final_obs).all() and ((steps.reward >= 0) & (steps.reward <= 1)).all()
    assert not steps.metrics["unstable"].any() and not steps.terminated.any()
    assert np.abs(steps.final_obs[1] - steps.final_obs[0]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CartpoleBalance", "HopperHop"])
def test_warp_agrees_with_jax(name):
    pytest.importorskip("warp")
    runs = {}
    for impl in ("jax", "warp"):
        env = make_env(f"playground/{name}", impl=impl, episode_length=4)
        actions = jax.random.uniform(jax.random.key(2), (6, 2, *env.action_space.shape), minval=-1.0, maxval=1.0)
        runs[impl] = rollout(env, 2, 6, actions=actions)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2), runs["jax"][0], runs["warp"][0])
    before_contact = jax.tree.map(lambda x: x[:3], (runs["jax"][1], runs["warp"][1]))
    np.testing.assert_allclose(before_contact[0].final_obs, before_contact[1].final_obs, rtol=5e-2, atol=5e-2)
    np.testing.assert_array_equal(runs["jax"][1].truncated, runs["warp"][1].truncated)
