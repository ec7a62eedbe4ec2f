"""Learning objectives and update rules by training many agents: ``pgjax meta-train``.

A module per kind makes a ``MetaTrainer``; ``loop`` runs any of them on the host.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pgjax.errors import RequestError, close_names
from pgjax.types import Metrics, PyTree

# kind on the command line -> module with ``Args``, a dataclass of its options, and ``build(args) -> MetaTrainer``
_MODULES = {
    "lpo": "pgjax.experiments.meta_train.lpo",
    "lpg": "pgjax.experiments.meta_train.lpg",
    "groove": "pgjax.experiments.meta_train.groove",
}


class MetaTrainer(NamedTuple):
    """Meta-learning as pure functions; all that the loop knows of it.

    init: ``key -> state``, the whole state as one pytree of arrays.
    step: ``state -> (state, metrics)``, one generation or meta-update, jittable; a flat dict of scalars with fixed keys.
    learned: ``state -> params``, what the file keeps.
    kind: of the learned file.  convention: JSON values, everything without which ``learned`` means nothing.
    env_steps_per_step: inner environment steps of one step, in the lives of agents; not those of opponents and evaluations.
    devices: that ``step`` spreads its work over; empty for one that needs no more than the first.
    report: ``state -> JSON values``, what is measured once at the end, for the provenance; None if nothing.
    curve: name of the metric that the progress line and the figure show.
    """

    init: Callable[[jax.Array], PyTree]
    step: Callable[[PyTree], tuple[PyTree, Metrics]]
    learned: Callable[[PyTree], PyTree]
    kind: str
    convention: dict[str, Any]
    env_steps_per_step: int
    devices: tuple = ()
    report: Callable[[PyTree], dict[str, Any]] | None = None
    curve: str = "fitness_mean"


def get(name: str):
    """The module that makes the meta-trainer ``name``. Raises: RequestError for an unknown one."""
    if name not in _MODULES:
        raise RequestError(f"meta-train {name!r} is unknown; {close_names(name, _MODULES)}")
    return importlib.import_module(_MODULES[name])


def list_names() -> list[str]:
    """What ``pgjax meta-train`` can train."""
    return list(_MODULES)
