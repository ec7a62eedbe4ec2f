"""Meta-training of LPG's rule, by meta-gradients or by evolution over whole lives, and of GROOVE's, on levels that teach most.

Meta-gradients: every agent of a population makes K updates by the rule, then plays once more; the rule is moved along the
gradient of how good that last rollout was, back through all K updates. Evolution: pairs of rules raise an agent each on the
same level, from birth to the end of its life, and only who earned more at the end counts.

Source: Oh et al. 2020, arXiv 2007.08794; Jackson et al. 2023, arXiv 2310.02782 (GROOVE); Jackson et al. 2024, arXiv 2402.05828
(TA-LPG and evolution); in the form of the latter two's code, EmptyJackson/groove, with its faults mended: see the comments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

import pgjax
from pgjax import on_policy
from pgjax.algorithms import lpg
from pgjax.envs import grid_world
from pgjax.errors import RequestError, close_names
from pgjax.experiments.meta_train import MetaTrainer
from pgjax.experiments.meta_train import levels as levels_
from pgjax.learned import evolution
from pgjax.learned.files import Learned
from pgjax.learned.rule import RuleSpec, convention_of, init_rule
from pgjax.types import Environment, PyTree

# Updates of an agent's life, (shortest, longest), by the name of the levels; log-uniform between them.
LIFETIMES = {
    **{"small": (250, 250), "medium": (1000, 1000), "large": (2500, 2500), "all": (1000, 1000), "debug": (4, 4)},
    **dict.fromkeys(("dense", "sparse", "long", "longer", "long_dense", *grid_world.MAZES), (2500, 2500)),
    **dict.fromkeys(("rand_dense", "rand_long", "rand_small", "rand_sparse", "rand_very_dense"), (25_000, 25_000)),
}
# Shorter lives on the same levels.
ALIASES = {"all_shortlife": ("all", (250, 250)), "all_randlife": ("all", (50, 250)), "all_vrandlife": ("all", (10, 250))}
# Levels that no meta-training sees: a stream of its own.
_HELD_OUT = 0x68656C64


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
    lr: float = 1e-4
    """Adam's learning rate; for evolution 0.01 is the published one."""
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
    score: Literal["random", "frozen", "alg_regret", "optimal_regret", "positive_value_loss", "l1_value_loss"] = "random"
    """What a level is worth to be played again; random: all are fresh, plain LPG; frozen: a buffer that never changes."""
    buffer_size: int = 4000
    """Levels that are kept."""
    p_replay: float = 0.5
    """Probability that a new agent gets a level that had been scored."""
    transform: Literal["rank", "proportional"] = "rank"
    """rank: the highest scores first; proportional: drawn in proportion to exp(score / temperature)."""
    temperature: float = 1.0
    """Of proportional."""
    staleness: float = 0.0
    """Share of the weight that goes by how long ago a level was played."""
    eval_levels: int = 16
    """Levels of the comparison with A2C at the end."""


def build(args: Args, pairs: Callable | None = None) -> MetaTrainer:
    """The meta-trainer that the options describe."""
    return make(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Args) if field.name != "generations"})


# ---- The inner problem ----------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Numbers of the meta-objective; see ``Args``."""

    policy_entropy: float = 0.05
    prediction_entropy: float = 0.001
    pi_hat_cost: float = 0.005
    y_hat_cost: float = 0.001
    gamma: float = 0.99
    gae_lambda: float = 0.95


class Inner(NamedTuple):
    """What an agent of the population is, static. algorithm: LPG on the levels' environment; its rule is replaced in use.

    critic: the value function that judges outcomes.  window: K.
    """

    algorithm: Any
    critic: lpg.Network
    window: int
    outcome: Outcome

    @property
    def env(self) -> Environment:
        return self.algorithm.env

    @property
    def setup(self) -> lpg.Setup:
        return self.algorithm.setup


