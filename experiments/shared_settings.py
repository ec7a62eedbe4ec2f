"""What the algorithms of a comparison have in common, and where each keeps its own.

A module in ``algorithms`` names in ``DEFINING`` the settings that it fixes itself because they define the method; every other
setting that all on-policy methods know is given the same value, the one PPO would run with on that environment.
"""

import dataclasses
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pgjax import algorithms, on_policy
from pgjax.errors import RequestError, close_names
from pgjax.experiments import presets
from pgjax.experiments.objective_file import is_learned

# Whose preset, over its defaults, is what all share.
REFERENCE = "ppo"
PARTS = ("setup", "hypers")
# Why an algorithm has another value than the others.
DEFINES, OWN, MISSING, DEFAULT = "defines the method", "the method's own", "has no such setting", "default"

Fields = dict[str, dict[str, Any]]
"""``{"setup": {field: value}, "hypers": {field: value}}``."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one algorithm runs with. values: every field.  preset: name of the preset in them, or None."""

    values: Fields
    preset: str | None


@dataclasses.dataclass(frozen=True)
class SettingRow:
    """One line of the table of settings.

    field: dotted, such as ``setup.num_envs``.  is_shared: whether there is a common value, ``shared``.
    others: algorithm -> ``(value, why)`` of those that differ from it, or of all that have the field if there is none.
    """

    field: str
    is_shared: bool
    shared: Any
    others: dict[str, tuple[Any, str]]


def shared_fields(env: str) -> Fields:
    """Values of the settings that all on-policy methods know: PPO's defaults with its preset for ``env``, if there is one."""
    known = default_fields(on_policy)
    reference = preset_fields(algorithms.get(REFERENCE), presets.find("auto", REFERENCE, env))
    shared = {part: {name: reference[part][name] for name in known[part]} for part in PARTS}
    # Methods that fit the critic apart from the policy give it the steps that it has elsewhere.
    shared["setup"].update({f"value_{what}": shared["setup"][f"num_{what}"] for what in ("epochs", "minibatches")})
    return shared


def settle(
    modules: dict[str, ModuleType], env: str, asked: Fields, use_presets: bool
) -> tuple[dict[str, Settings], list[SettingRow]]:
    """Every algorithm's settings and the table that says what they share.

    Args:
      modules: by algorithm.  env: its public name.
      asked: values that the user wants for all; a setting that defines a method stays as it is.
      use_presets: each algorithm's own preset for ``env``, or else its defaults, in place of shared settings.
    """
    shared, known = shared_fields(env), default_fields(on_policy)
    settings = {}
    for name, module in modules.items():
        preset = presets.find("auto", REFERENCE if is_learned(name) else name, env)
        if use_presets:
            values = preset_fields(module, preset)
            settings[name] = Settings(_overlaid(values, asked, defining(module)), preset["name"])
        else:
            values = _overlaid(default_fields(module), shared, defining(module))
            settings[name] = Settings(_overlaid(values, asked, defining(module)), None)
    names = {part: dict.fromkeys([*known[part], *(f for s in settings.values() for f in s.values[part])]) for part in PARTS}
    rows = []
    for part in PARTS:
        for name in names[part]:
            common = asked[part] if name in asked[part] else {} if use_presets else shared[part]
            rows.append(_row(part, name, common, settings, modules, use_presets, name in known[part]))
    return settings, rows


def _row(part, name, common, settings, modules, use_presets, everyone) -> SettingRow:
    """The row of one field; ``common`` holds the values meant for all, ``everyone`` says whether all should have it."""
    held = {algorithm: s.values[part][name] for algorithm, s in settings.items() if name in s.values[part]}
    is_shared, value = name in common, common.get(name)
    if not is_shared and everyone and len(held) == len(settings) and len(set(held.values())) == 1:
        is_shared, value = True, next(iter(held.values()))
    others = {}
    for algorithm, module in modules.items():
        if algorithm not in held:
            if everyone:
                others[algorithm] = (None, MISSING)
        elif not is_shared or held[algorithm] != value:
            if name in defining(module) and (is_shared or not use_presets):
                why = DEFINES
            elif not use_presets:
                why = OWN
            else:
                is_default = held[algorithm] == default_fields(module)[part][name]
                why = DEFAULT if is_default else f"preset {settings[algorithm].preset}"
            others[algorithm] = (held[algorithm], why)
    return SettingRow(f"{part}.{name}", is_shared, value, others)


def _overlaid(values: Fields, new: Fields, keep: tuple[str, ...]) -> Fields:
    """``values`` with those of ``new`` that they have, except the fields in ``keep``."""
    return {
        part: {name: new[part].get(name, value) if name not in keep else value for name, value in values[part].items()}
        for part in PARTS
    }


