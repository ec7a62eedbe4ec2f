"""Meta-training: the loop on a search of a second, what a generation of LPO's is made of, and the command."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax
from pgjax import cli
from pgjax.algorithms import lpo, ppo
from pgjax.errors import RequestError
from pgjax.experiments.meta_train import MetaTrainer, loop
from pgjax.experiments.meta_train import lpo as meta_lpo
from pgjax.host.checkpoints import latest_checkpoints
from pgjax.learned import evolution
from pgjax.learned import files as learned_files
from tests.probe_envs import Probe
from tests.processes import run_python

# --- the loop


def toy():
    """Evolution towards a point, in a dozen numbers."""
    es = evolution.open_es({"x": jnp.zeros(12)}, 8, 0.1, 0.05)

    def step(state):
        key, key_ask = jax.random.split(state["key"])
        population, asked = es.ask(state["es"], key_ask)
        fitness = -((population["x"] - 1) ** 2).sum(1)
        metrics = {"fitness_mean": fitness.mean(), "fitness_max": fitness.max()}
        return {"key": key, "es": es.tell(asked, population, fitness, key)}, metrics

    return MetaTrainer(
        init=lambda key: {"key": key, "es": es.init(key, {"x": jnp.zeros(12)})},
        step=step,
        learned=lambda state: es.mean(state["es"]),
        kind="lpo",
        convention={"form": "none"},
        env_steps_per_step=8,
        report=lambda state: {"range": {"log_ratio": [-1, 1], "advantage": [-2, 2]}},
    )


@pytest.fixture
def often(monkeypatch):
    """A checkpoint and a line after every step."""
    for name in ("CHECKPOINT_SECONDS", "REPORT_SECONDS", "CHUNK_SECONDS"):
        monkeypatch.setattr(loop, name, 0.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)


def contents(out):
    learned = learned_files.load(out / "learned.npz", "lpo")
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in loop.read_log(out)]
    return learned, rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("meta") / "run"
    assert loop.meta_train(toy(), out, 12, request={"name": "toy"}, say=lambda text: None)
    return out


def test_what_a_finished_loop_leaves(undisturbed):
    learned, rows = contents(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["fitness_mean"] > rows[0]["fitness_mean"] + 1
    assert learned.params["x"].shape == (12,) and learned.convention == {"form": "none"}
    assert learned_files.limits_of(learned) == ((-1.0, 1.0), (-2.0, 2.0))
    said = learned.provenance
    assert said["steps_done"] == 12 and said["env_steps"] == 96 and said["request"]["seed"] == 0
    assert said["curve"]["value"] == [row["fitness_mean"] for row in rows]
    assert said["sessions"][0]["provenance"]["libraries"]["jax"] == jax.__version__
    meta = json.loads((undisturbed / "meta.json").read_text())
    assert meta["status"] == "finished" and (undisturbed / "curve.png").stat().st_size > 3000
    # The same search, written as a plain loop.
    trainer = toy()
    state = trainer.init(jax.random.key(0))
    for _ in range(12):
        state, metrics = jax.jit(trainer.step)(state)
    np.testing.assert_allclose(learned.params["x"], trainer.learned(state)["x"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows[-1]["fitness_max"], metrics["fitness_max"], rtol=1e-4)


class Killed(BaseException):
    """Ends the loop as a kill would, with whatever is on the disk."""


@pytest.mark.parametrize("how", ["kill", "signal"])
def test_a_loop_cut_short_goes_on_bit_for_bit(undisturbed, tmp_path, often, how):
    lines = []

    def say(text):
        lines.append(text)
        if "step      5" in text:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    arguments = {"request": {"name": "toy"}, "command": "pgjax meta-train toy --out x"}
    if how == "kill":
        with pytest.raises(Killed):
            loop.meta_train(toy(), out, 12, **arguments, say=say)
        assert not (out / "learned.npz").exists()
    else:
        assert not loop.meta_train(toy(), out, 12, **arguments, say=say)
        assert lines[-1] == f"continue with: pgjax meta-train toy --out {out} --resume"
        assert contents(out)[0].provenance["steps_done"] == 5
        assert json.loads((out / "meta.json").read_text())["status"] == "interrupted"
    done = latest_checkpoints(out / "checkpoints")[0]
    assert 0 < done <= 5
    # Lines of the log that no checkpoint knows of are made again.
    with (out / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 99}\n' * 500)
    assert loop.meta_train(toy(), out, 12, request={"name": "toy"}, resume=True, say=lines.append)
    (learned, rows), (expected, expected_rows) = contents(out), contents(undisturbed)
    np.testing.assert_array_equal(learned.params["x"], expected.params["x"])
    assert rows == expected_rows
    assert len(learned.provenance["sessions"]) == 2
    after, whole = (json.loads((folder / "meta.json").read_text()) for folder in (out, undisturbed))
    assert after["status"] == "finished"
    assert all(after[name] == whole[name] for name in whole if name not in ("sessions", "request"))
    assert loop.meta_train(toy(), out, 12, request={"name": "toy"}, resume=True, say=lines.append)
    assert "finished already" in lines[-1]


def test_folders_that_hold_something_else(undisturbed, tmp_path):
    with pytest.raises(RequestError, match="continue it with --resume"):
        loop.meta_train(toy(), undisturbed, 12)
    with pytest.raises(RequestError, match=r"steps is 12 in .* and 13 in this request"):
        loop.meta_train(toy(), undisturbed, 13, request={"name": "toy"}, resume=True)
    with pytest.raises(RequestError, match="no meta-training in"):
        loop.read_request(tmp_path)
    (tmp_path / "letter").write_text("")
    with pytest.raises(RequestError, match="holds letter"):
        loop.meta_train(toy(), tmp_path, 12)


# --- a generation of LPO's

ENV = Probe("responding", continuous=True)
SETUP = ppo.Setup(num_envs=4, num_steps=8, hidden_sizes=(4,), num_epochs=2, num_minibatches=2)
INNER = meta_lpo.Inner("probe/responding", ENV, SETUP, ppo.Hypers(learning_rate=0.05, anneal_env_steps=np.inf))
TINY = dict(popsize=4, inner_env_steps=96, eval_episodes=4, hidden=8)


def test_an_inner_run_is_an_ordinary_run_with_that_objective():
    template = lpo.init_params(jax.random.key(0), hidden=8)
    params = jax.tree.map(lambda x: x + 0.5, template)
    objective = lpo.objective(template)
    run = jax.jit(meta_lpo._inner_run(INNER, objective, 96, 4))
    algorithm = ppo.make(ENV, SETUP, INNER.hypers, objective=objective)
    train = jax.jit(pgjax.make_train(algorithm, 96, num_evals=1, eval_episodes=4))
    for key in jax.random.split(jax.random.key(1), 2):
        _, metrics = train(key, algorithm.hypers.replace(objective=params))
        np.testing.assert_allclose(run(key, params), metrics["evaluations"].sample_return.mean(), rtol=1e-4)
    assert run(key, params) != run(key, template)


def test_a_generation():
    trainer = meta_lpo.make([INNER], seeds=2, **TINY)
    state = jax.jit(trainer.init)(jax.random.key(0))
    step = jax.jit(trainer.step)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), state)
    for generation in range(2):
        state, metrics = step(state)
        assert state.generation == generation + 1
        assert all(value.shape == () for value in metrics.values())
    assert (
        step._cache_size() == 1 and jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), state) == types
    )
    names = "fitness_mean fitness_max ties failed sigma mean_norm update_norm return_responding best_responding".split()
    assert sorted(metrics) == sorted(names)
    assert metrics["failed"] == 0 and metrics["ties"] < 1 and metrics["update_norm"] > 0
    assert -2 < metrics["return_responding"] <= metrics["best_responding"] <= 0
    assert trainer.env_steps_per_step == 4 * 2 * 96
    assert jax.tree.map(jnp.shape, trainer.learned(state)) == {"hidden": (8, 8), "out": (8, 1)}


def test_partners_differ_by_their_drifts_alone():
    """With noise too small for float32, both of a pair are one drift: equal in every run, so that nothing moves."""
    trainer = meta_lpo.make([INNER], sigma=1e-14, **TINY)
    start = jax.jit(trainer.init)(jax.random.key(0))
    _, metrics = jax.jit(trainer.step)(start)
    assert metrics["ties"] == 1 and metrics["update_norm"] == 0
    assert metrics["best_responding"] > metrics["return_responding"], "pairs should have keys of their own"


def test_members_that_fail_are_counted_and_the_search_goes_on():
    broken = dataclasses.replace(INNER, hypers=INNER.hypers.replace(reward_scale=np.float32(1e38)))
    trainer = meta_lpo.make([broken], **TINY)
    state, metrics = jax.jit(trainer.step)(jax.jit(trainer.init)(jax.random.key(0)))
    assert metrics["failed"] == 1 and metrics["update_norm"] == 0
    assert np.isfinite(trainer.learned(state)["hidden"]).all()


def test_environments_count_alike_whatever_their_scale():
    returns = jnp.array([[1.0, 2.0, 3.0, 6.0], [-100.0, 300.0, -100.0, jnp.nan]])
    # By hand: mean 3, spread sqrt(14/4); and mean 100/3, spread 188.5618 over those that did not fail.
    first = (np.array([1.0, 2, 3]) - 3) / np.sqrt(3.5)
    second = (np.array([-100.0, 300, -100]) - 100 / 3) / 188.56181
    fitness = np.asarray(meta_lpo.normalised(returns))
    np.testing.assert_allclose(fitness[:3], (first + second) / 2, rtol=1e-5)
    assert np.isnan(fitness[3])
    np.testing.assert_allclose(meta_lpo.normalised(returns.at[0].mul(1000.0))[:3], fitness[:3], rtol=1e-5)


def test_the_range_of_meta_training():
    counts = np.zeros(meta_lpo._CELLS)
    # A thousand samples a cell from -1 to 1 on [-6, 6], one far out: the far one is not in the range.
    counts[200:280], counts[470] = 1000, 1
    low, high = meta_lpo._quantiles(counts, -6.0, 6.0)
    assert low == pytest.approx(-1, abs=0.03) and high == pytest.approx(1, abs=0.03)
    trainer = meta_lpo.make([INNER], temporal=True, **TINY)
    told = trainer.report(jax.jit(trainer.init)(jax.random.key(0)))
    (low, high), (lowest, highest) = told["range"]["log_ratio"], told["range"]["advantage"]
    assert -3 < low < 0 < high < 3 and -5 < lowest < -0.5 and 0.5 < highest < 5
    # The search starts from PPO, whose door shuts at 1.2 whatever the time.
    np.testing.assert_allclose(told["upper_clip"]["ratio"], 1.2, atol=0.01)
    json.dumps(told)


def test_a_temporal_drift_makes_its_own_schedule():
    assert meta_lpo.inner_algorithm("gymnax/CartPole-v1").setup.learning_rate_schedule == "linear"
    inner = meta_lpo.inner_algorithm("gymnax/CartPole-v1", temporal=True, hypers={"gamma": 0.9})
    assert inner.setup.learning_rate_schedule == "constant" and inner.setup.num_envs == 4
    np.testing.assert_allclose(inner.hypers.gamma, 0.9)


def test_two_host_devices_give_what_one_gives(tmp_path):
    """To rounding, not to the bit: lanes are batched by fours or by twos."""
    code = """
