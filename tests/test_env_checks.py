"""``check_env`` passes sound environments and names the clause that a wrong one breaks."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from probe_envs import PROBES, Probe

from pgjax.checks.environment import check_env
from pgjax.spaces import Box, Discrete
from pgjax.types import Environment, TimeStep

LIMIT = 4


@dataclasses.dataclass(frozen=True)
class Walk:
    """A sound environment: random start x, x grows by ``params["stride"]`` a step, time limit 4, ends above 4.9.

    The state is (x [B], steps [B]), the observation (x, steps), the reward x. ``fault`` names what goes wrong.
    """

    fault: str = ""
    name = "test/Walk"
    observation_space = Box((2,))
    action_space = Discrete(2)
    host_callback = False

    @property
    def max_episode_steps(self):
        return LIMIT - 1 if self.fault == "too long" else LIMIT

    @property
    def default_params(self):
        return {"stride": 1.0 if self.fault == "python params" else jnp.float32(1.0)}

    def reset(self, key, params):
        x = jax.vmap(jax.random.uniform)(key)
        if self.fault == "start depends on the others":
            x = x + x.sum()
        if self.fault == "start is not random":
            x = jnp.zeros_like(x)
        state = (x, jnp.zeros(key.shape, jnp.int32))
        return state, self._obs(state)

    def _obs(self, state):
        obs = jnp.stack([state[0], state[1].astype(jnp.float32)], axis=-1)
        return obs[:, :1] if self.fault == "shape of obs" else obs

    def step(self, key, env_state, action, params):
        if self.fault == "does not trace" and params["stride"] > 2:
            raise AssertionError
        x, steps = env_state[0] + params["stride"], env_state[1] + 1
        limit = LIMIT - 1 if self.fault == "too early" else LIMIT
        terminated, truncated = x > 4.9, steps >= limit
        if self.fault != "both flags":
            truncated &= ~terminated
        if self.fault == "no limit":
            truncated &= False
        final_obs = self._obs((x, steps))
        ended = terminated | truncated
        (fresh_x, fresh_steps), _ = self.reset(key, params)
        if self.fault == "cached start":
            # x of the first start is what is left of it, since every step adds the stride.
            fresh_x = x - steps * params["stride"]
        if self.fault == "obs is not reset":
            state = (jnp.where(ended, fresh_x, x), jnp.where(ended, 0, steps))
            obs = final_obs
        elif self.fault == "state is not reset":
            state = (x, jnp.where(ended, 0, steps))
            obs = jnp.where(ended[:, None], self._obs((fresh_x, fresh_steps)), final_obs)
        else:
            state = (jnp.where(ended, fresh_x, x), jnp.where(ended, 0, steps))
            obs = self._obs(state)
        if self.fault == "final_obs is obs of the start":
            final_obs = jnp.where(ended[:, None], final_obs, self._obs((fresh_x, fresh_steps)))
        if self.fault == "dtype of the state":
            state = (state[0], state[1].astype(jnp.float32))
        reward = jnp.where(steps == 3, jnp.nan, x) if self.fault == "not finite" else x
        terminated = terminated.astype(jnp.float32) if self.fault == "dtype of a flag" else terminated
        return state, TimeStep(obs, reward, terminated, truncated, final_obs, {})

    def refresh(self, key, env_state, params):
        return (env_state[0] * 0, env_state[1]) if self.fault == "refresh restarts" else env_state


def test_a_sound_environment_passes():
    assert isinstance(Walk(), Environment)
    report = check_env(Walk(), num_steps=30)
    assert report.random_starts and report.truncated > 20 and report.env_steps == 2 * 30 * 3
    # x is below 1 + 4 after four steps and above 4.9 for one start in ten.
    assert report.terminated > 0 and report.unseen == ()


@pytest.mark.parametrize(
    ("fault", "clause"),
    [
        ("python params", r"params are a pytree of arrays: default_params\['stride'\] is a float"),
        ("too long", "no episode is longer than the time limit: one has 4 steps, the limit is 3"),
        ("start depends on the others", "depends on key"),
        ("shape of obs", r"obs \[B, \*O\] float32: obs is float32\[3, 1\], not float32\[3, 2\]"),
        ("does not trace", "step works under jit: TracerBoolConversionError"),
        ("too early", "truncation comes exactly at the time limit: an episode was truncated after"),
        ("both flags", "never both true"),
        ("no limit", "no episode is longer than the time limit: one has 5 steps"),
        ("cached start", "every episode has a start of its own"),
        ("obs is not reset", "after the end of an episode obs is a fresh start"),
        ("state is not reset", "after the end of an episode the state is that of the fresh start"),
        ("final_obs is obs of the start", "final_obs equals obs while the episode goes on"),
        ("dtype of the state", r"env_state keeps its structure, shapes and dtypes in a step: env_state\[1\] was int32"),
        ("not finite", "observations and rewards are finite: reward is not at step 3"),
        ("dtype of a flag", r"shapes and dtypes: terminated is float32\[3\], not bool\[3\]"),
        ("refresh restarts", "refresh leaves running episodes alone"),
    ],
)
def test_a_wrong_environment_is_told_which_clause_it_breaks(fault, clause):
    with pytest.raises(AssertionError, match=clause) as caught:
        check_env(Walk(fault), num_steps=30)
    assert str(caught.value).startswith("test/Walk: broken clause: ") and "\n" not in str(caught.value)


class Stateful(Walk):
    """Remembers something on the host."""

    count = 0

    def step(self, key, env_state, action, params):
        def tick(reward):
            Stateful.count += 1
            return reward + Stateful.count

        state, timestep = super().step(key, env_state, action, params)
        shape = jax.ShapeDtypeStruct(timestep.reward.shape, jnp.float32)
        return state, timestep._replace(reward=jax.pure_callback(tick, shape, timestep.reward))


class Concrete(Walk):
    """Takes a parameter for a compile-time constant."""

    def step(self, key, env_state, action, params):
        return super().step(key, env_state, action, {"stride": float(params["stride"])})


class WeakParams(Walk):
    """A parameter with the type of a Python number, which an array in its place does not have."""

    default_params = {"stride": jnp.asarray(1.0)}  # noqa: RUF012


class OneLane(Walk):
    """Leaves the device without saying how that is vectorised."""

    def step(self, key, env_state, action, params):
        state, timestep = super().step(key, env_state, action, params)
        shape = jax.ShapeDtypeStruct(timestep.reward.shape, jnp.float32)
        return state, timestep._replace(reward=jax.pure_callback(lambda x: x, shape, timestep.reward))


@jax.custom_batching.custom_vmap
def one_more_if_batched(x):
    return x


@one_more_if_batched.def_vmap
def _(axis_size, in_batched, x):
    return x + 1, True


class OtherLane(Walk):
    """Computes something else under vmap."""

    def step(self, key, env_state, action, params):
        state, timestep = super().step(key, env_state, action, params)
        return state, timestep._replace(reward=one_more_if_batched(timestep.reward))


class LimitAboveBound(Walk):
    default_params = {"stride": jnp.float32(1.0), "max_episode_steps": jnp.int32(LIMIT + 1)}  # noqa: RUF012


class RefreshChangesType(Walk):
    def refresh(self, key, env_state, params):
        return env_state[0].astype(jnp.bfloat16), env_state[1]


@pytest.mark.parametrize(
    ("env", "clause"),
    [
        (Stateful(), "the same key, state and action give the same step"),
        (Concrete(), "step works under jit: ConcretizationTypeError"),
        (WeakParams(), "new params do not recompile"),
        (OneLane(), "work under jit, vmap over lanes with their own params, and scan: "),
        (OtherLane(), "a lane under vmap equals its single run: reward differs at step 1"),
        (LimitAboveBound(), "time limit in force is between 1 and max_episode_steps: limit 5, max_episode_steps 4"),
        (RefreshChangesType(), r"refresh keeps .*: env_state\[0\] was float32\[3\] and is bfloat16\[3\]"),
        (object(), "has every member of the contract: missing: name, "),
    ],
)
def test_what_is_no_pure_traceable_function(env, clause):
    with pytest.raises(AssertionError, match=clause):
        check_env(env, num_steps=6)


def test_deterministic_starts_are_compared_with_the_start_itself():
    report = check_env(Walk("start is not random"), num_steps=12)
    assert not report.random_starts and report.unseen == ("termination",)
    assert check_env(Walk(), num_steps=2).unseen == ("fresh starts", "termination", "truncation at the time limit")


def test_fewer_than_two_environments_cannot_be_told_apart():
    with pytest.raises(ValueError, match="num_envs = 1"):
        check_env(Walk(), num_envs=1)


@pytest.mark.parametrize("probe", [p for p in PROBES if p.continuous], ids=lambda p: p.kind)
def test_the_probes_keep_the_contract(probe):
    assert check_env(probe, num_steps=30).env_steps == 2 * 30 * 3


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_values_of_the_probes_are_those_of_their_optimal_actions(probe: Probe):
    """Follows the optimal action from many starts and adds up discounted rewards, and the value where it is cut."""
    gamma = 0.9
    key = jax.random.split(jax.random.key(0), 16)
    state, first_obs = probe.reset(key, None)
    obs, total, discount, running = first_obs, 0.0, 1.0, jnp.ones(16)
    for _ in range(probe.max_episode_steps):
        state, timestep = probe.step(key, state, probe.optimal_action(obs), None)
        total += running * discount * timestep.reward
        discount *= gamma
        total += running * timestep.truncated * discount * probe.value(timestep.final_obs, gamma)
        running *= ~(timestep.terminated | timestep.truncated)
        obs = timestep.obs
    assert not running.any()
    assert jnp.allclose(total, probe.value(first_obs, gamma), atol=1e-5)
    if probe.kind in ("acting", "responding"):
        state, obs = probe.reset(key, None)
        worse = -probe.optimal_action(obs) if probe.continuous else 1 - probe.optimal_action(obs)
        assert (probe.step(key, state, worse, None)[1].reward < probe.value(obs, gamma)).all()
