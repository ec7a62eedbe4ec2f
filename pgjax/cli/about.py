"""Commands about pgjax and this machine: ``pgjax list``, ``doctor`` and ``bench``."""

import dataclasses
from pathlib import Path

from pgjax.cli.options import EXIT_WRONG_REQUEST, parse
from pgjax.errors import RequestError, close_names


def list_(argv: list[str]) -> int:
    what = argv[0] if argv else ""
    lists = {"envs": _list_envs, "algorithms": _list_algorithms, "presets": _list_presets, "papers": _list_papers}
    if what in ("-h", "--help", ""):
        print(f"usage: pgjax list {{{','.join(lists)}}}")
        return 0 if what else EXIT_WRONG_REQUEST
    if what not in lists:
        raise RequestError(f"list {what!r} is unknown; {close_names(what, lists)}")
    lists[what]()
    return 0


def _list_papers() -> None:
    from pgjax.experiments.reproduce.paper_file import list_papers, read_paper

    for name in list_papers():
        paper = read_paper(name)
        numbers = sum(len(entry.values) for entry in paper.numbers)
        runs = "" if paper.runs else ", no runs yet"
        print(f"{name:18} {paper.title} ({paper.source}): {numbers} numbers, {len(paper.claims)} claims{runs}")


def _list_envs() -> None:
    from pgjax.envs import list_envs

    for entry in list_envs():
        notes = [", ".join(entry.backends)] if entry.backends else []
        notes += [f"{backend + ': ' if backend else ''}{why}" for backend, why in entry.broken.items()]
        print(f"{entry.name:<34} {'; '.join(notes)}".rstrip())


def _list_algorithms() -> None:
    from pgjax.algorithms import list_algorithms

    for name, line in list_algorithms().items():
        print(f"{name:<12} {line}")


def _list_presets() -> None:
    from pgjax.experiments.presets import list_presets

    # Environments of one library that share what is said of a preset share its line.
    lines: dict[tuple[str, str, str], list[str]] = {}
    for name, by_algorithm in list_presets().items():
        library = name.partition("/")[0]
        for algorithm, preset in by_algorithm.items():
            lines.setdefault((library, algorithm, preset.get("reached") or preset.get("about", "")), []).append(name)
    for (library, algorithm, said), names in lines.items():
        name = names[0] if len(names) == 1 else f"{library}/... ({len(names)} environments)"
        print(f"{name:<34} {algorithm:<10} {said}".rstrip())


def doctor(argv: list[str]) -> int:
    if argv:
        return _help_only(argv, "usage: pgjax doctor\n\nChecks that what pgjax needs is there and works.")
    from pgjax.host.doctor import examine

    return examine(print)


def _help_only(argv: list[str], text: str) -> int:
    if argv[0] in ("-h", "--help"):
        print(text)
        return 0
    raise RequestError(f"argument {argv[0]!r} is unknown here; this command takes none")


@dataclasses.dataclass
class BenchArgs:
    """Measure speed on this machine: the public single-file PPO setting, lanes, environments, start-up and memory."""

    parts: tuple[str, ...] = ()
    """What to measure; everything if not given. --parts help lists them."""
    out: Path | None = None
    """Write the figures to this JSON file as well."""
    repeats: int = 5
    """Repetitions, of which the median is reported."""


def bench(argv: list[str]) -> int:
    args = parse(BenchArgs, argv, "pgjax bench")
    from pgjax.host import lanes

    lanes.use_host_devices()
    from pgjax.experiments.bench import bench

    return bench(args.parts, args.repeats, args.out, print)