class Agent(struct.PyTreeNode):
    """One agent of the population. state: of LPG, with its level as ``env_params``; ``env_steps`` is its age.

    critic, critic_opt: value function and its optimiser's state.  lifetime: float32 [], in updates.
    """

    state: lpg.State
    critic: PyTree
    critic_opt: PyTree
    lifetime: jax.Array


class Lived(NamedTuple):
    """What came of a window, besides the loss; scalars. positive, absolute: of the raw advantages of the last rollout."""

    outcome: jax.Array
    reward: jax.Array
    policy_entropy: jax.Array
    prediction_entropy: jax.Array
    pi_hat_square: jax.Array
    y_hat_square: jax.Array
    loss_value: jax.Array
    positive: jax.Array
    absolute: jax.Array


def make_inner(
    levels: str, spec: RuleSpec, *, num_envs, num_steps, window, actor_lr=None, predictor_lr=None, alpha_y=0.5, outcome
):
    """An ``Inner`` on the levels of that name: linear agents with SGD where states can be numbered, else a small network."""
    tabular = grid_world.family(levels).tabular
    env = pgjax.make_env(f"grid/{levels}", **({"observation": "index"} if tabular else {}))
    setup = lpg.Setup(
        num_envs=num_envs,
        num_steps=num_steps,
        optimizer="sgd" if tabular else "adam",
        hidden_sizes=() if tabular else (32,),
        torso="table" if tabular else "mlp",
    )
    usual = (40.0, 4.0) if tabular else (1e-3, 1e-3)
    rates = [own if given is None else given for given, own in zip((actor_lr, predictor_lr), usual, strict=True)]
    hypers = lpg.Hypers(
        learning_rate=rates[0], predictor_lr=rates[1], alpha_y=alpha_y, max_grad_norm=0.5 if tabular else np.inf
    )
    rule = init_rule(spec, jax.random.key(0))
    algorithm = lpg.make(env, setup, hypers, rule=Learned("lpg", rule, convention_of(spec), {}))
    return Inner(algorithm, lpg.make_network(env.observation_space, 1, setup), window, outcome)


def new_agent(inner: Inner, key: jax.Array, level: PyTree, lifetime: jax.Array) -> Agent:
    """A newborn agent on ``level``; consumes ``key``."""
    key_state, key_critic = jax.random.split(key)
    state = inner.algorithm.init(key_state, inner.algorithm.hypers, level)
    critic = inner.critic.init(key_critic)
    opt_state = lpg.init_opt_state(inner.setup, inner.algorithm.hypers, lpg.ActorCritic(critic, critic)).critic
    return Agent(state, critic, opt_state, jnp.asarray(lifetime, jnp.float32))


def updates_of(inner: Inner, agent: Agent) -> jax.Array:
    """n, updates that the agent has done, int32."""
    return agent.state.env_steps // inner.algorithm.env_steps_per_iteration


def fit_critic(inner: Inner, critic: PyTree, opt_state: PyTree, rollout: lpg.Rollout):
    """One step of the value function on a rollout: ``(critic, opt_state, loss)``, the loss of before the step.

    authors' code: takes the gradient of a loss that does not depend on the parameters, so nothing is learned / here: learns.
    """
    hypers, setup = inner.algorithm.hypers, inner.setup

    def loss(critic):
        value = inner.critic.apply(critic, rollout.obs)[..., 0]
        _, target = _advantages(inner, jax.lax.stop_gradient(value), rollout)
        return ((value[:-1] - target) ** 2).mean()

    loss_value, gradient = jax.value_and_grad(loss)(critic)
    params, states, slopes, rates = (lpg.ActorCritic(x, x) for x in (critic, opt_state, gradient, hypers.predictor_lr))
    params, opt_states = lpg.descend(setup, hypers, params, states, slopes, rates)
    return params.critic, opt_states.critic, loss_value


def _advantages(inner: Inner, value: jax.Array, rollout: lpg.Rollout):
    return levels_.advantages(value, rollout, inner.outcome.gamma, inner.outcome.gae_lambda)


