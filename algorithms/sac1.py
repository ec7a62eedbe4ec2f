"""SAC-1, soft actor-critic that learns from the last transition alone, a baseline of Vasan et al. 2024 (arXiv 2411.15370).

SAC with a buffer and a batch of one: two Q functions with target copies, a learned temperature, and the order of its steps,
critics, actor, temperature, targets. The three normalisations of AVG are off by default and may be switched on one by one.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from pgjax.algorithms.avg import avg_policy_loss
from pgjax.algorithms.sac import temperature_loss
from pgjax.networks import ActorCritic
from pgjax.stepwise import incremental
from pgjax.stepwise.incremental import descend, diagnostics, scale_td, value_target
from pgjax.stepwise.incremental_networks import IncrementalNetworks, make_incremental_networks
from pgjax.stepwise.soft_critic import polyak

DEFINING = incremental.DEFINING


@dataclasses.dataclass(frozen=True)
class Setup(incremental.Setup):
    """See ``pgjax.stepwise.incremental.Setup``; without the normalisations of AVG by default."""

    normalize_obs: bool = False
    penultimate_norm: bool = False
    scaler: Literal["code", "paper", "none"] = "none"


class Hypers(incremental.Hypers):
    """temperature: α at the start.  temperature_lr: learning rate of log α.  tau: Polyak weight of the target copies.

    The authors' example, but for γ, which was 1 there and is in the preset ``incremental``.
    """

    learning_rate: jax.Array | float = 8.2e-5
    critic_lr: jax.Array | float = 2.9e-5
    temperature: jax.Array | float = 0.1
    temperature_lr: jax.Array | float = 0.02
    tau: jax.Array | float = 0.005


def _networks(env, setup) -> IncrementalNetworks:
    return make_incremental_networks(env, setup, num_critics=2)


def _temperature_adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=0.5, b2=0.999, eps=1e-8)


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers()):  # noqa: B008
    """SAC-1 on ``env``, which needs continuous actions. The temperature holds the entropy at -dim(A)."""

    def init_extra(core, hypers, params):
        # A floor, because a temperature that starts at zero could never rise.
        log_temperature = jnp.log(jnp.maximum(hypers.temperature, 1e-8))
        return {
            "target": params.critic,
            "log_temperature": log_temperature,
            "temperature_state": _temperature_adam().init(log_temperature),
        }

    def update(core, learner, t, hypers):
        policy, squash = core.networks.policy, core.networks.squash

        def q(critics, obs, action):
            return [core.networks.value(critic, obs, squash(action)) for critic in critics]

        (actor, critics), extra = learner.params, learner.extra
        alpha = jnp.exp(extra["log_temperature"])
        log_prob = policy(actor, t.obs).log_prob(t.action)
        learner, sigma = scale_td(core.setup, learner, t.reward - alpha * log_prob, t, hypers.gamma)

        dist = policy(actor, t.next_obs)
        next_action = dist.sample_with(t.fresh_noise[0])
        next_value = jnp.minimum(*q(extra["target"], t.next_obs, next_action)) - alpha * dist.log_prob(next_action)
        target = value_target(t, next_value, hypers.gamma)

        def critic_loss(critics):
            td_error = target - jnp.stack(q(critics, t.obs, t.action))
            return ((td_error / sigma) ** 2).sum(), td_error[0]

        (loss_value, td_error), critic_gradient = jax.value_and_grad(critic_loss, has_aux=True)(critics)
        opt_state = learner.opt_state
        critics, critic_state = descend(hypers, critics, opt_state.critic, critic_gradient, hypers.critic_lr)

        def actor_loss(actor):
            # A new action, valued by the critics that have just moved.
            dist = policy(actor, t.obs)
            action = dist.sample_with(t.fresh_noise[1])
            log_prob = dist.log_prob(action)
            # Not the least entry of an array, whose gradient goes to those that equal it: none, and then 0/0, where the
            # compiler computes the values a second time and rounds them otherwise. Seen on a CPU.
            least = jnp.minimum(*q(critics, t.obs, action))
            return avg_policy_loss(log_prob, least, alpha), (log_prob, dist.base.entropy())

        (loss_policy, (log_prob_new, entropy)), actor_gradient = jax.value_and_grad(actor_loss, has_aux=True)(actor)
        actor, actor_state = descend(hypers, actor, opt_state.actor, actor_gradient, hypers.learning_rate)

        target_entropy = -env.action_space.shape[0]
        slope = jax.grad(temperature_loss)(extra["log_temperature"], log_prob_new, target_entropy)
        move, temperature_state = _temperature_adam().update(slope, extra["temperature_state"])
        log_temperature = extra["log_temperature"] - hypers.temperature_lr * move

        metrics = {
            "loss_policy": loss_policy,
            "loss_value": loss_value,
            "entropy": -log_prob,
            "entropy_gaussian": entropy,
            "temperature": alpha,
            **diagnostics(core, learner, t, ActorCritic(actor_gradient, critic_gradient), td_error, sigma),
        }
        return learner.replace(
            params=ActorCritic(actor, critics),
            opt_state=ActorCritic(actor_state, critic_state),
            extra={
                "target": polyak(extra["target"], critics, hypers.tau),
                "log_temperature": log_temperature,
                "temperature_state": temperature_state,
            },
        ), metrics

    return incremental.make(
        "sac1", env, setup, hypers, update=update, make_networks=_networks, num_fresh=2, init_extra=init_extra
    )
