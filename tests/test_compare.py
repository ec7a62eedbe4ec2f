"""``pgjax compare``: what is shared, how the runs go on, and that the numbers are those of the stored evaluations."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import tomllib

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import pgjax
from pgjax import algorithms, cli, on_policy
from pgjax.algorithms import a2c, ppo, reinforce
from pgjax.errors import RequestError
from pgjax.experiments import compare as comparison
from pgjax.experiments import presets
from pgjax.experiments.compare import Request, common_budget, make_env, make_plan
from pgjax.experiments.family_table import family_table
from pgjax.experiments.shared_settings import DEFINES, MISSING, OWN, defining, read_value, shared_fields
from pgjax.host.runner import policies_of

ENV = "gymnax/CartPole-v1"
SETUP = ["--setup", "num_envs=4", "num_steps=16", "hidden_sizes=8"]
ARGUMENTS = [
    *("compare", "--env", ENV, "--algorithms", "ppo", "a2c", "--seeds", "4", "--total-env-steps", "600"),
    *("--num-evals", "2", "--eval-episodes", "3", *SETUP, "--hypers", "gamma=0.9"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished comparison of two algorithms, and what the command printed."""
    folder = tmp_path_factory.mktemp("comparisons") / "cartpole"
    assert cli._main([*ARGUMENTS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(finished):
    return {name: pgjax.load(finished / name) for name in ("ppo", "a2c")}


@pytest.fixture(scope="module")
def cartpole():
    return pgjax.make_env(ENV)


def plan_of(cartpole, *names, **changes):
    return make_plan(Request(ENV, names, **changes), cartpole)


def row_of(plan, field):
    (row,) = (row for row in plan.settings if row.field == field)
    return row


# --- what is shared


def test_shared_settings_are_ppos_on_the_environment():
    with open(presets._FOLDER / "gymnax-Pendulum-v1.toml", "rb") as file:
        preset = tomllib.load(file)["ppo"]
    shared = shared_fields("gymnax/Pendulum-v1")
    # The critic gets PPO's steps where it is fitted apart.
    assert shared["setup"].pop("value_epochs") == preset["setup"]["num_epochs"] == 10
    assert shared["setup"].pop("value_minibatches") == preset["setup"]["num_minibatches"] == 16
    for name, value in shared["setup"].items():
        assert value == preset["setup"].get(name, getattr(ppo.Setup(), name)), name
    for name, value in shared["hypers"].items():
        assert value == preset["hypers"].get(name, getattr(ppo.Hypers(), name)), name
    assert set(shared["setup"]) == set(on_policy.Setup.__dataclass_fields__)
    assert set(shared["hypers"]) == set(on_policy.Hypers.__dataclass_fields__) - {"objective"}


@pytest.mark.parametrize("name", algorithms.list_algorithms())
def test_what_defines_a_method_is_a_field_of_it(name):
    module = algorithms.get(name)
    known = {*module.Setup.__dataclass_fields__, *module.Hypers.__dataclass_fields__}
    assert set(defining(module)) <= known


@pytest.mark.parametrize("use_presets", [False, True])
def test_the_table_says_what_every_algorithm_runs_with(cartpole, use_presets):
    plan = plan_of(cartpole, "all", presets=use_presets, setup={"activation": "relu"}, hypers={"gamma": "0.9"})
    assert sorted([*plan.specs, *plan.left_out]) == sorted(algorithms.list_algorithms())
    assert plan.specs["lpg"].rule.startswith("lpg:default@")
    assert row_of(plan, "setup.activation").shared == "relu"
    assert row_of(plan, "hypers.gamma").shared == 0.9
    for name, spec in plan.specs.items():
        setup = comparison.build(spec, cartpole).setup
        hypers = dataclasses.replace(algorithms.get(name).Hypers(), **spec.configs[0])
        seen = set()
        for row in plan.settings:
            part, field = row.field.split(".")
            there = setup if part == "setup" else hypers
            if name in row.others and row.others[name] == (None, MISSING):
                assert not hasattr(there, field), (name, row)
            elif name in row.others:
                assert getattr(there, field) == row.others[name][0], row
            elif row.is_shared and hasattr(there, field):
                assert getattr(there, field) == row.shared, (name, row)
            else:
                assert not hasattr(there, field), (name, row)
            seen.add(row.field)
        held = {f"setup.{f}" for f in setup.__dataclass_fields__} | {f"hypers.{f}" for f in hypers.__dataclass_fields__}
        assert held - {"hypers.objective", "hypers.rule"} <= seen


def test_only_defining_fields_differ_from_the_shared_ones(cartpole):
    plan = plan_of(cartpole, "ppo", "a2c", "reinforce")
    assert row_of(plan, "setup.num_epochs").shared == ppo.Setup().num_epochs == 4
    assert row_of(plan, "setup.num_epochs").others == {"a2c": (1, DEFINES), "reinforce": (1, DEFINES)}
    assert row_of(plan, "setup.num_steps").others == {"reinforce": (reinforce.Setup().num_steps, DEFINES)}
    # A2C's own default does not define it.
    assert a2c.Hypers().learning_rate != ppo.Hypers().learning_rate
    assert row_of(plan, "hypers.learning_rate").others == {}
    assert plan.specs["a2c"].configs[0]["learning_rate"] == ppo.Hypers().learning_rate
    # A field of one method alone is its own, until it is asked for.
    assert row_of(plan, "hypers.clip_eps").others == {"ppo": (ppo.Hypers().clip_eps, OWN)}
    asked = plan_of(cartpole, "ppo", "a2c", hypers={"clip_eps": "0.1"})
    assert asked.specs["ppo"].configs[0]["clip_eps"] == row_of(asked, "hypers.clip_eps").shared == 0.1
    assert "clip_eps" not in asked.specs["a2c"].configs[0] and row_of(asked, "hypers.clip_eps").others == {}


def test_a_value_that_is_asked_for_does_not_reach_what_defines_a_method(cartpole):
    plan = plan_of(cartpole, "ppo", "a2c", setup={"num_epochs": "7"})
    assert plan.specs["ppo"].setup["num_epochs"] == 7
    assert "num_epochs" not in plan.specs["a2c"].setup
    assert row_of(plan, "setup.num_epochs").others == {"a2c": (1, DEFINES)}


def test_presets_take_the_place_of_shared_settings(cartpole):
    plan = plan_of(cartpole, "ppo", "a2c", presets=True, hypers={"gamma": "0.9"})
    preset = presets.find("auto", "a2c", ENV)
    assert plan.specs["a2c"].preset == plan.specs["ppo"].preset == ENV
    assert plan.specs["a2c"].setup == preset["setup"]
    assert plan.specs["a2c"].configs == ({**preset["hypers"], "gamma": 0.9},)
    told = row_of(plan, "setup.reward_scaling")
    assert not told.is_shared and told.others == {"ppo": ("none", "default"), "a2c": ("batch", f"preset {ENV}")}
    assert len({spec.total_env_steps for spec in plan.specs.values()}) == 1


def test_the_budget_is_whole_iterations_of_all_where_that_is_cheap():
    assert common_budget(1000, [64, 64]) == 1024
    assert common_budget(10_000, [512, 2000, 100]) == 10_000  # their least common multiple is 64 000
    assert common_budget(100_000, [512, 800]) == 102_400
    assert common_budget(500_000, [512, 2000]) == 512_000


def test_of_all_those_that_cannot_run_are_left_out(cartpole):
    plan = plan_of(cartpole, "all", setup={"boundary": "mask"})
    assert "reinforce" in plan.left_out and "boundary" in plan.left_out["reinforce"]
    assert "ppo" in plan.specs and "reinforce" not in plan.specs
    assert not any("reinforce" in row.others for row in plan.settings)
    assert "left out: reinforce" in comparison.opening(plan)
    with pytest.raises(RequestError, match=r"reinforce cannot run on gymnax/CartPole-v1: setup\.boundary"):
        plan_of(cartpole, "ppo", "reinforce", setup={"boundary": "mask"})


def test_environment_options_come_from_the_presets_and_must_agree(monkeypatch):
    assert comparison.env_options(Request("brax/hopper", ("ppo",))) == {"backend": "spring"}
    assert comparison.env_options(Request("brax/hopper", ("ppo",), env_options={"backend": "mjx"})) == {"backend": "mjx"}
    backends = {"ppo": "spring", "a2c": "mjx"}
    monkeypatch.setattr(presets, "find", lambda _, name, env: {"name": env, "env_options": {"backend": backends[name]}})
    disagree = Request("brax/hopper", ("ppo", "a2c"), presets=True)
    with pytest.raises(RequestError, match="ppo wants backend=spring and a2c wants backend=mjx"):
        comparison.env_options(disagree)
    assert comparison.env_options(dataclasses.replace(disagree, env_options={"backend": "mjx"})) == {"backend": "mjx"}


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("num_envs", "8", 8),
        ("normalize_obs", "true", True),
        ("normalize_advantage", "none", "none"),
        ("hidden_sizes", "none", None),
        ("hidden_sizes", "64,32", (64, 32)),
        ("policy_head_scale", "none", None),
        ("policy_head_scale", "1", 1.0),
        ("activation", "relu", "relu"),
    ],
)
def test_text_becomes_a_value_of_the_fields_type(cartpole, field, text, value):
    plan = plan_of(cartpole, "ppo", setup={field: text})
    assert row_of(plan, f"setup.{field}").shared == value
    assert type(row_of(plan, f"setup.{field}").shared) is type(value)


