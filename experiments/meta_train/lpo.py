"""Meta-training of LPO and TA-LPO by evolution: a member's fitness is what PPO with its drift earns after a whole training run.

One program trains the whole population, each member on several seeds and environments, lanes side by side and over all
devices. Partners of an antithetic pair share every random key, so that they differ by their drifts alone.

Source: Lu et al. 2022 (arXiv 2210.05639), section 4, and Jackson et al. 2024 (arXiv 2402.05828) for progress.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

import pgjax
from pgjax import on_policy, training
from pgjax.algorithms import lpo, ppo
from pgjax.errors import RequestError
from pgjax.evaluation import evaluate
from pgjax.experiments import presets
from pgjax.experiments.meta_train import MetaTrainer
from pgjax.host import lanes as lanes_
from pgjax.learned import evolution
from pgjax.types import Environment, Objective, PyTree
from pgjax.updates import minibatch_sgd, plug

# Ends of the histograms from which the range of meta-training is read, and their number of cells.
_HISTOGRAM = {"log_ratio": (-6.0, 6.0), "advantage": (-12.0, 12.0)}
_CELLS = 480
# The range leaves out this share of samples at either end.
_TAIL = 1e-3
# At which progress the schedule of a temporal drift is told.
_PROGRESS = np.linspace(0, 1, 11)


@dataclasses.dataclass
class Args:
    """Learn a drift function for PPO."""

    env: list[str] = dataclasses.field(default_factory=list)
    """Environment to meta-train on, such as gymnax/CartPole-v1; may be repeated: fitness is then the mean of what each
    gives, normalised apart."""
    generations: int = 150
    """Steps of the evolution strategy."""
    popsize: int = 32
    """Members of a generation, an even number."""
    inner_env_steps: int = 65536
    """Environment steps of every inner training run."""
    seeds: int = 1
    """Inner runs of each member on each environment, whose mean return is its fitness there."""
    eval_episodes: int = 8
    """Episodes, with sampled actions, of the evaluation at the end of an inner run."""
    sigma: float = 0.04
    """Standard deviation of the population at the start."""
    sigma_decay: float = 0.999
    """Factor on it after every generation."""
    lr: float = 0.01
    """Adam's learning rate at the start."""
    lr_decay: float = 0.999
    """Factor on it after every generation."""
    shaping: Literal["z_score", "centred_ranks", "pair_ranks"] = "centred_ranks"
    """What becomes of fitness before it weighs a member's noise."""
    init: Literal["ppo", "scratch"] = "ppo"
    """ppo: the drift is added to PPO's, and the search starts from PPO; scratch: it starts from no drift at all."""
    temporal: bool = False
    """TA-LPO: the drift sees how much of the run is behind."""
    hidden: int = 128
    """Units of the drift network."""
    xi: float = 1e-4
    """How far the network may rise before there is a drift."""
    setup: list[str] = dataclasses.field(default_factory=list)
    """K=V, a field of PPO's Setup in the inner runs, over the environment's preset; may be repeated."""
    hypers: list[str] = dataclasses.field(default_factory=list)
    """K=V, a number of PPO's Hypers, likewise."""
    devices: int | None = None
    """Devices to spread the inner runs over; all if not given. On a CPU a device is a core."""


def build(args: Args, pairs) -> MetaTrainer:
    """The meta-trainer that the options describe. ``pairs(flag, words)`` reads ``K=V``."""
    if not args.env:
        raise RequestError("--env is missing; name at least one environment of pgjax list envs")
    if len(set(args.env)) < len(args.env):
        raise RequestError(f"--env {' '.join(args.env)}: one stands there twice; name each once")
    settings = {"setup": pairs("--setup", args.setup), "hypers": pairs("--hypers", args.hypers)}
    inner = [inner_algorithm(name, args.temporal, **settings) for name in args.env]
    fields = [field.name for field in dataclasses.fields(Args) if field.name not in ("env", "generations", "setup", "hypers")]
    return make(inner, **{name: getattr(args, name) for name in fields})


@dataclasses.dataclass(frozen=True)
class Inner:
    """PPO as the inner runs have it, but for its objective. name: of the environment."""

    name: str
    env: Environment
    setup: ppo.Setup
    hypers: Any


def inner_algorithm(name: str, temporal: bool = False, setup: dict | None = None, hypers: dict | None = None) -> Inner:
    """PPO with its preset for the environment, constant learning rate for a temporal drift, and what is given over it.

    A drift that knows the time makes its own schedule; one that falls besides would count progress twice.
    """
    preset = presets.find("auto", "ppo", name)
    setup = {**preset.get("setup", {}), **({"learning_rate_schedule": "constant"} if temporal else {}), **(setup or {})}
    hypers = {**preset.get("hypers", {}), **(hypers or {})}
    env = pgjax.make_env(name, **preset.get("env_options", {}))
    algorithm = pgjax.make("ppo", env, hypers, **setup)
    return Inner(name, env, algorithm.setup, algorithm.hypers)


