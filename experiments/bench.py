"""``pgjax bench``: speed, start-up and memory on this machine, medians after warm-up, compile time apart.

What is compared runs side by side in one process, in turns, so that a busy machine slows both; read the ratios.
"""

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

import jax
import jax.numpy as jnp

import pgjax
from pgjax import algorithms, on_policy, training
from pgjax.errors import RequestError, close_names
from pgjax.experiments.env_speed import random_actions
from pgjax.experiments.meta_train import lpo as meta_lpo
from pgjax.experiments.meta_train.loop import placement
from pgjax.experiments.plain_ppo import plain_ppo
from pgjax.experiments.shared_settings import differences, settle
from pgjax.host import lanes as lanes_

# The setting of the public single-file implementations on CartPole.
_SETUP = {"num_envs": 4, "num_steps": 128, "num_epochs": 4, "num_minibatches": 4, "hidden_sizes": (64, 64)}
_HYPERS = {"entropy_coef": 0.01}


def bench(parts: tuple[str, ...], repeats: int, out: Path | None, say: Callable[[str], None]) -> int:
    """Measures ``parts`` (all if empty), says the figures, and writes them to ``out``; returns the exit code."""
    if parts == ("help",):
        say("\n".join(f"{name:<10} {_first_line(part)}" for name, part in PARTS.items()))
        return 0
    for name in parts:
        if name not in PARTS:
            raise RequestError(f"--parts {name} is unknown; {close_names(name, PARTS)}")
    if repeats < 1:
        raise RequestError(f"--repeats {repeats} must be at least 1")
    device = jax.devices()[0]
    say(f"{len(jax.devices())} x {device.device_kind} ({device.platform}), {os.cpu_count()} cores, jax {jax.__version__}")
    figures: dict[str, Any] = {"device": device.device_kind, "devices": len(jax.devices()), "jax": jax.__version__}
    for name in parts or PARTS:
        say(f"\n{name}: {_first_line(PARTS[name])}")
        figures[name] = PARTS[name](repeats, say)
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _first_line(part) -> str:
    return (part.__doc__ or "").splitlines()[0]


def _compiled(fn, *args):
    """``(program, seconds to trace and compile it)``; this command uses no cache on disk."""
    started = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    return program, time.perf_counter() - started


