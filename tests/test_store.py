"""The run store: a kill loses and doubles nothing, nothing is overwritten unasked, wrong requests get one line."""

import json
import math
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from dying import Disk, Killed

from pgjax.errors import RequestError, RunError
from pgjax.host import checkpoints, store, tables
from pgjax.host.machine import describe_machine
from pgjax.host.store import RunStore, load, load_policies, read_run

CONFIG = {"env": "gymnax/CartPole-v1", "configs": [{"clip_eps": 0.2}, {"clip_eps": 0.3}], "total_env_steps": 300}
LIKE = {"x": jnp.zeros(2)}


@pytest.fixture(autouse=True)
def fast_description(monkeypatch):
    """The machine stays the same during these tests, and asking git takes a while."""
    described = {"pgjax": "0", "device": "cpu"}
    monkeypatch.setattr(store, "describe_machine", lambda: described)


def rows(iteration, lanes=3):
    return {
        "config": np.zeros(lanes, np.int32),
        "seed": np.arange(lanes),
        "iteration": np.full(lanes, iteration),
        "env_steps": np.full(lanes, iteration * 100),
        "loss": np.linspace(0, iteration, lanes, dtype=np.float32),
        "episode_return": np.where(np.arange(lanes) == 0, np.nan, iteration).astype(np.float32),
    }


def episodes(iteration):
    return {
        "config": [0, 0],
        "seed": [1, 1],
        "env_steps": [iteration * 100] * 2,
        "policy": ["mode", "sample"],
        "episode": [0, 0],
        "return": [float(iteration), -math.inf],
        "length": [9, 8],
    }


def state(iteration):
    return {"x": jnp.full(2, float(iteration))}


def advance(run, first, last):
    """Iterations ``first`` to ``last``, each with rows, every other one with an evaluation, and a checkpoint."""
    for iteration in range(first, last + 1):
        run.append(rows(iteration), episodes(iteration) if iteration % 2 == 0 else None)
        run.commit(iteration, state(iteration), {"iteration": iteration})


def expected(last):
    metrics = pd.concat([pd.DataFrame(rows(i)) for i in range(1, last + 1)], ignore_index=True)
    evaluations = pd.concat([pd.DataFrame(episodes(i)) for i in range(2, last + 1, 2)], ignore_index=True)
    return metrics, evaluations


def assert_rows(loaded, last):
    metrics, evaluations = expected(last)
    pd.testing.assert_frame_equal(loaded.metrics, metrics, check_dtype=False)
    pd.testing.assert_frame_equal(loaded.evaluations, evaluations, check_dtype=False)


