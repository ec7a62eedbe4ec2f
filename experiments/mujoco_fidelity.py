"""How near the MuJoCo tasks are to Gymnasium's: C MuJoCo step by step, MJX one step at a time, policies by their return.

    python -m pgjax.experiments.mujoco_fidelity gymnasium --steps 1000
    python -m pgjax.experiments.mujoco_fidelity mjx --states 256
    python -m pgjax.experiments.mujoco_fidelity policy RUN --episodes 50

Each prints the table that docs/mujoco.md shows.
"""

import argparse
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco as _mujoco
import numpy as np

from pgjax.envs import MUJOCO_PHYSICS, make_env
from pgjax.envs.mjx_tools import quiet_loading
from pgjax.envs.mujoco.tasks import TASKS
from pgjax.errors import RequestError
from pgjax.experiments.evaluate_run import evaluate_run, lanes_of
from pgjax.host.lanes import use_compilation_cache
from pgjax.host.runner import RunSpec
from pgjax.host.store import read_run

mujoco: Any = _mujoco  # a compiled module without type information


class Fidelity(NamedTuple):
    """Largest differences between C MuJoCo here and Gymnasium over ``steps`` steps and ``episodes`` ends of episodes.

    qpos, qvel: of the physics in float64.  obs: of observations, starts of episodes included.  reward: of rewards.
    metrics: of what ``info`` reports.  ends: steps at which one says terminated or truncated and the other does not.
    """

    steps: int
    episodes: int
    qpos: float
    qvel: float
    obs: float
    reward: float
    metrics: float
    ends: int


def against_gymnasium(
    name: str, num_steps: int, num_envs: int = 2, seed: int = 0, episode_length: int | None = None, **options
) -> Fidelity:
    """Plays the same random actions from the same starts here, as one compiled program, and in Gymnasium.

    Observations and rewards are compared as float32; a reward's difference is relative where it is above 1.
    """
    env = make_env(f"mujoco/{name}", episode_length=episode_length, **options)
    if episode_length is not None:
        options["max_episode_steps"] = episode_length
    first, actions, states, steps = random_rollout(env, num_steps, num_envs, seed)
    worst = dict.fromkeys(("qpos", "qvel", "obs", "reward", "metrics"), 0.0)
    episodes = ends = 0

    def note(what, ours, theirs, scale=1.0):
        if np.shape(ours) != np.shape(theirs):
            raise ValueError(f"{name}: {what} has shape {np.shape(ours)} here and {np.shape(theirs)} in Gymnasium")
        # NumPy's maximum, unlike Python's, keeps a NaN.
        worst[what] = float(np.maximum(worst[what], np.max(np.abs(np.float64(ours) - theirs)) / scale))

    for i in range(num_envs):
        original = make_original(name, **options)
        obs = begin(original, *positions(env, first[0].bits[i]))
        note("obs", first[1][i], np.float32(obs))
        for t in range(num_steps):
            obs, reward, terminated, truncated, info = original.step(actions[t, i])
            note("obs", steps.final_obs[t, i], np.float32(obs))
            note("reward", steps.reward[t, i], reward, max(1.0, abs(reward)))
            # Version 4 gave other names, and in places other meanings, to what it reports.
            for key, value in steps.metrics.items() if name.endswith("-v5") else ():
                note("metrics", value[t, i], info[key], max(1.0, abs(info[key])))
            ends += steps.terminated[t, i] != terminated
            ends += steps.truncated[t, i] != (truncated and not terminated)
            if terminated or truncated:
                episodes += 1
                obs = begin(original, *positions(env, states.bits[t, i]))
                note("obs", steps.obs[t, i], np.float32(obs))
            qpos, qvel = positions(env, states.bits[t, i])
            note("qpos", qpos, original.unwrapped.data.qpos)
            note("qvel", qvel, original.unwrapped.data.qvel)
    return Fidelity(num_steps * num_envs, episodes, **worst, ends=int(ends))


