"""Updates as algorithms ship them, on random batches of a linear Gaussian policy, and that policy once more in NumPy.

A policy here is ``{"W": [O, A], "b": [A], "s": [A]}``: mean = obs W + b, log standard deviation = s in every state.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from pgjax import on_policy
from pgjax.distributions import DiagGaussian
from pgjax.networks import ActorCritic
from pgjax.optimizers import init_opt_state
from pgjax.spaces import Box

T, B, O, A = 6, 4, 3, 2
N = T * B
SPACES = SimpleNamespace(observation_space=Box((O,)), action_space=Box((A,)))


@dataclasses.dataclass
class Shipped:
    """core, update: of an algorithm.  hypers: its own, in float64.  run: ``(learner, batch, hypers) -> (learner, metrics)``."""

    core: Any
    update: Any
    hypers: Any
    run: Any

    def with_(self, **changes):
        return self.hypers.replace(**{name: np.float64(value) for name, value in changes.items()})


def shipped(module, hypers=(), spaces=SPACES, plugs=(), **setup) -> Shipped:
    """What the algorithm of ``module`` hands to the loop, compiled for float64 numbers."""
    taken, make = {}, on_policy.make

    def take(*args, update, **kwargs):
        taken.update(update=update)
        return make(*args, update=update, **kwargs)

    setup = module.Setup(**{**dict(num_envs=B, num_steps=T, hidden_sizes=()), **setup})
    hypers = module.Hypers(**dict(hypers))
    with mock.patch.object(on_policy, "make", take):
        algorithm = module.make(spaces, setup, hypers, **dict(plugs))
    # Not the algorithm's own, which were rounded to float32.
    hypers = jax.tree.map(np.float64, hypers.replace(objective=algorithm.hypers.objective))
    core, update = algorithm.core, taken["update"]
    run = jax.jit(lambda learner, batch, hypers: update(core, jax.random.key(7), learner, batch, hypers, 0.0))
    return Shipped(core, update, hypers, run)


def random_policy(seed=0):
    rng = np.random.default_rng(seed)
    return {"W": rng.normal(size=(O, A)), "b": rng.normal(size=A), "s": rng.normal(size=A) / 4}


def vector(policy) -> np.ndarray:
    """The numbers of a policy, or of a gradient, one after the other."""
    return np.concatenate([np.ravel(policy[name]) for name in ("W", "b", "s")])


def moved(policy, step) -> dict:
    """The policy after a step [P] in the order of ``vector``."""
    w, b, s = np.split(np.asarray(step), [O * A, O * A + A])
    return {"W": policy["W"] + w.reshape(O, A), "b": policy["b"] + b, "s": policy["s"] + s}


def make_learner(case: Shipped, policy, extra=None, seed=1) -> on_policy.Learner:
    rng = np.random.default_rng(seed)
    actor = {"Dense_0": {"kernel": policy["W"], "bias": policy["b"]}, "log_std": policy["s"]}
    critic = {"kernel": rng.normal(size=(O, 1)), "bias": rng.normal(size=1)}
    trees = ActorCritic(*({"torso": {}, "head": {"params": part}} for part in (actor, critic)))
    params = ActorCritic(*(ravel_pytree(part)[0] for part in trees))
    opt_state = init_opt_state(case.core.setup, case.hypers, params)
    return on_policy.Learner(params, opt_state, jnp.ones(()), None, None, None, extra)


def policy_of(case: Shipped, learner) -> dict:
    head = case.core.unravel(learner.params).actor["head"]["params"]
    arrays = dict(W=head["Dense_0"]["kernel"], b=head["Dense_0"]["bias"], s=head["log_std"])
    return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


def distribution(policy, obs):
    """``(mean, log_std)``, both [..., A]."""
    mean = obs @ policy["W"] + policy["b"]
    return mean, np.broadcast_to(policy["s"], mean.shape)


def log_prob(policy, obs, action):
    mean, log_std = distribution(policy, obs)
    return (-0.5 * ((action - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)


def kl(one, other, obs):
    """KL(one || other) of the distributions ``(mean, log_std)`` or policies, [...], in nats."""
    mean, log_std = distribution(one, obs) if isinstance(one, dict) else one
    mean_other, log_std_other = distribution(other, obs) if isinstance(other, dict) else other
    spread = (np.exp(2 * log_std) + (mean - mean_other) ** 2) / (2 * np.exp(2 * log_std_other))
    return (log_std_other - log_std + spread - 0.5).sum(-1)


def pull_back(obs, to_mean, to_log_std) -> np.ndarray:
    """Gradient [P] in the policy from slopes [N, A] in the mean and in the log standard deviation of each sample."""
    return vector({"W": obs.T @ to_mean, "b": to_mean.sum(0), "s": to_log_std.sum(0)})


def score(policy, obs, action):
    """Slopes of the log probability in mean and log standard deviation, both [N, A]."""
    mean, log_std = distribution(policy, obs)
    z = (action - mean) / np.exp(log_std)
    return z / np.exp(log_std), z**2 - 1


def surrogate_gradient(policy, obs, action, advantage, log_prob_old) -> np.ndarray:
    """Gradient [P] of the mean over samples [N] of ratio times advantage."""
    weight = (np.exp(log_prob(policy, obs, action) - log_prob_old) * advantage / len(obs))[:, None]
    return pull_back(obs, *(weight * slope for slope in score(policy, obs, action)))


def kl_gradient(policy, dist_old, obs, reverse=False) -> np.ndarray:
    """Gradient [P] in ``policy`` of the mean over samples [N] of KL(old || policy), or of KL(policy || old)."""
    mean, log_std = distribution(policy, obs)
    mean_old, log_std_old = dist_old
    if reverse:
        to_mean = (mean - mean_old) / np.exp(2 * log_std_old)
        to_log_std = np.exp(2 * (log_std - log_std_old)) - 1
    else:
        to_mean = (mean - mean_old) / np.exp(2 * log_std)
        to_log_std = 1 - (np.exp(2 * log_std_old) + (mean - mean_old) ** 2) / np.exp(2 * log_std)
    return pull_back(obs, to_mean / len(obs), to_log_std / len(obs))


def samples(batch):
    """``(obs, action, advantage, log_prob_old, (mean_old, log_std_old))`` with one axis [N]."""
    arrays = batch.obs.reshape(N, O), batch.action.reshape(N, A), batch.advantage.ravel(), batch.log_prob_old.ravel()
    return *arrays, (batch.dist_old.mean.reshape(N, A), batch.dist_old.log_std.reshape(N, A))


def part(arrays, index):
    """The same of some of the samples."""
    *plain, dist_old = arrays
    return *(x[index] for x in plain), tuple(x[index] for x in dist_old)


def fisher(policy, obs) -> np.ndarray:
    """The mean Fisher information [P, P]: for each action, features times features over the variance; 2 for a log std."""
    features = np.concatenate([obs.reshape(-1, O), np.ones((obs.size // O, 1))], 1)
    second = features.T @ features / len(features)
    dense = np.zeros((O + 1, A, O + 1, A))
    for a in range(A):
        dense[:, a, :, a] = second / np.exp(2 * policy["s"][a])
    size = (O + 1) * A
    # W row by row, then b: the order of ``vector``.
    return np.block([[dense.reshape(size, size), np.zeros((size, A))], [np.zeros((A, size)), 2 * np.eye(A)]])


def random_batch(policy, seed=9) -> on_policy.Batch:
    """Samples [T, B] that ``policy`` has drawn, with advantages and value targets at random."""
    rng = np.random.default_rng(seed)
    obs, final_obs = rng.normal(size=(2, T, B, O))
    mean, log_std = distribution(policy, obs)
    action = mean + np.exp(log_std) * rng.normal(size=mean.shape)
    return on_policy.Batch(
        obs=obs,
        final_obs=final_obs,
        action=action,
        reward=rng.normal(size=(T, B)),
        terminated=np.zeros((T, B), bool),
        truncated=np.zeros((T, B), bool),
        dist_old=DiagGaussian(mean, np.array(log_std)),
        log_prob_old=log_prob(policy, obs, action),
        value=rng.normal(size=(T, B)),
        next_value=rng.normal(size=(T, B)),
        advantage=rng.normal(size=(T, B)),
        value_target=rng.normal(size=(T, B)),
    )


class Adam:
    """Adam by hand, on one vector."""

    def __init__(self, size, eps=1e-8, b1=0.9, b2=0.999):
        self.mean, self.square, self.count = np.zeros(size), np.zeros(size), 0
        self.eps, self.b1, self.b2 = eps, b1, b2

    def direction(self, gradient):
        self.count += 1
        self.mean = self.b1 * self.mean + (1 - self.b1) * gradient
        self.square = self.b2 * self.square + (1 - self.b2) * gradient**2
        mean, square = self.mean / (1 - self.b1**self.count), self.square / (1 - self.b2**self.count)
        return mean / (np.sqrt(square) + self.eps)


# ---- Networks with hidden layers ------------------------------------------------------------------------------------


def network_output(core, actor, obs):
    """The policy's distribution ``logits [..., A]`` or ``(mean, log_std)`` in NumPy, by layers of tanh."""
    tree = core.unravel(ActorCritic(actor, None)).actor
    x = np.asarray(obs, np.float64)
    layers = tree["torso"].get("params", {})
    for name in sorted(layers):
        x = np.tanh(x @ np.float64(layers[name]["kernel"]) + np.float64(layers[name]["bias"]))
    head = tree["head"]["params"]
    x = x @ np.float64(head["Dense_0"]["kernel"]) + np.float64(head["Dense_0"]["bias"])
    return (x, np.broadcast_to(np.float64(head["log_std"]), x.shape)) if "log_std" in head else x


