"""Published numbers beside ours: which verdict is given, from which intervals; nothing is compared that is not alike."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

import pgjax
from pgjax import cli
from pgjax.experiments import reproduce
from pgjax.experiments.reproduce import figures, measured, paper_file, verdicts
from pgjax.experiments.reproduce.measured import Measured, dump, load
from pgjax.experiments.reproduce.paper_file import Claim, ClaimTest, Numbers, Paper, list_papers, read_paper
from pgjax.experiments.results import Result
from pgjax.host.runner import as_hypers

ENV = "mujoco/Hopper-v5"
FIELDS = dict(
    name="table",
    source="a paper",
    mark="verified",
    spread="none",
    metric="mode",
    algorithm="ppo",
    run="main",
    ours="mujoco/{task}-v5",
)


def ours(final, run="main", algorithm="ppo", env=ENV, env_steps=(500_000, 1_000_000), columns=None):
    """A result whose mode returns end in ``final`` [S] and are 0 before."""
    final = np.asarray(final, np.float64)
    curve = np.stack([np.zeros_like(final)] * (len(env_steps) - 1) + [final], axis=1)
    config = {"algorithm": algorithm, "env": env, "seeds": list(range(len(final)))}
    result = Result("", "finished", config, seeds=tuple(range(len(final))), env_steps=np.array(env_steps))
    result.returns.update(mode=curve, sample=curve - 1, training=curve - 2)
    return Measured(run, result, columns or {})


def row(value, results, **fields):
    numbers = Numbers(**{**FIELDS, "env_steps": 1_000_000, "values": {"Hopper-v2": value}, **fields})
    (found,) = verdicts.number_rows(paper(numbers=(numbers,)), results)
    return found


def paper(numbers=(), claims=()):
    return Paper("p", "A paper", "us", tuple(numbers), tuple(claims), {}, {}, (), ())


def test_a_published_mean_without_spread_is_taken_for_exact():
    scores = np.array([90.0, 100.0, 110.0])
    half = stats.t.ppf(0.975, 2) * 10 / math.sqrt(3)  # 24.84
    for published, verdict in ((100.0, "inside"), (100 + half - 0.01, "inside"), (100 + half + 0.01, "below"), (75.1, "above")):
        found = row([published], [ours(scores)])
        assert found.verdict == verdict and found.ours == 100 and found.seeds == 3
        assert found.difference == pytest.approx(100 - published)
        assert (found.low, found.high) == pytest.approx((100 - half, 100 + half))


@pytest.mark.parametrize(
    ("spread", "value", "seeds"),
    [("std", [140.0, 20.0], 4), ("sem", [140.0, 10.0], 4), ("half band", [140.0, 20.0], 4)],
)
def test_the_difference_is_welchs(spread, value, seeds):
    """Against SciPy's test on four published runs with that mean and spread."""
    scores = np.array([90.0, 100.0, 110.0, 104.0, 96.0])
    published = np.array([1.0, -1.0, 1.0, -1.0])
    published = 140 + 20 * published / published.std(ddof=1)
    test = stats.ttest_ind(scores, published, equal_var=False).confidence_interval(0.95)
    found = row(value, [ours(scores)], spread=spread, seeds=seeds)
    assert (found.difference_low, found.difference_high) == pytest.approx((test.low, test.high))
    assert found.verdict == ("below" if test.high < 0 else "inside")


def test_an_interval_that_was_published_counts():
    scores = np.array([90.0, 100.0, 110.0])
    error = math.hypot(10 / math.sqrt(3), 20 / 1.959964)
    found = row([140.0, 120.0, 160.0], [ours(scores)], spread="ci95")
    df = error**4 / ((10 / math.sqrt(3)) ** 4 / 2)
    assert found.difference_high == pytest.approx(-40 + stats.t.ppf(0.975, df) * error, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "verdict", "why"),
    [
        (dict(not_comparable="Brax v1 physics"), "not comparable", "Brax v1 physics"),
        (dict(ours=""), "not comparable", "no environment of ours"),
        (dict(metric="other", measured="success rate"), "not comparable", "success rate"),
        (dict(env_steps=8_000_000), "not comparable", "ours has 1 M of 8 M"),
        (dict(env_steps=700_000), "not comparable", "not evaluated at 0.7 M"),
        (dict(algorithm="trpo"), "not run", ""),
        (dict(run=""), "not run", "no run in these settings"),
        (dict(run="other"), "not run", ""),
        (dict(ours="mujoco/{task}-v4"), "not run", ""),
    ],
)
def test_what_is_not_alike_gets_no_verdict(fields, verdict, why):
    found = row([100.0], [ours([90.0, 110.0])], **fields)
    assert found.verdict == verdict and why in found.why and math.isnan(found.difference)


