"""``pgjax train``."""

import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgjax.cli.options import EXIT_FAILED, pairs, parse, peek
from pgjax.errors import RequestError

# Only these: layer sizes, which are several words of one flag, cannot be told in that way.
Repeated = Annotated[list[str], tyro.conf.UseAppendAction]


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
    env_option: Repeated = dataclasses.field(default_factory=list)
    """K=V, an argument of the environment, such as backend=spring or reset_mode=pool; may be repeated."""
    env_param: Repeated = dataclasses.field(default_factory=list)
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


def command(argv: list[str]) -> int:
    from pgjax import algorithms

    known = algorithms.list_algorithms()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: pgjax train ALGORITHM --env ENV ...\n")
        print("\n".join(f"  {name:<10} {line}" for name, line in known.items()))
        print("\npgjax train ALGORITHM --help lists the options with their defaults for that algorithm")
        return 0
    name, *rest = argv
    module = algorithms.get(name)
    args, spec, objective = _request(name, module, rest)
    return _run(args, spec, objective)


def _request(name: str, module, argv: list[str]):
    """Parses the options of ``train``; presets become the defaults that ``--help`` shows."""
    from pgjax.experiments import presets
    from pgjax.experiments.objective_file import load_objective, pinned
    from pgjax.host.runner import RunSpec
    from pgjax.host.store import read_run

    env, out = peek(argv, "--env"), peek(argv, "--out")
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
        args = parse(TrainArgs, [f"--env={spec.env}", *argv], f"pgjax train {name}")
        return args, spec, load_objective(spec.objective)

    preset = presets.find(peek(argv, "--preset") or "auto", name, env or "")
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
    args = parse(cls, argv, f"pgjax train {name}")
    if args.seeds < 1:
        raise RequestError(f"--seeds {args.seeds} must be at least 1")
    if args.seed_start < 0 or args.seed_start + args.seeds > 2**32:
        raise RequestError(f"--seed-start {args.seed_start} must be at least 0 and below 2**32")
    spec = RunSpec(
        algorithm=name,
        env=args.env,
        total_env_steps=args.total_env_steps,
        env_options={**preset.get("env_options", {}), **pairs("--env-option", args.env_option)},
        env_params=pairs("--env-param", args.env_param),
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


def _run(args: TrainArgs, spec, objective) -> int:
    from pgjax.algorithms import get
    from pgjax.host import lanes

    setup = get(spec.algorithm).Setup()
    # What is wrong with a recorded field is said when the algorithm is made.
    setup = dataclasses.replace(setup, **{k: v for k, v in _tuples(spec.setup).items() if hasattr(setup, k)})
    if len(spec.seeds) * len(spec.configs) == 1 and spec.devices is None and lanes.is_small(setup, spec.env):
        lanes.use_one_thread()
    else:
        lanes.use_host_devices()
    lanes.use_compilation_cache()
    from pgjax.experiments.objective_file import makes_its_own_schedule
    from pgjax.host import loggers
    from pgjax.host.display import Display
    from pgjax.host.runner import check_extension, describe_env, extend, run
    from pgjax.host.store import RunStore, read_run

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
        if makes_its_own_schedule(spec.objective) and algorithm.setup.learning_rate_schedule == "linear":
            print(
                f"note: {spec.objective} gets more careful with time by itself, and the learning rate falls as well; it was "
                "made for --setup.learning-rate-schedule constant"
            )
        sending = loggers.follow(out, args.log_to) if args.log_to else contextlib.nullcontext()
        with Display(spec, again) as display, sending as send:

            def report(event):
                display(event)
                if send is not None and event.kind == "saved":
                    send()

            result = run(spec, store, report, algorithm=algorithm)
    # An interrupted run is not done either: what follows in a script must not take it for finished.
    return 0 if result.status == "finished" else EXIT_FAILED


def _extension_line(extension: dict, spec) -> str:
    given = any("anneal_env_steps" in config for config in spec.configs)
    now = "stay at the hypers.anneal_env_steps that was given" if given else "run to the new total from here on"
    return f"extended at {extension['at']:,} env steps, from {extension['from']:,} to {extension['to']:,}: schedules {now}"


def _tuples(fields: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _numbers(hypers) -> dict[str, float]:
    names = (field.name for field in dataclasses.fields(hypers) if field.name not in ("objective", "rule"))
    return {name: float(getattr(hypers, name)) for name in names}


def _differences(given, default) -> dict:
    """Fields of a dataclass that differ from the default one's."""
    pairs = ((field.name, getattr(given, field.name)) for field in dataclasses.fields(given))
    return {name: value for name, value in pairs if value != getattr(default, name)}
