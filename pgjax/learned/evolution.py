"""Evolution strategies on pytrees of parameters: OpenAI-ES with antithetic pairs, whose fitness is to be maximised.

The strategy is evosax's ``Open_ES`` (Salimans et al. 2017, arXiv 1703.03864). What is added: fitness shaping that survives
ties and failed members, partners side by side, and a start that has to be given.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from evosax.algorithms.distribution_based.open_es import Open_ES

from pgjax.errors import RequestError, close_names
from pgjax.types import PyTree

Shaping = Callable[[jax.Array], jax.Array]


def z_score(fitness: jax.Array) -> jax.Array:
    """Fitness [P], P even, less its mean, over its standard deviation; zero for a population of equals.

    Source: Lu et al. 2022 (LPO). authors' code: equals divide zero by zero / here: the divisor has a floor.
    """

    # Pair by pair, so that exchanging partners changes no bit of either sum.
    def mean(x):
        return (x[0::2] + x[1::2]).mean() / 2

    centred = fitness - mean(fitness)
    return centred / (jnp.sqrt(mean(centred**2)) + 1e-8)


def centred_ranks(fitness: jax.Array) -> jax.Array:
    """Ranks of fitness [P], from -1/2 for the worst to 1/2 for the best; members that are equal share their mean rank."""
    ranks = jax.scipy.stats.rankdata(fitness)
    return (ranks - 1) / (fitness.shape[0] - 1) - 0.5


def pair_ranks(fitness: jax.Array) -> jax.Array:
    """1 for the better of each pair of rows 2i and 2i+1, 0 for the other, 1/2 for both of a tie; [P].

    Only who won within a pair counts, so pairs may be measured on different tasks, whatever their scales of reward.
    Source: Jackson et al. 2024 (arXiv 2402.05828), section 3. authors' code: a tie goes to the second member, a bias where
    returns are often both zero / here: to neither.
    """
    first, second = fitness[0::2], fitness[1::2]
    won = (jnp.sign(first - second) + 1) / 2
    return jnp.stack([won, 1 - won], 1).reshape(-1)


SHAPINGS: dict[str, Shaping] = {"z_score": z_score, "centred_ranks": centred_ranks, "pair_ranks": pair_ranks}


class ES(NamedTuple):
    """An evolution strategy as pure functions.

    init: ``(key, mean) -> state`` around a pytree of parameters.
    ask: ``(state, key) -> (population, state)``, every leaf [P, ...]; rows 2i and 2i+1 are mean + noise and mean - noise.
    tell: ``(state, population, fitness [P], key) -> state``, whose mean has moved towards more fitness.
    mean: ``state -> params``, what the search has found; it is the mean of the distribution, not the best member.
    sigma: ``state -> scalar``, the distribution's standard deviation now.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    ask: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]]
    tell: Callable[[PyTree, PyTree, jax.Array, jax.Array], PyTree]
    mean: Callable[[PyTree], PyTree]
    sigma: Callable[[PyTree], jax.Array]


