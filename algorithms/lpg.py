"""LPG, Learned Policy Gradient (Oh et al. 2020, arXiv 2007.08794), also TA-LPG and the rules that GROOVE meta-trains.

The agent has a policy π and a vector y of m probabilities that nobody gave a meaning. A learned rule, a recurrent network that
reads the rollout backwards, says for every step how hard to push the action that was taken, π̂, and what y should have been, ŷ:

    loss = - mean π̂ log π(a|s) + α_y mean KL(y(s) ‖ ŷ)

One gradient step per rollout; no value function, no advantages, no discount, no entropy bonus. ``inner_update`` is the whole of
it, and can be differentiated through, which is how ``pgjax.experiments.meta_train`` makes rules.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from pgjax import metrics, on_policy
from pgjax.distributions import Categorical
from pgjax.errors import RequestError
from pgjax.learned import files as learned_files
from pgjax.learned.rule import RuleInputs, RuleSpec, apply_rule, read_convention
from pgjax.networks import ACTIVATIONS, ActorCritic, Torso, choose, draw_kernels, layer_sizes, resolve_torso
from pgjax.spaces import Discrete
from pgjax.types import Algorithm, PyTree

# A rule is made for short rollouts of many environments, one step each, and for the step sizes of its agents.
DEFINING = ("num_envs", "num_steps", "optimizer", "hidden_sizes", "activation", "torso", "learning_rate", "max_grad_norm")
DEFAULT_RULE = "lpg:default"
_HASH_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class Setup:
    """What fixes a shape, a loop length or a branch; each new value compiles again.

    num_envs, num_steps: the rollout of one update. Rules are meta-trained at 20 steps, and know no other length.
    optimizer: of the agent, ``sgd`` or ``adam``; policy and prediction have a state each.
    hidden_sizes: of the agent's networks; () makes it tabular: linear in the observation, without biases.
    activation, torso: see ``pgjax.networks``; ``table`` looks up the row that the first number of an observation names, as
        environments with ``observation=index`` give it. It is the tabular agent, without multiplying by zeros.
    """

    num_envs: int = 64
    num_steps: int = 20
    optimizer: Literal["sgd", "adam"] = "adam"
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: str = "relu"
    torso: str = "auto"


class Hypers(struct.PyTreeNode):
    """Numbers that only enter arithmetic; every leaf float32, so new values never compile again.

    learning_rate: of the policy.  predictor_lr: of the prediction y.  alpha_y: weight of its divergence from ŷ.
    max_grad_norm: bound on the gradient's norm, of either network by itself.
    reward_scale: factor on every reward that the rule sees; rules are meta-trained on rewards between -1 and 1.
    gamma: told to rules that ask for it.
    anneal_env_steps: the agent's lifetime in environment steps, after which it learns no more; the runner fills it in.
      A temporal rule is told it, so whoever steps by hand sets it: without an end log N is infinite and the lane non-finite.
    rule: parameters of the learned rule.
    """

    learning_rate: jax.Array | float = 5e-4
    predictor_lr: jax.Array | float = 5e-4
    alpha_y: jax.Array | float = 0.5
    max_grad_norm: jax.Array | float = np.inf
    adam_eps: jax.Array | float = 1e-8
    adam_b1: jax.Array | float = 0.9
    adam_b2: jax.Array | float = 0.999
    reward_scale: jax.Array | float = 1.0
    gamma: jax.Array | float = 0.99
    anneal_env_steps: jax.Array | float = np.inf
    rule: PyTree = None


class Network(NamedTuple):
    """init: ``key -> params``; consumes the key.  apply: ``(params, obs [..., *O]) -> [..., size]``."""

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]


class Agent(NamedTuple):
    """The agent as pure functions of ``ActorCritic(actor, critic)``; the prediction's parameters stand where a critic's do.

    init: ``key -> params``.  policy: ``(params, obs [..., *O]) -> Categorical``; reads the actor only.
    prediction: ``(params, obs [..., *O]) -> [..., m]``, log y.
    """

    init: Callable[[jax.Array], ActorCritic]
    policy: Callable[[ActorCritic, jax.Array], Categorical]
    prediction: Callable[[ActorCritic, jax.Array], jax.Array]


class Learner(struct.PyTreeNode):
    """The learned part: what is held at its last finite value when an update goes non-finite.

    params: trees of policy and prediction.  opt_state: one optimiser state for each.
    obs_moments: None, for observations are not normalised here; ``on_policy.play`` asks.
    """

    params: ActorCritic
    opt_state: ActorCritic
    obs_moments: Any = None


class State(struct.PyTreeNode):
    """All that is carried from one iteration to the next, for one lane; fields as in ``on_policy.State``."""

    key: jax.Array
    env_steps: jax.Array
    learner: Learner
    env_state: PyTree
    obs: jax.Array
    episode_return: jax.Array
    episode_length: jax.Array
    nonfinite: jax.Array
    env_params: PyTree


class Policy(NamedTuple):
    """The part that acts: the policy's parameters."""

    actor: PyTree