def collect(inner: Inner, state: lpg.State, key: jax.Array) -> tuple[lpg.State, lpg.Rollout]:
    """One rollout of the agent as it is. No gradient flows through what was played."""
    env, setup, agent = inner.env, inner.setup, inner.algorithm.core.agent
    still = state.replace(learner=jax.lax.stop_gradient(state.learner))
    moved, _, rollout = lpg.collect(env, setup, agent, jax.random.split(key, 3), still, inner.algorithm.hypers)
    moved, rollout = jax.lax.stop_gradient((moved, rollout))
    return moved.replace(learner=state.learner), rollout


def live(inner: Inner, rule: PyTree, agent: Agent, key: jax.Array, collect: Callable = collect):
    """K updates of an agent by ``rule``, then how good it has become: what a meta-gradient is taken of.

    outcome: - mean log π_K(a|s) Â over one more rollout, with advantages by a value function of the agent's own. The
    regularisers are means over the K updates: entropies of policy and prediction after the update, squares of π̂ and ŷ.
    Args: collect: ``(inner, state, key) -> (state, rollout)``.
    Returns: ``(loss [], (agent, Lived))``; gradients flow through all updates, not through rollouts, advantages or critic.
    """
    core, cost = inner.algorithm.core, inner.algorithm.env_steps_per_iteration
    hypers = inner.algorithm.hypers.replace(rule=rule)
    keys = jax.random.split(key, inner.window + 1)

    # Of a window, only what starts each update is kept; the rest is computed again on the way back.
    @jax.checkpoint
    def update(state, key):
        updates, learner = state.env_steps // cost, state.learner
        state, rollout = collect(inner, state, key)
        learner, _, said = lpg.inner_update(core, learner, rollout, hypers, updates, agent.lifetime)
        obs = rollout.obs[:-1]
        regularisers = (
            core.agent.policy(learner.params, obs).entropy().mean(),
            lpg.entropy_of(core.agent.prediction(learner.params, obs)).mean(),
            said["pi_hat_square"],
            said["y_hat_square"],
        )
        return state.replace(learner=learner, env_steps=state.env_steps + cost), (rollout, regularisers)

    state, (rollouts, regularisers) = jax.lax.scan(update, agent.state, keys[: inner.window])
    state, last = collect(inner, state, keys[-1])

    def fit(carry, rollout):
        critic, opt_state, loss = fit_critic(inner, carry[0], carry[1], rollout)
        return (critic, opt_state), loss

    (critic, critic_opt), losses = jax.lax.scan(fit, (agent.critic, agent.critic_opt), rollouts)
    # The value's trailing axis is dropped. authors' code: keeps it, so that advantages [T, 1] meet log-probabilities [T] as
    # [T, T], whose mean knows no steps any more / here: each step has its own.
    value = inner.critic.apply(critic, last.obs)[..., 0]
    advantage, _ = _advantages(inner, value, last)
    critic, critic_opt, loss_value = fit_critic(inner, critic, critic_opt, last)
    log_prob = core.agent.policy(state.learner.params, last.obs[:-1]).log_prob(last.action)
    outcome = -(log_prob * jax.lax.stop_gradient(levels_.normalized(advantage))).mean()

    policy_entropy, prediction_entropy, pi_hat_square, y_hat_square = (x.sum() / max(inner.window, 1) for x in regularisers)
    b = inner.outcome
    loss = outcome - b.policy_entropy * policy_entropy - b.prediction_entropy * prediction_entropy
    loss = loss + b.pi_hat_cost * pi_hat_square + b.y_hat_cost * y_hat_square
    lived = Lived(
        *(outcome, last.reward.mean(), policy_entropy, prediction_entropy, pi_hat_square, y_hat_square),
        *(jnp.append(losses, loss_value).mean(), jnp.maximum(advantage, 0).mean(), jnp.abs(advantage).mean()),
    )
    agent = agent.replace(state=state, critic=critic, critic_opt=critic_opt)
    return loss, jax.lax.stop_gradient((agent, lived))


