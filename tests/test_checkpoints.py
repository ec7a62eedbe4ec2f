"""Checkpoints: bit for bit, whole or not at all, and one clear line when something is wrong."""

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dying import Disk, Killed
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax.errors import RequestError, RunError
from pgjax.host import checkpoints
from pgjax.host.checkpoints import (
    PACK_BYTES,
    CorruptCheckpoint,
    from_json,
    latest_checkpoints,
    load_checkpoint,
    read_record,
    save_checkpoint,
    to_json,
)


class Moments(NamedTuple):
    count: Any
    mean: Any


@flax.struct.dataclass
class State:
    params: Any
    moments: Any
    key: Any
    nothing: Any


def make_state(scale=1.0):
    """Every kind of leaf, with the values that are easily lost on the way."""
    odd = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, 1.0], np.float32) * np.float32(scale)
    payload = np.array([0x7FC12345, 0xFFC00001], np.uint32).view(np.float32)
    return State(
        params={
            "odd": jnp.asarray(odd),
            "nan_payload": jnp.asarray(payload),
            "half": jnp.asarray([-0.0, 1.5], jnp.bfloat16),
            "zeros": jnp.full((3,), -0.0),
            "empty": jnp.zeros((0, 4)),
            "flags": jnp.array([True, False]),
            "big": jnp.arange(PACK_BYTES // 4 + 7, dtype=jnp.float32) * scale,
        },
        moments=Moments(jnp.int32(7), (jnp.ones((2, 3)) * scale, jnp.uint8(255))),
        key={"default": jax.random.split(jax.random.key(3), 4), "rbg": jax.random.key(1, impl="rbg")},
        nothing=None,
    )


def bits(tree):
    def leaf(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return np.asarray(x).tobytes()

    return [(str(x.dtype), x.shape, leaf(x)) for x in jax.tree.leaves(tree)]


def like(tree):
    return jax.eval_shape(lambda x: x, tree)


def names(folder):
    return sorted(os.listdir(folder))


class TestRoundTrip:
    def test_every_kind_of_leaf_bit_for_bit(self, tmp_path):
        state, record = make_state(), {"part": 3, "best": math.inf, "worst": math.nan, "name": "nan"}
        save_checkpoint(tmp_path, 5, state, record)
        restored, restored_record = load_checkpoint(tmp_path, 5, like(state))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert bits(restored) == bits(state)
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
        assert math.isnan(restored_record.pop("worst"))
        assert restored_record == {"part": 3, "best": math.inf, "name": "nan"}
        assert read_record(tmp_path, 5)["part"] == 3
        # Keys still are keys of their kind.
        assert jax.random.bits(restored.key["rbg"]) == jax.random.bits(state.key["rbg"])

    def test_restored_arrays_can_be_donated(self, tmp_path):
        tree = {"x": jnp.arange(4096.0)}
        save_checkpoint(tmp_path, 0, tree, {})
        restored, _ = load_checkpoint(tmp_path, 0, like(tree))
        out = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(restored)
        assert restored["x"].is_deleted() and out["x"][0] == 1

    def test_numpy_stays_numpy_with_its_64_bits(self, tmp_path):
        tree = {"x": np.array([1 / 3]), "n": np.array([2**60])}
        save_checkpoint(tmp_path, 0, tree, {})
        restored, _ = load_checkpoint(tmp_path, 0, tree)
        assert bits(restored) == bits(tree) and isinstance(restored["x"], np.ndarray)

    def test_trees_without_bytes(self, tmp_path):
        for step, tree in enumerate([{}, None, {"x": jnp.zeros((0,))}]):
            save_checkpoint(tmp_path, step, tree, {"step": step})
            assert bits(load_checkpoint(tmp_path, step, like(tree))[0]) == bits(tree)

    def test_inside_a_running_event_loop_as_in_a_notebook(self, tmp_path):
        async def cell():
            save_checkpoint(tmp_path, 0, {"x": jnp.ones(3)}, {})
            return load_checkpoint(tmp_path, 0, {"x": jnp.zeros(3)})[0]

        assert asyncio.run(cell())["x"].sum() == 3

    def test_another_number_of_devices(self, tmp_path):
        """Two host devices read what one wrote, and the other way round."""
        state = {"x": jnp.arange(8.0).reshape(4, 2), "key": jax.random.split(jax.random.key(0), 4)}
        save_checkpoint(tmp_path / "one", 1, state, {})
        script = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pgjax.host.checkpoints import load_checkpoint, save_checkpoint
assert len(jax.devices()) == 2
lanes = NamedSharding(Mesh(np.array(jax.devices()), ("lanes",)), PartitionSpec("lanes"))
like = {"x": jax.ShapeDtypeStruct((4, 2), "float32", sharding=lanes),
        "key": jax.ShapeDtypeStruct((4,), jax.random.key(0).dtype, sharding=lanes)}
state, _ = load_checkpoint(sys.argv[1] + "/one", 1, like)
assert all(len(leaf.sharding.device_set) == 2 for leaf in state.values()), state
save_checkpoint(sys.argv[1] + "/two", 1, state, {})
"""
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", script, tmp_path], env=os.environ | flags, check=True, timeout=120)
        assert bits(load_checkpoint(tmp_path / "two", 1, like(state))[0]) == bits(state)

    def test_python_numbers_are_refused_by_name(self, tmp_path):
        with pytest.raises(TypeError, match=r"leaf \['a'\] is a int"):
            save_checkpoint(tmp_path, 0, {"a": 3}, {})


class TestRetention:
    def test_newest_two_stay(self, tmp_path):
        for step in (1, 2, 10):
            save_checkpoint(tmp_path, step, {"x": jnp.ones(1)}, {})
        assert latest_checkpoints(tmp_path) == [10, 2]
        assert names(tmp_path) == ["10", "2"]

    def test_later_steps_become_obsolete(self, tmp_path):
        for step in (10, 20, 15):
            save_checkpoint(tmp_path, step, {"x": jnp.ones(1)}, {})
        assert latest_checkpoints(tmp_path) == [15, 10]

    def test_the_same_step_again(self, tmp_path):
        for value in (1.0, 2.0):
            save_checkpoint(tmp_path, 3, {"x": jnp.full(1, value)}, {})
        assert load_checkpoint(tmp_path, 3, {"x": jnp.zeros(1)})[0]["x"] == 2
        assert names(tmp_path) == ["3"]

    def test_no_folder_holds_no_checkpoints(self, tmp_path):
        assert latest_checkpoints(tmp_path / "absent") == []

    def test_other_files_are_left_alone(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "7.tmp-other").mkdir()
        save_checkpoint(tmp_path, 1, {"x": jnp.ones(1)}, {})
        assert names(tmp_path) == ["1", "7.tmp-other", "notes.txt"]


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_killed_anywhere_there_is_a_complete_checkpoint(tmp_path, monkeypatch, again):
    """At every boundary between two operations on the disk: before, one of the two; afterwards, work goes on."""
    write_arrays = checkpoints._write_arrays
    steps = [1, 2, 2 if again else 3]
    dies_at, survived = 0, False
    while not survived:
        dies_at += 1
        folder = tmp_path / str(dies_at)
        for step in steps[:2]:
            save_checkpoint(folder, step, {"x": jnp.full(2, float(step))}, {"step": step})
        with monkeypatch.context() as patch:
            disk = Disk(patch, dies_at)

            def quietly(path, arrays, disk=disk):
                with disk.quiet():
                    write_arrays(path, arrays)

            patch.setattr(checkpoints, "_write_arrays", quietly)
            try:
                save_checkpoint(folder, steps[2], {"x": jnp.full(2, 30.0)}, {"step": 30})
                survived = True
            except Killed:
                pass
        found = latest_checkpoints(folder)
        assert found, dies_at
        for step in found:
            tree, record = load_checkpoint(folder, step, {"x": jnp.zeros(2)})
            assert (float(tree["x"][0]), record["step"]) in {(float(step), step), (30.0, 30)}
        newest = load_checkpoint(folder, found[0], {"x": jnp.zeros(2)})[1]["step"]
        assert newest == 30 if survived else newest in (2, 30)
        save_checkpoint(folder, 4, {"x": jnp.zeros(2)}, {})
        assert len(names(folder)) == 2 and latest_checkpoints(folder)[0] == 4
    assert dies_at > 8


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    save_checkpoint(folder, 1, make_state(), {})
    return folder


class TestDamage:
    def files(self, folder):
        return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())

    @pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
    def test_in_any_file_is_found(self, pristine, tmp_path, damage):
        files = self.files(pristine)
        assert len(files) >= 5
        for number, name in enumerate(files):
            folder = tmp_path / str(number)
            shutil.copytree(pristine, folder)
            content = bytearray((folder / name).read_bytes())
            if damage == "flip":
                content[len(content) // 2] ^= 0x04
            elif damage == "truncate":
                content = content[: len(content) // 2]
            (folder / name).write_bytes(content)
            if damage == "delete":
                (folder / name).unlink()
            if damage == "delete" and name.name == "record.json":
                assert latest_checkpoints(folder) == []
                continue
            with pytest.raises(CorruptCheckpoint) as caught:
                load_checkpoint(folder, 1, like(make_state()))
            assert "is corrupt" in str(caught.value) and "\n" not in str(caught.value)

    def test_missing_checkpoint_lists_what_there_is(self, pristine):
        with pytest.raises(RequestError, match=r"no checkpoint 2 in .*; complete ones there: 1"):
            load_checkpoint(pristine, 2, {})


class TestForeign:
    A, B = np.zeros((2, 3), np.float32), np.zeros(1, np.float32)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"a": A, "b": jnp.zeros(2)}, r"leaf \['b'\] is float32\[1\] there and float32\[2\] in this run"),
            ({"a": A.astype(int), "b": B}, r"leaf \['a'\] is float32\[2, 3\] there and int32\[2, 3\] in this run"),
            ({"a": A}, r"has a leaf \['b'\], which this run has not"),
            ({"a": A, "b": B, "c": B}, r"has no leaf \['c'\], which this run has"),
            ({"a": A, "b": None}, r"has a leaf \['b'\], which this run has not"),
            ({"a": A, "b": jax.random.split(jax.random.key(0), 1)}, r"leaf \['b'\] is float32\[1\] there and key"),
        ],
    )
    def test_the_first_leaf_that_differs_is_named(self, tmp_path, other, message):
        save_checkpoint(tmp_path, 1, {"a": self.A, "b": self.B}, {})
        with pytest.raises(RequestError, match=message) as caught:
            load_checkpoint(tmp_path, 1, like(other))
        assert not isinstance(caught.value, CorruptCheckpoint) and "\n" not in str(caught.value)

    def test_another_format(self, tmp_path):
        save_checkpoint(tmp_path, 1, {}, {})
        path = tmp_path / "1" / "record.json"
        body = json.loads(path.read_text())["body"] | {"version": 99}
        path.write_text(json.dumps({"body": body, "crc32": checkpoints._crc32_of_json(body)}))
        with pytest.raises(RequestError, match="format pgjax-checkpoint 99"):
            load_checkpoint(tmp_path, 1, {})


class TestFullDisk:
    def test_every_place_that_may_notice(self, tmp_path, monkeypatch):
        failures, full_at, done = 0, 0, False
        while not done:
            full_at += 1
            folder = tmp_path / str(full_at)
            save_checkpoint(folder, 1, {"x": jnp.ones(2)}, {})
            with monkeypatch.context() as patch:
                disk = Disk(patch, full_at=full_at)
                try:
                    save_checkpoint(folder, 2, {"x": jnp.zeros(2)}, {})
                    done = disk.count < full_at
                except RunError as error:
                    failures += 1
                    assert "the disk is full" in str(error) and "\n" not in str(error)
                    # Only the last operation, synchronising the folder, is refused after the new name is in place.
                    assert names(folder) in (["1"], ["1", "2"])
            assert done or load_checkpoint(folder, 1, {"x": jnp.zeros(2)})[0]["x"].sum() == 2
        assert failures >= 4

    def test_what_tensorstore_raises(self, tmp_path, monkeypatch):
        def full(path, arrays):
            raise ValueError('RESOURCE_EXHAUSTED: Error writing "x/0" [OS error 28: No space left on device]')

        monkeypatch.setattr(checkpoints, "_write_arrays", full)
        with pytest.raises(RunError, match="the disk is full"):
            save_checkpoint(tmp_path, 1, {"x": jnp.ones(2)}, {})
        assert names(tmp_path) == []

    @pytest.mark.skipif(
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "t", "/mnt"], capture_output=True).returncode != 0,
        reason="this system does not let us mount a small disk",
    )
    def test_a_really_full_disk(self, tmp_path):
        script = """
import numpy as np, os, sys
from pgjax.host.checkpoints import *
from pgjax.errors import RunError
small, big = ({"x": np.random.default_rng(0).bytes(n)} for n in (1000, 3_000_000))
small, big = ({"x": np.frombuffer(t["x"], np.uint8)} for t in (small, big))
save_checkpoint(sys.argv[1], 1, small, {})
try:
    save_checkpoint(sys.argv[1], 2, big, {})
except RunError as error:
    assert "the disk is full" in str(error), error
else:
    raise SystemExit("it was not full")
assert os.listdir(sys.argv[1]) == ["1"], os.listdir(sys.argv[1])
assert (load_checkpoint(sys.argv[1], 1, small)[0]["x"] == small["x"]).all()
"""
        command = f'mount -t tmpfs -o size=2m tmpfs "{tmp_path}" && exec "{sys.executable}" -c "$SCRIPT" "{tmp_path}"'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", command],
            env=os.environ | {"SCRIPT": script},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["inf", "-inf", "nan", "\\nan", "\\\\inf"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


class TestJson:
    @settings(max_examples=60, deadline=None)
    @given(json_values)
    def test_round_trip_through_strict_json(self, value):
        text = json.dumps(to_json(value), allow_nan=False)
        assert repr(from_json(json.loads(text))) == repr(value)

    def test_non_finite_numbers_are_readable(self):
        assert to_json([math.inf, -math.inf, math.nan]) == ["inf", "-inf", "nan"]

    def test_numpy_and_jax_numbers(self):
        value = {"a": np.float32(0.5), "b": np.int64(3), "c": jnp.float32(np.inf), "d": np.arange(2), "e": (1, 2)}
        assert to_json(value) == {"a": 0.5, "b": 3, "c": "inf", "d": [0, 1], "e": [1, 2]}

    def test_what_json_has_not_is_named(self):
        with pytest.raises(TypeError, match=r"a\.b\[1\] is a object"):
            to_json({"a": {"b": [1, object()]}})