class Rollout(NamedTuple):
    """T steps of B environments: obs [T + 1, B, *O], the last one not acted on yet; action, reward and end [T, B]."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    end: jax.Array


class Said(NamedTuple):
    """What a rule said of a rollout: pi_hat [T, B]; log_y_hat [T, B, m]."""

    pi_hat: jax.Array
    log_y_hat: jax.Array


class Core(NamedTuple):
    """The static things that an update needs. setup: its ``optimizer`` is read."""

    agent: Agent
    spec: RuleSpec
    setup: Any


# ---- The agent ------------------------------------------------------------------------------------------------------


class _Net(nn.Module):
    obs_rank: int
    hidden_sizes: tuple[int, ...]
    activation: Callable
    convolution: bool
    size: int

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        features = Torso(self.obs_rank, self.hidden_sizes, self.activation, self.convolution)(obs)
        return nn.Dense(self.size, use_bias=bool(self.hidden_sizes) or self.convolution)(features)


def make_network(observation_space, size: int, setup) -> Network:
    """A network of the agent's kind with ``size`` outputs: ``hidden_sizes``, ``activation`` and ``torso`` of ``setup``."""
    choose("setup.activation", setup.activation, ACTIVATIONS)
    hidden_sizes = layer_sizes("setup.hidden_sizes", setup.hidden_sizes)
    if setup.torso == "table":
        return _table(observation_space, size, hidden_sizes)
    shape = observation_space.shape
    net = _Net(len(shape), hidden_sizes, ACTIVATIONS[setup.activation], resolve_torso(setup.torso, shape) == "cnn", size)
    return Network(lambda key: net.init(key, jnp.zeros(shape)), lambda params, obs: jnp.asarray(net.apply(params, obs)))


def _table(observation_space, size: int, hidden_sizes) -> Network:
    """Rows of parameters, as a linear layer on one-hot observations has them, the last one for the clock."""
    if observation_space.shape != (2,) or hidden_sizes:
        raise RequestError(
            f"setup.torso = 'table' needs observations (number, clock) and hidden_sizes = (), not {observation_space.shape} "
            f"and {hidden_sizes}; make the environment with observation = 'index'"
        )
    num_rows = int(observation_space.bounds[1][0]) + 2

    def apply(table, obs):
        return table[obs[..., 0].astype(jnp.int32)] + obs[..., 1:] * table[-1]

    return Network(lambda key: draw_kernels(key, [(num_rows, size)], "lecun_normal")[0], apply)


def make_agent(observation_space, num_actions: int, num_predictions: int, setup) -> Agent:
    """Policy and prediction, two separate networks of ``make_network``."""
    actor = make_network(observation_space, num_actions, setup)
    predictor = make_network(observation_space, num_predictions, setup)

    def init(key):
        key_actor, key_predictor = jax.random.split(key)
        return ActorCritic(actor.init(key_actor), predictor.init(key_predictor))

    return Agent(
        init=init,
        policy=lambda params, obs: Categorical(actor.apply(params.actor, obs)),
        prediction=lambda params, obs: jax.nn.log_softmax(predictor.apply(params.critic, obs)),
    )


