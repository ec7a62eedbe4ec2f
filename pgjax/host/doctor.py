"""``pgjax doctor``: is what pgjax needs there, and does it work?"""

import sys
import time
from collections.abc import Callable
from importlib import metadata

_NEEDED = (
    "jax jaxlib flax optax distrax chex flashbax gymnax brax mujoco mujoco-mjx orbax-checkpoint pandas pyarrow matplotlib "
    "scipy tyro rich filelock"
).split()
_EXTRAS = {"gymnasium": "mujoco", "playground": "playground", "tensorboardX": "tensorboard", "wandb": "wandb"}


def examine(say: Callable[[str], None]) -> int:
    """Checks versions, devices, a short training run and the store; says what it finds; returns 0, or 1 on a failure."""
    failures = []
    say(f"python {sys.version.split()[0]}")
    for name in _NEEDED:
        try:
            say(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            failures.append(f"{name} is missing: pip install {name}")
    for name, extra in _EXTRAS.items():
        try:
            say(f"{name} {metadata.version(name)} (extra)")
        except metadata.PackageNotFoundError:
            say(f"{name} not installed (extra: pip install 'pgjax[{extra}]')")
    for check in (_devices, _training, _environments):
        try:
            started = time.perf_counter()
            say(f"{check()} ({time.perf_counter() - started:.1f} s)")
        except Exception as error:
            # Whatever goes wrong here is what the user wants to know.
            failures.append(f"{check.__name__.strip('_')}: {type(error).__name__}: {error}".splitlines()[0])
    for failure in failures:
        say(f"FAILED {failure}")
    say("all well" if not failures else f"{len(failures)} checks failed")
    return 1 if failures else 0


def _devices() -> str:
    from pgjax.host import lanes

    lanes.use_host_devices()
    import jax

    devices = jax.devices()
    free = lanes.available_bytes(devices[0]) / 2**30
    return f"{len(devices)} {devices[0].platform} devices, {devices[0].device_kind}; {free:.1f} GiB for runs"


def _training() -> str:
    import tempfile

    import pgjax

    spec = pgjax.RunSpec("ppo", "gymnax/CartPole-v1", 2048, seeds=(0, 1), num_evals=1, eval_episodes=2)
    with tempfile.TemporaryDirectory() as folder:
        with pgjax.RunStore.create(f"{folder}/run", spec.config()) as store:
            result = pgjax.run(spec, store)
        rows = len(pgjax.load(f"{folder}/run").metrics)
    if result.status != "finished" or not rows:
        raise RuntimeError(f"a short run ended as {result.status} with {rows} rows")
    return f"trained 2 seeds for {result.env_steps} env steps, stored and read back {rows} rows"


def _environments() -> str:
    import pgjax

    names = ("gymnax/Pendulum-v1", "brax/inverted_pendulum")
    for name in names:
        pgjax.make_env(name)
    return f"made {', '.join(names)}"
