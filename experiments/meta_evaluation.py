"""A learned drift against PPO and DPO on held-out environments.

    python -m pgjax.experiments.meta_evaluation lpo:FILE --env gymnax/Acrobot-v1 --env gymnax/Pendulum-v1

Every environment is an ordinary ``pgjax compare`` at shared settings and equal environment steps, in a folder of its own; this
command runs them and puts the final returns together: the interquartile mean over seeds with its interval, and how often a run
of one method beats a run of PPO on the same environment.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from pgjax.errors import RequestError
from pgjax.host import lanes


@dataclasses.dataclass
class Args:
    """Evaluate a learned drift on environments."""

    learned: str
    """lpo:NAME_OR_FILE."""
    env: list[str] = dataclasses.field(default_factory=list)
    """An environment; may be repeated. Held out, that is, not one of the meta-training."""
    against: list[str] = dataclasses.field(default_factory=list)
    """What it is compared with; ppo and dpo if not given. The probabilities are over the first one."""
    seeds: int = 8
    """Seeds of every method."""
    total_env_steps: list[int] = dataclasses.field(default_factory=list)
    """Budgets of a run, each a comparison of its own; those of PPO's preset if not given. A temporal drift should be shown
    several."""
    setup: list[str] = dataclasses.field(default_factory=list)
    """K=V for all methods, such as learning_rate_schedule=constant; may be repeated."""
    out: Path = Path("runs/meta-evaluation")
    """Folder of the comparisons and of evaluation.md."""
    resume: bool = False
    """Go on with what is in --out."""


def evaluate_learned(args: Args) -> str:
    """Runs what is missing and returns the page, which is also written. Raises: RequestError for a wrong request."""
    from pgjax.experiments.compare import Request, compare

    against = args.against or ["ppo", "dpo"]
    if not args.env:
        raise RequestError("--env is missing; name at least one environment of pgjax list envs")
    if args.out.exists() and any(args.out.iterdir()) and not args.resume:
        raise RequestError(f"--out {args.out} is not empty: continue it with --resume, or choose another --out")
    if odd := [word for word in args.setup if "=" not in word]:
        raise RequestError(f"--setup {odd[0]!r} must be K=V, such as learning_rate_schedule=constant")
    setup = dict(word.split("=", 1) for word in args.setup)
    folders = {}
    for env in args.env:
        for budget in args.total_env_steps or [None]:
            told = env if budget is None else f"{env}, {budget:,} env steps"
            folder = args.out / f"{env.replace('/', '-')}{'' if budget is None else f'-{budget}'}"
            request = Request(
                env=env,
                algorithms=(*against, args.learned),
                seeds=args.seeds,
                total_env_steps=budget,
                setup=setup,
                num_evals=1,
            )
            words = ["pgjax", "compare", "--env", env, "--algorithms", *request.algorithms, "--seeds", f"{args.seeds}"]
            if budget:
                words += ["--total-env-steps", f"{budget}"]
            command = shlex.join([*words, *(["--setup", *args.setup] if setup else []), "--num-evals", "1"])
            if not compare(request, folder, resume=(folder / "compare.json").exists(), command=command):
                raise RequestError(f"{folder} did not come to its end; go on with --resume")
            folders[told] = folder
    page = page_of(folders, [*against, args.learned])
    (args.out / "evaluation.md").write_text(page)
    return page


def page_of(folders: dict[str, Path], methods: Sequence[str]) -> str:
    """The tables of finished comparisons. folders: by what is said of each.  methods: the first is the reference."""
    from pgjax import load
    from pgjax.experiments.compare import final_returns, folder_of, markdown_table
    from pgjax.experiments.plots import finite_seeds
    from pgjax.experiments.statistics import iqm, iqm_interval, probability_of_improvement

    scores: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    rows = []
    for told, folder in folders.items():
        cells = [told]
        for method in methods:
            run = load(folder / folder_of(method))
            seeds = finite_seeds(run)
            # Left out of the means; in the probabilities such a run loses to all others.
            returns = final_returns(run, run.config["seeds"])
            returns = np.where(np.isin(run.config["seeds"], seeds), returns, np.nan)
            scores[method].append(returns)
            low, high = iqm_interval(returns[np.isfinite(returns)]) if seeds else (np.nan, np.nan)
            value = iqm(returns[np.isfinite(returns)]) if seeds else np.nan
            failed = len(returns) - len(seeds)
            cells.append(f"{value:.4g} [{low:.4g}, {high:.4g}]" + (f", {failed} non-finite" if failed else ""))
        rows.append(cells)
    worst = [min(np.nanmin(scores[method][i], initial=np.inf) for method in methods) for i in range(len(rows))]
    tables = {
        method: np.stack([np.where(np.isfinite(x), x, w - 1) for x, w in zip(found, worst, strict=True)], 1)
        for method, found in scores.items()
    }
    reference = methods[0]
    lines = []
    for method in methods[1:]:
        said = probability_of_improvement(tables[method], tables[reference])
        lines.append((method, f"{said.value:.2f} [{said.low:.2f}, {said.high:.2f}]"))
    parts = [
        "# A learned objective on environments it was not learned on",
        "",
        "Final mode return, interquartile mean over seeds with its 95 % bootstrap interval.",
        "",
        markdown_table(("environment", *methods), rows),
        "",
        f"Probability that a run beats a run of {reference} on the same environment, over all of them, 95 % interval:",
        "",
        markdown_table(("method", f"over {reference}"), lines),
        "",
    ]
    return "\n".join(parts)


def main() -> int:
    """The command."""
    args = tyro.cli(Args, config=(tyro.conf.PositionalRequiredArgs, tyro.conf.UseAppendAction))
    lanes.use_host_devices()
    lanes.use_compilation_cache()
    try:
        print(evaluate_learned(args))
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
