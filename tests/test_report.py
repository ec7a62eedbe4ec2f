"""The report: the numbers are those of the runs, unlike things stay apart, and nothing in a run file can hurt the page."""

import base64
import dataclasses
import hashlib
import io
import itertools
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from pgjax.errors import RequestError
from pgjax.experiments import reference_scores
from pgjax.experiments.report import tables, write_report
from pgjax.experiments.report.figures import MAX_CURVES, FileNames, Styles, is_log_spaced, select
from pgjax.experiments.report.study import iqm_intervals, make_study, text_of
from pgjax.experiments.results import Result
from pgjax.experiments.statistics import aggregates, iqm, iqm_interval
from pgjax.host import store
from pgjax.host.runner import RunSpec
from pgjax.host.store import RunStore

CARTPOLE, PENDULUM = "gymnax/CartPole-v1", "gymnax/Pendulum-v1"
BAD = "<script>alert(1)</script>"
PROVENANCE = {
    "pgjax": "0.1.0",
    "libraries": {"jax": "0.10.2", "gymnax": "1.0.1", "brax": "0.14.2"},
    "device_kind": "cpu",
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "reset_mode": "exact",
    "env_backend": None,
    "precision": "float32",
    "command": ["/usr/bin/pgjax", "train", "ppo"],
}


def result(
    final=(1.0, 2.0, 3.0, 10.0),
    algorithm="ppo",
    env=CARTPOLE,
    seeds=None,
    hypers=None,
    provenance=None,
    sample=None,
    policy="mode",
    path="/runs/one",
    steps=(500, 1000),
    status="finished",
    frozen=(),
    note="",
    **config,
):
    """A result whose returns grow from 0 to ``final``."""
    seeds = tuple(range(len(final))) if seeds is None else seeds
    spec = RunSpec(
        algorithm=algorithm,
        env=env,
        total_env_steps=config.pop("total_env_steps", 1000),
        configs=(hypers or {},),
        seeds=(*seeds, *frozen),
        num_evals=2,
        **config,
    )
    shape = np.linspace(0, 1, len(steps) + 1)[1:]
    returns = {policy: np.multiply.outer(np.asarray(final, float), shape)}
    if sample is not None:
        returns["sample"] = np.multiply.outer(np.asarray(sample, float), shape)
    return Result(
        path=path,
        status=status,
        config=spec.config(),
        provenance={**PROVENANCE, **(provenance or {})},
        seconds={"train": 12.5, "session": 20.0},
        seeds=seeds,
        frozen=frozen,
        env_steps=np.asarray(steps),
        returns=returns,
        note=note,
    )


@pytest.fixture
def report(tmp_path):
    """``report(results) -> (page, folder)``."""

    def report(results, **kwargs):
        page = write_report(
            results, tmp_path / "out", **{"title": "T", "command": "pgjax report runs", "say": lambda _: None, **kwargs}
        )
        return page.read_text(), tmp_path / "out"

    return report


@pytest.fixture
def references(monkeypatch):
    """CartPole from 0 to 10, Pendulum from -100 to 0; no other environment."""
    made = {
        env: reference_scores.ReferenceScores(low, (low, low), 1, "", high, "")
        for env, low, high in ((CARTPOLE, 0.0, 10.0), (PENDULUM, -100.0, 0.0))
    }
    monkeypatch.setattr(reference_scores, "all_reference_scores", lambda: made)


def csv(out, name="results"):
    return pd.read_csv(out / "tables" / f"{name}.csv", keep_default_na=False)


def warnings_of(page):
    """The items of the box of warnings, as text."""
    (box,) = re.findall(r"<aside.*?</aside>", page, re.DOTALL)
    return re.findall(r"<li>(.*?)</li>", box)


def captions(page):
    return [re.sub("<.*?>", "", text) for text in re.findall(r"<figcaption>(.*?)</figcaption>", page)]


