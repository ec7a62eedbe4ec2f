"""What belongs together and what does not: methods, groups of like conditions, and warnings."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgjax.errors import RequestError
from pgjax.experiments.report.reading import Unreadable
from pgjax.experiments.results import Result
from pgjax.experiments.statistics import RESAMPLES, iqm
from pgjax.host.runner import DEFAULT_EPISODES, OTHER_EPISODES

# Which returns a result is judged by: the first of these that it has.
POLICIES = ("mode", "sample", "training")
# The libraries whose version decides what an environment is, by the part of its name before the slash.
_LIBRARIES = {
    "gymnax": ("gymnax",),
    "brax": ("brax",),
    "mujoco": ("mujoco", "gymnasium"),
    "playground": ("playground", "mujoco-mjx"),
}
# Numbers that the bootstrap may hold at once.
_BOOTSTRAP_NUMBERS = 1_000_000
# Items of a list that a warning names.
_NAMED = 8


class Method(NamedTuple):
    """An algorithm with the settings in which its results on one environment differ from one another.

    settings: ``((field, text), ...)``.
    """

    algorithm: str
    settings: tuple[tuple[str, str], ...] = ()
    repeat: int = 1

    @property
    def label(self) -> str:
        told = " ".join([self.algorithm, *(f"{name}={text}" for name, text in self.settings)])
        return told if self.repeat == 1 else f"{told} (run {self.repeat})"


@dataclasses.dataclass(frozen=True)
class Group:
    """Results that may stand side by side: one environment under one set of conditions.

    conditions: all of them, name and value.  differs: those in which it differs from other groups of this environment.
    """

    env: str
    conditions: tuple[tuple[str, str], ...]
    differs: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.env} ({self.told})" if self.differs else self.env

    @property
    def told(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.differs)

    @property
    def policy(self) -> str:
        return dict(self.conditions)["policy"]


@dataclasses.dataclass
class Entry:
    """A method in a group, over all its seeds.

    cells: the results behind it, several where seeds were run apart.  seeds [S], env_steps [E], returns [S, E].
    final: [S], at the last evaluation; seeds without a return there are in none of these.
    iqm, low, high: interquartile mean of ``final`` over seeds, 95 % bootstrap interval.  mean, std (n - 1), min, max: of it.
    """

    group: Group
    method: Method
    cells: list[Result]
    seeds: tuple[int, ...]
    env_steps: np.ndarray
    returns: np.ndarray
    iqm: float = np.nan
    low: float = np.nan
    high: float = np.nan
    mean: float = np.nan
    std: float = np.nan
    min: float = np.nan
    max: float = np.nan

    @property
    def final(self) -> np.ndarray:
        return self.returns[:, -1]

    @property
    def frozen(self) -> list[int]:
        return sorted(seed for cell in self.cells for seed in cell.frozen)


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything a report shows, in order.

    groups: with their entries, in the order of ``methods``; by the mode policy where there is one.
    sampled: likewise of the sampled policy, for results that have both.
    labels: the method of each result.
    tuned: (algorithm, field) -> environment -> value, of settings with one value on each environment but not on all.
    """

    results: Sequence[Result]
    unreadable: Sequence[Unreadable]
    methods: list[Method]
    labels: list[Method]
    groups: dict[Group, list[Entry]]
    sampled: dict[Group, list[Entry]]
    tuned: dict[tuple[str, str], dict[str, str]]
    warnings: list[str]

    @property
    def entries(self) -> list[Entry]:
        return [entry for entries in self.groups.values() for entry in entries]


