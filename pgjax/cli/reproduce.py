"""``pgjax reproduce``."""

import dataclasses
from pathlib import Path
from typing import Literal

from pgjax.cli.options import EXIT_FAILED, parse
from pgjax.errors import RequestError


@dataclasses.dataclass
class ReproduceArgs:
    """Run what a paper's numbers need and put ours beside them. pgjax list papers names the papers."""

    paper: str | None = None
    """Name of the paper, such as ppo."""
    scale: Literal["smoke", "cpu", "full"] = "smoke"
    """smoke proves the path in a minute or two, cpu is half an hour of two cores, full the paper's own budget."""
    out: Path | None = None
    """Folder of the runs and tables; runs/reproduce-PAPER-SCALE if not given."""
    workers: int | None = None
    """Processes side by side; 1 if not given, whose lanes use every core."""
    engine: Literal["local", "ray", "slurm"] | None = None
    """Where the runs go; processes of this machine if not given."""
    retry: tuple[Literal["failed", "unreadable"], ...] = ()
    """Kinds of cells to run again."""
    reuse: bool = False
    """Take over results that were kept for other papers where the request is the same, in place of running it again."""
    record: bool = False
    """Keep the results beside the published numbers, for --page."""
    page: Path | None = None
    """Write the page that says where we stand, from the results that were kept, and run nothing: docs/reproduction.md."""


def command(argv: list[str]) -> int:
    argv = [f"--paper={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else list(argv)
    if argv and argv[-1] == "--page":
        argv.append("docs/reproduction.md")
    args = parse(ReproduceArgs, argv, "pgjax reproduce")
    if args.page is not None:
        from pgjax.experiments.reproduce.page import write_page

        write_page(args.page)
        return 0
    from pgjax.host import lanes

    lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax.experiments.reproduce import list_papers, reproduce
    from pgjax.experiments.sweeps.driver import Options

    if args.paper is None:
        raise RequestError(f"name a paper: {', '.join(list_papers())}")
    out = args.out or Path("runs") / f"reproduce-{args.paper}-{args.scale}"
    options = Options(out, args.engine, args.workers, None, args.retry)
    return 0 if reproduce(args.paper, args.scale, options, record=args.record, reuse=args.reuse) else EXIT_FAILED
