"""What our runs came to: returns per seed at every evaluation, and the metrics over the whole run, small enough to be kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import pgjax
from pgjax.errors import RequestError
from pgjax.experiments.reproduce.paper_file import PUBLISHED, Paper
from pgjax.experiments.results import Result
from pgjax.experiments.sweeps.folder import SweepFolder, cell_of
from pgjax.host.checkpoints import from_json, to_json

RESULTS = PUBLISHED / "results"
# Training returns are those of the episodes that ended in the last tenth of the steps so far.
SHARE = 0.1
# What is kept of each metric over a run.
REDUCTIONS = ("mean", "max", "last")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One algorithm on one environment in one run of a paper.

    result: with ``mode``, ``sample`` and ``training`` returns [S, E].  columns: ``METRIC:REDUCTION`` -> [S].
    """

    run: str
    result: Result
    columns: dict[str, np.ndarray]

    @property
    def algorithm(self) -> str:
        return self.result.config["algorithm"]

    @property
    def env(self) -> str:
        return self.result.config["env"]

    def scores(self, metric: str, env_steps: int | None = None, *, held: bool = False) -> np.ndarray:
        """Scores [S]: returns at the evaluation nearest to ``env_steps`` (None: the last), or a column over the whole run.

        ``best`` is the mode policy's return at the evaluation up to there whose mean over seeds is highest; ``area`` is
        its mean over all evaluations. With ``held`` a seed that went non-finite counts with the returns of the policy that it
        was held at: to have failed is a result. Columns have no such thing.
        Raises: RequestError saying in a few words why there are none.
        """
        if self.result.frozen and not (held and ":" not in metric):
            raise RequestError(f"seeds {', '.join(map(str, self.result.frozen))} of ours went non-finite")
        if ":" in metric:
            if metric not in self.columns:
                raise RequestError(f"the run has no metric {metric}")
            return self.columns[metric]
        returns = self.result.returns.get("mode" if metric in ("best", "area") else metric)
        if returns is None or not returns.size:
            raise RequestError(f"the run has no {metric} returns")
        if metric == "area":
            return returns.mean(axis=1)
        at = np.asarray(self.result.env_steps)
        index = len(at) - 1
        if env_steps:
            # A budget is rounded up to whole iterations, and evaluations come at their ends.
            near = np.flatnonzero(np.abs(at - env_steps) <= 0.05 * env_steps)
            if not len(near):
                raise RequestError(
                    f"ours has {_steps(at[-1])} of {_steps(env_steps)} environment steps"
                    if at[-1] < env_steps
                    else f"ours was not evaluated at {_steps(env_steps)} environment steps"
                )
            index = near[np.argmin(np.abs(at[near] - env_steps))]
        if metric == "best":
            index = int(np.argmax(np.nanmean(returns[:, : index + 1], axis=0)))
        scores = returns[:, index]
        if np.isnan(scores).any():
            raise RequestError("a seed has no episode there")
        return scores


def kept_elsewhere(paper: Paper, scale: str) -> list[Measured]:
    """Results that were kept for other papers and answer a request of this one: the same but for the preset's name."""
    files = [path for path in sorted(RESULTS.glob("*.json")) if path.stem.rpartition("-")[0] != paper.name]
    known = {_request(each.result.config): each for path in reversed(files) for each in load(path)[0]}
    found = []
    for run, specs in paper.specs(scale).items():
        requests: dict[tuple[str, str], dict[str, Any]] = {}
        for config in (spec.config() for spec in specs):
            whole = requests.setdefault((config["algorithm"], config["env"]), {**config, "seeds": []})
            whole["seeds"] = [*whole["seeds"], *config["seeds"]]
        matches = [known.get(_request(config)) for config in requests.values()]
        found += [dataclasses.replace(match, run=run) for match in matches if match is not None]
    return found


def _request(config: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in config.items() if name not in ("preset", "devices")}, sort_keys=True)


