"""Options of environments, checked before anything is made of them."""

import math
from typing import Any

from pgjax.errors import RequestError


def check_count(field: str, number: Any) -> None:
    """Raises RequestError unless ``number`` is a whole number of at least 1."""
    if isinstance(number, bool) or not hasattr(number, "__index__") or number < 1:
        raise RequestError(f"{field} = {number!r} must be a whole number of at least 1")


def fit(field: str, value: Any, default: Any) -> Any:
    """``value`` in the type of its ``default``: bool, int, float, or a range ``(low, high)``.

    Raises: RequestError where it does not fit.
    """
    if isinstance(default, tuple):
        if not isinstance(value, tuple | list) or len(value) != 2 or not all(map(_is_number, value)) or value[0] > value[1]:
            raise RequestError(f"{field} = {value!r} is no range; give (low, high), by default {default!r}")
        return tuple(map(float, value))
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    fits = {
        bool: isinstance(value, bool),
        int: _is_number(value) and hasattr(value, "__index__"),
        float: _is_number(value) and math.isfinite(value),
    }
    if not fits[type(default)]:
        raise RequestError(f"{field} = {value!r} does not fit; it is {kinds[type(default)]}, by default {default!r}")
    return type(default)(value)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and not math.isnan(value)