def open_es(
    template: PyTree,
    popsize: int,
    sigma: float = 0.04,
    learning_rate: float = 0.01,
    *,
    sigma_decay: float = 0.999,
    sigma_min: float = 0.01,
    learning_rate_decay: float = 0.999,
    learning_rate_min: float = 0.001,
    adam_b1: float = 0.99,
    adam_b2: float = 0.999,
    shaping: str | Shaping = "z_score",
) -> ES:
    """OpenAI-ES with Adam: m <- m + lr Adam(1 / (P σ) Σ_j noise_j shaped_j), noise_j = (x_j - m) / σ.

    The defaults are those of LPO's meta-training (Lu et al. 2022). Learning rate and σ are multiplied by their decay after
    every generation, down to their floors.

    Args:
      template: a pytree of float32 arrays with the shapes of the parameters.  popsize: P, members of a generation, even.
      shaping: ``z_score``, ``centred_ranks``, ``pair_ranks``, or a function [P] -> [P] of one's own; more is better.
    Raises: RequestError naming field, value and remedy.
    """
    if popsize < 2 or popsize % 2:
        raise RequestError(f"popsize = {popsize} must be an even number >= 2, since members come in antithetic pairs")
    for name, value in (("sigma", sigma), ("learning_rate", learning_rate)):
        if not value > 0:
            raise RequestError(f"{name} = {value} must be above 0")
    for name, value in (("sigma_decay", sigma_decay), ("learning_rate_decay", learning_rate_decay)):
        if not 0 < value <= 1:
            raise RequestError(f"{name} = {value} must be in (0, 1]; 1 keeps it constant")
    if isinstance(shaping, str):
        if shaping not in SHAPINGS:
            raise RequestError(f"shaping = {shaping!r} is unknown; {close_names(shaping, SHAPINGS)}")
        shaping = SHAPINGS[shaping]
    learning_rates = _falling(learning_rate, learning_rate_decay, learning_rate_min)
    sigmas = _falling(sigma, sigma_decay, sigma_min)

    def shaped(_, cost, *__):
        fitness = without_failures(-cost)
        return -pair_differences(shaping(fitness), fitness)

    strategy = Open_ES(
        popsize,
        template,
        optimizer=optax.adam(learning_rates, adam_b1, adam_b2, eps=1e-8),
        std_schedule=sigmas,
        fitness_shaping_fn=shaped,
        metrics_fn=lambda *_: {},
    )
    params = strategy.default_params

    def init(key, mean):
        return _strong(strategy.init(key, mean, params))

    def ask(state, key):
        population, state = strategy.ask(key, state, params)
        # evosax puts all partners behind all members.
        order = jnp.arange(popsize).reshape(2, -1).T.ravel()
        return jax.tree.map(lambda x: x[order], population), state

    def tell(state, population, fitness, key):
        state, _ = strategy.tell(key, population, -fitness, state, params)
        # evosax's own schedule is a generation late: it looks at the counter before raising it.
        return _strong(state.replace(std=sigmas(state.generation_counter)))

    return ES(init, ask, tell, strategy.get_mean, lambda state: state.std)


def without_failures(fitness: jax.Array) -> jax.Array:
    """Fitness [P] whose NaN and infinite entries are a little worse than the worst finite one; all zero if none is finite.

    A little, so that a member that failed is no equal of a partner that earned as little as anybody; by a millionth of the
    worst, or a millionth, which no mean or spread will notice.
    """
    finite = jnp.isfinite(fitness)
    worst = jnp.min(fitness, initial=jnp.inf, where=finite)
    below = worst - 1e-6 * jnp.maximum(jnp.abs(worst), 1.0)
    return jnp.where(finite, fitness, jnp.where(jnp.isfinite(worst), below, 0.0))


def ties(fitness: jax.Array) -> jax.Array:
    """Whether the partners of each pair did equally well [P / 2], both having failed included."""
    fitness = without_failures(fitness)
    return fitness[0::2] == fitness[1::2]


def pair_differences(shaped: jax.Array, fitness: jax.Array) -> jax.Array:
    """Half the difference of each pair's shaped fitness, with either sign [P]; zero where the pair's ``fitness`` is equal.

    It is all that moves the mean, since partners' noise is opposite. A pair that ties leaves the mean exactly where it was:
    what rounding leaves of x_j - m, or of a difference that a compiler has contracted, Adam would divide by its own size and
    make a whole step of.
    """
    first, second = shaped[0::2], shaped[1::2]
    # Both ways round: a product that a compiler contracts into one difference rounds otherwise once partners change places.
    half = jnp.where(fitness[0::2] == fitness[1::2], 0.0, ((first - second) - (second - first)) / 4)
    return jnp.stack([half, -half], 1).reshape(-1)


def _falling(start: float, decay: float, least: float) -> Callable[[Any], jax.Array]:
    """``start`` times ``decay`` for every generation so far, but no lower than ``least``, nor than a lower start."""
    return lambda generation: jnp.maximum(jnp.float32(start) * jnp.float32(decay) ** generation, min(start, least))


def _strong(tree: Any) -> Any:
    """The same arrays with types of their own, as loops and checkpoints need them; evosax begins with Python numbers."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