def test_text_of_another_type_is_refused():
    for text, hint in (("eight", int), ("8.0", int), ("yes", bool), ("a", float), ("64;64", tuple[int, ...])):
        with pytest.raises(ValueError, match="give "):
            read_value(text, hint)


# --- refused requests

COMPARE = ["compare", "--env", ENV]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compare"], ["--env"]),
        (["compare", "--env", "gymnax/CartPole-v2"], ["CartPole-v2", "CartPole-v1"]),
        ([*COMPARE, "--algorithms", "ppo", "a3c"], ["a3c", "a2c"]),
        ([*COMPARE, "--algorithms", "ppo", "ppo"], ["ppo", "twice"]),
        ([*COMPARE, "--algorithms", "all", "ppo"], ["all", "alone"]),
        ([*COMPARE, "--seeds", "0"], ["--seeds", "at least 1"]),
        ([*COMPARE, "--num-evals", "0"], ["--num-evals", "at least 1"]),
        ([*COMPARE, "--total-env-steps", "0"], ["total_env_steps", "at least 1"]),
        ([*COMPARE, "--eval-episodes", "0"], ["eval_episodes"]),
        ([*COMPARE, "--devices", "99"], ["devices = 99"]),
        ([*COMPARE, "--setup", "num_env=4"], ["num_env", "num_envs"]),
        ([*COMPARE, "--setup", "num_envs"], ["--setup", "K=V"]),
        ([*COMPARE, "--setup", "num_envs=four"], ["num_envs=four", "whole number"]),
        ([*COMPARE, "--setup", "boundary=wrong"], ["boundary=wrong", "bootstrap"]),
        ([*COMPARE, "--setup", "gamma=0.9"], ["gamma", "--hypers gamma"]),
        ([*COMPARE, "--hypers", "gamma=1.5"], ["gamma", "1.5"]),
        ([*COMPARE, "--hypers", "gamma=high"], ["gamma=high", "number"]),
        ([*COMPARE, "--algorithms", "a2c", "--hypers", "clip_eps=0.1"], ["clip_eps", "a2c"]),
        ([*COMPARE, "--algorithms", "a2c", "--setup", "num_epochs=2"], ["num_epochs=2", "defines", "a2c"]),
        ([*COMPARE, "--algorithms", "ppo", "reinforce", "--setup", "boundary=mask"], ["reinforce cannot run", "boundary"]),
        ([*COMPARE, "--env-option", "reset_mod=pool"], ["reset_mod", "reset_mode"]),
        ([*COMPARE, "--env-param", "gravitty=3"], ["gravitty", "gravity"]),
        (["compare", "--out", "nowhere", "--resume"], ["nowhere", "no comparison"]),
    ],
)
def test_a_wrong_request_is_answered_in_one_line(refuse, argv, words):
    refuse(argv, words)


