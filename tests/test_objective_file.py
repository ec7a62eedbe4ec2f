"""Learned objectives named where others are: in train, in a sweep file, in a comparison, in pictures."""

import dataclasses

import jax
import numpy as np
import pytest

import pgjax
from pgjax.algorithms import lpo
from pgjax.errors import RequestError
from pgjax.experiments import compare, learned_pictures, meta_evaluation, objective_file
from pgjax.experiments.sweeps.folder import cell_of
from pgjax.experiments.sweeps.sweep_file import specs_of
from pgjax.host.display import Display
from pgjax.host.runner import Event, RunSpec
from pgjax.learned import files as learned_files
from pgjax.learned.files import Learned


@pytest.fixture
def weights(tmp_path):
    """``weights(name, temporal, scale) -> file`` of a drift that is not PPO's."""

    def write(name="mine", temporal=False, scale=0.3):
        params = lpo.init_params(jax.random.key(0), temporal, hidden=4)
        params["out"] = params["out"] + scale
        convention = lpo.Convention(temporal=temporal)
        seen = {"range": {"log_ratio": [-1.0, 1.0], "advantage": [-4.0, 4.0]}}
        return learned_files.save(tmp_path / f"{name}.npz", Learned("lpo", params, dataclasses.asdict(convention), seen))

    return write


def test_a_name_is_recorded_with_the_hash_of_its_file(weights):
    file = weights()
    source = f"lpo:{file}"
    pinned = objective_file.pinned(source)
    assert pinned == f"{source}@{learned_files.digest(file)[:12]}" and objective_file.pinned(pinned) == pinned
    assert objective_file.split_hash(pinned)[0] == source
    assert objective_file.pinned("mine.py:f") == "mine.py:f" and objective_file.pinned(None) is None
    for name in (source, pinned):
        assert objective_file.load_objective(name).limits == ((-1.0, 1.0), (-4.0, 4.0))
    weights(scale=0.4)
    with pytest.raises(RequestError, match="the weights of"):
        objective_file.load_objective(pinned)
    assert objective_file.load_objective(source).params["out"][0] == np.float32(0.4)
    for name, words in (
        ("lpo:nothing", "not shipped"),
        ("lpo:no/where.npz", "no file"),
        ("mine.npz", "must be FILE.py:NAME or"),
    ):
        with pytest.raises(RequestError, match=words):
            objective_file.load_objective(name)


def test_in_a_sweep_other_weights_are_other_cells(weights):
    content = {"algorithms": ["ppo"], "envs": ["toy/Chain-7"], "objective": f"lpo:{weights()}"}
    (spec,) = specs_of(content)
    assert spec.objective == objective_file.pinned(content["objective"])
    name = cell_of(spec).name
    assert cell_of(next(specs_of(content))).name == name
    weights(scale=0.4)
    assert cell_of(next(specs_of(content))).name != name


def test_in_a_comparison_it_is_ppo_with_that_objective(weights, tmp_path):
    name = f"lpo:{weights()}"
    hypers, setup = {"learning_rate": "0.01"}, {"num_envs": "2", "num_steps": "16", "hidden_sizes": "4,4"}
    request = compare.Request(
        "toy/Chain-7", ("ppo", name), seeds=2, total_env_steps=64, setup=setup, hypers=hypers, num_evals=1, eval_episodes=4
    )
    env = compare.make_env(request)
    plan = compare.make_plan(request, env)
    assert plan.specs[name].algorithm == "ppo" and plan.specs[name].objective == objective_file.pinned(name)
    assert plan.specs["ppo"].objective is None and plan.specs[name].setup == plan.specs["ppo"].setup
    assert compare.folder_of(name).startswith("lpo-") and "/" not in compare.folder_of(name)
    said = []
    assert compare.compare(request, tmp_path / "out", say=said.append)
    assert f"\n{name}" in said[-2] and (tmp_path / "out" / "compare.png").stat().st_size > 5000
    runs = [pgjax.load(tmp_path / "out" / compare.folder_of(n)) for n in ("ppo", name)]
    assert "outside_range" in runs[1].metrics and "outside_range" not in runs[0].metrics
    assert [result.algorithm for result in compare.results_of(runs)] == ["ppo", name]
    assert compare.compare(None, tmp_path / "out", resume=True, say=said.append)
    page = meta_evaluation.page_of({"toy/Chain-7": tmp_path / "out"}, ["ppo", name])
    assert f"| environment | ppo | {name} |" in page and f"| {name} | 0." in page
    # What a learned drift was meta-trained with, no preset may take away.
    assert "normalize_advantage" in lpo.DEFINING


