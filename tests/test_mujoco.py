"""Gymnasium's MuJoCo tasks: on C MuJoCo step for step what Gymnasium itself does, on MJX the same within rounding."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import pgjax
from pgjax.envs.mujoco import load_model
from pgjax.envs.mujoco.tasks import TASKS
from pgjax.errors import RequestError
from pgjax.experiments import mujoco_fidelity as fidelity

ROOT = Path(__file__).resolve().parent.parent
MORE_POOLS = ("InvertedDoublePendulum-v5", "Reacher-v5", "Hopper-v5", "HalfCheetah-v5")  # their programs take longer
VERSION_5 = sorted(name for name in TASKS if name.endswith("-v5"))


def assert_same(name, num_steps, **options):
    found = fidelity.against_gymnasium(name, num_steps, **options)
    # The physics to the last bit; what float32 has to round, to its rounding.
    assert (found.qpos, found.qvel, found.obs, found.ends) == (0, 0, 0, 0)
    assert found.reward < 1e-6
    assert found.metrics < 1e-6
    return found


def uniform_on(low, high):
    return stats.uniform(low, high - low)


def uniform(bound):
    return uniform_on(-bound, bound)


def normal(scale):
    return stats.norm(0, scale)


def draw_starts(name, num=20_000, **options):
    """What is added to a model's initial state at the start of an episode, ``num`` times, and the model."""
    task = TASKS[name](**options)
    model = load_model(task.xml)
    start = jax.jit(jax.vmap(lambda key: task.start(key, model)))
    return np.asarray(start(jax.random.split(jax.random.key(0), num))), model


class TestAgainstGymnasium:
    @pytest.mark.parametrize("name", sorted(TASKS))
    def test_step_by_step(self, name):
        """Time limits cut in twice; falls do where random actions make the task fall."""
        assert assert_same(name, 45, episode_length=20).episodes >= 4

    @pytest.mark.parametrize("name", ["Hopper-v5", "Ant-v5"])
    def test_with_options_of_the_constructor(self, name):
        options = {"terminate_when_unhealthy": False, "ctrl_cost_weight": 0.3, "healthy_reward": 2.0}
        options["exclude_current_positions_from_observation"] = False
        assert_same(name, 40, **options)

    @pytest.mark.parametrize("left_out", [("cinert", "qfrc_actuator"), ("cvel", "cfrc_ext")])
    def test_parts_of_a_humanoid_s_observation(self, left_out):
        assert_same("Humanoid-v5", 10, **{f"include_{part}_in_observation": False for part in left_out})

    def test_contact_forces_of_version_4_on_request(self):
        assert pgjax.make_env("mujoco/Ant-v4").observation_space.shape == (27,)
        assert_same("Ant-v4", 40, use_contact_forces=True)

    def test_a_difference_is_seen(self, monkeypatch):
        """Of a reward that is no number, as of one that is wrong."""
        for wrong in (np.nan, 0.5):
            task = TASKS["Swimmer-v5"]()._replace(recall=lambda p, wrong=wrong: p.qpos[..., :2] + wrong)
            monkeypatch.setitem(TASKS, "Swimmer-v5", lambda task=task: task)
            assert not fidelity.against_gymnasium("Swimmer-v5", 3).reward < 1e-6

    @pytest.mark.slow
    @pytest.mark.parametrize("name", sorted(TASKS))
    def test_through_whole_episodes(self, name):
        assert assert_same(name, 1100).episodes >= 2

    @pytest.mark.parametrize("name", VERSION_5)
    def test_starts_are_distributed_alike(self, name):
        """Kolmogorov-Smirnov on every position and velocity; a start that never varies must be the same number."""
        num = 600
        env = pgjax.make_env(f"mujoco/{name}")
        state, _ = jax.jit(env.reset)(jax.random.split(jax.random.key(1), 10 * num), env.default_params)
        ours = np.concatenate(fidelity.positions(env, np.asarray(state.bits)), 1)
        original = fidelity.make_original(name).unwrapped
        theirs = np.empty((num, ours.shape[1]))
        for i in range(num):
            original.reset(seed=i)
            theirs[i] = np.concatenate([original.data.qpos, original.data.qvel])
        fixed = theirs.std(0) == 0
        np.testing.assert_allclose(ours[:num, fixed], theirs[:, fixed], atol=1e-7)
        values = [stats.ks_2samp(a, b).pvalue for a, b in zip(ours.T[~fixed], theirs.T[~fixed], strict=True)]
        assert min(values) > 1e-4 / len(values)


