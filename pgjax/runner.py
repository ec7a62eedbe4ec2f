"""Runs a specification on the host: lanes, chunks, evaluation, checkpoints and progress."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax
from pgjax import lanes as lanes_
from pgjax import metrics as metrics_
from pgjax import training
from pgjax.errors import RequestError, RunError
from pgjax.evaluation import Episodes, evaluate
from pgjax.on_policy import as_hypers
from pgjax.store import RunStore
from pgjax.types import Algorithm, Environment

# Rows that one call of the chunk program can return.
CHUNK_ROWS = 16
# Seconds of work per call: long enough to hide the host, short enough that Ctrl-C and the display feel prompt.
CHUNK_SECONDS = 1.0
# Share of the wall time that checkpoints, and evaluations, may take.
CHECKPOINT_SHARE, EVALUATION_SHARE = 0.05, 0.2
# Evaluations that take less than this in all are never cut down.
EVALUATION_FREE_SECONDS = 10.0
DEFAULT_EPISODES = {"gymnax": 64}
OTHER_EPISODES = 16


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run: an algorithm on an environment, for every pair of configuration and seed.

    algorithm, env: public names.  env_options: arguments of ``make_env``.  env_params: dotted fields of the environment's
    parameters to replace.  setup: fields of ``Setup`` that differ from the defaults.
    configs: fields of ``Hypers`` that differ from the defaults, one dict per configuration; all share the Setup.
    seeds: whole numbers.  total_env_steps: per lane.
    log_every: iterations per row, None for about 200 rows.  num_evals: evaluations during the run.
    eval_episodes: per evaluation and policy; None means 64 on gymnax and 16 elsewhere, cut down if they take too long.
    objective: where a pluggable objective comes from, as text for the record.
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
    init_policy: str | None = None
    precision: str = "float32"
    devices: int | None = None
    preset: str | None = None

    def build(self, objective=None) -> Algorithm:
        """The algorithm on its environment. ``objective`` is the object that the field of that name describes."""
        env = pgjax.make_env(self.env, **self.env_options)
        if self.env_params:
            env = with_params(env, self.env_params)
        return pgjax.make(self.algorithm, env, objective=objective, **self.setup)


@dataclasses.dataclass(frozen=True)
class Event:
    """What a run tells while it goes on. ``kind`` is one of started, compiled, rows, evaluated, saved, note, finished."""

    kind: str
    data: dict[str, Any]


@dataclasses.dataclass
class RunResult:
    """How a run ended. status: ``finished``, ``interrupted`` or ``failed``; nonfinite: the (config, seed) that were frozen."""

    status: str
    path: str
    env_steps: int
    nonfinite: list[tuple[int, int]]
    timings: dict[str, float]


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
    with jax.default_matmul_precision(spec.precision), _Interrupt() as interrupt:
        return _Run(spec, store, report, algorithm, interrupt).execute()


class _Interrupt:
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
        self.report = lambda kind, **data: report(Event(kind, data))
        self.schedule = training.make_schedule(algorithm, spec.total_env_steps, spec.log_every, spec.num_evals)
        self.lanes = [(config, seed) for config in range(len(spec.configs)) for seed in spec.seeds]
        hypers = [
            training.with_horizon(as_hypers(algorithm.hypers, **config), self.schedule.env_steps)
            for config in spec.configs
        ]
        self.hypers = lanes_.stack_lanes([hypers[config] for config, _ in self.lanes])
        self.keys = jax.vmap(jax.random.key)(np.asarray([seed for _, seed in self.lanes], np.uint32))
        default = DEFAULT_EPISODES.get(spec.env.split("/")[0], OTHER_EPISODES)
        self.eval_episodes = spec.eval_episodes or store.get("eval_episodes") or default
        self.timings = {"compile": 0.0, "train": 0.0, "evaluate": 0.0, "save": 0.0}
        self.nonfinite = {tuple(lane) for lane in store.get("nonfinite") or ()}
        self.started = time.perf_counter()

    def execute(self) -> RunResult:
        start = self.store.last_record() or {"group": 0, "row": 0, "env_steps": 0}
        self.report(
            "started",
            lanes=len(self.lanes),
            env_steps=self.schedule.env_steps,
            resumed_env_steps=start["env_steps"],
            path=str(self.store.path),
        )
        self.store.set_status("running")
        group, status = self._first_group(start["group"]), "finished"
        while True:
            state, row = group.restore() if group.index == start["group"] and start["row"] else (group.init(), 0)
            if not group.train(state, row):
                status = "interrupted"
                break
            self._save_policies(group)
            if group.lanes[-1] == len(self.lanes) - 1:
                break
            group = group.next()
        if status == "finished" and self.nonfinite:
            status = "failed"
        self.timings["total"] = time.perf_counter() - self.started
        self.store.finish(status, nonfinite=sorted(self.nonfinite), timings=self.timings)
        record = self.store.last_record() or start
        result = RunResult(status, str(self.store.path), record["env_steps"], sorted(self.nonfinite), self.timings)
        self.report("finished", result=result)
        return result


class _Group:
    """Lanes that are trained together, and the programs compiled for their number."""
