"""Small sweeps for tests: files that train in seconds, and what came of them."""

import json

import pgjax
from pgjax.experiments.sweeps import driver
from pgjax.experiments.sweeps.folder import SweepFolder
from pgjax.experiments.sweeps.plan import cells_of
from pgjax.experiments.sweeps.sweep_file import read_sweep

SWEEP = """
algorithms = {algorithms}
envs = ["gymnax/CartPole-v1"]
seeds = 2
preset = "none"
total_env_steps = {steps}
num_evals = 2
eval_episodes = 2
log_every = 1
[setup]
num_envs = 2
num_steps = 16
num_epochs = 1
num_minibatches = 1
hidden_sizes = [4]
[grid]
learning_rate = {rates}
"""


def write(path, algorithms=("ppo", "spo"), rates=(1e-3, 1e-2), steps=128, more=""):
    path.write_text(SWEEP.format(algorithms=json.dumps(algorithms), rates=list(rates), steps=steps) + more)
    return path


def run(file, out, say=lambda text: None, **options):
    return driver.run_sweep(file, driver.Options(out, **options), say=say)


def contents(out):
    """By cell: its episodes in a fixed order, as bytes; and the bytes of its policies' files."""
    found = {}
    for folder in sorted((out / "cells").iterdir()):
        loaded = pgjax.load(folder)
        rows = loaded.evaluations.sort_values(["seed", "env_steps", "policy", "episode"], ignore_index=True)
        metrics = loaded.metrics.sort_values(["seed", "iteration"], ignore_index=True)
        found[folder.name] = (rows.to_csv(), metrics.to_csv())
    return found


def events(out, kind):
    return [line for line in SweepFolder(out).journal() if line["event"] == kind]


def statuses_of(file, out):
    return SweepFolder(out).statuses(cells_of(read_sweep(file).specs))


# --- files that are not what they were