import sys
from pgjax.host import lanes
lanes.use_host_devices(2)
import jax
from pgjax.experiments.meta_train import loop, lpo
from tests.test_meta_train import INNER, TINY
for devices in (1, 2):
    trainer = lpo.make([INNER], devices=devices, **TINY)
    assert len(trainer.devices) == devices
    loop.meta_train(trainer._replace(report=None), f"{sys.argv[1]}/{devices}", 3)
"""
    done = run_python(code, str(tmp_path), timeout=900)
    assert done.returncode == 0, done.stderr
    (one, one_rows), (two, two_rows) = (contents(tmp_path / name) for name in "12")
    for name in one.params:
        np.testing.assert_allclose(one.params[name], two.params[name], rtol=1e-3, atol=1e-5)
    for row, other in zip(one_rows, two_rows, strict=True):
        assert row.keys() == other.keys()
        np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_drift_learned_from_nothing_earns_more_than_none():
    """Sixteen epochs at a high learning rate undo a policy without a clip. Seen: 0.75 at first, 0.97 ten generations on."""
    setup = dict(num_envs=4, num_steps=32, num_epochs=16, num_minibatches=2, hidden_sizes=(16, 16))
    inner = meta_lpo.inner_algorithm("toy/GridWorld-5x5", setup=setup, hypers={"learning_rate": 0.01})
    trainer = meta_lpo.make(
        [inner], init="scratch", popsize=16, seeds=2, inner_env_steps=4096, sigma=0.1, lr=0.05, shaping="centred_ranks"
    )
    step, state, earned = jax.jit(trainer.step), jax.jit(trainer.init)(jax.random.key(0)), []
    for _ in range(16):
        state, metrics = step(state)
        earned.append(float(metrics["return_GridWorld-5x5"]))
    # 32 runs a generation, whose returns lie in [0, 1]: the mean of four generations is good to 0.05.
    assert np.mean(earned[-4:]) > earned[0] + 0.1


# --- the command


def test_wrong_requests(refuse):
    meta = ["meta-train", "lpo"]
    refuse(["meta-train", "lop"], ["'lop'", "lpo"])
    refuse(meta, ["--env is missing"])
    refuse([*meta, "--env", "gymnax/CartPole-v1", "--popsize", "7"], ["popsize = 7", "even"])
    refuse([*meta, "--env", "gymnax/CartPole-v1", "--env", "gymnax/CartPole-v1"], ["twice"])
    refuse([*meta, "--env", "gymnax/CartPol-v1"], ["CartPole-v1"])
    refuse([*meta, "--env", "gymnax/CartPole-v1", "--seeds", "0"], ["seeds = 0"])
    refuse([*meta, "--env", "gymnax/CartPole-v1", "--hypers", "gama=1"], ["gama", "gamma"])
    refuse([*meta, "--resume"], ["no meta-training"])


def test_from_the_command_line_to_a_run_with_what_was_learned(tmp_path, capsys, answer):
    out = tmp_path / "meta"
    words = ["meta-train", "lpo", "--env", "toy/Chain-7", "--popsize", "2", "--inner-env-steps", "64", "--generations", "2"]
    small = ["--setup", "num_envs=2", "--setup", "num_steps=16", "--setup", "hidden_sizes=4,4"]
    assert cli._main([*words, *small, "--hidden", "4", "--eval-episodes", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "inner env steps/s" in said and str(out / "learned.npz") in said
    assert cli._main(["meta-train", "lpo", "--out", str(out), "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    code, said = answer(["meta-train", "lpo", "--env", "toy/Chain-7", "--popsize", "4", "--out", str(out), "--resume"])
    assert code == 2 and "is 2 in" in said
    name = f"lpo:{out / 'learned.npz'}"
    train = [
        "train",
        "ppo",
        "--env",
        "toy/Chain-7",
        "--total-env-steps",
        "64",
        "--setup.num-envs",
        "2",
        "--setup.num-steps",
        "16",
    ]
    assert cli._main([*train, "--num-evals", "0", "--objective", name, "--out", str(tmp_path / "run")]) == 0
    run = pgjax.load(tmp_path / "run")
    assert run.config["objective"] == f"{name}@{learned_files.digest(out / 'learned.npz')[:12]}"
    assert "outside_range" in run.metrics
    # Other weights under the same name are another objective.
    learned = learned_files.load(out / "learned.npz", "lpo")
    learned_files.save(out / "learned.npz", learned._replace(params=jax.tree.map(lambda x: x + 1, learned.params)))
    code, said = answer(["train", "ppo", "--out", str(tmp_path / "run"), "--resume"])
    assert code == 2 and "the weights of" in said
