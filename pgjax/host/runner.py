"""Runs a specification on the host: lanes, chunks, evaluation, checkpoints and progress."""

import copy
import dataclasses
import json
import math
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax
from pgjax import metrics, training
from pgjax.errors import RequestError, RunError
from pgjax.evaluation import Episodes, evaluate
from pgjax.host import lanes as lanes_
from pgjax.host.store import RunStore, load_policies
from pgjax.on_policy import as_hypers
from pgjax.types import Algorithm, Environment, PyTree

# Rows that one call of the chunk program can return.
CHUNK_ROWS = 16
# Seconds of work per call: long enough to hide the host, short enough that Ctrl-C and the display feel prompt.
CHUNK_SECONDS = 1.0
# Checkpoints are no closer than this, so that short runs are not all writing.
CHECKPOINT_SECONDS = 5.0
# Share of the wall time that checkpoints, and evaluations, may take.
CHECKPOINT_SHARE, EVALUATION_SHARE = 0.05, 0.2
# Evaluations that take less than this in all are never cut down.
EVALUATION_FREE_SECONDS = 10.0
DEFAULT_EPISODES = {"gymnax": 64, "toy": 64, "grid": 64}
OTHER_EPISODES = 16


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run: an algorithm on an environment, for every pair of configuration and seed.

    algorithm, env: public names.  env_options: arguments of ``make_env``.  env_params: dotted fields of the environment's
    parameters to replace.  setup: fields of ``Setup`` that differ from the defaults.
    configs: fields of ``Hypers`` that differ from the defaults, one dict per configuration; all share the Setup.
    seeds: whole numbers.  total_env_steps: per lane.
    log_every: iterations per row, None for about 200 rows.  num_evals: evaluations during the run.
    eval_episodes: per evaluation and policy; None means 64 on gymnax and toys and 16 elsewhere, cut down if they take too long.
    objective: where a pluggable objective comes from, as text for the record.
    rule: name or file of the learned rule, for ``lpg``; None for its default.
    init_policy: path of a run whose first policy every lane starts from.
    precision: of matrix products, ``float32`` by default.  devices: how many to use, None for all.
    preset: name of the preset that was applied, for the record.
    """

    algorithm: str
    env: str
    total_env_steps: int
    env_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    env_params: dict[str, float] = dataclasses.field(default_factory=dict)
    setup: dict[str, Any] = dataclasses.field(default_factory=dict)
    configs: tuple[dict[str, float], ...] = ({},)
    seeds: tuple[int, ...] = (0,)
    log_every: int | None = None
    num_evals: int = 10
    eval_episodes: int | None = None
    objective: str | None = None
    rule: str | None = None
    init_policy: str | None = None
    precision: str = "float32"
    devices: int | None = None
    preset: str | None = None

    def build(self, objective=None) -> Algorithm:
        """The algorithm on its environment. ``objective`` is the object that the field of that name describes."""
        env = pgjax.make_env(self.env, **self.env_options)
        if self.env_params:
            env = with_params(env, self.env_params)
        return pgjax.make(self.algorithm, env, objective=objective, rule=self.rule, **self.setup)

    def config(self) -> dict[str, Any]:
        """The specification as JSON values; ``from_config`` is the way back."""
        config = json.loads(json.dumps(dataclasses.asdict(self)))
        # Left out where there is none, so that what was run before there were rules is still the same run.
        return config if self.rule is not None else {name: value for name, value in config.items() if name != "rule"}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RunSpec":
        setup = {name: tuple(value) if isinstance(value, list) else value for name, value in config["setup"].items()}
        return cls(**{**config, "setup": setup, "configs": tuple(config["configs"]), "seeds": tuple(config["seeds"])})

    def check(self, algorithm: Algorithm) -> None:
        """Raises RequestError for numbers that cannot work, before anything is written."""
        training.make_schedule(algorithm, self.total_env_steps, self.log_every, self.num_evals)
        for config in self.configs:
            as_hypers(algorithm.hypers, **config)
        if self.eval_episodes is not None and self.eval_episodes < 1:
            raise RequestError(f"eval_episodes = {self.eval_episodes} must be at least 1; num_evals = 0 turns it off")
        if not self.seeds or not self.configs:
            raise RequestError("seeds and configs must each have at least one entry")
        if len(set(self.seeds)) < len(self.seeds):
            raise RequestError(f"seeds = {list(self.seeds)} has one seed twice; the two runs would be the same")
        lanes_.choose_devices(len(self.seeds) * len(self.configs), algorithm.env.host_callback, self.devices)


@dataclasses.dataclass(frozen=True)
class Event:
    """What a run tells while it goes on. ``kind`` is one of started, compiled, rows, evaluated, saved, note, finished."""

    kind: str
    data: dict[str, Any]


@dataclasses.dataclass
class RunResult:
    """How a run ended. status: ``finished``, ``interrupted`` or ``failed``; nonfinite: the (config, seed) that were frozen.

    seconds: spent compiling, training, evaluating, saving, and by this process in all (``session``).
    """

    status: str
    path: str
    env_steps: int
    nonfinite: list[tuple[int, int]]
    seconds: dict[str, float]


def run(
    spec: RunSpec,
    store: RunStore,
    report: Callable[[Event], None] = lambda event: None,
    *,
    algorithm: Algorithm | None = None,
) -> RunResult:
    """Trains every lane of ``spec`` into ``store``, going on from the newest checkpoint if there is one.

    Ctrl-C and SIGTERM end the run at a checkpoint. A lane whose update goes non-finite is frozen and counted, the others
    go on as if it were not there.

    Args:
      store: an open ``RunStore``.  report: called with every ``Event``.
      algorithm: an algorithm of one's own, used instead of building ``spec.algorithm``.

    Raises: RequestError for a specification that cannot run; RunError if the disk is full.
    """
    algorithm = algorithm or spec.build()
    with jax.default_matmul_precision(spec.precision), Interrupt() as interrupt:
        return _Run(spec, store, report, algorithm, interrupt).execute()


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run is expected to take on this machine.

    compile_seconds: of its training program and evaluation, less where the compilation cache has them.
    seconds: in all.  bytes: of memory, as the runner reckons it.  groups: of lanes, one after the other, where memory demands.
    """

    compile_seconds: float
    seconds: float
    bytes: int
    groups: int