# What Gymnasium's documentation says is added to the initial positions and velocities: uniform within a bound, or normal.
NOISE = {
    **{f"{name}-v5": (uniform(0.1), normal(0.1)) for name in ("HalfCheetah", "Ant", "InvertedDoublePendulum")},
    **{f"{name}-v5": (uniform(0.005), uniform(0.005)) for name in ("Hopper", "Walker2d")},
    **{f"{name}-v5": (uniform(0.01), uniform(0.01)) for name in ("Humanoid", "HumanoidStandup", "InvertedPendulum")},
    "Swimmer-v5": (uniform(0.1), uniform(0.1)),
}


class TestStarts:
    """Of so many draws that a width wrong by a twentieth is seen; Gymnasium itself is too slow to give as many."""

    @pytest.mark.parametrize("name", sorted(NOISE))
    def test_noise_is_as_documented(self, name):
        noise, model = draw_starts(name)
        dists = [NOISE[name][0]] * model.nq + [NOISE[name][1]] * model.nv
        values = [stats.kstest(a, dist.cdf).pvalue for a, dist in zip(noise.T, dists, strict=True)]
        assert min(values) > 1e-4 / len(values)

    def test_noise_scales_with_the_option(self):
        noise, model = draw_starts("Ant-v5", reset_noise_scale=0.02)
        np.testing.assert_allclose(np.abs(noise[:, : model.nq]).max(0), 0.02, rtol=0.01)
        np.testing.assert_allclose(noise[:, model.nq :].std(0), 0.02, rtol=0.03)

    def test_reacher_s_goal_is_anywhere_in_its_disc(self):
        noise, model = draw_starts("Reacher-v5")
        goal = noise[:, 2:4] + model.qpos0[2:]
        # Of a disc of radius R the share within r is r²/R².
        assert stats.kstest((goal**2).sum(1) / 0.2**2, uniform_on(0, 1).cdf).pvalue > 1e-4
        assert stats.kstest(np.arctan2(goal[:, 1], goal[:, 0]), uniform_on(-np.pi, np.pi).cdf).pvalue > 1e-4
        for i, bound in ((0, 0.1), (1, 0.1), (4, 0.005), (5, 0.005)):
            assert stats.kstest(noise[:, i], uniform(bound).cdf).pvalue > 1e-4
        assert (noise[:, 6:] == 0).all()

    def test_pusher_s_object_is_anywhere_in_its_rectangle_but_near_the_goal(self):
        noise, model = draw_starts("Pusher-v5")
        place = noise[:, 7:9] + model.qpos0[7:9]
        assert np.linalg.norm(place, axis=1).min() > 0.17
        # Far from the hole left around the origin the rectangle is even: x of [-0.3, -0.17], y of all of [-0.2, 0.2].
        far = place[place[:, 0] < -0.17]
        assert stats.kstest(far[:, 0], uniform_on(-0.3, -0.17).cdf).pvalue > 1e-4
        assert stats.kstest(far[:, 1], uniform_on(-0.2, 0.2).cdf).pvalue > 1e-4
        # Its share of the area: 0.13 * 0.4 of the rectangle's 0.3 * 0.4 less half a disc of radius 0.17.
        share = 0.13 * 0.4 / (0.3 * 0.4 - np.pi * 0.17**2 / 2)
        assert abs(len(far) / len(place) - share) < 4 * np.sqrt(share * (1 - share) / len(place))
        np.testing.assert_allclose(noise[:, :7], 0, atol=1e-7)
        assert all(stats.kstest(noise[:, 11 + i], uniform(0.005).cdf).pvalue > 1e-4 / 7 for i in range(7))

    @pytest.mark.parametrize("episode_length", [4, 10])
    def test_an_episode_whose_time_is_up_is_followed_by_a_start(self, episode_length):
        """Whether the limit is that of the option or of the parameters. The gently pushed pendulum does not fall."""
        env = pgjax.make_env("mujoco/InvertedPendulum-v5", episode_length=episode_length)
        params = env.default_params.replace(max_episode_steps=jnp.int32(4))
        state, _ = env.reset(jax.random.split(jax.random.key(0), 3), params)
        step = jax.jit(env.step)
        for t in range(8):
            state, timestep = step(jax.random.split(jax.random.key(t), 3), state, jnp.full((3, 1), 0.3), params)
            np.testing.assert_array_equal(timestep.truncated, [t % 4 == 3] * 3)
            assert not timestep.terminated.any()
            # The push takes it out of the range of starts within a step.
            assert (np.abs(timestep.final_obs[:, 2:]) > 0.01).any(1).all()
            started = (np.abs(timestep.obs) <= 0.01).all(1)
            np.testing.assert_array_equal(started, timestep.truncated)


