"""Commands that look at finished runs: ``pgjax eval``, ``render``, ``plot`` and ``report``."""

import dataclasses
import shlex
from pathlib import Path
from typing import Literal

from pgjax.cli.options import pairs, parse
from pgjax.errors import RequestError


@dataclasses.dataclass
class EvalArgs:
    """Evaluate the saved policies of a run."""

    run: Path
    """Folder of the run."""
    env: str | None = None
    """Another environment to evaluate in; its spaces must be the same."""
    env_option: list[str] = dataclasses.field(default_factory=list)
    """K=V, an argument of the environment; may be repeated."""
    episodes: int = 128
    """Episodes of each policy."""
    seed: int = 0
    """Seed of the episodes."""
    csv: Path | None = None
    """Write every episode to this file."""


def evaluate(argv: list[str]) -> int:
    import tyro

    from pgjax.host import lanes

    argv = [f"--run={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else argv
    args = parse(EvalArgs, argv, "pgjax eval", config=(tyro.conf.UseAppendAction,))
    if args.episodes < 1:
        raise RequestError(f"--episodes {args.episodes} must be at least 1")
    lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax.experiments.evaluate_run import evaluate_run, summary_table

    frame = evaluate_run(args.run, args.env, pairs("--env-option", args.env_option), args.episodes, args.seed)
    if args.csv:
        frame.to_csv(args.csv, index=False)
    print(summary_table(frame))
    return 0


@dataclasses.dataclass
class RenderArgs:
    """Draw what a policy of a run does: its best, median and worst episode, with the mode and with sampled actions, as GIFs
    and on one page."""

    run: Path
    """Folder of the run."""
    out: Path | None = None
    """Folder to write into; render in the run's folder if not given."""
    episodes: int = 16
    """Episodes of each policy, of which three are shown."""
    seed: int = 0
    """Seed of the episodes; they are those of pgjax eval with the same seed and number."""
    lane: int = 0
    """Which policy of the run, from 0 on: all seeds of the first configuration, then those of the next."""
    env: str | None = None
    """Another environment to act in; its spaces must be the same."""
    env_option: list[str] = dataclasses.field(default_factory=list)
    """K=V, an argument of the environment; may be repeated."""
    renderer: Literal["auto", "plain", "opengl"] = "auto"
    """Of rigid bodies (brax, mujoco, playground): MuJoCo's own by OpenGL, plain drawings that need none, or whichever suits
    this machine."""


def render(argv: list[str]) -> int:
    import tyro

    from pgjax.host import lanes

    words = ["pgjax", "render", *argv]
    argv = [f"--run={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else argv
    args = parse(RenderArgs, argv, "pgjax render", config=(tyro.conf.UseAppendAction,))
    if args.episodes < 1:
        raise RequestError(f"--episodes {args.episodes} must be at least 1")
    if args.seed < 0:
        raise RequestError(f"--seed {args.seed} must be at least 0")
    from pgjax.host.store import read_run

    env = args.env or read_run(args.run)["config"]["env"]
    renderer, why = "plain", ""
    if not env.startswith("gymnax/"):
        from pgjax.experiments.render.opengl import choose

        renderer, why = choose(args.renderer)
    lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax.experiments.render import render_run

    rendered = render_run(
        args.run,
        args.out,
        env=args.env,
        env_options=pairs("--env-option", args.env_option),
        num_episodes=args.episodes,
        seed=args.seed,
        lane=args.lane,
        renderer=renderer,
        why=why,
        command=shlex.join(words),
    )
    print(rendered.page)
    return 0


@dataclasses.dataclass
class PlotArgs:
    """Draw learning curves of one or several runs."""

    runs: tuple[Path, ...]
    """Folders of runs."""
    out: Path | None = None
    """File to write, .png, .pdf or .svg; curves.png in the first run if not given."""
    metrics: tuple[str, ...] = ()
    """Columns to draw below the returns, such as kl entropy."""


def plot(argv: list[str]) -> int:
    folders = []
    while argv and not argv[0].startswith("-"):
        folders.append(argv.pop(0))
    args = parse(PlotArgs, [*(["--runs", *folders] if folders else []), *argv], "pgjax plot")
    from pgjax.experiments.plots import plot_runs

    print(plot_runs(args.runs, args.out, args.metrics))
    return 0


@dataclasses.dataclass
class ReportArgs:
    """Write one page on many runs: curves, aggregates, tables, provenance and commands."""

    runs: tuple[Path, ...] = ()
    """Folders of runs, or folders that contain runs at any depth, such as a comparison's or a sweep's."""
    out: Path | None = None
    """Folder to write report.html, figures/ and tables/ into; report in the first folder if not given."""


def report(argv: list[str]) -> int:
    words, folders = list(argv), []
    while argv and not argv[0].startswith("-"):
        folders.append(argv.pop(0))
    args = parse(ReportArgs, [*(["--runs", *folders] if folders else []), *argv], "pgjax report")
    from pgjax.experiments.report import report_runs

    report_runs(args.runs, args.out, command=shlex.join(["pgjax", "report", *words]))
    return 0
