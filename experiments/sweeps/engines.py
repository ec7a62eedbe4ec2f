"""Where groups run: existing engines, each behind one function. None of them knows what a group is.

An engine is given tasks, calls ``work`` on each in some process, and yields ``(task, outcome)`` as they end; an outcome is
None where the process died and the retries are used up. ``work`` goes on from a group's last checkpoint, so to try again is to
lose little.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pgjax.errors import RequestError
from pgjax.experiments.sweeps.work import Outcome, Task, follow_parent, work

# How often a task is tried whose process dies.
TRIES = 4
Results = Iterator[tuple[Task, Outcome | None]]


def run_local(tasks: Sequence[Task], *, workers: int = 1, say: Callable[[str], None] = print) -> Results:
    """Processes of this machine, ``workers`` of them. They end with the driver: at a checkpoint if it is interrupted."""
    tries = dict.fromkeys(tasks, 0)
    while tries:
        waiting: dict[Any, Task] = {}
        # Spawned, since JAX's threads do not survive a fork.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare) as pool:
            try:
                while tries:
                    # No more than there are processes, so that if one dies it is known who may have been the cause.
                    idle = [task for task in tries if task not in waiting.values()][: workers - len(waiting)]
                    waiting |= {pool.submit(work, task): task for task in idle}
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        outcome = future.result()
                        task = waiting.pop(future)
                        del tries[task]
                        yield task, outcome
            except BrokenProcessPool:
                say("a worker process died; its work goes on from the last checkpoint")
            except BaseException:
                for process in list((pool._processes or {}).values()):
                    with contextlib.suppress(OSError, ValueError):
                        os.kill(process.pid, signal.SIGTERM)
                raise
        for task in waiting.values():
            tries[task] += 1
            if tries[task] == TRIES:
                del tries[task]
                yield task, None


def _prepare() -> None:
    # Ctrl-C is for the driver, which passes it on once; a second signal would end a run without a checkpoint.
    os.setpgrp()
    follow_parent()


def run_ray(
    tasks: Sequence[Task],
    *,
    workers: int | None = None,
    address: str | None = None,
    resources: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Ray tasks: on the cluster at ``address``, or on one of this machine with ``workers`` CPUs. Ray itself tries again.

    Args: resources: options of ``ray.remote`` for each task, by default ``num_cpus=1``.
    Raises: RequestError if Ray is not installed or the cluster cannot be reached.
    """
    ray = _library("ray", "ray")
    try:
        local = {} if address else {"num_cpus": workers or len(os.sched_getaffinity(0)), "include_dashboard": False}
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RequestError(f"engine.address = {address!r}: {str(error).splitlines()[0]}") from None
    options = {"num_cpus": 1, "max_retries": TRIES - 1, **(resources or {})}
    remote = ray.remote(**options)(work)
    waiting = {remote.remote(task): task for task in tasks}
    try:
        while waiting:
            for reference in ray.wait(list(waiting), num_returns=1)[0]:
                task = waiting.pop(reference)
                try:
                    yield task, ray.get(reference)
                except ray.exceptions.RayError as error:
                    say(f"{task.group}: {str(error).splitlines()[0]}")
                    yield task, None
    finally:
        for reference in waiting:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(reference)
        if not address:
            # Give interrupted tasks the time for a checkpoint.
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting), timeout=60)
            ray.shutdown()


class _Job:
    """What SLURM runs; when it is about to be stopped, it is put into the queue again."""

    def __call__(self, task: Task) -> Outcome:
        return work(task)

    def checkpoint(self, task: Task):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task)


def run_slurm(
    tasks: Sequence[Task],
    *,
    folder: Path,
    cluster: str | None = None,
    parameters: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Jobs of a SLURM array, through submitit. They go on if the driver ends; the next driver finds what they did.

    Args:
      folder: for submitit's files, seen by all machines.  cluster: ``local`` for processes of this machine.
      parameters: of ``AutoExecutor.update_parameters``, such as ``timeout_min`` or ``slurm_partition``.
    Raises: RequestError if submitit is not installed, or SLURM not there.
    """
    submitit = _library("submitit", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
        executor.update_parameters(**{"name": "pgjax", "timeout_min": 24 * 60, **(parameters or {})})
    except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
        raise RequestError(f"engine slurm: {str(error).splitlines()[0]}") from None
    tries = dict.fromkeys(tasks, 0)
    waiting: dict[Any, Task] = {}
    try:
        while tries:
            if new := [task for task in tries if task not in waiting.values()]:
                waiting |= dict(zip(executor.map_array(_Job(), new), new, strict=True))
            for job in [job for job in waiting if job.done()]:
                task = waiting.pop(job)
                try:
                    outcome = job.result()
                except Exception as error:  # whatever ended the job, it comes as an exception here
                    tries[task] += 1
                    say(f"{task.group}: job {job.job_id} ended without a result ({str(error).splitlines()[0][:200]})")
                    if tries[task] < TRIES:
                        continue
                    outcome = None
                del tries[task]
                yield task, outcome
            time.sleep(0.5)
    finally:
        for job in waiting:
            if cluster in ("local", "debug"):
                job.cancel()


def _library(name: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise RequestError(f"engine {extra} needs {name}: pip install 'pgjax[{extra}]'") from None


ENGINES: dict[str, Callable[..., Results]] = {"local": run_local, "ray": run_ray, "slurm": run_slurm}
