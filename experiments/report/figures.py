"""The report's figures: each is drawn once and goes into the page and into a file as the same PNG."""

import io
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgjax.experiments.plots import COLORS, DASHES, draw, over_env_steps
from pgjax.experiments.report.study import Entry, Group, Method, Study, number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

MAX_CURVES = 10
# As many are kept where some must be left out: of several algorithms, a few configurations each.
_BEST_CURVES = 6
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DPI = 130
# Width of a figure that shares the page's width with another one, and of one that does not, in inches.
_HALF, _FULL = 5.6, 11.4
_LABEL_WIDTH = 46
# For matplotlib's rc_context, around whatever draws.
STYLE: dict[Any, Any] = {"font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold", "legend.fontsize": 8.5}
# Values of a hyperparameter whose largest is this many times the smallest are shown on a logarithmic axis, if only two.
_LOG_RATIO = 5
# A panel with more configurations than this beside its lines would be a cloud.
_FEW_SERIES = 3


class Figure(NamedTuple):
    """name: of the file, without its ending.  title, caption: for the page.  png: the picture.  wide: the page's width."""

    name: str
    title: str
    caption: str
    png: bytes
    wide: bool = False


class Selection(NamedTuple):
    """Which entries of a group are drawn. rule: how they were chosen, for captions; empty if all are."""

    entries: list[Entry]
    rule: str = ""


def select(study: Study, entries: Sequence[Entry]) -> Selection:
    """All entries, or the best of each algorithm where they are too many for a panel."""
    algorithms = list(dict.fromkeys(method.algorithm for method in study.methods))
    if len(study.methods) <= MAX_CURVES or len(algorithms) == len(study.methods):
        return Selection(list(entries))
    each = max(1, _BEST_CURVES // len(algorithms))
    best = []
    for algorithm in algorithms:
        own = [entry for entry in entries if entry.method.algorithm == algorithm]
        best += sorted(own, key=lambda entry: -entry.iqm)[:each]
    which = "configuration" if each == 1 else f"{each} configurations"
    return Selection(
        best,
        f"Of {len(entries)} methods the best {which} of each algorithm, by final IQM on this environment; "
        "a best of many is optimistic, the more so the more there were to choose from.",
    )


class Styles:
    """Colour, dash and marker of every method, the same in all figures of a report."""

    def __init__(self, study: Study):
        algorithms = list(dict.fromkeys(method.algorithm for method in study.methods))
        crowded = len(study.methods) > MAX_CURVES
        self._by_algorithm = {algorithm: index for index, algorithm in enumerate(algorithms)}
        self._by_method = {} if crowded else {method: index for index, method in enumerate(study.methods)}

    def of(self, method: Method, rank: int = 0) -> dict[str, Any]:
        """Where there are too many methods, colours are of algorithms; ``rank`` tells those of one algorithm apart."""
        index = self._by_method.get(method, self._by_algorithm[method.algorithm])
        dash = index if method in self._by_method else index + rank
        return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[dash % len(DASHES)]}

    def marker(self, method: Method) -> str:
        return _MARKERS[self._by_method.get(method, self._by_algorithm[method.algorithm]) % len(_MARKERS)]


# --- learning curves


def curve_figures(study: Study, styles: Styles) -> list[Figure]:
    """Learning curves of every group, at most ``MAX_CURVES`` in a panel."""
    figures = []
    names = FileNames()
    for group, entries in study.groups.items():
        chosen = select(study, entries)
        parts = [chosen.entries[start : start + MAX_CURVES] for start in range(0, len(chosen.entries), MAX_CURVES)]
        for number, part in enumerate(parts, 1):
            of = f", part {number} of {len(parts)}" if len(parts) > 1 else ""
            caption = (
                f"{_returns_told(group)} against environment steps: interquartile mean over {_seeds(part)}, with its 95 % "
                f"bootstrap interval over seeds as a band.{_space(chosen.rule)}"
            )
            name = names.take(f"curves-{group.title}{f'-{number}' if of else ''}")
            figures.append(Figure(name, group.title + of, caption, _curves(group, part, styles)))
    return figures