def make_study(results: Sequence[Result], unreadable: Sequence[Unreadable] = ()) -> Study:
    """Sorts results into methods and groups, and collects what a reader has to be warned of."""
    names = _Names(results)
    labels = [names.method(result) for result in results]
    notes: list[str] = []
    groups = _gather(results, labels, lambda result: next((p for p in POLICIES if p in result.returns), None), notes)
    sampled = _gather(results, labels, lambda result: "sample" if {"mode", "sample"} <= set(result.returns) else None, [])
    order = {method: index for index, method in enumerate(sorted(set(labels), key=names.rank))}
    for entries in [*groups.values(), *sampled.values()]:
        entries.sort(key=lambda entry: (order[entry.method._replace(repeat=1)], entry.method.repeat))
    _add_intervals([entry for part in (groups, sampled) for entries in part.values() for entry in entries])
    methods = sorted(
        {entry.method for entries in groups.values() for entry in entries},
        key=lambda method: (order[method._replace(repeat=1)], method.repeat),
    )
    warnings = [
        *_unlike(groups),
        *notes,
        *names.notes(),
        *_unfinished(results, unreadable),
        *_frozen(results, labels),
        *_uneven(groups, methods),
        *_machines(results),
    ]
    return Study(results, unreadable, methods, labels, groups, sampled, names.tuned, warnings)


def is_complete(result: Result) -> bool:
    """Whether its numbers are those of the whole budget. A run that failed because a seed froze went to its end."""
    if not result.env_steps.size or not result.seeds:
        return False
    return result.status == "finished" or bool(result.env_steps[-1] >= result.config["total_env_steps"])


