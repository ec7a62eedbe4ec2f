"""What every method reports, and how rows of it are reduced over iterations and lanes.

A metric's reduction follows from its name, so a method may add metrics of its own without registering them:
``episode_*`` are means over the episodes that ended, ``*_max`` and ``*_min`` extremes, the rest plain means.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Names with a reduction of their own; ``episodes`` is the only sum, for it is what episode means are weighted with.
_BY_NAME = {"env_steps": "last", "episodes": "sum", "nonfinite": "max"}


def reduction(name: str) -> str:
    """One of ``last``, ``sum``, ``max``, ``min``, ``episodes`` (mean weighted by episodes) and ``mean``."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.startswith("episode_"):
        return "episodes"
    if name.endswith("_max"):
        return "max"
    if name.endswith("_min"):
        return "min"
    return "mean"


class Row(NamedTuple):
    """An accumulator of one row: metrics of a kind side by side, so that adding them up is a handful of operations.

    last: int32, what is not averaged.  The others are float32; ``episodes`` weighs the ``episode`` means.
    """

    last: jax.Array
    total: jax.Array
    episode: jax.Array
    episodes: jax.Array
    maximum: jax.Array
    minimum: jax.Array


_KINDS = {"last": "last", "sum": "episodes", "mean": "total", "episodes": "episode", "max": "maximum", "min": "minimum"}


def _names(metrics: dict) -> dict[str, list[str]]:
    """Field of ``Row`` -> names of the metrics in it, in order."""
    return {field: [name for name in sorted(metrics) if _KINDS[reduction(name)] == field] for field in Row._fields}


def start_row(metrics: dict) -> Row:
    """An accumulator for metrics of this structure (scalars or ``ShapeDtypeStruct``s)."""
    start = {"maximum": -jnp.inf, "minimum": jnp.inf}
    dtype = jnp.result_type(*(value.dtype for name, value in metrics.items() if reduction(name) != "last"))
    return Row(
        **{
            field: jnp.full(len(names), start.get(field, 0), jnp.int32 if field == "last" else dtype)
            for field, names in _names(metrics).items()
        }
    )


def add_to_row(row: Row, metrics: dict) -> Row:
    """Adds one iteration's metrics to the accumulator."""

    def stack(field, names):
        return jnp.stack([metrics[name] for name in names]) if names else getattr(row, field)[:0]

    new = Row(**{field: stack(field, names) for field, names in _names(metrics).items()})
    episodes = metrics.get("episodes", 0.0)
    return Row(
        last=new.last,
        total=row.total + new.total,
        episode=row.episode + jnp.where(episodes > 0, new.episode * episodes, 0),
        episodes=row.episodes + new.episodes,
        maximum=jnp.maximum(row.maximum, new.maximum),
        minimum=jnp.minimum(row.minimum, new.minimum),
    )


def finish_row(row: Row, num_iterations: jax.Array) -> Row:
    """Turns sums into means; an episode column of a row in which no episode ended becomes NaN."""
    episodes = row.episodes.sum()
    return row._replace(
        total=row.total / num_iterations,
        episode=jnp.where(episodes > 0, row.episode / episodes, jnp.nan),
    )


def columns(rows: Row, metrics: dict) -> dict[str, jax.Array]:
    """Rows ``[R, ...]`` as ``{name: [R]}``, for metrics of the structure they were started with."""
    return {
        name: getattr(rows, field)[..., index] for field, names in _names(metrics).items() for index, name in enumerate(names)
    }


def mean_over_lanes(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reduces ``[L, ...]`` columns over lanes, on the host; lanes that went non-finite are left out.

    Episode columns weigh by the number of episodes and ignore NaN; extremes take the extreme; the rest is the mean. Where no
    lane is left, all but ``env_steps``, ``episodes`` and ``nonfinite`` are NaN.
    """
    keep = np.asarray(rows["nonfinite"]) == 0 if "nonfinite" in rows else np.ones_like(rows["env_steps"], bool)
    reduced = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, value in rows.items():
            value = np.asarray(value, np.float64)
            match reduction(name):
                case "episodes":
                    weight = np.where(keep & np.isfinite(value), rows["episodes"], 0)
                    reduced[name] = np.where(weight > 0, value * weight, 0).sum(0) / weight.sum(0)
                case "last":
                    reduced[name] = value.max(0)
                case "sum":
                    reduced[name] = np.where(keep, value, 0).sum(0)
                case "max" if name == "nonfinite":
                    reduced[name] = value.max(0)
                case "max":
                    reduced[name] = np.where(keep.any(0), np.where(keep, value, -np.inf).max(0), np.nan)
                case "min":
                    reduced[name] = np.where(keep.any(0), np.where(keep, value, np.inf).min(0), np.nan)
                case _:
                    reduced[name] = np.where(keep, value, 0).sum(0) / keep.sum(0)
    return reduced


def policy_change(log_ratio: jax.Array, dist_old, dist, present: jax.Array | None = None) -> dict[str, jax.Array]:
    """How far the policy moved from the one that acted, over the whole batch.

    Args: log_ratio [N]; dist_old, dist with batch shape [N]; present [N] bool, the samples that are there, None for all.
    Returns: ``kl`` and ``kl_max``, closed-form KL(old || new) in nats; ``ratio_min``, ``ratio_max``;
    ``ratio_deviation``, the mean of |ratio - 1|;
    ``clip_fraction``, the share of samples with |ratio - 1| > 0.2, whatever range a method clips to;
    ``ess``, the effective sample size (Σ ratio)² / (N Σ ratio²) in (0, 1].
    """
    ratio = jnp.exp(log_ratio)
    kl = dist_old.kl(dist)
    count = log_ratio.size if present is None else present.sum()
    # Divided by the largest ratio so that neither square overflows; the quotient does not change.
    relative = jnp.exp(log_ratio - log_ratio.max(where=present, initial=-jnp.inf))
    return {
        "kl": kl.mean(where=present),
        "kl_max": kl.max(where=present, initial=-jnp.inf),
        "ratio_min": ratio.min(where=present, initial=jnp.inf),
        "ratio_max": ratio.max(where=present, initial=-jnp.inf),
        "ratio_deviation": jnp.abs(ratio - 1).mean(where=present),
        "clip_fraction": (jnp.abs(ratio - 1) > 0.2).mean(where=present),
        "ess": relative.sum(where=present) ** 2 / (count * (relative**2).sum(where=present)),
    }


def explained_variance(value: jax.Array, value_target: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """1 - Var(target - value) / Var(target) over the batch, or the samples of weight 1; 0 where the target does not vary."""

    def variance(x):
        return x.var() if weight is None else x.var(where=weight > 0)

    spread = variance(value_target)
    return jnp.where(spread > 0, 1 - variance(value_target - value) / jnp.where(spread > 0, spread, 1), 0.0)