def _medians(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns after one warm-up of each."""
    for run in programs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _cartpole(**setup):
    env = pgjax.make_env("gymnax/CartPole-v1")
    return pgjax.make("ppo", env, _HYPERS, **{**_SETUP, **setup})


def _lane_program(algorithm, num_lanes, num_devices, num_iterations):
    """``(run, seconds to compile)`` of the program that the runner uses, on so many lanes and devices."""
    spread = lanes_.Spread(num_lanes, jax.devices()[:num_devices])
    keys = jax.random.split(jax.random.key(0), num_lanes)
    hypers = lanes_.stack_lanes([algorithm.hypers] * num_lanes)
    state = spread.put(spread.pad(jax.jit(jax.vmap(algorithm.init))(keys, hypers)))
    hypers = spread.put(spread.pad(hypers))
    counts = spread.share(jnp.asarray([num_iterations], jnp.int32))
    run_lane = spread.map(lambda *args: training.run_rows(algorithm, *args), 2)
    program, seconds = _compiled(run_lane, state, hypers, counts)
    return lambda: program(state, hypers, counts), seconds


@contextlib.contextmanager
def _on_one_thread(num_iterations):
    """``(run, seconds to compile)`` of one lane as ``pgjax train`` runs it, in a process that has but one thread."""
    code = (
        "import sys; from pgjax.host import lanes; lanes.use_one_thread()\n"
        "import jax; from pgjax.experiments import bench\n"
        "run, seconds = bench._lane_program(bench._cartpole(), 1, 1, int(sys.argv[1])); print(seconds, flush=True)\n"
        "for _ in sys.stdin: jax.block_until_ready(run()); print(flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(num_iterations)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        ask, answer = cast(TextIO, child.stdin), cast(TextIO, child.stdout)
        seconds = float(answer.readline())

        def run():
            print(file=ask, flush=True)
            answer.readline()

        yield run, seconds


def _ppo(repeats, say):
    """PPO on CartPole in the public single-file setting, beside a plain implementation of it."""
    iterations = 200
    steps = iterations * _SETUP["num_envs"] * _SETUP["num_steps"]
    cores = len(jax.devices())
    algorithm = _cartpole()
    plain_init, plain_step = plain_ppo()
    key = jax.random.key(0)

    def plain(states):
        return jax.lax.scan(lambda state, _: plain_step(state), states, None, length=iterations)

    programs, compile_seconds, total = {}, {}, {}
    for num_lanes in (1, 8):
        states = jax.jit(jax.vmap(plain_init))(jax.random.split(key, num_lanes))
        fn, arg = (plain, jax.tree.map(lambda x: x[0], states)) if num_lanes == 1 else (jax.vmap(plain), states)
        program, compile_seconds[f"plain, {num_lanes} lanes"] = _compiled(fn, arg)
        programs[f"plain, {num_lanes} lanes"] = lambda program=program, arg=arg: program(arg)
        total[f"plain, {num_lanes} lanes"] = steps * num_lanes
    for num_lanes, num_devices in ((1, 1), (8, 1), (16, 1), (16, cores)):
        name = f"pgjax, {num_lanes} lanes, {num_devices} devices"
        programs[name], compile_seconds[name] = _lane_program(algorithm, num_lanes, num_devices, iterations)
        total[name] = steps * num_lanes
    with _on_one_thread(iterations) as (run, seconds):
        name = "pgjax, 1 lanes, 1 thread"
        programs[name], compile_seconds[name], total[name] = run, seconds, steps
        medians = _medians(programs, repeats)
    base = total["plain, 1 lanes"] / medians["plain, 1 lanes"]
    figures = {}
    for name, seconds in medians.items():
        speed = total[name] / seconds
        figures[name] = {"steps_per_second": speed, "ratio": speed / base, "compile_seconds": compile_seconds[name]}
        say(f"  {name:<30} {speed:>10,.0f} env steps/s  {speed / base:5.2f} x  compiled in {compile_seconds[name]:4.1f} s")
    return figures


def _family(repeats, say):
    """Every on-policy algorithm's iteration beside PPO's, 16 lanes of CartPole on all devices, with shared settings."""
    env = pgjax.make_env("gymnax/CartPole-v1")
    modules = {name: algorithms.get(name) for name in algorithms.list_algorithms()}
    # The others take a gradient step at every environment step, and minutes for what these do in a second.
    modules = {name: module for name, module in modules.items() if issubclass(module.Setup, on_policy.Setup)}
    settings, _ = settle(modules, "gymnax/CartPole-v1", {"setup": {}, "hypers": {}}, False)
    programs, compile_seconds, steps = {}, {}, {}
    for name, module in modules.items():
        changed = differences(module, settings[name])
        try:
            algorithm = algorithms.make(name, env, changed["hypers"], **changed["setup"])
        except RequestError as error:
            say(f"  {name:<10} left out: {error}")
            continue
        iterations = max(1, 25_600 // algorithm.env_steps_per_iteration)
        programs[name], compile_seconds[name] = _lane_program(algorithm, 16, len(jax.devices()), iterations)
        steps[name] = 16 * iterations * algorithm.env_steps_per_iteration
    medians = _medians(programs, repeats)
    figures = {}
    for name, seconds in medians.items():
        microseconds = 1e6 * seconds / steps[name]
        ratio = microseconds / (1e6 * medians["ppo"] / steps["ppo"])
        figures[name] = {"microseconds_per_step": microseconds, "ratio": ratio, "compile_seconds": compile_seconds[name]}
        say(f"  {name:<10} {microseconds:6.2f} µs per env step  {ratio:5.2f} x ppo  compiled in {compile_seconds[name]:4.1f} s")
    return figures


def _incremental(repeats, say):
    """AVG on Pendulum, one transition and one update at a time: one learner alone, and a thousand side by side."""
    algorithm = pgjax.make("avg", pgjax.make_env("gymnax/Pendulum-v1"), action_map="tanh_affine", num_steps=10)
    figures = {}
    for num_lanes, num_devices, iterations in ((1, 1, 100), (1000, 1, 1), (1000, len(jax.devices()), 1)):
        name = f"{num_lanes} learners, {num_devices} devices"
        run, compile_seconds = _lane_program(algorithm, num_lanes, num_devices, iterations)
        steps = num_lanes * iterations * algorithm.env_steps_per_iteration
        # One program at a time: a thousand learners are gigabytes.
        speed = steps / _medians({name: run}, repeats)[name]
        figures[name] = {"steps_per_second": speed, "compile_seconds": compile_seconds}
        ratio = speed / figures["1 learners, 1 devices"]["steps_per_second"]
        say(f"  {name:<30} {speed:>10,.0f} env steps/s  {ratio:5.2f} x  compiled in {compile_seconds:4.1f} s")
        del run
    return figures


def _replay(repeats, say):
    """An environment step of SAC with its gradient step on Pendulum, by the capacity of its replay buffer."""
    env = pgjax.make_env("gymnax/Pendulum-v1")
    figures = {}
    # Small networks too, so that what the buffer costs is not hidden behind them.
    for hidden, batch_size, steps in ((256, 256, 500), (32, 64, 2000)):
        setup = {"hidden_sizes": (hidden, hidden), "batch_size": batch_size, "warmup_steps": batch_size, "num_steps": 100}
        programs, compile_seconds = {}, {}
        for capacity in (10_000, 100_000, 1_000_000):
            name = f"2 x {hidden} units, capacity {capacity:,}"
            algorithm = pgjax.make("sac", env, buffer_size=capacity, **setup)
            iterations = steps // algorithm.env_steps_per_iteration
            programs[name], compile_seconds[name] = _lane_program(algorithm, 1, 1, iterations)
        medians = _medians(programs, repeats)
        smallest = medians[next(iter(programs))]
        for name, seconds in medians.items():
            microseconds, ratio = 1e6 * seconds / steps, seconds / smallest
            figures[name] = {"microseconds_per_step": microseconds, "ratio": ratio, "compile_seconds": compile_seconds[name]}
            say(f"  {name:<34} {microseconds:>8.1f} µs per step  {ratio:5.2f} x  compiled in {compile_seconds[name]:4.1f} s")
    return figures


def _meta(repeats, say):
    """A generation of LPO's meta-training on CartPole, by population, beside as many lanes of plain PPO."""
    inner = meta_lpo.inner_algorithm("gymnax/CartPole-v1")
    plain = pgjax.make("ppo", inner.env, _HYPERS, **dataclasses.asdict(inner.setup))
    iterations = 16
    inner_env_steps = iterations * plain.env_steps_per_iteration
    figures = {}
    for popsize in (2, 8, 32):
        trainer = meta_lpo.make([inner], popsize=popsize, inner_env_steps=inner_env_steps)
        state = jax.device_put(jax.jit(trainer.init)(jax.random.key(0)), placement(trainer))
        generation, compile_seconds = _compiled(trainer.step, state)
        lanes, _ = _lane_program(plain, popsize, len(jax.devices()), iterations)
        run_generation = functools.partial(generation, state)
        medians = _medians({"generation": run_generation, "plain": lanes}, repeats)
        speed, plain_speed = (popsize * inner_env_steps / medians[name] for name in ("generation", "plain"))
        figures[f"popsize {popsize}"] = {
            "steps_per_second": speed,
            "plain_steps_per_second": plain_speed,
            "compile_seconds": compile_seconds,
        }
        say(
            f"  popsize {popsize:>3}  {speed:>10,.0f} inner env steps/s  plain PPO {plain_speed:>10,.0f}  "
            f"{speed / plain_speed:5.2f} x  compiled in {compile_seconds:4.1f} s"
        )
    return figures


def _time(repeats, say):
    """Where an iteration's time goes: environment alone, collecting, updating."""
    figures = {}
    for name, env, options, setup in (
        ("CartPole", "gymnax/CartPole-v1", {}, _SETUP),
        ("hopper", "brax/hopper", {"backend": "spring"}, {"num_envs": 64, "num_steps": 64, "num_epochs": 4}),
    ):
        algorithm = pgjax.make("ppo", pgjax.make_env(env, **options), **setup)
        figures[name] = _shares(algorithm, repeats)
        total = figures[name]["whole iteration"]
        for part, seconds in figures[name].items():
            say(f"  {name:<9} {part:<30} {seconds * 1e3:8.2f} ms  {seconds / total:5.0%}")
        ratio = figures[name]["collect"] / figures[name]["environment alone"]
        say(f"  {name:<9} collecting costs {ratio:.2f} x the bare environment loop")
    return figures


def _shares(algorithm, repeats):
    env, setup, hypers = algorithm.env, algorithm.setup, algorithm.hypers
    state = jax.jit(algorithm.init)(jax.random.key(0), hypers)
    core = algorithm.core
    num = 20

    def bare(state):
        """Steps with actions drawn beforehand; the starts are drawn as in collecting."""

        def step(env_state, x):
            keys, action = x
            env_state, timestep = env.step_presampled(keys, env_state, action, env.default_params)
            return env_state, (
                timestep.obs,
                timestep.reward,
                timestep.terminated,
                timestep.truncated,
                timestep.final_obs,
            )

        def rollout(env_state, key):
            shape = (setup.num_steps, setup.num_envs)
            drawn = env.presample(jax.random.split(key, shape), env.default_params)
            actions = random_actions(key, env, shape)
            env_state, out = jax.lax.scan(step, env_state, (drawn, actions))
            return env_state, jax.tree.map(jnp.sum, out)

        return jax.lax.scan(rollout, state.env_state, jax.random.split(state.key, num))

    def collect(state):
        def one(state, key):
            state, batch, _, _ = on_policy.collect(core, jax.random.split(key, 3), state, hypers)
            return state, jax.tree.map(jnp.sum, batch.replace(value=None, next_value=None))

        return jax.lax.scan(one, state, jax.random.split(state.key, num))

    def whole(state):
        return jax.lax.scan(lambda state, _: algorithm.step(state, hypers), state, None, length=num)

    programs = {}
    for name, fn in (("environment alone", bare), ("collect", collect), ("whole iteration", whole)):
        program, _ = _compiled(fn, state)
        programs[name] = lambda program=program: program(state)
    seconds = {name: value / num for name, value in _medians(programs, repeats).items()}
    guard, _ = _compiled(lambda new, old: on_policy.gate(jnp.zeros((), bool), new, old), state.learner, state.learner)
    seconds["guard against non-finite lanes"] = _medians({"guard": lambda: guard(state.learner, state.learner)}, 100)["guard"]
    return seconds


def _startup(repeats, say):
    """CartPole from process start to the first finished iteration, without and with programs from earlier runs."""
    code = (
        "import sys, time; started = float(sys.argv[1])\n"
        "from pgjax.host import lanes; lanes.use_host_devices(); lanes.use_compilation_cache()\n"
        "import pgjax; from pgjax.host.runner import RunSpec, run\n"
        "spec = RunSpec('ppo', 'gymnax/CartPole-v1', 50_000, setup={'num_envs': 4}, log_every=1, num_evals=0)\n"
        "class Stop(Exception): pass\n"
        "def report(event):\n"
        "    if event.kind == 'rows': print(time.time() - started); raise Stop\n"
        "with pgjax.RunStore.create(sys.argv[2], spec.config()) as store:\n"
        "    try: run(spec, store, report)\n"
        "    except Stop: pass\n"
    )
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(min(repeats, 3)):
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("cold", "warm"):
                environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
                if kind == "cold":
                    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
                command = [sys.executable, "-c", code, str(time.time()), f"{folder}/{kind}"]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                seconds[kind].append(float(done.stdout.split()[-1]))
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    say(f"  cold {medians['cold']:.1f} s, with a warm compilation cache {medians['warm']:.1f} s")
    return medians


def _memory(repeats, say):
    """Peak memory of the process, and what was predicted, against the length of the run and the number of lanes."""
    cartpole = {"env": "gymnax/CartPole-v1", "setup": {"num_envs": 64}}
    hopper = {"env": "brax/hopper", "env_options": {"backend": "spring"}, "setup": {"num_envs": 64, "num_steps": 64}}
    cases = [(cartpole, *case) for case in ((1, 10**5), (1, 10**6), (1, 10**7), (8, 10**5), (32, 3 * 10**4), (128, 3 * 10**4))]
    cases += [(hopper, 1, 10**4), (hopper, 8, 10**4)]
    figures = {}
    for case, num_lanes, steps in cases:
        predicted, peak = memory_of_run(**case, total_env_steps=steps, seeds=tuple(range(num_lanes)), num_evals=1)
        figures[f"{case['env']}, {num_lanes} lanes, {steps} env steps"] = {"predicted_bytes": predicted, "peak_bytes": peak}
        say(
            f"  {case['env']:<18} {num_lanes:>4} lanes, {steps:>10,} env steps each: predicted {predicted / 2**20:6.0f} MiB, "
            f"peak {peak / 2**20:6.0f} MiB, ratio {predicted / peak:.2f}"
        )
    return figures


def memory_of_run(**fields) -> tuple[int, int]:
    """Predicted and actual peak resident memory, in bytes, of a process that trains PPO; ``fields`` are those of RunSpec."""
    code = (
        "import json, sys; fields, folder = json.loads(sys.argv[1]), sys.argv[2]\n"
        "from pgjax.host import lanes; lanes.use_host_devices(); lanes.use_compilation_cache()\n"
        "import pgjax; spec = pgjax.RunSpec('ppo', **fields)\n"
        "def report(event):\n"
        "    if event.kind == 'compiled': print(event.data['peak_bytes'])\n"
        "with pgjax.RunStore.create(folder, spec.config()) as store: pgjax.run(spec, store, report)\n"
        "print(lanes.resident_bytes()[1])\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, json.dumps(fields), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    predicted, peak = map(int, done.stdout.split()[-2:])
    return predicted, peak


def _mujoco(repeats, say):
    """Steps of the MuJoCo tasks beside Gymnasium, EnvPool and mujoco.rollout, 64 environments."""
    from pgjax.experiments import mujoco_speed

    return mujoco_speed.table(repeats, say)


PARTS: dict[str, Callable[[int, Callable[[str], None]], Any]] = {
    "ppo": _ppo,
    "family": _family,
    "incremental": _incremental,
    "replay": _replay,
    "meta": _meta,
    "time": _time,
    "startup": _startup,
    "memory": _memory,
    "mujoco": _mujoco,
}