def test_a_folder_that_is_not_empty_is_refused(answer, finished, tmp_path):
    code, said = answer([*ARGUMENTS, "--out", str(finished)])
    assert code == 2 and "holds a comparison" in said and "--resume" in said
    (tmp_path / "mine.txt").write_text("mine")
    code, said = answer([*ARGUMENTS, "--out", str(tmp_path)])
    assert code == 2 and "mine.txt" in said
    code, said = answer([*ARGUMENTS, "--out", str(tmp_path / "mine.txt")])
    assert code == 2 and "is a file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seeds", "5"], ["seeds is 4", "and 5"]),
        (["--setup", "num_envs=8"], ["setup is num_envs=4", "num_envs=8"]),
        (["--presets"], ["presets is false", "true"]),
        (["--algorithms", "reinforce"], ["algorithms is ppo a2c", "ppo a2c reinforce"]),
    ],
)
def test_another_request_is_refused_by_resume(answer, finished, change, words):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    code, said = answer([*ARGUMENTS, *change, "--out", str(finished), "--resume"])
    assert code == 2
    for word in words:
        assert word in said
    code, said = answer(["compare", "--out", str(finished), "--resume", "--seeds", "5"])
    assert code == 2 and "--seeds" in said
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


# --- runs


def test_the_runs_are_ordinary_and_equally_long(finished, runs, cartpole, tmp_path):
    for name, run in runs.items():
        assert run.status == "finished" and run.config["algorithm"] == name
        # 600 rounded up to whole iterations of 4 x 16.
        assert run.config["total_env_steps"] == run.metrics.env_steps.max() == 640
        assert run.config["seeds"] == [0, 1, 2, 3] and run.config["configs"][0]["gamma"] == 0.9
        assert run.config["setup"]["hidden_sizes"] == [8]
        algorithm = pgjax.make(name, cartpole, **run.config["setup"])
        assert policies_of(finished / name, algorithm)[1]["seed"].tolist() == [0, 1, 2, 3]
    assert cli._main(["plot", str(finished / "ppo"), str(finished / "a2c"), "--out", str(tmp_path / "c.png")]) == 0


