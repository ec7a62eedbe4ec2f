"""``pgjax eval``: full episodes of a run's saved policies, in its own environment or another one."""

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np
import pandas as pd

import pgjax
from pgjax.errors import RequestError
from pgjax.evaluation import evaluate
from pgjax.experiments.statistics import iqm, iqm_interval
from pgjax.host import lanes as lanes_
from pgjax.host.runner import RunSpec, policies_of, with_params
from pgjax.host.store import read_run
from pgjax.types import Algorithm, PyTree


def evaluate_run(
    path, env: str | None, env_options: dict, num_episodes: int, seed: int, lanes: Sequence[int] | None = None
) -> pd.DataFrame:
    """One row per episode: config, seed, policy (mode or sample), episode, return, length.

    Args: path of a run.  env: name of another environment with the same spaces, or None.  env_options: for ``make_env``;
    they replace the run's own if given.  num_episodes: of each policy.  seed: of the episodes.  lanes: see ``lanes_of``.
    Raises: RequestError if there is no such run or lane, or the spaces differ.
    """
    algorithm, policies, columns = acting(path, env, env_options, lanes)
    num_lanes = len(columns["seed"])
    spread = lanes_.Spread(num_lanes, lanes_.choose_devices(num_lanes, algorithm.env.host_callback))
    keys = episode_keys(seed, columns)
    run_lane = jax.jit(spread.map(lambda policy, key: evaluate(algorithm, policy, key, num_episodes), 2))
    episodes = spread.take(run_lane(*spread.put(spread.pad((policies, keys)))))
    frames = []
    for policy in ("mode", "sample"):
        frames.append(
            pd.DataFrame(
                {
                    "config": np.repeat(columns["config"], num_episodes),
                    "seed": np.repeat(columns["seed"], num_episodes),
                    "policy": policy,
                    "episode": np.tile(np.arange(num_episodes), num_lanes),
                    "return": getattr(episodes, f"{policy}_return").ravel(),
                    "length": getattr(episodes, f"{policy}_length").ravel(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def acting(
    path, env: str | None = None, env_options: dict | None = None, lanes: Sequence[int] | None = None
) -> tuple[Algorithm, PyTree, dict[str, np.ndarray]]:
    """What acts in a run's environment, or in another one; the arguments are those of ``evaluate_run``.

    Returns: the algorithm, on that environment; policies [L, ...]; columns config [L] and seed [L].
    Raises: RequestError as ``evaluate_run`` does.
    """
    spec = RunSpec.from_config(read_run(path)["config"])
    trained = spec.build()
    policies, columns = lanes_of(path, trained, lanes)
    options = env_options or (spec.env_options if env is None else {})
    where = pgjax.make_env(env or spec.env, **options)
    if spec.env_params and env is None:
        where = with_params(where, spec.env_params)
    for space in ("observation_space", "action_space"):
        there, here = getattr(where, space), getattr(trained.env, space)
        if there.shape != here.shape or type(there) is not type(here) or getattr(there, "num", 0) != getattr(here, "num", 0):
            raise RequestError(f"--env {where.name}: its {space} {there} is not the run's, {here}")
    algorithm = trained._replace(env=where)
    # The action map belongs to the environment the policy acts in.
    return algorithm._replace(act=pgjax.make(spec.algorithm, where, rule=spec.rule, **spec.setup).act), policies, columns


def episode_keys(seed: int, columns: dict[str, np.ndarray]) -> jax.Array:
    """Keys [L] of ``evaluate`` for the lanes with these columns; a lane's is the same whichever others are asked for."""
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(seed), s))(columns["seed"].astype(np.uint32))


def lanes_of(path, algorithm: Algorithm, lanes: Sequence[int] | None = None) -> tuple[PyTree, dict[str, np.ndarray]]:
    """``policies_of`` the lanes at these places of a run, from 0 on; of all if None.

    Raises: RequestError for a place that the run does not have, and as ``policies_of`` does.
    """
    policies, columns = policies_of(path, algorithm)
    num_lanes = len(columns["seed"])
    for lane in lanes or ():
        if not 0 <= lane < num_lanes:
            raise RequestError(f"--lane {lane}: the run {path} has 0 to {num_lanes - 1}")
    chosen = np.arange(num_lanes) if lanes is None else np.asarray(lanes)
    return jax.tree.map(lambda x: x[chosen], (policies, columns))


def summary_table(frame: pd.DataFrame) -> str:
    """Per lane and over lanes: mean return and its 95 % interval over episodes (per lane) or over lanes (IQM, bootstrap)."""
    lines = [f"{'config':>6} {'seed':>6} {'policy':<7} {'return':>10} {'+- 95 %':>9} {'length':>9}"]
    for key, rows in frame.groupby(["policy", "config", "seed"]):
        policy, config, seed = cast(tuple, key)
        half = 1.96 * rows["return"].std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else float("nan")
        lines.append(
            f"{config:>6} {seed:>6} {policy:<7} {rows['return'].mean():>10.2f} {half:>9.2f} {rows['length'].mean():>9.1f}"
        )
    for policy, rows in frame.groupby("policy"):
        per_lane = rows.groupby(["config", "seed"])["return"].mean().to_numpy()
        low, high = iqm_interval(per_lane)
        lines.append(f"{policy}: IQM over {len(per_lane)} lanes {iqm(per_lane):.2f} [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)