def test_seeds_that_went_non_finite_are_not_left_out_in_silence():
    curve = ours([10.0, 20.0, 30.0])
    lame = dataclasses.replace(curve, result=dataclasses.replace(curve.result, frozen=(3,)))
    found = row([20.0], [lame])
    assert found.verdict == "not comparable" and "seeds 3 of ours went non-finite" in found.why

    # For a claim to have failed is a result: with the return of the policy that was held, and said.
    other = ours([110.0, 120.0, 130.0], "ppo", "ppo")
    columns = {"kl:mean": np.array([0.1, 0.2, 0.3])}
    tests = [ClaimTest("main", "ppo", metric, "less") for metric in ("mode", "kl:mean")]
    claim = Claim("name", "text", "source", tests=tuple(tests))
    lame, other = dataclasses.replace(lame, columns=columns), dataclasses.replace(other, columns=columns)
    returns, column = verdicts.claim_rows(paper(claims=[claim]), [lame, other])
    assert (returns.verdict, returns.left, returns.seeds) == ("holds", 20, 3)
    noted = dataclasses.replace(returns, note="of one drift")
    table = verdicts.claim_table([noted, noted])
    assert table.count("text (of one drift)") == 1 and table.count("holds: 1 of 3 seeds of main went non-finite") == 2
    assert column.verdict == "not tested" and "seeds 3 of ours" in column.why


def test_one_seed_gets_no_verdict_and_no_number_of_a_seed_without_episodes():
    assert "one seed" in row([100.0], [ours([90.0])]).why
    assert "no episode" in row([100.0], [ours([90.0, math.nan])]).why


def test_the_right_return_is_taken_at_the_right_time():
    curve = ours([10.0, 20.0, 30.0])
    for metric, expected in (("mode", 20), ("sample", 19), ("training", 18)):
        assert row([0.0], [curve], metric=metric).ours == expected
    assert row([0.0], [curve], env_steps=500_000).ours == 0
    assert row([0.0], [curve], env_steps=990_000).ours == 20, "budgets are rounded up to whole iterations"
    best = ours([10.0, 20.0, 30.0], env_steps=(500_000, 1_000_000, 2_000_000))
    best.result.returns["mode"][:, 0] = (60, 40, 50)
    assert row([0.0], [best], metric="best").ours == 50, "the evaluation whose mean is best, not the best of each seed"


def test_claims_compare_runs_or_a_number():
    wide = ours([5.0, 5.2, 5.4], "ppo", columns={"ratio_deviation:max": np.array([0.5, 0.6, 0.7])})
    near = ours([5.1, 5.3, 5.5], "spo", "spo", columns={"ratio_deviation:max": np.array([0.1, 0.12, 0.11])})

    def verdict(**test):
        claim = Claim("name", "text", "source", tests=(ClaimTest(**test),))
        return [each.verdict for each in verdicts.claim_rows(paper(claims=[claim]), [wide, near])]

    ratio = "ratio_deviation:max"
    assert verdict(left="spo", right="ppo", metric=ratio, expect="less") == ["holds"]
    assert verdict(left="spo", right="ppo", metric=ratio, expect="greater") == ["contradicted"]
    assert verdict(left="spo:spo", right=0.2, metric=ratio, expect="less") == ["holds"]
    assert verdict(left="spo", right="ppo", metric="mode", expect="greater") == ["undecided"]
    assert verdict(left="fixpo", right="ppo", metric="mode", expect="greater") == ["not run"]
    assert verdict(left="spo", right="ppo", metric="training", right_metric="mode", expect="less") == ["holds"]
    assert verdict(left="spo", right="spo", metric="mode", right_metric=ratio, expect="greater") == ["holds"]
    assert verdicts.claim_rows(paper(claims=[Claim("a", "b", "c")]), [])[0].verdict == "not tested"


