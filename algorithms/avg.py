"""AVG, Action Value Gradient (Vasan et al. 2024, arXiv 2411.15370).

Soft actor-critic without replay, target network or batch: every transition gives the actor and its one critic a gradient step
and is forgotten. Three normalisations keep that stable: of observations, of the last hidden features, and of TD errors.
"""

import dataclasses

import jax

from pgjax.networks import ActorCritic
from pgjax.stepwise import incremental
from pgjax.stepwise.incremental import descend_both, diagnostics, scale_td, value_target
from pgjax.stepwise.incremental_networks import make_incremental_networks

DEFINING = incremental.DEFINING


@dataclasses.dataclass(frozen=True)
class Setup(incremental.Setup):
    """See ``pgjax.stepwise.incremental.Setup``; with normalisations switched off it is one of the paper's ablations."""


class Hypers(incremental.Hypers):
    """alpha: weight of the entropy, in reward units per nat; constant."""

    alpha: jax.Array | float = 0.07


def avg_policy_loss(log_prob: jax.Array, q: jax.Array, alpha) -> jax.Array:
    """α log π(a|s) - Q(s, a), to be minimised over the actor that made a of its noise."""
    return alpha * log_prob - q


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers()):  # noqa: B008
    """AVG on ``env``, which needs continuous actions."""

    def update(core, learner, t, hypers):
        policy, q, squash = core.networks.policy, core.networks.value, core.networks.squash
        actor, (critic,) = learner.params
        log_prob = policy(actor, t.obs).log_prob(t.action)
        learner, sigma = scale_td(core.setup, learner, t.reward - hypers.alpha * log_prob, t, hypers.gamma)

        dist = policy(actor, t.next_obs)
        next_action = dist.sample_with(t.fresh_noise[0])
        next_value = q(critic, t.next_obs, squash(next_action)) - hypers.alpha * dist.log_prob(next_action)
        target = value_target(t, next_value, hypers.gamma)

        def critic_loss(critic):
            td_error = target - q(critic, t.obs, squash(t.action))
            return (td_error / sigma) ** 2, td_error

        def actor_loss(actor):
            # The noise of the executed action: it is not drawn again.
            dist = policy(actor, t.obs)
            action = dist.sample_with(t.noise)
            return avg_policy_loss(dist.log_prob(action), q(critic, t.obs, squash(action)), hypers.alpha), dist.base.entropy()

        # Both at the parameters from before the step.
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

    return incremental.make("avg", env, setup, hypers, update=update, make_networks=make_incremental_networks, num_fresh=1)
