"""Networks of the soft actor-critic family: a squashed Gaussian or categorical actor, two Q functions, and V if asked for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from pgjax.distributions import Categorical, TanhGaussian
from pgjax.errors import RequestError
from pgjax.networks import ACTIVATIONS, KERNEL_INITS, ActorCritic, Torso, choose, draw_kernels, layer_sizes, resolve_torso
from pgjax.spaces import Box, Discrete, Space

# Bounds of log σ.
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
NUM_CRITICS = 2


class SoftNetworks(NamedTuple):
    """Networks as pure functions. N stands for any leading axes.

    init: ``key -> ActorCritic``; consumes the key. ``critic`` is ``{"q": ..., "v": ...}``, without ``v`` if there is none.
    policy: ``(actor, obs [N, *O]) -> distribution`` with batch shape [N]: a ``TanhGaussian`` or a ``Categorical``.
    q: ``(q, obs, action) -> [2, N]`` for actions [N, A] in [-1, 1]; for discrete ones ``[2, N, num_actions]``, all actions
      at once, and ``action`` is not read.
    v: ``(v, obs) -> [N]``.
    """

    init: Callable[[jax.Array], ActorCritic]
    policy: Callable[[Any, jax.Array], TanhGaussian | Categorical]
    q: Callable[[Any, jax.Array, jax.Array | None], jax.Array]
    v: Callable[[Any, jax.Array], jax.Array]


def make_soft_networks(
    observation_space: Box,
    action_space: Space,
    *,
    state_value: bool = False,
    hidden_sizes: tuple[int, ...] | None = None,
    critic_hidden_sizes: tuple[int, ...] | None = None,
    activation: str = "relu",
    kernel_init: str = "glorot_uniform",
) -> SoftNetworks:
    """Builds actor and critics for a pair of spaces; biases start at zero.

    Discrete actions with observations [H, W, C] get the convolution of ``make_networks``; otherwise these are flattened.

    Args:
      state_value: whether there is a V besides the two Q.
      hidden_sizes: widths of the dense layers; None means (256, 256).  critic_hidden_sizes: None means ``hidden_sizes``.
      activation: a key of ``ACTIVATIONS``.  kernel_init: one of ``KERNEL_INITS``, for every layer; orthogonal is scaled by √2
        in hidden layers.

    Raises: RequestError for a field that does not fit, naming it, its value and the remedy.
    Source: Haarnoja et al. 2018, arXiv 1812.05905, and its code: log σ of each state, clipped to [-20, 2].
    """
    choose("activation", activation, ACTIVATIONS)
    choose("kernel_init", kernel_init, KERNEL_INITS)
    hidden_sizes = layer_sizes("hidden_sizes", (256, 256) if hidden_sizes is None else hidden_sizes)
    critic_hidden_sizes = (
        hidden_sizes if critic_hidden_sizes is None else layer_sizes("critic_hidden_sizes", critic_hidden_sizes)
    )
    discrete = isinstance(action_space, Discrete)
    if not discrete and len(action_space.shape) != 1:
        raise RequestError(f"action_space.shape = {action_space.shape} is not of rank 1; flatten actions to (A,)")
    convolution = discrete and resolve_torso("auto", observation_space.shape) == "cnn"
    obs_rank = len(observation_space.shape)

    def torso(sizes, rank=obs_rank):
        return Torso(rank, sizes, ACTIVATIONS[activation], convolution)

    policy_head = nn.Dense(action_space.num if discrete else 2 * action_space.shape[0])
    q_head = nn.Dense(action_space.num if discrete else 1)
    actor_torso, v_torso, v_head = torso(hidden_sizes), torso(critic_hidden_sizes), nn.Dense(1)
    q_torso = torso(critic_hidden_sizes, obs_rank if discrete else 1)

    def q_input(obs, action):
        if discrete:
            return obs
        return jnp.concatenate([obs.reshape(*obs.shape[: obs.ndim - obs_rank], -1), action], axis=-1)

    def shapes() -> ActorCritic:
        """What ``init`` returns, with Flax's own initial values."""
        key, obs = jax.random.key(0), jnp.zeros(observation_space.shape)

        def network(torso, head, x):
            features, params = torso.init_with_output(key, x)
            return {"torso": params, "head": head.init(key, features)}

        actor = network(actor_torso, policy_head, obs)
        both = q_input(obs, jnp.zeros(action_space.shape))
        critic = {"q": [network(q_torso, q_head, both) for _ in range(NUM_CRITICS)]}
        return ActorCritic(actor, critic | ({"v": network(v_torso, v_head, obs)} if state_value else {}))

    def init(key: jax.Array) -> ActorCritic:
        leaves, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(shapes))
        kernels = iter(draw_kernels(key, [leaf.shape for path, leaf in leaves if path[-1].key == "kernel"], kernel_init))

        def first_value(path, leaf):
            if path[-1].key != "kernel":
                return jnp.zeros(leaf.shape, leaf.dtype)
            in_torso = any(getattr(part, "key", None) == "torso" for part in path)
            return next(kernels) * (2**0.5 if kernel_init == "orthogonal" and in_torso else 1.0)

        return jax.tree.unflatten(structure, [first_value(path, leaf) for path, leaf in leaves])

    def policy(actor, obs):
        out = policy_head.apply(actor["head"], actor_torso.apply(actor["torso"], obs))
        if discrete:
            return Categorical(jnp.asarray(out))
        mean, log_std = jnp.split(jnp.asarray(out), 2, axis=-1)
        return TanhGaussian(mean, jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX))

    def q(params, obs, action):
        x = q_input(obs, action)
        # One after the other: a CPU multiplies two matrices faster than a stack of two.
        out = jnp.stack([jnp.asarray(q_head.apply(one["head"], q_torso.apply(one["torso"], x))) for one in params])
        return out if discrete else out[..., 0]

    def v(params, obs):
        return jnp.asarray(v_head.apply(params["head"], v_torso.apply(params["torso"], obs)))[..., 0]

    return SoftNetworks(init, policy, q, v)