# ---- The update -----------------------------------------------------------------------------------------------------


def ask_rule(core: Core, rule: PyTree, params: ActorCritic, rollout: Rollout, updates, lifetime, gamma=1.0) -> Said:
    """What the rule says of a rollout of the agent that ``params`` are of.

    The agent's outputs are constants here, for the agent's gradient as for that of the rule.
    """
    params = jax.lax.stop_gradient(params)
    prob = jnp.exp(core.agent.policy(params, rollout.obs[:-1]).log_prob(rollout.action))
    prediction = jnp.exp(core.agent.prediction(params, rollout.obs))
    inputs = RuleInputs(
        *(rollout.reward, rollout.end, prob, prediction[:-1], prediction[1:]),
        *(jnp.asarray(x, prob.dtype) for x in (updates, lifetime, gamma)),
    )
    return Said(*apply_rule(core.spec, rule, inputs))


def agent_loss(agent: Agent, params: ActorCritic, rollout: Rollout, said: Said, alpha_y):
    """The agent's loss, to be minimised, and its parts: ``(loss, (loss_policy, loss_prediction))``.

    paper: ascends π̂ log π (second-hand) / authors' code: descends it / here: as in the paper.
    authors' code: log(p + 1e-8) / here: log p.
    """
    obs = rollout.obs[:-1]
    loss_policy = -(said.pi_hat * agent.policy(params, obs).log_prob(rollout.action)).mean()
    log_y = agent.prediction(params, obs)
    loss_prediction = (jnp.exp(log_y) * (log_y - said.log_y_hat)).sum(-1).mean()
    return loss_policy + alpha_y * loss_prediction, (loss_policy, loss_prediction)


def init_opt_state(setup, hypers, params: ActorCritic) -> ActorCritic:
    """One optimiser state for each network."""
    return ActorCritic(*(_optimizer(setup, hypers).init(tree) for tree in params))


def descend(setup, hypers, params: ActorCritic, opt_state: ActorCritic, gradient: ActorCritic, rates: ActorCritic):
    """One step of each network, its gradient bounded in norm by itself. Differentiable, at gradients of zero too.

    authors' code: the bound is for SGD alone / here: ``max_grad_norm`` is infinite where there is none.
    """
    optimizer = _optimizer(setup, hypers)
    steps = [optimizer.update(_bounded(g, hypers.max_grad_norm), s) for g, s in zip(gradient, opt_state, strict=True)]
    params = ActorCritic(
        *(
            jax.tree.map(lambda p, u, rate=rate: p - rate * u, p, u)
            for p, (u, _), rate in zip(params, steps, rates, strict=True)
        )
    )
    return params, ActorCritic(*(state for _, state in steps))


def _optimizer(setup, hypers) -> optax.GradientTransformation:
    if setup.optimizer == "sgd":
        return optax.identity()
    # Under the root, so that its slope at zero is finite; as small as what is added outside of it.
    return optax.scale_by_adam(b1=hypers.adam_b1, b2=hypers.adam_b2, eps=hypers.adam_eps, eps_root=1e-16)


def _square(tree: PyTree) -> jax.Array:
    return jnp.stack([(leaf**2).sum() for leaf in jax.tree.leaves(tree)]).sum()


def _bounded(gradient: PyTree, limit) -> PyTree:
    """The gradient with a norm of at most ``limit``; selections keep the slope of the norm, infinite at zero, out."""
    square = _square(gradient)
    too_long = square > limit**2
    scale = jnp.where(too_long, limit / jnp.sqrt(jnp.where(too_long, square, 1.0)), 1.0)
    return jax.tree.map(lambda g: g * scale, gradient)