def text_of(value: Any) -> str:
    """A setting's value: the shortest text that is exactly it, the same for 1 and 1.0."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, (int, float)):
        return short if float(short := f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return ",".join(map(text_of, value)) or "none"
    return str(value)


def number_of(text: str) -> float | None:
    """The number that ``text_of`` wrote, None if it was none."""
    try:
        return float(text)
    except ValueError:
        return None


def listed(items: Iterable[str], separator: str = "; ") -> str:
    """The first few of many items."""
    items = list(dict.fromkeys(items))
    more = f"{separator}and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return separator.join(items[:_NAMED]) + more


# --- methods


class _Names:
    """Names methods by the fields in which results of one algorithm on one environment differ."""

    def __init__(self, results: Sequence[Result]):
        self._defaults: dict[str, dict[str, str]] = {}
        self._algorithms = list(dict.fromkeys(result.config["algorithm"] for result in results))
        fields: dict[str, dict[str, None]] = defaultdict(dict)
        for result in results:
            fields[result.config["algorithm"]].update(dict.fromkeys(_given(result)))
        values: dict[tuple[str, str], dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        for result in results:
            algorithm, given = result.config["algorithm"], _given(result)
            for field in fields[algorithm]:
                values[algorithm, field][result.config["env"]][self._text(algorithm, field, given)] = None
        self._varied: dict[str, list[str]] = {
            algorithm: [field for field in fields[algorithm] if max(map(len, values[algorithm, field].values())) > 1]
            for algorithm in self._algorithms
        }
        # Tuned per environment: one value on each, but not the same on all. (algorithm, field) -> environment -> text.
        self.tuned = {
            (algorithm, field): {env: next(iter(texts)) for env, texts in by_env.items()}
            for (algorithm, field), by_env in values.items()
            if field not in self._varied[algorithm] and len({text for texts in by_env.values() for text in texts}) > 1
        }

    def method(self, result: Result) -> Method:
        algorithm, given = result.config["algorithm"], _given(result)
        return Method(algorithm, tuple((field, self._text(algorithm, field, given)) for field in self._varied[algorithm]))

    def rank(self, method: Method) -> tuple:
        """Algorithms as they come, then settings by size."""
        numbers = [(number_of(text), text) for _, text in method.settings]
        return self._algorithms.index(method.algorithm), [
            (0, number, "") if number is not None else (1, 0.0, text) for number, text in numbers
        ]

    def notes(self) -> list[str]:
        if not self.tuned:
            return []
        which = listed(dict.fromkeys(algorithm for algorithm, _ in self.tuned), ", ")
        return [
            "Settings that differ between environments under one name, as presets have it: "
            f"{listed(dict.fromkeys(field for _, field in self.tuned), ', ')} (of {which}); all are in the table of settings"
        ]

    def _text(self, algorithm: str, field: str, given: dict[str, Any]) -> str:
        if field in given:
            return text_of(given[field])
        if algorithm not in self._defaults:
            self._defaults[algorithm] = _defaults(algorithm)
        return self._defaults[algorithm].get(field, "default")


def _given(result: Result) -> dict[str, Any]:
    """The fields that make a method, as far as they are not at their defaults."""
    config = result.config
    others = {name: config[name] for name in ("objective", "rule", "init_policy") if config.get(name) is not None}
    return {**config["setup"], **config["configs"][0], **others}


def _defaults(algorithm: str) -> dict[str, str]:
    from pgjax import algorithms

    try:
        module = algorithms.get(algorithm)
    except RequestError:  # somebody's own, or of another version
        return {}
    return {
        field.name: text_of(getattr(made, field.name))
        for made in (module.Setup(), module.Hypers())
        for field in dataclasses.fields(made)
    }


# --- groups


def _conditions(result: Result, policy: str) -> dict[str, str]:
    """All that has to be the same for two results on an environment of one name to stand side by side."""
    config, provenance = result.config, result.provenance
    library = config["env"].partition("/")[0]
    options = dict(config["env_options"])
    backend, reset_mode = options.pop("backend", None), options.pop("reset_mode", None)
    if library == "mujoco":
        options.setdefault("physics", "c")
    libraries = list(_LIBRARIES.get(library, ()))
    if "mjx" in (backend, options.get("physics")) or options.get("physics") == "warp":
        libraries.append("mujoco-mjx")
    episodes = config.get("eval_episodes") or DEFAULT_EPISODES.get(library, OTHER_EPISODES)
    versions = provenance.get("libraries", {})
    return {
        **{name: text_of(versions.get(name, "of unknown version")) for name in libraries},
        "backend": text_of(provenance.get("env_backend") or backend or "default"),
        **{name: text_of(value) for name, value in options.items()},
        "reset mode": text_of(provenance.get("reset_mode") or reset_mode or "default"),
        **{f"parameter {name}": text_of(value) for name, value in config["env_params"].items()},
        "precision": text_of(config.get("precision") or provenance.get("precision") or "default"),
        **({"x64": "on"} if provenance.get("x64") else {}),
        "env steps": f"{config['total_env_steps']:,}",
        "policy": policy,
        # Those of a return while training are as many as ended.
        **({"evaluation episodes": text_of(episodes)} if policy != "training" else {}),
    }


def _gather(
    results: Sequence[Result], labels: Sequence[Method], choose: Callable[[Result], str | None], notes: list[str]
) -> dict[Group, list[Entry]]:
    """Entries by group. Seeds of one method that were run apart are put together, repetitions stand on their own."""
    found: dict[tuple[str, tuple], dict[Method, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result, method in zip(results, labels, strict=True):
        policy = choose(result)
        if policy is not None and is_complete(result):
            key = result.config["env"], tuple(_conditions(result, policy).items())
            found[key][method].append(result)
    groups: dict[Group, list[Entry]] = {}
    for (env, conditions), differs in _tell_apart(list(found)).items():
        group = Group(env, conditions, differs)
        groups[group] = []
        for method, cells in found[env, conditions].items():
            groups[group] += _entries(group, method, cells, notes)
    return {group: entries for group, entries in groups.items() if entries}


def _tell_apart(keys: Sequence[tuple[str, tuple]]) -> dict[tuple[str, tuple], tuple]:
    """By group its conditions that are not the same in all groups of its environment; environments in order."""
    by_env: dict[str, list[tuple]] = defaultdict(list)
    for env, conditions in keys:
        by_env[env].append(conditions)
    told = {}
    for env, kinds in by_env.items():
        names = dict.fromkeys(name for conditions in kinds for name, _ in conditions)
        values = {name: [dict(conditions).get(name, "default") for conditions in kinds] for name in names}
        odd = [name for name in names if len(set(values[name])) > 1]
        for index, conditions in enumerate(kinds):
            told[env, conditions] = tuple((name, values[name][index]) for name in odd)
    return told


def _entries(group: Group, method: Method, cells: Sequence[Result], notes: list[str]) -> list[Entry]:
    entries: list[Entry] = []
    for cell in cells:
        returns = cell.returns[group.policy]
        has = np.isfinite(returns[:, -1])
        if not has.any():
            continue
        seeds = tuple(seed for seed, known in zip(cell.seeds, has, strict=True) if known)
        for entry in entries:
            # A seed twice is the same experiment twice, not more of it.
            if not set(entry.seeds) & set(seeds) and np.array_equal(entry.env_steps, cell.env_steps):
                entry.cells.append(cell)
                entry.seeds += seeds
                entry.returns = np.concatenate([entry.returns, returns[has]])
                break
        else:
            repeated = method._replace(repeat=len(entries) + 1)
            entries.append(Entry(group, repeated, [cell], seeds, cell.env_steps, returns[has]))
    for entry in entries:
        order = np.argsort(entry.seeds)
        entry.seeds, entry.returns = tuple(np.asarray(entry.seeds)[order].tolist()), entry.returns[order]
        if len(entry.cells) > 1:
            notes.append(f"{group.title}: {entry.method.label} puts together the seeds of {len(entry.cells)} runs")
    if len(entries) > 1:
        where = listed((entry.cells[0].path for entry in entries), ", ")
        notes.append(
            f"{group.title}: {method.label} is there {len(entries)} times with the same seeds ({where}); "
            f"each stands on its own, the others as “{entries[1].method.label}” and so on"
        )
    return entries


def _add_intervals(entries: Sequence[Entry]) -> None:
    """Fills in the statistics of the final returns, many entries at a time."""
    by_seeds: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_seeds[len(entry.seeds)].append(entry)
    for num_seeds, alike in by_seeds.items():
        at_once = max(1, _BOOTSTRAP_NUMBERS // (RESAMPLES * num_seeds))
        for start in range(0, len(alike), at_once):
            part = alike[start : start + at_once]
            finals = np.stack([entry.final for entry in part], axis=1)
            spread = finals.std(0, ddof=1) if num_seeds > 1 else np.full(len(part), np.nan)
            columns = iqm(finals), *iqm_intervals(finals), finals.mean(0), spread, finals.min(0), finals.max(0)
            for entry, *numbers in zip(part, *(column.tolist() for column in columns), strict=True):
                entry.iqm, entry.low, entry.high, entry.mean, entry.std, entry.min, entry.max = numbers


def iqm_intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``statistics.iqm_interval`` of many columns, the same numbers some times sooner: only the values are sorted.

    How often a resample holds each value is the same for all columns, and says, with the values in order, how many of each
    are in the middle half.
    Args: values [S, N].  Returns: low, high, [N] each.
    """
    num_seeds, cut = len(values), len(values) // 4
    picks = np.random.default_rng(0).integers(num_seeds, size=(RESAMPLES, num_seeds))
    counts = (picks[..., None] == np.arange(num_seeds)).sum(1, dtype=np.int16)
    order = np.argsort(values, axis=0)
    up_to = np.cumsum(counts[:, order], axis=1, dtype=np.int16).clip(cut, num_seeds - cut)
    weights = np.diff(up_to, axis=1, prepend=np.int16(cut))
    resampled = np.einsum("rsn,sn->rn", weights, np.take_along_axis(values, order, axis=0)) / (num_seeds - 2 * cut)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return low, high


