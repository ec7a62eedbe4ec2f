"""Networks of the incremental methods: a squashed Gaussian or deterministic actor and one or two critics, of unit features.

Plain matrices and no ravelling: with 256 units and one sample a step waits for the parameters to come from memory, so copying
them together would cost more than the kernels it saves.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pgjax.distributions import DiagGaussian, TanhGaussian
from pgjax.errors import RequestError
from pgjax.networks import ACTIVATIONS, KERNEL_INITS, ActorCritic, choose, draw_kernels, layer_sizes
from pgjax.spaces import Discrete

# Bounds of what the actor gives for the spread.
SPREAD_MIN, SPREAD_MAX = -20.0, 2.0
# Least squared norm that features are divided by. They are all zero where an observation is.
_LEAST_SQUARE = 1e-12


class IncrementalNetworks(NamedTuple):
    """Networks as pure functions. ``...`` stands for any leading axes, also none.

    init: ``key -> ActorCritic``; consumes the key. ``critic`` is a tuple with one tree for each critic.
    policy: ``(actor, obs [..., *O], noise_scale=None) -> distribution`` with batch shape [...] of actions [..., A] before
      ``squash``. A deterministic actor is the mean of a Gaussian, whose standard deviation ``noise_scale`` is exploration.
    value: ``(one critic, obs [..., *O], action=None) -> [...]``: Q of an action [..., A] in [-1, 1], or V without one.
    squash: actions before to actions in [-1, 1]: tanh, or a clip for the deterministic actor, whose mean is one already.
    """

    init: Callable[[jax.Array], ActorCritic]
    policy: Callable[..., TanhGaussian | DiagGaussian]
    value: Callable[..., jax.Array]
    squash: Callable[[jax.Array], jax.Array]


def make_incremental_networks(
    env, setup, *, num_critics: int = 1, action_value: bool = True, deterministic: bool = False
) -> IncrementalNetworks:
    """Builds actor and critics for an environment's spaces.

    Every layer starts orthogonal of gain 1 (or as ``setup.kernel_init`` says), biases at zero.

    Args:
      env: its action space must be a Box of shape (A,).
      setup: ``hidden_sizes``, ``activation``, ``kernel_init``; ``penultimate_norm``, whether the last hidden features of all
        networks have length one; ``std_param``: σ = exp(h/2) or exp(h) of the actor's output h, clipped to [-20, 2].
      num_critics: of equal shape.  action_value: whether they value actions too.
      deterministic: an actor tanh(μ) without spread.

    Raises: RequestError for a field that does not fit, naming it, its value and the remedy.
    Source: Vasan et al. 2024, arXiv 2411.15370; the unit features after Bjorck et al. 2022.
    """
    choose("activation", setup.activation, ACTIVATIONS)
    choose("kernel_init", setup.kernel_init, KERNEL_INITS)
    hidden_sizes = layer_sizes("hidden_sizes", setup.hidden_sizes)
    if isinstance(env.action_space, Discrete):
        raise RequestError(f"{env.name} has discrete actions, and this method needs continuous ones; use another environment")
    if len(env.action_space.shape) != 1:
        raise RequestError(f"action_space.shape = {env.action_space.shape} is not of rank 1; flatten actions to (A,)")
    obs_shape, (num_actions,) = env.observation_space.shape, env.action_space.shape
    obs_size, activation = math.prod(obs_shape), ACTIVATIONS[setup.activation]

    def shapes(size: int, **heads: int) -> dict[str, Any]:
        """(F_in, F_out) of every layer of one network."""
        sizes = (size, *hidden_sizes)
        hidden = [(before, after) for before, after in zip(sizes, hidden_sizes, strict=False)]
        return {"hidden": hidden, **{name: (sizes[-1], width) for name, width in heads.items()}}

    spread = {} if deterministic else {"spread": num_actions}
    layers = ActorCritic(
        shapes(obs_size, mean=num_actions, **spread),
        tuple(shapes(obs_size + num_actions * action_value, value=1) for _ in range(num_critics)),
    )

    def init(key: jax.Array) -> ActorCritic:
        fans, structure = jax.tree.flatten(layers, is_leaf=lambda x: isinstance(x, tuple) and all(type(n) is int for n in x))
        kernels = draw_kernels(key, fans, setup.kernel_init)
        return jax.tree.unflatten(structure, [{"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in kernels])

    def features(hidden, x: jax.Array) -> jax.Array:
        for layer in hidden:
            x = activation(dense(layer, x))
        if not setup.penultimate_norm:
            return x
        # paper: divided by the norm / authors' code: the same, NaN where it is zero / here: a floor, also in the gradient.
        square = jnp.sum(x**2, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(square, _LEAST_SQUARE))

    def flat(obs: jax.Array) -> jax.Array:
        return obs.reshape(*obs.shape[: obs.ndim - len(obs_shape)], obs_size)

    def policy(actor, obs: jax.Array, noise_scale: Any = None) -> TanhGaussian | DiagGaussian:
        x = features(actor["hidden"], flat(obs))
        mean = dense(actor["mean"], x)
        if deterministic:
            return DiagGaussian(jnp.tanh(mean), jnp.broadcast_to(jnp.log(noise_scale), mean.shape).astype(mean.dtype))
        # paper: σ = exp(h) / authors' code: h goes where a covariance is wanted, so exp(h) is σ² / here: the code's by
        # default, because every published number was tuned with it.
        h = jnp.clip(dense(actor["spread"], x), SPREAD_MIN, SPREAD_MAX)
        return TanhGaussian(mean, h / 2 if setup.std_param == "exp_half" else h)

    def value(critic, obs: jax.Array, action: jax.Array | None = None) -> jax.Array:
        x = flat(obs)
        x = x if action is None else jnp.concatenate([x, action], axis=-1)
        return dense(critic["value"], features(critic["hidden"], x))[..., 0]

    return IncrementalNetworks(init, policy, value, (lambda u: jnp.clip(u, -1.0, 1.0)) if deterministic else jnp.tanh)


def dense(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """x [..., F_in] W + b, [..., F_out]."""
    out = x @ layer["kernel"]
    return out + layer["bias"].reshape((1,) * (out.ndim - 1) + (-1,))