class TestRows:
    def test_a_whole_run(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG, provenance={"reset_mode": "exact"}) as run:
            assert run.append(rows(1)) == {"metrics": 1, "evaluations": 0}
            run.commit(1, state(1), {"iteration": 1})
            advance(run, 2, 4)
            run.finish(seconds=2.5)
        loaded = load(tmp_path / "run")
        assert_rows(loaded, 4)
        assert loaded.metrics.dtypes.astype(str).to_dict() == {
            "config": "int32",
            "seed": "int64",
            "iteration": "int64",
            "env_steps": "int64",
            "loss": "float32",
            "episode_return": "float32",
        }
        assert (loaded.status, loaded.config, loaded.facts) == ("finished", CONFIG, {"seconds": 2.5})
        assert loaded.provenance == {"pgjax": "0", "device": "cpu", "reset_mode": "exact"}
        assert loaded.record == {"iteration": 4}
        # Anybody's tools can read the tables.
        assert pq.read_table(tmp_path / "run" / "metrics.parquet").num_rows == 12
        assert pq.read_table(tmp_path / "run" / "evaluations.parquet").num_rows == 4

    def test_rows_count_from_their_checkpoint_on(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            run.append(rows(1))
            assert len(load(tmp_path / "run").metrics) == 0
            run.commit(1, state(1), {})
            advance(run, 2, 2)
            run.append(rows(3))
            assert_rows(load(tmp_path / "run"), 2)

    def test_nothing_yet(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            assert run.append({}, None) == run.append(rows(1, lanes=0)) == {"metrics": 0, "evaluations": 0}
            loaded = load(tmp_path / "run")
            assert list(loaded.metrics) == ["config", "seed", "iteration", "env_steps"]
            assert list(loaded.evaluations)[3:] == ["policy", "episode", "return", "length"]
            assert loaded.record is None and run.last_record() is None
            run.finish("interrupted")
        assert load(tmp_path / "run").status == "interrupted"

    def test_merging_streams(self, tmp_path, monkeypatch):
        """No more than the limit and one part is held: the row groups show it."""
        monkeypatch.setattr(tables, "_MERGE_ROWS", 7)
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            advance(run, 1, 8)
            run.finish()
        table = pq.ParquetFile(tmp_path / "run" / "metrics.parquet")
        assert [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)] == [9, 9, 6]
        assert_rows(load(tmp_path / "run"), 8)

    def test_tables_without_parts_can_be_loaded(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            advance(run, 1, 2)
            run.finish()
        shutil.rmtree(tmp_path / "run" / "parts")
        assert_rows(load(tmp_path / "run"), 2)
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        assert_rows(load(tmp_path / "run"), 2)

    def test_half_precision_is_stored_as_single(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            run.append({**rows(1), "loss": jnp.ones(3, jnp.bfloat16)})
            run.commit(1, state(1))
            assert load(tmp_path / "run").metrics.loss.dtype == np.float32

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": None}, "no column seed"),
            ({"loss": np.zeros(2)}, r"column loss has shape \(2,\); expected \(3,\)"),
            ({"loss": np.zeros((3, 1))}, r"column loss has shape \(3, 1\)"),
            ({"kl": np.zeros(3)}, r"other columns than earlier ones of this run: kl"),
            ({"loss": np.zeros(3, np.int32)}, r"other columns than earlier ones of this run: loss"),
        ],
    )
    def test_wrong_columns_are_named(self, tmp_path, change, message):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            run.append(rows(1))
            run.commit(1, state(1))
        with RunStore.open(tmp_path / "run") as run:
            run.latest(LIKE)
            with pytest.raises(ValueError, match=message):
                run.append({k: v for k, v in (rows(2) | change).items() if v is not None})

    def test_damaged_part_is_named(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            advance(run, 1, 2)
            (tmp_path / "run" / "parts" / "metrics-00002.parquet").write_bytes(b"nothing")
            with pytest.raises(RunError, match=r"metrics-00002\.parquet cannot be read"):
                run.finish()
        with pytest.raises(RequestError, match=r"metrics of .* cannot be read"):
            load(tmp_path / "run")


class TestResume:
    def test_goes_on_where_the_checkpoint_is(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            advance(run, 1, 3)
            run.append(rows(4), episodes(4))
        assert read_run(tmp_path / "run")["status"] == "interrupted"
        with RunStore.open(tmp_path / "run", CONFIG) as run:
            with pytest.raises(RuntimeError, match="call latest"):
                run.append(rows(4))
            assert run.last_record() == {"iteration": 3}
            restored = run.latest(LIKE)
            assert (restored.step, restored.record, restored.warning) == (3, {"iteration": 3}, None)
            assert restored.state["x"].tolist() == [3, 3]
            assert not (tmp_path / "run" / "parts" / "metrics-00004.parquet").exists()
            advance(run, 4, 5)
            run.finish()
        assert_rows(load(tmp_path / "run"), 5)

    def test_before_the_first_checkpoint(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            run.append(rows(1))
        with RunStore.open(tmp_path / "run", CONFIG) as run:
            assert run.latest(LIKE) is None and run.last_record() is None
            advance(run, 1, 2)
        assert_rows(load(tmp_path / "run"), 2)

    def test_a_finished_run_can_be_extended(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            advance(run, 1, 2)
            run.finish()
        longer = CONFIG | {"total_env_steps": 500}
        with pytest.raises(RequestError, match=r"total_env_steps is 300 in .* and 500 in this request"):
            RunStore.open(tmp_path / "run", longer)
        with RunStore.open(tmp_path / "run", longer, may_differ=["total_env_steps"]) as run:
            run.latest(LIKE)
            advance(run, 3, 4)
            # Before it is finished again, the table of the shorter run must not pass for the whole.
            assert_rows(load(tmp_path / "run"), 4)
            run.finish()
        assert_rows(load(tmp_path / "run"), 4)
        assert load(tmp_path / "run").config == longer
        assert read_run(tmp_path / "run")["resumed"][0]["changed"] == {"total_env_steps": [300, 500]}

    def test_the_structure_may_depend_on_the_record(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            run.commit(1, {"x": jnp.ones(5)}, {"lanes": 5})
        with RunStore.open(tmp_path / "run") as run:
            assert run.latest(lambda record: {"x": jnp.zeros(record["lanes"])}).state["x"].shape == (5,)

    def test_records_are_not_shared_with_the_caller(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            record = {"nonfinite": []}
            run.commit(1, state(1), record)
            record["nonfinite"].append(3)
            run.last_record()["nonfinite"].append(4)
            assert run.last_record() == {"nonfinite": []}

    @pytest.mark.parametrize("what", ["checkpoint", "part"])
    def test_damage_falls_back_to_the_previous_checkpoint(self, tmp_path, what):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            advance(run, 1, 3)
        if what == "checkpoint":
            damaged = next((tmp_path / "run" / "checkpoints" / "3" / "arrays").rglob("0"))
            damaged.write_bytes(damaged.read_bytes()[:-1])
        else:
            (tmp_path / "run" / "parts" / "metrics-00003.parquet").unlink()
        with RunStore.open(tmp_path / "run", CONFIG) as run:
            restored = run.latest(LIKE)
            assert (restored.step, restored.record) == (2, {"iteration": 2})
            assert "going on from checkpoint 2" in restored.warning and "\n" not in restored.warning
            assert run.last_record() == {"iteration": 2}
            advance(run, 3, 4)
            run.finish()
        assert_rows(load(tmp_path / "run"), 4)

    def test_nothing_readable(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            advance(run, 1, 3)
        for step in ("2", "3"):
            (tmp_path / "run" / "checkpoints" / step / "record.json").write_text("{}")
        with RunStore.open(tmp_path / "run", CONFIG) as run:
            with pytest.raises(RequestError, match=r"--resume: checkpoint .*/3 is corrupt.*start anew"):
                run.latest(LIKE)

    def test_a_foreign_state_is_no_reason_to_fall_back(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            advance(run, 1, 3)
        with RunStore.open(tmp_path / "run", CONFIG) as run:
            with pytest.raises(RequestError, match=r"leaf \['x'\] is float32\[2\] there and float32\[3\]"):
                run.latest({"x": jnp.zeros(3)})
            assert (tmp_path / "run" / "parts" / "metrics-00003.parquet").exists()


def test_killed_anywhere_a_resumed_run_has_the_same_rows(tmp_path, monkeypatch):
    """At every boundary between two operations on the disk, from the folder's creation to the last table."""
    write_arrays = checkpoints._write_arrays
    last, dies_at, survived = 3, 0, False
    while not survived:
        dies_at += 1
        folder = tmp_path / str(dies_at)
        locks = []
        with monkeypatch.context() as patch:
            disk = Disk(patch, dies_at)

            def quietly(path, arrays, disk=disk):
                with disk.quiet():
                    write_arrays(path, arrays)

            def remembered(path, lock=store.lock_folder, locks=locks):
                locks.append(lock(path))
                return locks[-1]

            patch.setattr(checkpoints, "_write_arrays", quietly)
            patch.setattr(store, "lock_folder", remembered)
            try:
                with RunStore.create(folder, CONFIG) as run:
                    advance(run, 1, last)
                    run.finish()
                survived = True
            except Killed:
                pass
        for lock in locks:
            lock.release()  # as the system does for a process that is gone
        resume = (folder / "run.json").exists()
        before = load(folder) if resume else None
        with RunStore.open(folder, CONFIG) if resume else RunStore.create(folder, CONFIG) as run:
            restored = run.latest(LIKE) if resume else None
            done = restored.step if restored else 0
            if restored:
                assert restored.warning is None and restored.state["x"].tolist() == [done, done]
            if before is not None:
                assert before.metrics.iteration.max() == done if done else before.metrics.empty
            advance(run, done + 1, last)
            run.finish()
        assert_rows(load(folder), last)
        left = [path.name for path in folder.rglob("*.tmp-*")] + [path.name for path in folder.rglob("*.replaced")]
        assert left == [], dies_at
        # One too many stays if the last save was killed before it removed it: there was no later one to do so.
        assert len(os.listdir(folder / "checkpoints")) <= 2 + (done == last), dies_at
    assert dies_at > 50


class TestRequests:
    def test_a_folder_with_a_run(self, tmp_path):
        RunStore.create(tmp_path / "run", CONFIG).close()
        with pytest.raises(RequestError, match="holds a run: continue it with --resume, or choose another --out"):
            RunStore.create(tmp_path / "run", CONFIG)
        RunStore.open(tmp_path / "run", CONFIG).close()  # the refusal did not keep the lock

    def test_a_folder_with_something_else(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(RequestError, match=r"is not empty \(it holds thesis.tex\); choose another --out"):
            RunStore.create(tmp_path, CONFIG)

    def test_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RequestError, match=r"--out .*file: File exists; choose another --out"):
            RunStore.create(tmp_path / "file", CONFIG)

    def test_an_empty_folder_is_fine(self, tmp_path):
        RunStore.create(tmp_path, CONFIG).close()

    @pytest.mark.parametrize("function", [RunStore.open, read_run, load])
    def test_no_run(self, tmp_path, function):
        for path in (tmp_path, tmp_path / "absent"):
            with pytest.raises(RequestError, match="there is no run in"):
                function(path)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "cannot be read"),
            ("[]", "was not written by pgjax"),
            ('{"name": "other"}', "was not written by pgjax"),
            ('{"format": "pgjax-run", "version": 9}', "has version 9, this pgjax reads version 1"),
        ],
    )
    def test_a_foreign_run(self, tmp_path, content, message):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RequestError, match=message):
            RunStore.open(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"env": "gymnax/Acrobot-v1"}, "env is gymnax/CartPole-v1 in .* and gymnax/Acrobot-v1 in this request"),
            ({"configs": [{"clip_eps": 0.2}, {"clip_eps": 0.1}]}, r"configs\[1\]\.clip_eps is 0.3 in .* and 0.1 in"),
            ({"configs": [{"clip_eps": 0.2}]}, r"configs is \["),
            ({"new": 1}, "new is absent in .* and 1 in"),
            ({"total_env_steps": None}, "total_env_steps is 300 in .* and None in"),
        ],
    )
    def test_another_configuration(self, tmp_path, changes, message):
        RunStore.create(tmp_path / "run", CONFIG).close()
        with pytest.raises(RequestError, match=message) as caught:
            RunStore.open(tmp_path / "run", CONFIG | changes)
        assert "\n" not in str(caught.value)

    def test_the_same_configuration_in_other_types(self, tmp_path):
        RunStore.create(tmp_path / "run", {"a": (1, 2.0), "b": math.nan, "c": math.inf}).close()
        RunStore.open(tmp_path / "run", {"a": [1.0, np.float64(2)], "b": np.float32(np.nan), "c": np.inf}).close()
        assert math.isnan(read_run(tmp_path / "run")["config"]["b"])
        json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)

    def test_a_second_process_is_refused(self, tmp_path):
        """And it needs neither JAX nor pandas to say so."""
        script = """
import sys
from pgjax.errors import RequestError
from pgjax.host.store import RunStore, read_run
assert read_run(sys.argv[1])["status"] == "running"
try:
    RunStore.open(sys.argv[1])
except RequestError as error:
    print(error)
assert not {"jax", "pandas", "pyarrow", "orbax"} & set(sys.modules), set(sys.modules)
"""
        with RunStore.create(tmp_path / "run", CONFIG):
            with pytest.raises(RequestError, match="is in use by process"):
                RunStore.open(tmp_path / "run")
            command = [sys.executable, "-c", script, tmp_path / "run"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert f"is in use by process {os.getpid()} on" in done.stdout and " since 2" in done.stdout, done.stderr
        assert done.stdout.count("\n") == 1

    def test_a_dead_process_holds_nothing(self, tmp_path):
        script = """
import os, sys
from pgjax.host import store
store.describe_machine = dict
run = store.RunStore.create(sys.argv[1], {})
os._exit(9)
"""
        subprocess.run([sys.executable, "-c", script, tmp_path / "run"], timeout=60)
        assert (tmp_path / "run" / ".owner.json").exists()
        assert read_run(tmp_path / "run")["status"] == "interrupted"
        with RunStore.open(tmp_path / "run", {}):
            assert read_run(tmp_path / "run")["status"] == "running"


class TestStatus:
    def test_facts(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            run.set_status("running", eval_episodes=np.int64(16), best=-math.inf)
            assert (run.get("eval_episodes"), run.get("best"), run.get("other", 3)) == (16, -math.inf, 3)
            with pytest.raises(ValueError, match="give one of running, interrupted, finished, failed"):
                run.set_status("done")
        with RunStore.open(tmp_path / "run") as run:
            assert run.get("eval_episodes") == 16 and run.config == CONFIG

    @pytest.mark.parametrize(
        ("error", "status"),
        [(None, "interrupted"), (KeyboardInterrupt(), "interrupted"), (RunError("broken\nin two"), "failed")],
    )
    def test_how_the_block_ended(self, tmp_path, error, status):
        try:
            with RunStore.create(tmp_path / "run", CONFIG):
                if error is not None:
                    raise error
        except (KeyboardInterrupt, RunError) as caught:
            assert caught is error
        run = read_run(tmp_path / "run")
        assert run["status"] == status
        assert run["facts"] == ({"error": "RunError: broken"} if status == "failed" else {})


class TestFullDisk:
    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
    def test_rows(self, tmp_path, monkeypatch):
        def write_to_full_disk(path, table):
            path.symlink_to("/dev/full")  # a link, because pyarrow removes what it could not write
            pq.write_table(table, path)

        with RunStore.create(tmp_path / "run", CONFIG) as run:
            advance(run, 1, 2)
            with monkeypatch.context() as patch:
                patch.setattr(store, "write_parquet", write_to_full_disk)
                with pytest.raises(RunError, match=r"cannot write .*metrics-00003.*: the disk is full") as caught:
                    run.append(rows(3))
                assert "\n" not in str(caught.value)
            assert_rows(load(tmp_path / "run"), 2)
            advance(run, 3, 4)
        assert_rows(load(tmp_path / "run"), 4)

    def test_every_operation(self, tmp_path, monkeypatch):
        """Wherever the disk is full, it is said in one line, and the rows up to the last checkpoint are there."""
        failures, full_at, done = 0, 0, False
        while not done:
            full_at += 1
            folder = tmp_path / str(full_at)
            run = RunStore.create(folder, CONFIG)
            advance(run, 1, 2)
            with monkeypatch.context() as patch:
                disk = Disk(patch, full_at=full_at)
                try:
                    with run:
                        advance(run, 3, 3)
                        run.finish()
                    done = disk.count < full_at
                except RunError as error:
                    failures += 1
                    assert "the disk is full" in str(error) and "\n" not in str(error)
            loaded = load(folder)
            assert_rows(loaded, loaded.record["iteration"])
            assert loaded.record["iteration"] in (2, 3)
        assert failures >= 10


class TestPolicies:
    def like(self):
        return {"w": jax.ShapeDtypeStruct((2,), "float32")}

    def test_lanes_come_back_in_order(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            with pytest.raises(RequestError, match="holds no policies yet"):
                load_policies(tmp_path / "run", self.like())
            run.commit(1, state(1))
            run.save_policies({"w": jnp.array([[9.0, 9.0]])}, {"config": [1], "seed": [5]})
            run.commit(2, state(2))
            run.save_policies({"w": jnp.array([[9.0, 9.0]])}, {"config": [1], "seed": [5]})
            run.save_policies({"w": jnp.array([[1.0, 1.0], [2.0, 2.0]])}, {"config": [0, 1], "seed": [5, 3]})
        policies, lanes = load(tmp_path / "run").policies(self.like())
        assert policies["w"].tolist() == [[1, 1], [2, 2], [9, 9]]
        assert lanes["config"].tolist() == [0, 1, 1] and lanes["seed"].tolist() == [5, 3, 5]

    def test_policies_are_all_that_is_needed(self, tmp_path):
        with RunStore.create(tmp_path / "run", CONFIG) as run:
            run.save_policies({"w": jnp.ones((1, 2))}, {"config": [0], "seed": [0]})
        shutil.copytree(tmp_path / "run" / "policy", tmp_path / "copy" / "policy")
        assert load_policies(tmp_path / "copy", self.like())[0]["w"].shape == (1, 2)
        with pytest.raises(RequestError, match=r"leaf \['w'\]"):
            load_policies(tmp_path / "copy", {"w": jnp.zeros(3)})


def test_the_machine_is_described(tmp_path, monkeypatch):
    monkeypatch.undo()
    found = describe_machine()
    assert found["libraries"]["jax"] == jax.__version__
    assert found["device_count"] == len(jax.devices()) and found["device"] == jax.default_backend()
    json.dumps(checkpoints.to_json(found), allow_nan=False)
    with jax.default_matmul_precision("float32"):
        assert describe_machine()["precision"] == "float32"