class TestNumbers:
    def test_results_are_those_of_the_runs(self, report):
        page, out = report([result(), result((4.0, 4.0, 4.0), "a2c")])
        table = csv(out).set_index("method")
        # The middle half of 1, 2, 3, 10; their sample variance is (9 + 4 + 1 + 36) / 3.
        assert (table.IQM["ppo"], table["mean"]["ppo"], table["min"]["ppo"], table["max"]["ppo"]) == (2.5, 4.0, 1.0, 10.0)
        assert table["std"]["ppo"] == pytest.approx(np.sqrt(50 / 3))
        low, high = iqm_interval(np.array([1.0, 2.0, 3.0, 10.0]))
        assert (table.low["ppo"], table.high["ppo"]) == pytest.approx((float(low), float(high)))
        assert (table.IQM["a2c"], table.low["a2c"], table.high["a2c"], table.seeds["a2c"]) == (4.0, 4.0, 4.0, 3)
        assert (table["env steps"]["ppo"], table["train s"]["ppo"]) == (1000, 12.5)
        for value, shown in ((2.5, "2.500"), (10.0, "10.00"), (1000, "1,000")):
            assert f'<td class="number" data-v="{value}">{shown}</td>' in page

    def test_one_seed_has_no_interval_to_speak_of(self, report):
        page, out = report([result((7.0,))])
        row = csv(out).iloc[0]
        assert (row.IQM, row.low, row.high, row["std"]) == (7.0, 7.0, 7.0, "")
        assert "one seed has no interval" in captions(page)[0]

    @pytest.mark.parametrize("num_seeds", [1, 2, 3, 4, 5, 8, 13])
    def test_intervals_of_many_are_those_of_one(self, num_seeds):
        # Rounded, so that there are ties.
        values = np.random.default_rng(num_seeds).normal(size=(num_seeds, 20)).round(1)
        np.testing.assert_allclose(iqm_intervals(values), iqm_interval(values), atol=1e-12)

    def test_every_figure_and_table_is_a_file(self, report, references):
        results = [result(algorithm=name, env=env) for name in ("ppo", "a2c") for env in (CARTPOLE, PENDULUM)]
        page, out = report(results)
        pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,(.*?)"', page)]
        files = {path.read_bytes() for path in (out / "figures").iterdir()}
        assert set(pictures) == files and len(pictures) == len(files) == 5
        for picture in pictures:
            assert image.imread(io.BytesIO(picture)).std() > 0.02
        named = re.findall(r'<span class="file">(.*?)</span>', page)
        assert sorted(named) == sorted(path.relative_to(out).as_posix() for path in out.glob("*/*"))
        assert not list(out.rglob("*.tmp*"))

    def test_captions_name_seeds_and_interval(self, report, references):
        results = [result(algorithm=name, env=env) for name in ("ppo", "a2c") for env in (CARTPOLE, PENDULUM)]
        page, _ = report([dataclasses.replace(one) for one in results])
        assert len(captions(page)) == 5
        for caption in captions(page):
            assert re.search(r"n = (4 seeds|8 runs)", caption), caption
            assert re.search(r"95&nbsp;% .*interval", caption), caption

    def test_long_tables_are_in_the_file_in_full(self, report, monkeypatch):
        monkeypatch.setattr(tables, "PAGE_ROWS", 3)
        page, out = report([result(hypers={"learning_rate": 0.1 * (i + 1)}) for i in range(5)])
        body = re.search(r'id="table-results".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
        assert body is not None and body[1].count("<tr>") == 3
        assert "Only the first 3 of 5 rows" in page
        assert len(csv(out)) == len(csv(out, "status")) == len(csv(out, "commands")) == 5

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.0, "0"), (1.0, "1.000"), (-1234.5, "−1,234"), (0.12345, "0.1235"), (1e-9, "1e−09"), (None, "–"), (np.inf, "∞")],
    )
    def test_numbers_as_text(self, value, text):
        assert tables.number(value) == text