def measure(paper: Paper, scale: str, folder: SweepFolder) -> list[Measured]:
    """What the finished cells of a scale came to."""
    found = []
    for run, specs in paper.specs(scale).items():
        blocks: dict[tuple[str, str], list] = {}
        for spec in specs:
            blocks.setdefault((spec.algorithm, spec.env), []).append(cell_of(spec).name)
        for names in blocks.values():
            parts = [_measure(run, folder, name) for name in names if (folder.cells / name / "result.json").exists()]
            if parts:
                found.append(_together(parts))
    return found


def _measure(run: str, folder: SweepFolder, name: str) -> Measured:
    result, loaded = folder.result(name), pgjax.load(folder.cells / name)
    rows = loaded.metrics[loaded.metrics.seed.isin(result.seeds)]
    training = np.full((len(result.seeds), len(result.env_steps)), np.nan)
    for column, env_steps in enumerate(result.env_steps):
        returns = training_returns(rows, env_steps)
        training[:, column] = [returns.get(seed, np.nan) for seed in result.seeds]
    columns = {}
    for name in rows.columns.drop(["config", "seed", "iteration", "env_steps"]):
        for reduction in REDUCTIONS:
            by_seed = rows.groupby("seed")[name].agg(reduction)
            columns[f"{name}:{reduction}"] = by_seed.reindex(list(result.seeds)).to_numpy(np.float64)
    result = dataclasses.replace(result, returns={**result.returns, "training": training})
    return Measured(run, result, columns)


def training_returns(rows: pd.DataFrame, env_steps: int, share: float = SHARE) -> pd.Series:
    """Mean return, by seed, of the training episodes that ended in the last ``share`` of the first ``env_steps``."""
    last = rows[(rows.env_steps > (1 - share) * env_steps) & (rows.env_steps <= env_steps) & (rows.episodes > 0)]
    total = (last.episode_return * last.episodes).groupby(last.seed).sum()
    return total / last.groupby("seed").episodes.sum()


def _together(parts: list[Measured]) -> Measured:
    """Blocks of seeds of the same configuration as one."""
    first = parts[0].result
    if len(parts) == 1:
        return parts[0]
    kept = [part for part in parts if np.array_equal(part.result.env_steps, first.env_steps)]
    result = dataclasses.replace(
        first,
        seeds=tuple(seed for part in kept for seed in part.result.seeds),
        frozen=tuple(seed for part in kept for seed in part.result.frozen),
        config={**first.config, "seeds": [seed for part in kept for seed in part.result.config["seeds"]]},
        returns={name: np.concatenate([part.result.returns[name] for part in kept]) for name in first.returns},
    )
    columns = {name: np.concatenate([part.columns[name] for part in kept]) for name in parts[0].columns}
    return Measured(parts[0].run, result, columns)


# --- files


def dump(results: list[Measured], command: str) -> str:
    """As JSON text, numbers to six digits; ``load`` is the way back."""
    entries = [
        {
            "run": each.run,
            "result": _short(json.loads(_anywhere(each.result).dump())),
            "columns": {name: _short(to_json(values.tolist())) for name, values in each.columns.items()},
        }
        for each in results
    ]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    return f'{{"command": {json.dumps(command)}, "results": [\n{lines}\n]}}\n'


def _anywhere(result: Result) -> Result:
    """The result without folders of the machine that it was made on: of each word of its command the last part is kept."""
    command = result.provenance.get("command") or []
    words = [Path(word).name if Path(word).is_absolute() else word for word in command]
    words[:1] = ["pgjax"] * len(words[:1])
    return dataclasses.replace(result, path="", provenance={**result.provenance, "command": words})


def load(path: Path) -> tuple[list[Measured], str]:
    """The results in a file, and the command that made them."""
    content: dict[str, Any] = json.loads(path.read_text())
    results = [
        Measured(
            entry["run"],
            Result.parse(json.dumps(entry["result"])),
            {name: np.asarray(from_json(values), np.float64) for name, values in entry["columns"].items()},
        )
        for entry in content["results"]
    ]
    return results, content["command"]


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, dict):
        return {name: item if name in ("config", "provenance") else _short(item) for name, item in value.items()}
    return value


def _steps(env_steps: float) -> str:
    return f"{env_steps / 1e6:.3g} M" if env_steps >= 1e5 else f"{env_steps:,.0f}"
