"""Finding runs in folders and reading what they came to, whatever state they are in."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pgjax
from pgjax.errors import RequestError
from pgjax.experiments.results import Result, results_of

_LONGEST_REASON = 300


class Unreadable(NamedTuple):
    """A run that is left out. path: its folder.  reason: why, in one line."""

    path: str
    reason: str


def read_runs(paths: Sequence[Path]) -> tuple[list[Result], list[Unreadable]]:
    """The results of runs, and which runs cannot be read. ``result.json`` is read in place of the tables where there is one.

    Args: paths: folders of runs, or folders that contain runs at any depth.
    Raises: RequestError if a path is no folder or holds no run, or if no run can be read.
    """
    if not paths:
        raise RequestError("no run was named; give the folders of one or more runs, or a folder that holds runs")
    results: list[Result] = []
    unreadable: list[Unreadable] = []
    for folder in find_runs(paths, unreadable):
        try:
            results += _read(folder)
        # Whatever a damaged or foreign file leads to: one of ten thousand runs must not cost the report.
        except Exception as error:
            unreadable.append(Unreadable(str(folder), _reason(error)))
    if not results:
        first = unreadable[0]
        raise RequestError(f"none of the {len(unreadable)} runs can be read; the first, {first.path}: {first.reason}")
    return results, unreadable


def find_runs(paths: Sequence[Path], unreadable: list[Unreadable]) -> list[Path]:
    """Folders with a ``run.json`` or ``result.json`` in and below ``paths``, each once; adds folders that cannot be entered.

    Raises: RequestError if a path is no folder or nothing is found in it.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise RequestError(f"there is no folder {path}; give the folders of runs, or a folder that holds runs")
        if not path.is_dir():
            raise RequestError(f"{path} is a file; give the folder of a run, or a folder that holds runs")
        before, failed = len(found), len(unreadable)

        def refuse(error: OSError) -> None:
            unreadable.append(Unreadable(str(error.filename), _reason(error)))

        known = False
        for folder, below, files in os.walk(path, onerror=refuse):
            if "run.json" in files or "result.json" in files:
                below.clear()  # checkpoints and tables, many files
                known |= os.path.realpath(folder) in found
                found.setdefault(os.path.realpath(folder), Path(folder))
            else:
                below[:] = sorted(name for name in below if not name.startswith("."))
        if len(found) == before and len(unreadable) == failed and not known:
            raise RequestError(f"there is no run in {path} (no run.json at any depth); give the folders of runs")
    return list(found.values())


def _read(folder: Path) -> list[Result]:
    summary = folder / "result.json"
    if summary.exists():
        # The folder may have been moved since.
        results = [dataclasses.replace(Result.parse(summary.read_text()), path=str(folder))]
    else:
        results = results_of(pgjax.load(folder))
    for result in results:
        if fault := fault_of(result):
            raise ValueError(fault)
    return results


def fault_of(result: Result) -> str | None:
    """What about a result is not as ``Result`` says, in a few words; None if all is well."""
    config = result.config
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("algorithm", "env"), str),
        **dict.fromkeys(("env_options", "env_params", "setup"), dict),
        **dict.fromkeys(("configs", "seeds"), (list, tuple)),
        "total_env_steps": (int, float),
    }
    if not isinstance(config, dict):
        return "config is no table"
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            return f"config.{name} is {'missing' if name not in config else 'of the wrong kind'}"
    if len(config["configs"]) != 1 or not isinstance(config["configs"][0], dict):
        return "config.configs must hold one configuration"
    for name, value in {**dict.fromkeys(("path", "status", "note"), str), "provenance": dict, "seconds": dict}.items():
        if not isinstance(getattr(result, name), value):
            return f"{name} is of the wrong kind"
    if not isinstance(result.provenance.get("libraries", {}), dict):
        return "provenance.libraries is of the wrong kind"
    return _fault_of_numbers(result)


def _fault_of_numbers(result: Result) -> str | None:
    for policy, returns in result.returns.items():
        if returns.shape != (len(result.seeds), len(result.env_steps)):
            return f"returns of {policy} have shape {returns.shape}, not {(len(result.seeds), len(result.env_steps))}"
        if np.isinf(returns).any():
            return f"a return of {policy} is infinite"
    if np.any(np.diff(result.env_steps) <= 0):
        return "env_steps do not grow"
    if not all(_is_number(value) for value in result.seconds.values()):
        return "seconds are no numbers"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    if not text or not isinstance(error, (RequestError, ValueError, OSError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