def _curves(group: Group, entries: Sequence[Entry], styles: Styles) -> bytes:
    labels = [_wrap(entry.method.label) for entry in entries]
    canvas = _canvas(_HALF, 3.3 + _legend_height(labels))
    axis = canvas.subplots()
    ranks: dict[str, int] = defaultdict(int)
    for entry, label in zip(entries, labels, strict=True):
        algorithm = entry.method.algorithm
        opacity = 0.18 if len(entries) <= 5 else 0.1
        draw(axis, entry.env_steps, entry.returns, label, **styles.of(entry.method, ranks[algorithm]), opacity=opacity)
        ranks[algorithm] += 1
    _title(axis, group)
    axis.set_ylabel("return per episode (IQM over seeds)")
    over_env_steps(axis)
    _legend(canvas, [axis], labels)
    return _png(canvas)


# --- sensitivity


class _Series(NamedTuple):
    """Entries that differ in Hypers only. told: what sets them apart from other series of their algorithm."""

    method: Method
    told: str
    entries: list[Entry]


def sensitivity_figures(study: Study, styles: Styles) -> list[Figure]:
    """Final return against every numeric hyperparameter with more than one value, per group."""
    figures = []
    names = FileNames()
    for group, entries in study.groups.items():
        series = _series(entries)
        for number, start in enumerate(range(0, len(series), MAX_CURVES), 1):
            part = series[start : start + MAX_CURVES]
            fields = list(dict.fromkeys(field for one in part for field in _numeric_fields(one.entries)))
            if not fields:
                continue
            of = f", part {number}" if len(series) > MAX_CURVES else ""
            several = any(len(_numeric_fields(one.entries)) > 1 for one in part)
            rule = (
                " Where other hyperparameters vary too, the line is the best over them at each value, which is optimistic"
                + ("; dots are all configurations." if len(part) <= _FEW_SERIES else ".")
            )
            caption = (
                f"{_returns_told(group)} at the end against each hyperparameter: interquartile mean over "
                f"{_seeds([entry for one in part for entry in one.entries])}, bars its 95 % bootstrap interval over seeds."
                + (rule if several else "")
            )
            name = names.take(f"sensitivity-{group.title}{f'-{number}' if of else ''}")
            figures.append(
                Figure(name, group.title + of, caption, _sensitivity(group, part, fields, styles), wide=len(fields) > 1)
            )
    return figures


def hyper_names(entry: Entry) -> set[str]:
    """Fields of Hypers that some run of the entry was given, as against fields of Setup."""
    return {name for cell in entry.cells for name in cell.config["configs"][0]}


