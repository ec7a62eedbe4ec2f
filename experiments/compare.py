"""``pgjax compare``: the family on one environment, at equal environment steps and with what can be shared shared.

    DIR/compare.json     the request, what each algorithm runs with, in which order, and the results
    DIR/ALGORITHM/       an ordinary run each
    DIR/compare.md       results and settings as tables, and the command that made them
    DIR/compare.png      learning curves, KL per update, training time

What is shared, and what not, is settled in ``shared_settings``.
"""

import dataclasses
import json
import math
import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pandas as pd

import pgjax
from pgjax import algorithms
from pgjax.algorithms import lpg, lpo
from pgjax.errors import RequestError
from pgjax.experiments import presets
from pgjax.experiments.objective_file import is_learned, load_objective, pinned, split_hash
from pgjax.experiments.plots import finite_seeds, plot_comparison
from pgjax.experiments.shared_settings import (
    REFERENCE,
    SettingRow,
    Settings,
    differences,
    read_asked,
    setting_cells,
    settle,
    show,
)
from pgjax.experiments.statistics import iqm, iqm_interval
from pgjax.host.checkpoints import disk_errors, from_json, to_json, write_file
from pgjax.host.display import Display
from pgjax.host.runner import DEFAULT_EPISODES, OTHER_EPISODES, RunSpec, describe_env, run, with_params
from pgjax.host.store import LoadedRun, RunStore, read_run
from pgjax.types import Algorithm, Environment

FORMAT, VERSION = "pgjax-comparison", 1
DEFAULT_ENV_STEPS = 500_000
# By how much the budget may grow so that it is a whole number of iterations of every algorithm.
LONGEST_BUDGET = 1.1


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    algorithms: public ids, and ``lpo:NAME_OR_FILE`` for PPO with that learned objective; empty or ``("all",)`` for the whole
    registry.  total_env_steps: of each lane; None for PPO's preset.
    presets: each algorithm with its own preset in place of shared settings.
    setup, hypers: field -> text, values for all algorithms that have the field and do not define it themselves.
    The rest as in ``RunSpec``; ``eval_episodes`` None means 64 on gymnax and toys and 16 elsewhere, for every algorithm alike.
    """

    env: str
    algorithms: tuple[str, ...] = ()
    seeds: int = 8
    seed_start: int = 0
    total_env_steps: int | None = None
    presets: bool = False
    env_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    env_params: dict[str, Any] = dataclasses.field(default_factory=dict)
    setup: dict[str, str] = dataclasses.field(default_factory=dict)
    hypers: dict[str, str] = dataclasses.field(default_factory=dict)
    num_evals: int = 10
    eval_episodes: int | None = None
    devices: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be run.

    command: that asked for it, for the record.  specs: by algorithm, in the order they run.
    left_out: algorithm -> why it cannot run here.  settings: the table of what is shared.
    """

    request: Request
    command: str
    specs: dict[str, RunSpec]
    left_out: dict[str, str]
    settings: list[SettingRow]


@dataclasses.dataclass(frozen=True)
class Result:
    """One algorithm's line of the table.

    iqm, low, high: interquartile mean over seeds of the last evaluation's mean mode return, and its 95 % interval.
    seeds: that count.  frozen: seeds left out because an update went non-finite.  env_steps: of each lane.
    kl: KL(old || new) in nats, mean over all updates and seeds.
    microseconds: of training, per environment step over all lanes; compile_seconds, evaluate_seconds are not in it.
    ratio: microseconds over PPO's; None without PPO.
    Without a seed that stayed finite, the statistics are NaN.
    """

    algorithm: str
    iqm: float
    low: float
    high: float
    seeds: list[int]
    frozen: list[int]
    env_steps: int
    kl: float
    microseconds: float
    ratio: float | None
    compile_seconds: float
    evaluate_seconds: float


