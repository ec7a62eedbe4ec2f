"""From the policy's action space to the environment's: named maps, owned by the policy.

Batches, buffers and log-probabilities keep the policy's action; only what the environment receives is mapped.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.errors import RequestError, close_names
from pgjax.spaces import Discrete, Space

ActionMap = Callable[[jax.Array], jax.Array]

_BOX_MAPS = ("clip", "clip_affine", "tanh_affine", "tanh_clip")
ACTION_MAPS = (*_BOX_MAPS, "identity")


def make_action_map(name: str, action_space: Space) -> ActionMap:
    """The named map as a function ``u [..., *A] -> action [..., *A]`` within the bounds of ``action_space``.

    ========================  =================================================================
    ``clip``                  clip(u, low, high); the identity where unbounded
    ``clip_affine``           clip(u, -1, 1), then affine from [-1, 1] to [low, high]
    ``tanh_affine``           tanh(u), then affine from [-1, 1] to [low, high]
    ``tanh_clip``             clip(tanh(u), low, high), without rescaling
    ``identity``              for discrete actions
    ========================  =================================================================

    Args:
      name: one of ``ACTION_MAPS``.
      action_space: a Box for the first four, a Discrete for ``identity``.

    Raises:
      RequestError: unknown name; a map that does not fit the space; an affine map on a space with an infinite bound.
    """
    if name not in ACTION_MAPS:
        raise RequestError(f"action_map = {name!r} is unknown; {close_names(name, ACTION_MAPS)}")
    if isinstance(action_space, Discrete):
        if name != "identity":
            raise RequestError(f"action_map = {name!r} does not fit discrete actions; use 'identity'")
        return lambda action: action
    if name == "identity":
        raise RequestError(f"action_map = 'identity' is for discrete actions; for a Box use {', '.join(_BOX_MAPS)}")

    low, high = action_space.bounds
    affine = name.endswith("affine")
    if affine and not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise RequestError(f"action_map = {name!r} needs finite bounds, the action space has none; use 'clip'")
    squash = {"clip": lambda u: u, "clip_affine": lambda u: jnp.clip(u, -1.0, 1.0)}.get(name, jnp.tanh)

    def action_map(action: jax.Array) -> jax.Array:
        def fill(bound):
            return jnp.broadcast_to(jnp.asarray(bound, action.dtype), action.shape)

        action = squash(action)
        if affine:  # halved before adding, because high - low may exceed float32
            action = fill(low / 2 + high / 2) + fill(high / 2 - low / 2) * action
        return jnp.clip(action, fill(low), fill(high))  # after an affine map this takes off the rounding

    return action_map
