"""PPO, Proximal Policy Optimization with a clipped surrogate (Schulman et al. 2017, arXiv 1707.06347).

The details that the paper leaves to its code follow openai/baselines ppo2 and vwxyzjn/cleanrl; each is a field of ``Setup``.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pgjax import on_policy
from pgjax.updates import minibatch_sgd, plug

# Settings that belong to the method, which a comparison at shared settings leaves to it.
DEFINING = ()


@dataclasses.dataclass(frozen=True)
class Setup(on_policy.Setup):
    num_epochs: int = 4
    num_minibatches: int = 4
    value_loss: Literal["clipped", "squared"] = "clipped"


class Hypers(on_policy.Hypers):
    """clip_eps: how far the ratio may leave 1 before a sample stops pushing it further."""

    learning_rate: jax.Array | float = 2.5e-4
    clip_eps: jax.Array | float = 0.2


def clip_surrogate(log_ratio: jax.Array, advantage: jax.Array, clip_eps) -> jax.Array:
    """PPO's objective per sample, to be maximised: min(ρ Â, clip(ρ, 1-ε, 1+ε) Â).

    Its gradient is ρ Â ∇log π, except that it vanishes where Â > 0 and ρ > 1+ε, or Â < 0 and ρ < 1-ε.
    Args: log_ratio [N], log ρ = log π_new - log π_old; advantage [N]; clip_eps scalar.
    Returns: [N], in units of the advantage.  Source: eq. 7 of the paper.
    """
    # Where it is clipped anyway an infinite ratio would make NaN of a slope of 0.
    ratio = jnp.exp(jnp.where(advantage > 0, jnp.minimum(log_ratio, 80.0), log_ratio))
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantage)


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """PPO on ``env``. ``objective`` replaces the clipped surrogate: ``f(log_ratio, advantage)`` or a ``pgjax.Objective``."""

    def clipped(sample, hypers, extra):
        return clip_surrogate(sample.log_ratio, sample.advantage, hypers.clip_eps)

    objective, hypers = plug(objective, clipped, hypers)
    return on_policy.make("ppo", env, setup, hypers, update=minibatch_sgd(objective), networks=networks)