class TestMethods:
    def test_are_named_by_what_varies(self):
        rates = [{"learning_rate": 0.001}, {}, {"learning_rate": 0.001, "clip_eps": 0.2}]
        results = [result(hypers=hypers, env=env) for hypers in rates[:2] for env in (CARTPOLE, PENDULUM)]
        study = make_study([*results, result(algorithm="a2c", setup={"num_envs": 3})])
        # The default is spelled out; smaller numbers come first, and what all share is left out.
        assert [method.label for method in study.methods] == ["ppo learning_rate=0.00025", "ppo learning_rate=0.001", "a2c"]
        # A value that is given and is the default is no difference.
        assert {m.label for m in make_study([result(hypers={"clip_eps": 0.2}), result(env=PENDULUM)]).methods} == {"ppo"}

    def test_of_unknown_algorithms_have_unknown_defaults(self):
        results = [result(algorithm="mine", hypers=hypers) for hypers in ({"x": 2.0}, {})]
        assert {method.label for method in make_study(results).methods} == {"mine x=2", "mine x=default"}

    def test_settings_per_environment_are_told_apart_from_methods(self, report):
        page, out = report([result(hypers={"gamma": 0.9}), result(env=PENDULUM)])
        assert set(csv(out).method) == {"ppo"}
        (warning,) = warnings_of(page)
        assert "differ between environments" in warning and "gamma" in warning
        assert csv(out, "settings").values.tolist() == [["ppo", "gamma", 0.9, 0.99]]

    @pytest.mark.parametrize(
        ("value", "text"), [(1, "1"), (1.0, "1"), (0.1 + 0.2, "0.30000000000000004"), (True, "True"), ([64, 64], "64,64")]
    )
    def test_values_are_exact(self, value, text):
        assert text_of(value) == text

    def test_too_many_become_the_best_of_each_algorithm(self, report):
        results = [
            result(np.array([1.0, 2.0, 3.0]) + 10 * i - 100 * (name == "a2c"), name, hypers={"learning_rate": 0.01 * (i + 1)})
            for name in ("ppo", "a2c")
            for i in range(8)
        ]
        study = make_study(results)
        (entries,) = study.groups.values()
        drawn = [entry.method.label for entry in select(study, entries).entries]
        assert drawn == [f"{name} learning_rate={0.01 * i:g}" for name in ("ppo", "a2c") for i in (8, 7, 6)]
        page, _ = report(results)
        assert "Of 16 methods the best 3 configurations of each algorithm" in captions(page)[0]
        assert "optimistic" in captions(page)[0]

    def test_more_algorithms_than_a_panel_takes_go_into_further_panels(self, report):
        _page, out = report([result(algorithm=f"mine{i}") for i in range(13)])
        assert len(list((out / "figures").glob("curves-*"))) == 2

    def test_figures_tell_methods_apart_without_colours(self):
        study = make_study([result(algorithm=f"mine{i}") for i in range(MAX_CURVES)])
        styles = Styles(study)
        looks = [styles.of(method) for method in study.methods]
        assert len({look["color"] for look in looks}) == MAX_CURVES
        assert all(one["linestyle"] != other["linestyle"] for one, other in itertools.pairwise(looks))


