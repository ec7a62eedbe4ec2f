"""``pgjax sweep``."""

import dataclasses
import shlex
from pathlib import Path
from typing import Literal

from pgjax.cli.options import EXIT_FAILED, EXIT_WRONG_REQUEST, parse
from pgjax.errors import RequestError, close_names


@dataclasses.dataclass
class SweepRunArgs:
    """Run what is left of a sweep: cells that are finished are skipped, those half done go on from their checkpoints."""

    file: Path
    """The sweep file; docs/sweeps.md tells what it may hold."""
    out: Path | None = None
    """Folder of the sweep; runs/sweep-NAME after the file if not given."""
    dry_run: bool = False
    """Say what would be run, in how many programs, how long and with how much memory; run nothing."""
    measure: bool = True
    """With --dry-run: measure time and memory by compiling and briefly running each program."""
    engine: Literal["local", "ray", "slurm"] | None = None
    """Where groups of cells run; what the file says, or else processes of this machine."""
    workers: int | None = None
    """Processes side by side, for local and ray; 1 if not given, whose lanes use every core."""
    address: str | None = None
    """Address of a Ray cluster; a new one on this machine if not given."""
    retry: tuple[Literal["failed", "unreadable"], ...] = ()
    """Kinds of cells to run again."""


@dataclasses.dataclass
class SweepPathArgs:
    """The sweep file and its folder."""

    file: Path
    """The sweep file."""
    out: Path | None = None
    """Folder of the sweep; runs/sweep-NAME after the file if not given."""


def command(argv: list[str]) -> int:
    usage = "usage: pgjax sweep {run,status,report} FILE [--out DIR] ...\n\npgjax sweep run --help lists the options"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else EXIT_WRONG_REQUEST
    action, *rest = argv
    if action not in ("run", "status", "report"):
        raise RequestError(f"sweep {action!r} is unknown; {close_names(action, ('run', 'status', 'report'))}")
    words = ["pgjax", "sweep", *argv]
    if not rest:
        raise RequestError(f"name a sweep file: pgjax sweep {action} FILE")
    rest = [f"--file={rest[0]}", *rest[1:]] if not rest[0].startswith("-") else rest
    args = parse(SweepRunArgs if action == "run" else SweepPathArgs, rest, f"pgjax sweep {action}")
    if not args.file.is_file():
        raise RequestError(f"there is no file {args.file}; name a sweep file")
    from pgjax.host import lanes

    lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax.experiments.sweeps import driver

    out = args.out or driver.default_out(args.file)
    if action == "status":
        print(driver.sweep_status(args.file, out))
        return 0
    if action == "report":
        from pgjax.experiments.report import write_report

        results = driver.results_of_sweep(args.file, out)
        print(write_report(results, out, title=f"Sweep {args.file.stem}", command=shlex.join(words)))
        return 0
    options = driver.Options(out, args.engine, args.workers, args.address, args.retry)
    if args.dry_run:
        driver.dry_run(args.file, options, measure=args.measure)
        return 0
    return 0 if driver.run_sweep(args.file, options, command=shlex.join(words)) else EXIT_FAILED