@pytest.fixture(scope="module")
def env():
    return pgjax.make_env("mujoco/Ant-v5", episode_length=15)


class TestPureFunction:
    def test_keeps_the_contract(self):
        report = pgjax.check_env(pgjax.make_env("mujoco/Hopper-v5", episode_length=20))
        assert report.truncated and report.random_starts

    def test_nothing_is_remembered_between_calls(self, env):
        """The same state and action give the same bits, whatever was stepped in between, on however many threads."""
        _, actions, states, steps = fidelity.random_rollout(env, 20, 4, seed=0)
        alone = pgjax.make_env("mujoco/Ant-v5", episode_length=15, num_threads=1)
        keys = jax.random.split(jax.random.key(0), 2)
        for t in (12, 3, 18):
            # Two of the four environments, in the other order.
            state = jax.tree.map(lambda x, t=t: jnp.asarray(x[t - 1, [2, 0]]), states)
            for other in (env, alone):
                new, timestep = other.step(keys, state, jnp.asarray(actions[t, [2, 0]]), other.default_params)
                np.testing.assert_array_equal(timestep.final_obs, steps.final_obs[t, [2, 0]])
                on = ~(steps.terminated | steps.truncated)[t, [2, 0]]
                np.testing.assert_array_equal(np.asarray(new.bits)[on], states.bits[t, [2, 0]][on])

    def test_lanes_are_single_runs(self, env):
        """Under vmap the leading axes become one batch, with parameters of their own."""
        keys = jax.random.split(jax.random.key(3), (2, 3))
        limits = env.default_params.replace(max_episode_steps=jnp.array([2, 5], jnp.int32))

        def play(keys, params):
            state, _ = env.reset(keys, params)
            action = jnp.ones((3, 8))

            def body(state, keys):
                state, timestep = env.step(keys, state, action, params)
                return state, (timestep.final_obs, timestep.truncated)

            step_keys = jax.vmap(lambda key: jax.random.split(key, 6), out_axes=1)(keys)
            return jax.lax.scan(body, state, step_keys)

        lanes = jax.jit(jax.vmap(play))(keys, limits)
        for i in range(2):
            single = jax.jit(play)(keys[i], jax.tree.map(lambda x, i=i: x[i], limits))
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], lanes), single)
        assert lanes[1][1].sum() == 3 * 3 + 3 * 1

    def test_an_action_that_is_no_number_is_flagged(self, env):
        state, _ = env.reset(jax.random.split(jax.random.key(0), 2), env.default_params)
        keys = jax.random.split(jax.random.key(1), 2)
        for bad in (jnp.nan, jnp.inf):
            action = jnp.zeros((2, 8)).at[1, 3].set(bad)
            _, timestep = jax.jit(env.step)(keys, state, action, env.default_params)
            assert np.isfinite(timestep.reward[0]) and np.isnan(timestep.reward[1])
            assert np.isfinite(timestep.final_obs).all()

    def test_a_diverging_simulation_is_told_once_and_writes_no_file(self, tmp_path, monkeypatch, caplog):
        from pgjax.envs.mujoco import c_engine

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(c_engine, "_told", set())
        env = pgjax.make_env("mujoco/HalfCheetah-v5")
        state, _ = env.reset(jax.random.split(jax.random.key(0), 3), env.default_params)
        numbers = np.array(state.bits).view(np.float64)
        numbers[:, 1 + env.model.nq] = 1e12  # a velocity
        state = state.replace(bits=jnp.asarray(numbers.view(np.uint32)))
        keys = jax.random.split(jax.random.key(1), 3)
        for _ in range(2):
            _, timestep = env.step(keys, state, jnp.zeros((3, 6)), env.default_params)
        assert np.isfinite(timestep.final_obs).all()
        assert os.listdir(tmp_path) == []
        assert [r.message.count("unstable") for r in caplog.records if "MuJoCo" in r.message] == [1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"physics": "d"}, "physics = 'd' is unknown"),
            ({"reset_mode": "pool"}, "reset_mode = 'pool' is not for physics = 'c'"),
            ({"reset_mode": "pol"}, "reset_mode = 'pol' is unknown: did you mean pool"),
            ({"episode_length": 0}, "episode_length = 0 must be a whole number of at least 1"),
            ({"episode_length": 1.5}, "episode_length = 1.5 must be a whole number of at least 1"),
            ({"num_threads": "x"}, "num_threads = 'x' must be a whole number of at least 1"),
            ({"healthy_reward": "x"}, "healthy_reward = 'x' does not fit; it is a number, by default 1.0"),
            ({"healthy_reward": float("nan")}, "healthy_reward = nan does not fit"),
            ({"terminate_when_unhealthy": "no"}, "terminate_when_unhealthy = 'no' does not fit; it is true or false"),
            ({"healthy_z_range": 0.7}, "healthy_z_range = 0.7 is no range; give (low, high), by default (0.7, inf)"),
            ({"num_threads": 2, "physics": "mjx"}, "num_threads = 2 is for physics = 'c' only"),
            ({"helthy_reward": 2.0}, "option 'helthy_reward' is unknown to mujoco/Hopper-v5: did you mean healthy_reward"),
        ],
    )
    def test_wrong_options(self, options, message):
        with pytest.raises(RequestError) as caught:
            pgjax.make_env("mujoco/Hopper-v5", **options)
        assert message in str(caught.value)