class TestNothingUnlikeIsMerged:
    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"provenance": {"libraries": {"gymnax": "0.0.8"}}}, "gymnax 0.0.8"),
            ({"provenance": {"env_backend": "spring"}}, "backend spring"),
            ({"provenance": {"reset_mode": "pool"}}, "reset mode pool"),
            ({"provenance": {"x64": True}}, "x64 on"),
            ({"env_options": {"physics": "mjx"}}, "physics mjx"),
            ({"env_params": {"gravity": 5.0}}, "parameter gravity 5"),
            ({"precision": "bfloat16"}, "precision bfloat16"),
            ({"eval_episodes": 7}, "evaluation episodes 7"),
            ({"total_env_steps": 900}, "env steps 900"),
            ({"policy": "training"}, "policy training"),
            ({"policy": "sample"}, "policy sample"),
        ],
    )
    def test_groups_of_their_own(self, report, references, change, told):
        provenance = {"libraries": PROVENANCE["libraries"], **change.pop("provenance", {})}
        other = result((101.0, 102.0, 103.0), provenance=provenance, **change)
        page, out = report([result((1.0, 2.0, 3.0)), other])
        table = csv(out)
        assert sorted(table.IQM) == [2.0, 102.0]
        assert set(table.method) == {"ppo"} and len(set(table.conditions)) == 2
        assert sum(told in conditions for conditions in table.conditions) == 1
        assert len(list((out / "figures").glob("curves-*"))) == 2
        assert [text for text in warnings_of(page) if "2 unlike groups" in text and told in text]
        # Nor over environments.
        assert sorted(csv(out, "aggregates").query("measure == 'IQM'").value) == pytest.approx([0.2, 10.2])

    def test_what_should_not_matter_only_warns(self, report):
        other = {"pgjax": "9", "git_commit": "f" * 40, "device_kind": "H200", "libraries": {"jax": "9", "gymnax": "1.0.1"}}
        page, out = report([result(), result(algorithm="a2c", provenance=other)])
        assert len(list((out / "figures").glob("curves-*"))) == 1
        told = " ".join(warnings_of(page))
        for what in ("2 versions of pgjax", "2 git commits", "2 versions of JAX", "2 kinds of device"):
            assert what in told

    def test_policies_are_in_tables_of_their_own(self, report):
        page, out = report([result((1.0, 2.0, 3.0), sample=(-1.0, -2.0, -3.0))])
        assert csv(out).IQM.tolist() == [2.0] and csv(out).policy.tolist() == ["mode"]
        assert csv(out, "results_sampled").IQM.tolist() == [-2.0]
        assert csv(out, "results_sampled").policy.tolist() == ["sample"]
        assert "of the mode policy" in page

    def test_the_same_seeds_twice_are_two_experiments(self, report):
        page, out = report([result((1.0, 2.0)), result((5.0, 6.0), path="/runs/two")])
        assert dict(zip(csv(out).method, csv(out).IQM, strict=True)) == {"ppo": 1.5, "ppo (run 2)": 5.5}
        (warning,) = warnings_of(page)
        assert "2 times with the same seeds (/runs/one, /runs/two)" in warning

    def test_other_seeds_are_more_of_the_same(self, report):
        page, out = report([result((5.0, 6.0), seeds=(2, 3), path="/runs/two"), result((1.0, 2.0))])
        row = csv(out).iloc[0]
        assert (row.IQM, row.seeds) == (3.5, 4)
        assert "puts together the seeds of 2 runs" in warnings_of(page)[0]

    def test_aggregates_are_of_normalised_scores(self, report, references):
        rng = np.random.default_rng(0)
        scores = {name: rng.uniform(size=(5, 2)) for name in ("a2c", "ppo")}
        results = [
            result(values[:, column] * (10, 100)[column] - (0, 100)[column], name, env)
            for name, values in scores.items()
            for column, env in enumerate((CARTPOLE, PENDULUM))
        ]
        page, out = report([*results, result(env="mine/Unknown"), result(algorithm="trpo")])
        table = csv(out, "aggregates")
        expected = aggregates(scores)
        for measure, key in (("IQM", "iqm"), ("mean", "mean"), ("median", "median"), ("optimality gap", "optimality_gap")):
            for name in scores:
                row = table[(table.method == name) & (table.measure == measure)].iloc[0]
                assert (row.value, row.low, row.high) == pytest.approx(expected[name][key])
                assert (row.environments, row.runs) == (2, 10)
        assert set(table.method) == set(scores)
        text = re.sub("<.*?>", "", page)
        assert "No reference scores to normalise with, left out of the aggregates: mine/Unknown." in text
        assert "Not on every one of these environments, left out of the aggregates: trpo." in text
        compared = csv(out, "comparisons")
        (row,) = compared[compared.over == "2 environments"].to_dict("records")
        assert {row["first"], row["second"]} == set(scores) and row["test"] == "sign flips of 10 pairs"
        first, second = scores[row["first"]], scores[row["second"]]
        assert row["difference"] == pytest.approx(first.mean() - second.mean())
        wins = [(first[:, t, None] > second[:, t]).mean() for t in range(2)]
        assert row["P(first > second)"] == pytest.approx(np.mean(wins))

    def test_seeds_that_differ_are_not_paired(self, report, references):
        _, out = report([result((1.0, 2.0, 3.0)), result((1.0, 2.0, 3.0), "a2c", seeds=(7, 8, 9))])
        assert csv(out, "comparisons").test.tolist() == ["permutation"]

    def test_environments_without_a_reference_are_compared_in_returns(self, report, references):
        _, out = report([result((1.0, 2.0, 3.0), env="mine/X"), result((2.0, 4.0, 6.0), "a2c", env="mine/X")])
        (row,) = csv(out, "comparisons").to_dict("records")
        assert (row["over"], row["difference"], row["in"]) == ("mine/X", -2.0, "returns")