def compare(
    request: Request | None, out: Path, *, resume: bool = False, command: str = "", say: Callable[[str], None] = print
) -> bool:
    """Trains what ``request`` names and writes the comparison into ``out``.

    Args:
      request: None with ``resume``: what the folder says.  resume: skip what is finished, go on with what is not.
      command: for the record.  say: called with each text to show.
    Returns: whether every algorithm ran to the end with all lanes finite. When interrupted, no report is written.
    Raises: RequestError before anything is written if the request is wrong; RunError if a run fails.
    """
    out = Path(out)
    if resume:
        plan = _resumed(read_plan(out), request, out)
        env = make_env(plan.request)
    else:
        if request is None:
            raise RequestError("--env is missing; name an environment of pgjax list envs")
        _check_empty(out)
        env = make_env(request)
        plan = make_plan(request, env, command)
        write_plan(out, plan)
    say(opening(plan))
    say(settings_text(plan))
    if not train_all(plan, env, out, say):
        return False
    results = write_report(plan, out)
    say("\n" + results_text(plan, results))
    say(f"\nresults in {out}: compare.md, compare.png, compare.json and a run per algorithm")
    return not any(result.frozen for result in results)


# --- the plan


def make_env(request: Request) -> Environment:
    """The environment that all train on. With presets, their ``env_options`` must agree."""
    env = pgjax.make_env(request.env, **env_options(request))
    return with_params(env, request.env_params) if request.env_params else env


def env_options(request: Request) -> dict[str, Any]:
    """The presets' options of the environment with the user's own over them.

    Raises: RequestError if two presets disagree on an option that the user has not set.
    """
    options: dict[str, tuple[Any, str]] = {}
    for name in dict.fromkeys([REFERENCE, *_names(request)[0]]) if request.presets else (REFERENCE,):
        for option, value in (
            presets.find("auto", REFERENCE if is_learned(name) else name, request.env).get("env_options", {}).items()
        ):
            known, whose = options.setdefault(option, (value, name))
            if known != value and option not in request.env_options:
                raise RequestError(
                    f"--presets: {whose} wants {option}={known} and {name} wants {option}={value}; "
                    f"choose one with --env-option {option}=..."
                )
    return {**{option: value for option, (value, _) in options.items()}, **request.env_options}


def make_plan(request: Request, env: Environment, command: str = "") -> Plan:
    """Settles every setting and builds every algorithm once, to see that it can run.

    Raises: RequestError for an unknown name, a wrong value, or a named algorithm that cannot run on ``env``; asked for
    all, those that cannot are left out.
    """
    if request.seeds < 1:
        raise RequestError(f"--seeds {request.seeds} must be at least 1")
    if request.seed_start < 0 or request.seed_start + request.seeds > 2**32:
        raise RequestError(f"--seed-start {request.seed_start} must be at least 0 and below 2**32")
    if request.num_evals < 1:
        raise RequestError(f"--num-evals {request.num_evals}: a comparison needs at least 1 evaluation")
    names, wants_all = _names(request)
    modules = {name: _module(name) for name in names}
    asked = read_asked({"setup": request.setup, "hypers": request.hypers}, modules)
    specs: dict[str, RunSpec] = {}
    built: list[Algorithm] = []
    left_out: dict[str, str] = {}
    for name, settings in settle(modules, request.env, asked, request.presets)[0].items():
        spec = _spec(request, name, modules[name], settings)
        try:
            algorithm = build(spec, env)
            spec.check(algorithm)
        except RequestError as error:
            left_out[name] = str(error)
            continue
        specs[name] = spec
        built.append(algorithm)
    if left_out and (not wants_all or not specs):
        name, why = next(iter(left_out.items()))
        raise RequestError(f"{name} cannot run on {request.env}: {why}")
    total = common_budget(_budget(request), [algorithm.env_steps_per_iteration for algorithm in built])
    specs = {name: dataclasses.replace(spec, total_env_steps=total) for name, spec in specs.items()}
    for spec, algorithm in zip(specs.values(), built, strict=True):
        spec.check(algorithm)
    rows = settle({name: modules[name] for name in specs}, request.env, asked, request.presets)[1]
    return Plan(request, command, specs, left_out, rows)


