"""Objectives of one's own, named on the command line or in a sweep file as ``FILE.py:NAME``."""

import runpy
from pathlib import Path
from typing import Any

from pgjax.errors import RequestError


def load_objective(source: str | None) -> Any:
    """The object that ``FILE.py:NAME`` names; None for None. Raises: RequestError if there is none."""
    if source is None:
        return None
    file, colon, name = source.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise RequestError(f"--objective {source!r} must be FILE.py:NAME")
    if not Path(file).is_file():
        raise RequestError(f"--objective {source!r}: there is no file {file}")
    try:
        found = runpy.run_path(file)
    except Exception as error:
        raise RequestError(f"--objective {source!r}: {type(error).__name__}: {error}") from error
    if name not in found:
        raise RequestError(f"--objective {source!r}: {file} defines no {name}")
    return found[name]
