"""Search: what is proposed, judged and dropped, with runs in place of training that return what a formula says."""

import json
import math
from typing import ClassVar

import numpy as np
import pytest

import pgjax
from pgjax.experiments.results import Result
from pgjax.experiments.sweeps import driver, engines, search
from pgjax.experiments.sweeps.folder import Group, SweepFolder
from pgjax.experiments.sweeps.sweep_file import read_sweep
from pgjax.experiments.sweeps.work import Outcome

optuna = pytest.importorskip("optuna")
FILE = """
algorithms = ["ppo"]
envs = ["gymnax/CartPole-v1"]
seeds = 2
preset = "none"
total_env_steps = 9000
num_evals = 9
[setup]
num_envs = 2
num_steps = 50
[search]
{search}
[search.space]
learning_rate = {{ low = 1e-5, high = 1e-1, log = true }}
entropy_coef = [0.0, 0.01]
"""


def worth(config):
    """Best at a learning rate of 1e-3; a rate above 3e-2 blows up."""
    return -abs(math.log10(config["learning_rate"]) + 3) - config["entropy_coef"]


class Formula:
    """An engine whose runs return ``worth``; ``stop_after`` groups it is interrupted."""

    budgets: ClassVar = []
    stop_after: ClassVar = None

    def __init__(self, say=print, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, tasks):
        for task in tasks:
            if Formula.stop_after is not None and len(Formula.budgets) >= Formula.stop_after:
                raise KeyboardInterrupt
            folder = SweepFolder(task.sweep)
            group = Group.read(folder.groups / f"{task.group}.json")
            Formula.budgets.append((group.spec.total_env_steps, len(group.cells)))
            for name, number, seeds in group.cells:
                config = group.spec.configs[number]
                bad = seeds if config["learning_rate"] > 3e-2 else ()
                value = np.full((len(seeds) - len(bad), 1), worth(config))
                spec = {**group.spec.config(), "configs": [config]}
                status = "failed" if bad else "finished"
                kept = tuple(seed for seed in seeds if seed not in bad)
                result = Result(str(folder.path), status, spec, seeds=kept, frozen=tuple(bad), env_steps=np.array([1]))
                result.returns["mode"] = value
                (folder.cells / name).mkdir(parents=True, exist_ok=True)
                (folder.cells / name / "result.json").write_text(result.dump())
            folder.drop_group(group)
            yield task, Outcome(group.id, "finished")


@pytest.fixture
def formula(monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "local", Formula)
    monkeypatch.setattr(Formula, "budgets", [])
    monkeypatch.setattr(Formula, "stop_after", None)
    monkeypatch.setattr(driver, "check_specs", lambda specs: None)


def write(path, table):
    path.write_text(FILE.format(search=table))
    return path


def trials_of(out):
    (name,) = optuna.get_all_study_names(f"sqlite:///{out / 'search.db'}")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{out / 'search.db'}")
    return [(trial.number, trial.state.name, trial.params, trial.value) for trial in study.get_trials()]


def run(file, out):
    return driver.run_sweep(file, driver.Options(out), say=lambda text: None)


def test_each_generation_is_one_program_and_a_rung_lets_the_best_go_on(tmp_path, formula):
    file = write(tmp_path / "search.toml", "trials = 18\npopulation = 9\nrungs = 3\neta = 3")
    assert run(file, tmp_path / "out")
    trials = trials_of(tmp_path / "out")
    expected = []
    for start in (0, 9):
        generation = [(worth(params), number) for number, _, params, _ in trials[start : start + 9]]
        sound = [pair for pair in sorted(generation, reverse=True) if trials[pair[1]][2]["learning_rate"] <= 3e-2]
        second = sound[: math.ceil(len(sound) / 3)]
        third = second[: math.ceil(len(second) / 3)]
        expected += [(1000, 9), (3000, len(second)), (9000, len(third))]
        for value, number in generation:
            state = trials[number][1]
            if (value, number) in third:
                assert state == "COMPLETE" and trials[number][3] == pytest.approx(value)
            else:
                assert state == ("PRUNED" if (value, number) in sound else "FAIL")
    assert Formula.budgets == expected
    best = json.loads((tmp_path / "out" / "best.json").read_text())["ppo on gymnax/CartPole-v1"]
    assert best["value"] == max(value for _, state, _, value in trials if state == "COMPLETE") and best["trials"] == 18


