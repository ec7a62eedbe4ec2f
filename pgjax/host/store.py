"""The run store: everything one run leaves behind, in one folder that survives a kill at any moment.

    run.json                       configuration, status, provenance, facts
    parts/metrics-00001.parquet    rows as they came, one file an ``append``; evaluations likewise
    checkpoints/STEP/              the state of every lane, and the numbers of the last parts that belong to it
    log.jsonl                      one line a row, evaluation or remark, means over lanes: for people and other programs
    policy/CONFIG-SEED/STEP/       what acts, small: all that evaluation, rendering and deployment read; one folder a
                                   group of lanes, named after the first
    metrics.parquet                all rows, once the run is over; evaluations.parquet likewise

Every file but the log is written under another name and renamed. Rows count once a checkpoint records their part: parts
after the last checkpoint are rows that a resumed run makes again, so ``latest`` deletes them and ``load`` does not see them;
lines of the log likewise.

Heavy libraries are imported on first use: pandas only by ``load``, which is the only function that returns frames.
"""

import contextlib
import copy
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgjax.errors import DamagedFile, RequestError, RunError
from pgjax.host import checkpoints
from pgjax.host.checkpoints import PyTree, disk_errors, from_json, sync, to_json, write_file
from pgjax.host.folders import lock_folder, owner_lives, timestamp, write_owner, written_aside
from pgjax.host.machine import describe_machine
from pgjax.host.tables import (
    KINDS,
    all_part_files,
    as_table,
    merge_parts,
    part_file,
    part_files,
    read_part,
    read_rows,
    write_parquet,
)

if TYPE_CHECKING:
    import pandas
    import pyarrow

FORMAT, VERSION = "pgjax-run", 1
STATUSES = ("running", "interrupted", "finished", "failed")
# Columns that say which lane and row a number is of.
_WHOSE = ("config", "seed", "iteration")


