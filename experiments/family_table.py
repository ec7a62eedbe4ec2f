"""Several comparisons as one table: ``python -m pgjax.experiments.family_table DIR...``, each DIR made by ``pgjax compare``."""

import sys
from pathlib import Path

import pgjax
from pgjax.experiments.compare import markdown_table, read_plan, result_cells, results_of


def family_table(folders: list[Path]) -> str:
    """Markdown: a row per algorithm, and per environment the final mode return as IQM with its 95 % interval."""
    header, cells = ["algorithm"], {}
    for column, folder in enumerate(folders):
        plan = read_plan(folder)
        results = results_of([pgjax.load(folder / name) for name in plan.specs])
        spec = next(iter(plan.specs.values()))
        header.append(f"{spec.env}, {spec.total_env_steps:,} steps, {len(spec.seeds)} seeds")
        for name, row in zip(plan.specs, result_cells(results), strict=True):
            cells.setdefault(name, [""] * len(folders))[column] = row[1]
    return markdown_table(header, [[f"`{name}`", *row] for name, row in cells.items()])


if __name__ == "__main__":
    print(family_table([Path(folder) for folder in sys.argv[1:]]))
