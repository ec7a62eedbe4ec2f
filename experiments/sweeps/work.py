"""What one process does: trains a group from wherever it stands to its end, and puts its cells where finished ones are."""

import dataclasses
import os
import shutil
import threading
import time
from pathlib import Path

import pgjax
from pgjax.errors import DamagedFile, RequestError
from pgjax.experiments.objective_file import load_objective
from pgjax.experiments.results import results_of
from pgjax.experiments.sweeps.folder import Group, SweepFolder, write_whole
from pgjax.host.folders import InUse
from pgjax.host.runner import describe_env
from pgjax.host.store import RunStore, split_run

# How long a group waits for a process that still holds it, and how often it looks.
_PATIENCE, _LOOK = 60.0, 0.5


@dataclasses.dataclass(frozen=True)
class Task:
    """What an engine carries to a process. sweep: its folder.  group: id.  devices: host devices to use, None for all."""

    sweep: str
    group: str
    devices: int | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a task ended.

    status: ``finished``, ``interrupted`` or ``failed``.  error: why it failed, in one line.  programs: how often the training
    program was compiled or taken from the cache.  seconds: of the run, as in ``RunResult``.
    """

    group: str
    status: str
    error: str = ""
    programs: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def work(task: Task) -> Outcome:
    """Trains a group to its end or to an interruption. May be called again for the same group, in another process.

    Failures that belong to the group are recorded in its file and returned; the process is fit for the next one.
    """
    from pgjax.host import lanes

    lanes.use_host_devices(task.devices)
    lanes.use_compilation_cache()
    folder = SweepFolder(task.sweep)
    try:
        group = Group.read(folder.groups / f"{task.group}.json")
    except RequestError as error:
        # Another process has finished it meanwhile, and so removed it.
        there = not (folder.groups / f"{task.group}.json").exists()
        return Outcome(task.group, "finished") if there else Outcome(task.group, "failed", str(error))
    try:
        outcome = _train(folder, group)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:500]
        text = first_line if isinstance(error, RequestError) else f"{type(error).__name__}: {first_line}"
        folder.write_group(dataclasses.replace(group, error=text))
        outcome = Outcome(group.id, "failed", text)
    folder.note(outcome.status, group=group.id, **({"error": outcome.error} if outcome.error else {}))
    return outcome


def _train(folder: SweepFolder, group: Group) -> Outcome:
    spec = group.spec
    algorithm = spec.build(load_objective(spec.objective))
    programs = 0

    def count(event):
        nonlocal programs
        programs += event.kind == "compiled"

    while True:
        try:
            store = _open(folder, group, algorithm)
            if store is None:
                return Outcome(group.id, "finished")
            with store:
                if store.status == "finished" or (store.status == "failed" and store.get("nonfinite")):
                    status, seconds = "finished", store.get("seconds", {})
                else:
                    result = pgjax.run(spec, store, count, algorithm=algorithm)
                    status, seconds = result.status, result.seconds
                if status != "interrupted":
                    # While the group is still ours: another process may be waiting for it.
                    _put_away(folder, group, algorithm)
                    status = "finished"
            return Outcome(group.id, status, "", programs, seconds)
        except DamagedFile as error:
            # Renamed, so that nothing is lost; the group begins anew.
            folder.note("damaged", group=group.id, error=str(error))
            _set_aside(folder.groups / group.id)


def _open(folder: SweepFolder, group: Group, algorithm) -> RunStore | None:
    """The group's run, once nobody else is at it; None if another process has finished it meanwhile."""
    path, config = folder.groups / group.id, group.spec.config()
    provenance = describe_env(algorithm.env, group.spec)
    patience = time.monotonic() + _PATIENCE
    while (folder.groups / f"{group.id}.json").exists():
        try:
            if (path / "run.json").exists():
                store = RunStore.open(path, config, may_differ=("devices",), provenance=provenance)
                folder.note("resumed", group=group.id)
            else:
                store = RunStore.create(path, config, provenance=provenance)
                folder.note("started", group=group.id, cells=sorted(group.names))
            return store
        except InUse:
            # The process of a driver that is gone notices within a second; one on another machine may be at work.
            if time.monotonic() > patience:
                raise
            time.sleep(_LOOK)
    return None


def _set_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.replace(path, aside)


def _put_away(folder: SweepFolder, group: Group, algorithm) -> None:
    """Makes the finished cells of a finished group, and removes the group. Does nothing twice."""
    import jax

    path = folder.groups / group.id
    state = jax.eval_shape(algorithm.init, jax.random.key(0), algorithm.hypers)
    like = jax.eval_shape(algorithm.policy, state)
    there = folder.finished()
    waiting = folder.path / "groups" / f"{group.id}.cells"
    split_run(path, {waiting / name: (config, seeds) for name, config, seeds in group.cells}, like)
    for name, _, _ in group.cells:
        # ``result.json`` makes the cell complete, so it is there before the cell is.
        (result,) = results_of(pgjax.load(waiting / name))
        target = folder.cells / name
        write_whole(waiting / name / "result.json", dataclasses.replace(result, path=str(target)).dump())
        if name in there:
            shutil.rmtree(target, ignore_errors=True)  # a failed one that was tried again
        os.replace(waiting / name, target)
        folder.note("cell", cell=name, group=group.id)
    shutil.rmtree(waiting, ignore_errors=True)
    folder.drop_group(group)


def follow_parent(parent: int) -> None:
    """Ends this process soon after its parent is gone: a driver that was killed leaves nobody at work.

    Args: parent: its process id, from itself. Asked for here, it would be another one if the parent is gone already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
