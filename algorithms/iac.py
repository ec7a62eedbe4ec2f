"""IAC, the incremental one-step actor-critic (Sutton and Barto 2018, section 13.5), a baseline of Vasan et al. 2024.

The critic values states, and the actor follows δ ∇log π of the action that was taken, which is not reparametrised. The three
normalisations of AVG are off by default and may be switched on one by one.
"""

import dataclasses
from typing import Literal

import jax

from pgjax.networks import ActorCritic
from pgjax.stepwise import incremental
from pgjax.stepwise.incremental import descend_both, diagnostics, scale_td, value_target
from pgjax.stepwise.incremental_networks import IncrementalNetworks, make_incremental_networks

DEFINING = incremental.DEFINING


@dataclasses.dataclass(frozen=True)
class Setup(incremental.Setup):
    """entropy_bonus: where the entropy enters: of the Gaussian before tanh in the actor's objective (``distribution``, as in
    the authors' code), as -log π of the action that was taken in the reward that the critic values (``sample``), in ``both``,
    or nowhere (``none``). The paper studies four variants so named; how exactly it samples is not known first-hand.
    """

    normalize_obs: bool = False
    penultimate_norm: bool = False
    scaler: Literal["code", "paper", "none"] = "none"
    entropy_bonus: Literal["none", "distribution", "sample", "both"] = "distribution"


class Hypers(incremental.Hypers):
    """alpha: weight of the entropy.

    The numbers were found by the authors with every normalisation on, as the preset ``incremental`` has it.
    """

    learning_rate: jax.Array | float = 2.2e-5
    critic_lr: jax.Array | float = 3.9e-4
    gamma: jax.Array | float = 0.97
    adam_b1: jax.Array | float = 0.9
    alpha: jax.Array | float = 0.8


def iac_objective(log_prob: jax.Array, td_error: jax.Array, entropy: jax.Array, alpha) -> jax.Array:
    """δ log π(a|s) + α H, to be maximised; no gradient flows through δ. ``entropy`` in nats, of the Gaussian before tanh."""
    return jax.lax.stop_gradient(td_error) * log_prob + alpha * entropy


def _networks(env, setup) -> IncrementalNetworks:
    return make_incremental_networks(env, setup, action_value=False)


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers()):  # noqa: B008
    """IAC on ``env``, which needs continuous actions."""
    sampled = setup.entropy_bonus in ("sample", "both")
    in_actor = setup.entropy_bonus in ("distribution", "both")

    def update(core, learner, t, hypers):
        policy, value = core.networks.policy, core.networks.value
        actor, (critic,) = learner.params
        log_prob = policy(actor, t.obs).log_prob(t.action)
        plain_reward = t.reward
        if sampled:
            t = t._replace(reward=t.reward - hypers.alpha * log_prob)
        # Plain rewards, and a return that the authors' code discounts backwards, G <- γ G + r; not the sums of AVG.
        learner, sigma = scale_td(core.setup, learner, plain_reward, t, hypers.gamma, decay=hypers.gamma)
        target = value_target(t, value(critic, t.next_obs), hypers.gamma)

        def critic_loss(critic):
            td_error = target - value(critic, t.obs)
            return (td_error / sigma) ** 2, td_error

        def actor_loss(actor):
            dist = policy(actor, t.obs)
            entropy = dist.base.entropy()
            bonus = hypers.alpha if in_actor else 0.0
            return -iac_objective(dist.log_prob(t.action), td_error / sigma, entropy, bonus), entropy

        (loss_value, td_error), critic_gradient = jax.value_and_grad(critic_loss, has_aux=True)(critic)
        (loss_policy, entropy), actor_gradient = jax.value_and_grad(actor_loss, has_aux=True)(actor)
        gradient = ActorCritic(actor_gradient, (critic_gradient,))
        metrics = {
            "loss_policy": loss_policy,
            "loss_value": loss_value,
            "entropy": -log_prob,
            "entropy_gaussian": entropy,
            **diagnostics(core, learner, t, gradient, td_error, sigma),
        }
        return descend_both(hypers, learner, gradient), metrics

    return incremental.make("iac", env, setup, hypers, update=update, make_networks=_networks)