def forecast(spec: RunSpec, algorithm: Algorithm | None = None, seconds: float = 1.0) -> Forecast:
    """Compiles a run's programs, trains for about ``seconds``, evaluates once, and reckons from that. Leaves nothing behind.

    Evaluations are timed with an untrained policy, whose episodes may be shorter or longer than a trained one's.

    Raises: RequestError for a specification that cannot run; RunError if not even one lane fits into memory.
    """
    algorithm = algorithm or spec.build()
    with tempfile.TemporaryDirectory() as folder, RunStore.create(folder, spec.config()) as store:
        with jax.default_matmul_precision(spec.precision):
            run = _Run(spec, store, lambda event: None, algorithm, Interrupt())
            return run.first_group().forecast(seconds)


def schedule_of(spec: RunSpec, algorithm: Algorithm, extensions: Sequence[dict[str, Any]] = ()) -> training.Schedule:
    """The schedule of a run whose budget was raised as ``RunStore.extensions`` tells."""
    total = extensions[0]["from"] if extensions else spec.total_env_steps
    schedule = training.make_schedule(algorithm, total, spec.log_every, spec.num_evals)
    for extension in extensions:
        done_rows = _rows_until(schedule, extension["at"])
        schedule = training.extend_schedule(algorithm, schedule, extension["to"], done_rows, spec.log_every)
    return schedule


def _rows_until(schedule: training.Schedule, env_steps: int) -> int:
    """The number of rows that ``env_steps`` of a lane fill."""
    done = np.cumsum((0, *schedule.iterations)) * schedule.env_steps_per_iteration
    return int(np.searchsorted(done, env_steps))


def check_extension(
    spec: RunSpec, algorithm: Algorithm, extensions: Sequence[dict[str, Any]], total_env_steps: int
) -> training.Schedule:
    """The schedule so far. Raises RequestError unless ``total_env_steps`` adds at least one iteration to it."""
    schedule = schedule_of(spec, algorithm, extensions)
    training.extend_schedule(algorithm, schedule, total_env_steps, len(schedule.iterations), spec.log_every)
    return schedule


