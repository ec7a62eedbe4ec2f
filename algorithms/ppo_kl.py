"""PPO-KL, Proximal Policy Optimization with a penalty on the KL (Schulman et al. 2017, arXiv 1707.06347, section 4).

The surrogate is not clipped; leaving the old policy costs β KL, with β fixed or adapted after every iteration.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pgjax import on_policy
from pgjax.algorithms import ppo
from pgjax.updates import masked_mean, minibatch_sgd, plug

DEFINING = ()


@dataclasses.dataclass(frozen=True)
class Setup(ppo.Setup):
    """kl_direction: the penalty is the ``forward`` KL(old || new) of the paper, or the ``reverse`` KL(new || old).

    kl_rule: how β moves: as in the ``paper``; ``modular_rl``, the first author's older code; or ``fixed``.
    """

    kl_direction: Literal["forward", "reverse"] = "forward"
    kl_rule: Literal["paper", "modular_rl", "fixed"] = "paper"


class Hypers(on_policy.Hypers):
    """kl_coef: β at the start.  kl_target: mean KL that β is steered to, nats.

    hinge_coef: of (KL - 2 kl_target)² where the mean KL of a minibatch exceeds 2 kl_target; 1000 in joschu/modular_rl.
    """

    learning_rate: jax.Array | float = 2.5e-4
    kl_coef: jax.Array | float = 1.0
    kl_target: jax.Array | float = 0.01
    hinge_coef: jax.Array | float = 0.0


def kl_penalty_surrogate(log_ratio: jax.Array, advantage: jax.Array, kl: jax.Array, kl_coef) -> jax.Array:
    """The penalised objective per sample [N], to be maximised: ρ Â - β KL (eq. 8). ``kl`` [N] in nats."""
    return jnp.exp(log_ratio) * advantage - kl_coef * kl


def adapt_kl_coef(kl_coef: jax.Array, kl: jax.Array, kl_target, rule: str) -> jax.Array:
    """β for the next iteration, from the mean KL that this one ended with.

    ``paper``: halved below kl_target / 1.5, doubled above 1.5 kl_target, else unchanged.
    ``modular_rl``: divided by 1.5 below 0.7 kl_target, times 1.5 above 1.3 kl_target.
    """
    if rule == "fixed":
        return kl_coef
    low, high, factor = {"paper": (1 / 1.5, 1.5, 2.0), "modular_rl": (0.7, 1.3, 1.5)}[rule]
    kl_coef = jnp.where(kl < low * kl_target, kl_coef / factor, jnp.where(kl > high * kl_target, kl_coef * factor, kl_coef))
    # Nothing stops a policy that no longer moves from halving β for ever; a float32 has an end.
    return jnp.clip(kl_coef, 1e-10, 1e10)


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """PPO-KL on ``env``. ``objective`` replaces the penalised surrogate; β then moves without effect."""

    def divergence(dist_old, dist):
        return dist_old.kl(dist) if setup.kl_direction == "forward" else dist.kl(dist_old)

    def penalised(sample, hypers, extra):
        kl = divergence(sample.dist_old, sample.dist)
        excess = jnp.maximum(masked_mean(kl, sample.weight) - 2 * hypers.kl_target, 0)
        return kl_penalty_surrogate(sample.log_ratio, sample.advantage, kl, extra["kl_coef"]) - hypers.hinge_coef * excess**2

    objective, hypers = plug(objective, penalised, hypers)
    descend = minibatch_sgd(objective)

    def update(core, key, learner, batch, hypers, progress):
        learner, metrics = descend(core, key, learner, batch, hypers, progress)
        kl = divergence(batch.dist_old, core.networks.policy(learner.params, batch.obs)).mean()
        metrics["kl_coef"] = learner.extra["kl_coef"]
        kl_coef = adapt_kl_coef(learner.extra["kl_coef"], kl, hypers.kl_target, setup.kl_rule)
        return learner.replace(extra={"kl_coef": kl_coef}), metrics

    return on_policy.make(
        "ppo_kl",
        env,
        setup,
        hypers,
        update=update,
        init_extra=lambda core, hypers: {"kl_coef": jnp.asarray(hypers.kl_coef, jnp.float32)},
        networks=networks,
    )