def _names(request: Request) -> tuple[list[str], bool]:
    """Ids in order, and whether all were asked for."""
    known = algorithms.list_algorithms()
    if not request.algorithms or "all" in request.algorithms:
        if len(request.algorithms) > 1:
            raise RequestError(f"--algorithms {' '.join(request.algorithms)}: all stands alone; leave the others out")
        return list(known), True
    for name in request.algorithms:
        _module(name)  # complains of unknown names
        if request.algorithms.count(name) > 1:
            raise RequestError(f"--algorithms names {name} twice; name each once")
    return list(request.algorithms), False


def _module(name: str) -> ModuleType:
    return lpo if is_learned(name) else algorithms.get(name)


def folder_of(name: str) -> str:
    """What an algorithm's folder is called: a learned objective's file may lie anywhere."""
    return re.sub(r"[^\w.-]+", "-", name)


def _label(config: dict[str, Any]) -> str:
    """What a run is called in tables and figures."""
    objective = config.get("objective")
    return split_hash(objective)[0] if objective and is_learned(objective) else config["algorithm"]


def _budget(request: Request) -> int:
    if request.total_env_steps is not None:
        return request.total_env_steps
    return presets.find("auto", REFERENCE, request.env).get("total_env_steps", DEFAULT_ENV_STEPS)


def common_budget(total_env_steps: int, per_iteration: Sequence[int]) -> int:
    """The budget rounded up to whole iterations of every algorithm, so that all do the same number of steps.

    If that would take more than ``LONGEST_BUDGET`` times as long, the budget stays, and each rounds it up for itself.
    """
    together = math.lcm(*per_iteration)
    rounded = math.ceil(total_env_steps / together) * together
    return rounded if rounded <= LONGEST_BUDGET * total_env_steps else total_env_steps


def _spec(request: Request, name: str, module: ModuleType, settings: Settings) -> RunSpec:
    episodes = DEFAULT_EPISODES.get(request.env.split("/")[0], OTHER_EPISODES)
    changed = differences(module, settings)
    learned = is_learned(name)
    return RunSpec(
        algorithm=REFERENCE if learned else name,
        env=request.env,
        total_env_steps=_budget(request),
        env_options=env_options(request),
        env_params=request.env_params,
        setup=changed["setup"],
        configs=(changed["hypers"],),
        seeds=tuple(range(request.seed_start, request.seed_start + request.seeds)),
        num_evals=request.num_evals,
        # A fixed number: cut down run by run, as the runner would, the algorithms would be judged by unequal evaluations.
        eval_episodes=episodes if request.eval_episodes is None else request.eval_episodes,
        objective=pinned(name) if learned else None,
        rule=lpg.pinned(None) if name == "lpg" else None,
        devices=request.devices,
        preset=settings.preset,
    )


def build(spec: RunSpec, env: Environment) -> Algorithm:
    """The algorithm of ``spec`` on an environment that was made already."""
    return pgjax.make(spec.algorithm, env, objective=load_objective(spec.objective), rule=spec.rule, **spec.setup)


# --- the folder


def _check_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; choose another --out")
    if (out / "compare.json").exists():
        raise RequestError(f"--out {out} holds a comparison: continue it with --resume, or choose another --out")
    if out.exists() and (held := sorted(path.name for path in out.iterdir())):
        raise RequestError(f"--out {out} is not empty (it holds {held[0]}); choose another --out")


