"""Our curves with the published numbers where they belong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgjax.experiments.plots import COLORS, DASHES, over_env_steps, pyplot, save
from pgjax.experiments.reproduce.measured import Measured
from pgjax.experiments.reproduce.paper_file import Numbers, Paper
from pgjax.experiments.reproduce.verdicts import mean_interval

_MARKERS = ("s", "D", "^", "v", "P", "X", "*")
# What each metric of ours is, for the axis.
_TOLD = {
    "training": "training return",
    "sample": "return, sampled policy",
    "mode": "return, mode policy",
    "best": "return, mode policy",
}


def draw_paper(paper: Paper, results: Sequence[Measured], out: Path) -> bool:
    """Writes a PNG: a panel for each environment, our mean over seeds with its 95 % interval, published means as markers.

    Returns: whether there was anything to draw.
    """
    envs = list(dict.fromkeys(each.env for each in results))
    if not envs:
        return False
    beside = [numbers for numbers in paper.numbers if numbers.run and numbers.metric in _TOLD]
    metrics = [numbers.metric for numbers in beside] or ["mode"]
    metric = paper.shown or max(set(metrics), key=metrics.count)
    columns = min(3, len(envs))
    rows = -(-len(envs) // columns)
    # One style for a label in all panels: they share the legend.
    labels = list(dict.fromkeys(_label(each, results) for each in results))
    figure, axes = pyplot().subplots(rows, columns, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    # Of the published numbers that are drawn, so that markers do not come again while there are others.
    marked: dict[str, int] = {}
    for axis, env in zip(axes.flat, envs, strict=False):
        for each in (result for result in results if result.env == env):
            label = _label(each, results)
            handles[label] = _curve(axis, each, "mode" if metric == "best" else metric, labels.index(label))
        reached = max(float(each.result.env_steps[-1]) for each in results if each.env == env)
        for numbers in beside:
            for name, value in numbers.values.items():
                if numbers.env_of(name) == env and 0 < numbers.env_steps <= 1.05 * reached:
                    index = marked.setdefault(f"{numbers.name} (published)", len(marked))
                    handles[f"{numbers.name} (published)"] = _point(axis, numbers, value, index)
        axis.set_title(env, fontsize=10, fontweight="bold")
        axis.set_ylabel(_TOLD[metric])
        over_env_steps(axis)
    for axis in axes.flat[len(envs) :]:
        axis.remove()
    # As many entries of the legend side by side as there is room for, up to three; inches.
    width = max(4.2 * columns, 8.0)
    ncols = min(3, max(1, int(width / (0.5 + 0.065 * max(map(len, handles))))))
    figure.set_size_inches(width, 3.3 * rows + 0.5 + 0.2 * -(-len(handles) // ncols))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(figure, out)
    return True


def _curve(axis, each: Measured, metric: str, index: int):
    x = np.asarray(each.result.env_steps)
    y = each.result.returns[metric]
    known = ~np.isnan(y).any(0)
    mean, low, high = np.array([mean_interval(column) for column in y[:, known].T]).T
    # Past the last colour they come again, with other dashes.
    color, dashes = COLORS[index % len(COLORS)], DASHES[(index + index // len(COLORS)) % len(DASHES)]
    (line,) = axis.plot(x[known], mean, color=color, ls=dashes, marker="o", ms=3, lw=1.8)
    if len(y) > 1:
        axis.fill_between(x[known], low, high, color=color, alpha=0.15, lw=0)
    return line


def _point(axis, numbers: Numbers, value: list[float], index: int):
    low, high = (
        (value[1:] if len(value) == 3 else (value[0] - value[1], value[0] + value[1])) if len(value) > 1 else [value[0]] * 2
    )
    # Neighbours stand a little apart, or one would hide the other.
    x = numbers.env_steps * (1 + 0.012 * (index % 5))
    bars = [[value[0] - low], [high - value[0]]]
    return axis.errorbar([x], [value[0]], bars, fmt=_MARKERS[index % len(_MARKERS)], color="0.25", mfc="white", ms=6, capsize=2)


def _label(each: Measured, results: Sequence[Measured]) -> str:
    same = {other.run for other in results if other.algorithm == each.algorithm}
    return f"{each.algorithm}, ours" if len(same) == 1 else f"{each.algorithm} ({each.run}), ours"
