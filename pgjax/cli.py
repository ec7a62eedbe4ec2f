"""The ``pgjax`` command. Whatever is slow to import is imported by the command that needs it."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pgjax.errors import RequestError, RunError, close_names

_EXIT_FAILED, _EXIT_WRONG_REQUEST = 1, 2


def main(argv: list[str] | None = None) -> None:
    """Runs one command line and exits: 0 done, 1 the run failed, 2 the request was wrong."""
    argv = sys.argv[1:] if argv is None else argv
    sys.exit(_main(argv))


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        import pgjax

        print(pgjax.__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise RequestError(f"command {argv[0]!r} is unknown; {close_names(argv[0], COMMANDS)}")
        return COMMANDS[argv[0]][0](argv[1:])
    except RequestError as error:
        print(f"pgjax: {error}", file=sys.stderr)
        return _EXIT_WRONG_REQUEST
    except RunError as error:
        print(f"pgjax: {error}", file=sys.stderr)
        return _EXIT_FAILED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pgjax COMMAND ...",
            "",
            *lines,
            "",
            "pgjax COMMAND --help tells more; exit codes: 0 done, 1 the run failed, 2 the request was wrong",
        ]
    )


def _parse(cls: type, argv: list[str], prog: str, **kwargs) -> Any:
    """``tyro.cli`` whose complaints become one ``RequestError`` line."""
    import tyro

    complaint = io.StringIO()
    columns = os.environ.get("COLUMNS")
    wants_help = any(word in ("-h", "--help") for word in argv)
    try:
        if not wants_help:
            os.environ["COLUMNS"] = "10000"  # so that no line of a complaint is broken in the middle
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, args=argv, prog=prog, **kwargs)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise RequestError(_one_line(complaint.getvalue(), prog)) from None
    finally:
        if columns is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = columns


def _one_line(complaint: str, prog: str) -> str:
    # A box is drawn around the complaint, with lines of either kind: borders go, what stands between them stays.
    lines = [line.strip() for line in complaint.splitlines()]
    lines = [re.sub(r"^[│|]\s*|\s*[│|]$", "", line) for line in lines if not re.match(r"[╭╰+]", line)]
    lines = [line for line in lines if line and not re.fullmatch(r"[─-]+", line)]
    lines = [line for line in lines if not line.startswith(("For full helptext", "Argument helptext"))]
    said = []
    for line in lines:
        flag = re.match(r"(--[\w.-]+)", line)
        if line.endswith(":"):
            said.append(line)
        elif flag:
            said.append(flag.group(1))
        elif not said or not said[-1].startswith("--"):
            said.append(line)
    text = " ".join(dict.fromkeys(said)).replace("Perhaps you meant:", "; perhaps you meant")
    text = re.sub(r"\s+;", ";", text).replace(f"Missing from {prog}:", "missing")
    return f"{text or 'the arguments are wrong'} (see {prog} --help)"


# --- train


@dataclasses.dataclass
class TrainArgs:
    """Options of ``train`` that every algorithm shares."""

    env: str
    """Environment, such as gymnax/CartPole-v1; see pgjax list envs."""
    total_env_steps: int = 500_000
    """Environment steps of each lane, rounded up to whole iterations."""
    seeds: int = 1
    """Number of seeds, trained side by side."""
    seed_start: int = 0
    """The first seed."""
    out: Path | None = None
    """Folder of the run; runs/ALGORITHM-ENV if not given."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint; the other options may then be left out."""
    extend: int | None = None
    """Go on with the run in --out, finished or not, to this larger total of environment steps. Schedules then run to the
    new total, so a falling learning rate jumps up where the run goes on; no other option may be given."""
    preset: str = "auto"
    """Settings to start from: a name of pgjax list presets, auto for the environment's own if there is one, or none."""
    init_policy: str | None = None
    """Folder of a run whose policy every lane starts from."""
    objective: str | None = None
    """A policy objective of your own, FILE.py:NAME, a function of (log_ratio, advantage) or a pgjax.Objective; or a learned
    one, lpo:NAME_OR_FILE: docs/learned_objectives.md."""
    rule: str | None = None
    """For lpg: a learned rule, by name or file, such as lpg:default or runs/groove/learned.npz."""
    env_option: list[str] = dataclasses.field(default_factory=list)
    """K=V, an argument of the environment, such as backend=spring or reset_mode=pool; may be repeated."""
    env_param: list[str] = dataclasses.field(default_factory=list)
    """K=V, a physical parameter of the environment, such as gravity=9.0; may be repeated."""
    log_every: int | None = None
    """Iterations behind each row of metrics; about 200 rows if not given."""
    num_evals: int = 10
    """Evaluations during the run."""
    eval_episodes: int | None = None
    """Episodes per evaluation and policy; 64 on gymnax and toys, 16 elsewhere, fewer if they would take too long."""
    devices: int | None = None
    """Devices to spread the lanes over; all if not given. On a CPU a device is a core."""
    precision: Literal["default", "high", "highest", "bfloat16", "tensorfloat32", "float32"] = "float32"
    """Precision of matrix products."""
    log_to: Literal["tensorboard", "wandb"] | None = None
    """Send the metrics, averaged over lanes, to a logger as well."""