def test_everything_is_written(finished):
    held = json.loads((finished / "compare.json").read_text())
    assert held["order"] == ["ppo", "a2c"] and held["request"]["seeds"] == 4
    assert held["command"] == f"pgjax {' '.join([*ARGUMENTS, '--out', str(finished)])}"
    assert (finished / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (finished / "compare.png").stat().st_size > 20_000
    told = (finished / "compare.md").read_text()
    for words in (
        held["command"],
        "| ppo |",
        "| a2c |",
        "`setup.num_epochs` | 4 | a2c: 1 (defines the method) |",
        "compare.png",
    ):
        assert words in told
    assert sorted(path.name for path in finished.iterdir()) == ["a2c", "compare.json", "compare.md", "compare.png", "ppo"]


def test_the_plan_survives_the_disk(finished, cartpole):
    plan = comparison.read_plan(finished)
    again = make_plan(plan.request, cartpole, plan.command)
    assert again.specs == plan.specs and again.request == plan.request and again.settings == plan.settings


def test_resume_of_a_finished_comparison_trains_nothing(capsys, finished, runs):
    assert cli._main(["compare", "--out", str(finished), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "ppo is finished already" in said and "a2c is finished already" in said and "compiled" not in said
    assert cli._main([*ARGUMENTS, "--devices", "1", "--out", str(finished), "--resume"]) == 0
    for name in runs:
        assert json.loads((finished / name / "run.json").read_text())["resumed"] == []


def test_an_interrupted_comparison_goes_on_where_it_was(capsys, finished, runs, tmp_path, monkeypatch):
    folder = tmp_path / "comparison"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "a2c")
    for name in ("compare.md", "compare.png"):
        (folder / name).unlink()

    def interrupted(spec, store, report, *, algorithm):
        assert spec.algorithm == "a2c", "what is finished is not run again"

        def strike(event):
            report(event)
            if event.kind == "rows":
                os.kill(os.getpid(), signal.SIGINT)

        return pgjax.run(spec, store, strike, algorithm=algorithm)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "run", interrupted)
        assert cli._main(["compare", "--out", str(folder), "--resume"]) == 1
    assert f"continue with: pgjax compare --out {folder} --resume" in capsys.readouterr().out
    assert pgjax.load(folder / "a2c").status == "interrupted"
    assert 0 < pgjax.load(folder / "a2c").metrics.env_steps.max() < 640
    assert not (folder / "compare.md").exists()

    assert cli._main(["compare", "--out", str(folder), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "ppo is finished already" in said and "going on at 64 env steps" in said
    pd.testing.assert_frame_equal(pgjax.load(folder / "a2c").evaluations, runs["a2c"].evaluations)
    assert (folder / "compare.md").exists() and (folder / "compare.png").exists()


def test_a_run_that_is_not_the_comparisons_is_refused(answer, finished, tmp_path):
    folder = tmp_path / "comparison"
    shutil.copytree(finished, folder)
    held = json.loads((folder / "ppo" / "run.json").read_text())
    held["config"]["total_env_steps"] = 1280
    (folder / "ppo" / "run.json").write_text(json.dumps(held))
    code, said = answer(["compare", "--out", str(folder), "--resume"])
    assert code == 2 and "total_env_steps" in said


# --- statistics


def trimmed_mean(values):
    """IQM of four values: the mean of the middle two."""
    return np.sort(values)[1:3].mean()


def test_the_results_are_those_of_the_stored_rows(finished):
    results = {result["algorithm"]: result for result in json.loads((finished / "compare.json").read_text())["results"]}
    assert list(results) == ["ppo", "a2c"]
    per_step = {}
    for name, result in results.items():
        episodes = pd.read_parquet(finished / name / "evaluations.parquet")
        final = episodes[(episodes.policy == "mode") & (episodes.env_steps == 640)]
        assert len(final) == 4 * 3
        returns = np.array([final[final.seed == seed]["return"].mean() for seed in range(4)])
        np.testing.assert_allclose(result["iqm"], trimmed_mean(returns))
        # Every one of the 4^4 resamples, in place of 2000 drawn ones.
        resamples = [trimmed_mean(returns[list(picks)]) for picks in itertools.product(range(4), repeat=4)]
        for side, tail in (("low", 0.025), ("high", 0.975)):
            below, above = np.quantile(resamples, [max(0, tail - 0.02), min(1, tail + 0.02)])
            assert below - 1e-9 <= result[side] <= above + 1e-9
        rows = pd.read_parquet(finished / name / "metrics.parquet")
        assert (rows.groupby("seed").iteration.diff().dropna() == 1).all(), "a row is one update, so plain means are due"
        np.testing.assert_allclose(result["kl"], rows.kl.astype(float).mean(), rtol=1e-6)
        seconds = json.loads((finished / name / "run.json").read_text())["facts"]["seconds"]
        per_step[name] = 1e6 * seconds["train"] / (640 * 4)
        np.testing.assert_allclose(result["microseconds"], per_step[name])
        assert result["compile_seconds"] == seconds["compile"] and result["seeds"] == [0, 1, 2, 3]
        assert f"| {name} | {result['iqm']:#.4g} [" in (finished / "compare.md").read_text()
    np.testing.assert_allclose(results["a2c"]["ratio"], per_step["a2c"] / per_step["ppo"])
    assert results["ppo"]["ratio"] == 1


def test_rows_count_as_the_updates_behind_them(runs):
    metrics = pd.DataFrame({"seed": [0, 0, 0], "iteration": [4, 8, 9], "kl": [1.0, 2.0, 11.0]})
    run = dataclasses.replace(runs["ppo"], metrics=metrics)
    assert comparison.mean_kl(run, [0]) == pytest.approx((4 * 1 + 4 * 2 + 1 * 11) / 9)


def test_a_frozen_lane_is_left_out_and_named(runs, finished, tmp_path):
    plan = comparison.read_plan(finished)
    metrics = runs["ppo"].metrics.copy()
    metrics.loc[(metrics.seed == 2) & (metrics.env_steps > 320), "nonfinite"] = 1.0
    metrics.loc[metrics.seed == 2, "kl"] = 1e9
    evaluations = runs["ppo"].evaluations.copy()
    evaluations.loc[evaluations.seed == 2, "return"] = 1e9
    hurt = dataclasses.replace(runs["ppo"], metrics=metrics, evaluations=evaluations)
    whole, part = comparison.results_of([runs["ppo"], hurt])
    assert part.seeds == [0, 1, 3] and part.frozen == [2] and whole.frozen == []
    assert part.iqm < 1e3 and part.high < 1e3 and part.kl < 1e3
    assert part.env_steps == whole.env_steps and part.microseconds == whole.microseconds, "all lanes were trained"
    told = comparison.results_text(plan, [part])
    assert "3 of 4" in told and "ppo: seed 2 went non-finite" in told

    metrics = metrics.assign(nonfinite=1.0)
    (lost,) = comparison.results_of([dataclasses.replace(hurt, metrics=metrics)])
    assert lost.seeds == [] and np.isnan(lost.iqm) and "no finite lane" in comparison.results_text(plan, [lost])
    lost_run = dataclasses.replace(hurt, metrics=metrics)
    assert comparison.plot_comparison([runs["a2c"], lost_run], [1.0, 2.0], "title", tmp_path / "c.png").exists()


def test_a_comparison_with_a_frozen_lane_ends_in_failure_and_is_not_run_again(finished, tmp_path, monkeypatch):
    folder = tmp_path / "comparison"
    shutil.copytree(finished, folder)
    held = json.loads((folder / "ppo" / "run.json").read_text())
    held["status"] = "failed"
    (folder / "ppo" / "run.json").write_text(json.dumps(held))
    whole = comparison.results_of
    monkeypatch.setattr(
        comparison, "results_of", lambda runs: [dataclasses.replace(result, frozen=[2]) for result in whole(runs)]
    )
    assert cli._main(["compare", "--out", str(folder), "--resume"]) == 1
    assert json.loads((folder / "ppo" / "run.json").read_text())["resumed"] == []
    assert "seed 2 went non-finite" in (folder / "compare.md").read_text()


def test_make_env_replaces_parameters():
    env = make_env(Request(ENV, env_params={"gravity": 5.0}))
    assert float(env.default_params.gravity) == 5.0  # pyright: ignore[reportAttributeAccessIssue]


def test_comparisons_become_one_table(finished, runs):
    lines = family_table([finished, finished]).splitlines()
    assert lines[0].count(ENV) == 2 and len(lines) == 2 + len(runs)
    for name, run in runs.items():
        rows = run.evaluations
        last = rows[(rows.policy == "mode") & (rows.env_steps == rows.env_steps.max())]
        (line,) = (line for line in lines if f"`{name}`" in line)
        shown = [float(cell.split()[0]) for cell in line.split("|")[2:4]]
        expected = stats.trim_mean(last.groupby("seed")["return"].mean(), 0.25)
        np.testing.assert_allclose(shown, expected, rtol=2e-3)
