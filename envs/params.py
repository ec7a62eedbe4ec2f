"""Environment parameters by name, for sweeps and the command line."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pgjax.errors import RequestError, close_names

PyTree = Any
_TIME_LIMITS = ("max_steps_in_episode", "max_episode_steps")


def change_params(env, changes: Mapping[str, Any]) -> PyTree:
    """The default parameters of ``env`` with some of them changed.

    Values take the type and shape of what they replace (a number is repeated where an array stood), so that a program
    compiled for the defaults serves them too. They may be traced. Nothing is derived from a change: gymnax's CartPole,
    for one, keeps ``total_mass`` when ``masspole`` is changed.

    Args:
        env: an ``Environment``.
        changes: field name -> value; a dot leads into a nested field, as in ``"sys.opt.timestep"``.

    Raises:
        RequestError: unknown field, a value that does not fit it, or a time limit above ``env.max_episode_steps``.
    """
    params = env.default_params
    for path, value in changes.items():
        if path in _TIME_LIMITS and not isinstance(value, Tracer) and np.max(value) > env.max_episode_steps:
            raise RequestError(
                f"{path} = {value} is above the limit that {env.name} was made with, {env.max_episode_steps}; "
                f"make it with episode_length = {value}"
            )
        params = _replace(params, path, path, value)
    return params


def _replace(node: PyTree, rest: str, path: str, value: Any) -> PyTree:
    field, _, rest = rest.partition(".")
    fields = _fields(node)
    if field not in fields:
        known = f": {close_names(field, fields)}" if fields else ", there are no fields here"
        raise RequestError(f"environment parameter {path!r} is unknown{known}")
    old = fields[field]
    if rest or _fields(old):
        if not rest:
            below = ", ".join(sorted(_fields(old)))
            raise RequestError(f"environment parameter {path!r} has fields of its own: {below}")
        new = _replace(old, rest, path, value)
    else:
        new = _fit(old, path, value)
    if isinstance(node, dict):
        return {**node, field: new}
    return node._replace(**{field: new}) if hasattr(node, "_replace") else dataclasses.replace(node, **{field: new})


def _fields(node: PyTree) -> dict[str, Any]:
    if isinstance(node, dict):
        return node
    if hasattr(node, "_asdict"):
        return node._asdict()
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        arrays = [f for f in dataclasses.fields(node) if f.metadata.get("pytree_node", True)]
        return {f.name: getattr(node, f.name) for f in arrays}
    return {}


def _fit(old: Any, path: str, value: Any) -> Any:
    numpy = np if isinstance(old, np.generic | np.ndarray) and not isinstance(value, jax.Array) else jnp
    shape, dtype = np.shape(old), jnp.result_type(old)
    try:
        new = numpy.asarray(value, dtype)
        if not isinstance(value, Tracer) and np.any(np.asarray(new) != np.asarray(value)):
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError
        new = numpy.broadcast_to(new, shape)
    except (TypeError, ValueError):
        wanted = f"{dtype} of shape {shape}" if shape else f"{dtype} number"
        raise RequestError(f"environment parameter {path} = {value!r} does not fit a {wanted}") from None
    return new[()] if numpy is np else new
