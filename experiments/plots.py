"""Pictures of runs: learning curves with intervals over seeds."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

import pgjax
from pgjax.errors import RequestError
from pgjax.experiments.statistics import iqm, iqm_interval
from pgjax.host.store import LoadedRun
from pgjax.metrics import reduction

# Colour-blind safe (Okabe and Ito 2008, then Tol's muted scheme), dark enough on white.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"),
    *("#882255", "#999933", "#332288", "#888888", "#AA4466"),
)
# Neighbours in the order of curves differ in their dashes too.
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.2, 1.2, 1.2)))
# Opacity of bands; many over one another hide the lines.
_CLEAR, _FAINT, _FEW = 0.18, 0.1, 5
# Points of a curve of a noisy column: each is the mean over its part of the run.
_SMOOTH_POINTS = 40
# An update that moves nothing must not stretch the logarithmic axis over decades that hold nothing else.
_LEAST_KL = 1e-8


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

    plt = pyplot()
    envs = list(dict.fromkeys(run.config["env"] for run in runs))
    rows = 1 + len(metrics)
    figure, axes = plt.subplots(
        rows, len(envs), figsize=(5.5 * len(envs), 3.6 * rows), squeeze=False, layout="constrained", dpi=120
    )
    crowded = False
    for column, env in enumerate(envs):
        axes[0][column].set_title(env)
        curves = [curve for run in runs if run.config["env"] == env for curve in _curves(run)]
        crowded = len(curves) > _FEW
        for index, (label, lanes, episodes) in enumerate(curves):
            style: dict[str, Any] = {"label": label, "color": COLORS[index % len(COLORS)]}
            if crowded:
                style.update(linestyle=DASHES[index % len(DASHES)], opacity=_FAINT)
            draw(axes[0][column], *_returns(lanes, episodes), **style)
            for row, name in enumerate(metrics, 1):
                draw(axes[row][column], *_by_seed(lanes, "env_steps", name), **style)
        axes[0][column].set_ylabel("return")
        for row, name in enumerate(metrics, 1):
            axes[row][column].set_ylabel(name.replace("_", " "))
            if name.startswith("kl"):
                axes[row][column].set_yscale("log")
        if not crowded:
            axes[0][column].legend(frameon=False, fontsize=8)
        for axis in axes[:, column]:
            over_env_steps(axis)
    if crowded:
        _legend_below(figure, axes[0][-1])
    save(figure, out)
    return out


def plot_comparison(
    runs: Sequence[LoadedRun], microseconds: Sequence[float], title: str, out: Path, names: Sequence[str] = ()
) -> Path:
    """Draws what several algorithms earned on one environment, how far each update moved them, and how long they took.

    Args:
      runs: one an algorithm, with one configuration each.  microseconds: of training per environment step, one a run.
      title: of the figure.  out: file to write.  names: of the runs, those of their algorithms if not given.
    Returns: the file.
    Raises: RequestError if it cannot be written.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.2), width_ratios=(1.45, 1.2, 0.85), layout="constrained", dpi=130)
    returns, divergence, clock = axes
    names = names or [run.config["algorithm"] for run in runs]
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        style: dict[str, Any] = {
            "label": name,
            "color": COLORS[index % len(COLORS)],
            "linestyle": DASHES[index % len(DASHES)],
            "opacity": _CLEAR if len(runs) <= _FEW else _FAINT,
        }
        for _, rows, episodes in _curves(run):
            draw(returns, *_returns(rows, episodes), **style)
            if "kl" not in rows:  # of a method that learns step by step
                continue
            env_steps, kl = _in_parts(*_by_seed(rows, "env_steps", "kl"))
            draw(divergence, env_steps, np.maximum(kl, _LEAST_KL), **style)
    returns.set(title="evaluation of the mode policy", ylabel="return (IQM over seeds, 95 % interval)")
    divergence.set(title="how far an update moves the policy", ylabel="KL(old || new) per update, nats")
    divergence.set_yscale("log")
    for axis in (returns, divergence):
        over_env_steps(axis)
    _legend_below(figure, returns)
    figure.suptitle(title)
    _draw_bars(clock, names, microseconds)
    save(figure, out)
    return out


def _draw_bars(axis, names: Sequence[str], microseconds: Sequence[float]) -> None:
    bars = axis.barh(names, microseconds, color=[COLORS[index % len(COLORS)] for index in range(len(names))])
    axis.bar_label(bars, fmt="%#.3g", padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set(title="training time", xlabel="microseconds per environment step")
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def finite_seeds(run: LoadedRun, config: int = 0) -> list[int]:
    """Seeds of a configuration whose updates all stayed finite, ascending: those that enter statistics."""
    rows = cast(pd.DataFrame, run.metrics[run.metrics.config == config])
    frozen = rows.groupby("seed")["nonfinite"].max().to_dict()
    return sorted(seed for seed, is_frozen in frozen.items() if not is_frozen)


def pyplot():
    """matplotlib's pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def _legend_below(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    # Panels may differ in their number of seeds.
    labels = [re.sub(r", \d+ seeds?$", "", label) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, handlelength=2.6)


def over_env_steps(axis) -> None:
    """Names and dresses the axis along which environment steps grow."""
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel("environment steps")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def save(figure, out: Path) -> None:
    """Writes the figure and lets go of it."""
    try:
        figure.savefig(out)
    except OSError as error:
        raise RequestError(f"--out {out} cannot be written: {error.strerror}") from error
    pyplot().close(figure)


def _curves(run: LoadedRun) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """``(label, rows, episodes)`` of every configuration of a run, without its frozen lanes."""
    curves = []
    for config, hypers in enumerate(run.config["configs"]):
        seeds = finite_seeds(run, config)
        if not seeds:
            continue
        rows = cast(pd.DataFrame, run.metrics[(run.metrics.config == config) & run.metrics.seed.isin(seeds)])
        of_lanes = (run.evaluations.config == config) & run.evaluations.seed.isin(seeds)
        episodes = cast(pd.DataFrame, run.evaluations[of_lanes])
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


def _in_parts(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``x [P]`` and ``y [S, P]`` cut into at most ``_SMOOTH_POINTS`` parts: the last x and the mean of y in each."""
    parts = np.array_split(np.arange(len(x)), min(len(x), _SMOOTH_POINTS))
    return x[[part[-1] for part in parts]], np.stack([y[:, part].mean(1) for part in parts], axis=1)


def draw(axis, x, y, label, color, linestyle: Any = "-", opacity=_CLEAR):
    """One curve: the interquartile mean over the seeds of ``y [S, P]`` at ``x [P]``, and its 95 % bootstrap interval."""
    known = ~np.isnan(y).any(0)
    x, y = x[known], y[:, known]
    if not x.size:
        return
    marker = "o" if len(x) < 15 else None
    axis.plot(x, iqm(y), color=color, label=label, lw=1.8, ls=linestyle, marker=marker, ms=3)
    if len(y) > 1:
        low, high = iqm_interval(y)
        axis.fill_between(x, low, high, color=color, alpha=opacity, lw=0)