def _train(argv: list[str]) -> int:
    from pgjax import algorithms

    known = algorithms.list_algorithms()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: pgjax train ALGORITHM --env ENV ...\n")
        print("\n".join(f"  {name:<10} {line}" for name, line in known.items()))
        print("\npgjax train ALGORITHM --help lists the options with their defaults for that algorithm")
        return 0
    name, *rest = argv
    module = algorithms.get(name)
    args, spec, objective = _train_request(name, module, rest)
    return _run_training(args, spec, objective)


def _train_request(name: str, module, argv: list[str]):
    """Parses the options of ``train``; presets become the defaults that ``--help`` shows."""
    import tyro

    from pgjax.experiments import presets
    from pgjax.experiments.objective_file import load_objective, pinned
    from pgjax.runner import RunSpec
    from pgjax.store import read_run

    env, out = _peek(argv, "--env"), _peek(argv, "--out")
    wants_help = "-h" in argv or "--help" in argv
    extends = not wants_help and any(word.split("=")[0] == "--extend" for word in argv)
    if extends and out is None:
        raise RequestError("--extend needs --out, the folder of the run that is to go on")
    if extends or ("--resume" in argv and env is None and out is not None and not wants_help):
        flag, remedy = ("--extend", "leave it out") if extends else ("--resume", "give --env too to compare the whole request")
        config = read_run(out or "")["config"]
        if config["algorithm"] != name:
            raise RequestError(f"{flag}: {out} holds a run of {config['algorithm']}, not of {name}")
        extra = [word for word in argv if word.startswith("--") and word.split("=")[0] not in (flag, "--resume", "--out")]
        if extra:
            raise RequestError(f"{extra[0]} cannot be changed by {flag}; {remedy}")
        spec = RunSpec.from_config(config)
        args = _parse(TrainArgs, [f"--env={spec.env}", *argv], f"pgjax train {name}", config=(tyro.conf.UseAppendAction,))
        return args, spec, load_objective(spec.objective)

    preset = presets.find(_peek(argv, "--preset") or "auto", name, env or "")
    setup = dataclasses.replace(module.Setup(), **_tuples(preset.get("setup", {})))
    hypers = {**_numbers(module.Hypers()), **preset.get("hypers", {})}
    fields = [
        ("setup", module.Setup, dataclasses.field(default=setup)),
        ("hypers", dataclasses.make_dataclass("Hypers", [(k, float, v) for k, v in hypers.items()]), None),
    ]
    fields[1] = (fields[1][0], fields[1][1], dataclasses.field(default_factory=fields[1][1]))
    cls = dataclasses.make_dataclass("Train", fields, bases=(TrainArgs,))
    cls.__doc__ = f"Train {name}."
    if preset.get("total_env_steps"):
        total = preset["total_env_steps"]
        cls = dataclasses.make_dataclass("Train", [("total_env_steps", int, total)], bases=(cls,))
        cls.__doc__ = f"Train {name}; defaults of preset {preset['name']}."
    args = _parse(cls, argv, f"pgjax train {name}", config=(tyro.conf.UseAppendAction,))
    if args.seeds < 1:
        raise RequestError(f"--seeds {args.seeds} must be at least 1")
    if args.seed_start < 0 or args.seed_start + args.seeds > 2**32:
        raise RequestError(f"--seed-start {args.seed_start} must be at least 0 and below 2**32")
    spec = RunSpec(
        algorithm=name,
        env=args.env,
        total_env_steps=args.total_env_steps,
        env_options={**preset.get("env_options", {}), **_pairs("--env-option", args.env_option)},
        env_params=_pairs("--env-param", args.env_param),
        setup=_differences(args.setup, module.Setup()),
        configs=(_differences(args.hypers, type(args.hypers)(**_numbers(module.Hypers()))),),
        seeds=tuple(range(args.seed_start, args.seed_start + args.seeds)),
        log_every=args.log_every,
        num_evals=args.num_evals,
        eval_episodes=args.eval_episodes,
        objective=pinned(args.objective),
        rule=_rule(name, args.rule),
        init_policy=args.init_policy,
        precision=args.precision,
        devices=args.devices,
        preset=preset["name"],
    )
    return args, spec, load_objective(spec.objective)


