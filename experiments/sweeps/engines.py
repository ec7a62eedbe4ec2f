"""Where groups run: existing engines, each behind the same two doors. None of them knows what a group is.

An engine is a context; ``run(tasks)`` calls ``work`` on each in some process and yields ``(task, outcome)`` as they end; an
outcome is None where the process died and the retries are used up. ``work`` goes on from a group's last checkpoint, so to try
again is to lose little. Leaving the context ends what still runs, at a checkpoint where the engine can say so to its processes.
"""

import contextlib
import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from pgjax.errors import RequestError
from pgjax.experiments.sweeps.work import Outcome, Task, follow_parent, work

# How often a task is tried whose process dies.
TRIES = 4
# Seconds that interrupted work on Ray is given for its checkpoint.
_PATIENCE = 60.0
Say = Callable[[str], None]
Results = Iterator[tuple[Task, Outcome | None]]


class Engine(Protocol):
    """See the module's text."""

    def __enter__(self) -> "Engine": ...
    def __exit__(self, *error: object) -> None: ...
    def run(self, tasks: Sequence[Task]) -> Results: ...


class Local:
    """Processes of this machine, ``workers`` of them, kept between runs. They end with the driver, whatever ends it."""

    def __init__(self, say: Say = print, workers: int = 1):
        self._say, self._workers = say, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:
            for pid in list(self._pool._processes or ()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGTERM)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Sequence[Task]) -> Results:
        tries = dict.fromkeys(tasks, 0)
        waiting: dict[Any, Task] = {}
        while tries:
            if self._pool is None:
                # Spawned, since JAX's threads do not survive a fork.
                self._pool = ProcessPoolExecutor(
                    self._workers, mp_context=get_context("spawn"), initializer=_prepare, initargs=(os.getpid(),)
                )
            try:
                # No more than there are processes, so that if one dies it is known who may have been the cause.
                idle = [task for task in tries if task not in waiting.values()][: self._workers - len(waiting)]
                waiting |= {self._pool.submit(work, task): task for task in idle}
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    task = waiting.pop(future)
                    del tries[task]
                    yield task, outcome
            except BrokenProcessPool:
                self._say("a worker process died; its work goes on from the last checkpoint")
                self._pool.shutdown()
                self._pool = None
                for task in waiting.values():
                    tries[task] += 1
                    if tries[task] == TRIES:
                        del tries[task]
                        yield task, None
                waiting = {}


def _prepare(driver: int) -> None:
    # Ctrl-C is for the driver, which passes it on once; a second signal would end a run without a checkpoint.
    os.setpgrp()
    follow_parent(driver)


class Ray:
    """Ray tasks: on the cluster at ``address``, or on one of this machine with ``workers`` CPUs. Ray itself tries again.

    Args: resources: options of ``ray.remote`` for each task, over ``num_cpus=1``.
    Raises: RequestError if Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self,
        say: Say = print,
        workers: int | None = None,
        address: str | None = None,
        resources: dict[str, Any] | None = None,
    ):
        self._ray = _library("ray", "ray")
        self._say, self._workers, self._address = say, workers, address
        self._options = {"num_cpus": 1, "max_retries": TRIES - 1, **(resources or {})}
        self._waiting: dict[Any, Task] = {}

    def __enter__(self) -> "Ray":
        local = {"num_cpus": self._workers or len(os.sched_getaffinity(0)), "include_dashboard": False}
        try:
            self._ray.init(
                address=self._address, log_to_driver=False, logging_level="ERROR", **({} if self._address else local)
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RequestError(f"engine.address = {self._address!r}: {str(error).splitlines()[0]}") from None
        return self

    def __exit__(self, *_: object) -> None:
        ray = self._ray
        for reference in self._waiting:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(reference)
        if self._waiting:
            ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=_PATIENCE)
        ray.shutdown()

    def run(self, tasks: Sequence[Task]) -> Results:
        ray = self._ray
        remote = ray.remote(**self._options)(work)
        self._waiting = {remote.remote(task): task for task in tasks}
        while self._waiting:
            for reference in ray.wait(list(self._waiting), num_returns=1)[0]:
                task = self._waiting.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    self._say(f"{task.group}: {str(error).splitlines()[0]}")
                    outcome = None
                yield task, outcome


class Slurm:
    """Jobs of a SLURM array, through submitit. They go on if the driver ends; the next driver finds what they did.

    Args:
      folder: for submitit's files, seen by all machines.  cluster: ``local`` for processes of this machine.
      parameters: of ``AutoExecutor.update_parameters``, such as ``timeout_min`` or ``slurm_partition``.
    Raises: RequestError if submitit is not installed, SLURM is not there, or a parameter is none.
    """

    def __init__(
        self,
        say: Say = print,
        folder: Path = Path("slurm"),
        cluster: str | None = None,
        parameters: dict[str, Any] | None = None,
    ):
        submitit = _library("submitit", "slurm")
        self._say, self._here = say, cluster in ("local", "debug")
        self._waiting: dict[Any, Task] = {}
        try:
            self._executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
            if cluster is None and self._executor.cluster != "slurm":
                raise RuntimeError('there is no srun here; run this where SLURM is, or say cluster = "local" to try it out')
            self._executor.update_parameters(**{"name": "pgjax", "timeout_min": 24 * 60, **(parameters or {})})
        except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
            raise RequestError(f"engine slurm: {str(error).splitlines()[0]}") from None

    def __enter__(self) -> "Slurm":
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._waiting:
            if self._here:
                job.cancel()

    def run(self, tasks: Sequence[Task]) -> Results:
        tries = dict.fromkeys(tasks, 0)
        self._waiting = {}
        while tries:
            if new := [task for task in tries if task not in self._waiting.values()]:
                self._waiting |= dict(zip(self._executor.map_array(_Job(), new), new, strict=True))
            for job in [job for job in self._waiting if job.done()]:
                task = self._waiting.pop(job)
                try:
                    outcome = job.result()
                except Exception as error:  # whatever ended the job, it comes as an exception here
                    tries[task] += 1
                    self._say(f"{task.group}: job {job.job_id} ended without a result ({str(error).splitlines()[0][:200]})")
                    if tries[task] < TRIES:
                        continue
                    outcome = None
                del tries[task]
                yield task, outcome
            time.sleep(0.5)


class _Job:
    """What SLURM runs; when it is about to be stopped, it is put into the queue again."""

    def __call__(self, task: Task) -> Outcome:
        return work(task)

    def checkpoint(self, task: Task):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task)


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RequestError(f"engine {extra} needs {name}: pip install 'pgjax[{extra}]'") from None


ENGINES: dict[str, Callable[..., Engine]] = {"local": Local, "ray": Ray, "slurm": Slurm}
