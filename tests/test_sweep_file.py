"""What a sweep file means, which cells and groups come of it, and what is said of a wrong one."""

import dataclasses
import math
import tomllib
from pathlib import Path

import jax
import pytest

import pgjax
from pgjax.errors import RequestError
from pgjax.experiments.sweeps import folder as folder_
from pgjax.experiments.sweeps.folder import SweepFolder, cell_of
from pgjax.experiments.sweeps.plan import cells_of, group_cells, plan
from pgjax.experiments.sweeps.sweep_file import read_sweep, sample
from pgjax.learned import files as learned_files
from pgjax.learned.files import Learned
from pgjax.learned.rule import RuleSpec, convention_of, init_rule

MINIMAL = """
algorithms = ["ppo"]
envs = ["gymnax/CartPole-v1"]
preset = "none"
"""


def read(tmp_path, text):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return read_sweep(path)


def test_every_combination_of_a_grid_is_a_run(tmp_path):
    sweep = read(
        tmp_path,
        """
        algorithms = ["ppo", "trpo"]
        envs = ["gymnax/CartPole-v1", "gymnax/Acrobot-v1"]
        seeds = 3
        preset = "none"
        total_env_steps = 1000
        [hypers]
        gamma = 0.9
        [grid]
        learning_rate = [1e-3, 1e-2]
        num_steps = [16, 32]
        [algorithm.trpo]
        total_env_steps = 2000
        grid = { learning_rate = [1e-4] }
        [env."gymnax/Acrobot-v1".hypers]
        gamma = 0.8
        """,
    )
    found = {(s.algorithm, s.env, s.total_env_steps, s.setup["num_steps"], *sorted(s.configs[0].items())) for s in sweep.specs}
    expected = set()
    for env, gamma in (("gymnax/CartPole-v1", 0.9), ("gymnax/Acrobot-v1", 0.8)):
        for steps in (16, 32):
            for rate in (1e-3, 1e-2):
                expected.add(("ppo", env, 1000, steps, ("gamma", gamma), ("learning_rate", rate)))
            expected.add(("trpo", env, 2000, steps, ("gamma", gamma), ("learning_rate", 1e-4)))
    assert found == expected
    assert {spec.seeds for spec in sweep.specs} == {(0, 1, 2)}


def test_presets_lie_under_what_the_file_says(tmp_path):
    text = 'algorithms = ["ppo"]\nenvs = ["gymnax/CartPole-v1"]\n[setup]\nnum_steps = 64\n'
    (spec,) = read(tmp_path, text).specs
    preset = pgjax.experiments.presets.find("auto", "ppo", "gymnax/CartPole-v1")
    assert spec.setup == {**preset["setup"], "num_steps": 64}
    assert spec.configs == (preset["hypers"],)
    assert spec.total_env_steps == preset["total_env_steps"]


def test_more_samples_keep_the_earlier_ones(tmp_path):
    text = MINIMAL + "[random]\nsamples = {}\nlearning_rate = {{ low = 1e-5, high = 1e-2, log = true }}\n"
    few, many = (read(tmp_path, text.format(samples)).specs for samples in (3, 6))
    assert many[:3] == few and len(set(spec.configs[0]["learning_rate"] for spec in many)) == 6
    with_another = read(tmp_path, text.format(3) + "entropy_coef = { low = 0.0, high = 0.1 }\n").specs
    assert [spec.configs[0]["learning_rate"] for spec in with_another] == [spec.configs[0]["learning_rate"] for spec in few]