class TestWhatIsMissing:
    def test_is_said(self, report):
        page, out = report(
            [
                result((1.0, 2.0), frozen=(5,), status="failed", note="seed 5 went non-finite"),
                result((1.0, 2.0, 3.0), "a2c"),
                result((1.0, 2.0, 3.0), "trpo", env=PENDULUM, status="interrupted", steps=(300, 600)),
                result((1.0,), "spo", env=PENDULUM),
            ]
        )
        told = "\n".join(warnings_of(page))
        assert "1 cell without a result at the end of the budget, in no figure: 1 interrupted" in told
        assert f"1 seed went non-finite, left out of every number: ppo on {CARTPOLE} (seed 5)" in told
        assert "unequal numbers of seeds" in told
        assert f"3 missing of 6 pairs of method and group: spo on {CARTPOLE}; ppo on {PENDULUM}" in told
        assert set(csv(out).method) == {"ppo", "a2c", "spo"}
        status = csv(out, "status")
        # Those that need attention come first.
        assert set(status.method[:2]) == {"ppo", "trpo"}
        assert status.set_index("method")["env steps"]["trpo"] == 600
        assert status.set_index("method").note["ppo"] == "seed 5 went non-finite"

    def test_nothing_is_finished_yet(self, report):
        pending = dataclasses.replace(result(status="pending"), seeds=(), returns={}, env_steps=np.zeros(0, int), provenance={})
        page, out = report([pending])
        assert "No cell has a result at the end of its budget yet" in page
        assert not list((out / "figures").iterdir())
        assert csv(out, "status").status.tolist() == ["pending"]

    def test_seeds_without_a_return_are_in_no_number(self, report):
        _, out = report([result((1.0, np.nan, 3.0))])
        assert (csv(out).IQM[0], csv(out).seeds[0]) == (2.0, 2)

    def test_results_that_make_no_sense_are_listed(self, report):
        broken = dataclasses.replace(result(path="/runs/broken"), config={"env": "x"})
        _page, out = report([result(), broken])
        row = csv(out, "status").iloc[0]
        assert (row.status, row.note, row.path) == ("unreadable", "config.algorithm is missing", "/runs/broken")
        with pytest.raises(RequestError, match=r"no result to report on; the first, /runs/broken: config.algorithm is missing"):
            report([broken])
        with pytest.raises(RequestError, match="no result to report on"):
            report([])


class TestSensitivity:
    def test_is_shown_for_each_number_varied(self, report):
        results = [
            result(hypers={"learning_rate": rate, "gamma": gamma}, env=env)
            for rate in (1e-4, 1e-3)
            for gamma in (0.9, 0.99)
            for env in (CARTPOLE, PENDULUM)
        ]
        page, out = report(results)
        assert len(list((out / "figures").glob("sensitivity-*"))) == 2
        assert "best over them at each value, which is optimistic" in captions(page)[-1]

    def test_is_not_shown_across_setups(self, report):
        _, out = report([result(setup={"num_envs": n}, hypers={"gamma": 0.9 if n == 4 else 0.8}) for n in (4, 8)])
        assert not list((out / "figures").glob("sensitivity-*"))

    @pytest.mark.parametrize(
        ("values", "is_log"),
        [
            ((1e-4, 1e-3, 1e-2), True),
            ((1e-4, 3e-4, 1e-3), True),
            ((0.1, 0.2, 0.3), False),
            ((0.9, 0.95, 0.99), False),
            ((1, 2), False),
            ((0.001, 0.01), True),
            ((0.0, 0.01, 0.1), False),
            ((1.0,), False),
        ],
    )
    def test_axis(self, values, is_log):
        assert is_log_spaced(values) is is_log