class State(struct.PyTreeNode):
    """What a generation hands to the next. es: of the evolution strategy.  generation: int32, how many there were."""

    key: jax.Array
    es: PyTree
    generation: jax.Array


def make(
    inner: Sequence[Inner],
    *,
    popsize: int = 32,
    inner_env_steps: int = 65536,
    seeds: int = 1,
    eval_episodes: int = 8,
    sigma: float = 0.04,
    sigma_decay: float = 0.999,
    lr: float = 0.01,
    lr_decay: float = 0.999,
    shaping: str = "centred_ranks",
    init: Literal["ppo", "scratch"] = "ppo",
    temporal: bool = False,
    hidden: int = 128,
    xi: float = 1e-4,
    devices: int | None = None,
) -> MetaTrainer:
    """The meta-trainer on these inner algorithms; arguments as of ``Args``.

    Metrics: ``fitness_*`` in units of the population's spread on each environment, ``return_NAME`` and ``best_NAME`` the
    mean and the best member's return there, ``ties`` the share of pairs with equal fitness, ``failed`` the share of members
    with a run that went non-finite, ``sigma``, ``mean_norm`` and ``update_norm`` of the search.
    Raises: RequestError naming field, value and remedy.
    """
    if not inner:
        raise RequestError("env = []: name at least one environment")
    for name, value in (("seeds", seeds), ("eval_episodes", eval_episodes), ("hidden", hidden)):
        if value < 1:
            raise RequestError(f"{name} = {value} must be at least 1")
    convention = lpo.Convention.from_dict({"form": init, "temporal": temporal, "xi": xi})
    template = lpo.init_params(jax.random.key(0), temporal, hidden)
    es = evolution.open_es(
        template,
        popsize,
        sigma,
        lr,
        sigma_decay=sigma_decay,
        sigma_min=min(sigma, 0.01),
        learning_rate_decay=lr_decay,
        learning_rate_min=min(lr, 0.001),
        shaping=shaping,
    )
    objective = lpo.objective(template, convention)
    host = any(part.env.host_callback for part in inner)
    chosen = lanes_.choose_devices(popsize * seeds, host, devices)
    spread = lanes_.Spread(popsize * seeds, chosen)
    runs = [_inner_run(part, objective, inner_env_steps, eval_episodes) for part in inner]
    labels = _labels([part.name for part in inner])

    def initial(key):
        key, key_es, key_params = jax.random.split(key, 3)
        state = es.init(key_es, lpo.init_params(key_params, temporal, hidden))
        return State(key, state, jnp.zeros((), jnp.int32))

    def returns_of(population, key):
        """Mean return of every member on every environment, [E, P]; NaN where an inner run went non-finite."""
        lanes = jax.tree.map(lambda x: jnp.repeat(x, seeds, 0), population)
        earned = []
        for number, run in enumerate(runs):
            # One key for a pair and seed: partners meet the same starts, the same noise, the same minibatches.
            keys = jax.random.split(jax.random.fold_in(key, number), (popsize // 2, seeds))
            keys = jnp.repeat(keys, 2, 0).reshape(-1)
            padded = spread.pad((keys, lanes))
            earned.append(spread.map(run, 2)(*padded)[: popsize * seeds].reshape(popsize, seeds).mean(1))
        return jnp.stack(earned)

    def step(state):
        key, key_ask, key_runs, key_tell = jax.random.split(state.key, 4)
        population, asked = es.ask(state.es, key_ask)
        returns = returns_of(population, key_runs)
        fitness = normalised(returns)
        told = es.tell(asked, population, fitness, key_tell)
        before, after = (_flat(es.mean(s)) for s in (state.es, told))
        known = jnp.isfinite(fitness)
        metrics = {
            "fitness_mean": fitness.mean(where=known),
            "fitness_max": fitness.max(where=known, initial=-jnp.inf),
            "ties": evolution.ties(fitness).mean(),
            "failed": 1 - known.mean(),
            "sigma": es.sigma(state.es),
            "mean_norm": jnp.linalg.norm(after),
            "update_norm": jnp.linalg.norm(after - before),
        }
        for label, row in zip(labels, returns, strict=True):
            metrics[f"return_{label}"] = jnp.nanmean(row)
            metrics[f"best_{label}"] = jnp.nanmax(row)
        return State(key, told, state.generation + 1), metrics

    def report(state):
        params = jax.tree.map(np.asarray, es.mean(state.es))
        keys = jax.random.split(jax.random.key(1), seeds)
        counts = np.sum([_histograms(part, objective, inner_env_steps, params, keys) for part in inner], 0)
        told = {"range": {name: _quantiles(counts[i], *_HISTOGRAM[name]) for i, name in enumerate(_HISTOGRAM)}}
        told["upper_clip"] = {
            "progress": _PROGRESS.tolist(),
            "ratio": np.asarray(lpo.upper_clip(params, convention, _PROGRESS), np.float64).tolist(),
        }
        return told

    env_steps = sum(_env_steps(part, inner_env_steps) for part in inner) * popsize * seeds
    return MetaTrainer(
        init=initial,
        step=step,
        learned=lambda state: es.mean(state.es),
        kind=lpo.KIND,
        convention=dataclasses.asdict(convention),
        env_steps_per_step=env_steps,
        devices=tuple(chosen),
        report=report,
        curve=f"return_{labels[0]}",
    )


def normalised(returns: jax.Array) -> jax.Array:
    """Fitness [P] of returns [E, P]: each environment's less its mean over its spread, then their mean; NaN stays NaN.

    Environments count alike, whatever their scale of reward.
    """
    centre = jnp.nanmean(returns, 1, keepdims=True)
    spread = jnp.nanstd(returns, 1, keepdims=True)
    # Summed over environments in the same order for every member, so that equals stay equal.
    return ((returns - centre) / (spread + 1e-8)).mean(0)


def _env_steps(part: Inner, inner_env_steps: int) -> int:
    algorithm = ppo.make(part.env, part.setup, part.hypers)
    return training.make_schedule(algorithm, inner_env_steps, num_evals=0).env_steps


def _inner_run(part: Inner, objective: Objective, inner_env_steps: int, eval_episodes: int):
    """``(key, params) -> return``: a whole run of PPO with that drift, then the mean return of full episodes, sampled."""
    algorithm = ppo.make(part.env, part.setup, part.hypers, objective=objective)
    schedule = training.make_schedule(algorithm, inner_env_steps, num_evals=0)

    def run(key, params):
        hypers = training.with_horizon(algorithm.hypers.replace(objective=params), schedule.env_steps)
        key_train, key_evaluate = training.lane_keys(key)
        state = algorithm.init(key_train, hypers)
        state = jax.lax.fori_loop(0, schedule.num_iterations, lambda _, state: algorithm.step(state, hypers)[0], state)
        # As `make_train` evaluates at the end of a run.
        key_evaluate = jax.random.fold_in(key_evaluate, 0)
        episodes = evaluate(algorithm, algorithm.policy(state), key_evaluate, eval_episodes)
        return jnp.where(state.nonfinite, jnp.nan, episodes.sample_return.mean())

    return run


def _histograms(part: Inner, objective: Objective, inner_env_steps: int, params: PyTree, keys: jax.Array) -> np.ndarray:
    """Counts [2, cells] of the log ratios and advantages that the drift saw in inner runs with these keys."""

    def cells(x, ends):
        low, high = ends
        index = ((x - low) / (high - low) * _CELLS).astype(jnp.int32)
        return jnp.zeros(_CELLS).at[jnp.clip(index, 0, _CELLS - 1)].add(1.0)

    def count(sample, hypers, extra):
        return extra + jnp.stack([cells(getattr(sample, name), ends) for name, ends in _HISTOGRAM.items()])

    plugged, hypers = plug(objective, lambda sample, *_: sample.advantage, part.hypers)
    update = minibatch_sgd(plugged, update_extra=count)

    def init_extra(core, hypers):
        return jnp.zeros((len(_HISTOGRAM), _CELLS))

    algorithm = on_policy.make("ppo", part.env, part.setup, hypers, update=update, init_extra=init_extra)
    schedule = training.make_schedule(algorithm, inner_env_steps, num_evals=0)
    hypers = training.with_horizon(algorithm.hypers.replace(objective=params), schedule.env_steps)

    def run(key):
        state = algorithm.init(training.lane_keys(key)[0], hypers)
        state = jax.lax.fori_loop(0, schedule.num_iterations, lambda _, state: algorithm.step(state, hypers)[0], state)
        return state.learner.extra

    return np.asarray(jax.jit(jax.vmap(run))(keys), np.float64).sum(0)


def _quantiles(counts: np.ndarray, low: float, high: float) -> list[float]:
    """The values between which all samples lie but a share ``_TAIL`` at either end, to the width of a cell."""
    edges = np.linspace(low, high, _CELLS + 1)
    below = np.cumsum(counts) / counts.sum()
    return [float(edges[np.searchsorted(below, _TAIL)]), float(edges[np.searchsorted(below, 1 - _TAIL) + 1])]


def _labels(names: Sequence[str]) -> list[str]:
    """Short names of environments, for columns; whole ones where short ones are not unique."""
    short = [name.rpartition("/")[2] for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _flat(tree: PyTree) -> jax.Array:
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
