"""One file per paper. ``make`` builds any of them by its public id."""

import importlib
import inspect

from pgjax.errors import RequestError, close_names

# id -> (module, what it is)
_ALGORITHMS = {
    "reinforce": ("pgjax.algorithms.reinforce", "REINFORCE (Williams 1992), without or with a value baseline"),
    "a2c": ("pgjax.algorithms.a2c", "Advantage actor-critic, synchronous (Mnih et al. 2016)"),
    "ppo": ("pgjax.algorithms.ppo", "Proximal policy optimization, clipped (Schulman et al. 2017)"),
    "ppo_kl": ("pgjax.algorithms.ppo_kl", "PPO with a fixed or adaptive penalty on the KL (Schulman et al. 2017)"),
    "trpo": ("pgjax.algorithms.trpo", "Trust region policy optimization (Schulman et al. 2015)"),
    "vmpo": ("pgjax.algorithms.vmpo", "On-policy maximum a posteriori policy optimization (Song et al. 2019)"),
    "mdpo": ("pgjax.algorithms.mdpo", "Mirror descent policy optimization, on-policy (Tomar et al. 2020)"),
    "mdpo_off": ("pgjax.algorithms.mdpo_off", "Mirror descent policy optimization, off-policy (Tomar et al. 2020)"),
    "spo": ("pgjax.algorithms.spo", "Simple Policy Optimization (Xie et al. 2025)"),
    "fixpo": ("pgjax.algorithms.fixpo", "Fixup policy optimization (Zentner et al. 2023)"),
    "dpo": ("pgjax.algorithms.dpo", "Discovered Policy Optimisation (Lu et al. 2022)"),
    "props": ("pgjax.algorithms.props", "Proximal robust on-policy sampling, with PPO (Corrado and Hanna 2023)"),
    "ros": ("pgjax.algorithms.ros", "Robust on-policy sampling, with PPO (Zhong et al. 2022)"),
    "sac": ("pgjax.algorithms.sac", "Soft actor-critic with a learned temperature (Haarnoja et al. 2018)"),
    "avg": ("pgjax.algorithms.avg", "Action Value Gradient, incremental (Vasan et al. 2024)"),
    "iac": ("pgjax.algorithms.iac", "Incremental one-step actor-critic, a baseline of AVG"),
    "sac1": ("pgjax.algorithms.sac1", "SAC that learns from the last transition alone, a baseline of AVG"),
    "lpg": ("pgjax.algorithms.lpg", "Learned policy gradient, by a meta-learned rule (Oh et al. 2020)"),
    "td3_1": ("pgjax.algorithms.td3_1", "TD3 that learns from the last transition alone, a baseline of AVG"),
}


def list_algorithms() -> dict[str, str]:
    """``{id: one line}`` of everything ``make`` builds."""
    return {name: line for name, (_, line) in _ALGORITHMS.items()}


def get(name: str):
    """The module of the algorithm ``name``; it has ``Setup``, ``Hypers`` and ``make(env, setup, hypers, ...)``."""
    if name not in _ALGORITHMS:
        raise RequestError(f"algorithm {name!r} is unknown; {close_names(name, _ALGORITHMS)}")
    return importlib.import_module(_ALGORITHMS[name][0])


def make(name: str, env, hypers: dict | None = None, *, objective=None, networks=None, rule=None, **setup):
    """Builds the algorithm ``name`` on ``env``; keyword arguments are fields of its ``Setup``.

    Args: hypers: fields of its ``Hypers`` that differ from the defaults.
      objective, networks, rule: see the algorithm's ``make``.
    Raises: RequestError for unknown names and for values that cannot work.
    """
    module = get(name)
    plugs = {key: plug for key, plug in (("objective", objective), ("networks", networks), ("rule", rule)) if plug is not None}
    for key in plugs:
        if key not in inspect.signature(module.make).parameters:
            raise RequestError(f"{name} takes no {key} of your own; leave it out")
    return module.make(
        env, module_setup(module, setup), module.Hypers(**_known(module.Hypers, "hypers", hypers or {})), **plugs
    )


def module_setup(module, fields: dict):
    """``module.Setup`` with these fields; lists become tuples so that it stays hashable."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return module.Setup(**_known(module.Setup, "setup", fields))


def __getattr__(name: str):
    """``pgjax.algorithms.ppo`` after nothing but ``import pgjax``."""
    if name in _ALGORITHMS:
        return importlib.import_module(_ALGORITHMS[name][0])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _known(cls, what, fields):
    for name in fields:
        if name not in cls.__dataclass_fields__:
            raise RequestError(f"{what}.{name} is not a field here; {close_names(name, cls.__dataclass_fields__)}")
    return fields
