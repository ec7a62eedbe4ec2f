"""Playing episodes and picking those worth seeing."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.evaluation import begin, play_step
from pgjax.types import Algorithm, PyTree

POLICIES = ("mode", "sample")
PICKS = ("best", "median", "worst")
# Steps of one compiled program; what they leave behind is fetched at once.
_STEPS_AT_ONCE = 64

View = Callable[[PyTree, jax.Array], PyTree]


@dataclasses.dataclass
class Episode:
    """One full episode of T steps.

    policy: ``mode`` or ``sample``.  index: its place among the episodes of that policy.
    view: pytree of [T + 1, ...], what a drawing sees: of the start and of every step, the last one included.
    action: [T, *A].  reward: [T] float32, raw.  terminated: whether the task ended it, and not the time limit.
    """

    policy: str
    index: int
    view: PyTree
    action: np.ndarray
    reward: np.ndarray
    terminated: bool

    @property
    def length(self) -> int:
        return len(self.reward)

    @property
    def returns(self) -> np.ndarray:
        """[T + 1], what has been earned by then, undiscounted."""
        return np.concatenate([[0.0], np.cumsum(self.reward, dtype=np.float64)])

    @property
    def return_(self) -> float:
        return float(self.returns[-1])


def play(algorithm: Algorithm, policy: PyTree, key: jax.Array, num_episodes: int, view: View) -> list[Episode]:
    """The episodes that ``pgjax.evaluate`` plays with the same arguments, with what can be seen of every step.

    The mode policy's episodes come first, in order, then the sampled policy's. Only one row of what ``view`` returns is kept
    per step and episode, so a long episode of a large simulation fits into memory.

    Args: policy: of one lane.  key: consumed.  view: ``(env_state, obs [B, *O]) -> pytree [B, ...]``.
    """
    env = algorithm.env
    # Where the adapter can tell, an episode's last state is not replaced by the first one of the next.
    advance = getattr(env, "advance", env.step)

    @jax.jit
    def start(key):
        key_steps, playing = begin(algorithm, key, num_episodes)
        return key_steps, playing, view(playing.env_state, playing.obs)

    @jax.jit
    def go_on(policy, key_steps, playing):
        def step(playing, _):
            alive = playing.alive
            playing, timestep, action = play_step(algorithm, policy, key_steps, playing, step=advance)
            seen = view(playing.env_state, timestep.final_obs)
            return playing, (seen, action, timestep.reward, timestep.terminated, alive)

        return jax.lax.scan(step, playing, None, length=min(_STEPS_AT_ONCE, env.max_episode_steps))

    key_steps, playing, first = start(key)
    first = jax.device_get(first)
    rows: list[list] = [[] for _ in range(2 * num_episodes)]
    while bool(jnp.any(playing.alive)) and int(playing.t) < env.max_episode_steps:
        playing, steps = go_on(policy, key_steps, playing)
        steps = jax.device_get(steps)
        alive = steps[-1]
        for i in np.flatnonzero(alive[0]):
            lived = alive[:, i].sum()
            rows[i].append(jax.tree.map(lambda x: x[:lived, i].copy(), steps[:-1]))  # noqa: B023
    episodes = []
    for i, parts in enumerate(rows):
        seen, action, reward, terminated = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        # The chunk is a fixed number of steps, the limit need not be a multiple of it.
        seen, action, reward, terminated = jax.tree.map(
            lambda x: x[: env.max_episode_steps], (seen, action, reward, terminated)
        )
        whole = jax.tree.map(lambda start, rest: np.concatenate([start[i][None], rest]), first, seen)  # noqa: B023
        which = POLICIES[i // num_episodes]
        episodes.append(Episode(which, i % num_episodes, whole, action, reward, bool(terminated[-1])))
    return episodes


def pick(returns: Sequence[float]) -> dict[str, int]:
    """Places of the best, the median and the worst return; of an even number the lower median. NaN is the worst of all."""
    order = np.argsort(np.nan_to_num(np.asarray(returns, np.float64), nan=-np.inf), kind="stable")
    places = {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}
    return {name: int(places[name]) for name in PICKS}