def defining(module: ModuleType) -> tuple[str, ...]:
    """Names of the fields of ``Setup`` and ``Hypers`` that define the method."""
    return tuple(getattr(module, "DEFINING", ()))


def default_fields(module: ModuleType) -> Fields:
    """Defaults of ``module.Setup`` and ``module.Hypers``; of the latter only the numbers."""
    setup, hypers = module.Setup(), module.Hypers()
    numbers = {field.name: getattr(hypers, field.name) for field in dataclasses.fields(hypers)}
    return {
        "setup": {field.name: getattr(setup, field.name) for field in dataclasses.fields(setup)},
        "hypers": {name: float(value) for name, value in numbers.items() if isinstance(value, (int, float))},
    }


def preset_fields(module: ModuleType, preset: dict[str, Any]) -> Fields:
    """The module's defaults with a preset over them."""
    values = default_fields(module)
    setup = {name: tuple(value) if isinstance(value, list) else value for name, value in preset.get("setup", {}).items()}
    hypers = {name: float(value) for name, value in preset.get("hypers", {}).items()}
    return {"setup": values["setup"] | setup, "hypers": values["hypers"] | hypers}


def differences(module: ModuleType, settings: Settings) -> Fields:
    """The fields that are not the module's defaults, as a ``RunSpec`` wants them."""
    default = default_fields(module)
    return {
        part: {name: value for name, value in settings.values[part].items() if value != default[part][name]} for part in PARTS
    }


# --- what the user asks for


def read_asked(words: dict[str, dict[str, str]], modules: dict[str, ModuleType]) -> Fields:
    """``{"setup": {field: text}, "hypers": ...}`` from the command line, as values of the fields' types.

    Raises: RequestError for a field that none of the algorithms has, that every one of them fixes itself, or for text that
    is not a value of its type.
    """
    fields = {name: default_fields(module) for name, module in modules.items()}
    asked: Fields = {part: {} for part in PARTS}
    for part in PARTS:
        for name, text in words[part].items():
            having = [algorithm for algorithm in modules if name in fields[algorithm][part]]
            if not having:
                raise RequestError(_unknown(part, name, fields))
            if all(name in defining(modules[algorithm]) for algorithm in having):
                raise RequestError(
                    f"--{part} {name}={text} would change nothing: it defines the method of {', '.join(having)}; leave it out"
                )
            asked[part][name] = read_field(part, name, text, modules[having[0]])
    return asked


def _unknown(part: str, name: str, fields: dict[str, Fields]) -> str:
    (other,) = (p for p in PARTS if p != part)
    if any(name in f[other] for f in fields.values()):
        return f"--{part} {name} is a field of {other}; use --{other} {name}=..."
    known = {field for f in fields.values() for field in f[part]}
    return f"--{part} {name}: none of {', '.join(fields)} has it; {close_names(name, known)}"


def read_field(part: str, name: str, text: str, module: ModuleType) -> Any:
    """``text`` as a value of a field of the algorithm's. Raises: RequestError that names it."""
    hint = float if part == "hypers" else get_type_hints(module.Setup)[name]
    try:
        return read_value(text, hint)
    except ValueError as error:
        raise RequestError(f"--{part} {name}={text}: {error}") from None


def read_value(text: str, hint: Any) -> Any:
    """``text`` as a value of a field's type. Raises: ValueError saying what is wanted."""
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise ValueError(f"give one of {', '.join(get_args(hint))}")
        return text
    if type(None) in get_args(hint):
        if text.lower() == "none":
            return None
        hint = next(choice for choice in get_args(hint) if choice is not type(None))
    if get_origin(hint) is tuple:
        try:
            return tuple(int(word) for word in text.split(",") if word.strip())
        except ValueError:
            raise ValueError("give whole numbers with commas between, such as 64,64") from None
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("give true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError("give a whole number" if hint is int else "give a number") from None
    return text


# --- the table


def setting_cells(rows: list[SettingRow]) -> list[tuple[str, str, str]]:
    """``(field, shared value, who differs and why)`` of every row, as text."""
    return [(row.field, show(row.shared) if row.is_shared else "", _others(row)) for row in rows]


def _others(row: SettingRow) -> str:
    # Algorithms with the same value for the same reason are named together.
    groups: dict[tuple[str, str], list[str]] = {}
    for algorithm, (value, why) in row.others.items():
        groups.setdefault(("" if why == MISSING else show(value), why), []).append(algorithm)
    return "; ".join(f"{', '.join(names)}{': ' if value else ''}{value} ({why})" for (value, why), names in groups.items())


def show(value: Any) -> str:
    """A value as in a table."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
