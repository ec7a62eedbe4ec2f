"""How near to on-policy the data of PROPS and ROS are, and those of on-policy sampling, on the toy tasks.

``python -m pgjax.experiments.sampling_study [--out FILE.md]``: the exact sampling error (``pgjax.sampling_error.tabular``) of
all that was collected with a fixed random policy, and of the batches that the presets for TwoStep and GridWorld-5x5 learn from.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax
from pgjax import sampling_error
from pgjax.algorithms import get
from pgjax.experiments import presets

# How a fixed policy's data are collected: PROPS as on a bandit in its specification; ROS by plain steps of two sizes.
PROPS = dict(behavior_num_steps=16, behavior_epochs=16, behavior_minibatches=4)
SAMPLERS: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "on-policy": ("props", {"behavior": "target"}, {}),
    "ROS, step 1": ("ros", {}, {"behavior_learning_rate": 1.0, "behavior_max_grad_norm": np.inf}),
    "ROS, step 10": ("ros", {}, {"behavior_learning_rate": 10.0, "behavior_max_grad_norm": np.inf}),
    "PROPS, rate 1e-3": ("props", PROPS, {"behavior_learning_rate": 1e-3}),
    "PROPS, rate 1e-2": ("props", PROPS, {"behavior_learning_rate": 1e-2}),
}
TASKS = ("toy/TwoStep", "toy/GridWorld-5x5", "toy/Bandit10")
LINEAR = dict(num_envs=1, hidden_sizes=(), num_epochs=1, num_minibatches=1)


def state_of(obs: jax.Array) -> jax.Array:
    """Number of the state of one-hot observations [..., S]; 0 where there is only one."""
    return jnp.argmax(obs, -1)


def probabilities(algorithm, params) -> jax.Array:
    """π(a|s) of every state, [S, A]."""
    states = jnp.eye(algorithm.env.observation_space.shape[0])
    return jax.nn.softmax(algorithm.core.networks.policy(params, states).logits)


def fixed_policy_errors(env, sampler: str, num_steps: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Sampling error [seeds, len(num_steps)] after so many steps of a random policy, one for each of ``key`` [seeds].

    Its weights and biases are normal with a standard deviation of 0.5; a logit is the sum of one of each, which comes to 0.71.
    A gradient step moves both, so on a bandit the logits go twice as far as its rate says.
    """
    name, setup, hypers = SAMPLERS[sampler]
    setup = {**LINEAR, "num_steps": max(num_steps), "buffer_batches": 1, **setup}
    algorithm = pgjax.make(name, env, {"learning_rate": 0.0, **hypers}, **setup)

    def errors(key):
        key_init, key_policy = jax.random.split(key)
        state = algorithm.init(key_init, algorithm.hypers)
        actor = 0.5 * jax.random.normal(key_policy, state.learner.params.actor.shape)
        state = state.replace(learner=state.learner.replace(params=state.learner.params._replace(actor=actor)))
        steps = algorithm.step(state, algorithm.hypers)[0].memory.steps
        prob = probabilities(algorithm, state.learner.params)
        return jnp.stack([sampling_error.tabular(state_of(steps.obs[:n]), steps.action[:n], prob) for n in num_steps])

    return jax.jit(jax.vmap(errors))(key)


def training_errors(env_name: str, name: str, setup: dict, key: jax.Array, num_iterations: int):
    """``(sampling error, return)`` of training with the preset for ``env_name``, both [seeds, num_iterations].

    The error is that of an iteration's batch against the policy that is to be updated with it, the return that of training.
    """
    preset = presets.find("auto", name, env_name)
    fields = {field: tuple(value) if isinstance(value, list) else value for field, value in preset["setup"].items()}
    # Rates fall over the preset's whole budget, however many of its iterations are looked at.
    hypers = {**preset["hypers"], "anneal_env_steps": preset["total_env_steps"]}
    algorithm = pgjax.make(name, pgjax.make_env(env_name), hypers, **{**fields, **setup})
    collect = get("props").collect

    def run(key):
        def step(state, _):
            # What the step is going to collect, once more.
            _, batch, _, _ = collect(algorithm.core, jax.random.split(state.key, 8)[3:7], state, algorithm.hypers)
            prob = probabilities(algorithm, state.learner.params)
            error = sampling_error.tabular(state_of(batch.obs), batch.action, prob, batch.present)
            state, metrics = algorithm.step(state, algorithm.hypers)
            return state, (error, metrics["episode_return"])

        return jax.lax.scan(step, algorithm.init(key, algorithm.hypers), length=num_iterations)[1]

    return jax.jit(jax.vmap(run))(key)


# Between the return of the safe end and that of the best one.
SAFE = {"toy/TwoStep": 1.5, "toy/GridWorld-5x5": 0.7}
# Rows of the second table: buffer of one batch, then of two.
TRAINED = {
    f"{label}, b = {batches}": (name, {**setup, "buffer_batches": batches})
    for batches in (1, 2)
    for label, name, setup in (
        ("PPO" if batches == 1 else "PPO-Buffer", "props", {"behavior": "target"}),
        ("ROS", "ros", {}),
        ("PROPS", "props", {}),
    )
}


def interval(x: np.ndarray) -> str:
    """Mean over seeds with the half-width of its 95 % interval."""
    return f"{x.mean():.4f} ± {1.96 * x.std(ddof=1) / np.sqrt(len(x)):.4f}"


def fixed(tasks, keys, say, num_steps: tuple[int, ...] = (64, 256, 1024)) -> None:
    """Prints the table of a fixed policy."""
    say(f"Fixed random policy, exact sampling error, {len(keys)} policies, mean ± 95 % half-width.\n")
    say("| task | collected by | " + " | ".join(f"{n} steps" for n in num_steps) + " |")
    say("|---|---|" + "---|" * len(num_steps))
    for task in tasks:
        for sampler in SAMPLERS:
            errors = np.asarray(fixed_policy_errors(pgjax.make_env(task), sampler, num_steps, keys))
            say(f"| {task} | {sampler} | " + " | ".join(interval(errors[:, i]) for i in range(len(num_steps))) + " |")


def training(tasks, keys, num_iterations: int, say) -> None:
    """Prints the table of training; the first iteration, whose policy is uniform for all, is left out of the errors."""
    say(f"\nTraining with the presets, {num_iterations} iterations, {len(keys)} seeds, mean ± 95 % half-width.\n")
    say("| task | method | sampling error | return, last tenth | runs above the safe end's | seconds |")
    say("|---|---|---|---|---|---|")
    for task in tasks:
        for label, (name, setup) in TRAINED.items():
            started = time.perf_counter()
            error, return_ = (np.asarray(x) for x in training_errors(task, name, setup, keys, num_iterations))
            last = np.nanmean(return_[:, -max(1, num_iterations // 10) :], axis=1)
            best = f"{(last > SAFE[task]).sum()} of {len(keys)}"
            seconds = time.perf_counter() - started
            say(f"| {task} | {label} | {interval(error[:, 1:].mean(1))} | {interval(last)} | {best} | {seconds:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=100, help="of training; 200 are both presets' whole budgets")
    parser.add_argument("--parts", nargs="*", choices=("fixed", "training"), default=("fixed", "training"))
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), args.seeds)
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    if "fixed" in args.parts:
        fixed(args.tasks, keys, say)
    if "training" in args.parts:
        training([task for task in args.tasks if task in SAFE], keys, args.iterations, say)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