def _series(entries: Sequence[Entry]) -> list[_Series]:
    hypers = {name for entry in entries for name in hyper_names(entry)}
    series: dict[tuple, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.method.repeat == 1:
            rest = tuple((name, text) for name, text in entry.method.settings if name not in hypers)
            series[entry.method.algorithm, rest].append(entry)
    return [
        _Series(own[0].method, " ".join([algorithm, *(f"{name}={text}" for name, text in rest)]), own)
        for (algorithm, rest), own in series.items()
        if _numeric_fields(own)
    ]


def _numeric_fields(entries: Sequence[Entry]) -> list[str]:
    """Hyperparameters that are finite numbers throughout, with more than one value."""
    hypers = {name for entry in entries for name in hyper_names(entry)}
    values: dict[str, list[float | None]] = defaultdict(list)
    for entry in entries:
        for name, text in entry.method.settings:
            if name in hypers:
                values[name].append(number_of(text))
    return [
        name for name, found in values.items() if all(v is not None and np.isfinite(v) for v in found) and len(set(found)) > 1
    ]


def _sensitivity(group: Group, series: Sequence[_Series], fields: Sequence[str], styles: Styles) -> bytes:
    columns = min(3, len(fields))
    rows = -(-len(fields) // columns)
    labels = [_wrap(one.told) for one in series]
    width = _HALF if columns == 1 else _FULL
    canvas = _canvas(width, 3.1 * rows + 0.2 + _legend_height(labels, width))
    axes = canvas.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.ravel()[len(fields) :]:
        axis.set_visible(False)
    for panel, (axis, field) in enumerate(zip(axes.ravel(), fields, strict=False)):
        ticks: set[float] = set()
        for one, label in zip(series, labels, strict=True):
            if field in _numeric_fields(one.entries):
                ticks |= _against(axis, field, one, label, styles, dots=len(series) <= _FEW_SERIES)
        _value_axis(axis, sorted(ticks))
        axis.set_xlabel(field.replace("_", " "))
        if panel % columns == 0:
            axis.set_ylabel("final return (IQM over seeds)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    canvas.suptitle(_wrap(group.title, 60 if columns == 1 else 120), fontsize=10.5, fontweight="bold")
    _legend(canvas, axes.ravel()[: len(fields)], labels, width)
    return _png(canvas)


def _against(axis: "Axes", field: str, one: _Series, label: str, styles: Styles, dots: bool) -> set[float]:
    by_value: dict[float, list[Entry]] = defaultdict(list)
    for entry in one.entries:
        by_value[float(dict(entry.method.settings)[field])].append(entry)
    values = sorted(by_value)
    best = [max(by_value[value], key=lambda entry: entry.iqm) for value in values]
    style = styles.of(one.method)
    middle = [entry.iqm for entry in best]
    errors = [[max(0.0, e.iqm - e.low) for e in best], [max(0.0, e.high - e.iqm) for e in best]]
    axis.errorbar(values, middle, errors, label=label, marker=styles.marker(one.method), ms=4, lw=1.6, capsize=2.5, **style)
    if dots and len(one.entries) > len(values):
        every = [(value, entry.iqm) for value in values for entry in by_value[value]]
        axis.scatter(*zip(*every, strict=True), s=9, color=style["color"], alpha=0.45, lw=0, zorder=1)
    return set(values)


def _value_axis(axis: "Axes", values: Sequence[float]) -> None:
    if is_log_spaced(values):
        axis.set_xscale("log")
        axis.minorticks_off()
    if len(values) <= 6:
        axis.set_xticks(values, [f"{value:g}" for value in values])
        if max(len(f"{value:g}") for value in values) * len(values) > 26:
            axis.tick_params(axis="x", labelrotation=30)


def is_log_spaced(values: Sequence[float]) -> bool:
    """Whether ascending numbers lie more evenly on a logarithmic axis than on a plain one."""
    if len(values) < 2 or values[0] <= 0:
        return False
    if len(values) == 2:
        return values[1] / values[0] >= _LOG_RATIO

    def unevenness(numbers: np.ndarray) -> float:
        steps = np.diff(numbers)
        return float(steps.std() / steps.mean())

    return unevenness(np.log(values)) < unevenness(np.asarray(values, float))


# --- aggregates


def aggregate_figure(
    name: str,
    heading: str,
    measures: Mapping[str, Mapping[str, tuple[float, float, float]]],
    methods: Sequence[Method],
    styles: Styles,
) -> Figure:
    """Every method's aggregates with intervals. measures: title -> label -> (value, low, high); ``heading`` is the caption."""
    labels = [_wrap(method.label, 34) for method in methods]
    lines = sum(label.count("\n") + 1 for label in labels)
    canvas = _canvas(_FULL, 1.15 + 0.3 * lines)
    axes = canvas.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, (title, by_label) in zip(axes, measures.items(), strict=True):
        for row, method in enumerate(methods):
            value, low, high = by_label[method.label]
            style = styles.of(method)
            axis.plot([low, high], [row, row], color=style["color"], lw=6, alpha=0.35, solid_capstyle="butt")
            axis.plot([value], [row], marker=styles.marker(method), color=style["color"], ms=6, ls="none")
        axis.set_title(title)
        axis.set_xlabel("normalised score")
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.08)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(range(len(methods)), labels)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    return Figure(name, "Aggregates over environments", heading, _png(canvas), wide=True)


def profile_figure(
    name: str,
    caption: str,
    thresholds: np.ndarray,
    profiles: dict[Method, tuple[np.ndarray, np.ndarray, np.ndarray]],
    styles: Styles,
) -> Figure:
    """Share of runs above each normalised score. profiles: method -> (share, low, high), each [K]."""
    labels = [_wrap(method.label) for method in profiles]
    canvas = _canvas(_HALF, 3.3 + _legend_height(labels))
    axis = canvas.subplots()
    for (method, (share, low, high)), label in zip(profiles.items(), labels, strict=True):
        style = styles.of(method)
        axis.plot(thresholds, share, label=label, lw=1.8, **style)
        axis.fill_between(thresholds, low, high, color=style["color"], alpha=0.1, lw=0)
    axis.set(xlabel="normalised score τ", ylabel="share of runs with score > τ", ylim=(-0.02, 1.02))
    axis.set_title("performance profiles")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    _legend(canvas, [axis], labels)
    return Figure(name, "Performance profiles", caption, _png(canvas))


def improvement_figure(name: str, caption: str, methods: Sequence[Method], values: np.ndarray) -> Figure:
    """Probability that the row's method beats the column's. values: [M, M]; the diagonal is left blank."""
    labels = [_wrap(method.label, 30) for method in methods]
    size = len(methods)
    canvas = _canvas(_HALF, 2.2 + 0.36 * size)
    axis = canvas.subplots()
    shown = np.ma.masked_invalid(np.where(np.eye(size, dtype=bool), np.nan, values))
    # Orange below one half, purple above: told apart by every kind of colour vision.
    picture = axis.imshow(shown, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
    for row in range(size):
        for column in range(size):
            if row != column:
                value = values[row, column]
                color = "white" if abs(value - 0.5) > 0.32 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(size), labels, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(size), labels)
    axis.tick_params(length=0)
    axis.set(xlabel="compared with", ylabel="method")
    axis.set_title("probability of improvement")
    axis.spines[:].set_visible(False)
    canvas.colorbar(picture, ax=axis, label="P(row > column)", shrink=0.9)
    return Figure(name, "Probability of improvement", caption, _png(canvas))


# --- helpers


class FileNames:
    """Names for files, each given out once, from whatever text."""

    def __init__(self):
        self._taken: set[str] = set()

    def take(self, text: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:80].rstrip("-.") or "figure"
        name, number = plain, 1
        while name.lower() in self._taken:
            number += 1
            name = f"{plain}-{number}"
        self._taken.add(name.lower())
        return name


def _returns_told(group: Group) -> str:
    if group.policy == "training":
        return "Return of the episodes that ended while training"
    episodes = dict(group.conditions).get("evaluation episodes", "the")
    return f"Return of the {group.policy} policy, mean of {episodes} evaluation episodes per seed,"


def _seeds(entries: Sequence[Entry]) -> str:
    counts = sorted({len(entry.seeds) for entry in entries})
    if len(counts) == 1:
        return f"n = {counts[0]} seed{'s' if counts[0] > 1 else ''}{' (one seed has no interval)' if counts == [1] else ''}"
    return f"n = {counts[0]} to {counts[-1]} seeds"


def _space(text: str) -> str:
    return f" {text}" if text else ""


def _canvas(width: float, height: float) -> "Canvas":
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(canvas: "Canvas") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    data = io.BytesIO()
    # Not savefig, which draws everything once more to find its size.
    FigureCanvasAgg(canvas).print_png(data)
    return data.getvalue()


def _title(axis: "Axes", group: Group) -> None:
    axis.set_title(_wrap(group.title, 56))


def _wrap(text: str, width: int = _LABEL_WIDTH) -> str:
    # A dollar sign would begin a formula.
    return "\n".join(textwrap.wrap(_printable(text), width) or [""]).replace("$", r"\$")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    return max(1, min(len(labels), int((width - 0.3) / (0.75 + 0.078 * longest))))


def _legend_height(labels: Sequence[str], width: float = _HALF) -> float:
    lines = sum(label.count("\n") + 1 for label in labels)
    return 0.1 + 0.185 * -(-lines // _legend_columns(labels, width))


def _legend(canvas: "Canvas", axes: Iterable["Axes"], labels: Sequence[str], width: float = _HALF) -> None:
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        canvas.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=_legend_columns(labels, width),
            frameon=False,
            handlelength=2.8,
        )
