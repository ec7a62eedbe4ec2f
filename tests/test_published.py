"""The published numbers: every file has the fields it should, and numbers typed a second time by hand agree."""

import math
import re
import tomllib
from pathlib import Path

import pytest

from pgjax.envs import list_envs
from pgjax.experiments.reproduce.measured import RESULTS, Measured, dump
from pgjax.experiments.reproduce.paper_file import read_paper
from pgjax.experiments.results import Result

FOLDER = Path(__file__).parents[1] / "experiments" / "published"
FILES = {path.stem: tomllib.loads(path.read_text()) for path in sorted(FOLDER.glob("*.toml"))}
MARKS = {"verified", "second-hand", "read off a figure", "not verified"}
SPOT_CHECKS = [
    ("ppo", "paper, no clipping or penalty", "average of seven tasks", [-0.39]),
    ("ppo", "paper, fixed KL 10", "average of seven tasks", [0.69]),
    ("ppo", "CleanRL, 8 M steps", "HalfCheetah-v4", [2637.19, 1068.49]),
    ("ppo", "CleanRL, 8 M steps", "HumanoidStandup-v4", [109325.87, 16161.71]),
    ("ppo", "Tianshou, 3 M steps", "InvertedDoublePendulum-v2", [9231.3, 270.4]),
    ("ppo", "Engstrom, PPO-M", "Humanoid-v2", [674, 656, 695]),
    ("ppo", "Brax sweep, 500 M steps, median", "fetch", [13.2]),
    ("trpo", "baselines trpo_mpi", "HalfCheetah-v2", [1289.7]),
    ("trpo", "paper, Atari, vine", "Q*bert", [7732.5]),
    ("trpo", "Tianshou NPG", "InvertedDoublePendulum-v2", [9243.2, 276.0]),
    ("trpo", "PPO paper, TRPO", "Reacher-v1", [-115]),
    ("reinforce", "Tianshou REINFORCE, 10 M steps", "Ant-v3", [1108.1, 323.1]),
    ("reinforce", "Tianshou A2C, 3 M steps", "InvertedDoublePendulum-v2", [9351.3, 12.8]),
    ("reinforce", "SB3 zoo A2C, MuJoCo", "Ant-v3", [-44, 63]),
    ("guide", "REINFORCE, 1 M steps", "HalfCheetah-v4", [210]),
    ("guide", "PPO, 8 M steps", "Humanoid-v4", [7420, 1000]),
    ("guide", "V-MPO, 8 M steps", "Humanoid-v4", [850]),
    ("mdpo", "on-policy loaded, MDPO", "Ant-v2", [5211, 43]),
    ("mdpo", "off-policy minimal, SAC", "Ant-v2", [378, 33]),
    ("spo", "PPO, 3 layers", "Ant-v4", [5270]),
    ("spo", "SPO, 7 layers", "Walker2d-v4", [3070, 2030, 4180]),
    ("spo", "Atari, SPO", "UpNDown", [65000]),
    ("fixpo", "FixPO, 1 M steps", "HalfCheetah-v3", [2590]),
    ("fixpo", "FixPO, 10 M steps", "Swimmer-v3", [115, 102, 123]),
    ("fixpo", "KL Proj., 10 M steps", "Reacher-v2", [-9.1]),
    ("fixpo", "fixup steps, C_beta 10, 3 M steps", "Walker2d-v3", [0.8]),
    ("dpo", "learn-rl-algorithms, MinAtar", "Freeway", [61.84]),
    ("props", "PPO, IQM, 1 M steps", "Swimmer-v4", [112, 105, 115]),
    ("props", "PPO-Privileged, mean, 12 M steps", "Humanoid-v4", [5601, 79]),
    ("props", "PROPS, IQM at 75 % of 6 M steps", "Humanoid-v4", [5245]),
    ("props", "fixed random target, ratio, 16384 samples", "Humanoid-v4", [0.71]),
    ("sac", "CleanRL", "HalfCheetah-v2", [9634.89, 1423.73]),
    ("sac", "SB3 zoo, LunarLanderContinuous", "LunarLanderContinuous-v2", [260.4, 65.5]),
]


def test_the_files_are_there():
    papers = "ppo trpo gae reinforce guide vmpo mdpo spo fixpo dpo lpo ta props avg sac lpg groove"
    assert set(FILES) == set(papers.split())


@pytest.mark.parametrize("stem", FILES)
def test_heads_and_names(stem):
    paper = read_paper(stem)
    assert paper.title and paper.source and (paper.numbers or paper.claims)
    for part in (paper.numbers, paper.claims):
        names = [item.name for item in part]
        assert len(names) == len(set(names))
    assert all(claim.text and claim.source and claim.mark in MARKS for claim in paper.claims)


@pytest.mark.parametrize("stem", FILES)
def test_numbers_are_what_their_fields_say(stem):
    known = {entry.name for entry in list_envs()}
    for entry in read_paper(stem).numbers:
        assert entry.mark in MARKS, entry.name
        assert entry.spread in {"std", "sem", "ci95", "half band", "none"}, entry.name
        assert entry.metric in {"training", "sample", "mode", "best", "other"}, entry.name
        assert entry.measured or entry.metric != "other", entry.name
        assert bool(entry.ours) != bool(entry.not_comparable), entry.name
        assert entry.env_steps >= 0 and entry.seeds >= 0 and entry.values, entry.name
        for env, numbers in entry.values.items():
            assert all(type(number) in (int, float) and math.isfinite(number) for number in numbers), entry.name
            low, high = numbers[1:] if len(numbers) == 3 else (numbers[0], numbers[0])
            assert low <= numbers[0] <= high and (len(numbers) != 2 or numbers[1] >= 0), (entry.name, env)
            assert not entry.ours or entry.env_of(env) in known, (entry.name, env)
        assert (entry.spread == "none") == all(len(numbers) == 1 for numbers in entry.values.values()), entry.name


def test_numbers_typed_a_second_time():
    for stem, name, task, expected in SPOT_CHECKS:
        (entry,) = [entry for entry in FILES[stem]["numbers"] if entry["name"] == name]
        assert entry["values"][task] == expected, (stem, name, task)


def test_what_is_off_policy_is_told_from_what_is_not():
    """MDPO is two methods of one name."""
    found = {entry.name: entry.algorithm for entry in read_paper("mdpo").numbers if "MDPO" in entry.name}
    assert len(found) == 5
    for name, algorithm in found.items():
        assert algorithm == ("mdpo_off" if name.startswith("off-policy") else "mdpo"), name


def test_kept_results_name_no_folder_of_a_machine():
    for path in sorted(RESULTS.glob("*.json")):
        assert not re.findall(r'"/[^"]*"', path.read_text()), path.name
    command = ["/a/pgjax/__main__.py", "train", "ppo", "--out", "/b/c"]
    result = Result("/home/somebody/run", "finished", {}, provenance={"command": command})
    assert '"/' not in dump([Measured("run", result, {})], "pgjax")