def extend(store: RunStore, algorithm: Algorithm, total_env_steps: int) -> RunSpec:
    """Raises the budget of the run in ``store``, finished or not, to ``total_env_steps``; ``run`` then goes on to there.

    The schedules' horizon becomes the new total, unless ``hypers.anneal_env_steps`` was given. So a falling learning rate
    jumps up where the run goes on, and the whole is not the run that would have been made with the larger budget from the
    start. ``run.json`` records it, and from there on the run is resumed like any other.

    Returns: the specification with the new total.
    Raises: RequestError if the total adds nothing, or if states of lanes are gone because they were trained in groups.
    """
    spec = RunSpec.from_config(store.config)
    schedule = check_extension(spec, algorithm, store.extensions, total_env_steps)
    record = store.last_record()
    row = record["row"] if record else 0
    if record and record["group_size"] < len(spec.configs) * len(spec.seeds):
        raise RequestError(
            f"{store.path} cannot be extended: its lanes were trained in groups of {record['group_size']}, and only the "
            "last group's state is kept; start anew with another --out"
        )
    store.extend(total_env_steps, sum(schedule.iterations[:row]) * schedule.env_steps_per_iteration)
    return dataclasses.replace(spec, total_env_steps=total_env_steps)


class Interrupt:
    """Remembers that SIGINT or SIGTERM came, so that the run can end at a checkpoint; a second one ends it at once."""

    def __enter__(self):
        self.requested = False
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                pass  # only the main thread may handle signals
        return self

    def _handle(self, number, frame):
        if self.requested:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
        self.requested = True

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Run:
    """One run of a specification. Lanes that do not fit into memory together are trained one group after the other."""

    def __init__(self, spec, store, report, algorithm, interrupt):
        self.spec, self.store, self.algorithm, self.interrupt = spec, store, algorithm, interrupt
        self._listener = report
        self.schedule = schedule_of(spec, algorithm, store.extensions)
        self.env_steps_after = (
            np.concatenate([[0], np.cumsum(self.schedule.iterations)]) * self.schedule.env_steps_per_iteration
        )
        self.lanes = [(config, seed) for config in range(len(spec.configs)) for seed in spec.seeds]
        hypers = [
            training.with_horizon(as_hypers(algorithm.hypers, **config), self.schedule.env_steps) for config in spec.configs
        ]
        self.hypers = lanes_.stack_lanes([hypers[config] for config, _ in self.lanes])
        self.keys = jax.vmap(jax.random.key)(jnp.asarray([seed for _, seed in self.lanes], jnp.uint32))
        self.warm_policy = None
        if spec.init_policy:
            self.warm_policy = jax.tree.map(lambda x: x[0], policies_of(spec.init_policy, algorithm)[0])
        restored = store.latest(self._like)
        if restored and restored.warning:
            self.report("note", text=restored.warning)
        self.restored = restored.state if restored else None
        # What a resumed run must know; saved with every checkpoint.
        default = DEFAULT_EPISODES.get(spec.env.split("/")[0], OTHER_EPISODES)
        self.record = (
            restored.record
            if restored
            else {
                "first_lane": 0,
                "group_size": None,
                "row": 0,
                "eval_episodes": spec.eval_episodes or default,
                "nonfinite": [],
                "seconds": {"compile": 0.0, "train": 0.0, "evaluate": 0.0, "save": 0.0},
            }
        )
        if store.extensions and self.env_steps_after[self.record["row"]] < store.extensions[-1]["at"]:
            self.report(
                "note",
                text=f"going on before {store.extensions[-1]['at']:,} env steps, where the run was extended: schedules run to "
                f"{self.schedule.env_steps:,} from {self.env_steps_after[self.record['row']]:,} on",
            )
        self.started = time.perf_counter()

    def report(self, kind: str, **data) -> None:
        if kind == "note":
            self.store.log(kind="note", text=data["text"])
        self._listener(Event(kind, data))

    def _like(self, record):
        """Structure of the state that a checkpoint with this record holds."""
        num_lanes = min(record["group_size"], len(self.lanes) - record["first_lane"])
        keys, hypers = jax.tree.map(lambda x: x[:num_lanes], (self.keys, self.hypers))
        return jax.eval_shape(jax.vmap(self.init_lane), keys, hypers)

    def init_lane(self, key, hypers):
        """A fresh state of one lane, from its seed's key."""
        state = self.algorithm.init(training.lane_keys(key)[0], hypers)
        return state if self.warm_policy is None else self.algorithm.warm_start(state, self.warm_policy)

    def execute(self) -> RunResult:
        self.report(
            "started",
            lanes=len(self.lanes),
            env_steps=self.schedule.env_steps,
            done_env_steps=int(self.env_steps_after[self.record["row"]]),
            path=str(self.store.path),
        )
        self.store.set_status("running")
        group = self.first_group()
        while group.train():
            # The last checkpoint of a group still names the group: a run resumed there finds nothing left to do in it.
            self.record.update(first_lane=int(group.lanes[-1]) + 1, row=0)
            if self.record["first_lane"] == len(self.lanes):
                break
            group = _Group(self, self.record["group_size"])
        status = "interrupted" if self.record["first_lane"] < len(self.lanes) else "finished"
        nonfinite = [tuple(lane) for lane in self.record["nonfinite"]]
        if status == "finished" and nonfinite:
            status = "failed"
        seconds = {**self.record["seconds"], "session": time.perf_counter() - self.started}
        self.store.finish(status, nonfinite=nonfinite, seconds=seconds)
        result = RunResult(status, str(self.store.path), int(self.env_steps_after[self.record["row"]]), nonfinite, seconds)
        if status != "interrupted":
            result = dataclasses.replace(result, env_steps=self.schedule.env_steps)
        self.report("finished", result=result)
        return result

    def first_group(self) -> "_Group":
        """The group to begin or go on with: all remaining lanes if memory allows, else as many as do."""
        if self.record["group_size"]:
            return _Group(self, self.record["group_size"])
        lane = jax.eval_shape(self.init_lane, *jax.tree.map(lambda x: x[0], (self.keys, self.hypers)))
        available = lanes_.available_bytes(jax.devices()[0])
        if lanes_.array_bytes(lane) > available:
            # A replay buffer, say: no need to compile for minutes first.
            raise self._does_not_fit("the state of one lane alone needs", lanes_.array_bytes(lane), available)
        group = _Group(self, len(self.lanes))
        device, num_devices = group.spread.devices[0], len(group.spread.devices)
        available = lanes_.available_bytes(device)
        if group.bytes <= available:
            self.record["group_size"] = len(self.lanes)
            return group
        size = lanes_.lanes_that_fit(len(self.lanes), group.program_bytes, device, available) // num_devices * num_devices
        if size < 1:
            one = lanes_.run_bytes(group.program_bytes * num_devices // group.spread.num_padded, device)
            what = "one lane needs" if num_devices == 1 else f"{num_devices} lanes, one on each device, need"
            raise self._does_not_fit(what, one, available)
        self.record["group_size"] = size
        count = math.ceil(len(self.lanes) / size)
        self.report(
            "note",
            text=f"{len(self.lanes)} lanes need about {group.bytes / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free: "
            f"training {count} groups of at most {size} lanes, one after the other",
        )
        return _Group(self, size)

    def _does_not_fit(self, what: str, needed: int, available: int) -> RunError:
        fields = [name for name in ("buffer_size", "num_envs", "num_steps") if hasattr(self.algorithm.setup, name)]
        remedy = " or ".join(f"setup.{name}" for name in fields[:2]) or "the number of seeds"
        return RunError(f"{what} about {needed / 2**20:.0f} MiB and {available / 2**20:.0f} MiB are free; lower {remedy}")


class _Group:
    """Lanes that are trained together, from ``record["first_lane"]`` on, and the programs compiled for them."""

    def __init__(self, run: _Run, size: int):
        self.run = run
        self.algorithm = algorithm = run.algorithm
        first = run.record["first_lane"]
        self.lanes = np.arange(first, min(first + size, len(run.lanes)))
        devices = lanes_.choose_devices(len(self.lanes), algorithm.env.host_callback, run.spec.devices)
        self.spread = spread = lanes_.Spread(len(self.lanes), devices)
        self.keys, self.hypers = spread.pad((run.keys[self.lanes], jax.tree.map(lambda x: x[self.lanes], run.hypers)))

        started = time.perf_counter()
        # Initialisers run as one single-device program: anyone's own networks may start from batched LAPACK calls, and those
        # deadlock when two host devices run them at once. It runs once, so it is compiled fast rather than well, while the
        # other one compiles.
        init = jax.jit(jax.vmap(run.init_lane)).lower(self.keys, self.hypers)
        place = jax.sharding.SingleDeviceSharding(devices[0]) if len(devices) == 1 else spread.sharding
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), init.out_info)
        self.hypers = spread.put(self.hypers)
        chunk = jax.jit(spread.map(self._chunk, 2), donate_argnums=0).lower(
            state, self.hypers, spread.share(jnp.zeros(CHUNK_ROWS, jnp.int32))
        )
        fast: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
        with ThreadPoolExecutor(2) as pool:
            compiling = pool.submit(init.compile, fast if on_cpu(devices) else None)
            self.chunk = chunk.compile()
            self.init = compiling.result()
        self._evaluate = {}
        self.program_bytes = lanes_.program_bytes(self.chunk, len(devices))
        if on_cpu(devices):
            # Saving copies the whole state, which counts where it holds a replay buffer.
            self.program_bytes += lanes_.array_bytes(state)
        self.bytes = lanes_.run_bytes(self.program_bytes, devices[0])
        self.run.record["seconds"]["compile"] += time.perf_counter() - started
        run.report(
            "compiled",
            seconds=time.perf_counter() - started,
            bytes=self.bytes,
            peak_bytes=lanes_.peak_bytes(self.bytes) if on_cpu(devices) else None,
            devices=len(devices),
            lanes=len(self.lanes),
        )

    def _chunk(self, state, hypers, iterations):
        return training.run_rows(self.algorithm, state, hypers, iterations)

    def train(self) -> bool:
        """Trains from the record's row to the end of the budget; False if interrupted before."""
        run, record, schedule = self.run, self.run.record, self.run.schedule
        state = self._start()
        eval_rows = set(schedule.eval_rows)
        total = len(schedule.iterations)
        num_rows, saved_at, save_seconds = 1, time.perf_counter(), 0.0
        pending = _Rows()
        while record["row"] < total:
            row = record["row"]
            until = min(row + num_rows, row + CHUNK_ROWS, min((r for r in eval_rows if r > row), default=total))
            counts = np.zeros(CHUNK_ROWS, np.int32)
            counts[: until - row] = schedule.iterations[row:until]
            started = time.perf_counter()
            state, rows = self.chunk(state, self.hypers, self.spread.share(jnp.asarray(counts)))
            rows = {name: value[:, : until - row] for name, value in self.spread.take(rows).items()}
            seconds = time.perf_counter() - started
            record["seconds"]["train"] += seconds
            record["row"] = until
            pending.add_rows(self._lane_columns(), np.cumsum(schedule.iterations)[row:until], rows)
            self._note_nonfinite(rows)
            num_rows = int(np.clip(CHUNK_SECONDS / max(seconds / (until - row), 1e-6), 1, 2 * num_rows))
            run.report("rows", rows=rows, env_steps=int(run.env_steps_after[until]), seconds=seconds)
            self._log_rows(rows, until)
            if until in eval_rows:
                self._evaluate_now(state, schedule.eval_rows.index(until), pending)
            due = time.perf_counter() - saved_at > max(CHECKPOINT_SECONDS, save_seconds / CHECKPOINT_SHARE)
            if due or run.interrupt.requested or until == total:
                started = time.perf_counter()
                self._save(state, pending, final=until == total)
                pending = _Rows()
                saved_at = time.perf_counter()
                save_seconds = saved_at - started
                record["seconds"]["save"] += save_seconds
                if run.interrupt.requested and not (until == total and self.lanes[-1] == len(run.lanes) - 1):
                    return False
        return True

    def forecast(self, seconds: float) -> Forecast:
        """See ``pgjax.host.runner.forecast``."""
        record, schedule = self.run.record, self.run.schedule
        state = self._start()

        def train(count: int) -> float:
            nonlocal state
            counts = np.zeros(CHUNK_ROWS, np.int32)
            counts[0] = count
            started = time.perf_counter()
            state, rows = self.chunk(state, self.hypers, self.spread.share(jnp.asarray(counts)))
            jax.block_until_ready(rows)
            return time.perf_counter() - started

        train(1)  # the first call also loads the program
        count = int(np.clip(seconds / max(train(1), 1e-6), 1, schedule.num_iterations))
        per_iteration = train(count) / count
        per_evaluation = 0.0
        if schedule.eval_rows:
            policy = jax.jit(jax.vmap(self.algorithm.policy))(state)
            evaluate_lanes = self._compiled_evaluate(record["eval_episodes"], policy)
            started = time.perf_counter()
            jax.block_until_ready(evaluate_lanes(policy, self.spread.put(self.keys), jnp.int32(0)))
            per_evaluation = time.perf_counter() - started
        groups = math.ceil(len(self.run.lanes) / len(self.lanes))
        working = groups * (per_iteration * schedule.num_iterations + per_evaluation * len(schedule.eval_rows))
        compiling = record["seconds"]["compile"]
        return Forecast(compiling, compiling + working, self.bytes, groups)

    def _start(self):
        """The state to go on from: the restored one, the first time, or a fresh one."""
        state, self.run.restored = self.run.restored, None
        if state is not None:
            return self.spread.put(self.spread.pad(state))
        return self.spread.put(self.init(self.keys, jax.device_put(self.hypers, self.spread.devices[0])))

    def _evaluate_now(self, state, index: int, pending: "_Rows"):
        run, record = self.run, self.run.record
        policy = jax.jit(jax.vmap(self.algorithm.policy))(state)
        evaluate_lanes = self._compiled_evaluate(record["eval_episodes"], policy)
        started = time.perf_counter()
        episodes = self.spread.take(evaluate_lanes(policy, self.spread.put(self.keys), jnp.int32(index)))
        seconds = time.perf_counter() - started
        record["seconds"]["evaluate"] += seconds
        pending.add_episodes(self._lane_columns(), int(run.env_steps_after[record["row"]]), episodes)
        env_steps = int(run.env_steps_after[record["row"]])
        run.report("evaluated", episodes=episodes, env_steps=env_steps, seconds=seconds)
        means = {name: float(np.mean(value)) for name, value in episodes._asdict().items()}
        run.store.log(kind="evaluation", env_steps=env_steps, **self._progress(record["row"]), **means)
        if index == 0 and run.spec.eval_episodes is None:
            self._limit_evaluation(seconds)

    def _compiled_evaluate(self, num_episodes, policy):
        if num_episodes not in self._evaluate:

            def evaluate_lane(policy, key, index):
                key = jax.random.fold_in(training.lane_keys(key)[1], index)
                return evaluate(self.algorithm, policy, key, num_episodes)

            started = time.perf_counter()
            program = jax.jit(self.spread.map(evaluate_lane, 2))
            self._evaluate[num_episodes] = program.lower(policy, self.spread.put(self.keys), jnp.int32(0)).compile()
            self.run.record["seconds"]["compile"] += time.perf_counter() - started
        return self._evaluate[num_episodes]

    def _limit_evaluation(self, seconds: float):
        """Cuts the episodes of later evaluations if all of them would take too much of the run. The choice is recorded."""
        run, record = self.run, self.run.record
        done = record["row"] / len(run.schedule.iterations)
        evaluating, training_ = seconds * len(run.schedule.eval_rows), record["seconds"]["train"] / done
        allowed = max(EVALUATION_FREE_SECONDS, EVALUATION_SHARE / (1 - EVALUATION_SHARE) * training_)
        if evaluating <= allowed:
            return
        fewer = max(4, int(record["eval_episodes"] * allowed / evaluating))
        if fewer < record["eval_episodes"]:
            run.report(
                "note",
                text=f"evaluation would take {evaluating / (evaluating + training_):.0%} of the run: "
                f"{fewer} episodes instead of {record['eval_episodes']} from here on (--eval-episodes sets the number)",
            )
            record["eval_episodes"] = fewer

    def _progress(self, row: int) -> dict[str, Any]:
        """Which lanes a line of the log is about, if not all, and the share of the run's training that is behind it."""
        num_lanes = len(self.run.lanes)
        share = (int(self.lanes[0]) + len(self.lanes) * row / len(self.run.schedule.iterations)) / num_lanes
        lanes = {} if len(self.lanes) == num_lanes else {"lanes": [int(self.lanes[0]), int(self.lanes[-1])]}
        return {**lanes, "progress": round(share, 6)}

    def _log_rows(self, rows, until: int):
        means = metrics.mean_over_lanes(rows)
        first = until - len(means["env_steps"])
        for index, env_steps in enumerate(means.pop("env_steps")):
            values = {name: float(value[index]) for name, value in means.items() if np.isfinite(value[index])}
            self.run.store.log(kind="row", env_steps=int(env_steps), **self._progress(first + index + 1), **values)

    def _note_nonfinite(self, rows):
        """Tells once of every lane whose update went non-finite."""
        if "nonfinite" not in rows:
            return
        known = {tuple(lane) for lane in self.run.record["nonfinite"]}
        frozen = {self.run.lanes[lane] for lane in self.lanes[rows["nonfinite"][:, -1] > 0]}
        for config, seed in sorted(frozen - known):
            self.run.report(
                "note",
                text=f"config {config}, seed {seed}: an update went non-finite; its policy is frozen at the last finite one",
            )
        self.run.record["nonfinite"] = sorted(known | frozen)

    def _save(self, state, pending: "_Rows", final: bool):
        store, record = self.run.store, self.run.record
        # Padding lanes are made again on resume. One program instead of one per leaf, and none where there is no padding.
        count = len(self.lanes)
        kept = state if self.spread.num_padded == count else jax.jit(lambda t: jax.tree.map(lambda x: x[:count], t))(state)
        store.append(pending.metrics(), pending.evaluations())
        group = record["first_lane"] // record["group_size"]
        step = group * len(self.run.schedule.iterations) + record["row"]
        store.commit(step, kept, record)
        if final or self.run.interrupt.requested:
            store.save_policies(jax.jit(jax.vmap(self.algorithm.policy))(kept), self._lane_columns())
        self.run.report("saved", env_steps=int(self.run.env_steps_after[record["row"]]))

    def _lane_columns(self) -> dict[str, np.ndarray]:
        config, seed = np.asarray([self.run.lanes[lane] for lane in self.lanes]).T
        return {"config": config.astype(np.int32), "seed": seed.astype(np.int64)}