def _rule(name: str, rule: str | None) -> str | None:
    """The learned rule as the run records it; None for methods without one."""
    if name != "lpg" and rule is None:
        return None
    from pgjax.algorithms import lpg

    return lpg.pinned(rule)


def _run_training(args: TrainArgs, spec, objective) -> int:
    from pgjax import lanes

    lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax import loggers
    from pgjax.display import Display
    from pgjax.runner import check_extension, describe_env, extend, run
    from pgjax.store import RunStore, read_run

    algorithm = spec.build(objective)
    spec.check(algorithm)
    out = args.out or Path("runs") / f"{spec.algorithm}-{spec.env.replace('/', '-')}"
    if args.log_to:
        loggers.require(args.log_to)
    provenance = describe_env(algorithm.env, spec)
    if args.extend is not None:
        check_extension(spec, algorithm, read_run(out).get("extensions", ()), args.extend)
        store = RunStore.open(out, provenance=provenance)
    elif args.resume:
        store = RunStore.open(out, spec.config(), may_differ=("devices",), provenance=provenance)
    else:
        store = RunStore.create(out, spec.config(), provenance=provenance)
    again = f"pgjax train {spec.algorithm} --out {shlex.quote(str(out))} --resume"
    with store:
        if args.extend is not None:
            spec = extend(store, algorithm, args.extend)
            print(_extension_line(store.extensions[-1], spec))
        elif args.resume and store.status == "finished":
            print(f"{out} is finished already; nothing to do")
            return 0
        sending = loggers.follow(out, args.log_to) if args.log_to else contextlib.nullcontext()
        with Display(spec, again) as display, sending as send:

            def report(event):
                display(event)
                if send is not None and event.kind == "saved":
                    send()

            result = run(spec, store, report, algorithm=algorithm)
    # An interrupted run is not done either: what follows in a script must not take it for finished.
    return 0 if result.status == "finished" else _EXIT_FAILED


def _extension_line(extension: dict, spec) -> str:
    given = any("anneal_env_steps" in config for config in spec.configs)
    now = "stay at the hypers.anneal_env_steps that was given" if given else "run to the new total from here on"
    return f"extended at {extension['at']:,} env steps, from {extension['from']:,} to {extension['to']:,}: schedules {now}"


def _peek(argv: list[str], flag: str) -> str | None:
    """The value of an option before the options are parsed."""
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if word == flag:
            return following
        if word.startswith(flag + "="):
            return word[len(flag) + 1 :]
    return None


