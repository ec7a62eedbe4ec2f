"""Objectives named on the command line or in a sweep file: one's own, ``FILE.py:NAME``, or a learned one, ``lpo:NAME_OR_FILE``.

In the record of a run a learned one is ``lpo:NAME_OR_FILE@HASH``, with the beginning of the file's SHA-256: whoever goes on
with the run, or makes it again, is told if the weights are others.
"""

import re
import runpy
from pathlib import Path
from typing import Any

from pgjax.errors import RequestError
from pgjax.learned import files as learned_files

_LEARNED = "lpo:"
_HASH_DIGITS = 12


def load_objective(source: str | None) -> Any:
    """The object that ``source`` names; None for None. Raises: RequestError if there is none."""
    if source is None:
        return None
    if is_learned(source):
        from pgjax.algorithms import lpo

        name, expected = split_hash(source)
        found = learned_files.digest(learned_files.find(name, lpo.KIND))
        if not found.startswith(expected):
            raise RequestError(
                f"--objective {source!r}: the weights of {name} are now @{found[:_HASH_DIGITS]}; start anew with another --out"
            )
        return lpo.objective(learned_files.load(name, lpo.KIND))
    file, colon, name = source.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise RequestError(f"--objective {source!r} must be FILE.py:NAME or lpo:NAME_OR_FILE")
    if not Path(file).is_file():
        raise RequestError(f"--objective {source!r}: there is no file {file}")
    try:
        found = runpy.run_path(file)
    except Exception as error:
        raise RequestError(f"--objective {source!r}: {type(error).__name__}: {error}") from error
    if name not in found:
        raise RequestError(f"--objective {source!r}: {file} defines no {name}")
    return found[name]


def is_learned(source: str) -> bool:
    """Whether ``source`` names learned parameters rather than a Python file."""
    return source.startswith(_LEARNED)


def makes_its_own_schedule(source: str | None) -> bool:
    """Whether ``source`` names a drift that is told the progress of the run, so that nothing else need fall with it."""
    if source is None or not is_learned(source):
        return False
    return bool(learned_files.load(split_hash(source)[0], "lpo").convention.get("temporal"))


def pinned(source: str | None) -> str | None:
    """``source`` as a run records it: a learned objective with the hash of its file. Raises: RequestError if there is none."""
    if source is None or not is_learned(source) or split_hash(source)[1]:
        return source
    return f"{source}@{learned_files.digest(learned_files.find(source, 'lpo'))[:_HASH_DIGITS]}"


def split_hash(source: str) -> tuple[str, str]:
    """``(name or file, hash or nothing)``."""
    found = re.fullmatch(r"(.+)@([0-9a-f]+)", source)
    return (found[1], found[2]) if found else (source, "")