def judge(core, actor, batch):
    """``(log ratio, KL(old || new))`` of every sample of a batch, in float64, for categorical and Gaussian policies."""
    new = network_output(core, actor, batch.obs)
    action = np.asarray(batch.action)
    if isinstance(new, tuple):
        old = np.float64(batch.dist_old.mean), np.float64(batch.dist_old.log_std)
        z = (action - new[0]) / np.exp(new[1])
        log_prob_new = (-0.5 * z**2 - new[1] - 0.5 * np.log(2 * np.pi)).sum(-1)
        return log_prob_new - np.float64(batch.log_prob_old), kl(old, new, None)
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (np.float64(batch.dist_old.logits), new))
    log_ratio = np.take_along_axis(log_q, action[..., None], -1)[..., 0] - np.float64(batch.log_prob_old)
    return log_ratio, (np.exp(log_p) * (log_p - log_q)).sum(-1)


def step_and_batch(algorithm):
    """``(state, hypers) -> (state, metrics, batch)``: the algorithm's step and the batch that it is taken on."""

    @jax.jit
    def step(state, hypers):
        keys = jax.random.split(state.key, 6)[3:]
        _, batch, *_ = on_policy.collect(algorithm.core, keys, state, hypers)
        batch = on_policy.gae_estimate(algorithm.core, hypers, state.learner, batch)
        return *algorithm.step(state, hypers), batch

    return step
