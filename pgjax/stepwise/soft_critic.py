"""What soft actor-critics share: expectations over a policy's actions, two Q functions, their targets, one gradient step.

A paper's file brings the loss of its policy and what it calls the cost of a probable action, log π in soft actor-critic. The
step then comes in two forms: with target copies of the two Q (SAC, version 2), or with a state value V and its copy (SAC,
version 1, and off-policy MDPO).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pgjax.distributions import Categorical, TanhGaussian
from pgjax.networks import ActorCritic
from pgjax.optimizers import adam
from pgjax.types import PyTree


class Actions(NamedTuple):
    """Actions of a policy at N states, to take expectations over.

    Continuous: one reparameterised sample each. u [N, A] before tanh, action [N, A] = tanh(u), prob None.
    Discrete: all actions at once. prob [N, num_actions], the others None.
    """

    u: Any
    action: Any
    prob: Any


def draw_actions(dist: TanhGaussian | Categorical, key: jax.Array) -> Actions:
    """Actions of ``dist``, differentiable in it; consumes ``key``, which discrete ones do not need."""
    if isinstance(dist, Categorical):
        return Actions(None, None, jax.nn.softmax(dist.logits))
    u = dist.sample(key)
    return Actions(u, jnp.tanh(u), None)


def expect(actions: Actions, x: jax.Array) -> jax.Array:
    """E[x] at each state, [N]: of x [N] at the sample, or of x [N, num_actions] exactly."""
    return x if actions.prob is None else (actions.prob * x).sum(-1)


def log_prob(dist: TanhGaussian | Categorical, actions: Actions) -> jax.Array:
    """log π of these actions: [N] density of those in [-1, 1], or [N, num_actions]."""
    return jax.nn.log_softmax(dist.logits) if isinstance(dist, Categorical) else dist.log_prob(actions.u)


def bellman_target(reward: jax.Array, terminated: jax.Array, next_value: jax.Array, gamma) -> jax.Array:
    """y = r + γ (1 - terminated) V(s') [N], without gradient. ``next_value`` [N] is of the successor before any reset."""
    return jax.lax.stop_gradient(reward + gamma * jnp.where(terminated, 0.0, next_value))


def polyak(target: PyTree, online: PyTree, tau) -> PyTree:
    """(1 - τ) target + τ online, of trees."""
    return jax.tree.map(lambda old, new: (1 - tau) * old + tau * new, target, online)


def taken(q: jax.Array, action: jax.Array) -> jax.Array:
    """Q of the actions that were taken, [2, N]: ``q`` itself, or from [2, N, num_actions] the entries of action [N]."""
    if q.ndim == 2:
        return q
    return jnp.where(jax.nn.one_hot(action, q.shape[-1], dtype=bool), q, 0.0).sum(-1)


def soft_update(
    core,
    key: jax.Array,
    learner,
    batch,
    hypers,
    *,
    temperature: jax.Array,
    policy_loss: Callable[[TanhGaussian | Categorical, Actions, jax.Array, jax.Array], jax.Array],
    cost: Callable[[TanhGaussian | Categorical, Actions], jax.Array] = log_prob,
):
    """One gradient step of critics, actor and target copies on a minibatch; see the module.

        y_Q = ρ r + γ (1 - d) V(s'),  V(s') = E_a'[min_j Q̄_j(s',a') - α cost(a'|s')]  or  V̄(s')
        y_V =                                  E_a [min_j Q_j(s, a) - α cost(a |s )]
        J_Q = Σ_j ½ (Q_j(s,a) - y_Q)²,  J_V = ½ (V(s) - y_V)²,  J_π = E_a[policy_loss(a)]

    Without V the critics step first and the actor follows with the new ones; with V all gradients are of the parameters
    before the step, and y_V and J_π share one sample.

    Args:
      batch: ``Transition`` [N], observations normalised.  temperature: α.
      policy_loss: ``(dist, actions, cost, q) -> [N]`` or ``[N, num_actions]``, to be minimised; q is min_j Q_j or Q_1.
      cost: ``(dist, actions) -> [N]`` or ``[N, num_actions]``.
    Returns: ``(learner, metrics)``.
    Source: Haarnoja et al. 2018, arXiv 1812.05905 (two Q) and 1801.01290 (with V).
    """
    setup, networks = core.setup, core.networks
    key_next, key_policy = jax.random.split(key)
    params, opt_state, optimizer = learner.params, learner.opt_state, adam(hypers)
    reward = hypers.reward_scale * batch.reward

    def soft_value(actions, costs, q):
        return expect(actions, q.min(0) - temperature * costs)

    def actor_loss(actor, critic):
        dist = networks.policy(actor, batch.obs)
        actions = draw_actions(dist, key_policy)
        costs, q = cost(dist, actions), networks.q(critic, batch.obs, actions.action)
        loss = expect(actions, policy_loss(dist, actions, costs, q[0] if setup.actor_value == "first" else q.min(0))).mean()
        value = soft_value(actions, costs, q)
        return loss, (value, {"entropy": -expect(actions, log_prob(dist, actions)).mean(), "q_value": q.mean()})

    def critic_loss(critic, y_q, y_v):
        q = taken(networks.q(critic, batch.obs, batch.action), batch.action)
        loss = 0.5 * ((q - y_q[None]) ** 2).sum(0).mean()
        return loss if y_v is None else loss + 0.5 * ((networks.v(critic, batch.obs) - y_v) ** 2).mean()

    def step(which, gradient, learning_rate):
        updates, state = optimizer.update(gradient, getattr(opt_state, which))
        return getattr(params, which) - learning_rate * updates, state

    actor_gradient = jax.value_and_grad(actor_loss, has_aux=True)
    if setup.critic == "q":
        dist = networks.policy(params.actor, batch.final_obs)
        actions = draw_actions(dist, key_next)
        next_value = soft_value(
            actions, cost(dist, actions), networks.target_q(learner.target, batch.final_obs, actions.action)
        )
        y_q, y_v = bellman_target(reward, batch.terminated, next_value, hypers.gamma), None
    else:
        (loss_policy, (value, said)), gradient_actor = actor_gradient(params.actor, params.critic)
        next_value = networks.target_v(learner.target, batch.final_obs)
        y_q, y_v = bellman_target(reward, batch.terminated, next_value, hypers.gamma), jax.lax.stop_gradient(value)

    loss_value, gradient_critic = jax.value_and_grad(critic_loss)(params.critic, y_q, y_v)
    critic, critic_state = step("critic", gradient_critic, hypers.learning_rate * hypers.critic_lr_scale)
    if setup.critic == "q":
        (loss_policy, (_, said)), gradient_actor = actor_gradient(params.actor, critic)
    actor, actor_state = step("actor", gradient_actor, hypers.learning_rate)

    learner = learner.replace(
        params=ActorCritic(actor, critic),
        opt_state=ActorCritic(actor_state, critic_state),
        target=polyak(learner.target, networks.target_of(critic), hypers.tau),
    )
    grad_norm = jnp.sqrt((gradient_actor**2).sum() + (gradient_critic**2).sum())
    return learner, {"loss_policy": loss_policy, "loss_value": loss_value, "grad_norm": grad_norm, **said}
