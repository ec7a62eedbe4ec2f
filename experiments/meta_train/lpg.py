"""Meta-training of LPG's rule, by meta-gradients or by evolution over whole lives: the options, and what is built of them.

Meta-gradients (``gradient``): every agent of a population makes K updates by the rule, then plays once more; the rule is moved
along the gradient of how good that last rollout was, back through all K updates. Evolution (``whole_lives``): pairs of rules
raise an agent each on the same level, from birth to the end of its life, and only who earned more at the end counts.
``agents`` has the agents of both, ``levels`` what they live on, ``held_out`` the comparison with A2C at the end.

Source: Oh et al. 2020, arXiv 2007.08794; Jackson et al. 2023, arXiv 2310.02782 (GROOVE); Jackson et al. 2024, arXiv 2402.05828
(TA-LPG and evolution); in the form of the latter two's code, EmptyJackson/groove, with its faults mended: see the comments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from pgjax.envs import grid_world
from pgjax.errors import RequestError, close_names
from pgjax.experiments.meta_train import MetaTrainer, gradient, held_out, whole_lives
from pgjax.experiments.meta_train import levels as levels_
from pgjax.experiments.meta_train.agents import Inner, Outcome, make_inner
from pgjax.experiments.meta_train.levels import Score, Transform
from pgjax.host import lanes
from pgjax.learned.files import Learned
from pgjax.learned.rule import RuleSpec, convention_of, read_convention
from pgjax.on_policy import as_hypers, check_choices, check_counts
from pgjax.types import PyTree

# Updates of an agent's life, (shortest, longest), by the name of the levels; log-uniform between them.
LIFETIMES = {
    **{"small": (250, 250), "medium": (1000, 1000), "large": (2500, 2500), "all": (1000, 1000), "debug": (4, 4)},
    **dict.fromkeys(("dense", "sparse", "long", "longer", "long_dense", *grid_world.MAZES), (2500, 2500)),
    **dict.fromkeys(("rand_dense", "rand_long", "rand_small", "rand_sparse", "rand_very_dense"), (25_000, 25_000)),
}
# Shorter lives on the same levels.
ALIASES = {"all_shortlife": ("all", (250, 250)), "all_randlife": ("all", (50, 250)), "all_vrandlife": ("all", (10, 250))}


@dataclasses.dataclass
class Args:
    """Learn an update rule for policy gradients."""

    levels: str = "all_shortlife"
    """Grid-World levels: all_shortlife, all_randlife, all_vrandlife, or what stands behind grid/ in pgjax list envs."""
    generations: int = 5000
    """Meta-updates."""
    method: Literal["gradient", "evolution"] = "gradient"
    """gradient: back through a window of updates; evolution: of whole lives, in pairs, by who earned more."""
    agents: int = 512
    """Agents that live side by side; of evolution, pairs."""
    parts: int = 16
    """Parts of the population, one after the other; more need less memory."""
    num_envs: int = 64
    """Environments of every agent."""
    num_steps: int = 20
    """Steps of a rollout."""
    window: int = 5
    """K, updates that a meta-gradient goes back through."""
    lifetime: tuple[int, int] | None = None
    """Shortest and longest life in updates; the levels' own if not given."""
    temporal: Literal["none", "relative", "raw"] = "none"
    """relative: TA-LPG, whose rule is told the agent's age."""
    hidden_size: int = 256
    """Units of the rule's recurrent network."""
    cell: Literal["gru", "lstm"] = "gru"
    """Its kind."""
    num_predictions: int = 8
    """m, the length of the agent's prediction vector."""
    gamma_input: bool = False
    """Tell the rule the discount too, as in the paper."""
    lr: float | None = None
    """Adam's learning rate; 1e-4, or 0.01 for evolution, the published ones, if not given."""
    max_grad_norm: float = 0.0
    """Bound on the norm of the meta-gradient; 0 is none, as in the authors' code. A rule that meta-learns fast needs one."""
    lr_decay: float = 0.999
    """Evolution: factor on it after every generation, down to 1e-5."""
    sigma: float = 0.1
    """Evolution: standard deviation of the population, constant."""
    start: Literal["drawn", "zero"] = "drawn"
    """Evolution: where the search begins; the authors' code begins at zero."""
    actor_lr: float | None = None
    """Learning rate of agents' policies; 40 for tabular levels, 1e-3 for others."""
    predictor_lr: float | None = None
    """Of their predictions and value functions; 4, or 1e-3."""
    alpha_y: float = 0.5
    """Weight of the prediction in an agent's loss."""
    policy_entropy: float = 0.05
    """b0, bonus on the entropy of agents' policies."""
    prediction_entropy: float = 0.001
    """b1, bonus on the entropy of their predictions."""
    pi_hat_cost: float = 0.005
    """b2, cost of squared π̂."""
    y_hat_cost: float = 0.001
    """b3, cost of squared ŷ."""
    gamma: float = 0.99
    """Discount of the outcome."""
    gae_lambda: float = 0.95
    """λ of the outcome's advantages."""
    score: Score = "random"
    """What a level is worth to be played again; random: all are fresh, plain LPG; frozen: a buffer that never changes."""
    buffer_size: int = 4000
    """Levels that are kept."""
    p_replay: float = 0.5
    """Probability that a new agent gets a level that had been scored."""
    transform: Transform = "rank"
    """rank: the highest scores first; proportional: drawn in proportion to exp(score / temperature)."""
    temperature: float = 1.0
    """Of proportional."""
    staleness: float = 0.0
    """Share of the weight that goes by how long ago a level was played."""
    eval_levels: int = 16
    """Levels of the comparison with A2C at the end."""
    devices: int | None = None
    """Devices to split the agents over in equal shares; as many as possible if not given. On a CPU a device is a core."""