# --- warnings


def _unlike(groups: Collection[Group]) -> list[str]:
    by_env: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_env[group.env].append(group)
    return [
        f"{env} comes in {len(alike)} unlike groups, which are kept apart: {listed(group.told for group in alike)}"
        for env, alike in by_env.items()
        if len(alike) > 1
    ] + (
        ["The groups with policy “training” have no evaluations: their returns are of episodes that ended while training"]
        if any(group.policy == "training" for group in groups)
        else []
    )


def _unfinished(results: Sequence[Result], unreadable: Sequence[Unreadable]) -> list[str]:
    told = []
    without = [result for result in results if not is_complete(result)]
    if without:
        by_status: dict[str, int] = defaultdict(int)
        for result in without:
            by_status[result.status] += 1
        counts = ", ".join(f"{count} {status}" for status, count in by_status.items())
        told.append(f"{count_of(without, 'cell')} without a result at the end of the budget, in no figure: {counts}")
    silent = [result for result in results if is_complete(result) and not result.returns]
    if silent:
        told.append(f"{count_of(silent, 'finished cell')} without any return: {listed(result.path for result in silent)}")
    if unreadable:
        told.append(f"{count_of(unreadable, 'run')} that cannot be read: {listed(run.path for run in unreadable)}")
    return told


