"""TensorBoard and W&B are sent every line of a run once, also when the run died in between."""

import collections
import json
import struct
import time

import numpy as np
import pytest

import pgjax
from pgjax import cli
from pgjax.host import runner, store

TRAIN = ["train", "ppo", "--env", "gymnax/CartPole-v1", "--seeds", "2", "--total-env-steps", "2000", "--num-evals", "3"]
TRAIN += ["--setup.num-envs", "4", "--setup.num-steps", "25", "--preset", "none", "--eval-episodes", "2"]


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Trains with a logger, with a crash before the third checkpoint and a resumption, and gives the run's folder."""
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(runner, "CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr(runner, "CHUNK_SECONDS", 1e-6)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    commit, commits = store.RunStore.commit, []

    def dying(self, *args):
        commits.append(args)
        if len(commits) == 3:
            raise RuntimeError("power cut")
        commit(self, *args)

    def train(name):
        out = ["--out", str(tmp_path / name), "--log-to", name]
        with monkeypatch.context() as patch:
            patch.setattr(store.RunStore, "commit", dying)
            with pytest.raises(RuntimeError, match="power cut"):
                cli._main([*TRAIN, *out])
        assert cli._main([*TRAIN, *out, "--resume"]) == 0 and len(commits) == 3
        return tmp_path / name

    return train


def expected(path):
    """Every curve of the run, from its table: name -> {env steps: mean over lanes}."""
    run = pgjax.load(path)
    curves = collections.defaultdict(dict)
    for env_steps, rows in run.metrics.groupby("env_steps"):
        curves["entropy"][env_steps] = rows.entropy.mean()
        curves["episodes"][env_steps] = rows.episodes.sum()
    for (env_steps, policy), rows in run.evaluations.groupby(["env_steps", "policy"]):
        curves[f"evaluation/{policy}_return"][env_steps] = rows["return"].mean()
    assert len(curves["entropy"]) == 20 and len(curves["evaluation/mode_return"]) >= 3
    return curves


def assert_same(found, path):
    """found: (name, env steps, value), as often as they were sent."""
    twice = [what for what, count in collections.Counter((name, step) for name, step, _ in found).items() if count > 1]
    assert not twice
    for name, curve in expected(path).items():
        here = {step: value for each, step, value in found if each == name}
        assert here.keys() == curve.keys(), name
        np.testing.assert_allclose([here[step] for step in curve], list(curve.values()), rtol=1e-5)


def test_tensorboard_shows_every_row_once(log):
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    path = log("tensorboard")
    found = []
    for file in (path / "tensorboard").glob("events.*"):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data)
            event = events.Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    assert_same(found, path)


def test_wandb_offline_holds_every_row_once(log):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    path = log("wandb")
    folders = sorted((path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1, "two processes, one run"
    found = []
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        for record in written(file, Record):
            values = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if values:
                step = values.pop("_step", record.history.step.num)
                found += [(name, step, value) for name, value in values.items() if not name.startswith("_")]
    assert_same(found, path)


def written(file, kind):
    """The records of a run that has ended. W&B writes in a process of its own, which is waited for."""
    for _ in range(100):
        records = [kind.FromString(record) for record in leveldb_records(file.read_bytes()[7:], first=7)]
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file.name} has no end")


def leveldb_records(data, first):
    """Records of LevelDB's log format: blocks of 32 KiB; each piece has a checksum, a length and says whether more follow."""
    whole, at = b"", 0
    while at + 7 <= len(data):
        left = 32768 - (at + first) % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield whole
            whole = b""


def test_the_log_is_that_of_a_run_that_never_died(log, tmp_path):
    """``log.jsonl`` loses the lines that no checkpoint held, and gets them again."""
    pytest.importorskip("tensorboardX")
    path = log("tensorboard")
    assert cli._main([*TRAIN, "--out", str(tmp_path / "whole")]) == 0
    assert (path / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_folder_that_is_taken_starts_no_logger(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    (tmp_path / "thesis.tex").touch()
    assert cli._main([*TRAIN, "--out", str(tmp_path), "--log-to", "tensorboard"]) == 2
    assert "thesis.tex" in capsys.readouterr().err and not (tmp_path / "tensorboard").exists()