def meta_gradient(inner: Inner, rule: PyTree, agents: Agent, key: jax.Array, parts: int):
    """The gradient of the agents' mean loss with respect to ``rule``, ``parts`` of them one after the other.

    Returns: ``(gradient, agents, Lived [A])``.
    """
    num = len(agents.lifetime)
    cut = jax.tree.map(lambda x: x.reshape(parts, num // parts, *x.shape[1:]), (agents, jax.random.split(key, num)))

    def one(total, x):
        def mean_loss(rule):
            losses, rest = jax.vmap(lambda agent, key: live(inner, rule, agent, key))(*x)
            return losses.mean(), rest

        gradient, rest = jax.grad(mean_loss, has_aux=True)(rule)
        return jax.tree.map(lambda a, g: a + g / parts, total, gradient), rest

    gradient, rest = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, rule), cut)
    return (gradient, *jax.tree.map(lambda x: x.reshape(num, *x.shape[2:]), rest))


def raised(inner: Inner, rule: PyTree, level: PyTree, lifetime: jax.Array, key_birth, key_life, longest=None) -> lpg.State:
    """An agent at the end of its life on ``level``: the registered algorithm itself, from its start on.

    ``longest``: the loop's length where several are raised side by side; nothing changes after the end of a life.
    """
    hypers = inner.algorithm.hypers.replace(rule=rule, anneal_env_steps=lifetime * inner.algorithm.env_steps_per_iteration)
    state = inner.algorithm.init(key_birth, hypers, level).replace(key=key_life)
    longest = jnp.asarray(lifetime if longest is None else longest, jnp.int32)
    return jax.lax.fori_loop(0, longest, lambda _, state: inner.algorithm.step(state, hypers)[0], state)


def earns(inner: Inner, learner: lpg.Learner, level: PyTree, key: jax.Array) -> jax.Array:
    """J: mean undiscounted return of one fresh episode in every environment, actions sampled, []."""
    policy = inner.algorithm.core.agent.policy
    return levels_.episode_return(
        inner.env, lambda obs, key: policy(learner.params, obs).sample(key), level, key, inner.setup.num_envs
    )


# ---- Comparison on levels that were never trained on -----------------------------------------------------------------


class Comparison(NamedTuple):
    """Returns [L] on L levels: of agents at the end of their lives by the rule, of A2C after as many updates, and the best.

    best: None where it is not known.
    """

    rule: jax.Array
    a2c: jax.Array
    best: jax.Array | None


def compare(inner: Inner, rule: PyTree, levels: PyTree, lifetime: jax.Array, key: jax.Array) -> Comparison:
    """Raises an agent by the rule, and one by A2C with the same network, step sizes and budget, on each of ``levels`` [L]."""

    def on(level, lifetime, key):
        key_birth, key_life, key_play, key_a2c = jax.random.split(key, 4)
        learner = raised(inner, rule, level, lifetime, key_birth, key_life).learner
        setup, hypers = inner.setup, inner.algorithm.hypers
        other = levels_.a2c_return(inner.env, setup, hypers, _antagonist(inner), level, lifetime, key_a2c)
        return earns(inner, learner, level, key_play), other

    num = len(lifetime)
    ours, theirs = jax.vmap(on)(levels, lifetime, jax.random.split(key, num))
    family = inner.env.family  # pyright: ignore[reportAttributeAccessIssue]
    best = jax.vmap(lambda level: grid_world.optimal_return(family, level))(levels) if family.tabular else None
    return Comparison(ours, theirs, best)