def _frozen(results: Sequence[Result], labels: Sequence[Method]) -> list[str]:
    cells = [
        f"{method.label} on {result.config['env']} (seed{'s' if len(result.frozen) > 1 else ''} "
        f"{', '.join(map(str, result.frozen))})"
        for result, method in zip(results, labels, strict=True)
        if result.frozen
    ]
    number = sum(len(result.frozen) for result in results)
    return [f"{number} seed{'s' if number > 1 else ''} went non-finite, left out of every number: {listed(cells)}"] * bool(
        cells
    )


def _uneven(groups: dict[Group, list[Entry]], methods: Sequence[Method]) -> list[str]:
    told = []
    for group, entries in groups.items():
        counts = {entry.method.label: len(entry.seeds) for entry in entries}
        if len(set(counts.values())) > 1:
            usual = max(set(counts.values()), key=list(counts.values()).count)
            odd = [f"{label} {count}" for label, count in counts.items() if count != usual]
            told.append(f"{group.title}: unequal numbers of seeds, {usual} but for {listed(odd, ', ')}")
        ends = {int(entry.env_steps[-1]) for entry in entries}
        if len(ends) > 1:
            told.append(f"{group.title}: budgets were rounded up to between {min(ends):,} and {max(ends):,} env steps")
        episodes = {
            text_of(found) for entry in entries for cell in entry.cells if (found := cell.provenance.get("eval_episodes"))
        }
        if len(episodes) > 1:
            told.append(
                f"{group.title}: evaluations that took too long were cut down, so they are of {listed(sorted(episodes), ', ')} "
                "episodes; fewer are noisier, not biased"
            )
    wanted = [method for method in methods if method.repeat == 1]
    missing = []
    for group, entries in groups.items():
        there = {entry.method for entry in entries}
        missing += [f"{method.label} on {group.title}" for method in wanted if method not in there]
    if missing:
        told.append(f"{len(missing)} missing of {len(groups) * len(wanted)} pairs of method and group: {listed(missing)}")
    return told


def _machines(results: Sequence[Result]) -> list[str]:
    """Differences that should not change results by much, and so do not part groups."""
    looked_at: dict[str, Callable[[dict[str, Any]], Any]] = {
        "versions of pgjax": lambda p: p.get("pgjax"),
        "git commits": lambda p: _short(p.get("git_commit")),
        "versions of JAX": lambda p: p.get("libraries", {}).get("jax"),
        "kinds of device": lambda p: p.get("device_kind"),
    }
    told = []
    for what, look in looked_at.items():
        found = dict.fromkeys(text_of(value) for result in results if (value := look(result.provenance)) is not None)
        if len(found) > 1:
            told.append(f"The results come from {len(found)} {what}: {listed(found, ', ')}")
    return told


def _short(commit: Any) -> str | None:
    """A commit's first letters, with what follows its hash."""
    return None if commit is None else re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", str(commit))


def count_of(items: Collection, noun: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{len(items):,} {noun}{'' if len(items) == 1 else 's'}"
