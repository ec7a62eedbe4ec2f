"""The adapters: the contract at the ends of episodes, parity with Gymnasium, names and options, what loading costs."""

import os
import subprocess
import sys
import textwrap

import brax.envs
import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_envs import LIMIT, BraxToy, GymnaxToy

import pgjax.envs
from pgjax.checks.environment import check_env
from pgjax.envs import change_params, from_brax, from_gymnax, list_envs, make_env, register
from pgjax.envs.auto_reset import AutoReset
from pgjax.errors import RequestError
from pgjax.spaces import Box, Discrete
from pgjax.types import Environment

# Compiling is most of this file's time; programs that run for a moment need no optimiser.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MODES = ("exact", "pool")
LIBRARIES = ("gymnax", "brax")


def toy(library, reset_mode, **options):
    if library == "gymnax":
        return from_gymnax(GymnaxToy(), reset_mode=reset_mode)
    return from_brax(BraxToy(**options), episode_length=LIMIT, reset_mode=reset_mode)


def toy_params(env, **changes):
    prefix = "sys." if hasattr(env.default_params, "sys") else ""
    limit = changes.pop("limit", LIMIT)
    limit_name = "max_episode_steps" if prefix else "max_steps_in_episode"
    return change_params(env, {limit_name: limit, **{prefix + k: v for k, v in changes.items()}})


def stack(*trees):
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *trees)


def rollout(env, start_keys, step_keys, actions, params):
    """obs of the starts [B, *O], time steps [T, B, ...], final env_state."""

    def body(env_state, inputs):
        env_state, timestep = env.step(inputs[0], env_state, inputs[1], params)
        return env_state, timestep

    env_state, obs = env.reset(start_keys, params)
    env_state, steps = jax.lax.scan(body, env_state, (step_keys, actions))
    return obs, steps, env_state


def random_actions(env, key, leading):
    space = env.action_space
    if isinstance(space, Discrete):
        return jax.random.randint(key, leading, 0, space.num)
    low, high = space.bounds
    return jax.random.uniform(key, (*leading, *space.shape), minval=low, maxval=high)


def keys(seed, *shape):
    return jax.random.split(jax.random.key(seed), shape)


def no_actions(env, *leading):
    return jnp.zeros((*leading, *env.action_space.shape), env.action_space.dtype)


@pytest.fixture(scope="module", params=[(library, mode) for library in LIBRARIES for mode in MODES])
def boundary(request):
    """Three lanes of the toy, which terminates at 2, 3 and 99 steps, time limit 3: ``env, first_obs, steps, state``."""
    env = toy(*request.param)
    assert isinstance(env, Environment)
    params = stack(*(toy_params(env, ends_at=n) for n in (2, LIMIT, 99)))
    run = jax.jit(jax.vmap(lambda *args: rollout(env, *args)), compiler_options=QUICK)
    out = run(keys(0, 3, 4), keys(1, 3, 7, 4), no_actions(env, 3, 7, 4), params)
    return env, *jax.tree.map(np.asarray, out)


