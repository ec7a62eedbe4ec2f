"""Checkpoints: a pytree and a small record, saved together or not at all, read back bit for bit. Never pickle.

A checkpoint is the folder ``FOLDER/STEP``: ``arrays/``, written by Orbax, and ``record.json``, which names every leaf
and holds the sizes and checksums of the files. It is written under another name and renamed, so a folder whose name is
a number and that holds ``record.json`` is complete, and after a kill at any moment the one before is still there.

Leaves are stored as bytes. Small ones share one array, because the cost of a checkpoint of many small leaves is that of
its files; and bytes come back as they were, where arrays of floats may lose the sign of a zero to a fill value.

JAX and Orbax are imported on first use: listing runs needs neither.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pgjax.errors import DamagedFile, RequestError, RunError

PyTree = Any
Folder = str | os.PathLike[str]

FORMAT, VERSION = "pgjax-checkpoint", 1
# Leaves of at least this many bytes get an array of their own: packing copies, and a replay buffer is too big for that.
PACK_BYTES = 1 << 20
# Big arrays are cut into pieces of this size, which are compressed and read in parallel.
CHUNK_BYTES = 1 << 26


class CorruptCheckpoint(DamagedFile):
    """The files of a checkpoint are not those that were written."""


def save_checkpoint(folder: Folder, step: int, tree: PyTree, record: dict[str, Any], *, keep: int = 2) -> Path:
    """Saves ``tree`` and ``record`` as ``folder/step``, both or neither, and drops what that makes obsolete.

    Obsolete are all but the newest ``keep`` checkpoints, those of later steps (they belong to a continuation that was
    given up), and what killed writers left behind. Only one process may write to a folder at a time.

    Args:
      folder: created if absent.  step: >= 0, growing from one save to the next; an existing one is replaced.
      tree: of NumPy or JAX arrays, typed keys included, on any number of this process's devices. Waits for them.
      record: JSON values; non-finite numbers are allowed.

    Returns: the checkpoint's folder.
    Raises: RunError if the disk refuses, e.g. because it is full: the previous checkpoint is then still there.
    """
    if step < 0:
        raise ValueError(f"step = {step}: give a number >= 0")
    folder = Path(folder)
    leaves = _leaves(tree)
    target, aside, replaced = folder / str(step), folder / f"{step}.tmp-{os.getpid()}", folder / f"{step}.replaced"
    with disk_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        _discard_leftovers(folder)
        try:
            aside.mkdir()
            arrays, index = _pack(leaves)
            if arrays:
                _write_arrays(aside / "arrays", arrays)
            del arrays
            body = {
                "format": FORMAT,
                "version": VERSION,
                "step": step,
                "record": to_json(record),
                "leaves": index,
                "files": _checksums(aside),
            }
            write_file(aside / "record.json", json.dumps({"body": body, "crc32": _crc32_of_json(body)}).encode())
            if target.exists():
                os.replace(target, replaced)
            os.replace(aside, target)
            sync(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    older = [other for other in latest_checkpoints(folder) if other < step]
    # The new checkpoint is in place: that an old one cannot be removed is no reason to fail.
    with contextlib.suppress(OSError):
        for other in _steps(folder):
            if other > step or other in older[keep - 1 :]:
                _discard(folder / str(other))
                _discard(folder / f"{other}.replaced")
        _discard(replaced)
    return target


def latest_checkpoints(folder: Folder) -> list[int]:
    """Steps of the complete checkpoints in ``folder``, newest first; empty if there is no such folder."""
    folder = Path(folder)
    return sorted((step for step in _steps(folder) if _find(folder, step)), reverse=True)


def read_record(folder: Folder, step: int) -> dict[str, Any]:
    """The record that was saved with a checkpoint; does not look at the arrays.

    Raises: RequestError if there is no such checkpoint; CorruptCheckpoint if the record is damaged.
    """
    return from_json(_read_body(_existing(folder, step))["record"])


def load_checkpoint(folder: Folder, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Reads a checkpoint back, bit for bit, on whatever devices there are now.

    Args:
      like: a pytree of the saved structure with arrays or ``jax.ShapeDtypeStruct`` as leaves; ``jax.eval_shape``
        gives one. A leaf that names a sharding over several devices is put there, a NumPy leaf comes back as NumPy, any
        other one as an array on the default device. JAX's weak types are not kept.

    Returns: ``(tree, record)``.
    Raises: RequestError if there is no such checkpoint, or if structure, shapes or dtypes differ (it names the first
      leaf that does); CorruptCheckpoint if the files are damaged.
    """
    import jax

    path = _existing(folder, step)
    body = _read_body(path)
    expected = _named_leaves(like)
    _check_same_leaves(path, body["leaves"], expected)
    _check_files(path, body["files"])
    arrays = _read_arrays(path)
    restored = []
    for saved, (_, leaf) in zip(body["leaves"], expected, strict=True):
        restored.append(_place(_unpack(path, arrays, saved), saved["key_impl"], leaf))
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), restored), from_json(body["record"])