def test_the_page_puts_returns_and_probabilities_together(monkeypatch, tmp_path):
    """Four seeds; by hand: 3 of 16 pairs have the second ahead on one task and all 16 on the other."""
    returns = {"ppo": {"a": [1.0, 2, 3, 4], "b": [0.0, 0, 0, 0]}, "lpo:x": {"a": [0.0, 0, 0, 3.5], "b": [5.0, 6, 7, 8]}}

    class Run:
        def __init__(self, path):
            self.name, self.task = {"ppo": "ppo", "lpo-x": "lpo:x"}[path.name], path.parent.name
            self.config = {"seeds": [0, 1, 2, 3]}

    monkeypatch.setattr(pgjax, "load", Run)
    monkeypatch.setattr(compare, "final_returns", lambda run, seeds: np.array(returns[run.name][run.task]))
    monkeypatch.setattr("pgjax.experiments.plots.finite_seeds", lambda run: [0, 1, 2, 3])
    page = meta_evaluation.page_of({"a": tmp_path / "a", "b": tmp_path / "b"}, ["ppo", "lpo:x"])
    assert "| lpo:x | 0.59 [" in page  # (3 / 16 + 1) / 2
    assert "| b | 0 [0, 0] | 6.5 [" in page


def test_a_run_outside_the_range_says_so(capsys):
    spec = RunSpec("ppo", "toy/Chain-7", 100)
    result = pgjax.host.runner.RunResult("finished", "x", 100, [], dict.fromkeys(("compile", "train", "evaluate", "save"), 0.0))
    for share, says in ((0.004, False), (0.3, True), (None, False)):
        display = Display(spec, "again")
        rows = {"env_steps": np.array([[100]]), "episodes": np.array([[1.0]]), "episode_return": np.array([[1.0]])}
        rows |= {} if share is None else {"outside_range": np.array([[share]])}
        display(Event("started", {"lanes": 1, "env_steps": 100, "done_env_steps": 0, "path": "x"}))
        display(Event("rows", {"rows": rows, "env_steps": 100, "seconds": 1.0}))
        display(Event("finished", {"result": result}))
        assert ("meta-trained on" in capsys.readouterr().out) == says


@pytest.mark.slow
def test_pictures(weights, tmp_path):
    assert learned_pictures.draw(f"lpo:{weights()}", tmp_path / "a.png") == [tmp_path / "a.png"]
    files = learned_pictures.draw(f"lpo:{weights('ta', temporal=True)}", tmp_path / "b.png")
    assert [file.name for file in files] == ["b.png", "b-time.png"]
    assert all(file.stat().st_size > 10000 for file in files)
    ratio, advantage = np.array([0.5, 1.0, 1.1, 1.5]), np.array([-1.0, 2.0])
    f, slope = learned_pictures.drift_and_slope(learned_pictures.CLOSED_FORMS["PPO"], ratio, advantage)
    np.testing.assert_allclose(f, [[0.3, 0, 0, 0], [0, 0, 0, 0.6]], atol=1e-6)
    np.testing.assert_allclose(slope, [[0, 1, 1, 1], [1, 1, 1, 0]], atol=1e-5)
