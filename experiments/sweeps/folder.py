"""A sweep's folder: what is finished, what is half done, and who is at work.

    sweep.json                 format, version, the sweep file as it was at each start, by which command
    sweep.lock                 held by the driver; .owner.json says who
    cells/NAME/                one finished or failed cell: an ordinary run folder, and ``result.json``, what it came to
    groups/ID.json             cells that train as one program, until they are all in ``cells``, and why that failed if it did
    groups/ID/                 their run, with its checkpoints
    journal.jsonl              what was started and ended, when, where

A cell is one configuration with a block of seeds. Its name ends in the hash of all that determines its result, so a sweep that
is changed finds again what it has in common with the one before.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pgjax
from pgjax.errors import RequestError
from pgjax.experiments.objective_file import is_learned
from pgjax.experiments.results import Result
from pgjax.host.checkpoints import disk_errors, from_json, to_json, write_file
from pgjax.host.folders import hold_folder
from pgjax.host.runner import RunSpec
from pgjax.host.store import read_run

FORMAT, VERSION = "pgjax-sweep", 1
# Fields of a run that do not determine its result.
_IRRELEVANT = ("devices", "preset")
# Whose versions determine what an environment does.
_LIBRARIES = {
    "gymnax": ("gymnax",),
    "brax": ("brax", "mujoco", "mujoco-mjx"),
    "mujoco": ("gymnasium", "mujoco", "mujoco-mjx"),
    "playground": ("playground", "mujoco", "mujoco-mjx", "warp-lang"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One configuration with a block of seeds. spec: its run.  name: of its folder; ends in the hash of what determines it."""

    spec: RunSpec
    name: str


def cell_of(spec: RunSpec) -> Cell:
    """The cell of a specification with one configuration."""
    determining = {
        "config": {name: value for name, value in spec.config().items() if name not in _IRRELEVANT},
        "pgjax": pgjax.__version__,
        "env": env_versions(spec.env),
    }
    # A learned objective or rule has the hash of its weights in its name.
    if spec.objective and not is_learned(spec.objective):
        determining["objective"] = Path(spec.objective.rpartition(":")[0]).read_text()
    digest = hashlib.sha256(json.dumps(to_json(determining), sort_keys=True).encode()).hexdigest()
    return Cell(spec, f"{spec.algorithm}-{spec.env.replace('/', '-')}-{digest[:16]}")


def env_versions(env: str) -> dict[str, str]:
    """Versions of the libraries that decide what the environment ``env`` does."""
    versions = {}
    for name in _LIBRARIES.get(env.split("/")[0], ()):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = _version(name)
    return versions


_versions: dict[str, str] = {}


