"""The command line: what a wrong request is answered with, and what the commands print."""

import dataclasses
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import pgjax
from pgjax import cli
from pgjax.algorithms import get, list_algorithms
from pgjax.cli import train
from pgjax.errors import RequestError
from pgjax.experiments import presets
from pgjax.host.runner import RunSpec
from pgjax.learned import files as learned_files
from pgjax.learned.files import Learned
from pgjax.learned.rule import RuleSpec, convention_of, init_rule

ROOT = Path(__file__).resolve().parent.parent
CARTPOLE = ["train", "ppo", "--env", "gymnax/CartPole-v1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on CartPole, from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "cartpole"
    options = ["--seeds", "2", "--total-env-steps", "2000", "--num-evals", "2", "--eval-episodes", "2", "--out", str(folder)]
    assert cli._main([*CARTPOLE, *options]) == 0
    return folder


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "pp0", "--env", "gymnax/CartPole-v1"], ["pp0", "ppo"]),
        (["train", "ppo", "--env", "gymnax/CartPole-v2"], ["CartPole-v2", "CartPole-v1"]),
        (["train", "ppo", "--env", "gymnasium/CartPole-v1"], ["gymnasium", "gymnax"]),
        (["train", "ppo"], ["--env"]),
        ([*CARTPOLE, "--seedz", "2"], ["--seedz", "--seeds"]),
        ([*CARTPOLE, "--seeds", "two"], ["--seeds", "two"]),
        ([*CARTPOLE, "--seeds", "0"], ["--seeds", "at least 1"]),
        ([*CARTPOLE, "--total-env-steps", "0"], ["total_env_steps", "at least 1"]),
        ([*CARTPOLE, "--setup.boundary", "wrong"], ["boundary", "wrong", "bootstrap"]),
        ([*CARTPOLE, "--setup.num-minibatches", "5"], ["num_minibatches = 5", "does not divide", "try"]),
        ([*CARTPOLE, "--setup.num-envs", "0"], ["num_envs", "0"]),
        ([*CARTPOLE, "--hypers.clip-eps", "-0.1"], ["clip_eps", "-0.1", "negative"]),
        ([*CARTPOLE, "--hypers.learning-rate", "nan"], ["learning_rate", "nan"]),
        ([*CARTPOLE, "--hypers.gamma", "1.5"], ["gamma", "1.5", "[0, 1]"]),
        ([*CARTPOLE, "--setup.distribution", "gaussian"], ["distribution", "gaussian"]),
        (["train", "ppo", "--env", "gymnax/Pendulum-v1", "--setup.distribution", "categorical"], ["categorical"]),
        ([*CARTPOLE, "--preset", "cleanrll"], ["cleanrll", "cleanrl"]),
        ([*CARTPOLE, "--env-option", "reset_mod=pool"], ["reset_mod", "reset_mode"]),
        ([*CARTPOLE, "--env-option", "pool"], ["--env-option", "K=V"]),
        ([*CARTPOLE, "--env-param", "gravitty=3"], ["gravitty", "gravity"]),
        ([*CARTPOLE, "--objective", "nowhere.py:f"], ["nowhere.py"]),
        ([*CARTPOLE, "--devices", "99"], ["devices = 99"]),
        ([*CARTPOLE, "--eval-episodes", "0"], ["eval_episodes"]),
        (["train", "reinforce", "--env", "gymnax/CartPole-v1", "--setup.baseline", "none", "--preset", "none",
          "--setup.tail", "bootstrap"], ["tail", "baseline"]),
        (["list", "env"], ["env", "envs"]),
        (["plot", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["eval", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["bench", "--parts", "pppo"], ["pppo", "ppo"]),
        (["doctor", "now"], ["now"]),
    ],
)  # fmt: skip
def test_a_wrong_request_is_answered_in_one_line(refuse, argv, words):
    refuse(argv, words)