class TestPage:
    def results(self):
        bad = f"{BAD}\"'&$x_{{"
        one = result(
            env=f"gymnax/{bad}",
            algorithm=bad,
            path=f"/runs/{bad}",
            note=bad,
            status=bad,
            hypers={bad: 1.0},
            setup={bad: bad},
            env_options={bad: bad},
            env_params={bad: 2.0},
            provenance={"git_commit": bad, "libraries": {"gymnax": bad, bad: bad}, "command": [bad], "reset_mode": bad},
        )
        return [one, result(env=f"gymnax/{bad}", algorithm=bad, hypers={bad: 2.0}, sample=(1.0, 2.0, 3.0, 4.0))]

    def test_strings_from_files_are_escaped(self, report):
        page, _ = report(self.results(), title=BAD, command=BAD)
        assert page.count("<script") == page.count("</script") == 1
        assert "<script>alert" not in page
        assert page.count(tables.esc(BAD)) > 10

    def test_nothing_is_loaded_from_elsewhere(self, report):
        page, _ = report([result(), *self.results()])
        assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[^\"]*", "", page).split("<script>")[0])
        assert not re.search(r"https?:", page)
        for attribute, value in re.findall(r'\s(src|href|action|data|poster|srcset)="(.{0,40})', page):
            assert value.startswith("data:image/png;base64,") if attribute == "src" else value.startswith("#"), value
        assert "@import" not in page and "url(" not in page
        policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
        assert policy is not None and "default-src 'none'" in policy[1] and "unsafe-inline" not in policy[1]
        for kind in ("style", "script"):
            (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
            assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy[1]

    def test_tells_the_commands(self, report):
        page, out = report([result(hypers={"gamma": 0.9})])
        command = csv(out, "commands").command[0]
        assert command.startswith(f"pgjax train ppo --env {CARTPOLE}") and "--hypers.gamma 0.9" in command
        assert tables.esc(command) in page and "pgjax report runs" in page
        assert csv(out, "recorded_commands").command.tolist() == ["pgjax train ppo"]
        assert csv(out, "provenance")["git commit"].tolist() == [PROVENANCE["git_commit"]]

    def test_file_names_are_plain_and_never_the_same_twice(self):
        names = FileNames()
        taken = [names.take(text) for text in ("a/b", "a b", "A-B", "../../etc", "", "x" * 300)]
        assert taken[:3] == ["a-b", "a-b-2", "A-B-3"]
        assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,89}", name) for name in taken)


@pytest.fixture
def fast_description(monkeypatch):
    """The machine stays the same during these tests, and asking git takes a while."""
    monkeypatch.setattr(store, "describe_machine", lambda: PROVENANCE)


@pytest.fixture
def runs(tmp_path_factory, fast_description):
    """A folder with finished runs: ``deep/a`` of ppo, ``deep/b`` of a2c; PPO has two configurations."""
    root = tmp_path_factory.mktemp("runs")
    for name, algorithm, configs in (("a", "ppo", ({"gamma": 0.9}, {"gamma": 0.8})), ("b", "a2c", ({},))):
        spec = RunSpec(algorithm, CARTPOLE, 100, configs=configs, seeds=(0, 1))
        with RunStore.create(root / "deep" / name, spec.config()) as run:
            lanes = [(config, seed) for config in range(len(configs)) for seed in (0, 1)]
            config, seed = np.array(lanes).T
            ones = np.ones(len(lanes))
            run.append(
                {"config": config, "seed": seed, "iteration": ones, "env_steps": 100 * ones, "nonfinite": 0 * ones},
                {
                    "config": config,
                    "seed": seed,
                    "env_steps": 100 * ones,
                    "policy": ["mode"] * len(lanes),
                    "episode": 0 * ones,
                    "return": 10.0 * config + seed,
                    "length": 5 * ones,
                },
            )
            run.commit(1, {"x": jnp.zeros(1)}, {"nonfinite": [], "eval_episodes": 4})
            run.finish(seconds={"train": 3.0})
    return root


