"""Optional loggers: what ``log.jsonl`` says of a run, shown in TensorBoard or Weights & Biases.

Lines are sent once a checkpoint holds them, from where the last process left off. So nothing is sent that a kill could take
back, and a resumed run goes on in the same curves.
"""

import contextlib
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pgjax.errors import RequestError
from pgjax.host.checkpoints import disk_errors
from pgjax.host.store import read_run

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_NOT_CURVES = ("kind", "env_steps", "progress", "lanes", "text")


def require(name: str) -> Any:
    """The library of ``name``, tensorboard or wandb. Raises: RequestError naming the extra to install if it is missing."""
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError:
        raise RequestError(f"--log-to {name} needs {_MODULES[name]}: pip install 'pgjax[{name}]'") from None


@contextlib.contextmanager
def follow(path: Path, name: str) -> Iterator[Callable[[], None]]:
    """Gives a function that sends what a run's log has gained; call it after each checkpoint. Leaving sends no more.

    The connection is made at once, so that one that cannot be made costs no training.

    Lanes that were trained in groups, one after the other, are one curve each group: a run of its own in W&B, a folder of its
    own in TensorBoard.

    Args: path: a run's folder.  name: tensorboard or wandb.
    Raises: RequestError if W&B refuses.
    """
    make = {"tensorboard": _TensorBoard, "wandb": _Wandb}[name]
    log, offset_file = path / "log.jsonl", path / name / "sent"
    writers: dict[str, Any] = {"": make(path, "")}

    def send() -> None:
        if not log.exists():
            return
        # The log is shorter than what was sent if a damaged checkpoint made the run go back.
        sent = min(int(offset_file.read_text()), log.stat().st_size) if offset_file.exists() else 0
        with log.open("rb") as file:
            file.seek(sent)
            lines = file.read()
        for line in lines.splitlines():
            entry = json.loads(line)
            part = "-".join(map(str, entry.get("lanes", ())))
            if entry["kind"] == "note":
                continue
            if part not in writers:
                writers[part] = make(path, part)
            prefix = "evaluation/" if entry["kind"] == "evaluation" else ""
            values = {prefix + key: value for key, value in entry.items() if key not in _NOT_CURVES}
            writers[part].write(values, entry["env_steps"])
        with disk_errors(offset_file):
            offset_file.parent.mkdir(exist_ok=True)
            offset_file.write_text(f"{sent + len(lines)}")

    try:
        yield send
    finally:
        for writer in writers.values():
            writer.close()


class _TensorBoard:
    def __init__(self, path: Path, part: str):
        self._writer = require("tensorboard").SummaryWriter(str(path / "tensorboard" / (f"lanes-{part}" if part else "")))

    def write(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, path: Path, part: str):
        run = read_run(path)
        # The same for every process that goes on with the run, so that W&B goes on with its own.
        identity = hashlib.sha256(f"{path.name} {run['created']} {part}".encode()).hexdigest()[:12]
        name = path.name + (f" lanes {part}" if part else "")
        wandb = require("wandb")
        try:
            self._run = wandb.init(
                project="pgjax",
                dir=str(path),
                name=name,
                config=run["config"],
                id=identity,
                resume="allow",
                reinit="create_new",
            )
        except wandb.errors.Error as error:
            why = str(error).splitlines()[0]
            raise RequestError(f"--log-to wandb: {why} (WANDB_MODE=offline logs without an account)") from None

    def write(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
