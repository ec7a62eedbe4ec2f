"""What a learned drift does, beside PPO's, SPO's and DPO's: ``python -m pgjax.experiments.learned_pictures lpo:NAME_OR_FILE``.

One figure shows the drift and the slope of the objective over ratio and advantage; of a temporal one, at the start, in the
middle and at the end of training. A second one, for a temporal drift, shows how the slope changes over training, and the ratio
up to which a sample of advantage 1 still pushes.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from pgjax.algorithms import dpo, lpo, ppo, spo
from pgjax.errors import RequestError
from pgjax.experiments.plots import pyplot, save
from pgjax.learned import files as learned_files

Surrogate = Callable[[jax.Array, jax.Array], jax.Array]
"""``(log_ratio [N], advantage [N]) -> objective [N]``."""

CLOSED_FORMS: dict[str, Surrogate] = {
    "PPO": lambda l, a: ppo.clip_surrogate(l, a, 0.2),
    "SPO": lambda l, a: spo.spo_surrogate(l, a, 0.2),
    "DPO": dpo.dpo_surrogate,
}


@dataclasses.dataclass
class Args:
    """Draw a learned drift beside known ones."""

    learned: str
    """lpo:NAME_OR_FILE."""
    out: Path = Path("drift.png")
    """File of the first figure; the second one of a temporal drift gets -time before its ending."""


def panels(source: str) -> tuple[dict[str, Surrogate], dict, lpo.Convention]:
    """Objectives by title, the learned one last, at three points of training if it is temporal; its params and convention."""
    learned = learned_files.load(source, lpo.KIND)
    convention = lpo.Convention.from_dict(learned.convention)
    params = jax.tree.map(jnp.asarray, lpo.objective(learned).params)
    told = dict(CLOSED_FORMS)
    for progress in (0.0, 0.5, 1.0) if convention.temporal else (0.0,):
        title = f"learned, {progress:.0%} of training" if convention.temporal else "learned"
        told[title] = lambda l, a, progress=progress: lpo.surrogate(params, l, a, progress, convention)
    return told, params, convention


def drift_and_slope(surrogate: Surrogate, ratio: np.ndarray, advantage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(f, dJ/dρ over Â)`` on the grid, [A, R]: the drift, and how hard a sample pushes; the policy gradient is 1."""
    r, a = (jnp.asarray(x.ravel(), jnp.float32) for x in np.meshgrid(ratio, advantage))
    l = jnp.log(r)
    slope = jax.grad(lambda l: surrogate(l, a).sum())(l) / r / a
    shape = (len(advantage), len(ratio))
    return np.asarray(r * a - surrogate(l, a)).reshape(shape), np.asarray(slope).reshape(shape)


def draw(source: str, out: Path) -> list[Path]:
    """Draws the figures. Returns: the files."""
    told, params, convention = panels(source)
    ratio = np.linspace(0.3, 2.0, 171)
    # An even number: at advantage 0 nothing pushes, and there is nothing to divide by.
    advantage = np.linspace(-3, 3, 120)
    figure, axes = pyplot().subplots(
        2, len(told), figsize=(3.1 * len(told), 5.6), sharex=True, sharey=True, layout="constrained"
    )
    grids = {title: drift_and_slope(surrogate, ratio, advantage) for title, surrogate in told.items()}
    for column, (title, (f, slope)) in enumerate(grids.items()):
        box = {"origin": "lower", "aspect": "auto", "extent": (ratio[0], ratio[-1], advantage[0], advantage[-1])}
        drifts = axes[0][column].imshow(f, vmin=0, vmax=1, cmap="magma", **box)
        slopes = axes[1][column].imshow(slope, vmin=-1.5, vmax=1.5, cmap="RdBu", **box)
        axes[0][column].set_title(title, fontsize=10)
        axes[1][column].set_xlabel("ratio")
    for row, (image, label) in enumerate(((drifts, "drift f"), (slopes, "slope dJ/dρ over the advantage"))):
        axes[row][0].set_ylabel("advantage")
        figure.colorbar(image, ax=axes[row], label=label, extend="both" if row else "max")
    save(figure, out)
    if not convention.temporal:
        return [out]
    later = out.with_name(f"{out.stem}-time{out.suffix}")
    _draw_time(params, convention, later)
    return [out, later]


def _draw_time(params, convention: lpo.Convention, out: Path) -> None:
    figure, (up, down, clip) = pyplot().subplots(1, 3, figsize=(13, 3.8), layout="constrained", dpi=120)
    ratio = np.linspace(0.3, 2.0, 341)
    colors = pyplot().get_cmap("viridis")
    for axis, advantage in ((up, 1.0), (down, -1.0)):
        for progress in np.linspace(0, 1, 6):
            surrogate = lambda l, a, p=progress: lpo.surrogate(params, l, a, p, convention)  # noqa: E731
            _, slope = drift_and_slope(surrogate, ratio, np.array([advantage]))
            axis.plot(ratio, slope[0], color=colors(0.9 * progress), label=f"{progress:.0%} of training")
        axis.axhline(0, color="black", lw=0.6)
        axis.set(title=f"advantage {advantage:g}", xlabel="ratio", ylabel="slope dJ/dρ over the advantage", ylim=(-2, 2.5))
        axis.grid(alpha=0.25)
    up.legend(frameon=False, fontsize=8)
    progress = np.linspace(0, 1, 41)
    clip.plot(progress, lpo.upper_clip(params, convention, progress), label="learned")
    clip.axhline(1 + convention.ppo_eps, color="black", ls="--", lw=1, label="PPO")
    clip.set(title="ratio up to which advantage 1 pushes", xlabel="share of training done", ylabel="ratio")
    clip.grid(alpha=0.25)
    clip.legend(frameon=False)
    save(figure, out)


def main() -> int:
    """The command."""
    args = tyro.cli(Args, config=(tyro.conf.PositionalRequiredArgs,))
    try:
        print("\n".join(map(str, draw(args.learned, args.out))))
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
