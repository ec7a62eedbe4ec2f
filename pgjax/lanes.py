"""Lanes: many training runs as one program, spread over the devices, within the memory there is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pgjax.errors import RequestError

Device = Any  # jax.Device, which type checkers take for a variable


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


def program_bytes(compiled, num_devices: int) -> int:
    """Memory that a compiled program holds while it runs, in bytes over all devices, by XLA's own account."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return int((held - analysis.alias_size_in_bytes) * num_devices)


def available_bytes(device: Device) -> int:
    """Memory a run may take: on a CPU 70 % of what the machine or its cgroup has left, else what the device reports."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return int(0.9 * (stats.get("bytes_limit", 2**63) - stats.get("bytes_in_use", 0)))
    free = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(limit).strip(), _read(used).strip()
        if limit.isdigit() and used.isdigit():
            free.append(int(limit) - int(used))
    return int(0.7 * min(free)) if free else 2**63


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def stack_lanes(trees: list[Any]) -> Any:
    """One tree whose leaves have the lanes in front."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)