@pytest.mark.parametrize(
    ("choices", "inside", "middle"),
    [
        ({"low": 1e-4, "high": 1.0, "log": True}, lambda x: 1e-4 <= x <= 1.0, lambda x: x < 1e-2),
        ({"low": 0.0, "high": 2.0}, lambda x: 0 <= x <= 2, lambda x: x < 1.0),
        ({"low": 1, "high": 4}, lambda x: x in (1, 2, 3, 4), lambda x: x <= 2),
        ([8, 16], lambda x: x in (8, 16), lambda x: x == 8),
    ],
)
def test_draws_are_spread_as_the_range_says(choices, inside, middle):
    draws = [sample("random.x", choices, (0, draw, "x")) for draw in range(2000)]
    assert all(map(inside, draws))
    # A fair coin of 2000 throws stays within 4.5 standard deviations of the middle.
    assert abs(sum(map(middle, draws)) - 1000) < 4.5 * math.sqrt(500)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("algorithms = [", ["not TOML"]),
        ('envs = ["gymnax/CartPole-v1"]', ["algorithms", "list of names"]),
        ('algorithms = ["ppo"]\nenvs = []', ["envs", "at least one"]),
        ('algorithms = ["ppo", "ppo"]\nenvs = ["gymnax/CartPole-v1"]', ["twice"]),
        ('algorithms = ["pppo"]\nenvs = ["gymnax/CartPole-v1"]', ["'pppo'", "ppo"]),
        (MINIMAL + "seed = 3", ["seed", "did you mean", "seeds"]),
        (MINIMAL + 'seeds = "3"', ["seeds = '3'", "whole number"]),
        (MINIMAL + "seeds = 0", ["seeds = 0", "at least 1"]),
        (MINIMAL + "seeds = [1, 1]", ["seeds = [1, 1]", "different"]),
        (MINIMAL + "seeds = true", ["seeds = True"]),
        (MINIMAL + "total_env_steps = 1e5", ["total_env_steps = 100000.0", "whole number"]),
        (MINIMAL + "seeds_per_cell = 0", ["seeds_per_cell = 0"]),
        (MINIMAL + "[grid]\nlearning_rat = [1]", ["grid.learning_rat", "learning_rate"]),
        (MINIMAL + "[grid]\nlearning_rate = 1e-3", ["grid.learning_rate = 0.001", "must be a list"]),
        (MINIMAL + "[grid]\nlearning_rate = []", ["at least one value"]),
        (MINIMAL + "[grid]\nlearning_rate = [1, 1]", ["twice"]),
        (MINIMAL + '[grid]\nlearning_rate = ["fast"]', ["grid.learning_rate = 'fast'", "number"]),
        (MINIMAL + "[grid]\nnum_steps = [1.5]", ["grid.num_steps = 1.5", "whole number"]),
        (MINIMAL + "[grid]\nhidden_sizes = [64]", ["grid.hidden_sizes = 64", "must be a list"]),
        (MINIMAL + '[grid]\nboundary = ["cut"]', ["grid.boundary = 'cut'", "bootstrap"]),
        (MINIMAL + "[grid]\nnormalize_obs = [1]", ["true or false"]),
        (MINIMAL + "[setup]\nlearning_rate = 1e-3", ["setup.learning_rate", "field of hypers"]),
        (MINIMAL + "[random]\nlearning_rate = { low = 1e-4, high = 1e-3 }", ["[random] has no samples"]),
        (MINIMAL + "[random]\nsamples = 0\nlearning_rate = [1]", ["random.samples = 0"]),
        (MINIMAL + "[random]\nsamples = 2\nlearning_rate = { low = 1, high = 1 }", ["low = 1", "below high"]),
        (MINIMAL + "[random]\nsamples = 2\nlearning_rate = { low = 0.0, high = 1, log = true }", ["above 0"]),
        (MINIMAL + "[random]\nsamples = 2\nlearning_rate = { low = 1 }", ["random.learning_rate", "low"]),
        (MINIMAL + "[random]\nsamples=2\nlearning_rate=[1]\n[grid]\nlearning_rate=[2]", ["[grid] and in [random]"]),
        (MINIMAL + "[algorithm.trpo.grid]\nclip_eps = [0.1]", ["[algorithm.trpo]", "not in algorithms"]),
        (MINIMAL + "[algorithm.ppo]\nseedz = 3", ["algorithm.ppo.seedz", "seeds"]),
        (MINIMAL + '[engine]\nname = "cloud"', ["engine.name = 'cloud'", "local, ray, slurm"]),
        (MINIMAL + 'preset = "none"', ["not TOML"]),
        (MINIMAL.replace("none", "nothing"), ["preset 'nothing'"]),
        (MINIMAL.replace('"ppo"', '"ppo", "trpo"') + "[grid]\nclip_eps = [0.1]", ["trpo", "algorithm.NAME.grid"]),
    ],
)
def test_a_wrong_file_is_answered_with_the_field_and_the_remedy(tmp_path, text, words):
    with pytest.raises(RequestError) as raised:
        read(tmp_path, text)
    said = str(raised.value)
    assert "\n" not in said and "sweep.toml" in said
    assert all(word in said for word in words), said