class Restored(NamedTuple):
    """Where a resumed run goes on.

    state, record, step: as committed.  warning: one line if a newer checkpoint could not be read, else None.
    """

    state: PyTree
    record: dict[str, Any]
    step: int
    warning: str | None


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run read back.

    path: its folder.  status: one of ``STATUSES``.  config, provenance, facts: from ``run.json``.
    record: of the last checkpoint, None before the first.
    metrics: columns config, seed, iteration, env_steps, one per metric.
    evaluations: one row per episode: config, seed, env_steps, policy (``mode`` or ``sample``), episode, return, length.
    """

    path: Path
    status: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    facts: dict[str, Any]
    record: dict[str, Any] | None
    metrics: "pandas.DataFrame"
    evaluations: "pandas.DataFrame"

    def policies(self, like: PyTree) -> tuple[PyTree, dict[str, np.ndarray]]:
        """The last saved policy of every lane; see ``load_policies``."""
        return load_policies(self.path, like)


class RunStore:
    """One run's folder, held by one process at a time. Make one with ``create`` or ``open``, use it in a ``with``."""

    def __init__(self, path: str | os.PathLike[str]):
        """Takes the lock only; use ``create`` or ``open``."""
        self.path = Path(path)
        self._lock = lock_folder(self.path)
        self._run: dict[str, Any] = {}
        self._last: dict[str, Any] | None = None
        self._parts = dict.fromkeys(KINDS, 0)
        self._schemas: dict[str, pyarrow.Schema] = {}
        self._positioned = True

    # --- opening and closing

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> "RunStore":
        """Starts a run in a new or empty folder. Asks JAX for its devices, so choose them before.

        Args:
          path: the folder.  config: JSON values, NumPy scalars allowed.
          provenance: what only the caller knows, such as the environment's backend and reset mode; it wins over what
            ``describe_machine`` finds.

        Raises: RequestError if the folder holds a run or anything else, or is in use.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"--out {path}: {error.strerror}; choose another --out") from error
        store = cls(path)
        with store._closing_on_error():
            if (path / "run.json").exists():
                raise RequestError(f"--out {path} holds a run: continue it with --resume, or choose another --out")
            # These are what is left of a process that was killed before there was a run.
            own = re.compile(r"\.lock|\.owner\.json|run\.json\.tmp-\d+")
            others = [name for name in os.listdir(path) if not own.fullmatch(name)]
            if others:
                raise RequestError(f"--out {path} is not empty (it holds {min(others)}); choose another --out")
            now = timestamp()
            store._run = {
                "format": FORMAT,
                "version": VERSION,
                "status": "running",
                "created": now,
                "updated": now,
                "config": to_json(dict(config), "config"),
                "provenance": to_json({**describe_machine(), **(provenance or {})}, "provenance"),
                "resumed": [],
                "extensions": [],
                "facts": {},
            }
            store._take_ownership()
            store._write_run()
        return store

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        *,
        may_differ: Collection[str] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> "RunStore":
        """Opens a run to go on with it; if it has a checkpoint, call ``latest`` before ``append``.

        Args:
          config: what this process would run; None means whatever the folder says.
          may_differ: dotted names of fields in which ``config`` may differ; the new values are recorded.
          provenance: as in ``create``; kept beside the first one, because the machine may be another.

        Raises: RequestError if there is no run, it is in use, or ``config`` is another one (naming the first field).
        """
        path = Path(path)
        run = _read_run(path)
        store = cls(path)
        with store._closing_on_error():
            store._run = run = _read_run(path)  # again, now that nobody else writes
            entry = {"when": timestamp(), "provenance": to_json({**describe_machine(), **(provenance or {})}, "provenance")}
            if config is not None:
                given = to_json(dict(config), "config")
                for name, there, here in _differences(run["config"], given):
                    if name not in may_differ:
                        ways = "use the same value, " + ("or --extend, " if name == "total_env_steps" else "")
                        raise RequestError(
                            f"--resume: {name} is {there} in {path} and {here} in this request; {ways}or choose another --out"
                        )
                    entry.setdefault("changed", {})[name] = [there, here]
                run["config"] = given
            if error := run["facts"].pop("error", None):
                entry["after_error"] = error
            run["resumed"].append(entry)
            record = _newest_record(path)
            if record is not None:
                store._parts, store._last = dict(record["parts"]), record["record"]
            store._take_ownership()
            store._write_run()
            store._positioned = False
            if not checkpoints.latest_checkpoints(path / "checkpoints"):
                store._go_on_from(dict.fromkeys(KINDS, 0), None)
        return store

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if self._run["status"] == "running":
                stopped = error is None or not isinstance(error, Exception)
                facts = {} if error is None or stopped else {"error": f"{kind.__name__}: {error}".splitlines()[0][:500]}
                # The disk may be what failed; its error must not hide the first one.
                with contextlib.suppress(RunError) if error is not None else contextlib.nullcontext():
                    self.set_status("interrupted" if stopped else "failed", **facts)
        finally:
            self.close()

    def close(self) -> None:
        """Gives the folder back without changing the status. Leaving the ``with`` block does this."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                (self.path / ".owner.json").unlink(missing_ok=True)
            self._lock.release()

    # --- what run.json holds

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration, as JSON values."""
        return from_json(self._run["config"])

    @property
    def status(self) -> str:
        """One of ``STATUSES``."""
        return self._run["status"]

    def get(self, name: str, default: Any = None) -> Any:
        """A fact that ``set_status`` or ``finish`` recorded."""
        facts = self._run["facts"]
        return from_json(facts[name]) if name in facts else default

    def set_status(self, status: str, **facts: Any) -> None:
        """Records the status, and facts beside it. Raises RunError if the disk refuses."""
        if status not in STATUSES:
            raise ValueError(f"status = {status!r}: give one of {', '.join(STATUSES)}")
        self._run["facts"] |= to_json(facts, "facts")
        self._run["status"] = status
        self._write_run()

    @property
    def extensions(self) -> list[dict[str, Any]]:
        """How often the run's budget was raised, in order: ``from`` and ``to``, totals, ``at``; all in env steps of a lane."""
        return from_json(self._run.get("extensions", []))

    def extend(self, total_env_steps: int, at: int) -> None:
        """Raises the budget in the configuration, and records that it happened ``at`` this number of environment steps.

        The run counts as running from here on. Raises RunError if the disk refuses.
        """
        config = self._run["config"]
        entry = {"from": config["total_env_steps"], "to": total_env_steps, "at": at, "when": timestamp()}
        self._run |= {
            "config": {**config, "total_env_steps": total_env_steps},
            "extensions": [*self._run.get("extensions", []), to_json(entry)],
        }
        self.set_status("running")

    # --- rows and checkpoints

    def append(
        self, metrics_rows: Mapping[str, np.ndarray], evaluation_rows: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, int]:
        """Writes rows as new part files. They count from the next ``commit`` on.

        Args:
          metrics_rows: columns [R], those of ``METRICS`` among them; the same columns in every call. No rows, no part.
          evaluation_rows: columns [E] as in ``EVALUATIONS``, one row per episode.

        Returns: the numbers of the last parts, ``{"metrics": ..., "evaluations": ...}``.
        Raises: ValueError for missing, ragged or new columns; RunError if the disk refuses.
        """
        if not self._positioned:
            raise RuntimeError("call latest() before append(): it says where an opened run goes on")
        for kind, rows in (("metrics", metrics_rows), ("evaluations", evaluation_rows)):
            table = as_table(kind, rows) if rows else None
            if table is None or not table.num_rows:
                continue
            self._check_columns(kind, table)
            number = self._parts[kind] + 1
            target = part_file(self.path, kind, number)
            with disk_errors(target), written_aside(target) as aside:
                write_parquet(aside, table)
            self._parts[kind] = number
        return dict(self._parts)

    def log(self, **entry: Any) -> None:
        """Adds a line to ``log.jsonl``. It counts from the next ``commit`` on. Raises RunError if the disk refuses."""
        log = self.path / "log.jsonl"
        with disk_errors(log), log.open("a") as file:
            file.write(json.dumps(to_json(entry)) + "\n")

    def commit(self, step: int, state: PyTree, record: Mapping[str, Any] | None = None) -> None:
        """Saves a checkpoint; all rows appended so far belong to the run from now on.

        Args:
          step: grows from one commit to the next, e.g. the environment steps of a lane.
          state: pytree of arrays, any devices.  record: JSON values, what ``last_record`` gives back.

        Raises: RunError if the disk refuses; the previous checkpoint is then still the newest.
        """
        record = dict(record or {})
        saved = {"parts": dict(self._parts), "log": _size(self.path / "log.jsonl"), "record": record}
        checkpoints.save_checkpoint(self.path / "checkpoints", step, state, saved)
        self._last = from_json(to_json(record))

    def last_record(self) -> dict[str, Any] | None:
        """The newest checkpoint's record, or once ``latest`` was called that of the one it gave; None without any."""
        return copy.deepcopy(self._last)

    def latest(self, like: PyTree | Callable[[dict[str, Any]], PyTree]) -> Restored | None:
        """The state to go on from, after deleting the parts written after it.

        A damaged checkpoint is passed over for the one before, with a warning.

        Args: like: pytree with the structure, shapes and dtypes of the state, or a function of the record giving one.
        Returns: None if the run was stopped before its first checkpoint: it starts again from nothing.
        Raises: RequestError if the state is of another structure, or if there are checkpoints and none can be read.
        """
        folder = self.path / "checkpoints"
        problems = []
        for step in checkpoints.latest_checkpoints(folder):
            try:
                saved = checkpoints.read_record(folder, step)
                self._check_parts(saved["parts"])
                wanted = like(saved["record"]) if callable(like) else like
                state, _ = checkpoints.load_checkpoint(folder, step, wanted)
            except checkpoints.CorruptCheckpoint as error:
                problems.append(str(error))
                continue
            self._go_on_from(saved["parts"], saved["record"], saved.get("log", 0))
            warning = f"{problems[0]}; going on from checkpoint {step} instead" if problems else None
            return Restored(state, saved["record"], step, warning)
        if problems:
            raise DamagedFile(f"--resume: {problems[0]}, and no older one can be read; start anew with another --out")
        self._go_on_from(dict.fromkeys(KINDS, 0), None)
        return None

    def save_policies(self, policies: PyTree, lanes: Mapping[str, np.ndarray]) -> None:
        """Saves what acts, for ``load_policies``; replaces what was saved for these lanes before.

        Args: policies: pytree of arrays [L, ...].  lanes: columns config [L] and seed [L], which lanes they are.
        """
        lanes = {name: np.asarray(lanes[name]).tolist() for name in ("config", "seed")}
        folder = self.path / "policy" / f"{lanes['config'][0]}-{lanes['seed'][0]}"
        step = max(checkpoints.latest_checkpoints(self.path / "checkpoints"), default=0)
        checkpoints.save_checkpoint(folder, step, policies, lanes, keep=1)

    def finish(self, status: str = "finished", **facts: Any) -> None:
        """Streams the parts of the last checkpoint into the two tables and records how the run ended.

        The parts stay: a run that is extended goes on from them. Raises RunError if the disk refuses.
        """
        record = _newest_record(self.path)
        for kind, number in (record["parts"] if record else dict.fromkeys(KINDS, 0)).items():
            merge_parts(self.path, kind, number)
        self.set_status(status, **facts)

    # --- inside

    def _check_columns(self, kind: str, table: "pyarrow.Table") -> None:
        if kind not in self._schemas:
            first = part_file(self.path, kind, 1)
            self._schemas[kind] = read_part(first).schema if self._parts[kind] else table.schema
        expected = self._schemas[kind]
        if table.schema != expected:
            odd = sorted({(f.name, str(f.type)) for f in table.schema} ^ {(f.name, str(f.type)) for f in expected})
            what = f"{odd[0][0]} ({odd[0][1]})" if odd else "their order"
            raise ValueError(f"{kind} rows have other columns than earlier ones of this run: {what}")

    def _check_parts(self, parts: dict[str, int]) -> None:
        for kind, number in parts.items():
            for path in part_files(self.path, kind, number):
                if not path.exists():
                    raise checkpoints.CorruptCheckpoint(f"{path}, which the newest checkpoint needs, is missing")

    def _go_on_from(self, parts: dict[str, int], record: dict[str, Any] | None, log_size: int = 0) -> None:
        log = self.path / "log.jsonl"
        if _size(log) > log_size:
            with disk_errors(log):
                os.truncate(log, log_size)
        for path, kind, number in all_part_files(self.path):
            if number is None or number > parts[kind]:
                path.unlink()
        self._parts, self._last, self._positioned = dict(parts), record, True
        self._schemas = {}

    def _write_run(self) -> None:
        self._run["updated"] = timestamp()
        target = self.path / "run.json"
        with disk_errors(target), written_aside(target) as aside:
            write_file(aside, (json.dumps(self._run, indent=1) + "\n").encode())

    def _take_ownership(self) -> None:
        write_owner(self.path)
        for leftover in self.path.glob("*.tmp-*"):
            if re.fullmatch(r"(run\.json|metrics\.parquet|evaluations\.parquet)\.tmp-\d+", leftover.name):
                leftover.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Not close(): until _take_ownership the owner's file is not ours to remove, and after it nobody minds it.
            self._lock.release()
            raise


