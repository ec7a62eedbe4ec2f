"""MJX as the adapters use it: imported without what no task needs, quiet, and with observations as one array."""

import contextlib
import copy
import importlib.util
import io
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pgjax.envs.deferred import deferred_imports
from pgjax.errors import RequestError

_WARP = "mujoco.mjx.third_party.mujoco_warp"
# Wanted by MJX only for meshes, which no task here has; they cost as much as a library itself.
_MESHES = ("trimesh", "scipy.spatial")
# MJX's second implementation; its Python alone takes longer to import than the rest of MJX.
_KERNELS = ("warp", _WARP, f"{_WARP}._src", f"{_WARP}._src.types", f"{_WARP}._src.io")


@contextlib.contextmanager
def light_imports(*more: str) -> Iterator[None]:
    """Inside the block, importing MJX leaves out mesh tools and Warp, and whatever ``more`` names, until they are used.

    MuJoCo prints a line when it is imported without Warp, which is swallowed.
    """
    annotations, kernels = ["trimesh.Trimesh"], ()
    if importlib.util.find_spec("warp") is not None:
        kernels = _KERNELS
        annotations += ["warp.JaxCallableGraphMode", f"{_WARP}._src.types.Callback"]
    with (
        deferred_imports(*_MESHES, *kernels, *more, annotations=tuple(annotations)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


def use_warp(chosen: str, instead: str) -> None:
    """Makes Warp, whose import MJX was spared, ready to be used by it.

    Args: chosen: the option that asked for it, as in ``"impl = 'warp'"``.  instead: the one that does without.
    Raises: RequestError where Warp is missing or does not work.
    """
    if importlib.util.find_spec("warp") is None:
        raise RequestError(f"{chosen} needs the package warp-lang: pip install 'pgjax[warp]', or take {instead}")
    try:
        import warp
        from mujoco.mjx import warp as mjx_warp

        warp.config.log_level = warp.LOG_WARNING  # it tells of each of some fifty kernels
        warp.init()
        mjx_warp.types.GraphMode = warp.JaxCallableGraphMode
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise RequestError(f"{chosen} does not work here, {type(error).__name__}: {line}; take {instead}") from error


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Inside the block, MuJoCo does not tell that a model is dated; it would also write that to the working directory."""
    import mujoco

    library: Any = mujoco  # a compiled module without type information for these
    previous = library.get_mju_user_warning()
    library.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        library.set_mju_user_warning(previous)


def with_attribute(env: Any, name: str, value: Any) -> Any:
    """A copy of ``env`` with another attribute; the given environment must not see a traced value.

    A task may have picked one of its methods in its constructor; in the copy such a method is the copy's own.
    """
    other = copy.copy(env)
    for key, method in vars(env).items():
        if isinstance(method, types.MethodType) and method.__self__ is env:
            setattr(other, key, types.MethodType(method.__func__, other))
    setattr(other, name, value)
    return other


def flat_obs(obs: Any) -> jax.Array:
    """An observation as one float32 array: a dict's entries are flattened and joined in the order of its sorted keys."""
    if not isinstance(obs, dict):
        return jnp.asarray(obs, jnp.float32)
    return jnp.concatenate([jnp.ravel(jnp.asarray(x, jnp.float32)) for x in jax.tree.leaves(obs)])
