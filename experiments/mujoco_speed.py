"""How fast the MuJoCo tasks step, beside the other ways to step them: ``pgjax bench --parts mujoco``.

All contenders of a task are made first and then run in turns, so that a busy machine slows all of them.
"""

import contextlib
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mujoco as _mujoco
import numpy as np

import pgjax
from pgjax.envs.mjx_tools import quiet_loading
from pgjax.experiments.env_speed import bare_loop, random_actions
from pgjax.experiments.mujoco_fidelity import make_original

mujoco: Any = _mujoco  # a compiled module without type information

TASKS = ("HalfCheetah", "Hopper", "Ant", "Humanoid")
NUM_ENVS = 64
NUM_STEPS = 50
ASYNC_SIZES = (2, 4, 16)

Contender = tuple[Callable[[], Any], int]
"""What is timed, and how many environment steps a call takes."""


def measure(task: str, repeats: int, say: Callable[[str], None]) -> dict[str, float]:
    """Environment steps per second of each contender on one task: medians of ``repeats`` turns after a warm-up.

    EnvPool takes part where it is installed; it is no dependency. Its newest MuJoCo tasks are version 4.
    """
    env = pgjax.make_env(f"mujoco/{task}-v5")
    contenders: dict[str, Contender] = {}
    begin = time.perf_counter()
    contenders["pgjax, physics=c"] = _pgjax(env)
    say(f"  {task}: compiled in {time.perf_counter() - begin:.1f} s")
    actions = _actions(env)
    original = make_original(f"{task}-v5")
    contenders["gymnasium, 1"] = _gymnasium(original, actions[:, 0])
    vectors = {num: _async(task, num) for num in ASYNC_SIZES}
    for num, vector in vectors.items():
        contenders[f"gymnasium, AsyncVectorEnv({num})"] = _vector(vector, actions[:, :num], num)
    if importlib.util.find_spec("envpool") is not None:
        contenders["EnvPool"] = _envpool(task, actions)
    contenders["mujoco.rollout"] = _rollout(env, actions)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, (run, _) in contenders.items():
            begin = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    for vector in vectors.values():
        vector.close()
    return {name: num / statistics.median(seconds[name]) for name, (_, num) in contenders.items()}


def table(repeats: int, say: Callable[[str], None], tasks: tuple[str, ...] = TASKS) -> dict[str, dict[str, float]]:
    """Steps per second by task and contender, said as a table with what each is to ours."""
    figures = {task: measure(task, repeats, say) for task in tasks}
    names = list(figures[tasks[0]])
    say("\n| env steps/s | " + " | ".join(tasks) + " |")
    say("|---" * (len(tasks) + 1) + "|")
    for name in names:
        say(f"| {name} | " + " | ".join(f"{figures[task][name]:,.0f}" for task in tasks) + " |")
    best = {task: max(value for name, value in figures[task].items() if name.startswith("gymnasium")) for task in tasks}
    ratios = [figures[task]["pgjax, physics=c"] / best[task] for task in tasks]
    say("| pgjax / the best of gymnasium | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
    for name in names:
        if name in ("EnvPool", "mujoco.rollout"):
            ratios = [figures[task]["pgjax, physics=c"] / figures[task][name] for task in tasks]
            say(f"| pgjax / {name} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
            if name == "EnvPool":
                say(f"geometric mean of pgjax / EnvPool: {statistics.geometric_mean(ratios):.2f}")
    return figures


def _actions(env) -> np.ndarray:
    """[NUM_STEPS, NUM_ENVS, A] random actions within the bounds."""
    return np.asarray(random_actions(jax.random.key(0), env, (NUM_STEPS, NUM_ENVS)))


def _pgjax(env) -> Contender:
    """The compiled loop, which goes on where it was."""
    play, actions = bare_loop(env), jnp.asarray(_actions(env))
    carried = [env.reset(jax.random.split(jax.random.key(0), NUM_ENVS), env.default_params)[0]]

    def run():
        carried[0], reward = play(carried[0], jax.random.key(1), actions)
        jax.block_until_ready(reward)

    run()
    return run, NUM_STEPS * NUM_ENVS


def _gymnasium(original, actions: np.ndarray) -> Contender:
    original.reset(seed=0)

    def run():
        for action in actions:
            _, _, terminated, truncated, _ = original.step(action)
            if terminated or truncated:
                original.reset()

    return run, len(actions)


def _async(task: str, num: int):
    import gymnasium

    # Forking a process in which JAX has threads may hang. Every process would say on its standard error, and in a file
    # where it works, that a model is dated.
    said = os.dup(2)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), open(os.devnull, "w") as nowhere, quiet_loading():
        os.dup2(nowhere.fileno(), 2)
        try:
            return gymnasium.vector.AsyncVectorEnv([partial(gymnasium.make, f"{task}-v5")] * num, context="spawn")
        finally:
            os.dup2(said, 2)
            os.close(said)


def _vector(vector, actions: np.ndarray, num: int) -> Contender:
    vector.reset(seed=0)

    def run():
        for action in actions:
            vector.step(action)

    return run, len(actions) * num


def _envpool(task: str, actions: np.ndarray) -> Contender:
    import envpool  # pyright: ignore[reportMissingImports]

    pool = envpool.make(f"{task}-v4", env_type="gymnasium", num_envs=NUM_ENVS, num_threads=len(os.sched_getaffinity(0)))
    pool.reset()
    actions = actions.astype(np.float64)

    def run():
        for action in actions:
            pool.step(action)

    return run, NUM_STEPS * NUM_ENVS


def _rollout(env, actions: np.ndarray) -> Contender:
    """Open loop, without observations, rewards, contact forces and restarts: what the physics alone costs."""
    from mujoco import rollout

    model, skip = env.model, env.task.frame_skip
    data = mujoco.MjData(model)
    mujoco.mj_resetData(model, data)
    full = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)
    state = np.zeros((NUM_ENVS, mujoco.mj_stateSize(model, full)))
    mujoco.mj_getState(model, data, state[0], full)
    state[:] = state[0]
    control = np.repeat(actions.swapaxes(0, 1).astype(np.float64), skip, axis=1)
    pool = rollout.Rollout(nthread=len(os.sched_getaffinity(0)))
    datas = [mujoco.MjData(model) for _ in range(len(os.sched_getaffinity(0)))]
    return lambda: pool.rollout(model, datas, state, control), NUM_STEPS * NUM_ENVS
