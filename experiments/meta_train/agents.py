"""The inner problem of LPG's meta-training: agents that live by a rule on levels, and how good a rule has made them.

``live`` is K updates and the outcome, which a meta-gradient is taken of; ``raised`` and ``earns`` are a whole life and its end.

Source: Oh et al. 2020, arXiv 2007.08794, in the form of Jackson et al. 2023, arXiv 2310.02782, and its authors' code.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

import pgjax
from pgjax.algorithms import lpg
from pgjax.envs import grid_world
from pgjax.experiments.meta_train import levels as levels_
from pgjax.learned.files import Learned
from pgjax.learned.rule import RuleSpec, convention_of, init_rule
from pgjax.types import Environment, PyTree


class Outcome(NamedTuple):
    """Numbers of the meta-objective; see ``Args`` in ``lpg.py``."""

    policy_entropy: float
    prediction_entropy: float
    pi_hat_cost: float
    y_hat_cost: float
    gamma: float
    gae_lambda: float


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
    def family(self) -> grid_world.Family:
        return self.env.family  # pyright: ignore[reportAttributeAccessIssue]

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
    levels: str, spec: RuleSpec, *, num_envs, num_steps, window, actor_lr, predictor_lr, alpha_y, outcome: Outcome
) -> Inner:
    """An ``Inner`` on the levels of that name: linear agents with SGD where states can be numbered, else a small network.

    Learning rates that are None are the usual ones of such agents.
    """
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
        learning_rate=rates[0],
        predictor_lr=rates[1],
        alpha_y=alpha_y,
        max_grad_norm=0.5 if tabular else np.inf,
        gamma=outcome.gamma,
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


# ---- Whole lives ----------------------------------------------------------------------------------------------------


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


def a2c_earns(inner: Inner, level: PyTree, lifetime: jax.Array, key: jax.Array) -> jax.Array:
    """What A2C earns, with the agents' kind of network, step sizes and budget, after ``lifetime`` updates on ``level``, []."""
    numbers = levels_.A2C(inner.outcome.gamma, inner.outcome.gae_lambda)
    return levels_.a2c_return(inner.env, inner.setup, inner.algorithm.hypers, numbers, level, lifetime, key)