def inner_update(core: Core, learner: Learner, rollout: Rollout, hypers, updates, lifetime):
    """One update of an agent by a rule; nothing changes once it has done all updates of its life.

    Args: hypers: ``Hypers`` with the rule.  updates: n, done before this one.  lifetime: N, of all of its life.
    Returns: ``(learner, said, metrics)``. Gradients flow from the new parameters to ``hypers.rule`` and to the old ones.
    """
    params = learner.params
    said = ask_rule(core, hypers.rule, params, rollout, updates, lifetime, hypers.gamma)
    loss = jax.value_and_grad(lambda params: agent_loss(core.agent, params, rollout, said, hypers.alpha_y), has_aux=True)
    (_, (loss_policy, loss_prediction)), gradient = loss(params)
    rates = ActorCritic(hypers.learning_rate, hypers.predictor_lr)
    stepped = descend(core.setup, hypers, params, learner.opt_state, gradient, rates)
    lives = updates + 1 <= lifetime
    stepped = jax.tree.map(lambda new, old: jnp.where(lives, new, old), stepped, (params, learner.opt_state))
    said_metrics = {
        "loss_policy": loss_policy,
        "loss_prediction": loss_prediction,
        "grad_norm": jnp.sqrt(_square(jax.lax.stop_gradient(gradient))),
        "pi_hat": said.pi_hat.mean(),
        "pi_hat_square": (said.pi_hat**2).mean(),
        "y_hat_square": jnp.exp(2 * said.log_y_hat).sum(-1).mean(),
    }
    return learner.replace(params=stepped[0], opt_state=stepped[1]), said, said_metrics


def entropy_of(log_prob: jax.Array) -> jax.Array:
    """-Σ p log p over the last axis, in nats."""
    return -(jnp.exp(log_prob) * log_prob).sum(-1)


# ---- The algorithm --------------------------------------------------------------------------------------------------


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, rule=None):  # noqa: B008
    """An agent on ``env`` that learns by a rule; discrete actions only.

    Args: rule: a name such as ``lpg:default``, a file, or a ``pgjax.learned.files.Learned`` of kind ``lpg``. Its parameters
      become ``hypers.rule`` unless there are some already; its convention fixes the rest.
    Raises: RequestError naming the field, the value and the remedy.
    """
    on_policy.check_counts(setup, ("num_envs", "num_steps"))
    on_policy.check_choices(setup)
    choose("setup.activation", setup.activation, ACTIVATIONS)
    layer_sizes("setup.hidden_sizes", setup.hidden_sizes)
    on_policy.as_hypers(hypers)
    if not isinstance(env.action_space, Discrete):
        raise RequestError(
            f"lpg is for discrete actions, and {env.name} has continuous actions; its rule is told probabilities"
        )
    spec, rule_params = load_rule(DEFAULT_RULE if rule is None else rule)
    hypers = on_policy.as_hypers(hypers if hypers.rule is not None else hypers.replace(rule=rule_params))
    agent = make_agent(env.observation_space, env.action_space.num, spec.num_predictions, setup)
    core = Core(agent, spec, setup)
    cost = setup.num_envs * setup.num_steps

    def init(key, hypers, env_params=None):
        key, key_agent, key_reset, key_state = jax.random.split(key, 4)
        params = agent.init(key_agent)
        params_of_env = env.default_params if env_params is None else env_params
        env_state, obs = env.reset(jax.random.split(key_reset, setup.num_envs), params_of_env)
        return State(
            key=key_state,
            env_steps=jnp.zeros((), jnp.int32),
            learner=Learner(params, init_opt_state(setup, hypers, params)),
            env_state=env_state,
            obs=obs,
            episode_return=jnp.zeros(setup.num_envs),
            episode_length=jnp.zeros(setup.num_envs, jnp.int32),
            nonfinite=jnp.zeros((), bool),
            env_params=env_params,
        )

    def step(state, hypers):
        key, *keys = jax.random.split(state.key, 4)
        updates, old = state.env_steps // cost, state.learner
        state, played, rollout = collect(env, setup, agent, keys, state, hypers)
        state, collected = on_policy.count_steps(setup, state, played)  # pyright: ignore[reportArgumentType]
        new, _, said = inner_update(core, old, rollout, hypers, updates, lifetime_of(hypers.anneal_env_steps, cost))
        nonfinite, learner = on_policy.gate(state.nonfinite, new, old)
        dist = agent.policy(learner.params, rollout.obs[:-1])
        log_ratio = dist.log_prob(rollout.action) - played.dist.log_prob(rollout.action)
        step_metrics = {
            **collected,
            **said,
            **metrics.policy_change(log_ratio, played.dist, dist),
            "entropy": dist.entropy().mean(),
            "entropy_prediction": entropy_of(agent.prediction(learner.params, rollout.obs[:-1])).mean(),
        }
        step_metrics = {
            name: value if name.startswith("episode_") else jnp.where(nonfinite & jnp.isnan(value), 0, value)
            for name, value in step_metrics.items()
        }
        step_metrics["nonfinite"] = nonfinite.astype(jnp.float32)
        return state.replace(key=key, learner=learner, nonfinite=nonfinite), step_metrics

    def act(policy, obs, key=None):
        dist = agent.policy(ActorCritic(policy.actor, None), obs)
        return dist.mode() if key is None else dist.sample(key)

    def warm_start(state, policy):
        learner = state.learner
        return state.replace(learner=learner.replace(params=learner.params._replace(actor=policy.actor)))

    return Algorithm(
        init=init,
        step=step,
        policy=lambda state: Policy(state.learner.params.actor),
        act=act,
        warm_start=warm_start,
        setup=setup,
        hypers=hypers,
        name="lpg",
        env=env,
        env_steps_per_iteration=cost,
        core=core,
    )