def test_a_missing_extra_is_named(answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, said = answer([*CARTPOLE, "--log-to", "wandb"])
    assert code == 2 and "pip install 'pgjax[wandb]'" in said


def test_a_folder_with_another_run_is_refused_and_kept(answer, finished):
    before = (finished / "run.json").read_bytes()
    code, said = answer([*CARTPOLE, "--out", str(finished)])
    assert code == 2 and "--resume" in said
    code, said = answer([*CARTPOLE, "--hypers.gamma", "0.5", "--out", str(finished), "--resume"])
    assert code == 2 and ("configs" in said or "seeds" in said or "total_env_steps" in said)
    code, said = answer(["train", "a2c", "--out", str(finished), "--resume"])
    assert code == 2 and "ppo" in said
    assert (finished / "run.json").read_bytes() == before


def test_extending_a_finished_run(answer, capsys, finished, tmp_path):
    folder = tmp_path / "extended"
    shutil.copytree(finished, folder)
    before = (folder / "run.json").read_bytes()
    for wrong, words in (
        (["ppo", "--extend", "2000"], ["total_env_steps = 2000", "2048 already"]),
        (["ppo", "--extend", "1000"], ["total_env_steps = 1000", "give more"]),
        (["ppo", "--extend", "4000", "--hypers.gamma", "0.5"], ["--hypers.gamma", "--extend"]),
        (["ppo", "--extend", "4000", "--env", "gymnax/CartPole-v1"], ["--env", "--extend"]),
        (["ppo", "--extend", "many"], ["--extend", "many"]),
        (["ppo", "--extend"], ["--extend"]),
        (["a2c", "--extend", "4000"], ["ppo", "a2c"]),
    ):
        code, said = answer(["train", *wrong[:1], "--out", str(folder), *wrong[1:]])
        assert code == 2 and all(word in said for word in words), said
    code, said = answer(["train", "ppo", "--extend", "4000"])
    assert code == 2 and "--out" in said
    options = ["--seeds", "2", "--total-env-steps", "4000", "--num-evals", "2", "--eval-episodes", "2"]
    code, said = answer([*CARTPOLE, *options, "--out", str(folder), "--resume"])
    assert code == 2 and "--extend" in said
    assert (folder / "run.json").read_bytes() == before

    assert cli._main(["train", "ppo", "--out", str(folder), "--extend", "4000"]) == 0
    assert "extended at 2,048 env steps, from 2,000 to 4,000: schedules run to the new total" in capsys.readouterr().out
    run = pgjax.load(folder)
    assert run.status == "finished" and run.config["total_env_steps"] == 4000
    assert run.metrics.env_steps.max() == 4096 and sorted(run.evaluations.env_steps.unique()) == [1024, 2048, 3072, 4096]
    # It is an ordinary run of 4000 steps now: asking for just that goes on with it.
    assert cli._main([*CARTPOLE, *options, "--out", str(folder), "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_passed_over_or_refused(answer, finished, tmp_path):
    from pgjax.host import checkpoints
    from pgjax.host.store import RunStore

    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    with RunStore.open(folder) as store:
        store.set_status("interrupted")
    for step in checkpoints.latest_checkpoints(folder / "checkpoints"):
        for file in (folder / "checkpoints" / str(step)).rglob("*"):
            if file.is_file() and file.stat().st_size > 200:
                file.write_bytes(b"\0" * file.stat().st_size)
    code, said = answer(["train", "ppo", "--out", str(folder), "--resume"])
    assert code == 2 and "checkpoint" in said


def test_eval_plot_and_resume_of_a_finished_run(answer, capsys, finished, tmp_path):
    assert cli._main(["eval", str(finished), "--episodes", "3", "--csv", str(tmp_path / "episodes.csv")]) == 0
    said = capsys.readouterr().out
    assert "mode: IQM over 2 lanes" in said and "sample: IQM over 2 lanes" in said
    assert len((tmp_path / "episodes.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    assert cli._main(["plot", str(finished), "--out", str(tmp_path / "c.png"), "--metrics", "kl"]) == 0
    assert (tmp_path / "c.png").stat().st_size > 5000
    code, said = answer(["plot", str(finished), "--metrics", "kll"])
    assert code == 2 and "kll" in said
    code, said = answer(["eval", str(finished), "--env", "gymnax/Acrobot-v1"])
    assert code == 2 and "observation_space" in said
    assert cli._main(["train", "ppo", "--out", str(finished), "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out


def test_an_objective_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import jax.numpy as jnp\ndef plain(log_ratio, advantage):\n    return jnp.exp(log_ratio) * advantage\n")
    options = ["--total-env-steps", "1000", "--num-evals", "0", "--objective", f"{file}:plain", "--out", str(tmp_path / "run")]
    assert cli._main([*CARTPOLE, *options]) == 0
    assert pgjax.load(tmp_path / "run").config["objective"].endswith("mine.py:plain")


def test_help_is_there_and_the_first_one_needs_no_jax(capsys):
    code = "import sys; from pgjax import cli; cli._main(['--help']); assert 'jax' not in sys.modules, 'jax was imported'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "train" in done.stdout, done.stderr
    for command in ("train", "list", "doctor"):
        assert cli._main([command, "--help"]) == 0
        assert "usage" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli._main(["train", "ppo", "--help"])
    assert stop.value.code == 0
    assert "--hypers.clip-eps" in capsys.readouterr().out
    for what, word in (("envs", "brax/hopper"), ("algorithms", "reinforce"), ("presets", "cleanrl")):
        assert cli._main(["list", what]) == 0
        assert word in capsys.readouterr().out


CONTINUOUS_ONLY = ("avg", "iac", "sac1", "td3_1")

# One of each: several environments may share a preset.
_PRESETS = list(
    {
        (algorithm, str(preset), name.partition("/")[0]): (name, algorithm)
        for name, entries in presets.list_presets().items()
        for algorithm, preset in entries.items()
    }.values()
)


@pytest.mark.parametrize(("name", "algorithm"), _PRESETS, ids=[f"{name}-{algorithm}" for name, algorithm in _PRESETS])
def test_every_preset_builds(name, algorithm, tmp_path):
    preset = presets.list_presets()[name][algorithm]
    assert set(preset) <= set(presets._FIELDS)
    assert algorithm in list_algorithms()
    continuous = preset.get("setup", {}).get("normalize_obs", False) or algorithm in CONTINUOUS_ONLY
    env = name if "/" in name else "gymnax/Pendulum-v1" if continuous else "gymnax/CartPole-v1"
    if env.startswith(("brax/", "playground/")):
        # Making a physics environment takes seconds; its settings are checked on another continuous task.
        assert env.startswith("playground/") or preset["env_options"]["backend"] == "spring"
        env, options = "gymnax/Pendulum-v1", {}
    else:
        options = preset.get("env_options", {})
    setup = {key: tuple(value) if isinstance(value, list) else value for key, value in preset.get("setup", {}).items()}
    spec = RunSpec(algorithm, env, preset["total_env_steps"], env_options=options, setup=setup, configs=(preset["hypers"],))
    if algorithm == "lpg":
        rule = RuleSpec(num_predictions=2, hidden_size=2, embedding_size=2)
        learned = Learned("lpg", init_rule(rule, jax.random.key(0)), convention_of(rule), {})
        spec = dataclasses.replace(spec, rule=str(learned_files.save(tmp_path / "rule.npz", learned)))
    spec.check(spec.build())


def test_a_preset_may_be_that_of_another_with_changes():
    ours, theirs = presets.find("auto", "trpo", "mujoco/Hopper-v5"), presets.find("baselines", "trpo", "mujoco/Hopper-v5")
    assert {**ours, "name": None} == {**theirs, "name": None}
    assert "same_as" not in ours


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """``shelf(name=text, ...)``: these presets for PPO, one file each, in place of the shipped ones."""

    def fill(**tables):
        for name, text in tables.items():
            (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\n[ppo]\n{text}\n')
        monkeypatch.setattr(presets, "_FOLDER", tmp_path)

    return fill


# Files are read in the order of their names.
@pytest.mark.parametrize(("first", "second", "third"), list(itertools.permutations("abc")))
def test_a_chain_of_presets_in_any_order(shelf, first, second, third):
    hypers = "hypers = {gamma = 0.5, learning_rate = 1e-3, clip_eps = 0.2}"
    chain = {first: f"total_env_steps = 5\nsetup = {{num_envs = 2}}\n{hypers}"}
    chain[second] = f'same_as = "{first}"\nhypers = {{gamma = 0.6, clip_eps = 0.3}}'
    chain[third] = f'same_as = "{second}"\nhypers = {{gamma = 0.7}}\nsetup = {{num_steps = 8}}'
    shelf(**chain)
    found = presets.list_presets()
    assert found[third]["ppo"] == {
        "total_env_steps": 5,
        "setup": {"num_envs": 2, "num_steps": 8},
        "hypers": {"gamma": 0.7, "learning_rate": 1e-3, "clip_eps": 0.3},
    }
    assert found[second]["ppo"]["hypers"] == {"gamma": 0.6, "learning_rate": 1e-3, "clip_eps": 0.3}
    assert found[first]["ppo"]["hypers"] == {"gamma": 0.5, "learning_rate": 1e-3, "clip_eps": 0.2}


def test_a_preset_that_is_that_of_none_is_named(shelf):
    shelf(ours='same_as = "thiers"', theirs="total_env_steps = 5")
    with pytest.raises(RequestError) as caught:
        presets.list_presets()
    assert str(caught.value) == "preset 'ours' for ppo: same_as = 'thiers' is no preset for ppo: did you mean theirs?"


def test_presets_that_are_each_others_are_named(shelf):
    shelf(one='same_as = "two"', two='same_as = "three"', three='same_as = "two"')
    with pytest.raises(RequestError, match=r"'three' for ppo: same_as = 'two' leads back to itself: .*two -> three -> two"):
        presets.list_presets()


def test_auto_takes_the_environments_own_preset():
    assert presets.find("auto", "ppo", "gymnax/Pendulum-v1")["name"] == "gymnax/Pendulum-v1"
    assert presets.find("auto", "ppo", "gymnax/Catch-bsuite") == {"name": None}
    assert presets.find("none", "ppo", "gymnax/Pendulum-v1") == {"name": None}


@pytest.mark.parametrize("name", ["ppo", "sac", "avg"])
def test_layer_sizes_are_words_of_one_flag_and_options_are_repeated(name):
    words = ["--env", "gymnax/Pendulum-v1", "--setup.hidden-sizes", "8", "9", "--env-param", "g=9", "--env-param", "m=1.1"]
    _, spec, _ = train._request(name, get(name), words)
    assert tuple(spec.setup["hidden_sizes"]) == (8, 9) and spec.env_params == {"g": 9, "m": 1.1}