def write_plan(out: Path, plan: Plan, results: Sequence[Result] = ()) -> None:
    """Writes ``compare.json``; first without results."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "command": plan.command,
        "request": dataclasses.asdict(plan.request),
        "order": list(plan.specs),
        "specs": {name: spec.config() for name, spec in plan.specs.items()},
        "left_out": plan.left_out,
        "settings": [dataclasses.asdict(row) for row in plan.settings],
        "results": [dataclasses.asdict(result) for result in results],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {out}: {error.strerror}; choose another --out") from error
    _write(out / "compare.json", json.dumps(to_json(content), indent=1) + "\n")


def read_plan(out: Path) -> Plan:
    """What ``compare.json`` says. Raises: RequestError if there is none, or it is not ours."""
    path = out / "compare.json"
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"there is no comparison in {out} (no compare.json); start one without --resume") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise RequestError(f"{path} was not written by this version of pgjax compare; choose another folder")
    content = from_json(content)
    request = content["request"]
    return Plan(
        request=Request(**{**request, "algorithms": tuple(request["algorithms"])}),
        command=content["command"],
        specs={name: RunSpec.from_config(content["specs"][name]) for name in content["order"]},
        left_out=content["left_out"],
        settings=[_setting_row(row) for row in content["settings"]],
    )


def _setting_row(row: dict[str, Any]) -> SettingRow:
    shared = tuple(row["shared"]) if isinstance(row["shared"], list) else row["shared"]
    return SettingRow(row["field"], row["is_shared"], shared, {name: tuple(pair) for name, pair in row["others"].items()})


def _resumed(plan: Plan, request: Request | None, out: Path) -> Plan:
    """The plan to go on with. Raises: RequestError naming the first field in which ``request`` is another one."""
    if request is None:
        return plan
    there, here = dataclasses.asdict(plan.request), dataclasses.asdict(request)
    for name, value in there.items():
        if here[name] != value and name != "devices":
            raise RequestError(
                f"--resume: {name} is {_shown(value)} in {out} and {_shown(here[name])} in this request; "
                "use the same value, or choose another --out"
            )
    specs = {name: dataclasses.replace(spec, devices=request.devices) for name, spec in plan.specs.items()}
    return dataclasses.replace(plan, specs=specs)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={show(item)}" for name, item in value.items()) or "not given"
    return " ".join(value) or "all" if isinstance(value, tuple) else "not given" if value is None else show(value)


def _write(path: Path, text: str) -> None:
    # Aside and renamed, so that a reader never finds half a file.
    aside = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        write_file(aside, text.encode())
        aside.replace(path)


# --- training


def train_all(plan: Plan, env: Environment, out: Path, say: Callable[[str], None] = print) -> bool:
    """Runs one algorithm after the other, each into its folder; finished ones are skipped.

    Returns: False if Ctrl-C or SIGTERM ended it; the runs then stand at a checkpoint.
    """
    again = f"pgjax compare --out {shlex.quote(str(out))} --resume"
    try:
        for name, spec in plan.specs.items():
            folder = out / folder_of(name)
            if _is_finished(folder, spec):
                say(f"{name} is finished already")
                continue
            algorithm = build(spec, env)
            with _store(folder, spec, env) as store, Display(spec, again) as display:
                if run(spec, store, display, algorithm=algorithm).status == "interrupted":
                    return False
    except KeyboardInterrupt:
        say(f"continue with: {again}")
        return False
    return True


def _store(folder: Path, spec: RunSpec, env: Environment) -> RunStore:
    provenance = describe_env(env, spec)
    if (folder / "run.json").exists():
        return RunStore.open(folder, spec.config(), may_differ=("devices",), provenance=provenance)
    return RunStore.create(folder, spec.config(), provenance=provenance)


def _is_finished(folder: Path, spec: RunSpec) -> bool:
    """Whether the run went to its end, with or without frozen lanes.

    Raises: RequestError if the folder holds another run than the comparison wants.
    """
    if not (folder / "run.json").exists():
        return False
    held = read_run(folder)
    if held["status"] not in ("finished", "failed"):
        return False
    for name, value in spec.config().items():
        if name != "devices" and held["config"].get(name) != value:
            raise RequestError(f"--resume: {folder} holds a run with another {name}; start anew with another --out")
    if held["status"] == "finished":
        return True
    # Frozen lanes are a failure of the algorithm, which counts as a result; a full disk is one of the run.
    metrics = pgjax.load(folder).metrics
    return bool(len(metrics)) and set(metrics[metrics.env_steps >= spec.total_env_steps].seed) == set(spec.seeds)


# --- results


def results_of(runs: Sequence[LoadedRun]) -> list[Result]:
    """The table's lines, one a run."""
    results = [_result(run) for run in runs]
    reference = next((result.microseconds for result in results if result.algorithm == REFERENCE), None)
    return [
        dataclasses.replace(result, ratio=None if reference is None else result.microseconds / reference) for result in results
    ]


