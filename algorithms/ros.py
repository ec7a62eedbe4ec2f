"""ROS, Robust On-Policy Sampling (Zhong et al. 2022, arXiv 2111.14552), as the way PPO collects its data.

Before every step φ ← θ - α ∇ mean log π_θ(a|s) over the buffer: one gradient step away from the actions that it holds too
often. That is PROPS with a behaviour policy for each step, without clip, regulariser and stop.
"""

import dataclasses
from typing import Literal

import jax
import numpy as np

from pgjax.algorithms import props

# What tells it from PROPS; none of it is a shared setting.
DEFINING = ()


@dataclasses.dataclass(frozen=True)
class Setup(props.Setup):
    """behavior_optimizer: ``sgd`` is the paper's; ``adam`` with a bound on the gradient is that of PROPS' authors' code."""

    behavior_num_steps: int = 1
    behavior_epochs: int = 1
    behavior_minibatches: int = 1
    behavior_optimizer: Literal["adam", "sgd"] = "sgd"


class Hypers(props.Hypers):
    """behavior_learning_rate: α. In the code of 2023 for PROPS it has the opposite sign, and raises the sampling error.

    behavior_max_grad_norm: paper: none said / authors' code: 0.5 / here: 0.5, because a Gaussian that has grown narrow has a
    likelihood so steep that a plain step leaves it far behind.
    """

    behavior_learning_rate: jax.Array | float = 0.1
    behavior_clip_eps: jax.Array | float = np.inf
    behavior_kl_coef: jax.Array | float = 0.0
    behavior_target_kl: jax.Array | float = np.inf


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """ROS on ``env``; arguments as ``props.make``.

    paper: evaluates a fixed policy / here: PPO goes on from the data as in PROPS; at a learning rate of 0 the policy is fixed
    (without ``normalize_obs``, whose statistics go on).
    """
    return props.make(env, setup, hypers, objective=objective, networks=networks, name="ros")
