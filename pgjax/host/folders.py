"""Who may write into a folder: one process at a time, named to whoever else tries."""

import contextlib
import datetime
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import filelock

from pgjax.errors import RequestError
from pgjax.host.checkpoints import disk_errors, sync


class InUse(RequestError):
    """Another process holds the folder."""


@contextlib.contextmanager
def hold_folder(path: Path, lock_name: str) -> Iterator[None]:
    """Holds a folder for this process, through the file ``lock_name`` in it; the system lets go of it if the process dies.

    Raises: InUse naming the owner and since when; RequestError if the folder cannot be written.
    """
    lock = lock_folder(path, lock_name)
    try:
        write_owner(path)
        yield
    finally:
        with contextlib.suppress(OSError):
            (path / ".owner.json").unlink(missing_ok=True)
        lock.release()


def write_owner(path: Path) -> None:
    owner = {"pid": os.getpid(), "host": platform.node(), "since": timestamp()}
    with disk_errors(path / ".owner.json"):
        (path / ".owner.json").write_text(json.dumps(owner))


def lock_folder(path: Path, name: str = ".lock") -> filelock.BaseFileLock:
    lock = filelock.FileLock(path / name, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        try:
            owner = json.loads((path / ".owner.json").read_text())
            who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        raise InUse(f"{path} is in use by {who}; wait for it or choose another --out") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}; choose another --out") from error
    return lock


def owner_lives(path: Path) -> bool:
    """Whether the process that wrote ``.owner.json`` may still be there; of another host's we cannot know."""
    try:
        owner = json.loads((path / ".owner.json").read_text())
        if owner["host"] != platform.node():
            return True
        os.kill(owner["pid"], 0)
    except PermissionError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``target`` if all goes well and disappears if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        yield aside
        os.replace(aside, target)
        sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
