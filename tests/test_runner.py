"""The host loop: resuming bit for bit, frozen lanes, groups, evaluation; on tiny problems, so that it stays quick."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import pgjax
from pgjax import training
from pgjax.algorithms import ppo
from pgjax.errors import RequestError
from pgjax.host import checkpoints, lanes, runner
from pgjax.host.store import read_run
from tests.probe_envs import Probe
from tests.processes import ROOT, run_python

SETUP = ppo.Setup(num_envs=4, num_steps=8, num_epochs=2, num_minibatches=2, hidden_sizes=(8,), normalize_obs=True)


@pytest.fixture(scope="module")
def algorithm():
    return ppo.make(Probe("responding"), SETUP)


def spec_of(**changes):
    fields = {
        "total_env_steps": 32 * 12,
        "log_every": 1,
        "num_evals": 3,
        "eval_episodes": 4,
        "seeds": (0, 1, 2),
        **changes,
    }
    return pgjax.RunSpec("ppo", "probe/responding", **fields)


def run_in(path, spec, algorithm, report=lambda event: None):
    exists = (path / "run.json").exists()
    opened = pgjax.RunStore.open(path, spec.config()) if exists else pgjax.RunStore.create(path, spec.config())
    with opened as store:
        return pgjax.run(spec, store, report, algorithm=algorithm)


def content(path):
    """Everything a finished run holds: both tables in a fixed order, and the bytes of every leaf of the last state."""
    run = pgjax.load(path)
    metrics = run.metrics.sort_values(["config", "seed", "iteration"], ignore_index=True)
    evaluations = run.evaluations.sort_values(["config", "seed", "env_steps", "policy", "episode"], ignore_index=True)
    return metrics, evaluations


def final_state(path, algorithm, num_lanes):
    like = jax.eval_shape(
        jax.vmap(algorithm.init),
        jax.random.split(jax.random.key(0), num_lanes),
        lanes.stack_lanes([algorithm.hypers] * num_lanes),
    )
    step = checkpoints.latest_checkpoints(path / "checkpoints")[0]
    return checkpoints.load_checkpoint(path / "checkpoints", step, like)[0]


def assert_same_bits(a, b):
    def bits(leaf):
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return np.asarray(leaf).tobytes()

    assert [bits(x) for x in jax.tree.leaves(a)] == [bits(x) for x in jax.tree.leaves(b)]


class Killed(BaseException):
    """Stands for a kill: nothing of the run may catch it."""


@pytest.mark.parametrize("env", ["probe", pytest.param("mujoco", marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path, env, algorithm, monkeypatch):
    """On C MuJoCo too, whose physics is float64 and lives outside JAX."""
    if env == "mujoco":
        algorithm = ppo.make(pgjax.make_env("mujoco/Walker2d-v5", episode_length=20), SETUP)
    spec = spec_of()
    run_in(tmp_path / "whole", spec, algorithm)
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(runner, "CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr(runner, "CHUNK_SECONDS", 1e-9)
    kills = np.random.default_rng(0).integers(1, 8, size=6)
    for after in kills:
        seen = 0

        def report(event, after=after):
            nonlocal seen
            seen += event.kind in ("rows", "saved", "evaluated")
            if seen == after:
                raise Killed

        try:
            result = run_in(tmp_path / "killed", spec, algorithm, report)
        except Killed:
            continue
        break
    else:
        result = run_in(tmp_path / "killed", spec, algorithm)
    assert result.status == "finished"
    for whole, killed in zip(content(tmp_path / "whole"), content(tmp_path / "killed"), strict=True):
        pd.testing.assert_frame_equal(whole, killed, check_exact=True)
    assert_same_bits(final_state(tmp_path / "whole", algorithm, 3), final_state(tmp_path / "killed", algorithm, 3))


def extend_in(path, total, algorithm, report=lambda event: None):
    with pgjax.RunStore.open(path) as store:
        spec = runner.extend(store, algorithm, total)
        return pgjax.run(spec, store, report, algorithm=algorithm)


@pytest.fixture(scope="module")
def constant():
    """PPO whose learning rate does not fall, so that the horizon matters to nothing."""
    return ppo.make(Probe("responding"), dataclasses.replace(SETUP, learning_rate_schedule="constant"))


def test_a_run_that_is_extended_again_and_again_equals_one_long_run(tmp_path, constant, monkeypatch):
    run_in(tmp_path / "long", spec_of(total_env_steps=32 * 24, num_evals=6), constant)
    # Killed at its first checkpoint, extended, finished, extended; then killed in the extension and resumed.
    path = tmp_path / "extended"
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(runner, "CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr(runner, "CHUNK_SECONDS", 1e-9)

    def kill_after(saves):
        seen = 0

        def report(event):
            nonlocal seen
            seen += event.kind == "saved"
            if seen == saves:
                raise Killed

        return report

    with pytest.raises(Killed):
        run_in(path, spec_of(total_env_steps=32 * 8, num_evals=2), constant, kill_after(2))
    assert extend_in(path, 32 * 12, constant).env_steps == 32 * 12
    with pytest.raises(Killed):
        extend_in(path, 32 * 24 - 5, constant, kill_after(3))
    assert pgjax.load(path).status == "interrupted"
    run = read_run(path)
    assert [(e["from"], e["to"], e["at"]) for e in run["extensions"]] == [(256, 384, 64), (384, 763, 384)]
    assert run["config"]["total_env_steps"] == 763
    assert run_in(path, pgjax.RunSpec.from_config(run["config"]), constant).status == "finished"
    for long, extended in zip(content(tmp_path / "long"), content(path), strict=True):
        pd.testing.assert_frame_equal(long, extended, check_exact=True)
    assert_same_bits(final_state(tmp_path / "long", constant, 3), final_state(path, constant, 3))


def test_an_extension_raises_the_horizon_from_there_on(tmp_path, algorithm):
    run_in(tmp_path, spec_of(log_every=3), algorithm)
    assert extend_in(tmp_path, 32 * 20, algorithm).status == "finished"
    metrics, evaluations = content(tmp_path)
    rate = metrics[metrics.seed == 0].learning_rate / algorithm.hypers.learning_rate
    start = np.array([0, 3, 6, 9, 12, 15, 18])
    share = [np.mean([1 - k / (12 if k < 12 else 20) for k in range(s, min(s + 3, 20))]) for s in start]
    np.testing.assert_allclose(rate, share, rtol=1e-5)
    assert sorted(evaluations.env_steps.unique()) == [32 * k for k in (6, 9, 12, 18, 20)]


def test_extensions_that_cannot_be_are_refused(tmp_path, algorithm, monkeypatch):
    run_in(tmp_path / "run", spec_of(), algorithm)
    before = read_run(tmp_path / "run")
    for total in (1, 32 * 11, 32 * 12 - 7, 32 * 12):
        with pytest.raises(RequestError, match="goes to 384 already"):
            extend_in(tmp_path / "run", total, algorithm)
    with pytest.raises(RequestError, match="int32"):
        extend_in(tmp_path / "run", 2**31, algorithm)
    after = read_run(tmp_path / "run")
    assert after["extensions"] == [] and after["config"] == before["config"] and after["status"] == "finished"
    monkeypatch.setattr(lanes, "_CPU_FIXED_BYTES", 0)
    monkeypatch.setattr(lanes, "program_bytes", lambda *args: 3 << 20)
    monkeypatch.setattr(lanes, "available_bytes", lambda device: 2 << 20)
    run_in(tmp_path / "groups", spec_of(), algorithm)
    with pytest.raises(RequestError, match="in groups of"):
        extend_in(tmp_path / "groups", 32 * 24, algorithm)


def test_lanes_equal_single_runs_and_new_numbers_compile_nothing(tmp_path):
    traces = 0
    base = ppo.make(Probe("responding"), SETUP)

    def counted_step(state, hypers):
        nonlocal traces
        traces += 1
        return base.step(state, hypers)

    algorithm = base._replace(step=counted_step)
    grid = tuple({"learning_rate": lr, "clip_eps": eps} for lr in (1e-4, 3e-4, 1e-3, 3e-3) for eps in (0.1, 0.2, 0.3, 0.4))
    spec = spec_of(configs=grid, seeds=(0, 1, 2, 3), total_env_steps=32 * 3, num_evals=0)
    run_in(tmp_path / "grid", spec, algorithm)
    traces_of_grid = traces
    assert traces_of_grid <= 4  # shapes of the state, shapes of the metrics, and the program: the same for any grid
    table = pgjax.load(tmp_path / "grid").metrics
    assert len(table) == 16 * 4 * 3
    train = jax.jit(pgjax.make_train(base, 32 * 3, log_every=1))
    for config, seed in ((0, 0), (5, 2), (15, 3)):
        hypers = base.hypers.replace(**{k: np.float32(v) for k, v in grid[config].items()})
        _, alone = train(jax.random.key(seed), hypers)
        lane = table[(table.config == config) & (table.seed == seed)].sort_values("iteration")
        for name in ("loss_policy", "loss_value", "kl", "entropy", "episode_return", "ratio_max"):
            np.testing.assert_allclose(lane[name], alone[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_a_lane_that_goes_nonfinite_is_frozen_named_and_alone(tmp_path, algorithm):
    configs = ({}, {"learning_rate": 1e38, "max_grad_norm": np.inf})
    notes = []
    report = lambda event: notes.append(event.data["text"]) if event.kind == "note" else None  # noqa: E731
    result = run_in(tmp_path / "both", spec_of(configs=configs, seeds=(0, 7)), algorithm, report)
    assert result.status == "failed"
    assert result.nonfinite == [(1, 0), (1, 7)]
    assert sum("config 1, seed 7" in note for note in notes) == 1
    metrics, evaluations = content(tmp_path / "both")
    frozen = metrics[metrics.config == 1]
    assert (frozen.groupby("seed").nonfinite.last() == 1).all() and len(frozen) == 24  # it goes on giving rows
    columns = [c for c in metrics if not c.startswith("episode_")]
    assert not metrics[columns].isna().any().any()
    assert np.isfinite(evaluations["return"]).all()
    run_in(tmp_path / "alone", spec_of(configs=configs[:1], seeds=(0, 7)), algorithm)
    alone, _ = content(tmp_path / "alone")
    kept = metrics[metrics.config == 0].reset_index(drop=True)
    np.testing.assert_allclose(kept.drop(columns="config"), alone.drop(columns="config"), rtol=1e-3, atol=1e-5)
    state = final_state(tmp_path / "both", algorithm, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.learner.params))


def test_too_many_lanes_for_the_memory_are_trained_in_groups(tmp_path, algorithm, monkeypatch):
    monkeypatch.setattr(lanes, "_CPU_FIXED_BYTES", 0)
    spec = spec_of(seeds=tuple(range(5)))
    run_in(tmp_path / "whole", spec, algorithm)
    notes, sizes = [], []

    def report(event):
        notes.extend([event.data["text"]] if event.kind == "note" else [])
        sizes.extend([event.data["lanes"], event.data["bytes"]] if event.kind == "compiled" else [])

    probe = tmp_path / "probe"
    run_in(probe, spec, algorithm, report)
    # Enough for the look at the state before compiling, then half of what all lanes together were found to need.
    monkeypatch.setattr(lanes, "available_bytes", lambda device: int(sizes[1] * 0.5) if sizes else 1 << 40)
    sizes.clear()
    run_in(tmp_path / "groups", spec, algorithm, report)
    assert any("3 groups of at most 2 lanes" in note for note in notes)
    assert sizes[::2] == [5, 2, 2, 1]
    for whole, groups in zip(content(tmp_path / "whole"), content(tmp_path / "groups"), strict=True):
        assert list(whole["seed"]) == list(groups["seed"])
        numbers = whole.select_dtypes("number").columns
        np.testing.assert_allclose(whole[numbers], groups[numbers], rtol=1e-3, atol=1e-4)
    policies, columns = runner.policies_of(tmp_path / "groups", algorithm)
    assert list(columns["seed"]) == [0, 1, 2, 3, 4] and jax.tree.leaves(policies)[0].shape[0] == 5
    monkeypatch.setattr(lanes, "available_bytes", lambda device: 10)
    with pytest.raises(pgjax.RunError, match="one lane alone needs"):
        run_in(tmp_path / "none", spec, algorithm)


def test_evaluation_is_cut_down_when_it_takes_too_long_and_says_so(tmp_path, algorithm, monkeypatch):
    monkeypatch.setattr(runner, "EVALUATION_FREE_SECONDS", 0.0)
    monkeypatch.setattr(runner, "EVALUATION_SHARE", 1e-9)
    notes = []
    report = lambda event: notes.append(event.data["text"]) if event.kind == "note" else None  # noqa: E731
    run_in(tmp_path / "run", spec_of(eval_episodes=None), algorithm, report)
    counts = pgjax.load(tmp_path / "run").evaluations.groupby(["seed", "env_steps", "policy"]).size()
    assert counts.groupby("env_steps").first().tolist() == [16, 4, 4]
    assert any("4 episodes instead of 16" in note for note in notes)


def test_a_run_can_start_from_the_policy_of_another(tmp_path, algorithm):
    run_in(tmp_path / "first", spec_of(seeds=(3,)), algorithm)
    policies, _ = runner.policies_of(tmp_path / "first", algorithm)
    spec = spec_of(seeds=(0, 1), init_policy=str(tmp_path / "first"), configs=({"learning_rate": 0.0},), num_evals=0)
    run_in(tmp_path / "second", spec, algorithm)
    second, _ = runner.policies_of(tmp_path / "second", algorithm)
    for lane in range(2):
        np.testing.assert_array_equal(second.actor[lane], policies.actor[0])
    other = ppo.make(Probe("responding", continuous=True), SETUP)
    with pytest.raises(RequestError):
        runner.policies_of(tmp_path / "first", other)


def test_pure_training_and_the_runner_agree(tmp_path, algorithm):
    spec = spec_of(seeds=(5,))
    run_in(tmp_path / "run", spec, algorithm)
    train = jax.jit(training.make_train(algorithm, 32 * 12, log_every=1, num_evals=3, eval_episodes=4))
    _, pure = train(jax.random.key(5), algorithm.hypers)
    metrics, evaluations = content(tmp_path / "run")
    np.testing.assert_allclose(metrics["kl"], pure["kl"], rtol=1e-3, atol=1e-6)
    mode = evaluations[evaluations.policy == "mode"]["return"].to_numpy().reshape(3, 4)
    np.testing.assert_allclose(mode, pure["evaluations"].mode_return, rtol=1e-5)


def test_two_host_devices_give_what_one_gives_and_do_not_deadlock(tmp_path):
    code = """
