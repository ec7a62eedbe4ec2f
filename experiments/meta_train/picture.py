"""What a rule tells an agent on a hand-made level: ``python -m pgjax.experiments.meta_train.picture RULE [--level dense]``.

Three maps of the level, of an agent in the middle of its life: the mean push π̂ on the actions that were taken in each cell, the
first principal component of the targets ŷ there, and the values V* that nobody told the rule of, with all objects there.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.algorithms import lpg
from pgjax.envs import grid_world
from pgjax.experiments.meta_train import agents
from pgjax.experiments.meta_train.lpg import inner_of_rule
from pgjax.experiments.plots import pyplot, save
from pgjax.learned import files as learned_files


def targets(rule: learned_files.Learned, level: str, updates: int = 250, seed: int = 0) -> dict[str, np.ndarray]:
    """Maps [size, size], NaN in walls and where the agent has not been: ``pi_hat``, ``y_hat`` (its first component), ``value``.

    Of an agent that has done half of its ``updates``, over the 20 rollouts after that.
    """
    inner, params = inner_of_rule(rule, level)
    family, where = inner.family, inner.env.default_params
    params = jax.tree.map(jnp.asarray, params)
    hypers = inner.algorithm.hypers.replace(rule=params)

    @jax.jit
    def play(key):
        keys = jax.random.split(key, 3)
        state = agents.raised(inner, params, where, jnp.float32(updates), *keys[:2], longest=updates // 2)

        def one(state, key):
            state, rollout = agents.collect(inner, state, key)
            said = lpg.ask_rule(
                inner.algorithm.core, params, state.learner.params, rollout, updates // 2, updates, hypers.gamma
            )
            return state, (rollout.obs[:-1, :, 0].astype(jnp.int32) % family.max_size**2, *said)

        return jax.lax.scan(one, state, jax.random.split(keys[2], 20))[1]

    cell, pi_hat, log_y_hat = (np.asarray(x, np.float64) for x in play(jax.random.key(seed)))
    cell, y_hat = cell.astype(int).ravel(), np.exp(log_y_hat).reshape(-1, inner.algorithm.core.spec.num_predictions)
    centred = y_hat - y_hat.mean(0)
    component = centred @ np.linalg.svd(centred.T @ centred)[0][:, 0]
    there = int((np.asarray(where.object_there) * 2 ** np.arange(family.max_objects)).sum())
    horizon = int(where.max_steps_in_episode) // 2
    value = np.asarray(jax.jit(lambda: grid_world.optimal_values(family, where)[horizon])())[:, there]
    maps = {"pi_hat": _mean(cell, pi_hat.ravel(), len(value)), "y_hat": _mean(cell, component, len(value)), "value": value}
    # Which way a component points means nothing: it is turned to the values.
    seen = np.isfinite(maps["y_hat"])
    if np.corrcoef(maps["y_hat"][seen], value[seen])[0, 1] < 0:
        maps["y_hat"] = -maps["y_hat"]
    return {name: np.where(where.wall, np.nan, x).reshape(family.max_size, -1) for name, x in maps.items()}


def draw(maps: dict[str, np.ndarray], level: str, out: Path) -> Path:
    """Draws the maps of ``targets`` side by side."""
    titles = {"pi_hat": "mean push π̂", "y_hat": "target ŷ, first component", "value": "V*, all objects there"}
    places = grid_world.family(level).sample(jax.random.key(0))
    figure, axes = pyplot().subplots(1, 3, figsize=(10, 3.4), layout="constrained", dpi=120)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        image = axis.imshow(maps[name], cmap="viridis")
        figure.colorbar(image, ax=axis, shrink=0.8)
        for cell, kind in zip(places.object_cell, places.object_type, strict=True):
            sign = "+" if places.reward[kind] > 0 else "−"
            axis.text(cell % len(maps[name]), cell // len(maps[name]), sign, ha="center", va="center", color="w")
        axis.set(title=title, xticks=[], yticks=[])
    save(figure, out)
    return out


def _mean(cell: np.ndarray, x: np.ndarray, num: int) -> np.ndarray:
    """The mean of ``x`` in every cell, NaN where there is none."""
    count = np.bincount(cell, minlength=num)
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, np.bincount(cell, x, minlength=num) / count, np.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rule", help="name or file of a rule")
    parser.add_argument("--level", default="dense", choices=["dense", "sparse", "long", "longer", "long_dense"])
    parser.add_argument("--updates", type=int, default=250, help="length of the agent's life")
    parser.add_argument("--out", type=Path, default=Path("targets.png"))
    args = parser.parse_args()
    print(draw(targets(learned_files.load(args.rule, "lpg"), args.level, args.updates), args.level, args.out))


if __name__ == "__main__":
    main()
