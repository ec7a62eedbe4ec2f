"""How fast an environment steps by itself, with random actions: ``python -m pgjax.experiments.env_speed NAME [K=V ...]``.

K=V are options of ``make_env``, numbers or words.
"""

import argparse
import ast
import time
from typing import Any

import jax

import pgjax
from pgjax.spaces import Discrete
from pgjax.types import Environment


def random_actions(key: jax.Array, env: Environment, shape: tuple[int, ...]) -> jax.Array:
    """[*shape, *A], uniform within the bounds."""
    space = env.action_space
    if isinstance(space, Discrete):
        return jax.random.randint(key, shape, 0, space.num)
    low, high = space.bounds
    return jax.random.uniform(key, (*shape, *space.shape), minval=low, maxval=high)


def bare_loop(env: Environment) -> Any:
    """A jitted ``(env_state, key, actions [T, B, *A]) -> (env_state, rewards [T])`` that does nothing but step.

    As in training, random numbers are drawn before the scan where the environment can do that.
    """
    params: Any = env.default_params
    presample = getattr(env, "presample", None)

    @jax.jit
    def play(env_state, key, actions):
        keys = jax.random.split(key, actions.shape[:2])
        drawn, step = keys, env.step
        if presample:
            drawn, step = presample(keys, params), env.step_presampled  # pyright: ignore[reportAttributeAccessIssue]

        def body(env_state, inputs):
            drawn, action = inputs
            env_state, timestep = step(drawn, env_state, action, params)
            return env_state, timestep.reward.sum()

        return jax.lax.scan(body, env_state, (drawn, actions))

    return play


def measure(name: str, num_envs: int, num_steps: int, repeats: int, **options) -> dict[str, float]:
    """Times ``repeats`` rollouts of one compiled program; ``options`` go to ``make_env``.

    Returns: seconds to make the environment, to compile and run its ``reset``, to compile the rollout, and for one
    ``refresh`` after it is compiled; ``env_steps_per_second``, of the fastest rollout.
    """
    begin = time.perf_counter()
    env = pgjax.make_env(name, **options)
    params = env.default_params
    seconds = {"make": time.perf_counter() - begin}

    def timed(function, *args):
        begin = time.perf_counter()
        out = jax.block_until_ready(function(*args))
        return out, time.perf_counter() - begin

    reset = jax.jit(lambda key: env.reset(key, params))
    (state, _), seconds["reset"] = timed(reset, jax.random.split(jax.random.key(0), num_envs))
    actions = random_actions(jax.random.key(4), env, (num_steps, num_envs))
    compiled, seconds["compile_rollout"] = timed(lambda: bare_loop(env).lower(state, jax.random.key(1), actions).compile())
    fastest = float("inf")
    for i in range(repeats):
        (state, _), took = timed(compiled, state, jax.random.key(i), actions)
        fastest = min(fastest, took)
    refresh = jax.jit(lambda key, state: env.refresh(key, state, params))
    timed(refresh, jax.random.key(2), state)
    _, seconds["refresh"] = timed(refresh, jax.random.key(3), state)
    return {**seconds, "env_steps_per_second": num_envs * num_steps / fastest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("options", nargs="*", metavar="K=V")
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    options = {key: _value(value) for key, _, value in (word.partition("=") for word in args.options)}
    measured = measure(args.name, args.num_envs, args.num_steps, args.repeats, **options)
    print(args.name, *args.options, " ".join(f"{key}={value:.4g}" for key, value in measured.items()))


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    main()
