"""The sweep file: TOML that says which configurations of which algorithms run on which environments.

    algorithms = ["ppo", "spo"]
    envs = ["gymnax/CartPole-v1", "gymnax/Acrobot-v1"]
    seeds = 8                               # or a list of seeds
    total_env_steps = 100_000               # the preset's if not given, or else 500 000

    [grid]                                  # every combination; fields of Setup and of Hypers alike
    learning_rate = [1e-4, 1e-3]

    [random]                                # samples draws, the same for every algorithm and environment
    samples = 10
    entropy_coef = { low = 1e-4, high = 1e-1, log = true }

    [algorithm.spo]                         # what differs for one algorithm; [env."NAME"] likewise for an environment
    grid = { clip_eps = [0.1, 0.2] }

``[setup]``, ``[hypers]``, ``[env_options]`` and ``[env_params]`` hold values that all share. With ``[search]`` the
configurations are not written down but searched for: see ``search``.
"""

import dataclasses
import itertools
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from pgjax import algorithms
from pgjax.algorithms import lpg
from pgjax.errors import RequestError, close_names
from pgjax.experiments import presets
from pgjax.experiments.objective_file import pinned
from pgjax.host.runner import RunSpec
from pgjax.on_policy import LEARNED

DEFAULT_ENV_STEPS = 500_000
# Seeds that are one cell: a sweep with more of them keeps the cells it has.
SEEDS_PER_CELL = 8

# Tables and values that a part of the file for one algorithm, or for one environment, may hold.
_VALUES: dict[str, Any] = {
    "seeds": (int, list),
    "seed_start": int,
    "total_env_steps": int,
    "preset": str,
    "num_evals": int,
    "eval_episodes": int,
    "log_every": int,
    "precision": str,
    "objective": str,
    "rule": str,
}
_TABLES = ("setup", "hypers", "env_options", "env_params", "grid", "random")
_TOP = ("algorithms", "envs", "seeds_per_cell", "algorithm", "env", "search", "engine")
_ENGINES = ("local", "ray", "slurm")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for.

    path: the file.  text: its content, for the record.  specs: one run a configuration and block of seeds, in the order of the
    file; each has one entry in ``configs``.  search: the table of that name, or None; ``specs`` then holds one run for each
    algorithm and environment, with what does not vary.  engine: the table of that name.
    """

    path: Path
    text: str
    specs: tuple[RunSpec, ...]
    search: dict[str, Any] | None
    engine: dict[str, Any]


def read_sweep(path: Path) -> Sweep:
    """Reads and checks a sweep file. Raises: RequestError naming the file, the field, the value and the remedy."""
    path = Path(path)
    try:
        text = path.read_text()
        content = tomllib.loads(text)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}; name a sweep file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not TOML: {error}") from None
    try:
        return Sweep(path, text, tuple(specs_of(content)), _search(content), _engine(content))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def fields_of(algorithm: str) -> dict[str, tuple[str, Any]]:
    """Every field that can be set: name -> (``setup`` or ``hypers``, its type)."""
    module = algorithms.get(algorithm)
    fields = {name: ("setup", hint) for name, hint in get_type_hints(module.Setup).items()}
    # One name in both would be a riddle in a grid; the contract test keeps them apart.
    return fields | {name: ("hypers", float) for name in module.Hypers.__dataclass_fields__ if name not in LEARNED}


def with_values(spec: RunSpec, values: dict[str, Any], where: str) -> RunSpec:
    """``spec`` with other fields of Setup or Hypers. Raises: RequestError naming ``where`` and the field."""
    known = fields_of(spec.algorithm)
    setup, hypers = dict(spec.setup), dict(spec.configs[0])
    for name, value in values.items():
        if name not in known:
            raise RequestError(
                f"{where}.{name}: {spec.algorithm} has no such field; "
                f"{close_names(name, known)} (fields of one algorithm go to [algorithm.NAME.{where.split('.')[-1]}])"
            )
        part, hint = known[name]
        (setup if part == "setup" else hypers)[name] = _checked(f"{where}.{name}", value, hint)
    return dataclasses.replace(spec, setup=setup, configs=(hypers,))


# --- from the file to runs


def specs_of(content: dict[str, Any]) -> Iterator[RunSpec]:
    """The runs that a file's content asks for, one a configuration and block of seeds. Raises: RequestError."""
    _check_names(content, (*_TOP, *_VALUES, *_TABLES), "")
    names = _strings(content, "algorithms")
    envs = _strings(content, "envs")
    for group, chosen, tables in (("algorithm", names, _TABLES), ("env", envs, _TABLES)):
        for name, part in _table(content, group).items():
            if name not in chosen:
                raise RequestError(f"[{group}.{name}]: {name} is not in {group}s = {chosen}")
            _check_names(part, (*_VALUES, *tables), f"{group}.{name}.")
    per_cell = content.get("seeds_per_cell", SEEDS_PER_CELL)
    if type(per_cell) is not int or per_cell < 1:
        raise RequestError(f"seeds_per_cell = {per_cell!r} must be a whole number, at least 1")
    modules = {name: algorithms.get(name) for name in names}
    for algorithm, env in itertools.product(names, envs):
        parts = [
            ("", content),
            (f"env.{env}.", _table(content, "env").get(env, {})),
            (f"algorithm.{algorithm}.", _table(content, "algorithm").get(algorithm, {})),
        ]
        base, seeds = _base(algorithm, modules[algorithm], env, parts)
        for spec in [base] if "search" in content else _configurations(base, parts):
            for block in _blocks(seeds, per_cell):
                yield dataclasses.replace(spec, seeds=block)