def _result(run: LoadedRun) -> Result:
    seeds = finite_seeds(run)
    returns = final_returns(run, seeds)
    low, high = iqm_interval(returns) if seeds else (math.nan, math.nan)
    env_steps = int(run.metrics.env_steps.max())
    seconds = run.facts["seconds"]
    return Result(
        algorithm=_label(run.config),
        iqm=float(iqm(returns)) if seeds else math.nan,
        low=float(low),
        high=float(high),
        seeds=seeds,
        frozen=sorted(set(run.config["seeds"]) - set(seeds)),
        env_steps=env_steps,
        kl=mean_kl(run, seeds),
        microseconds=1e6 * seconds["train"] / (env_steps * len(run.config["seeds"])),
        ratio=None,
        compile_seconds=seconds["compile"],
        evaluate_seconds=seconds["evaluate"],
    )


def final_returns(run: LoadedRun, seeds: Sequence[int]) -> np.ndarray:
    """Mean return of the mode policy over the episodes of the last evaluation, [S] in order of ``seeds``."""
    rows = run.evaluations
    rows = rows[(rows.policy == "mode") & (rows.env_steps == rows.env_steps.max())]
    return rows.groupby("seed")["return"].mean().reindex(seeds).to_numpy()


def mean_kl(run: LoadedRun, seeds: Sequence[int]) -> float:
    """KL(old || new) in nats, mean over the updates of ``seeds``; a row counts as the updates behind it.

    NaN without seeds, or for a method that has no such number because it learns step by step.
    """
    if "kl" not in run.metrics:
        return math.nan
    kl = []
    for seed in seeds:
        rows = cast(pd.DataFrame, run.metrics[run.metrics.seed == seed]).sort_values("iteration")
        kl.append(np.average(rows.kl, weights=np.diff(rows.iteration, prepend=0)))
    return float(np.mean(kl)) if kl else math.nan


def write_report(plan: Plan, out: Path) -> list[Result]:
    """Reads the runs and writes ``compare.png``, ``compare.md`` and the results into ``compare.json``."""
    runs = [pgjax.load(out / folder_of(name)) for name in plan.specs]
    results = results_of(runs)
    plot_comparison(runs, [result.microseconds for result in results], _title(plan), out / "compare.png", list(plan.specs))
    _write(out / "compare.md", report_markdown(plan, results, runs))
    write_plan(out, plan, results)
    return results


# --- what is said


def _title(plan: Plan) -> str:
    request = plan.request
    how = "each with its preset" if request.presets else "shared settings"
    seeds = f"{request.seeds} seed{'s' if request.seeds > 1 else ''}"
    return f"{request.env}, {seeds}, {how}"


def opening(plan: Plan) -> str:
    """What will be run, and what not."""
    spec = next(iter(plan.specs.values()))
    told = [f"comparing {', '.join(plan.specs)} on {_title(plan)}, {spec.total_env_steps:,} env steps each"]
    return "\n".join([*told, *_left_out(plan)])


def _left_out(plan: Plan) -> list[str]:
    return [f"left out: {name} cannot run here ({why})" for name, why in plan.left_out.items()]


def settings_text(plan: Plan) -> str:
    """The table of settings that are not the same for all, and below it those that are."""
    cells = setting_cells(plan.settings)
    differ = [cell for cell in cells if cell[2]]
    same = [f"{field} {shared}" for field, shared, others in cells if not others]
    table = text_table(("setting", "shared", "not shared"), differ, align="<<<") if differ else "nothing differs"
    return f"{table}\n" + textwrap.fill(f"the same for all: {', '.join(same)}", 120, subsequent_indent="  ")


