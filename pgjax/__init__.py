"""pgjax: the policy-gradient family under one loop, pure-functional, on vectorised JAX environments.

import jax, pgjax

env = pgjax.make_env("gymnax/CartPole-v1")
algorithm = pgjax.make("ppo", env, num_envs=4)
train = jax.jit(pgjax.make_train(algorithm, total_env_steps=500_000))
state, metrics = train(jax.random.key(0), algorithm.hypers)
"""

import importlib as _importlib
import importlib.util as _importlib_util
import os as _os
from typing import Any as _Any

# In a checkout the sub-packages `envs`, `algorithms` and `experiments` stand beside this folder; the wheel maps them in.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.exists(_os.path.join(_root, "pyproject.toml")) and _os.path.isdir(_os.path.join(_root, "algorithms")):
    __path__.append(_root)

__version__ = "0.1.0"

# Public names and where they live; imported on first use, so that the command line answers before JAX is loaded.
_PUBLIC = {
    "Algorithm": "pgjax.types",
    "Environment": "pgjax.types",
    "Objective": "pgjax.types",
    "Sample": "pgjax.types",
    "TimeStep": "pgjax.types",
    "Box": "pgjax.spaces",
    "Discrete": "pgjax.spaces",
    "RequestError": "pgjax.errors",
    "RunError": "pgjax.errors",
    "make_env": "pgjax.envs",
    "from_gymnax": "pgjax.envs.gymnax",
    "from_brax": "pgjax.envs.brax",
    "from_playground": "pgjax.envs.playground",
    "change_params": "pgjax.envs.params",
    "check_env": "pgjax.checks.environment",
    "check_drift": "pgjax.checks.mirror_learning",
    "make": "pgjax.algorithms",
    "make_train": "pgjax.training",
    "evaluate": "pgjax.evaluation",
    "RunSpec": "pgjax.host.runner",
    "run": "pgjax.host.runner",
    "RunStore": "pgjax.host.store",
    "load": "pgjax.host.store",
}
__all__ = sorted([*_PUBLIC, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> _Any:
    if name in _PUBLIC:
        value = getattr(_importlib.import_module(_PUBLIC[name]), name)
    elif not name.startswith("_") and (found := _importlib_util.find_spec(f"pgjax.{name}")) and found.origin:
        # The parts too: pgjax.estimators.gae after nothing but `import pgjax`.
        value = _importlib.import_module(f"pgjax.{name}")
    else:
        raise AttributeError(f"module 'pgjax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_PUBLIC])