def one_step_errors(
    name: str, num_states: int = 256, seed: int = 0, physics: str = "mjx", num_steps: int = 1000
) -> dict[str, Any]:
    """Absolute errors of one step of MJX from states of C MuJoCo, drawn from whole episodes under random actions.

    16 environments play ``num_steps`` steps, beginning anew as episodes end; ``num_states`` of their states are picked at
    random. The quantities are qpos, qvel, obs and reward; ``ends`` tells states after which only one of the two terminates,
    ``contacts`` states in which bodies touch.
    """
    from pgjax.envs.mujoco.mjx_engine import State

    env, other = make_env(f"mujoco/{name}"), make_env(f"mujoco/{name}", physics=physics)
    num_envs = 16
    _, actions, states, steps = random_rollout(env, num_steps, num_envs, seed)
    step, row = np.divmod(np.random.default_rng(seed).choice((num_steps - 1) * num_envs, num_states, replace=False), num_envs)
    before = jax.tree.map(lambda x: x[step, row], states)
    action, after, following = jax.tree.map(lambda x: x[step + 1, row], (actions, steps, states))
    qpos, qvel = positions(env, before.bits)
    contacts = touching(env.model, qpos)
    numbers = before.bits.view(np.float64)
    bit = mujoco.mjtState
    recalled = numbers[:, mujoco.mj_stateSize(env.model, int(bit.mjSTATE_INTEGRATION)) :]
    start = mujoco.mj_stateSize(env.model, int(bit.mjSTATE_WARMSTART) - 1)  # every component before it
    warmstart = numbers[:, start : start + env.model.nv]
    floats = [jnp.float32(x) for x in (qpos, qvel, warmstart, recalled)]
    qpos, qvel, warmstart, recalled = floats
    state = State(qpos, qvel, warmstart, recalled, jnp.asarray(before.steps))

    @jax.jit
    def advance(state, action):
        return jax.vmap(other._advance, (None, 0, 0, None))(None, state, action, other.default_params)

    new, obs, reward, terminated, *_ = advance(state, action)
    # The states after a step that ended an episode are those of the next start.
    on = ~(after.terminated | after.truncated)
    next_qpos, next_qvel = positions(env, following.bits)
    return {
        "qpos": np.abs(next_qpos - new.qpos)[on],
        "qvel": np.abs(next_qvel - new.qvel)[on],
        "obs": np.abs(after.final_obs - obs),
        "reward": np.abs(after.reward - reward),
        "ends": np.asarray(after.terminated != terminated),
        "contacts": contacts,
    }


def touching(model: Any, qpos: np.ndarray) -> np.ndarray:
    """[N] whether any bodies touch in the positions [N, nq]."""
    data = mujoco.MjData(model)
    found = np.zeros(len(qpos), bool)
    for i in range(len(qpos)):
        data.qpos[:] = qpos[i]
        mujoco.mj_fwdPosition(model, data)
        found[i] = data.ncon > 0
    return found


def random_rollout(env, num_steps: int, num_envs: int, seed: int) -> Any:
    """((state, obs) at the start, actions, states after every step, time steps) as NumPy arrays; one compiled program."""

    @jax.jit
    def run(key):
        key_start, key_steps, key_action = jax.random.split(key, 3)
        low, high = env.action_space.bounds
        actions = jax.random.uniform(key_action, (num_steps, num_envs, *env.action_space.shape), jnp.float32, low, high)
        drawn = env.presample(jax.random.split(key_steps, (num_steps, num_envs)), env.default_params)
        first = env.reset(jax.random.split(key_start, num_envs), env.default_params)

        def body(state, inputs):
            state, timestep = env.step_presampled(inputs[0], state, inputs[1], env.default_params)
            return state, (state, timestep)

        return first, actions, *jax.lax.scan(body, first[0], (drawn, actions))[1]

    return jax.tree.map(np.asarray, run(jax.random.key(seed)))


