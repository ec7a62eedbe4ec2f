"""Lanes: how much memory there is, how many lanes it is enough for, and on how many threads they compute."""

import dataclasses
import os
from types import SimpleNamespace

import pytest

from pgjax.algorithms import ppo, sac
from pgjax.experiments.bench import memory_of_run
from pgjax.host import lanes
from tests.processes import run_python

CPU, GPU = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="gpu")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def free(root, membership):
    (root / "membership").write_text(membership)
    return lanes.cgroup_free_bytes(root, root / "membership")


def test_page_cache_of_a_control_group_counts_as_free(tmp_path):
    stat = "anon 300\ninactive_file 250\nactive_file 50"
    write(tmp_path / "job", memory__max=1000, memory__current=600, memory__stat=stat)
    assert free(tmp_path, "0::/job\n") == [1000 - 600 + 250]
    stat = "inactive_file 7\ntotal_inactive_file 250"
    write(tmp_path / "memory", memory__limit_in_bytes=1000, memory__usage_in_bytes=600, memory__stat=stat)
    assert free(tmp_path, "3:cpu,cpuacct:/job\n4:memory:/\n") == [650]


def test_every_control_group_above_the_process_limits_it(tmp_path):
    write(tmp_path / "slurm", memory__max=5000, memory__current=1000)
    write(tmp_path / "slurm" / "step", memory__max=3000, memory__current=100)
    write(tmp_path / "slurm" / "step" / "task", memory__max="max", memory__current=100)
    write(tmp_path / "other", memory__max=1, memory__current=1)
    assert sorted(free(tmp_path, "0::/slurm/step/task\n")) == [2900, 4000]
    # In a container the path may be the host's: only the mount itself is there.
    write(tmp_path, memory__max=900, memory__current=100)
    assert free(tmp_path, "0::/docker/1234\n") == [800]
    assert free(tmp_path / "other", "") == [0]


def test_without_control_groups_the_machine_decides(tmp_path, monkeypatch):
    assert lanes.cgroup_free_bytes(tmp_path / "nothing", tmp_path / "nothing") == []
    monkeypatch.setattr(lanes, "cgroup_free_bytes", lambda: [])
    monkeypatch.setattr(lanes, "_read", lambda path: "MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    assert lanes.available_bytes(CPU) == int(0.7 * 2 * 2**20)
    monkeypatch.setattr(lanes, "cgroup_free_bytes", lambda: [2**20, 2**30])
    assert lanes.available_bytes(CPU) == int(0.7 * 2**20)
    monkeypatch.setattr(lanes, "cgroup_free_bytes", lambda: [-5])
    assert lanes.available_bytes(CPU) == 0


@pytest.mark.parametrize("device", [CPU, GPU])
def test_as_many_lanes_as_fit_are_predicted_to_fit(device):
    program, num_lanes = 40 << 30, 100
    for available in (0, 1 << 30, 7 << 30, 25 << 30, 100 << 30):
        fit = lanes.lanes_that_fit(num_lanes, program, device, available)
        assert 0 <= fit <= num_lanes
        assert fit == 0 or lanes.run_bytes(program * fit // num_lanes, device) <= available
        assert fit == num_lanes or lanes.run_bytes(program * (fit + 1) // num_lanes, device) > available


def test_the_predicted_peak_is_never_below_what_the_process_holds():
    held = lanes.peak_bytes(0)
    assert held > 50 << 20
    assert lanes.peak_bytes(1 << 40) >= (1 << 40) + (50 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", [1, 32])
def test_the_predicted_peak_is_near_the_actual_one(num_lanes):
    predicted, peak = memory_of_run(
        env="gymnax/CartPole-v1", setup={"num_envs": 64}, total_env_steps=10**4, seeds=tuple(range(num_lanes)), num_evals=1
    )
    assert peak / 1.5 < predicted < peak * 1.5


def test_which_programs_are_small():
    small = ppo.Setup(num_envs=4, num_steps=128, num_minibatches=4, hidden_sizes=(64, 64))
    assert lanes.is_small(small, "gymnax/CartPole-v1")
    assert lanes.is_small(dataclasses.replace(small, num_envs=16, hidden_sizes=None), "gymnax/CartPole-v1")
    for larger in (
        dict(num_envs=64),
        dict(hidden_sizes=(64, 256)),
        dict(critic_hidden_sizes=(256,)),
        dict(num_envs=20, num_minibatches=1),
    ):
        assert not lanes.is_small(dataclasses.replace(small, **larger), "gymnax/CartPole-v1")
    assert not lanes.is_small(small, "gymnax/Breakout-MinAtar") and not lanes.is_small(sac.Setup(), "gymnax/Pendulum-v1")


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_lane_of_a_small_program_computes_on_one_thread(tmp_path, seeds):
    request = ["train", "ppo", "--env", "gymnax/CartPole-v1", "--preset", "none", "--seeds", str(seeds)]
    request += ["--total-env-steps", "64", "--num-evals", "0", "--setup.num-envs", "2", "--setup.num-steps", "16"]
    code = f"""
import os
os.environ.pop("PJRT_NPROC", None)
from pgjax import cli
assert cli._main({[*request, "--out", str(tmp_path / "run")]!r}) == 0
import jax
print(len(jax.devices()), os.environ.get("PJRT_NPROC"))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    assert done.stdout.splitlines()[-1] == ("1 1" if seeds == 1 else f"{cores} None")
