"""The contracts everything else is written against: environments, algorithms, objectives.

Nothing here computes. ``T`` is time, ``B`` the environments of one lane, ``N`` samples, ``O`` an observation's shape,
``A`` an action's. A *lane* is one training run: one configuration with one seed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from pgjax.spaces import Box, Space

PyTree = Any
Metrics = dict[str, jax.Array]


class TimeStep(NamedTuple):
    """What one batched environment step returns.

    obs: [B, *O] the observation to act on next; after the end of an episode, the first one of the next episode.
    reward: [B] float32, in the environment's own units.
    terminated: [B] bool, the task itself ended (its value from here on is zero).
    truncated: [B] bool, the episode was cut from outside, as by a time limit; never true together with ``terminated``.
    final_obs: [B, *O] the successor observation before any reset; equal to ``obs`` while the episode goes on.
    metrics: flat dict of [B] arrays that this environment reports besides; often empty.
    """

    obs: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_obs: jax.Array
    metrics: Metrics


@runtime_checkable
class Environment(Protocol):
    """A batch of environments as pure functions. Implement this and every algorithm trains on it.

    ``params`` is a traced pytree of physics constants or level data, shared by the B environments of a lane;
    ``max_episode_steps`` is a static upper bound of an episode's length, the limit in force may be a field of ``params``.
    ``host_callback`` is true where a step leaves the device.

    An environment may also have ``presample(key [..., B], params) -> drawn`` and ``step_presampled(drawn [B], env_state,
    action, params)``, equal to ``step`` with the same keys: a rollout then draws its random numbers at once, before its scan.
    """

    name: str
    observation_space: Box
    action_space: Space
    max_episode_steps: int
    default_params: PyTree
    host_callback: bool

    def reset(self, key: jax.Array, params: PyTree) -> tuple[PyTree, jax.Array]:
        """Starts B episodes. ``key`` [B] typed keys; returns ``(env_state, obs [B, *O])``."""
        ...

    def step(self, key: jax.Array, env_state: PyTree, action: jax.Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        """Advances every environment once and restarts those whose episode ended. ``key`` [B], ``action`` [B, *A]."""
        ...

    def refresh(self, key: jax.Array, env_state: PyTree, params: PyTree) -> PyTree:
        """Renews whatever episode starts are kept in ``env_state``; the identity if none are. ``key`` is one key."""
        ...


class Sample(NamedTuple):
    """What an objective sees of a minibatch of N samples.

    log_ratio: [N] log pi_new(a|s) - log pi_old(a|s).
    advantage: [N], normalised if the method normalises it; no gradient flows through it.
    dist, dist_old: action distributions with batch shape [N], the new one and the one that acted.
    progress: scalar in [0, 1], env steps done over the horizon.
    weight: [N], 1 for the samples that count and 0 for the rest, whose objective is ignored; None if all count.
    """

    log_ratio: jax.Array
    advantage: jax.Array
    dist: Any
    dist_old: Any
    progress: jax.Array
    weight: Any = None


class Objective(NamedTuple):
    """A per-sample policy objective, to be maximised: ``fn(sample, params) -> [N]``.

    ``params`` is a pytree of arrays (``None`` if the objective has none); it becomes ``hypers.objective``, so it can be
    swept, vmapped over and differentiated through. ``limits``, ``((lowest, highest) log ratio, (lowest, highest) advantage)``,
    is the range for which a learned objective can answer; the share of samples outside is then the metric ``outside_range``.
    """

    fn: Callable[[Sample, PyTree], jax.Array]
    params: PyTree = None
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None


class Algorithm(NamedTuple):
    """A training method as pure functions; all that the runner, evaluation and checkpoints know of it.

    init: ``(key, hypers, env_params=None) -> state``. ``env_params=None`` means the environment's defaults, compiled in.
    step: ``(state, hypers) -> (state, metrics)``: one iteration, collect then learn. ``metrics`` is a flat dict of scalars.
    policy: ``state -> policy``, the small part that acts: network, frozen normaliser; never replay or environment state.
    act: ``(policy, obs [B, *O], key | None) -> action [B, *A]`` in the environment's bounds; no key means the mode.
    warm_start: ``(state, policy) -> state``, a fresh state that begins from the policy of another run.
    setup: frozen dataclass, what fixes shapes, loop lengths and branches.
    hypers: struct whose leaves are float32 arrays, the default numbers; other values never recompile.
    name: public id, such as ``"ppo"``.  env: what it trains on.  env_steps_per_iteration: int, cost of one ``step``.
    core: the static parts that the method's own functions take, such as ``pgjax.on_policy.Core``; for those who take it apart.
    """

    init: Callable[..., PyTree]
    step: Callable[[PyTree, PyTree], tuple[PyTree, Metrics]]
    policy: Callable[[PyTree], PyTree]
    act: Callable[[PyTree, jax.Array, jax.Array | None], jax.Array]
    warm_start: Callable[[PyTree, PyTree], PyTree]
    setup: Any
    hypers: Any
    name: str
    env: Environment
    env_steps_per_iteration: int
    core: Any = None
