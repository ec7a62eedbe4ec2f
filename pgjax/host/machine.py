"""What decides whether a run can be repeated: versions, platform, devices, commit."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pgjax

# The checkout, if this file lies in one: an editable installation links to it.
_ROOT = Path(os.path.realpath(__file__)).parent.parent.parent
_LIBRARIES = (
    "jax jaxlib flax optax distrax chex flashbax evosax gymnax brax mujoco mujoco-mjx playground gymnasium orbax-checkpoint "
    "numpy pyarrow"
).split()


def describe_machine() -> dict[str, Any]:
    """What decides whether a run can be repeated: versions, platform, devices, precision, git commit. Starts JAX."""
    import jax

    devices = jax.devices()
    return {
        "pgjax": pgjax.__version__,
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "precision": str(getattr(jax.config, "jax_default_matmul_precision", None) or "default"),
        "x64": bool(getattr(jax.config, "jax_enable_x64", False)),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The checkout's commit, with ``+changes`` if files differ from it; None outside a checkout."""
    # Only our own repository: an installed package may lie inside somebody else's.
    if not (_ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
