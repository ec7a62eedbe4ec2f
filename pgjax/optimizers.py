"""Ravelled parameters, and optimisers over them, rebuilt from traced numbers wherever they are needed.

One vector for the actor and one for the critic: every operation on parameters costs a kernel per array, to compile and to
start, and a network has a dozen arrays. Measured on a CPU with two 64-unit tanh layers and minibatches of 128, ravelling
saves a quarter of a gradient step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from pgjax.networks import ActorCritic, Networks


def adam(hypers) -> optax.GradientTransformation:
    """Adam without learning rate: its updates are to be subtracted, scaled."""
    # An eps of 0 would make 0/0 of a gradient that is exactly 0.
    return optax.scale_by_adam(b1=hypers.adam_b1, b2=hypers.adam_b2, eps=jnp.maximum(hypers.adam_eps, 1e-30))


def make_optimizer(setup, hypers) -> optax.GradientTransformation:
    """The optimiser that ``setup.optimizer`` names, without learning rate: its updates are to be subtracted, scaled."""
    match setup.optimizer:
        case "adam":
            return adam(hypers)
        case "rmsprop":
            return optax.scale_by_rms(hypers.rmsprop_decay, hypers.rmsprop_eps, initial_scale=1.0, eps_in_sqrt=True)
        case "rmsprop_torch":
            return optax.scale_by_rms(hypers.rmsprop_decay, hypers.rmsprop_eps, initial_scale=0.0, eps_in_sqrt=False)
    raise AssertionError(setup.optimizer)


def ravelled(networks: Networks) -> tuple[Networks, Callable[[ActorCritic], ActorCritic]]:
    """``networks`` over ravelled parameters, and the function that gives the trees back."""
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    unravel_actor, unravel_critic = ravel_pytree(zeros.actor)[1], ravel_pytree(zeros.critic)[1]

    def unravel(flat: ActorCritic) -> ActorCritic:
        # The policy needs no critic, and is handed out without one.
        return ActorCritic(unravel_actor(flat.actor), None if flat.critic is None else unravel_critic(flat.critic))

    def init(key):
        params = networks.init(key)
        return ActorCritic(ravel_pytree(params.actor)[0], ravel_pytree(params.critic)[0])

    last_layer = networks.last_layer
    return Networks(
        init=init,
        policy=lambda flat, obs: networks.policy(unravel(flat), obs),
        value=lambda flat, obs: networks.value(unravel(flat), obs),
        last_layer=last_layer and (lambda flat, obs: last_layer(unravel(flat), obs)),
    ), unravel


def init_opt_state(setup, hypers, params: ActorCritic) -> ActorCritic:
    """One optimiser state for the actor and one for the critic."""
    optimizer = make_optimizer(setup, hypers)
    return ActorCritic(optimizer.init(params.actor), optimizer.init(params.critic))


def clip_gradient(setup, hypers, gradient: ActorCritic) -> tuple[ActorCritic, jax.Array]:
    """``(clipped gradient, joint norm before clipping)``. As ``gradient_clip`` says, to ``max_grad_norm``."""
    square = jax.tree.map(lambda g: (g**2).sum(), gradient)
    norm = jnp.sqrt(square.actor + square.critic)
    limit = hypers.max_grad_norm

    def shrink(vector, norm):
        return vector * jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))

    match setup.gradient_clip:
        case "joint":
            gradient = jax.tree.map(lambda g: shrink(g, norm), gradient)
        case "separate":
            gradient = jax.tree.map(lambda g, s: shrink(g, jnp.sqrt(s)), gradient, square)
        case "elementwise":
            gradient = jax.tree.map(lambda g: jnp.clip(g, -limit, limit), gradient)
    return gradient, norm


def descend(setup, hypers, params: ActorCritic, opt_state: ActorCritic, gradient: ActorCritic, learning_rate):
    """One optimiser step down ``gradient`` on ravelled ``params``; returns ``(params, opt_state)``."""
    optimizer = make_optimizer(setup, hypers)
    rates = ActorCritic(learning_rate, learning_rate * hypers.critic_lr_scale)
    stepped = [optimizer.update(g, s) for g, s in zip(gradient, opt_state, strict=True)]
    params = ActorCritic(*(p - rate * u for p, rate, (u, _) in zip(params, rates, stepped, strict=True)))
    return params, ActorCritic(*(s for _, s in stepped))
