"""What notebooks share: many seeds trained in one program, and their curves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax
from pgjax.experiments.plots import COLORS, DASHES, draw, over_env_steps
from pgjax.types import Algorithm


def train_seeds(
    algorithm: Algorithm,
    total_env_steps: int,
    num_seeds: int,
    *,
    num_evals: int = 10,
    eval_episodes: int = 8,
    **values: Any,
) -> dict[str, Any]:
    """Trains seeds 0 to ``num_seeds - 1`` as lanes of one program.

    Args:
      values: fields of ``algorithm.hypers`` with an array of V values each; the same program trains every seed with each.
    Returns: the metrics of ``pgjax.make_train``, with leading axes [S], or [V, S] with ``values``.
    """
    lane = jax.vmap(pgjax.make_train(algorithm, total_env_steps, num_evals=num_evals, eval_episodes=eval_episodes), (0, None))
    hypers, seeds = algorithm.hypers, jax.vmap(jax.random.key)(jnp.arange(num_seeds))
    if values:
        axes = jax.tree.map(lambda _: None, hypers).replace(
            **{name: jax.tree.map(lambda _: 0, v) for name, v in values.items()}
        )
        lane, hypers = jax.vmap(lane, (None, axes)), hypers.replace(**values)
    return jax.device_get(jax.jit(lane)(seeds, hypers)[1])


def draw_returns(axis: Any, metrics: dict[str, Any], label: str, index: int = 0) -> None:
    """The mode policy's return of ``metrics`` [S], with the 95 % interval of its interquartile mean; ``index``: the colour."""
    x, y = metrics["evaluation_env_steps"][0], metrics["evaluations"].mode_return.mean(-1)
    draw(axis, x, np.asarray(y, np.float64), label, COLORS[index], DASHES[index % len(DASHES)])
    axis.set_ylabel("return, mode policy")
    over_env_steps(axis)


def draw_metric(axis: Any, metrics: dict[str, Any], name: str, label: str, index: int = 0) -> None:
    """A metric of every update [S, R], with the 95 % interval of its interquartile mean; ``index``: the colour."""
    y = np.asarray(metrics[name], np.float64)
    draw(axis, metrics["env_steps"][0], y, label, COLORS[index], DASHES[index % len(DASHES)])
    over_env_steps(axis)
