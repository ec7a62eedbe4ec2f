"""The ``pgjax`` command. Whatever is slow to import is imported by the command that needs it."""

import os
import sys
from collections.abc import Callable

from pgjax.cli import about, compare, look, meta_train, reproduce, sweep, train
from pgjax.cli.options import EXIT_FAILED, EXIT_WRONG_REQUEST
from pgjax.errors import RequestError, RunError, close_names


def main(argv: list[str] | None = None) -> None:
    """Runs one command line and exits: 0 done, 1 the run failed, 2 the request was wrong."""
    argv = sys.argv[1:] if argv is None else argv
    sys.exit(_main(argv))


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        import pgjax

        print(pgjax.__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise RequestError(f"command {argv[0]!r} is unknown; {close_names(argv[0], COMMANDS)}")
        return COMMANDS[argv[0]][0](argv[1:])
    except RequestError as error:
        print(f"pgjax: {error}", file=sys.stderr)
        return EXIT_WRONG_REQUEST
    except RunError as error:
        print(f"pgjax: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pgjax COMMAND ...",
            "",
            *lines,
            "",
            "pgjax COMMAND --help tells more; exit codes: 0 done, 1 the run failed, 2 the request was wrong",
        ]
    )


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (train.command, "train an algorithm on an environment, for one or many seeds"),
    "compare": (compare.command, "train several algorithms alike and compare them"),
    "sweep": (sweep.command, "run, watch and report many configurations described in one file"),
    "reproduce": (reproduce.command, "put a paper's published numbers beside ours"),
    "meta-train": (meta_train.command, "learn an objective or an update rule by training many agents"),
    "eval": (look.evaluate, "evaluate the saved policies of a run"),
    "render": (look.render, "draw what a policy of a run does, as GIFs and one page"),
    "plot": (look.plot, "draw learning curves of runs"),
    "report": (look.report, "write one page on many runs, with figures, tables and commands"),
    "list": (about.list_, "list envs, algorithms, presets or papers"),
    "doctor": (about.doctor, "check the installation"),
    "bench": (about.bench, "measure speed on this machine"),
}
