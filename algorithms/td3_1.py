"""TD3-1, TD3 (Fujimoto et al. 2018, arXiv 1802.09477) that learns from the last transition alone, a baseline of AVG's paper.

TD3 with a buffer and a batch of one and no warm-up: a deterministic actor that explores by added noise, two Q functions, target
copies of all three, smoothed target actions, and an actor that moves only in every second step.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pgjax.networks import ActorCritic
from pgjax.on_policy import check_counts
from pgjax.stepwise import incremental
from pgjax.stepwise.incremental import descend, diagnostics, scale_td, value_target
from pgjax.stepwise.incremental_networks import IncrementalNetworks, make_incremental_networks
from pgjax.stepwise.soft_critic import polyak

DEFINING = incremental.DEFINING


@dataclasses.dataclass(frozen=True)
class Setup(incremental.Setup):
    """policy_delay: steps of the critics for each one of actor and targets. ``std_param`` has no use here.

    paper: TD3 of vwxyzjn/cleanrl, ReLU and PyTorch's initial values, second-hand / here: the networks of the other methods.
    """

    normalize_obs: bool = False
    penultimate_norm: bool = False
    scaler: Literal["code", "paper", "none"] = "none"
    action_map: Literal["clip_affine"] = "clip_affine"
    policy_delay: int = 2


class Hypers(incremental.Hypers):
    """tau: Polyak weight of the target copies.

    exploration_noise: standard deviation of what is added to actions in [-1, 1].  target_noise: that of the noise on target
    actions, which is clipped to target_noise_clip.
    """

    learning_rate: jax.Array | float = 3e-4
    critic_lr: jax.Array | float = 3e-4
    adam_b1: jax.Array | float = 0.9
    tau: jax.Array | float = 0.005
    exploration_noise: jax.Array | float = 0.1
    target_noise: jax.Array | float = 0.2
    target_noise_clip: jax.Array | float = 0.5


def smoothed(mean: jax.Array, noise: jax.Array, scale, limit) -> jax.Array:
    """clip(μ + clip(scale · noise, ±limit), ±1): a target action near μ [A] in [-1, 1] (eq. 14 of the paper)."""
    return jnp.clip(mean + jnp.clip(scale * noise, -limit, limit), -1.0, 1.0)


def _networks(env, setup) -> IncrementalNetworks:
    return make_incremental_networks(env, setup, num_critics=2, deterministic=True)


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers()):  # noqa: B008
    """TD3-1 on ``env``, which needs continuous actions in finite bounds."""
    check_counts(setup, ["policy_delay"])

    def update(core, learner, t, hypers):
        networks = core.networks

        def mode(actor, obs):
            return networks.policy(actor, obs, hypers.exploration_noise).mode()

        (actor, critics), targets, opt_state = learner.params, learner.extra, learner.opt_state
        learner, sigma = scale_td(core.setup, learner, t.reward, t, hypers.gamma)

        next_mode = mode(targets.actor, t.next_obs)
        next_action = smoothed(next_mode, t.fresh_noise[0], hypers.target_noise, hypers.target_noise_clip)
        next_value = jnp.minimum(*(networks.value(critic, t.next_obs, next_action) for critic in targets.critic))
        target = value_target(t, next_value, hypers.gamma)

        def critic_loss(critics):
            action = networks.squash(t.action)
            td_error = jnp.stack([target - networks.value(critic, t.obs, action) for critic in critics])
            return ((td_error / sigma) ** 2).sum(), td_error[0]

        (loss_value, td_error), critic_gradient = jax.value_and_grad(critic_loss, has_aux=True)(critics)
        critics, critic_state = descend(hypers, critics, opt_state.critic, critic_gradient, hypers.critic_lr)

        def actor_loss(actor):
            return -networks.value(critics[0], t.obs, mode(actor, t.obs))

        loss_policy, actor_gradient = jax.value_and_grad(actor_loss)(actor)
        moved, moved_state = descend(hypers, actor, opt_state.actor, actor_gradient, hypers.learning_rate)
        is_due = (t.env_steps + 1) % core.setup.policy_delay == 0
        moved_targets = polyak(targets, ActorCritic(moved, critics), hypers.tau)
        actor, actor_state, targets = jax.tree.map(
            lambda new, old: jnp.where(is_due, new, old),
            (moved, moved_state, moved_targets),
            (actor, opt_state.actor, targets),
        )
        metrics = {
            "loss_policy": loss_policy,
            "loss_value": loss_value,
            **diagnostics(core, learner, t, ActorCritic(actor_gradient, critic_gradient), td_error, sigma),
        }
        return learner.replace(
            params=ActorCritic(actor, critics), opt_state=ActorCritic(actor_state, critic_state), extra=targets
        ), metrics

    algorithm = incremental.make(
        "td3_1",
        env,
        setup,
        hypers,
        update=update,
        make_networks=_networks,
        num_fresh=1,
        init_extra=lambda core, hypers, params: params,
        noise_scale=lambda hypers: hypers.exploration_noise,
    )

    def warm_start(state, policy):
        state = algorithm.warm_start(state, policy)
        # Else targets would be those of a policy drawn at random, until its copy has caught up.
        return state.replace(learner=state.learner.replace(extra=state.learner.extra._replace(actor=policy.actor)))

    return algorithm._replace(warm_start=warm_start)