def _version(name: str) -> str:
    # Ten thousand cells ask for the same few.
    if name not in _versions:
        _versions[name] = metadata.version(name)
    return _versions[name]


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells that share a Setup and train as one program.

    id: of its folder.  spec: its run.  cells: name of each, number of its configuration in ``spec``, and its seeds.
    error: why it ended without a result, if it did.
    """

    id: str
    spec: RunSpec
    cells: tuple[tuple[str, int, tuple[int, ...]], ...]
    error: str = ""

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self.cells}

    def dump(self) -> str:
        cells = [{"name": name, "config": config, "seeds": seeds} for name, config, seeds in self.cells]
        content = {"format": FORMAT, "version": VERSION, "spec": self.spec.config(), "cells": cells, "error": self.error}
        return json.dumps(to_json(content), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Group":
        """Raises: RequestError if the file is damaged or of another version."""
        try:
            content = from_json(json.loads(path.read_text()))
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"it is {content['format']} version {content['version']}, this pgjax knows {VERSION}")
            cells = tuple((cell["name"], cell["config"], tuple(cell["seeds"])) for cell in content["cells"])
            return cls(path.stem, RunSpec.from_config(content["spec"]), cells, content["error"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{path} cannot be read ({error}); delete it and the folder beside it to begin anew") from None


@dataclasses.dataclass(frozen=True)
class CellStatus:
    """status: ``finished``, ``failed``, ``running``, ``interrupted``, ``pending`` or ``unreadable``; note: why, in one line.

    done: share of its training behind it.
    """

    cell: Cell
    status: str
    note: str = ""
    done: float = 0.0


class SweepFolder:
    """The folder of one sweep. Reading needs no lock; ``owned`` takes it for the driver."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.cells, self.groups = self.path / "cells", self.path / "groups"

    # --- reading

    def finished(self) -> set[str]:
        """Names of the folders in ``cells``."""
        try:
            return {entry.name for entry in os.scandir(self.cells) if not entry.name.startswith(".")}
        except FileNotFoundError:
            return set()

    def result(self, name: str) -> Result:
        """What a cell came to. Raises: RequestError if its file is damaged or of another version."""
        path = self.cells / name / "result.json"
        try:
            return Result.parse(path.read_text())
        except FileNotFoundError:
            raise RequestError(f"{path} is missing; delete the folder to run the cell again") from None
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise RequestError(f"{path} cannot be read ({why}); delete the folder to run the cell again") from None

    def statuses(self, cells: Sequence[Cell]) -> list[CellStatus]:
        """The status of every cell, in order."""
        there = self.finished()
        begun = {name: begun for group in self.open_groups()[0] for begun in [self._begun(group)] for name in group.names}
        found = []
        for cell in cells:
            if cell.name not in there:
                found.append(CellStatus(cell, *begun.get(cell.name, ("pending", "", 0.0))))
                continue
            try:
                result = self.result(cell.name)
                found.append(CellStatus(cell, result.status, result.note, 1.0))
            except RequestError as error:
                found.append(CellStatus(cell, "unreadable", str(error)))
        return found

    def open_groups(self) -> tuple[list[Group], list[str]]:
        """Groups that are not all in ``cells`` yet, and what is wrong with those that cannot be read."""
        groups, wrong = [], []
        for path in sorted(self.groups.glob("*.json")):
            try:
                groups.append(Group.read(path))
            except RequestError as error:
                wrong.append(str(error))
        return groups, wrong

    def _begun(self, group: Group) -> tuple[str, str, float]:
        """Status, note and share done of a group's cells that are not in ``cells``."""
        folder = self.groups / group.id
        if group.error:
            return "failed", group.error, progress(folder)
        try:
            status = "running" if read_run(folder)["status"] == "running" else "interrupted"
        except RequestError:
            return "pending", "", 0.0
        return status, "", progress(folder)

    def write_group(self, group: Group) -> None:
        """Records what a group is, before it is begun, or why it failed."""
        write_whole(self.groups / f"{group.id}.json", group.dump())

    def drop_group(self, group: Group) -> None:
        """Removes a group whose cells are all in ``cells``: the record last, so that a kill leaves no folder without one."""
        shutil.rmtree(self.groups / group.id, ignore_errors=True)
        with disk_errors(self.groups):
            (self.groups / f"{group.id}.json").unlink(missing_ok=True)

    # --- owning

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Holds the sweep. Raises: RequestError naming the owner if another driver does, or if the folder cannot be written."""
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.cells.mkdir(exist_ok=True)
            self.groups.mkdir(exist_ok=True)
        except OSError as error:
            raise RequestError(f"--out {self.path}: {error.strerror}; choose another --out") from None
        with hold_folder(self.path, "sweep.lock"):
            yield

    def check(self) -> None:
        """Raises RequestError if the folder is something else than a sweep of a version we know, or an empty one."""
        try:
            content = json.loads((self.path / "sweep.json").read_text())
        except FileNotFoundError:
            ours = {"sweep.lock", ".owner.json", "cells", "groups", "journal.jsonl"}
            if self.path.is_dir() and (odd := sorted({entry.name for entry in os.scandir(self.path)} - ours)):
                raise RequestError(f"--out {self.path} is no sweep (it holds {odd[0]}); choose another --out") from None
            return
        except NotADirectoryError:
            raise RequestError(f"--out {self.path} is a file; choose another --out") from None
        except (OSError, ValueError):
            return  # It only keeps a record; the cells speak for themselves.
        if isinstance(content, dict) and content.get("version", 0) > VERSION:
            raise RequestError(
                f"{self.path} was written by a newer pgjax (sweep version {content['version']}, this one knows {VERSION}); "
                "update pgjax or choose another --out"
            )

    def record_start(self, file: Path, text: str, command: str) -> None:
        """Writes what was asked for into ``sweep.json``, beside earlier requests."""
        starts = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            starts = json.loads((self.path / "sweep.json").read_text())["starts"]
        if not starts or starts[-1]["text"] != text:
            starts.append({"file": str(file), "text": text, "command": command, "when": now()})
        content = {"format": FORMAT, "version": VERSION, "starts": starts}
        write_whole(self.path / "sweep.json", json.dumps(content, indent=1) + "\n")

    def note(self, event: str, **facts: Any) -> None:
        """Adds a line to the journal. Several processes may: a short line is appended as a whole."""
        line = {"when": now(), "event": event, "pid": os.getpid(), "host": platform.node(), **facts}
        with disk_errors(self.path / "journal.jsonl"), (self.path / "journal.jsonl").open("a") as file:
            file.write(json.dumps(to_json(line)) + "\n")

    def journal(self) -> list[dict[str, Any]]:
        """What was noted; a line that was cut short is passed over."""
        lines = []
        with contextlib.suppress(OSError):
            for line in (self.path / "journal.jsonl").read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
        return lines


def progress(group: Path) -> float:
    """Share of a run's training that its log tells of, 0 to 1."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError, IndexError):
        with (group / "log.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - (1 << 14)))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                return min(1.0, float(json.loads(line)["progress"]))
    return 0.0


def write_whole(path: Path, text: str) -> None:
    """Writes a file aside and renames it, so that a reader never finds half of it."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        write_file(aside, text.encode())
        aside.replace(path)


def now() -> str:
    """The time, in UTC; for people to read, never compared with another clock's."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
