"""Whole training runs as pure functions: how a budget becomes iterations and rows, and the program that runs them."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax import metrics
from pgjax.errors import RequestError
from pgjax.evaluation import evaluate
from pgjax.on_policy import MAX_ENV_STEPS
from pgjax.types import Algorithm, Metrics, PyTree

# Rows that a run reports by default: enough for a smooth curve, few enough to read.
DEFAULT_ROWS = 200
# Streams of a lane's key, so that evaluation never changes training.
_TRAIN, _EVALUATE = 0, 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a budget is spent.

    iterations: [R] iterations behind each reported row.
    eval_rows: numbers of finished rows after which the policy is evaluated, ascending.
    env_steps_per_iteration: of one lane.
    """

    iterations: tuple[int, ...]
    eval_rows: tuple[int, ...]
    env_steps_per_iteration: int

    @property
    def num_iterations(self) -> int:
        return sum(self.iterations)

    @property
    def env_steps(self) -> int:
        """Environment steps that will be done: the budget, rounded up to whole iterations."""
        return self.num_iterations * self.env_steps_per_iteration


def make_schedule(algorithm: Algorithm, total_env_steps: int, log_every: int | None = None, num_evals: int = 10) -> Schedule:
    """Rows of ``log_every`` iterations each (None: about 200 rows), and evaluations evenly spaced up to the end.

    Raises: RequestError for a budget below one iteration's or above 2**31 - 1, and for other impossible numbers.
    """
    cost = algorithm.env_steps_per_iteration
    if total_env_steps < 1:
        raise RequestError(f"total_env_steps = {total_env_steps} must be at least 1; one iteration takes {cost}")
    num_iterations = math.ceil(total_env_steps / cost)
    if num_iterations * cost > MAX_ENV_STEPS:
        raise RequestError(f"total_env_steps = {total_env_steps} exceeds {MAX_ENV_STEPS}, the int32 counter; split the run")
    if log_every is not None and log_every < 1:
        raise RequestError(f"log_every = {log_every} must be at least 1 iteration")
    if num_evals < 0:
        raise RequestError(f"num_evals = {num_evals} must be 0 or more")
    num_evals = min(num_evals, num_iterations)
    if log_every is None:
        log_every = max(1, num_iterations // max(DEFAULT_ROWS, num_evals))
    full, rest = divmod(num_iterations, log_every)
    iterations = (log_every,) * full + ((rest,) if rest else ())
    rows = len(iterations)
    eval_rows = sorted({math.ceil(rows * k / num_evals) for k in range(1, num_evals + 1)})
    return Schedule(iterations, tuple(eval_rows), cost)


def extend_schedule(
    algorithm: Algorithm, schedule: Schedule, total_env_steps: int, done_rows: int, log_every: int | None = None
) -> Schedule:
    """``schedule`` with its first ``done_rows`` rows, then on to a larger budget, with rows and evaluations as dense as before.

    Args: total_env_steps: the new budget of a lane, from the start.  log_every: iterations per row, None for those of row 0.
    Raises: RequestError for a budget that adds no iteration, or is above 2**31 - 1.
    """
    whole = make_schedule(algorithm, total_env_steps, log_every, num_evals=0)
    if whole.num_iterations <= schedule.num_iterations:
        raise RequestError(
            f"total_env_steps = {total_env_steps} adds nothing: the run goes to {schedule.env_steps} already; give more"
        )
    kept = schedule.iterations[:done_rows]
    log_every = log_every or schedule.iterations[0]
    full, rest = divmod(whole.num_iterations - sum(kept), log_every)
    iterations = kept + (log_every,) * full + ((rest,) if rest else ())
    eval_rows = [row for row in schedule.eval_rows if row <= done_rows]
    if schedule.eval_rows:
        start, rows = max(eval_rows, default=0), len(iterations)
        spacing = schedule.num_iterations / len(schedule.eval_rows)
        num_evals = max(1, round(sum(iterations[start:]) / spacing))
        new_rows = {start + math.ceil((rows - start) * k / num_evals) for k in range(1, num_evals + 1)}
        eval_rows += sorted(row for row in new_rows if row > done_rows)
    return Schedule(iterations, tuple(eval_rows), schedule.env_steps_per_iteration)


def lane_keys(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(key_train, key_evaluate)`` of a lane from its seed's key."""
    return jax.random.fold_in(key, _TRAIN), jax.random.fold_in(key, _EVALUATE)


def run_rows(algorithm: Algorithm, state: PyTree, hypers: PyTree, iterations: jax.Array) -> tuple[PyTree, Metrics]:
    """Runs ``iterations[r]`` iterations for each row r; rows of zero iterations at the end are not run.

    The counts are traced, so one compiled program serves a chunk of any length. That is what makes a resumed run equal to
    an undisturbed one bit by bit: both run the very same program.
    Args: iterations [R] int32.  Returns: ``state, rows`` with rows ``{metric: [R]}``.
    """
    shapes = jax.eval_shape(algorithm.step, state, hypers)[1]
    start = metrics.start_row(shapes)
    empty = jax.tree.map(lambda x: jnp.zeros((*iterations.shape, *x.shape), x.dtype), start)

    def iterate(_, carry):
        state, row = carry
        state, step_metrics = algorithm.step(state, hypers)
        return state, metrics.add_to_row(row, step_metrics)

    def run_row(r, carry):
        state, rows = carry
        state, row = jax.lax.fori_loop(0, iterations[r], iterate, (state, start))
        row = metrics.finish_row(row, iterations[r])
        return state, jax.tree.map(lambda rows, row: rows.at[r].set(row), rows, row)

    num_rows = (iterations > 0).sum()
    state, rows = jax.lax.fori_loop(0, num_rows, run_row, (state, empty))
    return state, metrics.columns(rows, shapes)


def with_horizon(hypers: PyTree, env_steps: int) -> PyTree:
    """``hypers`` with the schedules' horizon filled in, unless it was given or the method has no schedules."""
    if not hasattr(hypers, "anneal_env_steps"):
        return hypers
    horizon = hypers.anneal_env_steps
    return hypers.replace(anneal_env_steps=jnp.where(jnp.isinf(horizon), jnp.float32(env_steps), horizon))


def make_train(
    algorithm: Algorithm,
    total_env_steps: int,
    *,
    log_every: int | None = None,
    num_evals: int = 0,
    eval_episodes: int = 64,
):
    """A whole run as one pure function, to be jitted and vmapped.

    Args:
      total_env_steps: budget of the run, rounded up to whole iterations.
      log_every: iterations behind each row of metrics; None gives about 200 rows.
      num_evals: evaluations during the run, the last one at its end.  eval_episodes: for each policy and evaluation.

    Returns: ``train(key, hypers, env_params=None) -> (state, metrics)``. ``metrics`` maps names to [R] arrays; with
    evaluations it also has ``"evaluations"``, an ``Episodes`` of [num_evals, eval_episodes], and
    ``"evaluation_env_steps"`` [num_evals]. Memory grows with the number of rows only.

    Example: ``jax.jit(jax.vmap(train, (0, None)))(jax.random.split(key, 16), algorithm.hypers)`` trains 16 seeds.
    """
    schedule = make_schedule(algorithm, total_env_steps, log_every, num_evals)
    bounds = [0, *schedule.eval_rows] if schedule.eval_rows else [0, len(schedule.iterations)]
    longest = max(np.diff(bounds))
    # One segment per evaluation, all of one shape: shorter ones are padded with rows of zero iterations.
    segments = np.zeros((len(bounds) - 1, longest), np.int32)
    for segment, (start, end) in zip(segments, itertools.pairwise(bounds), strict=True):
        segment[: end - start] = schedule.iterations[start:end]

    def train(key, hypers, env_params=None):
        key_train, key_evaluate = lane_keys(key)
        hypers = with_horizon(hypers, schedule.env_steps)

        def segment(state, x):
            index, iterations = x
            state, rows = run_rows(algorithm, state, hypers, iterations)
            if not schedule.eval_rows:
                return state, (rows, None)
            key_episode = jax.random.fold_in(key_evaluate, index)
            return state, (rows, evaluate(algorithm, algorithm.policy(state), key_episode, eval_episodes, env_params))

        xs = (jnp.arange(len(segments)), jnp.asarray(segments))
        state, (rows, episodes) = jax.lax.scan(segment, algorithm.init(key_train, hypers, env_params), xs)
        used = np.flatnonzero(segments.ravel())
        out: dict[str, Any] = {name: value.reshape(-1)[used] for name, value in rows.items()}
        if episodes is not None:
            done = np.cumsum(schedule.iterations)[np.asarray(schedule.eval_rows) - 1]
            out["evaluations"] = episodes
            out["evaluation_env_steps"] = jnp.asarray(done * schedule.env_steps_per_iteration, jnp.int32)
        return state, out

    return train
