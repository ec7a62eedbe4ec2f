"""PPO in CleanRL's setting on the MuJoCo tasks beside the published figures, from finished runs.

    for task in HalfCheetah Hopper Walker2d; do
        pgjax train ppo --preset cleanrl-continuous --env mujoco/$task-v5 --seeds 5 --num-evals 2 --out runs/mujoco/$task
    done
    python -m pgjax.experiments.mujoco_table runs/mujoco/*

Ours is what CleanRL reports: the return of training episodes, of the sampled policy, near the end of the run.
"""

import argparse

import numpy as np

import pgjax
from pgjax.experiments.statistics import iqm_interval

# Mean and standard deviation over seeds after 1 million steps, by source: CleanRL's benchmark on version 4 (3 seeds), and
# openai/baselines ppo2 (ea25b9e) on version 2 as run for "The 37 implementation details of PPO" (3 seeds).
PUBLISHED = {
    "HalfCheetah": {"CleanRL, v4": (1442.64, 46.03), "baselines, v2": (2148.8, 1166.0)},
    "Hopper": {"CleanRL, v4": (2382.86, 271.74), "baselines, v2": (2448.7, 596.1)},
    "Walker2d": {"CleanRL, v4": (2287.95, 571.78), "baselines, v2": (3142.2, 982.3)},
}
SHARE = 0.1


def final_training_returns(path: str, share: float = SHARE) -> np.ndarray:
    """Mean return of the training episodes that ended in the last ``share`` of a run's steps; one number per lane."""
    metrics = pgjax.load(path).metrics
    last = metrics[(metrics["env_steps"] > (1 - share) * metrics["env_steps"].max()) & (metrics["episodes"] > 0)]
    total = (last["episode_return"] * last["episodes"]).groupby([last["config"], last["seed"]]).sum()
    return (total / last.groupby(["config", "seed"])["episodes"].sum()).to_numpy()


def table(paths: list[str]) -> str:
    """A row per run: each seed, mean and standard deviation, IQM's 95 % interval, and what was published."""
    sources = list(next(iter(PUBLISHED.values())))
    lines = ["| task | seeds | mean ± std | 95 % interval of the IQM | " + " | ".join(sources) + " |"]
    lines.append("|---" * (4 + len(sources)) + "|")
    for path in paths:
        name = pgjax.load(path).config["env"].partition("/")[2]
        returns = final_training_returns(path)
        low, high = iqm_interval(returns)
        published = PUBLISHED.get(name.partition("-")[0], {})
        figures = ["{:.0f} ± {:.0f}".format(*published[s]) if s in published else "–" for s in sources]
        seeds = ", ".join(f"{x:.0f}" for x in returns)
        ours = f"{returns.mean():.0f} ± {returns.std(ddof=1):.0f}"
        lines.append(f"| {name} | {seeds} | {ours} | [{low:.0f}, {high:.0f}] | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of finished runs")
    print(table(parser.parse_args(argv).runs))


if __name__ == "__main__":
    main()
