"""How far the ratio leaves 1 when one batch is gone over again and again, by objective.

``python -m pgjax.experiments.ratio_study --out FILE.png``: the argument of the SPO paper (Xie et al. 2025, figure 7), on a
batch of a real environment in place of random advantages.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

import pgjax
from pgjax import on_policy
from pgjax.algorithms import dpo, ppo, spo
from pgjax.updates import minibatch_sgd, plug

OBJECTIVES: dict[str, Callable] = {
    "no clip": lambda log_ratio, advantage: jnp.exp(log_ratio) * advantage,
    "PPO": lambda log_ratio, advantage: ppo.clip_surrogate(log_ratio, advantage, 0.2),
    "SPO": lambda log_ratio, advantage: spo.spo_surrogate(log_ratio, advantage, 0.2),
    "DPO": dpo.dpo_surrogate,
}
SETUP = dict(num_envs=8, num_steps=256, num_epochs=1, num_minibatches=4, learning_rate_schedule="constant", normalize_obs=True)


def trained_batch(env, key, *, warm_up: int = 5, **setup):
    """A policy trained by PPO for ``warm_up`` iterations and its next batch: ``(algorithm, learner, batch)``."""
    algorithm = ppo.make(env, ppo.Setup(**{**SETUP, **setup}), ppo.Hypers(learning_rate=3e-4))
    core, hypers = algorithm.core, algorithm.hypers

    def start(key):
        key_init, key_collect = jax.random.split(key)
        state = algorithm.init(key_init, hypers)
        state, _ = jax.lax.scan(lambda state, _: algorithm.step(state, hypers), state, length=warm_up)
        _, batch, _, _ = on_policy.collect(core, jax.random.split(key_collect, 3), state, hypers)
        return state.learner, on_policy.gae_estimate(core, hypers, state.learner, batch)

    return algorithm, *jax.jit(jax.vmap(start))(key)


def ratios_over_epochs(algorithm, learner, batch, objective: Callable, num_epochs: int, key) -> dict[str, jax.Array]:
    """``num_epochs`` epochs of ``objective`` on one batch, from the policy that collected it.

    Returns: ``mean`` and ``max`` of abs(ratio - 1) over the batch and its ``surrogate`` mean(ratio * normalised advantage),
    each [num_epochs], after every epoch.
    """
    core, hypers = algorithm.core, algorithm.hypers
    normalized = (batch.advantage - batch.advantage.mean()) / batch.advantage.std()
    update = minibatch_sgd(plug(objective, lambda sample, hypers, extra: sample.advantage, hypers)[0])

    def epoch(learner, key):
        learner, _ = update(core, key, learner, batch, hypers, 0.0)
        ratio = jnp.exp(core.networks.policy(learner.params, batch.obs).log_prob(batch.action) - batch.log_prob_old)
        away = jnp.abs(ratio - 1)
        return learner, {"mean": away.mean(), "max": away.max(), "surrogate": (ratio * normalized).mean()}

    return jax.lax.scan(epoch, learner, jax.random.split(key, num_epochs))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="brax/hopper")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("ratios.png"))
    args = parser.parse_args()
    env = pgjax.make_env(args.env)
    key_batch, key_epochs = jax.random.split(jax.random.key(0))
    algorithm, learner, batch = trained_batch(env, jax.random.split(key_batch, args.seeds))
    results = {}
    for name, objective in OBJECTIVES.items():

        def study(learner, batch, key, objective=objective):
            return ratios_over_epochs(algorithm, learner, batch, objective, args.epochs, key)

        results[name] = jax.device_get(jax.jit(jax.vmap(study))(learner, batch, jax.random.split(key_epochs, args.seeds)))

    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    titles = {"mean": "mean |ratio - 1|", "max": "max |ratio - 1|", "surrogate": "mean ratio x advantage"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", dpi=120)
    for axis, (what, title) in zip(axes, titles.items(), strict=True):
        for (name, values), color in zip(results.items(), ("#999999", "#0072B2", "#D55E00", "#009E73"), strict=True):
            curves = values[what]
            steps = range(1, args.epochs + 1)
            axis.plot(steps, curves.mean(0), label=name, color=color)
            axis.fill_between(steps, curves.min(0), curves.max(0), alpha=0.15, color=color, linewidth=0)
        axis.set_yscale("log")
        if what != "surrogate":
            axis.axhline(0.2, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(title)
        axis.set_xlabel("epochs over one batch")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(f"{args.env}, {args.seeds} seeds: mean, and range over seeds; dotted: epsilon")
    figure.savefig(args.out)
    for name, values in results.items():
        worst = {what: f"{values[what][:, -1].mean():.3g}" for what in titles}
        print(f"{name:<8} after {args.epochs} epochs: mean {worst['mean']}, max {worst['max']}, surrogate {worst['surrogate']}")
    print(args.out)


if __name__ == "__main__":
    main()
