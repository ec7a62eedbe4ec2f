"""``pgjax compare``."""

import dataclasses
import shlex
from pathlib import Path

from pgjax.cli.options import EXIT_FAILED, pairs, parse, peek, repeated
from pgjax.errors import RequestError


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


def command(argv: list[str]) -> int:
    import tyro

    from pgjax.host import lanes

    words = argv
    # `--algorithms a b` stands for `--algorithms a --algorithms b`, so that lists may be written either way.
    argv = repeated(argv, ("--algorithms", "--env-option", "--env-param", "--setup", "--hypers"))
    out, args = peek(argv, "--out"), None
    if not ("--resume" in argv and out is not None and peek(argv, "--env") is None):
        args = parse(CompareArgs, argv, "pgjax compare", config=(tyro.conf.UseAppendAction,))
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
            env_options=pairs("--env-option", args.env_option),
            env_params=pairs("--env-param", args.env_param),
            setup=pairs("--setup", args.setup, str),
            hypers=pairs("--hypers", args.hypers, str),
            num_evals=args.num_evals,
            eval_episodes=args.eval_episodes,
            devices=args.devices,
        )
    resume = args is None or args.resume
    finished = compare(request, Path(out), resume=resume, command=shlex.join(["pgjax", "compare", *words]))
    return 0 if finished else EXIT_FAILED