class TestEndsOfEpisodes:
    """Lane 0 terminates before the limit, lane 1 exactly at it, lane 2 never. Steps are counted from 1."""

    def test_flags(self, boundary):
        _, _, steps, _ = boundary
        expected = np.zeros((3, 2, 7), bool)
        expected[0, 0, [1, 3, 5]] = True  # terminates at every second step
        expected[1, 0, [2, 5]] = True  # both at once: termination wins
        expected[2, 1, [2, 5]] = True
        for env in range(4):
            np.testing.assert_array_equal(steps.terminated[..., env], expected[:, 0])
            np.testing.assert_array_equal(steps.truncated[..., env], expected[:, 1])

    def test_final_obs_is_the_true_successor(self, boundary):
        _, first_obs, steps, _ = boundary
        before = np.concatenate([first_obs[:, None], steps.obs[:, :-1]], axis=1)
        np.testing.assert_allclose(steps.final_obs, before + 1.0, rtol=1e-6)
        np.testing.assert_allclose(steps.reward, steps.final_obs[..., 0], rtol=1e-6)
        np.testing.assert_allclose(steps.metrics["height"], steps.final_obs[..., 0], rtol=1e-6)

    def test_obs_is_final_obs_while_the_episode_goes_on_and_a_start_after_it(self, boundary):
        _, _, steps, _ = boundary
        ended = steps.terminated | steps.truncated
        np.testing.assert_array_equal(steps.obs[~ended], steps.final_obs[~ended])
        assert (steps.obs[ended][:, 1] == 0).all() and (steps.final_obs[ended][:, 1] >= 2).all()
        assert ((0 <= steps.obs[ended][:, 0]) & (steps.obs[ended][:, 0] < 1)).all()

    def test_every_start_is_fresh(self, boundary):
        env, first_obs, steps, state = boundary
        for lane in range(3):
            ended = steps.terminated[lane] | steps.truncated[lane]
            starts = np.concatenate([first_obs[lane, :, 0], steps.obs[lane][ended][:, 0]])
            if env.reset_mode == "exact":
                assert len(set(starts.tolist())) == len(starts)
            else:
                assert len(set(starts.tolist())) > len(starts) // 2
                assert np.isin(steps.obs[lane][ended][:, 0], state.pool_obs[lane, :, 0]).all()

    def test_dtypes(self, boundary):
        _, first_obs, steps, _ = boundary
        assert first_obs.dtype == steps.obs.dtype == steps.final_obs.dtype == steps.reward.dtype == np.float32
        assert steps.terminated.dtype == steps.truncated.dtype == bool
        assert set(steps.metrics) == {"height"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_limit_and_constants_are_traced_and_swept_over_lanes_without_recompiling(library):
    env = toy(library, "exact")
    traces = []

    def run(params):
        traces.append(1)
        first_obs, steps, _ = rollout(env, keys(0, 2), keys(1, 6, 2), no_actions(env, 6, 2), params)
        return steps.truncated[:, 0], steps.final_obs[0, 0, 0] - first_obs[0, 0]

    lanes = jax.jit(jax.vmap(run), compiler_options=QUICK)
    for limits, strides in (((1, 2, 3), (1.0, 2.0, 3.0)), ((3, 3, 2), (0.5, 0.0, -1.0))):
        params = stack(*(toy_params(env, limit=n, stride=x) for n, x in zip(limits, strides, strict=True)))
        truncated, moved = lanes(params)
        for lane, limit in enumerate(limits):
            np.testing.assert_array_equal(truncated[lane], [(t + 1) % limit == 0 for t in range(6)])
        np.testing.assert_allclose(moved, strides, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("library", LIBRARIES)
def test_both_modes_begin_alike_and_each_start_depends_on_its_own_key(library):
    start_keys, other_keys = keys(0, 3), keys(9, 3)
    obs = {mode: toy(library, mode).reset(start_keys, toy(library, mode).default_params)[1] for mode in MODES}
    np.testing.assert_array_equal(obs["exact"], obs["pool"])
    env = toy(library, "pool")
    mixed = env.reset(jnp.concatenate([other_keys[:1], start_keys[1:]]), env.default_params)[1]
    np.testing.assert_array_equal(mixed[1:], obs["pool"][1:])
    assert mixed[0, 0] != obs["pool"][0, 0]


class TestPool:
    @pytest.mark.parametrize(("num_envs", "size"), [(1, 64), (64, 64), (100, 100)])
    def test_size(self, num_envs, size):
        env = toy("gymnax", "pool")
        state, _ = env.reset(keys(0, num_envs), env.default_params)
        assert state.pool_obs.shape == (size, 2)
        assert len(np.unique(state.pool_obs[:, 0])) == size

    def test_starts_are_drawn_uniformly(self):
        env = toy("gymnax", "pool")
        params = toy_params(env, limit=1)  # every step ends an episode
        run = jax.jit(lambda *args: rollout(env, *args))
        _, steps, state = run(keys(0, 64), keys(1, 200, 64), no_actions(env, 200, 64), params)
        index = jnp.argmin(jnp.abs(steps.obs[..., :1] - state.pool_obs[:, 0]), axis=-1)
        counts = np.bincount(np.asarray(index).ravel(), minlength=64)
        # Chi-square with 63 degrees of freedom: mean 63, standard deviation 11.2; 130 is beyond six of them.
        assert ((counts - 200) ** 2 / 200).sum() < 130

    def test_refresh_renews_the_whole_pool_and_leaves_the_episodes_alone(self):
        env = toy("brax", "pool")
        state, _ = env.reset(keys(0, 5), env.default_params)
        fresh = jax.jit(env.refresh)(jax.random.key(3), state, env.default_params)
        assert not np.isin(fresh.pool_obs[:, 0], state.pool_obs[:, 0]).any()
        np.testing.assert_array_equal(fresh.pool_obs, fresh.pool_state.brax.obs)
        jax.tree.map(np.testing.assert_array_equal, fresh.state, state.state)
        assert jax.tree.structure(fresh) == jax.tree.structure(state)

    def test_refresh_is_the_identity_in_exact_mode(self):
        env = toy("gymnax", "exact")
        state, _ = env.reset(keys(0, 2), env.default_params)
        assert env.refresh(jax.random.key(3), state, env.default_params) is state


class Noisy(GymnaxToy):
    def step_env(self, key, state, action, params):
        state = state.replace(x=state.x + jax.random.normal(key))
        return super().step_env(key, state, action, params)


@pytest.mark.parametrize("case", ["gymnax exact", "gymnax pool", "brax exact", "large starts", "random steps"])
def test_presampled_steps_equal_steps(case):
    if case == "random steps":
        env = from_gymnax(Noisy())
    else:
        library, mode = ("brax", "exact") if case == "large starts" else case.split()
        env = toy(library, mode, **({"ballast": 500} if case == "large starts" else {}))
    params, actions = env.default_params, random_actions(env, jax.random.key(2), (12, 3))
    step_keys = keys(1, 12, 3)

    @jax.jit(compiler_options=QUICK)
    def presampled():
        state, _ = env.reset(keys(0, 3), params)
        drawn = env.presample(step_keys, params)
        run = jax.lax.scan(lambda s, x: env.step_presampled(x[0], s, x[1], params), state, (drawn, actions))[1]
        return run, drawn

    steps, drawn = presampled()
    # A rollout of physics states would not fit in memory, so those are drawn step by step.
    assert (case == "large starts") == jnp.issubdtype(jax.tree.leaves(drawn)[-1].dtype, jax.dtypes.prng_key)
    one_by_one = jax.jit(lambda: rollout(env, keys(0, 3), step_keys, actions, params)[1], compiler_options=QUICK)()
    jax.tree.map(np.testing.assert_array_equal, steps, one_by_one)
    if case == "random steps":
        assert len(np.unique(steps.final_obs[..., 0])) == steps.reward.size


@pytest.mark.parametrize("mode", MODES)
def test_no_key_is_used_twice(mode):
    env = from_gymnax(Noisy(), reset_mode=mode)
    with jax.debug_key_reuse(True):
        state, _ = jax.jit(env.reset)(keys(0, 2), env.default_params)
        state, _ = jax.jit(env.step)(keys(1, 2), state, no_actions(env, 2), env.default_params)
        jax.jit(env.refresh)(jax.random.key(2), state, env.default_params)


def test_check_env_passes():
    report = check_env(toy("brax", "pool"), num_steps=40)
    assert report.unseen == ("termination",) and report.random_starts and report.truncated == 2 * 3 * (40 // LIMIT)


class TestBraxAdapter:
    def test_the_env_is_never_changed(self):
        raw = BraxToy()
        before = raw.sys
        env = from_brax(raw, LIMIT)
        jax.jit(lambda *args: rollout(env, *args))(keys(0, 2), keys(1, 4, 2), no_actions(env, 4, 2), toy_params(env, ends_at=2))
        assert raw.sys is before and not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(vars(raw)))

    def test_params_reach_a_wrapped_env(self):
        env = from_brax(brax.envs.Wrapper(BraxToy()), LIMIT)
        steps = rollout(env, keys(0, 2), keys(1, 4, 2), no_actions(env, 4, 2), toy_params(env, ends_at=2))[1]
        np.testing.assert_array_equal(steps.terminated[:, 0], [False, True, False, True])

    def test_physics(self):
        """A real task: swept gravity, and the same numbers as Brax's own step."""
        env = make_env("brax/inverted_pendulum", episode_length=20)
        raw = brax.envs.get_environment("inverted_pendulum", backend="spring")
        params = stack(env.default_params, change_params(env, {"sys.gravity": [0.0, 0.0, -3.0]}))
        actions = random_actions(env, jax.random.key(2), (25, 2))

        def run(params):
            def step(state, inputs):
                return env.step(inputs[0], state, inputs[1], params)

            state, _ = env.reset(keys(0, 2), params)
            return state.state.brax, jax.lax.scan(step, state, (keys(1, 25, 2), actions))[1]

        @jax.jit(compiler_options=QUICK)
        def bare(state):
            def step(state, action):
                state = jax.vmap(raw.step)(state, action)
                return state, (state.obs, state.reward, state.done)

            return jax.lax.scan(step, state, actions)[1]

        first, steps = jax.jit(jax.vmap(run), compiler_options=QUICK)(params)
        obs, reward, done = bare(jax.tree.map(lambda x: x[0], first))
        for i in range(2):
            end = min(int(np.argmax(np.append(done[:, i], 1))), 19)
            np.testing.assert_allclose(steps.final_obs[0, : end + 1, i], obs[: end + 1, i], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(steps.reward[0, : end + 1, i], reward[: end + 1, i], atol=1e-5)
            assert steps.terminated[0, end, i] == done[end, i]
            ended = (steps.terminated | steps.truncated)[0, : end + 1, i]
            np.testing.assert_array_equal(ended, np.arange(end + 1) == end)
        assert np.abs(steps.final_obs[0] - steps.final_obs[1]).max() > 1e-3
        assert env.observation_space == Box((4,)) and env.action_space == Box((1,), -1.0, 1.0)


def classic(name):
    """Our environment, Gymnasium's, and how to put our state into Gymnasium's."""
    fields = {
        "CartPole-v1": ("x", "x_dot", "theta", "theta_dot"),
        "Acrobot-v1": ("joint_angle1", "joint_angle2", "velocity_1", "velocity_2"),
        "MountainCar-v0": ("position", "velocity"),
        "MountainCarContinuous-v0": ("position", "velocity"),
        "Pendulum-v1": ("theta", "theta_dot"),
    }[name]
    state_of = lambda state: np.array([np.float64(getattr(state, field)[0]) for field in fields])  # noqa: E731
    return make_env(f"gymnax/{name}"), gymnasium.make(name), state_of


# Policies that end episodes; where none does, any will do.
POLICIES = {
    "CartPole-v1": lambda obs, noise: int(noise > 0.5),
    "Acrobot-v1": lambda obs, noise: 2 if obs[4] < 0 else 0,
    "MountainCar-v0": lambda obs, noise: 2 if obs[1] > 0 else 0,
    "MountainCarContinuous-v0": lambda obs, noise: np.array([np.sign(obs[1]) * 1.0 + (noise - 0.5)], np.float32),
    "Pendulum-v1": lambda obs, noise: np.array([6 * noise - 3], np.float32),
}


@pytest.mark.parametrize("name", POLICIES)
def test_parity_with_gymnasium(name):
    """Each step from the same state gives the same observation, reward and end, for hundreds of steps.

    The state is handed over before each step, because the two compute in float32 and float64 and chaos does the rest.
    """
    env, other, state_of = classic(name)
    noise = np.random.default_rng(0).random(400)
    step = jax.jit(lambda key, state, action: env.step(key, state, action, env.default_params))
    state, obs = env.reset(keys(0, 1), env.default_params)
    other.reset(seed=0)
    terminations, length = 0, 0
    for t in range(400):
        before = state_of(state)
        action = POLICIES[name](np.asarray(obs[0]), noise[t])
        other.unwrapped.state = before
        other_obs, other_reward, other_terminated, _, _ = other.unwrapped.step(action)
        state, timestep = step(keys(t, 1), state, jnp.asarray(action)[None])
        length += 1
        if name == "MountainCarContinuous-v0" and timestep.final_obs[0, 0] <= -1.2:
            # Gymnasium stops the car at the left wall, gymnax lets it keep its speed there.
            assert other_obs[1] == 0
        else:
            np.testing.assert_allclose(timestep.final_obs[0], other_obs, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(timestep.reward[0], other_reward, rtol=2e-5, atol=2e-5)
        assert bool(timestep.terminated[0]) == other_terminated
        assert bool(timestep.truncated[0]) == (length == other.spec.max_episode_steps and not other_terminated)
        if timestep.terminated[0] or timestep.truncated[0]:
            terminations += int(timestep.terminated[0])
            length = 0
            other.reset(seed=t)
        obs = timestep.obs
    assert env.max_episode_steps == other.spec.max_episode_steps
    assert terminations >= 1 or name == "Pendulum-v1"
    assert env.action_space.shape == other.action_space.shape
    if isinstance(env.action_space, Box):
        np.testing.assert_array_equal(env.action_space.bounds, (other.action_space.low, other.action_space.high))
    else:
        assert env.action_space.num == other.action_space.n
    theirs = np.stack([other.observation_space.low, other.observation_space.high])
    theirs[np.abs(theirs) > 1e30] *= np.inf  # Gymnasium, too, may write the largest float for no bound
    np.testing.assert_allclose(np.stack(env.observation_space.bounds), theirs, rtol=1e-6)


@pytest.mark.parametrize("game", ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"])
def test_minatar(game):
    env = make_env(f"gymnax/{game}-MinAtar")
    run = jax.jit(lambda *args: rollout(env, *args), compiler_options=QUICK)
    actions = random_actions(env, jax.random.key(2), (300, 2))
    obs, steps, _ = run(keys(0, 2), keys(1, 300, 2), actions, env.default_params)
    assert obs.dtype == jnp.float32 and obs.shape == (2, 10, 10, env.observation_space.shape[-1])
    assert set(np.unique(steps.obs)) == {0.0, 1.0}
    assert np.asarray(steps.terminated).any() or game == "Freeway"
    assert np.asarray(steps.reward).any() or game == "Freeway"


def test_observations_become_one_float_array():
    class Dictionary(GymnaxToy):
        def observation_space(self, params):
            space = gymnax.environments.spaces
            return space.Dict({"z": space.Box(-1, 100, (2,)), "cell": space.Discrete(4)})

        def get_obs(self, state, params=None, key=None):
            return {"z": super().get_obs(state), "cell": jnp.int32(state.time) % 4}

    env = from_gymnax(Dictionary())
    obs, steps, _ = rollout(env, keys(0, 2), keys(1, 2, 2), no_actions(env, 2, 2), env.default_params)
    assert env.observation_space == Box((6,), (-1.0, -1.0, 0.0, 0.0, 0.0, 0.0), (100.0, 100.0, 1.0, 1.0, 1.0, 1.0))
    np.testing.assert_array_equal(obs[:, 1:], [[0, 1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(steps.obs[1, :, 1:], [[2, 0, 0, 1, 0]] * 2)

    env = make_env("gymnax/FrozenLake-misc")
    assert env.observation_space == Box((16,), 0.0, 1.0)
    np.testing.assert_array_equal(env.reset(keys(0, 2), env.default_params)[1], np.eye(16)[[0, 0]])


class TestNames:
    def test_the_tables_are_those_of_the_libraries(self):
        for library, names in (("gymnax", gymnax.registered_envs), ("brax", brax.envs._envs)):
            assert {e.name for e in list_envs() if e.library == library} == {f"{library}/{n}" for n in names}

    def test_what_is_listed_as_broken_is_broken(self):
        entries = {e.name: e for e in list_envs()}
        broken = {(e.name, option) for e in entries.values() for option in e.broken}
        contact_forces = ("Ant-v5", "Humanoid-v5", "HumanoidStandup-v5", "Humanoid-v4", "HumanoidStandup-v4")
        broken -= {(f"mujoco/{task}", "warp") for task in contact_forces}
        assert broken == {("gymnax/MNISTBandit-bsuite", ""), ("mujoco/Pusher-v4", "")} | {
            ("brax/swimmer", b) for b in ("spring", "positional", "mjx")
        }
        for backend in entries["brax/swimmer"].broken:
            with pytest.raises(ValueError, match="Unsupported backend"):
                brax.envs.get_environment("swimmer", backend=backend)
        assert entries["brax/swimmer"].backends == ("generalized",)
        assert entries["brax/hopper"].backends[0] == "spring"

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("gymnax/CartPol-v1", {}, "did you mean CartPole-v1"),
            ("CartPole-v1", {}, "did you mean gymnax/CartPole-v1"),
            ("brax/hoper", {}, "did you mean hopper"),
            ("foo/bar", {}, "known libraries are brax, grid, gymnax"),
            ("gymnax/CartPole-v1", {"reset_mod": "pool"}, "'reset_mod' is unknown .* did you mean reset_mode"),
            ("gymnax/CartPole-v1", {"reset_mode": "pol"}, "reset_mode = 'pol' .* did you mean pool"),
            ("gymnax/CartPole-v1", {"episode_length": 0}, "episode_length = 0"),
            ("gymnax/CartPole-v1", {"backend": "spring"}, "'backend' is unknown to gymnax/CartPole-v1"),
            ("gymnax/MNISTBandit-bsuite", {}, "does not work: it downloads MNIST"),
            ("brax/hopper", {"backend": "sprin"}, "did you mean spring"),
            ("brax/swimmer", {"backend": "mjx"}, "backend = 'mjx' does not work for brax/swimmer"),
            ("brax/hopper", {"helthy_reward": 1.0}, "did you mean healthy_reward"),
            ("brax/hopper", {"episode_length": 0}, "episode_length = 0"),
        ],
    )
    def test_wrong_requests_get_one_line(self, name, options, message):
        with pytest.raises(RequestError, match=message) as caught:
            make_env(name, **options)
        assert "\n" not in str(caught.value)

    def test_a_missing_library_names_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gymnax", None)
        monkeypatch.delitem(sys.modules, "pgjax.envs.gymnax")
        with pytest.raises(RequestError, match="pip install 'gymnax"):
            make_env("gymnax/CartPole-v1")

    def test_options_reach_the_environment(self):
        env = make_env("gymnax/Catch-bsuite", rows=6, reset_mode="pool", episode_length=4)
        assert env.observation_space.shape == (6, 5) and env.reset_mode == "pool" and env.max_episode_steps == 4

    def test_register(self, monkeypatch):
        monkeypatch.setattr(pgjax.envs, "_registered", {})
        register("mine/Toy", lambda reset_mode="exact": toy("gymnax", reset_mode))
        assert make_env("mine/Toy", reset_mode="pool").reset_mode == "pool"
        assert "mine/Toy" in [e.name for e in list_envs()]
        with pytest.raises(RequestError, match="did you mean reset_mode"):
            make_env("mine/Toy", reset_mod="pool")
        for name, message in (("mine/Toy", "taken"), ("gymnax/CartPole-v1", "taken"), ("Toy", "must look like")):
            with pytest.raises(RequestError, match=message):
                register(name, toy)

    def test_names_registered_with_the_library_itself(self, monkeypatch):
        monkeypatch.setitem(gymnax.registration._registry, "Toy-v0", GymnaxToy)
        monkeypatch.setattr(gymnax.registration, "registered_envs", [*gymnax.registered_envs, "Toy-v0"])
        monkeypatch.setattr(gymnax, "registered_envs", gymnax.registration.registered_envs)
        assert make_env("gymnax/Toy-v0").name == "gymnax/Toy-v0"


class TestParams:
    def test_values_take_the_type_of_what_they_replace(self):
        env = make_env("gymnax/CartPole-v1")
        params = change_params(env, {"gravity": 3, "max_steps_in_episode": 20.0})
        assert (params.gravity, params.max_steps_in_episode) == (3.0, 20)
        types = [jax.tree.map(lambda x: jnp.asarray(x).dtype, p) for p in (params, env.default_params)]
        assert types[0] == types[1]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"gravit": 1}, "did you mean gravity"),
            ({"gravity": "x"}, "gravity = 'x' does not fit a float32 number"),
            ({"gravity": [1, 2]}, "does not fit"),
            ({"gravity.z": 1}, "no fields here"),
            ({"max_steps_in_episode": 501}, "episode_length = 501"),
            ({"max_steps_in_episode": 3.5}, "does not fit a int32"),
        ],
    )
    def test_wrong_changes(self, changes, message):
        with pytest.raises(RequestError, match=message):
            change_params(make_env("gymnax/CartPole-v1"), changes)


def corridor(length=5, reset_mode="exact"):
    """The example of the README: walk right along a corridor, one point at the end of it."""

    def observe(position):
        return jax.nn.one_hot(position, length)

    def start(key, params):
        position = jax.random.randint(key, (), 0, 2)
        return (position, 0), observe(position)

    def advance(key, state, action, params):
        position, steps = jnp.clip(state[0] + 2 * action - 1, 0, length - 1), state[1] + 1
        goal = position == length - 1
        return (position, steps), observe(position), goal * params["prize"], goal, steps >= 50, {}

    return AutoReset(
        name="mine/Corridor", start=start, advance=advance, observation_space=Box((length,), 0.0, 1.0),
        action_space=Discrete(2), max_episode_steps=50, default_params={"prize": jnp.float32(1)}, reset_mode=reset_mode,
    )  # fmt: skip


def test_the_example_of_the_readme(monkeypatch):
    monkeypatch.setattr(pgjax.envs, "_registered", {})
    register("mine/Corridor", corridor)
    env = make_env("mine/Corridor", length=4)
    report = check_env(env)
    assert report.terminated > 10 and report.random_starts


class TestWrongToysAreTold:
    """Mistakes in an environment that is handed to ``AutoReset``."""

    def make(self, start=None, advance=None):
        return AutoReset(
            name="mine/Wrong", start=start or (lambda key, params: (jnp.float32(0), jnp.zeros(1))),
            advance=advance or (lambda key, s, a, params: (s, jnp.zeros(1), 0.0, False, False, {})),
            observation_space=Box((1,)), action_space=Discrete(2), max_episode_steps=3,
        )  # fmt: skip

    def test_shape_of_the_observation(self):
        with pytest.raises(ValueError, match=r"shape \(2,\), its observation_space says \(1,\)"):
            self.make(start=lambda key, params: (jnp.float32(0), jnp.zeros(2)))

    @pytest.mark.parametrize(
        ("start", "state", "message"),
        [
            (jnp.int32(0), jnp.float32(0.5), r"int32\[\] at the start of an episode and float32\[\] after a step"),
            (jnp.zeros(2), jnp.zeros(3), r"float32\[2\] at the start"),
            (jnp.zeros(2), (jnp.zeros(2),), "changes its structure"),
        ],
    )
    def test_state_that_changes_its_type(self, start, state, message):
        obs = jnp.zeros(1)
        env = self.make(lambda key, params: (start, obs), lambda *args: (state, obs, 0.0, False, False, {}))
        env_state, _ = env.reset(keys(0, 2), None)
        with pytest.raises(TypeError, match=message):
            env.step(keys(1, 2), env_state, jnp.zeros(2, jnp.int32), None)


def in_new_process(*pieces):
    done = subprocess.run(
        [sys.executable, "-c", "".join(map(textwrap.dedent, pieces))],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "MPLBACKEND": "Agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


PLOT = textwrap.dedent(
    """
    from matplotlib.figure import Figure
    import matplotlib.pyplot as plt, matplotlib.colors, seaborn, pandas
    assert plt.Figure is Figure and matplotlib.pyplot is plt and matplotlib.figure.Figure is Figure
    figure, axes = plt.subplots()
    axes.plot([1, 2], [3, 4], color=seaborn.color_palette()[0])
    figure.canvas.draw()
    # gymnax's own renderers, which were given stand-ins
    import gymnax.environments.bsuite.catch as catch, gymnax.environments.misc.pong as pong, jax
    raw = catch.Catch()
    state = raw.reset_env(jax.random.key(0), raw.default_params)[1]
    assert isinstance(raw.render(state, None)[0], Figure)
    assert pong.sns.color_palette is seaborn.color_palette
    assert pong.colors.ListedColormap is matplotlib.colors.ListedColormap
    assert len(pandas.DataFrame({"a": [1]})) == 1
    """
)


def test_plotting_works_after_gymnax_was_imported_without_it():
    in_new_process(
        """
        import sys
        import pgjax.envs
        pgjax.envs.list_envs()
        assert not {"jax", "gymnax", "brax"} & set(sys.modules)
        pgjax.envs.make_env("gymnax/CartPole-v1")
        assert not {"matplotlib", "seaborn", "pandas", "brax"} & set(sys.modules)
        """,
        PLOT,
    )


def test_plotting_works_when_it_was_imported_before_and_brax_is_silent():
    out = in_new_process(
        """
        import sys
        import matplotlib, matplotlib.pyplot
        import pgjax.envs
        pgjax.envs.make_env("gymnax/CartPole-v1")
        before = matplotlib.pyplot
        pgjax.envs.make_env("brax/halfcheetah")
        assert "trimesh" not in sys.modules and sys.modules["matplotlib.pyplot"] is before
        from scipy import spatial
        import trimesh, mujoco.mjx._src.mesh as mesh
        assert mesh.spatial.ConvexHull is spatial.ConvexHull and mesh.trimesh.Trimesh is trimesh.Trimesh
        """,
        PLOT,
    )
    assert out == "" and not os.path.exists("MUJOCO_LOG.TXT")


@pytest.mark.slow
@pytest.mark.parametrize("name", [e.name for e in list_envs() if e.library == "gymnax" and "" not in e.broken])
@pytest.mark.parametrize("mode", MODES)
def test_every_gymnax_environment_keeps_the_contract(name, mode):
    check_env(make_env(name, reset_mode=mode))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [(e.name, b) for e in list_envs() if e.library == "brax" for b in e.backends])
def test_every_brax_task_runs_on_every_backend_listed(name, backend):
    env = make_env(name, backend=backend)

    @jax.jit(compiler_options=QUICK)
    def run(params):
        return rollout(env, keys(0, 2), keys(1, 2, 2), random_actions(env, jax.random.key(2), (2, 2)), params)[1]

    steps = run(env.default_params)
    assert np.isfinite(steps.final_obs).all() and np.isfinite(steps.reward).all()
    assert np.abs(steps.final_obs[1] - steps.final_obs[0]).max() > 0