class TestCommand:
    def test_folder_that_contains_runs(self, answer, runs, capsys):
        assert answer(["report", str(runs)]) == (0, "")
        table = csv(runs / "report").set_index("method")
        assert table.IQM.to_dict() == {"ppo gamma=0.8": 10.5, "ppo gamma=0.9": 0.5, "a2c": 0.5}
        # Once more, over the first one; and a run that is named twice counts once.
        assert answer(["report", str(runs), str(runs / "deep" / "a"), "--out", str(runs / "report")])[0] == 0
        assert len(csv(runs / "report")) == 3

    def test_result_files_are_read_in_place_of_tables(self, answer, runs):
        for number, path in enumerate(("cells/one", "cells/two")):
            folder = runs / "sweep" / path
            folder.mkdir(parents=True)
            one = result(np.arange(4.0) + number, hypers={"gamma": 0.5 + number / 10}, path="/elsewhere")
            (folder / "result.json").write_text(one.dump())
        (runs / "deep" / "b" / "result.json").write_text(result((42.0,), "trpo").dump())
        assert answer(["report", str(runs), "--out", str(runs / "out")])[0] == 0
        table = csv(runs / "out").set_index("method")
        assert "a2c" not in table.index and table.IQM["trpo"] == 42
        assert table.path["ppo gamma=0.5"] == str(runs / "sweep" / "cells" / "one")

    def test_broken_runs_are_listed(self, answer, runs):
        good = runs / "deep" / "b"
        for name in ("parquet", "run", "result", "newer", "foreign", "list"):
            shutil.copytree(good, runs / "broken" / name)
        broken = runs / "broken"
        for table in ("metrics.parquet", "evaluations.parquet"):
            (broken / "parquet" / table).write_bytes((good / table).read_bytes()[:100])
        (broken / "run" / "run.json").write_text('{"half')
        (broken / "result" / "result.json").write_text('{"path": 1}')
        text = (good / "run.json").read_text()
        (broken / "newer" / "run.json").write_text(text.replace('"version": 1', '"version": 2'))
        (broken / "foreign" / "run.json").write_text("{}")
        (broken / "list" / "result.json").write_text("[1, 2]")
        assert answer(["report", str(runs)]) == (0, "")
        status = csv(runs / "report", "status")
        unreadable = status[status.status == "unreadable"]
        reasons = {path.rpartition("/")[2]: note for path, note in zip(unreadable.path, unreadable.note, strict=True)}
        assert set(reasons) == {"parquet", "run", "result", "newer", "foreign", "list"}
        assert "cannot be read" in reasons["parquet"] and "cannot be read" in reasons["run"]
        assert "not a result" in reasons["result"] and "version 2" in reasons["newer"]
        assert "was not written by pgjax" in reasons["foreign"]
        assert not any("\n" in note for note in reasons.values())
        assert len(csv(runs / "report")) == 3
        page = (runs / "report" / "report.html").read_text()
        assert [text for text in warnings_of(page) if "6 runs that cannot be read" in text]
        # With nothing else there is nothing to report on.
        code, said = answer(["report", str(broken)])
        assert code == 2 and "none of the 6 runs can be read; the first" in said

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["report"], ["no run was named"]),
            (["report", "nowhere"], ["there is no folder nowhere"]),
            (["report", "{file}"], ["is a file"]),
            (["report", "{empty}"], ["there is no run in"]),
            (["report", "{runs}", "--out", "{file}"], ["--out", "is a file"]),
            (["report", "{runs}", "--out", "{file}/below"], ["--out", "cannot be written"]),
            (["report", "{runs}", "--format", "pdf"], ["--format"]),
        ],
    )
    def test_wrong_requests(self, refuse, runs, tmp_path_factory, argv, words):
        empty = tmp_path_factory.mktemp("empty")
        file = tmp_path_factory.mktemp("file") / "file"
        file.write_text("")
        refuse([word.format(runs=runs, empty=empty, file=file) for word in argv], words)


