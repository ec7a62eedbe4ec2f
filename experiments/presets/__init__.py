"""Presets: what differs from an algorithm's defaults, one TOML file per environment or per published setting.

A file such as ``gymnax-CartPole-v1.toml`` has a table per algorithm, with ``total_env_steps``, ``setup``, ``hypers`` and
``env_options``; ``reached`` records what it was seen to reach, and by which command. A file for several environments has
``names`` in place of ``name``, and what differs for one of them in ``[differences."NAME".ALGORITHM]``. A table with ``same_as``
is that of another preset for the same algorithm, which may itself be that of a third, with its own fields over it.
"""

import tomllib
from pathlib import Path
from typing import Any

from pgjax.errors import RequestError, close_names

_FOLDER = Path(__file__).parent
_FIELDS = ("total_env_steps", "setup", "hypers", "env_options", "reached", "about")


def list_presets() -> dict[str, dict[str, Any]]:
    """``{name: {algorithm: preset}}``; a preset for an environment is named like the environment.

    Raises: RequestError for a ``same_as`` that names no preset for the algorithm, or leads back to itself.
    """
    presets = {}
    for path in sorted(_FOLDER.glob("*.toml")):
        with path.open("rb") as file:
            content = tomllib.load(file)
        differences = content.pop("differences", {})
        for name in content.pop("names", None) or [content.pop("name")]:
            presets[name] = _merged(content, differences.get(name, {}))
    return {name: {algorithm: _resolved(presets, name, algorithm) for algorithm in presets[name]} for name in presets}


def _resolved(presets: dict[str, dict[str, Any]], name: str, algorithm: str, followed: tuple[str, ...] = ()) -> dict[str, Any]:
    """One table over all those that it is the same as. ``followed``: the names of those that lead to it."""
    own = dict(presets[name][algorithm])
    if "same_as" not in own:
        return own
    other, followed = own.pop("same_as"), (*followed, name)
    where = f"preset {name!r} for {algorithm}: same_as = {other!r}"
    if other in followed:
        raise RequestError(f"{where} leads back to itself: {' -> '.join((*followed, other))}")
    if algorithm not in presets.get(other, ()):
        known = [name for name, content in presets.items() if algorithm in content and name not in followed]
        raise RequestError(f"{where} is no preset for {algorithm}: {close_names(other, known)}")
    return _merged(_resolved(presets, other, algorithm, followed), own)


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """``common`` with ``own`` over it, table by table; neither is changed."""
    merged = {key: _merged(value, {}) if isinstance(value, dict) else value for key, value in common.items()}
    for key, value in own.items():
        merged[key] = _merged(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def find(name: str, algorithm: str, env: str) -> dict[str, Any]:
    """The preset ``name`` for ``algorithm``; ``auto`` is the environment's own or else nothing, ``none`` is nothing.

    Returns: a dict with some of ``total_env_steps, setup, hypers, env_options`` and with ``name``, None if nothing applies.
    Raises: RequestError for an unknown name, or one that has nothing for the algorithm.
    """
    nothing = {"name": None}
    if name == "none":
        return nothing
    presets = list_presets()
    if name == "auto":
        return {**presets[env][algorithm], "name": env} if algorithm in presets.get(env, ()) else nothing
    if name not in presets:
        raise RequestError(f"preset {name!r} is unknown; {close_names(name, [*presets, 'auto', 'none'])}")
    if algorithm not in presets[name]:
        raise RequestError(f"preset {name!r} has nothing for {algorithm}; it is for {', '.join(presets[name])}")
    return {**presets[name][algorithm], "name": name}
