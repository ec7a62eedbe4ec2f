"""The two ways a request ends without a result; the command line maps them to exit codes 2 and 1."""


class RequestError(ValueError):
    """The request was wrong. The message is one line naming the field, the value and the remedy (exit code 2)."""


class DamagedFile(RequestError):
    """A file is not what was written; whoever can do without it may go on."""


class RunError(RuntimeError):
    """The request was right and the run failed, e.g. a full disk or non-finite lanes (exit code 1)."""


def close_names(name: str, known) -> str:
    """A sentence naming the known names close to ``name``, or all of them when none is close."""
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    if not close:
        folded = {k.lower(): k for k in known}
        close = [folded[m] for m in difflib.get_close_matches(name.lower(), folded, n=4, cutoff=0.5)]
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}"