class TestTwoHostDevices:
    def test_lanes_are_kept_on_one_and_large_batches_do_not_hang(self, tmp_path):
        """Callbacks on large arrays hang inside a program that is sharded over two host devices."""
        code = """
            import sys, jax, pgjax
            from pgjax.host.lanes import use_host_devices
            use_host_devices(2)
            from pgjax.algorithms import a2c
            from pgjax.host.lanes import choose_devices
            assert len(jax.devices()) == 2
            env = pgjax.make_env("mujoco/Ant-v5", episode_length=3)
            assert len(choose_devices(2, env.host_callback)) == 1
            algorithm = a2c.make(env, a2c.Setup(num_envs=512, num_steps=4, hidden_sizes=(8,)))
            spec = pgjax.RunSpec("a2c", env.name, 4096, seeds=(0, 1), num_evals=1, eval_episodes=4)
            with pgjax.RunStore.create(sys.argv[1], spec.config()) as store:
                assert pgjax.run(spec, store, algorithm=algorithm).status == "finished"
        """
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(pgjax.load(tmp_path / "run").metrics) == 4


class TestMjx:
    """InvertedPendulum compiles in a quarter of a minute; the other tasks, which take up to three, are slow tests."""

    @pytest.mark.parametrize("physics", ["mjx", "warp"])
    def test_one_step_is_that_of_c_mujoco_within_rounding(self, physics):
        if physics == "warp":
            pytest.importorskip("warp")
        errors = fidelity.one_step_errors("InvertedPendulum-v5", 64, physics=physics)
        assert errors["qpos"].max() < 1e-6
        assert errors["qvel"].max() < 1e-4
        assert errors["reward"].max() == 0
        assert not errors["ends"].any()

    @pytest.mark.parametrize("name", ["InvertedPendulum-v5", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_POOLS)])
    def test_the_pool_has_the_distribution_of_exact_starts(self, name):
        """The first pool and the one after ``refresh`` against C MuJoCo's starts, which are drawn for each episode.

        Kolmogorov and Smirnov's test on each entry of state and observation; 0.001 shared by all of them.
        """
        num = 1000
        env, exact = pgjax.make_env(f"mujoco/{name}", physics="mjx"), pgjax.make_env(f"mujoco/{name}")
        state, first = jax.jit(env.reset)(jax.random.split(jax.random.key(0), num), env.default_params)
        renewed = jax.jit(env.refresh)(jax.random.key(1), state, env.default_params)
        jax.tree.map(np.testing.assert_array_equal, renewed.state, state.state)  # running episodes go on
        starts, obs = exact.reset(jax.random.split(jax.random.key(2), 10 * num), exact.default_params)
        starts = np.concatenate([*fidelity.positions(exact, np.asarray(starts.bits)), obs], 1)
        fixed = starts.std(0) < 1e-6
        values = []
        for pooled in (state, renewed):
            pool = np.concatenate([pooled.pool_state.qpos, pooled.pool_state.qvel, pooled.pool_obs], 1)
            np.testing.assert_allclose(pool[:, fixed], np.broadcast_to(starts[0, fixed], pool[:, fixed].shape), atol=1e-6)
            values += [stats.ks_2samp(a, b).pvalue for a, b in zip(pool.T[~fixed], starts.T[~fixed], strict=True)]
        assert min(values) > 1e-3 / len(values)
        # Every start is another one: none of the first pool is left, and neither pool has those of the running episodes.
        assert len(np.unique(np.concatenate([first, state.pool_obs, renewed.pool_obs]), axis=0)) == 3 * num

    @pytest.mark.slow  # Six programs of a quarter of a minute each.
    def test_keeps_the_contract_and_physics_are_parameters(self):
        env = pgjax.make_env("mujoco/InvertedPendulum-v5", physics="mjx", episode_length=10)
        report = pgjax.check_env(env)
        assert report.truncated and report.random_starts
        state, _ = env.reset(jax.random.split(jax.random.key(0), 4), env.default_params)
        keys, action = jax.random.split(jax.random.key(1), 4), jnp.ones((4, 1))
        step = jax.jit(env.step)
        heavier = pgjax.change_params(env, {"model.body_mass": np.asarray(env.default_params.model.body_mass) * 10})
        one, other = (step(keys, state, action, params)[1].final_obs for params in (env.default_params, heavier))
        assert np.abs(one[:, 2:] - other[:, 2:]).min() > 1e-3

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [n for n in VERSION_5 if n != "InvertedPendulum-v5"])
    def test_one_step_of_every_task(self, name):
        """MJX has no PGS, which the humanoids' models ask for; the others are the same physics in float32."""
        errors = fidelity.one_step_errors(name, 64)
        scale = 30 if name.startswith("Humanoid") else 1
        assert np.median(errors["qpos"]) < 1e-5 * scale
        assert np.median(errors["qvel"]) < 1e-3 * scale
        assert np.median(errors["obs"]) < 1e-4 * scale
        assert np.median(errors["reward"]) < 1e-3 * scale
        assert errors["ends"].mean() < 0.02

    @pytest.mark.parametrize("name", [n for n in VERSION_5 if not n.startswith(("Ant", "Humanoid"))])
    def test_warp_traces_every_task_that_it_can_do(self, name):
        pytest.importorskip("warp")
        env = pgjax.make_env(f"mujoco/{name}", physics="warp")
        state, obs = jax.eval_shape(env.reset, jax.random.split(jax.random.key(0), 3), env.default_params)
        action = jax.ShapeDtypeStruct((3, *env.action_space.shape), jnp.float32)
        step = jax.eval_shape(env.step, jax.random.split(jax.random.key(0), 3), state, action, env.default_params)[1]
        assert step.obs.shape == obs.shape

    def test_warp_keeps_the_contacts_of_a_whole_batch(self):
        """Its own default would be enough for a few environments only, and drop the rest of the contacts."""
        pytest.importorskip("warp")
        env = pgjax.make_env("mujoco/HalfCheetah-v5", physics="warp")
        state, _ = env.reset(jax.random.split(jax.random.key(0), 64), env.default_params)
        same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), state.state)
        same = same.replace(qpos=same.qpos.at[:, 1].set(-0.1))  # into the ground
        after = jax.jit(env.step)(
            jax.random.split(jax.random.key(1), 64), state.replace(state=same), jnp.zeros((64, 6)), env.default_params
        )[1].final_obs
        np.testing.assert_allclose(after, np.broadcast_to(after[:1], after.shape), rtol=1e-4, atol=1e-4)

    def test_tasks_that_warp_cannot_do_are_refused(self):
        with pytest.raises(RequestError, match="'warp' computes no contact forces on bodies, which mujoco/Ant-v5 reads"):
            pgjax.make_env("mujoco/Ant-v5", physics="warp")

    def test_warp_that_is_missing_is_named(self, monkeypatch):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "warp" else find_spec(name, *a))
        with pytest.raises(RequestError, match=r"needs the package warp-lang: pip install 'pgjax\[warp\]', or take"):
            pgjax.make_env("mujoco/InvertedPendulum-v5", physics="warp")