def build(args: Args, pairs: Callable | None = None) -> MetaTrainer:
    """The meta-trainer that the options describe. Raises: RequestError naming field, value and remedy."""
    curriculum = levels_.Curriculum(**{name: getattr(args, name) for name in levels_.Curriculum._fields})
    _check(args, curriculum)
    spec = RuleSpec(
        num_predictions=args.num_predictions,
        hidden_size=args.hidden_size,
        cell=args.cell,
        temporal=args.temporal,
        gamma_input=args.gamma_input,
    )
    inner, (shortest, longest) = inner_of(args, spec), lifetimes(args)[1]
    if args.score == "optimal_regret" and not inner.family.tabular:
        raise RequestError(f"score = 'optimal_regret' needs levels whose optimum is known, and {args.levels} are not tabular")

    sample = levels_.sampler(inner.family, shortest, longest)
    hypers = inner.algorithm.hypers
    agent = {name: float(getattr(hypers, name)) for name in ("learning_rate", "predictor_lr", "alpha_y", "max_grad_norm")}
    convention = convention_of(
        spec,
        **{"num_envs": args.num_envs, "num_steps": args.num_steps, "levels": args.levels, "lifetime": [shortest, longest]},
        agent=agent | {"optimizer": inner.setup.optimizer},
    )
    lr = args.lr if args.lr is not None else {"gradient": 1e-4, "evolution": 1e-2}[args.method]
    shared: Any = dict(num=args.agents, parts=args.parts, lr=lr, devices=_devices(args), convention=convention)
    if args.method == "evolution":
        # Of a log-uniform distribution.
        mean_life = longest if shortest == longest else (longest - shortest) / np.log(longest / shortest)
        numbers: Any = {name: getattr(args, name) for name in ("lr_decay", "sigma", "start")}
        trainer = whole_lives.make(inner, sample, mean_life=mean_life, **numbers, **shared)
    else:
        trainer = gradient.make(inner, sample, curriculum, max_grad_norm=args.max_grad_norm, **shared)

    def report(state):
        name = "held_out" if inner.family.drawn else "on_its_level"
        return {name: held_out.report(inner, trainer.learned(state), args.eval_levels, longest)}

    return trainer._replace(report=report)


def inner_of_rule(rule: Learned, levels: str) -> tuple[Inner, PyTree]:
    """``(inner, parameters)`` of agents that live by a learned rule on other levels, as they lived in its meta-training.

    Their step sizes are taken over where the agents are of the same kind, linear ones with SGD or small networks with Adam.
    """
    spec, params = read_convention(rule.params, rule.convention)
    counts = {name: rule.convention[name] for name in ("num_envs", "num_steps") if name in rule.convention}
    inner = inner_of(Args(levels=levels, **counts), spec)
    agent = rule.convention.get("agent", {})
    if agent.get("optimizer") == inner.setup.optimizer:
        numbers = {name: agent[name] for name in ("learning_rate", "predictor_lr", "alpha_y") if name in agent}
        algorithm = inner.algorithm._replace(hypers=as_hypers(inner.algorithm.hypers.replace(**numbers)))
        inner = inner._replace(algorithm=algorithm)
    return inner, params


def inner_of(args: Args, spec: RuleSpec) -> Inner:
    """The inner problem that the options describe, of agents that live by a rule of that kind."""
    return make_inner(
        lifetimes(args)[0],
        spec,
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        window=args.window,
        actor_lr=args.actor_lr,
        predictor_lr=args.predictor_lr,
        alpha_y=args.alpha_y,
        outcome=Outcome(**{name: getattr(args, name) for name in Outcome._fields}),
    )


def lifetimes(args: Args) -> tuple[str, tuple[int, int]]:
    """The levels' name in Grid-World, and the shortest and longest life on them, in updates."""
    known = [*LIFETIMES, *ALIASES]
    if args.levels not in known:
        raise RequestError(f"levels = {args.levels!r} are unknown; {close_names(args.levels, known)}")
    short, usual = ALIASES[args.levels] if args.levels in ALIASES else (args.levels, LIFETIMES[args.levels])
    shortest, longest = args.lifetime or usual
    if not 1 <= shortest <= longest:
        raise RequestError(f"lifetime = {(shortest, longest)} must be the shortest and the longest life, from 1 update on")
    return short, (shortest, longest)


def _devices(args: Args) -> list[lanes.Device]:
    """Those asked for, or as many as divide the agents of a part."""
    share = args.agents // args.parts
    found = lanes.choose_devices(share, False, args.devices)
    fits = [num for num in range(1, len(found) + 1) if share % num == 0]
    if args.devices not in (None, *fits):
        raise RequestError(f"devices = {args.devices} must divide agents / parts = {share}; give one of {fits}")
    return found[: fits[-1]]


def _check(args: Args, curriculum: levels_.Curriculum) -> None:
    check_choices(args, "")
    check_counts(args, ("agents", "parts", "window", "eval_levels"), "")
    if not args.max_grad_norm >= 0:
        raise RequestError(f"max_grad_norm = {args.max_grad_norm} must be at least 0; 0 is no bound")
    if args.agents % args.parts:
        raise RequestError(f"parts = {args.parts} must divide agents = {args.agents}")
    if args.method == "evolution" and args.score != "random":
        raise RequestError(
            f"score = {args.score!r} is of agents that outlive a meta-update; with method = 'evolution' use 'random'"
        )
    levels_.check(curriculum, args.agents)
