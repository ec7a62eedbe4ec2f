"""MDPO-off, Mirror Descent Policy Optimization, off-policy (Tomar et al. 2020, arXiv 2005.09814).

Soft actor-critic whose actor also pays for leaving an older copy of itself. With the coefficient of that divergence equal to
the temperature the copy drops out, and what remains is SAC with a fixed temperature.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from pgjax.distributions import Categorical
from pgjax.errors import RequestError
from pgjax.on_policy import check_counts
from pgjax.stepwise import off_policy
from pgjax.stepwise.soft_critic import Actions, soft_update

DEFINING = ()

# Densities are floored before the logarithm, as in the authors' code.
MIN_DENSITY = 1e-6


@dataclasses.dataclass(frozen=True)
class Setup(off_policy.Setup):
    """critic, actor_value: by default the authors', a state value and the first Q.

    copy_period: gradient updates between two copies of the policy; the first one is made after the first update.
        paper: environment steps / here: updates, which is the same with one update a step and a warm-up of whole periods.
    tsallis_index: of the divergence and of the entropy alike, 1 is the KL and Shannon's.
    act_deterministic: act with the mode after warm-up. paper: not said / authors' code: the mode / here: a sample.
    """

    batch_size: int = 256
    warmup_steps: int = 10_000
    critic: Literal["q", "v"] = "v"
    actor_value: Literal["min", "first"] = "first"
    copy_period: int = 1000
    tsallis_index: float = 1.0
    act_deterministic: bool = False


class Hypers(off_policy.Hypers):
    """temperature: λ, of the entropy.  kl_coef: c = 1/t, of the divergence from the older copy; constant.

    actor_reg: on the squares of mean and log σ. paper: none / authors' code: 1e-3 / here: 0, and 1e-3 in their preset.
    """

    temperature: jax.Array | float = 0.2
    kl_coef: jax.Array | float = 1.0
    actor_reg: jax.Array | float = 0.0


class Older(struct.PyTreeNode):
    """actor: the older copy's vector.  updates: int32, gradient updates so far."""

    actor: jax.Array
    updates: jax.Array


def log_q(log_density: jax.Array, index: float) -> jax.Array:
    """log_q x = (x^(q-1) - 1) / (q - 1) of x given as log x; log x itself at q = 1. ``index`` is q, static.

    The authors' code writes the index as 2 - q.
    """
    return log_density if index == 1 else jnp.expm1((index - 1) * log_density) / (index - 1)


def tsallis_cost(dist, actions: Actions, index: float) -> jax.Array:
    """log_q of the probabilities [N, num_actions], or of the densities of each action dimension, summed [N].

    paper: log_q of the joint density, as far as known / authors' code: dimensions one by one, for which its indices were
    tuned / here: likewise. The same at q = 1.
    """
    if isinstance(dist, Categorical):
        log_density = jax.nn.log_softmax(dist.logits)[..., None]
    else:
        z = (actions.u - dist.mean) * jnp.exp(-dist.log_std)
        gaussian = -0.5 * z**2 - dist.log_std - 0.5 * jnp.log(2 * jnp.pi)
        log_density = gaussian - 2 * (jnp.log(2.0) - actions.u - jax.nn.softplus(-2 * actions.u))
    return log_q(jnp.maximum(log_density, jnp.log(MIN_DENSITY)), index).sum(-1)


def mdpo_policy_loss(cost: jax.Array, cost_old: jax.Array, q: jax.Array, temperature, kl_coef, index: float = 1.0) -> jax.Array:
    """c log_q π + q (λ - c) log_q π_old - Q per sample, to be minimised (eq. 4 with the entropy-regularised advantage)."""
    return kl_coef * cost + index * (temperature - kl_coef) * cost_old - q


def penalty(dist) -> jax.Array:
    """Mean squares of mean and log σ, summed; of logits, for discrete actions."""
    parts = (dist.logits,) if isinstance(dist, Categorical) else (dist.mean, dist.log_std)
    return sum(((part**2).mean() for part in parts), start=jnp.zeros(()))


def init_extra(core, hypers, params) -> Older:
    """The first older copy is the policy of the start."""
    return Older(params.actor, jnp.zeros((), jnp.int32))


def update(core, key, learner, batch, hypers):
    """One gradient step on a minibatch: critics, actor, target copies, older copy; see ``pgjax.stepwise.off_policy.make``."""
    index, older = core.setup.tsallis_index, learner.extra
    dist_old = core.networks.policy(older.actor, batch.obs)

    def cost(dist, actions):
        return tsallis_cost(dist, actions, index)

    def policy_loss(dist, actions, costs, q):
        # Through the sample the gradient reaches the older policy's density too.
        loss = mdpo_policy_loss(costs, cost(dist_old, actions), q, hypers.temperature, hypers.kl_coef, index)
        return loss + hypers.actor_reg * penalty(dist)

    learner, metrics = soft_update(
        core, key, learner, batch, hypers, temperature=hypers.temperature, policy_loss=policy_loss, cost=cost
    )
    actor = learner.params.actor
    kl = core.networks.policy(actor, batch.obs).kl(dist_old)
    copied = jnp.where(older.updates % core.setup.copy_period == 0, actor, older.actor)
    learner = learner.replace(extra=Older(copied, older.updates + 1))
    return learner, {**metrics, "kl_reverse": kl.mean(), "kl_reverse_max": kl.max()}


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, networks=None):  # noqa: B008
    """Off-policy MDPO on ``env``. ``networks`` replaces the built ones: a ``pgjax.stepwise.soft_networks.SoftNetworks``."""
    check_counts(setup, ("copy_period",))
    if not 1 <= setup.tsallis_index <= 2:
        raise RequestError(f"setup.tsallis_index = {setup.tsallis_index} is outside of [1, 2]; 1 is the KL")
    algorithm = off_policy.make(
        "mdpo_off",
        env,
        setup,
        hypers,
        update=update,
        init_extra=init_extra,
        networks=networks,
        act_deterministic=setup.act_deterministic,
    )

    def warm_start(state, policy):
        state = algorithm.warm_start(state, policy)
        # The policy it is not to leave is the one it starts from.
        return state.replace(learner=state.learner.replace(extra=state.learner.extra.replace(actor=policy.actor)))

    return algorithm._replace(warm_start=warm_start)