# --- leaves


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """``(name, leaf)`` in tree order; ``None`` has no leaves."""
    import jax

    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    for name, leaf in named:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"leaf {name or '(root)'} is a {type(leaf).__name__}: checkpoints hold arrays only")
    return named


def _leaves(tree: PyTree) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Every leaf as a host array, with what ``record.json`` says of it."""
    import jax

    described, values = [], []
    for name, leaf in _named_leaves(tree):
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        described.append(
            {
                "name": name,
                "dtype": str(leaf.dtype),
                "shape": list(leaf.shape),
                "key_impl": str(jax.random.key_impl(leaf)) if is_key else None,
            }
        )
        values.append(jax.random.key_data(leaf) if is_key else leaf)
    # One call for all of them, so that copies from a device overlap. On a CPU these are views, not copies.
    return list(zip(described, map(np.asarray, jax.device_get(values)), strict=True))


def _pack(leaves: list[tuple[dict[str, Any], np.ndarray]]) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Arrays of bytes to write, and for every leaf in which of them it lies, from which byte on."""
    arrays, small, index, offset = {}, [], [], 0
    for number, (described, value) in enumerate(leaves):
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        place = {"data_dtype": str(value.dtype), "data_shape": list(value.shape)}
        if raw.size >= PACK_BYTES:
            arrays[f"leaf_{number:05d}"] = raw
            index.append({**described, **place, "array": f"leaf_{number:05d}", "offset": 0})
        else:
            small.append(raw)
            index.append({**described, **place, "array": "packed", "offset": offset})
            offset += raw.size
    if offset:  # Orbax refuses empty arrays
        arrays["packed"] = np.concatenate(small)
    return arrays, index


def _unpack(path: Path, arrays: dict[str, np.ndarray], saved: dict[str, Any]) -> np.ndarray:
    """The bytes of one leaf as an array of its own. Takes a big array out of ``arrays``, to free it early."""
    dtype, shape = np.dtype(saved["data_dtype"]), tuple(saved["data_shape"])
    num_bytes, offset = dtype.itemsize * math.prod(shape), saved["offset"]
    if num_bytes == 0:
        return np.zeros(shape, dtype)
    packed = saved["array"] == "packed"
    raw = arrays.get("packed") if packed else arrays.pop(saved["array"], None)
    if raw is None or raw.size < offset + num_bytes:
        raise CorruptCheckpoint(f"checkpoint {path} is corrupt: leaf {saved['name']} is not in its arrays")
    raw = raw[offset : offset + num_bytes]
    return (raw.copy() if packed else raw).view(dtype).reshape(shape)


def _place(value: np.ndarray, key_impl: str | None, like: Any) -> Any:
    """A restored host array where ``like`` says it belongs."""
    import jax
    import jax.numpy as jnp

    if isinstance(like, (np.ndarray, np.generic)):
        return value
    sharding = getattr(like, "sharding", None)
    sharding = sharding if sharding is not None and len(sharding.device_set) > 1 else None
    if key_impl is not None:
        value = jax.random.wrap_key_data(jnp.array(value), impl=key_impl)
    if sharding is not None:
        return jax.device_put(value, sharding)
    # A copy: an array that shares NumPy's memory could not be donated to the next step.
    return value if key_impl is not None else jnp.array(value)


def _check_same_leaves(path: Path, saved: list[dict[str, Any]], expected: list[tuple[str, Any]]) -> None:
    saved_names, expected_names = [leaf["name"] for leaf in saved], [name for name, _ in expected]
    remedy = "it was written by another configuration; go on with that one, or start anew with another --out"
    for number in range(max(len(saved), len(expected))):
        here = expected_names[number] if number < len(expected) else None
        there = saved_names[number] if number < len(saved) else None
        if here == there:
            continue
        if here is not None and here not in saved_names:
            difference = f"has no leaf {here or '(root)'}, which this run has"
        elif there is not None and there not in expected_names:
            difference = f"has a leaf {there or '(root)'}, which this run has not"
        else:
            difference = f"has leaf {there} where this run has {here}"
        raise RequestError(f"checkpoint {path} {difference}: {remedy}")
    for leaf, (name, like) in zip(saved, expected, strict=True):
        there, here = (leaf["dtype"], tuple(leaf["shape"])), (str(like.dtype), tuple(like.shape))
        if there != here:
            raise RequestError(
                f"checkpoint {path}: leaf {name or '(root)'} is {_describe(*there)} there and {_describe(*here)} in "
                f"this run: {remedy}"
            )


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


