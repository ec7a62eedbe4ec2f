"""AVG's random search, drawn as its authors drew it: ``python -m pgjax.experiments.avg_search --env ENV``.

A configuration is named by its search seed, so the published ones can be drawn again. All of a search are lanes of one program:
300 configurations with 10 seeds each are 3000 learners that compile once.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

import pgjax
from pgjax.algorithms import get
from pgjax.cli.options import pairs
from pgjax.errors import RequestError, close_names
from pgjax.experiments import presets
from pgjax.experiments.shared_settings import default_fields, read_field
from pgjax.host.runner import RunSpec

# What the draw of the entropy's coefficient sets in each method.
_THIRD = {"avg": "alpha", "iac": "alpha", "sac1": "temperature_lr"}
# Without discounting, whatever is drawn.
_UNDISCOUNTED = ("gymnax/MountainCarContinuous-v0",)


def draw(search_seed: int, algorithm: str = "avg", env: str = "") -> dict[str, float]:
    """The configuration of a search seed, as fields of ``Hypers``.

    Learning rates are k 10^-e with e from 4 to 6 and k from 1 to 99, the coefficient j 10^-e with e from 1 to 5 and j from 1
    to 9; the exponent is drawn first. γ is 1 where ``env`` is the continuous mountain car.
    Raises: RequestError for a method without such a search.
    Source: Vasan et al. 2024, ``hyp_sweep.py`` of gauthamvasan/avg.
    """
    if algorithm not in _THIRD:
        raise RequestError(f"algorithm = {algorithm!r} has no published search; it is for {', '.join(_THIRD)}")
    # The legacy generator: its stream is frozen, so a seed means today what it meant to the authors.
    random = np.random.RandomState(search_seed)

    def digits(exponents, largest):
        exponent = random.choice(exponents)
        return float(f"{random.randint(1, largest + 1)}e-{exponent}")

    learning_rate, critic_lr = digits([4, 5, 6], 99), digits([4, 5, 6], 99)
    adam_b1 = float(random.choice([0.0, 0.9]))
    third = digits([1, 2, 3, 4, 5], 9)
    gamma = float(random.choice([0.95, 0.97, 0.99, 0.995, 1.0]))
    return {
        "learning_rate": learning_rate,
        "critic_lr": critic_lr,
        "adam_b1": adam_b1,
        _THIRD[algorithm]: third,
        "gamma": 1.0 if env in _UNDISCOUNTED else gamma,
    }


def search_spec(
    env: str,
    search_seeds: range,
    num_seeds: int,
    *,
    algorithm: str = "avg",
    total_env_steps: int = 2_000_000,
    setup: dict | None = None,
) -> RunSpec:
    """One run of every configuration with every seed, without evaluations: the paper ranks by training returns."""
    configs = tuple(draw(search_seed, algorithm, env) for search_seed in search_seeds)
    return RunSpec(
        algorithm, env, total_env_steps, setup=setup or {}, configs=configs, seeds=tuple(range(num_seeds)), num_evals=0
    )


def ranking(path: Path, search_seeds: range) -> pd.DataFrame:
    """The configurations of a finished search, best first: those that stayed finite in more seeds, then by area.

    Returns: a row each with ``search_seed``, its numbers, ``area``, the mean over seeds and rows of the return of the episodes
    that ended in a row, and ``frozen``, how many of its seeds went non-finite. A row without an end counts as the one before,
    a seed that went non-finite not at all.
    """
    run = pgjax.load(path)
    rows = []
    for config, numbers in enumerate(run.config["configs"]):
        lanes = cast(pd.DataFrame, run.metrics[run.metrics.config == config])
        table = lanes.pivot_table(index="env_steps", columns="seed", values="episode_return", dropna=False).ffill()
        frozen = lanes.loc[lanes.nonfinite > 0, "seed"].unique()
        area = float(np.mean(table.drop(columns=frozen).mean()))
        rows.append({"search_seed": search_seeds[config], **numbers, "area": area, "frozen": len(frozen)})
    return pd.DataFrame(rows).sort_values(["frozen", "area"], ascending=[True, False], ignore_index=True)


def _fields(algorithm: str, words: list[str]) -> dict[str, Any]:
    """``["field=text"]`` as values of the types of the algorithm's ``Setup``."""
    module, words_of = get(algorithm), pairs("--setup", words, str)
    known = default_fields(module)["setup"]
    for name in words_of:
        if name not in known:
            raise RequestError(f"--setup {name}: {algorithm} has no such field; {close_names(name, known)}")
    return {name: read_field("setup", name, text, module) for name, text in words_of.items()}


def search(args: argparse.Namespace) -> None:
    """Runs what is asked for, prints the best and writes the ranking into its folder."""
    search_seeds = range(args.configs)
    # What is not drawn is as in the published configuration for the environment, where there is one.
    setup = {**presets.find("auto", args.algorithm, args.env).get("setup", {}), **_fields(args.algorithm, args.setup)}
    spec = search_spec(
        args.env, search_seeds, args.seeds, algorithm=args.algorithm, total_env_steps=args.total_env_steps, setup=setup
    )
    there = (args.out / "run.json").exists()
    with pgjax.RunStore.open(args.out, spec.config()) if there else pgjax.RunStore.create(args.out, spec.config()) as store:
        result = pgjax.run(spec, store)
    if result.status == "interrupted":
        print(f"interrupted at {result.env_steps} env steps; the same command goes on")
        return
    found = ranking(args.out, search_seeds)
    found.to_csv(args.out / "ranking.csv", index=False)
    print(found.head(20).to_string(index=False))


def main() -> int:
    from pgjax.host import lanes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", required=True)
    parser.add_argument("--algorithm", default="avg")
    parser.add_argument("--configs", type=int, default=300, help="how many search seeds, from 0 on")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--total-env-steps", type=int, default=2_000_000)
    parser.add_argument("--setup", action="append", default=[], metavar="K=V", help="a field of Setup in place of the preset's")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; goes on if it is there")
    args = parser.parse_args()
    lanes.use_host_devices()
    lanes.use_compilation_cache()
    try:
        search(args)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
