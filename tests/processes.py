"""Python in a process of its own, for what has to be said before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(code, *args, timeout=240, **environment):
    """A process with that code, ended, whose ``returncode``, ``stdout`` and ``stderr`` tell what came of it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=timeout)
