"""What is left of a sweep, and in which programs: cells with the same Setup train as lanes of one."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence

from pgjax.experiments.sweeps.folder import Cell, CellStatus, Group, SweepFolder, cell_of
from pgjax.host.runner import RunSpec

# What a driver leaves alone unless asked.
DONE = ("finished", "failed", "unreadable")


def cells_of(specs: Sequence[RunSpec]) -> list[Cell]:
    """One cell a specification; of several that would do the same, the first."""
    return list({cell.name: cell for cell in map(cell_of, specs)}.values())


def plan(folder: SweepFolder, statuses: Sequence[CellStatus], retry: Collection[str] = ()) -> list[Group]:
    """The groups to run: those that were begun, as they were begun, then new ones for what no group holds.

    Args: retry: statuses (``failed``, ``unreadable``) to run again.
    """
    wanted = {status.cell.name: status.cell for status in statuses if status.status not in DONE or status.status in retry}
    groups = []
    for group in folder.open_groups()[0]:
        if group.names & wanted.keys():
            groups.append(dataclasses.replace(group, error=""))
            for name in group.names:
                wanted.pop(name, None)
    return groups + group_cells(list(wanted.values()))


def group_cells(cells: Sequence[Cell]) -> list[Group]:
    """Cells that may share a program, together: all that differs is Hypers and seeds, and every Hypers has the same seeds."""
    alike: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        common = dataclasses.replace(cell.spec, configs=({},), seeds=())
        by_config = alike.setdefault(json.dumps(common.config(), sort_keys=True), {})
        by_config.setdefault(json.dumps(cell.spec.configs[0], sort_keys=True), []).append(cell)
    groups = []
    for by_config in alike.values():
        by_seeds: dict[tuple[int, ...], list[list[Cell]]] = {}
        for same_config in by_config.values():
            seeds = tuple(sorted(seed for cell in same_config for seed in cell.spec.seeds))
            by_seeds.setdefault(seeds, []).append(same_config)
        groups += [_group(seeds, configs) for seeds, configs in by_seeds.items()]
    return groups


def _group(seeds: tuple[int, ...], configs: list[list[Cell]]) -> Group:
    spec = dataclasses.replace(configs[0][0].spec, configs=tuple(same[0].spec.configs[0] for same in configs), seeds=seeds)
    cells = tuple((cell.name, number, cell.spec.seeds) for number, same in enumerate(configs) for cell in same)
    digest = hashlib.sha256("\n".join(sorted(name for name, _, _ in cells)).encode()).hexdigest()
    return Group(f"{spec.algorithm}-{spec.env.replace('/', '-')}-{digest[:12]}", spec, cells)
