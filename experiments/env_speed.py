"""How fast an environment steps by itself, with random actions: ``python -m pgjax.experiments.env_speed NAME [K=V ...]``.

K=V are options of ``make_env``, numbers or words.
"""

import argparse
import ast
import time

import jax

import pgjax
from pgjax.spaces import Discrete


def measure(name: str, num_envs: int, num_steps: int, repeats: int, **options) -> dict[str, float]:
    """Times ``repeats`` rollouts of one compiled program; ``options`` go to ``make_env``.

    Returns: seconds to make the environment, to compile and run its ``reset``, to compile the rollout, and for one
    ``refresh`` after it is compiled; ``env_steps_per_second``, of the fastest rollout.
    """
    begin = time.perf_counter()
    env = pgjax.make_env(name, **options)
    params, space = env.default_params, env.action_space
    seconds = {"make": time.perf_counter() - begin}

    @jax.jit
    def rollout(key, env_state):
        def step(env_state, key):
            key_action, key_step = jax.random.split(key)
            if isinstance(space, Discrete):
                action = jax.random.randint(key_action, (num_envs,), 0, space.num)
            else:
                low, high = space.bounds
                action = jax.random.uniform(key_action, (num_envs, *space.shape), minval=low, maxval=high)
            env_state, timestep = env.step(jax.random.split(key_step, num_envs), env_state, action, params)
            return env_state, timestep.reward.sum()

        return jax.lax.scan(step, env_state, jax.random.split(key, num_steps))

    def timed(function, *args):
        begin = time.perf_counter()
        out = jax.block_until_ready(function(*args))
        return out, time.perf_counter() - begin

    reset = jax.jit(lambda key: env.reset(key, params))
    (state, _), seconds["reset"] = timed(reset, jax.random.split(jax.random.key(0), num_envs))
    compiled, seconds["compile_rollout"] = timed(lambda: rollout.lower(jax.random.key(1), state).compile())
    fastest = float("inf")
    for i in range(repeats):
        (state, _), took = timed(compiled, jax.random.key(i), state)
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
