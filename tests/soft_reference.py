"""One gradient step of a soft actor-critic in NumPy, with gradients by central differences, and tiny networks to try it on.

Written from the equations of the papers; it shares no line with the package but the networks' formulas, which are inputs.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.distributions import Categorical, TanhGaussian
from pgjax.networks import ActorCritic
from pgjax.optimizers import adam
from pgjax.spaces import Box, Discrete
from pgjax.stepwise import off_policy
from pgjax.stepwise.replay import Transition
from pgjax.stepwise.soft_networks import SoftNetworks, ravelled

O, A, N = 2, 2, 7
NUM_ACTIONS = 3
SIZES = {True: (NUM_ACTIONS * (O + 1), NUM_ACTIONS * (O + 1)), False: (2 * A * (O + 1), O + 2 * A + 1)}  # of actor, one Q


def with_one(obs, xp):
    return xp.concatenate([obs, xp.ones_like(obs[..., :1])], -1)


def policy_out(actor, obs, discrete, xp):
    """Logits, or mean and log σ side by side."""
    return with_one(obs, xp) @ actor.reshape(O + 1, -1)


def q_out(q, obs, action, discrete, xp):
    if discrete:
        return with_one(obs, xp) @ q.reshape(O + 1, -1)
    return xp.concatenate([with_one(obs, xp), action, action**2], -1) @ q


def v_out(v, obs, xp):
    return with_one(obs, xp) @ v


def networks(discrete, state_value, rng):
    num_actor, num_q = SIZES[discrete]
    actor, q, v = 0.4 * rng.normal(size=num_actor), [rng.normal(size=num_q) for _ in range(2)], rng.normal(size=O + 1)

    def policy(actor, obs):
        out = policy_out(actor, obs, discrete, jnp)
        return Categorical(out) if discrete else TanhGaussian(*jnp.split(out, 2, -1))

    return SoftNetworks(
        init=lambda key: jax.tree.map(jnp.asarray, ActorCritic(actor, {"q": q} | ({"v": v} if state_value else {}))),
        policy=policy,
        q=lambda q, obs, action: jnp.stack([q_out(one, obs, action, discrete, jnp) for one in q]),
        v=lambda v, obs: v_out(v, obs, jnp),
    )


def problem(discrete, module, setup, hypers, seed=0):
    """Core, learner and minibatch for ``module.update``, in 64 bits."""
    rng = np.random.default_rng(seed)
    action_space = Discrete(NUM_ACTIONS) if discrete else Box((A,), -1.0, 1.0)
    env = SimpleNamespace(observation_space=Box((O,)), action_space=action_space)
    nets = ravelled(networks(discrete, setup.critic == "v", rng), setup.critic)
    core = off_policy.Core(env, setup, nets, None, None, None)
    params = nets.init(jax.random.key(0))
    learner = off_policy.Learner(
        params=params,
        target=jnp.asarray(rng.normal(size=nets.target_of(params.critic).shape)),
        opt_state=ActorCritic(*(adam(hypers).init(vector) for vector in params)),
        obs_moments=None,
        extra=module.init_extra(core, hypers, params),
    )
    obs, final_obs, reward = rng.normal(size=(N, O)), rng.normal(size=(N, O)), rng.normal(size=N)
    action = rng.integers(NUM_ACTIONS, size=N) if discrete else rng.uniform(-1, 1, size=(N, A))
    batch = Transition(*map(jnp.asarray, (obs, action, reward, np.arange(N) % 3 == 0, final_obs)))
    return core, learner, batch


def gradient(fn, x):
    out = np.zeros_like(x)
    for i in range(x.size):
        step = np.zeros_like(x)
        step[i] = 1e-6
        out[i] = (fn(x + step) - fn(x - step)) / 2e-6
    return out


def log_tsallis(p, index, floor):
    p = np.maximum(p, floor)
    return np.log(p) if index == 1 else (p ** (index - 1) - 1) / (index - 1)


class Reference:
    """The losses of one step. alpha: temperature. kl_coef: None for SAC, else with ``older``, the actor to stay close to."""

    def __init__(self, discrete, critic, first, hypers, alpha, index=1.0, kl_coef=None, older=None, floor=0.0):
        self.discrete, self.critic, self.first, self.h, self.alpha = discrete, critic, first, hypers, alpha
        self.index, self.kl_coef, self.older, self.floor = index, kl_coef, older, floor

    def actions(self, actor, obs, noise):
        """(u or None, action or None, probabilities of the outcomes [N, K])."""
        out = policy_out(actor, obs, self.discrete, np)
        if self.discrete:
            weight = np.exp(out)
            return None, None, weight / weight.sum(-1, keepdims=True)
        mean, log_std = np.split(out, 2, -1)
        u = mean + np.exp(log_std) * noise
        return u, np.tanh(u), np.ones((N, 1))

    def density(self, actor, obs, u):
        """[N, K, D]: of outcome K, and of action dimension D at that."""
        out = policy_out(actor, obs, self.discrete, np)
        if self.discrete:
            weight = np.exp(out)
            return (weight / weight.sum(-1, keepdims=True))[..., None]
        mean, log_std = np.split(out, 2, -1)
        gauss = np.exp(-0.5 * ((u - mean) / np.exp(log_std)) ** 2) / (np.exp(log_std) * np.sqrt(2 * np.pi))
        return (gauss / (1 - np.tanh(u) ** 2))[:, None]

    def cost(self, actor, obs, u):
        return log_tsallis(self.density(actor, obs, u), self.index, self.floor).sum(-1)

    def q(self, q, obs, action):
        """[2, N, K]."""
        out = np.stack([q_out(one, obs, action, self.discrete, np) for one in np.split(q, 2)])
        return out if self.discrete else out[..., None]

    def soft_value(self, actor, q, obs, noise):
        u, action, prob = self.actions(actor, obs, noise)
        return (prob * (self.q(q, obs, action).min(0) - self.alpha * self.cost(actor, obs, u))).sum(-1)

    def policy_loss(self, actor, q, obs, noise):
        u, action, prob = self.actions(actor, obs, noise)
        q = self.q(q, obs, action)
        q, cost = q[0] if self.first else q.min(0), self.cost(actor, obs, u)
        if self.kl_coef is None:
            loss = self.alpha * cost - q
        else:
            old = self.cost(self.older, obs, u)
            loss = self.kl_coef * cost + self.index * (self.alpha - self.kl_coef) * old - q
        return (prob * loss).sum(-1).mean()

    def step(self, learner, batch, noise_next, noise):
        """(actor, critic, target) after one step from fresh Adam states."""
        h = self.h
        obs, action, reward, terminated, final_obs = map(np.asarray, batch)
        actor, critic, target = np.asarray(learner.params.actor), np.asarray(learner.params.critic), np.asarray(learner.target)
        num_q = 2 * SIZES[self.discrete][1]
        live = np.where(terminated, 0.0, h.gamma)

        def first_adam_step(x, g, rate):
            return x - rate * g / (np.abs(g) + h.adam_eps)

        if self.critic == "q":
            y_q = h.reward_scale * reward + live * self.soft_value(actor, target, final_obs, noise_next)
        else:
            y_q = h.reward_scale * reward + live * v_out(target, final_obs, np)
            y_v = self.soft_value(actor, critic[:num_q], obs, noise)

        def critic_loss(critic):
            q = self.q(critic[:num_q], obs, action)
            q = q[:, np.arange(N), action] if self.discrete else q[..., 0]
            loss = 0.5 * ((q[0] - y_q) ** 2).mean() + 0.5 * ((q[1] - y_q) ** 2).mean()
            return loss if self.critic == "q" else loss + 0.5 * ((v_out(critic[num_q:], obs, np) - y_v) ** 2).mean()

        new_critic = first_adam_step(critic, gradient(critic_loss, critic), h.learning_rate * h.critic_lr_scale)
        climbed = (new_critic if self.critic == "q" else critic)[:num_q]
        slope = gradient(lambda actor: self.policy_loss(actor, climbed, obs, noise), actor)
        copied = new_critic if self.critic == "q" else new_critic[num_q:]
        return first_adam_step(actor, slope, h.learning_rate), new_critic, (1 - h.tau) * target + h.tau * copied
