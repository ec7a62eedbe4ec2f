"""Fixed scores per environment, so that returns of different tasks can be averaged, and what measures the random policy's.

    python -m pgjax.experiments.reference_scores gymnax/CartPole-v1 mujoco/Hopper-v5 [--episodes 1024] [--write]

``reference_scores.toml`` holds them with their sources. A normalised score is 0 for the policy that draws every action
uniformly, Gymnasium's ``action_space.sample()``, and 1 for the reference: the most that can be earned, the return at which the
task counts as solved, or what somebody's PPO reached, as the entry says. It is a unit, not a bound: scores above 1 are common
where the reference is a weak one. Entries are not changed once they are used, or old and new normalised scores would not
compare.
"""

import argparse
import functools
import json
import math
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pgjax
from pgjax.errors import RequestError
from pgjax.spaces import Discrete
from pgjax.types import Environment

FILE = Path(__file__).with_suffix(".toml")
_MEASURE = "python -m pgjax.experiments.reference_scores"
_HEADER = """\
# Return of the random policy and of a reference, per environment with its default options (Brax: the spring backend).
# random: mean over random_episodes full episodes.  random_interval: mean -+ 1.96 standard errors.
# Measured and written by: python -m pgjax.experiments.reference_scores ENV --write; references are entered by hand.
"""


class ReferenceScores(NamedTuple):
    """An environment's entry; returns are undiscounted, per full episode.

    random: mean return of the random policy.  random_interval: its 95 % interval.  random_episodes: behind it.
    random_source: the command that measured it.  reference: the return that counts as 1.  reference_source: where it is from.
    """

    random: float
    random_interval: tuple[float, float]
    random_episodes: int
    random_source: str
    reference: float
    reference_source: str


@functools.cache
def all_reference_scores() -> dict[str, ReferenceScores]:
    """Every entry that has a reference, by environment."""
    return {
        env: ReferenceScores(**{**entry, "random_interval": tuple(entry["random_interval"])})
        for env, entry in tomllib.loads(FILE.read_text()).items()
        if "reference" in entry
    }


def reference_scores(env: str) -> ReferenceScores:
    """The entry of an environment, by its public name. Raises: RequestError if it has none."""
    entries = all_reference_scores()
    if env not in entries:
        raise RequestError(
            f"environment {env!r} has no reference scores to normalise with; measure the random policy with "
            f"`{_MEASURE} {env}` and add an entry with a reference and its source to {FILE.name}"
        )
    return entries[env]


def normalize(returns: np.ndarray | float, env: str) -> np.ndarray:
    """(returns - random) / (reference - random): 0 is the random policy's score, 1 the reference's.

    Args: returns of any shape, undiscounted and per episode.  env: public name.
    Raises: RequestError for an environment without an entry.
    """
    scores = reference_scores(env)
    return (np.asarray(returns, np.float64) - scores.random) / (scores.reference - scores.random)


def random_returns(env: Environment, num_episodes: int, seed: int = 0, batch: int = 256) -> np.ndarray:
    """Returns of full episodes under uniformly random actions, exactly one in each of ``num_episodes`` environments.

    Args: batch: environments that are stepped together.
    Returns: [num_episodes], undiscounted raw rewards.
    Raises: RequestError for an action space without bounds, which has no uniform distribution.
    """
    space, params = env.action_space, env.default_params
    if not isinstance(space, Discrete) and not np.isfinite(space.bounds).all():
        raise RequestError(f"{env.name}: its actions have no bounds, so there is no uniform random policy")

    def draw(key):
        if isinstance(space, Discrete):
            return jax.random.randint(key, (batch,), 0, space.num)
        low, high = space.bounds
        return jax.random.uniform(key, (batch, *space.shape), minval=low, maxval=high)

    @jax.jit
    def play(key):
        key_reset, key_steps = jax.random.split(key)
        env_state, _ = env.reset(jax.random.split(key_reset, batch), params)

        def step(carry):
            t, env_state, alive, return_ = carry
            key_action, key_env = jax.random.split(jax.random.fold_in(key_steps, t))
            env_state, timestep = env.step(jax.random.split(key_env, batch), env_state, draw(key_action), params)
            return_ = return_ + jnp.where(alive, timestep.reward, 0)
            return t + 1, env_state, alive & ~(timestep.terminated | timestep.truncated), return_

        def unfinished(carry):
            return carry[2].any() & (carry[0] < env.max_episode_steps)

        carry = (jnp.zeros((), jnp.int32), env_state, jnp.ones(batch, bool), jnp.zeros(batch))
        return jax.lax.while_loop(unfinished, step, carry)[3]

    keys = jax.random.split(jax.random.key(seed), math.ceil(num_episodes / batch))
    returns = np.concatenate([play(key) for key in keys])[:num_episodes].astype(np.float64)
    if not np.isfinite(returns).all():
        raise RequestError(f"{env.name}: a random episode had a return that is not finite; it cannot be a reference")
    return returns


def measure(env: str, num_episodes: int, seed: int = 0) -> dict:
    """The fields ``random*`` of an entry, measured."""
    returns = random_returns(pgjax.make_env(env), num_episodes, seed)
    half = 1.96 * returns.std(ddof=1) / math.sqrt(len(returns))
    mean = float(returns.mean())
    return {
        "random": _rounded(mean),
        "random_interval": [_rounded(mean - half), _rounded(mean + half)],
        "random_episodes": len(returns),
        "random_source": f"{_MEASURE} {env} --episodes {num_episodes} --seed {seed}",
    }


def _rounded(value: float) -> float:
    """Six digits: far below the spread of any of them."""
    return float(f"{value:.6g}")


def as_toml(entries: dict[str, dict]) -> str:
    """The file's text."""
    tables = []
    for env, entry in entries.items():
        # Numbers, lists of numbers and plain strings are the same in JSON and in TOML.
        fields = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in entry.items()]
        tables.append("\n".join([f"[{json.dumps(env)}]", *fields]))
    return _HEADER + "\n" + "\n\n".join(tables) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="+", metavar="ENV", help="public names")
    parser.add_argument("--episodes", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"put the random scores into {FILE.name}")
    options = parser.parse_args(argv)
    if options.episodes < 2:
        parser.error(f"--episodes {options.episodes} must be at least 2, or there is no interval")
    for env in options.envs:
        begin = time.perf_counter()
        try:
            measured = measure(env, options.episodes, options.seed)
        except RequestError as error:
            parser.error(str(error))
        seconds = time.perf_counter() - begin
        low, high = measured["random_interval"]
        print(f"{env}: random policy {measured['random']:g} [{low:g}, {high:g}], {options.episodes} episodes, {seconds:.0f} s")
        if options.write:
            entries = tomllib.loads(FILE.read_text()) if FILE.exists() else {}
            entries[env] = {**entries.get(env, {}), **measured}
            FILE.write_text(as_toml(entries))
            if "reference" not in entries[env]:
                print(f"  now add reference and reference_source to {FILE}: without them nothing is normalised")


if __name__ == "__main__":
    main()
