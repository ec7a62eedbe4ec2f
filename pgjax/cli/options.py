"""What the commands share: options parsed with one line of complaint, exit codes."""

import contextlib
import io
import itertools
import os
import re
from collections.abc import Callable
from typing import Any

from pgjax.errors import RequestError

EXIT_FAILED, EXIT_WRONG_REQUEST = 1, 2


def parse(cls: type, argv: list[str], prog: str, **kwargs) -> Any:
    """``tyro.cli`` whose complaints become one ``RequestError`` line."""
    import tyro

    complaint = io.StringIO()
    columns = os.environ.get("COLUMNS")
    wants_help = any(word in ("-h", "--help") for word in argv)
    try:
        if not wants_help:
            os.environ["COLUMNS"] = "10000"  # so that no line of a complaint is broken in the middle
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, args=argv, prog=prog, **kwargs)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise RequestError(_one_line(complaint.getvalue(), prog)) from None
    finally:
        if columns is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = columns


def _one_line(complaint: str, prog: str) -> str:
    # A box is drawn around the complaint, with lines of either kind: borders go, what stands between them stays.
    lines = [line.strip() for line in complaint.splitlines()]
    lines = [re.sub(r"^[│|]\s*|\s*[│|]$", "", line) for line in lines if not re.match(r"[╭╰+]", line)]
    lines = [line for line in lines if line and not re.fullmatch(r"[─-]+", line)]
    lines = [line for line in lines if not line.startswith(("For full helptext", "Argument helptext"))]
    said = []
    for line in lines:
        flag = re.match(r"(--[\w.-]+)", line)
        if line.endswith(":"):
            said.append(line)
        elif flag:
            said.append(flag.group(1))
        elif not said or not said[-1].startswith("--"):
            said.append(line)
    text = " ".join(dict.fromkeys(said)).replace("Perhaps you meant:", "; perhaps you meant")
    text = re.sub(r"\s+;", ";", text).replace(f"Missing from {prog}:", "missing")
    return f"{text or 'the arguments are wrong'} (see {prog} --help)"


def peek(argv: list[str], flag: str) -> str | None:
    """The value of an option before the options are parsed."""
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if word == flag:
            return following
        if word.startswith(flag + "="):
            return word[len(flag) + 1 :]
    return None


def repeated(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    """``[flag, a, b]`` as ``[flag, a, flag, b]`` for these flags."""
    written, flag = [], None
    for word in argv:
        if word.startswith("--"):
            flag = word if word in flags else None
            written.append(word)
        else:
            # A flag that already has a word is written once more.
            written += [flag, word] if flag is not None and written[-1] != flag else [word]
    return written


def pairs(flag: str, words: list[str], read: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """``["k=v"]`` to ``{"k": v}``, with numbers, booleans and None recognised unless ``read`` says how."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RequestError(f"{flag} {word!r} must be K=V")
        pairs[key] = (read or _value)(value)
    return pairs


def _value(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    if "," in text and not any(isinstance(value := _value(part), str) or value is None for part in text.split(",")):
        return tuple(map(_value, text.split(",")))  # a range, as in healthy_z_range=0.7,2
    return text
