"""SPO, Simple Policy Optimization (Xie et al., ICML 2025, arXiv 2401.16025 from version 7 on).

PPO whose clip is replaced by a parabola in the ratio with its peak at 1 ± ε, so that samples beyond it are pulled back.
Elsewhere SPO also names other methods: the KL-based one of versions 1 to 6, and sequential Monte Carlo policy optimisation.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pgjax import on_policy
from pgjax.updates import minibatch_sgd, plug

DEFINING = ()


@dataclasses.dataclass(frozen=True)
class Setup(on_policy.Setup):
    num_envs: int = 8
    num_steps: int = 256
    num_epochs: int = 10
    num_minibatches: int = 4
    value_loss: Literal["clipped", "squared"] = "clipped"


class Hypers(on_policy.Hypers):
    """clip_eps: distance of the parabola's peak from a ratio of 1."""

    learning_rate: jax.Array | float = 3e-4
    adam_eps: jax.Array | float = 1e-8
    clip_eps: jax.Array | float = 0.2


def spo_surrogate(log_ratio: jax.Array, advantage: jax.Array, clip_eps) -> jax.Array:
    """SPO's objective per sample, to be maximised: ρ Â - |Â| (ρ - 1)² / 2ε.

    Concave in ρ with its maximum at ρ = 1 + sign(Â) ε, where PPO's gradient merely vanishes.
    Args: log_ratio [N], log ρ = log π_new - log π_old; advantage [N], normalised; clip_eps scalar.
    Returns: [N], in units of the advantage.
    """
    # paper: no bound / authors' code: none / here: the squared ratio would overflow float32 at 44.
    ratio = jnp.exp(jnp.clip(log_ratio, -20, 20))
    return ratio * advantage - jnp.abs(advantage) / (2 * clip_eps) * (ratio - 1) ** 2


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """SPO on ``env``. ``objective`` replaces its parabola: ``f(log_ratio, advantage)`` or a ``pgjax.Objective``."""

    def parabola(sample, hypers, extra):
        return spo_surrogate(sample.log_ratio, sample.advantage, hypers.clip_eps)

    objective, hypers = plug(objective, parabola, hypers)
    return on_policy.make("spo", env, setup, hypers, update=minibatch_sgd(objective), networks=networks)
