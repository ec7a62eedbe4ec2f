"""SAC, Soft Actor-Critic with a learned temperature (Haarnoja et al. 2018, arXiv 1812.05905).

Off-policy: the actor climbs the smaller of two Q functions plus α times its entropy, and α is the dual variable that holds the
entropy at a target. Version 1 (arXiv 1801.01290) is the same loop with a state value and a fixed α: ``critic = "v"``,
``temperature = "fixed"``. For discrete actions expectations are sums (Christodoulou 2019, arXiv 1910.07207).
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from pgjax.solvers.duals import init_duals, step_duals
from pgjax.spaces import Discrete
from pgjax.stepwise import off_policy
from pgjax.stepwise.soft_critic import draw_actions, expect, log_prob, soft_update

# Its loop has no passes over a batch; what it shares with other methods defines none of it.
DEFINING = ()


@dataclasses.dataclass(frozen=True)
class Setup(off_policy.Setup):
    """temperature: ``auto``, learned from hypers.temperature on, or ``fixed`` at it."""

    temperature: Literal["auto", "fixed"] = "auto"


class Hypers(off_policy.Hypers):
    """temperature: α, at the start or for ever.  temperature_lr: learning rate of log α.

    target_entropy_scale: of the entropy that α holds: nats times -dim(A); for discrete actions times 0.98 log num_actions.
    """

    temperature: jax.Array | float = 1.0
    temperature_lr: jax.Array | float = 3e-4
    target_entropy_scale: jax.Array | float = 1.0


def sac_policy_loss(log_prob: jax.Array, q: jax.Array, temperature) -> jax.Array:
    """α log π(a|s) - Q(s,a) per sample, to be minimised over the reparameterised a (eq. 9 of version 2)."""
    return temperature * log_prob - q


def temperature_loss(log_temperature: jax.Array, log_prob: jax.Array, target_entropy) -> jax.Array:
    """E[-α (log π + H̄)], whose descent raises α where the entropy is below H̄. ``log_prob`` [N], without gradient.

    paper: α / authors' code of 2019: log α in its place / here: α.
    """
    return (-jnp.exp(log_temperature) * jax.lax.stop_gradient(log_prob + target_entropy)).mean()


def target_entropy(action_space, scale) -> jax.Array:
    """H̄ in nats: of the density of actions in [-1, 1]^A, or of probabilities."""
    if isinstance(action_space, Discrete):
        return scale * 0.98 * math.log(action_space.num)
    return -scale * action_space.shape[0]


def init_extra(core, hypers, params):
    """The dual log α; None if it is fixed."""
    if core.setup.temperature == "fixed":
        return None
    # A floor, because a dual that starts at zero could never rise.
    return init_duals(log_temperature=jnp.log(jnp.maximum(hypers.temperature, 1e-8)))


def update(core, key, learner, batch, hypers):
    """One gradient step on a minibatch: critics, actor, temperature, target copies; see ``pgjax.stepwise.off_policy.make``."""
    learns_temperature = learner.extra is not None
    key_step, key_temperature = jax.random.split(key) if learns_temperature else (key, key)
    alpha = jnp.exp(learner.extra["log_temperature"]) if learns_temperature else hypers.temperature
    learner, metrics = soft_update(
        core,
        key_step,
        learner,
        batch,
        hypers,
        temperature=alpha,
        policy_loss=lambda dist, actions, log_prob, q: sac_policy_loss(log_prob, q, alpha),
    )
    if learns_temperature:
        # A fresh sample of the policy that has just been updated, as in the authors' code.
        dist = core.networks.policy(learner.params.actor, batch.obs)
        actions = draw_actions(dist, key_temperature)
        sampled = expect(actions, log_prob(dist, actions))
        target = target_entropy(core.env.action_space, hypers.target_entropy_scale)
        gradient = jax.grad(temperature_loss)(learner.extra["log_temperature"], sampled, target)
        duals = step_duals(learner.extra, {"log_temperature": gradient}, hypers.temperature_lr, minimum=-jnp.inf)
        learner = learner.replace(extra=duals)
    return learner, {**metrics, "temperature": jnp.asarray(alpha)}


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, networks=None):  # noqa: B008
    """SAC on ``env``. ``networks`` replaces the built ones: a ``pgjax.stepwise.soft_networks.SoftNetworks``."""
    return off_policy.make("sac", env, setup, hypers, update=update, init_extra=init_extra, networks=networks)