def held_out(family: grid_world.Family, num: int, seed: int = 0) -> PyTree:
    """Levels [L] of a stream that meta-training does not draw from."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), _HELD_OUT), num)
    return jax.vmap(family.sample)(keys)


def normalized_score(returns: np.ndarray, best: np.ndarray) -> float:
    """Mean return over levels, over the mean best return: 1 is optimal. A ratio of means, since the best may be near zero."""
    return float(np.mean(returns) / np.mean(best))


def _antagonist(inner: Inner) -> levels_.A2C:
    return levels_.A2C(inner.outcome.gamma, inner.outcome.gae_lambda)


# ---- Meta-trainers --------------------------------------------------------------------------------------------------


class GradientState(struct.PyTreeNode):
    """rule, opt_state: parameters and Adam's state.  agents: [A].  buffer, slots [A]: of the curriculum, None without one.

    count: int32, meta-updates done.  refused: bool, whether one was ever refused because its gradient was not finite.
    """

    key: jax.Array
    rule: PyTree
    opt_state: PyTree
    agents: Agent
    buffer: Any
    slots: Any
    count: jax.Array
    refused: jax.Array


class EvolutionState(struct.PyTreeNode):
    """es: of the evolution strategy."""

    key: jax.Array
    es: PyTree


def make(
    *,
    levels: str = "all_shortlife",
    method: str = "gradient",
    agents: int = 512,
    parts: int = 16,
    num_envs: int = 64,
    num_steps: int = 20,
    window: int = 5,
    lifetime: tuple[int, int] | None = None,
    temporal: Literal["none", "relative", "raw"] = "none",
    hidden_size: int = 256,
    cell: Literal["gru", "lstm"] = "gru",
    num_predictions: int = 8,
    lr: float = 1e-4,
    max_grad_norm: float = 0.0,
    lr_decay: float = 0.999,
    sigma: float = 0.1,
    start: str = "drawn",
    actor_lr: float | None = None,
    predictor_lr: float | None = None,
    alpha_y: float = 0.5,
    policy_entropy: float = 0.05,
    prediction_entropy: float = 0.001,
    pi_hat_cost: float = 0.005,
    y_hat_cost: float = 0.001,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    score: str = "random",
    buffer_size: int = 4000,
    p_replay: float = 0.5,
    transform: str = "rank",
    temperature: float = 1.0,
    staleness: float = 0.0,
    eval_levels: int = 16,
) -> MetaTrainer:
    """The meta-trainer; arguments as of ``Args``. Raises: RequestError naming field, value and remedy."""
    short, (shortest, longest) = _levels(levels, lifetime)
    counts = {"agents": agents, "parts": parts, "window": window, "eval_levels": eval_levels}
    for name, value in counts.items():
        if value < 1:
            raise RequestError(f"{name} = {value} must be at least 1")
    if not max_grad_norm >= 0:
        raise RequestError(f"max_grad_norm = {max_grad_norm} must be at least 0; 0 is no bound")
    if agents % parts:
        raise RequestError(f"parts = {parts} must divide agents = {agents}")
    if method == "evolution" and score != "random":
        raise RequestError(f"score = {score!r} is of agents that outlive a meta-update; with method = 'evolution' use 'random'")
    levels_.check_buffer(score, transform, buffer_size, agents, p_replay, temperature, staleness)
    spec = RuleSpec(num_predictions=num_predictions, hidden_size=hidden_size, cell=cell, temporal=temporal)
    inner = make_inner(
        short,
        spec,
        num_envs=num_envs,
        num_steps=num_steps,
        window=window,
        actor_lr=actor_lr,
        predictor_lr=predictor_lr,
        alpha_y=alpha_y,
        outcome=Outcome(policy_entropy, prediction_entropy, pi_hat_cost, y_hat_cost, gamma, gae_lambda),
    )
    family = inner.env.family  # pyright: ignore[reportAttributeAccessIssue]
    if score == "optimal_regret" and not family.tabular:
        raise RequestError(f"score = 'optimal_regret' needs levels whose optimum is known, and {levels} are not tabular")

    def sample(key):
        key_level, key_life = jax.random.split(key)
        span = jax.random.uniform(key_life, minval=np.log(shortest), maxval=np.log(longest))
        return family.sample(key_level), jnp.round(jnp.exp(span))

    hypers = inner.algorithm.hypers
    convention = convention_of(
        spec,
        **{"num_envs": num_envs, "num_steps": num_steps, "levels": levels, "lifetime": [shortest, longest]},
        agent={name: float(getattr(hypers, name)) for name in ("learning_rate", "predictor_lr", "alpha_y", "max_grad_norm")}
        | {"optimizer": inner.setup.optimizer},
    )

    def report(rule):
        found = held_out(family, eval_levels)
        lives = jnp.full(eval_levels, float(longest))
        compared = jax.jit(lambda rule, levels: compare(inner, rule, levels, lives, jax.random.key(0)))(rule, found)
        values = {name: np.asarray(x, np.float64) for name, x in compared._asdict().items() if x is not None}
        told = {f"return_{name}": x.tolist() for name, x in values.items()}
        for name in ("rule", "a2c") if "best" in values else ():
            told[f"normalized_{name}"] = normalized_score(values[name], values["best"])
        return {"held_out": told}

    if method == "evolution":
        made = _evolution(inner, spec, sample, agents, parts, lr, lr_decay, sigma, start)
        mean_life = longest if shortest == longest else (longest - shortest) / np.log(longest / shortest)
        cost = round(2 * agents * mean_life * inner.algorithm.env_steps_per_iteration)
    else:
        curriculum = _Curriculum(score, buffer_size, p_replay, transform, temperature, staleness)
        made = _gradient(inner, spec, sample, agents, parts, lr, max_grad_norm, curriculum)
        cost = agents * (window + 1) * num_envs * num_steps
    init, step, learned, curve = made
    return MetaTrainer(
        init=init,
        step=step,
        learned=learned,
        kind="lpg",
        convention=convention,
        env_steps_per_step=cost,
        report=lambda state: report(learned(state)),
        curve=curve,
    )


def _levels(levels: str, lifetime: tuple[int, int] | None) -> tuple[str, tuple[int, int]]:
    known = [*LIFETIMES, *ALIASES]
    if levels not in known:
        raise RequestError(f"levels = {levels!r} are unknown; {close_names(levels, known)}")
    short, usual = ALIASES[levels] if levels in ALIASES else (levels, LIFETIMES[levels])
    shortest, longest = lifetime or usual
    if not 1 <= shortest <= longest:
        raise RequestError(f"lifetime = {(shortest, longest)} must be the shortest and the longest life, from 1 update on")
    return short, (shortest, longest)


class _Curriculum(NamedTuple):
    score: str
    buffer_size: int
    p_replay: float
    transform: str
    temperature: float
    staleness: float


def _gradient(inner: Inner, spec, sample, num: int, parts: int, lr: float, max_grad_norm: float, curriculum: _Curriculum):
    bound = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
    optimizer = optax.chain(bound, optax.adam(lr))
    keeps = curriculum.score != "random"
    scored = keeps and curriculum.score != "frozen"

    def born(key, level, lifetime):
        return jax.vmap(lambda *x: new_agent(inner, *x))(jax.random.split(key, num), level, lifetime)

    def init(key):
        key, key_rule, key_levels, key_agents, key_age = jax.random.split(key, 5)
        rule, buffer, slots = init_rule(spec, key_rule), None, None
        if keeps:
            buffer, slots = levels_.init_buffer(sample, key_levels, curriculum.buffer_size, num)
            level, lifetime = jax.tree.map(lambda x: x[slots], (buffer.level, buffer.lifetime))
        else:
            level, lifetime = jax.vmap(sample)(jax.random.split(key_levels, num))
        agents = born(key_agents, level, lifetime)
        # The first ones have part of their life behind them. authors' code: all are born at once, and with equal lives die at
        # once, so that a rule sees only young agents, then only old ones / here: all ages at all times.
        windows = jnp.floor(jax.random.uniform(key_age, (num,)) * jnp.ceil(lifetime / inner.window)).astype(jnp.int32)
        age = windows * inner.window * inner.algorithm.env_steps_per_iteration
        agents = agents.replace(state=agents.state.replace(env_steps=age))
        return GradientState(
            *(key, rule, optimizer.init(rule), agents, buffer, slots),
            count=jnp.zeros((), jnp.int32),
            refused=jnp.zeros((), bool),
        )

    def score_of(state, ended, lived: Lived, key):
        """[A], of the levels of agents that ended."""
        agents = state.agents
        level = agents.state.env_params
        keys = jax.random.split(key, (num, 2))
        if curriculum.score == "positive_value_loss":
            return lived.positive
        if curriculum.score == "l1_value_loss":
            return lived.absolute

        def regret(x):
            learner, level, lifetime, keys = x
            if curriculum.score == "optimal_regret":
                other = grid_world.optimal_return(inner.env.family, level)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                hypers = inner.algorithm.hypers
                other = levels_.a2c_return(inner.env, inner.setup, hypers, _antagonist(inner), level, lifetime, keys[0])
            return other - earns(inner, learner, level, keys[1])

        # authors' code: for all agents at every meta-update / here: for those whose life has ended.
        chunk = min(num // parts, 8)
        return levels_.for_those(ended, regret, (agents.state.learner, level, agents.lifetime, keys), chunk)

    def succeed(state, ended, lived, key):
        """Agents that ended give way to newborn ones on other levels. Returns the state and how many levels were replayed."""
        key_fresh, key_score, key_choice, key_agents = jax.random.split(key, 4)
        agents, buffer, slots, replayed = state.agents, state.buffer, state.slots, jnp.zeros(num, bool)
        if keeps:
            if scored:
                buffer = levels_.renew_lowest(buffer, sample, key_fresh, num)
                buffer = levels_.record(buffer, slots, ended, score_of(state, ended, lived, key_score))
                c = curriculum
                buffer, choice = levels_.choose(
                    *(buffer, key_choice, slots, ended, state.count),
                    p_replay=c.p_replay,
                    transform=c.transform,
                    temperature=c.temperature,
                    staleness=c.staleness,
                )
            else:
                buffer, choice = levels_.choose_any(buffer, key_choice, slots, ended)
            slots, replayed = choice
            level, lifetime = jax.tree.map(lambda x: x[slots], (buffer.level, buffer.lifetime))
        else:
            level, lifetime = jax.vmap(sample)(jax.random.split(key_fresh, num))
        fresh = born(key_agents, level, lifetime)
        agents = jax.tree.map(lambda new, old: _where(ended, new, old), fresh, agents)
        return state.replace(agents=agents, buffer=buffer, slots=slots), replayed.sum(dtype=jnp.float32)

    def step(state):
        key, key_live, key_succeed = jax.random.split(state.key, 3)
        late = updates_of(inner, state.agents) >= 0.5 * state.agents.lifetime
        gradient, agents, lived = meta_gradient(inner, state.rule, state.agents, key_live, parts)
        direction, opt_state = optimizer.update(gradient, state.opt_state)
        moved = (optax.apply_updates(state.rule, direction), opt_state)
        # Refused once, not for ever: an agent that broke is replaced below, and took the gradient with it this time only.
        sound = on_policy.all_finite((moved, gradient))
        rule, opt_state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), moved, (state.rule, state.opt_state))
        broken = ~jax.vmap(on_policy.all_finite)((agents.state.learner, agents.critic))
        ended = (updates_of(inner, agents) >= agents.lifetime) | broken
        old = state.replace(key=key, rule=rule, opt_state=opt_state, agents=agents)
        new, replayed = jax.lax.cond(
            ended.any(), lambda s: succeed(s, ended, lived, key_succeed), lambda s: (s, jnp.zeros(())), old
        )
        weight = late / jnp.maximum(late.sum(), 1)
        metrics = {name: getattr(lived, name).mean() for name in Lived._fields if name not in ("positive", "absolute")}
        metrics |= {
            # Reward a step of agents in the second half of their lives: what the rule is for.
            "reward_late": (lived.reward * weight).sum(),
            "grad_norm": optax.tree.norm(gradient),
            "ended": ended.sum(dtype=jnp.float32),
            "broken": broken.sum(dtype=jnp.float32),
            "refused": 1.0 - sound,
            "level_size": agents.state.env_params.size.mean(dtype=jnp.float32),
            "level_limit": agents.state.env_params.max_steps_in_episode.mean(dtype=jnp.float32),
        }
        if scored:
            known = ~new.buffer.new
            metrics |= {
                "replayed": replayed,
                "scored": known.sum(dtype=jnp.float32),
                "score": jnp.where(known, new.buffer.score, 0).sum() / jnp.maximum(known.sum(), 1),
            }
        metrics = {name: jnp.nan_to_num(value).astype(jnp.float32) for name, value in metrics.items()}
        return new.replace(count=state.count + 1, refused=state.refused | ~sound), metrics

    return init, step, lambda state: state.rule, "reward_late"


def _evolution(inner: Inner, spec, sample, num: int, parts: int, lr, lr_decay, sigma, start: str):
    template = init_rule(spec, jax.random.key(0))
    schedule = dict(sigma_decay=1.0, sigma_min=sigma, learning_rate_decay=lr_decay, learning_rate_min=min(lr, 1e-5))
    es = evolution.open_es(template, 2 * num, sigma, lr, shaping="pair_ranks", **schedule)

    def init(key):
        key, key_rule, key_es = jax.random.split(key, 3)
        rule = init_rule(spec, key_rule)
        # authors' code: at zero, where the rule says nothing / here: where gradients start too, or at zero.
        return EvolutionState(key, es.init(key_es, jax.tree.map(jnp.zeros_like, rule) if start == "zero" else rule))

    def step(state):
        key, key_ask, key_tasks, key_runs, key_tell = jax.random.split(state.key, 5)
        population, asked = es.ask(state.es, key_ask)
        level, lifetime = tasks(key_tasks)
        fitness = fitness_of(population, level, lifetime, key_runs)
        told = es.tell(asked, population, fitness, key_tell)
        pairs = fitness.reshape(num, 2)
        metrics = {
            "fitness_mean": jnp.nan_to_num(fitness).mean(),
            "fitness_best": jnp.nan_to_num(pairs.max(1)).mean(),
            # Where neither won, nothing is learned.
            "ties": (pairs[:, 0] == pairs[:, 1]).mean(),
            "failed": (~jnp.isfinite(fitness)).mean(),
            "sigma": es.sigma(told),
            "rule_norm": optax.tree.norm(es.mean(told)),
        }
        return EvolutionState(key, told), {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    def tasks(key):
        """Levels [A] and lives, the short ones first, so that those of a part end together."""
        level, lifetime = jax.vmap(sample)(jax.random.split(key, num))
        order = jnp.argsort(lifetime)
        return jax.tree.map(lambda x: x[order], (level, lifetime))

    def fitness_of(population, level, lifetime, key):
        """[P]: what agents earn at the end of their lives; both of a pair are born alike, on the same level."""

        def member(rule, level, lifetime, key, number, longest):
            # Partners begin as the same agent in the same place, and meet their own luck from then on.
            key_birth, key_own = jax.random.split(key)
            key_life, key_play = jax.random.split(jax.random.fold_in(key_own, number))
            state = raised(inner, rule, level, lifetime, key_birth, key_life, longest)
            return jnp.where(state.nonfinite, jnp.nan, earns(inner, state.learner, level, key_play))

        keys = jax.random.split(key, num)
        xs = (jax.tree.map(lambda x: x.reshape(num, 2, *x.shape[1:]), population), level, lifetime, keys)
        xs = jax.tree.map(lambda x: x.reshape(parts, num // parts, *x.shape[1:]), xs)

        def part(x):
            rules, level, lifetime, keys = x
            longest = lifetime.max()
            both = jax.vmap(member, (0, None, None, None, 0, None))
            return jax.vmap(lambda a, b, c, d: both(a, b, c, d, jnp.arange(2), longest))(rules, level, lifetime, keys)

        return jax.lax.map(part, xs).reshape(2 * num)

    return init, step, lambda state: es.mean(state.es), "fitness_mean"


def _where(flag: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Rows of ``new`` where ``flag`` [A], of keys too."""
    return jnp.where(flag.reshape(flag.shape + (1,) * (new.ndim - 1)), new, old)