def _tuples(fields: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _numbers(hypers) -> dict[str, float]:
    names = (field.name for field in dataclasses.fields(hypers) if field.name not in ("objective", "rule"))
    return {name: float(getattr(hypers, name)) for name in names}


def _differences(given, default) -> dict:
    """Fields of a dataclass that differ from the default one's."""
    pairs = ((field.name, getattr(given, field.name)) for field in dataclasses.fields(given))
    return {name: value for name, value in pairs if value != getattr(default, name)}


def _pairs(flag: str, words: list[str], read: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """``["k=v"]`` to ``{"k": v}``, with numbers, booleans and None recognised unless ``read`` says how."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RequestError(f"{flag} {word!r} must be K=V")
        pairs[key] = (read or _value)(value)
    return pairs


def _value(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    if "," in text and not any(isinstance(value := _value(part), str) or value is None for part in text.split(",")):
        return tuple(map(_value, text.split(",")))  # a range, as in healthy_z_range=0.7,2
    return text


# --- compare


@dataclasses.dataclass
class CompareArgs:
    """Train several algorithms on one environment, for equally long and with equal settings, and compare them."""

    env: str
    """Environment, such as gymnax/CartPole-v1; see pgjax list envs."""
    algorithms: list[str] = dataclasses.field(default_factory=list)
    """Names of pgjax list algorithms, or all; all if not given. lpo:NAME_OR_FILE is PPO with that learned objective."""
    seeds: int = 8
    """Number of seeds of each algorithm."""
    seed_start: int = 0
    """The first seed."""
    total_env_steps: int | None = None
    """Environment steps of each lane; those of PPO's preset for the environment if not given, or else 500000."""
    presets: bool = False
    """Each algorithm with its own preset for the environment, or else its defaults, in place of shared settings."""
    out: Path | None = None
    """Folder of the comparison; runs/compare-ENV if not given."""
    resume: bool = False
    """Go on with the comparison in --out; the other options may then be left out."""
    env_option: list[str] = dataclasses.field(default_factory=list)
    """K=V, an argument of the environment, such as backend=spring; may be repeated."""
    env_param: list[str] = dataclasses.field(default_factory=list)
    """K=V, a physical parameter of the environment, such as gravity=9.0; may be repeated."""
    setup: list[str] = dataclasses.field(default_factory=list)
    """K=V, a field of Setup for every algorithm that has it and does not define it itself; may be repeated."""
    hypers: list[str] = dataclasses.field(default_factory=list)
    """K=V, a number of Hypers, likewise."""
    num_evals: int = 10
    """Evaluations during each run."""
    eval_episodes: int | None = None
    """Episodes per evaluation and policy; 64 on gymnax and toys, 16 elsewhere if not given."""
    devices: int | None = None
    """Devices to spread the lanes over; all if not given. On a CPU a device is a core."""


def _compare(argv: list[str]) -> int:
    import tyro

    from pgjax import lanes

    words = argv
    # `--algorithms a b` stands for `--algorithms a --algorithms b`, so that lists may be written either way.
    argv = _repeated(argv, ("--algorithms", "--env-option", "--env-param", "--setup", "--hypers"))
    out, args = _peek(argv, "--out"), None
    if not ("--resume" in argv and out is not None and _peek(argv, "--env") is None):
        args = _parse(CompareArgs, argv, "pgjax compare", config=(tyro.conf.UseAppendAction,))
        out = args.out or Path("runs") / f"compare-{args.env.replace('/', '-')}"
    else:
        extra = [word for word in argv if word.startswith("--") and word.split("=")[0] not in ("--resume", "--out")]
        if extra:
            raise RequestError(f"{extra[0]} cannot be changed by --resume; give --env too to compare the whole request")
    lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax.experiments.compare import Request, compare

    request = None
    if args is not None:
        request = Request(
            env=args.env,
            algorithms=tuple(args.algorithms),
            seeds=args.seeds,
            seed_start=args.seed_start,
            total_env_steps=args.total_env_steps,
            presets=args.presets,
            env_options=_pairs("--env-option", args.env_option),
            env_params=_pairs("--env-param", args.env_param),
            setup=_pairs("--setup", args.setup, str),
            hypers=_pairs("--hypers", args.hypers, str),
            num_evals=args.num_evals,
            eval_episodes=args.eval_episodes,
            devices=args.devices,
        )
    resume = args is None or args.resume
    finished = compare(request, Path(out), resume=resume, command=shlex.join(["pgjax", "compare", *words]))
    return 0 if finished else _EXIT_FAILED


def _repeated(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    """``[flag, a, b]`` as ``[flag, a, flag, b]`` for these flags."""
    written, flag = [], None
    for word in argv:
        if word.startswith("--"):
            flag = word if word in flags else None
            written.append(word)
        else:
            # A flag that already has a word is written once more.
            written += [flag, word] if flag is not None and written[-1] != flag else [word]
    return written


# --- sweep


@dataclasses.dataclass
class SweepRunArgs:
    """Run what is left of a sweep: cells that are finished are skipped, those half done go on from their checkpoints."""

    file: Path
    """The sweep file; docs/sweeps.md tells what it may hold."""
    out: Path | None = None
    """Folder of the sweep; runs/sweep-NAME after the file if not given."""
    dry_run: bool = False
    """Say what would be run, in how many programs, how long and with how much memory; run nothing."""
    measure: bool = True
    """With --dry-run: measure time and memory by compiling and briefly running each program."""
    engine: Literal["local", "ray", "slurm"] | None = None
    """Where groups of cells run; what the file says, or else processes of this machine."""
    workers: int | None = None
    """Processes side by side, for local and ray; 1 if not given, whose lanes use every core."""
    address: str | None = None
    """Address of a Ray cluster; a new one on this machine if not given."""
    retry: tuple[Literal["failed", "unreadable"], ...] = ()
    """Kinds of cells to run again."""


@dataclasses.dataclass
class SweepPathArgs:
    """The sweep file and its folder."""

    file: Path
    """The sweep file."""
    out: Path | None = None
    """Folder of the sweep; runs/sweep-NAME after the file if not given."""


def _sweep(argv: list[str]) -> int:
    usage = "usage: pgjax sweep {run,status,report} FILE [--out DIR] ...\n\npgjax sweep run --help lists the options"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else _EXIT_WRONG_REQUEST
    action, *rest = argv
    if action not in ("run", "status", "report"):
        raise RequestError(f"sweep {action!r} is unknown; {close_names(action, ('run', 'status', 'report'))}")
    words = ["pgjax", "sweep", *argv]
    if not rest:
        raise RequestError(f"name a sweep file: pgjax sweep {action} FILE")
    rest = [f"--file={rest[0]}", *rest[1:]] if not rest[0].startswith("-") else rest
    args = _parse(SweepRunArgs if action == "run" else SweepPathArgs, rest, f"pgjax sweep {action}")
    if not args.file.is_file():
        raise RequestError(f"there is no file {args.file}; name a sweep file")
    from pgjax import lanes

    lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax.experiments.sweeps import driver

    out = args.out or driver.default_out(args.file)
    if action == "status":
        print(driver.sweep_status(args.file, out))
        return 0
    if action == "report":
        from pgjax.experiments.report import write_report

        results = driver.results_of_sweep(args.file, out)
        print(write_report(results, out, title=f"Sweep {args.file.stem}", command=shlex.join(words)))
        return 0
    options = driver.Options(out, args.engine, args.workers, args.address, args.retry)
    if args.dry_run:
        driver.dry_run(args.file, options, measure=args.measure)
        return 0
    return 0 if driver.run_sweep(args.file, options, command=shlex.join(words)) else _EXIT_FAILED


# --- reproduce


@dataclasses.dataclass
class ReproduceArgs:
    """Run what a paper's numbers need and put ours beside them. pgjax list papers names the papers."""

    paper: str | None = None
    """Name of the paper, such as ppo."""
    scale: Literal["smoke", "cpu", "full"] = "smoke"
    """smoke proves the path in a minute or two, cpu is half an hour of two cores, full the paper's own budget."""
    out: Path | None = None
    """Folder of the runs and tables; runs/reproduce-PAPER-SCALE if not given."""
    workers: int | None = None
    """Processes side by side; 1 if not given, whose lanes use every core."""
    engine: Literal["local", "ray", "slurm"] | None = None
    """Where the runs go; processes of this machine if not given."""
    retry: tuple[Literal["failed", "unreadable"], ...] = ()
    """Kinds of cells to run again."""
    record: bool = False
    """Keep the results beside the published numbers, for --page."""
    page: Path | None = None
    """Write the page that says where we stand, from the results that were kept, and run nothing: docs/reproduction.md."""


def _reproduce(argv: list[str]) -> int:
    argv = [f"--paper={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else list(argv)
    if argv and argv[-1] == "--page":
        argv.append("docs/reproduction.md")
    args = _parse(ReproduceArgs, argv, "pgjax reproduce")
    if args.page is not None:
        from pgjax.experiments.reproduce.page import write_page

        write_page(args.page)
        return 0
    from pgjax import lanes

    lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax.experiments.reproduce import list_papers, reproduce
    from pgjax.experiments.sweeps.driver import Options

    if args.paper is None:
        raise RequestError(f"name a paper: {', '.join(list_papers())}")
    out = args.out or Path("runs") / f"reproduce-{args.paper}-{args.scale}"
    options = Options(out, args.engine, args.workers, None, args.retry)
    return 0 if reproduce(args.paper, args.scale, options, record=args.record) else _EXIT_FAILED


# --- meta-train


@dataclasses.dataclass
class MetaTrainArgs:
    """Options of ``meta-train`` that every kind shares."""

    out: Path | None = None
    """Folder to write into; runs/meta-NAME if not given."""
    seed: int = 0
    """Seed of the meta-training."""
    resume: bool = False
    """Go on with the meta-training in --out from its last checkpoint; the other options may then be left out."""


def _meta_train(argv: list[str]) -> int:
    import tyro

    from pgjax import lanes
    from pgjax.experiments import meta_train

    words = ["pgjax", "meta-train", *argv]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: pgjax meta-train {{{','.join(meta_train.list_names())}}} --out DIR ...")
        print("\npgjax meta-train NAME --help lists the options: docs/learned_objectives.md")
        return 0 if argv else _EXIT_WRONG_REQUEST
    name, *rest = argv
    lanes.use_host_devices()
    lanes.use_compilation_cache()
    module = meta_train.get(name)
    cls = dataclasses.make_dataclass("MetaTrain", [], bases=(module.Args, MetaTrainArgs))
    cls.__doc__ = module.Args.__doc__
    args = _parse(cls, rest, f"pgjax meta-train {name}", config=(tyro.conf.UseAppendAction,))
    from pgjax.experiments.meta_train import loop

    out = args.out or Path("runs") / f"meta-{name}"
    given = [word for word in rest if word.startswith("--") and word.split("=")[0] not in ("--resume", "--out")]
    if args.resume and not given:
        request = loop.read_request(out)
        if request.get("name") != name:
            raise RequestError(f"--resume: {out} holds a meta-training of {request.get('name')}, not of {name}")
        fields = {field.name for field in dataclasses.fields(module.Args)}
        # A request without devices is of a time when there was one.
        request = {"devices": 1, **request}
        args = cls(**{key: value for key, value in request.items() if key in {*fields, "seed"}}, out=out, resume=True)
    request = {"name": name, **{field.name: getattr(args, field.name) for field in dataclasses.fields(module.Args)}}
    trainer = module.build(args, _pairs)
    done = loop.meta_train(
        trainer,
        out,
        args.generations,
        seed=args.seed,
        request=request,
        resume=args.resume,
        command=shlex.join(words),
    )
    return 0 if done else _EXIT_FAILED


# --- eval, render, plot, list, doctor, bench


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


def _eval(argv: list[str]) -> int:
    import tyro

    from pgjax import lanes

    argv = [f"--run={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else argv
    args = _parse(EvalArgs, argv, "pgjax eval", config=(tyro.conf.UseAppendAction,))
    if args.episodes < 1:
        raise RequestError(f"--episodes {args.episodes} must be at least 1")
    lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax.experiments.evaluate_run import evaluate_run, summary_table

    frame = evaluate_run(args.run, args.env, _pairs("--env-option", args.env_option), args.episodes, args.seed)
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


def _render(argv: list[str]) -> int:
    import tyro

    from pgjax import lanes

    words = ["pgjax", "render", *argv]
    argv = [f"--run={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else argv
    args = _parse(RenderArgs, argv, "pgjax render", config=(tyro.conf.UseAppendAction,))
    if args.episodes < 1:
        raise RequestError(f"--episodes {args.episodes} must be at least 1")
    if args.seed < 0:
        raise RequestError(f"--seed {args.seed} must be at least 0")
    from pgjax.store import read_run

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
        env_options=_pairs("--env-option", args.env_option),
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


def _plot(argv: list[str]) -> int:
    folders = []
    while argv and not argv[0].startswith("-"):
        folders.append(argv.pop(0))
    args = _parse(PlotArgs, [*(["--runs", *folders] if folders else []), *argv], "pgjax plot")
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


def _report(argv: list[str]) -> int:
    words, folders = list(argv), []
    while argv and not argv[0].startswith("-"):
        folders.append(argv.pop(0))
    args = _parse(ReportArgs, [*(["--runs", *folders] if folders else []), *argv], "pgjax report")
    from pgjax.experiments.report import report_runs

    report_runs(args.runs, args.out, command=shlex.join(["pgjax", "report", *words]))
    return 0


def _list(argv: list[str]) -> int:
    what = argv[0] if argv else ""
    lists = {"envs": _list_envs, "algorithms": _list_algorithms, "presets": _list_presets, "papers": _list_papers}
    if what in ("-h", "--help", ""):
        print(f"usage: pgjax list {{{','.join(lists)}}}")
        return 0 if what else _EXIT_WRONG_REQUEST
    if what not in lists:
        raise RequestError(f"list {what!r} is unknown; {close_names(what, lists)}")
    lists[what]()
    return 0


def _list_papers() -> None:
    from pgjax.experiments.reproduce.paper_file import list_papers, read_paper

    for name in list_papers():
        paper = read_paper(name)
        numbers = sum(len(entry.values) for entry in paper.numbers)
        runs = "" if paper.runs else ", no runs yet"
        print(f"{name:18} {paper.title} ({paper.source}): {numbers} numbers, {len(paper.claims)} claims{runs}")


def _list_envs() -> None:
    from pgjax.envs import list_envs

    for entry in list_envs():
        notes = [", ".join(entry.backends)] if entry.backends else []
        notes += [f"{backend + ': ' if backend else ''}{why}" for backend, why in entry.broken.items()]
        print(f"{entry.name:<34} {'; '.join(notes)}".rstrip())


def _list_algorithms() -> None:
    from pgjax.algorithms import list_algorithms

    for name, line in list_algorithms().items():
        print(f"{name:<12} {line}")


def _list_presets() -> None:
    from pgjax.experiments.presets import list_presets

    # Environments of one library that share what is said of a preset share its line.
    lines: dict[tuple[str, str, str], list[str]] = {}
    for name, by_algorithm in list_presets().items():
        library = name.partition("/")[0]
        for algorithm, preset in by_algorithm.items():
            lines.setdefault((library, algorithm, preset.get("reached") or preset.get("about", "")), []).append(name)
    for (library, algorithm, said), names in lines.items():
        name = names[0] if len(names) == 1 else f"{library}/... ({len(names)} environments)"
        print(f"{name:<34} {algorithm:<10} {said}".rstrip())


def _doctor(argv: list[str]) -> int:
    if argv:
        return _help_only(argv, "usage: pgjax doctor\n\nChecks that what pgjax needs is there and works.")
    from pgjax.doctor import examine

    return examine(print)


def _help_only(argv: list[str], text: str) -> int:
    if argv[0] in ("-h", "--help"):
        print(text)
        return 0
    raise RequestError(f"argument {argv[0]!r} is unknown here; this command takes none")


@dataclasses.dataclass
class BenchArgs:
    """Measure speed on this machine: the public single-file PPO setting, lanes, environments, start-up and memory."""

    parts: tuple[str, ...] = ()
    """What to measure; everything if not given. --parts help lists them."""
    out: Path | None = None
    """Write the figures to this JSON file as well."""
    repeats: int = 5
    """Repetitions, of which the median is reported."""


def _bench(argv: list[str]) -> int:
    args = _parse(BenchArgs, argv, "pgjax bench")
    from pgjax import lanes

    lanes.use_host_devices()
    from pgjax.experiments.bench import bench

    return bench(args.parts, args.repeats, args.out, print)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train an algorithm on an environment, for one or many seeds"),
    "compare": (_compare, "train several algorithms alike and compare them"),
    "sweep": (_sweep, "run, watch and report many configurations described in one file"),
    "reproduce": (_reproduce, "put a paper's published numbers beside ours"),
    "meta-train": (_meta_train, "learn an objective or an update rule by training many agents"),
    "eval": (_eval, "evaluate the saved policies of a run"),
    "render": (_render, "draw what a policy of a run does, as GIFs and one page"),
    "plot": (_plot, "draw learning curves of runs"),
    "report": (_report, "write one page on many runs, with figures, tables and commands"),
    "list": (_list, "list envs, algorithms, presets or papers"),
    "doctor": (_doctor, "check the installation"),
    "bench": (_bench, "measure speed on this machine"),
}

if __name__ == "__main__":
    main()