def test_a_scale_is_laid_over_a_run_table_by_table():
    table = {
        "algorithms": ["ppo"],
        "envs": ["gymnax/CartPole-v1", "gymnax/Acrobot-v1"],
        "total_env_steps": 5000,
        "setup": {"num_envs": 2, "num_steps": 8},
        "env": {"gymnax/Acrobot-v1": {"hypers": {"gamma": 0.9}}, "gymnax/CartPole-v1": {"setup": {"num_steps": 16}}},
    }
    scales = {
        "cpu": {
            "seeds": 3,
            "env": {"gymnax/CartPole-v1": {"total_env_steps": 900}},
            "run": {"main": {"setup": {"num_envs": 4}}},
        },
        "smoke": {"envs": ["gymnax/Acrobot-v1"], "run": {"main": {"total_env_steps": 100}}},
        "full": {"run": {"main": {"skip": True}}},
    }
    content = dataclasses.replace(paper(), runs={"main": table}, scales=scales)
    pole, robot = content.specs("cpu")["main"]
    assert (pole.total_env_steps, pole.setup["num_envs"], pole.setup["num_steps"], len(pole.seeds)) == (900, 4, 16, 3)
    assert (robot.total_env_steps, robot.setup["num_steps"], robot.configs[0]["gamma"]) == (5000, 8, 0.9)
    (robot,) = content.specs("smoke")["main"]
    assert (robot.env, robot.total_env_steps, robot.setup["num_envs"]) == ("gymnax/Acrobot-v1", 100, 2)
    assert not content.specs("full") and table["setup"] == {"num_envs": 2, "num_steps": 8}


def test_results_that_were_kept_come_back(tmp_path):
    before = ours([1 / 3, 2e9, -5.0], columns={"kl:mean": np.array([0.1, math.nan, math.inf])})
    (tmp_path / "kept.json").write_text(dump([before], "pgjax reproduce p --scale cpu"))
    (after,), command = load(tmp_path / "kept.json")
    assert command == "pgjax reproduce p --scale cpu" and after.run == "main"
    np.testing.assert_allclose(after.scores("mode"), before.scores("mode"), rtol=1e-5)
    np.testing.assert_array_equal(np.isfinite(after.columns["kl:mean"]), [True, False, False])


def test_training_returns_weigh_episodes_and_keep_to_their_window(tmp_path):
    import pandas as pd

    rows = pd.DataFrame(
        dict(
            seed=[0, 0, 0, 0, 1],
            env_steps=[890, 950, 1000, 1050, 1000],
            episodes=[9.0, 1.0, 3.0, 5.0, 0.0],
            episode_return=[7.0, 10.0, 20.0, 99.0, math.nan],
        )
    )
    assert measured.training_returns(rows, 1000).to_dict() == {0: (10 + 3 * 20) / 4}


def test_a_paper_from_the_command_line_twice(tmp_path, monkeypatch, capsys):
    """A run at a small scale, its tables, and a second call that has nothing left to train."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "mine.toml").write_text(
        """
