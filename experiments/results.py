"""What a run came to, per configuration: small enough to keep ten thousand of them in memory, enough for tables and curves."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

import pgjax
from pgjax.experiments.plots import finite_seeds
from pgjax.host.checkpoints import from_json, to_json
from pgjax.host.store import LoadedRun

POLICIES = ("mode", "sample")


@dataclasses.dataclass(frozen=True)
class Result:
    """One configuration of an algorithm on one environment, over its seeds.

    path: folder of its run.  status: ``finished``, ``failed``, ``interrupted``, ``running``, ``pending`` or ``unreadable``.
    note: why it failed.  config: as ``RunSpec.config()``, with this one entry in ``configs``.
    provenance: of the run, with the ``eval_episodes`` that its evaluations had in the end; empty if there is none yet.
    seconds: spent compiling, training and so on by the program that trained it, perhaps with other configurations.
    seeds: [S], those that stayed finite; frozen: those that did not, and are in no number.
    env_steps: [E], of each evaluation.
    returns: by policy (``mode``, ``sample``) [S, E], mean over an evaluation's episodes; NaN where a seed has no episode. A
    run without evaluations has ``training`` instead, the return of the episodes that ended while it was trained.
    """

    path: str
    status: str
    config: dict[str, Any]
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()
    env_steps: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    returns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    note: str = ""

    def final(self, policy: str = "mode") -> np.ndarray:
        """Returns at the last evaluation, [S]; empty without one."""
        returns = self.returns.get(policy, np.zeros((0, 0)))
        return returns[:, -1] if returns.size else np.zeros(0)

    def dump(self) -> str:
        """As JSON text; ``parse`` is the way back."""
        return json.dumps(
            to_json(
                {
                    **dataclasses.asdict(self),
                    "seeds": list(self.seeds),
                    "frozen": list(self.frozen),
                    "env_steps": self.env_steps.tolist(),
                    "returns": {policy: values.tolist() for policy, values in self.returns.items()},
                }
            )
        )

    @classmethod
    def parse(cls, text: str) -> "Result":
        """Raises: ValueError if the text is none that ``dump`` wrote."""
        try:
            fields = from_json(json.loads(text))
            shape = (len(fields["seeds"]), len(fields["env_steps"]))
            return cls(
                **{
                    **fields,
                    "seeds": tuple(fields["seeds"]),
                    "frozen": tuple(fields["frozen"]),
                    "env_steps": np.asarray(fields["env_steps"], np.int64),
                    "returns": {
                        policy: np.asarray(values, np.float64).reshape(shape) for policy, values in fields["returns"].items()
                    },
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a result: {error}") from error


def results_of(run: LoadedRun) -> list[Result]:
    """One result for each configuration of a run, finished or not."""
    return [_result(run, config) for config in range(len(run.config["configs"]))]


def load_results(paths: Sequence[Path]) -> list[Result]:
    """The results of runs. Raises: RequestError if a folder holds no run, or one that cannot be read."""
    return [result for path in paths for result in results_of(pgjax.load(path))]


def _result(run: LoadedRun, config: int) -> Result:
    seeds = finite_seeds(run, config) if len(run.metrics) else []
    record = run.record or {}
    rows = run.metrics.seed[run.metrics.config == config] if len(run.metrics) else ()
    frozen = sorted(set(map(int, rows)) - set(seeds))
    env_steps, returns = _curves(run, config, seeds)
    return Result(
        path=str(run.path),
        # A lane that froze fails its run; configurations beside it did not fail.
        status="finished" if run.status == "failed" and not frozen and "error" not in run.facts else run.status,
        config={**run.config, "configs": [run.config["configs"][config]]},
        # Evaluations that took too long were cut down while it ran, which the configuration does not know.
        provenance={**run.provenance, **({"eval_episodes": record["eval_episodes"]} if "eval_episodes" in record else {})},
        seconds=run.facts.get("seconds", {}),
        seeds=tuple(seeds),
        frozen=tuple(frozen),
        env_steps=env_steps,
        returns=returns,
        note=run.facts.get("error", "") or ("; ".join(f"seed {seed} went non-finite" for seed in frozen)),
    )


def _curves(run: LoadedRun, config: int, seeds: Sequence[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    episodes = cast(pd.DataFrame, run.evaluations[(run.evaluations.config == config) & run.evaluations.seed.isin(seeds)])
    if len(episodes):
        table = episodes.groupby(["policy", "seed", "env_steps"])["return"].mean().unstack("env_steps")
        return table.columns.to_numpy(np.int64), {
            policy: table.loc[policy].reindex(list(seeds)).to_numpy(np.float64)
            for policy in POLICIES
            if policy in table.index.get_level_values("policy")
        }
    rows = cast(pd.DataFrame, run.metrics[(run.metrics.config == config) & run.metrics.seed.isin(seeds)])
    if not len(rows):
        return np.zeros(0, np.int64), {}
    table = rows.pivot_table(index="seed", columns="env_steps", values="episode_return", dropna=False).ffill(axis=1)
    return table.columns.to_numpy(np.int64), {"training": table.reindex(list(seeds)).to_numpy(np.float64)}


def command_of(config: dict[str, Any]) -> str:
    """The ``pgjax train`` command that makes one run of a specification with a single configuration, spelled out in full."""
    words = ["pgjax", "train", config["algorithm"], "--env", config["env"], "--preset", "none"]
    words += ["--total-env-steps", f"{config['total_env_steps']}"]
    seeds = config["seeds"]
    words += ["--seeds", f"{len(seeds)}", "--seed-start", f"{min(seeds, default=0)}"]
    for flag, fields in (("--env-option", config["env_options"]), ("--env-param", config["env_params"])):
        words += [word for name, value in fields.items() for word in (flag, f"{name}={_plain(value, ',')}")]
    for group, fields in (("setup", config["setup"]), ("hypers", config["configs"][0])):
        for name, value in fields.items():
            flag = f"--{group}.{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag if value else f"--{group}.no-{name.replace('_', '-')}")
            else:
                words += [flag, *_plain(value, " ").split()]
    for name in ("log_every", "num_evals", "eval_episodes", "objective", "rule", "init_policy", "precision"):
        if config.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", f"{config[name]}"]
    return shlex.join(words)


def _plain(value: Any, separator: str) -> str:
    return separator.join(f"{item}" for item in value) if isinstance(value, (list, tuple)) else f"{value}"
