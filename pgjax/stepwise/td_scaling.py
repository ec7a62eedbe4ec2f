"""A running scale of TD errors, from how rewards, discounts and returns vary (return-based scaling).

σ² = Var[r] + Var[γ] E[G²], with γ = 0 at the end of an episode: what the spread of a TD error would be if nothing were learned
yet (Schaul et al. 2021, arXiv 2105.05347). A critic that fits δ / σ has errors of order one whatever the unit of the rewards.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from pgjax.normalizers import RunningMoments, init_moments, update_moments

Form = Literal["code", "paper"]

# Least variance, and the variance up to which the code leaves errors as they are while no return was seen.
_LEAST, _NEGLIGIBLE = 1e-4, 0.01


class TDScale(struct.PyTreeNode):
    """What the scale is made of; every field scalar.

    reward, squared_return: moments of r and of G², the latter over finished episodes.
    ends: int32, steps at which γ was 0. With how many of all they are the variance of γ is exact; running moments of it would
        drift in float32, for the many small steps up after an end are rounded away and the end itself is not.
    return_: G of the running episode, as far as it went.  weight: γ^k of its next reward, used by the form ``paper``.
    """

    reward: RunningMoments
    ends: jax.Array
    squared_return: RunningMoments
    return_: jax.Array
    weight: jax.Array


def init_td_scale() -> TDScale:
    """The scale before any reward."""
    return TDScale(init_moments(()), jnp.zeros((), jnp.int32), init_moments(()), jnp.zeros(()), jnp.ones(()))


def update_td_scale(
    scale: TDScale, reward: jax.Array, gamma, terminated: jax.Array, truncated: jax.Array, form: Form, decay=1.0
) -> tuple[TDScale, jax.Array]:
    """The scale with one more reward, and σ [] in reward units.

    ========  =================================  ==========================  ===========================
    form      G                                  an episode's return counts  σ = 1
    ========  =================================  ==========================  ===========================
    code      decay G + r                        where it terminated         until one did, if σ <= 0.1
    paper     Σ γ^k r                            where it ended in any way   until two did
    ========  =================================  ==========================  ===========================

    Args:
      scale: so far.  reward: [] of this step, with whatever bonus the method adds.  gamma: scalar γ.
      terminated, truncated: [] bool, of this step.
      decay: of the form ``code``: 1 gives the undiscounted sum of AVG, γ the sum of IAC, which discounts backwards.

    paper: the form ``paper``, as far as it is known second-hand / authors' code: the form ``code``, where G goes on over a
    time limit into the next episode / here: both.
    """
    end = terminated | truncated if form == "paper" else terminated
    return_ = scale.return_ + scale.weight * reward if form == "paper" else decay * scale.return_ + reward
    finished = update_moments(scale.squared_return, return_**2)
    squared_return = jax.tree.map(lambda new, old: jnp.where(end, new, old), finished, scale.squared_return)
    new = TDScale(
        reward=update_moments(scale.reward, reward),
        ends=scale.ends + end,
        squared_return=squared_return,
        return_=jnp.where(end, 0.0, return_).astype(scale.return_.dtype),
        weight=jnp.where(end, 1.0, gamma * scale.weight).astype(scale.weight.dtype) if form == "paper" else scale.weight,
    )
    share = new.ends / new.reward.count
    discount_var = jnp.square(gamma) * share * (1 - share)
    variance = jnp.maximum(new.reward.var + discount_var * squared_return.mean, _LEAST)
    returns = squared_return.count
    unscaled = returns < 2 if form == "paper" else (returns == 0) & (variance <= _NEGLIGIBLE)
    return new, jnp.where(unscaled, 1.0, jnp.sqrt(variance))
