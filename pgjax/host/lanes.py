"""Lanes: many training runs as one program, spread over the devices, within the memory there is."""

import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pgjax.errors import RequestError

Device = Any  # jax.Device, which type checkers take for a variable

# Multiplications and additions: 512 samples through 64 x 64 weights gain a quarter by one thread, 2048 lose a tenth.
_SMALL = 1 << 21


def use_host_devices(num_devices: int | None = None) -> None:
    """Makes JAX show ``num_devices`` CPU devices (None: one per core), to be called before anything else uses JAX.

    One vmapped program leaves the cores of a CPU idle; lanes sharded over one device per core do not. Does nothing if
    the number was chosen already, or if JAX has started.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", num_devices or len(os.sched_getaffinity(0)))
    except RuntimeError:
        pass  # JAX has started; its devices stay as they are.


def use_one_thread() -> None:
    """Makes JAX compute on one thread of the CPU, to be called before anything else uses JAX: for one lane of a small program.

    Its kernels take a microsecond or two, and XLA hands them to a second thread and waits for them: docs/benchmarks.md. Does
    nothing if the user has decided (``PJRT_NPROC``), or if JAX has started.
    """
    try:
        jax.config.update("jax_num_cpu_devices", 1)
    except RuntimeError:
        return
    os.environ.setdefault("PJRT_NPROC", "1")


def is_small(setup: Any, env: str) -> bool:
    """Whether the widest product of a gradient step takes so little that a second thread costs more than it brings.

    Known before anything is built, since JAX starts with that; False where ``setup`` does not tell. Images have convolutions.
    """
    if not hasattr(setup, "num_minibatches") or "MinAtar" in env:
        return False
    rows = setup.num_envs * setup.num_steps // max(setup.num_minibatches, 1)
    widths = (*(setup.hidden_sizes or (64,)), *(setup.critic_hidden_sizes or ()))
    return rows * max(widths) ** 2 <= _SMALL


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk between processes, unless the user has decided where, or that not.

    They go to ``$XDG_CACHE_HOME/pgjax`` or ``~/.cache/pgjax``. ``JAX_COMPILATION_CACHE_DIR`` names another folder.
    """
    options: Any = jax.config  # its fields are made at run time
    if options.jax_compilation_cache_dir is None and options.jax_enable_compilation_cache:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "pgjax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def choose_devices(num_lanes: int, host_callback: bool, num_devices: int | None = None) -> list[Device]:
    """The devices to spread lanes over: no more than there are lanes, and one where a step leaves the device.

    (A callback on large arguments inside a program sharded over two host devices hangs, so those lanes never are.)
    """
    devices = jax.devices()
    if num_devices is not None:
        if not 1 <= num_devices <= len(devices):
            raise RequestError(f"devices = {num_devices}: there are {len(devices)}; give 1 to {len(devices)}")
        devices = devices[:num_devices]
    return devices[:1] if host_callback else devices[: max(1, num_lanes)]