import sys
from pgjax.host import lanes
lanes.use_host_devices(2)
import jax, pgjax
from pgjax.algorithms import ppo
from tests.probe_envs import Probe
assert len(jax.devices()) == 2
algorithm = ppo.make(Probe("responding"), ppo.Setup(num_envs=4, num_steps=8, num_minibatches=2))
for devices in (1, 2):
    spec = pgjax.RunSpec("ppo", "probe/responding", 320, seeds=(0, 1, 2), num_evals=2, eval_episodes=4, devices=devices)
    with pgjax.RunStore.create(f"{sys.argv[1]}/{devices}", spec.config()) as store:
        assert pgjax.run(spec, store, algorithm=algorithm).status == "finished"
"""
    done = run_python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    (one, one_evaluations), (two, two_evaluations) = content(tmp_path / "1"), content(tmp_path / "2")
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(one_evaluations["return"], two_evaluations["return"], rtol=1e-5)


_TRAIN = [sys.executable, "-m", "pgjax", "train", "ppo", "--preset", "none"]


def _kill_and_resume(tmp_path, num_kills, env_name="gymnax/CartPole-v1", total="100000"):
    # Of more episodes than these a slow machine plays fewer, as many as the time it took allows.
    options = ["--env", env_name, "--seeds", "2", "--total-env-steps", total, "--setup.num-envs", "8"]
    options += ["--num-evals", "2", "--eval-episodes", "4"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

    def start(name, *more):
        command = [*_TRAIN, *options, "--out", str(tmp_path / name), *more]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    began = time.monotonic()
    whole = start("whole")
    assert whole.wait(300) == 0, whole.stdout.read()
    duration = time.monotonic() - began
    random = np.random.default_rng(1)
    for _ in range(num_kills):
        exists = (tmp_path / "killed" / "run.json").exists()
        process = start("killed", *(["--resume"] if exists else []))
        time.sleep(random.uniform(0.3, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    exists = (tmp_path / "killed" / "run.json").exists()
    last = start("killed", *(["--resume"] if exists else []))
    assert last.wait(300) == 0, last.stdout.read()
    for whole, killed in zip(content(tmp_path / "whole"), content(tmp_path / "killed"), strict=True):
        pd.testing.assert_frame_equal(whole, killed, check_exact=True)
    algorithm = pgjax.RunSpec.from_config(pgjax.load(tmp_path / "whole").config).build()
    assert_same_bits(final_state(tmp_path / "whole", algorithm, 2), final_state(tmp_path / "killed", algorithm, 2))


def test_kill_9_in_the_middle_changes_no_bit(tmp_path):
    _kill_and_resume(tmp_path, 1)


@pytest.mark.slow
def test_ten_kills_change_no_bit(tmp_path):
    _kill_and_resume(tmp_path, 10)


@pytest.mark.slow
def test_kills_change_no_bit_on_c_mujoco(tmp_path):
    _kill_and_resume(tmp_path, 3, "mujoco/Ant-v5", "60000")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_at_a_checkpoint_and_says_how_to_go_on(tmp_path, number):
    options = ["--env", "gymnax/CartPole-v1", "--total-env-steps", "50000000", "--num-evals", "0"]
    command = [*_TRAIN, *options, "--out", str(tmp_path / "run")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "env steps/s" in line or "/s " in line:
            break
    process.send_signal(number)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert f"continue with: pgjax train ppo --out {tmp_path / 'run'} --resume" in said
    assert "Traceback" not in errors
    assert pgjax.load(tmp_path / "run").status == "interrupted"
    assert checkpoints.latest_checkpoints(tmp_path / "run" / "checkpoints")