def collect(env, setup, agent: Agent, keys, state: State, hypers) -> tuple[State, on_policy.Played, Rollout]:
    """Plays T steps in B environments, whose counter is left as it is; ``keys`` are three.

    An end is an end: a rule is not told of time limits. The successor of an observation is the next one in time, which is
    another episode's where one ended; there nobody reads it.
    """
    # Collecting reads and renews only what this state has in common with that of the on-policy methods.
    loop: Any = on_policy.Core(env, setup, agent, lambda params: params, agent.policy, lambda action: action)  # pyright: ignore
    shared: Any = state
    shared, draws = on_policy.draw_rollout(loop, keys, shared, hypers)
    state, played = on_policy.play(loop, shared.learner.params, shared, draws, hypers)  # pyright: ignore[reportAssignmentType]
    steps = played.transitions
    obs = jnp.concatenate([steps.obs, state.obs[None]])
    return state, played, Rollout(obs, steps.action, steps.reward * hypers.reward_scale, steps.terminated | steps.truncated)


def lifetime_of(env_steps, cost: int) -> jax.Array:
    """N, the updates of a life of ``env_steps``, at least one; infinite if that is."""
    return jnp.maximum(jnp.round(env_steps / cost), 1)


def pinned(rule: str | None) -> str:
    """The rule, or the default one, as a run records it: with the hash of its file. Raises: RequestError if there is none."""
    rule = DEFAULT_RULE if rule is None else rule
    return rule if "@" in rule else f"{rule}@{learned_files.digest(learned_files.find(rule, 'lpg'))[:_HASH_DIGITS]}"


def load_rule(rule) -> tuple[RuleSpec, PyTree]:
    """``(spec, params)`` of a rule by name, from a file, or as ``Learned``."""
    if isinstance(rule, str) or hasattr(rule, "__fspath__"):
        name, _, expected = str(rule).partition("@")
        found = learned_files.digest(learned_files.find(name, "lpg"))
        if not found.startswith(expected):
            raise RequestError(
                f"rule = {rule!r}: the weights of {name} are now @{found[:_HASH_DIGITS]}; start anew with another --out"
            )
        rule = learned_files.load(name, "lpg")
    if getattr(rule, "kind", None) != "lpg":
        raise RequestError(f"rule = {rule!r} is no learned rule of kind 'lpg'; give a name, a file or a Learned")
    return read_convention(rule.params, rule.convention)