def positions(env, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """qpos and qvel in float64 from the bits [..., W] of a state of C MuJoCo."""
    state = np.ascontiguousarray(bits).view(np.float64)
    nq, nv = env.model.nq, env.model.nv
    return state[..., 1 : 1 + nq], state[..., 1 + nq : 1 + nq + nv]


def make_original(name: str, **options) -> Any:
    """Gymnasium's environment, without what it and MuJoCo say about dated versions and models."""
    import gymnasium

    with warnings.catch_warnings(), quiet_loading():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*out of date.*")
        return gymnasium.make(name, **options)


def begin(original, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """Starts an episode of Gymnasium's environment in a given state; its first observation."""
    original.reset(seed=0)
    inner = original.unwrapped
    mujoco.mj_resetData(inner.model, inner.data)
    inner.set_state(qpos, qvel)
    return inner._get_obs()


def scores(
    run: str, num_episodes: int, physics: Sequence[str] = ("c", "mjx"), lanes: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Returns [lanes, num_episodes] of a run's final policies, acting by their mode, in Gymnasium itself and here.

    Each place draws its own starts. ``run`` is the folder of a run on one of the tasks with its default options, ``lanes`` the
    places of those of its policies that are scored, None for all.

    Raises: RequestError if the run had options of its own, or has no such lane.
    """
    spec = RunSpec.from_config(read_run(run)["config"])
    if set(spec.env_options) - {"physics", "num_threads", "reset_mode"}:
        raise RequestError(f"{run} was trained with {spec.env_options}; only runs with the task's defaults are scored")
    algorithm = spec.build()
    policies, columns = lanes_of(run, algorithm, lanes)
    num_lanes = len(columns["seed"])
    act = jax.jit(lambda policy, obs: algorithm.act(policy, obs[None], None)[0])
    found = {"gymnasium": np.zeros((num_lanes, num_episodes))}
    original = make_original(spec.env.partition("/")[2])
    for lane in range(num_lanes):
        policy = jax.tree.map(lambda x, lane=lane: x[lane], policies)
        for episode in range(num_episodes):
            obs, _ = original.reset(seed=num_episodes * int(columns["seed"][lane]) + episode)
            over = False
            while not over:
                obs, reward, terminated, truncated, _ = original.step(np.asarray(act(policy, np.float32(obs))))
                found["gymnasium"][lane, episode] += reward
                over = terminated or truncated
    for engine in physics:
        frame = evaluate_run(run, None, {"physics": engine}, num_episodes, seed=0, lanes=lanes)
        found[engine] = np.asarray(frame.loc[frame["policy"] == "mode", "return"]).reshape(num_lanes, num_episodes)
    return found


def _print_gymnasium(names, num_steps: int) -> None:
    print("| task | steps | episodes ended | qpos | qvel | obs | reward | info | ends that differ |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        f = against_gymnasium(name, num_steps)
        info = f"{f.metrics:.1e}" if name.endswith("-v5") else "–"
        errors = " | ".join(f"{x:.1e}" if x else "0" for x in (f.qpos, f.qvel, f.obs, f.reward))
        print(f"| {name} | {f.steps} | {f.episodes} | {errors} | {info} | {f.ends} |", flush=True)


def _print_mjx(names, num_states: int, physics: str) -> None:
    print("median / 99 % / largest\n\n| task | with contacts | qpos | qvel | obs | reward | ends that differ |")
    print("|---" * 7 + "|")
    for name in names:
        errors = one_step_errors(name, num_states, physics=physics)
        ends, contacts = errors.pop("ends"), errors.pop("contacts")
        cells = [" / ".join(f"{x:.0e}" for x in np.quantile(e, [0.5, 0.99, 1.0])) for e in errors.values()]
        cells = [f"{contacts.mean():.0%}", *cells, f"{ends.sum()} of {len(ends)}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _print_scores(run: str, num_episodes: int, physics: Sequence[str], lanes: Sequence[int] | None) -> None:
    found = scores(run, num_episodes, physics, lanes)
    print("| lane | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for row, lane in enumerate(range(len(found["gymnasium"])) if lanes is None else lanes):
        cells = [f"{x[row].mean():.1f} ± {1.96 * x[row].std(ddof=1) / np.sqrt(num_episodes):.1f}" for x in found.values()]
        print(f"| {lane} | " + " | ".join(cells) + " |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("gymnasium", help="C MuJoCo step by step against Gymnasium")
    part.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    part.add_argument("--steps", type=int, default=1000)
    part = parts.add_parser("mjx", help="one step of MJX against one of C MuJoCo")
    version_5 = [name for name in TASKS if name.endswith("-v5")]
    part.add_argument("--tasks", nargs="+", default=version_5, choices=list(TASKS), metavar="TASK")
    part.add_argument("--states", type=int, default=256)
    part.add_argument("--physics", choices=("mjx", "warp"), default="mjx")
    part = parts.add_parser("policy", help="final policies of a run, scored in Gymnasium and on each engine")
    part.add_argument("run")
    part.add_argument("--episodes", type=int, default=20)
    part.add_argument("--physics", nargs="+", default=["c", "mjx"], choices=MUJOCO_PHYSICS)
    part.add_argument("--lanes", nargs="+", type=int, metavar="LANE", help="places of the policies in the run; all if absent")
    args = parser.parse_args(argv)
    use_compilation_cache()  # compiling MJX takes longer than running it
    if args.part == "policy":
        _print_scores(args.run, args.episodes, args.physics, args.lanes)
    elif args.part == "gymnasium":
        _print_gymnasium(args.tasks, args.steps)
    else:
        _print_mjx(args.tasks, args.states, args.physics)


if __name__ == "__main__":
    main()
