"""A paper's file: what it published, and which runs of ours stand beside it.

title = "Trust Region Policy Optimization"
source = "Schulman et al. 2015, arXiv 1502.05477"
shown = "training"                   # which return the figure shows; without it the numbers' most frequent metric

[scale.cpu]                          # fields of a sweep file, for all runs; [scale.cpu.run.NAME] for one of them
total_env_steps = 1_000_000
seeds = 5

[run.trpo]                           # a sweep file without [grid], [random] and [search]
algorithms = ["trpo"]
envs = ["mujoco/Hopper-v5"]

[[numbers]]                          # a published table, or a column of it: one method under one protocol
name = "baselines"
run = "trpo"
algorithm = "trpo"
source = "openai/baselines, benchmarks_mujoco1M.htm"
mark = "verified"
env_steps = 1_000_000
seeds = 6
spread = "none"                      # what the second number of a value is
metric = "training"                  # which return of ours stands beside it
ours = "mujoco/{task}-v5"            # our environment; {task} is the published name up to its version
[numbers.values]
"Hopper-v2" = [1912.9]               # [value], [value, spread] or [value, low, high]

[[claims]]                           # what is said in words or with a figure alone
text = "..."
tests = [{ left = "spo", right = "ppo", metric = "ratio_deviation:max", expect = "less" }]

[[followups]]                        # what was tried where ours is not inside
numbers = "baselines"
text = "..."
"""

import dataclasses
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pgjax.errors import RequestError, close_names
from pgjax.experiments.sweeps.sweep_file import Sweep, specs_of
from pgjax.host.runner import RunSpec

PUBLISHED = Path(__file__).resolve().parent.parent / "published"
SCALES = ("smoke", "cpu", "full")


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Published numbers of one method under one protocol.

    run: the run of ours in these settings, that stands beside them; empty if there is none.
    statistic: over seeds, ``mean`` or ``iqm``; ours is the same.
    values: by published environment ``[value]``, ``[value, spread]`` or ``[value, low, high]``. The rest as in the file.
    """

    name: str
    source: str
    mark: str
    spread: str
    metric: str
    values: dict[str, list[float]]
    algorithm: str = ""
    variant: str = ""
    mark_note: str = ""
    env_steps: int = 0
    seeds: int = 0
    measured: str = ""
    ours: str = ""
    not_comparable: str = ""
    remark: str = ""
    run: str = ""
    statistic: str = "mean"

    def __post_init__(self):
        if self.statistic not in ("mean", "iqm"):
            raise RequestError(f"{self.name}: statistic = {self.statistic!r} must be mean or iqm")

    def env_of(self, published: str) -> str:
        """Our environment beside a published one; empty if there is none."""
        return self.ours.format(task=published.rpartition("-v")[0] or published, name=published)


@dataclasses.dataclass(frozen=True)
class ClaimTest:
    """A claim as a comparison of two of our runs, or of one with a number.

    left, right: ``RUN`` or ``RUN:ALGORITHM``, or for right a number.  metric: ``mode``, ``sample`` or ``training`` return at
    the end, ``area`` (mode return, mean over all evaluations), or a column of the metrics with ``:mean``, ``:max`` or
    ``:last`` over the run.  right_metric: the right one's, if it is another.  expect: left is ``greater`` or ``less``.
    env: the only environment of ours that it is tested on.
    """

    left: str
    right: str | float
    metric: str
    expect: str
    env: str = ""
    right_metric: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """tests: empty where no run of ours tests it.  The rest as in the file."""

    name: str
    text: str
    source: str
    mark: str = ""
    mark_note: str = ""
    tests: tuple[ClaimTest, ...] = ()


@dataclasses.dataclass(frozen=True)
class Paper:
    """One file. name: of the file.  runs: RUN -> sweep table.  scales: as in the file.  followups: by name of numbers.
    shown: which return the figure shows, empty for that of most numbers.
    """

    name: str
    title: str
    source: str
    numbers: tuple[Numbers, ...]
    claims: tuple[Claim, ...]
    runs: dict[str, dict[str, Any]]
    scales: dict[str, dict[str, Any]]
    not_available: tuple[str, ...]
    followups: tuple[dict[str, str], ...]
    shown: str = ""

    def specs(self, scale: str) -> dict[str, list[RunSpec]]:
        """What every run trains at a scale. Raises: RequestError if there is nothing to run."""
        if not self.runs:
            raise RequestError(f"{self.name} has no runs yet; papers with runs: {', '.join(_with_runs())}")
        if scale not in SCALES:
            raise RequestError(f"--scale {scale!r} is unknown; known: {', '.join(SCALES)}")
        shared = {**self.scales.get(scale, {})}
        own = shared.pop("run", {})
        found = {}
        for name, table in self.runs.items():
            content = _merged(_merged(table, shared), own.get(name, {}))
            # A scale may leave out environments that have numbers of their own.
            content["env"] = {env: part for env, part in content.get("env", {}).items() if env in content["envs"]}
            if not content.pop("skip", False):
                found[name] = list(specs_of(content))
        return found

    def sweep(self, scale: str, without: Collection[tuple[str, str, str]] = ()) -> Sweep:
        """All runs of a scale as one sweep, but for those ``(run, algorithm, env)``."""
        pairs = [(run, spec) for run, several in self.specs(scale).items() for spec in several]
        specs = tuple(spec for run, spec in pairs if (run, spec.algorithm, spec.env) not in without)
        return Sweep(_path(self.name), _path(self.name).read_text(), specs, None, {"name": "local"})


def _merged(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``table`` with what ``other`` has in its place, tables within tables too."""
    tables = {name: _merged(table[name], value) for name, value in other.items() if isinstance(table.get(name), dict)}
    return {**table, **other, **tables}


def list_papers() -> list[str]:
    """Names of the papers whose numbers are here."""
    return sorted(path.stem for path in PUBLISHED.glob("*.toml"))


def read_paper(name: str) -> Paper:
    """Raises: RequestError for an unknown paper or a field that the file should not have."""
    if name not in list_papers():
        raise RequestError(f"paper {name!r} is unknown; {close_names(name, list_papers())}")
    content = tomllib.loads(_path(name).read_text())
    try:
        return Paper(
            name=name,
            title=content.pop("title"),
            source=content.pop("source"),
            numbers=tuple(Numbers(**entry) for entry in content.pop("numbers", ())),
            claims=tuple(_claim(entry) for entry in content.pop("claims", ())),
            runs=content.pop("run", {}),
            scales=content.pop("scale", {}),
            not_available=tuple(content.pop("not_available", ())),
            followups=tuple(content.pop("followups", ())),
            **content,
        )
    except (TypeError, KeyError) as error:
        raise RequestError(f"{_path(name)}: {error}") from None


def _claim(entry: dict[str, Any]) -> Claim:
    return Claim(**{**entry, "tests": tuple(ClaimTest(**test) for test in entry.get("tests", ()))})


def _path(name: str) -> Path:
    return PUBLISHED / f"{name}.toml"


def _with_runs() -> list[str]:
    return [name for name in list_papers() if "run" in tomllib.loads(_path(name).read_text())]