title = "Mine"
source = "us"
[scale.smoke]
total_env_steps = 800
seeds = 2
num_evals = 2
eval_episodes = 2
[run.main]
algorithms = ["ppo"]
envs = ["gymnax/CartPole-v1"]
preset = "none"
setup = { num_envs = 4, num_steps = 25 }
[[numbers]]
name = "table"
run = "main"
algorithm = "ppo"
source = "a paper"
mark = "verified"
env_steps = 800
spread = "none"
metric = "training"
ours = "gymnax/{name}"
values = { CartPole-v1 = [2000.0] }
[[claims]]
name = "kl"
text = "An update stays within a nat."
source = "a paper"
tests = [{ left = "main", right = 1.0, metric = "kl:max", expect = "less" }]
"""
    )
    monkeypatch.setattr(paper_file, "PUBLISHED", folder)
    out = tmp_path / "out"
    command = ["reproduce", "mine", "--out", str(out)]
    assert cli._main(command) == 0
    first = capsys.readouterr().out
    assert "1 below" in first and "1 holds" in first
    table = (out / "table.md").read_text()
    assert "| table | CartPole-v1 | 800 | 2000 |" in table and "below" in table
    (cell,) = (out / "cells").iterdir()
    episodes = pgjax.load(cell).metrics
    episodes = episodes[(episodes.env_steps > 720) & (episodes.episodes > 0)]
    by_seed = episodes.groupby("seed")[["episode_return", "episodes"]].apply(
        lambda rows: np.average(rows.episode_return, weights=rows.episodes)
    )
    (found,), _ = load(out / "results.json")
    np.testing.assert_allclose(found.scores("training"), by_seed, rtol=1e-5)
    assert "report" in {path.stem for path in out.glob("*.html")}
    assert cli._main(command) == 0
    assert "0 groups" not in capsys.readouterr().out and len(list((out / "cells").iterdir())) == 1


def test_what_was_kept_for_another_paper_is_not_run_again(tmp_path, monkeypatch, capsys):
    """Only where the whole request is the same, and never in place of the paper's own runs."""
    run = """
[run.NAME]
algorithms = ["ppo"]
envs = ["mujoco/Hopper-v5"]
total_env_steps = 200
seeds = 9
preset = "none"
setup = { num_envs = 4, num_steps = 25 }
hypers = { learning_rate = RATE }
"""
    for name, rates in {"one": {"a": 1e-3}, "two": {"same": 1e-3, "other": 2e-3}}.items():
        runs = "".join(run.replace("NAME", label).replace("RATE", f"{rate}") for label, rate in rates.items())
        (tmp_path / f"{name}.toml").write_text(f'title = "{name}"\nsource = "us"\n[scale.cpu]\n{runs}')
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(paper_file, "PUBLISHED", tmp_path)
    for module in (measured, reproduce):
        monkeypatch.setattr(module, "RESULTS", kept)
    # Nine seeds are two cells, but one result.
    first, second = read_paper("one").specs("cpu")["a"]
    asked = {**first.config(), "seeds": [*first.seeds, *second.seeds], "preset": "another name"}
    there = ours(np.arange(9.0), "a")
    there = dataclasses.replace(there, result=dataclasses.replace(there.result, config=asked, provenance={"pgjax": "0.0.1"}))
    (kept / "one-cpu.json").write_text(dump([there], "pgjax reproduce one --scale cpu"))

    trained = []
    monkeypatch.setattr(reproduce.driver, "run_cells_of", lambda sweep, *_, **__: trained.extend(sweep.specs) or True)
    command = ["reproduce", "two", "--scale", "cpu", "--out", str(tmp_path / "out"), "--record"]
    (tmp_path / "out").mkdir()
    assert cli._main([*command, "--reuse"]) == 0
    assert "same: ppo on mujoco/Hopper-v5 is taken" in capsys.readouterr().out
    assert [spec.configs[0]["learning_rate"] for spec in trained] == [2e-3, 2e-3]
    ((found,), told) = load(kept / "two-cpu.json")
    assert found.run == "same" and found.result.provenance["pgjax"] == "0.0.1" and told.endswith("--reuse")
    np.testing.assert_array_equal(found.scores("mode"), np.arange(9.0))
    # Without --reuse everything is run, and a paper's own file does not answer it.
    trained.clear()
    assert cli._main(command) == 0 and len(trained) == 4
    (kept / "two-cpu.json").unlink()
    assert not measured.kept_elsewhere(read_paper("one"), "cpu") and measured.kept_elsewhere(read_paper("two"), "cpu")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["reproduce"], ["name a paper", "trpo"]),
        (["reproduce", "trop"], ["trop", "did you mean trpo"]),
        (["reproduce", "trpo", "--scale", "cup"], ["--scale", "cup"]),
        (["reproduce", "trpo", "--record", "--out", "{tmp}"], ["--record", "smoke"]),
    ],
)
def test_a_wrong_request_is_answered_in_one_line(tmp_path, capsys, argv, words):
    assert cli._main([word.replace("{tmp}", str(tmp_path)) for word in argv]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and all(word in said for word in words), said


def test_every_file_can_be_read_and_its_runs_exist():
    for name in list_papers():
        paper_ = read_paper(name)
        runs = set()
        for scale in paper_.scales:
            for run, specs in paper_.specs(scale).items():
                runs |= {run, *(f"{run}:{spec.algorithm}" for spec in specs)}
        for claim in paper_.claims:
            for test in claim.tests:
                assert {side for side in (test.left, test.right) if isinstance(side, str)} <= runs, (name, claim.name)
                assert test.expect in ("less", "greater"), (name, claim.name)
        assert {entry.run for entry in paper_.numbers} <= runs | {""}, name
        assert {entry["numbers"] for entry in paper_.followups if "numbers" in entry} <= {
            entry.name for entry in paper_.numbers
        }


@pytest.mark.parametrize(
    ("name", "one", "other", "own"),
    [
        ("spo", "spo", "ppo", set()),
        ("spo", "spo_deep", "ppo_deep", set()),
        ("dpo", "dpo", "ppo", {"alpha", "beta", "clip_eps"}),
        ("dpo", "dpo_mujoco", "ppo_mujoco", {"alpha", "beta", "clip_eps"}),
    ],
)
def test_runs_that_a_claim_compares_differ_in_the_method_alone(name, one, other, own):
    pairs = read_paper(name).specs("full")
    for left, right in zip(pairs[one], pairs[other], strict=True):
        a, b = left.build(), right.build()
        assert dataclasses.asdict(a.setup) == dataclasses.asdict(b.setup)
        x, y = (vars(as_hypers(made.hypers, **spec.configs[0])) for made, spec in ((a, left), (b, right)))
        differ = {field for field in x.keys() | y.keys() if str(x.get(field)) != str(y.get(field))}
        assert differ - {"objective"} == own
        for field in ("env", "env_options", "env_params", "total_env_steps", "seeds", "num_evals", "eval_episodes"):
            assert getattr(left, field) == getattr(right, field), field


def test_a_run_looks_the_same_in_every_panel_of_a_figure(tmp_path, monkeypatch):
    """The panels share a legend."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.append(figure))
    other = "mujoco/Walker2d-v5"
    runs = [("a", "ppo", ENV), ("b", "ppo", ENV), ("c", "trpo", ENV), ("a", "ppo", other), ("c", "trpo", other)]
    figures.draw_paper(paper(), [ours([1.0, 2.0], run, name, env) for run, name, env in runs], tmp_path / "x.png")
    first, second = ([(line.get_color(), line.get_linestyle()) for line in axis.lines] for axis in drawn[0].axes)
    assert second == [first[0], first[2]] and len(set(first)) == 3
    legend = {
        text.get_text(): line.get_color()
        for text, line in zip(*(getattr(drawn[0].legends[0], f"get_{part}")() for part in ("texts", "lines")), strict=True)
    }
    assert legend == {"ppo (a), ours": first[0][0], "ppo (b), ours": first[1][0], "trpo, ours": first[2][0]}


def test_a_figure_of_many_runs_tells_them_apart_and_holds_its_legend(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.append(figure))
    runs = [f"a run whose name is anything but short, number {index}" for index in range(15)]
    figures.draw_paper(paper(), [ours([1.0, 2.0], run) for run in runs], tmp_path / "x.png")
    (figure,) = drawn
    (axis,) = figure.axes
    assert len({(line.get_color(), line.get_linestyle(), line._unscaled_dash_pattern) for line in axis.lines}) == 15
    figure.canvas.draw()
    legend, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert legend.x0 >= 0 and legend.y0 >= 0 and legend.x1 <= whole.x1
    assert axis.get_window_extent().height > whole.height / 3


def test_the_page_is_what_the_command_writes():
    from pgjax.experiments.reproduce.page import pages

    root = paper_file.PUBLISHED.resolve().parent.parent
    for path, text in pages(root / "docs" / "reproduction.md").items():
        assert path.read_text() == text, f"{path.name} is not what pgjax reproduce --page writes"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("trpo", "fixpo") else pytest.mark.slow)
        for name in (
            "ppo",
            "trpo",
            "spo",
            "fixpo",
            "dpo",
            "mdpo",
            "vmpo",
            "guide",
            "gae",
            "avg",
            "sac",
            "props",
            "lpo",
            "ta",
            "groove",
        )
    ],
)
def test_smoke_of_a_paper(tmp_path, capsys, name):
    """Every run of every paper trains; at this scale no number is comparable and none is claimed."""
    assert cli._main(["reproduce", name, "--out", str(tmp_path)]) == 0
    results, _ = load(tmp_path / "results.json")
    specs = [spec for several in read_paper(name).specs("smoke").values() for spec in several]
    assert {(each.algorithm, each.env) for each in results} == {(spec.algorithm, spec.env) for spec in specs}
    assert all(np.isfinite(each.scores("mode")).all() for each in results)
    rows = verdicts.number_rows(read_paper(name), results)
    assert not {row.verdict for row in rows} & {"inside", "above", "below"} and str(tmp_path) in capsys.readouterr().out


@pytest.mark.parametrize(("statistic", "trim"), [("mean", 0.0), ("iqm", 0.25)])
@pytest.mark.parametrize("sizes", [(3, 10), (9, 16)])
def test_a_difference_of_two_means_has_scipys_interval(statistic, trim, sizes):
    """Welch's for means, Yuen's for interquartile means."""
    x, y = (np.random.default_rng(size).gamma(2.0, 100.0, size) for size in sizes)
    (ours, *error), (theirs, *other) = (verdicts.centre(scores, statistic) for scores in (x, y))
    kept = [np.sort(scores)[(cut := int(trim * len(scores))) : len(scores) - cut] for scores in (x, y)]
    np.testing.assert_allclose((ours, theirs), [part.mean() for part in kept])
    expected = stats.ttest_ind(x, y, equal_var=False, trim=trim)
    found = verdicts.difference_interval(ours - theirs, *error, *other)
    np.testing.assert_allclose(found[0] / ((found[2] - found[1]) / 2) * stats.t.ppf(0.975, expected.df), expected.statistic)
