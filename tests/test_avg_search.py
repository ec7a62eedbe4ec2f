"""AVG's random search: the published configurations, drawn again, and what is made of a search."""

import sys

import numpy as np
import pandas as pd
import pytest

import pgjax
from pgjax.errors import RequestError
from pgjax.experiments import avg_search, presets
from pgjax.experiments.avg_search import draw, ranking, search_spec

# README of gauthamvasan/avg: search seed -> actor's and critic's learning rate, beta1, alpha, gamma.
PUBLISHED = {
    122: (1.1e-5, 7.7e-5, 0.0, 0.3, 0.99),
    129: (6.3e-3, 8.7e-3, 0.0, 0.07, 0.99),
    12: (3e-6, 4.9e-3, 0.0, 0.05, 0.97),
    57: (6e-6, 8e-5, 0.0, 0.009, 0.95),
    145: (3.8e-4, 8.7e-5, 0.9, 0.006, 0.95),
    223: (1.8e-5, 4.8e-5, 0.0, 0.007, 0.97),
}
FIELDS = ("learning_rate", "critic_lr", "adam_b1", "alpha", "gamma")
ABLATIONS = {
    "avg_basic": (False, False, "none"),
    "avg_norm_obs": (True, False, "none"),
    "avg_pnorm": (False, True, "none"),
    "avg_scaled_td": (False, False, "code"),
    "avg_norm_obs_pnorm": (True, True, "none"),
    "avg_norm_obs_scaled_td": (True, False, "code"),
    "avg_pnorm_scaled_td": (False, True, "code"),
}


@pytest.mark.parametrize("search_seed", PUBLISHED)
def test_published_configurations_are_drawn_again_and_are_presets(search_seed):
    expected = dict(zip(FIELDS, PUBLISHED[search_seed], strict=True))
    assert draw(search_seed) == expected
    assert presets.find(f"avg-{search_seed}", "avg", "")["hypers"] == expected


def test_the_baselines_draw_from_the_same_search():
    examples = presets.list_presets()["incremental"]
    assert draw(294, "iac") == examples["iac"]["hypers"]
    drawn = draw(146, "sac1")
    assert {name: drawn[name] for name in drawn} == examples["sac1"]["hypers"] and "temperature_lr" in drawn
    with pytest.raises(RequestError, match="td3_1"):
        draw(0, "td3_1")


def test_draws_stay_in_the_space():
    drawn = [draw(seed) for seed in range(300)]
    assert drawn[7] == draw(7) and drawn[7] != drawn[8]
    for name in ("learning_rate", "critic_lr"):
        values = [config[name] for config in drawn]
        assert min(values) >= 1e-6 and 1e-3 < max(values) <= 9.9e-3
    assert {config["adam_b1"] for config in drawn} == {0.0, 0.9}
    assert {config["gamma"] for config in drawn} == {0.95, 0.97, 0.99, 0.995, 1.0}
    assert 1e-5 <= min(config["alpha"] for config in drawn) and max(config["alpha"] for config in drawn) <= 0.9
    cars = [draw(seed, env="gymnax/MountainCarContinuous-v0") for seed in range(20)]
    assert {config["gamma"] for config in cars} == {1.0}
    assert [config["alpha"] for config in cars] == [config["alpha"] for config in drawn[:20]]


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_named_after_what_is_on(name):
    preset = presets.find(name, "avg", "")
    fields = ("normalize_obs", "penultimate_norm", "scaler")
    assert tuple(preset["setup"][field] for field in fields) == ABLATIONS[name]
    assert preset["hypers"] == presets.find("avg-129", "avg", "")["hypers"]


def test_environments_have_the_settings_that_were_published_for_them():
    rows = {
        122: ("mujoco/Hopper-v4", "mujoco/Walker2d-v4"),
        129: ("mujoco/Ant-v4", "mujoco/HalfCheetah-v4", "mujoco/Humanoid-v4"),
        12: ("playground/ReacherHard",),
        145: ("playground/FingerSpin",),
    }
    for search_seed, envs in rows.items():
        for env in envs:
            found = presets.find("auto", "avg", env)
            assert {**found, "name": None} == {**presets.find(f"avg-{search_seed}", "avg", ""), "name": None}
            assert found.get("setup", {}) == ({"boundary": "terminate"} if env.startswith("playground/") else {})


def test_a_search_is_one_run_and_is_ranked_by_area(tmp_path, monkeypatch):
    spec = search_spec(
        "gymnax/Pendulum-v1", range(5, 8), 2, total_env_steps=400, setup={"num_steps": 200, "hidden_sizes": (4,)}
    )
    assert spec.configs == tuple(draw(seed) for seed in (5, 6, 7)) and spec.seeds == (0, 1)
    with pgjax.RunStore.create(tmp_path / "search", spec.config()) as store:
        assert pgjax.run(spec, store).status == "finished"
    run = pgjax.load(tmp_path / "search")
    found = ranking(tmp_path / "search", range(5, 8))
    means = run.metrics.groupby("config").episode_return.mean()
    np.testing.assert_allclose(found.area, np.sort(means)[::-1], rtol=1e-6)
    assert found.search_seed.tolist() == [5 + config for config in means.sort_values(ascending=False).index]
    assert found.critic_lr.tolist() == [draw(seed)["critic_lr"] for seed in found.search_seed]

    # A row without an end is as the one before, and a seed that was frozen is counted and left out.
    rows = [(0, 0, 1, 10.0, 0), (0, 0, 2, np.nan, 0), (0, 0, 3, 40.0, 0)] + [(0, 1, i, 1e9, 1.0) for i in (1, 2, 3)]
    metrics = pd.DataFrame(rows, columns=["config", "seed", "env_steps", "episode_return", "nonfinite"])

    class Run:
        config = {"configs": [draw(0)]}  # noqa: RUF012

    Run.metrics = metrics
    monkeypatch.setattr(pgjax, "load", lambda path: Run)
    (row,) = ranking(tmp_path, range(1)).to_dict("records")
    assert row["area"] == 20 and row["frozen"] == 1

    # What stayed finite in more seeds comes first, however well the others' survivors did.
    rows += [(1, seed, i, 5.0, 0) for seed in (0, 1) for i in (1, 2, 3)]
    Run.metrics = pd.DataFrame(rows, columns=metrics.columns)
    Run.config = {"configs": [draw(0), draw(1)]}
    assert ranking(tmp_path, range(2)).area.tolist() == [5, 20]


def test_a_search_from_the_command_line_with_a_variant_of_its_own(tmp_path, monkeypatch, capsys):
    def search(*more):
        words = ["--env", "gymnax/Pendulum-v1", "--configs", "2", "--seeds", "1", "--total-env-steps", "400", *more]
        monkeypatch.setattr(sys, "argv", ["avg_search", *words])
        return avg_search.main()

    out = tmp_path / "search"
    variant = ("--setup", "scaler=none", "--setup", "hidden_sizes=4,4", "--setup", "num_steps=200")
    assert search(*variant, "--out", str(out)) == 0
    config = pgjax.load(out).config
    assert config["setup"]["scaler"] == "none" and list(config["setup"]["hidden_sizes"]) == [4, 4]
    assert sorted(pd.read_csv(out / "ranking.csv").search_seed) == [0, 1]
    # What is published for an environment is what a search there begins with.
    assert presets.find("auto", "avg", "playground/FingerSpin")["setup"]["boundary"] == "terminate"
    for words, said in ((["scalr=none"], "did you mean scaler"), (["scaler=maybe"], "give one of code, paper, none")):
        assert search("--setup", *words, "--out", str(tmp_path / "no")) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "no").exists()