HEADER = (
    *("algorithm", "mode return, IQM [95 %]", "seeds", "env steps", "KL per update", "µs per env step"),
    *("x ppo", "compile s", "evaluate s"),
)


def result_cells(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The results as text, in the columns of ``HEADER``."""
    return [
        (
            r.algorithm,
            _with_interval(r),
            f"{len(r.seeds)} of {len(r.seeds) + len(r.frozen)}" if r.frozen else f"{len(r.seeds)}",
            f"{r.env_steps:,}",
            "" if math.isnan(r.kl) else f"{r.kl:.2e}",
            f"{r.microseconds:#.3g}",
            "" if r.ratio is None else f"{r.ratio:.2f}",
            f"{r.compile_seconds:.1f}",
            f"{r.evaluate_seconds:.1f}",
        )
        for r in results
    ]


def _with_interval(result: Result) -> str:
    if not result.seeds:
        return "no finite lane"
    if len(result.seeds) == 1:
        return f"{_number(result.iqm)} [one seed]"
    return f"{_number(result.iqm)} [{_number(result.low)}, {_number(result.high)}]"


def _number(value: float) -> str:
    """Four digits, more only before the point."""
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 6)}f}"


def notes(results: Sequence[Result]) -> list[str]:
    """What the table of results cannot say itself."""
    told = []
    for result in results:
        if result.frozen:
            seeds = f"seed{'s' if len(result.frozen) > 1 else ''} {', '.join(map(str, result.frozen))}"
            told.append(f"{result.algorithm}: {seeds} went non-finite, left out of the statistics")
    if len({result.env_steps for result in results}) > 1:
        told.append("the env steps differ by less than one iteration: each budget is rounded up to whole ones")
    return told


def results_text(plan: Plan, results: Sequence[Result]) -> str:
    """The table of results and its notes, for a terminal."""
    lines = [*(f"note: {text}" for text in notes(results)), *_left_out(plan)]
    return "\n".join([text_table(HEADER, result_cells(results)), *lines])


def report_markdown(plan: Plan, results: Sequence[Result], runs: Sequence[LoadedRun]) -> str:
    """``compare.md``: the command, the figure, both tables."""
    spec = next(iter(plan.specs.values()))
    machine = runs[0].provenance
    facts = [
        f"Seeds {spec.seeds[0]} to {spec.seeds[-1]}, {spec.eval_episodes} episodes per evaluation and policy"
        + "".join(f", {name} {show(value)}" for name, value in {**spec.env_options, **spec.env_params}.items())
        + f"; {machine['device_count']} x {machine['device_kind']}, pgjax {machine['pgjax']}, commit {machine['git_commit']}.",
        "The return is the mode policy's at the last evaluation, a mean over episodes per seed; its interquartile mean (IQM) "
        "over seeds stands with the 95 % bootstrap interval over seeds, the only stratum of one environment. KL is "
        "KL(old || new) in nats over the whole batch, once per iteration after its last step. Microseconds are of training "
        "alone, over all seeds side by side; compilation, less where the compilation cache had the program, and evaluation "
        "stand apart.",
    ]
    settings = [(f"`{field}`", shared, others) for field, shared, others in setting_cells(plan.settings)]
    return "\n".join(
        [
            f"# Comparison: {_title(plan)}",
            "",
            f"    {plan.command}",
            "",
            "![learning curves, KL per update, training time](compare.png)",
            "",
            "## Results",
            "",
            markdown_table(HEADER, result_cells(results)),
            "",
            *(f"* {text}" for text in [*notes(results), *_left_out(plan)]),
            *([""] if notes(results) or plan.left_out else []),
            *facts,
            "",
            "## Settings",
            "",
            markdown_table(("setting", "shared", "not shared"), settings),
            "",
        ]
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Columns for a terminal; the first one left, the others right unless ``align`` says otherwise, a letter each."""
    align = align or "<" + ">" * (len(header) - 1)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)
