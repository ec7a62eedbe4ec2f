"""Sweeps of real processes: workers and drivers die, and nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_sweeps import contents, events, statuses_of, write

ROOT = Path(__file__).resolve().parent.parent


def start(file, out, *more):
    words = [sys.executable, "-m", "pgjax", "sweep", "run", str(file), "--out", str(out), *more]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds=120.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def checkpoints_of(out):
    """Complete checkpoints of groups: group's folder and step."""
    return [(path.parent.parent, int(path.name)) for path in (out / "groups").glob("*/checkpoints/*") if path.name.isdigit()]


def workers_of(out):
    """Processes that hold a group of the sweep."""
    found = set()
    for owner in (out / "groups").glob("*/.owner.json"):
        try:
            found.add(json.loads(owner.read_text())["pid"])
        except (OSError, ValueError):
            pass
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_sweep_killed_at_random_ends_as_if_nothing_had_happened(tmp_path):
    file = write(tmp_path / "sweep.toml", steps=32 * 400)
    whole = start(file, tmp_path / "whole")  # in a process too: lanes over as many devices are the same program
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    out = tmp_path / "out"
    random.seed(0)
    for _ in range(3):
        process = start(file, out)
        wait_for(lambda process=process: workers_of(out) or process.poll() is not None)
        time.sleep(random.uniform(0, 4))
        process.kill()
        process.wait()
        orphans = workers_of(out)
        wait_for(lambda orphans=orphans: not any(map(alive, orphans)), 20)
    process = start(file, out)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert contents(out) == contents(tmp_path / "whole")
    assert len(events(out, "started")) == 2, "no group is begun twice"


def test_a_worker_whose_driver_died_before_it_looked_ends_too():
    code = "import os, time; from pgjax.experiments.sweeps.work import follow_parent; follow_parent({}); time.sleep({})"
    for parent, seconds, expected in (("os.getppid()", 2, 0), ("os.getppid() + 1", 60, 1)):
        assert subprocess.run([sys.executable, "-c", code.format(parent, seconds)], cwd=ROOT, timeout=50).returncode == expected


def test_a_worker_that_dies_is_replaced(tmp_path):
    file, out = write(tmp_path / "sweep.toml", algorithms=("ppo",), steps=32 * 12_000), tmp_path / "out"
    process = start(file, out)
    wait_for(lambda: checkpoints_of(out) or process.poll() is not None)
    for pid in workers_of(out):
        os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "a worker process died" in said
    assert len(events(out, "started")) == 1 and len(events(out, "resumed")) == 1


def test_ctrl_c_ends_at_a_checkpoint_and_says_how_to_go_on(tmp_path):
    file, out = write(tmp_path / "sweep.toml", algorithms=("ppo",), steps=32 * 100_000), tmp_path / "out"
    process = start(file, out)
    wait_for(lambda: any((out / "groups").glob("*/parts/*")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "continue with: pgjax sweep run" in said and "Traceback" not in said
    (status,) = {(s.status, s.done > 0) for s in statuses_of(file, out)}
    assert status == ("interrupted", True)
    assert not workers_of(out)


@pytest.mark.slow
def test_a_ray_worker_that_is_killed_costs_no_more_than_its_last_seconds(tmp_path):
    """A real local cluster of two workers, each with a group; one is killed once it has a checkpoint."""
    pytest.importorskip("ray")
    file, out = write(tmp_path / "sweep.toml", steps=32 * 12_000), tmp_path / "out"
    process = start(file, out, "--engine", "ray", "--workers", "2")
    wait_for(lambda: checkpoints_of(out) or process.poll() is not None, 240)
    victim, before = checkpoints_of(out)[0]
    os.kill(json.loads((victim / ".owner.json").read_text())["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert [line["group"] for line in events(out, "resumed")] == [victim.name] and before > 0
    assert len(events(out, "started")) == 2
    assert {s.status for s in statuses_of(file, out)} == {"finished"}


@pytest.mark.slow
def test_submitit_runs_jobs_that_go_on_after_they_fail(tmp_path):
    """Its executor for this machine in place of a cluster; a job that is killed is sent again and goes on."""
    pytest.importorskip("submitit")
    more = '[engine]\nname = "slurm"\ncluster = "local"\n'
    file = write(tmp_path / "sweep.toml", algorithms=("ppo",), steps=32 * 12_000, more="\n" + more)
    out = tmp_path / "out"
    process = start(file, out)
    wait_for(lambda: checkpoints_of(out) or process.poll() is not None, 240)
    for pid in workers_of(out):
        os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert "ended without a result" in said and len(events(out, "resumed")) == 1


# --- the dry run