def _base(algorithm: str, module: ModuleType, env: str, parts) -> tuple[RunSpec, tuple[int, ...]]:
    """What all configurations of an algorithm on an environment share, and its seeds; later parts win."""
    values = {}
    for where, part in parts:
        for name in set(part) & set(_VALUES):
            wanted = _VALUES[name]
            if not isinstance(part[name], wanted) or isinstance(part[name], bool):
                kind = {int: "a whole number", str: "text"}.get(wanted, "a whole number or a list of seeds")
                raise RequestError(f"{where}{name} = {part[name]!r} must be {kind}")
            values[name] = part[name]
    if "objective" in values:
        values["objective"] = pinned(values["objective"])
    if algorithm == "lpg":
        values["rule"] = lpg.pinned(values.get("rule"))
    preset = presets.find(values.pop("preset", "auto"), algorithm, env)
    seeds = _seeds(values.pop("seeds", 1), values.pop("seed_start", 0))
    spec = RunSpec(
        algorithm=algorithm,
        env=env,
        total_env_steps=values.pop("total_env_steps", None) or preset.get("total_env_steps", DEFAULT_ENV_STEPS),
        env_options=dict(preset.get("env_options", {})),
        preset=preset["name"],
        **values,
    )
    spec = with_values(spec, {**preset.get("setup", {}), **preset.get("hypers", {})}, "preset")
    for where, part in parts:
        for name in ("env_options", "env_params"):
            spec = dataclasses.replace(spec, **{name: {**getattr(spec, name), **_table(part, name, where)}})
        for name in ("setup", "hypers"):
            table = _table(part, name, where)
            odd = [key for key in table if fields_of(algorithm).get(key, (name,))[0] != name]
            if odd:
                raise RequestError(f"{where}{name}.{odd[0]} is a field of {'hypers' if name == 'setup' else 'setup'}; move it")
            spec = with_values(spec, table, where + name)
    return spec, seeds


def _configurations(base: RunSpec, parts):
    """Every grid point for every random draw; a field named in two places takes the values of the later one."""
    grid: dict[str, tuple[str, list]] = {}
    ranges: dict[str, tuple[str, Any]] = {}
    samples, seed, drawn = 1, 0, False
    for where, part in parts:
        for name, choices in _table(part, "grid", where).items():
            if not isinstance(choices, list) or not choices:
                raise RequestError(f"{where}grid.{name} = {choices!r} must be a list with at least one value")
            if any(choices.count(value) > 1 for value in choices):
                raise RequestError(f"{where}grid.{name} = {choices} has a value twice")
            grid[name] = (where, choices)
        for name, value in _table(part, "random", where).items():
            if name in ("samples", "seed"):
                least = int(name == "samples")
                if type(value) is not int or value < least:
                    raise RequestError(f"{where}random.{name} = {value!r} must be a whole number, at least {least}")
                samples, seed = (value, seed) if name == "samples" else (samples, value)
            else:
                drawn, ranges[name] = True, (where, value)
    if drawn and not any("samples" in _table(part, "random", "") for _, part in parts):
        raise RequestError("[random] has no samples: say how many configurations to draw, e.g. samples = 10")
    if both := set(grid) & set(ranges):
        raise RequestError(f"{min(both)} is in [grid] and in [random]; choose one")
    for draw in range(samples if drawn else 1):
        # Each draw and field has a stream of its own, so that more samples, or another field, keep the earlier ones.
        chosen = {name: sample(f"{where}random.{name}", value, (seed, draw, name)) for name, (where, value) in ranges.items()}
        spec = with_values(base, chosen, "random")
        for point in itertools.product(*(choices for _, choices in grid.values())):
            yield with_values(spec, dict(zip(grid, point, strict=True)), "grid")


