"""A2C, synchronous advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783).

One gradient step per batch along Â ∇log π, with generalised advantages in place of the n-step ones (``gae_lambda`` = 1
gives those back), value regression and an entropy bonus.
"""

import dataclasses
from typing import Literal

import jax

from pgjax import on_policy
from pgjax.updates import minibatch_sgd, plug

# One gradient step per batch.
DEFINING = ("num_epochs", "num_minibatches")


@dataclasses.dataclass(frozen=True)
class Setup(on_policy.Setup):
    num_envs: int = 64
    num_steps: int = 16
    normalize_advantage: Literal["minibatch", "batch", "none"] = "none"


class Hypers(on_policy.Hypers):
    learning_rate: jax.Array | float = 7e-4
    entropy_coef: jax.Array | float = 0.01


def policy_gradient(log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
    """The policy-gradient objective per sample [N], to be maximised: Â log π.

    Written with log π_new - log π_old, whose gradient is that of log π_new: the old policy only shifts the value.
    """
    return log_ratio * advantage


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """A2C on ``env``. ``objective`` replaces the policy gradient: ``f(log_ratio, advantage)`` or a ``pgjax.Objective``."""

    def gradient(sample, hypers, extra):
        return policy_gradient(sample.log_ratio, sample.advantage)

    objective, hypers = plug(objective, gradient, hypers)
    return on_policy.make("a2c", env, setup, hypers, update=minibatch_sgd(objective), networks=networks)