class Spread:
    """Maps per-lane functions over lanes and devices. Arrays have the lanes in front, padded to whole devices.

    Padding lanes repeat the first ones, and their results are dropped by ``take``.
    """

    def __init__(self, num_lanes: int, devices: list[Device]):
        self.num_lanes = num_lanes
        self.devices = devices
        self.num_padded = -(-num_lanes // len(devices)) * len(devices)
        self.per_device = self.num_padded // len(devices)
        self._mesh = Mesh(np.asarray(devices), ("lanes",))

    def map(self, fn: Callable, num_lane_arguments: int) -> Callable:
        """``fn(lane..., shared...)`` over lanes: the first arguments have a lane axis, the others are the same for all."""

        def over_lanes(*args):
            lanes, shared = args[:num_lane_arguments], args[num_lane_arguments:]
            if self.per_device == 1:
                # One lane needs no batched kernels, and runs a third faster without.
                out = fn(*jax.tree.map(lambda x: x[0], lanes), *shared)
                return jax.tree.map(lambda x: x[None], out)
            return jax.vmap(fn, (0,) * num_lane_arguments + (None,) * len(shared))(*lanes, *shared)

        if len(self.devices) == 1:
            return over_lanes

        def sharded(*args):
            specs = tuple(PartitionSpec("lanes") if i < num_lane_arguments else PartitionSpec() for i in range(len(args)))
            return jax.shard_map(
                over_lanes, mesh=self._mesh, in_specs=specs, out_specs=PartitionSpec("lanes"), check_vma=False
            )(*args)

        return sharded

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Where padded lanes live."""
        if len(self.devices) == 1:
            return jax.sharding.SingleDeviceSharding(self.devices[0])
        return NamedSharding(self._mesh, PartitionSpec("lanes"))

    def pad(self, tree: Any) -> Any:
        """Lanes [L, ...] on the host or one device to padded lanes."""
        index = np.arange(self.num_padded) % self.num_lanes
        return jax.tree.map(lambda x: x[index], tree)

    def put(self, tree: Any) -> Any:
        """Places padded lanes on their devices."""
        return jax.device_put(tree, self.sharding)

    def share(self, tree: Any) -> Any:
        """Places what all lanes share on every device."""
        if len(self.devices) == 1:
            return jax.device_put(tree, self.devices[0])
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def take(self, tree: Any) -> Any:
        """Padded lanes to lanes, on the host."""
        return jax.tree.map(lambda x: np.asarray(x)[: self.num_lanes], tree)


def over_devices(fn: Callable, devices: Sequence[Device], in_specs: Any, out_specs: Any) -> Callable:
    """``fn`` on every device, of its share of the arguments; what it returns, every device then has whole.

    Args: in_specs, out_specs: of ``jax.shard_map``, over the axis ``lanes``. One device runs ``fn`` as it is.
    """
    if len(devices) == 1:
        return fn
    mesh = Mesh(np.asarray(devices), ("lanes",))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return lambda *args: jax.lax.with_sharding_constraint(mapped(*args), NamedSharding(mesh, PartitionSpec()))


def program_bytes(compiled, num_devices: int) -> int:
    """Memory that a compiled program holds while it runs, in bytes over all devices, by XLA's own account."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return int((held - analysis.alias_size_in_bytes) * num_devices)


def array_bytes(tree: Any) -> int:
    """Bytes of the arrays in ``tree``, or of what their shapes and types describe; random keys count as nothing."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


# What a run on a CPU takes besides its training program as XLA accounts for it: programs for evaluation and saving, copies of
# the state on their way to the host, and what XLA leaves out. Fitted to resident memory, docs/benchmarks.md has the table.
_CPU_FIXED_BYTES, _CPU_FACTOR = 128 << 20, 1.4


def run_bytes(program_bytes: int, device: Device) -> int:
    """Memory that a run takes from the moment its training program, of ``program_bytes``, is compiled; in bytes."""
    if device.platform != "cpu":
        return program_bytes
    return int(_CPU_FIXED_BYTES + _CPU_FACTOR * program_bytes)


def lanes_that_fit(num_lanes: int, program_bytes: int, device: Device, available: int) -> int:
    """How many lanes can run in ``available`` bytes if the program of ``num_lanes`` holds ``program_bytes``; may be 0."""
    fixed = run_bytes(0, device)
    per_lane = (run_bytes(program_bytes, device) - fixed) / num_lanes
    return max(0, min(num_lanes, int((available - fixed) / max(per_lane, 1))))


def peak_bytes(growth: int) -> int:
    """Peak resident memory of this process, in bytes, if it grows by so much from here: at least what it had so far."""
    now, most = resident_bytes()
    return max(most, now + growth)


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process in bytes, now and at its most; the latter for both where there is no /proc."""
    status = dict(line.split(":", 1) for line in _read("/proc/self/status").splitlines())
    if "VmHWM" in status:
        # getrusage would also count what the parent held when it forked.
        return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most


def available_bytes(device: Device) -> int:
    """Memory a run may take: on a CPU 70 % of what the machine or its cgroup has left, else what the device reports."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return int(0.9 * (stats.get("bytes_limit", 2**63) - stats.get("bytes_in_use", 0)))
    free = cgroup_free_bytes()
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    return int(0.7 * max(0, min(free))) if free else 2**63


def cgroup_free_bytes(root: str | Path = "/sys/fs/cgroup", membership: str | Path = "/proc/self/cgroup") -> list[int]:
    """Bytes below the limit of this process's control group and of each one above it that has a limit; none, no limit.

    Files that the kernel keeps in memory but would drop at need count as free, as they do in MemAvailable.
    Args: root: where control groups are mounted, of version 1 or 2.  membership: file that names this process's groups.
    """
    free = []
    # Inside a container the path may be one of the host's, which is not there: the mount itself is then the group.
    for line in _read(membership).splitlines() or ["0::/", "1:memory:/"]:
        number, kinds, path = line.split(":", 2)
        if number == "0" and not kinds:
            mount, limit, used, droppable = Path(root), "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            mount, droppable = Path(root) / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        names = [name for name in path.split("/") if name not in ("", "..")]
        for depth in range(len(names), -1, -1):
            folder = mount.joinpath(*names[:depth])
            numbers = [_read(folder / name).strip() for name in (limit, used)]
            if all(number.isdigit() for number in numbers):
                stat = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines())
                free.append(int(numbers[0]) - int(numbers[1]) + int(stat.get(droppable, 0)))
    return free


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def stack_lanes(trees: list[Any]) -> Any:
    """One tree whose leaves have the lanes in front."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)