def sample(where: str, choices: Any, stream: tuple[int, int, str]) -> Any:
    """One draw from a range ``{low, high, log}`` or a list. Raises: RequestError for a range that is none."""
    seed, draw, name = stream
    random = np.random.default_rng([seed, draw, *name.encode()])
    kind, *limits = read_range(where, choices)
    if kind == "choice":
        return choices[int(random.integers(len(choices)))]
    low, high = limits
    if kind == "int":
        return int(random.integers(low, high + 1))
    if kind == "log":
        return float(math.exp(random.uniform(math.log(low), math.log(high))))
    return float(random.uniform(low, high))


def read_range(where: str, choices: Any) -> tuple:
    """``("choice", values)``, ``("int", low, high)``, ``("log", low, high)`` or ``("linear", low, high)``."""
    if isinstance(choices, list) and choices:
        return ("choice", choices)
    if not isinstance(choices, dict) or not {"low", "high"} <= set(choices) <= {"low", "high", "log"}:
        raise RequestError(f"{where} = {choices!r} must be a list of values or {{ low = ..., high = ..., log = true }}")
    low, high, log = choices["low"], choices["high"], choices.get("log", False)
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in (low, high))
    if not numbers or not low < high:
        raise RequestError(f"{where}: low = {low!r} must be a number below high = {high!r}")
    if type(log) is not bool or (log and low <= 0):
        raise RequestError(f"{where}: log = {log!r} with low = {low!r}; a logarithmic range starts above 0")
    if log:
        return ("log", float(low), float(high))
    return ("int", low, high) if isinstance(low, int) and isinstance(high, int) else ("linear", float(low), float(high))


def _seeds(seeds: Any, start: int) -> tuple[int, ...]:
    if isinstance(seeds, int):
        if seeds < 1 or start < 0 or start + seeds > 2**32:
            raise RequestError(f"seeds = {seeds} with seed_start = {start}: give at least 1, all of them from 0 to 2**32 - 1")
        return tuple(range(start, start + seeds))
    if not seeds or any(type(seed) is not int or not 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise RequestError(f"seeds = {seeds} must be different whole numbers from 0 to 2**32 - 1")
    return tuple(seeds)


def _blocks(seeds: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def _search(content: dict[str, Any]) -> dict[str, Any] | None:
    if "search" in content and (set(content) & {"grid", "random"}):
        raise RequestError("[search] chooses the configurations itself; move [grid] and [random] to [search.space]")
    return _table(content, "search") if "search" in content else None


def _engine(content: dict[str, Any]) -> dict[str, Any]:
    engine = {"name": "local", **_table(content, "engine")}
    if engine["name"] not in _ENGINES:
        raise RequestError(f"engine.name = {engine['name']!r} is unknown; known: {', '.join(_ENGINES)}")
    return engine


# --- checks


def _checked(where: str, value: Any, hint: Any) -> Any:
    """``value`` as one of the field's type. Raises: RequestError saying what is wanted."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in options:
            raise RequestError(f"{where} = {value!r}: give one of {', '.join(map(str, options))}")
        return value
    if type(None) in options:
        if value == "none":
            return None
        return _checked(where, value, next(option for option in options if option is not type(None)))
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RequestError(f"{where} = {value!r} must be a number")
        return float(value)
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise RequestError(f"{where} = {value!r} must be a list, such as [64, 64]")
        return tuple(_checked(where, item, options[0]) for item in value)
    if isinstance(hint, type) and type(value) is not hint:
        kind = {bool: "true or false", int: "a whole number", str: "text"}.get(hint, hint.__name__)
        raise RequestError(f"{where} = {value!r} must be {kind}")
    return value


def _check_names(part: dict[str, Any], known, where: str) -> None:
    for name in part:
        if name not in known:
            raise RequestError(f"{where}{name} is unknown; {close_names(name, known)}")


def _strings(content: dict[str, Any], name: str) -> list[str]:
    value = content.get(name)
    if not isinstance(value, list) or not value or any(not isinstance(item, str) for item in value):
        raise RequestError(f"{name} = {value!r} must be a list of names, at least one")
    if len(set(value)) < len(value):
        raise RequestError(f"{name} = {value} has a name twice")
    return value


def _table(part: dict[str, Any], name: str, where: str = "") -> dict[str, Any]:
    value = part.get(name, {})
    if not isinstance(value, dict):
        raise RequestError(f"{where}{name} = {value!r} must be a table, [{where}{name}]")
    return value
