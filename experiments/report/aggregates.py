"""Methods over several environments: aggregates, profiles and comparisons of groups that are alike."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from pgjax.errors import RequestError
from pgjax.experiments.reference_scores import normalize, reference_scores
from pgjax.experiments.report.figures import (
    MAX_CURVES,
    Figure,
    FileNames,
    Styles,
    aggregate_figure,
    improvement_figure,
    profile_figure,
)
from pgjax.experiments.report.study import Entry, Group, Method, Study, listed
from pgjax.experiments.report.tables import Column, Table, Value
from pgjax.experiments.statistics import Pair, aggregates, all_pairs, performance_profile

_MEASURES = {"iqm": "IQM", "mean": "mean", "median": "median", "optimality_gap": "optimality gap"}
# Which way is better.
_ARROWS = {"optimality_gap": "↓"}
_THRESHOLDS = 101


@dataclasses.dataclass
class Section:
    """What is said of some groups that are alike. told: the conditions they share; notes: what was left out, and why."""

    told: str
    groups: list[Group]
    figures: list[Figure]
    notes: list[str]


@dataclasses.dataclass
class Aggregated:
    """All sections, and their numbers as tables."""

    sections: list[Section]
    aggregates: Table
    comparisons: Table


def aggregate(study: Study, styles: Styles) -> Aggregated:
    """Aggregates of the methods of a study, apart for groups under unlike conditions."""
    sections: list[Section] = []
    numbers: list[list[Value]] = []
    compared: list[list[Value]] = []
    names = FileNames()
    for told, groups in _alike(study).items():
        sections.append(_section(study, styles, told, groups, names, numbers, compared))
    score = [Column(title, "number") for title in ("value", "low", "high")]
    return Aggregated(
        sections,
        Table(
            "aggregates",
            "Aggregates of normalised scores over runs of all environments, with 95 % stratified bootstrap intervals: "
            "seeds are resampled within each environment, the environments count as given.",
            [Column("conditions", on_page=len(sections) > 1), Column("method"), Column("measure"), *score]
            + [Column(title, "number") for title in ("environments", "runs")],
            numbers,
        ),
        Table(
            "comparisons",
            "Every two methods compared. Difference: mean of first less second, in normalised scores, or in returns where "
            "the environment has no reference scores; its 95 % interval and p-value are of a randomisation test: of sign flips "
            "where both ran on the same seeds (paired), else of permutations. p (Holm) is corrected for the number of pairs in "
            "the same set. P(first > second): probability that a run of the first beats one of the second, with 95 % interval. "
            "Where the best configuration of each algorithm was chosen from many, no p-value knows of the choice.",
            [
                *(Column("over"), Column("first"), Column("second")),
                *(Column(title, "number") for title in ("difference", "low", "high", "p", "p (Holm)")),
                *(Column(title, "number") for title in ("P(first > second)", "P low", "P high")),
                *(Column("test"), Column("in")),
            ],
            compared,
        ),
    )


def _alike(study: Study) -> dict[str, list[Group]]:
    """Groups by those of their conditions that differ between groups of any one environment."""
    odd = list(dict.fromkeys(name for group in study.groups for name, _ in group.differs))
    alike: dict[str, list[Group]] = defaultdict(list)
    for group in study.groups:
        conditions = dict(group.conditions)
        alike[", ".join(f"{name} {conditions[name]}" for name in odd if name in conditions)].append(group)
    return alike


def _section(
    study: Study,
    styles: Styles,
    told: str,
    groups: list[Group],
    names: FileNames,
    numbers: list[list[Value]],
    compared: list[list[Value]],
) -> Section:
    tasks, others = _with_reference(groups)
    notes = []
    if others:
        notes.append(f"No reference scores to normalise with, left out of the aggregates: {listed(g.title for g in others)}.")
    for group in others:
        best = {method: entries[0] for method, entries in _best(study, [group])[0].items()}
        raw = _top({method: entry.final[:, None] for method, entry in best.items()})
        if len(raw) > 1:
            pairs = _pairs(raw, {method: entry.seeds for method, entry in best.items()})
            compared += _rows(group.title, "returns", pairs)
    section = Section(told, tasks, [], notes)
    if not tasks:
        return section
    chosen, rule = _best(study, tasks)
    known = {method for group in tasks for method in (entry.method for entry in study.groups[group])}
    complete = _complete(study, tasks)
    if partial := [method.label for method in study.methods if method in known and method not in complete]:
        notes.append(f"Not on every one of these environments, left out of the aggregates: {listed(partial)}.")
    if not chosen:
        return section
    scores, seeds, cut = _matrices(tasks, chosen)
    if cut:
        notes.append(
            f"Seeds that a method has on some of these environments only are left out of the aggregates: {listed(cut, ', ')}."
        )
    over = f"{len(tasks)} environments" if len(tasks) > 1 else tasks[0].title
    over = f"{over} ({told})" if told and len(tasks) > 1 else over
    runs = sorted({values.size for values in scores.values()})
    n = f"n = {runs[0]} runs" if len(runs) == 1 else f"n = {runs[0]} to {runs[-1]} runs"
    n += f" a method, {len(tasks)} environment{'s' if len(tasks) > 1 else ''}: {listed((g.env for g in tasks), ', ')}."
    unit = (
        "Normalised scores: 0 is the uniformly random policy, 1 the environment's reference, with its default options. "
        f"95 % stratified bootstrap intervals over seeds.{f' {rule}' if rule else ''}"
    )
    table = aggregates({method.label: values for method, values in scores.items()})
    for method, values in scores.items():
        for measure, title in _MEASURES.items():
            numbers.append([told, method.label, title, *table[method.label][measure], len(tasks), values.size])
    shown = {
        f"{title} {_ARROWS.get(measure, '↑')}": {label: row[measure] for label, row in table.items()}
        for measure, title in _MEASURES.items()
    }
    suffix = f"-{told}" if told else ""
    section.figures.append(
        aggregate_figure(
            names.take(f"aggregates{suffix}"),
            f"Over all runs, arrows point to the better side, {n} {unit}",
            shown,
            list(scores),
            styles,
        )
    )
    drawn = _top(scores)
    few = f" The {len(drawn)} methods of the highest IQM out of {len(scores)}." if len(drawn) < len(scores) else ""
    section.figures.append(_profiles(names.take(f"profiles{suffix}"), f"{n} {unit}{few}", drawn, styles))
    if len(drawn) > 1:
        pairs = _pairs(drawn, seeds)
        compared += _rows(over, "normalised scores", pairs)
        caption = (
            "Probability that a run of the row's method earns more than one of the column's in the same environment, mean over "
            f"environments (Mann–Whitney). {n}{f' {rule}' if rule else ''}{few} The 95 % bootstrap intervals "
            "are in the table of comparisons."
        )
        matrix = _matrix(list(drawn), pairs)
        section.figures.append(improvement_figure(names.take(f"improvement{suffix}"), caption, list(drawn), matrix))
    return section


def _with_reference(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    tasks, others = [], []
    for group in groups:
        try:
            reference_scores(group.env)
        except RequestError:
            others.append(group)
        else:
            tasks.append(group)
    return tasks, others


def _complete(study: Study, tasks: Sequence[Group]) -> dict[Method, list[Entry]]:
    """Methods with an entry in every one of the groups, in order."""
    by_method: dict[Method, list[Entry]] = {method: [] for method in study.methods}
    for group in tasks:
        for entry in study.groups[group]:
            by_method[entry.method].append(entry)
    return {method: entries for method, entries in by_method.items() if len(entries) == len(tasks)}


def _best(study: Study, tasks: Sequence[Group]) -> tuple[dict[Method, list[Entry]], str]:
    """All complete methods, or of too many the best configuration of each algorithm; and the rule."""
    complete = _complete(study, tasks)
    algorithms = dict.fromkeys(method.algorithm for method in complete)
    if len(complete) <= MAX_CURVES or len(algorithms) == len(complete):
        return complete, ""

    def worth(method: Method) -> float:
        scores = [entry.iqm for entry in complete[method]]
        if len(tasks) > 1:
            scores = [float(normalize(score, group.env)) for score, group in zip(scores, tasks, strict=True)]
        return float(np.mean(scores))

    best = [max((m for m in complete if m.algorithm == algorithm), key=worth) for algorithm in algorithms]
    rule = (
        f"Of {len(complete)} methods the best configuration of each algorithm, one for all these environments, by the mean of "
        "the final IQMs; a best of many is optimistic."
    )
    return {method: complete[method] for method in best}, rule


def _matrices(
    tasks: Sequence[Group], chosen: dict[Method, list[Entry]]
) -> tuple[dict[Method, np.ndarray], dict[Method, tuple[int, ...]], list[str]]:
    """Normalised scores [S, T] of every method on the seeds that it has on all tasks; which methods lost seeds by that."""
    scores, seeds, cut = {}, {}, []
    for method, entries in chosen.items():
        common = sorted(set.intersection(*(set(entry.seeds) for entry in entries)))
        if common:
            rows = [[entry.seeds.index(seed) for seed in common] for entry in entries]
        else:  # other seeds on every environment: the rows of a matrix then mean nothing across columns
            rows = [list(range(min(len(entry.seeds) for entry in entries)))] * len(entries)
        columns = [normalize(entry.final[row], group.env) for entry, row, group in zip(entries, rows, tasks, strict=True)]
        scores[method] = np.stack(columns, axis=1)
        seeds[method] = tuple(common)
        if len(rows[0]) < max(len(entry.seeds) for entry in entries):
            cut.append(method.label)
    return scores, seeds, cut


def _top(scores: dict[Method, np.ndarray]) -> dict[Method, np.ndarray]:
    """The best of more methods than can be told apart."""
    best = sorted(scores, key=lambda method: -float(np.mean(scores[method])))[:MAX_CURVES]
    return {method: values for method, values in scores.items() if method in best}


def _profiles(name: str, caption: str, scores: dict[Method, np.ndarray], styles: Styles) -> Figure:
    every = np.concatenate([values.ravel() for values in scores.values()])
    low, high = min(0.0, float(every.min())), max(1.0, float(every.max()))
    # One run far off must not press all others into a line.
    low, high = max(low, float(np.quantile(every, 0.02)) - 1), min(high, float(np.quantile(every, 0.98)) + 1)
    thresholds = np.linspace(low - 0.02 * (high - low), high, _THRESHOLDS)
    profiles = {method: performance_profile(values, thresholds) for method, values in scores.items()}
    text = f"Share of runs whose score is above τ, the higher the better. {caption}"
    return profile_figure(name, text, thresholds, profiles, styles)


def _pairs(scores: dict[Method, np.ndarray], seeds: dict[Method, tuple[int, ...]]) -> list[Pair]:
    sets = {seeds[method] for method in scores}
    paired = len(sets) == 1 and sets != {()}
    return all_pairs({method.label: values for method, values in scores.items()}, paired)


def _rows(over: str, unit: str, pairs: Sequence[Pair]) -> list[list[Value]]:
    rows: list[list[Value]] = []
    for pair in pairs:
        test = "permutation" if pair.comparison.num_pairs is None else f"sign flips of {pair.comparison.num_pairs} pairs"
        rows.append(
            [
                *(over, pair.first, pair.second),
                *(*pair.comparison.difference, pair.comparison.p_value, pair.p_adjusted),
                *(*pair.probability, test, unit),
            ]
        )
    return rows


def _matrix(methods: Sequence[Method], pairs: Sequence[Pair]) -> np.ndarray:
    index = {method.label: number for number, method in enumerate(methods)}
    values = np.full((len(methods), len(methods)), np.nan)
    for pair in pairs:
        values[index[pair.first], index[pair.second]] = pair.probability.value
        values[index[pair.second], index[pair.first]] = 1 - pair.probability.value
    return values
