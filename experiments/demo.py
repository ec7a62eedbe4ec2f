"""``make demo``: PPO on CartPole and on Brax's hopper, trained on whatever is here, with a picture at the end."""

import shutil
import sys
import time
from pathlib import Path

from pgjax.experiments import presets
from pgjax.experiments.plots import plot_runs
from pgjax.experiments.statistics import iqm, iqm_interval
from pgjax.host import lanes
from pgjax.host.display import Display
from pgjax.host.runner import RunSpec, run
from pgjax.host.store import RunStore, load

FOLDER = Path("runs/demo")
# Environment, number of seeds, environment steps of each: what two cores do in a few minutes.
RUNS = (("gymnax/CartPole-v1", 8, 300_000), ("brax/hopper", 2, 1_000_000))


def main() -> None:
    """Trains, plots, prints two lines of summary and where the picture is."""
    lanes.use_host_devices()
    lanes.use_compilation_cache()
    summary, folders = [], []
    for env, num_seeds, env_steps in RUNS:
        preset = presets.find("auto", "ppo", env)
        spec = RunSpec(
            "ppo",
            env,
            env_steps,
            env_options=preset.get("env_options", {}),
            setup={k: tuple(v) if isinstance(v, list) else v for k, v in preset.get("setup", {}).items()},
            configs=(preset.get("hypers", {}),),
            seeds=tuple(range(num_seeds)),
            preset=preset["name"],
        )
        folder = FOLDER / env.replace("/", "-")
        # The demo's own folder, whose content another demo makes again.
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        with RunStore.create(folder, spec.config()) as store, Display(spec, "make demo") as display:
            result = run(spec, store, display)
        if result.status != "finished":
            sys.exit(1)
        minutes = (time.perf_counter() - started) / 60
        evaluations = load(folder).evaluations
        last = evaluations[(evaluations.env_steps == evaluations.env_steps.max()) & (evaluations.policy == "mode")]
        per_seed = last.groupby("seed")["return"].mean().to_numpy()
        low, high = iqm_interval(per_seed)
        summary.append(
            f"PPO on {env}: return {iqm(per_seed):.0f} [{low:.0f}, {high:.0f}] after {result.env_steps:,} env steps, "
            f"IQM and 95 % interval over {num_seeds} seeds, {minutes:.1f} minutes"
        )
        folders.append(folder)
    picture = plot_runs(folders, FOLDER / "curves.png")
    print("\n".join(["", *summary, f"the learning curves are in {picture}"]))


if __name__ == "__main__":
    main()
