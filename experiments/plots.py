"""Pictures of runs: learning curves with intervals over seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

import pgjax
from pgjax.errors import RequestError
from pgjax.experiments.statistics import iqm, iqm_interval
from pgjax.metrics import reduction

# Colour-blind safe (Okabe and Ito 2008), dark enough on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def plot_runs(paths: Sequence[Path], out: Path | None = None, metrics: Sequence[str] = ()) -> Path:
    """Draws the evaluation of several runs against environment steps, one panel per environment, metrics below.

    Lines are the interquartile mean over seeds, bands its 95 % bootstrap interval; without evaluations the training
    return takes their place. Frozen lanes are left out.

    Args: paths: run folders.  out: file to write, by default ``curves.png`` in the first folder.  metrics: columns.
    Returns: the file.
    Raises: RequestError if there is nothing to draw, for an unknown column, or a file type that cannot be written.
    """
    if not paths:
        raise RequestError("no run was named; give the folders of one or more runs")
    runs = [pgjax.load(path) for path in paths]
    for run in runs:
        if run.metrics.empty:
            raise RequestError(f"{run.path} has no rows yet; let it reach its first checkpoint")
        unknown = [name for name in metrics if name not in run.metrics]
        if unknown:
            columns = ", ".join(sorted(set(run.metrics) - {"config", "seed", "iteration"}))
            raise RequestError(f"--metrics {unknown[0]} is not a column of {run.path}; it has {columns}")
    out = Path(out) if out else Path(paths[0]) / "curves.png"
    if out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise RequestError(f"--out {out} must end in .png, .pdf or .svg")

    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    envs = list(dict.fromkeys(run.config["env"] for run in runs))
    rows = 1 + len(metrics)
    figure, axes = plt.subplots(
        rows, len(envs), figsize=(5.5 * len(envs), 3.6 * rows), squeeze=False, layout="constrained", dpi=120
    )
    for column, env in enumerate(envs):
        axes[0][column].set_title(env)
        curves = [curve for run in runs if run.config["env"] == env for curve in _curves(run)]
        for index, (label, lanes, episodes) in enumerate(curves):
            color = _COLORS[index % len(_COLORS)]
            _draw(axes[0][column], *_returns(lanes, episodes), label, color)
            for row, name in enumerate(metrics, 1):
                _draw(axes[row][column], *_by_seed(lanes, "env_steps", name), label, color)
        axes[0][column].set_ylabel("return")
        for row, name in enumerate(metrics, 1):
            axes[row][column].set_ylabel(name.replace("_", " "))
        axes[0][column].legend(frameon=False, fontsize=8)
        for axis in axes[:, column]:
            axis.set_xlabel("environment steps")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    try:
        figure.savefig(out)
    except OSError as error:
        raise RequestError(f"--out {out} cannot be written: {error.strerror}") from error
    plt.close(figure)
    return out


def _curves(run) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """``(label, rows, episodes)`` of every configuration of a run, without its frozen lanes."""
    frozen = run.metrics.groupby(["config", "seed"])["nonfinite"].max()
    kept = frozen[frozen == 0].index
    curves = []
    for config, hypers in enumerate(run.config["configs"]):
        seeds = [seed for c, seed in kept if c == config]
        if not seeds:
            continue
        rows = run.metrics[(run.metrics.config == config) & run.metrics.seed.isin(seeds)]
        episodes = run.evaluations[(run.evaluations.config == config) & run.evaluations.seed.isin(seeds)]
        told = ", ".join(f"{name}={value:g}" for name, value in hypers.items()) if len(run.config["configs"]) > 1 else ""
        label = f"{run.config['algorithm']}{' ' + told if told else ''}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        curves.append((label, rows, episodes))
    return curves


def _returns(rows: pd.DataFrame, episodes: pd.DataFrame):
    mode = cast(pd.DataFrame, episodes[episodes.policy == "mode"])
    if mode.empty:
        return _by_seed(rows, "env_steps", "episode_return")
    return _by_seed(mode, "env_steps", "return")


def _by_seed(frame: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """``x [P]`` and ``y [S, P]``, one row per seed; gaps (no episode ended) are filled with the seed's last value."""
    table = frame.pivot_table(index="seed", columns=x, values=y, aggfunc="mean", dropna=False)
    if reduction(y) == "episodes":
        table = table.ffill(axis=1)
    return table.columns.to_numpy(), table.to_numpy()


def _draw(axis, x, y, label, color):
    known = ~np.isnan(y).any(0)
    x, y = x[known], y[:, known]
    if not x.size:
        return
    axis.plot(x, iqm(y), color=color, label=label, lw=1.8, marker="o" if len(x) < 15 else None, ms=3)
    if len(y) > 1:
        low, high = iqm_interval(y)
        axis.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