# --- files


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    import jax
    import orbax.checkpoint as ocp

    path.mkdir()
    # The handler alone, one file an array, and no finalize(), which only merges files of the other layout: three times
    # faster. What the Checkpointer adds, a rename when all is written, the caller does for arrays and record at once.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    try:
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
        handler.save(path, args=ocp.args.PyTreeSave(arrays, save_args=save_args))  # pyright: ignore[reportArgumentType]
    finally:
        handler.close()


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not (path / "arrays").exists():
        return {}
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    try:
        return dict(handler.restore(path / "arrays"))  # pyright: ignore[reportArgumentType]
    except MemoryError:
        raise
    except Exception as error:  # whatever TensorStore raises: the files are those written, and still unreadable
        raise CorruptCheckpoint(f"checkpoint {path} cannot be read: {_first_line(error)}") from error
    finally:
        handler.close()


def _checksums(folder: Path) -> dict[str, list[int]]:
    """``[size, CRC-32]`` of every file below ``folder``, after seeing to it that they are on the disk.

    TensorStore does not notice most flipped bytes in what it reads, so checksums of our own are needed.
    """
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(file)
        found[file.relative_to(folder).as_posix()] = [file.stat().st_size, _crc32_of_file(file)]
    return found


def _check_files(path: Path, files: dict[str, list[int]]) -> None:
    for name, (size, crc32) in files.items():
        file = path / name
        try:
            damaged = file.stat().st_size != size or _crc32_of_file(file) != crc32
        except OSError as error:
            raise CorruptCheckpoint(f"checkpoint {path} is corrupt: {name}: {error.strerror}") from error
        if damaged:
            raise CorruptCheckpoint(f"checkpoint {path} is corrupt: {name} is not what was written")


def _read_body(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / "record.json").read_bytes())
        body = content["body"]
        if content["crc32"] != _crc32_of_json(body):
            raise ValueError("its checksum does not match")
        if (body["format"], body["version"]) != (FORMAT, VERSION):
            raise RequestError(
                f"checkpoint {path} has format {body['format']} {body['version']}, this pgjax reads {FORMAT} {VERSION}"
            )
    except RequestError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"checkpoint {path} is corrupt: record.json: {_first_line(error)}") from error
    return body


def _crc32_of_file(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _crc32_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _steps(folder: Path) -> set[int]:
    """Steps of which ``folder`` holds something, complete or not."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {int(match[1]) for name in names if (match := re.fullmatch(r"(\d+)(\.replaced)?", name))}


def _find(folder: Path, step: int) -> Path | None:
    # The second name is what a kill between the two renames of a replacement leaves.
    for name in (str(step), f"{step}.replaced"):
        if (folder / name / "record.json").exists():
            return folder / name
    return None


def _existing(folder: Folder, step: int) -> Path:
    path = _find(Path(folder), step)
    if path is None:
        known = ", ".join(map(str, latest_checkpoints(folder))) or "none"
        raise RequestError(f"no checkpoint {step} in {folder}; complete ones there: {known}")
    return path


def _discard(path: Path) -> None:
    # The record goes first: what is left if this is cut short is no complete checkpoint.
    (path / "record.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _discard_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        half_written = re.fullmatch(r"\d+\.tmp-\d+", path.name)
        half_deleted = re.fullmatch(r"\d+(\.replaced)?", path.name) and not (path / "record.json").exists()
        superseded = path.suffix == ".replaced" and (path.with_suffix("") / "record.json").exists()
        if half_written or half_deleted or superseded:
            _discard(path)


# --- what the run store needs as well


def write_file(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Folder) -> Iterator[None]:
    """Turns what the disk refuses while ``path`` is written into a RunError of one line."""
    try:
        yield
    except Exception as error:
        # TensorStore raises ValueError for everything and quotes the system's error.
        text = str(error)
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "quota exceeded" in text:
            reason = "the disk is full; free some space and go on from the last checkpoint with --resume"
        elif isinstance(error, OSError) or "[OS error" in text:
            reason = _first_line(error)
        else:
            raise
        raise RunError(f"cannot write {path}: {reason}") from error


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}"


# JSON has no such numbers, and Python's spelling of them is not JSON. A string that reads like one gets a backslash.
_NON_FINITE = re.compile(r"\\*(-?inf|nan)")


def to_json(value: Any, name: str = "") -> Any:
    """``value`` in JSON's terms: NumPy scalars as numbers, non-finite ones as ``"inf"``, ``"-inf"``, ``"nan"``.

    Tuples and arrays become lists, paths strings. Raises TypeError naming the field for anything else JSON has not.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name or 'value'} has the key {key!r}: keys are strings")
        return {key: to_json(item, f"{name}.{key}" if name else key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{name}[{number}]") for number, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return "\\" + value if _NON_FINITE.fullmatch(value) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, os.PathLike):
        return to_json(os.fspath(value), name)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # NumPy and JAX
        return to_json(np.asarray(value).tolist(), name)
    raise TypeError(f"{name or 'value'} is a {type(value).__name__}, which JSON cannot hold")


def from_json(value: Any) -> Any:
    """The inverse of ``to_json`` (lists stay lists)."""
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, str) and _NON_FINITE.fullmatch(value):
        return value[1:] if value.startswith("\\") else float(value)
    return value
