"""``pgjax sweep``: plans what is left of a sweep, hands it to an engine, and says what came of it."""

import collections
import contextlib
import dataclasses
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pgjax.errors import RequestError, close_names
from pgjax.experiments.compare import text_table
from pgjax.experiments.objective_file import load_objective
from pgjax.experiments.results import Result
from pgjax.experiments.sweeps import engines
from pgjax.experiments.sweeps.folder import Cell, CellStatus, Group, SweepFolder
from pgjax.experiments.sweeps.plan import DONE, cells_of, plan
from pgjax.experiments.sweeps.sweep_file import Sweep, read_sweep
from pgjax.experiments.sweeps.work import Outcome, Task
from pgjax.host.runner import forecast

_STATUSES = ("finished", "failed", "running", "interrupted", "pending", "unreadable")
# Options of each engine, as in the file's [engine] table.
_ENGINE_OPTIONS = {
    "local": ("workers",),
    "ray": ("workers", "address", "resources"),
    "slurm": ("cluster", "parameters"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep is run. out: its folder.  engine, workers: None for what the file says.  retry: statuses to run again."""

    out: Path
    engine: str | None = None
    workers: int | None = None
    address: str | None = None
    retry: tuple[str, ...] = ()


def default_out(file: Path) -> Path:
    """Where a sweep goes that is not told where."""
    return Path("runs") / f"sweep-{file.stem}"


def run_sweep(file: Path, options: Options, *, command: str = "", say: Callable[[str], None] = print) -> bool:
    """Runs what is left of a sweep. Nothing is written if the request is wrong.

    Returns: whether every cell is finished.
    Raises: RequestError for a wrong file or option, or if another driver owns the sweep.
    """
    sweep = read_sweep(file)
    if sweep.search is not None:
        from pgjax.experiments.sweeps.search import run_search

        return run_search(sweep, SweepFolder(options.out), options, command=command, say=say)
    again = f"pgjax sweep run {shlex.quote(str(file))} --out {shlex.quote(str(options.out))}"
    return run_cells_of(sweep, options, command=command, again=again, say=say)


def run_cells_of(
    sweep: Sweep, options: Options, *, command: str = "", again: str = "", say: Callable[[str], None] = print
) -> bool:
    """Runs what is left of the configurations of a sweep. ``command`` is recorded, ``again`` told to who interrupts it.

    Returns and raises as ``run_sweep``.
    """
    folder = SweepFolder(options.out)
    cells = cells_of(sweep.specs)
    check_specs([cell.spec for cell in cells])
    with folder.owned(), interruptible():
        folder.record_start(sweep.path, sweep.text, command)
        try:
            with make_engine(sweep, folder, options, say) as engine:
                run_cells(engine, folder, cells, options, devices_each(sweep, options), say)
        except KeyboardInterrupt:
            say(f"interrupted; continue with: {again}")
            return False
    statuses = folder.statuses(cells)
    say(status_text(statuses, folder))
    return all(status.status == "finished" for status in statuses)


def run_cells(
    engine: engines.Engine,
    folder: SweepFolder,
    cells: Sequence[Cell],
    options: Options,
    devices: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Runs the cells that are not done on an engine that was entered. The caller owns the folder.

    Args: devices: host devices of each process, None for all.
    Returns: how the groups ended that this call ran.
    Raises: KeyboardInterrupt if a group was interrupted.
    """
    statuses = folder.statuses(cells)
    groups = plan(folder, statuses, options.retry)
    say(opening(statuses, groups, folder))
    for group in groups:
        folder.write_group(group)
    outcomes = []
    started = time.monotonic()
    by_id = {group.id: group for group in groups}
    tasks = [Task(str(folder.path.absolute()), group.id, devices) for group in groups]
    for task, outcome in engine.run(tasks):
        group = by_id[task.group]
        if outcome is None:
            outcome = Outcome(task.group, "failed", f"its process died {engines.TRIES} times")
            folder.write_group(dataclasses.replace(group, error=outcome.error))
        outcomes.append(outcome)
        say(_group_line(group, outcome, len(outcomes), len(groups), time.monotonic() - started, folder))
        if outcome.status == "interrupted":
            raise KeyboardInterrupt
    return outcomes


def make_engine(sweep: Sweep, folder: SweepFolder, options: Options, say: Callable[[str], None]) -> engines.Engine:
    """The engine that the file or the command line names. Raises: RequestError for options it does not have."""
    asked = {**sweep.engine}
    given = {"name": options.engine, "workers": options.workers, "address": options.address}
    if options.engine and options.engine != asked["name"]:
        asked = {}  # the file's options are for the file's engine
    asked |= {name: value for name, value in given.items() if value is not None}
    name = asked.pop("name")
    if name not in _ENGINE_OPTIONS:
        raise RequestError(f"--engine {name!r} is unknown; known: {', '.join(_ENGINE_OPTIONS)}")
    for option in asked:
        if option not in _ENGINE_OPTIONS[name]:
            raise RequestError(f"engine.{option}: {name} has no such option; {close_names(option, _ENGINE_OPTIONS[name])}")
    if (workers := asked.get("workers", 1)) is not None and (type(workers) is not int or workers < 1):
        raise RequestError(f"workers = {workers!r} must be a whole number, at least 1")
    if name == "slurm":
        asked["folder"] = folder.path / "slurm"
    return engines.ENGINES[name](say, **asked)


def devices_each(sweep: Sweep, options: Options) -> int | None:
    """Host devices of each worker: the machine's cores shared among the workers that are on it."""
    workers = options.workers or sweep.engine.get("workers", 1)
    return max(1, len(os.sched_getaffinity(0)) // workers) if workers > 1 else None


def check_specs(specs: Sequence[Any]) -> None:
    """Builds every different Setup and checks every number. Raises: RequestError for the first that cannot run."""
    seen = set()
    algorithms: dict[str, Any] = {}
    for spec in specs:
        key = repr((spec.algorithm, spec.env, spec.env_options, spec.env_params, spec.setup, spec.objective, spec.rule))
        if key not in algorithms:
            algorithms[key] = spec.build(load_objective(spec.objective))
        if (known := (key, repr(spec.configs), spec.total_env_steps)) in seen:
            continue
        seen.add(known)
        spec.check(algorithms[key])


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that both end at checkpoints."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread may handle signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# --- what is said


def opening(statuses: Sequence[CellStatus], groups: Sequence[Group], folder: SweepFolder) -> str:
    """What there is and what will be run."""
    counts = collections.Counter(status.status for status in statuses)
    lanes = sum(len(group.spec.configs) * len(group.spec.seeds) for group in groups)
    told = ", ".join(f"{counts[name]} {name}" for name in _STATUSES if counts[name])
    what = f"{len(statuses)} cells ({told}) -> {folder.path}"
    return f"{what}\n{len(groups)} groups to train, one program each, {lanes} lanes in all" if groups else what


def _group_line(group: Group, outcome: Outcome, number: int, total: int, seconds: float, folder: SweepFolder) -> str:
    spec = group.spec
    what = f"{spec.algorithm} on {spec.env}: {len(spec.configs)} configurations x {len(spec.seeds)} seeds"
    line = f"[{number}/{total}, {seconds:,.0f} s] {what}, {outcome.status}"
    if outcome.error:
        return f"{line}: {outcome.error}"
    frozen = 0
    with contextlib.suppress(RequestError):
        frozen = sum(len(folder.result(name).frozen) for name in group.names)
    return f"{line}; {frozen} lanes went non-finite" if frozen else line


def status_text(statuses: Sequence[CellStatus], folder: SweepFolder, notes: int = 10) -> str:
    """A table of algorithms and environments, then why cells failed, at most ``notes`` of them."""
    rows = {}
    for status in statuses:
        counts = rows.setdefault((status.cell.spec.algorithm, status.cell.spec.env), collections.Counter())
        counts[status.status] += 1
        counts["done"] += status.done if status.status not in DONE else 1.0
        counts["all"] += 1
    total = sum((counts for counts in rows.values()), collections.Counter())
    shown = [name for name in _STATUSES if total[name]]
    cells = [
        (*who, f"{n['all']}", *(f"{n[name] or ''}" for name in shown), f"{n['done'] / max(1, n['all']):.0%}")
        for who, n in [*rows.items(), (("all", ""), total)]
    ]
    header = ("algorithm", "environment", "cells", *shown, "done")
    lines = [text_table(header, cells, align="<<" + ">" * (len(header) - 2))]
    told = collections.Counter(f"{status.status}: {status.note}" for status in statuses if status.note)
    lines += [f"{text}" + (f" ({count} cells)" if count > 1 else "") for text, count in told.most_common(notes)]
    if len(told) > notes:
        lines.append(f"and {len(told) - notes} other reasons")
    if any(status.status in ("failed", "unreadable") for status in statuses):
        lines.append("to run those again: pgjax sweep run ... --retry failed unreadable")
    lines += folder.open_groups()[1]
    names = {status.cell.name for status in statuses}
    strangers = [group.id for group in folder.open_groups()[0] if not group.names & names]
    if strangers:
        lines.append(f"left alone: {len(strangers)} groups begun by another version or for other cells, as {strangers[0]}")
    return "\n".join(lines)


def sweep_status(file: Path, out: Path) -> str:
    """What is finished, failed, under way and missing. Reads only."""
    sweep, folder = read_sweep(file), SweepFolder(out)
    folder.check()
    if sweep.search is not None:
        from pgjax.experiments.sweeps.search import search_status

        return search_status(sweep, folder)
    return status_text(folder.statuses(cells_of(sweep.specs)), folder)


def results_of_sweep(file: Path, out: Path) -> list[Result]:
    """What every cell of the file came to; those without a result with their status alone."""
    sweep, folder = read_sweep(file), SweepFolder(out)
    results = []
    for status in folder.statuses(cells_of(sweep.specs)):
        try:
            results.append(folder.result(status.cell.name))
        except RequestError:
            path = str(folder.cells / status.cell.name)
            results.append(Result(path=path, status=status.status, config=status.cell.spec.config(), note=status.note))
    return results


# --- the dry run


def dry_run(file: Path, options: Options, *, measure: bool = True, say: Callable[[str], None] = print) -> None:
    """Says what would be run: cells, groups, compilations, and unless ``measure`` is False each group's time and memory.

    A group is measured by compiling its program, which the sweep then finds in the compilation cache, and training it for about
    a second. Nothing is written into the sweep's folder.
    """
    sweep, folder = read_sweep(file), SweepFolder(options.out)
    if sweep.search is not None:
        raise RequestError("--dry-run: a search decides as it goes; a [grid] or [random] can be run dry")
    cells = cells_of(sweep.specs)
    check_specs([cell.spec for cell in cells])
    folder.check()
    statuses = folder.statuses(cells)
    groups = plan(folder, statuses, options.retry)
    say(opening(statuses, groups, folder))
    say(f"{len(groups)} compilations of a training program")
    rows, total = [], 0.0
    for group in groups:
        spec = group.spec
        row = (spec.algorithm, spec.env, f"{len(spec.configs)}", f"{len(spec.seeds)}", f"{spec.total_env_steps:,}")
        if measure:
            expected = forecast(spec, spec.build(load_objective(spec.objective)))
            total += expected.seconds
            split = f" x {expected.groups} parts in turn" if expected.groups > 1 else ""
            memory = f"{expected.bytes / 2**20:,.0f} MiB{split}"
            row += (f"{expected.compile_seconds:.0f} s", f"{expected.seconds:,.0f} s", memory)
        rows.append(row)
    header = ("algorithm", "environment", "configs", "seeds", "env steps")
    header += ("compiling", "time in all", "memory") if measure else ()
    say(text_table(header, rows, align="<<" + ">" * (len(header) - 2)))
    if measure and rows:
        workers = options.workers or sweep.engine.get("workers", 1)
        say(
            f"about {total / workers:,.0f} s on {workers} worker{'s' if workers > 1 else ''} like this process; evaluations "
            "were timed with untrained policies, whose episodes may have another length"
        )
