"""Environments under one contract (``pgjax.types.Environment``), made by name.

    env = make_env("gymnax/CartPole-v1")
    env = make_env("brax/hopper", backend="spring")

Nothing heavy is imported before an environment is made.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from pgjax.errors import RequestError, close_names

_GYMNAX = (
    *("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"),
    *("Asterix-MinAtar", "Breakout-MinAtar", "Freeway-MinAtar", "Seaquest-MinAtar", "SpaceInvaders-MinAtar"),
    *("Catch-bsuite", "DeepSea-bsuite", "MemoryChain-bsuite", "UmbrellaChain-bsuite", "DiscountingChain-bsuite"),
    *("MNISTBandit-bsuite", "SimpleBandit-bsuite", "FourRooms-misc", "MetaMaze-misc", "PointRobot-misc"),
    *("BernoulliBandit-misc", "GaussianBandit-misc", "Reacher-misc", "Swimmer-misc", "Pong-misc", "FrozenLake-misc"),
)
_BRAX = (
    *("ant", "fast", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverted_pendulum"),
    *("inverted_double_pendulum", "pusher", "reacher", "swimmer", "walker2d"),
)
_MUJOCO = (
    *("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5", "HumanoidStandup-v5", "Swimmer-v5"),
    *("Reacher-v5", "Pusher-v5", "InvertedPendulum-v5", "InvertedDoublePendulum-v5"),
    *("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4", "HumanoidStandup-v4", "Swimmer-v4"),
    *("Reacher-v4", "Pusher-v4", "InvertedPendulum-v4", "InvertedDoublePendulum-v4"),
)
_PLAYGROUND = (
    *("AcrobotSwingup", "AcrobotSwingupSparse", "BallInCup", "CartpoleBalance", "CartpoleBalanceSparse", "CartpoleSwingup"),
    *("CartpoleSwingupSparse", "CheetahRun", "FingerSpin", "FingerTurnEasy", "FingerTurnHard", "FishSwim", "HopperHop"),
    *("HopperStand", "HumanoidStand", "HumanoidWalk", "HumanoidRun", "PendulumSwingup", "PointMass", "ReacherEasy"),
    *("ReacherHard", "SwimmerSwimmer6", "WalkerRun", "WalkerStand", "WalkerWalk"),
)
# Our own, in ``toy.py``.
_TOY = (
    *("TwoStep", "GridWorld-5x5", "GridWorld-10x10", "GridWorld-20x20", "Chain-7", "Chain-15"),
    *("Cliff-3x6", "Cliff-4x8", "Cliff-5x10", "Bandit5", "Bandit10", "Bandit20", "Bandit100", "Bandit1000"),
    *("Discrete2D-10", "Discrete2D-50", "Discrete2D-100"),
)
# Our own, in ``grid_world.py``.
_GRID = (
    *("all", "small", "medium", "large", "debug", "dense", "sparse", "long", "longer", "long_dense"),
    *("rand_dense", "rand_long", "rand_small", "rand_sparse", "rand_very_dense"),
    *(f"maze-{i}" for i in range(9)),
)
_NAMES = {"gymnax": _GYMNAX, "brax": _BRAX, "mujoco": _MUJOCO, "playground": _PLAYGROUND, "toy": _TOY, "grid": _GRID}
# The adapter, where it is not named like the library.
_ADAPTERS = {"grid": "grid_world"}
# The module to import, where it is not named like the library here.
_MODULES = {"playground": "mujoco_playground"}
# What pip has to install where a library is missing; an extra of pgjax where one exists.
_REQUIREMENTS = {
    "gymnax": "gymnax>=1.0.1",
    "brax": "brax>=0.14.2",
    "mujoco": "pgjax[mujoco]",
    "playground": "pgjax[playground]",
}
BRAX_BACKENDS = ("spring", "generalized", "positional", "mjx")
MUJOCO_PHYSICS = ("c", "mjx", "warp")
PLAYGROUND_IMPLS = ("jax", "warp")

# What does not work with the libraries as they are: (name, backend or None for every one) -> why.
_BROKEN = {
    ("gymnax/MNISTBandit-bsuite", None): (
        "it downloads MNIST when it is made and reads pixels above 127 as negative; "
        "pgjax.envs.from_gymnax takes an instance made by hand"
    ),
    ("mujoco/Pusher-v4", None): "Gymnasium refuses it on MuJoCo 3 and later, where its model behaves otherwise; use Pusher-v5",
    **{
        (f"mujoco/{task}", "warp"): "Warp computes no contact forces on bodies, which the task observes or pays for"
        for task in ("Ant-v5", "Humanoid-v5", "HumanoidStandup-v5", "Humanoid-v4", "HumanoidStandup-v4")
    },
    **{
        ("brax/swimmer", backend): "Brax's swimmer accepts only the generalized backend"
        for backend in ("spring", "positional", "mjx")
    },
}

_registered: dict[str, Callable] = {}


class EnvEntry(NamedTuple):
    """One line of ``list_envs``.

    name: what ``make_env`` takes.  library: the part before the slash.
    backends: physics backends (MuJoCo: engines; Playground: implementations) that work, the default one first; empty where
        there is no choice.
    broken: backend -> why it does not work; the key "" means the environment as a whole.
    """

    name: str
    library: str
    backends: tuple[str, ...]
    broken: dict[str, str]


def list_envs() -> list[EnvEntry]:
    """Every environment that ``make_env`` knows, with what is broken about it and why."""
    entries = []
    for library, names in _NAMES.items():
        for short in names:
            name = f"{library}/{short}"
            broken = {backend or "": why for (n, backend), why in _BROKEN.items() if n == name}
            backends = {"brax": BRAX_BACKENDS, "mujoco": MUJOCO_PHYSICS, "playground": PLAYGROUND_IMPLS}.get(library, ())
            backends = tuple(b for b in backends if b not in broken)
            entries.append(EnvEntry(name, library, backends, broken))
    return entries + [EnvEntry(name, name.partition("/")[0], (), {}) for name in _registered]


def register(name: str, factory: Callable) -> None:
    """Makes ``make_env(name, **options)`` return ``factory(**options)``, an ``Environment``.

    Args:
        name: ``"library/Name"``, not taken yet.
        factory: its parameters are the options that ``make_env`` and the command line accept.

    Raises:
        RequestError: a name without a slash or one that is taken.
    """
    library, _, short = name.partition("/")
    if not library or not short:
        raise RequestError(f"environment name = {name!r} must look like 'mine/Corridor'")
    if name in _registered or short in _NAMES.get(library, ()):
        raise RequestError(f"environment name = {name!r} is taken; choose another one")
    _registered[name] = factory


def make_env(name: str, **options: Any):
    """The environment called ``name``, as a ``pgjax.types.Environment``.

    Options of every gymnax environment: ``reset_mode`` (default ``"exact"``), ``episode_length`` in steps, and what its
    constructor takes. Of every Brax one: ``backend`` (default ``"spring"`` where it works), ``reset_mode`` (default
    ``"pool"``), ``episode_length`` (default 1000) and what its constructor takes. Of every MuJoCo one: ``physics`` (default
    ``"c"``), ``reset_mode``, ``episode_length``, ``num_threads`` and what Gymnasium's constructor takes. Of every Playground
    one: ``impl`` (default ``"jax"``), ``reset_mode`` (default ``"pool"``), ``episode_length``, ``action_repeat`` and what its
    configuration has, such as ``ctrl_dt`` and ``sim_dt``. Of every toy: ``reset_mode``,
    ``episode_length``, and for bandits the ``seed`` of the arms. Of every grid: ``reset_mode``, ``observation`` and the
    ``seed`` of the level.

    Raises:
        RequestError: unknown name, unknown option, a combination that does not work, or a library that is missing.
    """
    if name in _registered:
        factory = _registered[name]
        _check_options(name, options, factory)
        return factory(**options)
    library, _, short = name.partition("/")
    adapter = None
    if short not in _NAMES.get(library, ()):
        # Somebody may have registered it with the library itself, who then has imported the library already.
        adapter = _adapter(library) if library in _NAMES and _MODULES.get(library, library) in sys.modules else None
        if adapter is None or short not in adapter.registered():
            raise RequestError(f"environment = {name!r} is unknown: {_close_envs(name)}")
    if (name, None) in _BROKEN:
        raise RequestError(f"environment = {name!r} does not work: {_BROKEN[name, None]}")
    if library == "brax":
        backend = options.setdefault("backend", next(b for b in BRAX_BACKENDS if (name, b) not in _BROKEN))
        if backend not in BRAX_BACKENDS:
            raise RequestError(f"backend = {backend!r} is unknown: {close_names(str(backend), BRAX_BACKENDS)}")
        if (name, backend) in _BROKEN:
            raise RequestError(f"backend = {backend!r} does not work for {name}: {_BROKEN[name, backend]}")
    adapter = adapter or _adapter(library)
    _check_options(name, options, adapter.factory(short), adapter.OPTIONS)
    return adapter.make(short, name=name, **options)


def _close_envs(name: str) -> str:
    """The end of a sentence that says what ``name`` may have meant."""
    names = [entry.name for entry in list_envs()]
    library, _, short = name.partition("/")
    shorts = [n.partition("/")[2] for n in names if n.startswith(f"{library}/")]
    if shorts:
        return f"{library} has no such name, {close_names(short, shorts)}"
    hint = close_names(name, names)
    if hint.startswith("did you mean"):
        return hint
    return f"known libraries are {', '.join(sorted({n.partition('/')[0] for n in names}))}"


def _adapter(library: str):
    try:
        return importlib.import_module(f"pgjax.envs.{_ADAPTERS.get(library, library)}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pgjax":
            raise
        raise RequestError(
            f"{library} environments need the package {error.name}: pip install {_REQUIREMENTS[library]!r}"
        ) from None


def _check_options(name: str, options: dict, factory: Callable, shared: tuple[str, ...] = ()) -> None:
    parameters = inspect.signature(factory).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = sorted({*shared, *named})
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters) and not shared
    for option in options:
        if option not in known and not takes_any:
            hint = close_names(option, known) if known else "it takes none"
            takes = f" It takes {', '.join(known)}" if hint.startswith("did you mean") else ""
            raise RequestError(f"option {option!r} is unknown to {name}: {hint}{takes}")


def __getattr__(attribute: str):
    # Importing a library for its adapter takes a second or more, so it waits for the first use.
    homes = {"from_gymnax": "gymnax", "from_brax": "brax", "AutoReset": "auto_reset", "change_params": "params"}
    homes["from_playground"] = "playground"
    home = homes.get(attribute)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), attribute)