class _Rows:
    """Rows and episodes since the last checkpoint, as columns."""

    def __init__(self):
        self._metrics, self._episodes = [], []

    def add_rows(self, lanes, iteration, rows):
        num_lanes, num_rows = rows["env_steps"].shape
        self._metrics.append(
            {
                "config": np.repeat(lanes["config"], num_rows),
                "seed": np.repeat(lanes["seed"], num_rows),
                "iteration": np.tile(iteration.astype(np.int64), num_lanes),
                "env_steps": rows["env_steps"].ravel().astype(np.int64),
                **{name: value.ravel() for name, value in rows.items() if name != "env_steps"},
            }
        )

    def add_episodes(self, lanes, env_steps, episodes: Episodes):
        num_lanes, count = episodes.mode_return.shape
        for policy in ("mode", "sample"):
            self._episodes.append(
                {
                    "config": np.repeat(lanes["config"], count),
                    "seed": np.repeat(lanes["seed"], count),
                    "env_steps": np.full(num_lanes * count, env_steps, np.int64),
                    "policy": np.full(num_lanes * count, policy),
                    "episode": np.tile(np.arange(count, dtype=np.int32), num_lanes),
                    "return": getattr(episodes, f"{policy}_return").ravel(),
                    "length": getattr(episodes, f"{policy}_length").ravel(),
                }
            )

    def metrics(self):
        return _concatenate(self._metrics)

    def evaluations(self):
        return _concatenate(self._episodes)


def _concatenate(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else None


def policies_of(path, algorithm: Algorithm) -> tuple[PyTree, dict[str, np.ndarray]]:
    """The saved policies of the run in ``path``, stacked [L, ...], and their columns config [L] and seed [L].

    Raises: RequestError if there are none, or if they do not fit ``algorithm``.
    """
    state = jax.eval_shape(algorithm.init, jax.random.key(0), algorithm.hypers)
    return load_policies(path, jax.eval_shape(algorithm.policy, state))


def describe_env(env: Environment, spec: RunSpec) -> dict[str, Any]:
    """What the record should say of the environment beyond its name."""
    backend = spec.env_options.get("backend", getattr(env, "backend", None))
    return {"env_backend": backend, "reset_mode": getattr(env, "reset_mode", None), "precision": spec.precision}


def on_cpu(devices) -> bool:
    return devices[0].platform == "cpu"


def with_params(env: Environment, changes: dict[str, Any]) -> Environment:
    """``env`` with other default parameters; see ``pgjax.change_params``."""
    params = pgjax.change_params(env, changes)
    env = copy.copy(env)
    env.default_params = params
    return env