@pytest.fixture
def browser():
    """A page of a browser without network; the test is skipped where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    quiet = "no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync no-first-run"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=[f"--{word}" for word in quiet.split()])
        context = chromium.new_context(offline=True, viewport={"width": 1280, "height": 900})
        yield context.new_page()
        chromium.close()


class TestInABrowser:
    def test_sorts_filters_and_asks_for_nothing(self, browser, report, references):
        # As text, 9 comes after 100.
        finals = {"ppo": 9.0, "a2c": 100.0, "trpo": -5.5, "spo": 20.0}
        results = [result((value,) * 3, name) for name, value in finals.items()]
        results += [result((value + 1, value), name, PENDULUM) for name, value in finals.items()]
        results += TestPage().results()
        _, out = report(results)
        complaints, requests = [], []
        browser.on("console", lambda message: complaints.append(message.text))
        browser.on("pageerror", lambda error: complaints.append(str(error)))
        browser.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        browser.on("request", lambda request: requests.append(request.url))
        browser.goto((out / "report.html").as_uri())

        table = browser.locator("#table-results")

        def column(index):
            return table.locator(f"tbody tr:not([hidden]) td:nth-child({index})").all_text_contents()

        heads = [text.strip() for text in table.locator("th").all_text_contents()]
        iqms, envs = heads.index("IQM") + 1, heads.index("environment") + 1

        def numbers():
            return [float(text.replace(",", "").replace("−", "-")) for text in column(iqms)]

        assert numbers() != sorted(numbers())
        button = table.get_by_role("button", name="IQM", exact=True)
        button.click()
        assert numbers() == sorted(numbers()) and len(numbers()) == 10
        assert table.locator("th").nth(iqms - 1).get_attribute("aria-sort") == "ascending"
        button.press("Enter")
        assert numbers() == sorted(numbers(), reverse=True)
        assert table.locator("th[aria-sort]").count() == 1
        # One with one seed has no standard deviation: absent values are last in either direction.
        table.get_by_role("button", name="environment", exact=True).click()
        assert column(envs) == sorted(column(envs), key=str.lower)

        table.locator("input").fill("pendulum TRPO")
        assert column(envs) == [PENDULUM] and table.locator("output").inner_text() == "1 of 10 rows"
        table.locator("input").fill("")
        assert len(column(envs)) == 10

        pictures = browser.locator("img")
        assert pictures.evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 300)")
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        shot = image.imread(io.BytesIO(browser.screenshot(full_page=True)))
        assert shot.shape[0] > 1500 and shot[..., :3].std() > 0.05
        assert complaints == []
        assert [url for url in requests if not url.startswith("data:")] == [(out / "report.html").as_uri()]

    def test_absent_values_are_last_either_way(self, browser, report):
        _, out = report([result((1.0,)), result((1.0, 9.0), "a2c"), result((1.0, 3.0), "trpo")])
        browser.goto((out / "report.html").as_uri())
        table = browser.locator("#table-results")
        heads = [text.strip() for text in table.locator("th").all_text_contents()]
        cells = table.locator(f"tbody td:nth-child({heads.index('std') + 1})")
        button = table.get_by_role("button", name="std", exact=True)
        button.click()
        assert cells.all_text_contents() == ["1.414", "5.657", "–"]
        button.click()
        assert cells.all_text_contents() == ["5.657", "1.414", "–"]


def test_references_of_the_fixture_are_used(references):
    assert iqm(reference_scores.normalize(np.array([5.0, 5.0]), CARTPOLE)) == 0.5
