"""Lagrange multipliers and temperatures, learned beside the policy by an Adam of their own."""

import jax
import jax.numpy as jnp
import optax
from flax import struct


class Duals(struct.PyTreeNode):
    """values: name -> float32 scalar; see ``step_duals`` for its bound.  opt_state: of their Adam."""

    values: dict[str, jax.Array]
    opt_state: optax.OptState

    def __getitem__(self, name: str) -> jax.Array:
        return self.values[name]


_ADAM = optax.scale_by_adam()


def init_duals(**values) -> Duals:
    """Multipliers that start at these numbers."""
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    return Duals(arrays, _ADAM.init(arrays))


def step_duals(duals: Duals, gradient: dict[str, jax.Array], learning_rate, minimum: float = 0.0) -> Duals:
    """One Adam step down ``gradient``, projected to ``>= minimum``. It moves by about the learning rate, whatever the size."""
    updates, opt_state = _ADAM.update(gradient, duals.opt_state)  # pyright: ignore[reportArgumentType]
    values = jax.tree.map(lambda x, update: jnp.maximum(x - learning_rate * update, minimum), duals.values, updates)
    return Duals(values, opt_state)