class RavelledNetworks(NamedTuple):
    """``SoftNetworks`` over vectors: of the actor, of all critics, and of the critics that have a target copy.

    init: ``key -> ActorCritic`` of two vectors.  target_of: ``critic -> target``.
    policy, q, v: as in ``SoftNetworks``, of ``actor`` or ``critic``.  target_q, target_v: of ``target``, whichever it holds.
    """

    init: Callable[[jax.Array], ActorCritic]
    target_of: Callable[[jax.Array], jax.Array]
    policy: Callable[[jax.Array, jax.Array], TanhGaussian | Categorical]
    q: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
    v: Callable[[jax.Array, jax.Array], jax.Array]
    target_q: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
    target_v: Callable[[jax.Array, jax.Array], jax.Array]


def ravelled(networks: SoftNetworks, copied: str) -> RavelledNetworks:
    """``networks`` over ravelled parameters. ``copied``: which critics have a target copy, ``q`` or ``v``."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(networks.init, jax.random.key(0)))
    if copied not in zeros.critic:
        raise RequestError(f"setup.critic = {copied!r} needs networks with {copied!r} in their critic; these have none")
    unravel_actor, unravel_critic = ravel_pytree(zeros.actor)[1], ravel_pytree(zeros.critic)[1]
    unravel_target = ravel_pytree(zeros.critic[copied])[1]

    def init(key):
        params = networks.init(key)
        return ActorCritic(ravel_pytree(params.actor)[0], ravel_pytree(params.critic)[0])

    return RavelledNetworks(
        init=init,
        target_of=lambda critic: ravel_pytree(unravel_critic(critic)[copied])[0],
        policy=lambda actor, obs: networks.policy(unravel_actor(actor), obs),
        q=lambda critic, obs, action: networks.q(unravel_critic(critic)["q"], obs, action),
        v=lambda critic, obs: networks.v(unravel_critic(critic)["v"], obs),
        target_q=lambda target, obs, action: networks.q(unravel_target(target), obs, action),
        target_v=lambda target, obs: networks.v(unravel_target(target), obs),
    )
