"""Optional loggers: the rows of a run, averaged over lanes, to TensorBoard or Weights & Biases."""

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pgjax.errors import RequestError
from pgjax.metrics import mean_over_lanes
from pgjax.runner import Event, RunSpec

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def make(name: str, out: Path, spec: RunSpec) -> Callable[[Event], None]:
    """A listener for the events of a run. ``name``: ``tensorboard`` or ``wandb``.

    Raises: RequestError naming the extra to install if the library is missing.
    """
    try:
        library = importlib.import_module(_MODULES[name])
    except ImportError:
        raise RequestError(f"--log-to {name} needs {_MODULES[name]}: pip install 'pgjax[{name}]'") from None
    if name == "wandb":
        logger = library.init(project="pgjax", dir=str(out.parent), name=out.name, config=spec.config())
        write = lambda values, step: logger.log(values, step=step)  # noqa: E731
        close = logger.finish
    else:
        logger = library.SummaryWriter(str(out / "tensorboard"))

        def write(values, step):
            for key, value in values.items():
                logger.add_scalar(key, value, step)

        close = logger.close

    def listen(event: Event) -> None:
        if event.kind == "rows":
            rows = mean_over_lanes(event.data["rows"])
            for index, env_steps in enumerate(rows.pop("env_steps")):
                values = {key: float(value[index]) for key, value in rows.items() if np.isfinite(value[index])}
                write(values, int(env_steps))
        elif event.kind == "evaluated":
            episodes = event.data["episodes"]
            values = {f"evaluation/{name}": float(np.mean(value)) for name, value in episodes._asdict().items()}
            write(values, event.data["env_steps"])
        elif event.kind == "finished":
            close()

    return listen