def test_a_cell_is_named_after_what_determines_its_result(tmp_path, monkeypatch):
    (spec,) = read(tmp_path, MINIMAL).specs
    name = cell_of(spec).name
    assert cell_of(dataclasses.replace(spec, devices=2, preset="mine")).name == name
    others = [
        dataclasses.replace(spec, seeds=(1,)),
        dataclasses.replace(spec, configs=({"gamma": 0.9},)),
        dataclasses.replace(spec, setup={"num_steps": 7}),
        dataclasses.replace(spec, total_env_steps=7),
        dataclasses.replace(spec, env_params={"gravity": 9.0}),
        dataclasses.replace(spec, num_evals=3),
    ]
    names = {cell_of(other).name for other in others}
    assert len(names) == len(others) and name not in names
    monkeypatch.setattr(pgjax, "__version__", "0.0.0")
    assert cell_of(spec).name != name
    monkeypatch.undo()
    monkeypatch.setitem(folder_._versions, "gymnax", "0.0.0")
    assert cell_of(spec).name != name


def test_the_code_of_an_own_objective_is_part_of_a_cell(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(log_ratio, advantage): return advantage")
    (spec,) = read(tmp_path, MINIMAL + f'objective = "{file}:f"').specs
    name = cell_of(spec).name
    file.write_text("def f(log_ratio, advantage): return 2 * advantage")
    assert cell_of(spec).name != name


def test_the_weights_of_a_rule_are_part_of_a_cell(tmp_path):
    text = MINIMAL.replace("ppo", "lpg")
    file = tmp_path / "rule.npz"
    names = []
    for seed in (0, 1, 0):
        spec = RuleSpec(hidden_size=4)
        learned_files.save(file, Learned("lpg", init_rule(spec, jax.random.key(seed)), convention_of(spec), {}))
        (found,) = read(tmp_path, f'rule = "{file}"\n{text}').specs
        assert found.rule.startswith(f"{file}@")
        names.append(cell_of(found).name)
    assert names[0] != names[1] and names[0] == names[2]
    assert read(tmp_path, text).specs[0].rule.startswith("lpg:default@")


def test_groups_are_setups_whatever_the_hypers_and_seeds(tmp_path):
    text = MINIMAL + "seeds = 20\ntotal_env_steps = 10\n[grid]\nlearning_rate = [1e-3, 1e-2, 1e-1]\nnum_steps = [16, 32]\n"
    cells = cells_of(read(tmp_path, text).specs)
    assert len(cells) == 2 * 3 * 3  # 20 seeds are blocks of 8, 8 and 4
    groups = group_cells(cells)
    assert len(groups) == 2
    for group in groups:
        assert len(group.spec.configs) == 3 and group.spec.seeds == tuple(range(20))
        lanes = [(config, seed) for _, config, seeds in group.cells for seed in seeds]
        assert sorted(lanes) == [(config, seed) for config in range(3) for seed in range(20)]
    assert sorted(name for group in groups for name in group.names) == sorted(cell.name for cell in cells)


def test_cells_that_are_there_are_not_planned_again(tmp_path):
    """A sweep with one more learning rate and more seeds has only those to run; ragged remainders are programs of their own."""
    text = MINIMAL + "seeds = {}\nseeds_per_cell = 2\n[grid]\nlearning_rate = {}\n"
    before = cells_of(read(tmp_path, text.format(2, "[1e-3, 1e-2]")).specs)
    after = cells_of(read(tmp_path, text.format(4, "[1e-3, 1e-2, 1e-1]")).specs)
    done = {cell.name for cell in before}
    assert done < {cell.name for cell in after}
    sweep = SweepFolder(tmp_path / "out")
    statuses = [folder_.CellStatus(cell, "finished" if cell.name in done else "pending") for cell in after]
    groups = plan(sweep, statuses)
    lanes = sorted((config["learning_rate"], seed) for g in groups for config in g.spec.configs for seed in g.spec.seeds)
    assert lanes == [(1e-3, 2), (1e-3, 3), (1e-2, 2), (1e-2, 3), (1e-1, 0), (1e-1, 1), (1e-1, 2), (1e-1, 3)]


def test_the_example_in_the_documentation_is_a_sweep(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```toml\n")[1:]]
    assert blocks
    for block in blocks:
        tomllib.loads(block)
        if "algorithms" in block:
            read(tmp_path, block)