@pytest.mark.parametrize("after", [n if n in (0, 3) else pytest.param(n, marks=pytest.mark.slow) for n in range(6)])
def test_a_search_that_was_stopped_goes_on_to_the_same_trials(tmp_path, formula, after):
    file = write(tmp_path / "search.toml", "trials = 12\npopulation = 6\nrungs = 2\neta = 2")
    assert run(file, tmp_path / "whole")
    Formula.budgets.clear()
    Formula.stop_after = after
    assert not run(file, tmp_path / "out") or after >= 4
    Formula.stop_after = None
    assert run(file, tmp_path / "out")
    assert trials_of(tmp_path / "out") == trials_of(tmp_path / "whole")
    assert len(Formula.budgets) == 4, "no rung is trained twice"


def test_later_trials_learn_from_earlier_ones(tmp_path, formula):
    """Drawn at random, three trials in ten lie within 0.6 decades of the best; half of 40 by luck has probability 0.7 %."""
    near = {}
    for sampler in ("tpe", "random"):
        file = write(tmp_path / f"{sampler}.toml", f'trials = 50\npopulation = 10\nsampler = "{sampler}"')
        assert run(file, tmp_path / sampler)
        distance = [abs(math.log10(params["learning_rate"]) + 3) for _, _, params, _ in trials_of(tmp_path / sampler)]
        near[sampler] = sum(each < 0.6 for each in distance[10:])
    assert near["tpe"] >= 20 > near["random"], near


def test_a_rung_is_the_beginning_of_the_whole_run(tmp_path):
    """Schedules run to the end of the whole budget, rounded up to whole iterations of 100 steps as the run itself does."""
    (spec,) = read_sweep(write(tmp_path / "search.toml", "rungs = 3")).specs
    table = search.read_search({"rungs": 3, "space": {"gamma": [0.9]}})
    assert search.budgets(table, 9000) == [1000, 3000, 9000]
    short = search.rung_spec(spec, 1000)
    assert (short.total_env_steps, short.num_evals, short.configs[0]["anneal_env_steps"]) == (1000, 1, 9000.0)
    assert search.rung_spec(spec, 9000) == spec


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("trials = 0", ["search.trials = 0", "at least 1"]),
        ("eta = 1", ["search.eta = 1", "at least 2"]),
        ('sampler = "grid"', ["search.sampler = 'grid'", "tpe, random"]),
        ('metric = "best"', ["search.metric = 'best'", "final, area"]),
        ("trails = 3", ["search.trails", "trials"]),
        ('storage = "nowhere://x"', ["search.storage = 'nowhere://x'"]),
    ],
)
def test_a_wrong_table_is_answered_in_one_line(tmp_path, formula, table, words):
    file = write(tmp_path / "search.toml", table)
    with pytest.raises(pgjax.RequestError) as raised:
        run(file, tmp_path / "out")
    assert "\n" not in str(raised.value) and all(word in str(raised.value) for word in words), raised.value


def test_a_space_that_the_algorithm_does_not_have_and_a_grid_beside_a_search(tmp_path, formula):
    file = write(tmp_path / "search.toml", "trials = 3")
    text = file.read_text()
    for wrong, said in (
        (text.replace("entropy_coef", "entropy_koef"), "entropy_koef"),
        (text + "[grid]\ngamma = [0.9]\n", r"move \[grid\]"),
        (text[: text.index("[search.space]")], r"\[search.space\] is missing"),
    ):
        file.write_text(wrong)
        with pytest.raises(pgjax.RequestError, match=said):
            run(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()
