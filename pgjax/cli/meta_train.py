"""``pgjax meta-train``."""

import dataclasses
import shlex
from pathlib import Path

from pgjax.cli.options import EXIT_FAILED, EXIT_WRONG_REQUEST, pairs, parse
from pgjax.errors import RequestError


@dataclasses.dataclass
class MetaTrainArgs:
    """Options of ``meta-train`` that every kind shares."""

    out: Path | None = None
    """Folder to write into; runs/meta-NAME if not given."""
    seed: int = 0
    """Seed of the meta-training."""
    resume: bool = False
    """Go on with the meta-training in --out from its last checkpoint; the other options may then be left out."""


def command(argv: list[str]) -> int:
    import tyro

    from pgjax.experiments import meta_train
    from pgjax.host import lanes

    words = ["pgjax", "meta-train", *argv]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: pgjax meta-train {{{','.join(meta_train.list_names())}}} --out DIR ...")
        print("\npgjax meta-train NAME --help lists the options: docs/learned_objectives.md")
        return 0 if argv else EXIT_WRONG_REQUEST
    name, *rest = argv
    lanes.use_host_devices()
    lanes.use_compilation_cache()
    module = meta_train.get(name)
    cls = dataclasses.make_dataclass("MetaTrain", [], bases=(module.Args, MetaTrainArgs))
    cls.__doc__ = module.Args.__doc__
    args = parse(cls, rest, f"pgjax meta-train {name}", config=(tyro.conf.UseAppendAction,))
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
    trainer = module.build(args, pairs)
    done = loop.meta_train(
        trainer,
        out,
        args.generations,
        seed=args.seed,
        request=request,
        resume=args.resume,
        command=shlex.join(words),
    )
    return 0 if done else EXIT_FAILED