# --- reading


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``run.json`` says: status, created, updated, config, provenance, resumed, extensions, facts. Needs no lock.

    A run whose process is gone without a word has the status ``interrupted``.
    Raises: RequestError if there is no run.
    """
    path = Path(path)
    run = from_json(_read_run(path))
    if run["status"] == "running" and not owner_lives(path):
        run["status"] = "interrupted"
    return run


def load(path: str | os.PathLike[str]) -> LoadedRun:
    """Reads a run, finished or not: all rows up to its last checkpoint. Writes nothing and needs no lock.

    Raises: RequestError if there is no run, or a table cannot be read.
    """
    path = Path(path)
    run = read_run(path)
    newest = _newest_record(path)
    return LoadedRun(
        path=path,
        status=run["status"],
        config=run["config"],
        provenance=run["provenance"],
        facts=run["facts"],
        record=newest["record"] if newest else None,
        metrics=read_rows(path, "metrics", newest["parts"]["metrics"] if newest else None),
        evaluations=read_rows(path, "evaluations", newest["parts"]["evaluations"] if newest else None),
    )


def split_run(path: Path, parts: Mapping[Path, tuple[int, Collection[int]]], like: PyTree) -> None:
    """Takes a run that is over apart: makes a run folder for each part, with the tables and policies of its lanes.

    The parts hold no checkpoints, so they cannot be extended. Each is written aside and renamed; folders that are there already
    are left as they are.

    Args:
      path: the run.  parts: by folder to make, the number of a configuration and some seeds.  like: one lane's policy.
    Raises: RequestError if the run cannot be read; RunError if the disk refuses.
    """
    run = _read_run(path)
    newest = _newest_record(path)
    tables = {kind: read_rows(path, kind, newest["parts"][kind] if newest else None) for kind in KINDS}
    policies, lanes = load_policies(path, like)
    for target, (config, seeds) in parts.items():
        if target.exists():
            continue
        frozen = run["facts"].get("nonfinite", [])
        nonfinite = [[0, seed] for number, seed in frozen if number == config and seed in seeds]
        aside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        with disk_errors(target):
            aside.mkdir(parents=True)
            part = {
                **run,
                "status": "failed" if nonfinite else "finished",
                "config": {**run["config"], "configs": [run["config"]["configs"][config]], "seeds": sorted(seeds)},
                "facts": {**run["facts"], "nonfinite": nonfinite},
            }
            write_file(aside / "run.json", (json.dumps(part, indent=1) + "\n").encode())
            rows = {}
            for kind, table in tables.items():
                rows[kind] = table[(table.config == config) & table.seed.isin(list(seeds))].assign(config=np.int32(0))
                if len(rows[kind]):
                    write_parquet(aside / f"{kind}.parquet", as_table(kind, {n: rows[kind][n].to_numpy() for n in rows[kind]}))
            write_file(aside / "log.jsonl", _log_of(rows["metrics"], rows["evaluations"]).encode())
        picked = np.flatnonzero((lanes["config"] == config) & np.isin(lanes["seed"], list(seeds)))
        columns = {"config": [0] * len(picked), "seed": lanes["seed"][picked].tolist()}
        import jax

        kept = jax.tree.map(lambda x: x[picked], policies)  # noqa: B023
        checkpoints.save_checkpoint(aside / "policy" / f"0-{columns['seed'][0]}", 0, kept, columns, keep=1)
        with disk_errors(target):
            os.replace(aside, target)
            sync(target.parent)


def _log_of(rows: "pandas.DataFrame", episodes: "pandas.DataFrame") -> str:
    """What ``log.jsonl`` would say of these lanes."""
    from pgjax.metrics import mean_over_lanes

    num_lanes = max(1, len(np.unique(rows["seed"].to_numpy())))
    order = np.lexsort((rows["iteration"].to_numpy(), rows["seed"].to_numpy()))
    columns = {str(name): rows[name].to_numpy()[order].reshape(num_lanes, -1) for name in rows if name not in _WHOSE}
    means = mean_over_lanes(columns)
    entries = []
    num_rows = len(row_env_steps := means.pop("env_steps"))
    for row, env_steps in enumerate(row_env_steps):
        values = {name: float(value[row]) for name, value in means.items() if np.isfinite(value[row])}
        entries.append({"kind": "row", "env_steps": int(env_steps), "progress": round((row + 1) / num_rows, 6), **values})
    played_at, played_by = episodes["env_steps"].to_numpy(), episodes["policy"].to_numpy()
    for env_steps in np.unique(played_at):
        done = np.searchsorted(row_env_steps, env_steps, side="right")
        entry = {"kind": "evaluation", "env_steps": int(env_steps), "progress": round(done / max(1, num_rows), 6)}
        for policy in ("mode", "sample"):
            played = (played_at == env_steps) & (played_by == policy)
            for what in ("return", "length"):
                entry[f"{policy}_{what}"] = float(np.mean(episodes[what].to_numpy()[played]))
        entries.append(entry)
    entries.sort(key=lambda entry: entry["env_steps"])
    return "".join(json.dumps(to_json(entry)) + "\n" for entry in entries)


def load_policies(path: str | os.PathLike[str], like: PyTree) -> tuple[PyTree, dict[str, np.ndarray]]:
    """The last saved policy of every lane. Needs no lock, and nothing of the run but ``policy/``.

    Args: like: pytree with the structure, shapes and dtypes of one lane's policy.
    Returns: policies, pytree of arrays [L, ...] in order of config and seed; columns config [L] and seed [L].
    Raises: RequestError if there are none, or if they are not of the structure of ``like``.
    """
    import jax
    import jax.numpy as jnp

    groups = []
    for folder in (Path(path) / "policy").glob("*-*"):
        for step in checkpoints.latest_checkpoints(folder)[:1]:
            lanes = checkpoints.read_record(folder, step)
            num_lanes = len(lanes["seed"])
            stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_lanes, *x.shape), x.dtype), like)  # noqa: B023
            groups.append((checkpoints.load_checkpoint(folder, step, stacked)[0], lanes))
    if not groups:
        raise RequestError(f"{path} holds no policies yet (looked in {Path(path) / 'policy'})")
    columns = {name: np.concatenate([lanes[name] for _, lanes in groups]) for name in ("config", "seed")}
    order = np.lexsort((columns["seed"], columns["config"]))
    policies = jax.tree.map(lambda *lanes: jnp.concatenate(lanes)[order], *(policies for policies, _ in groups))
    return policies, {name: column[order] for name, column in columns.items()}


# --- helpers


def _read_run(path: Path) -> dict[str, Any]:
    """``run.json`` as it is on disk, before ``from_json``."""
    try:
        run = json.loads((path / "run.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RequestError(f"there is no run in {path} (no run.json); start one without --resume") from error
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path / 'run.json'} cannot be read: {error}") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise RequestError(f"{path / 'run.json'} was not written by pgjax; choose another folder")
    if run["version"] != VERSION:
        raise RequestError(f"{path / 'run.json'} has version {run['version']}, this pgjax reads version {VERSION}")
    return run


def _newest_record(path: Path) -> dict[str, Any] | None:
    """``{"parts", "record"}`` of the newest checkpoint whose record can be read."""
    for step in checkpoints.latest_checkpoints(path / "checkpoints"):
        # It may also be deleted under our eyes, by the process that writes.
        with contextlib.suppress(RequestError):
            return checkpoints.read_record(path / "checkpoints", step)
    return None


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of every field in which two JSON values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            below = f"{name}.{key}" if name else key
            if key in there and key in here:
                yield from _differences(there[key], here[key], below)
            else:
                yield below, there.get(key, "absent"), here.get(key, "absent")
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, pair in enumerate(zip(there, here, strict=True)):
            yield from _differences(*pair, f"{name}[{index}]")
    elif there != here or type(there) is not type(here):
        # 1 and 1.0 are the same number.
        if not (isinstance(there, (int, float)) and isinstance(here, (int, float)) and there == here):
            yield name, there, here


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
